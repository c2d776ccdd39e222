"""Who the clients are, which of them take part, and which are lost on the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, log, sqrt
from typing import final

import numpy as np
import torch
from torch import Generator, Tensor

from privfm.checks import at_least, fraction, require
from privfm.contracts import Clients, Examples, Sampling, State
from privfm.defenses.privacy.noise import words


@final
class Population(Clients):
    """Clients made when they are asked for: a hundred thousand cost nothing until they are sampled.

    Args:
      size: number of clients.
      make: client id -> its examples; called again every time.
    """

    def __init__(self, size: int, make: Callable[[int], Examples]) -> None:
        at_least("size", size, 1)
        self._size, self._make = size, make

    @classmethod
    def of(cls, everything: Examples, assignment: Sequence[Tensor]) -> Population:
        """Clients that hold rows of one table; `assignment[i]` are client i's places in `everything`."""
        return cls(len(assignment), lambda client: everything.take(assignment[client]))

    @property
    def size(self) -> int:
        return self._size

    def examples(self, client: int) -> Examples:
        require(0 <= client < self._size, f"client={client}: expected 0 to {self._size - 1}")
        examples = self._make(client)
        require(len(examples) > 0, f"client={client} has no examples; every client needs at least one")
        return examples


@final
@dataclass(frozen=True)
class Poisson(Sampling):
    """Each client joins with probability `rate`, independently: what amplification by sampling assumes.

    Args:
      rate: probability a round.
    """

    rate: float

    def __post_init__(self) -> None:
        fraction("rate", self.rate)

    def draw(self, population: int, generator: Generator, now: int = 0) -> tuple[int, ...]:
        joins = torch.rand(population, generator=generator, dtype=torch.float64) < self.rate
        return tuple(joins.nonzero()[:, 0].tolist())

    def expected(self, population: int) -> float:
        return self.rate * population

    def largest(self, population: int) -> int:
        """Bernstein's bound: n > mean + t has probability below exp(-t^2 / (2 (variance + t/3)))."""
        variance, exponent = population * self.rate * (1 - self.rate), log(1e9)
        above = exponent / 3 + sqrt((exponent / 3) ** 2 + 2 * variance * exponent)
        return min(population, ceil(self.rate * population + above))

    def exceeds(self, f: int, malicious: int, population: int) -> float:
        from scipy.stats import binom

        return float(binom.sf(f, malicious, self.rate))


@final
@dataclass(frozen=True)
class FixedSize(Sampling):
    """The same number of clients every round, without replacement.

    Args:
      size: clients a round.
    """

    size: int

    def __post_init__(self) -> None:
        at_least("size", self.size, 1)

    def draw(self, population: int, generator: Generator, now: int = 0) -> tuple[int, ...]:
        return tuple(sorted(torch.randperm(population, generator=generator)[: self.size].tolist()))

    def expected(self, population: int) -> float:
        return float(min(self.size, population))

    def largest(self, population: int) -> int:
        return min(self.size, population)

    def exceeds(self, f: int, malicious: int, population: int) -> float:
        from scipy.stats import hypergeom

        return float(hypergeom.sf(f, population, malicious, min(self.size, population)))


@final
@dataclass(frozen=True)
class FixedShare(Sampling):
    """The same share of the population every round, without replacement.

    Args:
      rate: share; with the population's size it must give a whole number.
    """

    rate: float

    def __post_init__(self) -> None:
        fraction("rate", self.rate)

    def draw(self, population: int, generator: Generator, now: int = 0) -> tuple[int, ...]:
        return self._sized(population).draw(population, generator)

    def expected(self, population: int) -> float:
        return self.rate * population

    def largest(self, population: int) -> int:
        return self._sized(population).size

    def exceeds(self, f: int, malicious: int, population: int) -> float:
        return self._sized(population).exceeds(f, malicious, population)

    def _sized(self, population: int) -> FixedSize:
        return FixedSize(max(1, round(self.rate * population)))


