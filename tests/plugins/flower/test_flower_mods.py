"""Client mods in real client apps: what leaves a node, what the strategy makes of it, and what is refused."""

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from privfm.checks import InvalidArgument, RoundFailed
from privfm.contracts import KEY_HOLDER, SERVER
from privfm.defenses import DPPlan, IntegerNoise, Krum, Mean, Median, MultiKrum, TrimmedMean
from privfm.defenses.channels import BFV, CKKS, CKKSGram, Grouped, PairwiseMasks, Plaintext, RLWEPad, Selective
from privfm.defenses.channels.identities import new_identity, public_identity
from privfm.defenses.transforms import ClientMomentum, Clip, FixedPoint
from privfm.plugins.flower import (
    Parties,
    ProtectedStrategy,
    clip_mod,
    compress_mod,
    load_parties,
    make_secrets,
    noise_mod,
    protect_mod,
    write_public,
)

MEMORY = "privfm.memory"


@pytest.fixture
def model(record):
    return record(w=np.zeros(4, np.float32), steps=np.array(5))


def play(strategy, grid, arrays, rounds=1):
    result = strategy.start(grid, arrays, num_rounds=rounds, timeout=0.05)
    return (None if not result.arrays else {name: each.numpy() for name, each in result.arrays.items()}), result


def ours(rule=None, **kwargs):
    return ProtectedStrategy(rule, **{"fraction_evaluate": 0.0, "seed": 0, **kwargs})


def received(grid):
    """What the server was sent: model records, one a reply."""
    from flwr.common.serde import recorddict_from_proto
    from flwr.proto.recorddict_pb2 import RecordDict as Proto

    return [recorddict_from_proto(Proto.FromString(content)) for content in grid.sent]


# Clip


def test_clip_mod_bounds_what_leaves_the_node(grid_of, adds, model):
    apps = [adds(value, mods=[clip_mod(1.0)]) for value in (0.25, 30.0, -30.0, 0.0)]
    grid = grid_of(apps)
    play(FedAvg(fraction_evaluate=0.0), grid, model)  # works with Flower's own strategy, too
    norms = sorted(np.linalg.norm(reply["arrays"]["w"].numpy()) for reply in received(grid))
    np.testing.assert_allclose(norms, [0.0, 0.5, 1.0, 1.0], rtol=1e-6)
    assert all(reply["metrics"]["num-examples"] == 10 for reply in received(grid))


def test_clip_mod_leaves_integers_and_evaluation_alone(grid_of, app_that, model):
    app = app_that(lambda s, now, number: {"steps": s["steps"] + 1, "w": s["w"] + 9}, mods=[clip_mod(1.0)])
    grid = grid_of([app, app])
    for kind, expected in (("arrays", 6), ("accuracy", None)):
        strategy = FedAvg(fraction_train=float(kind == "arrays"), fraction_evaluate=float(kind != "arrays"))
        _, result = play(strategy, grid, model)
        if expected:
            assert received(grid)[0]["arrays"]["steps"].numpy() == expected
        else:
            assert result.evaluate_metrics_clientapp[1]["accuracy"] == 0.5


def test_clip_mod_around_a_whole_app_leaves_evaluation_alone(grid_of, app_that, model):
    app = ClientApp(mods=[clip_mod(1.0)])

    @app.evaluate()
    def _evaluate(message, context):
        return Message(RecordDict({"metrics": MetricRecord({"num-examples": 1, "accuracy": 0.75})}), reply_to=message)

    _, result = play(FedAvg(fraction_train=0.0), grid_of([app, app]), model)
    assert result.evaluate_metrics_clientapp[1]["accuracy"] == 0.75


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_cannot_be_clipped_is_not_sent(value, grid_of, adds, model):
    grid = grid_of(
        [adds(1.0, mods=[clip_mod(9.0)]), adds(1.0, mods=[clip_mod(9.0)]), adds(value, mods=[clip_mod(9.0)])]
    )
    strategy = ours(Mean())
    np.testing.assert_allclose(play(strategy, grid, model)[0]["w"], 1.0)
    assert strategy.reports[0].failed == (2,)
    assert len(grid.sent) == 2


