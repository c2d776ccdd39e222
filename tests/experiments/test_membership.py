"""The experiment on membership in its small version, on real runs."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from math import inf
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.membership import (
    CLIENT,
    CONTROL,
    FELLOW,
    POOL,
    RELEASED,
    SERVER,
    SMALL,
    Played,
    Protection,
    Scene,
    Setting,
    blind_of,
    by_fellow,
    by_server,
    federation_of,
    gradients,
    main,
    played,
    said,
    scene_of,
    shadows_of,
)
from privfm.attacks.membership.curves import auc
from privfm.attacks.membership.lira import LiRA
from privfm.attacks.membership.membership_server import STRANGER
from privfm.checks import InvalidArgument
from privfm.contracts.membership import Scored
from privfm.federation.glimpse import glimpse
from privfm.reporting.membership_cases import Case, case_table, judged
from privfm.reporting.membership_page import areas_by_rounds, write_membership

NO_NOISE = Protection(inf)


@pytest.fixture(scope="module")
def scene() -> Scene:
    return scene_of(SMALL, 3)


@pytest.fixture(scope="module")
def run(scene: Scene) -> Played:
    return played(scene, None)


def test_it_runs_and_the_page_begins_with_the_blind_baseline(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(out=tmp_path, fast=True)
    printed = capsys.readouterr().out
    assert printed.startswith("seed 0: ")
    assert "ithout any model" in printed.splitlines()[0]
    page = (tmp_path / "report.html").read_text()
    assert page.index("Is the split fair?") < page.index("Strongest on no protection")
    assert "needs 10,000, has 30" in page and "<svg" in page
    blind, *lines = map(json.loads, (tmp_path / "judgements.jsonl").read_text().splitlines())
    assert blind["adversary"] == "blind"
    assert {line["adversary"] for line in lines} == {RELEASED, SERVER, CLIENT, CONTROL, POOL}
    assert {(line["run"], line["rounds"]) for line in lines} == {
        (name, rounds) for name in ("no protection", "epsilon 8") for rounds in SMALL.seen
    }
    for line in lines:
        assert line["used"]
        judgement = line["judgement"]
        if judgement is None:
            assert line["refused"] == "needs two rounds"
            continue
        area = judgement["auc"]
        assert 0 <= area["low"] <= area["value"] <= area["high"] <= 1
        assert all(rate["tpr"] is None for rate in judgement["rates"])  # far too few for these rates
    with (tmp_path / "judgements.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(lines)
    assert rows[0]["split_fair"] == str(blind["fair"])
    # Whoever trains so few sentences so long without noise is found; nobody is by drawing memberships anew.
    found = {
        (line["run"], line["adversary"], line["attack"]): line["judgement"] for line in lines if line["rounds"] == 2
    }
    assert found["no protection", RELEASED, "LiRA, online"]["auc"]["low"] > 0.7
    assert found["no protection", SERVER, "cosine"]["auc"]["low"] > 0.7
    control = found["no protection", CONTROL, "LiRA, online; memberships drawn anew"]["auc"]
    assert abs(control["value"] - 0.5) < 3 * 0.075  # deviation of an area of 30 against 30: sqrt(61 / 12 / 900)


def test_members_and_strangers_are_dealt_by_one_shuffle(scene: Scene) -> None:
    members = scene.members
    assert members.sum() == (~members).sum() == SMALL.candidates // 2
    assert {int((scene.owners == client).sum()) for client in range(SMALL.clients)} == {10}
    labels = scene.bench.everything.labels[scene.candidates]
    inside, outside = (torch.bincount(labels[torch.from_numpy(flags)], minlength=6) for flags in (members, ~members))
    assert int((inside - outside).abs().max()) <= 3  # the same labels in the same shares
    places = [set(part.tolist()) for part in (scene.candidates, scene.population, scene.tested)]
    assert sum(map(len, places)) == len(set.union(*places)) == len(scene.bench.everything)
    other = scene_of(SMALL, 4)
    assert set(other.candidates[torch.from_numpy(other.members)].tolist()) != set(
        scene.candidates[torch.from_numpy(members)].tolist()
    )


def test_an_unfair_split_is_called_so(scene: Scene) -> None:
    labels = scene.bench.everything.labels[scene.candidates].numpy()
    by_label = np.argsort(labels, kind="stable")
    owners = np.full(len(labels), STRANGER)
    owners[by_label[:30]] = 0  # the members are those of the first libraries
    texts = tuple(
        f"{'library' if owner == 0 else 'other'} {text}" for owner, text in zip(owners, scene.texts, strict=True)
    )
    assert not blind_of(replace(scene, owners=owners, texts=texts)).fair


def test_an_update_is_what_the_server_sees_and_a_fellow_does_not_ask_about_its_own(scene: Scene, run: Played) -> None:
    assert run.cosines.shape == run.differences.shape == (2, SMALL.clients, SMALL.candidates)
    assert np.isfinite(run.cosines).all() and abs(run.cosines).max() <= 1
    assert run.models.shape == (2, scene.bench.layout.d)
    logs = said(scene, run.models, np.tile(scene.members, (2, 1))).logs.values
    for case in by_fellow(scene, NO_NOISE, 2, run, logs):
        assert case.scored is not None
        assert case.scored.scores.shape == (SMALL.candidates - 10,)
        assert case.scored.members.sum() == SMALL.candidates // 2 - 10
    whose = next(case for case in by_server(scene, NO_NOISE, 2, run) if case.attack.endswith("whose"))
    assert whose.scored is not None
    assert (whose.scored.members == (scene.owners == np.arange(SMALL.clients)[:, None])).all()
    assert auc(whose.scored) > 0.8  # each example's own client has the largest score


def test_a_fellow_computes_the_others_sum_as_the_server_sees_it(scene: Scene, run: Played) -> None:
    seen = glimpse(federation_of(scene, None))
    assert seen.wire.rows is not None
    others = sum(row for client, row in zip(seen.wire.ids, seen.wire.rows, strict=True) if client != FELLOW)
    known = torch.cat(list(gradients(scene, seen.model)))
    cosines = torch.nn.functional.cosine_similarity(-known, others[None]).numpy()
    assert run.fellow[0] == pytest.approx(cosines, abs=1e-4)
    assert auc(Scored(cosines[scene.owners != FELLOW], scene.members[scene.owners != FELLOW])) > 0.7


def test_shadows_tell_members_of_a_shadow_and_not_memberships_drawn_anew(scene: Scene) -> None:
    shadows = shadows_of(scene, None, 2)
    assert len(shadows.odds) == SMALL.shadows
    assert (shadows.odds.inside.sum(0) == SMALL.shadows // 2).all()
    pooled = LiRA("offline").pooled(shadows.odds)
    assert auc(pooled) > 0.8
    generator = np.random.default_rng(5)
    areas = [auc(Scored(pooled.scores, generator.permuted(pooled.members, axis=1))) for _ in range(20)]
    assert abs(np.mean(areas) - 0.5) < 0.02


def test_noise_hides_members_from_everybody(scene: Scene) -> None:
    plan = Protection(0.5).plan(SMALL)
    assert plan is not None
    assert plan.epsilon(SMALL.seen[-1], examples=[10]) <= 0.5
    hidden = played(scene, plan)
    for case in by_server(scene, Protection(0.5), 2, hidden):
        assert case.scored is not None
        assert case.attack.endswith("whose") or auc(case.scored) < 0.5 + 3 * 0.075


def test_scores_of_several_seeds_are_judged_together_and_an_unfair_split_stands_above_all(tmp_path: Path) -> None:
    truth = np.array([True, False] * 30)
    cases = [Case("run", 1, SERVER, "cosine", ("updates",), Scored(truth + shift, truth)) for shift in (0.0, 0.5)]
    refused = Case("run", 1, SERVER, "other", ("more",), None, "needs more")
    both, none = judged([*cases, refused], np.random.default_rng(0), 100)
    assert both.judgement is not None and none.judgement is None
    assert both.judgement.examples == 120
    assert both.judgement.auc.value == 1.0  # 1 and 1.5 against 0 and 0.5
    table = case_table([both, none], "a table")
    assert table.rows[1].cells[1] == "cannot run" and table.rows[1].cells[-1] == "cannot run: needs more"
    figures = [areas_by_rounds({"run": []})]
    page = write_membership(tmp_path, "?", [], [table], figures, void="every score is void").read_text()
    assert page.index("every score is void") < page.index("a table")
    assert "left out" in page
    with pytest.raises(InvalidArgument, match="name"):
        write_membership(tmp_path, "?", [], [table], figures * 2)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"candidates": 1001}, "candidates"),
        ({"seen": (5, 1)}, "seen"),
        ({"seen": ()}, "seen"),
        ({"shadows": 7}, "shadows"),
        ({"clients": 2}, "clients"),
        ({"look_every": 0}, "look_every"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, object], named: str) -> None:
    with pytest.raises(InvalidArgument, match=named):
        Setting(**options)  # type: ignore[arg-type]


def test_bad_options_are_refused_before_work(tmp_path: Path) -> None:
    for options in ({"epsilons": ()}, {"epsilons": (8.0, 8.0)}, {"epsilons": (-1.0,)}, {"seeds": ()}):
        with pytest.raises(InvalidArgument):
            main(out=tmp_path, **options)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_rounds_that_are_looked_at_hold_those_that_are_attacked() -> None:
    assert Setting(seen=(1, 5, 10), look_every=4).looked == (1, 4, 5, 8, 10)
