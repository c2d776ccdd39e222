"""Every combination is listed as a problem, or plays a round: rules, channels, plans and weights together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from privfm import defenses
from privfm.checks import InvalidArgument
from privfm.cli.check import sample
from privfm.contracts import Channel, Reveals, Rule
from privfm.defenses import DPPlan, FixedPoint, Mean
from privfm.defenses.channels import BFV, CKKS, CKKSGram, Grouped, PairwiseMasks, Plaintext, RLWEPad, Selective
from privfm.defenses.privacy.integer_noise import IntegerNoise
from privfm.federation import Federation, FixedSize, problems, rounds, start

Make = Callable[..., Federation]
CLIENTS, COHORT = 60, 16
CODEC = FixedPoint(bound=8.0, bits=16)

CHANNELS: dict[str, Channel] = {
    "plaintext": Plaintext(),
    "masks": PairwiseMasks(clients=CLIENTS),
    "active masks": PairwiseMasks(clients=CLIENTS, corrupt=0.05, active=True),
    "BFV": BFV(clients=CLIENTS, bits=16),
    "BFV, 32 bits": BFV(clients=CLIENTS, bits=31),
    "blinded BFV": BFV(clients=CLIENTS, bits=16, holder="blinded"),
    "BFV of clients": BFV(clients=CLIENTS, bits=16, holder="clients"),
    "CKKS": CKKS(bound=8.0, clients=CLIENTS),
    "CKKS of whole steps": CKKS(bound=2.0**31, clients=CLIENTS),
    "flooded CKKS": CKKS(bound=8.0, clients=CLIENTS, exact_grid=False),
    "gram": CKKSGram(bound=8.0),
    "gram to the server": CKKSGram(bound=8.0, gram_to_server=True),
    "CKKS of clients": CKKS(bound=8.0, clients=CLIENTS, exact_grid=False, release="clients"),
    "pad": RLWEPad(CLIENTS, 16, PairwiseMasks(CLIENTS, corrupt=0.0, modulus_bits=16), approximate=True),
    "groups": Grouped(PairwiseMasks(clients=CLIENTS), size=2),
    "selective": Selective(PairwiseMasks(clients=CLIENTS), ((5, 300),)),
}
BASE = DPPlan(noise_multiplier=1.0, max_grad_norm=1.0, sample_rate=0.5, delta=1e-3)
PLANS: dict[str, DPPlan | None] = {
    "no plan": None,
    "central": BASE,
    "key holder": replace(BASE, place="key_holder", source="secure", max_participations=10),
    "local": replace(BASE, place="local", max_participations=10),
    "distributed": replace(
        BASE, place="distributed", max_participations=10, integers=IntegerNoise(least_answers=5, clients=CLIENTS)
    ),
}


def public_rules() -> list[Rule]:
    found = [getattr(defenses, name) for name in defenses.__all__]
    kinds = [kind for kind in found if isinstance(kind, type) and issubclass(kind, Rule)]
    return [sample(kind) for kind in kinds if not getattr(kind, "__abstractmethods__", None)]


def arm_of(channel: Channel, **change: Any) -> dict[str, Any]:
    """The codec that such a channel needs; a distributed plan brings its own."""
    plan = change.get("plan")
    own = plan is not None and plan.integers is not None
    codec = (CODEC,) if channel.integers and not own else ()
    return {"channel": channel, "transforms": codec, "cohort": None if plan else FixedSize(COHORT), **change}


def refused_or_played(setting: Federation) -> bool:
    """Whether it was played; where it is refused, the loop refuses it as well, before anything is trained."""
    found = problems(setting.arm, setting.learner.d, CLIENTS, rooted=False)
    if found:
        with pytest.raises(InvalidArgument):
            start(setting)
        assert setting.learner.batches == []
        return False
    (step,) = rounds(setting, 1, evaluate_every=1)
    assert step.record.skipped == "" and step.record.failure == ""
    assert bool(step.state.model.isfinite().all())
    coarse = not setting.arm.channel.integers and setting.arm.channel.grid == 1.0 and setting.arm.plan is None
    assert coarse or not torch.equal(step.state.model, setting.learner.initial())
    return True


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
@pytest.mark.parametrize("channel", CHANNELS.values(), ids=CHANNELS.keys())
def test_the_mean_over_every_channel_under_every_plan(channel: Channel, plan: DPPlan | None, federation: Make) -> None:
    played = refused_or_played(federation(**arm_of(channel, plan=plan)))
    assert played or plan is not None  # a mean runs everywhere


@pytest.mark.parametrize("channel", CHANNELS.values(), ids=CHANNELS.keys())
def test_weights_over_every_channel(channel: Channel, federation: Make) -> None:
    played = refused_or_played(federation(**arm_of(channel, weighting="examples")))
    assert played == (channel.rows(1) is None and channel.reveals is not Reveals.GRAM)


@pytest.mark.parametrize("rule", public_rules(), ids=lambda rule: type(rule).__name__)
def test_every_rule_over_every_channel(rule: Rule, federation: Make) -> None:
    played = {name: refused_or_played(federation(**arm_of(each, rule=rule))) for name, each in CHANNELS.items()}
    if isinstance(rule, Mean):
        assert all(played.values())
    elif "root" not in rule.init(3):
        assert played["plaintext"]
    assert not any(played[name] for name, each in CHANNELS.items() if rule.needs > each.reveals)


def test_the_number_of_combinations_is_not_small() -> None:
    assert len(public_rules()) > 25
    assert len(CHANNELS) * len(PLANS) > 60
