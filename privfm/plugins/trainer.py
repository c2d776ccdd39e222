"""A Hugging Face Trainer whose steps are private: DP-SGD on examples inside `trainer.train()`.

    trainer = PrivateTrainer(model, args, train_dataset=data, plan=plan, privacy_seed=7)
    trainer.train()
    trainer.epsilon_record()

Everything else is the Trainer's: schedules, evaluation, checkpoints, PEFT adapters. What would make epsilon a lie is
refused when the trainer is made; see `OPTIONS`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict
from math import ceil, isfinite, nan
from pathlib import Path
from typing import Any, NoReturn, final

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Sampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from privfm.checks import InvalidArgument, require
from privfm.defenses.privacy import DPPlan, EpsilonRecord
from privfm.files import write_json
from privfm.plugins.example_losses import ExampleLosses, trainer_losses
from privfm.plugins.guards import check_saved, refuse
from privfm.plugins.private_training import EmptyToo, PrivateSteps, check_plan

STATEMENT = "privacy.json"
"""The privacy statement, beside the weights of every checkpoint."""

UNCOVERED = ("loss", "train_loss", "total_flos", "num_input_tokens_seen")
"""What a Trainer logs of its training batches: no noise covers it, so that it is neither computed nor logged."""

OPTIONS: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("max_grad_norm", (0, 0.0), "it would shorten the noisy mean, not examples; the plan clips: set 0"),
    ("gradient_accumulation_steps", (1,), "a step is one Poisson sample; large batches fit with at_once"),
    (
        "fp16",
        (False,),
        "a loss scaler skips steps by what the gradients are; train in float32, or load bfloat16 weights",
    ),
    ("bf16", (False,), "autocast is not tested with gradients of examples; load the frozen weights in bfloat16"),
    ("auto_find_batch_size", (False,), "it draws batches again until they fit; use at_once"),
    ("dataloader_drop_last", (False,), "every batch counts, the empty ones too"),
    ("dataloader_in_order", (True,), "batches must arrive as they were drawn"),
    ("train_sampling_strategy", ("random",), "the plan draws examples, each on its own"),
    ("include_num_input_tokens_seen", ("no", False), "it would log the sizes of private batches"),
    ("activation_checkpointing", (False, None), "layers are called twice, which gradients of examples do not expect"),
    ("gradient_checkpointing", (False, None), "layers are called twice, which gradients of examples do not expect"),
    ("torch_compile", (False,), "gradients of examples need the layers that compilation fuses"),
    ("use_liger_kernel", (False,), "its fused losses know no single example"),
    ("deepspeed", (None,), "several processes would each draw batches; train one client in one process"),
    ("fsdp", (None, False, "", []), "several processes would each draw batches; train one client in one process"),
    ("world_size", (1,), "several processes would each draw batches; train one client in one process"),
    ("n_gpu", (0, 1), "DataParallel averages over devices what is to be clipped; show one device"),
    ("push_to_hub", (False,), "publish after the statement was read: trainer.push_to_hub()"),
)
"""Each option of TrainingArguments that a guarantee depends on: its name, the values that are taken, and why.

