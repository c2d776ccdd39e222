"""What an attack must know of a transformer that sees images: how patches become tokens, and where its weights are.

Models are told apart by the modules they are made of, not by their names. What is read is then tried on a probe, so
that a variant which computes something else (interpolated positions, a norm on the patches) is refused instead of
attacked wrongly.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Final, final

import torch
from torch import Tensor, nn

from privfm.attacks.reconstruction.architectures import GOLDEN, SAME, Architecture, Block, inside, made_by, recognised
from privfm.checks import require


class VisionModel(Architecture):
    """A vision transformer as an attack sees it. The model itself stays as it is.

    A variant that is not known is attacked by giving an attack a subclass of this as its `architecture`.

    Args:
      model: the client's whole model, adapters and head included.

    Attributes:
      root: the transformer inside the model, without its head.
      heads: of attention.
    """

    heads: int

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.heads = int(self.root.config.num_attention_heads)
        conv, (_, height, width) = self.projection, self.shape
        sizes = (conv.kernel_size, conv.stride, conv.padding)
        require(
            conv.kernel_size == conv.stride and conv.padding in {(0, 0), "valid"} and conv.groups == 1,
            f"the patch projection has kernel, stride and padding {sizes}: expected patches side by side; {_PROVIDE}",
        )
        down, right = self.patch
        require(
            height % down == 0 and width % right == 0,
            f"images of {height} x {width} are no whole number of {down} x {right} patches: their rim reaches no token",
        )

    # ---------------------------------------------------------------------------- what an architecture writes

    @property
    @abstractmethod
    def projection(self) -> nn.Conv2d:
        """The map of a patch to a token."""

    @property
    @abstractmethod
    def positions(self) -> nn.Parameter:
        """What is added to the tokens; `(T, d)` or `(1, T, d)`, the patches' rows last."""

    @property
    @abstractmethod
    def layers(self) -> Any:
        """The blocks, in order."""

    @abstractmethod
    def attention(self, number: int) -> tuple[nn.Module, nn.Module, nn.Module, nn.Module]:
        """The modules of query, key, value and output of a block."""

    @abstractmethod
    def norm(self, number: int) -> nn.Module:
        """What stands between a block's input and its attention."""

    # ------------------------------------------------------------------------------------- what follows from it

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        size = self.root.config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return self.projection.in_channels, int(height), int(width)

    @property
    def patch(self) -> tuple[int, int]:
        """Height and width of a patch."""
        down, right = self.projection.kernel_size
        return down, right

    @property
    def patches(self) -> int:
        """Number of patches of an image."""
        return self.shape[1] // self.patch[0] * (self.shape[2] // self.patch[1])

    @property
    def width(self) -> int:
        """Of a token."""
        return self.projection.out_channels

    @property
    def tokens(self) -> int:
        """Number of tokens, special ones included."""
        return self.positions.numel() // self.width

    @property
    def special(self) -> int:
        """Tokens before the patches: class, distillation."""
        return self.tokens - self.patches

    @property
    def projection_name(self) -> str:
        """Parameter name of the patch projection's weight, `(d, channels, height, width)` of a patch."""
        return self.name(self.projection.weight)

    @property
    def positions_name(self) -> str:
        """Parameter name of what is added to the tokens."""
        return self.name(self.positions)

    def block(self, number: int) -> Block:
        """Where the attention of a block has its maps."""
        query, key, value, _ = self.attention(number)
        return Block(self.map(query), self.map(key), self.map(value), query)

    def cut(self, images: Tensor) -> Tensor:
        """Images `(b, channels, height, width)` as patches, `(b, patches, pixels of a patch)`."""
        return nn.functional.unfold(images, self.patch, stride=self.patch).transpose(1, 2)

    def paste(self, patches: Tensor) -> Tensor:
        """Patches as images: the inverse of `cut`."""
        return nn.functional.fold(patches.transpose(1, 2), self.shape[1:], self.patch, stride=self.patch)

    def matrix(self, weight: Tensor | None = None) -> Tensor:
        """The patch projection, or a gradient of it, `(d, pixels of a patch)` float64."""
        return (self.projection.weight.detach() if weight is None else weight).flatten(1).double()

    def added(self) -> Tensor:
        """What is added to a patch's token: position and the projection's bias, `(patches, d)` float64."""
        rows = self.positions.detach().reshape(self.tokens, self.width)[self.special :].double()
        bias = self.projection.bias
        return rows if bias is None else rows + bias.detach().double()

    def embedded(self, patches: Tensor) -> Tensor:
        """Tokens of patches `(b, patches, pixels of a patch)` as the blocks are given them: `(b, patches, d)`."""
        return patches.double() @ self.matrix().T + self.added()

    def tokens_of(self, images: Tensor) -> Tensor:
        """All tokens of images as the model's own code makes them, before any block or norm: `(b, T, d)`."""
        return made_by(self.root.embeddings, self.root, pixel_values=images)

    def probe(self) -> Tensor:
        """One image that is no client's, `(1, channels, height, width)`, in the weights' type."""
        weight, many = self.projection.weight, torch.tensor(self.shape).prod().item()
        values = torch.arange(many, dtype=torch.float64).mul(GOLDEN).remainder(1.0)
        return values.reshape(1, *self.shape).to(weight)

    def require_as_computed(self) -> None:
        """Tries `embedded` against the model's own code.

        Raises:
          InvalidArgument: they differ.
        """
        computed = self.tokens_of(self.probe())[:, self.special :].double()
        said = self.embedded(self.cut(self.probe()))
        fits = computed.shape == said.shape
        error = float((computed - said).norm() / computed.norm()) if fits else float("inf")
        require(
            error < SAME,
            f"{type(self.root).__name__} makes tokens of patches in another way than {type(self).__name__} says "
            f"(relative difference {error:.1g}); {_PROVIDE}",
        )


