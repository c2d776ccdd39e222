from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from privfm.checks import InvalidArgument, TooFewClients
from privfm.defenses.channels.masks.shamir import MOST_SHARES, _products, join, split


def times(a, b):
    """Product in the field of AES, bit by bit (FIPS 197, section 4.2)."""
    product = 0
    while b:
        product ^= a if b & 1 else 0
        a = (a << 1) ^ (0x11B if a & 0x80 else 0)
        b >>= 1
    return product


def test_a_known_product():
    """FIPS 197, section 4.2: {57} times {83} is {c1}; {57} times {13} is {fe}."""
    assert (_products()[0x57, 0x83], _products()[0x57, 0x13]) == (0xC1, 0xFE)


def test_every_product():
    assert _products().tolist() == [[times(a, b) for b in range(256)] for a in range(256)]


def test_shares_lie_on_a_polynomial_through_the_secret(monkeypatch):
    """Degree 2, coefficients as drawn, the highest power first."""
    drawn = bytes([5, 200, 77, 1])  # two bytes of the secret, two coefficients each
    monkeypatch.setattr("privfm.defenses.channels.masks.shamir.token_bytes", lambda count: drawn[:count])
    for x, (first, second) in split(bytes([9, 250]), 6, 3):
        square = times(x, x)
        assert first == 9 ^ times(drawn[2], x) ^ times(drawn[0], square)
        assert second == 250 ^ times(drawn[3], x) ^ times(drawn[1], square)


def test_any_shares_up_to_the_threshold_give_the_secret():
    secret = bytes(range(32))
    shares = split(secret, 6, 3)
    assert [x for x, _ in shares] == [1, 2, 3, 4, 5, 6]
    assert all(join(chosen, 3) == secret for count in (3, 4, 6) for chosen in combinations(shares, count))


@given(st.data())
def test_the_order_of_shares_does_not_matter(data):
    secret = data.draw(st.binary(min_size=1, max_size=70))
    count = data.draw(st.integers(1, MOST_SHARES))
    threshold = data.draw(st.integers(1, min(count, 40)))
    shares = data.draw(st.permutations(split(secret, count, threshold)))
    assert join(shares, threshold) == secret


def test_the_largest_case():
    secret = bytes(64)
    assert join(split(secret, 255, 255)[::-1], 255) == secret


def test_one_share_short_every_secret_is_as_likely():
    """Two shares of three leave exactly one polynomial for each value of the secret: the third share runs over all."""
    shares = split(b"\x2a", 3, 3)
    opened = {join([*shares[:2], (3, bytes([guess]))], 3) for guess in range(256)}
    assert len(opened) == 256


def test_shares_of_one_secret_are_uniform_and_fresh():
    """Chi-square with 255 degrees of freedom: mean 255, deviation 22.6; beyond 110 or 410 are under 1e-8 each."""
    content = b"".join(split(bytes(20_000), 2, 2)[0][1] for _ in range(2))
    counts = [content.count(value) for value in range(256)]
    expected = len(content) / 256
    assert 110 < sum((count - expected) ** 2 / expected for count in counts) < 410
    assert split(bytes(32), 3, 2) != split(bytes(32), 3, 2)
    assert not 110 < sum((count - expected) ** 2 / expected for count in [2 * counts[0], *counts[1:-1], 0]) < 410


def test_a_wrong_share_gives_a_wrong_secret():
    shares = split(bytes(32), 4, 3)
    assert join([(1, bytes(32)), *shares[1:]], 3) != bytes(32)


def test_too_few_shares():
    with pytest.raises(TooFewClients, match="threshold=3: only 2"):
        join(split(bytes(32), 4, 3)[:2], 3)


@pytest.mark.parametrize(
    ("shares", "match"),
    [
        ([(1, b"a"), (1, b"b")], r"x=\(1, 1\)"),
        ([(0, b"a"), (1, b"b")], r"x=\(0, 1\)"),
        ([(1, b"a"), (256, b"b")], r"x=\(1, 256\)"),
        ([(1, b"a"), (2, b"bc")], "different lengths"),
    ],
)
def test_shares_that_cannot_be(shares, match):
    with pytest.raises(InvalidArgument, match=match):
        join(shares, 2)


@pytest.mark.parametrize(
    ("secret", "count", "threshold", "match"),
    [
        (b"", 3, 2, "secret"),
        (b"a", 3, 0, "threshold=0"),
        (b"a", 3, 4, "count=3"),
        (b"a", 256, 2, "count=256"),
        (b"a", 3, True, "threshold=True"),
    ],
)
def test_bad_arguments(secret, count, threshold, match):
    with pytest.raises(InvalidArgument, match=match):
        split(secret, count, threshold)
