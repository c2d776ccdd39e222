import tracemalloc
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import save

from privfm.checks import BrokenEnvelope, Corrupt
from privfm.contracts import SERVER, Encoded, MatrixView, Reveals, Transform
from privfm.defenses.channels import Plaintext
from privfm.defenses.channels.envelope import Header
from privfm.defenses.channels.plaintext import packed, unpacked
from privfm.defenses.views import SumView

EACH = Reveals.EACH


@dataclass(frozen=True)
class Sparse(Transform):
    """A codec that needs side information: values and their places."""

    binding = True

    def width(self, d):
        return 2

    def encode(self, rows, state, generators):
        places = rows.abs().topk(2, dim=1).indices
        return Encoded(rows.gather(1, places), {"places": places}), state

    def decode(self, encoded, d):
        return torch.zeros(len(encoded.rows), d).scatter(1, encoded.side["places"], encoded.rows)


def test_rows_arrive_bit_for_bit_and_sorted_by_client(wire, gaussian, intake):
    rows = gaussian(4, 33)
    view = Plaintext().collect(list(rows), intake(33, EACH), wire(Plaintext(), rows))
    assert isinstance(view, MatrixView)
    assert view.ids == (3, 6, 9, 12)
    assert torch.equal(view.rows, torch.stack([rows[party] for party in view.ids]))


def test_a_rule_that_needs_the_sum_gets_nothing_else(wire, gaussian, intake):
    rows = gaussian(4, 5)
    assert isinstance(Plaintext().collect(list(rows), intake(5), wire(Plaintext(), rows)), SumView)


def test_the_sum_does_not_depend_on_the_order_of_arrival(wire, intake):
    rows = torch.randn(200, 50, generator=torch.Generator().manual_seed(1)).mul(1e4)
    rows[::2] *= 1e-6
    forward, backward = (
        Plaintext()
        .collect(order, intake(50), wire(Plaintext(), dict(enumerate(rows))))
        .total()
        for order in (range(200), range(199, -1, -1))
    )  # fmt: skip
    assert torch.equal(forward, backward)
    # negative control: the same in float32 does depend on it
    assert not torch.equal(sum(rows, torch.zeros(50)), sum(reversed(rows), torch.zeros(50)))


def test_memory_does_not_grow_with_the_cohort_when_the_sum_is_enough(intake, roster):
    d = 20_000
    size = 4 * d

    class Line:
        server = roster.party(SERVER)

        def __call__(self, stage, requests):
            for number, request in requests.items():  # a message of its own for each client
                party, row = roster.party(number), Encoded(torch.ones(1, d), {})
                yield number, Plaintext().answer(party, stage, {}, request, lambda row=row: row)[1]

    tracemalloc.start()
    view = Plaintext().collect(range(60), intake(d), Line())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert view.n == 60
    assert peak < 8 * size


def test_side_information_travels(wire, gaussian, intake):
    rows = gaussian(3, 6)
    coded = {party: Sparse().encode(row[None], {}, [])[0] for party, row in rows.items()}
    view = Plaintext().collect(list(rows), intake(6, EACH, Sparse()), wire(Plaintext(), coded))
    for party, row in zip(view.ids, view.rows, strict=True):
        kept = row != 0
        assert kept.sum() == 2
        assert torch.equal(row[kept], rows[party][kept])


@pytest.mark.parametrize("needs", [Reveals.SUM, EACH])
@pytest.mark.parametrize(
    "side",
    [
        pytest.param({}, id="missing"),
        pytest.param({"places": torch.tensor([[0, 6]])}, id="out of range"),
        pytest.param({"places": torch.tensor([[0, -1]])}, id="negative"),
        pytest.param({"places": torch.tensor([[0.0, 1.0]])}, id="not whole"),
        pytest.param({"places": torch.tensor([0, 1])}, id="of another shape"),
    ],
)
def test_what_a_codec_cannot_decode_is_a_bad_row(side, needs, wire, gaussian, intake):
    coded = {party: Sparse().encode(row[None], {}, [])[0] for party, row in gaussian(3, 6).items()}
    coded[6] = Encoded(coded[6].rows, side)
    view = Plaintext().collect(list(coded), intake(6, needs, Sparse()), wire(Plaintext(), coded))
    assert (view.ids, view.bad) == ((3, 9), 1)


