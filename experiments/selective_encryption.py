"""What does a server learn of single clients from the part of an update that selective encryption leaves open?

MiniLM with LoRA learns which library a sentence of documentation comes from. Each client's update goes through a
channel that protects some columns and shows the server the others of every client (`Selective`); the server then tries
what it can do with those alone, in the first round:

- labels: which biases of the head have risen;
- inverting the head: a row of its weight over its bias is the sentence's vector (its mean token vector), and the
  nearest of all sentences that the server can think of is the client's;
- matching: for every sentence it can think of, the server computes the update which a client with that sentence alone
  would send, and compares the columns it sees;
- taking apart: the same, one sentence after the other, each time with what those before it do not explain.

Each gives a list of guesses as long as the client has examples (which the server is told). The sentences that the
server can think of are all of the data set, the clients' among them, with their labels: documentation is public. So
the question is "which of 9,000?", not "what does it say?". What is found is a lower bound: these are simple attacks,
and they use no more than one round and nothing of the sum.

    python -m experiments.selective_encryption
    python -m experiments.selective_encryption --clients 50 --steps "[1]"
    python -m experiments.selective_encryption --fast

Writes `findings.json` (everything), `env.json`, `tables.md` and the figures.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import ceil, inf
from pathlib import Path
from typing import Any, final

import torch
from rich.console import Console
from torch import Generator, Tensor

from privfm.attacks.reconstruction.candidates import matched_candidates, pursued_candidates, ranks
from privfm.attacks.reconstruction.linear_layer import label_of_one, labels_present, layer_inputs, shared_input
from privfm.checks import at_least, require
from privfm.cli import command
from privfm.contracts import Channel, Transform, View
from privfm.defenses import FixedPoint
from privfm.defenses.channels.ckks import CKKS
from privfm.defenses.channels.masks import PairwiseMasks
from privfm.defenses.channels.plaintext import Plaintext
from privfm.defenses.channels.selective import Selective
from privfm.defenses.channels.selective_maps import Ranges, by_name, by_sensitivity
from privfm.defenses.transforms import Chain
from privfm.engines import Local
from privfm.federation.rehearsal import Rehearsal
from privfm.learning import (
    SGD,
    Docstrings,
    LoRA,
    ModelLearner,
    Schedule,
    SequenceClassification,
    SequenceClassifier,
    SplitShares,
    Workbench,
    split,
)
from privfm.randomness import Seeds
from privfm.reporting import describe_environment, show
from privfm.reporting.drawing import Panel, drawing_style
from privfm.reporting.formats import bytes_text, small_number
from privfm.reporting.panels import cost_panel
from privfm.reporting.summary import wilson
from privfm.reporting.table import Column, ReportTable, TableRow
from privfm.vectors import Layout

LEARNING_RATE, BATCH = 0.3, 16  # of experiments.tradeoff
SIZES = (1, 4, 16)  # examples of a client
GUESSES = (1, 10)  # for each of the client's examples
COHORT = 50  # clients of a round
BOUND = 8.0  # on a coordinate of an update, which channels need; ten steps stay under 0.5 (measured)
BITS = 20  # of a masked coordinate
NOTHING, EVERYTHING = "Nothing", "Everything"


# --------------------------------------------------------------------------------------------------------- the clients


@final
@dataclass(frozen=True)
class Scene:
    """What the server has before the round: the model, all sentences, and some with which it makes its maps.

    Attributes:
      bench: model and N sentences.
      clients: rows of the sentences that clients may hold.
      server: rows of the server's own, public ones.
      vectors: `(N, h)`, what the head is given of each sentence.
      single: `(N, d)`, the update of a client with this sentence alone, after one step.
    """

    bench: Workbench
    clients: Tensor
    server: Tensor
    vectors: Tensor
    single: Tensor


def prepared(sentences: int, seed: int) -> Scene:
    """Reads the sentences and computes what the attacks compare with."""
    seeds, table = Seeds(seed), Docstrings(limit=sentences).load()
    source = SequenceClassifier("minilm", adapter=LoRA(rank=4, alpha=8.0, layers=(5,)), max_length=32)
    built = source.build(table.label_names, seeds.generator("initialisation"))
    bench = Workbench(built, SequenceClassification(), table)
    splits = split(table, SplitShares(server=0.05), seeds.generator("split"))
    every = [row[None] for row in torch.arange(len(table))]
    return Scene(bench, splits["clients"], splits["server"], head_inputs(bench), updates(bench, every, 1, seed))


@final
@dataclass(frozen=True)
class Kind:
    """Clients with as many examples and as many local steps.

    Attributes:
      steps: of local training.
      rows: `(clients, n)`, their sentences.
      sent: `(clients, d)`, their updates.
    """

    steps: int
    rows: Tensor
    sent: Tensor


def kinds_of(scene: Scene, clients: int, steps: Sequence[int], seed: int) -> list[Kind]:
    """Clients with 1, 4 and 16 sentences; no two of a size share one. They are the same for all `steps`."""
    most = len(scene.clients) // SIZES[-1]
    require(clients <= most, f"clients={clients}: there are sentences for {most} of {SIZES[-1]} each")
    generator, found = Seeds(seed).generator("partition"), []
    for n in SIZES:
        order = torch.randperm(len(scene.clients), generator=generator)[: clients * n]
        rows = scene.clients[order].reshape(clients, n)
        found += [Kind(now, rows, updates(scene.bench, list(rows), now, seed)) for now in steps]
    return found


def updates(bench: Workbench, clients: Sequence[Tensor], steps: int, seed: int) -> Tensor:
    """What clients with these rows send after local steps from the initial model, `(clients, d)`."""
    training = SGD(LEARNING_RATE, Schedule(batch_size=BATCH, steps=steps))
    learner = ModelLearner(bench, {}, training, engine="batched")
    found = []
    for batch in torch.split(torch.arange(len(clients)), 250):  # bounds the memory of the stacked adapters
        generators = Seeds(seed).clients("data order", steps, batch.tolist())
        examples = [bench.everything.take(clients[client]) for client in batch.tolist()]
        trained = learner.train(bench.initial, examples, generators)
        require(not trained.failed, f"training failed: {next(iter(trained.failed.values()), '')}")
        found.append(trained.rows)
    return torch.cat(found)


def head_inputs(bench: Workbench) -> Tensor:
    """What the head of the initial model is given of every sentence, `(N, h)`."""
    seen: list[Tensor] = []
    head = bench.load(bench.initial).get_submodule(head_names(bench.layout)[0].removesuffix(".bias"))
    hook = head.register_forward_pre_hook(lambda _, given: seen.append(given[0].cpu()))
    order = bench.everything.inputs["attention_mask"].sum(1).argsort(stable=True)
    try:
        with torch.no_grad():
            for places in torch.split(order, 64):
                bench.losses(bench.everything.take(places))
    finally:
        hook.remove()
    return torch.cat(seen)[order.argsort()]


def head_names(layout: Layout) -> tuple[str, str]:
    """The head's bias and weight."""
    bias, weight = (name for name in layout.names if "classifier" in name)
    return bias, weight


