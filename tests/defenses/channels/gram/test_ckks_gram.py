"""Robust rules under encryption: what comes out, who is refused what, and every message broken, forged or replayed."""

from dataclasses import replace
from struct import pack

import numpy as np
import pytest
import tenseal as ts
import torch

from privfm.checks import (
    BrokenEnvelope,
    CohortTooSmall,
    Corrupt,
    InvalidArgument,
    NotRevealed,
    Overflow,
    ParameterMismatch,
    Replay,
    RoundFailed,
    TooFewClients,
)
from privfm.contracts import KEY_HOLDER, SERVER, Encoded, Intake, MatrixView, Reveals
from privfm.defenses import (
    Bucketing,
    CenteredClipping,
    FLTrust,
    FoolsGold,
    GeometricMedian,
    Krum,
    Mean,
    MoNNA,
    MultiKrum,
    NearestNeighborMixing,
    NormBound,
    TrimmedMean,
)
from privfm.defenses.channels.envelope import Link, fingerprint
from privfm.defenses.channels.gram.channel import BITS, CKKSGram
from privfm.defenses.channels.gram.ring import DEGREE, NOISE, SCALE, PublicRing, new_keys
from privfm.defenses.channels.gram.sketch import WEIGHT_NORM, Draw, effective_size, sketched, whole_weights
from privfm.defenses.channels.gram.view import numbers
from privfm.defenses.delegated import Delegated
from privfm.defenses.directional_rules import with_root
from privfm.defenses.gram_rules import krum_scores
from privfm.defenses.transforms import Chain, FixedPoint

RULE = MultiKrum(f=0, m=2)
CHANNEL = CKKSGram(bound=1.0).with_rule(RULE)
D = 40


def played(channel, rows, wire, intake, state=None, **lost_or_changed):
    """One round -> its view, outcome, state and wire."""
    rule, d = channel.rule, len(next(iter(rows.values())))
    line = wire(channel, rows, **lost_or_changed)
    view = channel.collect(list(rows), intake(d, Reveals.GRAM), line)
    generator = torch.Generator().manual_seed(3)
    state, outcome = Delegated(rule).aggregate(rule.init(d) if state is None else state, view, generator)
    return view, outcome, state, line


def plainly(rule, rows, state=None):
    """The rule itself, with the draws that the key holder makes."""
    ids = sorted(rows)
    matrix = torch.stack([rows[i] for i in ids])
    seed = int(torch.randint(2**62, (), generator=torch.Generator().manual_seed(3)))
    state = rule.init(matrix.shape[1]) if state is None else state
    return rule.aggregate(state, MatrixView(matrix, ids), torch.Generator().manual_seed(seed))


def weighed(rows, weights):
    return sum(float(w) * rows[i].double() for i, w in zip(sorted(rows), weights, strict=True))


# What comes out


@pytest.mark.parametrize(
    ("rule", "n"),
    [
        (MultiKrum(f=1), 5),
        (MultiKrum(f=0, m=2), 3),
        (GeometricMedian(), 5),
        (CenteredClipping(radius=0.8), 4),
        (NormBound(0.5), 3),
        (NormBound(0.9, MultiKrum(f=1)), 5),
        (NearestNeighborMixing(f=1, rule=MultiKrum(f=1)), 5),
        (Bucketing(s=2, rule=MultiKrum(f=0, m=2)), 6),
        (MoNNA(f=1), 4),
    ],
    ids=lambda value: value if isinstance(value, int) else value.title,
)
def test_a_rule_gives_what_it_gives_in_the_clear(rule, n, wire, gaussian, intake):
    """Of one chunk, which is its own sketch: only whole steps and whole weights are between the two."""
    channel, rows = CKKSGram(bound=1.0).with_rule(rule), gaussian(n, D)
    rows = {client: row * (0.5 + client / (6 * n)) for client, row in rows.items()}  # of unlike lengths
    view, outcome, _, _ = played(channel, rows, wire, intake)
    _, expected = plainly(rule, rows)
    assert view.ids == tuple(sorted(rows))
    torch.testing.assert_close(outcome.weights, expected.weights.double(), rtol=0, atol=3e-5)
    assert float((outcome.vector - expected.vector).norm()) < 1e-4 * float(expected.vector.norm())
    for got, wanted in ((outcome.clipped, expected.clipped), (outcome.suspects, expected.suspects)):
        assert (got is None) == (wanted is None)
        assert got is None or got.tolist() == wanted.tolist()


@pytest.mark.parametrize("n", [2, 3, 12])
def test_any_number_of_clients(n, wire, gaussian, intake):
    rows = gaussian(n, D)
    rows[3 * n] = -5 * rows[3 * n]  # within LONGEST, far off; a coordinate is at most 0.5 in a Gaussian of D
    channel = CKKSGram(bound=5.0).with_rule(GeometricMedian() if n < 3 else MultiKrum(f=0, m=n - 1))
    _, outcome, _, _ = played(channel, rows, wire, intake)
    _, expected = plainly(channel.rule, rows)
    torch.testing.assert_close(outcome.vector, expected.vector, rtol=0, atol=1e-4)


@pytest.mark.parametrize("d", [1, DEGREE - 1, DEGREE, 2 * DEGREE + 5])
def test_the_released_sum_is_within_the_stated_error(d, wire, gaussian, intake):
    """Of its own weights, whatever the width; the weights come from sketches."""
    channel, rows = CKKSGram(bound=1.0).with_rule(GeometricMedian()), gaussian(3, d)
    _, outcome, _, _ = played(channel, rows, wire, intake)
    exact = weighed(rows, outcome.weights)
    float32 = 2**-23 * float(exact.norm())
    assert float((outcome.vector - exact).norm()) <= channel.error_bound(d, outcome.weights) + float32


