"""Soteria: a client's representation is perturbed where one linear layer's gradient would show it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import linear
from torch.utils.hooks import RemovableHandle

from privfm.checks import InvalidArgument, fraction, nearest, require
from privfm.contracts import Examples, LocalSteps, LocalTraining
from privfm.learning.one_step import OneStep
from privfm.learning.training import Descent, Losses

_WRAPPED = ".modules_to_save.default"
"""What PEFT adds to the name of a head that is trained whole."""


@final
@dataclass(frozen=True)
class Soteria(LocalTraining):
    """Local training whose gradient of one linear layer is that of a perturbed representation.

    The weight of a linear layer has the gradient `sum_b delta_b r_b^T`: errors times inputs, so that the layer's input
    r, the representation of an example, lies open in it. In that product alone, the share of the features with the
    smallest `||d r_i / d X|| / |r_i|` is set to zero, the same ones for the whole batch, with lengths and magnitudes
    summed over it. To first order, changing r_i by all of itself there moves the input X that fits to it farthest,
    `|r_i| / ||d r_i / d X||`. What the model computes, its loss, and every other gradient, of the layer's own bias too,
    stay as they are.

    X is the image, or for text the word embeddings. Features that are zero in the whole batch are taken last.

    What it protects against: attacks that match all gradients at once without knowing of the defense (DLG, Inverting
    Gradients in the paper). What it does not: features that are left are exact, in this layer; the layers below are
    untouched, and a first linear or attention layer still gives its inputs in closed form; the bias still shows labels.
    Whoever leaves the defended layer out and matches the others is not hindered at all (Balunovic et al., 2022). No
    guarantee of any kind is claimed here; that needs noise under a `DPPlan`.

    What it costs: in every step the features that are taken, often the large ones, are not learned from; beside that
    one more pass through the layers below for every feature of every batch, k + 1 backward passes instead of one.
    Clients are trained one by one, and activations that were kept are computed again.

    Args:
      training: makes the steps: SGD, AdamW or OneStep.
      layer: name of the linear layer, or the end of it, as in `model.named_modules()`; it must be trained and see one
        vector an example (of a ViT or a sequence classifier, the head).
      share: of the layer's inputs that are set to zero, rounded down; in [0, 1).

    Raises:
      InvalidArgument: when training, where the layer is not one of the model's, is not trained, or sees no such vector.

    Source: Sun et al., "Soteria: provable defense against privacy leakage in federated learning from representation
    perspective", 2021: the perturbed representation of least l0 distance, with the length of `(d r_i / d X)^-1` taken
    as one over that of `d r_i / d X`, as the authors' code does. For a batch that code adds up the ratios, which one
    example with r_i = 0 makes infinite unless a constant in units of r is added; the ratio of sums needs none, and is
    the same for one example. Choosing for each example apart, which is not done here, would leave every feature to be
    learned from where it is small. Limits: Balunovic et al., "Bayesian framework for gradient leakage", 2022, and their
    code.
    """

    training: LocalTraining
    layer: str
    share: float

    def __post_init__(self) -> None:
        fraction("share", self.share, zero=True, one=False)
        require(
            isinstance(self.training, Descent | OneStep),
            f"training={type(self.training).__name__}: it does not ask for losses, so that nothing would be perturbed; "
            "use SGD, AdamW or OneStep",
        )

    def run(
        self,
        module: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        losses: Losses,
        examples: Examples,
        generator: Generator,
    ) -> nn.Module:
        layer = _layer(module, self.layer, parameters)

        def perturbed(some: Examples) -> Tensor:
            with _perturbing(module, layer, some, self.share) as watched:
                return losses(watched)

        return self.training.run(module, parameters, perturbed, examples, generator)

    def local_steps(self, examples: int) -> LocalSteps | None:
        return self.training.local_steps(examples)


def kept_features(representation: Tensor, inputs: Tensor, share: float) -> Tensor:
    """Which features of a batch's representations stay, `(k,)` bool.

    | feature                         | ratio `sum ||d r_i / d X|| / sum |r_i|` over the batch |
    |---------------------------------|--------------------------------------------------------|
    | zero for every example          | infinite: taken last                                   |
    | not zero, but constant in X     | 0: taken first                                         |
    | of equal ratio                  | the one of the lower place is taken first              |

    Args:
      representation: `(b, k)`, computed from `inputs`; its row b depends on row b of the inputs only.
      inputs: `(b, ...)`, with gradients.
      share: of the k features that are taken.

    Cost: k backward passes, whose graph is kept; none where no feature is taken.
    """
    kept = representation.new_ones(representation.shape[1], dtype=torch.bool)
    count = int(share * len(kept))
    if count == 0:
        return kept
    lengths = torch.stack([_summed_length(column.sum(), inputs) for column in representation.unbind(1)])
    magnitudes = representation.detach().abs().sum(0)
    ratios = (lengths / magnitudes).masked_fill(magnitudes == 0, torch.inf)
    taken = ratios.argsort(stable=True)[:count]
    return kept.index_fill(0, taken, False)


def _summed_length(total: Tensor, inputs: Tensor) -> Tensor:
    """The lengths of the examples' gradients, summed."""
    (found,) = torch.autograd.grad(total, inputs, retain_graph=True)
    total_length: Tensor = found.flatten(1).norm(dim=1).sum()
    return total_length


