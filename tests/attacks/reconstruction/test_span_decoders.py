"""The span search on causal models: whole texts, exactly, and nothing where there is nothing."""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

from privfm.attacks.reconstruction.span import SpanSearch
from privfm.attacks.reconstruction.span.prefixes import extension_inputs, one_by_one
from privfm.attacks.reconstruction.text_models import text_model
from privfm.checks import InvalidArgument
from privfm.contracts import Observation
from privfm.contracts.reconstruction import Declared, LocalSteps

transformers = pytest.importorskip("transformers")

Texts = list[tuple[int, ...]]
Sent = Callable[..., dict[str, Tensor]]

SHARED: Texts = [(5, 6, 7, 8), (5, 6, 7, 8, 9, 10), (5, 6, 7), (20, 21, 5), (20, 21, 6), (33, 34), (40, 40, 41, 42)]
"""A text that is a prefix of another, shared beginnings, the shortest text with a loss, a repeated first token."""


def gpt2(vocabulary: int = 1200, width: int = 96, blocks: int = 3, labels: int = 0) -> Any:
    config = transformers.GPT2Config(
        vocab_size=vocabulary, n_embd=width, n_layer=blocks, n_head=4, n_positions=64, pad_token_id=0, num_labels=labels
    )
    return _built(transformers.GPT2ForSequenceClassification if labels else transformers.GPT2LMHeadModel, config)


def llama(vocabulary: int = 1200, width: int = 96, blocks: int = 3, labels: int = 0, tied: bool = False) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=blocks,
        num_attention_heads=width // 16,
        num_key_value_heads=width // 32,
        max_position_embeddings=64,
        pad_token_id=0,
        num_labels=labels,
        tie_word_embeddings=tied,
    )
    return _built(transformers.LlamaForSequenceClassification if labels else transformers.LlamaForCausalLM, config)


def _built(kind: Any, config: Any, seed: int = 0) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return kind(config).eval()


def texts_of(count: int, seed: int, vocabulary: int = 1200, longest: int = 10) -> Texts:
    source = random.Random(seed)
    return [tuple(source.randrange(1, vocabulary) for _ in range(source.randint(3, longest))) for _ in range(count)]


def clipped_and_noised(
    sent: Sent, model: nn.Module, texts: Texts, labels: Sequence[int] | None, noise_multiplier: float
) -> dict[str, Tensor]:
    """One step of DP-SGD: each example's gradient clipped to norm 1, noise on the sum, over the number of examples."""
    total: dict[str, Tensor] = {}
    for row, text in enumerate(texts):
        one = sent(model, [text], None if labels is None else [labels[row]])
        norm = sum(float(part.square().sum()) for part in one.values()) ** 0.5
        for name, part in one.items():
            total[name] = total.get(name, torch.zeros_like(part)) + part * min(1.0, 1.0 / norm)
    generator = Generator().manual_seed(5)
    return {
        name: (part + noise_multiplier * torch.randn(part.shape, generator=generator)) / len(texts)
        for name, part in total.items()
    }


def locally(
    sent: Sent, model: nn.Module, texts: Texts, labels: Sequence[int] | None, learning_rate: float, steps: int
) -> dict[str, Tensor]:
    """The change of a client that takes steps of gradient descent over two halves of its texts in turn."""
    trained = copy.deepcopy(model)
    half = len(texts) // 2
    for step in range(steps):
        part = slice(0, half) if step % 2 == 0 else slice(half, None)
        gradients = sent(trained, texts[part], None if labels is None else labels[part])
        with torch.no_grad():
            for name, parameter in trained.named_parameters():
                parameter -= learning_rate * gradients.get(name, torch.zeros_like(parameter))
    before = dict(model.named_parameters())
    return {name: (after - before[name]).detach() for name, after in trained.named_parameters()}


# ------------------------------------------------------------------------------------------------------ exact recovery