_PROVIDE: Final = (
    "give the attack architecture=, a subclass of VisionModel that names the patch projection, the position embedding "
    "and the attention of a block"
)


def _first(part: Any, *names: str) -> Any:
    """The first attribute there is.

    Raises:
      AttributeError: there is none.
    """
    for name in names:
        found = part
        for step in name.split("."):
            found = getattr(found, step, None)
        if found is not None:
            return found
    raise AttributeError(f"{type(part).__name__} has none of {', '.join(names)}")


@final
class ViT(VisionModel):
    """ViT and its kin (DeiT, ViT-MSN, DINOv2): a class token in front, positions added, a norm before attention.

    Source: Dosovitskiy et al., "An image is worth 16x16 words", 2021.
    """

    @classmethod
    def find(cls, model: nn.Module) -> Any:
        def fits(part: Any) -> bool:
            embeddings = getattr(part, "embeddings", None)
            return (
                hasattr(getattr(embeddings, "patch_embeddings", None), "projection")
                and getattr(embeddings, "position_embeddings", None) is not None
                and (hasattr(part, "layers") or hasattr(part, "encoder"))
            )

        return inside(model, fits)

    @property
    def projection(self) -> nn.Conv2d:
        found: nn.Conv2d = self.root.embeddings.patch_embeddings.projection
        return found

    @property
    def positions(self) -> nn.Parameter:
        found: nn.Parameter = self.root.embeddings.position_embeddings
        return found

    @property
    def layers(self) -> Any:
        return _first(self.root, "layers", "encoder.layer", "encoder.layers")

    def attention(self, number: int) -> tuple[nn.Module, nn.Module, nn.Module, nn.Module]:
        maps = self.layers[number].attention
        return maps.q_proj, maps.k_proj, maps.v_proj, maps.o_proj

    def norm(self, number: int) -> nn.Module:
        found: nn.Module = _first(self.layers[number], "layernorm_before", "norm1")
        return found


@final
class CLIPVision(VisionModel):
    """The image side of CLIP and SigLIP: as ViT, with positions from an embedding and other names.

    Source: Radford et al., "Learning transferable visual models from natural language supervision", 2021.
    """

    @classmethod
    def find(cls, model: nn.Module) -> Any:
        def fits(part: Any) -> bool:
            embeddings = getattr(part, "embeddings", None)
            return hasattr(embeddings, "patch_embedding") and hasattr(embeddings, "position_embedding")

        return inside(model, fits)

    @property
    def projection(self) -> nn.Conv2d:
        found: nn.Conv2d = self.root.embeddings.patch_embedding
        return found

    @property
    def positions(self) -> nn.Parameter:
        found: nn.Parameter = self.root.embeddings.position_embedding.weight
        return found

    @property
    def layers(self) -> Any:
        return self.root.encoder.layers

    def attention(self, number: int) -> tuple[nn.Module, nn.Module, nn.Module, nn.Module]:
        maps = self.layers[number].self_attn
        return maps.q_proj, maps.k_proj, maps.v_proj, maps.out_proj

    def norm(self, number: int) -> nn.Module:
        found: nn.Module = self.layers[number].layer_norm1
        return found


_KINDS: Final[tuple[type[VisionModel], ...]] = (ViT, CLIPVision)


def vision_model(model: nn.Module, architecture: type[VisionModel] | None = None) -> VisionModel:
    """The model as an attack sees it.

    Args:
      model: any of transformers' models with one of these inside, with a head or adapters around it or without.
      architecture: how to read it; None finds out.

    Raises:
      InvalidArgument: the model is of no known kind, or computes something else than its kind; the message says what
        to provide.
    """
    return recognised(model, _KINDS, architecture, _PROVIDE)
