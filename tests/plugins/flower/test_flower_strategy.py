"""The strategy against Flower's known weak spots, each beside what Flower 1.41 itself makes of it."""

import random
from dataclasses import replace

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp.exception import InconsistentMessageReplies
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, FedAvg

from privfm.checks import InvalidArgument, PrivacyBroken, RoundFailed
from privfm.contracts import Outcome, Reveals, Rule
from privfm.defenses import (
    AdaptiveQuantile,
    DPPlan,
    FLTrust,
    FoolsGold,
    GeometricMedian,
    Krum,
    Mean,
    Median,
    TrimmedMean,
)
from privfm.defenses.transforms import Clip
from privfm.plugins.flower import ProtectedStrategy

pytestmark = pytest.mark.filterwarnings(
    # NumPy's and Flower's own arithmetic on what a client sent, in the contrasting half of a test
    "ignore:invalid value encountered:RuntimeWarning",
    "ignore:divide by zero encountered:RuntimeWarning",
)


@pytest.fixture
def model(record):
    return record(w=np.zeros(4, np.float32), b=np.zeros(2, np.float32))


def play(strategy, grid, arrays, rounds=1, **kwargs):
    """The model after so many rounds, as NumPy arrays; None where no round gave one."""
    result = strategy.start(grid, arrays, num_rounds=rounds, timeout=0.05, **kwargs)
    return (None if not result.arrays else {name: each.numpy() for name, each in result.arrays.items()}), result


def ours(rule=None, **kwargs):
    return ProtectedStrategy(rule, **{"fraction_evaluate": 0.0, "seed": 0, **kwargs})


def theirs(**kwargs):
    return FedAvg(fraction_evaluate=0.0, **kwargs)


def plan_of(**kwargs):
    values = {"noise_multiplier": 1e-9, "max_grad_norm": 1.0, "sample_rate": 1.0, "delta": 1e-3, "sampling": "full"}
    return DPPlan(**{**values, **kwargs})


# The oracle


def test_mean_is_fedavg_with_equal_counts(grid_of, adds, model):
    apps = [adds(value) for value in (0.1, -0.7, 1.3, 2.9, 0.05)]
    mine, _ = play(ours(Mean()), grid_of(apps), model, rounds=3)
    flower, _ = play(theirs(), grid_of(apps), model, rounds=3)
    for name in ("w", "b"):
        np.testing.assert_allclose(mine[name], flower[name], rtol=1e-6)
        assert mine[name].dtype == np.float32
    assert list(mine) == ["w", "b"]


def test_trimmed_mean_is_numpys(grid_of, app_that, model):
    values = np.random.default_rng(5).normal(size=(7, 4)).astype(np.float32)
    apps = [
        app_that(lambda state, now, number: {**state, "w": state["w"] + values[number]}) for _ in range(len(values))
    ]
    found, _ = play(ours(TrimmedMean(f=2)), grid_of(apps), model)
    np.testing.assert_allclose(found["w"], np.sort(values, axis=0)[2:5].mean(0), rtol=1e-6)
    np.testing.assert_array_equal(found["b"], 0)


def test_weights_by_examples_are_capped(grid_of, adds, model):
    strategy = ours(Mean(), weighting="examples", count_cap=100)
    apps = [adds(1.0, examples=50), adds(2.0, examples=100), adds(4.0, examples=10**9)]
    found, _ = play(strategy, grid_of(apps), model)
    np.testing.assert_allclose(found["w"], (0.5 * 1 + 2 + 4) / 2.5, rtol=1e-6)  # by hand: weights 50, 100, 100


# Weak spots


def altered(record, array):
    """A model whose first entry is this array."""
    return ArrayRecord({"w": array, "b": record(b=np.zeros(2, np.float32))["b"]})


