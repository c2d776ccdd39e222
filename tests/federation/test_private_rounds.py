"""Played rounds under a plan: how far one client or example moves them, and how much noise is really in them.

Clients send what a test tells them to, so that the next model says what was released. Every check is also played with
a mistake that is made elsewhere (no clip, a realised denominator, weights by size, half or double noise), and has
to fail.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf, log, sqrt
from typing import Any, final

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor

from privfm.adapters import AdapterLayout, FactorPair
from privfm.checks import InvalidArgument
from privfm.contracts import (
    KEY_HOLDER,
    Cast,
    Channel,
    Clipping,
    Engine,
    Examples,
    Exchange,
    GradientPrivacy,
    Learner,
    Metric,
    Sealer,
    Spans,
    Split,
    Trained,
)
from privfm.defenses import DPPlan
from privfm.defenses.channels import CKKS, Plaintext
from privfm.defenses.privacy.clipping import AdaptiveQuantile, Automatic, Flat, PerLayer
from privfm.defenses.privacy.correlated_noise import coefficients, sensitivity
from privfm.defenses.privacy.example_level import LocalSampling
from privfm.defenses.privacy.integer_noise import IntegerNoise
from privfm.defenses.privacy.releases import BOUND, GaussianRelease, QuantileRelease
from privfm.defenses.transforms import Clip
from privfm.engines import Local
from privfm.federation import Arm, Federation, FixedSize, Population, RunState, load, play, rounds, save, start
from privfm.randomness import Seeds

CLIENTS, WIDTH, C = 12, 6, 0.5
SPANS = ((0, 2), (2, WIDTH))

TOYS: dict[str, Any] = {}


@pytest.fixture(autouse=True)
def _toys(toys: Mapping[str, Any]) -> None:
    """The folder's learners, codecs and channels, where hypothesis allows no fixture of one test."""
    TOYS.update(toys)


@final
class Descending(Learner):
    """Clients whose examples are their own gradients, whatever the model: steps of learning rate 1 under privacy."""

    def __init__(self, d: int) -> None:
        self.width = d

    @property
    def d(self) -> int:
        return self.width

    def initial(self) -> Tensor:
        return torch.zeros(self.d)

    def refuses_private_gradients(self) -> str:
        return ""

    def train(
        self,
        model: Tensor,
        batch: Sequence[Examples],
        generators: Sequence[Generator],
        privacy: GradientPrivacy | None = None,
        active: Tensor | None = None,
    ) -> Trained:
        assert privacy is not None
        rows = []
        for examples, generator in zip(batch, generators, strict=True):
            row = torch.zeros(1, self.d)
            for places in list(privacy.batches(len(examples), generator)):
                total = privacy.clip(examples.inputs["x"][places]).sum(0, keepdim=True)
                row = row - privacy.noised(total, [len(examples)], [generator])
            rows.append(row)
        return Trained(torch.cat(rows), {})

    def evaluate(self, model: Tensor, split: Split) -> dict[str, Metric]:
        return {"zero": Metric(0.0, 1, True, "share")}


@final
@dataclass(frozen=True)
class Watching(Engine):
    """The local engine, with some clients that never answer; it writes down what the key holder is asked."""

    without: frozenset[int] = frozenset()
    asked: list[str] = None  # type: ignore[assignment]

    def open(self, channel: Channel, sealed: Sealer, cast: Cast) -> Exchange:
        gone = {stage: cast.gone.get(stage, frozenset()) | self.without for stage in channel.client_stages}
        return _Watched(Local().open(channel, sealed, replace(cast, gone=gone)), self.asked)


class _Watched(Exchange):
    def __init__(self, below: Exchange, asked: list[str] | None) -> None:
        self.below, self.server, self.asked = below, below.server, asked

    def __call__(self, stage: str, requests: Mapping[int, bytes]) -> Any:
        if self.asked is not None and KEY_HOLDER in requests:
            self.asked.append(stage)
        return self.below(stage, requests)


def people(sizes: Sequence[int] = (3,) * CLIENTS) -> Population:
    """Client i holds `sizes[i]` examples labelled i."""
    return Population(len(sizes), lambda i: Examples({"x": torch.zeros(sizes[i], 1)}, torch.full((sizes[i],), i)))


