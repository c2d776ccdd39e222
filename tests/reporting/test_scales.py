"""Points on scale and what follows from them: lines are lines, and what is projected follows from what it says."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from privfm.checks import InvalidArgument
from privfm.reporting import scales
from privfm.reporting.fleet import Fleet, fleet_tables, needs
from privfm.reporting.scale_figures import figures
from privfm.reporting.scales import (
    BATCH,
    EVERY,
    MASKED,
    PLAIN,
    Growth,
    Limits,
    Line,
    Moment,
    Point,
    Setting,
    best,
    grown_by_cohort,
    tables,
    version_here,
)

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def recorded() -> list[Point]:
    """Those of the page."""
    return [Point.of(line) for line in (DOCS / "results" / "scale.jsonl").read_text().splitlines()]


def made(cohort: int, seconds: float, memory: int | None = 0, channel: str = PLAIN, turn: int = 0) -> Point:
    """A point as if it had been measured: a hundredth of the time is the server's."""
    setting = Setting(channel, 10**6, cohort, 10**6, turn=turn)
    return Point(setting, 2 * seconds, 0.9 * seconds, 0.09 * seconds, 0.01 * seconds, memory, 4e6, 4e6)


def lines_of(points: Sequence[Point]) -> str:
    return "".join(json.dumps(point.row) + "\n" for point in points)


# ---------------------------------------------------------------------------------------------------------- the records


@pytest.mark.parametrize("cohort", [9, 1000])
def test_a_cohort_is_between_ten_and_the_population(cohort: int) -> None:
    with pytest.raises(InvalidArgument, match="cohort="):
        Setting(PLAIN, 1000, cohort, 2500)


def test_an_unknown_channel_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="channel="):
        Setting("Telepathy", 1000, 10, 2500)


def test_a_point_comes_back_from_its_line() -> None:
    point = replace(made(100, 3.0, None), version="1234 with changes")
    row = json.loads(json.dumps(point.row))
    assert Point.of(json.dumps(row)) == point
    assert list(row)[:2] == ["channel", "population"] and row["memory"] is None
    assert row["version"] == "1234 with changes"


def test_points_from_before_versions_were_recorded_stay_as_they_are(recorded: list[Point]) -> None:
    assert lines_of(recorded) == (DOCS / "results" / "scale.jsonl").read_text()
    assert made(10, 1.0).version is None and "version" not in made(10, 1.0).row


@pytest.mark.parametrize(
    ("git", "expected"),
    [
        (None, "privfm 1.2"),
        ({"commit": "abcd", "dirty": False}, "abcd"),
        ({"commit": "abcd", "dirty": True}, "abcd with changes"),
    ],
    ids=["no checkout", "clean", "changed"],
)
def test_a_version_is_the_commit_or_that_of_the_package(git, expected, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scales, "describe_environment", lambda: {"privfm": "1.2", "git": git})
    assert version_here() == expected


# ----------------------------------------------------------------------------------------------- what follows from them


def test_a_line_by_hand() -> None:
    assert Line.through([1, 2, 3], [3, 5, 7]) == Line(2.0, 1.0, 1.0)
    bent = Line.through([0, 1, 2], [0, 0, 3])  # slope 3/2, residuals 1/2, -1, 1/2 of a spread of 6
    assert (bent.slope, bent.intercept, bent.fit) == pytest.approx((1.5, -0.5, 0.75))
    with pytest.raises(InvalidArgument, match="two different places"):
        Line.through([1, 1], [0, 2])


def test_growth_is_read_from_full_batches_and_all_times() -> None:
    cohorts = (10, 100, 300, 1000)
    linear = Growth.of([made(n, 0.03 * n, 999 if n < 64 else 200_000_000 + 100 * n) for n in cohorts])
    assert linear.memory is not None
    assert (linear.memory.slope, linear.memory.intercept) == pytest.approx((100, 2e8))
    assert (linear.power.slope, linear.power.fit, linear.seconds.slope) == pytest.approx((1, 1, 0.03))
    square = Growth.of([made(n, 1e-4 * n * n, None) for n in cohorts])
    assert square.memory is None and square.power.slope == pytest.approx(2)
    stacked = Growth.of([made(n, 0.03 * n, 4_000_000 * n) for n in cohorts])
    assert stacked.memory is not None and stacked.memory.slope == pytest.approx(4e6)


def test_of_turns_the_shortest_and_the_largest_memory_count() -> None:
    (found,) = best([made(100, 3.0, 5), made(100, 2.0, 4, turn=1)])
    assert (found.seconds, found.memory, found.setting.turn) == (pytest.approx(2.0), 5, 0)


def test_a_fleet_by_hand() -> None:
    """4 MB either way: 1,300 asked, at most 1,222 answer, 8 * 4e6 / 5e6 = 6.4 s to send."""
    fleet = Fleet()
    assert (fleet.devices, fleet.replies) == (1300, (1170, 1222))
    point = made(1000, 30.0)
    found = {need.what: need for need in needs(point, replace(point, memory=50_000_000), fleet)}
    assert found["the server sends"].much == "5.2 GB"
    assert found["its bandwidth, rounds of 10 minutes"].much == "69.3 Mbit/s out, 65.2 Mbit/s in"
    assert found["its bandwidth, rounds of 2.5 minutes"].much == "277 Mbit/s out, 261 Mbit/s in"
    assert found["its transfer"].much == "8.0 s"
    assert found["replies on their way at once"].much == "13"
    assert found["server memory"].much == "50 MB and 52.1 MB"
    assert found["a device computes"].much == "0.030 s" and found["the same on a phone"].much == "0.12 s"
    assert found["server, processor"].much == "0.4 s"  # 30 s / 100 / 1000 for each of 1,222
    assert found["devices there at once"].much == "250 to 1,000"
    assert found["days of training"].much == "3.5 to 69"
    assert found["rounds a device joins"].much == "0.5 to 10"


