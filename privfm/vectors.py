"""Layout: named tensors <-> one flat float32 vector."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from privfm.checks import InvalidArgument, nearest, require

Named = Mapping[str, Tensor | NDArray[np.generic]]
Arrays = Sequence[Tensor | NDArray[np.generic]]


@final
@dataclass(frozen=True)
class Layout:
    """Where each named tensor lies in a flat vector `(d,)`.

    Names are sorted, so that two parties whose dictionaries differ only in order agree. float32, float64, bfloat16
    and float16 entries are taken; the vector is float32 and `unflatten` gives each entry its own dtype back.
    NaN and infinities pass: leaving a row out is the rule's decision.

    >>> layout = Layout.of({"b": torch.zeros(2), "a": torch.ones(1, 3)})
    >>> layout.d, layout.flatten({"a": torch.ones(1, 3), "b": torch.zeros(2)}).tolist()
    (5, [1.0, 1.0, 1.0, 0.0, 0.0])
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    excluded: frozenset[str] = frozenset()

    @classmethod
    def of(cls, state: Named | Arrays, exclude: Collection[str] = ()) -> Layout:
        """Reads the layout off a state dict, a PEFT adapter state or a list of arrays.

        Args:
          state: tensors or NumPy arrays by name, or in order.
          exclude: names that stay out of the vector: buffers, counters.

        Raises:
          InvalidArgument: an entry is not of a float type, an excluded name is not there, or nothing is left.
        """
        tensors = _tensors(state)
        for name in exclude:
            require(name in tensors, f"exclude={name!r} is not an entry{nearest(name, tensors)}")
        names = tuple(sorted(set(tensors) - set(exclude)))
        require(bool(names), "a layout needs at least one float entry, got none")
        wrong = [f"{name} ({tensors[name].dtype})" for name in names if not tensors[name].dtype.is_floating_point]
        require(not wrong, f"only float entries fit an update, got {', '.join(wrong)}; leave them out with exclude=")
        shapes = tuple(tuple(tensors[name].shape) for name in names)
        return cls(names, shapes, tuple(tensors[name].dtype for name in names), frozenset(exclude))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Elements of each entry, in order."""
        return tuple(prod(shape) for shape in self.shapes)

    @property
    def d(self) -> int:
        """Width of the vector."""
        return sum(self.sizes)

    def flatten(self, state: Named | Arrays) -> Tensor:
        """Named tensors -> `(d,)` float32, on the device of the entries.

        Raises:
          InvalidArgument: names or shapes differ from the layout's.
        """
        tensors = _tensors(state)
        missing = set(self.names) - tensors.keys()
        require(not missing, f"entries are missing: {', '.join(sorted(missing))}")
        foreign = tensors.keys() - set(self.names) - self.excluded
        require(not foreign, f"entries are not in the layout: {', '.join(sorted(foreign))}")
        parts = []
        for name, shape in zip(self.names, self.shapes, strict=True):
            tensor = tensors[name]
            require(tuple(tensor.shape) == shape, f"{name} has shape {tuple(tensor.shape)}, the layout says {shape}")
            require(tensor.dtype.is_floating_point, f"{name} is {tensor.dtype}, the layout says a float type")
            parts.append(tensor.detach().reshape(-1).float())
        return torch.cat(parts)

    def unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        """`(d,)` -> tensors by name, each of its own shape and dtype.

        Raises:
          InvalidArgument: the vector has another width.
        """
        require(vector.shape == (self.d,), f"vector has shape {tuple(vector.shape)}, the layout says ({self.d},)")
        parts = torch.split(vector, list(self.sizes))
        return {
            name: part.reshape(shape).to(dtype)
            for name, part, shape, dtype in zip(self.names, parts, self.shapes, self.dtypes, strict=True)
        }


def _tensors(state: Named | Arrays) -> dict[str, Tensor]:
    if not isinstance(state, Mapping):
        digits = len(str(len(state)))
        state = {f"{i:0{digits}d}": entry for i, entry in enumerate(state)}
    tensors: dict[str, Tensor] = {}
    for name, entry in state.items():
        if isinstance(entry, Tensor):
            tensors[name] = entry
        elif isinstance(entry, np.ndarray):
            tensors[name] = _from_numpy(name, entry)
        else:
            raise InvalidArgument(f"{name} is a {type(entry).__name__}, expected a tensor or a NumPy array")
    return tensors


def _from_numpy(name: str, array: NDArray[np.generic]) -> Tensor:
    try:  # read-only and strided arrays are copied, the others share their memory
        return torch.from_numpy(np.require(array, requirements=["C", "W"]))
    except (TypeError, ValueError) as error:
        raise InvalidArgument(f"{name} is a NumPy array of {array.dtype}, expected a native float type") from error
