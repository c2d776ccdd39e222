"""Whole steps of a public grid, rounded at random."""

from math import sqrt

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Generator

from privfm.checks import InvalidArgument
from privfm.defenses import Chain, FixedPoint

CODEC = FixedPoint(bound=2.0, bits=4)  # steps of 1/8


def encoded(codec, row, seed=0):
    return codec.encode(torch.tensor(row)[None], {}, [Generator().manual_seed(seed)])[0].rows[0]


def test_multiples_of_the_step_are_themselves():
    row = [0.0, 0.125, -0.125, 2.0, -2.0, 1.875]
    whole = encoded(CODEC, row)
    assert whole.dtype == torch.float64
    assert whole.tolist() == [0, 1, -1, 16, -16, 15]
    assert CODEC.decode(CODEC.encode(torch.tensor([row]), {}, [Generator()])[0], 6).tolist() == [row]


@given(st.lists(st.floats(-2.0, 2.0, width=32), min_size=1, max_size=20), st.integers(0, 2**32))
def test_a_coordinate_moves_by_less_than_a_step_and_stays_in_range(row, seed):
    whole = encoded(CODEC, row, seed)
    assert bool((whole == whole.round()).all())
    assert float(whole.abs().max()) <= CODEC.largest_whole
    assert float((whole * CODEC.step - torch.tensor(row).double()).abs().max()) < CODEC.step


@pytest.mark.parametrize("value", [0.05, -0.05, 0.11])
def test_rounding_is_without_bias(value):
    """Up with the probability of the part above the lower step; a nearest rounding, or half the part, is rejected."""
    n = 100_000
    whole = encoded(CODEC, [value] * n)
    part = value / CODEC.step - np.floor(value / CODEC.step)
    ups = int((whole > np.floor(value / CODEC.step)).sum())
    fits = [chisquare([ups, n - ups], [n * share, n * (1 - share)]).pvalue for share in (part, part / 2)]
    assert fits[0] > 1e-4
    assert fits[1] < 1e-9
    assert 0 < ups < n  # rounding to the nearest gives only one of them


def test_rounding_follows_the_generator_of_its_row_alone():
    rows = torch.rand(3, 50)
    together = CODEC.encode(rows, {}, [Generator().manual_seed(i) for i in range(3)])[0].rows
    alone = CODEC.encode(rows[1:2], {}, [Generator().manual_seed(1)])[0].rows
    assert torch.equal(together[1], alone[0])
    assert not torch.equal(alone, CODEC.encode(rows[1:2], {}, [Generator().manual_seed(2)])[0].rows)


@pytest.mark.parametrize("value", [2.0001, -2.0001, float("nan"), float("inf"), 1e30])
def test_a_row_beyond_the_bound_is_not_cut_but_made_unusable(value):
    rows = torch.tensor([[0.5, value], [0.5, 2.0]])
    whole = CODEC.encode(rows, {}, [Generator().manual_seed(0), Generator().manual_seed(1)])[0].rows
    assert bool(whole[0].isnan().all())
    assert whole[1].tolist() == [4, 16]


def test_a_sum_of_decodings_is_the_decoding_of_the_sum():
    rows = torch.rand(5, 30) - 0.5
    codec = FixedPoint(bound=1.0, bits=20)
    coded = codec.encode(rows, {}, [Generator().manual_seed(i) for i in range(5)])[0]
    total = (coded.rows.sum(0) * codec.step).float()
    assert float((total - rows.sum(0)).norm()) <= codec.error_bound(30, 5)
    assert codec.error_bound(30, 5) == 5 * sqrt(30) * 2.0**-20
    assert float((total - rows.sum(0)).norm()) > codec.error_bound(30, 5) / 50  # the bound is not by far


def test_what_it_says_of_itself():
    assert (CODEC.largest_coordinate, CODEC.largest_whole, CODEC.modulus, CODEC.similarity) == (2.0, 16, None, 0.125)
    assert CODEC.norm_bound(1.0, 4) == 1.25
    chain = Chain((CODEC,))
    assert (chain.largest_coordinate, chain.largest_whole, chain.modulus) == (2.0, 16, None)
    assert (Chain(()).largest_coordinate, Chain(()).largest_whole) == (None, None)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"bound": 0.0, "bits": 4}, "bound=0.0"),
        ({"bound": 1.0, "bits": 0}, "bits=0"),
        ({"bound": 1.0, "bits": 45}, "bits=45"),
    ],
)
def test_bad_fields_are_refused(fields, said):
    with pytest.raises(InvalidArgument, match=said):
        FixedPoint(**fields)
