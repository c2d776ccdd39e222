"""No shadow models: what the target's signal would be, were the example no member, learnt from others like it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, final

import numpy as np

from privfm.attacks.membership.places import part_of_step
from privfm.attacks.membership.sides import by_query
from privfm.checks import at_least, one_of, require
from privfm.contracts.membership import Array, MembershipAttack, Signals

_LEVELS = (0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.98)
"""Quantiles that are predicted for `rank`: quartiles and, denser, the upper tail, where few false positives are told.
A choice of this project; the paper trains one predictor per rate of false positives."""

_LEAF = 20
"""Examples a leaf of a tree averages at least: scikit-learn's default."""

_LEAVES = 4
"""Of a tree: pairs of features may act together. With 50 trees the best of nine settings tried on a made-up signal of
known distribution (population 400, 1,000 and 4,000; seeds 100 to 102): scores of non-members spread 1.09, 1.06 and 1.01
deviations wide, where scikit-learn's defaults (31 leaves, 100 trees) learn noise: 1.45, 1.58 and 1.21."""

_FOLDS = 5
"""Parts of the population that predict each other's deviations: scikit-learn's default for cross-validation."""

_ROUNDING = float(np.finfo(np.float32).eps)
"""Signals come from float32 logits: a deviation below their last digit is how they were rounded."""


@final
@dataclass(frozen=True)
class QuantileRegression:
    """Judges a signal by the distribution that a regressor predicts for a non-member with the example's features.

    The regressor is fitted to the target's own signal on the population, `Signals.population`, so nothing has to be
    trained but it, once for every attacked model. It needs features of the examples beside their signals (embeddings,
    length, loss of the base model, ...), which belong to the data and not to a configuration: `on` takes them and gives
    the attack. (Hence this is no MembershipAttack itself: what a configuration can name holds no arrays.)

    | score | of a signal s with features v |
    |---|---|
    | standardised | `(s - mean(v)) / deviation(v)` |
    | rank | number of predicted quantiles that s reaches, and the part of the way to the next (as RMIA's tie-break) |

    Predictors are gradient-boosted trees. The mean is fitted by squares; the deviation to squared distances from
    predictions of folds that did not see the example (its own would be too small), by the gamma deviance, which is the
    Gaussian likelihood of a deviation once the mean is known. The variance predicted is at least that of float32's
    rounding of the signals. Quantiles are fitted by the pinball loss, one predictor each, and sorted where they cross.

    Args:
      score: see above. The rank assumes no form of the distribution, but beyond the last level it knows only the order.
      levels: of the quantiles, rising, for `rank` alone. A level is refused where the population has no example beyond
        it to learn from.
      iterations: trees a predictor.
      seed: of the folds and the trees.

    Raises:
      InvalidArgument: levels are not rising or not in (0, 1).

    Cost: about `7 * iterations` trees on the population a model for `standardised`, `len(levels) * iterations` for
      `rank`.

    Source: Bertran et al., "Scalable membership inference attacks via quantile regression", 2023 (neural predictors of
      a quantile, or of a Gaussian's mean and deviation); Chernozhukov, Fernandez-Val, Galichon, "Quantile and
      probability curves without crossing", 2010, for sorting.
    """

    score: Literal["standardised", "rank"] = "standardised"
    levels: tuple[float, ...] = _LEVELS
    iterations: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        one_of("score", self.score, ("standardised", "rank"))
        at_least("iterations", self.iterations, 1)
        at_least("seed", self.seed, 0)
        rising = all(low < high for low, high in zip(self.levels, self.levels[1:], strict=False))
        inside = len(self.levels) > 0 and self.levels[0] > 0 and self.levels[-1] < 1
        require(rising and inside, f"levels={self.levels!r}: expected rising numbers in (0, 1)")

    def on(self, features: Array, population: Array) -> MembershipAttack:
        """The attack on examples with these features.

        Args:
          features: of the judged examples, `(n, k)`.
          population: of the examples of `Signals.population`, `(z, k)`.

        Raises:
          InvalidArgument: shapes do not fit, a feature is not finite, or the population is too small to learn from.
        """
        return _OnFeatures(self, features, population)


