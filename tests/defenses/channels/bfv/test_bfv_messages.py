"""Every message of the BFV channel, broken, forged, replayed or repeated, on whichever side it arrives."""

from dataclasses import replace

import numpy as np
import pytest
import tenseal as ts
import torch
from hypothesis import given
from hypothesis import strategies as st

from privfm.checks import BrokenEnvelope, Corrupt, ParameterMismatch, Replay, RoundFailed, TooFewClients, WrongKey
from privfm.contracts import KEY_HOLDER, SERVER, Encoded, Intake, Party, Reveals
from privfm.defenses.channels.bfv import BFV
from privfm.defenses.channels.bfv.ciphertexts import RunningSum, public_context
from privfm.defenses.channels.envelope import Link, fingerprint
from privfm.defenses.channels.identities import new_identity, public_identity
from privfm.defenses.channels.key_holder import signature
from privfm.defenses.transforms import Chain

CHANNEL = BFV(clients=8, bits=10)
SLOTS = CHANNEL.parameters.slots
T = CHANNEL.parameters.plain_modulus


def whole_rows(n, d, seed=0):
    values = np.random.default_rng(seed).integers(-1024, 1024, (n, d), endpoint=True)
    return {3 * (n - i): torch.from_numpy(row.astype(np.float64)) for i, row in enumerate(values)}


def keys_of(channel, wire, now=0):
    """A key holder after its first stage: its memory, and its message."""
    line = wire(channel, {}, round=now)
    message = next(iter(line("keys", {KEY_HOLDER: b""})))[1]
    return line.memories[KEY_HOLDER], message


def context_of(channel, message, roster):
    header, parts = roster.opened(message, KEY_HOLDER)
    return header, public_context(parts[0], channel.parameters)


@pytest.fixture(scope="module")
def foreign():
    """A public context of CHANNEL's parameters, whose secret nobody kept."""
    parameters = CHANNEL.parameters
    chain, t = list(parameters.chain), parameters.plain_modulus
    context = ts.context(ts.SCHEME_TYPE.BFV, parameters.degree, plain_modulus=t, coeff_mod_bit_sizes=chain)
    return ts.context_from(context.serialize(save_secret_key=False))


# What the key holder is asked


def asked(channel, wire, roster, numbers, n=3, **changes):
    """What whoever decrypts answers to a request that says `n` and holds `numbers`, canary included."""
    who, stage = (KEY_HOLDER, "decrypt") if channel.server_learns_sum else (3, "open")
    line = wire(channel, whole_rows(5, 4))
    intake = Intake(Chain(()), 4, Reveals.SUM)
    channel.collect(list(line.rows), intake, line)
    header, context = context_of(channel, line.received[0][2], roster)
    head = replace(header, stage="sum", length=len(numbers), clients=n)
    part = ts.bfv_vector(context, numbers).serialize()
    request = roster.sealed(replace(head, **changes), [part], SERVER, who)
    return channel.answer(roster.party(who), stage, line.memories[who], request, None)[1]


@pytest.mark.parametrize("holder", ["apart", "clients", "blinded"])
@pytest.mark.parametrize(
    ("n", "error"), [(0, TooFewClients), (1, TooFewClients), (9, RoundFailed), (9999, RoundFailed)]
)
def test_the_key_holder_decrypts_sums_only(n, error, holder, wire, roster):
    with pytest.raises(error, match=f"a sum of {n} clients: expected 2 to 8"):
        asked(replace(CHANNEL, holder=holder), wire, roster, [1, 2, 3, n], n)


@pytest.mark.parametrize("holder", ["apart", "clients"])
@pytest.mark.parametrize("really", [0, 1, 2, 4, 8])
def test_a_server_that_lies_about_the_number_of_clients_is_caught(really, holder, wire, roster):
    channel = replace(CHANNEL, holder=holder)
    assert asked(channel, wire, roster, [1, 2, 3, 3], 3)
    with pytest.raises(RoundFailed, match="not of 3 clients"):
        asked(channel, wire, roster, [1, 2, 3, really], 3)


@pytest.mark.parametrize("holder", ["apart", "clients"])
def test_a_single_row_passed_off_as_a_sum_is_caught(holder, wire, roster):
    """The server has the one row it wants in the sum and announces the floor."""
    channel = replace(CHANNEL, holder=holder).with_floor(5)
    with pytest.raises(RoundFailed, match="not of 5 clients"):
        asked(channel, wire, roster, [7, -7, 1], 5)


