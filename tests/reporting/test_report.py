"""The table, the figures and the page of an experiment, on a made-up experiment of fourteen arms."""

import io
import json
import math
import re
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from rich.console import Console
from scipy.stats import binomtest

from privfm.checks import BrokenCheckpoint, InvalidArgument
from privfm.reporting import Experiment, ExperimentIndex, IndexedArm, RunFolder, experiment_tables, show, write_report
from privfm.reporting.answers import answers
from privfm.reporting.drawing import spread_apart
from privfm.reporting.figures import all_figures
from privfm.reporting.formats import bytes_text, difference_text, seconds_text, small_number, utility_text
from privfm.reporting.summary import paired_difference, wilson

TRIVIAL = 0.2
ROUNDS = 20
# name, title, group, rule, attack, epsilon, channel, final utility
ARMS = (
    ("centralised", "Centralised", "Reference", "Mean", None, None, "Plaintext", 0.694),
    ("plain", "Federated, plain", "Reference", "Mean", None, None, "Plaintext", 0.662),
    ("dp8", "Client DP, epsilon 8", "Privacy", "Release", None, 7.98, "Plaintext", 0.641),
    ("dp3", "Client DP, epsilon 3", "Privacy", "Release", None, 2.93, "Plaintext", 0.612),
    ("ckks", "CKKS aggregation", "Privacy", "Mean", None, None, "CKKS", 0.662),
    ("trimmed", "TrimmedMean", "Robust rules, no attack", "TrimmedMean", None, None, "Plaintext", 0.633),
    ("multikrum", "MultiKrum", "Robust rules, no attack", "MultiKrum", None, None, "Plaintext", 0.648),
    ("krum", "Krum", "Robust rules, no attack", "Krum", None, None, "Plaintext", 0.471),
    ("flip-mean", "Mean under SignFlip", "20 % SignFlip", "Mean", "SignFlip", None, "Plaintext", 0.207),
    (
        "flip-trimmed",
        "TrimmedMean under SignFlip",
        "20 % SignFlip",
        "TrimmedMean",
        "SignFlip",
        None,
        "Plaintext",
        0.588,
    ),
    ("flip-multikrum", "MultiKrum under SignFlip", "20 % SignFlip", "MultiKrum", "SignFlip", None, "Plaintext", 0.639),
    ("alie-mean", "Mean under ALIE", "20 % ALIE", "Mean", "ALIE", None, "Plaintext", 0.655),
    ("alie-trimmed", "TrimmedMean under ALIE", "20 % ALIE", "TrimmedMean", "ALIE", None, "Plaintext", 0.571),
    ("alie-multikrum", "MultiKrum under ALIE", "20 % ALIE", "MultiKrum", "ALIE", None, "Plaintext", 0.524),
)
ATTACKS = {
    "SignFlip": ("SignFlip(scale=4.0)", ["its own updates"]),
    "ALIE": ("ALIE(z=None)", ["mean and deviation of the honest updates"]),
}
RULES = {
    "Mean": "Mean()",
    "Release": "CentralRelease(clip=0.5)",
    "TrimmedMean": "TrimmedMean(f=30)",
    "MultiKrum": "MultiKrum(f=30)",
    "Krum": "Krum(f=30)",
}


def epsilon_record(epsilon):
    return {
        "epsilon": epsilon, "delta": 1e-4, "unit": "client", "place": "central", "adversary": "released_model",
        "relation": "zero-out, public N", "participation_bound": None, "rounds": ROUNDS,
        "accountant": "PLD, dp-accounting 0.6.0", "event": "PoissonSampled(0.1, Gaussian(1.1)) x 20",
        "noise": "simulated: no guarantee if the seed is known", "tuning": "excludes tuning",
    }  # fmt: skip


