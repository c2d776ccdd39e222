"""Sums of whole numbers under BFV: exact for every number of clients, width and edge, whoever decrypts."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import tenseal as ts
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from privfm.checks import InvalidArgument, Overflow, RoundFailed, TooFewClients
from privfm.contracts import KEY_HOLDER, SERVER, Encoded
from privfm.defenses.channels.bfv import BFV
from privfm.defenses.channels.bfv.ciphertexts import RunningSum, uniform
from privfm.defenses.channels.envelope import Link
from privfm.defenses.privacy.distributed import DistributedNoise
from privfm.defenses.transforms import FixedPoint

HOLDERS = ["apart", "clients", "blinded"]
CHANNEL = BFV(clients=8, bits=10)
SLOTS = CHANNEL.parameters.slots

each_holder = pytest.mark.parametrize("holder", HOLDERS)


def whole_rows(n, d, bits, seed=0):
    """n rows of whole numbers up to 2^bits, by client; ids are neither dense nor sorted."""
    generator = np.random.default_rng(seed)
    values = generator.integers(-(2**bits), 2**bits, (n, d), endpoint=True)
    return {3 * (n - i): torch.from_numpy(row.astype(np.float64)) for i, row in enumerate(values)}


def total_of(channel, rows, wire, intake, **options):
    d = len(next(iter(rows.values())))
    return channel.collect(list(rows), intake(d), wire(channel, rows, **options)).total()


def opened(line, stage, party, roster):
    """Header and parts of what a party answered."""
    message = next(content for s, p, content in line.received if (s, p) == (stage, party))
    return Link(roster.party(SERVER), party).open(message)


# The sum


@each_holder
@pytest.mark.parametrize("d", [1, 2, SLOTS - 2, SLOTS - 1, SLOTS, SLOTS + 1, 3 * SLOTS])
def test_the_sum_is_exact_at_every_width(d, holder, wire, intake):
    rows = whole_rows(4, d, 10)
    assert torch.equal(total_of(replace(CHANNEL, holder=holder), rows, wire, intake), sum(rows.values()))


@pytest.mark.parametrize("n", [2, 3, 10, 50, 200])
def test_the_sum_is_exact_for_every_number_of_clients(n, wire, intake):
    rows = whole_rows(n, 5, 12, seed=n)
    assert torch.equal(total_of(BFV(clients=n, bits=12), rows, wire, intake), sum(rows.values()))


def test_the_sum_is_exact_at_the_size_of_a_model(wire, intake):
    rows = whole_rows(2, 300_000, 10)
    assert torch.equal(total_of(BFV(clients=10, bits=10), rows, wire, intake), sum(rows.values()))


@each_holder
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("clients", "bits"), [(2, 0), (2, 31), (16, 8), (16, 40)])
def test_the_largest_sum_does_not_wrap(clients, bits, sign, holder, wire, intake):
    rows = dict.fromkeys(range(clients), torch.full((3,), sign * 2.0**bits, dtype=torch.float64))
    total = total_of(BFV(clients=clients, bits=bits, holder=holder), rows, wire, intake)
    assert total.tolist() == [sign * clients * 2.0**bits] * 3


def test_large_sums_are_exact_before_the_view_rounds_them(wire, roster, intake):
    """Sums up to 2^45 do not fit float32: compared are the whole numbers that were decrypted."""
    rows = whole_rows(8, 30, 42)
    line = wire(BFV(clients=8, bits=42), rows)
    line.channel.collect(list(rows), intake(30), line).total()
    released = np.frombuffer(opened(line, "decrypt", KEY_HOLDER, roster)[1][0], "<i8")
    assert released.tolist() == [*sum(row.long() for row in rows.values()).tolist(), 8]


def test_200_clients_at_both_edges_do_not_wrap(wire, intake):
    rows = dict.fromkeys(range(200), torch.tensor([16.0, -16.0, 0.0], dtype=torch.float64))
    assert total_of(BFV(clients=200, bits=4), rows, wire, intake).tolist() == [3200.0, -3200.0, 0.0]


@given(st.lists(st.lists(st.integers(-(2**20), 2**20), min_size=3, max_size=3), min_size=2, max_size=4))
@settings(max_examples=15, deadline=None)
def test_any_whole_numbers_add_up(values):
    """The arithmetic without the protocol: encrypt, add, blind, decrypt."""
    channel = BFV(clients=4, bits=20)
    context = _context(channel)
    running = RunningSum(context, channel.parameters, 3)
    for row in values:
        running.add([ts.bfv_vector(context, row).serialize()])
    pad, t = uniform(3, channel.parameters.plain_modulus), channel.parameters.plain_modulus
    blinded = np.asarray(ts.bfv_vector_from(context, running.blinded(pad)[0]).decrypt())
    expected = np.asarray(values).sum(0)
    assert np.array_equal((blinded - pad - expected) % t, np.zeros(3))
    assert np.array_equal(ts.bfv_vector_from(context, running.serialized()[0]).decrypt(), expected)


def _context(channel):
    parameters = channel.parameters
    chain, t = list(parameters.chain), parameters.plain_modulus
    return ts.context(ts.SCHEME_TYPE.BFV, parameters.degree, plain_modulus=t, coeff_mod_bit_sizes=chain)


@each_holder
def test_drop_outs_are_left_out(holder, wire, intake):
    rows = whole_rows(6, 9, 10)
    channel = replace(CHANNEL, holder=holder)
    view = channel.collect(list(rows), intake(9), wire(channel, rows, lost={"update": {3, 12}}))
    assert (view.ids, view.bad) == ((6, 9, 15, 18), 0)
    assert torch.equal(view.total(), rows[6] + rows[9] + rows[15] + rows[18])


def test_weights_that_clients_folded_in_are_compared(wire, intake):
    rows = {party: Encoded(row[None] * 3, {}, weight=3.0) for party, row in whole_rows(4, 5, 8).items()}
    known = replace(intake(5), weights={3: 3.0, 6: 3.0, 9: 2.0, 12: 3.0})
    view = CHANNEL.collect(list(rows), known, wire(CHANNEL, rows))
    assert (view.ids, view.bad) == ((3, 6, 12), 1)
    assert torch.equal(view.total(), sum(rows[party].rows[0] for party in (3, 6, 12)))


def test_the_view_is_float32_and_runs_repeat(wire, intake):
    rows = whole_rows(3, 40, 10)
    first, second = (total_of(CHANNEL, rows, wire, intake) for _ in range(2))
    assert first.dtype == torch.float32
    assert torch.equal(first, second)


def test_nothing_is_printed(capfd, wire, intake):
    """SEAL warns on C's standard output about vectors longer than its slots."""
    total_of(CHANNEL, whole_rows(2, 2 * SLOTS + 1, 10), wire, intake)
    assert capfd.readouterr() == ("", "")


