"""The plain mean: no robustness, no privacy; what every other rule is measured against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Generator

from privfm.contracts import Outcome, Reveals, Rule, State, View


@final
@dataclass(frozen=True)
class Mean(Rule):
    """Mean of the updates; weighted where the server, not the client, has given them weights (`view.client_weights`).

    Needs: sum (gram with client weights, unless clients have folded them into their rows).  Cost: one pass.
    Breakdown point: 0 (one update moves it anywhere).

    Source: McMahan et al., "Communication-efficient learning of deep networks from decentralized data", 2017,
    algorithm 1, with equal weights (a weight that a client claims is a weight that an attacker chooses).

    >>> Mean()(torch.tensor([[1.0, 2.0], [3.0, 4.0]])).tolist()
    [2.0, 3.0]
    """

    weighted = True

    @property
    def needs(self) -> Reveals:
        return Reveals.SUM

    def effective_size(self, n: int) -> float | None:
        return float(n)

    @property
    def delegable(self) -> bool:
        return True

    def step(self, state: State, view: View, generator: Generator) -> tuple[State, Outcome]:
        weights = view.client_weights
        if view.folded is not None:
            return state, Outcome(view.total() / view.folded, weights)
        if weights is not None:
            return state, Outcome(view.weighted_sum(weights, torch.zeros(0, view.d)), weights)
        return state, Outcome(view.total() / view.n, torch.full((view.n,), 1 / view.n, dtype=torch.float64))
