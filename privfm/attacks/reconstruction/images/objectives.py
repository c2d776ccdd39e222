"""How far a simulated update is from the one observed, over what the server sees of it; and what images look like."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor

from privfm.checks import require


@final
class Target:
    """The observed tensors as simulated ones are compared with them: entries that are NaN count nowhere.

    Args:
      tensors: by name; NaN where the server sees nothing.
      like: gives type and device.
      sent_only: of a sparsified update (top-k), compare only entries that were sent, that is, are not zero. What was
        cut away is then unknown, not zero. Leave it off for dense updates: their zeros (units that are not active)
        tell about the input.

    Raises:
      InvalidArgument: nothing is seen, or all that is seen is zero.
    """

    def __init__(self, tensors: Mapping[str, Tensor], like: Tensor, sent_only: bool = False) -> None:
        self._values: dict[str, Tensor] = {}
        self._seen: dict[str, Tensor | None] = {}  # None: every entry
        for name, tensor in tensors.items():
            value = tensor.detach().to(like.device, like.dtype)
            seen = ~value.isnan()
            if sent_only:
                seen &= value != 0
            if bool(seen.any()):
                self._values[name] = value.where(seen, torch.zeros_like(value))
                self._seen[name] = None if bool(seen.all()) else seen
        require(bool(self._values), "nothing of the update is seen (all NaN or cut away): there is nothing to compare")
        self._norm = _norm(self._values)
        require(
            any(bool(value.any()) for value in self._values.values()),
            "all that is seen of the update is zero, whatever the images were; observe parameters that are trained",
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Of tensors of which something is seen."""
        return tuple(self._values)

    @property
    def entries(self) -> int:
        """How many numbers are compared."""
        return sum(int(self._values[name].numel() if seen is None else seen.sum()) for name, seen in self._seen.items())

    def seen(self, name: str) -> Tensor:
        """The tensor as it is compared: NaN where nothing is."""
        seen = self._seen[name]
        return self._values[name] if seen is None else self._values[name].masked_fill(~seen, torch.nan)

    def cosine(self, sent: Mapping[str, Tensor]) -> Tensor:
        """One minus the cosine of the angle between all seen entries together: one angle, not a mean over layers.

        Does not change when either side is scaled: clipped, summed and averaged updates are the same to it.

        Computed as half the squared distance of the two directions, which is the same number: `1 - cos` itself loses
        every digit below the type's precision just where the search ends.

        Args:
          sent: simulated tensors by name, at least those of `names`.

        Source: Geiping, Bauermeister, Dröge, Moeller, "Inverting gradients: how easy is it to break privacy in
        federated learning?", 2020, equation 4.
        """
        seen = self._same_entries(sent)
        own = _norm(seen)
        parts = [(seen[name] / own - value / self._norm).square().sum() for name, value in self._values.items()]
        return torch.stack(parts).sum() / 2

    def squared(self, sent: Mapping[str, Tensor]) -> Tensor:
        """The summed squared difference over all seen entries. Scale matters: not for clipped or summed updates.

        Source: Zhu, Liu, Han, "Deep leakage from gradients", 2019, equation 3.
        """
        seen = self._same_entries(sent)
        return torch.stack([(seen[name] - value).square().sum() for name, value in self._values.items()]).sum()

    def _same_entries(self, sent: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: sent[name] if seen is None else sent[name] * seen.to(sent[name].dtype)
            for name, seen in self._seen.items()
        }


def total_variation(images: Tensor) -> Tensor:
    """Mean absolute difference of neighbouring pixels, along rows plus along columns.

    Args:
      images: `(..., height, width)`; a side of one pixel has no neighbours and counts zero.

    Source: Geiping, Bauermeister, Dröge, Moeller, 2020, section 3 (the penalty; its scale, a mean, is their code's).

    >>> float(total_variation(torch.tensor([[0.0, 1.0], [0.0, 1.0]])))
    1.0
    """
    steps = [images.diff(dim=-1), images.diff(dim=-2)]
    return torch.stack([one.abs().sum() / max(one.numel(), 1) for one in steps]).sum()


def _norm(tensors: Mapping[str, Tensor]) -> Tensor:
    """Of all tensors together; the square root's derivative stays finite where everything is zero."""
    squares = torch.stack([one.square().sum() for one in tensors.values()]).sum()
    return (squares + torch.finfo(squares.dtype).tiny).sqrt()
