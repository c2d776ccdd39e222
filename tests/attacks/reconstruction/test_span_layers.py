"""Spans of gradients put together by hand: their rank, what lies in them, and how far noise and rounding tilt them."""

from __future__ import annotations

import pytest
import torch
from torch import Generator, Tensor

from privfm.attacks.reconstruction.span.layers import layer_span, rounding
from privfm.attacks.reconstruction.span.prefixes import leaves

WIDTH = 48


def normal(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("inputs", [1, 5, 30, WIDTH - 1])
def test_a_span_of_fewer_inputs_than_the_width_is_sharp(inputs: int) -> None:
    given = normal(inputs, WIDTH, 1)
    rows = [(normal(80, inputs, seed) @ given).float().double() for seed in (2, 3)]
    span = layer_span(rows, reserve=20)
    assert span.sharp
    assert span.rank == inputs
    away, blur = span.measured(given)
    assert bool((away < blur + 1e-6).all())
    assert bool(span.taken(away, blur, 1e-6, away).all())
    foreign, blur = span.measured(normal(200, WIDTH, 4))
    assert float(foreign.min()) > (1e-6 if inputs == WIDTH - 1 else 0.1)
    assert int(span.taken(foreign, blur, 1e-6, foreign).sum()) == 0


def test_as_many_inputs_as_the_width_leave_a_reserve_out_and_are_not_sharp() -> None:
    rows = [normal(80, WIDTH, 1) @ normal(WIDTH, WIDTH, 2)]
    assert layer_span(rows, reserve=5).rank == WIDTH - 5
    assert layer_span(rows, reserve=20).rank == WIDTH - WIDTH // 4
    assert not layer_span(rows, reserve=20).sharp


@pytest.mark.parametrize("rows", [30, 200])
def test_noise_alone_has_no_direction_and_half_its_size_would_have(rows: int) -> None:
    noise = [0.3 * normal(rows, WIDTH, seed) for seed in (1, 2)]
    assert layer_span(noise, reserve=20, noise=0.3).rank <= 1  # the bound is met up to fluctuations
    assert layer_span(noise, reserve=20, noise=0.15).rank > 5
    away, blur = layer_span(noise, reserve=20, noise=0.6).measured(normal(3, WIDTH, 3))
    assert away.tolist() == [1.0, 1.0, 1.0]
    assert blur.tolist() == [0.0, 0.0, 0.0]


def test_the_blur_bounds_how_far_noise_moves_inputs_out() -> None:
    given = normal(6, WIDTH, 1)
    rows = [normal(120, 6, 2) @ given + 1e-3 * normal(120, WIDTH, 3)]
    span = layer_span(rows, reserve=20, noise=1e-3)
    assert span.rank == 6
    away, blur = span.measured(given)
    assert bool((away < blur).all())
    assert bool((away > blur / 30).all())  # and is no empty bound


def test_a_zero_vector_is_outside() -> None:
    span = layer_span([normal(20, 3, 1) @ normal(3, WIDTH, 2)], reserve=20)
    assert span.measured(torch.zeros(1, WIDTH, dtype=torch.float64))[0].tolist() == [1.0]


@pytest.mark.parametrize("steps", [1, 4])
def test_rounding_of_weights_is_as_large_as_it_is_in_truth(steps: int) -> None:
    weight, gradient = 0.02 * normal(400, 400, 1).float(), 1e-4 * normal(400, 400, 2)
    moved, learning_rate = weight.clone(), 1e-3
    for _ in range(steps):
        moved = (moved.double() - learning_rate * gradient).float()
    error = (weight.double() - moved.double()) / (learning_rate * steps) - gradient
    said = rounding([weight], steps, learning_rate)
    assert 0.5 < said / float(error.std()) < 2.0


def test_leaves_are_what_nothing_continues() -> None:
    assert leaves([(1,), (2,), (1, 2), (1, 2, 3), (1, 3)]) == [(2,), (1, 2, 3), (1, 3)]
