"""Flower without Flower's processes: real messages, a grid in this process, and a federation of toys to play on it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any, final
from warnings import catch_warnings, simplefilter

import pytest
import torch
from torch import Generator, Tensor

from privfm.adapters import AdapterLayout
from privfm.contracts import (
    SERVER,
    Encoded,
    Examples,
    GradientPrivacy,
    Identity,
    Learner,
    Metric,
    Party,
    Split,
    State,
    Trained,
)
from privfm.contracts import Transform as Step
from privfm.defenses.channels.identities import new_identity, public_identity
from privfm.engines import Local
from privfm.engines.flower.node import Keys, Node, hosted_here, parties_of
from privfm.engines.flower.settings import FlowerSettings
from privfm.engines.flower.store import NodeStore
from privfm.federation import Arm, Federation, FixedSize, Population, RunState, rounds
from privfm.randomness import Seeds

with catch_warnings():  # Flower's own libraries warn of each other while they are imported
    simplefilter("ignore", DeprecationWarning)
    from flwr.app import Context, Error, Message, RecordDict
    from flwr.supercore.task_identity import TaskIdentity

    from privfm.engines.flower.client import client_app
    from privfm.engines.flower.engine import Flower
    from privfm.engines.flower.records import content_of, record_of

CLIENTS, D = 12, 24
FIRST_NODE = 100


@dataclass
class LocalGrid:
    """A grid whose nodes answer in this process, when they are asked for their replies.

    It knows what goes wrong on Flower. As in its simulation, an app that raises becomes an error reply that carries its
    message, and the state of the node is left as it was.

    Attributes:
      apps: a node -> its client app.
      configs: a node -> its node configuration.
      run: the app's configuration.
      dead: nodes that never answer and are no longer listed.
      unreachable: nodes that are listed, but to which nothing can be sent.
      order: which of the replies that are there come at one look, and in which order; the others wait.
      tell: `tell(node, kind, request)` gives the request that the node gets in its place.
      meddle: `meddle(node, kind, request, reply)` gives the reply that the server gets in its place; None: none ever
        comes; what it raises becomes an error reply.
      sent: everything that the server, or who sits between, has seen: requests and replies, as bytes.
      replies: those of `sent` that nodes have sent.
      asked: `(node, message type, group)` of every message that arrived.
    """

    apps: dict[int, Any]
    configs: dict[int, dict[str, Any]]
    run: dict[str, Any] = field(default_factory=dict)
    dead: set[int] = field(default_factory=set)
    unreachable: set[int] = field(default_factory=set)
    order: Callable[[list[Any]], list[Any]] = list
    tell: Callable[[int, str, bytes], bytes] = lambda node, kind, request: request
    meddle: Callable[[int, str, bytes, bytes], bytes | None] = lambda node, kind, request, reply: reply
    sent: list[bytes] = field(default_factory=list)
    replies: list[bytes] = field(default_factory=list)
    asked: list[tuple[int, str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.contexts: dict[int, Any] = {}
        self.waiting: dict[str, Any] = {}
        self.ready: dict[str, Any] = {}
        self.pushed = 0
        for node, app in list(self.apps.items()):
            self.join(node, app, self.configs[node])

    def join(self, node: int, app: Any, config: dict[str, Any]) -> None:
        """A SuperNode that has just started: it remembers nothing."""
        self.apps[node], self.configs[node] = app, config
        self.contexts[node] = Context(1, node, config, RecordDict(), self.run)

    def memory(self, node: int) -> bytes:
        """What a node remembers of the present round."""
        own = self.contexts[node].state.config_records.get("privfm.memory")
        return b"" if own is None else bytes(own["bytes"])

    def get_node_ids(self) -> list[int]:
        return [node for node in self.apps if node not in self.dead]

    def push_messages(self, messages: Iterable[Any]) -> list[str | None]:
        ids: list[str | None] = []
        for message in messages:
            self.pushed += 1
            name = f"message-{self.pushed}"
            message.metadata.__dict__["_message_id"] = name
            if message.metadata.dst_node_id in self.unreachable:
                ids.append("")
                continue
            self.waiting[name] = message
            ids.append(name)
        return ids

    def pull_messages(self, ids: Iterable[str]) -> list[Any]:
        ids = list(ids)
        for name in ids:
            message = self.waiting.get(name)
            if message is not None and message.metadata.dst_node_id not in self.dead:
                del self.waiting[name]
                reply = self._reply(message)
                self.ready |= {} if reply is None else {name: reply}
        came = self.order([self.ready[name] for name in ids if name in self.ready])
        for reply in came:
            del self.ready[reply.metadata.reply_to_message_id]
        return came

    def _reply(self, message: Any) -> Any:
        node, kind = message.metadata.dst_node_id, message.metadata.message_type
        request = self.tell(node, kind, content_of(message) or b"")
        message.content = record_of(request)
        self.asked.append((node, kind, message.metadata.group_id))
        self.sent.append(request)
        context = self.contexts[node]
        before = context.state.copy()
        try:
            content = self.meddle(node, kind, request, content_of(self.apps[node](message, context)) or b"")
        except Exception as reason:
            context.state = before
            told = f"{type(reason)}:<'{reason}'>"  # as Flower does
            self._note(told.encode())
            return Message(Error(getattr(reason, "code", 2), told), reply_to=message)
        if content is None:
            return None
        self._note(content)
        return Message(record_of(content), reply_to=message)

    def _note(self, content: bytes) -> None:
        self.sent.append(content)
        self.replies.append(content)


@pytest.fixture
def grid_of() -> type[LocalGrid]:
    return LocalGrid


@pytest.fixture(autouse=True)
def _task(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who this process is, without which Flower lets nobody write a message."""
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


