"""What a round knows of attackers: schedules, memories, kappa, detection, and the server's own update."""

from dataclasses import dataclass, replace
from typing import final

import pytest
import torch
from torch import Generator, Tensor

from privfm.attacks import SignFlip, Window
from privfm.checks import ClientFailed, InvalidArgument
from privfm.contracts import (
    ROOT,
    Clients,
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
from privfm.defenses import ClientMomentum, DPPlan, Mean, MultiKrum, TrimmedMean
from privfm.defenses.channels import CKKS, Plaintext
from privfm.federation import FixedSize, load, rounds, save

MALICIOUS = tuple(range(0, 60, 5))  # a fifth


def played(federation, until=2, state=None):
    return list(rounds(federation, until, state))


@final
@dataclass(frozen=True)
class Counting(UpdateAttack):
    """Sends a row of its round's number; remembers what it was shown."""

    @property
    def needs(self) -> Knows:
        return Knows.ROWS

    @property
    def knowledge(self) -> tuple[str, ...]:
        return ("honest updates",)

    def init(self, d: int) -> State:
        return {"calls": torch.zeros(()), "models": torch.zeros(3, d), "clients": torch.zeros(3, 30)}

    def bend(self, state: State, own: Tensor, honest: Knowledge, generator: Generator) -> tuple[State, Tensor]:
        calls = int(state["calls"])
        models, clients = state["models"].clone(), state["clients"].clone()
        models[calls] = honest.model
        clients[calls, : len(honest.ids)] = torch.tensor(honest.ids, dtype=torch.float32)
        assert isinstance(honest.rule, MultiKrum)
        assert len(honest.ids) == len(honest.rows)
        return {"calls": torch.tensor(calls + 1.0), "models": models, "clients": clients}, torch.zeros_like(own)


def test_attackers_remember_and_a_resumed_run_goes_on_where_they_were(federation, tmp_path):
    arm = {"attack": Counting(), "malicious": MALICIOUS, "rule": MultiKrum(f=9)}
    whole = played(federation(**arm), 3)[-1].state
    assert int(whole.attack["calls"]) == 3
    save(played(federation(**arm), 2)[-1].state, tmp_path)
    resumed = played(federation(**arm), 3, load(tmp_path))[-1].state
    assert torch.equal(resumed.model, whole.model)
    assert {name: value.tolist() for name, value in resumed.attack.items()} == {
        name: value.tolist() for name, value in whole.attack.items()
    }


def test_attackers_are_told_the_model_and_who_the_honest_are(federation):
    steps = played(federation(attack=Counting(), malicious=MALICIOUS, rule=MultiKrum(f=9)), 2)
    seen = steps[-1].state.attack
    assert torch.equal(seen["models"][0], torch.zeros(640))
    assert torch.equal(seen["models"][1], steps[0].state.model)
    named = seen["clients"][0][seen["clients"][0] > 0].long().tolist()
    assert named
    assert not set(named) & set(MALICIOUS)


def test_outside_its_window_an_attacker_is_like_everybody(federation):
    attacked = {"attack": SignFlip(4.0), "malicious": MALICIOUS, "schedule": Window(1, 1)}
    clean, some = played(federation(), 3), played(federation(**attacked), 3)
    assert torch.equal(clean[0].state.model, some[0].state.model)
    assert not torch.equal(clean[1].state.model, some[1].state.model)
    assert [step.record.malicious > 0 for step in some] == [False, True, False]


def test_empirical_kappa_is_that_of_the_definition(federation):
    seen: list[Tensor] = []

    @final
    @dataclass(frozen=True)
    class Watching(Rule):
        @property
        def needs(self) -> Reveals:
            return Reveals.EACH

        def step(self, state: State, view: View, generator: Generator) -> tuple[State, Outcome]:
            honest = [i for i, client in enumerate(view.ids) if client not in MALICIOUS]
            seen.append(view.block(0, view.d)[honest].double())
            return state, Outcome(view.block(0, view.d).median(0).values)

    step = played(federation(rule=Watching(), attack=SignFlip(4.0), malicious=MALICIOUS), 1)[0]
    honest, mean = seen[0], seen[0].mean(0)
    kappa = (step.state.model - mean).square().sum() / (honest - mean).square().sum(1).mean()
    assert step.record.empirical_kappa == pytest.approx(float(kappa), rel=1e-5)


def test_without_attackers_the_mean_has_kappa_zero_and_under_a_plan_there_is_none(federation):
    assert played(federation(), 1)[0].record.empirical_kappa == pytest.approx(0, abs=1e-10)
    plan = DPPlan(noise_multiplier=1.0, max_grad_norm=1.0, sample_rate=0.5, delta=1e-3)
    assert played(federation(plan=plan), 1)[0].record.empirical_kappa is None


def test_detection_is_counted_against_those_that_poison(federation):
    record = played(federation(rule=MultiKrum(f=9), attack=SignFlip(30.0), malicious=MALICIOUS), 1)[0].record
    assert record.arrived_malicious == record.malicious > 0
    assert record.detected == 9
    assert record.detected_malicious == record.malicious
    assert record.kept == record.arrived - 9
    assert played(federation(rule=TrimmedMean(2)), 1)[0].record.detected is None


@final
@dataclass(frozen=True)
class LikeTheServer(Rule):
    """Returns the server's own update."""

    @property
    def needs(self) -> Reveals:
        return Reveals.GRAM

    def init(self, d: int) -> State:
        return {ROOT: torch.zeros(d)}

    def references(self, state: State, d: int) -> Tensor:
        return state[ROOT][None]

    def step(self, state: State, view: View, generator: Generator) -> tuple[State, Outcome]:
        references = self.references(state, view.d)
        weights = torch.zeros(view.n + 1, dtype=torch.float64)
        weights[-1] = 1
        return state, Outcome(view.weighted_sum(weights, references), weights[:-1])


def test_the_server_trains_on_its_own_examples_before_every_round(federation):
    made = federation(rule=LikeTheServer())
    root = made.clients.examples(3)
    steps = played(replace(made, root=root), 2)
    generator = made.seeds.generator("root", 1)
    again = made.learner.train(steps[0].state.model, [root], [generator]).rows[0]
    assert torch.equal(steps[1].state.rule[ROOT], again)
    assert torch.equal(steps[1].state.model, steps[0].state.model + again)
    assert not torch.equal(steps[0].state.rule[ROOT], again)


def test_a_server_without_examples_is_refused_before_training(federation):
    made = federation(rule=LikeTheServer())
    with pytest.raises(InvalidArgument, match=r"LikeTheServer compares .* server's own update.*`server`"):
        played(made)
    assert made.learner.batches == []


def test_a_server_that_cannot_train_ends_the_run(federation):
    made = federation(rule=LikeTheServer(), fails=frozenset({3}))
    with pytest.raises(ClientFailed, match="root data: ValueError: no good"):
        played(replace(made, root=made.clients.examples(3)))


def test_weights_of_clients_are_refused_by_rules_that_count_all_the_same():
    rows, weights = torch.randn(9, 4, generator=Generator().manual_seed(0)), torch.arange(1, 10)
    view = MatrixView(rows, weights=weights)
    assert float(view.client_weights.sum()) == pytest.approx(1)
    with pytest.raises(InvalidArgument, match="MultiKrum counts every update the same"):
        MultiKrum(1).aggregate({}, view, Generator())
    assert Mean.weighted


@pytest.mark.parametrize("takes", [True, False])
def test_attackers_may_leave_the_client_steps_out(federation, takes):
    """Momentum of honest clients grows to ten updates; that of attackers without it stays one."""
    seen = []

    @final
    @dataclass(frozen=True)
    class Recorded(UpdateAttack):
        @property
        def knowledge(self):
            return ()

        def bend(self, state, own, honest, generator):
            seen.append(own.clone())
            return state, own

    arm = {"attack": Recorded(), "malicious": (7,), "transforms": (ClientMomentum(0.9),), "cohort": FixedSize(60)}
    made = federation(attackers_take_steps=takes, **arm)
    steps = played(made, 2)
    order = made.seeds.clients("data order", 1, [7])
    plain = made.learner.train(steps[0].state.model, [made.clients.examples(7)], order).rows
    expected = plain + 0.9 * seen[0] if takes else plain
    assert torch.allclose(seen[1], expected, atol=1e-6)


@pytest.mark.parametrize("channel", [Plaintext(), CKKS(bound=20.0, clients=60)], ids=["server weighs", "clients weigh"])
def test_clients_may_count_by_the_examples_the_server_knows_them_to_hold(federation, channel):
    """Client i holds 24 examples here but for one, which is made to hold three times as many."""
    made = federation(weighting="examples", cohort=FixedSize(60), channel=channel)
    plain = made.clients

    @final
    class Uneven(Clients):
        size = plain.size

        def examples(self, client: int) -> Examples:
            own = plain.examples(client)
            return own.take(torch.arange(24).repeat(3)) if client == 4 else own

    uneven = replace(made, clients=Uneven())
    model = played(uneven, 1)[0].state.model
    order = made.seeds.clients("data order", 0, list(range(60)))
    batch = [uneven.clients.examples(client) for client in range(60)]
    rows = made.learner.train(made.learner.initial(), batch, order).rows.double()
    sizes = torch.tensor([len(examples) for examples in batch], dtype=torch.float64)
    torch.testing.assert_close(model.double(), sizes @ rows / sizes.sum(), rtol=1e-5, atol=1e-7)
    assert not torch.allclose(model.double(), rows.mean(0), rtol=1e-4, atol=1e-6)


@final
@dataclass(frozen=True)
class SumRule(Rule):
    """Needs the sum, and knows nothing of weights."""

    @property
    def needs(self) -> Reveals:
        return Reveals.SUM

    def step(self, state, view, generator):
        return state, Outcome(view.total() / view.n)


def test_nobody_folds_weights_where_lengths_and_angles_are_revealed(federation, toys):
    with pytest.raises(InvalidArgument, match="GramVault nobody knows what share a row has"):
        played(federation(weighting="examples", rule=Mean(), channel=toys["GramVault"](3.0)))


@pytest.mark.parametrize(
    ("arm", "said"),
    [
        ({"rule": MultiKrum(1)}, "MultiKrum counts every update the same"),
        ({"rule": SumRule(), "channel": CKKS(bound=1.0, clients=60)}, "SumRule counts every update the same"),
        (
            {"plan": DPPlan(noise_multiplier=1.0, max_grad_norm=1.0, sample_rate=0.5, delta=1e-3)},
            "more weight has more sensitivity",
        ),
    ],
    ids=["rule", "channel", "plan"],
)
def test_weights_are_refused_where_they_do_not_fit(federation, arm, said):
    with pytest.raises(InvalidArgument, match=said):
        played(federation(weighting="examples", **arm))


def test_a_server_whose_own_update_is_not_finite_ends_the_run(federation):
    made = federation(rule=LikeTheServer())

    @final
    class Diverging(Learner):
        d = made.learner.d

        def initial(self):
            return made.learner.initial()

        def train(self, model, batch, generators, privacy=None, active=None):
            trained = made.learner.train(model, batch, generators)
            return trained if len(batch) > 1 else replace(trained, rows=trained.rows * torch.nan)

        def evaluate(self, model, split):
            return made.learner.evaluate(model, split)

    with pytest.raises(ClientFailed, match="not finite"):
        played(replace(made, learner=Diverging(), root=made.clients.examples(3)))
