"""Distributed noise as a plan states it: shares of all clients, on whole numbers, summed by a channel."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import inf, sqrt
from typing import Literal, final

from privfm.checks import at_least, one_of, require
from privfm.contracts import Channel
from privfm.defenses.privacy.accounting import RDP_ORDERS, Concentrated, Mechanism, RenyiCurve
from privfm.defenses.privacy.distributed import (
    SMALLEST_SHARE,
    WRAP_TARGET,
    DistributedNoise,
    rounding_bound,
    share_deviation,
    skellam_rdp,
    wrap_probability,
    zcdp,
)
from privfm.defenses.privacy.noise import NoiseSource


@final
@dataclass(frozen=True)
class IntegerNoise:
    """Grid, modulus and the fewest answers of distributed noise.

    Args:
      least_answers: fewest clients whose sum may be revealed; with fewer the round ends before.
      clients: most clients in one sum.
      colluders: clients that might tell the server their shares.
      resolution: steps of the grid in one clip.
      modulus_bits: sums are taken modulo two to this power.
      noise: `discrete_gaussian`, exact; `skellam`: closed under sums, and neither exact nor secure here.

    Source: Kairouz, Liu, Steinke, "The distributed discrete Gaussian mechanism for federated learning with secure
    aggregation", 2021; Agarwal, Kairouz, Liu, "The Skellam mechanism", 2021.
    """

    least_answers: int
    clients: int
    colluders: int = 0
    resolution: int = 2**16
    modulus_bits: int = 32
    noise: Literal["discrete_gaussian", "skellam"] = "discrete_gaussian"

    def __post_init__(self) -> None:
        at_least("least_answers", self.least_answers, 2)
        at_least("clients", self.clients, self.least_answers)
        at_least("colluders", self.colluders, 0)
        at_least("resolution", self.resolution, 1)
        at_least("modulus_bits", self.modulus_bits, 2)
        one_of("noise", self.noise, ("discrete_gaussian", "skellam"))
        require(
            self.honest >= 1,
            f"colluders={self.colluders} of least_answers={self.least_answers}: nobody is left to add noise",
        )

    @property
    def honest(self) -> int:
        """Fewest honest clients whose shares are in a revealed sum."""
        return self.least_answers - self.colluders

    def mechanism(self, noise_multiplier: float, d: int) -> Mechanism:
        """What one participation costs, against whoever sees the sum and who took part.

        Raises:
          InvalidArgument: the shares are too small for the grid.
        """
        if noise_multiplier == 0:
            return Concentrated(inf, 0.0)
        bound = rounding_bound(self.resolution, d)
        share = share_deviation(noise_multiplier, bound, self.honest)
        if self.noise == "discrete_gaussian":
            return Concentrated(*zcdp(bound, share, self.honest, d))
        bound_l1, variance = min(sqrt(d) * bound, bound**2), self.honest * share**2
        curve = tuple(skellam_rdp(order, bound, bound_l1, variance) for order in RDP_ORDERS)
        return RenyiCurve(f"Skellam(variance={variance:.6g}, D={bound:.6g}, D1={bound_l1:.6g})", RDP_ORDERS, curve)

    def least_noise_multiplier(self, d: int) -> float:
        """Below it, shares are too small for the grid."""
        return SMALLEST_SHARE * sqrt(self.honest) / rounding_bound(self.resolution, d) * (1 + 1e-9)

    def codec(self, noise_multiplier: float, max_grad_norm: float, source: NoiseSource) -> DistributedNoise:
        """The wire format: rounding to the grid, this client's share, the modulus."""
        return DistributedNoise(
            max_grad_norm,
            max_grad_norm / self.resolution,
            noise_multiplier,
            self.honest,
            self.clients,
            self.modulus_bits,
            self.noise,
            source,
        )

    def wrap_probability(self, noise_multiplier: float, d: int) -> float:
        """Bound on the probability that a round loses a coordinate to the modulus; it costs utility, not privacy."""
        share = share_deviation(noise_multiplier, rounding_bound(self.resolution, d), self.honest)
        return wrap_probability(self.modulus_bits, self.clients, self.resolution, share, d, mechanism=self.noise)

    def problems(self, noise_multiplier: float, d: int, channel: Channel) -> Iterator[tuple[bool, str, str]]:
        """What keeps a channel from carrying these whole numbers, as `compatibility` lists it."""
        name, half = type(channel).__name__, 2.0 ** (self.modulus_bits - 1)
        grid, largest = channel.grid, channel.largest_coordinate
        bits = self.modulus_bits
        exact = f"PairwiseMasks(modulus_bits={bits}), BFV(bits={bits - 1}) or CKKS(bound={half:g}, bits={bits - 1})"
        yield (
            not channel.integers and (grid is None or abs(1 / grid - round(1 / grid)) > 0),
            f"{name} does not carry whole numbers exactly",
            exact,
        )
        yield (
            largest is not None and largest < half,
            f"{name} refuses coordinates beyond {largest or 0:g}, sums are taken modulo 2^{self.modulus_bits}",
            exact,
        )
        if noise_multiplier == 0:
            return
        wrapped = self.wrap_probability(noise_multiplier, d)
        yield (
            wrapped >= WRAP_TARGET,
            f"modulus_bits={self.modulus_bits}: a round loses a coordinate with probability {wrapped:.2g}",
            "more modulus_bits, or a smaller resolution",
        )
