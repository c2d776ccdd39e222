"""The equations behind attention-Jacobian pursuit, against autograd in float64; its search and checks against loops."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

from privfm.attacks.reconstruction.bags import known_directions, norm_of, token_directions
from privfm.attacks.reconstruction.pursuit.acceptance import as_text, need, outside, united
from privfm.attacks.reconstruction.pursuit.atoms import Atoms, Heads, blocks
from privfm.attacks.reconstruction.pursuit.beam import pursue
from privfm.attacks.reconstruction.pursuit.token_gradients import position_shares, token_gradients
from privfm.attacks.reconstruction.text_models import TextModel, text_model
from privfm.contracts import Watch

TEXTS = [(1, 7, 9, 30, 2), (1, 30, 7, 41, 55, 30, 2), (1, 12, 9, 61, 2)]
HEADS, WIDTH, HEAD = 3, 48, 16


@pytest.fixture(scope="module")
def encoder() -> nn.Module:
    """A small BERT in float64 whose norms and biases are not the fresh ones."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=80,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        intermediate_size=64,
        max_position_embeddings=12,
        attn_implementation="eager",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        model: nn.Module = transformers.BertForSequenceClassification(config).double().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += (0.2 if parameter.dim() == 1 else 0.05) * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def traced(encoder: nn.Module) -> list[dict[str, Tensor]]:
    """By autograd, text by text: Delta of query, key and value `(T, 3, d)` of the mean loss, and sigma `(T,)`."""
    root: Any = encoder.get_submodule("bert")
    maps = root.encoder.layer[0].attention.self
    found = []
    for label, text in enumerate(TEXTS):
        kept: dict[str, Tensor] = {}

        def keep(name: str, kept: dict[str, Tensor] = kept) -> Callable[..., None]:
            return lambda _module, _inputs, output: kept.__setitem__(name, output)

        hooks = [
            module.register_forward_hook(keep(name))
            for name, module in (("q", maps.query), ("k", maps.key), ("v", maps.value))
        ]
        hooks.append(
            root.embeddings.LayerNorm.register_forward_pre_hook(lambda _m, given, kept=kept: kept.update(e=given[0]))
        )
        logits = encoder(input_ids=torch.tensor([text])).logits
        loss = nn.functional.cross_entropy(logits, torch.tensor([label % 2])) / len(TEXTS)
        grads = torch.autograd.grad(loss, [kept["q"], kept["k"], kept["v"]])
        for hook in hooks:
            hook.remove()
        sums = kept["e"][0].detach()
        sigma = (sums.var(-1, unbiased=False) + root.embeddings.LayerNorm.eps).sqrt()
        found.append({"delta": torch.stack([grad[0] for grad in grads], 1), "sigma": sigma})
    return found


@pytest.fixture
def gradients(encoder: nn.Module, sent: Callable[..., dict[str, Tensor]]) -> dict[str, Tensor]:
    return sent(encoder, TEXTS, [0, 1, 0])


def components(pairs: list[tuple[int, int]]) -> int:
    """Of the graph whose vertices are tokens and positions and whose edges are pairs, by merging sets."""
    groups = [{("token", token), ("position", place)} for token, place in pairs]
    merged: list[set[tuple[str, int]]] = []
    for group in groups:
        touching = [other for other in merged if other & group]
        merged = [other for other in merged if not other & group] + [group.union(*touching)]
    return len(merged)


def test_rank_is_tokens_plus_positions_less_components(encoder: nn.Module) -> None:
    """Rows `e_token + e_position` are a graphic matroid; the first token at position 0 is a component of its own."""
    text = text_model(encoder)
    shift = norm_of(text).bias.detach()
    pairs = sorted({(token, place) for one in TEXTS for place, token in enumerate(one)})
    tokens, places = torch.tensor(pairs).unbind(1)
    rows = text.first_inputs(tokens, places) - shift
    assert components(pairs) == 3  # {1 at 0}, {2 and 55 at 4 and 6}, and the rest
    assert int(torch.linalg.matrix_rank(rows)) == len({t for t, _ in pairs}) + len({p for _, p in pairs}) - 3
    apart = torch.tensor([5, 6, 7])  # three tokens, each at a place of its own: three components
    lone = text.first_inputs(apart, torch.arange(3)) - shift
    assert int(torch.linalg.matrix_rank(lone)) == 3 + 3 - 3


def test_every_pair_of_a_component_lies_in_the_span(encoder: nn.Module) -> None:
    """Why a search for pairs cannot tell positions: a pair that never occurs is an exact member."""
    text = text_model(encoder)
    shift = norm_of(text).bias.detach()
    pairs = sorted({(token, place) for one in TEXTS for place, token in enumerate(one)})
    assert (61, 2) not in pairs  # 61 and position 2 hang together by 9 and 30
    tokens, places = torch.tensor(pairs).unbind(1)
    rows = text.first_inputs(tokens, places) - shift
    other = text.first_inputs(torch.tensor([61]), torch.tensor([2])) - shift
    solution = torch.linalg.lstsq(rows.T, other.T, driver="gelsd").solution
    assert float((rows.T @ solution - other.T).norm() / other.norm()) < 1e-10


