"""DP-SGD inside somebody's own training loop: batches, gradients, clip, noise and epsilon from one plan.

    plan = DPPlan(1.0, max_grad_norm=1.0, sample_rate=1.0, delta=1e-5, unit="example", place="local", sampling="full",
                  local=LocalSampling(batch_size=32, local_steps=300)).with_epsilon(3.0, rounds=1, examples=[len(data)])
    private = PrivateSteps(model, optimizer, plan, len(data), losses, seed=7)
    for batch in private.loader(data):
        private.step(batch)
    print(private.record().epsilon)

The optimizer, its schedule and the model stay the user's own: what they see as the gradient is already noised, so that
whatever they make of it costs nothing more.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, final

import torch
from torch import Generator, Tensor, nn
from torch.utils.data import DataLoader, Sampler, default_collate

from privfm.checks import PrivacyBroken, at_least, require
from privfm.contracts import Examples, GradientPrivacy
from privfm.defenses.privacy import DPPlan, EpsilonRecord
from privfm.learning.per_example import (
    ALONE,
    ALONE_ROUGHLY,
    mixes_examples,
    per_example_gradients,
    problems_for,
    way_for,
)
from privfm.plugins.guards import WeightWatch, check_optimizer, trained_parameters
from privfm.randomness import Seeds
from privfm.vectors import Layout

Batch = Mapping[str, Tensor] | Sequence[Tensor]
"""What a data loader gives: tensors by name or in order, each with the examples in front."""

BatchLosses = Callable[[Any], Tensor]
"""A batch -> `(b,)`: the loss of every example, from that example alone."""

Collate = Callable[[list[Any]], Any]


@final
class PrivateSteps:
    """Steps of a user's own optimizer on clipped, noised gradients of a Poisson sample.

    Formal guarantee: that of `ExamplePrivacy`, for what leaves through the weights and the optimizer's state, if the
    batches given are those drawn: only their lengths are compared. Losses on training examples, their gradients and the
    sizes of batches are not covered: neither print nor send them.

    | case                                              | what happens                                                |
    |---------------------------------------------------|-------------------------------------------------------------|
    | a batch is empty                                  | a step of noise alone, as accounted                         |
    | no batch was drawn, or one of another length      | `PrivacyBroken`: a shuffled loader is no Poisson sample     |
    | a gradient that is not finite                     | counts as zero                                              |
    | an example makes the model raise                  | the error ends training; leave such examples out before     |
    | BatchNorm, or another layer that mixes examples   | refused, before every step too; use GroupNorm               |
    | a parameter that no loss depends on               | `PrivacyBroken`; freeze it                                  |
    | the optimizer holds other parameters              | refused, before every step too                              |
    | steps were made and a weight is where it was      | `record` raises `PrivacyBroken`                             |
    | a buffer that is saved has changed (statistics)   | `record` raises `PrivacyBroken`                             |

    Args:
      model: what is trained are its parameters that require gradients.
      optimizer: of exactly these parameters; any that needs no closure.
      plan: for examples; its `sample_rate`, `sampling` and cohort are the federation's business and not read here.
      examples: how many the client holds; public, like the expected batch.
      losses: see `BatchLosses`; calls `model`.
      seed: of batches and noise, for a plan with `source="seeded"`: a simulation, no guarantee against who knows it.
        Another for every client: with one for all, the noise of two cancels in their difference.
      steps_before: steps of this client in earlier rounds: they count for epsilon, and name other noise.
      at_once: examples whose gradients are in memory together, `(at_once, d)` float32; None: the whole batch. This, and
        not gradient accumulation, is how a large batch fits.

    Cost: that of `per_example_gradients`; one copy of the trained values, to see that they move, and of buffers.

    Raises:
      InvalidArgument: the plan is not for examples, delta is too large, a seed is missing or too much, or model and
        optimizer do not fit (see the table).
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        plan: DPPlan,
        examples: int,
        losses: BatchLosses,
        *,
        seed: int | None = None,
        steps_before: int = 0,
        at_once: int | None = None,
    ) -> None:
        check_plan(plan, examples, seed)
        at_least("steps_before", steps_before, 0)
        if at_once is not None:
            at_least("at_once", at_once, 1)
        problems = problems_for(model)
        require(not problems, "; ".join(problems))
        self.model, self.plan, self.examples = model, plan, examples
        self.steps, self.steps_before = 0, steps_before
        self._losses, self._at_once = losses, at_once
        self._parameters = trained_parameters(model)
        check_optimizer(self._parameters, optimizer)
        self._optimizer = optimizer
        self._layout = Layout.of(self._parameters)
        self._generator = Seeds(seed or 0).generator("steps", steps_before)  # not read where noise is secure
        self._watch = WeightWatch(model)
        self._drawn: deque[int] = deque()
        self._only_loop: bool | None = None
        self._alone_in: set[tuple[bool, ...]] = set()  # modes of the model's parts in which no example saw another

    # Batches

    def batches(self, steps: int | None = None) -> Iterator[list[int]]:
        """Places of the examples of each step, drawn by the plan; a batch may be empty.

        Args:
          steps: how many; None: the plan's for one round.

        Raises:
          InvalidArgument: the plan's budget does not pay for them.
        """
        steps = self.plan.local_sampling.steps(self.examples) if steps is None else steps
        at_least("steps", steps, 1)
        self.afford(steps)
        drawn = list(self._privacy(steps).batches(self.examples, self._generator))
        self._drawn.clear()  # of an earlier loop that ended before its last batch
        for places in drawn:
            self._drawn.append(len(places))
            yield places.tolist()

    def loader(
        self, dataset: Any, collate: Collate = default_collate, *, steps: int | None = None, workers: int = 0
    ) -> DataLoader[Any]:
        """A data loader of these batches.

        Args:
          dataset: map-style, of `examples` examples.
          collate: as torch's `collate_fn`; of no examples it makes the empty part of a batch of one.
          steps: batches every time it is gone through; None: the plan's for one round.
          workers: as torch's `num_workers`.

        Raises:
          InvalidArgument: the data set has another length.
        """
        require(
            len(dataset) == self.examples, f"dataset has {len(dataset)} examples, the plan was given {self.examples}"
        )
        length = self.plan.local_sampling.steps(self.examples) if steps is None else steps
        return DataLoader(
            dataset,
            batch_sampler=PoissonBatches(self, length),
            collate_fn=EmptyToo(collate, dataset),
            num_workers=workers,
            generator=Generator(),  # else each pass would draw a number from torch's global generator
        )

    # Steps

    def step(self, batch: Batch) -> None:
        """One private step: gradients, clip, noise, the user's optimizer.

        Raises:
          PrivacyBroken: see `backward`.
        """
        self.backward(batch)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def backward(self, batch: Batch) -> None:
        """Puts the noisy mean gradient over the expected batch into `grad` of every trained parameter; counts a step.

        What was in `grad` is overwritten: a plain `backward()` of the user's own before it adds nothing. The step of
        the optimizer comes next; what is added to `grad` in between is covered by nothing.

        Raises:
          PrivacyBroken: the batch is not the one that the plan drew, its examples are mixed, or a parameter has no
            gradient of its own.
          InvalidArgument: the batch has tensors of different lengths, or losses are not one an example.
        """
        check_optimizer(self._parameters, self._optimizer)
        if problems := problems_for(self.model):  # again: a layer may have been woken by model.train()
            raise PrivacyBroken("; ".join(problems))
        named = named_tensors(batch)
        self._check_drawn(named)
        total = self.clipped_sum(batch)
        self.steps += 1  # before anybody can see the noisy gradient
        self._place(self.noised(total, self._generator))

    def clipped_sum(self, batch: Batch) -> Tensor:
        """Sum of the clipped gradients of a batch, `(d,)` float32, without noise: private, and no step is counted."""
        examples = self._as_examples(batch)
        losses = self._one_each(batch)
        self._check_alone(examples, losses)
        device = next(iter(self._parameters.values())).device
        total = torch.zeros(self._layout.d, dtype=torch.float64, device=device)
        privacy = self._privacy(1)
        for part in torch.split(torch.arange(len(examples)), self._at_once or max(len(examples), 1)):
            rows = per_example_gradients(
                self.model,
                self._parameters,
                losses,
                examples.take(part),
                self._layout,
                way="loop" if self._only_loop else None,
            )
            total += privacy.clip(rows).sum(0, dtype=torch.float64)
        return total.float()  # rounded once, as secure noise is made for

    def noised(self, total: Tensor, generator: Generator) -> Tensor:
        """A clipped sum `(d,)` -> the noisy mean over the expected batch, which is fixed."""
        return self._privacy(1).noised(total[None], [self.examples], [generator])[0]

    def named(self, gradient: Tensor) -> dict[str, Tensor]:
        """A gradient `(d,)` by parameter name."""
        return self._layout.unflatten(gradient)

    # What it is worth

    def epsilon(self) -> float:
        """Epsilon after the steps really taken."""
        return self.so_far().epsilon

    def so_far(self) -> EpsilonRecord:
        """The statement after the steps really taken, without a look at the weights; see `record`."""
        return self._record(self.steps_before + self.steps)

    def record(self) -> EpsilonRecord:
        """The complete statement after the steps really taken, earlier rounds' included, as if all were of one round.

        Raises:
          PrivacyBroken: steps were taken and the weights do not show it: none moved, or under noise not all did (frozen
            by another optimizer, replaced after the optimizer was made, a learning rate of zero); or see
            `check_buffers`.
        """
        if self.steps:
            self._watch.check(noisy=self.plan.local_sampling.noise(self.examples, self.plan.noise_multiplier) > 0)
        return self.so_far()

    def check_buffers(self) -> None:
        """Refuses a model that keeps something of its examples beside its weights; see `WeightWatch.check_buffers`.

        Raises:
          PrivacyBroken: it does.
        """
        self._watch.check_buffers()

    def _record(self, steps: int) -> EpsilonRecord:
        if steps == 0:
            found = self.plan.records(0, [self.examples])[0]
        else:
            local = replace(self.plan.local_sampling, local_steps=steps)
            found = replace(self.plan, local=local).records(1, [self.examples])[0]
        return replace(found, median=None, clients=None)  # one client speaks for itself

    def afford(self, steps: int) -> None:
        """Refuses so many more steps where the plan's budget does not pay for them.

        Raises:
          InvalidArgument: it does not.
        """
        budget = self.plan.budget
        if budget is None:
            return
        after = self.steps_before + self.steps + steps
        found = self._record(after).epsilon
        require(
            found <= budget,
            f"{steps} more steps, {after} in all, would make epsilon {found:.4g}, above budget={budget:g}; take fewer "
            "steps, or more noise from the start",
        )

    # Parts

    def _privacy(self, steps: int) -> GradientPrivacy:
        plan = replace(self.plan, local=replace(self.plan.local_sampling, local_steps=steps))
        ends = list(accumulate(self._layout.sizes))
        found = plan.gradient_privacy(tuple(zip([0, *ends[:-1]], ends, strict=True)))
        if found is None:
            raise TypeError("a plan for whole clients has no gradient privacy")
        return found

    def _place(self, gradient: Tensor) -> None:
        for name, value in self._layout.unflatten(gradient).items():
            parameter = self._parameters[name]
            parameter.grad = value.to(parameter)

    def _check_drawn(self, named: Mapping[str, Tensor]) -> None:
        size = len(next(iter(named.values())))
        if not self._drawn:
            raise PrivacyBroken(
                f"a batch of {size} examples that the plan has not drawn: epsilon is that of its own Poisson samples; "
                "take batches from `loader`, or from `batches` in their order"
            )
        drawn = self._drawn.popleft()
        if drawn != size:
            raise PrivacyBroken(
                f"a batch of {size} examples, the plan drew {drawn}: expected its batches, whole and in their order"
            )

    def _as_examples(self, batch: Batch) -> Examples:
        named = named_tensors(batch)
        device = next(iter(self._parameters.values())).device
        moved = {name: value.to(device) for name, value in named.items()}
        count = len(next(iter(moved.values())))
        return Examples(moved, torch.arange(count, device=device))

    def _one_each(self, batch: Batch) -> Callable[[Examples], Tensor]:
        def losses(examples: Examples) -> Tensor:
            found = self._losses(rebuilt(batch, examples.inputs))
            shape = tuple(getattr(found, "shape", ()))
            require(
                shape == (len(examples),),
                f"losses has shape {shape}: expected ({len(examples)},), one an example (reduction='none')",
            )
            return found

        return losses

    def _check_alone(self, examples: Examples, losses: Callable[[Examples], Tensor]) -> None:
        """On the first batch of two: whether examples see each other, and which way to gradients is open.

        A layer may mix examples in training alone, as normalisation over a batch does: asked in evaluation, and once in
        every other mode that the model is in.
        """
        mode = tuple(part.training for part in self.model.modules())
        if mode in self._alone_in or len(examples) < 2:
            return
        few = examples.take(torch.arange(2))
        parameters = list(self._parameters.values())
        rough = parameters[0].device.type != "cpu" or any(torch.finfo(p.dtype).bits < 32 for p in parameters)
        share = ALONE_ROUGHLY if rough else ALONE
        with without_dropout(self.model):
            mixed = mixes_examples(losses, few, share)
        if mixed or mixes_in_training(losses, few, share):
            raise PrivacyBroken(
                f"an example's loss in {type(self.model).__name__} depends on the others of its batch: no gradient is "
                "its own, so that no clip bounds it"
            )
        self._only_loop = way_for(self.model, self._parameters, losses, few, self._layout) == "loop"
        self._alone_in.add(mode)


