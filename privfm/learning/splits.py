"""Splits: which rows of a data set are for what. Made once, by seed, before anything else looks at the data."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from hashlib import sha256

import torch
from torch import Generator, Tensor

from privfm.checks import fraction, require
from privfm.contracts import SPLITS, Split, Table


@dataclass(frozen=True)  # not final: jsonargparse (4.53) refuses an instance of a final class as a default
class SplitShares:
    """The share of the rows that each split takes; `clients` takes the rest.

    Half of the rows or more should stay with the clients: the defaults give a tenth to choices that are made on data
    (learning rate, clip) and a fifth to the final evaluation, which reads an accuracy to 0.01 (one standard error) when
    there are 10,000 rows. Public data and non-members cost the clients rows, so only who needs them asks for them.

    Args:
      validation: for tuning.
      test: for the final evaluation only.
      server: root or public data that the server owns.
      holdout: never trained on: the non-members of membership inference.
    """

    validation: float = 0.1
    test: float = 0.2
    server: float = 0.0
    holdout: float = 0.0

    def __post_init__(self) -> None:
        for name in SPLITS[1:]:
            fraction(name, getattr(self, name), zero=True, one=False)
        require(self.clients > 0, f"the shares add up to {1 - self.clients:g}: nothing is left for the clients")

    @property
    def clients(self) -> float:
        """What is left for the clients."""
        return 1 - (self.validation + self.test + self.server + self.holdout)


def unique_rows(table: Table) -> Tensor:
    """Rows of `table` `(n,)`, sorted, without those whose text or image stood in an earlier row.

    Equal means equal to the last character or bit, whatever the label: of conflicting labels the first is kept. A
    row on both sides of a split would count memorising as learning, and a non-member as a member.
    """
    first: dict[Hashable, int] = {}
    for row, key in enumerate(_keys(table)):
        first.setdefault(key, row)
    return torch.tensor(list(first.values()), dtype=torch.int64)


def split(table: Table, shares: SplitShares, generator: Generator) -> dict[Split, Tensor]:
    """Deals the rows of a table to the five splits.

    Stratified: every label gives every split its share, rounded down, and the few rows left over are dealt at random so
    that each split also has its share of the whole, to one row. Every split then shows each label as often as the data
    do, so that a small one judges better and metrics per label are never short of examples by bad luck.

    Args:
      table: the data set; rows that repeat an earlier one are left out (`unique_rows`).
      shares: of the splits.
      generator: for the draw.

    Returns:
      Row numbers `(n,)` of `table` by split, sorted, disjoint, covering every row that is left; all five names.

    Raises:
      InvalidArgument: a split with a share above zero, or the clients', would hold no row.
    """
    rows = unique_rows(table)
    share = torch.tensor([getattr(shares, name) for name in SPLITS], dtype=torch.float64)
    sizes = _apportion(share, len(rows))
    for name, size, asked in zip(SPLITS, sizes.tolist(), share.tolist(), strict=True):
        require(
            size > 0 or asked == 0,
            f"{name}={asked:g} of {len(rows)} different rows is no row; use more data or other shares",
        )
    owner = torch.empty(len(rows), dtype=torch.int64)
    labels = table.labels[rows]
    rest = []
    for label in sorted(set(labels.tolist())):
        mine = _shuffled((labels == label).nonzero().squeeze(1), generator)
        counts = (share * len(mine)).floor().long()
        whole = int(counts.sum())
        owner[mine[:whole]] = torch.repeat_interleave(counts)
        sizes = sizes - counts
        rest.append(mine[whole:])
    owner[_shuffled(torch.cat(rest), generator)] = torch.repeat_interleave(sizes)
    return {name: rows[owner == place] for place, name in enumerate(SPLITS)}


def _keys(table: Table) -> Iterable[Hashable]:
    """What makes two rows equal: the text, or a digest of the image's values."""
    if isinstance(table.inputs, Tensor):
        return (sha256(image.numpy().tobytes()).digest() for image in table.inputs)
    return table.inputs


def _apportion(share: Tensor, total: int) -> Tensor:
    """Whole numbers `(5,)` that add up to `total`, each its share rounded down or up (largest remainders go up)."""
    exact = share * total
    sizes = exact.floor().long()
    up = (exact - sizes).argsort(descending=True, stable=True)[: total - int(sizes.sum())]
    sizes[up] += 1
    return sizes


def _shuffled(rows: Tensor, generator: Generator) -> Tensor:
    return rows[torch.randperm(len(rows), generator=generator)]
