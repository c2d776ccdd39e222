"""What NVFlare carries, NumPy arrays or tensors by name, as vectors, measured against the model the server sent."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from privfm.checks import InvalidArgument, RoundFailed, nearest, require
from privfm.contracts import Spans
from privfm.vectors import Layout


def as_tensors(params: Any) -> dict[str, Tensor]:
    """NumPy arrays, NumPy scalars and tensors by name, as tensors; memory is shared where it can be.

    Raises:
      InvalidArgument: it is no dictionary, or an entry is something else: a list, text, what another filter packed.
    """
    require(isinstance(params, Mapping), f"params are a {type(params).__name__}, expected arrays by name")
    found = {}
    for name, entry in params.items():
        require(isinstance(name, str), f"params have an entry named by a {type(name).__name__}, expected text")
        if isinstance(entry, np.ndarray | np.generic):
            try:  # read-only and strided arrays are copied
                found[name] = torch.from_numpy(np.require(np.asarray(entry), requirements=["C", "W"]))
            except (TypeError, ValueError) as error:
                raise InvalidArgument(f"{name} is an array of {entry.dtype}, expected a native number type") from error
        else:
            require(isinstance(entry, Tensor), f"{name} is a {type(entry).__name__}, expected an array or a tensor")
            found[name] = entry.detach()
    return found


def like(tensor: Tensor, template: Any) -> Any:
    """The tensor as what the template is: a tensor on its device, or a NumPy array."""
    return tensor.to(template.device) if isinstance(template, Tensor) else tensor.cpu().numpy()


def spans(layout: Layout) -> Spans:
    """Columns of each entry of a vector."""
    ends = torch.tensor(layout.sizes).cumsum(0).tolist()
    return tuple(zip([0, *ends[:-1]], ends, strict=True))


@final
class SentModel:
    """The global model of a round, as the server sent it: what every contribution is measured against.

    Entries that are no floats (BatchNorm's counters) and those in `exclude` are never aggregated.

    Args:
      params: NumPy arrays or tensors by name; held, not copied, not changed.
      exclude: names of float entries that stay as they are.

    Raises:
      InvalidArgument: a foreign entry, an excluded name that is not there, nothing to aggregate, or NaN.
    """

    def __init__(self, params: Any, exclude: Collection[str] = ()) -> None:
        self._params, self._tensors = dict(params), as_tensors(params)
        for name in exclude:
            require(name in self._tensors, f"exclude={name!r} is not an entry of the model{nearest(name, params)}")
        integers = {name for name, entry in self._tensors.items() if not entry.dtype.is_floating_point}
        self.layout = Layout.of(self._tensors, integers | set(exclude))
        wrong = [name for name in self.layout.names if not bool(self._tensors[name].isfinite().all())]
        require(not wrong, f"the global model is not finite in {', '.join(wrong)}: go back to the last good one")

    def change(self, params: Any, *, full: bool) -> Tensor:
        """A contribution as a change of this model, `(d,)` float32 on the CPU.

        Weights are subtracted from the model's in float64; a difference is taken as it is. Integers and excluded
        entries may be there or not.

        Raises:
          InvalidArgument: foreign or missing entries, other shapes, no floats, or values that float32 cannot hold.
        """
        theirs = as_tensors(params)
        missing = sorted(set(self.layout.names) - theirs.keys())
        require(not missing, f"lacks {', '.join(missing)}")
        foreign = sorted(theirs.keys() - self._tensors.keys())
        require(not foreign, f"has entries the model has not: {', '.join(foreign)}")
        parts = []
        for name, shape in zip(self.layout.names, self.layout.shapes, strict=True):
            entry = theirs[name]
            require(tuple(entry.shape) == shape, f"{name} has shape {tuple(entry.shape)}, the model's {shape}")
            require(entry.dtype.is_floating_point, f"{name} is {entry.dtype}, expected a float type")
            part = entry.cpu().reshape(-1)
            own = self._tensors[name].cpu().reshape(-1)
            parts.append((part.double() - own.double()).float() if full else part.float())
        row = torch.cat(parts)
        require(bool(row.isfinite().all()), "holds values that are not finite")
        return row

    def params(self, change: Tensor) -> dict[str, Any]:
        """A change `(d,)` as NVFlare adds it to the model: the float entries, each of the model's type.

        Raises:
          RoundFailed: a type cannot hold its change.
        """
        named = self.layout.unflatten(change)
        wrong = [f"{name} ({entry.dtype})" for name, entry in named.items() if not bool(entry.isfinite().all())]
        if wrong:
            raise RoundFailed(f"the aggregate is not finite in {', '.join(wrong)}; the last model stands")
        return {name: like(named[name], self._params[name]) for name in self._params if name in named}
