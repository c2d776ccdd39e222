"""Bounds from independent trials: intervals, both directions, delta, thresholds and coverage."""

from math import log

import numpy as np
import pytest
from scipy.stats import binomtest, norm

from privfm.attacks.audit.clopper_pearson import (
    Counts,
    DeclaredThreshold,
    SplitThreshold,
    bound_of,
    clopper_pearson,
)
from privfm.attacks.audit.gaussian import gaussian_epsilon
from privfm.attacks.rates import lower_rate, upper_rate
from privfm.checks import InvalidArgument

DELTA = 1e-5
VIOLATIONS = 5
"""Of 40 runs at 95 %: a tight bound has more with probability 1.4 % (corrections A7)."""

MU = {1: 0.268051122, 4: 0.924930898}
"""Epsilon at delta 1e-5 of a mu-GDP mechanism -> mu."""


def gaussian_scores(n, mu, seed):
    generator = np.random.default_rng(seed)
    return generator.normal(mu, 1, n), generator.normal(0, 1, n)


def test_upper_rate_against_scipys_interval():
    for found, of in ((0, 10), (3, 50), (400, 1000), (9, 10)):
        expected = binomtest(found, of, alternative="less").proportion_ci(0.975, method="exact").high
        assert upper_rate(found, of, 0.025) == pytest.approx(expected, rel=1e-9)
    assert upper_rate(0, 200, 0.05) == pytest.approx(1 - 0.05 ** (1 / 200), rel=1e-12)
    assert upper_rate(10, 10, 0.05) == 1.0
    assert lower_rate(0, 10, 0.05) == 0.0
    assert lower_rate(7, 10, 0.05) == pytest.approx(binomtest(7, 10).proportion_ci(0.9, "exact").low, rel=1e-9)


def test_bound_by_hand_in_both_directions_and_with_delta():
    misses, alarms = upper_rate(90, 100, 0.025), upper_rate(0, 100, 0.025)
    assert alarms == pytest.approx(0.036217, abs=1e-6)  # 1 - .025^(1/100)
    assert bound_of(Counts(100, 90, 100, 0), 0.01, 0.05) == pytest.approx(log((1 - 0.01 - misses) / alarms))
    # The mirror image: "in" is said of nearly everybody, and who is below is surely out.
    assert bound_of(Counts(100, 0, 100, 90), 0.01, 0.05) == bound_of(Counts(100, 90, 100, 0), 0.01, 0.05)
    assert bound_of(Counts(100, 90, 100, 0), 0.9, 0.05) == 0.0
    assert bound_of(Counts(100, 50, 100, 50), 0.0, 0.05) == 0.0
    assert bound_of(Counts(100, 100, 100, 100), 0.0, 0.05) == 0.0


def test_gaussian_bound_by_hand():
    misses, alarms = upper_rate(100, 1000, 0.025), upper_rate(50, 1000, 0.025)
    mu = norm.ppf(1 - alarms) - norm.ppf(misses)
    expected = gaussian_epsilon(mu, DELTA)
    assert bound_of(Counts(1000, 100, 1000, 50), DELTA, 0.05, gaussian=True) == pytest.approx(expected, rel=1e-6)
    assert bound_of(Counts(1000, 100, 1000, 50), DELTA, 0.05) < expected
    assert bound_of(Counts(100, 60, 100, 60), DELTA, 0.05, gaussian=True) == 0.0


def test_declared_thresholds_share_the_error():
    inside, outside = gaussian_scores(2000, 1.0, 0)
    both = clopper_pearson(inside, outside, DELTA, threshold=DeclaredThreshold((1.5, 2.5)))
    apart = [
        clopper_pearson(inside, outside, DELTA, threshold=DeclaredThreshold((value,)), confidence=0.975)
        for value in (1.5, 2.5)
    ]
    assert both.epsilon == max(bound.epsilon for bound in apart) > 0 and both.tries == 2
    assert both.guesses == both.canaries == 4000
    best = 1.5 if apart[0].epsilon > apart[1].epsilon else 2.5
    assert both.correct == (inside >= best).sum() + (outside < best).sum()
    assert "independent" in both.assumes and "Gaussian" not in both.assumes


