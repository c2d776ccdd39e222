"""What cannot be batched is refused by name, and trained one by one; the parts that batching rests on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from privfm.contracts import BuiltModel, Table
from privfm.learning import (
    SGD,
    CausalLM,
    ImageClassification,
    LoRA,
    ModelLearner,
    Schedule,
    SequenceClassification,
    SequenceClassifier,
    SmallCNN,
    Workbench,
)
from privfm.learning.batched import prepared, problems
from privfm.learning.batched.dropout import dropped_out, keep_mask, split
from privfm.learning.batched.packing import Packing, running
from privfm.learning.trunk import block_stack
from privfm.randomness import Seeds

TEXTS = ["4 5 6 7 8 9 3 2", "5 1", "7 8 9 2 3", "1 2 3 4"]


def encoded(found: Sequence[str]) -> dict[str, Tensor]:
    rows = [torch.tensor([int(word) for word in text.split()]) for text in found]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long()}


def bert(**options: Any) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
                   max_position_embeddings=16, initializer_range=0.2, num_labels=2, **options)
    )  # fmt: skip


def adapted(module: nn.Module, **options: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    given = {"r": 2, "target_modules": ["query", "value"], "modules_to_save": ["classifier"], **options}
    return get_peft_model(module, LoraConfig(**given)).eval()  # type: ignore[arg-type]  # any transformers model


def bench(module: nn.Module, task: Any = None) -> Workbench:
    built = BuiltModel(module.eval(), encoded, block_stack(module), lambda folder: None)
    return Workbench(built, task or SequenceClassification(), Table(TEXTS, torch.tensor([0, 1, 1, 0]), ("a", "b")))


def dora() -> nn.Module:
    module: nn.Module = adapted(bert(), use_dora=True)
    return module


def with_bias() -> nn.Module:
    module: nn.Module = adapted(bert(), lora_bias=True)
    return module


def several() -> nn.Module:
    from peft import LoraConfig

    module = adapted(bert())
    module.add_adapter("second", LoraConfig(r=2, target_modules=["query"]))
    result: nn.Module = module
    return result


def merged() -> nn.Module:
    module = adapted(bert())
    module.merge_adapter()
    result: nn.Module = module
    return result


def norms() -> nn.Module:
    module: nn.Module = adapted(bert())
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or "output.LayerNorm" in name)
    return module


def embeddings() -> nn.Module:
    module: nn.Module = adapted(bert(), target_modules=["word_embeddings", "query"])
    return module


def scaled() -> nn.Module:
    from peft import IA3Config, get_peft_model

    config = IA3Config(target_modules=["key", "value"], feedforward_modules=[], modules_to_save=["classifier"])
    return get_peft_model(bert(), config).eval()  # type: ignore[arg-type]  # any transformers model


def statistics() -> nn.Module:
    module = adapted(bert())
    module.base_model.model.bert.pooler.add_module("batch", nn.BatchNorm1d(16))
    result: nn.Module = module
    return result


def prompt() -> nn.Module:
    from peft import PromptTuningConfig, TaskType, get_peft_model

    config = PromptTuningConfig(task_type=TaskType.SEQ_CLS, num_virtual_tokens=2)
    return get_peft_model(bert(), config).eval()  # type: ignore[arg-type]  # any transformers model


def mistral(**options: Any) -> nn.Module:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(vocab_size=30, hidden_size=16, intermediate_size=16, num_hidden_layers=2, use_cache=False,
                           num_attention_heads=2, num_key_value_heads=1, initializer_range=0.2, **options)  # fmt: skip
    module: nn.Module = adapted(MistralForCausalLM(config), target_modules=["q_proj"], modules_to_save=None)
    return module


def windowed() -> nn.Module:
    return mistral(sliding_window=4)


def experts() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(vocab_size=30, hidden_size=16, intermediate_size=16, num_hidden_layers=2, use_cache=False,
                           num_attention_heads=2, num_key_value_heads=1, num_local_experts=2)  # fmt: skip
    module: nn.Module = adapted(MixtralForCausalLM(config), target_modules=["q_proj"], modules_to_save=None)
    return module


def capped() -> nn.Module:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(vocab_size=30, hidden_size=16, intermediate_size=16, num_hidden_layers=2, use_cache=False,
                          num_attention_heads=2, num_key_value_heads=1, head_dim=8, pad_token_id=0)  # fmt: skip
    module: nn.Module = adapted(Gemma2ForCausalLM(config), target_modules=["q_proj"], modules_to_save=None)
    return module


def two_stacks() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=30, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2)
    module: nn.Module = adapted(T5ForConditionalGeneration(config), target_modules=["q"], modules_to_save=None)
    return module


def tilted() -> nn.Module:
    from transformers import BloomConfig, BloomForCausalLM

    config = BloomConfig(vocab_size=30, hidden_size=16, n_layer=2, n_head=2, use_cache=False)
    module: nn.Module = adapted(BloomForCausalLM(config), target_modules=["query_key_value"], modules_to_save=None)
    return module


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (dora, r"attention.self.query \(Linear\): Dora\w* is no plain product"),
        (with_bias, "the bias of LoRA is not batched"),
        (several, "2 adapters, expected one"),
        (merged, "merged into the weights"),
        (norms, r"layer.0.output.LayerNorm \(LayerNorm\): trained weight and bias"),
        (embeddings, r"word_embeddings \(Embedding\): only LoRA on linear layers"),
        (scaled, "only LoRA on linear layers"),
        (statistics, "batch statistics mix clients"),
        (prompt, "trains a prompt or a prefix"),
        (windowed, "sliding_window=4"),
        (experts, "num_local_experts=2"),
        (capped, "attn_logit_softcapping"),
        (two_stacks, "two stacks"),
        (tilted, "computes its attention by itself"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_refusals_name_the_module(make: Callable[[], nn.Module], named: str) -> None:
    import re

    module = make()
    found = problems(module, block_stack(module))
    assert any(re.search(named, reason) for reason in found), found


def test_what_is_fine_has_no_problems() -> None:
    for module in (adapted(bert()), mistral(sliding_window=None)):
        assert problems(module, block_stack(module)) == []


def test_attention_dropout_cannot_be_awake() -> None:
    module = adapted(bert())
    (reason,) = problems(module, block_stack(module), dropout=True)
    assert "attention_probs_dropout_prob=0.1" in reason
    module = adapted(bert(attention_probs_dropout_prob=0.0))
    assert problems(module, block_stack(module), dropout=True) == []


def updates(own: Workbench, engine: Any) -> tuple[str, Tensor]:
    able = ModelLearner(own, {}, SGD(0.1, Schedule(2)), engine=engine)
    every = [own.everything.take(torch.tensor(places)) for places in ([0, 1], [2, 3])]
    result = able.train(able.initial(), every, Seeds(0).clients("data order", 0, [0, 1]))
    assert not result.failed
    return able.engine_note, result.rows


@pytest.mark.parametrize("make", [dora, norms])
def test_what_is_refused_is_trained_one_by_one(make: Callable[[], nn.Module]) -> None:
    note, rows = updates(bench(make()), "batched")
    assert note.startswith("sequential: ")
    assert torch.equal(rows, updates(bench(make()), "sequential")[1]) and rows.norm() > 0


def test_images_without_blocks_are_trained_one_by_one() -> None:
    built = SmallCNN().build(("a", "b"), Seeds(0).generator("initialisation"))
    table = Table(torch.randn(4, 1, 8, 8, generator=Generator().manual_seed(0)), torch.tensor([0, 1, 1, 0]), ("a", "b"))
    note, rows = updates(Workbench(built, ImageClassification(), table), "batched")
    assert "no stack of like blocks" in note and rows.norm() > 0


def test_attention_that_is_unknown_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose own attention does more than its configuration says: the trial on some examples shows it."""
    from transformers.models.bert import modeling_bert

    def biased(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **_: Any
    ) -> tuple[Tensor, None]:
        bias = torch.zeros(query.shape[0], 1, query.shape[2], key.shape[2])
        bias = bias if mask is None else bias + torch.zeros_like(bias).masked_fill(~mask.bool(), -1e9)
        bias[..., 0] += 1.0
        return scaled_dot_product_attention(query, key, value, attn_mask=bias).transpose(1, 2), None

    from transformers import AttentionInterface

    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", biased)
    assert modeling_bert.ALL_ATTENTION_FUNCTIONS["sdpa"] is biased
    own = bench(adapted(bert()))
    with pytest.raises(ValueError, match=r"the gradient of an example is .* of its length off"):
        prepared(own)
    note, rows = updates(own, "batched")
    assert note.startswith("sequential: on packed tokens") and rows.norm() > 0


