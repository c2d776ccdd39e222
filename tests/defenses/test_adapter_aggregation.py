"""From an aggregate of changes to the next adapter and the frozen weights."""

import pytest
import torch
from torch import Generator, Tensor

from privfm.adapters import AdapterLayout, FactorPair
from privfm.checks import InvalidArgument
from privfm.contracts import MatrixView
from privfm.defenses import CenteredClipping, Krum, Mean, MultiKrum, TrimmedMean
from privfm.defenses.adapter_aggregation import aggregate_adapters, next_adapters
from privfm.defenses.geometry import Change, ProductView

N, PLAIN = 5, 4
SHAPES = ((9, 6, 3, 2.0), (7, 12, 2, 0.5))  # outputs, inputs, rank, scaling


def made(shapes: tuple[tuple[int, int, int, float], ...] = SHAPES) -> AdapterLayout:
    pairs, start = [], 0
    for k, (outputs, inputs, rank, scaling) in enumerate(shapes):
        pairs.append(FactorPair(f"m{k}", rank, inputs, outputs, scaling, start, start + rank * inputs))
        start += rank * (outputs + inputs)
    return AdapterLayout(tuple(pairs), start + PLAIN)


LAYOUT = made()


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=Generator().manual_seed(seed), dtype=torch.float64)


def cohort(scale: float = 0.3, broadcast: Tensor | None = None) -> ProductView:
    received = gaussian(LAYOUT.d) if broadcast is None else broadcast
    return ProductView(MatrixView(scale * gaussian(N, LAYOUT.d, seed=1)), LAYOUT, received)


def mean_change(scale: float = 0.3, broadcast: Tensor | None = None) -> Change:
    return cohort(scale, broadcast).change(torch.full((N,), 1 / N))


def products(broadcast: Tensor, layout: AdapterLayout = LAYOUT) -> Tensor:
    """What a vector of factors stands for, in weight space."""
    wide = broadcast.double()
    parts = [(pair.scaling * pair.b(wide) @ pair.a(wide)).flatten() for pair in layout.pairs]
    return torch.cat([*parts, wide[-PLAIN:]])


def model(broadcast: Tensor, base: dict[str, Tensor], layout: AdapterLayout = LAYOUT) -> Tensor:
    """The adapted weights: factors and what the frozen weights have taken."""
    taken = [base.get(pair.module, torch.zeros(pair.size)).flatten().double() for pair in layout.pairs]
    return products(broadcast, layout) + torch.cat([*taken, torch.zeros(PLAIN)])


def tails(change: Change, broadcast: Tensor) -> float:
    """Eckart and Young 1936: what the best approximation of rank r misses, from singular values of dense matrices."""
    missed = [
        pair.scaling * torch.linalg.svdvals(pair.b(broadcast) @ pair.a(broadcast) + u @ v)[pair.rank :].norm()
        for pair, u, v in zip(LAYOUT.pairs, change.left, change.right, strict=True)
    ]
    moved = [pair.scaling * (u @ v).norm() for pair, u, v in zip(LAYOUT.pairs, change.left, change.right, strict=True)]
    return float(torch.stack(missed).norm() / torch.stack(moved).norm())


EXACT = [{"mode": "flora"}, {"mode": "fedex"}, {"mode": "flexlora", "exact": True}]
EXACT += [{"mode": "flexlora", "exact": True, "gauge": "balanced"}]
EXACT += [{"mode": "fedask", "exact": True}, {"mode": "fedask", "exact": True, "oversampling": 0}]


