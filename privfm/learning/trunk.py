"""What lies below the first trainable layer, computed once per example.

The model's own code runs from the top down to its embeddings every time; only the frozen blocks are short-circuited,
so nothing here knows an architecture: any model with one stack of like blocks works, adapters included.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from privfm.contracts import Examples


def block_stack(module: nn.Module) -> tuple[nn.Module, ...]:
    """The longest list of blocks of one class inside a model, from the bottom up; empty when there is none."""
    stacks = [tuple(part) for part in module.modules() if isinstance(part, nn.ModuleList)]
    alike = [stack for stack in stacks if len(stack) > 1 and len({type(block) for block in stack}) == 1]
    return max(alike, key=len, default=())


def first_trained(layers: Sequence[nn.Module]) -> int:
    """Place of the lowest block with a trained parameter; the number of blocks when none has one."""
    trained = [any(p.requires_grad for p in block.parameters()) for block in layers]
    return trained.index(True) if True in trained else len(layers)


def content_digest(module: nn.Module, first: int, everything: Examples) -> str:
    """SHA-256 of what activations below block `first` depend on: the frozen values, how they are wired, the inputs."""
    configuration: Any = getattr(module, "config", None)  # heads of attention, activation: not seen in the modules
    wiring = configuration.to_json_string() if hasattr(configuration, "to_json_string") else ""
    digest = sha256(f"{torch.__version__} {first} {wiring} {module}".encode())
    # What differs by seed and does not act below: PEFT's untrained copy of a trained head, frozen factors of adapters.
    frozen = {
        name: value
        for name, value in module.named_parameters()
        if not value.requires_grad and ".original_module." not in name and ".lora_A." not in name
    }
    for name, value in sorted({**frozen, **everything.inputs}.items()):
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def trimmed(examples: Examples) -> Examples:
    """Padding columns that no example of the batch uses, cut off (right padding)."""
    mask = examples.inputs.get("attention_mask")
    if mask is None:
        return examples
    width, used = mask.shape[1], int(mask.sum(1).max())
    inputs = {name: value[:, :used] for name, value in examples.inputs.items()}
    labels = examples.labels
    return Examples(inputs, labels[:, :used] if labels.shape[1:] == (width,) else labels, examples.rows)


def first_example(everything: Examples) -> Examples:
    """One example without padding, to see what a model makes of it."""
    return trimmed(everything.take(torch.zeros(1, dtype=torch.int64)))


def on_device(inputs: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """A model's inputs where the model is."""
    return {name: value.to(device) for name, value in inputs.items()}


