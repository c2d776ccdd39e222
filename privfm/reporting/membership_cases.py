"""Attacks on membership by run, rounds seen and adversary: tables of them, and files for further use."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, final

import numpy as np

from privfm.attacks.membership.blind import Blind
from privfm.attacks.membership.curves import CONFIDENCE, Interval, Judgement, judge
from privfm.contracts.membership import Scored
from privfm.reporting.formats import MISSING
from privfm.reporting.membership_figures import judgement_table, percent
from privfm.reporting.table import Column, ReportTable, TableRow

_LEFT_OUT = ("advantage", "models")
"""Fields of `judgement_table` that stand in the files alone: a page has no room for them beside what was used."""

_NOTE = f"In brackets: {percent(CONFIDENCE)} interval by bootstrap over examples, for the attacked models."


@final
@dataclass(frozen=True, eq=False)
class Case:
    """One attack on one run after some rounds.

    Attributes:
      run, rounds, adversary, attack: what was attacked, when, by whom and how.
      used: what the attacker must have.
      scored: scores and truth; None: it cannot run.
      refused: why it cannot.
      judgement: what the scores are worth; None: not yet judged, or it cannot run.
    """

    run: str
    rounds: int
    adversary: str
    attack: str
    used: tuple[str, ...]
    scored: Scored | None
    refused: str = ""
    judgement: Judgement | None = None

    @property
    def key(self) -> tuple[str, int, str, str]:
        """What seeds have in common."""
        return self.run, self.rounds, self.adversary, self.attack

    @property
    def title(self) -> str:
        """Adversary and attack."""
        return f"{self.adversary}: {self.attack}"


def judged(cases: Sequence[Case], generator: np.random.Generator, resamples: int = 1000) -> list[Case]:
    """Each case once: scores of all seeds under one threshold; an example that two seeds have drawn counts as two.

    Args:
      cases: those of one key differ in their seed.
      generator: of the resamples.
      resamples: behind each interval.
    """
    by_key: dict[tuple[str, int, str, str], list[Case]] = {}
    for case in cases:
        by_key.setdefault(case.key, []).append(case)
    found = []
    for same in by_key.values():
        parts = [case.scored for case in same if case.scored is not None]
        if not parts:
            found.append(same[0])
            continue
        together = Scored(
            np.concatenate([one.scores for one in parts], axis=-1),
            np.concatenate([one.members for one in parts], axis=-1),
        )
        judgement = judge(together, generator, resamples)
        found.append(replace(same[0], scored=together, refused="", judgement=judgement))
    return found


def case_table(cases: Sequence[Case], title: str, *, notes: bool = True) -> ReportTable:
    """The table of judgements with what each attacker must have; of what cannot run, why.

    Args:
      cases: of one run, with different titles.
      title: of the table.
      notes: whether it is explained below.
    """
    table = judgement_table({case.title: case.judgement for case in cases if case.judgement is not None})
    kept = [place for place, column in enumerate(table.columns) if column.field not in _LEFT_OUT]
    numbers = {row.cells[0]: [row.cells[place] for place in kept] for row in table.rows}
    rows = []
    for case in cases:
        cells = numbers.get(case.title, [case.title, "cannot run", *["" for _ in kept[2:]]])
        knows = f"cannot run: {case.refused}" if case.refused else ", ".join(case.used)
        rows.append(TableRow(case.adversary, (*cells, knows)))
    columns = (*(table.columns[place] for place in kept), Column("Used", "used", "used"))
    return ReportTable(columns, tuple(rows), (_NOTE,) if notes else (), (), title)


def area_table(cases: Sequence[Case], title: str = "AUC by rounds seen") -> ReportTable:
    """AUC by attack (a line), run and rounds seen (columns), without intervals."""
    places = [
        (run, now)
        for run in dict.fromkeys(case.run for case in cases)
        for now in sorted({case.rounds for case in cases})
    ]
    columns = [Column("Attack", "attack", "attack")]
    columns += [Column(f"{run.capitalize()}: {now}", f"{run}: {now}", "auc") for run, now in places]
    by_key = {case.key: case.judgement for case in cases}
    rows = []
    for adversary, attack in dict.fromkeys((case.adversary, case.attack) for case in cases):
        areas = [by_key.get((*place, adversary, attack)) for place in places]
        cells = [MISSING if one is None else f"{one.auc.value:.3f}" for one in areas]
        rows.append(TableRow(adversary, (f"{adversary}: {attack}", *cells)))
    note = "Area under the ROC curve by run and rounds seen; 0.5 is guessing."
    return ReportTable(tuple(columns), tuple(rows), (note,), (), title)


def write_judgements(folder: Path, cases: Sequence[Case], blinds: Sequence[Blind]) -> None:
    """Writes `judgements.jsonl` (its first line is the verdict on the split) and `judgements.csv`.

    Args:
      folder: made where it is missing.
      cases: judged.
      blinds: of each seed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    fair = all(blind.fair for blind in blinds)
    head = {"adversary": "blind", "fair": fair, "seeds": [asdict(blind) for blind in blinds]}
    lines = [head, *(_line(case, fair) for case in cases)]
    (folder / "judgements.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    rows = [_row(case, fair) for case in cases]
    with (folder / "judgements.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)


def _facts(case: Case, fair: bool) -> dict[str, Any]:
    facts = {"run": case.run, "rounds": case.rounds, "adversary": case.adversary, "attack": case.attack}
    return facts | {"refused": case.refused, "split_fair": fair}


def _line(case: Case, fair: bool) -> dict[str, Any]:
    judgement = None if case.judgement is None else asdict(case.judgement)
    return _facts(case, fair) | {"used": list(case.used), "judgement": judgement}


def _row(case: Case, fair: bool) -> dict[str, Any]:
    """One line of the CSV; empty where there is no number."""
    row, judgement = _facts(case, fair) | {"used": "; ".join(case.used)}, case.judgement
    if judgement is None:
        return row
    row |= _interval("auc", judgement.auc) | _interval("advantage", judgement.advantage)
    for rate in judgement.rates:
        name = f"tpr_at_{100 * rate.fpr:g}_percent"
        row |= {f"{name}_missing": rate.missing} if rate.tpr is None else _interval(name, rate.tpr)
    return row | {"members": judgement.members, "others": judgement.others}


def _interval(name: str, interval: Interval) -> dict[str, float]:
    return {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}
