"""Classifiers that read the first token only: the last block computes nothing else (exact).

Keys and values of the last block are needed for all tokens; queries, the attention's output and everything behind it
for one token an example. The block's own code runs on the first tokens; only its key and value layers are given what
they would have been given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from privfm.learning.batched.patches import Forward, Now

_KEYS = ("key", "k_proj", "k_lin")
_VALUES = ("value", "v_proj", "v_lin")
"""Names that transformers gives to the layers of keys and values. What goes by another name is computed in full."""


@final
@dataclass(frozen=True)
class LastBlock:
    """Where the last block makes its keys and values, and from what.

    Attributes:
      block: the block.
      key, value: its layers.
      norm: what comes before them; None where they see the block's input as it is.
    """

    block: nn.Module
    key: nn.Module
    value: nn.Module
    norm: nn.Module | None

    def forwards(self, forwards: Mapping[nn.Module, Forward], now: Now) -> dict[nn.Module, Forward]:
        """How keys and values run under a pass, given how they would run anyway."""
        return {
            part: _kept(forwards.get(part, part.forward), name, now)
            for part, name in ((self.key, "keys"), (self.value, "values"))
        }

    def narrowed(self, now: Now) -> Forward:
        """The block's own code, on first tokens; to be wrapped where tokens are packed and unpacked."""
        own: Forward = self.block.forward

        def forward(hidden: Tensor, *arguments: Any, **named: Any) -> Any:
            run = now()
            run.others = hidden if self.norm is None else self.norm(hidden)
            try:
                return own(run.packing.first(hidden), *arguments, **named)
            finally:
                run.attention.keys = run.attention.values = None

        return forward


def _kept(own: Forward, name: str, now: Now) -> Forward:
    def forward(x: Tensor) -> Tensor:
        run = now()
        complete: Tensor = own(run.others)
        setattr(run.attention, name, complete)
        return complete.new_zeros((*x.shape[:-1], complete.shape[-1]))  # of the right shape; attention reads the others

    return forward


def last_block(call: Callable[[], Tensor], blocks: Sequence[nn.Module]) -> LastBlock | None:
    """The last block, if nothing but its first token's output is read and its keys and values can be found.

    Args:
      call: the model on one example of two tokens or more, with its gradients: -> logits.
      blocks: its stack.
    """
    block = blocks[-1]
    named = {name.rpartition(".")[2]: part for name, part in block.named_modules() if ".base_layer" not in name}
    key, value = (next((named[name] for name in names if name in named), None) for names in (_KEYS, _VALUES))
    if key is None or value is None:
        return None
    seen, inputs, read = _watched(call, block, key, value)
    if not read:
        return None
    if inputs[key] is not inputs[value]:
        return None
    source, given = inputs[key], inputs[block]
    if source is given:
        return LastBlock(block, key, value, None)
    norms = [part for part, (before, after) in seen.items() if before is given and after is source]
    return LastBlock(block, key, value, norms[0]) if len(norms) == 1 else None


def _watched(
    call: Callable[[], Tensor], block: nn.Module, key: nn.Module, value: nn.Module
) -> tuple[dict[nn.Module, tuple[Any, Any]], dict[nn.Module, Any], bool]:
    """What the block's parts saw and made, what block, keys and values saw, and whether one token alone is read."""
    seen: dict[nn.Module, tuple[Any, Any]] = {}
    inputs: dict[nn.Module, Any] = {}
    outputs: list[Tensor] = []

    def watch(part: nn.Module, arguments: tuple[Any, ...], named: Any, result: Any) -> Any:
        if arguments and isinstance(result, Tensor):
            seen[part] = (arguments[0], result)
        if arguments and part in (block, key, value):
            inputs[part] = arguments[0]
        if part is not block:
            return None
        outputs.append((result[0] if isinstance(result, tuple) else result).detach().requires_grad_())
        return (outputs[-1], *result[1:]) if isinstance(result, tuple) else outputs[-1]

    hooks = [part.register_forward_hook(watch, with_kwargs=True) for part in block.modules()]
    try:
        with torch.enable_grad():
            logits = call()
    finally:
        for hook in hooks:
            hook.remove()
    if len(outputs) != 1 or not {block, key, value} <= inputs.keys() or not logits.requires_grad:
        return seen, inputs, False
    # Weights that do not cancel: a sum of softmax-like outputs would have no gradient at all.
    weights = torch.arange(1.0, logits.numel() + 1, device=logits.device, dtype=logits.dtype).view(logits.shape).sqrt()
    (slope,) = torch.autograd.grad((logits * weights).sum(), outputs[0], allow_unused=True)
    first_alone = slope is not None and slope.shape[1] > 1 and bool(slope[:, 0].any()) and not bool(slope[:, 1:].any())
    return seen, inputs, first_alone
