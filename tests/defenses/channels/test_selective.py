from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Generator
from torch.nn.functional import cross_entropy

from privfm.checks import BrokenEnvelope, InvalidArgument, RoundFailed, TooFewClients
from privfm.contracts import KEY_HOLDER, SERVER, Channel, Encoded, Exchange, Reveals, Transform
from privfm.defenses.channels import BFV, CKKS, PairwiseMasks, Plaintext
from privfm.defenses.channels.envelope import Header, Link
from privfm.defenses.channels.selective import Selective
from privfm.defenses.channels.selective_maps import by_name, by_sensitivity
from privfm.defenses.transforms import Chain, FixedPoint
from privfm.defenses.views import SumView
from privfm.vectors import Layout

PROTECTED = ((1, 3), (4, 5))


@dataclass(frozen=True)
class Adding(Channel):
    """A toy that adds in the clear, in two stages; the update comes at the second."""

    bound: float | None = None
    smallest_release: int = 2
    client_stages = ("hello", "update")

    @property
    def learns(self):
        return {"server": "the sum", "clients": "nothing", "trust": "nobody"}

    @property
    def largest_coordinate(self):
        return self.bound

    def with_floor(self, least):
        return replace(self, smallest_release=max(least, self.smallest_release))

    def reply(self, party, stage, memory, request, update):
        link, head = Link(party, SERVER), Header("adding", stage=stage)
        if stage == "hello":
            return {**memory, "greeted": b"yes"}, link.seal(head, [])
        assert memory["greeted"] == b"yes"
        encoded = update()
        row = encoded.rows[0].double()
        if not row.isfinite().all():
            return memory, link.seal(head, [])
        head = replace(head, length=len(row), weight=encoded.weight, parts=1)
        return memory, link.seal(head, [row.numpy().tobytes()])

    def collect(self, cohort, intake, exchange):
        greeted, bad = [], 0
        for party, reply in exchange("hello", dict.fromkeys(cohort, b"")):
            try:
                Link(exchange.server, party).expect(reply, Header("adding", stage="hello"))
                greeted.append(party)
            except BrokenEnvelope:
                bad += 1
        total, ids, refused = torch.zeros(intake.width, dtype=torch.float64), [], 0
        for party, reply in exchange("update", dict.fromkeys(greeted, b"")):
            head = Header("adding", stage="update", length=intake.width, weight=intake.weights.get(party, 1.0))
            try:
                header, parts = Link(exchange.server, party).open(reply)
                if not parts:
                    refused += 1
                    continue
                header.require(replace(head, parts=1))
            except BrokenEnvelope:
                bad += 1
                continue
            total += torch.frombuffer(bytearray(parts[0]), dtype=torch.float64)
            ids.append(party)
        if refused and not ids:
            raise RoundFailed("all refused")
        if len(ids) < intake.least_answers or 0 < len(ids) < self.smallest_release:
            raise TooFewClients(f"{len(ids)} of {len(cohort)}")
        return SumView(
            lambda: intake.total(total) if ids else torch.zeros(intake.d), tuple(sorted(ids)), intake.d, bad + refused
        )


@dataclass(frozen=True)
class Mixed(Transform):
    """A codec that adds up neighbours."""

    binding = True
    additive = True

    def encode(self, rows, state, generators):
        return Encoded(rows + rows.roll(1, 1), {}), state

    def decode(self, encoded, d):
        return encoded.rows + encoded.rows.roll(1, 1)


@dataclass(frozen=True)
class Wider(Transform):
    binding = True
    additive = True

    def width(self, d):
        return d + 1

    def encode(self, rows, state, generators):
        return Encoded(torch.nn.functional.pad(rows, (0, 1)), {}), state

    def decode(self, encoded, d):
        return encoded.rows[:, :d]


TOY = Selective(Adding(), PROTECTED)
IN_CLEAR = [0, 3, 5, 6, 7, 8]  # of 9 columns, by hand
CODEC = Chain((FixedPoint(bound=1.0, bits=16),))


def coded(rows):
    return {party: CODEC.encode(row[None], {}, [Generator().manual_seed(party)])[0] for party, row in rows.items()}


