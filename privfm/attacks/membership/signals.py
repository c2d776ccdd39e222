"""From what a model says of examples to signals: one number an example, larger where the model fits it better.

Everything is computed in float64. Where a classifier is sure, float32 softmax gives a probability of exactly 1 and the
log-odds are lost; they are computed from logits here, never from probabilities.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import numpy as np
from numpy.typing import NDArray

from privfm.checks import at_least, fraction, require
from privfm.contracts.membership import Array, Flags

if TYPE_CHECKING:
    from torch import Tensor

Ragged = Sequence[NDArray[np.floating[Any]]]
"""One array a text, with a value for each of its tokens that was predicted."""

_CHUNK = 1 << 22
"""Logits that are turned into float64 at a time: 32 MiB, a few such arrays are alive at once."""


def label_log_odds(logits: NDArray[np.floating[Any]], labels: NDArray[np.integer[Any]]) -> Array:
    """`log p_y - log(1 - p_y)`: LiRA's phi, which is close to normal over trainings.

    As `z_y - logsumexp(z of all other labels)`, exact at any size of logits: at 1e4 float32 softmax says infinity.

    Args:
      logits: `(..., classes)`, for instance `(models, n, classes)`; finite, at least two classes.
      labels: `(...)`, or what broadcasts to it, for instance `(n,)`; from 0.

    Raises:
      InvalidArgument: a logit is not finite, a label is no class, or shapes do not fit.

    >>> label_log_odds(np.array([[10_000.0, 0.0, 0.0]]), np.array([0])).round(3)
    array([9999.307])

    Source: Carlini et al., "Membership inference attacks from first principles", 2022 (logit scaling).
    """
    labels = _labels_for(logits, labels)
    values = np.asarray(logits, dtype=np.float64)
    own = np.take_along_axis(values, labels[..., None], axis=-1)[..., 0]
    others = np.where(np.arange(values.shape[-1]) == labels[..., None], -np.inf, values)
    largest = others.max(axis=-1)
    spread: Array = np.log(np.exp(others - largest[..., None]).sum(axis=-1))
    # The difference of large numbers first: it is exact where they are near each other.
    return np.asarray((own - largest) - spread)


def label_log_probability(logits: NDArray[np.floating[Any]], labels: NDArray[np.integer[Any]]) -> Array:
    """`log p_y` (minus the cross-entropy), from the log-odds: it keeps its digits where p_y is almost 1.

    Arguments, shapes and errors are those of `label_log_odds`.

    >>> label_log_probability(np.array([[0.0, 0.0]]), np.array([1])).round(4)
    array([-0.6931])
    """
    return np.asarray(-np.logaddexp(0.0, -label_log_odds(logits, labels)))


def minus_loss(losses: NDArray[np.floating[Any]]) -> Array:
    """A loss with its sign turned, so that larger means a better fit.

    Source: Yeom et al., "Privacy risk in machine learning", 2018 (the threshold on the loss).
    """
    _finite("losses", losses)
    return np.asarray(-np.asarray(losses, dtype=np.float64))


def unpadded(values: NDArray[np.floating[Any]], mask: Flags) -> list[Array]:
    """Padded values `(texts, tokens)` as one array a text; `mask` is true where there is a token."""
    require(values.ndim == 2, f"values {values.shape}: expected (texts, tokens)")
    require(mask.dtype == np.bool_, f"mask has type {mask.dtype}: expected bool")
    require(mask.shape == values.shape, f"mask {mask.shape}: expected {values.shape}, a flag for each value")
    return [np.asarray(row[kept], dtype=np.float64) for row, kept in zip(values, mask, strict=True)]


def mean_over_tokens(values: Ragged) -> Array:
    """`(texts,)`: the mean of each text's values, such as `TokenStatistics.log_odds`."""
    _texts("values", values)
    return np.array([np.asarray(row, dtype=np.float64).mean() for row in values])


def mean_token_log_probability(token_log_probabilities: Ragged) -> Array:
    """`(texts,)`: minus a language model's loss, minus the logarithm of the perplexity."""
    _log_probabilities(token_log_probabilities)
    return mean_over_tokens(token_log_probabilities)


