"""LiRA against the closed form of two Gaussians, a loop over examples, and what it must not look at."""

from math import log, sqrt
from statistics import NormalDist, fmean, stdev

import numpy as np
import pytest
from numpy.random import default_rng
from scipy.stats import mannwhitneyu

from privfm.attacks.membership.lira import LiRA
from privfm.checks import InvalidArgument
from privfm.contracts.membership import Signals

MODES = ("online", "offline")
VARIANCES = ("per-example", "global")


def gaussian(models, n, distance=1.0, *, seed=0, queries=None, spread=None):
    """Members' signals lie `distance` deviations above an example's own level; halves drawn by independent coins."""
    rng = default_rng(seed)
    inside = rng.random((models, n)) < 0.5
    level = rng.normal(0, 3, n)
    deviation = np.ones(n) if spread is None else np.exp(rng.uniform(-spread, spread, n))
    shape = (models, n) if queries is None else (models, n, queries)
    lifted = level + deviation * distance * inside
    values = rng.standard_normal(shape)
    if queries is None:
        return Signals(lifted + deviation * values, inside)
    return Signals(lifted[:, :, None] + deviation[:, None] * values, inside)


def area(scores, members):
    """AUC by counting pairs (Mann and Whitney)."""
    scores, members = np.ravel(scores), np.ravel(members)
    here, there = scores[members], scores[~members]
    return float(mannwhitneyu(here, there).statistic) / (len(here) * len(there))


def attacked(attack, models, targets):
    """AUC over the first models as targets, the rest as shadows."""
    shadows = models.take(list(range(targets, len(models))))
    scores = np.stack([attack(models.take([k]), shadows) for k in range(targets)])
    return area(scores, models.inside[:targets])


def slow(mode, variance, target, shadows):
    """The definition, example by example, with the standard library's normal distribution."""
    n, queries = shadows.values.shape[1:] if shadows.values.ndim == 3 else (shadows.values.shape[1], 1)
    values = shadows.values.reshape(len(shadows), n, queries)
    x = target.values.reshape(n, queries)
    normal, scores = NormalDist(), []

    def side(i, q, member):
        return [float(values[m, i, q]) for m in range(len(shadows)) if shadows.inside[m, i] == member]

    def common(q, member):
        sums = [(v - fmean(side(i, q, member))) ** 2 for i in range(n) for v in side(i, q, member)]
        return sqrt(sum(sums) / sum(len(side(i, q, member)) - 1 for i in range(n)))

    for i in range(n):
        score = 0.0
        for q in range(queries):
            fits = []
            for member in (True, False):
                deviation = stdev(side(i, q, member)) if variance == "per-example" else common(q, member)
                fits.append((fmean(side(i, q, member)), deviation))
            (mean_in, wide_in), (mean_out, wide_out) = fits
            if mode == "online":
                here = -(((x[i, q] - mean_in) / wide_in) ** 2) / 2 - log(wide_in)
                there = -(((x[i, q] - mean_out) / wide_out) ** 2) / 2 - log(wide_out)
                score += here - there
            else:
                tail = normal.cdf((x[i, q] - mean_out) / wide_out)
                score += log(tail) - log(normal.cdf(-(x[i, q] - mean_out) / wide_out))
        scores.append(score)
    return np.array(scores)


@pytest.mark.parametrize("queries", [None, 3], ids=["one query", "three queries"])
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("mode", MODES)
def test_equals_a_loop_over_examples(mode, variance, queries):
    models = gaussian(13, 11, 0.7, seed=3, queries=queries, spread=0.5)
    target, shadows = models.take([0]), models.without(0)
    assert (np.minimum(shadows.inside.sum(0), (~shadows.inside).sum(0)) >= 2).all()
    expected = slow(mode, variance, target, shadows)
    np.testing.assert_allclose(LiRA(mode, variance)(target, shadows), expected, rtol=1e-10, atol=1e-10)


# The ratio of N(m + d s, s) to N(m, s) is N(+-d^2/2, d^2) for members and others: AUC = Phi(d^2 / (sqrt(2) d)).
# A global variance finds s from all examples at once. One per example estimates the same s from its own models, at a
# relative error of 1 / sqrt(2 models a side) which blurs the ratio, and so reaches the closed form from below.
# Three standard errors: an AUC of A over k members and k others has a variance of at most A (1 - A) / k.
@pytest.mark.parametrize("distance", [0.5, 1.0, 2.0])
def test_area_under_the_curve_of_gaussians_is_the_closed_form(distance):
    models = gaussian(308, 2_000, distance, seed=7)
    expected = NormalDist().cdf(distance / sqrt(2))
    error = 3 * sqrt(expected * (1 - expected) / 8_000)
    for variance in VARIANCES:  # the same for all examples here, so that 150 models an example find it as well as all
        found = attacked(LiRA("online", variance), models, 8)
        assert abs(found - expected) < error + 0.005  # 0.005: what not knowing means and deviations costs at 150 a side
    assert attacked(LiRA("offline", "global"), models, 8) == pytest.approx(expected, abs=error + 0.005)
    # The bound tells right from wrong: a distance a quarter off, or Phi(d) instead of Phi(d / sqrt 2), lies outside.
    for wrong in (NormalDist().cdf(distance * 0.75 / sqrt(2)), NormalDist().cdf(distance)):
        assert abs(found - wrong) > error + 0.005