# The sum, and what lies open


def test_the_sum_is_that_of_all_columns(wire, gaussian, intake, untouched_random_state):
    rows = gaussian(5, 9)
    before = {party: row.clone() for party, row in rows.items()}
    view = TOY.collect(list(rows), intake(9), wire(TOY, rows))
    torch.testing.assert_close(view.total(), sum(rows.values()), rtol=1e-6, atol=1e-6)
    assert (view.n, view.d, view.bad, view.ids) == (5, 9, 0, tuple(sorted(rows)))
    assert view.total().dtype == torch.float32
    assert all(torch.equal(rows[party], before[party]) for party in rows)


def test_the_view_shows_what_the_server_read_of_each(wire, gaussian, intake):
    rows = gaussian(4, 9)
    clear = TOY.collect(list(rows), intake(9), wire(TOY, rows)).clear
    assert clear.shape == (4, 9)
    for party, row in zip(sorted(rows), clear, strict=True):
        assert row.isnan().tolist() == [column not in IN_CLEAR for column in range(9)]
        assert torch.equal(row[IN_CLEAR], rows[party][IN_CLEAR])


def test_what_is_protected_is_in_no_message_but_the_inner_channels(wire, intake):
    """Searched for as bytes, of 44 bits each; what is in the clear is found, so that the search can find."""
    rows = torch.rand(3, 9, dtype=torch.float64, generator=Generator().manual_seed(0))
    channel = Selective(PairwiseMasks(clients=3, modulus_bits=50), PROTECTED)
    codec = Chain((FixedPoint(bound=1.0, bits=44),))
    sent = {party: codec.encode(row[None], {}, [Generator().manual_seed(0)])[0] for party, row in enumerate(rows)}
    line = wire(channel, sent)
    channel.collect([0, 1, 2], intake(9, codecs=codec), line).total()
    said = b"".join(content for _, _, content in (*line.sent, *line.received))
    for encoded in sent.values():
        found = [value.to_bytes(6, "little") in said for value in encoded.rows[0].long().tolist()]
        assert found == [column in IN_CLEAR for column in range(9)]


@pytest.mark.parametrize(
    "channel",
    [BFV(clients=8, bits=16), PairwiseMasks(clients=8), CKKS(bound=1.0, clients=8)],
    ids=["BFV", "PairwiseMasks", "CKKS"],
)
def test_over_every_channel_of_sums(channel, wire, gaussian, intake):
    rows = gaussian(5, 40)
    selective = Selective(channel, ((0, 3), (7, 8), (30, 40)))
    sent, codecs = (coded(rows), CODEC) if channel.integers else (rows, Chain(()))
    line = wire(selective, sent)
    view = selective.collect(list(rows), intake(40, codecs=codecs), line)
    if channel.integers:  # bit for bit the sum of the whole numbers
        whole = view.total().double() * 2.0**16
        assert torch.equal(whole, sum(each.rows[0] for each in sent.values()))
    else:
        torch.testing.assert_close(view.total(), sum(rows.values()), rtol=1e-6, atol=1e-6)
    holder = [stage for stage, party, _ in line.received if party == KEY_HOLDER]
    assert tuple(holder) == selective.key_holder_stages == channel.key_holder_stages
    assert [stage for stage, party, _ in line.received if party == 3] == list(channel.client_stages)


def test_sums_of_whole_numbers_do_not_lose_digits_before_they_are_decoded(wire, intake):
    """2^40 + 1 is cut by float32; a codec that takes 2^40 off again shows whether anybody cut."""

    @dataclass(frozen=True)
    class Offset(Transform):
        binding = True
        additive = True
        integers = True

        def encode(self, rows, state, generators):
            return Encoded(rows.double(), {}), state

        def decode(self, encoded, d):
            return encoded.rows.remainder(2.0**20)

    rows = {i: torch.tensor([2.0**40 + 1, 2.0**40 + 2, 2.0**40 + 3], dtype=torch.float64) for i in range(2)}
    channel = Selective(PairwiseMasks(clients=2, modulus_bits=50), ((1, 2),))
    total = channel.collect([0, 1], intake(3, codecs=Offset()), wire(channel, rows)).total()
    assert total.tolist() == [2.0, 4.0, 6.0]


