"""The learner: one model, its state swapped in place from client to client, and the data beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, final

import torch
from torch import Generator, Tensor, nn

from privfm.adapters import AdapterLayout, scalings
from privfm.checks import InvalidArgument, first_line, require
from privfm.contracts import (
    WORST_CLIENTS,
    BuiltModel,
    Examples,
    GradientPrivacy,
    Learner,
    LocalTraining,
    Metric,
    Split,
    Table,
    Task,
    Trained,
)
from privfm.learning.one_step import OneStep
from privfm.learning.tasks import IGNORED, CausalLM
from privfm.learning.trunk import Activations, Trunk, content_digest, first_example, first_trained, on_device, trimmed
from privfm.randomness import seeded
from privfm.vectors import Layout


@final
class Workbench:
    """A model and a table made ready for each other once, for any number of learners one after the other.

    Args:
      built: the model; what of it requires gradients is trained.
      task: decides what the labels are.
      table: all examples.
      device: where the model runs; update vectors and activations rest on the CPU.
      folder: where the activations below the first trained layer are kept, in a file that is named by the content of
        the model's frozen part and of the inputs and shared by every process that asks for it; None: in memory.

    Attributes:
      everything: all examples of the table, in order.
      initial: the model before any training, `(d,)`.
    """

    def __init__(
        self, built: BuiltModel, task: Task, table: Table, device: str = "cpu", folder: Path | None = None
    ) -> None:
        self.built, self.task, self.label_names = built, task, table.label_names
        self.everything = _examples(table, built, task)
        self.device = torch.device(device)
        self.module = built.module.to(self.device)
        self.parameters = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        require(bool(self.parameters), "nothing is trained: the model has no parameter that requires gradients")
        self.layout = Layout.of(self.parameters)
        self.adapters = _adapters(self.module, self.layout)
        self._frozen: dict[str, Tensor] = {}  # adapted weights as they came, once the server has changed them
        self._base = torch.zeros(0)  # what the server has added to them
        self.initial = self.layout.flatten(self.parameters).cpu()
        self._try_one()
        self.trunk: Trunk | None = None
        first = first_trained(built.layers)
        trunk = Trunk(self.module, built.layers, first) if first > 0 else None
        if trunk is not None and trunk.trained_below(self.everything, self.device):
            trunk.remove()
        elif trunk is not None:
            digest = content_digest(self.module, first, self.everything)
            path = None if folder is None else folder / f"{digest}.activations"
            self.trunk, self.activations = trunk, Activations.of(trunk, self.everything, self.device, path)

    def _try_one(self) -> None:
        """One example through model and loss, so that what does not fit is refused before anything is trained."""
        one = first_example(self.everything)
        try:
            with torch.no_grad():
                output: Any = self.module(**on_device(one.inputs, self.device))
                losses = self.task.losses(getattr(output, "logits", output), one.labels.to(self.device))
            require(losses.shape == (1,), f"expected one loss an example, got shape {tuple(losses.shape)}")
        except (RuntimeError, IndexError, ValueError, TypeError) as reason:
            kind = type(self.task).__name__
            raise InvalidArgument(f"model, data and {kind} do not fit together: {first_line(reason)}") from reason

    def load(self, model: Tensor) -> nn.Module:
        """The module with `model` loaded, without dropout, as if nobody had used it before.

        `model` is `(d,)`, and the server's change of the adapted weights after it where there is one.
        """
        d = self.layout.d
        with torch.no_grad():
            for name, value in self.layout.unflatten(model[:d]).items():
                self.parameters[name].copy_(value)
                self.parameters[name].grad = None
            if not torch.equal(model[d:], self._base):
                self._load_base(model[d:])
        return self.module.eval()

    def _load_base(self, change: Tensor) -> None:
        """Sets the adapted modules' own weights to what they were plus `change`; no change where it is empty."""
        if self.adapters is None:
            raise InvalidArgument("a change of adapted weights came with the model, which has no adapters")
        self._base = change.clone()
        change = change if len(change) else torch.zeros(self.adapters.first_plain)
        for pair, part in zip(self.adapters.pairs, self.adapters.matrices(change), strict=True):
            module: Any = self.module.get_submodule(pair.module)
            weight: Tensor = module.base_layer.weight
            original = self._frozen.setdefault(pair.module, weight.detach().clone())
            weight.copy_(original + part.to(original))

    def frozen_versions(self) -> dict[str, int]:
        """How often each value that is not trained was written to."""
        everything = chain(self.module.named_parameters(), self.module.named_buffers())
        return {name: value._version for name, value in everything if name not in self.parameters}

    def logits(self, examples: Examples) -> Tensor:
        """Logits under the loaded weights, from known activations where they apply; `examples` are trimmed."""
        inputs = on_device(examples.inputs, self.device)
        if self.trunk is None or examples.rows is None:
            output: Any = self.module(**inputs)
        else:
            mask = inputs.get("attention_mask")
            known = self.activations.batch(examples.rows, None if mask is None else mask.shape[1])
            output = self.trunk.resume(inputs, known.to(self.device))
        logits: Tensor = getattr(output, "logits", output)
        return logits

    def losses(self, examples: Examples) -> Tensor:
        """Loss of every example under the loaded weights, `(b,)`."""
        batch = trimmed(examples)
        return self.task.losses(self.logits(batch), batch.labels.to(self.device))

    def save(self, model: Tensor, folder: Path) -> None:
        """Writes the model to a folder: for adapters, what `PeftModel.from_pretrained` loads.

        What the server has added to adapted weights goes into `base_change.safetensors` beside it, by module.
        """
        self.load(model)
        self.built.save(folder)
        if self.adapters is not None and len(model) > self.layout.d:
            from safetensors.torch import save_file

            parts = self.adapters.matrices(model[self.layout.d :])
            changes = {pair.module: part.contiguous() for pair, part in zip(self.adapters.pairs, parts, strict=True)}
            save_file(changes, folder / "base_change.safetensors")


