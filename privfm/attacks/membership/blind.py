"""The blind baseline: telling members from others by the examples alone, without any model.

If that works, the split is unfair (another time, another source, another length), and an attack that scores well may
have learned nothing but the difference. On a fair split nobody can do it, whatever his method.

The attacker here is a ridge regression of the membership, cross-validated. Its scores are linear in the labels, so that
a thousand permutations cost one matrix product, and its p-value is exact: no approximation of how AUCs of folds depend
on each other, which makes their usual interval too short.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from privfm.attacks.membership.curves import Interval, auc_interval
from privfm.checks import at_least, require
from privfm.contracts.membership import Array, Flags, Scored

FALSE_ALARMS = 0.01
"""Share of fair splits that are called unfair, over all of a baseline's attackers together."""

LARGEST = 4000
"""Examples that are looked at; of more, so many at random: work is cubic in them (4,000: 13 s of one core, 0.7 GB)."""

_FOLDS = 5
_LEAST = 25
"""Members, and others: five in each fold."""

_PERMUTATIONS = 999
"""With these the smallest p-value is 1 / 1,000, a fifth of the level of one of two attackers."""

_WIDTH = 0.5
"""Of the neighbourhood of a length, in standard deviations of its logarithm: narrow enough for two humps in one."""

_PENALTY = 1.0
"""Ridge penalty, in units of an example's own squared norm, which is 1 on average."""

_DIGITS = 10
"""Of a score: sums in another order differ beyond, and what is equal but for these is a tie."""

_WORD = re.compile(r"\w+|[^\w\s]")


@final
@dataclass(frozen=True)
class BlindGuess:
    """What one kind of clue gives.

    Attributes:
      clue: what was looked at.
      auc: of scores of examples that the attacker did not learn from, with a 95 % interval over examples. The interval
        takes the attacker as given; whether there is a difference at all is told by `p_value`.
      p_value: share of permuted memberships with an AUC as large; exact.
      detectable: the AUC from which it would have been called a difference.
    """

    clue: str
    auc: Interval
    p_value: float
    detectable: float


@final
@dataclass(frozen=True)
class Blind:
    """The verdict on a split.

    Attributes:
      guesses: one for each kind of clue.
      examples: that were looked at.
      fair: no p-value is at or under `FALSE_ALARMS` over the number of guesses. A fair split is called unfair with a
        probability of at most `FALSE_ALARMS`; an unfair one is called fair where it shows less than `detectable`.
    """

    guesses: tuple[BlindGuess, ...]
    examples: int
    fair: bool

    @property
    def strongest(self) -> BlindGuess:
        """The guess with the smallest p-value; of several, with the largest AUC."""
        return min(self.guesses, key=lambda guess: (guess.p_value, -guess.auc.value))

    @property
    def auc(self) -> Interval:
        """Of the strongest guess."""
        return self.strongest.auc

    @property
    def sentence(self) -> str:
        """For the report."""
        found = "; ".join(
            f"{guess.clue}: AUC {guess.auc.value:.2f} [{guess.auc.low:.2f}, {guess.auc.high:.2f}], "
            f"p={guess.p_value:.2g}, found from {guess.detectable:.2f}"
            for guess in self.guesses
        )
        rate = f"a fair split is called unfair in at most {100 * FALSE_ALARMS:.0f} % of cases"
        if self.fair:
            return f"Without any model members look like others ({found}; {self.examples:,} examples; {rate})."
        return (
            f"The split is unfair: members are told from others without any model ({found}; {self.examples:,} "
            f"examples; {rate}); every attack's score is void."
        )


def blind_texts(
    texts: Sequence[str], members: Flags, generator: np.random.Generator, lengths: Sequence[int] | None = None
) -> Blind:
    """Looks for members by their words (logarithmic counts, weighted by rarity) and by their length.

    Args:
      texts: of members and others.
      members: `(n,)` bool.
      generator: of folds, permutations and resamples.
      lengths: in tokens of the attacked model's tokenizer; None: words and punctuation marks are counted.

    Raises:
      InvalidArgument: shapes differ, or fewer than 25 members or others.

    Source: Das, Zhang, Tramer, "Blind baselines beat membership inference attacks for foundation models", 2024.
    """
    require(lengths is None or len(lengths) == len(texts), "lengths: expected one a text")
    kept = _kept(len(texts), members, generator)
    words = [Counter(_WORD.findall(texts[place].lower())) for place in kept.tolist()]
    sizes = [one.total() for one in words] if lengths is None else [lengths[place] for place in kept.tolist()]
    clues = {"words": _word_kernel(words), "length": _length_kernel(np.array(sizes))}
    return _judged(clues, members[kept], generator)


def blind_features(features: NDArray[np.floating[Any]], members: Flags, generator: np.random.Generator) -> Blind:
    """Looks for members by numbers `(n, k)`, such as pixels or statistics: each as it is, and squared.

    Args:
      features: finite.
      members: `(n,)` bool.
      generator: of folds, permutations and resamples.

    Raises:
      InvalidArgument: shapes differ, a feature is not finite, or fewer than 25 members or others.
    """
    require(features.ndim == 2, f"features {features.shape}: expected (n, k); flatten images")
    require(bool(np.isfinite(features).all()), "features are not finite: leave such examples out")
    kept = _kept(len(features), members, generator)
    columns = _standardised(features[kept].astype(np.float64))
    return _judged({"features": _linear_kernel(np.hstack([columns, columns**2]))}, members[kept], generator)


