"""Images from a gradient, or from a change by several local steps, by matching its direction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Final, final

import torch
from torch import Generator, Tensor, nn

from privfm.attacks.reconstruction.images.known import Batch, batch_behind, labels_refusal, simulation_refusal
from privfm.attacks.reconstruction.images.local_updates import Arrangement, SimulatedClient
from privfm.attacks.reconstruction.images.networks import ImageNetwork
from privfm.attacks.reconstruction.images.objectives import Target, total_variation
from privfm.attacks.reconstruction.images.search import Best, Descent, PixelRange
from privfm.checks import at_least, non_negative, positive
from privfm.contracts import LocalSteps, Observation, Reconstruction, ReconstructionAttack, Watch

_ONE_GRADIENT: Final = LocalSteps(1.0)
"""A gradient is the mean gradient of one step of any length."""


@final
@dataclass(frozen=True)
class Setting:
    """What every attempt starts from."""

    network: ImageNetwork
    target: Target
    batch: Batch

    def training(self, observation: Observation, generator: Generator) -> SimulatedClient:
        """The client, simulated; in an order that is drawn."""
        if observation.change is None:
            return SimulatedClient(self.network, _ONE_GRADIENT, self.batch.labels, self.target.names, generator)
        # What was trained but is not seen has moved all the same.
        trained = tuple(dict.fromkeys((*self.network.trained, *observation.tensors)))
        return SimulatedClient(self.network, observation.change, self.batch.labels, trained, generator)

    def surplus_and_missing(self, sent: Mapping[str, Tensor]) -> tuple[int, int]:
        """The labels of which a guess has too many and too few, by the gradient of the logits' offsets.

        That gradient falls with the number of a label's examples. Observed and simulated are compared at one length,
        since the observed one may have been scaled.
        """
        assert self.batch.offsets is not None
        observed, simulated = self.target.seen(self.batch.offsets), sent[self.batch.offsets]
        simulated = simulated.masked_fill(observed.isnan(), torch.nan)
        apart = nn.functional.normalize(observed.nan_to_num(), dim=0) - nn.functional.normalize(
            simulated.nan_to_num(), dim=0
        )
        return int(apart.argmax()), int(apart.argmin())


@final
@dataclass(frozen=True)
class Attempt:
    """One attempt's end: the search's best, its images `(b, channels, height, width)` and their labels `(b,)`."""

    best: Best
    images: Tensor
    labels: Tensor


@final
@dataclass(frozen=True)
class InvertingGradients(ReconstructionAttack):
    """Images whose update points the way of the one observed: one cosine over all layers, Adam on signs, smoothness.

    Observations: gradients, or changes by one or several steps of plain gradient descent, whose steps it runs on its
    guess. Needs no second derivative of the activations: a network of ReLUs and max-pooling is fine. The direction
    alone counts, so clipped, summed and averaged updates are the same to it. What is NaN counts nowhere.

    | observation                            | what happens                                                            |
    |----------------------------------------|-------------------------------------------------------------------------|
    | neither examples nor labels declared   | both are read off the last layer; `facts` says how many were found      |
    | the last layer is not seen, no labels  | refused: declare the labels                                             |
    | several steps of less than all data    | which image stood in which step is searched too; no label of a step is  |
    |                                        | asked for                                                               |
    | parameters frozen in the model         | taken as not moved by the client                                        |
    | parameters trained and not observed    | moved in the simulation, compared nowhere                               |
    | Adam's change                          | refused: a step of it has no useful derivative                          |
    | batch normalisation in training mode   | refused: depends on statistics that the server does not have            |
    | an update sparsified by top-k          | set `sent_only`, or have zeros of what was cut away as NaN              |

    The images' order means nothing. Images of one label in one batch may come out mixed: their sum is well determined
    before they are.

    Args:
      pixels: least and largest valid value of a pixel in the model's input scale.
      iterations: of each restart.
      restarts: independent beginnings; the one with the lowest objective is given back.
      learning_rate: first step, in deviations of pixels (a quarter of the valid range); a tenth of it after 3/8, then
        5/8, then 7/8 of the iterations. The authors' 0.1 stays in the first valley of small networks with max-pooling;
        1.0 was chosen on other batches than those whose scores are reported.
      total_variation: weight of the smoothness, in images of deviation one. More for large and trained networks.
      sent_only: compare entries that are not zero only.
      order_invariance: weight of the epochs' agreement, where a client made several epochs of several steps. Ours.

    Cost: each iteration takes a gradient of a gradient, about four times a client's step, of every local step; memory
    grows with the local steps.

    Source: Geiping, Bauermeister, Dröge, Moeller, "Inverting gradients: how easy is it to break privacy in federated
    learning?", 2020, equation 4; iterations, schedule and weight are the defaults of the authors' program.
    Several steps: Dimitrov, Balunović, Konstantinov, Vechev, "Data leakage in federated averaging", TMLR 2022.
    """

    pixels: tuple[float, float] = (0.0, 1.0)
    iterations: int = 4800
    restarts: int = 1
    learning_rate: float = 1.0
    total_variation: float = 1e-4
    sent_only: bool = False
    order_invariance: float = 0.1

    def __post_init__(self) -> None:
        PixelRange(*self.pixels)
        at_least("iterations", self.iterations, 1)
        at_least("restarts", self.restarts, 1)
        positive("learning_rate", self.learning_rate)
        non_negative("total_variation", self.total_variation)
        non_negative("order_invariance", self.order_invariance)

    @property
    def needs(self) -> tuple[str, ...]:
        return ("shape of an image", "gradients, or changes by gradient descent", "the last layer's gradient or labels")

    def refusal(self, observation: Observation) -> str:
        return simulation_refusal(observation) or labels_refusal(observation)

    def reconstruct(self, rounds: Sequence[Observation], watch: Watch, generator: Generator) -> Reconstruction:
        (observation,) = rounds
        network = ImageNetwork(observation.model)
        batch = batch_behind(observation, network, watch, generator)
        target = Target(observation.gradients, network.like, self.sent_only)
        attempts: list[Attempt] = []
        for restart in range(self.restarts):
            if restart and watch.over:
                break
            attempts.append(self._attempt(observation, Setting(network, target, batch), watch, generator, restart))
        best = min(attempts, key=lambda one: one.best.loss)
        return Reconstruction(
            images=best.images,
            labels=tuple(best.labels.tolist()),
            used=tuple(dict.fromkeys(("shape", *batch.used))),
            facts={
                "objective": best.best.loss,
                "iterations": float(best.best.iterations),
                "attempts": float(len(attempts)),
                "numbers compared": float(target.entries),
                **batch.facts,
            },
            stopped=watch.stopped,
        )

    def _attempt(
        self, observation: Observation, setting: Setting, watch: Watch, generator: Generator, restart: int
    ) -> Attempt:
        """One search from fresh noise and, where it matters, a fresh order."""
        training = setting.training(observation, generator)
        limits = PixelRange(*self.pixels)
        shape = (1, training.epochs, len(setting.batch.labels), *(observation.declared.shape or ()))
        met = [(inf, training.arrangement)]  # what the lowest loss was met with

        def loss(_run: int, searched: Tensor, _all: Tensor) -> Tensor:
            match = setting.target.cosine(training.sent(limits.pixels(searched)))
            smooth = self.total_variation * total_variation(searched)
            whole = match + smooth + self.order_invariance * training.disagreement(searched)
            met[0] = min(met[0], (float(whole.detach()), training.arrangement), key=lambda one: one[0])
            return whole

        def score(images: Tensor, arrangement: Arrangement) -> float:
            return float(setting.target.cosine(training.sent(limits.pixels(images), arrangement, again=False)))

        def relabel(images: Tensor) -> tuple[int, int]:
            return setting.surplus_and_missing(training.sent(limits.pixels(images), again=False))

        (best,) = Descent(self.iterations, self.learning_rate).run(
            limits.start(shape, generator, setting.network.like),
            loss,
            limits,
            watch,
            generator,
            told=f"attempt {restart + 1} of {self.restarts}",
            done=(restart / self.restarts, (restart + 1) / self.restarts),
            between=training.rearranging(
                score, relabel if setting.batch.offsets in setting.target.names else None, self.iterations, generator
            ),
        )
        images, labels = training.images(best.values, met[0][1])
        return Attempt(best, limits.pixels(images), labels)
