"""How much of the clients' images an attack has recovered: PSNR, SSIM, perceptual distance; one prediction a reference.

Scores know the truth, attacks do not: nothing here is called by an attack. Images are compared as they are, in the
scale that `peak` belongs to: undo the model's normalisation, and clamp to the valid range if a viewer would, before
scoring.

| case                              | treatment                                                                     |
|-----------------------------------|-------------------------------------------------------------------------------|
| fewer predictions than references | a reference without one counts SSIM 0 and an error of peak^2, which is 0 dB   |
| more predictions than references  | all may be matched: more guesses score more. `predictions` says how many      |
| a prediction equal to a reference | PSNR is infinite, and so is the mean: read `share_above` and `mse` beside it  |
| an entry that is not finite       | refused                                                                       |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, final

import torch
from torch import Tensor

from privfm.checks import InvalidArgument, one_of, positive, require

_WINDOW: Final = 11
"""Side of SSIM's window in pixels (Wang et al. 2004, section III-C)."""

_SIGMA: Final = 1.5
"""Standard deviation of the window's Gaussian weights in pixels (there)."""

_LUMINANCE: Final = 0.01
"""K1 (there)."""

_CONTRAST: Final = 0.03
"""K2 (there)."""

_NO_DIRECTION: Final = 1e-10
"""Added to the length of a feature vector, so that a zero one stays zero (the public LPIPS code's value)."""


@final
@dataclass(frozen=True)
class ImageScore:
    """What of the references the predictions recover, each list in the order of the references.

    Attributes:
      psnr: of each reference, in dB; 0 without a prediction.
      ssim: of each reference; 0 without a prediction.
      mse: mean squared error of each reference; peak^2 without a prediction.
      pairs: `(prediction, reference)`.
      predictions: number of them.
    """

    psnr: tuple[float, ...]
    ssim: tuple[float, ...]
    mse: tuple[float, ...]
    pairs: tuple[tuple[int, int], ...]
    predictions: int

    @property
    def references(self) -> int:
        """Number of them."""
        return len(self.psnr)

    @property
    def mean_psnr(self) -> float:
        """Over the references, in dB; infinite as soon as one is recovered to the last bit."""
        return sum(self.psnr) / len(self.psnr)

    @property
    def mean_ssim(self) -> float:
        """Over the references."""
        return sum(self.ssim) / len(self.ssim)

    @property
    def mean_mse(self) -> float:
        """Over the references."""
        return sum(self.mse) / len(self.mse)

    def share_above(self, psnr: float) -> float:
        """Share of the references recovered with at least so many dB."""
        return sum(one >= psnr for one in self.psnr) / len(self.psnr)


def mean_squared_error(predicted: Tensor, references: Tensor) -> Tensor:
    """Of each image: `(b, channels, height, width)` twice -> `(b,)` float64."""
    _require_images(predicted, references)
    return (predicted.double() - references.double()).square().flatten(1).mean(1)


def psnr(predicted: Tensor, references: Tensor, peak: float = 1.0) -> Tensor:
    """Peak signal-to-noise ratio of each image, `10 log10(peak^2 / mse)` in dB; infinite where they are equal.

    Args:
      predicted: `(b, channels, height, width)`.
      references: the same shape.
      peak: width of the valid range: 1 for [0, 1], 255 for bytes, 2 for [-1, 1].

    Returns:
      `(b,)` float64.

    Raises:
      InvalidArgument: shapes do not fit, an entry is not finite.

    >>> psnr(torch.full((1, 1, 2, 2), 0.6), torch.full((1, 1, 2, 2), 0.5)).round(decimals=3).tolist()
    [20.0]
    """
    positive("peak", peak)
    return 10 * (peak**2 / mean_squared_error(predicted, references)).log10()


