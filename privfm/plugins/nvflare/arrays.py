"""What NVFlare carries, NumPy arrays or tensors by name, as vectors, measured against the model the server sent."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, final

import numpy as np
from torch import Tensor

from privfm.checks import InvalidArgument, require
from privfm.plugins.arrays import as_tensor
from privfm.plugins.changes import GlobalModel, require_held


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
            found[name] = as_tensor(name, entry)
        else:
            require(isinstance(entry, Tensor), f"{name} is a {type(entry).__name__}, expected an array or a tensor")
            found[name] = entry.detach()
    return found


def like(tensor: Tensor, template: Any) -> Any:
    """The tensor as what the template is: a tensor on its device, or a NumPy array."""
    return tensor.to(template.device) if isinstance(template, Tensor) else tensor.cpu().numpy()


@final
class SentModel:
    """The global model of a round, as the server sent it: what every contribution is measured against.

    Entries that are no floats (BatchNorm's counters) and those in `exclude` are never aggregated.

    Args:
      params: NumPy arrays or tensors by name; not changed.
      exclude: names of float entries that stay as they are.

    Raises:
      InvalidArgument: a foreign entry, an excluded name that is not there, nothing to aggregate, or NaN.
    """

    def __init__(self, params: Any, exclude: Collection[str] = ()) -> None:
        self._params, self._base = dict(params), GlobalModel(as_tensors(params), exclude, "the model")
        self.layout = self._base.layout

    def change(self, params: Any, *, full: bool) -> Tensor:
        """A contribution as a change of this model, `(d,)` float32 on the CPU.

        Weights are subtracted from the model's in float64; a difference is taken as it is. Integers and excluded
        entries may be there or not.

        Raises:
          InvalidArgument: foreign or missing entries, other shapes, no floats, or values that float32 cannot hold.
        """
        opened = self._base.opened({name: entry.cpu() for name, entry in as_tensors(params).items()})
        if isinstance(opened, str):
            raise InvalidArgument(opened)
        row = opened.columns(0, self.layout.d)[0]
        row = (row.double() - self._base.vector.cpu().double()).float() if full else row.float()
        require(bool(row.isfinite().all()), "holds values that are not finite")
        return row

    def params(self, change: Tensor) -> dict[str, Any]:
        """A change `(d,)` as NVFlare adds it to the model: the float entries, each of the model's type.

        Raises:
          RoundFailed: a type cannot hold its change.
        """
        named = self.layout.unflatten(change)
        require_held(named, "the aggregate")
        return {name: like(named[name], self._params[name]) for name in self._params if name in named}
