"""Sums under a one-time pad: exact or within the stated error, and closed to whoever has not the sum of the keys."""

import pickle
from dataclasses import replace
from math import sqrt

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2

from privfm.checks import (
    BrokenEnvelope,
    Corrupt,
    InvalidArgument,
    Replay,
    RoundFailed,
    TooFewClients,
)
from privfm.contracts import SERVER, Encoded, Exchange
from privfm.defenses.channels.envelope import Link
from privfm.defenses.channels.masks import PairwiseMasks
from privfm.defenses.channels.masks.secrets import numbers_to_bytes, tagged, untagged
from privfm.defenses.channels.masks.server import MaskedSum
from privfm.defenses.channels.pad import RLWEPad
from privfm.defenses.channels.pad import channel as pad
from privfm.defenses.channels.pad import parameters as pad_parameters
from privfm.defenses.channels.pad.parameters import CANARIES, most_bits
from privfm.defenses.channels.pad.rlwe import DEGREE, FLIPS, MODULUS, product, ternary, uniform
from privfm.defenses.transforms import FixedPoint

ALPHA = 1e-7  # real entropy: a right result fails once in ten million runs


def pad_for(clients, *, approximate=False, active=False, corrupt=0.0, bits=None, neighbours=None, least=None):
    masks = PairwiseMasks(clients, corrupt, 0.3, modulus_bits=16, active=active, neighbours=neighbours)
    bits = most_bits(clients, approximate=approximate) if bits is None else bits
    return RLWEPad(clients, bits, masks, least or 2 + int(corrupt * clients), approximate)


CHANNEL = pad_for(8)


def whole_rows(n, d, bits, seed=0):
    """n rows of whole numbers up to 2^bits, by client; ids are neither dense nor sorted."""
    generator = np.random.default_rng(seed)
    values = generator.integers(-(2**bits), 2**bits, (n, d), endpoint=True)
    return {3 * (n - i): torch.from_numpy(row.astype(np.float64)) for i, row in enumerate(values)}


def total_of(channel, rows, wire, intake, **options):
    d = len(next(iter(rows.values())))
    return channel.collect(list(rows), intake(d), wire(channel, rows, **options)).total()


