"""The learner: clients trained and models evaluated on one workbench."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Literal, final

import torch
from torch import Generator, Tensor, nn

from privfm.adapters import AdapterLayout
from privfm.checks import InvalidArgument, PrivacyBroken, at_least, one_of, require
from privfm.contracts import (
    WORST_CLIENTS,
    Examples,
    GradientPrivacy,
    Learner,
    LocalTraining,
    Metric,
    Spans,
    Split,
    Trained,
)
from privfm.learning.batched import BatchedDescent, prepared
from privfm.learning.one_step import OneStep
from privfm.learning.per_example import ALONE, ALONE_ROUGHLY, mixes_examples, problems_for
from privfm.learning.private_steps import MatrixSteps
from privfm.learning.training import Descent
from privfm.learning.trunk import trimmed
from privfm.learning.workbench import Workbench
from privfm.randomness import seeded

_AWAY = 0.02
"""Whether examples see each other is asked away from the initial weights: a head of zeros would hide it."""


@final
class ModelLearner(Learner):
    """Trains and evaluates one torch model for all clients, its state swapped in place.

    Args:
      bench: model and data.
      splits: rows of the table by split.
      training: what one client does.
      label_mix: `(clients, labels)` examples of each label at each client, for the worst-decile client; None: not
        reported.
      batch_size: examples evaluated at once.
      engine: `batched` trains clients together wherever model and training allow it; `sequential` one by one.
      tokens: real tokens a pass of the batched engine; None: its own choice for the device.
      autocast: type in which the model is computed during training (`torch.bfloat16`); weights, clipping and noise stay
        float32, in the batched engine also the trained layers' arithmetic. Evaluation, and somebody's own training
        loop, do not use it.

    Attributes:
      engine_note: which engine is used, and why; also how the last batch fell back to one client after the other.
    """

    def __init__(
        self,
        bench: Workbench,
        splits: Mapping[Split, Tensor],
        training: LocalTraining,
        label_mix: Tensor | None = None,
        batch_size: int = 64,
        *,
        engine: Literal["batched", "sequential"] = "sequential",
        tokens: int | None = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        one_of("engine", engine, ("batched", "sequential"))
        if tokens is not None:
            at_least("tokens", tokens, 1)
        self.bench, self.splits, self.training, self.label_mix = bench, splits, training, label_mix
        self._batch_size, self._autocast = batch_size, autocast
        self._batched: BatchedDescent | None = None
        self._mixes: bool | None = None  # not yet asked
        self.engine_note = "sequential: as asked"
        if engine == "batched":
            self._batched, self.engine_note = self._engine(tokens)

    def _engine(self, tokens: int | None) -> tuple[BatchedDescent | None, str]:
        """The batched engine, or why there is none."""
        if not isinstance(self.training, Descent):
            return None, f"sequential: {type(self.training).__name__} does not take its steps on matrices"
        try:
            return prepared(self.bench, tokens, autocast=self._autocast), "batched"
        except InvalidArgument as reason:
            return None, f"sequential: {reason}"

    @property
    def d(self) -> int:
        return self.bench.layout.d

    @property
    def adapters(self) -> AdapterLayout | None:
        return self.bench.adapters

    @property
    def layers(self) -> Spans:
        ends = list(accumulate(self.bench.layout.sizes))
        return tuple(zip([0, *ends[:-1]], ends, strict=True))

    def initial(self) -> Tensor:
        return self.bench.initial.clone()

    def labels(self, split: Split) -> Tensor:
        """Labels of a split."""
        return self.bench.everything.labels[self.splits[split]]

    def refuses_private_gradients(self) -> str:
        if not isinstance(self.training, Descent):
            kind = type(self.training).__name__
            return f"{kind} does not show its steps, so that no example's gradient can be clipped; use SGD or AdamW"
        problems = problems_for(self.bench.module)
        if not problems and self._mixing():
            name = type(self.bench.module).__name__
            problems = [f"an example's loss in {name} depends on the others of its batch: no gradient is its own"]
        return "; ".join(problems)

    def _mixing(self) -> bool:
        """Whether examples see each other, or padding to one another's length, in the model's own code; asked once.

        Activations that are kept would hide what the blocks below do with a batch, so that none are used. A model that
        has no gradients at all raises here: in private training an example that raises is one of zeros.
        """
        if self._mixes is None:
            bench = self.bench
            away = torch.randn(self.d, generator=Generator().manual_seed(0))  # a check, the same every time
            bench.load(bench.initial + _AWAY * away)
            order = _by_length(bench.everything)  # the shortest is padded most
            places = torch.cat([order[:1], order[len(order) // 2 :][:1], order[-1:]])
            few = bench.everything.take(torch.unique(places))
            whole = Examples(few.inputs, few.labels)
            loss = bench.losses(whole.take(torch.zeros(1, dtype=torch.int64))).sum()
            torch.autograd.grad(loss, list(bench.parameters.values()), allow_unused=True)
            half = any(p.is_floating_point() and torch.finfo(p.dtype).bits < 32 for p in bench.module.parameters())
            rough = half or bench.device.type != "cpu"
            self._mixes = mixes_examples(bench.losses, whole, ALONE_ROUGHLY if rough else ALONE)
        return self._mixes

    def train(
        self,
        model: Tensor,
        batch: Sequence[Examples],
        generators: Sequence[Generator],
        privacy: GradientPrivacy | None = None,
        active: Tensor | None = None,
    ) -> Trained:
        bench = self.bench
        refusal = "" if privacy is None else self.refuses_private_gradients()
        require(not refusal, f"no private gradients: {refusal}")
        require(
            active is None or (active.shape == (self.d,) and active.dtype == torch.bool),
            f"active: expected ({self.d},) bool, as long as what is trained",
        )
        bench.load(model)  # may change what is frozen, once
        foreign = not isinstance(self.training, Descent | OneStep)
        frozen = bench.frozen_versions(foreign)
        trained = self._together(model, batch, generators, privacy, active)
        if trained is None:
            trained = self._one_by_one(model, batch, generators, privacy, active)
        changed = [name for name, version in bench.frozen_versions(foreign).items() if version != frozen.get(name)]
        require(
            not changed,
            f"local training changed {', '.join(changed[:3])}, which no update carries: later clients would train "
            "another model; freeze it, or make it part of what is trained",
        )
        return trained

    def _together(
        self, model: Tensor, batch: Sequence[Examples], generators: Sequence[Generator],
        privacy: GradientPrivacy | None, active: Tensor | None,
    ) -> Trained | None:  # fmt: skip
        """All clients through the batched engine; None without one, or if anybody's training raises."""
        if self._batched is None or not isinstance(self.training, Descent):
            return None
        states = [generator.get_state() for generator in generators]
        try:
            rows = self._batched.train(
                model[: self.d], batch, generators, self.training, privacy=privacy, active=active
            )
        except PrivacyBroken:  # nobody's data: the training itself
            raise
        except Exception as reason:  # one client's data must not be everybody's loss: each begins anew, alone
            self.engine_note = f"batched, but sequential after a {type(reason).__name__} in a batch of clients"
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)
            return None
        return Trained(rows, {})

    def _one_by_one(
        self, model: Tensor, batch: Sequence[Examples], generators: Sequence[Generator],
        privacy: GradientPrivacy | None, active: Tensor | None,
    ) -> Trained:  # fmt: skip
        rows = torch.full((len(batch), self.d), torch.nan)
        failed: dict[int, str] = {}
        frozen_parts = self._frozen_by(active, privacy)
        for place, (examples, generator) in enumerate(zip(batch, generators, strict=True)):
            self.bench.load(model)
            try:
                with seeded(generator), _frozen(frozen_parts):
                    rows[place] = self._update(model, examples, generator, privacy, active)
            except PrivacyBroken:  # nobody's data: the training itself
                raise
            except Exception as reason:  # whatever a client's own code raises is this client's loss, not the round's
                failed[place] = f"{type(reason).__name__}: {reason}"
        return Trained(rows, failed)

    def _update(
        self, model: Tensor, examples: Examples, generator: Generator,
        privacy: GradientPrivacy | None, active: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """One client's update from the loaded model, `(d,)`."""
        bench, training, module = self.bench, self.training, self.bench.module
        if isinstance(training, OneStep):  # nothing to take the model off from
            step = bench.layout.flatten(
                training.update(module, bench.parameters, self._losses, examples, generator)
            ).cpu()
            return step if active is None else step.masked_fill(~active, 0.0)
        if isinstance(training, Descent) and (privacy is not None or active is not None):
            steps = MatrixSteps(module, bench.parameters, self._losses, bench.layout, active)
            return steps.run(training, examples, generator, privacy).cpu() - model[: self.d]
        own = {name: p for name, p in bench.parameters.items() if p.requires_grad}
        trained = training.run(module, own, self._losses, examples, generator)
        update = self._vector(trained) - model[: self.d]
        return update if active is None else update.masked_fill(~active, 0.0)

    def _frozen_by(self, active: Tensor | None, privacy: GradientPrivacy | None) -> list[nn.Parameter]:
        """What a training of unknown steps must find frozen where not everything is active."""
        if active is None or isinstance(self.training, Descent | OneStep):
            return []
        layout = self.bench.layout
        parts = dict(zip(layout.names, torch.split(active, list(layout.sizes)), strict=True))
        split = [name for name, part in parts.items() if bool(part.any()) and not bool(part.all())]
        require(
            not split,
            f"active: {', '.join(split[:3])} is trained in part; {type(self.training).__name__} freezes whole tensors, "
            "use SGD or AdamW",
        )
        return [self.bench.parameters[name] for name, part in parts.items() if not bool(part.any())]

    def _losses(self, examples: Examples) -> Tensor:
        """Loss of every example, `(b,)`, with what is frozen in the chosen type."""
        if self._autocast is None:
            return self.bench.losses(examples)
        # A context for every call: while one lasts, it keeps weights as it first cast them, whatever steps change.
        with torch.autocast(self.bench.device.type, self._autocast):
            return self.bench.losses(examples)

    def evaluate(self, model: Tensor, split: Split) -> dict[str, Metric]:
        rows = self.splits[split]
        require(len(rows) > 0, f"the split {split!r} is empty")
        examples = self.bench.everything.take(rows)
        scores = self._read(model, examples, self.bench.task.score)
        metrics = self.bench.task.summarise(scores, examples.labels, self.bench.label_names)
        if self.label_mix is not None:
            metrics[WORST_CLIENTS] = self._worst_decile(metrics, self.label_mix)
        return metrics

    def predictions(self, model: Tensor, examples: Examples) -> Tensor:
        """What `model (d,)` predicts for examples of one label each, `(b,)`."""
        task = self.bench.task
        return self._read(model, examples, lambda logits, labels: {"predicted": task.predict(logits)})["predicted"]

    def losses(self, model: Tensor, examples: Examples) -> Tensor:
        """Loss of each example under `model (d,)`, `(b,)`."""
        task = self.bench.task
        return self._read(model, examples, lambda logits, labels: {"loss": task.losses(logits, labels)})["loss"]

    def gradients(self, model: Tensor, examples: Examples) -> Tensor:
        """Gradient of each example's loss at `model (d,)`, `(b, d)`: one pass an example, without dropout."""
        bench = self.bench
        bench.load(model)
        found = torch.zeros(len(examples), self.d)
        for place, row in enumerate(found):
            loss = bench.losses(examples.take(torch.tensor([place]))).sum()
            parts = torch.autograd.grad(loss, list(bench.parameters.values()), allow_unused=True)
            named = zip(bench.parameters.items(), parts, strict=True)
            row.copy_(bench.layout.flatten({name: torch.zeros_like(p) if g is None else g for (name, p), g in named}))
        return found

    def _read(
        self, model: Tensor, examples: Examples, score: Callable[[Tensor, Tensor], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """`score(logits, labels)` of all examples, in their order, computed in batches of like length."""
        bench, order = self.bench, _by_length(examples)
        bench.load(model)
        parts: list[dict[str, Tensor]] = []
        with torch.no_grad():
            for places in torch.split(order, self._batch_size):
                batch = trimmed(examples.take(places))
                found = score(bench.logits(batch), batch.labels.to(bench.device))
                parts.append({name: value.cpu() for name, value in found.items()})
        back = order.argsort()
        return {name: torch.cat([part[name] for part in parts])[back] for name in parts[0]}

    def _vector(self, module: nn.Module) -> Tensor:
        layout = self.bench.layout
        if module is self.bench.module:
            return layout.flatten(self.bench.parameters).cpu()
        own = dict(module.named_parameters())  # somebody's training loop returned another module
        return layout.flatten({name: own[name] for name in layout.names if name in own}).cpu()

    def _worst_decile(self, metrics: Mapping[str, Metric], label_mix: Tensor) -> Metric:
        """Mean over the worst tenth of clients of the accuracy under each client's own label mix."""
        found = [metrics.get(f"accuracy/{name}") for name in self.bench.label_names]  # a small split may miss a label
        by_label = torch.tensor([0.0 if metric is None else metric.value for metric in found])
        mix = label_mix.float() * torch.tensor([metric is not None for metric in found])
        known = mix.sum(1) > 0  # of a client without any of the split's labels nothing can be said
        clients = (mix[known] @ by_label) / mix[known].sum(1)
        worst = clients.sort().values[: max(1, len(clients) // 10)]
        return Metric(float(worst.mean()), len(worst), True, "share")


@contextmanager
def _frozen(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """These parameters require no gradients for the while."""
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def _by_length(examples: Examples) -> Tensor:
    mask = examples.inputs.get("attention_mask")
    return torch.arange(len(examples)) if mask is None else mask.sum(1).argsort(stable=True)
