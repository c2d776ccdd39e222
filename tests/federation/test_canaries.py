"""Canaries in played rounds: they arrive as the mechanism says, the model does not notice ghosts, mistakes show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, final

import pytest
import torch
from torch import Generator

from privfm.attacks import ALIE
from privfm.attacks.audit import GhostCanaries, RandomDirections
from privfm.attacks.reconstruction import AttentionPursuit, CuriousServer
from privfm.checks import InvalidArgument
from privfm.contracts import Canaries, CanaryScene, Examples
from privfm.defenses import DPPlan, TrimmedMean
from privfm.defenses.channels import BFV, CKKS, Grouped, PairwiseMasks
from privfm.defenses.privacy.clipping import PerLayer
from privfm.defenses.privacy.integer_noise import IntegerNoise
from privfm.defenses.transforms import FixedPoint
from privfm.engines import Local
from privfm.federation import Arm, Federation, FixedSize, Population, load, play, problems, rounds, save, start
from privfm.federation.canaries import Audit, Kept, PlantedCanaries
from privfm.randomness import Seeds

CLIENTS, D, C, M = 20, 6, 0.5, 64
PLAN = DPPlan(noise_multiplier=1.0, max_grad_norm=C, sample_rate=1.0, delta=1e-3, sampling="full")

TOYS: dict[str, Any] = {}


@pytest.fixture(autouse=True)
def _toys(toys: Mapping[str, Any]) -> None:
    """The folder's learner of given rows: clients send that of their id, canaries that train that of their label."""
    TOYS.update(toys)


@final
@dataclass(frozen=True)
class Clones(Canaries):
    """Canaries that train on one example, whose label says whose row they send."""

    trained = True
    count: int

    def fitted(self, scene: CanaryScene, generator: Generator) -> Canaries:
        return self

    def examples(self, place: int) -> Examples:
        return Examples({"x": torch.zeros(1, 1)}, torch.tensor([CLIENTS + place]))


def federation(audit: Audit | None = None, plan: DPPlan | None = PLAN, seed: int = 0, **arm: Any) -> Federation:
    rows = torch.randn(CLIENTS + M, D, generator=Generator().manual_seed(1))
    clients = Population(CLIENTS, lambda client: Examples({"x": torch.zeros(1, 1)}, torch.tensor([client])))
    cohort = None if plan is not None else FixedSize(5)
    learner = TOYS["Told"](rows)
    return Federation(Arm(cohort=cohort, plan=plan, audit=audit, **arm), learner, clients, Seeds(seed), Local(8))


def played(run: Federation, until: int = 3) -> Any:
    return list(rounds(run, until))[-1].state


GHOSTS = Audit(GhostCanaries(M))


def test_ghosts_arrive_as_the_clip_and_nobody_else_is_there():
    silent = replace(PLAN, noise_multiplier=0.0)
    run = federation(GHOSTS, silent)
    kept = Kept.read(played(run).audit)
    included = PlantedCanaries.of(GHOSTS, CLIENTS, run.seeds).included
    assert 16 < int(included.sum()) < 48
    assert kept.sent.equal(included.expand(3, M))
    torch.testing.assert_close(kept.released, C * kept.sent.float(), rtol=1e-4, atol=1e-6)
    assert kept.clients.tolist() == [CLIENTS] * 3
    assert kept.drawn.all()


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_the_model_is_the_same_with_and_without_ghosts(noise):
    plan = replace(PLAN, noise_multiplier=noise)
    torch.testing.assert_close(played(federation(GHOSTS, plan)).model, played(federation(None, plan)).model)


def test_neither_drop_outs_nor_attackers_nor_records_notice_ghosts():
    plan = replace(PLAN, noise_multiplier=0.0)
    changed = {
        "dropped": {
            "dropout_rate": 0.15,
            "channel": PairwiseMasks(clients=128, dropouts=0.4),
            "transforms": (FixedPoint(1.0, 22),),
        },
        "attacked": {"attack": ALIE(statistics="honest"), "malicious": (0, 1, 2, 3)},
    }
    for arm in changed.values():
        with_ghosts, without = federation(GHOSTS, plan, **arm), federation(None, plan, **arm)
        torch.testing.assert_close(played(with_ghosts).model, played(without).model, rtol=1e-3, atol=1e-5)
        _, seen = play(with_ghosts, start(with_ghosts))
        _, plain = play(without, start(without))
        assert (seen.sampled, seen.arrived, seen.kept) == (plain.sampled, plain.arrived, plain.kept)