def test_perfect_scores_reach_the_ceiling():
    bound = clopper_pearson([1.0] * 300, [0.0] * 300, 0.0, threshold=DeclaredThreshold((0.5,)))
    alarms = 1 - 0.025 ** (1 / 300)
    assert bound.epsilon == bound.ceiling == pytest.approx(log((1 - alarms) / alarms))
    split = clopper_pearson([1.0] * 300, [0.0] * 300, 0.0)
    assert split.epsilon == split.ceiling < bound.epsilon and split.guesses == 300


@pytest.mark.parametrize("epsilon", [1, 4])
@pytest.mark.parametrize("gaussian", [False, True])
@pytest.mark.parametrize("rule", [SplitThreshold(), DeclaredThreshold((0.0, 0.5, 2.0))])
def test_coverage_on_the_gaussian_mechanism(rule, gaussian, epsilon):
    bounds = [
        clopper_pearson(*gaussian_scores(3000, MU[epsilon], seed), DELTA, threshold=rule, gaussian=gaussian).epsilon
        for seed in range(40)
    ]
    assert sum(bound > epsilon for bound in bounds) <= VIOLATIONS
    assert np.median(bounds) > (0.3 if gaussian else 0.1) * epsilon


def test_coverage_where_the_bound_is_tight():
    epsilon = 1.5
    answers_truly = 1 / (1 + np.exp(-epsilon))

    def bound(seed, confidence=0.95):
        generator = np.random.default_rng(seed)
        inside = (generator.random(4000) < answers_truly) * 1.0
        outside = (generator.random(4000) >= answers_truly) * 1.0
        rule = DeclaredThreshold((0.5,))
        return clopper_pearson(inside, outside, 0.0, threshold=rule, confidence=confidence).epsilon

    bounds = [bound(seed) for seed in range(40)]
    assert sum(found > epsilon for found in bounds) <= VIOLATIONS and np.median(bounds) > 0.85 * epsilon
    assert sum(bound(seed, 0.01) > epsilon for seed in range(40)) > VIOLATIONS  # the count can say no


def test_scores_without_information_give_zero():
    for rule in (SplitThreshold(), DeclaredThreshold((0.0, 1.0))):
        found = [
            clopper_pearson(*gaussian_scores(1000, 0.0, seed), DELTA, threshold=rule).epsilon for seed in range(40)
        ]
        assert sum(bound > 0 for bound in found) <= VIOLATIONS


def test_low_scores_of_those_out_count_as_much():
    generator = np.random.default_rng(0)
    inside, outside = np.zeros(1000), np.where(generator.random(1000) < 0.3, -5.0, 0.0)
    assert clopper_pearson(inside, outside, DELTA).epsilon > 3
    assert clopper_pearson(-outside, -inside, DELTA).epsilon > 3


def test_a_split_chooses_on_one_half_and_counts_on_the_other():
    inside, outside = gaussian_scores(400, 1.0, 2)
    kept = inside.copy(), outside.copy()
    asked = []

    def worth(counts):
        asked.append(counts)
        return bound_of(counts, DELTA, 0.05)

    (counts,) = SplitThreshold(3).counts(inside, outside, worth)
    assert (counts.inside, counts.outside) == (200, 200) and len(asked) > 30
    best = max(asked, key=lambda candidate: bound_of(candidate, DELTA, 0.05))
    together = [
        (best.missed + counts.missed, best.alarms + counts.alarms),  # both halves at one threshold are all scores
    ]
    at = [((inside < value).sum(), (outside >= value).sum()) for value in np.concatenate([inside, outside])]
    assert together[0] in at
    assert (inside == kept[0]).all() and (outside == kept[1]).all()


@pytest.mark.parametrize(
    "attempt",
    [
        lambda: clopper_pearson([1.0] * 3, [0.0] * 10, DELTA),
        lambda: clopper_pearson([np.nan] * 10, [0.0] * 10, DELTA),
        lambda: clopper_pearson([[1.0] * 10], [0.0] * 10, DELTA),
        lambda: clopper_pearson([1.0] * 10, [0.0] * 10, 1.0),
        lambda: clopper_pearson([1.0] * 10, [0.0] * 10, 0.0, gaussian=True),
        lambda: clopper_pearson([1.0] * 10, [0.0] * 10, DELTA, confidence=1.0),
        lambda: DeclaredThreshold(()),
        lambda: DeclaredThreshold((1.0, 1.0)),
        lambda: DeclaredThreshold((float("nan"),)),
        lambda: SplitThreshold(-1),
        lambda: upper_rate(5, 4, 0.05),
    ],
)
def test_what_is_refused(attempt):
    with pytest.raises(InvalidArgument):
        attempt()
