"""Adapters aggregated by their products: what the server sees, what the clients receive, what the record says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import final

import pytest
import torch
from torch import Generator, Tensor

from privfm.adapters import AdapterLayout, FactorPair
from privfm.attacks import SignFlip
from privfm.checks import InvalidArgument
from privfm.contracts import Examples, GradientPrivacy, Learner, Metric, Split, Trained
from privfm.defenses import DPPlan, Mean, MultiKrum, TrimmedMean
from privfm.engines import Local
from privfm.federation import (
    Adam,
    Arm,
    Federation,
    FixedSize,
    Momentum,
    Population,
    ProductGeometry,
    load,
    rounds,
    save,
)
from privfm.randomness import Seeds

INPUTS, OUTPUTS, RANK, BIAS = 7, 5, 2, 3
PAIR = FactorPair("layer", RANK, INPUTS, OUTPUTS, 2.0, 0, RANK * INPUTS)
LAYOUT = AdapterLayout((PAIR,), RANK * (INPUTS + OUTPUTS) + BIAS)


@final
class Pulled(Learner):
    """Each client pulls the whole weight towards its own target by two steps on the factors; nothing is random.

    The weight is `scaling * B A + base`; the gradient of |W - target|^2 / 2 flows to the factors, and to the bias.
    """

    @property
    def d(self) -> int:
        return LAYOUT.d

    @property
    def adapters(self) -> AdapterLayout:
        return LAYOUT

    def initial(self) -> Tensor:
        start = torch.zeros(self.d)
        PAIR.a(start)[:] = torch.randn(RANK, INPUTS, generator=Generator().manual_seed(7))
        return start

    def train(
        self,
        model: Tensor,
        batch: Sequence[Examples],
        generators: Sequence[Generator],
        privacy: GradientPrivacy | None = None,
        active: Tensor | None = None,
    ) -> Trained:
        base = model[self.d :].view(OUTPUTS, INPUTS) if len(model) > self.d else torch.zeros(OUTPUTS, INPUTS)
        rows = []
        for examples in batch:
            target = torch.randn(
                OUTPUTS, INPUTS, generator=Generator().manual_seed(int(examples.labels[0]))
            ) * 0.3 + torch.ones(OUTPUTS, INPUTS)
            own = model[: self.d].clone()
            for _ in range(2):
                a, b = PAIR.a(own).clone(), PAIR.b(own).clone()
                slope = 2.0 * b @ a + base - target
                PAIR.a(own)[:] -= 0.02 * 2.0 * b.T @ slope
                PAIR.b(own)[:] -= 0.02 * 2.0 * slope @ a.T
                own[-BIAS:] += 0.1 * (examples.labels[0] % 3 - own[-BIAS:])
            rows.append(own - model[: self.d])
        return Trained(torch.stack(rows), {})

    def evaluate(self, model: Tensor, split: Split) -> dict[str, Metric]:
        return {"distance": Metric(float((weight(model) - 1).norm()), 1, False, "L2")}


def weight(model: Tensor) -> Tensor:
    own = 2.0 * PAIR.b(model) @ PAIR.a(model)
    return own + model[LAYOUT.d :].view(OUTPUTS, INPUTS) if len(model) > LAYOUT.d else own


def federated(**arm: object) -> Federation:
    clients = 12
    everything = Examples({"x": torch.zeros(clients, 1)}, torch.arange(clients), torch.arange(clients))
    population = Population.of(everything, list(torch.arange(clients).split(1)))
    if arm.get("plan") is None:
        arm.setdefault("cohort", FixedSize(clients))
    return Federation(Arm(**arm), Pulled(), population, Seeds(3), Local())  # type: ignore[arg-type]


def products(federation: Federation, model: Tensor) -> Tensor:
    """The change of weight and bias by each client, computed the plain way: `(n, d_weight)` float64."""
    learner = federation.learner
    everybody = [federation.clients.examples(client) for client in range(federation.clients.size)]
    rows = learner.train(model, everybody, [Generator()] * len(everybody)).rows.double()
    start = model[: LAYOUT.d].double()
    changes = [2.0 * (PAIR.b(start + row) @ PAIR.a(start + row) - PAIR.b(start) @ PAIR.a(start)) for row in rows]
    return torch.stack([torch.cat([change.flatten(), row[-BIAS:]]) for change, row in zip(changes, rows, strict=True)])


@pytest.mark.parametrize(
    "geometry",
    [ProductGeometry("flora"), ProductGeometry("fedex"), ProductGeometry("flexlora", exact=True)],
    ids=lambda geometry: geometry.mode,
)
def test_exact_modes_move_the_weight_by_the_mean_change_of_the_clients(geometry):
    federation = federated(adapters=geometry)
    steps = list(rounds(federation, 3))
    before = steps[1].state.model
    mean = products(federation, before).mean(0)
    moved = (weight(steps[2].state.model) - weight(before)).flatten()
    torch.testing.assert_close(moved.double(), mean[:-BIAS], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close((steps[2].state.model - before)[LAYOUT.d - BIAS : LAYOUT.d].double(), mean[-BIAS:])
    assert steps[2].record.base_change_norm > 0
    asked = 109 + 32  # the request: an envelope's header and its code
    assert steps[2].record.bytes_down_per_client == 4 * (LAYOUT.d + INPUTS * OUTPUTS) + asked


def test_averaging_factors_is_not_the_mean_change():
    """What the geometry is for: the plain mean of factors moves the weight elsewhere."""
    federation = federated()
    steps = list(rounds(federation, 3))
    mean = products(federation, steps[1].state.model).mean(0)[:-BIAS]
    moved = (weight(steps[2].state.model) - weight(steps[1].state.model)).flatten().double()
    assert float((moved - mean).norm() / mean.norm()) > 1e-3
    assert steps[2].record.base_change_norm is None
    assert steps[2].record.dropped_by_projection is None


def test_projection_keeps_the_rank_and_says_what_it_drops():
    federation = federated(adapters=ProductGeometry())
    steps = list(rounds(federation, 3))
    before, after = steps[1].state.model, steps[2].state.model
    assert len(after) == LAYOUT.d
    target = weight(before).double().flatten() + products(federation, before).mean(0)[:-BIAS]
    u, s, vh = torch.linalg.svd(target.view(OUTPUTS, INPUTS))
    best = (u[:, :RANK] * s[:RANK]) @ vh[:RANK]
    torch.testing.assert_close(weight(after).double(), best, rtol=1e-4, atol=1e-5)
    change = products(federation, before).mean(0)[:-BIAS].norm()
    assert steps[2].record.dropped_by_projection == pytest.approx(float(s[RANK:].norm() / change), rel=1e-3)


@pytest.mark.parametrize("exact", [False, True])
def test_two_sketches_find_what_the_products_themselves_give(exact):
    """Rank r + 5 is all that weights of 5 outputs have: the first round is FlexLoRA's, then the gauges part."""
    sketched, plain = (
        list(rounds(federated(adapters=ProductGeometry(mode, exact=exact)), 3)) for mode in ("fedask", "flexlora")
    )
    torch.testing.assert_close(weight(sketched[0].state.model), weight(plain[0].state.model), rtol=1e-4, atol=1e-5)
    assert sketched[0].record.dropped_by_projection == pytest.approx(plain[0].record.dropped_by_projection, abs=1e-6)
    assert (sketched[2].record.base_change_norm is not None) == exact


