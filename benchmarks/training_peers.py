"""Other projects' engines on the same rounds, each called as its users would call it.

They live in the environment of `make bench`; what cannot be imported raises, and the caller prints why.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.timing import Spent
from benchmarks.workload import BOUND, LEARNING_RATE, NOISE, Round, Work, flat, trained

PATIENCE = 270  # seconds Flower's whole job may take


def pfl(work: Work) -> Round:
    """Federated averaging in the simulation of pfl 0.6: one iteration a round, without evaluation.

    Its first iteration always evaluates every client besides; the counter is set behind it, to the peer's favour.
    """
    names = ("aggregate.simulate", "aggregate.weighting", "algorithm.base", "algorithm.federated_averaging",
             "data.federated_dataset", "data.pytorch", "data.sampling", "hyperparam", "model.pytorch")  # fmt: skip
    parts = {name: import_module(f"pfl.{name}") for name in names}
    network = _Network(work.module())
    parameters = list(trained(network).values())
    start = [value.detach().clone() for value in parameters]
    model = parts["model.pytorch"].PyTorchModel(
        network, lambda params, lr: torch.optim.SGD(params, lr=lr), torch.optim.SGD(parameters, lr=1.0)
    )
    users = [(client.ids, torch.ones_like(client.ids), client.labels) for client in work.clients]
    data = parts["data.federated_dataset"].FederatedDataset(
        lambda user: parts["data.pytorch"].PyTorchTensorDataset(users[user], user_id=str(user)),
        parts["data.sampling"].MinimizeReuseUserSampler(list(range(len(users)))),
    )
    backend = parts["aggregate.simulate"].SimulatedBackend(
        training_data=data, val_data=data, postprocessors=[parts["aggregate.weighting"].WeightByUser()]
    )
    local = parts["hyperparam"].NNTrainHyperParams(
        local_num_epochs=1, local_learning_rate=LEARNING_RATE, local_batch_size=work.batch_size
    )
    settings = parts["algorithm.base"].NNAlgorithmParams(
        central_num_iterations=2, evaluation_frequency=10**6, train_cohort_size=len(users), val_cohort_size=0
    )
    evaluation = parts["hyperparam"].NNEvalHyperParams(local_batch_size=None)
    algorithm = parts["algorithm.federated_averaging"].FederatedAveraging()

    def run() -> Tensor:
        with torch.no_grad():
            for value, first in zip(parameters, start, strict=True):
                value.copy_(first)
        algorithm._current_central_iteration = 1
        algorithm.run(settings, backend, model, local, evaluation, send_metrics_to_platform=False)
        return flat([value - first for value, first in zip(parameters, start, strict=True)])[None]

    return run


class _Network(nn.Module):
    """The loss beside the model, as pfl's models have it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def loss(self, ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(self.module(input_ids=ids, attention_mask=mask).logits, labels)

    def metrics(self, ids: Tensor, mask: Tensor, labels: Tensor) -> dict[str, Any]:
        return {}


def opacus_hooks(work: Work, noise_multiplier: float = NOISE) -> Round:
    """Opacus 1.6: gradients of single examples by hooks, one wrapped model, states swapped as in the plain loop."""
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    module = work.module()
    parameters = trained(module)
    start = {name: value.detach().clone() for name, value in parameters.items()}
    wrapped = GradSampleModule(module)

    def run() -> Tensor:
        updates = []
        for client in work.clients:
            with torch.no_grad():
                for name, value in parameters.items():
                    value.copy_(start[name])
            optimizer = DPOptimizer(
                torch.optim.SGD(list(parameters.values()), lr=LEARNING_RATE),
                noise_multiplier=noise_multiplier,
                max_grad_norm=BOUND,
                expected_batch_size=work.batch_size,
            )
            for inputs, labels in client.batches(work.batch_size):
                optimizer.zero_grad()
                loss: Tensor = cross_entropy(wrapped(**inputs).logits, labels)
                loss.backward()  # type: ignore[no-untyped-call]  # torch's own
                optimizer.step()
            updates.append(flat([value - start[name] for name, value in parameters.items()]))
        return torch.stack(updates)

    return run


def flower(layers: tuple[int, ...] | None, rounds: int, threads: int) -> tuple[list[Spent], Tensor]:
    """Flower 1.41's simulation in a process of its own: time of every round after the first, and the first's mean.

    Processor time is that of the whole tree of processes. Not interleaved with the others: it is one job with workers.

    Args:
      layers: blocks with adapters, all of them if None.
      rounds: after the first, in which workers start and load the model.
      threads: of torch in every process.
    """
    for module in ("psutil", "ray", "flwr.simulation"):
        import_module(module)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "update.pt"
        order = {"layers": layers, "rounds": rounds, "threads": threads, "path": str(path)}
        command = [sys.executable, "-m", "benchmarks.flower_job", json.dumps(order)]
        here = str(Path(__file__).parents[1])
        quiet = {
            "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "PYTHONPATH": here, "HF_HUB_OFFLINE": "1",
        }  # fmt: skip
        done = subprocess.run(
            command, cwd=here, env=os.environ | quiet, capture_output=True, text=True, timeout=PATIENCE, check=False
        )
        last = (done.stdout.strip().splitlines() or [""])[-1]
        if done.returncode or not last.startswith("["):
            raise RuntimeError((done.stderr.strip().splitlines() or ["no answer"])[-1][:160])
        return [Spent(*one) for one in json.loads(last)], torch.load(path)


def silence() -> None:
    """Others' log lines go nowhere."""
    logging.getLogger().setLevel(logging.ERROR)
    for name in ("pfl", "opacus", "flwr", "ray", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
