"""Masks: a key of 256 bits as a row of uniform words, and whole numbers modulo 2^bits on the wire.

A mask is the key stream of AES-256 in counter mode, under a key that HKDF derives from all 32 bytes. The key serves for
one mask, so that its counter can start at 0. AES takes 0.75 ms for a million 32-bit words, ChaCha20 0.85 ms, both in
pieces that stay in the processor's cache; a seeded NumPy generator is slower, and has no secret of 256 bits.

Arithmetic is that of unsigned machine words, which wrap modulo 2^32 or 2^64. As 2^bits divides that, only the bits on
the wire are cut: the lowest bits of a uniform word are uniform.

Sources: NIST SP 800-38A (counter mode), RFC 5869 (HKDF).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from privfm.checks import Corrupt, at_least, require

LEAST_BITS: Final = 8
MOST_BITS: Final = 64
KEY_BYTES: Final = 32

Words = NDArray[np.unsignedinteger[Any]]
"""`(d,)` uint32, or uint64 where the modulus has more than 32 bits."""

_PIECE = 1 << 18  # bytes of key stream made at a time: a quarter of a second-level cache
_BLOCK = 16  # bytes, of AES


def word(bits: int) -> np.dtype[Any]:
    """The machine word in which numbers modulo 2^bits are added."""
    _check(bits)
    return np.dtype("<u4" if bits <= 32 else "<u8")


def add_mask(values: Words, key: bytes) -> None:
    """Adds the mask of a key to `values (d,)`, in place; the words wrap.

    Raises:
      InvalidArgument: the key has not 32 bytes, or the values are no machine words.
    """
    for place, piece in _stream(values, key):
        target = values[place : place + len(piece)]
        np.add(target, piece, out=target)


def subtract_mask(values: Words, key: bytes) -> None:
    """The inverse of `add_mask`."""
    for place, piece in _stream(values, key):
        target = values[place : place + len(piece)]
        np.subtract(target, piece, out=target)


def mask(key: bytes, count: int, bits: int) -> Words:
    """The mask itself: `(count,)` uniform numbers from 0 to 2^bits - 1.

    >>> int(mask(bytes(32), 3, 8).max()) < 2**8
    True
    """
    at_least("count", count, 0)
    values: Words = np.zeros(count, word(bits))
    add_mask(values, key)
    return reduced(values, bits)


def reduced(values: Words, bits: int) -> Words:
    """Values modulo 2^bits, in place where the words are wider than that."""
    if bits < 8 * values.dtype.itemsize:
        np.bitwise_and(values, values.dtype.type((1 << bits) - 1), out=values)
    return values


def encoded(whole: NDArray[np.int64], bits: int) -> Words:
    """Whole numbers `(d,)`, of either sign, as words modulo 2^bits; not reduced yet."""
    return whole.astype(word(bits))  # wraps: two's complement


def centred(values: Words, bits: int) -> NDArray[np.int64]:
    """Words as whole numbers from -2^(bits-1) to 2^(bits-1) - 1, congruent modulo 2^bits."""
    unused = 8 * values.dtype.itemsize - bits
    signed: NDArray[np.signedinteger[Any]] = (values << unused).view(values.dtype.str.replace("u", "i"))
    return (signed >> unused).astype(np.int64)  # the shift to the right copies the sign


def packed(values: Words, bits: int) -> bytes:
    """Numbers modulo 2^bits as ceil(bits/8) bytes each, the lowest first."""
    values = reduced(values, bits)
    size = _size(bits)
    if size == values.dtype.itemsize:
        return values.tobytes()
    return np.ascontiguousarray(values.view(np.uint8).reshape(-1, values.dtype.itemsize)[:, :size]).tobytes()


def unpacked(content: bytes, count: int, bits: int) -> Words:
    """The inverse of `packed`; without a copy, and then read-only, where the words fill their bytes.

    Raises:
      Corrupt: the bytes are not `count` such numbers.
    """
    size, dtype = _size(bits), word(bits)
    if len(content) != size * count:
        raise Corrupt(f"{len(content)} bytes, expected {size} for each of {count} numbers")
    if size == dtype.itemsize:
        values: Words = np.frombuffer(content, dtype)
    else:
        values = np.zeros(count, dtype)
        values.view(np.uint8).reshape(-1, dtype.itemsize)[:, :size] = np.frombuffer(content, np.uint8).reshape(-1, size)
    if bits % 8 and int(values.max(initial=0)) >> bits:
        raise Corrupt(f"a number of more than {bits} bits")
    return values


def _stream(values: Words, key: bytes) -> Iterator[tuple[int, Words]]:
    """The key stream for `values`, in pieces `(place, words)`; each piece overwrites the one before."""
    from cryptography.hazmat.primitives.ciphers import Cipher
    from cryptography.hazmat.primitives.ciphers.algorithms import AES
    from cryptography.hazmat.primitives.ciphers.modes import CTR

    from privfm.defenses.channels.identities import derived

    require(len(key) == KEY_BYTES, f"a key of {len(key)} bytes: expected {KEY_BYTES}")
    require(values.dtype in (word(32), word(64)), f"values of type {values.dtype}: expected uint32 or uint64")
    cipher = Cipher(AES(derived(key, b"masks/expansion")), CTR(bytes(_BLOCK))).encryptor()
    size = values.dtype.itemsize
    step = min(_PIECE // size, max(len(values), 1))
    zeros = memoryview(_zeros(step * size))
    room = bytearray((step + 1) * size + _BLOCK)  # the library asks for a block more than it fills
    buffer: Words = np.frombuffer(room, values.dtype, step)
    for place in range(0, len(values), step):
        count = min(step, len(values) - place)
        cipher.update_into(zeros[: count * size], room)
        yield place, buffer[:count]


@lru_cache(maxsize=4)
def _zeros(count: int) -> bytes:
    return bytes(count)


def _size(bits: int) -> int:
    _check(bits)
    return (bits + 7) // 8


def _check(bits: int) -> None:
    at_least("bits", bits, LEAST_BITS)
    require(bits <= MOST_BITS, f"bits={bits}: expected at most {MOST_BITS}, one machine word")
