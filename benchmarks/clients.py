"""Many clients in one pass, beside one client after the other: the plain PEFT loop, pfl, Flower and Opacus.

`python -m benchmarks.clients [--quick]` prints JSON lines; `make bench` does so beside all peers. The work, its model
and the plain loop are in `benchmarks.workload`; every engine trains the same clients on the same batches.

| metric        | ours, theirs                                                                | ratio         |
|---------------|-----------------------------------------------------------------------------|---------------|
| time          | seconds for all clients, median over interleaved turns                      | theirs / ours |
| difference    | largest one of the two mean updates, over the largest entry of the loop's   | none          |

| part      | work                                                                                                     |
|-----------|----------------------------------------------------------------------------------------------------------|
| `batched` | 8 clients, one step each                                                                                 |
| `round`   | 20 clients, 4 steps of 4 examples of 32 tokens, adapters on all layers                                   |
| `last`    | the same with adapters on the last layer only; ours knows what comes below                               |
| `ragged`  | 32 clients with 1 to 40 examples of 8 to 64 tokens, 8 at a time; plain, and private by example           |
| `device`  | the whole round on a GPU, where there is one                                                             |

Times are those of the processor and of the wall; targets count by the processor's with one thread.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import Spent, interleaved, judged, line, reason, seconds, write
from benchmarks.training_peers import flower, opacus_hooks, pfl, silence
from benchmarks.workload import (
    NOISE,
    Round,
    StepPrivacy,
    Work,
    built_model,
    equal_clients,
    ours,
    ragged_clients,
    sequential,
)

BATCHED = {(1, 16): 3.0, (2, 32): 1.6, (8, 32): 1.2, (8, 64): 1.1}  # (examples, tokens): speed-up aimed for
TOGETHER = 8  # clients of a batched step, and of a pass over ragged ones
ROUND = (20, 4, 4, 32)  # clients, steps, examples a step, tokens
QUICK_ROUND = (3, 2, 2, 16)
LAST = (5,)  # the last of MiniLM's blocks
ALL_LAYERS, LAST_LAYER, FIRST_TOKEN = 1.3, 4.0, 8.0  # aimed for, against pfl
RAGGED = (32, 40, (8, 64))  # clients, most examples, tokens
QUICK_RAGGED = (3, 5, (8, 16))
RAGGED_PLAIN, RAGGED_PRIVATE = 1.4, 1.5  # aimed for, against the plain loop and Opacus hooks
DEVICE = 10.0  # aimed for on a GPU, against the plain loop
AGREEMENT = 1e-3  # most that mean updates may differ, over the largest entry; float32 sums in another order stay below
ENGINES = ("sequential swap", "pfl", "Flower")
NOT_QUICK = "left out of the quick form: starting its workers alone takes half a minute"

Targets = Mapping[tuple[str, str], float]
"""Ratio aimed for, by names of our variant and of a peer."""


@dataclass(frozen=True)
class Case:
    """Variants of one work, interleaved.

    Attributes:
      name: what lines call it.
      make: every variant by name; `ours` and what begins so is ours.
      pairs: which of ours stands beside which peers.
      targets: of pairs.
      repeats: times as many turns, where a call is short.
      loop: the variant that all are compared with.
      free: variants whose updates are meant to differ.
      compared: what is compared instead of what is timed: without noise, which engines draw apart.
      known: peers that were timed already, and the first round's mean update `(1, d)`.
    """

    name: str
    make: Mapping[str, Callable[[], Round]]
    pairs: tuple[tuple[str, str], ...]
    targets: Targets = field(default_factory=dict)
    repeats: int = 1
    loop: str = "sequential swap"
    free: tuple[str, ...] = ()
    compared: Mapping[str, Callable[[], Round]] = field(default_factory=dict)
    known: Mapping[str, Callable[[], tuple[list[Spent], Tensor]]] = field(default_factory=dict)


def main(arguments: list[str] | None = None) -> None:
    """Prints every line; nothing else goes to standard output."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.clients", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="less of everything, without targets for what shrank")
    parser.add_argument("--parts", nargs="+", choices=CASES, default=list(CASES), help="all when left out")
    parser.add_argument("--threads", type=int, default=1, help="of torch; with 1, processor time counts")
    parser.add_argument("--turns", type=int, help="measured turns; quick: 1, else 3")
    given = parser.parse_args(arguments)
    silence()
    torch.set_num_threads(given.threads)
    turns = given.turns or (1 if given.quick else 3)
    for part in given.parts:
        for case in CASES[part](given.quick, given.threads, turns):
            for found in measured(case, turns, given.threads):
                write(found)


