"""Text scores against values by hand, slow loops and all assignments tried one by one."""

from __future__ import annotations

import math
import random
from collections import Counter
from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import Generator

from privfm.attacks.reconstruction.text_scores import (
    TokenScore,
    attribution_accuracy,
    chance_scores,
    common_length,
    rouge_l,
    rouge_n,
    score_counts,
    score_texts,
    score_tokens,
    score_words,
)
from privfm.checks import InvalidArgument

GUNMAN = ["police", "killed", "the", "gunman"]
"""Lin 2004, section 3: the reference."""

short_texts = st.lists(st.integers(0, 4), max_size=9)


def slow_common_length(one: list[int], other: list[int]) -> int:
    """The textbook table."""
    table = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
    for i, a in enumerate(one):
        for j, b in enumerate(other):
            table[i + 1][j + 1] = table[i][j] + 1 if a == b else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


@pytest.mark.parametrize(
    ("said", "n", "expected"),
    [
        # Lin's two candidates: ROUGE-2 is equal, ROUGE-L is not.
        ("police kill the gunman", 1, 3 / 4),
        ("police kill the gunman", 2, 1 / 3),
        ("the gunman kill police", 1, 3 / 4),
        ("the gunman kill police", 2, 1 / 3),
        # By hand: "the" counts once of three times: 1 common, 3 + 4 tokens.
        ("the the the", 1, 2 / 7),
        ("the the the", 2, 0),
        ("", 1, 0),
    ],
)
def test_rouge_n_by_hand(said: str, n: int, expected: float) -> None:
    assert rouge_n(said.split(), GUNMAN, n) == pytest.approx(expected)


def test_rouge_l_tells_orders_apart_as_in_the_paper() -> None:
    assert rouge_l(["police", "kill", "the", "gunman"], GUNMAN) == 3 / 4
    assert rouge_l(["the", "gunman", "kill", "police"], GUNMAN) == 2 / 4


def test_texts_too_short_for_a_bigram() -> None:
    assert rouge_n([5], [5], 2) == 1 and rouge_n([5], [6], 2) == 0
    assert rouge_n([5], [5, 6], 2) == 0 and rouge_n([5, 6], [5], 2) == 0
    assert rouge_n([], [], 1) == 1 and rouge_l([], []) == 1 and rouge_l([], [1]) == 0


@given(short_texts, short_texts)
def test_rouge_equals_slow_loops(one: list[int], other: list[int]) -> None:
    assert common_length(one, other) == slow_common_length(one, other)
    for n in (1, 2, 3):
        grams = [Counter(tuple(text[i : i + n]) for i in range(len(text) - n + 1)) for text in (one, other)]
        common = sum(min(number, grams[1][gram]) for gram, number in grams[0].items())
        sizes = [max(len(text) - n + 1, 0) for text in (one, other)]
        if not any(sizes):
            assert rouge_n(one, other, n) == float(one == other)
            continue
        recall, precision = (common / size if size else 0.0 for size in sizes)
        expected = 2 * recall * precision / (recall + precision) if common else 0.0
        assert rouge_n(one, other, n) == pytest.approx(expected)
        assert rouge_n(one, other, n) == rouge_n(other, one, n) <= 1


def test_common_length_of_long_texts() -> None:
    source = random.Random(7)
    one, other = ([source.randrange(6) for _ in range(n)] for n in (150, 131))  # more than two machine words
    assert common_length(one, other) == slow_common_length(one, other)


def test_everything_recovered_in_another_order_scores_one() -> None:
    references = [(1, 2, 3), (4, 5), (6,), (1, 2, 3)]
    score = score_texts(references[::-1], references)
    assert (score.exact, score.false, score.rouge_1, score.rouge_2, score.rouge_l) == (1, 0, 1, 1, 1)
    assert score.precision == 1 and score.tokens == TokenScore(1, 1)
    assert [pair.reference for pair in score.pairs] == [0, 1, 2, 3] and all(pair.exact for pair in score.pairs)


def test_one_prediction_answers_for_one_reference() -> None:
    score = score_texts([(1, 2, 3)], [(1, 2, 3), (1, 2, 3), (1, 2, 4)])
    assert score.exact == score.rouge_1 == score.rouge_2 == 1 / 3  # with replacement the third would count as well
    again = score_texts([(1, 2, 3)] * 3, [(1, 2, 3), (7, 8)])
    assert (again.exact, again.false, len(again.pairs)) == (0.5, 2, 1)  # a text said twice is true once


def test_surplus_predictions_are_kept_and_said() -> None:
    references = [(1, 2), (3, 4)]
    guesses = [(9, 9), (1, 2), (8, 3), (3, 4), (7, 7)]
    score = score_texts(guesses, references)
    assert (score.exact, score.rouge_1, score.false, score.precision) == (1, 1, 3, 2 / 5)
    assert [(pair.prediction, pair.reference) for pair in score.pairs] == [(1, 0), (3, 1)]
    assert score.tokens == TokenScore(1, 4 / 7)  # 1 2 3 4 of 1 2 3 4 7 8 9


def test_missing_predictions_count_zero() -> None:
    score = score_texts([], [(1, 2), (3, 4)])
    assert (score.exact, score.false, score.rouge_1, score.rouge_2, score.rouge_l, score.precision) == (0,) * 6
    assert score.pairs == () and score.tokens == TokenScore(0, 0)


def test_pairs_without_anything_common_are_none() -> None:
    score = score_texts([(1, 2), (8, 9)], [(1, 3), (4, 5)])
    assert [(pair.prediction, pair.reference) for pair in score.pairs] == [(0, 0)]


