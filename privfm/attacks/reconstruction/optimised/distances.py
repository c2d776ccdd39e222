"""How far an imitated gradient is from the one that was observed, tensor by tensor."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from privfm.checks import InvalidArgument, non_negative

_ROUNDING: Final = 1e-6
"""A tensor of less than this share of the largest one's norm is float32 rounding: under softmax attention the gradient
of a key's bias is 0 exactly, and the direction of its rounding says nothing."""


@dataclass(frozen=True)
class GradientDistance(ABC):
    """A function of an imitated and an observed gradient; 0 where they agree."""

    @abstractmethod
    def __call__(self, imitated: Mapping[str, Tensor], observed: Observed) -> Tensor:
        """The distance, a scalar that gradients flow through.

        Args:
          imitated: by parameter name; of every name in `observed.tensors`.
          observed: what was sent.
        """


@final
class Observed:
    """A gradient as it is compared: what is not seen is 0 on both sides.

    Args:
      tensors: by parameter name, NaN where nothing is seen.

    Attributes:
      tensors: those of which something is seen, in order, 0 where nothing is.
      seen: by name, 1 where something is seen; None: everywhere.
      norms: of the seen parts.
      informative: names of those that are more than rounding.

    Raises:
      InvalidArgument: nothing is seen, or all that is seen is zero.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        hidden = {name: tensor.isnan() for name, tensor in tensors.items()}
        self.tensors = {name: each.nan_to_num(0.0) for name, each in tensors.items() if not bool(hidden[name].all())}
        self.seen = {name: (~hidden[name]).to(tensors[name]) if hidden[name].any() else None for name in self.tensors}
        self.norms = {name: each.norm() for name, each in self.tensors.items()}
        largest = max(map(float, self.norms.values()), default=0.0)
        if largest == 0.0:
            raise InvalidArgument("the gradients are zero or hidden: nothing can be matched")
        self.informative = tuple(name for name, norm in self.norms.items() if float(norm) > _ROUNDING * largest)

    def visible(self, name: str, imitated: Tensor) -> Tensor:
        """An imitated tensor with 0 where nothing was seen."""
        seen = self.seen[name]
        return imitated if seen is None else imitated * seen


@final
@dataclass(frozen=True)
class Cosine(GradientDistance):
    """`1/L sum_l (1 - <g_l, g*_l> / (|g_l| |g*_l|))`, over the tensors that are more than rounding; of no scale.

    Source: Balunovic et al., "LAMP", NeurIPS 2022, equation 5. That rounding is left out is ours.
    """

    def __call__(self, imitated: Mapping[str, Tensor], observed: Observed) -> Tensor:
        terms = []
        for name in observed.informative:
            ours, theirs, norm = observed.visible(name, imitated[name]), observed.tensors[name], observed.norms[name]
            terms.append(1 - _cosine(ours, theirs, norm))
        return torch.stack(terms).mean()


@final
@dataclass(frozen=True)
class SquaredAndAbsolute(GradientDistance):
    """`sum_l |g_l - g*_l|_2^2 + alpha(l) |g_l - g*_l|_1`. It needs the gradient's own scale: no clipping.

    Args:
      absolute: alpha of the first tensor.
      falling: alpha falls linearly to `absolute / L` at the last one; else it is the same for all.

    Source: Deng et al., "TAG: gradient attack on transformer-based language models", Findings of EMNLP 2021, equation
    for D; that alpha is larger for early layers is theirs, that it falls linearly is the convention of later code.
    """

    absolute: float
    falling: bool = False

    def __post_init__(self) -> None:
        non_negative("absolute", self.absolute)

    def __call__(self, imitated: Mapping[str, Tensor], observed: Observed) -> Tensor:
        count = len(observed.tensors)
        terms = []
        for place, (name, theirs) in enumerate(observed.tensors.items()):
            share = (count - place) / count if self.falling else 1.0
            terms.append(_apart(observed.visible(name, imitated[name]), theirs, self.absolute * share))
        return torch.stack(terms).sum()


class _Known(torch.autograd.Function):
    """A scalar of one tensor whose derivative is known: one pass over the tensor instead of autograd's several."""

    @staticmethod
    def forward(ctx: Any, ours: Tensor, value: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return above * slope, None, None


def _known(ours: Tensor, value: Tensor, slope: Callable[[], Tensor]) -> Tensor:
    """The value, with its derivative by `ours` where one will be asked for."""
    if not ours.requires_grad:
        return value
    found: Tensor = _Known.apply(ours, value, slope())  # type: ignore[no-untyped-call]
    return found


def _cosine(ours: Tensor, theirs: Tensor, norm: Tensor) -> Tensor:
    """`<ours, theirs> / (|ours| norm)`; of an imitation that is all but zero, the product alone."""
    found = ours.detach()
    product, length = _dot(found, theirs), _dot(found, found).sqrt()
    length = length.clamp_min(torch.finfo(found.dtype).eps * norm)
    value = product / (length * norm)

    def slope() -> Tensor:
        return torch.add(theirs * float(1 / (length * norm)), found, alpha=-float(value / length.square()))

    return _known(ours, value, slope)


def _apart(ours: Tensor, theirs: Tensor, absolute: float) -> Tensor:
    """`|ours - theirs|_2^2 + absolute |ours - theirs|_1`."""
    apart = ours.detach() - theirs
    value = _dot(apart, apart) + absolute * apart.abs().sum()
    return _known(ours, value, lambda: 2 * apart + absolute * apart.sign())


def _dot(one: Tensor, other: Tensor) -> Tensor:
    return one.flatten().dot(other.flatten())
