"""What bounds one unit's contribution, and the bridge between example-level plans and training."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

from torch import Generator, Tensor

Spans = tuple[tuple[int, int], ...]
"""Columns `[lo, hi)` of each layer in a flat vector; together they cover it, in order."""


class Clipping(ABC):
    """How a row is shortened so that nobody contributes more than a bounded length."""

    @abstractmethod
    def clip(self, rows: Tensor, bound: float, layers: Spans) -> Tensor:
        """No row of the result is longer than `bound` in L2 norm; a row that is not finite becomes zero.

        Args:
          rows: `(k, d)`, updates of clients or gradients of examples.
          bound: largest L2 norm of a whole row.
          layers: columns of each layer.

        Returns:
          `(k, d)`, of the rows' type and device; row i depends on row i only.
        """


class GradientPrivacy(ABC):
    """The one bridge between example-level plans and training.

    Whoever trains draws its batches here, clips the gradient of every example and hands their sums back to be noised;
    nothing else it does may depend on the examples. A step's sums may come in parts (gradient accumulation).
    """

    @abstractmethod
    def batches(self, examples: int, generator: Generator) -> Iterator[Tensor]:
        """Places of the examples of each step of one round of a client that holds so many; a batch may be empty."""

    @abstractmethod
    def clip(self, gradients: Tensor) -> Tensor:
        """Gradients of examples `(b, d)` -> `(b, d)`, none longer than the plan's bound; non-finite ones are zero."""

    @abstractmethod
    def noised(self, sums: Tensor, examples: Sequence[int], generators: Sequence[Generator]) -> Tensor:
        """Sums of clipped gradients `(k, d)` of k clients -> noisy mean gradients `(k, d)` over the expected batch.

        Args:
          sums: zero for a client whose batch was empty; noise is added all the same.
          examples: how many examples each client holds.
          generators: each client's own; one draw of d normals a step.
        """
