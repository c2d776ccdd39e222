"""What a central plan for whole clients needs of a loop in which the server holds every client's model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from privfm.checks import at_least, require
from privfm.contracts import Rule
from privfm.defenses.privacy import DPPlan
from privfm.federation.arm import Arm
from privfm.federation.compatibility import FEWEST_CLIENTS, problems
from privfm.plugins.changes import Changes, GlobalModel


def refuse_plan(plan: DPPlan, population: int, rule: Rule, scaling: float | Mapping[str, float] | None) -> None:
    """Refuses what would make the plan's epsilon a lie here.

    Raises:
      InvalidArgument: with the way out.
    """
    at_least("population", population, 1)
    require(
        plan.unit == "client" and plan.place == "central",
        f"unit={plan.unit!r}, place={plan.place!r}: here the server adds noise for whole clients (unit='client', "
        "place='central'); clients that add their own do so while they train, and their models are then averaged as "
        "any; the other places need a protocol: privfm run",
    )
    require(not plan.adaptive, "clipping=AdaptiveQuantile: clients would have to send their count; Flat, or privfm run")
    require(plan.bands == 1, f"bands={plan.bands}: noise that is correlated between rounds; bands=1, or privfm run")
    require(plan.weight_cap is None, f"weight_cap={plan.weight_cap}: every client counts the same here; leave it out")
    require(scaling is None, "scaling: the plan's clip bounds factors, not their products; leave it out under a plan")
    require(
        population >= FEWEST_CLIENTS,
        f"population={population}: fewer than {FEWEST_CLIENTS} clients cannot hide one of them; use unit='example' "
        "where the clients train",
    )
    found = problems(Arm(rule=rule, plan=plan), d=1, population=population)
    require(not found, "; ".join(f"{problem.what}: {problem.instead}" for problem in found))


def clipped_sum(plan: DPPlan, base: GlobalModel, changes: Changes) -> Tensor:
    """Sum of the usable changes, each within the plan's clip: `(d,)` float64, on the CPU, one row after the other."""
    ends = torch.tensor(base.layout.sizes).cumsum(0).tolist()
    clip = plan.clip(tuple(zip([0, *ends[:-1]], ends, strict=True)))
    assert clip is not None  # the plan is for whole clients
    total = torch.zeros(base.layout.d, dtype=torch.float64)
    for row in changes.one_by_one():
        total += clip.encode(row, {}, [])[0].rows[0].cpu()
    return total
