"""Rules that look for the honest majority as a cluster of directions or signs, and average what lies in it."""

from __future__ import annotations

from dataclasses import dataclass
from math import log, sqrt
from typing import final

import torch
from torch import Generator, Tensor

from privfm.blocks import column_blocks
from privfm.checks import CohortTooSmall, fraction, non_negative, one_of, positive, require
from privfm.contracts import Decision, Outcome, Reveals, Rule, State, View
from privfm.defenses.clusters import LINKAGES, Linkage, densest, first_majority, larger_of_two
from privfm.defenses.directional_rules import cosine_distances
from privfm.defenses.gram_rules import JudgingRule, clip_factors


def _lengths(view: View) -> tuple[Tensor, Tensor]:
    """Gram matrix of the clients and their lengths `(n,)`."""
    gram = view.gram(torch.zeros(0, view.d))
    return gram, gram.diagonal().sqrt()


def _clipped_mean(view: View, kept: Tensor, factors: Tensor) -> Outcome:
    """Mean of the kept rows, each times its factor."""
    weights = torch.where(kept, factors, torch.zeros_like(factors)) / kept.sum()
    return Outcome(view.weighted_sum(weights, torch.zeros(0, view.d)), weights, clipped=factors < 1, suspects=~kept)


@final
@dataclass(frozen=True)
class CosineClustering(JudgingRule):
    """Mean of the larger of two clusters of update directions.

    Lengths play no part, so a long update that points with the majority moves the mean as far as it likes. Of two
    clusters of the same size, the one with the first row is taken.

    Needs: gram.  Cost: two passes.  Breakdown point: 0 (see above).

    Args:
      linkage: how far apart two clusters are. "single" splits where the greatest cosine across is least, which is the
        paper's equation; "complete" is the authors' code.

    Source: Sattler et al., "On the Byzantine robustness of clustered federated learning", 2020.

    >>> rows = torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0], [-9.0, 0.0]])
    >>> CosineClustering()(rows).tolist()
    [2.0, 0.0]
    """

    linkage: Linkage = "single"

    def __post_init__(self) -> None:
        one_of("linkage", self.linkage, LINKAGES)

    def decide(self, gram: Tensor, n: int, generator: Generator, client_weights: Tensor | None) -> Decision:
        kept = larger_of_two(cosine_distances(gram), self.linkage)
        return Decision(kept.to(gram) / kept.sum())


