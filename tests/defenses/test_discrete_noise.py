"""Noise on whole numbers: its distribution by chi-square, and that no decision is left to float64 where it cannot tell.

Significance 1e-6 a test, with fixed seeds: a right sampler fails once in a million choices of seeds.
"""

from decimal import Decimal, localcontext
from fractions import Fraction
from itertools import pairwise
from math import exp, floor, sqrt

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Generator

from privfm.checks import InvalidArgument
from privfm.defenses.privacy import discrete_noise
from privfm.defenses.privacy.discrete_noise import discrete_gaussian, skellam

COUNT = 100_000
SIGNIFICANCE = 1e-6


def fair(seed=0):
    """Words from numpy, so that these tests do not rest on the package's own source."""
    generator = np.random.Generator(np.random.PCG64(seed))
    return lambda count: generator.integers(0, 2**64, count, np.uint64)


def scripted(*numbers):
    """Words that are known beforehand; asking for one more fails."""
    left = list(numbers)

    def draw(count):
        assert len(left) >= count, "more words than expected"
        return np.array([left.pop(0) for _ in range(count)], np.uint64)

    return draw


def masses(deviation):
    """Whole numbers within 12 deviations and their probabilities, by summing the definition."""
    reach = int(12 * deviation) + 12
    k = np.arange(-reach, reach + 1)
    weights = np.exp(-(k**2) / (2 * deviation**2))
    return k, weights / weights.sum()


def p_value(samples, deviation):
    """Chi-square over 60 bins of about equal probability, or over single numbers where the distribution is narrow."""
    k, mass = masses(deviation)
    last = k[np.searchsorted(np.cumsum(mass), np.linspace(0, 1, 61)[1:-1])] if deviation > 4 else np.arange(-20, 21)
    edges = np.concatenate([[-np.inf], np.unique(last) + 0.5, [np.inf]])
    expected = len(samples) * np.array([mass[(k > low) & (k < high)].sum() for low, high in pairwise(edges)])
    observed, enough = np.histogram(samples, edges)[0], expected > 5
    observed, expected = observed[enough], expected[enough]
    return stats.chisquare(observed, expected * (observed.sum() / expected.sum())).pvalue


@pytest.mark.parametrize("deviation", [0.3, 0.5, 0.8, 1.0, 2.0, 3.7, 25.5, 2.0**12 + 0.1])
def test_it_is_the_discrete_gaussian_and_no_other(deviation):
    samples = discrete_gaussian(COUNT, Fraction(deviation) ** 2, fair())
    assert samples.dtype == np.int64 and samples.shape == (COUNT,)
    assert p_value(samples, deviation) > SIGNIFICANCE
    for wrong in (0.5, 0.9, 1.1, 2.0):
        assert p_value(discrete_gaussian(COUNT, (wrong * deviation) ** 2, fair()), deviation) < SIGNIFICANCE


@pytest.mark.parametrize("deviation", [2.0**22, 2.0**30 + 0.7, 2.0**40])
def test_wide_ones_are_gaussian(deviation):
    """One step is nothing next to such a deviation: Kolmogorov-Smirnov against the continuous distribution."""
    samples = discrete_gaussian(COUNT, Fraction(deviation) ** 2, fair(1))
    assert stats.kstest(samples / deviation, "norm").pvalue > SIGNIFICANCE
    assert stats.kstest(samples / deviation * 2, "norm").pvalue < SIGNIFICANCE
    assert stats.kstest(samples / deviation / 2, "norm").pvalue < SIGNIFICANCE
    assert stats.chisquare(np.bincount(samples & 7)).pvalue > SIGNIFICANCE  # the lowest bits are there, and even


@pytest.mark.parametrize("deviation", [0.5, 0.7, 1.0])
def test_a_rounded_continuous_gaussian_is_told_apart(deviation):
    """At 0.5 zero has a probability of 0.683 rounded and 0.787 discrete: not the same mechanism."""
    rounded = np.rint(np.random.Generator(np.random.PCG64(2)).normal(0, deviation, COUNT)).astype(np.int64)
    assert p_value(rounded, deviation) < SIGNIFICANCE


def test_samples_are_independent_of_each_other():
    samples = discrete_gaussian(COUNT, 9.0, fair(3)).astype(float)
    assert abs(np.corrcoef(samples[1:], samples[:-1])[0, 1]) < 5 / sqrt(COUNT)
    assert abs(np.corrcoef(np.abs(samples[1:]), np.abs(samples[:-1]))[0, 1]) < 5 / sqrt(COUNT)


def test_it_depends_on_the_words_alone(untouched_random_state):
    first, again, other = (discrete_gaussian(50, 4, fair(seed)) for seed in (1, 1, 2))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert discrete_gaussian(0, 4, scripted()).shape == (0,)


# Decisions that float64 cannot make


def exact_exponential(x):
    """`exp(-x)` as a fraction right to 200 digits."""
    with localcontext(prec=220):
        return Fraction((-Decimal(x.numerator) / Decimal(x.denominator)).exp())


RATES = [Fraction(1, 10**9), Fraction(1, 7), Fraction(1), Fraction(22, 7), Fraction(30), Fraction(44), Fraction(60)]


@pytest.mark.parametrize("x", RATES, ids=str)
def test_the_words_beside_the_boundary_are_decided_rightly(x):
    """The first word decides unless it is the boundary's own; float64 cannot tell any of these apart."""
    boundary = floor(exact_exponential(x) * 2**64)
    for off in range(-2, 3):
        word = boundary + off
        if off == 0 or not 0 <= word < 2**64:
            continue
        drawn = np.array([word], np.uint64)
        below = discrete_noise._below_exponential(drawn, np.array([float(x)]), lambda _: x, scripted())
        assert bool(below[0]) is (off < 0)