def test_the_noise_on_ghosts_is_the_plan_s():
    kept = Kept.read(played(federation(Audit(GhostCanaries(1000))), 10).audit)
    silent = kept.released[~kept.sent] / C
    loud = kept.released[kept.sent] / C
    n = len(silent)
    assert abs(float(silent.square().mean()) - 1) < 5 * (2 / n) ** 0.5
    assert abs(float(loud.mean()) - 1) < 5 / len(loud) ** 0.5


def test_poisson_canaries_join_at_the_plan_s_rate_whether_or_not_they_are_in():
    plan = replace(PLAN, sampling="poisson", sample_rate=0.2)
    run = federation(Audit(GhostCanaries(1000)), plan)
    kept = Kept.read(played(run, 10).audit)
    clients, canaries = float(kept.clients.double().mean()), float(kept.drawn.sum(1).double().mean())
    assert abs(clients - 4) < 4 * (20 * 0.16 / 10) ** 0.5
    assert abs(canaries - 200) < 4 * (1000 * 0.16 / 10) ** 0.5
    included = PlantedCanaries.of(run.arm.audit, CLIENTS, run.seeds).included
    assert not kept.sent[:, ~included].any()
    assert abs(float(kept.sent[:, included].double().mean()) - 0.2) < 4 * (0.16 / 5000) ** 0.5
    plain = federation(None, plan)
    for now in range(3):  # the same clients in the same rounds
        state = replace(start(run), round=now)
        assert play(run, state)[0].audit["clients"][0] == play(plain, replace(start(plain), round=now))[1].sampled


@pytest.mark.parametrize(
    ("channel", "codecs"),
    [
        (CKKS(bound=1.0, clients=128), ()),
        (PairwiseMasks(clients=128), (FixedPoint(1.0, 20),)),
        (BFV(clients=128, bits=20), (FixedPoint(1.0, 12),)),
    ],
    ids=["CKKS", "PairwiseMasks", "BFV"],
)
def test_ghosts_go_through_other_channels(channel, codecs):
    silent = replace(PLAN, noise_multiplier=0.0)
    if isinstance(channel, CKKS):
        silent = replace(silent, place="key_holder", source="secure")
    run = federation(Audit(GhostCanaries(16)), silent, channel=channel, transforms=codecs)
    kept = Kept.read(played(run, 1).audit)
    torch.testing.assert_close(kept.released, C * kept.sent.float(), rtol=0, atol=5e-3)
    assert kept.sent.any()


