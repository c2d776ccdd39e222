"""How one unit's contribution is bounded: a client's update, or the gradient of an example."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, sqrt
from typing import final

import torch
from torch import Generator, Tensor

from privfm.blocks import finite
from privfm.checks import fraction, one_of, positive, require
from privfm.contracts import Clipping, Encoded, Spans, State, Transform
from privfm.contracts.transforms import MARGIN


def margin(dtype: torch.dtype) -> float:
    """How much short of the bound: the factor and each product are rounded by half a last place at most."""
    return max(MARGIN, 2 * torch.finfo(dtype).eps)


def norms(rows: Tensor) -> Tensor:
    """L2 norms `(k, 1)` in float64, without a float64 copy of the rows."""
    lengths: Tensor = torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=torch.float64)
    return lengths


def within(rows: Tensor, bound: float) -> Tensor:
    """Rows scaled down to `bound` where they are longer; what is not finite, or too long for a number, is zero."""
    lengths = norms(rows)
    return _scaled(
        rows, torch.where(lengths > bound, bound * (1 - margin(rows.dtype)) / lengths, torch.ones_like(lengths))
    )


def _scaled(rows: Tensor, factor: Tensor) -> Tensor:
    """Rows `(k, d)` times `factor (k, 1)`, float64; zero where a row is not finite, or its factor has too few digits.

    Below the smallest normal number a factor is rounded by more than the margin allows for.
    """
    wide = rows.float() if torch.finfo(rows.dtype).bits < 32 else rows
    usable = finite(rows)[:, None] & (factor >= torch.finfo(wide.dtype).tiny)
    scaled = (wide * factor.to(wide.dtype)).to(rows.dtype)
    return torch.where(usable, scaled, torch.zeros((), dtype=rows.dtype, device=rows.device))


@final
@dataclass(frozen=True)
class Flat(Clipping):
    """One bound for the whole row.

    Source: Abadi et al., "Deep learning with differential privacy", 2016, section 3.1; McMahan et al., "Learning
    differentially private recurrent language models", 2018, "flat clipping".
    """

    def clip(self, rows: Tensor, bound: float, layers: Spans) -> Tensor:
        return within(rows, bound)


@final
@dataclass(frozen=True)
class PerLayer(Clipping):
    """A bound for each layer, such that the whole row keeps to the plan's.

    Clipping each of m layers to C would make a row as long as `C sqrt(m)`: accounted for C, an epsilon of 4.8 is
    really 9.9 with two layers. Here the squares of the layers' bounds add up to the square of the plan's.

    Args:
      split: `equal`, or `size`: the square of a layer's bound is proportional to its number of values.

    Source: McMahan et al., 2018, "per-layer clipping".
    """

    split: str = "equal"

    def __post_init__(self) -> None:
        one_of("split", self.split, ("equal", "size"))

    def bounds(self, bound: float, layers: Spans) -> tuple[float, ...]:
        """Each layer's bound; the squares add up to `bound` squared."""
        sizes = [hi - lo if self.split == "size" else 1 for lo, hi in layers]
        return tuple(bound * sqrt(size / sum(sizes)) for size in sizes)

    def clip(self, rows: Tensor, bound: float, layers: Spans) -> Tensor:
        own = self.bounds(bound, layers)
        parts = [within(rows[:, lo:hi], limit) for (lo, hi), limit in zip(layers, own, strict=True)]
        whole = torch.cat(parts, dim=1)
        return torch.where(finite(rows)[:, None], whole, torch.zeros_like(whole))  # one bad layer voids the row


