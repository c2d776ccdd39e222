"""A curious server in rounds of federated SGD on random data: what it records under each kind of channel."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Generator, Tensor, nn

from privfm.adapters import AdapterLayout, FactorPair
from privfm.attacks.membership.across_rounds import FedMIA
from privfm.attacks.membership.membership_server import (
    STRANGER,
    Candidates,
    MembershipServer,
    SeatedMembership,
    _but_a,
)
from privfm.attacks.membership.updates import cosine_scores
from privfm.checks import InvalidArgument
from privfm.contracts import Examples, Reveals, ServerScene, WireView
from privfm.vectors import Layout

CLIENTS, EACH, WIDTH, ROUNDS, RATE = 6, 6, 60, 4, 0.2


def losses(model: nn.Module, examples: Examples) -> Tensor:
    return nn.functional.cross_entropy(model(**examples.inputs), examples.labels, reduction="none")


@cache
def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(WIDTH, 12), nn.Tanh(), nn.Linear(12, 5))


LAYOUT = Layout.of(dict(network().named_parameters()))
START = LAYOUT.flatten(dict(network().named_parameters()))


def load(model: Tensor) -> nn.Module:
    network().load_state_dict(LAYOUT.unflatten(model))
    return network()


def data(count: int, seed: int) -> Examples:
    generator = Generator().manual_seed(seed)
    labels = torch.randint(5, (count,), generator=generator)
    return Examples({"input": torch.randn(count, WIDTH, generator=generator)}, labels)


HELD = {client: data(EACH, 10 + client) for client in range(CLIENTS)} | {STRANGER: data(40, 9)}
CANDIDATES = Candidates.of(load, LAYOUT, losses, HELD, block=5)
SCENE = ServerScene(
    load,
    LAYOUT,
    lambda count: None,
    lambda client: HELD[client],
    clients=CLIENTS,
    strangers=HELD[STRANGER],
    losses=losses,
)


@cache
def played() -> tuple[tuple[Tensor, Tensor], ...]:
    """Model and changes `(clients, d)` of every round of federated averaging of single steps."""
    model, found = START, []
    for _ in range(ROUNDS):
        module, rows = load(model), []
        for client in range(CLIENTS):
            sent = torch.autograd.grad(losses(module, HELD[client]).mean(), list(module.parameters()))
            named = dict(zip([name for name, _ in module.named_parameters()], sent, strict=True))
            rows.append(-RATE * LAYOUT.flatten(named))
        found.append((model, torch.stack(rows)))
        model = model + torch.stack(rows).mean(0)
    return tuple(found)


def opened(rows: Tensor, ids: tuple[int, ...]) -> WireView:
    return WireView(Reveals.EACH, ids, (), (), rows[list(ids)])


def seated(**more: Any) -> SeatedMembership:
    return SeatedMembership(CANDIDATES, CLIENTS, **more)


def test_opened_rows_tell_members_apart_and_name_their_owners() -> None:
    seat, everybody = seated(), tuple(range(CLIENTS))
    records = [seat.look(opened(rows, everybody), model, now) for now, (model, rows) in enumerate(played())]
    for record in records:
        assert set(record) == {"auc", "auc_foreign", "auc_fedmia", "attributed"}
        assert record["auc"] > 0.9
        assert abs(record["auc_foreign"] - 0.5) < 0.1
        assert record["attributed"] > 0.9
        assert record["auc_fedmia"] > 0.9
    model, rows = played()[1]
    np.testing.assert_array_equal(seat.traces.scores[1], cosine_scores(-rows, CANDIDATES.gradients(model)))
    again = FedMIA()(seat.traces.scores, 0)
    assert again.shape == (len(CANDIDATES.owners),)


def test_a_run_s_scene_says_who_is_asked_about() -> None:
    seat = MembershipServer(clients=3, each=4, strangers=30, rounds=(0,)).fitted(SCENE)
    model, rows = played()[0]
    record = seat.look(opened(rows, tuple(range(CLIENTS))), model, 0)
    assert record["auc"] > 0.9
    assert seat.traces.scores.shape == (1, CLIENTS, 3 * 4 + 30)
    assert seat.look(opened(rows, (0, 1)), model, 1) == {}


def test_in_the_first_round_of_adapters_a_does_not_count() -> None:
    pairs = (FactorPair("q", 1, 3, 4, 1.0, 6, 2), FactorPair("v", 1, 3, 4, 1.0, 13, 9))
    assert _but_a(AdapterLayout(pairs, 18)) == ((0, 2), (2, 6), (9, 13), (16, 18))


def test_a_sum_gives_one_number_an_example() -> None:
    model, rows = played()[0]
    seat = seated()
    wire = WireView(Reveals.SUM, tuple(range(CLIENTS)), (rows.sum(0),), (), None)
    record = seat.look(wire, model, 0)
    assert set(record) == {"auc_sum"}
    assert record["auc_sum"] > 0.85
    assert len(seat.traces) == 0  # nothing that would point at a client is kept
    assert seat.look(WireView(Reveals.SUM, (), (), (), None), model, 0) == {}


def test_clients_that_are_not_there_are_not_members_of_the_round() -> None:
    seat = seated()
    for now, ids in enumerate([(0, 1, 2), (1, 2, 3), (2,), (3,)]):
        model, rows = played()[now]
        record = seat.look(opened(rows, ids), model, now)
        assert record["auc"] > 0.8
        assert ("attributed" in record) == (len(ids) > 1)
    assert np.isnan(seat.traces.scores[0, 3:]).all() and not np.isnan(seat.traces.scores[1, 3]).any()
    alone = seated()
    assert "auc_fedmia" not in alone.look(opened(played()[0][1], (0, 1)), played()[0][0], 0)  # two have no null


def test_other_peoples_models_and_random_owners_are_chance() -> None:
    model, rows = played()[0]
    owners = np.random.default_rng(1).permutation(CANDIDATES.owners)
    shuffled = SeatedMembership(Candidates(CANDIDATES.gradients, owners), CLIENTS)
    record = shuffled.look(opened(rows, tuple(range(CLIENTS))), model, 0)
    assert abs(record["auc"] - 0.5) < 0.2  # 36 pairs of members: 3 deviations are .15, and strangers are shared
    noise = torch.randn(rows.shape, generator=Generator().manual_seed(2))
    record = seated().look(opened(noise, tuple(range(CLIENTS))), model, 0)
    assert abs(record["auc"] - 0.5) < 0.16
    assert record["attributed"] < 0.45


def test_hidden_columns_and_chosen_rounds() -> None:
    model, rows = played()[0]
    half = rows.clone()
    half[:, : LAYOUT.d // 2] = torch.nan
    half[5] = torch.nan  # nothing at all of one client
    seat = seated()
    record = seat.look(opened(half, tuple(range(CLIENTS))), model, 0)
    assert record["auc"] > 0.8
    assert np.isnan(seat.traces.scores[0, 5]).all()
    assert seated(rounds=(1,)).look(opened(rows, (0, 1, 2)), model, 0) == {}
    spans = ((LAYOUT.d // 2, LAYOUT.d),)
    chosen = seated(first_coordinates=spans)
    chosen.look(opened(rows, (0, 1, 2)), model, 0)
    np.testing.assert_allclose(chosen.traces.scores[0, :3], seat.traces.scores[0, :3])
    chosen.look(opened(rows, (0, 1, 2)), model, 1)
    assert np.abs(chosen.traces.scores[1, :3] - seat.traces.scores[0, :3]).max() > 1e-3


def few(model: Tensor) -> Iterable[Tensor]:
    return [torch.ones(2, LAYOUT.d)]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: Candidates(few, np.array([0, 1])), "some clients and some -1"),
        (lambda: Candidates(few, np.array([-1])), "some clients and some -1"),
        (lambda: Candidates(few, np.array([[0, -1]])), "expected \\(n,\\)"),
        (lambda: SeatedMembership(CANDIDATES, 5), "client 5's, of 5"),
        (lambda: SeatedMembership(CANDIDATES, 0), "clients=0"),
        (lambda: MembershipServer().look(opened(played()[0][1], (0,)), START, 0), "fitted"),
        (lambda: MembershipServer(each=0), "each=0"),
        (lambda: MembershipServer().fitted(replace(SCENE, strangers=None)), "holdout"),
        (
            lambda: SeatedMembership(Candidates(few, np.array([0, 1, -1])), 6).look(
                opened(played()[0][1], (0,)), START, 0
            ),
            "2 gradients of 3 candidates",
        ),
    ],
    ids=range(9),
)
def test_what_does_not_fit_is_refused(call: Callable[[], object], says: str) -> None:
    with pytest.raises(InvalidArgument, match=says):
        call()
