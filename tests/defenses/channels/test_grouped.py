from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from hashlib import sha256
from itertools import combinations
from math import sqrt

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Generator

from privfm.checks import BrokenEnvelope, InvalidArgument, NotRevealed, RoundFailed, TooFewClients
from privfm.contracts import SERVER, Cast, Channel, Encoded, Exchange, MatrixView, Reveals
from privfm.defenses import TrimmedMean
from privfm.defenses.channels import CKKS, PairwiseMasks, Plaintext, RLWEPad
from privfm.defenses.channels.envelope import Header, Link
from privfm.defenses.channels.grouped import Grouped, partition
from privfm.defenses.channels.selective import Selective
from privfm.defenses.transforms import Chain, FixedPoint
from privfm.defenses.views import SumView
from privfm.engines.local import Local

EACH = Reveals.EACH
LOG: list[tuple[str, int]] = []  # of the toy's server, in order


@dataclass(frozen=True)
class Adding(Channel):
    """A toy that adds in the clear, in three stages; the last is asked for only when the sum is opened."""

    smallest_release: int = 2
    most: int | None = None
    patience: int = 1000  # greetings it waits for
    client_stages = ("hello", "update", "open")

    @property
    def learns(self):
        return {"server": "the sum", "clients": "nothing", "trust": "nobody"}

    @property
    def most_clients(self):
        return self.most

    def with_floor(self, least):
        return replace(self, smallest_release=max(least, self.smallest_release))

    def reply(self, party, stage, memory, request, update):
        link, head = Link(party, SERVER), Header("adding", stage=stage)
        if stage != "update":
            return memory, link.seal(head, [])
        encoded = update()
        row = encoded.rows[0].double()
        if not row.isfinite().all():
            return memory, link.seal(head, [])
        head = replace(head, length=len(row), weight=encoded.weight, parts=1)
        return memory, link.seal(head, [row.numpy().tobytes()])

    def collect(self, cohort, intake, exchange):
        greeted = []
        for party, _ in exchange("hello", dict.fromkeys(cohort, b"")):
            LOG.append(("hello", party))
            greeted.append(party)
            if len(greeted) == self.patience:
                break
        total, ids, bad, refused = torch.zeros(intake.width, dtype=torch.float64), [], 0, 0
        for party, reply in exchange("update", dict.fromkeys(greeted, b"")):
            LOG.append(("update", party))
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

        def opened():
            helped = [party for party, _ in exchange("open", dict.fromkeys(ids, b""))]
            if ids and len(helped) < 2:
                raise TooFewClients(f"only {helped} helped to open")
            return intake.total(total) if ids else torch.zeros(intake.d)

        return SumView(opened, tuple(sorted(ids)), intake.d, bad + refused)


