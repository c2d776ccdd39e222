"""A wire for one round: calls `answer` for each party, loses and changes what a test wants, writes everything down."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from privfm.contracts import Channel, Encoded, Intake, Memory, Reveals, Transform
from privfm.defenses.transforms import Chain

PLAIN = Chain(())


def _unchanged(party: int, reply: bytes) -> bytes:
    return reply


@dataclass
class Wire:
    channel: Channel
    rows: Mapping[int, Tensor | Encoded]
    lost: Mapping[str, set[int]] = field(default_factory=dict)
    change: Callable[[int, bytes], bytes] = _unchanged
    memories: dict[int, Memory] = field(default_factory=dict)
    sent: list[tuple[str, int, bytes]] = field(default_factory=list)
    received: list[tuple[str, int, bytes]] = field(default_factory=list)

    def __call__(self, stage: str, requests: Mapping[int, bytes]) -> Iterator[tuple[int, bytes]]:
        for party, request in requests.items():
            self.sent.append((stage, party, request))
            if party in self.lost.get(stage, set()):
                continue
            memory, reply = self.channel.answer(
                party, stage, self.memories.get(party, {}), request, lambda party=party: self.update(party)
            )
            self.memories[party] = memory
            self.received.append((stage, party, self.change(party, reply)))
            yield party, self.received[-1][2]

    def update(self, party: int) -> Encoded:
        row = self.rows[party]
        return row if isinstance(row, Encoded) else Encoded(row[None], {})


def _gaussian(n: int, d: int, seed: int = 0) -> dict[int, Tensor]:
    """n rows of L2 norm 1 by client; ids are neither dense nor sorted."""
    rows = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    return {3 * (n - i): row / row.norm() for i, row in enumerate(rows)}


def _intake(d: int, needs: Reveals = Reveals.SUM, codecs: Transform = PLAIN, max_norm: float = float("inf")) -> Intake:
    return Intake(codecs, d, needs, max_norm)


@pytest.fixture
def wire() -> type[Wire]:
    return Wire


@pytest.fixture
def gaussian() -> Callable[..., dict[int, Tensor]]:
    return _gaussian


@pytest.fixture
def intake() -> Callable[..., Intake]:
    return _intake
