"""The planted neuron fires for its target alone: in one step, several, sums, in several models."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import cache
from math import isnan
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Generator, Tensor, nn

from privfm.attacks.membership.planting import MembershipTrap, Planted, cross_entropy
from privfm.checks import InvalidArgument
from privfm.contracts import Declared, Examples, LocalSteps, Observation, gradients_of

WIDTH, BATCH = 64, 8


def data(count: int, seed: int) -> Examples:
    """Correlated features, as data have them."""
    mixing = torch.randn(WIDTH, WIDTH, generator=Generator().manual_seed(99)) / 8
    generator = Generator().manual_seed(seed)
    inputs = torch.randn(count, WIDTH, generator=generator) @ mixing
    return Examples({"input": inputs}, torch.randint(4, (count,), generator=generator))


def joined(*parts: Examples) -> Examples:
    inputs = {name: torch.cat([one.inputs[name] for one in parts]) for name in parts[0].inputs}
    return Examples(inputs, torch.cat([one.labels for one in parts]))


def network(activation: type[nn.Module] = nn.ReLU) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(WIDTH, 24), activation(), nn.Linear(24, 4))


TARGET, PUBLIC = data(1, seed=1), data(600, seed=2)


@cache
def planted(activation: type[nn.Module] = nn.ReLU, reads: str = "2") -> Planted:
    return MembershipTrap("0", reads, height=100.0 if activation is nn.Tanh else 12.0).prepare(
        network(activation), TARGET, PUBLIC, Generator().manual_seed(3)
    )


def one_step(model: nn.Module, examples: Examples, clients: int = 1) -> Observation:
    sent = gradients_of(model, cross_entropy(model, examples).mean())
    return Observation(model, sent, declared=Declared(examples=len(examples)), clients=clients)


def several_steps(model: nn.Module, examples: Examples, change: LocalSteps) -> Observation:
    local = deepcopy(model)
    for _ in range(change.steps):
        found = torch.autograd.grad(cross_entropy(local, examples).mean(), list(local.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(local.parameters(), found, strict=True):
                parameter -= change.learning_rate * gradient
    after = dict(local.named_parameters())
    sent = {name: after[name].detach() - one.detach() for name, one in model.named_parameters()}
    return Observation(model, sent, change, Declared(examples=len(examples)))


# --------------------------------------------------------------------------------------------------------- detection


@pytest.mark.parametrize(
    ("activation", "reads"), [(nn.ReLU, "2"), (nn.GELU, "2"), (nn.Tanh, "2"), (nn.ReLU, "")], ids=str
)
def test_one_step_is_exact(activation: type[nn.Module], reads: str) -> None:
    trap = planted(activation, reads)
    assert trap.rest == {nn.Tanh: -1.0}.get(activation, 0.0)
    for seed in range(10, 20):
        others = data(BATCH - 1, seed)
        inside = trap.read(one_step(trap.model, joined(others, TARGET)))
        assert inside.share == pytest.approx(1 / BATCH, rel=1e-3)
        assert inside.misfit < 1e-3
        assert inside.p_value == pytest.approx(trap.false_rate(BATCH))
        outside = trap.read(one_step(trap.model, joined(others, data(1, seed + 100))))
        assert outside.share == 0.0 and isnan(outside.misfit) and outside.p_value == 1.0


def test_it_is_the_trap_that_tells_and_not_the_example() -> None:
    trap, bare = planted(), network()
    others = data(BATCH - 1, seed=30)
    told = [trap.read(one_step(bare, joined(others, one))).share for one in (TARGET, data(1, seed=31))]
    # In the model as it was every example reaches the place that is read, and the target stands out in nothing.
    assert 1e-4 < min(map(abs, told)) <= max(map(abs, told)) < 0.05 / BATCH


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
def test_several_steps_are_near_with_the_target_and_nothing_without(activation: type[nn.Module]) -> None:
    trap, change = planted(activation), LocalSteps(0.05, steps=10)
    for seed in range(40, 45):
        others = data(BATCH - 1, seed)
        inside = trap.read(several_steps(trap.model, joined(others, TARGET), change))
        assert 0.2 / BATCH < inside.share < 1.2 / BATCH
        assert inside.misfit < 0.3
        outside = trap.read(several_steps(trap.model, joined(others, data(1, seed + 100)), change))
        assert abs(outside.share) < 1e-3 * inside.share


def test_a_sum_of_clients_tells_that_somebody_has_it_and_not_who() -> None:
    trap, clients = planted(), 6
    shares = []
    for holder in (0, 3, 5, None):
        parts = [data(BATCH - 1, seed=50 + client) for client in range(clients)]
        parts = [joined(one, TARGET if place == holder else data(1, 70 + place)) for place, one in enumerate(parts)]
        seen = [one_step(trap.model, part).gradients for part in parts]
        mean = {name: torch.stack([one[name] for one in seen]).mean(0) for name in seen[0]}
        observed = Observation(trap.model, mean, declared=Declared(examples=clients * BATCH), clients=clients)
        shares.append(trap.read(observed).share)
    assert shares[:3] == pytest.approx([1 / (clients * BATCH)] * 3, rel=1e-3)
    assert shares[3] == 0.0


def test_declared_noise_enters_the_p_value() -> None:
    trap, change = planted(), LocalSteps(0.5, steps=2)
    sigma = 0.02
    generator = Generator().manual_seed(4)
    others = data(BATCH - 1, seed=60)
    still = one_step(trap.model, joined(others, data(1, seed=61)))
    tails = []
    for _ in range(300):
        noisy = {
            name: (one + sigma * torch.randn(one.shape, generator=generator)) * -0.5 * change.weight
            for name, one in still.tensors.items()
        }
        declared = Declared(examples=BATCH, noise=sigma * 0.5 * change.weight)
        found = trap.read(Observation(trap.model, noisy, change, declared))
        assert found.p_value is not None
        if found.share > 0:  # else the p-value is 1
            tails.append(found.p_value - trap.false_rate(BATCH))
    kept = np.array(tails)[np.array(tails) < 0.5 - trap.false_rate(BATCH)]
    assert len(tails) == pytest.approx(150, abs=35)
    assert stats.kstest(kept, "uniform", args=(0, 0.5)).pvalue > 0.001
    assert stats.kstest(kept / 2, "uniform", args=(0, 0.5)).pvalue < 1e-6  # as with noise declared too small
    silent = trap.read(Observation(trap.model, noisy, change, Declared(examples=BATCH)))
    assert (silent.p_value or 0) in (1.0, trap.false_rate(BATCH))  # not declared: noise passes for the target


def test_the_rate_is_the_clopper_pearson_limit_and_holds() -> None:
    trap = planted()
    assert trap.excited == 0 and trap.held_out == 300
    assert trap.rate == pytest.approx(1 - 0.05 ** (1 / 300))  # closed form of zero in 300
    assert trap.false_rate(20) == pytest.approx(1 - 0.05 ** (20 / 300))
    assert trap.false_rate(0) == 0.0
    # On 2,000 fresh examples it fires no more often than that; a trap cut too low is measured as such.
    fresh = data(2000, seed=80).inputs["input"]
    layer: Any = trap.model[0]  # type: ignore[index]
    given = layer(fresh)[:, 0].detach()
    assert float((given > 0).double().mean()) <= trap.rate
    few = MembershipTrap("0", "2", shrinkage=1.0).prepare(
        network(), TARGET, PUBLIC.take(torch.arange(80)), Generator().manual_seed(0)
    )
    loose: Any = few.model[0]  # type: ignore[index]
    assert float((loose(fresh)[:, 0] > 0).double().mean()) <= few.rate
    assert few.rate > 3 * trap.rate


def test_the_model_loses_one_neuron_and_nothing_else(untouched_random_state: None) -> None:
    bare = network()
    before = deepcopy(bare.state_dict())
    trap = MembershipTrap("0", "2", row=5).prepare(bare, TARGET, PUBLIC, Generator().manual_seed(0))
    assert all(torch.equal(before[name], one) for name, one in bare.state_dict().items())
    with torch.no_grad():
        bare[2].weight[:, 5] = 0.0  # type: ignore[index, union-attr]
        torch.testing.assert_close(trap.model(**PUBLIC.inputs), bare(**PUBLIC.inputs))


def test_several_targets_take_a_row_each() -> None:
    second = data(1, seed=5)
    first = planted()
    both = MembershipTrap("0", "2", row=1).prepare(first.model, second, PUBLIC, Generator().manual_seed(6))
    told = one_step(both.model, joined(data(BATCH - 1, seed=62), second))
    assert both.read(told).share == pytest.approx(1 / BATCH, rel=1e-3)
    assert first.read(told).share == 0.0


# ----------------------------------------------------------------------------------------------- encoders and adapters


def texts(count: int, seed: int) -> Examples:
    generator = Generator().manual_seed(seed)
    tokens = torch.randint(5, 200, (count, 10), generator=generator)
    return Examples(
        {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)},
        torch.randint(3, (count,), generator=generator),
    )


@cache
def encoder() -> nn.Module:
    """A small BERT with adapters on the second map of its feed-forward blocks, and a head trained whole."""
    from peft import LoraConfig, get_peft_model
    from transformers import BertConfig, BertForSequenceClassification

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=200,
            hidden_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=96,
            max_position_embeddings=16,
            num_labels=3,
            initializer_range=0.2,
        )
        wanted = LoraConfig(
            r=4, target_modules=[r"output.dense"], modules_to_save=["classifier"], task_type="SEQ_CLS", lora_dropout=0.0
        )
        model: nn.Module = get_peft_model(BertForSequenceClassification(config), wanted)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)  # a later round
    return model.eval()


ENCODED = "base_model.model."
PLACES = {
    "pooler into the head": (f"{ENCODED}bert.pooler.dense", f"{ENCODED}classifier.modules_to_save.default"),
    "feed-forward into A": (
        f"{ENCODED}bert.encoder.layer.0.intermediate.dense",
        f"{ENCODED}bert.encoder.layer.0.output.dense.lora_A.default",
    ),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_frozen_encoder_with_adapters_has_two_places(place: str) -> None:
    target, public = texts(1, seed=1), texts(240, seed=2)
    trap = MembershipTrap(*PLACES[place]).prepare(encoder(), target, public, Generator().manual_seed(3))
    assert trap.excited <= 2  # of 120; which is what the rate is for
    shares = []
    for seed in range(10, 16):
        others = texts(BATCH - 1, seed)
        inside = trap.read(one_step(trap.model, joined(others, target)))
        shares.append(trap.read(one_step(trap.model, joined(others, texts(1, seed + 100)))).share)
        assert inside.share == pytest.approx(1 / BATCH, rel=0.01)
    assert np.abs(shares).max() < 1e-3 / BATCH


def test_an_adapter_whose_b_is_zero_gives_nothing_to_read() -> None:
    model = deepcopy(encoder())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    with pytest.raises(InvalidArgument, match="B before the first round"):
        MembershipTrap(*PLACES["feed-forward into A"]).prepare(model, texts(1, 1), texts(40, 2), Generator())


# --------------------------------------------------------------------------------------------------------- bad input


def prepared(trap: MembershipTrap, model: nn.Module | None = None, target: Examples = TARGET) -> Planted:
    return trap.prepare(model or network(), target, PUBLIC.take(torch.arange(40)), Generator().manual_seed(0))


def frozen_head() -> nn.Module:
    model = network()
    model[2].requires_grad_(False)  # type: ignore[index, operator]
    return model


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: MembershipTrap("0", row=-1), "row=-1"),
        (lambda: MembershipTrap("0", height=0.0), "height"),
        (lambda: MembershipTrap("0", shrinkage=0.0), "shrinkage"),
        (lambda: prepared(MembershipTrap("1")), "layer='1' is no linear layer"),
        (lambda: prepared(MembershipTrap("0", "3")), "reads='3' is no linear layer"),
        (lambda: prepared(MembershipTrap("0", "0")), "expected the next linear layer"),
        (lambda: prepared(MembershipTrap("0", "2", row=24)), "24 outputs"),
        (lambda: prepared(MembershipTrap("0"), nn.Sequential(nn.Linear(64, 4, bias=False))), "has no bias"),
        (lambda: prepared(MembershipTrap("0", "2"), network(nn.Identity)), "nothing gates"),
        (lambda: prepared(MembershipTrap("0", height=100.0), network(nn.Tanh)), "saturates"),
        (lambda: prepared(MembershipTrap("0", "2"), frozen_head()), "frozen"),
        (lambda: prepared(MembershipTrap("0", "2"), target=data(2, 0)), "2 targets"),
        (lambda: prepared(MembershipTrap("0", "2"), target=PUBLIC.take(torch.tensor([int(MEAN)]))), "not apart"),
        (lambda: MembershipTrap("0").prepare(network(), TARGET, data(3, 0), Generator()), "3 public examples"),
        (lambda: planted().read(hidden(torch.nan)), "hidden in part"),
        (lambda: planted().read(hidden(None)), "no gradient of 2.weight"),
        (lambda: planted().read(adam()), "adam"),
    ],
    ids=range(17),
)
def test_what_does_not_fit_is_refused(call: Callable[[], object], says: str) -> None:
    with pytest.raises(InvalidArgument, match=says):
        call()


MEAN = PUBLIC.inputs["input"][:40].norm(dim=1).argmin()
"""The most ordinary of the public examples: inside the cloud it was told apart from."""


def hidden(value: float | None) -> Observation:
    seen = dict(one_step(planted().model, PUBLIC.take(torch.arange(4))).tensors)
    if value is None:
        del seen["2.weight"]
    else:
        seen["2.weight"] = torch.full_like(seen["2.weight"], value)
    return Observation(planted().model, seen)


def adam() -> Observation:
    seen = one_step(planted().model, PUBLIC.take(torch.arange(4))).tensors
    return Observation(planted().model, seen, LocalSteps(0.1, optimizer="adam"))


def test_without_the_number_of_examples_there_is_no_p_value() -> None:
    told = one_step(planted().model, joined(data(3, seed=63), TARGET))
    found = planted().read(Observation(told.model, told.tensors))
    assert found.p_value is None
    assert found.share == pytest.approx(1 / 4, rel=1e-3)


def test_a_public_example_that_is_the_target_is_counted_as_excited() -> None:
    public = joined(PUBLIC, TARGET)
    counts = {
        MembershipTrap("0", "2").prepare(network(), TARGET, public, Generator().manual_seed(s)).excited
        for s in held_out_seeds(len(public))
    }
    assert counts == {1}


def held_out_seeds(count: int) -> list[int]:
    """Seeds under which the last example is in the half that is held out."""
    orders: list[Tensor] = [torch.randperm(count, generator=Generator().manual_seed(seed)) for seed in range(8)]
    return [seed for seed, order in enumerate(orders) if count - 1 in order[count // 2 :].tolist()]
