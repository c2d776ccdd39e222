"""Quantile regression: what features explain is taken out, and nothing is learnt from the judged examples."""

from math import sqrt
from statistics import NormalDist

import numpy as np
import pytest
from numpy.random import default_rng
from scipy.stats import mannwhitneyu, spearmanr

from privfm.attacks.membership.quantile import QuantileRegression
from privfm.attacks.membership.reference import Threshold
from privfm.checks import InvalidArgument
from privfm.contracts.membership import Signals

SCORES = ("standardised", "rank")


def area(scores, members):
    scores, members = np.ravel(scores), np.ravel(members)
    here, there = scores[members], scores[~members]
    return float(mannwhitneyu(here, there).statistic) / (len(here) * len(there))


def uneven(n=2_000, z=4_000, distance=1.5, *, seed=0, models=1):
    """Level and deviation of the signal follow from two of three features; members lie `distance` deviations higher."""
    rng = default_rng(seed)
    features, others = rng.uniform(-1, 1, (n, 3)), rng.uniform(-1, 1, (z, 3))
    inside = rng.random((models, n)) < 0.5

    def signals(v, raised):
        return 3 * np.sin(2 * v[:, 0]) + np.exp(v[:, 1]) * (rng.standard_normal((models, len(v))) + raised)

    return Signals(signals(features, distance * inside), inside, signals(others, 0.0)), features, others


@pytest.mark.parametrize(("score", "lost"), [("standardised", 0.03), ("rank", 0.03)])
def test_comes_close_to_knowing_the_distribution(score, lost):
    signals, features, others = uneven(seed=1)
    members = signals.inside[0]
    best = NormalDist().cdf(1.5 / sqrt(2))  # with mean and deviation of every example known
    found = area(QuantileRegression(score).on(features, others)(signals), members)
    assert best - lost < found < best + 3 * sqrt(best * (1 - best) / 950)
    assert found > area(Threshold()(signals), members) + 0.1


def test_standardised_scores_of_others_have_mean_zero_and_deviation_one():
    signals, features, others = uneven(distance=0.0, seed=2)
    scores = QuantileRegression().on(features, others)(signals)
    assert abs(scores.mean()) < 0.1
    assert scores.std() == pytest.approx(1, abs=0.1)
    for low, high in ((-1, 0), (0, 1)):  # whichever deviation their features give them: true ones differ by e
        here = (features[:, 1] > low) & (features[:, 1] < high)
        assert scores[here].std() == pytest.approx(1, abs=0.12)


def test_ranks_of_others_reach_each_level_as_often_as_it_says():
    signals, features, others = uneven(distance=0.0, seed=2)
    attack = QuantileRegression("rank", levels=(0.25, 0.5, 0.75, 0.9))
    scores = attack.on(features, others)(signals)
    for place, level in enumerate(attack.levels, start=1):
        assert (scores >= place).mean() == pytest.approx(1 - level, abs=0.05)
    assert len(np.unique(scores)) == len(scores)  # finer than the levels
    assert scores.min() > 0
    assert scores.max() < 5


def test_ranks_rise_with_the_signal_though_predicted_quantiles_cross():
    signals, features, others = uneven(n=40, z=150, seed=8)
    ladder = np.linspace(-6, 6, 200)
    asked = Signals(np.tile(ladder, 40)[None], np.zeros((1, 8_000), dtype=bool), signals.population)
    close = QuantileRegression("rank", levels=(0.4, 0.44, 0.48, 0.52, 0.56, 0.6))  # so close that trees mix them up
    scores = close.on(np.repeat(features, 200, axis=0), others)(asked).reshape(40, 200)
    assert (np.diff(scores) > 0).all()


@pytest.mark.parametrize("score", SCORES)
def test_features_that_say_nothing_leave_the_order_of_the_signal(score):
    signals, features, others = uneven(n=300, z=500, seed=3)
    scores = QuantileRegression(score).on(np.zeros_like(features), np.zeros_like(others))(signals)
    assert spearmanr(scores, signals.values[0]).statistic == pytest.approx(1)


@pytest.mark.parametrize("score", SCORES)
def test_random_labels_give_chance(score):
    signals, features, others = uneven(z=1_000, distance=0.0, seed=4)
    members = signals.inside[0]
    deviation = sqrt(2_001 / (12 * members.sum() * (~members).sum()))
    found = area(QuantileRegression(score).on(features, others)(signals), members)
    assert abs(found - 0.5) < 3 * deviation