def measured(case: Case, turns: int, threads: int) -> Iterator[dict[str, Any]]:
    """Differences and times of a case's variants."""
    name = f"{case.name}, {threads} thread{'s' if threads > 1 else ''}"
    failures: dict[str, str] = {}
    calls: dict[str, Round] = {}
    means: dict[str, Tensor] = {}
    spent: dict[str, list[Spent]] = {}
    for variant, make in case.make.items():
        try:
            calls[variant] = make()
            means[variant] = case.compared.get(variant, lambda made=calls[variant]: made)()().mean(0).cpu()
        except Exception as error:  # somebody else's code: whatever it raises is the reason that is printed
            if variant.startswith(("ours", case.loop)):
                raise
            failures[variant] = reason(error)
    turns *= case.repeats
    for variant, known in case.known.items():
        try:
            spent[variant], update = known()
            means[variant] = update.mean(0)
        except Exception as error:
            failures[variant] = reason(error)
    yield from differences(name, case, means)
    unmeasured = 1 if case.compared else 0  # else the comparison ran every call once
    spent |= interleaved(
        {variant: call for variant, call in calls.items() if variant not in failures}, turns, failures, unmeasured
    )
    for clock in ("processor", "wall"):
        for mine, peer in case.pairs:
            target = case.targets.get((mine, peer)) if judged(clock) else None
            case_name = name if mine == "ours" else f"{name}{mine.removeprefix('ours')}"
            yield line("clients", case_name, peer, f"time ({clock})", "s", seconds(spent.get(mine, []), clock),
                       seconds(spent.get(peer, []), clock), target, failures.get(peer, ""))  # fmt: skip


def differences(name: str, case: Case, means: Mapping[str, Tensor]) -> Iterator[dict[str, Any]]:
    """How far every variant is from the loop; what is too far is not worth timing."""
    expected = means[case.loop]
    for variant, mean in means.items():
        if variant == case.loop:
            continue
        found = float((mean - expected).abs().max() / expected.abs().max())
        yield line("clients", name, f"{variant} beside {case.loop}", "difference", "relative", found, 0.0)
        if variant not in case.free and not found <= AGREEMENT:
            raise RuntimeError(f"{name}: mean updates of {variant} and {case.loop} differ by {found:.1e}")


def batched(quick: bool, threads: int, turns: int) -> Iterator[Case]:
    """One step of eight clients at several sizes."""
    built = built_model()
    for (examples, tokens), target in BATCHED.items():
        if quick and examples > 1:
            continue
        work = Work(built, equal_clients(TOGETHER, examples, tokens), examples)
        yield Case(
            f"{TOGETHER} clients, a step of {examples} x {tokens} tokens",
            {"ours": lambda work=work: ours(work), "sequential swap": lambda work=work: sequential(work)},  # type: ignore[misc]
            (("ours", "sequential swap"),),
            {("ours", "sequential swap"): target},
            repeats=3,
        )


def round_work(layers: tuple[int, ...] | None, size: tuple[int, int, int, int] = ROUND, device: str = "cpu") -> Work:
    """The whole round."""
    clients, steps, examples, tokens = size
    return Work(built_model(layers), equal_clients(clients, steps * examples, tokens), examples, device)


