"""CKKS with numbers in the coefficients of a polynomial: twice as many to a ciphertext, and inner products for free.

A vector of N = 8192 numbers is the polynomial a(X) = sum a_k X^k modulo X^N + 1. Then

- `X^j a(X)` and `a(X^t)` (t odd) only move numbers about and change signs: nothing becomes longer;
- the constant coefficient of `a(X) b(1/X)` is the inner product of the two vectors.

The usual way, numbers in *slots*, multiplies place by place, needs twelve rotations to add up an inner product, and its
places are complex: v + iv has the square 2i v^2, so a client that encrypts that has a "squared norm" of zero and
releases v. Coefficients are real, so that an inner product here is a true one whatever a client encrypts.

One level of multiplication: products are taken under both data primes, then divided by the second. What leaves the
server is one coefficient of a product (`SecretProduct`), after an encryption of zero has been added: whoever decrypts
learns that number and nothing else of what was multiplied.

Evaluation runs on SEAL's own objects. TenSEAL's vectors rescale to the wrong scale here, and `CKKSVector.copy` copies
the whole context (336 ms).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from tempfile import NamedTemporaryFile
from typing import Any, Final, final

import numpy as np
from numpy.typing import NDArray

from privfm.checks import Corrupt, ParameterMismatch

Array = NDArray[np.float64]

DEGREE: Final = 8192
"""N: numbers in one ciphertext."""

CHAIN: Final = (60, 60, 60)
"""Bits of the data primes and of the special prime: 180 of the 218 that 128-bit security allows at N = 8192.

Source: Homomorphic Encryption Security Standard, 2018, table 1 (classical, ternary secret)."""

SCALE: Final = 2.0**50
"""Of an encrypted number; a product has its square, which leaves 2^19 of head-room below half of 2^120."""

NOISE: Final = 22.0
"""Standard deviation of one coefficient of a fresh ciphertext, in units of `1 / SCALE`.

