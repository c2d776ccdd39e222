"""Checks of the mechanism: uniform p-values when claims hold, and every deliberate mistake found.

Scenes are drawn here, from the definition: noise, plus what arrives of whoever took part. Power is worked out here from
chi-square quantiles; each test has its own seeds.
"""

from math import comb, sqrt

import numpy as np
import pytest
from scipy.stats import chi2, kstest, norm

from privfm.attacks.audit.inclusion import inclusion
from privfm.attacks.audit.mechanism import (
    check_mechanism,
    holm,
    mean_shift,
    noise_correlation,
    noise_scale,
    noise_shape,
    shift_spread,
    smallest_p,
)
from privfm.attacks.audit.statements import Check
from privfm.checks import InvalidArgument

SCENES = {"everybody": (1.0, 16.7), "a tenth": (0.1, 2.102)}  # rate, noise multiplier: epsilon about 1 after 20 rounds


def scene(seed, rate, noise, *, rounds=20, canaries=1000, arrives=1.0):
    """What is released of ghost canaries, half of which are in, and who took part."""
    rng = np.random.default_rng(seed)
    sent = (rng.random((rounds, canaries)) < rate) & (rng.random(canaries) < 0.5)
    return sent * np.asarray(arrives) + rng.normal(0, noise, (rounds, canaries)), sent


def named(checks):
    return {check.name: check for check in checks}


# When claims hold


@pytest.fixture(scope="module")
def honest():
    """All checks of 400 honest scenes, small and sampled by halves: p-values by name."""
    found = {}
    for seed in range(400):
        values, sent = scene(3_000_000 + seed, 0.5, 1.5, rounds=8, canaries=40)
        for check in check_mechanism(values, sent, 1.5):
            found.setdefault(check.name, []).append(check.p_value)
    return found


UNIFORM = ("noise scale", "noise shape", "noise from round to round", "noise across coordinates", "mean shift",
           "shift spread")  # fmt: skip


@pytest.mark.parametrize("name", UNIFORM)
def test_p_values_are_uniform_when_claims_hold(honest, name):
    assert len(honest[name]) == 400
    assert kstest(honest[name], "uniform").pvalue > 0.01


def test_the_check_of_all_pairs_of_rounds_gives_no_more_false_alarms_than_it_says(honest):
    assert kstest(honest["noise that comes back"], "uniform", alternative="greater").pvalue > 0.01
    assert np.mean(np.array(honest["noise that comes back"]) < 0.1) > 0.05  # and is not just too careful


def test_the_smallest_p_value_gives_no_more_false_alarms_than_it_says(honest):
    smallest = [
        smallest_p([Check(name, 0, 0, p_values[seed], 1) for name, p_values in honest.items()]) for seed in range(400)
    ]
    assert kstest(smallest, "uniform", alternative="greater").pvalue > 0.01
    assert 0.02 < np.mean(np.array(smallest) < 0.1) < 0.16


@pytest.mark.parametrize("name", SCENES)
def test_honest_canaries_pass(name):
    rate, noise = SCENES[name]
    checks = check_mechanism(*scene(11, rate, noise), noise)
    assert len(checks) == 7
    assert smallest_p(checks) > 0.01


# Mistakes


@pytest.mark.parametrize("name", SCENES)
def test_halved_noise_is_found(name):
    rate, noise = SCENES[name]
    values, sent = scene(12, rate, noise / 2)
    assert noise_scale(values, sent, noise).found == pytest.approx(0.5, abs=0.02)
    assert noise_scale(values, sent, noise).p_value < 1e-6
    assert noise_shape(values, sent, noise).p_value < 1e-6
    assert smallest_p(check_mechanism(values, sent, noise)) < 1e-6
    assert mean_shift(values, sent, noise).p_value > 1e-3  # what arrives is right


@pytest.mark.parametrize("arrives", [10.0, 3.0], ids=["forgotten clip", "weight 3"])
@pytest.mark.parametrize("name", SCENES)
def test_what_arrives_too_large_is_found(name, arrives):
    rate, noise = SCENES[name]
    values, sent = scene(13, rate, noise, arrives=arrives)
    found = mean_shift(values, sent, noise)
    assert found.n == sent.sum()
    assert found.found == pytest.approx(arrives, abs=4 * noise / sqrt(sent.sum()))
    assert found.p_value < 1e-6
    assert smallest_p(check_mechanism(values, sent, noise)) < 1e-6
    assert noise_scale(values, sent, noise).p_value > 1e-3  # a wrong clip does not make noise look wrong, nor right


