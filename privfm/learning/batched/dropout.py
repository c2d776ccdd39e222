"""Dropout that can be replayed: which features of a token are dropped is a hash, not the state of a generator.

Drawn from a generator inside the layers, masks would depend on padding, on who else is in a pass and on where a pass
ends. Here they depend on the client's key of the step, the example's place in the batch, the token's place in its
example, the layer and the feature, and on nothing else. A hash is good enough to regularise with and for nothing
secret.
"""

from __future__ import annotations

import torch
from torch import Tensor

_GAMMA = -7046029254386353131
"""0x9E3779B97F4A7C15 as a signed number: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014."""
_MULTIPLIERS = (-4658895280553007687, -7723592293110705685)
"""0xBF58476D1CE4E5B9 and 0x94D049BB133111EB as signed numbers: the finaliser of SplitMix64 in java.util (ibid.)."""
_LEVELS = 1 << 16
"""Rates are whole multiples of 1/65536: one hash of 64 bits serves four features."""


def split(keys: Tensor, index: Tensor | int) -> Tensor:
    """Output number `index` of the SplitMix64 generator that starts at each key: int64, shaped like both together."""
    z = keys + (torch.as_tensor(index, device=keys.device) + 1) * _GAMMA  # modulo 2^64, as tensors count
    z = (z ^ _shifted(z, 30)) * _MULTIPLIERS[0]
    z = (z ^ _shifted(z, 27)) * _MULTIPLIERS[1]
    return z ^ _shifted(z, 31)


def keep_mask(keys: Tensor, layer: int, features: int, rate: float) -> Tensor:
    """Which features stay: `(m,)` int64 keys of tokens -> `(m, features)` bool, True with probability 1 - rate."""
    quarters = torch.arange(-(-features // 4), device=keys.device)
    hashes = split(split(keys, layer)[:, None], quarters)
    draws = hashes.view(torch.int16)[:, :features].to(torch.int32) & (_LEVELS - 1)
    return draws >= _dropped(rate)


def dropped_out(x: Tensor, keys: Tensor, layer: int, rate: float) -> Tensor:
    """Inverted dropout of `x (m, features)`, unbiased for the rate that is used (the nearest multiple of 1/65536)."""
    keep = keep_mask(keys, layer, x.shape[-1], rate)
    return x * (keep.to(x.dtype) * (_LEVELS / (_LEVELS - _dropped(rate))))


def _dropped(rate: float) -> int:
    return round(rate * _LEVELS)


def _shifted(z: Tensor, by: int) -> Tensor:
    """Shift to the right that brings in zeros; torch's brings in the sign."""
    return (z >> by) & ((1 << (64 - by)) - 1)
