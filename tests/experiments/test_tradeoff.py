"""The main experiment, in its small version, with every arm it has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.tradeoff import main, tolerated
from privfm.reporting import RunFolder


def test_every_arm_runs_and_the_report_holds_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(fast=True, epsilons=(8.0,), workers=1, out=tmp_path)
    printed = capsys.readouterr().out
    arms = [arm["name"] for arm in json.loads((tmp_path / "experiment.json").read_text())["arms"]]
    assert len(arms) == 13
    report = (tmp_path / "report.html").read_text()
    for arm in arms:
        summary = RunFolder(tmp_path / arm / "seed-0").summary()
        assert summary["title"] in printed and summary["title"] in report
    assert "ALIE is built to pass robust rules" in report
    ckks = RunFolder(tmp_path / "ckks" / "seed-0").summary()
    plain = RunFolder(tmp_path / "plain" / "seed-0").summary()
    assert ckks["channel_error_relative_l2"] < 1e-6
    assert abs(ckks["utility"] - plain["utility"]) < 0.03


def test_f_covers_the_attackers_of_a_cohort_of_random_size() -> None:
    assert tolerated(100) == 30  # 20 expected, standard deviation 4
