"""The Gaussian trade-off function: mu, epsilon and delta of one another, without an accountant."""

from __future__ import annotations

from math import exp, inf, isinf, log

from privfm.attacks.audit.bisection import largest_rejected
from privfm.checks import fraction, non_negative, require


def gaussian_delta(mu: float, epsilon: float) -> float:
    """Smallest delta with which a mu-GDP mechanism is (epsilon, delta)-private.

    `Phi(-e/mu + mu/2) - exp(e) Phi(-e/mu - mu/2)`, the second term in logarithms: exp(e) alone overflows.

    Args:
      mu: sensitivity over noise's standard deviation, at least 0.
      epsilon: any number.

    Source: Balle, Wang, "Improving the Gaussian mechanism for differential privacy", 2018, theorem 8.

    >>> round(gaussian_delta(1.0, 4.377178) * 1e5, 4)
    1.0
    """
    from scipy.special import log_ndtr, ndtr

    non_negative("mu", mu)
    if mu == 0:
        return max(0.0, 1 - exp(min(epsilon, 0.0)))
    return float(ndtr(-epsilon / mu + mu / 2) - exp(epsilon + float(log_ndtr(-epsilon / mu - mu / 2))))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Smallest epsilon >= 0 with which a mu-GDP mechanism is (epsilon, delta)-private, to 1e-9.

    | mu  | answer   |
    |-----|----------|
    | 0   | 0        |
    | inf | infinite |

    Args:
      mu: sensitivity over noise's standard deviation.
      delta: in (0, 1); at 0 every mu > 0 would be infinite.

    Source: Balle, Wang 2018, theorem 8, inverted by bisection.

    >>> round(gaussian_epsilon(1.0, 1e-5), 6), round(gaussian_epsilon(2.0, 1e-5), 6)
    (4.377178, 9.997256)
    """
    fraction("delta", delta, one=False)
    require(mu >= 0, f"mu={mu!r}: expected a number >= 0")
    if isinf(mu):
        return inf
    # Phi(mu/2 - e/mu) <= delta at e = mu^2/2 + mu sqrt(2 ln(1/delta)): the answer is below.
    high = mu * mu / 2 + mu * (2 * log(1 / delta)) ** 0.5
    return largest_rejected(lambda epsilon: gaussian_delta(mu, epsilon) > delta, high, tolerance=1e-9)
