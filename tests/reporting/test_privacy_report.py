"""What a report makes of several methods under several epsilons: lines, table, sentences, and the privacy statement."""

from __future__ import annotations

import json
from math import isinf
from pathlib import Path
from typing import Any

import pytest

from privfm.reporting import Experiment, ExperimentIndex, IndexedArm, RunFolder, epsilon_paragraph, experiment_tables
from privfm.reporting.answers import answers
from privfm.reporting.figures import all_figures
from privfm.reporting.noise_lines import epsilon_names, noise_lines
from privfm.reporting.tables import guarantees

ENVIRONMENT: dict[str, Any] = {"privfm": "0.1.0", "device": "cpu", "device_name": "x", "versions": {}, "git": {}}
UTILITIES = {  # by method and unit, at epsilon 1, 8 and without noise
    ("LoRA", "example"): (0.40, 0.60, 0.70),
    ("Head only", "example"): (0.50, 0.55, 0.62),
    ("LoRA", "client"): (0.30, 0.50, 0.68),
    ("Head only", "client"): (0.35, 0.45, 0.61),
}
INFINITE = float("inf")


def record(unit: str, epsilon: float, **changes: Any) -> dict[str, Any]:
    local = unit == "example"
    return {
        "epsilon": epsilon, "delta": 1e-5, "unit": unit, "place": "local" if local else "central",
        "adversary": "server" if local else "released_model", "relation": "zero-out, public N",
        "participation_bound": 10 if local else None, "rounds": 10, "accountant": "PLD, dp-accounting 0.6.0",
        "event": "PoissonSampled(0.1, Gaussian(1.1)) x 40", "noise": "simulated: no guarantee if the seed is known",
        "tuning": "excludes tuning", "median": 0.6 * epsilon if local else None, "clients": 7 if local else None,
    } | changes  # fmt: skip


def play(folder: Path, arm: IndexedArm, seed: int, config: dict[str, Any], summary: dict[str, Any]) -> None:
    run = RunFolder.open(folder / arm.name / f"seed-{seed}", {"seed": seed, **config}, ENVIRONMENT)
    for now in (0, 1):
        run.append({"round": now, "utility": summary["utility"], "skipped": ""})
    run.finish(summary)


def made(folder: Path, seeds: tuple[int, ...] = (0, 1)) -> Path:
    """Two methods under two units; epsilon is a little below what was asked, differently under each unit."""
    arms = []
    for (method, unit), utilities in UTILITIES.items():
        for asked, utility in zip((1.0, 8.0, INFINITE), utilities, strict=True):
            shown = "infinity" if isinf(asked) else f"{asked:g}"
            arm = IndexedArm(f"{unit}-{method}-{shown}".replace(" ", ""), f"{method}, epsilon {shown}", unit)
            reached = asked * (0.9996 if unit == "example" else 0.9987)
            noise = 0.0 if isinf(asked) else 3.0 / asked
            plan = {"unit": unit, "noise_multiplier": noise, "max_grad_norm": 1.0, "local": None}
            if unit == "example":
                plan["local"] = {"batch_size": 8, "noise_by_examples": [[1, noise]]}
            said = None if isinf(asked) else record(unit, reached)
            arms.append(arm)
            for seed in seeds:
                play(folder, arm, seed, {"model": method, "plan": plan, "rule": "Mean()"}, {
                    "arm": arm.name, "title": arm.title, "kind": "federated", "seed": seed, "rounds": 10,
                    "utility": utility + 0.01 * seed, "utility_metric": "accuracy", "utility_n": 900,
                    "utility_unit": "share", "higher_is_better": True, "trivial_utility": 0.2, "skipped_rounds": 0,
                    "epsilon": said or record(unit, INFINITE), "epsilons": [said or record(unit, INFINITE)],
                    "epsilon_curve": [[1, 0.3 * reached], [3, 0.6 * reached], [10, reached]], "attack": None,
                    "attack_name": None, "rule": "Mean()", "rule_name": "Mean", "channel_name": "Plaintext",
                    "bytes_up_per_client": 9000, "seconds_total": 1.0, "malicious_share": 0.0,
                })  # fmt: skip
    ExperimentIndex("x", "What?", "python", "2025-03-01", tuple(arms), seeds).write(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("lines"))


def edit(run: Path, name: str, **changes: Any) -> None:
    content = json.loads((run / name).read_text())
    (run / name).write_text(json.dumps(content | changes))


def test_arms_that_differ_by_noise_alone_are_one_line(folder: Path) -> None:
    lines = noise_lines(Experiment.read(folder))
    assert [(line.title, line.unit) for line in lines] == list(UTILITIES)
    assert all([arm.title.rpartition(" ")[2] for arm in line.arms] == ["1", "8", "infinity"] for line in lines)
    assert epsilon_names(lines) == ["1", "8", "no noise"]  # 0.9996 and 0.9987 are both asked as 1
    assert all(line.without_noise is line.arms[-1] for line in lines)