def test_everything_protected_leaves_nothing_in_the_clear(wire, gaussian, intake):
    rows = gaussian(4, 9)
    channel = Selective(Adding(), ((0, 9),))
    view = channel.collect(list(rows), intake(9), wire(channel, rows))
    torch.testing.assert_close(view.total(), sum(rows.values()), rtol=1e-6, atol=1e-6)
    assert view.clear.isnan().all()
    assert channel.unprotected(9) == 0


def test_the_sum_does_not_depend_on_the_order_of_arrival(wire, intake):
    rows = dict(enumerate(torch.randn(100, 9, generator=Generator().manual_seed(1)).mul(1e4)))
    forward, backward = (TOY.collect(order, intake(9), wire(TOY, rows)) for order in (range(100), range(99, -1, -1)))
    assert torch.equal(forward.total()[IN_CLEAR], backward.total()[IN_CLEAR])
    assert torch.equal(forward.clear.nan_to_num(7), backward.clear.nan_to_num(7))


# What goes wrong


@pytest.mark.parametrize("stage", ["hello", "update"])
def test_drop_outs_are_left_out(stage, wire, gaussian, intake):
    rows = gaussian(5, 9)
    view = TOY.collect(list(rows), intake(9), wire(TOY, rows, lost={stage: {3, 12}}))
    assert (view.ids, view.bad) == ((6, 9, 15), 0)
    torch.testing.assert_close(view.total(), rows[6] + rows[9] + rows[15], rtol=1e-6, atol=1e-6)
    assert view.clear.shape == (3, 9)


def test_a_drop_out_after_the_update_is_not_summed_in_the_clear_either(wire, gaussian, intake):
    """Masks recover the protected part of who leaves later; who never arrived counts in neither part."""
    rows = gaussian(6, 9)
    channel = Selective(PairwiseMasks(clients=6, dropouts=0.4), PROTECTED)
    for stage in channel.client_stages:
        line = wire(channel, coded(rows), lost={stage: {3, 12}})
        view = channel.collect(list(rows), intake(9, codecs=CODEC), line)
        assert view.ids == tuple(sorted(rows) if stage == "unmask" else (6, 9, 15, 18))
        whole = view.total().double() * 2.0**16
        assert torch.equal(whole, sum(coded(rows)[party].rows[0] for party in view.ids))


@pytest.mark.parametrize("cohort", [[], [1, 2]], ids=["empty", "silent"])
def test_nobody_gives_zeros_of_width_d(cohort, wire, intake):
    view = TOY.collect(cohort, intake(6), wire(TOY, {}, lost={"hello": {1, 2}}))
    assert (view.n, view.d, view.bad) == (0, 6, 0)
    assert torch.equal(view.total(), torch.zeros(6))
    assert view.clear.shape == (0, 6)


@pytest.mark.parametrize("column", [0, 1])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 2.5])
def test_a_row_that_does_not_fit_is_refused_whole(column, value, wire, gaussian, intake, roster):
    """In whichever part: the client sends neither, and the inner channel counts it as refused."""
    channel = Selective(Adding(bound=2.0), PROTECTED)
    rows = gaussian(4, 9)
    rows[6][column] = value
    line = wire(channel, rows)
    view = channel.collect(list(rows), intake(9), line)
    assert (view.ids, view.bad) == ((3, 9, 12), 1)
    torch.testing.assert_close(view.total(), rows[3] + rows[9] + rows[12], rtol=1e-6, atol=1e-6)
    inner, clear = roster.opened(line.replies("update")[6], 6)[1]
    assert clear == bytes(4 * len(IN_CLEAR))
    assert roster.opened(inner, 6)[1] == []
    rows = {party: row.clone().index_fill(0, torch.tensor([column]), value) for party, row in rows.items()}
    with pytest.raises(RoundFailed, match="all refused"):
        channel.collect(list(rows), intake(9), wire(channel, rows))


