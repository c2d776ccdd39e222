"""Counts of guesses: by rank, declared and paid for, chosen on a half, or planned by simulation."""

import numpy as np
import pytest

from privfm.attacks.audit.guesses import Declared, Split, check_run, correct, planned, ranked, spread
from privfm.attacks.audit.one_run import one_run
from privfm.checks import InvalidArgument

DELTA = 1e-5


def run_of(m, mu, seed):
    generator = np.random.default_rng(seed)
    coins = generator.random(m) < 0.5
    return mu * coins + generator.normal(size=m), coins


def recorded(calls):
    """A method that notes what it is asked and answers with the share of right guesses."""

    def bounding(m, guesses, correct, error, *, chosen):
        calls.append((m, guesses, correct, error, chosen))
        return correct / guesses

    return bounding


def test_guesses_are_counted_by_rank():
    order = ranked(np.array([0.1, 5.0, -2.0, 3.0, 0.0, 1.0]))
    included = np.array([False, True, True, False, False, True])
    assert order.tolist() == [2, 4, 0, 5, 3, 1]
    assert correct(order, included, 1, "high") == (1, 1)  # canary 1 is in
    assert correct(order, included, 2, "high") == (2, 1)  # canary 3 is not
    assert correct(order, included, 1, "two") == (2, 1)  # canary 2, the lowest, is in after all
    assert correct(order, included, 3, "two") == (6, 4)


def test_equal_scores_are_ordered_alike_whatever_the_coins_and_not_as_the_caller_lists_them():
    order = ranked(np.zeros(1000))
    assert sorted(order.tolist()) == list(range(1000)) and (order == ranked(np.ones(1000))).all()
    assert 400 < (order[:500] < 500).sum() * 2 < 600


def test_declared_counts_share_the_error_and_the_best_is_told():
    scores, coins = run_of(1000, 0.5, 0)
    calls = []
    found = Declared((10, 50, 250)).certify(scores, coins, 0.06, recorded(calls))
    assert {call[3] for call in calls} == {0.02} and {call[0] for call in calls} == {1000}
    assert {call[1] for call in calls} == {20, 100, 500} and not any(call[4] for call in calls)
    shares = {call[1]: call[2] / call[1] for call in calls if call[1] != call[2]}
    assert found.epsilon == max(shares.values()) == found.correct / found.guesses
    assert (found.tries, found.ceiling) == (3, 1.0)


def test_bonferroni_costs_and_no_order_of_counts_matters():
    run = run_of(5000, 1.0, 3)
    alone = one_run(*run, DELTA, guesses=Declared((100,)))
    among = one_run(*run, DELTA, guesses=Declared((100, 2499)))
    assert 0 < among.epsilon < alone.epsilon and among.guesses == 200
    assert among == one_run(*run, DELTA, guesses=Declared((2499, 100)))


def test_a_split_bounds_with_the_other_half_alone():
    scores, coins = run_of(1000, 1.5, 1)
    rule = Split((50,), seed=4)
    first = np.random.default_rng(4).permutation(1000)[:500]
    flipped = coins.copy()
    flipped[first] = ~flipped[first]
    calls = []
    found = rule.certify(scores, coins, 0.05, recorded(calls))
    assert found == rule.certify(scores, flipped, 0.05, recorded([]))
    assert found.tries == 1 and {call[0] for call in calls} == {500} and all(call[4] for call in calls)
    assert {call[3] for call in calls} == {0.05}


def test_a_split_chooses_on_the_first_half_alone():
    scores, coins = run_of(2000, 1.5, 1)
    rule = Split((10, 50, 400), seed=4)
    second = np.random.default_rng(4).permutation(2000)[1000:]
    before = rule.certify(scores, coins, 0.05, recorded([]))
    changed = scores.copy()
    changed[second] = -changed[second]
    after = rule.certify(changed, coins, 0.05, recorded([]))
    assert after.guesses == before.guesses and after.correct < before.correct


