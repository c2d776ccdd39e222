"""The record of a run survives kills, refuses what does not fit, and hands out only what may be seen."""

import json
import math

import pytest

from privfm import files as files_module
from privfm.checks import BrokenCheckpoint, InvalidArgument
from privfm.files import write_atomically
from privfm.reporting import RunFolder, describe_environment, everything_private, export_released
from privfm.reporting.environment import git_state, installed_versions

CONFIG = {"arm": "plain", "federation": {"rounds": 20, "cohort": 100}, "layers": (5,), "seed": 7}
ENVIRONMENT = {"python": "3.11.7", "versions": {"torch": "2.13.0"}, "command": "run --seed 7"}


@pytest.fixture
def run(tmp_path):
    return RunFolder.open(tmp_path / "plain" / "seed-7", CONFIG, ENVIRONMENT)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_run_from_start_to_end(run):
    assert not run.finished and run.rows() == []
    for played in range(3):
        run.append({"round": played, "utility": None if played % 2 else 0.5, "skipped": ""})
    run.finish({"utility": 0.5, "metrics": {"accuracy": {"value": 0.5}}})
    again = RunFolder.open(run.path, CONFIG, ENVIRONMENT)
    assert again.finished and again.summary()["utility"] == 0.5
    assert again.config()["layers"] == [5] and again.environment() == ENVIRONMENT
    assert [row["round"] for row in again.rows()] == [0, 1, 2]
    assert names(run.path) == ["config.json", "env.json", "rounds.jsonl", "summary.json"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"federation": {"rounds": 30, "cohort": 100}}, r"federation\.rounds is 20 in the record and 30 now"),
        ({"federation": {"cohort": 100}}, r"federation\.rounds=20 stands in the record only"),
        ({"strict": True}, r"strict=True stands in the given configuration only"),
        ({"layers": (4, 5)}, r"layers is \[5\] in the record and \[4, 5\] now"),
        ({"federation": None}, r"federation is \{.*\} in the record and None now"),
    ],
)
def test_another_configuration_is_refused(run, changed, message):
    run.append({"round": 0})
    before = {path.name: path.read_bytes() for path in run.path.iterdir()}
    with pytest.raises(InvalidArgument, match=message + ".*choose another folder"):
        RunFolder.open(run.path, {**CONFIG, **changed}, ENVIRONMENT)
    assert {path.name: path.read_bytes() for path in run.path.iterdir()} == before


def test_the_first_difference_is_named(run):
    changed = {**CONFIG, "arm": "other", "seed": 8}
    with pytest.raises(InvalidArgument, match="arm is 'plain'"):
        RunFolder.open(run.path, changed, ENVIRONMENT)


@pytest.mark.parametrize("config", [{"a": math.inf}, {"a": math.nan}, {"a": object()}, {"a": {1, 2}}])
def test_a_configuration_must_be_plain(tmp_path, config):
    with pytest.raises(InvalidArgument, match="config must hold plain, finite values"):
        RunFolder.open(tmp_path / "run", config, ENVIRONMENT)
    assert names(tmp_path) == []


def test_an_unwritable_folder_is_refused_before_any_work(tmp_path):
    """A path under a regular file: root, too, cannot write there."""
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    for path in (tmp_path / "file" / "run", tmp_path / "file"):
        with pytest.raises(InvalidArgument, match=r"choose another"):
            RunFolder.open(path, CONFIG, ENVIRONMENT)
    assert names(tmp_path) == ["file"] and (tmp_path / "file").read_text(encoding="utf-8") == "mine"


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years", encoding="utf-8")
    with pytest.raises(InvalidArgument, match="is not an empty folder"):
        RunFolder.open(tmp_path, CONFIG, ENVIRONMENT)
    assert names(tmp_path) == ["thesis.tex"]


def test_a_failure_while_creating_leaves_nothing(tmp_path, monkeypatch):
    """The environment is the second file written: a full disk there leaves no half run, under any name."""
    written = []

    def full_disk(path, text):
        if written:
            raise OSError(28, "No space left on device")
        written.append(path)
        write_atomically(path, text)

    monkeypatch.setattr(files_module, "write_atomically", full_disk)
    with pytest.raises(InvalidArgument, match="No space left on device"):
        RunFolder.open(tmp_path / "run", CONFIG, ENVIRONMENT)
    assert written and names(tmp_path) == []


