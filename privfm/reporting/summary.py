"""An experiment read back from its folder, and the numbers that follow from comparing its arms.

The folder holds `experiment.json` (the index) and one run folder an arm and seed, `arm/seed-N/`. Arms meet the same
clients under the same seed, so every comparison is paired by seed; only finished runs count.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isfinite, sqrt
from pathlib import Path
from statistics import NormalDist, fmean
from typing import Any, final

from privfm.checks import BrokenCheckpoint, at_least, fraction, require
from privfm.files import read_json, write_json
from privfm.reporting.run_folder import RunFolder, Scalar

INDEX = "experiment.json"


@final
@dataclass(frozen=True)
class IndexedArm:
    """One arm as the index lists it: `name` (its folder), `title` (for readers) and `group` (what it is shown with)."""

    name: str
    title: str
    group: str = ""

    def __post_init__(self) -> None:
        is_folder_name = bool(self.name) and "/" not in self.name and not self.name.startswith(".")
        require(is_folder_name, f"arm name {self.name!r}: expected a plain folder name")


@final
@dataclass(frozen=True)
class ExperimentIndex:
    """What an experiment is about.

    Attributes:
      name: short name.
      question: what it asks, one sentence.
      command: the command line that makes it.
      created: date and time, as a text.
      arms: in the order in which they are shown.
      seeds: every arm runs under each of them.
      notes: what a reader should know.
    """

    name: str
    question: str
    command: str
    created: str
    arms: tuple[IndexedArm, ...]
    seeds: tuple[int, ...]
    notes: tuple[str, ...] = ()

    @classmethod
    def read(cls, folder: Path) -> ExperimentIndex:
        """Reads `experiment.json`.

        Raises:
          InvalidArgument: `folder` is not an experiment's.
          BrokenCheckpoint: the index is damaged.
        """
        path = folder / INDEX
        require(path.exists(), f"{folder} is not an experiment: it holds no {INDEX}; give the folder of an experiment")
        value = read_json(path)
        try:
            arms = tuple(IndexedArm(arm["name"], arm["title"], arm.get("group") or "") for arm in value["arms"])
            name, question, command, created = (str(value[key]) for key in ("name", "question", "command", "created"))
            seeds, notes = tuple(map(int, value["seeds"])), tuple(map(str, value.get("notes", ())))
            return cls(name, question, command, created, arms, seeds, notes)
        except (KeyError, TypeError) as error:
            raise BrokenCheckpoint(f"{path} is not an experiment's index: {error!r}") from error

    def write(self, folder: Path) -> None:
        """Writes `experiment.json`, in one step."""
        write_json(folder / INDEX, asdict(self))

    def run_path(self, folder: Path, arm: str, seed: int) -> Path:
        """The folder of one run."""
        return folder / arm / f"seed-{seed}"


@final
@dataclass(frozen=True)
class ArmResult:
    """The finished runs of one arm.

    Attributes:
      arm: as indexed.
      summaries: seed -> `summary.json`.
      rows: seed -> rows of `rounds.jsonl`.
      environments: seed -> `env.json`.
      configs: seed -> `config.json`.
    """

    arm: IndexedArm
    summaries: Mapping[int, Mapping[str, Any]]
    rows: Mapping[int, Sequence[Mapping[str, Scalar]]]
    environments: Mapping[int, Mapping[str, Any]]
    configs: Mapping[int, Mapping[str, Any]]

    @property
    def title(self) -> str:
        """Its title for readers."""
        return self.arm.title

    @property
    def facts(self) -> Mapping[str, Any]:
        """The summary of the first finished seed: for what does not depend on the seed. Empty when none is finished."""
        return next(iter(self.summaries.values()), {})

    @property
    def utilities(self) -> dict[int, float]:
        """Utility by seed; a seed whose utility is no finite number is left out."""
        return self.values("utility")

    @property
    def utility(self) -> float | None:
        """Mean utility over seeds."""
        return self.mean("utility")

    @property
    def centralised(self) -> bool:
        """Whether the arm trains on all data in one place."""
        return self.facts.get("kind") == "centralised"

    @property
    def attacked(self) -> bool:
        """Whether an attacker takes part."""
        return self.facts.get("attack") is not None

    @property
    def epsilon(self) -> Mapping[str, Any] | None:
        """The record of the privacy guarantee, of the seed with the largest epsilon.

        None without a guarantee; an epsilon that is not finite guarantees nothing, in any seed.
        """
        return next(iter(self.epsilons), None)

    @property
    def epsilons(self) -> Sequence[Mapping[str, Any]]:
        """All records of that seed, the headline first: one an observer."""
        found = [summary.get("epsilons") or [summary.get("epsilon") or {}] for summary in self.summaries.values()]
        if any(finite(records[0].get("epsilon")) is None for records in found):
            return []
        return max(found, key=lambda records: float(records[0]["epsilon"]), default=[])

    def values(self, name: str) -> dict[int, float]:
        """A number of the summary by seed, where it is one."""
        found = {seed: finite(summary.get(name)) for seed, summary in self.summaries.items()}
        return {seed: value for seed, value in found.items() if value is not None}

    def mean(self, name: str) -> float | None:
        """Mean of a number of the summary over seeds; None when no seed has it."""
        values = self.values(name).values()
        return fmean(values) if values else None

    @property
    def setting(self) -> str:
        """What an attacked arm must share with the clean arm it is compared to: all of its configuration but these."""
        config = next(iter(self.configs.values()), {})
        shared = {
            name: value
            for name, value in config.items()
            if name not in ("seed", "attack", "malicious_share", "malicious", "schedule", "engine", "flower")
        }
        return json.dumps(shared, sort_keys=True)


@final
@dataclass(frozen=True)
class Experiment:
    """An experiment's index and the results of its arms, in the index's order."""

    index: ExperimentIndex
    arms: tuple[ArmResult, ...]

    @classmethod
    def read(cls, folder: Path) -> Experiment:
        """Reads what is finished; arms and seeds that are not yet are simply without summaries.

        Raises:
          InvalidArgument: `folder` is not an experiment's.
          BrokenCheckpoint: the index or a finished run is damaged.
        """
        index = ExperimentIndex.read(folder)
        return cls(index, tuple(_read_arm(folder, index, arm) for arm in index.arms))

    @property
    def finished(self) -> tuple[ArmResult, ...]:
        """Arms with at least one finished seed."""
        return tuple(arm for arm in self.arms if arm.summaries)

    @property
    def unfinished_runs(self) -> int:
        """Runs of the index that are not finished."""
        return len(self.arms) * len(self.index.seeds) - sum(len(arm.summaries) for arm in self.arms)

    @property
    def centralised(self) -> ArmResult | None:
        """The reference that trains on all data in one place."""
        return next((arm for arm in self.finished if arm.centralised and not arm.attacked and not arm.epsilon), None)

    @property
    def plain(self) -> ArmResult | None:
        """The reference for every protection: federated, averaged, without noise and attack; the first such arm."""
        return next((arm for arm in self.clean_rules if arm.facts.get("rule_name") == "Mean"), None)

    @property
    def clean_rules(self) -> tuple[ArmResult, ...]:
        """Federated arms without attack and without a privacy guarantee."""
        return tuple(arm for arm in self.finished if not (arm.centralised or arm.attacked or arm.epsilon))

    @property
    def private(self) -> tuple[ArmResult, ...]:
        """Arms with a privacy guarantee and no attack, by falling epsilon."""
        arms = [arm for arm in self.finished if arm.epsilon and not arm.attacked]
        return tuple(sorted(arms, key=lambda arm: -float((arm.epsilon or {})["epsilon"])))

    @property
    def attacked(self) -> tuple[ArmResult, ...]:
        """Arms in which an attacker takes part."""
        return tuple(arm for arm in self.finished if arm.attacked)

    def clean_partner(self, arm: ArmResult) -> ArmResult | None:
        """The arm whose configuration differs from an attacked arm's by the attack alone."""
        partners = (other for other in self.finished if not other.attacked and other.setting == arm.setting)
        return next(partners, None) if arm.attacked else None

    def attack_title(self, arm: ArmResult) -> str:
        """The attack's name, with its parameters where the experiment has the same attack under several."""
        name = str(arm.facts["attack_name"])
        variants = {other.facts["attack"] for other in self.attacked if other.facts["attack_name"] == name}
        return name if len(variants) == 1 else str(arm.facts["attack"])

    def relative_utility(self, arm: ArmResult) -> float | None:
        """(m - trivial) / (centralised - trivial), each a mean over the seeds that both arms finished.

        None without a centralised arm, or where it is no better than the trivial model.
        """
        reference = self.centralised
        if reference is None:
            return None
        trivial = reference.values("trivial_utility")
        seeds = [seed for seed in arm.utilities if seed in reference.utilities and seed in trivial]
        if not seeds:
            return None
        sign = 1 if reference.facts.get("higher_is_better", True) else -1
        gained = fmean(sign * (arm.utilities[seed] - trivial[seed]) for seed in seeds)
        possible = fmean(sign * (reference.utilities[seed] - trivial[seed]) for seed in seeds)
        return gained / possible if possible > 0 else None