@final
class Trunk:
    """Short-circuits the blocks below `first`.

    Args:
      module: the model.
      layers: its stack of blocks.
      first: the lowest block that still runs; at least 1.
    """

    def __init__(self, module: nn.Module, layers: Sequence[nn.Module], first: int) -> None:
        self._module = module
        self._given: Tensor | None = None  # activations to pass on instead of computing them
        self._seen: Any = None  # what the last skipped block returned
        self._in_tuple = False  # blocks of some architectures return tuples
        self._blocks = layers[:first]
        for place, block in enumerate(self._blocks):
            self._patch(block, last=place == first - 1)

    def trained_below(self, everything: Examples, device: torch.device) -> bool:
        """Whether something below `first` is trained that is no block (embeddings): then nothing may be kept."""
        return self._run(on_device(first_example(everything).inputs, device), gradients=True).requires_grad

    def remove(self) -> None:
        """Gives the blocks their own code back."""
        for block in self._blocks:
            del block.forward

    def activations(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Output of the last skipped block, `(b, T, h)`."""
        return self._run(inputs, gradients=False)

    def resume(self, inputs: Mapping[str, Tensor], activations: Tensor) -> Any:
        """The model's output on `inputs`, from known activations of the last skipped block `(b, T, h)`."""
        self._given = activations
        try:
            return self._module(**inputs)
        finally:
            self._given = None

    def _run(self, inputs: Mapping[str, Tensor], gradients: bool) -> Tensor:
        with torch.set_grad_enabled(gradients):
            self._module(**inputs)
        self._in_tuple = isinstance(self._seen, tuple)
        seen: Tensor = self._seen[0] if self._in_tuple else self._seen
        self._seen = None
        return seen

    def _patch(self, block: nn.Module, last: bool) -> None:
        own = block.forward

        def forward(*arguments: Any, **named: Any) -> Any:
            if self._given is not None:
                return (self._given,) if self._in_tuple else self._given
            result = own(*arguments, **named)
            if last:
                self._seen = result
            return result

        block.forward = forward


@final
class Activations:
    """Activations of all examples of a table, without their padding: `(sum of lengths, h)` in one flat tensor.

    Args:
      flat: the activations, on the CPU.
      lengths: `(n,)` tokens of each example.
    """

    def __init__(self, flat: Tensor, lengths: Tensor) -> None:
        self.flat, self._sizes, self._starts = flat, lengths, lengths.cumsum(0) - lengths
        self._lengths, self._begins = lengths.tolist(), self._starts.tolist()
        self.projections: Any = None  # what batched training keeps beside them, for whoever trains next

    def __len__(self) -> int:
        return len(self._lengths)

    @classmethod
    def of(
        cls, trunk: Trunk, everything: Examples, device: torch.device, path: Path | None = None, batch_size: int = 64
    ) -> Activations:
        """Computes them, or maps the file that another process has already written.

        Args:
          trunk: computes them.
          everything: all examples of the table, in order.
          device: where they are computed; they rest on the CPU.
          path: a file to hold them, shared by every process that maps it; None keeps them in memory. It belongs to
            this model and this table: a caller uses a folder of its own for each.
          batch_size: examples at once.
        """
        _, length, width = trunk.activations(on_device(first_example(everything).inputs, device)).shape
        mask = everything.inputs.get("attention_mask")
        lengths = torch.full((len(everything),), length) if mask is None else mask.sum(1)
        size = (int(lengths.sum()), width)
        if path is not None and path.exists():
            return cls(_mapped(path, size), lengths)
        part = None if path is None else path.with_name(f"{path.name}.{os.getpid()}.part")
        held = cls(torch.empty(size) if part is None else _mapped(part, size), lengths)
        for places in torch.split(lengths.argsort(descending=True, stable=True), batch_size):
            batch = trimmed(everything.take(places))
            held._put(places, trunk.activations(on_device(batch.inputs, device)).float().cpu())
        if part is not None and path is not None:
            part.replace(path)  # the mapping stays valid; nobody ever sees a half-written file
        return held

    def batch(self, rows: Tensor, width: int | None) -> Tensor:
        """Activations of the examples at `rows (b,)`, padded with zeros to `width` tokens (None: the longest)."""
        if width is None:
            width = max(self._lengths[row] for row in rows.tolist())
        padded = torch.zeros(len(rows), width, self.flat.shape[1])
        for i, row in enumerate(rows.tolist()):
            begin, length = self._begins[row], self._lengths[row]
            padded[i, :length] = self.flat[begin : begin + length]
        return padded

    def slice(self, row: int) -> slice:
        """Where an example's tokens are in `flat`."""
        return slice(self._begins[row], self._begins[row] + self._lengths[row])

    def places(self, rows: Tensor) -> Tensor:
        """Places in `flat` of the tokens of the examples at `rows (b,)`, example after example: `(sum of lengths,)`."""
        lengths = self._sizes[rows]
        ends = lengths.cumsum(0)
        return torch.arange(int(ends[-1])) + (self._starts[rows] - ends + lengths).repeat_interleave(lengths)

    def _put(self, places: Tensor, activations: Tensor) -> None:
        for place, row in zip(places.tolist(), activations, strict=True):
            begin, length = self._begins[place], self._lengths[place]
            self.flat[begin : begin + length] = row[:length]


def _mapped(path: Path, size: tuple[int, int]) -> Tensor:
    return torch.from_file(str(path), shared=True, size=size[0] * size[1]).view(size)