def rejects_uniform(words, cells=256):
    counts = np.bincount(words.astype(np.int64) * cells // MODULUS, minlength=cells)
    expected = len(words) / cells
    return chi2.sf(float(((counts - expected) ** 2 / expected).sum()), cells - 1) < ALPHA


# The sum


@pytest.mark.parametrize("d", [1, 2, DEGREE - CANARIES, DEGREE - CANARIES + 1, DEGREE, 2 * DEGREE, 100_000])
def test_the_sum_is_exact_at_every_width(d, wire, intake):
    rows = whole_rows(4, d, 12)
    assert torch.equal(total_of(CHANNEL, rows, wire, intake), sum(rows.values()).float())


@pytest.mark.parametrize(("n", "neighbours"), [(2, None), (3, None), (10, None), (50, 8), (200, 4)])
def test_the_sum_is_exact_for_every_number_of_clients(n, neighbours, wire, intake):
    channel = pad_for(n, neighbours=neighbours)
    rows = whole_rows(n, 20, channel.bits, seed=n)
    assert torch.equal(total_of(channel, rows, wire, intake), sum(rows.values()).float())


def test_the_sum_of_an_active_round_is_exact(wire, intake):
    channel = pad_for(8, active=True, corrupt=0.25)
    assert channel.client_stages == ("keys", "shares", "masked", "confirm", "unmask")
    rows = whole_rows(8, 30, channel.bits)
    assert torch.equal(total_of(channel, rows, wire, intake), sum(rows.values()).float())


@pytest.mark.parametrize("approximate", [False, True])
@pytest.mark.parametrize("signs", ["plus", "minus", "mixed"])
@pytest.mark.parametrize("clients", [2, 9])
def test_the_largest_sums_do_not_wrap(clients, signs, approximate, wire, intake):
    """With every error as large as errors get, and in the direction that hurts."""
    channel = pad_for(clients, approximate=approximate)
    sign = torch.tensor({"plus": [1.0, 1.0], "minus": [-1.0, -1.0], "mixed": [1.0, -1.0]}[signs], dtype=torch.float64)
    rows = dict.fromkeys(range(clients), sign * 2.0**channel.bits)
    worst = np.resize((sign.numpy() * FLIPS).astype(np.int8), 2 + CANARIES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pad_parameters, "centred_binomial", lambda length: worst[:length])
        total = total_of(channel, rows, wire, intake)
    exact = (sum(rows.values()) + sign * channel.parameters.error_bound(clients)).float()
    assert torch.equal(total, exact)
    assert channel.parameters.error_bound(clients) == (FLIPS * clients if approximate else 0)


def test_errors_beyond_the_bound_are_noticed(wire, intake, monkeypatch):
    """Negative control: one more than an error can be, from every client."""
    monkeypatch.setattr(pad_parameters, "centred_binomial", lambda length: np.full(length, FLIPS + 1, np.int8))
    with pytest.raises(RoundFailed, match="what is left is no sum of 4 rows"):
        total_of(CHANNEL, whole_rows(4, 5, 12), wire, intake)


def test_exact_sums_repeat(wire, intake):
    rows = whole_rows(4, 300, 14)
    assert torch.equal(total_of(CHANNEL, rows, wire, intake), total_of(CHANNEL, rows, wire, intake))


@pytest.mark.parametrize(("bits", "clients"), [(23, 10), (26, 10)])
def test_the_error_of_an_approximate_sum_is_as_stated(bits, clients, wire, intake):
    """Rows of zeros: what is released is the error. Rounding adds up to 1/12 to its variance."""
    channel, d = pad_for(clients, approximate=True, bits=bits), 50_000
    errors = total_of(channel, dict.fromkeys(range(clients), torch.zeros(d).double()), wire, intake).double()
    assert float(errors.abs().max()) <= channel.parameters.error_bound(clients)
    rounding = 1 / 12 if channel.parameters.factor > 1 else 0.0

    def agrees(deviation):
        ratio = float(errors.square().mean()) / (deviation**2 + rounding)
        return abs(ratio - 1) < 5.4 * sqrt(2 / d)

    stated = channel.parameters.deviation(clients)
    assert agrees(stated)
    assert not agrees(stated / 2)
    assert not agrees(stated * 2)


def test_a_coarse_approximate_sum_is_exact(wire, intake):
    channel = pad_for(8, approximate=True, bits=5)
    rows = whole_rows(8, 40, 5)
    assert (channel.parameters.error_bound(8), channel.parameters.deviation(8)) == (0, 0.0)
    assert torch.equal(total_of(channel, rows, wire, intake), sum(rows.values()))


def test_with_a_codec_it_is_the_plain_sum(wire, gaussian, intake):
    codec, d, n = FixedPoint(bound=1.0, bits=16), 500, 8
    rows = gaussian(n, d)
    generators = [torch.Generator().manual_seed(i) for i in range(n)]
    encoded, _ = codec.encode(torch.stack(list(rows.values())), {}, generators)
    sent = dict(zip(rows, encoded.rows, strict=True))
    total = pad_for(n, bits=16).collect(list(rows), intake(d, codecs=codec), wire(pad_for(n, bits=16), sent)).total()
    exact = sum(row.double() for row in rows.values())
    assert float((total.double() - exact).norm()) <= codec.error_bound(d, n)


def test_four_bytes_a_parameter(wire, intake):
    rows, d = whole_rows(8, 100_000, 10), 100_000
    line = wire(CHANNEL, rows)
    CHANNEL.collect(list(rows), intake(d), line).total()
    sent = [sum(len(content) for _, party, content in line.received if party == number) for number in rows]
    assert max(sent) <= 4.1 * d
    got = [sum(len(content) for _, party, content in line.sent if party == number) for number in rows]
    assert max(got) < 5000  # no polynomial travels


# Head-room


@given(st.integers(2, 4096), st.booleans())
def test_head_room_is_proved(clients, approximate):
    bits = most_bits(clients, approximate=approximate)
    channel = pad_for(clients, approximate=approximate, bits=bits, neighbours=4)
    assert clients * (channel.parameters.factor * 2**bits + FLIPS) <= (MODULUS - 1) // 2
    if not approximate:
        assert channel.parameters.factor >= 2 * FLIPS * clients + 1  # rounding removes what is under half of it
        assert channel.parameters.error_bound(clients) == 0
    with pytest.raises(InvalidArgument, match=f"have room for {bits}; lower bits"):
        replace(channel, bits=bits + 1)


def test_levels_and_errors_by_hand():
    """K=10: (2^31/2/10 - 21) / 421 = 255,042 levels a side, of which 2^17 are used; approximately, 2^26."""
    channels = pad_for(10), pad_for(10, approximate=True)
    exact, about = (channel.parameters for channel in channels)
    assert (exact.bits, exact.levels, exact.factor, exact.error_bound(10)) == (17, 262_145, 819, 0)
    assert (about.bits, about.factor, about.error_bound(10)) == (26, 1, 210)
    assert about.deviation(10) == pytest.approx(sqrt(105))
    assert [channel.grid for channel in channels] == [1.0, None]
    assert [channel.error_bound(100, 10) for channel in channels] == [0.0, 2100.0]


def test_what_is_printed_before_a_run():
    exact, about = (pad_for(10, approximate=approximate).facts(1000, 10) for approximate in (False, True))
    assert exact["levels of a value"] == "262145; head-room proved for 10 clients"
    assert exact["sum"] == "exact"
    assert about["sum"] == "error at most 210, deviation 10.2, in steps of the codec"
    assert exact["bytes of a row"].startswith("4032,")
    assert "no reduction proved; estimate 177 bits (classical) with 2 honest clients" in exact["security"]


# Drop-outs and limits


@pytest.mark.parametrize("stage", ["keys", "shares", "masked"])
def test_drop_outs_are_left_out_of_rows_and_keys(stage, wire, intake):
    rows = whole_rows(8, 100, 13)
    line = wire(CHANNEL, rows, lost={stage: {6, 24}})
    view = CHANNEL.collect(list(rows), intake(100), line)
    assert (view.ids, view.bad) == ((3, 9, 12, 15, 18, 21), 0)
    assert torch.equal(view.total(), sum(rows[i] for i in view.ids).float())


def test_drop_outs_before_unmasking_stay_in_the_sum(wire, intake):
    rows = whole_rows(8, 100, 13)
    view = CHANNEL.collect(list(rows), intake(100), wire(CHANNEL, rows, lost={"unmask": {6, 24}}))
    assert torch.equal(view.total(), sum(rows.values()).float())


def test_drop_outs_at_every_stage_of_an_active_round(wire, intake):
    channel = pad_for(10, active=True, corrupt=0.1)
    rows = whole_rows(10, 10, channel.bits)
    line = wire(channel, rows, lost={"masked": {6}, "confirm": {9}, "unmask": {12}})
    view = channel.collect(list(rows), intake(10), line)
    assert torch.equal(view.total(), sum(rows[i] for i in rows if i != 6).float())


def test_nobody_answers(wire, intake):
    rows = whole_rows(4, 5, 3)
    view = CHANNEL.collect(list(rows), intake(5), wire(CHANNEL, rows, lost={"keys": set(rows)}))
    assert (view.n, view.bad) == (0, 0)
    assert torch.equal(view.total(), torch.zeros(5))
    assert torch.equal(CHANNEL.collect([], intake(5), wire(CHANNEL, {})).total(), torch.zeros(5))


def test_a_single_row_stays_closed(wire, intake):
    rows = whole_rows(3, 5, 3)
    with pytest.raises(TooFewClients):
        CHANNEL.collect(list(rows), intake(5), wire(CHANNEL, rows, lost={"keys": {3, 6}}))


def test_fewer_than_the_plan_needs_stay_closed(wire, intake):
    rows = whole_rows(8, 5, 3)
    with pytest.raises(TooFewClients, match="least_answers=7: 6"):
        CHANNEL.collect(list(rows), replace(intake(5), least_answers=7), wire(CHANNEL, rows, lost={"masked": {3, 6}}))


def test_a_floor_is_kept_by_server_and_clients(wire, intake):
    channel, rows = CHANNEL.with_floor(7), whole_rows(8, 5, 3)
    assert (channel.smallest_release, CHANNEL.with_floor(1).smallest_release) == (7, 2)
    with pytest.raises(TooFewClients, match="smallest_release=7"):
        channel.collect(list(rows), intake(5), wire(channel, rows, lost={"masked": {3, 6}}))
    assert channel._key_sums.smallest_release == 7  # so that clients refuse by themselves: see its own tests


def test_more_clients_than_head_room(wire, intake):
    rows = whole_rows(9, 5, 3)
    with pytest.raises(RoundFailed, match="clients=8: a cohort of 9"):
        CHANNEL.collect(list(rows), intake(5), wire(CHANNEL, rows))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 0.5, 2.0**CHANNEL.bits + 1, -1e300])