def setting(
    rows: Tensor, engine: Engine | None = None, fails: Sequence[int] = (), seed: int = 1, **arm: Any
) -> Federation:
    sizes = arm.pop("sizes", (3,) * len(rows))
    learner = TOYS["Told"](rows, fails, layers=SPANS if rows.shape[1] == WIDTH else None)
    return Federation(Arm(**arm), learner, people(sizes), Seeds(seed), engine or Watching())


def played(federation: Federation) -> tuple[Tensor, RunState]:
    """What one round released, and the state after it."""
    state, _ = play(federation, start(federation))
    return state.model.double(), state


FULL = DPPlan(noise_multiplier=0.0, max_grad_norm=C, sample_rate=1.0, delta=1e-3, sampling="full")
POISSON = replace(FULL, sample_rate=0.4, sampling="poisson")


# Sensitivity

values = st.floats(-3, 3, width=32) | st.sampled_from([0.0, 1e-30, 1e20, -1e38, torch.nan, inf, -inf])
updates = st.lists(values, min_size=WIDTH, max_size=WIDTH) | st.just([0.0] * WIDTH)
cohorts = st.lists(updates, min_size=CLIENTS, max_size=CLIENTS).map(torch.tensor)
someone = st.integers(0, CLIENTS - 1)


def moved(rows: Tensor, client: int, how: str, **arm: Any) -> float:
    """How far the released vector moves when one client's update becomes zero, it is lost, or its training raises."""
    whole, _ = played(setting(rows, **arm))
    if how == "zero":
        zeroed = rows.clone()
        zeroed[client] = 0
        without, _ = played(setting(zeroed, **arm))
    elif how == "lost":
        without, _ = played(setting(rows, Watching(frozenset({client})), **arm))
    else:
        without, _ = played(setting(rows, fails=(client,), **arm))
    assert bool(whole.isfinite().all())
    assert bool(without.isfinite().all())
    return float((whole - without).norm())


PLANS = {
    "flat": FULL,
    "poisson": POISSON,
    "noise of one seed": replace(POISSON, noise_multiplier=1.0),
    "turns": replace(FULL, sample_rate=0.5, sampling="cyclic"),
    "fixed size": replace(FULL, sample_rate=0.5, sampling="fixed_size"),
    "per layer": replace(FULL, clipping=PerLayer()),
    "per layer, by size": replace(FULL, clipping=PerLayer("size")),
    "automatic": replace(FULL, clipping=Automatic()),
    "capped weights": replace(FULL, weight_cap=4),
    "often empty": replace(FULL, sample_rate=0.05, sampling="poisson"),
}


@pytest.mark.parametrize("how", ["zero", "lost", "raises"])
@pytest.mark.parametrize("kind", PLANS)
@settings(max_examples=12)
@given(rows=cohorts, client=someone, seed=st.integers(0, 99))
def test_one_client_moves_a_round_by_at_most_the_clip_over_the_denominator(kind, how, rows, client, seed):
    plan = PLANS[kind]
    sizes = (1, 2, 3, 4, 5, 6, 7, 8, 9, 100, 3, 1)
    most = C / (plan.sample_rate * CLIENTS)
    far = moved(rows, client, how, plan=plan, seed=seed, sizes=sizes, dropout_rate=0.2)
    assert far <= most * (1 + 1e-5)


@pytest.mark.parametrize("how", ["zero", "lost"])
@pytest.mark.parametrize("codec", ["Quantize", "TopK"])
@settings(max_examples=12)
@given(rows=cohorts, client=someone)
def test_a_codec_that_lengthens_rows_does_not_raise_the_sensitivity_where_rows_are_opened(codec, how, rows, client):
    transforms = (TOYS[codec](0.3 if codec == "Quantize" else 3),)
    assert moved(rows, client, how, plan=FULL, transforms=transforms) <= C / CLIENTS * (1 + 1e-5)


