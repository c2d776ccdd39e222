"""The privacy plan: clip, sampling, noise, denominator and epsilon from one place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import exp, inf, isfinite, log, sqrt
from typing import TYPE_CHECKING, Any, Literal, final

import torch
from torch import Generator

from privfm.checks import InvalidArgument, at_least, fraction, non_negative, positive, require
from privfm.contracts import Outcome, Reveals, Rule, State, View
from privfm.defenses.transforms import Clip

if TYPE_CHECKING:
    from dp_accounting import DpEvent

RDP_ORDERS = range(2, 257)
"""Integer orders only: fractional ones fail to converge at some settings and are dropped with a log line."""

LARGEST_EPSILON = 20.0
"""More than this protects nobody: exp(20) is a likelihood ratio of 5e8."""

PLD_LIMIT = 100.0
"""Above this RDP epsilon the PLD accountant takes minutes (36 s at 634, measured) for a number nobody can use."""


@final
@dataclass(frozen=True)
class EpsilonRecord:
    """One privacy statement, complete: an epsilon without these fields means nothing.

    Attributes:
      epsilon: upper bound after `rounds`; infinite without noise.
      delta: probability with which the bound may fail.
      unit: what is protected: all data of one client.
      place: where the noise is added. `central`: the server sees the sum before the noise, over any channel.
      adversary: who observes. `released_model`: sees every released model, not who took part.
      relation: neighbouring relation.
      participation_bound: most rounds one client may join; None: amplification by secret sampling instead.
      rounds: rounds accounted for, skipped ones included.
      accountant: how epsilon was computed.
      event: dp-accounting's event, from which anybody can account again.
      noise: where the noise comes from.
      tuning: whether the choice of hyperparameters is covered.
    """

    epsilon: float
    delta: float
    unit: Literal["client"]
    place: Literal["central"]
    adversary: Literal["released_model"]
    relation: str
    participation_bound: int | None
    rounds: int
    accountant: str
    event: str
    noise: str
    tuning: str


@final
@dataclass(frozen=True)
class GaussianRelease(Rule):
    """Sum of the updates plus Gaussian noise, over a fixed denominator; noise in an empty round too.

    Formal guarantee: the Gaussian mechanism on the sum, if no row is longer than the sensitivity it was made for.
    A client that drops out or sends NaN is a zero row: the denominator does not follow who arrived.

    Args:
      deviation: standard deviation of the noise on each coordinate of the sum, in units of an update.
      denominator: expected cohort, from the plan.

    Source: McMahan et al., "Learning differentially private recurrent language models", 2018, section 2.2
    (the fixed-denominator estimator).
    """

    deviation: float
    denominator: float

    def __post_init__(self) -> None:
        non_negative("deviation", self.deviation)
        positive("denominator", self.denominator)

    @property
    def needs(self) -> Reveals:
        return Reveals.SUM

    @property
    def smallest_cohort(self) -> int:
        return 0

    def step(self, state: State, view: View, generator: Generator) -> tuple[State, Outcome]:
        total = view.total() if view.n else torch.zeros(view.d)
        noise = torch.randn(view.d, generator=generator) * self.deviation
        weights = torch.full((view.n,), 1 / self.denominator, dtype=torch.float64)
        return state, Outcome((total + noise.to(total)) / self.denominator, weights)


@final
@dataclass(frozen=True)
class DPPlan:
    """Central differential privacy for whole clients: Poisson sampling, one clip, noise on the sum.

    Formal guarantee: with the cohorts secret and N public, the released models of all rounds are
    (epsilon, delta)-indistinguishable from those of a run in which one client's updates are zero (zero-out relation;
    for these mechanisms the same numbers as add-or-remove). It says nothing against the server, which sees the sum
    before the noise, nor against anybody who knows who took part. What is protected is what clients train on: rows of
    the same people that fell to the validation or test split are evaluation data, and metrics on them are released.

    Conditions, enforced elsewhere: `compatibility.problems` refuses rules other than the mean, unbounded codecs and
    delta >= 1/N; the release fixes the denominator; rows are clipped again wherever the server opens them.

    Args:
      noise_multiplier: standard deviation of the noise on the sum, in units of the sensitivity.
      max_grad_norm: L2 clip of a client's whole update.
      sample_rate: probability with which each client joins a round, independently.
      delta: see `EpsilonRecord`.

    Source: McMahan et al., 2018; accounting by dp-accounting (PLD: Koskela et al., 2020; Doroshenko et al., 2022).

    >>> plan = DPPlan(noise_multiplier=1.0, max_grad_norm=1.0, sample_rate=1.0, delta=1e-5)
    >>> round(plan.epsilon(rounds=1), 3)
    4.377
    """

    noise_multiplier: float
    max_grad_norm: float
    sample_rate: float
    delta: float

    def __post_init__(self) -> None:
        non_negative("noise_multiplier", self.noise_multiplier)
        positive("max_grad_norm", self.max_grad_norm)
        fraction("sample_rate", self.sample_rate)
        fraction("delta", self.delta, one=False)

    @classmethod
    def calibrated(cls, epsilon: float, delta: float, rounds: int, sample_rate: float, max_grad_norm: float) -> DPPlan:
        """The plan with the least noise whose epsilon after `rounds` is at most `epsilon`.

        Raises:
          InvalidArgument: an argument is out of range.
        """
        positive("epsilon", epsilon)
        at_least("rounds", rounds, 1)
        require(epsilon <= LARGEST_EPSILON, f"epsilon={epsilon!r}: expected at most {LARGEST_EPSILON:g}")
        probe = cls(1.0, max_grad_norm, sample_rate, delta)
        noise = _calibrated_noise(epsilon, delta, rounds, probe.sample_rate)
        return cls(noise, max_grad_norm, sample_rate, delta)

    @property
    def clip(self) -> Clip:
        """The last client step of an honest client."""
        return Clip(self.max_grad_norm)

    def release(self, sensitivity: float, population: int) -> Rule:
        """The rule that takes the mean's place.

        Args:
          sensitivity: largest L2 norm of one client's decoded row.
          population: number of clients, public.
        """
        require(isfinite(sensitivity), f"sensitivity={sensitivity!r}: expected a finite bound; a codec has none")
        return GaussianRelease(self.noise_multiplier * sensitivity, self.sample_rate * population)

    def event(self, rounds: int) -> DpEvent:
        """dp-accounting's description of `rounds` rounds."""
        from dp_accounting import dp_event

        mechanism: DpEvent = dp_event.GaussianDpEvent(self.noise_multiplier)
        if self.sample_rate < 1:
            mechanism = dp_event.PoissonSampledDpEvent(self.sample_rate, mechanism)
        return dp_event.SelfComposedDpEvent(mechanism, rounds)

    def epsilon(self, rounds: int) -> float:
        """Epsilon after `rounds` rounds, against `released_model`; infinite without noise, zero before the first."""
        return self._accounted(rounds)[0]

    def record(self, rounds: int) -> EpsilonRecord:
        """The complete statement after `rounds` rounds."""
        epsilon, accountant = self._accounted(rounds)
        return EpsilonRecord(
            epsilon=epsilon,
            delta=self.delta,
            unit="client",
            place="central",
            adversary="released_model",
            relation="zero-out, public N",
            participation_bound=None,
            rounds=rounds,
            accountant=accountant,
            event=str(self.event(rounds)),
            noise="simulated: no guarantee if the seed is known",
            tuning="excludes tuning",
        )

    def _accounted(self, rounds: int) -> tuple[float, str]:
        at_least("rounds", rounds, 0)
        return _account(self.noise_multiplier, self.sample_rate, rounds, self.delta)


