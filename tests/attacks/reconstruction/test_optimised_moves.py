"""The discrete moves: permutations of the free places, each kind of its own form."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Generator

from privfm.attacks.reconstruction.optimised.moves import MOVES, move, rearranged


def _many(kind: str, count: int) -> list[list[int]]:
    generator = Generator().manual_seed(count)
    return [move(kind, count, generator) for _ in range(60)]


@pytest.mark.parametrize("kind", MOVES)
@pytest.mark.parametrize("count", [0, 1, 2, 3, 8])
def test_every_move_is_an_order(kind: str, count: int) -> None:
    assert all(sorted(order) == list(range(count)) for order in _many(kind, count))


@pytest.mark.parametrize("kind", MOVES)
def test_every_place_is_reached(kind: str) -> None:
    """No token is left where it was in all of sixty draws."""
    orders = _many(kind, 6)
    assert all(any(order[place] != place for order in orders) for place in range(6))


def test_a_swap_changes_two_places() -> None:
    assert all(sum(place != old for place, old in enumerate(order)) == 2 for order in _many("swap", 7))


def test_one_token_moves_and_the_others_keep_their_order() -> None:
    for order in _many("token", 7):
        without = [[old for old in order if old != token] for token in range(7)]
        assert any(rest == sorted(rest) for rest in without)


def test_a_subsequence_stays_together() -> None:
    """Cut out and put back in, a run leaves at most three seams; some draws move more than one token."""
    seams = [sum(later != one + 1 for one, later in pairwise(order))
             for order in _many("subsequence", 8)]  # fmt: skip
    assert max(seams) <= 3
    assert max(seams) >= 2


def test_a_prefix_goes_to_the_end() -> None:
    for order in _many("prefix", 7):
        cut = order.index(0)
        assert cut > 0
        assert order[cut:] + order[:cut] == list(range(7))


def test_special_tokens_padding_and_other_texts_stay() -> None:
    values = torch.arange(2 * 6).reshape(2, 6)
    free = torch.tensor([False, True, True, True, False, False])  # a special token at each end, then padding
    found = rearranged(values, 1, free, [2, 0, 1])
    assert found.tolist() == [[0, 1, 2, 3, 4, 5], [6, 9, 7, 8, 10, 11]]
    assert values.tolist() == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]
