"""FedMIA against a slow loop over the paper's equations; uniform p-values without members; trajectories."""

from __future__ import annotations

from collections.abc import Callable
from math import erfc, inf, nan, sqrt

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats
from sklearn.metrics import roc_auc_score

from privfm.attacks.membership.across_rounds import FedMIA, Temporal, UpdateTraces
from privfm.checks import InvalidArgument

Array = NDArray[np.float64]


def drawn(rounds: int, clients: int, examples: int, seed: int) -> Array:
    return np.random.default_rng(seed).standard_normal((rounds, clients, examples))


def by_the_paper(scores: Array, target: int, cut: float = 3.0) -> list[float]:
    """Equations 8 to 12 for one example after the other, without NaN in use: mean of lower tails."""
    found = []
    for example in range(scores.shape[2]):
        tails = []
        for now in range(len(scores)):
            if np.isnan(scores[now, target, example]):
                continue
            others = [x for k, x in enumerate(scores[now, :, example]) if k != target and not np.isnan(x)]
            if len(others) < 2:
                continue
            mean = sum(others) / len(others)
            spread = sqrt(sum((x - mean) ** 2 for x in others) / len(others))
            others = [x for x in others if not x > mean + cut * spread]
            mean = sum(others) / len(others)
            spread = sqrt(sum((x - mean) ** 2 for x in others) / len(others))
            tails.append(0.5 * erfc(-(scores[now, target, example] - mean) / (spread * sqrt(2))))
        found.append(sum(tails) / len(tails))
    return found


def test_plain_mean_is_the_papers_less_one() -> None:
    scores = drawn(4, 15, 30, seed=0)
    scores[0, 3] = nan  # the target does not take part
    scores[1, 5:9] = nan  # some others do not
    scores[2, [0, 1, 2, 4, *range(6, 15)]] = nan  # the target and one other: no null
    scores[3, 7, :10] += 30  # beyond the cut of the others of examples 0 to 9: left out there, once
    with np.errstate(invalid="raise", divide="raise"):
        found = FedMIA()(scores, 3)
    np.testing.assert_allclose(found + 1, by_the_paper(scores, 3), atol=1e-12)
    whole = FedMIA(cut=inf)(scores, 3)
    assert np.abs(whole - found)[:10].min() > 1e-3  # the cut does something, and only where it should
    np.testing.assert_allclose(whole + 1, by_the_paper(scores, 3, cut=inf), atol=1e-12)
    np.testing.assert_allclose(whole[10:], found[10:], atol=0.2)
    p = FedMIA().p_values(scores, 3)
    assert np.isnan(p[[0, 2]]).all() and np.isfinite(p[[1, 3]]).all()
    np.testing.assert_allclose(FedMIA(combine="log")(scores, 3), -np.log(p[[1, 3]]).mean(0))


def test_far_tails_keep_their_order() -> None:
    scores = np.zeros((1, 4, 3))
    scores[0, 1:] = np.array([-1.0, 0.0, 1.0])[:, None]
    scores[0, 0] = 20.0, 25.0, 100.0  # Phi is 1 in float64 from 8.3 deviations
    assert np.all(np.diff(FedMIA()(scores, 0)[:2]) > 0)
    assert np.all(np.diff(FedMIA(combine="log")(scores, 0)) > 0)


def test_p_values_are_uniform_without_members_and_not_where_the_others_hold_the_example() -> None:
    scores = drawn(1, 6, 4000, seed=1)
    student = FedMIA(tail="student", cut=inf)
    assert stats.kstest(student.p_values(scores, 0)[0], "uniform").pvalue > 0.01
    held = scores.copy()
    held[0, 1:] += 1.0  # the null clients secretly hold them: the null is too high
    assert stats.kstest(student.p_values(held, 0)[0], "uniform").pvalue < 1e-6
    member = scores.copy()
    member[0, 0] += 1.0
    assert stats.kstest(student.p_values(member, 0)[0], "uniform", alternative="greater").pvalue < 1e-6
    # The paper's own tail is not uniform with five others: far too many small ones. It ranks, it does not test.
    normal = FedMIA(cut=inf).p_values(scores, 0)[0]
    assert stats.kstest(normal, "uniform").pvalue < 1e-6
    assert 4 < (normal < 0.01).mean() / 0.01 < 9
    assert (student.p_values(scores, 0)[0] < 0.01).mean() / 0.01 < 2


def test_student_is_the_two_sample_t_of_one_against_many() -> None:
    scores = drawn(1, 7, 5, seed=2)
    for example in range(5):
        oracle = stats.ttest_ind(scores[0, :1, example], scores[0, 1:, example], alternative="greater").pvalue
        assert FedMIA("student", cut=inf).p_values(scores, 0)[0, example] == pytest.approx(oracle)


