"""Flower's messages without Flower's processes: a grid whose nodes are client apps in this process."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest


@dataclass
class LocalGrid:
    """Nodes that answer at once, when they are asked for their replies; knobs for everything that goes wrong.

    Attributes:
      apps: a node -> its client app.
      configs: a node -> its node configuration.
      run: the app's configuration.
      dead: nodes that never answer and are no longer listed.
      order: in which replies of one look come.
      sent: everything that any server could have seen, as bytes.
    """

    apps: dict[int, Any]
    configs: dict[int, dict[str, Any]]
    run: dict[str, Any]
    dead: set[int] = field(default_factory=set)
    order: Callable[[list[Any]], list[Any]] = list
    sent: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        from flwr.app import Context, RecordDict

        self.contexts = {
            node: Context(run_id=1, node_id=node, node_config=config, state=RecordDict(), run_config=self.run)
            for node, config in self.configs.items()
        }
        self.waiting: dict[str, Any] = {}
        self.asked: list[tuple[int, str, str]] = []

    def get_node_ids(self) -> list[int]:
        return [node for node in self.apps if node not in self.dead]

    def push_messages(self, messages: Iterable[Any]) -> list[str]:
        ids = []
        for message in messages:
            name = f"message-{len(self.sent)}-{len(self.waiting)}"
            message.metadata.__dict__["_message_id"] = name
            self.waiting[name] = message
            ids.append(name)
        return ids

    def pull_messages(self, ids: Iterable[str]) -> list[Any]:
        from privfm.engines.flower.records import content_of

        replies = []
        for name in list(ids):
            message = self.waiting.get(name)
            node = None if message is None else message.metadata.dst_node_id
            if node is None or node in self.dead:
                continue
            del self.waiting[name]
            self.asked.append((node, message.metadata.message_type, message.metadata.group_id))
            self.sent.append(content_of(message) or b"")
            reply = self.apps[node](message, self.contexts[node])
            self.sent.append(content_of(reply) or b"")
            replies.append(reply)
        return self.order(replies)


@pytest.fixture
def grid_of() -> type[LocalGrid]:
    return LocalGrid
