"""Losses and metrics by hand."""

from __future__ import annotations

from math import exp, log

import pytest
import torch

from privfm.checks import InvalidArgument
from privfm.learning import CausalLM, SequenceClassification


def test_classification_by_hand() -> None:
    task = SequenceClassification()
    logits = torch.tensor([[log(3.0), 0.0], [0.0, log(3.0)], [log(3.0), 0.0]])
    labels = torch.tensor([0, 0, 1])
    assert task.losses(logits, labels).tolist() == pytest.approx([log(4 / 3), log(4), log(4)])
    metrics = task.summarise(task.score(logits, labels), labels, ("no", "yes"))
    assert metrics["accuracy"].value == pytest.approx(1 / 3) and metrics["accuracy"].n == 3
    assert metrics["accuracy/no"].value == 0.5 and metrics["accuracy/yes"].value == 0
    assert metrics["loss"].value == pytest.approx((log(4 / 3) + 2 * log(4)) / 3)
    assert not metrics["loss"].higher_is_better
    assert task.trivial(labels) == pytest.approx(2 / 3)


def test_a_label_without_examples_has_no_accuracy() -> None:
    task = SequenceClassification()
    logits, labels = torch.zeros(2, 3), torch.tensor([0, 2])
    assert "accuracy/b" not in task.summarise(task.score(logits, labels), labels, ("a", "b", "c"))


def causal() -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.tensor([[5, 0, 1, -100], [5, 1, -100, -100]])  # two and one predicted tokens
    logits = torch.zeros(2, 4, 6)
    logits[0, 0, 0] = log(5.0)  # first example: first right (probability 1/2), second uniform
    logits[:, 3] = 100.0  # positions after the end never count
    return logits, labels


def test_next_tokens_by_hand() -> None:
    task = CausalLM()
    logits, labels = causal()
    assert task.losses(logits, labels).tolist() == pytest.approx([(log(2) + log(6)) / 2, log(6)])
    metrics = task.summarise(task.score(logits, labels), labels, ("text",))
    loss = (log(2) + 2 * log(6)) / 3
    assert metrics["loss"].value == pytest.approx(loss) and metrics["loss"].n == 3
    assert metrics["perplexity"].value == pytest.approx(exp(loss))
    assert metrics["token_accuracy"].value == pytest.approx(1 / 3)  # argmax of a uniform row is token 0, which is wrong
    assert task.trivial(labels) == pytest.approx(2 / 3)


def test_scores_do_not_depend_on_the_batch() -> None:
    task = CausalLM()
    logits, labels = causal()
    whole = task.score(logits, labels)
    alone = [task.score(logits[i : i + 1], labels[i : i + 1]) for i in range(2)]
    for name, value in whole.items():
        assert torch.allclose(value, torch.cat([part[name] for part in alone]))


def test_nothing_to_predict_is_refused() -> None:
    task = CausalLM()
    labels = torch.tensor([[3], [4]])
    with pytest.raises(InvalidArgument, match="single token"):
        task.summarise(task.score(torch.zeros(2, 1, 6), labels), labels, ("text",))
    with pytest.raises(InvalidArgument, match="single token"):
        task.trivial(labels)
    with pytest.raises(InvalidArgument, match="empty split"):
        SequenceClassification().trivial(torch.zeros(0).long())
