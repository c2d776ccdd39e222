"""A rule that is run by whoever sees the geometry, so that the server learns its weights and nothing it weighed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Generator, Tensor

from privfm.checks import InvalidArgument, require
from privfm.contracts import Decision, Outcome, Reveals, Rule, State, View


@final
@dataclass(frozen=True)
class Delegated(Rule):
    """The server's half of a rule whose other half a key holder runs (`decide`).

    The server keeps the rule's state and its references, asks for the weights (`view.decided`), then for the one
    weighted sum. It needs a channel that was given the same rule: `CKKSGram.with_rule(rule)`.

    | rule                                                       | result                                          |
    |------------------------------------------------------------|-------------------------------------------------|
    | decides from one Gram matrix, remembers at most the vector | as the rule itself, on sketched inner products  |
    | remembers clients, norms, models (not `delegable`)         | InvalidArgument when made                       |

    Needs: gram.  Breakdown point: the rule's.  Robustness coefficient: none, the rule sees distances that are some
    percent off.  Client weights: refused.

    Args:
      rule: Krum, MultiKrum, GeometricMedian, FLTrust, CenteredClipping, ..., or pre-aggregation around one of them.

    Raises:
      InvalidArgument: the rule cannot be run by others.
    """

    rule: Rule

    def __post_init__(self) -> None:
        name = type(self.rule).__name__
        require(isinstance(self.rule, Rule), f"rule={self.rule!r}: expected a rule, such as MultiKrum(f=2)")
        require(self.rule.delegable, f"rule={name} needs more than weights from one Gram matrix; use MultiKrum")

    @property
    def needs(self) -> Reveals:
        return Reveals.GRAM

    @property
    def smallest_cohort(self) -> int:
        return self.rule.smallest_cohort

    @property
    def condition(self) -> str:
        return self.rule.condition

    def effective_size(self, n: int) -> float | None:
        return self.rule.effective_size(n)

    def breakdown(self, n: int) -> int:
        return self.rule.breakdown(n)

    def init(self, d: int) -> State:
        return self.rule.init(d)

    def references(self, state: State, d: int) -> Tensor:
        return self.rule.references(state, d)

    def remember(self, state: State, vector: Tensor) -> State:
        return self.rule.remember(state, vector)

    def step(self, state: State, view: View, generator: Generator) -> tuple[State, Outcome]:
        references = self.references(state, view.d)
        seed = int(torch.randint(2**62, (), generator=generator))
        decision = view.decided(references, seed)
        vector = view.weighted_sum(decision.weights, references)
        outcome = Outcome(vector, decision.weights[: view.n], decision.clipped, decision.suspects)
        return self.remember(state, vector), outcome


def references_of(rule: Rule) -> int:
    """How many rows of the server's own a rule measures."""
    return len(rule.references(rule.init(1), 1))


def decide(rule: Rule, gram: Tensor, n: int, bad: int, seed: int) -> Decision:
    """The key holder's half: runs the rule where every row is known by its inner products only.

    The rule sees n clients whose rows are unit vectors of `n+m` dimensions, as are the references, with a Gram matrix
    that is not theirs. So the vector it returns is the list of coefficients, whatever it did to get there: mixed,
    scaled, divided by n.

    Args:
      rule: what is run; every f is lowered by `bad`.
      gram: `(n+m, n+m)` float64, of n clients followed by the rule's m references.
      n: clients.
      bad: rows that were left out.
      seed: of the rule's random draws.

    Raises:
      CohortTooSmall: as `Rule.aggregate`.
      InvalidArgument: another number of references, or a rule whose vector is not what it says its weights are.
    """
    view = _Coefficients(gram, n, bad)
    _, outcome = rule.aggregate(rule.init(view.d), view, Generator().manual_seed(seed))
    weights, said = outcome.vector.double(), outcome.weights
    if weights.shape != (view.d,) or (said is not None and not torch.allclose(said.double(), weights[:n], atol=1e-6)):
        raise InvalidArgument(f"{type(rule).__name__} does more than weigh rows; only a server that opens them runs it")
    return Decision(weights, outcome.clipped, outcome.suspects)


@final
class _Coefficients(View):
    """Rows that stand for themselves; see `decide`."""

    reveals = Reveals.GRAM

    def __init__(self, gram: Tensor, n: int, bad: int) -> None:
        self.ids, self.d, self.bad, self._gram = tuple(range(n)), len(gram), bad, gram

    def total(self) -> Tensor:
        return (torch.arange(self.d) < self.n).double()

    def gram(self, references: Tensor) -> Tensor:
        self._check(references)
        return self._gram.clone()

    def weighted_sum(self, weights: Tensor, references: Tensor) -> Tensor:
        own = torch.zeros(self.d, dtype=torch.float64)
        own[: len(weights)] = weights.double()  # without references where a rule leaves them out
        if len(references):
            self._check(references)
        return own

    def _check(self, references: Tensor) -> None:
        known = self.d - self.n
        require(len(references) == known, f"{len(references)} references: expected the {known} that were measured")