# ------------------------------------------------------------------------------------------------------ tables, figures


def grid() -> list[Point]:
    """Two cohorts in the clear and with every row kept, one in a smaller population, one with clients one by one."""
    points = [made(n, 0.03 * n, 300_000_000, PLAIN) for n in (100, 1000)]
    points += [made(n, 0.03 * n, 4_000_000 * n, EVERY) for n in (100, 1000)]
    smaller = replace(points[0], setting=replace(points[0].setting, population=10_000))
    alone = replace(points[0], setting=replace(points[0].setting, batch=1), memory=80_000_000)
    return [*points, smaller, alone]


def test_tables_hold_what_was_measured_and_its_lines() -> None:
    moments = [Moment(0, 0.0, 10**8, 0.125), Moment(1, 2.5, 10**8, None)]
    measured, growth, longer = tables(grid(), Limits(1e-10, 1e-9), moments)
    assert (measured.title, growth.title, longer.title) == ("Measured", "By cohort", "One run")
    assert len(measured.rows) == len(grid()) and [row.cells[0] for row in growth.rows] == [PLAIN, EVERY]
    plain, kept = (row.cells for row in growth.rows)
    assert plain[2:6] == ("0", "0.00%", "300 MB", "75.0") and kept[2:4] == ("4,000,000", "100.00%")
    assert plain[6] == "30" and plain[-2:] == ("0.4", "8"), "ms: a client; 4 bytes of 1e6 copied, and coded twice"
    assert [row.cells[3] for row in longer.rows] == ["12.5%", "-"]
    assert len(tables(grid(), Limits(1e-10, 1e-9), [])) == 2
    assert all(len(table.columns) == len(row.cells) for table in (measured, growth, longer) for row in table.rows)


def test_without_full_batches_there_is_no_line_of_memory() -> None:
    _, growth = tables([made(10, 0.3), made(30, 0.9)], Limits(1e-10, 1e-9), [])
    assert growth.rows[0].cells[2:6] == ("-",) * 4


def test_a_fleet_is_projected_from_rounds_of_the_usual_batch_and_of_clients_one_by_one() -> None:
    (table,) = fleet_tables(grid())
    assert table.title == f"What a fleet would need: {PLAIN}"
    assert table.notes[0] == "Seconds and bytes: of a round of 1,000 clients, 1,000,000 parameters."
    cells = {row.cells[0]: row.cells for row in table.rows}
    assert cells["server memory"][1].startswith("80 MB") and cells["server memory"][2] == "projected"
    assert {row.cells[2] for row in table.rows} == {"reported", "measured", "projected"}
    assert list(fleet_tables([point for point in grid() if point.setting.batch == BATCH])) == []


def test_figures_have_a_line_a_width_the_others_and_the_limit() -> None:
    drawn = figures(grid())
    assert set(drawn) == {"memory", "time", "population"}
    assert "d = 1e6: 300; every row kept: 4e+03; all rows: 4e+03" in drawn["memory"].label
    assert "masks" not in drawn["time"].label and "every row" not in drawn["time"].label
    assert "cohort 100, by population" in drawn["population"].label
    masked = [*grid(), made(100, 36.0, 10**8, MASKED)]
    assert "masks: 36" in figures(masked)["time"].label and "masks: 100" in figures(masked)["memory"].label
    one = [point for point in grid() if point.setting.population == 10**6]
    assert set(figures(one)) == {"memory", "time"}


# ------------------------------------------------------------------------------------------------------------- the page


def test_the_page_says_what_its_points_say(recorded: list[Point]) -> None:
    page = " ".join((DOCS / "scale.md").read_text().split())
    found = {(one.channel, one.parameters): one for one in grown_by_cohort(recorded)}
    plain, kept = found[PLAIN, 10**6], found[EVERY, 10**6]
    assert plain.memory is not None and kept.memory is not None
    assert abs(plain.memory.slope) < 0.01 * 4e6 < 0.99 * 4e6 < kept.memory.slope, "flat, and the control is not"
    assert f"what one more client adds (line through those) | {plain.memory.slope / 1000:.1f} kB" in page
    assert f"keeps every row (the control) | {kept.memory.slope / 1e6:.1f} MB" in page
    assert f"| {plain.power.slope:.2f}, r squared {plain.power.fit:.4f} |" in page
    assert abs(plain.power.slope - 1) < 0.05, "linear"
    for point in best(recorded):
        own = point.setting
        if own.channel == PLAIN and own.parameters == 10**6 and own.population == 10**6 and point.memory:
            assert f"{point.memory / 1e6:.3g} MB" in page


@pytest.mark.parametrize("name", ["memory", "time", "population"])
def test_the_pages_figures_are_those_of_its_points(name: str, recorded: list[Point]) -> None:
    assert (DOCS / "results" / f"scale-{name}.svg").read_text() == figures(recorded)[name].standalone()
