"""Runs of `benchmarks.engine_work` on every engine, and what each of their rounds took."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from math import nan
from pathlib import Path
from threading import Event, Thread
from time import perf_counter, process_time
from typing import Final, final

import torch
from torch import Tensor

from benchmarks.engine_work import LEARNING_RATE, SEED, named
from benchmarks.timing import Spent
from privfm.contracts import SERVER
from privfm.defenses.channels.identity_files import make_secrets
from privfm.engines import Local
from privfm.engines.flower.app import Place, write_app
from privfm.engines.flower.launch import Session
from privfm.engines.flower.node import hosted_here
from privfm.engines.flower.processes import descendants
from privfm.engines.flower.settings import FlowerSettings
from privfm.experiment import ArmSpec, RunConfig, prepare
from privfm.experiment.flower import record_of
from privfm.federation import rounds
from privfm.reporting import RunFolder

PATIENCE: Final = 600.0  # seconds a run on Flower may take
ROOT: Final = Path(__file__).parents[1]
PEER: Final = Path(__file__).parent / "engine_peers"
_LOOK: Final = 0.01  # seconds between two looks at a file that grows
_TICKS: Final = os.sysconf("SC_CLK_TCK")

Mark = tuple[float, float]
"""The wall's clock and the processor's, in seconds."""


@final
@dataclass(frozen=True)
class Played:
    """What one run took.

    Attributes:
      rounds: wall seconds of every round by the server's own clock, from who is drawn to the new model; processor
        seconds of all processes of the engine from the end of the round before to the end of this one, nan in the
        first.
      between: wall seconds from the end of the round before to the end of this one; nan in the first.
      started: wall seconds from the call to the end of the first round.
      model: afterwards, by name.
    """

    rounds: tuple[Spent, ...]
    between: tuple[float, ...]
    started: float
    model: dict[str, Tensor]


def played(began: float, marks: list[Mark], seconds: list[float], model: dict[str, Tensor]) -> Played:
    """A run from the clocks at the end of each round, and from what the server's own clock said of each.

    Raises:
      RuntimeError: they are not of the same rounds.
    """
    if not marks or len(marks) != len(seconds):
        raise RuntimeError(f"{len(seconds)} rounds were noted, {len(marks)} were seen")
    steps = pairwise(marks)
    apart = [(nan, nan), *((after[0] - before[0], after[1] - before[1]) for before, after in steps)]
    spent = tuple(Spent(processor, wall) for wall, (_, processor) in zip(seconds, apart, strict=True))
    return Played(spent, tuple(wall for wall, _ in apart), marks[0][0] - began, model)


def on_one_process(config: RunConfig) -> Played:
    """The local engine, in this process."""
    began, marks, seconds = perf_counter(), list[Mark](), list[float]()
    federation = prepare(config, SEED)
    federation = replace(federation, engine=Local(config.clients_per_batch))
    model = federation.learner.initial()
    for step in rounds(federation, config.rounds, None, config.evaluate_every):
        marks.append((perf_counter(), process_time()))
        seconds.append((step.record.seconds_training or 0.0) + step.record.seconds_aggregation)
        model = step.state.model
    return played(began, marks, seconds, named(federation.learner, model))


def on_flower(
    config: RunConfig, session: Session, hosts: int, folder: Path, change: Callable[[Path], None] | None = None
) -> Played:
    """The same run with our engine.

    Args:
      config: the run.
      session: of as many SuperNodes as hosts.
      hosts: that clients are dealt out to.
      folder: a new one, for everything that is written.
      change: is given the app's folder before it is played.
    """
    settings = FlowerSettings(hosts=hosts, threads=torch.get_num_threads())
    spec = ArmSpec("engines", "engines", "", replace(config, engine="flower", flower=settings))
    run, app, place = folder / "run", folder / "app", Place(str(folder / "run"), SEED, "", str(folder / "secrets"), "")
    Path(place.loopback).mkdir(parents=True, mode=0o700)
    federation = prepare(config, SEED)
    public = make_secrets(place.secrets_of("server"), [SERVER])
    for host in range(hosts):
        public |= make_secrets(place.secrets_of(host), hosted_here(host, hosts, federation.arm, federation.parties))
    write_app(app, "privfm-run", record_of(spec, SEED, ROOT), public, place)
    if change is not None:
        change(app)
    with Watch(run / "rounds.jsonl") as watch:
        session.run(app, {"seed": SEED}, PATIENCE)
    rows = RunFolder(run).rows()
    lost = [row["round"] for row in rows if row["arrived"] != federation.parties]
    if lost:
        raise RuntimeError(f"rounds {lost}: not everybody answered; nothing can be compared")
    seconds = [float(row["seconds_training"] or 0) + float(row["seconds_aggregation"] or 0) for row in rows]
    return played(watch.began, watch.marks, seconds, _model(run / "model"))


def on_plain_flower(config: RunConfig, session: Session, data: Path, folder: Path, *, train: bool = True) -> Played:
    """Flower's own FedAvg in a plain app, a client a SuperNode.

    Args:
      config: the same run.
      session: with as many SuperNodes as clients.
      data: what `write_peer_data` has written.
      folder: a new one.
      train: whether clients train, or send back what they received.
    """
    folder.mkdir(parents=True)
    clients = len(list(data.glob("client-*.safetensors")))
    order: dict[str, str | int | float | bool] = {
        "data": str(data.absolute()),
        "out": str(folder.absolute()),
        "rounds": config.rounds,
        "clients": clients,
        "threads": torch.get_num_threads(),
        "learning-rate": LEARNING_RATE,
        "train": train,
    }
    with Watch(folder / "rounds.jsonl") as watch:
        session.run(PEER, order, PATIENCE)
    lines = (folder / "rounds.jsonl").read_text(encoding="utf-8").splitlines()
    return played(watch.began, watch.marks, [json.loads(line)["seconds"] for line in lines], _model(folder))


def difference(model: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Largest difference of two models, over the largest entry of the second."""
    if model.keys() != other.keys():
        raise RuntimeError(f"models of {sorted(model)} and of {sorted(other)} cannot be compared")
    apart = max(float((value - other[name]).abs().max()) for name, value in model.items())
    return apart / max(float(value.abs().max()) for value in other.values())


