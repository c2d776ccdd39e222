"""What every channel keeps to, whatever it hides."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Generator, Tensor

from privfm.checks import InvalidArgument, NotRevealed, TooFewClients
from privfm.contracts import KEY_HOLDER, SERVER, Channel, Encoded, Reveals, State, Transform
from privfm.defenses import channels
from privfm.defenses.channels import BFV, CKKS, CKKSGram, PairwiseMasks, Plaintext, RLWEPad, Selective
from privfm.defenses.transforms import Chain, FixedPoint

BITS = 20
CODEC = FixedPoint(bound=1.0, bits=BITS)
CHANNELS: dict[str, Channel] = {
    "BFV": BFV(clients=8, bits=20),
    "CKKS": CKKS(bound=1.0, clients=8),
    "CKKSGram": CKKSGram(bound=1.0),
    "PairwiseMasks": PairwiseMasks(clients=8),
    "Plaintext": Plaintext(),
    "RLWEPad": RLWEPad(8, BITS, PairwiseMasks(8, modulus_bits=16), smallest_release=3, approximate=True),
    "Selective": Selective(CKKS(bound=1.0, clients=8), ((1, 3),)),
}
ROWS_ARE_GROUPS = {"Grouped"}  # its rows are no clients': see its own tests

each_channel = pytest.mark.parametrize("channel", CHANNELS.values(), ids=CHANNELS.keys())


@pytest.fixture
def sent(wire, intake):
    """`sent(channel, rows, d, ...)`: encodes rows as the channel wants them, and plays the server's half."""

    def collect(channel, rows, d, cohort=None, codecs=(), needs=Reveals.SUM, **line):
        chain = Chain((*codecs, CODEC) if channel.integers else tuple(codecs))
        generators = {party: Generator().manual_seed(party) for party in rows}
        coded = {party: chain.encode(row[None], {}, [generators[party]])[0] for party, row in rows.items()}
        collect.line = wire(channel, coded, **line)
        return channel.collect(list(rows) if cohort is None else cohort, intake(d, needs, chain), collect.line)

    return collect


def close(channel, got, rows):
    """As near to the plain sum as the channel states."""
    exact = sum(row.double() for row in rows)
    error = CODEC.error_bound(len(exact), len(rows)) if channel.integers else 1e-6
    return got.dtype == torch.float32 and float((got.double() - exact).norm()) <= error


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
    assert CHANNELS.keys() | ROWS_ARE_GROUPS == set(channels.__all__)


@each_channel
def test_the_total_is_the_sum(channel, sent, gaussian, untouched_random_state):
    rows = gaussian(5, 40)
    before = {party: row.clone() for party, row in rows.items()}
    view = sent(channel, rows, 40)
    assert close(channel, view.total(), rows.values())
    assert (view.n, view.d, view.bad) == (5, 40, 0)
    assert view.ids == tuple(sorted(rows))
    assert all(torch.equal(rows[party], before[party]) for party in rows)


@each_channel
def test_a_codec_is_decoded_by_the_server(channel, sent, gaussian):
    rows = gaussian(4, 10)
    if isinstance(channel, Selective):  # there are other columns than those that were chosen
        with pytest.raises(InvalidArgument, match="a codec sends 10 columns as 20"):
            sent(channel, rows, 10, codecs=[Twice()])
        return
    total = sent(channel, rows, 10, codecs=[Twice()]).total()
    torch.testing.assert_close(total, sum(rows.values()), rtol=1e-6, atol=2.0**-BITS * 8)


@each_channel
def test_drop_outs_are_left_out_at_whatever_stage_they_go(channel, sent, gaussian):
    rows = gaussian(8, 7)
    for stage in channel.client_stages:
        view = sent(channel, rows, 7, lost={stage: {3, 12}})
        there = [party for party in rows if party not in (3, 12) or party in view.ids]  # after it had sent
        assert (view.ids, view.bad) == (tuple(sorted(there)), 0)
        assert close(channel, view.total(), [rows[party] for party in there])


