"""Bytes on the wire."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
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
        self._replies: dict[str, list[int]] = defaultdict(list)
        self._requests: dict[str, list[int]] = defaultdict(list)

    def __call__(self, stage: str, requests: Mapping[int, bytes]) -> Iterator[tuple[int, bytes]]:
        self._requests[stage] += [len(request) for party, request in requests.items() if party != KEY_HOLDER]
        for party, reply in self._below(stage, requests):
            self.up += len(reply)
            if party != KEY_HOLDER:
                self._replies[stage].append(len(reply))
            yield party, reply

    @property
    def up_per_client(self) -> float:
        """Mean reply of a client, summed over the stages."""
        return _mean_by_stage(self._replies)

    @property
    def down_per_client(self) -> float:
        """Mean request to a client, summed over the stages."""
        return _mean_by_stage(self._requests)


def _mean_by_stage(sizes: Mapping[str, list[int]]) -> float:
    return sum(sum(stage) / len(stage) for stage in sizes.values() if stage)
