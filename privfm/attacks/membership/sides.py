"""What shadow models on one side of an example say of it: those trained on it, or those that were not.

A side is `(models, n)`, true where a model counts for an example. Values outside it are never read: they may be
anything.
"""

from __future__ import annotations

import numpy as np

from privfm.contracts.membership import Array, Flags


def by_query(values: Array) -> Array:
    """`(models, n)` or `(models, n, queries)` as `(models, n, queries)` in float64."""
    values = np.asarray(values, dtype=np.float64)
    return values if values.ndim == 3 else values[:, :, None]


def too_few(side: Flags, least: int, whose: str) -> str:
    """Why a side cannot be used: an example has fewer than `least` models on it; empty where none has."""
    counts = side.sum(axis=0)
    short = np.flatnonzero(counts < least)
    if not len(short):
        return ""
    first = int(short[0])
    return (
        f"{len(short)} of {len(counts)} examples have fewer than {least} shadow models {whose} them (example {first}: "
        f"{counts[first]}); train more, or leave those examples out"
    )


def mean_over(side: Flags, values: Array) -> Array:
    """Mean over the models of a side.

    Args:
      side: `(models, n)`, at least one model for each example.
      values: `(models, n, queries)`.

    Returns:
      `(n, queries)`.
    """
    return np.asarray(np.where(side[:, :, None], values, 0.0).sum(axis=0) / side.sum(axis=0)[:, None])


def squares_over(side: Flags, values: Array, mean: Array) -> Array:
    """Sum of squared distances from each example's own mean over the models of a side, `(n, queries)`."""
    away = np.where(side[:, :, None], values, mean) - mean
    return np.asarray(np.einsum("mnq,mnq->nq", away, away))


def log_mean_over(side: Flags, logarithms: Array) -> Array:
    """Logarithm of the mean of what `logarithms` are the logarithms of, over the models of a side.

    The largest is taken out first: probabilities far below the smallest float (long texts) do not become zero.

    Args:
      side: `(models, n)`, at least one model for each example.
      logarithms: `(models, n, queries)`.

    Returns:
      `(n, queries)`.
    """
    masked = np.where(side[:, :, None], logarithms, -np.inf)
    largest = masked.max(axis=0)
    shares = np.exp(masked - largest).sum(axis=0) / side.sum(axis=0)[:, None]
    return np.asarray(largest + np.log(shares))
