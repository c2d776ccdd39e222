"""What a CKKS sum does with the encryption library: keys, ciphertexts of one part of a vector, a running sum of them.

Numbers travel in the coefficients of the polynomial that is encrypted, n of them in a ring of degree n. CKKS usually
puts them in n/2 *slots*, its values at roots of unity, so that ciphertexts multiply place by place. Sums do not need
that, and coefficients take half the ciphertexts, time and bytes, with an error sqrt(n/2) times smaller. tenseal's own
vectors are of slots, so this goes through its bindings of SEAL (`tenseal.sealapi`). Those write to and read from files
by name; a file in memory serves.

Whatever arrives is compared with something of our own before it is used: SEAL refuses what is no ciphertext of its
ring, and we what has another size, level, form or scale.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from tempfile import NamedTemporaryFile
from typing import Any, NoReturn, final

import numpy as np
from numpy.typing import NDArray

from privfm.checks import Corrupt, ParameterMismatch
from privfm.defenses.channels.ckks.parameters import CKKSParameters

Values = NDArray[np.float64]

_HEADERS = 1024  # bytes beside the numbers of a ciphertext; SEAL and zstd take 100 to 200


def new_keys(parameters: CKKSParameters) -> tuple[bytes, bytes]:
    """A fresh key pair, from SEAL's own generator, which cannot be seeded -> public and secret context.

    The public one is written without the secret and parsed anew by whoever uses it: a context that has been made
    public in memory (`make_context_public`) says that it holds no secret and still decrypts.
    """
    import tenseal as ts

    chain = list(parameters.chain)
    context = ts.context(ts.SCHEME_TYPE.CKKS, parameters.degree, coeff_mod_bit_sizes=chain, n_threads=1)
    context.global_scale = parameters.scale
    public = context.serialize(save_secret_key=False, save_galois_keys=False, save_relin_keys=False)
    return public, context.serialize(save_secret_key=True, save_galois_keys=False, save_relin_keys=False)


@final
class Ring:
    """A parsed key and what computes with it.

    Args:
      content: a serialised context, public or secret.
      parameters: what it must be of.
      secret: whether it must hold the secret key; a public one must not.

    Raises:
      Corrupt: it is no context.
      ParameterMismatch: it is one of other parameters, or holds other keys.
    """

    def __init__(self, content: bytes, parameters: CKKSParameters, *, secret: bool = False) -> None:
        import tenseal as ts
        import tenseal.sealapi as seal

        try:
            self._context = ts.context_from(content, 1)
        except (ValueError, RuntimeError) as error:
            raise Corrupt("the key holder's message holds no keys") from error
        context = self._context
        self._seal = context.seal_context().data  # a pointer into the context, which must outlive it
        ring = self._seal.key_context_data().parms()
        chain = tuple(prime.value().bit_length() for prime in ring.coeff_modulus())
        got = (ring.poly_modulus_degree(), chain, context.global_scale, context.has_secret_key())
        if got != (parameters.degree, parameters.chain, parameters.scale, secret) or not context.has_public_key():
            raise ParameterMismatch("the key holder's message holds keys of other parameters, or a secret one")
        self.parameters = parameters
        self._encoder = seal.CKKSEncoder(self._seal)
        self._evaluator = seal.Evaluator(self._seal)
        self._encryptor = context.encryptor().data

    def __reduce__(self) -> NoReturn:
        raise TypeError("a parsed key may hold the secret one: it is not pickled; send the public bytes")

    def encrypted(self, values: Values) -> Any:
        """At most `numbers` values between -1 and 1 -> a ciphertext; the rest of it is zeros."""
        import tenseal.sealapi as seal

        plaintext, ciphertext = seal.Plaintext(), seal.Ciphertext()
        slots = slots_of(np.pad(values, (0, self.parameters.degree - len(values))))
        self._encoder.encode(slots.tolist(), self.parameters.scale, plaintext)
        self._encryptor.encrypt(plaintext, ciphertext)
        return ciphertext

    def add(self, total: Any, other: Any) -> None:
        """Adds to `total` in place."""
        self._evaluator.add_inplace(total, other)

    def read(self, part: bytes, like: Any) -> Any:
        """A ciphertext from its bytes.

        Raises:
          Corrupt: it is none of this ring, or longer than any.
          ParameterMismatch: its size, level, form or scale differ from those of `like`. One at a lower level would
            silently pull a sum down to it.
        """
        import tenseal.sealapi as seal

        most = 16 * self.parameters.degree * len(self.parameters.data_primes) + _HEADERS
        if len(part) > most:
            raise Corrupt(f"a part of {len(part)} bytes, expected at most {most}")
        ciphertext = seal.Ciphertext()
        with _memory_file() as (path, descriptor):
            os.write(descriptor, part)
            try:
                ciphertext.load(self._seal, path)
            except (ValueError, RuntimeError) as error:
                raise Corrupt(f"a part of {len(part)} bytes is no ciphertext of these parameters") from error
        if _shape(ciphertext) != _shape(like):
            raise ParameterMismatch("a ciphertext of another size, level or scale")
        return ciphertext

    def decrypted(self, ciphertext: Any) -> Values:
        """All its numbers `(numbers,)`, in full precision; the ring must hold the secret key."""
        import tenseal.sealapi as seal

        plaintext = seal.Plaintext()
        seal.Decryptor(self._seal, self._context.secret_key().data).decrypt(ciphertext, plaintext)
        return coefficients_of(np.array(self._encoder.decode_complex(plaintext)))


def slots_of(coefficients: Values) -> NDArray[np.complex128]:
    """A polynomial `(n,)` -> its values `(n/2,)` at the roots of unity, in SEAL's order."""
    turns, places = _roots(len(coefficients))
    found: NDArray[np.complex128] = (len(coefficients) * np.fft.ifft(coefficients * turns))[places]
    return found


