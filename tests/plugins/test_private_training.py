"""Private steps in somebody's own loop: equal to references written out here, and refused where epsilon would lie."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from dp_accounting import NeighboringRelation, dp_event
from dp_accounting.pld import PLDAccountant
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, kstest
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, TensorDataset

from privfm.checks import InvalidArgument, PrivacyBroken
from privfm.contracts import Examples
from privfm.defenses import DPPlan, LocalSampling
from privfm.learning import SGD
from privfm.learning.private_steps import MatrixSteps
from privfm.plugins.private_training import PrivateSteps
from privfm.randomness import Seeds
from privfm.vectors import Layout

N, WIDTH, CLASSES = 40, 5, 3


def plan(noise: float = 1.0, clip: float = 1.0, batch: int = 8, steps: int | None = 10, **changes: Any) -> DPPlan:
    local = LocalSampling(batch_size=batch, local_steps=steps)
    fields: dict[str, Any] = {"unit": "example", "place": "local", "sampling": "full", "local": local} | changes
    return DPPlan(noise, max_grad_norm=clip, sample_rate=1.0, delta=1e-3, **fields)


def network(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(WIDTH, 6), nn.Tanh(), nn.Linear(6, CLASSES))


@pytest.fixture
def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(3)
    return TensorDataset(torch.randn(N, WIDTH, generator=generator), torch.randint(CLASSES, (N,), generator=generator))


def each(model: nn.Module) -> Any:
    def losses(batch: Any) -> Tensor:
        return cross_entropy(model(batch[0]), batch[1], reduction="none")

    return losses


def private(model: nn.Module, of: DPPlan, lr: float = 0.5, seed: int | None = 7, **options: Any) -> PrivateSteps:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    return PrivateSteps(model, optimizer, of, N, each(model), seed=seed, **options)


def flat(model: nn.Module) -> Tensor:
    return Layout.of(dict(model.named_parameters())).flatten(dict(model.named_parameters()))


def gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Of one example, by plain autograd; in the layout's order of columns."""
    model.zero_grad()
    cross_entropy(model(x[None]), y[None]).backward()
    named = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return Layout.of(named).flatten(named)


@pytest.mark.parametrize("clip", [1e6, 0.3], ids=["no clip", "clip"])
def test_a_step_is_the_sum_of_clipped_gradients_over_the_expected_batch(data: TensorDataset, clip: float) -> None:
    """Reference: a loop over examples, written out. Without a clip it is the plain step on the sum over q n = 8."""
    model = network()
    steps = private(model, plan(noise=0.0, clip=clip), lr=0.5)
    lengths = []
    for batch in steps.loader(data):
        before = flat(model).double()
        total = torch.zeros_like(before)
        for x, y in zip(*batch, strict=True):
            own = gradient(model, x, y).double()
            lengths.append(float(own.norm()))
            total += own * min(1.0, clip / float(own.norm()))
        steps.step(batch)
        torch.testing.assert_close(flat(model).double(), before - 0.5 * total / 8, atol=2e-6, rtol=1e-5)
    assert (max(lengths) > clip) == (clip < 1), "the clip is to bite in one case and not in the other"


def test_it_does_what_the_projects_own_clients_do(data: TensorDataset) -> None:
    """The same plan, seed and data through `learning`'s own private steps."""
    own, theirs = network(), network()
    of = plan(noise=0.7, clip=0.5, steps=12)
    steps = private(own, of, lr=0.1)
    for batch in steps.loader(data):
        steps.step(batch)
    parameters = dict(theirs.named_parameters())
    examples = Examples({"x": data.tensors[0]}, data.tensors[1])

    def losses(some: Examples) -> Tensor:
        return cross_entropy(theirs(some.inputs["x"]), some.labels, reduction="none")

    layout = Layout.of(parameters)
    privacy = of.gradient_privacy(((0, layout.d),))
    MatrixSteps(theirs, parameters, losses, layout).run(SGD(0.1), examples, Seeds(7).generator("steps", 0), privacy)
    torch.testing.assert_close(flat(own), flat(theirs), atol=1e-6, rtol=1e-6)
    assert not torch.allclose(flat(own), flat(network()))


