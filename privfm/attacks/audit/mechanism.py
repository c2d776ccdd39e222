"""Checks of the mechanism itself: what ghost canaries show of noise, clip, weights and sampling, as p-values.

A canary's own coordinate carries the noise and, where it took part, exactly what arrived of what it sent. So a mistake
is seen long before any bound of epsilon could show it: 50 such numbers tell halved noise, and 20 cohort sizes tell a
fixed cohort from a Poisson one, which no score of a canary can. A check passed proves nothing beyond its property.

| mistake                             | found by                                       |
|-------------------------------------|------------------------------------------------|
| less (or more) noise than claimed   | `noise_scale`, `noise_shape`                   |
| another noise than Gaussian         | `noise_shape`                                  |
| the same noise twice, a short seed  | `noise_correlation`                            |
| a forgotten clip, weights, shares   | `mean_shift`; `shift_spread` where it varies   |
| another rate, a fixed cohort        | `inclusion.inclusion`, from the cohorts' sizes           |
| shuffled or cycled through          | `inclusion.inclusion`, from who took part                |

Units: `values (T, m)` are one sum a round, in units of that round's clip bound, so that a canary that took part adds 1
and the noise is N(0, z^2). `sent (T, m)` says who took part; it is the simulation's own truth.

Each p-value is uniform when the claim holds, or larger than that: counts are discrete, and `noise_correlation` pays
for all pairs of rounds at once.
"""

from __future__ import annotations

from dataclasses import replace
from math import sqrt
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from privfm.attacks.audit.inclusion import two_sided
from privfm.attacks.audit.statements import Check
from privfm.checks import non_negative, require

if TYPE_CHECKING:
    from collections.abc import Sequence

_ROUNDING = 1e-5
"""In units of the clip: what float32 sums and the clip's own margin may move, where a claim leaves no noise at all."""

_FEWEST_PAIRS = 8
"""Two rounds are compared on at least so many coordinates on which nobody sent anything in either."""


# Noise


def noise_scale(values: ArrayLike, sent: ArrayLike, noise_multiplier: float) -> Check:
    """Deviation of the noise over the claimed one: an exact two-sided chi-square test of variance, mean known zero.

    Only coordinates on which nobody sent anything are used: a wrong clip or weight cannot make noise look right.

    | claimed noise | found                         | p-value                                      |
    |---------------|-------------------------------|----------------------------------------------|
    | above 0       | its deviation over the claim  | chi-square                                   |
    | 0             | its deviation                 | 1 if no value is beyond rounding (1e-5), or 0|

    Args:
      values: released, `(T, m)`.
      sent: who took part, `(T, m)`.
      noise_multiplier: claimed.

    Raises:
      InvalidArgument: an argument is out of range, or everybody took part in every round: nothing shows bare noise.
    """
    noise = _noise(values, sent, noise_multiplier)
    squares, n = float(np.square(noise).sum()), noise.size
    if noise_multiplier == 0:
        p_value = 1.0 if float(np.abs(noise).max()) <= _ROUNDING else 0.0
        return Check("noise scale", sqrt(squares / n), 0.0, p_value, n)
    from scipy.stats import chi2

    statistic = squares / noise_multiplier**2
    p_value = two_sided(float(chi2.cdf(statistic, n)), float(chi2.sf(statistic, n)))
    return Check("noise scale", sqrt(statistic / n), 1.0, p_value, n)


def noise_shape(values: ArrayLike, sent: ArrayLike, noise_multiplier: float) -> Check:
    """Largest distance between the noise's distribution and the claimed normal (Kolmogorov and Smirnov).

    Nothing is fitted, so the test is exact; a wrong scale fails it too. Noise on a grid is taken for continuous, which
    adds at most 0.2 steps over its deviation to the distance: with n values keep that far below 1 / sqrt(n).

    Raises:
      InvalidArgument: as `noise_scale`; or no noise is claimed.
    """
    noise = _noise(values, sent, noise_multiplier)
    require(noise_multiplier > 0, "noise_multiplier=0: no noise has no shape; `noise_scale` tells whether there is any")
    from scipy.stats import kstest

    found = kstest(noise / noise_multiplier, "norm", method="auto")
    return Check("noise shape", float(found.statistic), 0.0, float(found.pvalue), noise.size)


