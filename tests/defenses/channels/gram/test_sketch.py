"""The sketch: that it measures what it says, how far off it is at worst, and that it cannot be aimed at."""

from functools import lru_cache
from math import sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privfm.checks import Corrupt, InvalidArgument, ParameterMismatch, RoundFailed
from privfm.defenses.channels.gram.ring import DEGREE, SCALE, PublicRing, SecretRing, ServerRing, head_room, new_keys
from privfm.defenses.channels.gram.sketch import (
    Draw,
    checked_gram,
    chunks_of,
    effective_size,
    encrypted_sketch,
    largest_deviation,
    longest_sum,
    monomials_of,
    rounded_gram,
    sketched,
    step_of,
    usual_deviation,
    whole_weights,
)

GROUPS = 16


def draw_of(number, chunks, groups=GROUPS):
    return Draw.expand(number.to_bytes(32, "big"), b"test", chunks, groups)


@pytest.fixture(scope="module")
def keys():
    return new_keys(step_of(GROUPS))


@pytest.fixture(scope="module")
def server(keys):
    return ServerRing(keys.public, keys.evaluation)


@pytest.fixture(scope="module")
def secret(keys):
    return SecretRing(keys.secret)


def whole(rng, size):
    """Numbers in [-1, 1] on the grid of the channel."""
    return np.trunc(rng.uniform(-1, 1, size) * 2**24) / 2**24


# Plain mathematics


