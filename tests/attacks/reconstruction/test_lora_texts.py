"""Whole texts from adapters' gradients: the reverse span check on the second block, and the search that it leads."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from privfm.attacks.reconstruction.lora import LoRAReconstruction
from privfm.attacks.reconstruction.lora.greedy import Dictionary
from privfm.attacks.reconstruction.lora.judge import Judge, Layer
from privfm.attacks.reconstruction.lora.moves import Moves
from privfm.attacks.reconstruction.lora.places import Company, likely_positions
from privfm.attacks.reconstruction.lora.rows import adapter_rows
from privfm.attacks.reconstruction.lora.tokens import pursue
from privfm.attacks.reconstruction.text_models import text_model
from privfm.contracts import Observation, Watch

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

TEXTS = [(1, 15, 16, 27, 8, 2), (1, 9, 36, 10, 2), (1, 11, 42, 15, 33, 54, 2)]

Observed = Callable[..., Observation]


def moved(model: nn.Module, seed: int) -> nn.Module:
    """A copy whose adapters are drawn: what some rounds on other data leave."""
    model = deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return model


@pytest.fixture(scope="module")
def bert() -> Any:
    torch.manual_seed(1)
    config = transformers.BertConfig(
        vocab_size=300, hidden_size=96, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=20, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.1,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config).eval()
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["query", "value"]))


@pytest.fixture
def judge(bert: Any, observed: Observed) -> Judge:
    layers = [Layer.of(observed(moved(bert, seed), TEXTS, [0, 1, 1]), None) for seed in (1, 2)]
    return Judge([layer for layer in layers if layer is not None])


def slowly(judge: Judge, texts: list[tuple[int, ...]]) -> float:
    """The mean log of what is left, by projecting on the whole batch's inputs and singular values."""
    logs = []
    for layer in judge.layers:
        inputs = torch.cat([layer.text.inputs(1, torch.tensor([text]))[0].double() for text in texts])
        left = layer.rows.T - inputs.T @ torch.linalg.lstsq(inputs.T, layer.rows.T).solution
        logs.append(float((torch.linalg.svdvals(left).square() + 1e-10).log().mean() / 2))
    return sum(logs) / len(logs)


def test_the_judge_is_the_projection_done_slowly(judge: Judge) -> None:
    judge.settle(TEXTS)
    moves = [
        {0: (1, 16, 15, 27, 8, 2)},
        {1: (1, 9, 36, 2)},
        {0: (1, 9, 16, 27, 8, 2), 1: (1, 15, 36, 10, 2)},
        {2: (1, 11, 42, 15, 33, 2)},
    ]
    for move in moves:
        after = [move.get(number, text) for number, text in enumerate(TEXTS)]
        assert judge.cost(move) == pytest.approx(slowly(judge, after), abs=1e-3)
    assert judge.cost() < -9 < -8 < min(judge.cost(move) for move in moves)


def test_the_truth_alone_leaves_nothing(judge: Judge) -> None:
    assert judge.residual(TEXTS) < 1e-4
    assert judge.residual(TEXTS[:2]) > 0.1
    assert judge.residual([(1, 16, 15, 27, 8, 2), *TEXTS[1:]]) > 1e-3
    assert judge.residual([(1, 77, 78, 79, 2)] * 3) > 0.5
    assert judge.residual([(1, token, token + 1, 2) for token in range(50, 80)]) == 1.0  # 120 tokens span 96 numbers


def test_positions_are_found_where_each_token_stands_once() -> None:
    """Flows of known support: a token at one position sends all of itself there."""
    generator = torch.Generator().manual_seed(4)
    support = [(token, token % 5) for token in range(20)]
    tokens = torch.randn(20, 24, generator=generator, dtype=torch.float64)
    positions = torch.zeros(8, 24, dtype=torch.float64)  # the last three are not reached
    for token, place in support:
        positions[place] += tokens[token]
    shares = likely_positions(tokens, positions)
    assert shares.shape == (20, 5)
    torch.testing.assert_close(shares.sum(1), torch.ones(20, dtype=torch.float64))
    assert [int(row.argmax()) for row in shares] == [place for _, place in support]


def test_company_separates_what_points_apart() -> None:
    generator = torch.Generator().manual_seed(4)
    centres = torch.eye(3, 9, dtype=torch.float64)
    rows = centres.repeat_interleave(7, 0) + 0.1 * torch.randn(21, 9, generator=generator, dtype=torch.float64)
    member = Company(rows).groups(3, generator).view(3, 7)
    assert all(len(set(row.tolist())) == 1 for row in member)
    assert len(set(member[:, 0].tolist())) == 3


def test_moves_keep_every_token_and_both_ends() -> None:
    tokens = sorted({token for text in TEXTS for token in text})
    generator = torch.Generator().manual_seed(4)
    shares = torch.rand(len(tokens), 7, generator=generator, dtype=torch.float64)
    company = Company(torch.randn(len(tokens), 6, generator=generator, dtype=torch.float64))
    moves = Moves(tokens, shares, company, first=1, last=2, random=Random(4))
    moves.settle(TEXTS)
    drawn = [move for _ in range(2000) if (move := moves.draw()) is not None]
    assert len(drawn) > 1000
    for move in drawn:
        after = [move.get(number, text) for number, text in enumerate(TEXTS)]
        assert {token for text in after for token in text} == set(tokens)
        assert all(text[0] == 1 and text[-1] == 2 and 2 <= len(text) <= 7 for text in after)
    assert len({tuple(sorted(move.items())) for move in drawn}) > 200
    assert TEXTS == [(1, 15, 16, 27, 8, 2), (1, 9, 36, 10, 2), (1, 11, 42, 15, 33, 54, 2)]


