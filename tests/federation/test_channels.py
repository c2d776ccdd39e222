"""Whole rounds over every channel: the same model as in the clear, and no more seen than is said."""

from dataclasses import dataclass, replace
from typing import final

import pytest
import torch

from privfm.attacks import SignFlip
from privfm.checks import InvalidArgument
from privfm.contracts import Channel, ServerAttack
from privfm.defenses import DPPlan, FixedPoint, FoolsGold, Mean, Median, TrimmedMean
from privfm.defenses.channels import BFV, CKKS, Grouped, PairwiseMasks, Plaintext, Selective
from privfm.defenses.privacy.integer_noise import IntegerNoise
from privfm.federation import Arm, FixedSize, problems, rounds

CODEC = FixedPoint(bound=8.0, bits=20)
INTEGERS: dict[str, Channel] = {
    "masks": PairwiseMasks(clients=60),
    "active masks": PairwiseMasks(clients=30, active=True),
    "BFV": BFV(clients=60, bits=20),
    "blinded BFV": BFV(clients=60, bits=20, holder="blinded"),
    "BFV of clients": BFV(clients=60, bits=20, holder="clients"),
}


@final
@dataclass(frozen=True)
class Look(ServerAttack):
    def look(self, wire, model, now):
        return {"rows": float(wire.rows is not None), "vectors": len(wire.vectors)}


def played(federation, until=2):
    return list(rounds(federation, until, evaluate_every=until))


@pytest.mark.parametrize("channel", INTEGERS.values(), ids=INTEGERS.keys())
def test_whole_numbers_arrive_as_in_the_clear(channel, federation):
    """To the last bit, with drop-outs simulated at every stage of the channel."""
    plain, hidden = (
        played(federation(transforms=(CODEC,), channel=each, cohort=FixedSize(30))) for each in (Plaintext(), channel)
    )
    assert torch.equal(plain[-1].state.model, hidden[-1].state.model)
    assert hidden[-1].record.arrived == 30
    assert hidden[-1].record.channel_error_relative_l2 < 1e-6


@pytest.mark.parametrize("channel", [INTEGERS["masks"], INTEGERS["BFV"]], ids=["masks", "BFV"])
def test_simulated_drop_outs_do_not_end_a_run(channel, federation):
    steps = played(federation(transforms=(CODEC,), channel=channel, cohort=FixedSize(40), dropout_rate=0.05), 4)
    assert all(not step.record.skipped for step in steps)
    assert any(step.record.arrived < 40 for step in steps)
    losses = [step.metrics["accuracy"].value for step in steps if step.metrics]
    assert losses[-1] > 0.2


@pytest.mark.parametrize(
    ("channel", "vectors"),
    [(INTEGERS["masks"], 1), (INTEGERS["blinded BFV"], 1), (INTEGERS["BFV of clients"], 0)],
    ids=["masks", "blinded", "clients"],
)
def test_a_curious_server_sees_what_the_channel_says(channel, vectors, federation):
    record = played(federation(transforms=(CODEC,), channel=channel, server_attack=Look()), 1)[-1].record
    assert record.leaked == {"rows": 0.0, "vectors": vectors}


@pytest.mark.parametrize(
    "channel",
    [
        PairwiseMasks(clients=60, modulus_bits=32),
        BFV(clients=60, bits=31),
        CKKS(bound=2.0**31, clients=60, bits=31),
    ],
    ids=["masks", "BFV", "CKKS"],
)
def test_distributed_noise_is_the_same_over_every_channel(channel, federation):
    """The codec's noise is seeded; channels carry what it gives, modulo its modulus."""
    plan = DPPlan(
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        sample_rate=0.5,
        delta=1e-3,
        place="distributed",
        max_participations=10,
        integers=IntegerNoise(least_answers=5, clients=60),
    )
    models = [played(federation(plan=plan, channel=each))[-1].state.model for each in (channel, PairwiseMasks(60))]
    assert torch.equal(models[0], models[1])
    assert not torch.equal(models[0], played(federation(plan=None))[-1].state.model)


def test_the_parties_themselves_keep_the_floor_of_a_plan():
    plan = DPPlan(
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        sample_rate=0.5,
        delta=1e-3,
        place="distributed",
        max_participations=10,
        integers=IntegerNoise(least_answers=17, clients=60),
    )
    for channel in (PairwiseMasks(60), BFV(clients=60, bits=31), CKKS(bound=2.0**31, clients=60, bits=31)):
        assert Arm(plan=plan, channel=channel).wire.smallest_release == 17
        assert Arm(cohort=FixedSize(20), channel=channel).wire.smallest_release == 2


# What does not fit

FIT = Arm(cohort=FixedSize(30), transforms=(CODEC,), channel=PairwiseMasks(clients=30))
CENTRAL = DPPlan(noise_multiplier=1.0, max_grad_norm=1.0, sample_rate=0.5, delta=1e-4)


