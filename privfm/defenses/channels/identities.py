"""Who is who: long-term identities, keys that belong to one named pair, and signatures for what many receive.

An identity is one secret of 32 bytes. Its two public keys are *pinned*: everybody knows them beforehand (a file handed
out when the federation is set up, a registry), not from the server. Then a message proves who sent it, and a server
can neither speak for a client nor put its own key in place of the key holder's.

A key between two is derived from both identities, the direction, the round and the purpose (X25519, HKDF-SHA256), so
that a message cannot be sent back, sent on, or used in another round. Where one message goes to many, it is signed
(Ed25519): a shared key would let each receiver forge it for the others.

Sources: RFC 7748 (X25519), RFC 5869 (HKDF), RFC 8032 (Ed25519).
"""

from __future__ import annotations

from functools import lru_cache
from secrets import token_bytes
from struct import pack
from typing import TYPE_CHECKING

from privfm.checks import Corrupt, InvalidArgument, require
from privfm.contracts import Identity, Party

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

_SIZE = 32  # bytes of a key, RFC 7748 and RFC 8032


def new_identity() -> Identity:
    """A fresh one, from the operating system's generator."""
    return Identity(token_bytes(_SIZE))


def public_identity(identity: Identity) -> bytes:
    """What is pinned, 64 bytes: the Ed25519 and the X25519 public key."""
    signing, exchanging = _keys(identity.secret)
    return signing.public_key().public_bytes_raw() + exchanging.public_key().public_bytes_raw()


def sign(party: Party, content: bytes) -> bytes:
    """The party's signature, 64 bytes. `content` must say what it is and of which round."""
    return _keys(party.identity.secret)[0].sign(content)


def verify(public: bytes, content: bytes, signature: bytes) -> None:
    """Checks a signature against a pinned public identity.

    Raises:
      Corrupt: it is not by the holder of that identity, or not over this content.
    """
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        Ed25519PublicKey.from_public_bytes(public[:_SIZE]).verify(signature, content)
    except (InvalidSignature, ValueError) as error:
        raise Corrupt("a signature is not by the pinned identity, or what it signs was changed") from error


def pair_key(party: Party, other: int, purpose: bytes, *, sending: bool) -> bytes:
    """A key, 32 bytes, that only the party and `other` can compute, for one direction, round and purpose.

    Args:
      party: whose secret is used.
      other: the other one's number.
      purpose: what it is for; different purposes give unrelated keys.
      sending: whether the party sends under it, or receives.

    Raises:
      InvalidArgument: what is pinned is no identity: too short or long, or a key with which everybody agrees on the
        same secret.
    """
    own, pinned = public_identity(party.identity), party.pinned(other)
    require(len(pinned) == 2 * _SIZE, f"pinned({other}) has {len(pinned)} bytes: expected {2 * _SIZE}")
    sender, receiver = (party.number, other) if sending else (other, party.number)
    identities = own + pinned if sending else pinned + own
    where = pack(">qqq", party.round, sender, receiver)
    try:
        shared = _shared(party.identity.secret, pinned)
    except ValueError as error:  # a point of small order
        raise InvalidArgument(f"pinned({other}) holds no key: expected what `public_identity` gives") from error
    return derived(shared, purpose, where, identities)


def derived(secret: bytes, purpose: bytes, *context: bytes) -> bytes:
    """HKDF-SHA256 of a secret to 32 bytes, bound to a purpose and any context, each with its length."""
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    info = b"".join(pack(">Q", len(part)) + part for part in (b"privfm", purpose, *context))
    return HKDF(SHA256(), _SIZE, salt=None, info=info).derive(secret)


@lru_cache(maxsize=4096)
def _keys(secret: bytes) -> tuple[Ed25519PrivateKey, X25519PrivateKey]:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    signing = Ed25519PrivateKey.from_private_bytes(derived(secret, b"identity/sign"))
    return signing, X25519PrivateKey.from_private_bytes(derived(secret, b"identity/exchange"))


@lru_cache(maxsize=4096)
def _shared(secret: bytes, pinned: bytes) -> bytes:
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey

    return _keys(secret)[1].exchange(X25519PublicKey.from_public_bytes(pinned[_SIZE:]))
