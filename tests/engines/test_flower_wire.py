"""Bytes between server and hosts: what goes in comes out, and what is none is refused by name and never run."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from math import inf, nan
from pathlib import Path
from struct import pack
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from privfm.checks import Corrupt
from privfm.contracts import KEY_HOLDER, Broadcast
from privfm.engines.flower.messages import Greeting, Reply, Request, vector_from_bytes, vector_to_bytes
from privfm.engines.flower.wire import packed, unpacked

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
heads = st.dictionaries(st.text(), plain, max_size=4)
parts = st.dictionaries(st.text(), st.binary(max_size=50), max_size=4)
parties = st.integers(KEY_HOLDER, 10**6)
replies = st.dictionaries(parties, st.binary(max_size=50), max_size=5)
vectors = st.lists(st.floats(width=32), max_size=9).map(lambda values: torch.tensor(values, dtype=torch.float32))
broadcasts = st.builds(
    Broadcast,
    vectors,
    st.none() | st.floats(0.0, 1e300, exclude_min=True),
    st.integers(0, 10**9),
    st.dictionaries(st.integers(0, 10**6), st.floats(0, 1), max_size=3),
)
requests = st.builds(
    Request,
    st.integers(0, 10**6),
    st.text(),
    st.lists(st.integers(0, 99), max_size=4).map(tuple),
    st.lists(st.integers(0, 99), max_size=4).map(tuple),
    replies,
    st.none() | broadcasts,
)
messages = st.one_of(
    requests,
    st.builds(Reply, replies, st.booleans()),
    st.builds(Greeting, st.lists(parties, max_size=4).map(tuple), st.text()),
)
KINDS = [Request, Reply, Greeting]


@given(heads, parts)
def test_heads_and_parts_come_back(head: dict[str, Any], own: dict[str, bytes]) -> None:
    content = packed(head, own)
    assert isinstance(content, bytes)
    assert unpacked(content) == (head, own)
    assert list(unpacked(content)[1]) == list(own)


@given(messages)
def test_messages_come_back(message: Request | Reply | Greeting) -> None:
    content = message.to_bytes()
    again = type(message).from_bytes(content)
    assert again.to_bytes() == content  # tensors do not compare
    if not isinstance(message, Request) or message.broadcast is None:
        assert again == message
        return
    assert again.broadcast is not None
    told, sent = again.broadcast, message.broadcast
    assert (told.bound, told.cohort, told.weights) == (sent.bound, sent.cohort, sent.weights)
    assert told.model.view(torch.int32).equal(sent.model.view(torch.int32))


@given(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=20))
def test_not_a_bit_of_a_vector_is_lost(bits: list[int]) -> None:
    """Whatever the bits say: NaN with its payload, infinities, subnormal numbers, both zeros."""
    vector = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    assert vector_from_bytes(vector_to_bytes(vector)).view(torch.int32).tolist() == bits


def test_a_received_vector_may_be_written_to() -> None:
    vector = vector_from_bytes(vector_to_bytes(torch.zeros(3)))
    vector += 1.0
    assert vector.tolist() == [1.0, 1.0, 1.0]


@given(messages, st.data())
def test_a_message_that_is_cut_short_or_longer_is_refused(message: Any, data: st.DataObject) -> None:
    content = message.to_bytes()
    cut = data.draw(st.integers(0, len(content) - 1))
    for wrong in (content[:cut], content + data.draw(st.binary(min_size=1, max_size=9))):
        with pytest.raises(ValueError):
            unpacked(wrong)
        with pytest.raises(Corrupt):
            type(message).from_bytes(wrong)


@given(messages, st.data())
def test_a_message_with_a_wrong_byte_is_refused_or_another_message(message: Any, data: st.DataObject) -> None:
    """No checksum: Flower's transport has one, and who lies would write a right one. But no other exception."""
    content = bytearray(message.to_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    for kind in KINDS:
        try:
            kind.from_bytes(bytes(content))
        except Corrupt:
            continue


@given(st.binary(max_size=200))
def test_other_bytes_are_refused(content: bytes) -> None:
    for wrong in (content, packed({})[:8] + content, packed({}) + content):
        for kind in KINDS:
            with pytest.raises(Corrupt):
                kind.from_bytes(wrong)


HEADER = {"round": 1, "stage": "update", "honest": [], "malicious": []}


def _raw(header: bytes) -> bytes:
    return packed({})[:7] + pack(">Q", len(header)) + header


WRONG: dict[str, bytes] = {
    "no header": _raw(b""),
    "a list": _raw(b"[]"),
    "no parts": _raw(b'{"head": {}}'),
    "a part of negative length": _raw(b'{"head": {}, "parts": [["a", -1]]}'),
    "a part of length true": _raw(b'{"head": {}, "parts": [["a", true]]}'),
    "a part without a name": _raw(b'{"head": {}, "parts": [[1, 0]]}'),
    "one name twice": _raw(b'{"head": {"failed": false}, "parts": [["reply/1", 0], ["reply/1", 0]]}'),
    "not text": _raw(b"\xff\xfe"),
    "nested without end": _raw(b"[" * 200_000),
    "a number of many digits": _raw(b'{"head": {"round": ' + b"1" * 10_000 + b'}, "parts": []}'),
    "a header longer than the message": packed({})[:7] + pack(">Q", 2**63) + b"{}",
    "infinite round": packed({**HEADER, "round": inf}),
    "round that is no number": packed({**HEADER, "round": nan}),
    "round that is a list": packed({**HEADER, "round": []}),
    "clients that are text": packed({**HEADER, "honest": "abc"}),
    "infinite client": packed({**HEADER, "honest": [inf]}),
    "a party twice": packed(
        {**HEADER, "failed": False}, dict.fromkeys(("request/1", "request/01", "reply/1", "reply/01"), b"")
    ),
    "a party with a sign": packed({**HEADER, "failed": False}, {"request/+1": b"", "reply/+1": b""}),
    "a party without a number": packed({**HEADER, "failed": False}, {"request/": b"", "reply/": b""}),
    "a model without weights": packed({**HEADER, "bound": None, "cohort": 1}, {"model": b""}),
    "weights in a list": packed({**HEADER, "bound": None, "cohort": 1, "weights": [1]}, {"model": b""}),
    "half a number": packed({**HEADER, "bound": None, "cohort": 1, "weights": {}}, {"model": b"123"}),
    "an infinite cohort": packed({**HEADER, "bound": None, "cohort": inf, "weights": {}}, {"model": b""}),
    "infinite parties": packed({"parties": [inf], "problem": ""}),
}  # fmt: skip


@pytest.mark.parametrize("content", WRONG.values(), ids=WRONG.keys())
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_message_is_refused_by_name(kind: Any, content: bytes) -> None:
    with pytest.raises(Corrupt):
        kind.from_bytes(content)


def test_nothing_is_ever_executed(tmp_path: Path) -> None:
    """A pickle whose loading would leave a file behind, wherever bytes can stand."""
    trace = tmp_path / "trace"
    bomb = pickle.dumps(_Touch(trace))
    pickle.loads(bomb)  # it would
    trace.unlink()
    contents = [
        bomb,
        packed({})[:7] + bomb,
        _raw(bomb),
        packed(HEADER | {"failed": False}, {"request/1": bomb, "reply/1": bomb}),
        packed(HEADER | {"bound": None, "cohort": 1, "weights": {}}, {"model": bomb + bytes(-len(bomb) % 4)}),
        packed({"parties": [], "problem": bomb.decode("latin1")}),
    ]
    for content in contents:
        for kind in KINDS:
            try:
                kind.from_bytes(content)
            except Corrupt:
                continue
    assert not trace.exists()


class _Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.path,)


def test_a_message_of_another_version_is_refused() -> None:
    content = packed({"failed": False})
    assert Reply.from_bytes(content) == Reply()
    with pytest.raises(ValueError, match="this version of privfm"):
        unpacked(content[:6] + b"\x02" + content[7:])
    assert json.loads(content[15:])["head"] == {"failed": False}
