"""Every message of the CKKS channel, broken, forged or replayed, on whichever side it arrives."""

from dataclasses import replace
from struct import pack, unpack_from

import numpy as np
import pytest
import tenseal as ts
import torch

from privfm.checks import (
    BrokenEnvelope,
    Corrupt,
    ParameterMismatch,
    Replay,
    RoundFailed,
    TooFewClients,
    WrongKey,
)
from privfm.contracts import KEY_HOLDER, SERVER
from privfm.defenses.channels import CKKS
from privfm.defenses.channels.ckks.ciphertexts import Ring, RunningSum, encrypt, new_keys, public_ring, written
from privfm.defenses.channels.envelope import Header, fingerprint
from privfm.defenses.channels.key_holder import signature

CHANNEL = CKKS(bound=1.0, clients=8)
CLIENTS = replace(CHANNEL, release="clients")
NUMBERS = CHANNEL.parameters.numbers
FORMS = {
    "grid": CHANNEL,
    "grid, clients": CLIENTS,
    "clients": replace(CLIENTS, exact_grid=False),
    "public": replace(CHANNEL, exact_grid=False),
}

each_form = pytest.mark.parametrize("channel", FORMS.values(), ids=FORMS.keys())


def keys_of(channel, wire, now=0):
    """A key holder after its first stage: its memory, and the message for the clients."""
    line = wire(channel, {}, round=now)
    message = dict(line("keys", {KEY_HOLDER: b""}))[KEY_HOLDER]
    return line.memories[KEY_HOLDER], message


@pytest.fixture(scope="module")
def key():
    """A public key of CHANNEL's parameters, whose secret nobody kept."""
    return new_keys(CHANNEL.parameters)[0], CHANNEL.parameters


# What the key holder is asked


def request_of(channel, message, roster, n=3, d=4):
    """A well-formed request for a sum of n rows of width d, all zero: header, and parts."""
    head, (public, _) = roster.opened(message, KEY_HOLDER)
    values = np.append(np.zeros(d), n)
    parts = [encrypt((public, channel.parameters), values)]
    if channel.release == "clients":
        parts.append(np.arange(n).astype("<i8").tobytes())
    return replace(head, stage="sum", length=d + 1, clients=n), parts


def decrypt(channel, memory, request, roster, now=0):
    return channel.reply(roster.party(KEY_HOLDER, now), "decrypt", memory, request, None)


@pytest.mark.parametrize(
    ("n", "error"), [(0, TooFewClients), (1, TooFewClients), (9, RoundFailed), (10_000, RoundFailed)]
)
def test_the_key_holder_decrypts_sums_only(n, error, wire, roster):
    memory, message = keys_of(CHANNEL, wire)
    head, parts = request_of(CHANNEL, message, roster, 3)
    with pytest.raises(error, match=f"a sum of {n} clients: expected 2 to 8"):
        decrypt(CHANNEL, memory, roster.sealed(replace(head, clients=n), parts, SERVER, KEY_HOLDER), roster)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"key": b"another key....."}, WrongKey),
        ({"parameters": b"other parameters"}, ParameterMismatch),
        ({"stage": "update"}, Corrupt),
        ({"length": NUMBERS + 1}, ParameterMismatch),
        ({"length": 2**60}, ParameterMismatch),
        ({"scale": 2.0}, ParameterMismatch),
        ({"weight": 2.0}, ParameterMismatch),
        ({"length": 0}, ParameterMismatch),
        ({"scheme": "bfv"}, Corrupt),
    ],
    ids=str,
)
@each_form
def test_the_key_holder_refuses_a_foreign_request(channel, change, error, wire, roster):
    memory, message = keys_of(channel, wire)
    head, parts = request_of(channel, message, roster)
    assert decrypt(channel, memory, roster.sealed(head, parts, SERVER, KEY_HOLDER), roster)[1]
    if change.get("length") == NUMBERS + 1:
        change = {"length": channel.parameters.numbers + 1}
    with pytest.raises(error):
        decrypt(channel, memory, roster.sealed(replace(head, **change), parts, SERVER, KEY_HOLDER), roster)


