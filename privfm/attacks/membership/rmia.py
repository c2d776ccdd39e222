"""Likelihood ratio against the population: how many other examples the target favours less than this one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import log
from typing import Literal, final

import numpy as np

from privfm.attacks.membership.places import part_of_step
from privfm.attacks.membership.sides import by_query, log_mean_over, too_few
from privfm.checks import InvalidArgument, fraction, one_of, positive, require
from privfm.contracts.membership import Array, MembershipAttack, Signals

_OFFSETS = tuple(step / 10 for step in range(11))
"""Offsets that `tuned_offset` tries: the grid of the authors' code (ML Privacy Meter)."""


@final
@dataclass(frozen=True)
class RMIA(MembershipAttack):
    """Share of the population whose probability the target raises less than the example's, compared with what is usual.

    Signals are **logarithms of probabilities** of the true label (or text), so at most 0. With p(x) the usual
    probability of x, `ratio_x = p(x | target) / p(x)`, the score is the share of z in the population with
    `ratio_x / ratio_z >= gamma`.

    | mode | usual p(x) of an example | usual p(z) of the population |
    |---|---|---|
    | online | `(mean_in + mean_out) / 2` over shadow models | mean over all of them |
    | offline | `((1 + a) mean_out + (1 - a)) / 2`, a the offset | the same, or the mean: `corrected_population` |

    Means are of probabilities, taken in log space: probabilities of long texts do not become zero. But at such
    probabilities an offset below 1 makes the offline p(x) a constant, `(1 - a) / 2`, and the attack one of the plain
    signal; take the log-probability of a token on average, or an offset of 1.

    A share is a multiple of `1 / |Z|`, too coarse for few false positives; with `tie_break` the place of ratio_x
    between the two neighbouring ratios of the population is added, as a part of one step:

    | ratio_x / gamma, with r_1 <= ... <= r_Z the population's | added, in steps of `1 / |Z|` |
    |---|---|
    | between r_k and r_(k+1) | `log(ratio_x / gamma / r_k) / log(r_(k+1) / r_k)` |
    | below r_1 | `1 / (1 + log(r_1 gamma / ratio_x))` |
    | above r_Z | `g / (1 + g)`, `g = log(ratio_x / gamma / r_Z)` |

    At most one step is added, so scores that differed keep their order, and scores lie in `[0, 1 + 1 / |Z|]`. Against
    one target with one query the score thus orders examples as ratio_x does, whatever the population and gamma; they
    matter where scores of several targets are pooled under one threshold.

    Several queries of an example are compared with the same query of the population, and shares are averaged (a step is
    then `1 / (queries |Z|)`, and the added parts are averaged too).

    Args:
      mode: whether the attacker's models were trained on the examples it judges (half of them each).
      offset: a, in [0, 1], offline only: how far a model trained on x is from certain of it when others are not
        (0: certain, 1: no better). It depends on the data (0.3 on CIFAR-10); `tuned_offset` finds one.
      gamma: how many times more than z's x's probability must have been raised.
      corrected_population: offline only: whether p(z) gets the same correction as p(x) (as in ML Privacy Meter and
        LeakPro), or is the mean over the models, none of which was trained on z.
      tie_break: see above.

    Attributes:
      used: what the attacker must have; it depends on the mode.

    Raises:
      InvalidArgument: offline without an offset, or online with one.

    Cost: O(models (n + z)) and a sort of z; no array of n times z.

    Source: Zarifzadeh, Liu, Shokri, "Low-cost high-power membership inference attacks", 2024; gamma = 1 as in the
      authors' code (ML Privacy Meter), which counts ratios above gamma where the paper counts those from gamma on.

    >>> two = Signals(np.log([[0.5, 0.9], [0.5, 0.3]]), np.array([[False] * 2] * 2), np.log([[0.5, 0.4], [0.25, 0.5]]))
    >>> RMIA("offline", offset=1.0, tie_break=False)(two.take([0]), two.take([1]))  # 1 and 3 against 2 and 0.8
    array([0.5, 1. ])
    """

    mode: Literal["online", "offline"]
    offset: float | None = None
    gamma: float = 1.0
    corrected_population: bool = True
    tie_break: bool = True
    used: tuple[str, ...] = field(init=False, repr=False, compare=False, default=())

    def __post_init__(self) -> None:
        one_of("mode", self.mode, ("online", "offline"))
        positive("gamma", self.gamma)
        trained = "shadow models not trained on it"
        if self.mode == "online":
            trained = "shadow models trained on each judged example, and others that were not"
            require(self.offset is None, f"offset={self.offset!r}: mode='online' has none, it measures mean_in")
        elif self.offset is None:
            raise InvalidArgument("offset=None: mode='offline' needs one in [0, 1]; tuned_offset(shadows) finds it")
        else:
            fraction("offset", self.offset, zero=True)
        object.__setattr__(self, "used", ("signal of the target", trained, "population that no model was trained on"))

    def refusal(self, target: Signals, shadows: Signals | None) -> str:
        if shadows is None:
            return "needs shadow models; QuantileRegression and Threshold need none"
        if target.population is None or shadows.population is None:
            return "needs Signals.population of the target and of the shadows: examples no model was trained on"
        if target.population.shape[1:] != shadows.population.shape[1:]:
            sizes = f"{target.population.shape[1:]} and {shadows.population.shape[1:]}"
            return f"populations of target and shadows are {sizes}: expected the same examples in the same order"
        if target.population.shape[1] == 0:
            return "the population is empty"
        few = too_few(~shadows.inside, 1, "not trained on")
        if not few and self.mode == "online":
            few = too_few(shadows.inside, 1, "trained on")
        return few or self._not_logarithms(target, shadows)

    def scores(self, target: Signals, shadows: Signals | None) -> Array:
        assert shadows is not None and shadows.population is not None and target.population is not None
        raised = by_query(target.values)[0] - self._usual(shadows)
        others = by_query(target.population)[0] - self._usual_of_population(by_query(shadows.population))
        places = [
            _places(np.sort(others[:, query]), raised[:, query] - log(self.gamma), self.tie_break)
            for query in range(others.shape[1])
        ]
        counts = np.sum([reached for reached, _ in places], axis=0)
        parts = np.mean([part for _, part in places], axis=0)  # at most 1, where counts differ by 1 at least
        return np.asarray((counts + parts) / others.size)

    def _usual(self, shadows: Signals) -> Array:
        """Logarithm of p(x), `(n, queries)`."""
        values = by_query(shadows.values)
        out = log_mean_over(~shadows.inside, values)
        if self.mode == "online":
            return np.asarray(np.logaddexp(out, log_mean_over(shadows.inside, values)) - log(2))
        return self._corrected(out)

    def _usual_of_population(self, values: Array) -> Array:
        """Logarithm of p(z), `(z, queries)`."""
        mean = log_mean_over(np.ones(values.shape[:2], dtype=np.bool_), values)
        return self._corrected(mean) if self.mode == "offline" and self.corrected_population else mean

    def _corrected(self, out: Array) -> Array:
        """`log(((1 + a) p + (1 - a)) / 2)` of `log p`."""
        a = self.offset
        assert a is not None  # checked in __post_init__: offline has one
        sure = log((1 - a) / 2) if a < 1 else -np.inf
        return np.asarray(np.logaddexp(log((1 + a) / 2) + out, sure))

    def _not_logarithms(self, target: Signals, shadows: Signals) -> str:
        """Why signals cannot be logarithms of probabilities: one is above 0. Offline reads only out models."""
        read = shadows.values
        if self.mode == "offline":
            unread = by_query(shadows.inside.astype(np.float64)) > 0 if read.ndim == 3 else shadows.inside
            read = np.where(unread, 0.0, read)
        named = {"target": target.values, "shadows": read, "population": target.population}
        named["population of the shadows"] = shadows.population
        for name, values in named.items():
            if values is not None and values.size and values.max() > 0:
                return (
                    f"{name}: a signal is {values.max():g}, expected logarithms of probabilities, at most 0; "
                    "LiRA takes log-odds"
                )
        return ""


