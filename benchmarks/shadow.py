"""Shadow adapters trained together, beside one after the other, with and without what lies below them known.

`python -m benchmarks.shadow [--quick]` prints JSON lines. MiniLM with LoRA r=8 on query and value and a head on the
mean token, sentences of `Docstrings` cut to 32 tokens, AdamW, batches of 32; every adapter has its own half of the
sentences (about 500 of 1,000), and all variants take the same steps on the same batches. One after the other is the
plain PEFT loop: batches are padded to their longest sentence. Ours also keeps the first trained block's frozen
products of queries, keys and values beside the activations; both are filled in the turn that is not measured, and
`filling` bounds what that takes, once for all adapters and epochs.

| metric     | ours, theirs                                                                  | ratio         |
|------------|-------------------------------------------------------------------------------|---------------|
| time       | seconds for all adapters of the case, median over interleaved turns           | theirs / ours |
| an adapter | the same divided by the adapters of the case, where that is fewer than 64     | theirs / ours |
| difference | largest one of two trained adapters, over the largest change of the loop's    | none          |

| part      | work                                                                                                     |
|-----------|----------------------------------------------------------------------------------------------------------|
| `last`    | training adapters on the last two layers, one epoch; and what filling the cache takes, once              |
| `all`     | the same on all six layers, where nothing can be known: fewer adapters, no target                        |
| `reading` | logits of all sentences under all adapters on the last two layers                                        |
| `whole`   | 64 adapters on the last two layers, three epochs, beside ten minutes; ours only, one turn                |

Times are those of the processor and of the wall; targets count by the processor's with one thread.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from time import perf_counter, process_time
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from benchmarks.timing import Spent, interleaved, judged, line, seconds, write
from benchmarks.training_peers import silence
from privfm.attacks.membership.halves import halves
from privfm.contracts import Examples
from privfm.learning import AdamW, Docstrings, LoRA, Schedule, SequenceClassification, SequenceClassifier, Workbench
from privfm.learning.shadows import logits_of, train_shadows
from privfm.learning.trunk import trimmed
from privfm.randomness import Seeds

SENTENCES, TOKENS, RANK = 1000, 32, 8
SHADOWS, EPOCHS = 64, 3  # of the whole work
TURN, QUICK = (4, 1000), (2, 60)  # adapters and sentences of what is repeated
FEW = 2  # adapters on all layers
LAST = (4, 5)  # of MiniLM's six blocks
LEARNING_RATE = 2e-3
WITHOUT_CACHE, WITH_CACHE = 3.0, 1.2  # aimed for
LIMIT = 600.0  # seconds for the whole work
AGREEMENT = 1e-2  # AdamW's steps are signs where gradients are near zero: rounding moves some entries
READ = 64  # sentences the loop reads at once
SEED = 0

PLAIN, KNOWN = "one after another, no cache", "one after another, cache"


@dataclass(frozen=True)
class Work:
    """Adapters to train.

    Attributes:
      bench: model and data.
      inside: `(models, n)`.
      training: of each.
    """

    bench: Workbench
    inside: Tensor
    training: AdamW

    def generators(self) -> list[Generator]:
        """Fresh ones, one an adapter."""
        return Seeds(SEED).clients("shadows", 0, range(len(self.inside)))

    def says(self) -> str:
        """What lines call it."""
        epochs = self.training.schedule.epochs
        models, n = self.inside.shape
        return f"{models} adapters, halves of {n} sentences, {epochs} epoch{'s' if epochs > 1 else ''}"


def work(layers: tuple[int, ...] | None, models: int, sentences: int, epochs: int = 1) -> Work:
    """The work; `layers`: blocks with adapters, all of them if None."""
    table = Docstrings(limit=sentences).load()
    source = SequenceClassifier("minilm", adapter=LoRA(RANK, layers=layers), max_length=TOKENS)
    bench = Workbench(
        source.build(table.label_names, Seeds(SEED).generator("initialisation")), SequenceClassification(), table
    )
    inside = torch.from_numpy(halves(models, len(table), np.random.default_rng(SEED)))
    return Work(bench, inside, AdamW(LEARNING_RATE, Schedule(batch_size=32, epochs=epochs)))


def ours(own: Work) -> Tensor:
    """All adapters `(models, d)`, together; the loop must never be timed under this name."""
    found = train_shadows(own.bench, own.training, own.inside, own.bench.everything, own.generators())
    if found.note != "batched":
        raise RuntimeError(found.note)
    return found.models


def one_after_another(own: Work, cache: bool) -> Tensor:
    """All adapters `(models, d)` by the plain loop."""
    bench, rows = own.bench, []
    for row, generator in zip(own.inside, own.generators(), strict=True):
        half = _known(bench.everything.take(row.nonzero().squeeze(1)), cache)
        torch.randint(2**62, (), generator=generator)  # what the engine draws first: the same order of data
        bench.load(bench.initial)
        optimizer = own.training.optimizer(list(bench.parameters.values()))
        for places in own.training.schedule.batches(len(half), generator):
            optimizer.zero_grad()
            bench.losses(half.take(places)).mean().backward()  # type: ignore[no-untyped-call]  # torch's own
            optimizer.step()
        rows.append(bench.layout.flatten(bench.parameters).clone())
    bench.load(bench.initial)
    return torch.stack(rows)


def read_one_after_another(own: Work, models: Tensor, cache: bool) -> Tensor:
    """Logits `(models, n, classes)` by the plain loop, sentences of like length together."""
    bench = own.bench
    order = bench.everything.inputs["attention_mask"].sum(1).argsort(stable=True)
    found = []
    with torch.no_grad():
        for model in models:
            bench.load(model)
            batches = [trimmed(_known(bench.everything.take(part), cache)) for part in torch.split(order, READ)]
            found.append(torch.cat([bench.logits(batch) for batch in batches])[order.argsort()])
    bench.load(bench.initial)
    return torch.stack(found)


def _known(examples: Examples, cache: bool) -> Examples:
    """The same examples, without their places in the table if nothing is to be known of them."""
    return examples if cache else replace(examples, rows=None)


def last(quick: bool, turns: int) -> Iterator[dict[str, Any]]:
    """Adapters on the last two layers."""
    own = work(LAST, *(QUICK if quick else TURN))
    yield _filling(own)
    calls = {
        "ours": lambda: ours(own),
        PLAIN: lambda: one_after_another(own, cache=False),
        KNOWN: lambda: one_after_another(own, cache=True),
    }
    targets = {} if quick else {PLAIN: WITHOUT_CACHE, KNOWN: WITH_CACHE}
    yield from compared(f"last two layers: {own.says()}", calls, own.bench.initial, turns, targets)


def _filling(own: Work) -> dict[str, Any]:
    """What filling the cache takes at most: every sentence once through all layers."""
    bench, begin = own.bench, process_time()
    for part in torch.split(torch.arange(len(bench.everything)), READ):
        batch = trimmed(replace(bench.everything.take(part), rows=None))
        with torch.no_grad():
            bench.logits(batch)
    case = f"last two layers: {own.says()}"
    why = "nobody to compare with: once for all adapters and epochs; a bound, with the two layers that are not kept"
    return line("shadow", case, "nobody", "filling the cache (processor)", "s", process_time() - begin, None, None, why)


def all_layers(quick: bool, turns: int) -> Iterator[dict[str, Any]]:
    """Adapters on all six layers."""
    own = work(None, FEW, (QUICK if quick else TURN)[1])
    calls = {"ours": lambda: ours(own), PLAIN: lambda: one_after_another(own, cache=False)}
    yield from compared(f"all six layers: {own.says()}", calls, own.bench.initial, turns, {}, FEW)


def reading(quick: bool, turns: int) -> Iterator[dict[str, Any]]:
    """Logits of everything under adapters that were moved at random."""
    own = work(LAST, *(QUICK if quick else TURN))
    bench = own.bench
    moves = torch.randn(len(own.inside), bench.layout.d, generator=Generator().manual_seed(SEED))
    models = bench.initial + 0.02 * moves
    calls = {
        "ours": lambda: logits_of(bench, models, bench.everything),
        PLAIN: lambda: read_one_after_another(own, models, cache=False),
        KNOWN: lambda: read_one_after_another(own, models, cache=True),
    }
    yield from compared(f"reading {len(models)} adapters, {len(bench.everything)} sentences", calls, 0.0, turns, {})


def whole(quick: bool, turns: int) -> Iterator[dict[str, Any]]:
    """Everything that an attack trains, once."""
    if quick:
        return
    own = work(LAST, SHADOWS, SENTENCES, EPOCHS)
    wall, processor = perf_counter(), process_time()
    ours(own)
    spent = Spent(process_time() - processor, perf_counter() - wall)
    for clock in ("processor", "wall"):
        target = 1.0 if judged(clock) else None
        taken = getattr(spent, clock)
        yield line("shadow", f"whole: {own.says()}", "ten minutes", f"time ({clock})", "s", taken, LIMIT, target)


def compared(  # noqa: PLR0917 (what a case is made of)
    case: str, calls: dict[str, Callable[[], Tensor]], start: Tensor | float, turns: int, targets: dict[str, float],
    divisor: int = 1,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Differences and times of a case.

    Args:
      case: its name.
      calls: variants by name; `ours` is ours.
      start: what changes are measured from.
      turns: that are measured.
      targets: of peers.
      divisor: adapters, where the seconds of one are printed.
    """
    found = {name: call() for name, call in calls.items()}  # also warms up
    peers = [name for name in calls if name != "ours"]
    for peer in peers:
        largest = (found[peer] - start).abs().max()
        difference = float((found["ours"] - found[peer]).abs().max() / largest)
        yield line("shadow", case, peer, "difference", "relative", difference, 0.0)
        if not difference <= AGREEMENT:
            raise RuntimeError(f"{case}: ours and {peer} differ by {difference:.1e}")
    failures: dict[str, str] = {}
    spent = interleaved(calls, turns, failures, unmeasured=0)
    if failures:
        raise RuntimeError(f"{case}: {failures}")
    metric = "time" if divisor == 1 else "an adapter"
    for clock in ("processor", "wall"):
        each = {name: seconds(taken, clock) for name, taken in spent.items()}
        for peer in peers:
            mine, theirs = ((each[name] or 0.0) / divisor for name in ("ours", peer))
            target = targets.get(peer) if judged(clock) else None
            yield line("shadow", case, peer, f"{metric} ({clock})", "s", mine, theirs, target)


PARTS: dict[str, Callable[[bool, int], Iterator[dict[str, Any]]]] = {
    "last": last,
    "all": all_layers,
    "reading": reading,
    "whole": whole,
}


def main(arguments: list[str] | None = None) -> None:
    """Prints every line; nothing else goes to standard output."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.shadow", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="less of everything, without targets")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="all when left out")
    parser.add_argument("--threads", type=int, default=1, help="of torch; with 1, processor time counts")
    parser.add_argument("--turns", type=int, help="measured turns; quick: 1, else 3")
    given = parser.parse_args(arguments)
    silence()
    torch.set_num_threads(given.threads)
    for part in given.parts:
        for found in PARTS[part](given.quick, given.turns or (1 if given.quick else 3)):
            write(found)


if __name__ == "__main__":
    main()
