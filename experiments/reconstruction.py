"""What does a curious server read of its clients' texts and images, and what does each defence leave of it?

Texts: MiniLM learns which library a sentence of documentation comes from; clients hold 1, 8 or 32 sentences of 8 to 16
tokens and send the gradient of all parameters, or what a defence makes of it. Images: a small network learns digits.

Each cell plays one round as a run would play it (training, client steps, codecs, channel), takes what the server
received of its first client (or the sum, where there is only a sum), attacks that, and scores the attack against the
client's own data. Nothing of the data is told unless the table says so. Beside it stands what chance gives: as many
foreign sentences, or the mean image.

What a defence costs is the accuracy after some rounds of the same arm, on sentences and digits of nobody.

    python -m experiments.reconstruction
    python -m experiments.reconstruction --part images --images mnist.npz
    python -m experiments.reconstruction --batches "[1,4,8]" --seeds "[0]" --rounds 0
    python -m experiments.reconstruction --fast

Writes `report.html` (tables, and recovered texts and images beside the originals), `cells.json`, `env.json` and
`tables.md`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import lru_cache
from math import hypot, sqrt
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, final

import torch
from rich.console import Console
from torch import Tensor

from privfm.attacks.reconstruction import (
    AttentionPursuit,
    BagOfWords,
    InvertingGradients,
    SpanSearch,
    chance_scores,
    observations,
    score_images,
    score_texts,
    scores_of,
    special_tokens,
    texts_of,
    told,
)
from privfm.checks import at_least, non_negative, require
from privfm.cli import command
from privfm.contracts import (
    Adapter,
    Channel,
    Examples,
    LocalTraining,
    ModelSource,
    Observation,
    Reconstruction,
    ReconstructionAttack,
    Split,
    Table,
    Task,
    Transform,
)
from privfm.defenses import DPPlan, FixedPoint, GradientPruning, LocalSampling
from privfm.defenses.channels.masks import PairwiseMasks
from privfm.defenses.channels.plaintext import Plaintext
from privfm.defenses.channels.selective import Selective
from privfm.defenses.channels.selective_maps import by_name
from privfm.defenses.transforms import Clip
from privfm.engines import Local
from privfm.federation import Arm, Federation, FixedSize, Population, rounds
from privfm.federation.glimpse import glimpse
from privfm.learning import (
    SGD,
    Digits,
    Docstrings,
    ImageArrays,
    ImageClassification,
    LoRA,
    ModelLearner,
    OneStep,
    Schedule,
    SequenceClassification,
    SequenceClassifier,
    SmallCNN,
    Soteria,
    WholeModel,
    Workbench,
)
from privfm.randomness import Seeds
from privfm.reporting import describe_environment, show
from privfm.reporting.formats import small_number
from privfm.reporting.reconstructions import Exhibit, marked, picture, write_reconstructions
from privfm.reporting.table import Column, ReportTable, TableRow

QUESTION = "What does a curious server read of its clients' data, and what does each defence leave of it?"
COHORT = 4  # clients of a round
SHORTEST, LONGEST = 8, 16  # tokens of a sentence, special ones included
BOUND, BITS = {"texts": 2.0, "images": 16.0}, 28  # of whole numbers: no coordinate here is larger (a round would fail)
DELTA = 1e-5
RATES = {"texts": 0.1, "images": 0.1}  # learning rates, chosen on seed 100 without a defence
ALL = 10**6  # a batch of all a client has
SHOWN = 4  # texts or images of an exhibit

Part = Literal["texts", "images"]


# --------------------------------------------------------------------------------------------------------- the defences


def one_step(part: Part, dropout: bool = False) -> LocalTraining:
    """Federated SGD: the update is a multiple of the gradient."""
    return OneStep(RATES[part], ALL, dropout)


def local_steps(part: Part, steps: int) -> LocalTraining:
    """Several steps on all of a client's examples."""
    return SGD(RATES[part], Schedule(batch_size=ALL, steps=steps))


@final
@dataclass(frozen=True)
class Defence:
    """What a client does to protect itself.

    Attributes:
      title: for readers.
      adapter: what is trained.
      training: how; None: one step on all that a client has.
      transforms: client steps and codecs.
      pruned: share of each layer that is set to zero.
      plan: differential privacy.
      masked: only the sum is revealed.
      encrypted: names of the parameters that are; None: none.
      utility: whether its accuracy is measured; what only changes the channel costs none.
    """

    title: str
    adapter: Adapter = WholeModel()
    training: LocalTraining | None = None
    transforms: tuple[Transform, ...] = ()
    pruned: float = 0.0
    plan: DPPlan | None = None
    masked: bool = False
    encrypted: tuple[str, ...] | None = None
    utility: bool = True


