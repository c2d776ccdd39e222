"""What breaking a ring-LWE pad would cost, by the customary lattice model. An estimate: nothing here is a proof."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import e, log, log2, pi, sqrt
from typing import Final, final

import numpy as np
from numpy.typing import NDArray

from privfm.checks import InvalidArgument, at_least, positive
from privfm.defenses.channels.pad.rlwe import DEGREE, MODULUS

LEAST_BITS: Final = 128
"""The customary level (HomomorphicEncryption.org, "Homomorphic encryption standard", 2018)."""

ERROR_DEVIATION: Final = 3.2
"""Deviation the estimate reckons with. The sampler's 3.24 is a little larger, so a little safer."""

_SMALLEST_BLOCK, _LARGEST_BLOCK = 60, 2000  # blocks under 60 follow no asymptotic formula; 2000 is 600 bits


@final
@dataclass(frozen=True)
class Estimate:
    """The cheapest primal attack found.

    Attributes:
      block_size: of the lattice reduction that finds the secret.
      core_svp: log2 of the cost of one shortest-vector search in such a block, classical: 0.292 of the block size.
      bits: log2 of the whole attack's cost, `0.292 b + 16.4 + log2(8 d)`.
    """

    block_size: int
    core_svp: float
    bits: float


@lru_cache(maxsize=64)
def primal_attack(
    dimension: int, log2_modulus: float, secret_deviation: float, error_deviation: float = ERROR_DEVIATION
) -> Estimate:
    """Cost of finding an LWE secret as the unique shortest vector of Kannan's embedding, classical computers.

    With m samples the lattice has dimension d = n + m + 1 and volume q^m z^n, where z rescales the secret to the
    deviation of the errors; block size b succeeds when `sigma sqrt(b) <= delta(b)^(2b - d - 1) vol^(1/d)` with
    `delta(b) = ((pi b)^(1/b) b / (2 pi e))^(1 / (2(b - 1)))`. The ring's structure gives the attacker nothing here.

    Args:
      dimension: unknown coordinates of the secret n.
      log2_modulus: bits of q.
      secret_deviation: of a coordinate of the secret.
      error_deviation: of an error.

    Raises:
      InvalidArgument: no block size up to 2000 succeeds (more than 600 bits), or an argument is out of range.

    Source: Alkim, Ducas, Pöppelmann, Schwabe, 2016, section 6.3 (success condition); Bai, Galbraith, 2014 (scaling of
    the secret); Chen, 2013 (delta); Becker, Ducas, Gama, Laarhoven, 2016 (0.292 b); Albrecht, Player, Scott, 2015
    (16.4, and 8 d searches).

    >>> estimate = primal_attack(1024, 27, sqrt(2 / 3))  # the standard's first row: 128 bits
    >>> estimate.block_size, round(estimate.bits)
    (347, 132)
    """
    at_least("dimension", dimension, 2)
    positive("log2_modulus", log2_modulus)
    positive("secret_deviation", secret_deviation)
    positive("error_deviation", error_deviation)
    samples = np.arange(max(50, dimension // 4), 2 * dimension + 1, dtype=np.float64)
    lattice = dimension + samples + 1.0
    scale = max(1.0, error_deviation / secret_deviation)
    root_volume: NDArray[np.float64] = (samples * log2_modulus * log(2) + dimension * log(scale)) / lattice
    for block in range(_SMALLEST_BLOCK, _LARGEST_BLOCK):
        found = _succeeds(block, lattice, root_volume, error_deviation)
        if found.any():
            core = 0.292 * block
            return Estimate(block, core, core + 16.4 + log2(8 * float(lattice[found.argmax()])))
    raise InvalidArgument(f"dimension={dimension}: beyond {_LARGEST_BLOCK} blocks, where the model has no meaning")


def pad_security(honest: int | None = 2, degree: int = DEGREE, log2_modulus: float = log2(MODULUS)) -> Estimate:
    """The estimate for one honest client's pad, given the sum of all honest clients' keys and errors.

    That sum is what the server learns besides the pads (the hint). Where all `honest` ternary coordinates agree in +1
    or -1 the sum gives them away, a share `2 / 3^honest`; what is left of the others has, on average, variance
    `(2/3) (1 - 1/honest)` over the whole vector, and an error `sigma^2 (1 - 1/honest)`. Scaling each coordinate by its
    own deviation, and picking among a million samples the 3,000 whose error sums are most extreme, takes off one bit
    more. That a ternary key with this hint is as hard to find as a smaller secret of that variance is not proved.

    Args:
      honest: honest clients in the sum, at least 2; None: the sum is not known.
      degree: coefficients of a key.
      log2_modulus: bits of q.

    Raises:
      InvalidArgument: one honest client alone, whose key *is* the sum; or an estimate under 128 bits.

    >>> round(pad_security(None).bits), round(pad_security(2).bits)
    (241, 177)
    """
    if honest is None:
        known, left = 0.0, 1.0
    else:
        at_least("honest", honest, 2)
        known, left = 2 / 3**honest, 1 - 1 / honest
    deviation = sqrt(2 / 3 * left / (1 - known))
    estimate = primal_attack(int(degree * (1 - known)), log2_modulus, deviation, ERROR_DEVIATION * sqrt(left))
    if estimate.bits < LEAST_BITS:
        raise InvalidArgument(
            f"degree={degree}: an estimate of {estimate.bits:.0f} bits, expected {LEAST_BITS}; take degree {2 * degree}"
        )
    return estimate


def _succeeds(
    block: int, lattice: NDArray[np.float64], root_volume: NDArray[np.float64], error_deviation: float
) -> NDArray[np.bool_]:
    """For each lattice dimension, whether reduction with this block size finds the planted vector."""
    log_delta = log((pi * block) ** (1 / block) * block / (2 * pi * e)) / (2 * (block - 1))
    planted = log(error_deviation) + log(block) / 2
    found: NDArray[np.bool_] = planted <= (2 * block - lattice - 1) * log_delta + root_volume
    return found
