"""What one message costs in Flower's deployment, hop by hop."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

from benchmarks.engine_peers.noted import CLIENT, OUT, SERVER
from benchmarks.engine_runs import on_flower
from privfm.engines.flower.app import MODULE
from privfm.engines.flower.launch import Session
from privfm.experiment import RunConfig

HOPS: Final = {
    "the server hands it to the SuperLink": ("push", "pushed"),
    "the SuperNode fetches it and starts a process": ("pushed", "process"),
    "the process loads Flower and receives it": ("process", "app"),
    "the process loads privfm's client": ("app", "loaded"),
    "Flower calls the app": ("loaded", "entered"),
    "the worker answers": ("entered", "left"),
    "the reply reaches the server": ("left", "came"),
    "all of it": ("push", "came"),
}
"""Hops by the two marks between which they lie. In a worker's first message it starts, and loads torch, model, data."""


@final
@dataclass(frozen=True)
class Hop:
    """One hop of one message.

    Attributes:
      name: of `HOPS`.
      first: whether the message was its node's first.
      seconds: it took.
    """

    name: str
    first: bool
    seconds: float


def messages(config: RunConfig, session: Session, hosts: int, folder: Path) -> list[Hop]:
    """Plays a run with clocks in the app's two entry files; nothing in the package is changed."""
    folder.mkdir(parents=True)
    out = folder / OUT

    def noted(app: Path) -> None:
        for name, text in {"server_app": SERVER, "client_app": CLIENT}.items():
            (app / MODULE / f"{name}.py").write_text(text.format(out=str(out)), encoding="utf-8")

    on_flower(config, session, hosts, folder / "flower", noted)
    return hops([json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()])


def hops(notes: Sequence[tuple[str, int, str, float]]) -> list[Hop]:
    """Hops from notes `[name, node, message, seconds]`; messages without an answer are left out."""
    marks: dict[str, dict[str, float]] = {}
    nodes: dict[int, str] = {}
    for name, node, message, when in sorted(notes, key=lambda note: note[3]):
        marks.setdefault(message, {})[name] = when
        nodes.setdefault(node, message)
    wanted = {mark for pair in HOPS.values() for mark in pair}
    first = set(nodes.values())
    return [
        Hop(name, message in first, own[end] - own[begin])
        for message, own in marks.items()
        if own.keys() >= wanted
        for name, (begin, end) in HOPS.items()
    ]
