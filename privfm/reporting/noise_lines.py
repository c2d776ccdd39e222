"""Arms that differ by their noise alone, as one line each: what a guarantee costs one method under one unit."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, isinf
from typing import Any, final

from privfm.reporting.formats import MISSING, small_number, utility_text
from privfm.reporting.summary import ArmResult, Experiment
from privfm.reporting.table import Column, ReportTable, TableRow

UNITS = {"client": "whole clients", "example": "examples of a client"}
NO_NOISE = "no noise"


@final
@dataclass(frozen=True)
class NoiseLine:
    """One method under one unit, at several epsilons.

    Attributes:
      title: for readers.
      unit: what is protected, `client` or `example`.
      arms: by rising epsilon; the last one may be without noise.
    """

    title: str
    unit: str
    arms: tuple[ArmResult, ...]

    @property
    def without_noise(self) -> ArmResult | None:
        """The same training, clipped but not noised."""
        return next((arm for arm in self.arms if isinf(epsilon_of(arm))), None)

    def at(self, epsilon: str) -> ArmResult | None:
        """The arm whose epsilon is written so."""
        return next((arm for arm in self.arms if epsilon_name(arm) == epsilon), None)


def epsilon_of(arm: ArmResult) -> float:
    """Epsilon of an arm under a plan; infinite without noise."""
    return inf if arm.epsilon is None else float(arm.epsilon["epsilon"])


def epsilon_name(arm: ArmResult) -> str:
    """Epsilon in two digits, so that 0.999 and 1 stand in one column; `no noise` where it is infinite."""
    value = epsilon_of(arm)
    return NO_NOISE if isinf(value) else small_number(float(f"{value:.2g}"))


def noise_lines(experiment: Experiment) -> tuple[NoiseLine, ...]:
    """The lines of an experiment, in the order of its arms; an arm without a partner is none."""
    found: dict[str, list[ArmResult]] = {}
    for arm in experiment.finished:
        if not arm.attacked and arm.utility is not None and _plan(arm):
            found.setdefault(_but_for_noise(arm), []).append(arm)
    return tuple(
        NoiseLine(
            re.sub(r"[,;]? *epsilon .*$", "", arms[0].title) or arms[0].title,
            str(_plan(arms[0])["unit"]),
            tuple(sorted(arms, key=epsilon_of)),
        )
        for arms in found.values()
        if len(arms) > 1 and any(arm.epsilon for arm in arms)
    )


def by_unit(lines: Sequence[NoiseLine]) -> dict[str, list[NoiseLine]]:
    """The lines of each unit."""
    return {unit: [line for line in lines if line.unit == unit] for unit in dict.fromkeys(line.unit for line in lines)}


def epsilon_names(lines: Sequence[NoiseLine]) -> list[str]:
    """Every epsilon of these lines as it is written, rising."""
    arms = sorted((arm for line in lines for arm in line.arms), key=epsilon_of)
    return list(dict.fromkeys(epsilon_name(arm) for arm in arms))


def table_by_epsilon(experiment: Experiment) -> ReportTable | None:
    """Utility of every line (row) at every epsilon (column); None where there are not several lines."""
    lines = noise_lines(experiment)
    if len(lines) < 2:
        return None
    names = epsilon_names(lines)
    columns = (Column("epsilon", "epsilon", "title"), *(Column(name, name, "utility") for name in names))
    rows = tuple(
        TableRow(UNITS.get(line.unit, line.unit), (f"{line.title}, {UNITS[line.unit]}", *_cells(line, names)))
        for line in lines
    )
    several = len(experiment.index.seeds) > 1
    notes = ("Means over seeds, then the least and the greatest.",) if several else ()
    return ReportTable(columns, rows, notes, (), "Utility by epsilon")


def _cells(line: NoiseLine, names: Sequence[str]) -> list[str]:
    return [MISSING if (arm := line.at(name)) is None else _cell(arm) for name in names]


def _cell(arm: ArmResult) -> str:
    unit, points = str(arm.facts.get("utility_unit", "")), sorted(arm.utilities.values())
    text = utility_text(arm.utility, unit)
    if len(points) < 2:
        return text
    ends = [utility_text(point, unit).removesuffix(" %") for point in (points[0], points[-1])]
    return f"{text} ({ends[0]} to {ends[1]})"


def _plan(arm: ArmResult) -> Mapping[str, Any]:
    plan = next(iter(arm.configs.values()), {}).get("plan")
    return plan if isinstance(plan, Mapping) else {}


def _but_for_noise(arm: ArmResult) -> str:
    """An arm's configuration without its seed and its noise."""
    config = {name: value for name, value in next(iter(arm.configs.values())).items() if name != "seed"}
    plan = {name: value for name, value in _plan(arm).items() if name != "noise_multiplier"}
    local = plan.get("local")
    if isinstance(local, Mapping):
        plan["local"] = {name: value for name, value in local.items() if name != "noise_by_examples"}
    return json.dumps({**config, "plan": plan}, sort_keys=True)