# A federation of toys


@final
class Regression(Learner):
    """A pass of least squares over a client's examples, in the client's own order; raises for clients in `fails`."""

    def __init__(self, fails: frozenset[int] = frozenset(), adapters: AdapterLayout | None = None) -> None:
        self.fails, self.layout = fails, adapters

    @property
    def d(self) -> int:
        return D

    @property
    def adapters(self) -> AdapterLayout | None:
        return self.layout

    def initial(self) -> Tensor:
        return torch.linspace(-1.0, 1.0, D)

    def train(
        self,
        model: Tensor,
        batch: Sequence[Examples],
        generators: Sequence[Generator],
        privacy: GradientPrivacy | None = None,
        active: Tensor | None = None,
    ) -> Trained:
        rows, failed = [], {}
        for place, (examples, generator) in enumerate(zip(batch, generators, strict=True)):
            if int(examples.inputs["client"][0]) in self.fails:
                failed[place] = "ValueError: the private reason"
            w = model.clone()
            for k in torch.randperm(len(examples), generator=generator).tolist():
                x, y = examples.inputs["x"][k], examples.labels[k]
                w = w - 0.02 * (x @ w - y) * x
            rows.append(w - model)
        found = torch.stack(rows)
        return Trained(found if active is None else found.masked_fill(~active, 0.0), failed)

    def evaluate(self, model: Tensor, split: Split) -> dict[str, Metric]:
        return {"first": Metric(float(model[0]), 1, True, "share")}


@final
@dataclass(frozen=True)
class LargestWithMemory(Step):
    """A codec's client half: sends the k largest entries of the row and what was left out before, and remembers the
    rest (error feedback)."""

    k: int
    similarity = 1.0

    def init(self, d: int) -> State:
        return {"left_out": torch.zeros(d)}

    def encode(self, rows: Tensor, state: State, generators: Sequence[Generator]) -> tuple[Encoded, State]:
        wanted = rows + state["left_out"]
        at = wanted.abs().topk(self.k, dim=1).indices
        sent = torch.zeros_like(wanted).scatter_(1, at, wanted.gather(1, at))
        return Encoded(sent, {}), {"left_out": wanted - sent}


@final
@dataclass(frozen=True)
class Sparse(Step):
    """Its other half, a codec with side information: values, and where they stand."""

    k: int
    binding = True

    def width(self, d: int) -> int:
        return self.k

    def encode(self, rows: Tensor, state: State, generators: Sequence[Generator]) -> tuple[Encoded, State]:
        at = rows.abs().topk(self.k, dim=1).indices
        return Encoded(rows.gather(1, at), {"at": at}), state

    def decode(self, encoded: Encoded, d: int) -> Tensor:
        return torch.zeros(len(encoded.rows), d).scatter_(1, encoded.side["at"], encoded.rows)


@pytest.fixture
def steps() -> SimpleNamespace:
    """Classes of toys: tests in importlib mode cannot import each other."""
    return SimpleNamespace(LargestWithMemory=LargestWithMemory, Sparse=Sparse)


def _examples(client: int) -> Examples:
    """Client i's own 2 to 4 examples."""
    draw, n = Generator().manual_seed(1000 + client), 2 + client % 3
    inputs = {"x": torch.randn(n, D, generator=draw), "client": torch.full((n,), client)}
    return Examples(inputs, torch.randint(0, 3, (n,), generator=draw))


