"""NVFlare's own classes (2.9.0) around ours: nothing here stands in for them."""

from __future__ import annotations

import json
import re
import runpy
import sys
from itertools import permutations
from math import sqrt
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nvflare.apis.dxo import DXO, DataKind, MetaKey, from_shareable
from nvflare.apis.dxo_filter import DXOFilter
from nvflare.apis.fl_constant import ReservedKey, ReturnCode
from nvflare.apis.fl_context import FLContext, FLContextManager
from nvflare.apis.shareable import ReservedHeaderKey, Shareable
from nvflare.app_common.abstract.fl_model import FLModel, ParamsType
from nvflare.app_common.aggregators.model_aggregator import ModelAggregator
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType
from nvflare.app_common.decomposers import common_decomposers
from nvflare.app_common.utils.fl_model_utils import FLModelUtils
from nvflare.app_common.workflows.fedavg import FedAvg
from nvflare.fuel.utils import fobs
from nvflare.fuel.utils.component_builder import ComponentBuilder
from nvflare.job_config.fed_job_config import FedJobConfig
from nvflare.private.fed.app.fl_conf import PrivacyConfiger

from privfm.checks import CohortTooSmall, InvalidArgument, RoundFailed
from privfm.contracts import Reveals
from privfm.defenses import (
    AdaptiveQuantile,
    Bucketing,
    CenteredClipping,
    Clip,
    DPPlan,
    FixedPoint,
    FLTrust,
    FoolsGold,
    GeometricMedian,
    Krum,
    Mean,
    Median,
    PerLayer,
    TrimmedMean,
    as_rule,
)
from privfm.plugins.nvflare import PrivacyFilter, RobustAggregator, UpdateDecoder

MODEL = {
    "layer.weight": np.array([[1.0, 2.0], [3.0, 4.0]], dtype=np.float32),
    "layer.bias": np.array([0.5, -0.5], dtype=np.float32),
    "norm.num_batches_tracked": np.array(7),
}
FLOATS = ("layer.weight", "layer.bias")


def contribution(site, by=0.0, kind="DIFF", current_round=0, **entries):
    """A change of `by` in every coordinate, or the model after it; `entries` replace (None: are left out)."""
    base = {name: 0 * MODEL[name] if kind == "DIFF" else MODEL[name] for name in MODEL}
    params = {name: (value + by).astype(value.dtype) if name in FLOATS else value for name, value in base.items()}
    for name, value in entries.items():
        params[name.replace("__", ".")] = value
    params = {name: value for name, value in params.items() if value is not None}
    model = FLModel(params_type=kind, params=params, current_round=current_round)
    model.meta["client_name"] = site  # as NVFlare's server does
    return model


def context(event_data=None, peer="server"):
    """An FLContext as the server makes one."""
    fl_ctx = FLContextManager(identity_name="server", job_id="job").new_context()
    other = FLContext()
    other.set_prop(ReservedKey.IDENTITY_NAME, peer, private=False, sticky=False)
    fl_ctx.set_peer_context(other)
    if event_data is not None:
        fl_ctx.set_prop(AppConstants.TRAIN_SHAREABLE, event_data, private=True, sticky=False)
    return fl_ctx


def begin(component, model=None, current_round=0):
    """What the controllers do before they send a task: the event with the task's data."""
    model = FLModel(params_type="FULL", params=MODEL if model is None else model, current_round=current_round)
    component.handle_event(AppEventType.BEFORE_TRAIN_TASK, context(FLModelUtils.to_shareable(model)))


def play(aggregator, contributions, model=None, current_round=0):
    aggregator.reset_stats()
    begin(aggregator, model, current_round)
    for each in contributions:
        aggregator.accept_model(each)
    return aggregator.aggregate_model()


def updated(result, model=None):
    """The next global model, by NVFlare's own function."""
    current = FLModel(params_type="FULL", params=dict(MODEL if model is None else model))
    return FLModelUtils.update_model(current, result).params


def changes(result):
    return np.concatenate([np.ravel(result.params[name]) for name in FLOATS])


# The aggregator


def test_it_is_what_nvflare_takes():
    assert issubclass(RobustAggregator, ModelAggregator)
    assert issubclass(PrivacyFilter, DXOFilter)
    assert FedAvg(aggregator=RobustAggregator(Median())).aggregator is not None


@pytest.mark.parametrize("kind", ["DIFF", "FULL"])
def test_the_median_of_the_changes_is_added_and_integers_stay(kind):
    counted = {"norm__num_batches_tracked": np.array(99)}
    sent = [contribution(f"site-{k}", k, kind, **counted) for k in (1, 2, 3, 4, 1000)]
    result = play(RobustAggregator(Median()), sent)
    assert result.params_type == ParamsType.DIFF
    assert np.array_equal(changes(result), np.full(6, 3.0))
    after = updated(result)
    assert np.array_equal(after["layer.weight"], MODEL["layer.weight"] + 3)
    assert after["norm.num_batches_tracked"] == 7
    assert after.keys() == MODEL.keys()
    assert after["layer.weight"].dtype == np.float32
    assert "norm.num_batches_tracked" not in result.params


