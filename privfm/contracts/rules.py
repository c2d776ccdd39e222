"""What a rule is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Self, final, overload

import torch
from torch import Generator, Tensor

from privfm.checks import CohortTooSmall, require
from privfm.contracts.inputs import Updates, open_updates
from privfm.contracts.views import Reveals, View

State = dict[str, Tensor]
"""What a rule, a transform (with a leading client dimension) or a server optimizer remembers between rounds."""


@final
@dataclass(frozen=True)
class Outcome:
    """What a rule returns.

    Attributes:
      vector: the aggregate, `(d,)`.
      weights: `(n,)` in the order of `view.ids`; a client is kept when its weight is above zero. None where a row has
        no one weight (order statistics).
      clipped: `(n,)` bool, rows that were scaled down or pulled in before they were averaged; None: the rule clips
        nobody.
      suspects: `(n,)` bool, rows the rule judges malicious, where it judges apart from averaging; None: see `detected`.
    """

    vector: Tensor
    weights: Tensor | None = None
    clipped: Tensor | None = None
    suspects: Tensor | None = None

    @property
    def kept(self) -> Tensor | None:
        """`(n,)` bool: rows with a weight above zero."""
        return None if self.weights is None else self.weights > 0

    @property
    def detected(self) -> Tensor | None:
        """`(n,)` bool: rows judged malicious, or where nothing is judged, those without weight."""
        return self.suspects if self.suspects is not None or self.weights is None else self.weights <= 0


ROOT = "root"
"""Entry of a rule's state for the server's own update of the round, `(d,)`."""


class Rule(ABC):
    """An aggregation rule: many updates in, one out. `step` is what a class writes, `aggregate` what callers call.

    Class constants:
      keyed: remembers clients by id, so it cannot stand behind a step that loses ids (mixing).
      weighted: uses `view.client_weights`; the others refuse a view that has them.
    """

    keyed = False
    weighted = False

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

    def breakdown(self, n: int) -> int:
        """Most of n rows that may be replaced by anything while the aggregate stays bounded."""
        return getattr(self, "f", 0) if n >= self.smallest_cohort else 0

    def robustness_coefficient(self, n: int, f: int) -> float | None:
        """A proved kappa for f malicious rows of n; None where nothing is proved for these numbers.

        `|A(x) - mean_S|^2 <= kappa * mean over S of |x_i - mean_S|^2` for every set S of n-f rows. A rule that is given
        its own f speaks for that f only.

        Source: Allouah et al., "Fixing by mixing", 2023, definition 2.
        """
        return None

    def init(self, d: int) -> State:
        """State before the first round.

        A rule that compares clients with the server's own update has an entry `ROOT (d,)`: whoever runs the server
        trains on its root data before every round and puts the update there.
        """
        return {}

    def references(self, state: State, d: int) -> Tensor:
        """The server's own rows `(m, d)`, declared beforehand; they stand after the clients' in every Gram matrix."""
        return torch.zeros(0, d)

    @property
    def delegable(self) -> bool:
        """Its weights follow from one Gram matrix, and its next state from the aggregate: a key holder can run it."""
        return False

    def remember(self, state: State, vector: Tensor) -> State:
        """State after the round, from the aggregate `(d,)`, of a rule that is `delegable`."""
        return state

    @abstractmethod
    def step(self, state: State, view: View, generator: Generator) -> tuple[State, Outcome]:
        """One aggregation; pure. Callers use `aggregate`."""

    @final
    def aggregate(self, state: State, view: View, generator: Generator) -> tuple[State, Outcome]:
        """Lowers every f by the rows already left out as bad, checks the cohort, then calls `step`.

        Raises:
          CohortTooSmall: more bad rows than f, or too few usable rows.
        """
        require(
            view.client_weights is None or self.weighted,
            f"{type(self).__name__} counts every update the same; leave weights out, or use a rule that takes them "
            "(Mean, GeometricMedian)",
        )
        if self.needs is Reveals.GRAM:
            view.prepare(self.references(state, view.d))
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
    def nested(self) -> tuple[Rule, ...]:
        """Itself and, from the outside in, the rules inside it."""
        return (self, *(rule for inner in self._inner().values() for rule in inner.nested))

    @property
    @final
    def title(self) -> str:
        """Its name with those of the rules inside it: `Bucketing + GeometricMedian`."""
        return " + ".join(type(rule).__name__ for rule in self.nested)

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

    @overload
    def __call__(
        self,
        updates: Tensor | Sequence[Tensor],
        generator: Generator | None = None,
        weights: Tensor | None = None,
        exclude: Collection[str] = (),
    ) -> Tensor: ...

    @overload
    def __call__(
        self,
        updates: Updates,
        generator: Generator | None = None,
        weights: Tensor | None = None,
        exclude: Collection[str] = (),
    ) -> Any: ...

    @final
    def __call__(
        self,
        updates: Updates,
        generator: Generator | None = None,
        weights: Tensor | None = None,
        exclude: Collection[str] = (),
    ) -> Any:
        """Aggregates from a fresh state: the way into other people's code. `Aggregator` keeps the state.

        Args:
          updates: a matrix `(n, d)`, n vectors `(d,)`, n state dicts, or n paths to `.npy` or `.safetensors` files.
          generator: what random rules draw from; seeded with 0 when None.
          weights: `(n,)`, each client's share as the server knows it; rules that count all the same refuse it.
          exclude: entries of state dicts to leave out: counters, buffers.

        Returns:
          What one update is: `(d,)`, or a state dict; of their dtypes and device. The updates are not changed.

        Raises:
          InvalidArgument: wrong shapes or types, or a cohort the rule is not valid for.
        """
        view, back = open_updates(updates, None, weights, exclude)
        if generator is None:
            generator = Generator().manual_seed(0)
        return back(self.aggregate(self.init(view.d), view, generator)[1].vector)


class ServerOptimizer(ABC):
    """Turns the aggregated update into the next model."""

    def init(self, d: int) -> State:
        """State before the first round."""
        return {}

    @abstractmethod
    def step(self, state: State, model: Tensor, update: Tensor) -> tuple[State, Tensor]:
        """`model (d,)` and the aggregate `update (d,)` -> the next model `(d,)`; pure."""
