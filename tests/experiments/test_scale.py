"""The experiment on scale, small: rounds are real, lines are lines, and what is projected follows from what it says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from experiments import scale
from experiments.scale import (
    EVERY,
    EXAMPLES,
    LABELS,
    MASKED,
    PLAIN,
    Fleet,
    Growth,
    Limits,
    Line,
    Point,
    Setting,
    arm,
    best,
    figures,
    holdings,
    learner,
    main,
    needs,
    plan,
    planned,
    shape,
)
from privfm.checks import InvalidArgument
from privfm.federation import problems


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scale")
    main(fast=True, out=out)
    return out


@pytest.fixture(scope="module")
def points(folder: Path) -> list[Point]:
    return [Point.of(line) for line in (folder / "points.jsonl").read_text().splitlines()]


def made(cohort: int, seconds: float, memory: int | None = 0, channel: str = PLAIN, turn: int = 0) -> Point:
    """A point as if it had been measured: a hundredth of the time is the server's."""
    setting = Setting(channel, 10**6, cohort, 10**6, turn=turn)
    return Point(setting, 2 * seconds, 0.9 * seconds, 0.09 * seconds, 0.01 * seconds, memory, 4e6, 4e6)


def test_every_setting_is_played_once(points: list[Point]) -> None:
    wanted = planned((10, 20), (2500,), (1000,), (1,), {MASKED: (10,), EVERY: ()})
    assert [point.setting for point in points] == wanted
    assert len(wanted) == 5


def test_seconds_bytes_and_memory_are_those_of_rounds(points: list[Point]) -> None:
    for point in points:
        assert min(point.sending, point.serving) > 0
        assert 0 < point.training < point.seconds and point.wall > 0
        assert point.memory is None or 0 < point.memory < 1e8
        if point.setting.channel == PLAIN:  # a float32 a parameter, and an envelope of less than 300 bytes
            assert 0 < point.up - 4 * 2500 < 300 and 0 < point.down - 4 * 2500 < 300


def test_tables_say_what_is_measured_and_what_is_not(folder: Path) -> None:
    text = (folder / "tables.md").read_text()
    for part in ("## Measured", "## By cohort", "## One run", f"fleet would need: {PLAIN}", f"need: {MASKED}"):
        assert part in text
    kinds = {line.split("|")[3].strip() for line in text.splitlines() if line.count("|") == 5 and "Mbit/s" in line}
    assert kinds == {"projected"}


def test_the_longer_run_trains(folder: Path) -> None:
    moments = [json.loads(line) for line in (folder / "course.jsonl").read_text().splitlines()]
    assert [moment["round"] for moment in moments] == [0, 1, 2]
    assert all(0 <= moment["accuracy"] <= 1 for moment in moments)
    assert moments[-1]["accuracy"] != moments[0]["accuracy"], "the released model is another one"


def test_figures_are_the_same_twice(folder: Path, points: list[Point]) -> None:
    drawn = {name: panel.standalone() for name, panel in figures(points).items()}
    assert {f"{name}.svg" for name in drawn} == {path.name for path in folder.glob("*.svg")}
    assert all((folder / f"{name}.svg").read_text() == text for name, text in drawn.items())


def test_what_was_measured_is_not_measured_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(setting: Setting) -> Point:
        raise AssertionError(setting)

    before = (folder / "points.jsonl").read_text()
    monkeypatch.setattr(scale, "one", refused)
    monkeypatch.setattr(scale, "_course", lambda setting, count: [])
    main(fast=True, out=folder)
    assert (folder / "points.jsonl").read_text() == before
    with pytest.raises(AssertionError, match="turn=1"):
        main(fast=True, repeats=2, out=folder)


@pytest.mark.parametrize("parameters", [400, 2500, 10_000, 100_000, 1_000_000])
def test_a_network_has_exactly_as_many_parameters(parameters: int) -> None:
    features, hidden = shape(parameters)
    assert (features + LABELS) * hidden == parameters
    if parameters <= 10_000:
        found = learner(parameters, 100, holdings(features))
        assert found.d == parameters and found.bench.module.inner.weight.shape == (hidden, features)


def test_too_few_parameters_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="400 or more"):
        shape(100)


def test_clients_hold_the_same_whenever_they_are_asked() -> None:
    make = holdings(40)
    first, again, other = make(7), make(7), make(8)
    assert torch.equal(first.inputs["pixel_values"], again.inputs["pixel_values"])
    assert not torch.equal(first.inputs["pixel_values"], other.inputs["pixel_values"])
    assert len(first) == EXAMPLES and len(set(first.labels.tolist())) <= 2


@pytest.mark.parametrize("channel", scale.CHANNELS)
def test_nothing_is_wrong_with_an_arm_at_full_size(channel: str) -> None:
    setting = Setting(channel, 10**6, 1000, 10**6)
    assert problems(arm(setting), setting.parameters, setting.population) == []
    assert arm(setting).sampling.expected(10**6) == pytest.approx(1000)


def test_plans_protect_clients_of_this_population() -> None:
    central, masked = (plan(Setting(channel, 10**6, 1000, 10**6)) for channel in (PLAIN, MASKED))
    assert (central.unit, central.place, masked.place) == ("client", "central", "distributed")
    assert central.delta == masked.delta == pytest.approx(1e-7)
    assert masked.integers is not None and masked.integers.least_answers == 750
    assert arm(Setting(MASKED, 10**6, 1000, 10**6)).channel.modulus == 2**masked.integers.modulus_bits


@pytest.mark.parametrize("cohort", [9, 1000])
def test_a_cohort_is_between_ten_and_the_population(cohort: int) -> None:
    with pytest.raises(InvalidArgument, match="cohort="):
        Setting(PLAIN, 1000, cohort, 2500)


def test_an_unknown_channel_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="channel="):
        Setting("Telepathy", 1000, 10, 2500)


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


def test_limits_are_of_this_machine() -> None:
    found = Limits.here(1 << 20, turns=2)
    assert 0 < found.copy < found.code < 1e-6, "copying a byte is quicker than a code over it, and both than 1 MB/s"


# ------------------------------------------------------------------------------------------------------------ the page

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_says_what_its_points_say() -> None:
    page = " ".join((DOCS / "scale.md").read_text().split())
    recorded = [Point.of(line) for line in (DOCS / "results" / "scale.jsonl").read_text().splitlines()]
    found = {(one.channel, one.parameters): one for one in scale.grown_by_cohort(recorded)}
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
def test_the_pages_figures_are_those_of_its_points(name: str) -> None:
    recorded = [Point.of(line) for line in (DOCS / "results" / "scale.jsonl").read_text().splitlines()]
    assert (DOCS / "results" / f"scale-{name}.svg").read_text() == figures(recorded)[name].standalone()