@pytest.mark.parametrize("told", [True, False], ids=["number told", "number found"])
def test_texts_are_assembled_and_proved(bert: Any, observed: Observed, told: bool) -> None:
    texts = TEXTS[:2]
    observations = [observed(moved(bert, seed), texts, [0, 1]) for seed in (1, 2)]
    if told:
        observations = [one.told(examples=2) for one in observations]
    found = LoRAReconstruction(positions=8)(observations, seconds=40)
    assert sorted(found.texts) == sorted(texts)
    assert found.used == (("examples",) if told else ())
    assert (found.facts["proved"], found.facts["batch size"], found.stopped) == (1.0, 2, "")


def test_no_texts_without_the_second_block_or_the_time(bert: Any, observed: Observed) -> None:
    observation = observed(moved(bert, 1), TEXTS, [0, 1, 1])
    first = {name: one for name, one in observation.tensors.items() if "layer.1." not in name}
    found = LoRAReconstruction(positions=8)(Observation(observation.model, first))
    assert found.texts == ()
    assert found.tokens == {token for text in TEXTS for token in text}
    short = LoRAReconstruction(positions=8)(observation, seconds=0.001)
    assert short.texts == ()
    assert "time limit" in short.stopped


def test_nothing_unproved_is_said_unless_it_is_asked_for(bert: Any, observed: Observed) -> None:
    """Gradients of the second attention from another batch: the tokens are right, but no text explains those rows."""
    observation = observed(moved(bert, 1), TEXTS[:2], [0, 1])
    other = observed(moved(bert, 1), [(1, 70, 71, 72, 2), (1, 80, 81, 2)], [0, 1])
    mixed = {name: other.tensors[name] if "layer.1." in name else one for name, one in observation.tensors.items()}
    mixed_up = replace(observation, tensors=mixed).told(examples=2)
    found = LoRAReconstruction(positions=8, shakes=0)(mixed_up, seconds=3)
    assert (found.texts, found.facts["proved"]) == ((), 0.0)
    assert found.tokens == {token for text in TEXTS[:2] for token in text}
    guessed = LoRAReconstruction(positions=8, shakes=0, unproved=True)(mixed_up, seconds=3)
    assert len(guessed.texts) == guessed.facts["batch size"] > 0
    assert guessed.facts["proved"] == 0.0
    assert {token for text in guessed.texts for token in text} == found.tokens


def test_the_same_seed_gives_the_same(bert: Any, observed: Observed) -> None:
    observation = observed(moved(bert, 1), TEXTS[:1], [0])
    one, two = (LoRAReconstruction(positions=8)(observation) for _ in range(2))
    assert one.texts == two.texts == (TEXTS[0],)
    assert one.facts == two.facts


MiniLM = tuple[nn.Module, list[tuple[int, ...]]]
Sent = Callable[..., dict[str, Tensor]]
Drawn = Callable[..., Any]


@pytest.fixture
def warmed(minilm: MiniLM, drawn: Drawn, sent: Sent) -> Callable[[int], list[Any]]:
    """MiniLM with r = 8 on queries and values, as so many rounds on other sentences begin: three steps, then one each.

    Adapters after a single step are nearly as they were drawn; Adam moves each weight by the learning rate.
    """
    whole, pool = minilm

    def rounds(count: int) -> list[Any]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model: Any = peft.get_peft_model(deepcopy(whole), peft.LoraConfig(r=8, target_modules=["query", "value"]))
        optimizer = torch.optim.Adam([one for name, one in model.named_parameters() if ".lora_" in name], lr=1e-2)
        found = []
        for step in range(2 + count):
            for name, gradient in sent(model, *drawn(pool, 4, 900 + step)).items():
                model.get_parameter(name).grad = gradient
            optimizer.step()
            found.append(deepcopy(model))
        return found[2:]

    return rounds


def test_minilm_bag_of_four_sentences_from_one_round(
    minilm: MiniLM, drawn: Drawn, sent: Sent, warmed: Callable[[int], list[Any]]
) -> None:
    """16 directions, more than 30 tokens of 30 522: by pursuit, in the first round after the adapters have moved."""
    (model,) = warmed(1)
    texts, labels = drawn(minilm[1], 4, 17)
    observation = Observation(model, sent(model, texts, labels))
    found = LoRAReconstruction(texts=False)(observation)
    assert found.tokens == {token for text in texts for token in text}
    assert (found.facts["by"], found.facts["directions"]) == ("pursuit", 16)
    text = text_model(model)
    rows = adapter_rows(text, [observation])
    flipped = pursue(Dictionary(text, 32), replace(rows, rows=rows.rows.flip(1)), Watch())
    assert (flipped.explained, flipped.sure, flipped.residual > 0.5) == (False, frozenset(), True)


def test_minilm_sentences_word_for_word(
    minilm: MiniLM, drawn: Drawn, sent: Sent, warmed: Callable[[int], list[Any]]
) -> None:
    """Two real sentences from two rounds, with nothing declared."""
    texts, labels = drawn(minilm[1], 2, 20)
    found = LoRAReconstruction()([Observation(model, sent(model, texts, labels)) for model in warmed(2)], seconds=60)
    assert sorted(found.texts) == sorted(texts)
    assert (found.facts["proved"], found.used, found.stopped) == (1.0, (), "")


def test_rows_of_value_maps_are_known(bert: Any, observed: Observed) -> None:
    observation = observed(moved(bert, 1), TEXTS, [0, 1, 1])
    sent_rows = adapter_rows(text_model(observation.model), [observation, observation])
    assert sent_rows.of_values.tolist() == ([False] * 4 + [True] * 4) * 2
    torch.testing.assert_close(sent_rows.rows.view(4, 4, -1).flatten(1).norm(dim=1), torch.ones(4, dtype=torch.float64))
