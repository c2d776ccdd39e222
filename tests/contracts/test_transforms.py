"""What every transform inherits, and how the server opens what arrives."""

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Generator, Tensor

from privfm.contracts import Encoded, Intake, Reveals, State, Transform
from privfm.defenses import Chain


@dataclass(frozen=True)
class Doubled(Transform):
    """A codec that carries every coordinate twice, at three times its size."""

    binding = True
    additive = True

    def width(self, d: int) -> int:
        return 2 * d

    def encode(self, rows: Tensor, state: State, generators: Sequence[Generator]) -> tuple[Encoded, State]:
        return Encoded(3 * torch.cat([rows, rows], 1), {}), state

    def decode(self, encoded: Encoded, d: int) -> Tensor:
        return encoded.rows[:, :d] / 3


class Silent(Transform):
    """Says nothing about itself."""

    def encode(self, rows: Tensor, state: State, generators: Sequence[Generator]) -> tuple[Encoded, State]:
        return Encoded(rows, {}), state


def test_a_transform_promises_nothing_that_it_does_not_state():
    silent = Silent()
    assert not (silent.binding or silent.additive or silent.integers)
    assert silent.similarity is None
    assert silent.norm_bound(1.0, 5) == float("inf")
    assert (silent.width(5), silent.init(5)) == (5, {})
    assert torch.equal(silent.decode(Encoded(torch.ones(2, 5), {}), 5), torch.ones(2, 5))


def test_an_intake_opens_rows_and_sums():
    intake = Intake(Doubled(), 3, Reveals.SUM)
    rows = torch.tensor([[1.0, 2.0, 2.0], [0.0, 1.0, 0.0]])
    encoded = Doubled().encode(rows, {}, [])[0]
    assert intake.width == 6
    assert torch.equal(intake.row(Encoded(encoded.rows[:1], {})), rows[0])
    assert torch.equal(intake.total(encoded.rows.sum(0)), rows.sum(0))


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ([3.0, 4.0], [0.6, 0.8]),
        ([0.6, 0.0], [0.6, 0.0]),
        ([0.0, 0.0], [0.0, 0.0]),
    ],
)
def test_a_row_is_clipped_again_where_it_is_opened(row, expected):
    """Nobody can make an attacker clip; the norm is that of the decoded row."""
    encoded = Doubled().encode(torch.tensor([row]), {}, [])[0]
    opened = Intake(Doubled(), 2, Reveals.EACH, max_norm=1.0).row(encoded)
    torch.testing.assert_close(opened, torch.tensor(expected))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_clipping_hides_no_bad_row(value):
    opened = Intake(Chain(()), 3, Reveals.EACH, max_norm=1.0).row(Encoded(torch.tensor([[1.0, value, 2.0]]), {}))
    assert not bool(opened.isfinite().all())


@pytest.mark.parametrize("size", [1e19, 1e30, 3e38])
def test_a_huge_row_is_no_longer_than_the_bound(size):
    opened = Intake(Chain(()), 9, Reveals.EACH, max_norm=1.0).row(Encoded(torch.full((1, 9), size), {}))
    assert bool(opened.isfinite().all())
    assert float(opened.norm()) <= 1 + 1e-6