@pytest.mark.parametrize("column", [0, 1])
def test_a_row_that_is_not_whole_is_refused_by_a_channel_of_whole_numbers(column, wire, gaussian, intake):
    channel = Selective(PairwiseMasks(clients=4), PROTECTED)
    sent = coded(gaussian(4, 9))
    sent[6].rows[0, column] += 0.5
    view = channel.collect(list(sent), intake(9, codecs=CODEC), wire(channel, sent))
    assert (view.ids, view.bad) == ((3, 9, 12), 1)


@pytest.mark.parametrize("width", [0, 1, 8, 10])
def test_a_row_of_another_width_is_left_out_and_counted(width, wire, gaussian, intake):
    rows = {**gaussian(3, 9), 100: torch.zeros(width)}
    view = TOY.collect(list(rows), intake(9), wire(TOY, rows))
    assert (view.ids, view.bad) == ((3, 6, 9), 1)


@pytest.mark.parametrize("stage", ["hello", "update"])
@pytest.mark.parametrize(
    "broken",
    [
        pytest.param(lambda reply: b"", id="empty"),
        pytest.param(lambda reply: reply[:-1], id="one byte short"),
        pytest.param(lambda reply: reply + b"\0", id="one byte long"),
        pytest.param(lambda reply: bytes(range(256)) * 16, id="garbage"),
        pytest.param(lambda reply: reply[:150] + bytes([reply[150] ^ 1]) + reply[151:], id="one bit"),
    ],
)
def test_a_broken_reply_is_left_out_and_counted(stage, broken, wire, gaussian, intake):
    rows = gaussian(4, 9)

    def change(party, reply):
        return broken(reply) if (party, line.sent[-1][0]) == (6, stage) else reply

    line = wire(TOY, rows, change=change)
    view = TOY.collect(list(rows), intake(9), line)
    assert (view.ids, view.bad) == ((3, 9, 12), 1)
    torch.testing.assert_close(view.total(), rows[3] + rows[9] + rows[12], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("stage", ["shares", "masked"])
def test_second_answers_and_strangers_count_as_in_the_inner_channel(stage, wire, gaussian, intake):
    rows = coded(gaussian(5, 9))
    for trouble in ({"twice": {stage: {6}}}, {"strangers": {stage: 77}}):
        alone, both = PairwiseMasks(clients=5), Selective(PairwiseMasks(clients=5), PROTECTED)
        found = [one.collect(list(rows), intake(9, codecs=CODEC), wire(one, rows, **trouble)) for one in (alone, both)]
        assert found[0].bad == found[1].bad > 0
        assert found[0].ids == found[1].ids
        assert torch.equal(found[0].total(), found[1].total())


def test_a_second_clear_part_does_not_take_the_firsts_place(wire, gaussian, intake, roster):
    rows = gaussian(4, 9)

    class Doubling(Exchange):
        def __init__(self, below):
            self.below, self.server = below, below.server

        def __call__(self, stage, requests):
            for party, reply in self.below(stage, requests):
                yield party, reply
                if (party, stage) == (6, "update"):
                    head, (inner, clear) = roster.opened(reply, 6)
                    yield party, roster.sealed(head, [inner, bytes(len(clear))], 6)

    view = TOY.collect(list(rows), intake(9), Doubling(wire(TOY, rows)))
    assert (view.ids, view.bad) == ((3, 6, 9, 12), 1)
    torch.testing.assert_close(view.total(), sum(rows.values()), rtol=1e-6, atol=1e-6)


def tampered(rows, wire, intake, how):
    """A round in which client 6's update is `how(inner, clear)` -> the message."""

    def change(party, reply):
        if party != 6 or line.sent[-1][0] != "update":
            return reply
        header, parts = Link(line.server, 6).open(reply)
        return how(header, *parts)

    line = wire(TOY, rows, change=change)
    return TOY.collect(list(rows), intake(9), line)


@pytest.mark.parametrize(
    "clear",
    [
        pytest.param(torch.full((6,), torch.nan).numpy().tobytes(), id="NaN"),
        pytest.param(torch.full((6,), torch.inf).numpy().tobytes(), id="inf"),
        pytest.param(torch.zeros(5).numpy().tobytes(), id="too few"),
        pytest.param(torch.zeros(600_000).numpy().tobytes(), id="too many"),
        pytest.param(bytes(23), id="no whole number of them"),
        pytest.param(b"", id="none"),
    ],
)
def test_a_clear_part_that_cannot_be_is_left_out_with_the_other_one(clear, wire, gaussian, intake, roster):
    rows = gaussian(4, 9)
    view = tampered(rows, wire, intake, lambda head, inner, _: roster.sealed(head, [inner, clear], 6))
    assert (view.ids, view.bad) == ((3, 9, 12), 1)


def test_whoever_carries_messages_cannot_take_the_clear_part_away(wire, gaussian, intake):
    """The inner message is whole by itself, and sealed by the client: alone it is refused all the same."""
    view = tampered(gaussian(4, 9), wire, intake, lambda head, inner, clear: inner)
    assert (view.ids, view.bad) == ((3, 9, 12), 1)


def test_a_client_that_sends_no_clear_part_counts_as_zeros_there(wire, gaussian, intake, roster):
    rows = gaussian(4, 9)
    view = tampered(rows, wire, intake, lambda head, inner, clear: roster.sealed(replace(head, length=0), [inner], 6))
    assert (view.ids, view.bad) == ((3, 6, 9, 12), 0)
    held = rows[6].clone()
    held[IN_CLEAR] = 0
    torch.testing.assert_close(view.total(), rows[3] + held + rows[9] + rows[12], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("parts", [0, 3])
def test_other_numbers_of_parts_are_left_out(parts, wire, gaussian, intake, roster):
    view = tampered(gaussian(4, 9), wire, intake, lambda head, *both: roster.sealed(head, [*both, b""][:parts], 6))
    assert (view.ids, view.bad) == ((3, 9, 12), 1)


def test_parties_that_disagree_on_what_is_protected_are_not_added(wire, gaussian, intake):
    """Same widths, other columns: nothing but the fingerprint could tell."""
    rows = gaussian(4, 9)
    line = wire(Selective(Adding(), ((0, 2), (8, 9))), rows)
    view = TOY.collect(list(rows), intake(9), line)
    assert (view.ids, view.bad) == ((), 4)


def test_a_weight_that_the_server_does_not_expect_is_left_out(wire, gaussian, intake):
    rows = gaussian(4, 9)
    sent = {party: Encoded(0.5 * row[None], {}, 0.5 if party != 6 else 1.0) for party, row in rows.items()}
    asked = replace(intake(9), weights=dict.fromkeys(rows, 0.5))
    view = TOY.collect(list(rows), asked, wire(TOY, sent))
    assert (view.ids, view.bad) == ((3, 9, 12), 1)
    torch.testing.assert_close(view.total(), (rows[3] + rows[9] + rows[12]) / 2, rtol=1e-6, atol=1e-6)


def test_floors_are_the_inner_channels(wire, gaussian, intake):
    rows = gaussian(4, 9)
    assert TOY.with_floor(5) == Selective(Adding(smallest_release=5), PROTECTED)
    with pytest.raises(TooFewClients):
        TOY.with_floor(5).collect(list(rows), intake(9), wire(TOY.with_floor(5), rows))
    with pytest.raises(TooFewClients):
        TOY.collect(list(rows), replace(intake(9), least_answers=5), wire(TOY, rows))


@pytest.mark.parametrize(
    ("codec", "message"),
    [(Mixed(), "mixes protected columns with clear ones"), (Wider(), "sends 9 columns as 10")],
    ids=["mixed", "wider"],
)
def test_a_codec_that_does_not_keep_columns_apart_is_refused(codec, message, wire, gaussian, intake):
    with pytest.raises(InvalidArgument, match=message):
        TOY.collect([1, 2], intake(9, codecs=codec), wire(TOY, {}))


# What is refused, and what is said


@pytest.mark.parametrize(
    ("channel", "protected", "message"),
    [
        (Plaintext(), PROTECTED, "Plaintext reveals EACH of what it should protect"),
        (TOY, PROTECTED, "channel=Selective: expected the channel for all protected columns"),
        (Adding(), (), "at least one pair"),
        (Adding(), ((1, 2, 3),), "at least one pair"),
        (Adding(), ((0.5, 2.0),), "at least one pair"),
        (Adding(), ((-1, 2),), "0 <= lo < hi, sorted and disjoint"),
        (Adding(), ((3, 3),), "0 <= lo < hi, sorted and disjoint"),
        (Adding(), ((3, 2),), "0 <= lo < hi, sorted and disjoint"),
        (Adding(), ((4, 6), (0, 2)), "0 <= lo < hi, sorted and disjoint"),
        (Adding(), ((0, 4), (3, 6)), "0 <= lo < hi, sorted and disjoint"),
    ],
    ids=["each", "twice", "none", "three", "halves", "negative", "empty", "turned", "unsorted", "overlap"],
)
def test_what_does_not_fit_is_refused(channel, protected, message):
    with pytest.raises(InvalidArgument, match=message):
        Selective(channel, protected)


def test_ranges_may_touch_and_must_lie_within_an_update(wire, gaussian, intake):
    rows = gaussian(3, 9)
    channel = Selective(Adding(), ((0, 2), (2, 5)))
    assert channel.unprotected(10) == 0.5
    view = channel.collect(list(rows), intake(9), wire(channel, rows))
    torch.testing.assert_close(view.total(), sum(rows.values()), rtol=1e-6, atol=1e-6)
    with pytest.raises(InvalidArgument, match="protected reaches to column 10, an update has 9"):
        Selective(Adding(), ((4, 10),)).collect([1, 2], intake(9), wire(TOY, {}))


def test_it_says_what_it_leaves_open():
    channel = Selective(CKKS(bound=1.0, clients=8), PROTECTED)
    assert channel.unprotected(9) == pytest.approx(6 / 9)
    assert channel.learns.keys() == {"server", "key holder", "clients", "trust"}
    assert "every client's values in all but the protected columns" in channel.learns["server"]
    assert not channel.noises
    assert channel.grid is None  # of what is in the clear: float32
    assert Selective(BFV(clients=8, bits=16), PROTECTED).grid == 1.0
    with pytest.raises(InvalidArgument):
        channel.with_noise(1.0, 1.0)
    assert channel.facts(9, 8)["protected"] == "3 of 9 values, in 2 ranges"


@pytest.mark.parametrize("inner", [Adding(), PairwiseMasks(clients=4)], ids=["toy", "masks"])
def test_stages_once_and_in_order_and_memory_not_mutated(inner, wire, gaussian, intake, roster):
    channel = Selective(inner, PROTECTED)
    line = wire(channel, coded(gaussian(4, 9)))
    channel.collect(list(line.rows), intake(9, codecs=CODEC), line).total()
    assert [stage for stage, party, _ in line.received if party == 3] == list(channel.client_stages)
    with pytest.raises(InvalidArgument, match="repeated, out of order"):
        channel.answer(roster.party(3), channel.client_stages[1], line.memories[3], b"", lambda: line.update(3))
    memory = {"mine": b"kept"}
    request = next(content for _, party, content in line.sent if party == 3)
    after, reply = channel.answer(roster.party(3), channel.client_stages[0], memory, request, lambda: line.update(3))
    assert memory == {"mine": b"kept"}
    assert isinstance(reply, bytes)
    assert all(isinstance(value, bytes) for value in after.values())


def test_a_number_in_the_clear_costs_four_bytes(wire, gaussian, intake, roster):
    """Eight where the inner channel's whole numbers do not fit into four. Beyond the edge a row is refused."""
    codec = FixedPoint(bound=2.0**16, bits=16)
    for bits, size in ((20, 4), (32, 4), (33, 8)):
        channel = Selective(PairwiseMasks(clients=4, modulus_bits=bits), PROTECTED)
        rows = {i: torch.full((9,), 2.0**16, dtype=torch.float64) for i in range(4)}
        rows[3][0] = channel.largest_coordinate
        line = wire(channel, rows)
        view = channel.collect(list(rows), intake(9, codecs=codec), line)
        assert len(roster.opened(line.replies("masked")[2], 2)[1][1]) == size * len(IN_CLEAR)
        assert view.total()[0] == 3 * 2.0**16 + channel.largest_coordinate
        rows[3][0] += 1
        assert channel.collect(list(rows), intake(9, codecs=codec), wire(channel, rows)).bad == 1


# Which columns


LAYOUT = Layout.of(
    {"layers.0.weight": torch.zeros(2, 3), "layers.0.bias": torch.zeros(2), "head.weight": torch.zeros(4, 2)}
)


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["head.*"], ((0, 8),)),
        (["*.bias"], ((8, 10),)),
        (["layers.0.*"], ((8, 16),)),
        (["*.weight"], ((0, 8), (10, 16))),
        (["head.weight", "layers.?.bias"], ((0, 10),)),
        (["*"], ((0, 16),)),
    ],
    ids=["head", "bias", "layer", "two", "touching", "all"],
)
def test_columns_by_name(patterns, expected):
    """Names are sorted: head.weight, layers.0.bias, layers.0.weight."""
    assert by_name(LAYOUT, patterns) == expected


