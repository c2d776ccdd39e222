"""Curves, intervals and judgements against scikit-learn, slow loops, closed forms and simulated truth."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from privfm.attacks.membership.curves import (
    Scored,
    advantage,
    auc,
    auc_interval,
    clopper_pearson,
    example_weights,
    judge,
    roc,
    threshold_at,
    tpr_at_fpr,
    tpr_band,
)
from privfm.checks import InvalidArgument


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def drawn(generator: np.random.Generator, shape: tuple[int, ...], gap: float = 0.5, digits: int = 3) -> Scored:
    members = generator.random(shape) < 0.5
    members.flat[:2] = True, False
    return Scored(np.round(generator.normal(size=shape) + gap * members, digits), members)


def pairs(scored: Scored) -> float:
    """AUC by its definition."""
    own, others = scored.scores[scored.members], scored.scores[~scored.members]
    return float(np.mean([[1.0 if a > b else 0.5 if a == b else 0.0 for b in others] for a in own]))


@pytest.mark.parametrize("digits", [0, 1, 5])
@pytest.mark.parametrize("shape", [(30,), (3, 20)])
def test_curves_equal_scikit_learn(digits: int, shape: tuple[int, ...]) -> None:
    from scipy.stats import mannwhitneyu
    from sklearn.metrics import roc_auc_score, roc_curve

    generator = rng(digits)
    for _ in range(20):
        scored = drawn(generator, shape, digits=digits)
        truth, scores = scored.members.ravel(), scored.scores.ravel()
        fpr, tpr, _ = roc_curve(truth, scores, drop_intermediate=False)
        curve = roc(scored)
        np.testing.assert_allclose(curve.fpr, fpr, atol=1e-15)
        np.testing.assert_allclose(curve.tpr, tpr, atol=1e-15)
        area = auc(scored)
        assert area == pytest.approx(roc_auc_score(truth, scores), abs=1e-13)
        statistic = mannwhitneyu(scores[truth], scores[~truth]).statistic
        assert area == pytest.approx(statistic / (truth.sum() * (~truth).sum()), abs=1e-13)
        assert area == pytest.approx(pairs(scored), abs=1e-13)
        for level in (0.0, 0.01, 0.1, 1 / 3, 0.5, 0.95):
            assert tpr_at_fpr(scored, level) == pytest.approx(tpr[fpr <= level + 1e-12].max(), abs=1e-15)


def test_no_threshold_parts_equal_scores() -> None:
    """Half of all scores are equal: interpolation would promise a rate that nobody can have."""
    scored = Scored(np.array([2.0, 1, 1, 1, 1, 1, 0, 0]), np.array([1, 1, 1, 1, 0, 0, 0, 0], dtype=bool))
    assert roc(scored).fpr.tolist() == [0, 0, 0.5, 1] and roc(scored).tpr.tolist() == [0, 0.25, 1, 1]
    assert [tpr_at_fpr(scored, level) for level in (0.0, 0.25, 0.49, 0.5)] == [0.25, 0.25, 0.25, 1.0]
    assert threshold_at(scored, 0.25) == 1.0 and threshold_at(scored, 0.5) == 0.0


def test_rates_are_rounded_like_people_count() -> None:
    """0.29 * 100 is 28.999999999999996: 29 of 100 may be accused, not 28."""
    scored = Scored(np.append(np.arange(100.0), 70.5), np.append(np.zeros(100, dtype=bool), True))
    assert tpr_at_fpr(scored, 0.29) == 1.0 and tpr_at_fpr(scored, 0.2899) == 0.0


def test_infinite_scores_are_the_first_and_the_last() -> None:
    scored = Scored(np.array([np.inf, np.inf, 0.0, -np.inf, -np.inf]), np.array([1, 0, 1, 0, 1], dtype=bool))
    assert auc(scored) == pairs(scored) == pytest.approx((0.5 + 1 + 0 + 1 + 0 + 0.5) / 6)
    assert tpr_at_fpr(scored, 0.0) == 0.0 and threshold_at(scored, 0.0) == np.inf


@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=12), st.integers(0, 2**32 - 1))
def test_weights_are_repetitions(rows: list[tuple[int, bool]], seed: int) -> None:
    """A resample measured by weights is the same as its examples written out."""
    scores, members = np.array([float(row[0]) for row in rows]), np.array([row[1] for row in rows])
    if members.all() or not members.any():
        return
    one = next(example_weights(members[None], rng(seed), 1)).astype(int)
    again = Scored(np.repeat(scores, one), np.repeat(members, one))
    from privfm.attacks.membership.curves import _Ranks

    area, rates = _Ranks(Scored(scores, members)).measure(one.astype(float), (0.0, 0.2, 0.5))
    assert area == pytest.approx(auc(again), abs=1e-12)
    assert rates.tolist() == pytest.approx([tpr_at_fpr(again, level) for level in (0.0, 0.2, 0.5)], abs=1e-12)


@pytest.mark.parametrize("gap", [0.0, 1.0, 2.0])
def test_gaussian_scores_have_their_closed_form(gap: float) -> None:
    """AUC = Phi(d / sqrt 2); TPR at FPR a = Phi(d - Phi^-1(1 - a)); advantage = 2 Phi(d / 2) - 1."""
    scored, normal = drawn(rng(4), (20_000,), gap, 9), NormalDist()
    judgement = judge(scored, rng(5), resamples=200)
    assert judgement.auc.value == pytest.approx(normal.cdf(gap / 2**0.5), abs=0.012)
    rate = judgement.rates[0].tpr
    assert rate is not None and rate.value == pytest.approx(normal.cdf(gap - normal.inv_cdf(0.99)), abs=0.03)
    assert judgement.advantage.value == pytest.approx(2 * normal.cdf(gap / 2) - 1, abs=0.025)
    for interval in (judgement.auc, rate, judgement.advantage):
        assert interval.low <= interval.value <= interval.high


def test_random_labels_are_at_chance() -> None:
    """AUC within 3 sigma of 1/2 (Mann-Whitney), and a cross-fitted advantage around 0, not above it."""
    gains, areas = [], []
    for seed in range(60):
        scored = drawn(rng(seed), (200,), gap=0.0, digits=9)
        gains.append(advantage(scored, rng(seed), 100).value)
        own = int(scored.members.sum())
        areas.append((auc(scored) - 0.5) / (201 / (12 * own * (200 - own))) ** 0.5)
    assert max(map(abs, areas)) < 3.5 and abs(np.mean(areas)) < 3 / 60**0.5
    assert abs(np.mean(gains)) < 3 * np.std(gains) / 60**0.5
    best = np.mean([(c.tpr - c.fpr).max() for c in (roc(drawn(rng(seed), (200,), 0.0, 9)) for seed in range(60))])
    assert best > 0.08, "the best threshold of the same scores looks good on nothing"


MODELS, EXAMPLES, SPREAD = 16, 50, 2.0


def memorised(seed: int) -> Scored:
    """Random halves; some examples are memorised and others are not, so that scores of one example are dependent."""
    generator = rng(seed)
    members = generator.random((MODELS, EXAMPLES)) < 0.5
    memory = 1 + SPREAD * generator.normal(size=EXAMPLES)
    return Scored(generator.normal(size=members.shape) + memory * members, members)


def test_intervals_over_examples_cover_and_intervals_over_pairs_do_not() -> None:
    """Members are N(1, 1 + 4), others N(0, 1): AUC = Phi(1 / sqrt(6)), of 200 trials with 16 x 50 scores."""
    truth, trials = NormalDist().cdf(1 / (2 + SPREAD**2) ** 0.5), 200
    over_examples = over_pairs = 0
    for seed in range(trials):
        scored = memorised(seed)
        found = auc_interval(scored, rng(10_000 + seed), 200)
        over_examples += found.low <= truth <= found.high
        if seed % 2:
            continue
        naive = auc_interval(Scored(scored.scores.ravel(), scored.members.ravel()), rng(20_000 + seed), 100)
        over_pairs += naive.low <= truth <= naive.high
    # 95 % of 200 is 190 with a deviation of 3.1.
    assert 180 <= over_examples <= 199
    assert over_pairs < 70, "of 100"


def test_too_few_scores_print_what_is_needed() -> None:
    few = judge(drawn(rng(6), (1500,)), rng(7), 100)
    others = few.others
    assert 700 < others < 800
    assert [rate.missing for rate in few.rates] == [f"needs 1,000, has {others}", f"needs 10,000, has {others}"]
    assert [rate.tpr for rate in few.rates] == [None, None]
    pooled = judge(drawn(rng(8), (16, 1500)), rng(9), 100)
    assert [rate.missing for rate in pooled.rates] == ["", ""] and pooled.others >= 10_000
    assert (pooled.models, pooled.examples) == (16, 1500) and pooled.members + pooled.others == 24_000
    exact = Scored(np.arange(1100.0), np.arange(1100) >= 1000)
    assert judge(exact, rng(0), 100).rates[0].missing == ""
    short = Scored(np.arange(1100.0), np.arange(1100) >= 999)
    assert judge(short, rng(0), 100).rates[0].missing == "needs 1,000, has 999"


def test_nothing_seen_is_no_proof_of_nothing() -> None:
    """A rate of 0 in 50 members is no [0, 0]: the interval ends where 50 misses have probability 2.5 %."""
    scores = np.append(np.zeros(50), np.ones(1000))
    none = judge(Scored(scores, np.arange(1050) < 50), rng(0), 100)
    rate = none.rates[0].tpr
    assert rate is not None and (rate.value, rate.low) == (0.0, 0.0)
    assert (1 - rate.high) ** 50 == pytest.approx(0.025, rel=1e-9)
    assert none.auc.value == none.auc.low == 0.0 and none.auc.high == pytest.approx(rate.high)
    perfect = judge(Scored(-scores, np.arange(1050) < 50), rng(0), 100)
    assert perfect.auc.value == 1.0 and perfect.auc.low**50 == pytest.approx(0.025, rel=1e-9)
    assert perfect.advantage.value == 1.0 and 0.9 < perfect.advantage.low < perfect.auc.low


def test_clopper_pearson_has_its_published_ends() -> None:
    """Zero of 2,995: the least with which a one-sided 95 % bound is under 0.1 % (the rule of three, exactly)."""
    assert clopper_pearson(0, 2995, 0.90).high < 0.001 < clopper_pearson(0, 2994, 0.90).high
    from scipy.stats import binomtest

    for right, trials in ((0, 10), (3, 10), (10, 10), (16, 16_000)):
        expected = binomtest(right, trials).proportion_ci(0.95, "exact")
        found = clopper_pearson(right, trials)
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-9)
    with pytest.raises(InvalidArgument, match="found"):
        clopper_pearson(3, 2)


def test_a_band_is_what_a_judgement_says() -> None:
    scored = drawn(rng(10), (8, 400), 1.0)
    band = tpr_band(scored, [0.01, 0.1], rng(11), 300)
    rate = judge(scored, rng(12), 300, levels=(0.01, 0.1)).rates[1].tpr
    assert rate is not None and band[0, 1] == rate.value == tpr_at_fpr(scored, 0.1)
    assert band[1:, 1].tolist() == pytest.approx([rate.low, rate.high], abs=0.015)
    assert (band[1] <= band[0]).all() and (band[0] <= band[2]).all()


def test_the_same_seed_says_the_same_and_nothing_else_moves(untouched_random_state: None) -> None:
    scored = drawn(rng(13), (4, 50))
    before = scored.scores.copy()
    assert judge(scored, rng(1), 100, (0.2,)) == judge(scored, rng(1), 100, (0.2,))
    assert judge(scored, rng(1), 100, (0.2,)) != judge(scored, rng(2), 100, (0.2,))
    assert (scored.scores == before).all()


def test_bad_arguments_are_refused() -> None:
    scored = drawn(rng(14), (50,))
    for level in (1.0, -0.1, float("nan")):
        with pytest.raises(InvalidArgument, match="fpr"):
            tpr_at_fpr(scored, level)
    with pytest.raises(InvalidArgument, match="level"):
        judge(scored, rng(0), levels=(0.0,))
    with pytest.raises(InvalidArgument, match="resamples"):
        judge(scored, rng(0), resamples=99)
    with pytest.raises(InvalidArgument, match="two examples or more"):
        judge(Scored(np.arange(5.0), np.arange(5) == 4), rng(0))
