"""Noise on whole numbers: the discrete Gaussian, exactly, and the Skellam distribution, approximately.

A floating-point Gaussian has gaps and uneven steps that depend on the value it is added to, and those give the value
away (Mironov, "On significance of the least significant bits for differential privacy", 2012; Holohan, Braghin,
"Secure random sampling in differential privacy", 2021). Noise on whole numbers has neither, if its distribution is
exactly the stated one: that is what this file is about.

How a decision is exact. All randomness is fair bits, 64 at a time. A uniform number U in [0, 1) is known by its first
word W: `W <= 2^64 U < W + 1`. Whether U < exp(-x) for a rational x is decided in float64 where float64 can tell, and
otherwise with as many digits and as many further words of U as it takes. What float64 can tell, with u = 2^-53:

- x as computed is off by at most `u (2 sqrt(2 x) + 10 x)`: see `_acceptance`; `U / t` is off by u x.
- exp and log of any mathematical library in use are within 4 units in the last place; 2^-45, relative, is granted.
- For x <= 45 that makes exp(-x) right to `u (2 sqrt(90) + 450) + 2^-45 < 2^-43`, relative. Beyond 45 both the true
  value and the computed one are below 2^-64, and differ by less than 2^-63.
- W 2^-64 as computed is within `2^-53 U + 2^-64` of U.

So the order of the computed numbers is that of the true ones if they are further apart than
`_RELATIVE exp(-x) + _ABSOLUTE` = 2^-42 exp(-x) + 2^-62, which leaves a factor of two. One comparison in 10^12 is not.

The running time depends on what was drawn, as with every rejection sampler: whoever can time a client to the
microsecond learns about its noise (Jin, McMurtry, Rubinstein, Ohrimenko, "Are we there yet? Timing and floating-point
attacks on differential privacy systems", 2022).
"""

from __future__ import annotations

from collections.abc import Callable
from decimal import MAX_EMAX, MIN_EMIN, Context, Decimal
from fractions import Fraction
from math import isqrt
from typing import final

import numpy as np
from numpy.typing import NDArray

from privfm.checks import at_least, positive, require

Words = Callable[[int], NDArray[np.uint64]]
"""`count` -> so many words of 64 fair, independent bits."""

LARGEST_DEVIATION = 2**40
"""In steps. Beyond 64 bits lie proposals of 2^23 deviations only, which have a probability under exp(-2^22)."""

_RELATIVE, _ABSOLUTE = 2.0**-42, 2.0**-62
_NEAR = 2.0**-40  # of an integer: where the floor of a logarithm below 14 is in doubt (its error is below 2^-43)
_SHORT = np.uint64(2**44)  # words below this are logarithms above 13.8: the word's own 2^-64 counts there
_BLOCK = 2**15  # proposals at once: the work arrays stay in the second-level cache
_PROPOSALS = 2.2  # a sample: (1 - 1/e) of the proposals become Laplace, 0.76 of those Gaussian


def discrete_gaussian(count: int, variance: Fraction | float, words: Words) -> NDArray[np.int64]:
    """Independent samples with P(k) proportional to exp(-k^2 / (2 variance)) on all whole numbers, exactly.

    The variance of a sample is at most `variance` and equal to it within 1e-16 from a deviation of 1.5 on. A sample of
    mean zero added to whole numbers of sensitivity D is D^2 / (2 variance)-zCDP, as a Gaussian would be.

    Cost: 54 random bytes and about 0.2 microseconds a sample, whatever the variance.

    Args:
      count: how many.
      variance: in steps squared; a float stands for the rational number that it is.
      words: where the bits come from.

    Returns:
      `(count,)`.

    Raises:
      InvalidArgument: the variance is not above 0, or its root beyond `LARGEST_DEVIATION`.

    Source: Canonne, Kamath, Steinke, "The discrete Gaussian for differential privacy", 2020, algorithms 1 to 3
    (theorem 4 for the privacy). Algorithm 1 is replaced by the comparison above, and the geometric loop of algorithm
    2 by the same comparison for all its steps at once.
    """
    at_least("count", count, 0)
    positive("variance", float(variance))
    exact = Fraction(variance)
    require(
        exact <= LARGEST_DEVIATION**2,
        f"variance={float(variance):g}: expected a deviation up to {LARGEST_DEVIATION:g} steps; take a coarser grid",
    )
    samples = np.empty(count, np.int64)
    have = 0
    while have < count:
        proposals = min(_BLOCK, int((count - have) * _PROPOSALS) + 16)
        found = _gaussian_proposals(proposals, exact, words)[: count - have]
        samples[have : have + len(found)] = found
        have += len(found)
    return samples


def skellam(count: int, variance: float, words: Words) -> NDArray[np.int64]:
    """Differences of two Poisson samples of mean variance / 2 each: **neither exact nor secure**.

    NumPy's Poisson works in float64 and is fed from a PCG64 generator, which can be computed from its output. `words`
    give its seed only. For simulations; what is to protect somebody takes `discrete_gaussian`.

    Args:
      count: how many.
      variance: of a sample, in steps squared. Sums of samples are Skellam again, of the summed variance.
      words: where the seed comes from.

    Returns:
      `(count,)`.

    Source: Agarwal, Kairouz, Liu, "The Skellam mechanism for differentially private federated learning", 2021.
    """
    at_least("count", count, 0)
    positive("variance", variance)
    generator = np.random.Generator(np.random.PCG64([int(word) for word in words(4)]))
    return generator.poisson(variance / 2, count) - generator.poisson(variance / 2, count)


