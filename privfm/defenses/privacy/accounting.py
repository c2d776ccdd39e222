"""Epsilon of composed mechanisms, by dp-accounting alone. The one place that knows what its accountants mean.

| sampling   | neighbours           | event                              | accountant                   |
|------------|----------------------|------------------------------------|------------------------------|
| none       | zero-out, add/remove | Gaussian(z)                        | closed form                  |
| none       | replace-one          | Gaussian(z / 2)                    | closed form                  |
| Poisson    | zero-out, add/remove | PoissonSampled(q, Gaussian(z))     | PLD, guarded by RDP          |
| Poisson    | replace-one          | PoissonSampled(q, Gaussian(z))     | PLD, which doubles by itself |
| fixed size | replace-one          | WithoutReplacement(Gaussian(z / 2))| RDP                          |

z is the deviation of the noise over the length C of one contribution. Replacing one moves a sum by 2 C, which
`PLDAccountant` knows and `RdpAccountant` does not: `event` owns that factor. A cohort of fixed size is accounted for
replace-one whatever was asked, because leaving a client out brings another in.

Sources: dp-accounting (Google); PLD: Koskela, Jälkö, Honkela, 2020, and Doroshenko et al., "Connect the dots", 2022;
RDP: Mironov, 2017; without replacement: Wang, Balle, Kasiviswanathan, 2019; the exact Gaussian: Balle and Wang, 2018.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import exp, inf, log, sqrt
from typing import TYPE_CHECKING, Any, Literal, final

import numpy

from privfm.checks import InvalidArgument

if TYPE_CHECKING:
    from dp_accounting import DpEvent

Relation = Literal["zero-out", "add-or-remove", "replace-one"]
Amplification = Literal["none", "poisson", "fixed_size"]

RDP_ORDERS = (*range(2, 257),)
"""Integer orders only: fractional ones fail to converge at some settings and are dropped with a log line."""

FIXED_SIZE_ORDERS = (*range(2, 65), 80, 96, 128, 192, 256)
"""Fewer, because an order costs its square without replacement: 0.2 instead of 4 s, and the same epsilon."""

CONCENTRATED_ORDERS = (*(2 + k / 20 for k in range(160)), *range(10, 257))
"""From 2 on, where the bound on distributed noise holds; between whole numbers too, as its curve is a line."""

PLD_LIMIT = 100.0
"""Above this RDP epsilon the PLD accountant takes minutes (36 s at 634, measured) for a number nobody can use."""


PLD_INTERVAL = 5e-4
"""Discretisation of privacy losses. The result is an upper bound at any: at the library's 1e-4 it is lower by less than
2e-4 for all plans of its oracles, and takes five times as long."""


@final
@dataclass(frozen=True)
class SampledGaussian:
    """The Gaussian mechanism on a sum to which each unit contributes a vector no longer than C.

    Attributes:
      noise_multiplier: deviation of the noise over C.
      sample_rate: probability that a unit takes part.
      amplification: how it is sampled, where the observer does not see who was; `none` where it does.
      relation: neighbouring data sets.
    """

    noise_multiplier: float
    sample_rate: float = 1.0
    amplification: Amplification = "none"
    relation: Relation = "zero-out"

    @property
    def poisson(self) -> bool:
        """Whether Poisson sampling amplifies it."""
        return self.amplification == "poisson" and self.sample_rate < 1

    @property
    def alone(self) -> SampledGaussian:
        """The same without amplification: an upper bound for it."""
        return SampledGaussian(self.noise_multiplier, relation=self.effective_relation)

    @property
    def effective_relation(self) -> Relation:
        """What is accounted for."""
        return "replace-one" if self.amplification == "fixed_size" else self.relation


@final
@dataclass(frozen=True)
class Concentrated:
    """A mechanism of `(xi, rho)`-zero-concentrated differential privacy: distributed discrete Gaussian noise.

    Source: Bun and Steinke, "Concentrated differential privacy", 2016, definition 1.1.
    """

    rho: float
    xi: float


@final
@dataclass(frozen=True)
class RenyiCurve:
    """A mechanism known by its Rényi divergences at some orders: Skellam noise.

    Attributes:
      name: for the record.
      orders: above 1.
      divergences: one an order.
    """

    name: str
    orders: tuple[float, ...]
    divergences: tuple[float, ...]


Mechanism = SampledGaussian | Concentrated | RenyiCurve


def event(mechanism: Mechanism, times: int) -> DpEvent | str:
    """dp-accounting's description of a mechanism played `times` times; words where it has none."""
    from dp_accounting import dp_event

    if isinstance(mechanism, RenyiCurve):
        return f"SelfComposed(event={mechanism.name}, count={times})"
    if isinstance(mechanism, Concentrated):
        return dp_event.SelfComposedDpEvent(dp_event.ZCDpEvent(mechanism.rho, mechanism.xi), times)
    noise, rate = mechanism.noise_multiplier, mechanism.sample_rate
    doubled = mechanism.effective_relation == "replace-one"
    if rate < 1 and mechanism.amplification == "poisson":  # PLDAccountant doubles the sensitivity by itself
        return dp_event.SelfComposedDpEvent(
            dp_event.PoissonSampledDpEvent(rate, dp_event.GaussianDpEvent(noise)), times
        )
    one: DpEvent = dp_event.GaussianDpEvent(noise / 2 if doubled else noise)
    if rate < 1 and mechanism.amplification == "fixed_size":
        share = Fraction(rate).limit_denominator(10**6)
        one = dp_event.SampledWithoutReplacementDpEvent(share.denominator, share.numerator, one)
    return dp_event.SelfComposedDpEvent(one, times)