@settings(max_examples=12)
@given(rows=cohorts, client=someone)
def test_where_only_a_sum_is_opened_the_noise_is_sized_for_the_lengthened_row(rows, client):
    """Pairwise masks over whole numbers: nobody can clip again, so the codec's own bound is the sensitivity."""
    codec = TOYS["Quantize"](0.05)
    arm: dict[str, Any] = {"plan": FULL, "transforms": (codec,), "channel": TOYS["ThreeStages"]()}
    rule = Arm(**arm).release(WIDTH, CLIENTS)
    assert isinstance(rule, GaussianRelease)
    assert rule.sensitivity == pytest.approx(C + 0.05 * sqrt(WIDTH))
    assert moved(rows, client, "zero", **arm) <= rule.sensitivity / CLIENTS * (1 + 1e-5)


@pytest.mark.parametrize("how", ["zero", "lost", "raises"])
def test_one_client_moves_an_encrypted_sum_by_at_most_the_clip(how):
    rows = torch.randn(CLIENTS, WIDTH, generator=Generator().manual_seed(0)) * torch.logspace(-3, 3, CLIENTS)[:, None]
    rows[3], rows[4, 1], rows[5, 0] = 0, torch.nan, inf
    for client in (0, 3, 4, 5, 11):
        far = moved(rows, client, how, plan=FULL, channel=CKKS(C, CLIENTS))
        assert far <= C / CLIENTS * (1 + 1e-5)
    assert far == pytest.approx(C / CLIENTS, rel=1e-4)  # the last is long: the bound is met


@settings(max_examples=60)
@given(rows=cohorts, client=someone, how=st.sampled_from(["lost", "zero"]), bound=st.sampled_from([0.01, C, 30.0]))
def test_one_client_moves_vector_and_count_together_by_at_most_what_the_noise_is_for(rows, client, how, bound):
    """An adaptive clip: who is missing has neither an update nor a say about the clip."""
    clipping = AdaptiveQuantile(count_deviation=1.0)
    plan = replace(FULL, noise_multiplier=1.0, max_grad_norm=bound, clipping=clipping)
    if how == "zero":  # as Andrew et al.: the contribution is zero, indicator included
        rows = rows.clone()
        rows[client] = 0
    whole, after = played(setting(rows, plan=plan))
    without, other = played(setting(rows, Watching(frozenset({client})), plan=plan))
    rule = Arm(plan=plan).release(WIDTH, CLIENTS)
    assert isinstance(rule, QuantileRelease)
    shares = [log(float(state.rule[BOUND]) / bound) / clipping.rate for state in (after, other)]
    count = 2 * rule.indicator_weight * bound * CLIENTS * (shares[0] - shares[1])
    update = CLIENTS * float((whole - without).norm())
    assert abs(count) == pytest.approx(rule.indicator_weight * bound, rel=1e-3)
    assert sqrt(count**2 + update**2) <= rule.length({BOUND: torch.tensor(bound)}) * (1 + 1e-4)


@final
@dataclass(frozen=True)
class Forgotten(Clipping):
    """The mistake of no clip."""

    def clip(self, rows: Tensor, bound: float, layers: Spans) -> Tensor:
        return rows


@final
@dataclass(frozen=True)
class EachLayer(Clipping):
    """The mistake of giving each layer the whole bound."""

    def clip(self, rows: Tensor, bound: float, layers: Spans) -> Tensor:
        return torch.cat([Flat().clip(rows[:, lo:hi], bound, ()) for lo, hi in layers], dim=1)


def ones(*lengths: float) -> Tensor:
    """Clients that all point the same way, of these lengths; the last length is everybody else's."""
    rows = torch.ones(CLIENTS, WIDTH) / sqrt(WIDTH)
    lengths = (*lengths, *(lengths[-1],) * (CLIENTS - len(lengths)))
    return rows * torch.tensor(lengths)[:, None]


