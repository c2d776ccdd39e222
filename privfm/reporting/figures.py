"""The figures people look for: utility by round, privacy against utility, attack against defense, cost.

Each is a list of panels as wide as a phone. One whose data is missing has no panels and says why.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from textwrap import wrap
from typing import TYPE_CHECKING, final

from privfm.reporting.drawing import (
    LARGE,
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
    spread_apart,
    write_lines,
)
from privfm.reporting.formats import bytes_text, seconds_text, small_number, utility_interval, utility_text
from privfm.reporting.summary import ArmResult, Experiment, finite

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HEADING = 40.0  # points above the axes
DOTTED = (0, (1, 2))


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
    """The four figures, in the order of the page."""
    figures = (utility_by_round, privacy_utility, attack_against_defense, cost)
    return tuple(figure(experiment) for figure in figures)


def utility_by_round(experiment: Experiment) -> FigureBlock:
    """Utility by round: one panel a group, the same axes in each; the plain arm in grey where it does not belong."""
    name, title = "rounds", "Utility by round"
    curves = {
        arm.arm.name: curve for arm in experiment.finished if not arm.centralised and len(curve := _curve(arm)) > 1
    }
    if not curves:
        return FigureBlock(name, title, "", (), (), "no federated arm was evaluated in two rounds or more")
    groups = dict.fromkeys(arm.arm.group for arm in experiment.finished if arm.arm.name in curves)
    with drawing_style():
        panels = tuple(_rounds_panel(experiment, curves, group, number) for number, group in enumerate(groups))
    several = len(experiment.index.seeds) > 1
    caption = (
        "All panels share their axes. "
        + ("Lines are means over seeds, thin lines single seeds. " if several else "")
        + "Grey: the plain federated arm, for comparison. Dotted: the centralised reference at its end."
    )
    return FigureBlock(name, title, caption, ("utility",), panels)


def privacy_utility(experiment: Experiment) -> FigureBlock:
    """Utility against epsilon on a log axis, with the federated arm without noise as a line."""
    name, title = "privacy", "Privacy against utility"
    arms = [arm for arm in experiment.private if arm.utility is not None]
    if not arms:
        return FigureBlock(name, title, "", (), (), "no finished arm has a privacy guarantee")
    kinds = {(record["unit"], record["adversary"], record["relation"]) for arm in arms if (record := arm.epsilon)}
    with drawing_style():
        panel = _privacy_panel(experiment, arms)
    several = len(experiment.index.seeds) > 1
    caption = (
        "Further left is more private. The line is the same training without noise. "
        + ("Bars run from the least to the greatest seed." if several else "Bars: 95 % interval of the test set.")
        + (" These guarantees differ in what they cover and are not comparable." if len(kinds) > 1 else "")
    )
    return FigureBlock(name, title, caption, ("epsilon.epsilon", "utility"), (panel,))


def attack_against_defense(experiment: Experiment) -> FigureBlock:
    """Utility by rule (row) and attack (column), with the score of each rule without attack in the first column."""
    name, title = "attacks", "Attack against defense"
    if not experiment.attacked:
        return FigureBlock(name, title, "", (), (), "no finished arm was attacked")
    with drawing_style():
        panel = _attack_panel(experiment)
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
        panels = [_cost_panel("Bytes a client sends", sent, bytes_text, log=True)] if sent else []
        panels += [_cost_panel("Time of the whole run", spent, seconds_text, log=False)] if spent else []
    if not panels:
        return FigureBlock(name, title, "", (), (), "no arm recorded bytes or seconds")
    caption = "Bytes on a log axis. Seconds are those of this simulation on this machine, not of a deployment."
    return FigureBlock(name, title, caption, ("bytes_up_per_client", "seconds_total"), tuple(panels))


Cell = tuple[str, str]  # setting, attack
Curve = list[tuple[int, float, list[float]]]  # rounds played, mean utility, utility of each seed


def _curve(arm: ArmResult) -> Curve:
    """Utility after each evaluated round, over the seeds that evaluated it."""
    by_round: dict[int, list[float]] = {}
    for rows in arm.rows.values():
        for row in rows:
            utility = finite(row.get("utility"))
            if utility is not None:
                by_round.setdefault(int(finite(row.get("round")) or 0) + 1, []).append(utility)
    return [(played, fmean(values), values) for played, values in sorted(by_round.items())]


def _rounds_panel(experiment: Experiment, curves: dict[str, Curve], group: str, number: int) -> Panel:
    from matplotlib.ticker import MaxNLocator

    members = [arm for arm in experiment.finished if arm.arm.group == group and arm.arm.name in curves]
    plain = experiment.plain
    background = [plain] if plain and plain not in members and plain.arm.name in curves else []
    series: dict[str, int | None] = {arm.arm.name: None for arm in background} | _series_numbers(experiment, members)
    ends = {arm.arm.name: curves[arm.arm.name][-1][1] for arm in [*members, *background]}
    texts = {arm.arm.name: _wrapped(_labelled(arm, ends[arm.arm.name]), 21) for arm in [*members, *background]}
    inner = max(140.0, sum(map(lines_height, texts.values())) + 4)
    figure, axes = canvas(HEADING + inner + 36, 32, 136, HEADING, 36)
    heading(figure, group or "All arms", _metric_title(members[0]))
    factor = _factor(members[0])
    axes.set_xlim(0, 1.02 * max(curve[-1][0] for curve in curves.values()))
    axes.set_ylim(*_shared_range(experiment, curves, factor))
    axes.set_xlabel("rounds", color=colour("muted"), fontsize=SMALL, labelpad=2)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.grid(axis="y", color=colour("line"), linewidth=0.7)
    reference = experiment.centralised
    if reference and reference.utility is not None:
        axes.axhline(factor * reference.utility, color=colour("muted"), linewidth=1.2, linestyle=DOTTED)
    for name, curve_series in series.items():
        _draw_curve(axes, curves[name], factor, curve_series)
    _label_ends(axes, inner, texts, {name: factor * end for name, end in ends.items()}, series)
    spoken = "; ".join(_labelled(arm, ends[arm.arm.name]) for arm in members)
    return render(figure, f"rounds{number}", f"Utility by round, {group or 'all arms'}. At the end: {spoken}.")


def _draw_curve(axes: Axes, curve: Curve, factor: float, series: int | None) -> None:
    """One arm's curve: a thin line for each seed if there are several, and their mean; the background arm in grey."""
    ink = _ink(series)
    if series is not None:
        for seed in range(max(len(values) for _, _, values in curve)):
            points = [(played, factor * values[seed]) for played, _, values in curve if seed < len(values)]
            axes.plot(*zip(*points, strict=True), color=colour(ink), linewidth=0.7, alpha=0.4)
    axes.plot(
        [played for played, _, _ in curve],
        [factor * mean for _, mean, _ in curve],
        color=colour(ink),
        linewidth=1.4 if series is None else 2.2,
        linestyle="solid" if series is None else series_dash(series),
    )