@each_form
def test_the_key_holder_refuses_what_others_say_or_said(channel, wire, roster):
    memory, message = keys_of(channel, wire)
    head, parts = request_of(channel, message, roster)
    for sender, now, error in ((3, 0, Corrupt), (SERVER, 1, Replay)):
        with pytest.raises(error):
            decrypt(channel, memory, roster.sealed(head, parts, sender, KEY_HOLDER, now), roster)
    with pytest.raises(ParameterMismatch, match="parts=0"):
        decrypt(channel, memory, roster.sealed(head, [], SERVER, KEY_HOLDER), roster)


@each_form
def test_the_canary_shows_a_sum_under_another_key(channel, wire, roster):
    memory, message = keys_of(channel, wire)
    head, _ = request_of(channel, message, roster)
    other = keys_of(channel, wire)[1]
    _, parts = request_of(channel, other, roster)  # the ciphertext is foreign, the envelope says otherwise
    with pytest.raises(RoundFailed, match="another key"):
        decrypt(channel, memory, roster.sealed(head, parts, SERVER, KEY_HOLDER), roster)


@pytest.mark.parametrize("claimed", [2, 4, 8])
@each_form
def test_the_canary_shows_a_server_that_miscounts(channel, claimed, wire, roster):
    """Otherwise a sum of one passes as a sum of many."""
    memory, message = keys_of(channel, wire)
    head, parts = request_of(channel, message, roster, 3)
    if channel.release == "clients":
        parts[-1] = np.arange(claimed).astype("<i8").tobytes()
    with pytest.raises(RoundFailed, match=f"not one of {claimed} clients: the server miscounts"):
        decrypt(channel, memory, roster.sealed(replace(head, clients=claimed), parts, SERVER, KEY_HOLDER), roster)


@pytest.mark.parametrize("added", [9, 40])
@each_form
def test_a_sum_that_wrapped_is_not_released(channel, added, wire, roster):
    """More clients than there is head-room for, announced as many as are allowed."""
    memory, message = keys_of(channel, wire)
    d, public = 100, roster.opened(message, KEY_HOLDER)[1][0]
    head, parts = request_of(channel, message, roster, 3, d)
    if channel.release == "clients":
        parts[-1] = np.arange(8).astype("<i8").tobytes()
    total = RunningSum(public_ring(public, channel.parameters), d + 1)
    one = encrypt((public, channel.parameters), np.ones(d + 1))
    for _ in range(added):
        total.add([one])
    parts[0] = total.written()[0]
    with pytest.raises(RoundFailed, match=r"not one of 8 clients.*a sum that wrapped"):
        decrypt(channel, memory, roster.sealed(replace(head, clients=8), parts, SERVER, KEY_HOLDER), roster)


@pytest.mark.parametrize(
    "readers", [b"", pack("<qqq", 0, 1, SERVER), pack("<qqq", 0, 1, 1), pack("<qq", 0, 1), pack("<qqqb", 0, 1, 2, 0)]
)
def test_the_server_is_no_reader_of_a_sum_for_clients(readers, wire, roster):
    memory, message = keys_of(CLIENTS, wire)
    head, parts = request_of(CLIENTS, message, roster)
    with pytest.raises(Corrupt, match="expected 3 different clients"):
        decrypt(CLIENTS, memory, roster.sealed(head, [parts[0], readers], SERVER, KEY_HOLDER), roster)


@pytest.mark.parametrize("stage", ["keys", "decrypt"])
@pytest.mark.parametrize("broken", [lambda m: b"", lambda m: m[:-1], lambda m: m[:40] + b"\1" + m[41:]])
@each_form
def test_a_broken_message_of_the_key_holder_is_named(channel, stage, broken, wire, gaussian, intake):
    rows = gaussian(3, 4)
    answered = []

    def change(party, reply):
        answered.extend([party] if party == KEY_HOLDER else [])
        hit = party == KEY_HOLDER and channel.key_holder_stages[len(answered) - 1] == stage
        return broken(reply) if hit else reply

    with pytest.raises(BrokenEnvelope):
        channel.collect(list(rows), intake(4), wire(channel, rows, change=change)).total()


def signed(header, content, roster):
    holder = roster.party(KEY_HOLDER)
    parts = [content, signature(holder, CHANNEL._head(b""), content)]
    return roster.sealed(replace(header, key=fingerprint(content)), parts, KEY_HOLDER)


