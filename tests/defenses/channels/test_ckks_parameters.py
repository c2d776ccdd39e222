"""The ring is proved, not tried: head-room, resolution, security, each with the case that must fail."""

import math

import numpy as np
import pytest
import tenseal as ts
import tenseal.sealapi  # registers the types of the ring's parameters

from privfm.checks import InvalidArgument
from privfm.defenses.channels.ckks_parameters import (
    LARGEST_MODULUS,
    MARGIN,
    CKKSParameters,
    data_bits,
    lowest_scale,
    noise_deviation,
)

SIZES = [(2, 8), (10, 12), (2, 31), (100, 31), (200, 31), (1000, 31), (128, 24), (100, 37)]


def context_of(parameters):
    chain = list(parameters.chain)
    context = ts.context(ts.SCHEME_TYPE.CKKS, parameters.degree, coeff_mod_bit_sizes=chain, n_threads=1)
    context.global_scale = parameters.scale
    return context


def test_the_table_of_the_standard():
    # Homomorphic Encryption Security Standard 2018, table 1: 128 bits, classical, ternary secret
    assert LARGEST_MODULUS == {2048: 54, 4096: 109, 8192: 218}


@pytest.mark.parametrize(("clients", "bits"), SIZES)
def test_the_real_primes_leave_the_head_room_that_was_proved(clients, bits):
    parameters = CKKSParameters.smallest(clients, bits)
    ring = context_of(parameters).seal_context().data.first_context_data().parms()
    modulus = math.prod(prime.value() for prime in ring.coeff_modulus())
    noise = MARGIN * noise_deviation(parameters.degree, clients + 2)
    assert clients * parameters.scale + noise < modulus / 2
    assert sum(parameters.chain) <= LARGEST_MODULUS[parameters.degree]
    assert 2**bits * noise <= parameters.scale / 2


@pytest.mark.parametrize(("clients", "bits"), SIZES)
def test_no_bit_is_wasted(clients, bits):
    parameters = CKKSParameters.smallest(clients, bits)
    needed = data_bits(lowest_scale(parameters.degree, clients, bits), clients)
    assert sum(parameters.data_primes) == max(needed, 30)


def test_the_usual_size_fits_one_prime_of_4096():
    assert CKKSParameters.smallest(100, 31).chain == (59, 20)
    assert CKKSParameters.smallest(100, 31).degree == 4096
    assert CKKSParameters.smallest(200, 31).chain == (60, 20)
    assert len(CKKSParameters.smallest(300, 31).data_primes) == 2


@pytest.mark.parametrize("degree", LARGEST_MODULUS)
def test_the_predicted_noise_is_the_measured_noise(degree):
    scale = 2.0**22
    context = ts.context(ts.SCHEME_TYPE.CKKS, degree, coeff_mod_bit_sizes=[32, 20], n_threads=1)
    context.global_scale = scale
    values = np.random.default_rng(0).uniform(-1, 1, degree // 2)
    errors = np.concatenate([np.asarray(ts.ckks_vector(context, values).decrypt()) - values for _ in range(16)])
    ratio = errors.std() * scale / noise_deviation(degree, 1)
    assert 0.85 < ratio < 1.15  # the key's own spread; half or double the noise is far outside
    assert np.abs(errors).max() * scale < MARGIN / 4 * noise_deviation(degree, 1)


def test_noise_of_a_sum_grows_with_the_root():
    assert noise_deviation(4096, 100) == pytest.approx(10 * noise_deviation(4096, 1))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        pytest.param({"data_primes": (58,)}, "no head-room.*needs 59 bits", id="one bit too few"),
        pytest.param({"scale": 2.0**51.7}, "no head-room", id="too large a scale"),
        pytest.param({"clients": 200}, "no head-room", id="twice the clients"),
        pytest.param({"scale": 2.0**49.7}, "drowns", id="half the scale"),
        pytest.param({"bits": 32}, "drowns", id="a finer grid"),
        pytest.param({"data_primes": (60, 60)}, "128-bit security", id="too large a modulus"),
        pytest.param({"degree": 2048}, "128-bit security", id="too small a ring"),
        pytest.param({"degree": 5000}, "128-bit security", id="no ring"),
        pytest.param({"data_primes": (29, 30)}, "30 to 60 bits", id="too small a prime"),
        pytest.param({"data_primes": (61,)}, "30 to 60 bits", id="too large a prime"),
        pytest.param({"clients": 0}, "clients=0", id="nobody"),
        pytest.param({"bits": 0}, "bits=0", id="no resolution"),
    ],
)
def test_a_wrong_ring_is_refused(fields, message):
    good = CKKSParameters.smallest(100, 31)
    values = {name: getattr(good, name) for name in ("degree", "data_primes", "scale", "clients", "bits")} | fields
    with pytest.raises(InvalidArgument, match=message):
        CKKSParameters(**values)


@pytest.mark.parametrize(("clients", "bits"), [(100, 40), (2**20, 31), (2, 10_000)])
def test_a_sum_beyond_double_precision_is_refused(clients, bits):
    with pytest.raises(InvalidArgument, match="double precision"):
        CKKSParameters.smallest(clients, bits)
