"""What accusations at a fixed threshold are worth: one that was not chosen on the scores that are judged.

A rate read off the ROC curve of the attacked model is optimistic: nobody who attacks it knows which of its scores are
non-members'. An attacker takes the threshold from models of his own; what it then gives is measured here, with the
share of accusations that are right when members are as rare as they would be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np

from privfm.attacks.membership.curves import (
    CONFIDENCE,
    Interval,
    accusation_counts,
    clopper_pearson,
    example_weights,
    percentiles,
    share_interval,
    threshold_at,
)
from privfm.checks import at_least, fraction, require
from privfm.contracts.membership import Array, Scored

PRIORS = (0.01, 0.1)
"""Shares of members among those who are asked for ("Revisiting LiRA": 1 to 10 %; balanced sets have 50 %)."""


@final
@dataclass(frozen=True)
class Accusations:
    """Rates at a threshold that was fixed beforehand.

    Attributes:
      tpr: share of the members that are accused.
      fpr: share of the others that are accused.
      precision: by prior, the share of accusations that are right (positive predictive value); None where nobody is
        accused.
      method: how the intervals were made.
    """

    tpr: Interval
    fpr: Interval
    precision: dict[float, Interval | None]
    method: str


def at_threshold(target: Scored, threshold: float, priors: Sequence[float] = PRIORS) -> Accusations:
    """Rates of one model's scores above a threshold that somebody fixed without them; exact intervals.

    Both rates have Clopper-Pearson intervals of 95 %. That of the precision is made of two of 97.5 %, so that it holds
    with 95 % as well.

    Args:
      target: scores `(n,)` of one model.
      threshold: scores *above* it are accused, for instance `threshold_at(shadows, 0.001)`.
      priors: shares of members, in (0, 1).

    Raises:
      InvalidArgument: several models (their scores of one example are dependent: `leave_one_out`), or a prior is
        outside.
    """
    require(target.scores.ndim == 1, f"scores {target.scores.shape}: expected (n,); for several use leave_one_out")
    _check(priors)
    accused = target.scores > threshold
    right, members = int((accused & target.members).sum()), int(target.members.sum())
    wrong, others = int((accused & ~target.members).sum()), int((~target.members).sum())
    tpr, fpr = clopper_pearson(right, members), clopper_pearson(wrong, others)
    half = (1 + CONFIDENCE) / 2
    wide_tpr, wide_fpr = clopper_pearson(right, members, half), clopper_pearson(wrong, others, half)
    found: dict[float, Interval | None] = {}
    for prior in priors:
        value, low, high = (
            float(_precision(np.array(one), np.array(other), prior))
            for one, other in ((tpr.value, fpr.value), (wide_tpr.low, wide_fpr.high), (wide_tpr.high, wide_fpr.low))
        )
        found[prior] = Interval(value, low, high) if right + wrong else None
    return Accusations(tpr, fpr, found, "Clopper-Pearson")


def leave_one_out(
    scored: Scored,
    fpr: float,
    generator: np.random.Generator,
    priors: Sequence[float] = PRIORS,
    resamples: int = 1000,
) -> Accusations:
    """Rates where each model's threshold is taken from all other models' scores; bootstrapped over examples.

    Args:
      scored: scores `(models, n)`, as of `MembershipAttack.pooled`.
      fpr: that the threshold has on the others' non-members, in [0, 1).
      generator: of the resamples.
      priors: shares of members, in (0, 1).
      resamples: at least 100.

    Raises:
      InvalidArgument: fewer than two models, a model without which there are no members or no others, or an argument
        out of range.

    Source: the threshold as an attacker has it, after "Revisiting LiRA" (shadow models only, precision at priors).
    """
    require(scored.scores.ndim == 2 and len(scored.scores) >= 2, f"scores {scored.scores.shape}: expected 2 models")
    at_least("resamples", resamples, 100)
    _check(priors)
    thresholds = [
        threshold_at(Scored(np.delete(scored.scores, model, axis=0), np.delete(scored.members, model, axis=0)), fpr)
        for model in range(len(scored.scores))
    ]
    counts = accusation_counts(scored.scores > np.array(thresholds)[:, None], scored.members)
    weights = example_weights(scored.members, generator, resamples)
    drawn = np.stack([counts @ one for one in weights], axis=1)
    sums = counts.sum(axis=1)
    n = counts.shape[1]
    inside, outside = int((counts[1] > 0).sum()), int((counts[3] > 0).sum())
    right, wrong = drawn[0] / drawn[1], drawn[2] / drawn[3]
    tpr = share_interval(float(sums[0] / sums[1]), right, n, inside)
    wrongly = share_interval(float(sums[2] / sums[3]), wrong, n, outside)
    precision = {prior: _resampled(tpr, wrongly, (right, wrong), n, prior) for prior in priors}
    return Accusations(tpr, wrongly, precision, "bootstrap over examples")


def _resampled(
    tpr: Interval, fpr: Interval, drawn: tuple[Array, Array], examples: int, prior: float
) -> Interval | None:
    """The precision and its interval."""
    if tpr.value + fpr.value == 0:
        return None
    value = float(_precision(np.array(tpr.value), np.array(fpr.value), prior))
    right, wrong = drawn
    if right.max() == 0 or wrong.max() == 0:  # no resample says how rare it is
        ends = _precision(np.array([tpr.low, tpr.high]), np.array([fpr.high, fpr.low]), prior)
        return Interval(value, float(ends[0]), float(ends[1]))
    # Resamples in which nobody is accused say nothing: they widen the interval to both sides.
    values = _precision(right, wrong, prior)
    low = percentiles(value, np.nan_to_num(values, nan=0.0), examples).low
    return Interval(value, low, percentiles(value, np.nan_to_num(values, nan=1.0), examples).high)


def _precision(tpr: Array, fpr: Array, prior: float) -> Array:
    """Bayes' rule; NaN where nobody is accused."""
    accused = prior * tpr + (1 - prior) * fpr
    return np.divide(prior * tpr, accused, out=np.full_like(accused, np.nan), where=accused > 0)


def _check(priors: Sequence[float]) -> None:
    for prior in priors:
        fraction("prior", prior, one=False)
