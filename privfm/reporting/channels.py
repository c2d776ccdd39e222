"""Who learns what, for each channel of an experiment."""

from __future__ import annotations

from privfm.reporting.formats import MISSING, bytes_text
from privfm.reporting.summary import ArmResult, Experiment
from privfm.reporting.table import Column, ReportTable, TableRow

_ROLES = ("server", "key holder", "clients", "trust")


def who_learns_what(experiment: Experiment) -> ReportTable | None:
    """One row a channel, with what each party learns over it; None where every update travels in the clear."""
    arms: dict[str, ArmResult] = {}
    for arm in experiment.finished:
        if not arm.centralised and arm.facts.get("learns"):
            arms.setdefault(str(arm.facts["channel"]), arm)
    if all(arm.facts["channel_name"] == "Plaintext" for arm in arms.values()):
        return None
    several = len({arm.facts["channel_name"] for arm in arms.values()}) < len(arms)
    columns = (
        Column("channel", "channel", "channel_name"),
        Column("in the clear", "clear", "unprotected"),
        *(Column("trusted for that" if role == "trust" else role, role, "learns") for role in _ROLES),
        Column("sent a client", "sent", "bytes_up_per_client"),
    )
    rows = tuple(TableRow("", _cells(arm, in_full=several)) for arm in arms.values())
    notes = (
        "In the clear: share of each client's update that the server reads. A sum says something of everybody in it: "
        "only a plan's noise bounds what.",
    )
    return ReportTable(columns, rows, notes, (), "Who learns what", words=True)


def _cells(arm: ArmResult, in_full: bool) -> tuple[str, ...]:
    learns = arm.facts["learns"]
    return (
        str(arm.facts["channel_settings" if in_full else "channel_name"]),
        f"{100 * float(arm.facts['unprotected']):.3g} %",
        *(str(learns.get(role, MISSING)) for role in _ROLES),
        bytes_text(arm.mean("bytes_up_per_client")),
    )
