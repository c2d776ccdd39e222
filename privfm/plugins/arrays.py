"""Rules for federated loops that pass models around as lists of NumPy arrays."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from privfm.checks import InvalidArgument
from privfm.contracts import Rule
from privfm.plugins.changes import Unusable
from privfm.plugins.loops import aggregate_state_dicts


def aggregate_arrays(
    global_arrays: Sequence[NDArray[np.generic]],
    client_arrays: Sequence[Sequence[NDArray[np.generic]]],
    rule: Rule,
    *,
    ids: Sequence[int] | None = None,
    weights: Tensor | Sequence[float] | None = None,
    seed: int = 0,
) -> list[NDArray[np.generic]]:
    """One round from a fresh memory on models that are lists of arrays, matched by place; see `StateDictServer`.

    Returns:
      The next global model, in new arrays of the same shapes and types; those of integers are the last model's.

    Raises:
      InvalidArgument, CohortTooSmall, RoundFailed: as `StateDictServer` does.

    >>> from privfm.defenses import Mean
    >>> aggregate_arrays([np.zeros(2)], [[np.ones(2)], [np.full(2, 4.0)], [np.ones(3)]], Mean())
    [array([2.5, 2.5])]
    """
    base = _tensors(global_arrays)
    if isinstance(base, Unusable):
        raise InvalidArgument(f"global_arrays {base.reason}")
    result = aggregate_state_dicts(
        base, [_tensors(own) for own in client_arrays], rule, ids=ids, weights=weights, seed=seed
    )
    return [entry.cpu().numpy() for entry in result.state.values()]


def _tensors(arrays: object) -> dict[str, Tensor] | Unusable:
    """A list of arrays as a state dict, named by place; the arrays are not changed."""
    if not isinstance(arrays, Sequence) or not all(isinstance(own, np.ndarray | np.generic) for own in arrays):
        return Unusable("is no list of NumPy arrays")
    try:
        return {f"{i:06d}": as_tensor(f"{i:06d}", own) for i, own in enumerate(arrays)}
    except InvalidArgument as error:
        return Unusable(f"holds what torch has no type for: {error}")


def as_tensor(name: str, array: NDArray[np.generic] | np.generic) -> Tensor:
    """A NumPy array or scalar as a tensor; read-only and strided arrays are copied, the others share their memory.

    Raises:
      InvalidArgument: torch has no such type.
    """
    try:
        return torch.from_numpy(np.require(np.asarray(array), requirements=["C", "W"]))
    except (TypeError, ValueError) as error:
        raise InvalidArgument(f"{name} is an array of {array.dtype}, expected a native number type") from error
