"""Where a round's time and bytes go: by stage of the protocol and by role."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from time import process_time
from types import TracebackType
from typing import Self, final

from privfm.contracts import KEY_HOLDER, Exchange

START = "start"
"""What the server does before it asks anybody."""

OPEN = "open"
"""The stage at which clients open a sum that is theirs alone. In a deployment its reply stays where it is."""


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
