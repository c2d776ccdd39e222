"""Epsilon from one run with many canaries, whatever the mechanism (Steinke, Nasr, Jagielski)."""

from __future__ import annotations

from collections.abc import Callable
from math import exp, expm1, inf, log, log1p, sqrt

import numpy as np
from numpy.typing import ArrayLike

from privfm.attacks.audit.bisection import largest_rejected
from privfm.attacks.audit.guesses import Guesses, check_run, spread
from privfm.attacks.audit.statements import Bound
from privfm.checks import at_least, fraction, non_negative, require


def one_run(
    scores: ArrayLike,
    included: ArrayLike,
    delta: float,
    *,
    guesses: Guesses | None = None,
    confidence: float = 0.95,
) -> Bound:
    """Certified lower bound of epsilon from one run; assumes nothing of the mechanism but fair, independent coins.

    Args:
      scores: `(m,)`, higher means rather in; any scores, also dependent ones.
      included: `(m,)`, the coins: independent, each with probability 1/2.
      delta: of the claim, 0 allowed.
      guesses: how many are made; None: `spread(m)`.
      confidence: in (0, 1).

    Cost: 30 passes over the number of guesses for each count (m = 1e5: about a second).

    Raises:
      InvalidArgument: NaN scores, coins that are not fair, more guesses than half of the canaries.

    Source: Steinke, Nasr, Jagielski, "Privacy auditing with one (1) training run", 2023, theorem 5.2.

    >>> import numpy as np
    >>> from privfm.attacks.audit.guesses import Declared
    >>> coins = np.random.default_rng(0).random(1000) < 0.5
    >>> bound = one_run(coins * 1.0, coins, 0.0, guesses=Declared((400,)))
    >>> bound.correct, round(bound.epsilon, 2)
    (800, 5.59)
    """
    fraction("delta", delta, zero=True, one=False)
    fraction("confidence", confidence, one=False)
    values, coins = check_run(scores, included)

    def bounding(m: int, guesses: int, correct: int, error: float, *, chosen: bool) -> float:
        return epsilon_of(m, guesses, correct, delta, error=error, chosen=chosen)

    found = (spread(len(values)) if guesses is None else guesses).certify(values, coins, 1 - confidence, bounding)
    return found.bound("one run", delta, confidence, len(values))


def p_value(m: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """Largest probability with which an (epsilon, delta)-private mechanism lets `correct` or more guesses be right.

    `min(1, b + 2 m delta a)` with W binomial (guesses, e^eps / (1 + e^eps)), `b = P[W >= correct]` and
    `a = max_i P[correct > W >= correct - i] / i`, i from 1 to `correct`.

    | case                     | answer                         |
    |--------------------------|--------------------------------|
    | correct 0                | 1                              |
    | delta 0                  | b                              |
    | correct = guesses        | q^guesses + 2 m delta a        |

    Args:
      m: canaries that were flipped for.
      guesses: made of them, a number fixed beforehand.
      correct: of the guesses.
      epsilon: at least 0.
      delta: in [0, 1).

    Cost: one pass over `correct` numbers.

    Source: Steinke, Nasr, Jagielski 2023, theorem 5.2.

    >>> round(p_value(100, 4, 4, 0.0, 0.0), 4)
    0.0625
    """
    non_negative("epsilon", epsilon)
    fraction("delta", delta, zero=True, one=False)
    whole, missed = _parts(m, guesses, correct)(epsilon)
    return min(1.0, whole + 2 * m * delta * missed)


def epsilon_of(m: int, guesses: int, correct: int, delta: float, *, error: float, chosen: bool = False) -> float:
    """Largest epsilon that `correct` of `guesses` reject at `error`; 0 if none.

    With delta = 0 the theorem holds given what the run released, so a count may depend on it. With delta > 0 it holds
    only on average over the releases: the failures of probability delta may sit where the count comes out small. The
    theorem's proof bounds the error by E[b] + E[F a] with E[F] <= 2 m delta, each count with its own a and b; so b and
    2 m delta a are held below `error` / 2 apart, and their sum is right whatever the count depends on.

    Args:
      m: canaries.
      guesses: made.
      correct: of them.
      delta: of the claim.
      error: probability of a wrong bound.
      chosen: whether the number of guesses depends on the run.
    """
    fraction("error", error, one=False)
    parts = _parts(m, guesses, correct)
    if correct == guesses and delta == 0:
        return perfect(guesses, error)  # the closed form, without the last rounding

    def rejects(epsilon: float) -> bool:
        whole, missed = parts(epsilon)
        slack = 2 * m * delta * missed
        if chosen and delta > 0:
            return whole <= error / 2 and slack <= error / 2
        return whole + slack <= error

    return largest_rejected(rejects, perfect(guesses, error))


def perfect(guesses: int, error: float) -> float:
    """Epsilon at which all guesses are right with probability `error`: `ln(q / (1 - q))`, `q = error^(1 / guesses)`.

    >>> round(perfect(1000, 0.05), 2)
    5.81
    """
    at_least("guesses", guesses, 1)
    fraction("error", error, one=False)
    each = log(error) / guesses
    return max(0.0, each - log(-expm1(each)))


def _parts(m: int, guesses: int, correct: int) -> Callable[[float], tuple[float, float]]:
    """From epsilon to `(b, a)` of `p_value`: what does not depend on epsilon is computed once."""
    from scipy.special import betainc, gammaln

    at_least("m", m, 1)
    at_least("correct", correct, 0)
    require(correct <= guesses <= m, f"correct={correct}, guesses={guesses}, m={m}: expected correct <= guesses <= m")
    if correct == 0:
        return lambda _: (1.0, 0.0)
    # The mean of the masses from correct - 1 downwards is largest before they fall below it. With q >= 1/2 they are
    # under e^-70 of the mode's at 12 deviations below guesses / 2: nothing further down can make a maximum.
    lowest = max(0, int(guesses / 2 - 6 * sqrt(guesses)))
    below = np.arange(correct - 1, (lowest if lowest < correct else 0) - 1, -1, dtype=np.float64)
    ways = gammaln(guesses + 1.0) - gammaln(below + 1) - gammaln(guesses - below + 1)
    wrong, steps = guesses - below, np.arange(1, len(below) + 1)

    def parts(epsilon: float) -> tuple[float, float]:
        # ln q and ln(1 - q) without forming q: at epsilon 40 the double 1 - q would be 0.
        right = -log1p(exp(-epsilon)) if epsilon < inf else 0.0
        masses = np.exp(ways + guesses * right - wrong * epsilon)
        whole = float(betainc(correct, guesses - correct + 1, exp(right)))
        return whole, float(np.max(np.cumsum(masses) / steps))

    return parts
