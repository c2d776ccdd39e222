"""TensorBoard's own reader finds what a run's record says, round by round, and nothing that is private."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from privfm.checks import InvalidArgument
from privfm.defenses import DPPlan, Mean
from privfm.defenses.channels import Plaintext
from privfm.experiment import ArmSpec, RunConfig, play_run, visibility
from privfm.federation import Adam
from privfm.federation.record import VISIBILITY
from privfm.learning import IID, SGD, Digits, ImageClassification, SmallCNN
from privfm.plugins.tensorboard import NO_PRIVACY, write_events
from privfm.reporting import RunFolder, everything_private


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run of three rounds under a plan."""
    config = RunConfig(
        data=Digits(),
        model=SmallCNN(width=4),
        task=ImageClassification(),
        partition=IID(40),
        training=SGD(0.1),
        rule=Mean(),
        channel=Plaintext(),
        optimizer=Adam(0.01),
        rounds=3,
        plan=DPPlan(noise_multiplier=1.0, max_grad_norm=1.0, sample_rate=0.3, delta=1e-3),
    )
    path = tmp_path_factory.mktemp("runs") / "private" / "seed-7"
    play_run(path, ArmSpec("private", "private", "", config), 7)
    return path


def read(log_dir: Path) -> dict[str, list[tuple[int, float]]]:
    accumulator = EventAccumulator(str(log_dir))
    accumulator.Reload()
    tags = accumulator.Tags()["scalars"]
    return {tag: [(one.step, one.value) for one in accumulator.Scalars(tag)] for tag in tags}


def text(log_dir: Path) -> str:
    accumulator = EventAccumulator(str(log_dir))
    accumulator.Reload()
    (found,) = accumulator.Tensors("privacy/text_summary")
    value: bytes = found.tensor_proto.string_val[0]
    return value.decode()


def close(found: list[tuple[int, float]], expected: list[tuple[int, float]]) -> bool:
    """Steps equal, values as float32 holds them."""
    return [step for step, _ in found] == [step for step, _ in expected] and all(
        one == pytest.approx(other, rel=1e-6) for (_, one), (_, other) in zip(found, expected, strict=True)
    )


def test_what_is_written_is_what_the_record_says(run: Path, tmp_path: Path) -> None:
    record = RunFolder(run)
    count = write_events(run, tmp_path / "log", visibility)
    found = read(tmp_path / "log")
    assert count == sum(len(values) for values in found.values())
    rows = [(int(str(row["round"])) + 1, float(str(row["validation/accuracy"]))) for row in record.rows()]
    assert [step for step, _ in rows] == [1, 2, 3] and close(found["validation/accuracy"], rows)
    assert close(found["epsilon"], [tuple(point) for point in record.summary()["epsilon_curve"]])
    assert found["epsilon"][-1][1] == pytest.approx(record.summary()["epsilon"]["epsilon"], rel=1e-6)
    assert close(found["test/accuracy"], [(3, record.summary()["utility"])])
    statement = text(tmp_path / "log")
    assert "at delta 1e-3 after 3 rounds" in statement and "covers one client" in statement


def test_private_fields_come_only_when_asked_for(run: Path, tmp_path: Path) -> None:
    write_events(run, tmp_path / "shown", visibility)
    write_events(run, tmp_path / "own", visibility, released=False)
    shown, own = read(tmp_path / "shown"), read(tmp_path / "own")
    private = {name for name, seen in VISIBILITY.items() if seen == "private"}
    assert private.isdisjoint(shown) and "validation/worst_decile_client_accuracy" not in shown
    assert {"bytes_up", "seconds_training", "kept", "sampled", "malicious"} <= own.keys()
    assert shown.keys() < own.keys() and all(shown[tag] == own[tag] for tag in shown)
    with pytest.raises(InvalidArgument, match="written with released=True; choose another folder"):
        write_events(run, tmp_path / "shown", visibility, released=False)


def test_nothing_is_written_of_a_record_about_which_nothing_is_known(run: Path, tmp_path: Path) -> None:
    assert write_events(run, tmp_path / "log", everything_private) == 0
    assert read(tmp_path / "log") == {}


def test_no_file_tells_host_or_seed(run: Path, tmp_path: Path) -> None:
    write_events(run, tmp_path / "log", visibility)
    files = sorted((tmp_path / "log").iterdir())
    assert [file.name for file in files] == ["events.out.tfevents.0000000003.finished", "privfm-events.json"]
    assert not any(word in file.read_bytes() for file in files for word in (socket.gethostname().encode(), b"seed-7"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log"], "nothing is left beside it"


def test_a_run_is_followed_while_it_goes_on(run: Path, tmp_path: Path) -> None:
    """One call after every round, and one too many: the same as one call at the end, nothing twice."""
    record = RunFolder(run)
    living = RunFolder.open(tmp_path / "living", record.config(), record.environment())
    counts = []
    for row in record.rows():
        living.append(row)
        counts += [write_events(living.path, tmp_path / "log", visibility) for _ in range(2)]
    living.finish(record.summary())
    counts += [write_events(living.path, tmp_path / "log", visibility) for _ in range(2)]
    assert all(count > 0 for count in counts[::2]) and set(counts[1::2]) == {0}
    write_events(run, tmp_path / "once", visibility)
    assert read(tmp_path / "log") == read(tmp_path / "once")
    assert text(tmp_path / "log") == text(tmp_path / "once")


@pytest.mark.parametrize("epsilons", [[], [{"epsilon": None}]], ids=["no plan", "no noise"])
def test_no_privacy_is_said(run: Path, tmp_path: Path, epsilons: list[Any]) -> None:
    record = RunFolder(run)
    other = RunFolder.open(tmp_path / "other", record.config(), record.environment())
    other.append({"round": 0, "utility": None, "skipped": ""})
    other.finish({**record.summary(), "epsilons": epsilons, "epsilon_curve": [[1, None]]})
    write_events(other.path, tmp_path / "log", visibility)
    assert text(tmp_path / "log") == NO_PRIVACY and "epsilon" not in read(tmp_path / "log")


def test_folders_that_do_not_fit_are_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="is not a run"):
        write_events(tmp_path, tmp_path / "log", visibility)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "events.out.tfevents.1.host").write_bytes(b"")
    with pytest.raises(InvalidArgument, match="somebody else"):
        write_events(run, foreign, visibility)
    write_events(run, tmp_path / "log", visibility)
    record = RunFolder(run)
    shorter = RunFolder.open(tmp_path / "shorter", record.config(), record.environment())
    with pytest.raises(InvalidArgument, match="holds 3 rounds of a run, this one has 0"):
        write_events(shorter.path, tmp_path / "log", visibility)
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    with pytest.raises(InvalidArgument, match="cannot be written"):
        write_events(run, tmp_path / "file" / "log", visibility)
