"""Rules that need inner products only: weights from one Gram matrix, then one weighted sum.

Distances come from a float64 Gram matrix. Of updates (deltas) that is safe; of absolute weights a float32 one loses
every digit (a common offset of norm 50 and spread 0.03 gives 950 % error), and subtracting the mean first would let
one attacker move it.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from math import sqrt
from typing import Literal, final, get_args

import torch
from torch import Generator, Tensor

from privfm.blocks import squared_distances
from privfm.checks import at_least, one_of, positive
from privfm.contracts import Decision, Outcome, Reveals, Rule, State, View


class JudgingRule(Rule):
    """Template: declare references, decide from one Gram matrix, ask for one weighted sum.

    A class writes `decide`; one that needs the Gram matrix only is a `GramRule` and writes `weights`.
    """

    @property
    def needs(self) -> Reveals:
        return Reveals.GRAM

    @abstractmethod
    def decide(self, gram: Tensor, n: int, generator: Generator, client_weights: Tensor | None) -> Decision:
        """The one kernel; it never sees a row.

        Args:
          gram: `(n+m, n+m)` float64 of n clients followed by m references.
          n: number of clients.
          generator: for every random draw, on the CPU.
          client_weights: `(n,)` float64 of sum 1; None: all count the same, as for every rule that is not `weighted`.
        """

    @property
    def delegable(self) -> bool:
        return True

    def step(self, state: State, view: View, generator: Generator) -> tuple[State, Outcome]:
        references = self.references(state, view.d)
        decision = self.decide(view.gram(references), view.n, generator, view.client_weights)
        vector = view.weighted_sum(decision.weights, references)
        outcome = Outcome(vector, decision.weights[: view.n], decision.clipped, decision.suspects)
        return self.remember(state, vector), outcome


class GramRule(JudgingRule):
    """Template: turn one Gram matrix into weights."""

    @abstractmethod
    def weights(self, gram: Tensor) -> Tensor:
        """`(n+m, n+m)` float64 of n clients followed by m references -> weights `(n+m,)`."""

    def decide(self, gram: Tensor, n: int, generator: Generator, client_weights: Tensor | None) -> Decision:
        return Decision(self.weights(gram))


def clip_factors(lengths: Tensor, radius: Tensor | float) -> Tensor:
    """`(n,)` lengths -> factors that bring the longer ones to `radius`."""
    return torch.where(lengths > radius, radius / lengths, torch.ones_like(lengths))


def equal_weights(chosen: Tensor, gram: Tensor) -> Tensor:
    """Row numbers `(k,)` -> weights `(n+m,)` that average them."""
    return gram.new_zeros(len(gram)).index_fill_(0, chosen.to(gram.device), 1 / len(chosen))


Neighbours = Literal["n-f-2", "n-f-1", "n-f-3"]
"""How many others Krum sums over: "n-f-2" is the paper's; "n-f-1" (n-f with itself) is ByzFL's; "n-f-3" comes of
counting a row among its own n-f-2, as the code of Shejwalkar and Houmansadr, 2021, does."""


def krum_scores(gram: Tensor, f: int, neighbours: Neighbours = "n-f-2") -> Tensor:
    """Summed squared distance of each of n updates to its `neighbours` nearest others: `(n, n)` -> `(n,)`.

    Source: Blanchard et al., "Machine learning with adversaries", 2017.
    """
    n = len(gram)
    nearest = squared_distances(gram).fill_diagonal_(torch.inf).sort(1).values  # itself stands last
    return nearest[:, : n - f - _FEWER[neighbours]].sum(1)


_FEWER: dict[Neighbours, int] = {"n-f-2": 2, "n-f-1": 1, "n-f-3": 3}


def _check_krum(f: int, neighbours: Neighbours) -> None:
    at_least("f", f, 0)
    one_of("neighbours", neighbours, get_args(Neighbours))


def _krum_cohort(f: int, neighbours: Neighbours) -> int:
    # The variant with the fewest neighbours has none left at f=0 and n=3.
    return max(2 * f + 3, f + 4) if neighbours == "n-f-3" else 2 * f + 3


def _krum_coefficient(n: int, f: int, neighbours: Neighbours) -> float | None:
    h, m = n - f, n - 2 * f - 1  # m: honest rows that are surely among the neighbours of the chosen one
    if neighbours == "n-f-2":
        return (sqrt(2 * h * (h - 2) / ((h - 1) * m)) + sqrt(h / m)) ** 2
    return (3 + 2 * sqrt(2)) * h / (n - 2 * f) if neighbours == "n-f-1" else None


@final
@dataclass(frozen=True)
class Krum(GramRule):
    """The one update whose `n-f-2` nearest others are closest, in squared distance.

    Needs: gram.  Cost: two passes.  Breakdown point: f, valid for `n >= 2f+3`.
    On clients with unlike data it releases one client's update and pays for it: see MultiKrum.

    Args:
      f: malicious updates tolerated.
      neighbours: others summed over; the paper's by default, the variants of other libraries by name.

    Source: Blanchard et al., "Machine learning with adversaries: Byzantine tolerant gradient descent", 2017. The
    robustness coefficient is by the argument of Allouah et al., "Fixing by mixing", 2023, also for n-f-2 neighbours.

    >>> Krum(f=1)(torch.tensor([[0.0], [0.1], [0.2], [0.3], [9.0]])).item() < 1
    True
    """

    f: int
    neighbours: Neighbours = "n-f-2"

    def __post_init__(self) -> None:
        _check_krum(self.f, self.neighbours)

    @property
    def smallest_cohort(self) -> int:
        return _krum_cohort(self.f, self.neighbours)

    @property
    def condition(self) -> str:
        return "2f+3" if self.smallest_cohort == 2 * self.f + 3 else "f+4"

    def effective_size(self, n: int) -> float | None:
        return 1.0

    def robustness_coefficient(self, n: int, f: int) -> float | None:
        valid = f == self.f and n >= self.smallest_cohort
        return _krum_coefficient(n, f, self.neighbours) if valid else None

    def weights(self, gram: Tensor) -> Tensor:
        return equal_weights(krum_scores(gram, self.f, self.neighbours).argsort(stable=True)[:1], gram)


@final
@dataclass(frozen=True)
class MultiKrum(GramRule):
    """Mean of the m updates with the least Krum scores.

    Needs: gram.  Cost: two passes.  Breakdown point: f, valid for `n >= 2f+3`.

    Args:
      f: malicious updates tolerated.
      m: updates averaged; n-f when None.
      neighbours: as for Krum.

    Source: Blanchard et al., 2017 ("Multi-Krum"); scores are computed once, not again after each pick.
    """

    f: int
    m: int | None = None
    neighbours: Neighbours = "n-f-2"

    def __post_init__(self) -> None:
        _check_krum(self.f, self.neighbours)
        if self.m is not None:
            at_least("m", self.m, 1)

    @property
    def smallest_cohort(self) -> int:
        return max(_krum_cohort(self.f, self.neighbours), 0 if self.m is None else self.m + self.f)

    @property
    def condition(self) -> str:
        least = self.smallest_cohort
        if least == 2 * self.f + 3:
            return "2f+3"
        return "f+4" if least == _krum_cohort(self.f, self.neighbours) else "m+f"

    def effective_size(self, n: int) -> float | None:
        return float(self._kept(n))

    def robustness_coefficient(self, n: int, f: int) -> float | None:
        """Krum's for m=1; nothing is proved here for more."""
        valid = self.m == 1 and f == self.f and n >= self.smallest_cohort
        return _krum_coefficient(n, f, self.neighbours) if valid else None

    def _kept(self, n: int) -> int:
        return n - self.f if self.m is None else self.m

    def weights(self, gram: Tensor) -> Tensor:
        scores = krum_scores(gram, self.f, self.neighbours)
        return equal_weights(scores.argsort(stable=True)[: self._kept(len(gram))], gram)


