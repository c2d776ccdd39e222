"""What a channel costs, point by point: the record, its tables and its figures."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from math import ceil, floor, log10
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, final

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
from privfm.reporting.formats import bytes_text, small_number
from privfm.reporting.panels import DOTTED, HEADING, cost_panel, label_ends, wrapped
from privfm.reporting.table import Column, ReportTable, TableRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Kind = Literal["measured", "left out", "projected", "refused"]
"""Played; too dear to be played; drawn on from played ones; or no such channel exists."""


@final
@dataclass(frozen=True)
class Cost:
    """One point. Seconds are those of the processor, errors are over the largest absolute coordinate.

    Attributes:
      channel: title.
      clients: that were asked.
      parameters: width of an update.
      kind: measured, left out, projected or refused.
      why: of a point without numbers, or what a projection is made of.
      estimate: seconds of the whole round, before it was played.
      client_seconds: of one client, in all stages.
      server_seconds: of the server for all clients.
      key_holder_seconds: of the key holder.
      up: bytes a client sends.
      down: bytes a client gets, without the model.
      largest_error: of a coordinate of the mean.
      deviation: standard deviation of that error.
      relative_error: L2 norm of the error over that of the mean.
      noise: deviation of a plan's noise, which is in `deviation`.
      wrap: probability with which a coordinate leaves the modulus.
      memory: bytes the process grew by.
      neighbours: of each client.
      stages: seconds and bytes of every stage, of all its parties together.
    """

    channel: str
    clients: int
    parameters: int
    kind: Kind = "measured"
    why: str = ""
    estimate: float | None = None
    client_seconds: float | None = None
    server_seconds: float | None = None
    key_holder_seconds: float | None = None
    up: float | None = None
    down: float | None = None
    largest_error: float | None = None
    deviation: float | None = None
    relative_error: float | None = None
    noise: float | None = None
    wrap: float | None = None
    memory: int | None = None
    neighbours: int | None = None
    stages: tuple[dict[str, Any], ...] = ()

    @property
    def seconds(self) -> float:
        """Of the whole round, all parties one after the other."""
        each = (self.client_seconds or 0.0) * self.clients
        return each + (self.server_seconds or 0.0) + (self.key_holder_seconds or 0.0)


COLUMNS = (
    Column("Channel", "channel", "channel"),
    Column("Clients", "n", "clients"),
    Column("Parameters", "d", "parameters"),
    Column("Client, s", "client s", "client_seconds"),
    Column("Server, s", "server s", "server_seconds"),
    Column("Key holder, s", "holder s", "key_holder_seconds"),
    Column("Sent, bytes a parameter", "up", "up"),
    Column("Received by a client", "down", "down"),
    Column("Largest error / B", "error", "largest_error"),
    Column("Deviation / B", "deviation", "deviation"),
    Column("of it noise", "noise", "noise"),
    Column("Wrap probability", "wrap", "wrap"),
    Column("Peak memory", "memory", "memory"),
    Column("Neighbours", "k", "neighbours"),
)


def number_cell(value: float | None) -> str:
    """Three digits."""
    return "-" if value is None else small_number(value)


def cells(cost: Cost) -> tuple[str, ...]:
    """A line of the table."""
    return (
        cost.channel,
        f"{cost.clients:,}",
        f"{cost.parameters:,}",
        *(number_cell(value) for value in (cost.client_seconds, cost.server_seconds, cost.key_holder_seconds or None)),
        number_cell(None if cost.up is None else cost.up / cost.parameters),
        bytes_text(cost.down),
        *(number_cell(value) for value in (cost.largest_error, cost.deviation, cost.noise or None)),
        "under 1e-300" if cost.wrap == 0 else number_cell(cost.wrap),
        bytes_text(cost.memory),
        "-" if cost.neighbours is None else str(cost.neighbours),
    )


def tables(costs: Sequence[Cost], order: Sequence[str]) -> list[ReportTable]:
    """What was measured; one point stage by stage; what is projected. What there is no number for stands in notes."""
    ready = sorted(of(costs, "measured"), key=lambda cost: (cost.parameters, cost.clients, order.index(cost.channel)))
    rows = tuple(TableRow(f"{cost.parameters} {cost.clients}", cells(cost)) for cost in ready)
    missing = [f"{cost.channel}, n={cost.clients}, d={cost.parameters}: {cost.why}" for cost in of(costs, "left out")]
    missing += [f"{cost.channel}, n={cost.clients}: refused: {cost.why}" for cost in of(costs, "refused")]
    words = (
        "Seconds of the processor, one thread. Client: one client in all stages. Server, key holder: for all clients.",
        "B: largest absolute coordinate. Errors are those of the mean against the plain mean.",
        "Memory: of one process that plays all parties.",
    )
    found = [ReportTable(COLUMNS, rows, (*words, *(f"Not measured: {line}." for line in missing)), (), "Measured")]
    place = reference(costs)
    if place is not None:
        found.append(stages([cost for cost in ready if (cost.clients, cost.parameters) == place]))
    far = of(costs, "projected")
    if far:
        rows = tuple(TableRow("", cells(cost)) for cost in far)
        notes = tuple(f"{cost.channel}: {cost.why}." for cost in far)
        found.append(ReportTable(COLUMNS, rows, notes, (), "PROJECTED, not measured"))
    return found


def stages(costs: Sequence[Cost]) -> ReportTable:
    """One point, stage by stage."""
    titles = ("Channel", "Stage", "A client, s", "Key holder, s", "Server, s", "A client sends", "A client gets")
    rows = [
        TableRow(
            cost.channel,
            (
                cost.channel,
                stage["stage"],
                number_cell(stage["client_seconds"] / stage["answered"] if stage["answered"] else None),
                number_cell(stage["key_holder_seconds"] or None),
                number_cell(stage["server_seconds"]),
                bytes_text(stage["up"] / stage["answered"] if stage["answered"] else None),
                bytes_text(stage["down"] / stage["asked"] if stage["asked"] else None),
            ),
        )
        for cost in costs
        for stage in cost.stages
    ]
    columns = tuple(Column(title, title.lower(), "stages") for title in titles)
    n, d = costs[0].clients, costs[0].parameters
    return ReportTable(columns, tuple(rows), (), (), f"Stage by stage: {n} clients, {d:,} parameters")


def of(costs: Sequence[Cost], kind: Kind) -> list[Cost]:
    """Points of one kind."""
    return [cost for cost in costs if cost.kind == kind]


def reference(costs: Sequence[Cost]) -> tuple[int, int] | None:
    """(clients, parameters) at which most channels were measured; of several, the largest."""
    there = Counter((cost.clients, cost.parameters) for cost in of(costs, "measured"))
    return max(there, key=lambda place: (there[place], place[0] * place[1]), default=None)


def figures(costs: Sequence[Cost], order: Sequence[str]) -> dict[str, Panel]:
    """Panels by name of the file; channels have the colours of their places in `order`."""
    place = reference(costs)
    if place is None:
        return {}
    d = place[1]
    ready = sorted(of(costs, "measured"), key=lambda cost: order.index(cost.channel))
    far = of(costs, "projected")
    wide = far[0].parameters if far else d
    here = [cost for cost in ready if (cost.clients, cost.parameters) == place]
    usual = Counter(cost.clients for cost in ready).most_common(1)[0][0]  # of whom most was measured
    by_size = _lines([cost for cost in ready if cost.clients == usual], order, "parameters", "client_seconds")
    by_clients = _lines(
        [cost for cost in (*ready, *far) if cost.parameters == wide], order, "clients", "server_seconds"
    )
    sent = [(cost.channel, (cost.up or 0.0) / d) for cost in here]
    off = [(cost.channel, cost.deviation) for cost in here if cost.deviation]
    words = f"{wide:,} parameters" + ("; open: PROJECTED" if far else "")
    with drawing_style():
        found = {
            "client": _panel(by_size, ("Seconds of a client", f"{usual} clients", "parameters")),
            "server": _panel(by_clients, ("Seconds of the server", words, "clients")),
            "bytes": cost_panel("Bytes a parameter", sent, small_number, log=True),
        }
        if off:
            found["error"] = cost_panel("Error deviation / B", off, small_number, log=True)
    return found


@final
@dataclass(frozen=True)
class _Line:
    """One channel: its place in the order, and points `(x, log10 y)`, measured and projected."""

    number: int
    solid: tuple[tuple[float, float], ...]
    open: tuple[tuple[float, float], ...]

    @property
    def points(self) -> tuple[tuple[float, float], ...]:
        """All of them, by x."""
        return tuple(sorted(self.solid + self.open))


def _lines(costs: Sequence[Cost], order: Sequence[str], x: str, y: str) -> dict[str, _Line]:
    """By channel; `x` and `y` are fields of a cost."""
    found = {}
    for number, channel in enumerate(order):
        own = [(cost.kind, (float(getattr(cost, x)), log10(getattr(cost, y)))) for cost in costs
               if cost.channel == channel and getattr(cost, y)]  # fmt: skip
        solid = tuple(sorted(point for kind, point in own if kind == "measured"))
        if own:
            found[channel] = _Line(number, solid, tuple(point for kind, point in own if kind == "projected"))
    return found


def _panel(lines: Mapping[str, _Line], words: tuple[str, str, str]) -> Panel:
    """A line a channel, both axes logarithmic. `words`: title, subtitle, what stands below."""
    title, subtitle, across = words
    texts = {channel: wrapped(channel, 21) for channel in lines}
    inner = max(140.0, sum(map(lines_height, texts.values())) + 4)
    figure, axes = canvas(HEADING + inner + 36, 40, 136, HEADING, 36)
    heading(figure, title, subtitle)
    points = [point for line in lines.values() for point in line.points]
    low, high = floor(min(y for _, y in points)), ceil(max(y for _, y in points) + 1e-9)
    axes.set_ylim(low, high)
    axes.set_yticks(range(low, high + 1), [_power(power) for power in range(low, high + 1)])
    axes.set_xscale("log")
    places = sorted({x for x, _ in points})
    axes.set_xticks(places, [f"{x:.0f}" if x < 10_000 else f"{x:.0e}".replace("e+0", "e") for x in places])
    axes.set_xticks([], minor=True)
    axes.set_xlabel(across, color=colour("muted"), fontsize=SMALL, labelpad=2)
    axes.grid(axis="y", color=colour("line"), linewidth=0.7)
    for line in lines.values():
        _draw(axes, line)
    ends = {channel: line.points[-1][1] for channel, line in lines.items()}
    label_ends(axes, inner, texts, ends, {channel: line.number for channel, line in lines.items()})
    spoken = "; ".join(f"{channel}: {small_number(10**end)} s" for channel, end in ends.items())
    return render(figure, across, f"{title}, {subtitle}, by {across}. At the end: {spoken}.")


def _power(exponent: int) -> str:
    """A power of ten, short."""
    return f"{10.0**exponent:g}" if -2 <= exponent <= 3 else f"1e{exponent}"


def _draw(axes: Axes, line: _Line) -> None:
    """What is projected is joined by dots and drawn open."""
    ink = colour(series_name(line.number))
    if line.solid:
        axes.plot(*zip(*line.solid, strict=True), color=ink, linewidth=1.8, linestyle=series_dash(line.number))
        axes.plot(*zip(*line.solid, strict=True), "o", color=ink, markersize=3)
    if line.open:
        axes.plot(*zip(*line.solid[-1:], *line.open, strict=True), color=ink, linewidth=1.0, linestyle=DOTTED)
        axes.plot(*zip(*line.open, strict=True), "o", markerfacecolor="none", markeredgecolor=ink, markersize=5)


def write_json(costs: Sequence[Cost], out: Path) -> None:
    """Everything."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "costs.json").write_text(json.dumps([asdict(cost) for cost in costs], indent=1))


def write_csv(costs: Sequence[Cost], out: Path) -> None:
    """Without the stages."""
    names = [field.name for field in fields(Cost) if field.name != "stages"]
    with (out / "costs.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        writer.writerows([getattr(cost, name) for name in names] for cost in costs)
