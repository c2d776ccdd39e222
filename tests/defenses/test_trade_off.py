"""Trade-off functions of plans: never above the exact ones, in both directions, and close to them.

Exact functions come from the Neyman-Pearson lemma, written out here: for one round of Poisson sampling, events are the
half-lines above or below a threshold. Several rounds are checked by their privacy profile and by simulation.
"""

import pickle
from dataclasses import replace
from math import sqrt

import numpy as np
import pytest
from scipy.stats import norm

from privfm.checks import InvalidArgument
from privfm.defenses import DPPlan
from privfm.defenses.privacy.accounting import Concentrated, SampledGaussian, account
from privfm.defenses.privacy.integer_noise import IntegerNoise
from privfm.defenses.privacy.trade_off import (
    GaussianInverse,
    ProfileInverse,
    estimated_epsilon,
    members,
    plan_members,
)

POISSON = SampledGaussian(1.362, 0.1, "poisson")
ENDS = np.concatenate([np.geomspace(1e-9, 0.5, 300), 1 - np.geomspace(1e-9, 0.5, 300)])


def profile(mu, epsilons):
    """Of one Gaussian mechanism: Balle and Wang, 2018, theorem 8."""
    return norm.cdf(mu / 2 - epsilons / mu) - np.exp(epsilons) * norm.cdf(-mu / 2 - epsilons / mu)


def one_round(noise, rate):
    """Exact pairs (probability in one world, least in the other) of one sampled round, both ways round."""
    at = np.linspace(-9 * noise, 9 * noise + 1, 1001)
    without, among = norm.cdf(at / noise), norm.cdf((at - 1) / noise)
    there = (1 - rate) * without + rate * among
    above = (1 - rate) * norm.sf(at / noise) + rate * norm.sf((at - 1) / noise)
    return (above, norm.sf(at / noise)), (without, there)  # present events lie above, absent ones below


@pytest.fixture(scope="module")
def claim():
    ((epsilon, inverse),) = members(POISSON, 20, 1e-5, [1.0])
    return epsilon, inverse


# Nothing sampled


@pytest.mark.parametrize(
    ("mechanism", "times", "mu"),
    [
        (SampledGaussian(2.0), 9, 1.5),
        (SampledGaussian(2.0, relation="replace-one"), 9, 3.0),
        (SampledGaussian(2.0, 1.0, "poisson"), 4, 1.0),
        (SampledGaussian(2.0, 0.1), 4, 1.0),  # sampled, but the observer sees who was
    ],
    ids=["composed", "replaced", "everybody", "seen"],
)
def test_without_sampling_it_is_the_gaussian_one(mechanism, times, mu):
    ((epsilon, inverse),) = members(mechanism, times, 1e-5, [1.0])
    assert profile(mu, epsilon) == pytest.approx(1e-5, rel=1e-3)
    for y in ENDS:
        assert inverse(y) == pytest.approx(norm.cdf(norm.ppf(y) - mu), abs=1e-6)
    assert (inverse(0.0), inverse(1.0)) == (0.0, 1.0)


def test_strengths_divide_the_noise():
    found = members(SampledGaussian(1.0), 1, 1e-5, [0.5, 1.0, 2.0])
    assert [round(epsilon, 4) for epsilon, _ in found] == [1.9931, 4.3772, 9.9973]  # 4.3772, 9.9973: published oracles
    assert [inverse.mu for _, inverse in found] == [0.5, 1.0, 2.0]


# From a profile


def test_lines_of_a_gaussian_profile_lie_below_it_and_close():
    """Whatever the epsilons: a few lines are a bound too, and more come closer."""
    mu, gaps = 1.3, []
    for points in (3, 30, 400):
        epsilons = np.linspace(0, mu**2 / 2 + 7 * mu, points)
        inverse = ProfileInverse.of(epsilons.tolist(), profile(mu, epsilons).tolist())
        gap = norm.cdf(norm.ppf(ENDS) - mu) - np.array([inverse(y) for y in ENDS])
        assert gap.min() > -1e-12
        gaps.append(gap.max())
    assert gaps[0] > 0.01 > gaps[1] > 5e-4 > 5e-5 > gaps[2]


def test_the_largest_of_all_lines_by_a_loop():
    rng = np.random.default_rng(1)
    epsilons, deltas = rng.uniform(0, 5, 40), rng.uniform(0, 0.5, 40)  # no profile, so that many lines fall out
    inverse = ProfileInverse.of(epsilons.tolist(), deltas.tolist())
    for y in rng.random(200):
        first = max(np.exp(-e) * (y - d) for e, d in zip(epsilons, deltas, strict=True))
        second = max(1 - d - np.exp(e) * (1 - y) for e, d in zip(epsilons, deltas, strict=True))
        assert inverse(y) == pytest.approx(max(first, second, 0.0), abs=1e-12)


