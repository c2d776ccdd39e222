"""Privacy against utility, small: every method under every unit, its plan, and what the report makes of them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any

import pytest

from experiments.privacy_utility import METHODS, TITLES, arm, main, plan, refusal, setting
from privfm.checks import InvalidArgument
from privfm.cli import main as privfm
from privfm.defenses import DPPlan
from privfm.experiment import prepare
from privfm.federation import refuse_problems
from privfm.learning import IID, Docstrings
from privfm.reporting import Experiment
from privfm.reporting.figures import all_figures

SOURCE = Docstrings(limit=240)


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every method under both units, with noise and without."""
    out = tmp_path_factory.mktemp("privacy_utility")
    main(fast=True, epsilons=(8.0, inf), seeds=(0,), workers=1, out=out)
    return out


def summaries(folder: Path) -> dict[str, dict[str, Any]]:
    return {path.parents[1].name: json.loads(path.read_text()) for path in sorted(folder.glob("*/seed-0/summary.json"))}


def test_every_method_is_played_under_every_unit(played: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = summaries(played)
    names = {title.replace(" ", "-").lower() for title in TITLES}
    assert set(found) == {
        f"{unit}-{name}-{e}" for unit in ("example", "client") for name in names for e in ("8", "infinity")
    }
    for name, summary in found.items():
        record = summary["epsilon"]
        assert record["unit"] == name.split("-")[0]
        if name.endswith("infinity"):
            assert record["epsilon"] is None
        else:
            assert 7.9 < record["epsilon"] <= 8.0
            assert record["adversary"] == ("server" if record["unit"] == "example" else "released_model")
        assert summary["training_engine"] == "batched"
    trained = {name: summary["trained_values"] for name, summary in found.items() if name.endswith("8")}
    assert trained["example-lora-8"] == 2 * 2 * 8 * 384 + 6 * 385  # two factors of query and value, and the head
    assert trained["example-ffa-8"] == 2 * 8 * 384 + 6 * 385
    assert trained["example-rolora-8"] == trained["example-lora-8"]
    assert trained["example-head-only-8"] == 6 * 385
    assert privfm(["account", str(played / "example-ffa-8" / "seed-0")]) == 0
    assert "the record says the same" in capsys.readouterr().out


def test_the_report_has_a_line_a_method_and_the_refusal(played: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = {figure.name: figure for figure in all_figures(Experiment.read(played))}
    privacy, growth = figures["privacy"].panels, figures["epsilon"].panels
    assert [panel.label.split(".")[0] for panel in privacy] == [
        "Utility by epsilon, examples of a client",
        "Utility by epsilon, whole clients",
    ]
    assert all(f"{title}: " in panel.label for panel in privacy for title in TITLES)
    assert len(growth) == 2 and all("At the end: 8 (4 arms)" in panel.label for panel in growth)
    page = (played / "report.html").read_text(encoding="utf-8")
    assert "A plan for whole clients among 5 is refused: 5 clients cannot hide one of them" in page
    assert privfm(["report", str(played)]) == 0
    printed = capsys.readouterr().out
    assert "## Utility by epsilon" in printed
    paragraphs = [line for line in printed.splitlines() if "neighbouring data sets" in line]
    assert len(paragraphs) == 2  # methods share a plan, and a plan is stated once
    examples = next(line for line in paragraphs if "example of a client" in line)
    for part in ("LoRA, epsilon 8; FFA, epsilon 8", "the largest of 3 clients; the median client: ", "at delta 1e-5",
                 "against the server", "at most 2 rounds", "zero-out", "local (each client adds noise in every local",
                 "Accountant: PLD", "event: ", "simulated: no guarantee", "excludes tuning"):  # fmt: skip
        assert part in examples


def test_a_second_call_plays_nothing(played: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(played, tmp_path / "copy"))
    before = {path: path.stat().st_mtime_ns for path in copy.glob("*/seed-0/summary.json")}
    main(fast=True, epsilons=(8.0, inf), methods=("Head only",), seeds=(0,), workers=1, out=copy)
    assert {path: path.stat().st_mtime_ns for path in copy.glob("*/seed-0/summary.json")} == before


@pytest.mark.parametrize("unit", ["example", "client"])
def test_arms_of_a_unit_differ_by_method_and_noise_alone(unit: str) -> None:
    base = setting(unit, SOURCE, fast=True)
    plans = [(epsilon, plan(unit, base, epsilon)) for epsilon in (8.0, inf)]
    arms = [arm(unit, base, method, *each) for method in METHODS for each in plans]
    for noisy, plain in zip(arms[::2], arms[1::2], strict=True):
        assert noisy.config.plan is not None and noisy.config.plan.noise_multiplier > 0
        assert plain.config == replace(noisy.config, plan=replace(noisy.config.plan, noise_multiplier=0.0))


def test_whole_clients_among_five_are_refused_with_a_way_out() -> None:
    found = refusal(setting("client", SOURCE, fast=True))
    assert found.what.startswith("5 clients cannot hide one of them: the noise of each round is ")
    assert "unit='example'" in found.instead
    ratio = float(found.what.split(" is ")[1].split(" times")[0])
    noise = DPPlan(0.0, 1.0, 1.0, 0.01, sampling="full").with_epsilon(8.0, 2).noise_multiplier
    assert ratio == pytest.approx(noise * 14598**0.5 / 5, rel=0.01)
    whole = DPPlan(1.0, 1.0, 1.0, 0.01, sampling="full")
    few = replace(setting("client", SOURCE, fast=True), partition=IID(5), plan=whole)
    with pytest.raises(InvalidArgument, match="5 clients cannot hide one of them"):  # before a run would start
        refuse_problems(prepare(few, 0))


def test_texts_of_ones_own(tmp_path: Path) -> None:
    rows = [f'"the {word} number {k} of them","{word}"' for k in range(60) for word in ("red", "blue")]
    file = tmp_path / "colours.csv"
    file.write_text("\n".join(["review,colour", *rows]))
    own = {"data": file, "text": "review", "label": "colour"}
    main(fast=True, unit="client", methods=("Head only",), epsilons=(inf,), seeds=(0,), workers=1, out=tmp_path, **own)
    (summary,) = summaries(tmp_path).values()
    assert summary["trained_values"] == 2 * 385 and summary["clients"] == 40


def test_what_is_asked_wrongly_is_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"methods='Lora'.*LoRA"):
        main(fast=True, methods=("Lora",))
    with pytest.raises(InvalidArgument, match="unit='rows'"):
        main(fast=True, unit="rows")  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="epsilons"):
        main(fast=True, epsilons=())
