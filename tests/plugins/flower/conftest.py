"""A Flower grid in this process: real client apps, messages and contexts, and nodes that misbehave on demand."""

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import pytest

with warnings.catch_warnings():  # typer asks click for names that click is to drop; nothing of ours
    warnings.filterwarnings("ignore", "'click.utils", DeprecationWarning)
    from flwr.common.serde import recorddict_from_proto, recorddict_to_proto

from flwr.app import Array, ArrayRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

TWO_TO_63 = 2**63  # node ids use all 64 bits


@dataclass
class LocalGrid(Grid):
    """Runs a client app for every message and keeps what goes over the wire, as bytes.

    Attributes:
      apps: node -> its app.
      contexts: node -> what Flower keeps there.
      tamper: what the network makes of the replies to one push: it may drop, repeat, reorder or change them.
      sent: content of every reply, as the server gets it.
    """

    apps: dict[int, ClientApp]
    contexts: dict[int, Context]
    tamper: Callable[[list[Message]], list[Message]] = lambda replies: replies
    sent: list[bytes] = field(default_factory=list)
    asked: list[tuple[int, RecordDict]] = field(default_factory=list)
    _waiting: dict[str, list[Message]] = field(default_factory=dict)
    _count: int = 0

    def get_node_ids(self) -> Iterable[int]:
        return set(self.apps)  # as Flower: without an order

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        names, replies = [], []
        for message in messages:
            self._count += 1
            message.metadata.__dict__["_message_id"] = f"message-{self._count}"
            names.append(message.metadata.message_id)
            replies.append(self._answered(message))
        for reply in self.tamper(replies) if replies else []:
            self._waiting.setdefault(reply.metadata.reply_to_message_id, []).append(reply)
        return names

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        here = [name for name in self._waiting if name in set(message_ids)]  # as they came
        return [reply for name in here for reply in self._waiting.pop(name)]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        return self.pull_messages(self.push_messages(messages))

    def set_run(self, run):
        raise NotImplementedError

    @property
    def run(self):
        raise NotImplementedError

    def create_message(self, *args, **kwargs):
        raise NotImplementedError

    def _answered(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        own = Message(_over_the_wire(message.content), node, message.metadata.message_type)
        own.metadata.__dict__["_message_id"] = message.metadata.message_id
        self.asked.append((node, _over_the_wire(message.content)))
        try:
            reply = self.apps[node](own, self.contexts[node])
        except Exception as error:  # as Flower's runtime does
            return Message(Error(2, str(error)), reply_to=message)
        if reply.has_error():
            return Message(reply.error, reply_to=message)
        self.sent.append(recorddict_to_proto(reply.content).SerializeToString())
        return Message(_over_the_wire(reply.content), reply_to=message)


def _over_the_wire(content: RecordDict) -> RecordDict:
    return recorddict_from_proto(recorddict_to_proto(content))


@pytest.fixture(autouse=True)
def _task(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that Flower has started knows its run."""
    for name, number in (("_task_id", 1), ("_run_id", 7), ("_node_id", 1)):
        monkeypatch.setattr(TaskIdentity, name, number)


@pytest.fixture
def record() -> Callable[..., ArrayRecord]:
    """Arrays by name -> a record, in this order."""

    def made(**arrays) -> ArrayRecord:
        return ArrayRecord({name: Array(np.asarray(value)) for name, value in arrays.items()})

    return made


@pytest.fixture
def grid_of() -> Callable[..., LocalGrid]:
    """Client apps -> a grid; app i runs on the node with partition-id i, which has the i-th smallest id."""

    def made(apps: Iterable[ClientApp], **node_config) -> LocalGrid:
        apps = list(apps)
        nodes = [TWO_TO_63 + 7919 * place for place in range(len(apps))]
        contexts = {
            node: Context(7, node, {"partition-id": place, **node_config}, RecordDict(), {})
            for place, node in enumerate(nodes)
        }
        return LocalGrid(dict(zip(nodes, apps, strict=True)), contexts)

    return made


@pytest.fixture
def app_that() -> Callable[..., ClientApp]:
    """What a client makes of the model `(state, round, number) -> state` -> its app, with metrics of its own choice.

    Metrics and examples may be functions of the number, too.
    """

    def made(train, mods=(), metrics=None, examples=10, name="arrays") -> ClientApp:
        app = ClientApp()

        @app.train(mods=list(mods))
        def _train(message: Message, context: Context) -> Message:
            number = int(context.node_config["partition-id"])
            state = {key: array.numpy() for key, array in message.content["arrays"].items()}
            after = train(state, int(message.content["config"]["server-round"]), number)
            told = {"num-examples": examples, "loss": 1.0 + number} if metrics is None else metrics
            content = {name: ArrayRecord({key: Array(np.asarray(value)) for key, value in after.items()})}
            return Message(RecordDict({**content, "metrics": MetricRecord(told)}), reply_to=message)

        @app.evaluate()
        def _evaluate(message: Message, context: Context) -> Message:
            told = {"num-examples": examples, "accuracy": 0.5} if metrics is None else metrics
            return Message(RecordDict({"metrics": MetricRecord(told)}), reply_to=message)

        return app

    return made


@pytest.fixture
def adds(app_that) -> Callable[..., ClientApp]:
    """An app whose training adds `value` to every float entry."""

    def made(value, **kwargs) -> ClientApp:
        def train(state, now, number):
            return {
                key: (each + value).astype(each.dtype) if each.dtype.kind == "f" else each
                for key, each in state.items()
            }

        return app_that(train, **kwargs)

    return made
