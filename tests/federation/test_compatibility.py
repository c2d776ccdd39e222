"""Every refusal is one entry of one list, and the round raises exactly what it lists."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from privfm.attacks import SignFlip
from privfm.checks import InvalidArgument
from privfm.defenses import CenteredClipping, Clip, DPPlan, Krum, Mean, MultiKrum, TrimmedMean
from privfm.defenses.channels import CKKS, Plaintext
from privfm.federation import Arm, Federation, FixedSize, Poisson, problems, start
from privfm.federation.compatibility import table

Make = Callable[..., Federation]
Toys = Mapping[str, Any]
PLAN = DPPlan(noise_multiplier=1.0, max_grad_norm=1.0, sample_rate=0.5, delta=1e-3)


def refusals(toys: Toys) -> list[tuple[dict[str, Any], str, str]]:
    quantize, top = toys["Quantize"](0.01), toys["TopK"](9)
    vault, masks = toys["GramVault"](5.0), toys["ThreeStages"]()
    return [
        ({"rule": Krum(6), "channel": CKKS(1.0, 60)}, "Krum needs GRAM, CKKS reveals only SUM", "Plaintext"),
        ({"rule": TrimmedMean(6), "channel": CKKS(1.0, 60)}, "TrimmedMean needs EACH", "Mean over CKKS"),
        ({"rule": Krum(6), "channel": vault}, "effectively 1.0 clients", "averages more"),
        ({"rule": CenteredClipping(1.0), "channel": toys["GramVault"](5.0, 0)}, "1 references", "knowingly"),
        ({"channel": CKKS(1.0, 20)}, "head-room for a sum of 20 clients", "raise"),
        ({"channel": masks}, "carries whole numbers", "quantizing codec"),
        ({"channel": masks, "transforms": (top, quantize)}, "not the sum of the decodings", "additive"),
        (
            {"rule": CenteredClipping(1.0), "channel": vault, "transforms": (toys["Sketch"](),)},
            "inner products",
            "every length",
        ),
        ({"transforms": (quantize, Clip(1.0))}, "a client step stands after a codec", "codecs last"),
        ({"rule": Krum(20)}, r"f=20 needs n >= 2f\+3 = 43 updates for Krum, got n=30", "lower f"),
        ({"cohort": FixedSize(61)}, "the population has 60 clients", "at most 60"),
        ({"rule": MultiKrum(3), "plan": PLAN}, "no bounded sensitivity", "Mean"),
        ({"plan": PLAN, "cohort": FixedSize(30)}, "the plan draws clients by itself", "leave the cohort out"),
        ({"plan": DPPlan(1.0, 1.0, 0.5, 0.02)}, r"delta=0.02 >= 1/N", "delta below"),
        ({"plan": PLAN, "channel": CKKS(0.5, 60)}, "may have a coordinate of 1", "at least the clip"),
        ({"attack": SignFlip(4.0)}, "nobody to carry it out", "name malicious"),
        ({"malicious": (1, 2)}, "2 malicious clients have no attack", "name an attack"),
    ]


@pytest.mark.parametrize("which", range(17))
def test_each_problem_is_listed_and_raised_before_any_training(which: int, federation: Make, toys: Toys) -> None:
    arm, what, instead = refusals(toys)[which]
    setting = federation(**arm)
    found = problems(setting.arm, setting.learner.d, 60)
    assert len(found) == 1
    assert __import__("re").search(what, found[0].what) and instead in found[0].instead
    with pytest.raises(InvalidArgument, match=what):
        start(setting)
    assert setting.learner.batches == []


def test_the_number_of_cases_is_the_number_of_parameters(toys: Toys) -> None:
    assert len(refusals(toys)) == 17


def test_good_arms_have_no_problem(federation: Make, toys: Toys) -> None:
    for arm in (
        {},
        {"plan": PLAN},
        {"plan": PLAN, "cohort": Poisson(0.5)},
        {"channel": CKKS(1.0, 60)},
        {"rule": MultiKrum(6), "channel": toys["GramVault"](5.0)},
        {"rule": TrimmedMean(6), "transforms": (toys["TopK"](9),)},
    ):
        setting = federation(**arm)
        assert problems(setting.arm, setting.learner.d, 60) == []


def test_an_arm_needs_a_cohort_or_a_plan() -> None:
    with pytest.raises(InvalidArgument, match="cohort=None"):
        Arm()


def test_the_table_prints_what_problems_says() -> None:
    rows = table([Mean(), Krum(1), TrimmedMean(1)], [Plaintext(), CKKS(1.0, 200)])
    assert len(rows) == 12
    runs = {(row.rule, row.channel, row.plan) for row in rows if not row.refused}
    assert runs == {
        ("Mean", "Plaintext", False),
        ("Mean", "Plaintext", True),
        ("Mean", "CKKS", False),
        ("Mean", "CKKS", True),
        ("Krum", "Plaintext", False),
        ("TrimmedMean", "Plaintext", False),
    }
