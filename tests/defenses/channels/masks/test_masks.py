import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from privfm.checks import InvalidArgument, RoundFailed, TooFewClients
from privfm.contracts import SERVER, Encoded, Intake, Reveals
from privfm.defenses.channels.masks import PairwiseMasks
from privfm.defenses.channels.masks.client import sign_of
from privfm.defenses.channels.masks.expansion import subtract_mask
from privfm.defenses.channels.masks.secrets import Announced, loaded, mask_key
from privfm.defenses.channels.masks.shamir import join
from privfm.defenses.privacy.distributed import DistributedNoise
from privfm.defenses.transforms import FixedPoint

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


# The sum


@pytest.mark.parametrize("d", [1, 5])
@pytest.mark.parametrize("n", [2, 3, 7, 12])
def test_the_sum_is_exact(n, d, wire, intake, untouched_random_state):
    rows = whole_rows(n, d)
    before = {party: row.clone() for party, row in rows.items()}
    view = CHANNEL.collect(list(rows), intake(d), wire(CHANNEL, rows))
    assert view.total().tolist() == summed(rows, rows, 2**32)
    assert (view.ids, view.n, view.d, view.bad) == (tuple(sorted(rows)), n, d, 0)
    assert all(torch.equal(rows[party], before[party]) for party in rows)


def test_two_hundred_clients_on_a_sparse_ring(wire, intake):
    channel = PairwiseMasks(clients=200, corrupt=0.05, dropouts=0.05)
    assert not channel.graph(200).complete
    rows = whole_rows(200, 3, largest=2**12)
    lost = {"keys": {3}, "shares": {30}, "masked": {60, 63}, "unmask": {90}}
    view = channel.collect(list(rows), intake(3), wire(channel, rows, lost))
    ids = rows.keys() - {3, 30, 60, 63}
    assert view.ids == tuple(sorted(ids))
    assert view.total().tolist() == summed(rows, ids, 2**32)


@pytest.mark.parametrize(("d", "bits"), [(65_535, 32), (65_537, 32), (32_769, 40), (3_000_000, 24)])
def test_long_rows(d, bits, wire, intake):
    channel = replace(CHANNEL, modulus_bits=bits)
    rows = whole_rows(2, d, largest=2**22)
    total = channel.collect(list(rows), intake(d), wire(channel, rows)).total()
    half = 2 ** (bits - 1)
    exact = (sum(row.numpy().astype(np.int64) for row in rows.values()) + half) % (2 * half) - half
    assert np.array_equal(total.numpy(), exact.astype(np.float32))


@pytest.mark.parametrize("bits", [8, 12, 16, 24, 31, 32, 33, 40, 53])
def test_the_edges_of_the_range(bits, wire, intake):
    channel, half = replace(CHANNEL, modulus_bits=bits), 2 ** (bits - 1)
    edges = [half, -half, half - 1, 1 - half, 0, -1]
    rows = {n: torch.tensor(edges[n:] + edges[:n], dtype=torch.float64) for n in range(6)}
    for chosen in ([0, 1], [0, 2, 3], list(range(6))):
        line = wire(channel, rows)
        total = channel.collect(chosen, intake(6), line).total()
        assert total.tolist() == torch.tensor(summed(rows, chosen, 2 * half)).float().tolist()


def test_the_error_is_zero():
    assert CHANNEL.error_bound(10**6, 12) == 0


def test_a_fixed_point_codec(wire, gaussian):
    codec, rows = FixedPoint(bound=1.0, bits=20), gaussian(5, 30)
    make = torch.Generator().manual_seed
    coded = {party: codec.encode(row[None], {}, [make(party)])[0] for party, row in rows.items()}
    total = CHANNEL.collect(list(rows), Intake(codec, 30, Reveals.SUM), wire(CHANNEL, coded)).total()
    assert torch.equal(total, (sum(one.rows[0] for one in coded.values()) * 2.0**-20).float())
    assert float((total - sum(rows.values())).norm()) <= codec.error_bound(30, 5)


def test_distributed_noise_rides_on_it(wire):
    """Noise of 860 steps in the sum and a modulus of 2048: it wraps, on the wire as in the codec."""
    codec = DistributedNoise(
        max_grad_norm=1.0, grid=2.0**-6, noise_multiplier=10.0, survivors=4, clients=8, modulus_bits=11
    )
    channel = PairwiseMasks(clients=8, modulus_bits=11).with_floor(4)
    generators = [torch.Generator().manual_seed(seed) for seed in range(6)]
    coded = {party: codec.encode(torch.full((1, 50), 0.1), {}, [own])[0] for party, own in enumerate(generators)}
    direct = sum(one.rows for one in coded.values())
    assert direct.abs().max() > 1024
    view = channel.collect(list(coded), Intake(codec, 50, Reveals.SUM, least_answers=4), wire(channel, coded))
    assert torch.equal(view.total(), codec.decode(Encoded(direct, {}), 50)[0])


