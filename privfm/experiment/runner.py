"""Arms and seeds of an experiment, played by worker processes of one thread each."""

from __future__ import annotations

import fcntl
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from typing import final

import torch

from privfm.checks import InvalidArgument, at_least, require
from privfm.experiment.config import ArmSpec
from privfm.experiment.flower import Job, play_on_flower, refuse_jobs
from privfm.experiment.run import play_run, prepare, recorded
from privfm.experiment.visibility import visibility
from privfm.federation import problems_elsewhere, refuse, refuse_problems
from privfm.reporting import ExperimentIndex, IndexedArm, RunFolder, write_report
from privfm.reporting.summary import INDEX

SHARED = ".shared"
"""Folder of what the arms share while an experiment runs."""

LOCK = ".lock"

POLL_SECONDS = 1.0


@final
@dataclass(frozen=True)
class Experiment:
    """What is asked, and the arms that answer it.

    Attributes:
      name: short name.
      question: one sentence.
      arms: in the order of the table.
      notes: what a reader should know, shown in the report.
    """

    name: str
    question: str
    arms: tuple[ArmSpec, ...]
    notes: tuple[str, ...] = ()


def run_experiment(experiment: Experiment, folder: Path, seeds: Sequence[int], workers: int = 2) -> Path:
    """Plays every arm under every seed, going on where an earlier call was interrupted, and writes the report.

    Everything that can be refused is refused before the first run starts. Results do not depend on `workers`.

    Args:
      experiment: question and arms.
      folder: of the experiment; runs go to `ARM/seed-N/`.
      seeds: roots of the seed trees.
      workers: processes; 1 plays in this one.

    Returns:
      The report.

    Raises:
      InvalidArgument: an arm cannot run, or the folder holds another configuration or cannot be written.
    """
    at_least("workers", workers, 1)
    require(len(set(seeds)) == len(seeds) > 0, f"seeds={list(seeds)}: expected at least one, each once")
    names = [spec.name for spec in experiment.arms]
    require(len(set(names)) == len(names) > 0, f"arms {names}: expected at least one, each once")
    index = _index(experiment, folder, seeds)
    jobs = [(index.run_path(folder, spec.name, seed), spec, seed) for spec in experiment.arms for seed in seeds]
    for path, spec, seed in jobs:
        RunFolder(path).require_same(recorded(spec, seed))
    with _held(folder) as shared:
        refuse_jobs([job for job in jobs if job[1].config.engine == "flower" and not RunFolder(job[0]).finished])
        if not all(RunFolder(path).finished for path, _, _ in jobs):
            for seed in seeds:  # the activations that all arms share are computed here, once, with every core
                for spec in experiment.arms:
                    federation = prepare(spec.config, seed, shared)
                    refuse_problems(federation)
                    if spec.config.engine == "flower":
                        refuse(problems_elsewhere(federation.arm, bool(spec.config.clients_elsewhere)))
        index.write(folder)
        _play(jobs, shared, workers)
    return write_report(folder, visibility)


def _play(jobs: Sequence[Job], shared: Path, workers: int) -> None:
    elsewhere = [job for job in jobs if job[1].config.engine == "flower" and not RunFolder(job[0]).finished]
    jobs = [job for job in jobs if job not in elsewhere]
    with _progress([*jobs, *elsewhere]) as update:
        play_on_flower(elsewhere, shared, update)
        if workers == 1:
            with _single_threaded():
                for path, spec, seed in jobs:
                    play_run(path, spec, seed, shared)
                    update()
            return
        pool = ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,))
        with pool:
            waiting = {pool.submit(play_run, path, spec, seed, shared) for path, spec, seed in jobs}
            try:
                while waiting:
                    done, waiting = wait(waiting, POLL_SECONDS, FIRST_EXCEPTION)
                    update()
                    for future in done:
                        future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


@contextmanager
def _single_threaded() -> Iterator[None]:
    """The same thread count as in a worker process, hence the same bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _progress(jobs: Sequence[Job]) -> Iterator[Callable[[], None]]:
    """A bar over all rounds of all runs, read off their folders; nothing where there is no terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        total = progress.add_task("rounds", total=sum(spec.config.rounds for _, spec, _ in jobs))

        def update() -> None:
            if not progress.disable:
                progress.update(total, completed=sum(RunFolder(path).rounds for path, _, _ in jobs))

        yield update


@contextmanager
def _held(folder: Path) -> Iterator[Path]:
    """Holds an experiment's folder for this process alone, and gives one for what arms share while it is played.

    What is shared goes when the block is left, and an experiment that was refused leaves nothing behind.
    """
    new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("w")
    except OSError as reason:
        raise InvalidArgument(f"{folder} cannot be written ({reason.strerror}); choose another") from reason
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system lets go of it, however the process ends
        except OSError as reason:
            raise InvalidArgument(f"another process plays {folder}; wait for it, or choose another") from reason
        shared = folder / SHARED
        shared.mkdir(exist_ok=True)
        try:
            yield shared
        finally:
            shutil.rmtree(shared, ignore_errors=True)
            if new and {path.name for path in folder.iterdir()} == {LOCK}:
                shutil.rmtree(folder)


def _index(experiment: Experiment, folder: Path, seeds: Sequence[int]) -> ExperimentIndex:
    """What `experiment.json` will hold; the day of the first call stays."""
    written = (folder / INDEX).exists()
    return ExperimentIndex(
        name=experiment.name,
        question=experiment.question,
        command=shlex.join([Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]]),
        created=ExperimentIndex.read(folder).created if written else f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        arms=tuple(IndexedArm(spec.name, spec.title, spec.group) for spec in experiment.arms),
        seeds=tuple(seeds),
        notes=experiment.notes,
    )
