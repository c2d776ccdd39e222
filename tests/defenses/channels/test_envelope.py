from dataclasses import fields, replace
from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from privfm.checks import BrokenEnvelope
from privfm.contracts import KEY_HOLDER
from privfm.defenses.channels.envelope import Header, fingerprint, seal, unseal

HEADER = Header("ckks", b"p" * 16, b"k" * 16, b"n" * 16, 7, "update", length=10, parts=2, clients=1)
PARTS = [b"first", b"the second"]
MESSAGE = seal(HEADER, PARTS)


def resealed(content: bytes) -> bytes:
    """A forger's message: changed, with a checksum that fits."""
    return content + sha256(content).digest()


def test_opening_undoes_sealing():
    assert unseal(MESSAGE) == (HEADER, PARTS)


@given(st.lists(st.binary(max_size=40), max_size=5), st.integers(-2, 2**40), st.integers(0, 2**63))
def test_any_parts_survive(parts, party, length):
    header = replace(HEADER, party=party, length=length, parts=len(parts))
    assert unseal(seal(header, parts)) == (header, parts)


def test_the_overhead_is_small():
    assert len(MESSAGE) - sum(map(len, PARTS)) < 200


@pytest.mark.parametrize("size", range(len(MESSAGE)))
def test_every_truncation_is_found(size):
    with pytest.raises(BrokenEnvelope):
        unseal(MESSAGE[:size])


@given(st.integers(0, 8 * len(MESSAGE) - 1))
def test_every_flipped_bit_is_found(bit):
    changed = bytearray(MESSAGE)
    changed[bit // 8] ^= 1 << bit % 8
    with pytest.raises(BrokenEnvelope):
        unseal(bytes(changed))


@given(st.binary(max_size=400))
def test_arbitrary_bytes_are_refused(content):
    with pytest.raises(BrokenEnvelope):
        unseal(content)


@given(st.binary(max_size=400))
def test_arbitrary_content_with_a_checksum_that_fits_is_refused(content):
    with pytest.raises(BrokenEnvelope):
        unseal(resealed(content))


@pytest.mark.parametrize("parts", [0, 1, 3, 2**32 - 1])
def test_a_forged_number_of_parts_is_refused(parts):
    with pytest.raises(BrokenEnvelope, match="parts"):
        unseal(seal(replace(HEADER, parts=parts), PARTS))


@pytest.mark.parametrize("size", [0, 4, 6, 2**63, 2**64 - 1])
def test_a_forged_size_is_refused(size):
    content = MESSAGE[:-32]
    at = content.index((5).to_bytes(8, "big") + b"first")
    with pytest.raises(BrokenEnvelope):
        unseal(resealed(content[:at] + size.to_bytes(8, "big") + content[at + 8 :]))


def test_another_version_is_refused():
    with pytest.raises(BrokenEnvelope, match="version 2"):
        unseal(resealed(MESSAGE[:4] + b"\x02" + MESSAGE[5:-32]))


@pytest.mark.parametrize("name", [field.name for field in fields(Header)])
def test_every_field_is_compared_and_named(name):
    value = getattr(HEADER, name)
    other = {int: 99, str: "other", bytes: b"x" * 16}[type(value)]
    with pytest.raises(BrokenEnvelope, match=f"{name}="):
        replace(HEADER, **{name: other}).require(HEADER)
    HEADER.require(HEADER)


def test_text_that_is_no_ascii_is_refused_by_comparison():
    content = MESSAGE[:-32].replace(b"ckks", b"\xff\xfe\xfd\xfc")
    header, _ = unseal(resealed(content))
    with pytest.raises(BrokenEnvelope, match="scheme="):
        header.require(HEADER)


def test_parties_may_be_negative():
    header = replace(HEADER, party=KEY_HOLDER)
    assert unseal(seal(header, PARTS))[0].party == KEY_HOLDER


def test_a_fingerprint_is_sixteen_bytes_of_sha256():
    # first half of the digest of "abc", FIPS 180-2, appendix B.1
    assert fingerprint(b"abc").hex() == "ba7816bf8f01cfea414140de5dae2223"
