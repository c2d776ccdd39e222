"""Bags of words from spans and from embedding gradients, against the texts that made them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

from privfm.attacks.reconstruction.bags import (
    BagOfWords,
    _ball,
    bag_of_embedding,
    bag_of_span,
    input_gradients,
    span_under_noise,
    token_directions,
)
from privfm.attacks.reconstruction.subspace import row_space
from privfm.attacks.reconstruction.text_models import text_model
from privfm.checks import InvalidArgument
from privfm.contracts import Declared, LocalSteps, Observation

TEXTS = [(1, 7, 9, 30, 2), (1, 30, 7, 41, 55, 2), (1, 12, 2)]
WORDS = {1, 2, 7, 9, 12, 30, 41, 55}
Observed = Callable[..., Observation]


def lively(model: nn.Module) -> nn.Module:
    """Norms and biases of a fresh model are ones and zeros: others, so that a formula without them fails."""
    generator = Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def model_of(kind: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        if kind == "bert":
            config = transformers.BertConfig(
                vocab_size=80,
                hidden_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=64,
                max_position_embeddings=20,
            )
            return lively(transformers.BertForSequenceClassification(config))
        if kind == "gpt2":
            config = transformers.GPT2Config(
                vocab_size=80, n_embd=48, n_layer=2, n_head=4, n_positions=20, pad_token_id=0
            )
            return lively(transformers.GPT2ForSequenceClassification(config))
        config = transformers.LlamaConfig(
            vocab_size=80,
            hidden_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=64,
            pad_token_id=0,
        )
        return lively(transformers.LlamaForSequenceClassification(config))


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_the_span_of_the_first_attention_tells_every_token_and_no_other(kind: str, observed: Observed) -> None:
    observation = observed(model_of(kind), TEXTS, [0, 1, 1])
    text = text_model(observation.model)
    basis, _ = row_space(input_gradients(text.block(0), observation.gradients))
    bag = bag_of_span(text, basis, positions=8)
    assert set(bag.tokens) == WORDS
    assert bag.margin > 100 and bag.worst < 1e-3 < bag.left_out
    assert bag.free > 0 and bag.by_chance < 1e-6
    assert BagOfWords(positions=8)(observation).tokens == WORDS


def test_a_member_is_told_whatever_its_position_because_positions_are_taken_out() -> None:
    """One input row at position p spans a line; modulo positions and shift it names its token."""
    text = text_model(model_of("bert"))
    for position in (0, 3, 7):
        row = text.first_inputs(torch.tensor([33]), torch.tensor([position]))
        assert bag_of_span(text, row / row.norm(), positions=8).tokens == (33,)
    late = text.first_inputs(torch.tensor([33]), torch.tensor([12]))
    assert bag_of_span(text, late / late.norm(), positions=8).tokens == ()  # beyond the positions that were allowed


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_span_as_wide_as_the_input_names_nobody(kind: str) -> None:
    text = text_model(model_of(kind))
    bag = bag_of_span(text, torch.eye(48, dtype=torch.float64), positions=4)
    assert bag.tokens == () and bag.free == 0 and bag.by_chance == 80


def test_the_chance_of_a_false_member_is_what_random_directions_do() -> None:
    """Against counting: directions of a Gaussian, few of them left open, a wide tolerance."""
    vectors = torch.randn(200_000, 40, generator=Generator().manual_seed(0), dtype=torch.float64)
    for free, tolerance in ((1, 0.01), (2, 0.03), (3, 0.04)):
        away = vectors[:, :free].norm(dim=1) / vectors.norm(dim=1)
        assert _ball(free, 40, tolerance) == pytest.approx(float((away < tolerance).double().mean()), rel=0.1)


def test_rows_without_a_direction_are_never_taken() -> None:
    model = model_of("bert")
    text = text_model(model)
    assert float(token_directions(text, torch.tensor([0])).norm()) == 0  # padding's row of a fresh model
    row = text.first_inputs(torch.tensor([5]), torch.tensor([1]))
    assert bag_of_span(text, row / row.norm(), positions=2).tokens == (5,)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_rows_of_the_embedding_gradient_that_are_not_zero(kind: str, observed: Observed) -> None:
    observation = observed(model_of(kind), TEXTS, [0, 1, 1])
    assert BagOfWords(source="embedding")(observation).tokens == WORDS


def test_noise_on_the_embedding_gradient_hides_rows_and_makes_up_none(observed: Observed) -> None:
    observation = observed(model_of("bert"), TEXTS, [0, 1, 1])
    text = text_model(observation.model)
    clean = observation.gradients[text.embedding_name]
    generator = Generator().manual_seed(1)
    least = float(clean.norm(dim=1)[sorted(WORDS)].min())
    found = []
    for noise in (1e-3 * least, 1e6 * least):
        noisy = clean + noise * torch.randn(clean.shape, generator=generator)
        found.append(set(bag_of_embedding(text, noisy, noise).tokens))
        with pytest.raises(InvalidArgument, match=r"no row .* is zero"):  # not told of it, every row would count
            bag_of_embedding(text, noisy)
    assert found == [WORDS, set()]


def test_a_tied_embedding_is_refused_with_the_way_out(observed: Observed) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=80, n_embd=48, n_layer=1, n_head=4, n_positions=20)
    with torch.random.fork_rng(devices=[]):
        observation = observed(transformers.GPT2LMHeadModel(config).eval(), TEXTS)
    with pytest.raises(InvalidArgument, match=r"tied .* source='span'"):
        BagOfWords(source="embedding")(observation)
    with pytest.raises(InvalidArgument, match="tied"):
        text = text_model(observation.model)
        bag_of_embedding(text, observation.gradients[text.embedding_name])
    # A last token predicts nothing, and nothing after it looks at it: a language model's loss has no trace of it.
    assert BagOfWords(positions=8)(observation).tokens == WORDS - {2}


def test_an_adapter_of_enough_rank_tells_the_same(observed: Observed) -> None:
    peft = pytest.importorskip("peft")
    options = peft.LoraConfig(r=16, target_modules=["query", "value"], task_type="SEQ_CLS")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model = peft.get_peft_model(model_of("bert"), options).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter += 0.1 * torch.randn(parameter.shape)
    assert BagOfWords(positions=8)(observed(model, TEXTS, [0, 1, 1])).tokens == WORDS


def test_a_foreign_or_shuffled_gradient_names_nobody_of_the_batch(observed: Observed) -> None:
    observation = observed(model_of("bert"), TEXTS, [0, 1, 1])
    order = torch.randperm(48, generator=Generator().manual_seed(2))
    shuffled = {
        name: tensor[:, order] if tensor.shape == (48, 48) else tensor for name, tensor in observation.tensors.items()
    }
    assert BagOfWords(positions=8)(Observation(observation.model, shuffled)).tokens == frozenset()
    drawn = {name: torch.randn(tensor.shape, generator=Generator().manual_seed(7)) for name, tensor in shuffled.items()}
    assert BagOfWords(positions=8)(Observation(observation.model, drawn)).tokens == frozenset()


def test_noise_that_is_declared_widens_the_tolerance_and_drowns_in_the_end(observed: Observed) -> None:
    observation = observed(model_of("bert"), TEXTS, [0, 1, 1])
    weight = text_model(observation.model).block(0).value.weight
    size = float(observation.tensors[weight].square().mean().sqrt())
    generator = Generator().manual_seed(4)

    def under(noise: float) -> Any:
        noisy = {
            name: tensor + noise * torch.randn(tensor.shape, generator=generator)
            for name, tensor in observation.tensors.items()
        }
        return BagOfWords(positions=8)(Observation(observation.model, noisy, declared=Declared(noise=noise)))

    slight, heavy = under(1e-6 * size), under(10 * size)
    assert slight.used == ("noise",) and slight.tokens <= WORDS and len(slight.tokens) >= 4
    assert heavy.tokens == frozenset()


def test_the_span_under_noise_keeps_what_stands_out_of_it() -> None:
    """Two directions of size 1 and one of size 1e-3, noise of 1e-3: the last is lost, the others turn by little."""
    generator = Generator().manual_seed(0)
    rows = torch.linalg.qr(torch.randn(30, 3, generator=generator, dtype=torch.float64))[0].T
    columns = torch.linalg.qr(torch.randn(40, 3, generator=generator, dtype=torch.float64))[0]
    matrix = columns @ torch.diag(torch.tensor([1.0, 0.8, 1e-3], dtype=torch.float64)) @ rows
    noisy = matrix + 1e-3 * torch.randn(40, 30, generator=generator, dtype=torch.float64)
    basis, turned = span_under_noise([noisy], 1e-3)
    assert len(basis) == 2
    assert turned == pytest.approx(1e-3 * math.sqrt(30 - 2) / 0.8, rel=0.02)
    away = (rows[:2] - rows[:2] @ basis.T @ basis).norm(dim=1)
    assert bool((away < 2 * turned).all()) and float(away.max()) > turned / 3


def test_a_change_by_gradient_descent_is_a_gradient_and_adams_is_not(observed: Observed) -> None:
    observation = observed(model_of("bert"), TEXTS, [0, 1, 1])
    change = {name: -0.1 * tensor for name, tensor in observation.tensors.items()}
    assert BagOfWords(positions=8)(Observation(observation.model, change, LocalSteps(0.1))).tokens == WORDS
    with pytest.raises(InvalidArgument, match="adam"):
        BagOfWords()(Observation(observation.model, change, LocalSteps(0.1, optimizer="adam")))


def test_what_is_hidden_or_was_not_sent_is_refused_with_the_way_out(observed: Observed) -> None:
    observation = observed(model_of("bert"), TEXTS, [0, 1, 1])
    text = text_model(observation.model)
    hidden: dict[str, Tensor] = {name: torch.full_like(t, torch.nan) for name, t in observation.tensors.items()}
    with pytest.raises(InvalidArgument, match="no whole gradient"):
        BagOfWords()(Observation(observation.model, hidden))
    with pytest.raises(InvalidArgument, match="source='span'"):
        BagOfWords(source="embedding")(Observation(observation.model, hidden))
    one = {**hidden, text.block(0).value.weight: observation.tensors[text.block(0).value.weight]}
    assert BagOfWords(positions=8)(Observation(observation.model, one)).tokens == WORDS  # one map is enough
    with pytest.raises(InvalidArgument, match="positions=21"):
        bag_of_span(text, torch.eye(48, dtype=torch.float64)[:2], positions=21)
    with pytest.raises(InvalidArgument, match="basis has shape"):
        bag_of_span(text, torch.eye(9), positions=2)
    with pytest.raises(InvalidArgument, match="source='other'"):
        BagOfWords(source="other")  # type: ignore[arg-type]
