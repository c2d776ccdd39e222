"""Every message of the CKKS channel, broken, forged or replayed, on whichever side it arrives."""

from dataclasses import replace

import numpy as np
import pytest
import tenseal as ts
import torch

from privfm.checks import BrokenEnvelope, RoundFailed
from privfm.contracts import KEY_HOLDER
from privfm.defenses.channels import CKKS
from privfm.defenses.channels.ckks import _Running
from privfm.defenses.channels.envelope import SERVER, fingerprint, seal, unseal

CHANNEL = CKKS(bound=1.0, clients=8)
SLOTS = CHANNEL.parameters.slots


def keys_of(channel, wire):
    """A key holder after its first stage: its memory, and the message for the clients."""
    line = wire(channel, {})
    message = next(iter(line("keys", {KEY_HOLDER: b""})))[1]
    return line.memories[KEY_HOLDER], message


@pytest.fixture(scope="module")
def context():
    """A public context of CHANNEL's parameters, whose secret nobody kept."""
    _, message = CHANNEL.reply(KEY_HOLDER, "keys", {}, b"", lambda: None)
    return CHANNEL._open_keys(message)[1]


# What the key holder is asked


def request_of(memory, message, context, n=3, d=4):
    """A well-formed request for the sum of n rows of width d."""
    head = replace(unseal(message)[0], stage="sum", party=SERVER, length=d, parts=1, clients=n)
    return head, [ts.ckks_vector(context, np.zeros(d)).serialize()]


@pytest.mark.parametrize("n", [0, 1, 9, 10_000])
def test_the_key_holder_decrypts_sums_only(n, wire):
    memory, message = keys_of(CHANNEL, wire)
    head, parts = request_of(memory, message, CHANNEL._open_keys(message)[1], n)
    with pytest.raises(RoundFailed, match=f"a sum of {n} clients: expected 2 to 8"):
        CHANNEL.reply(KEY_HOLDER, "decrypt", memory, seal(head, parts), None)


@pytest.mark.parametrize(
    "change",
    [
        {"nonce": b"another round..."},
        {"key": b"another key....."},
        {"parameters": b"other parameters"},
        {"party": 3},
        {"stage": "update"},
        {"length": SLOTS + 1},
        {"length": 2**60},
        {"length": 0},
        {"parts": 0},
        {"scheme": "bfv"},
    ],
    ids=str,
)
def test_the_key_holder_refuses_a_foreign_request(change, wire):
    memory, message = keys_of(CHANNEL, wire)
    head, parts = request_of(memory, message, CHANNEL._open_keys(message)[1])
    assert CHANNEL.reply(KEY_HOLDER, "decrypt", memory, seal(head, parts), None)[1]
    with pytest.raises(BrokenEnvelope):
        CHANNEL.reply(KEY_HOLDER, "decrypt", memory, seal(replace(head, **change), parts), None)


def test_the_key_holder_notices_a_sum_under_another_key(wire, context):
    memory, message = keys_of(CHANNEL, wire)
    head, parts = request_of(memory, message, context)  # the ciphertext is foreign, the envelope says otherwise
    with pytest.raises(RoundFailed, match="another key"):
        CHANNEL.reply(KEY_HOLDER, "decrypt", memory, seal(head, parts), None)


@pytest.mark.parametrize("stage", ["keys", "decrypt"])
@pytest.mark.parametrize("broken", [lambda m: b"", lambda m: m[:-1], lambda m: m[:40] + b"\0" + m[41:]])
def test_a_broken_message_of_the_key_holder_is_named(stage, broken, wire, gaussian, intake):
    rows = gaussian(3, 4)
    answered = []

    def change(party, reply):
        answered.extend([party] if party == KEY_HOLDER else [])
        hit = party == KEY_HOLDER and CHANNEL.key_holder_stages[len(answered) - 1] == stage
        return broken(reply) if hit else reply

    with pytest.raises(BrokenEnvelope):
        CHANNEL.collect(list(rows), intake(4), wire(CHANNEL, rows, change=change)).total()


