"""What both halves of `PairwiseMasks` agree on: announced keys, keys between two clients, boxes, marks.

Sources: RFC 7748 (X25519), RFC 5869 (HKDF), RFC 8439 (ChaCha20-Poly1305).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256
from itertools import pairwise
from secrets import token_bytes
from struct import Struct, pack, unpack
from typing import TYPE_CHECKING, Final, final

from privfm.checks import Corrupt
from privfm.contracts import Party
from privfm.defenses.channels.envelope import fingerprint
from privfm.defenses.channels.identities import derived, sign, verify

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

SECRET_BYTES: Final = 32
SIGNATURE_BYTES: Final = 64
MARK_BYTES: Final = 16
BOX_BYTES: Final = 2 * SECRET_BYTES + 16  # two shares and the tag of the cipher

_NONCE = bytes(12)  # a box key serves once: for one sender, receiver, round and pair of fresh keys
_RECORD = Struct(f">q{SECRET_BYTES}s{SECRET_BYTES}s{SIGNATURE_BYTES}s")
_NUMBER = Struct(">q")


@final
@dataclass(frozen=True)
class Announced:
    """What a client announces: its fresh public keys of one round.

    Attributes:
      number: of the client.
      sharing: the X25519 key under which it receives shares.
      masking: the X25519 key from which its masks follow.
      signature: by its pinned identity; zeros where the server is trusted to pass keys on.
    """

    number: int
    sharing: bytes
    masking: bytes
    signature: bytes = bytes(SIGNATURE_BYTES)

    def to_bytes(self) -> bytes:
        """136 bytes."""
        return _RECORD.pack(self.number, self.sharing, self.masking, self.signature)

    @classmethod
    def all_from(cls, content: bytes) -> list[Announced]:
        """The inverse, for any number of them.

        Raises:
          Corrupt: the bytes are no such records, or their numbers do not ascend.
        """
        if len(content) % _RECORD.size:
            raise Corrupt(f"{len(content)} bytes of announced keys: expected {_RECORD.size} a client")
        found = [cls(*values) for values in _RECORD.iter_unpack(content)]
        _require_ascending([each.number for each in found])
        return found

    def signed_by(self, party: Party, session: bytes) -> Announced:
        """The same with the signature of its client."""
        return Announced(self.number, self.sharing, self.masking, sign(party, self._content(party, session)))

    def require_keys(self) -> None:
        """Checks that both are keys.

        Raises:
          Corrupt: one is a point of small order: whatever is agreed on with it, everybody knows.
        """
        secret = loaded(token_bytes(SECRET_BYTES))
        _ = _agreed(secret, self.sharing), _agreed(secret, self.masking)

    def require_signature(self, party: Party, session: bytes) -> None:
        """Checks it against the pinned identity.

        Raises:
          Corrupt: somebody else announced these keys.
        """
        verify(party.pinned(self.number), self._content(party, session), self.signature)

    def _content(self, party: Party, session: bytes) -> bytes:
        return b"masks keys" + session + pack(">qq", party.round, self.number) + self.sharing + self.masking


def public_of(secret: bytes) -> bytes:
    """The X25519 public key of 32 secret bytes."""
    return loaded(secret).public_key().public_bytes_raw()


def loaded(secret: bytes) -> X25519PrivateKey:
    """A secret as the library computes with it; loading takes as long as an agreement."""
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    return X25519PrivateKey.from_private_bytes(secret)


def mask_key(secret: X25519PrivateKey, own: Announced, other: Announced, now: int) -> bytes:
    """The key of the mask between two clients in round `now`: the same from either side."""
    first, second = (own, other) if own.number < other.number else (other, own)
    context = pack(">qqq", now, first.number, second.number) + first.masking + second.masking
    return derived(_agreed(secret, other.masking), b"masks/pair", context)


def box_keys(secret: X25519PrivateKey, own: Announced, other: Announced, now: int) -> tuple[bytes, bytes]:
    """The keys of the boxes with shares that one client sends another in round `now`, and of those that come back."""
    shared = _agreed(secret, other.sharing)
    directions = ((own, other), (other, own))
    there, back = (pack(">qqq", now, a.number, b.number) + a.sharing + b.sharing for a, b in directions)
    return derived(shared, b"masks/shares", there), derived(shared, b"masks/shares", back)


def close_box(key: bytes, shares: bytes) -> bytes:
    """Two shares, 64 bytes, encrypted and authenticated: 80 bytes."""
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

    return ChaCha20Poly1305(key).encrypt(_NONCE, shares, None)


def open_box(key: bytes, box: bytes) -> bytes | None:
    """The shares; None: the box was changed, or never made for this key."""
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

    try:
        return ChaCha20Poly1305(key).decrypt(_NONCE, box, None)
    except InvalidTag:
        return None


def commitment(seed: bytes) -> bytes:
    """What a client publishes of the seed of its own mask: 32 bytes that bind it and do not give it away."""
    return derived(seed, b"masks/commitment")


def mark(share: bytes) -> bytes:
    """What the owner publishes of one share, so that a wrong one is found out: 16 bytes.

    A share is 256 uniform bits to all who hold fewer than the threshold, so that its hash can be searched by nobody.
    """
    return fingerprint(b"masks share" + share)


def confirmation(party: Party, session: bytes, holders: bytes, sharing: Iterable[int], survivors: bytes) -> bytes:
    """What a client signs: in this round, with these announced keys and sharers, exactly these rows are in the sum."""
    return (
        b"masks confirm"
        + session
        + pack(">q", party.round)
        + sha256(sha256(holders).digest() + sha256(numbers_to_bytes(sharing)).digest() + survivors).digest()
    )


def numbers_to_bytes(numbers: Iterable[int]) -> bytes:
    """Client numbers, ascending, 8 bytes each."""
    ordered = sorted(numbers)
    return pack(f">{len(ordered)}q", *ordered)


def numbers_from(content: bytes) -> list[int]:
    """The inverse.

    Raises:
      Corrupt: no whole number of numbers, or they do not ascend: none may be named twice.
    """
    if len(content) % _NUMBER.size:
        raise Corrupt(f"a list of {len(content)} bytes: expected {_NUMBER.size} a client")
    numbers = list(unpack(f">{len(content) // _NUMBER.size}q", content))
    _require_ascending(numbers)
    return numbers


def tagged(items: Iterable[tuple[int, bytes]]) -> bytes:
    """`(client, content)` pairs as one byte string, by number; all contents equally long."""
    return b"".join(_NUMBER.pack(number) + content for number, content in sorted(items))


def untagged(content: bytes, size: int) -> dict[int, bytes]:
    """The inverse, for contents of `size` bytes.

    Raises:
      Corrupt: the bytes are no such pairs, or the numbers do not ascend.
    """
    step = _NUMBER.size + size
    if len(content) % step:
        raise Corrupt(f"{len(content)} bytes: expected {step} a client")
    pairs = [(content[at : at + 8], content[at + 8 : at + step]) for at in range(0, len(content), step)]
    numbers = [_NUMBER.unpack(number)[0] for number, _ in pairs]
    _require_ascending(numbers)
    return dict(zip(numbers, (item for _, item in pairs), strict=True))


def _agreed(secret: X25519PrivateKey, public: bytes) -> bytes:
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey

    try:
        return secret.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:  # a point of small order: the secret would be the same for everybody
        raise Corrupt("an announced key is no key") from error


def _require_ascending(numbers: list[int]) -> None:
    if any(first >= second for first, second in pairwise(numbers)):
        raise Corrupt("clients are named twice or out of order")
