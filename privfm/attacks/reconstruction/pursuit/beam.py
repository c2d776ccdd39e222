"""The search: which atoms explain a token's gradient in all heads at once.

Orthogonal least squares with a beam. All hypotheses of all seeds move together as tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Final, final

import torch
from torch import Tensor

from privfm.attacks.reconstruction.pursuit.atoms import Atoms
from privfm.contracts.reconstruction import Watch

_FLOOR: Final = 1e-10
"""Least `floor`: float64's rounding over a dozen projections."""

_DEPENDENT: Final = 1e-8
"""Squared length of an atom outside of a support, under which it is taken to lie in it."""

_NEVER: Final = -1e9
"""Score of what may not be chosen."""


@final
@dataclass(frozen=True)
class Supports:
    """What the search found for each seed.

    Attributes:
      residuals: share of the seed's gradient that its best support leaves, `(S,)`.
      atoms: the support's atoms, one list a seed.
    """

    residuals: list[float]
    atoms: list[list[int]]


def pursue(
    atoms: Atoms,
    targets: Tensor,
    *,
    beam: int,
    enough: Tensor,
    floor: Tensor,
    watch: Watch,
    held: Tensor | None = None,
) -> Supports:
    """Finds for every seed a set of atoms, one a position, in whose span its gradients lie in every block.

    Each step adds the atom with the largest gain `sum_blocks -log(1 - cos^2)` between a block's residual and the part
    of the atom's block outside of the support: heads count by how *well* they are explained, not by their size.

    Args:
      atoms: candidates, n of them.
      targets: `(S, m, 2 H, w)`: of each seed and of m - 1 tokens that probably share its text; gains are summed.
      beam: hypotheses kept a seed.
      enough: residual at which each seed is done, `(S,)`.
      floor: share of a block's energy below which a residual is noise, `(S,)`: less earns nothing more.
      watch: ends the search; what is found so far comes back.
      held: orthonormal `(S, 2 H, k, w)` (zero rows allowed), explained beforehand: texts known to hold the seed.

    Cost: `S x beam x m x n x d` products a step, with as many steps as the text has tokens.
    """
    state = _State(atoms, targets, floor, held)
    deepest = min(int(atoms.positions.max()), targets.shape[-1] - 2)
    for _ in range(deepest):
        if watch.over or not state.step(beam):
            break
        state.record(enough)
        if not len(state.seeds):
            break
    return Supports(state.best, state.supports)


