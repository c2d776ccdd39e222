"""What stays the same for a whole run, and what a round changes."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from math import inf
from typing import final

from torch import Tensor

from privfm.contracts import Clients, Engine, Examples, Learner, Rule, State, UpdateAttack
from privfm.federation.arm import Arm
from privfm.federation.canaries import PlantedCanaries
from privfm.federation.client_states import ClientStates
from privfm.federation.spaces import Space
from privfm.randomness import Seeds


@final
@dataclass(frozen=True)
class Federation:
    """What stays the same for a whole run.

    Attributes:
      arm: what is played.
      learner: trains and evaluates.
      clients: their data.
      seeds: of every random draw.
      engine: carries messages.
      strict: raise when a client's training does.
      root: the server's own examples, for rules that compare clients with its update.
    """

    arm: Arm
    learner: Learner
    clients: Clients
    seeds: Seeds
    engine: Engine
    strict: bool = False
    root: Examples | None = None

    @cached_property
    def planted(self) -> PlantedCanaries | None:
        """The canaries of an audited run."""
        audit = self.arm.audit
        return None if audit is None else PlantedCanaries.of(audit, self.clients.size, self.seeds)

    @property
    def uncounted_from(self) -> float:
        """Id from which on clients are canaries that no record counts: those that send rows of their own."""
        audit = self.arm.audit
        return inf if audit is None or audit.canaries.trained else self.clients.size

    @property
    def parties(self) -> int:
        """Clients and canaries."""
        return self.clients.size if self.planted is None else self.planted.size

    def playing(self, now: int) -> tuple[Rule, Space]:
        """The rule of round `now`, and what it works on."""
        arm, learner = self.arm, self.learner
        active = arm.active(now, learner.adapters)
        rule = arm.release(learner.d + arm.ghosts, self.clients.size, active)
        return rule, arm.space(learner.d, learner.adapters)

    def fresh_attack(self) -> State:
        """What the attackers share before the first round."""
        attack = self.arm.attack
        return attack.init(self.learner.d) if isinstance(attack, UpdateAttack) else {}

    def examples(self, client: int) -> Examples:
        """One client's, or one canary's."""
        planted = self.planted if client >= self.clients.size else None
        return self.clients.examples(client) if planted is None else planted.examples(client)


@final
@dataclass(frozen=True)
class RunState:
    """What a round changes: all of a checkpoint. There is no generator state: seeds are named by their path."""

    round: int
    model: Tensor  # as clients receive it
    rule: State
    optimizer: State
    clients: ClientStates
    attack: State  # what the attackers share
    joined: State  # how often clients took part, where the plan bounds it
    audit: State = field(default_factory=dict)  # what an audit has seen so far
    skipped: int = 0  # rounds in a row, up to now
