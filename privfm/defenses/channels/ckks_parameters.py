"""Which ring CKKS runs in, proved from the number of clients and the resolution, before anything is encrypted."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, log2, sqrt
from typing import final

from privfm.checks import InvalidArgument, at_least, require

LARGEST_MODULUS = {2048: 54, 4096: 109, 8192: 218}
"""Bits of all primes together, by ring degree, for 128-bit security against classical computers with a ternary secret.

Source: Homomorphic Encryption Security Standard, 2018, table 1. Not a post-quantum claim.
"""

SPECIAL_PRIME = 20
"""Bits of the prime that only keys carry. A fresh ciphertext is made under all primes and divided by this one, which
leaves rounding as its only noise once the prime is far above the noise of the public key (8 bits)."""

MARGIN = 64.0
"""Half a step of the grid, in standard deviations of the noise of a full sum."""

LARGEST_SUM = 44
"""Bits of a sum in steps. Encoding and decoding run in double precision (53 bits), with a few bits lost to the FFT."""

_PRIME_BITS = range(30, 61)  # SEAL stops at 60; from 30 on the largest prime lies within 1/256 below its power of two
_PRIME_GAP = 1 / 128  # of two such primes together
_OWN = 2  # encryptions of zero: the server's and the key holder's, to which the clients' are added


@final
@dataclass(frozen=True)
class CKKSParameters:
    """A ring in which a sum of whole numbers neither wraps nor drowns.

    A value v in [-1, 1] is sent as the whole number trunc(2^bits v) of *steps*, spread over a ciphertext at `scale`.

    - Head-room: a coefficient of the sum is at most clients * scale < q / 2, for every input (a constant vector
      attains it), q being the product of the data primes.
    - Resolution: rounding after decryption gives the whole numbers back, as noise reaches half a step only at
      `MARGIN` standard deviations.

    Attributes:
      degree: n of the ring; n/2 numbers fit one ciphertext.
      data_primes: bits of the primes under which ciphertexts travel.
      scale: of the encoding.
      clients: most clients in a sum.
      bits: of resolution.

    Raises:
      InvalidArgument: under 128 bits of security, no head-room, or no resolution.
    """

    degree: int
    data_primes: tuple[int, ...]
    scale: float
    clients: int
    bits: int

    def __post_init__(self) -> None:
        _check(self.clients, self.bits)
        require(
            self.degree in LARGEST_MODULUS and sum(self.chain) <= LARGEST_MODULUS[self.degree],
            f"degree={self.degree}, chain={list(self.chain)}: expected at most {LARGEST_MODULUS} bits for 128-bit "
            "security; take `CKKSParameters.smallest`",
        )
        allowed = all(bits in _PRIME_BITS for bits in self.data_primes)
        require(allowed, f"data_primes={self.data_primes}: expected {_PRIME_BITS.start} to {_PRIME_BITS.stop - 1} bits")
        needed = data_bits(self.scale, self.clients)
        require(
            sum(self.data_primes) >= needed,
            f"data_primes={self.data_primes} leave no head-room: a sum of clients={self.clients} at scale="
            f"2^{log2(self.scale):.2f} needs {needed} bits; allow fewer clients or add bits",
        )
        require(
            self.scale >= lowest_scale(self.degree, self.clients, self.bits),
            f"scale=2^{log2(self.scale):.2f} drowns bits={self.bits} in the noise of {self.clients} clients; raise it",
        )

    @classmethod
    def smallest(cls, clients: int, bits: int) -> CKKSParameters:
        """The parameters that cost the fewest bytes.

        Raises:
          InvalidArgument: no ring of the table holds such a sum.
        """
        _check(clients, bits)
        for degree, limit in LARGEST_MODULUS.items():
            scale = lowest_scale(degree, clients, bits)
            total = max(data_bits(scale, clients), _PRIME_BITS.start)
            count = ceil(total / (_PRIME_BITS.stop - 1))
            primes = tuple((total + i) // count for i in range(count))  # split evenly, adds up to the total
            if total + SPECIAL_PRIME <= limit:
                return cls(degree, primes, scale, clients, bits)
        raise InvalidArgument(f"clients={clients}, bits={bits}: no ring up to {degree} holds this sum; lower bits")

    @property
    def chain(self) -> tuple[int, ...]:
        """Bits of all primes, the special one last."""
        return (*self.data_primes, SPECIAL_PRIME)

    @property
    def slots(self) -> int:
        """Numbers in one ciphertext."""
        return self.degree // 2


def noise_deviation(degree: int, ciphertexts: int) -> float:
    """Standard deviation of one number in a sum of fresh ciphertexts, at scale 1.

    Rounding adds an error of variance 1/12 to each coefficient of c0, of c1 (multiplied by the secret, whose n
    coefficients have variance 2/3) and of the plaintext; a number is a sum of n coefficients times the cosines of n
    angles, whose squares add up to n/2.

    Source: derived from `Encryptor::encrypt_zero_internal` of SEAL 4; measured within 2 % for each degree.
    """
    coefficient = (2 + degree * 2 / 3) / 12
    return sqrt(ciphertexts * degree / 2 * coefficient)


def lowest_scale(degree: int, clients: int, bits: int) -> float:
    """The scale at which half a step is `MARGIN` standard deviations of the noise of a full sum."""
    return 2.0**bits * 2 * MARGIN * noise_deviation(degree, clients + _OWN)


def data_bits(scale: float, clients: int) -> int:
    """Bits of the data primes for which `clients * scale` stays below half their product."""
    return ceil(log2(2 * clients * scale / (1 - _PRIME_GAP)))


def _check(clients: int, bits: int) -> None:
    at_least("clients", clients, 1)
    at_least("bits", bits, 1)
    require(
        bits + log2(clients) <= LARGEST_SUM,
        f"bits={bits}, clients={clients}: expected bits + log2(clients) <= {LARGEST_SUM}, "
        "what double precision still resolves; lower bits",
    )
