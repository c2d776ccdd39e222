"""One client's steps on a matrix of one row: under a privacy plan, or where only some values are trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import final

import torch
from torch import Generator, Tensor, nn

from privfm.checks import PrivacyBroken
from privfm.contracts import Examples, GradientPrivacy
from privfm.learning.training import Descent, Losses
from privfm.vectors import Layout


def drawn_batches(
    training: Descent, examples: int, generator: Generator, privacy: GradientPrivacy | None
) -> list[Tensor]:
    """Places of the examples of all of a client's steps. Under a plan it is the plan that draws them.

    All are drawn before the first step, so that noise and dropout, which come from the same generator, find it in the
    same state however steps are computed.
    """
    drawn = training.schedule.batches(examples, generator) if privacy is None else privacy.batches(examples, generator)
    return list(drawn)


def check_moved(start: Tensor, end: Tensor, batches: Sequence[Tensor]) -> None:
    """Refuses steps that had examples and changed nothing.

    Raises:
      PrivacyBroken: the weights are what they were.
    """
    if any(len(batch) for batch in batches) and torch.equal(start, end):
        raise PrivacyBroken(
            f"{len(batches)} private steps moved no weight: the optimizer does not see the private gradients, or all "
            "of them were clipped to zero without noise"
        )


@final
class MatrixSteps:
    """A `Descent` on one row, `(1, d)`: what many clients at once do, for one client.

    Args:
      module: the model; its weights change from step to step.
      parameters: what is trained, by name.
      losses: examples -> `(b,)`.
      layout: names the columns.
      active: `(d,)` bool, what changes; None: everything.
    """

    def __init__(
        self, module: nn.Module, parameters: Mapping[str, nn.Parameter], losses: Losses, layout: Layout,
        active: Tensor | None = None,
    ) -> None:  # fmt: skip
        self._module, self._parameters, self._losses, self._layout = module, parameters, losses, layout
        self._kept = None if active is None else ~active

    def run(
        self, training: Descent, examples: Examples, generator: Generator, privacy: GradientPrivacy | None = None
    ) -> Tensor:
        """What the module's weights become, `(d,)`.

        Raises:
          PrivacyBroken: gradients have not one row an example and one column a trained value, or nothing moved.
        """
        start = self._layout.flatten(self._parameters)
        weights = start.repeat(1, 1)
        state = training.stacked(weights)
        batches = drawn_batches(training, len(examples), generator, privacy)
        for now, places in enumerate(batches):
            gradients = self._mean(examples, places) if privacy is None else self._private(examples, places, privacy)
            if privacy is not None:
                gradients = privacy.noised(gradients, [len(examples)], [generator])
            training.step(weights, gradients, state, now)
            if self._kept is not None:
                weights = torch.where(self._kept.to(start.device), start, weights)
            with torch.no_grad():
                for name, value in self._layout.unflatten(weights[0]).items():
                    self._parameters[name].copy_(value)
        if privacy is not None:
            check_moved(start, weights[0], batches)
        return weights[0]

    def _mean(self, examples: Examples, places: Tensor) -> Tensor:
        """Gradient of the mean loss, `(1, d)`."""
        loss = self._losses(examples.take(places)).mean()
        found = torch.autograd.grad(loss, list(self._parameters.values()), materialize_grads=True)
        gradient = self._layout.flatten(dict(zip(self._parameters, found, strict=True)))[None]
        return self._masked(gradient)

    def _private(self, examples: Examples, places: Tensor, privacy: GradientPrivacy) -> Tensor:
        """Sum of clipped gradients, `(1, d)`; zero for an empty batch."""
        d = self._layout.d
        if len(places) == 0:
            return torch.zeros(1, d, device=next(iter(self._parameters.values())).device)
        found = self._each(examples.take(places))
        if found.shape != (len(places), d):
            raise PrivacyBroken(
                f"gradients of {len(places)} examples have shape {tuple(found.shape)}, expected ({len(places)}, {d}): "
                "some trained value got none of its own"
            )
        # In float64, so that the order of the sum, rounded once, does not show: secure noise is made for that.
        return privacy.clip(self._masked(found)).sum(0, keepdim=True, dtype=torch.float64).to(found)

    def _each(self, examples: Examples) -> Tensor:
        """The gradient of every example, `(b, d)`.

        An example that raises is a row of zeros, like one whose gradient is not finite: were its client lost, who
        answers would tell of it. What the machine cannot do is nobody's data, and raises.
        """
        from privfm.learning.per_example import per_example_gradients

        def gradients(some: Examples) -> Tensor:
            return per_example_gradients(self._module, self._parameters, self._losses, some, self._layout)

        try:
            return gradients(examples)
        except PrivacyBroken:
            raise
        except Exception:  # whatever one example makes the model raise
            rows = torch.zeros(len(examples), self._layout.d, device=next(iter(self._parameters.values())).device)
        for place, row in enumerate(rows):
            try:
                row.copy_(gradients(examples.take(torch.tensor([place])))[0])
            except (PrivacyBroken, MemoryError, torch.OutOfMemoryError):
                raise
            except Exception:
                row.zero_()
        return rows

    def _masked(self, gradients: Tensor) -> Tensor:
        return gradients if self._kept is None else gradients.masked_fill(self._kept.to(gradients.device), 0.0)