def test_the_sum_of_whole_steps_is_exact(wire, gaussian, intake, roster):
    """So nothing of the encryption noise is released, and runs can be repeated."""
    rows, released = gaussian(3, D), []
    for _ in range(2):
        line = played(CHANNEL, rows, wire, intake)[-1]
        _, parts = roster.opened(line.replies("sum")[KEY_HOLDER], KEY_HOLDER)
        released.append(np.frombuffer(parts[0], "<i8"))
    _, expected = plainly(RULE, rows)
    chosen = [row for i, row in enumerate(rows[key] for key in sorted(rows)) if expected.weights[i] > 0]
    assert np.array_equal(released[0], sum(CHANNEL.steps(row) for row in chosen))
    assert np.array_equal(released[0], released[1])


def test_the_edges_of_the_range_do_not_wrap(wire, intake):
    rows = {i: torch.full((D,), value) for i, value in enumerate([0.25, -0.25, 0.25, 0.25])}
    line = wire(channel := CKKSGram(bound=0.25), rows)
    total = channel.collect(list(rows), intake(D, Reveals.GRAM), line).total()
    assert set(total.tolist()) == {0.5}


def test_the_largest_weighted_sum_is_exact(wire, intake, roster):
    """Constant rows at the bound put everything into one root of unity, where double precision is worst."""
    weights, rows = [0.5, 0.3, 0.2], {i: torch.full((DEGREE - 1,), 1.0) for i in range(3)}
    channel = CKKSGram(bound=1.0, gram_to_server=True)
    line = wire(channel, rows)
    view = channel.collect([0, 1, 2], intake(DEGREE - 1, Reveals.GRAM), line)
    view.gram(none := torch.zeros(0, DEGREE - 1))
    view.weighted_sum(torch.tensor(weights, dtype=torch.float64), none)
    steps = np.frombuffer(roster.opened(line.replies("sum")[KEY_HOLDER], KEY_HOLDER)[1][0], "<i8")
    assert set(steps.tolist()) == {int(whole_weights(np.array(weights))[0].sum()) * 2**BITS}


def test_the_noise_of_the_largest_weights_is_far_from_half_a_step():
    """The stated eleven standard deviations: 7e-29 for one number, 2e-22 for three million."""
    step = SCALE / 2**BITS
    assert 11 < 0.25 * step / (NOISE * WEIGHT_NORM) < 12


def test_a_sum_needs_no_measuring(wire, gaussian, intake):
    rows = gaussian(4, D)
    line = wire(CHANNEL, rows)
    view = CHANNEL.collect(list(rows), intake(D, Reveals.GRAM), line)
    _, outcome = Mean().aggregate({}, view, torch.Generator())
    torch.testing.assert_close(outcome.vector, torch.stack(list(rows.values())).mean(0), rtol=0, atol=1e-6)
    assert [stage for stage, party, _ in line.received if party == KEY_HOLDER] == ["keys", "sum"]


@pytest.mark.parametrize("d", [D, DEGREE + 3])
def test_references_are_measured_and_may_have_weight(d, wire, gaussian, intake):
    """Two rounds of centred clipping: the second measures from, and moves, what the first released."""
    channel = CKKSGram(bound=1.0).with_rule(CenteredClipping(radius=0.3))
    state = plain = None
    for seed in range(2):
        rows = gaussian(4, d, seed)
        _, outcome, state, _ = played(channel, rows, wire, intake, state)
        plain, expected = plainly(channel.rule, rows, plain)
        # of several chunks squared distances are off by 4 deviations of 1.6 % at most, distances by half of that
        allowed = (1e-4 if d == D else 0.03) * float(expected.vector.norm())
        assert float((outcome.vector - expected.vector).norm()) < allowed
        plain = state


def test_a_root_is_trusted_as_in_the_clear(wire, gaussian, intake):
    channel, rows, d = CKKSGram(bound=2.0).with_rule(FLTrust()), gaussian(5, D), D
    state = with_root(FLTrust().init(d), sum(rows.values()))
    _, outcome, _, _ = played(channel, rows, wire, intake, state)
    _, expected = plainly(FLTrust(), rows, state)
    assert float((outcome.vector - expected.vector).norm()) < 1e-4 * float(expected.vector.norm())
    assert outcome.clipped.tolist() == expected.clipped.tolist()


def test_where_nobody_is_trusted_nothing_is_decrypted(wire, gaussian, intake):
    channel, rows = CKKSGram(bound=1.0).with_rule(FLTrust()), gaussian(3, D)
    _, outcome, _, line = played(channel, rows, wire, intake)  # a root of zero
    assert not outcome.vector.any()
    assert not outcome.weights.any()
    assert "sum" not in {stage for stage, _, _ in line.sent}


