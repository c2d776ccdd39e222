"""Files of who is who: secrets, one file a host, and one public file that everybody has beforehand."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final, final

from privfm.checks import InvalidArgument, require
from privfm.contracts import Identity
from privfm.defenses.channels.identities import new_identity, public_identity

PUBLIC: Final = "identities"
"""Name of the folder of public files, in a Flower app's folder: one a host, by any name."""

_SECRET_BYTES: Final = 32
_PUBLIC_BYTES: Final = 64


@final
class Pinned:
    """Public identities from the files of a folder: a party's number -> 64 bytes.

    Args:
      path: of a folder of files that `write_public` made, or of one such file.

    Raises:
      InvalidArgument: there is none, or two files say different things of one party.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._known = path, dict[int, bytes]()
        files = sorted(path.glob("*.json")) if path.is_dir() else [path]
        require(bool(files), f"{path} holds no public identities; every host makes its own: privfm flower-identity")
        for file in files:
            for party, key in _read(file, _PUBLIC_BYTES).items():
                require(self._known.setdefault(party, key) == key, f"{path}: two identities of party {party}")

    def __call__(self, party: int) -> bytes:
        require(party in self._known, f"{self._path} pins no party {party}; add its public identity, out of band")
        return self._known[party]


def write_public(path: Path, public: Mapping[int, bytes]) -> None:
    """Writes what everybody pins: nothing of it is secret."""
    path.write_text(json.dumps({str(party): key.hex() for party, key in public.items()}, indent=0), encoding="utf-8")


def make_secrets(path: Path, parties: Iterable[int]) -> dict[int, bytes]:
    """Fresh identities of a host's parties, into a file that its owner alone can read; returns the public halves.

    Raises:
      InvalidArgument: there is such a file already; an identity is not overwritten.
    """
    own = {party: new_identity() for party in parties}
    text = json.dumps({str(party): identity.secret.hex() for party, identity in own.items()})
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as reason:
        raise InvalidArgument(
            f"{path} is there already, and holds identities; choose another, or remove it"
        ) from reason
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
    return {party: public_identity(identity) for party, identity in own.items()}


def read_secrets(path: Path) -> dict[int, Identity]:
    """The identities of a host's parties.

    Raises:
      InvalidArgument: there is no such file, others may read it, or it is another.
    """
    require(path.is_file(), f"secrets={path} is not a file; it is made where the app is, and handed to each host")
    mode = path.stat().st_mode & 0o077
    require(mode == 0, f"secrets={path} can be read by others (mode {path.stat().st_mode & 0o777:o}); chmod 600")
    return {party: Identity(secret) for party, secret in _read(path, _SECRET_BYTES).items()}


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
