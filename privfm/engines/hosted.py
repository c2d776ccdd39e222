"""The parties that one process plays: in a simulation all of them, on a host of a real federation its own."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import final

from privfm.checks import InvalidArgument
from privfm.contracts import KEY_HOLDER, Cast, Channel, Encoded, Memory, Party, Sealer


class Lost(Exception):
    """A client without a row to send."""


@final
class Hosted:
    """One round's half of the parties in this process: their memories, and the rows that wait to be sent.

    Clients are trained in batches when a channel's stage asks the first of a batch for its row, so that one batch of
    rows is alive.

    Args:
      channel: whose `answer` they play.
      sealed: gives encoded rows for a batch of clients.
      cast: who takes part, in the order in which they answer.
      party: a number -> its place in the round.
      clients_per_batch: honest clients trained together; attackers act together, all of them.

    Attributes:
      memories: of every party, for this round.
      lost: clients that had no row to send.
    """

    def __init__(
        self, channel: Channel, sealed: Sealer, cast: Cast, party: Callable[[int], Party], clients_per_batch: int
    ) -> None:
        self._channel, self._sealed, self._cast, self._party = channel, sealed, cast, party
        self._clients_per_batch = clients_per_batch
        self.memories: dict[int, Memory] = defaultdict(dict)
        self.lost: set[int] = set()
        self._trained: set[int] = set()
        self._ready: dict[int, Encoded] = {}

    def replies(self, stage: str, requests: Mapping[int, bytes]) -> Iterator[tuple[int, bytes | Exception]]:
        """`(party, reply)` of everybody here that is asked and not lost, honest clients first.

        Where a party raises, what it raised stands in its reply's place: the caller decides what that means.
        """
        here = requests.keys() - self.lost
        for batch in batches(self._cast, here, self._clients_per_batch):
            for party in batch:
                try:
                    yield party, self._answer(party, stage, requests[party], batch)
                except Lost:
                    self.lost.add(party)

    def _answer(self, number: int, stage: str, request: bytes, batch: Sequence[int]) -> bytes | Exception:
        update = partial(self._take, number, batch)
        party, memory = self._party(number), self.memories[number]
        try:
            self.memories[number], reply = self._channel.answer(party, stage, memory, request, update)
        except Lost:
            raise
        except Exception as reason:
            return reason
        return reply

    def _take(self, party: int, batch: Sequence[int]) -> Encoded:
        if party == KEY_HOLDER:
            raise InvalidArgument("a key holder has no update")
        if party not in self._trained:
            missing = [client for client in batch if client not in self._trained]
            self._ready.update(self._sealed(missing))
            self._trained.update(missing)
        if party not in self._ready:
            raise Lost
        return self._ready.pop(party)


def batches(cast: Cast, here: frozenset[int] | set[int], clients_per_batch: int) -> Iterator[list[int]]:
    """Who of `here` acts together, in the order in which everybody answers."""
    groups = (cast.honest, cast.malicious, (KEY_HOLDER,))
    sizes = (clients_per_batch, max(len(cast.malicious), 1), 1)  # attackers act together
    for group, size in zip(groups, sizes, strict=True):
        present = [party for party in group if party in here]
        for begin in range(0, len(present), size):
            yield present[begin : begin + size]
