"""How much noise a plan needs for an epsilon."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from privfm.defenses.privacy.accounting import SampledGaussian, least_noise, loose
from privfm.defenses.privacy.example_level import LocalSampling, size_classes
from privfm.defenses.privacy.statements import observed

if TYPE_CHECKING:
    from privfm.defenses.privacy.plan import DPPlan


def calibrated_noise(plan: DPPlan, epsilon: float, rounds: int, examples: Sequence[int], d: int | None) -> float:
    """The least noise multiplier whose epsilon after `rounds` is at most `epsilon`, to 0.1 %."""

    def tight(noise: float) -> float:
        return replace(plan, noise_multiplier=noise).epsilon(rounds, examples=examples, d=d)

    low, high = 0.05, 1e5
    if plan.integers is not None:
        low = max(low, plan.integers.least_noise_multiplier(d or 1))
    probe = replace(plan, noise_multiplier=max(low, 1.0))
    _, mechanism, times = observed(probe, rounds, min(examples, default=None), d)[0]
    if isinstance(mechanism, SampledGaussian) and mechanism.poisson:
        # RDP is 8 to 18 % looser than PLD, so it gives an upper end; replacing one costs up to twice the noise.
        high = least_noise(
            lambda z: loose(replace(mechanism, noise_multiplier=z), times, plan.delta), epsilon, 0.05, 1e4
        )
        low = 0.75 * high
        high = 2.1 * high if mechanism.relation == "replace-one" else high
        high = 1.5 * high if len(set(examples)) > 1 else high  # another client than the smallest may need more
    return least_noise(tight, epsilon, low, high)


def with_own_noise(plan: DPPlan, epsilon: float, rounds: int, examples: Sequence[int]) -> DPPlan:
    """The plan with noise for each class of client sizes, as little as its own sampling rate needs."""
    local = plan.local_sampling
    shared = replace(plan, local=replace(local, noise_by_examples=()))
    table = []
    for least, most in size_classes(examples):  # the class's highest rate with its most steps: enough for all of it
        strict = LocalSampling(local.batch_size, local_steps=max(local.steps(least), local.steps(most)))
        noise = replace(shared, local=strict).with_epsilon(epsilon, rounds, [least]).noise_multiplier
        table.append((least, noise))
    most_noise = max(noise for _, noise in table)
    return replace(plan, noise_multiplier=most_noise, local=replace(local, noise_by_examples=tuple(table)))
