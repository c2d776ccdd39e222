"""Where the noise of a plan comes from: a seed, for simulations, or the operating system, for a guarantee."""

from __future__ import annotations

import os
from fractions import Fraction
from math import frexp, ldexp, sqrt
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

from privfm.checks import at_least, non_negative, one_of, positive, require
from privfm.defenses.privacy.discrete_noise import Words, discrete_gaussian

NoiseSource = Literal["seeded", "secure"]
"""`seeded`: from a torch generator. Repeatable, and no guarantee against anybody who knows the seed.
`secure`: from the operating system's cryptographic generator, on a grid. Not repeatable; there is no seed to record."""

STEPS = 30
"""Binary digits of a deviation: one deviation is at least 2^30 and less than 2^31 steps of the grid.

Why so fine: the accounting of the continuous Gaussian then stands. The Rényi divergences of the discrete Gaussian are
at most those of the continuous one at any step (Canonne, Kamath, Steinke, 2020), so RDP and zCDP carry
over as they are. What was computed from the exact distribution (PLD, sub-sampled or not) carries over by distance:
a continuous Gaussian rounded to the grid is its post-processing, and differs from the discrete one of s steps by
`1 + (k^2/s^2 - 1) / (24 s^2)` to first order, a Kullback-Leibler divergence of `1 / (24 s^2)^2` a coordinate. By
Pinsker's inequality the total variation over d coordinates is at most `sqrt(d / 2) / (24 s^2)`: 3e-17 for a million,
8e-16 for a billion. A round adds `(1 + e^epsilon)` times that to delta. It also keeps the rounding of the sum,
`sqrt(d)` steps, at a millionth of a deviation for a million coordinates."""

_ROUNDOFF = {torch.float64: 2.0**-53, torch.float32: 2.0**-24}


def words(source: NoiseSource, generator: Generator | None = None) -> Words:
    """Fair bits, 64 at a time.

    Args:
      source: see `NoiseSource`.
      generator: a CPU generator, for "seeded"; "secure" leaves it alone.

    Raises:
      InvalidArgument: "seeded" without a generator.

    >>> draw = words("seeded", Generator().manual_seed(1))
    >>> draw(3).dtype, len(draw(2))
    (dtype('uint64'), 2)
    """
    one_of("source", source, ("seeded", "secure"))
    if source == "secure":
        return _from_the_system
    require(generator is not None, "generator=None: a seeded source draws from a generator; give one, or take 'secure'")

    def seeded(count: int) -> NDArray[np.uint64]:
        drawn = torch.empty(count, dtype=torch.int64).random_(-(2**63), None, generator=generator)  # all 64 bits
        return drawn.numpy().view(np.uint64)

    return seeded


def gaussian(d: int, deviation: float, source: NoiseSource, generator: Generator | None = None) -> Tensor:
    """Gaussian noise `(d,)`, float64.

    | source | distribution                                         | draws                              |
    |--------|------------------------------------------------------|------------------------------------|
    | seeded | float32 normals times the deviation                  | `torch.randn(d)` of the generator  |
    | secure | discrete Gaussian, exact, on the grid of `grid_of`   | the operating system; no generator |

    What must be safe is the *release*, noise and sum together: see `secure_release`.

    Args:
      d: coordinates.
      deviation: standard deviation of each; 0 only where it is seeded.
      source: see `NoiseSource`.
      generator: for "seeded".

    Raises:
      InvalidArgument: an argument is out of range, or "seeded" has no generator.
    """
    at_least("d", d, 0)
    one_of("source", source, ("seeded", "secure"))
    if source == "secure":
        return _steps_of_noise(d, deviation) * grid_of(deviation)
    non_negative("deviation", deviation)
    require(generator is not None, "generator=None: seeded noise draws from a generator; give one, or take 'secure'")
    return (torch.randn(d, generator=generator) * deviation).double()


def grid_of(deviation: float) -> float:
    """The public grid of secure noise: the power of two that is 2^-30 to 2^-31 of the deviation.

    A power of two makes every multiplication and division by it exact.

    >>> grid_of(1.0) == 2.0**-30 and grid_of(1.9) == 2.0**-30
    True
    """
    positive("deviation", deviation)
    exponent = frexp(deviation)[1] - 1  # 2^exponent <= deviation < 2^(exponent + 1)
    require(-900 <= exponent <= 900, f"deviation={deviation!r}: its grid leaves float64; scale the updates")
    return ldexp(1.0, exponent - STEPS)


