"""Threshold and calibrated attacks: hand values, closed forms, and what they must not look at."""

from math import sqrt
from statistics import NormalDist

import numpy as np
import pytest
from numpy.random import default_rng
from scipy.stats import mannwhitneyu

from privfm.attacks.membership.reference import CalibratedByBase, CalibratedByReference, Threshold
from privfm.checks import InvalidArgument
from privfm.contracts.membership import Signals

OUT = np.zeros((1, 3), dtype=bool)
TARGET = Signals(np.array([[-1.0, -2.0, -3.0]]), OUT)
SHADOWS = Signals(
    np.array([[-2.0, -2.0, -9.0], [-4.0, 9.0, -5.0], [7.0, -6.0, -4.0]]),
    np.array([[False, False, True], [False, True, False], [True, False, False]]),
)


def area(scores, members):
    scores, members = np.ravel(scores), np.ravel(members)
    here, there = scores[members], scores[~members]
    return float(mannwhitneyu(here, there).statistic) / (len(here) * len(there))


def signals(models, n, distance, *, seed, levels=3.0):
    rng = default_rng(seed)
    inside = rng.random((models, n)) < 0.5
    return Signals(rng.normal(0, levels, n) + distance * inside + rng.normal(size=(models, n)), inside)


def test_by_hand():
    np.testing.assert_array_equal(Threshold()(TARGET), [-1.0, -2.0, -3.0])
    # Means of the models not trained on each: -3, -4, -4.5.
    np.testing.assert_array_equal(CalibratedByReference()(TARGET, SHADOWS), [2.0, 2.0, 1.5])
    np.testing.assert_array_equal(CalibratedByBase(np.array([-1.5, -1.0, -9.0]))(TARGET), [0.5, -1.0, 6.0])


def test_queries_are_averaged():
    target = Signals(np.array([[[1.0, 3.0], [5.0, 6.0]]]), OUT[:, :2])
    shadows = Signals(np.array([[[0.0, 1.0], [2.0, 2.0]]]), OUT[:, :2])
    np.testing.assert_array_equal(Threshold()(target), [2.0, 5.5])
    np.testing.assert_array_equal(CalibratedByReference()(target, shadows), [1.5, 3.5])
    np.testing.assert_array_equal(CalibratedByBase(shadows.values[0])(target), [1.5, 3.5])


def test_a_base_model_is_one_reference_that_was_trained_on_nothing():
    base = Signals(default_rng(0).normal(size=(1, 3)), OUT)
    by_base = CalibratedByBase(base.values[0])(TARGET)
    np.testing.assert_array_equal(CalibratedByReference()(TARGET, base), by_base)


def test_calibration_takes_out_what_makes_an_example_easy():
    # One target against k others: signal less mean is N(d, 1 + 1/k) for members: AUC = Phi(d / sqrt(2 (1 + 1/k))).
    models = signals(9, 20_000, 1.0, seed=5)
    target, shadows = models.take([0]), models.without(0)
    shadows = Signals(shadows.values, np.zeros_like(shadows.inside))  # as if none had been trained on any
    shadows = Signals(shadows.values - 1.0 * models.inside[1:], shadows.inside)
    expected = NormalDist().cdf(1 / sqrt(2 * (1 + 1 / 8)))
    error = 3 * sqrt(expected * (1 - expected) / 9_800)
    found = area(CalibratedByReference()(target, shadows), models.inside[0])
    assert abs(found - expected) < error
    assert abs(found - NormalDist().cdf(1)) > error  # the bound tells right from wrong
    plain = NormalDist().cdf(1 / sqrt(2 * (1 + 9)))  # levels vary with deviation 3
    assert abs(area(Threshold()(target), models.inside[0]) - plain) < error


@pytest.mark.parametrize("attack", [Threshold(), CalibratedByReference()], ids=["threshold", "reference"])
def test_random_labels_give_chance(attack):
    models = signals(33, 4_000, 0.0, seed=2)
    members = models.inside[0]
    deviation = sqrt(4_001 / (12 * members.sum() * (~members).sum()))
    assert abs(area(attack(models.take([0]), models.without(0)), members) - 0.5) < 3 * deviation


def test_models_that_were_trained_on_an_example_are_not_read():
    spoilt = Signals(np.where(SHADOWS.inside, -1e300, SHADOWS.values), SHADOWS.inside)
    attack = CalibratedByReference()
    np.testing.assert_array_equal(attack(TARGET, spoilt), attack(TARGET, SHADOWS))


def test_permuted_examples_have_permuted_scores():
    models = signals(9, 40, 1.0, seed=1)
    order = default_rng(0).permutation(40)
    moved = Signals(models.values[:, order], models.inside[:, order])
    for attack in (Threshold(), CalibratedByReference()):
        scores = [attack(each.take([0]), each.without(0)) for each in (models, moved)]
        np.testing.assert_allclose(scores[1], scores[0][order], rtol=1e-14)


@pytest.mark.parametrize("which", ["threshold", "reference", "base"])
def test_pooled_over_sixteen_models(which):
    models = signals(16, 200, 3.0, seed=4, levels=0.5)
    attack = {
        "threshold": Threshold(),
        "reference": CalibratedByReference(),
        "base": CalibratedByBase(np.zeros(200)),
    }[which]
    found = attack.pooled(models)
    assert found.scores.shape == (16, 200)
    assert area(found.scores, found.members) > 0.95


def test_extreme_signals_are_finite():
    far = Signals(np.full((1, 3), -1e4), OUT)
    assert np.isfinite(CalibratedByReference()(far, SHADOWS)).all()
    assert np.isfinite(CalibratedByBase(np.full(3, 1e4))(far)).all()


def test_bad_input_is_refused():
    with pytest.raises(InvalidArgument, match="CalibratedByReference: needs shadow models"):
        CalibratedByReference()(TARGET)
    seen = Signals(SHADOWS.values, np.array([[True, False, False]] * 3))
    with pytest.raises(InvalidArgument, match=r"1 of 3 examples have fewer than 1 .*not trained on.*example 0: 0"):
        CalibratedByReference()(TARGET, seen)
    with pytest.raises(InvalidArgument, match=r"base \(2,\): expected \(3,\)"):
        CalibratedByBase(np.zeros(2))(TARGET)
    with pytest.raises(InvalidArgument, match="not finite"):
        CalibratedByBase(np.array([0.0, np.nan, 0.0]))
    with pytest.raises(InvalidArgument, match=r"expected \(n,\)"):
        CalibratedByBase(np.zeros((1, 3, 1)))


def test_the_report_can_name_what_was_used():
    assert Threshold().used == ("signal of the target",)
    assert CalibratedByReference().used == ("signal of the target", "shadow models not trained on the example")
    assert CalibratedByBase(np.zeros(3)).used == ("signal of the target", "signal of the base model")
