"""The loss of every example of a Hugging Face batch, as a Trainer would compute it of that example alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import Trainer
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from privfm.checks import require
from privfm.learning.tasks import CausalLM
from privfm.plugins.private_training import without_dropout

ExampleLosses = Callable[[Mapping[str, Any]], Tensor]
"""A batch as the Trainer's collator makes it, on the model's device -> `(b,)`."""


def trainer_losses(trainer: Trainer) -> ExampleLosses:
    """The losses that a Trainer minimises, one an example.

    | what the Trainer computes                                                  | how                          |
    |----------------------------------------------------------------------------|------------------------------|
    | classification of texts or images with one label, by the model's own class | one pass for the batch, if it|
    | causal language modelling, by the model's own class                        | gives what the Trainer does  |
    | label smoothing, `compute_loss_func`, a `compute_loss` of your own,        | `compute_loss`, example by   |
    | regression, several labels, any other model                                | example: exact, and slow     |

    Whether one pass gives the same is looked at on the first example with a finite loss: some models shift no labels,
    add a loss of their own, or take float labels for several of them.

    The loss of a text is the mean over its predicted tokens. A plain Trainer weighs every token of a batch alike, so
    that long texts count more; a clip bounds examples, so that here every text counts the same.

    Args:
      trainer: its model may change afterwards.

    Raises:
      InvalidArgument: (of the result) the batch has no labels.
    """
    own_loss = type(trainer).compute_loss is not Trainer.compute_loss
    special = own_loss or trainer.compute_loss_func is not None or trainer.label_smoother is not None
    kind = "" if special else _kind(trainer.model)
    at_once: bool | None = None if kind else False  # None: not known yet

    def losses(batch: Mapping[str, Any]) -> Tensor:
        nonlocal at_once
        model: Any = trainer.model
        require("labels" in batch, f"a batch of {sorted(batch)}: expected labels among them; give `losses` of your own")
        count = len(batch["labels"])
        if at_once is None and count:
            at_once = _agree(trainer, kind, {name: value[:1] for name, value in batch.items()})
        if at_once:
            return _in_one_pass(model, kind, batch)
        singles = ({name: value[place : place + 1] for name, value in batch.items()} for place in range(count))
        found: list[Any] = [trainer.compute_loss(model, one) for one in singles]
        return torch.stack(found) if found else batch["labels"].new_zeros(0, dtype=torch.float32)

    return losses


def _in_one_pass(model: Any, kind: str, batch: Mapping[str, Any]) -> Tensor:
    """Of a model of a known kind, `(b,)`."""
    logits: Tensor = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    if kind == "tokens":
        return CausalLM().losses(logits, batch["labels"])
    return cross_entropy(logits.float(), batch["labels"], reduction="none")


def _agree(trainer: Trainer, kind: str, one: Mapping[str, Any]) -> bool | None:
    """Whether one pass gives for a batch of one example what the Trainer computes; None: its loss is not finite."""
    model: Any = trainer.model
    with torch.no_grad(), without_dropout(model):
        expected: Any = trainer.compute_loss(model, dict(one))
        if not bool(expected.isfinite()):
            return None
        try:
            found = _in_one_pass(model, kind, one)
        except (RuntimeError, ValueError):  # labels of another shape or type than this kind has
            return False
    share = 1e-4 if torch.finfo(expected.dtype).bits >= 32 else 0.02  # roundings of half precision are 2^-8
    return found.shape == (1,) and torch.allclose(found[0].float(), expected.float(), rtol=share, atol=share)


def _kind(model: Any) -> str:
    """`label` or `tokens` where one pass for a batch is known to give what the model's own loss is; else empty."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # of PEFT
    name, config = type(inner).__name__, getattr(inner, "config", None)
    if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        return "tokens"
    classifies = (
        *MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values(),
        *MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.values(),
    )
    single = getattr(config, "problem_type", None) in {None, "single_label_classification"}
    return "label" if name in classifies and single and getattr(config, "num_labels", 1) > 1 else ""
