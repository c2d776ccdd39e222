"""What batching gathers instead of computing or moving: attention in parts, groups' products, kept products."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

from privfm.checks import InvalidArgument
from privfm.contracts import BuiltModel, Examples, Table
from privfm.learning import AdamW, Schedule, SequenceClassification, Workbench
from privfm.learning.batched import engine as engines
from privfm.learning.batched import layers, prepared, projections
from privfm.learning.batched.layers import Groups
from privfm.learning.batched.packing import AttentionPass, Packing, packed_attention, running
from privfm.learning.batched.projections import Projections
from privfm.learning.trunk import Activations, block_stack
from privfm.randomness import Seeds

LENGTHS = [3, 1, 4, 16, 17, 30, 30, 2]
"""Four of at most sixteen tokens, three longer ones, and a part of one example alone: with and without padding."""
STEPS = Schedule(batch_size=4, epochs=2)
SIZES = (6, 2, 9)

TOYS: dict[str, Any] = {}


@pytest.fixture(autouse=True)
def _toys(toys: Mapping[str, Any]) -> None:
    """The folder's texts, their tokenizer and how examples go to clients, for the functions of this file."""
    TOYS.update(toys)


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=Generator().manual_seed(seed)).to(dtype)


# Attention


def attended(packing: Packing, tokens: Sequence[Tensor], causal: bool) -> Tensor:
    """Attention of packed tokens `(N, heads, width)` each, as transformers calls it."""
    held = running.set(AttentionPass(packing))
    try:
        heads = (x.transpose(0, 1)[None] for x in tokens)
        return packed_attention(nn.Module(), *heads, is_causal=causal)[0][0]
    finally:
        running.reset(held)


def one_by_one(lengths: Sequence[int], tokens: Sequence[Tensor], causal: bool) -> Tensor:
    """The same, an example after the other, by softmax of the scores."""
    rows = []
    for query, key, value in zip(*(torch.split(x, list(lengths)) for x in tokens), strict=True):
        shared = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(shared, 1) for x in (key, value))
        scores = torch.einsum("qhw,khw->hqk", query, key) / query.shape[2] ** 0.5
        if causal:
            scores = scores.masked_fill(torch.ones(scores.shape[1:], dtype=torch.bool).triu(1), -torch.inf)
        rows.append(torch.einsum("hqk,khw->qhw", scores.softmax(-1), value))
    return torch.cat(rows)


@pytest.mark.parametrize("causal", [False, True], ids=["both ways", "causal"])
@pytest.mark.parametrize("key_heads", [4, 2], ids=["heads", "grouped heads"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5), (torch.bfloat16, 0.1)])
def test_attention_in_parts_is_that_of_every_example(
    causal: bool, key_heads: int, dtype: torch.dtype, tolerance: float
) -> None:
    n = sum(LENGTHS)
    tokens = [normal(n, heads, 8, seed=seed, dtype=dtype) for seed, heads in enumerate((4, key_heads, key_heads))]
    given = normal(n, 4, 8, seed=3, dtype=dtype)
    found, expected = [], []
    for into, attend in ((found, lambda x: attended(Packing(torch.tensor(LENGTHS), 30), x, causal)),
                         (expected, lambda x: one_by_one(LENGTHS, x, causal))):  # fmt: skip
        leaves = [x.clone().requires_grad_() for x in tokens]
        result = attend(leaves)
        into += [result.detach(), *torch.autograd.grad((result * given).sum(), leaves)]
    for ours, theirs in zip(found, expected, strict=True):
        assert theirs.norm() > 1
        assert torch.allclose(ours, theirs, atol=tolerance)


@pytest.mark.parametrize("causal", [False, True], ids=["both ways", "causal"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e30])
def test_an_example_sees_no_other_and_no_padding(causal: bool, bad: float) -> None:
    packing = Packing(torch.tensor(LENGTHS), 30)
    owner = torch.repeat_interleave(torch.tensor(LENGTHS))
    tokens = [normal(sum(LENGTHS), 2, 4, seed=seed) for seed in range(3)]
    given = normal(sum(LENGTHS), 2, 4, seed=3)
    found = []
    for changed in (False, True):
        leaves = [x.clone() for x in tokens]
        if changed:
            for x in leaves:
                x[owner == 2] = bad
        for x in leaves:
            x.requires_grad_()
        result = attended(packing, leaves, causal)
        found.append([result.detach(), *torch.autograd.grad((result * given).sum(), leaves)])
    for before, after in zip(*found, strict=True):
        assert torch.equal(before[owner != 2], after[owner != 2])
        assert not torch.equal(before[owner == 2], after[owner == 2])


