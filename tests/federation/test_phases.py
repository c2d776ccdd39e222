"""Time and bytes are counted where they belong, by a clock that the tests move themselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import pytest

from privfm.contracts import KEY_HOLDER, SERVER, Exchange, Party
from privfm.engines import Local
from privfm.federation.phases import OPEN, START, Phases


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
