"""A model of images as an attack needs it: gradients at parameters of one's own, that can be differentiated again."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, Final, final

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from privfm.checks import require

_PIECEWISE: Final = {
    "ReluBackward": "ReLU",
    "LeakyReluBackward": "leaky ReLU",
    "RreluWithNoiseBackward": "leaky ReLU",
    "PreluKernelBackward": "PReLU",
    "HardtanhBackward": "ReLU6",
    "ThresholdBackward": "threshold",
    "MaxPool": "max-pooling",
    "MkldnnMaxPool": "max-pooling",
    "AdaptiveMaxPool": "max-pooling",
    "AmaxBackward": "maximum",
}
"""Beginnings of names of autograd's nodes whose second derivative is zero almost everywhere, and what they are."""


def batch_normalisation(model: nn.Module) -> dict[str, nn.Module]:
    """The model's layers of batch normalisation, by name."""
    return {name: one for name, one in model.named_modules() if isinstance(one, nn.modules.batchnorm._BatchNorm)}


def has_own_batch_statistics(model: nn.Module) -> bool:
    """Whether a layer normalises by the statistics of the client's batch, which the server does not have."""
    return any(one.training and one.track_running_stats for one in batch_normalisation(model).values())


@final
class ImageNetwork:
    """Classifies images by a private copy of a model, in eval mode; the model given stays as it is.

    Images go in by the name `pixel_values` where the model's forward has it, else as the one positional argument.
    Logits are its output or its output's `logits`. The loss is the mean cross-entropy.

    Args:
      model: as clients received it.
      dtype: in which to compute; None: the model's own, but never less than float32, in which second derivatives drown.

    Raises:
      InvalidArgument: the model has no parameter of a float type.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype | None = None) -> None:
        trained = {name for name, one in model.named_parameters() if one.requires_grad}
        first = next((one for one in model.parameters() if one.dtype.is_floating_point), None)
        require(first is not None, "the model has no parameter of a float type: nothing depends on its input")
        assert first is not None
        self.own_dtype = torch.promote_types(first.dtype, torch.float32)
        self.dtype = dtype or self.own_dtype
        self.device = first.device
        self.module = deepcopy(model).eval().requires_grad_(False).to(self.dtype)
        self.parameters: dict[str, Tensor] = {name: one.detach() for name, one in self.module.named_parameters()}
        self.trained = tuple(name for name in self.parameters if name in trained)
        self._keyword = "pixel_values" in inspect.signature(model.forward).parameters

    @property
    def like(self) -> Tensor:
        """A tensor of the type and on the device of the computation."""
        return torch.empty(0, dtype=self.dtype, device=self.device)

    def logits(self, images: Tensor, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        """`(b, channels, height, width)` -> `(b, labels)`, differentiable twice in images and parameters.

        Raises:
          InvalidArgument: the model does not return logits.
        """
        values = dict(self.parameters if parameters is None else parameters)
        given = {"pixel_values": images} if self._keyword else {}
        with _differentiable_twice():
            output: Any = functional_call(self.module, values, () if self._keyword else (images,), given)
        logits = getattr(output, "logits", output)
        require(
            isinstance(logits, Tensor) and logits.dim() == 2,
            f"the model returns {type(output).__name__}: expected logits (b, labels), or an output that has `.logits`",
        )
        result: Tensor = logits
        return result

    def labels(self, shape: tuple[int, int, int]) -> int:
        """How many labels the model tells apart, from one image's logits."""
        with torch.no_grad():
            return int(self.logits(self.like.new_zeros((1, *shape))).shape[1])

    def gradients(
        self,
        images: Tensor,
        targets: Tensor,
        names: Collection[str],
        parameters: Mapping[str, Tensor] | None = None,
        again: bool = True,
    ) -> dict[str, Tensor]:
        """The gradient of the mean cross-entropy by parameter name.

        Args:
          images: `(b, channels, height, width)`.
          targets: labels `(b,)`, or probabilities `(b, labels)`.
          names: of the parameters it is taken in.
          parameters: where; None: the model's own.
          again: whether the result can be differentiated, in images, targets and parameters.

        Returns:
          In the order of `names`; zero where the loss does not depend on the parameter.
        """
        values = dict(self.parameters if parameters is None else parameters)
        for name in names:
            if not values[name].requires_grad:
                values[name] = values[name].detach().requires_grad_()
        loss = nn.functional.cross_entropy(self.logits(images, values), targets)
        wanted = [values[name] for name in names]
        found = torch.autograd.grad(loss, wanted, create_graph=again, materialize_grads=True)
        return dict(zip(names, found, strict=True))

    def piecewise(self, shape: tuple[int, int, int]) -> tuple[str, ...]:
        """What in the network has no second derivative, in words; empty: it is smooth.

        Read off the graph of one image's forward pass, so that calls of `torch.nn.functional` are found too.
        """
        image = torch.zeros((1, *shape), dtype=self.dtype, device=self.device, requires_grad=True)
        names = {type(node).__name__ for node in _nodes(self.logits(image))}
        kinds = {kind for start, kind in _PIECEWISE.items() for name in names if name.startswith(start)}
        return tuple(sorted(kinds))

    @contextmanager
    def batch_statistics(self) -> Iterator[list[tuple[nn.Module, Tensor]]]:
        """Within, every forward pass appends each layer of batch normalisation and its input, in order of use."""
        seen: list[tuple[nn.Module, Tensor]] = []

        def keep(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen.append((layer, inputs[0]))

        hooks = [one.register_forward_pre_hook(keep) for one in batch_normalisation(self.module).values()]
        try:
            yield seen
        finally:
            for hook in hooks:
                hook.remove()


@contextmanager
def _differentiable_twice() -> Iterator[None]:
    """Fused attention has no second derivative; the plain one does."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def _nodes(output: Tensor) -> Iterator[Any]:
    """Every node of autograd's graph behind a tensor."""
    waiting, met = [output.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in met:
            continue
        met.add(node)
        yield node
        waiting.extend(before for before, _ in node.next_functions)
