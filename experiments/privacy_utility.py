"""What does a guarantee cost, for examples and for whole clients, and which low-rank method pays least?

MiniLM learns which library a sentence of documentation comes from, under four methods, two units and six epsilons:

    example    cross-silo: ten clients with some six hundred sentences each; every local step is private
    client     cross-device: a thousand clients with some six sentences each; the server noises the sum of their updates

    python -m experiments.privacy_utility
    python -m experiments.privacy_utility --unit example --epsilons "[1,8]" --methods '["LoRA","Head only"]'
    python -m experiments.privacy_utility --data reviews.csv --text review --label stars
    python -m experiments.privacy_utility --fast

Learning rates and clips were chosen on the validation split at one epsilon (docs/results/privacy_utility.md); the test
split is read once, at the end of each run. No epsilon here covers that choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf, isinf
from pathlib import Path
from typing import Literal, final

from rich.console import Console

from privfm.checks import one_of, require
from privfm.cli import command
from privfm.contracts import DataSource
from privfm.defenses import DPPlan, LocalSampling, Mean
from privfm.defenses.channels import Plaintext
from privfm.experiment import ArmSpec, Experiment, RunConfig, deal, run_experiment
from privfm.federation import Adam, Arm, Average, Problem, problems
from privfm.learning import (
    SGD,
    Dirichlet,
    Docstrings,
    LoRA,
    Schedule,
    SequenceClassification,
    SequenceClassifier,
    TextData,
)
from privfm.randomness import Seeds
from privfm.reporting import experiment_tables, show

Unit = Literal["all", "example", "client"]
QUESTION = "What does a guarantee cost, for examples and for whole clients, and which low-rank method pays least?"
DELTA = {"example": 1e-5, "client": 1e-4}
"""Below one over the units there are: some 6,300 examples, 1,000 clients."""

CLIENTS = {"example": 10, "client": 1000}
RATE = 0.1
"""Probability with which each of many clients joins a round."""

LOCAL = LocalSampling(batch_size=64, local_steps=4)
"""Steps of a client that protects its examples: a tenth of them at a time, some forty in ten rounds."""

FEW = 5
"""Clients among which nobody can be hidden: what the note on refusals shows."""

LAYERS = (5,)
"""MiniLM's last block: what lies below is computed once for each sentence."""


@final
@dataclass(frozen=True)
class Method:
    """What is trained, and how fast under each unit.

    Attributes:
      title: for readers.
      adapter: beside the head; None trains the head alone.
      alternate: train B in even rounds and A in odd ones.
      example: local learning rate and clip of an example's gradient.
      client: learning rate of the server's Adam and clip of a client's update.
    """

    title: str
    adapter: LoRA | None
    alternate: bool
    example: tuple[float, float]
    client: tuple[float, float]


BOTH = LoRA(rank=8, alpha=16.0, layers=LAYERS)
METHODS = (
    Method("LoRA", BOTH, False, (2.0, 1.0), (0.02, 0.5)),
    Method("FFA", replace(BOTH, freeze_a=True), False, (2.0, 1.0), (0.02, 0.5)),
    Method("RoLoRA", BOTH, True, (2.0, 1.0), (0.02, 0.5)),
    Method("Head only", None, False, (4.0, 1.0), (0.04, 0.5)),
)
"""Rates and clips: docs/results/privacy_utility.md."""

TITLES = tuple(method.title for method in METHODS)

NOTES = (
    "Epsilon infinity is the same training, clipped as before, without the noise.",
    "Examples: the number is the largest over all clients, against a server that sees every update and who took part. "
    "Clients: against somebody who sees every released model, not who took part. The two are not comparable.",
    "LoRA trains both factors; FFA freezes A; RoLoRA trains B in even rounds and A in odd ones; all with the head, on "
    "the last block alone, at rank 8.",
    "Learning rates and clips were chosen on the validation split at epsilon 2 and serve every epsilon "
    "(docs/results/privacy_utility.md).",
)


