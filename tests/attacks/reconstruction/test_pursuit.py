"""Exact sentences by attention-Jacobian pursuit: small encoders, MiniLM, and what must give nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

from privfm.attacks.reconstruction.pursuit import AttentionPursuit
from privfm.checks import InvalidArgument
from privfm.contracts import Declared, LocalSteps, Observation, Reconstruction
from privfm.learning import SGD, OneStep
from privfm.learning.models import MeanPooledClassifier

Texts = list[tuple[int, ...]]
Observed = Callable[..., Observation]
TEXTS: Texts = [(1, 7, 9, 30, 44, 2), (1, 30, 7, 41, 55, 30, 2), (1, 12, 9, 61, 2)]
LABELS = [0, 1, 0]


def encoder(kind: str = "bert", seed: int = 4, labels: int = 2, **more: Any) -> nn.Module:
    """A small encoder whose norms and biases are not the fresh ones."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 80, "max_position_embeddings": 14, "num_labels": labels, "pad_token_id": 0, **more}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "distilbert":
            config = transformers.DistilBertConfig(dim=64, n_layers=2, n_heads=4, hidden_dim=64, **sizes)
            model: Any = transformers.DistilBertForSequenceClassification(config)
        else:
            kinds: dict[str, tuple[Any, Any]] = {
                "bert": (transformers.BertConfig, transformers.BertForSequenceClassification),
                "roberta": (transformers.RobertaConfig, transformers.RobertaForSequenceClassification),
                "mean": (transformers.BertConfig, transformers.BertModel),
            }
            config = kinds[kind][0](
                hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, **sizes
            )
            model = kinds[kind][1](config)
            if kind == "mean":
                model = MeanPooledClassifier(model, labels)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += (0.2 if parameter.dim() == 1 else 0.05) * torch.randn_like(parameter)
    found: nn.Module = model.eval()
    return found


def only(texts: Sequence[tuple[int, ...]], found: Reconstruction) -> bool:
    return sorted(found.texts) == sorted(texts)


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "mean"])
@pytest.mark.parametrize("precision", [torch.float32, torch.float64])
def test_all_sentences_of_a_batch_and_no_other(kind: str, precision: torch.dtype, observed: Observed) -> None:
    found = AttentionPursuit()(observed(encoder(kind).to(precision), TEXTS, LABELS))
    assert only(TEXTS, found)
    assert found.tokens == {token for text in TEXTS for token in text}
    assert found.used == () and found.stopped == ""


@pytest.mark.parametrize("count", [1, 2])
def test_one_sentence_and_two(count: int, observed: Observed) -> None:
    assert only(TEXTS[:count], AttentionPursuit()(observed(encoder(), TEXTS[:count], LABELS[:count])))


def test_the_batch_is_counted_and_the_check_is_told(observed: Observed) -> None:
    facts = AttentionPursuit()(observed(encoder(), TEXTS, LABELS)).facts
    assert facts["examples"] == 3 and facts["check"] == "bert.pooler.dense"
    assert facts["tokens"] == 10 and facts["positions"] == 7
    assert float(facts["worst distance"]) < 1e-3 and float(facts["worst residual"]) < 2e-4
    assert AttentionPursuit()(observed(encoder("mean"), TEXTS, LABELS)).facts["check"] == "block 1"


def test_equal_sentences_come_back_once(observed: Observed) -> None:
    assert only(TEXTS[:2], AttentionPursuit()(observed(encoder(), [TEXTS[0], *TEXTS[:2]], LABELS)))


def test_a_sentence_whose_every_token_stands_in_others_too(observed: Observed) -> None:
    """No gradient is its own: it is found once the others' spans are taken out."""
    texts = [(1, 10, 11, 12, 13, 2), (1, 20, 21, 22, 23, 2), (1, 11, 21, 12, 22, 2)]
    assert only(texts, AttentionPursuit()(observed(encoder(), texts, LABELS)))


def test_sentences_with_the_first_and_last_token_given(observed: Observed) -> None:
    observation = observed(encoder(), TEXTS, LABELS)
    assert only(TEXTS, AttentionPursuit(first_token=1, last_token=2)(observation))
    wrong = AttentionPursuit(first_token=1, last_token=61)(observation)
    assert wrong.texts == ()  # no text ends so, and none is made up
    absent = AttentionPursuit(first_token=77)(observation)
    assert absent.texts == () and "first_token" in str(absent.facts["ended"]) and absent.tokens


def test_six_classes_no_biases_and_a_scale_of_each_example(observed: Observed, sent: Callable[..., Any]) -> None:
    six = encoder(labels=6)
    assert only(TEXTS, AttentionPursuit()(observed(six, TEXTS, [0, 4, 5])))
    model = encoder()
    bare = {name: tensor for name, tensor in sent(model, TEXTS, LABELS).items() if not name.endswith("bias")}
    assert only(TEXTS, AttentionPursuit()(Observation(model, bare)))
    each = [sent(model, [text], [label]) for text, label in zip(TEXTS, LABELS, strict=True)]
    clipped = {
        name: sum(one[name] / torch.stack([part.norm() for part in one.values()]).norm() for one in each)
        for name in each[0]
    }
    assert only(TEXTS, AttentionPursuit()(Observation(model, clipped)))