def test_the_equations_give_each_tokens_and_positions_gradients(
    encoder: nn.Module, gradients: dict[str, Tensor], traced: list[dict[str, Tensor]]
) -> None:
    found = token_gradients(text_model(encoder), gradients)
    assert found is not None and found.unexplained < 1e-12
    assert found.tokens.tolist() == sorted({token for text in TEXTS for token in text})
    tokens = {int(token): torch.zeros(3, WIDTH, dtype=torch.float64) for token in found.tokens}
    places = torch.zeros(7, 3, WIDTH, dtype=torch.float64)
    for text, one in zip(TEXTS, traced, strict=True):
        for place, token in enumerate(text):
            tokens[token] += one["delta"][place] / one["sigma"][place]
            places[place] += one["delta"][place] / one["sigma"][place]
    torch.testing.assert_close(found.of_tokens, torch.stack(list(tokens.values())), rtol=1e-7, atol=1e-12)
    torch.testing.assert_close(found.of_positions, places, rtol=1e-7, atol=1e-12)


def test_without_biases_the_shift_is_one_more_unknown(encoder: nn.Module, gradients: dict[str, Tensor]) -> None:
    bare = {name: tensor for name, tensor in gradients.items() if not name.endswith("bias")}
    whole, less = token_gradients(text_model(encoder), gradients), token_gradients(text_model(encoder), bare)
    assert whole is not None and less is not None
    torch.testing.assert_close(less.of_tokens, whole.of_tokens, rtol=1e-6, atol=1e-11)


def test_a_token_that_occurs_once_has_its_whole_gradient_at_its_position(
    encoder: nn.Module, gradients: dict[str, Tensor]
) -> None:
    found = token_gradients(text_model(encoder), gradients)
    assert found is not None
    standing = position_shares(found.of_tokens, found.of_positions)
    for token, place in ((41, 3), (55, 4), (12, 1), (61, 3)):
        row = standing[found.tokens.tolist().index(token)]
        assert int(row.argmax()) == place and float(row.max()) > 0.6


def test_gradients_lie_in_their_own_texts_keys_and_queries_head_by_head(
    encoder: nn.Module, traced: list[dict[str, Tensor]]
) -> None:
    """Softmax Jacobian: rows of S sum to 0, so query gradients are sums of key differences; key gradients sum to 0."""
    heads = Heads(text_model(encoder))
    for text, one in zip(TEXTS, traced, strict=True):
        own = blocks(one["delta"], HEADS)
        assert float(outside(heads.span(text), own).max()) < 1e-9
        assert float(one["delta"][:, 1].sum(0).norm() / one["delta"][:, 1].norm()) < 1e-9
        for other in TEXTS:
            if other != text:
                assert float(outside(heads.span(other), own).min()) > 1e-2


def test_blocks_are_scaled_map_by_map() -> None:
    given = torch.randn(2, 3, 12, generator=Generator().manual_seed(0), dtype=torch.float64)
    found = blocks(given, 3)
    assert found.shape == (2, 6, 4)
    torch.testing.assert_close(found[1, 4], given[1, 1, 4:8] / given[1, 1].norm())


def test_the_search_finds_the_support_that_trying_all_of_them_finds(encoder: nn.Module) -> None:
    """Planted: 3 of 18 pairs; the only set of one pair a position that explains the blocks, by trying all 216."""
    heads, generator = Heads(text_model(encoder)), Generator().manual_seed(3)
    tokens = torch.tensor([7, 9, 30, 41, 55, 61]).repeat(3)
    atoms = Atoms(heads, tokens, torch.tensor([1, 2, 3]).repeat_interleave(6), first=1)
    planted = [2, 9, 16]
    factors = torch.randn(2 * HEADS, 1, 4, generator=generator, dtype=torch.float64)
    basis = torch.cat([atoms.start[:, None], atoms.units[:, planted]], 1)
    target = (factors @ basis)[:, 0]
    few = torch.full((1,), 1e-8, dtype=torch.float64)
    found = pursue(atoms, target[None, None], beam=3, enough=few, floor=few * 0, watch=Watch())
    assert sorted(found.atoms[0]) == planted and found.residuals[0] < 1e-8
    fits = []
    for each in itertools.product(range(6), range(6, 12), range(12, 18)):
        rows = torch.cat([atoms.start[:, None], atoms.units[:, list(each)]], 1)
        solution = torch.linalg.lstsq(rows.transpose(1, 2), target[..., None], driver="gelsd").solution
        if float((rows.transpose(1, 2) @ solution - target[..., None]).norm()) < 1e-8:
            fits.append(list(each))
    assert fits == [planted]


