"""Images from the first fully connected layer: every output that one example alone has reached gives it away."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, final

import torch
from torch import Generator, Tensor

from privfm.attacks.reconstruction.closed_form.layers import completed, first_linear_of
from privfm.attacks.reconstruction.linear_layer import layer_inputs, shared_input
from privfm.checks import InvalidArgument, at_least, positive
from privfm.contracts import Observation, Reconstruction, ReconstructionAttack, Watch

_COMMON: Final = 0.1
"""Least share of the pixels known in both of two rows that are compared: fewer could agree in black borders alone."""

_ROUNDING: Final = 16
"""Two rows of one example differ by the rounding of a product and a division each: a few times the type's spacing."""

_COARSE: Final = 1e-4
"""Above this, rows that agree say nothing: 100 mixtures of two images on a line have neighbours as close as that."""

_FLOOR: Final = 1e-6
"""Relative distances under this are computed again from differences: products of rows in float64 cancel to 1e-8."""

_MIXTURE: Final = 1e-4
"""An image this close to the affine span of surer ones, relative to its distance from one of them, mixes them."""


@final
@dataclass(frozen=True)
class LinearInversion(ReconstructionAttack):
    """Divides the rows of the first linear layer's weight gradient by its bias gradient, and keeps those that agree.

    Row i of the weight over entry i of the bias is the mean of the inputs that reach output i, weighted by their
    dL/dz_i. Behind a ReLU a row may have a single example, and rows that have the same single one are equal; two rows
    over several examples weigh them differently. So what several rows agree on is an image, without knowing labels,
    the batch size or the loss.

    | behind the gradient                        | result                                                      |
    |--------------------------------------------|-------------------------------------------------------------|
    | one example, one step                      | exact, whatever follows the layer                           |
    | several, a ReLU behind the layer           | exact for those that are alone in `agreeing` outputs        |
    | several, no ReLU (or all outputs open)     | nothing                                                     |
    | two equal images                           | one image                                                   |
    | a pixel hidden in all rows of an image     | the mean of its other pixels                                |
    | clipping by the norm, scaling, plain SGD   | as without                                                  |
    | noise                                      | nothing, as soon as it exceeds `tolerance`                  |
    | change after a step in float32             | rounded by the weights' size: needs a larger `tolerance`    |

    A secure sum of n clients is a batch of all their examples. Cost: products of `(outputs, pixels)` matrices,
    `outputs^2` numbers of memory.

    Args:
      layer: name of the module; empty: the first one that the model calls, which has to be `nn.Linear`.
      agreeing: outputs that have to give the same image; 1 believes every output, mixtures included.
      tolerance: relative distance of rows that agree; None: 16 times the spacing of the gradient's type. Mixtures of
        two images lie on a line, and among many some agree by chance: the closer the tolerance, the fewer. What lies
        in the affine span of images that more rows agree on is taken for a mixture.

    Source: Phong et al., "Privacy-preserving deep learning via additively homomorphic encryption", 2018, section 3; Fan
    et al., "Rethinking privacy preserving deep learning", 2020, on several examples. That agreement certifies is ours.

    >>> import torch
    >>> from privfm.contracts import Observation, gradients_of
    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3)).double()
    >>> image = torch.tensor([[[[0.1, 0.2], [0.3, 0.4]]]]).double()
    >>> loss = torch.nn.functional.cross_entropy(model(image), torch.tensor([1]))
    >>> observation = Observation(model, gradients_of(model, loss)).told(shape=(1, 2, 2))
    >>> LinearInversion()(observation).images.flatten().tolist()
    [0.1..., 0.2..., 0.3..., 0.4...]
    """

    layer: str = ""
    agreeing: int = 2
    tolerance: float | None = None

    def __post_init__(self) -> None:
        at_least("agreeing", self.agreeing, 1)
        if self.tolerance is not None:
            positive("tolerance", self.tolerance)

    @property
    def needs(self) -> tuple[str, ...]:
        return ("shape of an image",)

    def refusal(self, observation: Observation) -> str:
        try:
            tensors = observation.gradients
            first, _ = first_linear_of(observation, self.layer)
        except InvalidArgument as reason:
            return str(reason)
        for name in first.names:
            if name not in tensors or bool(tensors[name].isnan().all()):
                return f"{name} was not sent, is hidden or does not exist; without it the inputs' scale is unknown"
        spacing = torch.finfo(tensors[first.names[0]].dtype).eps
        if self.tolerance is None and _ROUNDING * spacing > _COARSE:
            return (
                f"{first.names[0]} is {tensors[first.names[0]].dtype}, in which rows of one image agree no better "
                "than some mixtures do; give tolerance= and a larger agreeing="
            )
        if first.module.out_features < self.agreeing:
            return f"agreeing={self.agreeing} rows of {first.module.out_features} outputs; lower agreeing"
        return ""

    def reconstruct(self, rounds: Sequence[Observation], watch: Watch, generator: Generator) -> Reconstruction:
        observation = rounds[0]
        first, shape = first_linear_of(observation, self.layer)
        weight, bias = (observation.gradients[name] for name in first.names)
        tolerance = _ROUNDING * torch.finfo(weight.dtype).eps if self.tolerance is None else self.tolerance
        weight, bias = weight.double(), bias.double()
        groups = [
            group
            for group in agreeing_rows(layer_inputs(weight, bias), bias, tolerance, watch)
            if len(group) >= self.agreeing
        ]
        found = pure([shared_input(weight[group], bias[group]) for group in groups])
        images, guessed = None, 0.0
        if found:
            images, guessed = completed(first.images(torch.stack([image for _, image in found]), shape))
        return Reconstruction(
            images=images,
            used=("shape",),
            facts={
                "outputs": len(bias),
                "outputs reached": int((bias.nan_to_num().abs() > 0).sum()),
                "images": len(found),
                "mixtures left out": len(groups) - len(found),
                "share of pixels guessed": guessed,
                "agreeing outputs, least": min((len(groups[place]) for place, _ in found), default=0),
            },
            stopped=watch.stopped,
        )


