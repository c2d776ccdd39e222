"""Images and labels together from a gradient of a smooth network, by a quasi-Newton search for the same gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Final, final

import torch
from torch import Generator, Tensor

from privfm.attacks.reconstruction.images.known import (
    batch_behind,
    labels_refusal,
    simulation_refusal,
    usable_examples,
)
from privfm.attacks.reconstruction.images.networks import ImageNetwork
from privfm.attacks.reconstruction.images.objectives import Target
from privfm.checks import at_least, positive
from privfm.contracts import Observation, Reconstruction, ReconstructionAttack, Watch

_INNER: Final = 20
"""Quasi-Newton steps of one outer iteration: the default of torch's L-BFGS, with which the authors' program runs."""

_STALLED: Final = 1e-4
"""An attempt ends when its objective falls by less than this share in an outer iteration. Ours."""


@final
@dataclass(frozen=True)
class DLG(ReconstructionAttack):
    """Deep leakage from gradients: images and soft labels whose gradient equals the one observed, by L-BFGS.

    For smooth networks, small batches and gradients as they are: the squared distance that it minimises moves with
    the gradient's scale, so that a clipped gradient, or a sum, leads it astray. `InvertingGradients` has none of these
    limits. Labels are searched for, never asked for; declared ones are not used.

    | observation                          | what happens                                                              |
    |--------------------------------------|---------------------------------------------------------------------------|
    | ReLU, max-pooling and the like       | refused: no second derivative, and the search has nothing to follow;      |
    |                                      | `insist` runs it all the same and `facts` says on what                    |
    | examples not declared                | counted from the last layer                                               |
    | change of one step of all data       | taken as the gradient it is                                               |
    | change of several steps              | refused: their mean gradient is of no single model                        |
    | NaN                                  | compared nowhere                                                          |

    Computes in float64: the search ends where float32 has no digits left. With a line search that the authors'
    program lacks; without one, a step size of 1 diverges on many beginnings.

    Args:
      iterations: outer ones of an attempt, of up to 20 quasi-Newton steps each.
      restarts: beginnings from standard normal images and labels; the lowest objective is given back.
      learning_rate: first trial length of a step.
      insist: on networks that are not smooth.

    Source: Zhu, Liu, Han, "Deep leakage from gradients", 2019, algorithm 1; 300 iterations as in the authors' program.
    """

    iterations: int = 300
    restarts: int = 1
    learning_rate: float = 1.0
    insist: bool = False

    def __post_init__(self) -> None:
        at_least("iterations", self.iterations, 1)
        at_least("restarts", self.restarts, 1)
        positive("learning_rate", self.learning_rate)

    @property
    def needs(self) -> tuple[str, ...]:
        return ("shape of an image", "gradients of a smooth network", "number of examples or the last layer's gradient")

    def refusal(self, observation: Observation) -> str:
        if reason := simulation_refusal(observation):
            return reason
        if observation.declared.examples is None and (reason := labels_refusal(observation)):
            return reason
        if observation.change is not None and observation.change.steps > 1:
            return (
                f"a change of {observation.change.steps} steps has no one gradient to be equal to; InvertingGradients "
                "runs the steps"
            )
        assert observation.declared.shape is not None
        kinds = ImageNetwork(observation.model).piecewise(observation.declared.shape)
        if kinds and not self.insist:
            return (
                f"the network has {', '.join(kinds)}, without a second derivative to follow; use InvertingGradients, "
                "which does not need it, or DLG(insist=True)"
            )
        return ""

    def reconstruct(self, rounds: Sequence[Observation], watch: Watch, generator: Generator) -> Reconstruction:
        (observation,) = rounds
        shape = observation.declared.shape
        assert shape is not None
        network = ImageNetwork(observation.model, torch.float64)
        examples, used, facts = _examples(observation, network, watch, generator)
        target = Target(observation.gradients, network.like)
        attempts: list[_Guess] = []
        for restart in range(self.restarts):
            if restart and watch.over:
                break
            images, labels = (
                torch.randn(size, generator=generator, device=generator.device, dtype=torch.float64).to(network.device)
                for size in ((examples, *shape), (examples, network.labels(shape)))
            )
            attempts.append(self._attempt(_Guess(images, labels), network, target, watch, restart))
        best = min(attempts, key=lambda one: one.objective)
        kinds = network.piecewise(shape)
        labels = best.labels.argmax(1)
        order = labels.argsort(stable=True)
        return Reconstruction(
            images=best.images[order].to(network.own_dtype),
            labels=tuple(labels[order].tolist()),
            used=tuple(dict.fromkeys(("shape", *used))),
            facts={
                "objective": best.objective,
                "attempts": float(len(attempts)),
                "numbers compared": float(target.entries),
                **({"not smooth": ", ".join(kinds)} if kinds else {}),
                **facts,
            },
            stopped=watch.stopped,
        )

    def _attempt(self, start: _Guess, network: ImageNetwork, target: Target, watch: Watch, restart: int) -> _Guess:
        """The best guess met on the way down from one beginning."""
        variables = [start.images.clone().requires_grad_(), start.labels.clone().requires_grad_()]
        search = torch.optim.LBFGS(
            variables,
            self.learning_rate,
            _INNER,
            tolerance_grad=0.0,  # its own limits are absolute, and gradients of gradients small
            tolerance_change=0.0,
            line_search_fn="strong_wolfe",
        )
        best = start

        def evaluated() -> float:
            nonlocal best
            images, labels = variables
            objective = target.squared(network.gradients(images, labels.softmax(1), target.names))
            for variable, slope in zip(variables, torch.autograd.grad(objective, variables), strict=True):
                variable.grad = slope
            value = float(objective.detach())
            if value < best.objective:
                best = _Guess(images.detach().clone(), labels.detach().clone(), value)
            if watch.over:
                raise _TimeIsUp
            return value

        before = inf
        for iteration in range(self.iterations):
            try:
                search.step(evaluated)  # type: ignore[no-untyped-call]  # torch's own
            except _TimeIsUp:
                break
            # Not finite: the line search has jumped out of the numbers, and nothing leads back.
            if best.objective >= before * (1 - _STALLED) or not all(bool(one.isfinite().all()) for one in variables):
                break
            before = best.objective
            share = (restart + (iteration + 1) / self.iterations) / self.restarts
            watch.tell(f"attempt {restart + 1} of {self.restarts}", share)
        return best


def _examples(
    observation: Observation, network: ImageNetwork, watch: Watch, generator: Generator
) -> tuple[int, tuple[str, ...], dict[str, float | str]]:
    """How many images are behind a gradient, what of it was declared, and what to say of it."""
    if (examples := usable_examples(observation)) is not None:
        return examples, ("examples",), {}
    batch = batch_behind(observation, network, watch, generator)
    return len(batch.labels), batch.used, {"inferred examples": float(len(batch.labels))} if not batch.used else {}


@final
@dataclass(frozen=True)
class _Guess:
    """Images, logits of their soft labels `(b, labels)`, and how far their gradient is from the one observed."""

    images: Tensor
    labels: Tensor
    objective: float = inf


class _TimeIsUp(Exception):
    """Ends a quasi-Newton step from inside."""