def test_what_does_not_fit_is_refused_by_its_client(value, wire, intake):
    rows = whole_rows(4, 5, 12)
    rows[6][2] = value
    view = CHANNEL.collect(list(rows), intake(5), wire(CHANNEL, rows))
    assert (view.ids, view.bad) == ((3, 9, 12), 1)
    assert torch.equal(view.total(), sum(rows[i] for i in view.ids).float())


def test_if_nothing_fits_the_way_out_is_named(wire, intake):
    rows = {i: torch.full((5,), 0.5).double() for i in range(4)}
    with pytest.raises(RoundFailed, match="put a codec of whole numbers before the channel"):
        CHANNEL.collect(list(rows), intake(5), wire(CHANNEL, rows))


def test_weights_are_compared(wire, intake):
    plain = whole_rows(4, 5, 12)
    rows = {i: Encoded(row[None], {}, weight=2.0 if i == 6 else 0.5) for i, row in plain.items()}
    channel_intake = replace(intake(5), weights=dict.fromkeys(plain, 0.5))
    view = CHANNEL.collect(list(rows), channel_intake, wire(CHANNEL, rows))
    assert (view.ids, view.bad) == ((3, 9, 12), 1)
    assert torch.equal(view.total(), sum(plain[i] for i in view.ids).float())


