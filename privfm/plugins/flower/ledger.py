"""What a strategy remembers between rounds: the rule's memory, who took part how often, and what it is worth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, final

import torch
from torch import Tensor

from privfm.checks import CohortTooSmall, InvalidArgument, PrivacyBroken, RoundFailed, at_least, require
from privfm.contracts import Intake, Outcome, Rule, Sampling, State, View
from privfm.defenses.privacy import EpsilonRecord
from privfm.defenses.privacy.releases import BOUND, GaussianRelease, QuantileRelease
from privfm.defenses.views import EmptyView
from privfm.federation.population import eligible, no_participations
from privfm.plugins.central_plans import drawn
from privfm.plugins.flower.terms import Terms
from privfm.randomness import Seeds

_RULE: Final = "rule/"
_JOINED: Final = "joined/"
_COUNTERS: Final = ("round", "d", "skipped")


@final
class Ledger:
    """One run's rounds, without a word of Flower.

    Args:
      terms: what is played.
      population: number of clients, public; what a plan's denominator and sampling count with. None: without a plan.
      seed: of cohorts and of noise that may be drawn again.

    Attributes:
      round: the next one, from 0.
      d: width of an update; -1 before the first round.
      skipped: rounds in a row that left the model as it was.
    """

    def __init__(self, terms: Terms, population: int | None, seed: int) -> None:
        at_least("seed", seed, 0)
        if population is not None:
            at_least("population", population, 1)
        self._terms, self._population, self._seeds = terms, population, Seeds(seed)
        require(
            terms.plan is None or population is not None,
            "population=None: a plan hides each client among all, and divides by the expected cohort; say how many",
        )
        self.round, self.d, self.skipped = 0, -1, 0
        self._memory, self._joined = State(), State()

    def begin(self, d: int, cohort: Sampling, clients: int) -> None:
        """Before a round: the first one checks that everything fits together.

        Args:
          d: width of an update.
          cohort: who takes part, without a plan.
          clients: that are there.

        Raises:
          InvalidArgument: parts do not fit, or the model's width is another than before.
          PrivacyBroken: another round would cost more than the plan's budget.
        """
        require(self.d in (-1, d), f"the model has {d} learned values, that of earlier rounds had {self.d}")
        plan = self._terms.plan
        if self.d < 0:
            self._terms.refuse_problems(cohort, d, clients if self._population is None else self._population)
            self.d, self._memory = d, self.rule(d).init(d)
            if plan is not None and plan.bounds_participation:
                self._joined = no_participations(self._population or 0)
        if plan is not None and plan.budget is not None:
            after = plan.epsilon(self.round + 1, d=d)
            if after > plan.budget:
                number = self.round + 1
                raise PrivacyBroken(f"budget={plan.budget:g}: epsilon would be {after:.4g} after round {number}")

    def rule(self, d: int) -> Rule:
        """The rule, or the plan's release in its place."""
        return self._terms.arm().release(d, self._population or 1)

    def intake(self) -> Intake:
        """How the server opens what arrives in this round."""
        return self._terms.arm().intake(self.d, self.rule(self.d), self._memory)

    def clipped(self, rows: Tensor, layers: tuple[tuple[int, int], ...]) -> Tensor:
        """Updates `(k, d)` as the plan wants them before they are summed: clipped, and marked where the clip moves."""
        plan, rule = self._terms.plan, self.rule(self.d)
        if plan is None or not plan.noises_the_sum:
            return rows
        clip = plan.clip(layers, float(self._memory[BOUND]) if BOUND in self._memory else None)
        rows = rows if clip is None else clip.encode(rows, {}, [])[0].rows
        return rule.marked(rows, self._memory) if isinstance(rule, QuantileRelease) else rows

    def drawn(self) -> tuple[int, ...]:
        """The plan's cohort of this round, and in the books that it was asked. Each call draws anew what is secret."""
        plan, population = self._terms.plan, self._population
        if plan is None or population is None:
            raise InvalidArgument("plan=None: only a plan draws clients by itself")
        cohort = drawn(plan, population, self._seeds, self.round)
        if plan.bounds_participation:
            cohort, self._joined = eligible(cohort, self._joined, self.round, plan.max_participations, plan.bands)
        return cohort

    def sampled(self, cohort: Sampling, clients: int, purpose: str = "cohort") -> tuple[int, ...]:
        """Places of those who take part, of so many, without a plan; of its own seed, not of a global generator."""
        generator = self._seeds.generator("evaluation" if purpose == "evaluation" else "cohort", self.round)
        return cohort.draw(clients, generator, self.round)

    def conclude(self, view: View | RoundFailed | CohortTooSmall) -> Outcome | str:
        """Ends the round: what the rule returned, or why there is nothing.

        Under a plan a round always releases its noise: whether one fails may depend on data.

        Args:
          view: what was seen, or why the round could not be finished.
        """
        rule, generator = self.rule(self.d), self._seeds.generator("noise", self.round)
        self.round += 1
        ended: Outcome | str
        try:
            if isinstance(view, Exception):
                raise view
            self._memory, ended = rule.aggregate(self._memory, view, generator)
        except (RoundFailed, CohortTooSmall) as reason:
            ended = str(reason)
            if isinstance(rule, GaussianRelease | QuantileRelease) and rule.noise_multiplier > 0:
                generator = self._seeds.generator("noise", self.round - 1)
                width = self.d + isinstance(rule, QuantileRelease)
                self._memory, ended = rule.aggregate(self._memory, EmptyView(width), generator)
        return ended

    def records(self, after: int | None, d: int) -> tuple[EpsilonRecord, ...]:
        """What the plan says of so many rounds of d values, of those played when None; nothing without one."""
        plan, rounds = self._terms.plan, self.round if after is None else after
        if plan is None or (plan.integers is not None and d < 0):  # before the model is known
            return ()
        return plan.records(rounds, d=None if d < 0 else d)

    @property
    def state(self) -> State:
        """Everything to go on from, as tensors by name. Under a plan it is as secret as the noise."""
        counters = {name: torch.tensor(getattr(self, name)) for name in _COUNTERS}
        memory = {_RULE + name: value.clone() for name, value in self._memory.items()}
        return counters | memory | {_JOINED + name: value.clone() for name, value in self._joined.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from `state`.

        Raises:
          InvalidArgument: it is not of such a run.
        """
        require(set(_COUNTERS) <= state.keys(), f"state has entries {sorted(state)}: not a strategy's")
        d, plan = int(state["d"]), self._terms.plan
        expected = {_RULE + name: value for name, value in (self.rule(d).init(d) if d >= 0 else State()).items()}
        if plan is not None and plan.bounds_participation and d >= 0:
            expected |= {_JOINED + name: each for name, each in no_participations(self._population or 0).items()}
        found = {name: value for name, value in state.items() if name not in _COUNTERS}
        require(
            found.keys() == expected.keys(),
            f"state remembers {sorted(found)}, this strategy remembers {sorted(expected)}",
        )
        for name, value in expected.items():
            joined = name.startswith(_JOINED)  # a rule's memory may grow with the clients it has met
            require(not joined or found[name].shape == value.shape, f"{name}: another population than before")
        self.round, self.d, self.skipped = (int(state[name]) for name in _COUNTERS)
        self._memory, self._joined = _under(_RULE, found), _under(_JOINED, found)


def _under(prefix: str, state: Mapping[str, Tensor]) -> State:
    return {name.removeprefix(prefix): each.clone() for name, each in state.items() if name.startswith(prefix)}