@final
class ModelLearner(Learner):
    """Trains and evaluates one torch model for all clients, its state swapped in place.

    Args:
      bench: model and data.
      splits: rows of the table by split.
      training: what one client does.
      label_mix: `(clients, labels)` examples of each label at each client, for the worst-decile client; None: not
        reported.
      batch_size: examples evaluated at once.
    """

    def __init__(
        self,
        bench: Workbench,
        splits: Mapping[Split, Tensor],
        training: LocalTraining,
        label_mix: Tensor | None = None,
        batch_size: int = 64,
    ) -> None:
        self.bench, self.splits, self.training, self.label_mix = bench, splits, training, label_mix
        self._batch_size = batch_size

    @property
    def d(self) -> int:
        return self.bench.layout.d

    @property
    def adapters(self) -> AdapterLayout | None:
        return self.bench.adapters

    def initial(self) -> Tensor:
        return self.bench.initial.clone()

    def labels(self, split: Split) -> Tensor:
        """Labels of a split."""
        return self.bench.everything.labels[self.splits[split]]

    def train(
        self,
        model: Tensor,
        batch: Sequence[Examples],
        generators: Sequence[Generator],
        privacy: GradientPrivacy | None = None,
        active: Tensor | None = None,
    ) -> Trained:
        bench = self.bench
        rows = torch.full((len(batch), self.d), torch.nan)
        failed: dict[int, str] = {}
        bench.load(model)  # may change what is frozen, once
        frozen = bench.frozen_versions()
        for place, (examples, generator) in enumerate(zip(batch, generators, strict=True)):
            module = bench.load(model)
            try:
                with seeded(generator):
                    if isinstance(self.training, OneStep):  # nothing to take the model off from
                        step = self.training.update(module, bench.parameters, bench.losses, examples, generator)
                        rows[place] = bench.layout.flatten(step).cpu()
                    else:
                        trained = self.training.run(module, bench.parameters, bench.losses, examples, generator)
                        rows[place] = self._vector(trained) - model[: self.d]
            except Exception as reason:  # whatever a client's own code raises is this client's loss, not the round's
                failed[place] = f"{type(reason).__name__}: {reason}"
        changed = [name for name, version in bench.frozen_versions().items() if version != frozen.get(name)]
        require(
            not changed,
            f"local training changed {', '.join(changed[:3])}, which no update carries: later clients would train "
            "another model; freeze it, or make it part of what is trained",
        )
        return Trained(rows, failed)

    def evaluate(self, model: Tensor, split: Split) -> dict[str, Metric]:
        rows = self.splits[split]
        require(len(rows) > 0, f"the split {split!r} is empty")
        examples = self.bench.everything.take(rows)
        scores = self._read(model, examples, self.bench.task.score)
        metrics = self.bench.task.summarise(scores, examples.labels, self.bench.label_names)
        if self.label_mix is not None:
            metrics[WORST_CLIENTS] = self._worst_decile(metrics, self.label_mix)
        return metrics

    def predictions(self, model: Tensor, examples: Examples) -> Tensor:
        """What `model (d,)` predicts for examples of one label each, `(b,)`."""
        task = self.bench.task
        return self._read(model, examples, lambda logits, labels: {"predicted": task.predict(logits)})["predicted"]

    def _read(
        self, model: Tensor, examples: Examples, score: Callable[[Tensor, Tensor], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """`score(logits, labels)` of all examples, in their order, computed in batches of like length."""
        bench, order = self.bench, _by_length(examples)
        bench.load(model)
        parts: list[dict[str, Tensor]] = []
        with torch.no_grad():
            for places in torch.split(order, self._batch_size):
                batch = trimmed(examples.take(places))
                found = score(bench.logits(batch), batch.labels.to(bench.device))
                parts.append({name: value.cpu() for name, value in found.items()})
        back = order.argsort()
        return {name: torch.cat([part[name] for part in parts])[back] for name in parts[0]}

    def _vector(self, module: nn.Module) -> Tensor:
        layout = self.bench.layout
        if module is self.bench.module:
            return layout.flatten(self.bench.parameters).cpu()
        own = dict(module.named_parameters())  # somebody's training loop returned another module
        return layout.flatten({name: own[name] for name in layout.names if name in own}).cpu()

    def _worst_decile(self, metrics: Mapping[str, Metric], label_mix: Tensor) -> Metric:
        """Mean over the worst tenth of clients of the accuracy under each client's own label mix."""
        found = [metrics.get(f"accuracy/{name}") for name in self.bench.label_names]  # a small split may miss a label
        by_label = torch.tensor([0.0 if metric is None else metric.value for metric in found])
        mix = label_mix.float() * torch.tensor([metric is not None for metric in found])
        known = mix.sum(1) > 0  # of a client without any of the split's labels nothing can be said
        clients = (mix[known] @ by_label) / mix[known].sum(1)
        worst = clients.sort().values[: max(1, len(clients) // 10)]
        return Metric(float(worst.mean()), len(worst), True, "share")


def _adapters(module: nn.Module, layout: Layout) -> AdapterLayout | None:
    """Where the factors of a PEFT model are; None without LoRA, or with a kind that is no product of two matrices."""
    if not any("lora_A" in name for name in layout.names):
        return None
    try:
        return AdapterLayout.of(layout, scalings(module))
    except InvalidArgument:  # DoRA, convolutions: they train, but have no product geometry
        return None


def _examples(table: Table, built: BuiltModel, task: Task) -> Examples:
    """A whole table as the model's inputs and the task's labels, in the order of the table."""
    rows = torch.arange(len(table))
    if isinstance(table.inputs, Tensor):
        require(built.tokenize is None, "the model reads text, the data are images")
        return Examples({"pixel_values": table.inputs}, table.labels, rows)
    if built.tokenize is None:
        raise InvalidArgument("the model reads images, the data are text")
    inputs = built.tokenize(table.inputs)
    labels = table.labels
    if isinstance(task, CausalLM):
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, IGNORED)
    return Examples(inputs, labels, rows)


def _by_length(examples: Examples) -> Tensor:
    mask = examples.inputs.get("attention_mask")
    return torch.arange(len(examples)) if mask is None else mask.sum(1).argsort(stable=True)
