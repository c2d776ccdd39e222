"""Labels from the classifier's last linear layer, found by what the model computes and addressed by parameter name.

Under the mean softmax cross-entropy of B examples the gradient of logit offset c is `g_c = mean_i p_ic - n_c / B` with
the probabilities p and the number n_c of examples of label c. It is the head's bias gradient. A head without a bias has
`G u = mean_i (p_i - y_i) <x_i, u>` instead, which is about the same where all features x_i have nearly one product with
u: u is the mean of features that the server computes for inputs of its own, or all ones where it has none.

| behind the gradient                        | what is read                                                            |
|--------------------------------------------|-------------------------------------------------------------------------|
| one example, bias or three or more labels  | its label, always                                                       |
| several, number not declared               | labels that are certainly there (from a bias), each once                |
| several, number declared                   | counts: an estimate. Exact only from the inputs' own probabilities      |
| the texts or images themselves recovered   | the label of each, exactly: `labels_given_inputs`                       |
| several local steps of gradient descent    | as several examples, with the model's movement as an error              |
| clipping, a sum instead of a mean          | `impact` does not see scale; `probabilities` is off by it               |
| noise                                      | declared, labels within three deviations of 0 are not called certain    |
| Adam                                       | refused                                                                 |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, final

import torch
from torch import Generator, Tensor, nn

from privfm.attacks.reconstruction.classifier_head import given_head, head_of, random_tokens, traced
from privfm.attacks.reconstruction.linear_layer import label_of_one
from privfm.checks import InvalidArgument, at_least, one_of, require
from privfm.contracts import Observation, Reconstruction, ReconstructionAttack, Watch

_INPUTS: Final = 32
"""Random inputs whose mean probabilities and features stand in for the clients': a mean's error falls with its root."""

_DEVIATIONS: Final = 3.0
"""Declared noise explains gradients up to so many of its standard deviations (one in 740 is beyond, one-sided)."""


def counts_by_impact(gradient: Tensor, examples: int, least: float = 0.0) -> Tensor:
    """How many examples each label has, from the sign and size of its gradient alone, whatever the gradient's scale.

    Each negative label is there once; then, one example after the other, the label whose gradient is lowest after one
    example's mean share has been taken from it for each one found. The share of an example is the sum of the negative
    gradients over B, times 1 + 1/c for what other labels' probabilities hide.

    Args:
      gradient: `(c,)`, of the head's bias, or row sums of the weight's under non-negative features.
      examples: B.
      least: gradients above its negative are not called negative.

    Returns:
      `(c,)` int64 that sums to B. If more labels are negative than there are examples, the lowest are there once.

    Raises:
      InvalidArgument: not `(c,)`, not finite, or no gradient is negative: then it is zero or no such gradient.

    Source: Wainakh et al., "User-level label leakage from gradients in federated learning", PoPETs 2022, algorithm 1
    without auxiliary data (LLG, offset 0). Some public code takes each share off a fixed label in the second stage,
    so that it returns one label for all further examples.

    >>> counts_by_impact(torch.tensor([0.25 - 3 / 4, 0.25, 0.25 - 1 / 4 - 0.01, 0.25]), 4).tolist()
    [3, 0, 1, 0]
    """
    left, counts = _first_stage(gradient, examples, least)
    negative = left[left < 0].sum()
    if not float(negative) < 0:
        raise InvalidArgument("no entry of the gradient is negative: it is zero, or not of a softmax cross-entropy")
    share = negative * (1 + 1 / len(left)) / examples
    left = left - share * counts
    for _ in range(examples - int(counts.sum())):
        lowest = int(left.argmin())
        counts[lowest] += 1
        left[lowest] -= share
    return counts


def counts_by_probabilities(gradient: Tensor, probabilities: Tensor, examples: int, least: float = 0.0) -> Tensor:
    """How many examples each label has, from `n = B (mean p - g)`: exact if p is the examples' own.

    The nearest whole numbers that sum to B, of which every certainly present label has at least one.

    Args:
      gradient: `(c,)`, of the head's bias under the mean loss.
      probabilities: `(c,)`, means over the examples, or over inputs that stand in for them.
      examples: B.
      least: gradients above its negative are not called negative.

    Returns:
      `(c,)` int64 that sums to B.

    Raises:
      InvalidArgument: shapes do not fit, or something is not finite.

    Source: Geng et al., "Towards general deep leakage in federated learning", 2021, section on label restoration, with
    probabilities of stand-in inputs. The rounding to whole numbers of a given sum is ours: the objective is separable
    and convex, so that adding one where it helps most each time is optimal.

    >>> counts_by_probabilities(torch.tensor([-0.5, 0.1, 0.4]), torch.tensor([0.25, 0.35, 0.4]), 4).tolist()
    [3, 1, 0]
    """
    _, counts = _first_stage(gradient, examples, least)
    require(
        probabilities.shape == gradient.shape and bool(probabilities.isfinite().all()),
        f"probabilities has shape {tuple(probabilities.shape)}: expected {tuple(gradient.shape)}, all finite",
    )
    wanted = examples * (probabilities.double() - gradient.double()).to(counts.device)
    for _ in range(examples - int(counts.sum())):
        counts[int((wanted - counts).argmax())] += 1
    return counts


def distinct_labels(weight: Tensor, examples: int) -> tuple[int, ...]:
    """The labels of examples that all differ: those whose row of the weight's gradient has the lowest entry.

    Right only if no label occurs twice and features are not negative (after a ReLU).

    Args:
      weight: gradient of the head's weight, `(c, h)`.
      examples: B, at most c.

    Raises:
      InvalidArgument: not `(c, h)`, not finite, or more examples than labels.

    Source: Yin et al., "See through gradients: image batch recovery via GradInversion", CVPR 2021, equation 8 (batch
    label restoration).
    """
    require(weight.dim() == 2, f"weight has shape {tuple(weight.shape)}: expected (c, h)")
    require(bool(weight.isfinite().all()), "the weight's gradient is not finite: a part of it is hidden")
    at_least("examples", examples, 1)
    require(examples <= len(weight), f"{examples} examples of {len(weight)} labels cannot all differ; count them")
    lowest = weight.min(dim=1).values.argsort(stable=True)[:examples]
    return tuple(sorted(lowest.tolist()))


def labels_of_examples(
    weight: Tensor, features: Tensor, probabilities: Tensor, bias: Tensor | None = None
) -> tuple[tuple[int, ...], float]:
    """The label of each example whose features are known: solves `B G = (P - Y)^T X` for Y.

    Args:
      weight: gradient G of the head's weight under the mean loss, `(c, h)`.
      features: what the head was given, X `(B, h)`.
      probabilities: P `(B, c)`.
      bias: gradient of the head's bias, `(c,)`: one more column.

    Returns:
      The labels, and how far Y is from them at worst: 0 to rounding where the features are independent and all the
      examples are there; more than 0.5 says that the labels mean nothing.

    Raises:
      InvalidArgument: shapes do not fit.

    Source: a linear system; ours as far as we know.
    """
    batch, classes = probabilities.shape
    require(
        weight.shape == (classes, features.shape[1]) and len(features) == batch,
        f"weight {tuple(weight.shape)}, features {tuple(features.shape)}, probabilities {tuple(probabilities.shape)}: "
        "expected (c, h), (B, h), (B, c)",
    )
    given, moved = features.double(), weight.double()
    if bias is not None:
        given = torch.cat([given, torch.ones_like(given[:, :1])], dim=1)
        moved = torch.cat([moved, bias.double()[:, None]], dim=1)
    errors = batch * (moved @ torch.linalg.pinv(given)).T
    truths = probabilities.double() - errors
    labels = truths.argmax(1)
    apart = (truths - nn.functional.one_hot(labels, classes)).abs().max()
    return tuple(labels.tolist()), float(apart)


def labels_given_inputs(
    observation: Observation, inputs: Sequence[Tensor], head: str | None = None
) -> tuple[tuple[int, ...], float]:
    """The label of each recovered text or image, and how far the solution is from labels at worst.

    Args:
      observation: of the gradient of the mean loss over exactly these examples.
      inputs: token ids `(T,)`, or images `(channels, height, width)`; all that are behind the observation.
      head: the weight's parameter name; None finds it.

    Returns:
      As `labels_of_examples`. A missing, wrong or surplus input shows in the second.

    Raises:
      InvalidArgument: there is no input, no head, or its gradient is not seen.
    """
    require(len(inputs) > 0, "inputs is empty: expected at least one text or image")
    weight_name, bias_name = (
        given_head(observation.model, head) if head else head_of(observation.model, inputs[0][None])
    )
    weight, bias = _seen(observation, weight_name), _seen(observation, bias_name)
    if weight is None:
        raise InvalidArgument(f"{weight_name} was not sent, or is hidden in part: labels of examples need it whole")
    runs = [traced(observation.model, one[None], weight_name) for one in inputs]
    features = torch.cat([features for _, features, _ in runs])
    return labels_of_examples(weight, features, torch.cat([logits for logits, _, _ in runs]).softmax(1), bias)


@final
@dataclass(frozen=True)
class _Head:
    """What the server sees of the head's gradients; None for what was not sent whole."""

    name: str
    weight: Tensor | None
    bias: Tensor | None

    def per_label(self, direction: Tensor | None) -> Tensor:
        """The bias's gradient, `(c,)` float64; without one, what it would be if all features were this direction.

        None for a direction gives the weight's row sums.
        """
        if self.bias is not None:
            return self.bias.double()
        if self.weight is None:
            raise InvalidArgument(f"{self.name} was not sent whole")
        rows = self.weight.double()
        return rows.sum(1) if direction is None else rows @ direction / direction.square().sum()


