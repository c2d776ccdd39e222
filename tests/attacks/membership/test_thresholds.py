"""Accusations at fixed thresholds against hand values, slow loops and Bayes' rule."""

from __future__ import annotations

import numpy as np
import pytest

from privfm.attacks.membership.curves import Scored, clopper_pearson, threshold_at, tpr_at_fpr
from privfm.attacks.membership.thresholds import at_threshold, leave_one_out
from privfm.checks import InvalidArgument


def test_one_model_has_exact_intervals_and_bayes_rule() -> None:
    """10 of 40 members and 2 of 100 others are above 0: at a prior of 10 % that is .025 / (.025 + .018)."""
    members = np.arange(140) < 40
    scores = np.full(140, -1.0)
    scores[:10] = scores[100:102] = 1.0
    scores[30] = 0.0  # equal to the threshold: not accused
    found = at_threshold(Scored(scores, members), 0.0)
    assert (found.tpr, found.fpr) == (clopper_pearson(10, 40), clopper_pearson(2, 100))
    precision = found.precision[0.1]
    assert precision is not None and precision.value == pytest.approx(0.025 / 0.043)
    low, high = clopper_pearson(10, 40, 0.975), clopper_pearson(2, 100, 0.975)
    assert precision.low == pytest.approx(0.1 * low.low / (0.1 * low.low + 0.9 * high.high))
    assert precision.low < precision.value < precision.high
    rare = found.precision[0.01]
    assert rare is not None and rare.value == pytest.approx(0.0025 / (0.0025 + 0.0198))


def test_nobody_accused_has_no_precision_and_no_false_accusation_is_no_proof() -> None:
    scored = Scored(np.arange(60.0), np.arange(60) >= 30)
    none = at_threshold(scored, 100.0)
    assert none.precision == {0.01: None, 0.1: None} and none.fpr.high > 0.1
    sure = at_threshold(scored, 29.5).precision[0.01]
    assert sure is not None and sure.value == 1.0 and sure.low < 0.1


def test_precision_holds_its_confidence() -> None:
    """True rates 0.3 and 0.05, prior 10 %: precision 0.4; an exact interval misses it in at most 5 % of 400 runs."""
    generator, missed = np.random.default_rng(0), 0
    members = np.arange(300) < 150
    for _ in range(400):
        accused = generator.random(300) < np.where(members, 0.3, 0.05)
        interval = at_threshold(Scored(accused.astype(float), members), 0.5).precision[0.1]
        missed += interval is None or not interval.low <= 0.03 / 0.075 <= interval.high
    assert missed <= 20


def test_thresholds_come_from_the_other_models() -> None:
    generator = np.random.default_rng(1)
    members = generator.random((5, 200)) < 0.5
    scored = Scored(np.round(generator.normal(size=(5, 200)) + members, 2), members)
    found = leave_one_out(scored, 0.05, np.random.default_rng(2), resamples=200)
    right = wrong = 0
    for model in range(5):
        others = [place for place in range(5) if place != model]
        negatives = np.sort(scored.scores[others][~members[others]])[::-1]
        threshold = negatives[int(0.05 * len(negatives))]
        accused = scored.scores[model] > threshold
        right, wrong = right + (accused & members[model]).sum(), wrong + (accused & ~members[model]).sum()
    assert found.tpr.value == right / members.sum() and found.fpr.value == wrong / (~members).sum()
    assert found.tpr.low < found.tpr.value < found.tpr.high and 0.03 < found.fpr.value < 0.07
    for prior, interval in found.precision.items():
        expected = prior * found.tpr.value / (prior * found.tpr.value + (1 - prior) * found.fpr.value)
        assert interval is not None and interval.value == pytest.approx(expected)
        assert interval.low < expected < interval.high


def test_a_threshold_of_shifted_models_does_not_keep_its_rate() -> None:
    """One model's scores lie higher: read off its own curve the rate is kept, with the others' threshold it is not."""
    generator = np.random.default_rng(3)
    members = generator.random((2, 2000)) < 0.5
    scored = Scored(generator.normal(size=(2, 2000)) + members + [[0.0], [1.0]], members)
    own = Scored(scored.scores[1], members[1])
    shadows = Scored(scored.scores[0], members[0])
    assert tpr_at_fpr(own, 0.01) < 0.15
    assert at_threshold(own, threshold_at(shadows, 0.01)).fpr.low > 0.05


def test_without_any_false_accusation_the_interval_stays_open() -> None:
    members = np.tile(np.arange(40) < 20, (2, 1))
    scored = Scored(np.where(members, 1.0, 0.0), members)
    found = leave_one_out(scored, 0.0, np.random.default_rng(0), resamples=100)
    precision = found.precision[0.01]
    assert (found.tpr.value, found.fpr.value) == (1.0, 0.0) and found.fpr.high > 0.1 and found.tpr.low < 0.9
    assert precision is not None and precision.value == 1.0 and precision.low < 0.1


def test_bad_arguments_are_refused() -> None:
    flat = Scored(np.arange(4.0), np.arange(4) > 1)
    pooled = Scored(flat.scores.reshape(2, 2), np.array([[True, False], [False, True]]))
    with pytest.raises(InvalidArgument, match="leave_one_out"):
        at_threshold(pooled, 0.0)
    with pytest.raises(InvalidArgument, match="expected 2 models"):
        leave_one_out(flat, 0.1, np.random.default_rng(0))
    for prior in (0.0, 1.0):
        with pytest.raises(InvalidArgument, match="prior"):
            at_threshold(flat, 0.0, [prior])
    with pytest.raises(InvalidArgument, match="resamples"):
        leave_one_out(pooled, 0.1, np.random.default_rng(0), resamples=10)
