"""Who masks with whom, and how many shares open a secret: from the number of clients, the corrupt and the drop-outs.

Clients stand in a random order on a ring, each with the k/2 nearest on either side as neighbours. What has to hold,
with a number for each, when at most a share `corrupt` of the clients works with the server and at most a share
`dropouts` of them goes missing:

- private, 2^-40: no client has `threshold` or more corrupt neighbours, who together would open its secrets; and the
  honest clients that stay are not cut in two, as the sums of either part would show.
- complete, 2^-20: every client keeps `threshold` neighbours.

Every neighbourhood is a uniformly random set of k others, so that hypergeometric tails bound the first and the last,
over all n clients. A ring falls in two only where two runs of k/2 clients each are gone. (A client all of whose
neighbours are gone is one case of that; bounding this case alone, as is often done, misses a factor of n/2.) Tails are
computed exactly, in whole numbers.

Under 50 clients, and where a sparser graph does not do, everybody is everybody's neighbour. Then nothing is left to
chance, and the threshold is chosen so high that honest clients, who answer for one secret of each client only, never
open both between them.

Source: Bell, Bonawitz, Gascón, Lepoint, Raykova, "Secure single-server aggregation with (poly)logarithmic overhead",
2020.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from hashlib import shake_256
from math import comb, floor, inf, log2
from typing import Final, final

import numpy as np

from privfm.checks import TooFewClients, at_least, fraction, require

PRIVACY: Final = -40.0
"""log2 of the probability with which a round may show more than the sum. Bell et al. take it as well."""

FAILURE: Final = -20.0
"""log2 of the probability with which a round may fail although no more drop out than assumed."""

COMPLETE_UNDER: Final = 50
"""Fewer clients than this are all neighbours: a sparse graph would save nothing there."""

_SLACK = 1e-9  # a share of 0.29 of 100 clients is 29, not 28.999999999999996


@final
@dataclass(frozen=True)
class MaskGraph:
    """What one round of `clients` uses, and what that is worth.

    Attributes:
      clients: n.
      neighbours: k of each client; n - 1: everybody.
      threshold: t, shares that open a secret. A client and its k neighbours hold one each.
      log2_privacy: bound on the probability that a round shows more than the sum; -inf: it cannot happen.
      log2_failure: bound on the probability that too few shares are left; -inf: it cannot happen.
    """

    clients: int
    neighbours: int
    threshold: int
    log2_privacy: float
    log2_failure: float

    @property
    def complete(self) -> bool:
        """Everybody is everybody's neighbour."""
        return self.neighbours == self.clients - 1

    @property
    def meets_bounds(self) -> bool:
        """Both probabilities are within `PRIVACY` and `FAILURE`."""
        return self.log2_privacy <= PRIVACY and self.log2_failure <= FAILURE

    @property
    def statement(self) -> str:
        """One line for people.

        >>> smallest(100, 0.2, 0.05).statement
        '100 clients: 24 neighbours, threshold 19; shows more than the sum: probability <= 2^-40.3; fails: never'
        """
        warning = "" if self.meets_bounds else f" (NOT within 2^{PRIVACY:.0f} and 2^{FAILURE:.0f})"
        return (
            f"{self.clients} clients: {self.neighbours} neighbours, threshold {self.threshold}; "
            f"shows more than the sum: {_shown(self.log2_privacy)}; fails: {_shown(self.log2_failure)}{warning}"
        )


@lru_cache(maxsize=256)
def smallest(clients: int, corrupt: float, dropouts: float) -> MaskGraph:
    """The graph with the fewest neighbours that meets both bounds; k is even, as the ring needs it.

    Args:
      clients: n, at least 2.
      corrupt: largest share of the clients that works with the server.
      dropouts: largest share of the clients that goes missing after the keys were exchanged.

    Raises:
      InvalidArgument: not even the complete graph will do.

    >>> graph = smallest(1000, corrupt=0.2, dropouts=0.05)
    >>> graph.neighbours, graph.threshold
    (52, 37)
    """
    _check(clients, corrupt, dropouts)
    if clients >= COMPLETE_UNDER:
        for neighbours in range(2, clients - 1, 2):
            threshold = least_threshold(clients, neighbours, corrupt, dropouts)
            if threshold is not None:
                return measured(clients, neighbours, threshold, corrupt, dropouts)
    return complete(clients, corrupt, dropouts)


