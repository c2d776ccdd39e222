"""The skew-normal distribution: its fit by maximum likelihood, and its tail to any depth."""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, log, pi, sqrt
from typing import Any, Final, Self, final

import numpy as np
from numpy.typing import NDArray

from privfm.checks import require

Array = NDArray[np.float64]

_LARGEST_SKEWNESS: Final = 0.9952
"""Skewness of the half-normal distribution, (4 - pi) / 2 * (2 / (pi - 2))^1.5: the family has none beyond it."""

_STEEPEST: Final = 30.0
"""Largest |shape| of a fit. The likelihood of a small sample may grow without end in the shape (Azzalini, Capitanio,
1999, section 5); at 30 the family is within 0.011 of the half-normal it tends to."""


@final
@dataclass(frozen=True)
class SkewNormal:
    """Density `2 / scale * phi(z) * Phi(shape z)` at `x`, with `z = (x - location) / scale`.

    Source: Azzalini, "A class of distributions which includes the normal ones", 1985.
    """

    location: float
    scale: float
    shape: float

    @classmethod
    def fitted(cls, values: Array) -> Self:
        """The most likely one of `values (m,)`, with `|shape| <= 30`.

        Args:
          values: at least 3 of them that are not all the same.
        """
        from scipy.optimize import minimize

        centre, spread = float(values.mean()), float(values.std())
        require(len(values) >= 3 and spread > 0, "a skew-normal fit needs at least 3 values that are not all the same")
        standard = (values - centre) / spread
        bounds = [(None, None), (-10.0, 10.0), (-_STEEPEST, _STEEPEST)]
        found: Any = minimize(
            _minus_log_likelihood, _by_moments(standard), (standard,), "L-BFGS-B", jac=True, bounds=bounds
        )
        location, log_scale, shape = map(float, found.x)
        return cls(centre + spread * location, spread * exp(log_scale), shape)

    def log_cdf(self, value: float) -> float:
        """Natural logarithm of Pr[X <= value].

        Left of the bulk by integrating the density against its own value there, so that no depth underflows: the
        density is log-concave, and falls at least as fast as its slope at `value` says.
        """
        from scipy.integrate import quad
        from scipy.stats import skewnorm

        z = (value - self.location) / self.scale
        slope = float(self._slope(z))
        if slope < 1:
            return float(skewnorm.logcdf(z, self.shape))
        here = self._log_density(z)
        area, _ = quad(lambda step: exp(self._log_density(z - step / slope) - here), 0, np.inf)
        return float(here + log(area / slope))

    def misfit(self, values: Array) -> float:
        """Kolmogorov-Smirnov distance to the values."""
        from scipy.stats import ks_1samp, skewnorm

        found: Any = ks_1samp(values, skewnorm(self.shape, self.location, self.scale).cdf, method="asymp")
        return float(found.statistic)

    def _log_density(self, z: float) -> float:
        """Of the standardised variable."""
        from scipy.special import log_ndtr

        return log(2) - 0.5 * log(2 * pi) - 0.5 * z * z + float(log_ndtr(self.shape * z))

    def _slope(self, z: float) -> Any:
        """Derivative of the log-density."""
        return -z + self.shape * _hazard(np.array(self.shape * z))


def _hazard(u: Array) -> Array:
    """phi(u) / Phi(u), without underflow."""
    from scipy.special import log_ndtr

    found: Array = np.exp(-0.5 * u * u - 0.5 * log(2 * pi) - log_ndtr(u))
    return found


def _minus_log_likelihood(parameters: Array, values: Array) -> tuple[float, Array]:
    """Mean of minus the log-density, and its gradient by location, log scale and shape."""
    from scipy.special import log_ndtr

    location, log_scale, shape = parameters
    scale = exp(log_scale)
    z = (values - location) / scale
    hazard = _hazard(shape * z)
    fall = z - shape * hazard  # minus the derivative of the log-density
    value = float(np.mean(0.5 * z * z - log_ndtr(shape * z))) + log_scale
    gradient = np.array([-fall.mean() / scale, 1 - (fall * z).mean(), -(hazard * z).mean()])
    return value, gradient


def _by_moments(standard: Array) -> Array:
    """Location, log scale and shape of the same mean, variance and (cut to the family's range) skewness."""
    skewness = float(np.clip((standard**3).mean(), -0.9 * _LARGEST_SKEWNESS, 0.9 * _LARGEST_SKEWNESS))
    ratio = abs(2 * skewness / (4 - pi)) ** (2 / 3)
    mean = np.sign(skewness) * sqrt(ratio / (1 + ratio))  # of the standardised variable: delta sqrt(2 / pi)
    share = float(mean) * sqrt(pi / 2)
    scale = 1 / sqrt(1 - float(mean) ** 2)
    # Mean and spread with shape 0 are a stationary point of every likelihood: the search must not start there.
    shape = share / sqrt(1 - share * share) or 0.1
    return np.array([-scale * float(mean), log(scale), shape])