BROKEN = {
    "keys": lambda record: record(w=np.full(4, 9, np.float32)),
    "more keys": lambda record: record(w=np.zeros(4, np.float32), b=np.zeros(2, np.float32), c=np.zeros(1)),
    "shapes": lambda record: altered(record, Array(np.zeros((2, 2), np.float32))),
    "dtypes": lambda record: altered(record, Array(np.zeros(4, np.float64))),
    "NaN": lambda record: altered(record, Array(np.full(4, np.nan, np.float32))),
    "inf": lambda record: altered(record, Array(np.full(4, np.inf, np.float32))),
    "lies about its shape": lambda record: altered(
        record, Array("float32", (4,), "numpy.ndarray", Array(np.zeros(2, np.float64)).data)
    ),
    "no array": lambda record: altered(record, Array("float32", (4,), "numpy.ndarray", b"\x80" * 100)),
    "another stype": lambda record: altered(record, Array("float32", (4,), "pickle", bytes(20))),
}
FAULTS = {"keys": "keys", "more keys": "keys", "shapes": "shapes", "dtypes": "dtypes"}


@pytest.mark.parametrize("kind", list(BROKEN))
def test_a_broken_reply_is_left_out_and_counted(kind, grid_of, adds, model, record):
    def tamper(replies):
        replies[2].content["arrays"] = BROKEN[kind](record)
        return replies

    grid = grid_of([adds(1.0), adds(3.0), adds(100.0)])
    grid.tamper = tamper
    strategy = ours(Mean())
    found, result = play(strategy, grid, model)
    np.testing.assert_array_equal(found["w"], 2.0)
    assert strategy.reports[0].used == (0, 1)
    assert strategy.reports[0].broken == {2: FAULTS.get(kind, "values")}
    assert result.train_metrics_clientapp[1]["privfm.broken"] == 1


def test_flower_ends_the_run_for_foreign_keys_and_averages_nan(grid_of, adds, model, record):
    for kind, outcome in (("keys", "raises"), ("NaN", "NaN")):
        grid = grid_of([adds(1.0), adds(3.0), adds(1.0)])

        def tamper(replies, kind=kind):
            replies[2].content["arrays"] = BROKEN[kind](record)
            return replies

        grid.tamper = tamper
        if outcome == "raises":
            with pytest.raises(InconsistentMessageReplies):
                play(theirs(), grid, model)
        else:
            assert np.isnan(play(theirs(), grid, model)[0]["w"]).all()


@pytest.mark.parametrize("examples", [10**9, -59, float("nan"), float("inf"), 0])
def test_claimed_counts_move_nothing(examples, grid_of, adds, model):
    apps = [adds(1.0), adds(1.0), adds(-100.0, examples=examples), adds(1.0), adds(1.0)]
    found, _ = play(ours(TrimmedMean(f=1)), grid_of(apps), model)
    np.testing.assert_allclose(found["w"], 1.0)
    mean, _ = play(ours(Mean()), grid_of(apps), model)
    np.testing.assert_allclose(mean["w"], (4 - 100) / 5, rtol=1e-6)


@pytest.mark.parametrize(("examples", "result"), [(10**9, -100.0), (-59, None)])
def test_flower_lets_claimed_counts_rule(examples, result, grid_of, adds, model):
    found, _ = play(theirs(), grid_of([adds(1.0)] * 6 + [adds(-100.0, examples=examples)]), model)
    if result is not None:
        np.testing.assert_allclose(found["w"], result, rtol=1e-4)
    else:  # weights sum to one, the aggregate is far outside what anybody sent
        assert found["w"].max() > 1.0 or found["w"].min() < -100.0


@pytest.mark.parametrize("examples", [-59, 0, float("nan"), float("inf"), [10, 20], None])
def test_counts_that_are_none_are_left_out_where_they_weigh(examples, grid_of, adds, model):
    metrics = {} if examples is None else {"num-examples": examples}
    strategy = ours(Mean(), weighting="examples", count_cap=1000)
    found, _ = play(strategy, grid_of([adds(1.0), adds(3.0), adds(100.0, metrics=metrics)]), model)
    np.testing.assert_allclose(found["w"], 2.0)
    assert strategy.reports[0].broken == {2: "count"}