def test_a_codec_that_only_scales_is_measured_in_units_of_an_update(wire, gaussian, roster):
    rows = gaussian(4, D)
    codec = FixedPoint(bound=1.0, bits=8)
    encoded = codec.encode(torch.stack(list(rows.values())), {}, [torch.Generator().manual_seed(i) for i in range(4)])[
        0
    ]
    sent = {client: Encoded(encoded.rows[k : k + 1].float(), {}) for k, client in enumerate(rows)}
    opened = {client: codec.decode(one, D)[0] for client, one in sent.items()}
    rule = CenteredClipping(radius=0.8)
    channel = CKKSGram(bound=256.0).with_rule(rule)
    view = channel.collect(list(rows), Intake(Chain((codec,)), D, Reveals.GRAM), wire(channel, sent))
    center = {"center": opened[3] / 2}
    _, outcome = Delegated(rule).aggregate(center, view, torch.Generator().manual_seed(3))
    _, expected = plainly(rule, opened, center)
    assert float((outcome.vector - expected.vector).norm()) < 1e-4 * float(expected.vector.norm())


def test_krum_orders_as_in_the_clear_where_scores_differ_by_a_tenth():
    """Unlike lengths, three chunks, 60 fixed draws: sketched scores are off by 2 %."""
    pairs = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        rows = rng.normal(size=(8, 3 * DEGREE)) * rng.uniform(0.5, 2.0, (8, 1))
        short = sketched(rows, Draw.expand(seed.to_bytes(32, "big"), b"", 3, 16))
        exact, found = (krum_scores(torch.from_numpy(each @ each.T), 2).numpy() for each in (rows, short))
        clear = exact[:, None] > 1.1 * exact
        pairs += clear.sum()
        assert (found[:, None] > found)[clear].all()
    assert pairs > 500


# What does not fit


@pytest.mark.parametrize("value", [1.0001, -1.0001, 1e30, float("nan"), float("-inf")])
def test_a_coordinate_beyond_the_bound_is_refused_by_the_client(value, wire, gaussian, intake):
    rows = {**gaussian(5, 5), 99: torch.tensor([0, 0, value, 0, 0])}
    with pytest.raises(Overflow, match=r"bound=1.0: .* raise bound or clip"):
        CHANNEL.steps(rows[99])
    if value != -1.0001:
        return
    view, outcome, _, _ = played(replace(CHANNEL, rule=MultiKrum(f=2)), rows, wire, intake)
    assert (view.ids, view.bad) == ((3, 6, 9, 12, 15), 1)
    del rows[99]
    _, expected = plainly(MultiKrum(f=1), rows)  # the key holder has lowered f, too
    torch.testing.assert_close(outcome.vector, expected.vector, rtol=0, atol=1e-6)


def test_a_row_too_long_to_be_measured_is_refused_by_the_client():
    with pytest.raises(Overflow, match="512 bounds"):
        CHANNEL.steps(torch.ones(512**2 + 1))
    assert len(CHANNEL.steps(torch.ones(512**2))) == 512**2


def test_a_bound_that_nobody_meets_fails_the_round_with_the_way_out(wire, gaussian, intake):
    rows = {party: 100 * row for party, row in gaussian(3, 5).items()}
    with pytest.raises(RoundFailed, match=r"bound=1.0: the rows of 3 clients lie beyond; raise bound"):
        CHANNEL.collect(list(rows), intake(5, Reveals.GRAM), wire(CHANNEL, rows))


def sends(client, values, roster, canary=1.0):
    """A client that obeys no bound and encrypts these values."""
    keys = []

    def change(party, reply):
        if party == KEY_HOLDER and not keys:
            keys.extend(roster.opened(reply, KEY_HOLDER)[1])
        if party != client:
            return reply
        header, _ = roster.opened(reply, client)
        return roster.sealed(header, [PublicRing(keys[0]).encrypt(np.append(values, canary))], client)

    return change


@pytest.mark.parametrize("length", [630.0, 700.0, 1000.0])
def test_a_client_that_sends_too_long_a_row_has_no_weight(length, wire, gaussian, intake, roster):
    """Beyond 724 bounds its square wraps; 1000^2 comes out as less than zero."""
    rows = gaussian(4, D)
    channel = replace(CHANNEL, rule=GeometricMedian())
    change = sends(6, rows[6].numpy() * length, roster)
    view, outcome, _, _ = played(channel, rows, wire, intake, change=change)
    assert view.n == 4
    assert outcome.weights[1] == 0
    del rows[6]
    _, expected = plainly(GeometricMedian(), rows)
    torch.testing.assert_close(outcome.vector, expected.vector, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("scale", "canary"), [(1.0, 0.0), (1.0, 1.1), (1.0, -1.0)], ids=["none", "off", "of the other sign"]
)
def test_a_canary_that_does_not_add_up_fails_the_round(scale, canary, wire, gaussian, intake, roster):
    rows = gaussian(3, D)
    change = sends(6, rows[6].numpy() * scale, roster, canary)
    view = CHANNEL.collect(list(rows), intake(D, Reveals.GRAM), wire(CHANNEL, rows, change=change))
    with pytest.raises(RoundFailed, match="whole steps"):
        view.total()


def test_values_off_the_grid_fail_the_round(wire, gaussian, intake, roster):
    """Rounding them would depend on the encryption noise."""
    rows = gaussian(3, D)
    change = sends(6, (np.rint(rows[6].numpy() * 2**BITS) + 0.5) / 2**BITS, roster)
    view = CHANNEL.collect(list(rows), intake(D, Reveals.GRAM), wire(CHANNEL, rows, change=change))
    with pytest.raises(RoundFailed, match="whole steps"):
        view.total()


