"""The benchmark prints what it says, with or without the others' code."""

import gc
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import aggregation, peers

ROOT = Path(__file__).parents[2]

FIELDS = ["benchmark", "case", "peer", "metric", "unit", "ours", "theirs", "ratio", "target", "met"]


@pytest.fixture(scope="module")
def lines():
    command = [sys.executable, "-m", "benchmarks.aggregation", "--quick", "--threads", "1"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_every_line_has_every_field_in_order(lines):
    assert all([name for name in line if name != "reason"] == FIELDS for line in lines)
    assert {line["benchmark"] for line in lines} == {"aggregation"}


def test_every_rule_stands_beside_every_peer(lines):
    names = {peer.name for peer in peers.found()}
    assert names == {"ByzFL", "ByzPy", "Flower", "NumPy loop"}
    for case in {line["case"] for line in lines}:
        assert {line["peer"] for line in lines if line["case"] == case} >= names | {"one read"}


def test_a_peer_that_is_missing_says_why(lines):
    missing = [line for line in lines if line["theirs"] is None]
    assert missing, "NumPy has no CenteredClipping at least"
    assert all(line["reason"] and line["ratio"] is None and line["met"] is None for line in missing)


def test_ratios_and_verdicts_follow_from_the_numbers(lines):
    judged = [line for line in lines if line["target"] is not None and line["ratio"] is not None]
    assert judged
    for line in judged:
        assert line["ratio"] == line["theirs"] / line["ours"]
        assert line["met"] is (line["ratio"] >= line["target"])


def test_the_results_agree_with_a_loop_in_numpy(lines):
    compared = [line for line in lines if line["metric"] == "difference" and line["peer"] == "NumPy loop"]
    assert len(compared) == 8
    assert all(line["ours"] < 1e-5 for line in compared)


def test_a_peer_that_raises_does_not_end_the_run():
    def broken(*_: object) -> torch.Tensor:
        raise RuntimeError("out of memory\nin many words")

    failures: dict[str, str] = {}
    seconds, _ = aggregation.interleaved({"ours": lambda: torch.zeros(1), "theirs": broken}, 2, failures)
    assert failures == {"theirs": "RuntimeError: out of memory"}
    assert len(seconds["ours"]) == 2
    assert aggregation.extra_bytes(aggregation.Case(3, 1, 10, "gaussian"), broken) == (
        None,
        "RuntimeError: out of memory",
    )


def test_extra_memory_is_what_a_call_needed():
    case = aggregation.Case(3, 1, 10, "gaussian")
    found, why = aggregation.extra_bytes(case, lambda rows, f: torch.ones(20_000_000))
    assert found is not None, why
    assert 75e6 < found < 120e6


def test_what_the_parent_once_needed_hides_nothing():
    torch.ones(100_000_000)  # given back at once, but the highest memory of this process stays where it was
    left = [torch.ones(30_000_000)]
    left.append(left)  # a cycle: collected some time, and then not in the child's favour
    del left
    blocks = [bytearray(50_000) for _ in range(4_000)]  # too small to be mapped one by one: 200 MB of heap
    last = blocks[-1]  # holds the heap's end, so that what was given back stays resident, ready for the next who asks
    del blocks
    case = aggregation.Case(3, 1, 10, "gaussian")
    found, why = aggregation.extra_bytes(case, lambda rows, f: (gc.collect(), torch.ones(20_000_000)))
    assert found is not None, why
    assert 75e6 < found < 120e6
    assert len(last) == 50_000