@pytest.mark.parametrize("needs", [Reveals.SUM, EACH])
@pytest.mark.parametrize(
    "message",
    [
        pytest.param(save({"row": torch.zeros(1, 6)}), id="wrong key"),
        pytest.param(save({"rows": torch.zeros(1, 6), "more": torch.zeros(1)}), id="extra key"),
        pytest.param(save({"rows": torch.zeros(6)}), id="no row dimension"),
        pytest.param(save({"rows": torch.zeros(2, 6)}), id="two rows"),
        pytest.param(save({"rows": torch.zeros(1, 6_000_00)}), id="huge"),
        pytest.param(save({"rows": torch.zeros(1, 6, dtype=torch.float64)}), id="float64"),
        pytest.param(save({"rows": torch.zeros(1, 6, dtype=torch.bfloat16)}), id="bfloat16"),
        pytest.param(save({"rows": torch.zeros(1, 6, dtype=torch.int64)}), id="whole numbers"),
        pytest.param(save({"rows": torch.zeros(1, 6, dtype=torch.bool)}), id="bool"),
        pytest.param(save({}), id="nothing"),
    ],
)
def test_a_malformed_message_is_a_bad_row(message, needs, wire, gaussian, intake, roster):
    rows = gaussian(3, 6)

    def change(party, reply):
        return roster.sealed(roster.opened(reply, party)[0], [message], party) if party == 6 else reply

    line = wire(Plaintext(), rows, change=change)
    view = Plaintext().collect(list(rows), intake(6, needs), line)
    assert (view.ids, view.bad) == ((3, 9), 1)
    torch.testing.assert_close(view.total(), rows[3] + rows[9])


@pytest.mark.parametrize("needs", [Reveals.SUM, EACH])
def test_rows_are_clipped_again(needs, wire, intake):
    rows = {0: torch.tensor([3.0, 4.0]), 1: torch.tensor([0.3, 0.4])}
    view = Plaintext().collect([0, 1], intake(2, needs, max_norm=1.0), wire(Plaintext(), rows))
    torch.testing.assert_close(view.total(), torch.tensor([0.9, 1.2]))


def test_packing_is_undone_by_unpacking():
    encoded = Encoded(torch.randn(1, 5), {"0/scale": torch.tensor([0.5]), "places": torch.tensor([[1, 2]])})
    opened = unpacked(packed(encoded), 5)
    assert torch.equal(opened.rows, encoded.rows)
    assert opened.side.keys() == encoded.side.keys()
    assert all(torch.equal(opened.side[name], value) for name, value in encoded.side.items())


def test_a_row_that_is_part_of_a_matrix_costs_its_own_bytes_only():
    matrix = torch.randn(50, 100)
    assert len(packed(Encoded(matrix[7:8], {}))) < 100 * 4 + 200


def test_unpacking_names_what_is_wrong():
    with pytest.raises(BrokenEnvelope, match=r"rows of shape \(1, 4\), expected \(1, 5\)"):
        unpacked(save({"rows": torch.zeros(1, 4)}), 5)
    with pytest.raises(BrokenEnvelope, match="no safetensors file"):
        unpacked(b"\x10", 5)


def test_a_row_from_the_same_round_played_before_is_left_out(wire, gaussian, intake):
    """A run resumed from a checkpoint plays a round again: same number, same identities, other rows."""
    before, again = wire(Plaintext(), gaussian(3, 4)), wire(Plaintext(), gaussian(3, 4, seed=1))
    Plaintext().collect(list(before.rows), intake(4, EACH), before)
    old = before.replies("update")[3]
    again.change = lambda party, reply: old if party == 3 else reply
    view = Plaintext().collect(list(again.rows), intake(4, EACH), again)
    assert view.ids == (6, 9)
    assert view.bad == 1


def test_a_client_answers_the_server_alone(wire, gaussian, roster):
    rows = gaussian(3, 4)
    line = wire(Plaintext(), rows)
    for request in (b"", roster.sealed(Header("plain", stage="ask"), [], 6, 3)):
        with pytest.raises(Corrupt):
            list(line("update", {3: request}))
