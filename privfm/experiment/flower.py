"""Runs on Flower, with every process on this machine: started, watched and ended here."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final

from privfm.checks import FlowerFailed, first_line, require
from privfm.contracts import SERVER
from privfm.defenses.channels.identity_files import make_secrets
from privfm.engines.flower.app import Place, write_app
from privfm.engines.flower.node import hosted_here
from privfm.engines.flower.settings import FlowerSettings
from privfm.experiment.config import ArmSpec, RunConfig, resolved
from privfm.experiment.run import deal, prepare
from privfm.federation import Arm, Federation
from privfm.reporting import RunFolder

if TYPE_CHECKING:
    from privfm.engines.flower.launch import Session

Job = tuple[Path, ArmSpec, int]
"""Folder of a run, what is played, and its seed."""

_LONGEST: Final = 30 * 24 * 3600.0  # seconds: a month; who wants to end a run earlier has Ctrl-C, and it goes on later
APP: Final = "privfm-run"
"""Name of the app that Flower is given."""


def play_on_flower(jobs: Sequence[Job], shared: Path, update: Callable[[], None]) -> None:
    """Plays runs one after the other, those of the same settings and number of hosts in one session of Flower.

    Whatever ends this function, no process of Flower is left. A client stays on its host when a run goes on later, and
    with it what it remembers between rounds: so the number of a run's hosts must not depend on the other runs.

    Args:
      jobs: what is not finished yet.
      shared: folder of what all runs share.
      update: called after every run.

    Raises:
      InvalidArgument: Flower is not installed, or a run cannot be played on hosts that are this machine.
      FlowerFailed: it did not start, or a run did not end well; the logs of all its processes lie beside the run.
    """
    refuse_jobs(jobs)
    sessions: dict[tuple[FlowerSettings, int], list[Job]] = {}
    for job in jobs:
        _, spec, seed = job
        hosts = hosts_of(spec.config, prepare(spec.config, seed, shared).arm)
        sessions.setdefault((spec.config.flower, hosts), []).append(job)
    for (settings, hosts), own in sessions.items():
        _play_session(own, settings, hosts, shared, update)


def refuse_jobs(jobs: Sequence[Job]) -> None:
    """Raises `InvalidArgument` where something is missing that Flower's processes need; nothing is started.

    | what | why |
    |---|---|
    | Flower is not installed, or not on this system | there is nothing to start |
    | `flower.clients` | hosts that are this machine all read the same data, those of the server |
    | classes of the script that was started, or of one of its functions | no other process can import them |
    """
    from privfm.engines.flower.surroundings import programs

    for _, spec, _ in jobs:
        config = spec.config
        require(
            config.flower.clients == 0,
            f"flower.clients={config.flower.clients}: hosts on this machine have no data of their own, and their "
            "clients would train on the rows that the server evaluates on; leave it out, or use privfm flower-app",
        )
        strange = [name for name in _classes(resolved(config)) if name.startswith("__main__.") or "<" in name]
        require(
            not strange,
            f"{', '.join(strange)}: hosts are processes of their own and cannot import it; put it at the top level of "
            "a module, a file of its own in this folder",
        )
        programs(config.flower.mode == "simulation")


def _classes(record: Any) -> Iterator[str]:
    """Names of somebody's own classes and functions in a resolved configuration."""
    if isinstance(record, dict):
        for name, value in record.items():
            if name in ("class_path", "function") and isinstance(value, str):
                yield value
            yield from _classes(value)
    elif isinstance(record, list):
        for value in record:
            yield from _classes(value)


def _play_session(
    jobs: Sequence[Job], settings: FlowerSettings, hosts: int, shared: Path, update: Callable[[], None]
) -> None:
    with TemporaryDirectory(prefix="privfm-flower-") as name:
        folder, number = Path(name), 0
        try:
            with open_session(folder / "session", settings, hosts) as session:
                for number, job in enumerate(jobs):
                    play_in(session, folder / f"job-{number}", job, hosts, shared)
                    update()
        except FlowerFailed as reason:
            kept = _logs(folder / "session", jobs[number][0])
            raise FlowerFailed(f"{first_line(reason)}; the logs of server and hosts are in {kept}") from reason


def _logs(session: Path, run: Path) -> Path:
    """Copies a session's logs into a folder beside the run, in place of earlier ones: the session's own goes."""
    kept = run.with_name(f"{run.name}.logs")
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir(mode=0o700, parents=True)  # an exception's text may hold what is in a client's data
    for log in (*session.glob("*.log"), *session.glob("home/privfm/*.log")):  # the second: of persistent workers
        shutil.copy(log, kept)
    return kept


def hosts_of(config: RunConfig, arm: Arm) -> int:
    """How many there are: those that clients are dealt out to, and the key holder's where there is one."""
    return config.flower.hosts + bool(arm.wire.key_holder_stages)


def open_session(folder: Path, settings: FlowerSettings, hosts: int) -> Session:
    """Flower on this machine, for runs on so many hosts; to be entered.

    Raises:
      InvalidArgument: Flower is not installed.
    """
    from privfm.engines.flower.launch import NodeSpec, Session

    if settings.mode == "simulation":
        return Session.simulation(folder, hosts, settings.threads)
    worker = sys.platform == "linux"
    nodes = [{"partition-id": place, "num-partitions": hosts, "persistent-worker": worker} for place in range(hosts)]
    return Session.deployment(folder, [NodeSpec(node) for node in nodes])


def play_in(session: Session, folder: Path, job: Job, hosts: int, shared: Path) -> None:
    """Plays one run in an open session, with fresh identities for everybody.

    Args:
      session: open.
      folder: a new one, for the app and the secrets.
      job: what is played.
      hosts: of the session.
      shared: folder of what all runs share.

    Raises:
      FlowerFailed: the run did not end well.
    """
    path, spec, seed = job
    federation = prepare(spec.config, seed, shared)
    place = Place(str(path.absolute()), seed, "", str(folder / "secrets"), str(shared.absolute()))
    public = _make_all_secrets(place, federation, hosts)
    app = write_app(folder / "app", APP, record_of(spec, seed, Path.cwd()), public, place)
    session.run(app, {"seed": seed}, _LONGEST)
    require(RunFolder(path).finished, f"{path}: Flower says that the run has ended, and it has not")


def record_of(spec: ArmSpec, seed: int, folder: Path | None = None) -> dict[str, Any]:
    """What an app's `run.json` holds.

    Args:
      spec: what is played.
      seed: root of the seed tree.
      folder: from which the user's own classes are imported, where hosts are this machine.
    """
    record = {"name": spec.name, "title": spec.title, "group": spec.group, "kind": spec.kind}
    elsewhere = spec.config.clients_elsewhere > 0
    names = deal(spec.config, seed).table.label_names if elsewhere else ()
    where = "" if folder is None else str(folder)
    return {**record, "config": resolved(spec.config, in_full=True), "folder": where, "label_names": list(names)}


def _make_all_secrets(place: Place, federation: Federation, hosts: int) -> dict[int, bytes]:
    """Fresh identities of everybody, a file a host; returns the public halves."""
    Path(place.loopback).mkdir(mode=0o700, parents=True)
    public = make_secrets(place.secrets_of("server"), [SERVER])
    for number in range(hosts):
        public |= make_secrets(place.secrets_of(number), hosted_here(number, hosts, federation.arm, federation.parties))
    return public
