"""Epsilon from independent trials: many runs with a canary each, or canaries that do not touch each other."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from math import inf, log
from typing import final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from privfm.attacks.audit.gaussian import gaussian_epsilon
from privfm.attacks.audit.statements import Bound
from privfm.attacks.rates import upper_rate
from privfm.checks import at_least, fraction, require

_INDEPENDENT = "scores are independent of one another: one run each, or canaries that do not touch each other"
_GAUSSIAN = "the mechanism's trade-off function is Gaussian: not so for a sub-sampled run"

_CANDIDATES = 64
"""Thresholds looked at on the half that chooses: quantiles, denser towards both ends; more change nothing visible."""


@final
@dataclass(frozen=True)
class Counts:
    """What one threshold showed.

    Attributes:
      inside: canaries in.
      missed: of them, those below the threshold.
      outside: canaries out.
      alarms: of them, those at the threshold or above.
    """

    inside: int
    missed: int
    outside: int
    alarms: int


class Threshold(ABC):
    """A rule by which "in" is said of scores at or above a threshold."""

    @abstractmethod
    def counts(
        self, inside: NDArray[np.float64], outside: NDArray[np.float64], worth: Callable[[Counts], float]
    ) -> tuple[Counts, ...]:
        """What each threshold that is paid for showed; `worth` is the bound of one threshold's counts."""


@final
@dataclass(frozen=True)
class DeclaredThreshold(Threshold):
    """Thresholds fixed before the runs; each is tried at `error / len(values)` (Bonferroni).

    Args:
      values: in units of the scores, none twice.
    """

    values: tuple[float, ...]

    def __post_init__(self) -> None:
        require(len(self.values) > 0, "values=(): expected at least one threshold")
        require(not any(np.isnan(value) for value in self.values), f"values={self.values!r}: expected numbers")
        require(len(set(self.values)) == len(self.values), f"values={self.values!r}: expected each threshold once")

    def counts(
        self, inside: NDArray[np.float64], outside: NDArray[np.float64], worth: Callable[[Counts], float]
    ) -> tuple[Counts, ...]:
        """At each of them, on all scores."""
        return tuple(_counts(inside, outside, value) for value in self.values)