def test_a_zero_update_is_one(grid_of, adds, model):
    apps = [adds(0.0), adds(0.1), *[adds(0.0)] * 10]
    plan = plan_of()
    found, _ = play(ours(plan=plan, population=12), grid_of(apps), model)
    np.testing.assert_allclose(found["w"], 0.1 / 12, rtol=1e-5)
    wrapped = DifferentialPrivacyServerSideFixedClipping(theirs(), 1e-9, 1.0, 12)
    with pytest.raises(ZeroDivisionError):
        play(wrapped, grid_of(apps), model)


def test_integer_buffers_stay_the_servers(grid_of, app_that, record):
    model = record(w=np.zeros(4, np.float32), num_batches_tracked=np.array(0), mask=np.array([True, False]))

    def train(state, now, number):
        return {"w": state["w"] + 0.1, "num_batches_tracked": np.array(3 + number), "mask": ~state["mask"]}

    apps = [app_that(train) for _ in range(12)]
    found, _ = play(ours(plan=plan_of(), population=12), grid_of(apps), model)
    np.testing.assert_allclose(found["w"], 0.1, rtol=1e-5)  # of length 0.2: not clipped
    assert found["num_batches_tracked"] == 0
    assert found["num_batches_tracked"].dtype == np.int64
    np.testing.assert_array_equal(found["mask"], [True, False])
    wrapped = DifferentialPrivacyServerSideFixedClipping(theirs(), 1e-9, 1.0, 2)
    simple = record(w=np.zeros(4, np.float32), num_batches_tracked=np.array(0))
    counted = [app_that(lambda s, now, number: {"w": s["w"] + 0.1, "num_batches_tracked": np.array(3)})] * 2
    flower, _ = play(wrapped, grid_of(counted), simple)
    np.testing.assert_allclose(flower["w"], 0.1 / np.sqrt(9 + 0.04), rtol=1e-5)  # clipped for the counter's length
    assert flower["num_batches_tracked"].dtype == np.float64  # averaged, and noised


def test_permuted_entries_go_by_name(grid_of, app_that, adds, record):
    model = record(w=np.zeros(4, np.float32), b=np.zeros(2, np.float32))

    def backwards(state, now, number):
        return {"b": state["b"] + 2, "w": state["w"] + 1}

    def forwards(state, now, number):
        return {"w": state["w"] + 1, "b": state["b"] + 2}

    for rule in (Mean(), Median(), Krum(f=0)):
        found, _ = play(ours(rule), grid_of([app_that(forwards), app_that(backwards), app_that(forwards)]), model)
        np.testing.assert_allclose(found["w"], 1)
        np.testing.assert_allclose(found["b"], 2)
        assert list(found) == ["w", "b"]
    wrapped = DifferentialPrivacyServerSideFixedClipping(theirs(), 1e-9, 1.0, 2)
    with pytest.raises(ValueError, match="broadcast"):
        play(wrapped, grid_of([app_that(forwards), app_that(backwards)]), model)


def test_a_repeated_reply_is_heard_once(grid_of, adds, model):
    grid = grid_of([adds(1.0), adds(3.0), adds(8.0)])

    def tamper(replies):
        last = max(replies, key=lambda reply: reply.metadata.src_node_id)
        return [*replies, last, last]

    grid.tamper = tamper
    strategy = ours(Mean())
    np.testing.assert_allclose(play(strategy, grid, model)[0]["w"], 4.0)
    assert strategy.reports[0].broken == {}
    np.testing.assert_allclose(play(theirs(), grid, model)[0]["w"], (1 + 3 + 3 * 8) / 5)  # Flower counts it thrice


def test_a_node_that_says_two_things_is_heard_in_neither(grid_of, adds, model, record):
    for backwards in (False, True):
        grid = grid_of([adds(1.0), adds(3.0), adds(8.0)])

        def tamper(replies, backwards=backwards):
            other = Message(RecordDict(dict(replies[2].content)), reply_to=replies[2])
            other.metadata.__dict__.update(replies[2].metadata.__dict__)
            other.content["arrays"] = record(w=np.full(4, 50, np.float32), b=np.full(2, 50, np.float32))
            found = [*replies, other]
            return found[::-1] if backwards else found

        grid.tamper = tamper
        strategy = ours(Mean())
        np.testing.assert_allclose(play(strategy, grid, model)[0]["w"], 2.0)
        assert strategy.reports[0].broken == {2: "repeated"}


