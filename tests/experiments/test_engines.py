"""The comparison of engines: `tests/engines/test_flower_deployment.py` plays Flower's part."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from experiments.engines import APPROXIMATE, COHORT, compared, configurations, main, played, table
from privfm.experiment import ArmSpec
from privfm.experiment.run import play_run


def test_it_runs_and_says_what_is_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(fast=True, where=("local",), out=tmp_path)
    rows = json.loads((tmp_path / "engines.json").read_text())
    assert [(row["arm"], row["engine"], row["same"]) for row in rows] == [
        ("plain", "local", True),
        ("masks", "local", True),
    ]
    assert rows[0]["sha256"] != rows[1]["sha256"]  # of whole numbers
    assert f"| plain | local | 0 | {rows[0]['sha256'][:16]} | none |" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "change", "same"), [("plain", 1e-7, False), (APPROXIMATE, 1e-9, True)])
def test_another_model_shows(name: str, change: float, same: bool, tmp_path: Path) -> None:
    """The control: what differs is not called the same, but for an error that the channel states."""
    config = configurations(rounds=1)[name]
    for place in ("local", "simulation"):
        run = tmp_path / f"{name}-{place}" / "seed-0"
        play_run(run, ArmSpec(name, name, "", config), 0)
        if place == "simulation":
            model, summary = run / "model" / "model.safetensors", run / "summary.json"
            values = load_file(model)
            first = min(values)
            values[first] = values[first] + torch.full_like(values[first], change)
            save_file(values, model)
            summary.write_text(json.dumps({**json.loads(summary.read_text()), "model_sha256": "another"}))
    rows = compared(tmp_path, name, config, ("local", "simulation"), [0])
    assert [row["same"] for row in rows] == [True, same]
    assert len(table(rows)) == 4


def test_where_changes_nothing_but_the_engine() -> None:
    config = configurations(rounds=2)["plain"]
    there = played(config, "deployment", 3)
    assert (there.engine, there.flower.mode, there.flower.hosts) == ("flower", "deployment", 3)
    assert played(config, "local", 3) is config
    assert config.clients_per_batch == 1 and config.cohort.size == COHORT  # type: ignore[union-attr]
