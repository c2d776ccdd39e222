"""The drawings behind the figures: one panel each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from re import sub
from statistics import fmean
from textwrap import wrap
from typing import TYPE_CHECKING, final

from privfm.reporting.drawing import (
    LARGE,
    SMALL,
    Panel,
    canvas,
    colour,
    heading,
    lines_height,
    render,
    series_dash,
    series_name,
    spread_apart,
    write_lines,
)
from privfm.reporting.formats import small_number, utility_interval, utility_text
from privfm.reporting.robustness import settings
from privfm.reporting.summary import ArmResult, Experiment, finite

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HEADING = 40.0  # points above the axes
DOTTED = (0, (1, 2))

Cell = tuple[str, str]  # setting, attack

UPRIGHT = 4
"""Columns of the heat map from which on their titles stand upright."""

WORST = "worst case"
"""Title of the last column of the heat map."""


@final
@dataclass(frozen=True)
class Curve:
    """Utility by number of rounds played: the mean over the seeds that were evaluated then, and each seed's own."""

    mean: dict[int, float]
    seeds: tuple[dict[int, float], ...]

    @property
    def end(self) -> float:
        """Mean after the last evaluated round."""
        return self.mean[max(self.mean)]


def utility_curves(experiment: Experiment) -> dict[str, Curve]:
    """Curves of the federated arms that were evaluated in two rounds or more, by name of the arm."""
    curves = {arm.arm.name: _curve(arm) for arm in experiment.finished if not arm.centralised}
    return {name: curve for name, curve in curves.items() if len(curve.mean) > 1}


def _curve(arm: ArmResult) -> Curve:
    seeds = tuple(
        {
            int(finite(row.get("round")) or 0) + 1: utility
            for row in rows
            if (utility := finite(row.get("utility"))) is not None
        }
        for rows in arm.rows.values()
    )
    evaluated = sorted({played for seed in seeds for played in seed})
    return Curve({played: fmean(seed[played] for seed in seeds if played in seed) for played in evaluated}, seeds)


def rounds_panel(experiment: Experiment, curves: dict[str, Curve], group: str, number: int) -> Panel:
    """Utility by round of one group of arms, with the plain arm in grey and the centralised reference dotted."""
    from matplotlib.ticker import MaxNLocator

    members = [arm for arm in experiment.finished if arm.arm.group == group and arm.arm.name in curves]
    plain = experiment.plain
    background = [plain] if plain and plain not in members and plain.arm.name in curves else []
    series: dict[str, int | None] = {arm.arm.name: None for arm in background} | _series_numbers(experiment, members)
    ends = {arm.arm.name: curves[arm.arm.name].end for arm in [*members, *background]}
    texts = {arm.arm.name: wrapped(_labelled(arm, ends[arm.arm.name]), 21) for arm in [*members, *background]}
    inner = max(140.0, sum(map(lines_height, texts.values())) + 4)
    figure, axes = canvas(HEADING + inner + 36, 32, 136, HEADING, 36)
    heading(figure, group or "All arms", metric_title(members[0]))
    factor = factor_of(members[0])
    axes.set_xlim(0, 1.02 * max(max(curve.mean) for curve in curves.values()))
    axes.set_ylim(*_shared_range(experiment, curves, factor))
    axes.set_xlabel("rounds", color=colour("muted"), fontsize=SMALL, labelpad=2)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.grid(axis="y", color=colour("line"), linewidth=0.7)
    reference = experiment.centralised
    if reference and reference.utility is not None:
        axes.axhline(factor * reference.utility, color=colour("muted"), linewidth=1.2, linestyle=DOTTED)
    for name, curve_series in series.items():
        _draw_curve(axes, curves[name], factor, curve_series)
    label_ends(axes, inner, texts, {name: factor * end for name, end in ends.items()}, series)
    spoken = "; ".join(_labelled(arm, ends[arm.arm.name]) for arm in members)
    return render(figure, f"rounds{number}", f"Utility by round, {group or 'all arms'}. At the end: {spoken}.")


