"""Bytes on the wire."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import final

from privfm.contracts import KEY_HOLDER, Exchange


@final
class Traffic(Exchange):
    """Counts the bytes of one round's exchange; the key holder's are kept out of the clients' share.

    Attributes:
      up: all replies together.
    """

    def __init__(self, below: Exchange) -> None:
        self._below, self.server, self.up = below, below.server, 0
        self._replies, self._requests = _Sizes(), _Sizes()

    def __call__(self, stage: str, requests: Mapping[int, bytes]) -> Iterator[tuple[int, bytes]]:
        self._requests.add(stage, (len(request) for party, request in requests.items() if party != KEY_HOLDER))
        for party, reply in self._below(stage, requests):
            self.up += len(reply)
            if party != KEY_HOLDER:
                self._replies.add(stage, [len(reply)])
            yield party, reply

    @property
    def up_per_client(self) -> float:
        """Mean reply of a client, summed over the stages."""
        return self._replies.mean

    @property
    def down_per_client(self) -> float:
        """Mean request to a client, summed over the stages."""
        return self._requests.mean


class _Sizes:
    """How many messages each stage had and how long they were together: the same memory for any number of them."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = defaultdict(int)
        self._totals: dict[str, int] = defaultdict(int)

    def add(self, stage: str, lengths: Iterable[int]) -> None:
        """Takes messages of a stage in."""
        for length in lengths:
            self._counts[stage] += 1
            self._totals[stage] += length

    @property
    def mean(self) -> float:
        """Bytes of a message, summed over the stages that had any."""
        return sum(self._totals[stage] / count for stage, count in self._counts.items())