def summary_of(arm, seed, utility):
    name, title, _, rule, attack, epsilon, channel, _ = arm
    central = name == "centralised"
    sent = 0 if central else 3_212_000 if channel == "CKKS" else 78_896
    return {
        "arm": name, "title": title, "seed": seed, "rounds": ROUNDS, "skipped_rounds": 0,
        "utility": utility, "utility_metric": "accuracy", "utility_n": 2000, "utility_unit": "share",
        "higher_is_better": True, "trivial_utility": TRIVIAL,
        "metrics": {"accuracy": {"value": utility, "n": 2000, "higher_is_better": True, "unit": "share"}},
        "epsilon": None if epsilon is None else epsilon_record(epsilon),
        "rule": RULES[rule], "rule_name": rule, "channel": f"{channel}()", "channel_name": channel,
        "attack": ATTACKS[attack][0] if attack else None, "attack_name": attack,
        "attack_knowledge": ATTACKS[attack][1] if attack else [], "malicious_share": 0.2 if attack else 0.0,
        "trained_values": 19_724, "clients": 1003, "cohort_expected": 100.0,
        "bytes_up_per_client": sent, "bytes_down_per_client": 0 if central else 78_896,
        "seconds_total": 12.5 if central else 61.0 if channel == "CKKS" else 31.0 + len(title) / 10,
        "seconds_training": 11.0, "seconds_aggregation": 30.0 if channel == "CKKS" else 0.4,
        "kind": "centralised" if central else "federated",
        "channel_error_relative_l2": 3.1e-8 if channel == "CKKS" else None,
    }  # fmt: skip


def config_of(arm, seed):
    name, _, _, rule, attack, epsilon, channel, _ = arm
    return {
        "seed": seed, "rule": RULES[rule], "channel": channel, "plan": epsilon, "central": name == "centralised",
        "attack": attack, "malicious_share": 0.2 if attack else 0.0,
    }  # fmt: skip


def make_experiment(
    folder,
    seeds=(0,),
    arms=ARMS,
    question="What do privacy and robustness cost in federated fine-tuning of MiniLM on real sentences?",
):
    """An experiment's folder as a script leaves it: learning curves that end at each arm's utility, give or take."""
    environment = {
        "privfm": "0.1.0", "python": "3.11.7", "platform": "Linux-x86_64", "cpu_count": 2, "torch_threads": 1,
        "device": "cpu", "device_name": "x86_64", "versions": {"torch": "2.13.0", "peft": "0.21.2", "numpy": "2.4.6"},
        "git": {"commit": "2c938f780e82", "dirty": False}, "command": "python -m experiments.tradeoff",
    }  # fmt: skip
    for number, arm in enumerate(arms):
        for seed in seeds:
            final = arm[-1] + 0.004 * seed * (-1) ** number
            noise = np.random.default_rng([number, seed]).normal(size=ROUNDS)
            run = RunFolder.open(folder / arm[0] / f"seed-{seed}", config_of(arm, seed), environment)
            for played in range(ROUNDS):
                shape = (1 - math.exp(-played / 4)) / (1 - math.exp(-(ROUNDS - 1) / 4))
                wobble = 0.006 * noise[played] * (played < ROUNDS - 1)
                utility = TRIVIAL + (final - TRIVIAL) * shape + wobble if played % 2 or played == 0 else None
                run.append({"round": played, "utility": utility, "skipped": "", "arrived": 97, "bytes_up": 7_652_912,
                            "seconds_training": 1.2})  # fmt: skip
            run.finish(summary_of(arm, seed, final))
    indexed = tuple(IndexedArm(name, title, group) for name, title, group, *_ in arms)
    notes = ("ALIE is built to hurt robust rules and hardly moves a mean.", "Learning rates were chosen on validation.")
    ExperimentIndex("tradeoff", question, "python -m experiments.tradeoff --out runs/tradeoff", "2025-03-01 12:00 UTC",
                    indexed, tuple(seeds), notes).write(folder)  # fmt: skip
    return folder


def make_arm(name, final, rule="Mean", attack=None, epsilon=None, channel="Plaintext"):
    return (name, name, "", rule, attack, epsilon, channel, final)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_experiment(tmp_path_factory.mktemp("experiment"))


