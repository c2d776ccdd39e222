"""A planted difference is found, a random split is not flagged more often than was said."""

from __future__ import annotations

import numpy as np
import pytest

from privfm.attacks.membership import blind
from privfm.attacks.membership.blind import FALSE_ALARMS, Blind, BlindGuess, blind_features, blind_texts
from privfm.attacks.membership.curves import Interval
from privfm.checks import InvalidArgument

WORDS = [f"w{number}" for number in range(400)]
OFTEN = 1 / np.arange(1, 401)


def texts(generator: np.random.Generator, count: int, length: float = 20.0) -> list[str]:
    """Words by Zipf's law."""
    sizes = 3 + generator.poisson(length, count)
    return [" ".join(generator.choice(WORDS, size, p=OFTEN / OFTEN.sum())) for size in sizes]


def halves(count: int) -> np.ndarray:
    return np.arange(count) < count // 2


def test_a_vocabulary_of_another_time_is_found() -> None:
    generator = np.random.default_rng(0)
    early, late = texts(generator, 150), texts(generator, 150)
    late = [f"{text} in 2024" if generator.random() < 0.5 else text for text in late]
    found = blind_texts([*early, *late], halves(300), generator)
    assert not found.fair and found.strongest.clue == "words" and found.auc.low > 0.6
    assert found.auc.value > found.strongest.detectable
    assert "The split is unfair" in found.sentence and "every attack's score is void" in found.sentence


def test_another_length_is_found() -> None:
    generator = np.random.default_rng(1)
    both = [*texts(generator, 150, 20.0), *texts(generator, 150, 25.0)]
    found = blind_texts(both, halves(300), generator)
    assert not found.fair and found.strongest.clue == "length"
    same = texts(generator, 300)
    lengths = [50 + number % 7 + 4 * (number < 150) for number in range(300)]
    assert blind_texts(same, halves(300), generator).fair
    assert not blind_texts(same, halves(300), generator, lengths).fair


def test_lengths_in_between_are_found_too() -> None:
    """Members are neither longer nor shorter on average, but all of one length."""
    generator = np.random.default_rng(2)
    lengths = np.where(halves(300), 40, generator.choice([20, 80], 300)).tolist()
    found = blind_texts(texts(generator, 300), halves(300), generator, lengths)
    assert not found.fair and found.strongest.clue == "length" and found.auc.value > 0.95


def test_features_that_differ_in_mean_or_in_spread_are_found() -> None:
    generator = np.random.default_rng(3)
    noise = generator.normal(size=(400, 6))
    assert not blind_features(noise + 0.4 * halves(400)[:, None], halves(400), generator).fair
    assert not blind_features(noise * np.where(halves(400), 1.4, 1.0)[:, None], halves(400), generator).fair


@pytest.mark.parametrize("kind", ["texts", "features"])
def test_random_splits_are_not_flagged(kind: str) -> None:
    """At 1 % three or more of 40 have a probability of 0.7 %; and p-values are not small either."""
    flagged, p_values = 0, []
    for seed in range(40):
        generator = np.random.default_rng(seed)
        members = generator.permutation(64) < 28
        if kind == "texts":
            found = blind_texts(texts(generator, 64), members, generator)
        else:
            found = blind_features(generator.normal(size=(64, 3)), members, generator)
        flagged += not found.fair
        p_values += [guess.p_value for guess in found.guesses]
    assert flagged <= 2
    assert 0.3 < np.mean(p_values) < 0.7


def test_the_verdict_is_that_of_its_p_values() -> None:
    """An AUC above `detectable` is flagged, one at it is not: both are of the same permutations."""
    for gap in np.linspace(0.0, 0.6, 9):
        generator = np.random.default_rng(4)
        features = generator.normal(size=(100, 1)) + gap * halves(100)[:, None]
        found = blind_features(features, halves(100), generator)
        guess = found.guesses[0]
        assert found.fair == (guess.p_value > FALSE_ALARMS) == (guess.auc.value <= guess.detectable)


