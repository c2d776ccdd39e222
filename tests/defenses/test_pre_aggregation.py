"""The template for mixing rules, played by a nearest-neighbour mixing written here."""

from dataclasses import dataclass, replace
from typing import final

import numpy as np
import pytest
import torch
from torch import Generator, Tensor

from privfm.checks import CohortTooSmall, InvalidArgument, NotRevealed
from privfm.contracts import MatrixView, Outcome, Reveals, Rule, State, View
from privfm.defenses import CenteredClipping, Krum, Mean, MultiKrum, PreAggregation, TrimmedMean
from privfm.defenses.gram_rules import squared_distances


@final
@dataclass(frozen=True)
class NearestNeighborMixing(PreAggregation):
    """Each update becomes the mean of its n-f nearest, itself included (Allouah et al., 2023)."""

    rule: Rule
    f: int

    @property
    def inner(self) -> Rule:
        return self.rule

    def mix(self, gram: Tensor, generator: Generator) -> Tensor:
        kept = len(gram) - self.f
        nearest = squared_distances(gram).argsort(dim=1, stable=True)[:, :kept]
        return torch.zeros_like(gram).scatter_(1, nearest, 1 / kept)


@final
@dataclass(frozen=True)
class Pairs(PreAggregation):
    """Means of two updates each, at random: half as many rows."""

    rule: Rule

    @property
    def inner(self) -> Rule:
        return self.rule

    def mix(self, gram: Tensor, generator: Generator) -> Tensor:
        order = torch.randperm(len(gram), generator=generator).reshape(-1, 2)
        return torch.zeros(len(order), len(gram), dtype=gram.dtype).scatter_(1, order, 0.5)


@final
@dataclass(frozen=True)
class Remembering(Rule):
    """A rule that asks who is who."""

    keyed = True

    @property
    def needs(self) -> Reveals:
        return Reveals.SUM

    def step(self, state: State, view: View, generator: Generator) -> tuple[State, Outcome]:
        return state, Outcome(view.total() * len(view.ids))


class CountingView(View):
    """Passes everything on and counts the Gram matrices, with their references."""

    reveals = Reveals.EACH

    def __init__(self, rows: Tensor) -> None:
        self.below = MatrixView(rows)
        self.ids, self.d, self.bad = self.below.ids, self.below.d, self.below.bad
        self.total, self.block, self.weighted_sum = self.below.total, self.below.block, self.below.weighted_sum
        self.asked: list[int] = []

    def gram(self, references: Tensor) -> Tensor:
        self.asked.append(len(references))
        return self.below.gram(references)


INNER = [Krum(2), MultiKrum(2), CenteredClipping(1.0), TrimmedMean(2), Mean()]

each_inner = pytest.mark.parametrize("inner", INNER, ids=repr)


def gaussian(n: int = 12, d: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=Generator().manual_seed(seed), dtype=torch.float64)


def slowly_mixed(rows: Tensor, f: int) -> Tensor:
    values = rows.numpy()
    mixed = []
    for row in values:
        nearest = np.argsort(((values - row) ** 2).sum(1))[: len(values) - f]
        mixed.append(values[nearest].mean(0))
    return torch.from_numpy(np.array(mixed))


def aggregated(rule: Rule, rows: Tensor) -> tuple[Outcome, CountingView]:
    view = CountingView(rows)
    return rule.aggregate(rule.init(view.d), view, Generator().manual_seed(0))[1], view


@each_inner
def test_it_equals_the_inner_rule_on_rows_mixed_by_a_slow_loop(inner):
    vector = NearestNeighborMixing(inner, f=2)(gaussian())
    torch.testing.assert_close(vector, inner(slowly_mixed(gaussian(), 2)))


@each_inner
def test_nested_twice_it_equals_two_slow_loops(inner):
    twice = NearestNeighborMixing(NearestNeighborMixing(inner, f=2), f=3)
    expected = inner(slowly_mixed(slowly_mixed(gaussian(), 3), 2))
    torch.testing.assert_close(twice(gaussian()), expected)


@each_inner
@pytest.mark.parametrize("times", [1, 2, 3])
def test_one_gram_matrix_is_asked_for_however_deep(inner, times):
    rule: Rule = inner
    for _ in range(times):
        rule = NearestNeighborMixing(rule, f=2)
    _, view = aggregated(rule, gaussian())
    assert view.asked == [1 if isinstance(inner, CenteredClipping) else 0]


