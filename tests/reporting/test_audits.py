"""What a report makes of audited runs: tables, figure, answer, and the warning under what is said to be guaranteed."""

from __future__ import annotations

import re
from math import inf, log10
from pathlib import Path
from typing import Any

import pytest

from privfm.reporting import Experiment, ExperimentIndex, IndexedArm, RunFolder, experiment_tables
from privfm.reporting.audit_figures import LEAST, MOST, AuditPoint, audit_panels, audit_points
from privfm.reporting.audits import audit_answer, audit_table, check_table, contradicted, p_text
from privfm.reporting.drawing import drawing_style
from privfm.reporting.figures import all_figures
from privfm.reporting.page import render_page

ENVIRONMENT: dict[str, Any] = {"privfm": "0.1.0", "device": "cpu", "device_name": "x", "versions": {}, "git": {}}
RECORD: dict[str, Any] = {
    "epsilon": 4.0, "delta": 1e-5, "unit": "client", "place": "central", "adversary": "released_model",
    "relation": "zero-out, public N", "participation_bound": None, "rounds": 2, "accountant": "PLD", "event": "e",
    "noise": "n", "tuning": "t", "median": None, "clients": None,
}  # fmt: skip
GAUSSIAN = "the mechanism's trade-off function is Gaussian: not so for a sub-sampled run"


def bound(epsilon: float, ceiling: float = 6.5, **changes: Any) -> dict[str, Any]:
    return {
        "method": "one run, f-DP", "epsilon": epsilon, "delta": 1e-5, "confidence": 0.95, "canaries": 10_000,
        "guesses": 250, "correct": 249, "tries": 1, "ceiling": ceiling, "assumes": GAUSSIAN,
    } | changes  # fmt: skip


def fit(epsilon: float, low: float, high: float) -> dict[str, Any]:
    return {
        "method": "Gaussian fit", "epsilon": epsilon, "low": low, "high": high, "delta": 1e-5, "assumes": "two bells"
    }  # fmt: skip


def said(claimed: float | None, certified: dict[str, Any], **changes: Any) -> dict[str, Any]:
    ratio = None if claimed is None else certified["epsilon"] / claimed
    return {
        "canaries": "GhostCanaries", "count": 10_000, "included": 4_987, "claimed": claimed, "delta": 1e-5,
        "bound": certified, "others": [], "estimate": fit(3.9, 3.5, 4.4), "checks": [], "ratio": ratio, "alarm": "",
    } | changes  # fmt: skip


NOISE = {"name": "noise scale", "found": 0.49876, "expected": 1.0, "p_value": 0.0, "n": 12_345}
SHIFT = {"name": "mean shift", "found": 1.002, "expected": 1.0, "p_value": 0.3, "n": 10_000}
AUDITS = {
    ("Ghosts, epsilon 4", "Ghosts"): said(4.0, bound(2.5), checks=[SHIFT]),
    ("Ghosts, epsilon 1", "Ghosts"): said(1.0, bound(0.0), estimate=None),
    ("Halved noise", "Mistakes"): said(
        4.0, bound(5.0), estimate=fit(9.3, 8.0, inf), checks=[NOISE, SHIFT],
        alarm="epsilon is at least 5, claimed is 4; noise scale 0.499, claimed 1",
    ),
    ("Secrets, no plan", "Mistakes"): said(
        None, bound(0.7, ceiling=3.1, method="one run", assumes=""), canaries="InsertedSecrets", count=64, included=30
    ),
}  # fmt: skip


def made(folder: Path, audits: dict[tuple[str, str], dict[str, Any] | None], seeds: tuple[int, ...] = (0,)) -> Path:
    """One arm an audit; None is an arm that was not audited."""
    arms = []
    for number, ((title, group), audit) in enumerate(audits.items()):
        arm = IndexedArm(f"arm-{number}", title, group)
        arms.append(arm)
        for seed in seeds:
            run = RunFolder.open(folder / arm.name / f"seed-{seed}", {"seed": seed, "number": number}, ENVIRONMENT)
            run.append({"round": 0, "utility": 0.5, "skipped": ""})
            private = audit is not None and audit["claimed"] is not None
            run.finish({
                "arm": arm.name, "title": title, "kind": "federated", "seed": seed, "rounds": 1, "utility": 0.5,
                "utility_metric": "accuracy", "utility_n": 900, "utility_unit": "share", "higher_is_better": True,
                "trivial_utility": 0.2, "skipped_rounds": 0, "attack": None, "rule_name": "Mean", "malicious_share": 0,
                "channel_name": "Plaintext", "bytes_up_per_client": 9000, "seconds_total": 1.0,
                "epsilon": RECORD if private else None, "epsilons": [RECORD] if private else [],
                **({} if audit is None else {"audited": audit}),
            })  # fmt: skip
    ExperimentIndex("x", "What?", "python", "2025-03-01", tuple(arms), seeds).write(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("audits"), AUDITS)