def test_drop_outs(wire, gaussian, intake):
    rows = gaussian(4, D)
    view, outcome, _, _ = played(CHANNEL, rows, wire, intake, lost={"update": {6}})
    assert (view.n, view.bad) == (3, 0)
    del rows[6]
    _, expected = plainly(RULE, rows)
    torch.testing.assert_close(outcome.vector, expected.vector, rtol=0, atol=1e-6)


@pytest.mark.parametrize("stage", ["keys", "signs", "weights", "sum"])
def test_a_silent_key_holder_fails_the_round(stage, wire, gaussian, intake):
    with pytest.raises(RoundFailed, match=f"did not answer to '{stage}'"):
        played(CHANNEL, gaussian(3, D), wire, intake, lost={stage: {KEY_HOLDER}})


def test_too_few_clients_fail_the_round(wire, gaussian, intake):
    channel = CHANNEL.with_floor(4)
    assert channel.smallest_release == 4
    assert channel.with_floor(2).smallest_release == 4
    rows = gaussian(4, D)
    with pytest.raises(TooFewClients, match=r"smallest_release=4: only 3 client\(s\)"):
        played(channel, rows, wire, intake, lost={"update": {6}})


def test_a_cohort_that_is_too_small_for_the_rule_is_named_by_whoever_counts(wire, gaussian, intake, roster):
    rows = gaussian(5, D)
    with pytest.raises(CohortTooSmall, match=r"needs n >= 2f\+3 = 5 updates, got n=4"):
        played(replace(CHANNEL, rule=MultiKrum(f=1)), rows, wire, intake, lost={"update": {6}})
    change = sends(6, rows[6].numpy() * 700, roster)  # the key holder alone finds it out; f is lowered with it
    channel = replace(CHANNEL, rule=MultiKrum(f=1, m=4))
    assert played(channel, rows, wire, intake, change=change)[1].weights[1] == 0
    with pytest.raises(CohortTooSmall, match="f=0 tolerates 0 bad"):
        played(
            replace(CHANNEL, rule=MultiKrum(f=0, m=3)),
            rows,
            wire,
            intake,
            change=sends(6, rows[6].numpy() * 700, roster),
        )


def test_nobody_at_all(wire, intake):
    line = wire(CHANNEL, {})
    view = CHANNEL.collect([], intake(D, Reveals.GRAM), line)
    assert (view.n, view.d, view.total().tolist(), line.sent) == (0, D, [0.0] * D, [])


# Roles


def test_one_client_is_never_singled_out(wire, gaussian, intake):
    channel = replace(CHANNEL, rule=Krum(f=0))
    with pytest.raises(RoundFailed, match=r"effectively those of 1 client\(s\); use MultiKrum"):
        played(channel, gaussian(3, D), wire, intake)
    line = wire(CHANNEL, rows := gaussian(3, D))
    assert played(line.channel, rows, wire, intake)[1].weights.gt(0).sum() == 2


def test_nor_by_the_servers_own_weights(wire, gaussian, intake):
    channel = CKKSGram(bound=1.0, gram_to_server=True)
    rows = gaussian(3, D)
    view = channel.collect(list(rows), intake(D, Reveals.GRAM), wire(channel, rows))
    view.gram(none := torch.zeros(0, D))
    for weights in ([1.0, 0, 0], [1.0, 0.1, 0.1], [1.0, -1.0, 0.0]):
        assert effective_size(np.array(weights)) < 2
        with pytest.raises(RoundFailed, match="smallest_release=2: the weights are effectively"):
            view.weighted_sum(torch.tensor(weights), none)
    released = view.weighted_sum(torch.tensor([1.0, 1.0, 0.0]), none)  # nothing was spent by what was refused
    torch.testing.assert_close(released, rows[3] + rows[6], rtol=0, atol=1e-6)


