"""The audit's arms, small: all run, the mistakes are played as they are called, and the report shows them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.audit import (
    CAP,
    CLIP,
    MISTAKEN_EPSILON,
    MODEL_EPSILON,
    PARTS,
    ForgottenClip,
    Size,
    WeightsBySize,
    everybody,
    full,
    in_model,
    lying,
    main,
    mistakes,
    poisson,
    sampled,
    setting,
)
from privfm.checks import InvalidArgument
from privfm.defenses import DPPlan
from privfm.experiment import ArmSpec
from privfm.reporting import Experiment
from privfm.reporting.audits import audit_answer, contradicted
from privfm.reporting.figures import all_figures

SMALL = Size((4.0,), 32, 24, 12, 2, 1, 10, 2)
ARMS = {
    "full-4", "poisson-4", "random-directions-8", "gradients-8", "wrong-labels-8", "wrong-labels-no-plan",
    "odd-texts-8", "odd-texts-no-plan", "secrets-8", "secrets-no-plan", "halved-full", "halved-poisson",
    "fixed-as-poisson", "control-masks", "control-weights", "forgotten-clip", "weights-by-size",
}  # fmt: skip


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every arm there is."""
    out = tmp_path_factory.mktemp("audit")
    main(fast=True, epsilons=(MISTAKEN_EPSILON,), workers=1, out=out)
    return out


def audits(folder: Path) -> dict[str, dict[str, Any]]:
    found = {path.parents[1].name: json.loads(path.read_text()) for path in folder.glob("*/seed-0/summary.json")}
    return {name: summary["audited"] for name, summary in found.items()}


def specs() -> dict[str, ArmSpec]:
    base = setting(SMALL, 240, "cpu")
    return {arm.name: arm for build in (full, poisson, in_model, mistakes) for arm in build(base, SMALL)}


def test_every_arm_is_played_and_audited(played: Path) -> None:
    found = audits(played)
    assert set(found) == ARMS
    for name, audit in found.items():
        assert 0 < audit["included"] < audit["count"]
        assert audit["bound"]["epsilon"] >= 0 and audit["bound"]["confidence"] == 0.95 and audit["delta"] == 1e-5
        claimed = audit["claimed"]
        if name.endswith("no-plan"):
            assert claimed is None
        else:
            asked = MODEL_EPSILON if name.endswith("-8") else MISTAKEN_EPSILON
            assert 0.98 * asked < claimed <= asked
        assert bool(audit["checks"]) == (not name.endswith(("-8", "no-plan")))  # of ghosts alone
    kinds = {type(spec.config.audit.canaries).__name__ for spec in specs().values() if spec.config.audit is not None}
    assert kinds == {"GhostCanaries", "RandomDirections", "GradientCanaries", "MislabelledCanaries",
                     "OutOfDistributionTexts", "InsertedSecrets"}  # fmt: skip


def test_what_is_forgotten_is_found_even_so_small_and_the_controls_are_not_accused(played: Path) -> None:
    found = audits(played)
    for name in ("forgotten-clip", "weights-by-size"):
        shift = next(check for check in found[name]["checks"] if check["name"] == "mean shift")
        assert shift["found"] > 5 and shift["p_value"] < 1e-6 and "mean shift" in found[name]["alarm"]
    for name in ("full-4", "poisson-4", "control-masks", "control-weights"):
        assert found[name]["alarm"] == ""
    for name in ("halved-full", "halved-poisson"):
        noise = next(check for check in found[name]["checks"] if check["name"] == "noise scale")
        assert abs(noise["found"] - 0.5) < 0.2 and noise["p_value"] < 1e-3


def test_the_report_shows_all_of_it(played: Path) -> None:
    experiment = Experiment.read(played)
    page = (played / "report.html").read_text(encoding="utf-8")
    (figure,) = (figure for figure in all_figures(experiment) if figure.name == "audit")
    assert len(figure.panels) == 5
    assert "Claimed and audited epsilon" in page and "Checks of the mechanism" in page
    assert "Halved noise, all take part" in page
    assert {"Forgotten clip", "Weights by size"} <= set(contradicted(experiment))
    assert audit_answer(experiment) in page.replace("&#39;", "'").replace("\N{NON-BREAKING HYPHEN}", "-")


def test_a_mistake_differs_from_its_claim_in_what_it_is_called_after() -> None:
    arms = specs()
    whole, part = everybody(MISTAKEN_EPSILON, 2), sampled(MISTAKEN_EPSILON, 2)
    for name, claimed in (("halved-full", whole), ("halved-poisson", part)):
        config = arms[name].config
        assert config.plan == replace(claimed, noise_multiplier=claimed.noise_multiplier / 2)
        assert config.audit is not None and config.audit.claimed == claimed
    fixed = arms["fixed-as-poisson"].config
    assert fixed.plan == replace(part, sampling="fixed_size")
    assert fixed.audit is not None and fixed.audit.claimed == part
    for mistake, control in (("forgotten-clip", "control-masks"), ("weights-by-size", "control-weights")):
        wrong, right = arms[mistake].config, arms[control].config
        assert wrong.audit is not None and wrong.audit.claimed == right.plan
        assert replace(wrong, plan=right.plan, audit=right.audit) == right
        assert type(wrong.plan) is not type(right.plan)
        assert vars(wrong.plan) == vars(right.plan)


def test_the_lies_do_what_they_say() -> None:
    plan = replace(everybody(4.0, 2), weight_cap=CAP)
    row = torch.full((1, 4), 10.0)
    for kind, length in ((DPPlan, CLIP), (ForgottenClip, 20.0)):
        clip = lying(kind, plan).clip(((0, 4),))
        assert clip is not None
        assert float(clip.encode(row, {}, [torch.Generator()])[0].rows.norm()) == pytest.approx(length, rel=1e-4)
    assert plan.weights([CAP // 2, 10 * CAP]).tolist() == [0.5, 1.0]
    assert lying(WeightsBySize, plan).weights([CAP // 2, 10 * CAP]).tolist() == [0.5, 10.0]


@pytest.mark.parametrize("part", PARTS)
def test_a_part_can_be_asked_for_alone(part: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[str] = []

    def noted(experiment: Any, *_: object) -> None:
        asked.extend(arm.name for arm in experiment.arms)
        raise InterruptedError

    monkeypatch.setattr("experiments.audit.run_experiment", noted)
    with pytest.raises(InterruptedError):
        main(part=part, epsilons=(MISTAKEN_EPSILON,), fast=True, out=tmp_path)  # type: ignore[arg-type]
    counts = {"full": 1, "poisson": 1, "model": 8, "mistakes": 7}
    assert len(asked) == len(set(asked)) == counts[part]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"part": "half"}, "part='half'"),
        ({"epsilons": ()}, r"epsilons=\(\)"),
        ({"clients": 25}, "clients=25"),
        ({"clients": 0}, "clients=0"),
    ],
)
def test_what_is_asked_wrongly_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        main(**wrong)
