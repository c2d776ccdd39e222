"""How much of a claimed epsilon can be shown, and are deliberate mistakes in the mechanism found?

MiniLM with LoRA learns which library a sentence of documentation comes from, at a hundred clients, one run an arm:

    full      ghost canaries, everybody in every round, at several epsilons
    poisson   ghost canaries, each client and canary joins a round with probability 0.1
    model     a few canaries that the model does see: directions, gradients, wrong labels, odd texts, secrets
    mistakes  halved noise, a forgotten clip, weights by data size, a fixed cohort accounted as Poisson; with controls

    python -m experiments.audit
    python -m experiments.audit --part full --epsilons "[1,8]" --canaries 2000
    python -m experiments.audit --fast

Trained are LoRA of rank 8 on query and value of MiniLM's last two layers, and the head: 26,886 values. Clip, rates and
rounds are those of the other experiments and were not tuned here: accuracy is not what is asked.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal, final

import torch
from rich.console import Console
from torch import Tensor

from privfm.attacks.audit import (
    GhostCanaries,
    GradientCanaries,
    InsertedSecrets,
    MislabelledCanaries,
    OutOfDistributionTexts,
    RandomDirections,
)
from privfm.checks import one_of, require
from privfm.cli import command
from privfm.contracts import Canaries, Spans, Transform
from privfm.defenses import DPPlan, FixedPoint, Mean
from privfm.defenses.channels import PairwiseMasks, Plaintext
from privfm.defenses.privacy.clipping import ClientClip, Flat
from privfm.experiment import ArmSpec, Experiment, RunConfig, run_experiment
from privfm.federation import Average, Poisson
from privfm.federation.canaries import Audit
from privfm.learning import (
    SGD,
    Dirichlet,
    Docstrings,
    LoRA,
    Schedule,
    SequenceClassification,
    SequenceClassifier,
    SplitShares,
)
from privfm.reporting import experiment_tables, show

Part = Literal["full", "poisson", "model", "mistakes", "all"]
PARTS = ("full", "poisson", "model", "mistakes")
QUESTION = "How much of a claimed epsilon can be shown, and are deliberate mistakes in the mechanism found?"

CLIP = 0.5
"""Of a client's update, as in the trade-off experiment (docs/results/tradeoff-tuning.md)."""

DELTA = 1e-5
RATE = 0.1
"""Probability with which clients and canaries join a round, where they do not all."""

MODEL_EPSILON = 8.0
"""Claimed where canaries are in the model: the weakest claim of the others, so that the most may show."""

MISTAKEN_EPSILON = 4.0
"""Claimed where something is wrong."""

STEPS = 2
"""Local steps of a canary that trains, as many as a client makes: 24 sentences in batches of 16."""

FEW_GHOSTS = 300
"""Ghosts behind masks, where each costs some five times what it does in the clear (12 ms against 2.3 a round): enough
to show a shift of ten clips beyond doubt."""

FEW_ROUNDS = 5
"""Behind masks."""

CAP = 32
"""Examples that count, where clients are weighted by them: somewhat more than a client has."""

NOTES = (
    "One run an arm; arms of one seed share coins and draws of noise, so that they are lucky together. At least: "
    "certified, at 95 % confidence each. The estimate is none: it leans on what is said under the table. Neither is "
    "proof of a claim.",
    "Canaries are clients more, in by a coin each: audited is the mechanism over clients and canaries together, with "
    "the claimed noise, clip and sampling, and the denominator of the clients alone.",
    "Ghosts fill columns of their own, which the model never sees: they audit the mechanism alone, and cost bytes, no "
    "accuracy. Canaries in the model are few, and training and each other's traces blur theirs; without a plan nothing "
    "is claimed, and what is certified is what one run of this training gives away.",
    "Mistakes: the plan that is played is not the one that is claimed. Halved noise: half the standard deviation. "
    "Forgotten clip: clients, and canaries of ten clips, send what they have; weights by size: they are multiplied by "
    "their number of examples over 32, and 320 are declared for a canary. Both are behind masks: a server that opens "
    "rows clips them again, and neither does harm. Fixed cohort: a tenth of all, accounted as Poisson. The recorded "
    "configuration of a forgotten clip and of weights by size shows the claim, from which they differ by their code.",
    "Nothing was tuned for accuracy: it is not what is asked. Canaries in the model lower it.",
)


class ForgottenClip(DPPlan):  # type: ignore[misc]  # nobody else should, and what is shown here is what comes of it
    """Clients send what they have."""

    def clip(self, layers: Spans, bound: float | None = None) -> Transform | None:
        """A clip that nothing reaches."""
        return ClientClip(Flat(), 1e6, layers)


