"""Views over views: only a sum, mixed rows, and a view that writes down what it gave away."""

from __future__ import annotations

from collections.abc import Callable
from typing import final

import torch
from torch import Tensor

from privfm.blocks import compute_dtype
from privfm.checks import NotRevealed
from privfm.contracts import Decision, MatrixView, View, WireView


@final
class SumView(View):
    """The sum of n rows and nothing else. `total` is called at most once by a rule: it may ask a key holder."""

    def __init__(self, total: Callable[[], Tensor], ids: tuple[int, ...], d: int, bad: int = 0) -> None:
        self.ids, self.d, self.bad, self._total = ids, d, bad, total

    def total(self) -> Tensor:
        return self._total()


@final
class EmptyView(View):
    """Before anything arrived."""

    def __init__(self, d: int) -> None:
        self.ids, self.d = (), d


@final
class MixedView(View):
    """Rows `mix @ rows`. Asks the view below for no second Gram matrix.

    Args:
      below: the view that is mixed.
      mix: `(m, n)`.
      references: `(r, d)`, the server's own rows, which are not mixed.
      gram: `(n+r, n+r)` of the rows below and the references.
      keeps_ids: the mix is diagonal, row i is still client i's; otherwise client ids and weights are lost.
    """

    def __init__(self, below: View, mix: Tensor, references: Tensor, gram: Tensor, *, keeps_ids: bool = False) -> None:
        self.below, self.mix, self.references, self._known = below, mix, references, gram
        self.reveals, self.d, self._keeps_ids = below.reveals, below.d, keeps_ids
        self.client_weights = below.client_weights if keeps_ids else None

    @property
    def n(self) -> int:
        return len(self.mix)

    @property
    def ids(self) -> tuple[int, ...]:  # type: ignore[override]  # an attribute of View, refused here
        if self._keeps_ids:
            return self.below.ids
        raise NotRevealed("mixed rows belong to no client")

    @property
    def passes(self) -> float:  # type: ignore[override]  # an attribute of View: they are the reads below
        return self.below.passes

    def total(self) -> Tensor:
        return self.weighted_sum(torch.ones(self.n), torch.zeros(0, self.d))

    def gram(self, references: Tensor) -> Tensor:
        mix = self._with_references(len(references))
        same = torch.equal(references, self.references)
        known = self._known if same else self.below.gram(references)
        return mix @ known @ mix.T

    def weighted_sum(self, weights: Tensor, references: Tensor) -> Tensor:
        return self.below.weighted_sum(weights.to(self.mix) @ self._with_references(len(references)), references)

    def block(self, lo: int, hi: int) -> Tensor:
        rows = self.below.block(lo, hi)
        rows = rows.to(compute_dtype(rows.dtype))  # mixed rows are no one's: rounding them would come on top
        return self.mix.to(rows) @ rows

    def _with_references(self, count: int) -> Tensor:
        mixed, rows = self.mix.shape
        full = self.mix.new_zeros(mixed + count, rows + count)
        full[:mixed, :rows] = self.mix
        full[mixed:, rows:] = torch.eye(count)
        return full


@final
class WatchedView(View):
    """Passes everything on and writes down what came back.

    Args:
      below: the view.
      learns_sum: whether the server itself sees sums, or clients alone open them.

    Attributes:
      vectors: every total and weighted sum `(d,)`, in order, whoever sees them.
    """

    def __init__(self, below: View, learns_sum: bool = True) -> None:
        self.below, self.reveals, self.ids, self.d, self.bad = below, below.reveals, below.ids, below.d, below.bad
        self.client_weights, self.folded = below.client_weights, below.folded
        self.vectors: list[Tensor] = []
        self._learns_sum = learns_sum
        self._grams: list[Tensor] = []
        self._weights: list[Tensor] = []

    def total(self) -> Tensor:
        self.vectors.append(self.below.total())
        return self.vectors[-1]

    def gram(self, references: Tensor) -> Tensor:
        self._grams.append(self.below.gram(references))
        return self._grams[-1]

    def weighted_sum(self, weights: Tensor, references: Tensor) -> Tensor:
        self.vectors.append(self.below.weighted_sum(weights, references))
        return self.vectors[-1]

    def decided(self, references: Tensor, seed: int) -> Decision:
        decision = self.below.decided(references, seed)
        self._weights.append(decision.weights)
        return decision

    def block(self, lo: int, hi: int) -> Tensor:
        return self.below.block(lo, hi)

    @property
    def seen(self) -> WireView:
        """The server's view of the wire: everything it received through this view."""
        rows = self.below.rows if isinstance(self.below, MatrixView) else self.below.clear
        vectors = tuple(self.vectors) if self._learns_sum else ()
        return WireView(self.reveals, self.ids, vectors, tuple(self._grams), rows, tuple(self._weights))
