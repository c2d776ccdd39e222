"""What the BFV channel does with tenseal: keys, ciphertexts of one part of a vector, and a running sum of them.

tenseal believes what it parses: it takes forged lengths and contexts that still hold a secret key. It computes modulo
t without a word. Everything that arrives is compared with something of our own before it is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from os import urandom
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from privfm.checks import Corrupt, ParameterMismatch
from privfm.defenses.channels.bfv.parameters import BFVParameters, coefficient_primes

Whole = NDArray[np.int64]


def new_keys(parameters: BFVParameters) -> tuple[bytes, bytes]:
    """A fresh key pair, from SEAL's own generator, which cannot be seeded -> public and secret context.

    The public one is written without the secret and parsed anew by whoever uses it: a context that has been made
    public in memory (`make_context_public`) says that it holds no secret and still decrypts.
    """
    import tenseal as ts

    chain, t = list(parameters.chain), parameters.plain_modulus
    kind = ts.SCHEME_TYPE.BFV
    context = ts.context(kind, parameters.degree, plain_modulus=t, coeff_mod_bit_sizes=chain, n_threads=1)
    public = context.serialize(save_secret_key=False, save_galois_keys=False, save_relin_keys=False)
    return public, context.serialize(save_secret_key=True, save_galois_keys=False, save_relin_keys=False)


def parsed(content: bytes) -> Any:
    """A context, public or secret.

    Raises:
      Corrupt: it is none.
    """
    import tenseal as ts

    try:
        return ts.context_from(content, 1)
    except (ValueError, RuntimeError) as error:
        raise Corrupt("the key holder's message holds no keys") from error


@lru_cache(maxsize=2)
def public_context(content: bytes, parameters: BFVParameters) -> Any:
    """Parses a *public* key once for all clients of a process: it takes longer than encrypting 2,000 numbers.

    Raises:
      Corrupt: it is none.
      ParameterMismatch: it is not of these parameters, or holds a secret key.
    """
    import tenseal.sealapi  # noqa: F401  (registers the types below)

    context = parsed(content)
    ring = context.seal_context().data.key_context_data().parms()
    primes = tuple(prime.value() for prime in ring.coeff_modulus())
    got = (ring.poly_modulus_degree(), primes, ring.plain_modulus().value(), context.has_secret_key())
    degree, t = parameters.degree, parameters.plain_modulus
    if got != (degree, coefficient_primes(degree, parameters.chain), t, False):
        raise ParameterMismatch("the key holder's message holds keys of other parameters, or a secret one")
    return context


def encrypt(key: tuple[bytes, BFVParameters], values: Whole) -> bytes:
    """One ciphertext of at most `slots` whole numbers of absolute value under t / 2, under a public key."""
    import tenseal as ts

    serialized: bytes = ts.bfv_vector(public_context(*key), values).serialize()
    return serialized


def cut(values: Whole, slots: int) -> list[Whole]:
    """A vector in parts of at most `slots`: with more, SEAL prints a warning and TenSEAL cuts by itself."""
    return [values[at : at + slots] for at in range(0, len(values), slots)]


@final
class RunningSum:
    """A sum of encrypted vectors `(length,)`, in parts of at most `slots` numbers.

    It starts from encryptions of zero of its own making: lengths are then ours, and a message that forges its sizes
    is refused by the first addition instead of reading foreign memory when the sum is decrypted.

    Args:
      context: public or secret.
      parameters: of the context.
      length: numbers in the vector.
    """

    def __init__(self, context: Any, parameters: BFVParameters, length: int) -> None:
        self._context, self._sizes = context, _sizes(length, parameters.slots)
        self._chunks = [_zeros(context, size) for size in self._sizes]
        self.length, self.parts = length, len(self._sizes)

    def add(self, parts: Sequence[bytes]) -> None:
        """Adds one encrypted vector, whole or not at all.

        Raises:
          Corrupt: a part is no ciphertext of these parameters.
          ParameterMismatch: a part is one of another length, or of another form than a fresh one.
        """
        if len(parts) != self.parts:
            raise ParameterMismatch(f"a vector in {len(parts)} parts, expected {self.parts}")
        own = zip(parts, self._sizes, self._chunks, strict=True)
        vectors = [_ciphertext(self._context, part, size, chunk) for part, size, chunk in own]
        for chunk, other in zip(self._chunks, vectors, strict=True):
            chunk.add_(other)  # in place; `copy` would copy the whole context

    def blinded(self, pad: Whole) -> list[bytes]:
        """The sum plus the numbers `(length,)`, one ciphertext a part. The sum itself stays as it is."""
        cuts = np.split(pad, np.cumsum(self._sizes)[:-1])
        return [(chunk + values.tolist()).serialize() for chunk, values in zip(self._chunks, cuts, strict=True)]

    def serialized(self) -> list[bytes]:
        """One ciphertext a part."""
        return [chunk.serialize() for chunk in self._chunks]


def decrypted(secret: bytes, parameters: BFVParameters, length: int, parts: Sequence[bytes]) -> Whole:
    """The numbers `(length,)` of an encrypted vector, centred modulo t.

    Part by part, each added to a zero of our own of the right size: what a request announces takes no memory.

    Raises:
      Corrupt: a part is no ciphertext of these parameters.
      ParameterMismatch: a part is one of another length, or of another form than a fresh one.
    """
    context = parsed(secret)
    sizes, values = _sizes(length, parameters.slots), []
    zeros = {size: _zeros(context, size) for size in (sizes[0], sizes[-1])}
    for part, size in zip(parts, sizes, strict=True):
        vector = zeros[size] + _ciphertext(context, part, size, zeros[size])
        values.append(np.asarray(vector.decrypt(), np.int64))
    return np.concatenate(values)


def uniform(count: int, modulus: int) -> Whole:
    """Secret numbers, uniform on 0 ... modulus - 1: random bits of the operating system, those too large drawn anew."""
    mask = np.uint64((1 << (modulus - 1).bit_length()) - 1)
    drawn = np.empty(0, np.int64)
    while len(drawn) < count:
        fresh = np.frombuffer(urandom(8 * 2 * (count - len(drawn))), np.uint64) & mask
        drawn = np.concatenate([drawn, fresh[fresh < modulus].astype(np.int64)])
    return drawn[:count]


def centred(values: Whole, modulus: int) -> Whole:
    """Modulo an odd number, in -(modulus - 1) / 2 ... (modulus - 1) / 2."""
    half = modulus // 2
    return (values % modulus + half) % modulus - half


def _sizes(length: int, slots: int) -> list[int]:
    return [min(slots, length - at) for at in range(0, length, slots)]


def _zeros(context: Any, size: int) -> Any:
    import tenseal as ts

    return ts.bfv_vector(context, [0] * size)


def _ciphertext(context: Any, part: bytes, size: int, like: Any) -> Any:
    """Parses one part and compares it with a ciphertext of our own."""
    import tenseal as ts
    import tenseal.sealapi  # registers the types that `ciphertext` returns

    try:
        vector = ts.bfv_vector_from(context, part)
        ciphertexts = vector.ciphertext()
    except (ValueError, RuntimeError) as error:
        raise Corrupt(f"a part of {len(part)} bytes is no ciphertext of these parameters") from error
    shapes = [(c.size(), c.parms_id()) for c in ciphertexts]  # polynomials; primes
    own = [(c.size(), c.parms_id()) for c in like.ciphertext()]
    if vector.size() != size or shapes != own:
        raise ParameterMismatch(f"a ciphertext of {vector.size()} numbers, expected {size}, as fresh as ours")
    return vector