def paired_difference(arm: ArmResult | None, reference: ArmResult | None) -> float | None:
    """Mean over common seeds of an arm's utility minus the reference's, in the metric's unit; None without a pair."""
    if arm is None or reference is None:
        return None
    seeds = [seed for seed in arm.utilities if seed in reference.utilities]
    return fmean(arm.utilities[seed] - reference.utilities[seed] for seed in seeds) if seeds else None


def wilson(share: float, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share that was measured on n independent examples.

    It covers the choice of the test examples alone, not the spread between training runs.

    Source: Wilson, "Probable inference, the law of succession, and statistical inference", JASA 1927.
    """
    fraction("share", share, zero=True)
    at_least("n", n, 1)
    fraction("level", level, one=False)
    z = NormalDist().inv_cdf((1 + level) / 2)
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # At a share of 0 or 1 the end is exactly that share; rounding would put it a hair beside.
    return (0.0 if share == 0 else centre - half), (1.0 if share == 1 else centre + half)


def finite(value: object) -> float | None:
    """The value as a float where it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if isfinite(value) else None


def _read_arm(folder: Path, index: ExperimentIndex, arm: IndexedArm) -> ArmResult:
    runs = {seed: RunFolder(index.run_path(folder, arm.name, seed)) for seed in index.seeds}
    done = {seed: run for seed, run in runs.items() if run.finished}
    return ArmResult(
        arm,
        {seed: run.summary() for seed, run in done.items()},
        {seed: run.rows() for seed, run in done.items()},
        {seed: run.environment() for seed, run in done.items()},
        {seed: run.config() for seed, run in done.items()},
    )