# Local noise


def local_plan(**kwargs):
    values = {
        "noise_multiplier": 2.0,
        "max_grad_norm": 3.0,
        "sample_rate": 1.0,
        "delta": 1e-3,
        "sampling": "full",
        "place": "local",
        "source": "secure",
    }
    return DPPlan(**{**values, **kwargs})


def test_noise_mod_noises_on_the_node_and_sends_nothing_else(grid_of, adds, record):
    model = record(w=np.zeros(20_000, np.float32), steps=np.array(5))
    plan = local_plan()
    grid = grid_of([adds(0.0, mods=[noise_mod(plan)])] * 12)
    strategy = ours(Mean(), plan=plan, population=12)
    found, _ = play(strategy, grid, model)
    for reply in received(grid):
        assert list(reply) == ["arrays"]
        deviation = reply["arrays"]["w"].numpy().std()
        assert abs(deviation / 6.0 - 1) < 0.03  # 6 standard errors; half or double the noise is far off
        assert reply["arrays"]["steps"].numpy() == 5
    assert abs(found["w"].std() / (6 / np.sqrt(12)) - 1) < 0.03
    assert "against server" in strategy.statements()[0]


def test_noise_mod_clips_first(grid_of, adds, record):
    model = record(w=np.zeros(4, np.float32))
    plan = local_plan(noise_multiplier=1e-6)
    grid = grid_of([adds(1e6, mods=[noise_mod(plan)])] * 12)
    found, _ = play(ours(Mean(), plan=plan, population=12), grid, model)
    np.testing.assert_allclose(found["w"], 1.5, rtol=1e-4)  # length 3


def test_noise_mod_does_not_show_whose_training_failed(grid_of, app_that, record):
    """A failure is told by no error, no shorter message, no other name; what is sent is noise of the plan's scale."""
    model = record(w=np.zeros(20_000, np.float32))
    told = {"loss": 1.0}

    def train(state, now, number):
        if number == 3:
            raise RuntimeError("a text that is private")
        if number == 4:
            return {"w": state["w"] * np.nan}
        return {"another": state["w"]} if number == 5 else state

    grid = grid_of([app_that(train, mods=[noise_mod(local_plan())], metrics=told)] * 12)
    strategy = ours(Mean(), plan=local_plan(), population=12)
    play(strategy, grid, model)
    assert strategy.reports[0].used == tuple(range(12))
    assert len({len(reply) for reply in grid.sent}) == 1
    for reply in received(grid):
        assert list(reply) == ["arrays"]
        assert abs(reply["arrays"]["w"].numpy().std() / 6.0 - 1) < 0.03


def test_noise_mod_takes_part_no_more_often_than_planned_whatever_the_server_says(grid_of, adds, record):
    model = record(w=np.zeros(4, np.float32))
    plan = local_plan(max_participations=2)
    grid = grid_of([adds(0.0, mods=[noise_mod(plan)])] * 12)
    strategy = ours(Mean())  # a server that does not count
    play(strategy, grid, model, rounds=4)
    assert [len(report.used) for report in strategy.reports] == [12, 12, 0, 0]
    assert len(grid.sent) == 24


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"place": "central"}, "place='central'"),
        ({"source": "seeded"}, "takes the noise off"),
    ],
)
def test_noise_mod_refuses_other_plans(kwargs, match):
    with pytest.raises(InvalidArgument, match=match):
        noise_mod(local_plan(**kwargs))


# Codecs


def test_a_codec_is_decoded_and_shortens_the_wire(grid_of, adds, record):
    model = record(w=np.zeros(4000, np.float32))
    codec = FixedPoint(bound=4.0, bits=6)
    plain, short = grid_of([adds(0.3)] * 3), grid_of([adds(0.3, mods=[compress_mod(codec)])] * 3)
    play(ours(Mean()), plain, model)
    found, _ = play(ours(Mean(), codec=codec), short, model)
    assert np.abs(found["w"] - 0.3).max() <= codec.step
    assert abs(found["w"].mean() - 0.3) < 0.003  # rounded without bias: 6 standard errors of 12,000 draws
    assert len(short.sent[0]) < 0.3 * len(plain.sent[0])  # one byte for four, and names


