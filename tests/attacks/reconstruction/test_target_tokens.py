"""Targets of a language model from its head's gradient: against gradients put together by hand."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Generator, Tensor, nn

from privfm.attacks.reconstruction.target_tokens import target_counts, target_shares, targets_by_state
from privfm.checks import InvalidArgument

VOCABULARY, WIDTH = 60, 12
FOLLOWING = [[3], [3, 7, 7], [11], [0], [5, 6], [59]]
"""Targets of each of six states: one shared by two states, one twice, several after one state."""


def head(seed: int, states: int = len(FOLLOWING)) -> tuple[Tensor, Tensor, Tensor]:
    """A head's weight, states and the probabilities they give, all float64."""
    generator = Generator().manual_seed(seed)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=torch.float64)
    inputs = torch.randn(states, WIDTH, generator=generator, dtype=torch.float64)
    return weight, inputs, (inputs @ weight.T).softmax(-1)


def gradient_of(weight: Tensor, states: Tensor, following: list[list[int]]) -> Tensor:
    """By autograd, one cross-entropy for each pair of a state and a target: the oracle shares no formula with us."""
    trained = weight.clone().requires_grad_(True)
    pairs = [(row, token) for row, tokens in enumerate(following) for token in tokens]
    logits = states[[row for row, _ in pairs]] @ trained.T
    loss = nn.functional.cross_entropy(logits, torch.tensor([token for _, token in pairs]))
    return torch.autograd.grad(loss, trained)[0]


def counted(following: list[list[int]]) -> Tensor:
    total = sum(map(len, following))
    counts = torch.zeros(len(following), VOCABULARY, dtype=torch.float64)
    for row, tokens in enumerate(following):
        for token in tokens:
            counts[row, token] += 1 / total
    return counts


def test_known_states_give_every_count_exactly() -> None:
    weight, states, said = head(1)
    read = targets_by_state(gradient_of(weight, states, FOLLOWING), states, said)
    expected = counted(FOLLOWING)
    torch.testing.assert_close(read.weights, expected.sum(1), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(read.targets, expected, rtol=0, atol=1e-10)
    assert float(read.noise.max()) < 1e-10


def test_states_that_are_none_of_the_gradients_weigh_nothing() -> None:
    weight, states, said = head(2, states=len(FOLLOWING) + 3)
    read = targets_by_state(gradient_of(weight, states[:6], FOLLOWING), states, said)
    assert float(read.weights[6:].abs().max()) < 1e-10
    assert float(read.targets[6:].abs().max()) < 1e-10
    torch.testing.assert_close(read.targets[:6], counted(FOLLOWING), rtol=0, atol=1e-10)


def test_a_missing_state_is_seen_by_what_it_bends() -> None:
    weight, states, said = head(3)
    read = targets_by_state(gradient_of(weight, states, FOLLOWING), states[:5], said[:5])
    assert float((read.targets - counted(FOLLOWING)[:5]).abs().max()) > 1e-3


@pytest.mark.parametrize("hidden", [False, True])
def test_rows_left_out_or_hidden_change_nothing_else(hidden: bool) -> None:
    weight, states, said = head(4)
    gradient = gradient_of(weight, states, FOLLOWING)
    rows = torch.zeros(VOCABULARY, dtype=torch.bool)
    rows[[3, 20, 40]] = True
    gradient[rows] = torch.nan if hidden else 17.0
    read = targets_by_state(gradient, states, said, None if hidden else rows)
    assert bool(read.targets[:, rows].isnan().all())
    torch.testing.assert_close(read.targets[:, ~rows], counted(FOLLOWING)[:, ~rows], rtol=0, atol=1e-10)
    torch.testing.assert_close(read.weights, counted(FOLLOWING).sum(1), rtol=1e-8, atol=1e-10)


def test_dependent_states_and_wrong_shapes_are_refused() -> None:
    weight, states, said = head(5)
    gradient = gradient_of(weight, states, FOLLOWING)
    twice, said_twice = torch.cat([states, states[:1]]), torch.cat([said, said[:1]])
    with pytest.raises(InvalidArgument, match="7 states in 12 dimensions are not linearly independent"):
        targets_by_state(gradient, twice, said_twice)
    _, many, said_many = head(6, states=WIDTH + 1)
    with pytest.raises(InvalidArgument, match="13 states in 12 dimensions"):
        targets_by_state(gradient, many, said_many)
    with pytest.raises(InvalidArgument, match=r"expected \(V, h\), \(n, h\) and \(n, V\)"):
        targets_by_state(gradient, states, said[:, :-1])
    with pytest.raises(InvalidArgument, match="no row"):
        targets_by_state(torch.full_like(gradient, torch.nan), states, said)


def alone(seed: int, following: list[list[int]]) -> tuple[Tensor, Counter[int]]:
    """The gradient of a head of small weights, as an untrained model has it, over normalised states."""
    generator = Generator().manual_seed(seed)
    weight = 0.02 * torch.randn(800, 64, generator=generator, dtype=torch.float64)
    states = torch.randn(len(following), 64, generator=generator, dtype=torch.float64)
    return gradient_of(weight, states, following), Counter(token for tokens in following for token in tokens)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_few_targets_are_found_with_their_counts_from_the_gradient_alone(seed: int) -> None:
    gradient, truth = alone(seed, [[3], [500], [77], [12], [799]])
    shares = target_shares(gradient)
    assert set(shares) == set(truth)
    assert sum(shares.values()) == pytest.approx(1)
    assert target_counts(shares, 5) == truth


def test_hidden_rows_are_left_out() -> None:
    gradient, truth = alone(4, [[3], [500], [77], [12], [799]])
    gradient[[77, 200]] = torch.nan
    assert set(target_shares(gradient)) == set(truth) - {77}


def test_of_more_targets_than_directions_not_all_are_found_and_none_is_sure() -> None:
    gradient, truth = alone(5, [[token] for token in range(100, 300)])
    assert set(target_shares(gradient)) != set(truth)


def test_shares_and_counts_refuse_what_makes_no_sense() -> None:
    with pytest.raises(InvalidArgument, match=r"expected \(V, h\)"):
        target_shares(torch.zeros(3))
    with pytest.raises(InvalidArgument, match="zero or hidden"):
        target_shares(torch.zeros(3, 2))
    with pytest.raises(InvalidArgument, match="total=0"):
        target_counts({1: 1.0}, 0)


def test_counts_add_up_and_the_largest_remainders_win() -> None:
    assert target_counts({1: 0.45, 2: 0.35, 3: 0.2}, 7) == {1: 3, 2: 3, 3: 1}  # 3.15, 2.45, 1.4
    assert target_counts({1: 0.99, 2: 0.01}, 3) == {1: 3}
