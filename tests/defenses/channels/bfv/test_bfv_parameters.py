"""The ring is proved, not tried: head-room, noise, security, each with the case that must fail."""

import math

import numpy as np
import pytest
import tenseal as ts
import tenseal.sealapi as sealapi
from hypothesis import given
from hypothesis import strategies as st

from privfm.checks import InvalidArgument
from privfm.defenses.channels.bfv.parameters import (
    BFVParameters,
    coefficient_primes,
    is_prime,
    largest_sum,
    levels,
    noise_bound,
)
from privfm.defenses.channels.ckks.parameters import LARGEST_MODULUS

# (clients, bits, degree, data primes, bits of the plain modulus)
CHOSEN = [
    (2, 1, 2048, (32,), 14),
    (10, 8, 2048, (32,), 14),
    (200, 4, 2048, (33,), 14),
    (200, 5, 2048, (34,), 16),
    (10, 19, 4096, (39,), 24),
    (200, 19, 4096, (48,), 28),
    (200, 31, 4096, (60,), 40),
    (1000, 31, 4096, (32, 32), 42),
    (200, 44, 4096, (32, 41), 53),
    (2**24, 29, 8192, (32, 60), 55),
]
each_choice = pytest.mark.parametrize(("clients", "bits", "degree", "primes", "plain"), CHOSEN)


def context_of(degree, chain, plain_modulus):
    kind = ts.SCHEME_TYPE.BFV
    return ts.context(kind, degree, plain_modulus=plain_modulus, coeff_mod_bit_sizes=list(chain), n_threads=1)


def budget(context, vector):
    """Bits of noise budget that are left: -log2 of twice the noise t |v| / q, rounded down."""
    decryptor = sealapi.Decryptor(context.seal_context().data, context.secret_key().data)
    return min(decryptor.invariant_noise_budget(ciphertext) for ciphertext in vector.ciphertext())


@each_choice
def test_the_cheapest_ring(clients, bits, degree, primes, plain):
    chosen = BFVParameters.smallest(clients, bits)
    assert (chosen.degree, chosen.data_primes, chosen.plain_modulus.bit_length()) == (degree, primes, plain)
    assert sum(chosen.chain) <= LARGEST_MODULUS[degree]
    assert chosen.slots == degree
    assert chosen.levels >= 2 ** (bits + 1) + 1


@each_choice
def test_seal_takes_the_primes_that_were_proved(clients, bits, degree, primes, plain):
    chosen = BFVParameters.smallest(clients, bits)
    ring = context_of(degree, chosen.chain, chosen.plain_modulus).seal_context().data.key_context_data().parms()
    assert tuple(prime.value() for prime in ring.coeff_modulus()) == coefficient_primes(degree, chosen.chain)
    travelling = math.prod(prime.value() for prime in ring.coeff_modulus()[:-1])
    assert travelling == chosen.modulus
    assert ring.plain_modulus().value() == chosen.plain_modulus
    assert 2 * chosen.plain_modulus * noise_bound(degree, clients) < travelling
    assert 2 * clients * 2**bits < chosen.plain_modulus


@pytest.mark.parametrize(("clients", "bits"), [(200, 4), (10, 14), (10, 19), (200, 19), (200, 31)])
def test_one_bit_less_does_not_hold(clients, bits):
    chosen = BFVParameters.smallest(clients, bits)
    with pytest.raises(InvalidArgument, match="drown"):
        BFVParameters(chosen.degree, (chosen.data_primes[0] - 1,), chosen.plain_modulus, clients, bits)


def test_the_noise_bound_by_hand():
    # n = 4096: special prime 126 * 8192 + 1; one client and the two zeros of our own
    assert coefficient_primes(4096, (20,)) == (1032193,)
    fresh = 21 * 8193 / 1032193 + 4097 / 2 + 1
    assert float(noise_bound(4096, 1)) == pytest.approx(3 * fresh + 1, rel=1e-12)


