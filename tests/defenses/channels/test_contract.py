"""What every channel keeps to, whatever it hides."""

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Generator, Tensor

from privfm.checks import InvalidArgument, NotRevealed
from privfm.contracts import KEY_HOLDER, Channel, Encoded, Reveals, State, Transform
from privfm.defenses import channels
from privfm.defenses.channels import CKKS, Plaintext

CHANNELS: dict[str, Channel] = {"CKKS": CKKS(bound=1.0, clients=8), "Plaintext": Plaintext()}

each_channel = pytest.mark.parametrize("channel", CHANNELS.values(), ids=CHANNELS.keys())


@dataclass(frozen=True)
class Twice(Transform):
    """A linear codec that sends every coordinate twice, at half its size."""

    binding = True
    additive = True

    def width(self, d: int) -> int:
        return 2 * d

    def encode(self, rows: Tensor, state: State, generators: Sequence[Generator]) -> tuple[Encoded, State]:
        return Encoded(torch.cat([rows, rows], 1) / 2, {}), state

    def decode(self, encoded: Encoded, d: int) -> Tensor:
        return encoded.rows[:, :d] + encoded.rows[:, d:]


def test_every_channel_is_tested():
    assert CHANNELS.keys() == set(channels.__all__)


@each_channel
def test_the_total_is_the_sum(channel, wire, gaussian, intake, untouched_random_state):
    rows = gaussian(5, 40)
    before = {party: row.clone() for party, row in rows.items()}
    view = channel.collect(list(rows), intake(40), wire(channel, rows))
    torch.testing.assert_close(view.total(), sum(rows.values()), rtol=1e-6, atol=1e-7)
    assert (view.n, view.d, view.bad) == (5, 40, 0)
    assert view.ids == tuple(sorted(rows))
    assert all(torch.equal(rows[party], before[party]) for party in rows)


@each_channel
def test_the_result_is_float32(channel, wire, gaussian, intake):
    rows = gaussian(3, 4)
    assert channel.collect(list(rows), intake(4), wire(channel, rows)).total().dtype == torch.float32


@each_channel
def test_a_codec_is_decoded_by_the_server(channel, wire, gaussian, intake):
    rows = gaussian(4, 10)
    coded = {party: Twice().encode(row[None], {}, [])[0] for party, row in rows.items()}
    view = channel.collect(list(rows), intake(10, codecs=Twice()), wire(channel, coded))
    torch.testing.assert_close(view.total(), sum(rows.values()), rtol=1e-6, atol=1e-7)


@each_channel
def test_drop_outs_are_left_out(channel, wire, gaussian, intake):
    rows = gaussian(5, 7)
    view = channel.collect(list(rows), intake(7), wire(channel, rows, lost={"update": {3, 12}}))
    assert (view.ids, view.bad) == ((6, 9, 15), 0)
    torch.testing.assert_close(view.total(), rows[6] + rows[9] + rows[15], rtol=1e-6, atol=1e-7)


@each_channel
@pytest.mark.parametrize("needs", Reveals)
@pytest.mark.parametrize("cohort", [[], [1, 2]], ids=["empty", "silent"])
def test_nobody_gives_zeros_of_width_d(channel, cohort, needs, wire, intake):
    view = channel.collect(cohort, intake(6, needs), wire(channel, {}, lost={"update": {1, 2}}))
    assert (view.n, view.d, view.bad) == (0, 6, 0)
    assert torch.equal(view.total(), torch.zeros(6))


