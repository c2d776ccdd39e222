"""The default engine: all parties in this process, clients in batches."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import final

from privfm.checks import InvalidArgument, at_least
from privfm.contracts import KEY_HOLDER, Channel, Encoded, Engine, Exchange, Memory, Sealer


class _Lost(Exception):
    """A client without a row to send."""


@final
@dataclass(frozen=True)
class Local(Engine):
    """Trains a batch when a channel's stage asks its first client for an update, so one batch of rows is alive.

    Args:
      clients_per_batch: honest clients trained together. 1 gives the same bits as a client replayed alone.
    """

    clients_per_batch: int = 16

    def __post_init__(self) -> None:
        at_least("clients_per_batch", self.clients_per_batch, 1)

    def open(
        self,
        channel: Channel,
        sealed: Sealer,
        honest: Sequence[int],
        malicious: Sequence[int],
        gone: Mapping[str, frozenset[int]],
    ) -> Exchange:
        memories: dict[int, Memory] = defaultdict(dict)
        trained: set[int] = set()
        ready: dict[int, Encoded] = {}
        lost: set[int] = set()

        def take(party: int, batch: Sequence[int]) -> Encoded:
            if party == KEY_HOLDER:
                raise InvalidArgument("a key holder has no update")
            if party not in trained:
                missing = [client for client in batch if client not in trained]
                ready.update(sealed(missing))
                trained.update(missing)
            if party not in ready:
                raise _Lost
            return ready.pop(party)

        def exchange(stage: str, requests: Mapping[int, bytes]) -> Iterator[tuple[int, bytes]]:
            here = requests.keys() - gone.get(stage, frozenset()) - lost
            groups = (honest, malicious, (KEY_HOLDER,))
            sizes = (self.clients_per_batch, max(len(malicious), 1), 1)  # attackers act together
            for group, size in zip(groups, sizes, strict=True):
                present = [party for party in group if party in here]
                for begin in range(0, len(present), size):
                    batch = present[begin : begin + size]
                    for party in batch:
                        try:
                            memories[party], reply = channel.answer(
                                party, stage, memories[party], requests[party], partial(take, party, batch)
                            )
                        except _Lost:
                            lost.add(party)
                            continue
                        yield party, reply

        return exchange
