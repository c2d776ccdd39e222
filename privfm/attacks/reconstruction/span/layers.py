"""What one block's gradient says of the vectors its attention was given: the span they lie in, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, final

import torch
from torch import Tensor

from privfm.attacks.reconstruction.architectures import Projection
from privfm.attacks.reconstruction.subspace import distances, gap_rank, row_space

_CLEAR_GAP: Final = 10.0
"""A span is sharp if the first singular value left out is this many times under the last one kept. A gradient with as
many tokens as directions, or with noise on it, has ratios of neighbours under 3 (measured at widths 64 to 384)."""

_ROUNDING: Final = 1e-5
"""Of a sharp span, what is left out must be rounding: this share of the largest singular value at most. Gradients in
float32 leave some 1e-8 to 1e-6."""

_MOST_OF_WIDTH: Final = 4
"""Of a span that is not sharp, at least this part of the directions is left out: none left over, nothing is outside."""

_NEAR: Final = 0.01
"""Distance from a sharp span beyond which nothing is an input, however weak its gradient: chance begins at 0.02 where
one direction in a hundred is left out."""

_LEAST_DISTANCE: Final = 1e-12
"""Distances count by their logarithm; what is less than this is rounding."""

_SIGNIFICANT: Final = 6.0
"""Deviations of the control distances' logarithms under which a distance means something where the span is not sharp.
Among 30,000 tokens the nearest by chance lies at about 4."""

_TO_DEVIATION: Final = 1.4826
"""A normal distribution's standard deviation over its median absolute deviation."""


