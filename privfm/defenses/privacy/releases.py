"""What a central plan puts in the mean's place: a noisy sum over a fixed denominator."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import final

import torch
from torch import Generator, Tensor

from privfm.checks import at_least, non_negative, positive
from privfm.contracts import Outcome, Reveals, Rule, State, View
from privfm.defenses.privacy.clipping import AdaptiveQuantile
from privfm.defenses.privacy.correlated_noise import coefficients
from privfm.defenses.privacy.noise import NoiseSource, noised, on_grid

BOUND = "bound"
"""Entry of a release's state for the clip of the next round, where it changes."""


@final
@dataclass(frozen=True)
class GaussianRelease(Rule):
    """Sum of the updates plus Gaussian noise, over a fixed denominator; noise in an empty round too.

    Formal guarantee: the Gaussian mechanism on the sum, if no row is longer than the sensitivity it was made for.
    A client that drops out or sends NaN is a zero row: the denominator does not follow who arrived.

    Args:
      noise_multiplier: standard deviation of the noise on each coordinate of the sum, over `sensitivity`; 0 where the
        clients, or who decrypts, have added it.
      sensitivity: how far one unit moves what is noised, L2.
      denominator: expected cohort, from the plan.
      bands: above 1, noise is correlated between rounds; the state holds what the next rounds take away again, and is
        as secret as the noise.
      source: where randomness comes from.
      active: `(d,)` bool, what is trained in this round; None: everything. Nothing else is noised.
      noised_elsewhere: the sum arrives noised, by who decrypted it; only an empty round, of which nobody decrypts
        anything, is noised here: else a round without noise would tell that nobody was sampled.
      ghosts: last columns, an audit's: seeded noise on the others is that of a run without them.

    Source: McMahan et al., "Learning differentially private recurrent language models", 2018, section 2.2
    (the fixed-denominator estimator); for bands see `correlated_noise`.
    """

    noise_multiplier: float
    sensitivity: float
    denominator: float
    bands: int = 1
    source: NoiseSource = "seeded"
    active: Tensor | None = None
    noised_elsewhere: bool = False
    ghosts: int = 0

    def __post_init__(self) -> None:
        non_negative("noise_multiplier", self.noise_multiplier)
        positive("sensitivity", self.sensitivity)
        positive("denominator", self.denominator)
        at_least("bands", self.bands, 1)

    @property
    def needs(self) -> Reveals:
        return Reveals.SUM

    @property
    def smallest_cohort(self) -> int:
        return 0

    def init(self, d: int) -> State:
        return {"noise": torch.zeros(self.bands - 1, d, dtype=torch.float64)} if self.bands > 1 else {}

    def step(self, state: State, view: View, generator: Generator) -> tuple[State, Outcome]:
        total = _total(view)
        if self.noised_elsewhere and view.n:
            noisy = total
        elif self.bands == 1:
            noisy = self._noised(total, generator, view.n)
        else:
            earlier = state["noise"]  # the latest first
            fresh = self._noised(torch.zeros_like(total), generator, view.n).double()
            noise = fresh - torch.tensor(coefficients(self.bands)[1:], dtype=torch.float64) @ earlier.to(fresh)
            noisy = on_grid(total, self.noise_multiplier, self.sensitivity, self.source, view.n) + noise
            state = {"noise": torch.cat([noise[None].to(earlier), earlier[:-1]])}
        if self.active is not None:
            noisy = torch.where(self.active, noisy, torch.zeros_like(noisy))
        return state, Outcome((noisy / self.denominator).to(total), _weights(view, self.denominator))

    def _noised(self, total: Tensor, generator: Generator, terms: int) -> Tensor:
        ghosts = self.ghosts if self.source == "seeded" else 0  # what nobody can draw again has no order to keep
        parts = torch.split(total, [len(total) - ghosts, ghosts]) if ghosts else (total,)
        noise, length = self.noise_multiplier, self.sensitivity
        return torch.cat([noised(part, noise, length, self.source, generator, terms) for part in parts])


@final
@dataclass(frozen=True)
class QuantileRelease(Rule):
    """The same, with a clip that follows a quantile of the update norms; rows carry their indicator in a last column.

    Args:
      noise_multiplier: deviation of the noise over the length of a row, indicator included.
      denominator: expected cohort, from the plan.
      first_bound: clip of the first round.
      clipping: how it moves.
      source: where randomness comes from.
      active: see `GaussianRelease`.

    Source: Andrew et al., "Differentially private learning with adaptive clipping", 2021, algorithm 1.
    """

    noise_multiplier: float
    denominator: float
    first_bound: float
    clipping: AdaptiveQuantile
    source: NoiseSource = "seeded"
    active: Tensor | None = None

    def __post_init__(self) -> None:
        non_negative("noise_multiplier", self.noise_multiplier)
        positive("denominator", self.denominator)
        positive("first_bound", self.first_bound)

    @property
    def needs(self) -> Reveals:
        return Reveals.SUM

    @property
    def smallest_cohort(self) -> int:
        return 0

    @property
    def indicator_weight(self) -> float:
        """See `AdaptiveQuantile.indicator_weight`."""
        return self.clipping.indicator_weight(self.noise_multiplier, self.denominator)

    def init(self, d: int) -> State:
        return {BOUND: torch.tensor(self.first_bound, dtype=torch.float64)}

    def row_width(self, d: int) -> int:
        """Columns of a row, for a model of d values: the indicator is the last."""
        return d + 1

    def length(self, state: State) -> float:
        """Largest L2 norm of a row in this round, its indicator included."""
        return float(state[BOUND]) * sqrt(1 + self.indicator_weight**2)

    def marked(self, rows: Tensor, state: State) -> Tensor:
        """Clipped updates `(k, d)` -> rows `(k, d + 1)` that end with the indicator: shorter than the bound, or not."""
        bound = float(state[BOUND])
        short = torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=torch.float64) < bound * (1 - 2.0**-18)
        return torch.cat([rows, (short.to(rows) - 0.5) * (2 * self.indicator_weight * bound)], dim=1)

    def step(self, state: State, view: View, generator: Generator) -> tuple[State, Outcome]:
        bound, total = float(state[BOUND]), _total(view)
        noisy = noised(total, self.noise_multiplier, self.length(state), self.source, generator, view.n)
        noisy = noisy / self.denominator
        share = 0.5 + float(noisy[-1]) / (2 * self.indicator_weight * bound)  # who is missing counts as one half
        vector = noisy[:-1] if self.active is None else torch.where(self.active, noisy[:-1], torch.zeros(()).to(noisy))
        after = torch.tensor(self.clipping.next_bound(bound, share), dtype=torch.float64)
        return {BOUND: after}, Outcome(vector.to(total), _weights(view, self.denominator))


def _total(view: View) -> Tensor:
    return view.total() if view.n else torch.zeros(view.d)


def _weights(view: View, denominator: float) -> Tensor:
    return torch.full((view.n,), 1 / denominator, dtype=torch.float64)
