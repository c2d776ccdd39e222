"""Audits of other people's code: a callable that trains and a callable that scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar, final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from privfm.attacks.audit.clopper_pearson import Threshold, clopper_pearson
from privfm.attacks.audit.gaussian_fit import gaussian_fit
from privfm.attacks.audit.guesses import Guesses
from privfm.attacks.audit.one_run import one_run
from privfm.attacks.audit.one_run_fdp import Family, one_run_fdp
from privfm.attacks.audit.statements import Bound, Estimate
from privfm.checks import InvalidArgument, at_least, fraction, require

Model = TypeVar("Model")

_LEAST_RUNS = 16
"""Runs under which a fair coin may well leave fewer than the four of each kind that Clopper-Pearson halves."""


@final
@dataclass(frozen=True)
class Audited:
    """What an audit of a callable found.

    Attributes:
      bounds: certified, each on its own: the larger of two is one of confidence 1 - 2 (1 - confidence).
      estimate: no bound; None where delta is 0 or where there are too few scores of either kind.
      scores: `(m,)`, of all canaries or runs.
      included: `(m,)`, the coins.
    """

    bounds: tuple[Bound, ...]
    estimate: Estimate | None
    scores: tuple[float, ...]
    included: tuple[bool, ...]


def audit(
    train: Callable[[NDArray[np.bool_]], Model],
    score: Callable[[Model], ArrayLike],
    *,
    canaries: int,
    delta: float,
    generator: np.random.Generator,
    runs: int = 1,
    guesses: Guesses | None = None,
    family: Family | None = None,
    threshold: Threshold | None = None,
    confidence: float = 0.95,
) -> Audited:
    """Flips the coins, trains, scores and bounds.

    | runs | canaries | bounds                                                                                       |
    |------|----------|----------------------------------------------------------------------------------------------|
    | 1    | m >= 8   | one run (Steinke et al.), and one run by f-DP if a family is given                           |
    | n    | 1        | Clopper-Pearson over n runs, each with a coin of its own                                     |

    Args:
      train: `included (m,)` of bool -> a model, trained with exactly those canaries that are in.
      score: model -> `(m,)`, one for each canary whether in or not, higher means rather in.
      canaries: m.
      delta: of the claim.
      generator: source of the coins.
      runs: calls of `train`.
      guesses: of one run; None: `spread(m)`.
      family: of one run by f-DP.
      threshold: of many runs; None: chosen on a split half.
      confidence: of each bound.

    Raises:
      InvalidArgument: several canaries in several runs, or scores of another length, or NaN.

    >>> import numpy as np
    >>> noise = np.random.default_rng(1)
    >>> found = audit(
    ...     train=lambda included: included + noise.normal(0, 0.5, included.shape),
    ...     score=lambda released: released,
    ...     canaries=1000, delta=1e-5, generator=np.random.default_rng(2),
    ... )
    >>> 1 < found.bounds[0].epsilon < 9.99 < found.estimate.high
    True
    """
    at_least("canaries", canaries, 1)
    at_least("runs", runs, 1)
    fraction("confidence", confidence, one=False)
    fraction("delta", delta, zero=True, one=False)
    if runs == 1:
        at_least("canaries", canaries, 8)
        coins = generator.random(canaries) < 0.5
        scores = _trained(train, score, coins)
        bounds = [one_run(scores, coins, delta, guesses=guesses, confidence=confidence)]
        if family is not None:
            bounds.append(one_run_fdp(scores, coins, delta, family=family, guesses=guesses, confidence=confidence))
    else:
        require(
            canaries == 1,
            f"canaries={canaries}, runs={runs}: expected one canary in many runs, or many canaries in one run",
        )
        at_least("runs", runs, _LEAST_RUNS)
        coins = generator.random(runs) < 0.5
        scores = np.concatenate([_trained(train, score, coin) for coin in coins[:, None]])
        bounds = [clopper_pearson(scores[coins], scores[~coins], delta, threshold=threshold, confidence=confidence)]
    return Audited(tuple(bounds), _estimate(scores, coins, delta), tuple(scores.tolist()), tuple(coins.tolist()))


def _trained(
    train: Callable[[NDArray[np.bool_]], Model], score: Callable[[Model], ArrayLike], coins: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Scores `(m,)` of one run; the coins are handed out as a copy, so that nobody can bend them."""
    answer = score(train(coins.copy()))
    try:
        scores = np.asarray(answer, dtype=np.float64)
    except (TypeError, ValueError) as reason:
        raise InvalidArgument(
            f"score gave {type(answer).__name__}: expected {len(coins)} numbers ({reason})"
        ) from reason
    require(
        scores.shape == coins.shape,
        f"score gave shape {scores.shape}: expected ({len(coins)},), one for each canary whether in or not",
    )
    bad = int(np.isnan(scores).sum())
    require(bad == 0, f"score gave {bad} NaN of {len(scores)}: expected numbers; did the training diverge?")
    return scores


def _estimate(scores: NDArray[np.float64], coins: NDArray[np.bool_], delta: float) -> Estimate | None:
    """The Gaussian fit, where there is one."""
    enough = min(int(coins.sum()), int((~coins).sum())) >= 2
    if delta == 0 or not enough or not bool(np.isfinite(scores).all()):
        return None
    return gaussian_fit(scores[coins], scores[~coins], delta)
