"""What an update says of a client's data as a whole: its labels, and properties that nobody trains for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final, final

import numpy as np
from torch import Tensor

from privfm.attacks.reconstruction.labels import Labels
from privfm.blocks import column_blocks
from privfm.checks import at_least, positive, require
from privfm.contracts.membership import Array, Flags
from privfm.contracts.privacy import Spans
from privfm.contracts.reconstruction import Observation

_RESOLUTION: Final = 1000
"""Into how many parts the labels are counted where the number of examples was not declared: shares to a thousandth."""

_ITERATIONS: Final = 5000
"""Of the logistic regression; on standardised projections it needs tens."""

_SCALE: Final = 1e-12
"""Deviation of a projection, relative to its largest, below which it is constant and says nothing."""


def label_distribution(observation: Observation, labels: Labels | None = None) -> Array:
    """Shares of the labels behind an update, `(classes,)`, which sum to 1.

    Reads the classifier's head with `Labels`, whose two ways of counting are the estimate: how good it is depends on
    the model and on the share of one label in a batch (the table there). Judge it by `label_errors`, beside what is
    known without any update.

    | behind the update                        | shares                                                             |
    |------------------------------------------|--------------------------------------------------------------------|
    | `examples` declared                      | their counts over the number                                       |
    | not declared                             | as if of 1000 examples: the way of counting by `probabilities` is  |
    |                                          | one of shares (mean p - g), and `impact` has a limit for many.     |
    |                                          | Labels with a negative gradient get a thousandth at least          |
    | one example                              | its label                                                          |
    | sum or mean of n clients                 | of all of them together, by `impact`, which does not see scale     |

    Args:
      observation: of a client, or of a sum of clients.
      labels: how it is read; None: `Labels()`.

    Raises:
      InvalidArgument: the head was not sent, its gradient is zero, or see `Labels`.

    Source: see `Labels`; the shares are ours.
    """
    reader = Labels() if labels is None else labels
    told = observation if observation.declared.examples is not None else observation.told(examples=_RESOLUTION)
    found = reader(told)
    counted: tuple[int, ...] = found.labels or ()
    name = str(found.facts["head"])
    classes = len(dict(observation.model.named_parameters())[name])
    counts = np.bincount(np.array(counted, dtype=np.int64), minlength=classes).astype(np.float64)
    return np.asarray(counts / counts.sum())


@final
@dataclass(frozen=True)
class LabelErrors:
    """Total variation distances to the true shares, in [0, 1]: the share of examples given a wrong label.

    Attributes:
      attack: of what was read off the update.
      uniform: of equal shares: who knows nothing.
      population: of the shares in the population (public data, or all clients): who knows what everybody knows. An
        attack that is not below learned nothing of this client.
    """

    attack: float
    uniform: float
    population: float


def label_errors(found: Array, truth: Array, population: Array) -> LabelErrors:
    """How far shares are from the truth, beside two that need no update.

    Args:
      found: shares by the attack, `(classes,)`.
      truth: of the client.
      population: see `LabelErrors`.

    Raises:
      InvalidArgument: shapes differ, or something is no distribution.

    >>> errors = label_errors(np.array([0.9, 0.1]), np.array([1.0, 0.0]), np.array([0.7, 0.3]))
    >>> round(errors.attack, 3), errors.uniform, round(errors.population, 3)
    (0.1, 0.5, 0.3)
    """
    for name, shares in (("found", found), ("truth", truth), ("population", population)):
        fits = shares.ndim == 1 and shares.shape == truth.shape and bool((shares >= 0).all())
        require(
            fits and bool(abs(shares.sum() - 1) < 1e-6),
            f"{name} {shares.shape}: expected shares of {truth.shape} classes that sum to 1",
        )
    return LabelErrors(
        _apart(found, truth), _apart(np.full(len(truth), 1 / len(truth)), truth), _apart(population, truth)
    )


def _apart(one: Array, other: Array) -> float:
    return float(np.abs(one - other).sum() / 2)


@final
@dataclass(frozen=True)
class PropertyInference:
    """Tells from an update whether a property holds for the data behind it, having seen updates of both kinds.

    The attacker simulates clients on data of its own, with and without the property, at the model of the round, and
    fits a logistic regression to random projections of their updates. It needs data with the property and without, and
    the clients' way of training; the update it judges should come from a batch or client of the size it simulated.

    Args:
      components: random projections of an update, by Gaussian numbers; where no more columns count, none is made. They
        save time and cost accuracy: of 421 columns and 300 simulated clients 64, 200 and all columns gave an AUC of
        .85, .95 and .98. Better name the columns that matter.
      strength: inverse of the L2 penalty, scikit-learn's C and its default.
      coordinates: columns of the update that count, the head's or the adapters' say; None: all.
      seed: of the projections and of the folds.

    Source: Melis, Song, De Cristofaro, Shmatikov, "Exploiting unintended feature leakage in collaborative learning",
    IEEE S&P 2019 (passive property inference from shadow batches). They fit random forests to the gradients themselves;
    a linear classifier on projections is our choice, for few updates of many columns.
    """

    components: int = 512
    strength: float = 1.0
    coordinates: Spans | None = None
    seed: int = 0

    used = ("data with and without the property", "the model of the round", "how clients train", "a client's update")

    def __post_init__(self) -> None:
        at_least("components", self.components, 1)
        positive("strength", self.strength)
        at_least("seed", self.seed, 0)

    def fit(self, updates: Tensor, flags: Flags) -> PropertyClassifier:
        """Learns from simulated clients.

        Args:
          updates: `(k, d)`.
          flags: `(k,)`, whether the property held.

        Returns:
          What scores other updates.

        Raises:
          InvalidArgument: shapes do not fit, an update is not finite, fewer than two of a kind, or all updates equal.
        """
        self._require(updates, flags)
        seen = self.projected(updates)
        middle, spread = seen.mean(0), seen.std(0)
        require(float(spread.max()) > 0, "all updates are the same: nothing to learn from")
        spread[spread <= _SCALE * spread.max()] = np.inf  # a constant becomes 0
        model = self._model()
        model.fit((seen - middle) / spread, flags)
        return PropertyClassifier(self, updates.shape[1], middle, spread, model.coef_[0], float(model.intercept_[0]))

    def rehearse(self, updates: Tensor, flags: Flags, folds: int = 5) -> Array:
        """Scores of the simulated updates by classifiers that were not fitted to them, `(k,)`.

        What the attacker can know of its success beforehand: their AUC. Simulated updates that share examples make it
        too good.

        Raises:
          InvalidArgument: as `fit`, or fewer of a kind than folds.
        """
        from sklearn.model_selection import StratifiedKFold

        self._require(updates, flags)
        at_least("folds", folds, 2)
        fewest = int(min(flags.sum(), (~flags).sum()))
        require(folds <= fewest and fewest >= 3, f"folds={folds}: expected at most {fewest}, the updates of a kind")
        found = np.empty(len(updates))
        for some, others in StratifiedKFold(folds, shuffle=True, random_state=self.seed).split(flags, flags):
            found[others] = self.fit(updates[some], flags[some]).scores(updates[others])
        return found

    def projected(self, updates: Tensor) -> Array:
        """Random projections `(k, components)` of the columns that count; of no more than `components`, themselves.

        The matrix is drawn again from the seed for each block of columns: it is never held, and the same every time.

        Raises:
          InvalidArgument: spans lie outside of the update, or it is not finite there.
        """
        d = updates.shape[1]
        spans = ((0, d),) if self.coordinates is None else self.coordinates
        fits = bool(spans) and all(0 <= lo < hi <= d for lo, hi in spans)
        require(fits, f"coordinates={spans}: expected spans in [0, {d})")
        plain = sum(hi - lo for lo, hi in spans) <= self.components
        found: list[Array] = []
        for first, last in spans:
            for lo, hi in column_blocks(last - first):
                part = updates[:, first + lo : first + hi].detach().double().cpu().numpy()
                require(
                    bool(np.isfinite(part).all()), "an update is not finite; name the columns that are in coordinates"
                )
                if plain:
                    found.append(part)
                    continue
                generator = np.random.default_rng((self.seed, first + lo))
                product = part @ generator.standard_normal((part.shape[1], self.components))
                found = [found[0] + product] if found else [product]
        return np.concatenate(found, axis=1)

    def _model(self) -> Any:
        from sklearn.linear_model import LogisticRegression

        return LogisticRegression(C=self.strength, max_iter=_ITERATIONS, random_state=self.seed)

    @staticmethod
    def _require(updates: Tensor, flags: Flags) -> None:
        require(updates.dim() == 2, f"updates {tuple(updates.shape)}: expected (k, d)")
        require(flags.shape == (len(updates),), f"flags {flags.shape}: expected ({len(updates)},), one an update")
        require(flags.dtype == np.bool_, f"flags have type {flags.dtype}: expected bool")
        least = int(min(flags.sum(), (~flags).sum()))
        require(least >= 2, f"{least} updates of one kind: expected at least 2 with the property and 2 without")


@final
@dataclass(frozen=True)
class PropertyClassifier:
    """A fitted `PropertyInference`.

    Attributes:
      settings: what it was fitted with.
      d: width of an update.
      middle, spread: of the projections, `(components,)`.
      weights: of the standardised projections.
      offset: of the log-odds.
    """

    settings: PropertyInference
    d: int
    middle: Array = field(repr=False)
    spread: Array = field(repr=False)
    weights: Array = field(repr=False)
    offset: float

    def scores(self, updates: Tensor) -> Array:
        """Log-odds that the property holds, `(k,)`, at the share of it among the simulated clients.

        Over several rounds of one client add up their log-odds less the offset; rounds are not independent, so that the
        sum ranks and is no probability.

        Raises:
          InvalidArgument: another width, or not finite.
        """
        fits = updates.dim() == 2 and updates.shape[1] == self.d
        require(fits, f"updates {tuple(updates.shape)}: expected (k, {self.d})")
        seen = (self.settings.projected(updates) - self.middle) / self.spread
        return np.asarray(seen @ self.weights + self.offset)
