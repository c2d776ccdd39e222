"""The leakage budget counts what autograd really reveals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from privfm.attacks.reconstruction.bags import known_directions
from privfm.attacks.reconstruction.leakage import LeakageBudget
from privfm.attacks.reconstruction.text_models import text_model
from privfm.checks import InvalidArgument

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")


def bert(rank: int | None = 2, modules: tuple[str, ...] = ("query", "value"), warm: bool = True, **more: Any) -> Any:
    """A tiny random encoder under adapters whose B is random, or zero as drawn."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=20, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.3,
    )  # fmt: skip
    model: Any = transformers.BertForSequenceClassification(config).double().eval()
    if rank is not None:
        model = peft.get_peft_model(model, peft.LoraConfig(r=rank, target_modules=list(modules), **more))
        if warm:
            warmed(model)
    return model


def warmed(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if ".lora_B." in name or ".lora_A." in name:
            parameter.data = torch.randn_like(parameter) * 0.5


TEXTS = [(1, 5, 6, 7, 8, 2), (1, 9, 6, 10, 2), (1, 11, 12, 5, 13, 14, 2)]
POSITIONS = 7


def groups() -> int:
    """Connected groups of tokens and positions of TEXTS that meet, by joining labels until nothing changes."""
    edges = [(f"token {token}", f"place {place}") for text in TEXTS for place, token in enumerate(text)]
    label = {node: node for edge in edges for node in edge}
    for _ in label:
        for one, other in edges:
            label[one] = label[other] = min(label[one], label[other])
    return len(set(label.values()))


def rank_of(rows: Tensor) -> int:
    return int(torch.linalg.matrix_rank(rows, rtol=1e-9))


@pytest.mark.parametrize("rounds", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("modules", [("query", "value"), ("query", "key", "value"), ("value",)], ids=str)
def test_directions_are_the_ranks_that_autograd_gives(
    sent: Callable[..., dict[str, Tensor]], modules: tuple[str, ...], rounds: int
) -> None:
    model = bert(modules=modules)
    budget = LeakageBudget.of(model)
    tokens = len({token for text in TEXTS for token in text})
    pairs = tokens + POSITIONS - groups()
    assert pairs <= budget.unknowns(tokens, POSITIONS, "pairs")
    rows = []
    for _ in range(rounds):
        warmed(model)
        gradients = sent(model, TEXTS, [0, 1, 1])
        rows += [gradients[name] for name in budget.readers]
    stacked = torch.cat(rows)
    assert rank_of(stacked) == min(budget.directions(rounds), pairs)
    known = known_directions(text_model(model), POSITIONS)
    assert known is not None
    basis = torch.linalg.qr(known.T)[0].T
    assert rank_of(stacked - (stacked @ basis.T) @ basis) == min(budget.directions(rounds), tokens)


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_rank_and_rounds_needed_are_two_r_t(rank: int) -> None:
    budget = LeakageBudget.of(bert(rank))
    assert budget.per_round == 2 * rank
    assert budget.directions(3) == min(6 * rank, 32)
    needed = budget.rounds_needed(12, 7, "pairs")
    assert needed is not None
    assert budget.directions(needed) >= 12 + 7 - 1 > budget.directions(needed - 1)  # the 2 r T


def test_first_round_is_silent_while_b_is_zero() -> None:
    budget = LeakageBudget.of(bert(warm=False))
    assert (budget.silent, budget.directions(1), budget.directions(2)) == (1, 0, 4)
    assert "B is 0 in the first round" in budget.verdict(1, 12, 7)
    assert "first round shows none" in budget.describe(3)
    assert LeakageBudget.of(bert()).silent == 0


def test_full_gradients_reveal_the_width_at_once() -> None:
    model = bert(None)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("embeddings" not in name)
    budget = LeakageBudget.of(model)
    assert (budget.per_round, budget.silent, budget.directions(1), budget.directions(9)) == (32, 0, 32, 32)
    assert "whole span" in budget.verdict(1, 12, 7)
    assert "can not be told apart" in budget.verdict(1, 30, 7)
    assert budget.rounds_needed(30, 7) is None


def test_trained_embeddings_do_not_add_up() -> None:
    model = bert()
    text_model(model).embedding.weight.requires_grad_(True)
    budget = LeakageBudget.of(model)
    assert not budget.accumulates
    assert budget.directions(5) == budget.directions(1) == 4
    assert budget.rounds_needed(12, 7) is None
    assert "do not add up" in budget.describe(5)


def test_frozen_a_shows_r_numbers_a_token(sent: Callable[..., dict[str, Tensor]]) -> None:
    """FFA-LoRA: B's gradient is `Delta^T (X A^T)`, so that its rank is at most r whatever the batch."""
    model = bert(3)
    for name, parameter in model.named_parameters():
        if ".lora_A." in name:
            parameter.requires_grad_(False)
    budget = LeakageBudget.of(model)
    assert (budget.per_round, budget.projected, budget.directions(4)) == (0, 6, 0)
    assert "A is frozen" in budget.verdict(4, 12, 7)
    gradients = sent(model, TEXTS, [0, 1, 1])
    assert not any(".lora_A." in name for name in gradients)
    b = next(tensor for name, tensor in gradients.items() if ".lora_B." in name and "layer.0" in name)
    assert rank_of(b) == 3


def test_adapters_of_other_inputs_do_not_count() -> None:
    later = LeakageBudget.of(bert(layers_to_transform=[1]))
    assert (later.per_round, len(later.others)) == (0, 2)
    assert "nothing that reads block 0's input is trained" in later.verdict(3, 12, 7)
    output = LeakageBudget.of(bert(modules=("value", "dense")))  # attention's output and both of the MLP
    assert output.per_round == 2
    assert len(output.readers) == 1


def test_fused_and_rotary_decoders() -> None:
    torch.manual_seed(0)
    gpt = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2))
    gpt = peft.get_peft_model(gpt, peft.LoraConfig(r=3, target_modules=["c_attn"], fan_in_fan_out=True))
    fused = LeakageBudget.of(gpt)
    assert (fused.per_round, fused.unknowns(10, 6, "pairs")) == (3, 15)  # one adapter for all three maps
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    llama = peft.get_peft_model(
        transformers.LlamaForCausalLM(config), peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj", "o_proj"])
    )
    rotary = LeakageBudget.of(llama)
    assert (rotary.per_round, rotary.unknowns(10, 6, "pairs")) == (6, 10)  # no positions in the inputs
    assert rotary.room(6) == 15


def test_verdicts_grow_with_rounds() -> None:
    budget = LeakageBudget(16, 1, 384, True, True, 0, ("q", "v"), ())
    words = [budget.verdict(rounds, 40, 14) for rounds in range(1, 6)]
    assert "no direction" in words[0]
    assert "no protection" in words[1] and "no protection" in words[2]
    assert "by membership" in words[3]
    assert "whole span" in words[4]
    assert "80 of 384 in 6 rounds" in budget.describe(6)


def test_bad_input() -> None:
    budget = LeakageBudget(16, 1, 384, True, True, 0, ("q", "v"), ())
    with pytest.raises(InvalidArgument, match="rounds=0"):
        budget.directions(0)
    with pytest.raises(InvalidArgument, match="distinct_tokens"):
        budget.rounds_needed(0, 3)
    with pytest.raises(InvalidArgument, match="kind"):
        budget.unknowns(3, 3, "words")  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="known kind"):
        LeakageBudget.of(nn.Linear(2, 2))
