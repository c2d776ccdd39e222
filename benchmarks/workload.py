"""The federated work that engines are compared on, and the plain PEFT loop that every engine must equal.

MiniLM-L6 with LoRA r=8 on query and value and a six-class head (d = 76,038), random tokens, no dropout; SGD 0.1. The
head is the architecture's own, which reads the first token. B does not begin at zero, which would hide A's gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy

from privfm.contracts import BuiltModel, Examples, GradientPrivacy, Table
from privfm.learning import (
    SGD,
    LoRA,
    ModelLearner,
    Schedule,
    SequenceClassification,
    SequenceClassifier,
    Workbench,
)
from privfm.learning.batched import BatchedDescent
from privfm.randomness import seeded

LABELS = 6
LEARNING_RATE = 0.1
BOUND, NOISE = 1.0, 1.0  # of every private variant: largest norm of an example's gradient, noise over it
VOCABULARY = (1000, 30000)  # tokens that are words, in BERT's numbering
SEED = 1000  # client k's shuffle comes from SEED + k


@dataclass(frozen=True)
class Client:
    """A client's examples in the order in which one epoch of local training meets them.

    Attributes:
      ids: `(n, T)` tokens, padded with zeros on the right.
      lengths: `(n,)`.
      labels: `(n,)`.
    """

    ids: Tensor
    lengths: Tensor
    labels: Tensor

    def batches(self, size: int) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Inputs and labels of every step, padded to the longest example of the step, as a collator does."""
        for begin in range(0, len(self.ids), size):
            part = slice(begin, begin + size)
            width = int(self.lengths[part].max())
            mask = (torch.arange(width) < self.lengths[part, None]).long()
            yield {"input_ids": self.ids[part, :width], "attention_mask": mask}, self.labels[part]


def equal_clients(clients: int, examples: int, tokens: int) -> list[Client]:
    """Clients with as many examples of one length each."""
    generator = Generator().manual_seed(0)
    return [_client([tokens] * examples, generator) for _ in range(clients)]


def ragged_clients(clients: int, most: int = 40, tokens: tuple[int, int] = (8, 64)) -> list[Client]:
    """Clients with 1 to `most` examples of `tokens` tokens, few of them large and few texts long.

    Sizes: a Dirichlet draw with concentration 0.7, twelve a client on average; lengths: log-normal with median
    exp(3.1) = 22 and deviation 0.6, about those of the first lines of docstrings.
    """
    generator = Generator().manual_seed(1)
    shares = torch._standard_gamma(torch.full((clients,), 0.7), generator=generator)
    sizes = (shares / shares.sum() * clients * 12).round().clamp(1, most).long().tolist()
    return [
        _client((3.1 + 0.6 * torch.randn(n, generator=generator)).exp().clamp(*tokens).long().tolist(), generator)
        for n in sizes
    ]


def _client(lengths: list[int], generator: Generator) -> Client:
    ids = torch.randint(*VOCABULARY, (len(lengths), max(lengths)), generator=generator)
    known = torch.tensor(lengths)
    ids = ids.masked_fill(torch.arange(ids.shape[1]) >= known[:, None], 0)
    return Client(ids, known, torch.randint(LABELS, (len(lengths),), generator=generator))


def built_model(layers: tuple[int, ...] | None = None) -> BuiltModel:
    """The model; `layers`: blocks with adapters, all of them if None."""
    source = SequenceClassifier("minilm", pooling="model", adapter=LoRA(layers=layers))
    generator = Generator().manual_seed(0)
    built = source.build([str(label) for label in range(LABELS)], generator)
    with torch.no_grad():
        for name, parameter in built.module.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.02, generator=generator)
    return built


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    """What of a module is trained, by name, in the order of an update's columns."""
    return {name: value for name, value in sorted(module.named_parameters()) if value.requires_grad}


def flat(values: Sequence[Tensor]) -> Tensor:
    """One vector `(d,)`, in the order given."""
    return torch.cat([value.detach().flatten() for value in values])