@pytest.mark.parametrize("x", RATES, ids=str)
@pytest.mark.parametrize("words", [1, 2, 3])
def test_a_tie_is_decided_by_the_words_that_follow(x, words):
    """The boundary's own digits, and then one more or one less in the last word asked for."""
    digits = floor(exact_exponential(x) * 2 ** (64 * (words + 1)))
    script = [(digits >> (64 * (words - i))) & (2**64 - 1) for i in range(words + 1)]
    for off in (-1, 1):
        last = (script[-1] + off) % 2**64
        assert abs(last - script[-1]) == 1
        drawn = np.array(script[:1], np.uint64)
        below = discrete_noise._below_exponential(
            drawn, np.array([float(x)]), lambda _: x, scripted(*script[1:-1], last)
        )
        assert bool(below[0]) is (off < 0)


def test_float64_and_the_exact_way_agree(monkeypatch):
    """The same words, once with every comparison in doubt."""
    fast = discrete_gaussian(300, Fraction(7, 3) ** 2, fair(4))
    monkeypatch.setattr(discrete_noise, "_RELATIVE", 1e9)
    monkeypatch.setattr(discrete_noise, "_ABSOLUTE", 1.0)
    monkeypatch.setattr(discrete_noise, "_SHORT", np.uint64(2**64 - 1))
    assert np.array_equal(discrete_gaussian(300, Fraction(7, 3) ** 2, fair(4)), fast)


def test_the_geometric_number_is_exact_at_its_boundaries():
    for k in (1, 2, 13, 20, 44):
        boundary = floor(exact_exponential(Fraction(k)) * 2**64)
        drawn = np.array([boundary + 1, boundary - 1], np.uint64)
        if k < 44:  # at 44 a single step is a step of the logarithm too
            assert discrete_noise._geometric(drawn, scripted()).tolist() == [k - 1, k]
    assert discrete_noise._geometric(np.array([2**64 - 1], np.uint64), scripted()).tolist() == [0]


def test_the_tail_beyond_one_word_is_there():
    """A first word of zero: U < 2^-64, and exp(-44.36) is 2^-64. The next word says which k it is."""
    second = floor(exact_exponential(Fraction(47)) * 2**128)
    assert discrete_noise._geometric(np.zeros(1, np.uint64), scripted(second - 1)).tolist() == [47]
    assert discrete_noise._geometric(np.zeros(1, np.uint64), scripted(second + 1)).tolist() == [46]


def test_the_margin_covers_the_errors_of_float64():
    """The acceptance's x, at every magnitude that matters, against the rational number it stands for."""
    for deviation in (0.3, 2.0, 1000.3, 2.0**22, 2.0**31 - 0.5, 2.0**40):
        variance = Fraction(deviation) ** 2
        scale = floor(deviation) + 1
        generator = np.random.Generator(np.random.PCG64(5))
        magnitude = (generator.random(200) * 10 * deviation).astype(np.int64)
        rate, exactly = discrete_noise._acceptance(magnitude, variance, scale)
        for i, x in enumerate(rate):
            true = exactly(i)
            if true < 45:
                off = abs(Fraction(exp(-x)) / exact_exponential(true) - 1)
                assert off < Fraction(discrete_noise._RELATIVE) / 2


# Skellam


@pytest.mark.parametrize("variance", [0.5, 4.0, 1000.0])
def test_skellam_has_its_distribution_and_no_other(variance):
    samples = skellam(COUNT, variance, fair(6))
    k = np.arange(-5, 6) if variance < 100 else np.arange(-90, 91, 10)
    cumulated = stats.skellam.cdf(k, variance / 2, variance / 2)
    expected = np.diff(np.concatenate([[0], cumulated, [1]])) * COUNT
    edges = np.concatenate([[-np.inf], k + 0.5, [np.inf]])
    keep = expected > 5

    def fits(values):
        observed = np.histogram(values, edges)[0]
        return stats.chisquare(observed[keep], expected[keep] * observed[keep].sum() / expected[keep].sum()).pvalue

    assert fits(samples) > SIGNIFICANCE
    for wrong in (0.25, 0.5, 2.0, 4.0):
        assert fits(skellam(COUNT, wrong * variance, fair(6))) < SIGNIFICANCE


def test_skellam_depends_on_the_words_alone(untouched_random_state):
    first, again, other = (skellam(50, 9.0, fair(seed)) for seed in (1, 1, 2))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


# Bad input


@pytest.mark.parametrize("variance", [0, -1.0, float("nan"), float("inf"), Fraction(0)])
@pytest.mark.parametrize("sampler", [discrete_gaussian, skellam])
def test_a_variance_is_above_zero(sampler, variance):
    with pytest.raises(InvalidArgument, match="variance="):
        sampler(3, variance, fair())


def test_a_deviation_beyond_the_words_is_refused():
    with pytest.raises(InvalidArgument, match="coarser grid"):
        discrete_gaussian(3, 2.0**81, fair())


def test_a_count_is_a_whole_number():
    with pytest.raises(InvalidArgument, match="count="):
        discrete_gaussian(-1, 1.0, fair())


def test_torch_generators_are_left_alone():
    generator = Generator().manual_seed(1)
    before = generator.get_state()
    discrete_gaussian(10, 1.0, fair())
    assert torch.equal(generator.get_state(), before)
