"""Who is who in a federation: one secret a party, and a list of everybody's public identity that all of them hold."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, final

from privfm.checks import InvalidArgument, require
from privfm.contracts import KEY_HOLDER, SERVER, Identity
from privfm.defenses.channels.identities import new_identity, public_identity

_SECRET, _PUBLIC = 32, 64  # bytes of an identity and of what is pinned of it
_NAMES: Final = {KEY_HOLDER: "key-holder", SERVER: "server"}


@final
@dataclass(frozen=True)
class Parties:
    """One party's secret and what it has pinned of everybody else, known beforehand and not from the server.

    Args:
      own: its identity.
      pinned: number -> public identity (64 bytes), of all parties: clients, `SERVER` and `KEY_HOLDER`.

    Raises:
      InvalidArgument: what is pinned is no identity.
    """

    own: Identity
    pinned: Mapping[int, bytes] = field(repr=False)

    def __post_init__(self) -> None:
        wrong = [_name(number) for number, public in self.pinned.items() if len(public) != _PUBLIC]
        require(not wrong, f"pinned of {', '.join(wrong)}: expected {_PUBLIC} bytes each, as `public_identity` gives")

    def public(self, number: int) -> bytes:
        """What is pinned for a party.

        Raises:
          InvalidArgument: nothing is.
        """
        if number not in self.pinned:
            raise InvalidArgument(f"{_name(number)} has no pinned identity; add it to the list that everybody holds")
        return self.pinned[number]


def create_identity(path: str | Path) -> bytes:
    """Makes a party's secret on its own host, readable by its user only, and returns what the others pin.

    Args:
      path: of the new file; an existing one is not touched.

    Raises:
      InvalidArgument: the file exists.
    """
    identity = new_identity()
    try:
        handle = os.open(Path(path), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as error:
        raise InvalidArgument(f"path={str(path)!r} exists; a secret is not overwritten") from error
    with os.fdopen(handle, "wb") as file:
        file.write(identity.secret)
    return public_identity(identity)


def save_pinned(path: str | Path, pinned: Mapping[int, bytes]) -> None:
    """Writes the list of public identities that everybody is handed, as JSON; nothing in it is secret."""
    lines = {_name(number): pinned[number].hex() for number in sorted(pinned)}
    Path(path).write_text(json.dumps(lines, indent=2) + "\n", encoding="utf-8")


def load_parties(secret: str | Path, pinned: str | Path) -> Parties:
    """A party's secret and the list of public identities, from files.

    Args:
      secret: as `create_identity` made it.
      pinned: as `save_pinned` wrote it.

    Raises:
      InvalidArgument: one of them is no such file.
    """
    content = Path(secret).read_bytes()
    require(len(content) == _SECRET, f"secret={str(secret)!r} has {len(content)} bytes: expected {_SECRET}")
    numbers = {name: number for number, name in _NAMES.items()}
    try:
        listed = json.loads(Path(pinned).read_text(encoding="utf-8"))
        found = {numbers[name] if name in numbers else int(name): bytes.fromhex(key) for name, key in listed.items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise InvalidArgument(f"pinned={str(pinned)!r} is no list of public identities: {error}") from error
    return Parties(Identity(content), found)


def _name(number: int) -> str:
    return _NAMES.get(number, str(number))
