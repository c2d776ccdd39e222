"""Image scores against closed forms, a slow loop over windows and all assignments tried one by one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Generator, Tensor

from privfm.attacks.reconstruction.image_scores import (
    mean_squared_error,
    perceptual_distance,
    psnr,
    score_images,
    ssim,
)
from privfm.checks import InvalidArgument


def images(count: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.rand(count, *shape, generator=Generator().manual_seed(seed), dtype=torch.float64)


def slow_ssim(one: np.ndarray, other: np.ndarray, side: int, peak: float) -> float:
    """Wang et al. 2004, equations 14 to 16 with C3 = C2 / 2 (hence 13), window by window and channel by channel."""
    offsets = np.arange(side) - side // 2
    weights = np.exp(-(offsets[:, None] ** 2 + offsets[None, :] ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    found = []
    for x, y in zip(one, other, strict=True):
        for i in range(x.shape[0] - side + 1):
            for j in range(x.shape[1] - side + 1):
                a, b = x[i : i + side, j : j + side], y[i : i + side, j : j + side]
                mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
                var_a, var_b = (weights * (a - mean_a) ** 2).sum(), (weights * (b - mean_b) ** 2).sum()
                both = (weights * (a - mean_a) * (b - mean_b)).sum()
                found.append(
                    (2 * mean_a * mean_b + c1) * (2 * both + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
                )
    return float(np.mean(found))


def test_psnr_closed_forms() -> None:
    true = torch.zeros(3, 1, 4, 4)
    said = torch.stack([torch.full((1, 4, 4), value) for value in (1.0, 0.1, 0.0)])
    assert psnr(said, true).tolist() == pytest.approx([0, 20, math.inf], abs=1e-6)
    assert psnr(255 * said, 255 * true, peak=255).tolist() == pytest.approx([0, 20, math.inf], abs=1e-6)
    assert psnr(said[:1], true[:1], peak=2).item() == pytest.approx(10 * math.log10(4))
    assert mean_squared_error(said, true).tolist() == pytest.approx([1, 0.01, 0])


@pytest.mark.parametrize(
    ("shape", "side"), [((1, 11, 11), 11), ((3, 14, 17), 11), ((1, 8, 8), 7), ((1, 9, 30), 9), ((2, 1, 5), 1)]
)
@pytest.mark.parametrize("peak", [1.0, 255.0])
def test_ssim_equals_a_slow_loop(shape: tuple[int, int, int], side: int, peak: float) -> None:
    one = peak * images(2, *shape, seed=1)
    other = 0.6 * one + 0.4 * peak * images(2, *shape, seed=2)
    expected = [slow_ssim(a.numpy(), b.numpy(), side, peak) for a, b in zip(one, other, strict=True)]
    assert ssim(one, other, peak).tolist() == pytest.approx(expected, abs=1e-10)
    assert 0.2 < min(expected) < 0.99


def test_ssim_known_cases() -> None:
    one = images(2, 3, 16, 16, seed=5)
    torch.testing.assert_close(ssim(one, one), torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(ssim(one, 1 - one), ssim(1 - one, one))
    assert float(ssim(one, 1 - one).max()) < 0  # an inverted image is anticorrelated everywhere
    # Constant images: the structure term is 1 and the luminance term is left.
    grey, dark = torch.full((1, 1, 12, 12), 0.5), torch.full((1, 1, 12, 12), 0.25)
    assert float(ssim(grey, dark)) == pytest.approx((2 * 0.125 + 1e-4) / (0.3125 + 1e-4))
    # Scale of image and peak together does not matter.
    torch.testing.assert_close(ssim(one, one.flip(0)), ssim(7 * one, 7 * one.flip(0), peak=7))


def test_everything_in_another_order_is_matched_back() -> None:
    true = images(5, 1, 8, 8)
    order = [3, 0, 4, 2, 1]
    score = score_images(true[order] + 1e-3, true)
    assert score.pairs == tuple((order.index(r), r) for r in range(5)) and score.references == 5
    assert score.mean_psnr == pytest.approx(60) and min(score.ssim) > 0.999
    assert score.mse == pytest.approx([1e-6] * 5) and score.share_above(59.9) == 1 and score.share_above(60.1) == 0


@pytest.mark.parametrize("match", ["mse", "ssim"])
@pytest.mark.parametrize("count", [2, 4, 6])
def test_the_assignment_is_the_best_of_all(match: str, count: int) -> None:
    true, said = images(4, 1, 12, 12, seed=6), images(count, 1, 12, 12, seed=7)

    def cost(p: int, r: int) -> float:
        if match == "mse":
            return float((said[p] - true[r]).square().mean())
        return -slow_ssim(said[p].numpy(), true[r].numpy(), 11, 1.0)

    table = [[cost(p, r) for r in range(4)] for p in range(count)]
    if count >= 4:
        best = min(sum(table[p][r] for r, p in enumerate(chosen)) for chosen in permutations(range(count), 4))
    else:
        best = min(sum(table[p][r] for p, r in enumerate(chosen)) for chosen in permutations(range(4), count))
    score = score_images(said, true, match=match)  # type: ignore[arg-type]
    assert sum(table[p][r] for p, r in score.pairs) == pytest.approx(best, abs=1e-9)
    assert len(score.pairs) == min(count, 4) and score.predictions == count
    for p, r in score.pairs:
        assert score.mse[r] == pytest.approx(float((said[p] - true[r]).square().mean()))
        assert score.ssim[r] == pytest.approx(slow_ssim(said[p].numpy(), true[r].numpy(), 11, 1.0))
        assert score.psnr[r] == pytest.approx(-10 * math.log10(score.mse[r]))


def test_one_prediction_answers_for_one_reference_and_missing_ones_count_nothing() -> None:
    true = torch.cat([images(1, 1, 8, 8)] * 3)
    score = score_images(true[:1], true, peak=2.0)
    assert sorted(score.psnr) == [0, 0, math.inf] and sorted(score.ssim) == pytest.approx([0, 0, 1])
    assert sorted(score.mse) == [0, 4, 4] and score.mean_psnr == math.inf and score.mean_mse == pytest.approx(8 / 3)
    for nothing in (None, true[:0]):
        empty = score_images(nothing, true)
        assert empty.pairs == () and empty.mean_psnr == empty.mean_ssim == 0 and empty.mse == (1, 1, 1)


def test_foreign_images_are_told_from_recovered_ones() -> None:
    true = images(6, 3, 16, 16, seed=8)
    foreign, near = score_images(images(6, 3, 16, 16, seed=9), true), score_images(true + 0.01, true)
    assert foreign.mean_psnr < 10 and abs(foreign.mean_ssim) < 0.1  # uniform noise: mse 1/6, 7.8 dB
    assert near.mean_psnr == pytest.approx(40) and foreign.share_above(20) == 0


class _Pyramid(torch.nn.Module):
    """Two layers of features: the image, and its blocks of 2 x 2."""

    def forward(self, given: Tensor) -> Sequence[Tensor]:
        return [given, torch.nn.functional.avg_pool2d(given, 2)]


def test_perceptual_distance_equals_a_slow_loop(tmp_path: Path) -> None:
    one, other = images(2, 3, 4, 4, seed=10), images(2, 3, 4, 4, seed=11)
    weights = [torch.tensor([0.5, 2.0, 0.0]), torch.tensor([1.0, 0.25, 3.0])]
    expected = []
    for said, true in zip(one, other, strict=True):
        total = 0.0
        for layer, weight in enumerate(weights):
            a, b = (_Pyramid()(image[None])[layer][0] for image in (said, true))
            places = [(i, j) for i in range(a.shape[1]) for j in range(a.shape[2])]
            for i, j in places:
                u, v = a[:, i, j] / a[:, i, j].norm(), b[:, i, j] / b[:, i, j].norm()
                total += float((weight * (u - v) ** 2).sum()) / len(places)
        expected.append(total)
    found = perceptual_distance(one, other, _Pyramid(), weights)
    assert found.tolist() == pytest.approx(expected, rel=1e-6)
    assert perceptual_distance(one, one, _Pyramid()).tolist() == [0, 0]
    torch.save({f"lin{k}.model.1.weight": one[None, :, None, None] for k, one in enumerate(weights)}, tmp_path / "w.pt")
    torch.testing.assert_close(perceptual_distance(one, other, _Pyramid(), tmp_path / "w.pt"), found)
    zero = torch.zeros_like(one)
    assert bool(perceptual_distance(zero, one, _Pyramid()).isfinite().all())


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    true = images(2, 3, 8, 8)
    with pytest.raises(InvalidArgument, match=r"no LPIPS weights at .*absent\.pt: give the path of a local copy"):
        perceptual_distance(true, true, _Pyramid(), tmp_path / "absent.pt")
    with pytest.raises(InvalidArgument, match="1 weights for 2 layers"):
        perceptual_distance(true, true, _Pyramid(), [torch.ones(3)])
    with pytest.raises(InvalidArgument, match="layer 1 has 3 channels, 4 weights"):
        perceptual_distance(true, true, _Pyramid(), [torch.ones(3), torch.ones(4)])
    with pytest.raises(InvalidArgument, match="as the references"):
        score_images(true[:, :1], true)
    with pytest.raises(InvalidArgument, match="not finite"):
        score_images(true * torch.nan, true)
    with pytest.raises(InvalidArgument, match=r"references has shape \(0, 3, 8, 8\)"):
        score_images(true, true[:0])
    with pytest.raises(InvalidArgument, match="expected a float type"):
        psnr(true.int(), true.int())
    with pytest.raises(InvalidArgument, match="peak=0"):
        ssim(true, true, peak=0)
    with pytest.raises(InvalidArgument, match="match='psnr' is not known"):
        score_images(true, true, match="psnr")  # type: ignore[arg-type]