@pytest.mark.parametrize("torn", [b'{"round": 2, "util', b"{", b'{"round": 2}', b"\xe2\x82"])
def test_a_torn_last_line_is_dropped(run, torn):
    """A kill in the middle of a write leaves a line without its end, even if what is there happens to parse."""
    for played in range(2):
        run.append({"round": played})
    rounds = run.path / "rounds.jsonl"
    with rounds.open("ab") as file:
        file.write(torn)
    assert [row["round"] for row in run.rows()] == [0, 1]
    again = RunFolder.open(run.path, CONFIG, ENVIRONMENT)
    again.append({"round": 2})
    assert rounds.read_bytes().count(b"\n") == 3
    assert [row["round"] for row in again.rows()] == [0, 1, 2]


def test_truncate_goes_back_to_a_checkpoint(run):
    for played in range(4):
        run.append({"round": played})
    with (run.path / "rounds.jsonl").open("ab") as file:
        file.write(b'{"round"')
    run.truncate(2)
    assert (run.path / "rounds.jsonl").read_bytes() == b'{"round": 0}\n{"round": 1}\n'
    run.truncate(0)
    assert run.rows() == []
    with pytest.raises(BrokenCheckpoint, match="holds 0 of the checkpoint's 3 rounds"):
        run.truncate(3)
    with pytest.raises(InvalidArgument, match="rounds=-1"):
        run.truncate(-1)


def test_a_broken_line_in_the_middle_is_an_error(run):
    (run.path / "rounds.jsonl").write_bytes(b'{"round": 0}\n{"rou\n{"round": 2}\n')
    with pytest.raises(BrokenCheckpoint, match="line 2"):
        run.rows()
    (run.path / "rounds.jsonl").write_bytes(b"[1]\n")
    with pytest.raises(BrokenCheckpoint, match="line 1: no JSON object"):
        run.rows()


def test_a_run_without_summary_is_unfinished(run):
    run.append({"round": 0})
    assert not run.finished
    with pytest.raises(InvalidArgument, match="is not finished; run it again"):
        run.summary()


def test_a_kill_while_the_summary_is_written_leaves_the_run_unfinished(run, monkeypatch):
    """The name is taken only after everything reached the disk."""

    def killed(_descriptor):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(files_module.os, "fsync", killed)
        with pytest.raises(KeyboardInterrupt):
            run.finish({"utility": 0.5})
    assert not run.finished and names(run.path) == ["config.json", "env.json"]
    run.finish({"utility": 0.5})
    assert run.finished


def test_a_finished_run_takes_nothing_more(run):
    run.append({"round": 0})
    run.finish({"utility": 0.5})
    for change in (lambda: run.append({"round": 1}), lambda: run.truncate(0), lambda: run.finish({})):
        with pytest.raises(InvalidArgument, match="finished run"):
            change()
    assert len(run.rows()) == 1


def test_numbers_that_are_not_finite_become_null(run):
    run.append({"round": 0, "loss": math.nan, "norm": math.inf})
    run.finish({"utility": math.nan, "metrics": {"loss": {"value": -math.inf, "n": 3}}, "spread": [1.0, math.nan]})
    assert run.rows() == [{"round": 0, "loss": None, "norm": None}]
    assert run.summary() == {"utility": None, "metrics": {"loss": {"value": None, "n": 3}}, "spread": [1.0, None]}


@pytest.mark.parametrize("value", [[1], {"a": 1}, object(), 1j])
def test_a_row_is_flat(run, value):
    with pytest.raises(InvalidArgument, match=r"row\['x'\]"):
        run.append({"round": 0, "x": value})
    assert run.rows() == []


def test_resuming_elsewhere_is_noted(run):
    other = {**ENVIRONMENT, "python": "3.12.1"}
    RunFolder.open(run.path, CONFIG, other)
    RunFolder.open(run.path, CONFIG, other)
    RunFolder.open(run.path, CONFIG, ENVIRONMENT)
    assert RunFolder(run.path).environment() == {**ENVIRONMENT, "resumed": [other]}


def test_damaged_files_are_named(run):
    (run.path / "config.json").write_text('{"arm": "pl', encoding="utf-8")
    with pytest.raises(BrokenCheckpoint, match=r"config\.json cannot be read"):
        RunFolder.open(run.path, CONFIG, ENVIRONMENT)


VISIBILITY = {
    "round": "public", "utility": "released", "arm": "public", "federation.rounds": "public", "python": "public",
    "seed": "private", "loss": "private", "epsilon.epsilon": "released", "metrics.value": "odd answer",
    "transforms.name": "public", "layers": "public",
}  # fmt: skip


