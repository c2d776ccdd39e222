"""The ring, its exact product, its random polynomials, and what breaking it would cost."""

from hashlib import shake_128
from math import comb, log2, sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from privfm.checks import InvalidArgument
from privfm.defenses.channels.pad import rlwe
from privfm.defenses.channels.pad.rlwe import (
    DEGREE,
    FLIPS,
    LARGEST_KEY,
    MODULUS,
    centred_binomial,
    product,
    ternary,
    uniform,
)
from privfm.defenses.channels.pad.security import pad_security, primal_attack

ALPHA = 1e-7  # real entropy: a right sampler fails once in ten million runs


def schoolbook(polynomials, key):
    """Row by row of the definition, exact in int64: X^2048 = -1."""
    total = np.zeros(polynomials.shape, np.int64)
    for power, factor in enumerate(key.tolist()):
        shifted = np.roll(polynomials.astype(np.int64), power, axis=1)
        shifted[:, :power] *= -1
        total += factor * shifted
    return total


def is_prime(number):
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))


def rejects(observed, probabilities):
    """Pearson's chi-square; cells that expect fewer than 10 are merged into the last."""
    expected = np.asarray(probabilities) * sum(observed)
    big = expected >= 10
    seen = np.append(np.asarray(observed)[big], np.asarray(observed)[~big].sum())
    wanted = np.append(expected[big], expected[~big].sum())
    seen, wanted = seen[wanted > 0], wanted[wanted > 0]
    statistic = float(((seen - wanted) ** 2 / wanted).sum())
    return chi2.sf(statistic, len(wanted) - 1) < ALPHA


# The ring


def test_the_modulus_is_the_largest_prime_that_splits_the_ring():
    candidates = [number for number in range(MODULUS, 2**31) if number % (2 * DEGREE) == 1]
    assert is_prime(candidates[0])
    assert not any(is_prime(number) for number in candidates[1:])
    assert candidates[0] == MODULUS


@pytest.mark.parametrize("rows", [0, 1, 2, 32, 33, 65])
def test_products_are_exact(rows):
    generator = np.random.default_rng(rows)
    polynomials = generator.integers(0, MODULUS, (rows, DEGREE)).astype(np.uint32)
    key = generator.integers(-1, 2, DEGREE).astype(np.int8)
    before = polynomials.copy(), key.copy()
    assert np.array_equal(product(polynomials, key), schoolbook(polynomials, key))
    assert np.array_equal(polynomials, before[0])
    assert np.array_equal(key, before[1])


# Residues whose limbs are as large as limbs get, beside the ends of the range
@pytest.mark.parametrize("residue", [0, 1, MODULUS - 1, 0x7FFE8000, 0x7FFE7FFF, 0x00008000])
@pytest.mark.parametrize("signs", ["same", "alternating", "random"])
def test_products_of_the_largest_values_are_exact(residue, signs):
    generator = np.random.default_rng(0)
    polynomials = np.full((1, DEGREE), residue, np.uint32)
    pattern = {
        "same": np.ones(DEGREE),
        "alternating": (-1.0) ** np.arange(DEGREE),
        "random": generator.choice([-1, 1], DEGREE),
    }
    key = (LARGEST_KEY * pattern[signs]).astype(np.int64)
    assert np.array_equal(product(polynomials, key), schoolbook(polynomials, key))


def test_products_that_grow_as_large_as_the_proof_allows_are_exact():
    """Signs of the key follow the polynomial's, so that one coefficient is the full 2048 (q - 1) 4096."""
    generator = np.random.default_rng(1)
    signs = generator.choice([-1, 1], DEGREE)
    polynomials = np.where(signs > 0, MODULUS - 1, 0)[None]
    key = np.concatenate([signs[:1], -signs[:0:-1]]) * LARGEST_KEY  # s(1/X), because 1/X^i = -X^(2048-i)
    got = product(polynomials, key)
    assert np.array_equal(got, schoolbook(polynomials, key))
    assert np.abs(got).max() == (signs > 0).sum() * (MODULUS - 1) * LARGEST_KEY