def test_padding_is_of_the_same_example_and_gets_nothing_back() -> None:
    lengths = torch.tensor([3, 1, 4])
    packing = Packing(lengths, 5)
    x = normal(8, 1, 1, seed=0).requires_grad_()
    (part,) = packing.to_parts(x.transpose(0, 1)[None])
    assert part.shape == (3, 1, 4, 1)  # a part is as wide as its own longest
    begins = [0, 3, 4]
    for row, (begin, length) in enumerate(zip(begins, lengths.tolist(), strict=True)):
        assert torch.equal(part[row, 0, :length], x[begin : begin + length, 0])
        assert bool((part[row, 0, length:] == x[begin]).all())
    (back,) = torch.autograd.grad(part.sum(), x)
    assert torch.equal(back, torch.ones_like(x))  # not one more for each time a token stands in for padding
    padded = normal(3, 1, 4, 1, seed=1).requires_grad_()
    packed = packing.from_parts([padded])
    assert torch.equal(packed.flatten(), torch.cat([padded[i, 0, :n, 0] for i, n in enumerate(lengths)]))
    (down,) = torch.autograd.grad(packed.sum(), padded)
    assert torch.equal(down[:, 0, :, 0], (torch.arange(4) < lengths[:, None]).float())


# Groups


@pytest.mark.parametrize("large", [1, 128], ids=["products of their own", "moved together"])
@pytest.mark.parametrize("group", [[0, 0, 1, 3], [0, 1, 2, 3], [2, 2, 2, 2], [3, 0, 1, 0], [0, 0, 1, 1, 2, 2, 3, 3]])
def test_products_of_groups(group: list[int], large: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "_LARGE", large)
    groups, n = Groups(torch.tensor(group), 4), len(group)
    x, y, matrices = normal(n, 3, seed=0), normal(n, 2, seed=1), normal(4, 3, 2, seed=2)
    expected = torch.stack([own @ matrices[place] for own, place in zip(x, group, strict=True)])
    assert torch.allclose(groups.times(groups.arranged(x), matrices), expected, atol=1e-6)
    products, sums = torch.ones(4, 2, 3), torch.ones(4, 2)
    by_hand = [torch.ones(4, 2, 3), torch.ones(4, 2)]
    for own, other, place in zip(x, y, group, strict=True):
        by_hand[0][place] += torch.outer(other, own)
        by_hand[1][place] += other
    groups.add_products(products, groups.arranged(y), groups.arranged(x))
    groups.add_sums(sums, groups.arranged(y))
    assert torch.allclose(products, by_hand[0], atol=1e-6) and torch.allclose(sums, by_hand[1], atol=1e-6)


def test_a_group_of_nans_leaves_the_others_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "_LARGE", 1)
    groups = Groups(torch.tensor([0, 0, 1, 3]), 4)
    x, matrices = normal(4, 3, seed=0), normal(4, 3, 2, seed=1)
    expected = groups.times(groups.arranged(x), matrices)
    matrices[1] = torch.nan
    found = groups.times(groups.arranged(x), matrices)
    assert torch.equal(found[[0, 1, 3]], expected[[0, 1, 3]]) and bool(found[2].isnan().all())


# Known products


def bench(first: int = 1, kind: str = "bert") -> Workbench:
    """A tiny model with adapters from block `first` on, and texts of 2 to 20 tokens."""
    from peft import LoraConfig, get_peft_model
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    module = BertForSequenceClassification(
        BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=3, num_attention_heads=4, intermediate_size=32,
                   max_position_embeddings=32, num_labels=3, initializer_range=0.2)
    )  # fmt: skip
    options: dict[str, Any] = {"r": 2, "lora_alpha": 6, "target_modules": ["query", "value"]}
    model: Any = get_peft_model(
        module,  # type: ignore[arg-type]  # any transformers model
        LoraConfig(**options, modules_to_save=["classifier"], layers_to_transform=list(range(first, 3))),
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    generator = Generator().manual_seed(1)
    n = sum(SIZES)
    texts = TOYS["texts"](n, 20, generator)
    labels = torch.randint(0, 3, (n,), generator=generator)
    built = BuiltModel(model.eval(), TOYS["encoded"], block_stack(model), lambda folder: None)
    return Workbench(built, SequenceClassification(), Table(texts, labels, ("a", "b", "c")))


def clients(own: Workbench) -> list[Examples]:
    found: list[Examples] = TOYS["clients"](own, SIZES)
    return found


def trained(own: Workbench, chosen: Sequence[int] = range(len(SIZES))) -> Tensor:
    generators = Seeds(0).clients("data order", 0, list(chosen))
    every = clients(own)
    return prepared(own).train(own.initial, [every[i] for i in chosen], generators, AdamW(0.01, STEPS))


def without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projections, "_BYTES", 0)


