"""What a host's clients remember between rounds (momentum, error feedback), on that host's disk and nowhere else.

One file a round, with the rows of the clients that trained in it. A server that goes on from a checkpoint may ask for a
round again: then everything is as it was before that round, and what was written since is dropped.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import final

import torch

from privfm.checks import at_least
from privfm.contracts import State
from privfm.federation.client_states import Chunk, ClientStates
from privfm.files import file_digest, write_json

_COUNTS = "participations.json"
_IDS, _ATTACK, _CLIENT = "ids", "attack/", "client/"


@final
class NodeStore:
    """States by round, in a folder of this host.

    Args:
      folder: made when something is first written.
      keep: rounds that a server may ask for again; what was overwritten before them is deleted.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        at_least("keep", keep, 1)
        self._folder, self._keep = folder, keep

    def before(self, now: int) -> tuple[ClientStates, State]:
        """States of the clients, and what the attackers share, as they were before round `now`."""
        self._drop(from_round=now)
        index: dict[int, tuple[Chunk, int]] = {}
        attack: State = {}
        for _, path in self._written():
            clients, chunk, attack = _read(path, attack)
            index |= {client: (chunk, place) for place, client in enumerate(clients)}
        return ClientStates(index), attack

    def write(self, now: int, before: ClientStates, after: ClientStates, attack: State) -> None:
        """Notes what changed in round `now`: whole, or not at all."""
        from safetensors.torch import save_file

        changed = [client for client, place in after.index.items() if before.index.get(client) is not place]
        if not changed and not attack:
            return
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        tensors = {_ATTACK + name: value.contiguous() for name, value in attack.items()}
        if changed:
            first = after.index[changed[0]]
            stacked = after.stacked(changed, first[0].take(first[1]))
            tensors |= {_CLIENT + name: value.contiguous() for name, value in stacked.items()}
        tensors[_IDS] = torch.tensor(changed, dtype=torch.int64)
        path = self._path(now)
        draft = path.with_suffix(".draft")
        save_file(tensors, draft)
        draft.replace(path)
        self._prune(now)

    def participations(self) -> Counter[int]:
        """How often each client has trained for a server, rounds that were asked for again included."""
        path = self._folder / _COUNTS
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return Counter({int(client): int(times) for client, times in content.items()})

    def count(self, clients: Iterable[int]) -> None:
        """Notes that these clients train once more; what a server has once been sent is not forgotten with a round."""
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_json(self._folder / _COUNTS, dict(self.participations() + Counter(clients)))

    def _prune(self, now: int) -> None:
        """Deletes files of which a later one holds everything, and lies before all rounds that are still asked for."""
        later: set[str] = set()
        for when, path in reversed(self._written()):
            if when > now - self._keep:
                continue
            held = _held(path)
            if held <= later:
                path.unlink()
            later |= held

    def _drop(self, from_round: int) -> None:
        for when, path in self._written():
            if when >= from_round:
                path.unlink()

    def _written(self) -> list[tuple[int, Path]]:
        found = [(int(path.stem.removeprefix("round-")), path) for path in self._folder.glob("round-*.safetensors")]
        return sorted(found)

    def _path(self, now: int) -> Path:
        return self._folder / f"round-{now:06d}.safetensors"


def _held(path: Path) -> set[str]:
    """Whose states are in a file: clients by number, and what the attackers share."""
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        shared = {_ATTACK} if any(name.startswith(_ATTACK) for name in file.keys()) else set()  # noqa: SIM118
        return shared | {str(client) for client in file.get_tensor(_IDS).tolist()}


def _read(path: Path, attack: State) -> tuple[list[int], Chunk, State]:
    """The clients of a round, their rows, and what the attackers share from then on."""
    from safetensors.torch import load_file

    tensors = load_file(path)
    rows = {name.removeprefix(_CLIENT): value for name, value in tensors.items() if name.startswith(_CLIENT)}
    own = {name.removeprefix(_ATTACK): value for name, value in tensors.items() if name.startswith(_ATTACK)}
    return tensors[_IDS].tolist(), Chunk(rows, None, file_digest(path)), own or attack