def noise_correlation(values: ArrayLike, sent: ArrayLike) -> tuple[Check, ...]:
    """Whether noise is new every time: from round to round, from coordinate to coordinate, and between any two rounds.

    The last looks for noise that comes back (a seed used again): the largest correlation of two rounds, times the
    number of pairs (Bonferroni). Comparisons without enough bare noise are left out: none for a single round.

    Correlations are about the known mean zero; for independent normal values `r sqrt((n-1) / (1-r^2))` follows
    Student's law with n - 1 degrees of freedom (exact for two separate rounds, close for chains of neighbours).

    Cost: O(T^2 m) time, O(T (m + T)) memory.

    Raises:
      InvalidArgument: an argument is out of range.
    """
    noise, bare = _arrays(values, sent)
    noise = np.where(bare, noise, 0.0)  # a product with what somebody sent into counts for nothing
    found = [
        _correlation("noise from round to round", noise[:-1], noise[1:], bare[:-1] & bare[1:]),
        _correlation("noise across coordinates", noise[:, :-1], noise[:, 1:], bare[:, :-1] & bare[:, 1:]),
        _repeated(noise, bare),
    ]
    return tuple(check for check in found if check is not None)


# What arrives


def mean_shift(values: ArrayLike, sent: ArrayLike, noise_multiplier: float, expected: ArrayLike | None = None) -> Check:
    """What arrives of a participation, in units of what should: 1 where the clip and the weights are as claimed.

    The best estimate with known noise: `sum(expected value) / sum(expected^2)`, normal with deviation
    `z / sqrt(sum(expected^2))`. Canaries send 10 times the clip, so 10 is found where the clip is forgotten.

    Args:
      values: released, `(T, m)`.
      sent: who took part, `(T, m)`.
      noise_multiplier: claimed; without noise the p-value is 1 if what arrives is right but for rounding, or 0.
      expected: what each canary should arrive as, `(m,)`, in (0, 1]: its declared weight; None: 1.

    Raises:
      InvalidArgument: an argument is out of range, or nobody took part.
    """
    arrived, weights = _arrivals(values, sent, expected)
    non_negative("noise_multiplier", noise_multiplier)
    information = float(np.square(weights).sum())
    found = float((weights * arrived).sum()) / information
    return Check("mean shift", found, 1.0, _normal(found - 1, noise_multiplier / sqrt(information)), weights.size)


def shift_spread(
    values: ArrayLike, sent: ArrayLike, noise_multiplier: float, expected: ArrayLike | None = None
) -> Check:
    """Deviation of canaries' arrivals around what is expected of each, over what the noise makes of it.

    It sees what a mean hides: half arriving as 0.5 and half as 1.5. Chi-square with one degree of freedom a
    participation, two-sided. Wrong noise and a wrong mean fail it too.

    Raises:
      InvalidArgument: as `mean_shift`; or no noise is claimed.
    """
    arrived, weights = _arrivals(values, sent, expected)
    non_negative("noise_multiplier", noise_multiplier)
    require(noise_multiplier > 0, "noise_multiplier=0: without noise every canary must arrive exactly; use mean_shift")
    from scipy.stats import chi2

    canary = np.nonzero(np.asarray(sent, dtype=bool))[1]  # in the order of `arrived`
    information = np.bincount(canary, np.square(weights))
    seen = information > 0
    shifts = np.bincount(canary, weights * (arrived - weights))[seen] / (noise_multiplier * np.sqrt(information[seen]))
    statistic, n = float(np.square(shifts).sum()), int(seen.sum())
    p_value = two_sided(float(chi2.cdf(statistic, n)), float(chi2.sf(statistic, n)))
    return Check("shift spread", sqrt(statistic / n), 1.0, p_value, n)


# All of them


def check_mechanism(
    values: ArrayLike,
    sent: ArrayLike,
    noise_multiplier: float,
    expected: ArrayLike | None = None,
    cohorts: tuple[Check, ...] = (),
) -> tuple[Check, ...]:
    """Every check that has something to look at: what is missing was not tested.

    Args:
      values: released, `(T, m)`.
      sent: who took part, `(T, m)`.
      noise_multiplier: claimed.
      expected: see `mean_shift`.
      cohorts: the result of `inclusion.inclusion`, where sampling is checked.

    Raises:
      InvalidArgument: an argument is out of range.
    """
    _, bare = _arrays(values, sent)
    checks: list[Check] = []
    if bare.any():
        checks.append(noise_scale(values, sent, noise_multiplier))
        if noise_multiplier > 0:
            checks += [noise_shape(values, sent, noise_multiplier), *noise_correlation(values, sent)]
    if not bare.all():
        checks.append(mean_shift(values, sent, noise_multiplier, expected))
        if noise_multiplier > 0:
            checks.append(shift_spread(values, sent, noise_multiplier, expected))
    return (*checks, *cohorts)