@each_channel
@pytest.mark.parametrize("needs", Reveals)
@pytest.mark.parametrize("cohort", [[], [1, 2]], ids=["empty", "silent"])
def test_nobody_gives_zeros_of_width_d(channel, cohort, needs, sent):
    view = sent(channel, {}, 6, cohort, needs=needs, lost={channel.client_stages[0]: {1, 2}})
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
def test_a_broken_reply_is_left_out_and_counted(channel, broken, sent, gaussian):
    rows = gaussian(4, 9)
    view = sent(channel, rows, 9, change=lambda party, reply: broken(reply) if party == 6 else reply)
    assert (view.ids, view.bad) == ((3, 9, 12), 1)
    assert close(channel, view.total(), [rows[3], rows[9], rows[12]])


@each_channel
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_is_left_out_and_counted(channel, value, sent, gaussian):
    rows = gaussian(4, 9)
    rows[6][2] = value
    view = sent(channel, rows, 9)
    assert (view.ids, view.bad) == ((3, 9, 12), 1)
    assert view.total().isfinite().all()


@each_channel
@pytest.mark.parametrize("width", [0, 8, 10])
def test_a_row_of_another_width_is_left_out_and_counted(channel, width, sent, gaussian):
    rows = {**gaussian(4, 9), 100: torch.zeros(width)}
    view = sent(channel, rows, 9)
    assert (view.ids, view.bad) == ((3, 6, 9, 12), 1)


@each_channel
def test_a_weight_other_than_the_server_knows_is_left_out_and_counted(channel, wire, gaussian, intake):
    """Whoever forgets to fold it in, or folds in more, would count as something else."""
    rows = gaussian(4, 5)
    chain = Chain((CODEC,) if channel.integers else ())
    weights = dict.fromkeys(rows, 0.5)
    coded = {}
    for party, row in rows.items():
        (encoded, _), own = chain.encode(row[None] / 2, {}, [Generator().manual_seed(0)]), 1.0 if party == 6 else 0.5
        coded[party] = replace(encoded, weight=own)
    view = channel.collect(list(rows), replace(intake(5, codecs=chain), weights=weights), wire(channel, coded))
    assert (view.ids, view.bad) == ((3, 9, 12), 1)
    assert close(channel, view.total(), [rows[party] / 2 for party in (3, 9, 12)])


@each_channel
def test_a_sum_of_too_few_stays_closed(channel, sent, gaussian, intake, wire):
    """The floor of a plan: nothing that opens the sum is asked of anybody."""
    rows = gaussian(4, 5)
    if channel.reveals is Reveals.EACH:  # the round itself refuses what is revealed anyway
        assert channel.with_floor(5) == channel
        return
    with pytest.raises(TooFewClients):
        sent(channel.with_floor(5), rows, 5).total()
    stages = [stage for stage, _, _ in sent.line.received]
    assert not {"decrypt", "unmask"} & set(stages)


@each_channel
def test_a_message_of_another_round_is_left_out_and_counted(channel, sent, gaussian):
    """Recorded at one round, replayed in the next by whoever carries messages."""
    rows = gaussian(4, 5)
    sent(channel, rows, 5).total()
    old = {stage: sent.line.replies(stage) for stage in channel.client_stages}
    first = channel.client_stages[0]
    view = sent(channel, rows, 5, round=1, change=lambda party, reply: old[first][6] if party == 6 else reply)
    assert (view.ids, view.bad) == ((3, 9, 12), 1)


@each_channel
def test_a_second_message_of_a_client_is_not_added_again(channel, sent, gaussian):
    """Whoever carries messages may deliver one twice: the row counts at most once, and the attempt is counted."""
    rows = gaussian(5, 5)
    for stage in channel.client_stages:
        view = sent(channel, rows, 5, twice={stage: {6}})
        assert len(view.ids) == len(set(view.ids))
        assert close(channel, view.total(), [rows[party] for party in view.ids])
        assert set(view.ids) >= {3, 9, 12, 15}
        assert view.bad >= 1 or stage != channel.client_stages[0]


@each_channel
def test_a_message_of_somebody_who_was_not_asked_is_not_added(channel, sent, gaussian):
    rows = gaussian(5, 5)
    for stage in channel.client_stages:
        view = sent(channel, rows, 5, strangers={stage: 999})
        assert view.ids == tuple(sorted(rows))
        assert close(channel, view.total(), rows.values())


