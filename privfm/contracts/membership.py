"""What models say of examples, and what an attack makes of it: who was trained on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import final

import numpy as np
from numpy.typing import NDArray

from privfm.checks import InvalidArgument, require

Array = NDArray[np.float64]
Flags = NDArray[np.bool_]


@final
@dataclass(frozen=True)
class Signals:
    """One number a model and an example: how well the model fits it. Larger means better.

    Which number is the caller's to choose (minus the loss, the log-odds of the label, ...; see
    `privfm.attacks.membership.signals`), the same for all models.

    Attributes:
      values: `(models, n)`, or `(models, n, queries)` where each example was asked for in several forms.
      inside: `(models, n)`, which of the examples each model was trained on.
      population: `(models, z)` or `(models, z, queries)`, the same of examples that no model was trained on; None:
        there are none.

    Raises:
      InvalidArgument: shapes do not fit, or a value is not finite.
    """

    values: Array
    inside: Flags
    population: Array | None = None

    def __post_init__(self) -> None:
        values, inside, population = self.values, self.inside, self.population
        require(values.ndim in {2, 3}, f"values {values.shape}: expected (models, n) or (models, n, queries)")
        require(inside.dtype == np.bool_, f"inside has type {inside.dtype}: expected bool")
        require(
            inside.shape == values.shape[:2],
            f"inside {inside.shape}: expected {values.shape[:2]}, a flag for each value",
        )
        finite = np.isfinite(values).all() and (population is None or bool(np.isfinite(population).all()))
        require(bool(finite), "signals are not finite; a loss that overflowed says nothing: leave such examples out")
        if population is not None:
            fits = population.ndim == values.ndim and (population.shape[0], *population.shape[2:]) == (
                values.shape[0],
                *values.shape[2:],
            )
            require(fits, f"population {population.shape}: expected the models and queries of values {values.shape}")

    def __len__(self) -> int:
        """Number of models."""
        return len(self.values)

    @property
    def examples(self) -> int:
        """Number of examples that are judged."""
        return int(self.values.shape[1])

    def take(self, models: NDArray[np.int64] | list[int]) -> Signals:
        """Some of the models."""
        population = None if self.population is None else self.population[models]
        return replace(self, values=self.values[models], inside=self.inside[models], population=population)

    def without(self, model: int) -> Signals:
        """All models but one."""
        return self.take([place for place in range(len(self)) if place != model])


@final
@dataclass(frozen=True)
class Scored:
    """Scores of examples and the truth: what curves and intervals are made of.

    Attributes:
      scores: `(n,)` for one attacked model, or `(models, n)` for several over the same examples. Larger: more likely a
        member.
      members: the truth, of the same shape.

    Raises:
      InvalidArgument: shapes differ, a score is NaN, or there are no members or no others.
    """

    scores: Array
    members: Flags

    def __post_init__(self) -> None:
        scores, members = self.scores, self.members
        require(scores.ndim in {1, 2}, f"scores {scores.shape}: expected (n,) or (models, n)")
        require(members.shape == scores.shape, f"members {members.shape}: expected {scores.shape}, one a score")
        require(members.dtype == np.bool_, f"members has type {members.dtype}: expected bool")
        require(not np.isnan(scores).any(), "a score is NaN; minus infinity says that an example is no member")
        both = bool(members.any()) and not bool(members.all())
        require(both, "members: expected some that are and some that are not, else there is nothing to tell apart")


class MembershipAttack(ABC):
    """Decides by what models say of an example whether one of them was trained on it.

    Class constants:
      used: what the attacker must have, for the report.
    """

    used: tuple[str, ...] = ()

    @final
    def __call__(self, target: Signals, shadows: Signals | None = None) -> Array:
        """Scores `(n,)` of the examples; larger: more likely a member.

        Args:
          target: of the one attacked model; its `inside` is the truth and is not read.
          shadows: of the attacker's own models, on the same examples in the same order.

        Raises:
          InvalidArgument: something the attack needs is missing, or the two do not fit together.
        """
        require(len(target) == 1, f"target: expected signals of one model, got {len(target)}; take([k]) chooses one")
        if shadows is not None:
            wanted, given = target.values.shape[1:], shadows.values.shape[1:]
            require(wanted == given, f"shadows: expected examples and queries {wanted} as the target has, got {given}")
        if why := self.refusal(target, shadows):
            raise InvalidArgument(f"{type(self).__name__}: {why}")
        return self.scores(replace(target, inside=np.zeros_like(target.inside)), shadows)

    def refusal(self, target: Signals, shadows: Signals | None) -> str:
        """Why it cannot be run on these, with the way out; empty where it can."""
        return ""

    @abstractmethod
    def scores(self, target: Signals, shadows: Signals | None) -> Array:
        """See `__call__`; everything was checked, and `target.inside` tells nothing."""

    @final
    def pooled(self, models: Signals) -> Scored:
        """Every model attacked in turn, by all others: scores and truth `(models, n)`.

        Source: Carlini et al., "Membership inference attacks from first principles", 2022, section V-A.
        """
        require(len(models) >= 2, f"{len(models)} model: expected at least 2, one attacked by the others")
        found = [self(models.take([place]), models.without(place)) for place in range(len(models))]
        return Scored(np.stack(found), models.inside)
