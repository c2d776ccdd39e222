"""Time and bytes are counted where they belong, by a clock that the tests move themselves."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from time import perf_counter, process_time

import pytest
import torch
from torch import Tensor

from privfm.checks import InvalidArgument
from privfm.contracts import KEY_HOLDER, SERVER, Cast, Channel, Engine, Exchange, Party, Sealer
from privfm.defenses import ClientMomentum, FixedPoint
from privfm.defenses.channels import CKKS, Plaintext
from privfm.engines import Local
from privfm.federation.phases import OPEN, START, Phases, Rehearsal
from privfm.federation.traffic import Traffic


@dataclass
class Clock:
    """Stands still until somebody works."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now

    def work(self, seconds: float) -> None:
        self.now += seconds


class Slow(Exchange):
    """Party p works for p seconds (the key holder for 100) and replies with its request twice; odd ones get lost."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.server = Local().party(SERVER, 0)

    def __call__(self, stage: str, requests: Mapping[int, bytes]) -> Iterator[tuple[int, bytes]]:
        for party, request in requests.items():
            self.clock.work(100 if party == KEY_HOLDER else party)
            if party == KEY_HOLDER or party % 2 == 0:
                yield party, 2 * request


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_every_second_belongs_to_one_role_and_stage(clock: Clock) -> None:
    with Phases(Slow(clock), clock) as phases:
        clock.work(0.5)  # before anybody is asked
        replies = phases("first", {2: b"ab", 4: b"ab", 6: b"ab"})
        clock.work(0.25)  # the stage is open, nothing was awaited yet
        for _ in replies:
            clock.work(1.0)
        clock.work(0.125)
        assert dict(phases("second", {KEY_HOLDER: b"xyz"})) == {KEY_HOLDER: b"xyzxyz"}
        clock.work(10.0)
    clock.work(1000.0)  # afterwards
    start, first, second = phases.all
    assert (start.stage, first.stage, second.stage) == (START, "first", "second")
    assert (start.server_seconds, first.server_seconds, second.server_seconds) == (0.5, 3.375, 10.0)
    assert (first.client_seconds, first.key_holder_seconds) == (12.0, 0.0)
    assert (second.client_seconds, second.key_holder_seconds) == (0.0, 100.0)
    assert (phases.client_seconds, phases.key_holder_seconds, phases.server_seconds) == (4.0, 100.0, 13.875)


def test_what_is_replied_while_another_stage_is_open_counts_with_its_own(clock: Clock) -> None:
    with Phases(Slow(clock), clock) as phases:
        outer = phases("outer", {2: b"", 4: b""})
        next(outer)
        clock.work(1.0)
        list(phases("inner", {6: b""}))
        clock.work(0.5)
        assert next(outer)[0] == 4
    _, first, second = phases.all
    assert (first.client_seconds, second.client_seconds) == (6.0, 6.0)
    assert (first.server_seconds, second.server_seconds) == (1.0, 0.5)


def test_lost_parties_time_is_not_the_servers(clock: Clock) -> None:
    with Phases(Slow(clock), clock) as phases:
        assert [party for party, _ in phases("update", {1: b"", 2: b"", 3: b""})] == [2]
    (_, phase) = phases.all
    assert (phase.asked, phase.answered) == (3, 1)
    assert (phase.client_seconds, phase.server_seconds) == (6.0, 0.0)


def test_bytes_are_means_by_stage_and_leave_the_key_holder_out(clock: Clock) -> None:
    with Phases(Slow(clock), clock) as phases:
        list(phases("update", {KEY_HOLDER: b"12345", 1: b"123", 2: b"1", 4: b"12345678"}))
        list(phases("again", {2: b"12"}))
    update = phases.all[1]
    assert (update.key_holder_down, update.key_holder_up) == (5, 10)
    assert (update.down, update.up) == (12, 18)
    assert (phases.down, phases.up) == (4 + 2, 9 + 4)


def test_what_clients_open_for_themselves_is_not_sent(clock: Clock) -> None:
    with Phases(Slow(clock), clock) as phases:
        list(phases("update", {2: b"123"}))
        list(phases(OPEN, {2: b"12"}))
    assert (phases.down, phases.up, phases.client_seconds) == (3 + 2, 6, 4)


def test_nobody_asked_is_nothing(clock: Clock) -> None:
    with Phases(Slow(clock), clock) as phases:
        assert list(phases("update", {})) == []
    assert (phases.client_seconds, phases.up, phases.down) == (0.0, 0.0, 0.0)


def test_the_servers_place_is_that_below(clock: Clock) -> None:
    below = Slow(clock)
    party: Party = Phases(below, clock).server
    assert party is below.server


@pytest.fixture
def rows() -> Tensor:
    return torch.randn(4, 30, generator=torch.Generator().manual_seed(1)).clamp(-3, 3)


def test_a_rehearsal_counts_the_bytes_that_traffic_counts(rows: Tensor) -> None:
    rehearsal = Rehearsal(Plaintext(), rows)
    counted: list[Traffic] = []

    class Watched(Engine):
        def open(self, channel: Channel, sealed: Sealer, cast: Cast) -> Exchange:
            counted.append(Traffic(Local(1).open(channel, sealed, cast)))
            return counted[-1]

    total, phases = rehearsal.play(Watched(), lambda view: view.total())
    torch.testing.assert_close(total, rows.sum(0))
    assert (phases.up, phases.down) == (counted[0].up_per_client, counted[0].down_per_client)
    assert phases.up > 4 * 30


def test_a_rehearsal_goes_through_codec_and_key_holder(rows: Tensor) -> None:
    codec = FixedPoint(4.0, 20)
    channel = CKKS(bound=2.0**20, clients=4, bits=20)
    total, phases = Rehearsal(channel, rows, codec).play(Local(1), lambda view: view.total())
    assert (total - rows.sum(0)).abs().max() <= 4 * codec.step + 1e-5
    again, _ = Rehearsal(channel, rows, codec, seed=1).play(Local(1), lambda view: view.total())
    assert not torch.equal(total, again), "another seed rounds in another way"
    stages = [phase.stage for phase in phases.all]
    assert stages == [START, *channel.key_holder_stages[:1], *channel.client_stages, *channel.key_holder_stages[1:]]
    assert phases.key_holder_seconds > 0 < phases.client_seconds


def test_drop_outs_are_rehearsed(rows: Tensor) -> None:
    rehearsal = Rehearsal(Plaintext(), rows, gone={"update": frozenset({0, 2})})
    total, phases = rehearsal.play(Local(1), lambda view: view.total())
    torch.testing.assert_close(total, rows[1] + rows[3])
    assert phases.all[-1].answered == 2


def test_rows_begin_again_where_there_are_more_clients(rows: Tensor) -> None:
    rehearsal = Rehearsal(Plaintext(), rows, clients=6, gone={"update": frozenset({3})})
    (total, ids), _ = rehearsal.play(Local(1), lambda view: (view.total(), view.ids))
    assert ids == (0, 1, 2, 4, 5)
    expected = (2 * rows[0] + 2 * rows[1] + rows[2]).double()
    torch.testing.assert_close(total.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(rehearsal.exact_mean(ids), expected / 5)
    assert list(Rehearsal(Plaintext(), rows, clients=2).cohort) == [0, 1]


def test_a_codec_with_a_memory_is_refused(rows: Tensor) -> None:
    with pytest.raises(InvalidArgument, match="keeps a state"):
        Rehearsal(Plaintext(), rows, ClientMomentum(0.9)).play(Local(1), lambda view: view.total())


def test_the_clock_is_the_processors_unless_another_is_given(rows: Tensor) -> None:
    play: Callable[..., object] = Rehearsal(Plaintext(), rows).play
    assert inspect.signature(play).parameters["clock"].default is process_time
    _, phases = Rehearsal(Plaintext(), rows).play(Local(1), lambda view: view.total(), perf_counter)
    assert phases.client_seconds > 0