def test_full_weights_are_compared_as_changes_and_never_as_weights():
    # Centred clipping starts at zero: of weights of length 5.5 it would make something shorter than its radius.
    rule, sent = CenteredClipping(radius=0.5, iterations=1), {"DIFF": [], "FULL": []}
    for kind, each in sent.items():
        each += [contribution(f"site-{k}", by, kind) for k, by in enumerate((0.125, 0.25, -8.0))]
    of_changes, of_weights = (changes(play(RobustAggregator(rule), sent[kind])) for kind in ("DIFF", "FULL"))
    assert np.array_equal(of_changes, of_weights)
    # By hand: rows of 6 equal values a, |a| sqrt(6) = .306, .612, 19.6; clipped to .5, the mean of three.
    assert of_changes == pytest.approx(np.full(6, (0.125 + 0.5 / sqrt(6) - 0.5 / sqrt(6)) / 3), rel=1e-5)
    weights = torch.stack(
        [torch.cat([torch.from_numpy(each.params[n]).ravel() for n in FLOATS]) for each in sent["FULL"]]
    )
    assert not np.allclose(rule(weights).numpy() - np.concatenate([MODEL[n].ravel() for n in FLOATS]), of_changes)


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ({"foreign": np.zeros(2, np.float32)}, "adds foreign"),
        ({"layer__bias": None}, "lacks layer.bias"),
        ({"layer__bias": np.zeros(3, np.float32)}, "layer.bias has shape (3,), the model's (2,)"),
        ({"layer__bias": np.zeros((2, 1), np.float32)}, "layer.bias has shape (2, 1), the model's (2,)"),
        ({"layer__bias": np.array([1, 2])}, "layer.bias is torch.int64, expected a float type"),
        ({"layer__bias": np.array([np.nan, 0], np.float32)}, "holds values that are not finite"),
        ({"layer__bias": np.array([np.inf, 0], np.float32)}, "holds values that are not finite"),
        ({"layer__bias": np.array([1e300, 0])}, "holds values that are not finite"),
        ({"layer__bias": [1.0, 2.0]}, "layer.bias is a list, expected an array or a tensor"),
        ({"layer__bias": np.array(["a", "b"])}, "layer.bias is an array of <U1, expected a native number type"),
        ({"layer__bias": np.array([1 + 1j, 0])}, "layer.bias is torch.complex128, expected a float type"),
        ({"layer__bias": torch.zeros(2).to_sparse()}, "layer.bias is no dense tensor"),
    ],
)
@pytest.mark.parametrize("kind", ["DIFF", "FULL"])
def test_a_broken_contribution_is_left_out_and_counted(entries, reason, kind):
    aggregator = RobustAggregator(TrimmedMean(f=1))
    good = [contribution(f"site-{k}", k, kind) for k in (1, 2, 3)]
    result = play(aggregator, [contribution("broken", 500, kind, **entries), *good])
    # One bad of f=1: the trimmed mean of the other three trims nobody.
    assert np.array_equal(changes(result), np.full(6, 2.0))
    assert aggregator.report.left_out.keys() == {"broken"}
    assert aggregator.report.left_out["broken"].startswith(reason)
    assert aggregator.report.outcome.bad == 1
    assert aggregator.report.sites == ("site-1", "site-2", "site-3")


def test_neither_weights_nor_differences():
    aggregator = RobustAggregator(Median())
    metrics = FLModel(metrics={"accuracy": 1.0}, meta={"client_name": "broken"})
    play(aggregator, [metrics, contribution("good", 1)])
    assert aggregator.report.left_out == {"broken": "params_type=None: expected FULL or DIFF"}


def test_a_late_contribution_is_of_another_round_and_its_site_is_not_bad():
    aggregator = RobustAggregator(TrimmedMean(f=0))
    sent = [contribution("late", 9, current_round=2), contribution("good", 1, current_round=3)]
    assert np.array_equal(changes(play(aggregator, sent, None, 3)), np.full(6, 1.0))
    assert aggregator.report.left_out == {"late": "is of round 2, expected 3"}
    assert aggregator.report.outcome.bad == 0
    in_time = contribution("late", 3, current_round=3)
    for order in ([sent[0], in_time, sent[1]], [in_time, sent[0], sent[1]]):
        assert np.array_equal(changes(play(aggregator, order, None, 3)), np.full(6, 2.0))
        assert aggregator.report.sites == ("good", "late")
        assert aggregator.report.left_out == {}


def test_a_straggler_of_scatter_and_gather():
    # Its results of unknown tasks reach the aggregator; the round is in the cookie that the server handed out.
    aggregator, late = RobustAggregator(Mean()), FLModelUtils.to_shareable(contribution("a", 9, current_round=None))
    late.add_cookie(AppConstants.CONTRIBUTION_ROUND, 4)
    assert not aggregator.accept(late, context(peer="site-1"))  # between two rounds
    begin(aggregator, current_round=5)
    for told in (4, [5], "5", np.zeros(2)):  # clients echo the cookie
        late.add_cookie(AppConstants.CONTRIBUTION_ROUND, told)
        assert not aggregator.accept(late, context(peer="site-1"))
    late.add_cookie(AppConstants.CONTRIBUTION_ROUND, 5)
    assert aggregator.accept(late, context(peer="site-1"))


@pytest.mark.parametrize("order", list(permutations(range(4))))
def test_a_second_contribution_voids_the_site_whatever_came_first(order):
    sent = [contribution("twice", 0), contribution("twice", 90), contribution("a", 1), contribution("b", 3)]
    aggregator = RobustAggregator(Mean())
    assert np.array_equal(changes(play(aggregator, [sent[i] for i in order])), np.full(6, 2.0))
    assert aggregator.report.left_out == {"twice": "sent a second contribution: neither counts"}
    assert aggregator.report.outcome.bad == 1


