"""Adversaries: where they stand, and what their threat model grants them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Self, final

import torch
from torch import Generator, Tensor, nn

from privfm import blocks
from privfm.adapters import AdapterLayout
from privfm.checks import NotRevealed, RoundFailed
from privfm.contracts.channels import WireView
from privfm.contracts.learning import Examples
from privfm.contracts.reconstruction import LocalSteps
from privfm.contracts.rules import Rule, State
from privfm.vectors import Layout


class Knows(IntEnum):
    """What an attacker knows of the honest clients of its round: `OWN < MOMENTS < ROWS`."""

    OWN = 0
    MOMENTS = 1
    ROWS = 2


@final
class Knowledge:
    """The honest rows, as the server would decode them, up to the granted level; asking for more raises.

    Attributes:
      level: what is granted.
      cohort: clients that take part in the round, attackers included (every level knows it).
      model: what every client received before the round, `(d,)`; None where there is none (a single call).
      rule: the server's rule, for adaptive attacks; None where only a callable was given, or nothing.
      answered: honest rows seen so far; stays 0 below MOMENTS.

    Args:
      level: what is granted.
      cohort: clients that take part in the round.
      aggregate: rows `(n, d)` -> what the server's rule, in its present state, would return, `(d,)`.
      model: see above.
      rule: see above.
    """

    def __init__(
        self,
        level: Knows,
        cohort: int,
        aggregate: Callable[[Tensor], Tensor],
        model: Tensor | None = None,
        rule: Rule | None = None,
    ) -> None:
        self.level, self.cohort, self._aggregate = level, cohort, aggregate
        self.model, self.rule, self.answered = model, rule, 0
        self._mean, self._squares = torch.zeros(()), torch.zeros(())
        self._rows: list[Tensor] = []
        self._ids: list[int] = []

    def add(self, rows: Tensor, ids: Sequence[int] | None = None) -> None:
        """Streams honest rows `(k, d)` in; moments cost two vectors whatever the cohort (Welford 1962).

        Args:
          rows: of some honest clients.
          ids: of these clients; numbered on when None.
        """
        named = range(len(self._ids), len(self._ids) + len(rows)) if ids is None else ids
        good = blocks.finite(rows)  # the others are left out, as the server leaves them out
        self._ids += [client for client, usable in zip(named, good.tolist(), strict=True) if usable]
        rows = rows if good.all() else rows[good]
        if self.level >= Knows.MOMENTS:
            self._add_moments(rows)
        if self.level >= Knows.ROWS:
            self._rows.append(rows)

    def _add_moments(self, rows: Tensor) -> None:
        if self.answered == 0:
            self._mean = torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device)
            self._squares = torch.zeros_like(self._mean)
        for columns, before, after in blocks.welford(self._mean, self.answered, rows):
            self._squares[columns] += before * after
        self.answered += len(rows)

    def _grant(self, level: Knows) -> None:
        if self.level < level:
            raise NotRevealed(f"the threat model grants {self.level.name}, not {level.name}")
        if level >= Knows.MOMENTS and self.answered == 0:
            raise RoundFailed("no honest client has answered in this round")

    @property
    def mean(self) -> Tensor:
        """Mean of the honest rows, `(d,)`. Needs MOMENTS."""
        self._grant(Knows.MOMENTS)
        return self._mean.float()

    @property
    def deviation(self) -> Tensor:
        """Standard deviation of each coordinate (division by the count), `(d,)`. Needs MOMENTS."""
        self._grant(Knows.MOMENTS)
        return (self._squares / self.answered).sqrt().float()

    @property
    def rows(self) -> Tensor:
        """The honest rows, `(h, d)`. Needs ROWS."""
        self._grant(Knows.ROWS)
        return torch.cat(self._rows)

    @property
    def ids(self) -> tuple[int, ...]:
        """The clients behind `rows`, in order. Needs ROWS."""
        self._grant(Knows.ROWS)
        return tuple(self._ids)

    def aggregate(self, bent: Tensor) -> Tensor:
        """What the rule, in its present state, returns on the honest rows and `bent (k, d)`: `(d,)`. Needs ROWS."""
        return self._aggregate(torch.cat([self.rows, bent]))


@final
@dataclass(frozen=True)
class PublicModel:
    """What every client knows of the model it is sent.

    Attributes:
      labels: number of labels.
      tokenize: texts -> `{name: (N, T)}`; None where the model reads tensors.
      adapters: where the factors of low-rank adapters are; None where there are none.
    """

    labels: int
    tokenize: Callable[[Sequence[str]], dict[str, Tensor]] | None = None
    adapters: AdapterLayout | None = None


class Attack(ABC):
    """What malicious clients do. The base of the two places where they can do it."""

    @property
    @abstractmethod
    def knowledge(self) -> tuple[str, ...]:
        """What it uses beyond its own data, in words, for the report: cohort size, honest moments, the rule ..."""

    def fitted(self, model: PublicModel) -> Self:
        """The same attack with what any client reads off the model.

        Raises:
          InvalidArgument: the attack does not fit it.
        """
        return self


class DataAttack(Attack):
    """Bends a client's examples before it trains."""

    @abstractmethod
    def poison(self, examples: Examples, generator: Generator) -> Examples:
        """One client's examples in, its poisoned examples out."""