@pytest.mark.parametrize("holder", ["apart", "clients"])
@pytest.mark.parametrize("number", [3 * 1024 + 1, -3 * 1024 - 1, T // 2])
def test_a_sum_out_of_range_is_not_released(number, holder, wire, roster):
    channel = replace(CHANNEL, holder=holder)
    assert asked(channel, wire, roster, [3 * 1024, -3 * 1024, 3])
    with pytest.raises(RoundFailed, match="malicious"):
        asked(channel, wire, roster, [number, 3])


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"key": b"another key....."}, WrongKey),
        ({"parameters": b"other parameters"}, ParameterMismatch),
        ({"stage": "update"}, Corrupt),
        ({"scheme": "ckks"}, Corrupt),
        ({"scale": 2.0}, ParameterMismatch),
        ({"weight": 3.0}, ParameterMismatch),
        ({"length": SLOTS + 1}, ParameterMismatch),
        ({"length": 2**60}, ParameterMismatch),
        ({"length": 0}, ParameterMismatch),
        ({"length": 3}, ParameterMismatch),
        ({"length": 5}, ParameterMismatch),
    ],
    ids=str,
)
@pytest.mark.parametrize("holder", ["apart", "clients", "blinded"])
def test_a_foreign_request_is_refused(change, error, holder, wire, roster):
    with pytest.raises(error):
        asked(replace(CHANNEL, holder=holder), wire, roster, [1, 2, 3, 3], **change)


