"""The ClientApp: a thin process that hands every message to whatever holds model and data.

Flower starts a fresh process for every message. What is expensive (torch, model, data) is in a worker that outlives it,
and what a host must remember for a round is in the SuperNode's memory (`context.state`): neither is sent to anybody.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from flwr.app import ConfigRecord, Context, Message
from flwr.clientapp import ClientApp

from privfm.engines.flower.records import content_of, record_of
from privfm.engines.flower.wire import packed, unpacked

ENTRY: Final = "privfm.cli.flower_entry"
"""The module that plays a host, wherever it runs: `answered`, and `answer` from bytes to bytes."""

_MEMORY: Final = "privfm.memory"
"""Entry of the SuperNode's own state: what this host remembers of the present round."""


def client_app(folder: Path) -> ClientApp:
    """The ClientApp of an app folder.

    Args:
      folder: with the run's configuration and everybody's public identity, as installed on this host.
    """
    app = ClientApp()

    @app.query()
    def greet(message: Message, context: Context) -> Message:
        """Whom this host plays."""
        nonce = content_of(message)
        return Message(content=record_of(_ask(folder, "greet", nonce or b"", context)), reply_to=message)

    @app.train()
    def answer(message: Message, context: Context) -> Message:
        """One stage of one round."""
        content = content_of(message)
        return Message(content=record_of(_ask(folder, "answer", content or b"", context)), reply_to=message)

    return app


def _ask(folder: Path, what: str, content: bytes, context: Context) -> bytes:
    """The host's reply; its memory goes back into this node's state.

    Where there is no reply the memory stays as it was, and with it what was answered already: whoever could have it
    erased by a message that makes no sense could ask for everything once more. Flower itself keeps the state of an app
    that raised in a deployment, and not in the simulation.
    """
    own = context.state.config_records.get(_MEMORY)
    memory = own["bytes"] if own is not None else b""
    if not isinstance(memory, bytes):
        raise TypeError("the state of this node is not what privfm has written")
    node = dict(context.node_config)
    order = {"what": what, "folder": str(folder), "node": node, "run": dict(context.run_config)}
    try:
        error, reply, memory = _answered(order, content, memory, context)
    except Exception as reason:
        sys.stderr.write(f"privfm: {type(reason).__name__}: {reason}\n")
        # Flower sends the text of an exception to the server: it must hold nothing of this host.
        raise RuntimeError(f"{type(reason).__name__}; the host's log says why") from None
    if error:
        raise RuntimeError(error)
    context.state.config_records[_MEMORY] = ConfigRecord({"bytes": memory})
    return reply


def _answered(order: dict[str, Any], content: bytes, memory: bytes, context: Context) -> tuple[str, bytes, bytes]:
    """By a persistent worker on a SuperNode of its own; in the simulation this process is one already."""
    if not order["node"].get("persistent-worker", False):
        here: tuple[str, bytes, bytes] = import_module(ENTRY).answered(order, content, memory)
        return here
    from privfm.engines.flower import worker

    # One a run, as somebody's own classes may change from one run to the next; where one process plays them all, one.
    loopback = str(context.run_config.get("loopback", ""))
    key, owner = str(Path(loopback).parents[1]) if loopback else str(context.run_id), worker.supernode_pid()
    payload = packed(order, {"content": content, "memory": memory})
    head, parts = unpacked(worker.call(f"{ENTRY}:answer", key, payload, owner=owner))
    sys.stderr.write(str(head["notes"]))  # into this SuperNode's own log
    return str(head["error"]), parts["content"], parts["memory"]