def test_more_bad_ones_than_f_and_too_few_good_ones_raise():
    broken = [contribution(f"bad-{k}", layer__bias=None) for k in range(2)]
    good = [contribution(f"good-{k}", k) for k in range(5)]
    with pytest.raises(CohortTooSmall, match=r"f=1 tolerates 1 bad .*Left out: bad-0: lacks layer\.bias; bad-1"):
        play(RobustAggregator(TrimmedMean(f=1)), broken + good)
    with pytest.raises(CohortTooSmall, match="needs n >= "):
        play(RobustAggregator(Krum(f=2)), good[:4])
    with pytest.raises(CohortTooSmall):
        play(RobustAggregator(Mean()), broken)
    with pytest.raises(CohortTooSmall):
        play(RobustAggregator(Mean()), [])


def test_nobody_says_whose_it_is():
    aggregator = RobustAggregator(Mean())
    begin(aggregator)
    with pytest.raises(InvalidArgument, match="client_name=None: the server must say"):
        aggregator.accept_model(FLModel(params_type="DIFF", params=MODEL))


def test_without_the_model_that_was_sent_nothing_is_aggregated():
    aggregator = RobustAggregator(Mean())
    with pytest.raises(RoundFailed, match="no global model was seen in this round"):
        aggregator.accept_model(contribution("site-1", 1))
    with pytest.raises(RoundFailed, match="no global model was seen in this round"):
        aggregator.aggregate_model()


def test_a_global_model_that_is_not_finite_raises():
    with pytest.raises(InvalidArgument, match=r"not finite in layer\.bias"):
        begin(RobustAggregator(Mean()), MODEL | {"layer.bias": np.array([np.nan, 0], np.float32)})


def test_claimed_counts_and_names_weigh_nothing():
    # FedAvg of NVFlare weighs by the client's own NUM_STEPS_CURRENT_ROUND.
    sent = [contribution("a", 0), contribution("b", 2)]
    sent[0].meta[MetaKey.NUM_STEPS_CURRENT_ROUND] = 1e9
    sent[1].meta[MetaKey.NUM_STEPS_CURRENT_ROUND] = -59
    assert np.array_equal(changes(play(RobustAggregator(Mean()), sent)), np.full(6, 1.0))


def test_what_nvflares_own_mean_does_with_the_same():
    # The contrasts that the page states: a claimed count decides, counters become floats, one type is taken for all.
    sent = [contribution("a", 0), contribution("b", 2, norm__num_batches_tracked=np.array(1))]
    sent[0].meta[MetaKey.NUM_STEPS_CURRENT_ROUND], sent[1].meta[MetaKey.NUM_STEPS_CURRENT_ROUND] = 1e9, 1
    assert np.abs(changes(FedAvg.aggregate_fn(sent))).max() < 1e-8
    del sent[0].meta[MetaKey.NUM_STEPS_CURRENT_ROUND]
    assert FedAvg.aggregate_fn(sent).params["norm.num_batches_tracked"] == 0.5
    mixed = FedAvg.aggregate_fn([contribution("a", 1, "DIFF"), contribution("b", 1, "FULL")])
    assert mixed.params_type == ParamsType.DIFF
    assert not np.allclose(changes(mixed), 1.0)


def test_in_nvflares_controller():
    aggregator = RobustAggregator(Median())
    controller = FedAvg(num_clients=3, aggregator=aggregator)
    begin(aggregator)
    for each in [
        contribution("a", 1),
        contribution("b", 3),
        contribution("c", 999),
        contribution("d", layer__bias=None),
    ]:
        controller._aggregate_one_result(each)
    answer = controller._get_aggregated_result()
    assert np.array_equal(changes(answer), np.full(6, 3.0))
    assert updated(answer)["norm.num_batches_tracked"] == 7


def test_full_and_differences_in_one_round_each_as_it_says():
    sent = [contribution("a", 1, "DIFF"), contribution("b", 3, "FULL")]
    assert np.array_equal(changes(play(RobustAggregator(Mean()), sent)), np.full(6, 2.0))


def test_excluded_entries_stay_and_need_not_be_sent():
    aggregator = RobustAggregator(Mean(), exclude=["layer.bias"])
    result = play(aggregator, [contribution("a", 1), contribution("b", 3, layer__bias=None)])
    assert list(result.params) == ["layer.weight"]
    assert np.array_equal(updated(result)["layer.bias"], MODEL["layer.bias"])
    with pytest.raises(InvalidArgument, match=r"exclude='layer\.bais' is not an entry of the model; did you mean"):
        begin(RobustAggregator(Mean(), exclude=["layer.bais"]))


def test_tensors_come_back_as_tensors_of_their_type():
    model = {"w": torch.ones(3, dtype=torch.bfloat16), "count": torch.tensor(3)}
    sent = [
        FLModel(
            params_type="FULL", params={"w": model["w"] + k, "count": torch.tensor(9)}, meta={"client_name": str(k)}
        )
        for k in (1, 2, 3)
    ]
    result = play(RobustAggregator(Median()), sent, model)
    assert result.params["w"].dtype == torch.bfloat16
    assert torch.equal(updated(result, model)["w"], torch.full((3,), 3.0, dtype=torch.bfloat16))
    assert torch.equal(updated(result, model)["count"], torch.tensor(3))


