"""Rules around rules: mix the updates, then aggregate what comes out."""

from __future__ import annotations

from abc import abstractmethod

from torch import Generator, Tensor

from privfm.contracts import Outcome, Reveals, Rule, State, View
from privfm.defenses.views import MixedView


class PreAggregation(Rule):
    """Template: one Gram matrix for itself and for everything inside it.

    References of the inner rule are asked for beforehand and are not mixed; weights of mixed rows go back to clients
    through the mix. Mixed rows have no client ids, so the inner rule must not be `keyed`.

    A class has a field `rule`, the inner rule.
    """

    @property
    @abstractmethod
    def inner(self) -> Rule:
        """The rule that sees the mixed rows."""

    @abstractmethod
    def mix(self, gram: Tensor, generator: Generator) -> Tensor:
        """Gram matrix of the clients `(n, n)` float64 -> `(m, n)`: each mixed row as a combination of updates."""

    @property
    def needs(self) -> Reveals:
        return max(Reveals.GRAM, self.inner.needs)

    @property
    def smallest_cohort(self) -> int:
        return self.inner.smallest_cohort

    @property
    def condition(self) -> str:
        return self.inner.condition

    def init(self, d: int) -> State:
        return self.inner.init(d)

    def references(self, state: State, d: int) -> Tensor:
        return self.inner.references(state, d)

    def step(self, state: State, view: View, generator: Generator) -> tuple[State, Outcome]:
        references = self.references(state, view.d)
        gram = view.gram(references)
        mix = self.mix(gram[: view.n, : view.n], generator)
        state, outcome = self.inner.aggregate(state, MixedView(view, mix, references, gram), generator)
        weights = None if outcome.weights is None else outcome.weights.to(mix) @ mix
        return state, Outcome(outcome.vector, weights)
