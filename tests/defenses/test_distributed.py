"""Distributed noise: its accounting against published formulas and brute force, its codec against exact integers."""

from dataclasses import replace
from fractions import Fraction
from math import ceil, cosh, exp, floor, inf, log, sqrt

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Generator

from privfm.checks import InvalidArgument
from privfm.contracts import KEY_HOLDER, SERVER, Encoded, Intake, Party, Reveals
from privfm.defenses.channels.identities import new_identity, public_identity
from privfm.defenses.privacy.distributed import (
    WRAP_TARGET,
    DistributedNoise,
    rounding_bound,
    share_deviation,
    skellam_rdp,
    smallest_modulus_bits,
    tau,
    wrap_probability,
    zcdp,
)
from privfm.defenses.privacy.noise import words

SIGNIFICANCE = 1e-6

CODEC = DistributedNoise(
    max_grad_norm=1.0, grid=2.0**-10, noise_multiplier=1.0, survivors=4, clients=6, modulus_bits=18
)


def generators(count, seed=100):
    return [Generator().manual_seed(seed + i) for i in range(count)]


def noiseless(codec, row, seed=0):
    """What the client's data adds, in steps."""
    return codec.rounded(row, words("seeded", Generator().manual_seed(seed)))


# Accounting


@pytest.mark.parametrize(
    ("clip", "d", "ratio"),
    [  # the formula, evaluated elsewhere to four digits at beta = exp(-1/2)
        (2.0**8, 10**6, 2.1969),
        (2.0**12, 10**6, 1.0076),
        (2.0**16, 10**6, 1.0000),
        (2.0**8, 74_000, 1.1350),
        (2.0**12, 74_000, 1.0007),
    ],
)
def test_rounding_bounds_are_the_published_formula(clip, d, ratio):
    assert rounding_bound(clip, d) / clip == pytest.approx(ratio, abs=5e-5)


@pytest.mark.parametrize(("clip", "d", "square"), [(100.0, 1, 10_000 + 0.25 + 100 + 0.5), (2.0, 4, 4 + 1 + 2 + 1)])
def test_rounding_bounds_by_hand(clip, d, square):
    """beta = exp(-1/2) makes sqrt(2 ln(1/beta)) one."""
    assert rounding_bound(clip, d) ** 2 == pytest.approx(square)
    assert rounding_bound(clip, d) < clip + sqrt(d)


@pytest.mark.parametrize(("share", "expected"), [(1, 5.45e-4), (1.2, 6.79e-6), (1.5, 2.27e-9), (2, 7.16e-17)])
def test_tau_of_twenty_shares(share, expected):
    assert tau(share, 20) == pytest.approx(expected, rel=1e-3)


def test_one_share_is_a_discrete_gaussian():
    assert tau(1.0, 1) == 0.0


def masses(share, reach=80):
    k = np.arange(-reach, reach + 1)
    weights = np.exp(-(k**2) / (2 * share**2))
    return weights / weights.sum()


def summed(share, count):
    """Probabilities of a sum of discrete Gaussians, by convolution; and of the one it is compared with."""
    total = masses(share)
    for _ in range(count - 1):
        total = np.convolve(total, masses(share), "same")
    return total, masses(share * sqrt(count))


@pytest.mark.parametrize(("share", "count"), [(0.6, 2), (0.6, 5), (0.8, 3), (1.0, 4)])
def test_tau_is_twice_a_bound_on_the_distance_of_sums(share, count):
    """Brute force where the distance can be seen, and the negative control: a hundredth of it is no bound."""
    total, single = summed(share, count)
    seen = single > 1e-9  # beyond, the convolution's own cut and rounding show
    distance = np.abs(np.log(total[seen] / single[seen])).max()
    assert distance <= tau(share, count) / 2
    assert distance > tau(share, count) / 200