@final
@dataclass(frozen=True)
class Labels(ReconstructionAttack):
    """Labels behind a classifier's gradient, from its head alone.

    Which method counts best depends on the model. An untrained one gives every input about the same probabilities, so
    that `probabilities` is nearly exact; one that fits its data does not. Share of labels found in 20 batches (half of
    each has one label) of `digits`, a network of one hidden layer, after 0 / 30 / 300 steps of training:

    | B   | `impact`        | `probabilities`, random inputs | each label equally often |
    |-----|-----------------|--------------------------------|--------------------------|
    | 8   | .97 / .84 / .64 | 1.00 / .75 / .45               | .39                      |
    | 32  | .64 / .70 / .58 | .98 / .73 / .52                | .53                      |
    | 128 | .59 / .66 / .62 | .96 / .72 / .55                | .55                      |

    With fewer labels than examples `impact` says little: of two labels in batches of 32 it finds half, the level of
    chance, where `probabilities` finds all (MiniLM with a random head).

    Args:
      method: of counting several examples: `impact` (any scale), `probabilities` (of stand-in inputs), `distinct` (each
        label at most once); None: `probabilities` for a single client's if the model can be run, else `impact`.
      head: the weight's parameter name; None finds it.
      public: inputs like the clients', token ids `(n, T)` without padding or images `(n, channels, height, width)`;
        None: random ones, where they are needed.

    Source: of one example Zhao, Mopuri, Bilen, "iDLG", 2020; of several, see `counts_by_impact`,
    `counts_by_probabilities` and `distinct_labels`.
    """

    method: Literal["impact", "probabilities", "distinct"] | None = None
    head: str | None = None
    public: Tensor | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.method is not None:
            one_of("method", self.method, ("impact", "probabilities", "distinct"))

    @property
    def needs(self) -> tuple[str, ...]:
        """Counts need `examples` as well; without it, each label that is certainly there is named once."""
        return ("the head's gradient",)

    def refusal(self, observation: Observation) -> str:
        try:
            head = self._head(observation)
        except InvalidArgument as reason:
            return str(reason)
        if head.weight is None and head.bias is None:
            return f"neither {head.name} nor a bias beside it was sent whole; `labels_present` reads a part of a bias"
        if not any(bool(one.any()) for one in (head.weight, head.bias) if one is not None):
            return f"the gradient of {head.name} is zero: nothing can be read from it"
        if any(len(one) == 1 for one in (head.weight, head.bias) if one is not None):
            return f"{head.name} puts out one number: a regression has no labels"
        return self._misfit(observation, head)

    def _misfit(self, observation: Observation, head: _Head) -> str:
        """Why the method does not go with what there is."""
        if self.method == "distinct":
            if head.weight is None:
                return f"method='distinct' reads {head.name}, which was not sent whole; take method='impact'"
            if (observation.declared.examples or 0) > len(head.weight):
                return f"more examples than {len(head.weight)} labels are not distinct; take method='impact'"
        if self.method == "probabilities":
            if observation.clients > 1:
                return "a sum and a mean of clients are not told apart; take method='impact', which does not see scale"
            if self._inputs(observation, Generator().manual_seed(0)) is None:
                return "method='probabilities' runs the model: declare `shape`, or give `public` inputs"
        return ""

    def reconstruct(self, rounds: Sequence[Observation], watch: Watch, generator: Generator) -> Reconstruction:
        observation = rounds[0]
        head, examples = self._head(observation), observation.declared.examples
        shape = observation.declared.shape is not None and self.public is None and self.head is None
        used = ["shape"] if shape else []
        probabilities = direction = None
        method = self._counting(observation)
        if head.bias is None or (method == "probabilities" and examples is not None and examples > 1):
            probabilities, direction, more = self._stood_in(observation, head.name, watch, generator)
            used += more
        gradient, least = head.per_label(direction), 0.0
        if head.bias is not None and observation.declared.noise > 0:
            least = self._explained(observation)
            used.append("noise")
        if examples is None:
            found = (gradient < -least).nonzero()[:, 0].tolist()
        else:
            used.append("examples")
            found = _labels(head, gradient, probabilities if method == "probabilities" else None, examples, least)
            if method == "distinct" and examples > 1 and head.weight is not None:
                found = list(distinct_labels(head.weight, examples))
        return Reconstruction(
            labels=tuple(found),
            used=tuple(dict.fromkeys(used)),
            facts={"head": head.name, "read from": "weight" if head.bias is None else "bias"},
            stopped=watch.stopped,
        )

    def _counting(self, observation: Observation) -> str:
        if self.method is not None:
            return self.method
        runs = observation.clients == 1 and self._inputs(observation, Generator().manual_seed(0)) is not None
        return "probabilities" if runs else "impact"

    def _head(self, observation: Observation) -> _Head:
        if self.head is not None:
            names = given_head(observation.model, self.head)
        else:
            shape = observation.declared.shape
            inputs = self.public if self.public is not None or shape is None else torch.zeros(1, *shape)
            names = head_of(observation.model, inputs)
        return _Head(names[0], _seen(observation, names[0]), _seen(observation, names[1]))

    def _inputs(self, observation: Observation, generator: Generator) -> Tensor | None:
        if self.public is not None:
            return self.public
        if (shape := observation.declared.shape) is not None:
            return torch.randn(_INPUTS, *shape, generator=generator)
        return random_tokens(observation.model, _INPUTS, generator)

    def _stood_in(
        self, observation: Observation, weight_name: str, watch: Watch, generator: Generator
    ) -> tuple[Tensor | None, Tensor | None, list[str]]:
        """Mean probabilities and features of inputs of the server's own, and what they are; None without any."""
        inputs = self._inputs(observation, generator)
        if inputs is None:
            return None, None, []
        probabilities, features = [], []
        for one in inputs:
            logits, feature, _ = traced(observation.model, one[None], weight_name)
            probabilities.append(logits.softmax(1))
            features.append(feature)
            if watch.over:
                break
        what = ["public inputs"] if self.public is not None else ["shape"] if observation.declared.shape else []
        return torch.cat(probabilities).mean(0), torch.cat(features).mean(0), what

    @staticmethod
    def _explained(observation: Observation) -> float:
        """How large a gradient the declared noise explains."""
        change = observation.change
        steps = 1.0 if change is None else change.learning_rate * change.weight
        return _DEVIATIONS * observation.declared.noise / steps


