"""Clients' models as changes of the global one, whatever form they come in and whatever is wrong with them.

What models have in common is never averaged: rules see client minus global, subtracted in float32 (float64 where the
model is). Distances between whole models drown in the model: with float32 weights of length 50 and updates of 3e-6 a
coordinate, Krum on weights picks the attackers.

| a client's model                                                | what becomes of it                                 |
|-----------------------------------------------------------------|----------------------------------------------------|
| entries in another order                                        | the same: they are matched by name                 |
| another float type, another device                              | the same, after conversion                         |
| an entry missing, foreign, of another shape, not of floats      | left out, counted as bad                           |
| NaN, infinity, or what float32 or the model's type cannot hold  | left out, counted as bad                           |
| a file that cannot be read                                      | left out, counted as bad                           |
| integers (BatchNorm's counters), entries to leave alone         | not looked at: the global model's stay             |
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from privfm.checks import InvalidArgument, RoundFailed, first_line, nearest, require
from privfm.contracts import Spans
from privfm.contracts.inputs import NamedView, open_updates
from privfm.contracts.views import StoredView
from privfm.vectors import Layout

Named = Mapping[str, Tensor]
TAKEN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Float types whose values can be added to; eight-bit floats and complex numbers are none."""


@final
@dataclass(frozen=True)
class Unusable:
    """Stands for a client whose model the caller found to be of no use: it counts as bad.

    Args:
      reason: why, for the result's `left_out`.
    """

    reason: str


Client = Named | str | Path | Unusable
"""A client's model: a state dict, or the path of a `.safetensors` file, which is read block by block."""


@final
class GlobalModel:
    """The global model: its floats as one vector `(d,)`, and how to make a model of another vector.

    Args:
      state: the model.
      exclude: entries that stay as they are, beside the integers.
      called: what errors say of it.

    Raises:
      InvalidArgument: entries that are no tensors or of no plain type, an excluded name that is not there, no floats
        left, or a value that is not finite.
    """

    def __init__(self, state: Named, exclude: Collection[str], called: str = "global_state") -> None:
        require(isinstance(state, Mapping), f"{called} is a {type(state).__name__}, expected a state dict")
        for name, entry in state.items():
            require(isinstance(entry, Tensor), f"{name} of {called} is a {type(entry).__name__}, expected a tensor")
            kind = entry.dtype in TAKEN or not (entry.is_floating_point() or entry.is_complex())
            require(kind or name in exclude, f"{name} of {called} is {entry.dtype}: leave it out with exclude=")
        for name in exclude:
            require(name in state, f"exclude={name!r} is not an entry of {called}{nearest(name, state)}")
        self.untouched = tuple(n for n, entry in state.items() if n in exclude or not entry.is_floating_point())
        self.layout = Layout.of(state, self.untouched)
        self.dtype = reduce(torch.promote_types, self.layout.dtypes, torch.float32)
        self.device = next(entry.device for name, entry in state.items() if name not in self.untouched)
        parts = [state[name].detach().reshape(-1).to(self.device, self.dtype) for name in self.layout.names]
        self.vector = torch.cat(parts)  # a copy: the rest of the model need not be held
        self._rest = {name: state[name] for name in self.untouched}
        self._places = {name: entry.device for name, entry in state.items()}
        named = zip(self.layout.names, parts, strict=True)
        wrong = [name for name, part in named if not bool(part.isfinite().all())]
        require(not wrong, f"{called} is not finite in {', '.join(wrong)}: go back to the last good model")
        self.narrow = _narrow(self.layout)

    def opened(self, client: object) -> NamedView | str:
        """One client's floats as a view of one row, or what is wrong with them."""
        if isinstance(client, Unusable):
            return client.reason
        if not isinstance(client, (Mapping, str, Path)):
            return f"is a {type(client).__name__}, expected a state dict or the path of a .safetensors file"
        try:
            if isinstance(client, Mapping):
                own = {name: entry for name, entry in client.items() if name not in self.untouched}
                wrong = self._differ(_shapes(own))  # before anything is copied: a view of one number costs nothing
                if wrong:
                    return wrong
                view = _opened(own)
            else:
                view = _opened(client, _named_in(client).intersection(self.untouched))
        except (InvalidArgument, RuntimeError) as error:  # torch's own, for tensors that are no plain arrays
            return first_line(error)
        return self._differ(dict(zip(view.layout.names, view.layout.shapes, strict=True))) or view

    def _differ(self, theirs: Mapping[str, tuple[int, ...]]) -> str:
        """In what a client's entries are not ours; empty where they are."""
        ours = dict(zip(self.layout.names, self.layout.shapes, strict=True))
        if ours.keys() != theirs.keys():
            lacks, adds = sorted(ours.keys() - theirs.keys()), sorted(theirs.keys() - ours.keys())
            return "; ".join(f"{word} {', '.join(n)}" for word, n in (("lacks", lacks), ("adds", adds)) if n)
        wrong = [name for name, shape in ours.items() if theirs[name] != shape]
        return "; ".join(f"{name} has shape {theirs[name]}, the model's {ours[name]}" for name in wrong)

    def plus(self, change: Tensor) -> dict[str, Tensor]:
        """The model after a change `(d,)`: added in float64, an entry at a time.

        Raises:
          RoundFailed: an entry's type cannot hold its new values.
        """
        layout, sizes = self.layout, list(self.layout.sizes)
        parts = zip(torch.split(self.vector, sizes), torch.split(change, sizes), strict=True)
        sums = (own.double() + part.to(self.device, torch.float64) for own, part in parts)
        kinds = zip(layout.names, sums, layout.shapes, layout.dtypes, strict=True)
        return self._with({name: total.reshape(shape).to(dtype) for name, total, shape, dtype in kinds})

    def filled(self, vector: Tensor) -> dict[str, Tensor]:
        """The model with these floats `(d,)`.

        Raises:
          RoundFailed: an entry's type cannot hold its new values.
        """
        return self._with({name: entry.clone() for name, entry in self.layout.unflatten(vector).items()})

    def _with(self, named: Named) -> dict[str, Tensor]:
        """The model with these entries, which are nobody else's, in place of its own."""
        require_held(named, "the next model")
        return {
            name: named[name].to(place) if name in named else self._rest[name].detach().clone()
            for name, place in self._places.items()
        }


