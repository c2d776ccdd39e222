"""Canaries that send a direction of the model itself."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Final, final

import torch
from torch import Generator, Tensor

from privfm.attacks.audit.ghosts import check_places, check_size
from privfm.checks import InvalidArgument, require
from privfm.contracts import Canaries, CanaryScene
from privfm.contracts.audit import check_count

_KEPT: Final = 200_000_000
"""Bytes of random directions that are held in memory; beyond, each is drawn again from its seed whenever it is used
(10 CPU milliseconds for a million values), so that 256 canaries of a large model do not take a gigabyte."""

_SEEDS: Final = 2**32
"""Seeds that torch's CPU generator tells apart (Mersenne Twister, initialised from 32 bits)."""

_MARGIN: Final = 1e-6
"""Share by which a row is sent longer than asked for, lest rounding to float32 (6e-8) leave it short of the clip."""

_BLOCK: Final = 2**24
"""Values of gradients that are computed at once: 64 MB."""


class _Directions(Canaries):
    """Ready canaries with a direction each.

    Attributes:
      size: length of what is sent, in clips.
      d: trained values.
    """

    size: float
    d: int

    @abstractmethod
    def direction(self, place: int) -> Tensor:
        """The direction of one canary, `(d,)` float32, of length 1."""

    def fitted(self, scene: CanaryScene, generator: Generator) -> Canaries:
        raise InvalidArgument("these canaries are fitted already: fit the settings they were made from")

    def rows(self, places: Sequence[int], d: int) -> Tensor:
        check_places(places, self.count)
        require(d == self.d, f"d={d}: these canaries were fitted to {self.d} trained values")
        found = torch.empty(len(places), d)
        for row, place in zip(found, places, strict=True):
            torch.mul(self.direction(place), self.size * (1 + _MARGIN), out=row)
        return found

    def observed(self, vector: Tensor) -> Tensor:
        """`(count,)` float64; the sums are float64 too, d terms of float32 would lose three digits."""
        require(vector.shape == (self.d,), f"vector {tuple(vector.shape)}: expected ({self.d},), one release")
        exact = vector.double()
        return torch.stack([self.direction(place).double() @ exact for place in range(self.count)])


@final
@dataclass(frozen=True, eq=False)
class _SeededDirections(_Directions):
    """Random directions, drawn whenever they are asked for. Canary j has the seed `seed + j`."""

    count: int
    size: float
    d: int
    seed: int

    def direction(self, place: int) -> Tensor:
        drawn = torch.randn(self.d, generator=Generator().manual_seed(self.seed + place))
        return _unit(drawn)


@final
@dataclass(frozen=True, eq=False)
class _KeptDirections(_Directions):
    """Directions in memory, `matrix (count, d)`."""

    count: int
    size: float
    d: int
    matrix: Tensor

    def direction(self, place: int) -> Tensor:
        return self.matrix[place]


class _ToBeFitted(Canaries):
    """Settings of canaries that depend on the model."""

    def rows(self, places: Sequence[int], d: int) -> Tensor:
        raise _unfitted(self)

    def observed(self, vector: Tensor) -> Tensor:
        raise _unfitted(self)


