"""What a plan refuses and why, what its statement says, and that clients are drawn as it is accounted."""

from dataclasses import replace
from itertools import combinations
from math import comb

import pytest
import torch
from torch import Generator

from privfm.checks import InvalidArgument
from privfm.defenses import DPPlan, Krum, Mean, TrimmedMean
from privfm.defenses.channels import CKKS, Plaintext
from privfm.defenses.privacy.clipping import AdaptiveQuantile, Flat, PerLayer
from privfm.defenses.privacy.example_level import LocalSampling
from privfm.defenses.privacy.integer_noise import IntegerNoise
from privfm.defenses.transforms import ClientMomentum
from privfm.federation import Arm, FixedSize, ProductGeometry, problems
from privfm.federation.population import Cyclic, FixedShare, Poisson

PLAN = DPPlan(noise_multiplier=1.0, max_grad_norm=1.0, sample_rate=0.25, delta=1e-4)
FULL = replace(PLAN, sample_rate=1.0, sampling="full")
LOCAL = LocalSampling(batch_size=4, local_steps=2)
INTEGERS = IntegerNoise(10, 100)
EXAMPLE = replace(FULL, unit="example", place="local", local=LOCAL)
DISTRIBUTED = replace(FULL, place="distributed", integers=INTEGERS)
KEY_HOLDER = replace(FULL, place="key_holder", source="secure")
BANDED = replace(PLAN, sampling="cyclic", bands=4, max_participations=3)


# What no plan may be

WRONG = {
    "full, of some": (PLAN, {"sampling": "full"}, "everybody is 1"),
    "fixed size, of all": (FULL, {"sampling": "fixed_size"}, "use sampling='full'"),
    "turns that do not come out": (PLAN, {"sampling": "cyclic", "sample_rate": 0.3}, "whole number"),
    "local, drawn in secret": (PLAN, {"place": "local"}, "the server sees who takes part.*max_participations"),
    "local, fixed size": (PLAN, {"place": "local", "sampling": "fixed_size"}, "max_participations"),
    "distributed, drawn in secret": (
        PLAN,
        {"place": "distributed", "integers": INTEGERS},
        "the server sees who takes part.*max_participations",
    ),
    "distributed, no grid": (FULL, {"place": "distributed"}, "distributed noise, and it needs one"),
    "a grid, not distributed": (FULL, {"integers": INTEGERS}, "belongs to distributed noise"),
    "local, replaced": (FULL, {"place": "local", "relation": "replace-one"}, "still adds its noise"),
    "distributed, added": (DISTRIBUTED, {"relation": "add-or-remove"}, "still adds its noise"),
    "a key holder's seed": (KEY_HOLDER, {"source": "seeded"}, "could take the key holder's noise off"),
    "examples, noised by the server": (EXAMPLE, {"place": "central"}, "noised by clients"),
    "examples, no steps": (EXAMPLE, {"local": None}, "need a batch size"),
    "examples, weights": (EXAMPLE, {"weight_cap": 3}, "examples are bounded, not clients"),
    "clients, steps": (PLAN, {"local": LOCAL}, "only unit='example' needs it"),
    "adaptive, local": (
        replace(PLAN, place="local", max_participations=3),
        {"clipping": AdaptiveQuantile()},
        "needs a central plan",
    ),
    "adaptive, key holder": (KEY_HOLDER, {"clipping": AdaptiveQuantile()}, "needs a central plan"),
    "adaptive, distributed": (DISTRIBUTED, {"clipping": AdaptiveQuantile()}, "needs a central plan"),
    "adaptive, examples": (EXAMPLE, {"clipping": AdaptiveQuantile()}, "needs a central plan"),
    "adaptive, weights": (PLAN, {"clipping": AdaptiveQuantile(), "weight_cap": 9}, "counts clients"),
    "adaptive, replaced": (PLAN, {"clipping": AdaptiveQuantile(), "relation": "replace-one"}, "sized for zero-out"),
    "bands, Poisson": (BANDED, {"sampling": "poisson"}, "amplification by Poisson sampling would be false"),
    "bands, everybody": (FULL, {"bands": 2, "max_participations": 3}, "needs clients to wait 2 rounds"),
    "bands, more than turns": (BANDED, {"bands": 5}, "needs clients to wait 5 rounds"),
    "bands, adaptive": (BANDED, {"clipping": AdaptiveQuantile()}, "one clip for all of them"),
    "bands, local": (BANDED, {"place": "local"}, "added by the server"),
    "bands, key holder": (BANDED, {"place": "key_holder", "source": "secure"}, "added by the server"),
    "bands, distributed": (BANDED, {"place": "distributed", "integers": INTEGERS}, "added by the server"),
    "bands, replaced": (BANDED, {"relation": "replace-one"}, "accounted for zero-out"),
    "bands, joined at will": (BANDED, {"max_participations": None}, "give max_participations"),
    "a larger population, local": (
        replace(FULL, place="local"),
        {"simulated_population": 10**6},
        "only the noise of a central plan",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_plan_that_could_not_keep_its_word_is_not_made(name):
    plan, change, sentence = WRONG[name]
    with pytest.raises(InvalidArgument, match=sentence):
        replace(plan, **change)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"least_answers": 1, "clients": 9}, "least_answers"),
        ({"least_answers": 10, "clients": 9}, "clients"),
        ({"least_answers": 5, "clients": 9, "colluders": 5}, "nobody is left to add noise"),
    ],
    ids=["one answer", "more answers than clients", "nobody honest"],
)
def test_shares_that_could_not_hide_anybody_are_refused(arguments, sentence):
    with pytest.raises(InvalidArgument, match=sentence):
        IntegerNoise(**arguments)


def test_shares_below_two_steps_are_refused():
    plan = replace(DISTRIBUTED, integers=replace(INTEGERS, resolution=4))
    with pytest.raises(InvalidArgument, match="expected at least 2, below which sums of discrete Gaussians are no"):
        plan.epsilon(1, d=10)


def test_what_an_epsilon_needs_is_asked_for():
    with pytest.raises(InvalidArgument, match="examples=\\(\\): each client composes its own sampling rate"):
        EXAMPLE.epsilon(1)
    with pytest.raises(InvalidArgument, match="d=None: rounding to a grid costs more"):
        DISTRIBUTED.epsilon(1)


@pytest.mark.parametrize("epsilon", [20.5, 1e3])
def test_an_epsilon_that_protects_nobody_is_refused(epsilon):
    with pytest.raises(InvalidArgument, match="expected at most 20"):
        FULL.with_epsilon(epsilon, 10)


# What no arm may be


def found(plan=PLAN, population=100, d=50, **arm):
    facts = {name: arm.pop(name) for name in ("examples", "private_gradients") if name in arm}
    return problems(Arm(plan=plan, **arm), d, population, **facts)


CARRIES = CKKS(2.0**31, 100, bits=31)

REFUSED = {
    "delta of one client": ({"plan": replace(PLAN, delta=0.01)}, "delta=0.01 >= 1/N", "delta below"),
    "delta of one example": ({"plan": replace(EXAMPLE, delta=1e-3), "examples": 1100}, "1,100 examples", "delta below"),
    "a rule": ({"rule": TrimmedMean(2)}, "no bounded sensitivity", "Mean"),
    "a rule, key holder": ({"plan": KEY_HOLDER, "rule": Krum(2), "channel": CKKS(1.0, 100)}, "bounded", "Mean"),
    "sizes as weights": ({"weighting": "examples"}, "more weight has more sensitivity", "weight_cap"),
    "another cohort": ({"cohort": FixedSize(25)}, "the plan draws clients by itself", "leave the cohort out"),
    "an odd share": (
        {"plan": replace(PLAN, sampling="fixed_size", sample_rate=0.255)},
        "no whole number",
        "sample_rate=0.2",
    ),
    "five clients": ({"population": 5}, "5 clients cannot hide one of them", "unit='example'"),
    "no steps to see": (
        {"plan": EXAMPLE, "private_gradients": "OwnTraining does not show its steps"},
        "OwnTraining does not show its steps",
        "SGD or AdamW",
    ),
    "shares, seen one by one": (
        {"plan": DISTRIBUTED, "channel": Plaintext()},
        "only a share of the noise",
        "PairwiseMasks",
    ),
    "no key holder": ({"plan": KEY_HOLDER, "channel": Plaintext()}, "no key holder that could add", "CKKS"),
    "a channel that cuts": ({"channel": CKKS(0.5, 100)}, "may have a coordinate of 1", "at least the clip"),
    "a clip that moves": (
        {"plan": replace(PLAN, clipping=AdaptiveQuantile()), "channel": CKKS(1.0, 100)},
        "whether a client refuses depends on its data",
        "Plaintext",
    ),
    "a grid of another step": (
        {"plan": DISTRIBUTED, "channel": CKKS(1.5, 100)},
        "does not carry whole numbers exactly|refuses coordinates",
        "PairwiseMasks(modulus_bits=",
    ),
    "products of factors": ({"adapters": ProductGeometry()}, "no bounded sensitivity", "leave adapters out"),
    "a smaller population": (
        {"plan": replace(PLAN, simulated_population=50)},
        "smaller than the 100 clients",
        "smaller than the run's own",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_arm_that_would_make_the_plan_a_lie_is_refused_with_a_way_out(name):
    import re

    arm, what, instead = REFUSED[name]
    listed = found(**arm)
    fitting = [one for one in listed if re.search(what, one.what)]
    assert fitting, [one.what for one in listed]
    assert any(instead in one.instead for one in fitting)


def test_the_same_arms_without_the_mistake_run():
    assert found() == []
    assert found(plan=KEY_HOLDER, channel=CKKS(1.0, 100)) == []
    assert found(plan=DISTRIBUTED, channel=CARRIES, d=50) == []
    assert found(plan=EXAMPLE, examples=900) == []
    assert found(plan=EXAMPLE, population=5, examples=900) == []  # few clients are no problem for their examples
    assert found(plan=replace(FULL, place="local"), rule=TrimmedMean(2)) == []  # rows are private before any rule
    assert found(plan=replace(PLAN, sampling="fixed_size")) == []
    assert found(transforms=(ClientMomentum(0.9),)) == []
    assert found(plan=BANDED, rule=Mean()) == []


# What a statement says


STATEMENTS = {
    "central": (PLAN, "released_model", None, "simulated: no guarantee if the seed is known"),
    "secure": (replace(PLAN, source="secure"), "released_model", None, "no seed is kept"),
    "bounded": (replace(PLAN, max_participations=2), "released_model", 2, "simulated"),
    "full": (FULL, "released_model", 10, "simulated"),
    "turns": (replace(PLAN, sampling="cyclic"), "released_model", 3, "simulated"),
    "correlated": (BANDED, "released_model", 3, "simulated"),
    "key holder": (KEY_HOLDER, "server", 10, "no seed is kept"),
    "local": (replace(PLAN, place="local", max_participations=4), "server", 4, "simulated"),
    "distributed": (DISTRIBUTED, "server", 10, "simulated"),
    "examples": (EXAMPLE, "server", 10, "simulated"),
    "larger cohort": (
        replace(PLAN, simulated_population=10**6),
        "released_model",
        None,
        "scaled to a population of 1,000,000: no guarantee for this run",
    ),
}


@pytest.mark.parametrize("name", STATEMENTS)
def test_every_epsilon_names_its_observer_its_unit_and_its_noise(name):
    plan, observer, bound, noise = STATEMENTS[name]
    record = plan.record(10, examples=[40] * 3, d=50)
    assert (record.adversary, record.participation_bound) == (observer, bound)
    assert (record.unit, record.place, record.delta, record.rounds) == (plan.unit, plan.place, plan.delta, 10)
    assert noise in record.noise
    assert record.relation.endswith("public N")
    assert record.tuning == "excludes tuning"
    assert str(plan.event(10, examples=[40] * 3, d=50)) == record.event


@pytest.mark.parametrize("name", ["key holder", "local", "distributed", "examples"])
def test_the_number_against_the_server_comes_first(name):
    records = STATEMENTS[name][0].records(10, examples=[40] * 3, d=50)
    assert records[0].adversary == "server"
    assert all(record.adversary == "released_model" for record in records[1:])


# How clients are drawn

N, DRAWS = 12, 6000


def inclusions(sampling):
    """Which of N clients were drawn, `(DRAWS, N)`."""
    generator, rows = Generator().manual_seed(0), torch.zeros(DRAWS, N, dtype=torch.float64)
    for row in rows:
        row[list(sampling.draw(N, generator))] = 1
    return rows


def pairs(sampling):
    """Share of the draws in which two given clients both were, over all pairs, and its standard error if Poisson."""
    rows = inclusions(sampling)
    both = rows.T @ rows / DRAWS
    return float(both[torch.triu(torch.ones(N, N), 1) > 0].mean())


def test_pairs_of_clients_are_drawn_as_the_plan_is_accounted():
    """E[1_i 1_j] is q^2 under Poisson sampling and n (n-1) / (N (N-1)) under fixed size; q = 1/4."""
    poisson, fixed = Arm(plan=PLAN).sampling, Arm(plan=replace(PLAN, sampling="fixed_size")).sampling
    assert (poisson, fixed) == (Poisson(0.25), FixedShare(0.25))
    independent, without = 1 / 16, 3 * 2 / (12 * 11)
    assert pairs(poisson) == pytest.approx(independent, rel=0.03)
    assert pairs(fixed) == pytest.approx(without, rel=1e-9)  # over all pairs it does not vary at all
    assert abs(without / independent - 1) > 0.25


def test_the_size_of_a_poisson_cohort_varies_and_that_of_a_fixed_one_does_not():
    """N q (1 - q) against nothing: the inclusion test of an audit."""
    poisson = inclusions(Poisson(0.25)).sum(1)
    assert float(poisson.var()) == pytest.approx(N * 0.25 * 0.75, rel=0.06)
    assert float(inclusions(FixedShare(0.25)).sum(1).var()) == 0.0


def test_a_binomial_number_of_clients_drawn_uniformly_is_a_poisson_cohort():
    """P(S) = Binomial(|S|; N, q) / (N choose |S|) = q^|S| (1 - q)^(N - |S|), for every set S; and so it is drawn."""
    q, n = 0.3, 4
    for size in range(n + 1):
        binomial = comb(n, size) * q**size * (1 - q) ** (n - size)
        assert binomial / comb(n, size) == pytest.approx(q**size * (1 - q) ** (n - size))
    generator, seen = Generator().manual_seed(1), {}
    for _ in range(DRAWS):
        cohort = Poisson(q).draw(n, generator)
        seen[cohort] = seen.get(cohort, 0) + 1
    for size in range(n + 1):
        for cohort in combinations(range(n), size):
            chance = q**size * (1 - q) ** (n - size)
            spread = (chance * (1 - chance) / DRAWS) ** 0.5
            assert abs(seen.get(cohort, 0) / DRAWS - chance) < 4.5 * spread


def test_turns_are_groups_and_no_chance():
    sampling = Arm(plan=BANDED).sampling
    assert sampling == Cyclic(4)
    cohorts = [sampling.draw(10, Generator(), now) for now in range(8)]
    assert cohorts[:4] == cohorts[4:]
    assert sorted(client for cohort in cohorts[:4] for client in cohort) == list(range(10))


# What is fixed beforehand


@pytest.mark.parametrize("plan", [PLAN, replace(PLAN, clipping=PerLayer()), replace(PLAN, clipping=Flat())], ids=str)
def test_the_clip_of_a_round_is_the_plans(plan):
    rows = torch.randn(20, 50, generator=Generator().manual_seed(0)) * 10
    clip = plan.clip(((0, 10), (10, 50)))
    assert clip.norm_bound(float("inf"), 50) == 1.0
    assert float(clip.encode(rows, {}, [])[0].rows.norm(dim=1).max()) <= 1
    assert plan.clip(((0, 50),), bound=0.25).norm_bound(float("inf"), 50) == 0.25
    assert EXAMPLE.clip(((0, 50),)) is None


def test_weights_are_capped_at_one_whatever_the_cap():
    assert replace(PLAN, weight_cap=5).weights([1, 4, 5, 100]).tolist() == pytest.approx([0.2, 0.8, 1.0, 1.0])
    assert PLAN.weights([1, 4, 100]).tolist() == [1.0, 1.0, 1.0]
