"""Tables and figures of costs: what is measured, what is projected, and what is neither."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from privfm.reporting.aggregation_costs import Cost, cells, figures, reference, tables, write_csv, write_json

ORDER = ("Plaintext", "BFV", "Pad")
STAGE = {
    "stage": "update", "asked": 4, "answered": 2, "client_seconds": 3.0, "key_holder_seconds": 0.0,
    "server_seconds": 0.25, "up": 3000, "down": 8,
}  # fmt: skip


def cost(channel: str, clients: int = 4, parameters: int = 10, **other: object) -> Cost:
    values: dict[str, object] = {
        "client_seconds": 0.5, "server_seconds": 2.0, "key_holder_seconds": 0.0, "up": 45.0, "down": 1500.0,
        "largest_error": 1e-5, "deviation": 2e-6, "memory": 3_000_000, "stages": (STAGE,),
    }  # fmt: skip
    return Cost(channel, clients, parameters, **(values | other))  # type: ignore[arg-type]


def test_a_line_says_a_dash_where_there_is_nothing() -> None:
    assert cells(cost("BFV", 1000, 10_000_000)) == (
        "BFV", "1,000", "10,000,000", "0.5", "2", "-", "4.5e-6", "1.5 kB", "1e-5", "2e-6", "-", "-", "3 MB", "-",
    )  # fmt: skip
    noisy = cells(cost("BFV", key_holder_seconds=0.125, noise=0.25, wrap=1e-12, neighbours=6, memory=None))
    assert noisy[5] == "0.125" and noisy[10:] == ("0.25", "1e-12", "-", "6")
    assert cells(cost("BFV", wrap=0.0))[11] == "under 1e-300", "a probability that float64 does not hold"


def test_a_round_is_all_of_its_parties() -> None:
    assert cost("BFV", key_holder_seconds=0.25).seconds == 4 * 0.5 + 2.0 + 0.25


def test_the_reference_is_where_most_channels_were_measured_then_the_largest() -> None:
    assert reference([]) is None
    both = [cost("Plaintext", 4), cost("BFV", 4)]
    assert reference([*both, cost("Plaintext", 400)]) == (4, 10)
    assert reference([*both, cost("Plaintext", 8), cost("BFV", 8)]) == (8, 10)
    assert reference([*both, cost("Plaintext", 8), cost("BFV", 8, kind="left out")]) == (4, 10)


def test_measured_stages_and_projected_have_tables_and_the_rest_a_note() -> None:
    costs = [
        cost("BFV"), cost("Plaintext"), cost("Plaintext", 100, kind="projected", why="a line"),
        Cost("BFV", 9, 10, "left out", "estimated 99 s"), Cost("Pad", 9, 10, "refused", "bits=0"),
    ]  # fmt: skip
    measured, stages, far = tables(costs, ORDER)
    assert [row.cells[0] for row in measured.rows] == ["Plaintext", "BFV"]
    assert "Not measured: BFV, n=9, d=10: estimated 99 s." in measured.notes
    assert "Not measured: Pad, n=9: refused: bits=0." in measured.notes
    assert stages.rows[0].cells == ("Plaintext", "update", "1.5", "-", "0.25", "1.5 kB", "2 B")
    assert far.title == "PROJECTED, not measured" and far.notes == ("Plaintext: a line.",)
    assert all(len(table.columns) == len(row.cells) for table in (measured, stages, far) for row in table.rows)
    assert len(tables([], ORDER)) == 1


def test_figures_show_measured_points_and_open_ones() -> None:
    costs = [cost(channel, n, d) for channel in ORDER[:2] for n in (4, 8) for d in (10, 1000)]
    assert figures([], ORDER) == {}
    plain = figures(costs, ORDER)
    assert set(plain) == {"client", "server", "bytes", "error"}
    assert "PROJECTED" not in plain["server"].label
    far = figures([*costs, cost("Plaintext", 100_000, 10, kind="projected", server_seconds=500.0)], ORDER)
    assert "Plaintext: 500 s" in far["server"].label and "10 parameters; open: PROJECTED" in far["server"].label
    assert far["client"] == plain["client"]
    assert "error" not in figures([cost("BFV", deviation=0.0)], ORDER)


def test_everything_is_written_down(tmp_path: Path) -> None:
    costs = [cost("BFV"), Cost("Pad", 9, 10, "refused", "bits=0")]
    write_json(costs, tmp_path / "new")
    write_csv(costs, tmp_path / "new")
    found = json.loads((tmp_path / "new" / "costs.json").read_text())
    assert [(one["channel"], one["kind"]) for one in found] == [("BFV", "measured"), ("Pad", "refused")]
    assert found[0]["stages"] == [STAGE]
    with (tmp_path / "new" / "costs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["up"] == "45.0" and rows[1]["up"] == "" and "stages" not in rows[0]


@pytest.mark.parametrize("value", [None, 0.0])
def test_what_took_no_time_is_not_drawn(value: float | None) -> None:
    costs = [cost("Plaintext"), cost("BFV", server_seconds=value)]
    assert "BFV" not in figures(costs, ORDER)["server"].label
