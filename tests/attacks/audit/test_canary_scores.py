"""The likelihood-ratio score of sampled Gaussian traces, and the Gaussian fit."""

import numpy as np
import pytest
from scipy.stats import norm

from privfm.attacks.audit.gaussian import gaussian_epsilon
from privfm.attacks.audit.gaussian_fit import gaussian_fit
from privfm.attacks.audit.scores import sampled_gaussian_score
from privfm.checks import InvalidArgument

DELTA = 1e-5


def test_score_is_the_log_ratio_of_densities():
    values = np.random.default_rng(0).normal(0.2, 0.8, (5, 40))
    noise, rate = 0.8, 0.3
    inside = (1 - rate) * norm.pdf(values, 0, noise) + rate * norm.pdf(values, 1, noise)
    expected = np.log(inside / norm.pdf(values, 0, noise)).sum(axis=0)
    assert sampled_gaussian_score(values, noise, rate) == pytest.approx(expected, rel=1e-10)


def test_score_at_full_participation_is_the_sum():
    values = np.random.default_rng(0).normal(size=(5, 40))
    expected = (values.sum(axis=0) - 2.5) / 4
    assert sampled_gaussian_score(values, 2.0, 1.0) == pytest.approx(expected, rel=1e-12)


def test_score_of_extreme_traces_is_finite_and_ordered():
    scores = sampled_gaussian_score([[-1e6, -10.0, 0.5, 10.0, 1e6]], 0.01, 1e-4)
    assert np.isfinite(scores).all() and (np.diff(scores) >= 0).all()
    assert scores[0] == pytest.approx(np.log1p(-1e-4), rel=1e-12)
    assert scores[-1] == pytest.approx(np.log(1e-4) + (1e6 - 0.5) * 1e4, rel=1e-12)


def test_score_beats_the_sum_where_canaries_are_sampled():
    generator = np.random.default_rng(1)
    coins = generator.random(20_000) < 0.5
    values = ((generator.random((20, 20_000)) < 0.1) & coins) + generator.normal(0, 0.681, (20, 20_000))
    top = {}
    for name, score in (("ratio", sampled_gaussian_score(values, 0.681, 0.1)), ("sum", values.sum(axis=0))):
        top[name] = coins[np.argsort(score)[-500:]].mean()
    assert top["ratio"] > top["sum"] + 0.02


@pytest.mark.parametrize(
    ("values", "noise", "rate"),
    [
        ([1.0], 1.0, 0.5),
        ([[np.nan]], 1.0, 0.5),
        ([[np.inf]], 1.0, 0.5),
        ([[1.0]], 0.0, 0.5),
        ([[1.0]], 1.0, 0.0),
        ([[1.0]], 1.0, 1.5),
    ],
)
def test_bad_traces_are_refused(values, noise, rate):
    with pytest.raises(InvalidArgument):
        sampled_gaussian_score(values, noise, rate)


def test_fit_by_hand():
    estimate = gaussian_fit([3.0, 5.0], [1.0, 3.0], DELTA)  # means 4 and 2, pooled variance (2 + 2) / 2 = 2
    assert estimate.epsilon == pytest.approx(gaussian_epsilon(2 / 2**0.5, DELTA))
    margin = 1.959963984540054 * (1 / 2 + 1 / 2 + 2 / (2 * 2)) ** 0.5
    assert estimate.high == pytest.approx(gaussian_epsilon(2**0.5 + margin, DELTA))
    assert estimate.low == 0.0 and "Gaussian" in estimate.assumes and estimate.delta == DELTA


@pytest.mark.parametrize("scale", [1.0, 250.0])
def test_fit_covers_the_truth_and_not_half_or_double_of_it(scale):
    mu, covered, halved, doubled = 0.924930898, 0, 0, 0  # epsilon 4
    for seed in range(40):
        generator = np.random.default_rng(seed)
        inside, outside = scale * generator.normal(mu, 1, 1000), scale * generator.normal(0, 1, 1000)
        found = gaussian_fit(inside + 7, outside + 7, DELTA)
        covered += found.low <= 4 <= found.high
        halved += found.low <= 2 <= found.high
        doubled += found.low <= 8 <= found.high
    assert covered >= 35 and halved == doubled == 0


def test_fit_at_its_ends():
    assert gaussian_fit([0.0, 1.0], [5.0, 6.0], DELTA).epsilon == 0.0
    assert gaussian_fit([1.0, 1.0], [0.0, 0.0], DELTA).high == float("inf")
    assert gaussian_fit([1.0, 1.0], [1.0, 1.0], DELTA).high == 0.0
    for bad in (([1.0], [0.0, 1.0], DELTA), ([1.0, np.inf], [0.0, 1.0], DELTA), ([1.0, 2.0], [0.0, 1.0], 0.0)):
        with pytest.raises(InvalidArgument):
            gaussian_fit(*bad)