@pytest.mark.parametrize("content", [b"", b"\0" * 40, b"no context at all"])
def test_keys_that_are_none_are_named(content, wire, roster):
    header, _ = roster.opened(keys_of(CHANNEL, wire)[1], KEY_HOLDER)
    with pytest.raises(Corrupt, match="no keys"):
        CHANNEL._open_keys(roster.party(SERVER), KEY_HOLDER, signed(header, content, roster))


def test_keys_without_a_public_one_are_refused(wire, roster):
    header, _ = roster.opened(keys_of(CHANNEL, wire)[1], KEY_HOLDER)
    context = ts.context_from(new_keys(CHANNEL.parameters)[0])
    empty = context.serialize(save_public_key=False)
    with pytest.raises(ParameterMismatch, match="other parameters"):
        CHANNEL._open_keys(roster.party(SERVER), KEY_HOLDER, signed(header, empty, roster))


@pytest.mark.parametrize("other", [replace(CHANNEL, clients=200), replace(CHANNEL, exact_grid=False)], ids=str)
def test_keys_of_other_parameters_are_refused(other, wire, roster):
    _, message = keys_of(other, wire)
    with pytest.raises(ParameterMismatch, match="parameters="):
        CHANNEL._open_keys(roster.party(SERVER), KEY_HOLDER, message)
    header, _ = roster.opened(keys_of(CHANNEL, wire)[1], KEY_HOLDER)
    public = roster.opened(message, KEY_HOLDER)[1][0]
    with pytest.raises(ParameterMismatch, match="other parameters"):
        CHANNEL._open_keys(roster.party(SERVER), KEY_HOLDER, signed(header, public, roster))


def test_a_server_cannot_put_its_own_key_in_place_of_the_key_holders(wire, roster, key):
    header, (_, theirs) = roster.opened(keys_of(CHANNEL, wire)[1], KEY_HOLDER)
    forged = replace(header, key=fingerprint(key[0]))
    own = signature(roster.party(SERVER), CHANNEL._head(b""), key[0])
    for proof in (theirs, own):
        message = roster.sealed(forged, [key[0], proof], SERVER, 3)
        with pytest.raises(Corrupt, match="signature"):
            CHANNEL.answer(roster.party(3), "update", {}, message, lambda: None)


# What clients send


def collect_with(channel, change, wire, gaussian, intake, roster, d=50):
    """One round in which client 6 sends `change(header, parts, public key)`, or what that seals."""
    rows = gaussian(4, d)

    def changed(party, reply):
        if party != 6:
            return reply
        public = roster.opened(line.replies("keys")[KEY_HOLDER], KEY_HOLDER)[1][0]
        got = change(*roster.opened(reply, 6), (public, channel.parameters))
        return got if isinstance(got, bytes) else roster.sealed(*got, 6)

    line = wire(channel, rows, change=changed)
    view = channel.collect(list(rows), intake(d), line)
    assert (view.ids, view.bad) == ((3, 9, 12), 1)
    torch.testing.assert_close(view.total(), rows[3] + rows[9] + rows[12], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "change",
    [
        {"key": b"another key....."},
        {"parameters": b"other parameters"},
        {"stage": "sum"},
        {"length": 50},
        {"length": 10_000},
        {"clients": 2},
        {"clients": 0},
        {"scheme": "bfv"},
        {"weight": 2.0},
        {"scale": 1.0},
    ],
    ids=str,
)
def test_a_foreign_message_is_left_out(change, wire, gaussian, intake, roster):
    collect_with(CHANNEL, lambda header, parts, key: (replace(header, **change), parts), wire, gaussian, intake, roster)


def test_a_message_of_another_round_is_left_out(wire, gaussian, intake, roster):
    rows = gaussian(4, 50)
    last = wire(CHANNEL, rows, round=1)
    CHANNEL.collect(list(rows), intake(50), last)
    collect_with(CHANNEL, lambda *message: last.replies("update")[6], wire, gaussian, intake, roster)


def test_a_ciphertext_of_another_round_is_left_out(wire, gaussian, intake, roster):
    rows = gaussian(4, 50)
    last = wire(CHANNEL, rows)
    CHANNEL.collect(list(rows), intake(50), last)
    header, parts = roster.opened(last.replies("update")[6], 6)  # its own, under the last key
    collect_with(CHANNEL, lambda *message: (header, parts), wire, gaussian, intake, roster)


