"""Images whose gradient matches and whose statistics are those the model was trained on; several seeds that agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import cos, pi
from typing import Any, Final, final

import torch
from torch import Generator, Tensor

from privfm.attacks.reconstruction.images.known import batch_behind, labels_refusal, simulation_refusal
from privfm.attacks.reconstruction.images.local_updates import pairs
from privfm.attacks.reconstruction.images.networks import ImageNetwork, batch_normalisation
from privfm.attacks.reconstruction.images.objectives import Target, total_variation
from privfm.attacks.reconstruction.images.search import Descent, PixelRange
from privfm.checks import at_least, non_negative, positive
from privfm.contracts import Observation, Reconstruction, ReconstructionAttack, Watch

_WARM_UP: Final = 0.0025
"""Share of the iterations in which the step grows to its full size: 50 of 20 000 (Yin et al. 2021, section 4)."""

_NORM: Final = 1e-6
"""Weight of the images' squared norm (there, section 4)."""


@final
@dataclass(frozen=True)
class GradInversion(ReconstructionAttack):
    """Gradient matching for models with batch normalisation: their running statistics are a prior on the images.

    Every layer's input should have the mean and variance that the layer has seen in training, and searches from
    several seeds should agree on each image. A prior is not evidence: what comes out looks like training data where
    the gradient says little, which is no reconstruction; compare with the truth, or with a foreign gradient's result.

    | observation                          | what happens                                                              |
    |--------------------------------------|---------------------------------------------------------------------------|
    | no running batch statistics in model | refused, unless `batch_statistics=0`                                      |
    | batch normalisation in training mode | refused: the gradient depends on the batch's own statistics               |
    | change of several steps              | refused: `InvertingGradients` runs them                                   |
    | neither examples nor labels declared | both are read off the last layer                                          |

    Against the paper: the gradient is matched by its direction, so that clipped, summed and averaged updates are the
    same to it (there by the squared distance); seeds are compared pixel by pixel after images of one label are
    paired, with the mean square, without moving them (there registered by a trained network); any label may occur
    more than once.

    Args:
      pixels: least and largest valid value of a pixel in the model's input scale.
      iterations: of all seeds, side by side.
      seeds: beginnings that are to agree.
      learning_rate: largest step, in deviations of pixels (a quarter of the valid range); grows, then falls to zero
        along a cosine.
      total_variation: weight of the smoothness.
      batch_statistics: weight of the distance to the running statistics, a mean over layers. Ours: the paper's 0.1 is
        beside a squared gradient distance.
      group_consistency: weight of each seed's mean squared distance from the mean of all.
      noise: deviation of noise added at each step, in units of the step (Langevin).

    Cost: as `InvertingGradients`, times the seeds; memory is of one seed.

    Source: Yin, Mallya, Vahdat, Alvarez, Kautz, Molchanov, "See through gradients: image batch recovery via
    GradInversion", CVPR 2021, equations 1, 3 to 5 and 9 to 12.
    """

    pixels: tuple[float, float] = (0.0, 1.0)
    iterations: int = 20_000
    seeds: int = 4
    learning_rate: float = 0.1
    total_variation: float = 1e-4
    batch_statistics: float = 0.1
    group_consistency: float = 0.01
    noise: float = 0.2

    def __post_init__(self) -> None:
        PixelRange(*self.pixels)
        at_least("iterations", self.iterations, 1)
        at_least("seeds", self.seeds, 1)
        positive("learning_rate", self.learning_rate)
        for name in ("total_variation", "batch_statistics", "group_consistency", "noise"):
            non_negative(name, getattr(self, name))

    @property
    def needs(self) -> tuple[str, ...]:
        return ("shape of an image", "gradients", "running batch statistics", "the last layer's gradient or labels")

    def refusal(self, observation: Observation) -> str:
        if reason := simulation_refusal(observation) or labels_refusal(observation):
            return reason
        change, labels = observation.change, observation.declared.labels
        if change is not None and change.steps > 1:
            return f"a change of {change.steps} local steps; InvertingGradients runs the steps"
        if change is not None and labels is not None and (change.batch_size or len(labels)) < len(labels):
            return (
                f"the one step took {change.batch_size} of {len(labels)} examples, and nothing says of which labels; "
                "InvertingGradients searches that too"
            )
        layers = batch_normalisation(observation.model).values()
        if self.batch_statistics > 0 and not any(layer.running_mean is not None for layer in layers):
            return (
                "no layer of batch normalisation keeps running statistics; use InvertingGradients, or "
                "batch_statistics=0 for the agreement of seeds alone"
            )
        return ""

    def reconstruct(self, rounds: Sequence[Observation], watch: Watch, generator: Generator) -> Reconstruction:
        (observation,) = rounds
        network, limits = ImageNetwork(observation.model), PixelRange(*self.pixels)
        batch = batch_behind(observation, network, watch, generator)
        target = Target(observation.gradients, network.like)
        shape = (self.seeds, len(batch.labels), *(observation.declared.shape or ()))

        def loss(run: int, searched: Tensor, everyone: Tensor) -> Tensor:
            with network.batch_statistics() as statistics:
                match = target.cosine(network.gradients(limits.pixels(searched), batch.labels, target.names))
            plain = self.total_variation * total_variation(searched) + _NORM * searched.square().sum(0).mean()
            prior = self.batch_statistics * statistics_distance(statistics)
            agreement = (searched - _consensus(run, everyone, batch.labels)).square().mean()
            return match + plain + prior + self.group_consistency * agreement

        found = Descent(
            self.iterations, self.learning_rate, warm_up_and_cosine, signed=False, noise=self.noise
        ).run(
            limits.start(shape, generator, network.like), loss, limits, watch, generator, told=f"{self.seeds} seeds"
        )  # fmt: skip
        best = min(found, key=lambda one: one.loss)
        return Reconstruction(
            images=limits.pixels(best.values),
            labels=tuple(batch.labels.tolist()),
            used=tuple(dict.fromkeys(("shape", *batch.used, *(["batch statistics"] * (self.batch_statistics > 0))))),
            facts={
                "objective": best.loss,
                "iterations": float(best.iterations),
                "numbers compared": float(target.entries),
                **batch.facts,
            },
            stopped=watch.stopped,
        )