class WeightsBySize(DPPlan):  # type: ignore[misc]
    """Clients count by their examples, however many."""

    def weights(self, examples: Sequence[int]) -> Tensor:
        """Without the cap at 1."""
        return torch.tensor([n / (self.weight_cap or 1) for n in examples])


def lying(kind: type[DPPlan], plan: DPPlan) -> DPPlan:
    """The same plan in every number, that does something else."""
    return kind(**{item.name: getattr(plan, item.name) for item in fields(plan)})


@final
@dataclass(frozen=True)
class Size:
    """How large everything is.

    Attributes:
      epsilons: claimed for ghosts.
      ghosts: in the clear.
      few_ghosts: behind masks.
      in_model: canaries that the model sees.
      rounds: in the clear.
      few_rounds: behind masks.
      clients: beside canaries.
      repeats: copies of a text that one canary trains on.
    """

    epsilons: tuple[float, ...]
    ghosts: int
    few_ghosts: int
    in_model: int
    rounds: int
    few_rounds: int
    clients: int
    repeats: int


def main(
    *,
    part: Part = "all",
    epsilons: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0),
    canaries: int = 10_000,
    canaries_in_model: int = 128,
    rounds: int = 20,
    clients: int = 100,
    sentences: int = 4000,
    seeds: tuple[int, ...] = (0,),
    device: str = "cpu",
    out: Path = Path("runs/audit"),
    workers: int = 2,
    fast: bool = False,
) -> None:
    """Plays all arms, prints the tables and writes the report.

    Args:
      part: which arms.
      epsilons: claimed where ghosts audit a sound mechanism, at delta 1e-5.
      canaries: ghosts of an arm, but behind masks.
      canaries_in_model: of an arm whose canaries the model sees.
      rounds: of every arm, but behind masks.
      clients: beside canaries, a multiple of 10.
      sentences: of the data set, all splits together.
      seeds: roots of the seed trees.
      device: where the model runs.
      out: folder of the experiment.
      workers: processes.
      fast: a small version that shows that everything runs; its numbers mean nothing.
    """
    one_of("part", part, (*PARTS, "all"))
    require(len(epsilons) > 0, "epsilons=(): expected at least one")
    require(clients > 0 and clients % 10 == 0, f"clients={clients}: expected a multiple of 10, for cohorts of a tenth")
    size = Size(epsilons, canaries, FEW_GHOSTS, canaries_in_model, rounds, FEW_ROUNDS, clients, STEPS * 16)
    if fast:
        size, sentences = Size(epsilons[:1], 32, 20, 12, 2, 1, 10, 2), 240
    base = setting(size, sentences, device)
    builders = {"full": full, "poisson": poisson, "model": in_model, "mistakes": mistakes}
    chosen = PARTS if part == "all" else (part,)
    arms = tuple(arm for name in chosen for arm in builders[name](base, size))
    report = run_experiment(Experiment("audit", QUESTION, arms, NOTES), out, seeds, workers)
    console = Console()
    show(experiment_tables(out), console)
    console.print(f"report: {report}", soft_wrap=True)


def setting(size: Size, sentences: int, device: str) -> RunConfig:
    """What all arms share. A fifth of the sentences is held out: gradients and wrong labels are made from them."""
    return RunConfig(
        data=Docstrings(limit=sentences),
        model=SequenceClassifier("minilm", adapter=LoRA(rank=8, alpha=16.0, layers=(4, 5)), max_length=32),
        task=SequenceClassification(),
        partition=Dirichlet(size.clients, alpha=1.0),
        training=SGD(0.3, Schedule(batch_size=16)),
        rule=Mean(),
        channel=Plaintext(),
        optimizer=Average(),
        rounds=size.rounds,
        splits=SplitShares(validation=0.1, test=0.1, holdout=0.2),
        evaluate_every=size.rounds,
        checkpoint_every=5,
        clients_per_batch=256,
        device=device,
    )


@lru_cache  # finding the noise takes seconds
def everybody(epsilon: float, rounds: int) -> DPPlan:
    """The plan under which all clients take part in every round."""
    return DPPlan(1.0, CLIP, 1.0, DELTA, sampling="full").with_epsilon(epsilon, rounds)


@lru_cache
def sampled(epsilon: float, rounds: int) -> DPPlan:
    """The plan under which each joins a round by chance."""
    return DPPlan(1.0, CLIP, RATE, DELTA).with_epsilon(epsilon, rounds)