def test_the_matrix_stays_with_the_key_holder_unless_it_is_agreed(wire, gaussian, intake):
    rows = gaussian(4, D)
    view = CHANNEL.collect(list(rows), intake(D, Reveals.GRAM), wire(CHANNEL, rows))
    with pytest.raises(NotRevealed, match="gram_to_server"):
        view.gram(torch.zeros(0, D))
    with pytest.raises(NotRevealed, match="block"):
        view.block(0, 1)
    open_channel = CKKSGram(bound=1.0, gram_to_server=True)
    view = open_channel.collect(list(rows), intake(D, Reveals.GRAM), wire(open_channel, rows))
    matrix = torch.stack([rows[i] for i in sorted(rows)]).double()
    found = view.gram(reference := torch.full((1, D), 0.5))
    whole = torch.cat([matrix, reference.double()])
    torch.testing.assert_close(found, whole @ whole.T, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(view.gram(reference), found, rtol=0, atol=0)  # no second question
    with pytest.raises(NotRevealed, match="the server runs the rule"):
        view.decided(reference, 0)
    assert "lengths and angles" in open_channel.learns["server"]
    assert "lengths and angles" not in CHANNEL.learns["server"]


def test_rules_run_unchanged_at_a_server_that_gets_the_matrix(wire, gaussian, intake):
    channel, rows = CKKSGram(bound=1.0, gram_to_server=True), gaussian(3, D)
    view = channel.collect(list(rows), intake(D, Reveals.GRAM), wire(channel, rows))
    _, outcome = RULE.aggregate({}, view, torch.Generator().manual_seed(0))
    torch.testing.assert_close(outcome.vector, plainly(RULE, rows)[1].vector, rtol=0, atol=1e-6)


def test_the_server_receives_nothing_that_decrypts(wire, gaussian, intake, roster):
    rows = gaussian(3, D)
    line = wire(CHANNEL, rows)
    view = CHANNEL.collect(list(rows), intake(D, Reveals.GRAM), line)
    memory = dict(line.memories[KEY_HOLDER])
    Delegated(RULE).aggregate({}, view, torch.Generator())
    secret = ts.context_from(memory["secret"]).serialize(
        save_public_key=False, save_secret_key=True, save_galois_keys=False, save_relin_keys=False
    )
    received = b"".join(content for _, _, content in line.received)
    windows = [secret[at : at + 64] for at in range(200, len(secret) - 64, 1024)]
    assert len(windows) > 100
    assert not any(window in received for window in windows)
    assert any(window in memory["secret"] for window in windows)  # the search itself works
    assert "secret" not in line.memories[KEY_HOLDER]  # spent


def test_the_key_holder_receives_no_clients_ciphertext_and_clients_no_evaluation_keys(wire, gaussian, intake, roster):
    rows = gaussian(3, D)
    line = played(CHANNEL, rows, wire, intake)[-1]
    to_holder = b"".join(content for _, party, content in line.sent if party == KEY_HOLDER)
    for client in rows:
        (part,) = roster.opened(line.replies("update")[client], client)[1]
        assert part[200:264] not in to_holder
        request = next(content for stage, party, content in line.sent if (stage, party) == ("update", client))
        assert len(request) < 500_000
    assert len(line.replies("keys")[KEY_HOLDER]) > 2_000_000


def test_seeds_and_keys_are_fresh_and_signs_come_after_the_door_is_closed(wire, gaussian, intake, roster):
    seeds, rows = set(), gaussian(3, D)
    for _ in range(2):
        line = played(CHANNEL, rows, wire, intake)[-1]
        seeds.add(roster.opened(line.replies("signs")[KEY_HOLDER], KEY_HOLDER)[1][0])
        assert [stage for stage, _, _ in line.sent] == ["keys", *["update"] * 3, "signs", "weights", "sum"]
    assert len(seeds) == 2
    assert {len(seed) for seed in seeds} == {32}


# What the key holder is asked


_FINISHED = []


@pytest.fixture
def finished(wire, gaussian, intake, roster):
    """One round, played once: its wire, and for each stage the key holder's memory before and the question."""
    if not _FINISHED:
        rows, asked = gaussian(3, D), {}
        line = wire(CHANNEL, rows)

        class Watched(type(line)):
            def __call__(self, stage, requests):
                if KEY_HOLDER in requests:
                    asked.setdefault(stage, (dict(self.memories.get(KEY_HOLDER, {})), requests[KEY_HOLDER]))
                yield from super().__call__(stage, requests)

        line = Watched(CHANNEL, rows)
        view = CHANNEL.collect(list(rows), intake(D, Reveals.GRAM), line)
        Delegated(RULE).aggregate({}, view, torch.Generator().manual_seed(3))
        _FINISHED.extend([line, asked])
    return _FINISHED


def asked(finished, roster, stage, change=lambda header, parts: (header, parts)):
    """The key holder's answer to the round's question, changed."""
    memory, request = finished[1][stage]
    header, parts = change(*roster.opened(request, SERVER, KEY_HOLDER))
    request = roster.sealed(header, parts, SERVER, KEY_HOLDER)
    return CHANNEL.reply(roster.party(KEY_HOLDER), stage, memory, request, None)


@pytest.mark.parametrize("stage", ["signs", "weights", "sum"])
def test_no_question_is_answered_twice(stage, finished):
    line, questions = finished
    with pytest.raises(InvalidArgument, match="repeated"):
        list(line(stage, {KEY_HOLDER: questions[stage][1]}))
    assert "secret" not in line.memories[KEY_HOLDER]  # nor could it be


def test_an_unchanged_question_is_answered(finished, roster):
    """Positive control of the tests below."""
    for stage in ("signs", "weights", "sum"):
        assert roster.opened(asked(finished, roster, stage)[1], KEY_HOLDER)[1]


def first_part(change):
    return lambda header, parts: (header, [change(parts[0]), *parts[1:]])


@pytest.mark.parametrize(
    ("stage", "change", "error"),
    [
        ("signs", first_part(lambda p: p[:-32]), Corrupt),
        ("signs", first_part(lambda p: p[:-1]), Corrupt),
        ("signs", first_part(lambda p: p[32:64] + p[:32] + p[64:]), Corrupt),
        ("signs", first_part(lambda p: p[:32] * 3), Corrupt),
        ("signs", lambda h, p: (replace(h, clients=1), [p[0][:32]]), TooFewClients),
        ("signs", lambda h, p: (replace(h, clients=0), [b""]), TooFewClients),
        ("weights", first_part(lambda p: bytes(32)), Replay),
        ("weights", lambda h, p: (h, p[:-1]), ParameterMismatch),
        ("weights", lambda h, p: (h, p[:2]), ParameterMismatch),
        ("weights", lambda h, p: (replace(h, clients=2), p), ParameterMismatch),
        ("weights", lambda h, p: (replace(h, length=41), p), ParameterMismatch),
        ("weights", lambda h, p: (h, [*p[:-1], p[-1][:-8]]), Corrupt),
        ("weights", lambda h, p: (h, [p[0], pack("<QQQ", 2, 0, 0), bytes(32), *p[3:], *p[3:9]]), ParameterMismatch),
        ("weights", lambda h, p: (h, [p[0], p[1][:-1], *p[2:]]), Corrupt),
        ("weights", lambda h, p: (h, [*p[:4], p[3], p[5], p[3], *p[7:]]), RoundFailed),  # no Gram matrix of anything
        ("sum", first_part(lambda p: pack("<3d", 1, 0, 0)), ParameterMismatch),
        ("sum", first_part(lambda p: pack("<3d", 1, 1, 1)), ParameterMismatch),
        ("sum", first_part(lambda p: p[:-8]), Corrupt),
        ("sum", first_part(lambda p: pack("<3d", *[float("nan")] * 3)), Corrupt),
        ("sum", lambda h, p: (h, p[:1]), ParameterMismatch),
        ("sum", lambda h, p: (replace(h, length=DEGREE), p), ParameterMismatch),
        ("sum", lambda h, p: (replace(h, key=b"another key....."), p), BrokenEnvelope),
        ("sum", lambda h, p: (replace(h, parameters=b"other parameters"), p), ParameterMismatch),
        ("sum", lambda h, p: (replace(h, stage="signs"), p), Corrupt),
    ],
)
def test_the_key_holder_refuses_a_changed_question(stage, change, error, finished, roster):
    with pytest.raises(error):
        asked(finished, roster, stage, change)


def test_a_sum_of_other_clients_does_not_add_up(finished, roster):
    """One client's ciphertext in place of the sum of two: the canary gives it away."""
    (alone,) = roster.opened(finished[0].replies("update")[6], 6)[1]
    with pytest.raises(RoundFailed, match="whole steps"):
        asked(finished, roster, "sum", lambda header, parts: (header, [parts[0], alone]))


@pytest.mark.parametrize(
    ("stage", "broken"),
    [
        ("keys", lambda message: b""),
        ("signs", lambda message: message[:-1]),
        ("weights", lambda message: message[:90] + bytes([message[90] ^ 1]) + message[91:]),
        ("sum", lambda message: message + b"x"),
    ],
    ids=["keys", "signs", "weights", "sum"],
)
def test_a_broken_message_of_the_key_holder_is_named(stage, broken, wire, gaussian, intake):
    answered = []

    def change(party, reply):
        answered.extend([party] if party == KEY_HOLDER else [])
        hit = party == KEY_HOLDER and CHANNEL.key_holder_stages[len(answered) - 1] == stage
        return broken(reply) if hit else reply

    with pytest.raises(Corrupt):
        played(CHANNEL, gaussian(3, D), wire, intake, change=change)


def test_a_key_that_the_key_holder_did_not_sign_is_refused_by_clients(finished, roster):
    """A server that puts its own key in its place."""
    header, parts = roster.opened(finished[0].replies("keys")[KEY_HOLDER], KEY_HOLDER)
    foreign = [new_keys(3).public]
    for public, signature in ((foreign[0], parts[1]), (parts[0], bytes(64))):
        own = replace(header, key=fingerprint(public))
        request = roster.sealed(own, [public, signature], SERVER, 6)
        with pytest.raises(Corrupt, match="signature"):
            CHANNEL.reply(roster.party(6), "update", {}, request, None)


# What clients send


def fields(**changed):
    return lambda header, parts: (replace(header, **changed), parts)


BROKEN = {
    "another key": fields(key=b"another key....."),
    "other parameters": fields(parameters=b"other parameters"),
    "another stage": fields(stage="sum"),
    "another length": fields(length=39),
    "more clients": fields(clients=2),
    "no client": fields(clients=0),
    "another scale": fields(scale=2.0),
    "another weight": fields(weight=3.0),
    "another scheme": fields(scheme="bfv"),
    "no parts": lambda header, parts: (header, []),
    "an empty part": lambda header, parts: (header, [b""]),
    "garbage": lambda header, parts: (header, [b"garbage" * 100]),
    "cut off": lambda header, parts: (header, [parts[0][:-5]]),
    "two parts": lambda header, parts: (header, [*parts, parts[0]]),
    "a long part": lambda header, parts: (header, [parts[0] + bytes(300_000)]),
}


def test_what_is_broken_or_foreign_is_left_out(wire, gaussian, intake, roster):
    """One round in which every other client sends something else that is wrong; and some flipped bits."""
    rows, rng = gaussian(2 * len(BROKEN), D), np.random.default_rng(0)
    wrong = dict(zip([client for client in rows if client % 2], BROKEN, strict=True))
    flipped = set(list(wrong)[:4])

    def change(party, reply):
        if party not in wrong:
            return reply
        if party in flipped:
            message = bytearray(reply)
            message[rng.integers(len(message))] ^= 1 << party % 8
            reply_flipped.append(bytes(message))
        header, parts = BROKEN[wrong[party]](*roster.opened(reply, party))
        return roster.sealed(header, parts, party)

    reply_flipped = []
    line = wire(CHANNEL, rows, change=change)
    view = CHANNEL.collect(list(rows), intake(D, Reveals.GRAM), line)
    assert not {wrong[client] for client in set(view.ids) & set(wrong)}
    assert (view.n, view.bad) == (len(BROKEN), len(BROKEN))
    torch.testing.assert_close(view.total(), sum(rows[i] for i in view.ids), rtol=0, atol=1e-6)
    for party, message in zip([p for p in rows if p in flipped], reply_flipped, strict=True):
        with pytest.raises(BrokenEnvelope):
            roster.opened(message, party)


def left_out(change, wire, gaussian, intake, roster):
    """One round in which client 6 sends `change(line)`."""
    rows = gaussian(4, D)
    line = wire(CHANNEL, rows, change=lambda party, reply: change(reply, line) if party == 6 else reply)
    view = CHANNEL.collect(list(rows), intake(D, Reveals.GRAM), line)
    assert (view.ids, view.bad) == ((3, 9, 12), 1)


def test_a_replayed_a_foreign_and_a_copied_row_are_left_out(wire, gaussian, intake, roster, finished):
    def copied(reply, line):
        parts = roster.opened(line.replies("update")[12], 12)[1]  # answered before 6
        return roster.sealed(roster.opened(reply, 6)[0], parts, 6)

    left_out(lambda reply, line: finished[0].replies("update")[6], wire, gaussian, intake, roster)
    left_out(lambda reply, line: line.replies("update")[12], wire, gaussian, intake, roster)
    left_out(copied, wire, gaussian, intake, roster)


def test_a_ciphertext_under_another_key_fails_the_round(wire, gaussian, intake, roster, finished):
    """Nobody can tell it from one of ours until it is decrypted."""
    rows = gaussian(3, D)
    (foreign,) = roster.opened(finished[0].replies("update")[6], 6)[1]

    def change(party, reply):
        return roster.sealed(roster.opened(reply, 6)[0], [foreign], 6) if party == 6 else reply

    view = CHANNEL.collect(list(rows), intake(D, Reveals.GRAM), wire(CHANNEL, rows, change=change))
    with pytest.raises(RoundFailed):
        view.total()


def test_side_information_is_refused(wire, gaussian, intake):
    rows = {party: Encoded(row[None], {"scale": torch.ones(1)}) for party, row in gaussian(3, 5).items()}
    with pytest.raises(InvalidArgument, match="side information"):
        CHANNEL.collect(list(rows), intake(5, Reveals.GRAM), wire(CHANNEL, rows))


# Configuration


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bound": 0.0}, "bound=0.0"),
        ({"bound": float("nan")}, "bound=nan"),
        ({"bound": 1.0, "smallest_release": 1}, "smallest_release=1"),
        ({"bound": 1.0, "max_references": -1}, "max_references=-1"),
        ({"bound": 1.0, "groups": 12}, "groups=12"),
        ({"bound": 1.0, "rule": TrimmedMean(f=1)}, "rule=TrimmedMean cannot be run by a key holder"),
        ({"bound": 1.0, "rule": FoolsGold()}, "rule=FoolsGold"),
        ({"bound": 1.0, "rule": FLTrust(), "max_references": 0}, "max_references=0: FLTrust has 1"),
    ],
)
def test_bad_fields_are_refused(fields, message):
    with pytest.raises(InvalidArgument, match=message):
        CKKSGram(**fields)


