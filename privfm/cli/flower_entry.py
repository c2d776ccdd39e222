"""What Flower calls: the server's half and a host's half of a run, each read from an app's folder."""

from __future__ import annotations

import hashlib
import os
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from functools import lru_cache, partial
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from privfm.checks import require
from privfm.cli.explain import public_classes
from privfm.cli.options import read_toml
from privfm.cli.run import recorded_config
from privfm.contracts import SERVER, Engine, Party
from privfm.defenses.channels.identity_files import Pinned, read_secrets
from privfm.engines.flower.app import PUBLIC, RUN, Place, read_record
from privfm.engines.flower.messages import Greeting, Request
from privfm.engines.flower.node import Keys, Node, hosted_here, parties_of
from privfm.engines.flower.store import NodeStore
from privfm.engines.flower.wire import packed, unpacked
from privfm.experiment.config import ArmSpec, RunConfig
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
    if record["folder"]:  # all hosts are this machine: files are named as seen from where the user is
        os.chdir(record["folder"])
        if record["folder"] not in sys.path:
            sys.path.append(record["folder"])  # for the user's own classes; behind everything installed
    return ArmSpec(record["name"], record["title"], record["group"], recorded_config(record["config"]), record["kind"])


def server_app(package: Path) -> ServerApp:
    """The ServerApp of an app's folder: plays the run, from its last checkpoint where there is one."""
    from flwr.serverapp import ServerApp

    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Any) -> None:
        place, spec = Place.of(context.run_config), spec_of(package)
        _require_own_seed(package, place)
        require(place.out != "", "out='': say where the run's record goes, --run-config 'out=\"/folder\"'")
        _one_thread_each(spec.config.flower.threads)
        shared = Path(place.shared) if place.shared else None
        with _short_command():
            play_run(Path(place.out), spec, place.seed, shared, partial(_engine, grid, package, place, spec))

    return app


@contextmanager
def _short_command() -> Iterator[None]:
    """Flower's token stands on this process's command line, which a run's record holds; so do ports, ever others."""
    given, sys.argv = sys.argv, sys.argv[:1]
    try:
        yield
    finally:
        sys.argv = given


def _engine(grid: Grid, package: Path, place: Place, spec: ArmSpec, federation: Federation) -> Engine:
    from privfm.engines.flower.engine import Flower

    settings = spec.config.flower
    own = read_secrets(Path(place.server_secrets) if place.server_secrets else place.secrets_of("server"))[SERVER]
    pinned = Pinned(package / PUBLIC)
    engine = Flower(grid, lambda now: Party(SERVER, now, own, pinned), settings, federation.strict)
    engine.meet(parties_of(federation.arm, federation.parties))
    return engine


def answer(payload: bytes) -> bytes:
    """`answered` for a worker in another process: bytes in, bytes out."""
    order, parts = unpacked(payload)
    with redirect_stderr(StringIO()) as noted:
        error, content, memory = answered(order, parts["content"], parts["memory"])
    return packed({"error": error, "notes": noted.getvalue()}, {"content": content, "memory": memory})


def answered(order: Mapping[str, Any], content: bytes, memory: bytes) -> tuple[str, bytes, bytes]:
    """A host's reply to one message, and what it must remember.

    Whatever goes wrong here stays here: the server learns that there is no answer, and this host's log says why.

    Args:
      order: what is asked (`what`), the app's folder on this host, its configuration (`run`), this node's (`node`).
      content: of the message.
      memory: as returned before; empty at first.

    Returns:
      What went wrong, as the server may hear it, or nothing; the reply; the memory.
    """
    try:
        host = _host(order["folder"], _key(order["run"]), _key(order["node"]))
        if order["what"] == "greet":
            return "", host.node.greeting(content).to_bytes(), memory
        reply, memory = host.node.answer(Request.from_bytes(content), memory)
        return "", reply.to_bytes(), memory
    except Exception as reason:
        sys.stderr.write(traceback.format_exc())
        if order["what"] == "greet":
            told = _told(reason, _is_loopback(order["run"].get("loopback"), order["node"]))
            return "", Greeting((), told).to_bytes(), memory
        return f"{type(reason).__name__}; the host's log says why", b"", memory


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
        _require_own_seed(package, place)
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
        paid = _paid_rounds(federation, config)
        store = NodeStore(_store_folder(package, place, own, counts=paid is not None), config.checkpoint_every + 1)
        self.node = Node(federation, keys, store, config.clients_per_batch, config.encryption_processes, rounds=paid)


def _require_own_seed(package: Path, place: Place) -> None:
    """A run of another seed is another run: who is malicious and hosted where, what a store holds, how often it counts.

    Raises:
      InvalidArgument: `flwr run --run-config` says another seed than the app.
    """
    own = Place.read(package.parent).seed
    require(place.seed == own, f"seed={place.seed}: this app plays seed {own}; write another with privfm flower-app")


def _paid_rounds(federation: Federation, config: RunConfig) -> int | None:
    """How often a client may train; None where no host needs to count.

    With seeded noise whoever asks again can draw it again, too, and an epsilon says so: a run that goes on from its
    checkpoint gives the same bits then, and nothing more is told.
    """
    plan = config.plan
    if plan is None or plan.place not in ("local", "distributed") or plan.source == "seeded":
        return None
    return plan.participations(affordable_rounds(config, accounted_facts(federation)))


def _store_folder(package: Path, place: Place, own: Mapping[str, Any], counts: bool) -> Path:
    """Where a host keeps what its clients remember: where its node was told, else beside the run, on this machine.

    Raises:
      InvalidArgument: it is to count there how often its clients train, and only the server has said where.
    """
    if "store" in own:
        return Path(own["store"], _digest(package, place))
    require(
        not counts or _is_loopback(place.loopback, own),
        "store: under this plan a host counts how often its clients have trained, in a folder that the server does "
        "not name; give --node-config 'store=\"/var/lib/privfm\"'",
    )
    return Path(place.out, "hosts", str(own["partition-id"]))


def _is_loopback(loopback: object, own: Mapping[str, Any]) -> bool:
    """Whether all hosts are this machine: the server may say so, but not to a node that was told of secrets itself."""
    return bool(loopback) and "secrets" not in own


def _digest(package: Path, place: Place) -> str:
    """Of what is played: a store that another run has used must not lend it its clients' states."""
    return hashlib.sha256((package / RUN).read_bytes() + str(place.seed).encode()).hexdigest()[:16]


@lru_cache(maxsize=64)  # hosts of a simulation take turns in one process
def _host(folder: str, run: tuple[tuple[str, Any], ...], node: tuple[tuple[str, Any], ...]) -> Host:
    _forget_other_runs(folder, run)
    return Host(Path(folder), Place.of(dict(run)), dict(node))


@lru_cache(maxsize=1)
def _forget_other_runs(folder: str, run: tuple[tuple[str, Any], ...]) -> None:
    """A worker that plays one run after the other would keep the models and data of all of them."""
    _host.cache_clear()


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
