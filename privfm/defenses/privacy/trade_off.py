"""A plan's own trade-off functions: how hard its releases make it to tell a unit's presence, at several noises.

An audit that tests a whole trade-off function certifies more than one that tests a single (epsilon, delta), but only
where the function is the mechanism's own: a Gaussian family is no bound for a sub-sampled run. `members` gives the
family around a claim: the same mechanism with its noise multiplier divided by each of some strengths.

What an audit of one run needs of a member is its inverse blow-up function: the least probability that an event can
have in one world when it has probability y in the other. The inequality must hold whichever world the canary was in,
and it is averaged over the other canaries' coins, so the function must hold in both directions and be convex: it is
the convex hull of the worse of the two, not one of them (for Poisson sampling, adding and removing differ).

Source: Mahloujifar, Melis, Chaudhuri, "Auditing f-differential privacy in one run", 2024; trade-off functions from
privacy profiles: Dong, Roth, Su, "Gaussian differential privacy", 2019; privacy loss distributions: see `accounting`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import exp, sqrt
from typing import TYPE_CHECKING, final

from privfm.checks import at_least, fraction, positive, require
from privfm.defenses.privacy.accounting import PLD_LIMIT, Mechanism, SampledGaussian, account, loose
from privfm.defenses.privacy.statements import Adversary, observed
from privfm.trade_offs import GaussianInverse, Inverse, LargestLine

if TYPE_CHECKING:
    from privfm.defenses.privacy.plan import DPPlan

_LINES = 400
"""Epsilons at which the privacy profile is read, on each side of zero: the result is within 1e-4 of the exact one."""

_INTERVAL = 1e-3
"""Discretisation of privacy losses: deltas are upper bounds at any, and this one takes half as long as accounting's."""

_LEAST_DELTA = 1e-12
"""The profile is read down to here: recursions start at probabilities far above, and rounding is not far below."""

_ROUNDING = 1e-13
"""Added to each delta: float64 convolutions and cancelling sums are right to about 1e-15."""


@final
@dataclass(frozen=True)
class ProfileInverse:
    """Of any mechanism, from its privacy profile: the largest of lines in y and of lines in 1 - y.

    Each line is a bound by itself (`Q(E) >= e^-epsilon (P(E) - delta)`), so their largest never lies above the exact
    function, whatever the epsilons; more lines only bring it closer. Nothing is interpolated.

    Attributes:
      low: `e^-epsilon y - e^-epsilon delta`, and zero, as a function of y.
      high: `1 - delta - e^epsilon (1 - y)`, as a function of 1 - y: near y = 1 nothing is lost to rounding.
    """

    low: LargestLine
    high: LargestLine

    @classmethod
    def of(cls, epsilons: Sequence[float], deltas: Sequence[float]) -> ProfileInverse:
        """From points `(epsilon >= 0, delta)` of a profile that holds in both directions; delta may be too large.

        In both directions, (epsilon, delta) also says `1 - P(E) >= e^-epsilon (1 - Q(E) - delta)`: the second line.

        Cost: O(k log k) for k points.
        """
        pairs = list(zip(epsilons, deltas, strict=True))
        low = [(exp(-epsilon), -exp(-epsilon) * delta) for epsilon, delta in pairs]
        high = [(-exp(epsilon), 1 - delta) for epsilon, delta in pairs]
        return cls(LargestLine.of([(0.0, 0.0), *low]), LargestLine.of(high))

    def __call__(self, y: float) -> float:
        """At most the least probability in the other world, of an event of probability `y`. Cost: O(log lines)."""
        y = min(max(y, 0.0), 1.0)  # a probability that rounding has carried over an end
        return max(self.low(y), self.high(1 - y))


def members(
    mechanism: Mechanism, times: int, delta: float, strengths: Sequence[float]
) -> tuple[tuple[float, Inverse], ...]:
    """The mechanism with its noise divided by each strength: `(epsilon at delta, inverse blow-up function)`.

    | mechanism                       | inverse                                    | epsilon                  |
    |---------------------------------|--------------------------------------------|--------------------------|
    | Gaussian, nothing sampled       | closed form                                | exact                    |
    | Gaussian, Poisson sampling      | never above the exact one                  | PLD, above by about 1e-5 |
    | cohorts of fixed size           | refused: no trade-off function is known    |                          |
    | distributed noise               | refused: known by its Rényi divergence     |                          |

    A rejected member says that the noise is less than its own, and its epsilon follows if the mechanism is of this
    family; that assumption belongs beside the bound.

    Args:
      mechanism: as claimed.
      times: it is played.
      delta: of the claim.
      strengths: what the noise multiplier is divided by: 1 is the claim, 2 half its noise.

    Raises:
      InvalidArgument: an argument is out of range, no trade-off function is known, or a member's epsilon is above 100.

    Cost: of a sub-sampled member 0.1 to 1 s at epsilons 1 to 8 (20 rounds), kept for the next call; of a call of its
    inverse 2 us.

    >>> ((epsilon, inverse),) = members(SampledGaussian(1.0), times=1, delta=1e-5, strengths=[1.0])
    >>> round(epsilon, 3), round(inverse(0.9), 3)
    (4.377, 0.611)
    """
    at_least("times", times, 1)
    fraction("delta", delta, one=False)
    require(len(strengths) > 0, "strengths=(): expected at least one; 1.0 is the claim itself")
    for strength in strengths:
        positive("strength", strength)
    known = isinstance(mechanism, SampledGaussian) and (mechanism.poisson or not _fixed_size(mechanism))
    require(
        known,
        f"mechanism={mechanism!r}: no trade-off function is known but that of Gaussian noise, alone or under Poisson "
        "sampling; audit it by a bound that assumes no family",
    )
    return tuple(_member(_stronger(mechanism, strength), times, delta) for strength in strengths)