def slow_sketch(row, draw):
    """Polynomials as dictionaries from exponents to numbers."""
    found = np.zeros(DEGREE)
    t = pow(3, DEGREE // 2 // draw.count, 2 * DEGREE)
    for k, value in enumerate(row):
        chunk, place = divmod(k, DEGREE)
        exponent = (place + int(draw.shifts[chunk])) * t ** int(draw.groups[chunk]) % (2 * DEGREE)
        found[exponent % DEGREE] += value if exponent < DEGREE else -value  # X^N = -1
    return found


@pytest.mark.parametrize("d", [1, 100, DEGREE, DEGREE + 1, 3 * DEGREE + 7])
def test_a_sketch_is_a_sum_of_moved_chunks(d):
    rows, draw = np.random.default_rng(d).normal(size=(2, d)), draw_of(d, chunks_of(d))
    np.testing.assert_allclose(sketched(rows, draw), [slow_sketch(row, draw) for row in rows], atol=1e-12)


def test_one_chunk_keeps_every_inner_product():
    rows = np.random.default_rng(0).normal(size=(4, DEGREE - 3))
    np.testing.assert_allclose((found := sketched(rows, draw_of(5, 1))) @ found.T, rows @ rows.T, rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("groups", [1, 2, 16, 4096])
def test_the_maps_form_a_group_of_that_size(groups):
    t = step_of(groups)
    powers = [pow(t, g, 2 * DEGREE) for g in range(groups)]
    assert len(set(powers)) == groups
    assert pow(t, groups, 2 * DEGREE) == 1
    assert 2 * DEGREE - 1 not in powers  # else an orbit would contain its own conjugate, and have half the dimensions


@pytest.mark.parametrize("groups", [0, 3, 8192, -2, 16.0])
def test_other_numbers_of_groups_are_refused(groups):
    with pytest.raises(InvalidArgument, match="groups="):
        Draw.expand(bytes(32), b"", 3, groups)


def test_all_of_the_seed_counts_and_the_commitments_too():
    """Regression test: generators that fold 256 bits to 32."""
    seed = bytes(range(32))
    places = draw_of(0, 400)
    drawn = {places.shifts.tobytes()}
    for byte in range(32):
        changed = bytearray(seed)
        changed[byte] ^= 0x80
        drawn.add(Draw.expand(bytes(changed), b"test", 400, GROUPS).shifts.tobytes())
    drawn.add(Draw.expand(seed, b"test", 400, GROUPS).shifts.tobytes())
    drawn.add(Draw.expand(seed, b"other", 400, GROUPS).shifts.tobytes())
    assert len(drawn) == 35
    assert np.array_equal(Draw.expand(seed, b"test", 400, GROUPS).shifts, Draw.expand(seed, b"test", 400, 4).shifts)
    with pytest.raises(InvalidArgument, match="seed of 16 bytes"):
        Draw.expand(bytes(16), b"", 3, GROUPS)


def test_places_are_uniform():
    """Chi-square over 16 classes each; a fixed seed, so it cannot fail by chance. 0.999 quantile at 15: 37.7."""
    draw, n = draw_of(3, 160_000), 160_000
    for classes in (draw.groups, draw.shifts * 16 // (2 * DEGREE)):
        counts = np.bincount(classes, minlength=16)
        assert ((counts - n / 16) ** 2 / (n / 16)).sum() < 37.7
    assert abs(np.corrcoef(draw.groups, draw.shifts)[0, 1]) < 4 / sqrt(n)


CHUNKS, DRAWS = 12, 200


def tone(k):
    """One pair of conjugate roots of unity; every shift keeps it in its plane."""
    return np.cos(np.pi * (2 * k + 1) * np.arange(DEGREE) / DEGREE)


STRUCTURED = {
    "one tone in every chunk": np.tile(tone(5), CHUNKS),
    "the orbit of a tone": np.tile(
        sum(tone((pow(step_of(GROUPS), g, 2 * DEGREE) * 11 % (2 * DEGREE) - 1) // 2) for g in range(GROUPS)), CHUNKS
    ),
    "one place in every chunk": np.tile(np.eye(1, DEGREE, 77)[0], CHUNKS),
    "the constant, which the maps keep": np.tile(np.eye(1, DEGREE, 0)[0], CHUNKS),
    "all ones": np.ones(CHUNKS * DEGREE),
    "two chunks alike": np.concatenate([np.tile(tone(9), 2), np.zeros(DEGREE)]),
    "a Gaussian": np.random.default_rng(1).normal(size=CHUNKS * DEGREE),
}


@lru_cache
def lengths(name, groups=GROUPS):
    """Squared lengths of the sketches of a row of length 1, over fixed draws."""
    row = STRUCTURED[name][None] / np.linalg.norm(STRUCTURED[name])
    draws = (draw_of(i, chunks_of(row.size), groups) for i in range(DRAWS))
    return np.array([(sketched(row, draw) ** 2).sum() for draw in draws])


@pytest.mark.parametrize("name", STRUCTURED)
def test_lengths_are_right_in_the_mean_and_within_the_proved_deviation(name):
    """200 fixed draws: a mean is off by at most 4 of its own deviations, a deviation by 20 % (4 of its own)."""
    found, bound = lengths(name), largest_deviation(GROUPS)
    assert abs(found.mean() - 1) < 4 * bound / sqrt(len(found))
    assert found.std() < 1.2 * bound


def test_the_proved_deviation_is_reached_by_a_tone():
    found = lengths("one tone in every chunk")
    # the sum over pairs of chunks leaves out each chunk with itself
    assert found.std() == pytest.approx(largest_deviation(GROUPS) * sqrt(1 - 1 / CHUNKS), rel=0.2)


def test_a_row_without_structure_is_off_by_less():
    found = lengths("a Gaussian")
    assert found.std() == pytest.approx(usual_deviation() * sqrt(1 - 1 / CHUNKS), rel=0.2)


def test_without_the_maps_a_tone_stays_in_two_dimensions():
    """Negative control: one group. Then a squared length is exponential, under 1/4 with probability 1 - e^-1/4."""
    found = lengths("one tone in every chunk", groups=1)
    assert found.std() > 0.8
    assert abs((found < 0.25).mean() - 0.221) < 4 * sqrt(0.221 * 0.779 / len(found))


def test_signs_without_permutations_leave_a_place_in_one():
    """Negative control, of the form sum_g (vector of signs g) * (sum of chunks with signs): 32 groups do not help."""
    rng, found = np.random.default_rng(4), []
    for _ in range(400):
        groups, vectors = rng.integers(0, 32, 101), rng.choice([-1.0, 1.0], 32)  # at the one place that counts
        found.append((vectors[groups] * rng.choice([-1.0, 1.0], 101)).sum() ** 2 / 101)
    assert np.mean(np.array(found) < 0.25) > 0.3  # 0.38 of a chi-square of one degree of freedom


@pytest.mark.parametrize(("freedom", "expected"), [(4, 9.0e-2), (16, 1.1e-3), (32, 4.9e-6), (64, 1.3e-10)])
def test_how_improbable_a_quarter_of_the_length_is(freedom, expected):
    """The stated 5e-6: chi-square of 2G degrees of freedom over 2G below 1/4 is a Poisson tail, since 2G is even."""
    mean, terms = freedom / 8, freedom // 2
    term, below = np.exp(-mean), 0.0
    for k in range(terms):
        below += term
        term *= mean / (k + 1)
    assert 1 - below == pytest.approx(expected, rel=0.06)


# Aimed at


def kernel_row(draw, chunks, norm):
    """A row of this length whose sketch under a known draw is zero: the second chunk takes back the first."""
    rng = np.random.default_rng(8)
    row = np.zeros((chunks, DEGREE))
    row[0] = rng.normal(size=DEGREE)
    moved = sketched(row.reshape(1, -1), draw)[0]
    t = pow(draw.step, int(draw.groups[1]), 2 * DEGREE)
    exponents = (np.arange(DEGREE) + int(draw.shifts[1])) * t % (2 * DEGREE)
    row[1] = -np.where(exponents < DEGREE, 1, -1) * moved[exponents % DEGREE]
    flat = row.reshape(-1)
    return flat / np.linalg.norm(flat) * norm


def test_a_known_draw_hides_any_length():
    """Positive control of the next test."""
    known = draw_of(1, 5)
    row = kernel_row(known, 5, 1e3)
    assert np.linalg.norm(row) == pytest.approx(1e3)
    assert np.linalg.norm(sketched(row[None], known)) < 1e-9


def test_a_draw_after_the_commitment_hides_nothing():
    row = kernel_row(draw_of(1, 5), 5, 1e3)
    for later in range(2, 52):
        assert np.linalg.norm(sketched(row[None], draw_of(later, 5))) > 500


# Encrypted


@pytest.mark.parametrize("d", [1, DEGREE, 2 * DEGREE + 9])
def test_the_encrypted_sketch_is_the_plain_one(d, server, secret):
    rng, draw = np.random.default_rng(d), draw_of(d, chunks_of(d))
    rows, monomials = whole(rng, (2, d)), monomials_of(server, draw)
    held = [[server.parsed(server.encrypt(row[at : at + DEGREE])) for at in range(0, d, DEGREE)] for row in rows]
    first, second = (encrypted_sketch(server, chunks, monomials, draw) for chunks in held)
    plain = sketched(rows, draw)
    np.testing.assert_allclose(secret.opened(server.serialized(first)), plain[0], atol=1e-9)
    got = secret.inner_product(server.product(first, server.reversed(second)).packed())
    assert got == pytest.approx(plain[0] @ plain[1], abs=1e-9)
    mixed = secret.inner_product(server.plain_product(first, plain[1]).packed())
    assert mixed == pytest.approx(plain[0] @ plain[1], abs=1e-9)


def test_an_inner_product_with_zero_is_zero(server, secret):
    row = server.parsed(server.encrypt(np.ones(5)))
    assert abs(secret.inner_product(server.plain_product(row, np.zeros(DEGREE)).packed())) < 1e-9


def test_what_is_multiplied_cannot_be_seen_in_an_inner_product(server, secret):
    """Each is hidden by an encryption of zero of its own: the holder of the key sees unlike masks, and one number."""
    row = server.parsed(server.encrypt(np.ones(DEGREE)))
    first, second = (server.product(row, server.reversed(row)) for _ in range(2))
    assert (first.mask != second.mask).mean() > 0.99
    values = [secret.inner_product(one.packed()) for one in (first, second)]
    assert values == pytest.approx([DEGREE, DEGREE], rel=1e-9)


def test_the_noise_of_a_fresh_ciphertext_is_as_stated(server, secret):
    """22 units, of 8192 numbers: within 5 % (6 deviations), so half and double of it would fail."""
    values = whole(np.random.default_rng(2), DEGREE)
    noise = (secret.opened(server.encrypt(values)) - values) * SCALE
    assert noise.std() == pytest.approx(22, rel=0.05)
    assert abs(noise.mean()) < 5 * 22 / sqrt(DEGREE)


def test_head_room_is_where_products_wrap(server, secret):
    longest = sqrt(0.99 * head_room())  # one number as large as that would be beyond a client's bound
    row = server.parsed(server.encrypt(np.array([longest])))
    assert secret.inner_product(server.product(row, row).packed()) == pytest.approx(longest**2, rel=1e-9)
    row = server.parsed(server.encrypt(np.array([longest * 1.02])))
    assert secret.inner_product(server.product(row, row).packed()) < 0


@pytest.mark.parametrize("broken", [b"", b"\0" * 100, b"garbage" * 1000, b"x" * 300_000])
def test_what_is_no_ciphertext_is_refused(broken, server, secret):
    for opened in (server.parsed, secret.opened, secret.inner_product):
        with pytest.raises(Corrupt):
            opened(broken)


def test_a_truncated_or_foreign_ciphertext_is_refused(server, keys):
    part = server.encrypt(np.ones(3))
    with pytest.raises(Corrupt):
        server.parsed(part[:-1])
    product = server.times(server.parsed(part), server.encode(np.ones(1), 2.0))
    with pytest.raises(ParameterMismatch, match="not a fresh one"):
        server.parsed(server.serialized(product))
    with pytest.raises(ParameterMismatch, match="secret key"):
        PublicRing(keys.secret)
    with pytest.raises(Corrupt):
        PublicRing(b"no keys")


def test_keys_show_nothing(keys):
    assert repr(keys) == "RingKeys()"


# Weights


@pytest.mark.parametrize("weights", [[0.2, 0.0, 0.2], [1.0, 1.0], [-3.0, 0.0], [1e-30, 1e-30], [1 / 7] * 7])
def test_equal_weights_are_exact(weights):
    found, unit = whole_weights(np.array(weights))
    assert set(found.tolist()) <= {0, 1}
    assert (found * unit == weights).all()


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=300))
@settings(deadline=None)
def test_whole_weights_are_within_half_a_unit_and_in_range(weights):
    own = np.array(weights)
    found, unit = whole_weights(own)
    assert (np.abs(found * unit - own) <= abs(unit) / 2 * (1 + 1e-12)).all()
    assert np.linalg.norm(found) <= 2.0**16 + sqrt(len(own))
    assert np.abs(found).sum() <= 2.0**20 + len(own)


def test_no_weights_at_all():
    assert whole_weights(np.zeros(3))[0].tolist() == [0, 0, 0]
    assert effective_size(np.zeros(3)) == 0


def test_effective_size():
    assert effective_size(np.array([1.0, 0, 0])) == 1
    assert effective_size(np.full(7, 0.1)) == pytest.approx(7)
    assert effective_size(np.array([3.0, 1.0])) == pytest.approx(1.6)  # 16 / 10


# What the key holder believes


def test_a_gram_matrix_is_left_as_it_is():
    rows = np.random.default_rng(0).normal(size=(5, 9))
    gram, usable = checked_gram(rows @ rows.T, 4, 100.0)
    np.testing.assert_array_equal(gram, rows @ rows.T)
    assert usable.tolist() == [True] * 4


def test_a_row_that_is_too_long_is_unusable():
    rows = np.random.default_rng(0).normal(size=(4, 9))
    rows[1] *= 1000
    gram, usable = checked_gram(rows @ rows.T, 3, 100.0)
    keep = [0, 2, 3]
    np.testing.assert_array_equal(gram, rows[keep] @ rows[keep].T)
    assert usable.tolist() == [True, False, True]


def test_noise_is_no_reason_to_refuse_and_leaves_no_negative_eigenvalue():
    rows = np.random.default_rng(0).normal(size=(6, 2))  # rank 2: four eigenvalues of zero
    noise = np.random.default_rng(1).normal(size=(6, 6)) * 2**-35
    gram, _ = checked_gram(rows @ rows.T + noise + noise.T, 6, 100.0)
    assert np.linalg.eigvalsh(gram)[0] > -1e-15
    np.testing.assert_allclose(gram, rows @ rows.T, atol=1e-8)


@pytest.mark.parametrize("bent", [1e-5, 0.1, 100.0])
def test_what_is_no_gram_matrix_is_refused(bent):
    gram = np.eye(3)
    gram[0, 1] = gram[1, 0] = 1 + bent
    with pytest.raises(RoundFailed, match="eigenvalue"):
        checked_gram(gram, 3, 100.0)


def test_a_refused_matrix_is_not_read_off_the_message():
    """Eigenvalues are functions of the error of decryption."""
    with pytest.raises(RoundFailed) as refused:
        checked_gram(np.array([[1.0, 1.5], [1.5, 1.0]]), 2, 100.0)
    assert not any(digit in str(refused.value) for digit in "0123456789")


@pytest.mark.parametrize("weights", [[1, 1, 1, 1], [1, 0, 0, 0], [7, -3, 1, 0], [0, 0, 0, 0]], ids=str)
@pytest.mark.parametrize("size", [1e-3, 1.0, 300.0])
def test_sums_of_measured_rows_are_within_what_was_measured(size, weights):
    """Also those of one row and its opposite, which cancel but for the noise; twice as long is too long."""
    rows = np.random.default_rng(3).normal(size=(4, 3 * DEGREE)) * size / sqrt(3 * DEGREE)
    rows[3] = -rows[0]
    chosen, noise = np.array(weights, float), np.random.default_rng(4).normal(size=(4, 4)) * 2**-35
    short = sketched(rows, draw_of(1, 3))
    gram = rounded_gram(checked_gram(short @ short.T + noise + noise.T, 4, 1e6)[0])
    square = float((chosen @ rows) @ (chosen @ rows))
    assert square <= longest_sum(gram, chosen)
    if size >= 1 and square > size**2 / 2:  # below, what is far under a bound is noise
        assert 4.5 * square > longest_sum(gram, chosen)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_refused(value):
    with pytest.raises(RoundFailed, match="not finite"):
        checked_gram(np.full((2, 2), value), 2, 100.0)


def test_a_negative_square_is_unusable():
    """What a product of complex slots would allow: v + iv has a square with real part zero, or less."""
    _, usable = checked_gram(np.diag([1.0, -0.5, 2.0]), 3, 100.0)
    assert usable.tolist() == [True, False, True]


def test_rounding_is_relative_with_a_floor():
    rows = np.diag([500.0, 1.0, 1e-3, 0.0]) + 1e-4
    gram = rows @ rows.T
    steps = np.maximum(2.0**-23 * np.sqrt(np.outer(gram.diagonal(), gram.diagonal())), 2.0**-28)
    found = rounded_gram(gram)
    assert (np.abs(found - gram) <= steps / 2 * (1 + 1e-9)).all()
    assert (found == found.T).all()
    assert (found * 2**28 == np.rint(found * 2**28)).all()
    np.testing.assert_array_equal(rounded_gram(gram + 2e-11), found)
