"""The learner: one model, its state swapped in place from client to client, and the data beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, Literal, final

import torch
from torch import Generator, Tensor, nn

from privfm.adapters import AdapterLayout, scalings
from privfm.checks import InvalidArgument, at_least, first_line, one_of, require
from privfm.contracts import (
    WORST_CLIENTS,
    BuiltModel,
    Examples,
    GradientPrivacy,
    Learner,
    LocalTraining,
    Metric,
    Spans,
    Split,
    Table,
    Task,
    Trained,
)
from privfm.learning.batched import BatchedDescent, prepared
from privfm.learning.one_step import OneStep
from privfm.learning.per_example import problems_for
from privfm.learning.private_steps import MatrixSteps
from privfm.learning.tasks import IGNORED, CausalLM
from privfm.learning.training import Descent
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
      first: the lowest block with a trained parameter.
      width: tokens of the longest example; of an image, the tokens its blocks see (0 without blocks).
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
        self.width = _tokens(self)
        first = self.first = first_trained(built.layers)
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
      engine: `batched` trains clients together wherever model and training allow it; `sequential` one by one.
      tokens: real tokens a pass of the batched engine; None: its own choice for the device.
      autocast: type in which the model is computed during training (`torch.bfloat16`); weights, clipping and noise stay
        float32, in the batched engine also the trained layers' arithmetic. Evaluation, and somebody's own training
        loop, do not use it.

    Attributes:
      engine_note: which engine is used, and why; also how the last batch fell back to one client after the other.
    """

    def __init__(
        self,
        bench: Workbench,
        splits: Mapping[Split, Tensor],
        training: LocalTraining,
        label_mix: Tensor | None = None,
        batch_size: int = 64,
        *,
        engine: Literal["batched", "sequential"] = "sequential",
        tokens: int | None = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        one_of("engine", engine, ("batched", "sequential"))
        if tokens is not None:
            at_least("tokens", tokens, 1)
        self.bench, self.splits, self.training, self.label_mix = bench, splits, training, label_mix
        self._batch_size, self._autocast = batch_size, autocast
        self._batched: BatchedDescent | None = None
        self.engine_note = "sequential: as asked"
        if engine == "batched":
            self._batched, self.engine_note = self._engine(tokens)

    def _engine(self, tokens: int | None) -> tuple[BatchedDescent | None, str]:
        """The batched engine, or why there is none."""
        if not isinstance(self.training, Descent):
            return None, f"sequential: {type(self.training).__name__} does not take its steps on matrices"
        try:
            return prepared(self.bench, tokens, autocast=self._autocast), "batched"
        except InvalidArgument as reason:
            return None, f"sequential: {reason}"

    @property
    def d(self) -> int:
        return self.bench.layout.d

    @property
    def adapters(self) -> AdapterLayout | None:
        return self.bench.adapters

    @property
    def layers(self) -> Spans:
        ends = list(accumulate(self.bench.layout.sizes))
        return tuple(zip([0, *ends[:-1]], ends, strict=True))

    def initial(self) -> Tensor:
        return self.bench.initial.clone()

    def labels(self, split: Split) -> Tensor:
        """Labels of a split."""
        return self.bench.everything.labels[self.splits[split]]

    def refuses_private_gradients(self) -> str:
        if not isinstance(self.training, Descent):
            kind = type(self.training).__name__
            return f"{kind} does not show its steps, so that no example's gradient can be clipped; use SGD or AdamW"
        return "; ".join(problems_for(self.bench.module))

    def train(
        self,
        model: Tensor,
        batch: Sequence[Examples],
        generators: Sequence[Generator],
        privacy: GradientPrivacy | None = None,
        active: Tensor | None = None,
    ) -> Trained:
        bench = self.bench
        refusal = "" if privacy is None else self.refuses_private_gradients()
        require(not refusal, f"no private gradients: {refusal}")
        require(
            active is None or (active.shape == (self.d,) and active.dtype == torch.bool),
            f"active: expected ({self.d},) bool, as long as what is trained",
        )
        bench.load(model)  # may change what is frozen, once
        frozen = bench.frozen_versions()
        trained = self._together(model, batch, generators, privacy, active)
        if trained is None:
            trained = self._one_by_one(model, batch, generators, privacy, active)
        changed = [name for name, version in bench.frozen_versions().items() if version != frozen.get(name)]
        require(
            not changed,
            f"local training changed {', '.join(changed[:3])}, which no update carries: later clients would train "
            "another model; freeze it, or make it part of what is trained",
        )
        return trained

    def _together(
        self, model: Tensor, batch: Sequence[Examples], generators: Sequence[Generator],
        privacy: GradientPrivacy | None, active: Tensor | None,
    ) -> Trained | None:  # fmt: skip
        """All clients through the batched engine; None without one, or if anybody's training raises."""
        if self._batched is None or not isinstance(self.training, Descent):
            return None
        states = [generator.get_state() for generator in generators]
        try:
            rows = self._batched.train(
                model[: self.d], batch, generators, self.training, privacy=privacy, active=active
            )
        except Exception as reason:  # one client's data must not be everybody's loss: each begins anew, alone
            self.engine_note = f"batched, but sequential after a {type(reason).__name__} in a batch of clients"
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)
            return None
        return Trained(rows, {})

    def _one_by_one(
        self, model: Tensor, batch: Sequence[Examples], generators: Sequence[Generator],
        privacy: GradientPrivacy | None, active: Tensor | None,
    ) -> Trained:  # fmt: skip
        rows = torch.full((len(batch), self.d), torch.nan)
        failed: dict[int, str] = {}
        frozen_parts = self._frozen_by(active, privacy)
        for place, (examples, generator) in enumerate(zip(batch, generators, strict=True)):
            self.bench.load(model)
            try:
                with seeded(generator), _frozen(frozen_parts):
                    rows[place] = self._update(model, examples, generator, privacy, active)
            except Exception as reason:  # whatever a client's own code raises is this client's loss, not the round's
                failed[place] = f"{type(reason).__name__}: {reason}"
        return Trained(rows, failed)

    def _update(
        self, model: Tensor, examples: Examples, generator: Generator,
        privacy: GradientPrivacy | None, active: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """One client's update from the loaded model, `(d,)`."""
        bench, training, module = self.bench, self.training, self.bench.module
        if isinstance(training, OneStep):  # nothing to take the model off from
            step = bench.layout.flatten(
                training.update(module, bench.parameters, self._losses, examples, generator)
            ).cpu()
            return step if active is None else step.masked_fill(~active, 0.0)
        if isinstance(training, Descent) and (privacy is not None or active is not None):
            steps = MatrixSteps(module, bench.parameters, self._losses, bench.layout, active)
            return steps.run(training, examples, generator, privacy).cpu() - model[: self.d]
        own = {name: p for name, p in bench.parameters.items() if p.requires_grad}
        trained = training.run(module, own, self._losses, examples, generator)
        update = self._vector(trained) - model[: self.d]
        return update if active is None else update.masked_fill(~active, 0.0)

    def _frozen_by(self, active: Tensor | None, privacy: GradientPrivacy | None) -> list[nn.Parameter]:
        """What a training of unknown steps must find frozen where not everything is active."""
        if active is None or isinstance(self.training, Descent | OneStep):
            return []
        layout = self.bench.layout
        parts = dict(zip(layout.names, torch.split(active, list(layout.sizes)), strict=True))
        split = [name for name, part in parts.items() if bool(part.any()) and not bool(part.all())]
        require(
            not split,
            f"active: {', '.join(split[:3])} is trained in part; {type(self.training).__name__} freezes whole tensors, "
            "use SGD or AdamW",
        )
        return [self.bench.parameters[name] for name, part in parts.items() if not bool(part.any())]

    def _losses(self, examples: Examples) -> Tensor:
        """Loss of every example, `(b,)`, with what is frozen in the chosen type."""
        if self._autocast is None:
            return self.bench.losses(examples)
        # A context for every call: while one lasts, it keeps weights as it first cast them, whatever steps change.
        with torch.autocast(self.bench.device.type, self._autocast):
            return self.bench.losses(examples)

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


@contextmanager
def _frozen(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """These parameters require no gradients for the while."""
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def _tokens(bench: Workbench) -> int:
    """Tokens of the longest example, or as many as the blocks see of the first."""
    mask = bench.everything.inputs.get("attention_mask")
    if mask is not None:
        return int(mask.sum(1).max())
    if not bench.built.layers:
        return 0
    seen: list[int] = []

    def watch(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        seen.extend(tensor.shape[1] for tensor in given[:1])

    hook = bench.built.layers[0].register_forward_pre_hook(watch)
    try:
        with torch.no_grad():
            bench.module(**on_device(first_example(bench.everything).inputs, bench.device))
    finally:
        hook.remove()
    return max(seen, default=0)


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
