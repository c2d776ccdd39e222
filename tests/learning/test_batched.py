"""Clients trained together get what they get alone, by code that shares nothing with the engine but the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final

import pytest
import torch
from torch import Generator, Tensor, nn

from privfm.checks import PrivacyBroken
from privfm.contracts import BuiltModel, Examples, GradientPrivacy, LocalTraining, Table, Task
from privfm.learning import (
    SGD,
    AdamW,
    CausalLM,
    ImageClassification,
    ModelLearner,
    OneStep,
    OwnTraining,
    Schedule,
    SequenceClassification,
    Workbench,
)
from privfm.learning.batched import prepared
from privfm.learning.models import MeanPooledClassifier
from privfm.learning.trunk import block_stack
from privfm.randomness import Seeds

VOCABULARY, LONGEST = 50, 24
SIZES = (5, 1, 9, 3, 12)
"""Examples of each client: with batches of 4 they take 2, 1, 3, 1 and 3 steps, the last ones short."""
Kind = Literal["pooled", "mean", "gpt2", "llama", "vit"]
TEXT: tuple[Kind, ...] = ("pooled", "mean", "gpt2", "llama")

TOYS: dict[str, Any] = {}


@pytest.fixture(autouse=True)
def _toys(toys: Mapping[str, Any]) -> None:
    """The folder's texts, their tokenizer and how examples go to clients, for the functions of this file."""
    TOYS.update(toys)


def base(kind: Kind) -> tuple[nn.Module, Task, list[str]]:
    """A tiny model with random weights, its task, and which of its layers get adapters."""
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        BertModel,
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
        ViTConfig,
        ViTForImageClassification,
    )

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4}
    if kind in ("pooled", "mean"):
        config = BertConfig(vocab_size=VOCABULARY, intermediate_size=32, max_position_embeddings=32, num_labels=3,
                            initializer_range=0.2, **sizes)  # fmt: skip
        whole = (
            BertForSequenceClassification(config) if kind == "pooled" else MeanPooledClassifier(BertModel(config), 3)
        )
        return whole, SequenceClassification(), ["query", "value"]
    if kind == "gpt2":
        small = GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=3, n_head=4, n_positions=32, use_cache=False,
                           initializer_range=0.2)  # fmt: skip
        return GPT2LMHeadModel(small), CausalLM(), ["c_attn", "c_fc"]
    if kind == "llama":
        llama = LlamaConfig(vocab_size=VOCABULARY, intermediate_size=24, num_key_value_heads=2, use_cache=False,
                            initializer_range=0.2, **sizes)  # fmt: skip
        return LlamaForCausalLM(llama), CausalLM(), ["q_proj", "v_proj", "down_proj"]
    vit = ViTConfig(image_size=8, patch_size=4, num_channels=1, intermediate_size=32, num_labels=3, **sizes)
    return ViTForImageClassification(vit), ImageClassification(), ["q_proj", "v_proj"]


def bench(kind: Kind, *, dtype: torch.dtype = torch.float32, change: Any = None, **options: Any) -> Workbench:
    """A workbench around a tiny model with LoRA (`options` of its configuration) on random data."""
    from peft import LoraConfig, get_peft_model

    module, task, targets = base(kind)
    heads = [name for name in ("classifier",) if hasattr(module, name)]
    given = {"r": 2, "lora_alpha": 4, "target_modules": targets, "modules_to_save": heads or None,
             "fan_in_fan_out": kind == "gpt2", **options}  # fmt: skip
    model: Any = get_peft_model(module, LoraConfig(**given))  # type: ignore[arg-type]  # any transformers model
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)  # at B = 0 the gradient of A would be zero
    if change is not None:
        change(model)
    return bench_of(model.to(dtype).eval(), task)


