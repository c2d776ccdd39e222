"""How rows travel: a protocol in two pure halves, and what the server saw of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NoReturn, final

from torch import Tensor

from privfm.checks import InvalidArgument
from privfm.contracts.rules import Rule
from privfm.contracts.transforms import Encoded, Intake
from privfm.contracts.views import Reveals, View

Memory = dict[str, bytes]
"""One party's protocol state. It lives for one round and is never written to a checkpoint."""

KEY_HOLDER: Final = -1
"""The party that is neither a client nor the server. Clients are numbered by their place in the population."""

SERVER: Final = -2
"""The server, as a party."""


@final
@dataclass(frozen=True)
class Identity:
    """A party's long-term secret, 32 bytes. It shows in no `repr` and cannot be pickled or copied into a record."""

    secret: bytes = field(repr=False)

    def __reduce__(self) -> NoReturn:
        raise TypeError("an Identity is a secret: it is not pickled; hand its bytes over knowingly")


@final
@dataclass(frozen=True)
class Party:
    """Who plays a part in one round, and whom it believes.

    Attributes:
      number: a client, `KEY_HOLDER` or `SERVER`.
      round: as this party counts; messages of another round are refused.
      identity: its own.
      pinned: a party's number -> its public identity, known beforehand and not from the server.
      processes: how many it may use for encryption.
    """

    number: int
    round: int
    identity: Identity
    pinned: Callable[[int], bytes] = field(repr=False)
    processes: int = 1


class Exchange(ABC):
    """How the server reaches the parties of one round: all that an engine supplies.

    Attributes:
      server: the server's own place in the round.
    """

    server: Party

    @abstractmethod
    def __call__(self, stage: str, requests: Mapping[int, bytes]) -> Iterator[tuple[int, bytes]]:
        """`exchange(stage, {party: request})` yields `(party, reply)` as replies come, honest parties first.

        It streams, so that a server can fold sums; a missing reply is a drop-out.
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
      reveals: what rules may use of it.
      client_stages: all stages of a client, in order.
      row_stage: the one of them at which a client gives its row, so that it must have trained.
      key_holder_stages: stages of the key holder, in order, each at most once.
      integers: it carries whole numbers only.
      server_learns_sum: False where clients alone open the result, and the server never sees the model.
      decides: its key holder runs the rule (`with_rule`); the server learns weights, and no inner product.
    """

    reveals = Reveals.SUM
    client_stages: tuple[str, ...] = ()
    row_stage = "update"
    key_holder_stages: tuple[str, ...] = ()
    integers = False
    server_learns_sum = True
    decides = False

    @property
    def limits(self) -> GramLimits | None:
        """The key holder's limits; None where the server itself holds the rows or only a sum is revealed."""
        return None

    @property
    def least_clients(self) -> int:
        """Fewest clients with whose rows a round can finish."""
        return int(getattr(self, "smallest_release", 1))

    @property
    def most_clients(self) -> int | None:
        """Most clients whose rows a sum has head-room for; None: no such bound."""
        return None

    @property
    def most_summed(self) -> int | None:
        """Most rows in any one sum; None: no such bound."""
        return self.most_clients

    @property
    def largest_coordinate(self) -> float | None:
        """Absolute value beyond which a client refuses to send a coordinate; None: no such bound."""
        return None

    @property
    def modulus(self) -> int | None:
        """Sums of whole numbers are taken modulo this, into [-m/2, m/2); None: they are exact."""
        return None

    def rows(self, n: int) -> int | None:
        """Rows that a rule sees of n clients, where each is the mean of a random group; None: of single clients."""
        return None

    def unprotected(self, d: int) -> float:
        """Share of a client's d values that the server reads in the clear."""
        return float(self.reveals is Reveals.EACH and self.rows(1) is None)

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

    def with_floor(self, least: int) -> Channel:
        """The same channel, whose parties refuse by themselves to open a sum of fewer than `least` clients.

        A plan whose noise is shared out among clients needs it. Where nobody but the server opens sums, it is the
        server that counts: see `Intake.least_answers`.
        """
        return self

    def with_rule(self, rule: Rule) -> Channel:
        """The same channel, whose key holder runs the rule where it alone sees inner products."""
        return self

    @property
    @abstractmethod
    def learns(self) -> Mapping[str, str]:
        """Who learns what, by role: `server`, `key holder` where there is one, `clients`; `trust`: what for."""

    def facts(self, d: int, n: int) -> Mapping[str, str]:
        """What it says of itself before a run with n clients of d values: by name, in words and numbers."""
        return {}

    @final
    def answer(self, party: Party, stage: str, memory: Memory, request: bytes, update: Update) -> tuple[Memory, bytes]:
        """A party's half: the next memory, and the reply.

        A party that raises has ended its round: an engine forgets its memory, or it could be asked again.

        Raises:
          InvalidArgument: the stage is repeated, out of order or another party's.
        """
        done = memory.get("done", b"").decode().split()
        if party.number == KEY_HOLDER:  # may be asked for less, never twice, never backwards
            open_stages = self.key_holder_stages[1 + self.key_holder_stages.index(done[-1]) if done else 0 :]
        else:
            open_stages = self.client_stages[len(done) : len(done) + 1]
        if stage not in open_stages:
            allowed = ", ".join(open_stages) or "none"
            raise InvalidArgument(f"stage={stage!r} is repeated, out of order or not this party's; open: {allowed}")
        memory, reply = self.reply(party, stage, memory, request, update)
        return {**memory, "done": " ".join([*done, stage]).encode()}, reply

    @abstractmethod
    def reply(self, party: Party, stage: str, memory: Memory, request: bytes, update: Update) -> tuple[Memory, bytes]:
        """What a class writes for a party; the order of stages is already checked."""

    @abstractmethod
    def collect(self, cohort: Sequence[int], intake: Intake, exchange: Exchange) -> View:
        """The server's half: a view of decoded rows, of width `intake.d` even when nobody answered.

        Raises:
          RoundFailed: too few answers to finish.
        """