def test_noise_has_the_plans_scale_and_no_other() -> None:
    """4,000 values are noised once; deviation z C / (q n). Half and double of it must fail the same test."""
    width = 4000
    model = nn.Linear(width, 1, bias=False)
    zeros = TensorDataset(torch.zeros(N, width))
    steps = PrivateSteps(
        model, torch.optim.SGD(model.parameters(), lr=1.0), plan(noise=1.3, clip=0.7, steps=1), N,
        lambda batch: model(batch[0])[:, 0], seed=5,
    )  # fmt: skip
    before = flat(model)
    for batch in steps.loader(zeros):
        steps.step(batch)
    noise = (before - flat(model)).numpy() / (1.3 * 0.7 / 8)
    assert kstest(noise, "norm").pvalue > 1e-3
    for wrong in (0.5, 2.0):
        assert kstest(noise * wrong, "norm").pvalue < 1e-12


def test_examples_are_drawn_independently(data: TensorDataset) -> None:
    """Single inclusion at q = 1/5, and of pairs at q^2; neither what shuffled batches nor a fixed size would give."""
    steps = private(network(), plan(steps=4000))
    drawn = list(steps.batches())
    assert len(drawn) == 4000
    singles = Counter(place for batch in drawn for place in batch)
    assert all(1e-6 < binom.cdf(singles[k], 4000, 0.2) < 1 - 1e-6 for k in range(N))
    pairs = sum(1 for batch in drawn if 3 in batch and 17 in batch)
    assert 1e-4 < binom.cdf(pairs, 4000, 0.04) < 1 - 1e-4
    sizes = np.array([len(batch) for batch in drawn])
    assert abs(sizes.var() - N * 0.2 * 0.8) < 0.6  # 0 for batches of a fixed size


def test_an_empty_batch_is_a_step_of_noise(data: TensorDataset) -> None:
    model = network()
    steps = private(model, plan(batch=1, steps=60))
    sizes = []
    for batch in steps.loader(data):
        before = flat(model)
        steps.step(batch)
        sizes.append(len(batch[0]))
        assert not torch.equal(before, flat(model))
    assert 0 in sizes and steps.steps == 60


def oracle(noise: float, rate: float, steps: int) -> float:
    event = dp_event.SelfComposedDpEvent(dp_event.PoissonSampledDpEvent(rate, dp_event.GaussianDpEvent(noise)), steps)
    accountant = PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE, 1e-3)  # coarse: 0.3 instead of 5 s
    return float(accountant.compose(event).get_epsilon(1e-3))


def test_epsilon_is_of_the_steps_really_taken(data: TensorDataset) -> None:
    """Oracle: dp-accounting, called here; add-or-remove has the same numbers as zero-out for this mechanism."""
    steps = private(network(), plan(), steps_before=20)
    assert private(network(), plan()).epsilon() == 0.0
    for taken, batch in enumerate(steps.loader(data), start=1):
        steps.step(batch)
        if taken == 4:
            break
    record = steps.record()
    assert record.epsilon == pytest.approx(oracle(1.0, 0.2, 24), abs=2e-3)
    assert (record.unit, record.adversary, record.place, record.delta) == ("example", "server", "local", 1e-3)
    assert "count=24" in record.event and record.median is None and record.tuning == "excludes tuning"
    assert steps.epsilon() == record.epsilon


def test_later_rounds_have_other_noise(data: TensorDataset) -> None:
    def first_noise(before: int) -> Tensor:
        steps = private(network(), plan(), steps_before=before)
        next(iter(steps.batches()))
        return steps.noised(torch.zeros(steps._layout.d), steps._generator)

    assert torch.equal(first_noise(0), first_noise(0))
    assert not torch.equal(first_noise(0), first_noise(10))


@given(place=st.integers(0, N - 1), scale=st.sampled_from([0.0, 1e-3, 1.0, 1e4, float("inf"), float("nan")]))
def test_one_example_moves_the_clipped_sum_by_no_more_than_the_clip(place: int, scale: float) -> None:
    """Zero-out: with the example and without it; whatever the example is."""
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(N, WIDTH, generator=generator), torch.randint(CLASSES, (N,), generator=generator)
    x[place] *= scale
    steps = private(network(), plan(clip=0.3))
    others = torch.arange(N) != place
    moved = steps.clipped_sum((x, y)) - steps.clipped_sum((x[others], y[others]))
    assert float(moved.norm()) <= 0.3 * (1 + 1e-5)


def test_parts_of_a_batch_add_up(data: TensorDataset) -> None:
    batch = data[:13]
    whole = private(network(), plan(clip=0.3)).clipped_sum(batch)
    torch.testing.assert_close(private(network(), plan(clip=0.3), at_once=4).clipped_sum(batch), whole)