def test_another_clip_or_an_attack_is_another_line(tmp_path: Path) -> None:
    made(tmp_path, seeds=(0,))
    changed = tmp_path / "example-LoRA-8" / "seed-0"
    plan = json.loads((changed / "config.json").read_text())["plan"]
    edit(changed, "config.json", plan=plan | {"max_grad_norm": 2.0})
    edit(tmp_path / "client-LoRA-8" / "seed-0", "summary.json", attack="SignFlip()", attack_name="SignFlip")
    lines = {(line.title, line.unit): len(line.arms) for line in noise_lines(Experiment.read(tmp_path))}
    assert lines == {
        ("LoRA", "example"): 2,
        ("Head only", "example"): 3,
        ("LoRA", "client"): 2,
        ("Head only", "client"): 3,
    }


def test_the_table_by_epsilon_by_hand(folder: Path) -> None:
    table = next(table for table in experiment_tables(folder) if table.title == "Utility by epsilon")
    assert [column.title for column in table.columns] == ["epsilon", "1", "8", "no noise"]
    assert table.rows[1].cells == (
        "Head only, examples of a client",
        "50.5 % (50.0 to 51.0)",
        "55.5 % (55.0 to 56.0)",
        "62.5 % (62.0 to 63.0)",
    )


def test_one_line_has_neither_table_nor_panels_of_methods(tmp_path: Path) -> None:
    made(tmp_path, seeds=(0,))
    index = ExperimentIndex.read(tmp_path)
    own = tuple(arm for arm in index.arms if arm.name.startswith("client-LoRA"))
    ExperimentIndex(index.name, index.question, index.command, index.created, own, index.seeds).write(tmp_path)
    assert [table.title for table in experiment_tables(tmp_path)] == ["All arms"]
    figure = next(figure for figure in all_figures(Experiment.read(tmp_path)) if figure.name == "privacy")
    assert "without noise" in figure.panels[0].label


def test_panels_show_every_number_of_their_unit(folder: Path) -> None:
    figures = {figure.name: figure for figure in all_figures(Experiment.read(folder))}
    example, client = (panel.label for panel in figures["privacy"].panels)
    assert "LoRA: 40.5 % at 1, 60.5 % at 8, 70.5 % at no noise" in example
    assert "Head only: 35.5 % at 1, 45.5 % at 8, 61.5 % at no noise" in client and "70.5" not in client
    assert "not comparable" in figures["privacy"].caption
    growth = [panel.label for panel in figures["epsilon"].panels]
    assert {label.partition(".")[0] for label in growth} == {
        "Epsilon by rounds played, examples of a client",
        "Epsilon by rounds played, whole clients",
    }
    assert all("8 (2 arms)" in label or "7.99 (2 arms)" in label for label in growth)


def test_the_answer_names_the_best_method_of_each_unit(folder: Path) -> None:
    (answer,) = (answer.text for answer in answers(Experiment.read(folder)))
    assert answer == (
        "For examples of a client the best was at epsilon 1 Head only 50.5 % (-12.0 points), at epsilon 8 LoRA 60.5 % "
        "(-10.0 points) and without noise LoRA 70.5 %. For whole clients the best was at epsilon 1 Head only 35.5 % "
        "(-26.0 points), at epsilon 8 LoRA 50.5 % (-18.0 points) and without noise LoRA 68.5 %."
    )


# ---------------------------------------------------------------------------------------------------------- statement


def test_arms_with_the_same_record_share_a_paragraph_and_others_do_not(folder: Path) -> None:
    paragraphs = guarantees(Experiment.read(folder))
    assert len(paragraphs) == 4  # two units, two epsilons
    assert paragraphs[0].startswith("LoRA, epsilon 1; Head only, epsilon 1: epsilon 1 at delta 1e-5 after 10 rounds")


def test_a_statement_is_complete() -> None:
    text = epsilon_paragraph("Run", record("example", 4.0))
    for part in (
        "epsilon 4 at delta 1e-5 after 10 rounds",
        "(the largest of 7 clients; the median client: 2.4)",
        "one example of a client that takes part in at most 10 rounds",
        "against the server, which sees everything that it is sent and who took part",
        "neighbouring data sets: zero-out, public N",
        "local (each client adds noise in every local step, before anything leaves it)",
        "Accountant: PLD, dp-accounting 0.6.0",
        "event: PoissonSampled(0.1, Gaussian(1.1)) x 40",
        "Noise: simulated: no guarantee if the seed is known",
        "Tuning: excludes tuning",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("central", "the server adds noise and sees the sum without it"),
        ("key_holder", "who decrypts adds noise, and sees the sum without it; the server does not"),
        ("local", "each client adds noise to its own update"),
        ("distributed", "the clients' shares of noise add up"),
    ],
)
def test_a_statement_says_who_adds_the_noise(place: str, words: str) -> None:
    text = epsilon_paragraph("Run", record("client", 4.0, place=place))
    assert f"Place of the noise: {place} ({words}" in text
    assert "median" not in text and "one client that takes part in any number of rounds, drawn in secret" in text
