"""How many guesses an audit makes: declared beforehand, chosen on a half, or planned by simulating the claim.

Looking at many counts of guesses and reporting the best of them is no bound. Here a count is by rank (the k highest
scores are guessed in), never by what the coins showed, and whatever is tried is paid for.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from privfm.attacks.audit.statements import Bound
from privfm.checks import at_least, fraction, one_of, require

SIDES = ("two", "high")
"""`two`: the k highest are guessed in and the k lowest out, 2k guesses; `high`: only the k highest, k guesses."""

_TIES = 20_230_515
"""Seed of the order among equal scores: fixed, so that it cannot depend on the coins (nor on the caller's order)."""

_UNBELIEVABLE = 1e-9
"""Coins that fall this unevenly were not flipped with probability 1/2."""

_SPREAD = (0.0025, 0.0075, 0.025, 0.075, 0.2)
"""Shares of the canaries guessed on each side where nobody declares anything: 50 to 4000 guesses of 10,000 canaries,
a spread in which the Gaussian mechanism's best count lies for every epsilon from 1 to 8."""

_CANDIDATES = 20
"""Counts that `planned` tries: steps of a factor 1.4 at m = 10,000, within which bounds hardly change."""


class Bounding(Protocol):
    """A method's lower bound of epsilon from numbers of guesses."""

    def __call__(self, m: int, guesses: int, correct: int, error: float, *, chosen: bool) -> float:
        """Epsilon that `correct` of `guesses` about m canaries certify.

        Args:
          m: canaries.
          guesses: made.
          correct: of them.
          error: probability with which the bound may be above the truth.
          chosen: whether `guesses` was chosen by looking at the run (not at these canaries' coins).
        """


@final
@dataclass(frozen=True)
class Certified:
    """What a rule of guessing came to.

    Attributes:
      epsilon: the largest that holds.
      guesses: behind it.
      correct: of them.
      tries: that were paid for.
      ceiling: largest epsilon had every guess been right.
    """

    epsilon: float
    guesses: int
    correct: int
    tries: int
    ceiling: float

    def bound(self, method: str, delta: float, confidence: float, canaries: int, assumes: str = "") -> Bound:
        """As a method's statement.

        Args:
          method: by which it was computed.
          delta: of the claim.
          confidence: one minus the error that all tries were given together.
          canaries: that were flipped for.
          assumes: what must hold of the mechanism; empty: nothing.
        """
        return Bound(
            method=method,
            epsilon=self.epsilon,
            delta=delta,
            confidence=confidence,
            canaries=canaries,
            guesses=self.guesses,
            correct=self.correct,
            tries=self.tries,
            ceiling=self.ceiling,
            assumes=assumes,
        )


class Guesses(ABC):
    """A rule that says how many guesses are made."""

    @abstractmethod
    def certify(
        self, scores: NDArray[np.float64], included: NDArray[np.bool_], error: float, bounding: Bounding
    ) -> Certified:
        """Guesses, counts and bounds.

        Args:
          scores: `(m,)`, higher means rather in.
          included: `(m,)`, the coins.
          error: probability of a wrong bound, for all tries together.
          bounding: the method.
        """


@final
@dataclass(frozen=True)
class Declared(Guesses):
    """Counts fixed before the run; each is tried at `error / len(counts)` (Bonferroni) and the best one is reported.

    Args:
      counts: guesses on each side; none above m/2, none twice.
      sides: `two` or `high`, see `SIDES`.

    >>> Declared((10, 100)).counts
    (10, 100)
    """

    counts: tuple[int, ...]
    sides: str = "two"

    def __post_init__(self) -> None:
        _check_counts(self.counts)
        one_of("sides", self.sides, SIDES)

    def certify(
        self, scores: NDArray[np.float64], included: NDArray[np.bool_], error: float, bounding: Bounding
    ) -> Certified:
        """See `Guesses.certify`.

        Raises:
          InvalidArgument: a count above m/2.
        """
        m, tries = len(scores), len(self.counts)
        order = ranked(scores)
        share = error / len(self.counts)
        tried = []
        for count in self.counts:
            guesses, right = correct(order, included, count, self.sides)
            ceiling = bounding(m, guesses, guesses, share, chosen=False)
            tried.append(Certified(bounding(m, guesses, right, share, chosen=False), guesses, right, tries, ceiling))
        best = max(tried, key=lambda one: one.epsilon)
        return replace(best, ceiling=max(one.ceiling for one in tried))


@final
@dataclass(frozen=True)
class Split(Guesses):
    """The count that does best on half of the canaries, used on the other half, which gives the bound.

    For the other half the first one is part of the fixed data. The count depends on the run, which the methods must
    be told (`chosen`): see there what it costs or assumes.

    Args:
      counts: candidates, guesses on each side of a half; none above m/4.
      sides: `two` or `high`.
      seed: of the halves, which must not depend on the coins.
    """

    counts: tuple[int, ...]
    sides: str = "two"
    seed: int = 0

    def __post_init__(self) -> None:
        _check_counts(self.counts)
        one_of("sides", self.sides, SIDES)
        at_least("seed", self.seed, 0)

    def certify(
        self, scores: NDArray[np.float64], included: NDArray[np.bool_], error: float, bounding: Bounding
    ) -> Certified:
        """See `Guesses.certify`.

        Raises:
          InvalidArgument: a count above m/4.
        """
        m = len(scores)
        shuffled = np.random.default_rng(self.seed).permutation(m)
        first, second = shuffled[: m // 2], shuffled[m // 2 :]
        order = ranked(scores[first])

        def on_first(count: int) -> float:
            guesses, right = correct(order, included[first], count, self.sides)
            return bounding(len(first), guesses, right, error, chosen=True)

        # Among equals (all 0) the largest count: it has the most power when the evidence is thin.
        count = max(self.counts, key=lambda candidate: (on_first(candidate), candidate))
        guesses, right = correct(ranked(scores[second]), included[second], count, self.sides)
        epsilon = bounding(len(second), guesses, right, error, chosen=True)
        return Certified(epsilon, guesses, right, 1, bounding(len(second), guesses, guesses, error, chosen=True))


def spread(m: int, sides: str = "two") -> Declared:
    """Five counts from 0.25 % to 20 % of m canaries: what is declared where nothing better is known.

    >>> spread(10_000).counts
    (25, 75, 250, 750, 2000)
    """
    at_least("m", m, 2)
    return Declared(tuple(sorted({max(1, round(share * m)) for share in _SPREAD if round(share * m) <= m // 2})), sides)


def planned(
    simulate: Callable[[np.random.Generator], tuple[ArrayLike, ArrayLike]],
    m: int,
    certify: Callable[[NDArray[np.float64], NDArray[np.bool_], Guesses], Bound],
    generator: np.random.Generator,
    *,
    counts: Sequence[int] | None = None,
    sides: Sequence[str] = SIDES,
    runs: int = 32,
    quantile: float = 0.1,
) -> Declared:
    """The single count to declare: the one with the best bound in simulated runs of the *claimed* mechanism.

    It is chosen before the real run and without it, so that nothing but itself is paid for. A wrong simulation costs
    power, never validity: where noise may be far less than claimed, declare `spread` as well as or instead of it, for
    a single count's ceiling may lie below what there would be to find.

    Args:
      simulate: generator -> `(scores (m,), included (m,))` of one run of the claim.
      m: canaries.
      certify: the method that will be used, for example
        `lambda scores, included, guesses: one_run(scores, included, 1e-5, guesses=guesses)`.
      generator: source of every draw.
      counts: candidates; None: 20 from m/1000 (at least 4) to m/2, evenly in their logarithm.
      sides: candidates.
      runs: simulated.
      quantile: of the bounds in those runs that is made as large as possible; equals are told apart by the mean. The
        best median (0.5) is had with few guesses, of which one run in ten certifies next to nothing.

    Cost: `runs * len(counts) * len(sides)` bounds; the simulated runs are kept, 9 m bytes each.

    Raises:
      InvalidArgument: `simulate` returns something else than m scores and coins.
    """
    at_least("m", m, 8)
    at_least("runs", runs, 1)
    fraction("quantile", quantile, zero=True)
    require(len(sides) > 0, "sides=(): expected at least one of 'two' and 'high'")
    spaced = np.unique(np.geomspace(max(4, m // 1000), m // 2, _CANDIDATES).round())
    grid = [int(count) for count in spaced] if counts is None else list(counts)
    require(len(grid) > 0, "counts=(): expected at least one candidate")
    simulated = [check_run(*simulate(generator)) for _ in range(runs)]
    for scores, _ in simulated:
        require(len(scores) == m, f"simulate gave {len(scores)} scores: expected m={m}")

    def worth(candidate: Declared) -> tuple[float, float]:
        bounds = [certify(scores, included, candidate).epsilon for scores, included in simulated]
        return float(np.quantile(bounds, quantile)), float(np.mean(bounds))

    return max((Declared((count,), side) for side in sides for count in grid), key=worth)


def ranked(scores: NDArray[np.float64]) -> NDArray[np.intp]:
    """Places from the lowest score to the highest; among equal scores in a fixed random order.

    Sorting would keep equal scores in the caller's order, and a caller who lists canaries that are in first would be
    told of an attack that does not exist.
    """
    return np.lexsort((np.random.default_rng(_TIES).permutation(len(scores)), scores))


def correct(order: NDArray[np.intp], included: NDArray[np.bool_], count: int, sides: str) -> tuple[int, int]:
    """`(guesses, correct)` of `count` guesses on each side.

    Args:
      order: of `ranked`.
      included: `(m,)`.
      count: on each side.
      sides: `two` or `high`.

    Raises:
      InvalidArgument: `count` above m/2.
    """
    m = len(order)
    require(
        count <= m // 2,
        f"count={count}: expected at most m/2 = {m // 2} guesses a side for m={m} canaries; declare a smaller count",
    )
    right = int(included[order[m - count :]].sum())
    if sides == "high":
        return count, right
    return 2 * count, right + count - int(included[order[:count]].sum())


def check_run(scores: ArrayLike, included: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """The scores and coins of a run as arrays `(m,)`, checked.

    Raises:
      InvalidArgument: other shapes, NaN, coins other than 0 and 1, or coins that cannot have been fair.
    """
    from scipy.special import bdtr

    values, coins = np.asarray(scores, dtype=np.float64), np.asarray(included)
    require(
        values.ndim == 1 and values.shape == coins.shape,
        f"scores {values.shape} and included {coins.shape}: expected two of the same shape (m,)",
    )
    at_least("number of canaries", len(values), 8)
    bad = int(np.isnan(values).sum())
    require(bad == 0, f"scores: {bad} of {len(values)} are NaN: expected numbers; a failed canary has no place here")
    require(bool(np.isin(coins, (0, 1)).all()), "included: expected booleans, or zeros and ones")
    coins = coins.astype(bool)
    inside = int(coins.sum())
    require(
        2 * float(bdtr(min(inside, len(coins) - inside), len(coins), 0.5)) >= _UNBELIEVABLE,
        f"included: {inside} of {len(coins)} canaries are in; expected coins of probability 1/2, drawn by the auditor",
    )
    return values, coins


def _check_counts(counts: tuple[int, ...]) -> None:
    """Raises `InvalidArgument` unless there are counts, whole, at least 1 and different."""
    require(len(counts) > 0, "counts=(): expected at least one count of guesses")
    for count in counts:
        at_least("count", count, 1)
    require(
        len(set(counts)) == len(counts), f"counts={counts!r}: expected each count once; every one of them is paid for"
    )