@pytest.mark.parametrize("options", EXACT, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_an_exact_round_is_the_change_itself_whatever_the_factors_are_rounded_to(options, dtype):
    received = gaussian(LAYOUT.d).to(dtype)
    change = mean_change(broadcast=received.double())
    after = next_adapters(received, change, **options, generator=Generator().manual_seed(0))
    expected = products(received) + change.vector()
    found = model(after.broadcast, after.base_change)
    assert (after.broadcast.dtype, after.dropped) == (dtype, 0.0)
    torch.testing.assert_close(found[:-PLAIN], expected[:-PLAIN], rtol=1e-12, atol=1e-12)
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(found[-PLAIN:], expected[-PLAIN:], rtol=step, atol=step)


@pytest.mark.parametrize("gauge", ["nearest", "balanced"])
@pytest.mark.parametrize("start", ["trained", "B = 0"])
def test_flexlora_is_the_best_approximation_of_its_rank_and_says_what_it_drops(gauge, start):
    received = gaussian(LAYOUT.d)
    if start == "B = 0":
        for pair in LAYOUT.pairs:
            pair.b(received)[:] = 0
    change = mean_change(broadcast=received)
    after = next_adapters(received, change, gauge=gauge)
    missed = (products(after.broadcast) - products(received) - change.vector()).norm()
    expected = tails(change, received)
    assert expected > 0.01
    assert after.base_change == {}
    assert after.dropped == pytest.approx(expected)
    assert float(missed) == pytest.approx(expected * float(change.vector()[:-PLAIN].norm()))


def test_fedex_broadcasts_the_mean_of_the_factors():
    received, weights = gaussian(LAYOUT.d), torch.full((N,), 1 / N, dtype=torch.float64)
    after = next_adapters(received, mean_change(), "fedex")
    torch.testing.assert_close(after.broadcast, received + weights @ (0.3 * gaussian(N, LAYOUT.d, seed=1)))


def test_flora_starts_anew_within_peft_s_bounds():
    after = next_adapters(gaussian(LAYOUT.d), mean_change(), "flora", generator=Generator().manual_seed(0))
    for pair in LAYOUT.pairs:
        assert torch.count_nonzero(pair.b(after.broadcast)) == 0
        bound = pair.inputs**-0.5
        assert 0.8 * bound < float(pair.a(after.broadcast).abs().max()) <= bound
        spread = float(pair.a(after.broadcast).std())
        assert spread == pytest.approx(bound / 3**0.5, rel=0.35)


def test_a_dense_aggregate_of_full_rank_is_taken_too():
    received, vector = gaussian(LAYOUT.d), gaussian(LAYOUT.d_weight, seed=4)
    after = next_adapters(received, Change.dense(LAYOUT, vector), exact=True)
    torch.testing.assert_close(model(after.broadcast, after.base_change), products(received) + vector)
    with pytest.raises(InvalidArgument, match="no weighted sum of rows"):
        next_adapters(received, Change.dense(LAYOUT, vector), "fedex")


# FedASK: the same from two sketches


def clients_factors(scale: float = 0.3) -> list[Tensor]:
    """The factors of every client after training, not their changes; those of `cohort`."""
    return list(gaussian(LAYOUT.d) + scale * gaussian(N, LAYOUT.d, seed=1))


def by_protocol(pair: FactorPair, clients: list[Tensor], sketch: Tensor) -> tuple[Tensor, Tensor]:
    """Next factors as server and clients would find them, one message at a time; Wen et al., 2025, algorithm 1."""
    first = torch.zeros(pair.outputs, sketch.shape[1], dtype=torch.float64)
    for own in clients:
        first += pair.b(own) @ (pair.a(own) @ sketch) / len(clients)
    basis = torch.linalg.qr(first).Q
    second = torch.zeros(pair.inputs, basis.shape[1], dtype=torch.float64)
    for own in clients:
        second += pair.a(own).T @ (pair.b(own).T @ basis) / len(clients)
    u, s, vh = torch.linalg.svd(second.T, full_matrices=False)
    r = pair.rank
    return s[:r].sqrt()[:, None] * vh[:r], basis @ (u[:, :r] * s[:r].sqrt())


@pytest.mark.parametrize("oversampling", [0, 1, 5])
def test_fedask_is_its_protocol_message_by_message(oversampling):
    after = next_adapters(
        gaussian(LAYOUT.d), mean_change(), "fedask", generator=Generator().manual_seed(3), oversampling=oversampling
    )
    draws = Generator().manual_seed(3)
    for pair in LAYOUT.pairs:
        width = min(pair.rank + oversampling, pair.inputs, pair.outputs)
        sketch = torch.randn(pair.inputs, width, generator=draws, dtype=torch.float64)
        a, b = by_protocol(pair, clients_factors(), sketch)
        torch.testing.assert_close(pair.b(after.broadcast) @ pair.a(after.broadcast), b @ a)
        torch.testing.assert_close(
            (pair.a(after.broadcast) @ pair.a(after.broadcast).T).diagonal(), (a @ a.T).diagonal()
        )
        torch.testing.assert_close(
            (pair.b(after.broadcast).T @ pair.b(after.broadcast)).diagonal(), (b.T @ b).diagonal()
        )


def test_with_enough_columns_fedask_is_the_best_approximation_of_the_mean_product():
    """Eckart and Young 1936, from the dense mean of the clients' products; the mean of factors is something else."""
    received, clients, change = gaussian(LAYOUT.d), clients_factors(1.0), mean_change(1.0)
    after = next_adapters(received, change, "fedask", generator=Generator().manual_seed(0), oversampling=20)
    for pair in LAYOUT.pairs:
        mean = torch.stack([pair.b(own) @ pair.a(own) for own in clients]).mean(0)
        u, s, vh = torch.linalg.svd(mean)
        best = (u[:, : pair.rank] * s[: pair.rank]) @ vh[: pair.rank]
        torch.testing.assert_close(pair.b(after.broadcast) @ pair.a(after.broadcast), best)
        factors = torch.stack(clients).mean(0)
        assert float((pair.b(factors) @ pair.a(factors) - mean).norm()) > 0.1 * float(mean.norm())
    assert after.dropped == pytest.approx(tails(change, received))


def test_columns_for_the_rank_of_the_mean_are_enough():
    """Clients that moved along one direction in all: the mean product has rank r + 1."""
    layout = made(((20, 30, 2, 1.0),))
    pair, received = layout.pairs[0], gaussian(layout.d)
    rows = torch.zeros(N, layout.d, dtype=torch.float64)
    for k, row in enumerate(rows):
        pair.b(row)[:, 0] = (k + 1) * gaussian(20, seed=5)
    change = ProductView(MatrixView(rows), layout, received).change(torch.full((N,), 1 / N))
    change = Change.dense(layout, change.vector() + torch.cat([torch.outer(*wide()).flatten(), torch.zeros(PLAIN)]))
    dropped = {}
    for oversampling in (0, 1):
        after = next_adapters(
            received, change, "fedask", generator=Generator().manual_seed(0), oversampling=oversampling
        )
        missed = float((products(after.broadcast, layout) - products(received, layout) - change.vector()).norm())
        dropped[oversampling] = after.dropped
        assert missed == pytest.approx(after.dropped * float(change.vector().norm()))
    assert dropped[1] == pytest.approx(next_adapters(received, change).dropped, rel=1e-9)
    assert dropped[0] > 1.05 * dropped[1]


def wide() -> tuple[Tensor, Tensor]:
    return 10 * gaussian(20, seed=11), gaussian(30, seed=12)


def test_fedask_takes_the_other_gauge_too():
    received = gaussian(LAYOUT.d)
    after = next_adapters(received, mean_change(), "fedask", gauge="nearest", generator=Generator(), oversampling=20)
    torch.testing.assert_close(after.broadcast, next_adapters(received, mean_change()).broadcast)


# The gauge of what is broadcast


def test_no_change_changes_no_bit():
    for dtype in (torch.float32, torch.float64):
        received = gaussian(LAYOUT.d).to(dtype)
        change = ProductView(MatrixView(torch.zeros(N, LAYOUT.d)), LAYOUT, received).change(torch.ones(N))
        for options in ({}, {"gauge": "balanced"}, {"mode": "fedex"}, {"exact": True}, {"mode": "fedask"}):
            found = next_adapters(received, change, **options, generator=Generator().manual_seed(0))
            assert torch.equal(found.broadcast, received)


def test_an_update_of_the_gauge_alone_leaves_the_factors_as_they_are():
    """Clients that send other factors of the same product have changed nothing, and nothing drifts."""
    received = gaussian(LAYOUT.d)
    moved = received.clone()
    for pair in LAYOUT.pairs:
        g = gaussian(pair.rank, pair.rank, seed=7)
        pair.a(moved)[:], pair.b(moved)[:] = g @ pair.a(received), pair.b(received) @ torch.linalg.inv(g)
    change = ProductView(MatrixView((moved - received)[None]), LAYOUT, received).change(torch.ones(1))
    torch.testing.assert_close(next_adapters(received, change).broadcast, received, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(next_adapters(received, change, "fedex").broadcast, received, atol=0.1)


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-6])
def test_nearest_factors_keep_the_inner_products_of_a_and_move_as_little_as_the_updates(scale):
    received = gaussian(LAYOUT.d)
    after = next_adapters(received, mean_change(scale)).broadcast
    for pair in LAYOUT.pairs:
        a0, a = pair.a(received), pair.a(after)
        torch.testing.assert_close(a @ a.T, a0 @ a0.T)
    assert float((after - received).norm()) < 10 * scale * float(received.norm())


