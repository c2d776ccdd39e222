"""Rules and privacy plans for federated loops that pass models around as state dicts.

The server of somebody else's loop holds the global model and gets its clients' models back; `changes` says what becomes
of them. Bad clients count against the rule's f. A wrong global model, and too few good clients, raise.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import index
from typing import Final, final

import torch
from torch import Tensor

from privfm.adapters import AdapterLayout
from privfm.checks import CohortTooSmall, InvalidArgument, at_least, require
from privfm.contracts import ROOT, Outcome, Rule, State, View
from privfm.contracts.inputs import NamedView
from privfm.defenses.adapter_aggregation import next_adapters
from privfm.defenses.directional_rules import with_root
from privfm.defenses.geometry import ProductView
from privfm.defenses.mean import Mean
from privfm.defenses.privacy import DPPlan, EpsilonRecord
from privfm.defenses.views import SumView
from privfm.federation.population import eligible, no_participations
from privfm.plugins.central_plans import clipped_sum, drawn
from privfm.plugins.changes import Changes, Client, GlobalModel, Named, listed
from privfm.plugins.refusals import require_central, require_paid, require_seed
from privfm.randomness import Seeds

_ELSEWHERE: Final = (
    "clients that add their own do so while they train, and their models are then averaged as any; the other places "
    "need a protocol: privfm run"
)


@final
@dataclass(frozen=True)
class LoopResult:
    """What became of one round. Everything per client is in the order of `ids`.

    Under a plan only `state` and `untouched` are released by it; who was left out, and why, depends on data.

    Attributes:
      state: the next global model: names, shapes, types and devices of the last one, in its order; nothing shared.
      ids: clients whose models were usable, in ascending order.
      left_out: why the others were not, by client.
      untouched: entries that were not aggregated (integers, and what `exclude` names): they are the last model's.
      weights: `(n,)` coefficients of the changes; None for order statistics.
      kept: `(n,)` bool, weight above zero; None where there are no weights.
      clipped: `(n,)` bool, scaled down or pulled in by the rule; None: the rule clips nobody.
      detected: `(n,)` bool, judged malicious; None: the rule judges nobody.
      dropped: under `scaling`, share of the round's change that adapters of this rank cannot hold; else None.
    """

    state: dict[str, Tensor]
    ids: tuple[int, ...]
    left_out: dict[int, str]
    untouched: tuple[str, ...]
    weights: Tensor | None
    kept: Tensor | None
    clipped: Tensor | None
    detected: Tensor | None
    dropped: float | None = None

    @classmethod
    def of(
        cls, base: GlobalModel, state: dict[str, Tensor], view: View, outcome: Outcome, left_out: Mapping[int, str]
    ) -> LoopResult:
        """From what the rule saw and returned."""
        marks = outcome.weights, outcome.kept, outcome.clipped, outcome.detected
        return cls(state, view.ids, dict(sorted(left_out.items())), base.untouched, *marks)

    @property
    def bad(self) -> int:
        """How many clients were left out."""
        return len(self.left_out)


@final
class StateDictServer:
    """The server's side of a plain loop, with what must outlast a round: a rule's memory, rounds, participations.

    A call that raises leaves all of that as it was. Clients are taken in the order of their ids, so that the order in
    which they arrive changes no bit.

    With a plan, every change is clipped to `plan.max_grad_norm`, and the sum over the *fixed* denominator
    `sample_rate * population` is noised, whoever arrived; a bad client is a zero row. Formal guarantee: that of
    `records()`, for the released models, if the loop trains who `draw()` names. The plan must be central and for whole
    clients; every float entry counts towards the clip, BatchNorm's running means too (name them in `exclude`, or use
    a model without).

    Args:
      rule: any rule, with anything inside it; None: the mean. A plan takes the mean's place.
      plan: differential privacy.
      population: number of clients, public; with a plan.
      seed: of what random rules, seeded noise and `draw` use; every round draws anew. Seeded noise wants one given.
      exclude: entries that stay as they are in the global model.
      scaling: compare LoRA adapters by the changes they make to the weights: alpha / rank, one for all or by module.
        The next adapter is the best one of the same rank (`next_adapters`, `flexlora`).

    Raises:
      InvalidArgument: the plan is not one for this place, or does not fit the rule or the population.

    >>> from privfm.defenses import Median
    >>> server = StateDictServer(Median())
    >>> result = server({"w": torch.zeros(1)}, [{"w": torch.tensor([k])} for k in (1.0, 2.0, float("nan"), 9.0)])
    >>> result.state, result.ids, result.left_out
    ({'w': tensor([2.])}, (0, 1, 3), {2: 'holds values that are not finite'})
    """

    def __init__(
        self,
        rule: Rule | None = None,
        *,
        plan: DPPlan | None = None,
        population: int | None = None,
        seed: int | None = None,
        exclude: Collection[str] = (),
        scaling: float | Mapping[str, float] | None = None,
    ) -> None:
        seed = require_seed(plan, seed)
        at_least("seed", seed, 0)
        self.rule, self.plan, self.population = Mean() if rule is None else rule, plan, population
        self.seed, self.exclude, self.scaling = seed, tuple(exclude), scaling
        self.round, self._d, self._memory = 0, -1, State()
        self._joined = State()
        self._drawn: tuple[int, ...] | None = None  # the cohort of this round, once it is drawn
        require((plan is None) == (population is None), f"plan={plan} and population={population}: give both or none")
        if plan is not None and population is not None:
            require_central(plan, population, self.rule, _ELSEWHERE)
            require(scaling is None, "scaling: a plan's clip bounds factors, not their products; leave it out with one")
            self._joined = no_participations(population)

    def __call__(
        self,
        global_state: Named,
        client_states: Sequence[Client],
        *,
        ids: Sequence[int] | None = None,
        weights: Tensor | Sequence[float] | None = None,
        root: Named | None = None,
    ) -> LoopResult:
        """Plays one round.

        Args:
          global_state: what the clients started from; not changed.
          client_states: their models after training; not changed.
          ids: the clients behind them; 0 to n-1 when None. Rules that remember clients, and plans, need the true ones.
          weights: `(n,)`, each client's share as the *server* knows it, never as the client says.
          root: the server's own model, trained from `global_state` on its own examples; for rules such as FLTrust.

        Raises:
          InvalidArgument: a wrong global model, ids or weights; a model of another size than before; under a plan, a
            client that was not drawn.
          CohortTooSmall: too few usable models for the rule, or more bad ones than it tolerates. Never under a plan.
          RoundFailed: the model's type cannot hold the next one.
        """
        names = tuple(range(len(client_states))) if ids is None else _numbers(ids)
        require(len(names) == len(client_states), f"{len(names)} ids for {len(client_states)} models")
        require(len(set(names)) == len(names), f"ids={names}: a client counts once a round")
        keyed = ids is not None or not self.rule.keyed
        require(keyed, f"{type(self.rule).__name__} remembers clients: say which they are with ids=")
        base = GlobalModel(global_state, self.exclude)
        changes, left_out = _opened(base, client_states, names, weights)
        if self.plan is not None:
            require(weights is None and root is None, "weights and root: under a plan every client counts the same")
            named = ids is not None or self.plan.sampling == "full"
            require(named, f"ids=None: the plan samples ({self.plan.sampling}); say who trained, of those of draw()")
            return self._released(self.plan, base, changes, left_out)
        view = self._seen(base, changes)
        self._check_width(view.d)
        memory = self.rule.init(view.d) if self._d < 0 else self._memory
        name = type(self.rule).__name__
        own = ROOT not in memory or root is not None
        require(own, f"{name} compares clients with the server's own update: give a StateDictServer root= every round")
        if root is not None:
            memory = with_root(memory, self._own(base, root))
        generator = Seeds(self.seed).generator("noise", self.round)
        try:
            memory, outcome = self.rule.aggregate(memory, view, generator)
        except CohortTooSmall as error:
            left_out |= _unheld(names, view, left_out)
            reasons = [f"client {client} {reason}" for client, reason in left_out.items()]
            raise CohortTooSmall(f"{error}{listed(reasons)}") from error
        state, dropped = self._moved(base, view, outcome)
        left_out |= _unheld(names, view, left_out)
        self.round, self._d, self._memory = self.round + 1, view.d, memory
        return replace(LoopResult.of(base, state, view, outcome, left_out), dropped=dropped)

    def draw(self) -> tuple[int, ...]:
        """Who takes part in this round, as the plan samples: ids 0 to population - 1. The same until it is played.

        Who was drawn must stay secret where epsilon counts on it (Poisson, fixed size). A client that has joined
        `max_participations` rounds is not drawn again.

        Raises:
          InvalidArgument: there is no plan.
          RoundFailed: one more round would cost more than the plan's budget.
        """
        plan, population = self._planned()
        if self._drawn is not None:
            return self._drawn
        require_paid(plan, self.round)
        self._drawn = self._eligible(plan, drawn(plan, population, Seeds(self.seed), self.round))[0]
        return self._drawn

    def records(self) -> tuple[EpsilonRecord, ...]:
        """What the rounds so far are worth: complete privacy statements (`DPPlan.records`)."""
        return self._planned()[0].records(self.round)

    @property
    def epsilon(self) -> float:
        """Of the first of `records()`."""
        return self.records()[0].epsilon

    @property
    def state(self) -> State:
        """Everything to continue from, as tensors by name: fit for `safetensors.torch.save_file`."""
        found = {"round": torch.tensor(self.round), "d": torch.tensor(self._d)}
        found |= {f"rule/{name}": value.clone() for name, value in self._memory.items()}
        found |= {f"joined/{name}": value.clone() for name, value in self._joined.items()}
        if self._drawn is not None:
            found["drawn"] = torch.tensor(self._drawn, dtype=torch.int64)
        return found

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Continues from a saved `state` of a server made with the same arguments.

        Raises:
          InvalidArgument: it is not the state of such a server.
        """
        parts: dict[str, State] = {"": {}, "rule": {}, "joined": {}}
        for name, value in state.items():
            part, slash, key = name.partition("/")
            part, key = (part, key) if slash else ("", name)
            require(part in parts, f"state has the entry {name}: not a StateDictServer's")
            parts[part][key] = value.clone()
        known = parts[""].keys() | {"drawn"} == {"round", "d", "drawn"}
        require(known, f"state has entries {sorted(state)}: not a StateDictServer's")
        d = int(state["d"])
        expected = self.rule.init(d).keys() if d >= 0 and self.plan is None else set()
        name = type(self.rule).__name__
        remembered = sorted(parts["rule"])
        require(set(remembered) == expected, f"state remembers {remembered}, {name} remembers {sorted(expected)}")
        shapes = {key: tuple(value.shape) for key, value in parts["joined"].items()}
        own = {key: tuple(value.shape) for key, value in self._joined.items()}
        require(shapes == own, f"state counts participations {shapes}, this server {own}: another plan or population")
        self._drawn = tuple(state["drawn"].tolist()) if "drawn" in state else None
        self.round, self._d, self._memory, self._joined = int(state["round"]), d, parts["rule"], parts["joined"]

    # The rule's side

    def _seen(self, base: GlobalModel, changes: Changes) -> View:
        if self.scaling is None:
            return changes
        return ProductView(changes, AdapterLayout.of(base.layout, self.scaling), base.vector)

    def _moved(self, base: GlobalModel, view: View, outcome: Outcome) -> tuple[dict[str, Tensor], float | None]:
        if not isinstance(view, ProductView):
            return base.plus(outcome.vector), None
        found = next_adapters(base.vector, view.explained(outcome), "flexlora")
        return base.filled(found.broadcast), found.dropped

    def _own(self, base: GlobalModel, root: Named) -> Tensor:
        opened = base.opened(root)
        if isinstance(opened, str):
            raise InvalidArgument(f"root {opened}")
        seen = self._seen(base, Changes(base, [opened], (0,)))
        require(seen.n == 1, "root holds values that are not finite")
        return seen.total()

    def _check_width(self, d: int) -> None:
        require(self._d in (-1, d), f"global_state has {d} values, that of earlier rounds had {self._d}")

    # The plan's side

    def _planned(self) -> tuple[DPPlan, int]:
        if self.plan is None or self.population is None:
            raise InvalidArgument("plan=None: nothing is drawn or accounted for; make the server with a DPPlan")
        return self.plan, self.population

    def _eligible(self, plan: DPPlan, asked: Sequence[int]) -> tuple[tuple[int, ...], State]:
        if not plan.bounds_participation:
            return tuple(asked), self._joined
        return eligible(asked, self._joined, self.round, plan.max_participations, plan.bands)

    def _released(self, plan: DPPlan, base: GlobalModel, changes: Changes, left_out: dict[int, str]) -> LoopResult:
        """The round under a plan: the noisy sum of the clipped changes."""
        asked, population = self.draw(), self._planned()[1]
        foreign = sorted({*changes.given, *left_out} - set(asked))
        require(
            not foreign,
            f"clients {foreign} were not drawn for round {self.round}, and epsilon counts on who was; train those of "
            "draw(), or take a plan with sampling='full'",
        )
        self._check_width(base.layout.d)
        left_out |= _unheld(changes.given, changes, left_out)
        view = SumView(lambda: clipped_sum(plan, base, changes), changes.ids, base.layout.d, len(left_out))
        rule = plan.release(plan.max_grad_norm, population)
        _, outcome = rule.aggregate({}, view, Seeds(self.seed).generator("noise", self.round))
        state = base.plus(outcome.vector)
        joined = self._eligible(plan, asked)[1]  # whoever was asked, answered or not
        self.round, self._d, self._joined, self._drawn = self.round + 1, base.layout.d, joined, None
        return LoopResult.of(base, state, view, outcome, left_out)


