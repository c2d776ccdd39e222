"""The benchmark of shadow adapters prints what it says, and compares adapters that are equal."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import shadow

FIELDS = ["benchmark", "case", "peer", "metric", "unit", "ours", "theirs", "ratio", "target", "met"]


@pytest.fixture(scope="module")
def lines():
    found = [line for part in shadow.PARTS.values() for line in part(True, 1)]
    return [json.loads(json.dumps(line)) for line in found]


def test_every_line_has_every_field_in_order(lines):
    assert all([name for name in line if name != "reason"] == FIELDS for line in lines)
    assert {line["benchmark"] for line in lines} == {"shadow"}


def test_both_loops_stand_beside_ours_by_both_clocks(lines):
    timed = {(line["case"].partition(":")[0], line["peer"], line["metric"]) for line in lines}
    for clock in ("processor", "wall"):
        assert timed >= {("last two layers", peer, f"time ({clock})") for peer in (shadow.PLAIN, shadow.KNOWN)}
        assert ("all six layers", shadow.PLAIN, f"an adapter ({clock})") in timed
    assert ("all six layers", shadow.KNOWN, "an adapter (wall)") not in timed, "nothing can be known there"


def test_the_quick_form_has_no_targets(lines):
    assert all(line["target"] is None and line["met"] is None for line in lines)
    assert not any(line["case"].startswith("whole") for line in lines)


def test_adapters_agree(lines):
    differences = [line["ours"] for line in lines if line["metric"] == "difference"]
    assert len(differences) == 5
    assert max(differences) < shadow.AGREEMENT


def test_ratios_are_of_the_numbers_and_an_adapters_share_is_said():
    found = list(shadow.compared("case", same(torch.ones(2, 3)), 0.0, 2, {shadow.PLAIN: 3.0}))
    judged = [line for line in found if line["metric"] == "time (processor)"]
    assert [line["target"] for line in judged] == [3.0]
    assert all(line["ratio"] == line["theirs"] / line["ours"] and line["met"] in {True, False} for line in judged)
    shared = list(shadow.compared("case", same(torch.ones(2, 3)), 0.0, 2, {}, 2))
    assert {line["metric"] for line in shared} == {"difference", "an adapter (processor)", "an adapter (wall)"}


def test_unequal_adapters_are_not_timed():
    with pytest.raises(RuntimeError, match="differ by"):
        list(shadow.compared("case", same(torch.full((2, 3), 1.1)), 0.0, 1, {}))


def same(others: torch.Tensor):
    def work(value: torch.Tensor):
        def call() -> torch.Tensor:
            torch.ones(200, 200) @ torch.ones(200, 200)  # so that no clock reads zero
            return value

        return call

    return {"ours": work(torch.ones(2, 3)), shadow.PLAIN: work(others)}


def test_the_loop_is_never_timed_under_our_name(monkeypatch):
    own = shadow.work(shadow.LAST, 2, 20)
    monkeypatch.setattr("privfm.learning.shadows.prepared", refuse)
    with pytest.raises(RuntimeError, match="sequential: not today"):
        shadow.ours(own)


def refuse(*_):
    from privfm.checks import InvalidArgument

    raise InvalidArgument("not today")