def head_of(layout: Layout, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The head's part of flat vectors `(n, d)`: weights `(n, c, h)` and biases `(n, c)`."""
    parts = dict(zip(layout.names, torch.split(rows, list(layout.sizes), dim=1), strict=True))
    bias, weight = head_names(layout)
    shape = layout.shapes[layout.names.index(weight)]
    return parts[weight].reshape(-1, *shape), parts[bias]


# ---------------------------------------------------------------------------------------------- what is left to be seen


def selections(layout: Layout, scores: Tensor, generator: Generator) -> dict[str, Ranges]:
    """What is protected, by title. `scores (d,)`: of a map that was made from public data."""
    random = torch.rand(layout.d, generator=generator)
    return {
        NOTHING: (),
        "LoRA": by_name(layout, ["*lora_*"]),
        "Head": by_name(layout, ["*classifier*"]),
        "All but the head's bias": by_name(layout, ["*lora_*", "*classifier*weight"]),
        "Top 1 % of a public map": by_sensitivity(scores, 0.01),
        "Top 10 % of a public map": by_sensitivity(scores, 0.1),
        "Top 50 % of a public map": by_sensitivity(scores, 0.5),
        "Random 10 %": by_sensitivity(random, 0.1),
        "Random 50 %": by_sensitivity(random, 0.5),
        EVERYTHING: ((0, layout.d),),
    }


def wires(protected: Ranges, clients: int) -> dict[str, tuple[Channel, Transform]]:
    """The channels that protect these columns, with their codecs, by name."""
    if not protected:
        return {"Plaintext": (Plaintext(), Chain(()))}
    encrypted = Selective(CKKS(BOUND, clients), protected)
    masked = Selective(PairwiseMasks(clients), protected)
    return {"CKKS": (encrypted, Chain(())), "masks": (masked, Chain((FixedPoint(BOUND, BITS),)))}


def played(channel: Channel, codecs: Transform, rows: Tensor) -> tuple[Tensor, float]:
    """Rounds over this channel: what the server reads of each client, NaN where nothing, and bytes a client sends."""
    found, sent = [], 0.0
    for cohort in rows.tensor_split(ceil(len(rows) / COHORT)):
        clear, phases = Rehearsal(channel, cohort, codecs, channel.reveals).play(Local(1), in_clear)
        require(len(clear) == len(cohort), f"{len(cohort) - len(clear)} clients refused: raise BOUND")
        found.append(clear)
        sent += phases.up * len(cohort)
    return torch.cat(found), sent / len(rows)


def in_clear(view: View) -> Tensor:
    """What is read of single clients, `(n, d)`, NaN where nothing is."""
    return view.block(0, view.d) if view.clear is None else view.clear


# ---------------------------------------------------------------------------------------------------------- the attacks


@final
@dataclass(frozen=True)
class Inverted:
    """What inverting the head gives of some clients.

    Attributes:
      labels: of each client, those that are said to be there.
      scores: `(clients, N)`, how near each sentence is to the nearest vector that was read, over its known coordinates.
      cosines: `(clients, N)`, the same with 0 in place of what is not known.
    """

    labels: tuple[frozenset[int], ...]
    scores: Tensor
    cosines: Tensor


def inverted(weights: Tensor, biases: Tensor, examples: int, vectors: Tensor) -> Inverted:
    """Labels and sentence vectors from the clear part of the head, `(clients, c, h)` and `(clients, c)`."""
    labels, estimates, owners = [], [], []
    for client, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        present = labels_present(bias)
        said = frozenset(present.nonzero()[:, 0].tolist())
        if examples == 1:
            alone = None if said else label_of_one(weight)
            labels.append(said if alone is None else frozenset([alone]))
            read = shared_input(weight, bias)[None]
        else:
            labels.append(said)
            read = layer_inputs(weight, bias)[present]
        estimates.append(read[~read.isnan().all(1)])
        owners += [client] * len(estimates[-1])
    read, places = torch.cat(estimates), torch.tensor(owners, dtype=torch.int64)
    values, known = read.nan_to_num(0.0), (~read.isnan()).float()
    products = values @ vectors.T / values.norm(dim=1, keepdim=True)
    best = torch.full((2, len(weights), len(vectors)), -inf)
    for target, lengths in zip(best, ((known @ vectors.T.square()).sqrt(), vectors.norm(dim=1)), strict=True):
        target.scatter_reduce_(0, places[:, None].expand(-1, len(vectors)), products / lengths, "amax")
    return Inverted(tuple(labels), best[0], best[1])


# --------------------------------------------------------------------------------------------------------- the findings


@final
@dataclass(frozen=True)
class Count:
    """`hits` of `of`."""

    hits: int
    of: int

    @property
    def text(self) -> str:
        """As a share, with its 95 % Wilson interval."""
        low, high = wilson(self.share, self.of)
        return f"{100 * self.share:.1f} % ({100 * low:.1f} to {100 * high:.1f})"

    @property
    def share(self) -> float:
        """Of all, those that were hit."""
        return self.hits / self.of


@final
@dataclass(frozen=True)
class Finding:
    """What the server learned from one selection, of clients of one kind.

    Attributes:
      protected: title of the selection.
      examples: of a client.
      steps: local steps.
      unprotected: share of the columns that the server reads of every client.
      labels: of those that a client's examples have, how many were found.
      wrong_labels: said to be there and not.
      cosine: of a sentence's vector with the nearest that was read from its client's update; mean; None without any.
      foreign_cosine: the same for the next client's sentences.
      inverted: sentences among as many guesses as the client has examples, and among ten times as many.
      matched: the same by matching.
      apart: among as many guesses by taking apart.
      foreign: the next client's sentences among as many guesses, by each of the three: what chance gives.
      chance: the share that guessing blindly has there.
    """

    protected: str
    examples: int
    steps: int
    unprotected: float
    labels: Count
    wrong_labels: int
    cosine: float | None
    foreign_cosine: float | None
    inverted: tuple[Count, ...]
    matched: tuple[Count, ...]
    apart: Count
    foreign: tuple[Count, ...]
    chance: float

    @property
    def best(self) -> Count:
        """Sentences among as many guesses as the client has examples, by the attack that finds most."""
        return max(self.inverted[0], self.matched[0], self.apart, key=lambda count: count.hits)


def found_in(scene: Scene, clear: Tensor, kind: Kind, title: str) -> Finding:
    """Runs all attacks on what is in the clear, `(clients, d)`."""
    rows = kind.rows
    sentences, n = len(scene.vectors), rows.shape[1]
    foreign = rows.roll(1, 0)
    head = inverted(*head_of(scene.bench.layout, clear), n, scene.vectors)
    matching, picked = matched_candidates(clear, scene.single), pursued_candidates(clear, scene.single, n)
    true = [set(scene.bench.everything.labels[own].tolist()) for own in rows]
    hits = sum(len(own & said) for own, said in zip(true, head.labels, strict=True))

    def counted(scores: Tensor, whose: Tensor, guesses: int) -> Count:
        places = ranks(scores, whose)
        return Count(int((places <= guesses * n).sum()), places.numel())

    def among(whose: Tensor) -> Count:
        return Count(int((whose[:, :, None] == picked[:, None, :]).any(2).sum()), whose.numel())

    def near(whose: Tensor) -> float | None:
        values = head.cosines.gather(1, whose)
        values = values[values.isfinite()]
        return float(values.mean()) if len(values) else None

    return Finding(
        title,
        n,
        kind.steps,
        float((~clear[0].isnan()).double().mean()),
        Count(hits, sum(map(len, true))),
        sum(map(len, head.labels)) - hits,
        near(rows),
        near(foreign),
        tuple(counted(head.scores, rows, guesses) for guesses in GUESSES),
        tuple(counted(matching, rows, guesses) for guesses in GUESSES),
        among(rows),
        (*(counted(scores, foreign, 1) for scores in (head.scores, matching)), among(foreign)),
        n / sentences,
    )


def told_by_choice(own: Tensor, rows: Tensor, single: Tensor, share: float) -> tuple[Count, ...]:
    """What a client's *choice* tells, if it protects its own largest changes `(clients, d)` and says which they are.

    Nothing of the update itself is used: sentences are ranked by how much of their own update lies in those columns.
    """
    kept = ceil(share * own.shape[1])
    mask = torch.zeros_like(own).scatter_(1, own.abs().topk(kept, dim=1).indices, 1.0)
    squares = single.square()
    places = ranks((mask @ squares.T) / squares.sum(1), rows)
    return tuple(Count(int((places <= guesses).sum()), places.numel()) for guesses in GUESSES)


# ----------------------------------------------------------------------------------------------------- tables, figures


def tables(findings: Sequence[Finding], sent: Mapping[str, Mapping[str, float]]) -> list[ReportTable]:
    """One for each number of local steps, and what a client sends."""
    titles = (
        "Protected", "Examples", "Readable", "Labels found", "Cosine", "foreign", "Inverted", "Matched",
        "among 10 n", "Taken apart", "foreign", "chance",
    )  # fmt: skip
    columns = tuple(Column(title, title.lower(), "findings") for title in titles)
    notes = (
        "Readable: share of the update's values that the server reads of every single client; nothing encrypts them.",
        "Cosine: of a sentence's vector with the nearest one read from its client's update, mean; foreign: of the next "
        "client's sentences.",
        "Inverted, matched, taken apart: sentences found in n guesses, n being the number of the client's examples; of "
        "matching also in 10 n. Foreign: the next client's sentences in n guesses, by the attack that finds most; "
        "chance: blind guesses (knowing the labels is worth some).",
        "In brackets: 95 % Wilson intervals, over sentences as if they were independent.",
    )
    found = []
    for steps in dict.fromkeys(finding.steps for finding in findings):
        own = [finding for finding in findings if finding.steps == steps]
        own.sort(key=lambda finding: finding.examples)
        rows = tuple(TableRow(str(finding.examples), cells(finding)) for finding in own)
        title = f"{steps} local step{'' if steps == 1 else 's'}"
        found.append(ReportTable(columns, rows, notes, (), title))
    return [*found, bytes_table(sent)]


def cells(finding: Finding) -> tuple[str, ...]:
    """A line of the table."""
    return (
        finding.protected,
        str(finding.examples),
        f"{100 * finding.unprotected:.2f} %",
        finding.labels.text + (f", {finding.wrong_labels} wrong" if finding.wrong_labels else ""),
        *("-" if value is None else f"{value:.3f}" for value in (finding.cosine, finding.foreign_cosine)),
        *(count.text for count in (finding.inverted[0], *finding.matched, finding.apart)),
        max(finding.foreign, key=lambda count: count.hits).text,
        f"{small_number(100 * finding.chance)} %",
    )


def bytes_table(sent: Mapping[str, Mapping[str, float]]) -> ReportTable:
    """What a client sends."""
    titles = ("Protected", "over CKKS", "over masks", "in the clear")
    rows = [
        TableRow("", (title, *(bytes_text(own.get(name)) for name in ("CKKS", "masks", "Plaintext"))))
        for title, own in sent.items()
    ]
    columns = tuple(Column(title, title.lower(), "bytes") for title in titles)
    return ReportTable(columns, tuple(rows), (), (), f"A client sends, rounds of up to {COHORT}")


def choice_table(told: Mapping[float, tuple[Count, ...]], sentences: int) -> ReportTable:
    """What a client's own choice tells."""
    columns = tuple(Column(title, title.lower(), "choice") for title in ("Protected", "first", "among ten"))
    rows = [TableRow("", (f"own largest {share:.0%}", *(c.text for c in counts))) for share, counts in told.items()]
    notes = (f"Clients with one example, one step. Nothing but the choice is used. Chance: 1 of {sentences:,}.",)
    return ReportTable(columns, tuple(rows), notes, (), "What a mask that a client chose from its own update tells")


def figures(findings: Sequence[Finding]) -> dict[str, Panel]:
    """After one step, by the clients' size: sentences found in as many guesses, by the better attack."""
    found = {}
    with drawing_style():
        for n in SIZES:
            own = [finding for finding in findings if finding.examples == n and finding.steps == 1]
            labels = [f"{one.protected} ({small_number(100 * one.unprotected)} % readable)" for one in own]
            amounts = [(label, one.best.share) for label, one in zip(labels, own, strict=True)]
            title = f"Found: {n} sentence{'' if n == 1 else 's'} a client"
            found[f"found-{n}"] = cost_panel(title, amounts, lambda share: f"{100 * share:.0f} %", log=False)
    return found


# ------------------------------------------------------------------------------------------------------- the experiment


def main(
    *,
    clients: int = 100,
    sentences: int = 9000,
    steps: tuple[int, ...] = (1, 10),
    seed: int = 0,
    out: Path = Path("runs/selective_encryption"),
    fast: bool = False,
) -> None:
    """Plays the rounds, attacks what is in the clear, prints the tables and draws the figures.

    Args:
      clients: of each kind: with 1, 4 and 16 examples.
      sentences: of the data set; the server compares with all of them.
      steps: local steps; one after the other.
      seed: root of the seed tree.
      out: folder.
      fast: a small version that shows that everything runs; its numbers mean little.
    """
    if fast:
        clients, sentences, steps = 4, 200, (1, 2)
    at_least("clients", clients, 2)
    at_least("sentences", sentences, GUESSES[-1] * SIZES[-1] + 1)
    require(1 in steps, f"steps={steps}: expected 1 among them, the case that the others are compared with")
    scene = prepared(sentences, seed)
    kinds = kinds_of(scene, clients, steps, seed)
    everybody = torch.cat([kind.sent for kind in kinds])
    public_map = scene.single[scene.server].square().mean(0)
    findings: list[Finding] = []
    sent: dict[str, dict[str, float]] = {}
    for title, protected in selections(scene.bench.layout, public_map, Seeds(seed).generator("attack")).items():
        sent[title] = {}
        for name, (channel, codecs) in wires(protected, min(COHORT, len(everybody))).items():
            if name == "masks":  # the same columns are in the clear: one round shows the bytes
                sent[title][name] = played(channel, codecs, everybody[:COHORT])[1]
                continue
            clear, sent[title][name] = played(channel, codecs, everybody)
            parts = torch.split(clear, clients)
            findings += [found_in(scene, part, kind, title) for part, kind in zip(parts, kinds, strict=True)]
    plain = next(kind for kind in kinds if kind.steps == kind.rows.shape[1] == 1)
    told = {share: told_by_choice(plain.sent, plain.rows, scene.single, share) for share in (0.01, 0.1, 0.5)}
    found = [*tables(findings, sent), choice_table(told, sentences)]
    write(out, {"findings": [asdict(finding) for finding in findings], "bytes": sent, "choice": _plain(told)}, found)
    for name, panel in figures(findings).items():
        (out / f"{name}.svg").write_text(panel.standalone())
    console = Console()
    show(found, console)
    console.print(f"written: {out}", soft_wrap=True)


def write(out: Path, numbers: Mapping[str, Any], found: Sequence[ReportTable]) -> None:
    """The record and the tables."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "findings.json").write_text(json.dumps(numbers, indent=1))
    (out / "env.json").write_text(json.dumps(describe_environment(), indent=1))
    (out / "tables.md").write_text("\n".join(f"## {table.title}\n\n{table.markdown()}" for table in found))


def _plain(told: Mapping[float, tuple[Count, ...]]) -> dict[str, Any]:
    return {f"{share:g}": [asdict(count) for count in counts] for share, counts in told.items()}


if __name__ == "__main__":
    command(main)