def test_balanced_factors_do_move_and_are_sorted_and_even():
    """Negative control of the one above; the first components are the best of smaller rank."""
    received = gaussian(LAYOUT.d)
    change = mean_change(1e-6)
    after = next_adapters(received, change, gauge="balanced").broadcast
    assert float((after - received).norm()) > 0.1 * float(received.norm())
    for pair in LAYOUT.pairs:
        a, b = pair.a(after), pair.b(after)
        values = torch.linalg.svdvals(pair.b(received) @ pair.a(received))[: pair.rank]
        torch.testing.assert_close(a @ a.T, torch.diag(values), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(b.T @ b, torch.diag(values), rtol=1e-4, atol=1e-4)


def test_nearest_factors_follow_the_gauge_of_the_broadcast():
    """(G A0, B0 G^-1) gives (G A, B G^-1): products of all rounds are those of one gauge."""
    received = gaussian(LAYOUT.d)
    change = mean_change()
    other, expected = received.clone(), next_adapters(received, change).broadcast
    for pair in LAYOUT.pairs:
        g = gaussian(pair.rank, pair.rank, seed=8)
        for vector in (other, expected):
            pair.a(vector)[:], pair.b(vector)[:] = g @ pair.a(vector), pair.b(vector) @ torch.linalg.inv(g)
    torch.testing.assert_close(next_adapters(other, change).broadcast, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("gauge", ["nearest", "balanced"])
def test_components_without_use_can_still_learn(gauge):
    """B = 0 and a change of rank 1: r-1 components of A stay, or both factors would be zero for good."""
    layout = made(((8, 6, 3, 1.0),))
    pair, received = layout.pairs[0], gaussian(layout.d)
    pair.b(received)[:] = 0
    vector = torch.cat([torch.outer(gaussian(8, seed=1), gaussian(6, seed=2)).flatten(), torch.zeros(PLAIN)])
    after = next_adapters(received, Change.dense(layout, vector), gauge=gauge)
    assert after.dropped < 1e-12
    torch.testing.assert_close(products(after.broadcast, layout)[:-PLAIN], vector[:-PLAIN])
    assert torch.linalg.matrix_rank(pair.a(after.broadcast)) == 3
    assert torch.linalg.matrix_rank(pair.b(after.broadcast)) == 1


def test_a_change_that_turns_every_row_of_a_away_is_no_division_by_zero():
    layout = made(((4, 4, 2, 1.0),))
    pair, received = layout.pairs[0], torch.zeros(layout.d, dtype=torch.float64)
    pair.a(received)[:] = torch.eye(2, 4)
    matrix = torch.zeros(4, 4, dtype=torch.float64)
    matrix[0, 2], matrix[1, 3] = 2.0, 1.0  # rows at right angles to A0's
    vector = torch.cat([matrix.flatten(), torch.zeros(PLAIN)])
    after = next_adapters(received, Change.dense(layout, vector)).broadcast
    torch.testing.assert_close(pair.b(after) @ pair.a(after), matrix)
    torch.testing.assert_close(pair.a(after) @ pair.a(after).T, torch.eye(2, dtype=torch.float64))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        pytest.param({"mode": "fedx"}, "did you mean 'fedex'", id="mode"),
        pytest.param({"gauge": "nearer"}, "did you mean 'nearest'", id="gauge"),
        pytest.param({"mode": "flora"}, "generator=None", id="nothing to draw with"),
        pytest.param({"mode": "fedask"}, "generator=None", id="no sketch to draw"),
        pytest.param({"mode": "fedask", "oversampling": -1}, "oversampling=-1", id="oversampling"),
    ],
)
def test_what_cannot_be_done_is_refused(options, said):
    with pytest.raises(InvalidArgument, match=said):
        next_adapters(gaussian(LAYOUT.d), mean_change(), **options)