def require_held(named: Named, what: str) -> None:
    """Checks that entries' own types hold their new values.

    Raises:
      RoundFailed: one does not.
    """
    wrong = [f"{name} ({entry.dtype})" for name, entry in named.items() if not bool(entry.isfinite().all())]
    if wrong:
        raise RoundFailed(f"{what} is not finite in {', '.join(wrong)}; the last model stands")


def listed(reasons: Sequence[str]) -> str:
    """The first few of those why clients were left out, for the end of an error."""
    more = " ..." if len(reasons) > 3 else ""
    return f". Left out: {'; '.join(reasons[:3])}{more}" if reasons else ""


def spans(layout: Layout) -> Spans:
    """Columns of each entry of a vector."""
    return tuple(pairwise(accumulate(layout.sizes, initial=0)))


def _narrow(layout: Layout) -> list[tuple[int, int, float]]:
    """Columns of half-precision entries, and the largest value that they hold; neighbours of one type together."""
    found, start = list[tuple[int, int, float]](), 0
    for size, dtype in zip(layout.sizes, layout.dtypes, strict=True):
        largest, end = torch.finfo(dtype).max, start + size
        if dtype.itemsize == 2:
            joined = bool(found) and found[-1][1:] == (start, largest)
            found[-1:] = [(found[-1][0], end, largest)] if joined else [*found[-1:], (start, end, largest)]
        start = end
    return found


def _shapes(state: Named) -> dict[str, tuple[int, ...]]:
    """Of a client's entries, if all of them have a name and are plain arrays."""
    for name, entry in state.items():
        require(isinstance(name, str), f"has an entry {name!r}, expected names")
        plain = isinstance(entry, Tensor) and entry.layout is torch.strided and not entry.is_meta
        require(plain, f"{name} is no dense tensor")
        require(entry.dtype.is_floating_point, f"{name} is {entry.dtype}, expected a float type")
    return {name: tuple(entry.shape) for name, entry in state.items()}


def _named_in(path: str | Path) -> set[str]:
    """The entries of a file."""
    from safetensors import SafetensorError, safe_open

    require(Path(path).suffix == ".safetensors", f"{path} is no .safetensors file, the only kind that is read")
    try:
        with safe_open(path, "pt") as file:
            return set(file.keys())
    except (OSError, SafetensorError) as error:
        raise InvalidArgument(f"{path} cannot be read: {error}") from error


def _opened(client: Named | str | Path, exclude: Collection[str] = ()) -> NamedView:
    alone: Any = [client]
    view, _ = open_updates(alone, exclude=exclude)
    assert isinstance(view, NamedView)  # what mappings and these files are opened as
    return view


@final
class Changes(StoredView):
    """Clients minus the global model, `(n, d)`, made a block of columns at a time.

    Args:
      base: the global model.
      rows: the clients that could be opened.
      ids: of those.
      weights: of those, `(n,)`.
      left_out: how many could not.
    """

    def __init__(
        self,
        base: GlobalModel,
        rows: Sequence[NamedView],
        ids: Sequence[int],
        weights: Tensor | None = None,
        left_out: int = 0,
    ) -> None:
        self._base, self._stored, self._left_out = base, rows, left_out
        self._hold(len(rows), base.layout.d, ids, weights if rows else None)

    @property
    def given(self) -> tuple[int, ...]:
        """Clients that could be opened, usable or not."""
        return self._names

    def columns(self, lo: int, hi: int) -> Tensor:
        base = self._base
        found = torch.empty(len(self._stored), hi - lo, dtype=base.dtype, device=base.device)
        for row, own in zip(found, self._stored, strict=True):
            torch.sub(self._held(own, lo, hi), base.vector[lo:hi], out=row)
        return found

    def _held(self, own: NamedView, lo: int, hi: int) -> Tensor:
        """Columns of one client's values `(k,)`; infinite where the global model's type could not hold them.

        No mean of the others is beyond it, so that nobody can make the next model overflow.
        """
        values = own.columns(lo, hi)[0].to(self._base.vector)  # its own copy
        for start, end, largest in self._base.narrow:
            if start < hi and lo < end:
                part = values[max(start, lo) - lo : min(end, hi) - lo]
                part.masked_fill_(part.abs() > largest, torch.inf)
        return values

    def one_by_one(self) -> Iterator[Tensor]:
        """The usable rows, each `(1, d)`, one in memory at a time."""
        for own, usable in zip(self._stored, self.usable.tolist(), strict=True):
            if usable:
                yield (self._held(own, 0, self.d) - self._base.vector)[None]
