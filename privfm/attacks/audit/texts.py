"""Canaries that train: on examples that no honest client would hold, and whose loss therefore gives them away."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, final

import numpy as np
import torch
from torch import Generator, Tensor

from privfm.attacks.audit.ghosts import check_places
from privfm.attacks.membership.exposure import SecretFormat
from privfm.checks import InvalidArgument, at_least, require
from privfm.contracts import Canaries, CanaryScene, Examples
from privfm.contracts.audit import check_count

_IGNORED: Final = -100
"""Label of a token that is not predicted, as in transformers."""

_LETTERS: Final = "abcdefghijklmnopqrstuvwxyz"
"""What random words are spelled with: every tokenizer knows them."""

_WORD: Final = 6
"""Letters of a random word: 28 bits, so that a thousand canaries of one word would still be distinct (99.8 %)."""


@final
@dataclass(frozen=True, eq=False)
class _Prepared(Canaries):
    """Ready canaries: canary j holds examples `j each` to `(j + 1) each - 1` of `everything`."""

    trained = True

    count: int
    each: int
    everything: Examples

    def fitted(self, scene: CanaryScene, generator: Generator) -> Canaries:
        raise InvalidArgument("these canaries are fitted already: fit the settings they were made from")

    def examples(self, place: int) -> Examples:
        check_places([place], self.count)
        return self.everything.take(torch.arange(place * self.each, (place + 1) * self.each))


class _ToBeFitted(Canaries):
    """Settings of canaries that depend on the data."""

    trained = True

    def examples(self, place: int) -> Examples:
        raise InvalidArgument(f"{type(self).__name__} has not seen the data: call fitted(scene, generator) first")


@final
@dataclass(frozen=True)
class MislabelledCanaries(_ToBeFitted):
    """Canary j holds held-out examples, each under a label drawn from the wrong ones.

    A model cannot guess them from other data: a low loss on them was learned from them. With two labels every model
    that is any good contradicts them, and a canary needs many copies or rounds to show.

    Args:
      count: of canaries, at least 8.
      each: distinct examples that one canary holds.

    Source: Steinke, Nasr, Jagielski, "Privacy auditing with one (1) training run", 2023 (black box:
    mislabelled examples as canaries).
    """

    count: int
    each: int = 1

    def __post_init__(self) -> None:
        check_count(self.count)
        at_least("each", self.each, 1)

    def fitted(self, scene: CanaryScene, generator: Generator) -> Canaries:
        holdout, labels, needed = scene.holdout, len(scene.label_names), self.count * self.each
        require(holdout.labels.dim() == 1, "MislabelledCanaries need one label an example: tokens have no wrong one")
        require(labels >= 2, f"labels {scene.label_names}: expected at least 2, one of them wrong")
        require(len(holdout) >= needed, f"count * each = {needed}: there are {len(holdout)} held-out examples")
        chosen = holdout.take(torch.randperm(len(holdout), generator=generator)[:needed])
        shift = torch.randint(1, labels, (needed,), generator=generator)
        return _Prepared(self.count, self.each, chosen.with_labels((chosen.labels + shift) % labels))


@final
@dataclass(frozen=True)
class OutOfDistributionTexts(_ToBeFitted):
    """Canary j holds a text of random words of six random letters, under a random label.

    A language model is to predict its every token.

    Args:
      count: of canaries, at least 8.
      words: of a text. A random word is some four tokens; what is longer than the data's longest text is refused.
      repeats: copies of the text that a canary holds.

    Source: Nasr et al., "Tight auditing of differentially private machine learning", 2023 (blank and
    out-of-distribution examples); Panda et al., "Privacy auditing of large language models", 2025 (random tokens).
    """

    count: int
    words: int = 4
    repeats: int = 1

    def __post_init__(self) -> None:
        check_count(self.count)
        at_least("words", self.words, 1)
        at_least("repeats", self.repeats, 1)

    def fitted(self, scene: CanaryScene, generator: Generator) -> Canaries:
        drawn = torch.randint(len(_LETTERS), (self.count, self.words, _WORD), generator=generator)
        texts = [" ".join("".join(_LETTERS[i] for i in word) for word in text) for text in drawn.tolist()]
        return _of_texts(texts, self.repeats, scene, generator)


@final
@dataclass(frozen=True)
class InsertedSecrets(_ToBeFitted):
    """Canary j holds a secret of its own, such as "the secret number is 4 8 2 1", under a random label.

    All share the format; no two share the secret. A language model is to predict every token, and how well it knows
    the secret is also measured by `privfm.attacks.membership.exposures`.

    Args:
      count: of canaries, at least 8, at most as many as there are secrets.
      format: of the texts.
      repeats: copies of the text that a canary holds.

    Source: Carlini, Liu, Erlingsson, Kos, Song, "The secret sharer", 2019, section 4.
    """

    count: int
    format: SecretFormat = SecretFormat()
    repeats: int = 1

    def __post_init__(self) -> None:
        check_count(self.count)
        at_least("repeats", self.repeats, 1)
        require(self.count <= self.format.size, f"count={self.count}: the format has {self.format.size} secrets")

    def fitted(self, scene: CanaryScene, generator: Generator) -> Canaries:
        numbers = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
        return _of_texts(self.format.texts(self.format.drawn(self.count, numbers)), self.repeats, scene, generator)


def _of_texts(texts: Sequence[str], repeats: int, scene: CanaryScene, generator: Generator) -> Canaries:
    """Canaries that hold `repeats` copies of a text each: random labels for a classifier, its tokens else."""
    inputs = _read(texts, scene)
    holdout = scene.holdout
    if holdout.labels.dim() == 2:
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, _IGNORED)
    else:
        labels = torch.randint(len(scene.label_names), (len(texts),), generator=generator)
    copies = torch.arange(len(texts)).repeat_interleave(repeats)
    return _Prepared(len(texts), repeats, Examples(inputs, labels).take(copies))


def _read(texts: Sequence[str], scene: CanaryScene) -> dict[str, Tensor]:
    """Texts as the model's inputs, as wide as everybody else's: clients' texts are put together into batches.

    Raises:
      InvalidArgument: the model reads no text, a text is longer than the longest of the data, or two read alike.
    """
    width = _width(scene)
    if scene.tokenize is None:
        raise InvalidArgument("canaries of text need a model that reads text; MislabelledCanaries do without")
    # The last text is longer than all others, so that the tokenizer itself pads them, and shows where it cuts.
    padded = scene.tokenize([*texts, "a " * (2 * width)])
    whole = {name: value[:-1] for name, value in padded.items()}
    longest = int(whole["attention_mask"].sum(1).max())
    fits = longest <= width <= padded["input_ids"].shape[1] and longest < int(padded["attention_mask"][-1].sum())
    require(
        fits,
        f"canaries of {longest} tokens, or cut to so many: the longest text of the data has {width}; take shorter ones",
    )
    found = {name: value[:, :width].clone() for name, value in whole.items()}
    ends = (whole["attention_mask"][:, 0] == 1) & (found["attention_mask"].sum(1) == whole["attention_mask"].sum(1))
    require(bool(ends.all()), "the tokenizer pads on the left: expected on the right")
    distinct = len({tuple(row) for row in found["input_ids"].tolist()})
    require(
        distinct == len(texts),
        f"{len(texts)} canaries of text are {distinct} to the tokenizer, which cuts them off or does not know them",
    )
    return found


def _width(scene: CanaryScene) -> int:
    ids = scene.holdout.inputs.get("input_ids")
    if ids is None or len(scene.holdout) == 0:
        raise InvalidArgument("canaries of text need a model that reads text and held-out examples to be padded like")
    return ids.shape[1]