@lru_cache(maxsize=256)
def given(clients: int, neighbours: int, corrupt: float, dropouts: float) -> MaskGraph:
    """The graph with a number of neighbours that somebody asks for, at whatever it is worth.

    The threshold is the least that meets both bounds, else the smallest majority of the neighbours. With `neighbours`
    others or fewer the graph is complete.
    """
    _check(clients, corrupt, dropouts)
    _check_even(neighbours)
    if neighbours >= clients - 1:
        return complete(clients, corrupt, dropouts)
    threshold = least_threshold(clients, neighbours, corrupt, dropouts) or neighbours // 2 + 1
    return measured(clients, neighbours, threshold, corrupt, dropouts)


@lru_cache(maxsize=256)
def complete(clients: int, corrupt: float, dropouts: float) -> MaskGraph:
    """Everybody is everybody's neighbour: both bounds hold for certain, or not at all.

    With c corrupt and D missing, any threshold from c + 1 to n - D will do. It is the least above (n + c) / 2 where
    that is allowed: n - c honest clients, with one share each, and c corrupt ones, with two, do not open two secrets
    of one client then.

    Raises:
      InvalidArgument: c + 1 > n - D.
    """
    _check(clients, corrupt, dropouts)
    bad, gone = _count(clients, corrupt), _count(clients, dropouts)
    require(
        bad + gone < clients,
        f"corrupt={corrupt}, dropouts={dropouts}: of {clients} clients {clients - gone} answer, of whom {bad} could "
        "open any secret by themselves; assume less, or ask more clients",
    )
    threshold = min(clients - gone, (clients + bad) // 2 + 1)
    return MaskGraph(clients, clients - 1, max(threshold, bad + 1), -inf, -inf)


def active(clients: int, corrupt: int, dropouts: float) -> MaskGraph:
    """The graph against a server that does not follow the protocol: complete, with t = floor(2n/3) + 1.

    Complete, because whoever chose the neighbours of a client could choose the corrupt ones. More than 2n/3, because a
    lying server needs t clients for each of two stories and a corrupt client may back both: 2t <= n + c. With c < n/3
    that is impossible, and among any t clients more than c are honest.

    Args:
      clients: n that answered; the server's choice.
      corrupt: c, a *number*, however few answered: the server would let them all take part.
      dropouts: largest share that goes missing.

    Raises:
      TooFewClients: c >= n/3, for those who answered.
      InvalidArgument: fewer than t stay.

    Source: Bonawitz et al., "Practical secure aggregation for privacy-preserving machine learning", 2017, on active
    adversaries.
    """
    at_least("clients", clients, 2)
    if 3 * corrupt >= clients:
        raise TooFewClients(
            f"{clients} clients answered, of whom {corrupt} may be corrupt: against an active server expected more "
            f"than {3 * corrupt}; assume fewer, or ask more clients"
        )
    threshold = 2 * clients // 3 + 1
    stay = clients - _count(clients, dropouts)
    require(
        threshold <= stay,
        f"dropouts={dropouts}: of {clients} clients {stay} stay, but {threshold} must agree against an active server; "
        "ask more clients",
    )
    return MaskGraph(clients, clients - 1, threshold, -inf, -inf)


def least_threshold(clients: int, neighbours: int, corrupt: float, dropouts: float) -> int | None:
    """The least majority of k neighbours that meets both bounds as a threshold; None: there is none."""
    for threshold in range(neighbours // 2 + 1, neighbours + 1):
        if log2_failure(clients, neighbours, threshold, dropouts) > FAILURE:
            return None  # and even more so above
        if log2_privacy(clients, neighbours, threshold, corrupt, dropouts) <= PRIVACY:
            return threshold
    return None


def measured(clients: int, neighbours: int, threshold: int, corrupt: float, dropouts: float) -> MaskGraph:
    """A ring with the probabilities that follow."""
    private = log2_privacy(clients, neighbours, threshold, corrupt, dropouts)
    failing = log2_failure(clients, neighbours, threshold, dropouts)
    return MaskGraph(clients, neighbours, threshold, min(private, 0.0), min(failing, 0.0))


def log2_privacy(clients: int, neighbours: int, threshold: int, corrupt: float, dropouts: float) -> float:
    """Bound on the probability that corrupt neighbours open a secret, or that those who stay are cut in two."""
    bad = _count(clients, corrupt)
    opened = clients * sum(_tails(clients - 1, bad, neighbours)[threshold:])
    gone = min(clients, bad + _count(clients, dropouts))
    parted = clients * (clients - 1) // 2 * comb(gone, neighbours)  # over comb(clients, neighbours): k given places
    numerator = opened * comb(clients, neighbours) + parted * comb(clients - 1, neighbours)
    return _log2(numerator, comb(clients - 1, neighbours) * comb(clients, neighbours))


def log2_failure(clients: int, neighbours: int, threshold: int, dropouts: float) -> float:
    """Bound on the probability that some client keeps fewer than `threshold` neighbours."""
    others = clients - _count(clients, dropouts) - 1  # who stay, besides the client itself
    lost = clients * sum(_tails(clients - 1, others, neighbours)[:threshold])
    return _log2(lost, comb(clients - 1, neighbours))


def ring(clients: int, neighbours: int, seed: bytes) -> list[list[int]]:
    """The neighbours of each of n clients, sorted, by their places 0 .. n - 1.

    Args:
      clients: n.
      neighbours: k, even and under n - 1, or n - 1 for the complete graph.
      seed: of the random order; 32 bytes from the operating system in a round.

    Source: Bell et al., 2020: a Harary graph with randomly permuted vertices.
    """
    at_least("clients", clients, 2)
    if neighbours == clients - 1:
        return [[other for other in range(clients) if other != own] for own in range(clients)]
    _check_even(neighbours)
    require(neighbours < clients, f"neighbours={neighbours}: {clients} clients have {clients - 1} others at most")
    # Sorting 128 random bits a client permutes them; the order is uniform but for a tie, which is not to be expected.
    drawn = np.frombuffer(shake_256(seed).digest(16 * clients), "<u8").reshape(clients, 2)
    order = np.lexsort((drawn[:, 0], drawn[:, 1]))
    steps = [step for step in range(-neighbours // 2, neighbours // 2 + 1) if step]
    around = np.stack([np.roll(order, -step) for step in steps], axis=1)
    found: list[list[int]] = [[] for _ in range(clients)]
    for own, others in zip(order.tolist(), np.sort(around, axis=1).tolist(), strict=True):
        found[own] = others
    return found


@lru_cache(maxsize=512)
def _tails(others: int, marked: int, drawn: int) -> tuple[int, ...]:
    """Ways to draw `drawn` of `others` with i = 0 .. drawn marked ones among them: hypergeometric, unnormalised."""
    return tuple(comb(marked, i) * comb(others - marked, drawn - i) for i in range(drawn + 1))


def _log2(numerator: int, denominator: int) -> float:
    return log2(numerator) - log2(denominator) if numerator else -inf


def _count(clients: int, share: float) -> int:
    """At most so many of the clients are a share of them."""
    return floor(share * clients + _SLACK)


def _check(clients: int, corrupt: float, dropouts: float) -> None:
    at_least("clients", clients, 2)
    fraction("corrupt", corrupt, zero=True, one=False)
    fraction("dropouts", dropouts, zero=True, one=False)


def _check_even(neighbours: int) -> None:
    at_least("neighbours", neighbours, 2)
    require(neighbours % 2 == 0, f"neighbours={neighbours}: a ring has as many on either side; expected an even number")


def _shown(log2_probability: float) -> str:
    return "never" if log2_probability == -inf else f"probability <= 2^{log2_probability:.1f}"