@pytest.mark.parametrize(("degree", "data", "plain"), [(2048, 33, 12289), (4096, 39, 40961), (8192, 48, 65537)])
@pytest.mark.parametrize("n", [1, 50])
def test_measured_noise_stays_below_the_bound_and_not_by_far(degree, data, plain, n):
    """In bits of SEAL's own noise budget: the bound is a worst case; random noise lies 4 to 10 bits below it."""
    context = context_of(degree, (data, 20), plain)
    generator = np.random.default_rng(degree + n)
    values = generator.integers(-plain // 2 // n + 1, plain // 2 // n, (n, degree))
    total = ts.bfv_vector(context, values[0])
    for row in values[1:]:
        total.add_(ts.bfv_vector(context, row))
    assert np.array_equal(total.decrypt(), values.sum(0))
    bound = math.floor(math.log2(coefficient_primes(degree, (data,))[0] / (2 * plain * float(noise_bound(degree, n)))))
    assert bound + 3 <= budget(context, total) <= bound + 10


def test_without_room_for_its_noise_a_sum_is_wrong():
    """Negative control: what the bound is there to prevent. The ring is refused, SEAL takes it and computes garbage."""
    plain, chain = 67153921, (32, 20)  # 27 bits, which leaves 5 for the noise of 64 encryptions
    with pytest.raises(InvalidArgument, match="drown"):
        BFVParameters(2048, (32,), plain, 64, 14)
    context = context_of(2048, chain, plain)
    total = ts.bfv_vector(context, [0] * 2048)
    for _ in range(64):
        total.add_(ts.bfv_vector(context, [1] * 2048))
    assert budget(context, total) == 0
    assert np.mean(np.asarray(total.decrypt()) != 64) > 0.5


def test_a_sum_beyond_half_the_plain_modulus_wraps():
    """Negative control for head-room: SEAL says nothing."""
    context = context_of(2048, (33, 20), 12289)
    assert (ts.bfv_vector(context, [6144, -6144]) + ts.bfv_vector(context, [1, -1])).decrypt() == [-6144, 6144]


def test_levels_at_200_clients():
    # t = 1032193 (20 bits, n = 4096) and t = 12289 (n = 2048)
    assert (levels(1032193, 200), levels(12289, 200)) == (5159, 59)
    assert largest_sum(200, 4) <= 12289 // 2 < largest_sum(200, 5)


@given(st.integers(1, 2000), st.integers(0, 40))
def test_whatever_is_chosen_holds(clients, bits):
    chosen = BFVParameters.smallest(clients, bits)  # its constructor proves the rest
    assert 2 * clients * 2**bits < chosen.plain_modulus
    assert chosen.plain_modulus % (2 * chosen.degree) == 1
    assert chosen.plain_modulus not in coefficient_primes(chosen.degree, chosen.chain)


def test_a_plain_modulus_that_is_a_coefficient_prime_is_passed_over():
    """1032193, the smallest with 4096 slots above 2 * 15 * (2^15 + 1), is the special prime: SEAL refuses it."""
    chosen = BFVParameters.smallest(15, 15)
    assert 2 * largest_sum(15, 15) < 1032193 < chosen.plain_modulus == 1073153
    with pytest.raises(ValueError, match="parameters"):
        context_of(chosen.degree, chosen.chain, 1032193)
    context_of(chosen.degree, chosen.chain, chosen.plain_modulus)


@given(st.integers(0, 3000))
def test_primes_are_those_of_the_sieve(number):
    assert is_prime(number) == (number > 1 and all(number % i for i in range(2, math.isqrt(number) + 1)))


@pytest.mark.parametrize(
    ("number", "prime"),
    [
        (3215031751, False),  # strong pseudoprime to 2, 3, 5, 7 (Pomerance, Selfridge, Wagstaff, 1980)
        (3825123056546413051, False),  # and to the first nine primes (Jaeschke, 1993)
        (2**61 - 1, True),
        (2**60 - 2**14 + 1, True),  # the largest below 2^60 that is 1 modulo 2^14
        ((2**31 - 1) ** 2, False),
    ],
)
def test_pseudoprimes_are_found(number, prime):
    assert is_prime(number) == prime


@pytest.mark.parametrize(("clients", "bits"), [(10, 8), (200, 4), (10, 19), (200, 19), (200, 31), (1000, 31)])
def test_bytes_a_parameter_are_as_stated(clients, bits):
    chosen = BFVParameters.smallest(clients, bits)
    context = context_of(chosen.degree, chosen.chain, chosen.plain_modulus)
    values = np.random.default_rng(0).integers(-(2**bits), 2**bits + 1, chosen.slots)
    measured = np.mean([len(ts.bfv_vector(context, values).serialize()) for _ in range(3)]) / chosen.slots
    assert measured == pytest.approx(chosen.bytes_a_parameter, rel=0.04)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        pytest.param({"data_primes": (47,)}, "drown", id="one bit too few"),
        pytest.param({"data_primes": (60, 60)}, "128-bit security", id="too large a modulus"),
        pytest.param({"degree": 2048}, "128-bit security", id="too small a ring"),
        pytest.param({"degree": 5000}, "128-bit security", id="no ring"),
        pytest.param({"data_primes": (31, 40)}, "32 to 60 bits", id="too small a prime"),
        pytest.param({"data_primes": (61,)}, "32 to 60 bits", id="too large a prime"),
        pytest.param({"data_primes": ()}, "32 to 60 bits", id="no prime"),
        pytest.param({"plain_modulus": 40961}, "no head-room", id="too small a plain modulus"),
        pytest.param({"plain_modulus": 2**28 + 1}, "expected a prime", id="no prime plain modulus"),
        pytest.param({"plain_modulus": 65539}, "1 modulo 8192", id="no slots"),
        pytest.param({"plain_modulus": 1032193}, "not in the chain", id="a coefficient prime"),
        pytest.param({"clients": 400}, "no head-room", id="twice the clients"),
        pytest.param({"bits": 20}, "no head-room", id="twice the range"),
        pytest.param({"clients": 0}, "clients=0", id="nobody"),
        pytest.param({"bits": -1}, "bits=-1", id="no range"),
    ],
)
def test_a_wrong_ring_is_refused(fields, message):
    good = BFVParameters.smallest(200, 19)
    names = ("degree", "data_primes", "plain_modulus", "clients", "bits")
    with pytest.raises(InvalidArgument, match=message):
        BFVParameters(**{name: getattr(good, name) for name in names} | fields)


@pytest.mark.parametrize(("clients", "bits"), [(100, 47), (2**20, 34), (2, 10_000)])
def test_a_sum_beyond_double_precision_is_refused(clients, bits):
    with pytest.raises(InvalidArgument, match="float64 holds; lower bits"):
        BFVParameters.smallest(clients, bits)


def test_a_sum_that_no_ring_holds_is_refused():
    with pytest.raises(InvalidArgument, match="no ring up to 8192 holds this sum; lower bits"):
        BFVParameters.smallest(2**53, 0)
