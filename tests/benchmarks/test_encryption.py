"""The benchmark of encrypted sums prints what it says, counts what it says, and everybody gives the same mean."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import encrypted_distances, encryption, encryption_peers
from benchmarks.encryption_peers import Measured

ROOT = Path(__file__).parents[2]

FIELDS = ["benchmark", "case", "peer", "metric", "unit", "ours", "theirs", "ratio", "target", "met"]


@pytest.fixture(scope="module")
def lines():
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.encryption", "--quick"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]  # and no warning of SEAL's among them


def test_every_line_has_every_field_in_order(lines):
    assert all([name for name in line if name != "reason"] == FIELDS for line in lines)
    assert {line["benchmark"] for line in lines} == {"encryption"}


def test_every_channel_stands_beside_every_peer_in_every_metric(lines):
    metrics = {*encryption.UNITS, "memory"}
    for name, row in encryption.ROWS.items():
        case = encryption.case_name(name, encryption.small(row).clients, encryption.QUICK_WIDTH)
        for peer in ("NVFlare", "TenSEAL tutorial"):
            found = {line["metric"] for line in lines if (line["case"], line["peer"]) == (case, peer)}
            assert found == metrics


def test_ratios_and_verdicts_follow_from_the_numbers(lines):
    judged = [line for line in lines if line["target"] is not None and line["ratio"] is not None]
    assert judged
    for line in lines:
        if line["ratio"] is not None:
            assert line["ratio"] == line["theirs"] / line["ours"]
        if line["target"] is not None and line["ratio"] is not None:
            assert line["met"] is (line["ratio"] >= line["target"])


def test_errors_of_sums_keep_to_what_is_aimed_for(lines):
    kept = {line["metric"]: line["met"] for line in lines if "error" in line["metric"] and line["target"] is not None}
    assert kept == {"largest error": True, "error deviation": True}


def test_speed_and_bytes_are_judged_at_the_full_width_only(lines):
    assert not [line for line in lines if line["metric"] in {"time", "bytes"} and line["target"] is not None]
    targets = {name: (row.faster, row.limits.get("bytes")) for name, row in encryption.ROWS.items() if row.faster}
    assert targets == {
        "CKKS, sum for clients": (pytest.approx(1 / 0.7), 17.0),
        "PairwiseMasks": (10.0, 4.1),
        "PairwiseMasks, 10 neighbours": (10.0, 4.1),
        "RLWEPad": (pytest.approx(1 / 0.3), 4.1),
    }


def test_the_cost_row_has_ten_neighbours():
    row = encryption.ROWS["PairwiseMasks, 10 neighbours"]
    assert row.channel(row.clients).graph(row.clients).neighbours == 10


def test_every_channel_and_peer_gives_the_mean():
    rows = encryption.made_rows(encryption.CLIENTS, 300)
    played = {name: encryption.small(row).play(rows) for name, row in encryption.ROWS.items()}
    played |= {name: peer.play(rows) for name, peer in encryption_peers.PEERS.items()}
    for name, found in played.items():
        exact = encryption.exact_mean(rows, found.clients)
        # BFV's step is 2^-16; its mean over ten is rounded by less than one.
        assert (found.mean - exact).abs().max() < 2.0**-16, name
        assert min(found.client, found.server, found.up) > 0
        assert (found.key_holder > 0) is name.startswith(("CKKS", "BFV"))


def test_the_path_shares_what_is_done_once():
    one = Measured(client=1.0, server=4.0, key_holder=2.0, up=8.0, mean=torch.zeros(1), clients=3)
    assert one.path == 3.0


def test_figures_are_medians_over_rounds():
    def measured(mean: list[float], client: float) -> Measured:
        return Measured(client, 10.0, 0.0, 8.0, torch.tensor(mean, dtype=torch.float64), 2)

    truth = torch.tensor([1.0, 0.0], dtype=torch.float64)
    found = encryption.figures(
        [measured([1.5, 0.0], 1.0), measured([1.0, 0.25], 3.0), measured([1.0, 0.0], 2.0)], truth
    )
    assert (
        found["client time"] == 2.0 and found["server time"] == 5.0 and found["time"] == 7.0 and found["bytes"] == 4.0
    )
    assert found["largest error"] == 0.25
    assert found["error deviation"] == pytest.approx(0.25 / 2**0.5)
    assert found["relative error"] == 0.25


def test_mask_resolution_leaves_room_for_the_sum_and_no_more():
    for n in (1, 2, 10, 11, 100, 1000):
        bits = encryption.mask_bits(n)
        assert n << bits < 1 << 31 <= n << (bits + 1)


def test_a_peer_that_raises_is_printed_with_its_reason():
    def broken() -> Measured:
        raise ModuleNotFoundError("No module named 'tenseal'")

    def works() -> Measured:
        return Measured(1.0, 1.0, 0.0, 1.0, torch.ones(1, dtype=torch.float64), 1)

    failures: dict[str, str] = {}
    found = encryption.interleaved({"ours, x": works, "NVFlare": broken}, 2, failures)
    assert len(found["ours, x"]) == 2
    figures = encryption.figures(found["ours, x"], torch.ones(1, dtype=torch.float64))
    row = encryption.ROWS["Plaintext"]
    (line, *_) = [
        line
        for line in encryption.beside("case", row, figures, {"NVFlare": (None, failures["NVFlare"])})
        if line["peer"] == "NVFlare"
    ]
    assert line["theirs"] is line["ratio"] is line["met"] is None
    assert line["reason"] == "ModuleNotFoundError: No module named 'tenseal'"
    with pytest.raises(ModuleNotFoundError):
        encryption.interleaved({"ours, x": broken}, 1, {})


def test_few_distances_are_measured_in_the_quick_form_and_their_lines_say_so(lines):
    found = {line["peer"]: line for line in lines if line["metric"] == "geometry time"}
    assert found["TenSEAL, all pairs"]["case"] == "CKKSGram n=7 d=8192, 2 of 21 measured, times the rest"
    assert found["no sketch"]["case"] == "CKKSGram n=7 d=8192, 2 of 28 measured, times the rest"
    assert all(line["target"] is None for line in found.values()), "what was not measured is not judged"
    errors = {line["peer"]: line["theirs"] for line in lines if line["metric"] == "distance error"}
    assert 0 < errors["TenSEAL, all pairs"] < 1e-4 and errors["no sketch"] < 1e-9


def test_clear_choices_are_equal(lines):
    (line,) = [line for line in lines if line["metric"] == "equal choice"]
    assert (line["ours"], line["ratio"], line["met"]) == (1.0, 1.0, True)


def test_cohorts_with_a_clear_best_row_have_one():
    cohorts = encrypted_distances.clear_cohorts(7, 100)
    for rows in (next(cohorts), next(cohorts)):
        best, second = sorted(slow_krum(rows))[:2]
        assert 1.1 < second / best < 1.3
        assert float(rows.abs().max()) <= 1


def slow_krum(rows: torch.Tensor) -> list[float]:
    """Scores of Krum with f = 2, term by term."""
    found = []
    for one in rows:
        away = sorted(float((one - other).double().square().sum()) for other in rows)
        found.append(sum(away[1 : len(rows) - 2 - 1]))  # the first is its own
    return found


def test_scores_are_krums():
    rows = torch.randn(8, 40, generator=torch.Generator().manual_seed(2))
    found = encrypted_distances.scores(rows.double() @ rows.double().T)
    assert found.tolist() == pytest.approx(slow_krum(rows), rel=1e-5)


def test_the_largest_error_of_a_distance_is_relative():
    rows = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 1.0]])
    gram = rows.double() @ rows.double().T
    assert encrypted_distances.largest_error(rows, gram) == pytest.approx(0, abs=1e-12)
    gram[0, 1] = gram[1, 0] = 1.25  # 25 becomes 22.5
    assert encrypted_distances.largest_error(rows, gram) == pytest.approx(0.1)


def test_an_encrypted_distance_is_the_distance():
    first, second = torch.linspace(-1, 1, 9000), torch.linspace(0.5, 0.4, 9000)
    peer = encryption_peers.TUTORIAL
    context = peer.context()
    context.generate_galois_keys()
    vectors = [peer.encrypted(context, row, whole=True) for row in (first, second)]
    assert [len(vector) for vector in vectors] == [3, 3]
    found = encryption_peers.squared_distance(*vectors).decrypt()[0]
    assert found == pytest.approx(float((first - second).double().square().sum()), rel=1e-4)