@pytest.fixture(scope="module")
def experiment(folder: Path) -> Experiment:
    return Experiment.read(folder)


def figure_of(experiment: Experiment) -> Any:
    return next(figure for figure in all_figures(experiment) if figure.name == "audit")


# -------------------------------------------------------------------------------------------------------------- tables


def test_the_table_by_hand(experiment: Experiment) -> None:
    table = audit_table(experiment)
    assert table is not None
    assert [row.cells for row in table.rows] == [
        ("Ghosts, epsilon 4", "4 (1e-5)", "2.5", "0.62", "nothing", "3.9 (3.5 to 4.4)", "6.5",
         "10,000 GhostCanaries (4,987)", "one run, f-DP: 249 of 250"),
        ("Ghosts, epsilon 1", "1 (1e-5)", "0", "0.00", "nothing", "-", "6.5",
         "10,000 GhostCanaries (4,987)", "one run, f-DP: 249 of 250"),
        ("Halved noise", "4 (1e-5)", "5", "1.25", "bound, noise scale", "9.3 (8 to infinite)", "6.5",
         "10,000 GhostCanaries (4,987)", "one run, f-DP: 249 of 250"),
        ("Secrets, no plan", "nothing", "0.7", "-", "nothing", "3.9 (3.5 to 4.4)", "3.1",
         "64 InsertedSecrets (30)", "one run: 249 of 250"),
    ]  # fmt: skip
    assert len(table.rows[0].cells) == len(table.columns)
    assert [row.group for row in table.rows] == ["Ghosts", "Ghosts", "Mistakes", "Mistakes"]
    assert "holds with 95 % confidence" in table.notes[0]
    assert table.notes[1:] == (f"one run, f-DP: {GAUSSIAN}.", "Gaussian fit: two bells.")


def test_the_checks_by_hand(experiment: Experiment) -> None:
    table = check_table(experiment)
    assert table is not None
    assert [row.cells for row in table.rows] == [
        ("Ghosts, epsilon 4", "mean shift", "1.002", "1", "0.3", "10,000"),
        ("Halved noise", "noise scale", "0.4988", "1", "below 1e-12", "12,345"),
        ("Halved noise", "mean shift", "1.002", "1", "0.3", "10,000"),
    ]


def test_an_infinite_claim_and_seeds_are_written_out(tmp_path: Path) -> None:
    audits = {("No noise", "x"): said(inf, bound(inf), ratio=None)}
    table = audit_table(Experiment.read(made(tmp_path, audits, seeds=(3, 1))))
    assert table is not None
    assert [row.cells[:2] for row in table.rows] == [
        ("No noise, seed 1", "nothing"),  # an epsilon that is infinite claims nothing
        ("No noise, seed 3", "nothing"),
    ]
    assert table.rows[0].cells[2:4] == ("infinite", "-")


def test_without_audits_there_is_nothing_of_it(tmp_path: Path) -> None:
    plain = made(tmp_path, {("Plain", "x"): None})
    read = Experiment.read(plain)
    assert audit_table(read) is None and check_table(read) is None
    assert audit_answer(read) == "" and contradicted(read) == ()
    assert [table.title for table in experiment_tables(plain)] == ["All arms"]
    assert "audit" not in [figure.name for figure in all_figures(read)]
    page = render_page(read)
    assert "Do audits contradict" not in page and "audited" not in page


def test_beside_arms_that_are_not_audited_other_answers_stay(tmp_path: Path) -> None:
    both = {("Plain", "x"): None, ("Ghosts, epsilon 4", "x"): AUDITS["Ghosts, epsilon 4", "Ghosts"]}
    asked = re.findall("<dt>(.*[?])</dt>", render_page(Experiment.read(made(tmp_path, both))))
    assert asked == ["Do audits contradict a claim?", "What did privacy cost?"]


def test_tables_stand_among_the_others(folder: Path) -> None:
    titles = [table.title for table in experiment_tables(folder)]
    assert titles == ["All arms", "Epsilon claimed and audited", "Checks of the mechanism"]


@pytest.mark.parametrize(("value", "text"), [(0.0, "below 1e-12"), (2e-12, "2e-12"), (0.04567, "0.046"), (1.0, "1")])
def test_a_p_value_is_never_zero(value: float, text: str) -> None:
    assert p_text(value) == text


# -------------------------------------------------------------------------------------------------------------- answer


def test_the_answer_names_who_is_contradicted_and_what_is_certified_elsewhere(experiment: Experiment) -> None:
    assert audit_answer(experiment) == (
        "The claim is contradicted in 1 of 4 audited runs: Halved noise (epsilon is at least 5, claimed is 4; noise "
        "scale 0.499, claimed 1). Elsewhere up to 0.62 of a claim is certified (Ghosts, epsilon 4), "
        "each run at its own confidence."
    )