@pytest.mark.parametrize("order", [2, 3, 8])
@pytest.mark.parametrize("shift", [1, 2])
def test_the_divergence_of_a_sum_keeps_to_rho_and_xi(order, shift):
    """Brute force at a share that is really allowed; and a rho of nine tenths would be a lie."""
    share, count = 2.0, 3
    total, _ = summed(share, count)
    one, other = total[shift:], total[:-shift]
    seen = (one > 1e-40) & (other > 1e-40)
    divergence = log((one[seen] ** order * other[seen] ** (1.0 - order)).sum()) / (order - 1)
    rho, xi = zcdp(float(shift), share, count, 1)
    assert divergence <= rho * order + xi + 1e-12
    assert divergence > 0.9 * rho * order


def epsilon(rho, xi, times):
    from dp_accounting import dp_event
    from dp_accounting.rdp import RdpAccountant

    event = dp_event.SelfComposedDpEvent(dp_event.ZCDpEvent(rho, xi), times)
    return RdpAccountant().compose(event).get_epsilon(1e-5)


@pytest.mark.parametrize(("answers", "expected"), [(20, 19.05), (18, 20.39), (14, 24.05), (10, 30.13)])
def test_epsilon_of_fewer_answers_than_the_noise_was_sized_for(answers, expected):
    """Corrections, C: d = 74,000, a clip of 2^16 steps, noise multiplier 1 of 20 shares, ten participations."""
    bound = rounding_bound(2.0**16, 74_000)
    rho, xi = zcdp(bound, 2.0**16 / sqrt(20), answers, 74_000)
    assert epsilon(rho, xi, 10) == pytest.approx(expected, abs=0.006)


def test_shares_are_sized_for_the_floor():
    """The floor's shares together are z D, whatever z and the floor are."""
    for survivors in (1, 7, 20):
        share = share_deviation(1.3, 5000.0, survivors)
        assert share * sqrt(survivors) == pytest.approx(1.3 * 5000.0)
        assert zcdp(5000.0, share, survivors, 10)[0] == pytest.approx(1 / (2 * 1.3**2))


@pytest.mark.parametrize(("clip", "expected"), [(2.0**8, 23.01), (2.0**12, 19.82), (2.0**16, 19.80)])
def test_epsilon_of_skellam_noise(clip, expected):
    """Corrections, C: variance of the sum (1.0 c)^2, d = 74,000, ten participations, orders 2 to 127."""
    from dp_accounting.rdp.rdp_privacy_accountant import compute_epsilon

    bound, orders = rounding_bound(clip, 74_000), range(2, 128)
    bound_l1 = min(sqrt(74_000) * bound, bound**2)
    divergences = [10 * skellam_rdp(order, bound, bound_l1, clip**2) for order in orders]
    assert compute_epsilon(list(orders), divergences, 1e-5)[0] == pytest.approx(expected, abs=0.006)


@pytest.mark.parametrize("order", [2, 5])
@pytest.mark.parametrize("shift", [1, 2])
def test_skellam_divergence_is_a_bound(order, shift):
    """Brute force in one dimension: Poisson differences, shifted. Three quarters of the bound would be none."""
    variance = 40.0
    k = np.arange(-90, 91)
    mass = stats.skellam.pmf(k, variance / 2, variance / 2)
    one, other = mass[shift:], mass[:-shift]
    seen = (one > 1e-13) & (other > 1e-13)
    divergence = log((one[seen] ** order * other[seen] ** (1.0 - order)).sum()) / (order - 1)
    bound = skellam_rdp(order, float(shift), float(shift), variance)
    assert 0.75 * bound < divergence <= bound


@pytest.mark.parametrize("share", [0.3, 1.0, 1.5, 1.999])
def test_a_share_under_two_steps_is_refused(share):
    with pytest.raises(InvalidArgument, match="finer grid"):
        zcdp(100.0, share, 20, 10)
    with pytest.raises(InvalidArgument, match="finer grid"):
        share_deviation(share / 100, 100.0, 1)
    assert share_deviation(2.0 / 128, 128.0, 1) == 2.0


@pytest.mark.parametrize("share", [0.0, -1.0, float("nan"), inf])
def test_a_share_is_a_number(share):
    with pytest.raises(InvalidArgument, match="share="):
        zcdp(100.0, share, 20, 10)


