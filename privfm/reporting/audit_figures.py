"""Claimed epsilon against what audits certify and estimate: a panel a group of arms, on the same axes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor, inf, isfinite, log10
from typing import TYPE_CHECKING, final

from privfm.reporting.audits import audits
from privfm.reporting.drawing import (
    LINE,
    SMALL,
    Panel,
    canvas,
    colour,
    heading,
    render,
    series_name,
    write_lines,
)
from privfm.reporting.formats import MISSING, small_number
from privfm.reporting.panels import DOTTED, HEADING, wrapped
from privfm.reporting.summary import Experiment

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LEAST = 0.1
"""Epsilon below which a number is drawn on the axis: nothing that anybody acts on is certified there."""

MOST = 100.0
"""Epsilon above which a number is drawn at the top; ceilings of few guesses and wide intervals end there."""

BESIDE = 0.055
"""Decades between neighbours of the same claim."""

UNCLAIMED = 0.4
"""Decades from the largest claim to the place of runs of which nothing is claimed."""

_SQUARE = 236.0  # points, the height of the axes; their width is what margins leave
_LETTERS = 58  # of a line of the list below the axes


@final
@dataclass(frozen=True)
class AuditPoint:
    """One audited run as it is drawn.

    Attributes:
      title: of its arm.
      group: of its arm.
      claimed: epsilon; None where nothing finite is claimed.
      certified: at least.
      ceiling: at most provable.
      estimate: with its interval; None: there is none.
      method: of the bound.
      contradicted: whether the audit contradicts the claim.
    """

    title: str
    group: str
    claimed: float | None
    certified: float
    ceiling: float
    estimate: tuple[float, float, float] | None
    method: str
    contradicted: bool


def audit_points(experiment: Experiment) -> tuple[AuditPoint, ...]:
    """Every audited run, in the order of the arms."""
    found = []
    for arm, _, audit in audits(experiment):
        bound, fit, claimed = audit["bound"], audit["estimate"], audit["claimed"]
        found.append(
            AuditPoint(
                arm.title,
                arm.arm.group,
                float(claimed) if claimed and float(claimed) < inf else None,
                _read(bound["epsilon"]),
                _read(bound["ceiling"]),
                None if fit is None else (_read(fit["epsilon"]), _read(fit["low"]), _read(fit["high"])),
                str(bound["method"]),
                bool(audit["alarm"]),
            )
        )
    return tuple(found)


def _read(value: float | None) -> float:
    """A record writes infinity as null."""
    return inf if value is None else float(value)


def audit_panels(points: Sequence[AuditPoint]) -> tuple[Panel, ...]:
    """One panel a group, all with the same axes; drawn inside `drawing_style()`.

    Args:
      points: at least one.
    """
    claims = [point.claimed for point in points if point.claimed is not None]
    low, high = (log10(min(claims)), log10(max(claims))) if claims else (0.0, 0.0)
    unclaimed = high + UNCLAIMED
    right = unclaimed + 0.3 if len(claims) < len(points) else high + 0.25
    frame = (low - 0.25, right, unclaimed)
    groups = dict.fromkeys(point.group for point in points)
    return tuple(
        _panel([point for point in points if point.group == group], group, frame, f"audit-{number}")
        for number, group in enumerate(groups)
    )


def _panel(points: Sequence[AuditPoint], group: str, frame: tuple[float, float, float], name: str) -> Panel:
    """The points of one group, numbered by arm; below, what each number is."""
    titles = list(dict.fromkeys(point.title for point in points))
    listed = [wrapped(_listed(number + 1, title, points), _LETTERS) for number, title in enumerate(titles)]
    below = LINE * sum(text.count("\n") + 1 for text in listed) + 52
    figure, axes = canvas(HEADING + _SQUARE + below, 40, 12, HEADING, below)
    heading(figure, group or "Audited runs", "epsilon certified and estimated, by epsilon claimed")
    left, right, unclaimed = frame
    axes.set_xlim(left, right)
    axes.set_ylim(log10(LEAST) - 0.08, log10(MOST) + 0.25)
    _name_axes(axes, points, unclaimed, right)
    ends = [max(left, log10(LEAST)), min(right, unclaimed - UNCLAIMED + 0.2)]
    axes.plot(ends, ends, color=colour("muted"), linewidth=1.2, linestyle=DOTTED)
    write_lines(axes, (ends[1], ends[1]), "claim", ink="muted", align="right", shift=(-4, 8))
    for point, place in zip(points, _places(points, unclaimed), strict=True):
        _draw(axes, point, place, titles.index(point.title) + 1)
    down = -46.0
    for text in listed:
        for line in text.split("\n"):
            write_lines(axes, (0.0, axes.get_ylim()[0]), line, across=True, shift=(-36, down))
            down -= LINE
    spoken = "; ".join(" ".join(text.split()) for text in listed)
    return render(figure, name, f"Epsilon certified and estimated by epsilon claimed, {group}. {spoken}.")


def _name_axes(axes: Axes, points: Sequence[AuditPoint], unclaimed: float, right: float) -> None:
    """Round values on both axes, and the place of what nothing is claimed of."""
    powers = range(floor(log10(LEAST)), ceil(log10(MOST)) + 1)
    rounded = [digit * 10.0**power for power in powers for digit in (1, 2, 5)]
    across = [value for value in rounded if axes.get_xlim()[0] <= log10(value) <= unclaimed - UNCLAIMED + 0.25]
    if right > unclaimed:
        axes.set_xticks(
            [*(log10(value) for value in across), unclaimed], [*(f"{value:g}" for value in across), "nothing"]
        )
    else:
        axes.set_xticks([log10(value) for value in across], [f"{value:g}" for value in across])
    up = [10.0**power for power in powers]
    axes.set_yticks(
        [log10(value) for value in up],
        [f"≤ {value:g}" if value <= LEAST else f"≥ {value:g}" if value >= MOST else f"{value:g}" for value in up],
    )
    axes.set_xlabel("epsilon claimed; both axes are logarithmic", color=colour("muted"), fontsize=SMALL, labelpad=3)
    axes.grid(axis="y", color=colour("line"), linewidth=0.7)


def _places(points: Sequence[AuditPoint], unclaimed: float) -> list[float]:
    """Where each stands on the horizontal axis: at its claim, side by side where several claim the same."""
    own = [unclaimed if point.claimed is None else log10(point.claimed) for point in points]
    keys = [round(place, 2) for place in own]
    found = []
    for number, (place, key) in enumerate(zip(own, keys, strict=True)):
        same = [other for other, its in enumerate(keys) if its == key]
        found.append(place + BESIDE * (same.index(number) - (len(same) - 1) / 2))
    return found


def _draw(axes: Axes, point: AuditPoint, place: float, number: int) -> None:
    """Bound, estimate with its interval, and ceiling of one run, above its number."""
    ink = colour("loss" if point.contradicted else series_name(0))
    height = _height(point.certified)
    axes.plot([place], [height], "X" if point.contradicted else "o", color=ink, markersize=7, markeredgewidth=0)
    highest = height
    if point.estimate is not None:
        middle, low, high = map(_height, point.estimate)
        axes.plot([place, place], [low, high], color=ink, linewidth=1.0, alpha=0.6)
        axes.plot([place], [middle], "D", color=ink, markersize=5, markerfacecolor="none", markeredgewidth=1.2)
        highest = max(highest, high)
    top = _height(point.ceiling)
    axes.plot([place - 0.022, place + 0.022], [top, top], color=colour("muted"), linewidth=1.6)
    write_lines(axes, (place, max(highest, top)), str(number), align="center", shift=(0, 9))


def _height(value: float) -> float:
    return log10(min(max(value, LEAST), MOST))


def _listed(number: int, title: str, points: Sequence[AuditPoint]) -> str:
    """What a number stands for, with the certified and the estimated epsilon of each seed."""
    own = [point for point in points if point.title == title]
    certified = ", ".join(_short(point.certified) for point in own)
    estimates = ", ".join(MISSING if point.estimate is None else _short(point.estimate[0]) for point in own)
    found = "; contradicted" if any(point.contradicted for point in own) else ""
    return f"{number} {title}: at least {certified}, estimate {estimates}{found}"


def _short(value: float) -> str:
    return small_number(value) if isfinite(value) else "infinite"
