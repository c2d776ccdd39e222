"""One secret content for several named readers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from privfm.checks import Corrupt
from privfm.defenses.channels.readers import opened_from, sealed_for


@pytest.mark.parametrize("content", [b"", b"a", bytes(100_000)], ids=len)
def test_every_reader_opens_it(content, roster):
    box, wrapped = sealed_for(roster.party(-1), [3, 6], content, b"purpose")
    assert len(box) == len(content) + 28
    assert [len(key) for key in wrapped] == [60, 60]
    for reader, key in zip((3, 6), wrapped, strict=True):
        assert opened_from(roster.party(reader), -1, box, key, b"purpose") == content


def test_it_is_sealed_anew_each_time(roster):
    first, second = (sealed_for(roster.party(-1), [3], b"content", b"purpose") for _ in range(2))
    assert first[0] != second[0]
    assert first[1] != second[1]


@pytest.mark.parametrize(
    ("reader", "now", "sender", "purpose"),
    [
        (6, 0, -1, b"purpose"),
        (3, 1, -1, b"purpose"),
        (3, 0, 6, b"purpose"),
        (3, 0, -1, b"another"),
        (-2, 0, -1, b"purpose"),
    ],
    ids=["another reader", "another round", "another sender", "another purpose", "the server"],
)
def test_nobody_else_does(reader, now, sender, purpose, roster):
    box, (wrapped,) = sealed_for(roster.party(-1), [3], b"content", b"purpose")
    with pytest.raises(Corrupt, match="not for this party"):
        opened_from(roster.party(reader, now), sender, box, wrapped, purpose)


def test_what_was_changed_is_refused(roster):
    box, (wrapped,) = sealed_for(roster.party(-1), [3], b"content", b"purpose")

    @given(st.integers(0, len(box) + len(wrapped) - 1), st.integers(0, 7))
    def flipped(at, bit):
        whole = bytearray(box + wrapped)
        whole[at] ^= 1 << bit
        with pytest.raises(Corrupt):
            opened_from(roster.party(3), -1, bytes(whole[: len(box)]), bytes(whole[len(box) :]), b"purpose")

    flipped()
    for cut in (b"", box[:5], box[:-1]):
        with pytest.raises(Corrupt):
            opened_from(roster.party(3), -1, cut, wrapped, b"purpose")
