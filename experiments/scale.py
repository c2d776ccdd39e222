"""How far does one process go: memory and time of a round by cohort, population and width of the model.

Every point is one round of `federation.play`, with everything that belongs to it: clients are drawn from the
population, their examples made when they are asked, a network trained on them by `ModelLearner`, its update clipped,
sealed, sent, opened, clipped again, added up, and released with noise. It runs in a process of its own with one thread,
after a small round that loads what is loaded once. Its memory is what that process grew by at the worst moment.

    python -m experiments.scale
    python -m experiments.scale --cohorts "[1000]" --sizes "[1000000]" --populations "[]" --rounds 10
    python -m experiments.scale --fast

Writes `points.jsonl` (a line a point; those that stand there are not measured again, so that a run can go on),
`course.jsonl`, `limits.json`, `tables.md` and the figures.

What the clients hold is synthetic: vectors around ten fixed centres, two labels a client, drawn from its number.
"""

from __future__ import annotations

import ctypes
import gc
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from math import ceil, floor, isqrt, log10
from pathlib import Path
from time import perf_counter, process_time
from typing import final

import torch
from rich.console import Console
from torch import Tensor, nn

from privfm.checks import at_least, one_of, require
from privfm.cli import command
from privfm.contracts import BuiltModel, Cast, Channel, Encoded, Engine, Examples, Exchange, Sealer, Table
from privfm.defenses import DPPlan, TrimmedMean
from privfm.defenses.channels import PairwiseMasks
from privfm.defenses.privacy import IntegerNoise
from privfm.defenses.privacy.distributed import rounding_bound, share_deviation, smallest_modulus_bits
from privfm.engines import Local
from privfm.federation import Arm, Federation, FixedSize, Population, play, rounds, start
from privfm.federation.phases import Phases
from privfm.federation.rehearsal import grown, in_child
from privfm.learning import SGD, ImageClassification, ModelLearner, Schedule, Workbench
from privfm.randomness import Seeds, seeded
from privfm.reporting import show
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
from privfm.reporting.formats import bytes_text, small_number
from privfm.reporting.panels import DOTTED, HEADING, label_ends, wrapped
from privfm.reporting.table import Column, ReportTable, TableRow

PLAIN, MASKED = "Plaintext, central noise", "PairwiseMasks, distributed noise"
EVERY = "Plaintext, TrimmedMean without noise"  # a rule that needs every row: what the others are spared
CHANNELS = (PLAIN, MASKED, EVERY)

LABELS, EXAMPLES = 10, 8  # of the task, and of a client
CENTRES = 4.0  # length of a label's centre, in deviations of a coordinate of the vectors around it
LEARNING_RATE = 0.5  # with which updates are about as long as the clip, or longer
CLIP, NOISE, MOST_ROUNDS = 1.0, 1.0, 10  # L2 of an update, noise multiplier, participations of one client
VALIDATION = 64  # clients outside the population, on whose examples the model is evaluated
WARM = 10  # clients of the round before the measured one
BATCH = 16  # clients trained together, the engine's default
MIDDLE = 100  # cohort, or the nearest to it, where population and batch are varied
FILLED = 4  # batches from which on the memory of a round is compared: its rows and the allocator's are then all there

CORRUPT, DROPOUTS = 0.2, 0.1  # shares that masks assume to work with the server, and to go missing
HONEST = 0.75  # share of a cohort whose noise has to be enough
CLIP_STEPS = 2**12  # steps of distributed noise's grid in one clip
TRIMMED = 0.05  # share that the trimmed mean leaves out at either end


# ---------------------------------------------------------------------------------------------------- the federation


class TwoLayers(nn.Module):
    """`(b, features)` -> `(b, LABELS)` logits through one hidden layer, without biases."""

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.inner = nn.Linear(features, hidden, bias=False)
        self.outer = nn.Linear(hidden, LABELS, bias=False)

    def forward(self, pixel_values: Tensor) -> Tensor:
        logits: Tensor = self.outer(torch.relu(self.inner(pixel_values)))
        return logits


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


def shape(parameters: int) -> tuple[int, int]:
    """(features, hidden) of a `TwoLayers` of exactly so many parameters, as square as there is one."""
    hidden = next(n for n in range(isqrt(parameters), 0, -1) if parameters % n == 0)
    features = parameters // hidden - LABELS
    require(features >= LABELS, f"parameters={parameters}: expected 400 or more")
    return features, hidden