@pytest.fixture(scope="module")
def page(folder):
    return write_report(folder).read_text(encoding="utf-8")


def cells(folder, arm_title):
    table = experiment_tables(folder)[0]
    row = next(row for row in table.rows if row.cells[0].startswith(arm_title))
    return dict(zip((column.short for column in table.columns), row.cells, strict=True))


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (10, 10), (1, 3), (662, 1000), (1, 2000)])
def test_wilson_equals_scipy(successes, n):
    expected = binomtest(successes, n).proportion_ci(confidence_level=0.95, method="wilson")
    assert wilson(successes / n, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_is_not_the_normal_interval():
    """The textbook interval leaves [0, 1] near its ends; Wilson's does not, and is not empty at 0."""
    low, high = wilson(0.0, 20)
    assert low == 0 and 0.1 < high < 0.2


@pytest.mark.parametrize(("share", "n"), [(1.2, 10), (-0.1, 10), (0.5, 0), (math.nan, 10)])
def test_wilson_refuses(share, n):
    with pytest.raises(InvalidArgument):
        wilson(share, n)


def test_table_by_hand(folder):
    flipped = cells(folder, "Mean under SignFlip")
    assert flipped["accuracy"] == "20.7 %"
    assert flipped["clean"] == "66.2 %"  # the plain arm: same rule and channel
    assert flipped["effect"] == "-45.5"
    assert flipped["relative"] == "0.01"  # (.207 - .2) / (.694 - .2)
    private = cells(folder, "Client DP, epsilon 3")
    assert private["epsilon"] == "2.93 (1e-4, released model)"
    assert private["relative"] == "0.83"  # (.612 - .2) / (.694 - .2)
    assert private["interval"] == "59.0 to 63.3"  # binomtest(1224, 2000), Wilson
    assert private["sent"] == "78.9 kB" and private["clean"] == "-"
    centralised = cells(folder, "Centralised")
    assert (centralised["relative"], centralised["sent"], centralised["time"]) == ("1.00", "-", "12 s")


def test_an_attack_is_compared_to_its_own_rule(folder):
    experiment = Experiment.read(folder)
    partners = {arm.arm.name: experiment.clean_partner(arm) for arm in experiment.attacked}
    assert {name: partner and partner.arm.name for name, partner in partners.items()} == {
        "flip-mean": "plain", "flip-trimmed": "trimmed", "flip-multikrum": "multikrum",
        "alie-mean": "plain", "alie-trimmed": "trimmed", "alie-multikrum": "multikrum",
    }  # fmt: skip


def test_without_its_clean_arm_an_attack_has_no_effect(tmp_path):
    arms = (make_arm("plain", 0.6), make_arm("attacked", 0.3, "TrimmedMean", "SignFlip"))
    row = cells(make_experiment(tmp_path, arms=arms), "attacked")
    assert (row["clean"], row["effect"], row["relative"]) == ("-", "-", "-")


def test_several_seeds_are_points_and_range(tmp_path):
    """Seeds move the first arm up and the second down: 60.0, 60.4, 60.8 and 40.0, 39.6, 39.2."""
    arms = (make_arm("plain", 0.6), make_arm("attacked", 0.4, attack="SignFlip"))
    folder = make_experiment(tmp_path, seeds=(0, 1, 2), arms=arms)
    row = cells(folder, "attacked")
    assert row["accuracy"] == "39.6 %"
    assert row["seeds"] == "39.2 to 40.0 (39.2, 39.6, 40.0)"
    assert row["effect"] == "-20.8"  # mean of -20.0, -20.8 and -21.6, paired by seed
    assert "One seed" not in experiment_tables(folder)[0].markdown()
    assert "One seed" not in write_report(folder).read_text(encoding="utf-8")


def test_differences_are_paired_by_seed(tmp_path):
    """A seed that only one arm finished does not enter."""
    folder = make_experiment(
        tmp_path, seeds=(0, 5), arms=(make_arm("plain", 0.6), make_arm("attacked", 0.4, attack="SignFlip"))
    )
    (folder / "plain" / "seed-5" / "summary.json").unlink()
    plain, attacked = Experiment.read(folder).arms
    assert paired_difference(attacked, plain) == pytest.approx(-0.2)
    assert cells(folder, "plain")["arm"] == "plain (1 of 2 seeds not finished)"


def test_an_unfinished_arm_is_shown_as_such(tmp_path):
    folder = make_experiment(tmp_path, arms=(make_arm("plain", 0.6), make_arm("other", 0.4)))
    (folder / "other" / "seed-0" / "summary.json").unlink()
    assert cells(folder, "other")["accuracy"] == "not finished"
    assert "Runs not finished: 1." in write_report(folder).read_text(encoding="utf-8")


def test_relative_utility_needs_a_reference_that_learned(tmp_path):
    arms = (make_arm("centralised", TRIVIAL), make_arm("plain", 0.6))
    assert cells(make_experiment(tmp_path, arms=arms), "plain")["relative"] == "-"


def test_a_diverged_run_is_not_a_number(tmp_path):
    arms = (make_arm("plain", 0.6), make_arm("diverged", 0.4, attack="SignFlip"))
    folder = make_experiment(tmp_path, arms=arms)
    (folder / "diverged" / "seed-0" / "summary.json").unlink()
    RunFolder(folder / "diverged" / "seed-0").finish(summary_of(arms[1], 0, math.nan))
    assert cells(folder, "diverged")["accuracy"] == "not finite"
    assert "no finite number" in write_report(folder).read_text(encoding="utf-8")


def test_the_plain_form_is_markdown_without_colour(folder):
    output = io.StringIO()
    show(experiment_tables(folder), Console(file=output))
    lines = output.getvalue().splitlines()
    assert lines[:2] == ["## All arms", ""]
    assert lines[2].startswith("| arm ") and set(lines[3]) <= set("|- ")
    assert len({line.count("|") for line in lines[2 : 4 + len(ARMS)]}) == 1
    assert "## Worst case of each rule" in lines
    assert "\x1b" not in output.getvalue() and "\u2500" not in output.getvalue()
    assert "against somebody who sees the released model, not the server" in output.getvalue()


def test_a_reader_is_warned_of_a_coarse_channel_and_of_skipped_rounds(tmp_path):
    arms = (make_arm("fine", 0.6), make_arm("coarse", 0.6), make_arm("some", 0.5), make_arm("none", 0.2))
    folder = make_experiment(tmp_path, arms=arms)
    changes = {"coarse": {"channel_error_relative_l2": 0.25}, "some": {"skipped_rounds": 1}}
    changes["none"] = {"skipped_rounds": ROUNDS}
    for name, change in changes.items():
        run = folder / name / "seed-0"
        summary = json.loads((run / "summary.json").read_text())
        (run / "summary.json").write_text(json.dumps(summary | change))
        rows = (run / "rounds.jsonl").read_text()
        if "skipped_rounds" in change:
            (run / "rounds.jsonl").write_text(rows.replace('"skipped": ""', '"skipped": "too few updates"'))
    notes = experiment_tables(folder)[0].notes
    assert "coarse: the channel changed the sum by up to 25.0 %; lower its bound." in notes
    assert "some: 1 of 20 rounds were skipped, the first because: too few updates." in notes
    assert "none: all rounds were skipped, the first because: too few updates. The model was never trained." in notes
    assert not any(note.startswith("fine:") for note in notes)


def test_markdown_is_aligned_to_its_end(folder):
    lines = experiment_tables(folder)[0].markdown().splitlines()[: 2 + len(ARMS)]
    assert len({len(line) for line in lines}) == 1
    assert all(line.endswith(" |") for line in lines)


def test_text_on_the_page_wraps_on_a_phone(page):
    assert re.search(r"^p, dl, ul \{.*overflow-wrap: anywhere", page, re.MULTILINE)


def test_a_terminal_gets_every_arm(folder):
    output = io.StringIO()
    show(experiment_tables(folder), Console(file=output, force_terminal=True, width=150))
    assert all(arm[1] in output.getvalue() for arm in ARMS)


def test_the_answers_name_the_numbers(folder):
    privacy, attack, defense = (answer.text for answer in answers(Experiment.read(folder)))
    assert privacy == (
        "Federated training without noise reached 66.2 %; with a guarantee 64.1 % (-2.1 points; intervals overlap) at "
        "epsilon 7.98 and 61.2 % (-5.0 points) at epsilon 2.93. CKKS reached 66.2 % (+0.0 points; intervals overlap) "
        "and sent 40.7 times the bytes."
    )
    assert attack == (
        "Averaging went from 66.2 % to 20.7 % (-45.5 points) under SignFlip (20 % of the clients) and 65.5 % "
        "(-0.7 points; intervals overlap) under ALIE (20 % of the clients)."
    )
    assert "Against SignFlip, MultiKrum kept most of the robust rules: 63.9 %, 99 % of its own clean score" in defense
    assert "(averaging: 65.5 %, so robustness gained nothing here)" in defense
    assert "Krum 47.1 %; averaging 66.2 %." in defense


def test_no_sentence_without_its_arms(tmp_path):
    folder = make_experiment(tmp_path, arms=(make_arm("plain", 0.6),))
    assert answers(Experiment.read(folder)) == ()
    text = write_report(folder).read_text(encoding="utf-8")
    assert "Attack against defense: left out, no finished arm was attacked." in text
    assert "Privacy against utility: left out, no finished arm without an attack has a privacy guarantee." in text
    assert "What is guaranteed" not in text


def test_figures_are_whole_svg_for_readers_and_listeners(folder):
    figures = all_figures(Experiment.read(folder))
    assert [len(figure.panels) for figure in figures] == [5, 1, 0, 1, 2]
    for panel in (panel for figure in figures for panel in figure.panels):
        root = ElementTree.fromstring(panel.standalone())
        assert root.get("role") == "img" and root.get("aria-label") == panel.label
        assert "<text" in panel.svg and "<style" not in panel.svg and "<image" not in panel.svg
    assert "TrimmedMean, ALIE: 57.1 %" in figures[3].panels[0].label


def test_identifiers_are_unique_on_the_page(page):
    identifiers = re.findall(r'\bid="([^"]+)"', page)
    assert len(identifiers) == len(set(identifiers))
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', page)) <= set(identifiers)


def test_figures_leave_matplotlib_as_it_was(folder):
    import matplotlib

    before = dict(matplotlib.rcParams)
    all_figures(Experiment.read(folder))
    assert dict(matplotlib.rcParams) == before


def test_a_run_evaluated_once_has_no_curve(tmp_path):
    folder = make_experiment(tmp_path, arms=(make_arm("plain", 0.6),))
    rows = folder / "plain" / "seed-0" / "rounds.jsonl"
    rows.write_text(rows.read_text(encoding="utf-8").splitlines()[0] + "\n", encoding="utf-8")
    assert "Utility by round: left out, no federated arm was evaluated in two rounds or more." in write_report(
        folder
    ).read_text(encoding="utf-8")


@pytest.mark.parametrize("wanted", [[5.0, 5.0, 5.0], [0.0, 100.0, 50.0], [99.0, 98.0, 1.0], [3.0]])
def test_labels_do_not_overlap(wanted):
    sizes = [10.0 + 4 * index for index in range(len(wanted))]
    centres = spread_apart(wanted, sizes, 0, 100)
    boxes = sorted((centre - size / 2, centre + size / 2) for centre, size in zip(centres, sizes, strict=True))
    assert boxes[0][0] >= -1e-9 and boxes[-1][1] <= 100 + 1e-9
    assert all(upper[0] >= lower[1] - 1e-9 for lower, upper in pairwise(boxes))
    assert np.array_equal(np.argsort(centres, kind="stable"), np.argsort(wanted, kind="stable"))


def test_the_page_needs_nothing_from_elsewhere(page):
    assert not re.search(r"<(script|link|img|iframe|object|embed|image|base)\b", page)
    assert not re.search(r"""(src|srcset|action|poster)\s*=|@import|url\(\s*['"]?(?!#)|href="(?!#)""", page)
    assert "http" not in page


def test_the_page_says_how_it_was_run(page):
    expected = (
        "python -m experiments.tradeoff --out runs/tradeoff",
        "2025-03-01 12:00 UTC",
        "2c938f780e82",
        "torch 2.13.0",
        "Threads a process",
        "One seed: no spread known",
        "mean and deviation of the honest updates",
        "ALIE is built to hurt robust rules",
        "PoissonSampled(0.1, Gaussian(1.1)) x 20",
        "excludes tuning",
    )
    for text in expected:
        assert text in page


def test_the_page_is_escaped(tmp_path):
    nasty = '<script>alert("x")</script> & $x_1^2$ \u6570\u636e </title> id="y" [bold]'
    arms = (
        ("plain", nasty, nasty, "Mean", None, None, "Plaintext", 0.6),
        ("bad", nasty, nasty, "Mean", "SignFlip", 3.0, "Plaintext", 0.3),
        ("good", nasty, nasty, "Release", None, 3.0, "Plaintext", 0.5),
    )
    folder = make_experiment(tmp_path, arms=arms, question=nasty)
    page = write_report(folder).read_text(encoding="utf-8")
    assert "<script" not in page and page.count("</title>") == page.count("<title>")
    assert "&lt;script&gt;" in page
    for svg in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL):
        ElementTree.fromstring(svg)
    output = io.StringIO()
    show(experiment_tables(folder), Console(file=output, force_terminal=True, width=300))
    assert "[bold]" in output.getvalue()


