"""Canaries: clients that are put into a run with probability one half each, so that their traces can be counted."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

from torch import Generator, Tensor

from privfm.checks import require
from privfm.contracts.learning import Examples


@final
@dataclass(frozen=True)
class CanaryScene:
    """What canaries are made from; nothing of it is a client's.

    Attributes:
      d: trained values.
      label_names: of the task; one where it predicts tokens.
      tokenize: texts -> model inputs `{name: (N, T)}`; None for models of tensors.
      holdout: examples of the same distribution that nobody trains on.
      gradients: examples -> gradient of each one's loss at the initial model, `(b, d)`.
    """

    d: int
    label_names: tuple[str, ...]
    tokenize: Callable[[Sequence[str]], dict[str, Tensor]] | None
    holdout: Examples
    gradients: Callable[[Examples], Tensor]


class Canaries(ABC):
    """`count` clients more. Each is in the run with probability 1/2, drawn by whoever audits, and else is not there.

    Under a plan with its fixed denominator being absent is sending zeros; elsewhere a smaller cohort is a smaller one.

    Two kinds: those that send a row of their own (`rows`), whose trace is read off every release (`observed`); and
    those that train on examples of their own (`examples`), whose trace is the final model's loss on them.

    Class constants:
      ghost: whether the model is untouched: the rows are zero wherever the model has values.
      trained: whether they train on examples, and send no row of their own.
    """

    ghost = False
    trained = False
    count: int

    @property
    def columns(self) -> int:
        """Columns that are appended to everybody's update for the audit, and cut off before the server's step."""
        return 0

    @abstractmethod
    def fitted(self, scene: CanaryScene, generator: Generator) -> Canaries:
        """Ready for a run.

        Raises:
          InvalidArgument: the model or its data do not do for these canaries.
        """

    def rows(self, places: Sequence[int], d: int) -> Tensor:
        """What canaries send when they are in, `(k, d + columns)`, unclipped, in units of the clip, at least 1 long.

        Args:
          places: of the canaries, 0 to `count` - 1.
          d: trained values.
        """
        raise NotImplementedError(f"{type(self).__name__} trains on examples")

    def observed(self, vector: Tensor) -> Tensor:
        """One release `(d + columns)` -> `(count,)`, its inner products with the canaries' directions of length 1."""
        raise NotImplementedError(f"{type(self).__name__} trains on examples")

    def examples(self, place: int) -> Examples:
        """What one canary trains on when it is in."""
        raise NotImplementedError(f"{type(self).__name__} sends rows of its own")


def check_count(count: int) -> None:
    """Raises `InvalidArgument` where there are fewer canaries than could ever certify anything."""
    require(count >= 8, f"count={count!r}: expected at least 8; fewer certify next to nothing (at most ln(m/3))")