def test_a_pattern_that_matches_nothing_is_refused():
    with pytest.raises(InvalidArgument, match=r"'head.wieght' matches no parameter; did you mean 'head.weight'\?"):
        by_name(LAYOUT, ["*.bias", "head.wieght"])
    with pytest.raises(InvalidArgument, match="'HEAD"):
        by_name(LAYOUT, ["HEAD.*"])


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.floats(0.01, 1.0))
def test_columns_by_sensitivity_are_the_highest_and_the_first_of_equals(scores, share):
    columns = [column for lo, hi in by_sensitivity(torch.tensor(scores).float(), share) for column in range(lo, hi)]
    slow = sorted(range(len(scores)), key=lambda column: (-scores[column], column))
    count = next(k for k in range(1, len(scores) + 1) if k >= share * len(scores) - 1e-9)
    assert columns == sorted(slow[:count])


def test_a_share_that_binary_numbers_miss_is_not_rounded_up():
    """0.07 * 100 is a little more than 7 in floating point; a third of 10 is more than 3 indeed."""
    assert by_sensitivity(torch.arange(100.0), 0.07) == ((93, 100),)
    assert by_sensitivity(torch.arange(10.0), 1 / 3) == ((6, 10),)


def test_ranges_are_disjoint_and_as_long_as_can_be():
    ranges = by_sensitivity(torch.rand(1000, generator=Generator().manual_seed(0)), 0.3)
    assert sum(hi - lo for lo, hi in ranges) == 300
    assert all(before[1] < after[0] for before, after in pairwise(ranges))
    Selective(Adding(), ranges)


