"""Keys and queries, head by head, of the pairs of token and position that may stand in a text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, final

import torch
from torch import Tensor

from privfm.attacks.reconstruction.architectures import Projection
from privfm.attacks.reconstruction.text_models import TextModel

_TINY: Final = 1e-300
"""Keeps a head whose keys are all the same (a fresh model's zeros) from dividing by 0."""


@final
class Heads:
    """The first attention's keys and queries as the server computes them, in float64.

    Args:
      text: an encoder.
      weights: query and key weights `(d, d)` and the query's bias `(d,)` to use; None: the model's own.
    """

    def __init__(self, text: TextModel, weights: tuple[Tensor, Tensor, Tensor] | None = None) -> None:
        self.text, self.heads, self.width = text, text.heads, text.head_width
        self._query, self._key, self._bias = own_maps(text) if weights is None else weights

    def keys_and_queries(self, tokens: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """`(n,)` tokens at `(n,)` positions -> `(n, H, w)` each. Keys lack their bias, which no difference has."""
        inputs = self.text.first_inputs(tokens, positions)
        shape = (len(tokens), self.heads, self.width)
        return (inputs @ self._key.T).view(shape), (inputs @ self._query.T + self._bias).view(shape)

    def span(self, text: Sequence[int]) -> Tensor:
        """Orthonormal bases of what a text's gradients can be, `(2 H, n, w)`; zero where there are fewer directions.

        The first H blocks: differences of keys, in which every query gradient lies; the last H: queries, in which every
        key gradient lies.
        """
        keys, queries = self.keys_and_queries(torch.tensor(text), torch.arange(len(text)))
        differences = torch.cat([keys[1:] - keys[:1], torch.zeros_like(keys[:1])])
        rows = torch.cat([differences, queries], 1).transpose(0, 1)
        rows = rows / rows.norm(dim=-1, keepdim=True).clamp_min(_TINY)
        _, values, directions = torch.linalg.svd(rows, full_matrices=False)
        kept = values > torch.finfo(torch.float64).eps * 1e3 * values[:, :1]
        found: Tensor = directions * kept[..., None]
        return found


def own_maps(text: TextModel) -> tuple[Tensor, Tensor, Tensor]:
    """Query weight, key weight and query bias of the first attention, float64, with the products of their adapters."""
    parameters = {name: parameter.detach() for name, parameter in text.model.named_parameters()}
    query, key = (_whole(part, parameters) for part in (text.block(0).query, text.block(0).key))
    offset = text.block(0).query.offset(parameters)
    if query is None or key is None:
        raise LookupError("the model has no query or key weight")
    return query, key, query.new_zeros(len(query)) if offset is None else offset.cpu().double()


def _whole(part: Projection, parameters: Mapping[str, Tensor]) -> Tensor | None:
    """What a map multiplies its input with, `(outputs, inputs)`."""
    weight = part.matrix(parameters)
    if weight is None or part.lora_a is None or part.lora_b is None:
        return None if weight is None else weight.cpu().double()
    outputs, inputs = (parameters[name].cpu().double() for name in (part.lora_b, part.lora_a))
    return weight.cpu().double() + part.scaling * outputs @ inputs


@final
class Atoms:
    """Candidate pairs of token and position, as unit vectors in every block of `2 H`.

    Args:
      heads: of the model.
      tokens: `(n,)`.
      positions: `(n,)`, none 0.
      first: the token at position 0 of every text.

    Attributes:
      units: `(2 H, n, w)`: differences of keys to the first token's, then queries; unit length.
      start: `(2 H, w)`: what is in every support beforehand: nothing among the keys, the first token's unit query.
    """

    def __init__(self, heads: Heads, tokens: Tensor, positions: Tensor, first: int) -> None:
        self.tokens, self.positions = tokens, positions
        keys, queries = heads.keys_and_queries(tokens, positions)
        key, query = heads.keys_and_queries(torch.tensor([first]), torch.tensor([0]))
        both = torch.cat([keys - key, queries], 1).transpose(0, 1)
        self.units = (both / both.norm(dim=-1, keepdim=True).clamp_min(_TINY)).contiguous()
        unit = query[0] / query[0].norm(dim=-1, keepdim=True).clamp_min(_TINY)
        self.start = torch.cat([torch.zeros_like(unit), unit])

    def __len__(self) -> int:
        return len(self.tokens)


def blocks(of_tokens: Tensor, heads: int) -> Tensor:
    """Query and key gradients of tokens by head, each of the two in units of its own length.

    `(n, 3, d)` -> `(n, 2 H, w)`.
    """
    two = of_tokens[:, :2]
    two = two / two.norm(dim=-1, keepdim=True).clamp_min(_TINY)
    found: Tensor = two.reshape(len(two), 2 * heads, -1)
    return found
