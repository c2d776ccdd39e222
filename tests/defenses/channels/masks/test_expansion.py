from secrets import token_bytes

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2

from privfm.checks import Corrupt, InvalidArgument
from privfm.defenses.channels.identities import derived
from privfm.defenses.channels.masks.expansion import (
    add_mask,
    centred,
    encoded,
    mask,
    packed,
    reduced,
    subtract_mask,
    unpacked,
    word,
)

UNLIKELY = 1e-8


def uniform(values, cells):
    """Chi-square of values in `range(cells)`; both ends are suspicious."""
    counts = np.bincount(values.astype(np.int64), minlength=cells)
    expected = len(values) / cells
    p = chi2.sf(float(((counts - expected) ** 2 / expected).sum()), cells - 1)
    return UNLIKELY < p < 1 - UNLIKELY


@pytest.mark.parametrize("bits", [8, 11, 16, 32, 33, 64])
def test_masks_are_uniform_at_both_ends(bits):
    values = mask(token_bytes(32), 1 << 16, bits).astype(np.uint64)
    assert uniform(values & np.uint64(0xFF), 256)
    assert uniform(values >> np.uint64(bits - 8), 256)


def test_the_test_of_uniformity_finds_a_small_bias():
    values = mask(token_bytes(32), 1 << 16, 8)
    values[: 1 << 11] = 7
    assert not uniform(values, 256)
    assert not uniform(mask(token_bytes(32), 1 << 16, 8) & 0xFE, 256)


def test_the_last_value_occurs():
    """A range written as `randint(0, m - 1)` would leave it out; 2^16 draws of 256 miss one with probability 1e-111."""
    values = mask(token_bytes(32), 1 << 16, 8)
    assert (values.min(), values.max()) == (0, 255)


@pytest.mark.parametrize("byte", [0, 3, 4, 15, 16, 31])
def test_every_byte_of_the_key_counts(byte):
    """A generator seeded with 32 bits of the key would give two keys the same mask, and the mask to a search."""
    key = bytearray(token_bytes(32))
    first = mask(bytes(key), 10_000, 32)
    key[byte] ^= 1
    second = mask(bytes(key), 10_000, 32)
    assert (first == second).mean() < 1e-3
    assert abs(np.corrcoef(first.astype(float), second.astype(float))[0, 1]) < 0.06  # 6 deviations of 1/100


def test_a_search_over_32_bits_does_not_find_the_mask():
    """Keys that fold to the same 32 bits: another generator's whole key space is one key's worth of this one."""
    low = token_bytes(4)
    masks = {mask(low + token_bytes(28), 4, 32).tobytes() for _ in range(200)}
    folded = {mask(low * 8, 4, 32).tobytes(), mask(low + bytes(28), 4, 32).tobytes()}
    assert len(masks) == 200 and not masks & folded


def test_the_key_stream_is_aes_in_counter_mode():
    """Block by block, in electronic code book mode, over a counter that starts at 0."""
    from cryptography.hazmat.primitives.ciphers import Cipher
    from cryptography.hazmat.primitives.ciphers.algorithms import AES
    from cryptography.hazmat.primitives.ciphers.modes import ECB

    key = token_bytes(32)
    block = Cipher(AES(derived(key, b"masks/expansion")), ECB()).encryptor()
    count = 70_000  # more than one piece
    stream = block.update(b"".join(at.to_bytes(16, "big") for at in range(count // 4)))
    assert mask(key, count, 32).tobytes() == stream
    assert mask(key, count // 2, 64).tobytes() == stream
    assert mask(key, 100, 8).tobytes() == (np.frombuffer(stream, "<u4")[:100] & 0xFF).astype("<u4").tobytes()


@pytest.mark.parametrize("bits", [8, 32, 40, 64])
@pytest.mark.parametrize("count", [0, 1, 5, 32768, 65536, 65537, 200_001])
def test_adding_and_subtracting_cancel(count, bits):
    key = token_bytes(32)
    values = np.arange(count).astype(word(bits))
    add_mask(values, key)
    assert np.array_equal(
        reduced(values.copy(), bits), reduced(np.arange(count).astype(word(bits)) + mask(key, count, bits), bits)
    )
    subtract_mask(values, key)
    assert np.array_equal(values, np.arange(count).astype(word(bits)))


def test_a_shorter_mask_is_the_beginning_of_a_longer_one():
    key = token_bytes(32)
    assert np.array_equal(mask(key, 100_000, 32)[:70_001], mask(key, 70_001, 32))


@given(st.integers(8, 64), st.data())
def test_numbers_survive_the_wire(bits, data):
    half = 1 << (bits - 1)
    numbers = data.draw(st.lists(st.integers(-half, half - 1), max_size=20))
    sent = packed(encoded(np.array(numbers, np.int64), bits), bits)
    assert len(sent) == len(numbers) * -(-bits // 8)
    assert centred(unpacked(sent, len(numbers), bits), bits).tolist() == numbers
    assert sent == b"".join((number % (1 << bits)).to_bytes(-(-bits // 8), "little") for number in numbers)


@given(st.integers(8, 64), st.lists(st.integers(-(2**63), 2**63 - 1), min_size=2, max_size=2))
def test_sums_are_taken_modulo(bits, both):
    first, second = (encoded(np.array([number], np.int64), bits) for number in both)
    (got,) = centred(first + second, bits).tolist()
    half = 1 << (bits - 1)
    assert -half <= got < half
    assert (got - sum(both)) % (1 << bits) == 0


@pytest.mark.parametrize("content", [b"", b"123", b"12345", b"1234567"])
def test_a_wrong_number_of_bytes(content):
    with pytest.raises(Corrupt, match="expected 3 for each of 2"):
        unpacked(content, 2, 24)


def test_a_number_beyond_the_modulus():
    assert unpacked(b"\xff\x0f", 1, 12).tolist() == [4095]
    with pytest.raises(Corrupt, match="more than 12 bits"):
        unpacked(b"\x00\x10", 1, 12)


def test_bad_arguments():
    for call in (
        lambda: mask(bytes(31), 3, 32),
        lambda: mask(b"", 3, 32),
        lambda: mask(bytes(32), -1, 32),
        lambda: mask(bytes(32), 3, 7),
        lambda: mask(bytes(32), 3, 65),
        lambda: add_mask(np.zeros(3), bytes(32)),
        lambda: add_mask(np.zeros(3, np.int32), bytes(32)),
        lambda: word(0),
    ):
        with pytest.raises(InvalidArgument):
            call()


def test_no_random_state_is_touched(untouched_random_state):
    mask(token_bytes(32), 10, 32)
