"""Exposure: by how many bits a model gives away a secret that was put into its training data.

A secret has a known format and random letters. A model that has not seen it finds all secrets of the format about
equally likely; the rank of the inserted one among all of them says what it remembers. What is ranked is a secret's
loss: the sum of the losses of its random letters, in nats, smaller means more likely.

Source of all of it: Carlini, Liu, Erlingsson, Kos, Song, "The secret sharer: evaluating and testing unintended
memorization in neural networks", 2019, section 4.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import log, log2
from typing import Final, final

import numpy as np
from numpy.typing import NDArray

from privfm.attacks.membership.skew_normal import SkewNormal
from privfm.attacks.rates import lower_rate, upper_rate
from privfm.checks import at_least, require

Array = NDArray[np.float64]

_ENUMERATED: Final = 100_000
"""Secrets up to which a format is ranked whole: their losses take a small model some minutes."""

_SHUFFLED: Final = 1_000_000
"""Secrets up to which distinct ones are drawn by shuffling all, and beyond by drawing until enough are distinct."""

_CONFIDENCE: Final = 0.95
"""Of all intervals here."""


@dataclass(frozen=True)
class SecretFormat:
    """Texts that are alike but for random letters: `prefix` + letters joined by `separator` + `suffix`.

    Args:
      prefix: what comes before the secret, and is known.
      alphabet: the letters, distinct; each is drawn uniformly.
      length: letters of a secret.
      separator: between letters. A space makes each letter a token of its own to most tokenizers.
      suffix: what comes after it.

    >>> SecretFormat(length=2, suffix=".").text("42"), SecretFormat().size
    ('the secret number is 4 2.', 10000)
    """

    prefix: str = "the secret number is "
    alphabet: str = "0123456789"
    length: int = 4
    separator: str = " "
    suffix: str = ""

    def __post_init__(self) -> None:
        at_least("length", self.length, 1)
        distinct = len(set(self.alphabet)) == len(self.alphabet) >= 2
        require(distinct, f"alphabet={self.alphabet!r}: expected at least 2 letters, each once")

    @property
    def size(self) -> int:
        """Number of secrets, |R|."""
        return int(len(self.alphabet) ** self.length)

    def text(self, secret: str) -> str:
        """The text that holds a secret.

        Raises:
          InvalidArgument: it has another length or other letters.
        """
        fits = len(secret) == self.length and set(secret) <= set(self.alphabet)
        require(fits, f"secret={secret!r}: expected {self.length} letters of {self.alphabet!r}")
        return f"{self.prefix}{self.separator.join(secret)}{self.suffix}"

    def texts(self, secrets: Sequence[str]) -> list[str]:
        """The texts that hold some secrets."""
        return [self.text(secret) for secret in secrets]

    def secret(self, text: str) -> str:
        """The secret that a text holds.

        Raises:
          InvalidArgument: the text is not of the format.
        """
        letters = text[len(self.prefix) : len(text) - len(self.suffix)][:: 1 + len(self.separator)]
        fits = len(letters) == self.length and set(letters) <= set(self.alphabet) and self.text(letters) == text
        require(fits, f"{text!r} is no text of {self}")
        return letters

    def members(self) -> list[str]:
        """All secrets, in the order of the alphabet.

        Raises:
          InvalidArgument: there are too many to be ranked.
        """
        require(self.enumerable, f"{self.size} secrets are too many to list (at most {_ENUMERATED}); use drawn")
        return ["".join(letters) for letters in product(self.alphabet, repeat=self.length)]

    @property
    def enumerable(self) -> bool:
        """Whether there are so few that all are ranked."""
        return self.size <= _ENUMERATED

    def drawn(self, count: int, generator: np.random.Generator) -> list[str]:
        """Distinct secrets, uniform among all sets of `count`.

        Raises:
          InvalidArgument: there are not so many.
        """
        at_least("count", count, 0)
        require(count <= self.size, f"count={count}: the format has {self.size} secrets")
        if self.size <= _SHUFFLED:
            return [self._spelled(int(number)) for number in generator.permutation(self.size)[:count]]
        letters, found = np.array(list(self.alphabet)), dict[str, None]()
        while len(found) < count:
            chosen = letters[generator.integers(len(letters), size=(count - len(found), self.length))]
            found.update(dict.fromkeys("".join(row) for row in chosen))
        return list(found)

    def _spelled(self, number: int) -> str:
        """The secret of a number below `size`."""
        letters = []
        for _ in range(self.length):
            number, place = divmod(number, len(self.alphabet))
            letters.append(self.alphabet[place])
        return "".join(reversed(letters))


@final
@dataclass(frozen=True)
class Exposure:
    """What a model gives away of one secret, in bits.

    A secret that the model never saw has 1/ln 2 = 1.44 bits on average, and k bits or more with probability 2^-k: it
    takes many bits, or a comparison with a model that was trained without it, to say that anything was remembered.

    Attributes:
      bits: log2 |R| - log2 rank, or its estimate -log2 of (1 + references as likely) / (1 + references).
      low: of a 95 % interval for what a ranking of all secrets would say; `bits` where all were ranked.
      high: its other end; at most log2 |R|.
      resolution: the most that `bits` could say: log2 |R|, or log2 (1 + references).
      space: secrets of the format, |R|.
      references: other secrets whose losses were compared.
      fitted: by the skew-normal distribution fitted to the references, `-log2 Pr[loss <= observed]`. Beyond
        `resolution` it extrapolates, and beyond log2 |R| it only says that the secret is the most likely of all. None
        where all were ranked.
      fitted_low: of a 95 % interval of `fitted`, by bootstrap over the references (held the truth in 35 and in 39 of
        40 samples of 1,000 losses, normal and of shape 2). It leaves out the family's error, which `misfit` shows.
      fitted_high: its other end.
      misfit: largest distance between the fitted distribution function and the references' (Kolmogorov-Smirnov); for
        a family that fits it is near 0.7 / sqrt(references).
    """

    bits: float
    low: float
    high: float
    resolution: float
    space: int
    references: int
    fitted: float | None = None
    fitted_low: float | None = None
    fitted_high: float | None = None
    misfit: float | None = None


def exposure(losses: Array, place: int) -> float:
    """Exposure in bits of the secret at `place` among all: log2 |R| - log2 rank.

    Ties: the secret is ranked behind all that are as likely, so that a model which tells nothing apart gives 0 bits.

    | case | bits |
    |---|---|
    | the most likely of 2^k | k |
    | the middle | 1 |
    | the least likely, or all alike | 0 |

    Args:
      losses: of all secrets, `(|R|,)`, in nats.
      place: of the inserted one.

    Source: Carlini et al., 2019, section 4.2.

    >>> exposure(np.array([3.0, 0.5, 2.0, 4.0]), 1), exposure(np.array([3.0, 0.5, 2.0, 4.0]), 2)
    (2.0, 1.0)
    """
    _check_losses("losses", losses, 1)
    require(0 <= place < len(losses), f"place={place!r}: there are {len(losses)} secrets")
    return log2(len(losses)) - log2(int((losses <= losses[place]).sum()))


def exposure_by_sampling(
    canary: float, others: Array, space: int, generator: np.random.Generator, resamples: int = 200
) -> Exposure:
    """Exposure where there are too many secrets to rank: from the losses of some that were drawn at random.

    Two answers, which differ in what they assume. The counted one, with an exact (Clopper-Pearson) interval, assumes
    nothing: a bootstrap would give it no width where no reference is as likely as the secret. It cannot say more than
    `resolution`. The fitted one extrapolates a skew-normal distribution, with an interval by bootstrap.

    Args:
      canary: loss of the inserted secret.
      others: losses of secrets drawn uniformly, without this one, `(m,)`; at least 100.
      space: number of secrets, |R|.
      generator: for the bootstrap.
      resamples: of the bootstrap, at least 40. Cost: a fit each, 2 ms at m = 10,000.

    Source: Carlini et al., 2019, section 4.3 (sampling, and extrapolation by a skew-normal fit); Clopper, Pearson,
    1934; Efron, "Bootstrap methods", 1979 (percentiles).
    """
    _check_losses("others", others, 100)  # three parameters and a tail are fitted to them
    require(np.isfinite(canary), f"canary={canary!r}: expected a finite loss")
    require(space > len(others), f"space={space!r}: expected more secrets than the {len(others)} references")
    at_least("resamples", resamples, 40)
    counted = _counted(canary, others, space)
    fit = SkewNormal.fitted(others)
    found = np.empty(resamples)
    for turn in range(resamples):
        again = others[generator.integers(len(others), size=len(others))]
        found[turn] = SkewNormal.fitted(again).log_cdf(canary)
    low, high = np.quantile(-found / log(2), [(1 - _CONFIDENCE) / 2, (1 + _CONFIDENCE) / 2])
    return replace(
        counted,
        fitted=-fit.log_cdf(canary) / log(2),
        fitted_low=float(low),
        fitted_high=float(high),
        misfit=fit.misfit(others),
    )


def _counted(canary: float, others: Array, space: int) -> Exposure:
    """By counting the references that are as likely as the secret."""
    m, likely = len(others), int((others <= canary).sum())
    tail = (1 - _CONFIDENCE) / 2
    # The share of all *other* secrets that are as likely; the secret itself is one more of the space.
    least, most = lower_rate(likely, m, tail), upper_rate(likely, m, tail)
    low, high = (log2(space) - log2(1 + share * (space - 1)) for share in (most, least))
    return Exposure(-log2((1 + likely) / (1 + m)), low, high, log2(1 + m), space, m)


@final
@dataclass(frozen=True)
class Exposed:
    """One secret in a model.

    Attributes:
      secret: its letters.
      copies: how often it was in the training data.
      exposure: under the model.
      without: under a model trained without it; None: there is none.
    """

    secret: str
    copies: int
    exposure: Exposure
    without: Exposure | None


Losses = Callable[[Sequence[str]], Array]
"""Texts -> the summed losses of their random letters, `(n,)`."""


def exposures(
    losses: Losses,
    copies: Mapping[str, int],
    format: SecretFormat,
    generator: np.random.Generator,
    *,
    without: Losses | None = None,
    references: int = 10_000,
    resamples: int = 200,
) -> tuple[Exposed, ...]:
    """Exposure of several secrets in one model, the least copied first.

    Secrets that were put in together do not compete: each is ranked among those that were not put in, or it would be
    held against a secret that the others are remembered as well. |R| is then less by the number of the others.
    All are compared with the same references, so that their estimates are dependent.

    Args:
      losses: of texts under the model; see `privfm.attacks.membership.secret_losses`.
      copies: how often each secret was in the training data, `{secret: copies}`; 0 for a control.
      format: of the texts.
      generator: for the references and the bootstrap.
      without: the same under a model trained without any of these secrets.
      references: drawn where the format has too many secrets to rank all.
      resamples: of the bootstrap.

    Cost: losses of `references` texts, or of all where there are at most 100,000; twice with `without`.
    """
    require(len(copies) > 0, "copies is empty: expected at least one secret")
    own = sorted(copies, key=lambda secret: (copies[secret], secret))
    for secret in own:
        at_least(f"copies of {secret}", copies[secret], 0)
    others = _references(format, set(own), references, generator)
    space = format.size - len(own) + 1
    texts = format.texts(own + others)

    def of(model: Losses) -> list[Exposure]:
        found = np.asarray(model(texts), dtype=np.float64)
        require(found.shape == (len(texts),), f"losses {found.shape}: expected ({len(texts)},), one a text")
        _check_losses("losses", found, 2)
        return [_one(float(loss), found[len(own) :], space, (generator, resamples)) for loss in found[: len(own)]]

    there = of(losses)
    absent: Sequence[Exposure | None] = [None] * len(own) if without is None else of(without)
    rows = zip(own, there, absent, strict=True)
    return tuple(Exposed(secret, copies[secret], one, other) for secret, one, other in rows)


def _references(format: SecretFormat, own: set[str], count: int, generator: np.random.Generator) -> list[str]:
    """Secrets that were not put in: all of them, or some."""
    require(len(own) < format.size, f"all {format.size} secrets were put in: none is left to compare with")
    if format.enumerable:
        return [secret for secret in format.members() if secret not in own]
    return [secret for secret in format.drawn(count + len(own), generator) if secret not in own][:count]


def _one(loss: float, others: Array, space: int, sampled: tuple[np.random.Generator, int]) -> Exposure:
    if len(others) + 1 < space:
        return exposure_by_sampling(loss, others, space, *sampled)
    bits = exposure(np.concatenate([[loss], others]), 0)
    return Exposure(bits, bits, bits, log2(space), space, len(others))


def _check_losses(name: str, losses: Array, least: int) -> None:
    shaped = losses.ndim == 1 and len(losses) >= least
    require(shaped, f"{name} {losses.shape}: expected the losses of at least {least} secrets, (n,)")
    require(bool(np.isfinite(losses).all()), f"{name}: a loss is not finite; a model that overflowed ranks nothing")
