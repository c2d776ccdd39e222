"""The seed tree: a path names one stream, another path another, and nothing else has a say."""

from itertools import combinations
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Generator, Tensor

from privfm.randomness import Purpose, Seeds, seeded

PURPOSES: tuple[Purpose, ...] = get_args(Purpose)
WHOLE = st.integers(0, 2**31)


def draw(generator: Generator) -> Tensor:
    return torch.randn(8, generator=generator, dtype=torch.float64)


@given(seed=st.integers(), path=st.lists(WHOLE, max_size=3))
def test_a_path_names_one_stream(seed: int, path: list[int]) -> None:
    assert torch.equal(draw(Seeds(seed).generator("noise", *path)), draw(Seeds(seed).generator("noise", *path)))


@given(first=st.tuples(WHOLE, WHOLE, WHOLE), second=st.tuples(WHOLE, WHOLE, WHOLE))
def test_another_seed_round_or_client_is_another_stream(first: tuple[int, ...], second: tuple[int, ...]) -> None:
    streams = [draw(Seeds(seed).generator("noise", *path)) for seed, *path in (first, second)]
    assert torch.equal(*streams) == (first == second)


def test_every_purpose_has_a_stream_of_its_own() -> None:
    streams = [draw(Seeds(0).generator(purpose, 1)) for purpose in PURPOSES]
    assert not any(torch.equal(first, second) for first, second in combinations(streams, 2))


@pytest.mark.parametrize(("first", "second"), [((1, 2), (2, 1)), ((), (0,)), ((1, 23), (12, 3)), ((1,), (-1,))])
def test_paths_do_not_run_together(first: tuple[int, ...], second: tuple[int, ...]) -> None:
    assert not torch.equal(draw(Seeds(0).generator("cohort", *first)), draw(Seeds(0).generator("cohort", *second)))


def test_streams_are_the_same_on_every_machine_and_in_every_version() -> None:
    """A resumed run and a paper's reader need yesterday's streams; SHA-256 computed by hand (`printf | sha256sum`)."""
    assert Seeds(7).generator("cohort", 3).initial_seed() == 0x05B3B5689E0A5121  # of "(7, 'cohort', 3)"


def test_streams_are_not_correlated() -> None:
    """1,000 clients of one round: off-diagonal correlations of 1,000 draws stay within 6 standard errors."""
    rows = torch.stack([torch.randn(1000, generator=g) for g in Seeds(0).clients("noise", 0, range(1000))])
    correlations = torch.corrcoef(rows) - torch.eye(1000)
    assert correlations.abs().max() < 6 / 1000**0.5


def test_a_clients_stream_does_not_depend_on_who_else_is_there() -> None:
    seeds = Seeds(3)
    alone = draw(seeds.clients("data order", 5, [42])[0])
    among = draw(seeds.clients("data order", 5, [7, 42, 1])[1])
    assert torch.equal(alone, among)
    assert torch.equal(alone, draw(seeds.generator("data order", 5, 42)))


@pytest.mark.usefixtures("untouched_random_state")
def test_generators_leave_the_global_state_alone() -> None:
    draw(Seeds(0).generator("noise"))


@pytest.mark.usefixtures("untouched_random_state")
def test_seeded_runs_foreign_code_from_the_generator_and_puts_the_state_back() -> None:
    draws = []
    for _ in range(2):
        with seeded(Seeds(0).generator("dropout", 1)):
            draws.append(torch.nn.functional.dropout(torch.ones(64)))
    assert torch.equal(*draws)
    with seeded(Seeds(0).generator("dropout", 2)):
        assert not torch.equal(draws[0], torch.nn.functional.dropout(torch.ones(64)))


def test_seeded_takes_one_draw_so_that_a_second_block_differs() -> None:
    generator = Seeds(0).generator("dropout")
    blocks = []
    for _ in range(2):
        with seeded(generator):
            blocks.append(torch.rand(8))
    assert not torch.equal(*blocks)


@pytest.mark.usefixtures("untouched_random_state")
def test_seeded_puts_the_state_back_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), seeded(Seeds(0).generator("dropout")):
        torch.rand(1)
        raise ZeroDivisionError
