"""Imprint: exactly the images alone in their bins, through a sum of clients, and nothing that is no image."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Generator, Tensor, nn

from privfm.attacks.reconstruction.malicious import Imprint, brightness
from privfm.checks import InvalidArgument
from privfm.contracts import LocalSteps, Observation, gradients_of
from privfm.randomness import seeded

SHAPE = (2, 4, 4)


def network(kind: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    with seeded(Generator().manual_seed(6)):
        if kind == "convolution":
            layers = [nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 5)]
        else:
            middle = nn.ReLU() if kind == "bent" else nn.GELU()
            layers = [nn.Flatten(), nn.Linear(32, 100), middle, nn.Linear(100, 24), nn.ReLU(), nn.Linear(24, 5)]
        return nn.Sequential(*layers).to(dtype)


def batch(count: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Images of different brightness, as photographs have."""
    generator = Generator().manual_seed(seed)
    noise = torch.rand(count, *SHAPE, generator=generator, dtype=torch.float64)
    light = torch.rand(count, 1, 1, 1, generator=generator, dtype=torch.float64)
    return (0.5 * noise + 0.5 * light).to(dtype), torch.randint(5, (count,), generator=generator)


def trap(layer: str = "", bins: int = 40, **more: Any) -> Imprint:
    mean, deviation = brightness(batch(400, 1000)[0])  # public images: other seeds than any client's
    return Imprint(SHAPE, bins, mean, deviation, layer=layer, **more)


def sent(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    return gradients_of(model, nn.functional.cross_entropy(model(images), labels))


def alone(attack: Imprint, images: Tensor) -> Tensor:
    """Indices of the images that have a bin to themselves; the oracle knows them all."""
    means = images.double().flatten(1).mean(1)
    bins = [sum(float(one) > cut for cut in attack.cuts.tolist()) for one in means]
    return torch.tensor([place for place, own in enumerate(bins) if bins.count(own) == 1])


def worst(found: Tensor | None, truth: Tensor) -> float:
    """Largest relative error under the best one-to-one matching."""
    assert found is not None and found.shape == truth.shape
    apart = (found[:, None].double() - truth[None].double()).flatten(2).norm(dim=2)
    rows, columns = linear_sum_assignment(apart.numpy())
    return float((apart[rows, columns] / truth.double().flatten(1).norm(dim=1)[columns]).max())


@pytest.mark.parametrize(("kind", "layer"), [("convolution", ""), ("bent", "1")])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-3)])
def test_all_images_alone_in_their_bins_through_a_sum_of_clients(
    kind: str, layer: str, dtype: torch.dtype, bound: float
) -> None:
    attack, model = trap(layer), network(kind, dtype)
    trapped = attack.prepare(model, Generator().manual_seed(0))
    for seed in range(4):
        images, labels = batch(24, seed, dtype)
        each = [sent(trapped, images[k : k + 3], labels[k : k + 3]) for k in range(0, 24, 3)]
        total = {name: torch.stack([one[name] for one in each]).sum(0) for name in each[0]}
        found = attack(Observation(trapped, total, clients=8))
        single = alone(attack, images)
        assert 8 <= len(single) < 24  # mixtures occur too, so that they could be taken for images
        assert worst(found.images, images[single]) < bound
        assert found.facts["bins left out as mixtures"] == found.facts["bins occupied"] - len(single)
        assert found.used == ("public statistics", "malicious model")


def test_without_copies_mixtures_are_given_as_images() -> None:
    attack = trap(copies=1)
    trapped = attack.prepare(network("convolution"), Generator().manual_seed(0))
    images, labels = batch(24, 1)
    found = attack(Observation(trapped, sent(trapped, images, labels)))
    assert found.images is not None and len(found.images) > len(alone(attack, images))


def test_a_block_changes_what_the_model_says_by_little_and_the_model_not_at_all() -> None:
    model = network("convolution")
    before = {name: one.clone() for name, one in model.state_dict().items()}
    state = torch.random.get_rng_state()
    trapped = trap().prepare(model, Generator().manual_seed(0))
    assert torch.equal(state, torch.random.get_rng_state())
    images, _ = batch(20, 3)
    torch.testing.assert_close(trapped(images), model(images), atol=2e-2, rtol=0)
    assert not torch.equal(trapped(images), model(images))
    bent = network("bent")
    kept = {name: one.clone() for name, one in bent.state_dict().items()}
    trap("1").prepare(bent, Generator().manual_seed(0))
    for one, old in ((model, before), (bent, kept)):
        assert all(torch.equal(new, old[name]) for name, new in one.state_dict().items())


def test_before_a_transformer_by_keyword() -> None:
    from transformers import ViTConfig, ViTForImageClassification

    with seeded(Generator().manual_seed(0)):
        configuration = ViTConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            image_size=4,
            patch_size=2,
            num_channels=2,
            num_labels=5,
        )
        model = ViTForImageClassification(configuration).double().eval()
    attack = trap()
    trapped: Any = attack.prepare(model, Generator().manual_seed(0))
    images, labels = batch(12, 5)
    loss = nn.functional.cross_entropy(trapped(pixel_values=images).logits, labels)
    found = attack(Observation(trapped, gradients_of(trapped, loss)))
    assert worst(found.images, images[alone(attack, images)]) < 1e-10