def holdings(features: int) -> Callable[[int], Examples]:
    """Client number -> its examples, the same every time."""
    seeds = Seeds(0)
    centres = torch.randn(LABELS, features, generator=seeds.generator("split"))
    centres *= CENTRES / centres.norm(dim=1, keepdim=True)

    def make(client: int) -> Examples:
        generator = seeds.generator("partition", client)
        own = torch.randperm(LABELS, generator=generator)[:2]
        labels = own[torch.randint(2, (EXAMPLES,), generator=generator)]
        return Examples(
            {"pixel_values": centres[labels] + torch.randn(EXAMPLES, features, generator=generator)}, labels
        )

    return make


def learner(parameters: int, population: int, make: Callable[[int], Examples]) -> ModelLearner:
    """A network, and clients outside the population to evaluate it on."""
    others = [make(population + other) for other in range(VALIDATION)]
    inputs = torch.cat([examples.inputs["pixel_values"] for examples in others])
    table = Table(inputs, torch.cat([examples.labels for examples in others]), tuple(map(str, range(LABELS))))
    with seeded(Seeds(0).generator("initialisation")):
        module = TwoLayers(*shape(parameters))
    bench = Workbench(BuiltModel(module, None, (), lambda folder: None), ImageClassification(), table)
    return ModelLearner(bench, {"validation": torch.arange(len(table))}, SGD(LEARNING_RATE, Schedule(EXAMPLES)))


def plan(setting: Setting) -> DPPlan:
    """Whole clients, as many in every round; noise of the server, or shares of all."""
    central = DPPlan(
        NOISE,
        CLIP,
        setting.rate,
        delta=min(1e-5, 0.1 / setting.population),
        sampling="fixed_size",
        max_participations=MOST_ROUNDS,
    )
    if setting.channel == PLAIN:
        return central
    least = ceil(HONEST * setting.cohort)
    share = share_deviation(NOISE, rounding_bound(CLIP_STEPS, setting.parameters), least)
    bits = max(8, smallest_modulus_bits(setting.cohort, CLIP_STEPS, share, setting.parameters))
    integers = IntegerNoise(least, setting.cohort, resolution=CLIP_STEPS, modulus_bits=bits)
    return replace(central, place="distributed", integers=integers, source="secure")


def arm(setting: Setting) -> Arm:
    """Mean under the plan, or a rule that needs every row."""
    if setting.channel == EVERY:
        return Arm(cohort=FixedSize(setting.cohort), rule=TrimmedMean(max(1, round(TRIMMED * setting.cohort))))
    private = plan(setting)
    if private.integers is None:
        return Arm(plan=private)
    masks = PairwiseMasks(setting.cohort, CORRUPT, DROPOUTS, modulus_bits=private.integers.modulus_bits)
    return Arm(plan=private, channel=masks)


def federation(setting: Setting, engine: Engine | None = None) -> Federation:
    """Ready to be played."""
    make = holdings(shape(setting.parameters)[0])
    model = learner(setting.parameters, setting.population, make)
    clients = Population(setting.population, make)
    return Federation(arm(setting), model, clients, Seeds(1), engine or Local(setting.batch))


