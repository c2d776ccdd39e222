"""TAG and LAMP: what they use, infer and refuse; hidden entries, adapters, time limits; the model stays as it is."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

from privfm.attacks.reconstruction.optimised import LAMP, TAG, OptimisedAttack
from privfm.attacks.reconstruction.optimised.distances import Cosine
from privfm.attacks.reconstruction.optimised.search import Candidate, Problem
from privfm.attacks.reconstruction.optimised.setting import Tokens, setting
from privfm.checks import InvalidArgument
from privfm.contracts import LocalSteps, Observation, Reconstruction

transformers = pytest.importorskip("transformers")

Sent = Callable[..., dict[str, Tensor]]
TEXTS = [(1, 7, 12, 30, 9, 2), (1, 25, 7, 2)]
ONE = [(1, 33, 8, 51, 19, 2)]
QUICK: dict[str, Any] = {"first": 1, "last": 2, "iterations": 3, "candidates": 2, "moves": 4, "move_every": 2}


def _bert(kind: str = "BertForSequenceClassification", **more: Any) -> nn.Module:
    config = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_labels": 3}
    config |= {"intermediate_size": 64, "max_position_embeddings": 20, "initializer_range": 0.1, **more}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        built: nn.Module = getattr(transformers, kind)(transformers.BertConfig(**config))
    return built.eval()


def _gpt2(kind: str = "GPT2LMHeadModel", **more: Any) -> nn.Module:
    config = {"vocab_size": 60, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 20, "initializer_range": 0.1}
    config |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **more}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        built: nn.Module = getattr(transformers, kind)(transformers.GPT2Config(**config))
    return built.eval()


def _right(problem: Problem, texts: list[tuple[int, ...]], labels: list[int]) -> Candidate:
    """What the client has."""
    tokens = torch.zeros_like(problem.given.mask)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = torch.tensor(text)
    table = problem.given.imitation.embedding
    hot = nn.functional.one_hot(torch.tensor(labels), problem.given.imitation.classes).to(table)
    return Candidate(table[tokens], (hot - 1) * 1e6)


# ------------------------------------------------------------------------------------------- knowledge and refusals


def test_one_text_needs_no_lengths_and_no_label(sent: Sent) -> None:
    model = _bert()
    found = LAMP(**QUICK)(Observation(model, sent(model, ONE, [2])).told(examples=1))
    assert found.labels == (2,)
    assert [len(text) for text in found.texts] == [6]
    assert found.used == ("examples",)
    assert found.facts["lengths"] == "read off the position embedding's gradient"
    assert found.facts["labels"] == "read off the head"


def test_the_label_of_one_text_from_the_heads_weight_alone(sent: Sent) -> None:
    model = _bert()
    tensors = _without(sent(model, ONE, [2]), "classifier.bias")
    found = TAG(first=1, last=2, iterations=1)(Observation(model, tensors).told(lengths=(6,)))
    assert found.labels == (2,)
    assert found.facts["labels"] == "read off the head"


def test_the_length_of_one_text_of_a_language_model(sent: Sent) -> None:
    """Its last token predicts nothing: the position is reached by no loss."""
    model = _gpt2()
    found = TAG(first=1, last=2, iterations=1)(Observation(model, sent(model, ONE)).told(examples=1))
    assert [len(text) for text in found.texts] == [6]


def test_labels_that_nobody_told_are_optimised(sent: Sent) -> None:
    """Two texts of the same label: an attack that only kept its random start would be right one time in nine."""
    model = _bert()
    observation = Observation(model, sent(model, TEXTS, [2, 2])).told(lengths=(6, 4))
    found = LAMP(first=1, last=2, variant="absolute", iterations=80, candidates=3, moves=0)(observation)
    assert found.labels == (2, 2)
    assert found.facts["labels"] == "optimised"
    assert found.used == ("lengths",)


def test_all_that_was_declared_and_used_is_said(sent: Sent) -> None:
    model = _bert()
    told = Observation(model, sent(model, TEXTS, [0, 2])).told(examples=2, lengths=(6, 4), labels=torch.tensor([2, 0]))
    found = LAMP(**QUICK)(told)
    assert found.used == ("examples", "lengths", "labels")
    assert found.labels is not None
    assert sorted(found.labels) == [0, 2]
    assert sorted(map(len, found.texts)) == [4, 6]
    assert all(text[0] == 1 and text[-1] == 2 for text in found.texts)
    assert not {0, 1, 2} & {token for text in found.texts for token in text[1:-1]}


def test_labels_are_not_said_to_be_used_by_a_language_model(sent: Sent) -> None:
    model = _gpt2()
    told = Observation(model, sent(model, ONE)).told(lengths=(6,), labels=torch.tensor([1]))
    assert TAG(first=1, last=2, iterations=1)(told).used == ("lengths",)


def test_the_embeddings_gradient_leaves_its_bag_of_words(sent: Sent) -> None:
    model = _bert()
    observation = Observation(model, sent(model, TEXTS, [0, 1])).told(lengths=(6, 4))
    attack = LAMP(**QUICK, embedding_gradient=True)
    found = attack(observation)
    assert found.facts["tokens allowed"] == 5
    assert found.tokens <= {1, 2, 7, 12, 30, 9, 25}
    hidden = dict(observation.tensors)
    name = "bert.embeddings.word_embeddings.weight"
    hidden[name] = hidden[name].clone().index_fill(0, torch.tensor([50, 51]), torch.nan)
    assert attack(dataclasses.replace(observation, tensors=hidden)).facts["tokens allowed"] == 7
    assert "embedding" in attack.needs[-1]


def test_a_vocabulary_of_ones_own(sent: Sent) -> None:
    model = _bert()
    found = LAMP(**QUICK, vocabulary=(5, 6))(Observation(model, sent(model, ONE, [0])).told(lengths=(6,)))
    assert set(found.texts[0][1:-1]) <= {5, 6}


def _without(tensors: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if part not in name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda o: o.told(), "number of texts and their lengths"),
        (lambda o: o.told(examples=2), "needs the lengths"),
        (lambda o: dataclasses.replace(o, tensors=_without(dict(o.tensors), "position")).told(examples=1), "told"),
        (lambda o: o.told(lengths=()), "expected one >= 1"),
        (lambda o: o.told(lengths=(6, 0)), "expected one >= 1"),
        (lambda o: o.told(lengths=(6, 4), examples=3), "examples=3 and 2 lengths"),
        (lambda o: o.told(lengths=(21,)), "at most 20 tokens"),
        (lambda o: o.told(lengths=(2,)), "nothing is left"),
        (lambda o: o.told(lengths=(6, 4), labels=torch.tensor([1])), "for each of 2 texts"),
        (lambda o: o.told(lengths=(6, 4), labels=torch.tensor([1, 3])), "one of 3"),
        (lambda o: dataclasses.replace(o, change=LocalSteps(0.1, optimizer="adam")).told(lengths=(6,)), "adam"),
        (lambda o: dataclasses.replace(o, tensors={n: t * 0 for n, t in o.tensors.items()}).told(lengths=(6,)), "zero"),
        (
            lambda o: dataclasses.replace(o, tensors={n: t for n, t in o.tensors.items() if "word_emb" in n}).told(
                lengths=(6,)
            ),
            "bag of words",
        ),
    ],
)
def test_what_is_missing_is_refused_with_the_way_out(sent: Sent, change: Any, message: str) -> None:
    model = _bert()
    observation = change(Observation(model, sent(model, TEXTS, [0, 1])))
    attack = LAMP(**QUICK)
    assert message in attack.refusal(observation)
    with pytest.raises(InvalidArgument, match="LAMP"):
        attack(observation)


def test_noise_on_a_position_embedding_hides_the_length(sent: Sent) -> None:
    model = _bert()
    generator = Generator().manual_seed(0)
    noisy = {name: tensor + 1e-3 * torch.randn(tensor.shape, generator=generator)
             for name, tensor in sent(model, ONE, [0]).items()}  # fmt: skip
    assert "without noise" in TAG(first=1, last=2).refusal(Observation(model, noisy).told(examples=1))


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (LAMP(first=60), "first=60"),
        (TAG(last=-1), "last=-1"),
        (LAMP(vocabulary=(3, 60)), "vocabulary"),
        (LAMP(vocabulary=()), "vocabulary"),
    ],
)
def test_tokens_that_the_model_does_not_have(sent: Sent, attack: OptimisedAttack, message: str) -> None:
    model = _bert()
    assert message in attack.refusal(Observation(model, sent(model, ONE, [0])).told(lengths=(6,)))


def test_losses_that_nobody_can_imitate(sent: Sent) -> None:
    masked = _bert("BertForMaskedLM")
    assert "masked" in TAG().refusal(Observation(masked, sent(masked, ONE)).told(lengths=(6,)))
    bare = _bert("BertModel")
    weights = {name: torch.ones_like(weight) for name, weight in bare.named_parameters()}
    assert "head" in TAG().refusal(Observation(bare, weights).told(lengths=(6,)))


def test_a_batch_for_a_model_without_padding(sent: Sent) -> None:
    model = _gpt2("GPT2ForSequenceClassification", pad_token_id=None, num_labels=2)
    observation = Observation(model, sent(model, ONE, [0]))
    assert "pad_token_id" in TAG().refusal(observation.told(lengths=(6, 6)))
    assert TAG().refusal(observation.told(lengths=(6,))) == ""


def test_the_bag_of_a_language_model_is_refused(sent: Sent) -> None:
    """Its embedding is the head too: every row of its gradient is full."""
    model = _gpt2()
    observation = Observation(model, sent(model, ONE)).told(lengths=(6,))
    assert "embedding_gradient" in LAMP(embedding_gradient=True).refusal(observation)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LAMP(variant="l2"), "variant"),  # type: ignore[arg-type]
        (lambda: LAMP(iterations=0), "iterations"),
        (lambda: LAMP(candidates=0), "candidates"),
        (lambda: LAMP(moves=-1), "moves"),
        (lambda: LAMP(burn_in=2.0), "burn_in"),
        (lambda: LAMP(penalty=-1.0), "penalty"),
        (lambda: LAMP(decay=0.0), "decay"),
        (lambda: TAG(learning_rate=0.0), "learning_rate"),
        (lambda: TAG(iterations=0), "iterations"),
        (lambda: TAG(absolute=-0.1), "absolute"),
    ],
)
def test_bad_settings(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        make()


# ------------------------------------------------------------------------------------------ what is seen, and time


def test_hidden_entries_and_tensors_not_sent_are_not_matched(sent: Sent) -> None:
    """Nine in ten entries and a whole block hidden: zero at the truth, and one text is still found."""
    model = _gpt2()
    generator = Generator().manual_seed(0)
    hidden = {name: tensor.masked_fill(torch.rand(tensor.shape, generator=generator) < 0.9, torch.nan)
              for name, tensor in _without(sent(model, ONE), "h.1.").items()}  # fmt: skip
    observation = Observation(model, hidden).told(lengths=(6,))
    found = LAMP(first=1, last=2, iterations=250, candidates=10, moves=12, move_every=40)(observation)
    assert found.texts == (ONE[0],)


def test_adapters_alone(sent: Sent) -> None:
    """LoRA gradients of a PEFT model, past the first step: zero at the truth only."""
    peft = pytest.importorskip("peft")
    base = _bert()
    with torch.random.fork_rng():
        torch.manual_seed(3)
        config = peft.LoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS")
        model = peft.get_peft_model(base, config).eval()
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.data.normal_(0, 0.05)
    tensors = {name: tensor for name, tensor in sent(model, TEXTS, [0, 1]).items() if "lora" in name}
    assert len(tensors) == 8
    observation = Observation(model, tensors).told(lengths=(6, 4), labels=torch.tensor([0, 1]))
    problem = Problem(setting(observation, Tokens(1, 2)), Cosine())
    right = _right(problem, TEXTS, [0, 1])
    assert abs(float(problem.loss(right))) < 1e-5
    other = dataclasses.replace(right, embeddings=problem.with_special_tokens(right.embeddings.roll(1, 0)))
    assert float(problem.loss(other)) > 1e-3
    assert len(LAMP(**QUICK)(observation).texts) == 2


@pytest.mark.parametrize("attack", [LAMP(first=1, last=2), TAG(first=1, last=2)])
def test_a_time_limit_ends_it_with_the_best_so_far(sent: Sent, attack: OptimisedAttack) -> None:
    model = _bert()
    told: list[float] = []
    observation = Observation(model, sent(model, TEXTS, [0, 1])).told(lengths=(6, 4))
    found: Reconstruction = attack(observation, seconds=0.4, progress=lambda what, share: told.append(share))
    assert found.stopped == "time limit of 0.4 s"
    assert sorted(map(len, found.texts)) == [4, 6]
    assert told
    assert all(0 <= share <= 1 for share in told)


def test_a_time_limit_within_the_descent(sent: Sent) -> None:
    model = _bert()
    attack = LAMP(first=1, last=2, candidates=1, iterations=10**6, decay=1.0, moves=1)
    found = attack(Observation(model, sent(model, ONE, [0])).told(lengths=(6,)), seconds=1.0)
    assert found.stopped
    assert 0 < float(found.facts["steps"]) < 10**6
    assert float(found.facts["loss"]) < 1


@pytest.mark.parametrize("attack", [LAMP(**QUICK), TAG(first=1, last=2, iterations=2)])
@pytest.mark.parametrize("make", [_bert, _gpt2])
def test_the_model_stays_as_it_is(sent: Sent, make: Callable[[], nn.Module], attack: OptimisedAttack) -> None:
    model: Any = make()
    tensors = sent(model, ONE, [0] if make is _bert else None)
    model.train()
    frozen = next(iter(model.parameters())).requires_grad_(False)
    before, attention = copy.deepcopy(model.state_dict()), model.config._attn_implementation
    cache = model.config.use_cache if hasattr(model.config, "use_cache") else None
    sent_before = {name: tensor.clone() for name, tensor in tensors.items()}
    attack(Observation(model, tensors).told(lengths=(6,)))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(tensor, sent_before[name]) for name, tensor in tensors.items())
    assert model.config._attn_implementation == attention != "eager"
    assert (model.config.use_cache if hasattr(model.config, "use_cache") else None) == cache
    assert all(module.training for module in model.modules())
    assert not frozen.requires_grad
    assert all(weight.grad is None for weight in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