@each_holder
@pytest.mark.parametrize("modulus_bits", [20, 32])
def test_distributed_noise_rides_on_it(modulus_bits, holder, wire, intake):
    """Wrapped whole numbers in [-m/2, m/2) add up exactly, so that decoding meets the sum modulo m."""
    d, n = 300, 5
    codec = DistributedNoise(1.0, 2.0**-8, 1.0, survivors=n, clients=n, modulus_bits=modulus_bits)
    gaussian = torch.randn(n, d, generator=torch.Generator().manual_seed(1))
    generators = [torch.Generator().manual_seed(i) for i in range(n)]
    encoded = codec.encode(gaussian, {}, generators)[0].rows
    encoded[0, :2] = torch.tensor([-(2.0 ** (modulus_bits - 1)), 2.0 ** (modulus_bits - 1) - 1])  # both edges
    rows = dict(enumerate(encoded))
    channel = BFV(clients=n, bits=modulus_bits - 1, holder=holder)
    total = channel.collect(list(rows), intake(d, codecs=codec), wire(channel, rows)).total()
    assert torch.equal(total, codec.decode(Encoded(encoded.sum(0, keepdim=True), {}), d)[0])
    assert channel.largest_coordinate == 2.0 ** (modulus_bits - 1)
    assert channel.modulus is None


@each_holder
def test_a_fixed_point_codec_gives_the_weighted_mean(holder, wire, intake):
    """Rows times their weights, in steps of 2^-20; a coordinate beyond the codec's bound is refused by its client."""
    codec, d = FixedPoint(bound=4.0, bits=22), 60
    gaussian = torch.randn(5, d, generator=torch.Generator().manual_seed(2)).clamp(-1.2, 1.2)
    weights = torch.tensor([1.0, 2.0, 3.0, 0.5, 3.0])
    gaussian[4, 7] = 1.4  # times 3: beyond the bound
    generators = [torch.Generator().manual_seed(i) for i in range(5)]
    encoded = codec.encode(gaussian * weights[:, None], {}, generators)[0].rows
    rows = {i: Encoded(row[None], {}, weight=float(weights[i])) for i, row in enumerate(encoded)}
    channel = BFV(clients=5, bits=codec.bits, holder=holder)
    given_to = replace(intake(d, codecs=codec), weights=dict(enumerate(weights.tolist())))
    view = channel.collect(list(rows), given_to, wire(channel, rows))
    assert (view.ids, view.bad) == ((0, 1, 2, 3), 1)
    total = view.total()
    assert torch.equal(total, codec.decode(Encoded(encoded[:4].sum(0, keepdim=True), {}), d)[0])
    mean = (gaussian[:4] * weights[:4, None]).sum(0) / weights[:4].sum()
    torch.testing.assert_close(total / weights[:4].sum(), mean, rtol=0, atol=4 * codec.step / 6.5 + 1e-6)