def test_a_broadcast_without_a_gauge_near_it_is_refused_with_the_way_out():
    received = gaussian(LAYOUT.d)
    LAYOUT.pairs[0].a(received)[1] = LAYOUT.pairs[0].a(received)[0]
    change = mean_change(broadcast=received)
    with pytest.raises(InvalidArgument, match="use gauge='balanced'"):
        next_adapters(received, change)
    assert bool(next_adapters(received, change, gauge="balanced").broadcast.isfinite().all())
    with pytest.raises(InvalidArgument, match="broadcast has shape"):
        next_adapters(received[1:], change)
    wide = made(((4, 2, 3, 1.0),))
    with pytest.raises(InvalidArgument, match="rank 3 is above the module's 2 inputs"):
        next_adapters(gaussian(wide.d), Change.dense(wide, gaussian(wide.d_weight)))


# One call on adapters


def adapter(seed: int, scale: float = 1.0, rank: int = 3) -> dict[str, Tensor]:
    shapes = {"q.lora_B.weight": (6, rank), "q.lora_A.weight": (rank, 8), "classifier.bias": (2,)}
    return {name: scale * gaussian(*shape, seed=10 * seed + k) for k, (name, shape) in enumerate(shapes.items())}


def trained(seed: int, scale: float = 0.1, rank: int = 3) -> dict[str, Tensor]:
    """From the broadcast `adapter(0)`, its first components."""
    start, step = adapter(0), adapter(seed, scale, rank)
    start["q.lora_A.weight"], start["q.lora_B.weight"] = (
        start["q.lora_A.weight"][:rank],
        start["q.lora_B.weight"][:, :rank],
    )
    return {name: value + step[name] for name, value in start.items()}


