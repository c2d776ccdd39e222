"""The report: one self-contained page for a reader who was not there."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

from privfm.files import writable, write_atomically
from privfm.reporting.answers import Answer, answers
from privfm.reporting.audits import all_audited, audit_answer, contradicted
from privfm.reporting.export import Visibility, everything_private, visibility_of
from privfm.reporting.figures import all_figures
from privfm.reporting.summary import Experiment
from privfm.reporting.tables import tables_of
from privfm.reporting.templates import REPORT, rendered


def write_report(experiment_folder: Path, visibility: Visibility = everything_private) -> Path:
    """Writes `report.html` into an experiment's folder, in one step.

    The page needs nothing from elsewhere: no script, font, style sheet or image. The same folder gives the same bytes.

    Args:
      experiment_folder: the experiment; arms that are not finished are said to be so.
      visibility: name of a field -> `released`, `public` or `private`; the page marks what is private.

    Returns:
      Path of the page.

    Raises:
      InvalidArgument: the folder is not an experiment's, or cannot be written.
      BrokenCheckpoint: the index or a finished run is damaged.
    """
    page = render_page(Experiment.read(experiment_folder), visibility)
    path = experiment_folder / REPORT
    with writable(path):
        write_atomically(path, page)
    return path


def render_page(experiment: Experiment, visibility: Visibility = everything_private) -> str:
    """The page as HTML; everything that comes from the experiment is escaped."""
    return rendered(
        "page.html",
        index=experiment.index,
        answers=[(answer.question, _unbroken(answer.text)) for answer in _answers(experiment)],
        contradicted=contradicted(experiment),
        tables=tables_of(experiment),
        figures=all_figures(experiment),
        attacks=_attack_knowledge(experiment),
        conditions=_conditions(experiment),
        fields=_fields_by_visibility(experiment, visibility),
        is_private=lambda names: any(visibility_of(name, visibility) == "private" for name in names),
        one_seed=len(experiment.index.seeds) == 1,
        unbroken=_unbroken,
    )


def _answers(experiment: Experiment) -> tuple[Answer, ...]:
    """What the page says first. Where every arm is audited, accuracy under plans and canaries is no answer."""
    audit = audit_answer(experiment)
    if not audit:
        return answers(experiment)
    others = () if all_audited(experiment) else answers(experiment)
    return (Answer("Do audits contradict a claim?", audit), *others)


def _unbroken(text: str) -> str:
    """Keeps `64.1 %` and `1e-4` on one line, by a space and a hyphen at which a browser does not break."""
    return re.sub(r"(\de)-(\d)", "\\1\N{NON-BREAKING HYPHEN}\\2", re.sub(r"(\d) %", "\\1\N{NO-BREAK SPACE}%", text))


def _attack_knowledge(experiment: Experiment) -> list[dict[str, str]]:
    """Each attack once: who, with what share of the clients, knowing what."""
    found = {}
    for arm in experiment.attacked:
        known = ", ".join(map(str, arm.facts.get("attack_knowledge") or ["nothing beyond its own clients"]))
        share = f"{100 * float(arm.facts['malicious_share']):.0f} %"
        found[arm.facts["attack"], known, share] = {"attack": str(arm.facts["attack"]), "knows": known, "share": share}
    return list(found.values())


def _conditions(experiment: Experiment) -> dict[str, str]:
    """Under what the runs were made; several values of one field stand side by side."""
    environments = [part for arm in experiment.finished for env in arm.environments.values() for part in _resumed(env)]

    def seen(values: Iterable[Any]) -> str:
        return " / ".join(dict.fromkeys(str(value) for value in values if value is not None))

    git = [env.get("git") or {} for env in environments]
    versions = [env.get("versions") or {} for env in environments]
    names = dict.fromkeys(name for version in versions for name in version)
    return {
        "Command": experiment.index.command,
        "Date": experiment.index.created,
        "Seeds": ", ".join(map(str, experiment.index.seeds)),
        "Commit": seen(f"{state['commit']}{' with changes' if state['dirty'] else ''}" for state in git if state),
        "privfm": seen(env.get("privfm") for env in environments),
        "Python": seen(env.get("python") for env in environments),
        "Platform": seen(env.get("platform") for env in environments),
        "Device": seen(f"{env.get('device')} ({env.get('device_name')})" for env in environments),
        "CPU cores": seen(env.get("cpu_count") for env in environments),
        "Threads a process": seen(env.get("torch_threads") for env in environments),
        "Packages": ", ".join(f"{name} {seen(version.get(name) for version in versions)}" for name in names),
    }


def _resumed(environment: Any) -> list[Any]:
    return [environment, *environment.get("resumed", [])]


def _fields_by_visibility(experiment: Experiment, visibility: Visibility) -> dict[str, list[str]]:
    """Names of the recorded fields (of rows and summaries) by what they may be shown to."""
    rows = (row for arm in experiment.finished for run in arm.rows.values() for row in run)
    summaries = (summary for arm in experiment.finished for summary in arm.summaries.values())
    names = sorted({dotted for record in chain(rows, summaries) for dotted in _dotted_names(record)})
    found: dict[str, list[str]] = {"released": [], "public": [], "private": []}
    for name in names:
        found[visibility_of(name, visibility)].append(name)
    return found


def _dotted_names(record: Any, prefix: str = "") -> Iterable[str]:
    for key, value in record.items():
        if isinstance(value, dict) and value:
            yield from _dotted_names(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"