def aggregate_state_dicts(
    global_state: Named,
    client_states: Sequence[Client],
    rule: Rule,
    *,
    ids: Sequence[int] | None = None,
    weights: Tensor | Sequence[float] | None = None,
    exclude: Collection[str] = (),
    seed: int = 0,
) -> LoopResult:
    """One round from a fresh memory: the way into somebody else's loop. See `StateDictServer` for the arguments.

    Rules that remember or draw belong into a `StateDictServer`: here each call forgets, and draws the same again. A
    plan needs one, too: noise that is the same in every round is none.

    Raises:
      InvalidArgument, CohortTooSmall, RoundFailed: as `StateDictServer` does.

    >>> from privfm.defenses import TrimmedMean
    >>> clients = [{"w": torch.tensor([k]), "steps": torch.tensor(7)} for k in (1.0, 2.0, 3.0, -900.0)]
    >>> aggregate_state_dicts({"w": torch.zeros(1), "steps": torch.tensor(5)}, clients, TrimmedMean(1)).state
    {'w': tensor([1.5000]), 'steps': tensor(5)}
    """
    server = StateDictServer(rule, seed=seed, exclude=exclude)
    return server(global_state, client_states, ids=ids, weights=weights)


def _opened(
    base: GlobalModel, clients: Sequence[Client], names: Sequence[int], weights: Tensor | Sequence[float] | None
) -> tuple[Changes, dict[int, str]]:
    """The readable clients in the order of their ids, and what is wrong with the others."""
    shares = None if weights is None else torch.as_tensor(weights, dtype=torch.float64)
    right = shares is None or shares.shape == (len(names),)
    require(right, f"weights have shape {None if shares is None else tuple(shares.shape)}, expected ({len(names)},)")
    rows, kept, left_out = list[NamedView](), list[int](), dict[int, str]()
    for i in sorted(range(len(names)), key=lambda i: names[i]):
        opened = base.opened(clients[i])
        if isinstance(opened, str):
            left_out[names[i]] = opened
        else:
            rows.append(opened)
            kept.append(i)
    own = None if shares is None else shares[kept]
    return Changes(base, rows, [names[i] for i in kept], own, len(left_out)), left_out


def _numbers(ids: Sequence[int]) -> tuple[int, ...]:
    try:
        return tuple(index(client) for client in ids)
    except TypeError as error:
        raise InvalidArgument(f"ids={list(ids)!r}: expected whole numbers; number your clients") from error


def _unheld(names: Sequence[int], view: View, left_out: Mapping[int, str]) -> dict[int, str]:
    """Clients that could be read and whose changes float32 cannot hold."""
    gone = sorted(set(names) - set(view.ids) - left_out.keys())
    return dict.fromkeys(gone, "holds values that are not finite")
