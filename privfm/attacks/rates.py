"""Exact bounds of a rate from independent trials."""

from __future__ import annotations

from privfm.checks import at_least, fraction, require


def upper_rate(found: int, of: int, error: float) -> float:
    """Upper bound of a rate of which `found` of `of` were seen, too low with probability `error` at most.

    Source: Clopper and Pearson, "The use of confidence or fiducial limits", 1934.

    >>> round(upper_rate(0, 100, 0.05), 4)
    0.0295
    """
    from scipy.special import betaincinv

    at_least("of", of, 1)
    require(0 <= found <= of, f"found={found}: expected between 0 and of={of}")
    fraction("error", error, one=False)
    return 1.0 if found == of else float(betaincinv(found + 1, of - found, 1 - error))


def lower_rate(found: int, of: int, error: float) -> float:
    """Lower bound of a rate of which `found` of `of` were seen, too high with probability `error` at most.

    >>> round(lower_rate(100, 100, 0.05), 4)
    0.9705
    """
    return 1 - upper_rate(of - found, of, error)
