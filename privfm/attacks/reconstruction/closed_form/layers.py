"""Which layer of a model meets the image first, found by running the model on images that are no client's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, final

import torch
from torch import Tensor, nn

from privfm.attacks.reconstruction.architectures import GOLDEN, asleep
from privfm.checks import InvalidArgument, nearest_if_any, require
from privfm.contracts import Observation

_SAME: Final = 1e-4
"""Relative difference of float32 arithmetic in a normalisation of the image; another map is off by far more."""


@final
@dataclass(frozen=True)
class Call:
    """A layer with parameters of its own, and what a forward pass gave it first."""

    name: str
    module: nn.Module
    given: Tensor


@final
@dataclass(frozen=True)
class FirstLinear:
    """A fully connected layer on the flattened image `x`: it is given `scale * x + shift`, entry by entry.

    Attributes:
      name: of the module.
      module: itself.
      scale, shift: `(k,)` float64.
    """

    name: str
    module: nn.Linear
    scale: Tensor
    shift: Tensor

    @property
    def names(self) -> tuple[str, str]:
        """Parameter names of weight and bias."""
        prefix = f"{self.name}." if self.name else ""
        return f"{prefix}weight", f"{prefix}bias"

    def images(self, given: Tensor, shape: tuple[int, int, int]) -> Tensor:
        """What the layer was given `(b, k)`, as images `(b, channels, height, width)`."""
        return ((given.double() - self.shift) / self.scale).reshape(-1, *shape)


def probes(model: nn.Module, shape: tuple[int, int, int]) -> Tensor:
    """A black, a white and a mixed image, `(3, channels, height, width)`, in the type of the model's weights."""
    many = int(torch.tensor(shape).prod())
    mixed = torch.arange(1, many + 1, dtype=torch.float64).mul(GOLDEN).remainder(1.0).reshape(shape)
    like = next(model.parameters())
    return torch.stack([torch.zeros(shape), torch.ones(shape), mixed]).to(like)


def calls(model: nn.Module, images: Tensor) -> tuple[Call, ...]:
    """The layers with parameters that a forward pass meets, each at its first call, in order; the model stays as it is.

    Raises:
      InvalidArgument: the model does not take such images.
    """
    found: dict[str, Call] = {}
    hooks = []
    for name, module in model.named_modules():
        if next(module.parameters(recurse=False), None) is None:
            continue

        def note(module: nn.Module, given: tuple[Any, ...], name: str = name) -> None:
            if given and isinstance(given[0], Tensor):
                found.setdefault(name, Call(name, module, given[0].detach()))

        hooks.append(module.register_forward_pre_hook(note))
    try:
        with torch.no_grad(), asleep(model):
            model(images)
    except (RuntimeError, TypeError, ValueError) as reason:
        shape = tuple(images.shape[1:])
        raise InvalidArgument(
            f"{type(model).__name__} does not take images of shape {shape}: {str(reason).strip().splitlines()[0]}; "
            "declare the shape that it takes"
        ) from reason
    finally:
        for hook in hooks:
            hook.remove()
    return tuple(found.values())


def first_linear_of(observation: Observation, layer: str = "") -> tuple[FirstLinear, tuple[int, int, int]]:
    """`first_linear` of what a server holds, and the shape of an image that it was told.

    Raises:
      InvalidArgument: the shape is not declared; see also `first_linear`.
    """
    shape = observation.declared.shape
    if shape is None:
        raise InvalidArgument(
            "needs the shape of an image, which is the model's input format: observation.told(shape=(1, 28, 28))"
        )
    return first_linear(observation.model, shape, layer), shape


def first_linear(model: nn.Module, shape: tuple[int, int, int], layer: str = "") -> FirstLinear:
    """The layer that is given the flattened image, or a normalised one.

    Args:
      model: takes `(b, *shape)`.
      shape: of an image.
      layer: the module's name; empty: the first layer with parameters that the model calls.

    Raises:
      InvalidArgument: there is none: the first layer is a convolution or a norm, or what it is given is not the image.
    """
    images = probes(model, shape)
    met = calls(model, images)
    if layer:
        names = [one.name for one in met]
        require(layer in names, f"layer={layer!r} is called nowhere in the model{nearest_if_any(layer, names)}")
        met = tuple(one for one in met if one.name == layer)
    require(bool(met), f"{type(model).__name__} has no layer with parameters")
    first = met[0]
    if not isinstance(first.module, nn.Linear):
        raise InvalidArgument(
            f"the first layer, {first.name!r}, is {type(first.module).__name__}: expected nn.Linear on the flattened "
            "image; for a vision transformer use PatchInversion, for a convolution an attack by optimisation"
        )
    given, flat = first.given.double(), images.double().flatten(1)
    fits = given.dim() >= 2 and len(given) == len(flat) and given[0].numel() == flat[0].numel()
    given = given.flatten(1) if fits else torch.full_like(flat, torch.nan)
    shift, scale = given[0], given[1] - given[0]
    error = float((given[2] - shift - scale * flat[2]).norm() / given[2].norm())
    require(
        first.module.in_features == flat.shape[1] and error < _SAME and bool((scale != 0).all()),
        f"layer {first.name!r} is not given the flattened image, entry by entry scaled and shifted; its inputs can "
        "still be read with layer_inputs, but they are no images",
    )
    return FirstLinear(first.name, first.module, scale, shift)


def completed(images: Tensor) -> tuple[Tensor, float]:
    """Fills unknown (NaN) pixels with the mean of what is known of their image, or of all images where that is nothing.

    Returns:
      The images `(b, channels, height, width)`, and the share of their pixels that was filled.
    """
    unknown = images.isnan()
    means = images.nanmean((1, 2, 3), keepdim=True)
    means = means.where(means.isfinite(), images.nanmean()).nan_to_num()
    return images.where(~unknown, means), float(unknown.double().mean())