def test_a_narrow_sketch_loses_more_than_the_best_approximation():
    lost = {}
    for oversampling in (0, 5):
        steps = list(rounds(federated(adapters=ProductGeometry("fedask", oversampling=oversampling)), 3))
        lost[oversampling] = steps[1].record.dropped_by_projection
    assert lost[0] > 1.01 * lost[5]


def test_a_rule_sees_the_products_and_a_client_with_another_gauge_is_the_same_client():
    federation = federated(adapters=ProductGeometry(), rule=MultiKrum(f=2))
    plain = list(rounds(federation, 2))[-1].state.model

    @final
    class Regauged(Learner):
        """The same clients, half of which send their factors in another gauge."""

        d, adapters = LAYOUT.d, LAYOUT

        def initial(self) -> Tensor:
            return Pulled().initial()

        def train(
            self,
            model: Tensor,
            batch: Sequence[Examples],
            generators: Sequence[Generator],
            privacy: GradientPrivacy | None = None,
            active: Tensor | None = None,
        ) -> Trained:
            rows = Pulled().train(model, batch, generators).rows.clone()
            for row, examples in zip(rows, batch, strict=True):
                if int(examples.labels[0]) % 2:
                    own = model[: LAYOUT.d] + row
                    PAIR.a(row)[:] = 4.0 * PAIR.a(own) - PAIR.a(model)
                    PAIR.b(row)[:] = PAIR.b(own) / 4.0 - PAIR.b(model)
            return Trained(rows, {})

        def evaluate(self, model: Tensor, split: Split) -> dict[str, Metric]:
            return Pulled().evaluate(model, split)

    other = list(rounds(replace(federation, learner=Regauged()), 2))[-1].state.model
    torch.testing.assert_close(other, plain, rtol=1e-3, atol=1e-4)
    by_factors = federated(rule=MultiKrum(f=2))
    shifted = list(rounds(replace(by_factors, learner=Regauged()), 2))[-1].state.model
    assert float((weight(shifted) - weight(list(rounds(by_factors, 2))[-1].state.model)).norm()) > 1e-2


