"""Which tokens adapters' gradients give away: exact on tiny models, nothing from foreign gradients."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from privfm.attacks.reconstruction.bags import bag_of_span
from privfm.attacks.reconstruction.lora import LoRAReconstruction
from privfm.attacks.reconstruction.lora.greedy import Dictionary, Search
from privfm.attacks.reconstruction.lora.rows import AdapterRows, adapter_rows
from privfm.attacks.reconstruction.lora.tokens import pursue
from privfm.attacks.reconstruction.subspace import row_space
from privfm.attacks.reconstruction.text_models import text_model
from privfm.checks import InvalidArgument
from privfm.contracts import LocalSteps, Observation, Watch, gradients_of

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

TEXTS = [(1, 15, 16, 27, 8, 2), (1, 9, 36, 10, 2), (1, 11, 42, 15, 33, 54, 2)]
BAG = frozenset(token for text in TEXTS for token in text)  # 13 tokens
TOKENS_ONLY = LoRAReconstruction(texts=False, positions=8)


def adapted(model: Any, rank: int, modules: tuple[str, ...], **more: Any) -> Any:
    found = peft.get_peft_model(model.eval(), peft.LoraConfig(r=rank, target_modules=list(modules), **more))
    return moved(found, 0)


def moved(model: nn.Module, seed: int) -> nn.Module:
    """A copy whose adapters are drawn: what some rounds on other data leave."""
    model = deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return model


def bert(rank: int = 2, modules: tuple[str, ...] = ("query", "value"), width: int = 48) -> Any:
    torch.manual_seed(1)
    config = transformers.BertConfig(
        vocab_size=400, hidden_size=width, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=20, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.1,
    )  # fmt: skip
    return adapted(transformers.BertForSequenceClassification(config), rank, modules)


def gpt2(rank: int = 4) -> Any:
    torch.manual_seed(1)
    config = transformers.GPT2Config(
        vocab_size=400, n_embd=48, n_layer=2, n_head=2, n_positions=20, initializer_range=0.1,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return adapted(transformers.GPT2LMHeadModel(config), rank, ("c_attn",), fan_in_fan_out=True)


def llama(rank: int = 3) -> Any:
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=400, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.1, pad_token_id=0,
    )  # fmt: skip
    return adapted(transformers.LlamaForCausalLM(config), rank, ("q_proj", "v_proj", "o_proj"))


Observed = Callable[..., Observation]


def given(rows: Tensor) -> AdapterRows:
    """Rows as if they were float32 gradients of one matrix."""
    return AdapterRows(rows, torch.zeros(len(rows)).bool(), torch.full((len(rows),), 1e-8), torch.ones(len(rows)))


def rounds(observed: Observed, model: nn.Module, count: int, texts: Any = TEXTS) -> list[Observation]:
    return [observed(moved(model, seed), texts, [0, 1, 1][: len(texts)]) for seed in range(1, count + 1)]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_membership_needs_two_r_t_directions_and_not_one_round_less(observed: Observed, count: int) -> None:
    """r = 2 on q and v: 4 directions a round, 13 tokens: the fourth round makes the span complete."""
    observations = rounds(observed, bert(), count)
    text = text_model(observations[0].model)
    basis, _ = row_space([adapter_rows(text, observations).rows], rank=min(4 * count, 13 + 7 - 1))
    bag = bag_of_span(text, basis, 8)
    found = frozenset(bag.tokens)
    assert found == BAG if count >= 4 else len(found) <= 1  # one whose gradient outweighs the rest lies near already


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("modules", [("query", "value"), ("key", "value"), ("query", "key", "value", "dense")], ids=str)
def test_the_pursuit_needs_fewer_rounds(observed: Observed, modules: tuple[str, ...], count: int) -> None:
    found = TOKENS_ONLY(rounds(observed, bert(4, modules, width=96), count))
    assert found.tokens == BAG
    assert found.facts["by"] == ("membership" if float(found.facts["directions"]) >= len(BAG) else "pursuit")
    assert found.used == ()
    assert "ranking" not in found.facts


@pytest.mark.parametrize("build", [gpt2, llama], ids=["gpt2", "llama"])
def test_decoders(observed: Observed, build: Callable[[], Any]) -> None:
    model = build()
    observations = [observed(moved(model, seed), TEXTS) for seed in (1, 2, 3, 4)]
    found = TOKENS_ONLY(observations)
    last = {text[-1] for text in TEXTS}  # predicts nothing, but is itself no key of a token that predicts, either
    assert BAG - last <= found.tokens <= BAG


def test_coefficients_are_sums_over_occurrences(observed: Observed) -> None:
    """`dL/dA = scaling B^T Delta^T X` by hand: Delta from autograd on the query's output, sigma from the LayerNorm."""
    model = bert().double()
    texts = TEXTS[:1]
    seen: dict[str, Tensor] = {}
    query = model.base_model.model.bert.encoder.layer[0].attention.self.query

    def keep(_: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        output.retain_grad()
        seen["output"] = output

    hook = query.register_forward_hook(keep)
    loss = nn.functional.cross_entropy(model(input_ids=torch.tensor(texts)).logits, torch.tensor([1]))
    observation = Observation(model, gradients_of(model, loss))
    loss = nn.functional.cross_entropy(model(input_ids=torch.tensor(texts)).logits, torch.tensor([1]))
    loss.backward()
    hook.remove()
    delta = seen["output"].grad
    assert delta is not None
    text = text_model(model)
    found = pursue(Dictionary(text, 6), adapter_rows(text, [observation]), Watch())
    assert sorted(found.tokens) == sorted(texts[0])
    name = text.block(0).query.lora_a
    assert name is not None
    scale = text.block(0).query.scaling / observation.tensors[name].norm()
    for token, coefficients in zip(found.tokens, found.coefficients, strict=True):
        place = texts[0].index(token)
        raw = text.embedding.weight[token] + text.added(torch.tensor([place]))[0]
        sigma = (raw.var(correction=0) + text.norm.eps).sqrt()
        expected = scale * query.lora_B["default"].weight.T @ delta[0, place] / sigma
        torch.testing.assert_close(coefficients[:2], expected.detach(), rtol=1e-7, atol=1e-12)


def test_several_local_steps_of_plain_descent(sent: Callable[..., dict[str, Tensor]]) -> None:
    start = bert(4, width=96)
    model = deepcopy(start)
    for _ in range(3):
        gradients = sent(model, TEXTS, [0, 1, 1])
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in gradients:
                    parameter -= 0.1 * gradients[name]
    now = dict(model.named_parameters())
    change = {name: (now[name] - one).detach() for name, one in start.named_parameters() if one.requires_grad}
    assert TOKENS_ONLY(Observation(start, change, LocalSteps(0.1, 3))).tokens == BAG
    adam = Observation(start, change, LocalSteps(0.1, 3, "adam"))
    assert "adam" in TOKENS_ONLY.refusal(adam)
    signs = {name: one.sign() for name, one in change.items()}
    assert TOKENS_ONLY(Observation(start, signs, LocalSteps(0.1, 3))).tokens == frozenset()


def test_foreign_and_permuted_gradients_give_nothing(observed: Observed) -> None:
    """Rows of no batch, and the right rows with their columns permuted."""
    observation = observed(moved(bert(4, width=96), 1), TEXTS, [0, 1, 1])
    generator = torch.Generator().manual_seed(3)
    foreign = {name: torch.randn(one.shape, generator=generator) for name, one in observation.tensors.items()}
    permuted = {
        name: one[:, torch.randperm(one.shape[1], generator=generator)] if one.dim() == 2 else one
        for name, one in observation.tensors.items()
    }
    for tensors in (foreign, permuted):
        found = TOKENS_ONLY(replace(observation, tensors=tensors))
        assert (found.texts, found.tokens) == ((), frozenset())
        assert len(str(found.facts["ranking"]).split(", ")) == 32
        assert float(found.facts["residual"]) > 1e-2


def noisy(observation: Observation, share: float, seed: int) -> tuple[Observation, float]:
    """Gaussian noise on every tensor, as a share of the root mean square of the first attention's gradients of A."""
    part = text_model(observation.model).block(0)
    first = [observation.tensors[name] for name in (part.query.lora_a, part.value.lora_a) if name is not None]
    noise = share * float(torch.cat(first).square().mean().sqrt())
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: one + noise * torch.randn(one.shape, generator=generator) for name, one in observation.tensors.items()
    }
    return replace(observation, tensors=tensors), noise