def test_who_was_not_asked_is_not_heard_and_counts_against_nobody(grid_of, adds, model):
    grid = grid_of([adds(1.0), adds(2.0), adds(3.0)])

    def tamper(replies):
        strangers = []
        for place in range(5):
            stranger = Message(RecordDict(dict(replies[0].content)), reply_to=replies[0])
            stranger.metadata.__dict__.update(replies[0].metadata.__dict__)
            stranger.metadata.__dict__["_src_node_id"] = 100 + place
            strangers.append(stranger)
        return [*strangers, *replies]

    grid.tamper = tamper
    strategy = ours(TrimmedMean(f=1))
    np.testing.assert_allclose(play(strategy, grid, model)[0]["w"], 2.0)
    assert strategy.reports[0].foreign == 5
    assert strategy.reports[0].bad == 0


def test_errors_and_missing_replies_are_drop_outs(grid_of, adds, app_that, model):
    def broken(state, now, number):
        raise RuntimeError("no memory left")

    grid = grid_of([adds(1.0), app_that(broken), adds(3.0), adds(50.0)])
    grid.tamper = lambda replies: replies[:3]
    strategy = ours(Mean())
    found, result = play(strategy, grid, model)
    np.testing.assert_allclose(found["w"], 2.0)
    report = strategy.reports[0]
    assert (report.used, report.failed, report.missing, report.bad) == ((0, 2), (1,), (3,), 0)
    assert result.train_metrics_clientapp[1]["privfm.missing"] == 1


def test_order_of_arrival_changes_no_bit(grid_of, app_that, model):
    values = np.random.default_rng(1).normal(size=(9, 4)).astype(np.float32) * 1e3
    apps = [app_that(lambda s, now, number: {**s, "w": s["w"] + values[number]}) for _ in values]
    for rule in (Mean(), GeometricMedian(), TrimmedMean(f=2)):
        found = []
        for seed in range(4):
            grid = grid_of(apps)
            shuffled = random.Random(seed)
            grid.tamper = lambda replies, shuffled=shuffled: shuffled.sample(replies, len(replies))
            found.append(play(ours(rule), grid, model, rounds=2)[0]["w"].tobytes())
        assert len(set(found)) == 1


def test_more_broken_replies_than_f_skip_the_round(grid_of, adds, model, record):
    grid = grid_of([adds(1.0) for _ in range(7)])

    def tamper(replies):
        for reply in replies[:2]:
            reply.content["arrays"] = BROKEN["NaN"](record)
        return replies

    grid.tamper = tamper
    strategy = ours(TrimmedMean(f=1))
    found, result = play(strategy, grid, model)
    assert found is None
    assert "f=1 tolerates 1 bad updates" in strategy.reports[0].skipped
    assert result.train_metrics_clientapp[1]["privfm.skipped"] == 1


def test_a_run_that_only_skips_is_given_up(grid_of, adds, model):
    grid = grid_of([adds(1.0), adds(1.0)])
    grid.tamper = lambda replies: []
    strategy = ours(Mean(), max_skipped=2)
    with pytest.raises(RoundFailed, match="3 rounds in a row"):
        play(strategy, grid, model, rounds=9)
    assert len(strategy.reports) == 3


def test_a_model_that_its_type_cannot_hold_is_not_published(grid_of, app_that, record):
    model = record(w=np.full(2, 60000, np.float16))
    apps = [app_that(lambda s, now, number: {"w": s["w"] * np.float16(1.05)})] * 3  # 63000, which float16 holds
    found, _ = play(ours(Mean()), grid_of(apps), model, rounds=2)
    np.testing.assert_allclose(found["w"].astype(float), 63000, rtol=1e-3)  # the second round would give 66150


