"""What every public membership attack keeps to. A new one in `__all__` goes through all of this by itself."""

from __future__ import annotations

from dataclasses import MISSING, fields, is_dataclass, replace
from typing import Any

import numpy as np
import pytest

from privfm.attacks import membership
from privfm.attacks.membership import CalibratedByBase, LiRA, QuantileRegression, auc
from privfm.checks import InvalidArgument
from privfm.contracts import MembershipAttack, Scored, Signals

N, MODELS = 120, 24
SAMPLES: dict[str, Any] = {"mode": "online", "base": -np.linspace(1, 2, N)}
"""Values of the fields that attacks require, by name."""


def attacks() -> list[MembershipAttack]:
    found = []
    for name in membership.__all__:
        kind = getattr(membership, name)
        if isinstance(kind, type) and issubclass(kind, MembershipAttack):
            assert is_dataclass(kind)
            needed = [f.name for f in fields(kind) if f.init and f.default is MISSING and f.default_factory is MISSING]
            found.append(kind(**{name: SAMPLES[name] for name in needed}))
    features = np.random.default_rng(5).normal(size=(N + 240, 3))
    return [*found, QuantileRegression(iterations=20).on(features[:N], features[N:])]


ATTACKS = attacks()
names = pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: type(attack).__name__)


def signals(seed: int = 0, effect: float = 1.5) -> Signals:
    """Log-probabilities of models whose members fit better by so many deviations."""
    generator = np.random.default_rng(seed)
    inside = generator.random((MODELS, N)) < 0.5
    hardness = generator.normal(size=N)
    values = -np.exp(0.4 * (hardness - effect * inside + generator.normal(size=(MODELS, N))))
    return Signals(values, inside, -np.exp(0.4 * generator.normal(size=(MODELS, 240))))


def scored(attack: MembershipAttack, of: Signals) -> Scored:
    return Scored(attack(of.take([0]), of.without(0)), of.inside[0])


@names
def test_members_are_found(attack: MembershipAttack) -> None:
    assert auc(scored(attack, signals())) > 0.65


@names
def test_random_labels_are_chance(attack: MembershipAttack) -> None:
    found = [auc(scored(attack, signals(seed, effect=0.0))) for seed in range(12)]
    assert abs(np.mean(found) - 0.5) < 3 * 0.053 / 12**0.5  # deviation of one: sqrt((n + 1) / (12 n_in n_out))


@names
def test_the_truth_about_the_target_is_not_read(attack: MembershipAttack) -> None:
    of = signals()
    target = of.take([0])
    lied = replace(target, inside=~target.inside)
    np.testing.assert_array_equal(attack(target, of.without(0)), attack(lied, of.without(0)))


@names
def test_inputs_stay_and_the_same_comes_out_again(attack: MembershipAttack) -> None:
    of = signals()
    before = of.values.copy(), of.inside.copy()
    first = attack(of.take([0]), of.without(0))
    np.testing.assert_array_equal(first, attack(of.take([0]), of.without(0)))
    np.testing.assert_array_equal(of.values, before[0])
    np.testing.assert_array_equal(of.inside, before[1])
    assert first.shape == (N,) and first.dtype == np.float64 and not np.isnan(first).any()


@names
def test_a_better_fit_never_looks_less_like_a_member(attack: MembershipAttack) -> None:
    if isinstance(attack, LiRA):  # online, a value beyond both fitted Gaussians is likelier under the wider one
        attack = replace(attack, mode="offline")
    of = signals()
    target = of.take([0])
    values = target.values.copy()
    values[0, 7] = 0.0  # certainty
    better = replace(target, values=values)
    assert attack(better, of.without(0))[7] >= attack(target, of.without(0))[7]


@names
def test_extreme_signals_give_numbers(attack: MembershipAttack) -> None:
    of = signals()
    values = of.values.copy()
    values[:, 3], values[0, 4] = -1e4, -1e4
    assert not np.isnan(attack(replace(of, values=values).take([0]), replace(of, values=values).without(0))).any()


@names
def test_what_does_not_fit_is_refused(attack: MembershipAttack) -> None:
    of = signals()
    with pytest.raises(InvalidArgument, match="signals of one model"):
        attack(of, of)
    fewer = Signals(of.values[:, :50], of.inside[:, :50], of.population)
    with pytest.raises(InvalidArgument, match="examples and queries"):
        attack(of.take([0]), fewer.without(0))


@names
def test_what_an_attacker_must_have_is_said(attack: MembershipAttack) -> None:
    assert all(isinstance(item, str) and item for item in attack.used)
    assert isinstance(attack.used, tuple)


def test_signals_and_scores_that_say_nothing_are_refused() -> None:
    of = signals()
    for values, inside, population, message in (
        (of.values[0], of.inside[0], None, "expected \\(models, n\\)"),
        (of.values, of.inside.astype(float), None, "expected bool"),
        (of.values, of.inside[:, :5], None, "for each value"),
        (np.full_like(of.values, np.inf), of.inside, None, "not finite"),
        (of.values, of.inside, of.population[:3], "population"),
    ):
        with pytest.raises(InvalidArgument, match=message):
            Signals(values, inside, population)
    with pytest.raises(InvalidArgument, match="nothing to tell apart"):
        Scored(np.zeros(4), np.ones(4, dtype=bool))
    with pytest.raises(InvalidArgument, match="NaN"):
        Scored(np.array([0.0, np.nan]), np.array([True, False]))


def test_pooled_attacks_every_model_by_the_others() -> None:
    of = signals()
    pooled = CalibratedByBase(SAMPLES["base"]).pooled(of)
    assert pooled.scores.shape == (MODELS, N)
    np.testing.assert_array_equal(pooled.members, of.inside)
    with pytest.raises(InvalidArgument, match="at least 2"):
        CalibratedByBase(SAMPLES["base"]).pooled(of.take([0]))
