"""What a private step costs over a plain one: the batched adapters beside Opacus and `torch.func`.

`python -m benchmarks.private_step [--quick]` prints JSON lines; `make bench` does so beside all peers. MiniLM with LoRA
r=8 on query and value and a head, one client, Adam; every variant takes the same steps on the same batches. A private
step clips each example's gradient to 1 and adds noise of deviation 1. Plain is the ordinary PEFT loop.

| metric     | ours, theirs                                                                 | ratio         |
|------------|------------------------------------------------------------------------------|---------------|
| overhead   | a private step over a plain one, median over turns                           | theirs / ours |
| time       | seconds a step, median; beside `plain step` ours is the private one          | theirs / ours |
| memory     | bytes a forked child grew by, its copy of the model not counted              | theirs / ours |
| difference | largest one of the two sums of clipped gradients, over the length of ours    | none          |

Overheads and times are those of the processor and of the wall; targets count by the processor's with one thread.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn.functional import cross_entropy

from benchmarks.timing import Spent, growth, interleaved, judged, line, paired, reason, seconds, write
from benchmarks.workload import (
    BOUND,
    NOISE,
    StepPrivacy,
    Work,
    built_model,
    equal_clients,
    flat,
    our_learner,
    trained,
)
from privfm.learning import AdamW, Schedule

CASES = {(32, 64): 1.10, (4, 16): 1.15}  # (examples, tokens) of a step: most a private step may cost over a plain one
MEMORY = 1.10  # most a private step may need over a plain one
AGREEMENT = 1e-6  # most that sums of clipped gradients may differ in an entry, over their length
RATE = 1e-4
STEPS = 4  # of one call

Step = Callable[[], None]
"""Takes `STEPS` steps from wherever the model is."""


@dataclass(frozen=True)
class Variant:
    """A way to take steps.

    Attributes:
      make: `(work, noise multiplier)` -> its steps, and what gives the last step's gradients (`d` values: the sum of
        clipped gradients if there is no noise).
      private: whether it clips.
    """

    make: Callable[[Work, float], tuple[Step, Callable[[], Tensor]]]
    private: bool = True


def main(arguments: list[str] | None = None) -> None:
    """Prints every line; nothing else goes to standard output."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.private_step", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="4 x 16 tokens only, three turns, no memory of peers")
    parser.add_argument("--threads", type=int, default=1, help="of torch; with 1, processor time counts")
    parser.add_argument("--turns", type=int, help="measured turns; quick: 3, else 7")
    given = parser.parse_args(arguments)
    logging.getLogger("opacus").setLevel(logging.ERROR)
    cases = [(4, 16)] if given.quick else sorted(CASES, reverse=True)
    torch.set_num_threads(1)
    works = {case: Work(built_model(), equal_clients(1, STEPS * case[0], case[1]), case[0]) for case in cases}
    # Memory first: a child forked after a parallel sum inherits threads that are not there. One small step before it,
    # so that what the libraries load when they are first used is nobody's.
    _plain(Work(built_model(), equal_clients(1, 1, 8), 1), 0.0)[0]()
    for case, work in works.items():
        for found in memory(label(case, 1), work, ("ours", "plain step") if given.quick else tuple(VARIANTS)):
            write(found)
    torch.set_num_threads(given.threads)
    for case, work in works.items():
        for found in speed(label(case, given.threads), work, given.turns or (3 if given.quick else 7), CASES[case]):
            write(found)


def label(case: tuple[int, int], threads: int) -> str:
    """What a line calls a case."""
    return f"{case[0]} x {case[1]} tokens, {threads} thread{'s' if threads > 1 else ''}"


