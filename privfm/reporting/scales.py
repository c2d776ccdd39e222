"""Rounds of every size in one process: their records, the lines through them, and tables of both."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import final

import torch

from privfm.checks import one_of, require
from privfm.reporting.environment import describe_environment
from privfm.reporting.formats import bytes_text, small_number
from privfm.reporting.table import Column, ReportTable, TableRow

PLAIN, MASKED = "Plaintext, central noise", "PairwiseMasks, distributed noise"
EVERY = "Plaintext, TrimmedMean without noise"  # a rule that needs every row: what the others are spared
CHANNELS = (PLAIN, MASKED, EVERY)

WARM = 10  # clients of the round before the measured one
BATCH = 16  # clients trained together, the engine's default
EXAMPLES = 8  # of a client
FILLED = 4  # batches from which on the memory of a round is compared: its rows and the allocator's are then all there


@final
@dataclass(frozen=True)
class Setting:
    """What one point is.

    Attributes:
      channel: one of `CHANNELS`.
      population: clients there are.
      cohort: clients of a round.
      parameters: d.
      batch: clients trained together.
      turn: number of the measurement of the same.
    """

    channel: str
    population: int
    cohort: int
    parameters: int
    batch: int = BATCH
    turn: int = 0

    def __post_init__(self) -> None:
        one_of("channel", self.channel, CHANNELS)
        require(WARM <= self.cohort < self.population, f"cohort={self.cohort}: expected {WARM} to the population")

    @property
    def rate(self) -> float:
        """Share of the population in a round."""
        return self.cohort / self.population


@final
@dataclass(frozen=True)
class Point:
    """One measured round. Seconds are the processor's, one thread, but for `wall`.

    Attributes:
      setting: what was played.
      wall: seconds on the clock, whatever else the machine did.
      training: making the clients' examples, training, clipping, encoding, of all clients together.
      sending: their other half of the protocol: packing, masking, sealing.
      serving: everything else: drawing the cohort, opening, adding up, noise.
      memory: bytes the process grew by at the worst moment; None outside Linux.
      up: bytes a client sends.
      down: bytes a client gets, the model included.
      version: of the code that played it, see `version_here`; None: not recorded.
    """

    setting: Setting
    wall: float
    training: float
    sending: float
    serving: float
    memory: int | None
    up: float
    down: float
    version: str | None = None

    @property
    def seconds(self) -> float:
        """Of the processor, all parties one after the other."""
        return self.training + self.sending + self.serving

    @property
    def row(self) -> dict[str, str | float | int | None]:
        """One line of JSON; without a version where none was recorded."""
        row = asdict(self)
        if self.version is None:
            del row["version"]
        return {**row.pop("setting"), **row}

    @classmethod
    def of(cls, line: str) -> Point:
        """The inverse."""
        row = json.loads(line)
        names = [field.name for field in fields(Setting)]
        return cls(Setting(**{name: row.pop(name) for name in names}), **row)


def version_here() -> str:
    """Commit of this checkout, and whether files differ from it; the version of the package outside a checkout."""
    found = describe_environment()
    git = found["git"]
    if git is None:
        return f"privfm {found['privfm']}"
    return f"{git['commit']} with changes" if git["dirty"] else str(git["commit"])


@final
@dataclass(frozen=True)
class Limits:
    """What this machine needs for a byte, in seconds.

    Attributes:
      copy: reading it from one place in memory and writing it to another.
      code: running it once through HMAC-SHA256, as the envelope does on either side.
    """

    copy: float
    code: float


@final
@dataclass(frozen=True)
class Moment:
    """After one round of a longer run.

    Attributes:
      round: number of rounds played.
      seconds: of the processor, for this round.
      resident: bytes of the process.
      accuracy: on clients outside the population; None where it was not asked.
    """

    round: int
    seconds: float
    resident: int
    accuracy: float | None


@final
@dataclass(frozen=True)
class Line:
    """A straight line through points, by least squares.

    Attributes:
      slope, intercept: of it.
      fit: r squared, the share of the spread that it explains.
    """

    slope: float
    intercept: float
    fit: float

    @classmethod
    def through(cls, xs: Sequence[float], ys: Sequence[float]) -> Line:
        """Through at least two different x."""
        x, y = torch.tensor(xs, dtype=torch.float64), torch.tensor(ys, dtype=torch.float64)
        require(len(set(xs)) > 1, f"xs={list(xs)}: a line needs two different places")
        slope = float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())
        intercept = float(y.mean()) - slope * float(x.mean())
        spread = float((y - y.mean()).square().sum())
        left = float((y - slope * x - intercept).square().sum())
        return cls(slope, intercept, 1 - left / spread if spread else 1.0)


@final
@dataclass(frozen=True)
class Growth:
    """How one channel at one width grows with the cohort, over its points with full batches.

    Attributes:
      channel, parameters: of the points.
      memory: bytes by clients; None with fewer than two such cohorts, or outside Linux.
      power: log10 of the seconds by log10 of the clients: 1 is linear.
      seconds: by clients.
    """

    channel: str
    parameters: int
    memory: Line | None
    power: Line
    seconds: Line

    @classmethod
    def of(cls, points: Sequence[Point]) -> Growth:
        """Of points of one channel and width."""
        setting = points[0].setting
        cohorts = [float(point.setting.cohort) for point in points]
        spent = [point.seconds for point in points]
        full = [point for point in points if point.setting.cohort >= FILLED * point.setting.batch]
        known = [(float(p.setting.cohort), float(p.memory)) for p in full if p.memory is not None]
        several = len({cohort for cohort, _ in known}) > 1
        logs = [torch.tensor(values, dtype=torch.float64).log10().tolist() for values in (cohorts, spent)]
        return cls(
            setting.channel,
            setting.parameters,
            Line.through(*zip(*known, strict=True)) if several else None,
            Line.through(*logs),
            Line.through(cohorts, spent),
        )


def grown_by_cohort(points: Sequence[Point]) -> list[Growth]:
    """Of every channel and width with two cohorts, in the largest population and the usual batch; see `best`."""
    most = max(point.setting.population for point in points)
    found = []
    for channel in CHANNELS:
        for parameters in sorted({point.setting.parameters for point in points}):
            own = [
                point
                for point in best(points)
                if (point.setting.channel, point.setting.parameters) == (channel, parameters)
                and (point.setting.population, point.setting.batch) == (most, BATCH)
            ]
            if len(own) > 1:
                found.append(Growth.of(own))
    return found


def best(points: Sequence[Point]) -> list[Point]:
    """Of every setting the turn with the fewest seconds and the one with the most memory, as one point, by cohort.

    What else the machine does only ever lengthens a turn; memory is to be judged by its worst.
    """
    turns: dict[Setting, list[Point]] = {}
    for point in points:
        turns.setdefault(replace(point.setting, turn=0), []).append(point)
    found = []
    for setting, own in turns.items():
        fastest = min(own, key=lambda point: point.seconds)
        memory = [point.memory for point in own if point.memory is not None]
        found.append(replace(fastest, setting=setting, memory=max(memory) if memory else None))
    return sorted(found, key=lambda point: (point.setting.channel, point.setting.parameters, point.setting.cohort))


def tables(points: Sequence[Point], limits: Limits, moments: Sequence[Moment]) -> list[ReportTable]:
    """What was measured, how it grows, and the longer run, if there is one."""
    return [measured_table(points), growth_table(points, limits), *longer_table(moments)]


def measured_table(points: Sequence[Point]) -> ReportTable:
    """Every setting, see `best`."""
    titles = [
        *("Channel", "Population", "Parameters", "Cohort", "Together", "Training, s", "Clients' sending, s"),
        *("Server, s", "All, s", "On the clock, s", "Memory", "A client sends", "A client gets"),
    ]
    rows = tuple(
        TableRow(
            point.setting.channel,
            (
                point.setting.channel,
                *(f"{number:,}" for number in (point.setting.population, point.setting.parameters)),
                *(f"{number:,}" for number in (point.setting.cohort, point.setting.batch)),
                *(small_number(value) for value in (point.training, point.sending, point.serving)),
                *(small_number(value) for value in (point.seconds, point.wall)),
                bytes_text(point.memory),
                bytes_text(point.up),
                bytes_text(point.down),
            ),
        )
        for point in best(points)
    )
    words = (
        "Seconds of the processor, one thread, of all parties one after the other; of several turns the shortest, and "
        "the largest memory. Memory: what the process grew by at the worst moment.",
    )
    return ReportTable(columns(titles), rows, words, (), "Measured")


def growth_table(points: Sequence[Point], limits: Limits) -> ReportTable:
    """The lines through them, and what this machine needs at least."""
    titles = [
        *("Channel", "Parameters", "Memory, bytes a client", "over a row", "Memory of no client", "in rows"),
        *("Time, ms a client", "of no client", "r squared", "Power of time", "r squared"),
        *("Copying a row, ms", "Two codes over it, ms"),
    ]
    rows = tuple(
        TableRow(
            found.channel,
            (
                found.channel,
                f"{found.parameters:,}",
                *memory_cells(found),
                small_number(1000 * found.seconds.slope),
                small_number(1000 * found.seconds.intercept),
                f"{found.seconds.fit:.5f}",
                f"{found.power.slope:.3f}",
                f"{found.power.fit:.5f}",
                small_number(1000 * 4 * found.parameters * limits.copy),
                small_number(2 * 1000 * 4 * found.parameters * limits.code),
            ),
        )
        for found in grown_by_cohort(points)
    )
    words = (f"Memory: a line through cohorts of at least {FILLED} batches. A row: 4 bytes a parameter.",)
    return ReportTable(columns(titles), rows, words, (), "By cohort")


def memory_cells(found: Growth) -> tuple[str, str, str, str]:
    """Slope in bytes and over a row, intercept in bytes and rows."""
    if found.memory is None:
        return ("-",) * 4
    row, memory = 4 * found.parameters, found.memory
    return (
        f"{memory.slope:,.0f}",
        f"{memory.slope / row:.2%}",
        bytes_text(memory.intercept),
        f"{memory.intercept / row:.1f}",
    )


def longer_table(moments: Sequence[Moment]) -> Iterator[ReportTable]:
    """A run of several rounds; no table without one."""
    if moments:
        rows = tuple(
            TableRow("", (str(m.round), small_number(m.seconds), bytes_text(m.resident), accuracy_text(m.accuracy)))
            for m in moments
        )
        titles = ("Rounds played", "Seconds of the last", "Resident memory after it", "Accuracy")
        words = ("Accuracy on clients outside the population, whose labels are as unlike.",)
        yield ReportTable(columns(titles), rows, words, (), "One run")


def accuracy_text(value: float | None) -> str:
    """A share as per cent."""
    return "-" if value is None else f"{value:.1%}"


def columns(titles: Sequence[str]) -> tuple[Column, ...]:
    """Of a table of nothing but text."""
    return tuple(Column(title, title.lower(), "scale") for title in titles)
