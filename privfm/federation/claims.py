"""A plan as an auditor reads it: the score, the bound and the checks that fit what is claimed, all before the run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Final, final

import numpy as np
from numpy.typing import NDArray

from privfm.attacks.audit import (
    ApproximateFamily,
    Bound,
    Check,
    Declared,
    Estimate,
    GaussianFamily,
    Guesses,
    check_mechanism,
    gaussian_fit,
    inclusion,
    one_run,
    one_run_fdp,
    planned,
    sampled_gaussian_score,
)
from privfm.contracts import Transform
from privfm.defenses.privacy import DPPlan
from privfm.defenses.privacy.trade_off import estimated_epsilon

Array = NDArray[np.float64]
Flags = NDArray[np.bool_]
Method = Callable[[Array, Flags, Guesses | None, float], Bound]
"""Scores, coins, numbers of guesses, confidence -> a bound."""

_SEED: Final = 0
"""Of the simulation by which numbers of guesses are declared: it knows the claim and nothing of the run."""


@final
@dataclass(frozen=True)
class Claim:
    """What is claimed of a mechanism: noise, clip, sampling.

    Args:
      plan: that is claimed.
      d: trained values.
      codecs: of the wire, which may lengthen a row, and the noise with it.
    """

    plan: DPPlan
    d: int
    codecs: Transform

    @cached_property
    def noise(self) -> float:
        """Standard deviation of the noise on each coordinate of the released sum, in units of the clip."""
        bound = self.plan.max_grad_norm
        opened = self.plan.place != "central"
        return self.plan.noise_multiplier * (1.0 if opened else self.codecs.norm_bound(bound, self.d) / bound)

    @property
    def amplified(self) -> bool:
        """Whether the claim counts on it that nobody knows who took part."""
        return self.plan.sampling in {"poisson", "fixed_size"} and self.plan.sample_rate < 1

    def turns(self, rounds: int, canaries: int) -> Flags:
        """`(T, m)`, where a canary can have taken part: everywhere, but where groups take turns."""
        if self.plan.sampling != "cyclic":
            return np.ones((rounds, canaries), dtype=bool)
        groups = round(1 / self.plan.sample_rate)
        return np.asarray(np.arange(rounds)[:, None] % groups == np.arange(canaries) % groups)

    def scores(self, values: Array, turns: Flags) -> Array:
        """The most powerful score of in against out under the claim, `(m,)`, from traces `(T, m)` in clips."""
        rate = self.plan.sample_rate if self.amplified else 1.0
        if self.noise == 0 or rate == 1:
            return np.asarray((values * turns).sum(0))
        return sampled_gaussian_score(values, self.noise, rate)

    def bounds(self, scores: Array, coins: Flags, turns: Flags, confidence: float) -> tuple[Bound, ...]:
        """Certified bounds, the one that the claim chose first; each holds at `confidence` by itself."""
        order = _ordered(self, turns.shape, confidence)
        return tuple(self._methods()[name](scores, coins, guesses, confidence) for name, guesses in order)

    def _methods(self) -> dict[str, Method]:
        """Bounds that are valid for whatever was claimed so."""
        delta = self.plan.delta
        family = ApproximateFamily(delta) if self.amplified else GaussianFamily()
        return {
            "one run, f-DP": lambda scores, coins, guesses, confidence: one_run_fdp(
                scores, coins, delta, family=family, guesses=guesses, confidence=confidence
            ),
            "one run": lambda scores, coins, guesses, confidence: one_run(
                scores, coins, delta, guesses=guesses, confidence=confidence
            ),
        }

    def simulated(self, shape: tuple[int, int], generator: np.random.Generator) -> tuple[Array, Flags]:
        """Scores and coins of one run of the claimed mechanism with canaries that are alone on their coordinates."""
        coins = generator.random(shape[1]) < 0.5
        turns = self.turns(*shape)
        joins = turns & coins
        if self.amplified:
            joins &= generator.random(shape) < self.plan.sample_rate
        return self.scores(joins + self.noise * generator.standard_normal(shape), turns), coins

    def estimate(self, values: Array, sent: Flags, scores: Array, coins: Flags) -> Estimate | None:
        """The plan's epsilon at the noise that canaries show; where nothing amplifies, two Gaussians through scores."""
        delta = self.plan.delta
        if not self.amplified:
            if min(int(coins.sum()), int((~coins).sum())) < 2:
                return None
            return gaussian_fit(scores[coins], scores[~coins], delta)
        if not sent.any() or sent.all():
            return None
        silent, loud = values[~sent], values[sent]
        deviation, shift = float(silent.std()), float(loud.mean() - silent.mean())
        if not deviation or shift <= 0:
            return None
        margin = 1.96 * float(np.hypot(np.sqrt(0.5 / silent.size), deviation / (shift * np.sqrt(loud.size))))
        fitted = deviation / shift
        low, middle, high = (
            estimated_epsilon(self.plan, len(values), noise)
            for noise in (fitted * (1 + margin), fitted, max(fitted * (1 - margin), 1e-3))
        )
        return Estimate(
            method="plan at the fitted noise",
            epsilon=middle,
            low=low,
            high=high,
            delta=delta,
            assumes="the mechanism is the plan's, but for its noise multiplier, fitted to what the canaries show",
        )

    def checks(self, values: Array, sent: Flags, units: NDArray[np.int64], population: int) -> tuple[Check, ...]:
        """Noise, arrival and sampling against the claim."""
        scheme = self.plan.sampling
        cohorts = () if scheme == "cyclic" else inclusion(units, population, self.plan.sample_rate, scheme)
        return check_mechanism(values, sent, self.noise, cohorts=cohorts)


@lru_cache(maxsize=32)
def _ordered(claim: Claim, shape: tuple[int, int], confidence: float) -> tuple[tuple[str, Declared], ...]:
    """Methods with the number of guesses that each declares, the one that promises most first: by simulation alone."""
    found = []
    for name, method in claim._methods().items():
        generator = np.random.default_rng(_SEED)
        declared = planned(
            lambda source: claim.simulated(shape, source),
            shape[1],
            lambda scores, coins, guesses, method=method: method(scores, coins, guesses, confidence),  # type: ignore[misc]
            generator,
        )
        scores, coins = claim.simulated(shape, generator)
        found.append((method(scores, coins, declared, confidence).epsilon, name, declared))
    return tuple((name, declared) for _, name, declared in sorted(found, key=lambda one: -one[0]))