def test_pure_privacy_by_hand():
    """(ln 3, 0): the least probability is y / 3, and 1 - 3 (1 - y) near one; they meet at 3/4."""
    inverse = ProfileInverse.of([np.log(3)], [0.0])
    assert [inverse(y) for y in (0.0, 0.3, 0.75, 0.9, 1.0)] == pytest.approx([0.0, 0.1, 0.25, 0.7, 1.0])


def test_the_smaller_of_two_deltas_counts():
    twice, once = ProfileInverse.of([1.0, 1.0, 1.0], [0.2, 0.1, 0.3]), ProfileInverse.of([1.0], [0.1])
    assert [twice(y) for y in (0.15, 0.5, 0.9)] == [once(y) for y in (0.15, 0.5, 0.9)]


# Poisson sampling


@pytest.mark.parametrize(("noise", "rate"), [(0.7, 0.1), (1.0, 0.5), (0.5, 0.05)])
def test_one_sampled_round_is_a_bound_in_both_directions(noise, rate):
    ((_, inverse),) = members(SampledGaussian(noise, rate, "poisson"), 1, 1e-5, [1.0])
    exact = one_round(noise, rate)
    for probabilities, least in exact:
        assert len(probabilities) == 1001
        for y, other in zip(probabilities, least, strict=True):  # y near 1 is known to a rounding; slopes are steep
            assert inverse(y - 1e-15) <= other + 1e-12
    (above, least_below), pair = exact
    apart = max(abs(np.interp(y, above[::-1], least_below[::-1]) - np.interp(y, *pair)) for y in (0.05, 0.2, 0.5))
    assert apart > 0.003  # the two directions differ, so that one alone would be another function


@pytest.mark.parametrize(("noise", "rate"), [(0.7, 0.1), (1.0, 0.5)])
def test_one_sampled_round_is_the_convex_hull_of_both(noise, rate):
    """Tight: the lower convex hull of all exact pairs, by a slow search over chords, is less than 1e-3 above it."""
    ((_, inverse),) = members(SampledGaussian(noise, rate, "poisson"), 1, 1e-5, [1.0])
    x, b = (np.concatenate(both)[::8] for both in zip(*one_round(noise, rate), strict=True))
    for y in (0.001, 0.02, 0.1, 0.4, 0.7, 0.95, 0.999):
        left, right = x <= y, x > y
        share = (x[right][None] - y) / (x[right][None] - x[left][:, None])
        hull = (share * b[left][:, None] + (1 - share) * b[right][None]).min()
        assert inverse(y) <= hull + 1e-9
        assert inverse(y) == pytest.approx(hull, abs=1e-3)


def test_epsilon_and_delta_of_the_claim_come_back(claim):
    """Corrections to the accounting oracles: z=1.362, q=0.1, 20 rounds, delta 1e-5 has epsilon 2.00."""
    epsilon, inverse = claim
    assert epsilon == pytest.approx(2.0, abs=5e-3)
    assert epsilon == account(POISSON, 20, 1e-5)[0]
    y = np.geomspace(1e-7, 1, 20_000)
    low = np.array([inverse(each) for each in y])
    high = np.array([inverse(1 - each) for each in y])
    assert max(y - np.exp(epsilon) * low) == pytest.approx(1e-5, rel=0.02)
    assert max(1 - high - np.exp(epsilon) * y) == pytest.approx(1e-5, rel=0.02)  # and the other way round


def test_epsilon_is_not_above_the_truth_by_more_than_rounding():
    """The optimistic privacy loss distribution is a lower bound; a finer one is closer to the truth from below."""
    from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism

    fine = from_gaussian_mechanism(
        1.362,
        sampling_prob=0.1,
        pessimistic_estimate=False,
        use_connect_dots=False,
        value_discretization_interval=1e-4,
    )
    below = fine.self_compose(20).get_epsilon_for_delta(1e-5)
    assert below <= account(POISSON, 20, 1e-5)[0] <= below + 20 * 1e-4


def test_events_of_twenty_rounds_are_not_below_it(claim):
    """Simulated: how often the best score passes a threshold without the unit, given how often with it, and back."""
    _, inverse = claim
    noise, rate, rounds, runs = 1.362, 0.1, 20, 100_000
    rng = np.random.default_rng(2)
    scores = []
    for present in (False, True):
        shown = rng.normal(0, noise, (runs, rounds)) + (present & (rng.random((runs, rounds)) < rate))
        scores.append(np.log1p(rate * np.expm1((shown - 0.5) / noise**2)).sum(1))
    closest = 1.0
    for cut in np.quantile(np.concatenate(scores), np.linspace(0.01, 0.99, 50)):
        absent, present = (scores[0] > cut).mean(), (scores[1] > cut).mean()
        for y, other in ((present, absent), (1 - absent, 1 - present)):
            spread = 4 * sqrt(0.25 / runs)
            assert other > inverse(y) - 2 * spread
            closest = min(closest, other - inverse(y))
    assert closest < 0.01
    assert inverse(0.5) > GaussianInverse(sqrt(20) / noise)(0.5)  # amplified: harder to tell than without sampling