@pytest.mark.parametrize("told", [True, False], ids=["declared", "found"])
def test_noise_takes_tokens_away_and_adds_none(observed: Observed, told: bool) -> None:
    """What is named is there at any noise, and under more noise less is named, down to nothing."""
    counts = []
    for share in (1e-4, 1e-2, 3e-1, 3.0):
        named = []
        for seed in (1, 2, 3):
            observation, noise = noisy(observed(moved(bert(4, width=96), seed), TEXTS, [0, 1, 1]), share, seed)
            found = TOKENS_ONLY(observation.told(noise=noise) if told else observation)
            assert found.tokens <= BAG
            assert found.texts == ()
            assert found.used == (("noise",) if told else ())
            assert len(str(found.facts["ranking"]).split(", ")) == 32
            if found.tokens:
                assert float(found.facts["noise"]) == pytest.approx(noise) if told else found.facts["noise"]
            named.append(len(found.tokens))
        counts.append(sum(named))
    assert counts == sorted(counts, reverse=True)
    assert (counts[0], counts[-1]) == (3 * len(BAG), 0)


def test_noise_that_is_declared_too_small_gives_nothing(observed: Observed) -> None:
    observation, noise = noisy(observed(moved(bert(4, width=96), 1), TEXTS, [0, 1, 1]), 0.01, 1)
    assert TOKENS_ONLY(observation.told(noise=noise / 30)).tokens == frozenset()


