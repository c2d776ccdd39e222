"""What a curious server holds of its clients' data, what it is told beside it, and what it gives back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from time import perf_counter
from typing import Literal, final

import torch
from torch import Generator, Tensor, nn

from privfm.checks import InvalidArgument, at_least, fraction, nearest_if_any, non_negative, one_of, positive, require


@final
@dataclass(frozen=True)
class LocalSteps:
    """How a client came from the model it was sent to the one it sends the difference of. Public: the server sets it.

    Args:
      learning_rate: of every step.
      steps: taken, over all epochs.
      optimizer: `sgd` moves along gradients, so that a change is a sum of them; `adam` divides every coordinate by a
        number of its own, and no change is one.
      batch_size: examples of a step; None: all of the client's.
      momentum: share of the last step's direction that is added to the next gradient.
      subtracted: what is sent is a difference of weights, in which their rounding is; False: the steps themselves.
    """

    learning_rate: float
    steps: int = 1
    optimizer: Literal["sgd", "adam"] = "sgd"
    batch_size: int | None = None
    momentum: float = 0.0
    subtracted: bool = True

    def __post_init__(self) -> None:
        positive("learning_rate", self.learning_rate)
        at_least("steps", self.steps, 1)
        one_of("optimizer", self.optimizer, ("sgd", "adam"))
        if self.batch_size is not None:
            at_least("batch_size", self.batch_size, 1)
        fraction("momentum", self.momentum, zero=True, one=False)

    @property
    def weight(self) -> float:
        """Of all gradients together in a change, in units of the learning rate: their number, without momentum.

        >>> LocalSteps(0.1, steps=2).weight, LocalSteps(0.1, steps=2, momentum=0.5).weight
        (2.0, 2.5)
        """
        return sum((self.steps - back) * self.momentum**back for back in range(self.steps))


@final
@dataclass(frozen=True)
class Declared:
    """What the server is told beside the tensors. An attack uses nothing of it that it does not name in `used`.

    Args:
      examples: behind the observation, all clients together.
      labels: of them, in any order, `(examples,)`.
      lengths: of their texts in tokens, special tokens included, in any order.
      shape: of one input image, `(channels, height, width)`; the model's input format, hence public.
      noise: standard deviation on each coordinate of the tensors as observed, with the clients' own scale taken off.
        Under a plan it is public.
    """

    examples: int | None = None
    labels: Tensor | None = None
    lengths: tuple[int, ...] | None = None
    shape: tuple[int, int, int] | None = None
    noise: float = 0.0

    def __post_init__(self) -> None:
        if self.examples is not None:
            at_least("examples", self.examples, 1)
        non_negative("noise", self.noise)


@final
@dataclass(frozen=True)
class Observation:
    """What the server received of one client, or of a sum of clients, in one round.

    Gradients are of the mean loss; sums and means differ by a factor, which no attack on a direction or a span sees.

    Args:
      model: as clients received it, without dropout. An attack never changes it; it may work on a copy.
      tensors: by the model's parameter names; NaN where the server sees nothing (encrypted, masked, cut away), and
        whatever is not listed was not sent.
      change: how a client trained, where `tensors` are changes of the parameters; None: they are gradients.
      declared: what the server is told beside it.
      clients: whose sum or mean it is.

    Raises:
      InvalidArgument: a name or a shape is not the model's, an infinite value, or nothing at all.
    """

    model: nn.Module = field(repr=False)
    tensors: Mapping[str, Tensor] = field(repr=False)
    change: LocalSteps | None = None
    declared: Declared = field(default_factory=Declared)
    clients: int = 1

    def __post_init__(self) -> None:
        at_least("clients", self.clients, 1)
        require(bool(self.tensors), "tensors={}: an observation needs at least one named tensor")
        parameters = dict(self.model.named_parameters())
        for name, tensor in self.tensors.items():
            require(
                name in parameters,
                f"{name!r} is no parameter of the model{nearest_if_any(name, parameters)} (names are those of "
                "model.named_parameters())",
            )
            shape = tuple(parameters[name].shape)
            require(tuple(tensor.shape) == shape, f"{name} has shape {tuple(tensor.shape)}, the model's is {shape}")
            require(tensor.dtype.is_floating_point, f"{name} is {tensor.dtype}: expected a float type")
            require(not bool(tensor.isinf().any()), f"{name} is not finite; what the server does not see is NaN")

    @property
    def gradients(self) -> Mapping[str, Tensor]:
        """The tensors as gradients: of a change by gradient descent, the mean over its steps, by momentum's weights.

        Raises:
          InvalidArgument: the change is Adam's, which is no multiple of a gradient.
        """
        if self.change is None:
            return self.tensors
        if self.change.optimizer != "sgd":
            raise InvalidArgument(
                "optimizer='adam': its change divides each coordinate by a number of its own, so that rows no longer "
                "lie in the span of a layer's inputs; this attack needs gradients or plain gradient descent"
            )
        factor = -1.0 / (self.change.learning_rate * self.change.weight)
        return {name: tensor * factor for name, tensor in self.tensors.items()}

    def told(self, **more: object) -> Observation:
        """The same with more, or other, declared knowledge: `observation.told(examples=4)`."""
        return replace(self, declared=replace(self.declared, **more))  # type: ignore[arg-type]


def gradients_of(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """The gradient of a loss by parameter name: what a client of federated SGD sends.

    Parameters that are frozen, or that the loss does not reach, are left out; nothing of the model changes.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    return {name: one.detach() for name, one in zip(trained, found, strict=True) if one is not None}


