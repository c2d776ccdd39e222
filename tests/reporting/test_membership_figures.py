"""ROC figures and tables of judgements."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import numpy as np
import pytest

from privfm.attacks.membership.blind import Blind, BlindGuess
from privfm.attacks.membership.curves import Interval, Judgement, Rate, Scored, judge, tpr_at_fpr
from privfm.checks import InvalidArgument
from privfm.reporting.membership_figures import RocLine, judgement_table, membership_roc, percent, roc_line


def scored(shape: tuple[int, ...], gap: float = 1.0, seed: int = 0) -> Scored:
    generator = np.random.default_rng(seed)
    members = generator.random(shape) < 0.5
    return Scored(generator.normal(size=shape) + gap * members, members)


def line(title: str = "LiRA", shape: tuple[int, ...] = (8, 400), gap: float = 1.0) -> RocLine:
    return roc_line(title, scored(shape, gap), np.random.default_rng(1), 100)


def test_a_curve_begins_at_ten_false_accusations_and_says_what_a_table_says() -> None:
    scores = scored((8, 400))
    others = int((~scores.members).sum())
    curve = roc_line("LiRA", scores, np.random.default_rng(1), 100)
    assert curve.fpr[0] == pytest.approx(10 / others) and curve.fpr[-1] < 1 and (np.diff(curve.fpr) > 0).all()
    for level in (0.01, 0.1):
        place = int(np.argmin(abs(curve.fpr - level)))
        assert curve.fpr[place] == pytest.approx(level, rel=1e-12)
        assert curve.tpr[0, place] == tpr_at_fpr(scores, level)
    assert (np.diff(curve.tpr[0]) >= 0).all() and (curve.tpr[1] <= curve.tpr[2]).all()


def test_too_few_others_have_no_curve() -> None:
    few = Scored(np.arange(30.0), np.arange(30) >= 19)
    with pytest.raises(InvalidArgument, match="19 scores of non-members"):
        roc_line("loss", few, np.random.default_rng(0))


def test_the_figure_names_every_curve_in_words_and_is_the_same_again() -> None:
    lines = [line(), line("Loss <calibrated> & co", gap=0.3), line("one model", (500,))]
    block = membership_roc(lines, "roc-a", "8 adapters")
    (panel,) = block.panels
    assert block.missing == "" and "bootstrap over examples" in block.caption
    for curve in lines:
        assert f"{curve.title}: " in panel.label
    level = int(np.argmin(abs(lines[0].fpr - 0.01)))
    assert f"LiRA: {percent(lines[0].tpr[0, level])} at 1 %" in panel.label
    root = ElementTree.fromstring(panel.standalone())
    words = " ".join("".join(element.itertext()) for element in root.iter() if element.tag.endswith("text"))
    assert "LiRA" in words and "<calibrated>" in words and "1 %" in words and "8 adapters" in words
    assert all(name.startswith("roc-a-") for name in re.findall(r'\bid="([^"]+)"', panel.svg))
    assert membership_roc(lines, "roc-a", "8 adapters").panels == (panel,)


def test_rates_of_zero_are_drawn_below_the_axis() -> None:
    """A logarithm of 0 would warn, and a warning is an error."""
    worst = Scored(np.append(np.zeros(60), np.ones(200)), np.arange(260) < 60)
    curve = roc_line("worst", worst, np.random.default_rng(0), 100)
    assert curve.tpr[0].max() == 0.0
    svg = membership_roc([curve, line()]).panels[0].svg
    assert "nan" not in svg and "inf" not in svg.replace("infer", "")
    assert membership_roc([curve]).panels[0].label.startswith("Share of members found")


def test_no_attack_has_no_figure() -> None:
    block = membership_roc([])
    assert block.panels == () and "no attack" in block.missing


def judgement(tpr: Interval | None) -> Judgement:
    rates = (Rate(0.01, Interval(0.0312, 0.02, 0.04), 1000, 9000), Rate(0.001, tpr, 10_000, 9000))
    return Judgement(Interval(0.65, 0.6, 0.7), Interval(0.2, 0.15, 0.25), rates, 9100, 9000, 18, 1005, 1000)


def test_a_table_prints_numbers_or_what_they_need() -> None:
    guess = BlindGuess("words", Interval(0.8, 0.75, 0.85), 0.001, 0.56)
    table = judgement_table(
        {"LiRA": judgement(None), "Loss": judgement(Interval(0.005, 0.0, 0.01))}, Blind((guess,), 1000, False)
    )
    assert [column.title for column in table.columns][:4] == ["Attack", "AUC", "TPR at 1 % FPR", "TPR at 0.1 % FPR"]
    assert table.rows[0].cells == (
        "LiRA", "0.650 [0.600, 0.700]", "3.12 % [2.00, 4.00]", "needs 10,000, has 9,000", "0.200 [0.150, 0.250]",
        "9,100, 9,000", "18, 1,005",
    )  # fmt: skip
    assert table.rows[1].cells[3] == "0.50 % [0.00, 1.00]"
    assert "every attack's score is void" in table.markdown()
    assert "void" not in judgement_table({"LiRA": judgement(None)}).markdown()
    assert judgement_table({}).rows == ()


def test_a_table_has_one_set_of_levels() -> None:
    other = judge(scored((500,)), np.random.default_rng(0), 100, levels=(0.05,))
    with pytest.raises(InvalidArgument, match="levels"):
        judgement_table({"a": judgement(None), "b": other})