def bench_of(model: nn.Module, task: Task) -> Workbench:
    generator = Generator().manual_seed(1)
    n = sum(SIZES)
    inputs: Sequence[str] | Tensor = TOYS["texts"](n, LONGEST, generator, VOCABULARY)
    labels = torch.randint(0, 3, (n,), generator=generator)
    tokenize = TOYS["encoded"]
    if isinstance(task, ImageClassification):
        inputs, tokenize = torch.randn(n, 1, 8, 8, generator=generator), None
    built = BuiltModel(model, tokenize, block_stack(model), lambda folder: None)
    return Workbench(built, task, Table(inputs, labels, ("a", "b", "c")))


def clients(own: Workbench) -> list[Examples]:
    found: list[Examples] = TOYS["clients"](own, SIZES)
    return found


def learner(own: Workbench, training: LocalTraining, engine: Any = "batched", **options: Any) -> ModelLearner:
    return ModelLearner(own, {"test": torch.arange(4)}, training, engine=engine, **options)


def trained(own: ModelLearner, chosen: Sequence[int] = range(len(SIZES)), **options: Any) -> Tensor:
    every = clients(own.bench)
    result = own.train(
        own.initial(), [every[i] for i in chosen], Seeds(0).clients("data order", 0, list(chosen)), **options
    )
    assert not result.failed, result.failed
    return result.rows


def both(own: Workbench, training: LocalTraining, **options: Any) -> tuple[Tensor, Tensor]:
    """Updates of all clients, together and one by one."""
    together, alone = learner(own, training), learner(own, training, "sequential")
    assert together.engine_note == "batched", together.engine_note
    return only_together(together, **options), trained(alone, **options)


def only_together(own: ModelLearner, **options: Any) -> Tensor:
    """Updates of the engine; not those of the loop that would step in for it."""
    engine = own._batched
    assert engine is not None and not isinstance(own.training, OneStep | OwnTraining)
    every = clients(own.bench)
    generators = Seeds(0).clients("data order", 0, list(range(len(SIZES))))
    return engine.train(own.bench.initial, every, generators, own.training, **options)  # type: ignore[arg-type]


STEPS = Schedule(batch_size=4)
TRAININGS = [SGD(0.3, STEPS), SGD(0.1, STEPS, momentum=0.9), AdamW(0.01, STEPS, weight_decay=0.1)]


@pytest.mark.parametrize("kind", TEXT)
@pytest.mark.parametrize("training", TRAININGS, ids=["sgd", "momentum", "adamw"])
def test_together_is_as_alone(kind: Kind, training: LocalTraining) -> None:
    # In float64: AdamW's first step is the sign of a gradient, and where that is near 1e-8 float32 decides by rounding.
    together, alone = both(bench(kind, dtype=torch.float64), training)
    assert alone.norm(dim=1).min() > 1e-3
    assert torch.allclose(together, alone, atol=3e-7, rtol=1e-5)


@pytest.mark.parametrize("kind", [*TEXT, "vit"])
def test_together_is_as_alone_in_single_precision(kind: Kind) -> None:
    together, alone = both(bench(kind), SGD(0.3, STEPS))
    assert torch.allclose(together, alone, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 40, 130])
def test_a_batch_may_straddle_passes(tokens: int) -> None:
    own = bench("llama")
    small, whole = learner(own, SGD(0.3, STEPS), tokens=tokens), learner(own, SGD(0.3, STEPS))
    assert torch.allclose(only_together(small), only_together(whole), atol=1e-6)


def test_alone_it_is_the_same_to_the_last_bit() -> None:
    own = learner(bench("mean"), AdamW(0.01, STEPS))
    alone = torch.cat([trained(own, [i]) for i in range(len(SIZES))])
    assert torch.equal(alone, torch.cat([trained(own, [i]) for i in range(len(SIZES))]))
    assert torch.equal(trained(own), trained(own))
    assert torch.allclose(trained(own), alone, atol=1e-5)