def kept(own: Workbench) -> Projections:
    found = own.activations.projections
    assert isinstance(found, Projections)
    return found


@pytest.mark.parametrize("first", [1, 2], ids=["two blocks", "the last, of first tokens"])
def test_products_are_kept_where_the_input_is_known_and_change_nothing(
    first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = bench(first)
    found = trained(own)
    block = own.built.layers[first]
    names = {name for name, part in block.named_modules() if part in kept(own)._kept}
    # Of the last block the queries are those of first tokens alone, which are not the whole of what is known.
    queries = {"attention.self.query.base_layer"} if first == 1 else set()
    assert names == queries | {"attention.self.key", "attention.self.value.base_layer"}
    without(monkeypatch)
    fresh = bench(first)
    expected = trained(fresh)
    assert not kept(fresh)._kept
    assert expected.norm(dim=1).min() > 1e-2 and torch.allclose(found, expected, atol=1e-5)


def test_what_is_kept_does_not_depend_on_the_company_nor_on_what_was_before() -> None:
    one, other = bench(), bench()
    alone = trained(one, [2])
    trained(other)
    assert torch.equal(alone, trained(other, [2]))
    trained(one)
    for layer, again in zip(kept(one)._kept.values(), kept(other)._kept.values(), strict=True):
        assert torch.equal(layer, again)


def test_products_follow_weights_that_are_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    own = bench()
    before = trained(own)
    change(own)
    after = trained(own)
    without(monkeypatch)
    fresh = bench()
    change(fresh)
    assert torch.allclose(after, trained(fresh), atol=1e-5)
    assert not torch.allclose(after, before, atol=1e-4)


def change(own: Workbench) -> None:
    attention: Any = own.built.layers[1].get_submodule("attention.self")
    with torch.no_grad():
        attention.query.base_layer.weight.mul_(1.5)
        attention.key.bias.add_(1.0)
        attention.value.base_layer.weight.mul_(0.5)


def test_what_has_no_room_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    own = bench()
    one = 4 * own.activations.flat.numel()
    monkeypatch.setattr(projections, "_BYTES", 2 * one + 1)
    found = trained(own)
    assert len(kept(own)._kept) == 2
    assert torch.allclose(found, trained(bench()), atol=1e-5)


def test_examples_of_no_known_row_are_computed() -> None:
    own = bench()
    every = [examples.with_inputs(examples.inputs) for examples in clients(own)]
    engine = prepared(own)
    done = [[*flags] for _, flags in kept(own)._done.values()]
    generators = Seeds(0).clients("data order", 0, list(range(len(SIZES))))
    found = engine.train(own.initial, every, generators, AdamW(0.01, STEPS))
    assert done == [[*flags] for _, flags in kept(own)._done.values()]
    assert torch.allclose(found, trained(own), atol=1e-4)


def test_places_of_known_tokens() -> None:
    lengths = torch.tensor([2, 3, 1])
    flat = torch.arange(6.0)[:, None]
    known = Activations(flat, lengths)
    rows = torch.tensor([2, 0, 2, 1])
    assert known.places(rows).tolist() == [5, 0, 1, 5, 2, 3, 4]
    assert len(known) == 3 and flat[known.slice(1)].flatten().tolist() == [2.0, 3.0, 4.0]
    padded = known.batch(rows, None)
    assert torch.equal(
        flat[known.places(rows)], torch.cat([own[:n] for own, n in zip(padded, lengths[rows], strict=True)])
    )


def test_inputs_of_other_lengths_than_the_known_ones_are_refused() -> None:
    own = bench()
    (examples, *_) = clients(own)
    cut = examples.inputs["attention_mask"].clone()
    cut[:, 2:] = 0
    changed = Examples({**examples.inputs, "attention_mask": cut}, examples.labels, examples.rows)
    with pytest.raises(InvalidArgument, match="are known"):
        prepared(own).gradients(own.initial[None], [changed])


# Clients one by one


def test_clients_with_much_come_one_by_one_and_get_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []
    own_groups = Groups.__init__

    def watched(self: Groups, group: Tensor, count: int) -> None:
        seen.append(group.tolist())
        own_groups(self, group, count)

    monkeypatch.setattr(Groups, "__init__", watched)
    results = []
    for much in (10**6, 1):
        monkeypatch.setattr(engines, "_MUCH", much)
        monkeypatch.setattr(layers, "_LARGE", much)
        own = bench()
        prepared(own)
        seen.clear()
        results.append(trained(own))
        in_order = all(group == sorted(group) for group in seen)
        assert in_order == (much == 1)
    assert torch.allclose(*results, atol=1e-5)
