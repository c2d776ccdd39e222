"""Example-level privacy of local training: every step bounds each example's gradient and noises their sum."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil
from typing import final

import numpy as np
import torch
from torch import Generator, Tensor

from privfm.checks import at_least, non_negative, require
from privfm.contracts import Clipping, GradientPrivacy, Spans
from privfm.defenses.privacy.noise import NoiseSource, noised, words

LARGEST_CLASSES = 16
"""Classes of sizes that get noise of their own: each costs a calibration of some seconds."""


@final
@dataclass(frozen=True)
class LocalSampling:
    """Batches and steps of a client, as its plan accounts for them.

    Args:
      batch_size: expected examples a step; each joins with probability `batch_size / n`, independently. A client with
        fewer uses all of them in every step.
      local_steps: steps a round, the same for every client; None: as many as `epochs` need.
      epochs: expected passes over a client's examples a round, used when `local_steps` is None.
      noise_by_examples: `(least examples, noise multiplier)` by rising size, where clients add their own noise; empty:
        the plan's for all.
    """

    batch_size: int
    local_steps: int | None = None
    epochs: int = 1
    noise_by_examples: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        at_least("batch_size", self.batch_size, 1)
        at_least("epochs", self.epochs, 1)
        if self.local_steps is not None:
            at_least("local_steps", self.local_steps, 1)
        sizes = [size for size, _ in self.noise_by_examples]
        require(sizes == sorted(set(sizes)), f"noise_by_examples={self.noise_by_examples}: expected rising sizes")
        for _, noise in self.noise_by_examples:
            non_negative("noise_by_examples", noise)

    def rate(self, examples: int) -> float:
        """Probability that an example of a client that holds so many is in a batch."""
        at_least("examples", examples, 1)
        return min(1.0, self.batch_size / examples)

    def steps(self, examples: int) -> int:
        """Steps a round of a client that holds so many."""
        return self.local_steps or self.epochs * ceil(examples / self.batch_size)

    def noise(self, examples: int, shared: float) -> float:
        """Noise multiplier of a client that holds so many.

        Raises:
          InvalidArgument: a client is smaller than any the noise was made for.
        """
        if not self.noise_by_examples:
            return shared
        own = [noise for least, noise in self.noise_by_examples if least <= examples]
        require(bool(own), f"a client has {examples} examples, fewer than any that noise_by_examples was made for")
        return own[-1]


def size_classes(examples: Sequence[int]) -> list[tuple[int, int]]:
    """Sizes in at most 16 classes `(least, most)`, by rising size."""
    require(len(examples) > 0, "examples=(): each client composes its own sampling rate; give all sizes")
    sizes = sorted(set(examples))
    count = min(len(sizes), LARGEST_CLASSES)
    edges = [len(sizes) * k // count for k in range(count + 1)]
    return [(sizes[lo], sizes[hi - 1]) for lo, hi in pairwise(edges)]


@final
@dataclass(frozen=True)
class ExamplePrivacy(GradientPrivacy):
    """DP-SGD inside one client.

    Formal guarantee: each step is the Gaussian mechanism on a Poisson sample of the client's examples; what leaves the
    client is made from noised sums alone. Sampling amplifies only against those who do not know the batches: with
    secure noise they come from the operating system too.

    Args:
      clipping: how a gradient is shortened.
      max_grad_norm: L2 bound of an example's whole gradient.
      noise_multiplier: deviation of the noise over the bound, for clients without their own.
      local: batches, steps and noise by size.
      layers: columns of each layer.
      source: where noise and batches come from.

    Source: Abadi et al., "Deep learning with differential privacy", 2016, algorithm 1.
    """

    clipping: Clipping
    max_grad_norm: float
    noise_multiplier: float
    local: LocalSampling
    layers: Spans
    source: NoiseSource = "seeded"

    def batches(self, examples: int, generator: Generator) -> Iterator[Tensor]:
        rate = self.local.rate(examples)
        for _ in range(self.local.steps(examples)):
            yield (self._uniform(examples, generator) < rate).nonzero()[:, 0]

    def _uniform(self, count: int, generator: Generator) -> Tensor:
        """Numbers in [0, 1), `(count,)` float64, from where the noise comes from."""
        if self.source == "seeded":
            return torch.rand(count, generator=generator, dtype=torch.float64)
        return torch.from_numpy((words("secure")(count) >> np.uint64(11)) * 2.0**-53)

    def clip(self, gradients: Tensor) -> Tensor:
        return self.clipping.clip(gradients, self.max_grad_norm, self.layers)

    def noised(self, sums: Tensor, examples: Sequence[int], generators: Sequence[Generator]) -> Tensor:
        rows = []
        for total, n, generator in zip(sums, examples, generators, strict=True):
            noise = self.local.noise(n, self.noise_multiplier)
            noisy = noised(total, noise, self.max_grad_norm, self.source, generator, terms=n)
            rows.append(noisy / (self.local.rate(n) * n))
        return torch.stack(rows).to(sums)