Not on the list, and fine: any optimizer and schedule (post-processing), weight decay, label smoothing, NEFTune,
evaluation, early stopping and the choice of the best checkpoint on data that are nobody's private (that is tuning,
which the statement excludes), saving, and columns that are removed."""


class PrivateTrainer(Trainer):
    """A Trainer that clips the gradient of every example and noises their sum, by a plan.

    | option or call                               | what happens                                                     |
    |----------------------------------------------|------------------------------------------------------------------|
    | an option in `OPTIONS` with another value    | refused, all of them in one message                              |
    | `per_device_train_batch_size`                | must be the plan's `batch_size`: the expected one                |
    | more steps than the plan or its budget has   | refused before the first; fewer cost less, and the record says so|
    | a data set without a length, `model_init`    | refused                                                          |
    | `resume_from_checkpoint`                     | refused: its noise would be drawn again                          |
    | training loss, tokens seen, flops            | not computed, not logged: not covered (`train_loss` is NaN)      |
    | `train()` again                              | another round, with other noise; epsilon counts both             |

    `epsilon` and `delta` are logged after every epoch (below a second each). Every checkpoint is read again after it
    was written, and has the statement in `privacy.json`.

    Args:
      plan: for examples; its `LocalSampling` says batch size and steps.
      privacy_seed: of batches and noise, another for every client; None where the plan's noise is secure. It is not
        `args.seed`, which every checkpoint holds.
      losses: batch -> `(b,)`; None: as the Trainer would (`trainer_losses`).
      at_once: examples whose gradients are in memory together.
      steps_before: private steps of this client in earlier rounds.
      options: those of `transformers.Trainer`, `model` and `args` first.

    Raises:
      InvalidArgument: see the tables.
    """

    def __init__(
        self,
        *positional: Any,
        plan: DPPlan,
        privacy_seed: int | None = None,
        losses: ExampleLosses | None = None,
        at_once: int | None = None,
        steps_before: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(*positional, **options)
        refuse(_problems(self, plan))
        check_plan(plan, self._examples(), privacy_seed)
        require(
            privacy_seed is None or privacy_seed != self.args.seed,
            f"privacy_seed={privacy_seed} is args.seed, which every checkpoint holds: its reader takes the noise off",
        )
        self.plan = plan
        self._seed, self._at_once, self._steps_before = privacy_seed, at_once, steps_before
        self._losses = trainer_losses(self) if losses is None else losses
        self._private: PrivateSteps | None = None
        self._made_for: Any = None
        self.add_callback(_Epochs(self))

    @property
    def private(self) -> PrivateSteps:
        """The private steps.

        Raises:
          InvalidArgument: training has not begun.
        """
        if self._private is None:
            raise InvalidArgument("the trainer has made no private step yet: call train()")
        return self._private

    def epsilon_record(self) -> EpsilonRecord:
        """The complete statement of the steps really taken.

        Raises:
          InvalidArgument: training has not begun.
          PrivacyBroken: steps were taken and the weights do not show it.
        """
        return self.private.record()

    # What a Trainer calls

    def create_optimizer(self, *positional: Any, **named: Any) -> torch.optim.Optimizer:
        """The Trainer's optimizer; private steps are bound to it."""
        optimizer = super().create_optimizer(*positional, **named)
        inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it when training begins
        if self._private is None:
            self._made_for = inner
            model = self.model
            if not isinstance(model, nn.Module):
                raise TypeError(f"expected a module, got {type(model).__name__}")
            self._private = PrivateSteps(
                model,
                inner,
                self.plan,
                self._examples(),
                self._losses,
                seed=self._seed,
                at_once=self._at_once,
                steps_before=self._steps_before,
            )
        require(inner is self._made_for, "the optimizer was replaced: make a trainer anew, with steps_before")
        return optimizer

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Poisson batches of the plan, an epoch's worth; the Trainer's collator."""
        examples = self._examples()
        require(
            self._private is None or self._private.examples == examples,
            f"train_dataset was replaced by one of {examples} examples: epsilon is of one; make another trainer",
        )
        plain = super().get_train_dataloader()  # for its data set without unused columns, and its collator
        steps = ceil(examples / self.plan.local_sampling.batch_size)
        return DataLoader(
            plain.dataset,
            batch_sampler=_EpochBatches(self, steps),
            collate_fn=EmptyToo(plain.collate_fn, plain.dataset),
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and torch.cuda.is_available(),
            generator=torch.Generator(),
        )

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Puts private gradients into `grad`; the loss is not computed."""
        model.train()
        if callable(getattr(self.optimizer, "train", None)):  # schedule-free optimizers
            self.optimizer.train()  # type: ignore[union-attr]  # asked for above
        self.private.backward(self._prepare_inputs(inputs))
        return torch.zeros((), device=self.args.device)

    def train(self, resume_from_checkpoint: Any = None, *positional: Any, **named: Any) -> Any:
        """Trains; the result's loss is NaN.

        Raises:
          InvalidArgument: a checkpoint is to be resumed, or more steps are asked for than the plan has.
          PrivacyBroken: the weights did not move.
        """
        require(
            not resume_from_checkpoint,
            "resume_from_checkpoint: batches and noise of the lost steps would be drawn again under one seed; load the "
            "weights and make a trainer with steps_before=<steps of the checkpoint>",
        )
        refuse(_problems(self, self.plan))  # options may have changed since the trainer was made
        output = super().train(None, *positional, **named)
        self.epsilon_record()
        metrics = {name: value for name, value in output.metrics.items() if name not in UNCOVERED}
        return output._replace(training_loss=nan, metrics=metrics)

    def log(self, logs: dict[str, float], *positional: Any, **named: Any) -> None:
        """Logs what does not depend on training batches but through the released weights."""
        super().log({name: value for name, value in logs.items() if name not in UNCOVERED}, *positional, **named)

    def floating_point_ops(self, inputs: Any) -> int:
        """0: not counted, as it would add up the sizes of private batches."""
        return 0

    def save_model(self, output_dir: str | None = None, *positional: Any, **named: Any) -> None:
        """Saves, reads what was written, and puts the statement beside it.

        Raises:
          BrokenCheckpoint: the trained values are not in the files.
          PrivacyBroken: what was saved holds buffers that no noise covers.
        """
        super().save_model(output_dir, *positional, **named)
        folder = Path(output_dir or self.args.output_dir or os.curdir)
        if self._private is not None and self.args.should_save:
            self._private.check_buffers()
            check_saved(self._private.model, folder)
            statement = asdict(self._private.so_far())
            finite = isfinite(statement["epsilon"])
            write_json(folder / STATEMENT, statement if finite else {**statement, "epsilon": None})

    def hyperparameter_search(self, *positional: Any, **named: Any) -> NoReturn:
        """Refused: every trial is a run on the same examples.

        Raises:
          InvalidArgument: always.
        """
        raise InvalidArgument(
            "hyperparameter_search: each trial spends its own budget on the same examples, and epsilon says nothing of "
            "that; search on public data, and train once"
        )

    def _examples(self) -> int:
        return len(self.train_dataset)  # type: ignore[arg-type]  # refused where it has none