def test_side_information_cannot_travel(wire, intake):
    rows = {i: Encoded(torch.ones(1, 5).double(), {"scale": torch.ones(1)}) for i in range(4)}
    with pytest.raises(InvalidArgument, match="use Plaintext"):
        CHANNEL.collect(list(rows), intake(5), wire(CHANNEL, rows))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"bits": -1}, "bits=-1"),
        ({"smallest_release": 1}, "smallest_release=1"),
        ({"clients": 1}, "clients=1"),
        ({"clients": 9}, "masks: 8 clients"),
        ({"masks": PairwiseMasks(200, modulus_bits=8), "clients": 128, "bits": 1, "smallest_release": 30}, "modulus"),
        ({"masks": PairwiseMasks(8, corrupt=0.3), "smallest_release": 3}, "expected at least 4, so that two honest"),
        ({"masks": PairwiseMasks(5000, 0.0, neighbours=4), "clients": 4097, "bits": 0}, "exact up to 4096"),
    ],
)
def test_parameters_without_a_guarantee_are_refused(arguments, reason):
    with pytest.raises(InvalidArgument, match=reason):
        replace(CHANNEL, **arguments)


def test_what_is_stated():
    assert round(CHANNEL.security.bits) == 177
    assert "research" in CHANNEL.learns["trust"]
    assert "177 bits" in CHANNEL.learns["trust"]
    assert "sums of rows, of one-time keys and of errors" in CHANNEL.learns["server"]
    assert round(replace(CHANNEL, smallest_release=5).security.bits) > 230


# Broken, forged and replayed messages of clients


def collect_with(change, wire, intake, roster, d=50, channel=CHANNEL):
    """One round in which client 6 sends `change(header, parts)` in place of its padded row."""
    rows = whole_rows(4, d, 12)

    def changed(party, reply):
        if party != 6:
            return reply
        header, parts = roster.opened(reply, party)
        return change(header, parts) if header.scheme == "pad" else reply

    view = channel.collect(list(rows), intake(d), wire(channel, rows, change=changed))
    assert (view.ids, view.bad) == ((3, 9, 12), 1)
    assert torch.equal(view.total(), sum(rows[i] for i in view.ids).float())


@pytest.mark.parametrize(
    "change",
    [
        {"scheme": "masks"},
        {"parameters": b"other parameters"},
        {"key": b"another key....."},
        {"stage": "keys"},
        {"length": 49},
        {"length": 2**60},
        {"clients": 2},
        {"clients": 0},
        {"scale": 1.0},
        {"weight": 2.0},
    ],
    ids=str,
)
def test_a_forged_header_is_left_out(change, wire, intake, roster):
    collect_with(lambda header, parts: roster.sealed(replace(header, **change), parts, 6), wire, intake, roster)


@pytest.mark.parametrize(
    "change",
    [
        lambda masked, words: [masked, words[:-4]],
        lambda masked, words: [masked, words + bytes(4)],
        lambda masked, words: [masked, words[:-1]],
        lambda masked, words: [masked, b""],
        lambda masked, words: [masked],
        lambda masked, words: [masked, words, b""],
        lambda masked, words: [masked, words[:-4] + MODULUS.to_bytes(4, "little")],
        lambda masked, words: [masked, words[:-4] + b"\xff" * 4],
        lambda masked, words: [b"", words],
        lambda masked, words: [masked[:-1], words],
        lambda masked, words: [bytes(len(masked)), words],
        lambda masked, words: [masked[:2100] + bytes([masked[2100] ^ 1]) + masked[2101:], words],
        lambda masked, words: [words, masked],
    ],
)
def test_what_is_no_padded_row_is_left_out(change, wire, intake, roster):
    """With the code of its sender: row and key are added together or not at all."""
    collect_with(lambda header, parts: roster.sealed(header, change(*parts), 6), wire, intake, roster)


def test_a_row_whose_key_its_client_refuses_is_left_out(wire, intake, roster):
    """A malicious client that pads its row and then sends the masks the refusal that honest ones have no use for."""

    def change(header, parts):
        inner, _ = roster.opened(parts[0], 6)
        return roster.sealed(header, [roster.sealed(replace(inner, clients=0), [], 6), parts[1]], 6)

    collect_with(change, wire, intake, roster)


