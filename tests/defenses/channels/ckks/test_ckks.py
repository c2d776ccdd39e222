from dataclasses import replace

import numpy as np
import pytest
import tenseal as ts
import torch
from hypothesis import given
from hypothesis import strategies as st

from privfm.checks import BrokenEnvelope, InvalidArgument, Overflow, RoundFailed, TooFewClients
from privfm.contracts import KEY_HOLDER, Encoded
from privfm.defenses.channels import CKKS
from privfm.defenses.channels.ckks.ciphertexts import Ring, encrypt, public_ring
from privfm.defenses.channels.envelope import fingerprint
from privfm.defenses.channels.key_holder import signature

CHANNEL = CKKS(bound=1.0, clients=8)
NUMBERS = CHANNEL.parameters.numbers
FORMS = {
    "grid": CHANNEL,
    "grid, clients": replace(CHANNEL, release="clients"),
    "clients": replace(CHANNEL, release="clients", exact_grid=False),
    "public": replace(CHANNEL, exact_grid=False),
}

each_form = pytest.mark.parametrize("channel", FORMS.values(), ids=FORMS.keys())


def released(line, roster, channel=CHANNEL):
    """What the key holder answered, in steps."""
    return np.frombuffer(roster.opened(line.replies("decrypt")[KEY_HOLDER], KEY_HOLDER)[1][0], "<i8")


# The sum


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("d", [1, 2, NUMBERS - 1, NUMBERS, NUMBERS + 1, 3 * NUMBERS])
def test_the_sum_is_within_the_stated_bound(d, seed, wire, gaussian, intake):
    rows = gaussian(4, d, seed)
    got = CHANNEL.collect(list(rows), intake(d), wire(CHANNEL, rows)).total().double()
    exact = sum(row.double() for row in rows.values())
    float32 = 2**-24 * float(exact.norm())
    assert float((got - exact).norm()) <= CHANNEL.error_bound(d, 4) + float32


@pytest.mark.parametrize("bits", [16, 31])
def test_the_bound_is_met_and_not_by_far(bits, wire, gaussian, intake, roster):
    d, n = 5000, 8
    channel, rows = CKKS(bound=0.1, clients=n, bits=bits), gaussian(n, 5000)
    line = wire(channel, rows)
    channel.collect(list(rows), intake(d), line).total()
    error = np.linalg.norm(released(line, roster) * channel.step - sum(row.double().numpy() for row in rows.values()))
    assert channel.error_bound(d, n) / 20 < error < channel.error_bound(d, n)


def test_the_sum_of_whole_steps_is_exact(wire, gaussian, intake, roster):
    """So nothing of the encryption noise is released, and runs can be repeated."""
    rows = gaussian(8, 300)
    sums = []
    for _ in range(2):
        line = wire(CHANNEL, rows)
        CHANNEL.collect(list(rows), intake(300), line).total()
        sums.append(released(line, roster))
    assert np.array_equal(sums[0], sum(CHANNEL.steps(row) for row in rows.values()))
    assert np.array_equal(sums[0], sums[1])


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("bits", [8, 31])
@pytest.mark.parametrize("clients", [2, 16])
def test_the_largest_sum_does_not_wrap(clients, bits, sign, wire, intake):
    """Every coordinate at the bound; the row with the largest coefficients is in the tests of the parameters."""
    channel = CKKS(bound=0.25, clients=clients, bits=bits)
    d = channel.parameters.numbers
    rows = dict.fromkeys(range(clients), torch.full((d,), sign * 0.25))
    assert set(channel.collect(list(rows), intake(d), wire(channel, rows)).total().tolist()) == {sign * 0.25 * clients}


def test_one_thousandth_of_the_bound_is_still_resolved(wire, gaussian, intake):
    """Coordinates are far smaller than an L2 clip; the error is relative to the update, not to the bound."""
    rows = {party: row / 1000 for party, row in gaussian(4, 100).items()}
    total = CHANNEL.collect(list(rows), intake(100), wire(CHANNEL, rows)).total()
    assert float((total - sum(rows.values())).norm()) < 1e-5 * float(total.norm())


@given(st.lists(st.floats(-2.0, 2.0, width=32), min_size=1, max_size=20))
def test_cutting_never_makes_a_coordinate_longer(values):
    row = torch.tensor(values)
    channel = CKKS(bound=2.0, clients=2, bits=9)
    cut = channel.steps(row) * channel.step
    assert (np.abs(cut) <= row.double().abs().numpy()).all()
    assert (row.double().numpy() - cut < channel.step).all()


@each_form
def test_nothing_is_printed(channel, capfd, wire, gaussian, intake):
    """SEAL warns on C's standard output about vectors longer than its slots."""
    d = 2 * channel.parameters.numbers + 1
    rows = gaussian(2, d)
    channel.collect(list(rows), intake(d), wire(channel, rows)).total()
    assert capfd.readouterr() == ("", "")