@final
class _EpochBatches(Sampler[list[int]]):
    """An epoch's batches, drawn when they are asked for: the private steps are made after the data loader."""

    def __init__(self, trainer: PrivateTrainer, length: int) -> None:
        self._trainer, self._length = trainer, length

    def __iter__(self) -> Iterator[list[int]]:
        state = self._trainer.state
        left = state.max_steps - state.global_step
        return self._trainer.private.batches(min(self._length, left) if left > 0 else self._length)

    def __len__(self) -> int:
        return self._length


@final
class _Epochs(TrainerCallback):
    """Looks at the number of steps before the first, and at what they cost; logs epsilon after every epoch."""

    def __init__(self, trainer: PrivateTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuses more steps than the plan has, or than its budget pays for."""
        private = self._trainer.private
        planned = private.plan.local_sampling.steps(private.examples)
        require(
            state.max_steps <= planned,
            f"{state.max_steps} steps are asked for (max_steps, num_train_epochs), the plan has {planned} a round; "
            "lower them, or give the plan's LocalSampling more and calibrate its noise again",
        )
        private.afford(state.max_steps)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Logs what has been spent."""
        private = self._trainer.private
        self._trainer.log({"epsilon": private.epsilon(), "delta": private.plan.delta})


def _problems(trainer: PrivateTrainer, plan: DPPlan) -> Iterator[str]:
    """Every setting under which epsilon would be a lie, with the way out."""
    args = trainer.args
    for name, taken, why in OPTIONS:
        value = getattr(args, name, taken[0])
        if value not in taken:
            yield f"{name}={value!r}: {why}"
    if "lomo" in str(args.optim).lower():
        yield f"optim={str(args.optim)!r}: it updates weights within the backward pass, before any clip; use another"
    data = trainer.train_dataset
    if data is None or isinstance(data, IterableDataset) or not hasattr(data, "__len__"):
        yield "train_dataset: expected one with a length, of which each example is drawn on its own"
    if trainer.model_init is not None:
        yield "model_init: weights would start anew while the budget does not; give the model itself"
    if plan.local is not None and args.per_device_train_batch_size != plan.local.batch_size:
        yield (
            f"per_device_train_batch_size={args.per_device_train_batch_size}: the plan expects "
            f"{plan.local.batch_size} examples a step; use the same number"
        )
