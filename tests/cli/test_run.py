"""`privfm run`, and what `report`, `account` and `export` make of its record."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from privfm.cli import main
from privfm.defenses import DPPlan

EPSILON = DPPlan(noise_multiplier=1.0, max_grad_norm=1.0, sample_rate=0.2, delta=1e-3).epsilon(2)  # conftest's plan


@pytest.fixture
def run_folder(private_experiment: Path, tmp_path: Path) -> Path:
    """A copy of the one run, to be changed."""
    return Path(shutil.copytree(private_experiment / "example" / "seed-0", tmp_path / "arm" / "seed-0"))


def edit(file: Path, change: Callable[[Any], object]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def times(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


# ---------------------------------------------------------------------------------------------------------------- run


def test_run_leaves_a_record_and_a_report(private_experiment: Path) -> None:
    assert (private_experiment / "report.html").is_file()
    summary = json.loads((private_experiment / "example" / "seed-0" / "summary.json").read_text())
    assert summary["rounds"] == 2
    assert summary["epsilon"]["epsilon"] == pytest.approx(EPSILON)


def test_run_again_plays_nothing_and_says_the_same(
    private_words: list[str], private_experiment: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = times(private_experiment / "example")
    assert main([*private_words, "--out", str(private_experiment)]) == 0
    assert times(private_experiment / "example") == before
    out = capsys.readouterr().out
    assert "| example |" in out
    assert f"report: {private_experiment / 'report.html'}\n" in out


def test_another_configuration_is_refused_and_nothing_is_written(
    example: str, private_experiment: Path, refused: Callable[..., str]
) -> None:
    before = times(private_experiment)
    error = refused("run", example, "--rounds", "2", "--workers", "1", "--out", str(private_experiment))
    assert "holds a run of another configuration" in error
    assert times(private_experiment) == before


def test_problems_are_refused_before_any_round(example: str, tmp_path: Path, refused: Callable[..., str]) -> None:
    words = ("--channel", "CKKS", "--channel.bound", "1", "--channel.clients", "40", "--out", str(tmp_path / "x"))
    error = refused("run", example, *words)
    assert error.startswith("TrimmedMean needs EACH, CKKS reveals only SUM (instead: Mean over CKKS, or TrimmedMean")
    assert not list(tmp_path.rglob("rounds.jsonl"))


# ------------------------------------------------------------------------------------------------------------- report


def test_report_is_written_again(private_experiment: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = private_experiment / "report.html"
    before = page.read_text()
    page.unlink()
    assert main(["report", str(private_experiment)]) == 0
    assert page.read_text() == before
    assert "| example |" in capsys.readouterr().out


def test_report_of_something_else(tmp_path: Path, refused: Callable[..., str]) -> None:
    assert "is not an experiment" in refused("report", str(tmp_path))
    assert refused("report") == "missing folder"
    assert refused("report", str(tmp_path), "extra") == "unrecognized arguments: extra"


# ------------------------------------------------------------------------------------------------------------ account


def test_account_says_what_the_record_says(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["account", str(run_folder)]) == 0
    out = capsys.readouterr().out
    assert f"epsilon {EPSILON:.3g} at delta 1e-3 after 2 rounds" in out
    assert "against somebody who sees the released model, not the server" in out
    assert "the record says the same" in out


@pytest.mark.parametrize(
    ("name", "value"),
    [("epsilon", EPSILON / 2), ("epsilon", None), ("delta", 1e-5), ("rounds", 1), ("unit", "example")],
)
def test_account_finds_a_changed_claim(
    name: str, value: object, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(run_folder / "summary.json", lambda summary: summary["epsilon"].update({name: value}))
    assert main(["account", str(run_folder)]) == 1
    assert f"differs: {name} is {value!r} in the record, " in capsys.readouterr().out


def test_account_finds_a_claim_that_is_missing_or_made_up(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(run_folder / "config.json", lambda config: config.update(plan=None))
    assert main(["account", str(run_folder)]) == 1
    edit(run_folder / "summary.json", lambda summary: summary.update(epsilon=None))
    assert main(["account", str(run_folder)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("no plan: there is no differential privacy")


def test_account_knows_another_version_of_the_accountant(run_folder: Path) -> None:
    edit(run_folder / "summary.json", lambda summary: summary["epsilon"].update(accountant="PLD, dp-accounting 0.5"))
    assert main(["account", str(run_folder)]) == 0


def test_account_of_an_unfinished_run(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run_folder / "summary.json").unlink()
    rows = run_folder / "rounds.jsonl"
    rows.write_text(rows.read_text().splitlines(keepends=True)[0])
    assert main(["account", str(run_folder)]) == 0
    out = capsys.readouterr().out
    assert "after 1 round. " in out
    assert "not finished: 1 round played of 2" in out


def test_account_without_noise(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(run_folder / "config.json", lambda config: config["plan"].update(noise_multiplier=0.0))
    assert main(["account", str(run_folder)]) == 1
    assert "epsilon is infinite" in capsys.readouterr().out


def test_account_of_something_else(private_experiment: Path, run_folder: Path, refused: Callable[..., str]) -> None:
    run = private_experiment / "example" / "seed-0"
    assert refused("account", str(private_experiment)).endswith(f"it holds no config.json; its runs: {run}")
    edit(run_folder / "config.json", lambda config: config["plan"].pop("delta"))
    assert "is no plan" in refused("account", str(run_folder))
    edit(run_folder / "config.json", lambda config: config.pop("plan"))
    assert "does not say whether there was a plan" in refused("account", str(run_folder))
    (run_folder / "config.json").write_text("{")
    assert "cannot be read" in refused("account", str(run_folder))


# ------------------------------------------------------------------------------------------------------------- export


def test_export_leaves_out_what_is_private(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(run_folder), "--released"]) == 0
    copy = run_folder.parent / "released"
    assert capsys.readouterr().out == f"exported: {copy}\n"
    assert "seed" not in json.loads((copy / "config.json").read_text())
    for line in (copy / "rounds.jsonl").read_text().splitlines():
        assert "cohort" not in json.loads(line)
        assert "utility" in json.loads(line)
    assert main(["account", str(copy)]) == 0


def test_export_without_a_plan_says_so(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(run_folder / "config.json", lambda config: config.update(plan=None))
    assert main(["export", str(run_folder), "--released"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "no plan: no guarantee covers what was exported"


def test_export_to_a_folder_of_its_own(run_folder: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    out = tmp_path / "copy"
    out.mkdir()
    (out / "notes.txt").touch()
    assert "is not an empty folder" in refused("export", "--released", str(run_folder), "--out", str(out))
    assert [path.name for path in out.iterdir()] == ["notes.txt"]


def test_export_of_everything_is_refused(run_folder: Path, refused: Callable[..., str]) -> None:
    assert refused("export", str(run_folder)).startswith("released=False: a record holds diagnostics")
    assert not (run_folder.parent / "released").exists()


def test_export_writes_events_and_a_model_card(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = tmp_path / "events"
    words = ["--released", "--out", str(tmp_path / "released"), "--tensorboard", str(events), "--card"]
    assert main(["export", str(run_folder), *words]) == 0
    out = capsys.readouterr().out
    assert f"in {events}" in out and "model card: " in out
    accumulator = EventAccumulator(str(events))
    accumulator.Reload()
    tags = accumulator.Tags()["scalars"]
    assert any("accuracy" in tag for tag in tags) and not any("malicious" in tag for tag in tags)
    card = Path(out.partition("model card: ")[2].splitlines()[0]).read_text()
    assert f"{EPSILON:.2f}"[:3] in card and "released model" in card.lower()
