"""The span search on encoders: whole texts of small batches, and nothing of foreign gradients."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Generator

from privfm.attacks.reconstruction.span import SpanSearch
from privfm.contracts import Observation
from privfm.contracts.reconstruction import Declared

transformers = pytest.importorskip("transformers")

FIRST, LAST = 1, 2


def bert(seed: int = 0) -> Any:
    config = transformers.BertConfig(
        vocab_size=1000,
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=32,
        num_labels=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return transformers.BertForSequenceClassification(config).eval()


def texts_of(count: int, seed: int) -> list[tuple[int, ...]]:
    source = random.Random(seed)
    return [(FIRST, *(source.randrange(5, 1000) for _ in range(source.randint(3, 6))), LAST) for _ in range(count)]


@pytest.mark.parametrize(("count", "seed"), [(1, 11), (2, 12), (2, 13)])
def test_texts_of_small_batches_are_exact(count: int, seed: int, observed: Any) -> None:
    texts = texts_of(count, seed)
    found = SpanSearch()(observed(bert(), texts, [row % 2 for row in range(count)]))
    assert Counter(found.texts) == Counter(texts)


def test_what_is_found_of_a_larger_batch_is_true(observed: Any) -> None:
    texts = texts_of(6, seed=14)
    found = SpanSearch(restarts=6)(observed(bert(), texts, [0, 1, 0, 1, 1, 0]))
    assert not set(found.texts) - set(texts)
    assert float(found.facts["prefixes examined"]) > 0  # type: ignore[arg-type]


def test_a_foreign_gradient_tells_nothing(sent: Any) -> None:
    found = SpanSearch()(Observation(bert(), sent(bert(seed=1), texts_of(2, 15), [0, 1])))
    assert found.texts == ()
    assert not found.tokens


@pytest.mark.parametrize("declared", [0.0, 0.3])
def test_a_private_step_tells_nothing(declared: float, sent: Any) -> None:
    model, generator = bert(), Generator().manual_seed(1)
    clean = sent(model, texts_of(1, 16), [1])
    norm = sum(float(one.square().sum()) for one in clean.values()) ** 0.5
    noised = {
        name: one * min(1.0, 1.0 / norm) + 0.3 * torch.randn(one.shape, generator=generator)
        for name, one in clean.items()
    }
    found = SpanSearch()(Observation(model, noised, declared=Declared(noise=declared)))
    assert found.texts == ()
    assert not found.tokens


def test_it_ends_in_time(observed: Any) -> None:
    found = SpanSearch()(observed(bert(), texts_of(2, 17), [0, 1]), seconds=1e-6)
    assert found.stopped
    assert found.texts == ()


def test_starts_follow_the_generator_given(observed: Any) -> None:
    seen = observed(bert(), texts_of(3, 18), [0, 1, 0])
    first, again = (SpanSearch(restarts=4)(seen, generator=Generator().manual_seed(7)) for _ in range(2))
    assert first.texts == again.texts
    assert first.facts == again.facts
