"""Rules around rules: mix or clip the updates, then aggregate what comes out.

They nest in any order and share one Gram matrix: `NearestNeighborMixing(f=2, rule=NormBound(1.0, Krum(f=2)))` reads
the updates twice, as Krum alone does.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import final

import torch
from torch import Generator, Tensor

from privfm.blocks import squared_distances
from privfm.checks import at_least, positive, require
from privfm.contracts import Outcome, Reveals, Rule, State, View
from privfm.defenses.gram_rules import clip_factors
from privfm.defenses.mean import Mean
from privfm.defenses.views import MixedView


class PreAggregation(Rule):
    """Template: one Gram matrix for itself and for everything inside it.

    References of the inner rule are asked for beforehand and are not mixed; weights of mixed rows go back to clients
    through the mix. A class has a field `rule`, the inner rule; its own `__post_init__` calls this one's.

    Class constants:
      keeps_ids: row i stays client i's, only scaled down (the mix is diagonal). Client ids and client weights are
        passed on, and what the inner rule says of single rows holds for clients. Otherwise mixed rows belong to no
        client: a `keyed` inner rule is refused, and only weights find their way back.

    Raises:
      InvalidArgument: a `keyed` rule, however deep inside, behind a step that loses ids.
    """

    rule: Rule | None
    keeps_ids = False

    def __post_init__(self) -> None:
        name = type(self).__name__
        require(isinstance(self.inner, Rule), f"rule={self.rule!r}: expected a rule, such as TrimmedMean(f=2)")
        require(
            self.keeps_ids or not self.inner.keyed,
            f"rule={self.rule!r} remembers clients, and rows mixed by {name} belong to none; use it without {name}",
        )

    @property
    def inner(self) -> Rule:
        """The rule that sees the mixed rows."""
        return self.rule  # type: ignore[return-value]  # checked when made

    @abstractmethod
    def mix(self, gram: Tensor, generator: Generator) -> Tensor:
        """Gram matrix of the clients `(n, n)` float64 -> `(m, n)`: each mixed row as a combination of updates."""

    @property
    def keyed(self) -> bool:  # type: ignore[override]  # a constant on a single rule, derived here
        return self.inner.keyed

    @property
    def weighted(self) -> bool:  # type: ignore[override]
        return self.keeps_ids and self.inner.weighted

    @property
    def needs(self) -> Reveals:
        return max(Reveals.GRAM, self.inner.needs)

    @property
    def smallest_cohort(self) -> int:
        return self.inner.smallest_cohort

    @property
    def condition(self) -> str:
        return self.inner.condition

    def init(self, d: int) -> State:
        return self.inner.init(d)

    def references(self, state: State, d: int) -> Tensor:
        return self.inner.references(state, d)

    @property
    def delegable(self) -> bool:
        return self.inner.delegable

    def remember(self, state: State, vector: Tensor) -> State:
        return self.inner.remember(state, vector)

    def step(self, state: State, view: View, generator: Generator) -> tuple[State, Outcome]:
        references = self.references(state, view.d)
        gram = view.gram(references)
        mix = self.mix(gram[: view.n, : view.n], generator)
        mixed = MixedView(view, mix, references, gram, keeps_ids=self.keeps_ids)
        state, inner = self.inner.aggregate(state, mixed, generator)
        weights = None if inner.weights is None else inner.weights.to(mix) @ mix
        if not self.keeps_ids:
            return state, Outcome(inner.vector, weights)
        scaled = mix.diagonal() < 1
        clipped = scaled if inner.clipped is None else scaled | inner.clipped.to(scaled.device)
        return state, Outcome(inner.vector, weights, clipped, inner.suspects)


class _ForMinority(PreAggregation):
    """Template: for f malicious updates that are fewer than half."""

    f: int

    def __post_init__(self) -> None:
        at_least("f", self.f, 0)
        super().__post_init__()

    @property
    def smallest_cohort(self) -> int:
        return max(2 * self.f + 1, self.inner.smallest_cohort)

    @property
    def condition(self) -> str:
        if self.smallest_cohort == 2 * self.f + 1:
            return "2f+1"
        same_f = self.inner.tolerated == self.f  # else the inner condition's f is not the one that the error names
        return self.inner.condition if same_f else str(self.smallest_cohort)


@final
@dataclass(frozen=True)
class NearestNeighborMixing(_ForMinority):
    """Replaces each update by the mean of the `n-f` nearest to it, itself included (NNM).

    Makes unlike honest updates alike before a robust rule sees them. It is no rule on its own: around Mean, an
    attacker's own mixed row is still as far away as it likes.

    Needs: gram, or what the inner rule needs.  Cost: two passes and a mix of n^2 d.
    Breakdown point: f, or the inner rule's. Robustness coefficient: `8f/(n-f) (kappa+1)` around a rule with kappa.

    Args:
      f: malicious updates tolerated.
      rule: what aggregates the mixed rows; it must not remember clients by id.

    Source: Allouah et al., "Fixing by mixing: a recipe for optimal Byzantine ML under heterogeneity", 2023
    ("nearest neighbor mixing", and the lemma on its composition with a robust rule). Ties go to the earlier row.

    >>> from privfm.defenses import TrimmedMean
    >>> rows = torch.tensor([[0.0], [1.0], [2.0], [3.0], [1000.0]])
    >>> NearestNeighborMixing(f=1, rule=TrimmedMean(f=1))(rows).item()
    1.5
    """

    f: int
    rule: Rule

    def breakdown(self, n: int) -> int:
        return min(self.f, self.inner.breakdown(n)) if n >= self.smallest_cohort else 0

    def robustness_coefficient(self, n: int, f: int) -> float | None:
        inner = self.inner.robustness_coefficient(n, f)
        if inner is None or f != self.f or n < self.smallest_cohort:
            return None
        return 8 * f / (n - f) * (inner + 1)

    def mix(self, gram: Tensor, generator: Generator) -> Tensor:
        kept = len(gram) - self.f
        distances = squared_distances(gram).fill_diagonal_(-1)  # itself first, before its doubles
        nearest = distances.argsort(dim=1, stable=True)[:, :kept]
        return torch.zeros_like(gram).scatter_(1, nearest, 1 / kept)


@final
@dataclass(frozen=True)
class Bucketing(PreAggregation):
    """Averages `ceil(n/s)` random buckets of s updates each (the last may be smaller), then aggregates the means.

    Averages of unlike updates are more alike, at the price of a larger malicious share: f attackers spoil up to f of
    the buckets, so the inner rule's f stays what it was and must suit `ceil(n/s)` rows.

    Needs: gram, or what the inner rule needs.  Cost: two passes and a mix of n d.
    Breakdown point: that of the inner rule on `ceil(n/s)` rows.
    Robustness coefficient: proved on average over the permutation only, not for every draw; None but for s=1.

    Args:
      s: updates a bucket. The authors recommend 2.
      rule: what aggregates the buckets' means; it must not remember clients by id.

    Source: Karimireddy, He, Jaggi, "Byzantine-robust learning on heterogeneous datasets via bucketing", 2022,
    algorithm 1; a last, smaller bucket is averaged over its own size.
    """

    s: int
    rule: Rule

    def __post_init__(self) -> None:
        at_least("s", self.s, 1)
        super().__post_init__()

    @property
    def smallest_cohort(self) -> int:
        return (self.inner.smallest_cohort - 1) * self.s + 1  # the least n with ceil(n/s) buckets

    @property
    def condition(self) -> str:
        within = self.inner.condition
        return str(self.smallest_cohort) if within.isdigit() else f"({within}-1)*s+1"

    def breakdown(self, n: int) -> int:
        return self.inner.breakdown(self._buckets(n))

    def robustness_coefficient(self, n: int, f: int) -> float | None:
        return self.inner.robustness_coefficient(n, f) if self.s == 1 else None

    def effective_size(self, n: int) -> float | None:
        inner, count = self.inner.effective_size(self._buckets(n)), self._buckets(n)
        last = n - (count - 1) * self.s
        if inner is None or last == self.s:
            return None if inner is None else inner * self.s
        return count**2 / ((count - 1) / self.s + 1 / last) if inner == count else None  # else: which buckets count?

    def mix(self, gram: Tensor, generator: Generator) -> Tensor:
        n = len(gram)
        bucket = torch.empty(n, dtype=torch.int64)
        bucket[torch.randperm(n, generator=generator)] = torch.arange(n) // self.s
        member = bucket == torch.arange(self._buckets(n))[:, None]
        return (member.double() / member.sum(1, keepdim=True)).to(gram)

    def _buckets(self, n: int) -> int:
        return -(-n // self.s)


class _Clipping(PreAggregation):
    """Template: rows longer than some length are scaled down to it by the server, and counted as `clipped`."""

    keeps_ids = True

    @abstractmethod
    def longest(self, norms: Tensor) -> Tensor:
        """L2 norms `(n,)` -> the largest allowed."""

    def mix(self, gram: Tensor, generator: Generator) -> Tensor:
        norms = gram.diagonal().clamp(min=0).sqrt()
        return clip_factors(norms, self.longest(norms)).diag()


@final
@dataclass(frozen=True)
class NormBound(_Clipping):
    """Scales every update down to L2 norm `max_norm` where it is longer, then aggregates.

    The server does it, so an attacker cannot skip it (Clip is a client step). What it costs honest clients shows in
    `clipped`. Client ids are kept.

    Needs: gram, or what the inner rule needs.  Cost: two passes.
    Breakdown point: n: whatever is sent, no row is longer than the bound. Bounded is not near: f colluding rows
    still move the mean by `f/n * 2 max_norm`, so choose it in the order of an honest norm.
    Robustness coefficient: none, a fixed bound may shorten honest updates by any factor.

    Args:
      max_norm: largest L2 norm of an update, in units of an update's norm.
      rule: what aggregates the clipped rows; Mean when None.

    Source: Sun et al., "Can you really backdoor federated learning?", 2019 ("norm thresholding of updates").

    >>> NormBound(max_norm=1.0)(torch.tensor([[0.5], [900.0]])).item()
    0.75
    """

    max_norm: float
    rule: Rule | None = None  # not Mean(): the command line cannot replace an instance by another class

    def __post_init__(self) -> None:
        positive("max_norm", self.max_norm)
        super().__post_init__()

    @property
    def inner(self) -> Rule:
        return Mean() if self.rule is None else self.rule

    def breakdown(self, n: int) -> int:
        return n if n >= self.smallest_cohort else 0

    def longest(self, norms: Tensor) -> Tensor:
        return norms.new_tensor(self.max_norm)


@final
@dataclass(frozen=True)
class AdaptiveClipping(_Clipping, _ForMinority):
    """Scales the `k = floor(2f(n-f)/n)` longest updates down to the length of the next one (ARC), then aggregates.

    It needs no bound: as `k >= f`, the length that remains is at most an honest client's. Client ids are kept.

    Needs: gram, or what the inner rule needs.  Cost: two passes.
    Breakdown point: k (no row is longer than the longest honest one), or the inner rule's where that is more.
    Robustness coefficient: `kappa + k/(n-f-k)` around a rule with kappa, at most `kappa + 2f/(n-2f)`. Of n-f rows with
    variance V, let at most k be clipped, by b in the mean; clipping takes at least `|b|^2 (n-f-k)/k` off V, and
    Cauchy-Schwarz adds `kappa` times what is left and `|b|^2` up to the sum.

    Args:
      f: malicious updates tolerated.
      rule: what aggregates the clipped rows.

    Source: Allouah et al., "Adaptive gradient clipping for robust federated learning", 2025 ("ARC").

    >>> from privfm.defenses import TrimmedMean
    >>> AdaptiveClipping(f=1, rule=TrimmedMean(f=1))(torch.tensor([[1.0], [2.0], [3.0], [4.0], [900.0]])).item()
    3.0
    """

    f: int
    rule: Rule

    def breakdown(self, n: int) -> int:
        return max(self._clipped(n), self.inner.breakdown(n)) if n >= self.smallest_cohort else 0

    def robustness_coefficient(self, n: int, f: int) -> float | None:
        inner = self.inner.robustness_coefficient(n, f)
        if inner is None or f != self.f or n < self.smallest_cohort:
            return None
        return inner + self._clipped(n) / (n - f - self._clipped(n))

    def longest(self, norms: Tensor) -> Tensor:
        return norms.sort(descending=True).values[self._clipped(len(norms))]

    def _clipped(self, n: int) -> int:
        return 2 * self.f * (n - self.f) // n  # in whole numbers: a rounded quotient may fall one short
