"""Exposure: known ranks, the chance level, the skew-normal fit, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from math import erfc, lgamma, log, log2, sqrt
from typing import Any

import mpmath
import numpy as np
import pytest
from scipy.stats import norm, skewnorm

from privfm.attacks.membership.exposure import SecretFormat, exposure, exposure_by_sampling, exposures
from privfm.attacks.membership.skew_normal import SkewNormal
from privfm.checks import InvalidArgument

DIGITS = SecretFormat(length=3)


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def hashed(texts: Sequence[str], spread: float = 1.0) -> Any:
    """A model that has seen no secret: a normal loss for every text, always the same."""
    return np.array([spread * np.random.default_rng(list(text.encode())).normal() for text in texts])


# ------------------------------------------------------------------------------------------------------------ formats


def test_a_format_writes_reads_and_counts_its_secrets() -> None:
    format = SecretFormat("my pin: ", "ab", 3, "-", "!")
    assert format.text("aba") == "my pin: a-b-a!"
    assert format.secret("my pin: a-b-a!") == "aba"
    assert format.members() == ["aaa", "aab", "aba", "abb", "baa", "bab", "bba", "bbb"]
    assert SecretFormat(length=9, separator="").text("281265017") == "the secret number is 281265017"


@pytest.mark.parametrize("length", [2, 12], ids=["shuffled", "drawn"])
def test_drawn_secrets_are_distinct_uniform_and_repeatable(length: int) -> None:
    format = SecretFormat(length=length)
    count = 50 if length == 2 else 5000
    secrets = format.drawn(count, generator())
    assert len(set(secrets)) == count
    assert secrets == format.drawn(count, generator()) != format.drawn(count, generator(1))
    assert all(format.secret(format.text(secret)) == secret for secret in secrets)
    shares = np.bincount([int(letter) for secret in secrets for letter in secret], minlength=10) / (count * length)
    assert np.abs(shares - 0.1).max() < 5 * sqrt(0.09 / (count * length))


def test_all_secrets_can_be_drawn_and_no_more() -> None:
    assert sorted(DIGITS.drawn(1000, generator())) == DIGITS.members()
    with pytest.raises(InvalidArgument, match="count=1001: the format has 1000"):
        DIGITS.drawn(1001, generator())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        pytest.param({"alphabet": "aab"}, "each once", id="letters twice"),
        pytest.param({"alphabet": "a"}, "at least 2 letters", id="one letter"),
        pytest.param({"length": 0}, "length=0", id="no letters"),
    ],
)
def test_bad_formats_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        SecretFormat(**fields)


def test_a_text_of_another_format_is_refused() -> None:
    for text in ("the secret number is 1 2", "the secret number is 1 2 x", "the secret number is 1-2-3", ""):
        with pytest.raises(InvalidArgument, match="no text of"):
            DIGITS.secret(text)
    with pytest.raises(InvalidArgument, match="too many to list"):
        SecretFormat(length=6).members()


# --------------------------------------------------------------------------------------------------------------- ranks


@pytest.mark.parametrize("k", [1, 4, 10])
def test_the_most_likely_of_two_to_the_k_has_k_bits(k: int) -> None:
    losses = generator().permutation(2**k).astype(float)
    assert exposure(losses, int(losses.argmin())) == k
    assert exposure(losses, int(losses.argmax())) == 0
    assert exposure(losses, int(np.flatnonzero(losses == 2 ** (k - 1) - 1)[0])) == 1


def test_ties_count_against_the_secret() -> None:
    assert exposure(np.ones(64), 5) == 0
    assert exposure(np.array([1.0, 1.0, 2.0, 3.0]), 0) == 1  # rank 2 of 4


def test_every_rank_against_a_sorted_list() -> None:
    losses = generator(3).normal(size=100)
    order = sorted(losses)
    for place, loss in enumerate(losses):
        assert exposure(losses, place) == pytest.approx(log2(100 / (order.index(loss) + 1)))


def test_a_secret_never_inserted_has_one_over_ln_two_bits_on_average() -> None:
    """Uniform rank: E[log2(R / rank)] = log2 R - log2(R!) / R, which tends to 1 / ln 2 (Stirling)."""
    losses = generator(4).normal(size=4096)
    mean = np.mean([exposure(losses, place) for place in range(4096)])
    assert mean == pytest.approx(12 - lgamma(4097) / log(2) / 4096, abs=1e-9)
    assert mean == pytest.approx(1 / log(2), abs=0.002)
    remembered = np.mean([exposure(losses - 1.0 * (np.arange(4096) == place), place) for place in range(4096)])
    assert remembered > 2.5  # a loss lower by one standard deviation is told apart


@pytest.mark.parametrize(
    ("losses", "place", "message"),
    [
        pytest.param(np.array([1.0, np.nan]), 0, "not finite", id="nan"),
        pytest.param(np.array([1.0, np.inf]), 0, "not finite", id="infinite"),
        pytest.param(np.ones(3), 3, "there are 3", id="beyond the last"),
        pytest.param(np.ones((2, 2)), 0, r"\(n,\)", id="matrix"),
    ],
)
def test_bad_losses_are_refused(losses: Any, place: int, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        exposure(losses, place)


# -------------------------------------------------------------------------------------------------------- skew-normal


@pytest.mark.parametrize("shape", [-4.0, -1.0, 1.5, 6.0])
def test_the_fit_is_the_most_likely_one_and_close_to_the_truth(shape: float) -> None:
    values = np.asarray(skewnorm.rvs(shape, 7, 3, size=2000, random_state=generator(5)))
    fit = SkewNormal.fitted(values)
    slow = skewnorm.fit(values, shape, loc=7, scale=3)  # scipy's simplex, started at the truth
    mine = skewnorm.logpdf(values, fit.shape, fit.location, fit.scale).sum()
    assert mine >= skewnorm.logpdf(values, *slow).sum() - 1e-3
    assert fit.location == pytest.approx(7, abs=0.5)
    assert fit.scale == pytest.approx(3, rel=0.1)
    assert fit.shape == pytest.approx(shape, rel=0.35)
    assert fit.misfit(values) < 1.36 / sqrt(2000)
    assert SkewNormal(7, 3, -shape).misfit(values) > 0.1


def test_a_fit_of_normal_values_leaves_the_stationary_point_at_shape_zero() -> None:
    values = generator(6).normal(size=3000)
    fit = SkewNormal.fitted(values)
    assert fit.misfit(values) < 1.36 / sqrt(3000)
    assert fit.log_cdf(-3.0) / log(2) == pytest.approx(norm.logcdf(-3) / log(2), abs=1.5)


def test_half_normal_values_do_not_run_away() -> None:
    fit = SkewNormal.fitted(np.abs(generator(7).normal(size=300)))
    assert 5 < fit.shape <= 30


@pytest.mark.parametrize("shape", [-5.0, 0.0, 0.7, 4.0, 30.0])
@pytest.mark.parametrize("z", [-40.0, -8.0, -1.0, 0.0, 2.0])
def test_the_tail_against_thirty_digits(z: float, shape: float) -> None:
    with mpmath.workdps(30):
        slope = max(1, abs(z)) * (1 + shape**2)
        points = [z - mpmath.mpf(k) / slope for k in (0, 1, 4, 16, 64, 256, 4096, 65536)]
        density = lambda x: 2 * mpmath.npdf(x) * mpmath.erfc(-shape * x / mpmath.sqrt(2)) / 2  # noqa: E731
        expected = float(mpmath.log(mpmath.quad(density, points[::-1])))
    assert SkewNormal(0, 1, shape).log_cdf(z) == pytest.approx(expected, rel=1e-7, abs=1e-10)
    assert SkewNormal(2, 3, shape).log_cdf(2 + 3 * z) == pytest.approx(expected, rel=1e-7, abs=1e-10)


# ------------------------------------------------------------------------------------------------------------ sampling


@pytest.mark.parametrize("z", [-1.0, -2.0, -3.0])
def test_sampling_and_the_fit_find_the_exact_rank_of_synthetic_losses(z: float) -> None:
    everybody = 20 + 2 * norm.ppf((np.arange(100_000) + 0.5) / 100_000)
    place = int((everybody < 20 + 2 * z).sum())
    exact = exposure(everybody, place)
    assert exact == pytest.approx(-log2(0.5 * erfc(-z / sqrt(2))), abs=0.02)
    draws = generator(9)
    rest = np.delete(everybody, place)
    found = [
        exposure_by_sampling(float(everybody[place]), draws.choice(rest, 2000, replace=False), 100_000, draws, 40)
        for _ in range(8)
    ]
    assert sum(one.low <= exact <= one.high for one in found) >= 5  # of 95 % intervals; below with probability 4e-4
    assert sum(one.low <= exact - 2 <= one.high for one in found) <= 2
    assert all(one.fitted_low < one.fitted < one.fitted_high for one in found)  # type: ignore[operator]
    # One has a standard deviation of 0.4 bits at the deepest.
    assert np.mean([one.fitted for one in found]) == pytest.approx(exact, abs=0.5)


def test_the_fit_says_more_than_the_references_can() -> None:
    others = generator(11).normal(0.0, 1.0, size=2000)
    found = exposure_by_sampling(-6.0, others, 10**12, generator(12), 60)
    assert found.bits == found.resolution == pytest.approx(log2(2001))
    assert found.high == pytest.approx(log2(10**12))
    assert found.low == pytest.approx(-log2(1 - 0.025 ** (1 / 2000)), abs=1e-3)  # no hit in 2,000: exact upper limit
    assert found.fitted is not None and found.fitted_low is not None and found.fitted_high is not None
    assert found.fitted_low < -float(norm.logcdf(-6)) / log(2) < found.fitted_high
    assert found.fitted > found.resolution + 5


def test_a_family_that_does_not_fit_shows_in_the_misfit() -> None:
    others = np.concatenate([generator(13).normal(-4, 1, 1000), generator(14).normal(4, 1, 1000)])
    found = exposure_by_sampling(-8.0, others, 10**9, generator(), 40)
    assert found.misfit is not None and found.misfit > 0.1


def test_the_counted_interval_covers_and_a_shifted_truth_is_missed() -> None:
    """95 % exact intervals: at most 20 of 200 miss (Bin(200, .05) exceeds 20 with probability 0.0011)."""
    truth, draws = 0.05, generator(15)
    intervals = [_interval(int(likely)) for likely in draws.binomial(200, truth, size=200)]
    assert sum(not low <= -log2(truth) <= high for low, high in intervals) <= 20
    assert sum(not low <= -log2(truth) + 2 <= high for low, high in intervals) > 180


@cache
def _interval(likely: int) -> tuple[float, float]:
    """Of a secret that `likely` of 200 references are as likely as; it depends on nothing else."""
    others = np.concatenate([np.linspace(-2, -1, likely), np.linspace(1, 2, 200 - likely)])
    found = exposure_by_sampling(0.0, others, 10**9, generator(), 40)
    return found.low, found.high


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"others": np.ones(10)}, "at least 100", id="few references"),
        pytest.param({"canary": float("nan")}, "canary=nan", id="nan"),
        pytest.param({"space": 50}, "space=50", id="small space"),
        pytest.param({"resamples": 5}, "resamples=5", id="few resamples"),
        pytest.param({"others": np.ones(200)}, "all the same", id="all alike"),
    ],
)
def test_bad_samples_are_refused(change: dict[str, Any], message: str) -> None:
    given = {"canary": 0.0, "others": np.arange(200.0), "space": 10**6, "generator": generator()}
    with pytest.raises(InvalidArgument, match=message):
        exposure_by_sampling(**{**given, **change})


# --------------------------------------------------------------------------------------------------------- by copies


def test_exposure_grows_with_copies_and_is_chance_without_them() -> None:
    copies = {"123": 0, "456": 1, "789": 16}

    def trained(texts: Sequence[str]) -> Any:
        losses = hashed(texts)
        for place, text in enumerate(texts):
            losses[place] = losses[place] - copies.get(DIGITS.secret(text), 0)
        return losses

    found = exposures(trained, copies, DIGITS, generator(), without=hashed)
    assert [(row.secret, row.copies) for row in found] == [("123", 0), ("456", 1), ("789", 16)]
    most = log2(1000 - 2)  # the two others that were put in are no competitors
    assert found[2].exposure.bits == found[2].exposure.resolution == pytest.approx(most)
    exact = [(row.exposure.space, row.exposure.references, row.exposure.fitted) for row in found]
    assert exact == [(998, 997, None)] * 3
    assert all(row.exposure.low == row.exposure.bits == row.exposure.high for row in found)
    assert all(row.without is not None and row.without.bits < 8 for row in found)
    assert found[0].without is not None and found[0].exposure.bits == found[0].without.bits
    alone = [secret for secret in DIGITS.members() if secret not in ("123", "789")]
    losses = trained(DIGITS.texts(alone))
    assert found[1].exposure.bits == pytest.approx(exposure(losses, alone.index("456")))


def test_a_large_format_is_sampled() -> None:
    format = SecretFormat(length=12)
    secret = "281265017391"

    def trained(texts: Sequence[str]) -> Any:
        return hashed(texts) - 9.0 * (np.array(texts) == format.text(secret))

    row = exposures(trained, {secret: 3}, format, generator(), without=hashed, references=1000, resamples=40)[0]
    assert row.exposure.references == 1000 and row.exposure.space == 10**12
    assert row.exposure.fitted is not None and row.exposure.fitted > 20
    assert row.without is not None and row.without.fitted is not None and row.without.fitted < 8
    assert row == exposures(trained, {secret: 3}, format, generator(), without=hashed, references=1000, resamples=40)[0]


def test_bad_uses_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="copies is empty"):
        exposures(hashed, {}, DIGITS, generator())
    with pytest.raises(InvalidArgument, match="copies of 123"):
        exposures(hashed, {"123": -1}, DIGITS, generator())
    with pytest.raises(InvalidArgument, match="secret='12'"):
        exposures(hashed, {"12": 1}, DIGITS, generator())
    with pytest.raises(InvalidArgument, match="one a text"):
        exposures(lambda texts: np.ones(3), {"123": 1}, DIGITS, generator())
    with pytest.raises(InvalidArgument, match="none is left"):
        exposures(hashed, {"a": 1, "b": 1}, SecretFormat(alphabet="ab", length=1), generator())
