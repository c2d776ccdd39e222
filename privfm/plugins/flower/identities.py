"""Who is who in a Flower app: one secret a node, and a list of everybody's public identity that all of them hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import final

from privfm.checks import InvalidArgument, require
from privfm.contracts import Identity
from privfm.defenses.channels.identity_files import PUBLIC_BYTES, read_public, read_secrets


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
        wrong = [str(number) for number, public in self.pinned.items() if len(public) != PUBLIC_BYTES]
        require(not wrong, f"pinned of {', '.join(wrong)}: expected {PUBLIC_BYTES} bytes, as `public_identity` gives")

    def public(self, number: int) -> bytes:
        """What is pinned for a party.

        Raises:
          InvalidArgument: nothing is.
        """
        if number not in self.pinned:
            raise InvalidArgument(f"party {number} has no pinned identity; add it to the list that everybody holds")
        return self.pinned[number]


def load_parties(secrets: str | Path, public: str | Path) -> Parties:
    """A party's secret and everybody's public identities, from files.

    Args:
      secrets: as `make_secrets` made it, of this party alone.
      public: as `write_public` wrote it, or a folder of such files.

    Raises:
      InvalidArgument: one of them is no such file, or others may read the secret.
    """
    own = read_secrets(Path(secrets))
    require(len(own) == 1, f"secrets={str(secrets)!r} is of parties {sorted(own)}: a node of an app is one party")
    (identity,) = own.values()
    return Parties(identity, read_public(Path(public)))