def ssim(predicted: Tensor, references: Tensor, peak: float = 1.0) -> Tensor:
    """Structural similarity of each image, at most 1: mean over channels and over all places of a Gaussian window.

    Windows lie inside the image whole; weights sum to 1 and the variances are the weighted ones (not divided by n - 1).
    An image with a side under 11 gets the largest odd window that fits, with the same Gaussian cut off earlier: its
    values are comparable with each other, not with those of larger images.

    Args:
      predicted: `(b, channels, height, width)`.
      references: the same shape.
      peak: as in `psnr`.

    Returns:
      `(b,)` float64.

    Raises:
      InvalidArgument: shapes do not fit, an entry is not finite.

    Source: Wang, Bovik, Sheikh, Simoncelli, "Image quality assessment: from error visibility to structural similarity",
    IEEE TIP 2004, equations 13 to 16; without its optional downsampling. Channels are averaged (the paper takes grey
    images).
    """
    positive("peak", peak)
    _require_images(predicted, references)
    one, other = predicted.double(), references.double()
    weights = _window(min(*one.shape[-2:], _WINDOW)).to(one.device)

    def blurred(images: Tensor) -> Tensor:
        single = images.flatten(0, 1)[:, None]
        across = torch.nn.functional.conv2d(single, weights[None, None, None, :])
        return torch.nn.functional.conv2d(across, weights[None, None, :, None])

    mean, other_mean = blurred(one), blurred(other)
    variance = blurred(one.square()) - mean.square()
    other_variance = blurred(other.square()) - other_mean.square()
    covariance = blurred(one * other) - mean * other_mean
    first, second = (_LUMINANCE * peak) ** 2, (_CONTRAST * peak) ** 2
    luminance = (2 * mean * other_mean + first) / (mean.square() + other_mean.square() + first)
    structure = (2 * covariance + second) / (variance + other_variance + second)
    return (luminance * structure).flatten(1).mean(1).reshape(one.shape[:2]).mean(1)


def score_images(
    predicted: Tensor | None, references: Tensor, peak: float = 1.0, *, match: Literal["mse", "ssim"] = "mse"
) -> ImageScore:
    """Scores predicted images against the true ones, one prediction a reference.

    Args:
      predicted: `(p, channels, height, width)` in any order; None or p = 0: nothing was recovered.
      references: `(b, channels, height, width)`.
      peak: width of the valid range.
      match: pairs have the least sum of mean squared errors, or the largest sum of SSIM. One pairing for all scores.

    Raises:
      InvalidArgument: there is no reference, shapes do not fit, an entry is not finite.

    Cost: p x b comparisons of images.

    Source: the assignment is Kuhn 1955 ("the Hungarian method").

    >>> images = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    >>> score_images(images[[2, 0]], images).pairs
    ((1, 0), (0, 2))
    """
    positive("peak", peak)
    one_of("match", match, ("mse", "ssim"))
    require(references.dim() == 4 and len(references) > 0, _expected("references", references))
    if predicted is None or len(predicted) == 0:
        return _scored([], references, references[:0], peak)
    shape = tuple(references.shape[1:])
    require(
        tuple(predicted.shape[1:]) == shape,
        f"predicted has shape {tuple(predicted.shape)}: expected (p, *{shape}), as the references",
    )
    pairs = _matched(predicted, references, peak, match)
    return _scored(pairs, references, predicted, peak)


