"""Does it matter who carries the messages? The same runs in one process, on Flower's simulation and on its deployment.

Digits at 40 clients, 20 a round, on 2 hosts (and a third for the key holder). Every arm is played on every engine; the
final models must be the same bit for bit, but for CKKS without a grid, whose error is random: there they must lie
within the channel's stated error of each other.

    python -m experiments.engines
    python -m experiments.engines --out runs/engines --rounds 3
    python -m experiments.engines --fast
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import hypot
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from privfm.attacks import LabelFlip, SignFlip
from privfm.checks import require
from privfm.cli import command
from privfm.contracts import Channel
from privfm.defenses import ClientMomentum, DPPlan, FixedPoint, Mean, TrimmedMean
from privfm.defenses.channels import BFV, CKKS, PairwiseMasks, Plaintext
from privfm.engines.flower.settings import FlowerSettings
from privfm.experiment import ArmSpec, Experiment, RunConfig, run_experiment
from privfm.federation import Average, FixedSize
from privfm.learning import IID, SGD, Digits, ImageClassification, Schedule, SmallCNN
from privfm.reporting import RunFolder

QUESTION = "Does the result depend on who carries the messages?"
CLIENTS, COHORT = 40, 20
BOUND, BITS = 4.0, 20  # of a coordinate of an update: none comes near (an update's whole norm is about 2)
Where = Literal["local", "simulation", "deployment"]
APPROXIMATE = "ckks-approximate"


def main(
    *,
    where: tuple[Where, ...] | None = None,
    rounds: int = 2,
    hosts: int = 2,
    seeds: tuple[int, ...] = (0,),
    out: Path = Path("runs/engines"),
    fast: bool = False,
) -> None:
    """Plays all arms on all engines, and compares their models.

    Args:
      where: the engines, the first of which the others are compared with; all three by default.
      rounds: of every arm, but for CKKS without a grid: one, before training can make its error larger.
      hosts: that clients are dealt out to.
      seeds: roots of the seed trees.
      out: folder of the experiment.
      fast: only the plain and the masked arm, and by default no simulation.
    """
    arms = configurations(rounds)
    if fast:
        arms = {name: arms[name] for name in ("plain", "masks")}
    places: tuple[Where, ...] = ("local", "deployment") if fast else ("local", "simulation", "deployment")
    places = where or places
    specs = tuple(
        ArmSpec(f"{name}-{place}", f"{name}, {place}", name, played(config, place, hosts))
        for name, config in arms.items()
        for place in places
    )
    report = run_experiment(Experiment("engines", QUESTION, specs), out, seeds, workers=1)
    console = Console()
    rows = [row for name, config in arms.items() for row in compared(out, name, config, places, seeds)]
    (out / "engines.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    for line in table(rows):
        console.print(line, soft_wrap=True, markup=False)
    console.print(f"report: {report}", soft_wrap=True)
    different = [f"{row['arm']}, {row['engine']}" for row in rows if not row["same"]]
    require(not different, f"not the same result as in one process: {'; '.join(different)}")


def configurations(rounds: int) -> dict[str, RunConfig]:
    """What is played everywhere."""
    plain = RunConfig(
        data=Digits(),
        model=SmallCNN(),
        task=ImageClassification(),
        partition=IID(CLIENTS),
        training=SGD(0.05, Schedule(batch_size=8), momentum=0.9),
        rule=Mean(),
        channel=Plaintext(),
        optimizer=Average(),
        rounds=rounds,
        cohort=FixedSize(COHORT),
        clients_per_batch=1,
    )
    whole = replace(plain, transforms=(FixedPoint(bound=BOUND, bits=BITS),))
    private = replace(plain, cohort=None, plan=DPPlan(1.0, 1.0, COHORT / CLIENTS, 1e-5, sampling="fixed_size"))
    attacked = replace(plain, rule=TrimmedMean(4), malicious=(0, 3, 17))
    channels: dict[str, Channel] = {"masks": PairwiseMasks(COHORT), "bfv": BFV(COHORT, BITS)}
    return {
        "plain": plain,
        **{name: replace(whole, channel=channel) for name, channel in channels.items()},
        "masks-active": replace(whole, channel=PairwiseMasks(COHORT, corrupt=0.1, active=True)),
        "ckks": replace(plain, channel=CKKS(BOUND, COHORT)),
        "dp": private,
        "sign-flip": replace(attacked, attack=SignFlip(scale=4.0)),
        "label-flip": replace(attacked, attack=LabelFlip()),
        "momentum": replace(plain, transforms=(ClientMomentum(0.9),)),
        APPROXIMATE: replace(plain, channel=CKKS(BOUND, COHORT, exact_grid=False), rounds=1),
    }


def played(config: RunConfig, place: Where, hosts: int) -> RunConfig:
    """The same run, somewhere."""
    if place == "local":
        return config
    return replace(config, engine="flower", flower=FlowerSettings(mode=place, hosts=hosts))


def compared(
    out: Path, name: str, config: RunConfig, where: Sequence[Where], seeds: Sequence[int]
) -> list[dict[str, Any]]:
    """A row for every engine and seed: the model's hash, and whether it is the first engine's."""
    rows = []
    for seed in seeds:
        runs = {place: RunFolder(out / f"{name}-{place}" / f"seed-{seed}") for place in where}
        first = runs[where[0]]
        for place, run in runs.items():
            summary = run.summary()
            same = summary["model_sha256"] == first.summary()["model_sha256"]
            distance = difference(run, first)
            allowed = 0.0
            if isinstance(config.channel, CKKS) and not config.channel.exact_grid:  # twice: both have an error
                allowed = 2 * config.channel.error_bound(summary["trained_values"], COHORT) / COHORT
            rows.append(
                {
                    "arm": name,
                    "engine": place,
                    "seed": seed,
                    "sha256": summary["model_sha256"],
                    "difference_l2": distance,
                    "allowed_l2": allowed,
                    "same": same or distance <= allowed,
                    "seconds": summary["seconds_total"],
                    "rounds": summary["rounds"],
                }
            )
    return rows


def difference(run: RunFolder, other: RunFolder) -> float:
    """L2 distance between two runs' final models."""
    from safetensors.torch import load_file

    a, b = (load_file(folder.path / "model" / "model.safetensors") for folder in (run, other))
    return hypot(*(float((a[key].double() - b[key].double()).norm()) for key in a))


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """In Markdown."""
    lines = ["| arm | engine | seed | sha256 | difference | seconds a round |", "|---|---|---|---|---|---|"]
    for row in rows:
        apart = (
            "none" if row["difference_l2"] == 0 else f"{row['difference_l2']:.2g} of {row['allowed_l2']:.2g} allowed"
        )
        spent = row["seconds"] / row["rounds"]
        lines.append(
            f"| {row['arm']} | {row['engine']} | {row['seed']} | {row['sha256'][:16]} | {apart} | {spent:.2f} |"
        )
    return lines


if __name__ == "__main__":
    command(main)
