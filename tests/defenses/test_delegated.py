"""A rule run in two halves gives what it gives in one: nothing is encrypted here."""

from dataclasses import dataclass
from typing import final

import pytest
import torch

from privfm.blocks import gram as block_gram
from privfm.checks import CohortTooSmall, InvalidArgument, NotRevealed
from privfm.contracts import Decision, MatrixView, Outcome, Reveals, View
from privfm.defenses import (
    AdaptiveClipping,
    Bucketing,
    CenteredClipping,
    ClippedClustering,
    FLTrust,
    FoolsGold,
    GeometricMedian,
    Krum,
    Mean,
    MoNNA,
    MultiKrum,
    NearestNeighborMixing,
    NormBound,
    TrimmedMean,
)
from privfm.defenses.delegated import Delegated, decide, references_of
from privfm.defenses.directional_rules import with_root
from privfm.defenses.gram_rules import JudgingRule

RULES = [
    Krum(f=2),
    MultiKrum(f=2),
    GeometricMedian(),
    CenteredClipping(radius=1.0),
    FLTrust(),
    MoNNA(f=2),
    Bucketing(s=2, rule=GeometricMedian()),
    NearestNeighborMixing(f=2, rule=MultiKrum(f=2)),
    NearestNeighborMixing(f=2, rule=NormBound(1.0, Krum(f=2))),
    NormBound(1.0),
    AdaptiveClipping(f=2, rule=Mean()),
    Mean(),
]


class Holder(View):
    """Rows of which the server sees weights only."""

    reveals = Reveals.GRAM

    def __init__(self, rows, rule, bad=0):
        self.below, self.rule, self.asked = MatrixView(rows), rule, []
        self.ids, self.d, self.bad = self.below.ids, rows.shape[1], bad

    def decided(self, references, seed):
        self.asked.append(seed)
        return decide(self.rule, self.below.gram(references), self.n, self.bad, seed)

    def weighted_sum(self, weights, references):
        return self.below.weighted_sum(weights, references)


def gaussian(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) * (torch.arange(n)[:, None] + 1) / n


def started(rule, d):
    state = rule.init(d)
    return with_root(state, gaussian(1, d, 9)[0]) if isinstance(rule, FLTrust) else state


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.title)
def test_two_halves_give_what_the_rule_gives_and_remember_what_it_remembers(rule):
    states = [started(rule, 30), started(rule, 30)]
    for seed in range(3):
        rows = gaussian(9, 30, seed)
        holder = Holder(rows, rule)
        states[0], got = Delegated(rule).aggregate(states[0], holder, torch.Generator().manual_seed(seed))
        generator = torch.Generator().manual_seed(holder.asked[0])
        states[1], expected = rule.aggregate(states[1], MatrixView(rows), generator)
        torch.testing.assert_close(got.vector, expected.vector, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(got.weights, expected.weights.double(), rtol=1e-9, atol=1e-9)
        for one, other in ((got.clipped, expected.clipped), (got.suspects, expected.suspects)):
            assert (one is None) == (other is None)
            assert one is None or torch.equal(one, other)
        assert states[0].keys() == states[1].keys()
        for name, value in states[0].items():
            torch.testing.assert_close(value, states[1][name], rtol=1e-5, atol=1e-6)


def test_random_rules_draw_from_the_seed_and_nothing_else():
    rule, rows = Bucketing(s=3, rule=MultiKrum(f=0, m=2)), gaussian(9, 5)
    gram = MatrixView(rows).gram(torch.zeros(0, 5))
    before = torch.get_rng_state()
    drawn = [decide(rule, gram, 9, 0, seed).weights for seed in (1, 1, 2, 3, 4)]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(drawn[0], drawn[1])
    assert not all(torch.equal(drawn[0], other) for other in drawn[2:])


def test_bad_rows_lower_f_on_both_sides():
    rows = gaussian(6, 5)
    rule = MultiKrum(f=2)
    _, outcome = Delegated(rule).aggregate({}, Holder(rows, rule, bad=1), torch.Generator())
    assert int((outcome.weights > 0).sum()) == 5  # n - f of f=1
    with pytest.raises(CohortTooSmall, match="tolerates 2 bad"):
        Delegated(rule).aggregate({}, Holder(rows, rule, bad=3), torch.Generator())
    with pytest.raises(CohortTooSmall, match="tolerates 2 bad"):
        decide(rule, torch.eye(6, dtype=torch.float64), 6, 3, 0)


def test_a_cohort_too_small_is_refused():
    with pytest.raises(CohortTooSmall, match=r"2f\+3 = 7"):
        Delegated(MultiKrum(f=2)).aggregate({}, Holder(gaussian(6, 5), MultiKrum(f=2)), torch.Generator())


@pytest.mark.parametrize(
    "rule", [FoolsGold(), ClippedClustering(), TrimmedMean(f=1), Bucketing(s=2, rule=TrimmedMean(f=1))]
)
def test_a_rule_that_needs_or_remembers_more_is_refused(rule):
    with pytest.raises(InvalidArgument, match="needs more than weights from one Gram matrix"):
        Delegated(rule)


def test_a_view_without_a_key_holder_says_so():
    with pytest.raises(NotRevealed, match="decided"):
        Delegated(Krum(f=1)).aggregate({}, MatrixView(gaussian(7, 3)), torch.Generator())


@final
@dataclass(frozen=True)
class _Shortened(JudgingRule):
    """Claims to weigh, and does something else to the vector."""

    def decide(self, gram, n, generator, client_weights):
        return Decision(torch.full((len(gram),), 1 / n, dtype=torch.float64))

    def step(self, state, view, generator):
        state, outcome = super().step(state, view, generator)
        return state, Outcome(outcome.vector / outcome.vector.norm(), outcome.weights)


def test_a_rule_whose_vector_is_not_its_weights_is_found_out():
    with pytest.raises(InvalidArgument, match="does more than weigh rows"):
        decide(_Shortened(), torch.eye(4, dtype=torch.float64), 4, 0, 0)


def test_references_are_counted_and_must_be_there():
    assert [references_of(rule) for rule in (Krum(f=1), FLTrust(), NormBound(1.0, CenteredClipping(1.0)))] == [0, 1, 1]
    rows, root = gaussian(5, 8), gaussian(1, 8, 3)
    whole, _ = block_gram(lambda lo, hi: torch.cat([rows, root])[:, lo:hi], torch.zeros(0, 8))
    assert len(decide(FLTrust(), whole, 5, 0, 0).weights) == 6
    with pytest.raises(InvalidArgument, match="references"):
        decide(FLTrust(), whole[:5, :5], 5, 0, 0)


def test_what_it_passes_on():
    rule, inner = Delegated(MultiKrum(f=2)), MultiKrum(f=2)
    assert rule.needs is Reveals.GRAM
    assert (rule.smallest_cohort, rule.condition, rule.breakdown(9)) == (7, "2f+3", inner.breakdown(9))
    assert rule.effective_size(9) == inner.effective_size(9)
    assert rule.tolerated == 2
    assert rule.robustness_coefficient(9, 2) is None  # distances are some percent off
    assert rule.title == "Delegated + MultiKrum"
    assert not rule.weighted
