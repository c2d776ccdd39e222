"""Training by Opacus 1.6 itself: its history as a statement, and its silent failures found out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from opacus import PrivacyEngine
from opacus.accountants import PRVAccountant
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertConfig, BertForSequenceClassification

from privfm.checks import InvalidArgument, PrivacyBroken
from privfm.defenses import DPPlan, LocalSampling
from privfm.plugins.guards import WeightWatch
from privfm.plugins.opacus import check_private_model, epsilon_record
from privfm.plugins.private_training import PrivateSteps

N, WIDTH, CLASSES = 40, 5, 3

pytestmark = [
    # Opacus says so of every engine without secure_mode; its way out needs a package that no longer installs.
    pytest.mark.filterwarnings("ignore:Secure RNG turned off:UserWarning"),
    # Its backward hooks sit on layers whose inputs, the data, need no gradient.
    pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning"),
]


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(WIDTH, 6), nn.Tanh(), nn.Linear(6, CLASSES))


@pytest.fixture
def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(3)
    return TensorDataset(torch.randn(N, WIDTH, generator=generator), torch.randint(CLASSES, (N,), generator=generator))


def made(model: nn.Module, data: TensorDataset, **options: Any) -> tuple[PrivacyEngine, Any, Any]:
    """Engine, optimizer and loader; the model is the user's own, with hooks, and noise has a generator of its own."""
    engine = PrivacyEngine()
    settings: dict[str, Any] = {"noise_multiplier": 1.1, "max_grad_norm": 0.5, "wrap_model": False} | options
    settings["noise_generator"] = torch.Generator().manual_seed(1)
    _, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.5),
        data_loader=DataLoader(data, batch_size=8),
        **settings,
    )
    return engine, optimizer, loader


def train(model: nn.Module, optimizer: Any, loader: Any) -> int:
    for x, y in loader:  # empty batches too
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        check_private_model(model, optimizer)
        optimizer.step()
    return len(loader)


def test_the_statement_is_of_the_steps_opacus_counted(data: TensorDataset) -> None:
    """Oracle: Opacus's own PRV accountant, whose upper bound lies about 0.01 above."""
    model = network()
    engine, optimizer, loader = made(model, data)
    assert loader.sample_rate == 0.2
    watch = WeightWatch(model)
    steps = sum(train(model, optimizer, loader) for _ in range(4))
    watch.check(noisy=True)
    record = epsilon_record(engine, optimizer, loader, delta=1e-3)
    accountant = PRVAccountant()
    accountant.history = [(1.1, 0.2, steps)]
    assert record.epsilon == pytest.approx(accountant.get_epsilon(1e-3), abs=0.03)
    assert f"count={steps}" in record.event and record.unit == "example" and record.adversary == "server"
    assert record.noise.startswith("simulated") and record.tuning == "excludes tuning"


def test_our_steps_and_opacus_take_the_same_one(data: TensorDataset) -> None:
    """Without noise, of one batch; Opacus's clip stops 1e-6 short of a gradient's length."""
    theirs, ours = network(), network()
    engine, optimizer, _ = made(theirs, data, noise_multiplier=0.0)
    assert engine is not None
    x, y = data[:9]
    cross_entropy(theirs(x), y).backward()
    optimizer.step()
    local = LocalSampling(batch_size=8, local_steps=1)
    plan = DPPlan(0.0, max_grad_norm=0.5, sample_rate=1.0, delta=1e-3, unit="example", place="local",
                  sampling="full", local=local)  # fmt: skip

    def losses(batch: tuple[Tensor, Tensor]) -> Tensor:
        return cross_entropy(ours(batch[0]), batch[1], reduction="none")

    steps = PrivateSteps(ours, torch.optim.SGD(ours.parameters(), lr=0.5), plan, N, losses, seed=0)
    gradient = steps.named(steps.noised(steps.clipped_sum((x, y)), torch.Generator()))
    start = network()
    for (name, moved), before in zip(theirs.named_parameters(), start.parameters(), strict=True):
        torch.testing.assert_close(before - 0.5 * gradient[name], moved.detach(), atol=1e-6, rtol=1e-5)
        assert not torch.equal(before, moved)


