"""Imprint: a layer whose rows sort images into bins, so that every image alone in its bin can be read off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Final, final

import torch
from torch import Generator, Tensor, nn

from privfm.attacks.reconstruction.architectures import asleep
from privfm.attacks.reconstruction.closed_form.layers import calls, first_linear, probes
from privfm.attacks.reconstruction.linear_layer import layer_inputs
from privfm.checks import InvalidArgument, at_least, non_negative, positive, require
from privfm.contracts import MaliciousAttack, Observation, Reconstruction, Watch

_LOWEST: Final = 8.0
"""Deviations under the mean of the lowest cut, below which no image is expected."""

_ROUNDING: Final = 4
"""Sums of a batch are off by a few times the type's spacing, relative to the sum of their terms' sizes."""

_FAINT: Final = 1e-2
"""A bin whose ratio is less certain than this in every copy is left out, and so is one whose copies differ by more."""

_SPARE: Final = 0.1
"""Share of a bent layer's outputs that stay as they are. Of a layer used up nothing of an image but its brightness goes
on, all images of a label have the same gradient behind it, and a mixture of them looks pure."""


class Imprinted(nn.Module):
    """A model with an imprint block before it: `x + spread(relu(imprint(x)))` goes on.

    Args:
      model: whose input it changes, by little.
      pixels: of an image.
      rows: of the block.
    """

    def __init__(self, model: nn.Module, pixels: int, rows: int) -> None:
        super().__init__()
        self.imprint = nn.Linear(pixels, rows)
        self.spread = nn.Linear(rows, pixels, bias=False)
        self.model = model

    def forward(self, pixel_values: Tensor, *rest: Any, **more: Any) -> Any:
        flat = pixel_values.flatten(1)
        added = self.spread(torch.relu(self.imprint(flat)))
        return self.model((flat + added).reshape(pixel_values.shape), *rest, **more)


@final
@dataclass(frozen=True)
class Imprint(MaliciousAttack):
    """Sorts images by brightness: row i is open to those brighter than cut i, neighbours differ by one bin.

    All rows have the same weight (the mean pixel) and cuts that the public statistics make equally likely; all their
    outputs go on along the same vector, so that an image has the same dL/dz in every row that it opens. The difference
    of two neighbouring rows of the gradient is then the sum over the images between two cuts; over the bias's
    difference, it is the image if there is one. The rows come in `copies`, each with a vector of its own: an image
    alone gives the same in all of them, a mixture does not.

    | behind the gradient                   | result                                                              |
    |---------------------------------------|---------------------------------------------------------------------|
    | any batch, or a secure sum of clients | exactly the images alone in their bins, of all clients together     |
    | n images, k bins that fit             | each is alone with probability (1 - 1/k)^(n - 1)                    |
    | several in a bin                      | left out, and counted; with `copies=1` their mixture is given.      |
    |                                       | Copies differ only as far as the images' gradients behind the layer |
    |                                       | do: in float32, like images of one label may pass as one            |
    | dL/dz small against the batch's sum   | left out: a bin's difference is lost in rounding                    |
    | images of exactly the same brightness | never apart                                                         |
    | brightness under or over every cut    | under: unseen; over: the last bin                                   |
    | several local steps                   | the rows move: exact for small learning rates only                  |
    | clipping of the whole update          | as without, as far as floats reach                                  |

    The server adds a layer, which a client who looks at the model sees, or bends one that is there (`layer`), of which
    at least a tenth stays as it is. Cost: of one pass over the layer's gradient.

    Args:
      shape: of an image, `(channels, height, width)`.
      bins: per copy.
      mean, deviation: of an image's mean pixel, from public images of the kind; see `brightness`.
      layer: name of a first linear layer on the flattened image, followed by ReLU and another linear layer, to be bent;
        empty: a block is put before the model.
      copies: of the bins; at least 2 to tell images from mixtures.
      strength: of the block's output, relative to the pixels; it carries the gradient back, and is no matter otherwise.
      error: of an entry of the gradient, absolute, beside float rounding: a channel's quantisation step.

    Source: Fowl, Geiping, Czaja, Goldblum, Goldstein, "Robbing the fed: directly obtaining private data in federated
    learning with modified models", ICLR 2022. Copies as a certificate are ours.
    """

    shape: tuple[int, int, int]
    bins: int
    mean: float
    deviation: float
    layer: str = ""
    copies: int = 2
    strength: float = 1e-3
    error: float = 0.0

    def __post_init__(self) -> None:
        for side in self.shape:
            at_least("shape", side, 1)
        at_least("bins", self.bins, 2)
        at_least("copies", self.copies, 1)
        positive("deviation", self.deviation)
        positive("strength", self.strength)
        non_negative("error", self.error)

    @property
    def needs(self) -> tuple[str, ...]:
        return ("a model it has prepared", "mean and deviation of public images' brightness")

    @property
    def pixels(self) -> int:
        """Of an image."""
        return int(torch.tensor(self.shape).prod())

    @property
    def cuts(self) -> Tensor:
        """Brightness from which each row is open, `(bins,)` float64: quantiles, and a first one below all images."""
        shares = torch.arange(self.bins, dtype=torch.float64) / self.bins
        standard = torch.special.ndtri(shares)
        standard[0] = -_LOWEST
        cuts: Tensor = self.mean + self.deviation * standard
        return cuts

    # --------------------------------------------------------------------------------------------------- the trap

    def prepare(self, model: nn.Module, generator: Generator) -> nn.Module:
        rows = self.bins * self.copies
        if self.layer:
            trapped = deepcopy(model)
            first = first_linear(trapped, self.shape, self.layer)
            imprint, spread = first.module, self._following(trapped)
            scale, shift = first.scale, first.shift
            spare = _SPARE if self.copies > 1 else 0.0
            require(
                rows <= (1 - spare) * imprint.out_features,
                f"bins x copies = {rows} of the {imprint.out_features} outputs of {self.layer!r}: expected at most "
                f"{1 - spare:.0%} of them, lower bins; with nothing else going on, copies do not tell mixtures apart",
            )
        else:
            like = next(model.parameters())
            with torch.random.fork_rng(devices=[]):  # the layers' own initialisation, overwritten below
                trapped = Imprinted(deepcopy(model), self.pixels, rows).to(like)
            trapped.train(model.training)
            imprint, spread = trapped.imprint, trapped.spread
            scale, shift = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        row = (1 / self.pixels / scale).expand(self.pixels)
        along = torch.randn(spread.out_features, self.copies, generator=generator, dtype=torch.float64)
        along *= self.strength / (self.bins * self.deviation)
        with torch.no_grad():
            imprint.weight[:rows] = row.to(imprint.weight)
            imprint.bias[:rows] = (-self.cuts - (row * shift).sum()).repeat(self.copies).to(imprint.bias)
            spread.weight[:, :rows] = along.repeat_interleave(self.bins, dim=1).to(spread.weight)
        self._require_bins(trapped, imprint)
        return trapped

    def _following(self, model: nn.Module) -> nn.Linear:
        met = calls(model, probes(model, self.shape))
        place = [one.name for one in met].index(self.layer)
        after = met[place + 1].module if place + 1 < len(met) else None
        if not isinstance(after, nn.Linear):
            raise InvalidArgument(
                f"behind layer={self.layer!r} comes {type(after).__name__}: expected nn.Linear, so that all rows go on "
                "along one vector; leave layer empty to add a block"
            )
        return after

    def _require_bins(self, trapped: nn.Module, imprint: nn.Linear) -> None:
        """Tries on a probe that a row is open or shut, and that all open rows of a copy have the same gradient."""
        image = probes(trapped, self.shape)[2:]
        bias = imprint.bias.detach().clone().requires_grad_()
        name = next(name for name, one in trapped.named_parameters() if one is imprint.bias)
        frozen = {key: one.detach() for key, one in trapped.named_parameters()} | {name: bias}
        with torch.enable_grad(), asleep(trapped):
            output: Any = torch.func.functional_call(trapped, frozen, (image,))
            logits = output if isinstance(output, Tensor) else output[0]
            (sent,) = torch.autograd.grad((logits * torch.arange(1, logits.numel() + 1).to(logits)).sum(), bias)
        sent = sent[: self.bins * self.copies].double().reshape(self.copies, self.bins)
        same = (sent - sent[:, :1]).abs() <= 1e-3 * sent[:, :1].abs()
        require(
            bool((same | (sent == 0)).all()) and bool((sent[:, 0] != 0).all()),
            f"the rows of {self.layer or 'the block'!r} are not open or shut, or nothing of them comes back: expected "
            "ReLU behind the layer, and a model that its output reaches; leave layer empty to add a block",
        )

    # ------------------------------------------------------------------------------------------------ the reading

    def _names(self) -> tuple[str, str]:
        place = self.layer or "imprint"
        return f"{place}.weight", f"{place}.bias"

    def refusal(self, observation: Observation) -> str:
        parameters = dict(observation.model.named_parameters())
        weight, bias = self._names()
        if weight not in parameters or parameters[bias].shape[0] < self.bins * self.copies:
            return f"the model has no layer {weight!r} with the trap; send out what prepare() returns"
        cuts = parameters[bias].detach()[: self.bins].double()
        if bool((cuts.diff() > 0).any()):
            return f"{bias!r} holds no cuts in order; send out what prepare() returns"
        try:
            tensors = observation.gradients
        except InvalidArgument as reason:
            return str(reason)
        for name in (weight, bias):
            if name not in tensors or bool(tensors[name][: self.bins * self.copies].isnan().any()):
                return f"{name} was not sent, or is hidden in part; neighbouring rows cannot be subtracted"
        return ""

    def reconstruct(self, rounds: Sequence[Observation], watch: Watch, generator: Generator) -> Reconstruction:
        weight, bias, error = self._differences(rounds[0].gradients)
        model = {name: one.detach().double() for name, one in rounds[0].model.named_parameters()}
        row, cuts = model[self._names()[0]][0], -model[self._names()[1]][: self.bins]
        uncertain = error / bias.abs()  # (copies, bins), relative, of a ratio
        occupied = (uncertain < _FAINT).any(0)
        found = []
        for place in occupied.nonzero()[:, 0].tolist():
            if watch.over:
                break
            watch.tell("reading bins", place / self.bins)
            given = layer_inputs(weight[:, place], bias[:, place])
            best = given[int(uncertain[:, place].argmin())]
            dim = max(1.0, float(best.square().mean().rsqrt()))  # the error of a pixel does not shrink with it
            doubt = min(2 * dim * float(uncertain[:, place].max()), _FAINT)
            alone = bool(((given - best).norm(dim=1) <= doubt * best.norm()).all())
            above = cuts[place + 1] if place + 1 < self.bins else torch.inf
            margin = doubt * (row.abs() @ best.abs())
            if alone and cuts[place] - margin <= row @ best <= above + margin:
                found.append(best)
        return Reconstruction(
            images=self._images(rounds[0].model, torch.stack(found)) if found else None,
            used=("public statistics", "malicious model"),
            facts={
                "bins": self.bins,
                "bins occupied": int(occupied.sum()),
                "bins left out as mixtures": int(occupied.sum()) - len(found),
                "images": len(found),
            },
            stopped=watch.stopped,
        )

    def _differences(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Sums over each bin, `(copies, bins, pixels)` and `(copies, bins)`, and the latter's error, `(copies, 1)`."""
        weight, bias = (tensors[name][: self.bins * self.copies] for name in self._names())
        spacing = _ROUNDING * torch.finfo(weight.dtype).eps
        above = weight.double().reshape(self.copies, self.bins, -1), bias.double().reshape(self.copies, self.bins)
        sums = [one - torch.cat([one[:, 1:], torch.zeros_like(one[:, :1])], dim=1) for one in above]
        return sums[0], sums[1], spacing * sums[1].abs().sum(1, keepdim=True) + 2 * self.error

    def _images(self, model: nn.Module, given: Tensor) -> Tensor:
        if not self.layer:
            return given.reshape(-1, *self.shape)
        return first_linear(model, self.shape, self.layer).images(given, self.shape)


def brightness(images: Tensor) -> tuple[float, float]:
    """Mean and standard deviation of public images' mean pixel, for `Imprint`; images `(n, ...)`, n > 1."""
    require(len(images) > 1, f"{len(images)} images: expected at least 2")
    means = images.double().flatten(1).mean(1)
    return float(means.mean()), float(means.std())
