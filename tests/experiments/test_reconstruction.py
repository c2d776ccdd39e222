"""The experiment on reconstruction in its small version, on real rounds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from experiments.reconstruction import (
    ALL,
    Defence,
    attacked,
    bench_of,
    cohort_rows,
    federation_of,
    image_defences,
    image_scene,
    main,
    observed,
    text_defences,
)
from privfm.checks import InvalidArgument
from privfm.learning import WholeModel


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_it_runs_and_shows_the_recovered_beside_the_original(tmp_path: Path) -> None:
    main(out=tmp_path, fast=True)
    cells = json.loads((tmp_path / "cells.json").read_text())
    texts = [cell for cell in cells["cells"] if cell["part"] == "texts" and cell["defence"] == "none"]
    pursuit = [cell for cell in texts if cell["attack"].startswith("attention")]
    assert {cell["batch"] for cell in pursuit} == {1, 2}
    assert all(cell["scores"]["exact"] == 1.0 and cell["scores"]["false"] == 0 for cell in pursuit)
    assert all(cell["used"] == [] for cell in pursuit)
    assert all(cell["chance"]["rouge_1"] < 0.5 for cell in texts)
    assert {cell["part"] for cell in cells["cells"]} == {"texts", "images"}
    assert 0 <= cells["accuracy"]["texts"]["none"] <= 1
    page = (tmp_path / "report.html").read_text()
    assert "<mark>" in page and "data:image/png" in page
    assert "attention-Jacobian pursuit" in (tmp_path / "tables.md").read_text()


def test_an_encrypted_layer_is_not_seen_and_a_sum_is_of_all() -> None:
    scene = image_scene(True, None, 20)
    bench = bench_of(scene, WholeModel(), 0)
    masked = next(one for one in image_defences() if one.masked)
    rows = cohort_rows(scene, masked, 2, 0)
    seen, truth = observed(bench, federation_of(bench, masked, rows, 0), masked)
    assert seen.clients == len(truth) == 4
    hidden = Defence("head", encrypted=("*9*",), transforms=masked.transforms)
    seen, truth = observed(bench, federation_of(bench, hidden, cohort_rows(scene, hidden, 2, 0), 0), hidden)
    assert len(truth) == 1
    assert not any(".9." in name for name in seen.tensors)


def test_defences_have_titles_of_their_own_and_the_noise_is_declared() -> None:
    for defences in (text_defences(), image_defences()):
        titles = [one.title for one in defences]
        assert len(set(titles)) == len(titles)
        assert titles[0] == "none"
    assert ALL > 1000


def test_bad_options_are_refused_before_work(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="rounds"):
        main(out=tmp_path, rounds=-1)
    assert not (tmp_path / "cells.json").exists()


def test_the_attack_runs_on_what_the_first_client_sent() -> None:
    scene = image_scene(True, None, 20)
    bench = bench_of(scene, WholeModel(), 0)
    ((cell, shown),) = attacked(scene, bench, image_defences()[0], 1, seed=0, seconds=20.0)
    assert cell.clients == 1
    assert cell.used == ("examples",) or "examples" in cell.used
    assert shown is not None and len(shown.images) == 1
