"""A page on who can be told to have been trained on: tables, curves, and the area under them by rounds seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

from privfm.attacks.membership.curves import CONFIDENCE, Interval
from privfm.checks import require
from privfm.reporting.drawing import (
    SMALL,
    Panel,
    canvas,
    colour,
    drawing_style,
    heading,
    lines_height,
    render,
    series_dash,
    series_name,
)
from privfm.reporting.figures import FigureBlock
from privfm.reporting.membership_figures import percent
from privfm.reporting.panels import DOTTED, HEADING, label_ends, wrapped
from privfm.reporting.table import ReportTable
from privfm.reporting.templates import write_page

_RIGHT = 128  # points for labels at the lines' ends
_MARGIN = 0.02  # of area above and below what is drawn


@final
@dataclass(frozen=True)
class AreaLine:
    """How one attack fares with the rounds it has seen.

    Attributes:
      title: of the attack.
      areas: by rounds seen, rising.
      number: of its colour, the same in every panel.
    """

    title: str
    areas: Mapping[int, Interval]
    number: int


def areas_by_rounds(panels: Mapping[str, Sequence[AreaLine]], name: str = "areas") -> FigureBlock:
    """Areas under the ROC curve by rounds seen, a panel for each attacked run; all panels share their axes.

    Args:
      panels: lines by the run's title.
      name: prefix of identifiers, different for each figure of a page.
    """
    title = "AUC by rounds seen"
    lines = [line for own in panels.values() for line in own if line.areas]
    if not any(len(line.areas) > 1 for line in lines):
        return FigureBlock(name, title, "", (), (), "the attacks saw one number of rounds only")
    ends = [end for line in lines for area in line.areas.values() for end in (area.low, area.high)]
    span = max(0.0, min([0.5, *ends]) - _MARGIN), min(1.0, max([0.5, *ends]) + _MARGIN)
    with drawing_style():
        drawn = tuple(
            _area_panel(run, [line for line in own if line.areas], span, f"{name}{place}")
            for place, (run, own) in enumerate(panels.items())
        )
    caption = (
        f"Dotted: guessing. Bars: {percent(CONFIDENCE)} interval by bootstrap over examples, for the attacked models. "
        "At the end of the lines: after the last round."
    )
    return FigureBlock(name, title, caption, (), drawn)


def _area_panel(run: str, lines: Sequence[AreaLine], span: tuple[float, float], name: str) -> Panel:
    ends = {line.title: line.areas[max(line.areas)].value for line in lines}
    texts = {line.title: wrapped(f"{ends[line.title]:.2f} {line.title}", 17) for line in lines}
    inner = max(190.0, sum(map(lines_height, texts.values())) + 4)
    figure, axes = canvas(HEADING + inner + 40, 36, _RIGHT, HEADING, 40)
    heading(figure, run, "area under the ROC curve")
    seen = sorted({rounds for line in lines for rounds in line.areas})
    axes.set_xlim(0, 1.04 * max(seen, default=1))
    axes.set_ylim(*span)
    axes.set_xticks(seen)
    axes.set_xlabel("rounds seen", color=colour("muted"), fontsize=SMALL, labelpad=3)
    axes.grid(axis="y", color=colour("line"), linewidth=0.7)
    axes.axhline(0.5, color=colour("muted"), linewidth=1.2, linestyle=DOTTED)
    for line in lines:
        ink = colour(series_name(line.number))
        values = [area.value for area in line.areas.values()]
        dash = series_dash(line.number)
        axes.plot(list(line.areas), values, "o", color=ink, markersize=4)
        axes.plot(list(line.areas), values, color=ink, linewidth=1.6, linestyle=dash)
        for rounds, area in line.areas.items():
            axes.plot([rounds, rounds], [area.low, area.high], color=ink, linewidth=1.0, alpha=0.5)
    label_ends(axes, inner, texts, ends, {line.title: line.number for line in lines})
    spoken = "; ".join(f"{line.title}: {_spoken(line)}" for line in lines)
    return render(figure, name, f"Area under the ROC curve by rounds seen, {run}. {spoken}.")


def _spoken(line: AreaLine) -> str:
    return ", ".join(f"{area.value:.2f} after {rounds}" for rounds, area in line.areas.items())


def write_membership(
    folder: Path,
    question: str,
    answers: Sequence[tuple[str, str]],
    tables: Sequence[ReportTable],
    figures: Sequence[FigureBlock],
    *,
    void: str = "",
    notes: Sequence[str] = (),
    conditions: Mapping[str, str] | None = None,
) -> Path:
    """Writes `report.html` into a folder, in one step; the page needs nothing from elsewhere.

    Args:
      folder: made where it is missing.
      question: the title.
      answers: short ones, each under what it answers.
      tables: in order.
      figures: in order, each with a name of its own.
      void: why no score on the page means anything, shown above everything; empty where the split is fair.
      notes: how to read the numbers.
      conditions: command, date, versions.

    Raises:
      InvalidArgument: two figures have one name, or the folder cannot be written.
    """
    names = [figure.name for figure in figures]
    require(len(set(names)) == len(names), f"figures are named {names}: expected a name of its own for each")
    return write_page(
        folder,
        "membership.html",
        question=question,
        answers=answers,
        tables=tables,
        figures=figures,
        void=void,
        notes=notes,
        conditions=conditions or {},
        never=lambda fields: False,
    )