def test_the_base_of_these_cases_is_allowed():
    assert problems(FIT, 1000, 100) == []


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"transforms": ()}, "carries whole numbers, the last transform gives real ones"),
        ({"rule": TrimmedMean(1)}, "TrimmedMean needs EACH, PairwiseMasks reveals only SUM"),
        ({"channel": PairwiseMasks(clients=20)}, "head-room for a sum of 20 clients"),
        ({"channel": PairwiseMasks(clients=30, modulus_bits=24)}, "adds modulo 16777216, and 30 rows of up to 1048576"),
        ({"channel": PairwiseMasks(clients=30, modulus_bits=16)}, "whole numbers up to 32768, the codec gives up to"),
        ({"channel": BFV(clients=30, bits=19)}, "whole numbers up to 524288, the codec gives up to 1048576"),
        ({"cohort": None, "plan": replace(CENTRAL, max_grad_norm=9.0)}, "FixedPoint refuses beyond 8"),
        (
            {"cohort": None, "plan": CENTRAL, "channel": BFV(clients=100, bits=20, holder="clients")},
            "the server is to add the noise, and over BFV it never sees the sum",
        ),
    ],
    ids=["real numbers", "rule", "clients", "wraps", "modulus", "bits", "clip", "nobody sees the sum"],
)
def test_what_does_not_fit_is_listed(change, what):
    found = problems(replace(FIT, **change), 1000, 100)
    assert any(what in problem.what for problem in found), found


def test_a_modulus_that_the_codec_knows_may_be_smaller_than_the_sum():
    """Distributed noise wraps by design; the same numbers without it must not."""
    plan = replace(
        CENTRAL, place="distributed", max_participations=10, integers=IntegerNoise(least_answers=20, clients=60)
    )
    arm = Arm(plan=plan, channel=PairwiseMasks(clients=60, modulus_bits=32))
    assert arm.codecs.largest_whole * 60 > 2**31
    assert not any("adds modulo" in problem.what for problem in problems(arm, 1000, 60))
    shorter = replace(arm, channel=PairwiseMasks(clients=60, modulus_bits=31))
    assert any("adds modulo" in problem.what for problem in problems(shorter, 1000, 60))


def test_a_row_that_the_codec_refuses_is_left_out(federation):
    """A bound below the updates: every client refuses, and the round says why."""
    tight = replace(CODEC, bound=1e-6)
    record = played(federation(transforms=(tight,), channel=PairwiseMasks(clients=60)), 1)[-1].record
    assert "not whole" in record.skipped or "finite" in record.skipped


def test_whole_numbers_may_travel_in_the_clear():
    assert problems(Arm(cohort=FixedSize(30), transforms=(CODEC,), rule=Median()), 1000, 100) == []
    with pytest.raises(InvalidArgument, match="bits="):
        FixedPoint(1.0, 60)


# Groups, and parts in the clear


def test_a_robust_rule_runs_over_sums_of_groups(federation):
    """60 clients in 12 groups of 5; two attackers spoil at most two groups, the plain sum would follow them."""
    arm = {
        "transforms": (FixedPoint(bound=100.0, bits=20),),
        "cohort": FixedSize(60),
        "attack": SignFlip(scale=30.0),
        "malicious": (3, 40),
    }
    grouped = played(federation(rule=TrimmedMean(2), channel=Grouped(PairwiseMasks(60), size=5), **arm), 8)
    summed = played(federation(rule=Mean(), channel=PairwiseMasks(60), **arm), 8)
    accuracy = [steps[-1].metrics["accuracy"].value for steps in (grouped, summed)]
    record = grouped[-1].record
    assert (record.arrived, record.arrived_malicious, record.skipped) == (12, None, "")
    assert accuracy[0] > accuracy[1] + 0.2


def test_what_groups_do_not_carry_is_listed():
    groups = Arm(
        cohort=FixedSize(60), transforms=(CODEC,), rule=TrimmedMean(2), channel=Grouped(PairwiseMasks(60), size=5)
    )
    assert problems(groups, 1000, 100) == []
    for change, what in [
        ({"rule": TrimmedMean(6)}, "needs n >= 2f+1 = 13 updates for TrimmedMean, got n=12"),
        ({"rule": FoolsGold()}, "FoolsGold remembers clients, and rows of Grouped are means of groups"),
        ({"rule": Median(), "weighting": "examples"}, "nobody knows what share a row has"),
        ({"rule": Mean(), "plan": CENTRAL, "cohort": None}, "the noise is made for one sum, and Grouped reveals one a"),
        ({"channel": Grouped(PairwiseMasks(60, modulus_bits=26), size=5)}, "60 rows of up to 1048576 may leave it"),
    ]:
        found = problems(replace(groups, **change), 1000, 100)
        assert any(what in problem.what for problem in found), (what, found)


def test_the_server_reads_the_clear_columns_of_every_client(federation):
    seen = []

    @final
    @dataclass(frozen=True)
    class Keep(ServerAttack):
        def look(self, wire, model, now):
            seen.append(wire)
            return {}

    channel = Selective(PairwiseMasks(60), ((10, 300),))
    plain, partly = (
        played(federation(transforms=(CODEC,), channel=each, server_attack=Keep()), 1)
        for each in (Plaintext(), channel)
    )
    assert torch.equal(plain[-1].state.model, partly[-1].state.model)
    open_rows, half_open = seen[0].rows, seen[1].rows
    assert half_open[:, 10:300].isnan().all()
    clear = torch.ones(open_rows.shape[1], dtype=torch.bool)
    clear[10:300] = False
    assert torch.equal(half_open[:, clear], open_rows[:, clear])


def test_noise_of_a_sum_does_not_cover_what_is_in_the_clear():
    plan = replace(
        CENTRAL, place="distributed", max_participations=10, integers=IntegerNoise(least_answers=20, clients=60)
    )
    arm = Arm(plan=plan, channel=Selective(PairwiseMasks(60), ((10, 300),)))
    assert any("noise of place 'distributed' covers the sum alone" in p.what for p in problems(arm, 1000, 60))
    beyond = replace(FIT, channel=Selective(PairwiseMasks(30), ((10, 3000),)))
    assert any("protected reaches to column 3000, an update has 1000" in p.what for p in problems(beyond, 1000, 100))
