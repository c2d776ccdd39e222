"""How a round grows with the cohort and the population: panels with logarithmic axes, a line a width or channel."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, floor, log10

from privfm.reporting.drawing import (
    SMALL,
    Panel,
    canvas,
    colour,
    drawing_style,
    heading,
    render,
    series_dash,
    series_name,
)
from privfm.reporting.formats import small_number
from privfm.reporting.panels import DOTTED, HEADING, label_ends, wrapped
from privfm.reporting.scales import BATCH, EVERY, MASKED, PLAIN, Point, best

Places = Sequence[tuple[float, float]]
"""Points of a line: across and up."""


def figures(points: Sequence[Point]) -> dict[str, Panel]:
    """Panels by name of the file: memory and time by cohort; time by population, where there are several."""
    ready = best(points)
    most = max(point.setting.population for point in ready)
    usual = [point for point in ready if point.setting.batch == BATCH]
    largest = [point for point in usual if point.setting.population == most]
    where = f"population {most:,}"
    smaller = [p for p in usual if p.setting.channel == PLAIN and p.setting.population < most]
    with drawing_style():
        found = {
            "memory": panel("Memory of a round, MB", where, "cohort", memory_lines(largest), all_rows(largest)),
            "time": panel("Seconds of a round", f"processor, one thread, {where}", "cohort", time_lines(largest), {}),
        }
        if smaller:
            cohort = max(point.setting.cohort for point in smaller)
            lines = population_lines(usual, cohort, widths(smaller))
            found["population"] = panel("Seconds of a round", f"cohort {cohort}", "population", lines, {})
    return found


def widths(points: Sequence[Point]) -> list[int]:
    """Parameters, the most first."""
    return sorted({point.setting.parameters for point in points}, reverse=True)


def of(points: Sequence[Point], channel: str, parameters: int) -> list[Point]:
    """Those of one channel and width, in order."""
    return [p for p in points if (p.setting.channel, p.setting.parameters) == (channel, parameters)]


def plain_widths(points: Sequence[Point]) -> list[int]:
    """Parameters that were played in the clear, the most first."""
    return widths([point for point in points if point.setting.channel == PLAIN])


def width_name(parameters: int) -> str:
    """Name of a line: `d = 1e6`."""
    return f"d = {parameters:.0e}".replace("e+0", "e")


def memory_lines(points: Sequence[Point]) -> dict[str, Places]:
    """A line a width in the clear, and the other channels at the largest."""
    every = plain_widths(points)
    names = {width_name(d): (PLAIN, d) for d in every}
    names |= {"masks": (MASKED, every[0]), "every row kept": (EVERY, every[0])}
    return {
        name: [(p.setting.cohort, p.memory / 1e6) for p in of(points, *which) if p.memory]
        for name, which in names.items()
    }


def all_rows(points: Sequence[Point]) -> dict[str, Places]:
    """What the largest rows of a whole cohort would take."""
    wide = plain_widths(points)[0]
    cohorts = [point.setting.cohort for point in of(points, PLAIN, wide)]
    return {"all rows": [(n, 4 * wide * n / 1e6) for n in (min(cohorts), max(cohorts))]}


def time_lines(points: Sequence[Point]) -> dict[str, Places]:
    """A line a width in the clear, and masks at the largest; a rule that keeps rows takes as long as the plain sum."""
    every = plain_widths(points)
    names = {width_name(d): (PLAIN, d) for d in every} | {"masks": (MASKED, every[0])}
    return {name: [(p.setting.cohort, p.seconds) for p in of(points, *which)] for name, which in names.items()}


def population_lines(points: Sequence[Point], cohort: int, every: Sequence[int]) -> dict[str, Places]:
    """A line a width: seconds of one cohort in the clear."""
    own = [point for point in points if point.setting.cohort == cohort]
    return {width_name(d): sorted((p.setting.population, p.seconds) for p in of(own, PLAIN, d)) for d in every}


def panel(title: str, subtitle: str, across: str, lines: dict[str, Places], limits: dict[str, Places]) -> Panel:
    """A line a name, both axes logarithmic; limits are dotted."""
    names = {name: places for name, places in {**lines, **limits}.items() if places}
    texts = {name: wrapped(name, 18) for name in names}
    inner = 170.0
    figure, axes = canvas(HEADING + inner + 36, 50, 112, HEADING, 36)
    heading(figure, title, subtitle)
    logs = {name: [(x, log10(y)) for x, y in sorted(places)] for name, places in names.items()}
    heights = [y for places in logs.values() for _, y in places]
    low, high = floor(min(heights)), ceil(max(heights) + 1e-9)
    axes.set_ylim(low, high)
    axes.set_yticks(range(low, high + 1), [f"{10.0**power:g}" for power in range(low, high + 1)])
    axes.set_xscale("log")
    ticks = sorted({x for places in logs.values() for x, _ in places})
    axes.set_xticks(ticks, [f"{x:,.0f}" if x < 10_000 else f"{x:.0e}".replace("e+0", "e") for x in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlabel(across, color=colour("muted"), fontsize=SMALL, labelpad=2)
    axes.grid(axis="y", color=colour("line"), linewidth=0.7)
    series: dict[str, int | None] = {name: number for number, name in enumerate(lines) if name in names}
    for name, places in logs.items():
        number = series.setdefault(name, None)
        ink = colour("muted" if number is None else series_name(number))
        dash = DOTTED if number is None else series_dash(number)
        axes.plot(*zip(*places, strict=True), color=ink, linewidth=1.6, linestyle=dash)
        if number is not None:
            axes.plot(*zip(*places, strict=True), "o", color=ink, markersize=3)
    ends = {name: places[-1][1] for name, places in logs.items()}
    label_ends(axes, inner, texts, ends, series)
    spoken = "; ".join(f"{name}: {small_number(10**end)}" for name, end in ends.items())
    return render(figure, across, f"{title}, {subtitle}, by {across}. At the end: {spoken}.")