def test_what_it_says_of_itself():
    assert CHANNEL.limits.max_references == 1
    assert CHANNEL.limits.smallest_release == 2
    assert CHANNEL.reveals is Reveals.GRAM
    assert CHANNEL.largest_coordinate == 1.0
    assert CHANNEL.grid == 2.0**-24
    assert CHANNEL.most_clients == 2**20
    assert set(CHANNEL.learns) == {"server", "key holder", "clients", "trust"}
    assert CHANNEL.decides
    assert not CKKSGram(bound=1.0, gram_to_server=True).decides
    assert CKKSGram(bound=1.0, gram_to_server=True).with_rule(FoolsGold()).rule is None  # it runs at the server
    facts = CHANNEL.facts(10**6, 10)
    assert facts["bytes a parameter"] == "32.3 from a client"
    assert facts["squared distances"] == "off by 1.6% (one deviation), 25% at worst"
    assert facts["inner products"].startswith("55 of sketches")
    assert CHANNEL.facts(D, 3)["squared distances"] == "exact"
    assert repr(CKKSGram(bound=1.0)) == (
        "CKKSGram(bound=1.0, rule=None, smallest_release=2, max_references=1, groups=16, sketch=True, "
        "gram_to_server=False)"
    )


def test_another_rule_is_another_agreement(finished, roster):
    """A client that believes in another rule refuses to send."""
    request = next(content for stage, _, content in finished[0].sent if stage == "update")
    with pytest.raises(ParameterMismatch, match="parameters="):
        replace(CHANNEL, rule=MultiKrum(f=0)).reply(roster.party(9), "update", {}, request, None)