@pytest.mark.parametrize("kind", ["pooled", "mean", "llama", "vit"])
@pytest.mark.parametrize("layers", [[2], [1, 2]], ids=["last", "two"])
def test_known_activations(kind: Kind, layers: list[int]) -> None:
    own = bench(kind, layers_to_transform=layers)
    assert own.trunk is not None and own.first == layers[0]
    together, alone = both(own, SGD(0.3, STEPS))
    assert torch.allclose(together, alone, atol=1e-5)
    every = [examples.with_inputs(examples.inputs) for examples in clients(own)]  # of no known row
    engine = learner(own, SGD(0.3, STEPS))._batched
    assert engine is not None
    generators = Seeds(0).clients("data order", 0, list(range(len(SIZES))))
    assert torch.allclose(engine.train(own.initial, every, generators, SGD(0.3, STEPS)), alone, atol=1e-5)


@pytest.mark.parametrize(("kind", "expected"), [("pooled", True), ("vit", True), ("mean", False), ("gpt2", False)])
def test_the_last_block_of_what_reads_first_tokens_computes_nothing_else(kind: Kind, expected: bool) -> None:
    own = bench(kind)
    engine = prepared(own)
    seen: list[tuple[int, ...]] = []
    norms = [part for part in own.built.layers[-1].modules() if isinstance(part, nn.LayerNorm)]
    hook = norms[-1].register_forward_hook(lambda _, given, result: seen.append(tuple(result.shape)))
    examples = clients(own)[2]
    engine.gradients(own.initial[None], [examples])
    hook.remove()
    mask = examples.inputs.get("attention_mask")
    tokens = int(mask.sum()) if mask is not None else own.width * len(examples)
    assert seen == [(1, len(examples) if expected else tokens, 16)]


@pytest.mark.parametrize("frozen", ["lora_A", "lora_"], ids=["A", "adapters"])
@pytest.mark.parametrize("kind", ["pooled", "mean"])
def test_where_less_is_trained(kind: Kind, frozen: str) -> None:
    def freeze(model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and frozen not in name)

    own = bench(kind, change=freeze)
    assert not any(frozen in name for name in own.layout.names)
    together, alone = both(own, SGD(0.3, STEPS))
    assert torch.allclose(together, alone, atol=1e-5)


def columns(own: Workbench, inactive: str) -> Tensor:
    """Which columns belong to tensors of other names, `(d,)`."""
    layout = own.layout
    named = zip(layout.names, layout.sizes, strict=True)
    return torch.cat([torch.full((size,), inactive not in name) for name, size in named])


@pytest.mark.parametrize("whole", [True, False], ids=["tensors", "columns"])
def test_what_is_not_active_stays(whole: bool) -> None:
    own = bench("mean")
    active = torch.rand(own.layout.d, generator=Generator().manual_seed(0)) < 0.5
    if whole:  # RoLoRA: one factor and the head
        parts = [
            torch.full((n,), "lora_A" not in name) for name, n in zip(own.layout.names, own.layout.sizes, strict=True)
        ]
        active = torch.cat(parts)
    together, alone = both(own, AdamW(0.01, STEPS, weight_decay=0.5), active=active)
    assert bool((together[:, ~active] == 0).all()) and bool((alone[:, ~active] == 0).all())
    assert together[:, active].norm() > 0.01
    assert torch.allclose(together, alone, atol=1e-3)
    assert not torch.allclose(
        together[:, active], trained(learner(own, AdamW(0.01, STEPS, weight_decay=0.5)))[:, active]
    )


def test_what_is_not_active_stays_under_other_trainings() -> None:
    def mine(model: nn.Module, data: Examples) -> nn.Module:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
        model(**data.inputs).square().sum().backward()
        optimizer.step()
        return model

    own = bench("mean")
    active = torch.cat(
        [torch.full((n,), "lora" not in name) for name, n in zip(own.layout.names, own.layout.sizes, strict=True)]
    )
    for training in (OneStep(0.1), OwnTraining(mine)):
        rows = trained(learner(own, training, "sequential"), active=active)
        assert bool((rows[:, ~active] == 0).all()) and rows.norm() > 0
    active[0] = not active[0]
    with pytest.raises(ValueError, match="trained in part"):
        trained(learner(own, OwnTraining(mine), "sequential"), active=active)