Encryption divides by the special prime and rounds: uniform errors in c0, and in c1 times the secret, whose N
coefficients have variance 2/3, give `sqrt((2 + 2 N / 3) / 12)` = 21.3. Encoding in double precision adds 2 to 3."""

BYTES: Final = 262_300
"""Of one fresh ciphertext, about; 60-bit numbers do not compress."""

_MOST_BYTES = 2 * 2 * DEGREE * 8 + 1024  # of one ciphertext: two polynomials, two primes, 8 bytes a number
_SIGNS = 2 * DEGREE - 1  # the Galois element of X -> 1/X


@final
@dataclass(frozen=True)
class SecretProduct:
    """One encrypted inner product: the constant coefficient of c0, and all of c1 in the transformed domain.

    Attributes:
      constant: the coefficient, modulo the first prime.
      mask: `(N,)` uint64, c1 at the N roots of unity modulo the first prime.
    """

    constant: int
    mask: NDArray[np.uint64]

    def packed(self) -> bytes:
        """`8 (N + 1)` bytes."""
        return self.constant.to_bytes(8, "little") + self.mask.astype("<u8").tobytes()


@final
@dataclass(frozen=True)
class RingKeys:
    """What a key holder makes for a round.

    Attributes:
      secret: decrypts. It stays with the key holder.
      public: encrypts; for everybody.
      evaluation: relinearisation and Galois keys; for the server.
    """

    secret: bytes
    public: bytes
    evaluation: tuple[bytes, bytes]

    def __repr__(self) -> str:
        return "RingKeys()"


def new_keys(galois: int) -> RingKeys:
    """Fresh keys, from SEAL's own generator, which cannot be seeded.

    Args:
      galois: t of the map X -> X^t that the server may apply, besides X -> 1/X.
    """
    import tenseal as ts
    import tenseal.sealapi as seal

    context = ts.context(ts.SCHEME_TYPE.CKKS, DEGREE, coeff_mod_bit_sizes=list(CHAIN), n_threads=1)
    context.global_scale = SCALE
    generator = seal.KeyGenerator(context.seal_context().data, context.secret_key().data)
    relin, maps = seal.RelinKeys(), seal.GaloisKeys()
    generator.create_relin_keys(relin)
    generator.create_galois_keys([galois, _SIGNS], maps)
    plain = {"save_galois_keys": False, "save_relin_keys": False}
    secret = context.serialize(save_secret_key=True, **plain)
    return RingKeys(secret, context.serialize(save_secret_key=False, **plain), (_saved(relin), _saved(maps)))


class PublicRing:
    """What a client does: encrypts.

    Args:
      public: the key holder's public key.

    Raises:
      Corrupt: it is none.
      ParameterMismatch: it is of another ring, or holds a secret key.
    """

    def __init__(self, public: bytes) -> None:
        import tenseal.sealapi as seal

        self._context = _context(public)
        if self._context.has_secret_key():
            raise ParameterMismatch("the key holder's message holds a secret key")
        self.seal = self._context.seal_context().data
        self.encoder = seal.CKKSEncoder(self.seal)
        self.encryptor = seal.Encryptor(self.seal, self._context.public_key().data)
        self._level = _fresh_level(self.seal)

    def encode(self, values: Array, scale: float = SCALE) -> Any:
        """Up to N numbers as a plaintext, rounded to steps of `1 / scale`."""
        import tenseal.sealapi as seal

        plain = seal.Plaintext()
        self.encoder.encode(_slots(values).tolist(), self._level, scale, plain)
        return plain

    def encrypt(self, values: Array) -> bytes:
        """Up to N numbers of absolute value at most 1 -> a ciphertext."""
        import tenseal.sealapi as seal

        made = seal.Ciphertext()
        self.encryptor.encrypt(self.encode(values), made)
        return _saved(made)

    def zero(self, like: Any) -> Any:
        """A fresh encryption of zero at the level and scale of `like` (a fresh ciphertext's when None)."""
        import tenseal.sealapi as seal

        made = seal.Ciphertext()
        if like is None:
            self.encryptor.encrypt_zero(made)
        else:
            self.encryptor.encrypt_zero(like.parms_id(), made)
        made.scale = SCALE if like is None else like.scale
        return made

    def parsed(self, part: bytes) -> Any:
        """A client's ciphertext.

        Raises:
          Corrupt: it is none of this ring, or hides nothing.
          ParameterMismatch: it is of another level, scale or size.
        """
        import tenseal.sealapi as seal

        if len(part) > _MOST_BYTES:
            raise Corrupt(f"a ciphertext of {len(part)} bytes, expected at most {_MOST_BYTES}")
        found = _loaded(seal.Ciphertext(), self.seal, part)
        if (found.size(), found.parms_id(), found.scale) != (2, self._level, SCALE):
            raise ParameterMismatch(f"a ciphertext of size {found.size()}, scale {found.scale:.4g}: not a fresh one")
        if found.is_transparent():
            raise Corrupt("a ciphertext that hides nothing")
        return found


@final
class ServerRing(PublicRing):
    """What the server does: moves, adds and multiplies what it cannot read.

    Args:
      public: the key holder's public key.
      evaluation: its relinearisation and Galois keys.
    """

    def __init__(self, public: bytes, evaluation: Sequence[bytes]) -> None:
        import tenseal.sealapi as seal

        super().__init__(public)
        self.evaluator = seal.Evaluator(self.seal)
        relin, maps = evaluation
        self._relin = _loaded(seal.RelinKeys(), self.seal, relin)
        self._maps = _loaded(seal.GaloisKeys(), self.seal, maps)

    def monomial(self, exponent: int, sign: int) -> Any:
        """`sign X^exponent` as a plaintext; exact, of scale 1."""
        values = np.zeros(DEGREE)
        values[exponent % DEGREE] = sign * (-1) ** (exponent // DEGREE)
        return self.encode(values, 1.0)

    def times(self, ciphertext: Any, plain: Any) -> Any:
        """Ciphertext times plaintext."""
        import tenseal.sealapi as seal

        product = seal.Ciphertext()
        self.evaluator.multiply_plain(ciphertext, plain, product)
        return product

    def plus(self, first: Any, second: Any) -> Any:
        """A new ciphertext; sums go on with `add`."""
        import tenseal.sealapi as seal

        total = seal.Ciphertext()
        self.evaluator.add(first, second, total)
        return total

    def add(self, total: Any, term: Any) -> None:
        """Adds in place."""
        self.evaluator.add_inplace(total, term)

    def without(self, ciphertext: Any, plain: Any) -> Any:
        """Ciphertext less plaintext."""
        import tenseal.sealapi as seal

        left = seal.Ciphertext()
        self.evaluator.sub_plain(ciphertext, plain, left)
        return left

    def map(self, ciphertext: Any, exponent: int) -> None:
        """a(X) -> a(X^exponent), in place."""
        self.evaluator.apply_galois_inplace(ciphertext, exponent, self._maps)

    def reversed(self, ciphertext: Any) -> Any:
        """a(X) -> a(1/X)."""
        import tenseal.sealapi as seal

        found = seal.Ciphertext()
        self.evaluator.apply_galois(ciphertext, _SIGNS, self._maps, found)
        return found

    def product(self, first: Any, other: Any) -> SecretProduct:
        """The constant coefficient of a product of two ciphertexts."""
        return self.inner_product([first], [other])

    def inner_product(self, first: Sequence[Any], other: Sequence[Any]) -> SecretProduct:
        """The inner product of two encrypted vectors, the second `reversed`, of one or several ciphertexts each.

        What is multiplied is added up first and relinearised once.
        """
        import tenseal.sealapi as seal

        total = seal.Ciphertext()
        self.evaluator.multiply(first[0], other[0], total)
        for a, b in zip(first[1:], other[1:], strict=True):
            term = seal.Ciphertext()
            self.evaluator.multiply(a, b, term)
            self.evaluator.add_inplace(total, term)
        self.evaluator.relinearize_inplace(total, self._relin)
        return self._constant(total)

    def plain_product(self, first: Any, values: Array) -> SecretProduct:
        """The inner product of an encrypted vector and a plain one `(N,)`."""
        return self.plain_inner_product([first], [values])

    def plain_inner_product(self, first: Sequence[Any], values: Sequence[Array]) -> SecretProduct:
        """The inner product of an encrypted vector and a plain one, in pieces `(N,)` for each ciphertext."""
        total = None
        for ciphertext, piece in zip(first, values, strict=True):
            plain = self.encode(_reversed(piece))
            if plain.is_zero():  # SEAL refuses a product that hides nothing
                continue
            term = self.times(ciphertext, plain)
            if total is None:
                total = term
            else:
                self.add(total, term)
        if total is None:
            total = self.zero(None)
            total.scale = SCALE**2
        return self._constant(total)

    def _constant(self, product: Any) -> SecretProduct:
        self.evaluator.rescale_to_next_inplace(product)
        # c1 is a function of what was multiplied, which a holder of the secret key could solve for.
        self.evaluator.add_inplace(product, self.zero(product))
        mask = np.fromiter(map(product.dyn_array().at, range(DEGREE, 2 * DEGREE)), np.uint64, DEGREE)
        self.evaluator.transform_from_ntt_inplace(product)  # to coefficients
        return SecretProduct(product.dyn_array().at(0), mask)

    def serialized(self, ciphertext: Any) -> bytes:
        """A ciphertext as bytes."""
        return _saved(ciphertext)


@final
class SecretRing:
    """What the key holder does: decrypts sums, and single coefficients of products.

    Args:
      secret: its own key.
    """

    def __init__(self, secret: bytes) -> None:
        import tenseal.sealapi as seal

        self._context = _context(secret)
        self._seal, key = self._context.seal_context().data, self._context.secret_key().data
        self._encoder, self._decryptor = seal.CKKSEncoder(self._seal), seal.Decryptor(self._seal, key)
        self._level = _fresh_level(self._seal)
        words = key.data()
        self._key = [words[i] for i in range(DEGREE)]  # at the roots, modulo the first prime
        self._prime = _first_prime(self._seal)

    def opened(self, part: bytes) -> Array:
        """A ciphertext of scale `SCALE` -> its N numbers, with noise.

        Raises:
          Corrupt: it is no ciphertext of this ring.
          ParameterMismatch: it is of another level, scale or size.
        """
        import tenseal.sealapi as seal

        if len(part) > _MOST_BYTES:
            raise Corrupt(f"a ciphertext of {len(part)} bytes, expected at most {_MOST_BYTES}")
        found, plain = _loaded(seal.Ciphertext(), self._seal, part), seal.Plaintext()
        if (found.size(), found.parms_id(), found.scale) != (2, self._level, SCALE):
            raise ParameterMismatch(f"a ciphertext of size {found.size()}, scale {found.scale:.4g}: not a sum")
        self._decryptor.decrypt(found, plain)
        return _coefficients(np.asarray(self._encoder.decode_complex(plain)))

    def inner_product(self, part: bytes) -> float:
        """A packed `SecretProduct` -> the number.

        Raises:
          Corrupt: it is none.
        """
        if len(part) != 8 * (DEGREE + 1):
            raise Corrupt(f"an inner product of {len(part)} bytes, expected {8 * (DEGREE + 1)}")
        constant, *mask = np.frombuffer(part, "<u8").tolist()
        found = (constant + sum(map(int.__mul__, mask, self._key)) * pow(DEGREE, -1, self._prime)) % self._prime
        centred = found - self._prime if found > self._prime // 2 else found
        return float(centred * _second_prime(self._seal) / SCALE**2)


def head_room() -> float:
    """Largest absolute inner product that does not wrap."""
    return 2.0 ** (sum(CHAIN[:2]) - 1) * (1 - 2.0**-10) / SCALE**2  # SEAL's 60-bit primes lie that close below 2^60


def _reversed(values: Array) -> Array:
    """a(X) -> a(1/X): the constant stays, X^-k = -X^(N-k)."""
    return np.concatenate([values[:1], -values[:0:-1]])


@lru_cache(maxsize=1)
def _roots() -> tuple[NDArray[np.complex128], NDArray[np.int64]]:
    """The powers of a 2N-th root of unity, and where SEAL's slots lie among the odd ones (`3^i`)."""
    powers = np.exp(1j * np.pi * np.arange(DEGREE) / DEGREE)
    exponents = np.array([pow(3, i, 2 * DEGREE) for i in range(DEGREE // 2)])
    return powers, (exponents - 1) // 2


def _slots(values: Array) -> NDArray[np.complex128]:
    """Coefficients, at most N -> the values in the N/2 slots."""
    powers, places = _roots()
    padded = np.zeros(DEGREE)
    padded[: len(values)] = values
    found: NDArray[np.complex128] = (np.fft.ifft(padded * powers) * DEGREE)[places]
    return found


def _coefficients(slots: NDArray[np.complex128]) -> Array:
    """The inverse of `_slots`, `(N,)`."""
    powers, places = _roots()
    every = np.empty(DEGREE, np.complex128)
    every[places], every[DEGREE - 1 - places] = slots, slots.conj()
    found: Array = (np.fft.fft(every) / DEGREE * powers.conj()).real
    return found


def _saved(thing: Any) -> bytes:
    """SEAL writes to paths only. Nothing secret passes here."""
    with NamedTemporaryFile() as file:
        thing.save(file.name)
        return file.read()


def _loaded(thing: Any, context: Any, content: bytes) -> Any:
    with NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        try:
            thing.load(context, file.name)
        except (ValueError, RuntimeError) as error:
            raise Corrupt(f"{len(content)} bytes that are no {type(thing).__name__} of this ring") from error
    return thing


@lru_cache(maxsize=2)
def public_ring(public: bytes) -> PublicRing:
    """One for all clients of a process: to make it takes longer than to encrypt with it."""
    return PublicRing(public)


def _context(content: bytes) -> Any:
    """Parses keys.

    Raises:
      Corrupt: it holds no keys.
      ParameterMismatch: they are of another ring.
    """
    import tenseal as ts
    import tenseal.sealapi  # registers the types below

    try:
        context = ts.context_from(content, 1)
    except (ValueError, RuntimeError) as error:
        raise Corrupt("the key holder's message holds no keys") from error
    ring = context.seal_context().data.key_context_data().parms()
    chain = tuple(prime.value().bit_length() for prime in ring.coeff_modulus())
    if (ring.poly_modulus_degree(), chain, context.global_scale) != (DEGREE, CHAIN, SCALE):
        raise ParameterMismatch("the key holder's message holds keys of another ring")
    return context


def _first_prime(context: Any) -> int:
    return int(context.key_context_data().parms().coeff_modulus()[0].value())


def _second_prime(context: Any) -> int:
    return int(context.key_context_data().parms().coeff_modulus()[1].value())


def _fresh_level(context: Any) -> Any:
    return context.first_context_data().parms_id()
