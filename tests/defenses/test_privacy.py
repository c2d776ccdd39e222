"""The privacy plan: epsilon against published numbers, noise against its scale, sensitivity against every drop-out.

A PLD evaluation takes 0.3 to 1 s: there are few, and the plan remembers them.
"""

from dataclasses import fields, replace
from itertools import pairwise
from math import inf, sqrt

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Generator, Tensor

from privfm.checks import InvalidArgument
from privfm.contracts import MatrixView, Reveals, Rule
from privfm.defenses import DPPlan, EpsilonRecord, Mean
from privfm.defenses.views import EmptyView, SumView

FULL = DPPlan(noise_multiplier=1.0, max_grad_norm=1.0, sample_rate=1.0, delta=1e-5)
TENTH = DPPlan(noise_multiplier=1.362, max_grad_norm=1.0, sample_rate=0.1, delta=1e-5)


# Epsilon


@pytest.mark.parametrize(
    ("noise_multiplier", "rounds", "delta", "epsilon"),
    [
        (1.0, 1, 1e-5, 4.377178),  # dp-accounting 0.6.0, gaussian_mechanism.get_epsilon_gaussian
        (10.0, 100, 1e-5, 4.377178),  # T rounds of noise z are one round of noise z / sqrt(T)
        (0.5, 1, 1e-5, 9.997256),
        (1.0, 10, 1e-3, 14.07935),
        (1.0, 10, 1e-5, 17.85659),
    ],
)
def test_epsilon_without_sampling_is_exact(noise_multiplier, rounds, delta, epsilon):
    plan = DPPlan(noise_multiplier, max_grad_norm=3.0, sample_rate=1.0, delta=delta)
    assert plan.epsilon(rounds) == pytest.approx(epsilon, rel=1e-6)


@pytest.mark.parametrize(
    ("noise_multiplier", "rounds", "delta", "epsilon"),
    [
        (1.0, 100, 1e-3, 4.7844),  # PLD, dp-accounting 0.6.0; Opacus' PRV accountant says 4.795
        (2.102, 20, 1e-5, 1.00),
        (1.362, 20, 1e-5, 2.00),
        (0.948, 20, 1e-5, 4.00),
        (0.681, 20, 1e-5, 8.00),
        (2.102 / 2, 20, 1e-5, 3.25),  # halved noise: not twice, but more than three times the epsilon
    ],
)
def test_epsilon_with_poisson_sampling_of_a_tenth(noise_multiplier, rounds, delta, epsilon):
    plan = DPPlan(noise_multiplier, max_grad_norm=1.0, sample_rate=0.1, delta=delta)
    assert plan.epsilon(rounds) == pytest.approx(epsilon, abs=0.01)


def test_epsilon_is_not_above_that_of_an_independent_accountant():
    from dp_accounting.rdp import RdpAccountant

    assert TENTH.epsilon(20) <= float(RdpAccountant().compose(TENTH.event(20)).get_epsilon(1e-5))


@given(st.floats(0.3, 20), st.integers(1, 500), st.sampled_from([1e-7, 1e-5, 1e-3]))
def test_epsilon_falls_with_noise_and_grows_with_rounds_and_certainty(noise_multiplier, rounds, delta):
    plan = DPPlan(noise_multiplier, max_grad_norm=1.0, sample_rate=1.0, delta=delta)
    epsilon = plan.epsilon(rounds)
    assert 0 <= epsilon < inf
    assert replace(plan, noise_multiplier=1.1 * noise_multiplier).epsilon(rounds) < epsilon
    assert plan.epsilon(rounds + 1) > epsilon
    assert replace(plan, delta=delta / 10).epsilon(rounds) > epsilon


def test_epsilon_grows_with_the_sampling_rate():
    rates = [0.02, 0.1, 1.0]
    epsilons = [replace(TENTH, sample_rate=rate).epsilon(20) for rate in rates]
    assert all(low < high for low, high in pairwise(epsilons))


def test_epsilon_does_not_depend_on_the_clip():
    assert replace(FULL, max_grad_norm=100.0).epsilon(7) == FULL.epsilon(7)