def perceptual_distance(
    predicted: Tensor,
    references: Tensor,
    features: Callable[[Tensor], Sequence[Tensor]],
    weights: Sequence[Tensor] | Path | None = None,
) -> Tensor:
    """LPIPS of each image, 0 for equal ones: how far deep features lie apart. Nothing is downloaded.

    At each layer features are divided by their length over channels; the squared difference is weighted by channel and
    averaged over places; layers are summed.

    Args:
      predicted: `(b, channels, height, width)` in the scale that `features` takes.
      references: the same shape.
      features: of a frozen network in eval mode: images -> one `(b, c_l, h_l, w_l)` for each layer.
      weights: `(c_l,)` of each layer, or a file that holds them (a state dictionary with one tensor for each layer, in
        its order, as the public LPIPS weights); None: ones, the paper's baseline without learned weights, whose values
        are not LPIPS and must not be called so.

    Returns:
      `(b,)` float64.

    Raises:
      InvalidArgument: the file is not there, or numbers and shapes of layers and weights do not fit.

    Source: Zhang, Isola, Efros, Shechtman, Wang, "The unreasonable effectiveness of deep features as a perceptual
    metric", CVPR 2018, equation 1.
    """
    _require_images(predicted, references)
    with torch.no_grad():
        layers = list(zip(features(predicted), features(references), strict=True))
    require(len(layers) > 0, "features gives no layer: expected a sequence of tensors (b, c, h, w)")
    known = _channel_weights(weights) if weights is not None else [torch.ones(one.shape[1]) for one, _ in layers]
    require(len(known) == len(layers), f"{len(known)} weights for {len(layers)} layers: expected one for each")
    total = torch.zeros(len(predicted), dtype=torch.float64, device=predicted.device)
    for number, ((one, other), weight) in enumerate(zip(layers, known, strict=True)):
        require(weight.numel() == one.shape[1], f"layer {number} has {one.shape[1]} channels, {weight.numel()} weights")
        apart = (_directions(one) - _directions(other)).square()
        weighted = apart * weight.to(apart).flatten()[None, :, None, None]
        total = total + weighted.sum(1).flatten(1).mean(1)
    return total


def _matched(predicted: Tensor, references: Tensor, peak: float, match: str) -> list[tuple[int, int]]:
    from scipy.optimize import linear_sum_assignment

    costs = []
    for reference in references:
        expanded = reference.expand_as(predicted)
        costs.append(mean_squared_error(predicted, expanded) if match == "mse" else -ssim(predicted, expanded, peak))
    rows, columns = linear_sum_assignment(torch.stack(costs).cpu().numpy())
    return [(p, r) for r, p in zip(rows.tolist(), columns.tolist(), strict=True)]


def _scored(pairs: list[tuple[int, int]], references: Tensor, predicted: Tensor, peak: float) -> ImageScore:
    ratios, similarities, errors = [0.0] * len(references), [0.0] * len(references), [peak**2] * len(references)
    for p, r in pairs:
        one, other = predicted[p : p + 1], references[r : r + 1]
        ratios[r], similarities[r] = float(psnr(one, other, peak)), float(ssim(one, other, peak))
        errors[r] = float(mean_squared_error(one, other))
    return ImageScore(tuple(ratios), tuple(similarities), tuple(errors), tuple(pairs), len(predicted))


def _window(most: int) -> Tensor:
    side = most if most % 2 else most - 1
    offsets = torch.arange(side, dtype=torch.float64) - side // 2
    weights = (-offsets.square() / (2 * _SIGMA**2)).exp()
    return weights / weights.sum()


def _directions(layer: Tensor) -> Tensor:
    values = layer.double()
    found: Tensor = values / (values.norm(dim=1, keepdim=True) + _NO_DIRECTION)
    return found


def _channel_weights(weights: Sequence[Tensor] | Path) -> Sequence[Tensor]:
    if not isinstance(weights, Path):
        return weights
    if not weights.is_file():
        raise InvalidArgument(
            f"no LPIPS weights at {weights}: give the path of a local copy, or weights=None for unweighted features"
        )
    held = torch.load(weights, map_location="cpu", weights_only=True)
    return list(held.values())


def _require_images(predicted: Tensor, references: Tensor) -> None:
    require(references.dim() == 4 and references.numel() > 0, _expected("references", references))
    require(predicted.shape == references.shape, f"{_expected('predicted', predicted)}, as {tuple(references.shape)}")
    for name, images in (("predicted", predicted), ("references", references)):
        require(images.dtype.is_floating_point, f"{name} is {images.dtype}: expected a float type")
        require(bool(images.isfinite().all()), f"{name}: an entry is not finite; leave such images out")


def _expected(name: str, images: Tensor) -> str:
    return f"{name} has shape {tuple(images.shape)}: expected (b, channels, height, width)"
