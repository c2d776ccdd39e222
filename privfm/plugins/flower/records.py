"""Flower's records as flat vectors, and back."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from io import BytesIO
from math import prod
from typing import Any, Final, Literal, final

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, RecordDict
from numpy.typing import NDArray
from torch import Tensor

from privfm.checks import RoundFailed, nearest, require
from privfm.contracts import Spans
from privfm.plugins.arrays import as_tensor
from privfm.plugins.changes import GlobalModel, spans

Fault = Literal["records", "keys", "shapes", "dtypes", "values", "count", "codec", "repeated"]
"""What is wrong with a reply: the records it holds, the names, shapes, types or values of its arrays, its count of
examples, the format it is encoded in; or that its node sent another one, too, that says something else."""

_HEADER: Final = 4096  # bytes that NumPy's header of an array may take; it is 128 for all but structured types


class BrokenReply(ValueError):
    """A reply that cannot be used. It is left out and counted; one client never ends a run.

    Attributes:
      fault: what is wrong with it.
    """

    def __init__(self, fault: Fault, reason: str) -> None:
        super().__init__(reason)
        self.fault: Fault = fault


@final
class Reference:
    """The model of one round, as every client receives it: updates are differences to it.

    Only float entries are learned. Counters, masks and whatever `exclude` names stay what they are.

    Args:
      arrays: the model.
      exclude: names of float entries that stay, too (running statistics, for instance).

    Attributes:
      layout: where the learned entries lie in a flat update.

    Raises:
      InvalidArgument: no float entries, a name in `exclude` that is not there, or a value that is not finite.

    >>> model = ArrayRecord({"w": Array(np.ones(2, np.float32)), "steps": Array(np.array(7))})
    >>> reference = Reference(model)
    >>> reply = ArrayRecord({"steps": Array(np.array(9)), "w": Array(np.full(2, 3, np.float32))})
    >>> reference.update_of(reply).tolist()
    [2.0, 2.0]
    >>> moved = reference.moved(torch.tensor([0.5, -1.0]))
    >>> {name: array.numpy().tolist() for name, array in moved.items()}
    {'w': [1.5, 0.0], 'steps': 7}
    """

    def __init__(self, arrays: ArrayRecord, exclude: Collection[str] = ()) -> None:
        self._arrays = dict(arrays)
        for name in exclude:
            require(name in self._arrays, f"exclude={name!r} is not an entry of the model{nearest(name, arrays)}")
        states = {name: array.numpy() for name, array in arrays.items() if name not in exclude}
        learned = {name: as_tensor(name, each) for name, each in states.items() if each.dtype.kind == "f"}
        self._base = GlobalModel(learned, (), "the model")
        self.layout = self._base.layout

    @property
    def d(self) -> int:
        """Width of an update."""
        return self.layout.d

    @property
    def layers(self) -> Spans:
        """Columns of each learned entry."""
        return spans(self.layout)

    def update_of(self, arrays: Mapping[str, Array]) -> Tensor:
        """A client's model as an update `(d,)` float32, by name, in whatever order its entries came.

        A difference beyond float32 becomes infinite: leaving rows out is the caller's decision.

        Raises:
          BrokenReply: names, shapes or types differ from the model's, or an entry cannot be read.
        """
        if arrays.keys() != self._arrays.keys():
            missing, foreign = self._arrays.keys() - arrays.keys(), arrays.keys() - self._arrays.keys()
            raise BrokenReply("keys", f"{len(missing)} entries are missing, {len(foreign)} are not the model's")
        for name, sent in self._arrays.items():
            _require_like(name, arrays[name], sent)
        update, model = np.empty(self.d, np.float32), self._base.vector.numpy()
        with np.errstate(over="ignore", invalid="ignore"):  # what does not fit becomes infinite or NaN
            for name, (lo, hi) in zip(self.layout.names, self.layers, strict=True):
                values = _read(name, arrays[name]).reshape(-1)
                wide = np.promote_types(values.dtype, np.float32)  # holds the model's own values, too
                np.subtract(values, model[lo:hi], out=update[lo:hi], dtype=wide, casting="same_kind")
        return torch.from_numpy(update)

    def moved(self, update: Tensor) -> ArrayRecord:
        """The model plus an update `(d,)`: entries in the model's order, each of its own type.

        Raises:
          BrokenReply: an entry's type cannot hold the sum.
        """
        try:
            after = self._base.plus(update.detach())
        except RoundFailed as reason:
            raise BrokenReply("values", str(reason)) from reason
        return ArrayRecord(self._arrays | {name: Array(value.numpy()) for name, value in after.items()})


def entry(content: RecordDict, record: str, key: str) -> object:
    """One value of a configuration in a message; None where it is not there."""
    found = content.config_records.get(record)
    return None if found is None else found.get(key)


def to_bytes(array: Array) -> bytes:
    """What `from_bytes` made an array of.

    Raises:
      BrokenReply: it is something else.
    """
    if array.dtype != "uint8" or len(array.shape) != 1:
        raise BrokenReply("records", f"bytes of type {array.dtype} and shape {array.shape}")
    return _read("bytes", array).tobytes()


def from_bytes(content: bytes) -> Array:
    """Bytes as an array, which Flower cuts into chunks on the wire, unlike an entry of a configuration."""
    return Array(np.frombuffer(content, np.uint8))


def read(name: str, array: Array) -> Tensor:
    """Any array as a tensor.

    Raises:
      BrokenReply: it cannot be read.
    """
    try:
        return torch.from_numpy(np.array(_read(name, array)))
    except TypeError as error:
        raise BrokenReply("dtypes", f"{name} is {array.dtype}, which is no tensor's type") from error


def _require_like(name: str, array: Array, own: Array) -> None:
    """Whether an array says that it is of the model's shape and type, and is as long as that takes."""
    if tuple(array.shape) != tuple(own.shape):
        raise BrokenReply("shapes", f"{name} has shape {tuple(array.shape)}, the model's has {tuple(own.shape)}")
    if array.dtype != own.dtype:
        raise BrokenReply("dtypes", f"{name} is {array.dtype}, the model's is {own.dtype}")


def _values(array: Array, size: int) -> NDArray[Any]:
    """What NumPy's own reader gives, without its copy where the values lie in order."""
    if array.stype == "numpy.ndarray":
        head = BytesIO(array.data[:_HEADER])
        if np.lib.format.read_magic(head) == (1, 0):
            shape, by_column, dtype = np.lib.format.read_array_header_1_0(head)
            if not by_column and not dtype.hasobject and head.tell() + size == len(array.data):
                return np.frombuffer(array.data, dtype, offset=head.tell()).reshape(shape)
    return array.numpy()


def _read(name: str, array: Array) -> NDArray[Any]:
    """The values of an array that are really there; what it says of itself is a claim."""
    try:
        size = prod(array.shape) * np.dtype(array.dtype).itemsize
        if not size <= len(array.data) <= size + _HEADER:
            raise BrokenReply("values", f"{name} holds {len(array.data)} bytes, its shape and type take {size}")
        found = _values(array, size)
    except BrokenReply:
        raise
    except Exception as error:  # NumPy meets whatever somebody chose to send
        raise BrokenReply("values", f"{name} cannot be read: {type(error).__name__}") from error
    if found.shape != tuple(array.shape) or str(found.dtype) != array.dtype:
        raise BrokenReply("values", f"{name} holds {found.dtype} {found.shape}, and says something else")
    return found