def test_a_reference_too_long_to_be_measured_is_refused(wire, gaussian, intake):
    channel = CKKSGram(bound=1.0).with_rule(FLTrust())
    state = with_root(FLTrust().init(D), torch.full((D,), 100.0))
    with pytest.raises(Overflow, match="a reference has 632"):
        played(channel, gaussian(3, D), wire, intake, state)


def test_messages_go_by_the_envelope(finished, roster):
    """Nothing is parsed that is not from its sender to its receiver in this round."""
    for stage, party, content in finished[0].received:
        assert Link(roster.party(SERVER), party).open(content)[0].scheme == "ckksgram", stage


# Without a sketch


@pytest.mark.parametrize("d", [40, DEGREE - 1, 2 * DEGREE + 5])
def test_whole_rows_are_measured_exactly(d, wire, gaussian, intake):
    """Inner products of clients and of a reference; a sketch of the same rows is off where there are two chunks."""
    rows, reference = gaussian(3, d), torch.randn(1, d, generator=torch.Generator().manual_seed(5)) / d**0.5
    ordered = torch.stack([rows[party] for party in sorted(rows)])
    exact = MatrixView(ordered).gram(reference)
    grams = []
    for sketch in (False, True):
        channel = CKKSGram(bound=1.0, sketch=sketch, gram_to_server=True)
        view = channel.collect(list(rows), intake(d, Reveals.GRAM), wire(channel, rows))
        grams.append(view.gram(reference))
    torch.testing.assert_close(grams[0], exact, rtol=0, atol=1e-5)
    assert d < DEGREE or float((grams[1] - exact).abs().max()) > 1e-4


