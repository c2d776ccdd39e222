"""Shadow adapters: many models like the attacked one, trained at once on parts of the data, and read all together.

The frozen model is shared and what lies below the first adapter is computed once per example, for all of them and all
epochs; only adapters and heads are kept. A hundred of MiniLM's take ten megabytes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Literal, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor, nn

from privfm.checks import BrokenCheckpoint, ClientFailed, InvalidArgument, at_least, first_line, one_of, require
from privfm.contracts import Examples, GradientPrivacy, LocalTraining
from privfm.files import writable
from privfm.learning.batched import BatchedDescent, prepared
from privfm.learning.learner import ModelLearner
from privfm.learning.tasks import IGNORED, CausalLM
from privfm.learning.training import Descent
from privfm.learning.trunk import trimmed
from privfm.learning.workbench import Workbench
from privfm.randomness import seeded
from privfm.vectors import Layout

_MEMORY = 1 << 28
"""Bytes that the matrices of shadows trained at once may take (256 MiB), whatever their number."""
_MATRICES = 8
"""Float32 matrices `(models, d)` alive at the worst moment: start, weights, two of AdamW, gradients of the step and of
a pass, and two while a step is taken. What the model itself holds is bounded by the engine's tokens a pass."""
_TOGETHER = 32
"""Most shadows trained at once unless asked for: beyond, a pass is full anyway, and progress is shown too seldom."""
_READ = 64
"""Examples read at once where the batched engine cannot: as the learner's evaluation."""
_INSIDE = "inside"
"""Name of the flags in a file, beside those of the trained tensors."""

Score = Callable[[Tensor, Tensor], Tensor]
"""`(logits (b, ...), labels (b, ...)) -> (b, ...)`, without gradients; both are cut to the longest text of the b, and
what is returned has the same shape after b whatever that length."""