@pytest.mark.parametrize("sample_rate", [0.1, 1.0])
def test_without_noise_epsilon_is_infinite_and_before_the_first_round_zero(sample_rate):
    noiseless = DPPlan(0.0, 1.0, sample_rate, 1e-5)
    assert (noiseless.epsilon(1), noiseless.epsilon(0)) == (inf, 0.0)
    assert noiseless.record(1).accountant == "no noise"
    assert noiseless.record(0).accountant == "nothing released"


def test_useless_amounts_of_noise_are_accounted_loosely_and_say_so():
    """PLD would take minutes there; the bound stays a bound."""
    record = replace(TENTH, noise_multiplier=0.05).record(20)
    assert record.epsilon > 100
    assert not record.accountant.startswith("PLD")


@pytest.mark.parametrize("rounds", [-1, 1.0, True])
def test_wrong_rounds_are_refused(rounds):
    with pytest.raises(InvalidArgument, match="after="):
        FULL.epsilon(rounds)


# Calibration


def test_calibration_with_sampling_comes_back_from_below():
    plan = DPPlan.calibrated(epsilon=2.0, delta=1e-5, rounds=20, sample_rate=0.1, max_grad_norm=0.5)
    assert 0.99 * 2.0 <= plan.epsilon(20) <= 2.0
    assert plan.noise_multiplier == pytest.approx(1.362, abs=2e-3)  # the oracle above, the other way round
    assert (plan.max_grad_norm, plan.sample_rate, plan.delta) == (0.5, 0.1, 1e-5)


@pytest.mark.parametrize("epsilon", [0.01, 0.5, 3.0, 8.0, 20.0])
@pytest.mark.parametrize("rounds", [1, 3, 1000])
def test_calibration_without_sampling_comes_back_from_below(epsilon, rounds):
    plan = DPPlan.calibrated(epsilon, delta=1e-5, rounds=rounds, sample_rate=1.0, max_grad_norm=1.0)
    assert 0.99 * epsilon <= plan.epsilon(rounds) <= epsilon


@pytest.mark.parametrize(
    "wrong",
    [
        {"epsilon": 0.0}, {"epsilon": -1.0}, {"epsilon": inf}, {"epsilon": float("nan")}, {"epsilon": 21.0},
        {"delta": 0.0}, {"delta": 1.0}, {"delta": float("nan")},
        {"rounds": 0}, {"rounds": 2.5},
        {"sample_rate": 0.0}, {"sample_rate": 1.5},
        {"max_grad_norm": 0.0}, {"max_grad_norm": inf},
    ],
    ids=str,
)  # fmt: skip
def test_a_calibration_out_of_range_is_refused_by_name(wrong):
    arguments = {"epsilon": 1.0, "delta": 1e-5, "rounds": 10, "sample_rate": 0.1, "max_grad_norm": 1.0}
    with pytest.raises(InvalidArgument, match=f"{next(iter(wrong))}="):
        DPPlan.calibrated(**{**arguments, **wrong})


@pytest.mark.parametrize(
    "wrong",
    [
        {"noise_multiplier": -0.1}, {"noise_multiplier": float("nan")}, {"noise_multiplier": inf},
        {"max_grad_norm": 0.0}, {"max_grad_norm": -1.0}, {"max_grad_norm": inf},
        {"sample_rate": 0.0}, {"sample_rate": 1.01}, {"sample_rate": float("nan")},
        {"delta": 0.0}, {"delta": 1.0}, {"delta": -1e-5},
    ],
    ids=str,
)  # fmt: skip
def test_a_plan_out_of_range_is_refused_by_name(wrong):
    with pytest.raises(InvalidArgument, match=f"{next(iter(wrong))}="):
        replace(FULL, **wrong)


# The record


@pytest.mark.parametrize("plan", [FULL, TENTH], ids=["exact", "PLD"])
def test_a_record_is_complete(plan):
    record = plan.record(20)
    assert record.epsilon == plan.epsilon(20)
    assert (record.delta, record.rounds) == (plan.delta, 20)
    said = (record.unit, record.place, record.adversary, record.relation)
    assert said == ("client", "central", "released_model", "zero-out, public N")
    assert record.participation_bound == (None if plan.sample_rate < 1 else 20)  # None: amplification instead
    words = [getattr(record, item.name) for item in fields(EpsilonRecord) if item.type == "str"]
    assert len(words) == 5
    assert all(words)


