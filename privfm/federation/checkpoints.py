"""Checkpoints: safetensors and JSON, no pickle; a kill at any moment leaves the last complete one.

A checkpoint is `checkpoint.json` and the files it names. The files are written first, under names of their own, then
`checkpoint.json` is replaced in one step; whatever it does not name is left over from an interrupted write and is
removed by the next save. There is no generator state to keep: seeds are named by their path.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from privfm.checks import BrokenCheckpoint
from privfm.contracts import State
from privfm.federation.client_states import Chunk, ClientStates
from privfm.federation.federation import RunState
from privfm.files import file_digest, read_json, write_json

FORMAT = 1
INDEX = "checkpoint.json"


def save(state: RunState, folder: Path) -> RunState:
    """Writes a checkpoint to `folder`.

    Returns:
      The same state, with client states that now rest on disk.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    clients = state.clients.written(folder, f"clients-{state.round:06d}")
    tensors: dict[str, Tensor] = {"model": state.model}
    tensors |= {f"rule/{name}": value for name, value in state.rule.items()}
    tensors |= {f"attack/{name}": value for name, value in state.attack.items()}
    tensors |= {f"joined/{name}": value for name, value in state.joined.items()}
    tensors |= {f"audit/{name}": value for name, value in state.audit.items()}
    tensors |= {f"optimizer/{name}": value for name, value in state.optimizer.items()}
    path = folder / f"state-{state.round:06d}.safetensors"
    part = path.with_suffix(".part")
    save_file({name: value.contiguous() for name, value in tensors.items()}, part)
    part.replace(path)

    index = {
        "format": FORMAT,
        "round": state.round,
        "skipped": state.skipped,
        "state": path.name,
        "sha256": {path.name: file_digest(path)} | {file.name: digest for file, digest in clients.files().items()},
        "clients": {
            str(client): [chunk.path.name, row] for client, (chunk, row) in clients.index.items() if chunk.path
        },
    }
    write_json(folder / INDEX, index)
    for file in folder.glob("*.safetensors"):
        if file.name not in index["sha256"]:  # type: ignore[operator]  # a dict, made above
            file.unlink()
    return replace(state, clients=clients)


def load(folder: Path) -> RunState | None:
    """The state of the last complete checkpoint; None where there is none.

    Raises:
      BrokenCheckpoint: a file is missing, cut off or changed.
    """
    from safetensors.torch import load_file

    if not (folder / INDEX).exists():
        return None
    index = _index(folder)
    for name, digest in index["sha256"].items():
        if not (folder / name).is_file() or file_digest(folder / name) != digest:
            raise BrokenCheckpoint(f"{folder / name} is missing, cut off or changed; delete {folder} to start anew")
    parts: dict[str, State] = {"rule": {}, "optimizer": {}, "attack": {}, "joined": {}, "audit": {}}
    tensors = load_file(folder / index["state"])
    for name, value in tensors.items():
        part, _, key = name.partition("/")
        if key:
            parts[part][key] = value
    chunks = {name: Chunk(None, folder / name, index["sha256"][name]) for name, _ in index["clients"].values()}
    clients = {int(client): (chunks[name], row) for client, (name, row) in index["clients"].items()}
    states = ClientStates(clients)
    return RunState(
        index["round"],
        tensors["model"],
        parts["rule"],
        parts["optimizer"],
        states,
        parts["attack"],
        parts["joined"],
        parts["audit"],
        index["skipped"],
    )


def _index(folder: Path) -> dict[str, Any]:
    index = read_json(folder / INDEX)
    if index.get("format") != FORMAT:
        raise BrokenCheckpoint(f"{folder / INDEX} is of format {index.get('format')}, this version reads {FORMAT}")
    return index