def weight(state: dict[str, Tensor]) -> Tensor:
    return state["q.lora_B.weight"] @ state["q.lora_A.weight"]


@pytest.mark.parametrize("rule", [MultiKrum(f=1), TrimmedMean(f=1), Mean(), CenteredClipping(0.5)], ids=repr)
def test_adapters_go_in_and_an_adapter_comes_out(rule):
    clients, scaling = [trained(seed) for seed in range(1, 7)], 2.0
    outcome = aggregate_adapters(rule, clients, adapter(0), scaling, exact=True)
    rows = torch.stack(
        [
            torch.cat(
                [
                    scaling * (weight(own) - weight(adapter(0))).flatten(),
                    own["classifier.bias"] - adapter(0)["classifier.bias"],
                ]
            )
            for own in clients
        ]
    )
    expected = rule(rows)
    moved = scaling * (weight(outcome.factors) - weight(adapter(0))) + outcome.base_change["q"]
    torch.testing.assert_close(moved.flatten(), expected[:-2], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        outcome.factors["classifier.bias"] - adapter(0)["classifier.bias"], expected[-2:], rtol=1e-5, atol=1e-6
    )
    assert (outcome.weights is None) == isinstance(rule, TrimmedMean)
    assert outcome.factors.keys() == adapter(0).keys()


