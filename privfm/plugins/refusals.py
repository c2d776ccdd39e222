"""Plans and codecs that somebody else's loop or framework cannot keep: what all plug-ins refuse, in the same words."""

from __future__ import annotations

from privfm.checks import RoundFailed, at_least, require
from privfm.contracts import Rule, Transform
from privfm.defenses.privacy import DPPlan
from privfm.federation.arm import Arm
from privfm.federation.compatibility import FEWEST_CLIENTS, problems


def require_central(plan: DPPlan, population: int, rule: Rule, elsewhere: str) -> None:
    """Checks a plan for a server that holds every client's update and adds the noise.

    Args:
      plan: the plan.
      population: number of clients, public.
      rule: in whose place the plan acts.
      elsewhere: what to use for plans whose noise belongs to another place.

    Raises:
      InvalidArgument: epsilon would be a lie here; with the way out.
    """
    at_least("population", population, 1)
    require(
        plan.unit == "client" and plan.place == "central",
        f"unit={plan.unit!r}, place={plan.place!r}: here the server adds noise for whole clients (unit='client', "
        f"place='central'); {elsewhere}",
    )
    require(not plan.adaptive, "clipping=AdaptiveQuantile: clients would have to send their count; Flat, or privfm run")
    require(plan.bands == 1, f"bands={plan.bands}: noise that is correlated between rounds; bands=1, or privfm run")
    require_real_clients(plan)
    require(
        population >= FEWEST_CLIENTS,
        f"population={population}: fewer than {FEWEST_CLIENTS} clients cannot hide one of them; use unit='example' "
        "where the clients train",
    )
    found = problems(Arm(rule=rule, plan=plan), d=1, population=population)
    require(not found, "; ".join(f"{problem.what}: {problem.instead}" for problem in found))


def require_local(plan: DPPlan, elsewhere: str) -> None:
    """Checks a plan for a client that adds its own noise to its whole update.

    Args:
      plan: the plan.
      elsewhere: who takes plans for another place.

    Raises:
      InvalidArgument: it is for another place, or its noise can be drawn again.
    """
    require(
        plan.unit == "client" and plan.place == "local",
        f"unit={plan.unit!r}, place={plan.place!r}: here a client adds its own noise to its whole update; use "
        f"unit='client' and place='local', or {elsewhere}",
    )
    require_secret_noise(plan)


def require_secret_noise(plan: DPPlan) -> None:
    """Checks that whoever is to be kept from a client's update cannot draw its noise again.

    Raises:
      InvalidArgument: noise is seeded, and the server is the adversary.
    """
    require(
        plan.place == "central" or plan.source == "secure",
        f"source={plan.source!r}, place={plan.place!r}: who knows the seed takes the noise off; use source='secure'",
    )


def require_real_clients(plan: DPPlan) -> None:
    """Checks that a plan is for the clients that there are, who all count the same.

    Raises:
      InvalidArgument: it weighs them by their examples, or has the noise of a larger population.
    """
    require(plan.weight_cap is None, f"weight_cap={plan.weight_cap}: every client counts the same here; leave it out")
    require(
        plan.simulated_population is None,
        f"simulated_population={plan.simulated_population}: it guarantees nothing to the clients that there are; leave "
        "it out",
    )


def require_paid(plan: DPPlan, played: int) -> None:
    """Checks that the budget pays for one round more.

    Args:
      plan: the plan.
      played: rounds so far.

    Raises:
      RoundFailed: it does not.
    """
    budget = plan.budget
    if budget is not None and plan.epsilon(played + 1) > budget:
        raise RoundFailed(
            f"budget={budget:g} is spent: epsilon is {plan.epsilon(played):.4g}, and another round costs more than "
            "is left; training ends"
        )


def require_codec(codec: Transform) -> None:
    """Checks that a transform is a wire format which one message by itself can be decoded from.

    Raises:
      InvalidArgument: it is a client step, it remembers, or it adds a share of noise.
    """
    name = type(codec).__name__
    require(isinstance(codec, Transform), f"codec={codec!r}: expected a Transform, such as FixedPoint")
    require(codec.binding, f"codec={name} is a client step, which nobody decodes; expected a codec, such as FixedPoint")
    require(not codec.init(1), f"codec={name} remembers a client's rounds; use one without state, such as FixedPoint")
    require(codec.modulus is None, f"codec={name} adds shares of noise; a plan with place='distributed' brings it")


def require_seed(plan: DPPlan | None, seed: int | None) -> int:
    """The seed, 0 where none is given; but noise that everybody can draw again protects nobody.

    Raises:
      InvalidArgument: the plan's noise is seeded, and no seed was given.
    """
    require(
        plan is None or plan.source == "secure" or seed is not None,
        "source='seeded' without a seed: noise from a default one can be taken off by anybody; give a secret seed=, or "
        "use source='secure'",
    )
    return 0 if seed is None else seed