def test_single_numbers_are_learned_too(grid_of, adds, record):
    model = record(scale=np.float32(0.5), w=np.zeros(2, np.float64))
    found, _ = play(ours(Mean()), grid_of([adds(value) for value in (0.0, 0.5, 1.0)]), model)
    assert (found["scale"].shape, found["scale"].dtype, float(found["scale"])) == ((), np.float32, 1.0)
    assert found["w"].tolist() == [0.5, 0.5]


def test_a_sum_beyond_the_models_type_skips_the_round_and_counts(grid_of, adds, record):
    model = record(w=np.full(2, 60000, np.float16))
    strategy = ours(_Doubled(), max_skipped=1)
    with pytest.raises(RoundFailed, match=r"the next model is not finite in w \(torch\.float16\)"):
        play(strategy, grid_of([adds(np.float16(5000.0))] * 3), model, rounds=4)
    assert len(strategy.reports) == 2


class _Doubled(Rule):
    """Twice the mean: 60000 + 10000 is beyond float16, and no client sent it."""

    @property
    def needs(self):
        return Reveals.SUM

    def step(self, state, view, generator):
        return state, Outcome(2 * view.total() / view.n)


def test_double_precision_of_the_model_is_kept(grid_of, app_that, record):
    model = record(w=np.full(2, 1.0 + 2**-40))
    apps = [app_that(lambda s, now, number: {"w": s["w"] + 2.0**-30})] * 2
    found, _ = play(ours(Mean()), grid_of(apps), model)
    assert found["w"].dtype == np.float64
    np.testing.assert_allclose(found["w"] - 1, 2**-40 + 2**-30, rtol=1e-6)


def test_metrics_of_one_client_break_nothing(grid_of, adds, model):
    strange = {"num-examples": 10, "loss": float("nan"), "own": 3.0, "partition-id": 4}
    apps = [adds(1.0), adds(1.0), adds(1.0), adds(1.0, metrics=strange)]
    _, result = play(ours(Mean(), fraction_evaluate=1.0), grid_of(apps), model)
    metrics = result.train_metrics_clientapp[1]
    assert metrics["loss"] == 2.0
    assert "own" not in metrics
    assert "partition-id" not in metrics
    assert result.evaluate_metrics_clientapp[1]["accuracy"] == 0.5
    with pytest.raises(InconsistentMessageReplies):
        play(FedAvg(), grid_of(apps), model)


# Sampling and numbering


def test_cohorts_follow_the_seed_and_no_global_generator(grid_of, adds, model, untouched_random_state):
    def cohorts(seed, offset=0):
        grid = grid_of([adds(0.1) for _ in range(10)])
        strategy = ours(Mean(), seed=seed, fraction_train=0.3, fraction_evaluate=0.5, identify="partitions")
        for context in grid.contexts.values():  # the same partitions on other nodes
            context.node_config["partition-id"] = (context.node_config["partition-id"] + offset) % 10
        play(strategy, grid, model, rounds=3)
        return [report.asked for report in strategy.reports]

    from privfm.plugins.flower import clip_mod

    real = adds
    adds = lambda value: real(value, mods=[clip_mod(10.0)])  # noqa: E731  # mods answer who they are
    assert cohorts(3) == cohorts(3, offset=4)
    assert cohorts(3) != cohorts(4)
    assert all(len(asked) == 3 for asked in cohorts(3))


def test_a_number_that_two_nodes_claim_goes_to_neither(grid_of, adds, model):
    from privfm.plugins.flower import clip_mod

    grid = grid_of([adds(value, mods=[clip_mod(100.0)]) for value in (1.0, 3.0, 50.0, 50.0)])
    for place, context in enumerate(grid.contexts.values()):
        context.node_config["partition-id"] = min(place, 2)
    strategy = ours(Mean(), identify="partitions")
    np.testing.assert_allclose(play(strategy, grid, model)[0]["w"], 2.0)
    assert strategy.reports[0].asked == (0, 1)


