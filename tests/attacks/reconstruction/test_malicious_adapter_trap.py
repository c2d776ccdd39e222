"""The adapter trap: patches out of LoRA's gradients, exactly, and what tells that they are of several images."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

from privfm.attacks.reconstruction.malicious import AdapterTrap
from privfm.attacks.reconstruction.malicious.patch_codes import pixel_basis, position_codes
from privfm.attacks.reconstruction.vision_models import vision_model
from privfm.checks import InvalidArgument
from privfm.contracts import LocalSteps, Observation, gradients_of
from privfm.randomness import seeded


def adapted(
    depth: int = 4,
    dtype: torch.dtype = torch.float64,
    modules: tuple[str, ...] = ("q_proj", "v_proj"),
    kind: str = "ViT",
    rank: int = 4,
    trained: tuple[str, ...] = (),
    **more: Any,
) -> Any:
    import transformers
    from peft import LoraConfig, get_peft_model

    small = {
        "hidden_size": 48,
        "num_hidden_layers": depth,
        "num_attention_heads": 4,
        "intermediate_size": 16,
        "image_size": 16,
        "patch_size": 4,
        "num_channels": 1,
        "num_labels": 6,
    }
    with seeded(Generator().manual_seed(depth)):
        configuration = getattr(transformers, f"{kind}Config")(**(small | more))
        model = getattr(transformers, f"{kind}ForImageClassification")(configuration)
        return (
            get_peft_model(model, LoraConfig(r=rank, target_modules=list(modules), modules_to_save=list(trained)))
            .to(dtype)
            .eval()
        )


def images(count: int, seed: int = 0, dtype: torch.dtype = torch.float64, channels: int = 1) -> Tensor:
    generator = Generator().manual_seed(seed)
    return torch.rand(count, channels, 16, 16, generator=generator, dtype=torch.float64).to(dtype)


def sent(model: Any, batch: Tensor, labels: list[int]) -> dict[str, Tensor]:
    """Adapters alone: the rest is frozen."""
    return gradients_of(model, nn.functional.cross_entropy(model(batch).logits, torch.tensor(labels)))


def off(found: Tensor | None, truth: Tensor) -> float:
    assert found is not None and found.shape == truth.shape
    return float((found.double() - truth.double()).norm() / truth.double().norm())


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-11), (torch.float32, 1e-4)])
@pytest.mark.parametrize("kind", ["ViT", "DeiT"])
def test_a_whole_image_and_its_label(dtype: torch.dtype, bound: float, kind: str) -> None:
    attack, model = AdapterTrap(), adapted(dtype=dtype, kind=kind)
    trapped = attack.prepare(model, Generator().manual_seed(0))
    for seed in range(3):
        truth = images(1, seed, dtype)
        tensors = sent(trapped, truth, [seed + 1])
        assert all("lora" in name for name in tensors)
        found = attack(Observation(trapped, tensors))
        assert off(found.images, truth) < bound
        assert found.labels == (seed + 1,) and float(found.facts["misfit to one image"]) < bound
        assert found.used == ("malicious model",) and found.facts["patches read"] == attack.capacity(model) == 16


def test_rounds_of_the_same_data_give_the_next_patches() -> None:
    model, truth = adapted(depth=2), images(1)
    rounds = []
    for number in range(2):
        attack = AdapterTrap(round=number)
        trapped = attack.prepare(model, Generator().manual_seed(number))
        rounds.append(Observation(trapped, sent(trapped, truth, [2])))
    first = AdapterTrap()(rounds[0])
    assert first.facts["patches read"] == 8 and first.images is not None
    torch.testing.assert_close(first.images[:, :, :8], truth[:, :, :8])  # two of four rows of patches
    assert float((first.images[:, :, 8:] - truth[:, :, :8].mean()).abs().max()) < 1e-12  # not read: the mean, no guess
    both = AdapterTrap()(rounds)
    assert off(both.images, truth) < 1e-11 and both.labels == (2,)


@pytest.mark.parametrize("trained", [(), ("classifier",)])
def test_one_of_a_class_out_of_a_sum_of_clients(trained: tuple[str, ...]) -> None:
    attack = AdapterTrap(target=4)
    trapped = attack.prepare(adapted(trained=trained), Generator().manual_seed(0))
    batch, labels = images(6), [0, 1, 4, 2, 2, 5]
    each = [sent(trapped, batch[k : k + 2], labels[k : k + 2]) for k in range(0, 6, 2)]
    total = {name: torch.stack([one[name] for one in each]).sum(0) for name in each[0]}
    found = attack(Observation(trapped, total, clients=3))
    assert off(found.images, batch[2:3]) < 1e-11 and found.labels == (4,)


@pytest.mark.parametrize("labels", [[3, 3], [3, 5]])
def test_several_images_are_a_mixture_and_the_misfit_says_so(labels: list[int]) -> None:
    attack = AdapterTrap()
    trapped = attack.prepare(adapted(), Generator().manual_seed(0))
    batch = images(2)
    found = attack(Observation(trapped, sent(trapped, batch, labels)))
    assert float(found.facts["misfit to one image"]) > 1e-4  # 1e-14 for one
    assert min(off(found.images, batch[k : k + 1]) for k in range(2)) > 0.2


def test_patches_that_do_not_fit_lose_their_finest_waves_only() -> None:
    attack, truth = AdapterTrap(), images(1, channels=3)  # 48 pixels a patch, 48 - 10 numbers of room
    trapped = attack.prepare(adapted(num_channels=3), Generator().manual_seed(0))
    found = attack(Observation(trapped, sent(trapped, truth, [1])))
    seen = vision_model(trapped)
    basis = pixel_basis(3, (4, 4), 38)
    coarse = seen.paste(seen.cut(truth) @ basis.T @ basis)
    assert off(found.images, coarse) < 1e-11 and 0.01 < off(found.images, truth) < 0.4


def test_images_of_another_scale() -> None:
    truth = 4 * images(1) - 2
    attack = AdapterTrap(largest=2.0)
    trapped = attack.prepare(adapted(), Generator().manual_seed(0))
    assert off(attack(Observation(trapped, sent(trapped, truth, [1]))).images, truth) < 1e-11


def test_pixels_beyond_the_bound_lose_rows_and_give_no_wrong_ones() -> None:
    attack, truth = AdapterTrap(largest=0.05), images(1)
    truth[:, :, :, :8] *= 0.01
    trapped = attack.prepare(adapted(), Generator().manual_seed(0))
    seen = vision_model(trapped)
    tokens = attack._read(seen, sent(trapped, truth, [1]))
    patches = seen.cut(truth)[0]
    assert 0 < len(tokens) < 16
    for token in tokens:
        torch.testing.assert_close(token.pixels, patches[token.slot.patch])


def test_an_update_of_a_clipped_client_is_as_good() -> None:
    attack, truth = AdapterTrap(), images(1)
    trapped = attack.prepare(adapted(), Generator().manual_seed(0))
    update = {name: -1e-3 * one for name, one in sent(trapped, truth, [5]).items()}
    found = attack(Observation(trapped, update, change=LocalSteps(0.1)))
    assert off(found.images, truth) < 1e-11 and found.labels == (5,)


def test_hidden_entries_cost_their_pixels_and_hidden_codes_their_patch() -> None:
    attack, truth = AdapterTrap(), images(1)
    trapped = attack.prepare(adapted(), Generator().manual_seed(0))
    tensors = sent(trapped, truth, [1])
    name = next(name for name in tensors if "layers.1" in name and "v_proj.lora_A" in name)
    tensors[name][2, 7] = torch.nan  # block 1, row 2, four rows a block: patch 6
    tensors[name][3, 40:46] = torch.nan  # 6 of the 10 numbers of patch 7's code
    tensors[name][1, 40:44] = torch.nan
    found = attack(Observation(trapped, tensors))
    assert found.facts["patches read"] == 15 and found.images is not None and found.labels == (1,)
    assert found.facts["share of pixels guessed"] == pytest.approx(17 / 256)
    seen = vision_model(trapped)
    wrong = (seen.cut(found.images) - seen.cut(truth)).abs()[0] > 1e-9
    assert wrong.sum(1).tolist() == [0] * 6 + [1, 16] + [0] * 8 and bool(wrong[6, 7])


def test_controls_recover_nothing() -> None:
    attack, truth, generator = AdapterTrap(), images(1), Generator().manual_seed(3)
    model = adapted()
    trapped = attack.prepare(model, Generator().manual_seed(0))
    whole = sent(trapped, truth, [1])
    shuffled = {
        name: one.flatten()[torch.randperm(one.numel(), generator=generator)].reshape(one.shape)
        for name, one in whole.items()
    }
    assert attack(Observation(trapped, shuffled)).images is None
    with torch.no_grad():  # the untrapped model's own gradient, with its B not zero
        for name, one in model.named_parameters():
            if "lora_B" in name:
                one.copy_(torch.randn(one.shape, generator=generator))
    assert attack(Observation(trapped, sent(model, truth, [1]))).images is None
    noise = {name: torch.randn(one.shape, generator=generator, dtype=one.dtype) for name, one in whole.items()}
    noisy = {name: one + 0.3 * one.std() * noise[name] for name, one in whole.items()}
    assert attack(Observation(trapped, noisy)).images is None
    foreign = attack(Observation(trapped, sent(trapped, images(1, 50), [1])))
    assert off(foreign.images, truth) > 0.3  # exactly another image: nothing of this one


def test_the_model_given_and_the_global_random_state_stay() -> None:
    model = adapted(depth=2)
    before = {name: one.clone() for name, one in model.state_dict().items()}
    state = torch.random.get_rng_state()
    AdapterTrap(target=1).prepare(model, Generator().manual_seed(0))
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())


def test_what_does_not_fit_is_refused_with_the_way_out() -> None:
    model, generator = adapted(depth=2), Generator().manual_seed(0)
    with pytest.raises(InvalidArgument, match="v_proj"):
        AdapterTrap().prepare(adapted(modules=("q_proj",)), generator)
    with pytest.raises(InvalidArgument, match="lower round"):
        AdapterTrap(round=2).prepare(model, generator)
    with pytest.raises(InvalidArgument, match="no room"):
        AdapterTrap().prepare(adapted(hidden_size=8), generator)
    with pytest.raises(InvalidArgument, match="qkv_bias"):
        AdapterTrap().prepare(adapted(qkv_bias=False), generator)
    with pytest.raises(InvalidArgument, match="target=6"):
        AdapterTrap(target=6).prepare(model, generator)
    with pytest.raises(InvalidArgument, match="known kind"):
        AdapterTrap().prepare(nn.Linear(2, 2), generator)
    tensors = sent(model, images(1), [1])
    with pytest.raises(InvalidArgument, match="has no trap"):
        AdapterTrap()(Observation(model, tensors))
    trapped = AdapterTrap().prepare(model, generator)
    tensors = {name: one for name, one in sent(trapped, images(1), [1]).items() if "v_proj.lora_A" not in name}
    with pytest.raises(InvalidArgument, match="was sent"):
        AdapterTrap()(Observation(trapped, tensors))
    for wrong in ({"largest": 0.0}, {"round": -1}, {"target": -1}):
        with pytest.raises(InvalidArgument, match=next(iter(wrong))):
            AdapterTrap(**wrong)  # type: ignore[arg-type]


def test_codes_and_waves() -> None:
    codes = position_codes(17, 5)
    assert codes.shape == (17, 10) and not codes.sum(1).any()
    products = codes @ codes.T
    assert products.diagonal().eq(10).all() and float((products - 10 * torch.eye(17)).max()) == 6.0
    for most in (32, 31, 5):
        basis = pixel_basis(2, (4, 4), most)
        torch.testing.assert_close(basis @ basis.T, torch.eye(len(basis), dtype=torch.float64))
    flat = torch.ones(2, 16, dtype=torch.float64).flatten()
    coarsest = pixel_basis(2, (4, 4), 2)
    torch.testing.assert_close(flat @ coarsest.T @ coarsest, flat)  # the first waves are the channels' means
