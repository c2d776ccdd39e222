"""What a central plan for whole clients does in a loop in which the server holds every client's model."""

from __future__ import annotations

import torch
from torch import Tensor

from privfm.defenses.privacy import DPPlan
from privfm.federation.arm import Arm
from privfm.federation.population import drawn_in_secret
from privfm.plugins.changes import Changes, GlobalModel, spans
from privfm.randomness import Seeds


def drawn(plan: DPPlan, population: int, seeds: Seeds, now: int) -> tuple[int, ...]:
    """Who the plan samples for round `now`; in secret, each call draws anew."""
    sampling = Arm(plan=plan).sampling
    if plan.source == "secure":
        return drawn_in_secret(sampling, population, now)
    return sampling.draw(population, seeds.generator("cohort", now), now)


def clipped_sum(plan: DPPlan, base: GlobalModel, changes: Changes) -> Tensor:
    """Sum of the usable changes, each within the plan's clip: `(d,)` float64, on the CPU, one row after the other."""
    clip = plan.clip(spans(base.layout))
    assert clip is not None  # the plan is for whole clients
    total = torch.zeros(base.layout.d, dtype=torch.float64)
    for row in changes.one_by_one():
        total += clip.encode(row, {}, [])[0].rows[0].cpu()
    return total
