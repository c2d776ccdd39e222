"""The largest number that a test still rejects, found by halving."""

from __future__ import annotations

from collections.abc import Callable

from privfm.checks import require

_DOUBLINGS = 60
"""From 1 to 1e18: a test that rejects even that rejects everything, which no privacy test may."""


def largest_rejected(rejects: Callable[[float], bool], high: float | None = None, *, tolerance: float = 1e-6) -> float:
    """Largest `x >= 0` with `rejects(x)`, where everything below a rejected number is rejected; 0 if nothing is.

    The number returned has itself been rejected (or is 0), so a lower bound made from it is never rounded upwards.

    Args:
      rejects: monotone: true up to some number, then false.
      high: nothing above is tried; None: found by doubling.
      tolerance: of the answer, relative above 1 and absolute below.

    Cost: about 25 calls.

    >>> round(largest_rejected(lambda x: x * x < 2), 4)
    1.4142
    """
    if not rejects(0.0):
        return 0.0
    low, above = 0.0, 1.0 if high is None else high
    if high is None:
        for _ in range(_DOUBLINGS):
            if not rejects(above):
                break
            low, above = above, 2 * above
        else:
            require(False, f"a test that rejects {low!r} rejects everything: expected one that stops rejecting")
    elif rejects(above):
        return above
    while above - low > tolerance * max(1.0, low):
        middle = (low + above) / 2
        low, above = (middle, above) if rejects(middle) else (low, middle)
    return low
