"""Signals against exact arithmetic, slow loops and hand values."""

from __future__ import annotations

import zlib
from decimal import Decimal, localcontext
from math import log

import numpy as np
import pytest
import torch

from privfm.attacks.membership.signals import (
    calibrated,
    label_log_odds,
    label_log_probability,
    mean_over_tokens,
    mean_token_log_odds,
    mean_token_log_probability,
    min_k,
    min_k_plus_plus,
    minus_loss,
    token_statistics,
    unpadded,
    zlib_ratio,
)
from privfm.checks import InvalidArgument


def exact_log_odds(logits: np.ndarray, label: int) -> float:
    """In decimals of 60 digits, which hold exp(20,000)."""
    with localcontext() as context:
        context.prec = 60
        weights = [Decimal(float(value)).exp() for value in logits]
        others = sum(weight for place, weight in enumerate(weights) if place != label)
        return float((weights[label] / others).ln())


@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0, 1e4])
def test_log_odds_are_exact_at_any_size(scale: float) -> None:
    generator = np.random.default_rng(0)
    logits, labels = generator.uniform(-scale, scale, (40, 7)), generator.integers(0, 7, 40)
    expected = [exact_log_odds(row, label) for row, label in zip(logits, labels, strict=True)]
    np.testing.assert_allclose(label_log_odds(logits, labels), expected, rtol=1e-12, atol=1e-14)


def test_float32_softmax_says_infinity_where_log_odds_are_finite() -> None:
    logits = np.array([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]], dtype=np.float32)
    labels = np.array([0, 0])
    with np.errstate(divide="ignore", over="ignore"):
        probability = torch.softmax(torch.from_numpy(logits), 1).numpy()[:, 0]
        saturated = np.log(probability) - np.log(1 - probability)
    assert not np.isfinite(saturated).any()
    assert label_log_odds(logits, labels).tolist() == [1e4, -2e4]
    assert label_log_probability(logits, labels).tolist() == [0.0, -2e4]


def test_log_probability_is_minus_the_cross_entropy_and_keeps_small_digits() -> None:
    generator = np.random.default_rng(1)
    logits, labels = generator.normal(size=(5, 30, 4)), generator.integers(0, 4, 30)
    spread = torch.from_numpy(np.broadcast_to(labels, (5, 30)).copy())
    expected = -torch.nn.functional.cross_entropy(torch.from_numpy(logits).movedim(2, 1), spread, reduction="none")
    np.testing.assert_allclose(label_log_probability(logits, labels), expected.numpy(), rtol=1e-12)
    assert label_log_probability(np.array([50.0, 0.0]), np.array(0)) == pytest.approx(-np.exp(-50.0), rel=1e-12)


def test_log_odds_of_two_classes_are_the_difference() -> None:
    logits = np.array([[3.0, 1.0], [1e4 + 0.5, 1e4]])
    assert label_log_odds(logits, np.array([0, 1])).tolist() == [2.0, -0.5]


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (np.zeros((2, 1)), np.zeros(2, int), "at least 2 classes"),
        (np.full((2, 3), np.inf), np.zeros(2, int), "finite"),
        (np.zeros((2, 3)), np.zeros(2), "whole numbers"),
        (np.zeros((2, 3)), np.array([0, 3]), "expected 0 to 2"),
        (np.zeros((2, 3)), np.array([0, -100]), "expected 0 to 2"),
        (np.zeros((2, 3)), np.zeros(3, int), r"expected \(2,\)"),
        (np.zeros((2, 3)), np.zeros((1, 2), int), r"expected \(2,\)"),
    ],
)
def test_what_has_no_log_odds_is_refused(logits: np.ndarray, labels: np.ndarray, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        label_log_odds(logits, labels)


def test_a_loss_changes_its_sign() -> None:
    losses = np.array([0.5, 2.0], dtype=np.float32)
    assert minus_loss(losses).tolist() == [-0.5, -2.0] and minus_loss(losses).dtype == np.float64
    with pytest.raises(InvalidArgument, match="finite"):
        minus_loss(np.array([np.nan]))


def test_tokens_padded_or_ragged_say_the_same() -> None:
    padded = np.array([[-1.0, -2.0, 7.0], [-3.0, 7.0, 7.0]])
    ragged = unpadded(padded, padded < 0)
    assert [row.tolist() for row in ragged] == [[-1.0, -2.0], [-3.0]]
    assert mean_token_log_probability(ragged).tolist() == [-1.5, -3.0]
    expected = [np.mean([log(np.exp(v) / (1 - np.exp(v))) for v in row]) for row in ragged]
    np.testing.assert_allclose(mean_token_log_odds(ragged), expected, rtol=1e-13)
    assert mean_over_tokens([np.array([1.0, 2.0])]).tolist() == [1.5]


def test_small_log_probabilities_keep_their_odds() -> None:
    """log p = -1e-20: the odds are 1e20; through 1 - exp(log p) they would be infinite."""
    assert mean_token_log_odds([np.array([-1e-20])])[0] == pytest.approx(20 * log(10), rel=1e-12)
    with pytest.raises(InvalidArgument, match=r"exactly 0.*token_statistics"):
        mean_token_log_odds([np.array([-1.0, 0.0])])


def test_bad_tokens_are_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"\[1\].*at least one"):
        mean_token_log_probability([np.array([-1.0]), np.array([])])
    with pytest.raises(InvalidArgument, match="at most 0"):
        min_k([np.array([0.5])])
    with pytest.raises(InvalidArgument, match="finite"):
        min_k([np.array([-np.inf])])
    with pytest.raises(InvalidArgument, match="share"):
        min_k([np.array([-1.0])], share=0.0)
    with pytest.raises(InvalidArgument, match="bool"):
        unpadded(np.zeros((1, 2)), np.ones((1, 2)))  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="a flag for each"):
        unpadded(np.zeros((1, 2)), np.ones((1, 3), dtype=bool))


