"""The default engine: all parties in this process, clients in batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from struct import pack
from typing import final

from privfm.checks import at_least
from privfm.contracts import SERVER, Cast, Channel, Engine, Exchange, Identity, Party, Sealer
from privfm.defenses.channels.identities import derived, new_identity, public_identity
from privfm.engines.hosted import Hosted


@final
class Roster:
    """Identities of all parties of a run; in a simulation one process plays everybody.

    Each is derived from one secret and the party's number when it is asked for, so that nothing is kept of the parties
    that took part, however many. Whoever has one party's identity learns nothing of another's; whoever has the secret
    has them all, and like them it shows in no `repr` and cannot be pickled.

    Cost: one HKDF-SHA256 a call.

    >>> roster = Roster()
    >>> roster.identity(3) == roster.identity(3) != roster.identity(4)
    True
    """

    def __init__(self) -> None:
        self._root = new_identity()  # nobody's own: what is derived from it is

    def identity(self, party: int) -> Identity:
        """A party's secret, the same whenever it is asked for."""
        return Identity(derived(self._root.secret, b"roster/identity", pack(">q", party)))

    def public(self, party: int) -> bytes:
        """What everybody has pinned for it."""
        return public_identity(self.identity(party))


@final
@dataclass(frozen=True)
class Local(Engine):
    """Trains a batch when a channel's stage asks its first client for an update, so one batch of rows is alive.

    Args:
      clients_per_batch: honest clients trained together. 1 gives the same bits as a client replayed alone.
      processes: how many a client may use to encrypt. Threads would not help: the encryption library holds Python's.
      roster: everybody's identity, fresh for each engine.
    """

    clients_per_batch: int = 16
    processes: int = 1
    roster: Roster = field(default_factory=Roster, repr=False, compare=False)

    def __post_init__(self) -> None:
        at_least("clients_per_batch", self.clients_per_batch, 1)
        at_least("processes", self.processes, 1)

    def open(self, channel: Channel, sealed: Sealer, cast: Cast) -> Exchange:
        return _LocalExchange(self, channel, sealed, cast)

    def party(self, number: int, now: int) -> Party:
        """A party's place in round `now`."""
        return Party(number, now, self.roster.identity(number), self.roster.public, self.processes)


@final
class _LocalExchange(Exchange):
    """One round in one process."""

    def __init__(self, engine: Local, channel: Channel, sealed: Sealer, cast: Cast) -> None:
        party = partial(engine.party, now=cast.round)
        self._hosted, self._gone = Hosted(channel, sealed, cast, party, engine.clients_per_batch), cast.gone
        self.server = engine.party(SERVER, cast.round)

    def __call__(self, stage: str, requests: Mapping[int, bytes]) -> Iterator[tuple[int, bytes]]:
        gone = self._gone.get(stage, frozenset())
        here = {party: request for party, request in requests.items() if party not in gone}
        for party, reply in self._hosted.replies(stage, here):
            if isinstance(reply, Exception):
                raise reply
            yield party, reply