def _gaussian_proposals(count: int, variance: Fraction, words: Words) -> NDArray[np.int64]:
    """Algorithm 3: the discrete Laplace samples of scale t among `count` proposals that are accepted."""
    scale = isqrt(variance.numerator // variance.denominator) + 1  # floor of the deviation, plus 1
    laplace = _laplace_proposals(count, scale, words)
    magnitude = np.abs(laplace)
    rate, acceptance = _acceptance(magnitude, variance, scale)
    return laplace[_below_exponential(words(len(laplace)), rate, acceptance, words)]


def _acceptance(
    magnitude: NDArray[np.int64], variance: Fraction, scale: int
) -> tuple[NDArray[np.float64], Callable[[int], Fraction]]:
    """`x = (|Y| - v/t)^2 / (2 v)` in float64, and exactly for one index.

    With c = v/t <= sqrt v: |Y|, c and their difference are rounded, which makes the difference e off by at most
    `u (|Y| + c + e) <= u (2 c + 2 e)`; squaring doubles that, relative to e, and three more roundings add 3 u:
    `u (4 c + 4 e) e / (2 v) + 3 u x <= u (2 sqrt(2 x) + 4 x + 3 x)`.
    """
    centre = variance / scale
    offset = magnitude.astype(np.float64) - float(centre)

    def exactly(index: int) -> Fraction:
        return (int(magnitude[index]) - centre) ** 2 / (2 * variance)

    return offset * offset * float(1 / (2 * variance)), exactly


def _laplace_proposals(count: int, scale: int, words: Words) -> NDArray[np.int64]:
    """Algorithm 2 with s = 1: samples with P(k) proportional to exp(-|k| / scale), among `count` proposals."""
    drawn = words(count)
    negative, rest = (drawn & np.uint64(1)).astype(bool), drawn >> np.uint64(1)
    fair = rest < np.uint64(2**63 - 2**63 % scale)  # else the remainder would not be uniform
    negative, uniform = negative[fair], (rest[fair] % np.uint64(scale)).astype(np.int64)

    chosen = uniform  # kept with probability exp(-U / t)
    kept = _below_exponential(
        words(len(uniform)), uniform / float(scale), lambda index: Fraction(int(chosen[index]), scale), words
    )
    negative, uniform = negative[kept], uniform[kept]
    magnitude = uniform + scale * _geometric(words(len(uniform)), words)
    once = ~(negative & (magnitude == 0))  # zero has one sign only
    samples: NDArray[np.int64] = np.where(negative, -magnitude, magnitude)[once]
    return samples


def _below_exponential(
    drawn: NDArray[np.uint64], x: NDArray[np.float64], exactly: Callable[[int], Fraction], words: Words
) -> NDArray[np.bool_]:
    """Whether the uniform number that begins with each word is below exp(-x).

    Args:
      drawn: `(n,)`, first words.
      x: `(n,)`, at least 0, as exact as the module says.
      exactly: index -> that x.
      words: for the digits that follow.
    """
    uniform, chance = drawn * 2.0**-64, np.exp(-x)
    distance = uniform - chance
    below = distance < 0
    for index in np.flatnonzero(np.abs(distance) <= _RELATIVE * chance + _ABSOLUTE):
        below[index] = _Uniform(int(drawn[index]), words).below_exponential(exactly(int(index)))
    return below


def _geometric(drawn: NDArray[np.uint64], words: Words) -> NDArray[np.int64]:
    """Largest k with U < exp(-k) for the uniform number U that begins with each word: P(at least k) = exp(-k)."""
    short = drawn < _SHORT
    logarithm = -np.log(np.where(short, _SHORT, drawn) * 2.0**-64)
    nearest = np.rint(logarithm)
    doubtful = short | ((np.abs(logarithm - nearest) <= _NEAR) & (nearest >= 1))
    result = np.floor(logarithm).astype(np.int64)
    for index in np.flatnonzero(doubtful):
        uniform, k = _Uniform(int(drawn[index]), words), 0
        while uniform.below_exponential(Fraction(k + 1)):
            k += 1
        result[index] = k
    return result


@final
class _Uniform:
    """A uniform number in [0, 1) of which as many binary digits are drawn as are asked for.

    Args:
      word: its first 64 digits.
      words: gives the others.
    """

    def __init__(self, word: int, words: Words) -> None:
        self._digits, self._count, self._words = word, 1, words  # U lies in [digits, digits + 1) 2^(-64 count)

    def below_exponential(self, x: Fraction) -> bool:
        """Whether U < exp(-x), x >= 0. Ends with probability 1: exp(-x) is irrational unless x = 0."""
        if x == 0:
            return True
        while True:
            least, most = _scaled_exponential(x, self._count)
            if self._digits + 1 <= least:
                return True
            if self._digits >= most:
                return False
            self._digits = (self._digits << 64) + int(self._words(1)[0])
            self._count += 1


def _scaled_exponential(x: Fraction, count: int) -> tuple[Decimal, Decimal]:
    """Bounds of `2^(64 count) exp(-x)`.

    `Context.divide`, `exp` and `multiply` are correctly rounded: each is off by 5 10^-digits at most, relative. In x
    that moves exp(-x) by x times as much; all together stays below half of `error`.
    """
    digits = 20 * count + 20
    context = Context(prec=digits, Emin=MIN_EMIN, Emax=MAX_EMAX)  # operators would round in the thread's own context
    rate = context.divide(Decimal(x.numerator), Decimal(x.denominator))
    value = context.multiply(context.exp(rate.copy_negate()), Decimal(2 ** (64 * count)))
    relative = context.scaleb(context.add(rate, Decimal(10)), Decimal(1 - digits))
    error = context.multiply(value, relative)
    return context.subtract(value, error), context.add(value, error)
