"""Ring learning with errors: the ring, its exact product, and the three kinds of random polynomials.

The ring is Z_q[X]/(X^2048 + 1). A *sample* of a key s is `a s + e` for a public uniform a and a small error e. Samples
look uniform to whoever lacks s, and they add: `a s + a s' = a (s + s')`.
"""

from __future__ import annotations

import os
from functools import lru_cache
from hashlib import shake_128
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from privfm.checks import at_least, require

DEGREE: Final = 2048
"""Coefficients of a polynomial. 1024 would be refused: see `rlwe_security`."""

MODULUS: Final = 2_147_389_441
"""q: the largest prime below 2^31 with q = 1 modulo 4096.

Below 2^32, so that a residue travels in 4 bytes; q = 1 modulo 2 * 2048, so that X^2048 + 1 splits into linear factors:
the case for which the decision problem is as hard as the search problem (Lyubashevsky, Peikert, Regev, 2010)."""

FLIPS: Final = 21
"""Coin flips a side of the centred binomial error: deviation sqrt(21 / 2) = 3.24, the least multiple of the customary
3.2 (HomomorphicEncryption.org, "Homomorphic encryption standard", 2018) that whole flips give. Also its largest
absolute value: an error of 22 does not exist, which is what makes exact sums provable."""

LARGEST_KEY: Final = 4096
"""Largest absolute coefficient of a key for which `product` is proved exact."""

_LIMB = 16  # bits; 31-bit residues in two halves, so that float64 keeps every bit of their products
_ROWS = 32  # polynomials a step: two limbs of them are 1 MB of complex numbers and stay in the second-level cache
_CHUNK = 1 << 18  # errors a step


def ternary(length: int) -> NDArray[np.int8]:
    """A secret key `(length,)`: -1, 0 and 1, each with probability 1/3, from the operating system's generator.

    A byte of 255 is thrown away: the other 255 values are 85 of each remainder, so nothing is biased.
    """
    at_least("length", length, 1)
    kept = np.empty(0, np.uint8)
    while len(kept) < length:
        drawn = np.frombuffer(os.urandom(length + 64), np.uint8)
        kept = np.concatenate([kept, drawn[drawn < 255]])
    return (kept[:length] % 3).astype(np.int8) - np.int8(1)


def centred_binomial(length: int) -> NDArray[np.int8]:
    """Errors `(length,)`: `FLIPS` fair coins minus `FLIPS` others, so |e| <= 21 and the variance is 10.5.

    The coins are a ChaCha20 stream under a fresh key of the operating system's generator; key and stream are forgotten.

    Cost: 8 bytes of stream an error; 5 ms for a million.

    Source: Alkim, Ducas, Pöppelmann, Schwabe, "Post-quantum key exchange: a new hope", 2016, section 4.
    """
    from cryptography.hazmat.primitives.ciphers import Cipher
    from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

    at_least("length", length, 0)
    stream = Cipher(ChaCha20(os.urandom(32), bytes(16)), mode=None).encryptor()
    errors = np.empty(length, np.int8)
    side, shift = np.uint64(2**FLIPS - 1), np.uint64(FLIPS)
    for at in range(0, length, _CHUNK):
        part = errors[at : at + _CHUNK]
        words = np.frombuffer(stream.update(bytes(8 * len(part))), np.uint64)
        heads, tails = np.bitwise_count(words & side), np.bitwise_count(words >> shift & side)
        part[:] = heads.astype(np.int8) - tails.astype(np.int8)
    return errors


def uniform(seed: bytes, length: int) -> NDArray[np.uint32]:
    """Public residues `(length,)`, uniform modulo q: the same for everybody who knows `seed`.

    SHAKE-128 is cut into words of 31 bits and words of q or more are skipped (one in 23,000): a remainder modulo q
    would make the residues under 2^31 - q twice as likely. A longer `length` begins with the shorter.

    Cost: 15 ms for a million.

    Source: as the matrix of ML-KEM, FIPS 203, algorithm 7 (SampleNTT).
    """
    at_least("length", length, 0)
    drawn = length + length // 4096 + 64
    while True:
        words = np.frombuffer(shake_128(seed).digest(4 * drawn), "<u4") & np.uint32(2**31 - 1)
        kept = words[words < MODULUS]
        if len(kept) >= length:
            return kept[:length].astype(np.uint32)
        drawn *= 2


