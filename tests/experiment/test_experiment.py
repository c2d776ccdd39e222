"""Experiments on digits: refused before they start, equal whatever interrupts them and however many processes play."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from privfm.attacks import ALIE, SignFlip
from privfm.checks import BrokenCheckpoint, InvalidArgument
from privfm.defenses import DPPlan, Krum, Mean, TrimmedMean
from privfm.defenses.channels import CKKS, Plaintext
from privfm.experiment import ArmSpec, Experiment, RunConfig, play_run, resolved, run_experiment, visibility
from privfm.experiment.run import prepare
from privfm.federation import Adam, Average, FixedSize, Poisson
from privfm.learning import (
    IID,
    SGD,
    BitFit,
    Digits,
    Dirichlet,
    ImageClassification,
    LoRA,
    PromptTuning,
    SequenceClassifier,
    SmallCNN,
    SplitShares,
)
from privfm.reporting import RunFolder, export_released

CONFIG = RunConfig(
    data=Digits(),
    model=SmallCNN(width=4),
    task=ImageClassification(),
    partition=Dirichlet(40, alpha=1.0),
    training=SGD(0.1),
    rule=Mean(),
    channel=Plaintext(),
    optimizer=Adam(0.01),
    rounds=3,
    cohort=Poisson(0.3),
    evaluate_every=2,
)


def spec(name: str = "plain", **changes: Any) -> ArmSpec:
    return ArmSpec(name, name, "group", replace(CONFIG, **changes))


def arms() -> tuple[ArmSpec, ...]:
    plan = DPPlan(noise_multiplier=1.0, max_grad_norm=1.0, sample_rate=0.3, delta=1e-3)
    return (
        ArmSpec("central", "central", "", replace(CONFIG, partition=IID(1), cohort=FixedSize(1)), "centralised"),
        spec("plain"),
        spec("private", plan=plan, cohort=None),
        spec("attacked", rule=TrimmedMean(3), attack=ALIE(1.5, "honest"), malicious_share=0.2),
    )


def facts(run: Path) -> dict[str, Any]:
    """Everything a run came to, but for the clock."""
    folder = RunFolder(run)
    rows = [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in folder.rows()]
    summary = {k: v for k, v in folder.summary().items() if not k.startswith("seconds")}
    model = load_file(run / "checkpoint" / f"state-{len(rows):06d}.safetensors")["model"]
    return {"rows": rows, "summary": summary, "model": model.tolist()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    run_experiment(Experiment("toy", "Does it run?", arms()), folder, [0, 1], workers=1)
    return folder


def test_an_experiment_leaves_runs_an_index_and_a_report(whole: Path) -> None:
    assert sorted(path.name for path in whole.iterdir()) == [
        ".lock", "attacked", "central", "experiment.json", "plain", "private", "report.html",
    ]  # fmt: skip
    for name in ("central", "plain", "private", "attacked"):
        for seed in (0, 1):
            run = RunFolder(whole / name / f"seed-{seed}")
            assert run.finished and len(run.rows()) == 3
            assert (run.path / "model" / "model.safetensors").exists()
            evaluated = [row["utility"] is not None for row in run.rows()]
            assert evaluated == [False, True, True]
    private = RunFolder(whole / "private" / "seed-0").summary()["epsilon"]
    assert private["rounds"] == 3 and private["adversary"] == "released_model" and private["epsilon"] > 0
    assert "PoissonSampledDpEvent" in private["event"]
    central = RunFolder(whole / "central" / "seed-0").summary()
    assert central["kind"] == "centralised" and central["clients"] == 1


def test_arms_meet_the_same_clients(whole: Path) -> None:
    def cohorts(arm: str) -> list[Any]:
        return [row["sampled"] for row in RunFolder(whole / arm / "seed-0").rows()]

    assert cohorts("plain") == cohorts("private") == cohorts("attacked") != [40] * 3


def test_two_worker_processes_give_the_same(whole: Path, tmp_path: Path) -> None:
    run_experiment(Experiment("toy", "Does it run?", arms()[1:3]), tmp_path, [1], workers=2)
    for name in ("plain", "private"):
        assert facts(tmp_path / name / "seed-1") == facts(whole / name / "seed-1")


def test_a_second_call_plays_nothing_again(whole: Path) -> None:
    before = (whole / "plain" / "seed-0" / "summary.json").stat().st_mtime_ns
    run_experiment(Experiment("toy", "Does it run?", arms()), whole, [0, 1], workers=1)
    assert (whole / "plain" / "seed-0" / "summary.json").stat().st_mtime_ns == before


SCRIPT = """
import sys
sys.path.insert(0, {here!r})
from pathlib import Path
import importlib.util
module_spec = importlib.util.spec_from_file_location("killed", {file!r})
module = importlib.util.module_from_spec(module_spec)
sys.modules["killed"] = module
module_spec.loader.exec_module(module)
import torch
torch.set_num_threads(1)
module.play_run(Path({run!r}), module.killed_spec(), 0)
"""


def killed_spec() -> ArmSpec:
    return spec("killed", rounds=40, rule=TrimmedMean(2), dropout_rate=0.1, attack=SignFlip(2.0), malicious_share=0.1)


def test_kill_9_at_any_moment_costs_nothing(tmp_path: Path) -> None:
    run = tmp_path / "killed" / "seed-0"
    script = SCRIPT.format(here=str(Path.cwd()), file=__file__, run=str(run))
    for reached in (3, 11):  # each kill lands somewhere inside a round or one of its writes
        process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", script], env={**os.environ})
        deadline = monotonic() + 120
        while len(RunFolder(run).rows() if run.exists() else []) < reached:
            assert process.poll() is None and monotonic() < deadline, "the run ended before it could be killed"
            sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not RunFolder(run).finished
    play_run(run, killed_spec(), 0)
    play_run(tmp_path / "whole" / "seed-0", killed_spec(), 0)
    assert facts(run) == facts(tmp_path / "whole" / "seed-0")


@pytest.mark.parametrize("dies_at", range(1, 12, 2))
def test_dying_at_any_rename_costs_nothing(dies_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file is put in its place by a rename; the process dies right before one of them."""
    renames, real = [0], Path.replace

    def replace_or_die(self: Path, target: Any) -> Path:
        renames[0] += 1
        if renames[0] == dies_at + 2:  # the first two make the run's folder
            raise KeyboardInterrupt
        return real(self, target)

    run = tmp_path / "run" / "seed-0"
    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", replace_or_die)
        with pytest.raises(KeyboardInterrupt):
            play_run(run, spec(rounds=5), 0)
    play_run(run, spec(rounds=5), 0)
    play_run(tmp_path / "whole" / "seed-0", spec(rounds=5), 0)
    assert facts(run) == facts(tmp_path / "whole" / "seed-0")


