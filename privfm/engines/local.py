"""The default engine: all parties in this process, clients in batches."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import final

from privfm.checks import InvalidArgument, at_least
from privfm.contracts import (
    KEY_HOLDER,
    SERVER,
    Cast,
    Channel,
    Encoded,
    Engine,
    Exchange,
    Identity,
    Memory,
    Party,
    Sealer,
)
from privfm.defenses.channels.identities import new_identity, public_identity


class _Lost(Exception):
    """A client without a row to send."""


@final
class Roster:
    """Identities of all parties of a run, made when first asked; in a simulation one process plays everybody."""

    def __init__(self) -> None:
        self._identities: dict[int, Identity] = {}

    def identity(self, party: int) -> Identity:
        """A party's secret."""
        if party not in self._identities:
            self._identities[party] = new_identity()
        return self._identities[party]

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
    """One round in one process: every party's memory, and the rows that wait to be sent."""

    def __init__(self, engine: Local, channel: Channel, sealed: Sealer, cast: Cast) -> None:
        self._engine, self._channel, self._sealed, self._cast = engine, channel, sealed, cast
        self.server = engine.party(SERVER, cast.round)
        self._memories: dict[int, Memory] = defaultdict(dict)
        self._trained: set[int] = set()
        self._ready: dict[int, Encoded] = {}
        self._lost: set[int] = set()

    def __call__(self, stage: str, requests: Mapping[int, bytes]) -> Iterator[tuple[int, bytes]]:
        here = requests.keys() - self._cast.gone.get(stage, frozenset()) - self._lost
        groups = (self._cast.honest, self._cast.malicious, (KEY_HOLDER,))
        sizes = (self._engine.clients_per_batch, max(len(self._cast.malicious), 1), 1)  # attackers act together
        for group, size in zip(groups, sizes, strict=True):
            present = [party for party in group if party in here]
            for begin in range(0, len(present), size):
                batch = present[begin : begin + size]
                for party in batch:
                    try:
                        yield party, self._answer(party, stage, requests[party], batch)
                    except _Lost:
                        self._lost.add(party)

    def _answer(self, number: int, stage: str, request: bytes, batch: Sequence[int]) -> bytes:
        party, memory = self._engine.party(number, self._cast.round), self._memories[number]
        update = partial(self._take, number, batch)
        self._memories[number], reply = self._channel.answer(party, stage, memory, request, update)
        return reply

    def _take(self, party: int, batch: Sequence[int]) -> Encoded:
        if party == KEY_HOLDER:
            raise InvalidArgument("a key holder has no update")
        if party not in self._trained:
            missing = [client for client in batch if client not in self._trained]
            self._ready.update(self._sealed(missing))
            self._trained.update(missing)
        if party not in self._ready:
            raise _Lost
        return self._ready.pop(party)
