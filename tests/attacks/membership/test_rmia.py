"""RMIA against a loop over pairs, in a range where probabilities are zero, and what a tie-break may not change."""

from dataclasses import replace
from math import exp, sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.random import default_rng
from scipy.stats import mannwhitneyu

from privfm.attacks.membership.places import part_of_step
from privfm.attacks.membership.rmia import RMIA, tuned_offset
from privfm.checks import InvalidArgument
from privfm.contracts.membership import Signals

ONLINE = RMIA("online")
OFFLINE = RMIA("offline", offset=0.3)
BOTH = {"online": ONLINE, "offline": OFFLINE}


def texts(models, n, z=50, lift=1.0, *, seed=0, queries=None):
    """Log-probabilities: a member's log-odds are raised by `lift`; halves drawn by independent coins."""
    rng = default_rng(seed)
    inside = rng.random((models, n)) < 0.5
    end = () if queries is None else (queries,)

    def logarithms(levels, raised, count):
        odds = levels + raised + 0.5 * rng.standard_normal((models, count, *end))
        return -np.logaddexp(0, -odds)

    raised = lift * inside.reshape(models, n, *(1 for _ in end))
    values = logarithms(rng.normal(0, 2, (n, *end)), raised, n)
    return Signals(values, inside, logarithms(rng.normal(0, 2, (z, *end)), 0.0, z))


def area(scores, members):
    scores, members = np.ravel(scores), np.ravel(members)
    here, there = scores[members], scores[~members]
    return float(mannwhitneyu(here, there).statistic) / (len(here) * len(there))


def split(models):
    return models.take([0]), models.without(0)


def slow(attack, target, shadows):
    """Definition: for every pair of x and z, probabilities and not logarithms."""
    n, z = target.values.shape[1], target.population.shape[1]
    queries = 1 if target.values.ndim == 2 else target.values.shape[2]
    x, of_x = target.values.reshape(n, queries), shadows.values.reshape(-1, n, queries)
    other, of_z = target.population.reshape(z, queries), shadows.population.reshape(-1, z, queries)

    def corrected(p):
        return 0.5 * ((1 + attack.offset) * p + (1 - attack.offset))

    def usual(i, q):
        out = [exp(of_x[m, i, q]) for m in range(len(shadows)) if not shadows.inside[m, i]]
        inner = [exp(of_x[m, i, q]) for m in range(len(shadows)) if shadows.inside[m, i]]
        p = sum(out) / len(out)
        return corrected(p) if attack.mode == "offline" else (p + sum(inner) / len(inner)) / 2

    def usual_of_population(j, q):
        p = sum(exp(v) for v in of_z[:, j, q]) / len(shadows)
        return corrected(p) if attack.mode == "offline" and attack.corrected_population else p

    scores = np.zeros(n)
    for i in range(n):
        for q in range(queries):
            for j in range(z):
                ratio = exp(x[i, q]) / usual(i, q) / (exp(other[j, q]) / usual_of_population(j, q))
                scores[i] += (ratio >= attack.gamma) / (z * queries)
    return scores


ATTACKS = {
    "online": RMIA("online", tie_break=False),
    "online, gamma 2": RMIA("online", gamma=2.0, tie_break=False),
    "offline": RMIA("offline", 0.3, tie_break=False),
    "offline, a=0": RMIA("offline", 0.0, gamma=1.2, tie_break=False),
    "offline, a=1": RMIA("offline", 1.0, gamma=1.2, tie_break=False),
    "offline, plain population": RMIA("offline", 0.3, corrected_population=False, tie_break=False),
}


@pytest.mark.parametrize("queries", [None, 3], ids=["one query", "three queries"])
@pytest.mark.parametrize("name", ATTACKS)
def test_equals_a_loop_over_pairs(name, queries):
    attack = ATTACKS[name]
    target, shadows = split(texts(13, 20, 30, seed=1, queries=queries))
    expected = slow(attack, target, shadows)
    assert len(set(expected)) > 5
    np.testing.assert_allclose(attack(target, shadows), expected, rtol=1e-10, atol=1e-10)
    # With the tie-break: the same levels, and less than one step above them.
    steps = 30 * (queries or 1)
    finer = replace(attack, tie_break=True)(target, shadows)
    np.testing.assert_array_equal(np.floor(finer * steps + 1e-9), np.round(expected * steps))