def test_a_schedule_of_noise_is_composed(data: TensorDataset) -> None:
    engine, optimizer, loader = made(network(), data)
    engine.accountant.history = [(1.1, 0.2, 30), (2.2, 0.2, 30)]
    both = epsilon_record(engine, optimizer, loader, 1e-3)
    parts = []
    for history in ([(1.1, 0.2, 30)], [(1.1, 0.2, 60)]):
        engine.accountant.history = history
        parts.append(epsilon_record(engine, optimizer, loader, 1e-3).epsilon)
    assert parts[0] < both.epsilon < parts[1] and both.accountant.startswith("RDP")
    engine.accountant.history = [(1.1, 0.2, 10), (1.1, 0.2, 20)]
    assert epsilon_record(engine, optimizer, loader, 1e-3).epsilon == parts[0]
    engine.accountant.history = []
    assert epsilon_record(engine, optimizer, loader, 1e-3).epsilon == 0.0


def test_lora_under_opacus_passes_and_is_trained() -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = BertForSequenceClassification(BertConfig(vocab_size=40, num_labels=CLASSES, **sizes))
        model = get_peft_model(base, LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS"))
    tokens = torch.randint(5, 40, (N, 6), generator=torch.Generator().manual_seed(1))
    _, optimizer, _ = made(model, TensorDataset(tokens))
    watch = WeightWatch(model)
    cross_entropy(model(input_ids=tokens[:7]).logits, torch.arange(7) % CLASSES).backward()
    check_private_model(model, optimizer)
    optimizer.step()
    watch.check(noisy=True)


def test_an_empty_batch_passes(data: TensorDataset) -> None:
    model = network()
    _, optimizer, _ = made(model, data)
    x, y = data[:0]
    cross_entropy(model(x), y).backward()
    check_private_model(model, optimizer)
    optimizer.step()
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_parameters_without_gradients_of_examples_are_found_out(data: TensorDataset) -> None:
    """As when hooks were set before adapters were: backward() fills `grad`, and nothing of single examples."""
    model = network()
    _, optimizer, _ = made(model, data)
    x, y = data[:9]
    with pytest.raises(PrivacyBroken, match=r"0\.weight, 0\.bias, 2\.weight and 1 other of 4 trained .* no gradient"):
        check_private_model(model, optimizer)
    cross_entropy(model(x), y).backward()
    check_private_model(model, optimizer)
    model[2].bias.grad_sample = None  # type: ignore[assignment]
    with pytest.raises(PrivacyBroken, match=r"2\.bias of 4 trained parameters"):
        check_private_model(model, optimizer)
    model[2].bias.grad_sample = torch.zeros(3, CLASSES)  # type: ignore[assignment]
    with pytest.raises(PrivacyBroken, match="different numbers of examples"):
        check_private_model(model, optimizer)
    model[0] = nn.Linear(WIDTH, 6)
    with pytest.raises(InvalidArgument, match="the optimizer does not hold"):
        check_private_model(model, optimizer)


def test_claims_that_are_none_are_refused(data: TensorDataset) -> None:
    engine, optimizer, loader = made(network(), data)
    with pytest.raises(InvalidArgument, match="without Poisson sampling"):
        epsilon_record(engine, optimizer, DataLoader(data, batch_size=8), 1e-3)
    with pytest.raises(InvalidArgument, match=r"delta=0.5 >= 1/n = 0.025"):
        epsilon_record(engine, optimizer, loader, 0.5)
    with pytest.raises(InvalidArgument, match="does not count this optimizer's steps"):
        epsilon_record(PrivacyEngine(), optimizer, loader, 1e-3)  # whose history is empty: epsilon 0
    hook = optimizer.step_hook
    optimizer.attach_step_hook(None)
    with pytest.raises(InvalidArgument, match="does not count this optimizer's steps"):
        epsilon_record(engine, optimizer, loader, 1e-3)
    optimizer.attach_step_hook(hook)
    engine.accountant.history = [(1.1, 0.4, 3)]
    with pytest.raises(InvalidArgument, match=r"counted sample_rate=0\.4, the loader draws at 0\.2"):
        epsilon_record(engine, optimizer, loader, 1e-3)
    adaptive = made(
        network(), data, clipping="adaptive", target_unclipped_quantile=0.5, clipbound_learning_rate=0.2,
        max_clipbound=10.0, min_clipbound=0.1, unclipped_num_std=1.0,
    )  # fmt: skip
    with pytest.raises(InvalidArgument, match="AdaClipDPOptimizer"):
        epsilon_record(adaptive[0], adaptive[1], adaptive[2], 1e-3)
