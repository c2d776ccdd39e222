"""An arm: everything about a run but its data, its model and its seeds."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal, final

import torch
from torch import Tensor

from privfm.adapters import AdapterLayout
from privfm.attacks import EveryRound
from privfm.checks import InvalidArgument, fraction, one_of, require
from privfm.contracts import (
    Attack,
    AttackSchedule,
    Channel,
    Intake,
    Reveals,
    Rule,
    Sampling,
    ServerAttack,
    ServerOptimizer,
    Spans,
    State,
    Transform,
)
from privfm.defenses.channels import Plaintext
from privfm.defenses.delegated import Delegated
from privfm.defenses.mean import Mean
from privfm.defenses.privacy import DPPlan
from privfm.defenses.privacy.releases import GaussianRelease, QuantileRelease
from privfm.defenses.transforms import Chain
from privfm.federation.canaries import Audit
from privfm.federation.optimizers import Average
from privfm.federation.population import Cyclic, FixedShare, Poisson
from privfm.federation.spaces import FlatSpace, ProductGeometry, ProductSpace, Space


@final
@dataclass(frozen=True)
class Arm:
    """What the round plays and what `compatibility.problems` judges.

    Args:
      cohort: who takes part; None under a plan, which samples itself.
      rule: how updates become one.
      channel: how they travel.
      transforms: client steps, then codecs.
      plan: differential privacy; takes the mean's place.
      attack: what malicious clients do.
      malicious: their ids.
      schedule: when they do it.
      attackers_take_steps: whether they pass the client steps (momentum) before they attack, as a hidden attacker
        would; else what they bend is their plain update.
      weighting: how much each client counts: all the same, or by the examples that the server knows it to hold. What a
        client claims is never asked.
      optimizer: what the server does with the aggregate.
      adapters: compare low-rank adapters by the changes they make to the weights; None: by their factors.
      alternate: train the factors of low-rank adapters in turns, B in even rounds (A would not move before B has) and
        A in odd ones; whatever belongs to no adapter is trained in all.
      server_attack: a curious server.
      dropout_rate: share of a cohort that is lost at some stage, simulated.
      audit: canaries among the clients, and what is claimed of the run.
    """

    cohort: Sampling | None = None
    rule: Rule = field(default_factory=Mean)
    channel: Channel = field(default_factory=Plaintext)
    transforms: tuple[Transform, ...] = ()
    plan: DPPlan | None = None
    attack: Attack | None = None
    malicious: tuple[int, ...] = ()
    schedule: AttackSchedule = field(default_factory=EveryRound)
    attackers_take_steps: bool = True
    weighting: Literal["equal", "examples"] = "equal"
    optimizer: ServerOptimizer = field(default_factory=Average)
    adapters: ProductGeometry | None = None
    alternate: bool = False
    server_attack: ServerAttack | None = None
    dropout_rate: float = 0.0
    audit: Audit | None = None

    def __post_init__(self) -> None:
        one_of("weighting", self.weighting, ("equal", "examples"))
        fraction("dropout_rate", self.dropout_rate, zero=True, one=False)
        require(self.cohort is not None or self.plan is not None, "cohort=None: expected Poisson, FixedSize or a plan")

    @property
    def ghosts(self) -> int:
        """Columns of every row that belong to canaries, after the model's."""
        return 0 if self.audit is None else self.audit.canaries.columns

    def most_canaries(self, population: int) -> int:
        """How many may join one round, beside the clients."""
        if self.audit is None:
            return 0
        return self.sampling.largest(self.audit.canaries.count) if self.plan else self.audit.canaries.count

    @property
    def sampling(self) -> Sampling:
        """The plan's own sampling, or the cohort."""
        if self.plan is None:
            assert self.cohort is not None  # checked when made
            return self.cohort
        rate = self.plan.sample_rate
        if self.plan.sampling == "cyclic":
            return Cyclic(round(1 / rate))
        return Poisson(rate) if self.plan.sampling == "poisson" else FixedShare(rate)

    @property
    def codecs(self) -> Chain:
        """What everybody must speak, distributed noise included; the server decodes this part only."""
        own = tuple(transform for transform in self.transforms if transform.binding)
        codec = None if self.plan is None else self.plan.codec
        return Chain(own if codec is None else (*own, codec))

    @property
    def wire(self) -> Channel:
        """The channel as all parties agree on it: with the rule, the plan's noise and its fewest answers."""
        channel, plan = self.channel.with_rule(self.rule), self.plan
        if plan is not None and plan.place == "key_holder":
            channel = channel.with_noise(plan.noise_multiplier, plan.max_grad_norm)
        if plan is not None and plan.integers is not None and channel.rows(1) is None:
            channel = channel.with_floor(plan.integers.least_answers)
        return channel

    @property
    def folds(self) -> bool:
        """Whether clients multiply their rows by their weights: where only a sum is revealed, nobody else could."""
        return self.weighting != "equal" and self.channel.reveals is Reveals.SUM

    def steps(self, layers: Spans, bound: float | None = None) -> Chain:
        """What an honest client does and a malicious one skips; the plan's clip is the last of it.

        Args:
          layers: columns of each layer.
          bound: this round's clip, where it changes.
        """
        own = tuple(transform for transform in self.transforms if not transform.binding)
        clip = None if self.plan is None else self.plan.clip(layers, bound)
        return Chain(own if clip is None else (*own, clip))

    def active(self, now: int, layout: AdapterLayout | None) -> Tensor | None:
        """What is trained in round `now`, `(d,)` bool; None: everything.

        Raises:
          InvalidArgument: factors are to take turns, and the model has none.

        Source: Chen et al., "Robust federated finetuning of LLMs via alternating optimization of LoRA", 2025 (RoLoRA).
        """
        if not self.alternate:
            return None
        if layout is None:
            raise InvalidArgument("alternate=True: the model has no low-rank adapters whose factors could take turns")
        active = torch.ones(layout.d, dtype=torch.bool)
        for pair in layout.pairs:
            lo, hi = pair.span_a if now % 2 == 0 else pair.span_b
            active[lo:hi] = False
        return active

    def space(self, d: int, layout: AdapterLayout | None) -> Space:
        """What rule and server optimizer work on, for a model of d trained values.

        Raises:
          InvalidArgument: adapters are compared by their products, and the model has none.
        """
        if self.adapters is None:
            return FlatSpace(d, self.optimizer)
        if layout is None:
            raise InvalidArgument(f"adapters={self.adapters}: the model has none; train LoRA, or leave them out")
        return ProductSpace(self.adapters, layout, self.optimizer)

    def intake(self, d: int, rule: Rule, state: State) -> Intake:
        """How the server opens what arrives, under the rule and its state."""
        opened = (
            (self.weighting != "equal" and not self.folds)
            or self.server_attack is not None
            or self.adapters is not None
        )
        needs = Reveals.EACH if opened else rule.needs
        plan = self.plan
        if plan is None or not plan.noises_the_sum:  # rows are noised already where the server sees them
            return Intake(self.codecs, d, needs)
        if isinstance(rule, QuantileRelease):
            return Intake(self.codecs, rule.row_width(d), needs, rule.length(state))
        if plan.integers is not None:
            return Intake(self.codecs, d, needs, least_answers=plan.integers.least_answers)
        return Intake(self.codecs, d, needs, plan.max_grad_norm)

    def release(self, d: int, population: int, active: Tensor | None = None) -> Rule:
        """The rule, whoever runs it, or the plan's release in its place.

        Where the server opens rows it clips them itself, to the bound itself; elsewhere codecs may lengthen a row.
        """
        if self.plan is None or not self.plan.noises_the_sum:
            return Delegated(self.rule) if self.channel.decides else self.rule
        if active is not None:
            active = torch.cat([active, active.new_ones(d - len(active))])  # canaries' columns are always noised
        bound = self.plan.max_grad_norm
        opened = self.channel.reveals is Reveals.EACH or self.plan.place != "central"
        rule = self.plan.release(bound if opened else self.codecs.norm_bound(bound, d), population, active)
        return replace(rule, ghosts=self.ghosts) if isinstance(rule, GaussianRelease) else rule