@lru_cache(maxsize=1024)
def account(mechanism: Mechanism, times: int, delta: float) -> tuple[float, str]:
    """Epsilon after `times` times, and the accountant's name. RDP goes first where PLD might take minutes."""
    if times == 0:
        return 0.0, "nothing released"
    if isinstance(mechanism, SampledGaussian):
        return _gaussian(mechanism, times, delta)
    if isinstance(mechanism, Concentrated):
        if mechanism.rho == inf:
            return inf, "no noise"
        return _rdp(event(mechanism, times), "add-or-remove", delta, CONCENTRATED_ORDERS), f"RDP of zCDP, {_library()}"
    from dp_accounting.rdp import compute_epsilon

    curve = [times * divergence for divergence in mechanism.divergences]
    return float(compute_epsilon(list(mechanism.orders), curve, delta)[0]), f"RDP, {_library()}"


@lru_cache(maxsize=4096)
def loose(mechanism: SampledGaussian, times: int, delta: float) -> float:
    """A fast upper bound of the epsilon of Poisson sampling under zero-out."""
    return _rdp(event(mechanism, times), "zero-out", delta)


def _gaussian(mechanism: SampledGaussian, times: int, delta: float) -> tuple[float, str]:
    noise = mechanism.noise_multiplier
    if noise == 0:
        return inf, "no noise"
    if mechanism.sample_rate == 1 or mechanism.amplification == "none":
        from dp_accounting import gaussian_mechanism

        noise = noise / 2 if mechanism.effective_relation == "replace-one" else noise
        with numpy.errstate(divide="ignore"):  # with much noise its search takes the logarithm of 0
            epsilon = float(gaussian_mechanism.get_epsilon_gaussian(noise / sqrt(times), delta))
        return epsilon, "Gaussian, exact"
    if mechanism.amplification == "fixed_size":
        epsilon = _rdp(event(mechanism, times), "replace-one", delta, FIXED_SIZE_ORDERS)
        return _least((epsilon, f"RDP, {_library()}"), _gaussian(mechanism.alone, times, delta))
    replaced = mechanism.relation == "replace-one"
    guard = loose(SampledGaussian(noise, mechanism.sample_rate, "poisson"), times, delta)  # of zero-out, for the cost
    bound = _gaussian(mechanism.alone, times, delta)
    if not replaced:  # dp-accounting's RDP knows no Poisson sampling of replaced units
        bound = _least((guard, f"RDP, orders 2 to 256, {_library()}"), bound)
    if guard > PLD_LIMIT:
        return bound
    # PLD rounds: after a million rounds it may lie above the others, and below a delta of 1e-14 it is infinite.
    return _least((_pld(event(mechanism, times), mechanism.relation, delta), f"PLD, {_library()}"), bound)


def _least(first: tuple[float, str], second: tuple[float, str]) -> tuple[float, str]:
    return first if first[0] <= second[0] else second


def _rdp(event: Any, relation: Relation, delta: float, orders: tuple[float, ...] = RDP_ORDERS) -> float:
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant(orders=list(orders), neighboring_relation=_relation(relation))
    return float(accountant.compose(event).get_epsilon(delta))


def _pld(event: Any, relation: Relation, delta: float) -> float:
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant(_relation(relation), PLD_INTERVAL)
    return float(accountant.compose(event).get_epsilon(delta))


def _relation(relation: Relation) -> Any:
    from dp_accounting import NeighboringRelation

    return {
        "zero-out": NeighboringRelation.REPLACE_SPECIAL,
        "add-or-remove": NeighboringRelation.ADD_OR_REMOVE_ONE,
        "replace-one": NeighboringRelation.REPLACE_ONE,
    }[relation]


def least_noise(epsilon_of: Callable[[float], float], epsilon: float, low: float, high: float) -> float:
    """Least noise multiplier in [low, high] with `epsilon_of` at most `epsilon`, to 0.1 %.

    Raises:
      InvalidArgument: the largest is not enough.
    """
    from scipy.optimize import brentq

    aim = log(epsilon) - 5e-4  # stays below the target when the root is off by the tolerance

    def excess(logarithm: float) -> float:
        return log(min(max(epsilon_of(exp(logarithm)), 1e-12), 1e12)) - aim

    if excess(log(high)) > 0:
        raise InvalidArgument(f"epsilon={epsilon!r} cannot be met with a noise multiplier up to {high:g}")
    while excess(log(low)) < 0:
        low *= 0.75
    return exp(float(brentq(excess, log(low), log(high), xtol=1e-4)))


def _library() -> str:
    from importlib.metadata import version

    return f"dp-accounting {version('dp-accounting')}"