# Wrapping


def test_the_wrap_bound_holds_and_is_no_idle_one():
    """Sums of shares at a coordinate that is as full as it can be, against the bound at a modulus far too small."""
    clients, clip, share = 4, 10.0, 20.0
    generator = np.random.Generator(np.random.PCG64(1))
    for mechanism in ("discrete_gaussian", "skellam"):
        noise = generator.normal(0, share * sqrt(clients), 10**6)
        seen = float((np.abs(np.rint(noise) + clients * clip) >= 128).mean())
        bound = wrap_probability(8, clients, clip, share, 1, mechanism=mechanism)
        assert seen < bound < 0.5
        assert wrap_probability(8, clients, clip, share, 50, mechanism=mechanism) == 1.0
    assert wrap_probability(8, clients, 32.0, share, 1) == 1.0  # the value alone fills it


def test_a_skellam_tail_is_longer_than_a_gaussian_one():
    gaussian = wrap_probability(12, 20, 50.0, 20.0, 10**6)
    heavy = wrap_probability(12, 20, 50.0, 20.0, 10**6, mechanism="skellam")
    assert 0 < gaussian < heavy
    room, variance = 2048 - 1000, 20 * 400.0
    lowest = min(exp(variance * (cosh(t) - 1) - t * room) for t in np.linspace(0.01, 0.3, 10_000))
    assert heavy == pytest.approx(2e6 * lowest, rel=1e-4)


def test_the_smallest_modulus_meets_the_target_and_one_bit_less_does_not():
    for mechanism in ("discrete_gaussian", "skellam"):
        bits = smallest_modulus_bits(20, 2.0**12, 2.0**10, 10**6, mechanism=mechanism)
        assert wrap_probability(bits, 20, 2.0**12, 2.0**10, 10**6, mechanism=mechanism) < WRAP_TARGET
        assert wrap_probability(bits - 1, 20, 2.0**12, 2.0**10, 10**6, mechanism=mechanism) >= WRAP_TARGET


# Rounding: the sensitivity

values = st.floats(-3, 3, width=32) | st.sampled_from([0.0, 1e20, -1e30, float("nan"), inf, -inf])


@given(row=st.lists(values, min_size=12, max_size=12), grid=st.sampled_from([0.5, 0.11, 2.0**-10]), seed=st.integers(0))
def test_a_client_moves_the_noiseless_sum_by_at_most_the_bound(row, grid, seed):
    """Zero-out: the difference between a client's row and zero is its row; whatever it holds, D steps at most."""
    codec = replace(CODEC, grid=grid, noise_multiplier=30.0)
    steps = noiseless(codec, torch.tensor(row), seed % 2**32)
    assert int((steps**2).sum()) <= codec.bound(12) ** 2
    assert steps.dtype == np.int64
    assert codec.norm_bound(inf, 12) == grid * codec.bound(12)


# 16 coordinates of 10.5 steps, a row of 42. Rounding adds 4 to its squared length, give or take 42; D^2 allows 48.
WIDEST, HALVES = replace(CODEC, grid=1 / 42), torch.full((16,), 10.5 / 42, dtype=torch.float64)


def test_rounding_that_is_not_redrawn_breaks_the_bound():
    """The negative control: one such rounding in seven is longer than D; of ours none."""
    most = WIDEST.bound(16) ** 2
    assert most == pytest.approx(42**2 + 4 + 42 + 2)
    draws = np.random.Generator(np.random.PCG64(1)).random((1000, 16))
    assert 0.08 < ((np.floor(10.5 + draws) ** 2).sum(1) > most).mean() < 0.25
    assert all((noiseless(WIDEST, HALVES, seed) ** 2).sum() <= most for seed in range(300))


def test_rounding_is_redrawn_and_rarely():
    """As often as the widest spread makes it, and never for a row that lies on the grid."""
    asked, generator = [], Generator().manual_seed(1)

    def counted(count):
        asked.append(count)
        return words("seeded", generator)(count)

    for _ in range(300):
        WIDEST.rounded(HALVES, counted)
    assert 300 * 1.08 < len(asked) < 300 * 1.4
    asked.clear()
    WIDEST.rounded(torch.full((16,), 10 / 42, dtype=torch.float64), counted)
    assert len(asked) == 1