@final
@dataclass(frozen=True)
class RandomDirections(_ToBeFitted):
    """Canary j sends a direction drawn uniformly from the unit sphere in the space of all trained values.

    Two of them are nearly orthogonal: their inner product has mean 0 and standard deviation `1 / sqrt(d)`. What the
    coins of the other m canaries add to one's trace in a release therefore has variance about `m / (4 d)` clips
    squared, beside a constant of that size, and what the clients' sum adds has `|sum|^2 / d`: keep m well under
    `2 d z^2` where the noise has z clips. They take part in the model, so that many of them cost accuracy.

    Cost: `count` inner products of length d a release; 4 `count` d bytes, or, where that is over 200 MB, drawing them
    again at each use.

    Args:
      count: of canaries, at least 8.
      size: length of what is sent, in clips, at least 1. The default is the source's; more makes a forgotten clip
        show, at the price of the model.

    Source: Andrew, Kairouz, Oh, Oprea, McMahan, Suriyakumar, "One-shot empirical privacy estimation for federated
    learning", 2024.
    """

    count: int
    size: float = 1.0

    def __post_init__(self) -> None:
        check_count(self.count)
        check_size(self.size)

    def fitted(self, scene: CanaryScene, generator: Generator) -> Canaries:
        require(scene.d >= 2, f"d={scene.d}: expected at least 2 trained values, or all directions are one")
        # Seeds in a row, not hashes of names: within 32 bits two hashes of a few hundred may well be the same.
        seed = int(torch.randint(_SEEDS - self.count, (), generator=generator))
        seeded = _SeededDirections(self.count, self.size, scene.d, seed)
        if 4 * self.count * scene.d > _KEPT:
            return seeded
        matrix = torch.stack([seeded.direction(place) for place in range(self.count)])
        return _KeptDirections(self.count, self.size, scene.d, matrix)


@final
@dataclass(frozen=True)
class GradientCanaries(_ToBeFitted):
    """Canary j sends the step downhill of one held-out example: minus its loss's gradient at the initial model.

    What a client with that one example would send in the first round, brought to `size` clips.

    These directions are far from orthogonal: examples of one task share most of their gradient, and in low-rank
    adapters the same few columns. The price is power, not validity: coins stay independent whatever canaries send, and
    a bound from them holds. In each release the other canaries' coins add variance `sum over i of cos(i, j)^2 / 4`
    clips squared to the trace of canary j, a quarter of `count - 1` at worst (0.35 with 64 of them, against 0.0006 of
    random directions: MiniLM, LoRA of rank 8 on the last two layers, docstrings, d = 26,886, where two canaries have a
    cosine of 0.15 in root mean square and 0.71 at most), beside a constant, half the sum of cos(i, j). Honest
    clients' updates, which also go downhill, add their own. A check of the noise's scale or of the shift presupposes
    orthogonal canaries: use ghosts for it.

    Cost: one gradient of each of `count` examples; 4 `count` d bytes; `count` inner products of length d a release.

    Args:
      count: of canaries, at least 8, at most as many as there are held-out examples.
      size: length of what is sent, in clips, at least 1.

    Source: Nasr et al., "Tight auditing of differentially private machine learning", 2023 (gradients as canaries);
    Maddock, Sablayrolles, Stock, "CANIFE", 2023 (one crafted canary, to be told apart from clients' updates).
    """

    count: int
    size: float = 1.0

    def __post_init__(self) -> None:
        check_count(self.count)
        check_size(self.size)

    def fitted(self, scene: CanaryScene, generator: Generator) -> Canaries:
        held = len(scene.holdout)
        require(held >= self.count, f"count={self.count}: there are {held} held-out examples; lower count")
        chosen = scene.holdout.take(torch.randperm(held, generator=generator)[: self.count])
        matrix = torch.empty(self.count, scene.d)
        together = max(1, _BLOCK // scene.d)
        for block in range(ceil(self.count / together)):
            places = torch.arange(block * together, min((block + 1) * together, self.count))
            matrix[places] = -scene.gradients(chosen.take(places)).detach().to(matrix)
        lengths = torch.linalg.vector_norm(matrix, dim=1, dtype=torch.float64)
        bad = (~((lengths > 0) & lengths.isfinite())).nonzero()[:, 0].tolist()
        require(not bad, f"gradients of {len(bad)} held-out examples are zero or not finite: they have no direction")
        matrix = (matrix / lengths[:, None]).float()
        return _KeptDirections(self.count, self.size, scene.d, matrix)


def _unit(vector: Tensor) -> Tensor:
    """`vector (d,)` brought to length 1 in place."""
    return vector.div_(torch.linalg.vector_norm(vector, dtype=torch.float64).item())


def _unfitted(canaries: Canaries) -> InvalidArgument:
    return InvalidArgument(f"{type(canaries).__name__} has not seen a model: call fitted(scene, generator) first")
