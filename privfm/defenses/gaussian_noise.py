"""The Gaussian mechanism on a total, from a seed or from the operating system."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from privfm.defenses.noise import NoiseSource, grid_of, secure_deviation, secure_release


def noised(  # noqa: PLR0917  # the mechanism's own four, then where it draws
    total: Tensor,
    noise_multiplier: float,
    sensitivity: float,
    source: NoiseSource,
    generator: Generator,
    terms: int = 1,
) -> Tensor:
    """`total (d,)` plus noise of deviation `noise_multiplier * sensitivity`; see `NoiseSource`.

    Secure noise is a little larger, for what rounding to its grid and adding up `terms` rows in floating point may
    cost.
    """
    if source == "secure" and noise_multiplier > 0:
        deviation = secure_deviation(noise_multiplier, sensitivity, len(total), terms=max(terms, 1), dtype=total.dtype)
        return secure_release(total, deviation)
    return total + (torch.randn(len(total), generator=generator) * (noise_multiplier * sensitivity)).to(total)


def on_grid(total: Tensor, noise_multiplier: float, sensitivity: float, source: NoiseSource, terms: int) -> Tensor:
    """`total (d,)` in whole steps of the grid that `noised` uses, float64; as it is where noise is seeded.

    For noise that is drawn apart from the total: the last bits of their sum must not show the total.
    """
    if source == "seeded" or noise_multiplier == 0:
        return total.double()
    grid = grid_of(secure_deviation(noise_multiplier, sensitivity, len(total), terms=max(terms, 1), dtype=total.dtype))
    return (total.double() / grid).round() * grid
