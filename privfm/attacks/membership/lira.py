"""Likelihood ratio of two Gaussians per example: shadow models that saw it, and shadow models that did not."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, final

import numpy as np

from privfm.attacks.membership.sides import by_query, mean_over, squares_over, too_few
from privfm.checks import one_of
from privfm.contracts.membership import Array, Flags, MembershipAttack, Signals

Mode = Literal["online", "offline"]
Variance = Literal["per-example", "global", "automatic"]

_ENOUGH = 32
"""Models on each side of every example from which `automatic` takes a variance per example: half of the 64 shadow
models from which Carlini et al. 2022 do."""

_LEAST = 2
"""Models on a side: one alone has no spread."""

_ROUNDING = float(np.finfo(np.float32).eps)
"""Signals come from float32 logits: a spread below their last digit is how they were rounded, not what models say."""


@final
@dataclass(frozen=True)
class LiRA(MembershipAttack):
    """How much likelier a signal is among models trained on the example than among models that were not.

    | mode | score of one example | models an example |
    |---|---|---|
    | online | `log N(x; mean_in, sigma_in) - log N(x; mean_out, sigma_out)` | 2 in, 2 out |
    | offline | log-odds of the tail, `log Phi(z) - log Phi(-z)`, `z = (x - mean_out) / sigma_out` | 2 out |

    The Gaussian wants a signal that looks like one: log-odds of the label, `log p - log(1 - p)`, rather than a
    probability; for texts the mean log-odds of the tokens, or minus the mean loss.

    Several queries of one example count as independent: their scores add up (online a Gaussian with a diagonal
    covariance; offline the logit method of joining tails, Mudholkar and George 1979).

    The offline score orders one query as the paper's `Phi(z)` does, but keeps apart what a tail probability rounds to
    1: the surest members, who decide the rate at few false positives. (The authors' code takes the density instead of
    the tail: there an example that fits *worse* than any shadow model expects is judged a member as well.)

    Variance:
      per-example: of each example's own models, with `count - 1` below the fraction.
      global: one a side for all examples, of the distances from each example's own mean. (The authors' code leaves the
        differences between examples in it, and takes that of the in models for both sides.)
      automatic: per-example where every example has at least 32 models on each side that is read, else global;
        `variance_for` says which. Attacking 64 models in turn by the other 63 leaves 31 on some side: global.

      A standard deviation below float32's rounding of the mean, `2**-23 * max(1, |mean|)`, is raised to it: models that
      agree to the last digit (a saturated signal) would otherwise make every other value infinitely unlikely.

    Where every example lies in exactly half of the models, its count among the others tells the left-out model's own
    flag, and the two Gaussians know their means unequally well: on pure noise, models attacked in turn online with a
    global variance have an AUC of 0.490 with 16 models and 0.477 with 8 (0.500 with 64; 4,000 examples, seeds 20-25).
    Independent coins mend that from 16 models on (0.498); with 8, leaving out examples that too few models know bends
    the counts again. Offline it does not arise (0.500).

    Args:
      mode: whether the attacker's models were trained on the examples it judges (half of them each).
      variance: whose spread; see above.

    Attributes:
      used: what the attacker must have; it depends on the mode.

    Cost: O(models * n * queries), a few arrays of the shadows' size.

    Source: Carlini et al., "Membership inference attacks from first principles", 2022, algorithm 1 and its offline
      variant. Centres are means as there (the authors' code takes medians).

    >>> shadows = Signals(np.array([[0.0], [1.0], [4.0], [5.0]]), np.array([[False], [False], [True], [True]]))
    >>> target = Signals(np.array([[4.5]]), np.array([[True]]))
    >>> LiRA("online", "global")(target, shadows)  # at the mean of the members: 4**2 / (2 sigma**2), sigma**2 = 1/2
    array([16.])
    """

    mode: Mode
    variance: Variance = "automatic"
    used: tuple[str, ...] = field(init=False, repr=False, compare=False, default=())

    def __post_init__(self) -> None:
        one_of("mode", self.mode, ("online", "offline"))
        one_of("variance", self.variance, ("per-example", "global", "automatic"))
        trained = "shadow models not trained on it"
        if self.mode == "online":
            trained = "shadow models trained on each judged example, and others that were not"
        object.__setattr__(self, "used", ("signal of the target", trained))

    def variance_for(self, shadows: Signals) -> Literal["per-example", "global"]:
        """Whose variance is taken with these shadow models: what `automatic` comes to."""
        if self.variance != "automatic":
            return self.variance
        enough = all(bool((side.sum(axis=0) >= _ENOUGH).all()) for side in self._sides(shadows))
        return "per-example" if enough else "global"

    def refusal(self, target: Signals, shadows: Signals | None) -> str:
        if shadows is None:
            return "needs shadow models; Threshold needs none"
        sides = self._sides(shadows)
        out = too_few(sides[0], _LEAST, "not trained on")
        if out or self.mode == "offline":
            return out
        inside = too_few(sides[1], _LEAST, "trained on")
        return f"{inside}; or take mode='offline', which needs none" if inside else ""

    def scores(self, target: Signals, shadows: Signals | None) -> Array:
        assert shadows is not None  # refused before
        signal, values = by_query(target.values)[0], by_query(shadows.values)
        one_for_all = self.variance_for(shadows) == "global"
        fits = [_fit(side, values, one_for_all) for side in self._sides(shadows)]
        distances = [(signal - mean) / deviation for mean, deviation in fits]
        if self.mode == "offline":
            return _tail(distances[0])
        (_, wide_out), (_, wide_in) = fits
        ratio = (distances[0] ** 2 - distances[1] ** 2) / 2 + np.log(wide_out) - np.log(wide_in)
        return np.asarray(ratio.sum(axis=1))

    def _sides(self, shadows: Signals) -> tuple[Flags, ...]:
        """Models not trained on an example and, online, those that were; nothing else is ever read."""
        return (~shadows.inside,) if self.mode == "offline" else (~shadows.inside, shadows.inside)


def _fit(side: Flags, values: Array, one_for_all: bool) -> tuple[Array, Array]:
    """Mean and standard deviation of each example's Gaussian, `(n, queries)` each."""
    mean = mean_over(side, values)
    squares = squares_over(side, values, mean)
    free = (side.sum(axis=0) - 1)[:, None]
    variance = squares.sum(axis=0) / free.sum() if one_for_all else squares / free
    return mean, np.maximum(np.sqrt(variance), _ROUNDING * np.maximum(1.0, np.abs(mean)))


def _tail(distances: Array) -> Array:
    """Log-odds of the one-sided tails, added over queries: rises strictly wherever a float can."""
    from scipy.special import log_ndtr

    return np.asarray((log_ndtr(distances) - log_ndtr(-distances)).sum(axis=1), dtype=np.float64)