@final
@dataclass(frozen=True)
class ClippedClustering(Rule):
    """Mean of the larger of two clusters of update directions, each update first clipped to the median norm so far.

    The median is over all updates of all rounds, this one included; the state has eight bytes for each. Attackers'
    norms are in it too. Of two clusters of the same size, the one with the first row is taken.

    Needs: gram.  Cost: two passes.
    Breakdown point: `(n-1)//2` updates cannot move the median norm beyond an honest one, and no update is longer.

    Args:
      max_radius: the largest norm an update keeps, whatever the median. Default: the authors' code.
      linkage: how far apart two clusters are. Default: the paper.

    Source: Li, Ngai, Voigt, "An experimental study of Byzantine-robust aggregation schemes in federated learning",
    2023, with the authors' code.
    """

    max_radius: float = 1e5
    linkage: Linkage = "average"

    def __post_init__(self) -> None:
        positive("max_radius", self.max_radius)
        one_of("linkage", self.linkage, LINKAGES)

    @property
    def needs(self) -> Reveals:
        return Reveals.GRAM

    def breakdown(self, n: int) -> int:
        return max(0, (n - 1) // 2)

    def init(self, d: int) -> State:
        return {"norms": torch.zeros(0, dtype=torch.float64)}

    def step(self, state: State, view: View, generator: Generator) -> tuple[State, Outcome]:
        gram, lengths = _lengths(view)
        norms = torch.cat([state["norms"].to(lengths), lengths])
        radius = norms.quantile(0.5).clamp(max=self.max_radius)
        kept = larger_of_two(cosine_distances(gram), self.linkage)
        return {"norms": norms}, _clipped_mean(view, kept, clip_factors(lengths, radius))


def flame_noise(epsilon: float, delta: float) -> float:
    """FLAME's noise in units of the clip norm: `sqrt(2 ln(1.25/delta)) / epsilon` (Nguyen et al., 2022).

    Named after the paper's symbols; neither counts towards any epsilon that is reported.

    >>> round(flame_noise(3000, 0.01), 8)
    0.00103584
    """
    positive("epsilon", epsilon)
    fraction("delta", delta, one=False)
    return sqrt(2 * log(1.25 / delta)) / epsilon


@final
@dataclass(frozen=True)
class FLAME(Rule):
    """Mean of the densest majority of directions, clipped to the median norm of all updates, plus a little noise.

    The noise is there to wash a backdoor out. It is no differential privacy: which updates stay and how long they may
    be depends on the data, so it never counts towards epsilon. The paper compares the directions of models, this rule
    those of updates, as it is given them.

    Needs: gram.  Cost: two passes and a draw of d normal values.
    Breakdown point: `(n-1)//2` updates cannot move the median norm beyond an honest one, and no update is longer.

    Args:
      noise: standard deviation, in units of the clip norm (the paper's lambda). Default: `flame_noise(3000, 0.01)`.

    Source: Nguyen et al., "FLAME: taming backdoors in federated learning", 2022, algorithm 1. Its HDBSCAN is
    `first_majority`.
    """

    noise: float = flame_noise(3000, 0.01)

    def __post_init__(self) -> None:
        non_negative("noise", self.noise)

    @property
    def needs(self) -> Reveals:
        return Reveals.GRAM

    def breakdown(self, n: int) -> int:
        return max(0, (n - 1) // 2)

    def step(self, state: State, view: View, generator: Generator) -> tuple[State, Outcome]:
        gram, lengths = _lengths(view)
        radius = lengths.quantile(0.5)
        outcome = _clipped_mean(view, first_majority(cosine_distances(gram)), clip_factors(lengths, radius))
        if self.noise == 0:
            return state, outcome
        vector, deviation = outcome.vector, self.noise * float(radius)
        draws = deviation * torch.randn(view.d, generator=generator, dtype=torch.float64)
        noisy = (vector.double() + draws.to(vector.device)).to(vector.dtype)
        return state, Outcome(noisy, outcome.weights, outcome.clipped, outcome.suspects)


@final
@dataclass(frozen=True)
class SignGuard(Rule):
    """Mean of the updates of usual length and usual signs, clipped to the median norm.

    The signs are counted on a random slice of neighbouring coordinates: the shares of positive, zero and negative
    ones, each divided by the largest such share of the cohort, are clustered by mean shift, and the largest cluster
    has the usual signs (of two as large, the denser). Norms are compared before anything is clipped.

    Needs: each.  Cost: two passes and the slice.
    Breakdown point: `(n-1)//2` updates cannot move the median norm beyond an honest one, and no update is longer.

    Args:
      least: shortest usual norm, in units of the median norm. Default: the paper.
      most: longest usual norm, in the same units. Default: the paper.
      share: coordinates whose signs are counted, at least one. Default: the paper.

    Source: Xu et al., "Byzantine-robust federated learning through collaborative malicious gradient filtering"
    (SignGuard), 2022. The authors' code starts mean shift from bins and from at most 50 updates when it
    chooses the bandwidth; here it starts from every update, and all of them choose.
    """

    least: float = 0.1
    most: float = 3.0
    share: float = 0.1

    def __post_init__(self) -> None:
        non_negative("least", self.least)
        positive("most", self.most)
        require(self.least <= 1 <= self.most, f"least={self.least!r}, most={self.most!r}: expected 1 between them")
        fraction("share", self.share)

    @property
    def needs(self) -> Reveals:
        return Reveals.EACH

    def breakdown(self, n: int) -> int:
        return max(0, (n - 1) // 2)

    def step(self, state: State, view: View, generator: Generator) -> tuple[State, Outcome]:
        """See `Rule.step`.

        Raises:
          CohortTooSmall: no update has both a usual length and usual signs.
        """
        _, lengths = _lengths(view)
        median = lengths.quantile(0.5)
        usual = (lengths >= self.least * median) & (lengths <= self.most * median)
        kept = usual & densest(self._features(view, generator)).to(usual.device)
        if not bool(kept.any()):
            raise CohortTooSmall(
                f"SignGuard keeps none of n={view.n} updates: no norm from {self.least} to {self.most} times the "
                "median is in the largest cluster of signs; widen least and most"
            )
        return state, _clipped_mean(view, kept, clip_factors(lengths, median))

    def _features(self, view: View, generator: Generator) -> Tensor:
        """`(n, 3)`: shares of positive, zero and negative coordinates, each over the largest of its kind."""
        width = min(view.d, max(1, int(self.share * view.d)))
        first = int(torch.randint(view.d - width + 1, (), generator=generator))
        counts = torch.zeros(view.n, 3, dtype=torch.float64)
        for lo, hi in column_blocks(width):
            signs = view.block(first + lo, first + hi).sign()
            counts += torch.stack([(signs == sign).sum(1) for sign in (1, 0, -1)], 1).cpu()
        return counts / counts.max(0).values.clamp(min=1)