def test_batches_may_be_dictionaries_and_adam_may_step(data: TensorDataset) -> None:
    class Named(Dataset[dict[str, Tensor]]):
        def __len__(self) -> int:
            return N

        def __getitem__(self, place: int) -> dict[str, Tensor]:
            return {"x": data.tensors[0][place], "y": data.tensors[1][place]}

    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    steps = PrivateSteps(
        model, optimizer, plan(batch=2), N, lambda b: cross_entropy(model(b["x"]), b["y"], reduction="none"), seed=1
    )
    for batch in steps.loader(Named()):
        steps.step(batch)
    assert steps.record().epsilon > 0


def test_own_gradients_are_overwritten(data: TensorDataset) -> None:
    """A plain backward pass of the user's own before a private one leaves nothing in `grad`."""
    found = []
    for pollute in (False, True):
        model = network()
        steps = private(model, plan())
        batch = next(iter(steps.loader(data)))
        if pollute:
            (1000 * model(batch[0]).sum()).backward()
        steps.step(batch)
        found.append(flat(model))
    assert torch.equal(*found)


def test_batches_of_somebody_elses_sampler_are_refused(data: TensorDataset) -> None:
    steps = private(network(), plan())
    shuffled = DataLoader(data, batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(0))
    with pytest.raises(PrivacyBroken, match="has not drawn"):
        steps.step(next(iter(shuffled)))
    places = next(steps.batches())
    with pytest.raises(PrivacyBroken, match=f"the plan drew {len(places)}"):
        steps.step(data[: len(places) + 1])
    assert steps.steps == 0 and steps.epsilon() == 0.0


def test_the_global_random_state_stays(data: TensorDataset, untouched_random_state: None) -> None:
    steps = private(network(), plan())
    for batch in steps.loader(data):
        steps.step(batch)


def test_secure_noise_has_no_seed(data: TensorDataset) -> None:
    first, second = network(), network()
    for model in (first, second):
        steps = private(model, plan(source="secure", steps=2), seed=None)
        for batch in steps.loader(data):
            steps.step(batch)
        assert steps.record().noise.startswith("secure")
    assert not torch.equal(flat(first), flat(second))


def test_the_budget_ends_training(data: TensorDataset) -> None:
    steps = private(network(), plan(budget=oracle(1.0, 0.2, 15)))
    for batch in steps.loader(data):
        steps.step(batch)
    with pytest.raises(InvalidArgument, match="10 more steps, 20 in all"):
        next(steps.batches())
    assert len(list(steps.batches(4))) == 4


# What must move, moves


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_weights_that_stand_still_get_no_epsilon(data: TensorDataset, noise: float) -> None:
    steps = private(network(), plan(noise=noise), lr=0.0)
    for batch in steps.loader(data):
        steps.step(batch)
    with pytest.raises(PrivacyBroken, match=r"0\.weight, 0\.bias, 2\.weight and 1 other of 4"):
        steps.record()


def test_parameters_replaced_after_the_optimizer_was_made(data: TensorDataset) -> None:
    """As when a model is moved or given adapters too late: the optimizer trains what nobody uses."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model[2] = nn.Linear(6, CLASSES)
    with pytest.raises(InvalidArgument, match=r"does not hold 2\.weight, 2\.bias"):
        PrivateSteps(model, optimizer, plan(), N, each(model), seed=1)
    model = network()
    steps = private(model, plan())
    batch = next(iter(steps.loader(data)))
    steps._optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    with pytest.raises(InvalidArgument, match="no trained parameters of the model"):
        steps.step(batch)


def test_a_parameter_without_a_gradient_of_its_own(data: TensorDataset) -> None:
    model = network()
    model.register_parameter("unused", nn.Parameter(torch.zeros(3)))
    steps = private(model, plan())
    with pytest.raises(PrivacyBroken, match="unused"):
        for batch in steps.loader(data):
            steps.step(batch)


# What is refused


def test_layers_that_mix_examples_are_refused(data: TensorDataset) -> None:
    model = nn.Sequential(nn.Linear(WIDTH, 4), nn.BatchNorm1d(4), nn.Linear(4, CLASSES))
    with pytest.raises(InvalidArgument, match=r"1 \(BatchNorm1d\) mixes the examples .* use GroupNorm"):
        private(model, plan())

    model[1].requires_grad_(False)
    steps = private(model.eval(), plan())  # with the statistics it came with
    batches = iter(steps.loader(data))
    steps.step(next(batches))
    model.train()  # as a Trainer does before every step
    with pytest.raises(PrivacyBroken, match="BatchNorm1d"):
        steps.step(next(batches))

    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(WIDTH, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(x - x.mean(0))

    steps = private(Centred(), plan())
    with pytest.raises(PrivacyBroken, match="Centred depends on the others"):
        for batch in steps.loader(data):
            steps.step(batch)


class Normalised(nn.Module):
    """Over the batch in training, by its own code: evaluation, in which a model is often looked at, shows nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x - x.mean(0) if self.training else x)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_mixing_in_training_alone_is_found_out(data: TensorDataset, dropout: float) -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(dropout), Normalised())
    steps = private(model, plan())
    with torch.random.fork_rng(), pytest.raises(PrivacyBroken, match="Sequential depends on the others"):
        for batch in steps.loader(data):
            steps.step(batch)
    assert steps.steps == 0


