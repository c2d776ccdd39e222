"""Where noise comes from: seeded noise keeps its bits, secure noise its grid, its scale and its secrecy."""

import os
from fractions import Fraction
from math import erf, sqrt

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Generator

from privfm.checks import InvalidArgument
from privfm.defenses.privacy import noise
from privfm.defenses.privacy.noise import (
    STEPS,
    gaussian,
    grid_of,
    rounding_inflation,
    secure_deviation,
    secure_release,
    words,
)

WIDE = 100_000
SIGNIFICANCE = 1e-6


@pytest.fixture
def repeatable_system(monkeypatch):
    """The operating system's bits replaced by numpy's, so that a statistical test always says the same."""
    generator = np.random.Generator(np.random.PCG64(1))
    monkeypatch.setattr(os, "urandom", generator.bytes)


def fits(values, deviation):
    return stats.kstest(np.asarray(values) / deviation, "norm").pvalue > SIGNIFICANCE


# Words


def test_seeded_words_follow_the_generator(untouched_random_state):
    first, again, other = (words("seeded", Generator().manual_seed(seed))(100) for seed in (1, 1, 2))
    assert first.dtype == np.uint64
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_words_go_on():
    draw = words("seeded", Generator().manual_seed(1))
    assert not np.array_equal(draw(10), draw(10))


def test_secure_words_need_no_generator_and_leave_it_alone(untouched_random_state):
    generator = Generator().manual_seed(1)
    before = generator.get_state()
    first, second = words("secure", generator)(100), words("secure")(100)
    assert first.dtype == np.uint64 and len(first) == 100
    assert not np.array_equal(first, second)
    assert torch.equal(generator.get_state(), before)


def test_secure_words_are_the_systems(monkeypatch):
    monkeypatch.setattr(os, "urandom", lambda count: bytes(range(count)))
    assert words("secure")(2).tolist() == [0x0706050403020100, 0x0F0E0D0C0B0A0908]