@final
class Watch:
    """Looks at a file that grows by a line a round, and reads the clocks at each.

    Processor seconds are those of all processes below this one, with theirs that ended; this one's own are left out.

    Attributes:
      began: the wall's clock at the start.
      marks: the clocks at the end of every round.
    """

    def __init__(self, path: Path) -> None:
        self.began, self.marks = perf_counter(), list[Mark]()
        self._path, self._over = path, Event()
        self._thread = Thread(target=self._watch, name="rounds", daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(_LOOK):
            self._look()
        self._look()

    def _look(self) -> None:
        lines = self._path.read_bytes().count(b"\n") if self._path.exists() else 0
        if lines > len(self.marks):
            mark = (perf_counter(), seconds_below(os.getpid()))
            self.marks += [mark] * (lines - len(self.marks))


def seconds_below(ancestor: int) -> float:
    """Processor seconds of all processes below one, and of those of theirs that ended."""
    ticks = 0
    for process in descendants(ancestor):
        try:
            text = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
        except OSError:  # it has just ended: its parent has its seconds
            continue
        ticks += sum(int(field) for field in text.rpartition(")")[2].split()[11:15])  # its own, and those it waited for
    return ticks / _TICKS


def _model(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def importable() -> None:
    """Lets processes of sessions that start from now on import this `benchmarks`, before others of that name."""
    known = [each for each in os.environ.get("PYTHONPATH", "").split(os.pathsep) if each]
    if str(ROOT) not in known:
        os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *known])
