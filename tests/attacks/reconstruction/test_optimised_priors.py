"""Language priors: Kneser-Ney against hand values, the causal model against transformers' own loss."""

from __future__ import annotations

import random
from math import log
from typing import Any

import pytest
import torch

from privfm.attacks.reconstruction.optimised import CausalPrior, NGramPrior
from privfm.checks import InvalidArgument

PUBLIC = [(1, 2, 3), (1, 2, 4)]


def test_kneser_ney_by_hand() -> None:
    """Bigrams: (., 1) and (1, 2) twice, (2, 3) and (2, 4) once, so D = 2 / (2 + 2 * 2) = 1/3. Below, each token ends
    one kind of bigram: D = 4 / 4 = 1, so that all goes to 1/V."""
    prior = NGramPrior.fit(PUBLIC, vocabulary=10, order=2)
    third = 1 / 3
    assert prior.probability(3, (1, 2)) == pytest.approx((1 - third) / 2 + third * 2 / 2 * 0.1)
    assert prior.probability(2, (1,)) == pytest.approx((2 - third) / 2 + third * 1 / 2 * 0.1)
    assert prior.probability(5, (2,)) == pytest.approx(third * 0.1)
    assert prior.probability(3, (9,)) == pytest.approx(0.1)  # a history that never occurred


def test_one_token_by_hand() -> None:
    """Counts 2, 2, 1, 1: D = 2 / (2 + 4), and the rest is spread evenly."""
    prior = NGramPrior.fit(PUBLIC, vocabulary=10, order=1)
    assert prior.probability(1, ()) == pytest.approx((2 - 1 / 3) / 6 + 1 / 3 * 4 / 6 * 0.1)
    assert prior.probability(7, (1, 2)) == pytest.approx(1 / 3 * 4 / 6 * 0.1)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("history", [(), (1,), (1, 2), (2, 1), (8, 9, 9)])
def test_probabilities_sum_to_one(order: int, history: tuple[int, ...]) -> None:
    source = random.Random(0)
    public = [[1, *(source.choice((2, 2, 2, 3, 4, 8)) for _ in range(6))] for _ in range(9)]
    prior = NGramPrior.fit(public, vocabulary=10, order=order)
    every = [prior.probability(token, history) for token in range(10)]
    assert min(every) > 0
    assert sum(every) == pytest.approx(1.0)


def test_where_nothing_occurs_once() -> None:
    prior = NGramPrior.fit([(1, 2), (1, 2)], vocabulary=4, order=2)
    assert 0 < prior.probability(3, (1,)) < prior.probability(2, (1,))
    assert sum(prior.probability(token, (1,)) for token in range(4)) == pytest.approx(1.0)


def test_a_text_is_the_sum_of_its_tokens_and_padding_counts_nothing() -> None:
    prior = NGramPrior.fit(PUBLIC, vocabulary=10)
    tokens = torch.tensor([[1, 2, 3, 7, 7], [1, 2, 4, 3, 2]])
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    found = prior.log_likelihood(tokens, mask)
    by_hand = [sum(log(prior.probability(text[at], text[:at])) for at in range(1, len(text)))
               for text in ((1, 2, 3), (1, 2, 4, 3, 2))]  # fmt: skip
    assert found.tolist() == pytest.approx(by_hand)
    assert prior.surprise(tokens, mask).tolist() == pytest.approx([-by_hand[0] / 2, -by_hand[1] / 4])


def test_it_prefers_real_sentences(minilm: tuple[Any, list[tuple[int, ...]]]) -> None:
    """Sentences that it has not seen, against three other orders of the same tokens each."""
    texts = list(minilm[1])
    random.Random(5).shuffle(texts)
    prior = NGramPrior.fit(texts[60:], vocabulary=30522)
    source, wins = random.Random(6), []
    for text in texts[:60]:
        versions = [text]
        for _ in range(3):
            inside = list(text[1:-1])
            source.shuffle(inside)
            versions.append((text[0], *inside, text[-1]))
        tokens = torch.tensor(versions)
        found = prior.log_likelihood(tokens, torch.ones_like(tokens))
        wins.append(bool(found[0] >= found.max()))
    assert sum(wins) >= 50  # chance: 15


def test_a_causal_model_agrees_with_its_own_loss() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=20, n_embd=16, n_layer=1, n_head=2, n_positions=8, bos_token_id=1, eos_token_id=2
    )
    model = transformers.GPT2LMHeadModel(config).train()
    prior, tokens = CausalPrior(model), torch.tensor([[1, 5, 6, 2], [1, 7, 2, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    found = prior.log_likelihood(tokens, mask)
    assert model.training
    model.eval()
    with torch.no_grad():
        first = float(model(input_ids=tokens[:1], labels=tokens[:1]).loss)
        second = float(model(input_ids=tokens[1:, :3], labels=tokens[1:, :3]).loss)
    assert found.tolist() == pytest.approx([-3 * first, -2 * second], rel=1e-5)
    assert prior.surprise(tokens, mask).tolist() == pytest.approx([first, second], rel=1e-5)


def test_what_cannot_be_fitted() -> None:
    with pytest.raises(InvalidArgument, match="at least one token"):
        NGramPrior.fit([], vocabulary=10)
    with pytest.raises(InvalidArgument, match="from 1 to 12, vocabulary=10"):
        NGramPrior.fit([(1, 12)], vocabulary=10)
    with pytest.raises(InvalidArgument, match="order=0"):
        NGramPrior.fit(PUBLIC, vocabulary=10, order=0)
    with pytest.raises(InvalidArgument, match="counts of 0 lengths"):
        NGramPrior(10, 2, ())
