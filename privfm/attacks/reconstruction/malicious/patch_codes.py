"""How a trapped transformer writes a patch and its position into a token, so that both can be read back."""

from __future__ import annotations

from math import pi, sqrt

import torch
from torch import Tensor


def position_codes(tokens: int, bits: int) -> Tensor:
    """Numbers 0 to tokens - 1 in binary, each bit as (1, -1) or (-1, 1): `(tokens, 2 bits)` float64.

    All have the same length and sum to zero, and two of them have a product of at most 2 bits - 4.
    """
    digits = torch.arange(tokens)[:, None] >> torch.arange(bits) & 1
    signs = 1.0 - 2.0 * digits.double()
    return torch.stack([signs, -signs], dim=2).flatten(1)


def pixel_basis(channels: int, patch: tuple[int, int], most: int) -> Tensor:
    """An orthonormal basis of patches, `(rows, channels * height * width)` float64, in at most `most` rows.

    The pixels themselves where they fit, else cosine waves, coarse ones first (two-dimensional DCT-II).
    """
    height, width = patch
    many = channels * height * width
    if many <= most:
        return torch.eye(many, dtype=torch.float64)
    down, right = _cosines(height), _cosines(width)
    waves = torch.einsum("ij,kl->ikjl", down, right).reshape(height * width, -1)
    order = (torch.arange(height)[:, None] + torch.arange(width)).flatten()
    rows = torch.einsum("cd,wp->wcdp", torch.eye(channels, dtype=torch.float64), waves)
    coarse = order.argsort(stable=True)
    return rows[coarse].reshape(many, many)[:most]


def _cosines(size: int) -> Tensor:
    """The orthonormal DCT-II, `(size, size)` float64; row k has k half waves."""
    places = torch.arange(size, dtype=torch.float64)
    rows = torch.cos(pi / size * places[:, None] * (places + 0.5)) * sqrt(2 / size)
    rows[0] /= sqrt(2)
    return rows
