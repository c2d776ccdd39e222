"""Local training: what one client does with the model it receives."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, sqrt
from typing import final

import torch
from torch import Generator, Tensor, nn

from privfm.checks import at_least, fraction, non_negative, positive, require
from privfm.contracts import Examples, LocalSteps, LocalTraining, State

Losses = Callable[[Examples], Tensor]

BETAS, EPSILON = (0.9, 0.999), 1e-8
"""Defaults of torch's AdamW, and of Kingma and Ba, "Adam", 2015, algorithm 1."""


@dataclass(frozen=True)
class Schedule:
    """How long a client trains: whole epochs, or exactly `steps` steps over reshuffled epochs.

    Args:
      batch_size: examples a step; a client with fewer uses all of them.
      epochs: passes over the client's data, used when `steps` is None.
      steps: local steps.
    """

    batch_size: int = 32
    epochs: int = 1
    steps: int | None = None

    def __post_init__(self) -> None:
        at_least("batch_size", self.batch_size, 1)
        at_least("epochs", self.epochs, 1)
        if self.steps is not None:
            at_least("steps", self.steps, 1)

    def batches(self, n: int, generator: Generator) -> Iterator[Tensor]:
        """Places `(<= batch_size,)` of each step's examples among n, in a fresh order every epoch."""
        done = 0
        epoch = 0
        while self.steps is not None or epoch < self.epochs:
            for places in torch.split(torch.randperm(n, generator=generator), self.batch_size):
                if done == self.steps:
                    return
                yield places
                done += 1
            epoch += 1

    def count(self, n: int) -> int:
        """Steps of a client with n examples."""
        return self.epochs * ceil(n / self.batch_size) if self.steps is None else self.steps


class Descent(LocalTraining):
    """Template: steps of a torch optimizer over a schedule; the optimizer is made anew for every client.

    A class has a field `schedule`.
    """

    schedule: Schedule

    def stacked(self, weights: Tensor) -> State:
        """The optimizer's state for many clients at once, from their weights `(K, d)`: zeros of that shape by name."""
        return {}

    @abstractmethod
    def step(self, weights: Tensor, gradients: Tensor, state: State, now: int) -> None:
        """One step of the first k of K clients, in place: what `optimizer` does, on matrices.

        Args:
          weights: `(K, d)`; only the first k rows change, those of the clients that still train.
          gradients: `(k, d)`.
          state: of `stacked`; changed in place.
          now: steps these clients have made, from 0.
        """

    @abstractmethod
    def optimizer(self, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        """A fresh optimizer of the trained parameters."""

    def run(
        self,
        module: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        losses: Losses,
        examples: Examples,
        generator: Generator,
    ) -> nn.Module:
        optimizer = self.optimizer(list(parameters.values()))
        for places in self.schedule.batches(len(examples), generator):
            optimizer.zero_grad()
            losses(examples.take(places)).mean().backward()  # type: ignore[no-untyped-call]  # torch's own
            optimizer.step()
        return module


@final
@dataclass(frozen=True)
class SGD(Descent):
    """Stochastic gradient descent.

    Args:
      learning_rate: step size.
      schedule: how long.
      momentum: of this client's own steps; forgotten afterwards.
    """

    learning_rate: float
    schedule: Schedule = Schedule()
    momentum: float = 0.0

    def __post_init__(self) -> None:
        positive("learning_rate", self.learning_rate)
        fraction("momentum", self.momentum, zero=True, one=False)

    def stacked(self, weights: Tensor) -> State:
        return {"momentum": torch.zeros_like(weights)} if self.momentum else {}

    def step(self, weights: Tensor, gradients: Tensor, state: State, now: int) -> None:
        k = len(gradients)
        if self.momentum:
            gradients = state["momentum"][:k].mul_(self.momentum).add_(gradients)
        weights[:k].sub_(gradients, alpha=self.learning_rate)

    def optimizer(self, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=self.learning_rate, momentum=self.momentum)

    def local_steps(self, examples: int) -> LocalSteps:
        steps, size = self.schedule.count(examples), self.schedule.batch_size
        return LocalSteps(self.learning_rate, steps, "sgd", size, self.momentum)


@final
@dataclass(frozen=True)
class AdamW(Descent):
    """Adam with decoupled weight decay; its state is forgotten after every round.

    Args:
      learning_rate: step size.
      schedule: how long.
      weight_decay: pull to zero a step, in units of the learning rate.

    Source: Loshchilov and Hutter, "Decoupled weight decay regularization", 2019.
    """

    learning_rate: float
    schedule: Schedule = Schedule()
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        positive("learning_rate", self.learning_rate)
        non_negative("weight_decay", self.weight_decay)

    def stacked(self, weights: Tensor) -> State:
        return {name: torch.zeros_like(weights) for name in ("first", "second")}

    def step(self, weights: Tensor, gradients: Tensor, state: State, now: int) -> None:
        (beta_1, beta_2), floor = BETAS, EPSILON
        rows, first, second = (value[: len(gradients)] for value in (weights, state["first"], state["second"]))
        rows.mul_(1 - self.learning_rate * self.weight_decay)
        first.lerp_(gradients, 1 - beta_1)
        second.mul_(beta_2).addcmul_(gradients, gradients, value=1 - beta_2)
        scale = (second.sqrt() / sqrt(1 - beta_2 ** (now + 1))).add_(floor)
        rows.addcdiv_(first, scale, value=-self.learning_rate / (1 - beta_1 ** (now + 1)))

    def optimizer(self, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=self.learning_rate, weight_decay=self.weight_decay)

    def local_steps(self, examples: int) -> LocalSteps:
        return LocalSteps(self.learning_rate, self.schedule.count(examples), "adam", self.schedule.batch_size)


@final
@dataclass(frozen=True)
class OwnTraining(LocalTraining):
    """Somebody's own training loop: `(model, examples) -> model`.

    `examples` is a map-style torch data set of `{name: tensor}` with `labels`, so a Hugging Face Trainer takes it as it
    is. The callable runs with torch's global generators seeded for the client and the round.

    Args:
      function: trains the model in place and returns it, or returns another one with the same trained parameters.
    """

    function: Callable[[nn.Module, Examples], nn.Module]

    def run(
        self,
        module: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        losses: Losses,
        examples: Examples,
        generator: Generator,
    ) -> nn.Module:
        trained = self.function(module, examples)
        require(
            isinstance(trained, nn.Module),
            f"the training function returned a {type(trained).__name__}, expected the trained model",
        )
        return trained
