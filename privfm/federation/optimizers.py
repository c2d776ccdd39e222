"""Server optimizers: the aggregated update is a pseudo-gradient."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from privfm.checks import fraction, positive
from privfm.contracts import ServerOptimizer, State


@final
@dataclass(frozen=True)
class Average(ServerOptimizer):
    """Adds the aggregate to the model: federated averaging at learning rate 1.

    Args:
      learning_rate: the server's step.
    """

    learning_rate: float = 1.0

    def __post_init__(self) -> None:
        positive("learning_rate", self.learning_rate)

    def step(self, state: State, model: Tensor, update: Tensor) -> tuple[State, Tensor]:
        return state, model + self.learning_rate * update


@final
@dataclass(frozen=True)
class Momentum(ServerOptimizer):
    """Heavy-ball momentum on the server: `m = beta m + update`.

    Args:
      learning_rate: the server's step.
      beta: share of the old momentum kept.

    Source: Hsu, Qi, Brown, "Measuring the effects of non-identical data distribution for federated visual
    classification", 2019, section 4 (FedAvgM).
    """

    learning_rate: float = 1.0
    beta: float = 0.9

    def __post_init__(self) -> None:
        positive("learning_rate", self.learning_rate)
        fraction("beta", self.beta, zero=True, one=False)

    def init(self, d: int) -> State:
        return {"momentum": torch.zeros(d)}

    def step(self, state: State, model: Tensor, update: Tensor) -> tuple[State, Tensor]:
        momentum = self.beta * state["momentum"] + update
        return {"momentum": momentum}, model + self.learning_rate * momentum


class Adaptive(ServerOptimizer):
    """Template of the adaptive optimizers of Reddi et al., "Adaptive federated optimization", 2021, algorithm 2.

    No bias correction; the second moment starts at `tau^2`, its least value there.
    """

    learning_rate: float
    beta_1: float
    beta_2: float
    tau: float

    def __post_init__(self) -> None:
        positive("learning_rate", self.learning_rate)
        fraction("beta_1", self.beta_1, zero=True, one=False)
        fraction("beta_2", self.beta_2, zero=True, one=False)
        positive("tau", self.tau)

    def init(self, d: int) -> State:
        return {"first": torch.zeros(d), "second": torch.full((d,), self.tau**2)}

    @abstractmethod
    def second_moment(self, second: Tensor, square: Tensor) -> Tensor:
        """Next second moment from the present one and the squared update, both `(d,)`."""

    def step(self, state: State, model: Tensor, update: Tensor) -> tuple[State, Tensor]:
        first = self.beta_1 * state["first"] + (1 - self.beta_1) * update
        second = self.second_moment(state["second"], update.square())
        moved = model + self.learning_rate * first / (second.sqrt() + self.tau)
        return {"first": first, "second": second}, moved


@final
@dataclass(frozen=True)
class Adam(Adaptive):
    """FedAdam.

    Args:
      learning_rate: the server's step (the paper's eta).
      beta_1: decay of the first moment.
      beta_2: decay of the second moment.
      tau: degree of adaptivity.

    Source: Reddi et al., 2021, algorithm 2; defaults: section 5 and appendix D.
    """

    learning_rate: float = 0.01
    beta_1: float = 0.9
    beta_2: float = 0.99
    tau: float = 1e-3

    def second_moment(self, second: Tensor, square: Tensor) -> Tensor:
        return self.beta_2 * second + (1 - self.beta_2) * square


@final
@dataclass(frozen=True)
class Yogi(Adaptive):
    """FedYogi: the second moment moves by at most the squared update, whatever it is now.

    Args:
      learning_rate: the server's step (the paper's eta).
      beta_1: decay of the first moment.
      beta_2: decay of the second moment.
      tau: degree of adaptivity.

    Source: Reddi et al., 2021, algorithm 2; defaults: section 5 and appendix D.
    """

    learning_rate: float = 0.01
    beta_1: float = 0.9
    beta_2: float = 0.99
    tau: float = 1e-3

    def second_moment(self, second: Tensor, square: Tensor) -> Tensor:
        return second - (1 - self.beta_2) * square * (second - square).sign()
