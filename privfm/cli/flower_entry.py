"""What Flower calls: the server's half and a host's half of a run, each read from an app's folder."""

from __future__ import annotations

import hashlib
import sys
import traceback
from collections.abc import Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from privfm.checks import require
from privfm.cli.explain import public_classes
from privfm.cli.options import read_toml
from privfm.cli.run import recorded_config
from privfm.contracts import SERVER, Engine, Party
from privfm.engines.flower.app import RUN, Place, read_record
from privfm.engines.flower.identities import PUBLIC, Pinned, read_secrets
from privfm.engines.flower.messages import Greeting, Request
from privfm.engines.flower.node import Keys, Node, hosted_here, parties_of
from privfm.engines.flower.store import NodeStore
from privfm.engines.flower.wire import packed, unpacked
from privfm.experiment.config import ArmSpec
from privfm.experiment.run import OwnData, accounted_facts, affordable_rounds, arm_of, play_run, prepare
from privfm.federation import Federation

if TYPE_CHECKING:
    from flwr.serverapp import Grid, ServerApp


def spec_of(package: Path, data: str = "") -> ArmSpec:
    """What an app's folder says is to be played.

    Args:
      package: inside the app's folder.
      data: TOML file with this host's own table `data`; empty: what the configuration says.
    """
    public_classes()
    record = read_record(package)
    if data:
        record["config"]["data"] = read_toml(data).get("data")
    if record["folder"] and record["folder"] not in sys.path:
        sys.path.append(record["folder"])  # for the user's own classes; behind everything installed, to hide nothing
    return ArmSpec(record["name"], record["title"], record["group"], recorded_config(record["config"]), record["kind"])


def server_app(package: Path) -> ServerApp:
    """The ServerApp of an app's folder: plays the run, from its last checkpoint where there is one."""
    from flwr.serverapp import ServerApp

    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Any) -> None:
        place, spec = Place.of(context.run_config), spec_of(package)
        require(place.out != "", "out='': say where the run's record goes, --run-config 'out=\"/folder\"'")
        _one_thread_each(spec.config.flower.threads)
        shared = Path(place.shared) if place.shared else None
        play_run(Path(place.out), spec, place.seed, shared, partial(_engine, grid, package, place, spec))

    return app


def _engine(grid: Grid, package: Path, place: Place, spec: ArmSpec, federation: Federation) -> Engine:
    from privfm.engines.flower.engine import Flower

    settings = spec.config.flower
    own = read_secrets(Path(place.server_secrets) if place.server_secrets else place.secrets_of("server"))[SERVER]
    pinned = Pinned(package / PUBLIC)
    engine = Flower(grid, lambda now: Party(SERVER, now, own, pinned), settings, federation.strict)
    engine.meet(parties_of(federation.arm, federation.parties))
    return engine


def answer(payload: bytes) -> bytes:
    """A host's reply to one message, and what it must remember.

    Whatever goes wrong here stays here: the server learns that there is no answer, and this host's log says why.
    """
    order, parts = unpacked(payload)
    content, memory = parts["content"], parts["memory"]
    try:
        host = _host(order["folder"], _key(order["run"]), _key(order["node"]))
        if order["what"] == "greet":
            return packed({}, {"content": Greeting(host.parties).to_bytes(), "memory": memory})
        reply, memory = host.node.answer(Request.from_bytes(content), memory)
        return packed({}, {"content": reply.to_bytes(), "memory": memory})
    except Exception as reason:
        sys.stderr.write(traceback.format_exc())
        if order["what"] == "greet":
            told = _told(reason, bool(order["run"].get("loopback")))
            return packed({}, {"content": Greeting((), told).to_bytes(), "memory": memory})
        return packed({"error": f"{type(reason).__name__}; the host's log says why"}, {"memory": memory})


def _told(reason: Exception, loopback: bool) -> str:
    """Why a host cannot take part: to others no more than the kind, as a message may hold what is in its files."""
    return f"{type(reason).__name__}: {reason}" if loopback else f"{type(reason).__name__}; its log says why"


@final
class Host:
    """What a worker keeps between messages.

    Attributes:
      parties: hosted here.
      node: plays them.
    """

    def __init__(self, package: Path, place: Place, own: Mapping[str, Any]) -> None:
        spec, record = spec_of(package, str(own.get("data", ""))), read_record(package)
        _one_thread_each(spec.config.flower.threads)
        config, number = spec.config, int(own["partition-id"])
        if config.clients_elsewhere:
            clients = config.clients_elsewhere
            arm = arm_of(config, clients, place.seed)
            self.parties = hosted_here(number, int(own["num-partitions"]), arm, clients)
            here = OwnData(tuple(party for party in self.parties if party >= 0), tuple(record["label_names"]))
            federation = prepare(config, place.seed, None, here)
        else:
            federation = _federation(package, place)
            self.parties = hosted_here(number, int(own["num-partitions"]), federation.arm, federation.parties)
        secrets = Path(own["secrets"]) if "secrets" in own else place.secrets_of(number)
        identities = read_secrets(secrets)
        missing = set(self.parties) - identities.keys()
        require(not missing, f"{secrets} holds no identity of parties {sorted(missing)[:5]}, which are hosted here")
        pinned = Pinned(Path(own["identities"]) if "identities" in own else package / PUBLIC)
        keys = Keys({party: identities[party] for party in self.parties}, pinned)
        folder = Path(place.out, "hosts", str(number))
        if "store" in own:
            folder = Path(own["store"], _digest(package, place))
        store = NodeStore(folder, config.checkpoint_every + 1)
        together, processes = config.clients_per_batch, config.encryption_processes
        rounds = affordable_rounds(config, accounted_facts(federation))
        self.node = Node(federation, keys, store, together, processes, rounds=rounds)


def _digest(package: Path, place: Place) -> str:
    """Of what is played: a store that another run has used must not lend it its clients' states."""
    return hashlib.sha256((package / RUN).read_bytes() + str(place.seed).encode()).hexdigest()[:16]


@lru_cache(maxsize=64)  # hosts of a simulation take turns in one process
def _host(folder: str, run: tuple[tuple[str, Any], ...], node: tuple[tuple[str, Any], ...]) -> Host:
    return Host(Path(folder), Place.of(dict(run)), dict(node))


@lru_cache(maxsize=1)
def _federation(package: Path, place: Place) -> Federation:
    """The run as this host knows it; the data of clients that are hosted elsewhere are never asked for."""
    shared = Path(place.shared) if place.shared else None
    return prepare(spec_of(package).config, place.seed, shared)


def _key(values: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(values.items()))


def _one_thread_each(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