def _labels(head: _Head, gradient: Tensor, probabilities: Tensor | None, examples: int, least: float) -> list[int]:
    """So many labels in ascending order, by probabilities if there are some and else by impact."""
    if examples == 1:
        single = label_of_one(head.weight) if head.bias is None and head.weight is not None else None
        return [int(gradient.argmin()) if single is None else single]
    if probabilities is not None:
        counts = counts_by_probabilities(gradient, probabilities, examples, least)
    else:
        # The true entries sum to 0, so that one is negative; under noise perhaps only once their mean is taken off.
        some = bool((gradient < 0).any())
        counts = counts_by_impact(gradient if some else gradient - gradient.mean(), examples, least)
    found: list[int] = torch.arange(len(counts)).repeat_interleave(counts.cpu()).tolist()
    return found


def _seen(observation: Observation, name: str | None) -> Tensor | None:
    """A gradient that was sent whole."""
    found = observation.gradients.get(name) if name is not None else None
    return None if found is None or bool(found.isnan().any()) else found.cpu()


def _first_stage(gradient: Tensor, examples: int, least: float) -> tuple[Tensor, Tensor]:
    """The gradient in float64, and 1 for each label that is there for certain, at most B of them."""
    require(
        gradient.dim() == 1 and bool(gradient.isfinite().all()),
        f"gradient has shape {tuple(gradient.shape)}: expected (c,), all finite",
    )
    at_least("examples", examples, 1)
    values = gradient.detach().double()
    lowest = values.argsort(stable=True)[:examples]
    counts = torch.zeros(len(values), dtype=torch.int64, device=values.device)
    counts[lowest[values[lowest] < -least]] = 1
    return values, counts
