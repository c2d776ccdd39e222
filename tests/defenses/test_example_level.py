"""Example-level plans: batches as they are accounted, one example's share of a step, and noise of its scale."""

from dataclasses import replace
from itertools import pairwise
from math import inf, nan, sqrt

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2, kstest
from torch import Generator

from privfm.checks import InvalidArgument
from privfm.defenses import DPPlan
from privfm.defenses.privacy.clipping import Automatic, Flat, PerLayer
from privfm.defenses.privacy.example_level import ExamplePrivacy, LocalSampling, size_classes

WIDTH, C = 5, 0.4
LAYERS = ((0, 2), (2, WIDTH))
LOCAL = LocalSampling(batch_size=4, local_steps=3)
PRIVACY = ExamplePrivacy(Flat(), C, 1.5, LOCAL, LAYERS)


def seeded(seed=0):
    return Generator().manual_seed(seed)


# Batches and steps


def test_rates_and_steps_follow_the_number_of_examples():
    assert [LOCAL.rate(n) for n in (2, 4, 8, 400)] == [1.0, 1.0, 0.5, 0.01]
    assert [LOCAL.steps(n) for n in (2, 400)] == [3, 3]
    epochs = LocalSampling(batch_size=4, epochs=2)
    assert [epochs.steps(n) for n in (1, 4, 5, 400)] == [2, 2, 4, 200]


def test_batches_are_poisson_samples_of_the_rate():
    """Sizes vary as n q (1 - q), pairs occur with q^2: a shuffled epoch has neither."""
    n, steps = 16, 4000
    privacy = replace(PRIVACY, local=LocalSampling(batch_size=4, local_steps=steps))
    rows = torch.zeros(steps, n, dtype=torch.float64)
    for row, places in zip(rows, privacy.batches(n, seeded()), strict=True):
        row[places] = 1
    assert float(rows.sum(1).mean()) == pytest.approx(4, abs=0.12)
    assert float(rows.sum(1).var()) == pytest.approx(16 * 0.25 * 0.75, rel=0.1)
    both = (rows.T @ rows / steps)[torch.triu(torch.ones(n, n), 1) > 0]
    assert float(both.mean()) == pytest.approx(1 / 16, rel=0.04)
    lag = float((rows[1:] * rows[:-1]).mean())  # steps are independent: without replacement it would be 0
    assert lag == pytest.approx(1 / 16, rel=0.05)


def test_a_small_client_uses_everything_and_an_empty_batch_is_one():
    assert [places.tolist() for places in PRIVACY.batches(3, seeded())] == [[0, 1, 2]] * 3
    rare = replace(PRIVACY, local=LocalSampling(batch_size=1, local_steps=40))
    sizes = [len(places) for places in rare.batches(4, seeded())]
    assert 0 in sizes  # 0.75^4 = 0.32 of them
    assert len(sizes) == 40


