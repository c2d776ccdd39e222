"""What a plan is worth: who observes what, how often, and the epsilon of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import TYPE_CHECKING, Literal, final

from privfm.checks import at_least, require
from privfm.defenses.privacy.accounting import Mechanism, SampledGaussian, account, event, loose

if TYPE_CHECKING:
    from dp_accounting import DpEvent

    from privfm.defenses.privacy.plan import DPPlan

Place = Literal["central", "key_holder", "local", "distributed"]
Adversary = Literal["released_model", "server"]
Observed = tuple[Adversary, Mechanism, int]
"""Who observes which mechanism how often."""


@final
@dataclass(frozen=True)
class EpsilonRecord:
    """One privacy statement, complete: an epsilon without these fields means nothing.

    Attributes:
      epsilon: upper bound after `rounds`; infinite without noise. For examples, the largest over all clients.
      delta: probability with which the bound may fail.
      unit: what is protected: all data of one client, or one example of a client.
      place: where the noise is added. `central`: the server sees the sum before the noise, over any channel;
        `key_holder`: who decrypts adds it; `local`: each client, on its own; `distributed`: all clients together.
      adversary: who observes. `released_model`: sees every released model, not who took part; `server`: sees all that
        the server sees, and who took part, so that no sampling of clients amplifies.
      relation: neighbouring relation.
      participation_bound: most rounds one client may join; None: amplification by secret sampling instead.
      rounds: rounds accounted for, skipped ones included.
      accountant: how epsilon was computed.
      event: dp-accounting's event, from which anybody can account again.
      noise: where the noise comes from.
      tuning: whether the choice of hyperparameters is covered.
      median: epsilon of the median client, where clients differ; None: it is the same for all.
      clients: how many clients `epsilon` is the largest of; None: it is the same for all.
    """

    epsilon: float
    delta: float
    unit: Literal["client", "example"]
    place: Place
    adversary: Adversary
    relation: str
    participation_bound: int | None
    rounds: int
    accountant: str
    event: str
    noise: str
    tuning: str
    median: float | None = None
    clients: int | None = None


def records(plan: DPPlan, after: int, examples: Sequence[int], d: int | None) -> tuple[EpsilonRecord, ...]:
    """See `DPPlan.records`."""
    at_least("after", after, 0)
    if plan.unit == "example":
        return (_of_examples(plan, after, examples),)
    found = observed(plan, after, None, d)
    return tuple(_statement(plan, after, each) for each in found)


def described(plan: DPPlan, after: int, examples: Sequence[int], d: int | None) -> DpEvent | str:
    """See `DPPlan.event`."""
    size = worst(plan, after, examples) if plan.unit == "example" else None
    _, mechanism, times = observed(plan, after, size, d)[0]
    return event(mechanism, times)


def _of_examples(plan: DPPlan, after: int, examples: Sequence[int]) -> EpsilonRecord:
    """The largest over all clients, and the median beside it."""
    largest = observed(plan, after, worst(plan, after, examples), None)[0]
    by_rough = sorted(examples, key=lambda n: _rough(*observed(plan, after, n, None)[0][1:], plan.delta))
    _, *median = observed(plan, after, by_rough[len(examples) // 2], None)[0]
    statement = _statement(plan, after, largest)
    return replace(statement, median=account(*median, plan.delta)[0], clients=len(examples))


def worst(plan: DPPlan, after: int, examples: Sequence[int]) -> int:
    """Size of a client with the largest epsilon; only those that may have it are accounted exactly."""
    require(len(examples) > 0, "examples=(): each client composes its own sampling rate; give all sizes")
    mechanisms = {n: observed(plan, after, n, None)[0][1:] for n in sorted(set(examples))}
    rough = {n: _rough(*mechanism, plan.delta) for n, mechanism in mechanisms.items()}
    found, largest = 0, -inf
    for n in sorted(rough, key=lambda n: -rough[n]):
        if rough[n] <= largest:  # an upper bound: nobody from here on can be above
            break
        epsilon = account(*mechanisms[n], plan.delta)[0]
        found, largest = (n, epsilon) if epsilon > largest else (found, largest)
    return found


def _rough(mechanism: Mechanism, times: int, delta: float) -> float:
    """A fast upper bound."""
    if isinstance(mechanism, SampledGaussian):
        if mechanism.poisson and mechanism.relation != "replace-one" and mechanism.noise_multiplier > 0:
            return loose(mechanism, times, delta) if times else 0.0
        mechanism = mechanism.alone
    return account(mechanism, times, delta)[0]


def _statement(plan: DPPlan, after: int, observed: Observed) -> EpsilonRecord:
    adversary, mechanism, times = observed
    epsilon, accountant = account(mechanism, times, plan.delta)
    amplified = plan.unit == "client" and isinstance(mechanism, SampledGaussian) and mechanism.sample_rate < 1
    fixed = isinstance(mechanism, SampledGaussian) and mechanism.effective_relation != plan.relation
    relation = "replace-one (a cohort of fixed size)" if fixed else plan.relation
    known = "over the denominator of a public N" if relation == "add-or-remove" else "public N"
    return EpsilonRecord(
        epsilon=epsilon,
        delta=plan.delta,
        unit=plan.unit,
        place=plan.place,
        adversary=adversary,
        relation=f"{relation}, {known}",
        participation_bound=None if amplified else plan.participations(after),
        rounds=after,
        accountant=accountant,
        event=str(event(mechanism, times)),
        noise=_noise(plan),
        tuning="excludes tuning",
    )


def _noise(plan: DPPlan) -> str:
    if plan.simulated_population is not None:
        return f"scaled to a population of {plan.simulated_population:,}: no guarantee for this run"
    if plan.source == "secure":
        return "secure: from the operating system's generator, on a grid; no seed is kept"
    return "simulated: no guarantee if the seed is known"


def observed(plan: DPPlan, after: int, examples: int | None, d: int | None) -> list[Observed]:
    """Who observes which mechanism how often."""
    joined = plan.participations(after)
    if plan.unit == "example":
        local = plan.local_sampling
        require(examples is not None, "examples=(): each client composes its own sampling rate; give all sizes")
        n = examples or 1
        own = SampledGaussian(local.noise(n, plan.noise_multiplier), local.rate(n), "poisson", plan.relation)
        return [("server", own, joined * local.steps(n))]
    if plan.integers is not None:
        require(d is not None, "d=None: rounding to a grid costs more in more dimensions; give the trained values")
        return [("server", plan.integers.mechanism(plan.noise_multiplier, d or 1), joined)]
    bare = SampledGaussian(plan.noise_multiplier, relation=plan.relation)
    if plan.place == "local":
        return [("server", bare, joined)]
    if plan.bands > 1:  # all rounds are one mechanism, sized for `max_participations`
        return [("released_model", bare, min(joined, 1))]
    secret = plan.sampling in {"poisson", "fixed_size"} and joined == after
    if secret:
        kind: Literal["poisson", "fixed_size"] = "poisson" if plan.sampling == "poisson" else "fixed_size"
        released: tuple[Adversary, Mechanism, int] = (
            "released_model",
            replace(bare, sample_rate=plan.sample_rate, amplification=kind),
            after,
        )
    else:
        released = ("released_model", _unsampled(plan, bare), joined)
    return [released] if plan.place == "central" else [("server", _unsampled(plan, bare), joined), released]


def _unsampled(plan: DPPlan, bare: SampledGaussian) -> SampledGaussian:
    """Whoever knows who took part: with a cohort of fixed size, one more client is another one less."""
    return replace(bare, relation="replace-one") if plan.sampling == "fixed_size" else bare