def dp(part: Part, noise_multiplier: float, clip: float = 1.0) -> Defence:
    """Every client clips each example's gradient and adds noise itself: the place that protects from the server."""
    local = LocalSampling(batch_size=ALL, local_steps=1)
    plan = DPPlan(noise_multiplier, clip, 1.0, DELTA, unit="example", place="local", sampling="full", local=local)
    title = f"DP-SGD, z = {noise_multiplier:g}, C = {clip:g}"
    return Defence(title, training=local_steps(part, 1), plan=plan)


def text_defences() -> list[Defence]:
    """Defences of texts."""
    codec = (FixedPoint(BOUND["texts"], BITS),)
    first = ("*word_embeddings*", "*layer.0.attention.self*")
    return [
        Defence("none"),
        Defence("clip 0.1", transforms=(Clip(0.1),)),
        *(dp("texts", z) for z in (1e-5, 1e-3, 0.3)),
        Defence("pruning 90 %", pruned=0.9),
        Defence("pruning 99 %", pruned=0.99),
        Defence("8 bits", transforms=(FixedPoint(BOUND["texts"], 8),)),
        Defence("16 bits", transforms=(FixedPoint(BOUND["texts"], 16),)),
        Defence("embeddings frozen", WholeModel(frozen=("*embeddings*",))),
        Defence("head and embeddings encrypted", encrypted=("*embeddings*", "*classifier*"), transforms=codec,
                utility=False),
        Defence("first attention encrypted", encrypted=first, transforms=codec, utility=False),
        Defence(f"secure sum of {COHORT}", masked=True, transforms=codec, utility=False),
        Defence("dropout", training=one_step("texts", dropout=True)),
        Defence("2 local steps", training=local_steps("texts", 2)),
        Defence("LoRA, first round", LoRA(rank=8)),
    ]  # fmt: skip


def image_defences() -> list[Defence]:
    """Defences of images."""
    return [
        Defence("none"),
        Defence("clip 0.1", transforms=(Clip(0.1),)),
        *(dp("images", z) for z in (1e-3, 1e-2, 0.3)),
        Defence("pruning 90 %", pruned=0.9),
        Defence("pruning 99 %", pruned=0.99),
        Defence("Soteria 80 %", training=Soteria(one_step("images"), "network.9", 0.8)),
        Defence("8 bits", transforms=(FixedPoint(BOUND["images"], 8),)),
        Defence(f"secure sum of {COHORT}", masked=True, transforms=(FixedPoint(BOUND["images"], BITS),), utility=False),
        Defence("4 local steps", training=local_steps("images", 4)),
    ]


# ----------------------------------------------------------------------------------------------------------- the scenes


@final
@dataclass(frozen=True)
class Run:
    """An attack as it is run here.

    Attributes:
      title: for readers.
      attack: what is run.
      told: what the server is told, of `Declared`'s fields.
      most: largest batch it is run on; an older search that has no chance beyond would only take its time.
    """

    title: str
    attack: ReconstructionAttack
    told: tuple[str, ...] = ()
    most: int = 10**6


@final
@dataclass(frozen=True, eq=False)
class Scene:
    """A task with its model, and the attacks that are run on it.

    Attributes:
      part: texts or images.
      source: what of the model is trained -> the model.
      task: what is learned.
      table: all examples.
      usable: places of those that clients may hold.
      runs: attacks.
      defences: of clients.
    """

    part: Part
    source: Callable[[Adapter], ModelSource]
    task: Task
    table: Table
    usable: Tensor
    runs: tuple[Run, ...]
    defences: tuple[Defence, ...]