def all_layers(quick: bool, threads: int, turns: int) -> Iterator[Case]:
    """A round of many clients beside every engine."""
    size = QUICK_ROUND if quick else ROUND
    work = round_work(None, size)
    yield Case(
        f"{_says(size)}, all layers",
        {
            "ours": lambda: ours(work),
            "ours, bf16 backbone": lambda: ours(work, autocast=torch.bfloat16),
            "sequential swap": lambda: sequential(work),
            "pfl": lambda: pfl(work),
        },
        (*(("ours", peer) for peer in ENGINES), ("ours, bf16 backbone", "ours")),
        {} if quick else {("ours", "pfl"): ALL_LAYERS},
        free=("ours, bf16 backbone",),
        known={"Flower": lambda: _flower(None, quick, threads, turns)},
    )


def last_layer(quick: bool, threads: int, turns: int) -> Iterator[Case]:
    """The same with adapters on the last layer, and what is below computed before, with and without the shortcut."""
    size = QUICK_ROUND if quick else ROUND
    work = round_work(LAST, size)
    yield Case(
        f"{_says(size)}, last layer, the rest cached",
        {
            "ours": lambda: ours(work, first_token=False),
            "ours, first token only": lambda: ours(work),
            "sequential swap": lambda: sequential(work),
            "pfl": lambda: pfl(work),
        },
        tuple((mine, peer) for mine in ("ours", "ours, first token only") for peer in ENGINES),
        {} if quick else {("ours", "pfl"): LAST_LAYER, ("ours, first token only", "pfl"): FIRST_TOKEN},
        known={"Flower": lambda: _flower(LAST, quick, threads, turns)},
    )


def _says(size: tuple[int, int, int, int]) -> str:
    return "{} clients x {} steps x {} x {} tokens".format(*size)


def _flower(layers: tuple[int, ...] | None, quick: bool, threads: int, turns: int) -> tuple[list[Spent], Tensor]:
    if quick:
        raise RuntimeError(NOT_QUICK)
    return flower(layers, turns, threads)


def ragged(quick: bool, threads: int, turns: int) -> Iterator[Case]:
    """Clients of different sizes with texts of different lengths."""
    clients, most, tokens = QUICK_RAGGED if quick else RAGGED
    work = Work(built_model(), ragged_clients(clients, most, tokens), 4)
    says = f"{clients} ragged clients, {TOGETHER} at a time"
    yield Case(
        says,
        {"ours": lambda: ours(work, together=TOGETHER), "sequential swap": lambda: sequential(work)},
        (("ours", "sequential swap"),),
        {} if quick else {("ours", "sequential swap"): RAGGED_PLAIN},
    )
    noisy, exact = StepPrivacy(work.batch_size, NOISE), StepPrivacy(work.batch_size, 0.0)
    yield Case(
        f"{says}, private by example",
        {"ours": lambda: ours(work, noisy, TOGETHER), "Opacus hooks": lambda: opacus_hooks(work)},
        (("ours", "Opacus hooks"),),
        {} if quick else {("ours", "Opacus hooks"): RAGGED_PRIVATE},
        loop="Opacus hooks",
        compared={"ours": lambda: ours(work, exact, TOGETHER), "Opacus hooks": lambda: opacus_hooks(work, 0.0)},
    )


def device(quick: bool, threads: int, turns: int) -> Iterator[Case]:
    """The whole round on a GPU."""
    if not torch.cuda.is_available():
        return
    size = QUICK_ROUND if quick else ROUND
    work = round_work(None, size, "cuda")
    yield Case(
        f"{_says(size)}, all layers, GPU",
        {"ours": lambda: ours(work), "sequential swap": lambda: sequential(work)},
        (("ours", "sequential swap"),),
        {} if quick else {("ours", "sequential swap"): DEVICE},
    )


CASES: dict[str, Callable[[bool, int, int], Iterator[Case]]] = {
    "batched": batched,
    "round": all_layers,
    "last": last_layer,
    "ragged": ragged,
    "device": device,
}

if __name__ == "__main__":
    main()
