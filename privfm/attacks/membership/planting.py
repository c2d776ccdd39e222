"""A neuron that one example alone excites: the server plants it, and the client's update says whether it was there."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field
from math import sqrt
from typing import Any, Final, final

import torch
from torch import Generator, Tensor, nn

from privfm.attacks.membership.updates import Losses
from privfm.attacks.rates import upper_rate
from privfm.attacks.reconstruction.architectures import asleep
from privfm.checks import InvalidArgument, at_least, fraction, nearest_if_any, positive, require
from privfm.contracts.learning import Examples
from privfm.contracts.reconstruction import Observation

_HEIGHT: Final = 12.0
"""How far below the activation's zero the highest of the fitted public examples is; the target is a third of it above.
tanh is exactly -1 in float32 from -9.02 down, GELU exactly 0 from -6; to ReLU it is a scale."""

_CUT: Final = 0.75
"""Where the activation's zero lies between the highest public example, 0, and the target, 1. Of .5, .75 and .9 tried on
`digits` with seed 100, .5 let four times as many targets' neurons be excited by somebody held out; beyond .75 nothing
was won, and several local steps have less room before the target itself falls below."""

_SHRINKAGE: Final = 0.1
"""Of the covariance towards a multiple of the identity: a share of the mean variance that every direction gets. Chosen
on `digits` with seed 100 among .001, .01, .1 and 1: the first and the last let more other examples through."""

_ROUNDING: Final = 1e-5
"""Relative to the largest entry: float32 sums of a few thousand examples are off by less, and no trap was sprung."""

_CONFIDENCE: Final = 0.95
"""Of the upper limit of the rate at which other examples excite the neuron."""

_BATCH: Final = 64
"""Public examples in one forward pass."""


def cross_entropy(model: nn.Module, examples: Examples) -> Tensor:
    """Losses `(k,)` of a classifier's logits, or of an output that has `logits`."""
    output: Any = model(**examples.inputs)
    logits: Tensor = getattr(output, "logits", output)
    return nn.functional.cross_entropy(logits, examples.labels, reduction="none")


@final
@dataclass(frozen=True)
class Sighting:
    """What one update says of the target.

    Attributes:
      share: of the target's gradient in the update's: 1/B in one step's mean over a batch of B with the target in it,
        1/(n B) in the mean of n such clients, 0 where nobody excites the neuron; approximate over several steps.
      misfit: share of the neuron's gradient, in length, that is not the target's: 0 for the target alone, near 1 for
        others; NaN where nothing was excited. Noise and several steps raise it.
      p_value: at most the probability of such a share without the target: that one of the B other examples excites the
        neuron (at the upper 95 % limit of the rate on public ones), or that the declared noise alone gives it. 1 where
        the share is not positive; None where the number of examples was not declared.
    """

    share: float
    misfit: float
    p_value: float | None


@final
@dataclass(frozen=True)
class Planted:
    """A prepared model, and what its server must remember to read the answers.

    Attributes:
      model: to be sent to the clients.
      trap: how it was made.
      gradient: of the target alone at the place that is read, `(s,)` float64.
      rest: what the activation gives for everybody else.
      margin: deviations of the public examples between their mean and the target.
      excited: held-out public examples that excite the neuron, of `held_out`.
      held_out: their number; the neuron was not fitted to them.
    """

    model: nn.Module = field(repr=False)
    trap: MembershipTrap
    gradient: Tensor = field(repr=False)
    rest: float
    margin: float
    excited: int
    held_out: int

    @property
    def rate(self) -> float:
        """Upper 95 % limit of the share of public examples that excite the neuron (Clopper, Pearson 1934).

        About 3 over the number held out where none does: more public examples certify more.
        """
        return upper_rate(self.excited, self.held_out, 1 - _CONFIDENCE)

    def false_rate(self, examples: int) -> float:
        """At most the probability that one of so many other examples excites it, if they are drawn like public ones."""
        at_least("examples", examples, 0)
        return 1 - (1 - self.rate) ** examples

    def read(self, observation: Observation) -> Sighting:
        """Whether the target is behind a client's update, or behind a sum of clients.

        Args:
          observation: whose model is, or equals, `model`. Declared `examples` give the p-value; declared `noise` must
            be given where there is some: without it any noise is taken for the target.

        Raises:
          InvalidArgument: what the trap reads was not sent, is hidden in part, or is Adam's change.
        """
        seen = self.trap.place(dict(observation.gradients), self.rest)
        length = float(seen.norm())
        share = float(seen @ self.gradient / self.gradient.square().sum())
        misfit = float((seen - share * self.gradient).norm()) / length if length > 0 else float("nan")
        return Sighting(share, misfit, self._p_value(observation, share))

    def _p_value(self, observation: Observation, share: float) -> float | None:
        from scipy import stats

        declared = observation.declared
        if declared.examples is None:
            return None
        if share <= 0:
            return 1.0
        change = observation.change
        scale = 1.0 if change is None else change.learning_rate * change.weight
        # A column and its correction by `rest` times the bias are noisy independently of each other.
        deviation = declared.noise / scale * sqrt(1 + self.rest**2) / float(self.gradient.norm())
        by_noise = float(stats.norm.sf(share / deviation)) if deviation > 0 else 0.0
        return min(1.0, self.false_rate(declared.examples) + by_noise)


