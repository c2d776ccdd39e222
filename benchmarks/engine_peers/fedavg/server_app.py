"""The server: Flower's own FedAvg, which notes when each round began and ended."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from time import perf_counter
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, Message
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()


class Noted(FedAvg):
    """Appends `{"seconds": ...}` to a file at the end of every round, from the choice of clients to the new model."""

    def __init__(self, path: Path, clients: int) -> None:
        super().__init__(fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients)
        self._path, self._clients, self._began = path, clients, 0.0

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As it is, with the clock read before."""
        self._began = perf_counter()
        found: Iterable[Message] = super().configure_train(server_round, arrays, config, grid)
        return found

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        """As it is, with the clock read behind."""
        replies = list(replies)
        arrived = sum(not reply.has_error() for reply in replies)
        if arrived != self._clients:
            raise RuntimeError(f"round {server_round}: {arrived} of {self._clients} clients answered")
        found = super().aggregate_train(server_round, replies)
        line = json.dumps({"seconds": perf_counter() - self._began})
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        return found


@app.main()
def main(grid: Grid, context: Context) -> None:
    """All rounds; the last model goes beside the notes."""
    from safetensors.torch import load_file, save_file

    config = context.run_config
    out = Path(str(config["out"]))
    start = ArrayRecord(load_file(Path(str(config["data"]), "model.safetensors")))
    result = Noted(out / "rounds.jsonl", int(config["clients"])).start(
        grid=grid, initial_arrays=start, num_rounds=int(config["rounds"])
    )
    save_file(result.arrays.to_torch_state_dict(), out / "model.safetensors")