@final
class PoissonBatches(Sampler[list[int]]):
    """A batch sampler for `torch.utils.data.DataLoader`, of the batches that a plan draws.

    Args:
      private: draws them, and expects them in this order.
      length: batches every time it is gone through.
    """

    def __init__(self, private: PrivateSteps, length: int) -> None:
        at_least("length", length, 1)
        self._private, self._length = private, length

    def __iter__(self) -> Iterator[list[int]]:
        return self._private.batches(self._length)

    def __len__(self) -> int:
        return self._length


@final
@dataclass(frozen=True)
class EmptyToo:
    """Collates as `collate` does, and no examples as the empty part of a batch of one.

    Args:
      collate: examples -> batch.
      dataset: where the one comes from, of which only the shape is kept.
    """

    collate: Collate
    dataset: Any

    def __call__(self, examples: list[Any]) -> Any:
        """Examples, perhaps none -> batch."""
        if len(examples):
            return self.collate(examples)
        one = self.collate([self.dataset[0]])
        return rebuilt(one, {name: value[:0] for name, value in named_tensors(one).items()})


def check_plan(plan: DPPlan, examples: int, seed: int | None) -> None:
    """Refuses a plan that says nothing of single examples of so many.

    Raises:
      InvalidArgument: as it says.
    """
    at_least("examples", examples, 1)
    require(
        plan.unit == "example",
        f"unit={plan.unit!r}: local steps protect examples; use unit='example', place='local' and local=LocalSampling "
        "(whole clients are protected by one clip of their update, see `privfm.plugins`)",
    )
    require(
        plan.delta < 1 / examples,
        f"delta={plan.delta:g} >= 1/n = {1 / examples:g} for {examples:,} examples: publishing one of them whole would "
        f"satisfy it; use less, better {examples**-1.1:.1g}",
    )
    plan.local_sampling.noise(examples, plan.noise_multiplier)
    if plan.source == "seeded":
        require(seed is not None, "seed=None: seeded noise needs a seed (a simulation); use source='secure' otherwise")
    else:
        require(seed is None, f"seed={seed}: secure noise has none; leave it out")