def test_mistakes_break_the_bound():
    """Negative controls: what the property above would have caught."""
    most = C / CLIENTS
    masks = {"channel": TOYS["ThreeStages"](), "transforms": (TOYS["Quantize"](1e-4),)}
    honest = moved(ones(3.0), 0, "zero", plan=FULL, **masks)
    assert honest == pytest.approx(most, rel=1e-2)
    forgotten, layers = replace(FULL, clipping=Forgotten()), replace(FULL, clipping=EachLayer())
    assert moved(ones(3.0), 0, "zero", plan=forgotten, **masks) > 5 * most
    assert moved(ones(9.0), 0, "zero", plan=layers, **masks) > 1.3 * most  # sqrt(2) for two layers
    opposed = ones(9.0)
    opposed[0] *= -1
    plain = {"cohort": FixedSize(CLIENTS), "transforms": (Clip(C),)}
    assert moved(opposed, 0, "lost", **plain) > 1.8 * most  # a mean over who came: the others' share grows
    sizes = (8, *(1,) * (CLIENTS - 1))
    assert moved(ones(9.0), 0, "zero", **plain, sizes=sizes, weighting="examples") > 5 * most


def test_a_server_that_opens_rows_clips_them_again():
    """The second line of defence: a client that does not clip costs nothing where its row is seen."""
    for clipping in (Forgotten(), EachLayer()):
        plan = replace(FULL, clipping=clipping)
        assert moved(ones(9.0), 0, "zero", plan=plan, channel=Plaintext()) <= C / CLIENTS * (1 + 1e-5)


def test_nobody_counts_more_than_the_cap():
    """Weights by size, cut at the cap and divided by a denominator that does not follow who came."""
    plan = replace(FULL, weight_cap=4)
    sizes = (1, 2, 4, 40, *(4,) * (CLIENTS - 4))
    masks = {"channel": TOYS["ThreeStages"](), "transforms": (TOYS["Quantize"](1e-4),)}  # nobody clips again there
    for way in ({}, masks):
        far = [moved(ones(9.0), client, "zero", plan=plan, sizes=sizes, **way) for client in range(4)]
        assert far == pytest.approx([C / CLIENTS * weight for weight in (0.25, 0.5, 1.0, 1.0)], rel=2e-3)


# What does not stop a round


@pytest.mark.parametrize("bad", [torch.nan, inf, -inf, 1e38])
def test_a_cohort_of_nothing_but_bad_updates_is_released_as_noise(bad):
    """A9: not finite is zero, counted as taken part; nothing is aborted."""
    plan = replace(POISSON, noise_multiplier=1.0, max_participations=3)
    federation = setting(torch.full((CLIENTS, WIDTH), bad), plan=plan)
    zeros = setting(torch.zeros(CLIENTS, WIDTH), plan=plan)
    state, record = play(federation, start(federation))
    same, _ = play(zeros, start(zeros))
    assert not record.skipped
    assert int(state.joined["count"].sum()) == record.sampled == record.arrived > 0
    if bad != 1e38:
        assert torch.equal(state.model, same.model)
    assert bool(state.model.isfinite().all())


def test_a_client_that_raises_is_a_zero_update_and_has_taken_part():
    plan = replace(FULL, noise_multiplier=1.0)
    rows = ones(9.0)
    zeroed = rows.clone()
    zeroed[2] = 0
    federation = setting(rows, fails=(2,), plan=plan)
    state, record = play(federation, start(federation))
    assert (record.failed, record.arrived) == (1, CLIENTS)
    assert torch.equal(state.model.double(), played(setting(zeroed, plan=plan))[0])


def test_an_empty_round_is_noised_and_counted_like_any_other():
    """P(empty) is 0.54 here; without noise, a model that did not move would tell that nobody was sampled."""
    plan = replace(FULL, noise_multiplier=1.0, sample_rate=0.05, sampling="poisson")
    federation = setting(torch.zeros(CLIENTS, 50), plan=plan)
    state, lengths, empty = start(federation), [], 0
    for _ in range(12):
        before = state.model
        state, record = play(federation, state)
        lengths.append(float((state.model - before).norm()))
        empty += record.sampled == 0
    assert 2 < empty < 11
    expected = C / (0.05 * CLIENTS) * sqrt(50)
    assert all(0.6 * expected < length < 1.4 * expected for length in lengths)
    assert state.skipped == 0