def test_codec_and_clip_go_together(grid_of, adds, record):
    model = record(w=np.zeros(4, np.float32))
    codec = FixedPoint(bound=1.0, bits=30)
    apps = [adds(value, mods=[compress_mod(codec), clip_mod(1.0)]) for value in (9.0, 9.0, -0.1)]
    found, _ = play(ours(TrimmedMean(f=1), codec=codec), grid_of(apps), model)
    np.testing.assert_allclose(found["w"], 0.5, rtol=1e-6)


def test_a_codec_under_a_plan_is_clipped_again(grid_of, adds, record):
    model = record(w=np.zeros(4, np.float32))
    codec = FixedPoint(bound=1e3, bits=40)
    plan = DPPlan(1e-9, 1.0, 1.0, 1e-3, sampling="full")
    grid = grid_of([adds(100.0, mods=[compress_mod(codec)])] * 12)
    found, _ = play(ours(plan=plan, population=12, codec=codec), grid, model)
    np.testing.assert_allclose(found["w"], 0.5, rtol=1e-4)


@pytest.mark.parametrize(
    ("client", "server"),
    [(FixedPoint(1.0, 8), None), (None, FixedPoint(1.0, 8)), (FixedPoint(1.0, 8), FixedPoint(1.0, 9))],
)
def test_what_the_strategy_cannot_decode_is_left_out(client, server, grid_of, adds, model):
    good = [] if server is None else [compress_mod(server)]
    other = [] if client is None else [compress_mod(client)]
    strategy = ours(Mean(), codec=server)
    found, _ = play(strategy, grid_of([adds(0.25, mods=good), adds(0.25, mods=good), adds(0.5, mods=other)]), model)
    np.testing.assert_allclose(found["w"], 0.25, atol=0.01)
    assert strategy.reports[0].broken == {2: "codec"}


def test_what_a_codec_refuses_is_not_sent(grid_of, adds, model):
    codec = FixedPoint(1.0, 8)
    strategy = ours(Mean(), codec=codec)
    apps = [adds(value, mods=[compress_mod(codec)]) for value in (0.5, 0.5, 1.5)]
    np.testing.assert_allclose(play(strategy, grid_of(apps), model)[0]["w"], 0.5)
    assert strategy.reports[0].failed == (2,)


@pytest.mark.parametrize("codec", [Clip(1.0), ClientMomentum(0.9)])
def test_client_steps_are_no_codecs(codec):
    with pytest.raises(InvalidArgument, match="client step"):
        compress_mod(codec)


@pytest.mark.parametrize("forged", ["width", "extra", "side", "type"])
def test_forged_encodings_are_left_out(forged, grid_of, adds, model):
    codec = FixedPoint(1.0, 8)

    def tamper(replies):
        record = replies[2].content["privfm.encoded"]
        if forged == "width":
            record["rows"] = Array(np.zeros((1, 5), np.int16))
        elif forged == "extra":
            record["other"] = Array(np.zeros(3))
        elif forged == "side":
            del record["rows"]
        else:
            record["rows"] = Array(np.full((1, 4), np.nan))
        return replies

    grid = grid_of([adds(0.5, mods=[compress_mod(codec)])] * 3)
    grid.tamper = tamper
    strategy = ours(Mean(), codec=codec)
    np.testing.assert_allclose(play(strategy, grid, model)[0]["w"], 0.5)
    assert set(strategy.reports[0].broken) == {2}


# Channels of sums


def federation(clients, key_holder=False):
    """Everybody's parties: SERVER, the clients, and a key holder."""
    numbers = [SERVER, *range(clients), *([KEY_HOLDER] if key_holder else [])]
    identities = {number: new_identity() for number in numbers}
    pinned = {number: public_identity(identity) for number, identity in identities.items()}
    return {number: Parties(identity, pinned) for number, identity in identities.items()}


