"""Tiny models and tokenizers, saved to folders as a user would have them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

from privfm.contracts import Examples
from privfm.learning import Workbench

WORDS = [f"w{i}" for i in range(40)]


def save_tokenizer(folder: Path) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[EOS]", *WORDS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]", model_max_length=32
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("bert")
    save_tokenizer(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=43, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llama")
    save_tokenizer(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=43, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=32, max_position_embeddings=32,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def sentences() -> list[str]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 12, (60,), generator=generator).tolist()
    return [" ".join(WORDS[i] for i in torch.randint(0, 40, (n,), generator=generator).tolist()) for n in lengths]


def texts(n: int, longest: int, generator: Generator, vocabulary: int = 50) -> list[str]:
    """Whole numbers as words, from 2 of them to `longest`."""
    lengths = torch.randint(2, longest + 1, (n,), generator=generator).tolist()
    return [" ".join(map(str, torch.randint(1, vocabulary, (k,), generator=generator).tolist())) for k in lengths]


def encoded(found: Sequence[str]) -> dict[str, Tensor]:
    """A tokenizer of such texts: each number is its own token, 0 is padding."""
    rows = [torch.tensor([int(word) for word in text.split()]) for text in found]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long()}


def clients(own: Workbench, sizes: Sequence[int]) -> list[Examples]:
    """All examples in their order, the first `sizes[0]` of them the first client's."""
    return [own.everything.take(places) for places in torch.arange(sum(sizes)).split(list(sizes))]


@pytest.fixture(scope="session")
def toys() -> Mapping[str, Any]:
    """Functions by name: tests in importlib mode cannot import each other."""
    return {each.__name__: each for each in (texts, encoded, clients)}