def text_scene(fast: bool) -> Scene:
    """Sentences of 8 to 16 tokens, none cut."""
    table = Docstrings(limit=400 if fast else 6000).load()

    def source(adapter: Adapter) -> ModelSource:
        return SequenceClassifier("minilm", pooling="model", adapter=adapter, max_length=32)

    tokenize = source(LoRA(rank=1)).build(table.label_names, torch.Generator().manual_seed(0)).tokenize
    assert tokenize is not None  # a text model has a tokenizer
    lengths = tokenize([str(text) for text in table.inputs])["attention_mask"].sum(1)
    usable = ((lengths >= SHORTEST) & (lengths <= LONGEST)).nonzero()[:, 0]
    runs = (
        Run("attention-Jacobian pursuit", AttentionPursuit()),
        Run("bag of words, first attention", BagOfWords()),
        Run("bag of words, embedding", BagOfWords(source="embedding")),
        Run("span search", SpanSearch(), most=1),
    )
    defences = text_defences()
    return Scene(
        "texts",
        source,
        SequenceClassification(),
        table,
        usable,
        runs,
        tuple(defences[:1] + defences[-1:] if fast else defences),
    )


def image_scene(fast: bool, images: Path | None, iterations: int) -> Scene:
    """Digits of scikit-learn, or of a file."""
    table = Digits().load() if images is None else ImageArrays(str(images), "x_train", "y_train").load()
    size = int(table.inputs.shape[-1]) if isinstance(table.inputs, Tensor) else 8
    runs = (Run("Inverting Gradients", InvertingGradients(iterations=iterations), ("shape", "examples"), most=8),)
    usable = torch.arange(min(len(table.labels), 2000))
    return Scene(
        "images", lambda _: SmallCNN(size=size), ImageClassification(), table, usable, runs,
        tuple(image_defences()[:: 4 if fast else 1]),
    )  # fmt: skip


@lru_cache(maxsize=1)
def bench_of(scene: Scene, adapter: Adapter, seed: int) -> Workbench:
    """Model and data ready for training; the last one is kept."""
    built = scene.source(adapter).build(scene.table.label_names, Seeds(seed).generator("initialisation"))
    return Workbench(built, scene.task, scene.table, "cuda" if torch.cuda.is_available() else "cpu")


def training_of(bench: Workbench, defence: Defence) -> LocalTraining:
    """Of a defence, or one step."""
    texts = bench.built.tokenize is not None
    return defence.training or one_step("texts" if texts else "images")


def federation_of(bench: Workbench, defence: Defence, clients: Sequence[Tensor], seed: int) -> Federation:
    """The arm of a defence, as a run would play it, with these rows at each client."""
    channel: Channel = PairwiseMasks(len(clients)) if defence.masked else Plaintext()
    if defence.encrypted is not None:
        channel = Selective(PairwiseMasks(len(clients)), by_name(bench.layout, defence.encrypted))
    pruning = (GradientPruning(defence.pruned, bench.layout.sizes),) if defence.pruned else ()
    cohort = None if defence.plan is not None else FixedSize(len(clients))
    arm = Arm(cohort, plan=defence.plan, channel=channel, transforms=(*pruning, *defence.transforms))
    own = [rows.tolist() for rows in clients]
    splits: dict[Split, Tensor] = {"validation": held_out(bench, {row for rows in own for row in rows})}
    learner = ModelLearner(bench, splits, training_of(bench, defence), engine="sequential")
    return Federation(arm, learner, Population.of(bench.everything, clients), Seeds(seed), Local(1))


def held_out(bench: Workbench, taken: set[int]) -> Tensor:
    """A tenth of what is nobody's, on which accuracy is measured."""
    left = [row for row in range(len(bench.everything)) if row not in taken]
    return torch.tensor(left[::10])


# ------------------------------------------------------------------------------------------------------------ the cells


@final
@dataclass(frozen=True)
class Cell:
    """One attack on one observation, scored.

    Attributes:
      part, defence, attack, batch, seed: what was played.
      clients: behind the observation.
      scores: by name.
      chance: the same for foreign data.
      used: knowledge that went into it beside the tensors.
      refused: why the attack cannot run on this; empty: it ran.
      stopped: why it ended early.
    """

    part: Part
    defence: str
    attack: str
    batch: int
    seed: int
    clients: int
    scores: dict[str, float]
    chance: dict[str, float]
    used: tuple[str, ...]
    refused: str = ""
    stopped: str = ""


def cohort_rows(scene: Scene, defence: Defence, batch: int, seed: int) -> list[Tensor]:
    """Rows of each client of the cohort; no two share one. Where rows arrive alone, there is one client."""
    clients = COHORT if defence.masked or defence.encrypted is not None else 1
    order = torch.randperm(len(scene.usable), generator=Seeds(seed).generator("partition", batch))
    return list(scene.usable[order[: clients * batch]].reshape(clients, batch))