@each_channel
def test_who_learns_what_is_said(channel):
    roles = {"server", "clients", "trust"} | ({"key holder"} if channel.key_holder_stages else set())
    assert channel.learns.keys() == roles
    assert all(isinstance(name, str) and text for name, text in channel.facts(1000, 8).items())
    clear = {"Plaintext": 1.0, "Selective": 0.998}.get(type(channel).__name__, 0.0)
    assert channel.unprotected(1000) == clear


@each_channel
def test_no_more_is_answered_than_is_revealed(channel, sent, gaussian):
    view = sent(channel, gaussian(3, 4), 4)
    with pytest.raises(NotRevealed):
        view.block(0, 1)
    with pytest.raises(NotRevealed):
        view.gram(torch.zeros(0, 4))  # a Gram matrix stays with its key holder
    if channel.reveals is not Reveals.GRAM:
        with pytest.raises(NotRevealed):
            view.weighted_sum(torch.ones(3), torch.zeros(0, 4))


@each_channel
def test_a_client_answers_each_stage_once_and_in_order(channel, sent, gaussian, roster):
    sent(channel, gaussian(3, 4), 4).total()
    line = sent.line
    stages = [stage for stage, party, _ in line.received if party == 3]
    assert stages == list(channel.client_stages)
    for stage in channel.client_stages:
        with pytest.raises(InvalidArgument, match="repeated, out of order"):
            channel.answer(roster.party(3), stage, line.memories[3], b"", lambda: line.update(3))
    for stage in {*channel.client_stages[1:], *channel.key_holder_stages, "unheard"}:
        with pytest.raises(InvalidArgument, match="repeated, out of order"):
            channel.answer(roster.party(3), stage, {}, b"", lambda: line.update(3))


@each_channel
def test_the_key_holder_answers_each_stage_once(channel, sent, gaussian, roster):
    sent(channel, gaussian(3, 4), 4).total()
    line = sent.line
    asked = [stage for stage, party, _ in line.received if party == KEY_HOLDER]
    assert asked == [stage for stage in channel.key_holder_stages if stage in asked]  # in order, none twice
    assert asked[-1:] == list(channel.key_holder_stages[-1:]) or not channel.server_learns_sum
    for stage in {*channel.key_holder_stages, *channel.client_stages}:
        with pytest.raises(InvalidArgument, match="repeated, out of order"):
            memory = line.memories.get(KEY_HOLDER, {})
            channel.answer(roster.party(KEY_HOLDER), stage, memory, b"", lambda: line.update(3))


@each_channel
def test_memory_is_bytes_and_not_mutated(channel, sent, gaussian, roster):
    sent(channel, gaussian(3, 4), 4)
    line = sent.line
    memory = {"mine": b"kept"}
    request = next(content for stage, party, content in line.sent if (stage, party) == (channel.client_stages[0], 3))
    after, reply = channel.answer(roster.party(3), channel.client_stages[0], memory, request, lambda: line.update(3))
    assert memory == {"mine": b"kept"}
    assert isinstance(reply, bytes)
    assert all(isinstance(value, bytes) for value in after.values())


@each_channel
def test_no_party_writes_its_identity_into_a_message_or_its_memory(channel, sent, gaussian, roster):
    sent(channel, gaussian(3, 4), 4).total()
    line = sent.line
    secrets = [roster.party(number).identity.secret for number in (*line.memories, SERVER)]
    said = b"".join([content for _, _, content in (*line.sent, *line.received)])
    kept = b"".join(value for memory in line.memories.values() for value in memory.values())
    assert len(said) > 100
    assert not any(secret in said or secret in kept for secret in secrets)


@each_channel
def test_what_a_party_keeps_for_itself_is_in_no_message_in_the_clear(channel, sent, gaussian):
    """Round secrets: 32 bytes of anything that a party keeps and did not get from the server."""
    sent(channel, gaussian(3, 4), 4)
    line = sent.line
    for number, memory in line.memories.items():
        got = b"".join(content for _, party, content in line.sent if party == number)
        said = b"".join(content for _, party, content in line.received)
        for name, value in memory.items():
            if len(value) == 32 and value not in got and name.startswith("secret"):
                assert value not in said, name
