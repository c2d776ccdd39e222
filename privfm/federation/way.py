"""The way of one update: a client's half of a round, up to the channel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf
from time import perf_counter
from typing import Final, final

import torch
from torch import Tensor

from privfm.blocks import Spread
from privfm.checks import ClientFailed
from privfm.contracts import (
    Attack,
    Cast,
    DataAttack,
    Encoded,
    Knowledge,
    Knows,
    MatrixView,
    Reveals,
    Rule,
    UpdateAttack,
    View,
)
from privfm.defenses.privacy.releases import QuantileRelease
from privfm.defenses.views import WatchedView
from privfm.federation.canaries import PlantedCanaries
from privfm.federation.client_states import ClientStates
from privfm.federation.federation import Federation, RunState
from privfm.federation.spaces import Space

DECLARED: Final = 10
"""Times the cap of examples that canaries declare: as far beyond it as ghosts are sent beyond the clip."""


@final
class Way:
    """The way of one update, up to the channel.

    Examples -> data attack -> training -> client steps -> update attack -> codecs. An update attack stands behind the
    client steps, because nobody can make an attacker clip, and before the codecs, because a dense row is no message
    of a sparse wire.

    Args:
      federation: the run.
      state: from which the round starts.
      rule: of the round.
      space: it works on.
      cast: who takes part, and what they are told.
      measured: also notes what only a simulation knows of all rows together (`empirical_kappa`, `channel_error`).

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
        self, federation: Federation, state: RunState, rule: Rule, space: Space, cast: Cast, *, measured: bool = True
    ) -> None:
        arm, told = federation.arm, cast.broadcast
        assert told is not None  # `play`, or the server's message
        self.honest, self.malicious, self.weights = cast.honest, cast.malicious, told.weights
        self.attack = state.attack
        self.clients, self.norms, self.failures, self.seconds = state.clients, list[float](), dict[int, str](), 0.0
        self._federation, self._state, self._rule, self._space = federation, state, rule, space
        level = arm.attack.needs if isinstance(arm.attack, UpdateAttack) else Knows.OWN
        planted = federation.planted
        ghosts = planted is not None and planted.canaries.ghost
        self._hidden_from = federation.clients.size if ghosts else inf  # attackers see no row that is not there
        self._known = Knowledge(level, told.cohort, self._imagined, told.model[: federation.learner.d], rule)
        plain = arm.plan is None and not arm.folds and arm.channel.rows(1) is None
        self._spread = Spread() if plain and measured else None
        self._active = arm.active(state.round, federation.learner.adapters)
        self._layers = federation.learner.layers
        self._bound = told.bound
        # Elsewhere the server may clip what it opens.
        self._sums = measured and federation.arm.channel.reveals is Reveals.SUM
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
