"""Messages that are broken, replayed or forged, clients that cheat with shares, and what a client refuses."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from privfm.checks import Corrupt, InvalidArgument, ParameterMismatch, Replay, RoundFailed, TooFewClients, WrongKey
from privfm.contracts import SERVER
from privfm.defenses.channels.masks import PairwiseMasks
from privfm.defenses.channels.masks import client as mask_client
from privfm.defenses.channels.masks.client import NO_SHARE
from privfm.defenses.channels.masks.secrets import numbers_to_bytes

STAGES = ("keys", "shares", "masked", "unmask")
CHANNEL = PairwiseMasks(clients=12, corrupt=0.1, dropouts=0.1)


def whole_rows(n, d, seed=0, largest=2**20):
    """n rows of whole numbers by client; ids are neither dense nor sorted."""
    drawn = np.random.default_rng(seed).integers(-largest, largest, (n, d), endpoint=True)
    return {3 * (n - i): torch.from_numpy(row.astype(np.float64)) for i, row in enumerate(drawn)}


def summed(rows, ids, modulus):
    """One number after the other, in Python's whole numbers: modulo m, in [-m/2, m/2)."""
    columns = zip(*(rows[party].tolist() for party in ids), strict=True)
    return [(int(sum(column)) + modulus // 2) % modulus - modulus // 2 for column in columns]


@dataclass
class Lying:
    """A server that changes what it sends on the way: `lie(stage, party, parts) -> parts`, sealed in its own name."""

    line: Any
    roster: Any
    lie: Callable[[str, int, list[bytes]], list[bytes]]

    @property
    def server(self):
        return self.line.server

    def __call__(self, stage: str, requests: Mapping[int, bytes]) -> Iterator[tuple[int, bytes]]:
        changed = {}
        for party, request in requests.items():
            header, parts = self.roster.opened(request, SERVER, party)
            changed[party] = self.roster.sealed(header, self.lie(stage, party, parts), SERVER, party)
        yield from self.line(stage, changed)


# Messages


def flipped(reply, at):
    changed = bytearray(reply)
    changed[at % len(reply)] ^= 1 << at % 8
    return bytes(changed)


BROKEN = {
    "empty": lambda reply: b"",
    "one byte short": lambda reply: reply[:-1],
    "half": lambda reply: reply[: len(reply) // 2],
    "one byte long": lambda reply: reply + b"\0",
    "garbage": lambda reply: bytes(range(256)) * 8,
    "a bit in the header": lambda reply: flipped(reply, 40),
    "a bit in the body": lambda reply: flipped(reply, len(reply) // 2),
    "a bit in the code": lambda reply: flipped(reply, len(reply) - 1),
}


@pytest.mark.parametrize("stage", range(4), ids=STAGES)
@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_reply_is_a_drop_out(broken, stage, wire, intake):
    rows = whole_rows(7, 3)
    line = wire(CHANNEL, rows)
    counts = dict.fromkeys(rows, -1)

    def change(party, reply):
        counts[party] += 1
        return broken(reply) if (party, counts[party]) == (6, stage) else reply

    line.change = change
    view = CHANNEL.collect(list(rows), intake(3), line)
    total = view.total().tolist()
    left = rows.keys() - (set() if stage == 3 else {6})
    assert (view.ids, view.bad) == (tuple(sorted(left)), int(stage < 3))
    assert total == summed(rows, left, 2**32)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2), st.integers(0, 10**6))
def test_a_flipped_bit_anywhere_is_found(wire, intake, stage, at):
    rows = whole_rows(4, 3)
    line = wire(CHANNEL, rows)
    line.change = lambda party, reply: (
        flipped(reply, at) if party == 6 and sum(to == 6 for _, to, _ in line.received) == stage else reply
    )
    view = CHANNEL.collect(list(rows), intake(3), line)
    assert (view.ids, view.bad) == ((3, 9, 12), 1)
    assert view.total().tolist() == summed(rows, (3, 9, 12), 2**32)


def test_a_second_reply_is_not_added(wire, intake):
    rows = whole_rows(5, 3)
    line = wire(CHANNEL, rows)

    @dataclass
    class Twice:
        server: Any

        def __call__(self, stage, requests):
            for party, reply in line(stage, requests):
                yield party, reply
                if party == 6:
                    yield party, reply
            yield 77, b"from nobody"

    view = CHANNEL.collect(list(rows), intake(3), Twice(line.server))
    assert view.n == 5
    assert view.bad == 6  # two at each of three stages; the last one costs no row
    assert view.total().tolist() == summed(rows, rows, 2**32)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("then", [0, 1], ids=["the same number of round", "another round"])
def test_replies_of_another_session_are_left_out(then, stage, wire, intake):
    rows = whole_rows(7, 3)
    old = wire(CHANNEL, rows)
    CHANNEL.collect(list(rows), intake(3), old).total()
    line = wire(CHANNEL, rows, round=then)
    replayed = old.replies(stage)[6]

    class Mixed:
        server = line.server

        def __call__(self, at, requests):
            for party, reply in line(at, requests):
                yield party, replayed if (at, party) == (stage, 6) else reply

    view = CHANNEL.collect(list(rows), intake(3), Mixed())
    left = rows.keys() - (set() if stage == "unmask" else {6})
    assert view.total().tolist() == summed(rows, left, 2**32)
    assert (view.ids, view.bad) == (tuple(sorted(left)), int(stage != "unmask"))


@pytest.mark.parametrize("stage", STAGES)
def test_requests_of_another_session_are_refused(stage, wire, roster, intake):
    rows = whole_rows(3, 3)
    old, line = wire(CHANNEL, rows), wire(CHANNEL, rows)
    CHANNEL.collect(list(rows), intake(3), old).total()
    replayed = next(request for at, party, request in old.sent if (at, party) == (stage, 6))

    class Mixed:
        server = line.server

        def __call__(self, at, requests):
            return line(at, {p: replayed if (at, p) == (stage, 6) else r for p, r in requests.items()})

    if stage == "keys":  # the first word of a session is as good as any: the client's keys are fresh
        assert CHANNEL.collect(list(rows), intake(3), Mixed()).bad == 1
    else:
        with pytest.raises(WrongKey):
            CHANNEL.collect(list(rows), intake(3), Mixed()).total()
    with pytest.raises(Replay):
        CHANNEL.answer(roster.party(6, 1), "keys", {}, next(r for _, p, r in old.sent if p == 6), lambda: None)


def test_other_parameters_are_refused(wire, intake):
    rows = whole_rows(3, 3)
    line = wire(replace(CHANNEL, dropouts=0.2), rows)
    with pytest.raises(ParameterMismatch):
        CHANNEL.collect(list(rows), intake(3), line)


FORGED = {
    "one number more": lambda header, parts: (header, [parts[0] + bytes(4)]),
    "one number fewer": lambda header, parts: (header, [parts[0][:-4]]),
    "a length that lies": lambda header, parts: (replace(header, length=2**40), parts),
    "two parts": lambda header, parts: (header, [*parts, parts[0]]),
    "no part": lambda header, parts: (header, []),
    "two clients": lambda header, parts: (replace(header, clients=2), parts),
    "weight": lambda header, parts: (replace(header, weight=2.0), parts),
}


@pytest.mark.parametrize("forge", FORGED.values(), ids=FORGED.keys())
def test_forged_sizes_in_a_clients_own_name(forge, wire, roster, intake):
    rows = whole_rows(4, 3)
    line = wire(CHANNEL, rows)

    def change(party, reply):
        header, parts = roster.opened(reply, party)
        if party != 6 or header.stage != "masked":
            return reply
        return roster.sealed(*forge(header, parts), party)

    line.change = change
    view = CHANNEL.collect(list(rows), intake(3), line)
    assert (view.ids, view.bad) == ((3, 9, 12), 1)
    assert view.total().tolist() == summed(rows, (3, 9, 12), 2**32)


# Clients that cheat with shares


def own_words(line, roster, stage, change):
    """`change(party, parts) -> parts` for what clients say at one stage, sealed in their own names."""

    def changed(party, reply):
        header, parts = roster.opened(reply, party)
        return roster.sealed(header, change(party, parts), party) if header.stage == stage else reply

    line.change = changed
    return line


@pytest.mark.parametrize("gone", [set(), {12}], ids=["nobody gone", "one gone"])
def test_a_wrong_share_does_no_harm_while_enough_are_right(gone, wire, roster, intake):
    rows = whole_rows(7, 3)
    line = own_words(
        wire(CHANNEL, rows, {"masked": gone}),
        roster,
        "unmask",
        lambda party, parts: (
            [b"".join(b"\1" + bytes(32) for _ in range(len(parts[0]) // 33))] if party in (3, 9) else parts
        ),
    )
    view = CHANNEL.collect(list(rows), intake(3), line)
    assert view.total().tolist() == summed(rows, rows.keys() - gone, 2**32)


def test_too_many_wrong_shares_end_the_round_and_are_named(wire, roster, intake):
    rows = whole_rows(4, 3)
    threshold = CHANNEL.graph(4).threshold
    liars = sorted(rows)[: 4 - threshold + 1]
    line = own_words(
        wire(CHANNEL, rows),
        roster,
        "unmask",
        lambda party, parts: (
            [b"".join(b"\1" + bytes(32) for _ in range(len(parts[0]) // 33))] if party in liars else parts
        ),
    )
    view = CHANNEL.collect(list(rows), intake(3), line)
    with pytest.raises(RoundFailed, match=rf"shares of client 3 arrived.*clients \[{', '.join(map(str, liars))}\]"):
        view.total()


def test_a_commitment_to_another_seed_is_named(wire, roster, intake):
    rows = whole_rows(4, 3)
    line = own_words(
        wire(CHANNEL, rows), roster, "shares", lambda party, parts: [bytes(32), *parts[1:]] if party == 9 else parts
    )
    with pytest.raises(RoundFailed, match="client 9 dealt shares that do not give"):
        CHANNEL.collect(list(rows), intake(3), line).total()


def test_shares_of_another_key_than_announced_are_named(wire, intake):
    """It shows when the client drops out, and the shares of its key are opened."""
    rows = whole_rows(6, 3)
    line = wire(CHANNEL, rows, {"masked": {9}})

    def change(party, reply):
        if party == 9 and len(line.memories[9]["done"].split()) == 1:
            line.memories[9] = {**line.memories[9], "masking": bytes(32)}
        return reply

    line.change = change
    with pytest.raises(RoundFailed, match="client 9 dealt shares that do not give"):
        CHANNEL.collect(list(rows), intake(3), line).total()


def test_shares_that_lie_on_no_polynomial_are_named(wire, intake, monkeypatch):
    rows = whole_rows(6, 3)
    line, true = wire(CHANNEL, rows), mask_client.split
    calls: list[int] = []

    def dealt(secret, count, threshold):
        calls.append(1)
        shares = true(secret, count, threshold)
        return [(x, bytes(64)) for x, _ in shares] if len(calls) == 2 else shares

    monkeypatch.setattr(mask_client, "split", dealt)
    with pytest.raises(RoundFailed, match="client 6 dealt shares"):
        CHANNEL.collect(list(rows), intake(3), line).total()


def test_boxes_that_do_not_open_are_missing_shares(wire, roster, intake):
    """Who broke them cannot be told: the round ends, unless enough others open."""
    rows = whole_rows(6, 3)

    def spoiled(boxes, count):
        return b"".join(
            box[:8] + (bytes(80) if at < count else box[8:])
            for at, box in enumerate(boxes[88 * i : 88 * i + 88] for i in range(len(boxes) // 88))
        )

    for count, works in ((2, True), (5, False)):
        line = own_words(
            wire(CHANNEL, rows),
            roster,
            "shares",
            lambda party, parts, count=count: [*parts[:2], spoiled(parts[2], count)] if party == 9 else parts,
        )
        view = CHANNEL.collect(list(rows), intake(3), line)
        if works:
            assert view.total().tolist() == summed(rows, rows, 2**32)
        else:
            with pytest.raises(TooFewClients, match="1 shares of client 9"):
                view.total()
    answers = [roster.opened(reply, party)[1][0] for party, reply in line.replies("unmask").items()]
    assert all(NO_SHARE in answer for answer in answers[:1])


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda parts: [parts[0], parts[1][:-1], parts[2]], id="marks cut off"),
        pytest.param(lambda parts: [parts[0][:-1], *parts[1:]], id="commitment cut off"),
        pytest.param(lambda parts: [*parts[:2], parts[2][88:]], id="a neighbour left out"),
        pytest.param(lambda parts: [*parts[:2], parts[2] + parts[2][-88:]], id="a neighbour twice"),
        pytest.param(lambda parts: [*parts[:2], b""], id="no boxes"),
        pytest.param(lambda parts: parts[:2], id="two parts"),
    ],
)
def test_malformed_shares_are_a_drop_out(change, wire, roster, intake):
    rows = whole_rows(5, 3)
    line = own_words(wire(CHANNEL, rows), roster, "shares", lambda party, parts: change(parts) if party == 9 else parts)
    view = CHANNEL.collect(list(rows), intake(3), line)
    assert (view.n, view.bad) == (4, 1)
    assert view.total().tolist() == summed(rows, view.ids, 2**32)


def test_keys_in_anothers_name_are_left_out(wire, roster, intake):
    rows = whole_rows(5, 3)
    line = own_words(
        wire(CHANNEL, rows),
        roster,
        "keys",
        lambda party, parts: [numbers_to_bytes([6]) + parts[0][8:]] if party == 9 else parts,
    )
    view = CHANNEL.collect(list(rows), intake(3), line)
    assert (view.ids, view.bad) == ((3, 6, 12, 15), 1)


@pytest.mark.parametrize("at", [8, 40], ids=["sharing", "masking"])
def test_a_key_of_small_order_is_left_out(at, wire, roster, intake):
    """With it everybody would know the shared secret."""
    rows = whole_rows(5, 3)
    line = own_words(
        wire(CHANNEL, rows),
        roster,
        "keys",
        lambda party, parts: [parts[0][:at] + bytes(32) + parts[0][at + 32 :]] if party == 9 else parts,
    )
    view = CHANNEL.collect(list(rows), intake(3), line)
    assert (view.ids, view.bad) == ((3, 6, 12, 15), 1)
    assert view.total().tolist() == summed(rows, view.ids, 2**32)


def test_a_client_refuses_a_key_of_small_order(wire, roster, intake):
    rows = whole_rows(5, 3)

    def told(stage, party, parts):
        if (stage, party) != ("shares", 3):
            return parts
        return [parts[0][:-128] + bytes(128)]

    with pytest.raises(Corrupt, match="no key"):
        CHANNEL.collect(list(rows), intake(3), Lying(wire(CHANNEL, rows), roster, told))


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["keys", "shares", "unmask"]), st.data())
def test_whatever_a_client_says_in_its_own_name(wire, roster, intake, stage, data):
    """The round goes on without it, or ends with a typed error; the sum is never another one."""
    rows = whole_rows(5, 3)
    piece = st.binary(max_size=300)

    def change(party, parts):
        if party != 6:
            return parts
        kind = data.draw(st.sampled_from(["none", "other", "cut", "longer", "twice", "flipped"]))
        if kind == "none":
            return []
        if kind == "other":
            return data.draw(st.lists(piece, min_size=1, max_size=4))
        at = data.draw(st.integers(0, len(parts) - 1))
        cut = data.draw(st.integers(0, len(parts[at]) - 1))
        new = {
            "cut": parts[at][:cut],
            "longer": parts[at] + data.draw(piece),
            "twice": parts[at] * 2,
            "flipped": flipped(parts[at], cut),
        }[kind]
        return [*parts[:at], new, *parts[at + 1 :]]

    line = own_words(wire(CHANNEL, rows), roster, stage, change)
    try:
        view = CHANNEL.collect(list(rows), intake(3), line)
        total = view.total().tolist()
    except RoundFailed:
        return
    except Corrupt as error:  # it is told its own false keys, and says so; a malicious one would not
        assert stage == "keys" and "client 6 is asked" in str(error)
        return
    assert view.n >= 4
    assert total == summed(rows, view.ids, 2**32)


# What a client refuses


def lists(parts):
    return [list(np.frombuffer(part, ">i8")) for part in parts[:2]]


REFUSED = {
    "both secrets of a survivor": (lambda s, d: (s, [*d, s[1]]), Corrupt, "survived and to have dropped"),
    "both secrets of a drop-out": (lambda s, d: ([*s, *d], d), Corrupt, "survived and to have dropped"),
    "somebody twice": (lambda s, d: ([*s, s[-1]], d), Corrupt, "twice"),
    "somebody left out": (lambda s, d: (s[:-1], d), Corrupt, "not the neighbours"),
    "a stranger": (lambda s, d: ([*s, 99], d), Corrupt, "not the neighbours"),
    "a stranger dropped": (lambda s, d: (s, [*d, 99]), Corrupt, "not the neighbours"),
    "the client itself dropped": (lambda s, d: (s[1:], [s[0], *d]), Corrupt, "without client 3"),
    "hardly anybody survived": (lambda s, d: (s[:1], [*s[1:], *d]), Corrupt, "a sum of 5"),
    "nothing": (lambda s, d: ([], []), Corrupt, "not the neighbours"),
}


@pytest.mark.parametrize(("lie", "error", "match"), REFUSED.values(), ids=REFUSED.keys())
def test_a_client_refuses(lie, error, match, wire, roster, intake):
    rows = whole_rows(6, 3)
    line = wire(CHANNEL, rows, {"masked": {12}})

    def told(stage, party, parts):
        if stage != "unmask" or party != 3:
            return parts
        return [b"".join(int(n).to_bytes(8, "big") for n in sorted(told)) for told in lie(*lists(parts))]

    with pytest.raises(error, match=match):
        CHANNEL.collect(list(rows), intake(3), Lying(line, roster, told)).total()


@pytest.mark.parametrize("said", [1, 2, 4])
def test_a_client_counts_by_itself_where_it_can(said, wire, roster, intake):
    """All clients are neighbours, so that the list must be as long as the server says the sum is."""
    channel, rows = CHANNEL.with_floor(3), whole_rows(5, 3)
    line = wire(channel, rows)

    class Counting:
        server = line.server

        def __call__(self, stage, requests):
            for party, request in list(requests.items()):
                header, parts = roster.opened(request, SERVER, party)
                if stage == "unmask":
                    requests = {**requests, party: roster.sealed(replace(header, clients=said), parts, SERVER, party)}
            return line(stage, requests)

    with pytest.raises(Corrupt, match=f"a sum of {said} clients, of whom 5"):
        channel.collect(list(rows), intake(3), Counting()).total()


def test_clients_refuse_a_sum_under_their_floor(wire, roster, intake):
    """A server that says two of six dropped out, and has a channel without the floor."""
    channel, rows = CHANNEL.with_floor(5), whole_rows(6, 3)
    line = wire(channel, rows)
    view = channel.collect(list(rows), intake(3), line)
    header = replace(channel.header("unmask", line.memories[3]["session"]), clients=4)
    request = roster.sealed(header, [numbers_to_bytes([3, 6, 9, 12]), numbers_to_bytes([15, 18])], SERVER, 3)
    with pytest.raises(TooFewClients, match="smallest_release=5: a sum of 4"):
        channel.answer(roster.party(3), "unmask", line.memories[3], request, lambda: None)
    assert view.total().tolist() == summed(rows, rows, 2**32)


def test_a_second_request_is_refused(wire, roster, intake):
    rows = whole_rows(4, 3)
    line = wire(CHANNEL, rows)
    CHANNEL.collect(list(rows), intake(3), line).total()
    for stage in STAGES:
        request = next(content for at, party, content in line.sent if (at, party) == (stage, 3))
        with pytest.raises(InvalidArgument, match="repeated"):
            CHANNEL.answer(roster.party(3), stage, line.memories[3], request, lambda: line.update(3))


@pytest.mark.parametrize(
    ("stage", "lie", "error", "match"),
    [
        ("shares", lambda parts: [parts[0][:-136]], ParameterMismatch, "neighbours of 5"),
        ("shares", lambda parts: [parts[0][136:]], Corrupt, "not its own"),
        ("shares", lambda parts: [parts[0][:-1]], Corrupt, "expected 136"),
        ("shares", lambda parts: [parts[0] + parts[0][-136:]], Corrupt, "twice"),
        ("masked", lambda parts: [parts[0][: 88 * 2]], TooFewClients, "threshold=3"),
        ("masked", lambda parts: [numbers_to_bytes([1]) + parts[0][8:]], Corrupt, "no neighbours"),
        ("masked", lambda parts: [parts[0] + bytes(1)], Corrupt, "expected 88"),
    ],
)
def test_a_client_refuses_what_cannot_be(stage, lie, error, match, wire, roster, intake):
    channel, rows = PairwiseMasks(clients=5, corrupt=0.2, dropouts=0.1), whole_rows(5, 3)
    if stage == "masked" and error is TooFewClients:
        channel = PairwiseMasks(clients=5, corrupt=0.0, dropouts=0.1)
        lie = lambda parts: [parts[0][:88]]  # noqa: E731
    told = lambda at, party, parts: lie(parts) if (at, party) == (stage, 3) else parts  # noqa: E731
    with pytest.raises(error, match=match):
        channel.collect(list(rows), intake(3), Lying(wire(channel, rows), roster, told))