@pytest.mark.parametrize("flips", range(30))
def test_flipped_bits_are_left_out(flips, wire, intake, roster):
    def change(header, parts):
        message = bytearray(roster.sealed(header, parts, 6))
        message[np.random.default_rng(flips).integers(len(message))] ^= 1 << flips % 8
        return bytes(message)

    collect_with(change, wire, intake, roster)


@pytest.mark.parametrize("cut", [0, 1, 40, 200, -1, -33])
def test_cut_off_messages_are_left_out(cut, wire, intake, roster):
    collect_with(lambda header, parts: roster.sealed(header, parts, 6)[:cut], wire, intake, roster)


def test_messages_of_another_round_or_client_are_left_out(wire, intake, roster):
    rows = whole_rows(4, 50, 12)
    last = wire(CHANNEL, rows, round=1)
    CHANNEL.collect(list(rows), intake(50), last)
    collect_with(lambda header, parts: last.replies("masked")[6], wire, intake, roster)
    same = wire(CHANNEL, rows)
    CHANNEL.collect(list(rows), intake(50), same)
    collect_with(lambda header, parts: same.replies("masked")[6], wire, intake, roster)  # other polynomials
    collect_with(lambda header, parts: same.replies("masked")[9], wire, intake, roster)


class Twice(Exchange):
    """Delivers some messages of one client twice; one of the copies may have been changed on the way."""

    def __init__(self, below, stage, party, first=bytes, second=bytes):
        self.below, self.stage, self.party, self.server = below, stage, party, below.server
        self.first, self.second = first, second

    def __call__(self, stage, requests):
        for party, reply in self.below(stage, requests):
            twice = (stage, party) == (self.stage, self.party)
            yield party, self.first(reply) if twice else reply
            if twice:
                yield party, self.second(reply)


def cut_off(reply):
    return reply[:-1]


@pytest.mark.parametrize("stage", ["keys", "masked"])
@pytest.mark.parametrize(
    "copies", [(bytes, bytes), (cut_off, bytes), (bytes, cut_off)], ids=["same", "first", "second"]
)
def test_of_two_deliveries_the_sound_one_counts_once(stage, copies, wire, intake):
    rows = whole_rows(4, 50, 12)
    view = CHANNEL.collect(list(rows), intake(50), Twice(wire(CHANNEL, rows), stage, 6, *copies))
    assert (view.ids, view.bad) == ((3, 6, 9, 12), 1)
    assert torch.equal(view.total(), sum(rows.values()).float())


def test_a_row_out_of_range_ends_the_round(wire, intake, roster):
    """A malicious client adds what it likes as long as the sum is in range; beyond that it is noticed."""

    def change(party, reply):
        header, parts = roster.opened(reply, party)
        if party != 6 or header.scheme != "pad":
            return reply
        words = np.frombuffer(parts[1], "<u4").astype(np.int64)
        words[0] += (CHANNEL.parameters.factor << CHANNEL.bits) * 5
        return roster.sealed(header, [parts[0], (words % MODULUS).astype("<u4").tobytes()], 6)

    rows = {i: torch.zeros(5).double() for i in (3, 6, 9)}
    with pytest.raises(RoundFailed, match="no sum of 3 rows"):
        CHANNEL.collect(list(rows), intake(5), wire(CHANNEL, rows, change=change)).total()


@pytest.mark.parametrize("approximate", [False, True])
@pytest.mark.parametrize("place", [0, DEGREE - 1])
def test_a_key_sum_that_is_off_by_one_is_noticed(place, approximate, wire, intake, monkeypatch):
    right = MaskedSum.open

    def wrong(self):
        key = right(self)
        key[place] += 1 if key[place] <= 0 else -1
        return key

    monkeypatch.setattr(MaskedSum, "open", wrong)
    with pytest.raises(RoundFailed, match="a wrong key sum"):
        total_of(pad_for(8, approximate=approximate), whole_rows(4, 5, 12), wire, intake)


def test_a_key_sum_beyond_the_clients_is_noticed(wire, intake, monkeypatch):
    monkeypatch.setattr(MaskedSum, "open", lambda self: np.full(DEGREE, 5))
    with pytest.raises(RoundFailed, match="a wrong key sum"):
        total_of(CHANNEL, whole_rows(4, 5, 12), wire, intake)


def padded_sum(parameters, keys, numbers):
    """Rows under pads, added up as the server does, and the sum of their keys."""
    rows = [np.frombuffer(parameters.padded(numbers, key, b"seed"), "<u4") for key in keys]
    return sum(row.astype(np.uint64) for row in rows), sum(key.astype(np.int64) for key in keys)