def _draw_curve(axes: Axes, curve: Curve, factor: float, series: int | None) -> None:
    """One arm's curve: a thin line for each seed if there are several, and their mean; the background arm in grey."""
    ink = _ink(series)
    if series is not None and len(curve.seeds) > 1:
        for seed in curve.seeds:
            points = [factor * value for value in seed.values()]
            axes.plot(list(seed), points, color=colour(ink), linewidth=0.7, alpha=0.4)
    axes.plot(
        list(curve.mean),
        [factor * value for value in curve.mean.values()],
        color=colour(ink),
        linewidth=1.4 if series is None else 2.2,
        linestyle="solid" if series is None else series_dash(series),
    )


def label_ends(
    axes: Axes, inner: float, texts: dict[str, str], ends: dict[str, float], series: dict[str, int | None]
) -> None:
    """Writes each curve's name beside its end, moved apart where they would overlap, with a line that leads there."""
    low, high = axes.get_ylim()
    wanted = [(ends[name] - low) / (high - low) * inner for name in texts]
    centres = spread_apart(wanted, [lines_height(text) for text in texts.values()], 0, inner)
    for (name, text), start, centre in zip(texts.items(), wanted, centres, strict=True):
        ink = _ink(series[name])
        ys = [low + place / inner * (high - low) for place in (start, centre)]
        transform = axes.get_yaxis_transform()
        axes.plot([0.99, 1.05], ys, transform=transform, color=colour(ink), linewidth=0.8, clip_on=False)
        write_lines(axes, (1.065, ys[1]), text, ink=ink, across=True)


def _ink(series: int | None) -> str:
    return "muted" if series is None else series_name(series)


def privacy_panel(experiment: Experiment, arms: Sequence[ArmResult], comparable: bool) -> Panel:
    """Utility by epsilon, the points joined if their guarantees are comparable; the arms without noise as lines."""
    factor, unit = factor_of(arms[0]), str(arms[0].facts.get("utility_unit"))
    figure, axes = canvas(290, 32, 14, HEADING, 40)
    heading(figure, "Utility by epsilon", metric_title(arms[0]))
    lines = ((experiment.plain, "without noise", "solid"), (experiment.centralised, "centralised", DOTTED))
    references = [
        (f"{utility_text(arm.utility, unit)} {words}", factor * arm.utility, dash)
        for arm, words, dash in lines
        if arm is not None and arm.utility is not None
    ]
    points = [(float((arm.epsilon or {})["epsilon"]), factor * (arm.utility or 0.0)) for arm in arms]
    texts = [_labelled(arm, arm.utility or 0.0) for arm in arms]
    bars = [[factor * end for end in bar_of(arm)] for arm in arms]
    reached = [height for _, height, _ in references] + [end for bar in bars for end in bar]
    room = max(reached) - min(reached) or 1.0
    axes.set_ylim(min(reached) - 0.45 * room, max(reached) + 0.15 * room)
    _set_epsilon_axis(axes, [epsilon for epsilon, _ in points])
    for text, height, dash in references:
        axes.axhline(height, color=colour("muted"), linewidth=1.2, linestyle=dash)
        write_lines(axes, (0, height), text, ink="muted", shift=(3, 7), across=True)
    style = "o-" if comparable else "o"
    axes.plot(*zip(*points, strict=True), style, color=colour("blue"), markersize=7, linewidth=1.2)
    for (epsilon, _), bar, text in zip(points, bars, [wrapped(text, 20) for text in texts], strict=True):
        axes.plot([epsilon, epsilon], bar, color=colour("blue"), linewidth=1.4, alpha=0.6)
        write_lines(axes, (epsilon, bar[0]), text, ink="blue", align="center", shift=(22, -6 - lines_height(text) / 2))
    spoken = [f"epsilon {small_number(epsilon)}: {text}" for (epsilon, _), text in zip(points, texts, strict=True)]
    return render(figure, "privacy", f"Utility by epsilon. {'; '.join(spoken + [text for text, _, _ in references])}.")


def _set_epsilon_axis(axes: Axes, epsilons: Sequence[float]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axes.set_xscale("log")
    axes.set_xlim(min(epsilons) / 2, max(epsilons) * 2.6)
    axes.xaxis.set_major_locator(FixedLocator(epsilons))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: small_number(value)))
    axes.set_xlabel("epsilon, log axis; left is more private", color=colour("muted"), fontsize=SMALL, labelpad=3)


