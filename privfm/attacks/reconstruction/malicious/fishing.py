"""Fishing: a head under which the examples of one class alone send a gradient into the model."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Final, final

import torch
from torch import Generator, Tensor, nn

from privfm.checks import InvalidArgument, at_least, nearest_if_any, require
from privfm.contracts import MaliciousAttack, Observation, Reconstruction, ReconstructionAttack, Watch

_HIGH: Final = 1000.0
"""Logit of the classes that are not fished: exp(-1000) is 0 in float64, which ends at exp(-745)."""


@final
@dataclass(frozen=True)
class Fishing(MaliciousAttack):
    """Bends the classifier so that only examples of one class reach the body, and hands their gradient on.

    The rows of the other classes are zero with a high bias, so that an example of another class has dL/dfeatures = 0,
    and one of the fished class has -W_c. A class of which the batch has one example gives that example's own gradient
    (over the batch size): to the attack that is given it, a batch of one, through any number of clients' sum.

    | in the batch, or in the sum of clients | result                                                              |
    |----------------------------------------|---------------------------------------------------------------------|
    | one example of the class               | what `inner` makes of one example                                   |
    | several                                | what `inner` makes of a batch of them                               |
    | none                                   | nothing: the body's gradient is zero                                |

    The bent head's bias gradient is p - (share of the class) for each class, with p known: it tells how many examples
    of the class there are, given the batch size, and which class to fish next. Without it, and for sums of clients,
    whose scale is not known, one is assumed. The head's own gradients are mixed over all examples, and are kept from
    `inner`.

    Args:
      target: the class.
      inner: the attack on the one example.
      head: name of the classifier, `nn.Linear` with a bias; empty: the last linear layer of the model.

    Source: Wen, Geiping, Fowl, Goldblum, Goldstein, "Fishing for user data in large-batch federated learning via
    gradient magnification", ICML 2022 (class fishing).
    """

    target: int
    inner: ReconstructionAttack
    head: str = ""

    def __post_init__(self) -> None:
        at_least("target", self.target, 0)
        require(not self.inner.malicious, f"inner={self.inner!r} sets a trap of its own; give an honest attack")

    @property
    def needs(self) -> tuple[str, ...]:
        return ("a model it has prepared", *self.inner.needs)

    def prepare(self, model: nn.Module, generator: Generator) -> nn.Module:
        trapped = deepcopy(model)
        _, classifier = head_of(trapped, self.head)
        bend(classifier, self.target)
        return trapped

    def refusal(self, observation: Observation) -> str:
        try:
            name, classifier = head_of(observation.model, self.head)
            _ = observation.gradients
        except InvalidArgument as reason:
            return str(reason)
        if not bent(classifier, self.target):
            return f"{name} is not bent towards class {self.target}; send out what prepare() returns"
        passed = self._passed_on(observation, name)
        if not passed:
            return f"nothing but the gradient of {name} was sent, which mixes all examples"
        return self.inner.refusal(self._alone(observation, name, passed))

    def reconstruct(self, rounds: Sequence[Observation], watch: Watch, generator: Generator) -> Reconstruction:
        observation = rounds[0]
        name, _ = head_of(observation.model, self.head)
        passed = self._passed_on(observation, name)
        share = share_of(observation.gradients.get(f"{name}.bias"), self.target)
        facts: dict[str, float | str] = {} if share is None else {"share of the class": share}
        if all(float(one.nan_to_num().abs().max()) == 0 for one in passed.values()):
            return Reconstruction(used=("malicious model",), facts=facts | {"examples of the class": 0})
        found = self.inner.reconstruct([self._alone(observation, name, passed)], watch, generator)
        labels = found.labels
        if labels is None and found.images is not None:
            labels = (self.target,) * len(found.images)
        used = (*found.used, "malicious model")
        return replace(found, labels=labels, used=used, facts={**found.facts, **facts})

    @staticmethod
    def _passed_on(observation: Observation, head: str) -> dict[str, Tensor]:
        return {name: one for name, one in observation.tensors.items() if not name.startswith(f"{head}.")}

    def _alone(self, observation: Observation, head: str, passed: dict[str, Tensor]) -> Observation:
        """The observation as of the class's examples alone: their number and scale, where the head's bias tells."""
        share = share_of(observation.gradients.get(f"{head}.bias"), self.target)
        total, told = observation.declared.examples, observation.declared
        counted = share is not None and total is not None and observation.clients == 1
        examples = max(1, round(share * total)) if counted else 1  # type: ignore[operator]
        if share:  # a mean over the class instead of over the batch
            passed = {name: one / share for name, one in passed.items()}
        return Observation(
            observation.model,
            passed,
            change=observation.change,
            declared=replace(told, examples=examples, labels=torch.full((examples,), self.target), lengths=None),
        )


def head_of(model: nn.Module, name: str = "") -> tuple[str, nn.Linear]:
    """A model's classifier: the linear layer of this name, or the last one.

    Raises:
      InvalidArgument: there is none, or it has no bias.
    """
    layers = {key: module for key, module in model.named_modules() if isinstance(module, nn.Linear)}
    require(bool(layers), f"{type(model).__name__} has no linear layer")
    place = name or list(layers)[-1]
    require(place in layers, f"head={name!r} is no linear layer of the model{nearest_if_any(name, layers)}")
    require(layers[place].bias is not None, f"{place!r} has no bias; the other classes cannot be made certain without")
    return place, layers[place]


def bend(classifier: nn.Linear, target: int) -> None:
    """Sets a classifier so that examples of other classes than `target` send nothing back. In place.

    Raises:
      InvalidArgument: there is no such class, or no other.
    """
    classes = classifier.out_features
    require(
        target < classes and classes > 1,
        f"target={target} of {classes} outputs: expected a class below, and at least two of them",
    )
    with torch.no_grad():
        others = torch.arange(classes) != target
        classifier.weight[others] = 0.0
        classifier.bias[others] = _HIGH
        classifier.bias[target] = 0.0


def bent(classifier: nn.Linear, target: int) -> bool:
    """Whether `bend` has been there."""
    if target >= classifier.out_features:
        return False
    others = torch.arange(classifier.out_features) != target
    return bool((classifier.weight[others] == 0).all()) and bool((classifier.bias[others] == _HIGH).all())


def share_of(bias: Tensor | None, target: int) -> float | None:
    """Share of a class in the batch, from the bent head's mean bias gradient: it is p - share, and p is 0 there.

    Of a sum instead of a mean the number of examples comes out, or what the clients' means add up to. None: not sent.
    """
    if bias is None or bool(bias[target].isnan()):
        return None
    return max(0.0, -float(bias[target]))
