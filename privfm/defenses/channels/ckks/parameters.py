"""Which ring CKKS runs in, proved from the number of clients and what a sum must resolve, before anything is encrypted.

    CKKSParameters.smallest(clients, bits)                                     sums that are exact on a grid
    CKKSParameters.cheapest(clients, error, depth=0, release="clients")        sums within an error
    CKKSParameters.cheapest(clients, error, depth=0, release="public")         the same, and room for flooding
    CKKSParameters.cheapest(clients, error, depth=1, release="clients")        sums, or one product of ciphertexts

The bound B of a coordinate is not asked for: rows are divided by it before they are encoded, so everything here is
relative to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations_with_replacement
from math import ceil, hypot, log, log2, prod, sqrt
from typing import Literal, final

from privfm.checks import InvalidArgument, at_least, one_of, positive, require

Release = Literal["public", "clients"]
"""Who sees a decrypted sum. `public`: everybody, the server too, who also holds every ciphertext of the round.
`clients`: the clients alone; the server never sees the model."""

LARGEST_MODULUS = {2048: 54, 4096: 109, 8192: 218}
"""Bits of all primes together, by ring degree, for 128-bit security against classical computers with a ternary secret.

Source: Homomorphic Encryption Security Standard, 2018, table 1. Not a post-quantum claim.
"""

SPECIAL_PRIME = 20
"""Bits of the prime that only keys carry. A fresh ciphertext is made under all primes and divided by this one, which
leaves rounding as its only noise once the prime is far above the noise of the public key (8 bits)."""

MARGIN = 32.0
"""Half a step of the grid, in standard deviations of the noise of a full sum: never exceeded (probability e^-512)."""

LARGEST_SUM = 44
"""Bits of a sum in steps. Encoding and decoding run in double precision (53 bits), with a few bits lost to the FFT."""

LARGEST_WIDTH = 2**22
"""Numbers of a vector for which a wanted error is promised."""

STATISTICAL_BITS = 40
"""Of flooding: an adversary's advantage from what decryptions show is at most about 2^-40."""

_FAILURE = 2.0**-20  # probability with which one of LARGEST_WIDTH numbers may exceed the largest error
_PREFERRED = 4096  # among rings of as many bytes: a tenth faster than 2048, and far from the limit of security
_ROUNDING = 2.0**-50  # of numbers of absolute value 1, encoded and decoded in double precision; measured 2^-50.9
_DECODING = 2.0**-51  # the part of it which comes after the noise of encryption; measured 2^-51.4
_LONGEST_NOISE = 2.0  # L2 norm of a ciphertext's noise over its expectation; see `flooding_deviation`
_PRIME_BITS = range(30, 61)  # SEAL stops at 60; from 30 on the largest prime lies within 1/256 below its power of two
_PRIME_GAP = 1 / 256
_OWN = 2  # encryptions of zero: the server's and the key holder's, to which the clients' are added
_WHOLE_BYTES = (32, 40, 48, 56, 60)  # a coefficient takes whole bytes on the wire, and a prime at most 60 bits
_PRODUCT_CHAINS = {1: (((60, 60), 60, 50),), 2: (((60, 40, 40), 60, 40), ((60, 50, 50), 58, 50))}
"""By depth: data primes, special prime, log2 of the scale."""


