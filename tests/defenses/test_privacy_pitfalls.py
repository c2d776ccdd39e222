"""The page of pitfalls: its tests exist, its numbers are right, and what no other test covers is played here."""

import json
import re
from dataclasses import replace
from functools import lru_cache
from math import log, sqrt
from pathlib import Path

import pytest
import torch
from torch import Generator

from privfm.defenses import DPPlan, Mean
from privfm.defenses.channels import Plaintext
from privfm.defenses.privacy.accounting import SampledGaussian, account, event
from privfm.defenses.privacy.clipping import AdaptiveQuantile
from privfm.federation import Adam, Average, visibility

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "pitfalls.md").read_text(encoding="utf-8")
NUMBERS = [*(str(n) for n in range(1, 15)), "A1", "A2", "A3", "A9"]
ROWS = {cells[1]: cells for cells in (re.split(r" *\| *", line) for line in TEXT.splitlines()) if len(cells) == 7}
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", TEXT)))


# The page


def test_every_pitfall_has_a_row_with_its_test():
    assert [number for number in ROWS if number in NUMBERS] == NUMBERS
    for number in NUMBERS:
        assert all(ROWS[number][1:6]), number
        assert "::test_" in ROWS[number][5], number


@pytest.mark.parametrize(("file", "name"), NAMED, ids=[name for _, name in NAMED])
def test_every_test_that_is_named_exists(file, name):
    assert f"\ndef {name}(" in (ROOT / file).read_text(encoding="utf-8")


def test_every_path_in_the_table_is_a_test():
    """Nothing that the pattern above would overlook."""
    assert len(NAMED) >= len(NUMBERS)
    assert TEXT.count("::") == len(re.findall(r"`tests/[\w/]+\.py::test_\w+`", TEXT))


def test_links_and_classes_exist():
    for target in re.findall(r"\]\(([^)]+)\)", TEXT):
        assert (ROOT / "docs" / target).is_file()
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "privfm").rglob("*.py"))
    for name in re.findall(r"`([A-Z]\w+)(?:\.(\w+))?", TEXT):
        assert f"class {name[0]}" in source, name
        assert not name[1] or re.search(rf"\b{name[1]}\b", source), name


# Its numbers


@lru_cache
def epsilon(noise, rate=0.1, rounds=100, delta=1e-3):
    return DPPlan(noise, 1.0, rate, delta).epsilon(rounds)


@pytest.mark.parametrize(
    ("number", "noise", "expected"),
    [
        ("2", 0.9, "5.89"),  # the mean divides by 18 where noise was made for 20
        ("2", 0.5, "22.6"),
        ("4", 1 / sqrt(1 + 1 / 4), "5.97"),  # 1 for the update and 2 for the count, in clips: both are released
        ("7", 1 / sqrt(2), "9.9"),
    ],
)
def test_what_a_mistake_really_costs(number, noise, expected):
    assert epsilon(1.0) == pytest.approx(4.784, abs=2e-3)
    assert expected in ROWS[number][3]
    digits = len(expected.partition(".")[2])
    assert epsilon(noise) == pytest.approx(float(expected), abs=0.6 * 10**-digits)


def test_the_largest_client_of_a_weighted_mean_has_no_privacy_to_speak_of():
    """1: 3.2 times its share. dp-accounting's PLD itself; a plan answers with its fast bound there, which is larger."""
    from dp_accounting import NeighboringRelation
    from dp_accounting.pld import PLDAccountant

    mechanism = SampledGaussian(1 / 3.2, 0.1, "poisson")
    accountant = PLDAccountant(NeighboringRelation.REPLACE_SPECIAL, 1e-2)
    true = accountant.compose(event(mechanism, 100)).get_epsilon(1e-3)
    assert true == pytest.approx(74, abs=1.5)
    assert account(mechanism, 100, 1e-3)[0] > true


def test_the_textbook_formula_is_wrong_at_both_ends():
    """3: too much noise for a small epsilon, too little for a large one, and nothing about rounds."""

    def textbook(wanted):
        return sqrt(2 * log(1.25e5)) / wanted

    exact = DPPlan(1.0, 1.0, 1.0, 1e-5).with_epsilon(1.0, 1).noise_multiplier
    assert textbook(1.0) / exact == pytest.approx(1.30, abs=0.01)
    assert epsilon(textbook(50.0), 1.0, 1, 1e-5) == pytest.approx(96, abs=0.6)
    assert epsilon(textbook(1.0), 1.0, 50, 1e-5) == pytest.approx(6.8, abs=0.06)