def _kept(count: int, members: Flags, generator: np.random.Generator) -> NDArray[np.int64]:
    """Places of the examples that are looked at, in order."""
    require(members.shape == (count,), f"members {members.shape}: expected ({count},), a flag for each example")
    require(members.dtype == np.bool_, f"members has type {members.dtype}: expected bool")
    kept = np.arange(count) if count <= LARGEST else np.sort(generator.choice(count, LARGEST, replace=False))
    for name, found in (("members", int(members[kept].sum())), ("others", int((~members[kept]).sum()))):
        at_least(name, found, _LEAST)
    return kept


def _judged(clues: Mapping[str, Array], members: Flags, generator: np.random.Generator) -> Blind:
    folds = _folds(members, generator)
    level = FALSE_ALARMS / len(clues)
    guesses = tuple(
        _guess(clue, kernel, members, folds, level=level, generator=generator) for clue, kernel in clues.items()
    )
    return Blind(guesses, len(members), all(guess.p_value > level for guess in guesses))


def _folds(members: Flags, generator: np.random.Generator) -> NDArray[np.int64]:
    """A fold for each example, at random, with as many members in each as in another (but for one)."""
    folds = np.empty(len(members), dtype=np.int64)
    for kind in (members, ~members):
        folds[kind] = generator.permutation(np.arange(kind.sum()) % _FOLDS)
    return folds


def _guess(
    clue: str, kernel: Array, members: Flags, folds: NDArray[np.int64], *, level: float, generator: np.random.Generator
) -> BlindGuess:
    """Scores of the truth and of permutations of it within folds, which leave every fold its number of members.

    If members are exchangeable with others, the truth is one of these permutations like any other.
    """
    labels = np.empty((len(members), 1 + _PERMUTATIONS), dtype=bool)
    labels[:, 0] = members
    for fold in range(_FOLDS):
        inside = np.flatnonzero(folds == fold)
        labels[inside, 1:] = generator.permuted(
            np.broadcast_to(members[inside, None], (len(inside), _PERMUTATIONS)), axis=0
        )
    scores = _out_of_fold(kernel, labels, folds)
    areas = _areas(scores, labels)
    p_value = float((areas >= areas[0]).mean())  # the truth counts as one of them
    # What is called a difference beats all permutations but so many; the truth is one of those that count.
    allowed = int(level * len(areas) + 1e-9) - 1
    detectable = float(np.sort(areas[1:])[::-1][allowed])
    found = auc_interval(Scored(np.round(scores[:, 0], _DIGITS), members), generator)
    return BlindGuess(clue, found, p_value, detectable)


def _out_of_fold(kernel: Array, labels: Flags, folds: NDArray[np.int64]) -> Array:
    """Ridge predictions `(n, permutations)` of each fold by all others."""
    scores = np.empty(labels.shape)
    for fold in range(_FOLDS):
        held = folds == fold
        known = labels[~held].astype(np.float64)
        system = kernel[np.ix_(~held, ~held)] + _PENALTY * np.eye(int((~held).sum()))
        weights = np.linalg.solve(system, kernel[np.ix_(~held, held)])
        scores[held] = weights.T @ (known - known.mean(axis=0))
    return scores


def _areas(scores: Array, labels: Flags) -> Array:
    """AUC of each column, ties counted half."""
    from scipy.stats import rankdata

    ranks = rankdata(np.round(scores, _DIGITS), axis=0)
    inside = labels.sum(axis=0)
    return np.asarray(((ranks * labels).sum(axis=0) - inside * (inside + 1) / 2) / (inside * (len(labels) - inside)))


def _word_kernel(words: Sequence[Counter[str]]) -> Array:
    """Inner products of texts `(n, n)`: `log(1 + count)` times the inverse document frequency, rows of length 1."""
    from scipy.sparse import csr_array

    places = {word: place for place, word in enumerate(dict.fromkeys(word for text in words for word in text))}
    columns = [places[word] for text in words for word in text]
    ends = np.cumsum([0, *(len(text) for text in words)])
    occurs = np.bincount(columns, minlength=len(places))
    rarity = np.log((1 + len(words)) / (1 + occurs)) + 1
    values = np.array([log(1 + count) for text in words for count in text.values()]) * rarity[columns]
    matrix = csr_array((values, columns, ends), shape=(len(words), len(places)))
    product: Array = (matrix @ matrix.T).toarray()
    norms = np.sqrt(np.diag(product))
    norms[norms == 0] = 1.0  # a text without a word is like no other
    return np.asarray(product / norms[:, None] / norms[None, :])


def _length_kernel(lengths: NDArray[np.int64]) -> Array:
    """How near two lengths are on a logarithmic scale, so that any shape of a difference shows, not only its sign."""
    column = _standardised(np.log1p(lengths.astype(np.float64))[:, None])[:, 0]
    return np.asarray(np.exp(-(((column[:, None] - column[None, :]) / _WIDTH) ** 2) / 2))


def _linear_kernel(columns: Array) -> Array:
    """Inner products, 1 on average of an example with itself."""
    product: Array = columns @ columns.T
    own = float(np.diag(product).mean())
    return product / own if own > 0 else product


def _standardised(columns: Array) -> Array:
    """Columns with mean 0 and deviation 1; constant ones are 0."""
    spread = columns.std(axis=0)
    # A constant column's deviation is rounding, not 0.
    constant = spread <= 1e-12 * np.abs(columns).max(axis=0)
    return np.asarray((columns - columns.mean(axis=0)) * np.where(constant, 0.0, 1 / np.where(constant, 1.0, spread)))
