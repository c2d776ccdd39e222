"""What a server receives in one round of an arm: for attacks that are run by hand, on the real thing."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

from torch import Tensor

from privfm.checks import RoundFailed
from privfm.contracts import ServerAttack, WireView
from privfm.federation.federation import Federation, RunState
from privfm.federation.loop import start
from privfm.federation.round import play


@final
@dataclass(frozen=True)
class Glimpse:
    """One round as the server saw it.

    Attributes:
      wire: what it received.
      model: what it had sent, `(d,)`.
      after: the run's state after the round.
    """

    wire: WireView
    model: Tensor
    after: RunState


class _Kept(ServerAttack):
    """Keeps what it sees."""

    def __init__(self) -> None:
        self.wire: WireView | None = None

    def look(self, wire: WireView, model: Tensor, now: int) -> dict[str, float]:
        self.wire = wire
        return {}


def glimpse(federation: Federation, state: RunState | None = None) -> Glimpse:
    """Plays one round as it would be played, with a server that keeps what it receives.

    Args:
      federation: its own server attack is not asked.
      state: to go on from; None: the first round.

    Raises:
      InvalidArgument: the arm's parts do not fit together.
      RoundFailed: the round could not finish.
    """
    kept = _Kept()
    watched = replace(federation, arm=replace(federation.arm, server_attack=kept))
    before = start(watched) if state is None else state
    after, record = play(watched, before)
    if record.skipped or kept.wire is None:
        raise RoundFailed(record.skipped or "nothing arrived")
    if not kept.wire.ids and record.failure:
        raise RoundFailed(record.failure)
    return Glimpse(kept.wire, before.model, after)
