"""A best guess of epsilon: two Gaussians through the scores. No bound."""

from __future__ import annotations

from math import inf, sqrt

import numpy as np
from numpy.typing import ArrayLike

from privfm.attacks.audit.gaussian import gaussian_epsilon
from privfm.attacks.audit.statements import Estimate
from privfm.checks import at_least, fraction, require

_NORMAL_975 = 1.959963984540054
"""97.5 % quantile of the standard normal: the interval is one of 95 %."""


def gaussian_fit(scores_in: ArrayLike, scores_out: ArrayLike, delta: float) -> Estimate:
    """Epsilon of the Gaussian mechanism whose scores lie as far apart: `mu = (mean_in - mean_out) / pooled deviation`.

    The interval is that of mu by its large-sample standard error `sqrt(1/a + 1/b + mu^2 / (2 (a + b - 2)))`.

    | case                              | epsilon  |
    |-----------------------------------|----------|
    | mean_in <= mean_out               | 0        |
    | no spread at all, different means | infinite |

    Args:
      scores_in: `(a,)` of canaries in, finite, at least 2.
      scores_out: `(b,)` of canaries out.
      delta: in (0, 1).

    Source: Dong, Roth, Su, "Gaussian differential privacy", 2022, theorem 1 (mu is a distance in deviations); standard
    error: Hedges, Olkin, "Statistical methods for meta-analysis", 1985, section 5.

    >>> import numpy as np
    >>> noise = np.random.default_rng(0).normal(size=(2, 5000))
    >>> round(gaussian_fit(noise[0] + 1, noise[1], 1e-5).epsilon, 1)
    4.3
    """
    fraction("delta", delta, one=False)
    inside, outside = _scores("scores_in", scores_in), _scores("scores_out", scores_out)
    a, b = len(inside), len(outside)
    pooled = sqrt((float(inside.var()) * a + float(outside.var()) * b) / (a + b - 2))
    distance = float(inside.mean() - outside.mean())
    if pooled > 0:
        mu = distance / pooled
        margin = _NORMAL_975 * sqrt(1 / a + 1 / b + mu * mu / (2 * (a + b - 2)))
    else:
        mu, margin = (inf if distance > 0 else 0.0), 0.0
    return Estimate(
        method="Gaussian fit",
        epsilon=gaussian_epsilon(max(0.0, mu), delta),
        low=gaussian_epsilon(max(0.0, mu - margin), delta),
        high=gaussian_epsilon(max(0.0, mu + margin), delta),
        delta=delta,
        assumes="scores in and out are Gaussian with one deviation, as for a sum in which everybody takes part",
    )


def _scores(name: str, scores: ArrayLike) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Scores `(n,)`, finite, two or more."""
    values = np.asarray(scores, dtype=np.float64)
    require(values.ndim == 1, f"{name} {values.shape}: expected (n,)")
    at_least(f"number of {name}", len(values), 2)
    require(bool(np.isfinite(values).all()), f"{name}: expected finite numbers, for a mean and a deviation")
    return values
