"""Cohorts, drop-outs and populations that cost nothing until they are asked for."""

from __future__ import annotations

import tracemalloc

import pytest
import torch
from torch import Generator

from privfm.checks import InvalidArgument
from privfm.contracts import Examples, Sampling
from privfm.federation import FixedSize, Poisson, Population, choose_malicious
from privfm.federation.population import Cyclic, FixedShare, drawn_in_secret, lost


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def examples(n: int) -> Examples:
    return Examples({"x": torch.zeros(n, 3)}, torch.zeros(n, dtype=torch.int64))


def test_a_hundred_thousand_clients_cost_nothing_until_sampled() -> None:
    made: list[int] = []

    def make(client: int) -> Examples:
        made.append(client)
        return examples(2)

    tracemalloc.start()
    population = Population(100_000, make)
    cohort = Poisson(1e-3).draw(population.size, seeded())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e6 and not made
    assert len(population.examples(cohort[0])) == 2 and made == [cohort[0]]


def test_an_empty_client_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="client=3 has no examples"):
        Population(5, lambda client: examples(0)).examples(3)


@pytest.mark.parametrize("client", [-1, 5])
def test_a_client_outside_the_population_is_refused(client: int) -> None:
    with pytest.raises(InvalidArgument, match="expected 0 to 4"):
        Population(5, lambda client: examples(1)).examples(client)


def test_poisson_joins_are_independent_with_the_given_rate() -> None:
    joins = torch.zeros(2000, 50)
    for round in range(2000):
        joins[round, list(Poisson(0.1).draw(50, seeded(round)))] = 1
    assert abs(float(joins.mean()) - 0.1) < 0.003  # three standard errors are 0.0028
    sizes = joins.sum(1)
    assert 0.85 < float(sizes.var()) / (50 * 0.1 * 0.9) < 1.15  # a fixed size would have no variance
    both = float((joins[:, 0] * joins[:, 1]).mean())
    assert abs(both - 0.01) < 0.007


def test_fixed_size_cohorts() -> None:
    drawn = [FixedSize(7).draw(20, seeded(s)) for s in range(50)]
    assert all(len(set(cohort)) == 7 and cohort == tuple(sorted(cohort)) for cohort in drawn)
    assert set().union(*drawn) == set(range(20))


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 1.0])
def test_the_largest_poisson_cohort_is_never_met(rate: float) -> None:
    largest = Poisson(rate).largest(1000)
    sizes = [len(Poisson(rate).draw(1000, seeded(s))) for s in range(300)]
    assert max(sizes) <= largest <= 1000
    assert largest < 1000 * rate + 12 * (1000 * rate) ** 0.5 + 20


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.1, float("nan")])
def test_bad_rates_are_refused(rate: float) -> None:
    with pytest.raises(InvalidArgument, match="rate="):
        Poisson(rate)


def test_malicious_clients_are_the_asked_share() -> None:
    chosen = choose_malicious(0.2, 1000, seeded())
    assert len(set(chosen)) == 200 and chosen == choose_malicious(0.2, 1000, seeded())
    assert choose_malicious(0.0, 1000, seeded()) == ()
    with pytest.raises(InvalidArgument, match="share=1"):
        choose_malicious(1.0, 10, seeded())


def test_the_lost_stay_lost() -> None:
    stages = ("keys", "masked", "unmask")
    gone = lost(0.3, stages, range(1000), seeded())
    assert gone["keys"] < gone["masked"] < gone["unmask"]
    assert 250 < len(gone["unmask"]) < 350
    assert lost(0.0, stages, range(1000), seeded()) == dict.fromkeys(stages, frozenset())


@pytest.mark.parametrize("sampling", [Poisson(0.1), FixedSize(10)], ids=repr)
@pytest.mark.parametrize("f", [0, 2, 4])
def test_the_probability_of_more_attackers_than_f_is_that_of_the_draws(sampling: Sampling, f: int) -> None:
    rounds, malicious = 4000, range(20)
    beyond = sum(len(set(sampling.draw(100, seeded(s))) & set(malicious)) > f for s in range(rounds)) / rounds
    stated = sampling.exceeds(f, len(malicious), 100)
    deviation = (stated * (1 - stated) / rounds) ** 0.5
    assert abs(beyond - stated) < 4 * deviation
    assert abs(beyond - sampling.exceeds(f + 1, len(malicious), 100)) > 4 * deviation


def test_the_attackers_of_a_fixed_cohort_are_hypergeometric() -> None:
    assert FixedSize(2).exceeds(0, 1, 4) == pytest.approx(0.5)  # one of four, two drawn
    assert FixedSize(9).exceeds(0, 1, 4) == pytest.approx(1.0)
    assert FixedSize(2).exceeds(2, 4, 4) == 0
    assert Poisson(0.5).exceeds(0, 2, 4) == pytest.approx(0.75)


def test_secret_cohorts_are_of_their_scheme_and_of_no_seed() -> None:
    poisson = [drawn_in_secret(Poisson(0.1), 1000, 0) for _ in range(40)]
    counts = torch.tensor([len(cohort) for cohort in poisson], dtype=torch.float64)
    assert abs(float(counts.mean()) - 100) < 5 * 9.5 / 40**0.5 and 3 < float(counts.std()) < 20  # binomial: 9.5
    assert len(set(poisson)) == 40
    fixed = [drawn_in_secret(FixedShare(0.1), 200, 0) for _ in range(5)]
    assert {len(set(cohort)) for cohort in fixed} == {20} and len(set(fixed)) == 5
    assert drawn_in_secret(Cyclic(4), 10, 5) == (1, 5, 9)