# What does not fit


@pytest.mark.parametrize("value", [1025.0, -1025.0, 1e30, float("nan"), float("-inf")])
def test_a_number_beyond_the_range_is_refused_by_the_client(value, wire, intake):
    rows = whole_rows(3, 5, 10)
    rows[99] = torch.tensor([0, 0, value, 0, 0], dtype=torch.float64)
    with pytest.raises(Overflow, match=r"bits=10: a number of absolute value .* raise bits"):
        CHANNEL.numbers(rows[99])
    view = CHANNEL.collect(list(rows), intake(5), wire(CHANNEL, rows))
    assert (view.ids, view.bad) == ((3, 6, 9), 1)
    assert torch.equal(view.total(), rows[3] + rows[6] + rows[9])


@pytest.mark.parametrize("value", [0.5, -1.25, 1023.9999999999, 1e-300])
def test_a_number_that_is_not_whole_is_refused_by_the_client(value, wire, intake):
    rows = whole_rows(3, 5, 10)
    rows[99] = torch.tensor([0, 0, value, 0, 0], dtype=torch.float64)
    with pytest.raises(InvalidArgument, match="not whole"):
        CHANNEL.numbers(rows[99])
    view = CHANNEL.collect(list(rows), intake(5), wire(CHANNEL, rows))
    assert (view.ids, view.bad) == ((3, 6, 9), 1)


def test_a_range_that_nobody_meets_fails_the_round_with_the_way_out(wire, intake):
    rows = whole_rows(3, 50, 12)
    with pytest.raises(RoundFailed, match=r"bits=10: the rows of 3 clients .* raise bits"):
        total_of(CHANNEL, rows, wire, intake)


def test_a_row_of_another_width_is_left_out(wire, intake):
    rows = {**whole_rows(3, 9, 10), 100: torch.zeros(8), 101: torch.zeros(10), 102: torch.zeros(0)}
    view = CHANNEL.collect(list(rows), intake(9), wire(CHANNEL, rows))
    assert (view.ids, view.bad) == ((3, 6, 9), 3)
    assert torch.equal(view.total(), rows[3] + rows[6] + rows[9])


@each_holder
def test_a_client_that_obeys_no_range_fails_the_round(holder, wire, intake, roster):
    """The server cannot see it; who opens the sum sees that it lies beyond n times the range."""
    channel, rows = BFV(clients=8, bits=10, holder=holder), whole_rows(3, 50, 10)

    def beyond(party, reply):
        if party != 6:
            return reply
        header, _ = Link(roster.party(SERVER), 6).open(reply)
        keys = next(content for stage, _, content in line.received if stage == "keys")
        context = channel._open_keys(roster.party(SERVER), KEY_HOLDER, keys, 3)[2]
        huge = ts.bfv_vector(context, [channel.parameters.plain_modulus // 2 - 2000] * 50 + [1])
        return Link(roster.party(6), SERVER).seal(header, [huge.serialize()])

    line = wire(channel, rows, change=beyond)
    view = channel.collect(list(rows), intake(50), line)
    with pytest.raises(RoundFailed, match="one of them is malicious"):
        view.total()


def test_a_cohort_without_head_room_fails_the_round(wire, intake):
    rows = whole_rows(9, 5, 10)
    with pytest.raises(RoundFailed, match="clients=8: a cohort of 9 has no head-room; raise clients"):
        CHANNEL.collect(list(rows), intake(5), wire(CHANNEL, rows))


def test_side_information_is_refused(wire, intake):
    rows = {party: Encoded(row[None], {"scale": torch.ones(1)}) for party, row in whole_rows(3, 5, 10).items()}
    with pytest.raises(InvalidArgument, match="side information"):
        CHANNEL.collect(list(rows), intake(5), wire(CHANNEL, rows))


@each_holder
@pytest.mark.parametrize("cohort", [[], [1, 2]], ids=["empty", "silent"])
def test_nobody_gives_zeros(cohort, holder, wire, intake):
    channel = replace(CHANNEL, holder=holder)
    view = channel.collect(cohort, intake(6), wire(channel, {}, lost={"update": {1, 2}}))
    assert (view.n, view.d, view.bad) == (0, 6, 0)
    assert torch.equal(view.total(), torch.zeros(6))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"clients": 1, "bits": 10}, "clients=1"),
        ({"clients": 8, "bits": -1}, "bits=-1"),
        ({"clients": 8, "bits": 52}, "lower bits"),
        ({"clients": 8, "bits": 10, "smallest_release": 1}, "smallest_release=1"),
        ({"clients": 8, "bits": 10, "smallest_release": 9}, "clients=8"),
        ({"clients": 8, "bits": 10, "holder": "blind"}, "did you mean 'blinded'"),
    ],
)
def test_bad_fields_are_refused(fields, message):
    with pytest.raises(InvalidArgument, match=message):
        BFV(**fields)