def _label_ends(
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


def _privacy_panel(experiment: Experiment, arms: Sequence[ArmResult]) -> Panel:
    factor, unit = _factor(arms[0]), str(arms[0].facts.get("utility_unit"))
    figure, axes = canvas(290, 32, 14, HEADING, 40)
    heading(figure, "Utility by epsilon", _metric_title(arms[0]))
    references = [
        (f"{utility_text(arm.utility, unit)} {words}", factor * arm.utility, style)
        for arm, words, style in (
            (experiment.plain, "without noise", "solid"),
            (experiment.centralised, "centralised", DOTTED),
        )
        if arm is not None and arm.utility is not None
    ]
    points = [(float((arm.epsilon or {})["epsilon"]), factor * (arm.utility or 0.0)) for arm in arms]
    ends = [[factor * end for end in _bar(arm)] for arm in arms]
    _set_epsilon_axis(axes, [epsilon for epsilon, _ in points])
    reached = [height for _, height, _ in references] + [end for bar in ends for end in bar]
    room = max(reached) - min(reached) or 1.0
    axes.set_ylim(min(reached) - 0.45 * room, max(reached) + 0.15 * room)
    for _, height, style in references:
        axes.axhline(height, color=colour("muted"), linewidth=1.2, linestyle=style)
    heights = [height / room * 200 for _, height, _ in references]
    for (text, height, _), centre in zip(
        references, spread_apart(heights, [14] * len(heights), -1e9, 1e9), strict=True
    ):
        write_lines(axes, (0, height), text, ink="muted", shift=(3, centre - height / room * 200 + 7), across=True)
    axes.plot(*zip(*points, strict=True), "o-", color=colour("blue"), markersize=7, linewidth=1.2)
    for arm, (epsilon, _), bar in zip(arms, points, ends, strict=True):
        axes.plot([epsilon, epsilon], bar, color=colour("blue"), linewidth=1.4, alpha=0.6)
        text = _wrapped(_labelled(arm, arm.utility or 0.0), 20)
        write_lines(axes, (epsilon, bar[0]), text, ink="blue", align="center", shift=(0, -6 - lines_height(text) / 2))
    spoken = [
        f"epsilon {small_number(point[0])}: {_labelled(arm, arm.utility or 0.0)}"
        for arm, point in zip(arms, points, strict=True)
    ]
    return render(figure, "privacy", f"Utility by epsilon. {'; '.join(spoken + [text for text, _, _ in references])}.")


def _set_epsilon_axis(axes: Axes, epsilons: Sequence[float]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axes.set_xscale("log")
    axes.set_xlim(min(epsilons) / 2, max(epsilons) * 2)
    axes.xaxis.set_major_locator(FixedLocator(epsilons))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: small_number(value)))
    axes.set_xlabel("epsilon, log axis; left is more private", color=colour("muted"), fontsize=SMALL, labelpad=3)