# --------------------------------------------------------------------------------------------------- the measurement


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
    """

    setting: Setting
    wall: float
    training: float
    sending: float
    serving: float
    memory: int | None
    up: float
    down: float

    @property
    def seconds(self) -> float:
        """Of the processor, all parties one after the other."""
        return self.training + self.sending + self.serving

    @property
    def row(self) -> dict[str, str | float | int | None]:
        """One line of JSON."""
        own = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "setting"}
        return {**asdict(self.setting), **own}

    @classmethod
    def of(cls, line: str) -> Point:
        """The inverse."""
        row = json.loads(line)
        names = [field.name for field in fields(Setting)]
        return cls(Setting(**{name: row.pop(name) for name in names}), **row)


@final
class Clocked(Engine):
    """An engine that is watched from outside.

    Attributes:
      training: seconds of the processor in the round's half of its clients.
      phases: of the last round.
    """

    def __init__(self, below: Engine) -> None:
        self._below, self.training = below, 0.0
        self.phases: Phases | None = None

    def open(self, channel: Channel, sealed: Sealer, cast: Cast) -> Exchange:
        def timed(asked: Sequence[int]) -> dict[int, Encoded]:
            began = process_time()
            rows = dict(sealed(asked))
            self.training += process_time() - began
            return rows

        self.phases = Phases(self._below.open(channel, timed, cast))
        return self.phases


def measured(*settings: Setting) -> list[Point]:
    """A round of each, in a process of their own; with more than one, what the first leaves free may hide a little."""
    return in_child(_measured, settings)


def _measured(settings: Sequence[Setting]) -> list[Point]:
    return [one(setting) for setting in settings]


def one(setting: Setting) -> Point:
    """A round in this process, after a small one."""
    run = federation(setting)
    few = replace(run, arm=arm(replace(setting, cohort=WARM)))
    play(few, start(few))
    engine = Clocked(Local(setting.batch))
    run = replace(run, engine=engine)
    state = start(run)
    give_back()
    clock, processor = perf_counter(), process_time()
    (_, record), memory = grown(play, run, state)
    spent, wall = process_time() - processor, perf_counter() - clock
    require(not record.failure and record.arrived == setting.cohort, f"{setting} failed: {record.failure}")
    assert engine.phases is not None  # it was played
    clients = sum(phase.client_seconds for phase in engine.phases.all)
    return Point(
        setting,
        wall,
        engine.training,
        clients - engine.training,
        spent - clients,
        memory,
        record.bytes_up_per_client,
        record.bytes_down_per_client,
    )


def give_back() -> None:
    """Returns to the system what is free in this process: a round that takes it would not be seen to grow."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; others keep little
    if trim is not None:
        trim(0)


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

    @classmethod
    def here(cls, size: int = 1 << 27, turns: int = 5) -> Limits:
        """The shortest of some turns over a block that no cache holds."""
        from cryptography.hazmat.primitives.hashes import SHA256
        from cryptography.hazmat.primitives.hmac import HMAC

        source, target = torch.ones(size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8)
        content = bytes(size // 8)

        def code() -> None:
            HMAC(bytes(32), SHA256()).update(content)

        return cls(shortest(lambda: target.copy_(source), turns) / size, shortest(code, turns) / len(content))


def shortest(call: Callable[[], object], turns: int) -> float:
    """Seconds of the processor, the least of some turns."""
    found = []
    for _ in range(turns):
        began = process_time()
        call()
        found.append(process_time() - began)
    return min(found)


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


def course(setting: Setting, count: int) -> list[Moment]:
    """Some rounds one after the other, in a process of their own."""
    return in_child(_course, setting, count)


def _course(setting: Setting, count: int) -> list[Moment]:
    run = federation(setting)
    before = run.learner.evaluate(run.learner.initial(), "validation")["accuracy"].value
    found = [Moment(0, 0.0, resident(), before)]
    began = process_time()
    for step in rounds(run, count, evaluate_every=1):
        metrics = step.metrics or {}
        found.append(
            Moment(step.state.round, process_time() - began, resident(), metrics["accuracy"].value if metrics else None)
        )
        began = process_time()
    return found


def resident() -> int:
    """Bytes of this process that are in memory, after it gave back what is free; 0 outside Linux."""
    give_back()
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmRSS")), 0)


# ------------------------------------------------------------------------------------------------ what follows from it


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


# ------------------------------------------------------------------------------------------------------- a real fleet

BONAWITZ, KAIROUZ = "Bonawitz et al. 2019", "Kairouz et al. 2021"
SOURCES = (
    "Bonawitz et al., Towards federated learning at scale: system design, 2019; "
    "Kairouz et al., Advances and open problems in federated learning, 2021."
)


@final
@dataclass(frozen=True)
class Fleet:
    """What is taken from others, and what is assumed: `phone`, `down` and `up` have no source.

    Attributes:
      goal: replies wanted in a round.
      asked: devices asked for each reply wanted (Bonawitz et al., 2019, section 9).
      lost: least and largest share of them that drops out (same place).
      awake: devices that took part at once, over those active in a day: 10,000 of 10 million (same place).
      swing: most over fewest devices that take part within a day (same place).
      round_seconds: from the first request to the last reply.
      reported: the same, as reported for 1.4 million parameters: 2 to 3 minutes (Bonawitz et al., 2019, section 8).
      training: least and most rounds of a training (Kairouz et al., 2021, table 2).
      phone: how many times longer a phone computes than a core of the machine that measured.
      down, up: bits a second of a device's network.
    """

    goal: int = 1000
    asked: float = 1.3
    lost: tuple[float, float] = (0.06, 0.10)
    awake: float = 1e-3
    swing: float = 4.0
    round_seconds: float = 600.0
    reported: float = 150.0
    training: tuple[int, int] = (500, 10_000)
    phone: float = 4.0
    down: float = 20e6
    up: float = 5e6

    @property
    def devices(self) -> int:
        """Asked in a round."""
        return ceil(self.goal * self.asked)

    @property
    def replies(self) -> tuple[int, int]:
        """Fewest and most that answer; those beyond the goal are not needed."""
        few, many = (round(self.devices * (1 - share)) for share in reversed(self.lost))
        return few, many


@final
@dataclass(frozen=True)
class Need:
    """One line of what a fleet needs.

    Attributes:
      what: is needed.
      much: of it.
      kind: measured here, reported by others, or projected from these and from assumptions.
      why: source or sum.
    """

    what: str
    much: str
    kind: str
    why: str


def needs(point: Point, alone: Point, fleet: Fleet) -> list[Need]:
    """What a round needs of a fleet.

    Args:
      point: of the goal's cohort, or the largest there is, in the fleet's population.
      alone: of the same width with clients trained one at a time: more than a server that trains nobody needs.
      fleet: assumptions.
    """
    own = point.setting
    share = fleet.goal / own.population
    few, many = fleet.replies
    device = (point.training + point.sending) / own.cohort
    server = point.serving / own.cohort
    sent, received = fleet.devices * point.down, many * point.up
    flight = 8 * point.up / fleet.up
    waiting = many * flight / fleet.round_seconds
    at_once = fleet.awake * own.population
    days = [count * fleet.round_seconds / 86_400 for count in fleet.training]
    return [
        Need(
            "devices asked",
            f"{fleet.devices:,}",
            "reported",
            f"{fleet.asked:.0%} of {fleet.goal:,}; {BONAWITZ}, section 9",
        ),
        Need("devices that answer", f"{few:,} to {many:,}", "reported", f"6 % to 10 % are lost; {BONAWITZ}, section 9"),
        Need("a device gets", bytes_text(point.down), "measured", "model and requests"),
        Need("a device sends", bytes_text(point.up), "measured", "all its replies"),
        Need("a device computes", f"{device:.3f} s", "measured", f"on one core here, {EXAMPLES} examples"),
        Need(
            "the same on a phone", f"{fleet.phone * device:.2f} s", "projected", f"{fleet.phone:g} times: an assumption"
        ),
        Need(
            "its transfer",
            f"{8 * point.down / fleet.down + flight:.1f} s",
            "projected",
            f"{fleet.down / 1e6:g} Mbit/s down, {fleet.up / 1e6:g} Mbit/s up: assumptions",
        ),
        Need("the server sends", bytes_text(sent), "projected", "a round, all devices asked"),
        Need("the server receives", bytes_text(received), "projected", "a round, everybody that answers"),
        Need(
            f"its bandwidth, rounds of {fleet.round_seconds / 60:g} minutes",
            f"{bits(sent, fleet.round_seconds)} out, {bits(received, fleet.round_seconds)} in",
            "projected",
            "evenly over the round",
        ),
        Need(
            f"its bandwidth, rounds of {fleet.reported / 60:g} minutes",
            f"{bits(sent, fleet.reported)} out, {bits(received, fleet.reported)} in",
            "projected",
            f"2 to 3 minutes for 1.4 million parameters; {BONAWITZ}, section 8",
        ),
        Need("replies on their way at once", f"{waiting:.0f}", "projected", "rate times the time of an upload"),
        Need(
            "server memory",
            f"{bytes_text(alone.memory)} and {bytes_text(waiting * point.up)}",
            "projected",
            "at most the process measured with one client at a time, and the replies on their way",
        ),
        Need(
            "server, processor",
            f"{server * many:.1f} s",
            "projected",
            f"{server:.4f} s a reply measured; {server * many / fleet.round_seconds:.1%} of a core",
        ),
        Need(
            "devices there at once",
            f"{at_once / fleet.swing:,.0f} to {at_once:,.0f}",
            "projected",
            f"10,000 of 10 million took part at once, a factor of {fleet.swing:g} by day; {BONAWITZ}, section 9",
        ),
        Need(
            "days of training",
            f"{days[0]:.1f} to {days[1]:.0f}",
            "projected",
            f"{fleet.training[0]:,} to {fleet.training[1]:,} rounds; {KAIROUZ}, table 2",
        ),
        Need(
            "rounds a device joins",
            f"{fleet.training[0] * share:.2g} to {fleet.training[1] * share:.2g}",
            "projected",
            f"on average: {fleet.goal:,} of {own.population:,} a round",
        ),
    ]


def bits(count: float, seconds: float) -> str:
    """Bytes in so many seconds, as bandwidth."""
    return f"{8 * count / seconds / 1e6:.3g} Mbit/s"


# --------------------------------------------------------------------------------------------------- tables and figures


def tables(points: Sequence[Point], limits: Limits, moments: Sequence[Moment]) -> list[ReportTable]:
    """What was measured, how it grows, the longer run, and what a fleet would need."""
    return [*measured_tables(points, limits), *longer_table(moments), *fleet_tables(points)]


def measured_tables(points: Sequence[Point], limits: Limits) -> Iterator[ReportTable]:
    """Every point, and the lines through them."""
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
    yield ReportTable(columns(titles), rows, words, (), "Measured")
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
    yield ReportTable(columns(titles), rows, words, (), "By cohort")


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
    """A run of several rounds."""
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


def fleet_tables(points: Sequence[Point]) -> Iterator[ReportTable]:
    """One a channel, where a point with clients one at a time is there."""
    ready = best(points)
    most = max(point.setting.population for point in ready)
    for channel in CHANNELS:
        own = [point for point in ready if (point.setting.channel, point.setting.population) == (channel, most)]
        usual = [point for point in own if point.setting.batch == BATCH and point.setting.cohort <= Fleet().goal]
        if not usual:
            continue
        point = max(usual, key=lambda point: (point.setting.parameters, point.setting.cohort))
        d = point.setting.parameters
        alone = [other for other in own if other.setting.batch == 1 and other.setting.parameters == d]
        if not alone:
            continue
        rows = tuple(
            TableRow("", (need.what, need.much, need.kind, need.why)) for need in needs(point, alone[0], Fleet())
        )
        words = (f"Seconds and bytes: of a round of {point.setting.cohort:,} clients, {d:,} parameters.", SOURCES)
        titles = ("What", "How much", "Kind", "From")
        yield ReportTable(columns(titles), rows, words, (), f"What a fleet would need: {channel}", words=True)


def columns(titles: Sequence[str]) -> tuple[Column, ...]:
    """Of a table of nothing but text."""
    return tuple(Column(title, title.lower(), "scale") for title in titles)


def figures(points: Sequence[Point]) -> dict[str, Panel]:
    """Panels by name of the file: memory and time by cohort, a line a width, and by population."""
    ready = best(points)
    most = max(point.setting.population for point in ready)
    here = [point for point in ready if point.setting.batch == BATCH]
    by_cohort = [point for point in here if point.setting.population == most]
    plain = [point for point in by_cohort if point.setting.channel == PLAIN]
    memory: dict[str, Places] = {}
    times: dict[str, Places] = {}
    for d in sorted({point.setting.parameters for point in plain}, reverse=True):
        own = [point for point in plain if point.setting.parameters == d]
        memory[f"d = {d:.0e}".replace("e+0", "e")] = [(p.setting.cohort, p.memory / 1e6) for p in own if p.memory]
        times[f"d = {d:.0e}".replace("e+0", "e")] = [(p.setting.cohort, p.seconds) for p in own]
    wide = max(point.setting.parameters for point in plain)
    for channel, name in ((MASKED, "masks"), (EVERY, "every row kept")):
        own = [p for p in by_cohort if (p.setting.channel, p.setting.parameters) == (channel, wide)]
        memory[name] = [(p.setting.cohort, p.memory / 1e6) for p in own if p.memory]
        if channel == MASKED:  # the other takes as long as the plain sum
            times[name] = [(p.setting.cohort, p.seconds) for p in own]
    cohorts = [point.setting.cohort for point in plain if point.setting.parameters == wide]
    rows = [(n, 4 * wide * n / 1e6) for n in (min(cohorts), max(cohorts))]
    where = f"population {most:,}"
    with drawing_style():
        found = {
            "memory": panel("Memory of a round, MB", where, "cohort", memory, {"all rows": rows}),
            "time": panel("Seconds of a round", f"processor, one thread, {where}", "cohort", times, {}),
        }
        usual = [point for point in here if point.setting.channel == PLAIN]
        shared = {p.setting.cohort for p in usual if p.setting.population < most}
        if shared:
            cohort = max(shared)
            populations: dict[str, Places] = {}
            for d in sorted({p.setting.parameters for p in usual if p.setting.population < most}, reverse=True):
                own = [p for p in usual if (p.setting.parameters, p.setting.cohort) == (d, cohort)]
                populations[f"d = {d:.0e}".replace("e+0", "e")] = sorted((p.setting.population, p.seconds) for p in own)
            found["population"] = panel("Seconds of a round", f"cohort {cohort}", "population", populations, {})
    return found


Places = Sequence[tuple[float, float]]


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


# ------------------------------------------------------------------------------------------------------ the experiment


def planned(
    cohorts: Sequence[int],
    sizes: Sequence[int],
    populations: Sequence[int],
    batches: Sequence[int],
    others: Mapping[str, Sequence[int]],
) -> list[Setting]:
    """Cohorts at every width in the largest population; one cohort in every population; batches; other channels."""
    most, wide = max(populations), max(sizes)
    middle = min(cohorts, key=lambda cohort: abs(cohort - MIDDLE))
    found = [Setting(PLAIN, most, cohort, d) for d in sizes for cohort in cohorts]
    found += [Setting(PLAIN, size, middle, d) for size in populations for d in (min(sizes), wide) if size > middle]
    found += [Setting(PLAIN, most, middle, wide, batch) for batch in batches]
    for channel, own in others.items():
        found += [Setting(channel, most, cohort, wide) for cohort in own]
    if others.get(MASKED):
        found.append(Setting(MASKED, most, min(others[MASKED]), wide, batch=1))
    return list(dict.fromkeys(found))


def main(
    *,
    cohorts: tuple[int, ...] = (10, 30, 100, 300, 1000, 3000),
    sizes: tuple[int, ...] = (10_000, 100_000, 1_000_000),
    populations: tuple[int, ...] = (1000, 10_000, 100_000, 1_000_000),
    batches: tuple[int, ...] = (1, 4, 64),
    masked: tuple[int, ...] = (10, 30, 100, 300),
    every: tuple[int, ...] = (30, 100, 300),
    course_rounds: int = 20,
    course_size: int = 100_000,
    repeats: int = 1,
    out: Path = Path("runs/scale"),
    fast: bool = False,
) -> None:
    """Measures, prints the tables and draws the figures.

    Args:
      cohorts: clients of a round, at least 10.
      sizes: parameters of the network.
      populations: clients there are; cohorts and sizes are varied in the largest.
      batches: clients trained together, besides the usual 16, for one cohort at the largest size.
      masked: cohorts under masks with distributed noise, at the largest size.
      every: cohorts under a rule that needs every row, at the largest size.
      course_rounds: of the longer run, with the cohort nearest to a thousand; 0: none.
      course_size: its parameters.
      repeats: how often everything is measured.
      out: folder; points that stand in it are not measured again.
      fast: a small version in this process, which shows that everything runs; its numbers mean nothing.
    """
    if fast:
        cohorts, sizes, populations, batches, masked, every = (10, 20), (2500,), (1000,), (1,), (10,), ()
        course_rounds, course_size = 2, 2500
    at_least("repeats", repeats, 1)
    require(bool(cohorts and sizes and populations), "cohorts, sizes and populations: expected one of each at least")
    out.mkdir(parents=True, exist_ok=True)
    console, file = Console(), out / "points.jsonl"
    points = [Point.of(line) for line in file.read_text().splitlines()] if file.exists() else []
    known = {point.setting for point in points}
    limits = Limits.here(1 << 20 if fast else 1 << 27)
    (out / "limits.json").write_text(json.dumps(asdict(limits)))
    once = planned(cohorts, sizes, populations, batches, {MASKED: masked, EVERY: every})
    wanted = [replace(setting, turn=turn) for turn in range(repeats) for setting in once]
    wanted = [setting for setting in wanted if setting not in known]
    for setting in wanted:
        point = one(setting) if fast else measured(setting)[0]
        points.append(point)
        with file.open("a") as lines:
            lines.write(json.dumps(point.row) + "\n")
        said = f"{setting}: {point.seconds:.3g} s, {bytes_text(point.memory)}"
        console.print(said, soft_wrap=True, highlight=False)
    moments: list[Moment] = []
    if course_rounds:
        cohort = min(cohorts, key=lambda cohort: abs(cohort - Fleet().goal))
        moments = (_course if fast else course)(Setting(PLAIN, max(populations), cohort, course_size), course_rounds)
        (out / "course.jsonl").write_text("".join(json.dumps(asdict(moment)) + "\n" for moment in moments))
    found = tables(points, limits, moments)
    (out / "tables.md").write_text("\n".join(f"## {table.title}\n\n{table.markdown()}" for table in found))
    for name, drawn in figures(points).items():
        (out / f"{name}.svg").write_text(drawn.standalone())
    show(found, console)
    console.print(f"written: {out}", soft_wrap=True)


if __name__ == "__main__":
    command(main)