@lru_cache(maxsize=256)
def _account(noise_multiplier: float, sample_rate: float, rounds: int, delta: float) -> tuple[float, str]:
    """Epsilon and the accountant's name. RDP goes first, as a guard against minutes of PLD at useless epsilons."""
    if rounds == 0:
        return 0.0, "nothing released"
    if noise_multiplier == 0:
        return inf, "no noise"
    if sample_rate == 1:
        from dp_accounting import gaussian_mechanism

        return float(gaussian_mechanism.get_epsilon_gaussian(noise_multiplier / sqrt(rounds), delta)), "Gaussian, exact"
    event = DPPlan(noise_multiplier, 1.0, sample_rate, delta).event(rounds)
    loose = float(_rdp_accountant().compose(event).get_epsilon(delta))
    if loose > PLD_LIMIT:
        return loose, f"RDP, orders 2 to 256, dp-accounting {_version()}"
    return float(_pld_accountant().compose(event).get_epsilon(delta)), f"PLD, dp-accounting {_version()}"


@lru_cache(maxsize=64)
def _calibrated_noise(epsilon: float, delta: float, rounds: int, sample_rate: float) -> float:
    if sample_rate == 1:
        from dp_accounting import gaussian_mechanism

        exact = float(gaussian_mechanism.get_sigma_gaussian(epsilon, delta)) * sqrt(rounds)
        return exact * (1 + 1e-9)  # rounding must not end above the target

    def loose(noise_multiplier: float) -> float:
        event = DPPlan(noise_multiplier, 1.0, sample_rate, delta).event(rounds)
        return float(_rdp_accountant().compose(event).get_epsilon(delta))

    def tight(noise_multiplier: float) -> float:
        return _account(noise_multiplier, sample_rate, rounds, delta)[0]

    enough = _solve(loose, epsilon, 0.05, 1e4)  # RDP is 8 to 18 % looser: an upper end for the exact accountant
    return _solve(tight, epsilon, 0.75 * enough, enough)


def _solve(epsilon_of: Callable[[float], float], epsilon: float, low: float, high: float) -> float:
    """Least noise multiplier in [low, high] with `epsilon_of` at most `epsilon`, to 0.1 %."""
    from scipy.optimize import brentq

    aim = log(epsilon) - 5e-4  # stays below the target when the root is off by the tolerance

    def excess(logarithm: float) -> float:
        return log(max(epsilon_of(exp(logarithm)), 1e-12)) - aim

    if excess(log(high)) > 0:
        raise InvalidArgument(f"epsilon={epsilon!r} cannot be met with a noise multiplier up to {high:g}")
    while excess(log(low)) < 0:
        low *= 0.75
    return exp(float(brentq(excess, log(low), log(high), xtol=1e-4)))


def _rdp_accountant() -> Any:  # dp-accounting has no types
    from dp_accounting import NeighboringRelation
    from dp_accounting.rdp import RdpAccountant

    return RdpAccountant(orders=list(RDP_ORDERS), neighboring_relation=NeighboringRelation.REPLACE_SPECIAL)


def _pld_accountant() -> Any:
    from dp_accounting import NeighboringRelation
    from dp_accounting.pld import PLDAccountant

    return PLDAccountant(neighboring_relation=NeighboringRelation.REPLACE_SPECIAL)


def _version() -> str:
    from importlib.metadata import version

    return version("dp-accounting")