def test_a_message_of_another_client_is_left_out(wire, gaussian, intake, roster):
    def change(header, parts, key):
        return roster.sealed(header, parts, 12)

    collect_with(CHANNEL, change, wire, gaussian, intake, roster)


@pytest.mark.parametrize(
    "part",
    [b"", b"\0", b"garbage" * 100, b"\x5e\xa1" + bytes(200), bytes(10**6)],
    ids=["empty", "zero", "garbage", "a header alone", "too long"],
)
def test_what_is_no_ciphertext_is_left_out(part, wire, gaussian, intake, roster):
    collect_with(CHANNEL, lambda header, parts, key: (header, [part]), wire, gaussian, intake, roster)


def test_more_or_fewer_parts_are_left_out(wire, gaussian, intake, roster):
    for change in (lambda parts: [], lambda parts: parts + parts):
        collect_with(CHANNEL, lambda header, parts, key, c=change: (header, c(parts)), wire, gaussian, intake, roster)


@pytest.mark.parametrize("size", [0, 1, 2**20, 2**40, 2**62])
def test_a_forged_size_is_left_out(size, wire, gaussian, intake, roster):
    """The size of the whole, in SEAL's own header (bytes 8 to 16): no memory is taken on its word."""

    def change(header, parts, key):
        assert unpack_from("<Q", parts[0], 8)[0] == len(parts[0])  # this is where it stands
        return header, [parts[0][:8] + pack("<Q", size) + parts[0][16:]]

    collect_with(CHANNEL, change, wire, gaussian, intake, roster)


def test_another_scale_is_left_out(wire, gaussian, intake, roster):
    def change(header, parts, key):
        return header, [written(halved(public_ring(*key)))]

    collect_with(CHANNEL, change, wire, gaussian, intake, roster)


def halved(ring):
    """An encryption of zeros at half the scale."""
    import tenseal.sealapi as seal

    plaintext, ciphertext = seal.Plaintext(), seal.Ciphertext()
    ring._encoder.encode([0j] * 4, ring.parameters.scale / 2, plaintext)
    ring._encryptor.encrypt(plaintext, ciphertext)
    return ciphertext


def test_a_ciphertext_of_a_lower_level_is_refused():
    """It loads, and would silently pull the server's sum down with it."""
    parameters = CKKS(bound=1.0, clients=8000).parameters
    assert len(parameters.data_primes) == 2
    ring = public_ring(new_keys(low_scale(parameters))[0], low_scale(parameters))
    like, other = ring.encrypted(np.zeros(51)), ring.encrypted(np.zeros(51))
    assert ring.read(written(other), like) is not None
    ring._evaluator.mod_switch_to_next_inplace(other)
    assert other.scale == like.scale
    with pytest.raises(ParameterMismatch, match="level"):
        ring.read(written(other), like)


def test_a_product_is_left_out(wire, gaussian, intake, roster):
    """Three polynomials in place of two."""

    def change(header, parts, key):
        ring = Ring(new_keys(low_scale(key[1]))[0], low_scale(key[1]))
        product = ring.encrypted(np.zeros(51))
        ring._evaluator.square_inplace(product)
        assert product.size() == 3
        return header, [written(product)]

    collect_with(CHANNEL, change, wire, gaussian, intake, roster)


def low_scale(parameters):
    """The same ring, with room for a product."""
    return replace(parameters, scale=2.0**20, bits=0)


def test_other_parameters_are_left_out(wire, gaussian, intake, roster):
    other = replace(CHANNEL, clients=1000).parameters
    public = new_keys(other)[0]
    assert other.chain != CHANNEL.parameters.chain

    def change(header, parts, key):
        return header, [encrypt((public, other), np.zeros(51))]

    collect_with(CHANNEL, change, wire, gaussian, intake, roster)


def test_a_client_is_added_whole_or_not_at_all(wire, gaussian, intake, roster):
    """The second of two parts is broken: the first must not have been added."""

    def change(header, parts, key):
        return header, [parts[0], parts[1][:-5]]

    collect_with(CHANNEL, change, wire, gaussian, intake, roster, d=NUMBERS + 1)