def test_a_round_that_fails_under_central_noise_is_released_as_noise():
    """Fewer than the channel's smallest sum: why it failed may depend on data, so that it must not show."""
    plan = replace(FULL, noise_multiplier=1.0)
    lone = setting(ones(1.0), Watching(frozenset(range(1, CLIENTS))), plan=plan, channel=CKKS(C, CLIENTS))
    state, record = play(lone, start(lone))
    assert "smallest_release" in record.failure
    assert not record.skipped
    nobody = setting(ones(1.0), Watching(frozenset(range(CLIENTS))), plan=plan)
    assert torch.equal(state.model.double(), played(nobody)[0])
    assert float(state.model.norm()) > 0


@pytest.mark.parametrize(("answers", "decrypted"), [(9, True), (8, False), (1, False), (0, False)])
def test_fewer_answers_than_the_floor_end_the_round_before_the_key_holder_is_asked(answers, decrypted):
    """The missing shares would be missing noise: nobody decrypts such a sum."""
    asked: list[str] = []
    plan = replace(FULL, noise_multiplier=1.0, place="distributed", integers=IntegerNoise(9, CLIENTS, modulus_bits=26))
    engine = Watching(frozenset(range(answers, CLIENTS)), asked)
    federation = setting(ones(1.0), engine, plan=plan, channel=CKKS(2.0**25, CLIENTS, bits=25))
    state, record = play(federation, start(federation))
    assert ("decrypt" in asked) == decrypted
    assert bool(state.model.any()) == decrypted
    assert bool(record.skipped) != decrypted
    if not decrypted:
        assert "answered" in record.skipped


@pytest.mark.parametrize(("answers", "released"), [(9, True), (8, False)])
def test_a_channel_that_forgets_the_floor_releases_nothing_below_it(answers, released):
    """The second line of defence: pairwise masks of a toy that opens whatever came."""
    integers = IntegerNoise(9, CLIENTS, modulus_bits=26)
    plan = replace(FULL, noise_multiplier=1.0, place="distributed", integers=integers)
    engine = Watching(frozenset(range(answers, CLIENTS)))
    federation = setting(ones(1.0), engine, plan=plan, channel=TOYS["ThreeStages"]())
    state, record = play(federation, start(federation))
    assert bool(state.model.any()) == released
    assert bool(record.skipped) != released


# Noise

WIDE = 4000


def fits(noise: Tensor, deviation: float) -> bool:
    """Chi-square on the scale and Kolmogorov-Smirnov on the form, each at 1e-7, two-sided: secure noise has no seed."""
    from scipy.stats import chi2, kstest

    normal = (noise.double() / deviation).numpy()
    tail = float(chi2.cdf((normal**2).sum(), len(normal)))
    return 5e-8 < tail < 1 - 5e-8 and float(kstest(normal, "norm").pvalue) > 1e-7


def right_and_no_other(noise: Tensor, deviation: float) -> bool:
    return fits(noise, deviation) and not any(fits(noise, deviation * wrong) for wrong in (0.5, 0.9, 1.1, 2.0))


NOISY = replace(FULL, noise_multiplier=1.5)
INTEGERS = IntegerNoise(CLIENTS, CLIENTS, modulus_bits=27, resolution=2**12)
PLACES: dict[str, tuple[dict[str, Any], float]] = {  # arm, deviation of what is added to the model
    "central": ({"plan": NOISY}, 1.5 * C / CLIENTS),
    "central, Poisson": ({"plan": replace(NOISY, sample_rate=0.25, sampling="poisson")}, 1.5 * C / 3),
    "central, secure": ({"plan": replace(NOISY, source="secure")}, 1.5 * C / CLIENTS),
    "central, weights": ({"plan": replace(NOISY, weight_cap=100)}, 1.5 * C / CLIENTS),
    "key holder": (
        {"plan": replace(NOISY, place="key_holder", source="secure"), "channel": CKKS(C, CLIENTS)},
        1.5 * C / CLIENTS,
    ),
    "local": ({"plan": replace(NOISY, place="local")}, 1.5 * C / sqrt(CLIENTS)),
    "local, secure": ({"plan": replace(NOISY, place="local", source="secure")}, 1.5 * C / sqrt(CLIENTS)),
    "distributed": (
        {"plan": replace(NOISY, place="distributed", integers=INTEGERS), "channel": CKKS(2.0**26, CLIENTS, bits=26)},
        1.5 * C / CLIENTS,
    ),
    "larger cohort": ({"plan": replace(NOISY, simulated_population=10 * CLIENTS)}, 0.15 * C / CLIENTS),
}