def test_attention_arguments_that_are_unknown_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.mistral.modeling_mistral import MistralAttention

    module = mistral(sliding_window=None)
    for part in module.modules():
        if isinstance(part, MistralAttention):
            object.__setattr__(part.config, "sliding_window", None)
    own = bench(module, CausalLM())
    original = MistralAttention.forward
    monkeypatch.setattr(MistralAttention, "forward", lambda self, *a, **k: original(self, *a, s_aux=torch.ones(2), **k))
    with pytest.raises(ValueError, match="features that are not known here: s_aux"):
        prepared(own)


def test_padding_to_the_left_is_trained_one_by_one() -> None:
    own = bench(adapted(bert()))
    engine = prepared(own)
    flipped = own.everything.with_inputs({name: value.flip(1) for name, value in own.everything.inputs.items()})
    with pytest.raises(ValueError, match="padding to the right"):
        engine.train(own.initial, [flipped], Seeds(0).clients("data order", 0, [0]), SGD(0.1))
    results = []
    for kind in ("batched", "sequential"):
        able = ModelLearner(own, {}, SGD(0.1), engine=kind)  # type: ignore[arg-type]  # both are engines
        results.append(able.train(able.initial(), [flipped], Seeds(0).clients("data order", 0, [0])).rows)
    assert torch.equal(*results)