def test_a_models_normalisation_is_undone() -> None:
    class Normalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network("bent")

        def forward(self, images: Tensor) -> Any:
            return self.inner((images - 0.4) / 0.25)

    attack = trap("inner.1")
    trapped = attack.prepare(Normalised(), Generator().manual_seed(0))
    images, labels = batch(10, 2)
    found = attack(Observation(trapped, sent(trapped, images, labels)))
    assert worst(found.images, images[alone(attack, images)]) < 1e-10


def test_an_update_is_a_gradient() -> None:
    attack = trap()
    trapped = attack.prepare(network("convolution"), Generator().manual_seed(0))
    images, labels = batch(6, 4)
    update = {name: -0.5 * one for name, one in sent(trapped, images, labels).items()}
    found = attack(Observation(trapped, update, change=LocalSteps(0.5)))
    assert worst(found.images, images[alone(attack, images)]) < 1e-10


def test_through_a_quantising_channel() -> None:
    step = 2.0**-30
    attack = trap(strength=1.0, error=step / 2 * 8)  # of a sum of 8
    trapped = attack.prepare(network("convolution"), Generator().manual_seed(0))
    images, labels = batch(8, 4)
    each = [sent(trapped, images[k : k + 1], labels[k : k + 1]) for k in range(8)]
    total = {name: torch.stack([(one[name] / step).round() * step for one in each]).sum(0) for name in each[0]}
    found = attack(Observation(trapped, total, clients=8))
    assert worst(found.images, images[alone(attack, images)]) < 1e-3
    assert trap(strength=1.0)(Observation(trapped, total, clients=8)).images is None  # the step taken for data


def test_out_of_time_it_says_so() -> None:
    attack = trap()
    trapped = attack.prepare(network("convolution"), Generator().manual_seed(0))
    found = attack(Observation(trapped, sent(trapped, *batch(8))), seconds=1e-9)
    assert "time limit" in found.stopped and found.images is None


def test_controls_recover_nothing() -> None:
    attack, generator = trap(), Generator().manual_seed(9)
    trapped = attack.prepare(network("convolution"), Generator().manual_seed(0))
    images, labels = batch(12, 6)
    whole = sent(trapped, images, labels)
    shuffled = {
        name: one.flatten()[torch.randperm(one.numel(), generator=generator)].reshape(one.shape)
        for name, one in whole.items()
    }
    assert attack(Observation(trapped, shuffled)).images is None
    noise = {name: torch.randn(one.shape, generator=generator, dtype=one.dtype) for name, one in whole.items()}
    noisy = {name: one + 0.1 * one.std() * noise[name] for name, one in whole.items()}
    assert attack(Observation(trapped, noisy)).images is None
    with torch.no_grad():  # another client's model has no cuts: the trap is not there
        straight = trap().prepare(network("convolution"), Generator().manual_seed(0))
        fresh: Any = straight
        fresh.imprint.bias.copy_(torch.randn(80, generator=generator))
    with pytest.raises(InvalidArgument, match="no cuts in order"):
        attack(Observation(straight, sent(straight, images, labels)))


def test_the_cuts_are_equally_likely_under_the_public_statistics() -> None:
    attack = Imprint(SHAPE, 50, 0.4, 0.1)
    draws = 0.4 + 0.1 * torch.randn(200_000, generator=Generator().manual_seed(0), dtype=torch.float64)
    counts = torch.bincount(torch.bucketize(draws, attack.cuts), minlength=51)
    assert counts[0] == 0  # nothing under the lowest cut
    assert float((counts[1:] - 4000).abs().max()) < 5 * 4000**0.5


def test_what_does_not_fit_is_refused_with_the_way_out() -> None:
    model, images = network("bent"), batch(2)
    generator = Generator().manual_seed(0)
    with pytest.raises(InvalidArgument, match="lower bins"):
        trap("1", bins=46).prepare(model, generator)  # 92 of 100 outputs
    with pytest.raises(InvalidArgument, match="ReLU"):
        trap("1").prepare(network("smooth"), generator)
    with pytest.raises(InvalidArgument, match="no images"):
        trap("3").prepare(network("bent"), generator)
    with pytest.raises(InvalidArgument, match="Conv2d"):
        trap("0").prepare(network("convolution"), generator)
    with pytest.raises(InvalidArgument, match="prepare"):
        trap()(Observation(model, sent(model, *images)))
    with pytest.raises(InvalidArgument, match="no cuts in order"):
        trap("1")(Observation(model, sent(model, *images)))
    trapped = trap().prepare(model, generator)
    tensors = sent(trapped, *images)
    hidden = tensors | {"imprint.bias": torch.full_like(tensors["imprint.bias"], torch.nan)}
    with pytest.raises(InvalidArgument, match="hidden in part"):
        trap()(Observation(trapped, hidden))
    with pytest.raises(InvalidArgument, match="adam"):
        trap()(Observation(trapped, tensors, change=LocalSteps(0.1, optimizer="adam")))
    for wrong in ({"bins": 1}, {"copies": 0}, {"deviation": 0.0}, {"strength": -1.0}, {"error": -1.0}):
        with pytest.raises(InvalidArgument, match=next(iter(wrong))):
            Imprint(**({"shape": SHAPE, "bins": 4, "mean": 0.5, "deviation": 0.1} | wrong))  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="at least 2"):
        brightness(torch.rand(1, 4))
