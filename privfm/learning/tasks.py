"""Tasks: what is minimised, predicted and reported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from privfm.checks import require
from privfm.contracts import Metric, Task

IGNORED = -100
"""Label of a token that is not predicted, as in transformers."""


class Classification(Task):
    """One label an example. Metrics: accuracy (primary), loss in nats, accuracy of every label."""

    primary = "accuracy"

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(logits.float(), labels, reduction="none")

    def predict(self, logits: Tensor) -> Tensor:
        return logits.argmax(-1)

    def score(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"correct": (self.predict(logits) == labels).float(), "loss": self.losses(logits, labels)}

    def summarise(self, scores: Mapping[str, Tensor], labels: Tensor, label_names: Sequence[str]) -> dict[str, Metric]:
        correct = scores["correct"]
        metrics = {
            "accuracy": Metric(float(correct.mean()), len(labels), True, "share", correct),
            "loss": Metric(float(scores["loss"].mean()), len(labels), False, "nats", scores["loss"]),
        }
        for label, name in enumerate(label_names):
            mine = correct[labels == label]
            if len(mine):
                metrics[f"accuracy/{name}"] = Metric(float(mine.mean()), len(mine), True, "share", mine)
        return metrics

    def trivial(self, labels: Tensor) -> float:
        """Share of the most frequent label."""
        require(len(labels) > 0, "no labels: an empty split has no trivial score")
        return float(labels.bincount().max()) / len(labels)


@final
@dataclass(frozen=True)
class SequenceClassification(Classification):
    """One label a text."""


@final
@dataclass(frozen=True)
class ImageClassification(Classification):
    """One label an image."""


@final
@dataclass(frozen=True)
class CausalLM(Task):
    """Next-token prediction; the loss of an example is the mean over its predicted tokens.

    Metrics: `token_accuracy` (primary: share of next tokens that are the most likely one), `loss` in nats a token over
    all tokens of the split, `perplexity` = exp(loss).
    """

    primary = "token_accuracy"

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        losses, predicted = self._tokens(logits, labels)
        return losses.sum(1) / predicted.sum(1).clamp(min=1)

    def predict(self, logits: Tensor) -> Tensor:
        """The most likely next token after each position, `(b, T)`."""
        return logits.argmax(-1)

    def score(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        losses, predicted = self._tokens(logits, labels)
        right = (self.predict(logits)[:, :-1] == labels[:, 1:]) & predicted
        return {"loss": losses.sum(1), "correct": right.sum(1).float(), "tokens": predicted.sum(1).float()}

    def summarise(self, scores: Mapping[str, Tensor], labels: Tensor, label_names: Sequence[str]) -> dict[str, Metric]:
        tokens = scores["tokens"].double().sum()
        require(float(tokens) > 0, "no token is predicted: every text has a single token")
        loss = float(scores["loss"].double().sum() / tokens)
        accuracy = float(scores["correct"].double().sum() / tokens)
        share = scores["correct"] / scores["tokens"].clamp(min=1)
        return {
            "token_accuracy": Metric(accuracy, int(tokens), True, "share of tokens", share),
            "loss": Metric(loss, int(tokens), False, "nats a token", scores["loss"] / scores["tokens"].clamp(min=1)),
            "perplexity": Metric(float(torch.tensor(loss).exp()), int(tokens), False, "ratio"),
        }

    def trivial(self, labels: Tensor) -> float:
        """Share of the most frequent token."""
        tokens = labels[:, 1:]
        tokens = tokens[tokens != IGNORED]
        require(len(tokens) > 0, "no token is predicted: every text has a single token")
        return float(tokens.bincount().max()) / len(tokens)

    def _tokens(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Loss of every token `(b, T-1)`, zero where none is predicted, and where one is."""
        following = labels[:, 1:]
        losses = cross_entropy(
            logits[:, :-1].float().transpose(1, 2), following, ignore_index=IGNORED, reduction="none"
        )
        return losses, following != IGNORED