# Privacy


@final
@dataclass(frozen=True)
class Plan(GradientPrivacy):
    """DP-SGD as Abadi et al. write it ("Deep learning with differential privacy", 2016, algorithm 1)."""

    clip_norm: float
    noise_multiplier: float
    rate: float = 0.3
    steps: int = 4

    def batches(self, examples: int, generator: Generator) -> Iterator[Tensor]:
        for _ in range(self.steps):
            yield (torch.rand(examples, generator=generator) < self.rate).nonzero().squeeze(1)

    def clip(self, gradients: Tensor) -> Tensor:
        factors = (self.clip_norm / gradients.norm(dim=1, keepdim=True)).clamp(max=1)
        return torch.where(gradients.isfinite().all(1, keepdim=True), gradients * factors, 0.0)

    def noised(self, sums: Tensor, examples: Sequence[int], generators: Sequence[Generator]) -> Tensor:
        draws = torch.stack([torch.randn(sums.shape[1], generator=own) for own in generators])
        return (sums + self.noise_multiplier * self.clip_norm * draws) / (self.rate * torch.tensor(examples)[:, None])


def naive(own: Workbench, plan: Plan, rate: float) -> Tensor:
    """Private SGD of all clients: one backward pass an example, one client after the other."""
    rows = []
    for place, examples in enumerate(clients(own)):
        generator = Seeds(0).generator("data order", 0, place)
        torch.randint(2**62, (), generator=generator)
        batches = list(plan.batches(len(examples), generator))
        weights = own.initial.clone()
        for batch in batches:
            total = torch.zeros_like(weights)
            for example in batch:
                own.load(weights)
                found = torch.autograd.grad(
                    own.losses(examples.take(example[None])).sum(), list(own.parameters.values())
                )
                gradient = own.layout.flatten(dict(zip(own.parameters, found, strict=True)))
                total += gradient * min(1.0, plan.clip_norm / float(gradient.norm()))
            total += plan.noise_multiplier * plan.clip_norm * torch.randn(len(total), generator=generator)
            weights -= rate * total / (plan.rate * len(examples))
        rows.append(weights - own.initial)
    return torch.stack(rows)


@pytest.mark.parametrize("kind", ["pooled", "gpt2", "llama"])
@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_private_steps_are_those_of_a_naive_loop(kind: Kind, noise: float) -> None:
    own, plan = bench(kind), Plan(0.5, noise)
    expected = naive(own, plan, 0.2)
    together, alone = both(own, SGD(0.2), privacy=plan)
    assert torch.allclose(together, expected, atol=2e-6)
    assert torch.allclose(alone, expected, atol=2e-6)
    small = learner(own, SGD(0.2), tokens=30)
    assert torch.allclose(only_together(small, privacy=plan), expected, atol=2e-6)


def test_wrong_private_steps_are_told_apart() -> None:
    own = bench("pooled")
    expected = naive(own, Plan(0.5, 1.0), 0.2)
    for wrong in (Plan(0.5, 0.5), Plan(0.5, 2.0), Plan(1e3, 1.0)):
        assert not torch.allclose(only_together(learner(own, SGD(0.2)), privacy=wrong), expected, atol=1e-3)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")  # torch, to Opacus
