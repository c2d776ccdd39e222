"""Distributed noise on whole numbers: each client rounds, adds its share, and only a sum with enough shares shows.

The server sees sums only, so that nobody has to be trusted with a sum before its noise. What epsilon rests on:

- rounding makes a row longer; the longest integer row has L2 norm `rounding_bound`, which is the sensitivity;
- shares go missing or are known to colluders: the noise is sized for the least number of honest ones;
- a sum of discrete Gaussians is not quite one: `tau` says by how much.

The modulus is outside of it. Reduction mod m comes after the noise and changes utility alone, where sums are taken
modulo m as well (`PairwiseMasks`). A channel that hands over the whole sum of reduced rows (`BFV`, `CKKS`, `RLWEPad`)
also shows that a row wrapped; that happens with less than `WRAP_TARGET` a round (`wrap_probability`), which belongs to
delta and is not added to it.

Source: Kairouz, Liu, Steinke, "The distributed discrete Gaussian mechanism for federated learning with secure
aggregation", 2021.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import asinh, ceil, exp, log, pi, sqrt
from typing import TYPE_CHECKING, Literal, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

from privfm.checks import at_least, one_of, positive, require
from privfm.contracts import Encoded, State, Transform
from privfm.defenses.privacy.discrete_noise import Words, discrete_gaussian, skellam
from privfm.defenses.privacy.noise import NoiseSource, words

if TYPE_CHECKING:
    from privfm.defenses.channels import CKKS

Mechanism = Literal["discrete_gaussian", "skellam"]

SMALLEST_SHARE = 2.0
"""Steps. For 20 shares of a million coordinates, `tau d` is 545 at 1 step, 2e-3 at 1.5 and 7e-11 at 2."""

WRAP_TARGET = 1e-9
"""Probability with which a round may lose a coordinate to the modulus."""

_BETA = exp(-0.5)  # a rounding is accepted with a probability of at least 1 - beta = 0.39
_LARGEST_WHOLE = 2**53  # of float64
_LARGEST_CLIP = 2**30  # steps: squared norms are summed exactly in 64 bits


# What an epsilon is made of. Lengths and deviations are in steps of the grid.


def rounding_bound(clip: float, d: int) -> float:
    """Largest L2 norm D of a row that was at most `clip` long before it was rounded: the sensitivity.

    Args:
      clip: c, the L2 clip over the grid.
      d: coordinates.

    Source: Kairouz, Liu, Steinke, 2021, on conditional rounding: `D^2 = min((c + sqrt d)^2,
    c^2 + d/4 + sqrt(2 ln(1/beta)) (c + sqrt(d)/2))`, with beta = exp(-1/2).

    >>> round(rounding_bound(2.0**12, 10**6) / 2.0**12, 4)
    1.0076
    """
    positive("clip", clip)
    at_least("d", d, 1)
    likely = clip**2 + d / 4 + sqrt(2 * log(1 / _BETA)) * (clip + sqrt(d) / 2)
    return min(clip + sqrt(d), sqrt(likely))


def share_deviation(noise_multiplier: float, bound: float, survivors: int) -> float:
    """Deviation of one client's share with which `survivors` shares alone make `noise_multiplier * bound`.

    Args:
      noise_multiplier: z, that the floor of honest survivors already gives.
      bound: `rounding_bound`.
      survivors: h, least answers accepted minus colluders assumed.

    Raises:
      InvalidArgument: the share is under `SMALLEST_SHARE` steps.
    """
    positive("noise_multiplier", noise_multiplier)
    positive("bound", bound)
    at_least("survivors", survivors, 1)
    share = noise_multiplier * bound / sqrt(survivors)
    _require_fine_grid(share)
    return share


def tau(share: float, survivors: int) -> float:
    """How far a sum of discrete Gaussians is from one, a coordinate: twice the bound on `|ln(P(k) / P'(k))|`.

    Args:
      share: deviation of each.
      survivors: how many are added.

    Source: Kairouz, Liu, Steinke, 2021: `10 sum_{k=1}^{h-1} exp(-2 pi^2 s^2 k / (k+1))`.

    >>> f"{tau(1.5, 20):.3g}"
    '2.27e-09'
    """
    positive("share", share)
    at_least("survivors", survivors, 1)
    return 10 * sum(exp(-2 * (pi * share) ** 2 * k / (k + 1)) for k in range(1, survivors))


def zcdp(bound: float, share: float, survivors: int, d: int) -> tuple[float, float]:
    """`(rho, xi)` of one participation: the Rényi divergence is at most `xi + rho a` for every order a >= 2.

    rho = D^2 / (2 h s^2). Both neighbouring sums are within a factor `exp(tau d / 2)` of discrete Gaussians, pointwise,
    which adds `(a - 1/2) / (a - 1) tau d <= 1.5 tau d`. For `dp_event.ZCDpEvent`, RDP accountant, integer orders; the
    relation is zero-out, as a client that is left out still adds its share.

    Args:
      bound: D, `rounding_bound`.
      share: s, deviation of each share, at least `SMALLEST_SHARE`.
      survivors: h, honest shares in the sum.
      d: coordinates.

    Raises:
      InvalidArgument: the share is too small for xi to be negligible.

    Source: Kairouz, Liu, Steinke, 2021, whose theorem states `sqrt(D^2 / (h s^2) + tau d / 2)`-concentrated privacy;
    the constant 1.5 is the plain bound on top, and as negligible at the shares allowed.
    """
    positive("bound", bound)
    at_least("d", d, 1)
    _require_fine_grid(share)
    return bound**2 / (2 * survivors * share**2), 1.5 * tau(share, survivors) * d


def skellam_rdp(order: int, bound: float, bound_l1: float, variance: float) -> float:
    """Rényi divergence of one participation under Skellam noise.

    Args:
      order: whole number above 1.
      bound: L2 sensitivity D.
      bound_l1: L1 sensitivity; on whole numbers `min(sqrt(d) D, D^2)`.
      variance: mu of the noise on each coordinate of the *sum*: h s^2.

    Source: Agarwal, Kairouz, Liu, "The Skellam mechanism for differentially private federated learning", 2021,
    `a D^2 / (2 mu) + min(((2a - 1) D^2 + 6 D1) / (4 mu^2), 3 D1 / (2 mu))`.
    """
    at_least("order", order, 2)
    positive("bound", bound)
    positive("bound_l1", bound_l1)
    positive("variance", variance)
    second = min(
        ((2 * order - 1) * bound**2 + 6 * bound_l1) / (4 * variance**2),
        3 * bound_l1 / (2 * variance),
    )
    return order * bound**2 / (2 * variance) + second


def wrap_probability(
    modulus_bits: int, clients: int, clip: float, share: float, d: int, *, mechanism: Mechanism = "discrete_gaussian"
) -> float:
    """Bound on the probability that any coordinate of one round's sum leaves [-m/2, m/2), value and noise together.

    The value is bounded by `clients * ceil(clip)`, whatever the data (all clients in one coordinate attain it); the
    noise by Chernoff's bound, over both signs and all coordinates.

    Args:
      modulus_bits: m = 2^modulus_bits.
      clients: most in one sum; all of them add a share.
      clip: L2 clip in steps.
      share: deviation of each share.
      d: coordinates.
      mechanism: "discrete_gaussian" or "skellam".

    Source: a discrete Gaussian's moments are below the Gaussian's (Canonne, Kamath, Steinke, 2020), so
    that `P(sum >= l) <= exp(-l^2 / (2 v))`; a Skellam's logarithm of moments is `v (cosh(t) - 1)`.
    """
    at_least("modulus_bits", modulus_bits, 2)
    at_least("clients", clients, 1)
    positive("clip", clip)
    positive("share", share)
    at_least("d", d, 1)
    one_of("mechanism", mechanism, ("discrete_gaussian", "skellam"))
    room = 2.0 ** (modulus_bits - 1) - clients * ceil(clip)
    if room <= 0:
        return 1.0
    variance = clients * share**2
    if mechanism == "discrete_gaussian":
        exponent = room**2 / (2 * variance)
    else:
        exponent = room * asinh(room / variance) - room**2 / (sqrt(room**2 + variance**2) + variance)
    return min(1.0, 2 * d * exp(-exponent))


def smallest_modulus_bits(
    clients: int, clip: float, share: float, d: int, *, mechanism: Mechanism = "discrete_gaussian"
) -> int:
    """Fewest bits of a modulus that keeps `wrap_probability` under `WRAP_TARGET`."""
    bits = 2
    while wrap_probability(bits, clients, clip, share, d, mechanism=mechanism) >= WRAP_TARGET:
        bits += 1
    return bits


# The codec


@final
@dataclass(frozen=True)
class DistributedNoise(Transform):
    """Whole steps of a grid with this client's share of the noise in them, modulo 2^`modulus_bits`.

    | step      | what                                                                                        |
    |-----------|---------------------------------------------------------------------------------------------|
    | clip      | again, in float64: a step before it may have left a row a rounding error too long           |
    | scale     | by 1 / grid                                                                                 |
    | round     | up or down at random, without bias, redrawn until the norm is at most `rounding_bound`      |
    | add noise | one share, `share(d)` steps; never redrawn: that would tie the noise to the data            |
    | reduce    | into [-m/2, m/2): centred                                                                   |

    A row that is not finite becomes zero, with its share of the noise: under a sum nobody else could leave it out, and
    whether a client fails must not depend on its data.

    On the wire a row is float64 and every number in it whole: exact up to 2^53, and up to 2^24 for a channel that
    hands sums over as float32. Decoding reduces a sum modulo m and gives float32 updates; decoding a sum is the sum of
    the decodings as long as nothing wraps. Whoever opens single rows must not clip them: they are mostly noise. Use it
    on channels that reveal sums only; see `channel`.

    Formal guarantee: `zcdp` (or `skellam_rdp`) a participation against whoever sees the sum and who took part, if at
    least `survivors` honest clients are in it and nobody sees single rows. Fewer: the round must end before the sum
    is opened. With source "seeded": none against anybody who knows the seed.

    Args:
      max_grad_norm: the plan's L2 clip, in units of an update.
      grid: one step, in units of an update, public. From 2^12 steps a clip on, rounding costs under 1 % at d = 1e6.
      noise_multiplier: deviation of the noise of `survivors` shares together, in units of `rounding_bound`.
      survivors: least answers a round accepts, minus the colluders assumed.
      clients: most clients in one sum. Room for the values of so many is proved; all of them is what may wrap.
      modulus_bits: see `smallest_modulus_bits`.
      mechanism: "discrete_gaussian", exact; "skellam": sums stay in the family, and neither exact nor secure here.
      source: where rounding and noise come from.

    Raises:
      InvalidArgument: a share under 2 steps, values that may leave the modulus by themselves, or secure Skellam.

    Source: Kairouz, Liu, Steinke, 2021, algorithms 1 and 2, without the rotation.
    """

    max_grad_norm: float
    grid: float
    noise_multiplier: float
    survivors: int
    clients: int
    modulus_bits: int
    mechanism: Mechanism = "discrete_gaussian"
    source: NoiseSource = "seeded"
    binding = True
    additive = True
    integers = True

    def __post_init__(self) -> None:
        positive("max_grad_norm", self.max_grad_norm)
        positive("grid", self.grid)
        one_of("mechanism", self.mechanism, ("discrete_gaussian", "skellam"))
        one_of("source", self.source, ("seeded", "secure"))
        at_least("clients", self.clients, 1)
        at_least("modulus_bits", self.modulus_bits, 2)
        at_least("survivors", self.survivors, 1)
        require(
            self.survivors <= self.clients,
            f"survivors={self.survivors}: expected at most clients={self.clients}, as no more can answer",
        )
        require(
            self.clip <= _LARGEST_CLIP,
            f"max_grad_norm={self.max_grad_norm} is {self.clip:g} steps of grid={self.grid}: expected at most "
            f"{_LARGEST_CLIP}; take a coarser grid",
        )
        share_deviation(self.noise_multiplier, self.clip, self.survivors)  # at any width it is no smaller
        largest = self.clients * ceil(self.clip)
        require(
            largest < self.modulus / 2,
            f"modulus_bits={self.modulus_bits}: {self.clients} clients may add up to {largest} steps, which needs more "
            f"than {self.modulus // 2}; take `smallest_modulus_bits`, or a coarser grid",
        )
        require(
            self.clients * self.modulus // 2 <= _LARGEST_WHOLE,
            f"modulus_bits={self.modulus_bits}: a sum of clients={self.clients} rows would leave the whole numbers "
            "that float64 holds; take a coarser grid and a smaller modulus",
        )
        require(
            self.mechanism == "discrete_gaussian" or self.source == "seeded",
            "mechanism='skellam' is sampled in floating point from a generator that can be computed from its output: "
            "source='secure' would be untrue; take 'discrete_gaussian'",
        )

    @property
    def clip(self) -> float:
        """c, the clip in steps."""
        return self.max_grad_norm / self.grid

    @property
    def modulus(self) -> int:
        return 1 << self.modulus_bits

    @property
    def largest_whole(self) -> int | None:
        return self.modulus // 2

    def bound(self, d: int) -> float:
        """D, the sensitivity in steps: `rounding_bound`."""
        return rounding_bound(self.clip, d)

    def share(self, d: int) -> float:
        """Deviation in steps of the noise that each client adds to each of d coordinates."""
        return share_deviation(self.noise_multiplier, self.bound(d), self.survivors)

    def wrap_probability(self, d: int) -> float:
        """The function of this name, for the largest sum; to be printed and compared with `WRAP_TARGET`."""
        share = self.share(d)
        return wrap_probability(self.modulus_bits, self.clients, self.clip, share, d, mechanism=self.mechanism)

    def channel(self, smallest_release: int) -> CKKS:
        """The CKKS channel whose grid is this codec's: one step is 1, the bound m/2, so that nothing is cut.

        Args:
          smallest_release: least answers accepted; at least `survivors`, more where colluders are assumed.

        Raises:
          InvalidArgument: fewer answers than survivors, or a sum that no ring holds.
        """
        from privfm.defenses.channels import CKKS

        at_least("smallest_release", smallest_release, self.survivors)
        bits = self.modulus_bits - 1
        return CKKS(bound=2.0**bits, clients=self.clients, bits=bits, smallest_release=smallest_release)

    def norm_bound(self, bound: float, d: int) -> float:
        """Of what the client's *data* adds: grid times `bound(d)`, the sensitivity. Its noise is not in it."""
        return self.grid * self.bound(d)

    def encode(self, rows: Tensor, state: State, generators: Sequence[Generator]) -> tuple[Encoded, State]:
        encoded = np.empty(rows.shape, np.float64)
        for place, (row, generator) in enumerate(zip(rows, generators, strict=True)):
            draw = words(self.source, generator)
            steps = self.rounded(row, draw) + self._noise(len(row), draw)
            encoded[place] = _centred(steps, self.modulus)
        return Encoded(torch.from_numpy(encoded).to(rows.device), {}), state

    def decode(self, encoded: Encoded, d: int) -> Tensor:
        half = self.modulus / 2
        steps = (encoded.rows.double() + half).remainder(self.modulus) - half  # exact: a power of two
        return (steps * self.grid).float()

    def rounded(self, row: Tensor, draw: Words) -> NDArray[np.int64]:
        """A row `(d,)`, clipped, in whole steps without noise: `(d,)` of L2 norm at most `bound(d)`.

        Secret: only with its noise may it leave the client.
        """
        values = row.detach().cpu().double().numpy()
        if not np.isfinite(values).all():
            return np.zeros(len(values), np.int64)
        norm = float(np.linalg.norm(values))
        scale = min(1.0, self.max_grad_norm / norm) if norm > 0 else 1.0
        return _rounded(values * scale / self.grid, self.bound(len(values)), draw)

    def _noise(self, d: int, draw: Words) -> NDArray[np.int64]:
        share = self.share(d)
        if self.mechanism == "discrete_gaussian":
            return discrete_gaussian(d, Fraction(share) ** 2, draw)
        return skellam(d, share**2, draw)


def _rounded(values: NDArray[np.float64], bound: float, draw: Words) -> NDArray[np.int64]:
    """Unbiased rounding of `(d,)` to whole numbers, redrawn until its L2 norm is at most `bound`.

    2.6 draws on average at the very most. The bits of a rejected draw are gone: nothing is tried again with them.
    """
    floors = np.floor(values)
    rests, lower = values - floors, floors.astype(np.int64)
    largest = int(bound * bound)  # norms squared are whole
    while True:
        up = (draw(len(values)) >> np.uint64(11)) * 2.0**-53 < rests
        steps: NDArray[np.int64] = lower + up
        if int((steps * steps).sum()) <= largest:
            return steps


def _centred(steps: NDArray[np.int64], modulus: int) -> NDArray[np.int64]:
    """Modulo `modulus`, in [-modulus/2, modulus/2)."""
    half = modulus // 2
    return (steps + half) % modulus - half


def _require_fine_grid(share: float) -> None:
    positive("share", share)
    require(
        share >= SMALLEST_SHARE,
        f"a share of {share:.4g} steps: expected at least {SMALLEST_SHARE:g}, below which sums of discrete Gaussians "
        "are no discrete Gaussian; take a finer grid, more noise or fewer survivors",
    )