@pytest.mark.parametrize(
    ("scores", "share", "message"),
    [
        (torch.tensor([1.0, torch.nan]), 0.5, "finite"),
        (torch.zeros(2, 2), 0.5, "shape"),
        (torch.zeros(0), 0.5, "shape"),
        (torch.zeros(2), 0.0, "share=0.0"),
        (torch.zeros(2), 1.1, "share=1.1"),
    ],
    ids=["NaN", "matrix", "none", "nothing", "more than all"],
)
def test_scores_that_say_nothing_are_refused(scores, share, message):
    with pytest.raises(InvalidArgument, match=message):
        by_sensitivity(scores, share)


def test_scattered_columns_cost_no_time_a_range(wire, intake):
    """A million columns, every second one protected: half a million ranges. Cost must not be a loop over them."""
    d = 1_000_000
    ranges = tuple((lo, lo + 1) for lo in range(0, d, 2))
    channel = Selective(Adding(), ranges)
    rows = {i: torch.full((d,), float(i)) for i in (1, 2)}
    view = channel.collect([1, 2], intake(d), wire(channel, rows))
    assert torch.equal(view.total(), torch.full((d,), 3.0))
    assert channel.unprotected(d) == 0.5


# What a reconstruction attack gets from the rest


def rebuilt(gradient: torch.Tensor, classes: int, width: int) -> torch.Tensor:
    """An input of a fully connected layer from one example's gradient `(classes (width + 1),)`, bias first.

    x = dL/dW_i / dL/db_i for every output i (Phong et al., "Privacy-preserving deep learning via additively
    homomorphic encryption", 2018, section 3); where both are known for several outputs, the largest |dL/db_i| counts.
    What is not known is taken as 0, the mean of the inputs.
    """
    bias, weight = gradient[:classes], gradient[classes:].reshape(classes, width)
    order = bias.abs().nan_to_num(-1).argsort()
    found = torch.zeros(width)
    for i in order.tolist():
        estimate = weight[i] / bias[i]
        found = torch.where(estimate.isfinite(), estimate, found)
    return found


