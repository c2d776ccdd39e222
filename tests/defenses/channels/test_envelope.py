from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from privfm.checks import BrokenEnvelope, Corrupt, InvalidArgument, ParameterMismatch, Replay, WrongKey
from privfm.contracts import KEY_HOLDER, SERVER, Party
from privfm.defenses.channels.envelope import Header, Link, fingerprint
from privfm.defenses.channels.identities import new_identity, public_identity

IDENTITIES = {number: new_identity() for number in (7, 8, KEY_HOLDER, SERVER)}


def party(number, now=3):
    return Party(number, now, IDENTITIES[number], lambda other: public_identity(IDENTITIES[other]))


CLIENT, AT_SERVER = Link(party(7), SERVER), Link(party(SERVER), 7)
HEADER = Header("ckks", b"p" * 16, b"k" * 16, "update", length=10, parts=2, clients=1, scale=0.25, weight=0.5)
PARTS = [b"first", b"the second"]
MESSAGE = CLIENT.seal(HEADER, PARTS)


def recoded(content: bytes, sender: Link = CLIENT) -> bytes:
    """A malicious client's message: whatever it likes, under its own key."""
    return content + sender._code([content], sending=True)


def test_opening_undoes_sealing():
    assert AT_SERVER.open(MESSAGE) == (HEADER, PARTS)


@given(
    st.lists(st.binary(max_size=40), max_size=5),
    st.integers(0, 2**63),
    st.floats(allow_nan=False),
    st.floats(allow_nan=False),
)
def test_any_parts_survive(parts, length, scale, weight):
    header = replace(HEADER, length=length, parts=len(parts), scale=scale, weight=weight)
    assert AT_SERVER.open(CLIENT.seal(header, parts)) == (header, parts)


def test_the_overhead_is_small():
    assert len(MESSAGE) - sum(map(len, PARTS)) < 200


@pytest.mark.parametrize("size", range(len(MESSAGE)))
def test_every_truncation_is_found(size):
    with pytest.raises(Corrupt):
        AT_SERVER.open(MESSAGE[:size])