# Roles


@each_holder
def test_the_server_receives_nothing_that_decrypts(holder, wire, intake, roster):
    channel, rows = replace(CHANNEL, holder=holder), whole_rows(3, 50, 10)
    line = wire(channel, rows)
    view = channel.collect(list(rows), intake(50), line)
    who = KEY_HOLDER if channel.server_learns_sum else 9  # the last client; the first one opens
    memory = dict(line.memories[who])
    view.total()
    _, keys = opened(line, "keys", KEY_HOLDER, roster)
    context = ts.context_from(keys[0], 1)
    assert not context.has_secret_key()
    _, parts = opened(line, "update", 3, roster)
    with pytest.raises(ValueError, match="secret_key"):
        ts.bfv_vector_from(context, parts[0]).decrypt()
    with pytest.raises(ValueError, match="doesn't support decryption"):
        context.decryptor()
    # every 64 bytes of the key holder's secret, public keys left out, are absent from all that travelled
    secret = ts.context_from(memory["secret"]).serialize(
        save_public_key=False, save_secret_key=True, save_galois_keys=False, save_relin_keys=False
    )
    travelled = b"".join(content for _, _, content in line.received + line.sent)
    windows = [secret[at : at + 64] for at in range(200, len(secret) - 64, 64)]
    assert len(windows) > 100
    assert not any(window in travelled for window in windows)
    assert any(window in memory["secret"] for window in windows)  # the search itself works
    assert pickle.dumps(channel).find(secret[200:264]) == -1


@each_holder
def test_who_learns_what(holder):
    channel = replace(CHANNEL, holder=holder)
    assert channel.server_learns_sum is (holder != "clients")
    assert ("sum" in channel.learns["server"]) is (holder != "clients")
    assert ("the sum" in channel.learns["key holder"]) is (holder == "apart")
    assert ("every row" in channel.learns["clients"]) is (holder == "clients")


def test_a_shared_key_is_for_the_clients_alone(wire, intake):
    """The key holder forgets it, who opened the sum too, and only those who are in the sum are asked to."""
    channel, rows = replace(CHANNEL, holder="clients"), whole_rows(4, 5, 10)
    line = wire(channel, rows, lost={"update": {6}, "open": {3}})
    total = channel.collect(list(rows), intake(5), line).total()
    assert torch.equal(total, (rows[3] + rows[9] + rows[12]).float())
    assert "secret" not in line.memories[KEY_HOLDER]
    assert [party for stage, party, _ in line.received if stage == "open"] == [9]
    assert "secret" not in line.memories[9]
    assert "secret" in line.memories[12]
    assert [party for stage, party, _ in line.sent if stage == "open"] == [3, 9]


def test_a_sum_that_no_client_opens_fails_the_round(wire, intake):
    channel, rows = replace(CHANNEL, holder="clients"), whole_rows(2, 5, 10)
    view = channel.collect(list(rows), intake(5), wire(channel, rows, lost={"open": {3, 6}}))
    with pytest.raises(RoundFailed, match="no client opened"):
        view.total()


def test_the_requests_for_the_sum_are_sealed_when_asked_for():
    from privfm.defenses.channels.bfv.channel import _Requests

    requests = _Requests(None, [3, 6], None, [])
    assert (list(requests), len(requests)) == ([3, 6], 2)
    assert 6 in requests.keys()  # noqa: SIM118  (what engines ask)
    with pytest.raises(KeyError):
        requests[9]