def tuned_offset(
    shadows: Signals,
    *,
    gamma: float = 1.0,
    corrected_population: bool = True,
    offsets: Sequence[float] = _OFFSETS,
) -> float:
    """The offset with which the shadow models, each attacked by the others, are told best; the target is not asked.

    Best is the largest AUC on average over the attacked models; among equals the smallest offset.

    Args:
      shadows: at least 3, with a population; each trained on some of the examples and not on others, and without any
        one of them every example still has a model that was not trained on it.
      gamma: as RMIA's.
      corrected_population: as RMIA's.
      offsets: to try.

    Raises:
      InvalidArgument: too few shadow models, or what RMIA refuses.

    Cost: `len(offsets) * len(shadows)` attacks.

    Source: Zarifzadeh et al. 2024; the authors' code attacks one reference model, here each is attacked.
    """
    require(len(shadows) >= 3, f"{len(shadows)} shadow models: expected at least 3, to attack each by the others")
    require(len(offsets) > 0, "offsets: expected at least one to try")
    mixed = shadows.inside.any(axis=1) & ~shadows.inside.all(axis=1)
    require(bool(mixed.all()), "a shadow model was trained on all or on none of the examples: its AUC does not exist")
    first = RMIA("offline", offsets[0], gamma, corrected_population)
    areas = {offset: _mean_area(replace(first, offset=offset), shadows) for offset in sorted(offsets)}
    return max(areas, key=areas.__getitem__)  # the first, so the smallest, among equals


def _mean_area(attack: RMIA, models: Signals) -> float:
    """AUC on average over the models, each attacked by the others."""
    from sklearn.metrics import roc_auc_score

    found = attack.pooled(models)
    return float(np.mean([roc_auc_score(found.members[k], found.scores[k]) for k in range(len(models))]))


def _places(population: Array, ratios: Array, tie_break: bool) -> tuple[Array, Array]:
    """How many of the sorted population each ratio reaches, and how far towards the next it is, from 0 to 1."""
    reached = np.searchsorted(population, ratios, side="right")
    if not tie_break:
        return reached.astype(np.float64), np.zeros_like(ratios)
    ends = np.concatenate([[-np.inf], population, [np.inf]])
    return reached.astype(np.float64), part_of_step(ratios, ends[reached], ends[reached + 1])
