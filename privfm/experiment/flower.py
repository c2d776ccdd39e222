"""Runs on Flower, with every process on this machine: started, watched and ended here."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final

from privfm.checks import require
from privfm.contracts import SERVER
from privfm.engines.flower.app import Place, write_app
from privfm.engines.flower.identities import make_secrets
from privfm.engines.flower.node import hosted_here
from privfm.engines.flower.settings import FlowerSettings
from privfm.experiment.config import ArmSpec, resolved
from privfm.experiment.run import deal, prepare
from privfm.federation import Federation
from privfm.reporting import RunFolder

if TYPE_CHECKING:
    from privfm.engines.flower.launch import NodeSpec, Session

Job = tuple[Path, ArmSpec, int]
"""Folder of a run, what is played, and its seed."""

_LONGEST: Final = 30 * 24 * 3600.0  # seconds: a month; who wants to end a run earlier has Ctrl-C, and it goes on later
_APP: Final = "privfm-run"


def play_on_flower(jobs: Sequence[Job], shared: Path, update: Callable[[], None]) -> None:
    """Plays runs one after the other, those of the same settings in one session of Flower.

    Whatever ends this function, no process of Flower is left.

    Args:
      jobs: what is not finished yet.
      shared: folder of what all runs share.
      update: called after every run.

    Raises:
      InvalidArgument: Flower is not installed.
      FlowerFailed: it did not start, or a run did not end well.
    """
    for settings in dict.fromkeys(spec.config.flower for _, spec, _ in jobs):
        _play_session([job for job in jobs if job[1].config.flower == settings], settings, shared, update)


def _play_session(jobs: Sequence[Job], settings: FlowerSettings, shared: Path, update: Callable[[], None]) -> None:
    federations = [prepare(spec.config, seed, shared) for _, spec, seed in jobs]
    nodes = settings.hosts + any(bool(federation.arm.wire.key_holder_stages) for federation in federations)
    with TemporaryDirectory(prefix="privfm-flower-") as name:
        folder = Path(name)
        with _session(folder / "session", settings, nodes) as session:
            for number, ((path, spec, seed), federation) in enumerate(zip(jobs, federations, strict=True)):
                secrets, common = str(folder / f"secrets-{number}"), str(shared.absolute())
                place = Place(str(path.absolute()), seed, "", secrets, common)
                public = _make_all_secrets(place, federation, nodes)
                app = write_app(folder / f"app-{number}", _APP, record_of(spec, seed, Path.cwd()), public, place)
                session.run(app, {"seed": seed}, _LONGEST)
                require(RunFolder(path).finished, f"{path}: Flower says that the run has ended, and it has not")
                update()


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
    return {**record, "config": resolved(spec.config), "folder": where, "label_names": list(names)}


def _session(folder: Path, settings: FlowerSettings, nodes: int) -> Session:
    from privfm.engines.flower.launch import NodeSpec, Session

    if settings.mode == "simulation":
        return Session.simulation(folder, nodes, settings.threads)
    return Session.deployment(folder, [_node(place, nodes, NodeSpec) for place in range(nodes)])


def _node(place: int, nodes: int, kind: type[NodeSpec]) -> NodeSpec:
    return kind({"partition-id": place, "num-partitions": nodes, "persistent-worker": sys.platform == "linux"})


def _make_all_secrets(place: Place, federation: Federation, nodes: int) -> dict[int, bytes]:
    """Fresh identities of everybody, a file a host; returns the public halves."""
    Path(place.loopback).mkdir(mode=0o700)
    public = make_secrets(place.secrets_of("server"), [SERVER])
    for number in range(nodes):
        public |= make_secrets(place.secrets_of(number), hosted_here(number, nodes, federation.arm, federation.parties))
    return public
