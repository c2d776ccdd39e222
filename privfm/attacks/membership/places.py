"""Where a number stands between others, finer than by counting them."""

from __future__ import annotations

import numpy as np

from privfm.contracts.membership import Array


def part_of_step(values: Array, lower: Array, upper: Array) -> Array:
    """How far each value is from its lower towards its upper neighbour, from 0 (at the lower) to 1, rising.

    | neighbours | part |
    |---|---|
    | both | `(value - lower) / (upper - lower)` |
    | no lower one (minus infinity) | the same with the value 1 above it: `1 / (1 + upper - value)` |
    | no upper one (infinity) | the same with the value 1 below it: `(value - lower) / (value - lower + 1)` |

    Added to the number of others that a value reaches, it breaks ties without changing the order of numbers.

    Args:
      values: `(n,)`.
      lower: the largest of the others that is at most the value.
      upper: the smallest that is larger.
    """
    above = np.where(np.isfinite(lower), values - lower, 1.0)
    below = np.where(np.isfinite(upper), upper - values, 1.0)
    return np.asarray(above / (above + below))
