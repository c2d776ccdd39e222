"""What readers of any transformer's architecture share: its attention's maps, and its own code run up to a module."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, TypeVar, final

import torch
from torch import Tensor, nn

from privfm.checks import InvalidArgument

GOLDEN: Final = 0.6180339887498949
"""Fractional part of the golden ratio: its multiples modulo 1 are spread evenly and do not repeat."""

SAME: Final = 1e-3
"""Relative difference of float32 or bfloat16 arithmetic; another formula is off by far more."""


@final
@dataclass(frozen=True)
class Projection:
    """The query, key or value map of one block, `outputs x inputs`, as the model stores it.

    Attributes:
      weight: the parameter's name.
      bias: the parameter's name; None where there is none.
      first: first of the outputs in a weight that holds several maps.
      outputs: number of them.
      inputs: width of what it is given.
      transposed: stored as `(inputs, outputs)`.
      lora_a: name of the adapter's A `(rank, inputs)`; None where the map has no adapter.
      lora_b: name of the adapter's B `(outputs, rank)`.
      scaling: of the adapter's product.
    """

    weight: str
    bias: str | None
    first: int
    outputs: int
    inputs: int
    transposed: bool = False
    lora_a: str | None = None
    lora_b: str | None = None
    scaling: float = 1.0

    def matrix(self, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """Its part of the weight's gradient (or of the weight), `(outputs, inputs)`; None where it was not sent."""
        if self.weight not in tensors:
            return None
        whole = tensors[self.weight].T if self.transposed else tensors[self.weight]
        return whole[self.first : self.first + self.outputs]

    def offset(self, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """Its part of the bias's gradient (or of the bias), `(outputs,)`; None where there is none, or was not sent."""
        if self.bias is None or self.bias not in tensors:
            return None
        return tensors[self.bias][self.first : self.first + self.outputs]


@final
@dataclass(frozen=True)
class Block:
    """One block's attention.

    Attributes:
      query, key, value: its maps; all three are given the same input.
      module: of the query map, whose input a model's own code is asked for.
    """

    query: Projection
    key: Projection
    value: Projection
    module: nn.Module

    @property
    def projections(self) -> tuple[Projection, Projection, Projection]:
        """Query, key, value."""
        return self.query, self.key, self.value


class Architecture(ABC):
    """A transformer as an attack sees it. The model itself stays as it is.

    Args:
      model: the client's whole model, adapters and head included.

    Attributes:
      root: the transformer inside the model, without its head.
      names: of parameters in the whole model, by identity.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.root = self.find(model)
        self.names = {id(parameter): name for name, parameter in model.named_parameters()}

    @classmethod
    @abstractmethod
    def find(cls, model: nn.Module) -> Any:
        """The transformer inside a model.

        Raises:
          LookupError: there is none of this kind.
        """

    @abstractmethod
    def require_as_computed(self) -> None:
        """Tries what was read against the model's own code.

        Raises:
          InvalidArgument: they differ.
        """

    def name(self, parameter: Tensor) -> str:
        """A parameter's name in the whole model."""
        return self.names[id(parameter)]

    def map(self, module: Any, third: int | None = None) -> Projection:
        """Where a linear map, with or without an adapter around it, has its weights.

        Args:
          module: the map.
          third: which third of the outputs is meant, in a weight that holds query, key and value; None: all.
        """
        base = getattr(module, "base_layer", module)
        transposed = type(base).__name__ == "Conv1D"
        inputs, outputs = base.weight.shape if transposed else reversed(base.weight.shape)
        each = outputs if third is None else outputs // 3
        adapter = next(iter(getattr(module, "lora_A", {})), None)
        return Projection(
            weight=self.name(base.weight),
            bias=None if base.bias is None else self.name(base.bias),
            first=0 if third is None else third * each,
            outputs=int(each),
            inputs=int(inputs),
            transposed=transposed,
            lora_a=None if adapter is None else self.name(module.lora_A[adapter].weight),
            lora_b=None if adapter is None else self.name(module.lora_B[adapter].weight),
            scaling=1.0 if adapter is None else float(module.scaling[adapter]),
        )


Kind = TypeVar("Kind", bound=Architecture)


def recognised(model: nn.Module, kinds: Sequence[type[Kind]], given: type[Kind] | None, provide: str) -> Kind:
    """The model as the first kind that fits reads it.

    Args:
      model: with one of these inside, with a head or adapters around it or without.
      kinds: that are known.
      given: how to read it; None finds out.
      provide: what a user can do about a model that is not known.

    Raises:
      InvalidArgument: the model is of no known kind, or computes something else than its kind.
    """
    for kind in kinds if given is None else (given,):
        try:
            found = kind(model)
        except (LookupError, AttributeError, TypeError):
            continue
        try:
            found.require_as_computed()
        except AttributeError as missing:
            raise InvalidArgument(
                f"{type(found.root).__name__} is no {kind.__name__}: {missing}; {provide}"
            ) from missing
        return found
    known = ", ".join(kind.__name__ for kind in kinds)
    raise InvalidArgument(f"{type(model).__name__} contains no transformer of a known kind ({known}); {provide}")


def inside(model: nn.Module, fits: Callable[[Any], bool]) -> Any:
    """The first module that fits.

    Raises:
      LookupError: none does.
    """
    for part in model.modules():
        if fits(part):
            return part
    raise LookupError


@contextmanager
def asleep(module: nn.Module) -> Iterator[None]:
    """Without dropout, and as it was afterwards."""
    awake = [part for part in module.modules() if part.training]
    for part in awake:
        part.training = False
    try:
        yield
    finally:
        for part in awake:
            part.training = True


class _Reached(Exception):  # no error: the module that was asked for has been reached
    """Ends a forward pass."""


def given_to(module: nn.Module, root: nn.Module, **inputs: Tensor) -> Tensor:
    """What a module is called with when `root(**inputs)` runs; what comes after it is not computed."""
    seen: list[Tensor] = []

    def stop(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        seen.append(given[0])
        raise _Reached

    _run_until(module.register_forward_pre_hook(stop), root, inputs)
    return seen[0]


def made_by(module: nn.Module, root: nn.Module, **inputs: Tensor) -> Tensor:
    """What a module returns when `root(**inputs)` runs; what comes after it is not computed."""
    seen: list[Tensor] = []

    def stop(_module: nn.Module, _given: object, made: Tensor) -> None:
        seen.append(made)
        raise _Reached

    _run_until(module.register_forward_hook(stop), root, inputs)
    return seen[0]


def _run_until(hook: Any, root: nn.Module, inputs: Mapping[str, Tensor]) -> None:
    try:
        with torch.no_grad(), asleep(root):
            root(**inputs)
    except _Reached:
        pass
    finally:
        hook.remove()
