"""Which ring BFV runs in, proved from the number of clients and the range of a value, before anything is encrypted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import islice
from math import log2, prod
from typing import final

import numpy as np

from privfm.checks import InvalidArgument, at_least, require
from privfm.defenses.channels.ckks.parameters import LARGEST_MODULUS, SPECIAL_PRIME

LARGEST_SUM = 53
"""Bits of a sum: whole numbers that float64 holds. Sums are handed on as float64."""

_LARGEST_ERROR = 21  # SEAL's errors are centred binomial: 21 random bits minus 21 others
_OWN = 2  # encryptions of zero: the server's and the key holder's, to which the clients' are added
_RESERVE = 2**50  # SEAL decrypts through one auxiliary prime of 61 bits and so loses under 2^-50 of the room
_WHOLE_BYTES = 32  # bits of the smallest prime: ciphertexts are compressed by bytes, 28 bits cost more than 32
_LARGEST_PRIME = 60  # bits; SEAL's limit
_WITNESSES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)  # enough below 3.1e23: Sorenson, Webster, 2015
# Bytes of a parameter by the bits of one prime: both polynomials of a full ciphertext, as TenSEAL 0.3.18 writes it.
_MEASURED = {32: 8.3, 33: 9.9, 36: 11.3, 40: 12.0, 44: 13.3, 48: 13.7, 52: 14.9, 56: 15.1, 60: 16.0}


@final
@dataclass(frozen=True)
class BFVParameters:
    """A ring in which a sum of whole numbers |q| <= 2^bits neither wraps nor is decrypted wrongly.

    - Head-room: `clients * (2^bits + 1) <= (t - 1) / 2` for the plain modulus t, a prime. The one level a client
      that is left over lies between the largest sum and its wrap, where a check of the range sees it.
    - Decryption: the noise of `clients` fresh encryptions, of two more of our own and of one plaintext addition (the
      blinding) stays below q / (2t) for *every* outcome of SEAL's generator, q being the product of the data primes.
      So the probability of a wrong number is zero for ciphertexts that SEAL may produce, not merely below 2^-40, and
      clients that choose their own encryption randomness within SEAL's range cannot provoke one either.

    Slots: t = 1 modulo 2n, which gives n numbers a ciphertext.

    Attributes:
      degree: n of the ring.
      data_primes: bits of the primes under which ciphertexts travel; each is the largest prime of its kind.
      plain_modulus: t; sums are computed modulo it.
      clients: most clients in a sum.
      bits: of the largest absolute value of one number of one client.

    Raises:
      InvalidArgument: under 128 bits of security, no head-room, or too much noise.

    Source: Fan, Vercauteren, "Somewhat practical fully homomorphic encryption", 2012 (the scheme); `noise_bound`.
    """

    degree: int
    data_primes: tuple[int, ...]
    plain_modulus: int
    clients: int
    bits: int

    def __post_init__(self) -> None:
        _check(self.clients, self.bits)
        require(
            self.degree in LARGEST_MODULUS and sum(self.chain) <= LARGEST_MODULUS[self.degree],
            f"degree={self.degree}, chain={list(self.chain)}: expected at most {LARGEST_MODULUS} bits for 128-bit "
            "security; take `BFVParameters.smallest`",
        )
        usable = all(_WHOLE_BYTES <= bits <= _LARGEST_PRIME for bits in self.data_primes) and len(self.data_primes) > 0
        expected = f"expected one or more of {_WHOLE_BYTES} to {_LARGEST_PRIME} bits"
        require(usable, f"data_primes={self.data_primes}: {expected}")
        t = self.plain_modulus
        batching = t % (2 * self.degree) == 1 and is_prime(t) and t not in coefficient_primes(self.degree, self.chain)
        require(
            batching, f"plain_modulus={t}: expected a prime that is 1 modulo {2 * self.degree} and not in the chain"
        )
        require(
            largest_sum(self.clients, self.bits) <= t // 2,
            f"plain_modulus={t} leaves no head-room: a sum of clients={self.clients} at bits={self.bits} needs more "
            f"than {2 * largest_sum(self.clients, self.bits)}; allow fewer clients or lower bits",
        )
        require(
            _decrypts(self.degree, self.modulus, t, self.clients),
            f"data_primes={self.data_primes} drown plain_modulus={t} in the noise of {self.clients} clients; add bits",
        )

    @classmethod
    def smallest(cls, clients: int, bits: int) -> BFVParameters:
        """The parameters that cost the fewest bytes: the smallest ring that holds the smallest plain modulus.

        Raises:
          InvalidArgument: no ring of the table holds such a sum.
        """
        _check(clients, bits)
        for degree, limit in LARGEST_MODULUS.items():
            for primes in _chains(limit - SPECIAL_PRIME):
                chain = coefficient_primes(degree, (*primes, SPECIAL_PRIME))
                t = _plain_modulus(degree, 2 * largest_sum(clients, bits), chain)
                if _decrypts(degree, prod(chain[:-1]), t, clients):
                    return cls(degree, primes, t, clients, bits)
        raise InvalidArgument(
            f"clients={clients}, bits={bits}: no ring up to {max(LARGEST_MODULUS)} holds this sum; lower bits"
        )

    @property
    def chain(self) -> tuple[int, ...]:
        """Bits of all primes, the special one last: only keys carry it."""
        return (*self.data_primes, SPECIAL_PRIME)

    @property
    def modulus(self) -> int:
        """q, the product of the primes under which ciphertexts travel."""
        return prod(coefficient_primes(self.degree, self.chain)[:-1])

    @property
    def slots(self) -> int:
        """Numbers in one ciphertext."""
        return self.degree

    @property
    def levels(self) -> int:
        """Different whole numbers that each of `clients` clients may send; at least 2^(bits + 1) + 1."""
        return levels(self.plain_modulus, self.clients)

    @property
    def bytes_a_parameter(self) -> float:
        """Of one client's message, when its ciphertexts are full; measured, within 4 %."""
        return sum(float(np.interp(bits, list(_MEASURED), list(_MEASURED.values()))) for bits in self.data_primes)


