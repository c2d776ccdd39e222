"""Rounds as a generator that a script iterates over."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import final

from privfm.checks import RoundFailed, at_least, require
from privfm.contracts import Metric
from privfm.federation.canaries import nothing_kept
from privfm.federation.client_states import ClientStates
from privfm.federation.compatibility import Problem, problems
from privfm.federation.federation import Federation, RunState
from privfm.federation.population import no_participations
from privfm.federation.record import Record
from privfm.federation.round import play

MAX_SKIPPED = 10
"""Rounds that may be skipped in a row before a run is given up: by then it is the setting, not chance."""


@final
@dataclass(frozen=True)
class Step:
    """One played round.

    Attributes:
      state: after it; what a checkpoint holds.
      record: what happened.
      metrics: of the validation split, in rounds that were evaluated.
      seconds_evaluation: spent on them.
    """

    state: RunState
    record: Record
    metrics: dict[str, Metric] | None
    seconds_evaluation: float


def public_sizes(federation: Federation) -> tuple[int, ...]:
    """How many examples each client holds, where the plan takes that as known to everybody; else empty."""
    plan, clients = federation.arm.plan, federation.clients
    if plan is None or not plan.makes_sizes_public:
        return ()
    return tuple(len(clients.examples(client)) for client in range(clients.size))


def refuse_problems(federation: Federation) -> None:
    """Raises `InvalidArgument` with everything that `compatibility.problems` lists, each with its way out."""
    arm, learner, clients = federation.arm, federation.learner, federation.clients
    sizes = public_sizes(federation)
    examples = sum(sizes) if sizes else None
    refusal = learner.refuses_private_gradients() if arm.plan is not None and arm.plan.unit == "example" else ""
    refuse(problems(arm, learner.d, clients.size, federation.root is not None, examples, refusal))


def refuse(found: Sequence[Problem]) -> None:
    """Raises `InvalidArgument` where anything was found."""
    require(not found, "; ".join(f"{problem.what} (instead: {problem.instead})" for problem in found))


def start(federation: Federation) -> RunState:
    """The state before the first round.

    Raises:
      InvalidArgument: the arm's parts do not fit together.
    """
    refuse_problems(federation)
    arm, learner, d = federation.arm, federation.learner, federation.learner.d
    rule, space = arm.release(d + arm.ghosts, federation.clients.size), arm.space(d, learner.adapters)
    planted = federation.planted
    model, width = space.start(learner.initial()), space.width
    bounded = arm.plan is not None and arm.plan.bounds_participation
    joined = no_participations(federation.parties) if bounded else {}
    audit = {} if planted is None else nothing_kept(planted)
    rule_state = rule.init(width + arm.ghosts)
    return RunState(
        0, model, rule_state, arm.optimizer.init(width), ClientStates({}), federation.fresh_attack(), joined, audit
    )


def rounds(
    federation: Federation,
    until: int,
    state: RunState | None = None,
    evaluate_every: int = 1,
    max_skipped: int = MAX_SKIPPED,
) -> Iterator[Step]:
    """Plays rounds up to number `until`.

    Args:
      federation: the run.
      until: rounds in all, those already in `state` included.
      state: to go on from; None starts anew.
      evaluate_every: rounds between evaluations on the validation split; the last round is always evaluated.
      max_skipped: rounds skipped in a row after which the run ends.

    Raises:
      InvalidArgument: the arm's parts do not fit together; raised before any training.
      RoundFailed: more than `max_skipped` rounds in a row were skipped.
    """
    at_least("until", until, 1)
    at_least("evaluate_every", evaluate_every, 1)
    fresh = start(federation)
    state = fresh if state is None else state
    if state.skipped > max_skipped:
        raise RoundFailed(f"the run was given up after {state.skipped} skipped rounds in a row")
    while state.round < until:
        state, record = play(federation, state)
        due = state.round % evaluate_every == 0 or state.round == until
        began = perf_counter()
        metrics = federation.learner.evaluate(state.model, "validation") if due else None
        yield Step(state, record, metrics, perf_counter() - began)
        if state.skipped > max_skipped:  # after the yield, so that a checkpoint knows and a resumed run ends as well
            why = "; ".join(part for part in (record.skipped, record.failure) if part)
            raise RoundFailed(f"{state.skipped} rounds in a row were skipped, the last because: {why}")
