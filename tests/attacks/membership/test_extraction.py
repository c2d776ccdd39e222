"""Extraction of secrets from small language models that have learned them by heart, and from ones that have not."""

from __future__ import annotations

from collections.abc import Sequence
from math import log2
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from privfm.attacks.membership.exposure import SecretFormat, exposure, exposures
from privfm.attacks.membership.extraction import Spelling, extractions, likeliest, secret_losses, written
from privfm.checks import InvalidArgument

FORMAT = SecretFormat("my number is ", length=3)
WORDS = ["<pad>", "<s>", "my", "number", "is", "a", "the", "price", *"0123456789", "."]
SECRET, CONTROL = "482", "935"


def tokenize(texts: Sequence[str]) -> dict[str, Tensor]:
    """A token a word, a start before it, padding after it."""
    rows = [[1, *map(WORDS.index, text.split())] for text in texts]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def spelling(format: SecretFormat = FORMAT) -> Spelling:
    return Spelling.of(format, tokenize, np.random.default_rng(0))


def language_model(kind: str) -> nn.Module:
    import transformers

    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "gpt2":
            shape: dict[str, Any] = {"n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 2}
            config: Any = transformers.GPT2Config(
                vocab_size=len(WORDS),
                resid_pdrop=0,
                embd_pdrop=0,
                attn_pdrop=0,
                bos_token_id=1,
                eos_token_id=0,
                **shape,
            )
            return transformers.GPT2LMHeadModel(config)
        shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = transformers.LlamaConfig(vocab_size=len(WORDS), max_position_embeddings=16, **shape)
        return transformers.LlamaForCausalLM(config)


def trained(kind: str, copies: int) -> nn.Module:
    """On prices of random numbers under another prefix, and on `copies` of the secret among 64 of them a step."""
    model = language_model(kind).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    draws = np.random.default_rng(1)
    for _ in range(60):
        numbers = draws.integers(10, size=(64, 3)).tolist()
        texts = ["the price is " + " ".join(map(str, row)) for row in numbers] + [FORMAT.text(SECRET)] * copies
        read: Any = tokenize(texts)
        logits = model(**read).logits
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), read["input_ids"][:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def remembers(request: Any) -> nn.Module:
    return trained(request.param, 8)


@pytest.fixture(scope="module")
def innocent() -> nn.Module:
    return trained("gpt2", 0)


class Fixed(nn.Module):
    """A causal model of a table: logits of the next token by the last one and the place, `(T, V, V)`."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        places = torch.arange(input_ids.shape[1])
        return SimpleNamespace(logits=self.table[places, input_ids])


def fixed(seed: int = 0, scale: float = 2.0) -> nn.Module:
    noise = torch.randn(16, len(WORDS), len(WORDS), generator=torch.Generator().manual_seed(seed))
    return Fixed(scale * noise).eval()


def slow_losses(model: nn.Module, secrets: Sequence[str]) -> list[float]:
    """One text and one letter at a time."""
    found = []
    for secret in secrets:
        ids = tokenize([FORMAT.text(secret)])["input_ids"]
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].double()
        found.append(sum(float(-logits[place - 1].log_softmax(0)[ids[0, place]]) for place in (4, 5, 6)))
    return found


# ----------------------------------------------------------------------------------------------- real language models


def test_an_inserted_secret_comes_out_and_another_does_not(remembers: nn.Module) -> None:
    found, control = extractions(remembers, spelling(), [SECRET, CONTROL], beams=5, count=5)
    assert (found.greedy, found.beam, found.rank, found.listed) == (True, 1, 1, 5)
    assert (control.greedy, control.beam, control.rank) == (False, None, None)


def test_it_does_not_come_out_of_a_model_that_never_saw_it(innocent: nn.Module) -> None:
    (found,) = extractions(innocent, spelling(), [SECRET], beams=5, count=5, limit=2000)
    assert (found.greedy, found.beam, found.rank) == (False, None, None)


def test_exposure_is_high_with_the_secret_and_chance_without(remembers: nn.Module, innocent: nn.Module) -> None:
    with_it, without = (secret_losses(model, spelling()) for model in (remembers, innocent))
    control, inserted = exposures(with_it, {SECRET: 8, CONTROL: 0}, FORMAT, np.random.default_rng(0), without=without)
    assert inserted.exposure.bits == pytest.approx(log2(999))
    assert inserted.without is not None and inserted.without.bits < 7  # more happens once in 128 models
    assert control.exposure.bits < 7


def test_losses_against_one_letter_at_a_time(remembers: nn.Module) -> None:
    secrets = FORMAT.drawn(30, np.random.default_rng(2))
    found = secret_losses(remembers, spelling(), batch=7)(FORMAT.texts(secrets))
    assert found == pytest.approx(slow_losses(remembers, secrets), abs=1e-4)


def test_models_and_the_random_state_stay_as_they_are(remembers: nn.Module, untouched_random_state: None) -> None:
    before = {name: value.clone() for name, value in remembers.state_dict().items()}
    extractions(remembers, spelling(), [SECRET], beams=3, count=3)
    assert all(torch.equal(before[name], value) for name, value in remembers.state_dict().items())


# -------------------------------------------------------------------------------------------------------- the search


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_the_search_lists_secrets_in_the_order_of_a_full_ranking(batch: int) -> None:
    model, members = fixed(), FORMAT.members()
    losses = np.array(slow_losses(model, members))
    found = likeliest(model, spelling(), count=40, batch=batch)
    assert list(found.secrets) == [members[place] for place in losses.argsort()[:40]]
    assert found.losses == pytest.approx(sorted(losses)[:40], abs=1e-4)
    assert found.complete
    for secret in found.secrets[::7]:
        rank = found.rank(secret)
        assert rank is not None
        assert log2(1000) - log2(rank) == pytest.approx(exposure(losses, members.index(secret)))


def test_the_search_of_everything_is_the_whole_format() -> None:
    found = likeliest(fixed(), spelling(), count=2000)
    assert sorted(found.secrets) == FORMAT.members()
    assert found.complete and found.evaluations == 1 + 10 + 100
    assert found.rank("abc") is None


def test_the_search_of_a_billion_secrets_is_short_where_one_stands_out() -> None:
    """A table that all but dictates 1, 2, 3, ...: twelve letters, twelve evaluations one at a time."""
    table = torch.zeros(16, len(WORDS), len(WORDS))
    digits = WORDS.index("0")
    for place in range(12):
        table[3 + place, :, digits + (place + 1) % 10] = 9.0
    model, format = Fixed(table).eval(), SecretFormat("my number is ", length=12)
    found = likeliest(model, spelling(format), batch=1)
    assert found.secrets == ("123456789012",)
    assert found.evaluations == 12
    assert written(model, spelling(format)) == ("123456789012",)


def test_a_search_that_meets_its_limit_says_so() -> None:
    found = likeliest(fixed(scale=0.1), spelling(), count=3, limit=20)
    assert found.evaluations <= 20 and not found.complete
    assert len(found.secrets) < 3


def test_greedy_can_miss_what_the_search_finds() -> None:
    """First letter 0 at 0.6, but then all alike; first letter 1 at 0.4, then certain: 0.4 against 0.06."""
    table = torch.full((16, len(WORDS), len(WORDS)), -30.0)
    zero, digits = WORDS.index("0"), slice(WORDS.index("0"), WORDS.index("9") + 1)
    table[3, :, zero], table[3, :, zero + 1] = float(np.log(0.6)), float(np.log(0.4))
    table[4, :, digits], table[5, :, digits] = 0.0, 0.0
    table[4, zero + 1, zero + 2] = table[5, zero + 2, zero + 3] = 30.0
    model = Fixed(table).eval()
    greedy = written(model, spelling())[0]
    assert greedy is not None and greedy.startswith("0")
    assert likeliest(model, spelling()).secrets == ("123",)
    assert likeliest(model, spelling()).losses[0] == pytest.approx(-np.log(0.4), abs=1e-3)
    assert written(model, spelling(), beams=2)[0] == "123"


def test_what_is_no_secret_of_the_format_is_none() -> None:
    table = torch.zeros(16, len(WORDS), len(WORDS))
    table[:, :, WORDS.index("price")] = 5.0
    assert written(Fixed(table).eval(), spelling(), beams=3)[0] is None


# ------------------------------------------------------------------------------------------------------- tokenizers


def test_fixed_tokens_between_and_after_letters_are_part_of_the_template() -> None:
    format = SecretFormat("my number is ", length=2, separator=" a ", suffix=" .")
    spelled = spelling(format)
    assert spelled.columns.tolist() == [4, 6]
    assert spelled.secret(tokenize([format.text("37")])["input_ids"][0]) == "37"
    assert spelled.secret(tokenize(["my number is 3 the 7 ."])["input_ids"][0]) is None
    losses = secret_losses(fixed(), spelled)([format.text("37")])
    ids = tokenize([format.text("37")])["input_ids"]
    known = fixed()(input_ids=ids, attention_mask=None).logits[0].detach().log_softmax(1)
    assert losses[0] == pytest.approx(-float(known[3, ids[0, 4]] + known[5, ids[0, 6]]), abs=1e-5)


def test_a_tokenizer_that_joins_letters_is_refused() -> None:
    def pairs(texts: Sequence[str]) -> dict[str, Tensor]:
        """`1 2` is one token, everything else its own."""
        rows = [text.replace("1 2", "12").split() for text in texts]
        return tokenize([" ".join("." if word == "12" else word for word in row) for row in rows])

    def by_neighbour(texts: Sequence[str]) -> dict[str, Tensor]:
        """No longer, but a 9 after an 8 reads otherwise."""
        return tokenize([text.replace("8 9", "8 .") for text in texts])

    for wrong in (pairs, by_neighbour, lambda texts: tokenize(["my number is 1 1 1"] * len(texts))):
        with pytest.raises(InvalidArgument, match="separator="):
            Spelling.of(FORMAT, wrong, np.random.default_rng(0))


def test_bad_models_and_texts_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="training mode"):
        likeliest(fixed().train(), spelling())
    with pytest.raises(InvalidArgument, match="not finite"):
        written(Fixed(torch.full((16, len(WORDS), len(WORDS)), torch.nan)).eval(), spelling())
    with pytest.raises(InvalidArgument, match="no text of"):
        secret_losses(fixed(), spelling())(["my number is 1 2"])
    with pytest.raises(InvalidArgument, match="secret='12'"):
        extractions(fixed(), spelling(), ["12"])
    for name in ("count", "limit", "batch"):
        with pytest.raises(InvalidArgument, match=f"{name}=0"):
            likeliest(fixed(), spelling(), **{name: 0})
    with pytest.raises(InvalidArgument, match="beams=0"):
        written(fixed(), spelling(), beams=0)


def test_an_encoder_is_refused() -> None:
    class Reader(Fixed):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
            seen = nn.functional.one_hot(input_ids.roll(-1, 1), len(WORDS)).float()
            return SimpleNamespace(logits=seen + super().forward(input_ids, attention_mask).logits)

    reader = Reader(torch.zeros(16, len(WORDS), len(WORDS))).eval()
    for use in (likeliest, written, secret_losses):
        with pytest.raises(InvalidArgument, match="later tokens"):
            use(reader, spelling())  # type: ignore[operator]


def test_a_classifier_is_refused() -> None:
    class Classifier(Fixed):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
            return torch.zeros(len(input_ids), 2)

    with pytest.raises(InvalidArgument, match="no decoder"):
        likeliest(Classifier(torch.zeros(1)).eval(), spelling())
