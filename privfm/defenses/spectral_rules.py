"""Rules that look for the direction in which updates spread most.

The covariance of n rows and their centred Gram matrix have the same eigenvalues, so everything exact is found in n
dimensions, whatever d: no power method, no random start.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Generator, Tensor

from privfm.blocks import column_blocks
from privfm.checks import RoundFailed, at_least, positive, require
from privfm.contracts import Decision, Outcome, Reveals, State, View
from privfm.defenses.gram_rules import GramRule, JudgingRule, equal_weights


def centered(gram: Tensor, shares: Tensor) -> Tensor:
    """Gram matrix `(n, n)` of the rows less their mean under `shares (n,)` of sum 1."""
    means = gram @ shares
    return gram - means[:, None] - means[None] + shares @ means


@final
@dataclass(frozen=True)
class CovarianceFilter(GramRule):
    """CAF: weighs rows down by how far they lie out in the direction of the largest spread, until f could be gone.

    While the weights sum to more than n-2f: the top eigenvector of the weighted covariance is found, and each weight is
    multiplied by one minus its row's squared projection over the largest. Of the means on the way the one with the
    least top eigenvalue is returned. Each turn takes at least one row's weight to zero, so there are at most 2f.

    | input                 | result                                     |
    |-----------------------|--------------------------------------------|
    | f=0                   | the mean                                   |
    | all rows equal        | that row                                   |
    | rows on one line      | the same filter on their place on the line |

    Needs: gram.  Cost: two passes and O(n^3) a turn.  Breakdown point: f, valid for `n >= 2f+1`.

    Args:
      f: malicious updates tolerated.

    Source: Allouah et al., "Towards trustworthy federated learning with untrusted participants", 2025
    (covariance bound-agnostic filter); largest projections are taken over the rows that still have weight.
    """

    f: int

    def __post_init__(self) -> None:
        at_least("f", self.f, 0)

    @property
    def smallest_cohort(self) -> int:
        return 2 * self.f + 1

    @property
    def condition(self) -> str:
        return "2f+1"

    def weights(self, gram: Tensor) -> Tensor:
        n, own = len(gram), gram.cpu()
        trust, best, least = own.new_ones(n), own.new_full((n,), 1 / n), float("inf")
        while True:
            shares = trust / trust.sum()
            top, projections = _top_direction(own, shares)
            if top < least:
                best, least = shares, top
            largest = projections[trust > 0].max()
            if largest <= 0:  # no spread is left
                break
            trust = (trust * (1 - projections / largest)).clamp(min=0)
            if trust.sum() <= n - 2 * self.f:
                break
        return best.to(gram.device)


def _top_direction(gram: Tensor, shares: Tensor) -> tuple[float, Tensor]:
    """Top eigenvalue of the covariance under `shares`, and squared projections `(n,)` of the centred rows on it."""
    from_mean, roots = centered(gram, shares), shares.sqrt()
    values, vectors = torch.linalg.eigh(roots[:, None] * from_mean * roots)
    top = float(values[-1].clamp(min=0))
    if top == 0:
        return 0.0, torch.zeros_like(shares)
    return top, (from_mean @ (roots * vectors[:, -1])).square() / top


@final
@dataclass(frozen=True)
class DivideAndConquer(JudgingRule):
    """DnC: drops the `filter_factor * f` updates farthest out along the top right singular vector; mean of the rest.

    With `subsample` that is done on random coordinates, `iterations` times, and an update must be kept every time.
    Without it all d coordinates count, through the Gram matrix; then nothing is random and once is enough.

    It is a defence against attackers who act together. One far outlier takes the top direction, and all others look
    alike along it: with f >= 2 attackers at two very different distances the second stays, and with `subsample` one
    that keeps to a coordinate that was not drawn. So its breakdown point is at most 1.

    Needs: gram; each with `subsample`.  Cost: two passes, and `iterations * n * subsample` numbers.
    Valid for `n >= 2f+1`.

    Args:
      f: malicious updates tolerated.
      iterations: times coordinates are drawn (`niters`).
      subsample: coordinates drawn each time (`b`), all when d is smaller; None: all d, through the Gram matrix.
      filter_factor: updates dropped each time, in units of f, rounded down (`c`).

    Raises:
      RoundFailed: with `subsample`, no update was kept every time.

    Source: Shejwalkar, Houmansadr, "Manipulating the Byzantine", 2021. One iteration, 10,000 coordinates
    and c=1 are the values of its reimplementation in Blades.
    """

    f: int
    iterations: int = 1
    subsample: int | None = None
    filter_factor: float = 1.0

    def __post_init__(self) -> None:
        at_least("f", self.f, 0)
        at_least("iterations", self.iterations, 1)
        positive("filter_factor", self.filter_factor)
        if self.subsample is None:
            require(
                self.iterations == 1,
                f"iterations={self.iterations}: without subsample every iteration is the same; set subsample=10000",
            )
        else:
            at_least("subsample", self.subsample, 1)

    @property
    def needs(self) -> Reveals:
        return Reveals.GRAM if self.subsample is None else Reveals.EACH

    @property
    def smallest_cohort(self) -> int:
        return max(2 * self.f, self._dropped) + 1

    @property
    def condition(self) -> str:
        return "2f+1" if 2 * self.f >= self._dropped else "cf+1"

    @property
    def _dropped(self) -> int:
        return int(self.filter_factor * self.f + 1e-9)  # 0.1 * 30 is 3

    def breakdown(self, n: int) -> int:
        sure = self.subsample is None and self._dropped >= 1 and n >= self.smallest_cohort
        return min(self.f, 1) if sure else 0

    def effective_size(self, n: int) -> float | None:
        return float(n - self._dropped) if self.iterations == 1 else None

    def decide(self, gram: Tensor, n: int, generator: Generator, client_weights: Tensor | None) -> Decision:
        return Decision(equal_weights(self._kept(gram).nonzero()[:, 0], gram))

    def step(self, state: State, view: View, generator: Generator) -> tuple[State, Outcome]:
        if self.subsample is None:
            return super().step(state, view, generator)
        count = min(self.subsample, view.d)
        drawn = [torch.randperm(view.d, generator=generator)[:count].sort().values for _ in range(self.iterations)]
        kept = torch.ones(view.n, dtype=torch.bool)
        for part in _columns(view, drawn):
            kept &= self._kept(part.double() @ part.double().T)
        if not kept.any():
            raise RoundFailed(
                f"DivideAndConquer kept none of {view.n} updates in all of {self.iterations} iterations; lower "
                f"iterations or filter_factor={self.filter_factor}"
            )
        weights = kept.double() / kept.sum()
        vector = view.weighted_sum(weights, torch.zeros(0, view.d))
        return state, Outcome(vector, weights)

    def _kept(self, gram: Tensor) -> Tensor:
        """Rows with the least squared projections, `(n,)` bool."""
        n = len(gram)
        own = gram.cpu()
        projections = _top_direction(own, own.new_full((n,), 1 / n))[1]
        kept = torch.zeros(n, dtype=torch.bool)
        kept[projections.argsort(stable=True)[: n - self._dropped]] = True
        return kept


def _columns(view: View, drawn: list[Tensor]) -> list[Tensor]:
    """The columns that were `drawn`, ascending, of every row, each time `(n, b)`: in one read for all."""
    parts: list[list[Tensor]] = [[] for _ in drawn]
    for lo, hi in column_blocks(view.d) if view.d else [(0, 0)]:
        block = view.block(lo, hi)
        for part, columns in zip(parts, drawn, strict=True):
            inside = columns[(columns >= lo) & (columns < hi)] - lo
            part.append(block[:, inside.to(block.device)])
    return [torch.cat(part, 1) for part in parts]
