"""A wire for one round: calls `answer` for each party, loses and changes what a test wants, writes everything down."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from privfm.contracts import SERVER, Channel, Encoded, Identity, Intake, Memory, Party, Reveals, Transform
from privfm.defenses.channels.envelope import Header, Link
from privfm.defenses.channels.identities import new_identity, public_identity
from privfm.defenses.transforms import Chain

PLAIN = Chain(())


def _unchanged(party: int, reply: bytes) -> bytes:
    return reply


class Roster:
    """Everybody's identity, as a simulation would hold them."""

    def __init__(self) -> None:
        self._made: dict[int, Identity] = {}

    def party(self, number: int, now: int = 0) -> Party:
        return Party(number, now, self._made.setdefault(number, new_identity()), self.public)

    def public(self, number: int) -> bytes:
        return public_identity(self.party(number).identity)

    def opened(self, message: bytes, sender: int, receiver: int = SERVER, now: int = 0) -> tuple[Header, list[bytes]]:
        """Header and parts of a message, as its receiver opens it."""
        return Link(self.party(receiver, now), sender).open(message)

    def sealed(
        self, header: Header, parts: Sequence[bytes], sender: int, receiver: int = SERVER, now: int = 0
    ) -> bytes:
        """A message as its sender seals it: what a malicious client may say in its own name."""
        return Link(self.party(sender, now), receiver).seal(replace(header, parts=len(parts)), parts)


ROSTER = Roster()


@dataclass
class Wire:
    channel: Channel
    rows: Mapping[int, Tensor | Encoded]
    lost: Mapping[str, set[int]] = field(default_factory=dict)
    change: Callable[[int, bytes], bytes] = _unchanged
    memories: dict[int, Memory] = field(default_factory=dict)
    sent: list[tuple[str, int, bytes]] = field(default_factory=list)
    received: list[tuple[str, int, bytes]] = field(default_factory=list)
    round: int = 0
    twice: Mapping[str, set[int]] = field(default_factory=dict)
    strangers: Mapping[str, int] = field(default_factory=dict)

    @property
    def server(self) -> Party:
        return ROSTER.party(SERVER, self.round)

    def __call__(self, stage: str, requests: Mapping[int, bytes]) -> Iterator[tuple[int, bytes]]:
        for party, request in requests.items():
            self.sent.append((stage, party, request))
            if party in self.lost.get(stage, set()):
                continue
            memory, reply = self.channel.answer(
                ROSTER.party(party, self.round),
                stage,
                self.memories.get(party, {}),
                request,
                lambda party=party: self.update(party),
            )
            self.memories[party] = memory
            self.received.append((stage, party, self.change(party, reply)))
            yield party, self.received[-1][2]
            if party in self.twice.get(stage, set()):
                yield party, self.received[-1][2]
            if stage in self.strangers:
                yield self.strangers[stage], self.received[-1][2]

    def replies(self, stage: str) -> dict[int, bytes]:
        """What came at a stage, by party."""
        return {party: content for at, party, content in self.received if at == stage}

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
def roster() -> Roster:
    return ROSTER


@pytest.fixture
def wire() -> type[Wire]:
    return Wire


@pytest.fixture
def gaussian() -> Callable[..., dict[int, Tensor]]:
    return _gaussian


@pytest.fixture
def intake() -> Callable[..., Intake]:
    return _intake
