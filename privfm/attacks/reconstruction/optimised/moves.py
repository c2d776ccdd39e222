"""The discrete moves of LAMP: orders of a text's tokens that a gradient step cannot reach."""

from __future__ import annotations

from typing import Final

import torch
from torch import Generator, Tensor

MOVES: Final = ("swap", "token", "subsequence", "prefix")
"""Two tokens change places; one moves; some in a row move; some at the front go to the end."""


def move(kind: str, count: int, generator: Generator) -> list[int]:
    """A random order of `count` places: position i of the new text is position `order[i]` of the old one.

    Args:
      kind: one of `MOVES`.
      count: places that may move; under 2 nothing can.
      generator: draws the places.

    Source: Balunovic et al., "LAMP", NeurIPS 2022, section 4.3 and figure 3.

    >>> sorted(move("subsequence", 5, torch.Generator().manual_seed(0)))
    [0, 1, 2, 3, 4]
    """
    order = list(range(count))
    if count < 2:
        return order
    if kind == "swap":
        one, other = torch.randperm(count, generator=generator)[:2].tolist()
        order[one], order[other] = order[other], order[one]
        return order
    if kind == "token":
        begin = _draw(count, generator)
        return _moved(order, begin, begin + 1, generator)
    if kind == "subsequence":
        begin, end = sorted(torch.randperm(count + 1, generator=generator)[:2].tolist())
        return _moved(order, begin, end, generator)
    cut = 1 + _draw(count - 1, generator)
    return order[cut:] + order[:cut]


def rearranged(values: Tensor, text: int, free: Tensor, order: list[int]) -> Tensor:
    """A copy of `values (b, T, ...)` in which the free places `(T,)` of one text are in another order."""
    places = free.nonzero()[:, 0]
    found = values.clone()
    found[text, places] = values[text, places[order]]
    return found


def _draw(below: int, generator: Generator) -> int:
    return int(torch.randint(below, (), generator=generator))


def _moved(order: list[int], begin: int, end: int, generator: Generator) -> list[int]:
    """`order[begin:end]` cut out and put in again somewhere."""
    rest = order[:begin] + order[end:]
    place = _draw(len(rest) + 1, generator)
    return rest[:place] + order[begin:end] + rest[place:]
