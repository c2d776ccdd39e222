"""Files of who is who: secrets, one file a host, and public files that everybody has beforehand.

Both kinds are JSON, a party's number -> hexadecimal digits: 64 of them a secret, 128 a public identity.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final, final

from privfm.checks import InvalidArgument, require
from privfm.contracts import Identity
from privfm.defenses.channels.identities import new_identity, public_identity

PUBLIC_BYTES: Final = 64
"""Length of a public identity."""

_SECRET_BYTES: Final = 32
_MADE: Final = "every host makes its own: privfm flower-identity, or make_secrets"


def make_secrets(path: str | Path, parties: Iterable[int]) -> dict[int, bytes]:
    """Fresh identities of a host's parties, into a file that its owner alone can read; returns the public halves.

    Raises:
      InvalidArgument: there is such a file already; an identity is not overwritten.
    """
    own = {party: new_identity() for party in parties}
    text = json.dumps({str(party): identity.secret.hex() for party, identity in own.items()})
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as reason:
        raise InvalidArgument(f"{path} is there already; secrets are not overwritten: choose another file") from reason
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
    return {party: public_identity(identity) for party, identity in own.items()}


def read_secrets(path: Path) -> dict[int, Identity]:
    """The identities of a host's parties.

    Raises:
      InvalidArgument: there is no such file, others may read it, or it is another.
    """
    require(
        path.is_file(),
        f"secrets={path} is not a file; {_MADE}",
    )
    mode = path.stat().st_mode & 0o077
    require(mode == 0, f"secrets={path} can be read by others (mode {path.stat().st_mode & 0o777:o}); chmod 600")
    return {party: Identity(secret) for party, secret in _read(path, _SECRET_BYTES).items()}


def write_public(path: str | Path, public: Mapping[int, bytes]) -> None:
    """Writes what everybody pins: nothing of it is secret."""
    text = json.dumps({str(party): key.hex() for party, key in public.items()}, indent=0)
    Path(path).write_text(text, encoding="utf-8")


def read_public(path: Path) -> dict[int, bytes]:
    """Public identities from a file of `write_public`, or from all such files of a folder: party -> 64 bytes.

    Raises:
      InvalidArgument: there is none, it holds something else, or two files say different things of one party.
    """
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    require(
        bool(files),
        f"{path} holds no public identities; {_MADE}",
    )
    known = dict[int, bytes]()
    for file in files:
        for party, key in _read(file, PUBLIC_BYTES).items():
            require(known.setdefault(party, key) == key, f"{path}: two identities of party {party}")
    return known


@final
class Pinned:
    """A party's number -> its public identity, from files.

    Args:
      path: a file or a folder, as `read_public` takes it.

    Raises:
      InvalidArgument: as `read_public` does; when called: nothing is pinned of this party.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._known = path, read_public(path)

    def __call__(self, party: int) -> bytes:
        require(party in self._known, f"{self._path} pins no party {party}; add its public identity, out of band")
        return self._known[party]


def _read(path: Path, length: int) -> dict[int, bytes]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = {int(party): bytes.fromhex(key) for party, key in content.items()}
    except (OSError, ValueError, AttributeError, TypeError) as reason:
        raise InvalidArgument(f"{path} does not hold identities: {reason}") from reason
    wrong = sorted(party for party, key in found.items() if len(key) != length)
    require(
        not wrong, f"{path} does not hold identities of {length} bytes: party {wrong[:1]} has another; is it the file?"
    )
    return found
