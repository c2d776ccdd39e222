"""How rows travel: a protocol in two pure halves, and what the server saw of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, final

from torch import Tensor

from privfm.checks import InvalidArgument
from privfm.contracts.transforms import Encoded, Intake
from privfm.contracts.views import Reveals, View

Memory = dict[str, bytes]
"""One party's protocol state. It lives for one round and is never written to a checkpoint."""

KEY_HOLDER: Final = -1
"""The party that is neither a client nor the server. Clients are numbered by their place in the population."""

Exchange = Callable[[str, Mapping[int, bytes]], Iterator[tuple[int, bytes]]]
"""`exchange(stage, {party: request})` yields `(party, reply)` as replies come, honest parties first.

All that an engine supplies. It streams, so that a server can fold sums; a missing reply is a drop-out.
"""

Update = Callable[[], Encoded]
"""Gives a party its one encoded row, at the stage that asks for it."""

Sealer = Callable[[Sequence[int]], Mapping[int, Encoded]]
"""The round's half of a batch of clients: trains them and walks their rows up to the channel, one row a client.

A client whose own training failed is missing from the result.
"""


@final
@dataclass(frozen=True)
class GramLimits:
    """What the key holder of a GRAM channel grants in one round.

    Attributes:
      max_references: rows of the server's own in the one Gram request; each of them measures every client's row.
      smallest_release: least effective number of clients `(sum w)^2 / sum w^2` in the one weighted sum.
    """

    max_references: int
    smallest_release: float


class Channel(ABC):
    """A protocol between clients, an optional key holder and the server.

    Class constants:
      reveals: what the server learns.
      client_stages: all stages of a client, in order.
      key_holder_stages: stages of the key holder, in order, each at most once.
      integers: it carries whole numbers only.
    """

    reveals = Reveals.SUM
    client_stages: tuple[str, ...] = ()
    key_holder_stages: tuple[str, ...] = ()
    integers = False

    @property
    def limits(self) -> GramLimits | None:
        """The key holder's limits; None where the server itself holds the rows or only a sum is revealed."""
        return None

    @property
    def most_clients(self) -> int | None:
        """Most clients whose rows a sum has head-room for; None: no such bound."""
        return None

    @property
    def largest_coordinate(self) -> float | None:
        """Absolute value beyond which a client refuses to send a coordinate; None: no such bound."""
        return None

    @property
    def grid(self) -> float | None:
        """Values are carried exactly where they are whole multiples of this; None: as float32."""
        return None

    @property
    def noises(self) -> bool:
        """Whether its key holder can add a plan's noise."""
        return False

    def with_noise(self, noise_multiplier: float, sensitivity: float) -> Channel:
        """The same channel, whose key holder adds Gaussian noise of deviation `noise_multiplier * sensitivity`.

        It does so before anybody else sees the sum, to which no client adds more than `sensitivity` in L2 norm.

        Raises:
          InvalidArgument: nobody but the server sees the sum.
        """
        raise InvalidArgument(f"{type(self).__name__} has no key holder that could add noise; use CKKS")

    @final
    def answer(self, party: int, stage: str, memory: Memory, request: bytes, update: Update) -> tuple[Memory, bytes]:
        """A party's half: the next memory, and the reply.

        Raises:
          InvalidArgument: the stage is repeated, out of order or another party's.
        """
        done = memory.get("done", b"").decode().split()
        if party == KEY_HOLDER:  # may be asked for less, never twice, never backwards
            open_stages = self.key_holder_stages[1 + self.key_holder_stages.index(done[-1]) if done else 0 :]
        else:
            open_stages = self.client_stages[len(done) : len(done) + 1]
        if stage not in open_stages:
            allowed = ", ".join(open_stages) or "none"
            raise InvalidArgument(f"stage={stage!r} is repeated, out of order or not this party's; open: {allowed}")
        memory, reply = self.reply(party, stage, memory, request, update)
        return {**memory, "done": " ".join([*done, stage]).encode()}, reply

    @abstractmethod
    def reply(self, party: int, stage: str, memory: Memory, request: bytes, update: Update) -> tuple[Memory, bytes]:
        """What a class writes for a party; the order of stages is already checked."""

    @abstractmethod
    def collect(self, cohort: Sequence[int], intake: Intake, exchange: Exchange) -> View:
        """The server's half: a view of decoded rows, of width `intake.d` even when nobody answered.

        Raises:
          RoundFailed: too few answers to finish.
        """


class Engine(ABC):
    """Carries messages between the server's half and the parties."""

    @abstractmethod
    def open(
        self,
        channel: Channel,
        sealed: Sealer,
        honest: Sequence[int],
        malicious: Sequence[int],
        gone: Mapping[str, frozenset[int]],
    ) -> Exchange:
        """One round's exchange.

        Args:
          channel: whose `answer` the parties play.
          sealed: gives encoded rows for a batch of clients.
          honest: clients that are asked in batches.
          malicious: clients that act together, as one batch, after the honest.
          gone: simulated drop-outs, by the stage at which they are lost.
        """


@final
@dataclass(frozen=True)
class WireView:
    """What the server received in one round, no more and no less.

    Attributes:
      reveals: of the channel.
      ids: clients that answered.
      vectors: every total and weighted sum `(d,)`, in order.
      grams: every Gram matrix `(n+m, n+m)`.
      rows: `(n, d)`, only where the channel reveals each.
    """

    reveals: Reveals
    ids: tuple[int, ...]
    vectors: tuple[Tensor, ...]
    grams: tuple[Tensor, ...]
    rows: Tensor | None