# What does not fit


@pytest.mark.parametrize("value", [1.0001, -1.0001, 1e30, float("nan"), float("-inf")])
def test_a_coordinate_beyond_the_bound_is_refused_by_the_client(value, wire, gaussian, intake):
    rows = {**gaussian(3, 5), 99: torch.tensor([0, 0, value, 0, 0])}
    with pytest.raises(Overflow, match=r"bound=1.0: a coordinate .* raise bound or clip"):
        CHANNEL.steps(rows[99])
    view = CHANNEL.collect(list(rows), intake(5), wire(CHANNEL, rows))
    assert (view.ids, view.bad) == ((3, 6, 9), 1)
    torch.testing.assert_close(view.total(), rows[3] + rows[6] + rows[9], rtol=1e-6, atol=1e-7)


def test_the_bound_itself_fits(wire, intake):
    rows = {0: torch.tensor([1.0, -1.0]), 1: torch.tensor([1.0, -1.0])}
    assert CHANNEL.collect([0, 1], intake(2), wire(CHANNEL, rows)).total().tolist() == [2.0, -2.0]


def test_a_bound_that_nobody_meets_fails_the_round_with_the_way_out(wire, gaussian, intake):
    rows = {party: 100 * row for party, row in gaussian(3, 5).items()}
    with pytest.raises(RoundFailed, match=r"bound=1.0: the rows of 3 clients lie beyond; raise bound"):
        CHANNEL.collect(list(rows), intake(5), wire(CHANNEL, rows))


@each_form
def test_a_client_that_obeys_no_bound_fails_the_round(channel, wire, gaussian, intake, roster):
    """The server cannot see it; the key holder sees that the sum is off the grid or beyond n times the bound."""
    rows = gaussian(3, 50)

    def beyond(party, reply):
        if party != 6:
            return reply
        header, _ = roster.opened(reply, 6)
        public = roster.opened(line.replies("keys")[KEY_HOLDER], KEY_HOLDER)[1][0]
        values = np.append(np.linspace(-40.0, 40.0, 50), 1.0)
        return roster.sealed(header, [encrypt((public, channel.parameters), values / 10)], 6)

    line = wire(channel, rows, change=beyond)
    view = channel.collect(list(rows), intake(50), line)
    with pytest.raises(RoundFailed, match=r"not one of 3 clients.*malicious client"):
        view.total()


@each_form
@pytest.mark.parametrize("largest", [3.5, 1e30])
def test_a_sum_beyond_the_bound_of_its_clients_fails_the_round(channel, largest, wire, gaussian, intake):
    """The canary is right, a coordinate is not: this is what the key holder looks at."""
    values = np.array([largest, 0.0, 3.0])
    with pytest.raises(RoundFailed, match="whole steps, or not within the bound"):
        channel._checked(values, 3)
    assert len(channel._checked(np.array([3.0, 0.0, 3.0]), 3)) == 2


def test_a_cohort_without_head_room_fails_the_round(wire, gaussian, intake):
    rows = gaussian(9, 5)
    with pytest.raises(RoundFailed, match="clients=8: a cohort of 9 has no head-room; raise clients"):
        CHANNEL.collect(list(rows), intake(5), wire(CHANNEL, rows))


def test_side_information_is_refused(wire, gaussian, intake):
    rows = {party: Encoded(row[None], {"scale": torch.ones(1)}) for party, row in gaussian(3, 5).items()}
    with pytest.raises(InvalidArgument, match="side information"):
        CHANNEL.collect(list(rows), intake(5), wire(CHANNEL, rows))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bound": 0.0, "clients": 8}, "bound=0.0"),
        ({"bound": float("nan"), "clients": 8}, "bound=nan"),
        ({"bound": 1.0, "clients": 1}, "clients=1"),
        ({"bound": 1.0, "clients": 8, "bits": 50}, "lower bits"),
        ({"bound": 1.0, "clients": 8, "smallest_release": 1}, "smallest_release=1"),
        ({"bound": 1.0, "clients": 8, "smallest_release": 9}, "clients=8"),
        ({"bound": 1.0, "clients": 8, "release": "server"}, "release='server'"),
        ({"bound": 1.0, "clients": 8, "error": 0.0}, "error=0.0"),
        ({"bound": 1.0, "clients": 8, "error": 1e-9, "exact_grid": False}, "no ring up to 8192"),
    ],
)
def test_bad_fields_are_refused(fields, message):
    with pytest.raises(InvalidArgument, match=message):
        CKKS(**fields)


# Roles


