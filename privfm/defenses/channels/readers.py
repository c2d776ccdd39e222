"""One secret content for several named readers: encrypted once, its key wrapped for each of them.

It passes through the server, who can neither read nor change it.
"""

from __future__ import annotations

from collections.abc import Sequence
from secrets import token_bytes

from privfm.checks import Corrupt
from privfm.contracts import Party
from privfm.defenses.channels.identities import pair_key

_NONCE = 12  # bytes, RFC 8439


def sealed_for(party: Party, readers: Sequence[int], content: bytes, purpose: bytes) -> tuple[bytes, list[bytes]]:
    """The content under a fresh key, and that key under the one that the party shares with each reader.

    Args:
      party: the sender.
      readers: party numbers.
      content: as long as it likes; the result is 28 bytes longer, and each wrapped key has 60.
      purpose: what it is for; the reader must say the same.

    Source: ChaCha20-Poly1305, RFC 8439, with random nonces: no key is used more than a few times.
    """
    key = token_bytes(32)
    box = _encrypted(key, content, purpose)
    return box, [_encrypted(pair_key(party, reader, purpose, sending=True), key, purpose) for reader in readers]


def opened_from(party: Party, sender: int, box: bytes, wrapped: bytes, purpose: bytes) -> bytes:
    """What `sealed_for` sealed for this party.

    Raises:
      Corrupt: it was not sealed by the sender for this party, round and purpose, or was changed on the way.
    """
    key = _decrypted(pair_key(party, sender, purpose, sending=False), wrapped, purpose)
    return _decrypted(key, box, purpose)


def _encrypted(key: bytes, content: bytes, purpose: bytes) -> bytes:
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

    nonce = token_bytes(_NONCE)
    return nonce + ChaCha20Poly1305(key).encrypt(nonce, content, purpose)


def _decrypted(key: bytes, sealed: bytes, purpose: bytes) -> bytes:
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

    try:
        return ChaCha20Poly1305(key).decrypt(sealed[:_NONCE], sealed[_NONCE:], purpose)
    except (InvalidTag, ValueError) as error:
        raise Corrupt("a secret content is not for this party and round, or was changed on the way") from error