def test_the_search_takes_one_atom_a_position_and_stops_with_the_time(encoder: nn.Module) -> None:
    heads, generator = Heads(text_model(encoder)), Generator().manual_seed(3)
    atoms = Atoms(heads, torch.tensor([7, 9, 30, 41]), torch.tensor([1, 1, 2, 2]), first=1)
    target = torch.randn(2, 1, 2 * HEADS, HEAD, generator=generator, dtype=torch.float64)
    never = torch.zeros(2, dtype=torch.float64)
    found = pursue(atoms, target, beam=4, enough=never, floor=never, watch=Watch())
    for support in found.atoms:
        assert sorted(int(atoms.positions[atom]) for atom in support) == [1, 2]
    late = Watch(1e-9)
    assert pursue(atoms, target, beam=4, enough=never, floor=never, watch=late).atoms == [[], []]


def test_what_is_held_beforehand_is_taken_out(encoder: nn.Module) -> None:
    """A seed of two texts: with the one taken out, the search finds the other."""
    heads, generator = Heads(text_model(encoder)), Generator().manual_seed(8)
    known, other = (1, 12, 30, 2), (1, 41, 30, 55)  # 30 stands at one place in both: it is held, and filled in
    parts = [heads.span(text) for text in (known, other)]
    target = sum(torch.randn(2 * HEADS, 1, 4, generator=generator, dtype=torch.float64) @ part for part in parts)[:, 0]
    pairs = [(token, place) for token in (12, 30, 2, 41, 55) for place in (1, 2, 3)]
    atoms = Atoms(heads, *torch.tensor(pairs).unbind(1), first=1)
    few = torch.full((1,), 1e-7, dtype=torch.float64)
    found = pursue(
        atoms, target[None, None], beam=4, enough=few, floor=few * 0, watch=Watch(), held=united(parts[:1])[None]
    )
    assert found.residuals[0] < 1e-7
    assert as_text(atoms, found.atoms[0], 1, held=[known]) == other


def test_a_support_spells_a_text_only_without_gaps(encoder: nn.Module) -> None:
    atoms = Atoms(Heads(text_model(encoder)), torch.tensor([7, 9, 30]), torch.tensor([2, 1, 4]), first=1)
    assert as_text(atoms, [0, 1], 1) == (1, 9, 7)
    assert as_text(atoms, [0, 1, 2], 1, held=[(1, 5, 6, 8, 2)]) == (1, 9, 7, 8, 30)
    assert as_text(atoms, [0, 1, 2], 1) is None and as_text(atoms, [0], 1) is None and as_text(atoms, [], 1) is None


def test_need_is_what_leaving_a_token_out_costs(encoder: nn.Module, traced: list[dict[str, Tensor]]) -> None:
    """Against refitting without each token in turn."""
    heads, text = Heads(text_model(encoder)), TEXTS[0]
    own = blocks(traced[0]["delta"][1:4], HEADS)
    keys, queries = heads.keys_and_queries(torch.tensor(text), torch.arange(len(text)))
    shares = torch.zeros(3, len(text) - 1, dtype=torch.float64)
    for left in range(1, len(text)):
        rest = 0.0
        for rows, part in ((keys[1:] - keys[:1], own[:, :HEADS]), (queries, own[:, HEADS:])):
            kept = [place for place in range(len(rows)) if place != left - (len(rows) < len(text))]
            basis = rows[kept].permute(1, 2, 0)
            wanted = part.permute(1, 2, 0)
            rest = rest + (wanted - basis @ torch.linalg.pinv(basis) @ wanted).square().sum((0, 1))
        shares[:, left - 1] = (rest / own.square().sum((1, 2))).sqrt()
    assert need(heads, text, own) == pytest.approx(float(shares.max(0).values.min()), rel=1e-6)
    assert need(heads, text, own) > 1e-3


def test_spans_of_texts_together_hold_what_each_holds(encoder: nn.Module) -> None:
    heads = Heads(text_model(encoder))
    spans = [heads.span(text) for text in TEXTS[:2]]
    both = united(spans)
    for span in spans:
        assert float(outside(both, span.transpose(0, 1)[:3]).max()) < 1e-9


def test_known_directions_are_positions_and_the_shift(encoder: nn.Module) -> None:
    """A row times its sigma is token + position + sigma x shift."""
    text: TextModel = text_model(encoder)
    token, place = torch.tensor([9]), 4
    known = known_directions(text, 6)
    assert known is not None and known.shape == (7, WIDTH)
    sums = text.embedding.weight.detach()[9] + text.added(torch.tensor([place]))[0]  # type: ignore[attr-defined]
    sigma = (sums.var(unbiased=False) + norm_of(text).eps).sqrt()
    row = text.first_inputs(token, torch.tensor([place]))[0]
    torch.testing.assert_close(row * sigma, token_directions(text, token)[0] + known[place] + sigma * known[6])