@each_channel
@pytest.mark.parametrize(
    "broken",
    [
        pytest.param(lambda reply: b"", id="empty"),
        pytest.param(lambda reply: reply[:-1], id="one byte short"),
        pytest.param(lambda reply: reply[: len(reply) // 2], id="half"),
        pytest.param(lambda reply: reply + b"\0", id="one byte long"),
        pytest.param(lambda reply: bytes(range(256)) * 16, id="garbage"),
        pytest.param(lambda reply: b"\xff" * 8 + reply, id="a huge length in front"),
    ],
)
def test_a_broken_reply_is_left_out_and_counted(channel, broken, wire, gaussian, intake):
    rows = gaussian(4, 9)
    line = wire(channel, rows, change=lambda party, reply: broken(reply) if party == 6 else reply)
    view = channel.collect(list(rows), intake(9), line)
    assert (view.ids, view.bad) == ((3, 9, 12), 1)
    torch.testing.assert_close(view.total(), rows[3] + rows[9] + rows[12], rtol=1e-6, atol=1e-7)


@each_channel
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_is_left_out_and_counted(channel, value, wire, gaussian, intake):
    rows = gaussian(4, 9)
    rows[6][2] = value
    view = channel.collect(list(rows), intake(9), wire(channel, rows))
    assert (view.ids, view.bad) == ((3, 9, 12), 1)
    assert view.total().isfinite().all()


@each_channel
def test_a_row_of_another_width_is_left_out_and_counted(channel, wire, gaussian, intake):
    rows = {**gaussian(3, 9), 100: torch.zeros(8), 101: torch.zeros(10), 102: torch.zeros(0)}
    view = channel.collect(list(rows), intake(9), wire(channel, rows))
    assert (view.ids, view.bad) == ((3, 6, 9), 3)


@each_channel
def test_no_more_is_answered_than_is_revealed(channel, wire, gaussian, intake):
    rows = gaussian(3, 4)
    view = channel.collect(list(rows), intake(4), wire(channel, rows))
    with pytest.raises(NotRevealed):
        view.gram(torch.zeros(0, 4))
    with pytest.raises(NotRevealed):
        view.weighted_sum(torch.ones(3), torch.zeros(0, 4))
    with pytest.raises(NotRevealed):
        view.block(0, 1)


@each_channel
def test_a_client_answers_each_stage_once_and_in_order(channel, wire, gaussian, intake, roster):
    rows = gaussian(3, 4)
    line = wire(channel, rows)
    channel.collect(list(rows), intake(4), line).total()
    stages = [stage for stage, party, _ in line.received if party == 3]
    assert stages == list(channel.client_stages)
    for stage in channel.client_stages:
        with pytest.raises(InvalidArgument, match="repeated, out of order"):
            channel.answer(roster.party(3), stage, line.memories[3], b"", lambda: line.update(3))
    for stage in {*channel.client_stages[1:], *channel.key_holder_stages, "unheard"}:
        with pytest.raises(InvalidArgument, match="repeated, out of order"):
            channel.answer(roster.party(3), stage, {}, b"", lambda: line.update(3))


@each_channel
def test_the_key_holder_answers_each_stage_once(channel, wire, gaussian, intake, roster):
    rows = gaussian(3, 4)
    line = wire(channel, rows)
    channel.collect(list(rows), intake(4), line).total()
    assert tuple(stage for stage, party, _ in line.received if party == KEY_HOLDER) == channel.key_holder_stages
    for stage in {*channel.key_holder_stages, *channel.client_stages}:
        with pytest.raises(InvalidArgument, match="repeated, out of order"):
            channel.answer(
                roster.party(KEY_HOLDER), stage, line.memories.get(KEY_HOLDER, {}), b"", lambda: line.update(3)
            )


@each_channel
def test_memory_is_bytes_and_not_mutated(channel, wire, gaussian, intake, roster):
    rows = gaussian(3, 4)
    line = wire(channel, rows)
    channel.collect(list(rows), intake(4), line)
    memory = {"mine": b"kept"}
    request = next(content for stage, party, content in line.sent if (stage, party) == (channel.client_stages[0], 3))
    after, reply = channel.answer(roster.party(3), channel.client_stages[0], memory, request, lambda: line.update(3))
    assert memory == {"mine": b"kept"}
    assert isinstance(reply, bytes)
    assert all(isinstance(value, bytes) for value in after.values())