def test_a_type_that_cannot_hold_the_change_raises():
    model = {"w": np.ones(2, np.float16)}
    sent = [FLModel(params_type="DIFF", params={"w": np.full(2, 1e6)}, meta={"client_name": "a"})]
    with pytest.raises(RoundFailed, match="not finite in w"):
        play(RobustAggregator(Mean()), sent, model)


def test_what_clients_send_is_not_changed():
    sent = [contribution(f"site-{k}", k, "FULL") for k in range(3)]
    before = [{name: value.copy() for name, value in each.params.items()} for each in sent]
    play(RobustAggregator(Median()), sent)
    for each, copy in zip(sent, before, strict=True):
        assert all(np.array_equal(each.params[name], copy[name]) for name in copy)


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(6)), st.integers(0, 5))
def test_order_of_arrival_changes_no_bit_of_a_rule_that_remembers_sites(order, absent):
    generator = np.random.default_rng(1)
    rounds = [
        [contribution(f"site-{k}", generator.normal()) for k in range(6) if r != 1 or k != absent] for r in range(3)
    ]
    first, second = RobustAggregator(FoolsGold()), RobustAggregator(FoolsGold())
    for sent in rounds:
        one = play(first, sent)
        other = play(second, [sent[i] for i in order if i < len(sent)])
        assert np.array_equal(changes(one), changes(other))


def test_memory_outlasts_reset_stats():
    # Centred clipping with radius 1 walks towards the mean (here 10 in every coordinate) from its last aggregate.
    aggregator, fresh = RobustAggregator(CenteredClipping(radius=1.0)), RobustAggregator(CenteredClipping(radius=1.0))
    sent = [contribution(f"site-{k}", 10) for k in range(3)]
    steps = [np.linalg.norm(changes(play(aggregator, sent))) for _ in range(3)]
    assert steps[0] < steps[1] < steps[2]
    assert np.linalg.norm(changes(play(fresh, sent))) == steps[0]


def test_reset_stats_forgets_the_open_round():
    aggregator = RobustAggregator(Mean())
    begin(aggregator)
    aggregator.accept_model(contribution("a", 100))
    assert np.array_equal(changes(play(aggregator, [contribution("a", 1)])), np.full(6, 1.0))


def test_a_round_that_failed_leaves_the_memory_as_it_was():
    aggregator, other = (RobustAggregator(CenteredClipping(radius=1.0)) for _ in range(2))
    sent = [contribution(f"site-{k}", 10) for k in range(3)]
    play(aggregator, sent)
    play(other, sent)
    with pytest.raises(CohortTooSmall):
        play(aggregator, [])
    assert np.array_equal(changes(play(aggregator, sent)), changes(play(other, sent)))


def test_metrics_are_medians_of_what_most_report():
    sent = [contribution(f"site-{k}", k) for k in range(5)]
    for k, each in enumerate(sent):
        each.metrics = {"accuracy": (0.5, 0.6, 0.7, 1e9, np.float32(0.8))[k], "text": "a", "nan": float("nan")}
    sent[3].metrics |= {"alone": 1.0, "huge": 10**400}
    result = play(RobustAggregator(Median()), sent)
    assert result.metrics == {"accuracy": pytest.approx(0.7)}


def test_through_shareables_the_server_says_whose_it_is():
    aggregator = RobustAggregator(Mean())
    begin(aggregator)
    claimed = FLModelUtils.to_shareable(contribution("somebody else", 1))
    claimed.set_header(MetaKey.SITE_NAME, "somebody else")
    assert aggregator.accept(claimed, context(peer="site-1"))
    statistics = DXO(DataKind.STATISTICS, data=dict(MODEL)).to_shareable()  # NVFlare would take it for FULL weights
    assert FLModelUtils.from_shareable(statistics).params_type == ParamsType.FULL
    assert not aggregator.accept(statistics, context(peer="site-2"))
    assert not aggregator.accept(Shareable(), context(peer="site-3"))
    result = FLModelUtils.from_shareable(aggregator.aggregate(context()))
    assert np.array_equal(changes(result), np.full(6, 1.0))
    assert aggregator.report.sites == ("site-1",)
    assert aggregator.report.left_out.keys() == {"site-2", "site-3"}


# The aggregator with a plan


def central(**changed):
    return DPPlan(**{"noise_multiplier": 0.0, "max_grad_norm": 1.0, "sample_rate": 1.0, "delta": 1e-3} | changed)


def test_a_plan_clips_again_and_divides_by_the_population():
    aggregator = RobustAggregator(plan=central(), population=20)
    short = np.zeros((2, 2), np.float32)
    short[0, 0] = 0.5
    sent = [
        contribution("huge", 1e6),
        contribution("short", layer__weight=short, layer__bias=np.zeros(2, np.float32)),
        contribution("broken", np.nan),
    ]
    expected = np.full(6, 1 / sqrt(6))
    expected[0] += 0.5
    assert changes(play(aggregator, sent)) == pytest.approx(expected / 20, rel=1e-5)
    assert aggregator.report.left_out == {"broken": "holds values that are not finite"}


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.floats(-1e3, 1e3, width=32), min_size=0, max_size=6),
    st.sampled_from([1.0, -1e30, float("nan"), float("inf"), None]),
    st.sampled_from([None, PerLayer()]),
)
def test_one_site_moves_the_noiseless_release_by_at_most_its_clip(others, one, clipping):
    sent = [contribution(f"site-{k}", by) for k, by in enumerate(others)]
    odd = contribution("odd", 0 if one is None else one, **({"foreign": np.zeros(1)} if one is None else {}))
    plan = central(max_grad_norm=0.25, clipping=clipping)
    with_it = changes(play(RobustAggregator(plan=plan, population=12), [*sent, odd]))
    without = changes(play(RobustAggregator(plan=plan, population=12), sent))
    assert np.linalg.norm(12.0 * (with_it - without)) <= 0.25 * (1 + 1e-5)