def test_a_torn_line_is_dropped(tmp_path: Path) -> None:
    run = tmp_path / "run" / "seed-0"
    play_run(run, spec(rounds=2), 0)
    want = facts(run)
    (run / "summary.json").unlink()
    with (run / "rounds.jsonl").open("a") as file:
        file.write('{"round": 2, "coho')
    play_run(run, spec(rounds=2), 0)
    assert facts(run) == want


def test_a_broken_checkpoint_is_named(tmp_path: Path) -> None:
    run = tmp_path / "run" / "seed-0"
    play_run(run, spec(rounds=1), 0)
    (run / "summary.json").unlink()
    (run / "checkpoint" / "state-000001.safetensors").write_bytes(b"")
    with pytest.raises(BrokenCheckpoint, match="delete"):
        play_run(run, spec(rounds=1), 0)


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        (spec(rule=Krum(3), channel=CKKS(1.0, 40)), "Krum needs GRAM, CKKS reveals only SUM.*Plaintext"),
        (spec(rule=TrimmedMean(3), channel=CKKS(1.0, 40)), "TrimmedMean needs EACH.*Mean over CKKS"),
        (spec(rule=TrimmedMean(20)), r"f=20 needs n >= 2f\+1 = 41 updates for TrimmedMean, got n=12"),
        (spec(splits=SplitShares(test=0.0)), r"splits\.test=0"),
        (spec(partition=Dirichlet(5000, alpha=1.0)), "5000"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_trained(arm: ArmSpec, message: str, tmp_path: Path) -> None:
    good = spec("good")
    with pytest.raises(InvalidArgument, match=message):
        run_experiment(Experiment("toy", "?", (good, replace(arm, name="bad"))), tmp_path / "out", [0], workers=1)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_another_configuration_is_refused(tmp_path: Path) -> None:
    run_experiment(Experiment("toy", "?", (spec(rounds=1),)), tmp_path, [0], workers=1)
    with pytest.raises(InvalidArgument, match="rounds"):
        run_experiment(Experiment("toy", "?", (spec(rounds=2),)), tmp_path, [0], workers=1)
    assert len(RunFolder(tmp_path / "plain" / "seed-0").rows()) == 1


def test_two_processes_on_one_folder_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import privfm.experiment.runner as runner

    experiment = Experiment("toy", "?", (spec(rounds=1),))

    def second(*arguments: Any) -> None:
        with pytest.raises(InvalidArgument, match="another process plays"):
            run_experiment(experiment, tmp_path, [0], workers=1)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(runner, "play_run", second)
        with pytest.raises(KeyboardInterrupt):
            run_experiment(experiment, tmp_path, [0], workers=1)
    run_experiment(experiment, tmp_path, [0], workers=1)  # the lock went with its holder
    assert len(RunFolder(tmp_path / "plain" / "seed-0").rows()) == 1


def test_an_unwritable_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidArgument, match="cannot be written"):
        run_experiment(Experiment("toy", "?", (spec(),)), tmp_path / "file" / "out", [0], workers=1)


