"""What of a model runs differently while many clients train on it; everything is put back afterwards.

Nothing is replaced: modules keep their places, names and values, only their `forward` is another one for the while.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from privfm.checks import InvalidArgument, require
from privfm.learning.batched.layers import Pass, dropout_forward, linear_forward, lora_forward
from privfm.learning.batched.packing import ATTENTION, packed_attention

Forward = Callable[..., Any]
Now = Callable[[], Pass]

_POSITIONS = "position_embeddings"
"""By this name transformers hands rotations of queries and keys, one a token, to its blocks."""
_UNUSED = frozenset({"position_ids", "cache_position"})
"""Tensors that blocks are given and the attention over packed tokens does not read."""


def trained_forwards(module: nn.Module, trained: frozenset[str], now: Now, dropout: bool) -> dict[nn.Module, Forward]:
    """How the trained layers, and under `dropout` the dropout layers, run under a pass; by module."""
    from peft.tuners.lora.layer import LoraLayer

    found: dict[nn.Module, Forward] = {}
    adapters = {part for part in module.modules() if isinstance(part, LoraLayer)}
    inside = {part for adapter in adapters for part in _own_parts(adapter)}
    for number, (name, part) in enumerate(module.named_modules()):
        if part in adapters:
            found[part] = lora_forward(part, name, number, now)
        elif part in inside:
            continue
        elif isinstance(part, nn.Linear) and {f"{name}.weight", f"{name}.bias"} & trained:
            found[part] = linear_forward(part, name, now)
        elif dropout and isinstance(part, nn.Dropout) and part.p > 0:
            found[part] = dropout_forward(part, number, now)
    return found


def block_forwards(
    blocks: Sequence[nn.Module], cut: int, now: Now, instead: Mapping[nn.Module, Forward]
) -> dict[nn.Module, Forward]:
    """How the blocks of a stack run under a pass: on packed tokens, from known activations where there are any.

    Args:
      blocks: from the bottom up.
      cut: the lowest block above known activations; the number of blocks if none is trained.
      now: the running pass.
      instead: code of blocks that run something else than their own.
    """
    top = len(blocks) - 1
    return {
        block: _block_forward(instead.get(block, block.forward), place, place == top, cut, now)
        for place, block in enumerate(blocks)
    }


def _block_forward(own: Forward, place: int, last: bool, cut: int, now: Now) -> Forward:

    def forward(hidden: Tensor, *arguments: Any, **named: Any) -> Any:
        run = now()
        packing = run.packing
        if run.known is not None and place < cut:  # the embeddings' output, or what an earlier block passed on
            return packing.unpack(run.known) if last else hidden
        if run.known is not None and place == cut:
            hidden = run.known
        elif place == 0:
            hidden = packing.pack(hidden)
        result = own(hidden, *_unmasked(arguments), **_packed(run, named))
        out: Tensor = result[0] if isinstance(result, tuple) else result
        if last:
            out = packing.unpack(out) if run.others is None else packing.unpack_first(out)
            run.others = None
        return (out, *result[1:]) if isinstance(result, tuple) else out

    return forward


def _unmasked(arguments: Sequence[Any]) -> Sequence[Any]:
    """What a block is called with besides its tokens, if nothing of it belongs to tokens."""
    require(
        not any(isinstance(given, Tensor) for given in arguments),
        "the model hands tensors to its blocks, by place, that are not known here",
    )
    return arguments


def _packed(run: Pass, named: Mapping[str, Any]) -> dict[str, Any]:
    """What a block is called with by name, with rotations packed like the tokens they belong to."""
    packed = dict(named)
    if named.get(_POSITIONS) is not None:
        packed[_POSITIONS] = tuple(run.packing.pack(part) for part in named[_POSITIONS])
    unknown = [name for name, given in named.items() if isinstance(given, Tensor) and name not in _UNUSED]
    require(not unknown, f"the model hands its blocks tensors that are not known here: {', '.join(sorted(unknown))}")
    return packed


def _own_parts(adapter: nn.Module) -> Iterator[nn.Module]:
    """What is inside an adapted layer beside the layer it adapts: its `forward` is never called under a pass."""
    base = set(adapter.get_submodule("base_layer").modules())
    return (part for part in adapter.modules() if part is not adapter and part not in base)


@contextmanager
def running_as(forwards: Mapping[nn.Module, Forward]) -> Iterator[None]:
    """Modules run as given; afterwards as before."""
    before = {module: module.__dict__.get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module, own in before.items():
            if own is None:
                module.__dict__.pop("forward", None)
            else:
                module.forward = own


def attending_packed(models: Sequence[Any]) -> None:
    """Makes sure, once, that transformers models let their attention be exchanged.

    Raises:
      InvalidArgument: one does not.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, packed_attention)
    for model in models:
        own = model.config._attn_implementation
        try:
            model.set_attn_implementation(ATTENTION)
            if model.config._attn_implementation != ATTENTION:
                raise InvalidArgument(f"{type(model).__name__} does not let its attention be exchanged")
        finally:
            model.set_attn_implementation(own)


@contextmanager
def packed(models: Sequence[Any]) -> Iterator[None]:
    """Transformers models attend over packed tokens; afterwards as before.

    Their configurations are written to, which layers read in every call: the models' own method walks all modules.
    """
    before = [model.config._attn_implementation for model in models]
    try:
        for model in models:
            model.config._attn_implementation = ATTENTION
        yield
    finally:
        for model, own in zip(models, before, strict=True):
            model.config._attn_implementation = own


def transformers_models(module: nn.Module) -> list[Any]:
    """The outermost transformers models inside a module."""
    from transformers import PreTrainedModel

    found: list[Any] = []
    for part in module.modules():
        if isinstance(part, PreTrainedModel) and not any(part in set(outer.modules()) for outer in found):
            found.append(part)
    return found