def test_a_wide_modulus_is_exact_before_decoding(wire):
    """float64 from the wire to the codec: float32 would lose the last digits."""
    codec = FixedPoint(bound=2.0**40, bits=40)
    rows = {
        1: torch.tensor([2.0**39 + 1, 3.0], dtype=torch.float64),
        2: torch.tensor([1 - 2.0**39, 4.0], dtype=torch.float64),
    }
    channel = replace(CHANNEL, modulus_bits=50)
    total = channel.collect([1, 2], Intake(codec, 2, Reveals.SUM), wire(channel, rows)).total()
    assert total.tolist() == [2.0, 7.0]


# Drop-outs


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(2, 7), st.data())
def test_drop_outs_at_any_stage_down_to_the_threshold(wire, intake, n, data):
    channel = PairwiseMasks(clients=8, corrupt=0.1, dropouts=0.3)
    rows = whole_rows(n, 3)
    lost = {stage: data.draw(st.sets(st.sampled_from(sorted(rows)), max_size=n // 2 + 1)) for stage in STAGES}
    announced = rows.keys() - lost["keys"]
    dealt = announced - lost["shares"]
    survivors = dealt - lost["masked"]
    enough = True
    if announced:
        needed = max(channel.graph(len(announced)).threshold, 2) if len(announced) > 1 else 2
        enough = all(not left or len(left) >= needed for left in (dealt, survivors, survivors - lost["unmask"]))
        enough = enough and (not survivors or bool(survivors - lost["unmask"])) and len(announced) > 1
    line = wire(channel, rows, lost)
    if enough:
        view = channel.collect(list(rows), intake(3), line)
        assert view.ids == tuple(sorted(survivors))
        assert view.total().tolist() == (summed(rows, survivors, 2**32) if survivors else [0, 0, 0])
    else:
        with pytest.raises(TooFewClients):
            channel.collect(list(rows), intake(3), line).total()


def test_every_drop_out_that_is_assumed_is_recovered(wire, intake):
    """10 clients, of whom 3 may be missing and 1 corrupt: any 3 at each stage, and never fewer left than 7."""
    channel = PairwiseMasks(clients=10, corrupt=0.1, dropouts=0.3)
    rows = whole_rows(10, 2)
    for stage in STAGES[1:]:
        for first in (3, 15, 24):
            gone = {first, first + 3, first + 6}
            view = channel.collect(list(rows), intake(2), wire(channel, rows, {stage: gone}))
            left = rows.keys() - (set() if stage == "unmask" else gone)
            assert view.total().tolist() == summed(rows, left, 2**32)


@pytest.mark.parametrize("cohort", [[], [3, 6]])
@pytest.mark.parametrize("stage", STAGES[:3])
def test_nobody_gives_zeros(cohort, stage, wire, intake):
    rows = whole_rows(2, 4)
    view = CHANNEL.collect(cohort, intake(4), wire(CHANNEL, rows, {stage: {3, 6}}))
    assert (view.ids, view.n, view.d, view.bad) == ((), 0, 4, 0)
    assert torch.equal(view.total(), torch.zeros(4))


def test_too_few_answers_end_the_round_before_anything_is_unmasked(wire):
    rows = whole_rows(6, 2)
    intake = Intake(FixedPoint(1.0, 8), 2, Reveals.SUM, least_answers=6)
    line = wire(CHANNEL, rows, {"masked": {3}})
    with pytest.raises(TooFewClients, match="least_answers=6: 5"):
        CHANNEL.collect(list(rows), intake, line)
    assert "unmask" not in {stage for stage, _, _ in line.sent}


@pytest.mark.parametrize("stage", STAGES[:3])
def test_a_floor_ends_the_round_before_anything_is_unmasked(stage, wire, intake):
    channel, rows = CHANNEL.with_floor(5), whole_rows(5, 2)
    line = wire(channel, rows, {stage: {3}})
    with pytest.raises(TooFewClients, match="smallest_release=5"):
        channel.collect(list(rows), intake(2), line)
    assert "unmask" not in {at for at, _, _ in line.sent}


def test_a_cohort_beyond_the_head_room(wire, intake):
    rows = whole_rows(13, 2)
    with pytest.raises(RoundFailed, match="clients=12: a cohort of 13"):
        CHANNEL.collect(list(rows), intake(2), wire(CHANNEL, rows))


# Rows that are not sent


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 0.5, 2.0**31 + 1, 1e300])
def test_a_row_out_of_range_is_left_out_and_counted(value, wire, intake):
    rows = whole_rows(4, 3)
    rows[6][1] = value
    view = CHANNEL.collect(list(rows), intake(3), wire(CHANNEL, rows))
    assert (view.ids, view.bad) == ((3, 9, 12), 1)
    assert view.total().tolist() == summed(rows, (3, 9, 12), 2**32)


def test_the_last_coordinate_of_a_long_row_is_looked_at(wire, intake):
    rows = whole_rows(4, 70_000)
    rows[6][-1] = 0.5
    assert CHANNEL.collect(list(rows), intake(70_000), wire(CHANNEL, rows)).ids == (3, 9, 12)


def test_all_refused(wire, intake):
    rows = dict.fromkeys(range(3), torch.full((4,), 0.5))
    with pytest.raises(RoundFailed, match=r"rows of 3 clients are not whole numbers.*FixedPoint"):
        CHANNEL.collect(list(rows), intake(4), wire(CHANNEL, rows))


def test_side_information_has_no_place(wire, intake):
    rows = {1: Encoded(torch.zeros(1, 2), {"scale": torch.ones(1)}), 2: torch.zeros(2)}
    with pytest.raises(InvalidArgument, match="side information"):
        CHANNEL.collect([1, 2], intake(2), wire(CHANNEL, rows))


def test_a_row_of_another_width_is_left_out_and_counted(wire, intake):
    rows = {**whole_rows(5, 3), 100: torch.zeros(2), 101: torch.zeros(4), 102: torch.zeros(0)}
    view = CHANNEL.collect(list(rows), intake(3), wire(CHANNEL, rows))
    assert (view.n, view.bad) == (5, 3)
    assert view.total().tolist() == summed(rows, view.ids, 2**32)


def test_another_weight_than_the_server_knows_is_left_out(wire):
    rows = {
        n: Encoded(row[None], {}, weight)
        for (n, row), weight in zip(whole_rows(4, 3).items(), (2, 1, 3, 1), strict=True)
    }
    intake = Intake(FixedPoint(2.0**20, 20), 3, Reveals.SUM, weights={12: 2.0, 6: 2.0})
    view = CHANNEL.collect(list(rows), intake, wire(CHANNEL, rows))
    assert (view.ids, view.bad) == ((3, 9, 12), 1)


# Secrets


def test_secrets_do_not_travel_and_are_forgotten(wire, intake):
    rows = whole_rows(5, 3)
    line = wire(CHANNEL, rows)
    seen: set[bytes] = set()

    def change(party, reply):
        names = ("sharing", "masking", "seed", "kept", "receiving")
        kept = {name: line.memories[party].get(name) for name in names}
        seen.update(value for value in kept.values() if value)
        return reply

    line.change = change
    view = CHANNEL.collect(list(rows), intake(3), line)
    assert len(seen) == 5 * 5
    assert all(not {"sharing", "masking", "seed"} & memory.keys() for memory in line.memories.values())
    view.total()
    assert all(memory.keys() == {"done"} for memory in line.memories.values())
    spoken = b"".join(content for _, _, content in (*line.sent, *line.received))
    assert not any(secret in spoken for secret in seen if len(secret) == 32)
    text = repr(CHANNEL) + repr(view) + repr(vars(view).keys())
    assert not any(secret.hex() in text or repr(secret)[2:-1] in text for secret in seen)


def test_what_the_server_gets_is_uniform(wire, roster, intake):
    """A row of zeros and one of ones give bytes of chi-square 255 +- 22.6; p under 1e-8 either way fails."""
    d = 1 << 15
    rows = {1: torch.zeros(d), 2: torch.ones(d), 3: torch.zeros(d)}
    line = wire(CHANNEL, rows)
    CHANNEL.collect(list(rows), intake(d), line).total()
    for party, reply in line.replies("masked").items():
        content = roster.opened(reply, party)[1][0]
        counts = np.bincount(np.frombuffer(content, np.uint8), minlength=256)
        p = chi2.sf(((counts - d / 64) ** 2 / (d / 64)).sum(), 255)
        assert 1e-8 < p < 1 - 1e-8


def test_a_late_row_is_hidden_by_its_own_mask(wire, roster, intake):
    """The server says a client dropped out although its row came, and is given its mask key: that is not enough."""
    rows = whole_rows(5, 200)
    line = wire(CHANNEL, rows)
    seeds = {}

    def change(party, reply):
        seeds[party] = line.memories[party].get("seed") or seeds.get(party)
        return reply

    class Late:
        server = line.server

        def __call__(self, stage, requests):
            for party, reply in line(stage, requests):
                if (stage, party) != ("masked", 6):
                    yield party, reply

    line.change = change
    assert CHANNEL.collect(list(rows), intake(200), Late()).total().tolist() == summed(rows, rows.keys() - {6}, 2**32)
    order = sorted(rows)
    answers = {p: roster.opened(reply, p)[1][0] for p, reply in line.replies("unmask").items()}
    at = 33 * order.index(6)
    shares = [(order.index(p) + 1, content[at + 1 : at + 33]) for p, content in answers.items()]
    key = loaded(join(shares, CHANNEL.graph(5).threshold))
    announced = {p: Announced.all_from(roster.opened(r, p)[1][0])[0] for p, r in line.replies("keys").items()}
    late = np.frombuffer(roster.opened(line.replies("masked")[6], 6)[1][0], "<u4").copy()
    for other in rows.keys() - {6}:
        sign_of(other, 6)(late, mask_key(key, announced[6], announced[other], 0))
    row = np.array(rows[6].tolist(), np.int64)
    assert (late.view(np.int32) == row).mean() < 0.05
    subtract_mask(late, seeds[6])  # the one secret that nobody gives for a drop-out
    assert np.array_equal(late.view(np.int32), row)


def test_no_two_rounds_share_a_mask(wire, roster, intake):
    rows = whole_rows(3, 100)
    sent = []
    for _ in range(2):
        line = wire(CHANNEL, rows)
        CHANNEL.collect(list(rows), intake(100), line).total()
        sent += [roster.opened(reply, party)[1][0] for party, reply in line.replies("masked").items()]
    words = np.stack([np.frombuffer(content, "<u4") for content in sent])
    assert all((words[i] == words[j]).mean() < 0.1 for i in range(6) for j in range(i))


# Cost and statements


def test_four_bytes_a_parameter(wire, intake):
    channel, d = PairwiseMasks(clients=11, neighbours=10), 200_000
    rows = whole_rows(11, d)
    line = wire(channel, rows)
    channel.collect(list(rows), intake(d), line).total()
    sent = [sum(len(content) for _, party, content in line.received if party == own) for own in rows]
    assert 4 < max(sent) / d <= 4.1


def peak_bytes(n, d, roster, intake):
    """Most memory in use at once while one process plays everybody, and keeps no message."""
    row, memories = torch.ones(d, dtype=torch.float64), {}

    class Thin:
        server = roster.party(SERVER)

        def __call__(self, stage, requests):
            for party, request in requests.items():
                memory, reply = CHANNEL.answer(
                    roster.party(party), stage, memories.get(party, {}), request, lambda: Encoded(row[None], {})
                )
                memories[party] = memory
                yield party, reply

    tracemalloc.start()
    try:
        assert CHANNEL.collect(range(n), intake(d), Thin()).total()[0] == n
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_the_server_holds_one_row_whatever_the_cohort(roster, intake):
    """Nine rows more would be 9 MB."""
    d = 250_000
    peak_bytes(2, 10, roster, intake)  # tables and caches
    assert peak_bytes(12, d, roster, intake) < peak_bytes(3, d, roster, intake) + 4 * d


def test_what_it_states():
    graph = PairwiseMasks(clients=100, neighbours=10).graph(100)
    assert not graph.meets_bounds and "NOT within" in graph.statement
    assert PairwiseMasks(clients=100).graph(100).meets_bounds
    assert CHANNEL.with_floor(5).smallest_release == 5
    assert CHANNEL.with_floor(5).with_floor(3).smallest_release == 5
    assert (CHANNEL.modulus, CHANNEL.largest_coordinate, CHANNEL.most_clients) == (2**32, 2.0**31, 12)
    assert CHANNEL.client_stages == STAGES
    assert "follows the protocol" in CHANNEL.learns["trust"]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"clients": 1}, "clients=1"),
        ({"clients": 10, "smallest_release": 1}, "smallest_release=1"),
        ({"clients": 10, "smallest_release": 11}, "clients=10"),
        ({"clients": 10, "modulus_bits": 7}, "modulus_bits=7"),
        ({"clients": 10, "modulus_bits": 54}, "modulus_bits=54"),
        ({"clients": 10, "corrupt": 1.0}, "corrupt="),
        ({"clients": 10, "corrupt": 0.6, "dropouts": 0.4}, "nobody honest"),
        ({"clients": 10, "dropouts": -0.1}, "dropouts="),
        ({"clients": 10, "dropouts": 0.5}, "under 1/2"),
        ({"clients": 100, "neighbours": 7}, "even"),
        ({"clients": 300, "corrupt": 0.9, "dropouts": 0.09}, "255 shares"),
        ({"clients": 300, "neighbours": 256}, "255 shares"),
    ],
)
def test_bad_arguments(arguments, match):
    with pytest.raises(InvalidArgument, match=match):
        PairwiseMasks(**arguments)
