"""Whole batches from the first linear layer: all images exactly, or none."""

from __future__ import annotations

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Generator, Tensor, nn

from privfm.attacks.reconstruction.closed_form import SPEAR, LinearInversion
from privfm.checks import InvalidArgument
from privfm.contracts import LocalSteps, Observation, gradients_of
from privfm.randomness import seeded

SHAPE = (1, 5, 6)


def network(seed: int = 0, relu: bool = True, dtype: torch.dtype = torch.float64) -> nn.Module:
    with seeded(Generator().manual_seed(seed)):
        middle: nn.Module = nn.ReLU() if relu else nn.Identity()
        return nn.Sequential(nn.Flatten(), nn.Linear(30, 96), middle, nn.Linear(96, 5)).to(dtype)


def batch(count: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = Generator().manual_seed(seed)
    images = torch.randn(count, *SHAPE, generator=generator, dtype=torch.float64)
    return images.to(dtype), torch.randint(5, (count,), generator=generator)


def sent(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    return gradients_of(model, nn.functional.cross_entropy(model(images), labels))


def observed(model: nn.Module, images: Tensor, labels: Tensor) -> Observation:
    return Observation(model, sent(model, images, labels)).told(shape=SHAPE)


def worst(found: Tensor | None, truth: Tensor) -> float:
    """Largest relative error under the best one-to-one matching."""
    assert found is not None and found.shape == truth.shape
    apart = (found[:, None].double() - truth[None].double()).flatten(2).norm(dim=2)
    rows, columns = linear_sum_assignment(apart.numpy())
    return float((apart[rows, columns] / truth.double().flatten(1).norm(dim=1)[columns]).max())


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-11), (torch.float32, 1e-3)])
@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_every_image_of_a_batch(count: int, dtype: torch.dtype, bound: float) -> None:
    images, labels = batch(count, count, dtype)
    found = SPEAR()(observed(network(count, dtype=dtype), images, labels))
    assert worst(found.images, images) < bound
    assert found.facts["rank"] == count and found.used == ("shape",) and not found.stopped


def test_it_finds_what_no_output_has_alone() -> None:
    images, labels = batch(8, 8)
    observation = observed(network(8), images, labels)
    assert float(LinearInversion()(observation).facts["images"]) < 8
    assert worst(SPEAR()(observation).images, images) < 1e-11


def test_a_secure_sum_is_a_batch() -> None:
    model, (images, labels) = network(1), batch(6, 1)
    each = [sent(model, images[k : k + 2], labels[k : k + 2]) for k in range(0, 6, 2)]
    total = {name: torch.stack([one[name] for one in each]).sum(0) for name in each[0]}
    found = SPEAR()(Observation(model, total, clients=3).told(shape=SHAPE))
    assert worst(found.images, images) < 1e-11


def test_without_a_relu_there_is_nothing() -> None:
    found = SPEAR(trials=8192)(observed(network(relu=False), *batch(3)))
    assert found.images is None and found.stopped == "all subsets tried" and found.facts["rank"] == 3


def test_controls_recover_nothing() -> None:
    model, generator, (images, labels) = network(), Generator().manual_seed(3), batch(4)
    whole = sent(model, images, labels)
    shuffled = {
        name: one.flatten()[torch.randperm(one.numel(), generator=generator)].reshape(one.shape)
        for name, one in whole.items()
    }
    noisy = {
        name: one + 1e-3 * one.std() * torch.randn(one.shape, generator=generator, dtype=one.dtype)
        for name, one in whole.items()
    }
    for wrong in (shuffled, noisy):
        found = SPEAR(trials=8192)(Observation(model, wrong).told(shape=SHAPE))
        assert found.images is None
    elsewhere = SPEAR(trials=8192)(Observation(network(5), whole).told(shape=SHAPE))
    assert elsewhere.images is None  # the signs are another model's: nothing is proved
    assert SPEAR()(Observation(model, {name: 0 * one for name, one in whole.items()}).told(shape=SHAPE)).images is None


def test_refusals_and_the_time_limit() -> None:
    model, (images, labels) = network(), batch(2)
    tensors = sent(model, images, labels)
    with pytest.raises(InvalidArgument, match=r"told\(shape="):
        SPEAR()(Observation(model, tensors))
    tensors["1.weight"][3, 4] = torch.nan
    with pytest.raises(InvalidArgument, match="LinearInversion"):
        SPEAR()(Observation(model, tensors).told(shape=SHAPE))
    with pytest.raises(InvalidArgument, match="adam"):
        adam = LocalSteps(0.1, optimizer="adam")
        SPEAR()(Observation(model, sent(model, images, labels), change=adam).told(shape=SHAPE))
    with pytest.raises(InvalidArgument, match="trials"):
        SPEAR(trials=0)
    found = SPEAR()(observed(model, images, labels), seconds=1e-9)
    assert "time limit" in found.stopped and found.images is None
