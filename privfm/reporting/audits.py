"""What audits say of runs: claimed epsilon beside what is certified and estimated, and the mechanism's checks."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from math import inf
from typing import Any

from privfm.reporting.formats import MISSING, small_number
from privfm.reporting.summary import ArmResult, Experiment
from privfm.reporting.table import Column, ReportTable, TableRow

SMALLEST_P = 1e-12
"""p-values below are printed as this: tails of float64 mean nothing further out."""


def audits(experiment: Experiment) -> Iterator[tuple[ArmResult, int, Mapping[str, Any]]]:
    """Each audited run: its arm, its seed, and what the audit said."""
    for arm in experiment.finished:
        for seed, summary in sorted(arm.summaries.items()):
            if summary.get("audited"):
                yield arm, seed, summary["audited"]


def audit_answer(experiment: Experiment) -> str:
    """Whose claim is contradicted, and how much of the others' is certified, in sentences; empty without audits."""
    found = list(audits(experiment))
    if not found:
        return ""
    wrong = [(arm.title, str(audit["alarm"])) for arm, _, audit in found if audit["alarm"]]
    rest = [(float(audit["ratio"]), arm.title) for arm, _, audit in found if not audit["alarm"] and audit["ratio"]]
    runs = f"{len(found)} audited run{'' if len(found) == 1 else 's'}"
    text = f"Nothing contradicts what is claimed of {runs}."
    if wrong:
        cases = dict.fromkeys(f"{title} ({alarm})" for title, alarm in wrong)
        text = f"The claim is contradicted in {len(wrong)} of {runs}: {'; '.join(cases)}."
    if rest:
        share, title = max(rest)
        where = "Elsewhere up" if wrong else "Up"
        text += f" {where} to {share:.2f} of a claim is certified ({title}), each run at its own confidence."
    return text


def all_audited(experiment: Experiment) -> bool:
    """Whether every finished arm is audited: then audits are what the experiment is about."""
    return {arm.arm.name for arm, _, _ in audits(experiment)} == {arm.arm.name for arm in experiment.finished}


def contradicted(experiment: Experiment) -> tuple[str, ...]:
    """Titles of private arms of whose runs an audit contradicts the claim."""
    return tuple(dict.fromkeys(arm.title for arm, _, audit in audits(experiment) if audit["alarm"] and arm.epsilon))


def audit_table(experiment: Experiment) -> ReportTable | None:
    """One row an audited run; None where there is none."""
    found = list(audits(experiment))
    if not found:
        return None
    several = len(experiment.index.seeds) > 1
    columns = (
        Column("arm", "arm", "title"),
        Column("epsilon claimed (delta)", "claimed", "audited.claimed"),
        Column("at least", "at least", "audited.bound.epsilon"),
        Column("of the claim", "ratio", "audited.ratio"),
        Column("contradicted by", "alarm", "audited.alarm"),
        Column("estimate (95 %), no bound", "estimate", "audited.estimate.epsilon"),
        Column("at most provable", "ceiling", "audited.bound.ceiling"),
        Column("canaries (in)", "canaries", "audited.count"),
        Column("method: right guesses", "method", "audited.bound.method"),
    )
    rows = tuple(
        TableRow(arm.arm.group, (f"{arm.title}, seed {seed}" if several else arm.title, *_cells(audit)))
        for arm, seed, audit in found
    )
    confidence = sorted({f"{100 * float(audit['bound']['confidence']):g} %" for _, _, audit in found})
    notes = (
        f"At least: a lower bound that holds with {' or '.join(confidence)} confidence, over the canaries' coins and "
        "the mechanism's; method and numbers of guesses were fixed before the run. It proves no claim, "
        "and cannot pass what is printed as provable with so many guesses.",
        *dict.fromkeys(f"{audit['bound']['method']}: {audit['bound']['assumes']}." for _, _, audit in found
                       if audit["bound"]["assumes"]),
        *dict.fromkeys(f"{audit['estimate']['method']}: {audit['estimate']['assumes']}." for _, _, audit in found
                       if audit["estimate"]),
    )  # fmt: skip
    return ReportTable(columns, rows, notes, (), "Epsilon claimed and audited")


def check_table(experiment: Experiment) -> ReportTable | None:
    """One row a check of an audited run's mechanism; None where nothing was checked."""
    rows = tuple(
        TableRow(
            arm.title,
            (
                f"{arm.title}, seed {seed}" if len(experiment.index.seeds) > 1 else arm.title,
                str(check["name"]),
                f"{float(check['found']):.4g}",
                f"{float(check['expected']):.4g}",
                p_text(float(check["p_value"])),
                f"{int(check['n']):,}",
            ),
        )
        for arm, seed, audit in audits(experiment)
        for check in audit["checks"]
    )
    if not rows:
        return None
    columns = (
        Column("arm", "arm", "title"),
        Column("check", "check", "audited.checks"),
        Column("found", "found", "audited.checks"),
        Column("claimed", "claimed", "audited.checks"),
        Column("p-value", "p", "audited.checks"),
        Column("observations", "n", "audited.checks"),
    )
    notes = (
        "Noise in units of the claimed one; arrival of a canary in clips; p-values are two-sided, one a check. A small "
        "one says that the mechanism is not the claimed one, also where it is the safer one.",
    )
    return ReportTable(columns, rows, notes, (), "Checks of the mechanism")


def p_text(value: float) -> str:
    """A p-value for people.

    >>> p_text(0.25), p_text(0.0)
    ('0.25', 'below 1e-12')
    """
    return f"below {SMALLEST_P:g}" if value < SMALLEST_P else f"{value:.2g}"


def _cells(audit: Mapping[str, Any]) -> tuple[str, ...]:
    bound, estimate, claimed = audit["bound"], audit["estimate"], audit["claimed"]
    ratio = audit["ratio"]
    return (
        "nothing" if claimed is None else f"{_epsilon(claimed)} ({small_number(audit['delta'])})",
        _epsilon(bound["epsilon"]),
        MISSING if ratio is None else f"{ratio:.2f}",
        _contradicting(str(audit["alarm"])),
        MISSING
        if estimate is None
        else f"{_epsilon(estimate['epsilon'])} ({_epsilon(estimate['low'])} to {_epsilon(estimate['high'])})",
        _epsilon(bound["ceiling"]),
        f"{audit['count']:,} {audit['canaries']} ({audit['included']:,})",
        f"{bound['method']}: {bound['correct']:,} of {bound['guesses']:,}",
    )


def _contradicting(alarm: str) -> str:
    """What stands in an alarm, without its numbers, which other columns and the table of checks have."""
    named = [re.sub(r" \S+, claimed .*$", "", part) for part in alarm.split("; ")]
    return ", ".join("bound" if name == "epsilon is at least" else name for name in named) or "nothing"


def _epsilon(value: float | None) -> str:
    return "infinite" if value in {None, inf} else f"{float(value or 0):.3g}"
