"""Scores of many rounds and clients made into one: against the other clients (FedMIA), or over time (Temporal)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Final, Literal, final

import numpy as np
from numpy.typing import NDArray

from privfm.checks import at_least, one_of, require
from privfm.contracts.membership import Array

_CUT: Final = 3.0
"""Deviations above the others' mean from which another client's score is left out: Zhu et al., equation 8."""

_OTHERS: Final = 2
"""Fewest other clients of a round: one value has no deviation."""


@final
class UpdateTraces:
    """Scores as rounds go by: `(rounds, clients, n)`, NaN where a client did not take part.

    Args:
      clients: in the population, numbered from 0.
      examples: n candidates, the same in every round.

    >>> traces = UpdateTraces(clients=3, examples=2)
    >>> traces.add(ids=(0, 2), scores=np.array([[0.5, 0.1], [0.0, 0.2]]))
    >>> traces.scores.tolist()
    [[[0.5, 0.1], [nan, nan], [0.0, 0.2]]]
    """

    def __init__(self, clients: int, examples: int) -> None:
        at_least("clients", clients, 1)
        at_least("examples", examples, 1)
        self._shape = clients, examples
        self._rounds: list[Array] = []

    def __len__(self) -> int:
        """Rounds so far."""
        return len(self._rounds)

    def add(self, ids: Sequence[int], scores: Array) -> None:
        """One more round: scores `(k, n)` of the updates of these clients.

        Raises:
          InvalidArgument: an unknown or repeated client, another shape, or a score that is not finite.
        """
        clients, examples = self._shape
        require(len(set(ids)) == len(ids), f"ids={tuple(ids)}: a client is there twice")
        require(all(0 <= one < clients for one in ids), f"ids={tuple(ids)}: expected clients 0 to {clients - 1}")
        require(scores.shape == (len(ids), examples), f"scores {scores.shape}: expected {(len(ids), examples)}")
        require(bool(np.isfinite(scores).all()), "scores are not finite; leave a client out that has none")
        full = np.full(self._shape, np.nan)
        full[list(ids)] = scores
        self._rounds.append(full)

    @property
    def scores(self) -> Array:
        """All of it, `(rounds, clients, n)`.

        Raises:
          InvalidArgument: no round was added.
        """
        require(bool(self._rounds), "no round was added")
        return np.stack(self._rounds)


@final
@dataclass(frozen=True)
class FedMIA:
    """One client's scores against those of the others in the same round, who are known not to hold its examples.

    In each round the others' scores of an example give mean and deviation of the null; the target's score has a
    one-sided tail probability p under it, and what is returned is a mean over the rounds that the target took part in:
    of `-p` (the paper: its mean of lower tails is one more than ours, which keeps its digits where p is near 0), or of
    `-log p` (`combine='log'`, Fisher's statistic: one striking round decides; the paper's code prints it as well). Tail
    probabilities of different rounds are not independent, the data are the same: the mean is a score and no p-value.

    | in a round                                  | is                                                               |
    |---------------------------------------------|------------------------------------------------------------------|
    | the target did not take part                | left out                                                         |
    | fewer than 2 others took part               | left out                                                         |
    | all others have the same score              | p is 0, 1/2 or 1: the target's is above, equal or below          |
    | another client holds the example as well    | its score is left out if above mean + `cut` deviations of the    |
    |                                             | others, itself among them, which needs 11 others: the largest    |
    |                                             | deviation of m values is sqrt(m - 1). Of fewer it stays, widens  |
    |                                             | the null and hides the member                                    |
    | scores of clients have different scales     | the null is wrong: cosines of clients with other batch sizes     |
    | the target's score is itself an extreme one | never left out: only others are                                  |

    Args:
      tail: `normal` with the deviation divided by the count (the paper), or `student`: exact p-values for m independent
        normal scores of the others, which the normal tail is not. With 5 others and no member, a tail under 1 % is
        found 6 times as often as that, with 30 others 1.6 times.
      combine: how rounds become one number.
      cut: other clients' scores above mean + cut deviations are left out, once; infinity keeps all. Exact p-values
        need that. At least 2: a lower one could leave a single client.

    Source: Zhu, Li, Gu, Yao, Fan, Han, "FedMIA: an effective membership inference attack exploiting the 'all for one'
    principle in federated learning", CVPR 2025, equations 4 to 12 and algorithm 1. `student` is the textbook
    predictive interval of a normal sample.
    """

    tail: Literal["normal", "student"] = "normal"
    combine: Literal["plain", "log"] = "plain"
    cut: float = _CUT

    used = ("every client's update in every round", "the model of every round", "disjoint data of clients")

    def __post_init__(self) -> None:
        one_of("tail", self.tail, ("normal", "student"))
        one_of("combine", self.combine, ("plain", "log"))
        require(self.cut >= 2, f"cut={self.cut!r}: expected a number >= 2, infinity to leave nothing out")

    def __call__(self, scores: Array, target: int) -> Array:
        """Scores `(n,)` of the examples: larger, more likely the target's.

        Args:
          scores: `(rounds, clients, n)`, of `cosine_scores` or another that is larger for members, NaN where a client
            did not take part.
          target: the client.

        Raises:
          InvalidArgument: the shape, an infinite or half-missing row, or no round with the target and two others.
        """
        tails = self.log_p_values(scores, target)
        kept = tails[~np.isnan(tails).all(1)]
        found: Array = -kept.mean(0) if self.combine == "log" else -np.exp(kept).mean(0)
        return found

    def p_values(self, scores: Array, target: int) -> Array:
        """One-sided tail probabilities of each round, `(rounds, n)`, NaN in rounds that are left out.

        Uniform for examples that nobody holds if the clients' scores are independent and equally distributed normal
        numbers, `tail='student'` and `cut=inf`.
        """
        return np.exp(self.log_p_values(scores, target))

    def log_p_values(self, scores: Array, target: int) -> Array:
        """Their logarithms, which do not underflow."""
        from scipy import stats

        require(scores.ndim == 3, f"scores {scores.shape}: expected (rounds, clients, n)")
        taken = _participation(scores)
        at_least("target", target, 0)
        require(target < scores.shape[1], f"target={target}: expected one of {scores.shape[1]} clients")
        usable = taken[:, target] & (taken.sum(1) > _OTHERS)
        require(
            bool(usable.any()),
            f"client {target} took part in no round with at least {_OTHERS} others, who are what it is compared with",
        )
        found = np.full((len(scores), scores.shape[2]), np.nan)
        for now in usable.nonzero()[0]:
            others = scores[now, taken[now] & (np.arange(scores.shape[1]) != target)]
            mean, spread, count = self._null(others)
            apart = scores[now, target] - mean
            if (
                self.tail == "student"
            ):  # of a further draw: the mean's own error is in it, and the deviation is unbiased
                spread = spread * np.sqrt((count + 1) / (count - 1))
            # Without any spread the quotient would be 0/0 for an equal score: it is neither high nor low.
            level = np.divide(apart, spread, out=np.where(apart == 0, 0.0, np.copysign(inf, apart)), where=spread > 0)
            found[now] = stats.t.logsf(level, count - 1) if self.tail == "student" else stats.norm.logsf(level)
        return found

    def owners(self, scores: Array) -> NDArray[np.int64]:
        """Of each example the client with the largest score, `(n,)`: who holds it, if somebody does.

        Clients that cannot be scored (see `__call__`) are never named.

        Raises:
          InvalidArgument: no client can be scored.

        Source: Hu et al., "Source inference attacks in federated learning", ICDM 2021, for the question.
        """
        require(scores.ndim == 3, f"scores {scores.shape}: expected (rounds, clients, n)")
        taken = _participation(scores)
        enough = taken.sum(1) > _OTHERS
        able = [client for client in range(scores.shape[1]) if bool((taken[:, client] & enough).any())]
        require(bool(able), f"no round has {_OTHERS + 1} clients, fewer are compared with nobody")
        best = np.stack([self(scores, client) for client in able]).argmax(0)
        return np.asarray([able[place] for place in best], dtype=np.int64)

    def _null(self, others: Array) -> tuple[Array, Array, Array]:
        """Mean, deviation (divided by the count) and count of the others' scores, without the extreme ones: `(n,)`."""
        mean, spread = others.mean(0), others.std(0)
        kept = others <= mean + self.cut * spread if np.isfinite(self.cut) else np.ones_like(others, dtype=bool)
        count = kept.sum(0).astype(np.float64)
        mean = others.sum(0, where=kept) / count
        spread = np.sqrt(((others - mean) ** 2).sum(0, where=kept) / count)
        return mean, spread, count


