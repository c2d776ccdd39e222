"""What a rule may see of a cohort (views), and what a rule is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from enum import IntEnum
from typing import Any, Self, final

import torch
from torch import Generator, Tensor

from privfm.checks import CohortTooSmall, NotRevealed, require

State = dict[str, Tensor]
"""What a rule, a transform (with a leading client dimension) or a server optimizer remembers between rounds."""

BLOCK = 1 << 16
"""Columns handled at once: a float64 copy of 100 rows takes 52 MB, well under one read of the cohort."""


class Reveals(IntEnum):
    """What a channel shows of a cohort, and what a rule needs: `SUM < GRAM < EACH`."""

    SUM = 0
    GRAM = 1
    EACH = 2


class View(ABC):
    """What the server may compute about `n` rows of width `d`. An operation beyond `reveals` raises `NotRevealed`.

    Attributes:
      reveals: the most this view answers.
      ids: the clients behind the rows, in order.
      d: width of a row.
      bad: rows left out as non-finite or malformed: they are gone, and count against f.
      passes: full reads of the rows so far (a block of k of d columns counts k/d).
    """

    reveals = Reveals.SUM
    ids: tuple[int, ...]
    d: int
    bad = 0
    passes = 0.0

    @property
    def n(self) -> int:
        """Number of usable rows."""
        return len(self.ids)

    def total(self) -> Tensor:
        """Sum of the rows, `(d,)`. Needs SUM."""
        raise NotRevealed("total: this view holds no rows")

    def gram(self, references: Tensor) -> Tensor:
        """Inner products of the rows followed by `references (m, d)`: `(n+m, n+m)` float64. Needs GRAM."""
        raise NotRevealed("gram needs a channel that reveals GRAM or EACH")

    def weighted_sum(self, weights: Tensor, references: Tensor) -> Tensor:
        """`weights (n+m,)` applied to the rows followed by `references (m, d)`: `(d,)`. Needs GRAM."""
        raise NotRevealed("weighted_sum: free weights would single out a client; use total")

    def block(self, lo: int, hi: int) -> Tensor:
        """Columns lo to hi of every row, `(n, hi-lo)`. Needs EACH."""
        raise NotRevealed("block needs a channel that reveals EACH")


def column_blocks(d: int) -> Iterator[tuple[int, int]]:
    """`(lo, hi)` pairs that cover d columns."""
    return ((lo, min(lo + BLOCK, d)) for lo in range(0, d, BLOCK))


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Half precisions are computed in float32, the others in their own."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


@final
class MatrixView(View):
    """Rows in memory, `(n, d)`. Rows that float32 cannot hold are left out here, once, for everybody."""

    reveals = Reveals.EACH

    def __init__(self, rows: Tensor, ids: Sequence[int] | None = None) -> None:
        require(
            rows.dim() == 2 and rows.dtype.is_floating_point,
            f"updates have shape {tuple(rows.shape)} and type {rows.dtype}: expected (n, d) of a float type",
        )
        names = tuple(range(len(rows))) if ids is None else tuple(ids)
        require(len(names) == len(rows), f"{len(names)} ids for {len(rows)} rows")
        # Row by row, to cost no second matrix; beyond float32 too, as its square would be infinite in float64.
        finite = torch.tensor([bool(row.float().isfinite().all()) for row in rows], dtype=torch.bool)
        self.bad, self.d, self.passes = int((~finite).sum()), rows.shape[1], 0.0
        self.rows = rows if self.bad == 0 else rows[finite]
        self.ids = tuple(i for i, good in zip(names, finite.tolist(), strict=True) if good)

    def total(self) -> Tensor:
        self.passes += 1
        return self.rows.sum(0, dtype=torch.float64).to(compute_dtype(self.rows.dtype))  # as a sum that is folded

    def gram(self, references: Tensor) -> Tensor:
        self.passes += 1
        size = self.n + len(references)
        gram = torch.zeros(size, size, dtype=torch.float64, device=self.rows.device)
        for lo, hi in column_blocks(self.d):
            block = torch.cat([self.rows[:, lo:hi].double(), references[:, lo:hi].to(gram)])
            gram.addmm_(block, block.T)
        return gram

    def weighted_sum(self, weights: Tensor, references: Tensor) -> Tensor:
        self.passes += 1
        own = compute_dtype(self.rows.dtype)
        parts = []
        for lo, hi in column_blocks(self.d):
            part = weights[: self.n].to(self.rows.device, own) @ self.rows[:, lo:hi].to(own)
            parts.append(part + weights[self.n :].to(part) @ references[:, lo:hi].to(part))
        return torch.cat([*parts, self.rows.new_zeros(0)]).to(self.rows.dtype)

    def block(self, lo: int, hi: int) -> Tensor:
        self.passes += (hi - lo) / max(self.d, 1)
        return self.rows[:, lo:hi]


@final
@dataclass(frozen=True)
class Outcome:
    """What a rule returns.

    Attributes:
      vector: the aggregate, `(d,)`.
      weights: `(n,)` in the order of `view.ids`; a client is kept when its weight is above zero. None where a row has
        no one weight (order statistics).
    """

    vector: Tensor
    weights: Tensor | None = None


class Rule(ABC):
    """An aggregation rule: many updates in, one out. `step` is what a class writes, `aggregate` what callers call.

    Class constants:
      keyed: remembers clients by id, so it cannot stand behind a step that loses ids (mixing).
    """

    keyed = False

    @property
    @abstractmethod
    def needs(self) -> Reveals:
        """What the rule, with everything inside it, asks of a view."""

    @property
    def smallest_cohort(self) -> int:
        """Least number of usable rows the rule is valid for; a class states the paper's condition."""
        return 1

    @property
    def condition(self) -> str:
        """The validity condition in words, for errors: `2f+3`."""
        return str(self.smallest_cohort)

    def effective_size(self, n: int) -> float | None:
        """Effective number of clients `(sum w)^2 / sum w^2` in its weighted sum; None: known at run time only."""
        return None

    def init(self, d: int) -> State:
        """State before the first round."""
        return {}

    def references(self, state: State, d: int) -> Tensor:
        """The server's own rows `(m, d)`, declared beforehand; they stand after the clients' in every Gram matrix."""
        return torch.zeros(0, d)

    @abstractmethod
    def step(self, state: State, view: View, generator: Generator) -> tuple[State, Outcome]:
        """One aggregation; pure. Callers use `aggregate`."""

    @final
    def aggregate(self, state: State, view: View, generator: Generator) -> tuple[State, Outcome]:
        """Lowers every f by the rows already left out as bad, checks the cohort, then calls `step`.

        Raises:
          CohortTooSmall: more bad rows than f, or too few usable rows.
        """
        tolerated = self.tolerated
        if tolerated is not None and view.bad > tolerated:
            raise CohortTooSmall(
                f"f={tolerated} tolerates {tolerated} bad updates for {type(self).__name__}, "
                f"got {view.bad} non-finite or malformed ones; raise f or find out why"
            )
        rule = self.lowered(view.bad)
        if view.n < rule.smallest_cohort:
            raise CohortTooSmall(rule.cohort_message(view.n))
        return rule.step(state, view, generator)

    @final
    def cohort_message(self, n: int) -> str:
        """The refusal of a cohort of n, one form for run time and for the check before a run."""
        name, f = type(self).__name__, getattr(self, "f", None)
        words = "" if self.condition == str(self.smallest_cohort) else f"{self.condition} = "
        subject, way_out = (name, "use a larger cohort") if f is None else (f"f={f}", "lower f or use a larger cohort")
        whom = "" if f is None else f" for {name}"
        return f"{subject} needs n >= {words}{self.smallest_cohort} updates{whom}, got n={n}; {way_out}"

    @property
    @final
    def tolerated(self) -> int | None:
        """The smallest f of this rule and the rules inside it; None when there is none."""
        found = [self.f] if hasattr(self, "f") else []
        found += [inner.tolerated for inner in self._inner().values() if inner.tolerated is not None]
        return min(found, default=None)

    @final
    def lowered(self, bad: int) -> Self:
        """The same rule after `bad` of the f rows it tolerates showed themselves; nested rules included."""
        if bad == 0 or not is_dataclass(self):
            return self
        change: dict[str, Any] = {name: inner.lowered(bad) for name, inner in self._inner().items()}
        if hasattr(self, "f"):
            change["f"] = max(0, self.f - bad)
        return replace(self, **change) if change else self

    def _inner(self) -> dict[str, Rule]:
        if not is_dataclass(self):
            return {}
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Rule)}

    @final
    def __call__(self, updates: Tensor | Sequence[Tensor], generator: Generator | None = None) -> Tensor:
        """Aggregates `(n, d)`, or n vectors `(d,)`, from a fresh state: the way into other people's code.

        Returns:
          `(d,)`, of the dtype and on the device of the updates, which are not changed.

        Raises:
          InvalidArgument: wrong shapes or types, or a cohort the rule is not valid for.
        """
        if not isinstance(updates, Tensor):
            foreign = {type(update).__name__ for update in updates if not isinstance(update, Tensor)}
            require(
                not foreign, f"updates are {type(updates).__name__} of {', '.join(sorted(foreign))}: expected tensors"
            )
            shapes = {tuple(update.shape) for update in updates}
            require(len(shapes) == 1, f"updates have shapes {sorted(shapes)}: expected n vectors of one length")
            updates = torch.stack(list(updates))
        view = MatrixView(updates)
        if generator is None:
            generator = Generator().manual_seed(0)
        return self.aggregate(self.init(view.d), view, generator)[1].vector.to(updates.dtype)


class ServerOptimizer(ABC):
    """Turns the aggregated update into the next model."""

    def init(self, d: int) -> State:
        """State before the first round."""
        return {}

    @abstractmethod
    def step(self, state: State, model: Tensor, update: Tensor) -> tuple[State, Tensor]:
        """`model (d,)` and the aggregate `update (d,)` -> the next model `(d,)`; pure."""