def test_halved_noise_is_not_hidden_by_a_forgotten_clip():
    values, sent = scene(14, 0.5, 0.5, arrives=10.0)
    assert noise_scale(values, sent, 1.0).found == pytest.approx(0.5, abs=0.02)


def test_weights_are_compared_with_what_was_declared():
    weights = np.linspace(0.1, 1.0, 1000)
    values, sent = scene(15, 1.0, 2.0, arrives=weights)
    assert mean_shift(values, sent, 2.0, weights).p_value > 1e-3
    assert mean_shift(values, sent, 2.0, weights).found == pytest.approx(1.0, abs=0.15)
    assert mean_shift(values, sent, 2.0).p_value < 1e-6
    twice, _ = scene(15, 1.0, 2.0, arrives=2 * weights)
    assert mean_shift(twice, sent, 2.0, weights).found == pytest.approx(2.0, abs=0.15)


def test_mean_shift_by_hand():
    values, sent = np.array([[0.5, 9.0], [1.5, 3.0]]), np.array([[True, False], [True, True]])
    found = mean_shift(values, sent, 2.0, [1.0, 0.5])
    assert found.found == pytest.approx((0.5 + 1.5 + 0.5 * 3.0) / 2.25)
    assert found.p_value == pytest.approx(2 * norm.sf(abs(3.5 / 2.25 - 1) * 1.5 / 2.0))
    assert found.n == 3


def test_weights_that_are_right_on_average_only():
    arrives = np.where(np.arange(1000) % 2 == 0, 0.2, 1.8)
    values, sent = scene(16, 1.0, 2.0, arrives=arrives)
    assert mean_shift(values, sent, 2.0).p_value > 1e-3
    assert shift_spread(values, sent, 2.0).p_value < 1e-6


def test_shift_spread_by_hand():
    values, sent = np.array([[0.5, 9.0], [1.5, 3.0]]), np.array([[True, False], [True, True]])
    found = shift_spread(values, sent, 2.0)
    statistic = 0.0 + (3.0 - 1.0) ** 2 / 4  # the first canary arrives as 1 on average
    assert found.found == pytest.approx(sqrt(statistic / 2))
    assert found.p_value == pytest.approx(2 * min(chi2.cdf(statistic, 2), chi2.sf(statistic, 2)))
    weighted = ((0.5 * (0.5 - 0.5) + 0.5 * (1.5 - 0.5)) ** 2 / 0.5 + (3.0 - 1.0) ** 2) / 4  # the first declares 0.5
    assert shift_spread(values, sent, 2.0, [0.5, 1.0]).found == pytest.approx(sqrt(weighted / 2))


def test_noise_scale_by_hand():
    found = noise_scale([[3.0, -1.0], [2.0, 50.0]], [[False, False], [False, True]], 2.0)
    assert (found.found, found.n) == (pytest.approx(sqrt(14 / 3) / 2), 3)
    assert found.p_value == pytest.approx(2 * min(chi2.cdf(3.5, 3), chi2.sf(3.5, 3)))