def test_too_few_nodes_are_waited_for_and_not_for_ever(grid_of, adds, model):
    strategy = ours(Mean(), min_available_nodes=5)
    with pytest.raises(RoundFailed, match="2 clients of at least 5"):
        strategy.start(grid_of([adds(1.0)] * 2), model, num_rounds=1, timeout=0)
    strategy = ours(Mean(), identify="partitions")  # nobody has a mod that would say who it is
    with pytest.raises(RoundFailed, match="2 nodes do not say who they are"):
        strategy.start(grid_of([adds(1.0)] * 2), model, num_rounds=1, timeout=0)


# Plans


def test_a_plan_clips_again_and_divides_by_the_expected_cohort(grid_of, adds, model):
    apps = [adds(100.0), *[adds(0.1)] * 11]
    found, result = play(ours(plan=plan_of(), population=12), grid_of(apps), model)
    clipped = 1 / np.sqrt(6)  # an update of six equal values and length 1
    np.testing.assert_allclose(found["w"], (clipped + 11 * 0.1) / 12, rtol=1e-5)
    assert "loss" not in result.train_metrics_clientapp[1]


@pytest.mark.parametrize("gone", [0, 6, 12])
def test_missing_replies_never_lower_the_noise(gone, grid_of, adds, record):
    model = record(w=np.zeros(20_000, np.float32))
    grid = grid_of([adds(0.0)] * 12)
    grid.tamper = lambda replies: replies[gone:]
    strategy = ours(plan=plan_of(noise_multiplier=2.0, max_grad_norm=3.0), population=12)
    found, _ = play(strategy, grid, model)
    expected = 2.0 * 3.0 / 12
    assert abs(found["w"].std() / expected - 1) < 0.03  # 6 standard errors of 20,000 draws
    assert len(strategy.reports[0].missing) == gone


def test_one_of_one_moves_the_mean_no_further_than_one_of_twelve(grid_of, adds, record):
    """Flower divides by who came, so that one client of one moves the mean by C; its noise is made for C/12."""
    model = record(w=np.zeros(1, np.float32))

    def moved(make):
        by_client = []
        for value in (1e-6, 1.0):
            grid = grid_of([adds(value)] * 12)
            grid.tamper = lambda replies: replies[:1]
            by_client.append(play(make(), grid, model)[0]["w"])
        return float(abs(by_client[1] - by_client[0])[0])

    def wrapped():
        return DifferentialPrivacyServerSideFixedClipping(theirs(), 1e-9, 1.0, 12)

    assert moved(lambda: ours(plan=plan_of(), population=12)) == pytest.approx(1 / 12, rel=1e-4)
    assert moved(wrapped) == pytest.approx(1.0, rel=1e-4)


def test_counts_of_examples_do_not_raise_sensitivity_under_a_plan(grid_of, adds, record):
    model = record(w=np.zeros(1, np.float32))
    apps = [adds(-1.0, examples=10**6), *[adds(0.0, examples=1)] * 11]
    found, _ = play(ours(plan=plan_of(), population=12), grid_of(apps), model)
    np.testing.assert_allclose(found["w"], -1 / 12, rtol=1e-4)


def test_poisson_cohorts_are_the_simulations(grid_of, adds, model):
    from privfm.federation.population import Poisson
    from privfm.randomness import Seeds

    strategy = ours(plan=plan_of(sampling="poisson", sample_rate=0.3), population=20, seed=11)
    play(strategy, grid_of([adds(0.1)] * 20), model, rounds=4)
    expected = [Poisson(0.3).draw(20, Seeds(11).generator("cohort", now), now) for now in range(4)]
    assert [report.asked for report in strategy.reports] == expected
    assert len(set(expected)) > 1


def test_an_empty_cohort_releases_noise_all_the_same(grid_of, adds, record):
    model = record(w=np.zeros(5000, np.float32))
    plan = plan_of(noise_multiplier=1.0, sampling="poisson", sample_rate=1e-6)
    strategy = ours(plan=plan, population=10)
    found, _ = play(strategy, grid_of([adds(0.1)] * 10), model)
    assert strategy.reports[0].asked == ()
    assert abs(found["w"].std() * 10 * 1e-6 - 1) < 0.06


