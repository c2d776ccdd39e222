"""How many images are behind an update, and of which labels: declared, or read off the last layer; never assumed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

import torch
from torch import Generator, Tensor

from privfm.attacks.reconstruction.classifier_head import head_of
from privfm.attacks.reconstruction.images.networks import ImageNetwork, has_own_batch_statistics
from privfm.attacks.reconstruction.labels import Labels
from privfm.checks import InvalidArgument, require
from privfm.contracts import Observation, Watch


@final
@dataclass(frozen=True)
class Batch:
    """What is known, or inferred, of the images behind an update.

    Attributes:
      labels: `(b,)`, ascending.
      used: declared pieces that went into it.
      offsets: the name of the logits' bias, where labels were inferred and it is seen: a search may still improve them.
      facts: for the record.
    """

    labels: Tensor
    used: tuple[str, ...]
    offsets: str | None = None
    facts: dict[str, float | str] = field(default_factory=dict)


def simulation_refusal(observation: Observation) -> str:
    """Why images cannot be searched for by simulating the client; empty: they can."""
    if observation.declared.shape is None:
        return "the images' shape is not declared: observation.told(shape=(channels, height, width)), which is public"
    if observation.change is not None and observation.change.optimizer != "sgd":
        return (
            "the change is Adam's, whose step has no useful derivative in the images; observe gradients, or changes by "
            "plain gradient descent"
        )
    if has_own_batch_statistics(observation.model):
        return (
            "the model is in training mode and normalises by the statistics of the client's batch, which the server "
            "does not have; clients must train with model.eval(), or with group normalisation"
        )
    return ""


def labels_refusal(observation: Observation) -> str:
    """Why the images' labels are not known; empty: they are declared, or can be inferred."""
    if observation.declared.labels is not None:
        return ""
    reason = Labels().refusal(observation)
    return f"labels are not declared and cannot be inferred ({reason}): observation.told(labels=...)" if reason else ""


def usable_examples(observation: Observation) -> int | None:
    """The declared number of examples, or as many as the local steps can have used; None: not declared."""
    examples, change = observation.declared.examples, observation.change
    if examples is None or change is None or change.batch_size is None:
        return examples
    return min(examples, change.steps * change.batch_size)


def batch_behind(observation: Observation, network: ImageNetwork, watch: Watch, generator: Generator) -> Batch:
    """The labels of all images that the client may have used.

    | declared         | what is taken                                                                             |
    |------------------|-------------------------------------------------------------------------------------------|
    | labels           | these                                                                                     |
    | examples         | as many labels, counted from the last layer; no more than the local steps can have used   |
    | neither          | each label that is there for certain, once: images that share a label are found as one    |

    Raises:
      InvalidArgument: declared labels are not the model's, or not as many as the declared examples; or none is found.
    """
    declared = observation.declared
    if declared.labels is not None:
        return Batch(_checked(declared.labels, declared.examples, network, observation), ("labels",))
    found = Labels().reconstruct([observation.told(examples=usable_examples(observation))], watch, generator)
    if not found.labels:
        raise InvalidArgument("no label is found in the last layer's gradient; declare examples, or labels")
    facts: dict[str, float | str] = {"labels": "inferred"}
    if declared.examples is None:
        facts["inferred examples"] = float(len(found.labels))
    assert declared.shape is not None
    _, offsets = head_of(observation.model, torch.zeros((1, *declared.shape), device=network.device))
    return Batch(torch.tensor(found.labels, device=network.device), found.used, offsets, facts)


def _checked(labels: Tensor, examples: int | None, network: ImageNetwork, observation: Observation) -> Tensor:
    require(
        labels.dim() == 1 and len(labels) > 0 and not labels.dtype.is_floating_point,
        f"labels has shape {tuple(labels.shape)} and type {labels.dtype}: expected (examples,) whole numbers",
    )
    require(examples in (None, len(labels)), f"{len(labels)} labels and examples={examples} are declared: not the same")
    assert observation.declared.shape is not None
    known = network.labels(observation.declared.shape)
    require(
        bool(((labels >= 0) & (labels < known)).all()),
        f"labels={labels.tolist()}: expected numbers from 0 to {known - 1}, the model has {known} labels",
    )
    return labels.long().to(network.device).sort().values
