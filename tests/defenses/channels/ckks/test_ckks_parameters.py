"""The ring is proved, not tried: head-room, resolution, security, each with the case that must fail."""

import math

import numpy as np
import pytest
import tenseal as ts
import tenseal.sealapi as seal

from privfm.checks import InvalidArgument
from privfm.defenses.channels.ckks.ciphertexts import Ring, coefficients_of, new_keys, slots_of
from privfm.defenses.channels.ckks.parameters import (
    LARGEST_MODULUS,
    LARGEST_WIDTH,
    MARGIN,
    CKKSParameters,
    data_bits,
    highest_scale,
    lowest_scale,
    noise_deviation,
)

SIZES = [(2, 8), (10, 12), (2, 31), (100, 31), (200, 31), (1000, 31), (128, 24), (100, 37)]


def context_of(parameters):
    chain = list(parameters.chain)
    context = ts.context(ts.SCHEME_TYPE.CKKS, parameters.degree, coeff_mod_bit_sizes=chain, n_threads=1)
    context.global_scale = parameters.scale
    return context


def secret_ring(parameters):
    return Ring(new_keys(parameters)[1], parameters, secret=True)


def errors_of(ring, values, count):
    """What `count` encryptions of the same values lose, in units of the bound."""
    return np.concatenate([ring.decrypted(ring.encrypted(values)) - values for _ in range(count)])


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
    assert CKKSParameters.smallest(100, 31).chain == (52, 20)
    assert CKKSParameters.smallest(100, 31).degree == 4096
    assert CKKSParameters.smallest(10, 31).bytes_a_number == 12
    assert CKKSParameters.smallest(1000, 31).bytes_a_number == 16
    assert len(CKKSParameters.smallest(8000, 31).data_primes) == 2


@pytest.mark.parametrize("degree", LARGEST_MODULUS)
def test_the_predicted_noise_is_the_measured_noise(degree):
    ring = secret_ring(CKKSParameters(degree, (32,), 2.0**22, clients=4))
    values = np.random.default_rng(0).uniform(-1, 1, degree)
    errors = errors_of(ring, values, 16) * ring.parameters.scale
    ratio = errors.std() / noise_deviation(degree, 1)
    assert 0.85 < ratio < 1.15  # the key's own spread; half or double the noise is far outside
    assert np.abs(errors).max() < MARGIN / 4 * noise_deviation(degree, 1)
    assert np.abs(errors).max() < 7 * errors.std()  # Gaussian tails


def test_noise_of_a_sum_grows_with_the_root():
    assert noise_deviation(4096, 100) == pytest.approx(10 * noise_deviation(4096, 1))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        pytest.param({"data_primes": (51,)}, "no head-room.*needs 52 bits", id="one bit too few"),
        pytest.param({"scale": 2.0**44.8}, "no head-room", id="too large a scale"),
        pytest.param({"clients": 200}, "no head-room", id="twice the clients"),
        pytest.param({"scale": 2.0**43.2}, "drowns", id="half the scale"),
        pytest.param({"bits": 32}, "drowns", id="a finer grid"),
        pytest.param({"data_primes": (60, 60)}, "128-bit security", id="too large a modulus"),
        pytest.param({"degree": 2048}, "128-bit security", id="too small a ring"),
        pytest.param({"degree": 5000}, "128-bit security", id="no ring"),
        pytest.param({"data_primes": (29, 30)}, "30 to 60 bits", id="too small a prime"),
        pytest.param({"data_primes": (61,)}, "30 to 60 bits", id="too large a prime"),
        pytest.param({"clients": 0}, "clients=0", id="nobody"),
        pytest.param({"bits": -1}, "bits=-1", id="negative resolution"),
        pytest.param({"special_prime": 19}, "special_prime=19", id="keys without a margin"),
        pytest.param({"scale": float("nan")}, "scale=nan", id="no scale"),
        pytest.param({"depth": 1}, "depth=1", id="no prime to spend"),
        pytest.param({"depth": 2}, "depth=2", id="too deep"),
    ],
)
def test_a_wrong_ring_is_refused(fields, message):
    good = CKKSParameters.smallest(100, 31)
    assert (good.data_primes, round(math.log2(good.scale), 1)) == ((52,), 44.3)
    values = {name: getattr(good, name) for name in ("degree", "data_primes", "scale", "clients", "bits")} | fields
    with pytest.raises(InvalidArgument, match=message):
        CKKSParameters(**values)