@pytest.mark.parametrize("build", [gpt2, llama, lambda: llama(tied=True)], ids=["gpt2", "llama", "llama-tied"])
@pytest.mark.parametrize("count", [1, 8])
def test_next_token_texts_are_exact_last_tokens_included(build: Any, count: int, observed: Any) -> None:
    model, texts = build(), texts_of(count, seed=21 + count)
    found = SpanSearch()(observed(model, texts))
    assert Counter(found.texts) == Counter(texts)
    assert found.facts["span"] == "sharp"
    assert float(found.facts["head's gradient left unexplained"]) < 1e-4  # type: ignore[arg-type]
    assert found.used == ()
    assert not found.stopped


@pytest.mark.parametrize("build", [gpt2, llama])
def test_texts_of_a_classifier_are_exact(build: Any, observed: Any) -> None:
    texts = texts_of(8, seed=31)
    found = SpanSearch()(observed(build(labels=2), texts, [0, 1, 1, 0, 1, 0, 0, 1]))
    assert Counter(found.texts) == Counter(texts)


def test_thirty_two_texts_are_exact(observed: Any) -> None:
    texts = texts_of(32, seed=41, longest=9)
    found = SpanSearch()(observed(llama(width=256), texts))
    assert Counter(found.texts) == Counter(texts)


@pytest.mark.parametrize("build", [gpt2, llama, lambda: llama(tied=True)], ids=["gpt2", "llama", "llama-tied"])
def test_shared_beginnings_prefixes_and_copies_are_told_apart(build: Any, observed: Any) -> None:
    texts = [*SHARED, SHARED[0]]
    assert Counter(SpanSearch()(observed(build(), texts)).texts) == Counter(texts)


@pytest.mark.parametrize("build", [gpt2, llama])
def test_a_classifiers_text_that_is_a_prefix_of_another_is_found(build: Any, observed: Any) -> None:
    found = SpanSearch()(observed(build(labels=2), SHARED, [0, 1, 0, 1, 0, 0, 1]))
    assert Counter(found.texts) == Counter(SHARED)


@pytest.mark.parametrize("build", [gpt2, lambda: llama(tied=True)], ids=["gpt2", "llama-tied"])
def test_last_tokens_that_are_inputs_elsewhere_are_found_under_a_tied_head(build: Any, observed: Any) -> None:
    texts = texts_of(8, seed=51, vocabulary=20)  # so few tokens that most last ones occur as inputs
    inputs = {token for text in texts for token in text[:-1]}
    found = SpanSearch()(observed(build(), texts))
    assert sum(text[-1] in inputs for text in texts) >= 4
    assert Counter(found.texts) == Counter(texts)
    assert float(found.facts["tied last tokens"]) > 0  # type: ignore[arg-type]


def test_a_batch_repeated_as_a_whole_is_found_once(observed: Any) -> None:
    texts = texts_of(3, seed=61)
    assert Counter(SpanSearch()(observed(gpt2(), texts * 2)).texts) == Counter(texts)  # the mean is the same gradient


def test_clipping_leaves_texts_exact(sent: Sent) -> None:
    model, texts = gpt2(), texts_of(4, seed=71)
    found = SpanSearch()(Observation(model, clipped_and_noised(sent, model, texts, None, 0.0)))
    assert Counter(found.texts) == Counter(texts)


def test_hidden_rows_do_no_harm(observed: Any) -> None:
    model, texts = llama(), texts_of(4, seed=81)
    tensors = dict(observed(model, texts).tensors)
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name].clone()
    tensors[name][::2] = torch.nan
    assert Counter(SpanSearch()(Observation(model, tensors)).texts) == Counter(texts)


def test_without_the_heads_gradient_last_tokens_are_missing_and_it_says_so(observed: Any) -> None:
    model, texts = llama(), texts_of(4, seed=91)
    tensors = {name: one for name, one in observed(model, texts).tensors.items() if "lm_head" not in name}
    found = SpanSearch()(Observation(model, tensors))
    assert Counter(found.texts) == Counter(text[:-1] for text in texts)
    assert "last tokens are missing" in str(found.facts["ends"])


