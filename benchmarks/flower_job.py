"""Federated averaging in Flower's simulation: the job that `benchmarks.training_peers.flower` starts.

The model stays in each worker and only adapters and head travel, which is the fastest way to use it. Prints one line:
`[[processor seconds, wall seconds], ...]` of every round after the first; saves the first round's mean update.
"""

from __future__ import annotations

import json
import os
import sys
import time
from importlib import import_module
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from torch.nn.functional import cross_entropy

from benchmarks.clients import ROUND, round_work
from benchmarks.workload import LEARNING_RATE, flat, trained

ORDER: dict[str, Any] = json.loads(os.environ.get("FLOWER_JOB") or sys.argv[1])
_KEPT: dict[str, Any] = {}

client_app = ClientApp()


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """One client's local training."""
    torch.set_num_threads(ORDER["threads"])
    if not _KEPT:
        work = round_work(None if ORDER["layers"] is None else tuple(ORDER["layers"]))
        _KEPT.update(work=work, module=work.module())
    work, module = _KEPT["work"], _KEPT["module"]
    parameters = trained(module)
    state = message.content.array_records["arrays"].to_torch_state_dict()
    with torch.no_grad():
        for name, value in parameters.items():
            value.copy_(state[name])
    client = work.clients[int(context.node_config["partition-id"])]
    optimizer = torch.optim.SGD(list(parameters.values()), lr=LEARNING_RATE)
    for inputs, labels in client.batches(work.batch_size):
        optimizer.zero_grad()
        loss: torch.Tensor = cross_entropy(module(**inputs).logits, labels)
        loss.backward()  # type: ignore[no-untyped-call]  # torch's own
        optimizer.step()
    arrays = ArrayRecord({name: value.detach() for name, value in parameters.items()})
    count = MetricRecord({"num-examples": len(client.ids)})
    return Message(content=RecordDict({"arrays": arrays, "metrics": count}), reply_to=message)


class Timed(FedAvg):
    """Notes the clocks around every round."""

    marks: list[tuple[float, float]] = []
    first: Any = None

    def configure_train(self, server_round: int, arrays: Any, config: ConfigRecord, grid: Grid) -> Any:
        self.marks.append((_tree_seconds(), time.perf_counter()))
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        result = super().aggregate_train(server_round, list(replies))
        self.marks.append((_tree_seconds(), time.perf_counter()))
        if server_round == 1 and result[0] is not None:
            self.first = result[0].to_torch_state_dict()
        return result


_SEEN: dict[tuple[int, float], float] = {}


def _tree_seconds() -> float:
    """Processor seconds of this process and all below it, those that ended included as far as they were seen."""
    psutil = import_module("psutil")  # has no types
    own = psutil.Process()
    for process in [own, *own.children(recursive=True)]:
        try:
            spent = process.cpu_times()
            _SEEN[process.pid, process.create_time()] = spent.user + spent.system
        except psutil.Error:
            continue
    return sum(_SEEN.values())


def main() -> None:
    """Runs the job."""
    from flwr.simulation import run_simulation

    os.environ["FLOWER_JOB"] = json.dumps(ORDER)  # the workers import this file, too
    torch.set_num_threads(ORDER["threads"])
    work = round_work(None if ORDER["layers"] is None else tuple(ORDER["layers"]))
    start = {name: value.detach().clone() for name, value in trained(work.module()).items()}
    clients = ROUND[0]
    strategy = Timed(fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients)
    app = ServerApp()

    @app.main()
    def serve(grid: Grid, context: Context) -> None:
        strategy.start(grid=grid, initial_arrays=ArrayRecord(start), num_rounds=1 + ORDER["rounds"])

    processors: Any = {"num_cpus": 2, "include_dashboard": False, "logging_level": 30, "log_to_driver": False}
    each: Any = {"num_cpus": ORDER["threads"], "num_gpus": 0.0}
    run_simulation(
        server_app=app,
        client_app=client_app,
        num_supernodes=clients,
        backend_config={"init_args": processors, "client_resources": each},
    )
    torch.save(flat([strategy.first[name] - value for name, value in start.items()])[None], ORDER["path"])
    begins, ends = strategy.marks[2::2], strategy.marks[3::2]
    spent = [[b - a for a, b in zip(begin, end, strict=True)] for begin, end in zip(begins, ends, strict=True)]
    sys.stdout.write(json.dumps(spent) + "\n")


if __name__ == "__main__":
    # The workers get the client app by reference: it must come from the module they can import, not from `__main__`.
    import_module("benchmarks.flower_job").main()