def protected(grid_of, make, channel, clients, **kwargs):
    """A grid of protected clients, with a key holder where the channel has one, and the server's parties."""
    holder = bool(channel.key_holder_stages)
    parties = federation(clients, holder)

    def own(context):
        return parties[KEY_HOLDER if context.node_config.get("privfm-role") else context.node_config["partition-id"]]

    mod = protect_mod(channel, parties=own, **kwargs)
    grid = grid_of([make(place, mod) for place in range(clients + holder)])
    if holder:
        list(grid.contexts.values())[-1].node_config["privfm-role"] = "key-holder"
    return grid, parties[SERVER]


CODEC = FixedPoint(bound=8.0, bits=16)


SUMS = {
    "masks": PairwiseMasks(clients=5),
    "masks against a lying server": PairwiseMasks(clients=5, active=True),
    "BFV": BFV(clients=5, bits=16),
    "BFV, blinded": BFV(clients=5, bits=16, holder="blinded"),
    "CKKS": CKKS(clients=5, bound=8.0),
    "a part under CKKS": Selective(CKKS(clients=5, bound=8.0), ((0, 2),)),
    "one-time pad": RLWEPad(8, 16, PairwiseMasks(8, modulus_bits=16), smallest_release=3, approximate=True),
}


@pytest.mark.parametrize("channel", list(SUMS.values()), ids=list(SUMS))
def test_a_sum_channel_gives_the_mean_in_an_existing_app(channel, grid_of, adds, model):
    codec = CODEC if channel.integers else None
    values = (0.5, 1.0, -2.0, 3.0, 0.25)  # on the grid of the codec
    grid, server = protected(
        grid_of, lambda place, mod: adds((*values, 99.0)[place], mods=[mod]), channel, 5, codec=codec
    )
    strategy = ours(Mean(), channel=channel, codec=codec, parties=server)
    found, result = play(strategy, grid, model, rounds=2)
    np.testing.assert_allclose(found["w"], 2 * np.mean(values), rtol=1e-4 if codec is None else 1e-6)
    assert found["steps"] == 5
    assert [report.used for report in strategy.reports] == [(0, 1, 2, 3, 4)] * 2
    assert "loss" not in result.train_metrics_clientapp[1]
    assert not any(MEMORY in context.state for context in list(grid.contexts.values())[:5])


def test_means_of_groups_reach_a_robust_rule(grid_of, adds, model):
    channel = Grouped(PairwiseMasks(clients=8), size=2)
    grid, server = protected(grid_of, lambda place, mod: adds(0.5, mods=[mod]), channel, 8, codec=CODEC)
    strategy = ours(Median(), channel=channel, codec=CODEC, parties=server)
    found, _ = play(strategy, grid, model)
    np.testing.assert_allclose(found["w"], 0.5)
    assert strategy.reports[0].used == ()  # rows are of groups, and a group is nobody


def test_over_masks_nothing_but_the_channel_leaves_a_node(grid_of, adds, record):
    model = record(w=np.zeros(64, np.float32))
    grid, server = protected(
        grid_of, lambda place, mod: adds(1.0 + place, mods=[mod]), PairwiseMasks(clients=4), 4, codec=CODEC
    )
    seen = {}
    original = grid.tamper

    def watch(replies):
        for place, context in enumerate(grid.contexts.values()):
            record = context.state.config_records.get(MEMORY)
            for name in ("entry/sharing", "entry/masking"):
                if record is not None and name in record:
                    seen.setdefault(place, set()).add(record[name])
        return original(replies)

    grid.tamper = watch
    play(ours(Mean(), channel=PairwiseMasks(clients=4), codec=CODEC, parties=server), grid, model)
    assert {place: len(secrets) for place, secrets in seen.items()} == dict.fromkeys(range(4), 2)
    wire = b"".join(grid.sent)
    assert not any(secret in wire for secrets in seen.values() for secret in secrets)
    for reply in received(grid):
        assert set(reply) <= {"privfm", "privfm.message"}
        assert set(reply.get("privfm", {})) <= {"party"}
    rows = [
        np.full(64, (1.0 + place) / CODEC.step, np.float64).astype(kind).tobytes()
        for place in range(4)
        for kind in ("f8", "i8", "u4")
    ]
    assert not any(row[:64] in wire for row in rows)