def test_where_nothing_is_wrong_nothing_is_proved(tmp_path: Path) -> None:
    sound = {key: audit for key, audit in AUDITS.items() if not audit["alarm"]}
    read = Experiment.read(made(tmp_path, sound))
    assert audit_answer(read).startswith("Nothing contradicts what is claimed of 3 audited runs.")
    assert contradicted(read) == ()


def test_the_page_warns_of_guarantees_that_an_audit_contradicts(experiment: Experiment, tmp_path: Path) -> None:
    page = render_page(experiment)
    assert contradicted(experiment) == ("Halved noise",)
    assert "Audits contradict what is claimed of: Halved noise. Nobody should rely" in page
    assert page.index("What is guaranteed") < page.index("Audits contradict what is claimed of")
    assert re.findall("<dt>(.*[?])</dt>", page) == ["Do audits contradict a claim?"]
    sound = {key: audit for key, audit in AUDITS.items() if not audit["alarm"]}
    assert "Nobody should rely" not in render_page(Experiment.read(made(tmp_path, sound)))


# -------------------------------------------------------------------------------------------------------------- figure


def test_a_panel_a_group_says_every_number(experiment: Experiment) -> None:
    figure = figure_of(experiment)
    assert [panel.label for panel in figure.panels] == [
        "Epsilon certified and estimated by epsilon claimed, Ghosts. 1 Ghosts, epsilon 4: at least 2.5, estimate 3.9; "
        "2 Ghosts, epsilon 1: at least 0, estimate -.",
        "Epsilon certified and estimated by epsilon claimed, Mistakes. 1 Halved noise: at least 5, estimate 9.3; "
        "contradicted; 2 Secrets, no plan: at least 0.7, estimate 3.9.",
    ]
    assert "certified (one run, f-DP; one run)" in figure.caption
    first, second = (panel.svg for panel in figure.panels)
    assert ">nothing<" in first and ">nothing<" in second  # one frame for all panels
    assert second.count("var(--loss") > 0 and first.count("var(--loss") == 0  # only what is contradicted


def test_points_are_what_was_said(experiment: Experiment) -> None:
    points = audit_points(experiment)
    assert [point.claimed for point in points] == [4.0, 1.0, 4.0, None]
    assert points[0].estimate == (3.9, 3.5, 4.4) and points[1].estimate is None
    assert [point.contradicted for point in points] == [False, False, True, False]
    assert points[3].ceiling == 3.1 and points[3].method == "one run"


def point(claimed: float | None, certified: float, contradicted: bool = False, title: str = "x") -> AuditPoint:
    return AuditPoint(title, "g", claimed, certified, certified, None, "m", contradicted)


def markers(svg: str) -> list[tuple[float, float]]:
    """Places of the filled points."""
    return [(float(x), float(y)) for x, y in re.findall(r'<use [^>]*?x="([\d.]+)" y="([\d.]+)"', svg)]


def test_a_point_stands_on_the_diagonal_exactly_where_the_claim_is_certified() -> None:
    with drawing_style():
        (panel,) = audit_panels([point(claimed, claimed) for claimed in (1.0, 2.0, 8.0)])
        (above,) = audit_panels([point(1.0, 1.0), point(2.0, 4.0), point(8.0, 8.0)])
    (x1, y1), (x2, y2), (x3, y3) = markers(panel.svg)
    assert (x2 - x1) / (x3 - x1) == pytest.approx(log10(2) / log10(8), rel=1e-3)  # logarithmic
    assert (y1 - y2) / (y1 - y3) == pytest.approx(log10(2) / log10(8), rel=1e-3)
    moved = markers(above.svg)[1]
    assert moved[0] == pytest.approx(x2) and moved[1] < y2 - 10  # higher, on a page that counts down


def test_what_is_off_the_axes_is_drawn_at_their_ends() -> None:
    with drawing_style():
        (panel,) = audit_panels([point(1.0, 0.0), point(4.0, LEAST), point(8.0, inf), point(16.0, MOST)])
    zero, least, infinite, most = (y for _, y in markers(panel.svg))
    assert zero == least and infinite == most < least
    assert "at least 0, 0.1, infinite, 100," in panel.label  # the words keep the number


def test_runs_of_one_claim_stand_side_by_side_and_what_claims_nothing_at_the_right() -> None:
    with drawing_style():
        (panel,) = audit_panels([point(4.0, 1.0), point(4.0, 1.0, title="y"), point(None, 1.0, title="z")])
    first, second, nothing = (x for x, _ in markers(panel.svg))
    assert first < second < nothing
    with drawing_style():
        (panel,) = audit_panels([point(None, 0.5)])
    assert "nothing" in panel.svg