@pytest.mark.parametrize("kind", ["pooled", "mean", "llama"])
def test_clipped_sums_are_those_of_opacus(kind: Kind) -> None:
    from opacus.grad_sample import GradSampleModule

    own = bench(kind)
    examples = clients(own)[4]
    ours = prepared(own).gradients(own.initial[None], [examples])
    own.load(own.initial)
    hooked = GradSampleModule(own.module.train(), loss_reduction="sum")  # its hooks sleep in evaluation mode
    for part in own.module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    own.losses(examples).sum().backward()  # type: ignore[no-untyped-call]  # torch's own
    parts = {name: parameter.grad_sample for name, parameter in own.parameters.items()}  # type: ignore[attr-defined]
    theirs = torch.cat([parts[name].flatten(1) for name in own.layout.names], 1)
    hooked.remove_hooks()
    bound = float(theirs.norm(dim=1).median())
    plan = Plan(bound, 0.0)
    assert 0 < int((theirs.norm(dim=1) > bound).sum()) < len(examples)
    assert torch.allclose(plan.clip(ours).sum(0), plan.clip(theirs).sum(0), atol=1e-6 * bound * len(examples))


def test_empty_batches_are_noise_alone() -> None:
    own = bench("mean")
    plan = Plan(0.5, 1.0, rate=1e-9)
    together, alone = both(own, SGD(0.2), privacy=plan)
    assert torch.equal(together, alone)
    noise = 0.5 * 2 * 0.2 / (1e-9 * SIZES[0])  # clip, root of four steps, rate, expected batch
    assert float(together[0].std()) == pytest.approx(noise, rel=0.2)


def test_steps_that_move_nothing_are_refused() -> None:
    @final
    @dataclass(frozen=True)
    class Still(GradientPrivacy):
        inner: Plan

        def batches(self, examples: int, generator: Generator) -> Iterator[Tensor]:
            return self.inner.batches(examples, generator)

        def clip(self, gradients: Tensor) -> Tensor:
            return self.inner.clip(gradients)

        def noised(self, sums: Tensor, examples: Sequence[int], generators: Sequence[Generator]) -> Tensor:
            return torch.zeros_like(sums)

    own = bench("mean")
    for engine in ("batched", "sequential"):
        able = learner(own, SGD(0.2), engine)
        generators = Seeds(0).clients("data order", 0, [2])
        with pytest.raises(PrivacyBroken, match="moved no weight"):  # no client's data: no run goes on like that
            able.train(able.initial(), [clients(own)[2]], generators, Still(Plan(0.5, 1.0)))


def test_what_shows_no_steps_has_no_private_gradients() -> None:
    own = learner(bench("mean"), OneStep(0.1), "batched")
    assert "does not take its steps" in own.engine_note
    assert "OneStep" in own.refuses_private_gradients()
    with pytest.raises(ValueError, match="no private gradients: OneStep"):
        trained(own, privacy=Plan(0.5, 1.0))
    assert learner(bench("mean"), SGD(0.1)).refuses_private_gradients() == ""


# One client's loss is not the others'


def test_a_client_of_nans_leaves_the_others_finite() -> None:
    own = bench("pooled")
    engine = prepared(own)
    every = clients(own)
    weights = own.initial.repeat(len(every), 1)
    expected = engine.gradients(weights, every)
    weights[2] = torch.nan
    found = engine.gradients(weights, every)
    of = torch.repeat_interleave(torch.tensor(SIZES))
    assert torch.equal(found[of != 2], expected[of != 2])
    assert not bool(found[of == 2].isfinite().all())


def test_a_client_whose_training_raises_is_lost_alone() -> None:
    own = learner(bench("mean"), SGD(0.3, STEPS))
    every = clients(own.bench)
    expected = trained(learner(own.bench, SGD(0.3, STEPS), "sequential"))
    every[1] = every[1].with_labels(torch.full((SIZES[1],), 7))  # there are three classes
    generators = Seeds(0).clients("data order", 0, list(range(len(SIZES))))
    result = own.train(own.initial(), every, generators)
    assert list(result.failed) == [1]
    assert own.engine_note == "batched, but sequential after a IndexError in a batch of clients"
    others = torch.tensor([0, 2, 3, 4])
    assert torch.equal(result.rows[others], expected[others])