def test_the_model_travels_once_a_round(grid_of, adds, model):
    grid, server = protected(
        grid_of, lambda place, mod: adds(1.0, mods=[mod]), PairwiseMasks(clients=3), 3, codec=CODEC
    )
    play(ours(Mean(), channel=PairwiseMasks(clients=3), codec=CODEC, parties=server), grid, model)
    assert sum("arrays" in content for _, content in grid.asked) == 3
    assert len(grid.asked) == 3 * 5  # who, keys, shares, masked, unmask


def test_excluded_entries_do_not_travel(grid_of, adds, record):
    model = record(w=np.zeros(4, np.float32), running_var=np.ones(3, np.float32))
    channel = PairwiseMasks(clients=3)
    grid, server = protected(
        grid_of, lambda place, mod: adds(0.5, mods=[mod]), channel, 3, codec=CODEC, exclude=["running_var"]
    )
    strategy = ours(Mean(), channel=channel, codec=CODEC, parties=server, exclude=["running_var"])
    found, _ = play(strategy, grid, model)
    np.testing.assert_allclose(found["w"], 0.5)
    np.testing.assert_array_equal(found["running_var"], 1)
    short = grid_of([adds(0.5, mods=[compress_mod(CODEC, exclude=["running_var"])])] * 3)
    found, _ = play(ours(Mean(), codec=CODEC, exclude=["running_var"]), short, model)
    np.testing.assert_array_equal(found["running_var"], 1)
    np.testing.assert_allclose(found["w"], 0.5)


def test_order_and_drop_outs_over_masks(grid_of, adds, model):
    channel = PairwiseMasks(clients=6, dropouts=0.4, corrupt=0.1)
    results = []
    for lost in (None, "masked", "unmask"):
        grid, server = protected(grid_of, lambda place, mod: adds(1.0 + place, mods=[mod]), channel, 6, codec=CODEC)
        calls = []

        def tamper(replies, calls=calls, lost=lost):
            calls.append(len(replies))
            stage = ("who", "keys", "shares", "masked", "unmask")[len(calls) - 1]
            return [reply for place, reply in enumerate(replies[::-1]) if stage != lost or place]

        grid.tamper = tamper
        strategy = ours(Mean(), channel=channel, codec=CODEC, parties=server)
        found, _ = play(strategy, grid, model)
        results.append(float(found["w"][0]))
        assert strategy.reports[0].missing == (() if lost is None else (5,))
    np.testing.assert_allclose(results, [3.5, 3.0, 3.5], rtol=1e-6)


def test_a_client_that_raises_is_a_drop_out_and_forgets(grid_of, adds, app_that, model):
    def broken(state, now, number):
        raise RuntimeError("private detail")

    channel = PairwiseMasks(clients=5, dropouts=0.3, corrupt=0.1)
    grid, server = protected(
        grid_of,
        lambda place, mod: app_that(broken, mods=[mod]) if place == 4 else adds(1.0, mods=[mod]),
        channel,
        5,
        codec=CODEC,
    )
    strategy = ours(Mean(), channel=channel, codec=CODEC, parties=server)
    found, _ = play(strategy, grid, model)
    np.testing.assert_allclose(found["w"], 1.0)
    assert strategy.reports[0].failed == (4,)
    assert all(MEMORY not in context.state for context in grid.contexts.values())


