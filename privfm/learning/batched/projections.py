"""What frozen layers make of known activations, kept beside these: the first trained block's queries, keys and values.

Under an adapter the layer itself stays frozen, and what it is given in the first trained block never changes: its
product is the same for all clients and epochs. So it is taken once for each example and gathered afterwards: an epoch
of MiniLM's last two blocks takes 4 % less for it (measured). It applies where these layers are given the block's input
itself (BERT and its kin), not where a norm comes between (Llama, ViT).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

if TYPE_CHECKING:
    from privfm.learning.batched.layers import Pass
    from privfm.learning.trunk import Activations

_BYTES = 1 << 28
"""Most that products of one table may take (256 MiB): MiniLM's three layers, 3,500 sentences of 17 tokens. What does
not fit is computed every time."""


@final
@dataclass(frozen=True)
class Met:
    """Examples of a table that are in a pass.

    Attributes:
      rows: of the table.
      places: `(N,)` of their tokens among those of the table.
    """

    rows: list[int]
    places: Tensor


@final
class Projections:
    """Products of a table's known activations with frozen layers, each example's taken when it is first met.

    An example's product is taken alone, whatever else is in the pass that first meets it: its bits do not depend on
    others, nor on what was trained before. Weights that were written to since are noticed, and products taken anew.

    Args:
      activations: of all examples, in memory.
    """

    def __init__(self, activations: Activations) -> None:
        self._activations = activations
        self._kept: dict[nn.Linear, Tensor] = {}
        self._done: dict[nn.Linear, tuple[Any, list[bool]]] = {}  # which examples, at which version of the weights
        self._bytes = 0

    def forwards(self, parts: Iterable[nn.Module], now: Callable[[], Pass]) -> dict[nn.Module, Callable[..., Tensor]]:
        """How those of some modules run under a pass that are frozen float32 linear layers."""
        return {
            part: self._forward(part, now)
            for part in parts
            if type(part) is nn.Linear
            and all(not value.requires_grad and value.dtype == torch.float32 for value in part.parameters())
        }

    def _forward(self, layer: nn.Linear, now: Callable[[], Pass]) -> Callable[[Tensor], Tensor]:
        own = layer.forward

        def forward(x: Tensor) -> Tensor:
            run = now()
            # Only what is given the known activations themselves; anything else may differ by client.
            if x is not run.known or run.met is None or not self._fits(layer):
                return own(x)
            return self._product(layer, run.met)

        return forward

    def _fits(self, layer: nn.Linear) -> bool:
        """Whether a layer's products have their place, which they get if there is room."""
        if layer not in self._kept:
            size = (len(self._activations.flat), layer.out_features)
            if self._bytes + 4 * size[0] * size[1] > _BYTES:
                return False
            self._bytes += 4 * size[0] * size[1]
            self._kept[layer] = torch.empty(size)  # pages that nobody writes to take no memory
        return True

    def _product(self, layer: nn.Linear, met: Met) -> Tensor:
        """`(1, N, out)` of what a pass has met."""
        kept, version = self._kept[layer], [(value.data_ptr(), value._version) for value in layer.parameters()]
        found, done = self._done.get(layer, (None, []))
        if found != version:
            done = [False] * len(self._activations)
            self._done[layer] = version, done
        with torch.no_grad():
            for row in met.rows:
                if not done[row]:
                    own = self._activations.slice(row)
                    kept[own] = linear(self._activations.flat[own], layer.weight, layer.bias)
                    done[row] = True
        return kept.index_select(0, met.places)[None]