def test_the_model_comes_back_as_it_was() -> None:
    own = bench("pooled", layers_to_transform=[2])
    before = {name: value.clone() for name, value in own.module.state_dict().items()}
    code = {name: part.__dict__.get("forward") for name, part in own.module.named_modules()}
    state = torch.get_rng_state()
    trained(learner(own, SGD(0.3, STEPS)))
    assert torch.equal(state, torch.get_rng_state())
    assert code == {name: part.__dict__.get("forward") for name, part in own.module.named_modules()}
    assert own.module.config._attn_implementation == "sdpa"  # type: ignore[union-attr]  # a transformers model's
    assert all(torch.equal(value, before[name]) for name, value in own.module.state_dict().items())


def test_peft_saves_and_loads_what_was_trained(tmp_path: Path) -> None:
    from peft import PeftModel

    own = bench("pooled")
    row = trained(learner(own, SGD(0.3, STEPS)))[2]
    module: Any = own.load(own.initial + row)
    module.save_pretrained(tmp_path)
    inputs = TOYS["encoded"](["1 2 3", "4 5 6 7"])
    with torch.no_grad():
        expected = module(**inputs).logits
        loaded: Any = PeftModel.from_pretrained(base("pooled")[0].eval(), str(tmp_path))  # type: ignore[arg-type]
        assert torch.equal(loaded.eval()(**inputs).logits, expected)
        assert not torch.allclose(own.load(own.initial)(**inputs).logits, expected, atol=1e-3)


def test_columns_of_layers() -> None:
    own = learner(bench("mean"), SGD(0.3))
    spans = own.layers
    assert spans[0][0] == 0 and spans[-1][1] == own.d
    assert tuple(high - low for low, high in spans) == own.bench.layout.sizes


def test_a_half_precision_backbone_is_near() -> None:
    own = bench("mean")
    exact = trained(learner(own, SGD(0.3, STEPS)))
    near = only_together(learner(own, SGD(0.3, STEPS), autocast=torch.bfloat16))
    alone = trained(learner(own, SGD(0.3, STEPS), "sequential", autocast=torch.bfloat16))
    for found in (near, alone):
        assert 1e-5 < float((found - exact).norm() / exact.norm()) < 0.1


def test_dropout_does_not_depend_on_the_company() -> None:
    own = bench("mean", lora_dropout=0.2)
    own.module.get_submodule("base_model.model.encoder").config.attention_probs_dropout_prob = 0.0  # type: ignore[union-attr]
    every, seeds = clients(own), Seeds(0).clients
    ids = list(range(len(SIZES)))
    awake = prepared(own, dropout=True)
    together = awake.train(own.initial, every, seeds("data order", 0, ids), SGD(0.3, STEPS))
    alone = [awake.train(own.initial, [every[i]], seeds("data order", 0, [i]), SGD(0.3, STEPS)) for i in ids]
    assert torch.allclose(together, torch.cat(alone), atol=1e-5)
    tight = prepared(own, 30, dropout=True)
    assert torch.allclose(
        together, tight.train(own.initial, every, seeds("data order", 0, ids), SGD(0.3, STEPS)), atol=1e-5
    )
    asleep = prepared(own).train(own.initial, every, seeds("data order", 0, ids), SGD(0.3, STEPS))
    assert not torch.allclose(together, asleep, atol=1e-3)
    twice, once = every[2].take(torch.tensor([0, 0])), every[2].take(torch.tensor([0]))
    for engine, alike in ((awake, False), (prepared(own), True)):  # two copies in a batch drop other features
        rows = [engine.train(own.initial, [some], seeds("data order", 0, [0]), SGD(0.3)) for some in (twice, once)]
        assert torch.allclose(*rows, atol=1e-4) == alike
