"""Epsilon from one run with many canaries, by the mechanism's trade-off function (Mahloujifar, Melis, Chaudhuri)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from math import exp
from typing import final

import numpy as np
from numpy.typing import ArrayLike

from privfm.attacks.audit.bisection import largest_rejected
from privfm.attacks.audit.gaussian import gaussian_epsilon
from privfm.attacks.audit.guesses import Guesses, Split, check_run, spread
from privfm.attacks.audit.statements import Bound
from privfm.checks import at_least, fraction, non_negative, require
from privfm.trade_offs import GaussianInverse, Inverse, LargestLine

_INDEPENDENT_HALVES = "the halves' traces are independent (the number of guesses was chosen on one half)"
"""Under f-DP the recursion is concave in the probability of a choice: a count chosen by the run needs this."""


class Family(ABC):
    """Trade-off functions ordered by a strength: larger means less private."""

    @property
    def assumes(self) -> str:
        """What must hold of a mechanism for a bound with this family; empty: nothing."""
        return ""

    @abstractmethod
    def inverse_blow_up(self, strength: float) -> Inverse:
        """`(1 - f)^-1` at a strength, increasing in y, decreasing in strength.

        f must bound both directions, in against out and out against in.
        """

    @abstractmethod
    def epsilon(self, strength: float, delta: float) -> float:
        """Epsilon of that member at delta, increasing in strength; 0 at strength 0."""

    def largest(self, rejects: Callable[[float], bool]) -> float:
        """Largest strength that is rejected, with everything below it; 0 if none."""
        return largest_rejected(lambda strength: strength == 0 or rejects(strength), tolerance=1e-5)


@final
@dataclass(frozen=True)
class GaussianFamily(Family):
    """mu-GDP mechanisms: strength is mu, sensitivity over noise.

    The exact family of a Gaussian mechanism in which everybody takes part in every round. It is no bound for a
    sub-sampled run, whose trade-off function is another one: use `TabulatedFamily` or `ApproximateFamily`.

    Source: Dong, Roth, Su, "Gaussian differential privacy", 2022, definition 3; Balle, Wang 2018, theorem 8.

    >>> round(GaussianFamily().epsilon(1.0, 1e-5), 4)
    4.3772
    """

    @property
    def assumes(self) -> str:
        """Everybody in every round."""
        return "the mechanism's trade-off function is Gaussian: not so for a sub-sampled run"

    def inverse_blow_up(self, strength: float) -> Inverse:
        """`y -> Phi(Phi^-1(y) - mu)`."""
        return GaussianInverse(strength)

    def epsilon(self, strength: float, delta: float) -> float:
        """Exact."""
        return gaussian_epsilon(strength, delta)


@final
@dataclass(frozen=True)
class ApproximateFamily(Family):
    """(epsilon, delta)-private mechanisms: strength is epsilon. Nothing is assumed.

    The same question as `one_run` answers, by another proof. It pays for delta inside the recursion where the theorem
    adds `2 m delta a`: better with few guesses of many canaries, a little worse with delta = 0.

    Args:
      delta: of the claim, in [0, 1).

    Source: Dong, Roth, Su 2022, proposition 3 (the trade-off function); Mahloujifar et al. 2025, algorithm 3.
    """

    delta: float

    def __post_init__(self) -> None:
        fraction("delta", self.delta, zero=True, one=False)

    def inverse_blow_up(self, strength: float) -> Inverse:
        """`y -> max(0, exp(-e) (y - delta), 1 - delta - exp(e) (1 - y))`."""
        delta, shrunk, grown = self.delta, exp(-strength), exp(min(strength, 700.0))
        return lambda y: max(0.0, shrunk * (y - delta), 1 - delta - grown * (1 - y))

    def epsilon(self, strength: float, delta: float) -> float:
        """The strength itself.

        Raises:
          InvalidArgument: a smaller delta than the family's.
        """
        require(
            delta >= self.delta,
            f"delta={delta!r}: expected at least the family's {self.delta!r}; make ApproximateFamily({delta!r})",
        )
        return strength


@final
@dataclass(frozen=True)
class TabulatedFamily(Family):
    """A list of members: a sub-sampled run's own trade-off functions, at several noise multipliers.

    A member is rejected only with all weaker ones; the bound is the largest rejected member's epsilon, so a finer
    list gives a better bound and a coarse one is still valid. Strength is the place in the list, from 1.

    Args:
      members: `(epsilon, inverse)` in increasing order of epsilon (and of trade-off function); see `profile_inverse`.
      delta: at which the epsilons hold.
      mechanism: what the list describes, for `assumes`.
    """

    members: tuple[tuple[float, Inverse], ...] = field(repr=False)
    delta: float
    mechanism: str

    def __post_init__(self) -> None:
        require(len(self.members) > 0, "members=(): expected at least one (epsilon, inverse)")
        epsilons = [epsilon for epsilon, _ in self.members]
        for epsilon in epsilons:
            non_negative("epsilon of a member", epsilon)
        increasing = all(low < high for low, high in pairwise(epsilons))
        require(increasing, "members: expected epsilons in strictly increasing order")
        fraction("delta", self.delta, zero=True, one=False)

    @property
    def assumes(self) -> str:
        """Names the mechanism."""
        return f"the mechanism is {self.mechanism}, of unknown noise"

    def inverse_blow_up(self, strength: float) -> Inverse:
        """Of the member in place `strength`, from 1."""
        return self.members[round(strength) - 1][1]

    def epsilon(self, strength: float, delta: float) -> float:
        """Of the member in place `strength`; 0 at 0.

        Raises:
          InvalidArgument: another delta than the members'.
        """
        require(delta == self.delta, f"delta={delta!r}: expected the members' {self.delta!r}")
        return 0.0 if strength == 0 else self.members[round(strength) - 1][0]

    def largest(self, rejects: Callable[[float], bool]) -> float:
        """Last place up to which all are rejected, by halving."""
        low, above = 0, len(self.members) + 1
        while above - low > 1:
            middle = (low + above) // 2
            low, above = (middle, above) if rejects(float(middle)) else (low, middle)
        return float(low)


def profile_inverse(epsilons: ArrayLike, deltas: ArrayLike) -> Inverse:
    """`y -> max_e exp(-e) (y - delta(e))`, at least 0: the inverse blow-up from a privacy profile.

    Leaving out epsilons makes it smaller, and a bound weaker, never wrong. Include negative epsilons.

    Args:
      epsilons: `(n,)`, finite.
      deltas: `(n,)`, of a privacy loss distribution at each: the larger of both directions.

    Cost: a binary search a call (the maximum of lines is convex: their order and crossings are found once).

    Source: Dong, Roth, Su 2022, proposition 6 (trade-off function from a profile).

    >>> inverse = profile_inverse([-1.0, 0.0, 1.0], [0.64, 0.1, 0.01])
    >>> round(inverse(0.5), 3), inverse(0.001)
    (0.4, 0.0)
    """
    losses, gaps = np.asarray(epsilons, dtype=np.float64), np.asarray(deltas, dtype=np.float64)
    require(
        losses.ndim == 1 and losses.shape == gaps.shape and losses.size > 0,
        f"epsilons {losses.shape} and deltas {gaps.shape}: expected two of the same shape (n,)",
    )
    finite = bool(np.isfinite(losses).all()) and bool(((gaps >= 0) & (gaps <= 1)).all())
    require(finite, "epsilons and deltas: expected finite epsilons, and deltas in [0, 1]")
    slopes = np.exp(-losses)
    floor = (0.0, 0.0)
    return LargestLine.of([floor, *zip(slopes.tolist(), (-slopes * gaps).tolist(), strict=True)])


def one_run_fdp(
    scores: ArrayLike,
    included: ArrayLike,
    delta: float,
    *,
    family: Family | None = None,
    guesses: Guesses | None = None,
    confidence: float = 0.95,
) -> Bound:
    """Certified lower bound of epsilon from one run, given the family of the mechanism's trade-off function.

    Args:
      scores: `(m,)`, higher means rather in.
      included: `(m,)`, the coins: independent, each with probability 1/2.
      delta: of the claim; a Gaussian family needs delta > 0.
      family: None: `ApproximateFamily(delta)`, which assumes nothing.
      guesses: how many are made; None: `spread(m)`.
      confidence: in (0, 1).

    Cost: 20 recursions of at most as many steps as guesses are right, half a microsecond each, for each count.

    Raises:
      InvalidArgument: NaN scores, coins that are not fair, more guesses than half of the canaries.

    Source: Mahloujifar, Melis, Chaudhuri, "Auditing f-differential privacy in one run", 2025, algorithm 3.
    """
    fraction("delta", delta, zero=True, one=False)
    fraction("confidence", confidence, one=False)
    curves = ApproximateFamily(delta) if family is None else family
    values, coins = check_run(scores, included)

    def bounding(m: int, guesses: int, correct: int, error: float, *, chosen: bool) -> float:
        strength = curves.largest(
            lambda candidate: rejected(curves.inverse_blow_up(candidate), m, guesses, correct, error=error)
        )
        return curves.epsilon(strength, delta)

    rule = spread(len(values)) if guesses is None else guesses
    found = rule.certify(values, coins, 1 - confidence, bounding)
    assumptions = [curves.assumes, _INDEPENDENT_HALVES if isinstance(rule, Split) else ""]
    assumes = "; ".join(text for text in assumptions if text)
    return found.bound("one run, f-DP", delta, confidence, len(values), assumes=assumes)


def rejected(inverse: Inverse, m: int, guesses: int, correct: int, *, error: float) -> bool:
    """Whether no mechanism with this trade-off function lets `correct` or more be right with probability `error`.

    Suppose one did. r and h, the expected numbers of right and of wrong guesses over m on the event of at least i
    right ones, then grow from i = correct down to 0 by at least `h_i = max(h_{i+1}, (1-f)^-1(r_{i+1}))`,
    `r_i = r_{i+1} + i / (guesses - i) (h_i - h_{i+1})`; at 0 they must sum to guesses / m, and do not if it is more.

    Args:
      inverse: `(1 - f)^-1`.
      m: canaries.
      guesses: made.
      correct: of them.
      error: the probability.

    Cost: at most `correct` calls of `inverse`; ends as soon as the sum is passed or nothing grows any more.

    Source: Mahloujifar et al. 2025, algorithm 3 (two choices).
    """
    at_least("correct", correct, 0)
    fraction("error", error, one=False)
    require(correct <= guesses <= m, f"correct={correct}, guesses={guesses}, m={m}: expected correct <= guesses <= m")
    total = guesses / m
    right, wrong = error * correct / m, error * (guesses - correct) / m
    for i in range(correct - 1, -1, -1):
        grown = inverse(right)
        if grown <= wrong:
            return False  # neither changes from here on
        right += i / (guesses - i) * (grown - wrong)
        wrong = grown
        if right + wrong >= total:
            return True
    return False