def named_tensors(batch: Batch) -> dict[str, Tensor]:
    """The tensors of a batch by name, or by place; all of one length.

    Raises:
      InvalidArgument: there is none, something is no tensor, or lengths differ.
    """
    items = batch.items() if isinstance(batch, Mapping) else ((str(place), one) for place, one in enumerate(batch))
    named = dict(items)
    require(bool(named), "the batch is empty of tensors: expected at least one")
    for name, value in named.items():
        kind = type(value).__name__
        require(
            isinstance(value, Tensor) and value.dim() > 0,
            f"batch[{name!r}] is a {kind}: expected a tensor with the examples in front; leave others out",
        )
    lengths = {name: len(value) for name, value in named.items()}
    require(len(set(lengths.values())) == 1, f"lengths {lengths}: expected the examples in front of every tensor")
    return named


def rebuilt(batch: Any, named: Mapping[str, Tensor]) -> Any:
    """Other tensors in the form of a batch: a dictionary, a list or a tuple."""
    if isinstance(batch, Mapping):
        return dict(named)
    return tuple(named.values()) if isinstance(batch, tuple) else list(named.values())


def mixes_in_training(losses: Callable[[Examples], Tensor], examples: Examples, share: float) -> bool:
    """Whether the loss of an example depends on who stands beside it, in the mode that the model is in.

    Each of two examples beside the other, and beside itself, from one state of the global generator: batches of one
    shape draw the same dropout.

    Args:
      losses: of examples, `(b,)`.
      examples: two.
      share: by how much a loss may differ, for roundings.
    """

    def of(places: list[int]) -> Tensor:
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)
            return losses(examples.take(torch.tensor(places)))

    beside_the_other, beside_itself = of([0, 1]), torch.stack([of([0, 0])[0], of([1, 1])[1]])
    return not torch.allclose(beside_the_other, beside_itself, rtol=share, atol=share, equal_nan=True)


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; every part gets its own mode back."""
    training = [part for part in model.modules() if part.training]
    model.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True