@pytest.mark.parametrize("readers", [[], [3, 3], [3, -2], [-1, 3], list(range(9)), b"\0" * 7], ids=range(6))
def test_a_shared_key_is_for_different_clients(readers, roster):
    """The server names them, and may not name itself."""
    channel, party = replace(CHANNEL, holder="clients"), roster.party(KEY_HOLDER)
    content = readers if isinstance(readers, bytes) else np.array(readers, "<i8").tobytes()
    head = replace(channel._head(b""), key=bytes(16), stage="cohort", length=len(content) // 8)
    with pytest.raises(Corrupt, match="different clients, at most 8"):
        channel.answer(party, "keys", {}, roster.sealed(head, [content], SERVER, KEY_HOLDER), None)
    with pytest.raises(Corrupt):
        channel.answer(party, "keys", {}, b"", None)


@pytest.mark.parametrize("place", [2, 3])
def test_a_changed_secret_of_a_shared_key_is_found(place, wire, roster, intake):
    """By the client, also if the server that passes it on has changed it: it is sealed by the key holder."""
    channel, rows = replace(CHANNEL, holder="clients"), whole_rows(2, 4)
    line = wire(channel, rows)
    channel.collect(list(rows), intake(4), line)
    request = next(content for stage, party, content in line.sent if (stage, party) == ("update", 3))
    header, parts = roster.opened(request, SERVER, 3)
    update = lambda: Encoded(rows[3][None], {})  # noqa: E731
    assert channel.answer(roster.party(3), "update", {}, roster.sealed(header, parts, SERVER, 3), update)
    parts[place] = parts[place][:-1] + bytes([parts[place][-1] ^ 1])
    with pytest.raises(Corrupt, match="secret content"):
        channel.answer(roster.party(3), "update", {}, roster.sealed(header, parts, SERVER, 3), update)
    other = next(content for stage, party, content in line.sent if (stage, party) == ("update", 6))
    with pytest.raises(Corrupt, match="secret content"):
        stolen = roster.sealed(header, roster.opened(other, SERVER, 6)[1], SERVER, 3)
        channel.answer(roster.party(3), "update", {}, stolen, update)


def test_the_key_holder_notices_a_sum_under_another_key(wire, roster, foreign):
    memory, message = keys_of(CHANNEL, wire)
    header, _ = context_of(CHANNEL, message, roster)
    head = replace(header, stage="sum", length=4, clients=3)  # the ciphertext is foreign, the envelope says otherwise
    request = roster.sealed(head, [ts.bfv_vector(foreign, [1, 2, 3, 3]).serialize()], SERVER, KEY_HOLDER)
    with pytest.raises(RoundFailed, match="another key"):
        CHANNEL.reply(roster.party(KEY_HOLDER), "decrypt", memory, request, None)


def test_the_server_notices_a_blinded_sum_under_another_key(wire, intake, roster, foreign):
    """A key holder cannot; the canary is behind the blinding."""
    channel, rows = replace(CHANNEL, holder="blinded"), whole_rows(3, 4)

    def change(party, reply):
        header = roster.opened(reply, party)[0]
        if header.stage != "opened":
            return reply
        noise = np.random.default_rng(0).integers(-(T // 2), T // 2, 5)
        return roster.sealed(header, [noise.astype("<i8").tobytes()], party)

    with pytest.raises(RoundFailed, match="not of 3 clients"):
        channel.collect(list(rows), intake(4), wire(channel, rows, change=change)).total()


@pytest.mark.parametrize("sender", [3, KEY_HOLDER])
def test_only_the_server_may_ask(sender, wire, roster):
    memory, message = keys_of(CHANNEL, wire)
    header, context = context_of(CHANNEL, message, roster)
    head = replace(header, stage="sum", length=2, clients=2)
    parts = [ts.bfv_vector(context, [1, 2]).serialize()]
    with pytest.raises(Corrupt, match="expected -2 to -1"):
        request = roster.sealed(head, parts, sender, KEY_HOLDER)
        CHANNEL.reply(roster.party(KEY_HOLDER), "decrypt", memory, request, None)
    late = roster.sealed(head, parts, SERVER, KEY_HOLDER, now=1)
    with pytest.raises(Replay, match="round 1, expected round 0"):
        CHANNEL.reply(roster.party(KEY_HOLDER), "decrypt", memory, late, None)


# What the key holder sends


def broken_at(stage, broken, wire, rows, roster, channel=CHANNEL):
    """A wire on which the key holder's message of one stage is `broken(message)`."""

    def change(party, reply):
        hit = party == KEY_HOLDER and (roster.opened(reply, party)[0].stage == "keys") is (stage == "keys")
        return broken(reply) if hit else reply

    return wire(channel, rows, change=change)


@pytest.mark.parametrize("stage", ["keys", "decrypt"])
@pytest.mark.parametrize(
    "broken",
    [lambda m: b"", lambda m: m[:-1], lambda m: m[: len(m) // 2], lambda m: m[:40] + b"\x07" + m[41:], lambda m: m * 2],
    ids=["empty", "short", "half", "changed", "twice"],
)
@pytest.mark.parametrize("holder", ["apart", "blinded"])
def test_a_broken_message_of_the_key_holder_is_named(stage, broken, holder, wire, roster, intake):
    channel, rows = replace(CHANNEL, holder=holder), whole_rows(3, 4)
    with pytest.raises(Corrupt):
        channel.collect(list(rows), intake(4), broken_at(stage, broken, wire, rows, roster, channel)).total()


@pytest.mark.parametrize("content", [b"", b"\0" * 8, b"\0" * 39, b"\0" * 48], ids=len)
def test_a_sum_of_another_length_is_named(content, wire, roster, intake):
    def broken(message):
        return roster.sealed(roster.opened(message, KEY_HOLDER)[0], [content], KEY_HOLDER)

    rows = whole_rows(3, 4)
    with pytest.raises(Corrupt, match="expected 8 for each of 5"):
        CHANNEL.collect(list(rows), intake(4), broken_at("decrypt", broken, wire, rows, roster)).total()


def keys_message(content, roster, channel=CHANNEL, signer=KEY_HOLDER):
    """A key holder's message whose key is `content`, signed by `signer`."""
    signed = signature(roster.party(signer), channel._head(b""), content)
    return roster.sealed(channel._head(content), [content, signed], KEY_HOLDER)


@pytest.mark.parametrize("content", [b"", b"\0" * 40, b"no context at all"])
def test_keys_that_are_none_are_named(content, roster):
    with pytest.raises(BrokenEnvelope, match="keys"):
        CHANNEL._open_keys(roster.party(SERVER), KEY_HOLDER, keys_message(content, roster))


def test_a_key_that_the_key_holder_has_not_signed_is_refused(wire, roster):
    """A server that puts its own key in place of the key holder's."""
    _, message = keys_of(CHANNEL, wire)
    public = roster.opened(message, KEY_HOLDER)[1][0]
    assert CHANNEL._open_keys(roster.party(SERVER), KEY_HOLDER, keys_message(public, roster))
    with pytest.raises(Corrupt, match="signature"):
        CHANNEL._open_keys(roster.party(SERVER), KEY_HOLDER, keys_message(public, roster, signer=SERVER))


def test_a_secret_key_in_the_key_holders_message_is_refused(wire, roster):
    memory, _ = keys_of(CHANNEL, wire)
    with pytest.raises(ParameterMismatch, match="secret"):
        CHANNEL._open_keys(roster.party(SERVER), KEY_HOLDER, keys_message(memory["secret"], roster))


@pytest.mark.parametrize(
    "other",
    [replace(CHANNEL, bits=20), replace(CHANNEL, clients=1000), BFV(1000, 31)],
    ids=str,
)
def test_keys_of_other_parameters_are_refused(other, wire, roster):
    _, message = keys_of(other, wire)
    with pytest.raises(ParameterMismatch, match="parameters="):
        CHANNEL._open_keys(roster.party(SERVER), KEY_HOLDER, message)
    public = roster.opened(message, KEY_HOLDER)[1][0]
    with pytest.raises(ParameterMismatch, match="other parameters"):
        CHANNEL._open_keys(roster.party(SERVER), KEY_HOLDER, keys_message(public, roster))


@pytest.mark.parametrize("other", [replace(CHANNEL, bits=9), replace(CHANNEL, holder="blinded"), CHANNEL.with_floor(3)])
def test_keys_of_the_same_ring_for_another_channel_are_refused(other, wire, roster):
    with pytest.raises(ParameterMismatch, match="parameters="):
        CHANNEL._open_keys(roster.party(SERVER), KEY_HOLDER, keys_of(other, wire)[1])


def test_keys_of_another_scheme_are_refused(roster):
    chain = list(CHANNEL.parameters.chain)
    context = ts.context(ts.SCHEME_TYPE.CKKS, CHANNEL.parameters.degree, coeff_mod_bit_sizes=chain)
    context.global_scale = 2.0**20
    with pytest.raises(ParameterMismatch, match="other parameters"):
        public = context.serialize(save_secret_key=False)
        CHANNEL._open_keys(roster.party(SERVER), KEY_HOLDER, keys_message(public, roster))


# What clients send


def collect_with(change, wire, intake, roster, d=50, channel=CHANNEL):
    """One round in which client 6 sends `change(header, parts, line)`; it is left out and the others are summed."""
    rows = whole_rows(4, d)

    def changed(party, reply):
        return change(*roster.opened(reply, party), line) if party == 6 else reply

    line = wire(channel, rows, change=changed)
    view = channel.collect(list(rows), intake(d), line)
    assert (view.ids, view.bad) == ((3, 9, 12), 1)
    assert torch.equal(view.total(), (rows[3] + rows[9] + rows[12]).float())


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
        {"key": b"another key....."},
        {"parameters": b"other parameters"},
        {"stage": "sum"},
        {"length": 50},
        {"length": 52},
        {"length": 2**60},
        {"clients": 2},
        {"clients": 0},
        {"scheme": "ckks"},
        {"scale": 0.5},
        {"weight": 2.0},
    ],
    ids=str,
)
def test_a_foreign_message_is_left_out(change, wire, intake, roster):
    collect_with(lambda header, parts, _: roster.sealed(replace(header, **change), parts, 6), wire, intake, roster)


def test_a_message_of_the_last_round_is_left_out(wire, intake, roster):
    rows = whole_rows(4, 50)
    last = wire(CHANNEL, rows, round=1)
    CHANNEL.collect(list(rows), intake(50), last)
    replay = next(content for _, party, content in last.received if party == 6)
    with pytest.raises(Replay):
        roster.opened(replay, 6)
    collect_with(lambda header, parts, line: replay, wire, intake, roster)


def test_a_message_of_another_run_of_the_round_is_left_out(wire, intake, roster):
    """The same round number, but another key."""
    rows = whole_rows(4, 50)
    last = wire(CHANNEL, rows)
    CHANNEL.collect(list(rows), intake(50), last)
    replay = next(content for _, party, content in last.received if party == 6)
    collect_with(lambda header, parts, line: replay, wire, intake, roster)


def test_a_message_of_another_client_is_left_out(wire, intake, roster):
    def change(header, parts, line):
        return next(content for _, party, content in line.received if party == 12)

    collect_with(change, wire, intake, roster)


def test_a_second_message_of_a_client_is_left_out(wire, intake, roster):
    """Also when both are genuine: nobody counts twice. And a client that was not asked does not count at all."""
    rows = whole_rows(4, 5)

    class Twice(wire):
        def __call__(self, stage, requests):
            if stage == "update":
                requests = {**requests, 15: roster.sealed(*roster.opened(requests[6], SERVER, 6), SERVER, 15)}
            for party, reply in super().__call__(stage, requests):
                yield party, reply
                if party == 6:
                    yield party, reply

    line = Twice(CHANNEL, {**rows, 15: rows[3]})
    view = CHANNEL.collect(list(rows), intake(5), line)
    assert (view.ids, view.bad) == ((3, 6, 9, 12), 2)
    assert torch.equal(view.total(), sum(rows.values()).float())


@pytest.mark.parametrize("sizes", [[10_000], [2**32 - 1], [50], [52], [1], [0], []], ids=str)
def test_forged_sizes_are_left_out(sizes, wire, intake, roster):
    collect_with(lambda head, parts, _: roster.sealed(head, [forged(parts[0], sizes)], 6), wire, intake, roster)


@pytest.mark.parametrize("sizes", [[1, 50], [2**32 - 1, 52]], ids=str)
def test_forged_sizes_with_the_right_sum_do_no_harm(sizes, wire, intake, roster):
    """The one forgery that cannot be told from outside: lengths are taken from the server's own vector."""
    rows = whole_rows(3, 50)

    def change(party, reply):
        header, parts = roster.opened(reply, party)
        return roster.sealed(header, [forged(parts[0], sizes)], 6) if party == 6 else reply

    view = CHANNEL.collect(list(rows), intake(50), wire(CHANNEL, rows, change=change))
    assert torch.equal(view.total(), sum(rows.values()).float())


@pytest.mark.parametrize("sizes", [[10_000], [5], [3], [2**32 - 1], [0]], ids=str)
def test_a_key_holder_does_not_believe_forged_sizes(sizes, wire, roster):
    memory, message = keys_of(CHANNEL, wire)
    header, context = context_of(CHANNEL, message, roster)
    head = replace(header, stage="sum", length=4, clients=3)
    part = ts.bfv_vector(context, [1, 2, 3, 3]).serialize()
    party = roster.party(KEY_HOLDER)
    with pytest.raises(ParameterMismatch, match="expected 4"):
        CHANNEL.reply(
            party, "decrypt", memory, roster.sealed(head, [forged(part, sizes)], SERVER, KEY_HOLDER), lambda: None
        )
    right = roster.sealed(head, [forged(part, [2**32 - 1, 5])], SERVER, KEY_HOLDER)  # 2^32 + 4 wraps to the right sum
    answer = CHANNEL.reply(party, "decrypt", memory, right, None)[1]
    released = np.frombuffer(roster.opened(answer, KEY_HOLDER)[1][0], "<i8")
    assert released.tolist() == [1, 2, 3, 3]


def test_the_forger_of_sizes_works(foreign):
    """Negative control: TenSEAL itself believes them."""
    part = ts.bfv_vector(foreign, [0] * 50).serialize()
    assert ts.bfv_vector_from(foreign, forged(part, [10_000])).size() == 10_000


@pytest.mark.parametrize(
    "part", [b"", b"\0", b"garbage" * 100, b"\x0a\x01\x33"], ids=["empty", "zero", "garbage", "no ciphertext"]
)
def test_what_is_no_ciphertext_is_left_out(part, wire, intake, roster):
    collect_with(lambda header, parts, line: roster.sealed(header, [part], 6), wire, intake, roster)


@pytest.mark.parametrize("count", [0, 2, 3])
def test_another_number_of_parts_is_left_out(count, wire, intake, roster):
    collect_with(lambda header, parts, line: roster.sealed(header, parts * count, 6), wire, intake, roster)


def test_two_ciphertexts_in_one_part_are_left_out(wire, intake, roster):
    def change(header, parts, line):
        ciphertext = parts[0][2 + parts[0][1] :]
        return roster.sealed(header, [b"\x0a\x02\x19\x1a" + ciphertext + ciphertext], 6)  # 25 + 26 = 51

    collect_with(change, wire, intake, roster)


def test_a_ciphertext_of_three_polynomials_is_left_out(wire, intake, roster):
    """A product that was not relinearised; adding it would make the sum grow, and with it the noise."""

    context = ts.context(ts.SCHEME_TYPE.BFV, 2048, plain_modulus=T, coeff_mod_bit_sizes=list(CHANNEL.parameters.chain))
    context.auto_relin = False
    factor = ts.bfv_vector(context, [1] * 51)
    product = factor * factor
    assert product.ciphertext()[0].size() == 3
    collect_with(lambda header, parts, _: roster.sealed(header, [product.serialize()], 6), wire, intake, roster)


@pytest.mark.parametrize("other", [replace(CHANNEL, clients=1000, bits=20), BFV(1000, 31)], ids=str)
def test_ciphertexts_of_other_parameters_are_left_out(other, wire, intake, roster):
    context = context_of(other, keys_of(other, wire)[1], roster)[1]

    def change(header, parts, line):
        return roster.sealed(header, [ts.bfv_vector(context, [0] * 51).serialize()], 6)

    collect_with(change, wire, intake, roster)


def test_a_ciphertext_under_another_key_fails_the_round(wire, intake, roster, foreign):
    """Its sender says otherwise, so that nobody can tell before the sum is opened. It is then not released."""
    rows = whole_rows(4, 50)

    def change(party, reply):
        header, _ = roster.opened(reply, party)
        return roster.sealed(header, [ts.bfv_vector(foreign, [0] * 51).serialize()], 6) if party == 6 else reply

    for holder in ("apart", "clients", "blinded"):
        channel = replace(CHANNEL, holder=holder)
        view = channel.collect(list(rows), intake(50), wire(channel, rows, change=change))
        assert view.n == 4
        with pytest.raises(RoundFailed, match="another key"):
            view.total()


def test_a_client_is_added_whole_or_not_at_all(wire, intake, roster):
    """The second of two parts is broken: the first must not have been added."""

    def change(header, parts, line):
        return roster.sealed(header, [parts[0], parts[1][:-5]], 6)

    collect_with(change, wire, intake, roster, d=SLOTS)


@pytest.fixture(scope="module")
def one_message():
    """The server's link to client 6, and a genuine message of that client."""
    secrets = {number: new_identity() for number in (6, SERVER, KEY_HOLDER)}

    def party(number):
        return Party(number, 0, secrets[number], lambda other: public_identity(secrets[other]))

    _, keys = CHANNEL.answer(party(KEY_HOLDER), "keys", {}, b"", None)
    header, parts = Link(party(SERVER), KEY_HOLDER).open(keys)
    request = Link(party(SERVER), 6).seal(header, parts)
    row = Encoded(torch.zeros(1, 50, dtype=torch.float64), {})
    link, message = Link(party(SERVER), 6), CHANNEL.answer(party(6), "update", {}, request, lambda: row)[1]
    assert link.open(message)[0].length == 51
    return link, message


@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_anywhere_is_found(place, bit, one_message):
    link, message = one_message
    changed = bytearray(message)
    changed[int(place * len(message))] ^= 1 << bit
    with pytest.raises(BrokenEnvelope):
        link.open(bytes(changed))


@given(cut=st.integers(1, 10_000))
def test_a_message_cut_off_anywhere_is_found(cut, one_message):
    link, message = one_message
    with pytest.raises(BrokenEnvelope):
        link.open(message[: -min(cut, len(message))])


def test_a_sum_is_kept_not_the_ciphertexts(foreign):
    """One running sum: adding leaves the number of ciphertexts as it is."""
    running = RunningSum(foreign, CHANNEL.parameters, SLOTS + 1)
    before = [len(part) for part in running.serialized()]
    for _ in range(3):
        running.add(RunningSum(foreign, CHANNEL.parameters, SLOTS + 1).serialized())
    after = [len(part) for part in running.serialized()]
    assert len(after) == len(before) == 2
    assert max(after) < 1.05 * max(before)


def test_other_keys_have_other_names(wire, roster):
    first, second = (context_of(CHANNEL, keys_of(CHANNEL, wire)[1], roster)[0] for _ in range(2))
    assert first.key != second.key
    assert first.parameters == second.parameters == fingerprint(repr(CHANNEL).encode())