def plan_members(
    plan: DPPlan, rounds: int, strengths: Sequence[float], adversary: Adversary = "released_model"
) -> tuple[tuple[float, Inverse], ...]:
    """`members` of what a plan for clients claims after `rounds`, at its delta.

    Args:
      plan: for whole clients.
      rounds: that were played.
      strengths: see `members`.
      adversary: whose epsilon: an audit whose scores know who took part audits the `server`'s.

    Raises:
      InvalidArgument: see `members`; or nothing is claimed against that adversary.
    """
    require(plan.unit == "client", "unit='example': each client has its own mechanism; pick one and use `members`")
    claims = observed(plan, rounds, None, None) if plan.integers is None else []
    found = [(mechanism, times) for who, mechanism, times in claims if who == adversary]
    require(
        len(found) > 0,
        f"adversary={adversary!r}: the plan has no Gaussian mechanism that it observes (place={plan.place!r})",
    )
    mechanism, times = found[0]
    return members(mechanism, times, plan.delta, strengths)


def released_epsilon(plan: DPPlan, rounds: int, d: int | None = None) -> float:
    """What a plan for clients claims against who sees released models; where it claims nothing there, the first record.

    Args:
      plan: for whole clients.
      rounds: that were played.
      d: trained values; needed for distributed noise.
    """
    records = {record.adversary: record.epsilon for record in plan.records(rounds, d=d)}
    return records.get("released_model", next(iter(records.values())))


def estimated_epsilon(plan: DPPlan, rounds: int, noise_multiplier: float) -> float:
    """`released_epsilon` of a plan at a noise multiplier that was measured from outside: no bound.

    Args:
      plan: for whole clients.
      rounds: that were played.
      noise_multiplier: measured.
    """
    positive("noise_multiplier", noise_multiplier)
    return released_epsilon(replace(plan, noise_multiplier=noise_multiplier), rounds)


def _fixed_size(mechanism: SampledGaussian) -> bool:
    return mechanism.amplification == "fixed_size" and mechanism.sample_rate < 1


def _stronger(mechanism: Mechanism, strength: float) -> SampledGaussian:
    if not isinstance(mechanism, SampledGaussian):
        raise TypeError("checked above")
    positive("noise_multiplier", mechanism.noise_multiplier)
    return replace(mechanism, noise_multiplier=mechanism.noise_multiplier / strength)


def _member(mechanism: SampledGaussian, times: int, delta: float) -> tuple[float, Inverse]:
    noise = mechanism.noise_multiplier
    if not mechanism.poisson:
        moved = 2.0 if mechanism.effective_relation == "replace-one" else 1.0
        return account(mechanism, times, delta)[0], GaussianInverse(moved * sqrt(times) / noise)
    rough = loose(replace(mechanism, relation="zero-out"), times, delta)
    require(
        rough <= PLD_LIMIT,
        f"noise_multiplier={noise:.4g}: epsilon is about {rough:.0f}, beyond {PLD_LIMIT:g} and any audit; use lower "
        "strengths",
    )
    return account(mechanism, times, delta)[0], _sampled_inverse(mechanism, times)


@lru_cache(maxsize=256)
def _sampled_inverse(mechanism: SampledGaussian, times: int) -> ProfileInverse:
    """From the privacy loss distribution, whose deltas are upper bounds and the larger of both directions."""
    import numpy as np
    from dp_accounting import NeighboringRelation
    from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism

    replaced = mechanism.relation == "replace-one"
    losses = from_gaussian_mechanism(
        mechanism.noise_multiplier,
        value_discretization_interval=_INTERVAL,
        sampling_prob=mechanism.sample_rate,
        neighboring_relation=NeighboringRelation.REPLACE_ONE if replaced else NeighboringRelation.ADD_OR_REMOVE_ONE,
    ).self_compose(times)
    furthest = losses.get_epsilon_for_delta(_LEAST_DELTA)
    require(np.isfinite(furthest), f"times={times!r}: too many for the accountant's rounding; audit fewer rounds")
    epsilons = np.linspace(0.0, furthest, _LINES)
    deltas = np.clip(losses.get_delta_for_epsilon(epsilons), 0.0, 1.0) + _ROUNDING
    return ProfileInverse.of(epsilons.tolist(), deltas.tolist())