@final
@dataclass(frozen=True)
class ShadowAdapters:
    """Trained shadows, and who was trained on what.

    Attributes:
      models: `(models, d)` float32: each shadow's trained values, as the workbench loads them.
      inside: `(models, n)` bool.
      layout: names and shapes of the d columns.
      note: which engine trained them, and why; not saved.
    """

    models: Tensor
    inside: Tensor
    layout: Layout
    note: str = ""

    def __post_init__(self) -> None:
        require(
            self.models.shape == (len(self.inside), self.layout.d),
            f"models {tuple(self.models.shape)}: expected {(len(self.inside), self.layout.d)}, by inside and layout",
        )

    def __len__(self) -> int:
        """Number of models."""
        return len(self.models)

    def save(self, path: Path) -> None:
        """Writes one safetensors file, whole or not at all: every trained tensor by name, `(models, *shape)`, and the
        flags as `inside`. Nothing of the frozen model, no example.
        """
        from safetensors.torch import save

        require(_INSIDE not in self.layout.names, f"a trained tensor is named {_INSIDE!r}, as the flags are")
        named = _columns(self.layout, self.models) | {_INSIDE: self.inside.contiguous()}
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        with writable(path):
            try:
                partial.write_bytes(save(named))
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path, layout: Layout) -> ShadowAdapters:
        """Reads what `save` wrote.

        Args:
          path: the file.
          layout: of the workbench that is to read the shadows.

        Raises:
          BrokenCheckpoint: the file is missing, cut off, or of another kind.
          InvalidArgument: it holds shadows of another model, or of other adapters.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            named = load_file(path)
        except (OSError, SafetensorError) as error:
            raise BrokenCheckpoint(f"{path} cannot be read: {first_line(error)}") from error
        inside = named.pop(_INSIDE, None)
        if inside is None or inside.ndim != 2 or inside.dtype != torch.bool:
            raise BrokenCheckpoint(f"{path} holds no shadows: expected flags (models, n) named {_INSIDE!r}")
        found = {name: tuple(value.shape) for name, value in named.items()}
        wanted = {name: (len(inside), *shape) for name, shape in zip(layout.names, layout.shapes, strict=True)}
        other = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
        require(
            not other,
            f"{path} does not fit the model: {', '.join(other[:3])}; build the workbench as it was for the shadows",
        )
        return cls(torch.cat([named[name].float().flatten(1) for name in layout.names], 1), inside, layout)


def train_shadows(
    bench: Workbench,
    training: LocalTraining,
    inside: Tensor | NDArray[np.bool_],
    examples: Examples,
    generators: Sequence[Generator],
    *,
    initial: Literal["shared", "own"] = "shared",
    start: Tensor | None = None,
    privacy: GradientPrivacy | None = None,
    together: int | None = None,
    tokens: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ShadowAdapters:
    """Trains many models on parts of the same examples, as many at once as the memory bound allows.

    A shadow does not depend on the others but for rounding (1e-5), nor on `together`. Where the batched engine does
    not fit model or training, shadows are trained one after the other, and `note` says why.

    Args:
      bench: model and data; it comes back with `bench.initial` loaded.
      training: what every shadow does.
      inside: `(models, n)`, which of the examples each is trained on.
      examples: n of them; with their rows, what lies below the first adapter is known.
      generators: one a shadow, for its initialisation where it is its own, order of data, and noise.
      initial: `shared`: all begin with the same adapter and head, as whoever sees a federated run begin knows them;
        `own`: every shadow draws its adapter and head anew (LoRA's A, B = 0, linear heads), as an attacker would who
        does not know them. What is frozen, a frozen A too, stays shared.
      start: `(d,)` what is shared; None: `bench.initial`.
      privacy: of every step, where the attacked model was trained with it.
      together: shadows trained at once; None: as many as take 256 MiB, at most 32.
      tokens: a pass; None: the engine's own choice.
      progress: called with the number of trained shadows and of all.

    Raises:
      InvalidArgument: shapes do not fit, a shadow has no example, something trained has no fresh initialisation that is
        known here, examples have no gradients of their own, or a shadow is not finite after training.
      ClientFailed: training raised.

    Memory: at most 256 MiB of matrices at the default, beside the engine's pass, and on the CPU at most 256 MiB of kept
    products beside the activations; the result has `4 models d` bytes.
    """
    one_of("initial", initial, ("shared", "own"))
    inside = torch.as_tensor(inside)
    _check(inside, examples, generators)
    d = bench.layout.d
    require(start is None or start.shape == (d,), f"start: expected ({d},), as long as what is trained")
    require(initial == "shared" or start is None, "start is what shadows share; with initial='own' leave it out")
    size = _chosen(together, d)
    shared = bench.initial if start is None else start
    refusal = "" if privacy is None else ModelLearner(bench, {}, training).refuses_private_gradients()
    require(not refusal, f"no private gradients: {refusal}")
    bench.load(bench.initial)
    engine, note = _engine(bench, training, tokens)
    models = torch.empty(len(inside), d)
    try:
        for places in torch.split(torch.arange(len(inside)), size):
            chosen = [generators[place] for place in places.tolist()]
            begin = shared.expand(len(chosen), -1) if initial == "shared" else drawn_anew(bench, chosen)
            batch = [examples.take(inside[place].nonzero().squeeze(1)) for place in places.tolist()]
            if engine is not None and isinstance(training, Descent):
                updates = engine.train(begin, batch, chosen, training, privacy=privacy)
            else:
                updates = _one_by_one(ModelLearner(bench, {}, training), begin, batch, chosen, privacy)
            models[places] = begin + updates
            if progress is not None:
                progress(int(places[-1]) + 1, len(inside))
    finally:
        bench.load(bench.initial)
    lost = (~models.isfinite().all(1)).nonzero().squeeze(1).tolist()
    require(not lost, f"{len(lost)} of {len(models)} shadows are not finite (the first: {lost[:3]}); train more slowly")
    return ShadowAdapters(models, inside, bench.layout, note)


def signals_of(
    bench: Workbench, models: Tensor, examples: Examples, score: Score, *, tokens: int | None = None
) -> Tensor:
    """What every model makes of every example, `(models, n, ...)`: `score` of its logits, which are not kept.

    Args:
      bench: the workbench the models were trained on; it comes back with `bench.initial` loaded.
      models: `(models, d)`.
      examples: n of them, members and others.
      score: of a batch; for instance `bench.task.losses`.
      tokens: a pass; None: the engine's own choice.

    Cost: a forward pass through what lies above the known activations for each model and example, without padding; a
    pass's activations are gathered once for all models.
    """
    d = bench.layout.d
    require(models.ndim == 2 and models.shape[1] == d, f"models {tuple(models.shape)}: expected (models, {d})")
    require(len(models) > 0 and len(examples) > 0, "nothing to read: expected at least one model and one example")
    bench.load(bench.initial)
    engine, _ = _engine(bench, None, tokens)
    try:
        if engine is not None:
            return engine.read(models, examples, score)
        return torch.stack([_read(bench, model, examples, score) for model in models])
    finally:
        bench.load(bench.initial)


def logits_of(bench: Workbench, models: Tensor, examples: Examples, *, tokens: int | None = None) -> Tensor:
    """Logits `(models, n, classes)` of a classifier; arguments as of `signals_of`.

    Raises:
      InvalidArgument: a language model, whose logits would be `(models, n, tokens, vocabulary)`.
    """
    require(
        not isinstance(bench.task, CausalLM),
        "logits of a language model do not fit in memory for many models; use token_log_probabilities_of or signals_of",
    )
    return signals_of(bench, models, examples, lambda logits, labels: logits.float(), tokens=tokens)


def token_log_probabilities_of(
    bench: Workbench, models: Tensor, examples: Examples, *, tokens: int | None = None
) -> list[Tensor]:
    """Of every example, what the models say of its predicted tokens: n tensors `(models, tokens of the example)`.

    Float64 sums over the vocabulary, one example at a time; the first token is not predicted. Arguments as of
    `signals_of`.
    """
    require(isinstance(bench.task, CausalLM), f"{type(bench.task).__name__} predicts no tokens; use logits_of")
    following = examples.labels[:, 1:] != IGNORED
    width = following.shape[1]

    def score(logits: Tensor, labels: Tensor) -> Tensor:
        found = torch.zeros(len(labels), width, dtype=torch.float64)
        targets = labels[:, 1:].clamp(min=0)  # what is not predicted is left out below
        for row, own, target in zip(found, logits, targets, strict=True):
            row[: len(target)] = own[:-1].double().log_softmax(-1).gather(-1, target[:, None])[:, 0].cpu()
        return found

    padded = signals_of(bench, models, examples, score, tokens=tokens)
    return [padded[:, place, kept] for place, kept in enumerate(following)]


def drawn_anew(bench: Workbench, generators: Sequence[Generator]) -> Tensor:
    """What is trained of the model, drawn anew from each generator: `(k, d)`; the model comes back as it was.

    LoRA's A is uniform with He's bound and B zero; linear heads are drawn as the model's own library draws them.

    Raises:
      InvalidArgument: something else is trained.

    Source: Hu et al., "LoRA: low-rank adaptation of large language models", 2022, section 4.1 (B = 0); He et al.,
    "Delving deep into rectifiers", 2015 (with slope sqrt(5), as torch and PEFT draw linear layers).
    """
    from privfm.learning.batched.patches import transformers_models

    own = {id(parameter) for parameter in bench.parameters.values()}
    bench.load(bench.initial)
    foreign = {part: model for model in transformers_models(bench.module) for part in model.modules()}
    rows = []
    try:
        for generator in generators:
            covered: set[int] = set()
            with seeded(generator), torch.no_grad():
                for name, part in bench.module.named_modules():
                    if isinstance(part, nn.Linear) and id(part.weight) in own:
                        _draw(part, name, foreign.get(part))
                        covered |= {id(parameter) for parameter in part.parameters()}
            rest = [name for name, parameter in bench.parameters.items() if id(parameter) not in covered]
            require(
                not rest,
                f"initial='own': no fresh initialisation of {', '.join(rest[:3])} is known; use 'shared', or begin "
                "with LoRA and linear heads",
            )
            rows.append(bench.layout.flatten(bench.parameters).cpu())
    finally:
        bench.load(bench.initial)
    return torch.stack(rows)


def _draw(part: nn.Linear, name: str, model: nn.Module | None) -> None:
    """One trained linear layer, in place, from torch's global generator."""
    if ".lora_B." in name:
        nn.init.zeros_(part.weight)
    elif ".lora_A." in name:
        nn.init.kaiming_uniform_(part.weight, a=sqrt(5))
    elif model is not None:  # a head of transformers' own: a normal of its configuration's width, no bias
        deviation = float(getattr(getattr(model, "config", None), "initializer_range", 0.02))
        nn.init.normal_(part.weight, 0.0, deviation)
        if part.bias is not None:
            nn.init.zeros_(part.bias)
    else:
        part.reset_parameters()


def _check(inside: Tensor, examples: Examples, generators: Sequence[Generator]) -> None:
    require(inside.dtype == torch.bool, f"inside has type {inside.dtype}: expected bool")
    require(
        inside.ndim == 2 and inside.shape[1] == len(examples),
        f"inside {tuple(inside.shape)}: expected (models, {len(examples)}), a flag for each example",
    )
    require(len(inside) > 0, "inside has no row: expected one for each shadow")
    require(len(generators) == len(inside), f"{len(generators)} generators: expected {len(inside)}, one a shadow")
    empty = (~inside.any(1)).nonzero().squeeze(1).tolist()
    require(not empty, f"shadow {empty[:1]} has no example to be trained on")


def _chosen(together: int | None, d: int) -> int:
    """Shadows trained at once."""
    if together is None:
        return max(1, min(_TOGETHER, _MEMORY // (4 * _MATRICES * d)))
    at_least("together", together, 1)
    return together


def _engine(bench: Workbench, training: LocalTraining | None, tokens: int | None) -> tuple[BatchedDescent | None, str]:
    """The batched engine, or why there is none; as the learner chooses."""
    if training is not None and not isinstance(training, Descent):
        return None, f"sequential: {type(training).__name__} does not take its steps on matrices"
    try:
        return prepared(bench, tokens), "batched"
    except InvalidArgument as reason:
        return None, f"sequential: {first_line(reason)}"


def _one_by_one(
    learner: ModelLearner, begin: Tensor, batch: Sequence[Examples], generators: Sequence[Generator],
    privacy: GradientPrivacy | None,
) -> Tensor:  # fmt: skip
    """Updates `(k, d)`, each from a start of its own."""
    rows = []
    for model, examples, generator in zip(begin, batch, generators, strict=True):
        trained = learner.train(model, [examples], [generator], privacy)
        if trained.failed:
            raise ClientFailed(f"a shadow's training raised: {trained.failed[0]}")
        rows.append(trained.rows)
    return torch.cat(rows)


def _read(bench: Workbench, model: Tensor, examples: Examples, score: Score) -> Tensor:
    """`score` of all examples under one model, in batches of like length, by the model's own code."""
    bench.load(model)
    mask = examples.inputs.get("attention_mask")
    order = torch.arange(len(examples)) if mask is None else mask.sum(1).argsort(stable=True)
    parts: list[Tensor] = []
    with torch.no_grad():
        for places in torch.split(order, _READ):
            batch = trimmed(examples.take(places))
            parts.append(score(bench.logits(batch), batch.labels.to(bench.device)).cpu())
    return torch.cat(parts)[order.argsort()]


def _columns(layout: Layout, matrix: Tensor) -> dict[str, Tensor]:
    """`(n, d)` -> `(n, *shape)` by name."""
    parts = torch.split(matrix, list(layout.sizes), 1)
    shaped = zip(layout.names, parts, layout.shapes, strict=True)
    return {name: part.reshape(len(matrix), *shape).contiguous() for name, part, shape in shaped}