@pytest.mark.parametrize("value", [0.2, -0.7, 0.5])
def test_rounding_is_unbiased_where_nothing_is_redrawn(value):
    """Steps of a long row of the same value: to the nearest two whole numbers, with the right mean."""
    codec = replace(CODEC, max_grad_norm=1000.0, grid=1.0, noise_multiplier=0.1)
    steps = noiseless(codec, torch.full((100_000,), value))
    assert set(steps.tolist()) == {floor(value), ceil(value)}
    share = value - floor(value)
    assert abs(steps.mean() - value) < 5 * sqrt(share * (1 - share) / 100_000)


def test_a_row_that_is_too_long_is_clipped_in_float64():
    row = torch.tensor([30.0, 40.0])
    assert np.abs(noiseless(CODEC, row) - np.array([0.6, 0.8]) * 2**10).max() <= 1
    assert noiseless(CODEC, torch.tensor([3e38, 3e38])).tolist() == pytest.approx([724.07] * 2, abs=1)


def test_a_short_row_keeps_its_length():
    assert noiseless(CODEC, torch.tensor([0.25, -0.5])).tolist() == [256, -512]


@pytest.mark.parametrize("value", [float("nan"), inf, -inf])
def test_a_row_that_is_not_finite_is_zero_and_still_noised(value):
    row = torch.tensor([0.1, value, 0.3])
    assert noiseless(CODEC, row).tolist() == [0, 0, 0]
    encoded, _ = CODEC.encode(row[None].expand(1, 3), {}, generators(1))
    assert bool(encoded.rows.isfinite().all()) and bool(encoded.rows.any())


# Encoding and decoding


def test_the_wire_carries_whole_numbers_in_the_modulus():
    rows = torch.randn(3, 500, generator=Generator().manual_seed(1))
    encoded, state = CODEC.encode(rows, {}, generators(3))
    assert encoded.rows.dtype == torch.float64 and encoded.side == {} and state == {}
    assert torch.equal(encoded.rows, encoded.rows.round())
    assert float(encoded.rows.abs().max()) <= CODEC.modulus / 2
    assert CODEC.width(500) == 500


