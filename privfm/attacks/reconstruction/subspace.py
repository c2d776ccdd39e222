"""Row spaces of gradients, and how far a vector lies outside of one.

The gradient of a linear map's weight is `Delta^T X` with the map's inputs X `(tokens, d)`: its rows lie in the span of
the inputs, which the server can compute for every token it can think of.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from privfm.checks import InvalidArgument, require

_ROUNDING: Final = 1e-9
"""Singular values below this share of the largest are rounding of float64 alone: no gap is looked for under it."""

_NEAR: Final = 0.05
"""Distance under which the float32 pass hands a vector on to float64; float32 is off by some 1e-3 at distance 0."""


def gap_rank(values: Tensor, least: int = 1, most: int | None = None) -> int:
    """Rank as the place of the largest ratio of neighbouring singular values, `(r,)` in descending order.

    A fixed tolerance fails both ways: too loose drops directions of tokens with small gradients, too tight adds
    rounding. Values under 1e-9 of the largest count as that.

    Args:
      values: singular values.
      least: smallest rank considered.
      most: largest; None: all but the last.
    """
    require(values.dim() == 1 and len(values) > 0, f"values has shape {tuple(values.shape)}: expected (r,), r > 0")
    if float(values[0]) == 0:
        return 0
    logs = (values / values[0]).clamp_min(_ROUNDING).log()
    gaps = logs[:-1] - logs[1:]
    last = len(gaps) if most is None else min(most, len(gaps))
    if last < least:
        return len(values)
    return int(gaps[least - 1 : last].argmax()) + least


def row_space(
    matrices: Sequence[Tensor], rank: int | None = None, tolerance: float | None = None
) -> tuple[Tensor, Tensor]:
    """An orthonormal basis of the rows of all matrices, each first divided by its norm.

    Args:
      matrices: `(outputs, d)` each; those that are zero are left out.
      rank: number of directions; None: by the largest gap, or by `tolerance`.
      tolerance: keep singular values above this share of the largest.

    Returns:
      `(k, d)` float64, and all singular values in descending order.

    Raises:
      InvalidArgument: every matrix is zero or there is none; something is not finite.
    """
    scaled = [matrix.double() / norm for matrix in matrices if float(norm := matrix.double().norm()) != 0]
    if not scaled:
        raise InvalidArgument("the gradients are zero or missing: nothing can be read from them")
    rows = torch.cat(scaled)
    require(bool(rows.isfinite().all()), "the gradients are not finite: a part of them is hidden")
    _, values, directions = torch.linalg.svd(rows, full_matrices=False)
    if rank is None:
        rank = gap_rank(values) if tolerance is None else int((values > tolerance * values[0]).sum())
    return directions[:rank], values


def distances(vectors: Tensor, basis: Tensor) -> Tensor:
    """How far vectors `(..., d)` lie outside of the span of `basis (k, d)`: the sine of the angle, `(...)` float64.

    Many vectors go through float32 first and only the near ones again through float64.
    """
    if vectors.dim() > 2 or len(vectors) < 4096 or vectors.dtype == torch.float64:
        return _exactly(vectors, basis)
    unit = vectors / vectors.norm(dim=1, keepdim=True)
    inside = (unit @ basis.to(unit).T).square().sum(1)
    found: Tensor = (1 - inside).clamp_min(0).sqrt().double()
    near = (found < _NEAR).nonzero()[:, 0]
    found[near] = _exactly(vectors[near], basis)
    return found


def _exactly(vectors: Tensor, basis: Tensor) -> Tensor:
    unit = vectors.double()
    unit = unit / unit.norm(dim=-1, keepdim=True)
    found: Tensor = (unit - (unit @ basis.T) @ basis).norm(dim=-1)
    return found