CLASSES, WIDTH = 4, 64


def served(protected, wire, intake):
    """What the server rebuilds of each of three clients' single examples: relative errors, and the examples."""
    layout = Layout.of({"bias": torch.zeros(CLASSES), "weight": torch.zeros(CLASSES, WIDTH)})
    generator = Generator().manual_seed(3)
    inputs, labels = torch.randn(3, WIDTH, generator=generator), [0, 2, 3]
    parameters = torch.randn(layout.d, generator=generator) * 0.1
    rows = {}
    for client, (x, label) in enumerate(zip(inputs, labels, strict=True)):
        own = {name: value.clone().requires_grad_() for name, value in layout.unflatten(parameters).items()}
        cross_entropy((own["weight"] @ x + own["bias"])[None], torch.tensor([label])).backward()
        rows[client] = layout.flatten({name: value.grad for name, value in own.items()})
    if protected is None:
        seen = Plaintext().collect([0, 1, 2], intake(layout.d, Reveals.EACH), wire(Plaintext(), rows)).rows
    else:
        channel = Selective(Adding(), protected)
        seen = channel.collect([0, 1, 2], intake(layout.d), wire(channel, rows)).clear
    found = torch.stack([rebuilt(row, CLASSES, WIDTH) for row in seen])
    errors = (found - inputs).norm(dim=1) / inputs.norm(dim=1)
    exact = ((found - inputs).abs() < 1e-4).float().mean(1)
    return errors, exact, seen, labels


