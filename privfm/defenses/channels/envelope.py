"""One envelope for the messages of every encrypted channel: header, parts, checksum.

A homomorphic ciphertext is not self-checking: two thirds of single flipped bits, and every ciphertext under another
key, load without an error and decrypt to garbage. So nothing of a body is parsed before its envelope is known to be
whole and to belong to this message of this round.

What it does not do: the checksum is not keyed. It finds accidents (cut off, flipped, mixed up, replayed messages) and
inconsistent senders; it does not authenticate anybody. Whoever can change a message in transit, the server above all,
can also compute a new checksum, put its own public key in place of the key holder's, or speak for a client.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from hashlib import sha256
from struct import Struct
from typing import Final, final

from privfm.checks import BrokenEnvelope

SERVER: Final = -2
"""The server, as the sender of a message. Clients and the key holder have their party numbers."""

_MAGIC = b"PVFM"
_VERSION = 1
_FIELDS = Struct(">4sB8s16s16s16sq8sQLL")
_SIZE = Struct(">Q")
_CHECKSUM = sha256().digest_size


@final
@dataclass(frozen=True)
class Header:
    """What a message says about itself. The receiver knows almost all of it beforehand and compares.

    Attributes:
      scheme: name of the channel, at most 8 ASCII letters.
      parameters: `fingerprint` of everything both sides must agree on, 16 bytes.
      key: `fingerprint` of the public key, 16 bytes.
      nonce: 16 random bytes that stand for the round.
      party: who sends it.
      stage: what it is in the protocol, at most 8 ASCII letters.
      length: numbers in the vector it carries.
      parts: byte strings it is cut into.
      clients: how many clients' rows are summed in it.
    """

    scheme: str
    parameters: bytes
    key: bytes
    nonce: bytes
    party: int
    stage: str
    length: int
    parts: int
    clients: int

    def require(self, expected: Header) -> None:
        """Compares every field.

        Raises:
          BrokenEnvelope: names the first field that differs.
        """
        for field in fields(self):
            got, want = getattr(self, field.name), getattr(expected, field.name)
            if got != want:
                shown = f"{_shown(got)}, expected {_shown(want)}"
                raise BrokenEnvelope(f"{expected.stage} message with {field.name}={shown}: foreign or replayed")


def fingerprint(content: bytes) -> bytes:
    """The first 16 bytes of the SHA-256 of `content`: a name for a key or a set of parameters."""
    return sha256(content).digest()[:16]


def seal(header: Header, parts: Sequence[bytes]) -> bytes:
    """Header and parts, each after its length in 8 bytes, then the SHA-256 of all that, as one message."""
    head = _FIELDS.pack(
        _MAGIC,
        _VERSION,
        header.scheme.encode(),
        header.parameters,
        header.key,
        header.nonce,
        header.party,
        header.stage.encode(),
        header.length,
        header.parts,
        header.clients,
    )
    message = b"".join([head, *(piece for part in parts for piece in (_SIZE.pack(len(part)), part))])
    return message + sha256(message).digest()


def unseal(message: bytes) -> tuple[Header, list[bytes]]:
    """Opens a message. The checksum is compared before anything else is read; sizes are believed only if they fit.

    Raises:
      BrokenEnvelope: the message is empty, cut off, changed, of another version, or its sizes contradict each other.
    """
    end = len(message) - _CHECKSUM
    if end < _FIELDS.size:
        raise BrokenEnvelope(f"message of {len(message)} bytes: empty or cut off")
    if sha256(memoryview(message)[:end]).digest() != message[end:]:
        raise BrokenEnvelope("the checksum does not fit: the message was cut off or changed")
    magic, version, scheme, parameters, key, nonce, party, stage, length, count, clients = _FIELDS.unpack_from(message)
    if (magic, version) != (_MAGIC, _VERSION):
        raise BrokenEnvelope(f"magic {magic!r}, version {version}: expected {_MAGIC!r}, version {_VERSION}")
    header = Header(_text(scheme), parameters, key, nonce, party, _text(stage), length, count, clients)
    parts: list[bytes] = []
    at = _FIELDS.size
    while at < end and len(parts) < count:
        body = at + _SIZE.size
        size = _SIZE.unpack_from(message, at)[0] if body <= end else end
        if body + size > end:
            raise BrokenEnvelope(f"part {len(parts)} claims to reach beyond the end of the message")
        parts.append(message[body : body + size])
        at = body + size
    if len(parts) != count or at != end:
        raise BrokenEnvelope(f"the header announces {count} parts, the message holds {len(parts)} or more")
    return header, parts


def _text(field: bytes) -> str:
    return field.rstrip(b"\0").decode("ascii", errors="replace")


def _shown(value: object) -> str:
    return value.hex() if isinstance(value, bytes) else repr(value)
