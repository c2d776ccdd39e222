"""What did privacy cost, what did an attack break, what did the defense save?

MiniLM with LoRA learns which library a sentence of documentation comes from, at about 1,000 clients with unlike data.

    python -m experiments.tradeoff
    python -m experiments.tradeoff --seeds "[0,1,2]" --out runs/tradeoff-3
    python -m experiments.tradeoff --fast

Learning rates, rounds and clip were chosen on the validation split (docs/results/tradeoff-tuning.md); the test split is
read once, at the end of each run.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from privfm.cli import command
from rich.console import Console

from privfm.attacks import ALIE, SignFlip
from privfm.contracts import Rule
from privfm.defenses import DPPlan, Krum, Mean, MultiKrum, TrimmedMean
from privfm.defenses.channels import CKKS, Plaintext
from privfm.experiment import ArmSpec, Experiment, RunConfig, run_experiment
from privfm.federation import Average, FixedSize, Poisson
from privfm.learning import (
    IID,
    SGD,
    Dirichlet,
    Docstrings,
    LoRA,
    Schedule,
    SequenceClassification,
    SequenceClassifier,
)
from privfm.reporting import experiment_table, show

QUESTION = "What did privacy cost, what did an attack break, and what did the defense save?"
MALICIOUS = 0.2
DELTA = 1e-4


def main(
    epsilons: tuple[float, ...] = (3.0, 8.0),
    rounds: int = 20,
    clients: int = 1000,
    sentences: int = 13000,
    sample_rate: float = 0.1,
    seeds: tuple[int, ...] = (0,),
    device: str = "cpu",
    out: Path = Path("runs/tradeoff"),
    workers: int = 2,
    fast: bool = False,
) -> None:
    """Plays all arms, prints the table and writes the report.

    Args:
      epsilons: of the private arms, at delta 1e-4 for whole clients.
      rounds: of every federated arm.
      clients: in the population.
      sentences: of the data set, all splits together.
      sample_rate: probability with which each client joins a round.
      seeds: roots of the seed trees.
      device: where the model runs.
      out: folder of the experiment.
      workers: processes.
      fast: a small version that shows that everything runs; its numbers mean nothing.
    """
    if fast:
        rounds, clients, sentences, sample_rate = 2, 60, 600, 0.5
    federated = RunConfig(
        data=Docstrings(limit=sentences),
        model=SequenceClassifier("minilm", adapter=LoRA(rank=4, alpha=8.0, layers=(5,)), max_length=64),
        task=SequenceClassification(),
        partition=Dirichlet(clients, alpha=0.3),
        training=SGD(0.5, Schedule(batch_size=16, epochs=2)),
        rule=Mean(),
        channel=Plaintext(),
        optimizer=Average(),
        rounds=rounds,
        cohort=Poisson(sample_rate),
        evaluate_every=5,
        device=device,
    )
    centralised = replace(
        federated,
        partition=IID(1),
        cohort=FixedSize(1),
        training=SGD(0.1, Schedule(batch_size=32, epochs=1)),
        rounds=6 if not fast else 1,
        evaluate_every=1,
    )
    f = tolerated(clients * sample_rate)
    rules: tuple[Rule, ...] = (Mean(), TrimmedMean(f), MultiKrum(f))

    arms = [
        ArmSpec("centralised", "Centralised reference", "No protection", centralised, "centralised"),
        ArmSpec("plain", "Federated, Mean", "No protection", federated),
    ]
    for epsilon in epsilons:
        plan = DPPlan.calibrated(epsilon, DELTA, rounds, sample_rate, max_grad_norm=0.5)
        private = replace(federated, plan=plan, cohort=None)
        arms.append(ArmSpec(f"dp-{epsilon:g}", f"Client-level DP, epsilon {epsilon:g}", "Privacy", private))
    encrypted = replace(federated, channel=CKKS(bound=1.0, clients=2 * round(clients * sample_rate)))
    arms.append(ArmSpec("ckks", "CKKS aggregation", "Privacy", encrypted))
    for rule in (*rules[1:], Krum(f)):
        arms.append(
            ArmSpec(f"clean-{_name(rule)}", f"{_name(rule)}, no attack", "Robust", replace(federated, rule=rule))
        )
    for attack in (SignFlip(scale=4.0), ALIE()):
        for rule in rules:
            attacked = replace(federated, rule=rule, attack=attack, malicious_share=MALICIOUS)
            title = f"{_name(rule)} under {_name(attack)}"
            arms.append(ArmSpec(f"{_name(attack)}-{_name(rule)}", title, f"{_name(attack)}", attacked))

    notes = (
        "ALIE is built to pass robust rules by staying inside the spread of honest updates; it hardly moves a mean.",
    )
    report = run_experiment(Experiment("tradeoff", QUESTION, tuple(arms), notes), out, seeds, workers)
    console = Console()
    show(experiment_table(out), console)
    console.print(f"report: {report}")


def tolerated(cohort: float) -> int:
    """F for a cohort of random size with a random number of attackers: their mean plus two and a half deviations.

    Robust rules are given a little more than the expected number, since one round with more attackers than f is enough
    to break them.
    """
    attackers = MALICIOUS * cohort
    return round(attackers + 2.5 * (attackers * (1 - MALICIOUS)) ** 0.5)


def _name(part: object) -> str:
    return type(part).__name__


if __name__ == "__main__":
    command(main)