def test_rounding_is_known_from_the_type_and_from_the_change(observed: Observed) -> None:
    """By hand: four epsilons of a row's length; a change by steps of 0.1 rounds as the parameters do, tenfold."""
    observation = observed(moved(bert(2), 1), TEXTS, [0, 1, 1])
    text = text_model(observation.model)
    name = text.block(0).query.lora_a
    assert name is not None
    gradient = observation.tensors[name].double()
    sent = adapter_rows(text, [observation])
    epsilon, scale = 2.0**-23, 48**0.5 * gradient.norm()
    torch.testing.assert_close(sent.rounding[:2], 4 * epsilon * gradient.norm(dim=1) / scale)
    torch.testing.assert_close(sent.unit[:2], 1 / gradient.norm().expand(2))
    change = adapter_rows(text, [replace(observation, change=LocalSteps(0.1, 1))])
    stored = observation.model.get_parameter(name).detach().double().norm(dim=1)
    gradient, scale = -10 * gradient, 10 * scale
    expected = (gradient.norm(dim=1).square() + (10 * stored).square()).sqrt() * 4 * epsilon / scale
    torch.testing.assert_close(change.rounding[:2], expected)
    torch.testing.assert_close(change.unit[:2], 10 / gradient.norm().expand(2))
    halves = replace(observation, tensors={key: one.bfloat16() for key, one in observation.tensors.items()})
    assert TOKENS_ONLY(halves).tokens <= BAG