def test_a_rule_that_is_run_by_the_key_holder_sees_exact_distances(wire, gaussian, intake):
    channel = CKKSGram(bound=1.0, sketch=False).with_rule(MultiKrum(f=1, m=2))
    rows = gaussian(6, DEGREE + 9)
    _, outcome, _, _ = played(channel, rows, wire, intake)
    matrix = MatrixView(torch.stack([rows[party] for party in sorted(rows)]))
    plain = MultiKrum(f=1, m=2).aggregate({}, matrix, torch.Generator())[1]
    assert torch.equal(outcome.weights > 0, plain.weights > 0)
    torch.testing.assert_close(outcome.vector, plain.vector, rtol=0, atol=1e-5)


def test_a_reference_of_zeros_is_measured_without_a_sketch(wire, gaussian, intake):
    channel = CKKSGram(bound=1.0, sketch=False, gram_to_server=True)
    rows = gaussian(2, 40)
    gram = channel.collect(list(rows), intake(40, Reveals.GRAM), wire(channel, rows)).gram(torch.zeros(1, 40))
    assert float(gram[2].abs().max()) < 1e-6


@pytest.mark.parametrize("stage", ["signs", "weights", "sum"])
def test_no_question_is_answered_before_there_are_keys(stage, finished, roster):
    """The key holder may be asked for less than all its stages."""
    with pytest.raises(BrokenEnvelope):
        CHANNEL.answer(roster.party(KEY_HOLDER), stage, {}, finished[1][stage][1], None)


def wrapped_row(width, used, keys, apparent=0.01):
    """A row of norm 1024 on the grid, in columns from `used` on, whose square comes out as about `apparent`."""
    from privfm.defenses.channels.gram import ring

    context = PublicRing(keys).seal
    modulus = ring._first_prime(context) * ring._second_prime(context) / ring.SCALE**2  # of inner products, near 2^20
    row = np.zeros(width)
    row[used:] = np.floor(np.sqrt(modulus / (width - used)) * 2**BITS) / 2**BITS
    row[-1] = 0.0
    row[-1] = np.rint(np.sqrt(modulus + apparent - row @ row) * 2**BITS) / 2**BITS
    return row


@pytest.mark.parametrize("gram_to_server", [False, True])
def test_a_row_so_long_that_its_square_wraps_to_a_short_one_fails_the_round(gram_to_server, wire, intake, roster):
    """In columns that nobody else uses it looks like the shortest of all. The sum shows how long it is."""
    width, used, rows = 8000, 50, {}
    for party, row in enumerate(torch.randn(14, used, generator=torch.Generator().manual_seed(0))):
        rows[3 * party] = torch.cat([row / row.norm(), torch.zeros(width - used)])
    rule = MultiKrum(f=1, m=13)
    channel = CKKSGram(bound=1.0, gram_to_server=gram_to_server).with_rule(rule)
    keys = []

    def change(party, reply):
        if party == KEY_HOLDER and not keys:
            keys.extend(roster.opened(reply, KEY_HOLDER)[1])
        if party != 6:
            return reply
        header, _ = roster.opened(reply, 6)
        row = wrapped_row(width, used, keys[0])
        return roster.sealed(header, [PublicRing(keys[0]).encrypt(np.append(row, 1.0))], 6)

    view = channel.collect(list(rows), intake(width, Reveals.GRAM), wire(channel, rows, change=change))
    with pytest.raises(RoundFailed, match="longer than"):
        (rule if gram_to_server else Delegated(rule)).aggregate({}, view, torch.Generator().manual_seed(3))


def test_a_sum_of_others_than_were_measured_is_refused(wire, gaussian, intake, roster):
    """Where the server chooses the weights, too."""
    channel, rows = CKKSGram(bound=1.0, gram_to_server=True), gaussian(3, D)
    line = wire(channel, rows)
    view = channel.collect(list(rows), intake(D, Reveals.GRAM), line)
    view.gram(torch.zeros(0, D))
    memory = line.memories[KEY_HOLDER]
    view.total()
    header, (_, *sums) = roster.opened(line.sent[-1][2], SERVER, KEY_HOLDER)
    request = roster.sealed(replace(header, clients=2), [np.ones(2).tobytes(), *sums], SERVER, KEY_HOLDER)
    with pytest.raises(ParameterMismatch, match="others were measured"):
        channel.answer(roster.party(KEY_HOLDER), "sum", memory, request, None)


@pytest.mark.parametrize("value", [1e300, -1e300, 2.0**65, float("inf"), float("nan")])
def test_weights_beyond_all_reason_are_refused_before_anything_is_computed(value):
    with pytest.raises(Corrupt, match="at most 2"):
        numbers(np.array([1.0, value]).tobytes(), 2)
    assert numbers(np.array([1.0, -2.0]).tobytes(), 2).tolist() == [1.0, -2.0]
    assert numbers(b"", 0).tolist() == []
