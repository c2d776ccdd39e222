"""The learner: one model, its state swapped in place from client to client."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

import torch
from torch import Generator, Tensor, nn

from privfm.checks import require
from privfm.contracts import (
    BuiltModel,
    Examples,
    Learner,
    LocalTraining,
    Metric,
    Split,
    Table,
    Task,
    Trained,
)
from privfm.learning.tasks import IGNORED, CausalLM
from privfm.learning.trunk import Activations, Trunk, first_trained, trimmed
from privfm.randomness import seeded
from privfm.vectors import Layout


def prepare(table: Table, built: BuiltModel, task: Task) -> Examples:
    """A whole table as the model's inputs and the task's labels, in the order of the table.

    Raises:
      InvalidArgument: the model and the data do not fit.
    """
    rows = torch.arange(len(table))
    if isinstance(table.inputs, Tensor):
        require(built.tokenize is None, "the model reads text, the data are images")
        return Examples({"pixel_values": table.inputs}, table.labels, rows)
    require(built.tokenize is not None, "the model reads images, the data are text")
    assert built.tokenize is not None  # for the type checker
    inputs = built.tokenize(table.inputs)
    labels = table.labels
    if isinstance(task, CausalLM):
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, IGNORED)
    return Examples(inputs, labels, rows)


@final
class ModelLearner(Learner):
    """Trains and evaluates one torch model for all clients.

    Args:
      built: the model; what of it requires gradients is trained.
      task: loss and metrics.
      everything: all examples of the table, as `prepare` returns them.
      splits: rows of the table by split.
      label_names: by label.
      training: what one client does.
      device: where the model runs; update vectors stay on the CPU.
      activations: file for the activations below the first trained layer, shared by processes; None: in memory.
      label_mix: `(clients, labels)` examples of each label at each client, for the worst-decile client; None: not
        reported.
      batch_size: examples evaluated at once.
    """

    def __init__(
        self,
        *,
        built: BuiltModel,
        task: Task,
        everything: Examples,
        splits: Mapping[Split, Tensor],
        label_names: Sequence[str],
        training: LocalTraining,
        device: str = "cpu",
        activations: Path | None = None,
        label_mix: Tensor | None = None,
        batch_size: int = 64,
    ) -> None:
        self.built, self.task, self.everything, self.splits = built, task, everything, splits
        self.label_names, self.training, self.label_mix = tuple(label_names), training, label_mix
        self._device, self._batch_size = torch.device(device), batch_size
        self._module = built.module.to(self._device)
        self._parameters = {name: p for name, p in self._module.named_parameters() if p.requires_grad}
        require(bool(self._parameters), "nothing is trained: the model has no parameter that requires gradients")
        self.layout = Layout.of(self._parameters)
        self._initial = self.layout.flatten(self._parameters).cpu()
        first = first_trained(built.layers)
        below = all(not p.requires_grad for p in _below(self._module, built.layers))
        self._trunk = Trunk(self._module, built.layers, first) if first > 0 and below else None
        self._activations = (
            Activations.of(self._trunk, everything, self._device, activations) if self._trunk is not None else None
        )

    @property
    def d(self) -> int:
        return self.layout.d

    def initial(self) -> Tensor:
        return self._initial.clone()

    def train(self, model: Tensor, batch: Sequence[Examples], generators: Sequence[Generator]) -> Trained:
        rows = torch.full((len(batch), self.d), torch.nan)
        failed: dict[int, str] = {}
        for place, (examples, generator) in enumerate(zip(batch, generators, strict=True)):
            self.load(model)
            try:
                with seeded(generator):
                    trained = self.training.run(
                        self._module, self._parameters, self.losses, self._here(examples), generator
                    )
                rows[place] = self._vector(trained) - model
            except Exception as reason:  # whatever a client's own code raises is this client's loss
                failed[place] = f"{type(reason).__name__}: {reason}"
        return Trained(rows, failed)

    def evaluate(self, model: Tensor, split: Split) -> dict[str, Metric]:
        rows = self.splits[split]
        require(len(rows) > 0, f"the split {split!r} is empty")
        self.load(model)
        examples = self.everything.take(rows)
        parts: list[dict[str, Tensor]] = []
        order = _by_length(examples)
        with torch.no_grad():
            for places in torch.split(order, self._batch_size):
                batch = trimmed(self._here(examples.take(places)))
                parts.append({k: v.cpu() for k, v in self.task.score(self._logits(batch), batch.labels).items()})
        back = order.argsort()
        scores = {name: torch.cat([part[name] for part in parts])[back] for name in parts[0]}
        metrics = self.task.summarise(scores, examples.labels, self.label_names)
        if self.label_mix is not None:
            metrics["worst_decile_client_accuracy"] = self._worst_decile(metrics)
        return metrics

    def losses(self, examples: Examples) -> Tensor:
        """Loss of every example under the present weights, `(b,)`."""
        batch = trimmed(examples)
        return self.task.losses(self._logits(batch), batch.labels)

    def load(self, model: Tensor) -> nn.Module:
        """The module with `model (d,)` loaded."""
        with torch.no_grad():
            for name, value in self.layout.unflatten(model).items():
                self._parameters[name].copy_(value)
                self._parameters[name].grad = None
        return self._module

    def save(self, model: Tensor, folder: Path) -> None:
        """Writes the model to a folder: for adapters, what `PeftModel.from_pretrained` loads."""
        self.load(model)
        self.built.save(folder)

    def _here(self, examples: Examples) -> Examples:
        inputs = {name: value.to(self._device) for name, value in examples.inputs.items()}
        return Examples(inputs, examples.labels.to(self._device), examples.rows)

    def _logits(self, batch: Examples) -> Tensor:
        if self._trunk is None or self._activations is None or batch.rows is None:
            output: Any = self._module(**batch.inputs)
        else:
            mask = batch.inputs.get("attention_mask")
            known = self._activations.batch(batch.rows, None if mask is None else mask.shape[1])
            output = self._trunk.resume(batch.inputs, known.to(self._device))
        logits: Tensor = getattr(output, "logits", output)
        return logits

    def _vector(self, module: nn.Module) -> Tensor:
        if module is self._module:
            return self.layout.flatten(self._parameters).cpu()
        own = dict(module.named_parameters())
        return self.layout.flatten({name: own[name] for name in self.layout.names if name in own}).cpu()

    def _worst_decile(self, metrics: Mapping[str, Metric]) -> Metric:
        """Mean over the worst tenth of clients of the accuracy under each client's own label mix."""
        assert self.label_mix is not None
        found = [metrics.get(f"accuracy/{name}") for name in self.label_names]  # a small split may miss a label
        by_label = torch.tensor([0.0 if metric is None else metric.value for metric in found])
        mix = self.label_mix.float() * torch.tensor([metric is not None for metric in found])
        clients = (mix @ by_label) / mix.sum(1).clamp(min=1)
        worst = clients.sort().values[: max(1, len(clients) // 10)]
        return Metric(float(worst.mean()), len(worst), True, "share", None)


def _by_length(examples: Examples) -> Tensor:
    mask = examples.inputs.get("attention_mask")
    return torch.arange(len(examples)) if mask is None else mask.sum(1).argsort(stable=True)


def _below(module: nn.Module, layers: Sequence[nn.Module]) -> list[nn.Parameter]:
    """Parameters of the embeddings: what runs before the first block and is neither a block nor a head."""
    embeddings = [part for name, part in module.named_modules() if name.rsplit(".", 1)[-1].startswith("embed")]
    return [parameter for part in embeddings for parameter in part.parameters()]
