"""Attacks while a Hugging Face Trainer trains: what leaks, step after step.

    trainer.add_callback(MembershipCallback(trainer, members, others))
    trainer.add_callback(ReconstructionCallback(trainer, batch, every=50))

What they log speaks of training examples and is covered by no guarantee: it is the client's own, for its own eyes.
"""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from torch import Generator, Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from privfm.attacks.membership import CalibratedByBase, Judgement, Threshold, judge, minus_loss
from privfm.attacks.reconstruction import Labels
from privfm.checks import at_least, require
from privfm.contracts.membership import Array, MembershipAttack, Scored, Signals
from privfm.contracts.reconstruction import (
    Declared,
    Observation,
    Reconstruction,
    ReconstructionAttack,
    gradients_of,
)
from privfm.plugins.example_losses import ExampleLosses, trainer_losses
from privfm.plugins.private_training import named_tensors, without_dropout


class AttackCallback(TrainerCallback):
    """Template: something is attacked every so many steps, and after training.

    Args:
      trainer: it is added to; logs through its `log`.
      every: steps between two attacks; None: after every epoch.

    Raises:
      InvalidArgument: `every` is not at least 1.
    """

    def __init__(self, trainer: Trainer, every: int | None) -> None:
        if every is not None:
            at_least("every", every, 1)
        self._trainer, self._every, self._last = trainer, every, -1

    @abstractmethod
    def attack(self, step: int) -> dict[str, float]:
        """What is logged after `step` steps."""

    def begins(self) -> None:
        """Called before the first step."""

    @final
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The model before training."""
        self._last = -1
        with _own_randomness():
            self.begins()

    @final
    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Every `every` steps."""
        if self._every is not None and state.global_step % self._every == 0:
            self._now(state.global_step)

    @final
    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """After every epoch, where no number of steps was given."""
        if self._every is None:
            self._now(state.global_step)

    @final
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The last model, if it was not attacked already."""
        self._now(state.global_step)

    def _now(self, step: int) -> None:
        if step != self._last:
            self._last = step
            with _own_randomness():
                found = self.attack(step)
            self._trainer.log(found)


@final
@dataclass(frozen=True)
class Leak:
    """What an attack found out after some steps.

    Attributes:
      step: optimizer steps.
      judgement: with intervals.
    """

    step: int
    judgement: Judgement


@final
class MembershipCallback(AttackCallback):
    """Tells examples that were trained on from others, by the losses of the model during training.

    Threat model: whoever sees the model after `step` steps, and holds candidates of which it wants to know whether they
    were trained on; it knows the loss, not the gradients. With `calibrated` it also has the model from which training
    began, as whoever received it for fine-tuning does. Who sees more (each round's update) can do more.

    Members and others must be drawn from one distribution, by lot: whatever else tells them apart, their source or
    their time, is measured as leakage. Logged are `membership_auc`, the ends of its 95 % interval (`_low`, `_high`:
    over examples, not over trainings), and `membership_tpr_at_fpr_0.01` where there are 1,000 others to say it of.

    Cost: one pass over all candidates each time, in evaluation mode, and 1,000 resamples.

    Args:
      trainer: it is added to.
      members: examples that are trained on, as the Trainer's data set has them.
      others: examples that are not, not even for early stopping.
      every: steps between two attacks; None: after every epoch.
      calibrated: compare with the losses before training, else with nothing.
      losses: batch -> `(b,)`; None: the Trainer's (`trainer_losses`).
      seed: of the intervals' resamples.

    Raises:
      InvalidArgument: fewer than two members or others.

    Source: Yeom et al., "Privacy risk in machine learning", 2018 (loss); Watson et al., "On the importance of
      difficulty calibration in membership inference attacks", 2022.
    """

    def __init__(
        self,
        trainer: Trainer,
        members: Sequence[Any],
        others: Sequence[Any],
        *,
        every: int | None = None,
        calibrated: bool = True,
        losses: ExampleLosses | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(trainer, every)
        for name, given in (("members", members), ("others", others)):
            require(len(given) >= 2, f"{name}: {len(given)} examples, expected at least 2")
        self._candidates, self._seed = (members, others), seed
        self._inside = np.arange(len(members) + len(others)) < len(members)
        self._losses = trainer_losses(trainer) if losses is None else losses
        self._calibrated = calibrated
        self._attack: MembershipAttack = Threshold()
        self.leaks: list[Leak] = []

    def begins(self) -> None:
        """Remembers what the model says before training."""
        if self._calibrated and not self.leaks:
            self._attack = CalibratedByBase(self._signal())

    def attack(self, step: int) -> dict[str, float]:
        """Scores and judges all candidates."""
        scores = self._attack(Signals(self._signal()[None], self._inside[None]))
        found = judge(Scored(scores, self._inside), np.random.default_rng((self._seed, step)))
        self.leaks.append(Leak(step, found))
        rates = {f"membership_tpr_at_fpr_{rate.fpr:g}": rate.tpr.value for rate in found.rates if rate.tpr is not None}
        auc = found.auc
        return {
            "membership_auc": auc.value,
            "membership_auc_low": auc.low,
            "membership_auc_high": auc.high,
        } | rates

    def _signal(self) -> Array:
        """Minus the loss of every candidate, members first, `(n,)`."""
        model = model_of(self._trainer)
        found = []
        with torch.no_grad(), without_dropout(model):
            for examples in self._candidates:
                found += [self._losses(one).double().cpu().numpy() for one in batches_of(self._trainer, examples)]
        return minus_loss(np.concatenate(found))


Score = Callable[[Reconstruction], dict[str, float]]


@final
class ReconstructionCallback(AttackCallback):
    """Reconstructs a given batch from its gradient at the model's present weights.

    Threat model: an honest-but-curious server of federated SGD, that sees the gradient of the mean loss over this very
    batch, knows the model, and is told how many examples there are. Larger local training, sums of clients and
    adapters hide more; `privfm.attacks.reconstruction` has attacks for each. The batch is never trained on for it.

    With a `PrivateTrainer` the same is done to the gradient that would really leave: of clipped gradients of examples,
    with the plan's noise, drawn for this purpose. No step is counted, as nothing is released; the keys end in
    `_private`.

    Logged with the attack `Labels`: `reconstruction_labels`, the share of the batch's labels that were found, and
    `reconstruction_labels_chance`, what answering with every label equally often finds.

    Cost: a backward pass, gradients of examples with a `PrivateTrainer`, and the attack's.

    Args:
      trainer: it is added to.
      batch: examples as the Trainer's data set has them; no more than `per_device_eval_batch_size`.
      every: steps between two attacks; None: after every epoch.
      attack: what reads the gradient; the observation has the names of the model inside PEFT's wrapper or not, as
        `named_parameters` says them.
      score: what is logged of a reconstruction; None: shares of labels.
      losses: batch -> `(b,)`; None: the Trainer's.

    Raises:
      InvalidArgument: the batch is empty, or has no labels to compare with and no `score` is given; or (when it
        attacks) the attack cannot run on this model.
    """

    def __init__(
        self,
        trainer: Trainer,
        batch: Sequence[Any],
        *,
        every: int | None = None,
        attack: ReconstructionAttack | None = None,
        score: Score | None = None,
        losses: ExampleLosses | None = None,
    ) -> None:
        super().__init__(trainer, every)
        require(len(batch) > 0, "batch=[]: expected at least one example")
        with _own_randomness():
            parts = list(batches_of(trainer, batch))
        require(len(parts) == 1, f"batch: {len(batch)} examples, at most per_device_eval_batch_size fit at once")
        self._batch = parts[0]
        labels = self._batch.get("labels")
        whole = isinstance(labels, Tensor) and labels.dim() == 1 and not labels.is_floating_point()
        require(whole or score is not None, "batch has no labels, one an example; say with score= what is logged")
        self._labels = labels if whole else None
        self._read = Labels() if attack is None else attack
        self._score = score
        self._losses = trainer_losses(trainer) if losses is None else losses
        self.found: list[tuple[int, Reconstruction]] = []

    def attack(self, step: int) -> dict[str, float]:
        """Takes the gradients and reads them."""
        model = model_of(self._trainer)
        private = getattr(self._trainer, "private", None)
        with without_dropout(model):
            plain = gradients_of(model, self._losses(self._batch).mean())
            logged = self._logged(step, plain, "")
            if private is not None:
                noise = Generator().manual_seed(step)  # for a look at it alone: nobody subtracts it from anything
                noisy = private.noised(private.clipped_sum(self._batch), noise)
                logged |= self._logged(step, private.named(noisy), "_private")
        return logged

    def _logged(self, step: int, gradients: Mapping[str, Tensor], suffix: str) -> dict[str, float]:
        examples = len(next(iter(named_tensors(self._batch).values())))
        model = model_of(self._trainer)
        found = self._read(Observation(model, gradients, declared=Declared(examples=examples)))
        self.found.append((step, found))
        scores = self._score(found) if self._score is not None else self._label_shares(found)
        return {f"reconstruction_{name}{suffix}": value for name, value in scores.items()}

    def _label_shares(self, found: Reconstruction) -> dict[str, float]:
        if self._labels is None:
            raise TypeError("a batch without labels has no share of them")
        true = self._labels.cpu().bincount(minlength=self._classes()).double()
        answer = torch.tensor(found.labels or (), dtype=torch.int64).bincount(minlength=len(true))
        total = len(self._labels)
        chance = true.clamp(max=total / len(true)).sum() / total
        return {"labels": float(torch.minimum(true, answer).sum() / total), "labels_chance": float(chance)}

    def _classes(self) -> int:
        config: Any = getattr(model_of(self._trainer), "config", None)
        labels = self._labels
        seen = 0 if labels is None else int(labels.max()) + 1
        return max(seen, int(getattr(config, "num_labels", 0)))


def model_of(trainer: Trainer) -> torch.nn.Module:
    """The model that a Trainer trains."""
    model = trainer.model
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"expected a module, got {type(model).__name__}")
    return model


def batches_of(trainer: Trainer, examples: Any) -> Iterator[dict[str, Any]]:
    """All examples in the Trainer's own evaluation batches, on its device; in an order that is always the same.

    Raises:
      InvalidArgument: the Trainer's options leave some out, or mix their order.
    """
    args = trainer.args
    require(not args.dataloader_drop_last, "dataloader_drop_last=True leaves examples out: attack with False")
    require(args.dataloader_in_order, "dataloader_in_order=False: losses could not be told apart; attack with True")
    for batch in trainer.get_test_dataloader(examples):
        yield {name: value.to(args.device) for name, value in batch.items()}


@contextmanager
def _own_randomness() -> Iterator[None]:
    """Leaves the global generators as they were: data loaders and collators draw from them, and training does."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002  # not to draw from, to keep
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
