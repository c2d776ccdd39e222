"""The experiment on what channels cost, small: rounds are real, projections say so, what is missing says why."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from experiments import aggregation_cost
from experiments.aggregation_cost import (
    MAKERS,
    TITLES,
    Rate,
    Wire,
    distributed,
    gram,
    largest,
    main,
    masks,
    pad,
    plain,
    planned,
    projected,
    updates,
    wire_of,
)
from privfm.checks import InvalidArgument
from privfm.defenses import FixedPoint
from privfm.defenses.channels import BFV, PairwiseMasks
from privfm.defenses.privacy.distributed import WRAP_TARGET, DistributedNoise
from privfm.reporting.aggregation_costs import Cost

PLAYED = ("Plaintext", "PairwiseMasks, drop-outs", "BFV, noise")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cost")
    main(fast=True, channels=PLAYED, out=out)
    return out


@pytest.fixture(scope="module")
def costs(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / "costs.json").read_text())
    return found


def test_every_point_is_there_with_its_estimate(costs: list[dict[str, Any]]) -> None:
    measured = {(cost["channel"], cost["clients"], cost["parameters"]) for cost in costs if cost["kind"] == "measured"}
    assert measured == {(channel, n, d) for channel in PLAYED for n in (5, 8) for d in (300, 1000)}
    assert all(cost["estimate"] > 0 for cost in costs if cost["kind"] == "measured")


def test_seconds_and_bytes_are_those_of_the_stages(costs: list[dict[str, Any]]) -> None:
    for cost in costs:
        if cost["kind"] != "measured":
            continue
        clients = sum(stage["client_seconds"] / max(stage["answered"], 1) for stage in cost["stages"])
        sent = sum(stage["up"] / max(stage["answered"], 1) for stage in cost["stages"])
        assert cost["client_seconds"] == pytest.approx(clients)
        assert cost["server_seconds"] == pytest.approx(sum(stage["server_seconds"] for stage in cost["stages"]))
        assert cost["up"] == pytest.approx(sent)
        assert min(cost["client_seconds"], cost["server_seconds"]) > 0
        assert (cost["key_holder_seconds"] > 0) is cost["channel"].startswith("BFV")


def test_errors_are_small_without_noise_and_the_noise_with_it(costs: list[dict[str, Any]]) -> None:
    for cost in costs:
        if cost["kind"] != "measured":
            continue
        if cost["channel"] == "BFV, noise":
            # The mean square over 1,000 draws is within 20 % but with probability 1e-9.
            if cost["parameters"] == 1000:
                assert cost["deviation"] == pytest.approx(cost["noise"], rel=0.2)
            assert cost["wrap"] < WRAP_TARGET
        else:
            assert cost["largest_error"] < 1e-6
            assert (cost["noise"], cost["wrap"]) == (0, None)


def test_what_is_projected_is_labelled_and_has_no_errors(costs: list[dict[str, Any]], folder: Path) -> None:
    far = {cost["channel"]: cost for cost in costs if cost["kind"] == "projected"}
    assert far.keys() == set(PLAYED)
    for cost in far.values():
        assert cost["clients"] == 100
        assert cost["why"].startswith("client: measured among")
        assert cost["deviation"] is cost["largest_error"] is cost["memory"] is None
    assert "with 24 neighbours each" in far["PairwiseMasks, drop-outs"]["why"]
    assert "PROJECTED, not measured" in (folder / "tables.md").read_text()
    assert "PROJECTED" in (folder / "server.svg").read_text()


def test_tables_and_figures_are_written(costs: list[dict[str, Any]], folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == {
        "costs.json", "costs.csv", "tables.md", "client.svg", "server.svg", "bytes.svg", "error.svg",
    }  # fmt: skip
    with (folder / "costs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["channel"] for row in rows] == [cost["channel"] for cost in costs]
    text = (folder / "tables.md").read_text()
    assert "## Stage by stage: 8 clients, 1,000 parameters" in text
    assert all(stage in text for stage in ("unmask", "decrypt"))


@pytest.mark.parametrize("title", TITLES)
def test_every_channel_plays_its_round(title: str) -> None:
    wire = wire_of(title, 20, 100)
    assert isinstance(wire, Wire)
    cost = aggregation_cost._round(title, wire, 20, 100)
    # BFV's grid: half a step of 2^-16 and some. CKKS without a grid: 1e-4 at most.
    assert (cost.deviation or 0) < 1e-4 or cost.noise
    assert cost.stages[-1]["server_seconds"] > 0
    lost = [stage for stage in cost.stages if stage["answered"] < stage["asked"]]
    alone = [stage for stage in lost if stage["stage"] == "open"]  # one client tells what all of them opened
    assert bool(lost) is (title == "PairwiseMasks, drop-outs" or bool(alone))


def test_masks_are_as_fine_as_sums_allow() -> None:
    for clients in (5, 20, 200):
        codec = masks(clients, 100, 1.0).codec
        assert isinstance(codec, FixedPoint)
        assert clients << codec.bits < 1 << 31 <= clients << (codec.bits + 1)


def test_a_twentieth_is_lost_where_any_are() -> None:
    assert masks(50, 100, 1.0, lost="masked").gone(50) == {"masked": frozenset({0, 1})}
    assert masks(50, 100, 1.0).gone(50) == {}


def test_distributed_noise_fits_both_channels() -> None:
    masked, encrypted = distributed(20, 1000, 0.1), distributed(20, 1000, 0.1, encrypted=True)
    assert isinstance(masked.codec, DistributedNoise) and masked.codec == encrypted.codec
    assert masked.codec.source == "secure"
    assert isinstance(masked.channel, PairwiseMasks) and isinstance(encrypted.channel, BFV)
    assert masked.channel.modulus == masked.codec.modulus
    assert encrypted.channel.largest_coordinate == masked.codec.modulus / 2
    # Shares of deviation z D / sqrt(h) on each of n rows, over n: z D / sqrt(h n) steps, here of 1 / 4096.
    share = masked.codec.share(1000)
    assert masked.noise == pytest.approx(share * 20**0.5 / 20 / 4096)


def test_the_dearest_are_left_out_first_and_say_why() -> None:
    rates = {"Plaintext": Rate(1.0, 0.0), "BFV": Rate(10.0, 0.0)}
    found = planned(rates, (5, 10), (100,), 1.0)
    assert [(point.channel, point.clients, point.estimate, point.kind) for point in found] == [
        ("Plaintext", 5, 5.0, "measured"),
        ("Plaintext", 10, 10.0, "measured"),
        ("BFV", 5, 50.0, "left out"),
        ("BFV", 10, 100.0, "left out"),
    ]
    assert found[-1].why == "estimated 100 s; cheaper rounds filled the 1 minutes"


def test_estimates_follow_neighbours_and_pairs() -> None:
    few, many = masks(5, 100, 1.0), masks(49, 100, 1.0)  # 4 and 48 neighbours
    rate = Rate(client=1.0, number=0.01, other=0.5, other_number=0.001)
    assert rate.estimate(few, 5, 100) == pytest.approx(5 * (1 + 1 + 4 * (0.5 + 0.1)))
    assert rate.estimate(many, 49, 100) == pytest.approx(49 * (2 + 48 * 0.6))
    assert rate.estimate(plain(4, 1, 1.0), 4, 100) == pytest.approx(4 * 2)
    assert rate.estimate(gram(4, 1, 1.0), 4, 100) == pytest.approx(4 * (2 + 4 * 0.6))


def test_a_rate_is_read_from_rounds_that_keep_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def linear(title: str, wire: Wire, clients: int, parameters: int) -> Cost:
        each = 0.1 + 1e-5 * parameters + wire.others(clients) * (0.01 + 1e-6 * parameters)
        return Cost(title, clients, parameters, client_seconds=each, server_seconds=0.0)

    monkeypatch.setattr(aggregation_cost, "played", linear)
    found = aggregation_cost.rate_of("PairwiseMasks", (100, 1000))
    assert [found.client, found.number, found.other, found.other_number] == pytest.approx([0.1, 1e-5, 0.01, 1e-6])
    assert aggregation_cost.rate_of("BFV", (100, 1000)) == Rate(pytest.approx(0.1), pytest.approx(1e-5))


def test_what_cannot_be_projected_says_why() -> None:
    assert projected("CKKSGram", 1000, 10).why == "inner products are as many as pairs of clients"
    assert "everybody is everybody's neighbour" in projected("PairwiseMasks", 40, 10).why
    assert "no more than 0" in projected("RLWEPad", 100_000, 10).why or projected("RLWEPad", 100_000, 10).why
    assert {projected(title, 100_000, 10).kind for title in ("CKKSGram", "RLWEPad", "PairwiseMasks, active")} == {
        "refused"
    }


def linear_round(title: str, wire: Wire, clients: int, parameters: int) -> Cost:
    """Server: 3 s and half a second a client. Key holder: 7 s a million numbers, a hundredth of a second a client."""
    return Cost(
        title,
        clients,
        parameters,
        client_seconds=2.0,
        server_seconds=3.0 + 0.5 * clients,
        key_holder_seconds=7e-6 * parameters + 0.01 * clients,
        up=4.0,
        deviation=1.0,
    )


def test_a_projection_goes_on_along_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aggregation_cost, "played", linear_round)
    public, private = projected("BFV", 1000, 10**6), projected("CKKS, for clients", 800, 10**6)
    assert (public.client_seconds, public.up, public.deviation) == (2.0, 4.0, None)
    assert public.server_seconds == pytest.approx(503.0)
    assert public.key_holder_seconds == pytest.approx(7.25), "one sum of the 25 that played"
    assert private.server_seconds == pytest.approx(403.0)
    assert private.key_holder_seconds == pytest.approx(7 + 8), "and an envelope for each"


def test_the_shorter_of_two_rounds_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = iter([3.0, 1.0, 2.0])

    def disturbed(title: str, wire: Wire, clients: int, parameters: int) -> Cost:
        return Cost(title, clients, parameters, server_seconds=next(lengths))

    monkeypatch.setattr(aggregation_cost, "played", disturbed)
    wire = plain(5, 10, 1.0)
    assert aggregation_cost.shorter("Plaintext", wire, 5, 10).server_seconds == 1.0
    assert next(lengths) == 2.0


def test_neighbours_stay_those_of_the_large_round() -> None:
    far = pad(200, 100, 1.0)
    near = aggregation_cost.with_neighbours(far.channel, far.neighbours or 0)
    assert replace(far, channel=near).neighbours == far.neighbours == masks(200, 100, 1.0).neighbours


def test_rows_have_norm_one_at_most_and_their_largest_coordinate() -> None:
    rows, bound = updates(50)
    assert float(rows.norm(dim=1).max()) <= 1 and float(rows.norm(dim=1).min()) > 0.999
    assert bound == float(rows.abs().max()) == largest(50)


def test_an_unknown_channel_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="channels="):
        main(channels=("Telepathy",), out=tmp_path)
    assert set(MAKERS) == set(TITLES)


def test_short_rows_have_a_bound_of_their_own() -> None:
    """The part of the key holder's work that grows with clients is measured on narrow rows of the same norm."""
    assert projected("CKKS, for clients", 1000, 5000).kind == "projected"
