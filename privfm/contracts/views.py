"""What a rule may see of a cohort."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import final

import torch
from torch import Tensor

from privfm import blocks
from privfm.checks import NotRevealed, require


class Reveals(IntEnum):
    """What a channel shows of a cohort, and what a rule needs: `SUM < GRAM < EACH`."""

    SUM = 0
    GRAM = 1
    EACH = 2


@final
@dataclass(frozen=True)
class Decision:
    """What a rule makes of n clients and m references of its own.

    Attributes:
      weights: `(n+m,)`, the coefficients in the aggregate.
      clipped: `(n,)` bool, rows that were pulled in; None: the rule clips nobody.
      suspects: `(n,)` bool, rows judged malicious apart from their weights; None: those without weight.
    """

    weights: Tensor
    clipped: Tensor | None = None
    suspects: Tensor | None = None


class View(ABC):
    """What the server may compute about `n` rows of width `d`. An operation beyond `reveals` raises `NotRevealed`.

    Attributes:
      reveals: the most this view answers.
      ids: the clients behind the rows, in order.
      d: width of a row.
      bad: rows left out as non-finite or malformed: they are gone, and count against f.
      passes: full reads of the rows so far (a block of k of d columns counts k/d).
      client_weights: `(n,)` float64 of sum 1 where the server, not the client, has given rows unequal weight (how much
        data it knows a client to hold); None: all count the same.
      clear: `(n, d)`, what the server reads of single rows where only a part of each is encrypted, NaN elsewhere.
      folded: sum of the weights that clients have multiplied their rows by; None: they have not, and `client_weights`
        are still to be applied.
    """

    reveals = Reveals.SUM
    ids: tuple[int, ...]
    d: int
    bad = 0
    passes = 0.0
    client_weights: Tensor | None = None
    clear: Tensor | None = None
    folded: float | None = None

    @property
    def n(self) -> int:
        """Number of usable rows."""
        return len(self.ids)

    def prepare(self, references: Tensor) -> None:
        """A Gram matrix with these references will be asked for: what is to be read anyway may be read now."""
        return

    def total(self) -> Tensor:
        """Sum of the rows, `(d,)`. Needs SUM."""
        raise NotRevealed("total: this view holds no rows")

    def gram(self, references: Tensor) -> Tensor:
        """Inner products of the rows followed by `references (m, d)`: `(n+m, n+m)` float64. Needs GRAM."""
        raise NotRevealed("gram needs a channel that reveals GRAM or EACH")

    def decided(self, references: Tensor, seed: int) -> Decision:
        """What whoever sees the Gram matrix with these references makes of it, running the rule it was given.

        Only where the matrix stays with a key holder. `seed`: of the rule's random draws.
        """
        raise NotRevealed("decided: nobody was given the rule; ask for gram")

    def weighted_sum(self, weights: Tensor, references: Tensor) -> Tensor:
        """`weights (n+m,)` applied to the rows followed by `references (m, d)`: `(d,)`. Needs GRAM."""
        raise NotRevealed("weighted_sum: free weights would single out a client; use total")

    def block(self, lo: int, hi: int) -> Tensor:
        """Columns lo to hi of every row, `(n, hi-lo)`. Needs EACH."""
        raise NotRevealed("block needs a channel that reveals EACH")


class StoredView(View):
    """Template: rows that lie somewhere and are read a block of columns at a time.

    Rows that float32 cannot hold are left out here, once, for everybody. A class provides `columns`, of all rows that
    were given, and calls `_hold`.
    """

    reveals = Reveals.EACH
    _left_out = 0

    @abstractmethod
    def columns(self, lo: int, hi: int) -> Tensor:
        """Columns lo to hi of every row that was given, usable or not."""

    def _hold(self, count: int, d: int, ids: Sequence[int] | None, weights: Tensor | None) -> None:
        """Names `count` rows of width d; which of them are usable is found out when it is first asked."""
        names = tuple(range(count)) if ids is None else tuple(ids)
        require(len(names) == count, f"{len(names)} ids for {count} rows")
        require(len(set(names)) == count, "ids must differ: two rows claim to be of the same client")
        self.d, self.passes, self._names = d, 0.0, names
        self._weights = None if weights is None else _checked_weights(weights, count)
        self._usable: Tensor | None = None  # (count,) bool
        self._ahead: tuple[Tensor, Tensor] | None = None  # references and the Gram matrix with them

    @property
    def usable(self) -> Tensor:
        """Which of the rows that were given float32 can hold, `(count,)` bool."""
        if self._usable is None:
            self._usable = blocks.finite_rows(self.columns, self.d)
        return self._usable

    @property
    def ids(self) -> tuple[int, ...]:  # type: ignore[override]  # attributes of View, found out when asked
        if bool(self.usable.all()):
            return self._names
        return tuple(i for i, usable in zip(self._names, self.usable.tolist(), strict=True) if usable)

    @property
    def bad(self) -> int:  # type: ignore[override]
        return self._left_out + len(self._names) - int(self.usable.sum())

    @property
    def client_weights(self) -> Tensor | None:  # type: ignore[override]
        if self._weights is None:
            return None
        own = self._weights[self.usable.to(self._weights.device)]
        return own / own.sum()

    def prepare(self, references: Tensor) -> None:
        if self._usable is not None or self._names == ():
            return
        # Where inner products are finite and float32 holds the lengths, it holds every value.
        found, reads = blocks.gram(self.columns, references.to(self.columns(0, 0).device))
        squares = found.diagonal()[: len(self._names)]
        if bool((squares <= torch.finfo(torch.float32).max ** 2).all()):
            self.passes += reads
            self._usable = torch.ones(len(self._names), dtype=torch.bool)
            self._ahead = references, found

    def _rows(self, lo: int, hi: int) -> Tensor:
        block, usable = self.columns(lo, hi), self.usable
        return block if bool(usable.all()) else block[usable.to(block.device)]

    def total(self) -> Tensor:
        self.passes += 1
        own = self.columns(0, 0)
        parts = [self._rows(lo, hi).sum(0, dtype=torch.float64) for lo, hi in blocks.column_blocks(self.d)]
        return torch.cat([own.new_zeros(0, dtype=torch.float64), *parts]).to(blocks.compute_dtype(own.dtype))

    def gram(self, references: Tensor) -> Tensor:
        if self._ahead is not None and torch.equal(self._ahead[0], references):
            return self._ahead[1].clone()
        found, reads = blocks.gram(self._rows, references.to(self.columns(0, 0).device))
        self.passes += reads
        return found

    def weighted_sum(self, weights: Tensor, references: Tensor) -> Tensor:
        self.passes += 1
        own = self.columns(0, 0)
        return blocks.weighted_sum(self._rows, weights, references.to(own.device)).to(own.dtype)

    def block(self, lo: int, hi: int) -> Tensor:
        self.passes += (hi - lo) / max(self.d, 1)
        return self._rows(lo, hi)


def _checked_weights(weights: Tensor, count: int) -> Tensor:
    require(weights.shape == (count,), f"weights have shape {tuple(weights.shape)}, expected ({count},)")
    own = weights.double()
    require(bool((own.isfinite() & (own > 0)).all()), "weights must be finite and above 0: leave a client out instead")
    return own / own.max()  # the sum of any finite weights is finite then


@final
class MatrixView(StoredView):
    """Rows in memory, `(n, d)`.

    Args:
      rows: of a float type; not copied.
      ids: the clients behind them; 0 to n-1 when None.
      weights: `(n,)`, what the server knows of each client's share; equal when None.
      left_out: bad rows that whoever opened them has left out already.
    """

    def __init__(
        self, rows: Tensor, ids: Sequence[int] | None = None, weights: Tensor | None = None, left_out: int = 0
    ) -> None:
        require(
            rows.dim() == 2 and rows.dtype.is_floating_point,
            f"updates have shape {tuple(rows.shape)} and type {rows.dtype}: expected (n, d) of a float type",
        )
        self._given, self._left_out = rows, left_out
        self._hold(len(rows), rows.shape[1], ids, weights)

    def columns(self, lo: int, hi: int) -> Tensor:
        return self._given[:, lo:hi]

    @property
    def rows(self) -> Tensor:
        """The usable rows, `(n, d)`; not copied unless some are left out."""
        return self._rows(0, self.d)
