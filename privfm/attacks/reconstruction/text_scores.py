"""How much of the clients' text an attack has recovered: exact texts, ROUGE and tokens, one prediction a reference.

Scores know the truth, attacks do not: nothing here is called by an attack. Texts are sequences of token ids or of
words; whatever is compared is compared as a whole unit, so that scores on token ids are of the tokenizer's pieces and
not of words. They are not comparable to scores on words: a word in three pieces counts three times. `score_words`
is what published tables of ROUGE mostly mean.

| case                               | treatment                                                                       |
|------------------------------------|---------------------------------------------------------------------------------|
| fewer predictions than references  | a reference without a prediction counts 0 everywhere                            |
| more predictions than references   | all may be matched, the rest lowers `precision` and `tokens.precision`, and     |
|                                    | raises `false`; nothing is cut to the true number, which an attack need not know|
| one prediction near two references | it answers for one of them                                                      |
| equal references                   | each needs a prediction of its own                                              |
| a pair without a common token      | is no pair                                                                      |
| a reference without tokens         | refused: nothing of it can be recovered                                         |

ROUGE of the matched pairs rises with the number of predictions, be they guessed: read it beside `precision`, and next
to `chance_scores` with as many predictions.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import nan
from typing import Final, final

import torch
from torch import Generator

from privfm.checks import at_least, require

_WORD: Final = re.compile(r"\w+")
"""Words of `score_words`: runs of letters, digits and underscores, in any script. No stemming."""

Unit = Hashable
"""What a text is a sequence of: token ids, or words."""


@final
@dataclass(frozen=True)
class TokenScore:
    """A bag of tokens against the true one.

    Attributes:
      recall: share of the true bag that is there.
      precision: share of what is there that is true; 0 for an empty bag.
    """

    recall: float
    precision: float


@final
@dataclass(frozen=True)
class TextPair:
    """A prediction and the reference that it answers for.

    Attributes:
      prediction: its place among the predictions.
      reference: its place among the references.
      exact: they are equal.
      rouge_1: F1 of single tokens.
      rouge_2: F1 of pairs of neighbours.
      rouge_l: F1 of the longest common subsequence.
    """

    prediction: int
    reference: int
    exact: bool
    rouge_1: float
    rouge_2: float
    rouge_l: float


@final
@dataclass(frozen=True)
class TextScore:
    """What of the references the predictions recover.

    Attributes:
      exact: share of the references that are recovered exactly.
      false: predictions that are no reference; of two equal predictions for one reference, one is false.
      rouge_1: F1, mean over the references; likewise the next two.
      rouge_2: of pairs of neighbours.
      rouge_l: of the longest common subsequence.
      precision: ROUGE-1 F1 of the same pairs, mean over the *predictions*; 0 without any.
      tokens: distinct tokens of all predictions against those of all references.
      pairs: in the order of the references.
      predictions: number of them.
      references: number of them.
    """

    exact: float
    false: int
    rouge_1: float
    rouge_2: float
    rouge_l: float
    precision: float
    tokens: TokenScore
    pairs: tuple[TextPair, ...]
    predictions: int
    references: int


def rouge_n(predicted: Sequence[Unit], reference: Sequence[Unit], n: int) -> float:
    """F1 of n-grams with clipped counts: an n-gram matches as often as it occurs in both.

    | case                                 | value                    |
    |--------------------------------------|--------------------------|
    | both shorter than n                  | 1 if they are equal or 0 |
    | one of them shorter than n           | 0                        |

    Args:
      predicted: a text.
      reference: the true one.
      n: 1 or 2 as a rule.

    Source: Lin, "ROUGE: a package for automatic evaluation of summaries", 2004, section 2, as F1 of recall and
    precision instead of recall alone; texts too short for an n-gram are our convention.

    >>> rouge_n("the cat sat".split(), "the cat sat down".split(), 2)  # 2 of 2 and 2 of 3
    0.8
    """
    at_least("n", n, 1)
    said, true = _grams(predicted, n), _grams(reference, n)
    total = said.total() + true.total()
    if total == 0:
        return float(tuple(predicted) == tuple(reference))
    return 2 * (said & true).total() / total


def rouge_l(predicted: Sequence[Unit], reference: Sequence[Unit]) -> float:
    """F1 of the longest common subsequence's length over the two lengths; of two empty texts 1.

    Source: Lin 2004 (as `rouge_n`), section 3, equations 2 to 4 with beta = 1, each text taken as one sentence.

    >>> rouge_l([1, 2, 3, 4], [4, 1, 3])  # 1, 3
    0.5714285714285714
    """
    total = len(predicted) + len(reference)
    return 2 * common_length(predicted, reference) / total if total else 1.0


def common_length(one: Sequence[Unit], other: Sequence[Unit]) -> int:
    """Length of the longest common subsequence, row by row of its table with a row held in one whole number.

    Source: Hyyrö, "Bit-parallel LCS-length computation revisited", 2004.
    """
    places: dict[Unit, int] = {}
    for place, unit in enumerate(one):
        places[unit] = places.get(unit, 0) | (1 << place)
    everywhere = (1 << len(one)) - 1
    row = everywhere
    for unit in other:
        shared = row & places.get(unit, 0)
        row = ((row + shared) | (row - shared)) & everywhere
    return len(one) - row.bit_count()


def score_counts(predicted: Mapping[int, int], reference: Mapping[int, int]) -> TokenScore:
    """A multiset against the true one, both by the number of each member: labels, or target tokens.

    Raises:
      InvalidArgument: the reference is empty, or a number is negative.

    >>> score_counts({0: 3}, {0: 2, 1: 2})
    TokenScore(recall=0.5, precision=0.6666666666666666)
    """
    said, true = Counter(dict(predicted)), Counter(dict(reference))
    require(all(number >= 0 for number in (*said.values(), *true.values())), "expected numbers >= 0 of every member")
    require(true.total() > 0, "the reference is empty: nothing of it can be recovered")
    common = (said & true).total()
    return TokenScore(common / true.total(), common / said.total() if said.total() else 0.0)


def score_tokens(
    predicted: Collection[int], references: Sequence[Sequence[int]], special: Collection[int] = ()
) -> TokenScore:
    """Distinct tokens that are said to occur against those that do: of `Reconstruction.tokens`.

    Args:
      predicted: ids, each counted once.
      references: the true texts.
      special: left out of both sides.
    """
    left_out = frozenset(special)
    true = {token for text in references for token in text} - left_out
    return score_counts(dict.fromkeys(set(predicted) - left_out, 1), dict.fromkeys(true, 1))


def score_texts(
    predicted: Sequence[Sequence[int]], references: Sequence[Sequence[int]], special: Collection[int] = ()
) -> TextScore:
    """Scores predicted texts in token ids against the true ones.

    Each reference is given at most one prediction and each prediction to at most one reference: first so that as many
    as possible are exact, then so that the sum over pairs of the three ROUGE scores' mean is largest. There is one
    pairing for all scores, so that no single ROUGE is the largest that a pairing of its own would give.

    Args:
      predicted: token ids; any number of texts, in any order.
      references: token ids of the texts behind the observation.
      special: ids taken out of all texts before anything is compared, exact recovery included, so that nobody is paid
        for what every text contains: the tokenizer's begin, end and padding.

    Raises:
      InvalidArgument: there is no reference, or one is empty.

    Cost: predictions x references x length.

    Source: the assignment is Kuhn 1955 ("the Hungarian method"); ROUGE as in `rouge_n` and `rouge_l`.

    >>> score = score_texts([(101, 7, 8, 102)], [(101, 7, 8, 102), (101, 9, 102)], special=(101, 102))
    >>> score.exact, score.false, score.rouge_1, score.precision
    (0.5, 0, 0.5, 1.0)
    """
    left_out = frozenset(special)
    return _score(_without(predicted, left_out), _without(references, left_out))


def score_words(predicted: Sequence[str], references: Sequence[str]) -> TextScore:
    """The same for texts as strings, word by word: case and punctuation do not count, words are not stemmed.

    Raises:
      InvalidArgument: there is no reference, or one has no word.
    """
    return _score([_words(text) for text in predicted], [_words(text) for text in references])


def chance_scores(
    foreign: Sequence[Sequence[int]],
    references: Sequence[Sequence[int]],
    special: Collection[int] = (),
    *,
    predictions: int | None = None,
    draws: int = 20,
    generator: Generator,
) -> tuple[TextScore, ...]:
    """What predicting texts that have nothing to do with the clients' scores: the level of a control that must fail.

    Public texts share frequent words, so that ROUGE-1 of a blind guess is far from 0.

    Args:
      foreign: public texts of the same kind that are not the clients', in token ids.
      references: the clients'.
      special: as in `score_texts`.
      predictions: texts of each draw, without replacement: as many as the attack has said, since more guesses score
        more; None: as many as there are references.
      draws: independent draws; one score each.
      generator: of the draws.

    Raises:
      InvalidArgument: a foreign text is a reference, or there are too few.
    """
    number = len(references) if predictions is None else predictions
    at_least("draws", draws, 1)
    at_least("predictions", number, 0)
    require(len(foreign) >= number, f"{len(foreign)} foreign texts: a draw needs {number}")
    left_out = frozenset(special)
    guesses, truths = _without(foreign, left_out), _without(references, left_out)
    common = set(guesses) & set(truths)
    require(not common, f"{len(common)} of the foreign texts are references: leave them out, else they are no guesses")
    places = [torch.randperm(len(guesses), generator=generator)[:number].tolist() for _ in range(draws)]
    return tuple(_score([guesses[place] for place in drawn], truths) for drawn in places)


def attribution_accuracy(score: TextScore, said: Sequence[int], owners: Sequence[int]) -> float:
    """Share of the exactly recovered texts whose client is named rightly; NaN where none is recovered.

    Of a sum of n clients nothing tells who sent what: a guess is right 1 time in n. A text that two clients hold is
    compared with either of them, in no particular order.

    Args:
      score: of the texts.
      said: client of every prediction.
      owners: client of every reference.

    Raises:
      InvalidArgument: their numbers are not the score's.
    """
    for name, found, expected in (("said", said, score.predictions), ("owners", owners, score.references)):
        require(len(found) == expected, f"{name} has {len(found)} entries: expected {expected}, as the score")
    right = [said[pair.prediction] == owners[pair.reference] for pair in score.pairs if pair.exact]
    return sum(right) / len(right) if right else nan


def _score(predicted: Sequence[tuple[Unit, ...]], references: Sequence[tuple[Unit, ...]]) -> TextScore:
    require(len(references) > 0, "references=[]: expected at least one text")
    for place, text in enumerate(references):
        require(
            len(text) > 0, f"reference {place} has no token but special ones: leave it out, nothing can be recovered"
        )
    pairs = _matched(predicted, references)
    exact = sum(pair.exact for pair in pairs)
    single = sum(pair.rouge_1 for pair in pairs)
    said, true = {unit for text in predicted for unit in text}, {unit for text in references for unit in text}
    return TextScore(
        exact=exact / len(references),
        false=len(predicted) - exact,
        rouge_1=single / len(references),
        rouge_2=sum(pair.rouge_2 for pair in pairs) / len(references),
        rouge_l=sum(pair.rouge_l for pair in pairs) / len(references),
        precision=single / len(predicted) if predicted else 0.0,
        tokens=TokenScore(len(said & true) / len(true), len(said & true) / len(said) if said else 0.0),
        pairs=pairs,
        predictions=len(predicted),
        references=len(references),
    )


def _matched(predicted: Sequence[tuple[Unit, ...]], references: Sequence[tuple[Unit, ...]]) -> tuple[TextPair, ...]:
    from scipy.optimize import linear_sum_assignment

    if not predicted:
        return ()
    table = [[_pair(p, said, r, true) for r, true in enumerate(references)] for p, said in enumerate(predicted)]
    # One exact pair outweighs every gain that all other pairs together could make.
    bonus = 1.0 + len(references)
    values = torch.tensor(
        [[bonus * one.exact + (one.rouge_1 + one.rouge_2 + one.rouge_l) / 3 for one in row] for row in table],
        dtype=torch.float64,
    )
    rows, columns = linear_sum_assignment(values.numpy(), maximize=True)
    chosen = [table[p][r] for p, r in zip(rows.tolist(), columns.tolist(), strict=True)]
    return tuple(sorted((one for one in chosen if one.rouge_1 > 0), key=lambda one: one.reference))


def _pair(prediction: int, said: tuple[Unit, ...], reference: int, true: tuple[Unit, ...]) -> TextPair:
    return TextPair(
        prediction, reference, said == true, rouge_n(said, true, 1), rouge_n(said, true, 2), rouge_l(said, true)
    )


def _grams(text: Sequence[Unit], n: int) -> Counter[Unit]:
    if n == 1:
        return Counter(text)
    if n == 2:
        return Counter(pairwise(text))
    return Counter(tuple(text[first : first + n]) for first in range(len(text) - n + 1))


def _without(texts: Sequence[Sequence[int]], special: frozenset[int]) -> list[tuple[int, ...]]:
    return [tuple(token for token in text if token not in special) for text in texts]


def _words(text: str) -> tuple[str, ...]:
    return tuple(_WORD.findall(text.lower()))
