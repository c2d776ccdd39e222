"""Every kind of privacy plan on the command line: what `check` says of it, and `account` from the record alone."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from privfm.cli import main
from privfm.defenses import DPPlan, LocalSampling
from privfm.reporting.formats import small_number

BASE = ["--rule", "Mean", "--attack", "null", "--malicious_share", "0", "--cohort", "null", "--rounds", "2"]
BASE += ["--partition.clients", "12", "--plan.noise_multiplier", "2", "--plan.max_grad_norm", "1"]
SUMMED = ["--channel", "CKKS", "--channel.clients", "12"]
WHOLE = ["--plan.sample_rate", "1", "--plan.sampling", "full", "--plan.delta", "1e-3"]

KINDS = {
    "example": [
        *("--plan.sample_rate", "1", "--plan.sampling", "full", "--plan.delta", "1e-4"),
        *("--plan.unit", "example", "--plan.place", "local", "--plan.clipping", "Automatic"),
        *("--plan.local.batch_size", "16", "--plan.local.local_steps", "2"),
    ],
    "adaptive": [
        *("--plan.sample_rate", "0.5", "--plan.delta", "1e-3", "--plan.clipping", "AdaptiveQuantile"),
        *("--plan.clipping.count_deviation", "1.5"),
    ],
    "correlated": [
        *("--plan.sample_rate", "0.25", "--plan.sampling", "cyclic", "--plan.bands", "4", "--plan.delta", "1e-3"),
        *("--plan.max_participations", "2", "--plan.clipping", "PerLayer", "--plan.clipping.split", "size"),
    ],
    "fixed size": ["--plan.sample_rate", "0.25", "--plan.sampling", "fixed_size", "--plan.delta", "1e-3"],
    "local": [*WHOLE, "--plan.place", "local", "--rule", "TrimmedMean", "--rule.f", "3"],
    "key holder": [*WHOLE, "--plan.place", "key_holder", "--plan.source", "secure", *SUMMED, "--channel.bound", "1"],
    "distributed": [
        *(*WHOLE, "--plan.place", "distributed", "--plan.integers.least_answers", "10"),
        *("--plan.integers.clients", "12", *SUMMED, "--channel.bound", str(2.0**31)),
    ],
    "own noise": [
        *("--plan.sample_rate", "1", "--plan.sampling", "full", "--plan.delta", "1e-4"),
        *("--plan.unit", "example", "--plan.place", "local", "--plan.local.batch_size", "16"),
        *("--plan.local.noise_by_examples", "[[1,2.5],[60,2.0]]"),
    ],
}

SERVER = {
    "example": "every update, and who took part; clients have added noise in every local step",
    "adaptive": "every update, and who took part, before any noise",
    "correlated": "every update, and who took part, before any noise",
    "fixed size": "every update, and who took part, before any noise",
    "local": "every update, and who took part; every client has added noise of its own",
    "key holder": "ciphertexts, who took part, and the sum; the key holder has added noise",
    "distributed": "ciphertexts, who took part, and the sum; all clients together have added noise",
    "own noise": "every update, and who took part; clients have added noise in every local step",
}


def lines(text: str) -> dict[str, str]:
    """What `check` prints, by the name at the beginning of a line."""
    pairs = (re.match(r"([\w' ]+?)(?:: | {2,}| (?=[\d(]))(.+)", line) for line in text.splitlines())
    return {pair[1]: pair[2] for pair in pairs if pair}


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_plan_is_checked_played_and_accounted_again(
    kind: str, example: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [example, *BASE, *KINDS[kind]]
    assert main(["check", *words]) == 0
    found = lines(capsys.readouterr().out)
    assert found["server sees"] == SERVER[kind]
    assert main(["run", *words, "--workers", "1", "--out", str(tmp_path)]) == 0
    capsys.readouterr()
    folder = tmp_path / "example" / "seed-0"
    summary = json.loads((folder / "summary.json").read_text())
    epsilon, delta = summary["epsilon"]["epsilon"], summary["epsilon"]["delta"]
    said = f"epsilon {small_number(epsilon)} at delta {small_number(delta)} after 2 rounds"
    assert found["privacy after all rounds"].startswith(said)
    played = json.loads((folder / "rounds.jsonl").read_text().splitlines()[0])
    stated = re.findall(r"\(([\d,]+)\) a client", found["bytes up"])
    ciphertexts = 1e-3 if "CKKS" in KINDS[kind] else 0.0  # are compressed, so that their length is not quite fixed
    assert float(stated[0].replace(",", "")) == pytest.approx(played["bytes_up_per_client"], rel=ciphertexts)
    assert main(["account", str(folder)]) == 0
    assert "the record says the same" in capsys.readouterr().out


def test_account_finds_a_changed_plan(example: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A smaller batch in the record's plan, or one client fewer, must not go unnoticed."""
    words = [example, *BASE, *KINDS["example"], "--out", str(tmp_path), "--workers", "1"]
    assert main(["run", *words]) == 0
    folder = tmp_path / "example" / "seed-0"
    config, population = (json.loads((folder / name).read_text()) for name in ("config.json", "population.json"))
    changed = json.loads(json.dumps(config))
    changed["plan"]["local"]["batch_size"] = 8
    (folder / "config.json").write_text(json.dumps(changed))
    capsys.readouterr()
    assert main(["account", str(folder)]) == 1
    assert "differs: epsilon is" in capsys.readouterr().out
    (folder / "config.json").write_text(json.dumps(config))
    fewer = population | {"client_examples": population["client_examples"][1:]}
    (folder / "population.json").write_text(json.dumps(fewer))
    assert main(["account", str(folder)]) == 1
    assert "differs: clients is 12 in the record, 11 recomputed" in capsys.readouterr().out


