"""Images from a vision transformer's gradients by linear algebra: where it is exact, and what says that it is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

from privfm.attacks.reconstruction.closed_form import APRIL, PatchInversion
from privfm.attacks.reconstruction.closed_form.patches import solve_known
from privfm.attacks.reconstruction.vision_models import vision_model
from privfm.checks import InvalidArgument
from privfm.contracts import LocalSteps, Observation, gradients_of
from privfm.randomness import seeded

POSITIONS = "vit.embeddings.position_embeddings"
PROJECTION = "vit.embeddings.patch_embeddings.projection.weight"


def transformer(seed: int = 0, dtype: torch.dtype = torch.float64, **more: Any) -> Any:
    from transformers import ViTConfig, ViTForImageClassification

    small = {
        "hidden_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 32,
        "image_size": 16,
        "patch_size": 4,
        "num_channels": 2,
        "num_labels": 5,
    }
    with seeded(Generator().manual_seed(seed)):
        return ViTForImageClassification(ViTConfig(**(small | more))).to(dtype).eval()


def bare(seed: int = 0) -> Any:
    """Without a norm before the first attention and without a path around it: what APRIL was written for."""
    model = transformer(seed, initializer_range=0.3)  # with 0.02 all tokens get nearly the same gradient

    class Around(nn.Module):
        def __init__(self, layer: Any) -> None:
            super().__init__()
            self.attention, self.mlp, self.layernorm_before = layer.attention, layer.mlp, nn.Identity()

        def forward(self, tokens: Tensor, *rest: Any, **more: Any) -> Any:
            return self.mlp(self.attention(tokens)[0])

    model.vit.layers[0] = Around(model.vit.layers[0])
    return model


def images(count: int, seed: int = 0, dtype: torch.dtype = torch.float64, channels: int = 2) -> Tensor:
    generator = Generator().manual_seed(seed)
    return torch.rand(count, channels, 16, 16, generator=generator, dtype=torch.float64).to(dtype)


def sent(model: Any, batch: Tensor, labels: list[int]) -> dict[str, Tensor]:
    return gradients_of(model, nn.functional.cross_entropy(model(batch).logits, torch.tensor(labels)))


def off(found: Tensor | None, truth: Tensor) -> float:
    assert found is not None and found.shape == truth.shape
    return float((found.double() - truth.double()).norm() / truth.double().norm())


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-11), (torch.float32, 1e-3)])
@pytest.mark.parametrize("depth", [1, 3])
def test_one_image_of_an_ordinary_transformer_is_exact(dtype: torch.dtype, bound: float, depth: int) -> None:
    for seed in range(3):
        model, truth = transformer(seed, dtype, num_hidden_layers=depth), images(1, seed, dtype)
        found = PatchInversion()(Observation(model, sent(model, truth, [seed])))
        assert off(found.images, truth) < bound
        assert found.facts["rank"] == 16 and float(found.facts["residual"]) < bound
        assert found.used == ()


def test_with_clips_positions_and_pooling_too() -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    with seeded(Generator().manual_seed(2)):
        configuration = CLIPVisionConfig(
            hidden_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=32,
            image_size=16,
            patch_size=4,
            num_channels=2,
        )
        model: Any = CLIPVisionModel(configuration).double().eval()
    truth = images(1)
    loss = model(truth).pooler_output[:, ::2].sum()  # any loss does
    found = PatchInversion()(Observation(model, gradients_of(model, loss)))
    assert off(found.images, truth) < 1e-10


def test_two_images_are_a_mixture_and_the_residual_says_so() -> None:
    model, truth = transformer(), images(2)
    found = PatchInversion()(Observation(model, sent(model, truth, [1, 3])))
    assert float(found.facts["residual"]) > 1e-3
    assert min(off(found.images, truth[k : k + 1]) for k in range(2)) > 0.3
    twice = truth[:1].repeat(2, 1, 1, 1)
    found = PatchInversion()(Observation(model, sent(model, twice, [1, 3])))
    assert off(found.images, truth[:1]) < 1e-10  # the same image under two labels is one


def test_scale_does_not_matter_and_an_update_is_a_gradient() -> None:
    model, truth = transformer(), images(1)
    update = {name: -1e-3 * one for name, one in sent(model, truth, [2]).items()}
    assert off(PatchInversion()(Observation(model, update, change=LocalSteps(1e-2))).images, truth) < 1e-10
    with pytest.raises(InvalidArgument, match="adam"):
        PatchInversion()(Observation(model, update, change=LocalSteps(1e-2, optimizer="adam")))


def test_hidden_features_are_done_without_while_enough_remain() -> None:
    model, truth, generator = transformer(), images(1), Generator().manual_seed(4)
    tensors = sent(model, truth, [0])
    some = tensors[PROJECTION].masked_fill(torch.rand(tensors[PROJECTION].shape, generator=generator) < 0.3, torch.nan)
    positions = tensors[POSITIONS].clone()
    positions[:, 3, 7] = torch.nan
    found = PatchInversion()(Observation(model, tensors | {PROJECTION: some, POSITIONS: positions}))
    assert off(found.images, truth) < 1e-10
    some[:30, 0, 0, 0] = torch.nan  # 10 of 40 equations for 16 unknowns: this pixel of every patch is lost
    found = PatchInversion()(Observation(model, tensors | {PROJECTION: some}))
    assert found.images is not None and found.facts["share of pixels guessed"] == 1 / 32
    lost = torch.zeros(1, 2, 16, 16, dtype=torch.bool)
    lost[0, 0, ::4, ::4] = True
    torch.testing.assert_close(found.images[~lost], truth[~lost])
    torch.testing.assert_close(found.images[lost], truth[~lost].mean().expand(16))


def test_controls_recover_nothing() -> None:
    model, truth, generator = transformer(), images(1), Generator().manual_seed(5)
    whole = sent(model, truth, [1])
    shuffled = {
        name: one.flatten()[torch.randperm(one.numel(), generator=generator)].reshape(one.shape)
        for name, one in whole.items()
    }
    found = PatchInversion()(Observation(model, shuffled))
    assert off(found.images, truth) > 0.9 and float(found.facts["residual"]) > 0.3
    size = 0.3 * torch.cat([one.flatten() for one in whole.values()]).norm()  # one private step, clipped at its norm
    noise = {name: torch.randn(one.shape, generator=generator, dtype=one.dtype) for name, one in whole.items()}
    private = PatchInversion()(Observation(model, {name: one + size * noise[name] for name, one in whole.items()}))
    assert off(private.images, truth) > 0.9
    foreign = PatchInversion()(Observation(model, sent(model, images(1, 77), [1])))
    assert off(foreign.images, truth) > 0.3


@pytest.mark.parametrize("attack", [PatchInversion(), APRIL()])
def test_frozen_positions_are_refused_with_the_way_out(attack: Any) -> None:
    model = bare()
    tensors = sent(model, images(1), [1])
    frozen = {name: one for name, one in tensors.items() if name != POSITIONS}
    with pytest.raises(InvalidArgument, match=r"position_embeddings was not sent.*AdapterTrap"):
        attack(Observation(model, frozen))
    hidden = tensors | {POSITIONS: torch.full_like(tensors[POSITIONS], torch.nan)}
    with pytest.raises(InvalidArgument, match="position_embeddings was not sent"):
        attack(Observation(model, hidden))


def test_more_patches_than_width_are_refused() -> None:
    model = transformer(hidden_size=12, num_attention_heads=2)
    with pytest.raises(InvalidArgument, match="16 patches in tokens of width 12"):
        PatchInversion()(Observation(model, sent(model, images(1), [1])))
    with pytest.raises(InvalidArgument, match="known kind"):
        PatchInversion()(Observation(nn.Linear(2, 2), {"weight": torch.ones(2, 2)}))


def test_april_is_exact_where_its_conditions_hold() -> None:
    model, truth = bare(), images(1)
    observation = Observation(model, sent(model, truth, [4]))
    found = APRIL()(observation)
    assert off(found.images, truth) < 1e-10
    assert float(found.facts["residual"]) < 1e-10
    assert off(PatchInversion()(observation).images, truth) < 1e-10
    two = APRIL()(Observation(model, sent(model, images(2), [4, 1])))
    assert off(two.images, truth) > 0.3


def test_april_refuses_what_it_would_get_wrong() -> None:
    model, truth = transformer(), images(1)
    assert APRIL.violation(vision_model(model)) > 0.1 > 1e-8 > APRIL.violation(vision_model(bare()))
    observation = Observation(model, sent(model, truth, [1]))
    with pytest.raises(InvalidArgument, match="use PatchInversion"):
        APRIL()(observation)
    assert all(one.requires_grad for one in model.parameters())
    partial = {name: one for name, one in observation.tensors.items() if "layers.0.attention.k_proj" not in name}
    with pytest.raises(InvalidArgument, match=r"k_proj\.weight was not sent"):
        APRIL()(Observation(model, partial))


def test_least_squares_on_known_equations() -> None:
    generator = Generator().manual_seed(0)
    left = torch.randn(9, 3, generator=generator, dtype=torch.float64)
    truth = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    right = left @ truth
    right[:5, 1], right[:7, 2], left[8, 0] = torch.nan, torch.nan, torch.nan
    found, equations = solve_known(left, right)
    assert equations == 1  # column 2: row 7 alone
    assert found[:, 2].isnan().all()
    torch.testing.assert_close(found[:, [0, 1, 3]], truth[:, [0, 1, 3]])