def test_the_same_folder_gives_the_same_bytes(folder, page):
    assert write_report(folder).read_bytes() == page.encode()


def test_the_page_marks_what_is_private(folder, page):
    assert "accuracy&nbsp;†" in page  # nothing is known about the fields: all are private
    marked = write_report(folder, lambda name: "private" if name == "seed" else "public").read_text(encoding="utf-8")
    assert "accuracy&nbsp;†" not in marked
    assert re.search(r"<strong>Private:</strong>\s*<code>seed</code>\.", marked)
    write_report(folder)


def test_a_folder_that_is_no_experiment(tmp_path):
    with pytest.raises(InvalidArgument, match=r"is not an experiment: it holds no experiment\.json"):
        write_report(tmp_path)
    (tmp_path / "experiment.json").write_text('{"name": "x"}', encoding="utf-8")
    with pytest.raises(BrokenCheckpoint, match="'arms'"):
        experiment_tables(tmp_path)


@pytest.mark.parametrize("name", ["", "..", "a/b", ".hidden"])
def test_an_arm_is_named_like_a_folder(name):
    with pytest.raises(InvalidArgument, match="plain folder name"):
        IndexedArm(name, "title")


def test_the_index_survives_the_round_trip(folder):
    index = ExperimentIndex.read(folder)
    assert index.arms[3] == IndexedArm("dp3", "Client DP, epsilon 3", "Privacy")
    assert index.run_path(Path("there"), "dp3", 2) == Path("there/dp3/seed-2")


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (bytes_text(None), "-"), (bytes_text(0), "0 B"), (bytes_text(999), "999 B"), (bytes_text(78_896), "78.9 kB"),
        (bytes_text(999_900), "1000 kB"), (bytes_text(3_212_000), "3.21 MB"), (bytes_text(5e12), "5000 GB"),
        (seconds_text(1.25), "1.2 s"), (seconds_text(119), "119 s"), (seconds_text(150), "2.5 min"),
        (seconds_text(9000), "2.5 h"), (small_number(1e-4), "1e-4"), (small_number(2.5e-7), "2.5e-7"),
        (small_number(2.934), "2.93"), (small_number(0), "0"), (utility_text(0.6625, "share"), "66.2 %"),
        (utility_text(31.23, "perplexity"), "31.2 perplexity"), (difference_text(-0.0004, "share"), "+0.0"),
        (difference_text(0.0123, "share"), "+1.2"),
    ],
)  # fmt: skip
def test_numbers_as_text(written, expected):
    assert written == expected


