"""The rows of adapters' gradients, and how exactly each is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, final

import torch
from torch import Tensor

from privfm.attacks.reconstruction.architectures import Projection
from privfm.attacks.reconstruction.text_models import TextModel
from privfm.contracts import Observation

_ROUNDING: Final = 4.0
"""Machine epsilons of a row's length by which it may be off: 0.7 to 1.4 were seen on MiniLM in float32."""

_SMALL: Final = 0.1
"""Least share of the mean row's length that is rounded as well: short rows are differences of long ones."""

_FINEST: Final = 1e-12
"""Epsilon of float64 gradients: decompositions of the attack leave as much."""


@final
@dataclass(frozen=True)
class AdapterRows:
    """Gradients of all A that read one block's attention input.

    Attributes:
      rows: `(m, d)` float64; each matrix divided by its norm; rounds in order, and query, key, value in each.
      of_values: `(m,)` whether a row is of a value map's own adapter.
      rounding: `(m,)` standard deviation of each coordinate of a row that rounding leaves.
      unit: `(m,)` the same that noise of deviation 1 on the tensors as observed would leave.
    """

    rows: Tensor
    of_values: Tensor
    rounding: Tensor
    unit: Tensor

    def deviations(self, noise: float = 0.0) -> Tensor:
        """Of each coordinate of a row, `(m,)`, under noise of so large a deviation on the tensors as observed."""
        return (self.rounding.square() + (noise * self.unit).square()).sqrt()


def adapter_rows(text: TextModel, rounds: Sequence[Observation], block: int = 0) -> AdapterRows:
    """The rows of all rounds; matrices that were not sent, are hidden in part, or are zero are left out.

    Args:
      text: the model of any of the rounds.
      rounds: observed.
      block: number of the block.
    """
    projections = text.block(block).projections
    found = [part for one in rounds for part in _of_round(projections, one)]
    empty = torch.zeros(0, dtype=torch.float64)
    return AdapterRows(
        rows=torch.cat([torch.zeros(0, text.width, dtype=torch.float64), *(part.rows for part in found)]),
        of_values=torch.cat([empty.bool(), *(part.of_values for part in found)]),
        rounding=torch.cat([empty, *(part.rounding for part in found)]),
        unit=torch.cat([empty, *(part.unit for part in found)]),
    )


def _of_round(projections: tuple[Projection, Projection, Projection], one: Observation) -> list[AdapterRows]:
    query, key, value = (part.lora_a for part in projections)
    tensors, found = one.gradients, []
    factor = 1.0 if one.change is None else 1.0 / (one.change.learning_rate * one.change.weight)
    for name in dict.fromkeys((query, key, value)):
        if name is None or name not in tensors:
            continue
        gradient = tensors[name].detach().cpu().double()
        if not bool(gradient.isfinite().all()) or not bool(gradient.any()):
            continue
        size, lengths = float(gradient.norm()), gradient.norm(dim=1)
        epsilon = max(torch.finfo(tensors[name].dtype).eps, _FINEST)
        rounding = _ROUNDING * epsilon * lengths.clamp_min(_SMALL * float(lengths.mean()))
        if one.change is not None and one.change.subtracted:  # a difference of parameters is rounded as they are
            stored = one.model.get_parameter(name).detach().cpu().double()
            rounding = (rounding.square() + (_ROUNDING * epsilon * factor * stored.norm(dim=1)).square()).sqrt()
        found.append(
            AdapterRows(
                rows=gradient / size,
                of_values=torch.full((len(gradient),), name == value and name not in (query, key)),
                rounding=rounding / (size * gradient.shape[1] ** 0.5),
                unit=torch.full((len(gradient),), factor / size, dtype=torch.float64),
            )
        )
    return found