def test_a_blinded_key_holder_decrypts_uniform_numbers(wire, intake, roster):
    """Chi-square over 32 bins of [0, t), once for zeros and once for rows at the edge; both at 1e-7."""
    d, channel = 8000, BFV(clients=4, bits=10, holder="blinded")
    t = channel.parameters.plain_modulus
    for value in (0.0, 1024.0):
        rows = dict.fromkeys(range(4), torch.full((d,), value, dtype=torch.float64))
        seen = numbers_seen(channel, rows, wire, intake, roster)
        counts = np.bincount((seen % t) * 32 // t, minlength=32)
        assert ((counts - len(seen) / 32) ** 2).sum() / (len(seen) / 32) < chi2.isf(1e-7, 31)


def test_what_a_blinded_key_holder_decrypts_says_nothing_about_the_sum(wire, intake, roster):
    """Correlation of n pairs of independent numbers has deviation 1 / sqrt(n); 5.3 of them are 1e-7."""
    rows = whole_rows(4, 8000, 10)
    total = sum(rows.values()).numpy()
    blinded = numbers_seen(BFV(clients=4, bits=10, holder="blinded"), rows, wire, intake, roster)[:-1]
    assert abs(np.corrcoef(blinded, total)[0, 1]) < 5.4 / np.sqrt(len(total))
    apart = numbers_seen(BFV(clients=4, bits=10), rows, wire, intake, roster)
    assert np.array_equal(apart[:-1], total)  # negative control: without blinding it is the sum
    assert apart[-1] == 4  # and the canary


def numbers_seen(channel, rows, wire, intake, roster):
    """What the key holder decrypts, the canary last."""
    line = wire(channel, rows)
    d = len(next(iter(rows.values())))
    assert torch.equal(channel.collect(list(rows), intake(d), line).total(), sum(rows.values()))
    return np.frombuffer(opened(line, "decrypt", KEY_HOLDER, roster)[1][0], "<i8")


@pytest.mark.parametrize("modulus", [12289, 40961, 3 * 2**18 + 1])
def test_the_pad_is_uniform(modulus):
    """Also just above a power of two, where reducing instead of drawing anew would double half of the range."""
    drawn = uniform(64_000, modulus)
    assert (drawn.min() >= 0) and (drawn.max() < modulus) and len(drawn) == 64_000
    limit = chi2.isf(1e-7, 31)
    assert ((np.bincount(drawn * 32 // modulus, minlength=32) - 2000) ** 2).sum() / 2000 < limit
    reduced = np.random.default_rng(0).integers(0, 1 << modulus.bit_length(), 64_000) % modulus  # negative control
    assert ((np.bincount(reduced * 32 // modulus, minlength=32) - 2000) ** 2).sum() / 2000 > limit


def test_the_key_is_new_in_every_round_and_spent_after_it(wire, intake, roster):
    rows = whole_rows(2, 3, 10)
    lines = [wire(CHANNEL, rows), wire(CHANNEL, rows)]
    for line in lines:
        CHANNEL.collect(list(rows), intake(3), line).total()
        assert "secret" not in line.memories[KEY_HOLDER]
    first, second = (opened(line, "keys", KEY_HOLDER, roster)[0] for line in lines)
    assert first.key != second.key


@each_holder
def test_the_sum_is_released_once(holder, wire, intake):
    channel, rows = replace(CHANNEL, holder=holder), whole_rows(2, 3, 10)
    view = channel.collect(list(rows), intake(3), wire(channel, rows))
    view.total()
    with pytest.raises(InvalidArgument, match="repeated"):
        view.total()


def test_repr_is_the_configuration_and_nothing_else():
    assert repr(CHANNEL) == "BFV(clients=8, bits=10, holder='apart', smallest_release=2)"
    assert "secret" not in repr(BFV(clients=8, bits=10, holder="blinded"))


@each_holder
def test_too_few_clients_end_the_round(holder, wire, intake):
    channel = replace(CHANNEL, holder=holder).with_floor(3)
    assert channel.smallest_release == 3
    assert channel.with_floor(2) == channel
    rows = whole_rows(3, 4, 10)
    line = wire(channel, rows, lost={"update": {6}})
    with pytest.raises(TooFewClients, match=r"smallest_release=3: only 2 client\(s\) answered"):
        channel.collect(list(rows), intake(4), line)
    with pytest.raises(TooFewClients, match="least_answers=4"):
        channel.collect(list(rows), replace(intake(4), least_answers=4), wire(channel, rows))
    assert [stage for stage, party, _ in line.received if party == KEY_HOLDER] == ["keys"]


@pytest.mark.parametrize("stage", ["keys", "decrypt"])
def test_a_silent_key_holder_fails_the_round(stage, wire, intake):
    rows = whole_rows(3, 4, 10)
    with pytest.raises(RoundFailed, match=f"did not answer to '{stage}'"):
        CHANNEL.collect(list(rows), intake(4), wire(CHANNEL, rows, lost={stage: {KEY_HOLDER}})).total()