def noise_bound(degree: int, clients: int) -> Fraction:
    """Largest absolute coefficient of the noise in a sum, whatever SEAL draws, in units of 1 modulo q.

    One fresh encryption under a public key is made modulo q p and divided by the special prime p. Before, its noise
    is `e0 + e1 s - e u`: errors e of at most 21, secret s and u of coefficients -1, 0, 1, and a product of two
    polynomials of n coefficients sums n terms, so at most 21 (2n + 1). Division by p leaves that over p, and a rounding
    error of 1/2 in each coefficient of c0 and of c1, the latter multiplied by s: (n + 1) / 2. Rounding q m / t to
    whole numbers adds less than 1, for the message as for a plaintext that is added.

    Args:
      degree: n.
      clients: in the sum, to which the two encryptions of zero that a server and a key holder start from are added.

    Source: derived in the infinity norm from `Encryptor::encrypt_zero_internal` and
    `multiply_add_plain_with_scaling_variant` of SEAL 4; measured noise lies 4 to 9 bits below it.
    """
    (special,) = coefficient_primes(degree, (SPECIAL_PRIME,))
    fresh = Fraction(_LARGEST_ERROR * (2 * degree + 1), special) + Fraction(degree + 1, 2) + 1
    return (clients + _OWN) * fresh + 1


def largest_sum(clients: int, bits: int) -> int:
    """What half the plain modulus must hold: the largest sum, and one level a client between it and the wrap."""
    return clients * ((1 << bits) + 1)


def levels(plain_modulus: int, clients: int) -> int:
    """Different whole numbers, centred on zero, that each client may send under a plain modulus.

    >>> levels(1032193, 200), levels(12289, 200)
    (5159, 59)
    """
    return 2 * (plain_modulus // 2 // clients - 1) + 1


@lru_cache(maxsize=64)
def coefficient_primes(degree: int, chain: tuple[int, ...]) -> tuple[int, ...]:
    """The primes that SEAL takes for a chain of bits: per size the largest that are 1 modulo 2n, the smallest first.

    Source: `CoeffModulus::Create` of SEAL 4 takes the same ones (compared in the tests).
    """
    pools = {bits: list(islice(_primes_below(degree, bits), chain.count(bits))) for bits in set(chain)}
    return tuple(pools[bits].pop() for bits in chain)


def is_prime(number: int) -> bool:
    """Miller and Rabin's test, exact below 3.1e23.

    Source: Sorenson, Webster, "Strong pseudoprimes to twelve prime bases", 2015.
    """
    if number < 2 or any(number % witness == 0 for witness in _WITNESSES):
        return number in _WITNESSES
    odd, twos = number - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    return all(_passes(number, odd, twos, witness) for witness in _WITNESSES)


def _passes(number: int, odd: int, twos: int, witness: int) -> bool:
    power = pow(witness, odd, number)
    if power in (1, number - 1):
        return True
    for _ in range(twos - 1):
        power = power * power % number
        if power == number - 1:
            return True
    return False


def _primes_below(degree: int, bits: int) -> Iterator[int]:
    step = 2 * degree
    return (number for number in range((1 << bits) - step + 1, 1 << (bits - 1), -step) if is_prime(number))


@lru_cache(maxsize=256)
def _plain_modulus(degree: int, above: int, taken: tuple[int, ...]) -> int:
    """The smallest prime above `above` with n slots. SEAL refuses one that is also a coefficient prime."""
    step = 2 * degree
    first = (above // step + 1) * step + 1
    numbers = (number for number in range(first, first << 20, step) if is_prime(number) and number not in taken)
    return next(islice(numbers, 1))


def _chains(largest: int) -> Iterator[tuple[int, ...]]:
    """Data primes, cheapest first: one of 32 to 60 bits, then 32 bits, where every byte is full, and the rest."""
    whole, last = _WHOLE_BYTES, _LARGEST_PRIME
    yield from ((bits,) for bits in range(whole, min(largest, last) + 1))
    yield from ((whole, bits) for bits in range(whole, min(largest - whole, last) + 1))


def _decrypts(degree: int, modulus: int, plain_modulus: int, clients: int) -> bool:
    return 2 * plain_modulus * noise_bound(degree, clients) * (_RESERVE + 1) < modulus * _RESERVE


def _check(clients: int, bits: int) -> None:
    at_least("clients", clients, 1)
    at_least("bits", bits, 0)
    require(
        bits + log2(clients) <= LARGEST_SUM,
        f"bits={bits}, clients={clients}: expected bits + log2(clients) <= {LARGEST_SUM}, the whole numbers that "
        "float64 holds; lower bits",
    )