def test_of_a_head_hidden_in_part_texts_that_end_there_are_left_out(observed: Any) -> None:
    model, texts = llama(), texts_of(4, seed=95)
    tensors = dict(observed(model, texts).tensors)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].clone()
    tensors["lm_head.weight"][texts[2][-1]] = torch.nan
    found = SpanSearch()(Observation(model, tensors))
    assert Counter(found.texts) == Counter([*texts[:2], texts[3]])
    assert float(found.facts["texts whose last token is hidden"]) == pytest.approx(1, abs=1e-3)  # type: ignore[arg-type]


@pytest.mark.parametrize(("build", "labels"), [(gpt2, None), (llama, None), (gpt2, [0, 1, 1, 0])])
def test_changes_of_several_steps_are_exact(build: Any, labels: Any, sent: Sent) -> None:
    model, texts = build(labels=2 if labels else 0), texts_of(4, seed=101)
    change = LocalSteps(learning_rate=1e-3, steps=4, batch_size=2)
    tensors = locally(sent, model, texts, labels, change.learning_rate, change.steps)
    found = SpanSearch()(Observation(model, tensors, change))
    assert Counter(found.texts) == Counter(texts)


def test_small_declared_noise_is_used_and_named(sent: Sent) -> None:
    model, texts = llama(), texts_of(4, seed=111)
    tensors = clipped_and_noised(sent, model, texts, None, 1e-6)
    found = SpanSearch()(Observation(model, tensors, declared=Declared(noise=1e-6 / 4)))
    assert Counter(found.texts) == Counter(texts)
    assert found.used == ("noise",)


# ---------------------------------------------------------------------------------------------------- negative controls


@pytest.mark.parametrize("build", [gpt2, llama])
def test_a_foreign_gradient_tells_nothing(build: Any, sent: Sent) -> None:
    model = build()
    other = _built(type(model), model.config, seed=1)
    found = SpanSearch()(Observation(model, sent(other, texts_of(4, seed=121))))
    assert found.texts == ()
    assert not found.tokens


@pytest.mark.parametrize("build", [gpt2, llama])
def test_a_permuted_gradient_tells_nothing(build: Any, sent: Sent) -> None:
    model = build()
    generator = Generator().manual_seed(3)
    tensors = {
        name: one.flatten()[torch.randperm(one.numel(), generator=generator)].view(one.shape)
        for name, one in sent(model, texts_of(4, seed=131)).items()
    }
    found = SpanSearch()(Observation(model, tensors))
    assert found.texts == ()
    assert not found.tokens


@pytest.mark.parametrize("count", [1, 8])
@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize(("build", "labelled"), [(gpt2, False), (llama, False), (gpt2, True)])
def test_one_private_step_tells_nothing(build: Any, labelled: bool, declared: bool, count: int, sent: Sent) -> None:
    model, texts = build(labels=2 if labelled else 0), texts_of(count, seed=141)
    labels = [row % 2 for row in range(count)] if labelled else None
    tensors = clipped_and_noised(sent, model, texts, labels, 0.3)
    found = SpanSearch()(Observation(model, tensors, declared=Declared(noise=0.3 / count if declared else 0.0)))
    assert found.texts == ()
    assert not found.tokens


@pytest.mark.parametrize("noise_multiplier", [1e-7, 1e-5, 1e-4, 1e-2])
def test_caps_hold_under_any_noise_and_nothing_false_is_said(noise_multiplier: float, sent: Sent) -> None:
    model, texts = gpt2(), texts_of(4, seed=151)
    tensors = clipped_and_noised(sent, model, texts, None, noise_multiplier)
    attack = SpanSearch(candidates=24, beam=16, longest=12)
    found = attack(Observation(model, tensors))
    assert not set(found.texts) - set(texts)
    assert float(found.facts["candidates"]) <= 24 * 12  # type: ignore[arg-type]
    assert float(found.facts["prefixes"]) <= 16 * 12  # type: ignore[arg-type]
    assert float(found.facts["prefixes examined"]) <= 24 * 16 * 12  # type: ignore[arg-type]


