"""How image transformers are read: every kind against its own code, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

from privfm.attacks.reconstruction.vision_models import ViT, vision_model
from privfm.checks import InvalidArgument
from privfm.randomness import seeded

SMALL: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 16,
    "image_size": 12,
    "patch_size": 4,
    "num_channels": 2,
}


def built(kind: str, **more: Any) -> Any:
    import transformers

    configuration = {"ViTForImageClassification": "ViT", "DeiTForImageClassification": "DeiT"}
    name = configuration.get(kind, kind.removesuffix("Model")) + "Config"
    with seeded(Generator().manual_seed(3)):
        return getattr(transformers, kind)(getattr(transformers, name)(**(SMALL | more)))


@pytest.mark.parametrize(
    ("kind", "special"),
    [
        ("ViTModel", 1),
        ("ViTForImageClassification", 1),
        ("DeiTForImageClassification", 2),
        ("ViTMSNModel", 1),
        ("Dinov2Model", 1),
        ("CLIPVisionModel", 1),
        ("SiglipVisionModel", 0),
    ],
)
def test_tokens_are_the_models_own(kind: str, special: int) -> None:
    model = built(kind)
    seen = vision_model(model)
    images = torch.rand(3, 2, 12, 12, generator=Generator().manual_seed(1))
    assert (seen.shape, seen.patches, seen.special, seen.width, seen.heads) == ((2, 12, 12), 9, special, 24, 3)
    own = model.get_submodule(seen.projection_name.removesuffix(".weight"))(images).flatten(2).transpose(1, 2)
    own = own + dict(model.named_parameters())[seen.positions_name].reshape(-1, 24)[special:]
    torch.testing.assert_close(seen.embedded(seen.cut(images)), own.double(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(seen.tokens_of(images)[:, special:].double(), own.double(), atol=1e-5, rtol=1e-5)
    assert torch.equal(seen.paste(seen.cut(images)), images)
    names = dict(model.named_parameters())
    for number in range(2):
        for one, end in zip(seen.block(number).projections, ("q_proj", "k_proj", "v_proj"), strict=True):
            assert one.weight in names and one.weight.endswith(f"{end}.weight") and one.lora_a is None
        assert isinstance(seen.norm(number), nn.LayerNorm)


def test_through_an_adapter() -> None:
    from peft import LoraConfig, get_peft_model

    with seeded(Generator().manual_seed(3)):
        model: Any = get_peft_model(built("ViTForImageClassification"), LoraConfig(r=2, target_modules=["v_proj"]))
    seen = vision_model(model)
    value = seen.block(1).value
    assert value.lora_a is not None and value.lora_b is not None
    assert dict(model.named_parameters())[value.lora_a].shape == (2, 24)
    assert value.scaling == 4.0 and seen.block(1).query.lora_a is None  # alpha 8 over rank 2


def test_what_is_not_known_is_refused_with_the_way_out() -> None:
    with pytest.raises(InvalidArgument, match="architecture="):
        vision_model(nn.Linear(2, 2))
    with pytest.raises(InvalidArgument, match="position embedding"):
        vision_model(built("BeitModel"))  # relative positions, none that are added
    with pytest.raises(InvalidArgument, match="rim"):
        vision_model(built("ViTModel", image_size=14))


def test_a_variant_that_computes_something_else_is_refused() -> None:
    class Louder(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner
            self.projection = inner.projection

        def forward(self, images: Tensor) -> Any:
            return 2 * self.inner(images)

    model = built("ViTModel")
    model.embeddings.patch_embeddings = Louder(model.embeddings.patch_embeddings)
    with pytest.raises(InvalidArgument, match="in another way than ViT says"):
        vision_model(model)


def test_an_architecture_may_be_given() -> None:
    class Renamed(nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.tokens, self.layers, self.config = inner.embeddings, inner.layers, inner.config

        def forward(self, pixel_values: Tensor) -> Any:
            return self.tokens(pixel_values)

    model = Renamed(built("ViTModel"))
    with pytest.raises(InvalidArgument, match="architecture="):
        vision_model(model)
    with pytest.raises(InvalidArgument, match="architecture="):
        vision_model(model, ViT)
