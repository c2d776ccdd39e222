"""`privfm report`, `privfm account` and `privfm export`: what can be done with a record alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from math import isclose, isfinite
from pathlib import Path
from typing import Any

from privfm.checks import BrokenCheckpoint, require
from privfm.cli.errors import DONE, REFUSED, say
from privfm.cli.explain import public_classes
from privfm.cli.options import parser_for, values
from privfm.defenses import DPPlan, IntegerNoise, LocalSampling
from privfm.experiment import visibility
from privfm.reporting import RunFolder, epsilon_paragraph, experiment_tables, export_released, show, write_report
from privfm.reporting.formats import rounds_text

TOLERANCE = 1e-6
"""Relative difference between two epsilons that versions of the accountant may explain."""


def report(argv: Sequence[str]) -> int:
    """Writes `report.html` again and prints the table.

    Args:
      argv: the experiment's folder.
    """
    return int(_write_report(**values(parser_for(_write_report, "privfm report", file=False), _write_report, argv)))


def account(argv: Sequence[str]) -> int:
    """Computes epsilon again.

    Args:
      argv: the run's folder.

    Returns:
      1 where the record says something else.
    """
    return int(_account(**values(parser_for(_account, "privfm account", file=False), _account, argv)))


def export(argv: Sequence[str]) -> int:
    """Copies what may leave the machine.

    Args:
      argv: the run's folder, `--released`, `--out DEST`.
    """
    return int(_export(**values(parser_for(_export, "privfm export", file=False), _export, argv)))


def _write_report(folder: Path) -> int:
    """Writes the report of an experiment again, and prints its table.

    Args:
      folder: of the experiment.
    """
    from rich.console import Console

    page = write_report(folder, visibility)
    show(experiment_tables(folder), Console())
    say(f"report: {page}")
    return DONE


def _account(run: Path) -> int:
    """Computes epsilon again from a run's record: its plan, and the rounds it has played. Nothing else is needed.

    Args:
      run: the run's folder, ARM/seed-N of an experiment; it need not be finished.
    """
    folder = _run_folder(run)
    config, played = folder.config(), len(folder.rows())
    require("plan" in config, f"{run}: its record does not say whether there was a plan (an export may leave it out)")
    recorded = folder.summary().get("epsilon") if folder.finished else None
    if config["plan"] is None:
        say("no plan: there is no differential privacy and no guarantee, against anybody")
        return _compare({} if recorded is None else recorded, {})
    plan, population = _plan(run, config["plan"]), folder.population()
    require(
        not plan.makes_sizes_public or bool(population), f"{run}: it has not read its data yet; nothing was released"
    )
    records = [
        asdict(record)
        for record in plan.records(played, population.get("client_examples", ()), population.get("trained_values"))
    ]
    record = records[0]
    if isfinite(record["epsilon"]):
        for one in records:
            say(epsilon_paragraph("recomputed", one))
    else:
        say("epsilon is infinite: the plan adds no noise, so that it guarantees nothing")
    if not folder.finished:
        say(f"not finished: {rounds_text(played)} played of {config.get('rounds', 'unknown')}; nothing was claimed yet")
        return DONE
    return _compare(recorded or {}, record)


def _plan(run: Path, recorded: Mapping[str, Any]) -> DPPlan:
    """A plan as a record holds it.

    Raises:
      BrokenCheckpoint: it is none.
    """
    values = dict(recorded)
    try:
        if clipping := values.get("clipping"):
            values["clipping"] = public_classes()[clipping["class_path"]](**clipping["init_args"])
        if local := values.get("local"):
            noise = tuple((int(least), float(own)) for least, own in local["noise_by_examples"])
            values["local"] = LocalSampling(**{**local, "noise_by_examples": noise})
        if integers := values.get("integers"):
            values["integers"] = IntegerNoise(**integers)
        return DPPlan(**values)
    except (TypeError, KeyError) as reason:
        raise BrokenCheckpoint(f"{run}: plan={recorded!r} is no plan: {reason}") from reason


def _compare(recorded: Mapping[str, Any], computed: Mapping[str, Any]) -> int:
    """Says where a record and the computation differ; versions of the accountant may."""
    names = [name for name in {**computed, **recorded} if name != "accountant"]
    different = [name for name in names if not _same(recorded.get(name), computed.get(name))]
    for name in different:
        say(f"differs: {name} is {recorded.get(name)!r} in the record, {computed.get(name)!r} recomputed")
    if not different and computed:
        say("the record says the same")
    return REFUSED if different else DONE


def _same(recorded: object, computed: object) -> bool:
    """Equal, for numbers up to `TOLERANCE`; JSON writes an infinite one as null."""
    if isinstance(computed, float):
        if not isfinite(computed):
            return recorded is None
        return isinstance(recorded, int | float) and isclose(recorded, computed, rel_tol=TOLERANCE)
    return recorded == computed


def _export(
    run: Path, released: bool = False, out: Path | None = None, tensorboard: Path | None = None, card: bool = False
) -> int:
    """Copies of a run's record what its guarantee covers and what is public anyway.

    Args:
      run: the run's folder, ARM/seed-N of an experiment.
      released: leave out what is private; there is no other export.
      out: a new folder; by default `released` beside the run's.
      tensorboard: write the rounds as TensorBoard events into this folder, too.
      card: write a model card with the run's privacy statement beside the saved model, too.
    """
    require(
        released,
        "released=False: a record holds diagnostics that no guarantee covers, and the seed, from which the noise can "
        "be drawn again; give --released to leave them out (for yourself, copy the folder as it is)",
    )
    folder = _run_folder(run)
    say(f"exported: {export_released(folder, visibility, run.parent / 'released' if out is None else out)}")
    if tensorboard is not None:
        from privfm.plugins.tensorboard import write_events

        say(f"tensorboard: {write_events(run, tensorboard, visibility)} new scalars in {tensorboard}")
    if card:
        from privfm.plugins.model_card import write_model_card

        say(f"model card: {write_model_card(run, visibility)}")
    if folder.config().get("plan", "unknown") is None:
        say("no plan: no guarantee covers what was exported")
    return DONE


def _run_folder(run: Path) -> RunFolder:
    """The run in a folder.

    Raises:
      InvalidArgument: there is none; an experiment's folder lists its runs.
    """
    inside = sorted(str(path.parent) for path in run.glob("*/seed-*/config.json"))
    hint = f"; its runs: {', '.join(inside)}" if inside else "; a run is a folder ARM/seed-N of an experiment"
    require((run / "config.json").is_file(), f"RUN={run} is not a run: it holds no config.json{hint}")
    return RunFolder(run)
