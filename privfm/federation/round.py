"""One round. The only place where the order of things is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from statistics import median
from time import perf_counter
from typing import Final, Literal, final

import torch
from torch import Tensor

from privfm.blocks import Spread
from privfm.checks import ClientFailed, CohortTooSmall, RoundFailed
from privfm.contracts import (
    ROOT,
    Attack,
    Cast,
    Clients,
    DataAttack,
    Encoded,
    Engine,
    Examples,
    Knowledge,
    Knows,
    Learner,
    MatrixView,
    Outcome,
    Reveals,
    Rule,
    State,
    UpdateAttack,
    View,
)
from privfm.defenses.directional_rules import with_root
from privfm.defenses.privacy.releases import BOUND, GaussianRelease, QuantileRelease
from privfm.defenses.views import EmptyView, WatchedView
from privfm.federation.arm import Arm
from privfm.federation.canaries import PlantedCanaries, remembered
from privfm.federation.client_states import ClientStates
from privfm.federation.population import drawn_in_secret, eligible, lost
from privfm.federation.record import Record
from privfm.federation.spaces import Moved, Space
from privfm.federation.traffic import Traffic
from privfm.randomness import Seeds

DECLARED: Final = 10
"""Times the cap of examples that canaries declare: as far beyond it as ghosts are sent beyond the clip."""


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

    @property
    def planted(self) -> PlantedCanaries | None:
        """The canaries of an audited run."""
        audit = self.arm.audit
        return None if audit is None else PlantedCanaries.of(audit, self.clients.size, self.seeds)

    @property
    def uncounted_from(self) -> float:
        """Id from which on clients are canaries that no record counts: those that send rows of their own."""
        audit = self.arm.audit
        return inf if audit is None or audit.canaries.trained else self.clients.size

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


def play(federation: Federation, state: RunState) -> tuple[RunState, Record]:
    """One round: the next state, and what happened.

    A round that cannot finish leaves model, rule and optimizer as they were; clients remember that they trained. Under
    a plan it releases its noise all the same: why it failed may depend on data.
    """
    arm, learner, now, d = federation.arm, federation.learner, state.round, federation.learner.d
    planted, width = federation.planted, d + arm.ghosts
    generator = federation.seeds.generator
    began = perf_counter()
    active = arm.active(now, learner.adapters)
    rule, space = arm.release(width, federation.clients.size, active), arm.space(d, learner.adapters)
    state = _with_root(federation, state, space)
    drawn, cohort, state = _drawn(federation, state)
    gone = _gone(federation, cohort, now)
    way, channel = Way(federation, state, rule, space, cohort), arm.wire
    intake = replace(arm.intake(width, rule, state.rule), weights=way.weights)
    nobody = EmptyView(intake.d)
    traffic = Traffic(federation.engine.open(channel, way.sealed, Cast(now, way.honest, way.malicious, gone)))

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
        failed=len(way.failures),
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
        seconds_training=way.seconds,
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


@final
class Way:
    """The way of one update, up to the channel.

    Examples -> data attack -> training -> client steps -> update attack -> codecs. An update attack stands behind the
    client steps, because nobody can make an attacker clip, and before the codecs, because a dense row is no message
    of a sparse wire.

    Attributes:
      honest: ids of the cohort's clients that do not poison in this round.
      malicious: ids of those that do; they act as one batch.
      clients: states of clients as they will be after the round.
      attack: what the attackers will remember.
      weights: what each client multiplies its row by, where it does.
      norms: L2 norms of the updates as trained.
      failures: why a client's training raised.
      seconds: spent on it.
    """

    def __init__(
        self, federation: Federation, state: RunState, rule: Rule, space: Space, cohort: Sequence[int]
    ) -> None:
        arm, generator = federation.arm, federation.seeds.generator("attack schedule", state.round)
        attackers = frozenset(arm.malicious)
        self.malicious = arm.schedule.active(state.round, [i for i in cohort if i in attackers], generator)
        self.honest = [client for client in cohort if client not in set(self.malicious)]
        self.attack = state.attack
        self.clients, self.norms, self.failures, self.seconds = state.clients, list[float](), dict[int, str](), 0.0
        self._federation, self._state, self._rule, self._space = federation, state, rule, space
        level = arm.attack.needs if isinstance(arm.attack, UpdateAttack) else Knows.OWN
        planted = federation.planted
        ghosts = planted is not None and planted.canaries.ghost
        self._hidden_from = federation.clients.size if ghosts else inf  # attackers see no row that is not there
        seen = sum(client < self._hidden_from for client in cohort)
        self._known = Knowledge(level, seen, self._imagined, state.model[: federation.learner.d], rule)
        self.weights = _weights(federation, cohort) if arm.folds else {}
        plain = arm.plan is None and not arm.folds and arm.channel.rows(1) is None
        self._spread = Spread() if plain else None
        self._active = arm.active(state.round, federation.learner.adapters)
        self._layers = federation.learner.layers
        self._bound = float(state.rule[BOUND]) if BOUND in state.rule else None  # of this round's clip, where it moves
        self._sums = federation.arm.channel.reveals is Reveals.SUM  # elsewhere the server may clip what it opens
        self._planted = planted
        self._plain_sum = torch.zeros((), dtype=torch.float64)
        self._summed: set[int] = set()
        self._spread_over: set[int] = set()

    def sealed(self, asked: Sequence[int]) -> Mapping[int, Encoded]:
        """Encoded rows of a batch of clients, all honest or all malicious; those that failed are missing."""
        began = perf_counter()
        arm, seeds, now, d = self._federation.arm, self._federation.seeds, self._state.round, self._federation.learner.d
        attack = arm.attack if set(asked) & set(self.malicious) else None
        planted = self._planted if self._planted is not None and not self._planted.canaries.trained else None
        canaries = [] if planted is None else [client for client in asked if client >= planted.first]
        ids, rows = self._sent([client for client in asked if client not in set(canaries)], attack)
        if planted is not None:
            ids, rows = [*ids, *canaries], torch.cat([planted.widened(rows), self._planted_rows(planted, canaries)])
        encoded, _ = arm.codecs.encode(rows, {}, seeds.clients("codecs", now, ids))
        if attack is None and (self._known.level > Knows.OWN or self._spread is not None):
            decoded = arm.codecs.decode(encoded, rows.shape[1])[:, :d]
            shown = [place for place, client in enumerate(ids) if client < self._hidden_from]
            self._known.add(decoded[shown], [ids[place] for place in shown])
            if self._spread is not None:
                seen = self._space.seen(MatrixView(decoded), self._state.model)
                self._spread.add(seen.block(0, seen.d))
                self._spread_over |= set(ids)
        if self._sums:
            self._plain_sum = self._plain_sum + encoded.rows.double().sum(0)
            self._summed |= set(ids)
        self.seconds += perf_counter() - began
        return {
            client: Encoded(
                encoded.rows[k : k + 1],
                {name: side[k : k + 1] for name, side in encoded.side.items()},
                self.weights.get(client, 1.0),
            )
            for k, client in enumerate(ids)
        }

    def _sent(self, asked: Sequence[int], attack: Attack | None) -> tuple[list[int], Tensor]:
        """Clients whose training went well, and what they would send before the codecs, `(k, d)`."""
        arm, now = self._federation.arm, self._state.round
        ids, rows = self._trained(asked, attack)
        if attack is None or arm.attackers_take_steps:
            rows, self.clients = self._stepped(ids, rows, self.clients)
        if isinstance(attack, UpdateAttack) and ids:
            generator = self._federation.seeds.generator("attack", now)
            self.attack, rows = attack.bend(self._state.attack, rows, self._known, generator)
            if attack.obeys_chain:
                rows, _ = self._stepped(ids, rows, self._state.clients)
        return ids, self._guarded(ids, rows, not isinstance(attack, UpdateAttack) or attack.obeys_chain)

    def _planted_rows(self, planted: PlantedCanaries, ids: Sequence[int]) -> Tensor:
        """What canaries send of their own, `(k, d + columns)`: clipped, then weighted like clients with many rows.

        They declare more examples than any weight may count, so that weights by size alone would show.
        """
        plan, d = self._federation.arm.plan, self._federation.learner.d
        assert plan is not None  # `compatibility.problems` sees to it
        rows = plan.max_grad_norm * planted.canaries.rows(planted.places(ids), d)
        clip = plan.clip(((0, rows.shape[1]),))
        assert clip is not None
        encoded, _ = clip.encode(rows, {}, self._federation.seeds.clients("steps", self._state.round, ids))
        if plan.weight_cap is None:
            return encoded.rows
        return encoded.rows * plan.weights([DECLARED * plan.weight_cap] * len(ids))[:, None]

    def empirical_kappa(self, view: View, vector: Tensor) -> float | None:
        """See `Record.empirical_kappa`; a simulation knows the honest rows."""
        if self._spread is None or not self._spread_over <= set(view.ids):
            return None
        return self._spread.coefficient(vector)

    def channel_error(self, view: WatchedView) -> float | None:
        """See `Record.channel_error_relative_l2`; a simulation knows what was sent."""
        vectors, arm = view.vectors, self._federation.arm
        if arm.plan is not None and arm.plan.place == "key_holder":  # what came differs by the key holder's noise
            return None
        if not self._sums or not vectors or set(view.ids) != self._summed or not self._plain_sum.any():
            return None
        width = self._federation.learner.d + arm.ghosts
        plain = self._federation.arm.intake(width, self._rule, self._state.rule).total(self._plain_sum)
        return float((vectors[0].double() - plain).norm() / plain.norm())

    def _trained(self, asked: Sequence[int], attack: Attack | None) -> tuple[list[int], Tensor]:
        """Clients whose training went well, and their updates `(k, d)`."""
        federation, now = self._federation, self._state.round
        if not asked:
            return [], torch.zeros(0, federation.learner.d)
        examples = [federation.examples(client) for client in asked]
        if isinstance(attack, DataAttack):
            generators = [federation.seeds.generator("attack", now, client) for client in asked]
            examples = [attack.poison(own, one) for own, one in zip(examples, generators, strict=True)]
        generators = federation.seeds.clients("data order", now, asked)
        privacy = None if federation.arm.plan is None else federation.arm.plan.gradient_privacy(self._layers)
        if attack is not None and not isinstance(attack, DataAttack):
            privacy = None  # nobody can make an attacker protect anything
        trained = federation.learner.train(self._state.model, examples, generators, privacy, self._active)
        for place, reason in trained.failed.items():
            if federation.strict:
                raise ClientFailed(f"client {asked[place]}: {reason}")
            self.failures[asked[place]] = reason
        plan = federation.arm.plan
        if trained.failed and plan is not None and plan.unit == "client":  # who fails may depend on data
            places = torch.tensor(list(trained.failed))
            rows = trained.rows.index_fill(0, places, 0.0)
            self.norms += rows.norm(dim=1).tolist()
            return list(asked), rows
        good = [place for place in range(len(asked)) if place not in trained.failed]
        rows = trained.rows[good] if trained.failed else trained.rows
        self.norms += rows.norm(dim=1).tolist()
        return [asked[place] for place in good], rows

    def _stepped(self, ids: Sequence[int], rows: Tensor, before: ClientStates) -> tuple[Tensor, ClientStates]:
        steps = self._federation.arm.steps(self._layers, self._bound)
        own = before.stacked(ids, steps.init(rows.shape[1]))
        generators = self._federation.seeds.clients("steps", self._state.round, ids)
        encoded, after = steps.encode(rows, own, generators)
        return encoded.rows, before.updated(ids, after)

    def _guarded(self, ids: Sequence[int], rows: Tensor, obeys: bool) -> Tensor:
        """Rows as plan and weighting want them: with the client's weight, its own noise, and what else it reports.

        The first two are the client's to do, so that one who does not obey leaves them out; the last is the format.
        """
        plan, federation = self._federation.arm.plan, self._federation
        if obeys and self.weights and ids:
            rows = rows * torch.tensor([self.weights[client] for client in ids]).to(rows)[:, None]
        if plan is None or plan.unit == "example":
            return rows
        if obeys and plan.weight_cap is not None:
            rows = rows * plan.weights([len(federation.examples(client)) for client in ids])[:, None]
        if obeys and plan.place == "local":
            rows = plan.own_noise(rows, federation.seeds.clients("own noise", self._state.round, ids))
            if self._active is not None:  # what is not trained in this round is zero for everybody, and stays so
                rows = rows.masked_fill(~self._active.to(rows.device), 0.0)
        return self._rule.marked(rows, self._state.rule) if isinstance(self._rule, QuantileRelease) else rows

    def _imagined(self, rows: Tensor) -> Tensor:
        """What the rule, in its present state, would return: for adaptive attacks that may ask."""
        generator = self._federation.seeds.generator("noise", self._state.round)
        rows = self._rule.marked(rows, self._state.rule) if isinstance(self._rule, QuantileRelease) else rows
        return self._space.imagined(self._state.rule, self._rule, rows, self._state.model, generator)