def test_an_option_of_the_population_changes_scores():
    target, shadows = split(texts(13, 20, 30, seed=1))
    scores = [ATTACKS[name](target, shadows) for name in ("offline", "offline, plain population")]
    assert not np.array_equal(*scores)


def test_a_ratio_of_exactly_gamma_counts():
    certain = Signals(np.zeros((1, 2)), np.zeros((1, 2), dtype=bool), np.zeros((1, 2)))  # usual probabilities are 1
    target = Signals(np.array([[-1.0, -2.0]]), certain.inside, np.array([[-1.0, -3.0]]))
    np.testing.assert_array_equal(RMIA("offline", 1.0, tie_break=False)(target, certain), [1.0, 0.5])


def test_probabilities_too_small_for_a_float_are_no_zeros():
    # With an offset of 1 only ratios matter: 2,000 less for everybody changes nothing, though exp(-2,000) is 0.
    for attack in (RMIA("online"), RMIA("offline", 1.0)):
        models = texts(13, 20, 30, seed=1)
        far = Signals(models.values - 2_000, models.inside, models.population - 2_000)
        np.testing.assert_allclose(attack(*split(far)), attack(*split(models)), rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", BOTH)
def test_extreme_signals_have_finite_scores(name):
    models = texts(13, 20, 30, seed=1)
    values, population = models.values.copy(), models.population.copy()
    values[0, :7], values[1:5, 5:9], population[0, :3], population[:, 4] = -1e4, -1e4, -1e4, -1e4
    values[0, 8], values[3, 9] = 0.0, -3e38
    scores = BOTH[name](*split(Signals(values, models.inside, population)))
    assert np.isfinite(scores).all()
    assert scores.min() >= 0
    assert scores.max() <= 1 + 1 / 30


@given(st.integers(0, 10_000), st.integers(1, 3), st.floats(0.3, 3))
def test_the_tie_break_changes_no_order(seed, queries, gamma):
    models = texts(9, 15, 4, seed=seed, queries=queries)
    models = Signals(np.round(models.values, 1), models.inside, np.round(models.population, 1))  # so that many tie
    target, shadows = split(models)
    coarse = RMIA("offline", 0.5, gamma, tie_break=False)
    if coarse.refusal(target, shadows):
        return  # an example all shadow models were trained on
    shares, scores = coarse(target, shadows), replace(coarse, tie_break=True)(target, shadows)
    rises = shares[:, None] > shares[None] + 1e-9
    assert (scores[:, None] >= scores[None])[rises].all()
    assert (scores >= shares - 1e-12).all()
    assert (scores <= shares + 1 / (4 * queries) + 1e-12).all()


def test_with_the_tie_break_one_target_is_ordered_by_the_ratio_alone():
    target, shadows = split(texts(13, 200, 5, seed=3))
    attack = RMIA("offline", 1.0, gamma=1.3)
    usual = np.log(np.where(shadows.inside, 0, np.exp(shadows.values)).sum(0) / (~shadows.inside).sum(0))
    ratio = target.values[0] - usual
    np.testing.assert_array_equal(np.argsort(attack(target, shadows)), np.argsort(ratio))
    assert len(np.unique(replace(attack, tie_break=False)(target, shadows))) <= 6
    assert len(np.unique(attack(target, shadows))) == 200


def test_parts_of_a_step_by_hand():
    infinity = np.inf
    parts = part_of_step(
        np.array([2.0, 3.0, 3.0, 4.0, -1.0]),
        np.array([2.0, 2.0, -infinity, 1.0, -infinity]),
        np.array([4.0, 6.0, 4.0, infinity, infinity]),
    )
    np.testing.assert_allclose(parts, [0.0, 0.25, 0.5, 0.75, 0.5])


@pytest.mark.parametrize("name", BOTH)
def test_random_labels_give_chance(name):
    target, shadows = split(texts(33, 4_000, 100, lift=0.0, seed=2))
    rng = default_rng(5)
    members = rng.random(4_000) < 0.5
    deviation = sqrt(4_001 / (12 * members.sum() * (~members).sum()))
    assert abs(area(BOTH[name](target, shadows), members) - 0.5) < 3 * deviation
    models = texts(33, 4_000, 100, lift=1.0, seed=2)
    assert area(BOTH[name](*split(models)), models.inside[0]) > 0.5 + 5 * deviation


@pytest.mark.parametrize("name", BOTH)
def test_permuted_examples_have_permuted_scores(name):
    models = texts(13, 40, 30, seed=4)
    rng = default_rng(0)
    order, others = rng.permutation(40), rng.permutation(30)
    moved = Signals(models.values[:, order], models.inside[:, order], models.population[:, others])
    scores = [BOTH[name](*split(each)) for each in (models, moved)]
    np.testing.assert_allclose(scores[1], scores[0][order], rtol=1e-12)


@pytest.mark.parametrize("spoil", [-1e300, 7.0], ids=["tiny", "no logarithm"])
def test_offline_never_reads_models_that_were_trained_on_the_example(spoil):
    target, shadows = split(texts(13, 40, 30, seed=4))
    spoilt = Signals(np.where(shadows.inside, spoil, shadows.values), shadows.inside, shadows.population)
    np.testing.assert_array_equal(OFFLINE(target, spoilt), OFFLINE(target, shadows))
    halved = Signals(np.where(shadows.inside, shadows.values - 1, shadows.values), shadows.inside, shadows.population)
    assert not np.array_equal(ONLINE(target, halved), ONLINE(target, shadows))


def test_offline_with_queries_never_reads_them_either():
    target, shadows = split(texts(13, 40, 30, seed=4, queries=2))
    spoilt = np.where(shadows.inside[:, :, None], 7.0, shadows.values)
    spoilt = Signals(spoilt, shadows.inside, shadows.population)
    np.testing.assert_array_equal(OFFLINE(target, spoilt), OFFLINE(target, shadows))


@pytest.mark.parametrize("name", BOTH)
def test_pooled_over_sixteen_models(name):
    models = texts(16, 200, 50, lift=3.0, seed=6)
    found = BOTH[name].pooled(models)
    assert found.scores.shape == (16, 200)
    np.testing.assert_array_equal(found.scores[3], BOTH[name](models.take([3]), models.without(3)))
    assert area(found.scores, found.members) > 0.8


def in_half(models, n, rng):
    """Each example in half of the models, so that all have enough without it."""
    return np.argsort(rng.random((models, n)), axis=0) < models // 2


def affine(a, models, seed, n=400, z=60):
    """Models trained on x have the probability `a p + 1 - a` where others have p: the offset's own assumption."""
    rng = default_rng(seed)
    inside = in_half(models, n, rng)

    def noisy(p):
        odds = np.log(p) - np.log1p(-p) + 0.3 * rng.standard_normal((models, p.shape[-1]))
        return -np.logaddexp(0, -odds)

    p = rng.uniform(0.05, 0.9, n)
    return Signals(noisy(np.where(inside, a * p + 1 - a, p)), inside, noisy(rng.uniform(0.05, 0.9, (models, z))))


def test_the_offset_is_the_one_with_the_largest_area_over_reference_models():
    models = affine(0.8, 9, seed=1)
    grid = (0.0, 0.4, 0.8, 1.0)
    expected = {}
    for a in grid:
        attack = RMIA("offline", a)
        parts = [area(attack(models.take([k]), models.without(k)), models.inside[k]) for k in range(9)]
        expected[a] = float(np.mean(parts))
    assert tuned_offset(models, offsets=grid) == max(expected, key=expected.get)
    assert len(set(expected.values())) == 4


@pytest.mark.parametrize("a", [0.6, 0.8])
def test_the_offset_helps_on_a_target_it_never_saw(a):
    models = affine(a, 13, seed=3, n=2_000)
    target, shadows = split(models)
    chosen = tuned_offset(shadows)
    assert chosen == pytest.approx(a, abs=0.21)
    found = {each: area(RMIA("offline", each)(target, shadows), models.inside[0]) for each in (0.0, chosen, 1.0)}
    assert found[chosen] > max(found[0.0], found[1.0]) + 0.02


def test_equal_areas_take_the_smallest_offset():
    models = affine(0.5, 9, seed=1, n=60)
    same = Signals(np.where(models.inside, -0.1, -2.0), models.inside, models.population)
    assert tuned_offset(same, offsets=(0.5, 0.2, 1.0)) == 0.2


def test_tuning_refuses_what_it_cannot_use():
    models = affine(0.5, 9, seed=1, n=60)
    with pytest.raises(InvalidArgument, match="expected at least 3"):
        tuned_offset(models.take([0, 1]))
    with pytest.raises(InvalidArgument, match="expected at least one to try"):
        tuned_offset(models, offsets=())
    with pytest.raises(InvalidArgument, match=r"offset=1.5"):
        tuned_offset(models, offsets=(0.5, 1.5))
    inside = models.inside.copy()
    inside[2] = True
    with pytest.raises(InvalidArgument, match="on all or on none"):
        tuned_offset(Signals(models.values, inside, models.population))
    with pytest.raises(InvalidArgument, match=r"needs Signals.population"):
        tuned_offset(Signals(models.values, models.inside))


def without_population(models):
    return Signals(models.values, models.inside)


def test_bad_input_is_refused():
    models = texts(13, 5, 6, seed=1)
    target, shadows = split(models)
    with pytest.raises(InvalidArgument, match="RMIA: needs shadow models"):
        OFFLINE(target)
    for pair in ((without_population(target), shadows), (target, without_population(shadows))):
        with pytest.raises(InvalidArgument, match=r"needs Signals.population"):
            OFFLINE(*pair)
    fewer = Signals(shadows.values, shadows.inside, shadows.population[:, :4])
    with pytest.raises(InvalidArgument, match=r"populations of target and shadows are \(6,\) and \(4,\)"):
        OFFLINE(target, fewer)
    nobody = [Signals(each.values, each.inside, each.population[:, :0]) for each in (target, shadows)]
    with pytest.raises(InvalidArgument, match="population is empty"):
        OFFLINE(*nobody)
    for side, attack in ((True, OFFLINE), (False, ONLINE)):
        alike = Signals(shadows.values, np.full_like(shadows.inside, side), shadows.population)
        with pytest.raises(InvalidArgument, match="5 of 5 examples have fewer than 1 shadow models"):
            attack(target, alike)


@pytest.mark.parametrize("where", ["target", "shadows", "population", "population of the shadows"])
def test_signals_that_are_no_logarithms_of_probabilities_are_refused(where):
    target, shadows = split(texts(13, 5, 6, seed=1))
    positive = {"values": shadows.values + 9, "population": shadows.population + 9}
    if where == "target":
        target = replace(target, values=target.values + 9)
    elif where == "shadows":
        shadows = replace(shadows, values=positive["values"])
    elif where == "population":
        target = replace(target, population=target.population + 9)
    else:
        shadows = replace(shadows, population=positive["population"])
    with pytest.raises(InvalidArgument, match=f"RMIA: {where}: a signal is .*at most 0"):
        OFFLINE(target, shadows)


def test_settings_are_checked():
    with pytest.raises(InvalidArgument, match=r"offset=None.*tuned_offset"):
        RMIA("offline")
    with pytest.raises(InvalidArgument, match="mode='online' has none"):
        RMIA("online", 0.3)
    with pytest.raises(InvalidArgument, match=r"offset=-0.1"):
        RMIA("offline", -0.1)
    with pytest.raises(InvalidArgument, match="gamma=0"):
        RMIA("online", gamma=0.0)
    with pytest.raises(InvalidArgument, match="mode='on'"):
        RMIA("on")
    assert RMIA("offline", 0.3).used[1:] == (
        "shadow models not trained on it",
        "population that no model was trained on",
    )
    assert "trained on each judged example" in RMIA("online").used[1]