def test_only_the_first_attention_is_needed(observed: Observed) -> None:
    """Without any other layer's gradient the second token's takes the witness's place."""
    observation = observed(encoder(), TEXTS, LABELS)
    few = {name: tensor for name, tensor in observation.tensors.items() if "layer.0.attention.self" in name}
    assert len(few) == 6
    found = AttentionPursuit()(Observation(observation.model, few))
    assert only(TEXTS, found) and found.facts["check"] == "none but a second token"


def test_a_change_of_one_step_is_a_gradient(observed: Observed) -> None:
    observation = observed(encoder(), TEXTS, LABELS)
    change = {name: -0.3 * tensor for name, tensor in observation.tensors.items()}
    assert only(TEXTS, AttentionPursuit()(Observation(observation.model, change, LocalSteps(0.3))))


def test_several_small_steps_with_frozen_embeddings(observed: Observed, sent: Callable[..., Any]) -> None:
    start, moving = encoder().double(), encoder().double()  # in float32, differences of weights are rounded coarsely
    for name, parameter in moving.named_parameters():
        parameter.requires_grad_("embeddings" not in name)
    for _ in range(3):
        step = sent(moving, TEXTS, LABELS)
        with torch.no_grad():
            for name, parameter in moving.named_parameters():
                if name in step:
                    parameter -= 1e-3 * step[name]
    before = dict(start.named_parameters())
    change = {
        name: (parameter - before[name]).detach()
        for name, parameter in moving.named_parameters()
        if parameter.requires_grad
    }
    found = AttentionPursuit()(Observation(start, change, LocalSteps(1e-3, steps=3)))
    assert only(TEXTS, found)


def test_attention_dropout_blinds_the_witness_and_not_the_search(sent: Callable[..., Any]) -> None:
    texts = [(1, 10, 11, 12, 13, 2), (1, 20, 21, 22, 23, 24, 2), (1, 30, 12, 31, 32, 33, 2)]
    model = encoder(attention_probs_dropout_prob=0.3, hidden_dropout_prob=0.0).train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tensors = sent(model, texts, LABELS)
    found = AttentionPursuit()(Observation(model, tensors))
    assert only(texts, found) and found.facts["check"] == "none but a second token"
    assert model.training


# ------------------------------------------------------------------------------------------------ what gives nothing


def test_another_models_gradient_gives_no_sentence(observed: Observed) -> None:
    observation = observed(encoder(), TEXTS, LABELS)
    found = AttentionPursuit()(Observation(encoder(seed=9), observation.tensors))
    assert found.texts == ()


@pytest.mark.parametrize("part", ["query", "key"])
def test_shuffled_rows_give_no_sentence(part: str, observed: Observed) -> None:
    """The rows' span, hence the bag, stays; the heads are mixed up."""
    observation = observed(encoder(), TEXTS, LABELS)
    order = torch.randperm(64, generator=Generator().manual_seed(2))
    shuffled: dict[str, Tensor] = {
        name: tensor[order] if f"layer.0.attention.self.{part}" in name else tensor
        for name, tensor in observation.tensors.items()
    }
    found = AttentionPursuit()(Observation(observation.model, shuffled))
    assert found.texts == () and found.tokens == {token for text in TEXTS for token in text}


def test_random_gradients_give_nothing(observed: Observed) -> None:
    observation = observed(encoder(), TEXTS, LABELS)
    generator = Generator().manual_seed(1)
    drawn = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in observation.tensors.items()}
    found = AttentionPursuit()(Observation(observation.model, drawn))
    assert found.texts == () and found.tokens == frozenset()


def test_more_noise_finds_less_and_never_a_false_sentence(observed: Observed) -> None:
    observation = observed(encoder(), TEXTS, LABELS)
    size = float(observation.tensors["bert.encoder.layer.0.attention.self.query.weight"].square().mean().sqrt())
    counts = []
    for noise in (1e-6 * size, 1e-3 * size, size):
        generator = Generator().manual_seed(3)
        noisy = {
            name: tensor + noise * torch.randn(tensor.shape, generator=generator)
            for name, tensor in observation.tensors.items()
        }
        found = AttentionPursuit()(Observation(observation.model, noisy, declared=Declared(noise=noise)))
        assert set(found.texts) <= set(TEXTS) and found.used == ("noise",)
        counts.append(len(found.texts))
    assert counts[0] == 3 and counts[0] >= counts[1] >= counts[2] == 0


def test_a_batch_wider_than_the_model_gives_nothing(observed: Observed) -> None:
    generator = Generator().manual_seed(0)
    texts = [(1, *torch.randint(3, 80, (12,), generator=generator).tolist(), 2) for _ in range(8)]
    found = AttentionPursuit()(observed(encoder(), texts, [0, 1] * 4))
    assert found.texts == () and "width" in str(found.facts["ended"])