def slow_partition(cohort, groups, round):
    """By hand: big-endian 64-bit numbers after nine letters, hashed; every k-th cut at floor(k n / groups)."""
    ranked = sorted((sha256(b"partition" + round.to_bytes(8) + i.to_bytes(8)).digest(), i) for i in cohort)
    found = [[] for _ in range(groups)]
    for place, (_, client) in enumerate(ranked):
        group = next(k for k in range(groups) if place < (k + 1) * len(ranked) // groups)
        found[group].append(client)
    return [tuple(sorted(group)) for group in found]


def means(rows, groups):
    return torch.stack([torch.stack([rows[client] for client in group]).double().mean(0) for group in groups]).float()


# The partition


@given(st.sets(st.integers(0, 10_000), min_size=9, max_size=60), st.integers(2, 9), st.integers(0, 50))
def test_groups_cover_the_cohort_and_none_is_too_small(cohort, size, round):
    groups = len(cohort) // size
    parts = partition(list(cohort), groups, round)
    sizes = [len(part) for part in parts]
    assert sorted(client for part in parts for client in part) == sorted(cohort)
    assert all(one >= size for one in sizes)
    assert max(sizes) - min(sizes) <= 1
    assert parts == partition(sorted(cohort, reverse=True), groups, round)
    assert parts == slow_partition(cohort, groups, round)


def test_groups_are_drawn_evenly_and_anew_in_every_round():
    """Two of 12 clients share one of 3 groups with probability 3/11; deviation over 2000 rounds: 0.01."""
    rounds = [partition(range(12), 3, round) for round in range(2000)]
    for pair in ({0, 1}, {4, 11}, {7, 8}):
        together = sum(any(pair <= set(group) for group in groups) for groups in rounds) / len(rounds)
        assert abs(together - 3 / 11) < 5 * sqrt(3 / 11 * 8 / 11 / 2000)
    assert len({tuple(groups) for groups in rounds}) > 1900


@pytest.mark.parametrize(("n", "size", "corrupt"), [(6, 2, 2), (6, 3, 3), (8, 4, 5), (9, 3, 4), (8, 4, 2), (4, 2, 3)])
def test_isolation_is_the_expected_number_of_isolated_clients(n, size, corrupt):
    """Over all sets of corrupt clients, by enumeration; the union bound is exact in expectation for equal groups."""
    groups = [set(range(lo, lo + size)) for lo in range(0, n, size)]
    alone = [sum(len(group - set(bad)) == 1 for group in groups) for bad in combinations(range(n), corrupt)]
    expected = sum(alone) / len(alone)
    assert Grouped(Adding(), size).isolation(n, corrupt) == pytest.approx(min(1.0, expected))
    assert sum(count > 0 for count in alone) / len(alone) <= expected


def test_larger_groups_isolate_less():
    found = [Grouped(Adding(), size).isolation(100, 20) for size in (2, 5, 10, 20)]
    assert found == sorted(found, reverse=True)
    assert Grouped(Adding(), 10).isolation(100, 8) == 0  # too few to fill a group but for one


# What a rule sees


def test_rows_are_means_of_groups(wire, gaussian, intake, untouched_random_state):
    rows = gaussian(14, 40)
    channel = Grouped(Adding(), 4)
    view = channel.collect(list(rows), intake(40, EACH), wire(channel, rows))
    assert isinstance(view, MatrixView)
    assert (view.ids, view.n, view.d, view.bad) == ((0, 1, 2), channel.rows(14), 40, 0)
    torch.testing.assert_close(view.rows, means(rows, slow_partition(rows, 3, 0)), rtol=1e-6, atol=1e-7)


def test_another_round_groups_otherwise(wire, gaussian, intake):
    rows = gaussian(14, 4)
    channel = Grouped(Adding(), 4)
    first, second = (
        channel.collect(list(rows), intake(4, EACH), wire(channel, rows, round=now)).rows for now in (0, 1)
    )
    torch.testing.assert_close(second, means(rows, slow_partition(rows, 3, 1)), rtol=1e-6, atol=1e-7)
    assert not torch.allclose(first, second)


def test_a_rule_that_needs_the_sum_gets_the_sum_of_all(wire, gaussian, intake):
    rows = gaussian(11, 7)
    channel = Grouped(Adding(), 3)
    view = channel.collect(list(rows), intake(7), wire(channel, rows))
    torch.testing.assert_close(view.total(), sum(rows.values()), rtol=1e-6, atol=1e-6)
    assert (view.ids, view.bad, view.total().dtype) == (tuple(sorted(rows)), 0, torch.float32)
    with pytest.raises(NotRevealed):
        view.block(0, 1)


def test_a_rule_of_coordinates_over_masks_leaves_the_spoilt_group_out(wire, gaussian, intake):
    """The reason for groups: one client adds 0.9 to every coordinate, a trimmed mean over the groups hardly moves."""
    codec = Chain((FixedPoint(bound=1.0, bits=16),))
    rows = {party: 0.1 * row for party, row in gaussian(15, 30).items()}
    spoilt = {**rows, 3: rows[3] + 0.9}
    channel, found = Grouped(PairwiseMasks(clients=5), 3), []
    for sent in (rows, spoilt):
        coded = {party: codec.encode(row[None], {}, [Generator().manual_seed(party)])[0] for party, row in sent.items()}
        view = channel.collect(list(rows), intake(30, EACH, codec), wire(channel, coded))
        exact = [sum(coded[client].rows[0] for client in group) for group in slow_partition(rows, 5, 0)]
        whole = view.rows.double() * 3 * 2**16
        assert torch.equal(whole.round(), torch.stack(exact))  # every mask is gone
        torch.testing.assert_close(whole, whole.round(), rtol=1e-6, atol=0)
        rule = TrimmedMean(f=1)
        found.append(rule.aggregate(rule.init(30), view, Generator().manual_seed(0))[1].vector)
        plain = view.rows.mean(0)
    assert float((found[0] - found[1]).norm()) < 0.1
    assert float((plain - found[0]).norm()) > 0.25  # negative control: the mean moves by 0.9 sqrt(30) / 15


def test_the_keys_of_a_pad_are_summed_group_by_group(wire, gaussian, intake):
    """Each client takes part in one sum of keys only. Pad and codec may err by a step of 2^-16 each."""
    codec, rows = Chain((FixedPoint(bound=1.0, bits=16),)), gaussian(12, 20)
    coded = {party: codec.encode(row[None], {}, [Generator().manual_seed(party)])[0] for party, row in rows.items()}
    pad = RLWEPad(8, 16, PairwiseMasks(8, modulus_bits=16), smallest_release=3, approximate=True)
    view = Grouped(pad, 4).collect(list(rows), intake(20, EACH, codec), wire(Grouped(pad, 4), coded))
    assert float((view.rows - means(rows, slow_partition(rows, 3, 0))).abs().max()) <= 2 * 2.0**-16


@pytest.mark.parametrize("needs", [Reveals.SUM, EACH])
def test_the_clip_of_a_plan_holds_for_every_mean(needs, wire, intake):
    rows = {i: torch.tensor([3.0, 4.0]) if i % 2 else torch.tensor([0.3, 0.4]) for i in range(4)}
    channel = Grouped(Adding(), 4)
    view = channel.collect(list(rows), intake(2, needs, max_norm=1.0), wire(channel, rows))
    assert view.total().norm() <= (1.0 if needs is EACH else 4.0)
    torch.testing.assert_close(view.total() / (1 if needs is EACH else 4), torch.tensor([0.6, 0.8]))


def test_folded_weights_divide_a_mean(wire, gaussian, intake):
    rows = gaussian(4, 5)
    weights = {party: 0.25 * (k + 1) for k, party in enumerate(rows)}
    coded = {party: Encoded(weights[party] * row[None], {}, weights[party]) for party, row in rows.items()}
    channel = Grouped(Adding(), 4)
    view = channel.collect(list(rows), replace(intake(5, EACH), weights=weights), wire(channel, coded))
    mean = sum(weights[party] * rows[party] for party in rows) / sum(weights.values())
    torch.testing.assert_close(view.rows[0], mean, rtol=1e-5, atol=1e-6)


# What goes wrong in a group


def test_a_drop_out_is_missing_in_its_group_only(wire, gaussian, intake):
    rows = gaussian(12, 5)
    channel = Grouped(Adding(), 4)
    line = wire(channel, rows, lost={"hello": {3}, "update": {36}})
    view = channel.collect(list(rows), intake(5, EACH), line)
    kept = [[client for client in group if client not in (3, 36)] for group in slow_partition(rows, 3, 0)]
    torch.testing.assert_close(view.rows, means(rows, kept), rtol=1e-6, atol=1e-7)
    assert view.bad == 0


@pytest.mark.parametrize("stage", ["hello", "update", "open"])
@pytest.mark.parametrize("needs", [Reveals.SUM, EACH])
def test_a_group_that_fails_takes_nobody_along(stage, needs, wire, gaussian, intake):
    rows = gaussian(12, 5)
    channel = Grouped(Adding(), 4)
    groups = slow_partition(rows, 3, 0)
    view = channel.collect(list(rows), intake(5, needs), wire(channel, rows, lost={stage: set(groups[1][:3])}))
    assert view.bad == 0
    if needs is EACH:
        assert view.ids == (0, 2)
        torch.testing.assert_close(view.rows, means(rows, [groups[0], groups[2]]), rtol=1e-6, atol=1e-7)
    else:
        assert view.ids == tuple(sorted(groups[0] + groups[2]))


def test_when_every_group_fails_the_round_does(wire, gaussian, intake):
    rows = gaussian(12, 5)
    channel = Grouped(Adding(), 4)
    lost = {client for group in slow_partition(rows, 3, 0) for client in group[1:]}
    with pytest.raises(TooFewClients, match="1 of 4"):
        channel.collect(list(rows), intake(5, EACH), wire(channel, rows, lost={"update": lost}))


def test_a_plans_floor_holds_for_every_group(wire, gaussian, intake):
    rows = gaussian(12, 5)
    channel = Grouped(Adding(), 4)
    asked = replace(intake(5, EACH), least_answers=4)
    assert channel.collect(list(rows), asked, wire(channel, rows, lost={"update": {3}})).n == 2
    assert channel.with_floor(3).channel == Adding(smallest_release=3)
    with pytest.raises(InvalidArgument, match="size=4: Adding opens no sum of fewer than smallest_release=5"):
        channel.with_floor(5)


@pytest.mark.parametrize("needs", Reveals)
@pytest.mark.parametrize("cohort", [[], [1, 2, 4, 5]], ids=["empty", "silent"])
def test_nobody_gives_no_rows_of_width_d(needs, cohort, wire, intake):
    channel = Grouped(Adding(), 2)
    view = channel.collect(cohort, intake(6, needs), wire(channel, {}, lost={"hello": {1, 2, 4, 5}}))
    assert (view.n, view.d, view.bad) == (0, 6, 0)
    assert torch.equal(view.total(), torch.zeros(6))


def test_too_few_for_one_group_are_asked_nothing(wire, gaussian, intake):
    rows = gaussian(3, 5)
    channel = Grouped(Adding(), 4)
    line = wire(channel, rows)
    with pytest.raises(TooFewClients, match=r"size=4: 3 client\(s\) make no group"):
        channel.collect(list(rows), intake(5, EACH), line)
    assert line.sent == []


@pytest.mark.parametrize("broken", ["message", "row"])
@pytest.mark.parametrize("needs", [Reveals.SUM, EACH])
def test_a_client_left_out_is_counted_and_its_groups_row_stays(broken, needs, wire, gaussian, intake):
    rows = gaussian(12, 5)
    good = {party: row.clone() for party, row in rows.items()}
    if broken == "row":
        rows[6][1] = torch.nan
    change = (lambda party, reply: reply[:-1] if party == 6 else reply) if broken == "message" else None
    channel = Grouped(Adding(), 4)
    line = wire(channel, rows, **({"change": change} if change else {}))
    view = channel.collect(list(rows), intake(5, needs), line)
    kept = [[client for client in group if client != 6] for group in slow_partition(rows, 3, 0)]
    assert view.bad == 1
    if needs is EACH:
        torch.testing.assert_close(view.rows, means(good, kept), rtol=1e-6, atol=1e-7)
    else:
        assert view.ids == tuple(sorted(set(rows) - {6}))


@pytest.mark.parametrize("trouble", ["twice", "strangers"])
@pytest.mark.parametrize("stage", ["shares", "masked"])
def test_second_answers_and_strangers_are_counted(stage, trouble, wire, gaussian, intake):
    codec = Chain((FixedPoint(bound=1.0, bits=16),))
    rows = gaussian(12, 5)
    coded = {party: codec.encode(row[None], {}, [Generator().manual_seed(party)])[0] for party, row in rows.items()}
    channel = Grouped(PairwiseMasks(clients=7), 4)
    line = wire(channel, coded, **{trouble: {stage: {6} if trouble == "twice" else 77}})
    view = channel.collect(list(rows), intake(5, EACH, codec), line)
    assert view.bad == (1 if trouble == "twice" else 12)
    groups = slow_partition(rows, 3, 0)
    assert torch.equal(
        (view.rows.double() * 4 * 2**16).round(),
        torch.stack([sum(coded[client].rows[0] for client in group) for group in groups]),
    )


def test_a_sum_beyond_float32_is_a_bad_row(wire, gaussian, intake):
    rows = gaussian(8, 5)
    groups = slow_partition(rows, 2, 0)
    for client in groups[0]:
        rows[client] = torch.full((5,), 2e38)
    channel = Grouped(Adding(), 4)
    for needs in (Reveals.SUM, EACH):
        view = channel.collect(list(rows), intake(5, needs), wire(channel, rows))
        assert view.bad == 1
        assert view.ids == ((1,) if needs is EACH else groups[1])
        assert view.total().isfinite().all()


# All groups together


class Counted(Exchange):
    """Writes down every call and every reply."""

    def __init__(self, below):
        self.below, self.server, self.calls = below, below.server, []

    def __call__(self, stage: str, requests: Mapping[int, bytes]) -> Iterator[tuple[int, bytes]]:
        self.calls.append((stage, sorted(requests)))
        for party, reply in self.below(stage, requests):
            LOG.append(("sent", party))
            yield party, reply


def test_every_stage_is_one_call_for_all_groups(wire, gaussian, intake):
    rows = gaussian(12, 5)
    channel = Grouped(Adding(), 4)
    line = Counted(wire(channel, rows, lost={"hello": {3}}))
    channel.collect(list(rows), intake(5, EACH), line)
    there = sorted(set(rows) - {3})
    assert line.calls == [("hello", sorted(rows)), ("update", there), ("open", there)]


def test_each_reply_is_taken_in_before_the_next_is_made(wire, gaussian, intake):
    rows = gaussian(12, 5)
    channel = Grouped(Adding(), 4)
    LOG.clear()
    channel.collect(list(rows), intake(5, EACH), Counted(wire(channel, rows)))
    sent, taken = LOG[: 2 * 24 : 2], LOG[1 : 2 * 24 : 2]
    assert {stage for stage, _ in sent} == {"sent"}
    assert [party for _, party in sent] == [party for _, party in taken]


def test_a_group_may_stop_listening(wire, gaussian, intake):
    """It is not given what it no longer wants, and the others go on."""
    rows = gaussian(12, 5)
    channel = Grouped(Adding(patience=2), 4)
    line = Counted(wire(channel, rows))
    view = channel.collect(list(rows), intake(5, EACH), line)
    assert [len(asked) for _, asked in line.calls] == [12, 6, 6]
    torch.testing.assert_close(view.rows, means(rows, [sorted(group)[:2] for group in slow_partition(rows, 3, 0)]))
    assert (view.n, view.bad) == (3, 0)


def test_attackers_act_once_and_after_everybody_else(intake):
    """Through an engine, as without groups; group after group, each would hold some of them and know some rows only."""
    rows, malicious = {i: torch.full((3,), float(i)) for i in range(12)}, (0, 1, 2, 3)
    assert sum(bool(set(malicious) & set(group)) for group in partition(rows, 3, 5)) > 1
    asked = []

    def sealed(batch):
        asked.append(list(batch))
        return {client: Encoded(rows[client][None], {}) for client in batch}

    channel = Grouped(Adding(), 4)
    honest = [client for client in rows if client not in malicious]
    exchange = Local(clients_per_batch=5).open(channel, sealed, Cast(5, honest, malicious))
    view = channel.collect(list(rows), intake(3, EACH), exchange)
    assert asked == [honest[:5], honest[5:], list(malicious)]
    torch.testing.assert_close(view.rows, means(rows, slow_partition(rows, 3, 5)))


@pytest.mark.parametrize("where", ["client", "server"])
def test_an_error_ends_the_round_and_leaves_no_thread(where, wire, gaussian, intake):
    rows = gaussian(12, 5)
    channel = Grouped(Adding() if where == "client" else Crashing(), 4)
    before = threading.active_count()
    if where == "client":
        del rows[15]
    cohort = [3 * (12 - i) for i in range(12)]
    with pytest.raises(KeyError, match="15" if where == "client" else "of its own"):
        channel.collect(cohort, intake(5, EACH), wire(channel, rows))
    assert threading.active_count() == before


@dataclass(frozen=True)
class Crashing(Channel):
    client_stages = ("update",)
    started: list[int] = field(default_factory=list, compare=False)

    @property
    def learns(self):
        return {}

    def reply(self, party, stage, memory, request, update):
        return memory, b""

    def collect(self, cohort, intake, exchange):
        self.started.append(1)
        if len(self.started) == 2:
            raise KeyError("of its own")
        dict(exchange("update", dict.fromkeys(cohort, b"")))


@dataclass(frozen=True)
class Curious(Channel):
    client_stages = ("update",)

    @property
    def learns(self):
        return {}

    def reply(self, party, stage, memory, request, update):
        return memory, b""

    def collect(self, cohort, intake, exchange):
        dict(exchange("update", dict.fromkeys((*cohort, 77), b"")))


def test_a_group_reaches_its_own_clients_only(wire, gaussian, intake):
    rows = gaussian(4, 5)
    channel = Grouped(Curious(), 2)
    with pytest.raises(InvalidArgument, match="stage='update' asks others than the group's clients"):
        channel.collect(list(rows), intake(5, EACH), wire(channel, rows))


def test_runs_repeat_bit_for_bit(wire, gaussian, intake):
    rows = gaussian(12, 50)
    channel = Grouped(Adding(), 3)
    first, second = (channel.collect(list(rows), intake(50, EACH), wire(channel, rows)).rows for _ in range(2))
    assert torch.equal(first, second)


# What is refused, and what is said


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Grouped(Plaintext(), 4), "Plaintext shows the server values of single clients"),
        (lambda: Grouped(Selective(Adding(), ((0, 1),)), 4), "Selective shows the server values of single clients"),
        (lambda: Grouped(Grouped(Adding(), 2), 4), "Grouped shows the server values of single clients"),
        (lambda: Grouped(CKKS(bound=1.0, clients=8), 4), "CKKS has a key holder.*expected PairwiseMasks or RLWEPad"),
        (lambda: Grouped(Adding(), 1), "size=1: expected a whole number >= 2"),
        (
            lambda: Grouped(Adding(smallest_release=5), 4),
            "size=4: Adding opens no sum of fewer than smallest_release=5",
        ),
        (lambda: Grouped(Adding(most=6), 4), "7 clients make one group, Adding has room for 6; raise it to 7"),
    ],
    ids=["each", "selective", "twice", "key holder", "alone", "floor", "room"],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(InvalidArgument, match=message):
        make()