def test_fits_per_example_converge_to_the_closed_form():
    expected = NormalDist().cdf(1 / sqrt(2))
    lost = [expected - attacked(LiRA("online", "per-example"), _enough(models), 8) for models in (16, 48, 308)]
    assert lost[0] > 0.03  # four to seven models a side do not know a variance
    assert lost[0] > 2 * lost[1] > 0
    assert abs(lost[2]) < 0.012


def _enough(models, least=2, n=2_000):
    """Gaussian signals, without the examples that have too few models on a side once the targets are away."""
    signals = gaussian(models, n, 1.0, seed=11)
    rest = signals.inside[8:]
    kept = np.minimum(rest.sum(0), (~rest).sum(0)) >= least
    return Signals(signals.values[:, kept], signals.inside[:, kept])


def test_variance_per_example_wins_with_many_models_and_global_with_few():
    uneven = gaussian(208, 2_000, 1.0, seed=5, spread=2.0)  # deviations from 1/7 to 7
    per_example, for_all = (attacked(LiRA("online", variance), uneven, 8) for variance in VARIANCES)
    assert per_example > for_all + 0.02
    few = _enough(20)
    per_example, for_all = (attacked(LiRA("online", variance), few, 8) for variance in VARIANCES)
    assert for_all > per_example + 0.02


def halves(models, n=6):
    """Every example in exactly half of the models."""
    inside = (np.arange(models)[:, None] + np.arange(n)) % 2 == 0
    return Signals(default_rng(1).normal(size=(models, n)) + inside, inside)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("models", "chosen"), [(4, "global"), (62, "global"), (64, "per-example"), (80, "per-example")]
)
def test_automatic_takes_a_variance_per_example_from_32_models_a_side(mode, models, chosen):
    shadows, target = halves(models), halves(2).take([0])
    attack = LiRA(mode)
    assert attack.variance_for(shadows) == chosen
    np.testing.assert_array_equal(attack(target, shadows), LiRA(mode, chosen)(target, shadows))


def test_one_example_with_few_models_is_enough_for_a_global_variance():
    shadows = halves(64)
    inside = shadows.inside.copy()
    inside[0, 0] = False  # 31 trained on it, 33 not
    lopsided = Signals(shadows.values, inside)
    assert LiRA("online").variance_for(lopsided) == "global"
    assert LiRA("offline").variance_for(lopsided) == "per-example"  # which reads only those not trained on it
    assert LiRA("online", "per-example").variance_for(lopsided) == "per-example"