def test_central_noise_over_masks_clips_on_the_client(grid_of, adds, record):
    model = record(w=np.zeros(4, np.float32))
    plan = DPPlan(1e-9, 1.0, 1.0, 1e-3, sampling="full")
    channel, codec = PairwiseMasks(clients=12), FixedPoint(1.0, 16)
    grid, server = protected(grid_of, lambda place, mod: adds(100.0, mods=[mod]), channel, 12, codec=codec, plan=plan)
    strategy = ours(plan=plan, population=12, channel=channel, codec=codec, parties=server)
    found, _ = play(strategy, grid, model)
    np.testing.assert_allclose(found["w"], 0.5, rtol=1e-3)


def test_a_round_that_fails_releases_its_noise_all_the_same(grid_of, adds, record):
    model = record(w=np.zeros(5000, np.float32))
    plan = DPPlan(2.0, 1.0, 1.0, 1e-3, sampling="full")
    channel, codec = PairwiseMasks(clients=12), FixedPoint(1.0, 24)
    grid, server = protected(grid_of, lambda place, mod: adds(0.0, mods=[mod]), channel, 12, codec=codec, plan=plan)
    calls = []

    def tamper(replies):
        calls.append(len(replies))
        return replies if len(calls) <= 2 else replies[:1]  # after "who" and "keys" all but one are gone

    grid.tamper = tamper
    strategy = ours(plan=plan, population=12, channel=channel, codec=codec, parties=server)
    found, _ = play(strategy, grid, model)
    assert strategy.reports[0].used == ()
    assert abs(found["w"].std() / (2.0 / 12) - 1) < 0.06  # 6 standard errors


def test_failed_training_is_a_zero_row_under_a_plan(grid_of, app_that, record):
    model = record(w=np.zeros(1, np.float32))
    plan = DPPlan(1e-9, 1.0, 1.0, 1e-3, sampling="full")
    channel, codec = PairwiseMasks(clients=12), FixedPoint(1.0, 16)

    def train(state, now, number):
        if number == 3:
            raise RuntimeError("no data")
        return {"w": state["w"] + 0.5}

    grid, server = protected(
        grid_of, lambda place, mod: app_that(train, mods=[mod]), channel, 12, codec=codec, plan=plan
    )
    strategy = ours(plan=plan, population=12, channel=channel, codec=codec, parties=server)
    found, _ = play(strategy, grid, model)
    np.testing.assert_allclose(found["w"], 11 * 0.5 / 12, rtol=1e-4)
    assert strategy.reports[0].failed == ()


def test_failed_training_does_not_show_under_a_local_plan_over_a_channel(grid_of, app_that, record):
    model = record(w=np.zeros(4, np.float32))
    plan, channel, codec = local_plan(), PairwiseMasks(clients=12), FixedPoint(100.0, 16)

    def train(state, now, number):
        if number == 3:
            raise RuntimeError("no data")
        return state

    grid, server = protected(
        grid_of, lambda place, mod: app_that(train, mods=[mod]), channel, 12, codec=codec, plan=plan
    )
    strategy = ours(plan=plan, population=12, channel=channel, codec=codec, parties=server)
    play(strategy, grid, model)
    assert strategy.reports[0].failed == () and len(strategy.reports[0].used) == 12


def test_distributed_noise_is_the_clients(grid_of, adds, record):
    model = record(w=np.zeros(2000, np.float32))
    integers = IntegerNoise(least_answers=10, clients=12)
    plan = DPPlan(2.0, 1.0, 1.0, 1e-3, sampling="full", place="distributed", integers=integers, source="secure")
    channel = PairwiseMasks(clients=12)
    grid, server = protected(grid_of, lambda place, mod: adds(0.0, mods=[mod]), channel, 12, plan=plan)
    strategy = ours(plan=plan, population=12, channel=channel, parties=server)
    found, _ = play(strategy, grid, model)
    expected = 2.0 * np.sqrt(12 / 10) / 12  # shares are sized for ten, and twelve came
    assert abs(found["w"].std() / expected - 1) < 0.1  # 6 standard errors
    assert "against server" in strategy.statements()[0]