@each_inner
def test_weights_map_back_to_clients(inner):
    outcome, _ = aggregated(NearestNeighborMixing(NearestNeighborMixing(inner, f=2), f=2), gaussian())
    if inner.needs is Reveals.EACH:
        assert outcome.weights is None
    else:
        assert outcome.weights.shape == (12,)
        torch.testing.assert_close(outcome.weights @ gaussian(), outcome.vector)


def test_what_is_needed_is_the_most_of_all_parts():
    def needs(inner: Rule) -> Reveals:
        return NearestNeighborMixing(NearestNeighborMixing(inner, f=1), f=1).needs

    assert [needs(inner) for inner in (Mean(), Krum(1), TrimmedMean(1))] == [Reveals.GRAM, Reveals.GRAM, Reveals.EACH]


def test_an_attacker_is_mixed_away():
    rows = gaussian()
    rows[:2] = 1e6
    vector = NearestNeighborMixing(Mean(), f=2)(rows)  # even around a mean, 2 of 12 rows carry 2/10 of them each
    assert float(vector.norm()) > 1e4
    for inner in INNER[:4]:
        assert float(NearestNeighborMixing(inner, f=2)(rows).norm()) < 2 * float(rows[2:].norm(dim=1).max())


def test_the_state_is_the_inner_rules():
    inner = CenteredClipping(1.0)
    rule, alone = NearestNeighborMixing(inner, f=2), inner
    state = own = rule.init(6)
    for number in range(3):
        rows = gaussian(seed=number) + 1
        state, outcome = rule.aggregate(state, MatrixView(rows), Generator())
        own, expected = alone.aggregate(own, MatrixView(slowly_mixed(rows, 2)), Generator())
        torch.testing.assert_close(outcome.vector, expected.vector)
    torch.testing.assert_close(state["center"], own["center"])


def test_references_are_not_mixed():
    rule = NearestNeighborMixing(CenteredClipping(1.0), f=2)
    state = {"center": torch.full((6,), 3.0, dtype=torch.float64)}
    assert torch.equal(rule.references(state, 6), state["center"][None])


def test_mixed_rows_have_no_ids():
    with pytest.raises(NotRevealed, match="no client"):
        NearestNeighborMixing(Remembering(), f=1)(gaussian())


@pytest.mark.parametrize("inner", [Krum(2), TrimmedMean(2)], ids=repr)
def test_bad_rows_lower_every_f(inner):
    rows = torch.cat([gaussian(), torch.full((2, 6), float("nan"), dtype=torch.float64)])
    rule = NearestNeighborMixing(NearestNeighborMixing(inner, f=3), f=2)
    lowered = NearestNeighborMixing(NearestNeighborMixing(replace(inner, f=0), f=1), f=0)
    assert torch.equal(rule(rows), lowered(gaussian()))
    with pytest.raises(CohortTooSmall, match="f=2 tolerates 2 bad updates for NearestNeighborMixing, got 3"):
        rule(torch.cat([rows, rows[-1:]]))


def test_the_inner_rules_cohort_is_counted_after_mixing():
    """Six pairs of twelve: one less than Krum(2) needs."""
    assert Pairs(TrimmedMean(2))(gaussian()).shape == (6,)
    with pytest.raises(CohortTooSmall, match=r"f=2 needs n >= 2f\+3 = 7 updates for Krum, got n=6"):
        Pairs(Krum(2))(gaussian())
    with pytest.raises(InvalidArgument, match=r"needs n >= 2f\+3 = 7 updates for NearestNeighborMixing, got n=6"):
        NearestNeighborMixing(Krum(2), f=2)(gaussian(6))


def test_a_random_mix_follows_the_generator(untouched_random_state):
    rule, view = Pairs(TrimmedMean(1)), MatrixView(gaussian())
    vectors = [rule.aggregate({}, view, Generator().manual_seed(seed))[1].vector for seed in (1, 1, 2)]
    assert torch.equal(vectors[0], vectors[1])
    assert not torch.equal(vectors[0], vectors[2])


@each_inner
def test_the_updates_are_not_changed(inner):
    rows = gaussian()
    NearestNeighborMixing(inner, f=2)(rows)
    assert torch.equal(rows, gaussian())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@each_inner
def test_the_type_is_kept(inner, dtype):
    rows = gaussian().to(dtype)
    vector = NearestNeighborMixing(inner, f=2)(rows)
    exact = NearestNeighborMixing(inner, f=2)(rows.double())
    assert vector.dtype == dtype
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(vector.double(), exact, rtol=2 * step, atol=2 * step)