@pytest.mark.parametrize(("share", "samples"), [(0.5, 50), (0.9, 2000), (0.95, 10000)])
def test_power_of_the_noise_scale(share, samples):
    """Alpha 0.001, power 0.99. The closed form first, then 500 draws of a chi-square, against noise too small."""
    least = chi2.ppf(0.0005, samples)
    assert chi2.cdf(least / share**2, samples) > 0.99
    rng = np.random.default_rng(17)
    sent = np.zeros((1, samples), dtype=bool)
    found = [noise_scale(rng.normal(0, share, (1, samples)), sent, 1.0).p_value for _ in range(500)]
    assert np.mean(np.array(found) < 0.001) > 0.975  # 0.99 less 3 deviations
    assert chi2.cdf(chi2.ppf(0.0005, samples // 4) / share**2, samples // 4) < 0.9  # a quarter is not enough


# Noise that is not new, or not normal


def test_the_same_noise_in_every_round_is_found():
    rng = np.random.default_rng(18)
    values, sent = np.tile(rng.normal(0, 2.0, 1000), (20, 1)), rng.random((20, 1000)) < 0.1
    found = named(noise_correlation(values + sent, sent))
    assert found["noise from round to round"].found == pytest.approx(1.0)
    assert found["noise from round to round"].p_value < 1e-6
    assert found["noise that comes back"].p_value < 1e-6
    assert found["noise across coordinates"].p_value > 1e-3


def test_noise_that_comes_back_once_is_found():
    values, sent = scene(19, 0.1, 2.0)
    bare = named(noise_correlation(values, sent))["noise that comes back"]
    values[17][~sent[17]] = values[3][~sent[17]]
    found = named(noise_correlation(values, sent))
    assert bare.p_value > 1e-3
    assert found["noise that comes back"].p_value < 1e-6
    assert found["noise from round to round"].p_value > 1e-3  # 14 rounds apart


def test_one_number_for_all_coordinates_is_found():
    rng = np.random.default_rng(20)
    values, sent = np.repeat(rng.normal(0, 2.0, (20, 1)), 500, axis=1), np.zeros((20, 500), dtype=bool)
    assert named(noise_correlation(values, sent))["noise across coordinates"].p_value < 1e-6


def test_the_correlation_of_all_pairs_by_a_loop():
    values, sent = scene(21, 0.3, 1.0, rounds=5, canaries=60)
    largest = 0.0
    for first in range(5):
        for second in range(first):
            both = ~sent[first] & ~sent[second]
            a, b = values[first][both], values[second][both]
            largest = max(largest, abs(a @ b) / sqrt(a @ a * (b @ b)), key=abs)
    assert abs(named(noise_correlation(values, sent))["noise that comes back"].found) == pytest.approx(largest)


def test_noise_of_another_shape_is_found():
    rng = np.random.default_rng(22)
    values, sent = rng.laplace(0, 1 / sqrt(2), (20, 1000)), np.zeros((20, 1000), dtype=bool)  # variance 1
    assert noise_shape(values, sent, 1.0).p_value < 1e-6
    assert noise_scale(values, sent, 1.0).found == pytest.approx(1.0, abs=0.03)


# Without noise


def test_without_noise_everything_must_be_exact():
    sent = np.array([[True, False], [False, True]])
    exact = sent.astype(float)
    assert [check.p_value for check in check_mechanism(exact * (1 - 1e-7), sent, 0.0)] == [1.0, 1.0]
    assert noise_scale(exact + 1e-3, sent, 0.0) == Check("noise scale", pytest.approx(1e-3), 0.0, 0.0, 2)
    assert mean_shift(10 * exact, sent, 0.0) == Check("mean shift", 10.0, 1.0, 0.0, 2)


def test_no_noise_where_some_was_claimed():
    values, sent = scene(23, 0.5, 0.0)
    checks = named(check_mechanism(values, sent, 1.0))
    assert checks["noise scale"] == Check("noise scale", 0.0, 1.0, 0.0, int((~sent).sum()))
    assert "noise from round to round" not in checks  # nothing to correlate


# Who is drawn


@pytest.mark.parametrize(("population", "rate"), [(200, 0.1), (20, 0.1), (30, 0.5)])
def test_poisson_sampling_passes_at_the_stated_rate(population, rate):
    found = {}
    for seed in range(400):
        drawn = np.random.default_rng(4_000_000 + seed).random((20, population)) < rate
        for check in inclusion(drawn.sum(1), population, rate, participation=drawn):
            found.setdefault(check.name, []).append(check.p_value)
    assert set(found) == {"sampling rate", "cohort size spread", "unit spread"}
    for p_values in found.values():  # of counts: larger than uniform, but not by much
        assert kstest(p_values, "uniform", alternative="greater").pvalue > 0.01
        assert np.mean(np.array(p_values) < 0.2) > 0.12


@pytest.mark.parametrize(("population", "size", "rounds"), [(200, 20, 7), (20, 2, 12)])
def test_a_fixed_cohort_is_found_from_so_many_rounds_on(population, size, rounds):
    q = size / population
    in_one = comb(population, size) * q**size * (1 - q) ** (population - size)  # of just that size
    for played in (3, rounds - 1, rounds):
        spread = inclusion([size] * played, population, q)[1]
        assert (spread.name, spread.found) == ("cohort size spread", 0.0)
        assert spread.p_value == pytest.approx(2 * in_one**played, rel=1e-4)
    assert inclusion([size] * (rounds - 1), population, q)[1].p_value > 1e-6
    assert spread.p_value < 1e-6
    assert inclusion([size] * 20, population, q)[1].p_value < 1e-6


def test_the_law_of_the_spread_by_enumeration():
    """Two rounds of Binomial(4, 0.3), around 1: all 25 outcomes."""
    mass = [comb(4, k) * 0.3**k * 0.7 ** (4 - k) for k in range(5)]
    observed = (0 - 1) ** 2 + (3 - 1) ** 2
    lower = sum(mass[a] * mass[b] for a in range(5) for b in range(5) if (a - 1) ** 2 + (b - 1) ** 2 <= observed)
    upper = sum(mass[a] * mass[b] for a in range(5) for b in range(5) if (a - 1) ** 2 + (b - 1) ** 2 >= observed)
    assert inclusion([0, 3], 4, 0.3)[1].p_value == pytest.approx(2 * min(lower, upper))


def test_the_mean_covariance_of_pairs_is_in_the_sizes():
    """A fixed cohort: pairs are drawn together n (n-1) / (N (N-1)) of the time, and the spread says so."""
    population, size, q = 30, 6, 0.2
    rng = np.random.default_rng(24)
    drawn = np.stack([rng.permutation(population) < size for _ in range(50)])
    together = np.mean([np.outer(row, row)[np.triu_indices(population, 1)].mean() for row in drawn])
    assert together == pytest.approx(size * (size - 1) / (population * (population - 1)))
    spread = inclusion(drawn.sum(1), population, q)[1]
    covariance = (spread.found - 1) * population * q * (1 - q) / (population * (population - 1))
    assert q**2 + covariance == pytest.approx(together)


def test_clusters_that_come_together_are_found():
    rng = np.random.default_rng(25)
    drawn = np.repeat(rng.random((20, 20)) < 0.1, 10, axis=1)  # 20 groups of 10, each drawn as one
    assert inclusion(drawn.sum(1), 200, 0.1)[1].found > 3
    assert inclusion(drawn.sum(1), 200, 0.1)[1].p_value < 1e-6


def test_another_rate_is_found():
    drawn = np.random.default_rng(26).random((20, 200)) < 0.2
    rate = inclusion(drawn.sum(1), 200, 0.1)[0]
    assert rate.found == pytest.approx(2.0, abs=0.15)
    assert rate.p_value < 1e-6


def test_taking_turns_is_found_by_the_units():
    rng = np.random.default_rng(27)
    drawn = np.concatenate([np.eye(10, dtype=bool)[:, rng.permutation(200) % 10] for _ in range(2)])  # two shuffles
    unit = named(inclusion(drawn.sum(1), 200, 0.1, participation=drawn))["unit spread"]
    assert (unit.found, unit.p_value < 1e-6) == (0.0, True)


def test_the_same_cohort_in_every_round_is_found_by_the_units():
    rng = np.random.default_rng(28)
    drawn = np.tile(rng.random(200) < 0.1, (20, 1))
    assert named(inclusion(drawn.sum(1), 200, 0.1, participation=drawn))["unit spread"].p_value < 1e-6


def test_a_large_population_is_no_different_from_a_normal_one():
    """Beyond what is convolved: chi-square with one degree a round, to what 90,000 deviations squared leave."""
    rng = np.random.default_rng(29)
    for factor in (1.0, 1.15):
        sizes = np.round(100_000 + factor * rng.normal(0, 300, 1000)).astype(int)
        statistic = float(np.square(sizes - 100_000).sum()) / 90_000
        expected = 2 * min(chi2.cdf(statistic, 1000), chi2.sf(statistic, 1000))
        assert inclusion(sizes, 1_000_000, 0.1)[1].p_value == pytest.approx(max(expected, 1e-10), rel=1e-2)


def test_claims_that_fix_the_size():
    assert inclusion([20, 20], 200, 0.1, "fixed_size") == (Check("cohort size (fixed_size)", 1.0, 1.0, 1.0, 2),)
    assert inclusion([20, 21], 200, 0.1, "fixed_size")[0].p_value == 0.0
    assert inclusion([200, 199], 200, 0.1, "full")[0].p_value == 0.0
    assert inclusion([200, 200], 200, 1.0, "full")[0].p_value == 1.0
    assert [check.p_value for check in inclusion([200, 200], 200, 1.0)] == [1.0, 1.0]
    assert [check.p_value for check in inclusion([200, 199], 200, 1.0)] == [0.0, 0.0]


# Families


def test_holm_by_hand():
    checks = [Check(name, 0, 0, p_value, 1) for name, p_value in (("a", 0.03), ("b", 0.01), ("c", 0.04), ("d", 0.5))]
    assert [check.p_value for check in holm(checks)] == pytest.approx([0.09, 0.04, 0.09, 0.5])
    assert [check.name for check in holm(checks)] == ["a", "b", "c", "d"]
    assert smallest_p(checks) == pytest.approx(0.04)
    assert (smallest_p([]), holm([])) == (1.0, ())


def test_checks_of_cohorts_join_the_family():
    values, sent = scene(30, 0.1, 2.0, canaries=100)
    cohorts = inclusion([20] * 20, 200, 0.1)
    assert check_mechanism(values, sent, 2.0, cohorts=cohorts)[-2:] == cohorts
    assert smallest_p(check_mechanism(values, sent, 2.0, cohorts=cohorts)) < 1e-6


def test_what_cannot_be_tested_is_left_out():
    values = np.random.default_rng(31).normal(0, 1, (3, 20))
    everybody, nobody = np.ones((3, 20), dtype=bool), np.zeros((3, 20), dtype=bool)
    assert set(named(check_mechanism(values + 1, everybody, 1.0))) == {"mean shift", "shift spread"}
    assert "mean shift" not in named(check_mechanism(values, nobody, 1.0))


def test_inputs_are_left_alone():
    values, sent = scene(32, 0.5, 1.0, canaries=30)
    copies = values.copy(), sent.copy()
    check_mechanism(values, sent, 1.0)
    assert np.array_equal(values, copies[0])
    assert np.array_equal(sent, copies[1])


# Bad input


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: noise_scale([1.0], [True], 1.0), "shape"),
        (lambda: noise_scale([[1.0]], [[0]], 1.0), "true or false"),
        (lambda: noise_scale([[1.0, 2.0]], [[True]], 1.0), "shape"),
        (lambda: noise_scale([[float("nan")]], [[False]], 1.0), "finite"),
        (lambda: noise_scale([[1.0]], [[False]], -1.0), "noise_multiplier"),
        (lambda: noise_scale([[1.0]], [[True]], 1.0), "every canary took part"),
        (lambda: noise_shape([[1.0]], [[False]], 0.0), "noise_scale"),
        (lambda: mean_shift([[1.0]], [[False]], 1.0), "no canary took part"),
        (lambda: mean_shift([[1.0]], [[True]], 1.0, [2.0]), "expected"),
        (lambda: mean_shift([[1.0]], [[True]], 1.0, [1.0, 1.0]), "1 canaries"),
        (lambda: shift_spread([[1.0]], [[True]], 0.0), "mean_shift"),
        (lambda: inclusion([], 10, 0.1), "sampled"),
        (lambda: inclusion([1.5], 10, 0.1), "whole"),
        (lambda: inclusion([11], 10, 0.1), "population"),
        (lambda: inclusion([1], 10, 0.0), "rate"),
        (lambda: inclusion([1], 10, 0.1, "poison"), "poisson"),
        (lambda: inclusion([1], 2, 0.1, participation=[[True, True]]), "sizes"),
        (lambda: inclusion([1], 2, 0.1, participation=[[True]]), "participation"),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(InvalidArgument, match=words):
        call()