def test_a_key_holder_adds_the_noise_before_the_server_sees_the_sum(grid_of, adds, record):
    model = record(w=np.zeros(2000, np.float32))
    plan = DPPlan(2.0, 1.0, 1.0, 1e-3, sampling="full", place="key_holder", source="secure")
    channel = CKKS(clients=12, bound=1.0)
    grid, server = protected(grid_of, lambda place, mod: adds(0.0, mods=[mod]), channel, 12, plan=plan)
    strategy = ours(plan=plan, population=12, channel=channel, parties=server)
    found, _ = play(strategy, grid, model)
    assert abs(found["w"].std() / (2.0 / 12) - 1) < 0.1
    assert "against server" in strategy.statements()[0]


def test_a_key_holder_runs_the_rule(grid_of, adds, record):
    model = record(w=np.zeros(300, np.float32))
    channel, rule = CKKSGram(bound=1.0), MultiKrum(f=1)
    values = (0.1, 0.1, 0.1, 0.1, 0.1, 0.1, -0.9)
    grid, server = protected(grid_of, lambda place, mod: adds((*values, 0.0)[place], mods=[mod]), channel, 7, rule=rule)
    strategy = ours(rule, channel=channel, parties=server)
    found, _ = play(strategy, grid, model)
    np.testing.assert_allclose(found["w"], 0.1, atol=1e-3)
    assert strategy.reports[0].kept == (0, 1, 2, 3, 4, 5)


# What is refused over channels


def test_a_plain_training_request_is_answered_with_an_error(grid_of, adds, model):
    grid, _ = protected(grid_of, lambda place, mod: adds(1.0, mods=[mod]), PairwiseMasks(clients=3), 3, codec=CODEC)
    result = FedAvg(fraction_evaluate=0.0).start(grid, model, num_rounds=1, timeout=0.05)
    assert grid.sent == []
    assert not result.arrays


def test_who_cannot_prove_its_number_is_not_asked(grid_of, adds, model):
    grid, server = protected(
        grid_of, lambda place, mod: adds(1.0, mods=[mod]), PairwiseMasks(clients=4), 4, codec=CODEC
    )
    list(grid.contexts.values())[3].node_config["partition-id"] = 0  # with client 0's parties it would be client 0
    stranger = protect_mod(PairwiseMasks(clients=4), parties=federation(4)[0], codec=CODEC)
    node = list(grid.apps)[3]
    grid.apps[node] = adds(9.0, mods=[stranger])
    strategy = ours(Mean(), channel=PairwiseMasks(clients=4), codec=CODEC, parties=server)
    found, _ = play(strategy, grid, model)
    np.testing.assert_allclose(found["w"], 1.0)
    assert strategy.reports[0].asked == (0, 1, 2)


def test_a_stage_out_of_order_ends_the_round_for_a_node(grid_of, adds, model):
    grid, _ = protected(grid_of, lambda place, mod: adds(1.0, mods=[mod]), PairwiseMasks(clients=3), 3, codec=CODEC)
    node, context = next(iter(grid.contexts.items()))
    context.state[MEMORY] = ConfigRecord({"round": 0, "entry/done": b"keys", "entry/sharing": b"secret"})
    content = RecordDict(
        {
            "privfm": ConfigRecord({"stage": "unmask", "round": 0}),
            "privfm.message": ArrayRecord({"bytes": Array(np.zeros(3, np.uint8))}),
        }
    )
    (reply,) = grid.send_and_receive([Message(content, node, "train")])
    assert reply.error.reason == "InvalidArgument"
    assert MEMORY not in context.state


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"rule": Krum(f=1)}, "reveals only SUM"),
        ({"codec": None}, "carries whole numbers"),
    ],
)
def test_rules_and_codecs_that_do_not_fit_a_channel(kwargs, match, grid_of, adds, model):
    channel = PairwiseMasks(clients=5)
    grid, server = protected(grid_of, lambda place, mod: adds(1.0, mods=[mod]), channel, 5, codec=CODEC)
    values = {"rule": Mean(), "channel": channel, "codec": CODEC, "parties": server, **kwargs}
    with pytest.raises(InvalidArgument, match=match):
        play(ours(**values), grid, model)


