"""Rules that need inner products only: weights from one Gram matrix, then one weighted sum.

Distances come from a float64 Gram matrix. Of updates (deltas) that is safe; of absolute weights a float32 one loses
every digit (a common offset of norm 50 and spread 0.03 gives 950 % error), and subtracting the mean first would let
one attacker move it.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import final

import torch
from torch import Generator, Tensor

from privfm.checks import at_least, positive, require
from privfm.contracts import Outcome, Reveals, Rule, State, View


class GramRule(Rule):
    """Template: declare references, turn one Gram matrix into weights, ask for one weighted sum."""

    @property
    def needs(self) -> Reveals:
        return Reveals.GRAM

    @abstractmethod
    def weights(self, gram: Tensor) -> Tensor:
        """`(n+m, n+m)` float64 of n clients followed by m references -> weights `(n+m,)`."""

    def remember(self, state: State, vector: Tensor) -> State:
        """State after the round, from the aggregate `(d,)`."""
        return state

    def step(self, state: State, view: View, generator: Generator) -> tuple[State, Outcome]:
        references = self.references(state, view.d)
        weights = self.weights(view.gram(references))
        vector = view.weighted_sum(weights, references)
        return self.remember(state, vector), Outcome(vector, weights[: view.n])


def squared_distances(gram: Tensor) -> Tensor:
    """Gram matrix `(n, n)` -> squared distances `(n, n)`, zero on the diagonal."""
    squares = gram.diagonal()
    distances = (squares[:, None] + squares[None] - 2 * gram).clamp(min=0)
    return distances.fill_diagonal_(0)


def krum_scores(gram: Tensor, f: int) -> Tensor:
    """Summed squared distance of each of n updates to its `n-f-2` nearest others: `(n, n)` -> `(n,)`.

    Source: Blanchard et al., "Machine learning with adversaries", 2017, section 4.
    """
    n = len(gram)
    nearest = squared_distances(gram).fill_diagonal_(torch.inf).sort(1).values  # itself stands last
    return nearest[:, : n - f - 2].sum(1)


def _check_f(f: int) -> None:
    at_least("f", f, 0)


@final
@dataclass(frozen=True)
class Krum(GramRule):
    """The one update whose `n-f-2` nearest others are closest, in squared distance.

    Needs: gram.  Cost: two passes.  Breakdown point: valid for `n >= 2f+3`.
    On clients with unlike data it releases one client's update and pays for it: see MultiKrum.

    Args:
      f: malicious updates tolerated.

    Source: Blanchard et al., "Machine learning with adversaries: Byzantine tolerant gradient descent", 2017.

    >>> Krum(f=1)(torch.tensor([[0.0], [0.1], [0.2], [0.3], [9.0]])).item() < 1
    True
    """

    f: int

    def __post_init__(self) -> None:
        _check_f(self.f)

    @property
    def smallest_cohort(self) -> int:
        return 2 * self.f + 3

    @property
    def condition(self) -> str:
        return "2f+3"

    def effective_size(self, n: int) -> float | None:
        return 1.0

    def weights(self, gram: Tensor) -> Tensor:
        chosen = krum_scores(gram, self.f).argmin()
        return torch.zeros(len(gram), dtype=gram.dtype, device=gram.device).scatter_(0, chosen, 1.0)


@final
@dataclass(frozen=True)
class MultiKrum(GramRule):
    """Mean of the m updates with the least Krum scores.

    Needs: gram.  Cost: two passes.  Breakdown point: valid for `n >= 2f+3`.

    Args:
      f: malicious updates tolerated.
      m: updates averaged; n-f when None.

    Source: Blanchard et al., 2017, section 4 ("Multi-Krum"); scores are computed once, not again after each pick.
    """

    f: int
    m: int | None = None

    def __post_init__(self) -> None:
        _check_f(self.f)
        if self.m is not None:
            at_least("m", self.m, 1)

    @property
    def smallest_cohort(self) -> int:
        return max(2 * self.f + 3, 0 if self.m is None else self.m + self.f)

    @property
    def condition(self) -> str:
        return "2f+3" if self.smallest_cohort == 2 * self.f + 3 else "m+f"

    def effective_size(self, n: int) -> float | None:
        return float(self._kept(n))

    def _kept(self, n: int) -> int:
        return n - self.f if self.m is None else self.m

    def weights(self, gram: Tensor) -> Tensor:
        kept = self._kept(len(gram))
        chosen = krum_scores(gram, self.f).argsort(stable=True)[:kept]
        return torch.zeros(len(gram), dtype=gram.dtype, device=gram.device).scatter_(0, chosen, 1.0 / kept)


@final
@dataclass(frozen=True)
class CenteredClipping(GramRule):
    """Mean of the updates, each first pulled to within `radius` of the previous aggregate.

    Needs: gram, with one reference (the previous aggregate; zero before the first round).  Cost: two passes.
    Needs no f; with a suitable radius its error grows linearly with the malicious share.

    Args:
      radius: largest distance from the centre, in units of an update's L2 norm (the paper's tau).
      iterations: times the centre is moved; they cost nothing in d. Default: the authors' experiments.

    Source: Karimireddy, He, Jaggi, "Learning from history for Byzantine robust optimization", 2021, algorithm 2.
    """

    radius: float
    iterations: int = 3

    def __post_init__(self) -> None:
        positive("radius", self.radius)
        at_least("iterations", self.iterations, 1)

    def init(self, d: int) -> State:
        return {"center": torch.zeros(d)}

    def references(self, state: State, d: int) -> Tensor:
        return state["center"][None]

    def weights(self, gram: Tensor) -> Tensor:
        n = len(gram) - 1
        require(n >= 1, f"n={n}: CenteredClipping needs at least one update")
        center = torch.zeros(n + 1, dtype=gram.dtype, device=gram.device)  # as a combination of rows and reference
        center[n] = 1
        for _ in range(self.iterations):
            products = gram @ center
            squares = gram.diagonal()[:n] - 2 * products[:n] + center @ products
            distances = squares.clamp(min=0).sqrt()
            shares = torch.where(distances > self.radius, self.radius / distances, torch.ones_like(distances)) / n
            center = center * (1 - shares.sum())
            center[:n] += shares
        return center

    def remember(self, state: State, vector: Tensor) -> State:
        return {"center": vector}
