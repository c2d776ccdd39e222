"""Where tokens stand and which belong together, as far as the coefficients of the first attention's adapters tell."""

from __future__ import annotations

from typing import Final, final

import torch
from torch import Generator, Tensor

_USED: Final = 1e-3
"""Share of the largest position's coefficients under which a position is not reached; rounding leaves 1e-6."""

_SWEEPS: Final = 120
"""Reweightings; the floor falls by a tenth each, to 1e-4 of the tokens' mean after 88."""

_FLOOR: Final = 1e-4
"""Smallest flow told from none, as a share of the tokens' mean."""

_RESTARTS: Final = 20
"""Of the clustering, the best of which is taken."""


def likely_positions(tokens: Tensor, positions: Tensor) -> Tensor:
    """For each token, how its coefficient is shared among positions, `(n, P)`; rows sum to 1.

    A token's coefficient is the sum of flows to the positions at which it stands, a position's the sum of flows from
    the tokens there: `Y_t = sum_p c_tp`, `Y_p = sum_t c_tp`, with flows in as many dimensions as there are rows. The
    least summed length that fits is taken: a token that stands at one position alone sends all of itself there. Lengths
    are measured where the tokens' coefficients are white, since one direction of the loss dominates them otherwise.

    Args:
      tokens: their coefficients, `(n, m)`.
      positions: theirs, `(P', m)`; those behind the last one reached are left out.

    Returns:
      `(n, P)` with P positions reached. A hint, no proof: with 48 rows for 40 tokens, the largest share is right for
      five of six tokens.

    Source: ours; group basis pursuit by reweighted least squares (Daubechies, DeVore, Fornasier, Guentuerk, 2010).
    """
    sizes = positions.norm(dim=1)
    reached = int((sizes > _USED * sizes.max()).nonzero().max()) + 1
    count = len(tokens)
    _, values, directions = torch.linalg.svd(tokens, full_matrices=False)
    kept = values > _FLOOR * values[0]
    white = directions[kept].T / values[kept]
    wanted = torch.cat([tokens @ white, positions[:reached] @ white])
    mean = float(wanted[:count].norm(dim=1).mean())
    conductance, floor = torch.ones(count, reached, dtype=torch.float64), mean
    lengths = conductance
    for _ in range(_SWEEPS):
        laplacian = torch.diag(torch.cat([conductance.sum(1), conductance.sum(0)]))
        laplacian[:count, count:] = conductance
        laplacian[count:, :count] = conductance.T
        potential = torch.linalg.pinv(laplacian, hermitian=True, rtol=1e-12) @ wanted
        flows = conductance[:, :, None] * (potential[:count, None] + potential[None, count:])
        lengths = flows.norm(dim=2)
        conductance = (lengths.square() + floor**2).sqrt()
        conductance = conductance / conductance.max()
        floor = max(0.9 * floor, _FLOOR * mean)
    return lengths / lengths.sum(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)


@final
class Company:
    """Which tokens share a text: the loss pulls the values of one text's tokens in much the same direction.

    With 24 rows of value maps (r = 8, three rounds) and four texts, the nearest other token by cosine is of the same
    text in 96 to 100 of 100 cases.

    Args:
      coefficients: of the tokens, `(n, m)`: of value maps' rows where there are any.
    """

    def __init__(self, coefficients: Tensor) -> None:
        self.unit = coefficients / coefficients.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)

    def groups(self, count: int, generator: Generator) -> Tensor:
        """A clustering by cosine, `(n,)` of group numbers: spherical k-means, the best of 20."""
        best, found = -1.0, torch.zeros(len(self.unit), dtype=torch.long)
        for _ in range(_RESTARTS):
            member, fit = self._groups(count, generator)
            if fit > best:
                best, found = fit, member
        return found

    def _groups(self, count: int, generator: Generator) -> tuple[Tensor, float]:
        chosen = [int(torch.randint(len(self.unit), (), generator=generator))]
        for _ in range(count - 1):  # far ones are likely: k-means++
            away = (1 - self.unit @ self.unit[chosen].T).min(dim=1).values.clamp_min(0) + 1e-9
            chosen.append(int(torch.multinomial(away, 1, generator=generator)))
        centres = self.unit[chosen].clone()
        member = (self.unit @ centres.T).argmax(1)
        for _ in range(30):  # settles in under ten
            for group in range(count):
                if bool((member == group).any()):
                    total = self.unit[member == group].sum(0)
                    centres[group] = total / total.norm().clamp_min(1e-12)
            before, member = member, (self.unit @ centres.T).argmax(1)
            if bool((before == member).all()):
                break
        return member, float((self.unit @ centres.T).max(dim=1).values.sum())
