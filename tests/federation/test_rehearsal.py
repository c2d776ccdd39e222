"""A rehearsal is a real round: same bytes, codec, drop-outs and key holder; and a child gives back what it found."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from operator import mul
from pathlib import Path
from time import perf_counter, process_time

import pytest
import torch
from torch import Tensor

from privfm.checks import InvalidArgument, at_least
from privfm.contracts import Cast, Channel, Engine, Exchange, Sealer
from privfm.defenses import ClientMomentum, FixedPoint
from privfm.defenses.channels import CKKS, Plaintext
from privfm.engines import Local
from privfm.federation.phases import START
from privfm.federation.rehearsal import Rehearsal, grown, in_child
from privfm.federation.traffic import Traffic


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


def test_a_child_gives_back_what_it_found_or_raised() -> None:
    assert in_child(torch.get_num_threads) == 1
    assert in_child(divmod, 7, 2) == (3, 1)
    with pytest.raises(InvalidArgument, match="bits"):
        in_child(at_least, "bits", 0, 1)
    with pytest.raises(RuntimeError, match="died with 3"):
        in_child(os._exit, 3)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is measured on Linux")
def test_growth_is_what_the_work_needed() -> None:
    found, bytes_grown = in_child(grown, mul, b"x", 80_000_000)
    assert len(found) == 80_000_000
    assert bytes_grown is not None and 75e6 < bytes_grown < 100e6
    found, bytes_grown = in_child(grown, mul, b"x", 10)
    assert found == 10 * b"x"
    assert bytes_grown is not None and bytes_grown < 10e6