def main(
    *,
    unit: Unit = "all",
    epsilons: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0, 8.0, inf),
    methods: tuple[str, ...] = TITLES,
    data: Path | None = None,
    text: str = "text",
    label: str = "label",
    sentences: int = 9000,
    seeds: tuple[int, ...] = (0, 1, 2),
    device: str = "cpu",
    out: Path = Path("runs/privacy_utility"),
    workers: int = 2,
    fast: bool = False,
) -> None:
    """Plays all arms, prints the tables and writes the report.

    Args:
      unit: what is protected: examples, clients, or both in turn.
      epsilons: to be reached at the end; `inf` for no noise.
      methods: titles of those that are played.
      data: a file of texts with labels, as `TextData` reads it; by default the docstrings of this installation.
      text: its column.
      label: its column.
      sentences: of the docstrings, all splits together.
      seeds: roots of the seed trees.
      device: where the model runs.
      out: folder of the experiment.
      workers: processes.
      fast: a small version that shows that everything runs; its numbers mean nothing.
    """
    one_of("unit", unit, ("all", "example", "client"))
    for name in methods:
        one_of("methods", name, TITLES)
    require(len(epsilons) > 0, "epsilons=(): expected at least one")
    source: DataSource = Docstrings(limit=240 if fast else sentences)
    if data is not None:
        source = TextData(str(data), text, label)
    chosen = [method for method in METHODS if method.title in methods]
    units = ("example", "client") if unit == "all" else (unit,)
    arms: list[ArmSpec] = []
    for kind in units:
        base = setting(kind, source, device, fast)
        local = LocalSampling(batch_size=16, local_steps=2) if fast else LOCAL
        plans = [(epsilon, plan(kind, base, epsilon, seeds, local)) for epsilon in epsilons]
        arms += [arm(kind, base, method, *each) for method in chosen for each in plans]
    refused = refusal(arms[0].config)
    note = f"A plan for whole clients among {FEW} is refused: {refused.what} (instead: {refused.instead})."
    experiment = Experiment("privacy_utility", QUESTION, tuple(arms), (*NOTES, note))
    report = run_experiment(experiment, out, seeds, workers)
    console = Console()
    show(experiment_tables(out), console)
    console.print(f"report: {report}", soft_wrap=True)


def setting(unit: str, data: DataSource, device: str = "cpu", fast: bool = False) -> RunConfig:
    """What all arms of a unit share."""
    clients = {"example": 3, "client": 40}[unit] if fast else CLIENTS[unit]
    rounds = {"example": 10, "client": 20}[unit]
    return RunConfig(
        data=data,
        model=SequenceClassifier("minilm", adapter=BOTH, max_length=32),
        task=SequenceClassification(),
        partition=Dirichlet(clients, alpha=1.0 if unit == "example" else 0.3),
        training=SGD(0.3, Schedule(batch_size=16)),
        rule=Mean(),
        channel=Plaintext(),
        optimizer=Average(),
        rounds=2 if fast else rounds,
        evaluate_every=1 if fast else rounds // 2,
        checkpoint_every=5,
        training_engine="batched",
        device=device,
    )


def plan(
    unit: str, base: RunConfig, epsilon: float, seeds: Sequence[int] = (0,), local: LocalSampling = LOCAL
) -> DPPlan:
    """The plan that reaches `epsilon` after all rounds; under examples for the smallest client of every seed."""
    if unit == "client":
        bare = DPPlan(0.0, 1.0, RATE, DELTA[unit])
        return bare if isinf(epsilon) else bare.with_epsilon(epsilon, base.rounds)
    bare = DPPlan(0.0, 1.0, 1.0, DELTA[unit], unit="example", place="local", sampling="full", local=local)
    sizes = sorted({len(rows) for seed in seeds for rows in deal(base, seed).clients})
    return bare if isinf(epsilon) else bare.with_epsilon(epsilon, base.rounds, sizes)


def arm(unit: str, base: RunConfig, method: Method, epsilon: float, plan: DPPlan) -> ArmSpec:
    """One method under one unit and epsilon."""
    rate, clip = method.example if unit == "example" else method.client
    config = replace(
        base,
        model=SequenceClassifier("minilm", adapter=method.adapter, max_length=32),
        alternate=method.alternate,
        plan=replace(plan, max_grad_norm=clip),
    )
    config = replace(config, training=SGD(rate)) if unit == "example" else replace(config, optimizer=Adam(rate))
    shown = "infinity" if isinf(epsilon) else f"{epsilon:g}"
    folder = f"{unit}-{method.title.replace(' ', '-').lower()}-{shown}"
    title = f"{method.title}, epsilon {shown}"
    return ArmSpec(folder, title, f"{'Examples' if unit == 'example' else 'Whole clients'}: {method.title}", config)


def refusal(config: RunConfig) -> Problem:
    """What `compatibility.problems` says of a plan for whole clients among five."""
    whole = DPPlan(0.0, 1.0, 1.0, 0.01, sampling="full").with_epsilon(8.0, config.rounds)
    (found,) = problems(Arm(plan=whole), trained_values(config), FEW)
    return found


def trained_values(config: RunConfig) -> int:
    """How many values a model trains."""
    built = config.model.build(deal(config, 0).table.label_names, Seeds(0).generator("initialisation"))
    return sum(value.numel() for value in built.module.parameters() if value.requires_grad)


if __name__ == "__main__":
    command(main)