def _layer(module: nn.Module, name: str, parameters: Mapping[str, nn.Parameter]) -> nn.Linear:
    """The one trained linear layer of that name."""
    trained = {id(parameter) for parameter in parameters.values()}
    known = {
        place.replace(_WRAPPED, ""): part
        for place, part in module.named_modules()
        if isinstance(part, nn.Linear) and id(part.weight) in trained
    }
    found = [place for place in known if place == name or place.endswith(f".{name}")]
    if len(found) != 1:
        number = "none" if not found else f"{len(found)}: {', '.join(found)}"
        raise InvalidArgument(
            f"layer={name!r} has to name one trained linear layer of the model, it names {number}"
            f"{nearest(name, known) if not found else '; give more of its name'}"
        )
    return known[found[0]]


@contextmanager
def _perturbing(module: nn.Module, layer: nn.Linear, examples: Examples, share: float) -> Iterator[Examples]:
    """Examples under whose losses the layer's weight gets the gradient of perturbed inputs."""
    seen: list[Tensor] = []

    def forward(_: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
        representation = given[0]
        require(
            representation.dim() == 2,
            f"layer: it sees a tensor of shape {tuple(representation.shape)}, expected one vector an example, (b, k)",
        )
        require(
            bool(seen) and representation.requires_grad,
            "layer: what it sees does not depend on the images or word embeddings that the model is called with",
        )
        shown = representation.detach() * kept_features(representation, seen[-1], share)
        weighted = linear(shown, layer.weight)
        # The output's own value, with its gradient for what lies below; the weight's comes from what is shown alone.
        return linear(representation, layer.weight.detach(), layer.bias) + (weighted - weighted.detach())

    with ExitStack() as stack:
        stack.enter_context(_removed(layer.register_forward_hook(forward)))
        yield _watched(module, examples, seen, stack)


def _watched(module: nn.Module, examples: Examples, seen: list[Tensor], stack: ExitStack) -> Examples:
    """The examples with inputs that have gradients: their images, or for text what the word embeddings make of it.

    They have no rows any more: activations that were kept know nothing of embeddings.
    """
    images = [name for name, value in examples.inputs.items() if value.is_floating_point()]
    if images:
        seen.append(examples.inputs[images[0]].detach().clone().requires_grad_())
        return examples.with_inputs({**examples.inputs, images[0]: seen[0]})

    def embedded(_: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
        seen.append(output if output.requires_grad else output.detach().requires_grad_())
        return seen[-1]

    models: list[Any] = [part for part in module.modules() if hasattr(part, "get_input_embeddings")]
    require(
        bool(models),
        f"{type(module).__name__} is called with whole numbers and does not say what embeds them: give images, "
        "or a model with get_input_embeddings()",
    )
    stack.enter_context(_removed(models[0].get_input_embeddings().register_forward_hook(embedded)))
    return examples.with_inputs(examples.inputs)


@contextmanager
def _removed(hook: RemovableHandle) -> Iterator[None]:
    """The hook for the while."""
    try:
        yield
    finally:
        hook.remove()