def test_the_noise_has_the_plans_deviation_also_in_an_empty_round():
    d, plan = 40_000, central(noise_multiplier=2.0, max_grad_norm=0.5)
    model = {"w": np.zeros(d, np.float32)}
    for seed, sent in enumerate([[], [FLModel(params_type="DIFF", params=model, meta={"client_name": "a"})]]):
        noise = play(RobustAggregator(plan=plan, population=10, seed=seed), sent, model).params["w"]
        found = float(np.std(noise)) / (2.0 * 0.5 / 10)
        assert found == pytest.approx(1.0, abs=5 / sqrt(2 * d))  # five standard errors; half and double fail
        assert not 0.45 < found < 0.55
        assert not 1.9 < found < 2.1


def test_noise_differs_between_rounds_and_secure_noise_between_runs():
    seeded = RobustAggregator(plan=central(noise_multiplier=1.0), population=10)
    assert not np.array_equal(changes(play(seeded, [])), changes(play(seeded, [])))
    runs = [RobustAggregator(plan=central(noise_multiplier=1.0, source="secure"), population=10) for _ in range(2)]
    assert not np.array_equal(*(changes(play(run, [])) for run in runs))


def test_epsilon_is_the_plans_and_the_budget_ends_the_job():
    plan = central(noise_multiplier=5.0)
    plan = central(noise_multiplier=5.0, budget=plan.epsilon(2))
    aggregator = RobustAggregator(plan=plan, population=10)
    sent = [contribution("a", 1)]
    play(aggregator, sent)
    play(aggregator, sent)
    assert aggregator.record() == plan.record(2)
    with pytest.raises(RoundFailed, match="is spent: epsilon is "):
        play(aggregator, sent)
    assert aggregator.record() == plan.record(2)


def test_a_plan_gives_away_no_metrics_and_counts_sites():
    aggregator = RobustAggregator(plan=central(), population=10)
    one = contribution("a", 1)
    one.metrics = {"accuracy": 0.5}
    assert play(aggregator, [one]).metrics is None
    with pytest.raises(RoundFailed, match="population=10: 11 sites answered"):
        play(aggregator, [contribution(f"site-{k}", 1) for k in range(11)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "a plan takes the rule's place; give one"),
        ({"rule": Mean(), "plan": central(), "population": 10}, "a plan takes the rule's place; give one"),
        ({"rule": Mean(), "population": 10}, "give both or none"),
        ({"plan": central()}, "give both or none"),
        ({"rule": "Median"}, "rule='Median': expected a rule of privfm.defenses"),
        ({"rule": FLTrust()}, "FLTrust needs an update of the server's own"),
        ({"rule": Mean(), "exclude": "layer.bias"}, "exclude='layer.bias': expected names"),
        ({"plan": central(sample_rate=0.5), "population": 20}, "sample_rate=0.5: NVFlare draws sites itself"),
        (
            {"plan": central(place="local", sampling="full"), "population": 10},
            "place='local': here the server adds noise",
        ),
        ({"plan": central(max_participations=3), "population": 10}, "max_participations=3: NVFlare's controller"),
        ({"plan": central(simulated_population=99), "population": 10}, "guarantees nothing"),
        ({"plan": central(weight_cap=3), "population": 10}, "weight_cap=3: every client counts the same"),
        ({"plan": central(clipping=AdaptiveQuantile()), "population": 10}, "clipping=AdaptiveQuantile"),
        ({"plan": central(), "population": 3}, "population=3: fewer than 10 clients cannot hide one of them"),
        ({"plan": central(delta=0.2), "population": 10}, "delta=0.2 >= 1/N"),
        ({"plan": central(), "population": 0}, "population=0: expected a whole number >= 1"),
    ],
)
def test_what_would_make_the_aggregator_a_lie_is_refused(arguments, message):
    with pytest.raises(InvalidArgument) as error:
        RobustAggregator(**arguments)
    assert message in str(error.value)


# Job files


class Builder(ComponentBuilder):
    """NVFlare's, which needs a scanner only for classes that are named without their module."""

    def get_module_scanner(self):
        raise AssertionError("every class of ours has its full path")


def through_a_job_file(component, folder):
    """As recipes and jobs do it: arguments read back from attributes, JSON, objects built from the inside out."""
    job = FedJobConfig("job", min_clients=1)
    job.set_app_packages(["privfm"])
    config = {"path": job._get_class_path(component, str(folder)), "args": job._get_args(component, str(folder))}
    return Builder().build_component(json.loads(json.dumps(config)))


