"""What every kind of adapter trains, keeps, and brings back from a folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from privfm.checks import InvalidArgument
from privfm.cli.options import parser_for, values
from privfm.contracts import ModelSource, Table
from privfm.learning import (
    SGD,
    CausalLanguageModel,
    CausalLM,
    MeanPooledClassifier,
    ModelLearner,
    Schedule,
    SequenceClassification,
    SequenceClassifier,
    Workbench,
)
from privfm.learning.adapter_kinds import IA3, Adapter, BitFit, LoRA, PromptTuning
from privfm.randomness import Seeds

LABELS = ("a", "b", "c")
KINDS: dict[str, Adapter] = {
    "LoRA": LoRA(rank=2),
    "FFA": LoRA(rank=2, freeze_a=True),
    "rank-stabilised": LoRA(rank=4, rank_stabilised=True),
    "biases": BitFit(),
    "scales": IA3(),
    "prompt": PromptTuning(3),
}


def bench_of(folder: str, sentences: list[str], adapter: Adapter | None, pooling: str = "mean") -> Workbench:
    source = SequenceClassifier(folder, pooling=pooling, adapter=adapter, max_length=16)  # type: ignore[arg-type]
    table = Table(sentences, torch.arange(len(sentences)) % 3, LABELS)
    return Workbench(source.build(LABELS, Seeds(0).generator("initialisation")), SequenceClassification(), table)


def moved(bench: Workbench) -> Tensor:
    return bench.initial + 0.1 * torch.randn(bench.layout.d, generator=torch.Generator().manual_seed(1))


def own_inputs(bench: Workbench) -> dict[str, Tensor]:
    return {name: value[:7] for name, value in bench.everything.inputs.items()}


def logits(output: Any) -> Tensor:
    found: Tensor = getattr(output, "logits", output)
    return found.detach()


def fresh(folder: str, pooling: str) -> Any:
    from transformers import AutoModelForSequenceClassification

    if pooling == "mean":
        return MeanPooledClassifier.from_pretrained(folder, 3)
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)


@pytest.mark.parametrize("pooling", ["mean", "model"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "biases"])
def test_peft_loads_what_was_saved(
    kind: str, pooling: str, tiny_bert: str, sentences: list[str], tmp_path: Path
) -> None:
    from peft import PeftModel

    bench = bench_of(tiny_bert, sentences, KINDS[kind], pooling)
    model = moved(bench)
    bench.save(model, tmp_path)
    loaded = PeftModel.from_pretrained(fresh(tiny_bert, pooling), str(tmp_path)).eval()
    want = logits(bench.load(model)(**own_inputs(bench)))
    assert torch.equal(logits(loaded(**own_inputs(bench))), want)
    start = logits(bench.load(bench.initial)(**own_inputs(bench)))
    assert not torch.allclose(start, want, atol=1e-3)


@pytest.mark.parametrize("pooling", ["mean", "model"])
def test_a_model_with_trained_biases_is_a_model_of_its_own_class(
    pooling: str, tiny_bert: str, sentences: list[str], tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    bench = bench_of(tiny_bert, sentences, BitFit(), pooling)
    model = moved(bench)
    bench.save(model, tmp_path)
    if pooling == "mean":
        loaded = fresh(tiny_bert, pooling)
        loaded.load_state_dict(load_file(tmp_path / "model.safetensors"))
    else:
        loaded = type(bench.module).from_pretrained(tmp_path)  # type: ignore[attr-defined]
    want = logits(bench.load(model)(**own_inputs(bench)))
    assert torch.equal(logits(loaded.eval()(**own_inputs(bench))), want)


# What is trained, and what is kept below it


@pytest.mark.parametrize(
    ("adapter", "kept"),
    [
        pytest.param(LoRA(rank=2, layers=(1, 2), freeze_a=True), 1, id="FFA"),
        pytest.param(BitFit(), None, id="all biases"),
        pytest.param(BitFit(layers=(2,)), 2, id="biases"),
        pytest.param(IA3(layers=(2,)), 2, id="scales"),
        pytest.param(IA3(outputs=("value",), layers=(1,)), 1, id="scaled values"),
        pytest.param(PromptTuning(3), None, id="prompt"),
    ],
)
def test_activations_are_kept_below_the_lowest_trained_block_and_stay_right(
    adapter: Adapter, kept: int | None, tiny_bert: str, sentences: list[str]
) -> None:
    bench = bench_of(tiny_bert, sentences, adapter)
    assert (None if bench.trunk is None else len(bench.trunk._blocks)) == kept
    bench.load(moved(bench))
    some = bench.everything.take(torch.arange(9))
    with torch.no_grad():
        torch.testing.assert_close(bench.logits(some), bench.module(**some.inputs), rtol=1e-5, atol=1e-6)


def test_only_b_and_the_head_are_trained_with_a_frozen(tiny_bert: str, sentences: list[str]) -> None:
    bench, whole = (bench_of(tiny_bert, sentences, LoRA(rank=2, freeze_a=frozen)) for frozen in (True, False))
    assert {name.split(".")[-3] for name in bench.parameters} == {"lora_B", "modules_to_save"}
    assert whole.layout.d - bench.layout.d == 3 * 2 * 2 * 16  # blocks, modules, rank, inputs
    a = {name: p for name, p in bench.module.named_parameters() if ".lora_A." in name}
    assert len(a) == 6
    assert all(torch.equal(p, whole.module.get_parameter(name)) for name, p in a.items())  # what the seed draws
    assert all(bool(p.count_nonzero()) for p in a.values())


def test_with_a_frozen_the_mean_of_the_clients_is_the_mean_of_their_products(
    tiny_bert: str, sentences: list[str]
) -> None:
    """Sun et al., 2024, section 4; with both factors trained it is not."""
    errors = {}
    for frozen in (True, False):
        bench = bench_of(tiny_bert, sentences, LoRA(rank=2, freeze_a=frozen))
        learner = ModelLearner(bench, {}, SGD(5.0, Schedule(steps=3, batch_size=4)))
        examples = [bench.everything.take(torch.arange(12) + 12 * client) for client in range(3)]
        rows = learner.train(bench.initial, examples, Seeds(0).clients("data order", 0, [0, 1, 2])).rows
        products = [product(bench, bench.initial + row) for row in rows]
        mean = torch.stack(products).mean(0)
        errors[frozen] = float((product(bench, bench.initial + rows.mean(0)) - mean).norm() / mean.norm())
    assert errors[True] < 1e-6
    assert errors[False] > 1e-4


def product(bench: Workbench, model: Tensor) -> Tensor:
    bench.load(model)
    layer: Any = bench.module.get_submodule("base_model.model.encoder.encoder.layer.2.attention.self.value")
    found: Tensor = layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
    return found.detach()


def test_the_scaling_of_a_stabilised_rank_is_alpha_over_its_root(tiny_bert: str, sentences: list[str]) -> None:
    adapters = bench_of(tiny_bert, sentences, LoRA(rank=4, alpha=6.0, rank_stabilised=True)).adapters
    assert adapters is not None
    assert {pair.scaling for pair in adapters.pairs} == {3.0}


def test_biases_of_the_blocks_and_the_head_are_trained(tiny_bert: str, sentences: list[str]) -> None:
    bench = bench_of(tiny_bert, sentences, BitFit(layers=(0, 2)))
    body = [name for name in bench.parameters if not name.startswith("classifier")]
    assert all(name.endswith(".bias") for name in body)
    assert {name.split(".")[3] for name in body} == {"0", "2"}
    per_block = 4 * 16 + 32 + 16 + 2 * 16  # attention and its output, the two feed-forward layers, two norms
    assert bench.layout.d == 2 * per_block + 3 * 16 + 3


def test_scales_of_the_architecture_and_scales_by_name(tiny_bert: str, sentences: list[str]) -> None:
    bench = bench_of(tiny_bert, sentences, IA3())
    ends = {name.split(".ia3_l")[0].split(".", 6)[-1] for name in bench.parameters if "ia3_l" in name}
    assert ends == {"attention.self.key", "attention.self.value", "attention.output.dense", "output.dense"}
    some = bench_of(tiny_bert, sentences, IA3(outputs=("key",), inputs=("output.dense",), layers=(1,)))
    names = [name for name in some.parameters if "ia3_l" in name]
    assert len(names) == 3
    assert all(".layer.1." in name for name in names)


def test_prompt_tokens_stand_before_every_text(tiny_bert: str, sentences: list[str]) -> None:
    bench = bench_of(tiny_bert, sentences, PromptTuning(3))
    assert bench.layout.d == 3 * 16 + 3 * 16 + 3
    encoder: Any = bench.module.base_model.encoder  # type: ignore[union-attr]
    seen = []
    encoder.register_forward_pre_hook(lambda _, __, named: seen.append(named["attention_mask"]), with_kwargs=True)
    bench.logits(bench.everything.take(torch.arange(5)))
    assert seen[0].shape == (5, 3 + bench.everything.inputs["input_ids"].shape[1])
    assert bool((seen[0][:, :3] == 1).all())


@pytest.mark.parametrize(
    "adapter", [IA3(), PromptTuning(2), LoRA(rank=2, modules=("q_proj",), freeze_a=True)], ids=repr
)
def test_a_decoder_takes_every_kind_that_it_has_modules_for(
    adapter: Adapter, tiny_llama: str, sentences: list[str], tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    source = CausalLanguageModel(tiny_llama, adapter=adapter)
    built = source.build(("text",), Seeds(0).generator("initialisation"))
    bench = Workbench(built, CausalLM(), Table(sentences, torch.zeros(60).long(), ("text",)))
    everybody = {"clients": torch.arange(60), "test": torch.arange(60)}
    learner = ModelLearner(bench, everybody, SGD(0.5, Schedule(steps=2, batch_size=8)))  # type: ignore[arg-type]
    trained = learner.train(bench.initial, [bench.everything], Seeds(0).clients("data order", 0, [0]))
    assert trained.failed == {}
    assert float(trained.rows.norm()) > 0
    model = moved(bench)
    bench.save(model, tmp_path)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), str(tmp_path)).eval()
    want = logits(bench.load(model)(**own_inputs(bench)))
    prompt = 2 if isinstance(adapter, PromptTuning) else 0
    assert want.shape[1] == bench.everything.inputs["input_ids"].shape[1]
    assert torch.equal(logits(loaded(**own_inputs(bench)))[:, prompt:], want)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: PromptTuning(0), "tokens=0"),
        (lambda: LoRA(rank=0), "rank=0"),
        (lambda: IA3(inputs=("dense",)), "without outputs"),
        (lambda: IA3(outputs=()), "nothing to scale"),
    ],
)
def test_fields_that_say_nothing_are_refused(make: Callable[[], Adapter], said: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        make()


@pytest.mark.parametrize(
    ("adapter", "said"),
    [
        (IA3(outputs=("keyy",)), r"outputs: the model has no 'keyy'; its linear modules are .*key"),
        (IA3(outputs=("key",), inputs=("dens",)), "inputs: the model has no 'dens'"),
        (IA3(layers=(3,)), r"layers=\(3,\): the model has blocks 0 to 2"),
        (BitFit(layers=(-1,)), r"layers=\(-1,\): the model has blocks 0 to 2"),
    ],
)
def test_what_the_model_does_not_have_is_named(adapter: Adapter, said: str, tiny_bert: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        SequenceClassifier(tiny_bert, adapter=adapter).build(LABELS, Seeds(0).generator("initialisation"))


def test_a_model_without_biases_and_one_that_peft_does_not_know(tiny_llama: str, tiny_bert: str) -> None:
    with pytest.raises(InvalidArgument, match="no biases; use LoRA"):
        CausalLanguageModel(tiny_llama, adapter=BitFit()).build(("text",), Seeds(0).generator("initialisation"))
    module = MeanPooledClassifier.from_pretrained(tiny_bert, 3)
    module.config = type("Config", (), {"model_type": "unheard-of"})()
    with pytest.raises(InvalidArgument, match="PEFT knows no choice for 'unheard-of'"):
        IA3().applied(module, (), None)


# On the command line and in files


def asked(model: ModelSource) -> ModelSource:
    return model


def read(*words: str) -> Any:
    return values(parser_for(asked), asked, ["--model", "SequenceClassifier", *words])["model"].adapter


HERE = "privfm.learning.adapter_kinds."


def test_a_model_is_asked_for_with_its_default_and_with_one_value_changed() -> None:
    assert read() == LoRA()
    assert read("--model.adapter.rank", "4") == LoRA(rank=4)
    assert read("--model.adapter", "null") is None
    assert read("--model.adapter", '{"rank": 4, "freeze_a": true}') == LoRA(rank=4, freeze_a=True)


@pytest.mark.parametrize("adapter", [BitFit(), IA3(), PromptTuning(20)], ids=repr)
def test_the_default_leaves_nothing_to_the_kind_that_replaces_it(adapter: Adapter) -> None:
    assert read("--model.adapter", f"{HERE}{type(adapter).__name__}") == adapter


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("adapter = {rank = 4}", LoRA(rank=4)),
        (f'adapter = {{class_path = "{HERE}LoRA", init_args = {{rank = 4}}}}', LoRA(rank=4)),
        (f'adapter = {{class_path = "{HERE}BitFit", init_args = {{layers = [5]}}}}', BitFit(layers=(5,))),
        (f'adapter = {{class_path = "{HERE}PromptTuning"}}', PromptTuning()),
    ],
)
def test_files_that_named_no_kind_still_mean_lora(text: str, expected: Adapter, tmp_path: Path) -> None:
    file = tmp_path / "model.toml"
    file.write_text(f'[model]\nclass_path = "SequenceClassifier"\n[model.init_args]\n{text}\n')
    found = values(parser_for(asked), asked, ["--config", str(file)])
    assert found["model"].adapter == expected


@pytest.mark.parametrize("kind", [LoRA, BitFit, IA3, PromptTuning], ids=lambda kind: kind.__name__)
def test_every_option_is_read_and_explained(kind: type) -> None:
    told = parser_for(kind).format_help()
    assert "Unvalidated" not in told
    for name in kind.__dataclass_fields__:  # type: ignore[attr-defined]
        assert f"--{name}" in told
