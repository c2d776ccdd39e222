"""Everything the contracts must carry, thrown at one unchanged round."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, final

import pytest
import torch
from torch import Generator, Tensor

from privfm.attacks import ALIE, SignFlip
from privfm.checks import ClientFailed, InvalidArgument
from privfm.contracts import (
    KEY_HOLDER,
    SERVER,
    Cast,
    Channel,
    Encoded,
    Engine,
    Exchange,
    Outcome,
    Reveals,
    Rule,
    Sealer,
    ServerAttack,
    State,
    View,
    WireView,
)
from privfm.defenses import CenteredClipping, Clip, DPPlan, Krum, Mean, MultiKrum, PreAggregation, TrimmedMean
from privfm.engines import Local
from privfm.federation import Federation, FixedSize, Momentum, Poisson, Record, RunState, rounds
from privfm.federation.round import play

Make = Callable[..., Federation]
Toys = Mapping[str, Any]
BAD = tuple(range(6))
PLAN = DPPlan(noise_multiplier=1.0, max_grad_norm=1.0, sample_rate=0.5, delta=1e-3)


@final
@dataclass(frozen=True)
class NearestNeighborMixing(PreAggregation):
    f: int
    rule: Rule

    @property
    def inner(self) -> Rule:
        return self.rule

    def mix(self, gram: Tensor, generator: Generator) -> Tensor:
        squares = gram.diagonal()
        near = (squares[:, None] + squares - 2 * gram).fill_diagonal_(0).argsort(1)[:, : len(gram) - self.f]
        return torch.zeros_like(gram).scatter_(1, near, 1 / near.shape[1])


@final
@dataclass(frozen=True)
class History(Rule):
    """Remembers clients by id: each row is weighed by how often its client was seen."""

    keyed = True

    @property
    def needs(self) -> Reveals:
        return Reveals.EACH

    def init(self, d: int) -> State:
        return {"seen": torch.zeros(60)}

    def step(self, state: State, view: View, generator: Generator) -> tuple[State, Outcome]:
        seen = state["seen"].clone()
        seen[list(view.ids)] += 1
        weights = seen[list(view.ids)] / seen[list(view.ids)].sum()
        return {"seen": seen}, Outcome(view.weighted_sum(weights, torch.zeros(0, view.d)), weights)


@final
@dataclass(frozen=True)
class Look(ServerAttack):
    def look(self, wire: WireView, model: Tensor, now: int) -> dict[str, float]:
        rows = 0 if wire.rows is None else len(wire.rows)
        return {"rows": rows, "vectors": len(wire.vectors), "grams": len(wire.grams)}


@final
@dataclass(frozen=True)
class OneAtATime(Engine):
    """Another engine altogether: every client alone, replies collected before they are given out."""

    def open(self, channel: Channel, sealed: Sealer, cast: Cast) -> Exchange:
        return _OneAtATime(channel, sealed, cast)


class _OneAtATime(Exchange):
    def __init__(self, channel: Channel, sealed: Sealer, cast: Cast) -> None:
        self.channel, self.sealed, self.cast, self.engine = channel, sealed, cast, Local()
        self.server = self.engine.party(SERVER, cast.round)
        self.memories: dict[int, dict[str, bytes]] = {}
        self.together: dict[int, Encoded] = {}

    def row(self, party: int) -> Encoded:
        if party in self.cast.malicious:
            if not self.together:
                self.together.update(self.sealed(list(self.cast.malicious)))
            return self.together[party]
        return self.sealed([party])[party]

    def __call__(self, stage: str, requests: Mapping[int, bytes]) -> Iterator[tuple[int, bytes]]:
        for party in (*self.cast.honest, *self.cast.malicious, KEY_HOLDER):
            if party in requests and party not in self.cast.gone.get(stage, frozenset()):
                self.memories[party], reply = self.channel.answer(
                    self.engine.party(party, self.cast.round),
                    stage,
                    self.memories.get(party, {}),
                    requests[party],
                    lambda party=party: self.row(party),
                )
                yield party, reply


@final
@dataclass(frozen=True)
class Losing(Engine):
    """The local engine, which loses named clients at named stages."""

    lost: tuple[tuple[str, frozenset[int]], ...]

    def open(self, channel: Channel, sealed: Sealer, cast: Cast) -> Exchange:
        return Local().open(channel, sealed, replace(cast, gone=dict(self.lost)))


def run(federation: Federation, until: int = 4) -> tuple[RunState, Record]:
    last = list(rounds(federation, until, evaluate_every=until))[-1]
    return last.state, last.record


def accuracy(federation: Federation, until: int = 8) -> float:
    state, _ = run(federation, until)
    return federation.learner.evaluate(state.model, "test")["accuracy"].value


def test_a_three_stage_channel_gives_the_plain_mean(federation: Make, toys: Toys) -> None:
    codec = (toys["Quantize"](2**-12),)
    plain, _ = run(federation(transforms=codec))
    masked, record = run(federation(transforms=codec, channel=toys["ThreeStages"]()))
    assert torch.equal(plain.model, masked.model)
    assert record.arrived == 30 and record.channel_error_relative_l2 < 1e-6


def test_clients_dropped_between_keys_and_masked_rows_are_recovered(federation: Make, toys: Toys) -> None:
    codec, gone = (toys["Quantize"](2**-12),), frozenset({7, 9, 11, 30, 31})
    lossy = Losing((("masked", gone), ("update", gone), ("unmask", gone)))
    plain, there = run(federation(transforms=codec, engine=lossy))
    masked, here = run(federation(transforms=codec, engine=lossy, channel=toys["ThreeStages"]()))
    assert there.arrived == here.arrived < 30
    assert torch.equal(plain.model, masked.model)


def test_a_survivor_lost_before_unmasking_skips_the_round(federation: Make, toys: Toys) -> None:
    gone = frozenset({7, 9, 11, 30, 31})
    lossy = Losing((("masked", gone), ("unmask", frozenset(range(60)) - {0, 1})))
    setting = federation(transforms=(toys["Quantize"](2**-12),), engine=lossy, channel=toys["ThreeStages"]())
    state, record = run(setting, 2)
    assert "survivor left" in record.skipped
    assert torch.equal(state.model, setting.learner.initial())


@pytest.mark.parametrize("stage", ["masked", "unmask"])
def test_stages_out_of_order_are_refused(stage: str, toys: Toys) -> None:
    with pytest.raises(InvalidArgument, match="out of order"):
        toys["ThreeStages"]().answer(Local().party(3, 0), stage, {}, b"{}", lambda: Encoded(torch.zeros(1, 4), {}))


def test_a_repeated_stage_is_refused(toys: Toys) -> None:
    channel = toys["ThreeStages"]()
    memory, _ = channel.answer(Local().party(3, 0), "keys", {}, b"", lambda: Encoded(torch.zeros(1, 4), {}))
    with pytest.raises(InvalidArgument, match="repeated"):
        channel.answer(Local().party(3, 0), "keys", memory, b"", lambda: Encoded(torch.zeros(1, 4), {}))


@pytest.mark.parametrize("rule", [CenteredClipping(1.0), NearestNeighborMixing(6, CenteredClipping(1.0)), MultiKrum(6)])
def test_a_key_holder_that_answers_once_gives_the_same_as_plaintext(rule: Rule, federation: Make, toys: Toys) -> None:
    codec = (toys["Quantize"](2**-12),)
    plain, _ = run(federation(rule=rule, transforms=codec))
    sealed, record = run(federation(rule=rule, transforms=codec, channel=toys["GramVault"](5.0), server_attack=None))
    assert torch.allclose(plain.model, sealed.model, atol=1e-6)
    assert record.arrived == 30


def test_a_second_gram_request_is_refused(federation: Make, toys: Toys) -> None:
    @final
    @dataclass(frozen=True)
    class Twice(Rule):
        @property
        def needs(self) -> Reveals:
            return Reveals.GRAM

        def step(self, state: State, view: View, generator: Generator) -> tuple[State, Outcome]:
            view.gram(torch.zeros(0, view.d))
            return state, Outcome(view.gram(torch.zeros(0, view.d))[0])

    with pytest.raises(InvalidArgument, match="repeated"):
        run(federation(rule=Twice(), channel=toys["GramVault"](5.0)), 1)


def test_what_a_curious_server_sees_follows_the_channel(federation: Make, toys: Toys) -> None:
    def seen(**arm: Any) -> dict[str, float]:
        return run(federation(server_attack=Look(), **arm), 1)[1].leaked

    codec = (toys["Quantize"](2**-12),)
    assert seen() == {"rows": 30, "vectors": 1, "grams": 0}
    assert seen(rule=CenteredClipping(1.0), channel=toys["GramVault"](5.0)) == {"rows": 0, "vectors": 1, "grams": 1}
    assert seen(channel=toys["ThreeStages"](), transforms=codec) == {"rows": 0, "vectors": 1, "grams": 0}


def test_a_non_additive_codec_works_where_rows_are_opened_only(federation: Make, toys: Toys) -> None:
    assert accuracy(federation(transforms=(toys["TopK"](200),), rule=TrimmedMean(3))) > 0.6
    with pytest.raises(InvalidArgument, match="not the sum of the decodings"):
        run(federation(transforms=(toys["TopK"](64), toys["Quantize"](0.01)), channel=toys["ThreeStages"]()))


def test_an_attack_stands_behind_the_clip_and_before_the_codecs(federation: Make, toys: Toys) -> None:
    six: dict[str, Any] = {"attack": toys["Huge"](1e4), "malicious": BAD}
    free, _ = run(federation(transforms=(Clip(0.1),), **six), 1)
    assert free.model.norm() > 100  # a client step does not bind an attacker
    held, _ = run(federation(plan=PLAN, **six), 1)
    assert held.model.norm() < 10  # the server clips again where it opens rows
    masked, _ = run(
        federation(plan=PLAN, channel=toys["ThreeStages"](), transforms=(toys["Quantize"](0.01),), **six), 1
    )
    assert masked.model.norm() > 100  # nobody can clip what nobody opens


def test_f_nan_rows_do_not_block_krum(federation: Make, toys: Toys) -> None:
    setting = federation(rule=Krum(6), cohort=FixedSize(60), attack=toys["NotANumber"](), malicious=BAD)
    state, record = run(setting, 2)
    assert record.bad == 6 and record.arrived == 54 and not record.skipped
    assert state.model.isfinite().all() and state.model.norm() > 0


def test_more_nan_rows_than_f_skip_the_round(federation: Make, toys: Toys) -> None:
    setting = federation(rule=Krum(5), cohort=FixedSize(60), attack=toys["NotANumber"](), malicious=BAD)
    state, record = run(setting, 1)
    assert "f=5" in record.skipped and record.bad == 6
    assert torch.equal(state.model, setting.learner.initial())


def test_an_empty_poisson_cohort(federation: Make) -> None:
    alone = federation(cohort=Poisson(1e-9))
    _, record = play(alone, RunState(0, alone.learner.initial(), {}, {}, run_states(), {}, {}))
    assert record.sampled == 0 and "n >= 1" in record.skipped
    plan = DPPlan(noise_multiplier=1.0, max_grad_norm=1.0, sample_rate=1e-9, delta=1e-3)
    state, record = run(federation(plan=plan), 1)
    assert record.sampled == 0 and not record.skipped and state.model.norm() > 0  # the noise is there all the same


def run_states() -> Any:
    from privfm.federation.client_states import ClientStates

    return ClientStates({})


def full_settings(toys: Toys) -> list[dict[str, Any]]:
    quantize, momentum = toys["Quantize"](2**-12), toys["ClientMomentum"](0.5)
    return [
        {
            "rule": NearestNeighborMixing(6, CenteredClipping(1.0)),
            "optimizer": Momentum(0.3),
            "transforms": (momentum, Clip(2.0), quantize),
            "attack": ALIE(1.5, statistics="honest"),
            "malicious": BAD,
        },
        {"rule": History(), "attack": SignFlip(4.0), "malicious": BAD, "dropout_rate": 0.2},
        {"channel": toys["ThreeStages"](), "transforms": (momentum, quantize), "plan": PLAN},
        {"attack": toys["LabelFlip"](), "malicious": BAD, "rule": NearestNeighborMixing(6, TrimmedMean(6))},
    ]


@pytest.mark.parametrize("which", range(4))
def test_batch_sizes_and_engines_give_the_same_bits(which: int, federation: Make, toys: Toys) -> None:
    setting = full_settings(toys)[which]
    whole, _ = run(federation(**setting))
    for engine in (Local(1), Local(7), Local(64), OneAtATime()):
        other, _ = run(federation(engine=engine, **setting))
        assert torch.equal(other.model, whole.model), engine
        assert all(torch.equal(other.rule[name], value) for name, value in whole.rule.items())


def test_mixing_refuses_a_rule_that_knows_clients(federation: Make) -> None:
    with pytest.raises(InvalidArgument, match="remembers clients"):
        run(federation(rule=NearestNeighborMixing(2, History())))


def test_a_client_that_raises_is_a_recorded_drop_out(federation: Make) -> None:
    fails = frozenset(range(10))
    setting = federation(cohort=FixedSize(60), fails=fails)
    _, record = run(setting, 1)
    assert record.failed == 10 and record.arrived == 50 and not record.skipped
    with pytest.raises(ClientFailed, match=r"client \d: ValueError: no good"):
        run(federation(cohort=FixedSize(60), fails=fails, strict=True), 1)


def test_a_failing_client_of_three_stages_is_recovered_from(federation: Make, toys: Toys) -> None:
    setting = {"cohort": FixedSize(60), "fails": frozenset(range(10)), "transforms": (toys["Quantize"](2**-12),)}
    plain, _ = run(federation(**setting), 1)
    masked, record = run(federation(channel=toys["ThreeStages"](), **setting), 1)
    assert record.arrived == 50
    assert torch.equal(plain.model, masked.model)


def test_simulated_drop_outs_are_as_frequent_as_asked(federation: Make) -> None:
    steps = list(rounds(federation(cohort=FixedSize(60), dropout_rate=0.3), 10, evaluate_every=10))
    arrived = [step.record.arrived for step in steps]
    assert 0.6 < sum(arrived) / 600 < 0.8 and len(set(arrived)) > 1


def test_the_mean_over_plaintext_trains_no_more_than_a_batch_at_once(federation: Make) -> None:
    setting = federation(engine=Local(7))
    run(setting, 1)
    assert max(setting.learner.batches) == 7


def test_too_many_skipped_rounds_end_the_run(federation: Make, toys: Toys) -> None:
    from privfm.checks import RoundFailed

    setting = federation(rule=Krum(5), cohort=FixedSize(60), attack=toys["NotANumber"](), malicious=BAD)
    with pytest.raises(RoundFailed, match="rounds in a row were skipped"):
        list(rounds(setting, 9, max_skipped=2))


def test_a_run_that_was_given_up_stays_given_up(federation: Make, toys: Toys) -> None:
    from privfm.checks import RoundFailed

    setting = federation(rule=Krum(5), cohort=FixedSize(60), attack=toys["NotANumber"](), malicious=BAD)
    seen = []
    with pytest.raises(RoundFailed):
        for step in rounds(setting, 9, max_skipped=2):
            seen.append(step)  # noqa: PERF402  # kept although the generator raises
    assert len(seen) == 3 and seen[-1].state.skipped == 3
    with pytest.raises(RoundFailed, match="given up"):
        next(rounds(setting, 9, seen[-1].state, max_skipped=2))


def test_under_a_plan_a_failed_protocol_releases_its_noise(federation: Make, toys: Toys) -> None:
    gone = Losing((("masked", frozenset({7, 9, 11})), ("unmask", frozenset(range(60)) - {0, 1})))
    setting = federation(transforms=(toys["Quantize"](2**-12),), engine=gone, channel=toys["ThreeStages"](), plan=PLAN)
    state, record = run(setting, 1)
    assert not record.skipped and "survivor left" in record.failure
    assert 0 < state.model.norm() < 10


def test_why_clients_failed_is_recorded(federation: Make) -> None:
    _, record = run(federation(fails=frozenset(range(60)), plan=PLAN), 1)
    assert record.failure == "ValueError: no good" and record.failed == record.sampled and not record.skipped
    _, record = run(federation(fails=frozenset(range(60))), 1)
    assert "n >= 1" in record.skipped and record.failure == "ValueError: no good"


def test_attackers_alone_fall_back_on_themselves(federation: Make) -> None:
    setting = federation(cohort=FixedSize(60), malicious=tuple(range(60)), attack=ALIE(1.5, "honest"))
    state, record = run(setting, 1)
    assert not record.skipped and state.model.norm() > 0


def test_a_curious_server_changes_nothing(federation: Make) -> None:
    plain, _ = run(federation())
    watched, _ = run(federation(server_attack=Look()))
    assert torch.equal(plain.model, watched.model)


def test_attacks_hurt_the_mean_and_rules_help(federation: Make) -> None:
    twelve: dict[str, Any] = {"attack": SignFlip(4.0), "malicious": tuple(range(12)), "cohort": FixedSize(60)}
    clean, attacked = accuracy(federation(cohort=FixedSize(60))), accuracy(federation(**twelve))
    defended = accuracy(federation(rule=MultiKrum(12), **twelve))
    assert clean > 0.8 and attacked < clean - 0.2 and defended > clean - 0.05


def test_mean_runs_with_detection_counts(federation: Make) -> None:
    twelve: dict[str, Any] = {"attack": SignFlip(4.0), "malicious": tuple(range(12)), "cohort": FixedSize(60)}
    _, record = run(federation(rule=MultiKrum(12), **twelve), 1)
    assert (record.kept, record.kept_malicious, record.malicious) == (48, 0, 12)
    _, record = run(federation(rule=Mean(), **twelve), 1)
    assert (record.kept, record.kept_malicious) == (60, 12)
