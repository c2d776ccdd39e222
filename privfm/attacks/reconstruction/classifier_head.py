"""A classifier's last linear layer: found by running the model, addressed by parameter name."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Generator, Tensor, nn

from privfm.attacks.reconstruction.architectures import asleep
from privfm.checks import InvalidArgument, first_line, require

_LENGTH: Final = 12
"""Tokens of a random input, about a short sentence's."""

_SAME: Final = 1e-5
"""Logits nearer to a layer's output than this share of the largest are that output; a pooled position is a copy."""

_PROVIDE: Final = "give the weight's parameter name as `head`"
"""The way out of every error here."""


def head_of(model: nn.Module, inputs: Tensor | None = None) -> tuple[str, str | None]:
    """Parameter names of weight and bias of the linear layer whose output is the logits; None for a missing bias.

    The model is run once, without dropout, and the last linear layer that has put out the logits is taken, in whatever
    order modules are registered. Without inputs to run it on, the structure must leave no choice.

    Args:
      model: a classifier; adapters around it do not matter, unless the head itself is an adapter's.
      inputs: token ids `(1, T)` or images `(1, channels, height, width)`; None: tokens for a model with a token
        embedding, else nothing is run.

    Raises:
      InvalidArgument: no layer, or more than one, could be it.

    >>> head_of(nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)))
    ('3.weight', '3.bias')
    """
    probe = random_tokens(model, 1, Generator().manual_seed(0)) if inputs is None else inputs[:1]
    if probe is None:
        return _names(model, _by_structure(model))
    _, _, module = traced(model, probe)
    return _names(model, module)


def traced(model: nn.Module, inputs: Tensor, weight_name: str | None = None) -> tuple[Tensor, Tensor, nn.Module]:
    """Logits `(b, c)`, what the head was given for them `(b, h)`, both float64 on the CPU, and the head, by a run.

    Args:
      model: is run once, without dropout and without gradients; nothing of it changes.
      inputs: token ids `(b, T)` without padding, or images `(b, channels, height, width)`.
      weight_name: of the head; None: the last linear layer that has put out the logits.

    Raises:
      InvalidArgument: no linear layer puts out the logits, they are no classifier's, or the model does not run.
    """
    weights = dict(model.named_parameters())
    wanted = None if weight_name is None else weights[weight_name]
    calls: list[tuple[nn.Module, Tensor, Tensor]] = []

    def keep(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        if wanted is None or module.weight is wanted:
            calls.append((module, given[0], output))

    some = next(model.parameters())
    inputs = inputs.to(some.device, some.dtype if inputs.dtype.is_floating_point else inputs.dtype)
    hooks = [module.register_forward_hook(keep) for module in model.modules() if isinstance(module, nn.Linear)]
    try:
        with torch.no_grad(), asleep(model):
            output: Any = (
                model(inputs)
                if inputs.dtype.is_floating_point
                else model(input_ids=inputs, attention_mask=torch.ones_like(inputs))
            )
    except (RuntimeError, TypeError, ValueError, IndexError) as reason:
        shape = tuple(inputs.shape)
        raise InvalidArgument(f"the model does not run on inputs {shape}: {first_line(reason)}; {_PROVIDE}") from reason
    finally:
        for hook in hooks:
            hook.remove()
    logits = getattr(output, "logits", output)
    require(
        isinstance(logits, Tensor) and logits.dim() == 2,
        "the model does not put out logits (b, labels); labels of a language model are its target tokens",
    )
    for module, given, put_out in reversed(calls):
        features = _behind(logits, given, put_out)
        if features is not None:
            return logits.cpu().double(), features.cpu().double(), module
    raise InvalidArgument(f"no linear layer of {type(model).__name__} puts out the logits: {_PROVIDE}")


def _behind(logits: Tensor, given: Tensor, put_out: Tensor) -> Tensor | None:
    """The rows that a layer was given for these logits; None where they are not its output."""
    if put_out.shape[-1] != logits.shape[-1] or put_out.shape[0] != logits.shape[0]:
        return None
    outputs, rows = put_out.reshape(len(logits), -1, logits.shape[-1]), given.reshape(len(logits), -1, given.shape[-1])
    nearest = (outputs - logits[:, None, :]).abs().amax(2).min(1)  # one position of several may be the one that counts
    if not bool((nearest.values <= _SAME * logits.abs().max().clamp_min(1e-6)).all()):
        return None
    return rows[torch.arange(len(logits), device=rows.device), nearest.indices]


def _by_structure(model: nn.Module) -> nn.Module:
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    leaves = [module for module in model.modules() if not list(module.children())]
    if isinstance(model, nn.Sequential) and isinstance(leaves[-1], nn.Linear):
        return leaves[-1]
    if len(linear) == 1:
        return linear[0]
    raise InvalidArgument(
        f"{type(model).__name__} has {len(linear)} linear layers: {_PROVIDE}, or declare `shape` of an image"
    )


def _names(model: nn.Module, module: nn.Module) -> tuple[str, str | None]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    bias = getattr(module, "bias", None)
    weight = names[id(module.weight)]
    return weight, None if bias is None else names[id(bias)]


def given_head(model: nn.Module, head: str) -> tuple[str, str | None]:
    """Names of weight and bias of the linear layer with this weight.

    Raises:
      InvalidArgument: there is none.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and f"{name}.weight".removeprefix(".") == head:
            return _names(model, module)
    raise InvalidArgument(f"head={head!r}: the model has no linear layer with a weight of this name")


def random_tokens(model: nn.Module, count: int, generator: Generator) -> Tensor | None:
    """Token ids `(count, 12)` for a model with a token embedding; None for another."""
    find = getattr(model, "get_input_embeddings", None)
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    try:
        embedding = find() if find is not None else None
    except NotImplementedError:  # transformers, of a model that has none (ResNet, MobileNet, Segformer)
        embedding = None
    if not isinstance(embedding, nn.Embedding):
        embedding = embeddings[0] if embeddings else None
    if embedding is None:
        return None
    return torch.randint(embedding.num_embeddings, (count, _LENGTH), generator=generator)
