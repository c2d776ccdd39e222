"""What attacks on membership reach: ROC curves on logarithmic axes, and a table of judgements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, floor, log10
from typing import TYPE_CHECKING, final

import numpy as np

from privfm.attacks.membership.blind import Blind
from privfm.attacks.membership.curves import CONFIDENCE, Interval, Judgement, tpr_band
from privfm.checks import require
from privfm.contracts.membership import Array, Scored
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
    write_lines,
)
from privfm.reporting.figures import FigureBlock
from privfm.reporting.formats import MISSING
from privfm.reporting.panels import DOTTED, HEADING, wrapped
from privfm.reporting.table import Column, ReportTable, TableRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FALSE_ACCUSATIONS = 10
"""A curve begins where so many non-members are accused: further left it is drawn by single examples."""

POINTS_A_DECADE = 24
"""Of a curve; each is a rate that a threshold reaches."""

_RIGHT = 128  # points for labels at the lines' ends
_BAND = 0.16  # opacity, at which two bands over each other are still told apart


@final
@dataclass(frozen=True)
class RocLine:
    """One curve of the figure.

    Attributes:
      title: of the attack.
      fpr: `(points,)`, rising, on a logarithmic grid; the least has ten false accusations.
      tpr: `(3, points)`: the rate and the ends of its 95 % interval.
    """

    title: str
    fpr: Array
    tpr: Array


def roc_line(title: str, scored: Scored, generator: np.random.Generator, resamples: int = 1000) -> RocLine:
    """The curve of an attack's scores, with a band by bootstrap over examples.

    Args:
      title: of the attack.
      scored: its scores, at least 20 of them of non-members.
      generator: of the resamples.
      resamples: at least 100.

    Raises:
      InvalidArgument: too few non-members for a curve, or too few resamples.
    """
    others = int((~scored.members).sum())
    least = 2 * FALSE_ACCUSATIONS
    require(others >= least, f"{title}: {others} scores of non-members; expected at least {least} for a curve")
    start = log10(FALSE_ACCUSATIONS / others)
    # Whole steps, so that 1 % and 0.1 % are among them and say the same as a table; the end, 1, is every curve's.
    steps = np.arange(floor(start * POINTS_A_DECADE) + 1, 0)
    grid = np.append(10**start, 10.0 ** (steps / POINTS_A_DECADE))
    return RocLine(title, grid, tpr_band(scored, grid.tolist(), generator, resamples))


def membership_roc(lines: Sequence[RocLine], name: str = "membership", subtitle: str = "") -> FigureBlock:
    """ROC curves of several attacks, both axes logarithmic, with their bands and the diagonal of guessing.

    Args:
      lines: of which each has a colour by its place.
      name: prefix of identifiers, different for each figure of a page.
      subtitle: what was attacked.
    """
    title = "Membership inference"
    if not lines:
        return FigureBlock(name, title, "", (), (), "no attack on membership was run")
    with drawing_style():
        panel = _roc_panel(lines, name, subtitle)
    caption = (
        "Share of members found against share of non-members wrongly accused. Dotted: guessing. "
        f"Bands: {percent(CONFIDENCE)} interval by bootstrap over examples, for the attacked models. "
        f"A curve begins where {FALSE_ACCUSATIONS} non-members are accused; steps lie where a threshold does."
    )
    return FigureBlock(name, title, caption, (), (panel,))


def _roc_panel(lines: Sequence[RocLine], name: str, subtitle: str) -> Panel:
    texts = [wrapped(line.title, 16) for line in lines]
    inner = max(190.0, sum(map(lines_height, texts)) + 4)
    figure, axes = canvas(HEADING + inner + 40, 44, _RIGHT, HEADING, 40)
    heading(figure, "Members found by wrongly accused", subtitle)
    # Logarithms on plain axes: places on them are then those of the text beside them.
    left = log10(min(float(line.fpr[0]) for line in lines))
    low = min([left, *(log10(float(line.tpr[0][line.tpr[0] > 0].min(initial=1.0))) for line in lines)]) - 0.08
    axes.set_xlim(left, 0)
    axes.set_ylim(low, 0.02)
    for axis, start in ((axes.xaxis, left), (axes.yaxis, low)):
        powers = range(ceil(start), 1)
        axis.set_ticks(list(powers), labels=[percent(10.0**power) for power in powers])
    axes.set_xlabel("non-members accused, log axis", color=colour("muted"), fontsize=SMALL, labelpad=3)
    axes.grid(color=colour("line"), linewidth=0.7)
    axes.plot([left, 0], [left, 0], color=colour("muted"), linewidth=1.2, linestyle=DOTTED)
    for number, line in enumerate(lines):
        _draw(axes, line, number, 10 ** (low - 1))
    _name(axes, inner, texts, lines)
    spoken = "; ".join(f"{line.title}: {_spoken(line)}" for line in lines)
    return render(figure, name, f"Share of members found, by share of non-members accused. {spoken}.")


def _draw(axes: Axes, line: RocLine, number: int, below: float) -> None:
    """A step at each point of the grid: between two of them nothing is promised. Zeros leave through the bottom."""
    ink = colour(series_name(number))
    found, low, high = (np.log10(np.append(np.maximum(row, below), 1.0)) for row in line.tpr)
    places = np.log10(np.append(line.fpr, 1.0))
    axes.fill_between(places, low, high, step="post", color=ink, alpha=_BAND, linewidth=0)
    axes.plot(places, found, color=ink, linewidth=1.6, linestyle=series_dash(number), drawstyle="steps-post")


def _name(axes: Axes, inner: float, texts: Sequence[str], lines: Sequence[RocLine]) -> None:
    """Names beside the axes with a piece of their lines, the highest curve first; all curves end in one corner."""
    order = sorted(range(len(lines)), key=lambda number: -_height(lines[number], lines))
    bottom, top = axes.get_ylim()
    down = 0.0
    for number in order:
        ink = series_name(number)
        height = top - (down + lines_height(texts[number]) / 2) / inner * (top - bottom)
        across, dash = axes.get_yaxis_transform(), series_dash(number)
        places = ([1.05, 1.14], [height, height])
        axes.plot(*places, transform=across, clip_on=False, color=colour(ink), linewidth=1.6, linestyle=dash)
        write_lines(axes, (1.17, height), texts[number], ink=ink, across=True)
        down += lines_height(texts[number])


def _height(line: RocLine, lines: Sequence[RocLine]) -> float:
    """The rate at the least false-positive rate that all curves have."""
    return _at(line, max(float(one.fpr[0]) for one in lines))


def _at(line: RocLine, fpr: float) -> float:
    """The rate at the last point of the grid that is not beyond."""
    return float(line.tpr[0][max(0, int(np.searchsorted(line.fpr, fpr * (1 + 1e-9), side="right")) - 1)])


def _spoken(line: RocLine) -> str:
    places = [fpr for fpr in (0.001, 0.01, 0.1) if fpr >= line.fpr[0]] or [float(line.fpr[0])]
    return ", ".join(f"{percent(_at(line, fpr))} at {percent(fpr)}" for fpr in places)


def judgement_table(judgements: Mapping[str, Judgement], blind: Blind | None = None) -> ReportTable:
    """A row an attack: AUC, advantage and the rates at low false-positive rates, each with its interval.

    Args:
      judgements: by title of the attack, all with the same levels.
      blind: the verdict on the split, which stands below the table.

    Raises:
      InvalidArgument: the levels differ.
    """
    levels = {tuple(rate.fpr for rate in one.rates) for one in judgements.values()}
    require(len(levels) <= 1, f"judgements have different levels {sorted(levels)}: expected the same for a table")
    shown = next(iter(levels), ())
    columns = (
        Column("Attack", "attack", "attack"),
        Column("AUC", "AUC", "auc"),
        *(Column(f"TPR at {percent(level)} FPR", f"TPR @ {percent(level)}", "rates") for level in shown),
        Column("Advantage", "advantage", "advantage"),
        Column("Scores of members, others", "scores", "members"),
        Column("Models, examples", "models", "models"),
    )
    rows = tuple(TableRow("", (title, *_cells(one))) for title, one in judgements.items())
    notes = (
        f"In brackets: {percent(CONFIDENCE)} interval by bootstrap over examples, for the attacked models.",
        "Advantage: true less false positives, at a threshold that was chosen on the other half of the examples.",
        *((blind.sentence,) if blind else ()),
    )
    return ReportTable(columns, rows, notes, (), "Membership inference")


def _cells(judgement: Judgement) -> tuple[str, ...]:
    auc, gain = judgement.auc, judgement.advantage
    return (
        f"{auc.value:.3f} [{auc.low:.3f}, {auc.high:.3f}]",
        *(_share(rate.tpr) if rate.tpr else rate.missing for rate in judgement.rates),
        f"{gain.value:.3f} [{gain.low:.3f}, {gain.high:.3f}]",
        f"{judgement.members:,}, {judgement.others:,}",
        f"{judgement.models:,}, {judgement.examples:,}",
    )


def _share(share: Interval | None) -> str:
    if share is None:
        return MISSING
    return f"{100 * share.value:.2f} % [{100 * share.low:.2f}, {100 * share.high:.2f}]"


def percent(share: float) -> str:
    """A share in per cent, three digits.

    >>> percent(0.001), percent(0.1), percent(0.01234)
    ('0.1 %', '10 %', '1.23 %')
    """
    return f"{100 * share:.3g} %"
