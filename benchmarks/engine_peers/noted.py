"""Our app with clocks around it: where in a message's way the seconds go. Imports nothing that the app itself does not.

Every line of `OUT` is `[name, node, message, seconds since the epoch]`: the clocks of one machine.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from flwr.app import Context, Message
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid

OUT: Final = "messages.jsonl"

SERVER: Final = '''\
"""The server's half, noted."""

from pathlib import Path

from flwr.serverapp import ServerApp

from benchmarks.engine_peers.noted import Noted
from privfm.cli.flower_entry import server_app

_inner = server_app(Path(__file__).parent)
app = ServerApp()


@app.main()
def main(grid, context):
    _inner(Noted(grid, Path({out!r})), context)
'''

CLIENT: Final = '''\
"""A client's half, noted."""

import time

began = time.time()

from pathlib import Path

from privfm.engines.flower.client import client_app

loaded = time.time()

from benchmarks.engine_peers import noted

app = noted.client(client_app(Path(__file__).parent), Path({out!r}), began, loaded - began)
'''


class Noted:
    """A grid that notes when messages go and come."""

    def __init__(self, grid: Grid, out: Path) -> None:
        self._grid, self._out = grid, out

    def get_node_ids(self) -> Iterable[int]:
        """As it is."""
        return self._grid.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """As it is, with the clock read before and behind."""
        messages = list(messages)
        began = time.time()
        names = list(self._grid.push_messages(messages))
        for message, name in zip(messages, names, strict=True):
            note(self._out, "push", message.metadata.dst_node_id, name, began)
            note(self._out, "pushed", message.metadata.dst_node_id, name, time.time())
        return names

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """As it is, with the clock read behind."""
        came = list(self._grid.pull_messages(message_ids))
        for message in came:
            note(self._out, "came", message.metadata.src_node_id, message.metadata.reply_to_message_id, time.time())
        return came


def client(app: ClientApp, out: Path, began: float, imported: float) -> ClientApp:
    """The ClientApp, with the clock read around every message.

    Args:
      app: ours.
      out: file of the notes.
      began: when this process began to load the app: Flower itself was loaded then.
      imported: seconds that loading ours took.
    """
    from flwr.clientapp import ClientApp

    found = ClientApp()

    @found.query()
    @found.train()
    def noted(message: Message, context: Context) -> Message:
        entered = time.time()
        reply: Message = app(message, context)
        left, name = time.time(), message.metadata.message_id
        marks = {"process": process_start(), "app": began, "loaded": began + imported, "entered": entered, "left": left}
        for mark, when in marks.items():
            note(out, mark, context.node_id, name, when)
        return reply

    return found


def process_start() -> float:
    """When this process was started, to a hundredth of a second."""
    started = int(Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19])
    uptime = float(Path("/proc/uptime").read_text(encoding="utf-8").split()[0])
    return time.time() - (uptime - started / os.sysconf("SC_CLK_TCK"))


def note(out: Path, name: str, node: int, message: str, when: float) -> None:
    """Appends a line, whole."""
    with out.open("a", encoding="utf-8") as file:
        file.write(json.dumps([name, node, message, when]) + "\n")
