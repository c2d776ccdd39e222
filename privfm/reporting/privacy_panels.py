"""The drawings about epsilon: utility against it with a line a method, and how it grows with the rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isinf, log10
from typing import TYPE_CHECKING

from privfm.reporting.drawing import (
    SMALL,
    Panel,
    canvas,
    colour,
    heading,
    lines_height,
    render,
    series_dash,
    series_name,
)
from privfm.reporting.formats import small_number, utility_text
from privfm.reporting.noise_lines import NO_NOISE, UNITS, NoiseLine, epsilon_name, epsilon_of
from privfm.reporting.panels import HEADING, bar_of, factor_of, label_ends, metric_title, wrapped
from privfm.reporting.summary import ArmResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BEYOND = 0.35
"""Decades from the largest epsilon to the place of what has no noise."""

RIGHT = 124  # points for labels at the lines' ends

Curve = tuple[tuple[float, float], ...]
"""`(rounds, epsilon)`, rising."""


def lines_panel(lines: Sequence[NoiseLine], order: Sequence[str], name: str) -> Panel:
    """Utility by epsilon: a line for each method under one unit, the arms without noise at the right.

    Args:
      lines: of one unit.
      order: titles of all lines, so that a method has one colour in every panel.
      name: prefix of identifiers.
    """
    first = lines[0].arms[0]
    factor, unit = factor_of(first), str(first.facts.get("utility_unit"))
    ends = {line.title: factor * (line.arms[-1].utility or 0.0) for line in lines}
    texts = {line.title: wrapped(f"{_number(line.arms[-1].utility, unit)} {line.title}", 19) for line in lines}
    inner = max(190.0, sum(map(lines_height, texts.values())) + 4)
    figure, axes = canvas(HEADING + inner + 40, 32, RIGHT, HEADING, 40)
    heading(figure, f"Utility by epsilon: {UNITS[lines[0].unit]}", metric_title(first))
    finite = [epsilon_of(arm) for line in lines for arm in line.arms if not isinf(epsilon_of(arm))]
    beyond = log10(max(finite)) + BEYOND
    bars = [factor * end for line in lines for arm in line.arms for end in bar_of(arm)]
    margin = 0.05 * (max(bars) - min(bars)) or 1.0
    axes.set_ylim(min(bars) - margin, max(bars) + margin)
    axes.set_xlim(log10(min(finite)) - 0.1, beyond + 0.06)
    ticks = {epsilon_name(arm): _place(arm, beyond) for line in lines for arm in line.arms}
    _name_ticks(axes, ticks)
    axes.set_xlabel("epsilon, log axis; left is more private", color=colour("muted"), fontsize=SMALL, labelpad=3)
    axes.grid(axis="y", color=colour("line"), linewidth=0.7)
    for line in lines:
        number = order.index(line.title)
        _draw_line(axes, line, factor, beyond, number)
    label_ends(axes, inner, texts, ends, {line.title: order.index(line.title) for line in lines})
    spoken = [f"{line.title}: {', '.join(_point(arm, unit) for arm in line.arms)}" for line in lines]
    return render(figure, name, f"Utility by epsilon, {UNITS[lines[0].unit]}. {'; '.join(spoken)}.")


def _draw_line(axes: Axes, line: NoiseLine, factor: float, beyond: float, number: int) -> None:
    """Points joined where there is noise, a bar each, and a dotted way to the point without."""
    ink = colour(series_name(number))
    points = [(_place(arm, beyond), factor * (arm.utility or 0.0)) for arm in line.arms]
    noisy = [point for arm, point in zip(line.arms, points, strict=True) if not isinf(epsilon_of(arm))]
    axes.plot(*zip(*noisy, strict=True), color=ink, linewidth=1.8, linestyle=series_dash(number))
    axes.plot(*zip(*points[len(noisy) - 1 :], strict=True), color=ink, linewidth=1.0, linestyle=(0, (1, 2)))
    axes.plot(*zip(*points, strict=True), "o", color=ink, markersize=5)
    for arm, (place, _) in zip(line.arms, points, strict=True):
        axes.plot([place, place], [factor * end for end in bar_of(arm)], color=ink, linewidth=1.0, alpha=0.5)


def epsilon_panel(curves: Sequence[tuple[str, Curve]], unit: str, name: str) -> Panel:
    """Epsilon by rounds played, on a log axis.

    Args:
      curves: title and `(rounds, epsilon)`.
      unit: what is protected.
      name: prefix of identifiers.
    """
    from matplotlib.ticker import MaxNLocator

    keys = [str(number) for number in range(len(curves))]
    words = [f"{small_number(curve[-1][1])} {title}".strip() for title, curve in curves]
    texts = {key: wrapped(text, 19) for key, text in zip(keys, words, strict=True)}
    ends = {key: log10(curve[-1][1]) for key, (_, curve) in zip(keys, curves, strict=True)}
    inner = max(140.0, sum(map(lines_height, texts.values())) + 4)
    figure, axes = canvas(HEADING + inner + 36, 36, RIGHT, HEADING, 36)
    heading(figure, f"Epsilon by round: {UNITS.get(unit, unit)}", "log axis; at the end of the lines: after all rounds")
    levels = [log10(epsilon) for _, curve in curves for _, epsilon in curve]
    margin = 0.05 * (max(levels) - min(levels)) or 0.1
    low, high = min(levels) - margin, max(levels) + margin
    axes.set_ylim(low, high)
    axes.set_xlim(0, 1.02 * max(played for _, curve in curves for played, _ in curve))
    axes.set_xlabel("rounds", color=colour("muted"), fontsize=SMALL, labelpad=2)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    shown = [value for value in _ROUND_VALUES if low <= log10(value) <= high]
    axes.set_yticks([log10(value) for value in shown], [small_number(value) for value in shown])
    axes.grid(axis="y", color=colour("line"), linewidth=0.7)
    for number, (_, curve) in enumerate(curves):
        played, spent = zip(*curve, strict=True)
        ink, dash = colour(series_name(number)), series_dash(number)
        axes.plot(played, [log10(epsilon) for epsilon in spent], color=ink, linewidth=1.8, linestyle=dash)
    label_ends(axes, inner, texts, ends, {key: number for number, key in enumerate(keys)})
    return render(figure, name, f"Epsilon by rounds played, {UNITS.get(unit, unit)}. At the end: {'; '.join(words)}.")


_ROUND_VALUES = tuple(digit * 10.0**power for power in range(-4, 4) for digit in (1, 2, 5))


def _place(arm: ArmResult, beyond: float) -> float:
    value = epsilon_of(arm)
    return beyond if isinf(value) else log10(value)


def _name_ticks(axes: Axes, ticks: Mapping[str, float]) -> None:
    axes.set_xticks(list(ticks.values()), [name.replace(NO_NOISE, "none") for name in ticks])
    axes.set_xticks([], minor=True)


def _point(arm: ArmResult, unit: str) -> str:
    return f"{utility_text(arm.utility, unit)} at {epsilon_name(arm)}"


def _number(value: float | None, unit: str) -> str:
    return utility_text(value, unit).removesuffix(" %")