def test_evidence_is_least_squares_done_slowly(observed: Observed) -> None:
    """A token explains what the residual grows by without it; a rival what it shrinks by with it in its place."""
    observation = observed(moved(bert(4, width=96), 1), TEXTS[:1], [0])
    text = text_model(observation.model)
    dictionary, sent = Dictionary(text, 8), adapter_rows(text, [observation])
    rows = dictionary.without_known(sent.rows) / 0.01
    tokens = [1, 15, 16, 27]
    gains, others = Search(dictionary, rows, tokens).evidence()

    def left(chosen: list[int]) -> float:
        vectors = dictionary.exactly(torch.tensor(chosen)).T
        return float((rows.T - vectors @ torch.linalg.lstsq(vectors, rows.T).solution).square().sum())

    for number, token in enumerate(tokens):
        fewer = [one for one in tokens if one != token]
        assert float(gains[number]) == pytest.approx(left(fewer) - left(tokens), rel=1e-6)
        rivals = [left(fewer) - left([*fewer, one]) for one in range(400) if one not in tokens and one != 0]
        assert float(others[number]) == pytest.approx(max(rivals), rel=1e-6)


def test_longer_texts_than_expected_are_noticed(observed: Observed) -> None:
    observation = observed(moved(bert(4, width=96), 1), TEXTS, [0, 1, 1])
    assert LoRAReconstruction(texts=False, positions=2)(observation).tokens == BAG


def test_refusals(observed: Observed) -> None:
    observation = observed(moved(bert(), 1), TEXTS, [0, 1, 1])
    fresh = bert()
    for name, parameter in fresh.named_parameters():
        if ".lora_B." in name:
            parameter.data.zero_()
    assert "max |dL/dA| = 0" in TOKENS_ONLY.refusal(observed(fresh, TEXTS, [0, 1, 1]))
    with pytest.raises(InvalidArgument, match="leave this round out"):
        TOKENS_ONLY([observation, observed(fresh, TEXTS, [0, 1, 1])])
    b_alone = {name: one for name, one in observation.tensors.items() if ".lora_A." not in name}
    assert "r numbers" in TOKENS_ONLY.refusal(replace(observation, tensors=b_alone))
    hidden = {name: torch.full_like(one, torch.nan) for name, one in observation.tensors.items()}
    assert "hidden" in TOKENS_ONLY.refusal(replace(observation, tensors=hidden))
    plain = deepcopy(observation.model).unload()  # type: ignore[operator]
    full = {next(iter(dict(plain.named_parameters()))): next(plain.parameters()).detach()}
    assert "no LoRA adapters" in TOKENS_ONLY.refusal(Observation(plain, full))
    assert TOKENS_ONLY.refusal(observation) == ""


def test_partly_hidden_adapters_are_left_out(observed: Observed) -> None:
    observation = observed(moved(bert(4, width=96), 1), TEXTS, [0, 1, 1])
    name = text_model(observation.model).block(0).value.lora_a
    assert name is not None
    tensors = dict(observation.tensors)
    tensors[name] = tensors[name].clone()
    tensors[name][0, 0] = torch.nan
    more = observed(moved(bert(4, width=96), 2), TEXTS, [0, 1, 1])
    assert TOKENS_ONLY([replace(observation, tensors=tensors), more]).tokens == BAG


def test_bad_input_and_time() -> None:
    with pytest.raises(InvalidArgument, match="positions"):
        LoRAReconstruction(positions=0)
    with pytest.raises(InvalidArgument, match="shakes"):
        LoRAReconstruction(shakes=-1)
    dictionary = Dictionary(text_model(bert()), 8)
    with pytest.raises(InvalidArgument, match="no gradient"):
        pursue(dictionary, given(torch.zeros(0, 48, dtype=torch.float64)), Watch())
    with pytest.raises(InvalidArgument, match="shape"):
        pursue(dictionary, given(torch.zeros(3, 47, dtype=torch.float64)), Watch())
    with pytest.raises(InvalidArgument, match="positions alone"):
        pursue(dictionary, given(dictionary.known[:2]), Watch())
    over = Watch(1e-9)
    found = pursue(dictionary, given(torch.randn(3, 48, dtype=torch.float64)), over)
    assert (found.tokens, found.sure, found.explained, found.whole) == ((), frozenset(), False, False)
