"""Gradient pruning: which coordinates go, and what a linear layer still tells of its inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Generator, Tensor, nn

from privfm.attacks.reconstruction.linear_layer import layer_inputs, shared_input
from privfm.checks import InvalidArgument
from privfm.contracts import Observation, gradients_of
from privfm.defenses import Chain, Clip
from privfm.defenses.channels import Plaintext
from privfm.defenses.mean import Mean
from privfm.defenses.reconstruction import GradientPruning
from privfm.experiment import RunConfig, prepare
from privfm.federation import Average, FixedSize, rounds
from privfm.learning import IID, Digits, ImageClassification, OneStep, SmallCNN

K, D = 5, 24


def gaussian(k: int = K, d: int = D, seed: int = 0) -> Tensor:
    return torch.randn(k, d, generator=Generator().manual_seed(seed))


def pruned(transform: GradientPruning, rows: Tensor) -> Tensor:
    encoded, state = transform.encode(rows, {}, [])
    assert state == {} and encoded.side == {}
    return transform.decode(encoded, rows.shape[1])


def by_hand(row: Sequence[float], share: float, layers: Sequence[int]) -> list[float]:
    """Layer after layer, the smallest one at a time."""
    left = list(row)
    begin = 0
    for size in layers:
        places = list(range(begin, begin + size))
        for _ in range(int(share * size)):
            smallest = min(places, key=lambda place: abs(row[place]))
            places.remove(smallest)
            left[smallest] = 0.0
        begin += size
    return left


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("layers", [(), (24,), (10, 1, 13), (0, 24), (12, 12)], ids=repr)
def test_the_smallest_of_every_layer_go(share: float, layers: tuple[int, ...]) -> None:
    rows = gaussian()
    found = pruned(GradientPruning(share, layers), rows)
    expected = [by_hand(row, share, layers or (D,)) for row in rows.tolist()]
    np.testing.assert_array_equal(found.numpy(), np.array(expected, dtype=np.float32))


def test_layers_of_different_scale_keep_their_own_share() -> None:
    """As one layer the small one would vanish."""
    row = torch.tensor([[1e-3, 2e-3, 3e-3, 4e-3, 1.0, 2.0, 3.0, 4.0]])
    assert pruned(GradientPruning(0.5, (4, 4)), row)[0].tolist() == pytest.approx([0, 0, 3e-3, 4e-3, 0, 0, 3, 4])
    assert pruned(GradientPruning(0.5), row)[0].tolist() == [0, 0, 0, 0, 1, 2, 3, 4]


@given(
    rows=st.lists(st.lists(st.floats(-4, 4, width=32), min_size=12, max_size=12), min_size=1, max_size=4),
    share=st.floats(0, 0.99),
    layers=st.sampled_from([(), (5, 7), (1, 11)]),
)
def test_no_row_grows_and_each_keeps_what_it_keeps(
    rows: list[list[float]], share: float, layers: tuple[int, ...]
) -> None:
    given_rows = torch.tensor(rows)
    transform = GradientPruning(share, layers)
    found = pruned(transform, given_rows)
    assert bool((found.norm(dim=1) <= given_rows.norm(dim=1)).all())
    assert torch.equal(found[found != 0], given_rows[found != 0])
    sizes = list(layers or (12,))
    for before, after in zip(given_rows.abs().split(sizes, 1), found.abs().split(sizes, 1), strict=True):
        least = int(share * before.shape[1])
        assert torch.equal((after == 0).sum(1), (before == 0).sum(1).clamp(min=least))  # ties too: no more, no fewer
        largest_gone = before.masked_fill(after != 0, 0).amax(1)
        smallest_left = before.masked_fill(after == 0, torch.inf).amin(1)
        assert bool((largest_gone <= smallest_left).all())


def test_rows_alone_equal_rows_together_and_nothing_is_changed() -> None:
    rows = gaussian()
    transform = GradientPruning(0.7, (10, 14))
    together = pruned(transform, rows)
    for i in range(K):
        assert torch.equal(pruned(transform, rows[i : i + 1])[0], together[i])
    assert torch.equal(rows, gaussian())
    assert pruned(transform, rows[:0]).shape == (0, D)
    assert pruned(transform, rows.double()).dtype == torch.float64


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_bad_row_stays_one_and_touches_no_other(value: float, share: float) -> None:
    rows = gaussian()
    rows[1] = value
    rows[2, 3] = value
    transform = GradientPruning(share, (10, 14))
    found = pruned(transform, rows)
    assert found.isfinite().all(1).tolist() == [True, False, False, True, True]
    assert torch.equal(found[[0, 3, 4]], pruned(transform, gaussian())[[0, 3, 4]])


def test_it_is_a_client_step_that_keeps_bounds() -> None:
    transform = GradientPruning(0.9)
    assert not transform.binding and transform.additive and not transform.integers
    assert (transform.similarity, transform.norm_bound(2.0, D), transform.width(D)) == (1.0, 2.0, D)
    assert Chain((transform, Clip(1.0))).norm_bound(5.0, D) == 1.0


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: GradientPruning(1.0), r"share=1.0: expected a number in \[0, 1\)"),
        (lambda: GradientPruning(-0.1), "share=-0.1"),
        (lambda: GradientPruning(float("nan")), "share=nan"),
        (lambda: GradientPruning(0.5, (4, -1)), "layers=-1"),
        (lambda: GradientPruning(0.5, (4, 3)).encode(gaussian(), {}, []), "have 7 coordinates, updates have 24"),
    ],
    ids=["all", "negative", "nan", "layer", "sum"],
)
def test_bad_settings_are_refused(make: Callable[[], object], said: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        make()


# What it does not stop


def seen_through(share: float, batch: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images, and the pruned gradient of a linear layer on them with zeros as unknown."""
    generator = Generator().manual_seed(3)
    images = torch.rand(batch, 20, generator=generator, dtype=torch.float64) + 0.1
    model = nn.Linear(20, 6).double()
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    loss = nn.functional.cross_entropy(model(images), torch.arange(batch) % 6)
    found = Observation(model, gradients_of(model, loss)).gradients
    flat = torch.cat([found["weight"].flatten(), found["bias"]])[None]
    left = pruned(GradientPruning(share, (120, 6)), flat)[0]
    left = left.masked_fill(left == 0, torch.nan)
    return images, left[:120].view(6, 20), left[120:], model.weight