def test_special_tokens_earn_nothing() -> None:
    bare = score_texts([(7, 8)], [(7, 9)])
    dressed = score_texts([(101, 7, 8, 102, 0)], [(101, 7, 9, 102)], special=(101, 102, 0))
    assert dressed == bare and bare.rouge_1 == 0.5
    assert score_texts([(101, 7, 8, 102)], [(101, 7, 9, 102)]).rouge_1 == 0.75


@given(
    st.lists(short_texts, max_size=4),
    st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=6), min_size=1, max_size=4),
)
def test_the_assignment_is_the_best_of_all(predicted: list[list[int]], references: list[list[int]]) -> None:
    """Most exact texts, then the largest sum; tried on all ways to give predictions, or nothing, to references."""
    places: list[int | None] = [*range(len(predicted)), *[None] * len(references)]

    def worth(assigned: tuple[int | None, ...]) -> tuple[int, float]:
        exact, total = 0, 0.0
        for reference, place in zip(references, assigned, strict=True):
            if place is not None:
                said = predicted[place]
                exact += said == reference
                total += (rouge_n(said, reference, 1) + rouge_n(said, reference, 2) + rouge_l(said, reference)) / 3
        return exact, total

    candidates = [worth(chosen) for chosen in set(permutations(places, len(references)))]
    exact = max(one[0] for one in candidates)
    best = max(total for found, total in candidates if found == exact)
    score = score_texts(predicted, references)
    assert score.exact == exact / len(references) and score.false == len(predicted) - exact
    found = sum((pair.rouge_1 + pair.rouge_2 + pair.rouge_l) / 3 for pair in score.pairs)
    assert found == pytest.approx(best)
    assert score.rouge_1 == pytest.approx(sum(pair.rouge_1 for pair in score.pairs) / len(references))


def test_an_exact_text_is_not_given_away_for_a_larger_sum() -> None:
    whole, first, last = (1, 2, 3, 4, 5, 6, 7, 8), (1, 2, 3, 4), (5, 6, 7, 8)
    score = score_texts([whole, last], [whole, first])
    # Crosswise each pair has 2/3, 3/5 and 2/3, in sum more than the exact pair's 1 and the rest's 0.
    assert score.exact == 0.5 and score.rouge_1 == 0.5 and len(score.pairs) == 1


def test_tokens_are_distinct_and_special_ones_left_out() -> None:
    assert score_tokens(frozenset({1, 2, 9, 101}), [(101, 1, 1, 2), (101, 3)], special=(101,)) == TokenScore(
        2 / 3, 2 / 3
    )
    assert score_tokens(frozenset(), [(1,)]) == TokenScore(0, 0)


def test_counts_are_clipped() -> None:
    assert score_counts({1: 3, 2: 0, 5: 1}, {1: 1, 2: 2}) == TokenScore(1 / 3, 1 / 4)
    with pytest.raises(InvalidArgument, match="nothing of it can be recovered"):
        score_counts({1: 1}, {2: 0})
    with pytest.raises(InvalidArgument, match=">= 0"):
        score_counts({1: -1}, {2: 1})


def test_words_ignore_case_and_punctuation_only() -> None:
    score = score_words(["return the SUM, of x_1."], ["Returns the sum of x_1", "nothing"])
    assert score.exact == 0 and score.pairs[0].rouge_1 == 4 / 5  # "return" is not "returns"
    assert score_words(["Größe: 3"], ["größe 3"]).exact == 1


def test_foreign_texts_score_their_common_words_and_no_text() -> None:
    source = random.Random(3)
    pool = list(dict.fromkeys(tuple(source.choices(range(60), k=8)) for _ in range(80)))
    references, foreign = pool[:6], pool[6:]
    scores = chance_scores(foreign, references, draws=15, generator=Generator().manual_seed(1))
    assert len(scores) == 15 and len({score.rouge_1 for score in scores}) > 2
    assert all(score.exact == 0 and score.false == score.predictions == 6 for score in scores)
    assert 0 < max(score.rouge_1 for score in scores) < 0.4
    many = chance_scores(foreign, references, predictions=60, draws=15, generator=Generator().manual_seed(1))
    # More guesses score more, which is why a control says as many as the attack; its precision tells.
    assert min(score.rouge_1 for score in many) > max(score.rouge_1 for score in scores)
    assert max(score.precision for score in many) < min(score.precision for score in scores)
    again = chance_scores(foreign, references, draws=15, generator=Generator().manual_seed(1))
    assert again == scores


def test_attribution_is_among_the_recovered() -> None:
    score = score_texts([(1, 2), (3, 4), (9, 9)], [(3, 4), (1, 2), (5, 6), (9, 8)])
    assert attribution_accuracy(score, [0, 1, 5], [1, 1, 0, 5]) == 0.5  # the third is near, not recovered
    assert math.isnan(attribution_accuracy(score_texts([], [(1,)]), [], [0]))
    with pytest.raises(InvalidArgument, match="owners has 1 entries: expected 4"):
        attribution_accuracy(score, [0, 0, 0], [1])


def test_what_cannot_be_scored_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="at least one text"):
        score_texts([(1,)], [])
    with pytest.raises(InvalidArgument, match="reference 1 has no token but special ones"):
        score_texts([(1,)], [(1,), (0,)], special=(0,))
    with pytest.raises(InvalidArgument, match="1 of the foreign texts are references"):
        chance_scores([(0, 1), (2,)], [(1,)], (0,), generator=Generator())
    with pytest.raises(InvalidArgument, match="1 foreign texts: a draw needs 2"):
        chance_scores([(2,)], [(1,), (3,)], generator=Generator())
    with pytest.raises(InvalidArgument, match="n=0"):
        rouge_n([1], [1], 0)
