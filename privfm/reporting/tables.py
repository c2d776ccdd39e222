"""The tables of an experiment, that of all arms first."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from privfm.reporting.audits import audit_table, check_table
from privfm.reporting.channels import who_learns_what
from privfm.reporting.formats import (
    MISSING,
    bytes_text,
    difference_text,
    epsilon_text,
    rounds_text,
    seconds_text,
    small_number,
    spread_text,
    utility_text,
)
from privfm.reporting.noise_lines import table_by_epsilon
from privfm.reporting.robustness import backdoors, worst_cases
from privfm.reporting.summary import ArmResult, Experiment, paired_difference
from privfm.reporting.table import Column, ReportTable, TableRow

ADVERSARIES = {
    "released_model": "somebody who sees the released model, not the server",
    "server": "the server, which sees everything that it is sent and who took part",
}
PLACES = {
    "local": "each client adds noise to its own update",
    "example": "each client adds noise in every local step, before anything leaves it",
    "central": "the server adds noise and sees the sum without it",
    "key_holder": "who decrypts adds noise, and sees the sum without it; the server does not",
    "distributed": "the clients' shares of noise add up, so that no one sees the sum without it",
}


VISIBLE_CHANNEL_ERROR = 1e-3
"""Relative error of a channel's sum from which a reader is told of it; that of a fitting bound is far below."""


def experiment_tables(folder: Path) -> tuple[ReportTable, ...]:
    """The tables of an experiment's folder: all arms; methods by epsilon; worst cases and backdoors under attacks.

    Raises:
      InvalidArgument: `folder` is not an experiment's.
      BrokenCheckpoint: the index or a finished run is damaged.
    """
    return tables_of(Experiment.read(folder))


def tables_of(experiment: Experiment) -> tuple[ReportTable, ...]:
    """The tables of an experiment that was read already."""
    found = (
        table_of_arms(experiment),
        table_by_epsilon(experiment),
        audit_table(experiment),
        check_table(experiment),
        worst_cases(experiment),
        backdoors(experiment),
        who_learns_what(experiment),
    )
    return tuple(table for table in found if table is not None)


def table_of_arms(experiment: Experiment) -> ReportTable:
    """One row an arm; arms that are not finished say so."""
    one_seed = len(experiment.index.seeds) == 1
    metric = next((str(arm.facts["utility_metric"]) for arm in experiment.finished), "utility")
    columns = (
        Column("arm", "arm", "title"),
        Column(metric, metric, "utility"),
        Column("95 % interval", "interval", "utility")
        if one_seed
        else Column("least to greatest seed (each)", "seeds", "utility"),
        Column("same rule, clean", "clean", "utility"),
        Column("attack effect", "effect", "utility"),
        Column("relative utility", "relative", "utility"),
        Column("epsilon (delta, against)", "epsilon", "epsilon.epsilon"),
        Column("sent a client", "sent", "bytes_up_per_client"),
        Column("time", "time", "seconds_total"),
    )
    rows = tuple(TableRow(arm.arm.group, _cells(experiment, arm)) for arm in experiment.arms)
    return ReportTable(columns, rows, _notes(experiment), guarantees(experiment))


def guarantees(experiment: Experiment) -> tuple[str, ...]:
    """The privacy statement: one paragraph a record, with all arms that it covers, attacked ones too."""
    covered: dict[str, tuple[Mapping[str, Any], list[str]]] = {}
    for arm in experiment.finished:
        for record in arm.epsilons:
            same = json.dumps(dict(record), sort_keys=True)
            covered.setdefault(same, (record, []))[1].append(arm.title)
    return tuple(epsilon_paragraph("; ".join(titles), record) for record, titles in covered.values())


def epsilon_paragraph(title: str, record: Mapping[str, Any]) -> str:
    """The whole record behind an epsilon, in words.

    Args:
      title: what it is about.
      record: the fields of an `EpsilonRecord`; epsilon is finite.
    """
    adversary, place = str(record["adversary"]), str(record["place"])
    bound = record.get("participation_bound")
    took_part = "any number of rounds, drawn in secret" if bound is None else f"at most {rounds_text(bound)}"
    clients, median = record.get("clients"), record.get("median")
    over = ""
    if clients and median is not None:
        over = f" (the largest of {clients:,} clients; the median client: {small_number(median)})"
    whose = "client that takes" if record["unit"] == "client" else "example of a client that takes"
    words = PLACES.get("example" if record["unit"] == "example" else place)
    return (
        f"{title}: epsilon {small_number(record['epsilon'])} at delta {small_number(record['delta'])} "
        f"after {rounds_text(record['rounds'])}{over}. It covers one {whose} part in {took_part}, "
        f"against {ADVERSARIES.get(adversary, adversary)}; neighbouring data sets: {record['relation']}. "
        f"Place of the noise: {place}{f' ({words})' if words else ''}. "
        f"Accountant: {record['accountant']}; event: {record['event']}. "
        f"Noise: {record['noise']}. Tuning: {record['tuning']}."
    )


