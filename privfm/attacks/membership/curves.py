"""How well scores tell members from others: ROC, AUC, the true-positive rate where few are accused wrongly.

Intervals are bootstrapped over *examples*: when several models were attacked on the same examples, an example's scores
come and go together. They say how the result would vary with other examples of the same kind, not with other models.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil, floor
from typing import final

import numpy as np
from numpy.typing import NDArray

from privfm.attacks.rates import lower_rate, upper_rate
from privfm.checks import at_least, fraction, require
from privfm.contracts.membership import Array, Flags, Scored

CONFIDENCE = 0.95
"""Of every interval here."""

_FALSE_ACCUSATIONS = 10
"""Non-members that must be expected above a threshold before a rate there is printed: 1,000 scores of non-members for
1 % and 10,000 for 0.1 %. With 10 the realised rate lies within a factor of two of the wanted (Poisson: 5 to 18)."""

_LEAST_RESAMPLES = 100
"""Under 95 % two or three resamples lie beyond each end; with fewer the ends are noise."""

_DRAWN = 1 << 20
"""Numbers that are drawn at a time: many small draws are slow, and all resamples at once are large."""

_ROUNDING = 1e-9
"""Added to fpr * n before it is rounded down: 0.29 * 100 is 28.999999999999996 in float64, and means 29."""


@final
@dataclass(frozen=True)
class Curve:
    """Every pair of rates that a threshold reaches, from (0, 0) to (1, 1); between two of them there is no threshold.

    Attributes:
      fpr: `(points,)`, rising.
      tpr: `(points,)`, rising.
    """

    fpr: Array
    tpr: Array


@final
@dataclass(frozen=True)
class Interval:
    """What was found, and the 95 % interval around it."""

    value: float
    low: float
    high: float


@final
@dataclass(frozen=True)
class Rate:
    """The true-positive rate at a false-positive rate.

    Attributes:
      fpr: the largest that is allowed.
      tpr: what is reached; None where there are too few non-members to say.
      needs: scores of non-members that are needed.
      has: scores of non-members that there are.
    """

    fpr: float
    tpr: Interval | None
    needs: int
    has: int

    @property
    def missing(self) -> str:
        """`needs 10,000, has 500` where there is no number, else nothing."""
        return f"needs {self.needs:,}, has {self.has:,}" if self.tpr is None else ""


@final
@dataclass(frozen=True)
class Judgement:
    """What an attack's scores are worth.

    Attributes:
      auc: area under the ROC curve: how often a member scores above another, ties counted half.
      advantage: true less false positives at a threshold that was chosen on other examples.
      rates: at low false-positive rates.
      members: scores of members, of all models together.
      others: scores of non-members.
      models: that were attacked.
      examples: on which.
      resamples: behind the intervals.
    """

    auc: Interval
    advantage: Interval
    rates: tuple[Rate, ...]
    members: int
    others: int
    models: int
    examples: int
    resamples: int


def roc(scored: Scored) -> Curve:
    """The ROC curve of all scores together, a point for each distinct score.

    >>> curve = roc(Scored(np.array([3.0, 2.0, 2.0, 1.0]), np.array([True, True, False, False])))
    >>> curve.fpr.tolist(), curve.tpr.tolist()
    ([0.0, 0.0, 0.5, 1.0], [0.0, 0.5, 1.0, 1.0])
    """
    order = np.argsort(-scored.scores, axis=None, kind="stable")
    scores, members = scored.scores.ravel()[order], scored.members.ravel()[order]
    last = np.append(scores[1:] != scores[:-1], True)
    right, wrong = np.cumsum(members)[last], np.cumsum(~members)[last]
    return Curve(np.append(0.0, wrong / wrong[-1]), np.append(0.0, right / right[-1]))


def auc(scored: Scored) -> float:
    """Probability that a member scores above a non-member, ties counted half (Mann-Whitney).

    >>> auc(Scored(np.array([3.0, 2.0, 2.0, 1.0]), np.array([True, True, False, False])))
    0.875
    """
    ranks = _Ranks(scored)
    return ranks.measure(np.ones(ranks.examples), ())[0]


def auc_interval(scored: Scored, generator: np.random.Generator, resamples: int = 1000) -> Interval:
    """The area with its 95 % interval by bootstrap over examples; see `judge`.

    Raises:
      InvalidArgument: fewer than 100 resamples.
    """
    at_least("resamples", resamples, _LEAST_RESAMPLES)
    ranks = _Ranks(scored)
    drawn = np.array([ranks.measure(weights, ())[0] for weights in ranks.draws(generator, resamples)])
    return ranks.area(ranks.measure(np.ones(ranks.examples), ())[0], drawn)


def tpr_at_fpr(scored: Scored, fpr: float) -> float:
    """The largest true-positive rate of a threshold whose false-positive rate is at most `fpr`, in [0, 1).

    Raises:
      InvalidArgument: `fpr` is outside.
    """
    fraction("fpr", fpr, zero=True, one=False)
    ranks = _Ranks(scored)
    return float(ranks.measure(np.ones(ranks.examples), (fpr,))[1][0])


def threshold_at(scored: Scored, fpr: float) -> float:
    """The lowest score that must be *exceeded* so that at most `fpr` of the non-members do."""
    fraction("fpr", fpr, zero=True, one=False)
    others = scored.scores[~scored.members]
    place = _allowed(fpr, len(others))
    return float(np.partition(others, len(others) - 1 - place)[len(others) - 1 - place])


def tpr_band(scored: Scored, levels: Sequence[float], generator: np.random.Generator, resamples: int = 1000) -> Array:
    """`(3, levels)`: the true-positive rate at each false-positive rate, and the ends of its 95 % interval.

    Args:
      scored: the scores.
      levels: false-positive rates in [0, 1).
      generator: of the resamples.
      resamples: at least 100.

    Raises:
      InvalidArgument: a level is outside, or resamples are too few.
    """
    at_least("resamples", resamples, _LEAST_RESAMPLES)
    for level in levels:
        fraction("level", level, zero=True, one=False)
    ranks = _Ranks(scored)
    values = ranks.measure(np.ones(ranks.examples), levels)[1]
    drawn = np.stack([ranks.measure(weights, levels)[1] for weights in ranks.draws(generator, resamples)])
    found = [ranks.rate(value, column) for value, column in zip(values.tolist(), drawn.T, strict=True)]
    return np.array([[one.value for one in found], [one.low for one in found], [one.high for one in found]])


def advantage(scored: Scored, generator: np.random.Generator, resamples: int = 1000) -> Interval:
    """True-positive less false-positive rate, at a threshold that was chosen on other examples.

    The best threshold *of the same scores* looks good even on random labels. So examples are dealt into two halves;
    each half is judged at the best threshold of the other. The interval is for these two thresholds.

    Raises:
      InvalidArgument: fewer than two examples are members, or fewer than two are not; resamples are too few.

    Source: Yeom et al., "Privacy risk in machine learning", 2018 (membership advantage).
    """
    at_least("resamples", resamples, _LEAST_RESAMPLES)
    ranks = _Ranks(scored)
    counts = _cross_fitted(ranks, generator)
    return difference_of_rates(counts, [counts @ weights for weights in ranks.draws(generator, resamples)])


def judge(
    scored: Scored,
    generator: np.random.Generator,
    resamples: int = 1000,
    levels: Sequence[float] = (0.01, 0.001),
) -> Judgement:
    """AUC, advantage and rates, each with a 95 % percentile interval by bootstrap over examples.

    | case | what is said |
    |---|---|
    | fewer than 10 / fpr scores of non-members | no rate, but `needs 10,000, has 500` |
    | a rate of 0 or 1 in every resample | the interval is that of Clopper-Pearson over examples |
    | an AUC of 0 or 1 in every resample | the same, over pairs of which no two share an example |
    | an advantage of 1 in every resample | at least what these intervals of both rates leave |

    Args:
      scored: `(n,)` of one model or `(models, n)` of several.
      generator: of resamples and halves.
      resamples: at least 100.
      levels: false-positive rates in (0, 1).

    Cost: a sort, and a pass over the scores for each resample (1,000 of 64 x 1,000 scores: about a second).

    Raises:
      InvalidArgument: a level or the resamples are out of range, or there are fewer than two members or others.
    """
    at_least("resamples", resamples, _LEAST_RESAMPLES)
    for level in levels:
        fraction("level", level, one=False)
    ranks = _Ranks(scored)
    area, rates = ranks.measure(np.ones(ranks.examples), levels)
    counts = _cross_fitted(ranks, generator)
    drawn = [(*ranks.measure(one, levels), counts @ one) for one in ranks.draws(generator, resamples)]
    has = int((~scored.members).sum())
    found = []
    for number, level in enumerate(levels):
        needs = ceil(_FALSE_ACCUSATIONS / level - _ROUNDING)
        interval = ranks.rate(float(rates[number]), np.array([one[1][number] for one in drawn]))
        found.append(Rate(level, interval if has >= needs else None, needs, has))
    return Judgement(
        auc=ranks.area(area, np.array([one[0] for one in drawn])),
        advantage=difference_of_rates(counts, [one[2] for one in drawn]),
        rates=tuple(found),
        members=int(scored.members.sum()),
        others=has,
        models=1 if scored.scores.ndim == 1 else len(scored.scores),
        examples=ranks.examples,
        resamples=resamples,
    )


def clopper_pearson(successes: int, trials: int, confidence: float = CONFIDENCE) -> Interval:
    """The exact interval of a share, for trials that are independent of each other.

    >>> clopper_pearson(0, 2995).high  # doctest: +ELLIPSIS
    0.00123...

    Source: Clopper and Pearson, "The use of confidence or fiducial limits", 1934.
    """
    tail = (1 - confidence) / 2
    low, high = lower_rate(successes, trials, tail), upper_rate(successes, trials, tail)
    return Interval(successes / trials, low, high)


def percentiles(value: float, drawn: Array, examples: int) -> Interval:
    """The percentile interval of a value that was resampled over so many examples.

    Resamples of n examples vary less than samples do, by sqrt((n-1)/n), and less than Student's t allows for: the
    percentiles lie further out by both (2.0 % instead of 2.5 % at 40 examples).

    Source: Hesterberg, "What teachers should know about the bootstrap", 2015 (expanded percentile interval).
    """
    from scipy.special import ndtr, stdtrit

    at_least("examples", examples, 2)
    tail = float(ndtr(np.sqrt(examples / (examples - 1)) * stdtrit(examples - 1, (1 - CONFIDENCE) / 2)))
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return Interval(value, float(low), float(high))


def share_interval(value: float, drawn: Array, examples: int, trials: int) -> Interval:
    """The percentile interval of a share; if it is 0 or 1 in every resample, that of so many independent trials.

    A share of 0 is 0 however one resamples, which does not prove that it is 0. With the scores of an example averaged,
    Clopper-Pearson over examples is too wide rather than too narrow.
    """
    if value not in {0.0, 1.0} or drawn.min() < drawn.max():
        return percentiles(value, drawn, examples)
    return clopper_pearson(round(value) * trials, trials)


def example_weights(members: Flags, generator: np.random.Generator, resamples: int) -> Iterator[Array]:
    """How often each example `(n,)` occurs in each resample; those without a member or without another are redrawn.

    Args:
      members: `(models, n)`.
      generator: of the draws.
      resamples: how many.
    """
    n = members.shape[1]
    inside, outside = members.any(axis=0), ~members.all(axis=0)
    made = 0
    while made < resamples:
        for row in generator.integers(0, n, (min(resamples - made, max(1, _DRAWN // n)), n)):
            weights = np.bincount(row, minlength=n)
            if weights[inside].any() and weights[outside].any():
                made += 1
                yield weights.astype(np.float64)


@final
class _Ranks:
    """Scores, sorted once: any weighting of the examples is then measured by running sums.

    Non-members stand in falling order. A threshold lies just above one of them, so that it is told by how many of them
    are over it, and the members over it are counted beforehand. Ties need no more: a threshold is never between equals.
    """

    def __init__(self, scored: Scored) -> None:
        self.scores, self.members = np.atleast_2d(scored.scores), np.atleast_2d(scored.members)
        self.examples = self.scores.shape[1]
        examples = np.broadcast_to(np.arange(self.examples), self.scores.shape)
        self._own, own = _falling(self.scores[self.members], examples[self.members])
        self._other, other = _falling(self.scores[~self.members], examples[~self.members])
        self._above = _count_above(own, other)  # members over each non-member
        self._over = _count_above(other, own)  # non-members over each member
        self._not_under = len(other) - np.searchsorted(other[::-1], own, side="left")

    def measure(self, weights: Array, levels: Sequence[float]) -> tuple[float, Array]:
        """AUC, and true-positive rates at the levels, with the examples weighted by whole numbers `(n,)`."""
        own = weights[self._own]
        right, wrong = _running(own), _running(weights[self._other])
        lost = (wrong[self._over] + wrong[self._not_under]) / 2
        area = 1 - float(own @ lost) / float(right[-1] * wrong[-1])
        allowed = [_allowed(level, wrong[-1]) for level in levels]
        # The first non-member that may not be accused: the threshold is its score.
        first = np.searchsorted(wrong, allowed, side="right") - 1
        return area, np.asarray(right[self._above[first]] / right[-1])

    def draws(self, generator: np.random.Generator, resamples: int) -> Iterator[Array]:
        """Weights of the resamples."""
        return example_weights(self.members, generator, resamples)

    def rate(self, value: float, drawn: Array) -> Interval:
        """Of a share of the members."""
        return share_interval(value, drawn, self.examples, int(self.members.any(axis=0).sum()))

    def area(self, value: float, drawn: Array) -> Interval:
        """Of the AUC, which is a share of pairs; of those without a common example there are this many."""
        inside, outside = int(self.members.any(axis=0).sum()), int((~self.members.all(axis=0)).sum())
        return share_interval(value, drawn, self.examples, max(1, min(inside, outside, self.examples // 2)))


def _cross_fitted(ranks: _Ranks, generator: np.random.Generator) -> Array:
    """Counts of accusations in which each half of the examples has the best threshold of the other half."""
    inside = ranks.members.sum(axis=0)
    enough = int((inside > 0).sum()) >= 2 and int((inside < len(ranks.members)).sum()) >= 2
    require(enough, "members: expected two examples or more that are, and two that are not, to choose a threshold on")
    # Dealt in the order of how often they are members, so that both halves have members and others.
    order = np.lexsort((generator.random(ranks.examples), inside))
    half = np.zeros(ranks.examples, dtype=bool)
    half[order[::2]] = True
    first, second = (_best_threshold(ranks.scores[:, part], ranks.members[:, part]) for part in (~half, half))
    return accusation_counts(ranks.scores >= np.where(half, first, second), ranks.members)


def accusation_counts(accused: Flags, members: Flags) -> Array:
    """`(4, n)`: how many models accuse each example rightly, have seen it, accuse it wrongly, have not seen it."""
    parts = (accused & members, members, accused & ~members, ~members)
    return np.stack([part.sum(axis=0) for part in parts]).astype(np.float64)


def difference_of_rates(counts: Array, drawn: Sequence[Array]) -> Interval:
    """True less false positives, of counts `(4, n)` and of their sums `(4,)` in each resample."""

    def difference(sums: Array) -> Array:
        return np.asarray(sums[0] / sums[1] - sums[2] / sums[3])

    value, found = float(difference(counts.sum(axis=1))), difference(np.stack(drawn, axis=1))
    if value < 1 or found.min() < 1:
        return percentiles(value, found, counts.shape[1])
    inside, outside = int((counts[1] > 0).sum()), int((counts[3] > 0).sum())
    return Interval(1.0, clopper_pearson(inside, inside).low - clopper_pearson(0, outside).high, 1.0)


def _best_threshold(scores: Array, members: Flags) -> float:
    """The lowest accused score at which true less false positives are largest."""
    order = np.argsort(-scores, axis=None, kind="stable")
    flat, truth = scores.ravel()[order], members.ravel()[order]
    last = np.append(flat[1:] != flat[:-1], True)
    gain = np.cumsum(truth) / truth.sum() - np.cumsum(~truth) / (~truth).sum()
    return float(flat[last][np.argmax(gain[last])])


def _running(weights: Array) -> Array:
    """Sums of the first 0, 1, ... weights."""
    sums = np.empty(len(weights) + 1)
    sums[0] = 0.0
    np.cumsum(weights, out=sums[1:])
    return sums


def _falling(scores: Array, examples: NDArray[np.int64]) -> tuple[NDArray[np.int64], Array]:
    """Examples and scores, the highest score first."""
    order = np.argsort(-scores, kind="stable")
    return examples[order], scores[order]


def _count_above(falling: Array, scores: Array) -> NDArray[np.intp]:
    """How many of the falling values lie above each score."""
    return np.asarray(len(falling) - np.searchsorted(falling[::-1], scores, side="right"))


def _allowed(fpr: float, others: float) -> int:
    """Non-members that may be accused: with a rate under 1 never all."""
    return min(floor(fpr * others + _ROUNDING), int(others) - 1)