@final
@dataclass(frozen=True)
class LayerSpan:
    """The span of what a block's attention was given, over all positions that have a gradient.

    Attributes:
      basis: orthonormal, `(rank, d)` float64.
      values: singular values behind it, in descending order.
      sharp: what is left out is rounding, so that a fixed tolerance tells true inputs. Else (noise, several steps, more
        tokens than directions) a distance counts by how far it lies under that of controls.
      drift: by how much inputs may have moved, over local steps, from where they are computed.
    """

    basis: Tensor
    values: Tensor
    sharp: bool
    drift: float = 0.0

    @property
    def rank(self) -> int:
        """Number of directions kept."""
        return len(self.basis)

    @property
    def width(self) -> int:
        """Of the inputs, d."""
        return self.basis.shape[1]

    def measured(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """How far vectors `(..., d)` lie outside, and how far they may if they are inputs, `(...)` float64 each.

        The first is the sine of the angle to the span, 1 for a zero vector. The second: a kept direction of singular
        value s_k is tilted out of the span by at most `left / s_k`, left being the largest value left out, so that an
        input v of length 1 lies within `left |diag(1 / s) B v|`. Inputs whose gradients all but cancel are far out.

        Source: first-order perturbation of singular vectors (Wedin, 1972); its use as a tolerance is ours.
        """
        away = distances(vectors, self.basis).nan_to_num(nan=1.0)
        blur = torch.zeros_like(away)
        if self.rank == 0 or self.rank == len(self.values):
            return away, blur
        near = away < _NEAR if self.sharp else torch.ones_like(away, dtype=torch.bool)
        unit = vectors[near].double()
        unit = unit / unit.norm(dim=-1, keepdim=True)
        tilt = (unit @ (self.basis / self.values[: self.rank, None]).T).norm(dim=-1)
        blur[near] = (float(self.values[self.rank]) * tilt).nan_to_num(nan=0.0)
        return away, blur

    def taken(self, away: Tensor, blur: Tensor, tolerance: float, controls: Tensor) -> Tensor:
        """Which vectors are taken to be inputs, bool.

        Args:
          away: their distances.
          blur: of the same vectors.
          tolerance: beyond the blur.
          controls: distances of vectors that almost all are no inputs; a span that is not sharp takes only what stands
            out of them.
        """
        near = away < blur + tolerance + self.drift
        if self.sharp:
            return near & (away < max(_NEAR, tolerance))
        if self.rank == 0:
            return torch.zeros_like(near)
        logs = controls.clamp_min(_LEAST_DISTANCE).log()
        spread = _TO_DEVIATION * (logs - logs.median()).abs().median()
        return near & (away.clamp_min(_LEAST_DISTANCE).log() < logs.median() - _SIGNIFICANT * spread)


def seen_rows(parts: Sequence[Projection], gradients: Mapping[str, Tensor]) -> list[Tensor]:
    """Gradients of a block's maps, `(seen outputs, d)` each.

    Outputs that are hidden in part are left out: the rows that remain still are combinations of the inputs.
    """
    matrices = [part.matrix(gradients) for part in parts]
    rows = [matrix[~matrix.isnan().any(1)].double() for matrix in matrices if matrix is not None]
    return [part.cpu() for part in rows if float(part.norm()) > 0]


def rounding(weights: list[Tensor], steps: int, learning_rate: float) -> float:
    """Noise on a gradient that was read off a change of weights: each step rounds them to their own precision.

    A rounded number w is off by up to half a unit in its last place, about `eps |w| / 2` wide and flat: variance
    `(eps w)^2 / 12` a step. Divided by `learning_rate * steps` as the change is.

    Args:
      weights: of the maps.
      steps: of a client.
      learning_rate: of each.
    """
    squares = max(float(part.double().square().mean()) * torch.finfo(part.dtype).eps ** 2 for part in weights)
    return math.sqrt(squares * steps / 12) / (learning_rate * steps)


def layer_span(rows: list[Tensor], reserve: int, noise: float = 0.0, drift: float = 0.0) -> LayerSpan:
    """The span of a block's inputs from the gradients of its maps, each divided by its norm and stacked.

    | gradient                               | rank                                      | sharp |
    |----------------------------------------|-------------------------------------------|-------|
    | exact, fewer inputs than the width     | by the largest gap                        | yes   |
    | exact, as many inputs or more          | the width less `reserve` (best effort)    | no    |
    | with noise of a known size             | values above what noise alone would give  | no    |

    Args:
      rows: `(outputs, d)` each, none of them zero.
      reserve: directions left out of a span that fills the width; at most a quarter of the width.
      noise: standard deviation on each entry.
      drift: by how much inputs may have moved from where they are computed.

    Source: Petrov et al., "DAGER: exact gradient inversion for large language models", NeurIPS 2024, section 4.1 (span,
    and its reserve of 20 directions at width 768). Stacking and the gap are ours, as is the threshold under noise: the
    largest singular value of an `m x d` matrix of standard normals is about `sqrt(m) + sqrt(d)` (Davidson and Szarek,
    2001, theorem II.13).
    """
    width = rows[0].shape[1]
    most = width - min(reserve, width // _MOST_OF_WIDTH)
    basis, values = row_space(rows, rank=width)
    if noise > 0:
        rank = min(int((values > _noise_value(rows, noise)).sum()), most)
        return LayerSpan(basis[:rank], values, False, drift)
    whole = torch.cat([values, values.new_zeros(width + 1 - len(values))])  # fewer rows than d: no direction beyond
    rank = gap_rank(values, most=width - 1) if len(values) > 1 else len(values)
    left_out, kept = float(whole[rank]), float(values[rank - 1])
    clear = rank < width and left_out * _CLEAR_GAP <= kept
    if clear and left_out <= _ROUNDING * float(values[0]):
        return LayerSpan(basis[:rank], values, True, drift)
    return LayerSpan(basis[: min(rank, most) if clear else most], values, False, drift)


def _noise_value(rows: list[Tensor], noise: float) -> float:
    """About the largest singular value of the stacked, normalised matrices if they were noise alone."""
    scaled = [noise / float(part.norm()) for part in rows]
    tall = math.sqrt(sum(len(part) * scale**2 for part, scale in zip(rows, scaled, strict=True)))
    return tall + math.sqrt(rows[0].shape[1]) * max(scaled)
