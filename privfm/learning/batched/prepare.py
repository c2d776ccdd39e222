"""Before clients are trained together: what stands against it, and a comparison with the model's own code."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from privfm.checks import InvalidArgument, first_line
from privfm.contracts import Examples
from privfm.learning.batched.engine import BatchedDescent
from privfm.learning.batched.first_token import LastBlock, last_block
from privfm.learning.batched.refusals import problems
from privfm.learning.trunk import on_device, trimmed

if TYPE_CHECKING:
    from privfm.learning.workbench import Workbench

_SPREAD = 0.02
"""Trained weights are compared away from where they start: LoRA starts at B = 0, where A has no gradient."""
_TOLERANCE = 2e-3
"""Relative error of one example's gradient, in float32; what is computed differently is off by percents."""
_LOOSE = 0.1
"""The same where frozen weights are of a 16-bit type (unit roundoff 2^-8), and rounding differs by layer."""


def prepared(
    bench: Workbench, tokens: int | None = None, dropout: bool = False, autocast: torch.dtype | None = None
) -> BatchedDescent:
    """Batched training for a model and its data, checked.

    Gradients of the longest, the shortest and a third example of the table, at two clients with different weights, are
    compared with those of the model's own code, one by one.

    Args:
      bench: model and data.
      tokens: see `BatchedDescent`, as of the others.
      dropout: wakes it.
      autocast: type of the frozen part.

    Raises:
      InvalidArgument: what stands against it, by module; clients of this model are trained one by one.
    """
    found = problems(bench.module, bench.built.layers, dropout)
    if found:
        raise InvalidArgument("; ".join(found))
    try:
        weights, batch = _trial(bench)
        expected = _one_by_one(bench, weights, batch)
        error = torch.inf
        for narrow in dict.fromkeys((_narrow(bench), None)):  # at worst without the shortcut
            got = BatchedDescent(bench, tokens, first_token=narrow).gradients(weights, batch)
            error = _error(got, expected)
            if error <= _tolerance(bench):
                return BatchedDescent(bench, tokens, dropout=dropout, autocast=autocast, first_token=narrow)
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError) as reason:
        raise InvalidArgument(f"the model does not run on packed tokens: {first_line(reason)}") from reason
    finally:
        bench.load(bench.initial)
    raise InvalidArgument(f"on packed tokens the gradient of an example is {error:.2g} of its length off")


def _trial(bench: Workbench) -> tuple[Tensor, list[Examples]]:
    """Weights of two clients `(2, d)`, and their examples: two and one."""
    everything = bench.everything
    mask = everything.inputs.get("attention_mask")
    lengths = torch.full((len(everything),), bench.width) if mask is None else mask.sum(1)
    order = lengths.argsort(stable=True)
    longest, shortest, middle = order[-1:], order[:1], order[len(order) // 2][None]
    generator = torch.Generator().manual_seed(0)  # a check, the same every time
    dtype = next(iter(bench.parameters.values())).dtype
    change = _SPREAD * torch.randn(2, bench.layout.d, generator=generator)
    weights = (bench.initial + change).to(bench.device, dtype)
    return weights, [everything.take(torch.cat([longest, shortest])), everything.take(middle)]


def _one_by_one(bench: Workbench, weights: Tensor, batch: list[Examples]) -> Tensor:
    """Gradients of every example `(3, d)`, by the model's own code."""
    rows: list[Tensor] = []
    for own, examples in zip(weights, batch, strict=True):
        bench.load(own.float().cpu())
        for place in range(len(examples)):
            loss = bench.losses(examples.take(torch.tensor([place]))).sum()
            found = torch.autograd.grad(loss, list(bench.parameters.values()))
            rows.append(bench.layout.flatten(dict(zip(bench.parameters, found, strict=True))))
    return torch.stack(rows)


def _narrow(bench: Workbench) -> LastBlock | None:
    """The shortcut for what reads first tokens only, where it applies."""
    if bench.width < 2 or bench.first == len(bench.built.layers):  # nothing of the last block is trained
        return None
    mask = bench.everything.inputs.get("attention_mask")
    longest = torch.zeros(1, dtype=torch.int64) if mask is None else mask.sum(1).argmax()[None]
    one = trimmed(bench.everything.take(longest))

    def call() -> Tensor:
        output: Any = bench.module(**on_device(one.inputs, bench.device))
        logits: Tensor = getattr(output, "logits", output)
        return logits

    return last_block(call, bench.built.layers)


def _error(got: Tensor, expected: Tensor) -> float:
    """Largest relative error of a row."""
    length = expected.double().norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
    return float(((got.double() - expected.double()).norm(dim=1) / length).nan_to_num(torch.inf).max())


def _tolerance(bench: Workbench) -> float:
    precise = all(p.dtype in (torch.float32, torch.float64) for p in bench.module.parameters())
    return _TOLERANCE if precise else _LOOSE
