"""What an audit says: a bound that holds, an estimate that does not, and checks of the mechanism."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final


@final
@dataclass(frozen=True)
class Bound:
    """A certified lower bound of epsilon.

    Attributes:
      method: how it was computed, for the report.
      epsilon: at `confidence`, the mechanism's epsilon at `delta` is at least this; 0 where nothing can be certified.
      delta: of the claim that is tested.
      confidence: probability over the canaries' coins and the mechanism's with which the bound is not above the truth.
      canaries: that were flipped a coin for, or runs.
      guesses: that were made, of all tries together the one the bound comes from.
      correct: of them.
      tries: numbers of guesses that were declared; the bound pays for each of them (Bonferroni).
      ceiling: what it would say if every guess were right.
      assumes: what must hold of the mechanism beside (epsilon, delta)-privacy; empty: nothing.
    """

    method: str
    epsilon: float
    delta: float
    confidence: float
    canaries: int
    guesses: int
    correct: int
    tries: int
    ceiling: float
    assumes: str = ""


@final
@dataclass(frozen=True)
class Estimate:
    """A best guess of epsilon: no bound, it leans on what it assumes.

    Attributes:
      method: how it was computed.
      epsilon: the estimate.
      low: of a 95 % interval, under the same assumption.
      high: its other end; infinite where scores do not overlap.
      delta: at which.
      assumes: what would have to hold.
    """

    method: str
    epsilon: float
    low: float
    high: float
    delta: float
    assumes: str


@final
@dataclass(frozen=True)
class Check:
    """One property of the mechanism against what was claimed.

    Attributes:
      name: of the property.
      found: its measured value, in units of the claim where it has one.
      expected: by the claim.
      p_value: two-sided probability of a value at least as far off, if the claim holds.
      n: observations behind it.
    """

    name: str
    found: float
    expected: float
    p_value: float
    n: int
