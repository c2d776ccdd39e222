"""Halves: every example in exactly half of the models, drawn by itself; and who is asked for what."""

from __future__ import annotations

from math import sqrt

import numpy as np
import pytest

from privfm.attacks.membership.halves import halves, shadow_signals
from privfm.attacks.membership.lira import LiRA
from privfm.checks import InvalidArgument
from privfm.contracts.membership import Signals


def test_every_example_is_in_exactly_half_of_the_models():
    inside = halves(64, 1000, np.random.default_rng(1))
    assert inside.shape == (64, 1000)
    assert inside.dtype == np.bool_
    assert (inside.sum(0) == 32).all()


def test_models_hold_about_half_each_and_not_exactly():
    sizes = halves(64, 1000, np.random.default_rng(2)).sum(1)
    assert sizes.sum() == 32 * 1000
    # Of 64 binomial draws with p = 1/2, five deviations are exceeded once in 27,000 times.
    assert np.abs(sizes - 500).max() < 5 * sqrt(1000) / 2
    assert 0.6 < sizes.std() / (sqrt(1000) / 2) < 1.4, "rows of equal size would bind the examples to each other"


def test_examples_are_drawn_by_themselves():
    inside = halves(16, 4000, np.random.default_rng(3))
    together = np.corrcoef(inside[:, ::2].ravel(), inside[:, 1::2].ravel())[0, 1]
    assert abs(together) < 5 / sqrt(16 * 2000)
    # Two models share an example with probability (m / 2 - 1) / (m - 1) / 2, by the hypergeometric draw of a column.
    shared = np.mean([(inside[a] & inside[b]).mean() for a in range(16) for b in range(a)])
    assert shared == pytest.approx(7 / 15 / 2, abs=1e-12), "exact: a column has 28 pairs of 120"


def test_every_column_is_as_likely_as_every_other():
    inside = halves(4, 6000, np.random.default_rng(4))
    counts = np.unique(np.array([1, 2, 4, 8]) @ inside, return_counts=True)
    assert counts[0].tolist() == [3, 5, 6, 9, 10, 12]
    # Chi-square with 5 degrees of freedom: 25.7 is exceeded once in 10,000 times.
    assert float(((counts[1] - 1000) ** 2 / 1000).sum()) < 25.7


def test_the_draw_is_the_generators():
    first, again = (halves(8, 50, np.random.default_rng(5)) for _ in range(2))
    assert (first == again).all()
    assert (first != halves(8, 50, np.random.default_rng(6))).any()


@pytest.mark.usefixtures("untouched_random_state")
def test_no_global_state():
    halves(8, 50, np.random.default_rng(5))


@pytest.mark.parametrize(("models", "examples"), [(3, 10), (0, 10), (1, 10), (4, 0), (2, 1)])
def test_what_has_no_halves_is_refused(models, examples):
    with pytest.raises(InvalidArgument, match=r"models|examples"):
        halves(models, examples, np.random.default_rng(0))


# Signals


def toy(effect: float, seed: int = 0):
    """A model is its flags and noise; an example's signal is higher by `effect` at the models that hold it."""

    def train(inside):
        return inside.copy(), np.random.default_rng(seed)

    def signal(models):
        flags, generator = models
        return effect * flags + generator.normal(size=flags.shape)

    return train, signal


def test_signals_are_those_of_the_models_in_their_order():
    inside = halves(4, 30, np.random.default_rng(7))
    found = shadow_signals(
        lambda flags: [set(np.flatnonzero(row).tolist()) for row in flags],
        lambda models: np.array([[float(place in held) for place in range(30)] for held in models]),
        inside,
        lambda models: np.array([[len(held), 7.0] for held in models]),
    )
    assert isinstance(found, Signals)
    assert (found.values == inside).all()
    assert (found.inside == inside).all()
    assert (found.population == np.stack([inside.sum(1), np.full(4, 7)], 1)).all()


def test_there_may_be_no_population_and_several_queries():
    inside = halves(4, 30, np.random.default_rng(7))
    found = shadow_signals(lambda flags: flags, lambda flags: np.stack([flags * 1.0, flags * 2.0], 2), inside)
    assert found.values.shape == (4, 30, 2)
    assert found.population is None


def test_a_trainer_does_not_change_the_truth():
    inside = halves(4, 30, np.random.default_rng(7))
    before = inside.copy()

    def rude(flags):
        flags[:] = True
        return flags

    found = shadow_signals(rude, lambda flags: flags * 1.0, inside)
    assert (found.inside == before).all()
    assert (inside == before).all()
    inside[:] = False
    assert (found.inside == before).all()


def test_an_attack_finds_members_by_such_signals_and_only_where_there_is_an_effect():
    from privfm.attacks.membership.curves import auc

    inside = halves(32, 400, np.random.default_rng(8))
    none, some = (auc(LiRA("online").pooled(shadow_signals(*toy(effect), inside))) for effect in (0.0, 1.0))
    # 12,800 scores, not independent within an example: 3 deviations of 400 examples are 0.05 at most.
    assert abs(none - 0.5) < 0.05
    assert some > 0.7, "the optimum is Phi(1 / sqrt 2) = 0.76"


def test_what_does_not_fit_is_refused():
    inside = halves(4, 30, np.random.default_rng(7))
    train, _ = toy(0.0)
    with pytest.raises(InvalidArgument, match="inside \\(4, 30\\): expected \\(4, 29\\)"):
        shadow_signals(train, lambda models: np.zeros((4, 29)), inside)
    with pytest.raises(InvalidArgument, match="not finite"):
        shadow_signals(train, lambda models: np.full((4, 30), np.nan), inside)
    with pytest.raises(InvalidArgument, match="type float64"):
        shadow_signals(train, lambda models: np.zeros((4, 30)), inside.astype(float))
    with pytest.raises(InvalidArgument, match="expected \\(models, n\\)"):
        shadow_signals(train, lambda models: np.zeros(30), inside[0])
    with pytest.raises(InvalidArgument, match=r"models \[1\] are trained on none or all"):
        shadow_signals(train, lambda models: np.zeros((2, 3)), np.array([[True, False, True], [False] * 3]))
    with pytest.raises(InvalidArgument, match=r"models \[0\] are trained on none or all"):
        shadow_signals(train, lambda models: np.zeros((2, 3)), np.array([[True] * 3, [True, False, True]]))