def test_batches_depend_on_the_generator_alone(untouched_random_state):
    one, same, other = (list(PRIVACY.batches(50, seeded(seed))) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_secure_batches_cannot_be_drawn_again_from_the_seed():
    """Whoever knows which examples a step used gets no amplification by sampling: the seed must not tell."""
    secure = replace(PRIVACY, source="secure", local=LocalSampling(batch_size=100, local_steps=30))
    generator = seeded(1)
    before = generator.get_state()
    one, again = list(secure.batches(200, generator)), list(secure.batches(200, generator))
    assert torch.equal(generator.get_state(), before)
    assert any(not torch.equal(a, b) for a, b in zip(one, again, strict=True))
    sizes = torch.tensor([len(places) for places in one + again], dtype=torch.float64)
    assert float(sizes.mean()) == pytest.approx(100, abs=5 * sqrt(50 / 60))
    assert all(bool((places.diff() > 0).all()) for places in one)


# Sensitivity

values = st.floats(-3, 3, width=32) | st.sampled_from([0.0, 1e20, -1e38, nan, inf])
gradients = st.lists(st.lists(values, min_size=WIDTH, max_size=WIDTH), min_size=1, max_size=8).map(torch.tensor)


@pytest.mark.parametrize("clipping", [Flat(), PerLayer(), PerLayer("size"), Automatic()], ids=str)
@settings(max_examples=40)
@given(rows=gradients, place=st.integers(0, 7))
def test_one_example_moves_a_steps_mean_by_at_most_its_share(clipping, rows, place):
    """With and without it, of one seed: C over the expected batch, which does not follow who was drawn."""
    privacy = replace(PRIVACY, clipping=clipping)
    place %= len(rows)
    without = torch.cat([rows[:place], rows[place + 1 :]])
    means = [
        privacy.noised(privacy.clip(some).sum(0, keepdim=True), [40], [seeded()])[0].double()
        for some in (rows, without)
    ]
    assert bool(torch.stack(means).isfinite().all())
    assert float((means[0] - means[1]).norm()) <= C / 4 * (1 + 1e-4)


def test_a_realised_batch_size_would_break_the_bound():
    """The negative control: the mean over who was drawn moves by more, as the others' shares grow."""
    rows = torch.tensor([[9.0, 0, 0, 0, 0], *[[-9.0, 0, 0, 0, 0]] * 3])
    clipped = PRIVACY.clip(rows)
    mistaken = float((clipped.mean(0) - clipped[1:].mean(0)).norm())
    assert mistaken > 1.9 * C / 4
    quiet = replace(PRIVACY, noise_multiplier=0.0)
    true = [quiet.noised(some.sum(0, keepdim=True), [40], [seeded()]) for some in (clipped, clipped[1:])]
    assert float((true[0] - true[1]).norm()) == pytest.approx(C / 4, rel=1e-5)


def test_the_denominator_is_the_expected_batch():
    """The batch size; all examples where there are fewer."""
    quiet = replace(PRIVACY, noise_multiplier=0.0)
    sums = torch.ones(3, WIDTH)
    means = quiet.noised(sums, [2, 4, 400], [seeded()] * 3)
    assert means[:, 0].tolist() == pytest.approx([1 / 2, 1 / 4, 1 / 4])


# Noise


def fits(noise, deviation):
    """Chi-square on the scale and Kolmogorov-Smirnov on the form, each at 1e-7, two-sided: secure noise has no seed."""
    normal = (noise.double() / deviation).numpy()
    tail = float(chi2.cdf((normal**2).sum(), len(normal)))
    return 5e-8 < tail < 1 - 5e-8 and float(kstest(normal, "norm").pvalue) > 1e-7


@pytest.mark.parametrize("source", ["seeded", "secure"])
def test_every_client_is_noised_by_its_scale_and_no_other(source):
    """An empty batch too: its sum is zero, its noise is not."""
    privacy = replace(PRIVACY, source=source, layers=((0, 8000),))
    sizes = [2, 8, 100]
    noise = privacy.noised(torch.zeros(3, 8000), sizes, [seeded(seed) for seed in range(3)])
    for row, batch in zip(noise, (2, 4, 4), strict=True):
        assert fits(row, 1.5 * C / batch)
        assert not any(fits(row, 1.5 * C / batch * wrong) for wrong in (0.5, 0.9, 1.1, 2.0))
    correlations = torch.corrcoef(noise) - torch.eye(3)
    assert float(correlations.abs().max()) < 6.5 / sqrt(8000)


def test_steps_draw_fresh_noise():
    generator = seeded()
    one, two = (PRIVACY.noised(torch.zeros(1, WIDTH), [8], [generator]) for _ in range(2))
    assert not torch.equal(one, two)


def test_clients_may_have_noise_of_their_own():
    local = replace(LOCAL, noise_by_examples=((2, 3.0), (10, 1.0)))
    assert [local.noise(n, 99.0) for n in (2, 9, 10, 500)] == [3.0, 3.0, 1.0, 1.0]
    assert LOCAL.noise(2, 99.0) == 99.0
    with pytest.raises(InvalidArgument, match="a client has 1 examples, fewer than any"):
        local.noise(1, 99.0)
    privacy = ExamplePrivacy(Flat(), C, 99.0, local, ((0, 8000),))
    noise = privacy.noised(torch.zeros(2, 8000), [4, 40], [seeded(1), seeded(2)])
    assert fits(noise[0], 3.0 * C / 4)
    assert fits(noise[1], 1.0 * C / 4)


# Classes of sizes


@pytest.mark.parametrize("sizes", [[5], [1, 2, 3], [7, 7, 7], list(range(1, 200)), [1, 1000]], ids=str)
def test_classes_cover_every_size_once(sizes):
    classes = size_classes(sizes)
    assert len(classes) <= 16
    for size in sizes:
        assert sum(least <= size <= most for least, most in classes) == 1
    assert all(before[1] < after[0] for before, after in pairwise(classes))


def test_a_class_is_calibrated_at_its_highest_rate_and_its_most_steps(monkeypatch):
    """So that every size in it keeps to epsilon, whatever its own mix of the two."""
    asked = []

    def noted(plan, epsilon, rounds, examples, d):
        asked.append((plan.local, *examples))
        return float(len(asked))

    monkeypatch.setattr("privfm.defenses.privacy.plan.calibrated_noise", noted)
    local = LocalSampling(batch_size=8)
    plan = DPPlan(9.0, 1.0, 1.0, 1e-3, unit="example", place="local", sampling="full", local=local)
    sizes = [n for first in (30, 60) for n in range(first, first + 17)]
    own = plan.with_epsilon(4.0, 1, sizes, own_noise=True)
    assert len(asked) == 16
    assert own.noise_multiplier == 16
    for n in sizes:
        strict, least = asked[int(own.local.noise(n, 0.0)) - 1]
        assert strict.rate(least) >= local.rate(n)
        assert strict.steps(least) >= local.steps(n)


# Refusals


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"epochs": 0}, "epochs"),
        ({"local_steps": 0}, "local_steps"),
        ({"noise_by_examples": ((9, 1.0), (2, 1.0))}, "rising sizes"),
        ({"noise_by_examples": ((2, -1.0),)}, "noise_by_examples"),
    ],
    ids=["batch", "epochs", "steps", "order", "negative"],
)
def test_a_schedule_out_of_range_is_refused(wrong, sentence):
    with pytest.raises(InvalidArgument, match=sentence):
        LocalSampling(**{"batch_size": 4, **wrong})


def test_nobodys_sizes_are_refused():
    with pytest.raises(InvalidArgument, match="give all sizes"):
        size_classes([])