def test_decoding_a_sum_modulo_m_is_the_sum_of_the_decodings():
    """Exactly, in whole steps: against Python integers, for rows that wrap and rows that do not."""
    generator = np.random.Generator(np.random.PCG64(1))
    m = CODEC.modulus
    wire = generator.integers(-m // 2, m // 2, (6, 400))
    decoded = CODEC.decode(Encoded(torch.from_numpy(wire.sum(0, keepdims=True)).double(), {}), 400)
    for got, column in zip(decoded[0].tolist(), wire.T, strict=True):
        whole = sum(int(value) for value in column)
        centred = (whole + m // 2) % m - m // 2
        assert Fraction(got) == Fraction(centred) / 2**10  # 18 bits: float32 holds them
    assert decoded.dtype == torch.float32


def test_encoding_is_rounding_plus_one_share_modulo_m():
    """A modulus that wraps all the time still gives the sum modulo m: reduction is outside of the noise."""
    rows = torch.randn(2, 300, generator=Generator().manual_seed(2))
    wide = CODEC.encode(rows, {}, generators(2))[0].rows
    narrow = replace(CODEC, clients=4, modulus_bits=14)
    encoded = narrow.encode(rows, {}, generators(2))[0].rows
    assert torch.equal((wide - encoded).remainder(2.0**14), torch.zeros_like(wide))
    assert encoded.min() >= -(2**13) and encoded.max() < 2**13


def shares(codec, d=20_000, count=4):
    """The sum of the noise of `count` clients whose data is zero, in units of the stated deviation of one share."""
    encoded, _ = codec.encode(torch.zeros(count, d), {}, generators(count))
    assert float(encoded.rows.abs().max()) < codec.modulus / 2 - 1  # nothing wrapped
    return encoded.rows.sum(0).numpy()


@pytest.mark.parametrize("mechanism", ["discrete_gaussian", "skellam"])
def test_the_floors_shares_make_the_noise_of_the_plan_and_no_other(mechanism):
    codec = replace(CODEC, mechanism=mechanism, modulus_bits=24)
    deviation = codec.bound(20_000)  # noise multiplier 1
    assert codec.share(20_000) * sqrt(4) == pytest.approx(deviation)
    total = shares(codec)
    assert stats.kstest(total / deviation, "norm").pvalue > SIGNIFICANCE
    for wrong in (0.5, 0.9, 1.1, 2.0):
        noisy = shares(replace(codec, noise_multiplier=wrong))
        assert stats.kstest(noisy / deviation, "norm").pvalue < SIGNIFICANCE


def test_narrow_shares_are_discrete_gaussians():
    """Chi-square of single shares at two steps, where the continuous distribution would not do."""
    codec = DistributedNoise(1.0, 1 / 64, 1 / 32, survivors=1, clients=2, modulus_bits=16)
    d = 10
    share = codec.share(d)
    assert 2 < share < 2.1
    drawn = np.concatenate([codec.encode(torch.zeros(50, d), {}, generators(50, 1000 * i))[0].rows for i in range(40)])
    k = np.arange(-9, 10)
    mass = np.exp(-(k**2) / (2 * share**2))
    observed = np.array([(drawn == i).sum() for i in k])
    fits = stats.chisquare(observed, observed.sum() * mass / mass.sum()).pvalue
    assert fits > SIGNIFICANCE
    wrong = np.exp(-(k**2) / (2 * (1.1 * share) ** 2))
    assert stats.chisquare(observed, observed.sum() * wrong / wrong.sum()).pvalue < SIGNIFICANCE


def test_the_noise_does_not_depend_on_the_data():
    """One rounding draw each: two rows differ by their rounded values and nothing else, however they were rounded."""
    zero, other = torch.zeros(1, 50), torch.full((1, 50), 2.0**-4)  # 64 steps: exactly on the grid
    plain = CODEC.encode(zero, {}, generators(1))[0].rows
    moved = CODEC.encode(other, {}, generators(1))[0].rows
    assert torch.equal(moved - plain, torch.full((1, 50), 64.0, dtype=torch.float64))


def test_a_decoded_sum_is_the_sum_of_the_updates_plus_noise():
    d, count = 5000, 4
    rows = torch.randn(count, d, generator=Generator().manual_seed(4))
    rows /= rows.norm(dim=1, keepdim=True)
    encoded, _ = CODEC.encode(rows, {}, generators(count))
    total = Intake(CODEC, d, Reveals.SUM).total(encoded.rows.sum(0))
    off = (total - rows.sum(0)) / (CODEC.grid * CODEC.bound(d))
    assert stats.kstest(off.numpy(), "norm").pvalue > SIGNIFICANCE


def test_row_by_row_equals_batched_and_inputs_stay(untouched_random_state):
    rows = torch.randn(4, 30, generator=Generator().manual_seed(5))
    before = rows.clone()
    batch = CODEC.encode(rows, {}, generators(4))[0].rows
    for i in range(4):
        alone = CODEC.encode(rows[i : i + 1], {}, generators(4)[i : i + 1])[0].rows
        assert torch.equal(alone[0], batch[i])
    assert torch.equal(rows, before)
    assert CODEC.encode(torch.zeros(0, 30), {}, [])[0].rows.shape == (0, 30)


def test_secure_noise_leaves_the_generators_alone():
    codec, given_ = replace(CODEC, source="secure"), generators(1)
    before = given_[0].get_state()
    first, second = (codec.encode(torch.zeros(1, 40), {}, given_)[0].rows for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(given_[0].get_state(), before)


def test_what_it_says_of_itself():
    assert (CODEC.binding, CODEC.additive, CODEC.integers, CODEC.similarity) == (True, True, True, None)


# CKKS


def test_ckks_carries_every_step_exactly():
    """Encoded rows are whole steps of the channel's grid, to the ends of the modulus."""
    small = replace(CODEC, modulus_bits=17)
    channel = small.channel(smallest_release=4)
    assert channel.step == 1.0 and channel.bound == 2.0**16 and channel.clients == 6
    row = torch.tensor([-(2.0**16), 2.0**16 - 1, 0.0, 12345.0, -1.0], dtype=torch.float64)
    assert channel.steps(row).tolist() == row.tolist()
    encoded = small.encode(torch.randn(1, 300, generator=Generator().manual_seed(1)), {}, generators(1))[0].rows[0]
    assert channel.steps(encoded).tolist() == encoded.tolist()


@pytest.mark.parametrize(("modulus_bits", "noise_multiplier"), [(15, 8.0), (30, 2.0**19)])
def test_a_sum_over_ckks_is_the_sum_modulo_m(modulus_bits, noise_multiplier):
    """The whole way, encrypted: what the view decodes is what integers give, to the last step, beyond 2^24 too."""
    codec = replace(CODEC, modulus_bits=modulus_bits, noise_multiplier=noise_multiplier)  # so much that sums wrap
    half = codec.modulus // 2
    channel, d = codec.channel(smallest_release=4), 60
    rows = torch.randn(5, d, generator=Generator().manual_seed(1))
    encoded = codec.encode(rows, {}, generators(5))[0].rows
    memories = {party: {} for party in [*range(5), -1]}

    identities = {party: new_identity() for party in [*range(5), KEY_HOLDER, SERVER]}

    def party_of(number):
        return Party(number, 0, identities[number], lambda other: public_identity(identities[other]))

    class Line:
        server = party_of(SERVER)

        def __call__(self, stage, requests):
            for party, request in requests.items():
                given_ = encoded[party : party + 1] if party >= 0 else None
                memories[party], reply = channel.answer(
                    party_of(party), stage, memories[party], request, lambda rows=given_: Encoded(rows, {})
                )
                yield party, reply

    view = channel.collect(range(5), Intake(codec, d, Reveals.SUM), Line())
    whole = [int(value) for value in encoded.sum(0).tolist()]
    centred = [(value + half) % codec.modulus - half for value in whole]
    assert centred != whole
    assert torch.equal(view.total(), (torch.tensor(centred, dtype=torch.float64) / 2**10).float())


def test_a_channel_that_does_not_fit_is_refused():
    with pytest.raises(InvalidArgument, match="lower bits"):
        replace(CODEC, clients=200, modulus_bits=45).channel(smallest_release=4)
    with pytest.raises(InvalidArgument, match="smallest_release="):
        CODEC.channel(smallest_release=3)


# Bad input


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"max_grad_norm": 0.0}, "max_grad_norm="),
        ({"grid": float("nan")}, "grid="),
        ({"grid": -1.0}, "grid="),
        ({"grid": 2.0**-31}, "coarser grid"),
        ({"noise_multiplier": 0.0}, "noise_multiplier="),
        ({"noise_multiplier": 1e-3}, "finer grid"),
        ({"survivors": 0}, "survivors="),
        ({"survivors": 7}, "clients=6"),
        ({"clients": 0}, "clients="),
        ({"modulus_bits": 13}, "smallest_modulus_bits"),
        ({"modulus_bits": 1}, "modulus_bits="),
        ({"modulus_bits": 52}, "float64"),
        ({"mechanism": "gauss"}, "mechanism="),
        ({"source": "random"}, "source="),
        ({"mechanism": "skellam", "source": "secure"}, "untrue"),
    ],
    ids=str,
)
def test_what_cannot_be_promised_is_refused(change, match):
    with pytest.raises(InvalidArgument, match=match):
        replace(CODEC, **change)


def test_the_probability_of_wrapping_is_for_the_largest_sum():
    expected = wrap_probability(18, 6, 2.0**10, CODEC.share(1000), 1000)
    assert CODEC.wrap_probability(1000) == expected < WRAP_TARGET
    assert replace(CODEC, modulus_bits=14).wrap_probability(1000) > WRAP_TARGET
