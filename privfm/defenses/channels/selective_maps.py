"""Which columns of an update to protect: by the names of parameters, or by a map of how much each one gives away."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from math import ceil

import torch
from torch import Tensor

from privfm.checks import fraction, nearest, require
from privfm.vectors import Layout

Ranges = tuple[tuple[int, int], ...]
"""Columns `[lo, hi)` of a flat vector, sorted and disjoint."""


def by_name(layout: Layout, patterns: Sequence[str]) -> Ranges:
    """Columns of all parameters whose name matches one of the patterns.

    Args:
      layout: where each parameter lies in the flat vector.
      patterns: as in a shell: `*` any text, `?` one character, `[ab]` one of them; upper and lower case differ.

    Raises:
      InvalidArgument: a pattern matches nothing; left alone, it would leave in the clear what it was written for.

    >>> layout = Layout.of({"body": torch.zeros(2, 3), "head.bias": torch.zeros(2), "head.weight": torch.zeros(2, 2)})
    >>> by_name(layout, ["head.*"])
    ((6, 12),)
    """
    for pattern in patterns:
        found = any(fnmatchcase(name, pattern) for name in layout.names)
        require(found, f"pattern {pattern!r} matches no parameter{nearest(pattern, layout.names)}")
    chosen = [any(fnmatchcase(name, pattern) for pattern in patterns) for name in layout.names]
    return _ranges(torch.tensor(chosen).repeat_interleave(torch.tensor(layout.sizes)))


def by_sensitivity(scores: Tensor, share: float) -> Ranges:
    """The columns with the highest scores; among equal ones those that come first.

    A score says how much a coordinate gives away, such as the squared gradient on examples of the server's own or of
    the public. Scores that follow from clients' private data are a leak themselves: the choice of columns is known to
    everybody. FedML-HE averages how fast each gradient changes with the labels over clients' own data, under
    encryption, and then agrees on a mask in the open.

    Short ranges cost: 16 bytes of memory each in the channel, and some 10 characters of its `repr`.

    Args:
      scores: `(d,)`, finite.
      share: of the d columns, in (0, 1]; the number of columns is rounded up.

    Raises:
      InvalidArgument: a score is not finite, or there are none.

    Source: Jin et al., "FedML-HE: an efficient homomorphic-encryption-based privacy-preserving federated learning
    system", 2023, for selecting by a sensitivity map.

    >>> by_sensitivity(torch.tensor([0.1, 5.0, 4.0, 0.2, 5.0]), 0.6)
    ((1, 3), (4, 5))
    """
    fraction("share", share)
    require(scores.dim() == 1 and len(scores) > 0, f"scores have shape {tuple(scores.shape)}: expected (d,), d >= 1")
    require(bool(scores.isfinite().all()), "scores must be finite")
    own = scores.detach().cpu().double()
    count = min(ceil(share * len(own) - 1e-9), len(own))  # 0.07 * 100 is a little more than 7
    least = own.kthvalue(len(own) - count + 1).values
    chosen, equal = own > least, own == least
    left = count - int(chosen.sum())
    return _ranges(chosen | (equal & (equal.cumsum(0) <= left)))


def _ranges(chosen: Tensor) -> Ranges:
    """Runs of True in `(d,)` bool."""
    edges = torch.nn.functional.pad(chosen.to(torch.int8), (1, 1)).diff()
    begins, ends = (edges == 1).nonzero()[:, 0].tolist(), (edges == -1).nonzero()[:, 0].tolist()
    return tuple(zip(begins, ends, strict=True))