def test_an_unfair_choice_on_the_same_half_would_show():
    # The control of the control: the best of many counts after the fact, unpaid, is above 0 far more often than 5 %.
    counts = tuple(range(2, 60))
    unpaid, split = 0, 0
    for seed in range(40):
        generator = np.random.default_rng(seed)
        run = generator.normal(size=400), generator.random(400) < 0.5
        unpaid += any(one_run(*run, 0.0, guesses=Declared((count,), "high")).epsilon > 0 for count in counts)
        split += one_run(*run, 0.0, guesses=Split(counts, "high")).epsilon > 0
    assert unpaid > 5 >= split


def test_planned_finds_the_count_that_a_grid_over_other_runs_finds_good():
    m, mu = 4000, 1.0

    def certify(scores, coins, guesses):
        return one_run(scores, coins, DELTA, guesses=guesses)

    plan = planned(lambda generator: run_of(m, mu, generator), m, certify, np.random.default_rng(7), runs=12)
    again = planned(lambda generator: run_of(m, mu, generator), m, certify, np.random.default_rng(7), runs=12)
    assert plan == again and len(plan.counts) == 1

    def mean(rule):
        return np.mean([certify(*run_of(m, mu, seed), rule).epsilon for seed in range(100, 110)])

    others = [mean(Declared((count,), plan.sides)) for count in (4, 20, 60, 200, 600, 2000)]
    assert mean(plan) >= 0.85 * max(others) and mean(plan) > 1.5 * min(others)
    assert mean(plan) > mean(Declared((4, 20, 60, 200, 600, 2000)))  # what guessing at the count would have paid


def test_planned_sees_that_low_scores_of_a_sampled_run_tell_nothing():
    def simulate(generator):
        coins = generator.random(2000) < 0.5
        seen = coins & (generator.random(2000) < 0.2)
        return np.where(seen, 6.0, 0.0) + generator.normal(size=2000), coins

    plan = planned(
        simulate,
        2000,
        lambda scores, coins, guesses: one_run(scores, coins, DELTA, guesses=guesses),
        np.random.default_rng(0),
        runs=6,
    )
    assert plan.sides == "high" and 80 <= plan.counts[0] <= 320


def test_spread_fits_any_number_of_canaries():
    assert spread(10_000).counts == (25, 75, 250, 750, 2000)
    for m in (8, 20, 100, 10**6):
        assert all(1 <= count <= m // 2 for count in spread(m).counts)


def test_coins_may_be_zeros_and_ones():
    _, coins = check_run(np.zeros(8), [0, 1, 0, 1, 1, 0, 0, 1])
    assert coins.dtype == bool and coins.sum() == 4


@pytest.mark.parametrize(
    "attempt",
    [
        lambda: Declared(()),
        lambda: Declared((0,)),
        lambda: Declared((5, 5)),
        lambda: Declared((5,), "low"),
        lambda: Split(()),
        lambda: Split((5,), seed=-1),
        lambda: check_run(np.zeros(7), np.zeros(7, dtype=bool)),
        lambda: correct(np.arange(10), np.zeros(10, dtype=bool), 6, "two"),
        lambda: planned(lambda generator: run_of(50, 1.0, 0), 60, one_run, np.random.default_rng(0)),
        lambda: planned(lambda generator: run_of(60, 1.0, 0), 60, one_run, np.random.default_rng(0), sides=()),
        lambda: planned(lambda generator: run_of(60, 1.0, 0), 60, one_run, np.random.default_rng(0), runs=0),
        lambda: planned(lambda generator: run_of(60, 1.0, 0), 60, one_run, np.random.default_rng(0), quantile=1.5),
        lambda: planned(lambda generator: run_of(60, 1.0, 0), 60, one_run, np.random.default_rng(0), counts=()),
    ],
)
def test_what_is_refused(attempt):
    with pytest.raises(InvalidArgument):
        attempt()