@pytest.mark.parametrize("content", [b"", b"\0" * 40, b"no context at all"])
def test_keys_that_are_none_are_named(content, wire):
    _, message = keys_of(CHANNEL, wire)
    header, _ = unseal(message)
    with pytest.raises(BrokenEnvelope, match="no keys"):
        CHANNEL._open_keys(seal(replace(header, key=fingerprint(content)), [content]))


@pytest.mark.parametrize("other", [replace(CHANNEL, clients=200), replace(CHANNEL, clients=1000)], ids=str)
def test_keys_of_other_parameters_are_refused(other, wire):
    _, message = keys_of(other, wire)
    with pytest.raises(BrokenEnvelope, match="parameters="):
        CHANNEL._open_keys(message)
    (public,) = unseal(message)[1]
    header = unseal(keys_of(CHANNEL, wire)[1])[0]
    with pytest.raises(BrokenEnvelope, match="other parameters"):
        CHANNEL._open_keys(seal(replace(header, key=fingerprint(public)), [public]))


# What clients send


def collect_with(channel, change, wire, gaussian, intake, d=50):
    """One round in which client 6 sends `change(header, parts, line)`."""
    rows = gaussian(4, d)

    def changed(party, reply):
        return change(*unseal(reply), line) if party == 6 else reply

    line = wire(channel, rows, change=changed)
    view = channel.collect(list(rows), intake(d), line)
    assert (view.ids, view.bad) == ((3, 9, 12), 1)
    torch.testing.assert_close(view.total(), rows[3] + rows[9] + rows[12], rtol=1e-6, atol=1e-7)


def varint(number: int) -> bytes:
    digits = []
    while number > 127:
        digits.append(number & 127 | 128)
        number >>= 7
    return bytes([*digits, number])


def forged(part: bytes, sizes: list[int]) -> bytes:
    """TenSEAL's message with other `sizes` (field 1, packed) in front of the same ciphertext."""
    body = b"".join(map(varint, sizes))
    return b"\x0a" + varint(len(body)) + body + part[2 + part[1] :]


@pytest.mark.parametrize(
    "change",
    [
        {"nonce": b"another round..."},
        {"key": b"another key....."},
        {"parameters": b"other parameters"},
        {"party": 9},
        {"stage": "sum"},
        {"length": 49},
        {"length": 10_000},
        {"clients": 2},
        {"clients": 0},
        {"scheme": "bfv"},
    ],
    ids=str,
)
def test_a_foreign_or_replayed_message_is_left_out(change, wire, gaussian, intake):
    collect_with(CHANNEL, lambda header, parts, line: seal(replace(header, **change), parts), wire, gaussian, intake)


def test_a_message_of_the_last_round_is_left_out(wire, gaussian, intake):
    rows = gaussian(4, 50)
    last = wire(CHANNEL, rows)
    CHANNEL.collect(list(rows), intake(50), last)
    replay = next(content for _, party, content in last.received if party == 6)
    collect_with(CHANNEL, lambda header, parts, line: replay, wire, gaussian, intake)


def test_a_message_of_another_client_is_left_out(wire, gaussian, intake):
    def change(header, parts, line):
        return next(content for _, party, content in line.received if party == 12)

    collect_with(CHANNEL, change, wire, gaussian, intake)


@pytest.mark.parametrize("sizes", [[10_000], [2**32 - 1], [49], [1], [0], []], ids=str)
def test_forged_sizes_are_left_out(sizes, wire, gaussian, intake):
    def change(header, parts, line):
        return seal(header, [forged(parts[0], sizes)])

    collect_with(CHANNEL, change, wire, gaussian, intake)


@pytest.mark.parametrize("sizes", [[1, 49], [2**32 - 1, 51]], ids=str)
def test_forged_sizes_with_the_right_sum_do_no_harm(sizes, wire, gaussian, intake):
    """The one forgery that cannot be told from outside: lengths are taken from the server's own vector."""
    rows = gaussian(3, 50)

    def change(party, reply):
        header, parts = unseal(reply)
        return seal(header, [forged(parts[0], sizes)]) if party == 6 else reply

    view = CHANNEL.collect(list(rows), intake(50), wire(CHANNEL, rows, change=change))
    torch.testing.assert_close(view.total(), sum(rows.values()), rtol=1e-6, atol=1e-7)


