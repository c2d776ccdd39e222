"""The experiment on scale, small: rounds are real, nothing is measured twice, and its tables say what was measured."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from experiments import scale
from experiments.scale import arm, holdings, learner, limits_here, main, plan, planned, shape
from privfm.checks import InvalidArgument
from privfm.federation import problems
from privfm.reporting.scale_figures import figures
from privfm.reporting.scales import CHANNELS, EVERY, EXAMPLES, MASKED, PLAIN, Point, Setting


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scale")
    main(fast=True, out=out)
    return out


@pytest.fixture(scope="module")
def points(folder: Path) -> list[Point]:
    return [Point.of(line) for line in (folder / "points.jsonl").read_text().splitlines()]


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


def test_points_say_which_code_played_them(folder: Path) -> None:
    rows = [json.loads(line) for line in (folder / "points.jsonl").read_text().splitlines()]
    (version,) = {row["version"] for row in rows}
    assert re.fullmatch(r"[0-9a-f]{40}( with changes)?|privfm [\w.+]+", version)


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


def test_points_of_which_no_version_is_known_are_not_measured_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those that were measured before it was written down."""
    rows = [json.loads(line) for line in (folder / "points.jsonl").read_text().splitlines()]
    old = "".join(json.dumps({key: row[key] for key in row if key != "version"}) + "\n" for row in rows[:-1])
    (tmp_path / "points.jsonl").write_text(old)
    last = Point.of(json.dumps(rows[-1]))
    asked: list[Setting] = []

    def again(setting: Setting) -> Point:
        asked.append(setting)
        return last

    monkeypatch.setattr(scale, "one", again)
    monkeypatch.setattr(scale, "_course", lambda setting, count: [])
    main(fast=True, out=tmp_path)
    text = (tmp_path / "points.jsonl").read_text()
    assert asked == [last.setting] and text.startswith(old)
    assert "version" in json.loads(text.splitlines()[-1])


@pytest.mark.parametrize("parameters", [400, 2500, 10_000, 100_000, 1_000_000])
def test_a_network_has_exactly_as_many_parameters(parameters: int) -> None:
    features, hidden = shape(parameters)
    assert (features + scale.LABELS) * hidden == parameters
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


@pytest.mark.parametrize("channel", CHANNELS)
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


def test_limits_are_of_this_machine() -> None:
    found = limits_here(1 << 20, turns=2)
    assert 0 < found.copy < found.code < 1e-6, "copying a byte is quicker than a code over it, and both than 1 MB/s"