@final
@dataclass(frozen=True)
class MembershipTrap:
    """Replaces one neuron by a detector of the target, and reads off the update whether it ever fired.

    The server knows the target with its label, its own model, and public examples like the clients'. It computes what
    the layer is given for them and plants `w = gain C^-1 (x_target - mean)` with a bias between the target and the
    highest of one half of the public examples (mean and shrunk covariance C are of this half; the other half measures
    how often the neuron fires falsely). Behind a gating activation (ReLU, GELU, tanh) everybody else gives one
    value, `rest`, exactly. What is read:

    | `reads`                              | the gradient that is read                                               |
    |--------------------------------------|-------------------------------------------------------------------------|
    | name of the next linear layer        | of its column behind the neuron, minus `rest` times that of its bias:   |
    |                                      | `sum_i dL_i/dz (h_i - rest)`. The planted layer may be frozen. The      |
    |                                      | column is set to zero, so that the model computes what it did, but for  |
    |                                      | the one neuron that it loses                                            |
    | empty                                | of the planted neuron's own weights and bias: the layer must be trained,|
    |                                      | and the activation must not saturate upwards (ReLU, GELU; no tanh)      |

    | behind the update                    | result                                                                  |
    |--------------------------------------|-------------------------------------------------------------------------|
    | one step of gradient descent         | exact: the share is 1/B with the target, 0 without (if nobody else      |
    |                                      | excites the neuron: `Planted.rate`)                                     |
    | several steps                        | without the target still exactly 0 while the layer's inputs stay clear  |
    |                                      | of the cut; with it about the share, as the target's loss falls         |
    | sum or mean of n clients             | as one of all their examples: somebody has it, nobody knows who         |
    | clipping                             | shares are smaller by its factor                                        |
    | noise                                | declared: it enters the p-value                                         |
    | dropout before `reads`               | harmless where `rest` is 0; behind tanh it is noise that is not declared|
    | Adam                                 | refused                                                                 |
    | a client that looks at the model     | sees a neuron that never fires                                          |

    Low-rank adapters have no activation and gate nothing themselves. On a BERT-like encoder with a frozen body two
    places work: the pooler (tanh), read in the classifier that is trained whole (without its dropout), and the first
    map of a feed-forward block (GELU), read in the A of an adapter on the second (`reads` ends in `lora_A.default`;
    its B must not be zero: from the second round on, or where the server sets it). Adapters on query and value maps
    alone, with a frozen head, give no such place: there every token reaches each row of A.

    Cost: forward passes over the public examples, and a solve of the layer's width.

    Args:
      layer: name of an `nn.Linear` with a bias, followed by an activation.
      reads: see above.
      row: of the layer's outputs, the one that is replaced; several targets take one each, planted one after another.
      height: of the gate. GELU needs the default. Behind tanh a higher one (100) is sharper at no cost: fewer examples
        between the others and the target excite the neuron. To ReLU it is a scale, against noise.
      shrinkage: of the covariance, in (0, 1].

    Source: Nguyen, Lai, Tran, Phan, Thai, "Active membership inference attack under local differential privacy in
    federated learning", AISTATS 2023 (a neuron that the target alone activates; theirs is trained, with two layers);
    Boenisch et al., "When the curious abandon honesty", EuroS&P 2023 (trap weights). The whitened direction is Fisher's
    discriminant; reading it in the next layer, behind any gate, is ours as far as we know.
    """

    layer: str
    reads: str = ""
    row: int = 0
    height: float = _HEIGHT
    shrinkage: float = _SHRINKAGE

    used = ("a model it has prepared", "the target with its label", "public examples")

    def __post_init__(self) -> None:
        at_least("row", self.row, 0)
        positive("height", self.height)
        fraction("shrinkage", self.shrinkage)

    def prepare(
        self,
        model: nn.Module,
        target: Examples,
        public: Examples,
        generator: Generator,
        losses: Losses = cross_entropy,
    ) -> Planted:
        """Plants the neuron in a copy.

        Args:
          model: as it would have been sent; it stays as it is.
          target: one example.
          public: like the clients' and without the target; half of them are held out.
          generator: which half.
          losses: what clients minimise the mean of.

        Raises:
          InvalidArgument: no such layers, the target is not apart from the public examples, the activation does not
            gate, or no gradient of the target reaches the place that is read.
        """
        require(len(target) == 1, f"{len(target)} targets: expected one; plant another in another row")
        require(len(public) >= 4, f"{len(public)} public examples: expected at least 4, half of them held out")
        trapped = deepcopy(model)
        layer, following = self._layers(trapped)
        order = torch.randperm(len(public), generator=generator)
        fitted, held_out = public.take(order[: len(public) // 2]), public.take(order[len(public) // 2 :])
        margin = self._plant(layer, _given(trapped, layer, target)[0], _given(trapped, layer, fitted))
        rest = 0.0
        if following is not None:
            rest = self._rest(trapped, following, target, fitted)
            with torch.no_grad():
                following.weight[:, self.row] = 0.0
        gradient = self._gradient(trapped, target, losses, rest)
        require(
            float(gradient.norm()) > 0,
            f"no gradient of the target reaches {self.reads or self.layer!r}: its loss is zero, the path is closed "
            "(an adapter's B before the first round), or the activation saturates (name the next layer in `reads`)",
        )
        lengths = [
            float(self._gradient(trapped, held_out.take(torch.tensor([place])), losses, rest).norm())
            for place in range(len(held_out))
        ]
        excited = sum(length > _ROUNDING * float(gradient.norm()) for length in lengths)
        return Planted(trapped, self, gradient, rest, margin, excited, len(held_out))

    def place(self, gradients: dict[str, Tensor], rest: float) -> Tensor:
        """The part of named gradients that is read, `(s,)` float64; rounding counts as nothing.

        Raises:
          InvalidArgument: it was not sent, or is hidden in part.
        """
        if not self.reads:
            weight, bias = self._sent(gradients, self.layer, "weight"), self._sent(gradients, self.layer, "bias")
            return self._whole(torch.cat([weight[self.row], bias[self.row][None]]).double().cpu())
        column = self._sent(gradients, self.reads, "weight")[:, self.row].double()
        if rest == 0:
            return self._whole(column.cpu())
        taken = rest * self._sent(gradients, self.reads, "bias").double()
        found = column - taken
        least = _ROUNDING * torch.maximum(column.abs().max(), taken.abs().max())
        return self._whole(found.masked_fill(found.abs() <= least, 0.0).cpu())

    def _sent(self, gradients: dict[str, Tensor], layer: str, name: str) -> Tensor:
        full = f"{layer}.{name}"
        require(full in gradients, f"no gradient of {full} was sent{nearest_if_any(full, gradients)}")
        return gradients[full]

    def _whole(self, found: Tensor) -> Tensor:
        require(bool(found.isfinite().all()), f"what is read of {self.reads or self.layer!r} is hidden in part")
        return found

    def _layers(self, model: nn.Module) -> tuple[nn.Linear, nn.Linear | None]:
        layer = _linear(model, "layer", self.layer)
        require(layer.bias is not None, f"layer={self.layer!r} has no bias; the neuron needs a threshold")
        require(self.row < layer.out_features, f"row={self.row}: {self.layer!r} has {layer.out_features} outputs")
        if not self.reads:
            return layer, None
        following = _linear(model, "reads", self.reads)
        require(
            following.in_features == layer.out_features,
            f"reads={self.reads!r} is given {following.in_features} numbers, {self.layer!r} puts out "
            f"{layer.out_features}: expected the next linear layer",
        )
        return layer, following

    def _plant(self, layer: nn.Linear, target: Tensor, public: Tensor) -> float:
        """Sets the neuron, in place, and returns the margin. Features `(positions, k)` and `(m, positions, k)`."""
        background = public.flatten(0, 1)
        mean = background.mean(0)
        centred = background - mean
        covariance = centred.T @ centred / len(centred)
        variance = covariance.diagonal().mean()
        require(float(variance) > 0, f"public examples give {self.layer!r} all the same: nothing to tell apart")
        covariance = (1 - self.shrinkage) * covariance + self.shrinkage * variance * torch.eye(len(mean)).double()
        directions = torch.linalg.solve(covariance, (target - mean).T)  # (k, positions)
        best = int(((target - mean).T * directions).sum(0).argmax())  # the position furthest out, by Mahalanobis
        scores, own = centred @ directions[:, best], float((target[best] - mean) @ directions[:, best])
        top = float(scores.max())
        require(
            own > top,
            f"the target is not apart from the public examples in {self.layer!r}: it scores {own:.3g}, the highest of "
            f"them {top:.3g} (is it among them?); take a wider layer",
        )
        cut = top + _CUT * (own - top)
        gain = self.height / (cut - top)
        row = gain * directions[:, best]
        with torch.no_grad():
            layer.weight[self.row] = row.to(layer.weight)
            layer.bias[self.row] = -gain * cut - float(row @ mean)
        return own / max(float(scores.std()), torch.finfo(torch.float64).tiny)

    def _rest(self, model: nn.Module, following: nn.Linear, target: Examples, public: Examples) -> float:
        """What the activation gives for those who do not excite the neuron; in a model that gates."""
        theirs = _given(model, following, public)[..., self.row].flatten()
        own = _given(model, following, target)[..., self.row].flatten()
        rest = float(theirs.median())
        apart, noise = float((own - rest).abs().max()), float((theirs - rest).abs().max())
        require(
            noise <= _ROUNDING * apart,
            f"between {self.layer!r} and {self.reads!r} nothing gates: public examples give values {noise:.3g} apart, "
            f"the target {apart:.3g}; expected ReLU, GELU or tanh there, and `reads` the very next linear layer",
        )
        return rest if abs(rest) > _ROUNDING * apart else 0.0

    def _gradient(self, model: nn.Module, example: Examples, losses: Losses, rest: float) -> Tensor:
        parameters = dict(model.named_parameters())
        names = [f"{self.reads or self.layer}.{name}" for name in ("weight", "bias")]
        wanted = {name: parameters[name] for name in names if name in parameters}
        frozen = [name for name, one in wanted.items() if not one.requires_grad]
        require(not frozen, f"{', '.join(frozen)}: frozen, so that no client sends its gradient; read another layer")
        with torch.enable_grad(), asleep(model):
            loss = losses(model, example).mean()
        found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
        full = {
            name: torch.zeros_like(wanted[name]) if one is None else one
            for name, one in zip(wanted, found, strict=True)
        }
        return self.place(full, rest)


def _linear(model: nn.Module, argument: str, name: str) -> nn.Linear:
    layers = {key: module for key, module in model.named_modules() if isinstance(module, nn.Linear)}
    require(name in layers, f"{argument}={name!r} is no linear layer of the model{nearest_if_any(name, layers)}")
    return layers[name]


def _given(model: nn.Module, layer: nn.Module, examples: Examples) -> Tensor:
    """What a layer is given for each example, `(n, positions, k)` float64 on the CPU."""
    given: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        given.append(inputs[0].detach().double().cpu())

    found = []
    hook = layer.register_forward_pre_hook(keep)
    try:
        with torch.no_grad(), asleep(model):
            for first in range(0, len(examples), _BATCH):
                batch = examples.take(torch.arange(first, min(first + _BATCH, len(examples))))
                given.clear()
                model(**batch.inputs)
                if not given or len(given[0]) != len(batch):
                    raise InvalidArgument("the model does not call this layer once with a row an example; name another")
                found.append(given[0].reshape(len(batch), -1, given[0].shape[-1]))
    finally:
        hook.remove()
    return torch.cat(found)