@pytest.mark.parametrize(("clients", "bits"), [(100, 40), (2**20, 31), (2, 10_000)])
def test_a_sum_beyond_double_precision_is_refused(clients, bits):
    with pytest.raises(InvalidArgument, match="double precision"):
        CKKSParameters.smallest(clients, bits)


def test_a_grid_needs_bits():
    with pytest.raises(InvalidArgument, match="bits=0"):
        CKKSParameters.smallest(10, 0)


# Head-room, attained


@pytest.mark.parametrize(("added", "holds"), [(20, True), (21, False)])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_head_room_is_enough_and_not_for_one_client_more(added, holds, sign):
    parameters = CKKSParameters.cheapest(20, 1e-4)
    assert parameters.scale == highest_scale(4096, (32,), 20)
    ring, values = secret_ring(parameters), np.full(4096, float(sign))
    own = ring.encrypted(np.zeros(1))
    for _ in range(added):
        ring.add(own, ring.encrypted(values))
    assert (np.abs(ring.decrypted(own) - added * values).max() < 0.01) == holds


# Sums within an error


@pytest.mark.parametrize(
    ("arguments", "degree", "chain"),
    [
        ({"clients": 10, "error": 1e-4}, 4096, (32, 20)),
        ({"clients": 450, "error": 1e-6}, 2048, (32, 20)),
        ({"clients": 1000, "error": 1e-6}, 4096, (40, 20)),
        ({"clients": 10, "error": 1e-3, "release": "public"}, 4096, (56, 20)),
        ({"clients": 10, "error": 1e-4, "release": "public"}, 4096, (60, 20)),
        ({"clients": 1000, "error": 1e-4, "release": "public"}, 4096, (32, 32, 20)),
        ({"clients": 100, "error": 1e-4, "depth": 1}, 8192, (60, 60, 60)),
        ({"clients": 100, "error": 1e-4, "depth": 2}, 8192, (60, 40, 40, 60)),
    ],
    ids=str,
)
def test_the_cheapest_ring(arguments, degree, chain):
    found = CKKSParameters.cheapest(**arguments)
    assert (found.degree, found.chain) == (degree, chain)
    assert found.largest_error(arguments.get("release", "clients")) <= arguments["error"]
    assert sum(chain) <= LARGEST_MODULUS[degree]
    modulus = math.prod(
        prime.value() for prime in context_of(found).seal_context().data.first_context_data().parms().coeff_modulus()
    )
    noise = MARGIN * noise_deviation(degree, found.clients + 2)
    assert found.clients * found.scale + noise < modulus / 2


def test_products_have_the_scale_of_their_primes():
    found = CKKSParameters.cheapest(10, 1e-4, depth=2)
    assert (found.scale, found.numbers, found.bytes_a_number, sum(found.chain)) == (2.0**40, 8192, 36, 200)
    assert CKKSParameters.cheapest(10, 0.1, depth=2, release="public").chain == (60, 50, 50, 58)
    assert CKKSParameters.cheapest(10, 1e-4, depth=1).scale == 2.0**50


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"error": 1e-6, "release": "public"}, "no ring up to 8192 comes below"),  # double precision is the floor
        ({"error": 1e-4, "release": "public", "depth": 2}, "no ring up to 8192 comes below"),
        ({"error": 1e-20}, "or take an exact grid"),
        ({"error": 0.0}, "error=0.0"),
        ({"error": 1.0, "release": "server"}, "release='server'"),
        ({"error": 1.0, "depth": 3}, "depth=3"),
    ],
    ids=str,
)
def test_what_no_ring_can_do_is_refused(arguments, message):
    with pytest.raises(InvalidArgument, match=message):
        CKKSParameters.cheapest(10, **arguments)


@pytest.mark.parametrize("clients", [2, 10, 200])
def test_no_ring_of_2048_is_taken_for_a_flooded_release(clients):
    """Its 54 bits leave a scale at which flooding is larger than the bound itself."""
    small = CKKSParameters(2048, (32,), highest_scale(2048, (32,), clients), clients)
    assert small.largest_error("public") > 1
    assert CKKSParameters.cheapest(clients, 1.0, release="public").degree > 2048


def test_the_error_of_a_full_sum_is_as_stated():
    """Deviation within the key's spread; the largest of 82,000 below the bound and within twice of it."""
    parameters = CKKSParameters.cheapest(10, 1e-4)
    values, found = np.random.default_rng(0).uniform(-1, 1, parameters.numbers), []
    for _ in range(20):  # a new key each
        ring = secret_ring(parameters)
        own = ring.encrypted(np.zeros(1))  # the server's, and the key holder's
        for row in (np.zeros(1), *[values] * 10):
            ring.add(own, ring.encrypted(row))
        found.append(ring.decrypted(own) - 10 * values)
    errors = np.concatenate(found)
    assert 0.9 < errors.std() / parameters.sum_deviation() < 1.1
    bound = 10 * parameters.largest_error("clients", errors.size)
    assert bound / 2.5 < np.abs(errors).max() < bound
    assert parameters.sum_deviation() / 10 < 1.5e-6  # of the mean, in units of the bound