def secure_deviation(
    noise_multiplier: float, sensitivity: float, d: int, *, terms: int = 1, dtype: torch.dtype = torch.float64
) -> float:
    """The deviation with which `secure_release` keeps the noise multiplier although numbers are rounded.

    It is the noise multiplier times the sensitivity of what is really released, `S (1 + e) + sqrt(d) grid`, with the
    grid at its largest (see `rounding_inflation`). e is for the total, which depends on one row through the roundings
    of all: added up in float64 from n rows it is off by `(n - 1) 2^-53 n S` at most (Higham, "Accuracy and stability
    of numerical algorithms", 2002, chapter 4), rounded to float32 by `2^-24 n S` more, and that for each of two
    neighbours (Casacuberta et al., "Widespread underestimation of sensitivity in differentially private libraries and
    how to fix it", 2022).

    Args:
      noise_multiplier: deviation over sensitivity that the plan accounts for.
      sensitivity: S, longest row, L2.
      d: its coordinates.
      terms: n, most rows in the total; 1 where it is exact (whole steps of a grid).
      dtype: of the total, float64 or float32.

    Raises:
      InvalidArgument: an argument is out of range, or so much noise that its grid alone exceeds the sensitivity.

    >>> round(secure_deviation(1.0, 1.0, 10**6) - 1, 9)
    9.31e-07
    """
    positive("noise_multiplier", noise_multiplier)
    positive("sensitivity", sensitivity)
    at_least("d", d, 1)
    at_least("terms", terms, 1)
    require(dtype in _ROUNDOFF, f"dtype={dtype}: expected a total in float64 or float32")
    off = 2 * terms * ((terms - 1) * _ROUNDOFF[torch.float64] + (_ROUNDOFF[dtype] if dtype == torch.float32 else 0))
    share = noise_multiplier * sqrt(d) * 2.0**-STEPS
    require(share < 1, f"noise_multiplier={noise_multiplier!r}, d={d}: rounding outweighs the sensitivity; lower it")
    deviation = noise_multiplier * sensitivity * (1 + off) / (1 - share)
    return deviation * (1 + 2.0**-48)  # above the roundings of these lines


def rounding_inflation(deviation: float, d: int) -> float:
    """By how much rounding to the grid can raise the L2 sensitivity of a total of width d.

    Each of two neighbouring totals moves by half a step at most, so their difference by a step a coordinate.
    """
    at_least("d", d, 0)
    return sqrt(d) * grid_of(deviation)


def secure_release(total: Tensor, deviation: float) -> Tensor:
    """The total on the grid, plus exact discrete Gaussian noise: nothing but their sum shows in the bits.

    The total is rounded to whole steps first; the noise is added to whole numbers; a sum that float64 cannot hold is
    rounded as a whole, which is post-processing. So there is no floating-point attack on it, and no seed. The
    guarantee is that of a Gaussian of this deviation at a sensitivity larger by `rounding_inflation`; choose the
    deviation with `secure_deviation`.

    Args:
      total: `(d,)`, of a float type, not noised.
      deviation: standard deviation of the noise on each coordinate.

    Returns:
      `(d,)`, float64, on the total's device. A coordinate that is not finite stays so: zero the rows that bring one.
    """
    require(total.dim() == 1, f"total has shape {tuple(total.shape)}: expected (d,)")
    grid = grid_of(deviation)
    steps = (total.detach().double().cpu() / grid).round()
    return ((steps + _steps_of_noise(len(total), deviation)) * grid).to(total.device)


def noised(  # noqa: PLR0917  # the mechanism's own four, then where it draws
    total: Tensor,
    noise_multiplier: float,
    sensitivity: float,
    source: NoiseSource,
    generator: Generator,
    terms: int = 1,
) -> Tensor:
    """`total (d,)` plus noise of deviation `noise_multiplier * sensitivity`; see `NoiseSource`.

    Secure noise is a little larger, for what rounding to its grid and adding up `terms` rows in floating point may
    cost.
    """
    if source == "secure" and noise_multiplier > 0:
        deviation = secure_deviation(noise_multiplier, sensitivity, len(total), terms=max(terms, 1), dtype=total.dtype)
        return secure_release(total, deviation)
    return total + gaussian(len(total), noise_multiplier * sensitivity, "seeded", generator).to(total)


def on_grid(total: Tensor, noise_multiplier: float, sensitivity: float, source: NoiseSource, terms: int) -> Tensor:
    """`total (d,)` in whole steps of the grid that `noised` uses, float64; as it is where noise is seeded.

    For noise that is drawn apart from the total: the last bits of their sum must not show the total.
    """
    if source == "seeded" or noise_multiplier == 0:
        return total.double()
    grid = grid_of(secure_deviation(noise_multiplier, sensitivity, len(total), terms=max(terms, 1), dtype=total.dtype))
    return (total.double() / grid).round() * grid


def _steps_of_noise(d: int, deviation: float) -> Tensor:
    """Whole steps of noise `(d,)`, float64, exact: they stay far below 2^53."""
    steps = deviation / grid_of(deviation)  # exact: a power of two
    noise = discrete_gaussian(d, Fraction(steps) ** 2, words("secure"))
    return torch.from_numpy(noise).double()


def _from_the_system(count: int) -> NDArray[np.uint64]:
    return np.frombuffer(os.urandom(8 * count), np.uint64)