def test_noise_on_both_factors_is_multiplied():
    """8: energy of the product's noise while B is zero, both factors noised over B alone; 384 wide, rank 8.

    With noise s an entry on B (m x r) and A (r x n) it is `s^2 m |A|^2 + s^4 m n r`, the second only if A is noised.
    """
    d, rank, s = 384, 8, 0.1
    generator = Generator().manual_seed(0)
    a = torch.randn(rank, d, generator=generator) / sqrt(d)  # rows of length 1
    noise_b, noise_a = (s * torch.randn(*shape, generator=generator) for shape in ((d, rank), (rank, d)))
    both, one = noise_b @ (a + noise_a), noise_b @ a
    played = float(both.square().sum() / one.square().sum())
    closed = 1 + s**2 * d * rank / float(a.square().sum())
    assert played == pytest.approx(closed, rel=0.05)
    assert played == pytest.approx(4.9, abs=0.2)


def test_adam_divides_by_the_noise():
    """9: a constant signal of 1 under noise of 10 moves a tenth as far a step; averaging moves all of it."""
    generator, d, rounds = Generator().manual_seed(0), 2000, 200
    moved = {}
    for optimizer in (Adam(0.01), Average(0.01)):
        state, model = optimizer.init(d), torch.zeros(d)
        for _ in range(rounds):
            state, model = optimizer.step(state, model, 1 + 10 * torch.randn(d, generator=generator))
        moved[type(optimizer).__name__] = float(model.mean()) / (0.01 * rounds)
    assert moved["Average"] == pytest.approx(1, abs=0.1)
    assert 0.03 < moved["Adam"] < 0.2


def test_a_simulated_population_scales_noise_and_not_the_claim():
    """14: its epsilon is that of the larger population, and the record says for whom it does not hold."""
    plan = DPPlan(1.0, 1.0, 0.1, 1e-5)
    larger = replace(plan, simulated_population=50_000)
    assert larger.release(1.0, 1000).noise_multiplier == pytest.approx(1000 / 50_000)
    assert larger.epsilon(10) == plan.epsilon(10)
    assert "no guarantee for this run" in larger.record(10).noise
    assert epsilon(1000 / 50_000, rounds=10) > 1000  # what this run itself is worth


# What leaves a run


def test_diagnostics_of_a_round_are_private_by_name():
    private = (
        "sampled", "arrived", "bad", "failed", "kept", "clipped", "detected", "update_norm_median", "failure",
        "skipped", "empirical_kappa", "channel_error_relative_l2", "bytes_up", "seconds_training", "leaked",
    )  # fmt: skip
    assert {visibility(name) for name in private} == {"private"}
    assert visibility("clip_bound") == "released"
    assert visibility("round") == "public"
    assert visibility("a field of tomorrow") == "private"


def test_an_export_holds_the_clip_and_nothing_about_anybody(tmp_path):
    """A9: no participants, no norms, no counts, no seed; the moving clip is part of what is released."""
    from privfm.cli import main
    from privfm.experiment import ArmSpec, Experiment, RunConfig, run_experiment
    from privfm.learning import IID, SGD, Digits, ImageClassification, SmallCNN

    seed = 918_273
    plan = DPPlan(0.5, 1.0, 0.3, 1e-3, clipping=AdaptiveQuantile(count_deviation=2.0))
    config = RunConfig(
        data=Digits(),
        model=SmallCNN(width=4),
        task=ImageClassification(),
        partition=IID(20),
        training=SGD(0.1),
        rule=Mean(),
        channel=Plaintext(),
        optimizer=Average(),
        plan=plan,
        rounds=2,
        evaluate_every=2,
    )
    run_experiment(Experiment("pitfalls", "?", (ArmSpec("arm", "arm", "", config),)), tmp_path, [seed], workers=1)
    run, out = tmp_path / "arm" / f"seed-{seed}", tmp_path / "out"
    own = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    assert {"sampled", "update_norm_median", "clip_bound"} <= own[0].keys()

    assert main(["export", "--released", str(run), "--out", str(out)]) == 0
    kept = [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]
    assert [row["clip_bound"] for row in kept] == [row["clip_bound"] for row in own]
    assert kept[0]["clip_bound"] == 1.0
    assert kept[1]["clip_bound"] != 1.0
    for row in kept:
        assert not {"sampled", "arrived", "failed", "clipped", "update_norm_median", "bytes_up"} & row.keys()
    for file in out.rglob("*"):
        text = file.read_text()
        assert str(seed) not in text, file
        assert "cohort_ids" not in text, file
        assert "norm_median" not in text, file
    assert not list(out.rglob("*.safetensors"))