def test_the_largest_group_has_room():
    """Every group of n >= size clients has 2 size - 1 members at most, whatever n."""
    for size in (2, 3, 7):
        rows = Grouped(Adding(), size).rows
        assert max(-(-n // rows(n)) for n in range(size, 200)) == 2 * size - 1


def test_it_says_what_it_shows():
    channel = Grouped(PairwiseMasks(clients=19), 10)
    assert channel.learns.keys() == {"server", "clients", "trust"}
    assert "each random group of at least 10 clients" in channel.learns["server"]
    assert (channel.reveals, channel.unprotected(1000), channel.integers) == (EACH, 0.0, True)
    assert (channel.rows(105), channel.rows(9), channel.rows(1)) == (10, 0, 0)
    assert channel.facts(1000, 105)["groups"] == "10 of 10 or 11 clients"
    assert channel.facts(1000, 9)["groups"].startswith("none")
    assert (channel.modulus, channel.grid, channel.most_clients) == (2**32, 1.0, None)


def test_a_client_answers_each_stage_once_and_in_order(wire, gaussian, intake, roster):
    rows = gaussian(8, 4)
    channel = Grouped(Adding(), 4)
    line = wire(channel, rows)
    channel.collect(list(rows), intake(4, EACH), line)
    for client in rows:
        assert [stage for stage, party, _ in line.received if party == client] == ["hello", "update", "open"]
    with pytest.raises(InvalidArgument, match="repeated, out of order"):
        channel.answer(roster.party(3), "update", line.memories[3], b"", lambda: line.update(3))