def test_epsilon_is_the_plans_and_nothing_else_is_told(grid_of, adds, model):
    plan = plan_of(noise_multiplier=1.0, sampling="poisson", sample_rate=0.5)
    strategy = ours(plan=plan, population=12)
    _, result = play(strategy, grid_of([adds(0.1)] * 12), model, rounds=2)
    for now in (1, 2):
        assert dict(result.train_metrics_clientapp[now]) == {
            "privfm.epsilon.released_model": pytest.approx(plan.epsilon(now)),
            "privfm.delta": 1e-3,
            "privfm.rounds": now,
        }
    (statement,) = strategy.statements()
    assert f"epsilon {plan.epsilon(2):.4g} at delta 0.001 after 2 rounds, unit client" in statement
    assert "against released_model" in statement


def test_a_budget_is_refused_before_the_first_message(grid_of, adds, model):
    plan = plan_of(noise_multiplier=1.0)
    tight = replace(plan, budget=plan.epsilon(2) * 1.001)
    grid = grid_of([adds(0.1)] * 12)
    with pytest.raises(InvalidArgument, match="num_rounds=3"):
        play(ours(plan=tight, population=12), grid, model, rounds=3)
    assert grid.asked == []
    strategy = ours(plan=tight, population=12)
    play(strategy, grid, model, rounds=2)
    with pytest.raises(PrivacyBroken, match="budget"):
        strategy.configure_train(3, model, ConfigRecord(), grid)


def test_participation_is_bounded(grid_of, adds, model):
    from privfm.plugins.flower import clip_mod

    plan = plan_of(max_participations=2)
    strategy = ours(plan=plan, population=12, identify="partitions")
    play(strategy, grid_of([adds(0.1, mods=[clip_mod(1.0)])] * 12), model, rounds=4)
    assert [len(report.asked) for report in strategy.reports] == [12, 12, 0, 0]


def test_a_moving_clip_moves(grid_of, adds, model):
    plan = plan_of(noise_multiplier=0.1, clipping=AdaptiveQuantile(count_deviation=1.0))
    strategy = ours(plan=plan, population=12)
    play(strategy, grid_of([adds(0.001)] * 12), model, rounds=2)
    bound = float(strategy.state_dict()["rule/bound"])
    assert 0.6 < bound < 0.95  # exp(-0.2 * 0.5) a round, all clients far below the bound