def test_rank_types_and_the_order_of_names_are_the_broadcast_s():
    clients = [{name: value.bfloat16() for name, value in reversed(trained(seed).items())} for seed in range(1, 6)]
    received = {name: value.float() for name, value in adapter(0).items()}
    outcome = aggregate_adapters(Krum(f=1), clients, received, 2.0)
    assert {name: (value.shape, value.dtype) for name, value in outcome.factors.items()} == {
        name: (value.shape, torch.float32) for name, value in received.items()
    }
    assert all(torch.equal(value, adapter(0)[name].float()) for name, value in received.items())


def test_a_client_of_smaller_rank_counts_with_its_own_change():
    ranks = (3, 2, 1, 3)
    clients = [trained(seed, rank=rank) for seed, rank in enumerate(ranks, 1)]
    outcome = aggregate_adapters(Mean(), clients, adapter(0), 2.0, exact=True)
    start = adapter(0)
    changes = [
        weight(own) - start["q.lora_B.weight"][:, :rank] @ start["q.lora_A.weight"][:rank]
        for own, rank in zip(clients, ranks, strict=True)
    ]
    moved = 2.0 * (weight(outcome.factors) - weight(start)) + outcome.base_change["q"]
    torch.testing.assert_close(moved, 2.0 * torch.stack(changes).mean(0))


def test_weights_are_those_of_all_clients_that_were_given():
    clients = [trained(seed) for seed in range(1, 8)]
    clients[2] = replace_entry(clients[2], "classifier.bias", float("nan"))
    clients[5] = replace_entry(clients[5], "q.lora_A.weight", 1e30)
    clients[5] = replace_entry(clients[5], "q.lora_B.weight", 1e30)
    outcome = aggregate_adapters(MultiKrum(f=2), clients, adapter(0), 2.0)
    assert outcome.weights.tolist() == pytest.approx([0.2, 0.2, 0, 0.2, 0.2, 0, 0.2])


def replace_entry(state: dict[str, Tensor], name: str, value: float) -> dict[str, Tensor]:
    return {**state, name: torch.full_like(state[name], value)}


def test_what_a_rule_remembers_is_handed_on():
    clients, rule = [trained(seed, scale=1.0) for seed in range(1, 5)], CenteredClipping(0.5, iterations=1)
    first = aggregate_adapters(rule, clients, adapter(0), 2.0)
    second = aggregate_adapters(rule, clients, adapter(0), 2.0, state=first.state)
    assert first.state["center"].shape == (6 * 8 + 2,)
    assert not torch.equal(first.state["center"], second.state["center"])


@pytest.mark.parametrize(
    ("clients", "said"),
    [
        pytest.param([], "expected those of one client", id="nobody"),
        pytest.param([{**adapter(1), "more": torch.ones(1)}], "different names", id="names"),
        pytest.param([adapter(1, rank=4)], r"the same or less rank", id="more rank"),
        pytest.param(
            [{**adapter(1), "q.lora_B.weight": torch.ones(6, 2)}], "has rank 2, its partner 3", id="two ranks"
        ),
        pytest.param([{**adapter(1), "classifier.bias": torch.ones(3)}], "classifier.bias has shape", id="head"),
    ],
)
def test_adapters_that_do_not_fit_the_broadcast_are_refused(clients, said):
    with pytest.raises(InvalidArgument, match=said):
        aggregate_adapters(Mean(), clients, adapter(0), 1.0)
