"""One envelope for the messages of every channel: header, parts, and a code that proves who sent them.

A homomorphic ciphertext is not self-checking: two thirds of single flipped bits, and every ciphertext under another
key, load without an error and decrypt to garbage; a forged size makes a parser read foreign memory. So nothing of a
body is parsed before its envelope is known to be whole, to come from the party it should come from, and to belong to
this message of this round.

The code is an HMAC-SHA256 whose key belongs to the sender and the receiver alone, in this direction and this round
(see `identities`). A message cannot be changed on the way, passed off as another's, sent back or used again later.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from hashlib import sha256
from struct import Struct
from typing import Final, final

from privfm.checks import BrokenEnvelope, Corrupt, ParameterMismatch, Replay, WrongKey, require
from privfm.contracts import Party
from privfm.defenses.channels.identities import pair_key

_MAGIC: Final = b"PVFM"
_VERSION: Final = 2
_FIELDS = Struct(">4sBqqq8s16s16s8sQLLdd")  # magic, version, round, sender, receiver, then `Header`
_SIZE = Struct(">Q")
_CODE = sha256().digest_size


@final
@dataclass(frozen=True)
class Header:
    """What a message says about itself. The receiver knows almost all of it beforehand and compares.

    Attributes:
      scheme: name of the channel, at most 8 ASCII letters.
      parameters: `fingerprint` of everything both sides must agree on, 16 bytes.
      key: `fingerprint` of the round's public key, or of what stands for it, 16 bytes.
      stage: what it is in the protocol, at most 8 ASCII letters.
      length: numbers in the vector it carries.
      parts: byte strings it is cut into.
      clients: how many clients' rows are summed in it.
      scale: units of an update in one unit of what it carries.
      weight: what the client has multiplied its row by.
    """

    scheme: str
    parameters: bytes = bytes(16)
    key: bytes = bytes(16)
    stage: str = ""
    length: int = 0
    parts: int = 0
    clients: int = 0
    scale: float = 1.0
    weight: float = 1.0

    def require(self, expected: Header) -> None:
        """Compares every field.

        Raises:
          WrongKey: it was made under another key.
          ParameterMismatch: parameters, length, parts, clients, scale or weight differ.
          Corrupt: it is another kind of message.
        """
        for field in fields(self):
            got, want = getattr(self, field.name), getattr(expected, field.name)
            if got != want:
                shown = f"{_shown(got)}, expected {_shown(want)}"
                raise _REASONS[field.name](f"{expected.stage} message with {field.name}={shown}")


_REASONS: dict[str, type[BrokenEnvelope]] = {field.name: ParameterMismatch for field in fields(Header)}
_REASONS |= {"key": WrongKey, "scheme": Corrupt, "stage": Corrupt}


def fingerprint(content: bytes) -> bytes:
    """The first 16 bytes of the SHA-256 of `content`: a name for a key or a set of parameters."""
    return sha256(content).digest()[:16]


@final
class Link:
    """What one party sends to another in one round, and accepts from it.

    Args:
      own: the party.
      other: the other one's number.
    """

    def __init__(self, own: Party, other: int) -> None:
        self._own, self._other = own, other

    def seal(self, header: Header, parts: Sequence[bytes]) -> bytes:
        """Header and parts, each after its length in 8 bytes, then the code over all that, as one message."""
        require(header.parts == len(parts), f"parts={header.parts}: the message has {len(parts)}")
        own, other = self._own, self._other
        head = _FIELDS.pack(
            _MAGIC,
            _VERSION,
            own.round,
            own.number,
            other,
            header.scheme.encode(),
            header.parameters,
            header.key,
            header.stage.encode(),
            header.length,
            header.parts,
            header.clients,
            header.scale,
            header.weight,
        )
        pieces = [head, *(piece for part in parts for piece in (_SIZE.pack(len(part)), part))]
        return b"".join([*pieces, self._code(pieces, sending=True)])

    def open(self, message: bytes) -> tuple[Header, list[bytes]]:
        """Opens a message. The code is compared before any of the body is read; sizes are believed only if they fit.

        Raises:
          Replay: it is of another round.
          Corrupt: it is empty, cut off, changed, of another version, not from the other party or not for this one, or
            its sizes contradict each other.
        """
        end = len(message) - _CODE
        if end < _FIELDS.size:
            raise Corrupt(f"message of {len(message)} bytes: empty or cut off")
        magic, version, number, sender, receiver, *rest = _FIELDS.unpack_from(message)
        if (magic, version) != (_MAGIC, _VERSION):
            raise Corrupt(f"magic {magic!r}, version {version}: expected {_MAGIC!r}, version {_VERSION}")
        if number != self._own.round:
            raise Replay(f"a message of round {number}, expected round {self._own.round}")
        if (sender, receiver) != (self._other, self._own.number):
            raise Corrupt(f"a message from {sender} to {receiver}, expected {self._other} to {self._own.number}")
        if not _same(self._code([memoryview(message)[:end]], sending=False), message[end:]):
            raise Corrupt(f"the message is not from party {sender}, or was cut off or changed on the way")
        scheme, parameters, key, stage, length, parts, clients, scale, weight = rest
        header = Header(_text(scheme), parameters, key, _text(stage), length, parts, clients, scale, weight)
        return header, _parts(message, parts, end)

    def expect(self, message: bytes, expected: Header) -> list[bytes]:
        """The parts of a message whose header is known beforehand, but for the number of parts.

        Raises:
          BrokenEnvelope: as `open`, or as `Header.require`.
        """
        header, parts = self.open(message)
        header.require(replace(expected, parts=header.parts))
        return parts

    def _code(self, pieces: Sequence[bytes | memoryview], *, sending: bool) -> bytes:
        from cryptography.hazmat.primitives.hashes import SHA256
        from cryptography.hazmat.primitives.hmac import HMAC

        code = HMAC(pair_key(self._own, self._other, b"envelope", sending=sending), SHA256())
        for piece in pieces:
            code.update(piece)
        return code.finalize()


def _same(first: bytes, second: bytes) -> bool:
    from cryptography.hazmat.primitives.constant_time import bytes_eq

    return bytes_eq(first, second)


def _text(field: bytes) -> str:
    return field.rstrip(b"\0").decode("ascii", errors="replace")


def _parts(message: bytes, count: int, end: int) -> list[bytes]:
    parts: list[bytes] = []
    at = _FIELDS.size
    while at < end and len(parts) < count:
        body = at + _SIZE.size
        size = _SIZE.unpack_from(message, at)[0] if body <= end else end
        if body + size > end:
            raise Corrupt(f"part {len(parts)} claims to reach beyond the end of the message")
        parts.append(message[body : body + size])
        at = body + size
    if len(parts) != count or at != end:
        raise Corrupt(f"the header announces {count} parts, the message holds {len(parts)} or more")
    return parts


def _shown(value: object) -> str:
    return value.hex() if isinstance(value, bytes) else repr(value)
