"""Noise that is correlated between rounds: what one round adds, later ones take partly away again.

Released is `x_t + n_t` with `n_t = z_t - sum_{j=1}^{b-1} c_j n_{t-j}`: the noise matrix is `C^{-1} z` for the lower
triangular Toeplitz matrix C with b bands. The sum of all rounds then carries far less noise than of independent draws,
at the price of noise for the column norm of C in each.
"""

from __future__ import annotations

from math import sqrt

from privfm.checks import at_least


def coefficients(bands: int) -> tuple[float, ...]:
    """`c_0, ..., c_{b-1}`: the first terms of the square root of the matrix of prefix sums.

    Source: Fichtenberger, Henzinger, Upadhyay, "Constant matters", 2023; Choquette-Choo et al., "(Amplified) banded
    matrix factorization", 2023: `c_0 = 1, c_j = c_{j-1} (2 j - 1) / (2 j)`.

    >>> coefficients(4)
    (1.0, 0.5, 0.375, 0.3125)
    """
    at_least("bands", bands, 1)
    values = [1.0]
    for j in range(1, bands):
        values.append(values[-1] * (2 * j - 1) / (2 * j))
    return tuple(values)


def sensitivity(bands: int, participations: int) -> float:
    """How far one unit moves `C x`, in units of its clip: `sqrt(k) |c|`.

    Columns that lie `bands` rounds apart do not overlap, so it needs a separation of at least as many rounds between
    two participations of one unit. It is an upper bound where the last participation is cut off by the end.

    >>> round(sensitivity(bands=5, participations=4) , 6)
    2.500439
    """
    at_least("participations", participations, 1)
    return sqrt(participations * sum(value**2 for value in coefficients(bands)))