def test_channels_need_parties_and_mods_need_channels():
    with pytest.raises(InvalidArgument, match="parties=None"):
        ours(Mean(), channel=PairwiseMasks(clients=3), codec=CODEC)
    with pytest.raises(InvalidArgument, match="for clients alone"):
        protect_mod(BFV(clients=3, bits=16, holder="clients"), codec=CODEC)
    with pytest.raises(InvalidArgument, match="clip_mod"):
        protect_mod(Plaintext())
    with pytest.raises(InvalidArgument, match="multiplies its row by"):
        ours(Mean(), channel=PairwiseMasks(clients=3), weighting="examples", count_cap=4)


def test_a_key_holder_is_waited_for(grid_of, adds, model):
    channel = BFV(clients=3, bits=16)
    grid, server = protected(grid_of, lambda place, mod: adds(1.0, mods=[mod]), channel, 3, codec=CODEC)
    holder = list(grid.apps)[-1]
    del grid.apps[holder]
    with pytest.raises(RoundFailed, match="no key holder"):
        ours(Mean(), channel=channel, codec=CODEC, parties=server).start(grid, model, num_rounds=1, timeout=0.01)


# Identities


def made_in(folder, *numbers):
    """Everybody's secret, and the list of the public halves."""
    public = {}
    for number in numbers:
        public |= make_secrets(folder / f"{number}.secret", [number])
    write_public(folder / "pinned.json", public)
    return public


def test_identities_live_in_files(tmp_path):
    pinned = made_in(tmp_path, SERVER, KEY_HOLDER, 0, 1)
    parties = load_parties(tmp_path / "0.secret", tmp_path / "pinned.json")
    assert dict(parties.pinned) == pinned
    assert public_identity(parties.own) == parties.public(0)
    assert (tmp_path / "0.secret").stat().st_mode & 0o777 == 0o600
    with pytest.raises(InvalidArgument, match="not overwritten"):
        make_secrets(tmp_path / "0.secret", [0])
    with pytest.raises(InvalidArgument, match="no pinned identity"):
        parties.public(7)
    assert "secret" not in repr(parties)


@pytest.mark.parametrize("content", ["[]", "{", '{"0": "zz"}', '{"zero": ""}', '{"0": "00"}'])
def test_broken_lists_of_identities_are_refused(content, tmp_path):
    make_secrets(tmp_path / "0.secret", [0])
    (tmp_path / "pinned.json").write_text(content)
    with pytest.raises(InvalidArgument):
        load_parties(tmp_path / "0.secret", tmp_path / "pinned.json")


def test_a_secret_is_of_one_party_and_its_owners_alone(tmp_path):
    made_in(tmp_path, 0)
    make_secrets(tmp_path / "both.json", [0, 1])
    with pytest.raises(InvalidArgument, match=r"\[0, 1\]"):
        load_parties(tmp_path / "both.json", tmp_path / "pinned.json")
    (tmp_path / "0.secret").chmod(0o640)
    with pytest.raises(InvalidArgument, match="chmod 600"):
        load_parties(tmp_path / "0.secret", tmp_path / "pinned.json")


def test_a_node_names_its_files(tmp_path, grid_of, adds, model):
    made_in(tmp_path, SERVER, 0, 1, 2)
    channel = PairwiseMasks(clients=3)
    grid = grid_of([adds(0.5, mods=[protect_mod(channel, codec=CODEC)])] * 3)
    for number, context in enumerate(grid.contexts.values()):
        context.node_config["privfm-identity"] = str(tmp_path / f"{number}.secret")
        context.node_config["privfm-pinned"] = str(tmp_path / "pinned.json")
    server = load_parties(tmp_path / f"{SERVER}.secret", tmp_path / "pinned.json")
    found, _ = play(ours(Mean(), channel=channel, codec=CODEC, parties=server), grid, model)
    np.testing.assert_allclose(found["w"], 0.5)