@pytest.mark.parametrize("source", ["seeded", "secure"])
@pytest.mark.usefixtures("repeatable_system")
def test_every_bit_of_a_word_is_fair(source):
    drawn = words(source, Generator().manual_seed(3))(20_000)
    ones = ((drawn[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)).sum(0)
    assert np.abs(ones.astype(int) - 10_000).max() < 6 * sqrt(20_000) / 2


def test_a_source_is_known_and_a_seeded_one_has_a_generator():
    with pytest.raises(InvalidArgument, match="did you mean 'secure'"):
        words("secur")
    with pytest.raises(InvalidArgument, match="generator=None"):
        words("seeded")
    with pytest.raises(InvalidArgument, match="generator=None"):
        gaussian(3, 1.0, "seeded")
    with pytest.raises(InvalidArgument, match="source="):
        gaussian(3, 1.0, "random")


# Noise


def test_seeded_noise_keeps_its_bits():
    """What runs with a seed must not move: one draw of float32 normals, times the deviation."""
    expected = torch.randn(50, generator=Generator().manual_seed(4)) * 0.3
    got = gaussian(50, 0.3, "seeded", Generator().manual_seed(4))
    assert got.dtype == torch.float64
    assert torch.equal(got.float(), expected)


@pytest.mark.parametrize("deviation", [1e-3, 1.0, 3.3, 2.0**20])
@pytest.mark.parametrize("source", ["seeded", "secure"])
@pytest.mark.usefixtures("repeatable_system")
def test_noise_has_its_scale_and_no_other(source, deviation):
    values = gaussian(WIDE, deviation, source, Generator().manual_seed(5))
    assert values.shape == (WIDE,) and values.dtype == torch.float64
    assert fits(values, deviation)
    assert not any(fits(values, wrong * deviation) for wrong in (0.5, 0.95, 1.05, 2.0))


def test_secure_noise_is_fresh_and_touches_no_generator(untouched_random_state):
    generator = Generator().manual_seed(1)
    before = generator.get_state()
    assert not torch.equal(gaussian(20, 1.0, "secure", generator), gaussian(20, 1.0, "secure", generator))
    assert torch.equal(generator.get_state(), before)


def test_secure_noise_lies_on_the_grid_and_seeded_noise_does_not():
    grid = grid_of(0.7)
    steps = gaussian(1000, 0.7, "secure") / grid
    assert torch.equal(steps, steps.round())
    seeded = gaussian(1000, 0.7, "seeded", Generator().manual_seed(1)) / grid
    assert not torch.equal(seeded, seeded.round())


@pytest.mark.parametrize("deviation", [1e-30, 0.1, 1.0, 1.999, 3.0, 1e30])
def test_a_grid_is_a_power_of_two_under_the_deviation(deviation):
    grid = grid_of(deviation)
    assert np.frexp(grid)[0] == 0.5
    assert 2**STEPS <= Fraction(deviation) / Fraction(grid) < 2 ** (STEPS + 1)


@pytest.mark.parametrize("deviation", [0.0, -1.0, float("nan"), float("inf"), 1e-300, 1e300])
def test_secure_noise_needs_a_deviation_that_has_a_grid(deviation):
    with pytest.raises(InvalidArgument, match="deviation="):
        gaussian(3, deviation, "secure")


@pytest.mark.parametrize("steps", [2.0, 4.0, 8.0])
def test_a_rounded_gaussian_is_as_near_the_discrete_one_as_stated(steps):
    """The sentence under `STEPS`, where it can be computed: the divergence of one coordinate, and its fall with s^4."""
    k = np.arange(-40 * int(steps), 40 * int(steps) + 1)
    discrete = np.exp(-(k**2) / (2 * steps**2))
    discrete /= discrete.sum()
    cumulated = np.array([(1 + erf((i + 0.5) / steps / sqrt(2))) / 2 for i in np.append(k[0] - 1, k)])
    rounded = np.diff(cumulated)
    both = (rounded > 1e-30) & (discrete > 1e-30)
    divergence = (rounded[both] * np.log(rounded[both] / discrete[both])).sum()
    assert divergence == pytest.approx(1 / (24 * steps**2) ** 2, rel=0.15)
    assert np.abs(rounded - discrete).sum() / 2 <= sqrt(0.5) / (24 * steps**2)


# The release


@pytest.mark.usefixtures("repeatable_system")
def test_a_release_is_the_total_plus_noise_of_its_scale():
    total = torch.linspace(-50, 50, WIDE, dtype=torch.float64)
    released = secure_release(total, 0.5)
    assert released.dtype == torch.float64
    assert fits(released - total, 0.5)
    assert not any(fits(released - total, wrong) for wrong in (0.25, 0.47, 0.53, 1.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_of_the_total_shows_below_the_grid(dtype):
    """Totals whose last bits differ: every release is whole steps, whatever they were."""
    grid = grid_of(0.3)
    for seed in range(3):
        total = torch.rand(500, generator=Generator().manual_seed(seed), dtype=dtype) * 1e-3
        before = total.clone()
        steps = secure_release(total, 0.3) / grid
        assert torch.equal(steps, steps.round())
        assert torch.equal(total, before)


def test_the_textbook_way_shows_the_total_in_its_last_bits():
    """The negative control, Mironov's attack in small: of all float64 Gaussians few reach a given sum with 0.1."""
    grid = grid_of(1.0)
    steps = (0.1 + gaussian(1000, 1.0, "seeded", Generator().manual_seed(1))) / grid
    assert not torch.equal(steps, steps.round())


@pytest.mark.usefixtures("repeatable_system")
def test_the_noise_of_a_release_does_not_depend_on_the_total(monkeypatch):
    """With the same bits from the system, two totals of whole steps keep their exact difference."""
    bits = [np.random.Generator(np.random.PCG64(7)) for _ in range(2)]
    total = torch.arange(100, dtype=torch.float64) * grid_of(1.0)
    monkeypatch.setattr(os, "urandom", bits[0].bytes)
    zero = secure_release(torch.zeros(100, dtype=torch.float64), 1.0)
    monkeypatch.setattr(os, "urandom", bits[1].bytes)
    assert torch.equal(secure_release(total, 1.0) - zero, total)


def test_rounding_moves_two_neighbours_by_at_most_the_inflation(monkeypatch):
    """The noiseless release of totals at distance S is at most S + inflation apart, and comes near it."""
    monkeypatch.setattr(noise, "_steps_of_noise", lambda d, deviation: torch.zeros(d, dtype=torch.float64))
    d, deviation = 64, 1.0
    grid, inflation = grid_of(deviation), rounding_inflation(deviation, d)
    assert inflation == pytest.approx(8 * grid)
    generator, largest = Generator().manual_seed(8), 0.0
    for i in range(200):
        one = torch.randn(d, generator=generator, dtype=torch.float64) * (i + 1) * grid
        other = one + torch.rand(d, generator=generator, dtype=torch.float64) * grid
        moved = float((secure_release(one, deviation) - secure_release(other, deviation)).norm())
        assert moved <= float((one - other).norm()) + inflation
        largest = max(largest, moved - float((one - other).norm()))
    worst = torch.full((d,), 0.5001 * grid, dtype=torch.float64)
    moved = float((secure_release(worst, deviation) - secure_release(-worst * 0.9, deviation)).norm())
    assert moved > float((worst * 1.9).norm())
    assert largest > 0


@pytest.mark.parametrize("z", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("d", [1, 10**6, 10**9])
@pytest.mark.parametrize("terms", [1, 200])
def test_the_deviation_covers_all_roundings_and_little_more(z, d, terms):
    for sensitivity in (0.013, 1.0, 7.7):
        deviation = secure_deviation(z, sensitivity, d, terms=terms)
        added = Fraction(2 * terms * (terms - 1), 2**53) * Fraction(sensitivity)
        needed = Fraction(sensitivity) + added + Fraction(rounding_inflation(deviation, d))
        assert Fraction(deviation) >= Fraction(z) * needed
        assert deviation <= z * sensitivity * (1 + 1e-9 + 2 * z * sqrt(d) * 2.0**-STEPS)


def test_a_total_in_float32_costs_its_own_rounding():
    assert secure_deviation(1.0, 1.0, 1, terms=100, dtype=torch.float32) == pytest.approx(1 + 200 * 2.0**-24, abs=1e-8)
    with pytest.raises(InvalidArgument, match="dtype="):
        secure_deviation(1.0, 1.0, 1, dtype=torch.float16)


def test_float_sums_stay_within_the_error_charged_for():
    """Rows of length 1 added up in float64 and rounded to float32, against the exact sum."""
    rows = torch.randn(50, 40, generator=Generator().manual_seed(9), dtype=torch.float64)
    rows /= rows.norm(dim=1, keepdim=True)
    exact = [sum(Fraction(float(value)) for value in column) for column in rows.T]
    summed, single = rows.sum(0), rows.sum(0).float()
    off = sqrt(sum(float(Fraction(float(a)) - b) ** 2 for a, b in zip(summed, exact, strict=True)))
    off_single = sqrt(sum(float(Fraction(float(a)) - b) ** 2 for a, b in zip(single, exact, strict=True)))
    assert off <= 49 * 2.0**-53 * 50
    assert off <= off_single <= (49 * 2.0**-53 + 2.0**-24) * 50


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ((0.0, 1.0, 10), "noise_multiplier="),
        ((1.0, 0.0, 10), "sensitivity="),
        ((1.0, float("inf"), 10), "sensitivity="),
        ((1.0, 1.0, 0), "d="),
        ((1e9, 1.0, 10**6), "rounding outweighs"),
    ],
)
def test_a_deviation_of_nothing_is_refused(arguments, name):
    with pytest.raises(InvalidArgument, match=name):
        secure_deviation(*arguments)


def test_a_total_is_one_row():
    with pytest.raises(InvalidArgument, match="expected \\(d,\\)"):
        secure_release(torch.zeros(2, 3), 1.0)
