"""What a round measured in one process would need of a fleet of devices: a projection, and everything it assumes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from typing import final

from privfm.reporting.formats import bytes_text
from privfm.reporting.scales import BATCH, CHANNELS, EXAMPLES, Point, best, columns
from privfm.reporting.table import ReportTable, TableRow

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

    def flight(self, size: float) -> float:
        """Seconds in which a device sends so many bytes."""
        return 8 * size / self.up


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
    return [*needs_of_devices(point, fleet), *needs_of_server(point, alone, fleet), *needs_of_time(point, fleet)]


def needs_of_devices(point: Point, fleet: Fleet) -> list[Need]:
    """How many there are in a round, and what each does."""
    few, many = fleet.replies
    device = (point.training + point.sending) / point.setting.cohort
    transfer = 8 * point.down / fleet.down + fleet.flight(point.up)
    asked = f"{fleet.asked:.0%} of {fleet.goal:,}; {BONAWITZ}, section 9"
    networks = f"{fleet.down / 1e6:g} Mbit/s down, {fleet.up / 1e6:g} Mbit/s up: assumptions"
    phone = f"{fleet.phone:g} times: an assumption"
    return [
        Need("devices asked", f"{fleet.devices:,}", "reported", asked),
        Need("devices that answer", f"{few:,} to {many:,}", "reported", f"6 % to 10 % are lost; {BONAWITZ}, section 9"),
        Need("a device gets", bytes_text(point.down), "measured", "model and requests"),
        Need("a device sends", bytes_text(point.up), "measured", "all its replies"),
        Need("a device computes", f"{device:.3f} s", "measured", f"on one core here, {EXAMPLES} examples"),
        Need("the same on a phone", f"{fleet.phone * device:.2f} s", "projected", phone),
        Need("its transfer", f"{transfer:.1f} s", "projected", networks),
    ]


def needs_of_server(point: Point, alone: Point, fleet: Fleet) -> list[Need]:
    """Bytes, memory and processor of a round; arguments as for `needs`."""
    many = fleet.replies[1]
    sent, received = fleet.devices * point.down, many * point.up
    waiting = many * fleet.flight(point.up) / fleet.round_seconds
    reply = point.serving / point.setting.cohort
    return [
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
            f"{reply * many:.1f} s",
            "projected",
            f"{reply:.4f} s a reply measured; {reply * many / fleet.round_seconds:.1%} of a core",
        ),
    ]


def needs_of_time(point: Point, fleet: Fleet) -> list[Need]:
    """Devices that are there at any hour, and a whole training of such rounds, one after the other."""
    population = point.setting.population
    share, at_once = fleet.goal / population, fleet.awake * population
    least, most = fleet.training
    days = [count * fleet.round_seconds / 86_400 for count in fleet.training]
    return [
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
            f"{least:,} to {most:,} rounds; {KAIROUZ}, table 2",
        ),
        Need(
            "rounds a device joins",
            f"{least * share:.2g} to {most * share:.2g}",
            "projected",
            f"on average: {fleet.goal:,} of {population:,} a round",
        ),
    ]


def bits(count: float, seconds: float) -> str:
    """Bytes in so many seconds, as bandwidth."""
    return f"{8 * count / seconds / 1e6:.3g} Mbit/s"


def fleet_tables(points: Sequence[Point]) -> Iterator[ReportTable]:
    """One a channel, where one of the usual batch and one with clients one at a time were played."""
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