@final
@dataclass(frozen=True, eq=False)
class _OnFeatures(MembershipAttack):
    """Quantile regression on examples whose features are known. Several queries of an example are averaged."""

    settings: QuantileRegression
    features: Array = field(repr=False)
    population: Array = field(repr=False)

    used = ("signal of the target", "features of the examples", "population that the target was not trained on")

    def __post_init__(self) -> None:
        features, population = self.features, self.population
        fits = features.ndim == population.ndim == 2 and features.shape[1] == population.shape[1] > 0
        shapes = f"features {features.shape}, population {population.shape}"
        require(fits, f"{shapes}: expected (n, k) and (z, k), k features of each")
        finite = bool(np.isfinite(features).all() and np.isfinite(population).all())
        require(finite, "a feature is not finite; leave it out, or put a number there")
        least = 2 * _LEAF * _FOLDS  # a tree of a fold's examples can then part them at least once
        if self.settings.score == "rank":
            ends = (1 - self.settings.levels[-1], self.settings.levels[0])
            least = max(2 * _LEAF, *(int(np.ceil(1 / end)) for end in ends))
        require(
            len(population) >= least,
            f"population of {len(population)}: expected at least {least} for score={self.settings.score!r} and its "
            "levels; give more, or take CalibratedByBase",
        )

    def refusal(self, target: Signals, shadows: Signals | None) -> str:
        if target.population is None:
            return "needs Signals.population of the target: examples it was not trained on"
        given = (target.examples, target.population.shape[1])
        wanted = (len(self.features), len(self.population))
        return "" if given == wanted else f"features are of {wanted} examples and population, signals of {given}"

    def scores(self, target: Signals, shadows: Signals | None) -> Array:
        assert target.population is not None  # refused before
        signal = by_query(target.values)[0].mean(axis=1)
        others = by_query(target.population)[0].mean(axis=1)
        return (
            self._standardised(signal, others) if self.settings.score == "standardised" else self._rank(signal, others)
        )

    def _standardised(self, signal: Array, others: Array) -> Array:
        from sklearn.model_selection import KFold, cross_val_predict

        mean, spread = self._trees(loss="squared_error"), self._trees(loss="gamma")
        folds = KFold(_FOLDS, shuffle=True, random_state=self.settings.seed)
        least = (_ROUNDING * max(1.0, float(np.abs(others).max()))) ** 2
        squares = (others - cross_val_predict(mean, self.population, others, cv=folds)) ** 2
        spread.fit(self.population, np.maximum(squares, least))
        deviation = np.sqrt(np.maximum(spread.predict(self.features), least))
        return np.asarray((signal - mean.fit(self.population, others).predict(self.features)) / deviation)

    def _rank(self, signal: Array, others: Array) -> Array:
        predictors = (self._trees(loss="quantile", quantile=level) for level in self.settings.levels)
        curves = [each.fit(self.population, others).predict(self.features) for each in predictors]
        return _places(np.sort(np.stack(curves, axis=1), axis=1), signal)

    def _trees(self, **loss: Any) -> Any:
        from sklearn.ensemble import HistGradientBoostingRegressor

        return HistGradientBoostingRegressor(
            **loss,
            max_iter=self.settings.iterations,
            max_leaf_nodes=_LEAVES,
            min_samples_leaf=_LEAF,
            early_stopping=False,
            random_state=self.settings.seed,
        )


def _places(quantiles: Array, signal: Array) -> Array:
    """How many of its own rising quantiles `(n, levels)` each signal reaches, and how far towards the next it is."""
    ends = np.pad(quantiles, ((0, 0), (1, 1)), constant_values=((0, 0), (-np.inf, np.inf)))
    reached = (quantiles <= signal[:, None]).sum(axis=1)
    rows = np.arange(len(signal))
    return np.asarray(reached + part_of_step(signal, ends[rows, reached], ends[rows, reached + 1]))
