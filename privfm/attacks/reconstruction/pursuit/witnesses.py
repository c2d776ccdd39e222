"""Checks of a whole text that its own search has not used: other layers must have seen it too."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Final, final

import torch
from torch import Tensor, nn

from privfm.attacks.reconstruction.architectures import asleep
from privfm.attacks.reconstruction.bags import input_gradients, span_under_noise
from privfm.attacks.reconstruction.subspace import distances
from privfm.attacks.reconstruction.text_models import TextModel

_LEAST: Final = 1e-3
"""Distance under which a text passes: in float32 true texts are under 5e-5."""

_ROUNDING: Final = 8.0
"""Units of the type's precision, of the largest singular value, up to which others are rounding: MiniLM's reach 0.1."""

_SLACK: Final = 8
"""Directions that a span must leave open to say anything: a random vector then keeps sqrt(8 / 384) = 0.14 of itself."""

_BLURRED: Final = 0.05
"""Tolerance at which a witness no longer tells texts apart."""


class Witness(ABC):
    """One check.

    Attributes:
      name: for the record.
      tolerance: largest distance of a text that passes.
    """

    name: str
    tolerance: float

    @abstractmethod
    def distance(self, text: Sequence[int]) -> float:
        """How far the text's states lie outside of what the layer was given: 0 for a text of the batch."""


@final
class StateWitness(Witness):
    """A linear layer that is given one vector a text, such as a pooler: its gradient has one direction a text.

    Args:
      model: the client's.
      layer: of it.
      basis: of its gradient's rows, `(B, d)`.
      tolerance: see `Witness`.
    """

    def __init__(self, model: nn.Module, layer: str, basis: Tensor, tolerance: float) -> None:
        self.name, self.tolerance = layer, tolerance
        self._model, self._layer, self._basis = model, layer, basis

    @property
    def examples(self) -> int:
        """How many different texts the gradient holds."""
        return len(self._basis)

    def distance(self, text: Sequence[int]) -> float:
        state = _states(self._model, torch.tensor([list(text)]), [self._layer])[self._layer]
        return float(distances(state[0].double(), self._basis))


@final
class BlockWitness(Witness):
    """The second block's attention: its input at every position of the text lies in the span of its gradients.

    Args:
      text: the model.
      basis: of the block's row space.
      tolerance: see `Witness`.
    """

    name = "block 1"

    def __init__(self, text: TextModel, basis: Tensor, tolerance: float) -> None:
        self.tolerance, self._text, self._basis = tolerance, text, basis

    def distance(self, text: Sequence[int]) -> float:
        states = self._text.inputs(1, torch.tensor([list(text)]))[0].double()
        return float(distances(states, self._basis).max())


def witness_of(text: TextModel, gradients: Mapping[str, Tensor], noise: float) -> Witness | None:
    """The best witness there is: a layer with one vector a text, else the second block; None where neither tells.

    A layer is of use while the texts are fewer than its outputs (a softmax's one fewer) and its inputs.
    """
    found = _state_witness(text, gradients, noise)
    return found if found is not None else _block_witness(text, gradients, noise)


def _state_witness(text: TextModel, gradients: Mapping[str, Tensor], noise: float) -> StateWitness | None:
    best: StateWitness | None = None
    most = 0
    for layer, weight in _text_layers(text):
        gradient = gradients.get(weight)
        if gradient is None or not bool(gradient.isfinite().all()) or float(gradient.norm()) == 0:
            continue
        rows = gradient.detach().cpu().double()
        basis, tolerance = _basis([rows], noise, gradient.dtype)
        left = min(len(rows) - 1 - len(basis), rows.shape[1] - _SLACK - len(basis))
        if len(basis) and tolerance < _BLURRED and left > most:
            best, most = StateWitness(text.model, layer, basis, tolerance), left
    return best


def _block_witness(text: TextModel, gradients: Mapping[str, Tensor], noise: float) -> BlockWitness | None:
    if text.depth < 2:
        return None
    matrices = input_gradients(text.block(1), gradients)
    if not matrices or max(float(matrix.norm()) for matrix in matrices) == 0:
        return None
    basis, tolerance = _basis(matrices, noise, next(text.model.parameters()).dtype)
    if not len(basis) or len(basis) > text.width - _SLACK or tolerance >= _BLURRED:
        return None
    return BlockWitness(text, basis, tolerance)


def _basis(matrices: Sequence[Tensor], noise: float, precision: torch.dtype) -> tuple[Tensor, float]:
    """Row space and the tolerance that rounding or noise leaves it.

    Directions down to rounding count: texts that are alike, or fit the model well, are far weaker than the strongest,
    and the largest gap among singular values may lie above them.
    """
    if noise > 0:
        basis, turned = span_under_noise(matrices, noise)
        return basis, max(_LEAST, 2 * turned)
    scaled = torch.cat([matrix / matrix.norm().clamp_min(torch.finfo(torch.float64).tiny) for matrix in matrices])
    _, values, rows = torch.linalg.svd(scaled, full_matrices=False)
    rank = int((values > _ROUNDING * torch.finfo(precision).eps * values[0]).sum())
    below = float(values[rank]) if rank < len(values) else 0.0
    return rows[:rank], max(_LEAST, 2 * below / float(values[rank - 1]))


def _text_layers(text: TextModel) -> list[tuple[str, str]]:
    """Linear layers that are given one vector a text, with their weight's parameter name."""
    layers = {name: part for name, part in text.model.named_modules() if isinstance(part, nn.Linear)}
    probe = torch.tensor([[4, 3, 5, 7]]) % text.vocabulary
    given = _states(text.model, probe, list(layers))
    found = [name for name, state in given.items() if state.dim() == 2 and len(state) == 1]
    return [(name, text.names[id(layers[name].weight)]) for name in found if id(layers[name].weight) in text.names]


def _states(model: nn.Module, tokens: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
    """What layers are given for one text; those that are not reached are left out."""
    given: dict[str, Tensor] = {}
    parts: dict[str, Any] = dict(model.named_modules())

    def keep(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            given[name] = inputs[0].detach().cpu()

        return hook

    hooks = [parts[name].register_forward_pre_hook(keep(name)) for name in layers]
    try:
        with torch.no_grad(), asleep(model):
            tokens = tokens.to(next(model.parameters()).device)
            model(input_ids=tokens, attention_mask=torch.ones_like(tokens))
    finally:
        for hook in hooks:
            hook.remove()
    return given