@final
@dataclass(frozen=True)
class Reconstruction:
    """What an attack gives back. Fields that it says nothing of are empty or None.

    Attributes:
      texts: whole sequences of token ids with their special tokens, without padding; the surest first. Equal ones may
        occur: two clients may hold the same text.
      tokens: ids that are said to occur somewhere, with no order; what `texts` contain is among them.
      images: `(b, channels, height, width)`, in the model's input scale.
      labels: in ascending order where no example is meant; else of `texts` or `images`, in their order.
      used: pieces of declared knowledge that went into it, by the names of `Declared`'s fields, and what else was used
        (`language model`, `batch statistics`).
      facts: what the attack found on its way, for the record: estimated batch size, rank, residuals.
      stopped: why it ended before it was done; empty if it was.
      seconds: it took.
    """

    texts: tuple[tuple[int, ...], ...] = ()
    tokens: frozenset[int] = frozenset()
    images: Tensor | None = None
    labels: tuple[int, ...] | None = None
    used: tuple[str, ...] = ()
    facts: Mapping[str, float | str] = field(default_factory=dict)
    stopped: str = ""
    seconds: float = 0.0


Progress = Callable[[str, float], None]
"""Told now and then: what is being done, and the share of it that is done, in [0, 1]."""


@final
class Watch:
    """The time an attack may take, and whom it tells how far it is. Attacks ask it often and return the best so far.

    Args:
      seconds: from now on.
      progress: is told.
    """

    def __init__(self, seconds: float = inf, progress: Progress | None = None) -> None:
        require(seconds > 0, f"seconds={seconds!r}: expected a number > 0")
        self._limit, self._began, self._progress = seconds, perf_counter(), progress

    @property
    def seconds(self) -> float:
        """Gone by."""
        return perf_counter() - self._began

    @property
    def over(self) -> bool:
        """Whether the time is up."""
        return self.seconds >= self._limit

    @property
    def stopped(self) -> str:
        """What to write into `Reconstruction.stopped`."""
        return f"time limit of {self._limit:g} s" if self.over else ""

    def tell(self, what: str, share: float = 0.0) -> None:
        """Passes on how far it is."""
        if self._progress is not None:
            self._progress(what, min(max(share, 0.0), 1.0))


class ReconstructionAttack(ABC):
    """Turns what a server received into what it says of the data.

    Class constants:
      several_rounds: it can use observations of the same data in several rounds together; else it takes one.
      malicious: the server has bent the model or the architecture beforehand (`MaliciousAttack`).
    """

    several_rounds = False
    malicious = False

    @property
    @abstractmethod
    def needs(self) -> tuple[str, ...]:
        """What it asks for beside the tensors, in words for the report; the least with which it runs."""

    @abstractmethod
    def refusal(self, observation: Observation) -> str:
        """Why it cannot run on this, with the way out; empty: it can. Cheap: asked before any work."""

    @abstractmethod
    def reconstruct(self, rounds: Sequence[Observation], watch: Watch, generator: Generator) -> Reconstruction:
        """What a class writes. `rounds` is one observation unless `several_rounds`."""

    @final
    def __call__(
        self,
        observed: Observation | Sequence[Observation],
        *,
        seconds: float = inf,
        progress: Progress | None = None,
        generator: Generator | None = None,
    ) -> Reconstruction:
        """Runs the attack; the global random state stays as it is.

        Args:
          observed: one round, or several rounds of the same data in order.
          seconds: after which it returns the best so far, and says so.
          progress: told now and then.
          generator: of every random choice; seeded with 0 when None.

        Raises:
          InvalidArgument: the observation does not have what the attack needs; the message names the way out.
        """
        rounds = [observed] if isinstance(observed, Observation) else list(observed)
        name = type(self).__name__
        require(bool(rounds), f"{name}: expected at least one observation")
        require(len(rounds) == 1 or self.several_rounds, f"{name} takes one round, got {len(rounds)}; call it for each")
        for one in rounds:
            reason = self.refusal(one)
            require(not reason, f"{name}: {reason}")
        watch = Watch(seconds, progress)
        with torch.random.fork_rng(devices=[]):
            found = self.reconstruct(rounds, watch, generator or Generator().manual_seed(0))
        return replace(found, seconds=watch.seconds)


class MaliciousAttack(ReconstructionAttack):
    """One whose server bends the model before it sends it out: no honest-but-curious server does that."""

    malicious = True

    @abstractmethod
    def prepare(self, model: nn.Module, generator: Generator) -> nn.Module:
        """The model that the server sends instead; the one given stays as it is.

        What the attack needs to know of its own trap it reads off the prepared model, which is the observation's.

        Raises:
          InvalidArgument: the trap does not fit the model.
        """