@pytest.mark.parametrize("place", PLACES)
def test_the_noise_of_a_played_round_has_its_scale_and_no_other(place):
    arm, deviation = PLACES[place]
    noise, _ = played(setting(torch.zeros(CLIENTS, WIDE), **arm))
    if place == "distributed":  # sized for the sensitivity after rounding, a percent above the clip
        codec = Arm(**arm).plan.codec  # type: ignore[union-attr]
        deviation *= codec.bound(WIDE) / codec.clip  # type: ignore[union-attr]
    assert right_and_no_other(noise, deviation)


def test_the_key_holders_noise_is_in_what_the_server_receives():
    """Not only in the model: the sum that leaves the key holder is noised already, and the release adds nothing."""
    arm = PLACES["key holder"][0]
    federation = setting(torch.zeros(CLIENTS, WIDE), **arm)
    channel, rule = federation.arm.wire, federation.arm.release(WIDE, CLIENTS)
    assert isinstance(channel, CKKS)
    assert (channel.noise_multiplier, channel.sensitivity) == (1.5, C)
    again = [played(federation)[0] for _ in range(2)]
    assert not torch.equal(*again)  # drawn by the operating system: the run's seed does not repeat it
    assert isinstance(rule, GaussianRelease)
    assert rule.noised_elsewhere


@pytest.mark.parametrize("steps", [1, 4])
def test_every_local_step_is_noised_at_example_level(steps):
    """Independent noise of deviation z C / b a step and client; the mean over clients divides by their root."""
    local = LocalSampling(batch_size=2, local_steps=steps)
    plan = replace(NOISY, unit="example", place="local", local=local)
    clients = Population(CLIENTS, lambda i: Examples({"x": torch.zeros(8, WIDE)}, torch.full((8,), i)))
    federation = Federation(Arm(plan=plan), Descending(WIDE), clients, Seeds(3), Local())
    noise, _ = played(federation)
    assert right_and_no_other(noise, 1.5 * C / 2 * sqrt(steps) / sqrt(CLIENTS))


def test_one_example_moves_a_round_by_at_most_its_share():
    """One step: C over the expected batch, over the clients of the mean."""
    plan = replace(NOISY, unit="example", place="local", local=LocalSampling(batch_size=2, local_steps=1))
    gradients = torch.randn(CLIENTS, 8, WIDTH, generator=Generator().manual_seed(5)) * 100

    def released(data: Tensor) -> Tensor:
        clients = Population(CLIENTS, lambda i: Examples({"x": data[i]}, torch.full((8,), i)))
        return played(Federation(Arm(plan=plan), Descending(WIDTH), clients, Seeds(3), Local()))[0]

    whole, most, far = released(gradients), C / 2 / CLIENTS, []
    for place in range(8):
        for other in (0.0, torch.nan, inf):
            changed = gradients.clone()
            changed[4, place] = other
            far.append(float((whole - released(changed)).norm()))
    assert max(far) == pytest.approx(most, rel=1e-3)
    assert min(far) == 0.0  # examples outside of the batch
    replaced = gradients.clone()
    replaced[4] *= -1
    assert float((whole - released(replaced)).norm()) > most


def test_factors_that_are_not_trained_get_no_noise():
    """Alternating factors, at every place that adds noise: only what is trained moves."""
    layout = AdapterLayout((FactorPair("m", 2, 10, 10, 1.0, 0, 20),), 45)
    for place in ("central", "local"):
        federation = Federation(
            Arm(plan=replace(NOISY, place=place), alternate=True),  # type: ignore[arg-type]
            TOYS["Told"](torch.ones(CLIENTS, 45), adapters=layout),
            people(),
            Seeds(1),
            Local(),
        )
        state, _ = play(federation, start(federation))
        assert not state.model[:20].any(), place
        assert bool(state.model[20:].all()), place
        after, _ = play(federation, state)
        assert torch.equal(after.model[20:40], state.model[20:40]), place
        assert bool(after.model[:20].all()), place