def statistics_distance(seen: Sequence[tuple[Any, Tensor]]) -> Tensor:
    """How far the inputs of layers of batch normalisation are from what these have seen in training.

    The distance of the channels' means plus that of their variances, each a Euclidean norm, as a mean over layers.

    Args:
      seen: layers with running statistics, or without (these do not count), and their inputs `(b, channels, ...)`.

    Returns:
      A scalar; zero where no layer keeps statistics.

    Source: Yin et al. 2021, equation 5 (there a sum over layers).
    """
    distances = []
    for layer, inputs in seen:
        if layer.running_mean is not None:
            others = [axis for axis in range(inputs.dim()) if axis != 1]
            variance, mean = torch.var_mean(inputs, others, correction=0)
            distances.append(_length(mean - layer.running_mean) + _length(variance - layer.running_var))
    return torch.stack(distances).mean() if distances else torch.zeros(())


def warm_up_and_cosine(share: float) -> float:
    """The factor of the step size after a share of the iterations: up in 1/400 of them, down to zero along a cosine.

    Source: Yin et al. 2021, section 4.

    >>> [round(warm_up_and_cosine(share), 3) for share in (0.0, 0.00125, 0.5, 1.0)]
    [0.0, 0.5, 0.502, 0.0]
    """
    if share < _WARM_UP:
        return share / _WARM_UP
    return (1 + cos(pi * (share - _WARM_UP) / (1 - _WARM_UP))) / 2


def _consensus(run: int, everyone: Tensor, labels: Tensor) -> Tensor:
    """The mean over seeds of the images that are this seed's, `(b, channels, height, width)`."""
    return torch.stack([other[pairs(everyone[run], other, labels)] for other in everyone]).mean(0)


def _length(vector: Tensor) -> Tensor:
    """Euclidean, with a derivative at zero."""
    return (vector.square().sum() + torch.finfo(vector.dtype).tiny).sqrt()