def test_a_classifier_in_the_clear_gives_its_input_away_exactly(wire, intake):
    errors, exact, _, _ = served(None, wire, intake)
    assert errors.max() < 1e-5
    assert exact.min() == 1.0


def test_a_protected_classifier_gives_nothing(wire, intake):
    errors, exact, seen, _ = served(((0, CLASSES * (WIDTH + 1)),), wire, intake)
    assert seen.isnan().all()
    assert errors.tolist() == [1.0, 1.0, 1.0]
    assert exact.max() < 0.05


def test_one_value_in_the_clear_gives_the_label_away(wire, intake):
    """All weights are protected, no input is found; dL/db_i < 0 holds for the true class alone."""
    errors, _, seen, labels = served(((CLASSES, CLASSES * (WIDTH + 1)),), wire, intake)
    assert errors.tolist() == [1.0, 1.0, 1.0]
    assert seen[:, :CLASSES].argmin(1).tolist() == labels


def test_half_of_the_classifier_protected_gives_nearly_all_away(wire, intake):
    """Each input coordinate stands in the gradient c times: 1 - s^c of them are read exactly, 15/16 for half of 4."""
    scores = torch.rand(CLASSES * WIDTH, generator=Generator().manual_seed(5))
    ranges = tuple((lo + CLASSES, hi + CLASSES) for lo, hi in by_sensitivity(scores, 0.5))
    errors, exact, seen, _ = served(ranges, wire, intake)
    assert seen[:, CLASSES:].isnan().float().mean() == 0.5
    hidden = seen[0, CLASSES:].reshape(CLASSES, WIDTH).isnan().all(0).float().mean()
    assert torch.allclose(1 - exact, hidden.expand(3))
    assert abs(float(exact[0]) - 15 / 16) < 4 * (15 / 16 / 16 / WIDTH) ** 0.5
    assert errors.max() < 0.5