def product(polynomials: NDArray[Any], key: NDArray[Any]) -> NDArray[np.int64]:
    """Products with one small polynomial, exact over the integers: `(m, 2048), (2048,) -> (m, 2048)`.

    Coefficients stay below 2^54 and are not reduced modulo q, so that the caller reduces once, after adding.

    The negacyclic convolution is one complex transform of half the length: with w = exp(i pi / n), the polynomial p
    has at w^(4k+1) the value `sum_j (p_j + i p_{j+n/2}) w^j exp(2 i pi j k / (n/2))`, because w^(n/2) is i. Each
    residue is cut into two limbs of at most 2^15, and rounding each limb's product to whole numbers is exact.

    Proof: with unit roundoff u = 2^-53 a transform of length 1024 has a relative L2 error of at most
    10 (u + 4 sqrt(2) u), about 67 u (Higham, "Accuracy and stability of numerical algorithms", 2002, theorem 24.2;
    larger radices round less); twisting adds 4 u and multiplying 3 u; two transforms forward, one back, the twists
    and the product make 216 u. It multiplies at most `2^15 sqrt(2048)` (a limb's L2 norm) times
    `1024 sqrt(2) |key|` (the largest value of the key's transform): in sum 5.2e-5 |key|, under 1/2 for |key| up to
    4096, and in practice (1.5e-4 at most seen there) a thousand times smaller.

    Cost: 28 ms for 489 polynomials (a million coefficients); one float64 matrix product, exact as well, takes 55 ms, a
    radix-2 number-theoretic transform in numpy 90.

    Args:
      polynomials: residues modulo q, `(m, 2048)`.
      key: whole numbers of absolute value at most 4096, `(2048,)`.

    Raises:
      InvalidArgument: a residue or a coefficient of the key is out of range.
    """
    require(
        polynomials.shape[1:] == key.shape == (DEGREE,), f"shapes {polynomials.shape} and {key.shape}: expected 2048"
    )
    largest = int(np.abs(key.astype(np.int64)).max())
    require(largest <= LARGEST_KEY, f"a key of absolute value {largest}: exact up to {LARGEST_KEY}; sum fewer clients")
    in_range = not polynomials.size or (int(polynomials.min()) >= 0 and int(polynomials.max()) < MODULUS)
    require(in_range, f"polynomials: expected residues from 0 to {MODULUS - 1}")
    whole = np.empty(polynomials.shape, np.int64)
    transform = np.fft.fft(_folded(key[None]))
    for at in range(0, len(polynomials), _ROWS):
        rows = polynomials[at : at + _ROWS].astype(np.int64)
        high = (rows + (1 << _LIMB - 1)) >> _LIMB
        high_part, low_part = (_multiplied(limb, transform) for limb in (high, rows - (high << _LIMB)))
        np.add(high_part << _LIMB, low_part, out=whole[at : at + _ROWS])
    return whole


@lru_cache(maxsize=1)
def _twist() -> NDArray[np.complex128]:
    """exp(i pi j / 2048), j = 0 .. 1023."""
    angles = np.pi / DEGREE * np.arange(DEGREE // 2)
    twist: NDArray[np.complex128] = np.cos(angles) + 1j * np.sin(angles)
    twist.flags.writeable = False
    return twist


def _folded(rows: NDArray[Any]) -> NDArray[np.complex128]:
    """`(m, 2048)` real -> `(m, 1024)` complex, twisted."""
    folded = np.empty((len(rows), DEGREE // 2), np.complex128)
    folded.real, folded.imag = rows[:, : DEGREE // 2], rows[:, DEGREE // 2 :]
    folded *= _twist()
    return folded


def _multiplied(limb: NDArray[np.int64], transform: NDArray[np.complex128]) -> NDArray[np.int64]:
    values = _folded(limb)
    np.fft.fft(values, out=values)
    values *= transform
    np.fft.ifft(values, out=values)
    values *= _twist().conj()
    whole = np.empty(limb.shape, np.int64)
    for part, half in ((values.real, slice(None, DEGREE // 2)), (values.imag, slice(DEGREE // 2, None))):
        whole[:, half] = np.rint(part)
    return whole
