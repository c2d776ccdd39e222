"""A model and a table made ready for each other, once, for any number of learners."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from privfm.adapters import AdapterLayout, scalings
from privfm.checks import InvalidArgument, first_line, require
from privfm.contracts import BuiltModel, Examples, Table, Task
from privfm.learning.tasks import IGNORED, CausalLM
from privfm.learning.trunk import Activations, Trunk, content_digest, first_example, first_trained, on_device, trimmed
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
        self._parts, self._values = list(self.module.modules()), dict[str, Tensor]()
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
        for part in self._awake():
            part.training = False
        return self.module

    def _awake(self) -> list[nn.Module]:
        """Parts that somebody's own training loop has left in training mode; cheaper than a walk for every client."""
        return [part for part in self._parts if part.training]

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

    def frozen_versions(self, foreign: bool = True) -> dict[str, int]:
        """How often each value that is not trained was written to.

        Args:
          foreign: code that is not ours may have put others in their place, so that they are looked up anew.
        """
        if foreign or not self._values:
            everything = chain(self.module.named_parameters(), self.module.named_buffers())
            self._values = {name: value for name, value in everything if name not in self.parameters}
        return {name: value._version for name, value in self._values.items()}

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