def test_mixing_is_looked_for_again_in_another_mode(data: TensorDataset) -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Normalised()).eval()
    steps = private(model, plan())
    batches = iter(steps.loader(data))
    steps.step(next(batches))
    model.train()
    with pytest.raises(PrivacyBroken, match="Sequential depends on the others"):
        for batch in batches:
            steps.step(batch)
    assert steps.steps == 1


@pytest.mark.parametrize("saved", [True, False])
def test_statistics_beside_the_weights_are_found_out_if_they_are_saved(data: TensorDataset, saved: bool) -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(WIDTH, CLASSES)
            self.register_buffer("mean", torch.zeros(WIDTH), persistent=saved)

        def forward(self, x: Tensor) -> Tensor:
            if len(x):
                self.mean += x.detach().mean(0)
            return self.out(x)

    model = Counting()
    steps = private(model, plan())
    for batch in steps.loader(data):
        steps.step(batch)
    assert ("mean" in model.state_dict()) == saved
    if saved:
        with pytest.raises(PrivacyBroken, match="mean: buffers that changed"):
            steps.record()
    else:
        assert steps.record().epsilon > 0


def test_tied_weights_are_clipped_as_one(data: TensorDataset) -> None:
    """A layer in two places has one gradient, the sum of both: clipped apart, the two would be longer than the clip."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).tanh())

    model = Tied()
    steps = private(model, plan(clip=0.3))
    names = [name for name, _ in model.named_parameters()]
    assert len(names) == 3
    total = torch.zeros(WIDTH * WIDTH + 2 * WIDTH, dtype=torch.float64)
    for x, y in zip(*data[:9], strict=True):
        own = gradient(model, x, y).double()
        assert float(own.norm()) > 0.3
        total += own * 0.3 / own.norm()
    torch.testing.assert_close(steps.clipped_sum(data[:9]).double(), total, atol=1e-6, rtol=1e-5)


def test_dropout_is_no_mixing_and_stays_on(data: TensorDataset) -> None:
    model = nn.Sequential(nn.Linear(WIDTH, 6), nn.Dropout(0.5), nn.Linear(6, CLASSES))
    with torch.random.fork_rng():
        steps = private(model, plan())
        for batch in steps.loader(data):
            steps.step(batch)
    assert all(part.training for part in model.modules()) and steps.record().epsilon > 0


@pytest.mark.parametrize(
    ("changes", "seed", "message"),
    [
        ({"unit": "client", "local": None, "place": "central"}, 7, "unit='client'.*use unit='example'"),
        ({"delta": 0.025}, 7, "delta=0.025 >= 1/n = 0.025"),
        ({}, None, "seed=None"),
        ({"source": "secure"}, 7, "seed=7: secure noise has none"),
    ],
    ids=["client", "delta", "no seed", "seed and secure"],
)
def test_plans_that_do_not_fit(changes: dict[str, Any], seed: int | None, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        private(network(), replace(plan(), **changes), seed=seed)


def test_losses_and_batches_that_are_no_such_thing(data: TensorDataset) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    mean = PrivateSteps(model, optimizer, plan(), N, lambda b: cross_entropy(model(b[0]), b[1]), seed=1)
    with pytest.raises(InvalidArgument, match=r"losses has shape \(\): expected \(2,\)"):
        mean.clipped_sum(data[:13])
    steps = private(model, plan())
    for batch, message in (
        ((torch.zeros(3, WIDTH), torch.zeros(2)), "lengths"),
        ({"x": torch.zeros(3, WIDTH), "id": ["a", "b", "c"]}, r"batch\['id'\] is a list"),
        ({}, "empty of tensors"),
    ):
        with pytest.raises(InvalidArgument, match=message):
            steps.clipped_sum(batch)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="dataset has 7 examples, the plan was given 40"):
        steps.loader(TensorDataset(torch.zeros(7)))
    frozen = network().requires_grad_(False)
    with pytest.raises(InvalidArgument, match="no parameter that requires a gradient"):
        private(frozen, plan())