@pytest.mark.parametrize("flips", range(20))
def test_flipped_bits_are_left_out(flips, wire, gaussian, intake, roster):
    def change(header, parts, key):
        message = bytearray(roster.sealed(header, parts, 6))
        message[np.random.default_rng(flips).integers(len(message))] ^= 1 << flips % 8
        return bytes(message)

    collect_with(CHANNEL, change, wire, gaussian, intake, roster)


def test_bits_flipped_before_sealing_fail_typed_or_on_the_grid(key):
    """A malicious client signs what it likes: its ciphertext is refused as such, or is some other ciphertext."""
    ring, generator = public_ring(*key), np.random.default_rng(0)
    part, like = encrypt(key, np.zeros(51)), ring.encrypted(np.zeros(1))
    refused = 0
    for _ in range(300):
        broken = bytearray(part)
        broken[generator.integers(len(part) if refused % 2 else 200)] ^= 1 << generator.integers(8)
        try:
            ring.read(bytes(broken), like)
        except (Corrupt, ParameterMismatch):
            refused += 1
    assert refused > 30


def test_a_sum_is_kept_not_the_ciphertexts(key):
    """One running sum: adding leaves the number of ciphertexts as it is."""
    running = RunningSum(public_ring(*key), NUMBERS + 1)
    before = [len(part) for part in running.written()]
    for _ in range(3):
        running.add(RunningSum(public_ring(*key), NUMBERS + 1).written())
    after = [len(part) for part in running.written()]
    assert len(after) == len(before) == 2
    assert max(after) < 1.05 * max(before)


# What clients are told, where they alone see the sum


def test_a_client_opens_what_the_key_holder_sealed_for_it_and_nothing_else(wire, gaussian, intake, roster):
    rows = gaussian(3, 4)
    line = wire(CLIENTS, rows, lost={"open": {3, 6, 9}})
    with pytest.raises(RoundFailed, match="no client opened"):
        CLIENTS.collect(list(rows), intake(4), line).total()
    message = next(content for stage, party, content in line.sent if (stage, party) == ("open", 3))
    memory = line.memories[3]
    header, (box, wrapped) = roster.opened(message, SERVER, 3)

    def opened(parts, head=header, own=memory, reader=3):
        request = roster.sealed(head, parts, SERVER, reader)
        return CLIENTS.answer(roster.party(reader), "open", own, request, None)[1]

    assert len(roster.opened(opened([box, wrapped]), 3)[1][0]) == 8 * 4
    flipped = box[:20] + bytes([box[20] ^ 1]) + box[21:]
    for parts in ([flipped, wrapped], [box, wrapped[:-1]], [b"", wrapped], [box, b""]):
        with pytest.raises(Corrupt, match="not for this party"):
            opened(parts)
    with pytest.raises(Corrupt, match="not for this party"):
        opened([box, wrapped], own=line.memories[6], reader=6)  # the key of another client
    with pytest.raises(WrongKey):
        opened([box, wrapped], replace(header, key=bytes(16)))
    with pytest.raises(WrongKey):
        opened([box, wrapped], own={"done": b"update"})  # it never sent a row
    with pytest.raises(Corrupt, match="stage"):
        opened([box, wrapped], Header(**{**vars(header), "stage": "sum"}))


def test_a_client_that_is_gone_or_lies_does_not_stop_the_others(wire, gaussian, intake):
    rows = gaussian(3, 4)
    asked = []

    def change(party, reply):
        asked.append(party)
        return b"" if party == 6 and asked.count(6) == 2 else reply

    line = wire(CLIENTS, rows, lost={"open": {3}}, change=change)
    total = CLIENTS.collect(list(rows), intake(4), line).total()
    torch.testing.assert_close(total, sum(rows.values()), rtol=1e-6, atol=1e-7)


def test_a_sum_before_there_are_keys_is_refused(wire, roster):
    """The key holder may be asked for less than all its stages."""
    _, message = keys_of(CHANNEL, wire)
    request = roster.sealed(*request_of(CHANNEL, message, roster), SERVER, KEY_HOLDER)
    with pytest.raises(WrongKey):
        CHANNEL.answer(roster.party(KEY_HOLDER), "decrypt", {}, request, None)
