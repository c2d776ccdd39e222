"""What an attack must know of a transformer that reads text: what its attention is given, and where its weights are.

Models are told apart by the modules they are made of, not by their names. What is read is then tried on a probe, so
that a variant which computes something else (scaled embeddings, other norms) is refused instead of attacked wrongly.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Final

import torch
from torch import Tensor, nn

from privfm.attacks.reconstruction.architectures import SAME, Architecture, Block, given_to, inside, recognised
from privfm.checks import require


class TextModel(Architecture):
    """A transformer as an attack sees it. The model itself stays as it is, on whatever device it lies.

    Tokens are given, and what is computed is given back, on the CPU, where attacks keep what they have observed.

    A variant that is not known is attacked by giving an attack a subclass of this as its `architecture`.

    Class constants:
      causal: a position sees no later one.
      positional: what block 0's attention is given depends on where a token stands.

    Args:
      model: the client's whole model, adapters and head included.

    Attributes:
      root: the transformer inside the model, without its head.
      heads: of attention.
      key_heads: heads of keys and values; fewer than `heads` under grouped-query attention.
      head_width: width of one.
    """

    causal: bool
    positional: bool
    heads: int
    key_heads: int
    head_width: int

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._blocks: tuple[Block, ...] | None = None

    # ---------------------------------------------------------------------------- what an architecture writes

    @property
    @abstractmethod
    def embedding(self) -> nn.Embedding:
        """Token embedding, `(V, h)`."""

    @abstractmethod
    def first_inputs(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """What block 0's maps are given for tokens `(n,)` at positions `(n,)`, each by itself: `(n, d)` float64."""

    @abstractmethod
    def _attention(self, block: int) -> tuple[nn.Module, nn.Module, nn.Module]:
        """The modules of query, key and value; one module three times where a single weight holds them."""

    @property
    @abstractmethod
    def depth(self) -> int:
        """Number of blocks."""

    # ------------------------------------------------------------------------------------- what follows from it

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return self.embedding.weight.device

    @property
    def vocabulary(self) -> int:
        """Number of tokens."""
        return self.embedding.num_embeddings

    @property
    def width(self) -> int:
        """Width of what the maps are given."""
        return self.block(0).query.inputs

    @property
    def most_positions(self) -> int | None:
        """Longest text; None: no such bound."""
        found = getattr(self.root.config, "max_position_embeddings", None)
        return None if found is None else int(found)

    @property
    def embedding_name(self) -> str:
        """Parameter name of the token embedding."""
        return self.name(self.embedding.weight)

    @property
    def head_name(self) -> str | None:
        """Parameter name of the language-model head, `(V, h)`; None without one. Tied to the embedding, it is that."""
        head = getattr(self.model, "get_output_embeddings", lambda: None)()
        weight = getattr(head, "weight", None)
        return None if weight is None else self.names.get(id(weight), self.embedding_name)

    def block(self, number: int) -> Block:
        """Where the attention of a block has its maps."""
        if self._blocks is None:
            self._blocks = tuple(self._block(each) for each in range(self.depth))
        return self._blocks[number]

    def _block(self, number: int) -> Block:
        modules = self._attention(number)
        fused = modules[0] is modules[1]
        parts = [self.map(module, place if fused else None) for place, module in enumerate(modules)]
        return Block(parts[0], parts[1], parts[2], modules[0])

    def inputs(self, number: int, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """What the maps of a block are given for whole texts, by the model's own code: `(b, T)` -> `(b, T, d)`.

        Args:
          number: of the block; later ones are not computed.
          tokens: ids, padded on the right.
          mask: `(b, T)`, 1 at real tokens; None: all are.
        """
        mask = torch.ones_like(tokens) if mask is None else mask
        asked = {"input_ids": tokens.to(self.device), "attention_mask": mask.to(self.device)}
        return given_to(self.block(number).module, self.root, **asked).cpu()

    def require_as_computed(self) -> None:
        """Tries `first_inputs` against the model's own code.

        Raises:
          InvalidArgument: they differ.
        """
        tokens = torch.tensor([[4, 3, 5, 7]]) % self.vocabulary  # 0 and 1 are padding somewhere
        given = self.inputs(0, tokens)[0]
        computed, computed_type = given.double(), given.dtype
        said = self.first_inputs(tokens[0], torch.arange(4))
        error = float((computed - said).norm() / computed.norm())
        require(
            error < max(SAME, _ROUNDINGS * torch.finfo(computed_type).eps),
            f"{type(self.root).__name__} computes the input of its first attention in another way than "
            f"{type(self).__name__} says (relative difference {error:.1g}); {_PROVIDE}",
        )


_ROUNDINGS: Final = 2.0
"""Units of a coarser type's precision by which its arithmetic may differ: sum and norm in bfloat16 are off by 0.5."""

_PROVIDE: Final = (
    "give the attack architecture=, a subclass of TextModel that names the token embedding, the maps of query, key and "
    "value, and what block 0's attention is given for a token at a position"
)


def _standardised(rows: Tensor, norm: Any) -> Tensor:
    """A LayerNorm in float64."""
    weight, bias = norm.weight.detach().cpu().double(), norm.bias.detach().cpu().double()
    return nn.functional.layer_norm(rows, rows.shape[-1:], weight, bias, norm.eps)


class Encoder(TextModel):
    """BERT's family: token, position and type embeddings are added and standardised; attention sees both sides.

    Source: Devlin et al., "BERT", 2019.
    """

    causal, positional = False, True

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        config = self.root.config
        self.heads = self.key_heads = int(config.num_attention_heads)
        self.head_width = self.block(0).query.outputs // self.heads

    @classmethod
    def find(cls, model: nn.Module) -> Any:
        return inside(model, lambda part: hasattr(part, "embeddings") and cls._stack(part) is not None)

    @staticmethod
    def _stack(root: Any) -> Any:
        """The list of blocks; None where it is no such encoder."""
        layers = getattr(getattr(root, "encoder", None), "layer", None)
        if layers is not None and hasattr(root.embeddings, "word_embeddings"):
            attention = getattr(layers[0], "attention", None)
            return layers if hasattr(getattr(attention, "self", None), "query") else None
        layers = getattr(getattr(root, "transformer", None), "layer", None)  # DistilBERT
        return layers if layers is not None and hasattr(layers[0].attention, "q_lin") else None

    @property
    def depth(self) -> int:
        return len(self._stack(self.root))

    @property
    def embedding(self) -> nn.Embedding:
        found: nn.Embedding = self.root.embeddings.word_embeddings
        return found

    @property
    def first_position(self) -> int:
        """Row of the position embedding that the first token gets: RoBERTa counts on from its padding."""
        padding = getattr(self.root.embeddings, "padding_idx", None)
        return 0 if padding is None else int(padding) + 1

    @property
    def most_positions(self) -> int | None:
        return int(self.root.embeddings.position_embeddings.num_embeddings) - self.first_position

    def added(self, positions: Tensor) -> Tensor:
        """What is added to a token at these positions before the norm, `(n, d)` float64."""
        embeddings = self.root.embeddings
        rows: Tensor = embeddings.position_embeddings.weight.detach()[positions + self.first_position].cpu().double()
        kinds = getattr(embeddings, "token_type_embeddings", None)
        return rows if kinds is None else rows + kinds.weight.detach()[0].cpu().double()

    @property
    def norm(self) -> Any:
        """The LayerNorm behind the embeddings."""
        return self.root.embeddings.LayerNorm

    def first_inputs(self, tokens: Tensor, positions: Tensor) -> Tensor:
        rows = self.embedding.weight.detach()[tokens].cpu().double() + self.added(positions)
        return _standardised(rows, self.norm)

    def _attention(self, block: int) -> tuple[nn.Module, nn.Module, nn.Module]:
        attention = self._stack(self.root)[block].attention
        if hasattr(attention, "q_lin"):
            return attention.q_lin, attention.k_lin, attention.v_lin
        return attention.self.query, attention.self.key, attention.self.value


class GPT2(TextModel):
    """GPT-2: token and position embeddings are added; each block standardises before its attention; causal.

    Source: Radford et al., "Language models are unsupervised multitask learners", 2019.
    """

    causal, positional = True, True

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.heads = self.key_heads = int(self.root.config.num_attention_heads)
        self.head_width = self.block(0).query.outputs // self.heads

    @classmethod
    def find(cls, model: nn.Module) -> Any:
        return inside(model, lambda part: all(hasattr(part, name) for name in ("wte", "wpe", "h")))

    @property
    def depth(self) -> int:
        return len(self.root.h)

    @property
    def embedding(self) -> nn.Embedding:
        found: nn.Embedding = self.root.wte
        return found

    def first_inputs(self, tokens: Tensor, positions: Tensor) -> Tensor:
        words, places = self.embedding.weight.detach()[tokens], self.root.wpe.weight.detach()[positions]
        rows = words.cpu().double() + places.cpu().double()
        return _standardised(rows, self.root.h[0].ln_1)

    def _attention(self, block: int) -> tuple[nn.Module, nn.Module, nn.Module]:
        fused = self.root.h[block].attn.c_attn
        return fused, fused, fused


class Llama(TextModel):
    """Llama, Mistral, Qwen: rotary positions, so that block 0 is given the same for a token wherever it stands; causal.

    Source: Touvron et al., "LLaMA", 2023.
    """

    causal, positional = True, False

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        config, query, key = self.root.config, self.block(0).query, self.block(0).key
        self.heads = int(config.num_attention_heads)
        self.head_width = query.outputs // self.heads
        self.key_heads = key.outputs // self.head_width

    @classmethod
    def find(cls, model: nn.Module) -> Any:
        def fits(part: Any) -> bool:
            layers = getattr(part, "layers", None)
            return hasattr(part, "embed_tokens") and layers is not None and hasattr(layers[0], "input_layernorm")

        return inside(model, fits)

    @property
    def depth(self) -> int:
        return len(self.root.layers)

    @property
    def embedding(self) -> nn.Embedding:
        found: nn.Embedding = self.root.embed_tokens
        return found

    def first_inputs(self, tokens: Tensor, positions: Tensor) -> Tensor:
        norm = self.root.layers[0].input_layernorm
        rows = self.embedding.weight.detach()[tokens].cpu().double()
        scale = (rows.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()
        found: Tensor = rows * scale * norm.weight.detach().cpu().double()
        return found

    def _attention(self, block: int) -> tuple[nn.Module, nn.Module, nn.Module]:
        attention = self.root.layers[block].self_attn
        return attention.q_proj, attention.k_proj, attention.v_proj


_KINDS: Final[tuple[type[TextModel], ...]] = (Encoder, GPT2, Llama)


def text_model(model: nn.Module, architecture: type[TextModel] | None = None) -> TextModel:
    """The model as an attack sees it.

    Args:
      model: any of transformers' models with one of these inside, with a head or adapters around it or without.
      architecture: how to read it; None finds out.

    Raises:
      InvalidArgument: the model is of no known kind, or computes something else than its kind; the message says what
        to provide.
    """
    return recognised(model, _KINDS, architecture, _PROVIDE)