def holm(checks: Sequence[Check]) -> tuple[Check, ...]:
    """The same checks with p-values for the whole family: whichever are below alpha, all are wrong with at most alpha.

    The smallest says whether anything is amiss. Source: Holm, 1979.

    >>> [round(check.p_value, 3) for check in holm([Check("a", 0, 0, 0.01, 1), Check("b", 0, 0, 0.04, 1)])]
    [0.02, 0.04]
    """
    adjusted, largest = list(checks), 0.0
    for rank, place in enumerate(sorted(range(len(checks)), key=lambda k: checks[k].p_value)):
        largest = max(largest, min(1.0, (len(checks) - rank) * checks[place].p_value))
        adjusted[place] = replace(checks[place], p_value=largest)
    return tuple(adjusted)


def smallest_p(checks: Sequence[Check]) -> float:
    """Holm's smallest: the probability of any check as bad as the worst one, if all claims hold; 1 without checks."""
    return min((check.p_value for check in holm(checks)), default=1.0)


# Parts


def _arrays(values: ArrayLike, sent: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Values, and where nobody sent anything."""
    found, took_part = np.asarray(values, dtype=np.float64), np.asarray(sent)
    require(found.ndim == 2 and found.size > 0, f"values: expected (rounds, canaries), got shape {found.shape}")
    require(took_part.dtype == np.bool_, f"sent: expected true or false, got {took_part.dtype}")
    require(took_part.shape == found.shape, f"sent: expected the shape {found.shape} of values, got {took_part.shape}")
    require(bool(np.isfinite(found).all()), "values: not all are finite; leave out rounds that were skipped")
    return found, ~took_part


def _noise(values: ArrayLike, sent: ArrayLike, noise_multiplier: float) -> NDArray[np.float64]:
    """Bare noise, `(n,)`."""
    found, bare = _arrays(values, sent)
    non_negative("noise_multiplier", noise_multiplier)
    require(bool(bare.any()), "sent: every canary took part in every round; leave about half of them out")
    return found[bare]


def _arrivals(
    values: ArrayLike, sent: ArrayLike, expected: ArrayLike | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """What arrived of each participation, and what should have, `(n,)` each, round by round."""
    found, bare = _arrays(values, sent)
    require(not bool(bare.all()), "sent: no canary took part in any round, so nothing arrived")
    declared = np.ones(found.shape[1]) if expected is None else np.asarray(expected, dtype=np.float64)
    require(
        declared.shape == (found.shape[1],) and bool(((declared > 0) & (declared <= 1)).all()),
        f"expected: one number in (0, 1] for each of {found.shape[1]} canaries, got shape {declared.shape}",
    )
    return found[~bare], np.broadcast_to(declared, found.shape)[~bare]


def _normal(off: float, deviation: float) -> float:
    from scipy.stats import norm

    if deviation == 0:
        return 1.0 if abs(off) <= _ROUNDING else 0.0
    return float(2 * norm.sf(abs(off) / deviation))


def _correlation(
    name: str, first: NDArray[np.float64], second: NDArray[np.float64], both: NDArray[np.bool_]
) -> Check | None:
    """Of pairs of bare noise; None where there are too few, or no noise."""
    n = int(both.sum())
    squares = float(np.square(first[both]).sum()) * float(np.square(second[both]).sum())
    if n < _FEWEST_PAIRS or squares == 0:
        return None
    correlation = float((first[both] * second[both]).sum()) / sqrt(squares)
    return Check(name, correlation, 0.0, float(_student(correlation, n)), n)


def _student(correlation: Any, n: Any) -> Any:
    """Two-sided p-value of a correlation about known means, of independent normal values; elementwise."""
    from scipy.stats import t

    short = np.maximum(1 - np.square(correlation), np.finfo(np.float64).eps)  # 1 when noise is the same
    return 2 * t.sf(np.abs(correlation) * np.sqrt((n - 1) / short), n - 1)


def _repeated(noise: NDArray[np.float64], bare: NDArray[np.bool_]) -> Check | None:
    """The largest correlation between two rounds, on coordinates on which both are bare."""
    first, second = np.triu_indices(len(noise), 1)
    mask = bare.astype(np.float64)
    n = (mask @ mask.T)[first, second]
    squares = np.square(noise) @ mask.T
    scale = np.sqrt(squares * squares.T)[first, second]
    usable = (n >= _FEWEST_PAIRS) & (scale > 0)
    if not usable.any():
        return None
    correlations = (noise @ noise.T)[first, second][usable] / scale[usable]
    p_values = _student(np.clip(correlations, -1, 1), n[usable])
    worst = int(np.argmin(p_values))
    p_value = min(1.0, float(p_values[worst]) * p_values.size)
    return Check("noise that comes back", float(correlations[worst]), 0.0, p_value, int(n[usable].sum()))