@pytest.mark.parametrize("strength", [0.5, 1.5])
def test_it_is_convex_rising_and_below_the_line(strength):
    ((_, inverse),) = members(POISSON, 20, 1e-5, [strength])
    at = np.linspace(0, 1, 2001)
    found = np.array([inverse(y) for y in at])
    assert np.all(np.diff(found) >= -1e-15)
    assert np.all(np.diff(found, 2) >= -1e-12)
    assert np.all(found <= at)
    assert inverse(0.0) == 0.0
    assert 1 - 1e-10 < inverse(1.0) <= 1.0


def test_little_noise_loses_nothing_to_rounding():
    """Slopes reach 1e21 here: lines in y alone would be wrong by more than everything."""
    epsilons = np.linspace(0, 50, 400)
    inverse = ProfileInverse.of(epsilons.tolist(), profile(5.0, epsilons).clip(0).tolist())
    for y in (0.5, 0.9, 1 - 1e-6, 1 - 1e-9, 1 - 1e-12):
        exact = norm.cdf(norm.ppf(y) - 5)
        assert exact - 0.01 < inverse(y) <= exact
    assert 1 - 1e-10 < inverse(1.0) <= 1.0


def test_more_noise_is_harder_to_tell(claim):
    (weak, below), (strong, above) = members(POISSON, 20, 1e-5, [1.5, 0.5])
    assert weak > claim[0] > strong
    for y in (0.01, 0.1, 0.5, 0.9, 0.99):
        assert below(y) < claim[1](y) < above(y) < y


def test_replaced_units_are_easier_to_tell(claim):
    ((epsilon, inverse),) = members(replace(POISSON, relation="replace-one"), 20, 1e-5, [1.0])
    assert epsilon > claim[0]
    assert all(inverse(y) < claim[1](y) for y in (0.01, 0.1, 0.5, 0.9, 0.99))


def test_a_recursion_can_call_it_often(claim):
    """Ten thousand calls a candidate; and it can be sent to another process."""
    from time import process_time

    copy = pickle.loads(pickle.dumps(claim[1]))
    start = process_time()
    for step in range(10_000):
        copy(step / 10_000)
    assert process_time() - start < 0.5
    assert copy == claim[1]


# Plans


PLAN = DPPlan(noise_multiplier=1.362, max_grad_norm=0.5, sample_rate=0.1, delta=1e-5)


def test_of_a_plan(claim):
    assert plan_members(PLAN, 20, [1.0]) == (claim,)


def test_of_a_plan_against_the_server():
    """Who decrypts adds the noise: the server knows the cohorts, released models do not show them."""
    plan = replace(PLAN, place="key_holder", source="secure")
    ((server, _),) = plan_members(plan, 20, [1.0], "server")
    ((released, _),) = plan_members(plan, 20, [1.0])
    assert server == plan.records(20)[0].epsilon
    assert released == plan.records(20)[1].epsilon
    assert server > released


def test_of_a_plan_with_correlated_noise():
    plan = DPPlan(8.0, 1.0, 0.25, 1e-5, sampling="cyclic", bands=4, max_participations=5)
    ((epsilon, inverse),) = plan_members(plan, 20, [1.0])
    assert epsilon == plan.epsilon(20)
    assert inverse == GaussianInverse(1 / 8)  # the whole run is one mechanism


def test_the_estimate_is_the_plan_at_another_noise():
    assert estimated_epsilon(PLAN, 20, 1.362 / 2) == pytest.approx(7.99, abs=0.01)  # halved noise: corrections C
    assert PLAN.noise_multiplier == 1.362


# Bad input


FIXED = SampledGaussian(1.0, 0.1, "fixed_size")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: members(FIXED, 20, 1e-5, [1.0]), "no trade-off function"),
        (lambda: members(Concentrated(0.1, 0.0), 20, 1e-5, [1.0]), "no trade-off function"),
        (lambda: members(POISSON, 0, 1e-5, [1.0]), "times"),
        (lambda: members(POISSON, 20, 0.0, [1.0]), "delta"),
        (lambda: members(POISSON, 20, 1e-5, []), "strengths"),
        (lambda: members(POISSON, 20, 1e-5, [0.0]), "strength"),
        (lambda: members(POISSON, 20, 1e-5, [10.0]), "beyond 100"),
        (lambda: members(SampledGaussian(0.0), 20, 1e-5, [1.0]), "noise_multiplier"),
        (lambda: plan_members(PLAN, 20, [1.0], "server"), "adversary"),
        (lambda: plan_members(replace(PLAN, place="local", sampling="full", sample_rate=1.0), 2, [1.0]), "adversary"),
        (lambda: estimated_epsilon(PLAN, 20, 0.0), "noise_multiplier"),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(InvalidArgument, match=words):
        call()


def test_distributed_noise_has_none():
    integers = IntegerNoise(least_answers=10, clients=20)
    plan = DPPlan(2.0, 1.0, 1.0, 1e-5, place="distributed", sampling="full", source="secure", integers=integers)
    with pytest.raises(InvalidArgument, match="no Gaussian mechanism"):
        plan_members(plan, 20, [1.0], "server")
