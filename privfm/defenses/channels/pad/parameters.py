"""How whole numbers lie in a padded row: how far apart, with what head-room, and what is left without the pad."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import Any, Final, final

import numpy as np
from numpy.typing import NDArray

from privfm.checks import RoundFailed, at_least, require
from privfm.defenses.channels.pad.rlwe import DEGREE, FLIPS, LARGEST_KEY, MODULUS, centred_binomial, product, uniform

CANARIES: Final = 8
"""Known numbers after the row. A sum of n rows opened with a wrong key passes them with probability
((42 n + 1) / q)^8: under 2^-120 for up to 1000 clients."""

WORD: Final = np.dtype("<u4")
"""A residue on the wire."""

_HALF: Final = (MODULUS - 1) // 2

Whole = NDArray[np.int64]


def most_bits(clients: int, *, approximate: bool = False) -> int:
    """The finest resolution that sums of so many clients have room for.

    K numbers D m and their errors, of at most 21 K together, stay under q/2. Exact sums need D = 42 K + 1, so that
    rounding removes any error, and lose two bits with each doubling of K; approximate ones do with D = 1, and lose one.

    >>> [most_bits(clients) for clients in (2, 10, 50, 100, 200)]
    [22, 17, 13, 11, 9]
    >>> [most_bits(clients, approximate=True) for clients in (2, 10, 50, 100, 200)]
    [28, 26, 24, 23, 22]
    """
    at_least("clients", clients, 1)
    require(clients <= LARGEST_KEY, f"clients={clients}: key sums are exact up to {LARGEST_KEY} clients")
    apart = 1 if approximate else 2 * FLIPS * clients + 1
    return ((_HALF // clients - FLIPS) // apart).bit_length() - 1


@final
@dataclass(frozen=True)
class PadParameters:
    """Whole numbers m with |m| <= 2^bits as `a s + e + D m` modulo q.

    Head-room has no tail: errors are at most 21, so K rows stay within `K (D 2^bits + 21) <= (q - 1) / 2`, always.

    Attributes:
      clients: K, most rows in a sum.
      bits: of a number.
      approximate: D may be so small that errors remain.

    Raises:
      InvalidArgument: there is no room for so many bits.
    """

    clients: int
    bits: int
    approximate: bool = False

    def __post_init__(self) -> None:
        at_least("bits", self.bits, 0)
        most = most_bits(self.clients, approximate=self.approximate)
        require(
            self.bits <= most,
            f"bits={self.bits}: sums of {self.clients} clients have room for {most}; lower bits"
            + ("" if self.approximate else ", or take approximate=True"),
        )

    @property
    def factor(self) -> int:
        """D, the largest there is room for."""
        return (_HALF // self.clients - FLIPS) >> self.bits

    @property
    def levels(self) -> int:
        """Different values a number of a row can take."""
        return (2 << self.bits) + 1

    def error_bound(self, n: int) -> int:
        """Largest absolute error of a number in the sum of n rows: 21 n errors, divided by D and rounded."""
        return (2 * FLIPS * n + self.factor) // (2 * self.factor)

    def deviation(self, n: int) -> float:
        """Standard deviation of that error, before rounding to whole numbers; 0 where the bound is 0."""
        return sqrt(n * FLIPS / 2) / self.factor if self.error_bound(n) else 0.0

    def padded(self, numbers: Whole, key: NDArray[np.int8], seed: bytes) -> bytes:
        """One row `(w,)` and its canaries under a pad: w + 8 words. The errors are drawn here and forgotten.

        Args:
          numbers: at most 2^bits in absolute value.
          key: ternary, of 2048 numbers, for this one row.
          seed: of the public polynomials.
        """
        values = pads(seed, key, len(numbers) + CANARIES)
        values += centred_binomial(len(values))
        values[: len(numbers)] += self.factor * numbers
        values[len(numbers) :] += self.factor << self.bits
        values %= MODULUS
        return values.astype(WORD).tobytes()

    def opened(self, padded: NDArray[np.uint64], key: Whole, seed: bytes, n: int) -> Whole:
        """Takes the pads off a sum of n rows and their canaries -> the sum of the rows `(w,)`.

        Args:
          padded: `(w + 8,)`, any number of times q too large.
          key: the sum of the n keys.
          seed: as the clients had it.
          n: rows in the sum.

        Raises:
          RoundFailed: these pads do not belong to this key, or a client sent what no row is.
        """
        sound = np.abs(key).max() <= n
        values = padded.astype(np.int64) - pads(seed, key if sound else 0 * key, len(padded))
        values = (values + _HALF) % MODULUS - _HALF
        rounded: Whole = (values + self.factor // 2) // self.factor
        sound &= np.abs(values[-CANARIES:] - (n * self.factor << self.bits)).max() <= FLIPS * n
        sound &= np.abs(rounded[:-CANARIES]).max(initial=0) <= (n << self.bits) + self.error_bound(n)
        if not self.approximate:
            sound &= np.abs(values - self.factor * rounded).max() <= FLIPS * n
        if not sound:
            raise RoundFailed(f"what is left is no sum of {n} rows: a wrong key sum, or one of them is malicious")
        return rounded[:-CANARIES]


def pads(seed: bytes, key: NDArray[Any], length: int) -> Whole:
    """`a s` over the integers, `(length,)`: for as many polynomials a as that takes."""
    polynomials = uniform(seed, -(-length // DEGREE) * DEGREE).reshape(-1, DEGREE)
    return product(polynomials, key).reshape(-1)[:length]