def test_zlib_ratio_forgives_what_is_easy_for_everybody() -> None:
    texts = ["a" * 200, "the quick brown fox jumps over a lazy dog, é"]
    found = zlib_ratio(np.array([1.0, 1.0]), texts)
    assert found.tolist() == [-1 / len(zlib.compress(text.encode("utf-8"))) for text in texts]
    assert found[0] < found[1] < 0
    with pytest.raises(InvalidArgument, match=r"expected \(2,\)"):
        zlib_ratio(np.ones(3), texts)


@pytest.mark.parametrize("share", [0.1, 0.2, 0.5, 1.0])
def test_min_k_is_the_mean_of_the_lowest(share: float) -> None:
    generator = np.random.default_rng(2)
    rows = [-generator.exponential(size=size) for size in (1, 2, 7, 10, 31)]
    expected = []
    for row in rows:
        kept = sorted(row.tolist())[: max(1, int(len(row) * share))]
        expected.append(sum(kept) / len(kept))
    before = [row.copy() for row in rows]
    np.testing.assert_allclose(min_k(rows, share), expected, rtol=1e-13)
    assert all((a == b).all() for a, b in zip(rows, before, strict=True))


def test_min_k_plus_plus_scores_each_token_within_its_vocabulary() -> None:
    rows, means, spreads = [np.array([-1.0, -4.0])], [np.array([-2.0, -2.0])], [np.array([0.5, 4.0])]
    assert min_k_plus_plus(rows, means, spreads, share=1.0)[0] == ((-1 + 2) / 0.5 + (-4 + 2) / 4) / 2
    assert min_k_plus_plus(rows, means, spreads, share=0.5)[0] == -0.5
    with pytest.raises(InvalidArgument, match="1 are not positive"):
        min_k_plus_plus(rows, means, [np.array([0.0, 1.0])])
    with pytest.raises(InvalidArgument, match="one for each token"):
        min_k_plus_plus(rows, means, [np.array([1.0])])


@pytest.mark.parametrize("chunk", [1, 23, 1 << 22])
def test_statistics_of_tokens_equal_a_slow_loop(chunk: int) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = 5 * torch.randn(4, 6, 11, generator=generator)
    tokens = torch.randint(0, 11, (4, 6), generator=generator)
    mask = torch.arange(6) < torch.tensor([[6], [1], [3], [5]])
    tokens[~mask] = -100  # as labels are padded
    found = token_statistics(logits, tokens, mask, chunk)
    for text in range(4):
        count = int(mask[text].sum())
        assert [len(column[text]) for column in (found.log_probabilities, found.means)] == [count, count]
        for place in range(count):
            every = torch.log_softmax(logits[text, place].double(), 0)
            own, weights = every[tokens[text, place]], every.exp()
            mean = float((weights * every).sum())
            assert found.log_probabilities[text][place] == pytest.approx(float(own), rel=1e-10)
            assert found.log_odds[text][place] == pytest.approx(float(own - torch.log1p(-own.exp())), rel=1e-9)
            assert found.means[text][place] == pytest.approx(mean, rel=1e-10)
            variance = float((weights * every**2).sum()) - mean**2
            assert found.deviations[text][place] == pytest.approx(variance**0.5, rel=1e-7)
    assert np.isfinite(min_k_plus_plus(found.log_probabilities, found.means, found.deviations)).all()


def test_statistics_survive_half_precision_and_sure_tokens() -> None:
    logits = torch.tensor([[[1e4, -1e4, 0.0], [0.0, 1.0, 2.0]]], dtype=torch.float16)
    found = token_statistics(logits, torch.tensor([[0, 2]]), torch.ones(1, 2, dtype=torch.bool))
    assert found.log_odds[0][0] == 1e4 and found.log_probabilities[0][0] == 0.0 and found.deviations[0][0] == 0.0
    assert found.log_probabilities[0][1] == pytest.approx(2 - log(1 + np.e + np.e**2), rel=1e-12)


def test_statistics_refuse_what_does_not_fit() -> None:
    logits, tokens, mask = torch.zeros(1, 2, 3), torch.zeros(1, 2, dtype=torch.long), torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(InvalidArgument, match="vocabulary"):
        token_statistics(logits[0], tokens, mask)
    with pytest.raises(InvalidArgument, match="tokens"):
        token_statistics(logits, tokens[:, :1], mask)
    with pytest.raises(InvalidArgument, match="bool"):
        token_statistics(logits, tokens, mask.long())
    with pytest.raises(InvalidArgument, match="a token in each"):
        token_statistics(logits, tokens, ~mask)
    with pytest.raises(InvalidArgument, match="chunk"):
        token_statistics(logits, tokens, mask, chunk=0)


def test_calibration_subtracts_the_base_model() -> None:
    signal, base = np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([1.0, -1.0])
    assert calibrated(signal, base).tolist() == [[0.0, 3.0], [2.0, 5.0]]
    assert calibrated(signal, signal).tolist() == [[0.0, 0.0], [0.0, 0.0]]
    for wrong in (np.zeros(3), np.zeros((2, 1)), np.array(0.0)):
        with pytest.raises(InvalidArgument, match="base"):
            calibrated(signal, wrong)