def observed(bench: Workbench, federation: Federation, defence: Defence) -> tuple[Observation, list[Examples]]:
    """What the server received of the first client, or of all, and whose data it is."""
    seen = glimpse(federation)
    change = training_of(bench, defence).local_steps(len(federation.clients.examples(0)))
    found = observations(seen.wire, bench.layout, bench.load(seen.model), change)
    require(bool(found), f"{defence.title}: the server saw nothing")
    whose = range(1) if seen.wire.rows is not None else range(federation.clients.size)
    return found[0], [federation.clients.examples(client) for client in whose]


def chance_of(scene: Scene, bench: Workbench, truth: Sequence[Examples], seed: int) -> dict[str, float]:
    """What as many foreign sentences score, or the mean of all images."""
    generator = Seeds(seed).generator("attack")
    if scene.part == "texts":
        own = texts_of(truth)
        foreign = texts_of([bench.everything.take(scene.usable)])
        others = [text for text in foreign if text not in set(own)]
        drawn = chance_scores(others, own, special_tokens(bench.everything), generator=generator)
        return {"rouge_1": fmean(score.rouge_1 for score in drawn)}
    mean = bench.everything.inputs["pixel_values"].mean(0, keepdim=True)
    count = sum(map(len, truth))
    return scores_of(Reconstruction(images=mean.expand(count, -1, -1, -1)), truth, frozenset())


def attacked(
    scene: Scene, bench: Workbench, defence: Defence, batch: int, *, seed: int, seconds: float
) -> Iterator[tuple[Cell, Exhibit | None]]:
    """Every attack on what this defence leaves to be seen."""
    rows = cohort_rows(scene, defence, batch, seed)
    seen, truth = observed(bench, federation_of(bench, defence, rows, seed), defence)
    special, chance = special_tokens(bench.everything), chance_of(scene, bench, truth, seed)
    noise = noise_of(defence, RATES[scene.part], batch, seen.clients)
    for run in scene.runs:
        if batch > run.most:
            continue
        cell = Cell(scene.part, defence.title, run.title, batch, seed, seen.clients, {}, chance, run.told)
        observation = replace(seen, declared=replace(told(truth, run.told), noise=noise))
        refusal = run.attack.refusal(observation)
        if refusal:
            yield replace(cell, refused=refusal), None
            continue
        found = run.attack(observation, seconds=seconds)
        scores = scores_of(found, truth, special) | {"seconds": found.seconds}
        cell = replace(cell, scores=scores, used=found.used, stopped=found.stopped)
        yield cell, exhibit(bench, cell, found, truth)


def noise_of(defence: Defence, rate: float, batch: int, clients: int) -> float:
    """Deviation on every coordinate of the mean that is received, which is public: of the plan, and of the rounding.

    A coordinate that lies anywhere between two steps is rounded to either with a variance of step^2 / 6 on average.
    """
    plan = defence.plan
    drawn = 0.0 if plan is None else rate * plan.noise_multiplier * plan.max_grad_norm / batch
    rounded = [
        transform.step / sqrt(6 * clients) for transform in defence.transforms if isinstance(transform, FixedPoint)
    ]
    return hypot(drawn, *rounded)


def exhibit(bench: Workbench, cell: Cell, found: Reconstruction, truth: Sequence[Examples]) -> Exhibit:
    """Originals beside what was recovered, a few of them."""
    told_so = ", ".join(cell.used) or "nothing but the update"
    scores = ", ".join(f"{name} {small_number(value)}" for name, value in cell.scores.items())
    title = f"{cell.attack}, {cell.defence}, batch {cell.batch}"
    note = f"Used: {told_so}. {scores}." + (f" Stopped: {cell.stopped}." if cell.stopped else "")
    if cell.part == "texts":
        decode = bench.built.decode
        assert decode is not None  # a text model has a tokenizer
        own = texts_of(truth)
        pairs = score_texts(found.texts, own).pairs if found.texts else ()
        said = {pair.reference: found.texts[pair.prediction] for pair in pairs}
        lines = [(decode(text), decode(said.get(place, ()))) for place, text in enumerate(own[:SHOWN])]
        return Exhibit(title, note, tuple((original, marked(original, answer)) for original, answer in lines))
    images = torch.cat([one.inputs["pixel_values"] for one in truth])
    if found.images is None:
        return Exhibit(title, note, images=tuple((picture(image), "", "nothing") for image in images[:SHOWN]))
    score = score_images(found.images, images)
    matched = {reference: (prediction, score.psnr[reference]) for prediction, reference in score.pairs}
    return Exhibit(
        title,
        note,
        images=tuple(
            (picture(image), picture(found.images[matched[place][0]]), f"{matched[place][1]:.1f} dB")
            if place in matched
            else (picture(image), "", "nothing")
            for place, image in enumerate(images[:SHOWN])
        ),
    )


