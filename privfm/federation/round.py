"""One round. The only place where the order of things is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf
from statistics import median
from time import perf_counter
from typing import Literal, final

import torch
from torch import Tensor

from privfm.checks import ClientFailed, CohortTooSmall, RoundFailed
from privfm.contracts import (
    ROOT,
    Broadcast,
    Cast,
    MatrixView,
    Outcome,
    Rule,
    View,
)
from privfm.defenses.directional_rules import with_root
from privfm.defenses.privacy.releases import BOUND, GaussianRelease, QuantileRelease
from privfm.defenses.views import EmptyView, WatchedView
from privfm.federation.canaries import remembered
from privfm.federation.federation import Federation, RunState
from privfm.federation.population import drawn_in_secret, eligible, lost
from privfm.federation.record import Record
from privfm.federation.spaces import Moved, Space
from privfm.federation.traffic import Traffic
from privfm.federation.way import Way


def play(federation: Federation, state: RunState) -> tuple[RunState, Record]:
    """One round: the next state, and what happened.

    A round that cannot finish leaves model, rule and optimizer as they were; clients remember that they trained. Under
    a plan it releases its noise all the same: why it failed may depend on data.
    """
    arm, now, d = federation.arm, state.round, federation.learner.d
    planted, width = federation.planted, d + arm.ghosts
    generator = federation.seeds.generator
    began = perf_counter()
    rule, space = federation.playing(now)
    state = _with_root(federation, state, space)
    drawn, cohort, state = _drawn(federation, state)
    cast = _cast(federation, state, cohort)
    way, channel = Way(federation, state, rule, space, cast), arm.wire
    intake = replace(arm.intake(width, rule, state.rule), weights=way.weights)
    nobody = EmptyView(intake.d)
    traffic = Traffic(federation.engine.open(channel, way.sealed, cast))

    def concluded(view: View) -> Conclusion:
        seen = space.seen(view, state.model)
        rule_state, outcome = rule.aggregate(state.rule, seen, generator("noise", now))
        step = replace(outcome, vector=outcome.vector[:d]) if arm.ghosts else outcome  # canaries' columns end here
        moved = space.moved(seen, step, state.optimizer, state.model, generator("adapters", now))
        after = replace(state, model=moved.model, rule=rule_state, optimizer=moved.optimizer)
        return Conclusion(after, seen, outcome, moved, outcome.vector)

    view, end, skipped, failure = WatchedView(nobody), Conclusion(state, nobody), "", ""
    try:
        view = WatchedView(channel.collect(cohort, intake, traffic), channel.server_learns_sum)
        if view.n < intake.least_answers:  # a channel that did not end the round by itself
            raise RoundFailed(f"least_answers={intake.least_answers}: {view.n} client(s) answered; nothing is released")
        if arm.weighting == "examples":
            view.client_weights = _shares(federation, view.ids)
            view.folded = sum(way.weights[client] for client in view.ids) if arm.folds else None
        end = concluded(view)
    except (RoundFailed, CohortTooSmall) as reason:
        failure = str(reason)
        if isinstance(rule, GaussianRelease | QuantileRelease) and rule.noise_multiplier > 0:
            end = replace(concluded(nobody), outcome=None)
        else:
            skipped = failure

    arrived = view if end.outcome is None else end.seen
    grouped = channel.rows(1) is not None
    known = None if grouped else way.malicious  # a group is nobody
    below = federation.uncounted_from
    kept, kept_malicious = end.counted("kept", known, below)
    clipped, clipped_malicious = end.counted("clipped", known, below)
    detected, detected_malicious = end.counted("detected", known, below)
    record = Record(
        round=now,
        sampled=sum(client < below for client in cohort),
        malicious=len(way.malicious),
        arrived=arrived.n if grouped else sum(client < below for client in arrived.ids),
        bad=arrived.bad,
        failed=None if federation.engine.elsewhere else len(way.failures),
        arrived_malicious=None if grouped else len(set(arrived.ids) & set(way.malicious)),
        kept=kept,
        kept_malicious=kept_malicious,
        clipped=clipped,
        clipped_malicious=clipped_malicious,
        detected=detected,
        detected_malicious=detected_malicious,
        empirical_kappa=None if end.outcome is None else way.empirical_kappa(end.seen, end.outcome.vector),
        dropped_by_projection=end.moved and end.moved.dropped,
        base_change_norm=end.moved and end.moved.base_change,
        clip_bound=float(state.rule[BOUND]) if BOUND in state.rule else None,
        skipped=skipped,
        failure=next(iter(way.failures.values()), failure),
        update_norm_median=median(way.norms) if way.norms else None,
        channel_error_relative_l2=way.channel_error(view),
        bytes_up=traffic.up,
        bytes_up_per_client=traffic.up_per_client,
        bytes_down_per_client=traffic.down_per_client + len(state.model) * torch.float32.itemsize,
        seconds_training=None if federation.engine.elsewhere else way.seconds,
        seconds_aggregation=perf_counter() - began - way.seconds,
        leaked=arm.server_attack.look(view.seen, state.model, now) if arm.server_attack else {},
    )
    in_a_row = state.skipped + 1 if skipped else 0
    audit = state.audit
    if planted is not None:  # behind means of groups nobody is seen to arrive
        there = cohort if grouped and end.outcome is not None else end.arrived
        audit = remembered(audit, planted, end.total(rule), drawn, there)
    after = replace(end.state, round=now + 1, clients=way.clients, attack=way.attack, skipped=in_a_row, audit=audit)
    return after, record


@final
@dataclass(frozen=True)
class Conclusion:
    """How a round ended.

    Attributes:
      state: the next one, but for what clients and attackers remember.
      seen: what the rule saw.
      outcome: what it returned; None where it was not asked, or under a plan could not be.
      moved: the step that followed.
      released: the rule's result, asked or not; None where there is none.
    """

    state: RunState
    seen: View
    outcome: Outcome | None = None
    moved: Moved | None = None
    released: Tensor | None = None

    @property
    def arrived(self) -> Sequence[int]:
        """Whose rows are in the result."""
        return () if self.outcome is None else self.seen.ids

    def total(self, rule: Rule) -> Tensor | None:
        """The released sum under a plan, else the rule's result; None where nothing was released."""
        if self.released is None or not isinstance(rule, GaussianRelease):
            return self.released
        return self.released.double() * rule.denominator

    def counted(
        self, marks: Literal["kept", "clipped", "detected"], malicious: Sequence[int] | None, below: float = inf
    ) -> tuple[int | None, int | None]:
        """How many rows of clients below an id the rule marked so, and how many of those poisoned; None: no clients."""
        found: Tensor | None = getattr(self.outcome, marks, None)
        if found is None:
            return None, None
        marked = {client for client, mark in zip(self.seen.ids, found.tolist(), strict=True) if mark and client < below}
        return len(marked), None if malicious is None else len(marked & set(malicious))