def _federation(
    engine: Any,
    *,
    fails: frozenset[int] = frozenset(),
    strict: bool = False,
    seed: int = 1,
    adapters: AdapterLayout | None = None,
    layout: AdapterLayout | None = None,
    **arm: Any,
) -> Federation:
    if arm.get("plan") is None:
        arm.setdefault("cohort", FixedSize(8))
    return Federation(
        Arm(**arm), Regression(fails, layout), Population(CLIENTS, _examples), Seeds(seed), engine, strict
    )


@pytest.fixture
def local() -> Callable[..., Federation]:
    """`local(rule=..., channel=..., fails=..., strict=...)`: everybody in this process, one client at a time."""
    return lambda engine=None, **setting: _federation(engine or Local(1), **setting)


@pytest.fixture
def played() -> Callable[..., RunState]:
    """`played(federation, until, state)`: the state after so many rounds; `played.records` says what happened."""

    def play(federation: Federation, until: int = 3, state: RunState | None = None) -> RunState:
        play.records = []  # type: ignore[attr-defined]
        for step in rounds(federation, until, state):
            play.records.append(step.record)  # type: ignore[attr-defined]
            state = step.state
        assert state is not None
        return state

    return play


@pytest.fixture
def sha() -> Callable[[RunState], str]:
    """Of everything that server and clients agree on after a round."""

    def of(state: RunState) -> str:
        parts = {"model": state.model, **state.rule, **state.optimizer, **state.audit}
        return sha256(b"".join(name.encode() + parts[name].numpy().tobytes() for name in sorted(parts))).hexdigest()

    return of


def _server(own: Identity, public: Mapping[int, bytes], now: int) -> Party:
    return Party(SERVER, now, own, public.__getitem__)


@dataclass
class Cluster:
    """The same federation on hosts of their own, as the server sees it.

    Attributes:
      grid: between server and hosts.
      engine: the server's.
      federation: the server's.
      hosts: what `flower_entry` makes of an app's folder, here made by hand; by number.
      secrets: everybody's identity, as bytes.
      store: folder of all hosts' stores.
    """

    grid: LocalGrid
    engine: Flower
    federation: Federation
    hosts: list[Any]
    secrets: dict[int, bytes]
    store: Path
    app: Any

    def node(self, number: int) -> int:
        """Flower's number of a host."""
        return FIRST_NODE + number

    def node_of(self, party: int) -> int:
        """Where a party is."""
        (number,) = (k for k, host in enumerate(self.hosts) if party in host.parties)
        return self.node(number)

    def back(self, number: int, node: int) -> None:
        """Host `number` was started again, as another node."""
        self.grid.join(node, self.app, {"partition-id": number, "num-partitions": len(self.hosts)})


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Cluster]:
    """`cluster(hosts=2, store=..., keep=2, settings=..., rounds=None, **setting)`: a key holder has one host more."""
    from privfm.cli import flower_entry

    made: dict[str, list[Any]] = {}
    monkeypatch.setattr(flower_entry, "_host", lambda folder, run, node: made[folder][dict(node)["partition-id"]])

    def make(
        hosts: int = 2,
        store: Path | None = None,
        keep: int = 2,
        settings: FlowerSettings | None = None,
        rounds: int | None = None,
        **setting: Any,
    ) -> Cluster:
        name = f"cluster-{len(made)}"
        store = tmp_path / name if store is None else store
        first = _federation(None, **setting)
        parties = parties_of(first.arm, first.parties)
        hosts += parties[-1] < 0
        identities = {party: new_identity() for party in (SERVER, *parties)}
        public = {party: public_identity(identity) for party, identity in identities.items()}
        made[name] = []
        for number in range(hosts):
            own = hosted_here(number, hosts, first.arm, first.parties)
            keys = Keys({party: identities[party] for party in own}, public.__getitem__)
            node = Node(_federation(None, **setting), keys, NodeStore(store / str(number), keep), rounds=rounds)
            made[name].append(SimpleNamespace(parties=own, node=node))
        app = client_app(Path(name))
        nodes = [FIRST_NODE + number for number in range(hosts)]
        configs = {FIRST_NODE + k: {"partition-id": k, "num-partitions": hosts} for k in range(hosts)}
        grid = LocalGrid(dict.fromkeys(nodes, app), configs)
        settings = settings or FlowerSettings(start_seconds=0.5, stage_seconds=60.0)
        server = partial(_server, identities[SERVER], public)
        engine = Flower(grid, server, settings, first.strict)  # type: ignore[arg-type]
        engine.meet(parties)
        secrets = {party: identity.secret for party, identity in identities.items()}
        return Cluster(grid, engine, _federation(engine, **setting), made[name], secrets, store, app)

    return make
