"""Other people's rules: a callable in, a rule out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Generator, Tensor

from privfm.checks import InvalidArgument, require
from privfm.contracts import Outcome, Reveals, Rule, State, View


def as_rule(function: Callable[[Tensor], Tensor], needs: Reveals) -> Rule:
    """Makes a rule of a callable, for any channel that reveals what it needs.

    Args:
      function: for `EACH`, updates `(n, d)` -> aggregate `(d,)`; for `GRAM`, inner products `(n, n)` float64 -> weights
        `(n,)`. It is trusted with its own validity: nothing is known of the attackers it tolerates.
      needs: what it is given. A function of the sum alone is `Mean`.

    Raises:
      InvalidArgument: `needs` is SUM, or later, what the callable returns has another shape.

    >>> median = as_rule(lambda updates: updates.median(0).values, Reveals.EACH)
    >>> median(torch.tensor([[1.0], [2.0], [50.0]])).item()
    2.0
    """
    require(needs > Reveals.SUM, "needs=SUM: a function of the sum alone is Mean; expected GRAM or EACH")
    return Foreign(function, needs)


@final
@dataclass(frozen=True)
class Foreign(Rule):
    """What `as_rule` returns."""

    function: Callable[[Tensor], Tensor]
    asked: Reveals

    @property
    def needs(self) -> Reveals:
        return self.asked

    def step(self, state: State, view: View, generator: Generator) -> tuple[State, Outcome]:
        if self.asked is Reveals.GRAM:
            nobody = torch.zeros(0, view.d)
            weights = self._called(view.gram(nobody), (view.n,))
            return state, Outcome(view.weighted_sum(weights, nobody), weights)
        return state, Outcome(self._called(view.block(0, view.d), (view.d,)))

    def _called(self, given: Tensor, shape: tuple[int, ...]) -> Tensor:
        result = self.function(given.clone())  # whatever it does to its argument stays with it
        if not isinstance(result, Tensor) or result.shape != shape:
            got = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
            raise InvalidArgument(f"the rule's function returned {got}, expected a tensor of shape {shape}")
        return result
