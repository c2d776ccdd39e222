"""How many canaries an audit needs before it can say anything of interest."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil, exp, log, log1p
from statistics import NormalDist

import numpy as np

from privfm.attacks.audit.bisection import largest_rejected
from privfm.attacks.audit.gaussian import gaussian_delta
from privfm.attacks.audit.one_run import epsilon_of, perfect
from privfm.attacks.audit.one_run_fdp import GaussianFamily, rejected
from privfm.checks import at_least, fraction, positive, require

_MOST = 10_000_000
"""Canaries beyond which nobody looks: a ghost block of 40 MB a client."""

_SHARES = tuple(float(share) for share in np.geomspace(0.001, 0.6, 14))
"""Shares of the canaries guessed, both sides together, among which the best one is planned."""


def ceiling(m: int, confidence: float = 0.95, delta: float = 0.0) -> float:
    """Largest epsilon that m guesses certify, all of them right: `ln(q / (1 - q))`, `q = (1 - confidence)^(1/m)`.

    About `ln(m / 3)` at 95 %. With delta > 0 it is lower, as the bound of Steinke et al. has it.

    >>> [round(ceiling(m), 2) for m in (100, 1000, 10_000, 100_000)]
    [3.49, 5.81, 8.11, 10.42]
    """
    at_least("m", m, 1)
    fraction("confidence", confidence, one=False)
    fraction("delta", delta, zero=True, one=False)
    return perfect(m, 1 - confidence) if delta == 0 else epsilon_of(m, m, m, delta, error=1 - confidence)


def canaries_needed(
    epsilon: float, *, mechanism_mu: float | None = None, delta: float = 0.0, confidence: float = 0.95
) -> int:
    """Fewest canaries with which one run certifies `epsilon`.

    | `mechanism_mu` | answer                                                                                     |
    |----------------|--------------------------------------------------------------------------------------------|
    | None           | with every guess right, none withheld and delta 0 or as given: no audit needs fewer        |
    | mu             | with as many right as a mu-GDP mechanism gives on average, the best count planned, by f-DP |

    Args:
      epsilon: to be certified, above 0.
      mechanism_mu: sensitivity over noise of the mechanism that is audited, everybody in every round.
      delta: of the claim; above 0 with `mechanism_mu`.
      confidence: in (0, 1).

    Raises:
      InvalidArgument: ten million would not do, as where `epsilon` is the mechanism's own or more.

    Source: closed form of Steinke et al. 2023; Mahloujifar et al. 2025, algorithm 3, at the expected counts.

    >>> canaries_needed(5.8), canaries_needed(2.0, mechanism_mu=1.0, delta=1e-5)
    (991, 284)
    """
    positive("epsilon", epsilon)
    fraction("confidence", confidence, one=False)
    error = 1 - confidence
    if mechanism_mu is None:
        if delta == 0:
            # q^m <= error with ln q = -ln(1 + exp(-epsilon)).
            return ceil(log(error) / -log1p(exp(-epsilon)))
        return _fewest(lambda m: ceiling(m, confidence, delta) >= epsilon, epsilon)
    positive("mechanism_mu", mechanism_mu)
    fraction("delta", delta, one=False)
    mu = _mu_of(epsilon, delta)
    inverse = GaussianFamily().inverse_blow_up(mu)
    plans = [(share, _accuracy(share, mechanism_mu)) for share in _SHARES]

    def certifies(m: int) -> bool:
        counts = [(max(1, round(share * m)), accuracy) for share, accuracy in plans]
        return any(rejected(inverse, m, count, int(count * accuracy), error=error) for count, accuracy in counts)

    return _fewest(certifies, epsilon)


def _fewest(certifies: Callable[[int], bool], epsilon: float) -> int:
    """Smallest m that certifies, by doubling and halving."""
    low, high = 1, 8
    while not certifies(high):
        low, high = high, 2 * high
        require(high <= _MOST, f"epsilon={epsilon!r}: {_MOST} canaries would not certify it; ask for a smaller epsilon")
    while high - low > max(1, low // 100):
        middle = (low + high) // 2
        low, high = (low, middle) if certifies(middle) else (middle, high)
    return high


def _mu_of(epsilon: float, delta: float) -> float:
    """The mu whose Gaussian mechanism has that epsilon at delta."""
    return largest_rejected(lambda mu: gaussian_delta(mu, epsilon) < delta, tolerance=1e-9)


def _accuracy(share: float, mu: float) -> float:
    """Probability that a guess is right when the `share` furthest from the middle are guessed, scores +-mu/2 + N(0, 1).

    `|y| > t` has probability `share = Phi(mu/2 - t) + Phi(-mu/2 - t)`; the first term is the right ones.
    """
    cdf: Callable[[float], float] = NormalDist().cdf
    threshold = largest_rejected(lambda t: cdf(mu / 2 - t) + cdf(-mu / 2 - t) > share, tolerance=1e-9)
    return cdf(mu / 2 - threshold) / (cdf(mu / 2 - threshold) + cdf(-mu / 2 - threshold))