def visible_names(value, prefix=""):
    if isinstance(value, dict):
        return {name for key, part in value.items() for name in visible_names(part, f"{prefix}{key}.")}
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return {name for part in value for name in visible_names(part, prefix)}
    return {prefix.removesuffix(".")}


@pytest.fixture
def told(run):
    """A finished run in which every private value is the number 1357."""
    run.append({"round": 0, "utility": 0.5, "loss": 1357.0, "new_field": 1357})
    run.append({"loss": 1357.0})
    run.finish({
        "arm": "plain", "seed": 1357, "utility": 0.5, "epsilon": {"epsilon": 2.9, "sigma": 1357},
        "metrics": {"value": 1357}, "transforms": [{"name": "Clip", "noise": 1357}, {"noise": 1357}],
        "nothing": None,
    })  # fmt: skip
    return run


@pytest.mark.parametrize("visibility", [VISIBILITY.__getitem__, lambda name: VISIBILITY.get(name, "private")])
def test_export_fails_closed(told, tmp_path, visibility):
    """Whether unknown names raise or are called private: they stay behind, as do answers that are no visibility."""
    out = export_released(told, visibility, tmp_path / "out")
    exported = RunFolder(out)
    assert names(out) == ["config.json", "env.json", "population.json", "rounds.jsonl", "summary.json"]
    assert exported.rows() == [{"round": 0, "utility": 0.5}]
    assert exported.config() == {"arm": "plain", "federation": {"rounds": 20}, "layers": [5]}
    assert exported.environment() == {"python": "3.11.7"}  # the command line names the seed
    assert exported.summary() == {
        "arm": "plain", "utility": 0.5, "epsilon": {"epsilon": 2.9}, "transforms": [{"name": "Clip"}],
    }  # fmt: skip
    everything = "".join(path.read_text(encoding="utf-8") for path in out.iterdir())
    assert "1357" not in everything and "seed" not in everything
    shown = set().union(
        *(visible_names(json.loads((out / name).read_text())) for name in names(out) if "rounds" not in name)
    )
    assert all(VISIBILITY.get(name) in ("released", "public") for name in shown)


def test_export_of_an_unknown_record_is_empty(told, tmp_path):
    exported = RunFolder(export_released(told, everything_private, tmp_path / "out"))
    assert (exported.rows(), exported.config(), exported.summary()) == ([], {}, {})


def test_export_keeps_everything_that_is_public(told, tmp_path):
    """The negative control: what is left out above is left out by the filter."""
    exported = RunFolder(export_released(told, lambda name: "public", tmp_path / "out"))
    assert (exported.rows(), exported.config(), exported.summary()) == (told.rows(), told.config(), told.summary())


def test_an_empty_container_is_judged_by_its_name(tmp_path):
    run = RunFolder.open(tmp_path / "run", {"transforms": [], "options": {}, "hidden": []}, {})
    exported = RunFolder(
        export_released(run, {"transforms": "public", "options": "public"}.__getitem__, tmp_path / "o")
    )
    assert exported.config() == {"transforms": [], "options": {}}


def test_export_overwrites_nothing(told, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x", encoding="utf-8")
    with pytest.raises(InvalidArgument, match="is not an empty folder"):
        export_released(told, everything_private, tmp_path / "out")
    assert names(tmp_path / "out") == ["mine"]


def test_an_unfinished_run_is_exported_without_summary(run, tmp_path):
    out = export_released(run, lambda name: "public", tmp_path / "out")
    assert names(out) == ["config.json", "env.json", "population.json", "rounds.jsonl"] and not RunFolder(out).finished


def test_the_environment_is_plain_and_repeatable(tmp_path):
    environment = describe_environment(command=["python", "-m", "x", "a b"])
    assert environment == describe_environment(command=["python", "-m", "x", "a b"])
    assert environment["command"] == "python -m x 'a b'" and environment["device"] == "cpu"
    assert environment["torch_threads"] >= 1 and environment["cpu_count"] >= 1
    RunFolder.open(tmp_path / "run", CONFIG, environment)


def test_versions_are_those_of_the_declared_packages():
    versions = installed_versions()
    assert {"torch", "peft", "matplotlib"} <= set(versions)
    assert not {"pytest", "ruff", "mypy"} & set(versions)


def test_outside_a_checkout_there_is_no_commit(tmp_path):
    assert git_state(tmp_path) is None
    assert git_state(tmp_path / "missing") is None