def test_the_last_power_of_x_wraps_to_minus_one():
    one, x, last = np.eye(DEGREE, dtype=np.int64)[[0, 1, DEGREE - 1]]
    assert np.array_equal(product(last[None], x), -one[None])
    assert np.array_equal(product(last[None], one), last[None])


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, LARGEST_KEY))
def test_pads_add_as_their_keys_do(seed, clients):
    generator = np.random.default_rng(seed)
    polynomials = generator.integers(0, MODULUS, (1, DEGREE))
    first = generator.integers(-(clients // 2), clients // 2 + 1, DEGREE)
    second = generator.integers(-(clients // 2), clients // 2 + 1, DEGREE)
    both = product(polynomials, first) + product(polynomials, second)
    assert np.array_equal(product(polynomials, first + second), both)


@pytest.mark.parametrize(
    ("polynomials", "key", "reason"),
    [
        (np.full((1, DEGREE), MODULUS), np.ones(DEGREE), "expected residues"),
        (np.full((1, DEGREE), -1), np.ones(DEGREE), "expected residues"),
        (np.zeros((1, DEGREE), np.int64), np.full(DEGREE, LARGEST_KEY + 1), "exact up to 4096"),
        (np.zeros((1, DEGREE), np.int64), np.full(DEGREE, -LARGEST_KEY - 1), "exact up to 4096"),
        (np.zeros((1, DEGREE // 2), np.int64), np.ones(DEGREE // 2), "shapes"),
        (np.zeros(DEGREE, np.int64), np.ones(DEGREE), "shapes"),
        (np.zeros((1, DEGREE), np.int64), np.ones(DEGREE - 1), "shapes"),
    ],
)
def test_what_the_proof_does_not_cover_is_refused(polynomials, key, reason):
    with pytest.raises(InvalidArgument, match=reason):
        product(polynomials, key.astype(np.int64))


# Keys


def counts_of(values, low, high):
    return np.bincount(values.astype(np.int64) - low, minlength=high - low + 1)


@pytest.mark.parametrize("length", [1, 2, 255, DEGREE, 100_000])
def test_a_key_is_ternary(length):
    key = ternary(length)
    assert key.shape == (length,)
    assert set(key.tolist()) <= {-1, 0, 1}


def test_every_ternary_value_is_as_likely():
    assert not rejects(counts_of(ternary(4_000_000), -1, 1), [1 / 3] * 3)


def test_a_remainder_without_rejection_is_noticed():
    """Negative control: 256 is no multiple of 3, so plain remainders are biased by 0.26 %."""
    drawn = np.random.default_rng(0).integers(0, 256, 4_000_000) % 3
    assert rejects(counts_of(drawn, 0, 2), [1 / 3] * 3)


def test_a_key_has_its_full_entropy():
    """Blocks of six neighbours take all 729 values evenly; no two keys agree by more than chance."""
    keys = np.stack([ternary(DEGREE) for _ in range(300)])
    blocks = (keys[:, :2046].reshape(-1, 6) + 1) @ 3 ** np.arange(6)
    assert not rejects(np.bincount(blocks, minlength=729), [1 / 729] * 729)
    agreeing = (keys[:150] == keys[150:]).mean(axis=1)  # 1/3 +- 0.0104
    assert np.abs(agreeing - 1 / 3).max() < 0.08


@pytest.mark.parametrize("length", [0, -1])
def test_a_key_of_no_length_is_refused(length):
    with pytest.raises(InvalidArgument, match="length="):
        ternary(length)


# Errors

BINOMIAL = [comb(2 * FLIPS, k) / 4**FLIPS for k in range(2 * FLIPS + 1)]  # number of heads of 42 coins, less 21


def test_errors_are_centred_binomial():
    errors = centred_binomial(1_000_000)
    assert errors.dtype == np.int8
    assert np.abs(errors.astype(int)).max() <= FLIPS
    assert not rejects(counts_of(errors, -FLIPS, FLIPS), BINOMIAL)
    # The variance of a million: 10.5 +- 0.0148 (kurtosis 3 - 1/21), at 6 deviations
    assert abs(float(errors.var(dtype=np.float64)) - FLIPS / 2) < 6 * FLIPS / 2 * sqrt((2 - 1 / FLIPS) / 1e6)


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_errors_of_half_and_double_the_deviation_are_noticed(factor):
    drawn = np.rint(np.random.default_rng(0).normal(0, factor * sqrt(FLIPS / 2), 10_000))
    assert rejects(counts_of(np.clip(drawn, -FLIPS, FLIPS), -FLIPS, FLIPS), BINOMIAL)


@pytest.mark.parametrize("flips", [FLIPS - 1, FLIPS + 1])
def test_one_coin_more_or_less_is_noticed(flips):
    generator = np.random.default_rng(0)
    drawn = generator.binomial(flips, 0.5, 1_000_000) - generator.binomial(flips, 0.5, 1_000_000)
    assert rejects(counts_of(np.clip(drawn, -FLIPS, FLIPS), -FLIPS, FLIPS), BINOMIAL)


def test_errors_are_independent_across_calls_steps_and_neighbours():
    step = rlwe._CHUNK
    first, second = centred_binomial(2 * step + 1).astype(float), centred_binomial(2 * step + 1).astype(float)
    for one, other in ((first, second), (first[1:], first[:-1]), (first[:step], first[step : 2 * step])):
        correlation = float(np.corrcoef(one, other)[0, 1])
        assert abs(correlation) < 5.4 / sqrt(len(one))  # two-sided 7e-8


@pytest.mark.parametrize("length", [0, 1, 7])
def test_a_few_errors_are_as_many(length):
    assert centred_binomial(length).shape == (length,)


# The public polynomials


def slowly(seed, length):
    """The definition, a word at a time -> the residues, and how many words were skipped."""
    stream, kept, skipped = shake_128(seed).digest(5 * length), [], 0
    for at in range(0, len(stream), 4):
        word = int.from_bytes(stream[at : at + 4], "little") % 2**31
        if word < MODULUS:
            kept.append(word)
        else:
            skipped += 1
        if len(kept) == length:
            break
    return kept, skipped


def test_public_residues_are_what_the_definition_says():
    expected, skipped = slowly(b"seed", 200_000)
    assert skipped > 0  # 9 are expected: the case is met
    assert uniform(b"seed", 200_000).tolist() == expected


def test_public_residues_follow_from_the_seed_alone():
    long = uniform(b"seed", 5000)
    assert np.array_equal(uniform(b"seed", 4000), long[:4000])
    assert not np.array_equal(uniform(b"Seed", 5000), long)
    assert uniform(b"seed", 0).shape == (0,)


@pytest.mark.parametrize("seed", [b"", b"a", b"another"])
def test_public_residues_are_uniform(seed):
    residues = uniform(seed, 500_000).astype(np.int64)
    assert residues.max() < MODULUS
    assert not rejects(np.bincount(residues * 1000 // MODULUS, minlength=1000), [1e-3] * 1000)
    assert not rejects(np.bincount(residues % 997, minlength=997), [1 / 997] * 997)


def test_skipping_not_reducing(monkeypatch):
    """At a modulus where it shows: a remainder would make the residues under 2^31 - q twice as likely."""
    modulus = 3 * 2**29
    monkeypatch.setattr(rlwe, "MODULUS", modulus)
    residues = uniform(b"seed", 200_000).astype(np.int64)  # a quarter is skipped, more than is drawn in reserve
    assert not rejects(np.bincount(residues // 2**29, minlength=3), [1 / 3] * 3)
    words = np.frombuffer(shake_128(b"seed").digest(800_000), "<u4").astype(np.int64) % 2**31
    assert rejects(np.bincount(words % modulus // 2**29, minlength=3), [1 / 3] * 3)


# What breaking it would cost

TERNARY = sqrt(2 / 3)


@pytest.mark.parametrize(
    ("dimension", "log2_modulus", "least", "most"),
    [
        # "Homomorphic encryption standard", 2018, table 1, ternary secrets: 128 bits
        (1024, 27, 126, 134),
        (2048, 54, 126, 134),
        (4096, 109, 126, 134),
        (8192, 218, 126, 134),
        # the same table: 192 and 256 bits
        (2048, 37, 188, 202),
        (2048, 29, 250, 270),
    ],
)
def test_the_model_agrees_with_the_standard(dimension, log2_modulus, least, most):
    assert least < primal_attack(dimension, log2_modulus, TERNARY).bits < most


@pytest.mark.parametrize(("honest", "bits"), [(None, 241), (2, 177)])
def test_the_estimates_that_are_stated(honest, bits):
    assert round(pad_security(honest).bits) == bits


def test_the_hint_of_two_honest_clients():
    """2/9 of the sums of two trits are +-2; given the sum, a trit's variance is 1/3 on average (listed by hand)."""
    pairs = [(a, b) for a in (-1, 0, 1) for b in (-1, 0, 1)]
    variance = 0.0
    for a, b in pairs:
        same = [c for c, d in pairs if c + d == a + b]
        variance += (a - sum(same) / len(same)) ** 2 / len(pairs)
    assert variance == pytest.approx(1 / 3)
    assert sum(abs(a + b) == 2 for a, b in pairs) / len(pairs) == pytest.approx(2 / 9)
    direct = primal_attack(1592, log2(MODULUS), sqrt(1 / 3 / (7 / 9)), 3.2 / sqrt(2))
    assert pad_security(2) == direct


def test_more_honest_clients_help_and_never_reach_no_hint():
    bits = [pad_security(honest).bits for honest in (2, 3, 5, 20, 200)]
    assert bits == sorted(bits)
    assert bits[-1] <= pad_security(None).bits


def test_a_smaller_ring_is_refused():
    with pytest.raises(InvalidArgument, match="degree=1024: an estimate of 113 bits, expected 128; take degree 2048"):
        pad_security(None, 1024)


def test_one_honest_client_has_no_pad():
    with pytest.raises(InvalidArgument, match="honest=1"):
        pad_security(1)


@pytest.mark.parametrize("arguments", [(1, 31, 1.0), (2048, 0, 1.0), (2048, 31, 0.0), (2048, 31, 1.0, -1.0)])
def test_arguments_out_of_range_are_refused(arguments):
    with pytest.raises(InvalidArgument):
        primal_attack(*arguments)


def test_beyond_the_model_is_said():
    with pytest.raises(InvalidArgument, match="no meaning"):
        primal_attack(8192, 31, TERNARY)