@dataclass(frozen=True)
class Work:
    """One round: every client trains for one epoch from the same model.

    Attributes:
      built: never trained itself.
      clients: their data.
      batch_size: examples a step.
      device: where the model runs.
    """

    built: BuiltModel
    clients: Sequence[Client]
    batch_size: int
    device: str = "cpu"

    @property
    def steps(self) -> int:
        """Local steps of all clients."""
        return sum(-(-len(client.ids) // self.batch_size) for client in self.clients)

    def module(self) -> Any:
        """A copy of the model in training mode, for somebody else's engine; without dropout, so that all agree."""
        module = deepcopy(self.built.module)
        for part in module.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0
        return module.to(self.device).train()


Round = Callable[[], Tensor]
"""One round of a work: the clients' updates `(K, d)`, or their mean `(1, d)`."""


def sequential(work: Work) -> Round:
    """The plain loop: one PEFT model, every client's state written into it before the client trains."""
    module = work.module()
    parameters = trained(module)
    start = {name: value.detach().clone() for name, value in parameters.items()}

    def run() -> Tensor:
        updates = []
        for client in work.clients:
            with torch.no_grad():
                for name, value in parameters.items():
                    value.copy_(start[name])
            optimizer = torch.optim.SGD(list(parameters.values()), lr=LEARNING_RATE)
            for inputs, labels in client.batches(work.batch_size):
                optimizer.zero_grad()
                inputs = {name: value.to(work.device) for name, value in inputs.items()}
                loss: Tensor = cross_entropy(module(**inputs).logits, labels.to(work.device))
                loss.backward()  # type: ignore[no-untyped-call]  # torch's own
                optimizer.step()
            updates.append(flat([value - start[name] for name, value in parameters.items()]))
        return torch.stack(updates)

    return run


def ours(
    work: Work, privacy: GradientPrivacy | None = None, together: int | None = None, first_token: bool = True,
    **options: Any,
) -> Round:  # fmt: skip
    """Our learner's batched engine.

    Args:
      work: what is trained on what.
      privacy: of every step.
      together: clients trained at once; all of them if None.
      first_token: lets the last block compute the first token only, as it does by itself for such a head.
      options: of `ModelLearner`.
    """
    learner = our_learner(work, shuffled=privacy is None, **options)
    if not first_token:  # no option of the learner: nobody would want it but to see what the shortcut is worth
        learner._batched = BatchedDescent(learner.bench, options.get("tokens"), autocast=options.get("autocast"))
    start, examples = learner.initial(), _examples(work, learner)
    size = together or len(examples)
    chunks = [range(begin, min(begin + size, len(examples))) for begin in range(0, len(examples), size)]

    def run() -> Tensor:
        rows = []
        for places in chunks:
            generators = [Generator().manual_seed(SEED + place) for place in places]
            result = learner.train(start, [examples[place] for place in places], generators, privacy)
            if result.failed:
                raise RuntimeError(f"clients failed: {dict(result.failed)}")
            rows.append(result.rows)
        return torch.cat(rows)

    return run


def _refuse_loop(learner: ModelLearner) -> None:
    """Where the learner would go on without its batched engine it raises: the loop must not be timed under its name."""
    if learner._batched is None:
        raise RuntimeError(learner.engine_note)

    def refuse(*_: Any) -> None:
        raise RuntimeError("batched training raised, and the learner went on with one client after the other")

    learner.__dict__["_one_by_one"] = refuse


def our_learner(work: Work, shuffled: bool = True, training: Any = None, **options: Any) -> ModelLearner:
    """A learner over the clients' examples, one client after the other in its table.

    Args:
      work: model and data.
      shuffled: put every client's examples so that its own shuffle meets them in the order of `Client`.
      training: of one client; plain SGD if None.
      options: of `ModelLearner`.
    """
    schedule = Schedule(batch_size=work.batch_size, epochs=1)
    texts: list[str] = []
    labels = []
    for place, client in enumerate(work.clients):
        back = torch.arange(len(client.ids))
        if shuffled:
            with seeded(generator := Generator().manual_seed(SEED + place)):
                back = torch.cat(list(schedule.batches(len(client.ids), generator))).argsort()
        texts += [
            " ".join(str(token) for token in client.ids[row, : client.lengths[row]].tolist()) for row in back.tolist()
        ]
        labels.append(client.labels[back])
    table = Table(texts, torch.cat(labels), tuple(str(label) for label in range(LABELS)))
    built = replace(work.built, tokenize=_numbers, module=deepcopy(work.built.module))
    built = replace(built, layers=_same_place(work.built, built.module))
    bench = Workbench(built, SequenceClassification(), table, device=work.device)
    learner = ModelLearner(bench, {}, training or SGD(LEARNING_RATE, schedule), engine="batched", **options)
    _refuse_loop(learner)
    return learner


def _examples(work: Work, learner: ModelLearner) -> list[Examples]:
    sizes = [len(client.ids) for client in work.clients]
    everything = learner.bench.everything
    return [everything.take(rows) for rows in torch.split(torch.arange(sum(sizes)), sizes)]


def _same_place(built: BuiltModel, module: nn.Module) -> tuple[nn.Module, ...]:
    """The blocks of a copy of the model."""
    names = {part: name for name, part in built.module.named_modules()}
    return tuple(module.get_submodule(names[block]) for block in built.layers)


def _numbers(texts: Sequence[str]) -> dict[str, Tensor]:
    """A tokenizer of texts that are written in token numbers."""
    rows = [torch.tensor([int(word) for word in text.split()]) for text in texts]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long()}


@dataclass(frozen=True)
class StepPrivacy(GradientPrivacy):
    """Flat clipping and Gaussian noise on batches of a fixed order: what a private step computes, and no more.

    It samples nothing and accounts for nothing, so it gives no guarantee: it times the same steps for everybody.

    Args:
      batch_size: examples a step, and the denominator.
      noise_multiplier: noise deviation over the bound.
      epochs: passes over the data.
    """

    batch_size: int
    noise_multiplier: float = NOISE
    epochs: int = 1

    def batches(self, examples: int, generator: Generator) -> Iterator[Tensor]:
        for _ in range(self.epochs):
            yield from torch.split(torch.arange(examples), self.batch_size)

    def clip(self, gradients: Tensor) -> Tensor:
        norms = torch.linalg.vector_norm(gradients, dim=1, keepdim=True)
        shortened: Tensor = gradients * (BOUND / norms.clamp(min=BOUND))
        return shortened

    def noised(self, sums: Tensor, examples: Sequence[int], generators: Sequence[Generator]) -> Tensor:
        noisy = sums
        if self.noise_multiplier:
            draws = torch.stack([torch.randn(sums.shape[1], generator=generator) for generator in generators])
            noisy = sums + self.noise_multiplier * BOUND * draws.to(sums)
        return noisy / self.batch_size