def test_directions_are_in_the_model_and_are_read_off_it():
    none = Examples({"x": torch.zeros(1, 1)}, torch.zeros(1))
    scene = CanaryScene(D, ("a", "b"), None, none, lambda examples: torch.zeros(len(examples), D))
    audit = Audit(RandomDirections(8)).fitted(scene, Seeds(0))
    silent = replace(PLAN, noise_multiplier=0.0)
    run = federation(audit, silent)
    state = played(run, 1)
    kept = Kept.read(state.audit)
    rows = audit.canaries.rows(range(8), D)
    directions = rows / rows.norm(dim=1, keepdim=True)
    clients = run.learner.rows[:CLIENTS]
    clipped = clients * (C / clients.norm(dim=1, keepdim=True)).clamp(max=1)
    total = clipped.sum(0) + C * (kept.sent[0].float() @ directions)
    torch.testing.assert_close(state.model * CLIENTS, total, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(kept.released[0], directions @ total, rtol=1e-3, atol=1e-4)


def test_canaries_that_train_are_clients_like_others():
    audit = Audit(Clones(M))
    run = federation(audit, None)
    state = played(run, 8)
    included = PlantedCanaries.of(audit, CLIENTS, run.seeds).included
    asked = {client - CLIENTS for client in run.learner.asked if client >= CLIENTS}
    assert asked and asked <= set(included.nonzero()[:, 0].tolist())
    kept = Kept.read(state.audit)
    assert kept.released.shape == (8, 0)
    assert kept.clients.tolist() == [5] * 8
    assert 4 < float(kept.drawn.sum(1).double().mean()) < 32  # each canary joins as often as a client: 16 on average
    assert set(kept.sent.any(0).nonzero()[:, 0].tolist()) == asked


def test_behind_means_of_groups_canaries_count_as_there():
    run = federation(
        Audit(Clones(M)), None, channel=Grouped(PairwiseMasks(clients=128), 2), transforms=(FixedPoint(8.0, 20),)
    )
    kept = Kept.read(played(run, 3).audit)
    included = PlantedCanaries.of(run.arm.audit, CLIENTS, run.seeds).included
    assert kept.sent.any() and kept.sent.equal(kept.drawn & included)


def test_an_interrupted_run_keeps_the_same(tmp_path):
    run = federation(GHOSTS)
    whole = played(run, 4)
    save(played(run, 2), tmp_path)
    resumed = list(rounds(run, 4, load(tmp_path)))[-1].state
    for name, value in whole.audit.items():
        assert value.equal(resumed.audit[name])


def test_a_round_that_fails_under_a_plan_still_releases_and_nobody_was_in_it():
    run = federation(Audit(GhostCanaries(8)), dropout_rate=0.999999)
    kept = Kept.read(played(run, 6).audit)
    assert kept.released.isfinite().all() and kept.released.shape == (6, 8)
    assert kept.drawn.all() and not kept.sent.any()


def test_bounds_on_participation_hold_for_canaries_too():
    plan = replace(PLAN, sampling="poisson", sample_rate=0.5, max_participations=2)
    kept = Kept.read(played(federation(Audit(GhostCanaries(100)), plan), 12).audit)
    assert int(kept.sent.sum(0).max()) == 2
    assert 4 < float(kept.drawn.sum(0).double().mean()) < 8  # drawn as if there were no bound


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"plan": None}, "no plan"),
        ({"plan": replace(PLAN, place="local")}, "place='local'"),
        (
            {"plan": replace(PLAN, place="distributed", integers=IntegerNoise(least_answers=10, clients=CLIENTS))},
            "place='distributed'",
        ),
        ({"plan": replace(PLAN, clipping=PerLayer())}, "one clip of the whole row"),
        ({"plan": replace(PLAN, simulated_population=1000)}, "less noise than its epsilon"),
        (
            {"plan": replace(PLAN, sampling="cyclic", sample_rate=0.25, bands=4, max_participations=2)},
            "correlates their noise",
        ),
        ({"channel": PairwiseMasks(clients=20), "transforms": (FixedPoint(1.0, 20),)}, "head-room for a sum of 20"),
        ({"plan": replace(PLAN, sampling="fixed_size", sample_rate=0.05)}, "64 canaries is no whole number"),
        ({"server_attack": CuriousServer(AttentionPursuit())}, "is scored with the clients there are"),
    ],
    ids=["no plan", "local", "distributed", "per layer", "simulated", "bands", "masks", "fixed", "server attack"],
)
def test_what_ghosts_cannot_audit_is_refused(change, message):
    arm = federation(GHOSTS, **change).arm
    assert any(message in problem.what for problem in problems(arm, D, CLIENTS))


@pytest.mark.parametrize(
    ("claimed", "message"),
    [
        (replace(PLAN, sampling="cyclic", sample_rate=0.25, bands=4, max_participations=2), "correlates their noise"),
        (replace(PLAN, place="local"), "place='local'"),
    ],
    ids=["bands", "local"],
)
def test_what_is_claimed_is_judged_like_what_is_played(claimed, message):
    arm = federation(replace(GHOSTS, claimed=claimed)).arm
    assert any(message in problem.what for problem in problems(arm, D, CLIENTS))


def test_canaries_that_train_go_with_robust_rules():
    arm = federation(Audit(Clones(8)), None, rule=TrimmedMean(f=1)).arm
    assert problems(arm, D, CLIENTS) == []


@pytest.mark.parametrize("wrong", [{"confidence": 1.0}, {"confidence": 0.0}, {"delta": 1.0}])
def test_numbers_out_of_range_are_refused(wrong):
    with pytest.raises(InvalidArgument, match=next(iter(wrong))):
        Audit(GhostCanaries(8), **wrong)