def test_a_learner_that_cannot_bound_examples_is_refused_before_any_training():
    local = LocalSampling(batch_size=2, local_steps=1)
    federation = setting(ones(1.0), plan=replace(NOISY, unit="example", place="local", local=local))
    with pytest.raises(InvalidArgument, match="gradients of single examples are not to be had: Told computes no"):
        start(federation)
    assert federation.learner.asked == []  # type: ignore[attr-defined]


# Correlated noise


def releases(federation: Federation, count: int, folder: Any = None) -> Tensor:
    """What each round released, `(T, d)`; through a checkpoint after every second round where there is a folder."""
    state, out = start(federation), []
    for _ in range(count):
        before = state.model.double()
        state, _ = play(federation, state)
        out.append(state.model.double() - before)
        if folder is not None and state.round % 2 == 0:
            save(state, folder)
            found = load(folder)
            assert found is not None
            state = found
    return torch.stack(out)


CORRELATED = replace(NOISY, sample_rate=0.25, sampling="cyclic", bands=4, max_participations=2)


def band_matrix(bands: int, count: int) -> Tensor:
    c = coefficients(bands)
    return torch.tensor(
        [[c[i - j] if 0 <= i - j < bands else 0.0 for j in range(count)] for i in range(count)], dtype=torch.float64
    )


@pytest.mark.parametrize("source", ["seeded", "secure"])
def test_correlated_noise_has_the_covariance_of_its_matrix(source):
    """Released over T rounds: covariance C^-1 C^-T (z C S)^2; C undoes it, and nothing else does."""
    plan = replace(CORRELATED, source=source)
    found = releases(setting(torch.zeros(CLIENTS, WIDE), plan=plan), 8) * 3
    scale = 1.5 * C * sensitivity(4, 2)
    matrix = band_matrix(4, 8)
    inverse = matrix.inverse()
    expected, seen = inverse @ inverse.T * scale**2, found @ found.T / WIDE
    spread = ((expected.diag()[:, None] * expected.diag() + expected**2) / WIDE).sqrt()
    assert float(((seen - expected) / spread).abs().max()) < 6.5  # secure noise has no seed
    assert float(((seen - torch.eye(8) * scale**2) / spread).abs().max()) > 10  # independent noise is told apart
    white = matrix @ found
    assert right_and_no_other(white.flatten(), scale)
    assert not fits(found.flatten(), scale)


def test_correlated_noise_goes_on_after_a_checkpoint(tmp_path):
    federation = setting(ones(1.0), plan=CORRELATED)
    assert torch.equal(releases(federation, 8), releases(federation, 8, tmp_path / "saved"))


def test_one_band_is_independent_noise():
    plan = replace(CORRELATED, bands=1)
    found = releases(setting(torch.zeros(CLIENTS, WIDE), plan=plan), 4) * 3
    assert right_and_no_other(found.flatten(), 1.5 * C)
    correlations = torch.corrcoef(found) - torch.eye(4)
    assert float(correlations.abs().max()) < 4.5 / sqrt(WIDE)


def test_correlated_noise_in_the_sum_of_all_rounds_is_less():
    """What it is for: at the same epsilon (noise multiplier 1.5, and 1.5 sqrt(2) for two joined rounds of one)."""
    wide = torch.zeros(CLIENTS, WIDE)
    plain = replace(CORRELATED, bands=1, noise_multiplier=1.5 * sqrt(2))
    prefix = [
        releases(setting(wide, plan=plan), 8).cumsum(0).square().mean().sqrt().item() for plan in (CORRELATED, plain)
    ]
    assert prefix[0] / prefix[1] == pytest.approx(2.2485 / 3.0, rel=0.03)


# Adaptive clipping


def bounds(first: float, count: int = 75) -> list[float]:
    """The clip of every round; a hundred clients whose update norms have median 1."""
    norms = torch.randn(100, generator=Generator().manual_seed(0)).mul(0.5).exp()
    rows = torch.randn(100, 20, generator=Generator().manual_seed(1))
    rows = rows / rows.norm(dim=1, keepdim=True) * (norms / norms.median())[:, None]
    plan = replace(FULL, noise_multiplier=0.5, max_grad_norm=first, clipping=AdaptiveQuantile(0.5))
    federation = setting(rows, plan=plan)
    state, seen = start(federation), []
    for _ in range(count):
        state, record = play(federation, state)
        assert record.clip_bound is not None
        seen.append(record.clip_bound)
    return seen


