"""What rule and server optimizer work on: the updates as they are, or the changes of the weights behind them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

import torch
from torch import Generator, Tensor

from privfm.adapters import AdapterLayout
from privfm.checks import at_least, one_of, require
from privfm.contracts import MatrixView, Outcome, Rule, ServerOptimizer, State, View
from privfm.defenses.adapter_aggregation import MODES, OVERSAMPLING, PROJECTIONS, Mode, next_adapters
from privfm.defenses.geometry import Change, ProductView
from privfm.federation.optimizers import Average


@final
@dataclass(frozen=True)
class ProductGeometry:
    """Aggregates low-rank adapters as the changes they make to the weights, whatever their gauge.

    Rule and server optimizer see `scaling * (B A - B0 A0)` of every client; the result goes back into factors of the
    same rank.

    Args:
      mode: `flexlora` broadcasts the best factors of rank r (Bai et al., 2024); `fedex` the mean factors, and the
        frozen weights take the rest (Singhal et al., 2025); `flora` gives everything to the frozen weights and starts
        anew (Wang et al., 2024); `fedask` finds what `flexlora` broadcasts from two sketches of the clients' products,
        as a server could that sees sums alone (Wen et al., 2025). Here it is post-processing of rows that the channel
        reveals: under a plan, privacy comes from how the clients trained.
      exact: under `flexlora` and `fedask`, too, the frozen weights take what rank r cannot hold.
      oversampling: columns of the sketches beyond the rank, under `fedask`.
    """

    mode: Mode = "flexlora"
    exact: bool = False
    oversampling: int = OVERSAMPLING

    def __post_init__(self) -> None:
        one_of("mode", self.mode, MODES)
        at_least("oversampling", self.oversampling, 0)

    @property
    def changes_base(self) -> bool:
        """Whether the frozen weights change: clients are then sent that change, too."""
        return self.exact or self.mode not in PROJECTIONS


@final
@dataclass(frozen=True)
class Moved:
    """The next model, and what a geometry says of the step.

    Attributes:
      optimizer: state of the server optimizer.
      model: as clients receive it.
      dropped: share of the change that the next model lost; None where nothing can be lost.
      base_change: L2 norm of what the frozen weights have taken since the start; None where they take nothing.
    """

    optimizer: State
    model: Tensor
    dropped: float | None = None
    base_change: float | None = None


class Space(ABC):
    """One way of looking at rows `(n, d)`.

    Attributes:
      width: of what rule and server optimizer work on.
      optimizer: the server's.
    """

    width: int
    optimizer: ServerOptimizer

    @abstractmethod
    def start(self, model: Tensor) -> Tensor:
        """The model that clients receive first, from the trained values `(d,)`."""

    @abstractmethod
    def seen(self, view: View, model: Tensor) -> View:
        """Rows as the rule sees them, under the model that clients received."""

    @abstractmethod
    def imagined(self, state: State, rule: Rule, rows: Tensor, model: Tensor, generator: Generator) -> Tensor:
        """What the rule would return on equal `rows (n, d)`, as an update `(d,)`: for adaptive attacks."""

    @abstractmethod
    def moved(self, seen: View, outcome: Outcome, state: State, model: Tensor, generator: Generator) -> Moved:
        """The next model, from the rule's outcome on `seen` and the server optimizer's state."""


@final
class FlatSpace(Space):
    """Updates as they are, `(d,)`."""

    def __init__(self, d: int, optimizer: ServerOptimizer) -> None:
        self.width, self.optimizer = d, optimizer

    def start(self, model: Tensor) -> Tensor:
        return model

    def seen(self, view: View, model: Tensor) -> View:
        return view

    def imagined(self, state: State, rule: Rule, rows: Tensor, model: Tensor, generator: Generator) -> Tensor:
        return rule.aggregate(state, MatrixView(rows), generator)[1].vector

    def moved(self, seen: View, outcome: Outcome, state: State, model: Tensor, generator: Generator) -> Moved:
        return Moved(*self.optimizer.step(state, model, outcome.vector))


@final
class ProductSpace(Space):
    """Changes of the weights. The model is `(d,)`, where the base changes followed by what that has taken so far."""

    def __init__(self, geometry: ProductGeometry, layout: AdapterLayout, optimizer: ServerOptimizer) -> None:
        self._geometry, self._layout = geometry, layout
        self.width, self.optimizer = layout.d_weight, optimizer

    def start(self, model: Tensor) -> Tensor:
        extra = self._layout.first_plain if self._geometry.changes_base else 0
        return torch.cat([model, model.new_zeros(extra)])

    def seen(self, view: View, model: Tensor) -> View:
        return ProductView(view, self._layout, model[: self._layout.d])

    def imagined(self, state: State, rule: Rule, rows: Tensor, model: Tensor, generator: Generator) -> Tensor:
        seen = self.seen(MatrixView(rows), model)
        _, outcome = rule.aggregate(state, seen, generator)
        require(outcome.weights is not None, f"{type(rule).__name__} has no weights: its result is no adapter's update")
        assert outcome.weights is not None
        return outcome.weights.to(rows) @ rows[list(seen.ids)]  # numbered in order, those left out are missing

    def moved(self, seen: View, outcome: Outcome, state: State, model: Tensor, generator: Generator) -> Moved:
        layout, geometry = self._layout, self._geometry
        assert isinstance(seen, ProductView)  # made by `seen`
        if self.optimizer == Average():
            after, change = state, seen.explained(outcome)
        else:
            now = self.weights(model)
            after, following = self.optimizer.step(state, now, outcome.vector.to(now))
            change = Change.dense(layout, following - now)
        found = next_adapters(
            model[: layout.d],
            change,
            geometry.mode,
            exact=geometry.exact,
            generator=generator,
            oversampling=geometry.oversampling,
        )
        if not geometry.changes_base:
            return Moved(after, found.broadcast, found.dropped)
        base = model[layout.d :].clone()
        for pair, part in zip(layout.pairs, layout.matrices(base), strict=True):
            if pair.module in found.base_change:
                part += found.base_change[pair.module].to(part)
        return Moved(after, torch.cat([found.broadcast, base]), found.dropped, float(base.norm()))

    def weights(self, model: Tensor) -> Tensor:
        """What adapters and base change add to the frozen weights, then the plain entries: `(d_weight,)` float64."""
        layout, own = self._layout, model.double()
        products = [pair.scaling * (pair.b(own) @ pair.a(own)).flatten() for pair in layout.pairs]
        plain = [own[lo:hi] for lo, hi in layout.plain]
        found = torch.cat([*products, *plain])
        if len(own) > layout.d:
            found[: layout.first_plain] += own[layout.d :]
        return found
