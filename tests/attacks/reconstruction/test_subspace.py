"""Row spaces and ranks, against matrices built with known ones."""

from __future__ import annotations

import pytest
import torch
from torch import Generator, Tensor

from privfm.attacks.reconstruction.subspace import distances, gap_rank, row_space
from privfm.checks import InvalidArgument


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=Generator().manual_seed(seed), dtype=torch.float64)


def of_rank(rank: int, rows: int, width: int, seed: int = 0, decay: float = 0.0) -> Tensor:
    """A matrix of a known rank whose directions fade by `10^-decay` from the first to the last."""
    scales = torch.logspace(0, -decay, rank, dtype=torch.float64)
    return (normal(rows, rank, seed=seed) * scales) @ normal(rank, width, seed=seed + 1)


@pytest.mark.parametrize("rank", [1, 2, 7, 19])
@pytest.mark.parametrize("decay", [0.0, 4.0])
@pytest.mark.parametrize("noise", [1e-14, 1e-8])
def test_gap_rank_of_known_ranks(rank: int, decay: float, noise: float) -> None:
    matrix = of_rank(rank, 40, 24, rank, decay) + noise * normal(40, 24, seed=99)
    assert gap_rank(torch.linalg.svdvals(matrix)) == rank


def test_gap_rank_by_hand() -> None:
    assert gap_rank(torch.tensor([1.0, 0.5, 1e-6, 5e-7])) == 2
    assert gap_rank(torch.tensor([7.0, 7e-12, 7e-15])) == 1  # under 1e-9 all is rounding: no second gap
    assert gap_rank(torch.zeros(3)) == 0
    assert gap_rank(torch.tensor([5.0])) == 1
    values = torch.tensor([1.0, 1e-2, 9e-3, 1e-7])
    assert gap_rank(values) == 3 and gap_rank(values, most=2) == 1
    assert gap_rank(torch.tensor([1.0, 1e-5, 9e-6, 1e-7]), least=2) == 3
    with pytest.raises(InvalidArgument, match=r"values has shape \(2, 2\): expected \(r,\)"):
        gap_rank(torch.ones(2, 2))
    with pytest.raises(InvalidArgument, match="r > 0"):
        gap_rank(torch.ones(0))


def test_row_space_holds_the_rows_of_all_matrices_and_nothing_else() -> None:
    one, other = of_rank(3, 10, 20, 1), 1e-7 * of_rank(2, 6, 20, 5)  # a small gradient counts as much as a large one
    basis, values = row_space([one, torch.zeros(4, 20), other])
    assert basis.shape == (5, 20) and len(values) == 16 and basis.dtype == torch.float64
    torch.testing.assert_close(basis @ basis.T, torch.eye(5, dtype=torch.float64))
    for row in (*one, *other):
        assert float((row - basis.T @ (basis @ row)).norm() / row.norm()) < 1e-9
    assert float(distances(normal(50, 20, seed=9), basis).min()) > 0.5


def test_rank_is_given_by_number_or_by_tolerance_or_by_the_gap() -> None:
    matrix = of_rank(6, 12, 15, 3, decay=3.0)
    values = torch.linalg.svdvals(matrix) / matrix.norm()
    assert len(row_space([matrix])[0]) == 6
    assert len(row_space([matrix], rank=2)[0]) == 2
    between = float((values[3] * values[4]).sqrt() / values[0])
    assert len(row_space([matrix], tolerance=between)[0]) == 4
    torch.testing.assert_close(row_space([matrix])[1][:6], values[:6])


def test_gradients_that_hold_nothing_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="zero or missing"):
        row_space([torch.zeros(2, 3)])
    with pytest.raises(InvalidArgument, match="zero or missing"):
        row_space([])
    hidden = torch.ones(2, 3)
    hidden[0, 0] = torch.inf
    with pytest.raises(InvalidArgument, match="not finite"):
        row_space([hidden])


def test_a_partly_hidden_gradient_is_not_silently_left_out() -> None:
    """NaN marks what the server does not see: with a second matrix beside it, the first must not just disappear."""
    hidden = torch.ones(2, 3)
    hidden[0, 0] = torch.nan
    with pytest.raises(InvalidArgument):
        row_space([hidden, torch.eye(3)[:1]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_distances_are_sines(dtype: torch.dtype) -> None:
    basis = torch.linalg.qr(normal(8, 3, seed=2)).Q.T
    outside = torch.linalg.qr(torch.cat([basis, normal(1, 8, seed=3)]).T).Q[:, 3]
    angles = torch.tensor([0.0, 1e-6, 0.3, 1.2, torch.pi / 2], dtype=torch.float64)
    vectors = angles.cos()[:, None] * basis[1] + angles.sin()[:, None] * outside
    lengths = torch.tensor([1e-3, 1.0, 5.0, 1e4, 2.0], dtype=torch.float64)[:, None]
    found = distances((lengths * vectors).to(dtype), basis)
    rounding = 1e-12 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(found, angles.sin(), rtol=0, atol=rounding)
    assert found.dtype == torch.float64


def test_many_float32_vectors_are_as_exact_as_few() -> None:
    """Above 4096 a float32 pass sorts out the far ones; near ones must not be float32's 1e-3."""
    basis = torch.linalg.qr(normal(32, 10, seed=4)).Q.T
    inside = normal(300, 10, seed=5) @ basis
    vectors = torch.cat([normal(5000, 32, seed=6), inside, inside + 0.01 * normal(300, 32, seed=7)]).float()
    many, few = (
        distances(vectors, basis),
        torch.cat([distances(part, basis) for part in (vectors[k : k + 1000] for k in range(0, len(vectors), 1000))]),
    )
    torch.testing.assert_close(many, few, rtol=0, atol=1e-5)
    assert float(many[5000:5300].max()) < 1e-6 and float(many[:5000].min()) > 0.2
    near = few < 0.04
    torch.testing.assert_close(many[near], few[near], rtol=0, atol=1e-12)


def test_a_stack_of_vectors_keeps_its_shape() -> None:
    basis = torch.linalg.qr(normal(6, 2, seed=8)).Q.T
    vectors = normal(3, 4, 6, seed=9)
    found = distances(vectors, basis)
    assert found.shape == (3, 4)
    torch.testing.assert_close(found.flatten(), distances(vectors.reshape(12, 6), basis))