def test_the_time_limit_returns_what_there_is(observed: Observed) -> None:
    found = AttentionPursuit()(observed(encoder(), TEXTS, LABELS), seconds=1e-9)
    assert found.stopped == "time limit of 1e-09 s" and set(found.texts) <= set(TEXTS)


# --------------------------------------------------------------------------------------------------------- bad input


def test_what_it_cannot_run_on_is_refused_with_the_way_out(observed: Observed) -> None:
    observation = observed(encoder(), TEXTS, LABELS)
    model, query = observation.model, "bert.encoder.layer.0.attention.self.query.weight"
    without = {name: tensor for name, tensor in observation.tensors.items() if name != query}
    with pytest.raises(InvalidArgument, match=r"query.weight was not sent .* BagOfWords"):
        AttentionPursuit()(Observation(model, without))
    hidden = {**without, query: observation.tensors[query].clone()}
    hidden[query][3, 5] = torch.nan
    with pytest.raises(InvalidArgument, match=r"hidden \(NaN\)"):
        AttentionPursuit()(Observation(model, hidden))
    with pytest.raises(InvalidArgument, match="is zero"):
        AttentionPursuit()(Observation(model, {**without, query: torch.zeros(64, 64)}))
    with pytest.raises(InvalidArgument, match="adam"):
        AttentionPursuit()(Observation(model, observation.tensors, LocalSteps(0.1, optimizer="adam")))
    with pytest.raises(InvalidArgument, match="no transformer"):
        plain = nn.Linear(3, 2)
        AttentionPursuit()(Observation(plain, {"weight": torch.ones(2, 3)}))
    with pytest.raises(InvalidArgument, match="tolerance"):
        AttentionPursuit(tolerance=0.0)
    with pytest.raises(InvalidArgument, match="last_token=-1"):
        AttentionPursuit(last_token=-1)


def test_a_causal_model_is_refused(observed: Observed) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=80, n_embd=48, n_layer=1, n_head=4, n_positions=20, pad_token_id=0)
    with torch.random.fork_rng(devices=[]):
        model = transformers.GPT2ForSequenceClassification(config).eval()
    with pytest.raises(InvalidArgument, match="no encoder"):
        AttentionPursuit()(observed(model, TEXTS, LABELS))


# ------------------------------------------------------------------------------------------------------------ MiniLM


@pytest.mark.parametrize("count", [4, 8])
def test_real_sentences_of_minilm(
    count: int, minilm: tuple[nn.Module, Texts], drawn: Callable[..., tuple[Texts, list[int]]], observed: Observed
) -> None:
    """No labels, lengths, batch size or embedding gradient: the first attention's and the pooler's gradients alone."""
    model, texts = minilm
    batch, labels = drawn(texts, count, seed=11)
    observation = observed(model, batch, labels)
    seen = {n: t for n, t in observation.tensors.items() if "layer.0.attention.self" in n or "pooler" in n}
    found = AttentionPursuit()(Observation(model, seen))
    assert only(batch, found)
    assert found.facts["examples"] == count and found.used == ()


@pytest.mark.parametrize("exponent", range(-8, 1))
def test_under_any_declared_noise_it_ends_and_says_nothing_false(
    exponent: int, sent: Callable[..., dict[str, Tensor]]
) -> None:
    """From noise that hides nothing to noise that hides all but the first position, and then that too."""
    model = encoder()
    texts = [(1, 20, 31, 42, 2), (1, 53, 64, 2)]
    gradients = sent(model, texts, [0, 1])
    scale = 10.0**exponent
    generator = torch.Generator().manual_seed(exponent + 8)
    noised = {name: one + scale * torch.randn(one.shape, generator=generator) for name, one in gradients.items()}
    found = AttentionPursuit()(Observation(model, noised, declared=Declared(noise=scale)), seconds=20)
    assert set(found.texts) <= set(texts)


def test_a_step_that_was_sent_itself_has_no_rounding_of_weights_in_it(sent: Callable[..., dict[str, Tensor]]) -> None:
    """Weights a thousand times larger: their rounding would drown the gradient, had it been a difference of them."""
    model = encoder()
    with torch.no_grad():
        for part in ("query", "key", "value"):
            getattr(model.bert.encoder.layer[0].attention.self, part).weight.mul_(1e3)  # type: ignore[union-attr]
    step = {name: -1e-4 * one for name, one in sent(model, TEXTS, LABELS).items()}
    itself = AttentionPursuit()(Observation(model, step, LocalSteps(1e-4, subtracted=False)))
    difference = AttentionPursuit()(Observation(model, step, LocalSteps(1e-4)))
    assert len(itself.tokens) > len(difference.tokens)
    assert set(itself.texts) <= set(TEXTS) and set(difference.texts) <= set(TEXTS)
    assert OneStep(0.1).local_steps(8).subtracted is False
    assert SGD(0.1).local_steps(8).subtracted is True
