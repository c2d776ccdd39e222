"""The figures people look for: utility by round, privacy against utility, epsilon by round, audits, attacks, cost.

Each is a list of panels as wide as a phone. One whose data is missing has no panels and says why.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

from privfm.reporting.audit_figures import audit_panels, audit_points
from privfm.reporting.drawing import Panel, drawing_style
from privfm.reporting.formats import bytes_text, seconds_text
from privfm.reporting.noise_lines import NoiseLine, by_unit, noise_lines
from privfm.reporting.panels import attack_panel, cost_panel, privacy_panel, rounds_panel, utility_curves
from privfm.reporting.privacy_panels import Curve, epsilon_panel, lines_panel
from privfm.reporting.summary import Experiment


@final
@dataclass(frozen=True)
class FigureBlock:
    """One figure.

    Attributes:
      name: short name, also the prefix of identifiers.
      title: for readers.
      caption: how to read it.
      fields: the fields of rows and summaries that it shows.
      panels: the drawings; empty when the data is missing.
      missing: why there are none, one line; empty otherwise.
    """

    name: str
    title: str
    caption: str
    fields: tuple[str, ...]
    panels: tuple[Panel, ...]
    missing: str = ""


def all_figures(experiment: Experiment) -> tuple[FigureBlock, ...]:
    """The figures, in the order of the page; that of audits only where there are any."""
    figures = (utility_by_round, privacy_utility, epsilon_by_round, claimed_and_audited, attack_against_defense, cost)
    found = (figure(experiment) for figure in figures)
    return tuple(figure for figure in found if figure is not None)


def utility_by_round(experiment: Experiment) -> FigureBlock:
    """Utility by round: one panel a group, the same axes in each; the plain arm in grey where it does not belong."""
    name, title = "rounds", "Utility by round"
    curves = utility_curves(experiment)
    if not curves:
        return FigureBlock(name, title, "", (), (), "no federated arm was evaluated in two rounds or more")
    groups = dict.fromkeys(arm.arm.group for arm in experiment.finished if arm.arm.name in curves)
    with drawing_style():
        panels = tuple(rounds_panel(experiment, curves, group, number) for number, group in enumerate(groups))
    several = len(experiment.index.seeds) > 1
    caption = (
        "All panels share their axes. "
        + ("Lines are means over seeds, thin lines single seeds. " if several else "")
        + "Grey: the plain federated arm, for comparison. Dotted: the centralised reference in its final evaluation. "
        + "Values at the lines' ends are those of the last evaluated round, the table's of the final evaluation."
    )
    return FigureBlock(name, title, caption, ("utility",), panels)


def privacy_utility(experiment: Experiment) -> FigureBlock:
    """Utility against epsilon on a log axis, with a line for each method, or one for the arm without noise."""
    name, title = "privacy", "Privacy against utility"
    lines = noise_lines(experiment)
    if len(lines) > 1:
        return _methods(experiment, lines, name, title)
    arms = [arm for arm in experiment.private if arm.utility is not None]
    if not arms:
        return FigureBlock(name, title, "", (), (), "no finished arm without an attack has a privacy guarantee")
    kinds = {(record["unit"], record["adversary"], record["relation"]) for arm in arms if (record := arm.epsilon)}
    with drawing_style():
        panel = privacy_panel(experiment, arms, comparable=len(kinds) == 1)
    several = len(experiment.index.seeds) > 1
    caption = (
        "Further left is more private. The line is the same training without noise. "
        + ("Bars run from the least to the greatest seed." if several else "Bars: 95 % interval of the test set.")
        + (" These guarantees differ in what they cover and are not comparable." if len(kinds) > 1 else "")
    )
    return FigureBlock(name, title, caption, ("epsilon.epsilon", "utility"), (panel,))


def _methods(experiment: Experiment, lines: Sequence[NoiseLine], name: str, title: str) -> FigureBlock:
    """One panel a unit, a line a method."""
    order = list(dict.fromkeys(line.title for line in lines))
    with drawing_style():
        panels = tuple(lines_panel(own, order, f"privacy-{unit}") for unit, own in by_unit(lines).items())
    several = len(experiment.index.seeds) > 1
    caption = (
        "Further left is more private; `none` is the same training, clipped but not noised. "
        + ("Bars run from the least to the greatest seed." if several else "Bars: 95 % interval of the test set.")
        + (" The panels protect different things, and their epsilons are not comparable." if len(panels) > 1 else "")
    )
    return FigureBlock(name, title, caption, ("epsilon.epsilon", "utility"), panels)


def epsilon_by_round(experiment: Experiment) -> FigureBlock:
    """How a guarantee is spent: epsilon of the headline by rounds played; arms with the same curve share a line."""
    name, title = "epsilon", "Epsilon by round"
    found: dict[str, dict[Curve, list[str]]] = {}
    for arm in experiment.private:
        record, points = arm.epsilon or {}, arm.facts.get("epsilon_curve") or ()
        curve = tuple((float(played), float(epsilon)) for played, epsilon in points if epsilon and epsilon > 0)
        if len(curve) > 1:
            found.setdefault(str(record["unit"]), {}).setdefault(curve, []).append(arm.title)
    if not found:
        return FigureBlock(name, title, "", (), (), "no arm recorded how its epsilon grew")
    with drawing_style():
        panels = tuple(epsilon_panel(_named(curves), unit, f"epsilon-{unit}") for unit, curves in found.items())
    caption = "What the rounds so far have cost, by the same accountant as the number at the end."
    return FigureBlock(name, title, caption, ("epsilon_curve",), panels)


def _named(curves: Mapping[Curve, Sequence[str]]) -> list[tuple[str, Curve]]:
    """Curves with the titles of their arms; where several arms share one, with their number."""
    return [(titles[0] if len(titles) == 1 else f"({len(titles)} arms)", curve) for curve, titles in curves.items()]


def claimed_and_audited(experiment: Experiment) -> FigureBlock | None:
    """Epsilon certified and estimated against epsilon claimed, a panel a group of audited runs; None without any."""
    name, title = "audit", "Claimed and audited epsilon"
    points = audit_points(experiment)
    if not points:
        return None
    with drawing_style():
        panels = audit_panels(points)
    methods = "; ".join(dict.fromkeys(point.method for point in points))
    caption = (
        f"Filled: certified ({methods}). Hollow, with its 95 % interval: estimated, no bound. Short line: the most "
        "that could be certified. Dotted: the claim; a filled point above it contradicts it. A red cross: the claim is "
        "contradicted, by the bound or by a check of the mechanism."
    )
    return FigureBlock(name, title, caption, ("audited",), panels)


def attack_against_defense(experiment: Experiment) -> FigureBlock:
    """Utility by rule (row) and attack (column), with the score of each rule without attack in the first column."""
    name, title = "attacks", "Attack against defense"
    if all(arm.utility is None for arm in experiment.attacked):
        return FigureBlock(name, title, "", (), (), "no finished arm was attacked")
    with drawing_style():
        panel = attack_panel(experiment)
    caption = (
        "Utility of each rule without and under attack. The redder a cell, the more is lost against the best cell. "
        "Empty: not run."
    )
    return FigureBlock(name, title, caption, ("utility",), (panel,))


def cost(experiment: Experiment) -> FigureBlock:
    """Bytes that a client sends (log axis) and seconds, by arm."""
    name, title = "cost", "Cost"
    sent = [(arm.title, arm.mean("bytes_up_per_client") or 0.0) for arm in experiment.finished if not arm.centralised]
    sent = [(label, count) for label, count in sent if count > 0]
    spent = [(arm.title, seconds) for arm in experiment.finished if (seconds := arm.mean("seconds_total")) is not None]
    with drawing_style():
        panels = [cost_panel("Bytes a client sends", sent, bytes_text, log=True)] if sent else []
        panels += [cost_panel("Time of the whole run", spent, seconds_text, log=False)] if spent else []
    if not panels:
        return FigureBlock(name, title, "", (), (), "no arm recorded bytes or seconds")
    caption = "Bytes on a log axis. Seconds are those of this simulation on this machine, not of a deployment."
    return FigureBlock(name, title, caption, ("bytes_up_per_client", "seconds_total"), tuple(panels))