ROBUST_ARMS = (
    make_arm("plain", 0.66),
    make_arm("mean-flip", 0.21, attack="SignFlip"),
    make_arm("mean-alie", 0.64, attack="ALIE"),
    make_arm("trimmed", 0.63, rule="TrimmedMean"),
    make_arm("trimmed-flip", 0.59, rule="TrimmedMean", attack="SignFlip"),
    make_arm("trimmed-alie", 0.57, rule="TrimmedMean", attack="ALIE"),
    make_arm("krum", 0.47, rule="Krum"),
    make_arm("krum-flip", 0.45, rule="Krum", attack="SignFlip"),
)
DIAGNOSTICS = {
    "krum-flip": {
        "detection_true_positive_rate": 1.0,
        "detection_false_positive_rate": 0.9,
        "empirical_kappa_largest": 3.5,
    },
    "mean-flip": {
        "attack_success": 0.75,
        "attack_success_n": 100,
        "attack_success_without_trigger": 0.02,
        "empirical_kappa_largest": 40.0,
    },
}


@pytest.fixture
def robust(tmp_path):
    folder = make_experiment(tmp_path, arms=ROBUST_ARMS)
    for name, change in DIAGNOSTICS.items():
        path = folder / name / "seed-0" / "summary.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    return folder


def test_the_worst_case_of_each_rule_by_hand(robust):
    table = experiment_tables(robust)[1]
    assert table.title == "Worst case of each rule"
    assert [row.cells for row in table.rows] == [
        ("TrimmedMean", "57.0 %", "ALIE", "63.0 %", "58.0 %", "-", "-", "-"),
        ("Krum", "45.0 %", "SignFlip (1 of 2 attacks run)", "47.0 %", "45.0 %", "100 %", "90 %", "3.5"),
        ("Mean", "21.0 %", "SignFlip", "66.0 %", "42.5 %", "-", "-", "40"),
    ]