def full(base: RunConfig, size: Size) -> Iterator[ArmSpec]:
    """Ghosts, everybody in every round."""
    for epsilon in size.epsilons:
        config = replace(base, plan=everybody(epsilon, size.rounds), audit=Audit(GhostCanaries(size.ghosts)))
        yield ArmSpec(f"full-{epsilon:g}", f"Ghosts, all take part, epsilon {epsilon:g}", "All take part", config)


def poisson(base: RunConfig, size: Size) -> Iterator[ArmSpec]:
    """Ghosts, a random tenth of all in a round."""
    for epsilon in size.epsilons:
        config = replace(base, plan=sampled(epsilon, size.rounds), audit=Audit(GhostCanaries(size.ghosts)))
        title = f"Ghosts, Poisson {RATE:g}, epsilon {epsilon:g}"
        yield ArmSpec(f"poisson-{epsilon:g}", title, f"Poisson {RATE:g}", config)


def in_model(base: RunConfig, size: Size) -> Iterator[ArmSpec]:
    """Canaries that the model sees, under a plan and, where they allow it, without one."""
    m, plan = size.in_model, everybody(MODEL_EPSILON, size.rounds)
    group = "Canaries in the model"
    found: dict[str, Canaries] = {
        "random directions": RandomDirections(m),
        "gradients": GradientCanaries(m),
        "wrong labels": MislabelledCanaries(m, each=min(STEPS, size.repeats)),
        "odd texts": OutOfDistributionTexts(m, repeats=size.repeats),
        "secrets": InsertedSecrets(m, repeats=size.repeats),
    }
    for title, canaries in found.items():
        name, audited = title.replace(" ", "-"), replace(base, audit=Audit(canaries, delta=DELTA))
        shown = title.capitalize()
        planned = replace(audited, plan=plan)
        yield ArmSpec(f"{name}-{MODEL_EPSILON:g}", f"{shown}, epsilon {MODEL_EPSILON:g}", group, planned)
        if canaries.trained:
            yield ArmSpec(f"{name}-no-plan", f"{shown}, no plan", group, replace(audited, cohort=Poisson(1.0)))


def mistakes(base: RunConfig, size: Size) -> Iterator[ArmSpec]:
    """What is played is not what is claimed; with the controls that the masks are not what is found."""
    epsilon, group = MISTAKEN_EPSILON, "Deliberate mistakes"
    ghosts, few = GhostCanaries(size.ghosts), GhostCanaries(size.few_ghosts)
    whole, part = everybody(epsilon, size.rounds), sampled(epsilon, size.rounds)
    for name, claimed in (("all take part", whole), (f"Poisson {RATE:g}", part)):
        played = replace(claimed, noise_multiplier=claimed.noise_multiplier / 2)
        config = replace(base, plan=played, audit=Audit(ghosts, claimed=claimed))
        yield ArmSpec(f"halved-{claimed.sampling}", f"Halved noise, {name}", group, config)
    fixed = replace(base, plan=replace(part, sampling="fixed_size"), audit=Audit(few, claimed=part))
    yield ArmSpec("fixed-as-poisson", "Fixed cohort as Poisson", group, fixed)
    masked = replace(
        base,
        channel=PairwiseMasks(clients=size.clients + size.few_ghosts, corrupt=0.0),
        transforms=(FixedPoint(RANGE, BITS),),
        rounds=size.few_rounds,
        evaluate_every=size.few_rounds,
    )
    plain = everybody(epsilon, size.few_rounds)
    weighted = replace(plain, weight_cap=CAP)
    yield from _behind_masks(
        masked,
        few,
        (
            ("control-masks", "Control: masks, nothing forgotten", "Controls", plain, None),
            ("control-weights", "Control: masks, capped weights", "Controls", weighted, None),
            ("forgotten-clip", "Forgotten clip", group, lying(ForgottenClip, plain), plain),
            ("weights-by-size", "Weights by size", group, lying(WeightsBySize, weighted), weighted),
        ),
    )


RANGE, BITS = 8.0, 20
"""Fixed point: ten clips of 0.5 fit, and a step is a hundred-thousandth of a clip."""


def _behind_masks(
    base: RunConfig, canaries: Canaries, arms: Iterable[tuple[str, str, str, DPPlan, DPPlan | None]]
) -> Iterator[ArmSpec]:
    """Arms of `(name, title, group, played, claimed)`; None: what is played is claimed."""
    for name, title, group, played, claimed in arms:
        yield ArmSpec(name, title, group, replace(base, plan=played, audit=Audit(canaries, claimed=claimed)))


if __name__ == "__main__":
    command(main)