@final
@dataclass(frozen=True)
class Automatic(Clipping):
    """Every row is scaled to almost the bound, long or short: there is no threshold to tune.

    A row g becomes `C g / (|g| + gamma)`: shorter than C, whatever g is.

    Args:
      gamma: what keeps a short row short, in units of the rows' norm.

    Source: Bu et al., "Automatic clipping: differentially private deep learning made easier and stronger", 2023,
    equation 4 (AUTO-S) and its default gamma.
    """

    gamma: float = 0.01

    def __post_init__(self) -> None:
        positive("gamma", self.gamma)

    def clip(self, rows: Tensor, bound: float, layers: Spans) -> Tensor:
        return _scaled(rows, bound * (1 - margin(rows.dtype)) / (norms(rows) + self.gamma))


@final
@dataclass(frozen=True)
class AdaptiveQuantile(Clipping):
    """The bound follows a quantile of the clients' update norms, privately.

    Each client adds one number to its update: +1/2 if it was not clipped, -1/2 if it was. It is scaled and summed,
    noised and paid for with the rest: `indicator_weight` says how. From the noisy share b of clients below the bound,
    `C <- C exp(-rate (b - quantile))`: the bound falls while too many are below it.

    Zero-out takes a whole row away, the number included: it is a client that is not there, not one whose update is zero
    and counts as short. The bounds of all rounds are part of what is released; the plan's `max_grad_norm` is the first.

    Args:
      quantile: share of clients that are to stay below the bound.
      rate: speed of the bound, on a logarithmic scale.
      count_deviation: deviation of the noise on the count of clients below the bound, in clients; None: a twentieth of
        the expected cohort, made for hundreds of clients. Half the noise multiplier is too little: it would leave
        nothing for the update.

    Source: Andrew et al., "Differentially private learning with adaptive clipping", 2021, algorithm 1 and theorem 1;
    defaults: section 3.
    """

    quantile: float = 0.5
    rate: float = 0.2
    count_deviation: float | None = None

    def __post_init__(self) -> None:
        fraction("quantile", self.quantile, one=False)
        positive("rate", self.rate)
        if self.count_deviation is not None:
            positive("count_deviation", self.count_deviation)

    def clip(self, rows: Tensor, bound: float, layers: Spans) -> Tensor:
        return within(rows, bound)

    def counted(self, cohort: float) -> float:
        """Deviation of the noise on the count, in clients."""
        return cohort / 20 if self.count_deviation is None else self.count_deviation

    def indicator_weight(self, noise_multiplier: float, cohort: float) -> float:
        """Factor g of the indicator: a client sends `(clipped update, 2 g C (+-1/2))`, of length `C sqrt(1 + g^2)`.

        With noise z on that length, the count's noise has deviation `z sqrt(1 + g^2) / (2 g)`; solved for g. It is
        theorem 1 of the paper, folded into one Gaussian.

        Raises:
          InvalidArgument: the count is to be less noisy than the whole budget allows.
        """
        if noise_multiplier == 0:
            return 1.0  # the count is exact at any weight
        count = self.counted(cohort)
        spare = 4 * count**2 - noise_multiplier**2
        require(
            spare > 0,
            f"count_deviation={count:g} needs to be above half the noise multiplier {noise_multiplier:g}: counting "
            "would cost the whole budget; raise count_deviation or the cohort",
        )
        return noise_multiplier / sqrt(spare)

    def next_bound(self, bound: float, share: float) -> float:
        """The bound after a round in which the noisy `share` of clients stayed below it."""
        return bound * exp(-self.rate * (share - self.quantile))


@final
@dataclass(frozen=True)
class ClientClip(Transform):
    """The last client step under a client-level plan; an attacker skips it.

    Args:
      clipping: how.
      bound: L2 bound of a whole update.
      layers: columns of each layer.
    """

    clipping: Clipping
    bound: float
    layers: Spans
    additive = True

    @property
    def similarity(self) -> float | None:
        return 1.0

    def norm_bound(self, bound: float, d: int) -> float:
        return min(bound, self.bound) if isinstance(self.clipping, Flat) else self.bound

    def encode(self, rows: Tensor, state: State, generators: Sequence[Generator]) -> tuple[Encoded, State]:
        return Encoded(self.clipping.clip(rows, self.bound, self.layers), {}), state
