"""A plan as an auditor reads it: the score, the bound and the checks that fit what is claimed, all before the run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
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
from privfm.checks import InvalidArgument
from privfm.defenses.privacy import DPPlan
from privfm.defenses.privacy.releases import GaussianRelease
from privfm.defenses.privacy.trade_off import estimated_epsilon
from privfm.federation.arm import Arm

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
      noise: standard deviation of the noise on each coordinate of the released sum, in units of the clip.
    """

    plan: DPPlan
    noise: float

    @classmethod
    def of(cls, plan: DPPlan, arm: Arm, d: int, population: int) -> Claim:
        """What a plan claims of an arm's wire: codecs may lengthen a row, and the noise is sized for that."""
        rule = replace(arm, plan=plan).release(d + arm.ghosts, population)
        if not isinstance(rule, GaussianRelease):
            raise InvalidArgument(f"{plan}: canaries are read off a sum with one clip")
        return cls(plan, plan.noise_multiplier * rule.sensitivity / plan.max_grad_norm)

    @property
    def amplified(self) -> bool:
        """Whether the claim counts on it that nobody knows who took part."""
        return self.plan.sampling in {"poisson", "fixed_size"} and self.plan.sample_rate < 1

    def turns(self, rounds: int, canaries: int) -> Flags:
        """`(T, m)`, where a canary can have taken part: not where others have their turn, nor after its last round."""
        groups = round(1 / self.plan.sample_rate) if self.plan.sampling == "cyclic" else 1
        mine = np.arange(rounds)[:, None] % groups == np.arange(canaries) % groups
        most = self.plan.max_participations
        return np.asarray(mine if most is None or self.amplified else mine & (mine.cumsum(0) <= most))

    def scores(self, values: Array, turns: Flags) -> Array:
        """The most powerful score of in against out under the claim, `(m,)`, from traces `(T, m)` in clips."""
        rate = self.plan.sample_rate if self.amplified else 1.0
        if self.noise == 0 or rate == 1:
            return np.asarray(((values - 0.5) * turns).sum(0))
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
        if self.plan.max_participations is not None:
            joins &= joins.cumsum(0) <= self.plan.max_participations
        return self.scores(joins + self.noise * generator.standard_normal(shape), turns), coins

    def estimate(self, values: Array, sent: Flags, turns: Flags, coins: Flags) -> Estimate | None:
        """The plan's epsilon at the noise that canaries show; where nothing amplifies, two Gaussians through scores."""
        delta = self.plan.delta
        if not self.amplified:
            often = turns.sum(0) == turns.sum(0).max()  # of those that could join most often
            scores, inside = self.scores(values, turns)[often], coins[often]
            if min(int(inside.sum()), int((~inside).sum())) < 2:
                return None
            return gaussian_fit(scores[inside], scores[~inside], delta)
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

    def checks(
        self, values: Array, sent: Flags, drawn: Flags, clients: NDArray[np.int64], of: int
    ) -> tuple[Check, ...]:
        """Noise, arrival and sampling against the claim; clients and canaries are sampled, and looked at, apart.

        Args:
          values: `(T, m)` in clips, of rounds that released something.
          sent: `(T, m)`, whose row was in them.
          drawn: `(rounds, m)`, which canaries were sampled.
          clients: `(rounds,)`, how many clients were.
          of: clients in the population.
        """
        plan, cohorts = self.plan, tuple[Check, ...]()
        if plan.sampling != "cyclic":
            rate, scheme = plan.sample_rate, plan.sampling
            cohorts = (
                *_named("clients", inclusion(clients, of, rate, scheme)),
                *_named("canaries", inclusion(drawn.sum(1), drawn.shape[1], rate, scheme, drawn)),
            )
        return check_mechanism(values, sent, self.noise, cohorts=cohorts)


def _named(who: str, checks: Sequence[Check]) -> tuple[Check, ...]:
    return tuple(replace(check, name=f"{who}: {check.name}") for check in checks)


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