@pytest.mark.parametrize("optimizer", [Momentum(0.5, 0.9), Adam(0.01)], ids=repr)
@pytest.mark.parametrize("rule", [Mean(), TrimmedMean(2), MultiKrum(2)], ids=repr)
def test_every_rule_and_server_optimizer_works_on_weights(optimizer, rule):
    steps = list(rounds(federated(adapters=ProductGeometry(), optimizer=optimizer, rule=rule), 3))
    assert steps[-1].state.model.isfinite().all()
    assert steps[-1].metrics["distance"].value < steps[0].metrics["distance"].value
    assert all(len(value) == LAYOUT.d_weight for value in steps[-1].state.optimizer.values() if value.dim())


@pytest.mark.parametrize("mode", ["flora", "fedask"])
def test_a_resumed_run_equals_an_uninterrupted_one(mode, tmp_path):
    federation = federated(
        adapters=ProductGeometry(mode, oversampling=0), attack=SignFlip(3.0), malicious=(1, 4), rule=MultiKrum(3)
    )
    whole = list(rounds(federation, 4))[-1].state.model
    save(list(rounds(federation, 2))[-1].state, tmp_path)
    assert torch.equal(list(rounds(federation, 4, load(tmp_path)))[-1].state.model, whole)


def test_kappa_is_measured_where_the_rule_works():
    record = next(iter(rounds(federated(adapters=ProductGeometry("flora")), 1))).record
    assert record.empirical_kappa == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("arm", "said"),
    [
        ({"adapters": ProductGeometry("fedex"), "optimizer": Adam(0.1)}, "fedex.*Average"),
        (
            {
                "adapters": ProductGeometry(),
                "cohort": None,
                "plan": DPPlan(noise_multiplier=1.0, max_grad_norm=1.0, sample_rate=0.5, delta=1e-3),
            },
            "plan.*products",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_training(arm, said):
    with pytest.raises(InvalidArgument, match=said):
        list(rounds(federated(**arm), 1))


def test_a_model_without_adapters_is_refused(federation):
    with pytest.raises(InvalidArgument, match="the model has none"):
        list(rounds(federation(adapters=ProductGeometry()), 1))


def test_a_wrong_mode_is_refused_by_name():
    with pytest.raises(InvalidArgument, match="mode="):
        ProductGeometry("svd")
    with pytest.raises(InvalidArgument, match="oversampling=-1"):
        ProductGeometry("fedask", oversampling=-1)
