"""Inverse blow-up functions, by which an audit and a plan speak of the same trade-off function.

How hard it is to tell a unit's presence is a trade-off function f between the two kinds of errors of any test. What
an audit of one run needs of it is `(1 - f)^-1`: the least probability that an event can have in one world when it has
probability y in the other. A plan knows it of its own mechanism, an attacker supposes it of a family; neither may
import the other, so what both compute stands here.

Source: Dong, Roth, Su, "Gaussian differential privacy", 2022; Mahloujifar, Melis, Chaudhuri, "Auditing f-differential
privacy in one run", 2025.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import erfc, inf, sqrt
from statistics import NormalDist
from typing import Final, final

Inverse = Callable[[float], float]
"""`(1 - f)^-1`: probability of an event in one world -> the least it can be in the other; convex, below the line."""

_QUANTILE: Final = NormalDist().inv_cdf

_ROOT_HALF: Final = sqrt(0.5)


@final
@dataclass(frozen=True)
class GaussianInverse:
    """Of Gaussians `mu` deviations apart, exact: `Phi(Phi^-1(y) - mu)`; by erfc, so that a far tail keeps its digits.

    Scalars of the standard library: a recursion asks thousands of times, and they are six times as fast as scipy's.

    Source: Dong, Roth, Su 2022, definition 3.

    >>> round(GaussianInverse(1.0)(0.5), 4)
    0.1587
    """

    mu: float

    def __call__(self, y: float) -> float:
        """The least probability in the other world, of an event of probability `y`; 0 and 1 stay what they are."""
        if y <= 0 or y >= 1:
            return 0.0 if y <= 0 else 1.0
        return 0.5 * erfc((self.mu - _QUANTILE(y)) * _ROOT_HALF)


@final
@dataclass(frozen=True)
class LargestLine:
    """The largest of lines `slope x + intercept`, a convex function; each line is a bound, and so is their largest.

    Attributes:
      slopes: of the lines that are the largest somewhere, ascending.
      intercepts: theirs.
      starts: where each becomes the largest, ascending; minus infinity first.

    >>> largest = LargestLine.of([(0.0, 0.0), (1.0, -0.5), (0.5, -1.0)])
    >>> largest.slopes, largest(0.25), largest(0.75)
    ((0.0, 1.0), 0.0, 0.25)
    """

    slopes: tuple[float, ...]
    intercepts: tuple[float, ...]
    starts: tuple[float, ...]

    @classmethod
    def of(cls, lines: Iterable[tuple[float, float]]) -> LargestLine:
        """Upper envelope of lines `(slope, intercept)`, at least one of them, by a monotone chain.

        Cost: O(k log k) for k lines.
        """
        kept: list[tuple[float, float]] = []
        starts: list[float] = []
        for slope, intercept in sorted(lines):
            while kept and (start := _overtakes(kept[-1], (slope, intercept))) <= starts[-1]:
                kept.pop()
                starts.pop()
            starts.append(start if kept else -inf)
            kept.append((slope, intercept))
        return cls(tuple(slope for slope, _ in kept), tuple(intercept for _, intercept in kept), tuple(starts))

    def __call__(self, x: float) -> float:
        """The largest line at `x`. Cost: O(log lines)."""
        place = bisect_right(self.starts, x) - 1  # the first starts at minus infinity
        return self.slopes[place] * x + self.intercepts[place]


def _overtakes(flat: tuple[float, float], steep: tuple[float, float]) -> float:
    """From where on the steeper line is the larger; of parallel ones the second, which is not lower, everywhere."""
    rise = steep[0] - flat[0]
    return (flat[1] - steep[1]) / rise if rise > 0 else -inf