@pytest.mark.parametrize("approximate", [False, True])
def test_a_sum_of_fewer_rows_than_said_is_noticed(approximate):
    """Its canaries count."""
    parameters = pad_for(8, approximate=approximate).parameters
    padded, key = padded_sum(parameters, [ternary(DEGREE) for _ in range(3)], np.array([5, -7]))
    error = np.abs(parameters.opened(padded, key, b"seed", 3) - [15, -21])
    assert error.max() <= parameters.error_bound(3)
    for n in (2, 4):
        with pytest.raises(RoundFailed, match=f"no sum of {n} rows"):
            parameters.opened(padded, key, b"seed", n)


@pytest.mark.parametrize("size", [2, 5000])
def test_a_key_sum_beyond_its_clients_is_noticed(size):
    """Although it fits the row: one client's key was not ternary."""
    parameters = pad_for(8).parameters
    padded, key = padded_sum(parameters, [np.ones(DEGREE, np.int8)] * 2, np.array([5, -7]))
    wrong = key + np.eye(1, DEGREE, dtype=np.int64)[0] * size
    fitting = (padded.astype(np.int64) + size * uniform(b"seed", len(padded)).astype(np.int64)) % MODULUS
    with pytest.raises(RoundFailed, match="no sum of 2 rows"):
        parameters.opened(fitting.astype(np.uint64), wrong, b"seed", 2)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_remainder_beyond_the_errors_is_noticed(sign, monkeypatch):
    """In an exact sum every number is a canary: 21 n is an error, one more is none."""
    parameters = pad_for(8).parameters
    monkeypatch.setattr(pad_parameters, "centred_binomial", lambda length: np.full(length, sign * FLIPS, np.int8))
    padded, key = padded_sum(parameters, [ternary(DEGREE) for _ in range(3)], np.array([5, -7]))
    assert parameters.opened(padded, key, b"seed", 3).tolist() == [15, -21]
    padded[0] += np.uint64(MODULUS + sign)
    with pytest.raises(RoundFailed, match="no sum of 3 rows"):
        parameters.opened(padded, key, b"seed", 3)


# What a server may try


def client_before(stage, wire, intake, channel=CHANNEL, party=6, d=50):
    """A client's memory before a stage, and what the server then asked it."""
    rows = whole_rows(4, d, 12)
    seen = {}

    class Watched(wire):
        def __call__(self, at, requests):
            if at == stage:
                seen["memory"], seen["request"] = dict(self.memories[party]), requests[party]
            return super().__call__(at, requests)

    channel.collect(list(rows), intake(d), Watched(channel, rows)).total()
    return seen["memory"], seen["request"], lambda: Encoded(rows[party][None], {})


def refuses(kind, reason, roster, memory, request, update, stage="masked"):
    with pytest.raises(kind, match=reason):
        CHANNEL.answer(roster.party(6), stage, memory, request, update)


def test_a_server_cannot_choose_the_transcript(wire, intake, roster):
    memory, request, update = client_before("masked", wire, intake)
    _, (asked, transcript) = roster.opened(request, SERVER, 6)
    marks = untagged(transcript, 16)
    assert CHANNEL.answer(roster.party(6), "masked", memory, request, update)[1]  # the honest request passes
    others = {party: mark for party, mark in marks.items() if party != 6}
    for forged in (
        b"",
        tagged(others.items()),
        tagged({**marks, 6: bytes(16)}.items()),
        tagged({6: b"x" * 16}.items()),
    ):
        sealed = roster.sealed(CHANNEL.header(forged), [asked, forged], SERVER, 6)
        refuses(Corrupt, "the round is not one in which client 6", roster, memory, sealed, update)
    twice = transcript + transcript
    sealed = roster.sealed(CHANNEL.header(twice), [asked, twice], SERVER, 6)
    refuses(Corrupt, "named twice", roster, memory, sealed, update)


def test_a_server_cannot_send_polynomials(wire, intake, roster):
    """Not a = 0, nor any other: no message has a place for them, and one part more is refused."""
    memory, request, update = client_before("masked", wire, intake)
    header, parts = roster.opened(request, SERVER, 6)
    sealed = roster.sealed(header, [*parts, bytes(4 * DEGREE)], SERVER, 6)
    refuses(BrokenEnvelope, "masked message with", roster, memory, sealed, update)