def mean_token_log_odds(token_log_probabilities: Ragged) -> Array:
    """`(texts,)`: mean over tokens of `log p - log(1 - p)`: LiRA's signal for texts.

    Raises:
      InvalidArgument: a probability is exactly 1, as float32 says of tokens that are sure. `TokenStatistics.log_odds`
        has them from logits.
    """
    _log_probabilities(token_log_probabilities)
    sure = sum(int((np.asarray(row) == 0).sum()) for row in token_log_probabilities)
    require(
        sure == 0,
        f"token_log_probabilities: {sure} are exactly 0, so that the log-odds are infinite; "
        "compute them from logits: token_statistics(...).log_odds",
    )
    rows = [np.asarray(row, dtype=np.float64) for row in token_log_probabilities]
    return mean_over_tokens([row - np.log(-np.expm1(row)) for row in rows])


def zlib_ratio(losses: NDArray[np.floating[Any]], texts: Sequence[str]) -> Array:
    """`(texts,)`: minus the loss over the bytes of the zlib-compressed text (UTF-8, level 6).

    What is easy for everybody (repetition) compresses well and is not taken for memory. Whether losses are sums or
    means over tokens is the caller's to say; published numbers have means.

    Source: Carlini et al., "Extracting training data from large language models", 2021 (ratio to zlib).
    """
    _finite("losses", losses)
    require(losses.shape == (len(texts),), f"losses {losses.shape}: expected ({len(texts)},), one a text")
    sizes = np.array([len(zlib.compress(text.encode(), 6)) for text in texts], dtype=np.float64)
    return np.asarray(-np.asarray(losses, dtype=np.float64) / sizes)


def min_k(token_log_probabilities: Ragged, share: float = 0.2) -> Array:
    """Min-K %: mean log-probability of a text's least likely tokens.

    Args:
      token_log_probabilities: of each text.
      share: of the tokens that count: `floor(share * tokens)`, and one where that is none.

    Raises:
      InvalidArgument: a text has no token, a value is above 0 or not finite, or share is not in (0, 1].

    >>> min_k([np.array([-1.0, -2.0, -3.0, -4.0, -5.0])], share=0.4)
    array([-4.5])

    Source: Shi et al., "Detecting pretraining data from large language models", 2024; 20 % is their best.
    """
    _log_probabilities(token_log_probabilities)
    return _lowest([np.asarray(row, dtype=np.float64) for row in token_log_probabilities], share)


def min_k_plus_plus(token_log_probabilities: Ragged, means: Ragged, deviations: Ragged, share: float = 0.2) -> Array:
    """Min-K %++: as Min-K %, of z-scores of each token within the model's own distribution over the vocabulary.

    Args:
      token_log_probabilities: of each text.
      means: of `log p` under p, at each token (`TokenStatistics.means`); minus the entropy.
      deviations: standard deviations of the same.
      share: see `min_k`.

    Raises:
      InvalidArgument: as for `min_k`; or a deviation is not positive: where all likely words are equally likely there
        is no z-score.

    Source: Zhang et al., "Min-K%++: improved baseline for detecting pre-training data", 2024.
    """
    _log_probabilities(token_log_probabilities)
    _texts("means", means)
    _texts("deviations", deviations)
    shapes = [[np.shape(row) for row in rows] for rows in (token_log_probabilities, means, deviations)]
    require(shapes[0] == shapes[1] == shapes[2], "means, deviations: expected one for each token of each text")
    flat = sum(int((np.asarray(row) <= 0).sum()) for row in deviations)
    require(flat == 0, f"deviations: {flat} are not positive; leave such tokens out, they have no z-score")
    scores = [
        (np.asarray(own, dtype=np.float64) - mean) / deviation
        for own, mean, deviation in zip(token_log_probabilities, means, deviations, strict=True)
    ]
    return _lowest(scores, share)


def calibrated(signal: Array, base: Array) -> Array:
    """The signal less that of a model which never saw the examples, such as the base model before fine-tuning.

    Args:
      signal: `(n,)`, `(models, n)`, ...
      base: of the same shape, or without the first dimensions: `(n,)` for all models.

    Source: Watson et al., "On the importance of difficulty calibration in membership inference attacks", 2022.
    """
    fits = base.ndim >= 1 and signal.shape[signal.ndim - base.ndim :] == base.shape
    require(fits, f"base {base.shape}: expected the shape of the signal {signal.shape}, or its last dimensions")
    return np.asarray(np.asarray(signal, dtype=np.float64) - base)


@final
@dataclass(frozen=True)
class TokenStatistics:
    """What a language model says of each token of each text; arrays of one length a text.

    Attributes:
      log_probabilities: of the token that stands there.
      log_odds: `log p - log(1 - p)` of it.
      means: of `log p` over the vocabulary, under p.
      deviations: standard deviations of the same.
    """

    log_probabilities: list[Array]
    log_odds: list[Array]
    means: list[Array]
    deviations: list[Array]


