"""The benchmark of many clients prints what it says, with or without the others' code, and compares equal things."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import clients, workload
from privfm.learning import OwnTraining

ROOT = Path(__file__).parents[2]

FIELDS = ["benchmark", "case", "peer", "metric", "unit", "ours", "theirs", "ratio", "target", "met"]


@pytest.fixture(scope="module")
def lines():
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.clients", "--quick"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_every_line_has_every_field_in_order(lines):
    assert all([name for name in line if name != "reason"] == FIELDS for line in lines)
    assert {line["benchmark"] for line in lines} == {"clients"}


def test_every_engine_stands_beside_every_whole_round(lines):
    timed = {(line["case"], line["peer"]) for line in lines if line["metric"] == "time (wall)"}
    rounds = {case for case, _ in timed if " steps x " in case and "bf16" not in case}
    assert len(rounds) == 3
    assert timed >= {(case, peer) for case in rounds for peer in ("sequential swap", "pfl", "Flower")}
    assert {peer for case, peer in timed if "ragged" in case} == {"sequential swap", "Opacus hooks"}
    assert {peer for case, peer in timed if "bf16" in case} == {"ours"}


def test_a_peer_that_is_missing_says_why(lines):
    missing = [line for line in lines if line["theirs"] is None]
    assert {line["peer"] for line in missing} >= {"Flower"}, "its job is too long for the quick form"
    assert all(line["reason"] and line["ratio"] is None and line["met"] is None for line in missing)


def test_ratios_and_verdicts_follow_from_the_numbers(lines):
    judged = [line for line in lines if line["target"] is not None and line["ratio"] is not None]
    assert {line["metric"] for line in judged} == {"time (processor)"}
    for line in judged:
        assert line["ratio"] == line["theirs"] / line["ours"]
        assert line["met"] is (line["ratio"] >= line["target"])


def test_updates_agree_with_the_loop_of_each_case(lines):
    compared = {(line["case"], line["peer"]): line["ours"] for line in lines if line["metric"] == "difference"}
    assert len(compared) >= 7
    for (_, pair), difference in compared.items():
        assert difference < (0.05 if "bf16" in pair else 1e-4)


def case(**changes) -> clients.Case:
    def variant(value: float):
        return lambda: lambda: torch.full((3, 2), value)

    def broken():
        raise ModuleNotFoundError("No module named 'broken'")

    make = {"ours": variant(1.0), "sequential swap": variant(1.0 + 1e-6), "broken": broken}
    fields = {"name": "case", "make": make, "pairs": (("ours", "sequential swap"), ("ours", "broken"))}
    return clients.Case(**fields | changes)


def test_a_peer_that_raises_does_not_end_the_run():
    found = [line for line in clients.measured(case(), 2, 1) if line["peer"] == "broken"]
    assert [line["metric"] for line in found] == ["time (processor)", "time (wall)"]
    assert {line["reason"] for line in found} == {"ModuleNotFoundError: No module named 'broken'"}


def test_what_raises_of_ours_ends_the_run():
    make = case().make
    with pytest.raises(ModuleNotFoundError):
        list(clients.measured(case(make={**make, "ours": make["broken"]}), 1, 1))


def test_unequal_updates_are_not_timed():
    make = case().make
    apart = {**make, "ours": lambda: lambda: torch.full((3, 2), 1.01)}
    with pytest.raises(RuntimeError, match="ours and sequential swap differ by"):
        list(clients.measured(case(make=apart), 1, 1))
    assert list(clients.measured(case(make=apart, free=("ours",)), 1, 1)), "unless it is meant to differ"


def test_the_loop_is_never_timed_under_our_name():
    work = workload.Work(workload.built_model((5,)), workload.equal_clients(2, 2, 4), 2)
    with pytest.raises(RuntimeError, match="sequential: OwnTraining"):
        workload.our_learner(work, training=OwnTraining(lambda module, examples: module))
    learner = workload.our_learner(work)
    learner._batched = None  # as if it had raised
    generators = [torch.Generator().manual_seed(place) for place in range(2)]
    with pytest.raises(RuntimeError, match="went on with one client after the other"):
        learner.train(learner.initial(), workload._examples(work, learner), generators)


def test_steps_are_padded_to_their_longest_example():
    ids = torch.tensor([[5, 6, 0, 0], [7, 0, 0, 0], [1, 2, 3, 4]])
    client = workload.Client(ids, torch.tensor([2, 1, 4]), torch.tensor([0, 1, 2]))
    (first, one), (second, two) = client.batches(2)
    assert first["input_ids"].tolist() == [[5, 6], [7, 0]]
    assert first["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert second["input_ids"].tolist() == [[1, 2, 3, 4]]
    assert (one.tolist(), two.tolist()) == ([0, 1], [2])


def test_ragged_clients_are_ragged_within_their_bounds():
    cohort = workload.ragged_clients(32, 40, (8, 64))
    sizes = [len(client.ids) for client in cohort]
    lengths = torch.cat([client.lengths for client in cohort])
    assert min(sizes) >= 1
    assert 20 < max(sizes) <= 40
    assert int(lengths.min()) >= 8
    assert 48 < int(lengths.max()) <= 64
    assert all(((client.ids > 0).sum(1) == client.lengths).all() for client in cohort)