@pytest.mark.parametrize(("plan", "rounds"), [(FULL, 3), (TENTH, 20)], ids=["exact", "PLD"])
def test_anybody_can_account_again_from_the_records_event(plan, rounds):
    from dp_accounting import NeighboringRelation, dp_event
    from dp_accounting.pld import PLDAccountant

    record = plan.record(rounds)
    event = eval(record.event, dict(vars(dp_event)))
    assert event == plan.event(rounds)
    accountant = PLDAccountant(neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE)
    assert float(accountant.compose(event).get_epsilon(record.delta)) == pytest.approx(record.epsilon, rel=2e-3)


# The release

WIDE = 20_000


def released(rule: Rule, rows: Tensor, seed: int = 0) -> Tensor:
    return rule.aggregate(rule.init(rows.shape[1]), MatrixView(rows), Generator().manual_seed(seed))[1].vector


def noise_of(rule: Rule, seed: int = 0) -> Tensor:
    """Its noise on the sum, over nobody's update: an empty Poisson cohort."""
    return 20 * rule.aggregate({}, EmptyView(WIDE), Generator().manual_seed(seed))[1].vector


def fits(noise: Tensor, deviation: float) -> bool:
    """Chi-square on the scale and Kolmogorov-Smirnov on the form, each at 0.1 %, two-sided."""
    from scipy.stats import chi2, kstest

    values = (noise.double() / deviation).numpy()
    tail = float(chi2.cdf((values**2).sum(), len(values)))
    return 5e-4 < tail < 1 - 5e-4 and float(kstest(values, "norm").pvalue) > 1e-3


@pytest.mark.parametrize("seed", range(3))
def test_the_noise_has_the_scale_of_the_plan_and_no_other(seed):
    """Noise multiplier 1.5 on a sensitivity of 2 is a standard deviation of 3 on the sum."""
    plan = DPPlan(noise_multiplier=1.5, max_grad_norm=2.0, sample_rate=0.02, delta=1e-5)
    noise = noise_of(plan.release(sensitivity=2.0, population=1000), seed)
    assert fits(noise, 3.0)
    assert not any(fits(noise, 3.0 * wrong) for wrong in (0.5, 0.9, 1.1, 2.0))


def test_noise_follows_the_sensitivity_and_not_the_clip():
    """A codec may lengthen a clipped row: the noise follows what may arrive."""
    plan = DPPlan(noise_multiplier=1.5, max_grad_norm=2.0, sample_rate=0.02, delta=1e-5)
    assert fits(noise_of(plan.release(sensitivity=4.0, population=1000)), 6.0)