def test_a_run_without_a_finite_utility_is_the_worst_case(robust):
    path = robust / "trimmed-flip" / "seed-0" / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"utility": None}))
    row = next(row for row in experiment_tables(robust)[1].rows if row.cells[0] == "TrimmedMean")
    assert row.cells[1:3] == ("not finite", "SignFlip")
    assert row.cells[4] == "not finite"


def test_a_backdoor_is_reported_with_its_interval(robust):
    table = experiment_tables(robust)[2]
    low, high = wilson(0.75, 100)
    interval = f"{100 * low:.1f} to {100 * high:.1f}"
    assert [row.cells for row in table.rows] == [("mean-flip", "75.0 %", interval, "2.0 %", "100", "21.0 %")]


def test_the_same_rule_under_two_settings_keeps_two_rows(robust):
    for name in ("trimmed-alie",):
        for file in ("summary.json", "config.json"):
            path = robust / name / "seed-0" / file
            path.write_text(path.read_text().replace("TrimmedMean(f=30)", "TrimmedMean(f=10)"))
    names = [row.cells[0] for row in experiment_tables(robust)[1].rows]
    assert {"TrimmedMean(f=30)", "TrimmedMean(f=10)"} < set(names)


def test_the_heat_map_ends_with_the_worst_case_and_the_page_has_the_tables(robust):
    figure = next(figure for figure in all_figures(Experiment.read(robust)) if figure.name == "attacks")
    assert "TrimmedMean, worst case: 57.0 %" in figure.panels[0].svg
    page = write_report(robust).read_text(encoding="utf-8")
    assert '<h2 id="table2">Worst case of each rule</h2>' in page
    assert '<h2 id="table3">Backdoors</h2>' in page


def test_without_attacks_there_is_one_table(tmp_path):
    folder = make_experiment(tmp_path, arms=(make_arm("plain", 0.66),))
    assert [table.title for table in experiment_tables(folder)] == ["All arms"]