def attack_panel(experiment: Experiment) -> Panel:
    """Utility by rule (row) and attack (column); the redder, the more is lost."""
    rows, attacks, cells = _attack_grid(experiment)
    facts = experiment.attacked[0].facts
    unit = str(facts.get("utility_unit"))
    lost = _losses(cells, bool(facts.get("higher_is_better", True)), finite(facts.get("trivial_utility")))
    columns = ["", *attacks]
    upright = len(columns) > UPRIGHT
    headers = [_named(attack or "no attack", 40 if upright else 13) for attack in columns]
    top = HEADING + 4 + (6 * max(map(len, headers)) if upright else max(map(lines_height, headers)))
    labels = [_named(row, 22 if upright else 15) for row in rows]
    line_height = max(30 if upright else 38, 4 + max(map(lines_height, labels)))
    figure, axes = canvas(top + line_height * len(rows) + 4, 128 if upright else 92, 2, top, 4)
    heading(figure, "Rule by attack", metric_title(experiment.attacked[0]))
    axes.set_xlim(0, len(columns))
    axes.set_ylim(len(rows), 0)
    axes.axis("off")
    for column, header in enumerate(headers):
        if upright:
            place = (column + 0.5, -4 / line_height)
            axes.text(*place, header, rotation=90, color=colour("muted"), fontsize=SMALL, ha="center", va="bottom")
        else:
            shift = (0, 2 + lines_height(header) / 2)
            write_lines(axes, (column + 0.5, 0), header, ink="muted", align="center", shift=shift)
    for line, (row, label) in enumerate(zip(rows, labels, strict=True)):
        write_lines(axes, (0, line + 0.5), label, align="right", shift=(-6, 0))
        for column, attack in enumerate(columns):
            _draw_cell(axes, column, line, utility_text(cells.get((row, attack)), unit), lost.get((row, attack)))
    spoken = [f"{row}, {attack or 'no attack'}: {utility_text(cells[row, attack], unit)}" for row, attack in cells]
    return render(figure, "attacks", f"Utility of each rule under each attack. {'; '.join(spoken)}.")


def _draw_cell(axes: Axes, column: int, line: int, text: str, lost: float | None) -> None:
    from matplotlib.patches import Rectangle

    corner, width, height = (column + 0.03, line + 0.04), 0.94, 0.92
    fill = colour("loss") if lost is not None else "none"
    axes.add_patch(Rectangle(corner, width, height, facecolor=fill, alpha=0.6 * (lost or 0.0), linewidth=0))
    axes.add_patch(Rectangle(corner, width, height, facecolor="none", edgecolor=colour("line"), linewidth=0.8))
    if lost is not None:
        write_lines(axes, (column + 0.5, line + 0.5), text.removesuffix(" %"), align="center", size=LARGE)


def _losses(cells: dict[Cell, float], higher_is_better: bool, trivial: float | None) -> dict[Cell, float]:
    """How much of the way from the best cell to the trivial model (or the worst cell) each cell lost, from 0 to 1."""
    sign = 1 if higher_is_better else -1
    scores = [sign * value for value in cells.values()]
    best, worst = max(scores), min(scores if trivial is None else [*scores, sign * trivial])
    return {cell: (best - sign * value) / (best - worst or 1.0) for cell, value in cells.items()}


def _attack_grid(experiment: Experiment) -> tuple[list[str], list[str], dict[Cell, float]]:
    """Row names, column names, and utility by (row, column), with "" for no attack and `WORST` in the last column."""
    cells: dict[Cell, float] = {}
    found = settings(experiment)
    attacks = list(dict.fromkeys(title for setting in found for title in setting.attacked))
    for setting in found:
        arms = {"": setting.clean, **setting.attacked}
        if len(attacks) > 1 and setting.worst is not None:
            arms[WORST] = setting.worst[1]
        for column, arm in arms.items():
            if arm is not None and arm.utility is not None:
                cells.setdefault((setting.name, column), arm.utility)
    columns = [*attacks, WORST] if len(attacks) > 1 else attacks
    return list(dict.fromkeys(setting.name for setting in found)), columns, cells