def agreeing_rows(inputs: Tensor, bias: Tensor, tolerance: float, watch: Watch) -> list[Tensor]:
    """Groups rows `(c, k)` that are equal up to `tolerance`; the largest group first. NaN is unknown.

    Args:
      inputs: what each output says, from `layer_inputs`.
      bias: the bias's gradient `(c,)`: a group forms around its largest.
      tolerance: distance over the smaller norm, on what both know.
      watch: ends it early.
    """
    known = inputs.isfinite()
    usable = (known.double().mean(1) >= _COMMON).nonzero()[:, 0]
    usable = usable[bias[usable].abs().argsort(descending=True)]
    known, rows = known[usable], inputs[usable].where(known[usable], 0.0)
    mask, squares = known.double(), rows.square()
    own = squares @ mask.T  # a row's squared norm where the other is known too
    apart = (own + own.T - 2 * rows @ rows.T).clamp_min(0)
    scale = torch.minimum(own, own.T)
    near = (apart <= max(tolerance, _FLOOR) ** 2 * scale) & (mask @ mask.T >= _COMMON * inputs.shape[1])
    free = torch.ones(len(usable), dtype=torch.bool, device=inputs.device)
    groups = []
    for row in range(len(usable)):
        if watch.over:
            break
        if not free[row]:
            continue
        others = (near[row] & free).nonzero()[:, 0]
        exactly = ((rows[others] - rows[row]) * mask[others] * mask[row]).square().sum(1)
        members = others[exactly <= tolerance**2 * scale[row, others]]
        free[members] = False
        free[row] = False
        groups.append(usable[members])
    return sorted(groups, key=len, reverse=True)


def pure(images: Sequence[Tensor]) -> list[tuple[int, Tensor]]:
    """Those of the images `(k,)`, surest first, that are no mixture of surer ones, with their places."""
    kept: list[tuple[int, Tensor]] = []
    for place, image in enumerate(images):
        if kept:
            base = kept[0][1]
            off, others = (image - base).nan_to_num(), torch.stack([one - base for _, one in kept]).nan_to_num()
            mixed = torch.linalg.lstsq(others.T.cpu(), off[:, None].cpu(), driver="gelsd").solution[:, 0]
            if float((off.cpu() - others.T.cpu() @ mixed).norm()) <= _MIXTURE * float(off.norm()):
                continue
        kept.append((place, image))
    return kept