@final
@dataclass(frozen=True)
class Temporal:
    """What the sequence of released models says of an example: all that a fellow client sees.

    Members' losses end lower (`last`), are lower all along (`mean`), and fall faster (`slope`).

    Args:
      summary: of the trajectory.

    Source: Nasr, Shokri, Houmansadr, "Comprehensive privacy analysis of deep learning", IEEE S&P 2019 (several models
    in time); Zari, Xu, Neglia, "Efficient passive membership inference attack in federated learning", 2021
    (probabilities over rounds). `slope` is least squares.

    >>> Temporal("slope")(np.array([[0.0, -3.0], [1.0, -3.0], [2.0, -3.0]])).tolist()
    [1.0, 0.0]
    """

    summary: Literal["last", "mean", "slope"]

    used = ("the released model of every round",)

    def __post_init__(self) -> None:
        one_of("summary", self.summary, ("last", "mean", "slope"))

    def __call__(self, values: Array, rounds: Sequence[float] | None = None) -> Array:
        """Scores `(n,)` of the examples.

        Args:
          values: `(rounds, n)`, larger where the model fits better (minus the loss); NaN for a whole round that the
            attacker did not see.
          rounds: their numbers, ascending; None: 0, 1, ... Rounds need not be evenly seen.

        Raises:
          InvalidArgument: the shape, an infinite or half-missing round, or too few rounds (`slope` needs two).
        """
        require(values.ndim == 2 and values.size > 0, f"values {values.shape}: expected (rounds, n), not empty")
        seen = _participation(values)
        when = np.arange(len(values), dtype=np.float64) if rounds is None else np.asarray(rounds, dtype=np.float64)
        fits = when.shape == (len(values),) and bool((np.diff(when) > 0).all())
        require(fits, f"rounds: expected {len(values)} ascending numbers, one a row of values")
        least = 2 if self.summary == "slope" else 1
        require(int(seen.sum()) >= least, f"{int(seen.sum())} rounds seen: {self.summary!r} needs {least}")
        kept, when = values[seen], when[seen]
        if self.summary == "last":
            return np.array(kept[-1])
        if self.summary == "mean":
            return np.asarray(kept.mean(0))
        centred = when - when.mean()
        return np.asarray(centred @ (kept - kept.mean(0)) / (centred @ centred))


def _participation(scores: Array) -> NDArray[np.bool_]:
    """Which rows of the last axis are there; a row is there as a whole or is NaN as a whole."""
    require(scores.ndim >= 2 and scores.size > 0, f"scores {scores.shape}: nothing is there")
    missing = np.isnan(scores)
    whole = missing.all(-1)
    require(bool((missing.any(-1) == whole).all()), "a row is NaN in part: NaN means that a client did not take part")
    require(not bool(np.isinf(scores).any()), "a score is infinite")
    return np.logical_not(whole)