class TargetedAttack(ABC):
    """Beside a data or update attack: one that wants a class of its choice wherever its trigger stands."""

    @abstractmethod
    def triggered(self, examples: Examples) -> Examples:
        """Test examples of other classes with the trigger in them, under the label the attacker wants; may be fewer."""


class UpdateAttack(Attack):
    """Replaces the attackers' rows after their client steps: nobody can make them clip. Codecs still apply.

    Class constants:
      obeys_chain: sends its rows through the client steps again (an attacker that clips, to stay unnoticed).
    """

    obeys_chain = False

    @property
    def needs(self) -> Knows:
        """The level of knowledge the attack asks for."""
        return Knows.OWN

    def init(self, d: int) -> State:
        """What the attackers share before the first round."""
        return {}

    @abstractmethod
    def bend(self, state: State, own: Tensor, honest: Knowledge, generator: Generator) -> tuple[State, Tensor]:
        """All attackers of a round in one batch: rows they would have sent `(k, d)` -> what they send `(k, d)`."""

    @final
    def __call__(
        self,
        own: Tensor,
        honest: Tensor | None = None,
        rule: Rule | Callable[[Tensor], Tensor] | None = None,
        generator: Generator | None = None,
    ) -> Tensor:
        """What the attackers send in their first round: the way into other people's code.

        Args:
          own: rows the attackers would have sent, `(k, d)`; not changed.
          honest: rows of the others, `(h, d)`; the attack sees no more of them than it declares in `needs`.
          rule: the server's aggregation, for attacks that ask it.
          generator: seeded with 0 when None.

        Returns:
          `(k, d)`.

        Raises:
          NotRevealed: the attack needs more than was given.
        """
        cohort = len(own) + (0 if honest is None else len(honest))
        known = Knowledge(self.needs, cohort, rule or _no_rule, rule=rule if isinstance(rule, Rule) else None)
        if honest is not None:
            known.add(honest)
        generator = Generator().manual_seed(0) if generator is None else generator
        return self.bend(self.init(own.shape[1]), own, known, generator)[1]


def _no_rule(rows: Tensor) -> Tensor:
    raise NotRevealed("the attack asks what the server would do; give it the rule")


class AttackSchedule(ABC):
    """When malicious clients poison; in other rounds they behave like everybody."""

    @abstractmethod
    def active(self, now: int, malicious: Sequence[int], generator: Generator) -> list[int]:
        """Of the malicious clients of round `now` (counted from 0), in order, those that poison."""


@final
@dataclass(frozen=True)
class ServerScene:
    """What a server knows of a run before it starts; and the truth, with which a curious one is scored.

    Attributes:
      load: a model `(d,)` -> the module that clients are sent, without dropout; one module, loaded anew each time.
      layout: where its trained parameters lie in a row.
      change: examples of a client -> how it trains on them; None where the server cannot say.
      examples: a client's own; nothing but a score, or what the server is told of them, may depend on it.
      special: token ids that every text has (padding, start, end): no score counts them.
      clients: in the population, numbered from 0.
      strangers: examples of the same kind that nobody trains on; None: there are none.
      losses: a loaded module and examples -> the loss of each, `(b,)`, as clients minimise it; None: not told.
      adapters: where the factors of low-rank adapters are; None where there are none.
    """

    load: Callable[[Tensor], nn.Module]
    layout: Layout
    change: Callable[[int], LocalSteps | None]
    examples: Callable[[int], Examples]
    special: frozenset[int] = frozenset()
    clients: int = 0
    strangers: Examples | None = None
    losses: Callable[[nn.Module, Examples], Tensor] | None = None
    adapters: AdapterLayout | None = None


class ServerAttack(ABC):
    """A curious server: looks at exactly what the channel revealed."""

    def fitted(self, scene: ServerScene) -> ServerAttack:
        """What looks at the rounds of this run.

        Raises:
          InvalidArgument: the attack does not fit its model or its data.
        """
        return self

    @abstractmethod
    def look(self, wire: WireView, model: Tensor, now: int) -> dict[str, float]:
        """Scores for the record, by name with the unit in it.

        Args:
          wire: what the server received in this round.
          model: what it had sent to the clients, `(d,)`.
          now: the round, from 0.
        """