def test_double_precision_loses_no_more_than_is_allowed_for():
    """Where the noise is negligible, what is left is the rounding of encoding and decoding."""
    parameters = CKKSParameters(4096, (40, 40), 2.0**76, 2)
    assert noise_deviation(4096, 4) / parameters.scale < 2.0**-64
    signs = np.random.default_rng(0).choice([-1.0, 1.0], 4096)
    assert 2.0**-52 < errors_of(secret_ring(parameters), signs, 4).std() < 2.0**-50


def test_decoding_alone_loses_half_of_that():
    """At a scale of 2^40, encoding ends in the right whole number."""
    ring = secret_ring(CKKSParameters(4096, (60,), 2.0**40, 2))
    signs, plaintext = np.random.default_rng(0).choice([-1.0, 1.0], 4096), seal.Plaintext()
    ring._encoder.encode(slots_of(signs).tolist(), 2.0**40, plaintext)
    lost = (coefficients_of(np.array(ring._encoder.decode_complex(plaintext))) - signs).std()
    assert 2.0**-53 < lost < 2.0**-51


def test_the_error_of_encoding_is_bounded_and_not_by_far():
    parameters = CKKSParameters.cheapest(10, 1e-4)
    ring, values, plaintext = secret_ring(parameters), np.random.default_rng(0).uniform(-1, 1, 4096), seal.Plaintext()
    ring._encoder.encode(slots_of(values).tolist(), parameters.scale, plaintext)
    lost = np.linalg.norm(coefficients_of(np.array(ring._encoder.decode_complex(plaintext))) - values)
    assert parameters.encoding_error(4096) / 3 < lost < parameters.encoding_error(4096)
    assert parameters.encoding_error(4 * 4096) == pytest.approx(2 * parameters.encoding_error(4096))


def test_slots_are_the_values_at_the_roots_of_unity():
    """By Horner's rule, for roots in the order of powers of three; and back."""
    values = np.random.default_rng(0).uniform(-1, 1, 16)
    slots = slots_of(values)
    for i, slot in enumerate(slots):
        root, found = np.exp(1j * np.pi * pow(3, i, 32) / 16), 0
        for value in values[::-1]:
            found = found * root + value
        assert slot == pytest.approx(found)
    np.testing.assert_allclose(coefficients_of(slots), values, atol=1e-14)


# Flooding


def test_flooding_makes_all_releases_together_as_close_as_promised():
    """Kullback-Leibler divergence of Gaussians whose means differ by the noise's norm: |e|^2 / (2 sigma^2) each."""
    parameters = CKKSParameters.cheapest(10, 1e-4, release="public")
    noise = math.hypot(noise_deviation(4096, 12) / parameters.scale, 10 * 2.0**-51)
    norm = 2 * math.sqrt(4096) * noise
    for released in (1, 245):
        sigma = parameters.flooding_deviation(released)
        assert released * norm**2 / (2 * sigma**2) == pytest.approx(2.0**-40 / 24)
    with pytest.raises(InvalidArgument, match="released=0"):
        parameters.flooding_deviation(0)


@pytest.mark.parametrize("degree", [2048, 4096])
def test_the_norm_of_a_ciphertexts_noise_stays_below_what_is_flooded(degree):
    parameters, ratios = CKKSParameters(degree, (32,), 2.0**22, clients=4), []
    for _ in range(10):
        ring = secret_ring(parameters)
        norms = np.array([np.linalg.norm(errors_of(ring, np.zeros(degree), 1)) for _ in range(4)])
        ratios.extend(norms / (noise_deviation(degree, 1) / parameters.scale * math.sqrt(degree)))
    assert 0.9 < np.mean(ratios) < 1.1
    assert np.max(ratios) < 1.3  # 2 is allowed for


def test_flooding_grows_with_the_root_of_what_is_released():
    parameters = CKKSParameters.cheapest(10, 1e-4, release="public")
    assert parameters.flooding_deviation(400) == pytest.approx(20 * parameters.flooding_deviation(1))
    assert parameters.largest_error("public", LARGEST_WIDTH) > 1.9 * parameters.largest_error(
        "public", LARGEST_WIDTH // 4
    )