@final
@dataclass(frozen=True)
class Broadcast:
    """What the server tells clients of a round, beside the protocol's requests.

    Attributes:
      model: what they start from, `(d,)` and whatever else moves with it.
      bound: this round's clip, where it changes.
      cohort: how many take part.
      weights: what each client multiplies its row by, where it does.
    """

    model: Tensor
    bound: float | None = None
    cohort: int = 0
    weights: Mapping[int, float] = field(default_factory=dict)


@final
@dataclass(frozen=True)
class Cast:
    """Who takes part in one round, and what they are told.

    Attributes:
      round: counted from 0.
      honest: clients that are asked in batches.
      malicious: clients that act together, as one batch, after the honest.
      gone: simulated drop-outs, by the stage at which they are lost.
      broadcast: for clients that are elsewhere; None: they know.
    """

    round: int
    honest: Sequence[int]
    malicious: Sequence[int] = ()
    gone: Mapping[str, frozenset[int]] = field(default_factory=dict)
    broadcast: Broadcast | None = None


class Engine(ABC):
    """Carries messages between the server's half and the parties.

    Class constants:
      elsewhere: clients train on hosts of their own, which do not tell how long it took or whose training failed.
    """

    elsewhere = False

    @abstractmethod
    def open(self, channel: Channel, sealed: Sealer, cast: Cast) -> Exchange:
        """One round's exchange.

        Args:
          channel: whose `answer` the parties play.
          sealed: gives encoded rows for a batch of clients.
          cast: who takes part.
        """


@final
@dataclass(frozen=True)
class WireView:
    """What the server received in one round, no more and no less.

    Attributes:
      reveals: of the channel.
      ids: clients that answered.
      vectors: every total and weighted sum `(d,)`, in order; none where clients alone open them.
      grams: every Gram matrix `(n+m, n+m)`.
      rows: `(n, d)`, only where the channel reveals each; with NaN in what is encrypted, where it is so only in part.
      weights: of every decision that somebody else took on a Gram matrix, `(n+m,)`.
    """

    reveals: Reveals
    ids: tuple[int, ...]
    vectors: tuple[Tensor, ...]
    grams: tuple[Tensor, ...]
    rows: Tensor | None
    weights: tuple[Tensor, ...] = ()