def _drawn(federation: Federation, state: RunState) -> tuple[tuple[int, ...], tuple[int, ...], RunState]:
    """Who was sampled, who of them is asked in this round, and the state that remembers it.

    The plan's bounds on participation hold here; canaries whose coin says so are not asked.
    """
    arm, now, population = federation.arm, state.round, federation.clients.size
    plan, planted = arm.plan, federation.planted
    if plan is not None and plan.source == "secure":
        drawn = drawn_in_secret(arm.sampling, population, now)
    else:
        drawn = arm.sampling.draw(population, federation.seeds.generator("cohort", now), now)
    cohort = drawn
    if planted is not None:
        drawn = (*drawn, *planted.drawn(arm.sampling, now, plan))
        cohort = planted.present(drawn)
    if plan is None or not plan.bounds_participation:
        return drawn, cohort, state
    cohort, joined = eligible(cohort, state.joined, now, plan.max_participations, plan.bands)
    return drawn, cohort, replace(state, joined=joined)


def _cast(federation: Federation, state: RunState, cohort: Sequence[int]) -> Cast:
    """Who poisons in this round, who is lost on the way, and what everybody is told."""
    arm, now, planted = federation.arm, state.round, federation.planted
    attackers = frozenset(arm.malicious)
    generator = federation.seeds.generator("attack schedule", now)
    malicious = arm.schedule.active(now, [client for client in cohort if client in attackers], generator)
    honest = [client for client in cohort if client not in set(malicious)]
    hidden = federation.clients.size if planted is not None and planted.canaries.ghost else inf
    broadcast = Broadcast(
        state.model,
        float(state.rule[BOUND]) if BOUND in state.rule else None,
        sum(client < hidden for client in cohort),
        _weights(federation, cohort) if arm.folds else {},
    )
    return Cast(now, honest, malicious, _gone(federation, cohort, now), broadcast)


def _gone(federation: Federation, cohort: Sequence[int], now: int) -> dict[str, frozenset[int]]:
    """Who is lost on the way, by stage."""
    arm, planted = federation.arm, federation.planted
    clients = [client for client in cohort if client < federation.clients.size]
    gone = lost(arm.dropout_rate, arm.channel.client_stages, clients, federation.seeds.generator("dropout", now))
    return gone if planted is None else planted.lost(gone, arm.dropout_rate, cohort, now)


def _shares(federation: Federation, ids: Sequence[int]) -> Tensor:
    """What part of the arrived clients' examples each holds, `(n,)` float64."""
    sizes = torch.tensor([len(federation.examples(client)) for client in ids], dtype=torch.float64)
    return sizes / sizes.sum()


def _weights(federation: Federation, cohort: Sequence[int]) -> dict[int, float]:
    """What each client multiplies its row by: its examples over the most that any of the cohort holds, at most 1."""
    sizes = {client: len(federation.examples(client)) for client in cohort}
    most = max(sizes.values(), default=1)
    return {client: size / most for client, size in sizes.items()}


def _with_root(federation: Federation, state: RunState, space: Space) -> RunState:
    """The server's own update of this round, where the rule has a place for it."""
    if ROOT not in state.rule or federation.root is None:
        return state
    trained = federation.learner.train(
        state.model, [federation.root], [federation.seeds.generator("root", state.round)]
    )
    if trained.failed:
        raise ClientFailed(f"the server's own training on its root data: {trained.failed[0]}")
    seen = space.seen(MatrixView(trained.rows), state.model)
    if seen.n < 1:
        raise ClientFailed("the server's own training on its root data gave an update that is not finite")
    return replace(state, rule=with_root(state.rule, seen.total()))