@final
@dataclass(frozen=True)
class CKKSParameters:
    """A ring in which a sum of rows neither wraps nor drowns.

    A coordinate, divided by its bound, is a value v in [-1, 1]; it is encoded as v times `scale`, in a coefficient of
    the polynomial that is encrypted. Where sums must be exact it is a whole number of *steps* of 2^-bits.

    - Head-room: a coefficient of the sum is at most clients * scale < q / 2, for every input (rows at the bound attain
      it), q being the product of the data primes.
    - Resolution, with a grid: rounding after decryption gives the whole numbers back, as noise reaches half a step
      only at `MARGIN` standard deviations.

    Attributes:
      degree: n of the ring; n numbers fit one ciphertext.
      data_primes: bits of the primes under which ciphertexts travel.
      scale: of the encoding.
      clients: most clients in a sum.
      bits: of resolution of an exact grid; 0: there is none.
      special_prime: bits of the prime that only keys carry.
      depth: products one after the other that ciphertexts stand, with ciphertexts or plaintexts; each uses up a prime.

    Raises:
      InvalidArgument: under 128 bits of security, no head-room, or no resolution.
    """

    degree: int
    data_primes: tuple[int, ...]
    scale: float
    clients: int
    bits: int = 0
    special_prime: int = SPECIAL_PRIME
    depth: int = 0

    def __post_init__(self) -> None:
        _check(self.clients, self.bits)
        positive("scale", self.scale)
        at_least("special_prime", self.special_prime, SPECIAL_PRIME)
        require(
            self.degree in LARGEST_MODULUS and sum(self.chain) <= LARGEST_MODULUS[self.degree],
            f"degree={self.degree}, chain={list(self.chain)}: expected at most {LARGEST_MODULUS} bits for 128-bit "
            "security; take `CKKSParameters.smallest` or `cheapest`",
        )
        allowed = all(bits in _PRIME_BITS for bits in self.data_primes)
        require(allowed, f"data_primes={self.data_primes}: expected {_PRIME_BITS.start} to {_PRIME_BITS.stop - 1} bits")
        spent = 0 <= self.depth < len(self.data_primes)
        require(spent, f"depth={self.depth}: expected a prime for each product, beside the first")
        require(
            self.scale <= highest_scale(self.degree, self.data_primes, self.clients),
            f"data_primes={self.data_primes} leave no head-room: a sum of clients={self.clients} at scale="
            f"2^{log2(self.scale):.2f} needs {data_bits(self.scale, self.clients)} bits; allow fewer clients or add "
            "bits",
        )
        require(
            self.bits == 0 or self.scale >= lowest_scale(self.degree, self.clients, self.bits),
            f"scale=2^{log2(self.scale):.2f} drowns bits={self.bits} in the noise of {self.clients} clients; raise it",
        )

    @classmethod
    def smallest(cls, clients: int, bits: int) -> CKKSParameters:
        """The parameters that cost the fewest bytes for sums that are exact in steps of 2^-bits.

        Raises:
          InvalidArgument: no ring of the table holds such a sum.
        """
        at_least("bits", bits, 1)
        _check(clients, bits)
        for degree, limit in LARGEST_MODULUS.items():
            scale = lowest_scale(degree, clients, bits)
            total = max(data_bits(scale, clients), _PRIME_BITS.start)
            count = ceil(total / (_PRIME_BITS.stop - 1))
            primes = tuple((total + i) // count for i in range(count))  # split evenly, adds up to the total
            if total + SPECIAL_PRIME <= limit:
                return cls(degree, primes, scale, clients, bits)
        raise InvalidArgument(f"clients={clients}, bits={bits}: no ring up to {degree} holds this sum; lower bits")

    @classmethod
    def cheapest(cls, clients: int, error: float, *, depth: int = 0, release: Release = "clients") -> CKKSParameters:
        """The parameters that cost the fewest bytes for sums within an error.

        | depth | release | error | degree, data primes + special prime              | bytes a number |
        |-------|---------|-------|--------------------------------------------------|----------------|
        | 0     | clients | 1e-5  | 4096, [32] + 20, for up to 450 clients           | 8.3            |
        | 0     | public  | 1e-4  | 4096, [60] + 20; 2048 has no room: refused       | 16             |
        | 1     | clients | 1e-5  | 8192, [60, 60] + 60, scale 2^50                  | 32             |
        | 2     | clients | 1e-5  | 8192, [60, 40, 40] + 60, scale 2^40              | 41             |

        Sums have no primes to spend, so that their scale takes all the room which the head-room leaves. A chain for
        products that is used for sums costs more bytes and needs larger flooding.

        Args:
          clients: most clients in a sum.
          error: largest absolute error of a coordinate of the sum, relative to `clients * bound`: of the mean over a
            full cohort, relative to `bound`. Met by all of `LARGEST_WIDTH` numbers but with probability 2^-20.
          depth: see the class; 0 for sums. What a sum loses is what the error is about, not what a product loses.
          release: "public" leaves room for flooding, see `flooding_deviation`.

        Raises:
          InvalidArgument: no ring of the table keeps the error.
        """
        _check(clients, 0)
        positive("error", error)
        one_of("release", release, ("public", "clients"))
        require(depth in {0, *_PRODUCT_CHAINS}, f"depth={depth!r}: expected 0 (sums) to {max(_PRODUCT_CHAINS)}")
        for found in _products(clients, depth) if depth else _sums(clients):
            if found.largest_error(release) <= error:
                return found
        best = found.largest_error(release)
        raise InvalidArgument(
            f"error={error:g}, clients={clients}, depth={depth}, release={release!r}: no ring up to "
            f"{max(LARGEST_MODULUS)} comes below {best:.1g}; allow a larger error, or take an exact grid"
        )

    @property
    def chain(self) -> tuple[int, ...]:
        """Bits of all primes, the special one last."""
        return (*self.data_primes, self.special_prime)

    @property
    def numbers(self) -> int:
        """Numbers in one ciphertext: one a coefficient."""
        return self.degree

    @property
    def bytes_a_number(self) -> int:
        """Of a ciphertext: two polynomials, whole bytes for each prime.

        Compression saves nothing but the empty bytes; a header and its bookkeeping add up to 5 %.
        """
        return 2 * sum(ceil(bits / 8) for bits in self.data_primes)

    def sum_deviation(self, ciphertexts: int | None = None) -> float:
        """Standard deviation of one number in a decrypted sum, in units of the bound; None: of a full sum."""
        added = self.clients + _OWN if ciphertexts is None else ciphertexts + _OWN
        return hypot(noise_deviation(self.degree, added) / self.scale, _ROUNDING * self.clients)

    def flooding_deviation(self, released: int, ciphertexts: int | None = None) -> float:
        """Deviation of the noise that a released sum needs, in units of the bound.

        Who holds a ciphertext and its decryption in full precision computes the secret key from it (Li, Micciancio,
        "On the security of homomorphic encryption on approximate numbers", 2021). Gaussian noise on what is released
        hides the error that betrays the key: sigma = 2^(s/2) sqrt(12 Q) t, with s = `STATISTICAL_BITS`.

        What is computed here: two releases that differ by an error of L2 norm t have a Kullback-Leibler divergence of
        t^2 / (2 sigma^2), hence 2^-s / 24 for the Q of them together. So t is the *norm* over the numbers of one
        ciphertext, sqrt(numbers) times the deviation of one of them. What is taken over: that 2^-s / 24 gives (c, s)
        security, c computational and s statistical bits (Li, Micciancio, Schultz, Sorrell, "Securing approximate
        homomorphic encryption using differential privacy", 2022, from memory; OpenFHE floods by the same
        formula, with the deviation of one coefficient in place of the norm). What is assumed: that t is at most twice
        its expectation, from which it strays by a few per cent (measured), and that clients encrypt honestly. Double
        precision is part of t, as its rounding may depend on the error too.

        It is no privacy noise: it never counts towards epsilon.

        Args:
          released: Q, ciphertexts that are decrypted under the key.
          ciphertexts: how many were added up in each; None: a full sum.
        """
        at_least("released", released, 1)
        added = (self.clients if ciphertexts is None else ciphertexts) + _OWN
        noise = hypot(noise_deviation(self.degree, added) / self.scale, _DECODING * self.clients)
        norm = _LONGEST_NOISE * sqrt(self.numbers) * noise
        return 2.0 ** (STATISTICAL_BITS // 2) * sqrt(12 * released) * norm

    def encoding_error(self, width: int) -> float:
        """Largest L2 distance between a row of width `width` and what is encrypted of it, in units of the bound.

        Rounding moves each coefficient by half a unit at most. Double precision adds its own, for this row's part in a
        full sum too.
        """
        padded = ceil(width / self.numbers) * self.numbers
        return sqrt(padded) * (0.5 / self.scale + 4 * self.clients * _ROUNDING)

    def largest_error(self, release: Release = "clients", width: int = LARGEST_WIDTH) -> float:
        """Of a coordinate of a full sum, relative to `clients * bound`; exceeded with probability 2^-20.

        The noise of encryption is a sum of thousands of small terms, and flooding is Gaussian: both have its tails.
        """
        deviation = self.sum_deviation()
        if release == "public":
            deviation = hypot(deviation, self.flooding_deviation(ceil(width / self.numbers) + 1))
        return sqrt(2 * log(2 * width / _FAILURE)) * deviation / self.clients


def noise_deviation(degree: int, ciphertexts: int) -> float:
    """Standard deviation of one number in a sum of fresh ciphertexts, at scale 1.

    Rounding adds an error of variance 1/12 to each coefficient of c0, of c1 (multiplied by the secret, whose n
    coefficients have variance 2/3) and of the plaintext.

    Source: derived from `Encryptor::encrypt_zero_internal` of SEAL 4; measured within 2 % for each degree.
    """
    return sqrt(ciphertexts * (2 + degree * 2 / 3) / 12)


def lowest_scale(degree: int, clients: int, bits: int) -> float:
    """The scale at which half a step is `MARGIN` standard deviations of the noise of a full sum."""
    return 2.0**bits * 2 * MARGIN * noise_deviation(degree, clients + _OWN)


def highest_scale(degree: int, data_primes: tuple[int, ...], clients: int) -> float:
    """The scale at which every sum, and its noise, still stays below half the product of the primes."""
    half = prod(2.0**bits * (1 - _PRIME_GAP) for bits in data_primes) / 2
    return (half - MARGIN * noise_deviation(degree, clients + _OWN)) / clients


def data_bits(scale: float, clients: int) -> int:
    """Bits of the data primes for which `clients * scale` stays below half their product."""
    return ceil(log2(2 * clients * scale / (1 - 2 * _PRIME_GAP)))


def _sums(clients: int) -> Iterator[CKKSParameters]:
    """Rings for sums, by bytes, fewer primes, preferred degree, error; each at the highest scale it has room for."""
    found = [
        CKKSParameters(degree, primes, highest_scale(degree, primes, clients), clients)
        for degree, limit in LARGEST_MODULUS.items()
        for count in (1, 2)
        for primes in combinations_with_replacement(_WHOLE_BYTES, count)
        if sum(primes) + SPECIAL_PRIME <= limit
    ]

    def order(ring: CKKSParameters) -> tuple[int, int, bool, float]:
        return ring.bytes_a_number, len(ring.data_primes), ring.degree != _PREFERRED, ring.largest_error()

    return iter(sorted(found, key=order))


def _products(clients: int, depth: int) -> Iterator[CKKSParameters]:
    """Rings in which ciphertexts can be multiplied."""
    for primes, special, exponent in _PRODUCT_CHAINS[depth]:
        yield CKKSParameters(8192, primes, 2.0**exponent, clients, special_prime=special, depth=depth)


def _check(clients: int, bits: int) -> None:
    at_least("clients", clients, 1)
    at_least("bits", bits, 0)
    require(
        bits + log2(clients) <= LARGEST_SUM,
        f"bits={bits}, clients={clients}: expected bits + log2(clients) <= {LARGEST_SUM}, "
        "what double precision still resolves; lower bits",
    )