@final
@dataclass(frozen=True)
class MoNNA(GramRule):
    """Mean of the n-f updates nearest to a vector that the server trusts.

    In the paper every node trusts its own vector. A server has none, so here it is what it released last: zero before
    the first round, when the n-f shortest updates are averaged. A server that trains on data of its own puts its
    update into the state as `reference` before each round. The reference measures and gets no weight.

    Needs: gram, with one reference.  Cost: two passes.  Breakdown point: f, valid for `n >= 2f+1`.

    Args:
      f: malicious updates tolerated.

    Source: Farhadkhani et al., "Robust collaborative learning with linear gradient overhead", 2023 (nearest neighbour
    averaging; its momentum is a step of the clients).
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

    def effective_size(self, n: int) -> float | None:
        return float(n - self.f)

    def init(self, d: int) -> State:
        return {"reference": torch.zeros(d)}

    def references(self, state: State, d: int) -> Tensor:
        return state["reference"][None]

    def weights(self, gram: Tensor) -> Tensor:
        distances = squared_distances(gram)[-1, :-1]
        return equal_weights(distances.argsort(stable=True)[: len(distances) - self.f], gram)

    def remember(self, state: State, vector: Tensor) -> State:
        return {"reference": vector}


@final
@dataclass(frozen=True)
class CenteredClipping(JudgingRule):
    """Mean of the updates, each first pulled to within `radius` of the previous aggregate.

    Needs: gram, with one reference (the previous aggregate; zero before the first round).  Cost: two passes.
    Breakdown point: all: nobody moves it by more than a share of `radius` an iteration, and it needs no f; with a
    suitable radius its error grows linearly with the malicious share. Takes client weights. `clipped` are the rows
    that lay outside in the last iteration.

    Args:
      radius: largest distance from the centre, in units of an update's L2 norm (the paper's tau).
      iterations: times the centre is moved; they cost nothing in d. Default: the authors' experiments.

    Source: Karimireddy, He, Jaggi, "Learning from history for Byzantine robust optimization", 2021, algorithm 2.
    """

    radius: float
    iterations: int = 3
    weighted = True

    def __post_init__(self) -> None:
        positive("radius", self.radius)
        at_least("iterations", self.iterations, 1)

    def breakdown(self, n: int) -> int:
        return n

    def init(self, d: int) -> State:
        return {"center": torch.zeros(d)}

    def references(self, state: State, d: int) -> Tensor:
        return state["center"][None]

    def decide(self, gram: Tensor, n: int, generator: Generator, client_weights: Tensor | None) -> Decision:
        shares = _shares(gram, n, client_weights)
        center = gram.new_zeros(n + 1)  # as a combination of rows and reference
        center[n] = 1
        clipped = torch.zeros(n, dtype=torch.bool, device=gram.device)
        for _ in range(self.iterations):
            distances = _squares_from(gram, center)[:n].sqrt()
            clipped = distances > self.radius
            moves = shares * clip_factors(distances, self.radius)
            center = center * (1 - moves.sum())
            center[:n] += moves
        return Decision(center, clipped)

    def remember(self, state: State, vector: Tensor) -> State:
        return {"center": vector}


def _shares(gram: Tensor, n: int, client_weights: Tensor | None) -> Tensor:
    return gram.new_full((n,), 1 / n) if client_weights is None else client_weights.to(gram)


def _squares_from(gram: Tensor, point: Tensor) -> Tensor:
    """Squared distance of every row to the combination `point (n,)` of them: `(n,)`."""
    products = gram @ point
    return (gram.diagonal() - 2 * products + point @ products).clamp(min=0)


@final
@dataclass(frozen=True)
class GeometricMedian(JudgingRule):
    """Point with the least summed distance to all updates (smoothed Weiszfeld).

    Needs: gram.  Cost: two passes, then O(n^2) an iteration.  Breakdown point: (n-1) // 2, without being told f.
    Takes client weights. `median_gradient` says how far a result is from optimal.

    | updates                                   | result                                     |
    |-------------------------------------------|--------------------------------------------|
    | more than half of the weight at one point | that point                                 |
    | an optimum at one of the updates          | that update                                |
    | two updates of equal weight               | their middle                               |

    The setting of "Byzantine-robust learning on heterogeneous datasets via bucketing" (Karimireddy et al., 2022, its
    code): `GeometricMedian(iterations=8, smoothing=0.1, start="zero")`. A smoothing in units of an update makes it the
    mean where updates are shorter than that.

    Args:
      iterations: Weiszfeld steps; they cost nothing in d. The authors take a few; 64 bring the gradient to 1e-6 unless
        the optimum lies close beside an update, where steps are slow (0.003 was the worst of 300 random inputs).
      floor: smallest distance, as a fraction of the median distance (unit-free: it follows the updates' scale).
      smoothing: smallest distance in units of an update, in place of `floor` (the paper's nu).
      start: where the first distances are taken from: "median" (each update weighed by one over its median distance to
        the others, so that no outlier is near), or "zero".

    Source: Pillutla, Kakade, Harchaoui, "Robust aggregation for federated learning", 2022 (smoothed Weiszfeld).

    >>> round(GeometricMedian()(torch.tensor([[0.0], [1.0], [5.0], [6.0], [1000.0]])).item(), 3)
    5.0
    """

    iterations: int = 64
    floor: float = 1e-6
    smoothing: float | None = None
    start: Literal["median", "zero"] = "median"
    weighted = True

    def __post_init__(self) -> None:
        at_least("iterations", self.iterations, 1)
        positive("floor", self.floor)
        if self.smoothing is not None:
            positive("smoothing", self.smoothing)
        one_of("start", self.start, ("median", "zero"))

    def breakdown(self, n: int) -> int:
        return max(0, (n - 1) // 2)

    def robustness_coefficient(self, n: int, f: int) -> float | None:
        """`4 (1 + f/(n-2f))^2` of the exact geometric median, which the default setting approaches.

        Source: Allouah et al., "Fixing by mixing", 2023.
        """
        approached = self.smoothing is None and self.start == "median" and self.iterations >= 64
        return 4 * (1 + f / (n - 2 * f)) ** 2 if approached and n > 2 * f else None

    def decide(self, gram: Tensor, n: int, generator: Generator, client_weights: Tensor | None) -> Decision:
        shares = _shares(gram, n, client_weights)
        between = squared_distances(gram).sqrt()
        medians = _median(between, shares)
        spread = _median(medians[None], shares)[0]
        least = self.floor * spread if self.smoothing is None else spread.new_tensor(self.smoothing)
        anchor = int(medians.argmin())  # distances from there lose no digits to what all rows share
        near = gram - gram[anchor] - gram[:, anchor, None] + gram[anchor, anchor]
        if self.smoothing is None:
            there = between[anchor] == 0 if spread == 0 else _optimal_rows(near, between, shares)
            if there.any():
                return Decision(shares * there / (shares * there).sum())
        distances = medians if self.start == "median" else gram.diagonal().sqrt()
        for _ in range(self.iterations):
            pulls = shares / distances.maximum(least)
            weights = pulls / pulls.sum()
            distances = _squares_from(near, weights).sqrt()
        return Decision(weights)


def _optimal_rows(gram: Tensor, between: Tensor, shares: Tensor) -> Tensor:
    """Rows at one point where the pull of all others is less than the weight there, `(n,)` bool; Weiszfeld steps
    would come to such a row slowly.

    Source: Vardi, Zhang, "The multivariate L1-median and associated data depth", 2000.
    """
    same = between == 0
    pulls = torch.where(same, 0.0, shares / between)
    pulls = pulls - torch.diag(pulls.sum(1))
    excess = (pulls @ gram * pulls).sum(1).clamp(min=0).sqrt() - same.to(shares) @ shares
    best = int(excess.argmin())
    # Strictly: of two equal halves neither is the optimum more than what lies between. 1e-9: rounding of the sums.
    return same[best] if excess[best] < -1e-9 else torch.zeros_like(same[best])


def _median(values: Tensor, shares: Tensor) -> Tensor:
    """In each row of `values (k, n)`, the least value that more than half of the shares do not exceed: `(k,)`."""
    ordered, order = values.sort(1)
    # 1e-9: half of the weight, summed in any order, is not more than half.
    first = (shares[order].cumsum(1) > 0.5 + 1e-9).int().argmax(1, keepdim=True)
    return ordered.gather(1, first)[:, 0]


def median_gradient(gram: Tensor, weights: Tensor, client_weights: Tensor | None = None) -> float:
    """How far `weights @ rows` is from the geometric median: least subgradient of the mean distance, 0 when optimal.

    Between 0 and 1, free of units: the mean of unit vectors to the rows, less the share of a row that is met. Times
    the distance to the optimum it bounds what is lost in mean distance, since that is convex.

    Args:
      gram: `(n, n)` of the rows.
      weights: `(n,)` of sum 1.
      client_weights: as the rule had them.
    """
    n = len(gram)
    shares = _shares(gram, n, client_weights)
    distances = _squares_from(gram, weights.to(gram)).sqrt()
    met = distances <= 1e-5 * _median(_median(squared_distances(gram).sqrt(), shares)[None], shares)
    pulls = torch.where(met, 0.0, shares / distances)
    direction = pulls - pulls.sum() * weights.to(gram)
    length = float((direction @ gram @ direction).clamp(min=0).sqrt())
    return max(0.0, length - float(shares[met].sum()))