def test_other_transcripts_rounds_and_parameters_have_unrelated_polynomials():
    seeds = {CHANNEL._seed(transcript, now) for transcript in (b"", b"a", b"b") for now in (0, 1)} | {
        replace(CHANNEL, bits=3)._seed(b"", 0)
    }
    first = [uniform(seed, 2000).astype(float) for seed in seeds]
    assert len(first) == 7
    correlation = np.corrcoef(np.stack(first)) - np.eye(7)
    assert np.abs(correlation).max() < 6 / sqrt(2000)


@pytest.mark.parametrize(
    "change",
    [{"scheme": "masks"}, {"parameters": b"other parameters"}, {"key": bytes(16)}, {"stage": "keys"}, {"scale": 1.0}],
    ids=str,
)
def test_a_foreign_request_is_refused(change, wire, intake, roster):
    memory, request, update = client_before("masked", wire, intake)
    header, parts = roster.opened(request, SERVER, 6)
    sealed = roster.sealed(replace(header, **change), parts, SERVER, 6)
    refuses(BrokenEnvelope, "message with", roster, memory, sealed, update)


def test_a_broken_request_is_refused(wire, intake, roster):
    memory, request, update = client_before("masked", wire, intake)
    for broken in (b"", request[:-1], request[:-40] + bytes([request[-40] ^ 1]) + request[-39:]):
        refuses(Corrupt, "cut off", roster, memory, broken, update)
    with pytest.raises(Replay):
        CHANNEL.answer(roster.party(6, 1), "masked", memory, request, update)


def test_a_second_row_is_refused(wire, intake, roster):
    memory, request, update = client_before("masked", wire, intake)
    after, _ = CHANNEL.answer(roster.party(6), "masked", memory, request, update)
    refuses(InvalidArgument, "repeated", roster, after, request, update)


@pytest.mark.parametrize("left_out", [3, 12])
def test_a_second_key_sum_without_one_client_is_refused(left_out, wire, intake, roster):
    """The keys of U and of U without i would give s_i: whoever has answered once answers no more."""
    memory, request, update = client_before("unmask", wire, intake)
    after, _ = CHANNEL.answer(roster.party(6), "unmask", memory, request, update)
    header, _ = roster.opened(request, SERVER, 6)
    fewer = [numbers_to_bytes(i for i in (3, 6, 9, 12) if i != left_out), numbers_to_bytes([left_out])]
    second = roster.sealed(replace(header, clients=3), fewer, SERVER, 6)
    for asked in (second, request):
        refuses(InvalidArgument, "repeated", roster, after, asked, update, "unmask")
    assert set(after) == {"done"}  # nothing left to answer with


def test_what_a_second_key_sum_would_show(wire, intake, monkeypatch):
    """Negative control: the sums of all keys and of all but one differ by the key that opens a row."""
    line, keys = recorded_round(wire, intake, monkeypatch)
    both = sum(keys.values()), keys[3] + keys[9] + keys[12]
    assert np.array_equal(opened_with(both[0] - both[1], 6, line), line.rows[6].numpy())


def test_clients_keep_the_floor_by_themselves(wire, intake, roster):
    channel = CHANNEL.with_floor(4)
    memory, request, update = client_before("unmask", wire, intake, channel)
    header, _ = roster.opened(request, SERVER, 6)
    lists = [numbers_to_bytes((3, 6, 9)), numbers_to_bytes([12])]
    asked = roster.sealed(replace(header, clients=3), lists, SERVER, 6)
    with pytest.raises(TooFewClients, match="smallest_release=4"):
        channel.answer(roster.party(6), "unmask", memory, asked, update)


# What the server sees


def recorded_round(wire, intake, monkeypatch, d=4000):
    """A finished round and the keys that its clients drew."""
    drawn = []

    def draw(length):
        drawn.append(ternary(length))
        return drawn[-1]

    monkeypatch.setattr(pad, "ternary", draw)
    rows = whole_rows(4, d, CHANNEL.bits)
    line = wire(CHANNEL, rows)
    CHANNEL.collect(list(rows), intake(d), line).total()
    return line, {party: key.astype(np.int64) for party, key in zip(line.replies("masked"), drawn, strict=True)}