def test_64_models_in_turn_are_attacked_with_a_global_variance():
    models = halves(64)
    assert LiRA("online").variance_for(models.without(0)) == "global"


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("mode", MODES)
def test_random_labels_give_chance(mode, variance):
    models = gaussian(33, 4_000, distance=0.0, seed=2)
    found = area(LiRA(mode, variance)(models.take([0]), models.without(0)), models.inside[0])
    deviation = sqrt(4_001 / (12 * models.inside[0].sum() * (~models.inside[0]).sum()))  # Mann and Whitney 1947
    assert abs(found - 0.5) < 3 * deviation
    real = gaussian(33, 4_000, distance=0.5, seed=2)
    assert area(LiRA(mode, variance)(real.take([0]), real.without(0)), real.inside[0]) > 0.5 + 5 * deviation


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("mode", MODES)
def test_permuted_examples_have_permuted_scores(mode, variance):
    models = gaussian(24, 50, seed=4)
    order = default_rng(0).permutation(50)
    moved = Signals(models.values[:, order], models.inside[:, order])
    scores = [LiRA(mode, variance)(each.take([0]), each.without(0)) for each in (models, moved)]
    np.testing.assert_allclose(scores[1], scores[0][order], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("variance", VARIANCES)
def test_offline_never_reads_models_that_were_trained_on_the_example(variance):
    models = gaussian(24, 50, seed=4)
    target, shadows = models.take([0]), models.without(0)
    spoilt = Signals(np.where(shadows.inside, 1e300, shadows.values), shadows.inside)
    attack = LiRA("offline", variance)
    np.testing.assert_array_equal(attack(target, spoilt), attack(target, shadows))
    half = Signals(np.where(shadows.inside, shadows.values + 1, shadows.values), shadows.inside)
    assert not np.allclose(LiRA("online", variance)(target, half), LiRA("online", variance)(target, shadows))


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("far", [-1e4, 1e4, -3e38, 3e38])
def test_extreme_signals_have_finite_scores(mode, variance, far):
    models = gaussian(12, 8, seed=6)
    values = models.values.copy()
    values[0] = far
    values[3, 2] = far
    scores = LiRA(mode, variance)(Signals(values[:1], models.inside[:1]), Signals(values[1:], models.inside[1:]))
    assert np.isfinite(scores).all()


@pytest.mark.parametrize("level", [0.0, 16.635532, -1e4])
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("mode", MODES)
def test_models_that_all_agree_leave_a_floor_for_the_spread(mode, variance, level):
    inside = halves(8, 3).inside
    shadows = Signals(np.full((8, 3), level), inside)
    target = Signals(np.array([[level, level + 1e-3, level - 1e-3]]), inside[:1])
    scores = LiRA(mode, variance)(target, shadows)
    assert np.isfinite(scores).all()
    assert scores[0] == 0  # as all models say
    if mode == "offline":
        assert scores[2] < 0 < scores[1]
    else:
        np.testing.assert_array_equal(scores, 0.0)  # in and out models are the same


def test_floor_is_the_rounding_of_float32():
    inside = halves(8, 1).inside
    values = np.where(inside, 5.0, 4.0)
    scores = LiRA("online", "global")(Signals(np.array([[5.0]]), inside[:1]), Signals(values, inside))
    wide_in, wide_out = 5 * 2.0**-23, 4 * 2.0**-23
    assert scores == pytest.approx((1 / wide_out) ** 2 / 2 + log(wide_out / wide_in), rel=1e-12)


def test_offline_keeps_apart_what_a_tail_rounds_to_one():
    shadows = gaussian(40, 1, seed=8)
    ladder = [float(shadows.values.mean()) + step for step in (-60, -50, 9, 10, 50, 60)]
    scores = [LiRA("offline")(Signals(np.array([[x]]), shadows.inside[:1]), shadows)[0] for x in ladder]
    assert (np.diff(scores) > 0).all()


@pytest.mark.parametrize("mode", MODES)
def test_pooled_over_sixteen_models(mode):
    models = gaussian(16, 300, 2.0, seed=9)
    kept = np.minimum(models.inside.sum(0), (~models.inside).sum(0)) >= 3
    models = Signals(models.values[:, kept], models.inside[:, kept])
    found = LiRA(mode).pooled(models)
    assert found.scores.shape == (16, kept.sum())
    np.testing.assert_array_equal(found.scores[5], LiRA(mode)(models.take([5]), models.without(5)))
    assert area(found.scores, found.members) > 0.85


def test_more_queries_tell_more():
    alone = gaussian(108, 1_000, 1.0, seed=10)
    asked = gaussian(108, 1_000, 1.0, seed=10, queries=4)
    better = attacked(LiRA("online"), asked, 8)
    assert better == pytest.approx(NormalDist().cdf(2 / sqrt(2)), abs=0.02)  # 4 queries: twice the distance
    assert better > attacked(LiRA("online"), alone, 8) + 0.1


def test_too_few_models_are_refused_with_the_number_and_the_way_out():
    models = gaussian(12, 5, seed=1)
    inside = models.inside.copy()
    inside[:, 3] = False
    inside[2, 3] = True
    models = Signals(models.values, inside)
    target = models.take([0])
    with pytest.raises(InvalidArgument, match=r"1 of 5 .* fewer than 2 .* trained on .*example 3: 1.*mode='offline'"):
        LiRA("online")(target, models.without(0))
    assert LiRA("offline")(target, models.without(0)).shape == (5,)
    all_in = Signals(models.values, np.ones_like(inside))
    with pytest.raises(InvalidArgument, match="5 of 5 examples have fewer than 2 shadow models not trained on"):
        LiRA("offline")(target, all_in)


def test_bad_input_is_refused():
    models = gaussian(12, 5)
    with pytest.raises(InvalidArgument, match="LiRA: needs shadow models"):
        LiRA("offline")(models.take([0]))
    with pytest.raises(InvalidArgument, match="expected signals of one model"):
        LiRA("offline")(models, models)
    with pytest.raises(InvalidArgument, match="expected examples and queries"):
        LiRA("offline")(models.take([0]), gaussian(12, 6))
    with pytest.raises(InvalidArgument, match="did you mean 'offline'"):
        LiRA("offlin")
    with pytest.raises(InvalidArgument, match="variance='shared'"):
        LiRA("online", "shared")


def test_input_is_left_alone_and_the_report_can_name_what_was_used():
    models = gaussian(12, 5)
    before = models.values.copy()
    LiRA("offline")(models.take([0]), models.without(0))
    np.testing.assert_array_equal(models.values, before)
    assert "trained on each judged example" in LiRA("online").used[1]
    assert LiRA("offline").used[1] == "shadow models not trained on it"
    assert repr(LiRA("offline")) == "LiRA(mode='offline', variance='automatic')"
