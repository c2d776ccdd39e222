"""Ghost canaries: columns beside the model that only canaries fill."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Generator, Tensor

from privfm.checks import InvalidArgument, require
from privfm.contracts import Canaries, CanaryScene
from privfm.contracts.audit import check_count


@final
@dataclass(frozen=True)
class GhostCanaries(Canaries):
    """Canary j fills column j of `count` columns that everybody else leaves at zero; the model never sees them.

    They go through clip, weight, codecs, channel and noise up to the release, and not through client steps before the
    clip. The model's own columns of a canary are zero, so that no accuracy is lost, however many there are; no two
    canaries meet in a column, so that nobody's trace is blurred by another's. What they audit is the mechanism; what
    the model's path (local training, later rounds) adds or hides is for canaries in the model.

    They are sent at `size` times the clip, and must arrive as the clip: a forgotten clip shows as a shift `size` times
    too large. At `size=1` it would not show.

    Cost: `count` values more in every update, 4 bytes each in the clear; a row of a canary is `d + count` values, so a
    caller with many of them asks for few at a time.

    Args:
      count: of canaries, at least 8.
      size: length of what is sent, in clips, at least 1.

    >>> GhostCanaries(8).rows([2], d=1)[0].tolist()
    [0.0, 0.0, 0.0, 10.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    """

    ghost = True

    count: int
    size: float = 10.0

    def __post_init__(self) -> None:
        check_count(self.count)
        check_size(self.size)

    @property
    def columns(self) -> int:
        return self.count

    def fitted(self, scene: CanaryScene, generator: Generator) -> Canaries:
        return self  # nothing of them depends on the model

    def rows(self, places: Sequence[int], d: int) -> Tensor:
        check_places(places, self.count)
        found = torch.zeros(len(places), d + self.count)
        found[torch.arange(len(places)), d + torch.tensor(places, dtype=torch.int64)] = self.size
        return found

    def observed(self, vector: Tensor) -> Tensor:
        if vector.dim() != 1 or len(vector) < self.count:
            raise InvalidArgument(f"vector {tuple(vector.shape)}: expected (d + {self.count},), ghosts last")
        return vector[len(vector) - self.count :].double()


def check_size(size: float) -> None:
    """Raises `InvalidArgument` unless a canary of this length, in clips, always meets the clip."""
    require(1 <= size < float("inf"), f"size={size!r}: expected at least 1 clip, or the canary falls short of the clip")


def check_places(places: Sequence[int], count: int) -> None:
    """Raises `InvalidArgument` for a canary that is not there."""
    wrong = [place for place in places if not 0 <= place < count]
    require(not wrong, f"places={wrong}: expected canaries 0 to {count - 1}")
