"""What clients remember between rounds (momentum, error feedback), by client id, in memory or on disk.

A log: every round adds one chunk with the rows of the clients that were trained, and an index says where each
client's latest row lies. A value is never changed in place, so a round that is interrupted costs nothing, and a
checkpoint only has to write the new chunks. Memory holds the index and what was not yet written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch

from privfm.contracts import State
from privfm.files import file_digest


@final
@dataclass(frozen=True)
class Chunk:
    """Rows of some clients `{name: (k, ...)}`, in memory (`rows`) or in a safetensors file (`path`, its SHA-256)."""

    rows: State | None
    path: Path | None = None
    digest: str = ""

    def take(self, place: int) -> State:
        """One client's row, without a client dimension."""
        if self.rows is not None:
            return {name: value[place] for name, value in self.rows.items()}
        from safetensors import safe_open

        with safe_open(str(self.path), framework="pt") as file:
            return {name: file.get_slice(name)[place] for name in file.keys()}  # noqa: SIM118  # not a mapping


Place = tuple[Chunk, int]


@final
@dataclass(frozen=True)
class ClientStates:
    """States of the clients that were ever trained; immutable.

    Args:
      index: where each client's latest row lies.
    """

    index: Mapping[int, Place]

    def stacked(self, ids: Sequence[int], fresh: State) -> State:
        """States of `ids`, stacked `{name: (k, ...)}`; `fresh` for clients without one."""
        if not ids:  # a batch of which everybody has failed
            return {name: value.new_zeros((0, *value.shape)) for name, value in fresh.items()}
        own = [self.index[i][0].take(self.index[i][1]) if i in self.index else fresh for i in ids]
        return {name: torch.stack([state[name] for state in own]) for name in fresh}

    def updated(self, ids: Sequence[int], state: State) -> ClientStates:
        """With new states `{name: (k, ...)}` of `ids`."""
        if not state:
            return self
        chunk = Chunk({name: value.clone() for name, value in state.items()})
        return ClientStates({**self.index, **{client: (chunk, place) for place, client in enumerate(ids)}})

    def written(self, folder: Path, stem: str) -> ClientStates:
        """Writes every chunk that is still in memory to `folder`, and refers to the files from then on."""
        from safetensors.torch import save_file

        moved: dict[int, Chunk] = {}
        for chunk, _ in self.index.values():
            if chunk.rows is not None and id(chunk) not in moved:
                path = folder / f"{stem}-{len(moved)}.safetensors"
                save_file({name: value.contiguous() for name, value in chunk.rows.items()}, path)
                moved[id(chunk)] = Chunk(None, path, file_digest(path))
        return ClientStates({client: (moved.get(id(chunk), chunk), row) for client, (chunk, row) in self.index.items()})

    def files(self) -> dict[Path, str]:
        """Files that hold at least one client's latest row, and their SHA-256."""
        return {chunk.path: chunk.digest for chunk, _ in self.index.values() if chunk.path is not None}