def test_scores_of_a_fold_are_those_of_a_model_that_never_saw_it() -> None:
    """Against scikit-learn's ridge regression with the same kernel, fold by fold."""
    from sklearn.kernel_ridge import KernelRidge
    from sklearn.metrics import roc_auc_score

    generator = np.random.default_rng(5)
    features = generator.normal(size=(60, 4))
    kernel, members = features @ features.T, halves(60)
    folds = blind._folds(members, generator)
    assert [(int(members[folds == fold].sum()), int((folds == fold).sum())) for fold in range(5)] == [(6, 12)] * 5
    labels = np.stack([members, generator.permutation(members)], axis=1)
    scores = blind._out_of_fold(kernel, labels, folds)
    for fold in range(5):
        held = folds == fold
        known = labels[~held].astype(float)
        ridge = KernelRidge(alpha=1.0, kernel="precomputed")
        ridge.fit(kernel[np.ix_(~held, ~held)], known - known.mean(axis=0))
        np.testing.assert_allclose(scores[held], ridge.predict(kernel[np.ix_(held, ~held)]), atol=1e-10)
    expected = [roc_auc_score(labels[:, column], scores[:, column]) for column in range(2)]
    np.testing.assert_allclose(blind._areas(scores, labels), expected, atol=1e-12)


def test_the_kernel_of_words_is_that_of_weighted_counts() -> None:
    from sklearn.feature_extraction.text import TfidfVectorizer

    generator = np.random.default_rng(6)
    some = ["A word, a WORD!", "", *texts(generator, 6)]
    kernel = blind._word_kernel([blind.Counter(blind._WORD.findall(text.lower())) for text in some])
    counts = TfidfVectorizer(token_pattern=r"\w+|[^\w\s]", norm=None, use_idf=False).fit_transform(some).toarray()
    weighted = np.log1p(counts) * (np.log((1 + len(some)) / (1 + (counts > 0).sum(0))) + 1)
    weighted /= np.maximum(np.linalg.norm(weighted, axis=1, keepdims=True), 1e-300)
    np.testing.assert_allclose(kernel, weighted @ weighted.T, atol=1e-12)


def test_what_says_nothing_is_at_chance() -> None:
    """Equal texts, constant features: every score is a tie."""
    generator = np.random.default_rng(7)
    for found in (
        blind_texts(["the same"] * 60, halves(60), generator),
        blind_features(np.full((60, 2), 0.1), halves(60), generator),
    ):
        assert found.fair and {guess.auc.value for guess in found.guesses} == {0.5}
        assert {guess.p_value for guess in found.guesses} == {1.0}


def test_of_very_many_examples_some_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blind, "LARGEST", 100)
    generator = np.random.default_rng(8)
    features = generator.normal(size=(1000, 1)) + 2.0 * halves(1000)[:, None]
    found = blind_features(features, halves(1000), generator)
    assert found.examples == 100 and not found.fair and "100 examples" in found.sentence


def test_the_same_seed_says_the_same_and_nothing_else_moves(untouched_random_state: None) -> None:
    some = texts(np.random.default_rng(9), 60)
    one, same, other = (blind_texts(some, halves(60), np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert one == same != other


def test_sentences_say_what_was_found_and_what_could_have_been() -> None:
    guess = BlindGuess("words", Interval(0.51, 0.46, 0.56), 0.3, 0.57)
    sentence = Blind((guess,), 1234, True).sentence
    assert "words: AUC 0.51 [0.46, 0.56], p=0.3, found from 0.57; 1,234 examples" in sentence and "1 %" in sentence
    assert "unfair:" not in sentence


def test_bad_arguments_are_refused() -> None:
    generator = np.random.default_rng(0)
    with pytest.raises(InvalidArgument, match="members"):
        blind_texts(["a"] * 60, halves(59), generator)
    with pytest.raises(InvalidArgument, match="others=24"):
        blind_texts(["a"] * 60, np.arange(60) < 36, generator)
    with pytest.raises(InvalidArgument, match="lengths"):
        blind_texts(["a"] * 60, halves(60), generator, [1])
    with pytest.raises(InvalidArgument, match="flatten"):
        blind_features(np.zeros((60, 2, 2)), halves(60), generator)
    with pytest.raises(InvalidArgument, match="finite"):
        blind_features(np.full((60, 1), np.nan), halves(60), generator)
    with pytest.raises(InvalidArgument, match="bool"):
        blind_features(np.zeros((60, 1)), np.ones(60), generator)  # type: ignore[arg-type]
