"""The benchmark of reconstruction prints what it says, and its verdicts follow from its numbers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import reconstruction
from benchmarks.reconstruction import Batch, Outcome, drawn, line, lines_of, outcome
from benchmarks.resnet import ResNet20
from privfm.contracts import Reconstruction

ROOT = Path(__file__).parents[2]
FIELDS = ["benchmark", "case", "peer", "metric", "unit", "ours", "theirs", "ratio", "target", "met"]


@pytest.fixture(scope="module")
def lines():
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.reconstruction", "--quick", "--parts", "encoder", "images"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"},
    )
    assert result.returncode == 0, result.stderr
    return [json.loads(one) for one in result.stdout.splitlines()]


def test_every_line_has_every_field_in_order(lines):
    assert all([name for name in one if name != "reason"] == FIELDS for one in lines)
    assert {one["benchmark"] for one in lines} == {"reconstruction"}


def test_what_is_told_nothing_reads_small_batches_exactly(lines):
    exact = {one["case"]: one["ours"] for one in lines if one["metric"] == "exact sentences"}
    assert exact == {f"MiniLM, full gradient, batch {size}": 1.0 for size in (1, 2)}
    assert all(one["met"] for one in lines if one["target"] is not None)


def test_what_was_not_given_is_named_and_not_left_out(lines):
    missing = [one for one in lines if one["ours"] is None]
    assert {one["case"] for one in missing} == {"MNIST", "ResNet-20"}
    assert all(one["reason"].startswith("give --") for one in missing)


def test_a_missed_target_is_said_to_be_missed():
    assert line("c", "perfect", "exact sentences", ours=0.9, theirs=1.0, target=0.97)["met"] is False
    assert line("c", "one minute", "seconds", ours=61.0, theirs=60.0, target=1.0)["met"] is False
    assert line("c", "one minute", "seconds", ours=30.0, theirs=60.0, target=1.0)["ratio"] == 2.0
    (false,) = [
        one
        for one in lines_of("c", [Outcome(1.0, 2, 2, 3, 1.0, 1.0, 1.0)], 0.99)
        if one["metric"] == "true predictions"
    ]
    assert (false["met"], false["reason"]) == (False, "1 false of 3")


def test_outcomes_count_sentences_and_not_batches():
    batch = Batch([(101, 5, 6, 102), (101, 7, 102)], [0, 1])
    one = outcome(Reconstruction(texts=((101, 5, 6, 102), (101, 9, 102))), batch)
    assert (one.exact, one.right, one.said) == (0.5, 1, 2)
    exact = next(lines_of("c", [one, Outcome(1.0, 6, 6, 6, 1.0, 1.0, 1.0)], None))
    assert exact["ours"] == 7 / 8


def test_batches_follow_from_their_seed():
    pool = [(1, number, 2) for number in range(50)]
    assert drawn(pool, 4, 7) == drawn(pool, 4, 7) != drawn(pool, 4, 8)
    tokens, mask = Batch([(1, 5, 2), (1, 2)], [0, 0]).padded
    assert tokens.tolist() == [[1, 5, 2], [1, 2, 0]]
    assert mask.tolist() == [[1, 1, 1], [1, 1, 0]]


def test_the_network_is_the_published_one():
    model = ResNet20()
    assert sum(parameter.numel() for parameter in model.parameters()) == 269_722
    assert model.eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_published_rows_name_their_model_and_data():
    assert all("published" in peer and "CoLA" in peer for peer in (*reconstruction.PUBLISHED, *reconstruction.DECODERS))