@pytest.mark.parametrize(
    "rule",
    [
        Mean(),
        TrimmedMean(f=2),
        Krum(f=1),
        GeometricMedian(iterations=7),
        CenteredClipping(radius=0.5),
        Bucketing(rule=TrimmedMean(f=1), s=2),
        FoolsGold(),
    ],
    ids=lambda rule: rule.title,
)
def test_an_aggregator_survives_the_job_file(rule, tmp_path):
    given = RobustAggregator(rule, exclude=["layer.bias"], seed=3)
    built = through_a_job_file(given, tmp_path)
    assert type(built) is RobustAggregator
    assert (built.rule, built.exclude, built.seed, built.plan) == (rule, ["layer.bias"], 3, None)
    assert list(tmp_path.iterdir()) == []  # no copy of our sources, which would be imported in our place


def test_plans_and_codecs_survive_the_job_file(tmp_path):
    plan = central(noise_multiplier=1.5, clipping=PerLayer("size"), source="secure", budget=9.0)
    built = through_a_job_file(RobustAggregator(plan=plan, population=17), tmp_path)
    assert (built.plan, built.population, built.rule) == (plan, 17, None)
    own = local(max_participations=4)
    built = through_a_job_file(PrivacyFilter(plan=own, codec=FixedPoint(64.0, 12), exclude=["n"]), tmp_path)
    assert (built.plan, built.codec, built.exclude, built.max_grad_norm) == (own, FixedPoint(64.0, 12), ["n"], None)
    assert through_a_job_file(PrivacyFilter(2.5), tmp_path).max_grad_norm == 2.5
    assert through_a_job_file(UpdateDecoder(FixedPoint(64.0, 12)), tmp_path).codec == FixedPoint(64.0, 12)


def test_a_rule_that_no_job_file_can_hold_fails_when_the_job_is_written(tmp_path):
    foreign = RobustAggregator(as_rule(lambda updates: updates[0], Reveals.EACH))
    with pytest.raises(TypeError):
        through_a_job_file(foreign, tmp_path)