def _attack_panel(experiment: Experiment) -> Panel:
    rows, attacks, cells = _attack_grid(experiment)
    facts = experiment.attacked[0].facts
    unit = str(facts.get("utility_unit"))
    lost = _losses(cells, bool(facts.get("higher_is_better", True)), finite(facts.get("trivial_utility")))
    columns = ["", *attacks]
    headers = [_wrapped(attack or "no attack", 13) for attack in columns]
    top = HEADING + max(map(lines_height, headers)) + 4
    figure, axes = canvas(top + 38 * len(rows) + 4, 92, 2, top, 4)
    heading(figure, "Rule by attack", _metric_title(experiment.attacked[0]))
    axes.set_xlim(0, len(columns))
    axes.set_ylim(len(rows), 0)
    axes.axis("off")
    for column, header in enumerate(headers):
        write_lines(
            axes, (column + 0.5, 0), header, ink="muted", align="center", shift=(0, 2 + lines_height(header) / 2)
        )
    for line, row in enumerate(rows):
        write_lines(axes, (0, line + 0.5), _wrapped(row, 15), align="right", shift=(-6, 0))
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
    """Row names, attack names, and utility by (row, attack), with "" for no attack.

    Rows are the settings (rule, channel, guarantee) under attack, and clean rules over the same channels: a rule's
    price without attack belongs there even if nobody attacked it.
    """
    attacked = experiment.attacked
    channels = {arm.facts.get("channel") for arm in attacked}
    clean = [arm for arm in experiment.clean_rules if arm.facts.get("channel") in channels]
    partners = [partner for arm in attacked if (partner := experiment.clean_partner(arm))]
    names = {arm.setting: _setting_name(arm, len(channels) > 1) for arm in [*clean, *partners, *attacked]}
    cells: dict[Cell, float] = {}
    attacks: dict[str, None] = {}
    for arm in [*clean, *partners, *attacked]:
        attack = experiment.attack_title(arm) if arm.attacked else ""
        if attack:
            attacks[attack] = None
        if arm.utility is not None:
            cells.setdefault((names[arm.setting], attack), arm.utility)
    return list(dict.fromkeys(names.values())), list(attacks), cells


def _setting_name(arm: ArmResult, with_channel: bool) -> str:
    parts = [str(arm.facts["rule_name"])]
    parts += [str(arm.facts["channel_name"])] if with_channel else []
    parts += [f"epsilon {small_number(arm.epsilon['epsilon'])}"] if arm.epsilon else []
    return ", ".join(parts)


def _cost_panel(title: str, amounts: Sequence[tuple[str, float]], write: Callable[[float], str], log: bool) -> Panel:
    """One line an arm. On a log axis dots, not bars: there is no zero for a bar to start from."""
    labels = [_wrapped(label, 23) for label, _ in amounts]
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
    values = [value for curve in curves.values() for _, _, seeds in curve for value in seeds]
    arms = [arm for arm in experiment.finished if arm.arm.name in curves or arm is experiment.centralised]
    values += [value for arm in arms for value in (*arm.values("trivial_utility").values(), *arm.utilities.values())]
    margin = 0.04 * (max(values) - min(values)) or 0.01
    return factor * (min(values) - margin), factor * (max(values) + margin)


def _bar(arm: ArmResult) -> tuple[float, float]:
    """Ends of an arm's bar: the test set's interval for one seed, least and greatest for several."""
    values = list(arm.utilities.values())
    return utility_interval(arm) or (min(values), max(values))


def _factor(arm: ArmResult) -> float:
    return 100.0 if arm.facts.get("utility_unit") == "share" else 1.0


def _metric_title(arm: ArmResult) -> str:
    unit = arm.facts.get("utility_unit")
    return f"{arm.facts.get('utility_metric')}, {'%' if unit == 'share' else unit}"


def _labelled(arm: ArmResult, value: float) -> str:
    """Value first, so that the values of several labels stand in one column."""
    return f"{utility_text(value, str(arm.facts.get('utility_unit'))).removesuffix(' %')} {arm.title}"


def _wrapped(text: str, width: int) -> str:
    return "\n".join(wrap(text, width)) or " "