@pytest.mark.parametrize("score", SCORES)
def test_permuted_examples_have_permuted_scores_and_others_matter_not(score):
    signals, features, others = uneven(n=60, z=300, seed=5)
    attack = QuantileRegression(score, iterations=20)
    scores = attack.on(features, others)(signals)
    order = default_rng(0).permutation(60)[:40]
    moved = Signals(signals.values[:, order], signals.inside[:, order], signals.population)
    np.testing.assert_array_equal(attack.on(features[order], others)(moved), scores[order])


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.usefixtures("untouched_random_state")
def test_the_same_seed_gives_the_same_scores(score):
    signals, features, others = uneven(n=60, z=300, seed=5)
    twice = [QuantileRegression(score, iterations=20, seed=3).on(features, others)(signals) for _ in range(2)]
    np.testing.assert_array_equal(*twice)


def test_another_seed_draws_other_folds():
    signals, features, others = uneven(n=60, z=300, seed=5)
    found = [QuantileRegression(iterations=20, seed=seed).on(features, others)(signals) for seed in (0, 1)]
    assert not np.array_equal(*found)


@pytest.mark.parametrize("score", SCORES)
def test_shadow_models_are_not_read_and_models_are_attacked_in_turn(score):
    signals, features, others = uneven(n=100, z=300, seed=6, models=3, distance=3.0)
    attack = QuantileRegression(score, iterations=20).on(features, others)
    found = attack.pooled(signals)
    np.testing.assert_array_equal(found.scores[1], attack(signals.take([1])))
    assert area(found.scores, found.members) > 0.8


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("level", [-1e4, 0.0])
def test_extreme_and_constant_signals_are_finite(score, level):
    signals, features, others = uneven(n=60, z=300, seed=5)
    values = signals.values.copy()
    values[0, :5] = -1e4
    flat = Signals(values, signals.inside, np.full_like(signals.population, level))
    assert np.isfinite(QuantileRegression(score, iterations=5).on(features, others)(flat)).all()


def test_queries_are_averaged():
    signals, features, others = uneven(n=60, z=300, seed=5)
    attack = QuantileRegression(iterations=10).on(features, others)
    pair = [np.stack([values - 0.5, values + 0.5], axis=2) for values in (signals.values, signals.population)]
    np.testing.assert_allclose(attack(Signals(pair[0], signals.inside, pair[1])), attack(signals), rtol=1e-6)


def test_bad_input_is_refused():
    signals, features, others = uneven(n=60, z=300)
    on = QuantileRegression().on
    with pytest.raises(InvalidArgument, match=r"needs Signals.population"):
        on(features, others)(Signals(signals.values, signals.inside))
    with pytest.raises(InvalidArgument, match=r"features are of \(59, 300\) .*signals of \(60, 300\)"):
        on(features[1:], others)(signals)
    with pytest.raises(InvalidArgument, match=r"expected \(n, k\) and \(z, k\)"):
        on(features[:, :2], others)
    with pytest.raises(InvalidArgument, match=r"expected \(n, k\) and \(z, k\)"):
        on(features[:, 0], others[:, 0])
    with pytest.raises(InvalidArgument, match="not finite"):
        on(features, np.where(others > 0.9, np.nan, others))
    with pytest.raises(InvalidArgument, match="population of 199: expected at least 200"):
        on(features, others[:199])
    with pytest.raises(InvalidArgument, match="population of 300: expected at least 1000"):
        QuantileRegression("rank", levels=(0.5, 0.999)).on(features, others)


def test_settings_are_checked():
    for levels in ((), (0.5, 0.5), (0.5, 0.2), (0.0, 0.5), (0.5, 1.0)):
        with pytest.raises(InvalidArgument, match="expected rising numbers"):
            QuantileRegression("rank", levels=levels)
    with pytest.raises(InvalidArgument, match="iterations=0"):
        QuantileRegression(iterations=0)
    with pytest.raises(InvalidArgument, match="seed=-1"):
        QuantileRegression(seed=-1)
    with pytest.raises(InvalidArgument, match=r"score='ranks'.*did you mean 'rank'"):
        QuantileRegression("ranks")


def test_the_report_can_name_what_was_used():
    _, features, others = uneven(n=60, z=300)
    attack = QuantileRegression().on(features, others)
    assert attack.used[1:] == ("features of the examples", "population that the target was not trained on")
    assert "array" not in repr(attack)