def accuracy(scene: Scene, bench: Workbench, defence: Defence, until: int, seed: int) -> float:
    """Of the arm after some rounds, in all of which four clients take part with up to 32 examples each."""
    order = scene.usable[torch.randperm(len(scene.usable), generator=Seeds(seed).generator("partition"))]
    each = min(len(order) // 32, 32)
    federation = federation_of(bench, defence, list(order[: 4 * each].reshape(4, each)), seed)
    *_, last = rounds(federation, until, evaluate_every=until)
    assert last.metrics is not None  # the last round is always evaluated
    return last.metrics[scene.task.primary].value


# ----------------------------------------------------------------------------------------------------------- the tables


def table_of(part: Part, cells: Sequence[Cell], costs: dict[str, float], batches: Sequence[int]) -> list[ReportTable]:
    """One for each attack: a line a defence, a column a batch size."""
    own = [cell for cell in cells if cell.part == part]
    columns = [Column("Defence", "defence", "reconstruction")]
    columns += [Column(f"Batch {batch}", f"B={batch}", "reconstruction") for batch in batches]
    columns += [Column("Used", "used", "reconstruction"), Column("Accuracy", "accuracy", "utility")]
    found = []
    for attack in dict.fromkeys(cell.attack for cell in own):
        rows = []
        for defence in dict.fromkeys(cell.defence for cell in own):
            mine = [cell for cell in own if (cell.attack, cell.defence) == (attack, defence)]
            used = ", ".join(dict.fromkeys(name for cell in mine for name in cell.used)) or "-"
            shown = [_cell(part, attack, [cell for cell in mine if cell.batch == batch]) for batch in batches]
            cost = costs.get(defence)
            rows.append(TableRow("", (defence, *shown, used, "-" if cost is None else f"{100 * cost:.1f} %")))
        found.append(ReportTable(tuple(columns), tuple(rows), _notes(part), (), f"{part.capitalize()}: {attack}"))
    return found


def _cell(part: Part, attack: str, cells: Sequence[Cell]) -> str:
    ran = [cell for cell in cells if not cell.refused]
    if not ran:
        return "cannot run" if cells else ""

    def mean(name: str, chance: bool = False) -> float:
        return fmean((cell.chance if chance else cell.scores).get(name, 0.0) for cell in ran)

    if part == "images":
        return f"{mean('psnr'):.1f} dB ({mean('psnr', chance=True):.1f})"
    if attack.startswith("bag of words"):
        return f"{100 * mean('token_recall'):.0f} % of tokens, {100 * mean('token_precision'):.0f} % right"
    wrong, cut = mean("false"), any(cell.stopped for cell in ran)
    return (
        f"{100 * mean('exact'):.1f} %, R-1 {100 * mean('rouge_1'):.0f} ({100 * mean('rouge_1', chance=True):.0f})"
        + (f", {wrong:.1f} false" if wrong else "")
        + (", stopped" if cut else "")
    )


def _notes(part: Part) -> tuple[str, ...]:
    accuracy_note = "Accuracy: after some rounds of the same arm, on examples of nobody; see How it was run."
    if part == "images":
        return (
            "Mean PSNR over the images, matched one to one; in brackets: the mean image of the data.",
            accuracy_note,
        )
    return (
        "Sentences recovered exactly, ROUGE-1 on tokens over pairs matched one to one (in brackets: as many foreign "
        "sentences), and predictions that are nobody's sentence. A secure sum's batch is that of all its clients. "
        "Stopped: by the time limit, before it was done.",
        accuracy_note,
    )


# ------------------------------------------------------------------------------------------------------- the experiment


def main(
    *,
    part: Literal["all", "texts", "images"] = "all",
    batches: tuple[int, ...] = (1, 8, 32),
    seeds: tuple[int, ...] = (0, 1, 2),
    seconds: float = 60.0,
    rounds: int = 10,
    image_rounds: int = 100,
    iterations: int = 1200,
    images: Path | None = None,
    out: Path = Path("runs/reconstruction"),
    fast: bool = False,
) -> None:
    """Plays the rounds, runs the attacks, and writes tables and the page.

    Args:
      part: which.
      batches: examples of a client.
      seeds: of the seed tree, one after the other; each draws other clients.
      seconds: for each attack.
      rounds: of texts, after which accuracy is measured; 0: it is not.
      image_rounds: the same of images.
      iterations: of the image attack.
      images: an .npz file with `x_train` and `y_train` in the place of scikit-learn's digits.
      out: folder.
      fast: a small version that shows that everything runs; its numbers mean little.
    """
    if fast:
        batches, seeds, rounds, image_rounds, seconds = (1, 2), (0,), min(rounds, 1), min(image_rounds, 2), 10.0
        iterations = 20
    at_least("rounds", rounds, 0)
    at_least("image_rounds", image_rounds, 0)
    non_negative("seconds", seconds)
    parts: tuple[Part, ...] = ("texts", "images") if part == "all" else (part,)
    console = Console()
    cells: list[Cell] = []
    costs: dict[Part, dict[str, float]] = {}
    exhibits: list[Exhibit] = []
    for one in parts:
        scene = text_scene(fast) if one == "texts" else image_scene(fast, images, iterations)
        costs[one] = {}
        for defence in scene.defences:
            for seed in seeds:
                bench = bench_of(scene, defence.adapter, seed)
                for batch in batches:
                    for cell, shown in attacked(scene, bench, defence, batch, seed=seed, seconds=seconds):
                        cells.append(cell)
                        exhibits += [shown] if shown is not None and is_shown(cell, seeds, batches) else []
            until = rounds if one == "texts" else image_rounds
            if until and defence.utility:
                bench = bench_of(scene, defence.adapter, seeds[0])
                costs[one][defence.title] = accuracy(scene, bench, defence, until, seeds[0])
            console.print(f"{one}: {defence.title}", highlight=False)
    tables = [table for one in parts for table in table_of(one, cells, costs[one], batches)]
    write(out, cells, costs, tables)
    conditions = {
        "Command": f"python -m experiments.reconstruction --part {part} --batches {list(batches)} "
        f"--seeds {list(seeds)} --seconds {seconds:g} --rounds {rounds} --image_rounds {image_rounds} "
        f"--iterations {iterations}",
        "Date": datetime.now(UTC).date().isoformat(),
        "Accuracy": f"after {rounds} rounds (images: {image_rounds}) of four clients with up to 32 examples each",
        "Packages": ", ".join(f"{name} {version}" for name, version in describe_environment()["versions"].items()),
    }
    answers = [(f"{table.title}", answer(table)) for table in tables]
    page = write_reconstructions(out, QUESTION, answers, tables, exhibits, conditions=conditions)
    show(tables, console)
    console.print(f"written: {page}", soft_wrap=True)


def is_shown(cell: Cell, seeds: Sequence[int], batches: Sequence[int]) -> bool:
    """Whether the page shows it: one seed and one batch size of the attacks that give whole texts or images."""
    return (cell.seed, cell.batch) == (seeds[0], batches[min(1, len(batches) - 1)]) and "bag" not in cell.attack


def answer(table: ReportTable) -> str:
    """The first line of a table in words: what is read where nothing is done."""
    row = table.rows[0].cells
    cells = zip(table.columns[1:-2], row[1:-2], strict=True)
    shown = [f"{column.title.lower()}: {cell}" for column, cell in cells if cell]
    return f"Without a defence, {'; '.join(shown)}."


def write(out: Path, cells: Sequence[Cell], costs: dict[Part, dict[str, float]], tables: Sequence[ReportTable]) -> None:
    """The record and the tables."""
    out.mkdir(parents=True, exist_ok=True)
    numbers: dict[str, Any] = {"cells": [asdict(cell) for cell in cells], "accuracy": costs}
    (out / "cells.json").write_text(json.dumps(numbers, indent=1))
    (out / "env.json").write_text(json.dumps(describe_environment(), indent=1))
    (out / "tables.md").write_text("\n".join(f"## {table.title}\n\n{table.markdown()}" for table in tables))


if __name__ == "__main__":
    command(main)