def test_a_weight_that_the_loss_does_not_reach_is_refused() -> None:
    module = adapted(bert())
    module.base_model.model.bert.register_module("idle", nn.Linear(2, 2))
    with pytest.raises(ValueError, match="does not run on packed tokens"):
        prepared(bench(module))


@pytest.mark.parametrize("bad", [{"tokens": 0}, {"engine": "fast"}])
def test_bad_arguments(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"tokens=0|engine='fast'"):
        ModelLearner(bench(adapted(bert())), {}, SGD(0.1), **{"engine": "batched", **bad})


# Masks of transformers


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
def test_a_mask_of_four_dimensions_and_bools_is_wrong_under_eager_attention(kind: str) -> None:
    """Why padding is handled by a float bias of ours: transformers 5 adds such a mask to the scores as 0 and 1."""
    model: Any = bert().eval()
    model.set_attn_implementation(kind)
    inputs = encoded(TEXTS)
    mask = inputs["attention_mask"]
    lowest = torch.finfo(torch.float32).min
    whole = mask.bool()[:, None, None].expand(-1, 1, mask.shape[1], -1)
    with torch.no_grad():
        expected = model(**inputs).logits

        def error(given: Tensor) -> float:
            return float((model(input_ids=inputs["input_ids"], attention_mask=given).logits - expected).abs().max())

        assert error(torch.zeros(whole.shape).masked_fill(~whole, lowest)) < 1e-6
        assert error(mask.bool()) < 1e-6
        assert error(torch.ones_like(mask)) > 1e-3  # no mask at all
        if kind == "eager":
            assert error(whole) > 1e-3
        else:
            assert error(whole) < 1e-6


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
def test_packed_tokens_whatever_the_models_own_attention(kind: str) -> None:
    module = adapted(bert())
    module.base_model.model.set_attn_implementation(kind)
    prepared(bench(module))
    assert module.config._attn_implementation == kind
    with pytest.raises(LookupError):
        running.get()


# Packing, dropout


def test_packing_there_and_back() -> None:
    lengths = torch.tensor([3, 1, 4])
    packing = Packing(lengths, 5)
    x = torch.randn(3, 5, 2, generator=Generator().manual_seed(0), requires_grad=True)
    packed = packing.pack(x)
    assert torch.equal(packed[0], torch.cat([x[i, :n] for i, n in enumerate(lengths.tolist())]))
    back = packing.unpack(packed)
    real = torch.arange(5) < lengths[:, None]
    assert torch.equal(back, x * real[..., None])
    (gradient,) = torch.autograd.grad(back.sum(), x)
    assert torch.equal(gradient, real[..., None].expand_as(x).float())
    assert torch.equal(packing.first(packed)[0], x[:, 0])
    assert torch.equal(packing.unpack_first(packing.first(packed))[:, 0], x[:, 0])
    with pytest.raises(ValueError, match="3 examples of 5 tokens"):
        packing.pack(torch.zeros(2, 5, 2))


def test_splitmix64_as_published() -> None:
    # First outputs of SplitMix64 from the state 1234567: the test vector of Vigna's splitmix64.c in Rosetta Code.
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    found = split(torch.tensor(1234567), torch.arange(5)).tolist()
    assert [value % 2**64 for value in found] == known


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_drops_at_its_rate_and_independently(rate: float) -> None:
    keys = torch.arange(20000) * 3 + 7
    kept = keep_mask(keys, 1, 32, rate).float()
    deviation = (rate * (1 - rate) / kept.numel()) ** 0.5
    assert abs(float(kept.mean()) - (1 - rate)) < 4 * deviation + 1 / 65536
    assert abs(float(kept.mean()) - (1 - 2 * rate if rate < 0.5 else 0.75)) > 100 * deviation  # another rate is seen
    correlations = torch.corrcoef(torch.cat([kept.T, keep_mask(keys, 2, 32, rate).float().T])).fill_diagonal_(0)
    assert float(correlations.abs().max()) * 20000**0.5 < 5  # 2,016 pairs: 3.5 deviations are expected
    assert float(torch.corrcoef(torch.stack([kept[1:, 0], kept[:-1, 0]]))[0, 1].abs()) < 4 / 20000**0.5
    assert torch.equal(keep_mask(keys, 1, 30, rate), keep_mask(keys, 1, 32, rate)[:, :30])
    x = torch.ones(20000, 32)
    assert abs(float(dropped_out(x, keys, 1, rate).mean()) - 1) < 4 * deviation / (1 - rate)


# The real thing


def test_all_minilm() -> None:
    texts = ["a short text", "clients train together, each with weights of its own, and nobody notices", "hm", "no"]
    source = SequenceClassifier(adapter=LoRA(rank=4, layers=(4, 5)), max_length=16)
    built = source.build(("a", "b"), Seeds(0).generator("initialisation"))
    own = Workbench(built, SequenceClassification(), Table(texts, torch.tensor([0, 1, 1, 0]), ("a", "b")))
    note, together = updates(own, "batched")
    assert note == "batched"
    assert torch.allclose(together, updates(own, "sequential")[1], atol=1e-6)
