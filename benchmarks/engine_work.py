"""What every engine of `benchmarks.engines` plays: a network of 1,000,000 parameters and clients of a few examples."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

import torch
from torch import Generator, Tensor, nn

from privfm.checks import at_least, require
from privfm.contracts import BuiltModel, DataSource, Learner, ModelSource, Table
from privfm.defenses import Mean
from privfm.defenses.channels import Plaintext
from privfm.experiment import RunConfig
from privfm.experiment.run import deal, prepare
from privfm.federation import Average, FixedSize
from privfm.learning import IID, SGD, ImageClassification, ModelLearner, Schedule
from privfm.learning.splits import SplitShares
from privfm.randomness import seeded

LABELS: Final = 10
FEATURES: Final = 990  # with 1000 hidden units and 10 labels 1,000,000 parameters
EXAMPLES: Final = 8  # of a client
LEARNING_RATE: Final = 0.1
SEED: Final = 0


class TwoLayers(nn.Module):
    """`(b, features)` -> `(b, LABELS)` logits through one hidden layer, without biases."""

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.inner = nn.Linear(features, hidden, bias=False)
        self.outer = nn.Linear(hidden, LABELS, bias=False)

    def forward(self, pixel_values: Tensor) -> Tensor:
        logits: Tensor = self.outer(torch.relu(self.inner(pixel_values)))
        return logits


@final
@dataclass(frozen=True)
class Vectors(DataSource):
    """Gaussian vectors with labels in turns: enough that every client gets `EXAMPLES`.

    Args:
      rows: in all.
    """

    rows: int

    def __post_init__(self) -> None:
        at_least("rows", self.rows, LABELS)

    def load(self) -> Table:
        """See `DataSource.load`; nothing can be missing."""
        inputs = torch.randn(self.rows, FEATURES, generator=Generator().manual_seed(SEED))
        labels = torch.arange(self.rows) % LABELS
        return Table(inputs, labels, tuple(map(str, range(LABELS))))


@final
@dataclass(frozen=True)
class Network(ModelSource):
    """`TwoLayers`, whole.

    Args:
      parameters: a multiple of 1000.
    """

    parameters: int

    def __post_init__(self) -> None:
        require(
            self.parameters > 0 and self.parameters % (FEATURES + LABELS) == 0,
            f"parameters={self.parameters}: expected a multiple of {FEATURES + LABELS}",
        )

    def build(self, label_names: object, generator: Generator) -> BuiltModel:
        """See `ModelSource.build`."""
        from safetensors.torch import save_file

        with seeded(generator):
            module = TwoLayers(FEATURES, self.parameters // (FEATURES + LABELS))

        def save(folder: Path) -> None:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(module.state_dict(), folder / "model.safetensors")

        return BuiltModel(module, None, (), save)


def configuration(clients: int, parameters: int, rounds: int) -> RunConfig:
    """Federated averaging in the clear: everybody takes part, one step on all of a client's examples, no checkpoint
    and no evaluation but behind the last round.
    """
    rows = EXAMPLES * clients + 2 * LABELS
    share = LABELS / rows
    return RunConfig(
        data=Vectors(rows),
        model=Network(parameters),
        task=ImageClassification(),
        partition=IID(clients),
        training=SGD(LEARNING_RATE, Schedule(batch_size=EXAMPLES, steps=1)),
        rule=Mean(),
        channel=Plaintext(),
        optimizer=Average(),
        rounds=rounds,
        cohort=FixedSize(clients),
        splits=SplitShares(validation=share, test=share),
        evaluate_every=rounds,
        checkpoint_every=rounds,
    )


def named(learner: Learner, model: Tensor) -> dict[str, Tensor]:
    """A model `(d,)` as tensors by name."""
    if not isinstance(learner, ModelLearner):
        raise TypeError(f"expected a ModelLearner, got {type(learner).__name__}")
    return learner.bench.layout.unflatten(model)


def write_peer_data(config: RunConfig, folder: Path) -> None:
    """The same initial model and the same examples, a file a client, for apps that know nothing of privfm."""
    from safetensors.torch import save_file

    dealt, learner = deal(config, SEED), prepare(config, SEED).learner
    inputs = dealt.table.inputs
    if not isinstance(inputs, Tensor):
        raise TypeError(f"expected vectors, got {type(inputs).__name__}")
    folder.mkdir(parents=True)
    for client, rows in enumerate(dealt.clients):
        require(len(rows) == EXAMPLES, f"client {client} holds {len(rows)} examples: expected {EXAMPLES}")
        save_file({"inputs": inputs[rows], "labels": dealt.table.labels[rows]}, folder / f"client-{client}.safetensors")
    save_file(named(learner, learner.initial()), folder / "model.safetensors")