def settles(first: float) -> bool:
    """Whether the clip is around the median in the end, and stays there."""
    return all(0.7 < bound < 1.4 for bound in bounds(first)[-20:])


@pytest.mark.parametrize("first", [0.01, 100.0])
def test_the_clip_goes_to_the_quantile_from_both_sides(first):
    assert bounds(first, 1) == [first]
    assert settles(first)


@pytest.mark.parametrize("first", [0.01, 100.0])
def test_feedback_the_wrong_way_round_fails_the_same_test(first, monkeypatch):
    """Counting who was clipped where who was not is meant: the clip runs away from the quantile."""

    def inverted(self: AdaptiveQuantile, bound: float, share: float) -> float:
        return bound * float(torch.tensor(-self.rate * ((1 - share) - self.quantile)).exp())

    monkeypatch.setattr(AdaptiveQuantile, "next_bound", inverted)
    assert not settles(first)


def test_the_noise_is_sized_for_the_clip_that_was_used():
    """Not for the one that follows from the round."""
    plan = replace(FULL, noise_multiplier=1.0, clipping=AdaptiveQuantile(rate=2.0, count_deviation=1.0))
    federation = setting(torch.zeros(CLIENTS, WIDE), plan=plan)
    state = start(federation)
    for _ in range(2):
        before, used = state.model.double(), float(state.rule[BOUND])
        state, record = play(federation, state)
        after = float(state.rule[BOUND])
        assert record.clip_bound == used
        assert after < used / 2
        noise = (state.model.double() - before) * CLIENTS
        assert right_and_no_other(noise, used * sqrt(1 + 1 / 3))  # theorem 1: 1.155 for a count deviation of 1
        assert not fits(noise, after * sqrt(1 + 1 / 3))


def test_an_adaptive_clip_without_noise_still_moves():
    plan = replace(FULL, clipping=AdaptiveQuantile())
    state = played(setting(ones(0.1), plan=plan))[1]
    assert float(state.rule[BOUND]) == pytest.approx(C * 0.904837, rel=1e-4)  # exp(-0.2 (1 - 0.5)): all are below


# Participation


@pytest.mark.parametrize("place", ["central", "local"])
def test_nobody_joins_more_often_than_the_plan_says(place):
    """Over a whole run, and over one that is resumed from its checkpoints."""
    plan = replace(POISSON, noise_multiplier=1.0, sample_rate=0.5, max_participations=3, place=place)
    federation = setting(torch.zeros(CLIENTS, WIDTH), plan=plan)
    steps = [step.record.sampled for step in rounds(federation, 12)]
    assert sum(steps) == 3 * CLIENTS
    joined = torch.bincount(torch.tensor(federation.learner.asked), minlength=CLIENTS)  # type: ignore[attr-defined]
    assert joined.tolist() == [3] * CLIENTS  # without the bound, six on average


def test_the_bound_on_participations_survives_a_resume(tmp_path):
    plan = replace(POISSON, noise_multiplier=1.0, sample_rate=0.5, max_participations=3)
    learners = []
    for restarts in (0, 4):
        federation = setting(torch.zeros(CLIENTS, WIDTH), plan=plan)
        state = start(federation)
        for now in range(12):
            state, _ = play(federation, state)
            if restarts and now % 3 == 0:
                save(state, tmp_path)
                state = load(tmp_path) or state
        learners.append(federation.learner.asked)  # type: ignore[attr-defined]
    assert learners[0] == learners[1]
    assert torch.bincount(torch.tensor(learners[0])).max() == 3


def test_turns_keep_their_distance_and_their_number():
    federation = setting(torch.zeros(CLIENTS, WIDTH), plan=CORRELATED)
    state, when = start(federation), {client: [] for client in range(CLIENTS)}
    for now in range(14):
        asked = federation.learner.asked  # type: ignore[attr-defined]
        asked.clear()
        state, _ = play(federation, state)
        for client in asked:
            when[client].append(now)
    assert all(seen == [client % 4, client % 4 + 4] for client, seen in when.items())
