"""Which runs share a session of Flower, what is refused before one starts, and what is left when one fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, final

import pytest
from torch import nn

from privfm.checks import InvalidArgument
from privfm.contracts import Channel, Examples
from privfm.defenses import ClientMomentum, Mean
from privfm.defenses.channels import CKKS, Plaintext
from privfm.engines.flower.launch import FlowerFailed
from privfm.engines.flower.settings import FlowerSettings
from privfm.experiment import ArmSpec, RunConfig
from privfm.experiment import flower as experiment
from privfm.experiment.flower import Job, play_on_flower, refuse_jobs
from privfm.federation import Average, FixedSize
from privfm.learning import IID, SGD, Digits, ImageClassification, OwnTraining, SmallCNN

HOSTS = 2
LOGS = {"supernode-0.log": "started\n", "worker.log": "privfm: client 3: ValueError: why\n"}


def job(folder: Path, channel: Channel | None = None, **setting: Any) -> Job:
    config = RunConfig(
        data=Digits(),
        model=SmallCNN(width=4),
        task=ImageClassification(),
        partition=IID(20),
        training=SGD(0.1),
        rule=Mean(),
        channel=channel or Plaintext(),
        optimizer=Average(),
        rounds=2,
        cohort=FixedSize(6),
        transforms=(ClientMomentum(0.9),),
        engine="flower",
        flower=FlowerSettings(hosts=HOSTS),
    )
    return folder, ArmSpec(folder.name, folder.name, "", replace(config, **setting)), 0


@final
@dataclass
class Opened:
    """What was asked for: sessions, and in which of them a run was played on how many hosts."""

    hosts: list[int] = field(default_factory=list)
    played: list[tuple[str, int]] = field(default_factory=list)
    fails: frozenset[str] = frozenset()


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Opened:
    seen = Opened()

    @contextmanager
    def open_session(folder: Path, settings: FlowerSettings, hosts: int) -> Iterator[Path]:
        workers = folder / "home" / "privfm"
        workers.mkdir(parents=True)
        (folder / "home" / "config.toml").touch()
        for name, line in LOGS.items():
            ((workers if name == "worker.log" else folder) / name).write_text(line)
        seen.hosts.append(hosts)
        yield folder

    def play_in(session: Path, folder: Path, own: Job, hosts: int, shared: Path) -> None:
        seen.played.append((own[0].name, hosts))
        if own[0].name in seen.fails:
            raise FlowerFailed("run 1 on Flower is finished:failed: no such file\nTraceback\nmore of a log")

    monkeypatch.setattr(experiment, "open_session", open_session)
    monkeypatch.setattr(experiment, "play_in", play_in)
    return seen


def play(jobs: list[Job], shared: Path) -> None:
    play_on_flower(jobs, shared, lambda: None)


def test_a_run_has_the_hosts_it_would_have_alone(opened: Opened, tmp_path: Path) -> None:
    """Its clients' momentum lies on their hosts: were it three now, and two when it goes on alone, it would be lost."""
    plain, encrypted, other = (
        job(tmp_path / "plain"),
        job(tmp_path / "encrypted", CKKS(4.0, 6)),
        job(tmp_path / "other", flower=FlowerSettings(hosts=HOSTS, threads=2)),
    )
    again = (tmp_path / "again", *plain[1:])
    play([plain, encrypted, again, other], tmp_path)
    together = dict(opened.played)
    assert opened.hosts == [HOSTS, HOSTS + 1, HOSTS]  # a session for both of the same settings, no more than needed
    assert together == {"plain": HOSTS, "again": HOSTS, "encrypted": HOSTS + 1, "other": HOSTS}
    for one in (plain, encrypted, other):
        opened.played.clear()
        play([one], tmp_path)
        assert opened.played == [(one[0].name, together[one[0].name])]


def test_no_runs_start_nothing(opened: Opened, tmp_path: Path) -> None:
    play([], tmp_path)
    assert opened.hosts == []


def test_logs_of_a_session_that_failed_are_kept_beside_the_run(opened: Opened, tmp_path: Path) -> None:
    opened.fails = frozenset({"bad"})
    good, bad = job(tmp_path / "good"), job(tmp_path / "bad")
    (tmp_path / "bad.logs").mkdir()
    (tmp_path / "bad.logs" / "earlier.log").touch()
    with pytest.raises(FlowerFailed) as error:
        play([good, bad], tmp_path)
    assert str(error.value) == (
        f"run 1 on Flower is finished:failed: no such file; the logs of server and hosts are in {tmp_path / 'bad.logs'}"
    )
    assert {log.name: log.read_text() for log in (tmp_path / "bad.logs").iterdir()} == LOGS
    assert not bad[0].exists()  # a folder that is there and not a run's could not become one
    assert not (tmp_path / "good.logs").exists()


def test_hosts_on_this_machine_have_no_data_of_their_own(opened: Opened, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"flower.clients=6: .* rows that the server evaluates on.* flower-app"):
        play([job(tmp_path / "own", flower=FlowerSettings(clients=6))], tmp_path)
    assert opened.hosts == []


@final
@dataclass(frozen=True)
class Mine(Mean):
    """A rule of the user's own."""


def train(module: nn.Module, examples: Examples) -> nn.Module:
    return module


def test_what_no_other_process_can_import_is_refused(
    opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def inner(module: nn.Module, examples: Examples) -> nn.Module:
        return module

    refuse_jobs([job(tmp_path / "good", rule=Mine()), job(tmp_path / "same", training=OwnTraining(train))])
    with pytest.raises(InvalidArgument, match=r"<locals>\.inner: hosts are processes of their own"):
        play([job(tmp_path / "inner", training=OwnTraining(inner))], tmp_path)
    monkeypatch.setattr(Mine, "__module__", "__main__")
    with pytest.raises(InvalidArgument, match=r"^__main__\.Mine: .*top level of a module"):
        play([job(tmp_path / "script", rule=Mine())], tmp_path)
    monkeypatch.setattr(train, "__module__", "__main__")
    with pytest.raises(InvalidArgument, match=r"^__main__\.train: "):
        play([job(tmp_path / "function", training=OwnTraining(train))], tmp_path)
    assert opened.hosts == []


@pytest.mark.parametrize(("mode", "needed"), [("simulation", "flwr, ray"), ("deployment", "flwr")])
def test_without_flower_nothing_starts(
    mode: Any, needed: str, opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from privfm.engines.flower import surroundings

    one = job(tmp_path / "one", flower=FlowerSettings(mode=mode))
    refuse_jobs([one])
    monkeypatch.setattr(surroundings, "find_spec", lambda name: None)
    with pytest.raises(InvalidArgument, match=rf"needs {needed}; run: pip install 'privfm\[flower\]'"):
        play([one], tmp_path)
    assert opened.hosts == []