def _cells(experiment: Experiment, arm: ArmResult) -> tuple[str, ...]:
    if not arm.summaries:
        return arm.title, "not finished", *[MISSING] * 7
    unit = str(arm.facts.get("utility_unit", ""))
    partner = experiment.clean_partner(arm)
    relative = experiment.relative_utility(arm)
    missing = len(experiment.index.seeds) - len(arm.summaries)
    return (
        arm.title if not missing else f"{arm.title} ({missing} of {len(experiment.index.seeds)} seeds not finished)",
        utility_text(arm.utility, unit) if arm.utilities else "not finite",
        spread_text(arm),
        utility_text(partner.utility, unit) if partner else MISSING,
        difference_text(paired_difference(arm, partner), unit),
        MISSING if relative is None else f"{relative:.2f}",
        epsilon_text(arm.epsilon),
        MISSING if arm.centralised else bytes_text(arm.mean("bytes_up_per_client")),
        seconds_text(arm.mean("seconds_total")),
    )


def _warnings(arm: ArmResult) -> list[str]:
    """What a reader must know of an arm before its number means anything."""
    found = []
    if arm.attacked and arm.facts.get("channel_reveals") == "SUM":
        found.append(f"{arm.title}: under a sum-only channel nobody enforces a malicious client's clip.")
    error = max(arm.values("channel_error_relative_l2").values(), default=0.0)
    if error > VISIBLE_CHANNEL_ERROR:
        found.append(f"{arm.title}: the channel changed the sum by up to {100 * error:,.1f} %; lower its bound.")
    if failed := arm.mean("failed_clients"):
        why = next((summary["first_failure"] for summary in arm.summaries.values() if summary["first_failure"]), "")
        found.append(f"{arm.title}: {failed:g} trainings of clients failed, the first with {why}.")
    if skipped := arm.mean("skipped_rounds"):
        found.append(_skipped(arm, skipped))
    if absent := arm.mean("clients_without_rows"):
        found.append(f"{arm.title}: {absent:g} natural clients hold no row of the clients' split and take no part.")
    return found


def _skipped(arm: ArmResult, skipped: float) -> str:
    """How many rounds were skipped, a mean over seeds, and why the first one was."""
    reason = next((row["skipped"] for rows in arm.rows.values() for row in rows if row.get("skipped")), None)
    because = "" if reason is None else f", the first because: {reason}"
    if skipped == arm.facts["rounds"]:
        return f"{arm.title}: all rounds were skipped{because}. The model was never trained."
    return f"{arm.title}: {skipped:g} of {rounds_text(arm.facts['rounds'])} were skipped{because}."


def _notes(experiment: Experiment) -> tuple[str, ...]:
    notes = []
    examples = sorted({int(arm.facts["utility_n"]) for arm in experiment.finished if arm.facts.get("utility_n")})
    if len(experiment.index.seeds) == 1:
        counts = " or ".join(f"{count:,}" for count in examples)
        notes.append(
            f"One seed: no spread known. Intervals are binomial (Wilson, 95 %) over the {counts} test examples; "
            "they do not cover the spread between seeds."
        )
    else:
        notes.append("Several seeds: the mean, then the least and the greatest and each point. No normal interval.")
    if experiment.centralised is not None:
        notes.append("Relative utility: (m - trivial) / (centralised - trivial).")
    if experiment.attacked:
        notes.append(
            "Clean: the arm with the same configuration, but no attack. Effect: the difference to it, paired by seed, "
            "in points where utility is a share; missing where no such arm was run."
        )
    for arm in experiment.finished:
        notes += _warnings(arm)
    if experiment.unfinished_runs:
        notes.append(f"Runs not finished: {experiment.unfinished_runs}. Means are over the finished ones.")
    return tuple(notes)