def test_members_are_found_and_named() -> None:
    scores = drawn(5, 10, 200, seed=3)
    owners = np.r_[np.arange(100) % 10, np.full(100, -1)]
    for example, owner in enumerate(owners[:100]):
        scores[:, owner, example] += 2.0
    attack = FedMIA()
    pooled = np.stack([attack(scores, client) for client in range(10)])
    members = owners == np.arange(10)[:, None]
    outside = np.broadcast_to(owners == -1, members.shape)
    assert roc_auc_score(members[members | outside], pooled[members | outside]) > 0.95
    foreign = (owners >= 0) & ~members
    assert roc_auc_score(foreign[foreign | outside], pooled[foreign | outside]) < 0.55
    assert (attack.owners(scores)[:100] == owners[:100]).mean() > 0.9
    chance = attack.owners(drawn(5, 10, 2000, seed=4))
    assert abs((chance == 0).mean() - 0.1) < 4 * sqrt(0.1 * 0.9 / 2000)
    # Against the other clients, an example that is easy for everybody is no member: the plain score says it is.
    easy = drawn(5, 10, 400, seed=5)
    easy += 5 * np.random.default_rng(6).standard_normal(400)
    easy[:, 0, :200] += 2.0
    truth = np.arange(400) < 200
    assert roc_auc_score(truth, attack(easy, 0)) > 0.95 > 0.65 > roc_auc_score(truth, easy[:, 0].mean(0))


def test_random_labels_are_chance() -> None:
    scores, members = drawn(3, 8, 3000, seed=7), np.random.default_rng(8).random(3000) < 0.5
    assert abs(roc_auc_score(members, FedMIA()(scores, 0)) - 0.5) < 3 * sqrt(1 / (6 * 1500))


def test_equal_scores_of_the_others_say_above_equal_or_below() -> None:
    scores = np.zeros((1, 3, 3))
    scores[0, 0] = 1.0, 0.0, -1.0
    for tail in ("normal", "student"):
        assert FedMIA(tail)(scores, 0).tolist() == [-0.0, -0.5, -1.0]


def test_traces_gather_rounds() -> None:
    traces = UpdateTraces(3, 2)
    with pytest.raises(InvalidArgument, match="no round"):
        _ = traces.scores
    given = np.array([[1.0, 2.0], [3.0, 4.0]])
    traces.add((2, 0), given)
    traces.add((), np.zeros((0, 2)))
    given[:] = 0  # what was added does not change afterwards
    assert len(traces) == 2
    expected = [[[3.0, 4.0], [nan, nan], [1.0, 2.0]], [[nan, nan]] * 3]
    np.testing.assert_array_equal(traces.scores, expected)
    for ids, scores, says in (
        ((0, 0), np.zeros((2, 2)), "twice"),
        ((3,), np.zeros((1, 2)), "clients 0 to 2"),
        ((0,), np.zeros((1, 3)), "expected \\(1, 2\\)"),
        ((0,), np.array([[nan, 0.0]]), "not finite"),
    ):
        with pytest.raises(InvalidArgument, match=says):
            traces.add(ids, scores)


def test_trajectories_by_hand_and_by_a_regression() -> None:
    values = drawn(6, 1, 9, seed=9)[:, 0]
    values[[1, 4]] = nan
    seen = values[[0, 2, 3, 5]]
    np.testing.assert_array_equal(Temporal("last")(values), values[5])
    np.testing.assert_allclose(Temporal("mean")(values), seen.mean(0))
    oracle = [stats.linregress([0, 2, 3, 5], seen[:, example]).slope for example in range(9)]
    np.testing.assert_allclose(Temporal("slope")(values), oracle)
    later = [10.0, 12.0, 14.0, 16.0, 18.0, 20.0]
    np.testing.assert_allclose(Temporal("slope")(values, later), np.array(oracle) / 2)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: FedMIA()(np.zeros((2, 3)), 0), "expected \\(rounds, clients, n\\)"),
        (lambda: FedMIA().owners(np.zeros((2, 3))), "expected \\(rounds, clients, n\\)"),
        (lambda: FedMIA()(np.zeros((2, 3, 0)), 0), "nothing is there"),
        (lambda: FedMIA()(np.zeros((2, 3, 4)), 3), "target=3"),
        (lambda: FedMIA()(np.zeros((2, 3, 4)), -1), "target=-1"),
        (lambda: FedMIA()(np.zeros((2, 2, 4)), 0), "at least 2 others"),
        (lambda: FedMIA().owners(np.zeros((2, 2, 4))), "no round has 3 clients"),
        (lambda: FedMIA()(np.full((1, 3, 2), inf), 0), "infinite"),
        (lambda: FedMIA()(np.array([[[nan, 1.0], [1.0, 1.0], [1.0, 1.0]]]), 1), "NaN in part"),
        (lambda: FedMIA(cut=1.0), "cut=1.0"),
        (lambda: FedMIA(tail="gaussian"), "tail="),
        (lambda: FedMIA(combine="sum"), "combine="),
        (lambda: Temporal("first"), "summary="),
        (lambda: Temporal("slope")(np.array([[1.0], [nan]])), "needs 2"),
        (lambda: Temporal("last")(np.full((2, 1), nan)), "needs 1"),
        (lambda: Temporal("last")(np.zeros((2, 3)), [1.0, 1.0]), "ascending"),
        (lambda: Temporal("last")(np.zeros((2, 3, 1))), "expected \\(rounds, n\\)"),
    ],
    ids=range(17),
)
def test_what_does_not_fit_is_refused(call: Callable[[], object], says: str) -> None:
    with pytest.raises(InvalidArgument, match=says):
        call()