def words_of(party, line):
    """The padded row, and the residues of its polynomials: all of that the server has."""
    _, parts = Link(line.server, party).open(line.replies("masked")[party])
    request = next(content for stage, number, content in line.sent if (stage, number) == ("masked", party))
    transcript = transcript_of(request)
    words = np.frombuffer(parts[1], "<u4").astype(np.int64)
    polynomials = uniform(CHANNEL._seed(transcript, 0), -(-len(words) // DEGREE) * DEGREE).reshape(-1, DEGREE)
    return words, polynomials


def transcript_of(request):
    return request[-32 - 4 * 24 : -32]  # the last part: number and mark of four clients


def opened_with(key, party, line):
    words, polynomials = words_of(party, line)
    left = (words - product(polynomials, key).reshape(-1)[: len(words)]) % MODULUS
    left = np.where(left > MODULUS // 2, left - MODULUS, left)
    return np.rint(left / CHANNEL.parameters.factor)[:-CANARIES]


def test_a_padded_row_does_not_open_without_its_key(wire, intake, monkeypatch):
    line, keys = recorded_round(wire, intake, monkeypatch)
    row = line.rows[6].numpy()
    guesses = {
        "none": np.zeros(DEGREE, np.int64),
        "another client's": keys[3],
        "the sum of all": sum(keys.values()),
        "one coefficient wrong": keys[6] + np.eye(1, DEGREE, 7, dtype=np.int64)[0],
        "a random one": ternary(DEGREE).astype(np.int64),
    }
    for name, guess in guesses.items():
        opened = opened_with(guess, 6, line)
        assert abs(np.corrcoef(opened, row)[0, 1]) < 5.4 / sqrt(len(row)), name
    assert np.corrcoef(opened_with(keys[6], 6, line), row)[0, 1] == pytest.approx(1)


def test_padded_rows_are_uniform(wire, intake):
    """Of rows of zeros, and of equal rows: nothing repeats, nothing sticks out."""
    rows = {i: torch.zeros(50_000).double() for i in (3, 6, 9)}
    line = wire(CHANNEL, rows)
    CHANNEL.collect(list(rows), intake(50_000), line).total()
    words = [np.frombuffer(line.replies("masked")[party][-32 - 4 * (50_000 + CANARIES) : -32], "<u4") for party in rows]
    for one, other in ((0, 1), (1, 2), (0, 2)):
        difference = (words[one].astype(np.int64) - words[other]) % MODULUS
        assert not rejects_uniform(words[one])
        assert not rejects_uniform(difference)


def test_rows_without_a_pad_would_stick_out():
    """Negative control, for the test above."""
    assert rejects_uniform(np.random.default_rng(0).integers(0, MODULUS // 2, 50_000))


def test_secrets_stay_where_they_are(wire, intake, monkeypatch):
    errors = []
    right = pad_parameters.centred_binomial

    def drawn(length):
        errors.append(right(length))
        return errors[-1]

    monkeypatch.setattr(pad_parameters, "centred_binomial", drawn)
    line, keys = recorded_round(wire, intake, monkeypatch, d=500)
    places = [content for _, _, content in line.sent + line.received]
    places += [value for memory in line.memories.values() for value in memory.values()]
    places += [repr(CHANNEL).encode(), repr(line.memories).encode(), pickle.dumps(CHANNEL)]
    for secret in [*keys.values(), *errors]:
        for kind in (np.int8, np.uint8, np.int16, np.int32, np.int64, np.float64):
            piece = secret[:64].astype(kind).tobytes()
            assert not any(piece in place for place in places)
    assert all(set(memory) == {"done"} for memory in line.memories.values())


def test_a_client_forgets_its_key_before_it_answers(wire, intake, roster, monkeypatch):
    memory, request, update = client_before("masked", wire, intake)
    drawn = []
    monkeypatch.setattr(pad, "ternary", lambda length: drawn.append(ternary(length)) or drawn[-1])
    after, reply = CHANNEL.answer(roster.party(6), "masked", memory, request, update)
    for kind in (np.int8, np.int16, np.int64, np.float64):
        piece = drawn[0][:64].astype(kind).tobytes()
        assert not any(piece in value for value in [*after.values(), reply])


def test_every_row_has_a_key_of_its_own(wire, intake, monkeypatch):
    _, keys = recorded_round(wire, intake, monkeypatch, d=10)
    _, others = recorded_round(wire, intake, monkeypatch, d=10)
    drawn = {key.tobytes() for key in [*keys.values(), *others.values()]}
    assert len(drawn) == 8


def test_a_client_that_refused_opens_nothing_and_keeps_no_secret(wire, intake, roster):
    memory, request, _ = client_before("masked", wire, intake)
    party, beyond = roster.party(6), torch.full((1, 50), 1e9, dtype=torch.float64)
    memory, _ = CHANNEL.answer(party, "masked", memory, request, lambda: Encoded(beyond, {}))
    assert not memory.keys() & {"seed", "masking"}
    header = CHANNEL._key_sums.header("unmask", memory["session"])
    asked = roster.sealed(replace(header, clients=4), [numbers_to_bytes([6]), b""], SERVER, 6)
    with pytest.raises((BrokenEnvelope, RoundFailed)):
        CHANNEL.answer(party, "unmask", memory, asked, None)