def test_ckks_equals_plaintext_in_a_run(tmp_path: Path) -> None:
    experiment = Experiment(
        "toy", "?", (spec("plain", optimizer=Average()), spec("ckks", optimizer=Average(), channel=CKKS(4.0, 40)))
    )
    run_experiment(experiment, tmp_path, [0], workers=1)
    plain, ckks = (facts(tmp_path / name / "seed-0") for name in ("plain", "ckks"))
    assert ckks["summary"]["channel_error_relative_l2"] < 1e-6
    assert torch.allclose(torch.tensor(plain["model"]), torch.tensor(ckks["model"]), atol=1e-5)
    assert ckks["summary"]["bytes_up_per_client"] > 4 * plain["summary"]["bytes_up_per_client"]


def test_an_export_keeps_what_is_released_and_no_seed(whole: Path, tmp_path: Path) -> None:
    export_released(RunFolder(whole / "private" / "seed-1"), visibility, tmp_path / "out")
    kept = {path.name: path.read_text() for path in (tmp_path / "out").rglob("*.json*")}
    config = json.loads(kept["config.json"])
    assert "seed" not in config and config["plan"]["noise_multiplier"] == 1.0
    summary = json.loads(kept["summary.json"])
    assert not [name for name in summary["metrics"] if "worst_decile" in name]
    assert "seed" not in summary and summary["epsilon"]["delta"] == 1e-3 and "seconds_total" not in summary
    for line in kept["rounds.jsonl"].splitlines():
        row = json.loads(line)
        assert not [name for name in row if "worst_decile" in name or "bytes" in name]
        assert "sampled" not in row and "update_norm_median" not in row and "round" in row


def test_a_resolved_configuration_is_plain() -> None:
    plain = resolved(spec(rule=TrimmedMean(2)).config)
    assert plain["rule"] == {"class_path": "TrimmedMean", "init_args": {"f": 2}}
    assert plain["splits"]["test"] == 0.2 and plain["plan"] is None
    assert json.loads(json.dumps(plain)) == plain


def test_bad_arguments() -> None:
    for change in (
        {"rounds": 0},
        {"malicious_share": 1.0},
        {"device": "cuda:77"},
        {"device": "gpu"},
        {"evaluate_every": 0},
    ):
        with pytest.raises(InvalidArgument):
            spec(**change)
    with pytest.raises(InvalidArgument, match="seeds"):
        run_experiment(Experiment("toy", "?", (spec(),)), Path("nowhere"), [0, 0])
    with pytest.raises(InvalidArgument, match="arms"):
        run_experiment(Experiment("toy", "?", (spec(), spec())), Path("nowhere"), [0])
    with pytest.raises(InvalidArgument, match="give one of them"):
        spec(malicious=(1,), malicious_share=0.2)
    with pytest.raises(InvalidArgument, match=r"malicious=\(1, 40\): no client \[40\]; ids go from 0 to 39"):
        prepare(spec(attack=SignFlip(2.0), malicious=(1, 40)).config, 0)


def test_rarer_checkpoints_cost_rounds_and_no_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run" / "seed-0"
    rare = spec(rounds=5, checkpoint_every=2)
    appended, real = [0], RunFolder.append

    def append_or_die(self: RunFolder, row: Any) -> None:
        appended[0] += 1
        if appended[0] == 4:
            raise KeyboardInterrupt
        real(self, row)

    with monkeypatch.context() as patched:
        patched.setattr(RunFolder, "append", append_or_die)
        with pytest.raises(KeyboardInterrupt):
            play_run(run, rare, 0)
    assert len(RunFolder(run).rows()) == 3
    assert [path.name for path in (run / "checkpoint").glob("state-*")] == ["state-000002.safetensors"]
    play_run(run, rare, 0)
    play_run(tmp_path / "often" / "seed-0", spec(rounds=5), 0)
    assert facts(run) == facts(tmp_path / "often" / "seed-0")


def test_malicious_clients_can_be_named(tmp_path: Path) -> None:
    named = spec(attack=SignFlip(2.0), malicious=(7, 3, 7))
    assert prepare(named.config, 0).arm.malicious == prepare(named.config, 1).arm.malicious == (3, 7)
    assert play_run(tmp_path / "seed-0", named, 0)["malicious_share"] == 2 / 40


@pytest.mark.parametrize("adapter", [LoRA(rank=2, freeze_a=True), BitFit(layers=(5,)), PromptTuning(3), None], ids=repr)
def test_a_recorded_adapter_says_its_kind(adapter):
    """A bare table reads back as LoRA: the record would name another model than the one that was trained."""
    recorded = resolved(SequenceClassifier("minilm", adapter=adapter))["init_args"]["adapter"]
    assert recorded is None if adapter is None else recorded["class_path"] == type(adapter).__name__