def test_the_job_of_the_page_is_written_as_the_page_says(tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "plugins_nvflare.md").read_text()
    files = dict(re.findall(r"`(\w+\.py)`[^\n]*:\n\n```python\n(.*?)```", page, re.DOTALL))
    assert files.keys() == {"model.py", "client.py", "job.py"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        runpy.run_path("job.py")["recipe"].export("exported")
    finally:
        sys.modules.pop("model", None)
    app = tmp_path / "exported" / "robust" / "app"
    assert {path.name for path in (app / "custom").iterdir()} == {"model.py", "client.py"}
    server = json.loads((app / "config" / "config_fed_server.json").read_text())
    client = json.loads((app / "config" / "config_fed_client.json").read_text())
    aggregator = Builder().build_component(server["workflows"][0]["args"]["aggregator"])
    assert (type(aggregator), aggregator.rule) == (RobustAggregator, Median())
    (given,), (taken,) = client["task_result_filters"], server["task_result_filters"]
    assert given["tasks"] == taken["tasks"] == ["train"]
    kept, decoder = (Builder().build_component(each["filters"][0]) for each in (given, taken))
    assert (kept.max_grad_norm, kept.exclude) == (1.0, aggregator.exclude)
    assert kept.codec == decoder.codec == FixedPoint(1.0, 14)


def test_a_site_can_insist_on_the_filter_as_the_page_says(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "plugins_nvflare.md").read_text()
    (tmp_path / "privacy.json").write_text(re.search(r"```json\n(.*?)```", page, re.DOTALL)[1])
    workspace = SimpleNamespace(get_site_privacy_file_path=lambda: str(tmp_path / "privacy.json"))
    read = PrivacyConfiger(workspace, names_only=False)
    read.configure()
    (kept,) = read.scopes[0].task_result_filters["out"]
    assert type(kept) is PrivacyFilter
    assert kept.plan.source == "secure"
    assert kept.plan.epsilon(2) < kept.plan.budget < kept.plan.epsilon(50)


# The filter


def local(**changed):
    base = {"noise_multiplier": 3.0, "max_grad_norm": 0.5, "sample_rate": 1.0, "delta": 1e-5, "place": "local"}
    return DPPlan(**base | {"sampling": "full", "source": "secure"} | changed)


def differences(by=1.0, **entries):
    return {name: np.full_like(MODEL[name], by) for name in FLOATS} | entries


def result(data=None, kind=DataKind.WEIGHT_DIFF, **meta):
    return DXO(kind, differences() if data is None else data, dict(meta)).to_shareable()


def left(shareable):
    """Everything in a message, as the bytes on the wire."""
    common_decomposers.register()  # as NVFlare's processes do when they start
    return fobs.dumps(shareable)


class Fill(DXOFilter):
    """A filter as others write it: the base class decides what it gets to see."""

    def __init__(self):
        super().__init__([DataKind.WEIGHT_DIFF], [DataKind.WEIGHT_DIFF])

    def process_dxo(self, dxo, shareable, fl_ctx):
        dxo.data = {name: np.zeros_like(value) for name, value in dxo.data.items()}
        return dxo


SECRET = 123456.789
SECRETS = {"w": np.full(4, SECRET)}


def no_dxo():
    shareable = Shareable()
    shareable["weights"] = SECRETS
    return shareable


def failed():
    shareable = result(SECRETS)
    shareable.set_return_code(ReturnCode.EXECUTION_EXCEPTION)
    return shareable


def empty_but_for_its_properties():
    return DXO(DataKind.WEIGHT_DIFF, {}, {"initial_metrics": SECRETS}).to_shareable()


OPEN = {  # what NVFlare's base class lets pass as it is
    "no DXO": no_dxo,
    "failed": failed,
    "weights": lambda: result(SECRETS, DataKind.WEIGHTS),
    "metrics": lambda: result({"loss": SECRET, **SECRETS}, DataKind.METRICS),
    "app defined": lambda: result(SECRETS, DataKind.APP_DEFINED),
    "empty, with properties": empty_but_for_its_properties,
    "a collection of other kinds": lambda: result({"inner": DXO(DataKind.WEIGHTS, SECRETS)}, DataKind.COLLECTION),
}


@pytest.mark.parametrize("name", OPEN)
def test_the_base_class_lets_pass_what_ours_withholds(name):
    secret = np.full(1, SECRET).tobytes()
    assert secret in left(Fill().process(OPEN[name](), context()))
    ours = PrivacyFilter(1.0).process(OPEN[name](), context())
    assert ours.get_return_code() == (
        ReturnCode.EXECUTION_EXCEPTION if name == "failed" else ReturnCode.TASK_RESULT_FILTER_ERROR
    )
    assert ours.keys() == {ReservedHeaderKey.HEADERS}
    assert ours[ReservedHeaderKey.HEADERS].keys() == {ReservedHeaderKey.RC}
    assert secret not in left(ours)


@pytest.mark.parametrize(
    "data",
    [
        differences(np.nan),
        differences(layer=np.array([np.inf], np.float32)),
        differences(huge=np.array([1e300])),
        differences(counter=np.array(3)),
        differences(text="patient 7"),
        differences(nested={"w": np.zeros(2)}),
        differences(packed=b"ciphertext"),
        differences(listed=[1.0, 2.0]),
        differences(complex=np.zeros(2, np.complex64)),
        {3: np.zeros(2, np.float32)},
    ],
    ids=["nan", "inf", "beyond float32", "integers", "text", "nested", "bytes", "list", "complex", "no name"],
)
@pytest.mark.parametrize("plan", [None, local()], ids=["clip", "plan"])
def test_an_update_that_cannot_be_clipped_stays(data, plan):
    kept = PrivacyFilter(1.0) if plan is None else PrivacyFilter(plan=plan)
    reply = kept.process(result(data), context())
    assert reply.get_return_code() == ReturnCode.TASK_RESULT_FILTER_ERROR
    assert reply.keys() == {ReservedHeaderKey.HEADERS}
    assert kept.released == 0


@pytest.mark.parametrize("thing", [None, {}, [1], "text", DXO(DataKind.WEIGHT_DIFF, SECRETS)])
def test_what_is_no_shareable_stays(thing):
    assert PrivacyFilter(1.0).process(thing, context()).get_return_code() == ReturnCode.TASK_RESULT_FILTER_ERROR


def test_entries_beside_the_dxo_stay_and_return_codes_are_not_free_text():
    beside = result()
    beside["note"] = "patient 7"
    assert PrivacyFilter(1.0).process(beside, context()).keys() == {ReservedHeaderKey.HEADERS}
    told = result()
    told.set_return_code("patient 7")
    assert PrivacyFilter(1.0).process(told, context()).get_return_code() == ReturnCode.EXECUTION_RESULT_ERROR


def test_an_earlier_filters_work_cannot_be_clipped():
    packed = result(PROCESSED_ALGORITHM="HE")
    assert PrivacyFilter(1.0).process(packed, context()).get_return_code() == ReturnCode.TASK_RESULT_FILTER_ERROR


def test_the_whole_update_is_clipped_and_nothing_else_travels():
    given = result(differences(3.0), initial_metrics={"accuracy": 0.9}, NUM_STEPS_CURRENT_ROUND=77)
    given.set_header(AppConstants.CURRENT_ROUND, 4)
    given.set_header("note", "patient 7")
    reply = PrivacyFilter(0.5).process(given, context())
    assert reply.get_return_code() == ReturnCode.OK
    dxo = from_shareable(reply)
    values = np.concatenate([np.ravel(dxo.data[name]) for name in FLOATS])
    assert values == pytest.approx(np.full(6, 0.5 / sqrt(6)), rel=1e-5)
    assert np.linalg.norm(values.astype(np.float64)) <= 0.5
    assert dxo.data["layer.weight"].dtype == np.float32
    assert dxo.meta == {MetaKey.FILTER_HISTORY: ["PrivacyFilter"]}
    assert reply[ReservedHeaderKey.HEADERS].keys() == {AppConstants.CURRENT_ROUND, ReservedHeaderKey.CONTENT_TYPE}
    assert reply.get_header(AppConstants.CURRENT_ROUND) == 4
    assert np.array_equal(from_shareable(given).data["layer.bias"], np.full(2, 3.0))  # the site's own stays whole


def test_a_short_update_keeps_its_bits_and_excluded_entries_stay():
    data = differences(0.01, counter=np.array(3))
    dxo = from_shareable(PrivacyFilter(0.5, exclude=["counter"]).process(result(data), context()))
    assert dxo.data.keys() == set(FLOATS)
    assert all(np.array_equal(dxo.data[name], data[name]) for name in FLOATS)
    missing = PrivacyFilter(0.5, exclude=["countre"]).process(result(data), context())
    assert missing.get_return_code() == ReturnCode.TASK_RESULT_FILTER_ERROR


def test_local_noise_has_the_plans_deviation_around_the_clipped_update():
    d = 20_000
    kept = PrivacyFilter(plan=local(max_grad_norm=2.0))
    values = from_shareable(kept.process(result({"w": np.full(d, 1e4, np.float32)}), context())).data["w"]
    noise = (values - 2.0 / sqrt(d)) / (3.0 * 2.0)
    assert float(np.std(noise)) == pytest.approx(1.0, abs=5 / sqrt(2 * d))  # five standard errors; 0.5 and 2 fail
    assert abs(float(np.mean(noise))) < 5 / sqrt(d)
    assert abs(float(np.std(2 * noise)) - 1) > 5 / sqrt(2 * d)
    again = from_shareable(kept.process(result({"w": np.full(d, 1e4, np.float32)}), context())).data["w"]
    assert not np.array_equal(values, again)


def test_participations_and_budget_bound_what_leaves():
    plan = local(max_participations=2, noise_multiplier=30.0)
    kept = PrivacyFilter(plan=plan)
    codes = [kept.process(result(), context()).get_return_code() for _ in range(3)]
    assert codes == [ReturnCode.OK, ReturnCode.OK, ReturnCode.TASK_RESULT_FILTER_ERROR]
    assert kept.record() == plan.record(2)
    assert kept.record().adversary == "server"
    frugal = PrivacyFilter(plan=local(noise_multiplier=30.0, budget=local(noise_multiplier=30.0).epsilon(1)))
    codes = [frugal.process(result(), context()).get_return_code() for _ in range(2)]
    assert codes == [ReturnCode.OK, ReturnCode.TASK_RESULT_FILTER_ERROR]
    assert frugal.released == 1


def test_a_packed_update_is_unpacked_by_the_server_and_aggregated():
    codec = FixedPoint(bound=1.0, bits=7)
    sent, decoder = PrivacyFilter(1.0, codec=codec), UpdateDecoder(codec)
    begin(decoder)
    wire = sent.process(result(differences(0.3)), context())
    wire.set_header(AppConstants.CURRENT_ROUND, 0)
    assert from_shareable(wire).data["row"].dtype == np.int16  # 2^7 = 128 does not fit int8
    assert from_shareable(wire).data["row"].nbytes == 12  # 24 as float32
    opened = decoder.process(fobs.loads(left(wire)), context())
    dxo = from_shareable(opened)
    for name in FLOATS:
        assert np.abs(dxo.data[name] - 0.3).max() <= codec.step
        assert dxo.data[name].shape == MODEL[name].shape
    aggregator = RobustAggregator(Mean())
    begin(aggregator)
    assert aggregator.accept(opened, context(peer="site-1"))
    assert not aggregator.accept(wire, context(peer="site-2"))  # without a decoder nothing is taken for weights


def test_a_coordinate_beyond_the_codecs_bound_stays():
    packed = PrivacyFilter(10.0, codec=FixedPoint(bound=0.1, bits=7)).process(result(differences(0.3)), context())
    assert packed.get_return_code() == ReturnCode.TASK_RESULT_FILTER_ERROR


@pytest.mark.parametrize(
    "data",
    [
        {"row": np.zeros(5, np.int16)},
        {"row": np.zeros((6, 1), np.int16)},
        {"rows": np.zeros(6, np.int16)},
        {"row": np.zeros(6, np.int16), "more": np.zeros(6)},
        {"row": [0] * 6},
        {"row": np.full(6, np.nan)},
        {"row": np.array(["x"] * 6)},
    ],
    ids=["short", "shape", "name", "more", "list", "nan", "text"],
)
def test_the_decoder_believes_nothing(data):
    decoder = UpdateDecoder(FixedPoint(bound=1.0, bits=7))
    begin(decoder)
    reply = decoder.process(result(data, PROCESSED_ALGORITHM="privfm"), context())
    assert reply.get_return_code() == ReturnCode.TASK_RESULT_FILTER_ERROR
    assert reply.keys() == {ReservedHeaderKey.HEADERS}


def test_the_decoder_takes_nothing_that_was_not_packed_or_came_before_the_model():
    decoder = UpdateDecoder(FixedPoint(bound=1.0, bits=7))
    packed = result({"row": np.zeros(6, np.int16)}, PROCESSED_ALGORITHM="privfm")
    assert decoder.process(packed, context()).get_return_code() == ReturnCode.TASK_RESULT_FILTER_ERROR
    begin(decoder)
    assert decoder.process(packed, context()).get_return_code() == ReturnCode.OK
    assert decoder.process(result(), context()).get_return_code() == ReturnCode.TASK_RESULT_FILTER_ERROR


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "a plan has its own bound; give one of them"),
        ({"max_grad_norm": 1.0, "plan": local()}, "a plan has its own bound; give one of them"),
        ({"max_grad_norm": 0.0}, "max_grad_norm=0.0: expected a finite number > 0"),
        ({"plan": local(source="seeded")}, "who knows the seed takes the noise off"),
        ({"plan": central()}, "place='central': here a client adds its own noise to its whole update"),
        ({"plan": local(noise_multiplier=0.0)}, "noise_multiplier=0: a plan without noise"),
        ({"max_grad_norm": 1.0, "codec": Clip(1.0)}, "codec=Clip is a client step"),
        ({"max_grad_norm": 1.0, "exclude": "counter"}, "exclude='counter': expected names"),
    ],
)
def test_what_would_make_the_filter_a_lie_is_refused(arguments, message):
    with pytest.raises(InvalidArgument) as error:
        PrivacyFilter(**arguments)
    assert message in str(error.value)
