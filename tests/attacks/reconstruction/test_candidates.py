"""Candidates that a server can think of, against what it sees of clients that hold some of them."""

from __future__ import annotations

import pytest
import torch
from torch import Generator, Tensor

from privfm.attacks.reconstruction.candidates import matched_candidates, pursued_candidates, ranks
from privfm.checks import InvalidArgument

SENTENCES, CLIENTS = 400, 60


def drawn(n: int) -> Tensor:
    generator = Generator().manual_seed(n)
    return torch.stack([torch.randperm(SENTENCES, generator=generator)[:n] for _ in range(CLIENTS)])


def share(scores: Tensor, rows: Tensor, guesses: int) -> float:
    return float((ranks(scores, rows) <= guesses).float().mean())


def test_matching_uses_the_clear_columns_alone() -> None:
    generator = Generator().manual_seed(3)
    single = torch.randn(SENTENCES, 100, generator=generator)
    rows = drawn(4)
    own = single[rows].mean(1)
    assert share(matched_candidates(own, single), rows, 4) > 0.9
    clear = own.clone()
    clear[:, 10:] = torch.nan
    changed = single.clone()
    changed[:, 10:] = 7.0
    assert torch.equal(matched_candidates(clear, single), matched_candidates(clear, changed))
    assert share(matched_candidates(clear, single), rows.roll(1, 0), 4) < 0.05
    assert share(matched_candidates(torch.full_like(own, torch.nan), single), rows, SENTENCES - 1) == 0.0
    assert share(matched_candidates(torch.zeros_like(own), single), rows, SENTENCES - 1) == 0.0


def test_a_mean_is_taken_apart_into_what_it_is_the_mean_of() -> None:
    single = torch.randn(SENTENCES, 100, generator=Generator().manual_seed(3))
    rows = drawn(8)
    clear = single[rows].mean(1)
    clear[:, 60:] = torch.nan
    changed = single.clone()
    changed[:, 60:] = 7.0
    chosen = pursued_candidates(clear, single, 8)
    assert torch.equal(chosen, pursued_candidates(clear, changed, 8))
    found = [len(set(own.tolist()) & set(said.tolist())) for own, said in zip(rows, chosen, strict=True)]
    foreign = [len(set(own.tolist()) & set(said.tolist())) for own, said in zip(rows.roll(1, 0), chosen, strict=True)]
    # 480 sentences: matching alone finds less; chance is 1 in 50, and 26 or more of 480 come with probability 2e-5.
    assert sum(found) > 0.8 * 480 > 480 * share(matched_candidates(clear, single), rows, 8) and sum(foreign) < 26
    assert all(len(set(said.tolist())) == 8 for said in chosen)
    assert bool((pursued_candidates(torch.full_like(clear, torch.nan), single, 8) == -1).all())
    narrow = clear.clone()
    narrow[:, 3:] = torch.nan  # more sentences than columns: they depend on each other
    assert all(len(set(said.tolist())) == 8 for said in pursued_candidates(narrow, single, 8))


def test_ranks_count_ties_against_the_attacker() -> None:
    scores = torch.tensor([[0.1, 0.9, 0.9, 0.3], [1.0, 1.0, 1.0, 1.0]])
    assert ranks(scores, torch.tensor([[1, 3], [0, 2]])).tolist() == [[2, 3], [4, 4]]


@pytest.mark.parametrize(
    ("seen", "examples"),
    [(torch.zeros(2, 3), 1), (torch.zeros(2, 4), 0), (torch.zeros(2, 4), 6), (torch.zeros(0, 4), 1)],
    ids=["width", "no examples", "too many", "nobody"],
)
def test_what_does_not_fit_is_refused(seen: Tensor, examples: int) -> None:
    with pytest.raises(InvalidArgument):
        pursued_candidates(seen, torch.ones(5, 4), examples)


def test_clients_that_hide_different_columns_are_not_compared_as_one() -> None:
    seen = torch.ones(2, 4)
    seen[0, 1] = torch.nan
    with pytest.raises(InvalidArgument, match="different columns"):
        matched_candidates(seen, torch.ones(5, 4))
