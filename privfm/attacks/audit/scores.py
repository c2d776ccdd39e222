"""The score with which a canary's auditor loses nothing: the likelihood ratio of in against out."""

from __future__ import annotations

from math import log, log1p

import numpy as np
from numpy.typing import ArrayLike, NDArray

from privfm.checks import fraction, positive, require


def sampled_gaussian_score(values: ArrayLike, noise_multiplier: float, sample_rate: float) -> NDArray[np.float64]:
    """Log likelihood ratio `(m,)` of canaries that were in a Poisson-sampled Gaussian run against out.

    `sum_t log(1 - q + q exp((y_t - 1/2) / z^2))`: no test of in against out is better at any error (Neyman, Pearson).
    With q = 1 it is the plain sum `sum_t (y_t - 1/2) / z^2`.

    Args:
      values: `(T, m)`, each canary's trace in each release in units of the clip: 1 where it was sampled, plus noise of
        standard deviation z.
      noise_multiplier: z.
      sample_rate: q in (0, 1].

    Raises:
      InvalidArgument: other shapes, values that are not finite.

    Source: Mironov, Talwar, Zhang, "Renyi differential privacy of the sampled Gaussian mechanism", 2019, section 3.

    >>> sampled_gaussian_score([[1.0, 0.0], [1.0, 0.0]], 1.0, 1.0).tolist()
    [1.0, -1.0]
    """
    traces = np.asarray(values, dtype=np.float64)
    positive("noise_multiplier", noise_multiplier)
    fraction("sample_rate", sample_rate)
    require(traces.ndim == 2, f"values {traces.shape}: expected (rounds, canaries)")
    require(bool(np.isfinite(traces).all()), "values: expected finite numbers; a trace that overflowed has no score")
    evidence = (traces - 0.5) / noise_multiplier**2
    if sample_rate == 1:
        return np.asarray(evidence.sum(axis=0))
    # exp() of a large trace overflows; in logarithms nothing does.
    return np.asarray(np.logaddexp(log1p(-sample_rate), log(sample_rate) + evidence).sum(axis=0))