def test_noise_is_fresh_for_every_generator(untouched_random_state):
    rule = FULL.release(1.0, 20)
    first, again, other = (noise_of(rule, seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert abs(float((first * other).mean())) < 5 / sqrt(WIDE)
    assert abs(float((first[1:] * first[:-1]).mean())) < 5 / sqrt(WIDE)  # nor does it repeat across coordinates


def test_noise_is_added_to_the_sum_whoever_came():
    rule = FULL.release(1.0, 20)
    rows = torch.randn(7, WIDE, generator=Generator().manual_seed(3))
    torch.testing.assert_close(20 * released(rule, rows) - rows.sum(0), noise_of(rule), rtol=0, atol=1e-4)


@pytest.mark.parametrize("arrived", [0, 1, 5, 40])
def test_the_denominator_is_fixed_whoever_came(arrived):
    plan = DPPlan(noise_multiplier=0.0, max_grad_norm=1.0, sample_rate=0.1, delta=1e-5)
    vector = released(plan.release(1.0, population=200), torch.ones(arrived, 3))
    assert vector.tolist() == pytest.approx([arrived / 20] * 3)


def test_bad_rows_count_as_zeros():
    plan = DPPlan(noise_multiplier=0.0, max_grad_norm=1.0, sample_rate=0.1, delta=1e-5)
    rule, rows = plan.release(1.0, population=40), torch.ones(5, 3)
    rows[1, 0], rows[2, 2] = float("nan"), -inf
    assert released(rule, rows).tolist() == pytest.approx([3 / 4] * 3)
    assert released(rule, torch.full((3, 3), inf)).tolist() == [0.0] * 3


def test_weights_are_one_over_the_denominator():
    rule = FULL.release(1.0, population=8)
    outcome = rule.aggregate({}, MatrixView(torch.ones(5, 3)), Generator())[1]
    assert outcome.weights.tolist() == [1 / 8] * 5


def test_a_sum_is_all_a_release_needs():
    rule = replace(FULL, noise_multiplier=0.0).release(1.0, population=4)
    assert (rule.needs, rule.smallest_cohort, rule.tolerated) == (Reveals.SUM, 0, None)
    view = SumView(lambda: torch.tensor([2.0, 6.0]), ids=(1, 2), d=2)
    assert rule.aggregate({}, view, Generator())[1].vector.tolist() == [0.5, 1.5]


def test_the_plans_clip_is_its_bound():
    step = replace(FULL, max_grad_norm=0.7).clip(((0, 3),))
    long = step.encode(torch.tensor([[3.0, 4.0, 0.0], [0.1, 0.0, 0.0]]), {}, [])[0].rows
    assert long.norm(dim=1).tolist() == pytest.approx([0.7, 0.1], rel=1e-5)
    assert step.norm_bound(inf, 3) == 0.7


@pytest.mark.parametrize("sensitivity", [inf, float("nan"), -1.0])
def test_a_release_without_a_bound_is_refused(sensitivity):
    with pytest.raises(InvalidArgument):
        FULL.release(sensitivity, population=10)


def test_a_release_for_nobody_is_refused():
    with pytest.raises(InvalidArgument):
        FULL.release(1.0, population=0)


# Sensitivity

BAD = [float("nan"), inf, -inf]
CLIP, POPULATION, RATE, WIDTH = 0.5, 10, 0.4, 4

values = st.floats(-3, 3, width=32) | st.sampled_from([0.0, 1e20, -1e30, *BAD])
updates = st.lists(values, min_size=WIDTH, max_size=WIDTH) | st.just([0.0] * WIDTH)


@st.composite
def cohorts(draw: st.DrawFn) -> tuple[Tensor, list[bool], int]:
    """Updates as trained, who arrived, and the client whose data is in question."""
    rows = draw(st.lists(updates, min_size=1, max_size=8))
    arrived = draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows)))
    return torch.tensor(rows), arrived, draw(st.integers(0, len(rows) - 1))


def moved(rule: Rule, cohort: tuple[Tensor, list[bool], int], clip: float) -> float:
    """How far leaving out one client moves the noiseless release: the larger of absent and zero."""
    rows, arrived, client = cohort
    clipped = replace(FULL, max_grad_norm=clip).clip(((0, WIDTH),)).encode(rows, {}, [])[0].rows
    others = [i for i, there in enumerate(arrived) if there and i != client]
    present = sorted({*others, client})
    zeroed = clipped.clone()
    zeroed[client] = 0
    whole = released(rule, clipped[present])
    assert bool(whole.isfinite().all())
    without = (released(rule, clipped[others]), released(rule, zeroed[present]))
    return max(float((whole - other).norm()) for other in without)


@given(cohorts())
def test_one_client_moves_the_release_by_at_most_the_clip_over_the_denominator(cohort):
    plan = DPPlan(noise_multiplier=0.0, max_grad_norm=CLIP, sample_rate=RATE, delta=1e-3)
    rule = plan.release(plan.clip(((0, WIDTH),)).norm_bound(inf, WIDTH), POPULATION)
    assert moved(rule, cohort, CLIP) <= CLIP / (RATE * POPULATION) * (1 + 1e-5)


def test_a_forgotten_clip_and_a_realised_denominator_break_the_bound():
    """The negative controls: each moves the release by more than the plan is accounted for."""
    plan = DPPlan(noise_multiplier=0.0, max_grad_norm=CLIP, sample_rate=RATE, delta=1e-3)
    most = CLIP / (RATE * POPULATION)
    cohort = torch.tensor([[3.0, 0.0, 0.0, 0.0], [0.0, 3.0, 0.0, 0.0]]), [True, True], 0
    assert moved(plan.release(CLIP, POPULATION), cohort, CLIP) == pytest.approx(most)
    assert moved(plan.release(CLIP, POPULATION), cohort, clip=100.0) > 5 * most
    assert moved(Mean(), cohort, CLIP) > 1.5 * most