def cost_panel(title: str, amounts: Sequence[tuple[str, float]], write: Callable[[float], str], log: bool) -> Panel:
    """One line an arm. On a log axis dots, not bars: there is no zero for a bar to start from."""
    labels = [wrapped(label, 23) for label, _ in amounts]
    heights = [lines_height(label) + 6 for label in labels]
    total = sum(heights)
    figure, axes = canvas(HEADING + total + 8, 142, 58, HEADING, 8)
    heading(figure, title, "log axis" if log else "")
    axes.spines["bottom"].set_visible(False)
    axes.set_ylim(total, 0)
    axes.set_yticks([])
    values = [value for _, value in amounts]
    places = [sum(heights[:line]) + heights[line] / 2 for line in range(len(amounts))]
    if log:
        axes.set_xscale("log")
        axes.set_xlim(min(values) / 1.5, max(values) * 1.5)
        axes.hlines(places, *axes.get_xlim(), color=colour("line"), linewidth=0.8)
        axes.plot(values, places, "o", color=colour("blue"), markersize=7)
    else:
        axes.set_xlim(0, max(*values, 1e-9))
        axes.barh(places, values, height=9, color=colour("blue"), alpha=0.8)
    axes.set_xticks([])
    axes.set_xticks([], minor=True)
    transform = axes.get_yaxis_transform()
    for place, label, value in zip(places, labels, values, strict=True):
        axes.text(
            -0.04, place, label, transform=transform, color=colour("ink"), fontsize=SMALL, ha="right", va="center"
        )
        axes.text(1.04, place, write(value), transform=transform, color=colour("muted"), fontsize=SMALL, va="center")
    spoken = "; ".join(f"{label}: {write(value)}" for label, value in amounts)
    return render(figure, title.split(maxsplit=1)[0].lower(), f"{title}. {spoken}.")


def _series_numbers(experiment: Experiment, members: Sequence[ArmResult]) -> dict[str, int]:
    """Which colour each arm of a panel has: its rule's, the same in every panel, if the rules tell the arms apart."""
    rules = [str(arm.facts.get("rule_name")) for arm in members]
    order = list(dict.fromkeys(str(arm.facts.get("rule_name")) for arm in experiment.finished if not arm.centralised))
    if len(set(rules)) == len(rules):
        return {arm.arm.name: order.index(rule) for arm, rule in zip(members, rules, strict=True)}
    return {arm.arm.name: number for number, arm in enumerate(members)}


def _shared_range(experiment: Experiment, curves: dict[str, Curve], factor: float) -> tuple[float, float]:
    """The utility axis of every panel: from the trivial model's score up to the best."""
    values = [value for curve in curves.values() for seed in curve.seeds for value in seed.values()]
    arms = [arm for arm in experiment.finished if arm.arm.name in curves or arm is experiment.centralised]
    values += [value for arm in arms for value in (*arm.values("trivial_utility").values(), *arm.utilities.values())]
    margin = 0.04 * (max(values) - min(values)) or 0.01
    return factor * (min(values) - margin), factor * (max(values) + margin)


def bar_of(arm: ArmResult) -> tuple[float, float]:
    """Ends of an arm's bar: the test set's interval for one seed, least and greatest for several."""
    values = list(arm.utilities.values())
    return utility_interval(arm) or (min(values), max(values))


def factor_of(arm: ArmResult) -> float:
    return 100.0 if arm.facts.get("utility_unit") == "share" else 1.0


def metric_title(arm: ArmResult) -> str:
    unit = arm.facts.get("utility_unit")
    return f"{arm.facts.get('utility_metric')}, {'%' if unit == 'share' else unit}"


def _labelled(arm: ArmResult, value: float) -> str:
    """Value first, so that the values of several labels stand in one column."""
    return f"{utility_text(value, str(arm.facts.get('utility_unit'))).removesuffix(' %')} {arm.title}"


def _named(name: str, width: int) -> str:
    """A class name on lines of at most `width` letters; one that is longer is broken between its words."""
    return wrapped(name if len(name) <= width else sub(r"(?<=[a-z])(?=[A-Z])", " ", name), width)


def wrapped(text: str, width: int) -> str:
    return "\n".join(wrap(text, width)) or " "