def memory(case: str, work: Work, names: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Growth of every variant beside ours, and ours beside the plain step with a target."""
    copy = sum(value.numel() * value.element_size() for value in work.built.module.state_dict().values())
    found: dict[str, tuple[int | None, str]] = {}
    for name in names:
        grown, why = growth(lambda name=name: VARIANTS[name].make(work, NOISE)[0])  # type: ignore[misc]
        found[name] = (None if grown is None else max(grown - copy, 1), why)
    ours, missing = found.pop("ours")
    for name, (theirs, why) in found.items():
        target = 1 / MEMORY if name == "plain step" else None
        yield line("private_step", case, name, "memory", "bytes", ours, theirs, target, why or missing)


def speed(case: str, work: Work, turns: int, limit: float) -> Iterator[dict[str, Any]]:
    """Agreement, overheads and times of all variants."""
    failures: dict[str, str] = {}
    steps: dict[str, Step] = {}
    sums: dict[str, Tensor] = {}
    for name, variant in VARIANTS.items():
        try:
            if variant.private:
                sums[name] = clipped_sum(variant, work)
            steps[name] = variant.make(work, NOISE)[0]
        except Exception as error:
            if name.startswith("ours"):
                raise
            failures[name] = reason(error)
    for name in [name for name in sums if name != "ours"]:
        difference = float((sums["ours"] - sums[name]).abs().max() / sums["ours"].norm())
        yield line("private_step", case, name, "difference", "relative", difference, 0.0)
        if difference > AGREEMENT:
            raise RuntimeError(f"sums of clipped gradients of ours and {name} differ by {difference:.1e}")
    spent = interleaved(steps, turns, failures)
    for clock in ("processor", "wall"):
        yield from _lines(case, spent, failures, clock, limit)


def clipped_sum(variant: Variant, work: Work) -> Tensor:
    """The sum of clipped gradients `(d,)` of the first step, without noise."""
    client = work.clients[0]
    first = slice(0, work.batch_size)
    one = [type(client)(client.ids[first], client.lengths[first], client.labels[first])]
    step, gradients = variant.make(Work(work.built, one, work.batch_size), 0.0)
    step()
    return gradients() * work.batch_size


def _lines(
    case: str, spent: dict[str, list[Spent]], failures: dict[str, str], clock: str, limit: float
) -> Iterator[dict[str, Any]]:
    """Everything measured by one clock."""
    overhead, time = f"overhead ({clock})", f"time ({clock})"
    plain = spent["plain step"]
    ours = paired(spent["ours"], plain, clock)
    target = 1.0 if judged(clock) else None
    yield line("private_step", case, f"at most {limit:.2f}", overhead, "private / plain", ours, limit, target)
    against = paired(spent["ours"], spent["ours, plain"], clock)
    yield line("private_step", case, f"at most {limit:.2f}, over our own plain step", overhead, "private / plain",
               against, limit)  # fmt: skip
    mine = seconds(spent["ours"], clock)
    for name, variant in VARIANTS.items():
        if name == "ours":
            continue
        why = failures.get(name, "")
        if variant.private:
            theirs = paired(spent.get(name, []), plain, clock)
            yield line("private_step", case, name, overhead, "private / plain", ours, theirs, None, why)
        taken = seconds(spent.get(name, []), clock)
        each = None if taken is None else taken / STEPS
        yield line("private_step", case, name, time, "s", None if mine is None else mine / STEPS, each, None, why)


def _ours(work: Work, noise_multiplier: float, private: bool = True) -> tuple[Step, Callable[[], Tensor]]:
    privacy = _Watched(work.batch_size, noise_multiplier) if private else None
    training = AdamW(RATE, Schedule(batch_size=work.batch_size, epochs=1))
    learner = our_learner(work, shuffled=not private, training=training)
    model, examples = learner.initial(), [learner.bench.everything]

    def run() -> None:
        result = learner.train(model, examples, [Generator().manual_seed(0)], privacy)
        if result.failed:
            raise RuntimeError(f"training failed: {dict(result.failed)}")

    return run, lambda: torch.zeros(0) if privacy is None else privacy.seen[-1]


@dataclass(frozen=True)
class _Watched(StepPrivacy):
    """Keeps the last step's noisy mean gradient."""

    seen: list[Tensor] = field(default_factory=list)

    def noised(self, sums: Tensor, examples: Sequence[int], generators: Sequence[Generator]) -> Tensor:
        self.seen[:] = [super().noised(sums, examples, generators)[0]]
        return self.seen[0][None]


def _loop(work: Work, step: Callable[[dict[str, Tensor], Tensor], None]) -> Step:
    """Steps over all batches."""
    batches = list(work.clients[0].batches(work.batch_size))

    def run() -> None:
        for inputs, labels in batches:
            step(inputs, labels)

    return run


def _plain(work: Work, noise_multiplier: float) -> tuple[Step, Callable[[], Tensor]]:
    module = work.module()
    values = list(trained(module).values())
    optimizer = torch.optim.Adam(values, lr=RATE)

    def step(inputs: dict[str, Tensor], labels: Tensor) -> None:
        optimizer.zero_grad()
        loss: Tensor = cross_entropy(module(**inputs).logits, labels)
        loss.backward()  # type: ignore[no-untyped-call]  # torch's own
        optimizer.step()

    return _loop(work, step), lambda: _gradients(values)


def _gradients(values: list[torch.nn.Parameter]) -> Tensor:
    return flat([value.grad for value in values if value.grad is not None])


def _opacus(mode: str) -> Callable[[Work, float], tuple[Step, Callable[[], Tensor]]]:
    """Opacus 1.6 through its engine, without a wrapper around the model; `mode`: `hooks` or `ghost`."""

    def make(work: Work, noise_multiplier: float) -> tuple[Step, Callable[[], Tensor]]:
        from opacus import PrivacyEngine
        from torch.utils.data import DataLoader, TensorDataset

        module, client = work.module(), work.clients[0]
        values = list(trained(module).values())
        loader = DataLoader(TensorDataset(client.ids, client.labels), batch_size=work.batch_size)
        made = PrivacyEngine(accountant="rdp").make_private(
            module=module, optimizer=torch.optim.Adam(values, lr=RATE), criterion=torch.nn.CrossEntropyLoss(),
            data_loader=loader, noise_multiplier=noise_multiplier, max_grad_norm=BOUND, poisson_sampling=False,
            grad_sample_mode=mode, wrap_model=False,
        )  # fmt: skip
        optimizer = made[1]
        criterion = made[2] if mode == "ghost" else cross_entropy

        def step(inputs: dict[str, Tensor], labels: Tensor) -> None:
            optimizer.zero_grad()
            criterion(module(**inputs).logits, labels).backward()
            optimizer.step()

        return _loop(work, step), lambda: _gradients(values)

    return make


def _functional(work: Work, noise_multiplier: float) -> tuple[Step, Callable[[], Tensor]]:
    """`vmap(grad)` over the whole model; without a mask, which vmap cannot follow through transformers 5."""
    from torch.func import functional_call, grad, vmap

    module = work.module()
    parameters = trained(module)
    values = list(parameters.values())
    optimizer = torch.optim.Adam(values, lr=RATE)

    def loss(weights: dict[str, Tensor], ids: Tensor, one: Tensor) -> Tensor:
        inputs = {"input_ids": ids[None], "attention_mask": None}
        return cross_entropy(functional_call(module, weights, (), inputs).logits, one[None])

    each = vmap(grad(loss), in_dims=(None, 0, 0), randomness="different")

    def step(inputs: dict[str, Tensor], labels: Tensor) -> None:
        weights = {name: value.detach() for name, value in parameters.items()}
        found = list(each(weights, inputs["input_ids"], labels).values())
        norms = torch.stack([part.flatten(1).square().sum(1) for part in found]).sum(0).sqrt()
        scale = BOUND / norms.clamp(min=BOUND)
        for value, part in zip(values, found, strict=True):
            total = torch.einsum("b,b...->...", scale, part)
            if noise_multiplier:
                total = total + noise_multiplier * BOUND * torch.randn_like(total)
            value.grad = total / work.batch_size
        optimizer.step()

    return _loop(work, step), lambda: _gradients(values)


VARIANTS = {
    "ours": Variant(_ours),
    "ours, plain": Variant(lambda work, noise_multiplier: _ours(work, noise_multiplier, private=False), private=False),
    "plain step": Variant(_plain, private=False),
    "Opacus hooks": Variant(_opacus("hooks")),
    "Opacus ghost": Variant(_opacus("ghost")),
    "torch.func": Variant(_functional),
}


if __name__ == "__main__":
    main()
