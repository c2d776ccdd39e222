"""Canaries in a run: who of them is in, what they send through clip, weight, codecs and channel, and what is kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, final

import torch
from torch import Tensor

from privfm.checks import fraction
from privfm.contracts import Canaries, CanaryScene, Examples, Sampling, State
from privfm.defenses.privacy import DPPlan
from privfm.federation.population import Poisson, drawn_in_secret, lost
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
LOST: Final = 3
"""Branches of the seeds' `canaries`: what they are made of, their coins, who of them is sampled, who drops out."""

RELEASED: Final = "released"
DRAWN_CANARIES: Final = "drawn"
SENT: Final = "sent"
CLIENTS: Final = "clients"
"""What a run keeps for its audit, one row a round; see `Kept`."""


@final
@dataclass(frozen=True)
class PlantedCanaries:
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
    def of(cls, audit: Audit, clients: int, seeds: Seeds) -> PlantedCanaries:
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

    def drawn(self, sampling: Sampling, now: int, plan: DPPlan | None) -> tuple[int, ...]:
        """Ids of the canaries that are sampled in round `now`, whatever their coins.

        They are drawn apart, so that clients are those of a run without an audit. Under a plan by its own sampling:
        Poisson of the union is just that, and the other schemes become stratified ones, in which every unit takes part
        as often. Without one each joins with the probability that a client has.

        Args:
          sampling: of clients.
          now: the round.
          plan: that is played.
        """
        own = sampling if plan is not None else Poisson(min(1.0, sampling.expected(self.first) / self.first))
        if plan is not None and plan.source == "secure":
            places = drawn_in_secret(own, self.canaries.count, now)
        else:
            places = own.draw(self.canaries.count, self.seeds.generator("canaries", DRAWN, now), now)
        return tuple(self.first + place for place in places)

    def present(self, ids: Sequence[int]) -> tuple[int, ...]:
        """Of drawn clients those that send anything; an excluded canary's zeros would add nothing to a sum."""
        return tuple(client for client in ids if client < self.first or bool(self.included[client - self.first]))

    def lost(
        self, gone: Mapping[str, frozenset[int]], rate: float, cohort: Sequence[int], now: int
    ) -> dict[str, frozenset[int]]:
        """Drop-outs with those of the canaries, which are drawn apart: clients are lost as without an audit."""
        own = lost(
            rate, tuple(gone), [i for i in cohort if i >= self.first], self.seeds.generator("canaries", LOST, now)
        )
        return {stage: clients | own[stage] for stage, clients in gone.items()}

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
      released: `(T, count)` float32, the released sum's inner products with the canaries' directions, NaN in a round
        that released nothing; no columns where canaries train on examples.
      drawn: `(T, count)` bool, who was sampled, whatever the coins and the bounds on participation.
      sent: `(T, count)` bool, whose row arrived.
      clients: `(T,)` int64, how many clients were sampled, likewise.
    """

    released: Tensor
    drawn: Tensor
    sent: Tensor
    clients: Tensor

    @classmethod
    def read(cls, state: State) -> Kept:
        """From a run's state."""
        return cls(state[RELEASED], state[DRAWN_CANARIES], state[SENT], state[CLIENTS])


def nothing_kept(planted: PlantedCanaries) -> State:
    """Before the first round."""
    m = planted.canaries.count
    wide = 0 if planted.canaries.trained else m
    return {
        RELEASED: torch.zeros(0, wide),
        DRAWN_CANARIES: torch.zeros(0, m, dtype=torch.bool),
        SENT: torch.zeros(0, m, dtype=torch.bool),
        CLIENTS: torch.zeros(0, dtype=torch.int64),
    }


def remembered(
    state: State, planted: PlantedCanaries, total: Tensor | None, drawn: Sequence[int], arrived: Sequence[int]
) -> State:
    """What is kept, with one round more.

    Args:
      state: of the rounds before.
      planted: the canaries.
      total: `(d + columns)`, what was released, times its denominator; None: nothing was.
      drawn: clients and canaries that were sampled, before coins, bounds on participation and drop-outs.
      arrived: those whose rows are in the release.
    """
    canaries = planted.canaries
    joined = torch.zeros(2, canaries.count, dtype=torch.bool)
    joined[0, planted.places(drawn)] = True
    if total is not None:
        joined[1, planted.places(arrived)] = True
    wide = state[RELEASED].shape[1]
    trace = torch.full((wide,), torch.nan) if total is None or not wide else canaries.observed(total).float().cpu()
    clients = torch.tensor([sum(client < planted.first for client in drawn)])
    found = {RELEASED: trace[None], DRAWN_CANARIES: joined[:1], SENT: joined[1:], CLIENTS: clients}
    return {name: torch.cat([state[name], value]) for name, value in found.items()}
