"""Audits of other people's code: one run, many runs, and callables that do not do what they should."""

import numpy as np
import pytest

from privfm.attacks.audit.callables import audit
from privfm.attacks.audit.clopper_pearson import DeclaredThreshold
from privfm.attacks.audit.guesses import Declared
from privfm.attacks.audit.one_run import one_run
from privfm.attacks.audit.one_run_fdp import GaussianFamily, one_run_fdp
from privfm.checks import InvalidArgument

DELTA = 1e-5
MU_4 = 0.924930898
"""mu of a Gaussian mechanism with epsilon 4 at delta 1e-5."""


def noisy(mu, seed):
    """Training as noise on the canaries' bits: a mu-GDP mechanism."""
    noise = np.random.default_rng(seed)
    return lambda included: mu * included + noise.normal(size=included.shape)


def as_it_is(model):
    return model


def test_one_run_is_the_bound_of_its_own_scores_and_coins():
    found = audit(
        noisy(MU_4, 1),
        as_it_is,
        canaries=4000,
        delta=DELTA,
        generator=np.random.default_rng(2),
        guesses=Declared((100, 400)),
        family=GaussianFamily(),
    )
    run = np.array(found.scores), np.array(found.included)
    assert found.bounds == (
        one_run(*run, DELTA, guesses=Declared((100, 400))),
        one_run_fdp(*run, DELTA, family=GaussianFamily(), guesses=Declared((100, 400))),
    )
    assert 0.5 < found.bounds[0].epsilon < found.bounds[1].epsilon <= 4
    assert found.estimate is not None and found.estimate.low < 4 < found.estimate.high


def test_many_runs_flip_one_coin_each():
    seen = []
    train = noisy(2.0, 3)

    def recorded(included):
        seen.append(bool(included[0]))
        return train(included)

    found = audit(
        recorded,
        as_it_is,
        canaries=1,
        runs=400,
        delta=DELTA,
        generator=np.random.default_rng(4),
        threshold=DeclaredThreshold((3.0,)),
    )
    assert tuple(seen) == found.included and 150 < sum(seen) < 250
    (bound,) = found.bounds
    assert bound.method == "Clopper-Pearson" and bound.canaries == 400 and 0 < bound.epsilon < 10


def test_the_same_generator_gives_the_same_audit_and_another_other_coins():
    def once(seed):
        return audit(noisy(1.0, 7), as_it_is, canaries=100, delta=DELTA, generator=np.random.default_rng(seed))

    assert once(0) == once(0)
    assert once(0).included != once(1).included


def test_a_trainer_that_ignores_its_canaries_gets_zero():
    above = 0
    for seed in range(40):
        found = audit(
            lambda included, seed=seed: np.random.default_rng(seed).normal(size=included.shape),
            as_it_is,
            canaries=500,
            delta=DELTA,
            generator=np.random.default_rng(1000 + seed),
        )
        above += found.bounds[0].epsilon > 0
    assert above <= 5


def test_a_trainer_that_leaks_everything_reaches_the_ceiling():
    found = audit(as_it_is, lambda model: model, canaries=500, delta=0.0, generator=np.random.default_rng(0))
    assert found.bounds[0].epsilon == found.bounds[0].ceiling > 3 and found.estimate is None


def test_the_trainer_cannot_bend_the_coins():
    def bends(included):
        included[:] = True
        return np.zeros(len(included))

    found = audit(bends, as_it_is, canaries=200, delta=DELTA, generator=np.random.default_rng(0))
    assert 60 < sum(found.included) < 140


@pytest.mark.parametrize(
    ("score", "named"),
    [
        (lambda model: model[:-1], r"\(100,\), one for each canary"),
        (lambda model: model[:, None], r"\(100,\), one for each canary"),
        (lambda model: 1.0, r"\(100,\), one for each canary"),
        (lambda model: np.where(np.arange(100) < 3, np.nan, model), "3 NaN of 100"),
        (lambda model: ["good"] * 100, "expected 100 numbers"),
        (lambda model: {"loss": 1.0}, "expected 100 numbers"),
    ],
)
def test_callables_that_do_not_do_what_they_should(score, named):
    with pytest.raises(InvalidArgument, match=named):
        audit(noisy(1.0, 0), score, canaries=100, delta=DELTA, generator=np.random.default_rng(0))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"canaries": 10, "runs": 20}, "one canary in many runs"),
        ({"canaries": 1, "runs": 2}, "runs=2"),
        ({"canaries": 7}, "canaries=7"),
        ({"confidence": 1.0}, "confidence"),
        ({"delta": 1.0}, "delta"),
    ],
)
def test_what_is_refused_before_anything_is_trained(change, named):
    def never(included):
        raise AssertionError("trained although the audit cannot be made")

    arguments = {"canaries": 100, "delta": DELTA, "generator": np.random.default_rng(0)} | change
    with pytest.raises(InvalidArgument, match=named):
        audit(never, as_it_is, **arguments)


def test_errors_of_the_trainer_pass_through():
    def fails(included):
        raise KeyError("data")

    with pytest.raises(KeyError, match="data"):
        audit(fails, as_it_is, canaries=100, delta=DELTA, generator=np.random.default_rng(0))
