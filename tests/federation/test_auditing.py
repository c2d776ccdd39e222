"""What an audit says of played runs: sound mechanisms stay unaccused, and each mistake is found by what it shows in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from privfm.attacks.audit import GhostCanaries, holm
from privfm.checks import InvalidArgument
from privfm.contracts import Spans, Transform
from privfm.defenses import DPPlan
from privfm.defenses.channels import CKKS, PairwiseMasks
from privfm.defenses.privacy.clipping import ClientClip, Flat
from privfm.defenses.transforms import FixedPoint
from privfm.engines import Local
from privfm.federation import Arm, FixedSize, problems, rounds, start
from privfm.federation.auditing import AuditedRun, audited
from privfm.federation.canaries import Audit

ROUNDS, M = 20, 1000
FULL = DPPlan(noise_multiplier=4.0, max_grad_norm=0.5, sample_rate=1.0, delta=1e-5, sampling="full")
POISSON = replace(FULL, noise_multiplier=1.0, sampling="poisson", sample_rate=0.1)
WEIGHTED = replace(FULL, weight_cap=24)
MASKS = {"channel": PairwiseMasks(clients=260, corrupt=0.0), "transforms": (FixedPoint(8.0, 20),), "m": 200, "until": 2}


class ForgottenClip(DPPlan):
    """Clients send what they have."""

    def clip(self, layers: Spans, bound: float | None = None) -> Transform | None:
        return ClientClip(Flat(), 1e6, layers)


class WeightsBySize(DPPlan):
    """Clients count by their examples, however many."""

    def weights(self, examples: Sequence[int]) -> Tensor:
        return torch.tensor([n / (self.weight_cap or 1) for n in examples])


def lying(kind: type[DPPlan], plan: DPPlan) -> DPPlan:
    return kind(**{name: getattr(plan, name) for name in plan.__dataclass_fields__})


@pytest.fixture
def play(federation: Any) -> Any:
    """`play(plan, claimed=..., m=..., rounds=...)` plays an audited run and reads its canaries."""

    def run(plan: DPPlan, claimed: DPPlan | None = None, m: int = M, until: int = ROUNDS, **arm: Any) -> AuditedRun:
        audit = Audit(GhostCanaries(m), claimed=claimed)
        made = federation(engine=Local(256), plan=plan, audit=audit, **arm)
        return audited(made, list(rounds(made, until, evaluate_every=until))[-1].state)

    return run


def p_values(found: AuditedRun) -> dict[str, float]:
    return {check.name: check.p_value for check in found.checks}


@pytest.mark.parametrize("plan", [FULL, POISSON], ids=["full", "poisson"])
def test_a_sound_mechanism_is_not_accused(play, plan):
    found = play(plan)
    assert found.alarm == ""
    assert min(check.p_value for check in holm(found.checks)) > 1e-3
    assert 0 <= found.bound.epsilon <= found.claimed == plan.epsilon(ROUNDS)
    assert found.bound.ceiling > found.bound.epsilon
    assert abs(found.estimate.epsilon / found.claimed - 1) < 0.25
    assert found.estimate.low < found.estimate.epsilon < found.estimate.high
    assert found.count == M and 400 < found.included < 600
    assert found.ratio == pytest.approx(found.bound.epsilon / found.claimed)


@pytest.mark.parametrize("plan", [FULL, POISSON], ids=["full", "poisson"])
def test_halved_noise_is_found(play, plan):
    found = play(replace(plan, noise_multiplier=plan.noise_multiplier / 2), claimed=plan)
    assert p_values(found)["noise scale"] < 1e-6
    assert p_values(found)["mean shift"] > 1e-6
    assert "noise scale 0.5" in found.alarm


def test_a_forgotten_clip_is_found(play):
    found = play(lying(ForgottenClip, FULL), **MASKS)
    assert p_values(found)["mean shift"] < 1e-6
    assert p_values(found)["noise scale"] > 1e-6


def test_where_the_server_opens_rows_it_clips_again_and_a_client_s_forgotten_clip_does_no_harm(play):
    found = play(lying(ForgottenClip, FULL), until=4)
    assert found.alarm == ""


def test_weights_by_data_size_are_found(play):
    assert play(WEIGHTED, **MASKS).alarm == ""
    found = play(lying(WeightsBySize, WEIGHTED), **MASKS)
    assert p_values(found)["mean shift"] < 1e-6


def test_a_fixed_cohort_accounted_as_poisson_is_found_and_refused(play):
    fixed = replace(POISSON, sampling="fixed_size")
    found = play(fixed, claimed=POISSON)
    assert p_values(found)["clients: cohort size spread"] < 1e-6
    assert p_values(found)["noise scale"] > 1e-6
    assert play(fixed).alarm == ""
    arm = Arm(cohort=FixedSize(6), plan=POISSON)
    assert any("draws clients by itself" in problem.what for problem in problems(arm, 640, 60))


def test_with_ten_thousand_canaries_halved_noise_exceeds_the_claim(play):
    claimed = FULL.with_epsilon(4, 1)
    sound = play(claimed, m=10_000, until=1)
    assert sound.bound.epsilon <= sound.claimed
    assert sound.bound.epsilon >= 0.5 * sound.claimed
    assert sound.bound.method == "one run, f-DP"
    halved = play(replace(claimed, noise_multiplier=claimed.noise_multiplier / 2), claimed=claimed, m=10_000, until=1)
    assert halved.bound.epsilon > halved.claimed
    assert "epsilon is at least" in halved.alarm


def test_what_was_not_audited_has_nothing_to_say(federation):
    plain = federation(plan=FULL)
    with pytest.raises(InvalidArgument, match="no canaries"):
        audited(plain, start(plain))
    made = federation(plan=FULL, audit=Audit(GhostCanaries(8)))
    with pytest.raises(InvalidArgument, match="no round was played"):
        audited(made, start(made))


def test_skipped_rounds_leave_no_trace_and_spoil_nothing(federation):
    made = federation(plan=FULL, audit=Audit(GhostCanaries(64)), engine=Local(256))
    state = list(rounds(made, 3, evaluate_every=3))[-1].state
    whole = audited(made, state)
    gap = {"released": torch.full((1, 64), torch.nan), "sent": torch.zeros(1, 64, dtype=torch.bool)}
    wider = {name: torch.cat([value, gap.get(name, value[-1:])]) for name, value in state.audit.items()}
    more = audited(made, replace(state, audit=wider, round=4))
    assert more.bound.epsilon == whole.bound.epsilon
    assert more.claimed > whole.claimed  # the round is accounted for all the same
    with pytest.raises(InvalidArgument, match="all rounds were skipped"):
        audited(made, replace(state, audit={**state.audit, "released": torch.full((3, 64), torch.nan)}))


SOUND = {
    "a bound on participations, sampled": (replace(POISSON, sample_rate=0.5, max_participations=2), {"until": 8}),
    "a bound on participations, all": (replace(FULL, max_participations=5), {"until": 12}),
    "turns that do not come out even": (replace(FULL, sampling="cyclic", sample_rate=0.25), {"until": 6}),
    "a coarse codec, opened": (FULL, {"transforms": (FixedPoint(1.0, 4),), "until": 4}),
    "a coarse codec, summed": (FULL, MASKS | {"transforms": (FixedPoint(1.0, 6),)}),
    "a key holder": (
        replace(POISSON, place="key_holder", source="secure", sample_rate=0.5),
        {"channel": CKKS(bound=1.0, clients=400), "m": 64, "until": 2},
    ),
}


@pytest.mark.parametrize("case", SOUND)
def test_sound_mechanisms_of_all_kinds_are_not_accused(play, case):
    plan, more = SOUND[case]
    found = play(plan, **{"m": 400} | more)
    assert found.arrived > 0
    if plan.source == "secure":  # other draws every time: only what never happens is asserted
        assert min(p_values(found).values()) > 1e-7
        return
    assert found.alarm == ""
    low, high = found.estimate.low, found.estimate.high
    assert low - 0.3 * found.claimed < found.claimed < high + 0.3 * found.claimed


def test_clients_that_are_sampled_otherwise_than_canaries_are_found(federation):
    made = federation(engine=Local(256), plan=POISSON, audit=Audit(GhostCanaries(M)))
    state = list(rounds(made, ROUNDS, evaluate_every=ROUNDS))[-1].state
    fixed = {**state.audit, "clients": torch.full((ROUNDS,), 6)}
    assert p_values(audited(made, replace(state, audit=fixed)))["clients: cohort size spread"] < 1e-6
    twice = {**state.audit, "clients": 2 * state.audit["clients"]}
    assert "clients: sampling rate" in audited(made, replace(state, audit=twice)).alarm


def test_what_protects_more_than_claimed_contradicts_nothing(play):
    found = play(replace(FULL, noise_multiplier=2 * FULL.noise_multiplier), claimed=FULL, m=300, until=6)
    assert found.alarm == "" and "noise scale 2" in found.safer
    found = play(
        replace(FULL, max_grad_norm=FULL.max_grad_norm / 2, noise_multiplier=8.0), claimed=FULL, m=300, until=6
    )
    assert found.alarm == "" and found.safer.startswith("mean shift 0.")


def test_where_no_canary_arrives_nothing_was_audited(play):
    found = play(FULL, m=64, until=2, dropout_rate=0.999999)
    assert found.alarm == "no canary reached a release: nothing was audited"
    assert found.arrived == 0 < found.expected