class _State:
    """Hypotheses in flight, `S' x c` of them: c for each of the S' seeds that are not done.

    Block-first layout: what is multiplied is `(2 H, S' c, ...)`.
    """

    def __init__(self, atoms: Atoms, targets: Tensor, floor: Tensor, held: Tensor | None) -> None:
        count, group, both, width = targets.shape
        self.atoms, self.group, self.places = atoms, group, int(atoms.positions.max()) + 1
        self.seeds, self.each = torch.arange(count), 1
        start = atoms.start[:, None, None, :].expand(both, count, 1, width) if held is None else held.transpose(0, 1)
        self.bases = start.contiguous()  # (2 H, K, k, w)
        rest = targets.permute(2, 0, 1, 3)  # (2 H, K, m, w)
        floor = floor.clamp_min(_FLOOR)[:, None]
        self.floor = floor * rest.square().sum(-1) + torch.finfo(rest.dtype).tiny  # (2 H, S, m): of the start
        self.total = targets[:, 0].square().sum((1, 2))
        for _ in range(2):  # twice: what rounding leaves of the first projection
            rest = rest - (rest @ self.bases.transpose(-1, -2)) @ self.bases
        self.rest = rest
        inside = self.bases @ atoms.units.transpose(-1, -2)[:, None]
        self.outside = 1 - inside.square().sum(2)  # (2 H, K, n)
        self.used = torch.zeros(count, self.places, dtype=torch.bool)
        self.chosen = torch.zeros(count, 0, dtype=torch.long)
        self.score = torch.zeros(count, dtype=targets.dtype)
        self.marks = torch.zeros(count, dtype=torch.long)
        # Sums of these tell sets apart whatever their order: fixed draws, so that the search has no chance in it.
        self.names = torch.randint(2**60, (len(atoms),), generator=torch.Generator().manual_seed(0))
        self.best, self.supports = [1.0] * count, [[] for _ in range(count)]  # type: list[float], list[list[int]]

    def gains(self) -> Tensor:
        """Of every atom for every hypothesis, `(K, n)`."""
        count = self.rest.shape[1]
        owners = self.seeds.repeat_interleave(self.each)
        product = torch.ones(count * self.group, len(self.atoms), dtype=self.rest.dtype)
        for block in range(len(self.rest)):  # block by block: the arrays stay in the cache
            rest = self.rest[block].reshape(count * self.group, -1)
            left = rest.square().sum(-1, keepdim=True)
            floor = self.floor[block][owners].reshape(-1, 1)
            inside = (rest @ self.atoms.units[block].T).square_().view(count, self.group, -1)
            inside.div_(self.outside[block].clamp_min(_DEPENDENT)[:, None])
            inside = inside.view(count * self.group, -1)
            product.mul_(inside.neg_().add_(left).clamp_min_(0).add_(floor).div_(left + floor))
        found: Tensor = -product.log_().view(count, self.group, -1).sum(1)
        return found.masked_fill_(self.used[:, self.atoms.positions], _NEVER)

    def step(self, beam: int) -> bool:
        """One atom more for the best hypotheses of each seed; False: there is none left to add."""
        width = min(beam, len(self.atoms))
        top, which = (self.gains() + self.score[:, None]).topk(width, dim=1)
        seeds = len(self.seeds)
        marks = (self.marks[:, None] + self.names[which]).view(seeds, -1)
        top, which = top.view(seeds, -1), which.view(seeds, -1)
        order = marks.argsort(dim=1, stable=True)
        ranked = marks.gather(1, order)
        again = torch.zeros_like(ranked, dtype=torch.bool)
        again[:, 1:] = ranked[:, 1:] == ranked[:, :-1]  # the same set in another order
        top = top.gather(1, order).masked_fill(again, _NEVER)
        score, place = top.topk(min(beam, top.shape[1]), dim=1)
        if float(score.max()) <= _NEVER / 2:
            return False
        taken = order.gather(1, place)
        parents = (taken // width + torch.arange(seeds)[:, None] * self.each).reshape(-1)
        added = which.gather(1, taken).reshape(-1)
        self.each = taken.shape[1]
        self._extend(parents, added, score.reshape(-1), marks.gather(1, taken).reshape(-1))
        return True

    def _extend(self, parents: Tensor, added: Tensor, score: Tensor, marks: Tensor) -> None:
        bases = self.bases[:, parents]
        new = self.atoms.units[:, added][:, :, None]  # (2 H, K, 1, w)
        for _ in range(2):
            new = new - (new @ bases.transpose(-1, -2)) @ bases
        new = new / new.norm(dim=-1, keepdim=True).clamp_min(_DEPENDENT**0.5)
        rest = self.rest[:, parents]
        self.rest = rest - (rest @ new.transpose(-1, -2)) @ new
        self.outside = self.outside[:, parents]
        self.outside -= (new[:, :, 0] @ self.atoms.units.transpose(-1, -2)).square_()
        self.bases = torch.cat([bases, new], 2)
        self.used = self.used[parents]
        self.used[torch.arange(len(added)), self.atoms.positions[added]] = True
        self.chosen = torch.cat([self.chosen[parents], added[:, None]], 1)
        self.score, self.marks = score, marks

    def record(self, enough: Tensor) -> None:
        """Notes the best support of each seed, and lets go of those that are done."""
        left = self.rest[:, :, 0].square().sum((0, 2)).view(-1, self.each)
        left = left.masked_fill(self.score.view(-1, self.each) <= _NEVER / 2, inf)
        shares = (left / self.total[self.seeds][:, None]).sqrt()
        least, place = shares.min(1)
        chosen = self.chosen.view(len(self.seeds), self.each, -1)
        for row, (seed, share) in enumerate(zip(self.seeds.tolist(), least.tolist(), strict=True)):
            if share < self.best[seed]:
                self.best[seed], self.supports[seed] = share, chosen[row, place[row]].tolist()
        going = (least >= enough[self.seeds]).nonzero()[:, 0]
        if len(going) < len(self.seeds):
            self._keep(going)

    def _keep(self, going: Tensor) -> None:
        rows = (going[:, None] * self.each + torch.arange(self.each)).reshape(-1)
        self.seeds = self.seeds[going]
        self.bases, self.rest, self.outside = self.bases[:, rows], self.rest[:, rows], self.outside[:, rows]
        self.used, self.chosen = self.used[rows], self.chosen[rows]
        self.score, self.marks = self.score[rows], self.marks[rows]