@each_form
def test_the_server_receives_nothing_that_decrypts(channel, wire, gaussian, intake, roster):
    rows = gaussian(3, 50)
    line = wire(channel, rows)
    channel.collect(list(rows), intake(50), line)
    memory = line.memories[KEY_HOLDER]
    public = roster.opened(line.replies("keys")[KEY_HOLDER], KEY_HOLDER)[1][0]
    ring = public_ring(public, channel.parameters)
    assert not ring._context.has_secret_key()
    part = roster.opened(line.replies("update")[3], 3)[1][0]
    with pytest.raises(ValueError, match="hold a Secret key"):
        ring.decrypted(ring.read(part, ring.encrypted(np.zeros(1))))
    with pytest.raises(ValueError, match="doesn't support decryption"):
        ring._context.decryptor()
    assert np.isfinite(Ring(memory["secret"], channel.parameters, secret=True).decrypted(ring.encrypted(np.ones(1)))[0])
    # every 64 bytes of the key holder's secret, public keys left out, are absent from all the server got
    secret = ts.context_from(memory["secret"]).serialize(
        save_public_key=False, save_secret_key=True, save_galois_keys=False, save_relin_keys=False
    )
    received = b"".join(content for _, _, content in line.received)
    kept = ring._context.serialize(save_secret_key=True)  # all that the server's own object can write
    windows = [secret[at : at + 64] for at in range(200, len(secret) - 64, 64)]
    assert len(windows) > 100
    assert not any(window in received for window in windows)
    assert not any(window in kept for window in windows)
    assert any(window in memory["secret"] for window in windows)  # the search itself works


def test_a_context_made_public_in_memory_still_decrypts():
    """Negative control: this is why keys are parsed anew from bytes without the secret."""
    context = ts.context(ts.SCHEME_TYPE.CKKS, 4096, coeff_mod_bit_sizes=[40, 20], n_threads=1)
    context.global_scale = 2.0**30
    context.make_context_public()
    assert not context.has_secret_key()
    assert context.decryptor() is not None


@each_form
def test_a_secret_key_in_the_key_holders_message_is_refused(channel, wire, roster):
    line = wire(channel, {})
    message = dict(line("keys", {KEY_HOLDER: b""}))[KEY_HOLDER]
    header, _ = roster.opened(message, KEY_HOLDER)
    secret, holder = line.memories[KEY_HOLDER]["secret"], roster.party(KEY_HOLDER)
    signed = [secret, signature(holder, channel._head(b""), secret)]
    forged = roster.sealed(replace(header, key=fingerprint(secret)), signed, KEY_HOLDER)
    with pytest.raises(BrokenEnvelope, match="secret"):
        channel._open_keys(line.server, KEY_HOLDER, forged)


@each_form
def test_the_key_is_new_in_every_round_and_spent_after_it(channel, wire, gaussian, intake, roster):
    rows = gaussian(2, 3)
    lines = [wire(channel, rows), wire(channel, rows)]
    for line in lines:
        channel.collect(list(rows), intake(3), line).total()
        assert line.memories[KEY_HOLDER].keys() == {"done"}
    first, second = (roster.opened(line.replies("keys")[KEY_HOLDER], KEY_HOLDER)[0] for line in lines)
    assert first.key != second.key


@each_form
def test_the_sum_is_released_once(channel, wire, gaussian, intake):
    rows = gaussian(2, 3)
    view = channel.collect(list(rows), intake(3), wire(channel, rows))
    view.total()
    with pytest.raises(InvalidArgument, match="repeated"):
        view.total()


def test_repr_is_the_configuration_and_nothing_else():
    assert repr(CHANNEL) == (
        "CKKS(bound=1.0, clients=8, bits=31, smallest_release=2, noise_multiplier=0.0, sensitivity=1.0, "
        "release='public', exact_grid=True, error=0.0001)"
    )


def test_too_few_clients_fail_the_round(wire, gaussian, intake):
    channel = replace(CHANNEL, smallest_release=3)
    rows = gaussian(3, 4)
    line = wire(channel, rows, lost={"update": {6}})
    with pytest.raises(TooFewClients, match=r"smallest_release=3: only 2 client\(s\) answered"):
        channel.collect(list(rows), intake(4), line)
    assert [stage for stage, party, _ in line.received if party == KEY_HOLDER] == ["keys"]


@pytest.mark.parametrize("stage", ["keys", "decrypt"])
def test_a_silent_key_holder_fails_the_round(stage, wire, gaussian, intake):
    rows = gaussian(3, 4)
    with pytest.raises(RoundFailed, match=f"did not answer to '{stage}'"):
        CHANNEL.collect(list(rows), intake(4), wire(CHANNEL, rows, lost={stage: {KEY_HOLDER}})).total()