@final
@dataclass(frozen=True)
class Cyclic(Sampling):
    """The population is cut into groups by client id, which take turns: no chance, nothing to keep secret.

    Every client takes part once in `groups` rounds, and waits as long in between.

    Args:
      groups: number of groups.

    Source: Choquette-Choo et al., "(Amplified) banded matrix factorization", 2023, section 3: a schedule with a least
    separation between participations.
    """

    groups: int

    def __post_init__(self) -> None:
        at_least("groups", self.groups, 1)

    def draw(self, population: int, generator: Generator, now: int = 0) -> tuple[int, ...]:
        return tuple(range(now % self.groups, population, self.groups))

    def expected(self, population: int) -> float:
        return population / self.groups

    def largest(self, population: int) -> int:
        return ceil(population / self.groups)

    def exceeds(self, f: int, malicious: int, population: int) -> float:
        """As if the malicious were spread by chance: which group they are in is not the sampling's to know."""
        from scipy.stats import hypergeom

        return float(hypergeom.sf(f, population, malicious, self.largest(population)))


def eligible(
    drawn: Sequence[int], joined: State, now: int, most: int | None, separation: int
) -> tuple[tuple[int, ...], State]:
    """Who of the drawn clients may join, and what is remembered of everybody afterwards.

    Args:
      drawn: client ids.
      joined: of `no_participations`, or as returned before.
      now: number of this round.
      most: rounds a client may join in all; None: any number.
      separation: least rounds from one participation of a client to its next.
    """
    ids = torch.tensor(drawn, dtype=torch.int64)
    count, last = joined["count"], joined["last"]
    fresh = count[ids] == 0
    may = fresh | (now - last[ids] >= separation)
    if most is not None:
        may &= count[ids] < most
    ids = ids[may]
    ones = torch.ones_like(ids)
    after = {"count": count.index_add(0, ids, ones), "last": last.index_fill(0, ids, now)}
    return tuple(ids.tolist()), after


def drawn_in_secret(sampling: Sampling, population: int, now: int) -> tuple[int, ...]:
    """A cohort from the operating system's generator: not even who knows the run's seed knows who took part.

    Args:
      sampling: a plan's.
      population: number of clients.
      now: the round.
    """
    if isinstance(sampling, Cyclic):
        return sampling.draw(population, torch.Generator(), now)
    uniform = torch.from_numpy((words("secure")(population) >> np.uint64(11)).astype(np.float64) * 2.0**-53)
    if isinstance(sampling, Poisson):
        chosen = (uniform < sampling.rate).nonzero()[:, 0]
    else:  # as many as expected, by the least of distinct numbers
        chosen = uniform.argsort()[: sampling.largest(population)].sort().values
    return tuple(chosen.tolist())


def no_participations(population: int) -> State:
    """How often each client has joined, and when last."""
    return {"count": torch.zeros(population, dtype=torch.int64), "last": torch.zeros(population, dtype=torch.int64)}


def choose_malicious(share: float, population: int, generator: Generator) -> tuple[int, ...]:
    """Ids of `round(share * population)` clients, the same whatever the arm."""
    fraction("share", share, zero=True, one=False)
    chosen = torch.randperm(population, generator=generator)[: round(share * population)]
    return tuple(sorted(chosen.tolist()))


def lost(rate: float, stages: Sequence[str], cohort: Sequence[int], generator: Generator) -> dict[str, frozenset[int]]:
    """Simulated drop-outs: each client is lost with probability `rate`, at one stage, and stays lost.

    Returns:
      Clients that do not answer, by stage.
    """
    leaves = torch.rand(len(cohort), generator=generator) < rate
    at = torch.randint(len(stages), (len(cohort),), generator=generator)
    return {
        stage: frozenset(client for client, left, k in zip(cohort, leaves, at, strict=True) if left and k <= place)
        for place, stage in enumerate(stages)
    }
