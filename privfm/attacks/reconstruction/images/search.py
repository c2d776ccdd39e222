"""The search all of these attacks share: Adam on pixels inside the valid range, from noise, keeping the best."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf, isfinite
from typing import Final, final

import torch
from torch import Generator, Tensor

from privfm.checks import require
from privfm.contracts import Watch

_DEVIATIONS: Final = 4.0
"""Width of the valid range in deviations of pixels. The papers' constants (step 0.1, standard normal start) are for
images with deviation one; [0, 1] is 4.0 of them wide for CIFAR-10 (deviation 0.247) and 3.2 for MNIST (0.308)."""

_TOLD_EVERY: Final = 20
"""Iterations between two words on progress."""


@final
@dataclass(frozen=True)
class PixelRange:
    """The valid range of pixels, and images in units in which they have deviation one: the search's units.

    Args:
      low: least valid value, in the model's input scale.
      high: largest.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        require(
            isfinite(self.low) and isfinite(self.high) and self.low < self.high,
            f"pixels=({self.low!r}, {self.high!r}): expected the least and the largest valid value of a pixel",
        )

    @property
    def _unit(self) -> float:
        return (self.high - self.low) / _DEVIATIONS

    def pixels(self, searched: Tensor) -> Tensor:
        """From the search's units to the model's input scale."""
        return searched * self._unit + (self.low + self.high) / 2

    def start(self, shape: tuple[int, ...], generator: Generator, like: Tensor) -> Tensor:
        """Standard normal noise within the range, in the search's units, drawn where the generator is."""
        noise = torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float64)
        return self.inside(noise.to(like.device, like.dtype))

    def inside(self, searched: Tensor) -> Tensor:
        """The nearest valid image."""
        return searched.clamp(-_DEVIATIONS / 2, _DEVIATIONS / 2)


def step_schedule(share: float) -> float:
    """The factor of the step size after a share of the iterations: to a tenth at 3/8, at 5/8 and at 7/8.

    Source: Geiping, Bauermeister, Dröge, Moeller, 2020, appendix on hyper-parameters.

    >>> [step_schedule(share) for share in (0.0, 0.375, 0.7, 1.0)]
    [1.0, 0.1, 0.01, 0.001]
    """
    return float(10.0 ** -sum(share >= border for border in (3 / 8, 5 / 8, 7 / 8)))


@final
@dataclass(frozen=True)
class Best:
    """What a search ends with.

    Attributes:
      values: in the search's units, those with the lowest loss met.
      loss: theirs.
      iterations: made.
    """

    values: Tensor
    loss: float = inf
    iterations: int = 0


@final
@dataclass(frozen=True)
class Descent:
    """Adam, on the sign of the gradient or on the gradient, back into the valid range after every step.

    Args:
      iterations: steps.
      learning_rate: first step size, in deviations of pixels.
      schedule: factor of the step size by the share of the iterations that are done.
      signed: Adam sees only the gradient's sign.
      noise: deviation of noise added to every gradient, in units of the step size (Langevin).
    """

    iterations: int
    learning_rate: float
    schedule: Callable[[float], float] = step_schedule
    signed: bool = True
    noise: float = 0.0

    def run(
        self,
        starts: Tensor,
        loss: Callable[[int, Tensor, Tensor], Tensor],
        limits: PixelRange,
        watch: Watch,
        generator: Generator,
        *,
        told: str = "matching the update",
        done: tuple[float, float] = (0.0, 1.0),
        between: Callable[[int, Tensor], None] | None = None,
    ) -> list[Best]:
        """Several searches side by side, `(runs, ...)`; each keeps its best.

        The first evaluation is always made, so that there is a result whatever the time limit.

        Args:
          starts: where each begins.
          loss: of one search, from its number, its values and the values of all (constants): a scalar.
          limits: of pixels.
          watch: asked before every step.
          generator: of the noise.
          told: what progress says.
          done: the shares of the whole work before and after this.
          between: called after every step with the iterations made and all values, outside of any graph.
        """
        values = starts.detach().clone().requires_grad_()
        adam = torch.optim.Adam([values], lr=self.learning_rate)
        best = [Best(start.detach().clone()) for start in starts]
        values.grad = torch.zeros_like(values)
        for iteration in range(self.iterations + 1):
            constants = values.detach().clone()
            for run in range(len(starts)):
                one = constants[run].clone().requires_grad_()
                scored = loss(run, one, constants)
                if (value := float(scored.detach())) < best[run].loss:
                    best[run] = Best(constants[run], value, iteration)
                if iteration < self.iterations:
                    values.grad[run] = torch.autograd.grad(scored, one)[0]
            if iteration == self.iterations or watch.over:
                break
            self._step(values, adam, iteration, limits, generator)
            if between is not None:
                between(iteration + 1, values.detach())
            if iteration % _TOLD_EVERY == 0:
                watch.tell(told, done[0] + (done[1] - done[0]) * iteration / self.iterations)
        return best

    def _step(
        self, values: Tensor, adam: torch.optim.Adam, iteration: int, limits: PixelRange, generator: Generator
    ) -> None:
        assert values.grad is not None
        rate = self.learning_rate * self.schedule(iteration / self.iterations)
        adam.param_groups[0]["lr"] = rate
        values.grad.nan_to_num_(0.0, 0.0, 0.0)  # a step that overflowed is not taken; the best is kept anyway
        if self.signed:
            values.grad.sign_()
        adam.step()
        with torch.no_grad():
            if self.noise > 0:
                drawn = torch.randn(values.shape, generator=generator, device=generator.device)
                values.add_(drawn.to(values.device, values.dtype), alpha=self.noise * rate)
            values.copy_(limits.inside(values))