@final
@dataclass(frozen=True)
class SplitThreshold(Threshold):
    """The threshold with the best bound on half of the scores, in and out apart, used on the other half.

    Args:
      seed: of the halves; must not depend on the scores.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        at_least("seed", self.seed, 0)

    def counts(
        self, inside: NDArray[np.float64], outside: NDArray[np.float64], worth: Callable[[Counts], float]
    ) -> tuple[Counts, ...]:
        """At the chosen one, on the second half."""
        generator = np.random.default_rng(self.seed)
        inside, outside = generator.permutation(inside), generator.permutation(outside)
        a, b = len(inside) // 2, len(outside) // 2
        first_in, first_out = inside[:a], outside[:b]
        # Half of the candidates crowd towards each end: large epsilons show where one error is rare.
        least = 1 / (a + b)
        shares = np.geomspace(least, 0.5, _CANDIDATES // 2)
        candidates = np.quantile(np.concatenate([first_in, first_out]), np.concatenate([shares, 1 - shares]))
        best = max(candidates.tolist(), key=lambda value: worth(_counts(first_in, first_out, value)))
        return (_counts(inside[a:], outside[b:], best),)


def clopper_pearson(
    scores_in: ArrayLike,
    scores_out: ArrayLike,
    delta: float,
    *,
    threshold: Threshold | None = None,
    confidence: float = 0.95,
    gaussian: bool = False,
) -> Bound:
    """Certified lower bound of epsilon from independent scores in and out.

    Args:
      scores_in: `(a,)`, one for each independent trial with the canary in, higher means rather in.
      scores_out: `(b,)`, out.
      delta: of the claim, 0 allowed; with `gaussian` above 0.
      threshold: declared or chosen on a split half; None: `SplitThreshold()`.
      confidence: in (0, 1), for both error rates and all thresholds together.
      gaussian: bound mu of a Gaussian trade-off function and give its epsilon: tighter, but it assumes that.

    Raises:
      InvalidArgument: NaN scores, fewer than 4 of either.

    Source: Nasr, Hayes, Steinke, Balle, Tramer et al., "Tight auditing of differentially private machine learning",
    2023, sections 4.1 (epsilon, delta) and 4.2 (Gaussian); intervals: Clopper, Pearson, 1934.

    >>> bound = clopper_pearson([1.0] * 500, [0.0] * 500, 0.0, threshold=DeclaredThreshold((0.5,)))
    >>> round(bound.epsilon, 2)
    4.91
    """
    fraction("delta", delta, zero=True, one=False)
    fraction("confidence", confidence, one=False)
    inside, outside = _scores("scores_in", scores_in), _scores("scores_out", scores_out)
    rule = SplitThreshold() if threshold is None else threshold
    shown = rule.counts(inside, outside, lambda counts: bound_of(counts, delta, 1 - confidence, gaussian=gaussian))
    error = (1 - confidence) / len(shown)
    found = [bound_of(counts, delta, error, gaussian=gaussian) for counts in shown]
    best = int(np.argmax(found))
    counts = shown[best]
    perfect = Counts(counts.inside, 0, counts.outside, 0)
    return Bound(
        method="Clopper-Pearson, Gaussian" if gaussian else "Clopper-Pearson",
        epsilon=found[best],
        delta=delta,
        confidence=confidence,
        canaries=len(inside) + len(outside),
        guesses=counts.inside + counts.outside,
        correct=counts.inside - counts.missed + counts.outside - counts.alarms,
        tries=len(shown),
        ceiling=bound_of(perfect, delta, error, gaussian=gaussian),
        assumes="; ".join([_INDEPENDENT, _GAUSSIAN] if gaussian else [_INDEPENDENT]),
    )


def bound_of(counts: Counts, delta: float, error: float, *, gaussian: bool = False) -> float:
    """Epsilon that one threshold's counts certify.

    With upper bounds M of the rate of misses and A of the rate of alarms, each wrong with probability `error` / 2:
    `max(0, ln((1 - delta - M) / A), ln((1 - delta - A) / M))`, or, for a Gaussian trade-off function,
    `mu = Phi^-1(1 - A) - Phi^-1(M)` and its exact epsilon.

    Args:
      counts: of a threshold that does not depend on them.
      delta: of the claim.
      error: probability of a wrong bound.
      gaussian: whether the trade-off function is taken to be Gaussian.
    """
    misses = upper_rate(counts.missed, counts.inside, error / 2)
    alarms = upper_rate(counts.alarms, counts.outside, error / 2)
    if gaussian:
        from scipy.special import ndtri

        fraction("delta", delta, one=False)
        return gaussian_epsilon(max(0.0, float(-ndtri(alarms) - ndtri(misses))), delta)
    return max(0.0, _log_ratio(1 - delta - misses, alarms), _log_ratio(1 - delta - alarms, misses))


def _counts(inside: NDArray[np.float64], outside: NDArray[np.float64], threshold: float) -> Counts:
    """What a threshold shows."""
    return Counts(len(inside), int((inside < threshold).sum()), len(outside), int((outside >= threshold).sum()))


def _log_ratio(above: float, below: float) -> float:
    """`ln(above / below)`; minus infinity where `above` is not positive."""
    return log(above / below) if above > 0 else -inf


def _scores(name: str, scores: ArrayLike) -> NDArray[np.float64]:
    """Scores `(n,)`, no NaN, at least 4: fewer leave nothing to halve."""
    values = np.asarray(scores, dtype=np.float64)
    require(values.ndim == 1, f"{name} {values.shape}: expected (n,)")
    at_least(f"number of {name}", len(values), 4)
    bad = int(np.isnan(values).sum())
    require(bad == 0, f"{name}: {bad} of {len(values)} are NaN: expected numbers")
    return values
