"""Images from the first linear layer: exact when alone, no mixture among them, and refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

from privfm.attacks.reconstruction.closed_form import LinearInversion
from privfm.attacks.reconstruction.closed_form.linear import agreeing_rows, pure
from privfm.checks import InvalidArgument
from privfm.contracts import LocalSteps, Observation, Watch, gradients_of
from privfm.randomness import seeded

SHAPE = (2, 3, 4)


def network(width: int, seed: int = 0, relu: bool = True, dtype: torch.dtype = torch.float64) -> nn.Module:
    with seeded(Generator().manual_seed(seed)):
        middle: nn.Module = nn.ReLU() if relu else nn.Identity()
        return nn.Sequential(nn.Flatten(), nn.Linear(24, width), middle, nn.Linear(width, 5)).to(dtype)


def batch(count: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = Generator().manual_seed(seed)
    images = torch.rand(count, *SHAPE, generator=generator, dtype=torch.float64)
    return images.to(dtype), torch.randint(5, (count,), generator=generator)


def sent(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    return gradients_of(model, nn.functional.cross_entropy(model(images), labels))


def observed(model: nn.Module, images: Tensor, labels: Tensor) -> Observation:
    return Observation(model, sent(model, images, labels)).told(shape=SHAPE)


def errors(found: Tensor | None, images: Tensor) -> Tensor:
    """Of each found image, the relative distance from the nearest true one."""
    assert found is not None
    apart = (found[:, None].double() - images[None].double()).flatten(2).norm(dim=2)
    return (apart / images.double().flatten(1).norm(dim=1)).min(1).values


@pytest.mark.parametrize("relu", [True, False])
def test_one_image_is_exact_to_float_precision(relu: bool) -> None:
    images, labels = batch(1)
    found = LinearInversion()(observed(network(16, relu=relu), images, labels))
    assert found.images is not None and found.images.shape == (1, *SHAPE)
    assert float(errors(found.images, images).max()) < 1e-14
    assert found.used == ("shape",) and found.facts["images"] == 1


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
@pytest.mark.parametrize("count", [2, 4, 8])
def test_several_images_are_those_that_a_slow_loop_finds_alone(count: int, dtype: torch.dtype, bound: float) -> None:
    for seed in range(5):
        model: Any = network(96, seed, dtype=dtype)
        images, labels = batch(count, seed, dtype)
        reached = [0] * count
        for row in range(96):  # the oracle knows the images
            weight, bias = model[1].weight.detach()[row], model[1].bias.detach()[row]
            pre = [float(weight @ image.flatten() + bias) for image in images]
            open_to = [place for place, value in enumerate(pre) if value > 0]
            if len(open_to) == 1:
                reached[open_to[0]] += 1
        found = LinearInversion()(observed(model, images, labels))
        assert found.facts["images"] == sum(one >= 2 for one in reached)
        if found.images is not None:
            assert float(errors(found.images, images).max()) < bound


def test_a_secure_sum_of_clients_is_a_batch() -> None:
    model = network(128, 7)
    images, labels = batch(4, 7)
    each = [sent(model, images[k : k + 1], labels[k : k + 1]) for k in range(4)]
    total = {name: sum((one[name] for one in each), torch.zeros(())) for name in each[0]}
    found = LinearInversion()(Observation(model, total, clients=4).told(shape=SHAPE))
    assert found.facts["images"] == 4 and float(errors(found.images, images).max()) < 1e-14


def test_without_a_relu_a_batch_gives_nothing() -> None:
    images, labels = batch(3, 2)
    found = LinearInversion()(observed(network(64, relu=False), images, labels))
    assert found.images is None and found.facts["images"] == 0
    believed = LinearInversion(agreeing=1)(observed(network(64, relu=False), images, labels))
    assert believed.images is not None and float(errors(believed.images, images).min()) > 1e-3  # mixtures, as it says


def test_the_models_own_normalisation_is_undone() -> None:
    class Normalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network(16)

        def forward(self, images: Tensor) -> Any:
            return self.inner((images - 0.3) / torch.tensor([0.5, 0.2], dtype=torch.float64)[:, None, None])

    images, labels = batch(1, 4)
    found = LinearInversion()(observed(Normalised(), images, labels))
    assert float(errors(found.images, images).max()) < 1e-13


def test_an_update_is_a_gradient_and_adam_is_refused() -> None:
    model = network(16)
    images, labels = batch(1)
    update = {name: -0.1 * one for name, one in sent(model, images, labels).items()}
    found = LinearInversion()(Observation(model, update, change=LocalSteps(0.1)).told(shape=SHAPE))
    assert float(errors(found.images, images).max()) < 1e-14
    with pytest.raises(InvalidArgument, match="adam"):
        LinearInversion()(Observation(model, update, change=LocalSteps(0.1, optimizer="adam")).told(shape=SHAPE))


def test_controls_recover_nothing() -> None:
    model, generator = network(96), Generator().manual_seed(5)
    images, labels = batch(1)
    whole = sent(model, images, labels)
    shuffled = {
        name: one.flatten()[torch.randperm(one.numel(), generator=generator)].reshape(one.shape)
        for name, one in whole.items()
    }
    assert LinearInversion()(Observation(model, shuffled).told(shape=SHAPE)).images is None
    noise = {name: torch.randn(one.shape, generator=generator, dtype=one.dtype) for name, one in whole.items()}
    noisy = {name: one + 1e-3 * one.std() * noise[name] for name, one in whole.items()}
    assert LinearInversion()(Observation(model, noisy).told(shape=SHAPE)).images is None
    foreign = LinearInversion()(observed(model, *batch(1, 99))).images
    assert float(errors(foreign, images).min()) > 0.3  # exactly another image: nothing of this one


def test_hidden_entries_cost_no_pixel_while_one_row_shows_it() -> None:
    model, generator = network(32), Generator().manual_seed(1)
    images, labels = batch(1)
    tensors = sent(model, images, labels)
    away = torch.rand(tensors["1.weight"].shape, generator=generator) < 0.4
    away[:, 5] = True
    tensors["1.weight"] = tensors["1.weight"].masked_fill(away, torch.nan)
    found = LinearInversion()(Observation(model, tensors).told(shape=SHAPE))
    assert found.images is not None and len(found.images) == 1
    flat, truth = found.images.flatten(), images.flatten()
    known = torch.arange(24) != 5
    torch.testing.assert_close(flat[known], truth[known], rtol=0, atol=1e-14)
    torch.testing.assert_close(flat[5], truth[known].mean())  # guessed, and said so
    assert found.facts["share of pixels guessed"] == pytest.approx(1 / 24)


def test_chance_agreement_on_a_line_between_two_images_is_left_out() -> None:
    first, second = batch(2)[0].flatten(1)
    kept = pure([first, second, 0.25 * first + 0.75 * second, batch(1, 8)[0].flatten()])
    assert [place for place, _ in kept] == [0, 1, 3]


def test_groups_are_by_distance_and_largest_first() -> None:
    one, other = torch.eye(12, dtype=torch.float64)[0], torch.eye(12, dtype=torch.float64)[1]
    rows = torch.stack([other, one, one * (1 + 1e-9), torch.full((12,), torch.nan).double(), one * (1 + 1e-3)])
    groups = agreeing_rows(rows, torch.ones(5), 1e-8, Watch())
    assert sorted(groups[0].tolist()) == [1, 2]
    assert sorted(torch.cat(groups[1:]).tolist()) == [0, 4]


def test_what_does_not_fit_is_refused_with_the_way_out() -> None:
    model = network(16)
    images, labels = batch(1)
    tensors = sent(model, images, labels)
    with pytest.raises(InvalidArgument, match=r"told\(shape="):
        LinearInversion()(Observation(model, tensors))
    with pytest.raises(InvalidArgument, match="does not take images"):
        LinearInversion()(Observation(model, tensors).told(shape=(1, 3, 4)))
    with pytest.raises(InvalidArgument, match="did you mean"):
        LinearInversion(layer="1x")(Observation(model, tensors).told(shape=SHAPE))
    with pytest.raises(InvalidArgument, match="no images"):
        LinearInversion(layer="3")(Observation(model, tensors).told(shape=SHAPE))
    for hidden in ("1.weight", "1.bias"):
        with pytest.raises(InvalidArgument, match=hidden):
            LinearInversion()(
                Observation(model, tensors | {hidden: torch.full_like(tensors[hidden], torch.nan)}).told(shape=SHAPE)
            )
    with pytest.raises(InvalidArgument, match="lower agreeing"):
        LinearInversion(agreeing=17)(Observation(model, tensors).told(shape=SHAPE))
    half = {name: one.bfloat16() for name, one in tensors.items()}
    with pytest.raises(InvalidArgument, match="tolerance="):
        LinearInversion()(Observation(model, half).told(shape=SHAPE))
    convolution = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Flatten(), nn.Linear(18, 5)).double()
    with pytest.raises(InvalidArgument, match="Conv2d"):
        LinearInversion()(observed(convolution, images, labels))
    for wrong in ({"agreeing": 0}, {"tolerance": 0.0}):
        with pytest.raises(InvalidArgument, match=next(iter(wrong))):
            LinearInversion(**wrong)  # type: ignore[arg-type]


def test_out_of_time_it_says_so() -> None:
    images, labels = batch(4)
    found = LinearInversion()(observed(network(64), images, labels), seconds=1e-9)
    assert "time limit" in found.stopped and found.images is None
