"""The benchmark of private steps prints what it says, compares equal things, and survives a peer that does not run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from benchmarks import private_step, timing, workload

ROOT = Path(__file__).parents[2]

FIELDS = ["benchmark", "case", "peer", "metric", "unit", "ours", "theirs", "ratio", "target", "met"]
PEERS = {"Opacus hooks", "Opacus ghost", "torch.func"}


@pytest.fixture(scope="module")
def lines():
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.private_step", "--quick", "--turns", "1"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_every_line_has_every_field_in_order(lines):
    assert all([name for name in line if name != "reason"] == FIELDS for line in lines)
    assert {line["benchmark"] for line in lines} == {"private_step"}


def test_every_peer_has_an_overhead_and_a_time_by_both_clocks(lines):
    for clock in ("processor", "wall"):
        overheads = {line["peer"] for line in lines if line["metric"] == f"overhead ({clock})"}
        assert overheads >= PEERS | {"at most 1.15"}
        times = {line["peer"] for line in lines if line["metric"] == f"time ({clock})"}
        assert times == PEERS | {"plain step", "ours, plain"}


def test_targets_count_by_one_clock_and_follow_from_the_numbers(lines):
    judged = {(line["peer"], line["metric"]): line for line in lines if line["target"] is not None}
    assert judged.keys() == {("plain step", "memory"), ("at most 1.15", "overhead (processor)")}
    for line in judged.values():
        if line["ratio"] is not None:  # there is no number of memory outside Linux
            assert line["ratio"] == line["theirs"] / line["ours"]
            assert line["met"] is (line["ratio"] >= line["target"])


def test_clipped_sums_agree(lines):
    compared = {line["peer"]: line["ours"] for line in lines if line["metric"] == "difference"}
    assert compared.keys() == PEERS
    assert all(difference < 1e-6 for difference in compared.values())


def test_the_clipped_sum_is_that_of_one_backward_pass_an_example():
    work = workload.Work(workload.built_model(), workload.equal_clients(1, 3, 8), 3)
    module = work.module()
    values = list(workload.trained(module).values())
    (client,) = work.clients
    total, raw = 0.0, 0.0
    for row in range(3):
        logits = module(input_ids=client.ids[[row]], attention_mask=torch.ones(1, 8, dtype=torch.long)).logits
        loss = cross_entropy(logits, client.labels[[row]])
        gradient = torch.cat([part.flatten() for part in torch.autograd.grad(loss, values)])
        total = total + gradient * min(1.0, 1.0 / float(gradient.norm()))
        raw = raw + gradient
    found = private_step.clipped_sum(private_step.VARIANTS["ours"], work)
    assert torch.allclose(found, total, atol=1e-6)
    assert not torch.allclose(found, raw, atol=1e-3), "nothing was clipped: the comparison says nothing"


def stub(value: float, private: bool = True, error: Exception | None = None) -> private_step.Variant:
    def step() -> None:
        sum(range(1000))
        if error is not None:
            raise error

    return private_step.Variant(lambda work, noise: (step, lambda: torch.full((2,), value)), private)


@pytest.fixture
def work():
    return workload.Work(None, workload.equal_clients(1, 2, 4), 2)


def test_a_peer_that_raises_is_printed_with_its_reason(monkeypatch, work):
    variants = {"ours": stub(0.5), "ours, plain": stub(0, private=False), "plain step": stub(0, private=False)}
    broken = stub(0.5, error=ModuleNotFoundError("No module named 'broken'"))
    monkeypatch.setattr(private_step, "VARIANTS", variants | {"broken": broken})
    found = [line for line in private_step.speed("case", work, 2, 1.1) if line["peer"] == "broken"]
    assert len(found) == 4
    for line in found:
        assert line["theirs"] is line["ratio"] is line["met"] is None
        assert line["reason"] == "ModuleNotFoundError: No module named 'broken'"
    monkeypatch.setitem(variants, "ours", broken)
    monkeypatch.setattr(private_step, "VARIANTS", variants)
    with pytest.raises(ModuleNotFoundError):
        list(private_step.speed("case", work, 2, 1.1))


def test_unequal_sums_are_not_timed(monkeypatch, work):
    variants = {"ours": stub(0.5), "other": stub(0.50001), "plain step": stub(0, private=False)}
    monkeypatch.setattr(private_step, "VARIANTS", variants)
    with pytest.raises(RuntimeError, match="ours and other differ by"):
        list(private_step.speed("case", work, 1, 1.1))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is measured on Linux")
def test_growth_is_what_making_and_calling_needed():
    command = (
        "import torch\nfrom benchmarks.timing import growth\n"
        "def broken():\n    raise RuntimeError('out of memory')\n"
        "print(growth(lambda: lambda: torch.ones(20_000_000)), growth(broken))"
    )
    result = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True, check=True)
    number, _, rest = result.stdout.partition(",")
    assert 75e6 < int(number.removeprefix("(")) < 120e6
    assert rest.strip() == "'') (None, 'RuntimeError: out of memory')"


def test_paired_ratios_are_turn_by_turn():
    a = [timing.Spent(2.0, 1.0), timing.Spent(30.0, 1.0), timing.Spent(4.0, 1.0)]
    b = [timing.Spent(1.0, 1.0), timing.Spent(10.0, 1.0), timing.Spent(2.0, 1.0)]
    assert timing.paired(a, b, "processor") == 2.0  # ratios 2, 3, 2; of the medians it would be 4 / 2
    assert timing.paired(a, [], "processor") is None
    assert timing.seconds(a, "processor") == 4.0