def test_what_is_left_of_a_linear_layer_still_gives_its_input_exactly() -> None:
    for share, least in ((0.0, 20), (0.5, 18), (0.8, 12)):
        images, weight, bias, _ = seen_through(share)
        found = shared_input(weight, bias)
        known = ~found.isnan()
        assert int(known.sum()) >= least
        torch.testing.assert_close(found[known], images[0][known], rtol=1e-12, atol=1e-12)
    shown = ~layer_inputs(weight, bias).isnan()
    assert 0 < int(shown.sum()) <= 24  # a fifth of the weight at most, whatever the bias


def test_a_foreign_gradient_gives_nothing_of_it() -> None:
    images, weight, bias, _ = seen_through(0.5)
    foreign = shared_input(weight[torch.tensor([3, 4, 5, 0, 1, 2])], bias)  # rows that do not belong to their bias
    known = ~foreign.isnan()
    assert not torch.isclose(foreign[known], images[0][known], rtol=1e-3).any()


# In a federation


def moved_by(transforms: tuple[GradientPruning, ...]) -> tuple[Tensor, tuple[int, ...]]:
    config = RunConfig(
        data=Digits(), model=SmallCNN(width=4), task=ImageClassification(), partition=IID(20),
        training=OneStep(learning_rate=0.1, batch_size=8), rule=Mean(), channel=Plaintext(), optimizer=Average(),
        cohort=FixedSize(1), rounds=1, transforms=transforms,
    )  # fmt: skip
    federation = prepare(config, seed=0)
    sizes = tuple(high - low for low, high in federation.learner.layers)
    (step,) = rounds(federation, until=1)
    return step.state.model - federation.learner.initial(), sizes


def test_a_client_of_a_federation_sends_its_pruned_update() -> None:
    plain, sizes = moved_by(())
    found, _ = moved_by((GradientPruning(0.9, sizes),))
    zeros = [float((part == 0).double().mean()) for part in torch.split(found, list(sizes))]
    assert all(zero >= int(0.9 * size) / size for zero, size in zip(zeros, sizes, strict=True))
    kept = found != 0
    torch.testing.assert_close(found[kept], plain[kept], rtol=1e-3, atol=1e-7)
    assert 0 < int(kept.sum()) < 0.15 * len(found)