def test_more_prefixes_than_directions_tell_tokens_at_most(observed: Any) -> None:
    texts = texts_of(8, seed=161, vocabulary=24)
    prefixes = {text[:k] for text in texts for k in range(1, len(text))}
    inputs = {token for text in texts for token in text[:-1]}
    assert len(inputs) < 32 < len(prefixes)
    found = SpanSearch()(observed(llama(vocabulary=1200, width=32), texts))
    assert found.texts == ()
    assert found.tokens == inputs  # of 1200: block 0 has one direction a token
    assert "as many distinct prefixes as its 32 directions" in str(found.facts["reading"])


def test_more_tokens_than_directions_tell_nothing(observed: Any) -> None:
    found = SpanSearch()(observed(llama(width=32), texts_of(12, seed=171)))
    assert found.texts == ()
    assert "as many distinct tokens as their 32 directions" in str(found.facts["reading"])


# ---------------------------------------------------------------------------------------------------------------- parts


@pytest.mark.parametrize("build", [gpt2, llama])
@pytest.mark.parametrize("length", [0, 1, 4])
def test_continuations_side_by_side_are_as_if_each_stood_alone(build: Any, length: int) -> None:
    text = text_model(build())
    generator = Generator().manual_seed(length)
    prefixes = torch.randint(1200, (3, length), generator=generator)
    tokens = torch.randint(1200, (5,), generator=generator)
    together = extension_inputs(text, 1, prefixes, tokens)
    torch.testing.assert_close(together, one_by_one(text, 1, prefixes, tokens), rtol=1e-4, atol=1e-5)


def test_the_model_stays_as_it_is_and_repeats_agree(observed: Any) -> None:
    model, texts = gpt2(), texts_of(2, seed=181)
    seen = observed(model, texts)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    before = {name: one.clone() for name, one in model.state_dict().items()}
    model.train()
    first, second = SpanSearch()(seen), SpanSearch()(seen)
    assert first.texts == second.texts
    assert first.facts == second.facts
    assert model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())


def test_it_ends_in_time_and_says_so(observed: Any) -> None:
    found = SpanSearch()(observed(gpt2(), texts_of(2, seed=191)), seconds=1e-6)
    assert found.stopped
    assert found.texts == ()


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    "wrong", [{"token_tolerance": 0.0}, {"sequence_tolerance": -1.0}, {"candidates": 0}, {"beam": 0}, {"longest": 0}]
)
def test_bad_arguments_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument, match=next(iter(wrong))):
        SpanSearch(**wrong)


def test_what_it_cannot_run_on_is_refused_with_the_way_out(observed: Any) -> None:
    model, texts = gpt2(), texts_of(2, seed=201)
    seen = observed(model, texts)
    with pytest.raises(InvalidArgument, match=r"optimizer='adam'.*plain gradient descent"):
        SpanSearch()(Observation(model, seen.tensors, LocalSteps(1e-3, optimizer="adam")))
    names = [f"transformer.h.{block}.attn.c_attn.weight" for block in range(2)]
    hidden = {name: torch.full_like(one, torch.nan) if name == names[1] else one for name, one in seen.tensors.items()}
    with pytest.raises(InvalidArgument, match=r"nothing is seen of the gradients of transformer\.h\.1"):
        SpanSearch()(Observation(model, hidden))
    unsent = {name: one for name, one in seen.tensors.items() if name != names[0]}
    with pytest.raises(InvalidArgument, match="train adapters alone"):
        SpanSearch()(Observation(model, unsent))
    with pytest.raises(InvalidArgument, match="second"):
        SpanSearch()(observed(gpt2(blocks=1), texts))
    with pytest.raises(InvalidArgument, match="contains no transformer"):
        linear = nn.Linear(2, 2)
        SpanSearch()(Observation(linear, {"weight": torch.ones(2, 2)}))