def test_the_forger_of_sizes_works():
    """Negative control: TenSEAL itself believes them."""
    context = CHANNEL._open_keys(CHANNEL.reply(KEY_HOLDER, "keys", {}, b"", None)[1])[1]
    part = ts.ckks_vector(context, np.zeros(50)).serialize()
    assert ts.ckks_vector_from(context, forged(part, [10_000])).size() == 10_000


@pytest.mark.parametrize(
    "part", [b"", b"\0", b"garbage" * 100, b"\x0a\x01\x32"], ids=["empty", "zero", "garbage", "no ciphertext"]
)
def test_what_is_no_ciphertext_is_left_out(part, wire, gaussian, intake):
    collect_with(CHANNEL, lambda header, parts, line: seal(header, [part]), wire, gaussian, intake)


def test_two_ciphertexts_in_one_part_are_left_out(wire, gaussian, intake):
    def change(header, parts, line):
        ciphertext = parts[0][2 + parts[0][1] :]
        return seal(header, [b"\x0a\x02\x19\x19" + ciphertext + ciphertext])  # 25 + 25 = 50

    collect_with(CHANNEL, change, wire, gaussian, intake)


def test_another_scale_is_left_out(wire, gaussian, intake):
    def change(header, parts, line):
        context = CHANNEL._open_keys(line.received[0][2])[1]
        return seal(header, [ts.ckks_vector(context, np.zeros(50), CHANNEL.parameters.scale / 2).serialize()])

    collect_with(CHANNEL, change, wire, gaussian, intake)


def test_a_ciphertext_of_a_lower_level_is_left_out(wire, gaussian, intake):
    """With two data primes it would load, and silently pull the server's sum down with it."""
    channel = CKKS(bound=1.0, clients=1000)
    assert len(channel.parameters.data_primes) == 2

    def change(header, parts, line):
        context = channel._open_keys(line.received[0][2])[1]
        vector = ts.ckks_vector(context, np.zeros(50), 2.0**20)
        vector.mul_([1.0] * 50)
        return seal(header, [vector.serialize()])

    collect_with(channel, change, wire, gaussian, intake)


def test_other_parameters_are_left_out(wire, gaussian, intake):
    other = keys_of(replace(CHANNEL, clients=1000), wire)[1]
    context = replace(CHANNEL, clients=1000)._open_keys(other)[1]

    def change(header, parts, line):
        return seal(header, [ts.ckks_vector(context, np.zeros(50)).serialize()])

    collect_with(CHANNEL, change, wire, gaussian, intake)


def test_a_client_is_added_whole_or_not_at_all(wire, gaussian, intake):
    """The second of two parts is broken: the first must not have been added."""

    def change(header, parts, line):
        return seal(header, [parts[0], parts[1][:-5]])

    collect_with(CHANNEL, change, wire, gaussian, intake, d=SLOTS + 1)


@pytest.mark.parametrize("flips", range(20))
def test_flipped_bits_are_left_out(flips, wire, gaussian, intake):
    def change(header, parts, line):
        message = bytearray(seal(header, parts))
        message[np.random.default_rng(flips).integers(len(message))] ^= 1 << flips % 8
        return bytes(message)

    collect_with(CHANNEL, change, wire, gaussian, intake)


def test_a_sum_is_kept_not_the_ciphertexts(context):
    """One running sum: adding leaves the number of ciphertexts as it is."""
    running = _Running(context, CHANNEL.parameters, SLOTS + 1)
    before = [len(part) for part in running.serialized()]
    for _ in range(3):
        running.add(_Running(context, CHANNEL.parameters, SLOTS + 1).serialized())
    after = [len(part) for part in running.serialized()]
    assert len(after) == len(before) == 2
    assert max(after) < 1.05 * max(before)
