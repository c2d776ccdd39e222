"""Canaries in a run: who of them is in, what they send through clip, weight, codecs and channel, and what is kept."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final, final

import torch
from torch import Tensor

from privfm.checks import fraction
from privfm.contracts import Canaries, CanaryScene, Examples, Sampling, State
from privfm.defenses.privacy import DPPlan
from privfm.federation.population import drawn_in_secret
from privfm.randomness import Seeds


@final
@dataclass(frozen=True)
class Audit:
    """Measures a run's epsilon from below, in the run itself, and checks the mechanism behind it.

    Each canary is a client more, in the run if its coin says so. The union of clients and canaries is what is
    accounted: canaries are sampled as the plan samples clients, and the denominator does not know them.

    Args:
      canaries: whose traces are counted.
      confidence: of certified bounds.
      delta: at which epsilon is bounded where there is no plan; with one it is the plan's.
      claimed: what is claimed, where it is not the plan that is played: to see deliberate mistakes found.
    """

    canaries: Canaries
    confidence: float = 0.95
    delta: float = 1e-5
    claimed: DPPlan | None = None

    def __post_init__(self) -> None:
        fraction("confidence", self.confidence, one=False)
        fraction("delta", self.delta, one=False)

    def fitted(self, scene: CanaryScene, seeds: Seeds) -> Audit:
        """Ready for a run.

        Raises:
          InvalidArgument: the model or its data do not do for these canaries.
        """
        return replace(self, canaries=self.canaries.fitted(scene, seeds.generator("canaries", MADE)))


MADE: Final = 0
FLIPPED: Final = 1
DRAWN: Final = 2
"""Branches of the seeds' `canaries`: what they are made of, their coins, and who of them is sampled in a round."""

RELEASED: Final = "released"
SENT: Final = "sent"
UNITS: Final = "units"
"""What a run keeps for its audit, one row a round; see `Kept`."""


@final
@dataclass(frozen=True)
class Planted:
    """Canaries among the clients of one run. Their ids follow the clients': canary j is client `first + j`.

    Attributes:
      canaries: as fitted.
      first: number of real clients.
      included: `(count,)` bool, each canary's coin.
      seeds: of the run.
    """

    canaries: Canaries
    first: int
    included: Tensor
    seeds: Seeds

    @classmethod
    def of(cls, audit: Audit, clients: int, seeds: Seeds) -> Planted:
        """Flips the coins, the same in every round and after every interruption."""
        coins = torch.rand(audit.canaries.count, generator=seeds.generator("canaries", FLIPPED))
        return cls(audit.canaries, clients, coins < 0.5, seeds)

    @property
    def size(self) -> int:
        """Clients and canaries together."""
        return self.first + self.canaries.count

    def places(self, ids: Iterable[int]) -> list[int]:
        """The canaries among some clients, by their number."""
        return [client - self.first for client in ids if client >= self.first]

    def drawn(self, sampling: Sampling, now: int, plan: DPPlan | None, clients: tuple[int, ...]) -> tuple[int, ...]:
        """Clients and canaries that are sampled in round `now`, whatever the coins.

        Under a plan canaries are drawn apart, by the same sampling: Poisson of the union is just that, and the other
        schemes become stratified ones, in which every unit takes part as often. Without a plan the cohort is drawn from
        the union: its size is what was asked for.

        Args:
          sampling: of clients.
          now: the round.
          plan: that is played.
          clients: that were drawn.
        """
        if plan is None:
            return sampling.draw(self.size, self.seeds.generator("cohort", now), now)
        if plan.source == "secure":
            places = drawn_in_secret(sampling, self.canaries.count, now)
        else:
            places = sampling.draw(self.canaries.count, self.seeds.generator("canaries", DRAWN, now), now)
        return (*clients, *(self.first + place for place in places))

    def present(self, ids: Sequence[int]) -> tuple[int, ...]:
        """Of drawn clients those that send anything: an excluded canary's zeros add nothing to a sum."""
        return tuple(client for client in ids if client < self.first or bool(self.included[client - self.first]))

    def examples(self, client: int) -> Examples:
        """What a canary trains on."""
        return self.canaries.examples(client - self.first)

    def widened(self, rows: Tensor) -> Tensor:
        """Updates `(k, d)` of real clients -> `(k, d + columns)`: they leave ghost coordinates at zero."""
        columns = self.canaries.columns
        return torch.cat([rows, rows.new_zeros(len(rows), columns)], dim=1) if columns else rows


@final
@dataclass(frozen=True)
class Kept:
    """What an audit reads, round by round.

    Attributes:
      released: `(T, count)` float32, the released sum's inner products with the canaries' directions; no columns where
        canaries train on examples.
      sent: `(T, count)` bool, whose row arrived.
      units: `(T, 2)` int64, clients and canaries that were drawn.
    """

    released: Tensor
    sent: Tensor
    units: Tensor

    @classmethod
    def read(cls, state: State) -> Kept:
        """From a run's state."""
        return cls(state[RELEASED], state[SENT], state[UNITS])


def nothing_kept(planted: Planted) -> State:
    """Before the first round."""
    m = planted.canaries.count
    wide = 0 if planted.canaries.trained else m
    return {
        RELEASED: torch.zeros(0, wide),
        SENT: torch.zeros(0, m, dtype=torch.bool),
        UNITS: torch.zeros(0, 2, dtype=torch.int64),
    }


def remembered(
    state: State, planted: Planted, total: Tensor | None, drawn: Sequence[int], arrived: Sequence[int]
) -> State:
    """What is kept, with one round more.

    Args:
      state: of the rounds before.
      planted: the canaries.
      total: `(d + columns)`, what was released, times its denominator; None: nothing was.
      drawn: clients and canaries that were sampled, before coins and drop-outs.
      arrived: those whose rows are in the release.
    """
    canaries = planted.canaries
    sent = torch.zeros(1, canaries.count, dtype=torch.bool)
    if total is not None:
        sent[0, planted.places(arrived)] = True
    wide = state[RELEASED].shape[1]
    trace = torch.full((wide,), torch.nan) if total is None or not wide else canaries.observed(total).float().cpu()
    of_canaries = len(planted.places(drawn))
    units = torch.tensor([[len(drawn) - of_canaries, of_canaries]])
    return {
        RELEASED: torch.cat([state[RELEASED], trace[None]]),
        SENT: torch.cat([state[SENT], sent]),
        UNITS: torch.cat([state[UNITS], units]),
    }
