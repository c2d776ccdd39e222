"""Whether units were drawn as claimed: rate, cohort sizes and each unit's participations, against their exact laws."""

from __future__ import annotations

from math import log
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from privfm.attacks.audit.statements import Check
from privfm.checks import at_least, fraction, one_of, require

Scheme = Literal["poisson", "fixed_size", "full"]

_LEAST_P = 1e-10
"""No smaller p-value is given for a spread: its law is convolved by FFT, which rounds to 1e-12 over 10,000 counts."""

_LARGEST_LAW = 2**22
"""Longest law that is convolved (about 0.5 s); beyond it, sums have so many terms that a gamma law is as good."""

_NEGLIGIBLE = 1e-18
"""Counts of less probability are left out of the law: together they stay far below `_LEAST_P`, over all rounds."""


def inclusion(
    sampled: ArrayLike,
    population: int,
    rate: float,
    scheme: Scheme = "poisson",
    participation: ArrayLike | None = None,
) -> tuple[Check, ...]:
    """Whether units were drawn as claimed.

    | check              | found over the claim                          | law under Poisson sampling           |
    |--------------------|-----------------------------------------------|--------------------------------------|
    | sampling rate      | units drawn                                   | binomial                             |
    | cohort size spread | variance of the sizes around N q              | exact: T sizes, binomial each        |
    | unit spread        | variance of the units' participations around T q | exact: N counts, binomial each    |

    Claims of `fixed_size` or `full` fix every size: one check, passed or failed. The second check is also the test of
    pairs: how often two units are drawn together, over all pairs, is a function of the sizes, and the variance minus
    `N q (1-q)` is N (N-1) times the mean covariance of a pair: 0, against `-q (1-q) / (N-1)` in a fixed cohort. The
    third needs `participation`; shuffling and taking turns give every unit the same count, and it is too small.

    A fixed cohort accounted as Poisson has spread 0, with probability `Binomial(N, q)(N q)^T`, doubled: below 1e-6 from
    7 rounds on at N=200, q=0.1, and from 12 at N=20 (4 and 7 rounds for 1e-3).

    Args:
      sampled: units drawn in each round, `(T,)`.
      population: units there are.
      rate: with which each is drawn.
      scheme: claimed.
      participation: which units were drawn, `(T, population)`; None: only their number is known.

    Raises:
      InvalidArgument: an argument is out of range, or `participation` does not have the sizes of `sampled`.
    """
    one_of("scheme", scheme, ("poisson", "fixed_size", "full"))
    at_least("population", population, 1)
    fraction("rate", rate)
    sizes = np.asarray(sampled)
    require(
        sizes.ndim == 1 and sizes.size > 0 and bool(np.all((sizes == np.round(sizes)) & (sizes >= 0))),
        f"sampled: expected one whole number >= 0 a round, got shape {sizes.shape}",
    )
    sizes = sizes.astype(np.int64)
    require(int(sizes.max()) <= population, f"sampled: {sizes.max()} drawn of population={population!r}")
    units = _participations(participation, sizes, population)
    if scheme != "poisson":
        return (_fixed(sizes, population, 1.0 if scheme == "full" else rate, scheme),)
    checks = [_rate(sizes, population, rate), _spread("cohort size spread", sizes, population, rate)]
    if units is not None:
        checks.append(_spread("unit spread", units, sizes.size, rate))
    return tuple(checks)


def two_sided(lower: float, upper: float) -> float:
    """P-value from the probabilities of both tails, each with the value itself: valid for discrete laws too."""
    return min(1.0, 2 * min(lower, upper))


def _participations(
    participation: ArrayLike | None, sizes: NDArray[np.int64], population: int
) -> NDArray[np.int64] | None:
    """How often each unit took part, `(N,)`."""
    if participation is None:
        return None
    drawn = np.asarray(participation)
    require(
        drawn.dtype == np.bool_ and drawn.shape == (sizes.size, population),
        f"participation: expected true or false of shape {(sizes.size, population)}, got {drawn.dtype} {drawn.shape}",
    )
    require(bool((drawn.sum(1) == sizes).all()), "participation: its rounds do not have the sizes of sampled")
    return np.asarray(drawn.sum(0), dtype=np.int64)


def _fixed(sizes: NDArray[np.int64], population: int, rate: float, scheme: str) -> Check:
    """All cohorts of the one size that is claimed."""
    size = round(population * rate)
    p_value = 1.0 if bool((sizes == size).all()) else 0.0
    return Check(f"cohort size ({scheme})", float(sizes.mean()) / max(size, 1), 1.0, p_value, sizes.size)


def _rate(sizes: NDArray[np.int64], population: int, rate: float) -> Check:
    from scipy.stats import binom

    drawn, trials = int(sizes.sum()), sizes.size * population
    p_value = two_sided(float(binom.cdf(drawn, trials, rate)), float(binom.sf(drawn - 1, trials, rate)))
    return Check("sampling rate", drawn / (trials * rate), 1.0, p_value, trials)


def _spread(name: str, counts: NDArray[np.int64], trials: int, rate: float) -> Check:
    """Of counts that should be Binomial(trials, rate), each on its own: the sum of squares around the whole mean."""
    centre = round(trials * rate)
    squares = int(np.square(counts - centre).sum())
    variance = trials * rate * (1 - rate)
    found = float(np.square(counts - trials * rate).mean()) / variance if variance > 0 else float(squares)
    lower, upper = _tails(squares, counts.size, trials, rate)
    p_value = max(two_sided(lower, upper), _LEAST_P) if variance > 0 else two_sided(lower, upper)
    return Check(name, found, 1.0 if variance > 0 else 0.0, p_value, counts.size)


def _tails(squares: int, count: int, trials: int, rate: float) -> tuple[float, float]:
    """`P(S <= squares)` and `P(S >= squares)` for S the sum of `(X - centre)^2` over so many binomial counts X."""
    from scipy.stats import binom, gamma

    counts = np.arange(trials + 1)
    mass = binom.pmf(counts, trials, rate)
    counts, mass = counts[mass > _NEGLIGIBLE], mass[mass > _NEGLIGIBLE]
    distances = np.square(counts - round(trials * rate))
    length = _length(distances, mass, count, trials * rate * (1 - rate))
    if length > _LARGEST_LAW:
        mean = float((mass * distances).sum())
        variance = float((mass * np.square(distances - mean)).sum())
        matched = gamma(count * mean**2 / variance, scale=variance / mean)
        return float(matched.cdf(squares)), float(matched.sf(squares))
    if squares >= length:
        return 1.0, 0.0
    one = np.bincount(distances, mass)[:length]
    law = np.fft.irfft(np.fft.rfft(one, length + length % 2) ** count, length + length % 2).clip(0.0)
    return min(float(law[: squares + 1].sum()), 1.0), min(max(1.0 - float(law[:squares].sum()), 0.0), 1.0)


def _length(distances: NDArray[np.int64], mass: NDArray[np.float64], count: int, variance: float) -> int:
    """Where the law of the sum can be cut: at its end, or where less than exp(-32) = 1e-14 lies beyond.

    Chernoff: `P(S >= L) <= E[exp(s (X - centre)^2)]^count exp(-s L)`, at `s = 1 / (4 variance)`, where a normal X has
    `sqrt 2` for the expectation.
    """
    whole = count * int(distances.max()) + 1
    if variance == 0:
        return whole
    scale = 1 / (4 * variance)
    largest = scale * float(distances.max())
    expectation = float((mass * np.exp(scale * distances - largest)).sum())
    return min(whole, int((count * (log(expectation) + largest) + 32) / scale) + 1)