def token_statistics(logits: Tensor, tokens: Tensor, mask: Tensor, chunk: int = _CHUNK) -> TokenStatistics:
    """Statistics of every token, from logits, in float64 and in pieces: memory is the logits' and a few chunks.

    Args:
      logits: `(texts, tokens, vocabulary)`, any float type; `logits[:, t]` predicts `tokens[:, t]`, so that of a causal
        model's output the last place is cut off, and of its input the first.
      tokens: `(texts, tokens)`.
      mask: `(texts, tokens)` bool; true where a token counts.
      chunk: logits at a time.

    Raises:
      InvalidArgument: shapes do not fit, a text has no token, or a logit that counts is not finite.
    """
    import torch

    at_least("chunk", chunk, 1)
    require(logits.dim() == 3, f"logits {tuple(logits.shape)}: expected (texts, tokens, vocabulary)")
    for name, given in (("tokens", tokens), ("mask", mask)):
        require(
            given.shape == logits.shape[:2],
            f"{name} {tuple(given.shape)}: expected {tuple(logits.shape[:2])}, as the logits have",
        )
    require(mask.dtype == torch.bool, f"mask has type {mask.dtype}: expected bool")
    lengths = mask.sum(1).tolist()
    require(len(lengths) > 0 and min(lengths) > 0, "mask: expected at least one text, and a token in each")
    where, kept = mask.nonzero(), tokens[mask].cpu().numpy()
    step = max(1, chunk // logits.shape[-1])
    parts: list[tuple[Array, ...]] = []
    for start in range(0, len(where), step):
        rows, columns = where[start : start + step].unbind(1)
        piece: Array = logits[rows, columns].detach().double().cpu().numpy()
        parts.append(_statistics(piece, kept[start : start + step]))
    ends = np.cumsum(lengths)[:-1]
    split = [np.split(np.concatenate(column), ends) for column in zip(*parts, strict=True)]
    return TokenStatistics(*split)


def _statistics(logits: Array, tokens: NDArray[np.integer[Any]]) -> tuple[Array, Array, Array, Array]:
    """Of logits `(k, vocabulary)`: log-probability and log-odds of the tokens, mean and deviation of log p under p."""
    odds = label_log_odds(logits, tokens)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    every = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    weights = np.exp(every)
    means = (weights * every).sum(axis=-1)
    deviations = np.sqrt((weights * (every - means[:, None]) ** 2).sum(axis=-1))
    return np.asarray(-np.logaddexp(0.0, -odds)), odds, np.asarray(means), np.asarray(deviations)


def _lowest(values: list[Array], share: float) -> Array:
    """Mean of the lowest share of each text's values."""
    fraction("share", share)
    found = []
    for row in values:
        count = max(1, int(share * len(row)))
        found.append(np.partition(row, count - 1)[:count].mean())
    return np.array(found)


def _labels_for(logits: NDArray[np.floating[Any]], labels: NDArray[np.integer[Any]]) -> NDArray[np.integer[Any]]:
    """The labels, spread to all logits, after every check."""
    require(logits.ndim >= 1 and logits.shape[-1] >= 2, f"logits {logits.shape}: expected (..., at least 2 classes)")
    _finite("logits", logits)
    require(np.issubdtype(labels.dtype, np.integer), f"labels have type {labels.dtype}: expected whole numbers")
    shape = logits.shape[:-1]
    fits = labels.ndim <= len(shape) and shape[len(shape) - labels.ndim :] == labels.shape
    require(fits, f"labels {labels.shape}: expected {shape}, one for each row of logits, or its last dimensions")
    known = bool(((labels >= 0) & (labels < logits.shape[-1])).all())
    require(known, f"labels: expected 0 to {logits.shape[-1] - 1}; leave out what is to be ignored")
    return np.broadcast_to(labels, shape)


def _finite(name: str, values: NDArray[np.floating[Any]]) -> None:
    require(bool(np.isfinite(values).all()), f"{name}: expected finite numbers; leave such examples or classes out")


def _texts(name: str, values: Ragged) -> None:
    for place, row in enumerate(values):
        shape = np.shape(row)
        require(len(shape) == 1 and shape[0] > 0, f"{name}[{place}] {shape}: expected (tokens,), at least one")
        _finite(f"{name}[{place}]", row)


def _log_probabilities(values: Ragged) -> None:
    _texts("token_log_probabilities", values)
    for place, row in enumerate(values):
        above = float(np.max(row))
        require(above <= 0, f"token_log_probabilities[{place}] has {above}: expected log-probabilities, at most 0")
