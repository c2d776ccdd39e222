"""What cannot be batched, by the name of the module that is the reason."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from privfm.learning.batched.patches import transformers_models

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Names by which configurations of transformers count experts; a router's capacity or loss mixes examples."""
_SCORES = ("attn_logit_softcapping", "attention_logit_cap")
_WINDOWS = ("sliding_window", "attention_chunk_size")
_DROPOUT = ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop")


def problems(module: nn.Module, blocks: Sequence[nn.Module], dropout: bool = False) -> list[str]:
    """Why clients of this model cannot be trained in one pass; empty where they can.

    What is listed trains all the same, client after client. Nothing of the kind is left to chance: attention that has
    features which are not known here is refused where it runs, and before anything is trained the gradients of some
    examples are compared with those of the model's own code.

    Args:
      module: the model; what requires gradients is trained.
      blocks: its stack of blocks from the bottom up.
      dropout: whether dropout is awake.
    """
    found = list(_stack(module, blocks))
    found += [reason for name, part in module.named_modules() for reason in _part(name, part)]
    found += _trained(module)
    for model in transformers_models(module):
        found += _configuration(model, dropout)
    return found


def _stack(module: nn.Module, blocks: Sequence[nn.Module]) -> Iterator[str]:
    name = type(module).__name__
    if not blocks:
        yield f"{name} has no stack of like blocks between whose first and last tokens could be packed"
    elif not transformers_models(module):
        yield f"{name} is no transformers model: its attention cannot be exchanged"
    configuration = getattr(module, "active_peft_config", None)
    if getattr(configuration, "is_prompt_learning", False):
        yield f"{name} trains a prompt or a prefix, which changes the tokens every block sees"


def _part(name: str, part: nn.Module) -> Iterator[str]:
    """What stands against one module, whether it is trained or not."""
    from peft.tuners.lora.layer import Linear as LinearAdapter
    from peft.tuners.tuners_utils import BaseTunerLayer

    where = f"{name} ({type(part).__name__})"
    if isinstance(part, _BatchNorm):
        yield f"{where}: batch statistics mix clients"
    adapter: Any = part
    if isinstance(part, BaseTunerLayer) and adapter.__class__ is not LinearAdapter:
        yield f"{where}: only LoRA on linear layers is batched"
    elif isinstance(part, BaseTunerLayer):
        if len(adapter.lora_A) != 1:
            yield f"{where}: {len(adapter.lora_A)} adapters, expected one"
        elif list(adapter.active_adapters) != list(adapter.lora_A) or adapter.disable_adapters:
            yield f"{where}: its adapter is not active"
        if adapter.merged:
            yield f"{where}: its adapter is merged into the weights"
        if any(adapter.lora_variant.values()):
            kinds = ", ".join(sorted({type(variant).__name__ for variant in adapter.lora_variant.values()}))
            yield f"{where}: {kinds} is no plain product of two matrices"
        if any(adapter.lora_bias.values()):
            yield f"{where}: the bias of LoRA is not batched"


def _trained(module: nn.Module) -> Iterator[str]:
    """What is trained but belongs to no layer that is batched."""
    types = {p.dtype for p in module.parameters() if p.requires_grad}
    if len(types) != 1 or not types <= {torch.float32, torch.float64}:
        yield f"trained values are {', '.join(sorted(map(str, types))) or 'missing'}, expected all float32"
    for name, part in module.named_modules():
        own = [own for own, p in part.named_parameters(recurse=False) if p.requires_grad]
        if own and type(part) is not nn.Linear:
            yield f"{name} ({type(part).__name__}): trained {' and '.join(own)}; only linear layers are batched"


def _configuration(model: Any, dropout: bool) -> Iterator[str]:
    """What stands against a transformers model as it is configured."""
    name, configuration = type(model).__name__, model.config.get_text_config()
    if getattr(model.config, "is_encoder_decoder", False):
        yield f"{name} has two stacks of blocks, an encoder's and a decoder's"
    if not getattr(model, "_supports_attention_backend", False):
        yield f"{name} computes its attention by itself: tokens cannot be packed around it"
    given = {key: getattr(configuration, key, None) for key in (*_EXPERTS, *_SCORES, *_WINDOWS, *_DROPOUT)}
    for key in _EXPERTS:
        if given[key]:
            yield f"{name}: {key}={given[key]}: routing to experts may depend on the other examples of a pass"
    for key in (*_SCORES, *_WINDOWS):
        windowed = key not in _WINDOWS or getattr(configuration, "use_sliding_window", True)
        if given[key] and windowed:
            yield f"{name}: {key}={given[key]}: attention over packed tokens does not know it"
    kinds = set(getattr(configuration, "layer_types", None) or ()) - {"full_attention"}
    if kinds:
        yield f"{name}: layers of type {', '.join(sorted(kinds))}: attention over packed tokens is full attention"
    for key in _DROPOUT:
        if dropout and given[key]:
            yield f"{name}: {key}={given[key]}: what is dropped inside attention cannot be replayed; set it to 0"