@given(st.integers(0, 8 * len(MESSAGE) - 1))
def test_every_flipped_bit_is_found(bit):
    changed = bytearray(MESSAGE)
    changed[bit // 8] ^= 1 << bit % 8
    with pytest.raises(BrokenEnvelope):
        AT_SERVER.open(bytes(changed))


@given(st.binary(max_size=400))
def test_arbitrary_bytes_are_refused(content):
    with pytest.raises(BrokenEnvelope):
        AT_SERVER.open(content)


@given(st.binary(max_size=400))
def test_arbitrary_content_under_the_right_key_is_refused(content):
    with pytest.raises(BrokenEnvelope):
        AT_SERVER.open(recoded(content))


@given(st.binary(min_size=1, max_size=300), st.integers(0, 100))
def test_a_body_that_its_sender_scrambled_is_opened_whole_or_refused(noise, at):
    """Under the right key, so that only the sizes stand between the parser and the noise."""
    content = bytearray(MESSAGE[:-32])
    begin = len(content) - len(content) % 97 - at if len(content) > 200 else at
    content[begin : begin + len(noise)] = noise
    try:
        header, parts = AT_SERVER.open(recoded(bytes(content)))
    except BrokenEnvelope:
        return
    assert len(parts) == header.parts
    assert sum(map(len, parts)) <= len(content)


@pytest.mark.parametrize("count", [0, 1, 3, 2**32 - 1])
def test_a_forged_number_of_parts_is_refused(count):
    content = bytearray(MESSAGE[:-32])
    at = MESSAGE.index((10).to_bytes(8, "big") + (2).to_bytes(4, "big")) + 8
    content[at : at + 4] = count.to_bytes(4, "big")
    with pytest.raises(Corrupt, match="parts"):
        AT_SERVER.open(recoded(bytes(content)))


@pytest.mark.parametrize("size", [0, 4, 6, 2**63, 2**64 - 1])
def test_a_forged_size_is_refused(size):
    content = MESSAGE[:-32]
    at = content.index((5).to_bytes(8, "big") + b"first")
    with pytest.raises(Corrupt):
        AT_SERVER.open(recoded(content[:at] + size.to_bytes(8, "big") + content[at + 8 :]))


def test_another_version_is_refused():
    with pytest.raises(Corrupt, match="version 9"):
        AT_SERVER.open(recoded(MESSAGE[:4] + b"\x09" + MESSAGE[5:-32]))


def test_a_message_of_another_round_is_a_replay():
    with pytest.raises(Replay, match="round 3, expected round 4"):
        Link(party(SERVER, 4), 7).open(MESSAGE)


def test_a_round_that_is_rewritten_does_not_pass():
    """The code's key depends on the round, so that the number alone does not help."""
    header = bytearray(MESSAGE)
    header[5:13] = (4).to_bytes(8, "big", signed=True)
    with pytest.raises(Corrupt, match="not from party 7"):
        Link(party(SERVER, 4), 7).open(bytes(header))


def test_another_client_cannot_speak_for_this_one():
    with pytest.raises(Corrupt, match="from 8 to -2, expected 7"):
        AT_SERVER.open(Link(party(8), SERVER).seal(HEADER, PARTS))
    forged = Link(Party(7, 3, IDENTITIES[8], party(7).pinned), SERVER).seal(HEADER, PARTS)
    with pytest.raises(Corrupt, match="not from party 7"):
        AT_SERVER.open(forged)


def test_a_message_is_not_sent_back():
    """The same pair, the other direction."""
    with pytest.raises(Corrupt, match="from 7 to -2"):
        CLIENT.open(MESSAGE)
    content = bytearray(MESSAGE[:-32])
    content[13:29] = content[21:29] + content[13:21]  # sender and receiver change places
    with pytest.raises(Corrupt, match="not from party -2"):
        CLIENT.open(bytes(content) + MESSAGE[-32:])


def test_a_message_is_not_sent_on():
    with pytest.raises(Corrupt, match="expected 7 to -1"):
        Link(party(KEY_HOLDER), 7).open(MESSAGE)


def test_a_server_cannot_speak_for_the_key_holder():
    """Identities are pinned: the server's own secret under the key holder's number does not verify."""
    forged = Link(Party(KEY_HOLDER, 3, IDENTITIES[SERVER], party(7).pinned), 7).seal(HEADER, PARTS)
    with pytest.raises(Corrupt, match="not from party -1"):
        Link(party(7), KEY_HOLDER).open(forged)


@pytest.mark.parametrize("name", [field.name for field in fields(Header)])
def test_every_field_is_compared_and_named(name):
    value = getattr(HEADER, name)
    other = {int: 99, float: 99.0, str: "other", bytes: b"x" * 16}[type(value)]
    kind = {"key": WrongKey, "scheme": Corrupt, "stage": Corrupt}.get(name, ParameterMismatch)
    with pytest.raises(kind, match=f"{name}="):
        replace(HEADER, **{name: other}).require(HEADER)
    HEADER.require(HEADER)


def test_a_weight_that_is_no_number_is_refused():
    with pytest.raises(ParameterMismatch, match="weight=nan"):
        replace(HEADER, weight=float("nan")).require(HEADER)


def test_a_known_header_leaves_the_number_of_parts_open():
    assert AT_SERVER.expect(MESSAGE, replace(HEADER, parts=0)) == PARTS
    with pytest.raises(ParameterMismatch, match="length=10, expected 11"):
        AT_SERVER.expect(MESSAGE, replace(HEADER, length=11))


def test_text_that_is_no_ascii_is_refused_by_comparison():
    content = MESSAGE[:-32].replace(b"ckks", b"\xff\xfe\xfd\xfc")
    header, _ = AT_SERVER.open(recoded(content))
    with pytest.raises(Corrupt, match="scheme="):
        header.require(HEADER)


def test_a_header_that_does_not_fit_its_parts_is_not_sealed():
    with pytest.raises(InvalidArgument, match="parts=2: the message has 1"):
        CLIENT.seal(HEADER, PARTS[:1])


def test_a_fingerprint_is_sixteen_bytes_of_sha256():
    # first half of the digest of "abc", FIPS 180-2, appendix B.1
    assert fingerprint(b"abc").hex() == "ba7816bf8f01cfea414140de5dae2223"
