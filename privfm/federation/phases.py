"""Where a round's time and bytes go: by stage of the protocol and by role."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from time import process_time
from types import TracebackType
from typing import Self, TypeVar, final

import torch
from torch import Tensor

from privfm.checks import require
from privfm.contracts import KEY_HOLDER, Cast, Channel, Encoded, Engine, Exchange, Intake, Reveals, Transform, View
from privfm.defenses.transforms import Chain
from privfm.randomness import Seeds

START = "start"
"""What the server does before it asks anybody."""

OPEN = "open"
"""The stage at which clients open a sum that is theirs alone. In a deployment its reply stays where it is."""

Result = TypeVar("Result")


@final
@dataclass
class Phase:
    """One stage of one round, all its parties together. Grows while the stage runs.

    Attributes:
      stage: its name, or `START`.
      asked: clients that were sent a request.
      answered: clients that replied.
      client_seconds: of all clients together, one after the other.
      key_holder_seconds: of the key holder.
      server_seconds: of the server, from the opening of this stage to that of the next.
      up: bytes of all clients' replies together.
      down: bytes of all requests to clients together.
      key_holder_up: bytes of the key holder's reply.
      key_holder_down: bytes of the request to it.
    """

    stage: str
    asked: int = 0
    answered: int = 0
    client_seconds: float = 0.0
    key_holder_seconds: float = 0.0
    server_seconds: float = 0.0
    up: int = 0
    down: int = 0
    key_holder_up: int = 0
    key_holder_down: int = 0


@final
class Phases(Exchange):
    """An exchange that measures one round which passes through it.

    Time that passes while the exchange below is asked for its next reply is that of the party which replies (its half
    of the protocol, and the training or encoding it waits for); all other time is the server's, and belongs to the
    stage it opened last. So it holds for an engine that plays all parties in this process, one after the other; where
    parties work at the same time it measures waiting. A reply that never comes leaves its time with the next party.

    Use it as a context, around `collect` and whatever the server does with the view:

        with Phases(engine.open(channel, sealed, cast)) as phases:
            total = channel.collect(cohort, intake, phases).total()

    Cost: two readings of the clock a reply.

    Args:
      below: the exchange that reaches the parties.
      clock: gives seconds. By default those of this process's processor time, which others' work does not lengthen;
        time in other processes (`Party.processes`) is not in it: take `time.perf_counter` there.
    """

    def __init__(self, below: Exchange, clock: Callable[[], float] = process_time) -> None:
        self._below, self.server, self._clock = below, below.server, clock
        self._phases = {START: Phase(START)}
        self._now = self._phases[START]
        self._last = clock()

    def __enter__(self) -> Self:
        self._last = self._clock()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._now.server_seconds += self._passed()

    def __call__(self, stage: str, requests: Mapping[int, bytes]) -> Iterator[tuple[int, bytes]]:
        self._now.server_seconds += self._passed()
        phase = self._now = self._phases.setdefault(stage, Phase(stage))
        clients = [len(request) for party, request in requests.items() if party != KEY_HOLDER]
        phase.asked += len(clients)
        phase.down += sum(clients)
        phase.key_holder_down += len(requests.get(KEY_HOLDER, b""))
        return self._replies(phase, iter(self._below(stage, requests)))

    def _replies(self, phase: Phase, replies: Iterator[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
        while True:
            self._now.server_seconds += self._passed()
            found = next(replies, None)
            spent = self._passed()
            if found is None:
                if phase.asked:
                    phase.client_seconds += spent  # of those that were lost on the way
                else:
                    phase.key_holder_seconds += spent
                return
            party, reply = found
            if party == KEY_HOLDER:
                phase.key_holder_seconds += spent
                phase.key_holder_up += len(reply)
            else:
                phase.client_seconds += spent
                phase.answered += 1
                phase.up += len(reply)
            yield party, reply

    def _passed(self) -> float:
        """Seconds since this was last asked."""
        before, self._last = self._last, self._clock()
        return self._last - before

    @property
    def all(self) -> tuple[Phase, ...]:
        """Every stage, in the order in which the server opened them."""
        return tuple(self._phases.values())

    @property
    def client_seconds(self) -> float:
        """Of one client: the mean over those that answered, summed over the stages."""
        return sum(phase.client_seconds / max(phase.answered, 1) for phase in self.all)

    @property
    def key_holder_seconds(self) -> float:
        """Of the key holder, in all stages."""
        return sum(phase.key_holder_seconds for phase in self.all)

    @property
    def server_seconds(self) -> float:
        """Of the server, in all stages."""
        return sum(phase.server_seconds for phase in self.all)

    @property
    def up(self) -> float:
        """Bytes a client sends: the mean over those that answered, summed over the stages but for `OPEN`."""
        return sum(phase.up / max(phase.answered, 1) for phase in self.all if phase.stage != OPEN)

    @property
    def down(self) -> float:
        """Bytes a client is sent: the mean over those that were asked, summed over the stages."""
        return sum(phase.down / max(phase.asked, 1) for phase in self.all)


@final
@dataclass(frozen=True)
class Rehearsal:
    """One round of a channel with given rows instead of trained ones.

    Attributes:
      channel: what is rehearsed.
      rows: `(m, d)`; client i has row i modulo m.
      codecs: the wire format. Encoding is counted as the client's work, decoding as the server's.
      needs: of the rule.
      gone: clients that are lost, by the stage at which they are.
      clients: how many take part, numbered from 0; None: one for each row.
      seed: of the codec's rounding.
    """

    channel: Channel
    rows: Tensor
    codecs: Transform = field(default_factory=lambda: Chain(()))
    needs: Reveals = Reveals.SUM
    gone: Mapping[str, frozenset[int]] = field(default_factory=dict)
    clients: int | None = None
    seed: int = 0

    @property
    def cohort(self) -> range:
        """Who takes part."""
        return range(len(self.rows) if self.clients is None else self.clients)

    def exact_mean(self, ids: Collection[int]) -> Tensor:
        """Of the rows of these clients, `(d,)` float64: what the round should give, before any codec."""
        counts = torch.bincount(torch.tensor(list(ids), dtype=torch.int64) % len(self.rows), minlength=len(self.rows))
        total = torch.zeros(self.rows.shape[1], dtype=torch.float64)
        for row, count in zip(self.rows, counts.tolist(), strict=True):
            total += count * row.double()
        return total / len(ids)

    def play(
        self,
        engine: Engine,
        finish: Callable[[View], Result],
        clock: Callable[[], float] = process_time,
    ) -> tuple[Result, Phases]:
        """Plays the round.

        Args:
          engine: with clients one by one, or their encoding is counted as that of the first of a batch.
          finish: what the server does with the view, for instance `lambda view: view.total()`.
          clock: see `Phases`.

        Returns:
          What `finish` gives, and where time and bytes went.

        Raises:
          InvalidArgument: the codec keeps a state from round to round; there is one round here.
          RoundFailed: the round could not finish.
        """
        d = self.rows.shape[1]
        require(not self.codecs.init(d), f"codecs={self.codecs!r}: keeps a state, and a rehearsal has one round")
        exchange = engine.open(self.channel, self._sealed, Cast(0, self.cohort, gone=self.gone))
        intake = Intake(self.codecs, d, self.needs)
        with Phases(exchange, clock) as phases:
            result = finish(self.channel.collect(self.cohort, intake, phases))
        return result, phases

    def _sealed(self, clients: Sequence[int]) -> Mapping[int, Encoded]:
        return {client: self._encoded(client) for client in clients}

    def _encoded(self, client: int) -> Encoded:
        generator = Seeds(self.seed).generator("codecs", 0, client)
        return self.codecs.encode(self.rows[client % len(self.rows)][None], {}, [generator])[0]
