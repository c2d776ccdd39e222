"""Rules that trust a direction: where an update points against the server's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Generator, Tensor

from privfm.checks import require
from privfm.contracts import ROOT, Decision, MatrixView, State
from privfm.defenses.gram_rules import JudgingRule

ALIKE = 2e-5
"""Directions whose cosine is closer to 1 are the same: inner products of float32 rows may be this wrong (`blocks`)."""

SHORTEST = 1e-30
"""A row shorter than this share of the root counts as zero: float32 could not hold the factor that lengthens it."""


def cosines(gram: Tensor) -> Tensor:
    """Gram matrix `(n, n)` -> cosines `(n, n)`: 1 on the diagonal, 0 between a zero row and any other."""
    lengths = gram.diagonal().sqrt()
    products = lengths[:, None] * lengths
    found = torch.where(products > 0, gram / products, torch.zeros_like(gram))
    return found.clamp(-1, 1).fill_diagonal_(1)


def cosine_distances(gram: Tensor) -> Tensor:
    """Gram matrix `(n, n)` -> one minus the cosines `(n, n)`; two zero rows are 0 apart, as are equal directions."""
    zero, found = gram.diagonal() == 0, 1 - cosines(gram)
    return found.masked_fill((zero[:, None] & zero) | (found < ALIKE), 0)


def with_root(state: State, root: Tensor) -> State:
    """The state of a rule that compares clients with the server's own update, with that of this round `(d,)`.

    Raises:
      InvalidArgument: another width, or a value that is not finite.
    """
    require(ROOT in state, f"state has {', '.join(state) or 'nothing'}: expected the state of a rule with a root")
    width = tuple(state[ROOT].shape)
    require(tuple(root.shape) == width, f"root has shape {tuple(root.shape)}, expected {width}")
    own = root.detach().to(torch.float32, copy=True)
    require(bool(own.isfinite().all()), "root is not finite: expected an update that float32 can hold")
    return {**state, ROOT: own}


@final
@dataclass(frozen=True)
class FLTrust(JudgingRule):
    """Mean of the updates, each brought to the length of the server's own and weighted by how far it points that way.

    The server trains on a small clean data set of its own (the root) every round, from the same model and as the
    clients do; `with_root` puts that update into the state before `aggregate`. An update that points away from it has
    no weight. Where nobody points its way, a zero root included, the aggregate is zero and the model is kept.

    Needs: gram, with one reference (the root).  Cost: two passes.
    Breakdown point: any number of updates, since the aggregate is never longer than the root; that bounds the harm and
    proves no accuracy.

    Source: Cao et al., "FLTrust: Byzantine-robust federated learning via trust bootstrapping", 2021, algorithm 2.

    >>> updates = torch.tensor([[3.0, 0.0], [0.5, 0.0], [-9.0, 0.0]])
    >>> FLTrust().against(torch.tensor([1.0, 0.0]), updates).tolist()
    [1.0, 0.0]
    """

    def breakdown(self, n: int) -> int:
        return n

    def init(self, d: int) -> State:
        return {ROOT: torch.zeros(d)}

    def references(self, state: State, d: int) -> Tensor:
        return state[ROOT][None]

    def decide(self, gram: Tensor, n: int, generator: Generator, client_weights: Tensor | None) -> Decision:
        lengths = gram.diagonal().sqrt()
        root = lengths[n]
        usable = lengths[:n] > SHORTEST * root
        scores = torch.where(usable, cosines(gram)[n, :n].clamp(min=0), torch.zeros_like(root))
        total = scores.sum()
        shares = scores / torch.where(total > 0, total, torch.ones_like(total))
        weights = torch.zeros_like(lengths)
        weights[:n] = torch.where(shares > 0, shares * root / lengths[:n], torch.zeros_like(root))
        return Decision(weights, clipped=(weights[:n] > 0) & (lengths[:n] > root))

    def against(self, root: Tensor, updates: Tensor | Sequence[Tensor]) -> Tensor:
        """Aggregates `(n, d)`, or n vectors, against the server's own update `(d,)`: the way into other people's code.

        Returns:
          `(d,)`, of the dtype of the updates.
        """
        rows = updates if isinstance(updates, Tensor) else torch.stack(list(updates))
        view = MatrixView(rows)
        state = with_root(self.init(view.d), root)
        return self.aggregate(state, view, Generator().manual_seed(0))[1].vector.to(rows.dtype)
