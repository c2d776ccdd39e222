"""Data, models, tasks and local training, as the round needs them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, final

from torch import Generator, Tensor, nn

from privfm.adapters import AdapterLayout
from privfm.checks import require
from privfm.contracts.privacy import GradientPrivacy, Spans
from privfm.contracts.reconstruction import LocalSteps

Split = Literal["clients", "validation", "test", "server", "holdout"]
SPLITS: tuple[Split, ...] = ("clients", "validation", "test", "server", "holdout")


@final
@dataclass(frozen=True)
class Examples:
    """Some examples, ready for a model. Also a map-style torch data set of `{name: tensor}` with `labels`.

    Attributes:
      inputs: what the model is called with, `{name: (b, ...)}`.
      labels: `(b,)` classes, or `(b, T)` tokens with -100 where none is predicted.
      rows: `(b,)` places of the examples in their table, by which cached activations are found; None once the inputs
        were changed.
    """

    inputs: Mapping[str, Tensor]
    labels: Tensor
    rows: Tensor | None = None

    def __post_init__(self) -> None:
        for name, value in self.inputs.items():
            require(len(value) == len(self), f"{name} holds {len(value)} examples for {len(self)} labels")
        require(self.rows is None or len(self.rows) == len(self), "rows must name every example")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return {**{name: value[index] for name, value in self.inputs.items()}, "labels": self.labels[index]}

    def take(self, index: Tensor) -> Examples:
        """The examples at `index (k,)`."""
        rows = None if self.rows is None else self.rows[index]
        return Examples({name: value[index] for name, value in self.inputs.items()}, self.labels[index], rows)

    def with_labels(self, labels: Tensor) -> Examples:
        """The same inputs under other labels; cached activations stay valid."""
        return replace(self, labels=labels)

    def with_inputs(self, inputs: Mapping[str, Tensor]) -> Examples:
        """Other inputs under the same labels; cached activations no longer apply."""
        return replace(self, inputs=inputs, rows=None)


@final
@dataclass(frozen=True)
class Metric:
    """One measured number.

    Attributes:
      value: the number.
      n: examples (or tokens) behind it.
      higher_is_better: its direction.
      unit: "share", "nats", ...
      per_example: `(n,)` where the number is a mean over examples, for paired comparisons.
    """

    value: float
    n: int
    higher_is_better: bool
    unit: str
    per_example: Tensor | None = None


WORST_CLIENTS = "worst_decile_client_accuracy"
"""Metric that weighs accuracies by the labels clients hold: it depends on their data, not only on the model."""


class Task(ABC):
    """What is learned: loss, prediction and metrics.

    Class constants:
      primary: name of the metric that stands for utility.
    """

    primary = ""

    @abstractmethod
    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Loss of every example, `(b,)`."""

    @abstractmethod
    def predict(self, logits: Tensor) -> Tensor:
        """Predicted labels, shaped like the labels."""

    @abstractmethod
    def score(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """What every example contributes to the metrics, `{name: (b,)}`; kept instead of the logits."""

    @abstractmethod
    def summarise(self, scores: Mapping[str, Tensor], labels: Tensor, label_names: Sequence[str]) -> dict[str, Metric]:
        """Scores of all N examples of a split, in order -> metrics by name."""

    @abstractmethod
    def trivial(self, labels: Tensor) -> float:
        """The primary metric of a model that ignores its input: the zero of relative utility."""


@final
@dataclass(frozen=True)
class Table:
    """A data set in memory, before tokenisation.

    Attributes:
      inputs: N texts, or one float tensor `(N, channels, height, width)`.
      labels: `(N,)` whole numbers; all zero for language modelling.
      label_names: by label.
      clients: the natural client of each row, where the data has them.
    """

    inputs: Sequence[str] | Tensor
    labels: Tensor
    label_names: tuple[str, ...]
    clients: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        require(len(self.inputs) == len(self.labels), f"{len(self.inputs)} inputs for {len(self.labels)} labels")
        require(self.clients is None or len(self.clients) == len(self.labels), "clients must name every row")

    def __len__(self) -> int:
        return len(self.labels)


class DataSource(ABC):
    """Where a data set comes from."""

    @abstractmethod
    def load(self) -> Table:
        """Reads it.

        Raises:
          InvalidArgument: a file or column is missing, a value cannot be used, or nothing is left.
        """


class Partition(ABC):
    """How the rows of the `clients` split fall to clients."""

    @abstractmethod
    def assign(self, labels: Tensor, natural: Sequence[str] | None, generator: Generator) -> list[Tensor]:
        """`labels (N,)` -> for each client the sorted rows `(n_i,)` it holds; every row falls to exactly one client.

        Raises:
          InvalidArgument: a client would be empty, naming how many and the way out.
        """


class Sampling(ABC):
    """Which clients take part in a round."""

    @abstractmethod
    def draw(self, population: int, generator: Generator, now: int = 0) -> tuple[int, ...]:
        """Sorted client ids of round `now`."""

    @abstractmethod
    def expected(self, population: int) -> float:
        """Expected number of clients a round."""

    @abstractmethod
    def largest(self, population: int) -> int:
        """Most clients a round may hold; where there is no such bound short of everybody, exceeded once in 1e9."""

    @abstractmethod
    def exceeds(self, f: int, malicious: int, population: int) -> float:
        """Probability that a round draws more than f of the `malicious` clients among `population`."""


class Adapter(ABC):
    """What is trained of a model that is otherwise frozen."""

    @abstractmethod
    def applied(self, module: nn.Module, heads: Sequence[str], task_type: str | None) -> nn.Module:
        """Marks what is trained: only that, and the heads, requires gradients afterwards.

        Args:
          module: a pretrained model; changed in place.
          heads: names of its parts that are made for the labels at hand, trained whole.
          task_type: PEFT's name of what the model does, for its own classes; None: it needs none.

        Returns:
          What is called from now on: the module, or PEFT's model around it.

        Raises:
          InvalidArgument: the model has nothing that this adapter could train.
        """


class ModelSource(ABC):
    """Which model is trained, and which part of it."""

    @abstractmethod
    def build(self, label_names: Sequence[str], generator: Generator) -> BuiltModel:
        """Loads or makes the model and marks what is trained."""


@final
@dataclass(frozen=True)
class BuiltModel:
    """A model ready to be trained by clients.

    Attributes:
      module: called as `module(**inputs)`; returns logits, or an object with `logits`. Only the trained parameters
        require gradients.
      tokenize: `texts -> {name: (N, T)}`; None for models of tensors.
      layers: the stack of blocks from the bottom up, by which what lies below the first trained one is skipped and
        cached; empty when there is none.
      save: writes the model to a folder, in the format its own library loads.
      decode: token ids -> text, without special tokens; None for models of tensors.
    """

    module: nn.Module
    tokenize: Callable[[Sequence[str]], dict[str, Tensor]] | None
    layers: tuple[nn.Module, ...]
    save: Callable[[Any], None]
    decode: Callable[[Sequence[int]], str] | None = None


class LocalTraining(ABC):
    """What one client does with the model it receives."""

    @abstractmethod
    def run(
        self,
        module: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        losses: Callable[[Examples], Tensor],
        examples: Examples,
        generator: Generator,
    ) -> nn.Module:
        """Trains `module` in place (or returns another one).

        Args:
          module: holds the global model.
          parameters: what may change, by name.
          losses: examples -> `(b,)`, through cached activations where they apply.
          examples: all examples of this client.
          generator: for the order of its data.
        """

    def local_steps(self, examples: int) -> LocalSteps | None:
        """What a server that sets the training knows of how a client's update comes about; None: nothing.

        Args:
          examples: the client holds.
        """
        return None


@final
@dataclass(frozen=True)
class Trained:
    """Result of a batch of clients.

    Attributes:
      rows: `(k, d)` updates: local model minus global model.
      failed: `{place in the batch: reason}` for clients whose training raised; their rows are undefined.
    """

    rows: Tensor
    failed: Mapping[int, str]


class Learner(ABC):
    """Training and evaluation as the round needs them: every result row from its own inputs only.

    A model is `(d,)`; where the server also changes the frozen weights of adapted modules, that change follows, in the
    order of `adapters`.
    """

    @property
    @abstractmethod
    def d(self) -> int:
        """Number of trained values."""

    @property
    def adapters(self) -> AdapterLayout | None:
        """Where the factors of low-rank adapters are; None where there are none."""
        return None

    @abstractmethod
    def initial(self) -> Tensor:
        """The model before the first round, `(d,)`."""

    @property
    def layers(self) -> Spans:
        """Columns of each layer's trained values in an update; one for the whole where layers are not known."""
        return ((0, self.d),)

    def refuses_private_gradients(self) -> str:
        """Why this learner cannot train under a `GradientPrivacy`; empty where it can."""
        return f"{type(self).__name__} computes no gradients of single examples"

    @abstractmethod
    def train(
        self,
        model: Tensor,
        batch: Sequence[Examples],
        generators: Sequence[Generator],
        privacy: GradientPrivacy | None = None,
        active: Tensor | None = None,
    ) -> Trained:
        """`model (d,)` and k clients' examples -> `(k, d)` updates.

        Args:
          model: what all of them start from.
          batch: each client's examples.
          generators: each client's own, for the order of its data and its dropout, under a plan also for its noise.
          privacy: example-level privacy of every step; None: plain steps.
          active: `(d,)` bool, what is trained in this round; the rest of a row is zero. None: everything.
        """

    @abstractmethod
    def evaluate(self, model: Tensor, split: Split) -> dict[str, Metric]:
        """Metrics of `model (d,)` on a split."""


class Clients(ABC):
    """The clients' data by client id, made when asked for."""

    @property
    @abstractmethod
    def size(self) -> int:
        """Number of clients."""

    @abstractmethod
    def examples(self, client: int) -> Examples:
        """One client's examples."""