def coefficients_of(slots: NDArray[np.complex128]) -> Values:
    """Values `(n/2,)` in SEAL's order -> the polynomial `(n,)`; its values at the other roots are their conjugates."""
    degree = 2 * len(slots)
    turns, places = _roots(degree)
    values = np.empty(degree, np.complex128)
    values[places], values[degree - 1 - places] = slots, slots.conj()
    found: Values = (np.fft.fft(values) / degree * turns.conj()).real
    return found


@lru_cache(maxsize=3)
def _roots(degree: int) -> tuple[NDArray[np.complex128], NDArray[np.int64]]:
    """Powers 0 to n-1 of the root z = exp(pi sqrt(-1) / n), and for each slot i the j with z^(2j+1) = z^(3^i)."""
    turns = np.exp(1j * np.pi / degree * np.arange(degree))
    exponents = np.array([pow(3, slot, 2 * degree) for slot in range(degree // 2)])
    return turns, (exponents - 1) // 2


@lru_cache(maxsize=2)
def public_ring(content: bytes, parameters: CKKSParameters) -> Ring:
    """Parses a *public* key once for all clients of a process: it takes longer than encrypting 2,000 numbers."""
    return Ring(content, parameters)


def written(ciphertext: Any) -> bytes:
    """A ciphertext as bytes, compressed: a prime's whole bytes a coefficient."""
    with _memory_file() as (path, descriptor):
        ciphertext.save(path)
        return os.pread(descriptor, os.fstat(descriptor).st_size, 0)


def encrypt(key: tuple[bytes, CKKSParameters], values: Values) -> bytes:
    """One ciphertext of at most `numbers` values, under a public key: bytes in, bytes out."""
    return written(public_ring(*key).encrypted(values))


def cut(values: Values, numbers: int) -> list[Values]:
    """A vector in parts of at most `numbers`."""
    return [values[at : at + numbers] for at in range(0, len(values), numbers)]


@final
class RunningSum:
    """A sum of encrypted vectors `(length,)`, in parts of at most `numbers` numbers.

    It starts from encryptions of zero of its own making, with which everything that is added is compared.

    Args:
      ring: public or secret.
      length: numbers in the vector.
    """

    def __init__(self, ring: Ring, length: int) -> None:
        self._ring, self.length = ring, length
        zero = np.zeros(1)
        self._parts = [ring.encrypted(zero) for _ in range(0, length, ring.parameters.numbers)]

    @property
    def parts(self) -> int:
        """Ciphertexts in it."""
        return len(self._parts)

    def add(self, parts: Sequence[bytes]) -> None:
        """Adds one encrypted vector, whole or not at all.

        Raises:
          Corrupt: a part is no ciphertext.
          ParameterMismatch: a part is one of another shape, or there are more or fewer of them.
        """
        if len(parts) != self.parts:
            raise ParameterMismatch(f"a vector in {len(parts)} parts, expected {self.parts}")
        others = [self._ring.read(part, own) for part, own in zip(parts, self._parts, strict=True)]
        for own, other in zip(self._parts, others, strict=True):
            self._ring.add(own, other)

    def written(self) -> list[bytes]:
        """One ciphertext a part."""
        return [written(part) for part in self._parts]

    def decrypted(self) -> Values:
        """The sum `(length,)`, in full precision: not to be shown to whoever holds ciphertexts."""
        return np.concatenate([self._ring.decrypted(part) for part in self._parts])[: self.length]


def _shape(ciphertext: Any) -> tuple[Any, ...]:
    form = (ciphertext.size(), ciphertext.is_ntt_form(), ciphertext.coeff_modulus_size())
    return (*form, ciphertext.parms_id(), ciphertext.scale)


@contextmanager
def _memory_file() -> Iterator[tuple[str, int]]:
    """A file in memory, or a temporary one where the system has none -> its name and descriptor.

    Only ciphertexts pass through it.
    """
    if not hasattr(os, "memfd_create"):
        with NamedTemporaryFile() as file:
            yield file.name, file.fileno()
        return
    descriptor = os.memfd_create("ciphertext")
    try:
        yield f"/proc/self/fd/{descriptor}", descriptor
    finally:
        os.close(descriptor)
