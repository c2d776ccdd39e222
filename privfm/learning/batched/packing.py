"""Packed tokens: examples of different lengths behind one another, without padding, between first and last block.

Padding exists only inside attention, which is a small part of the work; the products with frozen weights, which are
most of it, see real tokens alone. So ragged clients cost what their tokens cost.

R examples of at most T tokens, N real tokens in all: `(R, T, h)` padded, `(1, N, h)` packed.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from privfm.checks import require

ATTENTION = "privfm_packed"
"""Name of the attention over packed tokens. No mask function goes by it, so transformers makes no mask (5.23:
`masking_utils._preprocess_mask_arguments`): what is padding is known here."""

_LIKE = 16
"""Lengths that differ by less are padded to one another inside attention on a CPU."""
_HARMLESS = frozenset({"position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states",
                       "return_dict", "position_embeddings"})  # fmt: skip
"""What models hand to their attention besides, and what does not change its result (positions are in the queries)."""


class _Spread(torch.autograd.Function):
    """Rows to the places `index` of `size` zero rows. Places are unique: both ways are copies, the same every time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(index)
        return x.new_zeros((size, *x.shape[1:])).index_copy_(0, index, x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (index,) = ctx.saved_tensors
        return gradient.index_select(0, index), None, None


class _Collect(torch.autograd.Function):
    """Rows from the unique places `index`; the way back adds nothing up, unlike that of `index_select`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.size = len(x)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return gradient.new_zeros((ctx.size, *gradient.shape[1:])).index_copy_(0, index, gradient), None


class _ToParts(torch.autograd.Function):
    """Packed tokens `(N, h)` to every part's padded examples `(R * T, h)`.

    Padding repeats the first token of its own example: finite where the example is, and one gather, where zeros would
    be filled in and then written over; and what flows back lands in one tensor, where parts would be joined again. An
    epoch of MiniLM's last two blocks takes 5 % less for it (measured). What flows back to padding is never read.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, parts: list[Packing]) -> tuple[Tensor, ...]:
        ctx.parts = parts
        split = torch.split(x, [part.tokens for part in parts])
        return tuple(
            own if part.full else own.index_select(0, part.padded) for part, own in zip(parts, split, strict=True)
        )

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _real(ctx.parts, gradients), None


class _FromParts(torch.autograd.Function):
    """Every part's padded examples `(R * T, h)` to packed tokens `(N, h)`; back, padding gets zero."""

    @staticmethod
    def forward(ctx: Any, parts: list[Packing], *padded: Tensor) -> Tensor:
        ctx.parts = parts
        return _real(parts, padded)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        split = torch.split(gradient, [part.tokens for part in ctx.parts])
        return None, *(
            own if part.full else own.index_select(0, part.padded).index_fill_(0, part.holes, 0.0)
            for part, own in zip(ctx.parts, split, strict=True)
        )


def _real(parts: list[Packing], padded: tuple[Tensor, ...]) -> Tensor:
    """The real tokens of all parts, written to their place at once."""
    result = padded[0].new_empty(sum(part.tokens for part in parts), padded[0].shape[1])
    for part, own, into in zip(parts, padded, torch.split(result, [part.tokens for part in parts]), strict=True):
        if part.full:
            into.copy_(own)
        else:
            torch.index_select(own, 0, part.index, out=into)
    return result


def spread(x: Tensor, index: Tensor, size: int) -> Tensor:
    """`x (m, ...)` to the unique places `index (m,)` of `(size, ...)` zeros."""
    result: Tensor = _Spread.apply(x, index, size)  # type: ignore[no-untyped-call]  # torch's own
    return result


def collect(x: Tensor, index: Tensor) -> Tensor:
    """The rows of `x` at the unique places `index`."""
    result: Tensor = _Collect.apply(x, index)  # type: ignore[no-untyped-call]  # torch's own
    return result


@final
class Packing:
    """Where the tokens of R examples lie.

    Args:
      lengths: `(R,)` tokens of each example, at least one.
      width: T; the greatest length, or more.

    Attributes:
      index: `(N,)` places of the real tokens among R * T.
      owners: `(N,)` example of each real token.
      starts: `(R,)` place of each example's first token among N.
      padded: `(R * T,)` place among N of each token, of its example's first where there is none.
      holes: places among R * T where there is no token.
    """

    def __init__(self, lengths: Tensor, width: int) -> None:
        self.rows, self.width, self._lengths = len(lengths), width, lengths
        places = torch.arange(width, device=lengths.device)
        real = places < lengths[:, None]
        self.index = real.flatten().nonzero().squeeze(1)
        self.owners = torch.arange(self.rows, device=lengths.device).repeat_interleave(lengths)
        self.starts = lengths.cumsum(0) - lengths
        self.padded = (self.starts[:, None] + places * real).flatten()
        self.holes = (~real).flatten().nonzero().squeeze(1)
        self.tokens = len(self.index)
        self.full = self.tokens == self.rows * width
        self._parts: list[Packing] = []

    @property
    def keys_bias(self) -> Tensor | None:
        """`(R, 1, 1, T)` float32, the lowest number where there is no token; None without padding."""
        if self.full:
            return None
        bias = torch.full((self.rows * self.width,), torch.finfo(torch.float32).min, device=self.index.device)
        return bias.index_fill(0, self.index, 0.0).view(self.rows, 1, 1, self.width)

    @property
    def parts(self) -> list[Packing]:
        """Neighbouring examples of like lengths, each part padded to its own longest.

        Attention costs the square of a length, padding included; on a GPU one large call is cheaper than a few.
        """
        if not self._parts:
            if self._lengths.device.type != "cpu":
                return [self]
            steps = (self._lengths - 1) // _LIKE
            counts: list[int] = torch.unique_consecutive(steps, return_counts=True)[1].tolist()
            self._parts = [Packing(part, int(part.max())) for part in torch.split(self._lengths, counts)]
        return self._parts

    def pack(self, x: Tensor) -> Tensor:
        """`(R, T, h)`, or `(1, T, h)` alike for all, -> `(1, N, h)`."""
        require(
            x.shape[:2] in ((self.rows, self.width), (1, self.width)),
            f"packing {self.rows} examples of {self.width} tokens met a tensor of shape {tuple(x.shape)}",
        )
        flat = x.expand(self.rows, -1, -1).flatten(0, 1)
        return (flat if self.full else collect(flat, self.index))[None]

    def unpack(self, x: Tensor) -> Tensor:
        """`(1, N, h)` -> `(R, T, h)`, zero where there is no token."""
        flat = x[0] if self.full else spread(x[0], self.index, self.rows * self.width)
        return flat.view(self.rows, self.width, -1)

    def first(self, x: Tensor) -> Tensor:
        """`(1, N, h)` -> `(1, R, h)`: each example's first token."""
        return collect(x[0], self.starts)[None]

    def unpack_first(self, x: Tensor) -> Tensor:
        """`(1, R, h)` -> `(R, T, h)`, zero but for the first tokens."""
        places = torch.arange(self.rows, device=x.device) * self.width
        return spread(x[0], places, self.rows * self.width).view(self.rows, self.width, -1)

    def to_parts(self, x: Tensor) -> list[Tensor]:
        """`(1, heads, N, width)`, as attention gets it, -> `(R, heads, T, width)` of every part, padded by `padded`."""
        flat = x.transpose(1, 2).flatten(2)[0]
        found: tuple[Tensor, ...] = _ToParts.apply(flat, self.parts)  # type: ignore[no-untyped-call]  # torch's own
        return [
            own.view(part.rows, part.width, x.shape[1], -1).transpose(1, 2)
            for part, own in zip(self.parts, found, strict=True)
        ]

    def from_parts(self, mixed: list[Tensor]) -> Tensor:
        """`(R, heads, T, width)` of every part -> `(1, N, heads, width)`."""
        padded = [own.transpose(1, 2).flatten(2).flatten(0, 1) for own in mixed]
        flat: Tensor = _FromParts.apply(self.parts, *padded)  # type: ignore[no-untyped-call]  # torch's own
        return flat.view(1, self.tokens, mixed[0].shape[1], -1)


@final
class AttentionPass:
    """What the attention of a running pass knows.

    Attributes:
      packing: of the pass.
      keys, values: `(1, N, heads * width)` of all tokens while only the first tokens ask; None otherwise.
      calls: attention layers run so far.
    """

    def __init__(self, packing: Packing) -> None:
        self.packing = packing
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.calls = 0


running: ContextVar[AttentionPass] = ContextVar("running")
"""The pass that runs now. Models forward no argument of ours to their attention that could be relied on."""


def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, *,
    dropout: float = 0.0, scaling: float | None = None, is_causal: bool | None = None, **others: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention of transformers' `AttentionInterface` over packed tokens.

    Args:
      module: asked for `is_causal`.
      query: `(1, heads, N, width)`.
      key: `(1, heads, N, width)`, of as many heads or a divisor.
      value: `(1, heads, N, width)`, likewise.
      attention_mask: must be None; padding to the right needs none but the packing.
      dropout: must be 0: what happens inside the kernel cannot be replayed for one client.
      scaling: of the products.
      is_causal: overrides the module's.
      others: whatever else a model hands to its attention; unknown things are refused.

    Returns:
      `(1, N, heads, width)`, and None for the attention weights.
    """
    require(attention_mask is None, "the model masks its attention by means of its own")
    require(dropout == 0, f"dropout={dropout}: attention dropout cannot be replayed per client; set it to 0")
    unknown = [name for name, given in others.items() if given is not None and name not in _HARMLESS]
    require(not unknown, f"the model's attention has features that are not known here: {', '.join(sorted(unknown))}")
    now = running.get()
    now.calls += 1
    causal = bool(getattr(module, "is_causal", False) if is_causal is None else is_causal)
    first = now.keys is not None and now.values is not None  # one query an example, the first token's
    require(not (causal and first), "the first token of a causal model sees no other")
    packing, heads = now.packing, key.shape[1]
    if now.keys is not None and now.values is not None:
        key, value = (x.view(*x.shape[:2], heads, -1).transpose(1, 2) for x in (now.keys, now.values))
    if first:
        queries = list(torch.split(query[0].transpose(0, 1)[:, :, None], [part.rows for part in packing.parts]))
    else:
        queries = packing.to_parts(query)
    asked = zip(packing.parts, queries, packing.to_parts(key), packing.to_parts(value), strict=True)
    mixed = [_attended(part, *given, causal=causal, scaling=scaling) for part, *given in asked]
    return torch.cat(mixed).squeeze(2)[None] if first else packing.from_parts(mixed), None


def _attended(
    packing: Packing, query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scaling: float | None
) -> Tensor:
    """Attention of some examples, from and to `(R, heads, tokens, width)`."""
    # With padding to the right a causal model's real tokens never see any.
    bias = None if causal else packing.keys_bias
    if bias is not None:
        bias = bias.to(query.dtype).clamp(min=torch.finfo(query.dtype).min)
    return scaled_dot_product_attention(
        query, key, value, attn_mask=bias, is_causal=causal, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )
