"""Updates of several local steps: the client's training is run on the guess, its arrangement being part of the guess.

What the client did is public (learning rate, steps, batch size), which of its examples stood in which step is not. A
guess is a set of images for every epoch, the labels that belong to them, and the order in which each epoch takes them.
Epochs hold the same images in different orders; nothing says which is which, so that each has images of its own, tied
to the others' by what does not depend on order, and they are paired at the end.

Source: Dimitrov, Balunović, Konstantinov, Vechev, "Data leakage in federated averaging", TMLR 2022, sections 4.1 to
4.3. There the labels stand in a random order that stays as drawn; here the order is searched along with the images,
and so are labels that were inferred.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import ceil
from typing import Final, final

import torch
from torch import Generator, Tensor

from privfm.attacks.reconstruction.images.networks import ImageNetwork
from privfm.contracts import LocalSteps

_EXCHANGES_FROM: Final = 0.1
"""Share of the iterations before the first exchange is tried: from noise, no order is better than another. Ours."""

_EVERY: Final = 20
"""Iterations between two tries of another arrangement; a try costs a simulation without second derivatives. Ours."""


@final
@dataclass(frozen=True)
class Arrangement:
    """Which image has which label, and when it is used.

    Attributes:
      labels: `(examples,)`.
      order: `(epochs, examples)`: entry j of an epoch is the image at place j; batches are cut from the left.
    """

    labels: Tensor
    order: Tensor


@final
class SimulatedClient:
    """A client's local steps, as a differentiable function of the images it might have had; one gradient is one step.

    Args:
      network: of images.
      change: how the client trained, by plain gradient descent.
      labels: of all images it may have used, `(examples,)`.
      trained: names of the parameters that moved.
      generator: draws the first order.
    """

    def __init__(
        self, network: ImageNetwork, change: LocalSteps, labels: Tensor, trained: tuple[str, ...], generator: Generator
    ) -> None:
        self._network, self._change, self._trained = network, change, trained
        self._size = min(change.batch_size or len(labels), len(labels))
        self._batches = ceil(len(labels) / self._size)
        self.epochs = ceil(change.steps / self._batches)
        drawn = [torch.randperm(len(labels), generator=generator, device=generator.device) for _ in range(self.epochs)]
        self.arrangement = Arrangement(labels, torch.stack(drawn).to(labels.device))

    @property
    def ordered(self) -> bool:
        """Whether the order matters: every step takes less than all examples, in an order that nobody declared."""
        return self._batches > 1

    @property
    def whole_epochs(self) -> int:
        """Epochs that were finished; images of another may have been used or not."""
        return self._change.steps // self._batches

    def sent(self, images: Tensor, arrangement: Arrangement | None = None, again: bool = True) -> dict[str, Tensor]:
        """The mean gradient over the local steps, by parameter name: the change over `-learning_rate * weight`.

        Args:
          images: `(epochs, examples, channels, height, width)`.
          arrangement: in place of the present one.
          again: whether the result can be differentiated.
        """
        labels, order = (one := arrangement or self.arrangement).labels, one.order
        parameters, total, moving = dict(self._network.parameters), dict[str, Tensor](), dict[str, Tensor]()
        for step in range(self._change.steps):
            epoch, batch = divmod(step, self._batches)
            chosen = order[epoch, batch * self._size : (batch + 1) * self._size]
            found = self._network.gradients(images[epoch, chosen], labels[chosen], self._trained, parameters, again)
            if self._change.momentum and step:
                found = {name: self._change.momentum * moving[name] + found[name] for name in self._trained}
            moving = found
            # The sum is kept apart from the parameters: their difference would lose the digits that they have more.
            total = {name: total[name] + found[name] if step else found[name] for name in self._trained}
            moved = {name: parameters[name] - self._change.learning_rate * found[name] for name in self._trained}
            parameters = parameters | moved
        return {name: one / self._change.weight for name, one in total.items()}

    def disagreement(self, images: Tensor) -> Tensor:
        """How far epochs are from holding the same set of images: of each pixel's mean and mean square over the set.

        Zero where they do, in whatever order; of one epoch always.

        Args:
          images: `(epochs, examples, channels, height, width)`; an epoch that was not finished counts like others.

        Source: Dimitrov et al. 2022, section 4.2 (an order-invariant function of an epoch's images, compared over all
        pairs of epochs); the two moments are ours, they take features of a random convolution.
        """
        moments = torch.stack([images.mean(1), images.square().mean(1)], 1)
        # The mean over all pairs of epochs of |a - b|^2 is twice the variance over epochs.
        return 2 * moments.var(0, correction=0).mean()

    def rearranging(
        self,
        score: Callable[[Tensor, Arrangement], float],
        relabel: Callable[[Tensor], tuple[int, int]] | None,
        iterations: int,
        generator: Generator,
    ) -> Callable[[int, Tensor], None]:
        """What to call between the search's steps: tries other arrangements and keeps what scores lower.

        Exchanges two images of different batches of an epoch, where order matters, or their labels alone if no epoch
        was finished; gives an image another label, where labels were inferred.

        Args:
          score: of images in an arrangement, the lower the better.
          relabel: of images, the label that they have too often and the one that is missing most; None: labels stay.
          iterations: of the whole search.
          generator: draws what is tried.
        """

        def between(iteration: int, values: Tensor) -> None:
            if iteration % _EVERY:
                return
            images = values[0]
            present = score(images, self.arrangement)
            exchange = self.ordered and (iteration >= _EXCHANGES_FROM * iterations or self.whole_epochs == 0)
            for tried in self._others(images, relabel, exchange, generator):
                if (value := score(images, tried)) < present:
                    self.arrangement, present = tried, value

        return between

    def _others(
        self,
        images: Tensor,
        relabel: Callable[[Tensor], tuple[int, int]] | None,
        exchange: bool,
        generator: Generator,
    ) -> Iterator[Arrangement]:
        """Arrangements to try in place of the present one."""
        if relabel is not None:
            surplus, missing = relabel(images)
            having = (self.arrangement.labels == surplus).nonzero()[:, 0]
            if len(having) and surplus != missing:
                labels = self.arrangement.labels.clone()
                labels[having[_drawn(len(having), generator)]] = missing
                yield Arrangement(labels, self.arrangement.order)
        if exchange:
            labels, order = self.arrangement.labels, self.arrangement.order.clone()
            epoch, first = _drawn(self.epochs, generator), _drawn(len(labels), generator)
            others = [place for place in range(len(labels)) if place // self._size != first // self._size]
            places = [first, others[_drawn(len(others), generator)]]
            order[epoch, places] = order[epoch, places[::-1]]
            if self.whole_epochs == 0:  # an image that no step has used is noise still: it takes the other's pixels
                both = self.arrangement.order[0, places]
                labels, order = labels.clone(), self.arrangement.order
                labels[both] = labels[both.flip(0)]
            yield Arrangement(labels, order)

    def images(self, searched: Tensor, arrangement: Arrangement) -> tuple[Tensor, Tensor]:
        """The images behind all epochs and their labels: epochs paired with the first, image by image, and averaged.

        Pairs have one label and the least summed squared distance. Of a client that did not finish an epoch, only
        images that were used are given.

        Args:
          searched: `(epochs, examples, channels, height, width)`.
          arrangement: that they were found with.

        Returns:
          `(b, channels, height, width)` and `(b,)`, in ascending order of labels.

        Source: Dimitrov et al. 2022, section 4.3 (matching and averaging).
        """
        labels, found = arrangement.labels, searched[0]
        if self.whole_epochs == 0:
            used = arrangement.order[0, : self._change.steps * self._size]
            found, labels = found[used], labels[used]
        else:
            others = [other[pairs(found, other, labels)] for other in searched[1 : self.whole_epochs]]
            found = torch.stack([found, *others]).mean(0)
        order = labels.argsort(stable=True)
        return found[order], labels[order]


def pairs(first: Tensor, other: Tensor, labels: Tensor) -> Tensor:
    """For each image of one set its partner in another: of the same label, least squared distance in sum.

    Args:
      first: `(b, channels, height, width)`.
      other: the same.
      labels: `(b,)`, of both.

    Returns:
      Places in `other`, `(b,)`.
    """
    if int(labels.bincount().max()) == 1:  # nothing to choose
        return torch.arange(len(labels), device=labels.device)
    from scipy.optimize import linear_sum_assignment

    distances = torch.cdist(first.flatten(1).double(), other.flatten(1).double()).square()
    # More than any sum of distances, so that labels are never mixed.
    distances = distances.masked_fill(labels[:, None] != labels[None, :], float(distances.sum()) + 1.0)
    return torch.as_tensor(linear_sum_assignment(distances.cpu().numpy())[1], device=labels.device)


def _drawn(below: int, generator: Generator) -> int:
    return int(torch.randint(below, (), generator=generator, device=generator.device))