def test_a_plan_in_a_file(tmp_path: Path, example: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "private.toml"
    text = Path(example).read_text(encoding="utf-8").partition("[cohort]")[0].replace("malicious_share = 0.1", "")
    file.write_text(
        text
        + """
[plan]
noise_multiplier = 2.0
max_grad_norm = 1.0
sample_rate = 1.0
delta = 1e-4
unit = "example"
place = "local"
sampling = "full"
local = { batch_size = 8, local_steps = 3 }

[plan.clipping]
class_path = "PerLayer"
init_args = { split = "size" }
"""
    )
    assert main(["check", str(file)]) == 0
    said = lines(capsys.readouterr().out)["privacy after all rounds"]
    plan = DPPlan(
        2.0, 1.0, 1.0, 1e-4, unit="example", place="local", sampling="full", local=LocalSampling(8, local_steps=3)
    )
    assert said.startswith(f"epsilon {plan.epsilon(10, examples=[31]):.3g} at delta 1e-4 after 10 rounds")
    assert "the largest of 40 clients; the median client" in said


def test_a_budget_ends_the_run_where_check_says(
    example: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [example, *BASE, *KINDS["local"], "--rounds", "9"]
    plan = DPPlan(2.0, 1.0, 1.0, 1e-3, place="local", sampling="full", budget=3.0)
    until = plan.rounds_within(9)
    assert 1 < until < 9
    assert main(["check", *words, "--plan.budget", "3"]) == 0
    found = lines(capsys.readouterr().out)
    assert found["cohort"] == f"12 expected, 12 at most, a round; {until} rounds of 9: then the budget is spent"
    assert found["privacy after all rounds"].startswith(
        f"epsilon {plan.epsilon(until):.3g} at delta 1e-3 after {until}"
    )
    assert main(["run", *words, "--plan.budget", "3", "--workers", "1", "--out", str(tmp_path)]) == 0
    assert len((tmp_path / "example" / "seed-0" / "rounds.jsonl").read_text().splitlines()) == until
    assert main(["account", str(tmp_path / "example" / "seed-0")]) == 0


def test_examples_need_gradients_that_show(example: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = [example, *BASE, *KINDS["example"], "--training", "OneStep"]
    assert main(["check", *words]) == 1
    out = capsys.readouterr().out
    assert "problem: gradients of single examples are not to be had: OneStep does not show its steps" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--plan.place", "local", "--plan.sample_rate", "0.5"], "bound what one client gives with max_participations"),
        (["--plan.unit", "example", "--plan.sample_rate", "1"], "gradients of examples are noised by clients"),
        (["--plan.bands", "4", "--plan.sample_rate", "0.5"], "a claim of amplification by Poisson sampling"),
        (["--plan.clipping", "Adaptive", "--plan.sample_rate", "0.5"], "clipping"),
        (["--plan.locall.batch_size", "4", "--plan.sample_rate", "0.5"], "locall"),
    ],
    ids=["local", "example", "bands", "clipping", "misspelt"],
)
def test_what_a_plan_refuses_is_one_line(
    words: list[str], message: str, example: str, refused: Callable[..., str]
) -> None:
    assert message in refused("check", example, *BASE, "--plan.delta", "1e-3", *words)