# Refusals before anything is sent


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"plan": plan_of()}, "population=None"),
        ({"plan": plan_of(), "population": 12, "fraction_train": 0.5}, "the plan draws clients"),
        ({"plan": plan_of(), "population": 12, "weighting": "examples", "count_cap": 9}, "no plan covers counts"),
        ({"plan": plan_of(max_participations=3), "population": 12}, "identify='partitions'"),
        ({"plan": plan_of(simulated_population=100), "population": 12}, "guarantees nothing"),
        ({"plan": plan_of(weight_cap=10), "population": 12}, "weight_cap=10"),
        ({"plan": plan_of(place="local"), "population": 12}, "takes the noise off"),
        ({"weighting": "examples"}, "count_cap=None"),
        ({"count_cap": 5}, "only weighting='examples'"),
        ({"weighting": "size"}, "weighting='size' is not known"),
        ({"identify": "names"}, "identify='names' is not known"),
        ({"codec": Clip(1.0)}, "client step"),
        ({"rule": Median}, "expected a Rule"),
        ({"seed": -1}, "seed=-1"),
        ({"population": 0}, "population=0"),
    ],
)
def test_what_does_not_fit_is_refused_when_made(kwargs, match):
    with pytest.raises(InvalidArgument, match=match):
        ours(**kwargs)


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"rule": TrimmedMean(f=2)}, "needs n >= 2f"),
        ({"plan": plan_of(), "population": 4}, "cannot hide one of them"),
        ({"plan": plan_of(delta=0.2), "population": 12}, "1/N"),
        ({"rule": Median(), "plan": plan_of(), "population": 12}, "no bounded sensitivity"),
        ({"rule": Krum(f=0), "weighting": "examples", "count_cap": 9}, "counts every update the same"),
        ({"population": 3}, "4 nodes are connected"),
        ({"rule": FLTrust()}, "the server has no examples"),
        ({"exclude": ["missing"]}, "not an entry of the model"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_first_message(kwargs, match, grid_of, adds, model):
    grid = grid_of([adds(1.0)] * 4)
    with pytest.raises(InvalidArgument, match=match):
        play(ours(**kwargs), grid, model)
    assert grid.asked == []


def test_a_model_without_floats_or_with_nan_is_refused(grid_of, adds, record):
    for model, match in ((record(n=np.arange(3)), "float"), (record(w=np.array([np.nan])), "not finite")):
        with pytest.raises(InvalidArgument, match=match):
            play(ours(Mean()), grid_of([adds(1.0)] * 2), model)


def test_replies_without_a_round_are_refused():
    with pytest.raises(InvalidArgument, match="configure_train"):
        ours(Mean()).aggregate_train(1, [])


def test_excluded_entries_stay(grid_of, adds, record):
    model = record(w=np.zeros(2, np.float32), running_var=np.ones(2, np.float32))
    found, _ = play(ours(Mean(), exclude=["running_var"]), grid_of([adds(1.0)] * 2), model)
    np.testing.assert_array_equal(found["running_var"], 1)
    np.testing.assert_array_equal(found["w"], 1)


# Resume


class Resumed:
    """A run in two halves, the second by a new strategy."""

    @staticmethod
    def play(make, grid, model):
        first = make()
        half = first.start(grid, model, num_rounds=2, timeout=0.05).arrays
        second = make()
        second.load_state_dict(first.state_dict())
        return second.start(grid, half, num_rounds=2, timeout=0.05).arrays, second


def test_interrupted_is_uninterrupted(grid_of, app_that, record):
    from privfm.defenses import CenteredClipping
    from privfm.plugins.flower import clip_mod

    model = record(w=np.zeros(50, np.float32))

    def train(state, now, number):
        return {"w": state["w"] * np.float32(0.9) + np.random.default_rng((now, number)).normal(size=50).astype("f4")}

    grid = grid_of([app_that(train, mods=[clip_mod(100.0)]) for _ in range(12)])
    makes = [
        lambda: ours(CenteredClipping(radius=3.0)),
        lambda: ours(FoolsGold(), identify="partitions"),
        lambda: ours(plan=plan_of(noise_multiplier=1.0), population=12),
        lambda: ours(
            plan=plan_of(noise_multiplier=1.0, max_participations=3, sampling="cyclic", sample_rate=0.5),
            population=12,
            identify="partitions",
        ),
    ]
    for make in makes:
        whole = make().start(grid, model, num_rounds=4, timeout=0.05).arrays
        halves, second = Resumed.play(make, grid, model)
        assert halves["w"].numpy().tobytes() == whole["w"].numpy().tobytes()
        assert [report.round for report in second.reports] == [2, 3]


def test_foreign_states_are_refused(grid_of, adds, model):
    from privfm.defenses import CenteredClipping

    strategy = ours(CenteredClipping(radius=1.0))
    play(strategy, grid_of([adds(1.0)] * 2), model)
    for other, match in (
        (ours(Mean()), "remembers"),
        (ours(FoolsGold()), "identify='partitions'"),
    ):
        with pytest.raises(InvalidArgument, match=match):
            other.load_state_dict(strategy.state_dict())
    with pytest.raises(InvalidArgument, match="not a strategy's"):
        ours(Mean()).load_state_dict({})


def test_state_fits_a_file(grid_of, adds, model, tmp_path):
    from safetensors.torch import load_file, save_file

    strategy = ours(plan=plan_of(max_participations=3), population=12, identify="partitions")
    strategy._ledger.begin(6, None, 12)
    save_file(strategy.state_dict(), tmp_path / "state.safetensors")
    ours(plan=plan_of(max_participations=3), population=12, identify="partitions").load_state_dict(
        load_file(tmp_path / "state.safetensors")
    )
