"""Splits are disjoint, cover every different row, and show every label as often as the data do."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Generator

from privfm.checks import InvalidArgument
from privfm.contracts import SPLITS, Table
from privfm.learning.splits import SplitShares, split, unique_rows

ALL = SplitShares(validation=0.1, test=0.2, server=0.05, holdout=0.15)


def generator(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def texts(labels: list[int], inputs: list[str] | None = None) -> Table:
    inputs = inputs or [f"text {row}" for row in range(len(labels))]
    return Table(inputs, torch.tensor(labels), tuple(str(label) for label in range(max(labels) + 1)))


@given(
    labels=st.lists(st.integers(0, 6), min_size=40, max_size=120),
    tenths=st.tuples(*[st.integers(0, 3)] * 4).filter(lambda tenths: sum(tenths) < 10),
    seed=st.integers(0, 2**62),
)
def test_splits_are_disjoint_cover_all_and_keep_their_shares(
    labels: list[int], tenths: tuple[int, ...], seed: int
) -> None:
    table, shares = texts(labels), SplitShares(*(tenth / 10 for tenth in tenths))
    splits = split(table, shares, generator(seed))
    assert tuple(splits) == SPLITS
    assert torch.cat(list(splits.values())).sort().values.tolist() == list(range(len(labels)))
    for name, rows in splits.items():
        share = getattr(shares, name)
        assert torch.equal(rows, rows.sort().values)
        assert abs(len(rows) - share * len(labels)) < 1 + 1e-9
        for label in set(labels):  # never less than the share, rounded down
            assert (table.labels[rows] == label).sum() >= int(share * labels.count(label) - 1e-9)
    again = split(table, shares, generator(seed))
    assert all(torch.equal(rows, again[name]) for name, rows in splits.items())


@pytest.mark.usefixtures("untouched_random_state")
def test_a_rare_label_is_in_every_split_where_a_plain_draw_would_miss_it() -> None:
    table = texts([0] * 9900 + [1] * 100)
    for seed in range(5):
        counts = [int(table.labels[rows].sum()) for rows in split(table, ALL, generator(seed)).values()]
        assert counts == [50, 10, 20, 5, 15]


def test_other_seeds_give_other_splits() -> None:
    table = texts([0, 1] * 100)
    assert not torch.equal(split(table, ALL, generator(0))["test"], split(table, ALL, generator(1))["test"])


def test_defaults_leave_most_to_the_clients_and_ask_for_no_public_data() -> None:
    sizes = {name: len(rows) for name, rows in split(texts([0] * 1000), SplitShares(), generator()).items()}
    assert sizes == {"clients": 700, "validation": 100, "test": 200, "server": 0, "holdout": 0}


def test_a_repeated_text_is_kept_once_with_its_first_label() -> None:
    table = texts([0, 1, 1, 0, 1], ["a", "b", "a", "A", "b"])
    assert unique_rows(table).tolist() == [0, 1, 3]


def test_a_repeated_image_is_kept_once_and_one_bit_makes_another() -> None:
    images = torch.rand(4, 1, 2, 2, generator=generator())
    images[2] = images[0]
    images[3] = images[1].nextafter(torch.ones(()))
    assert unique_rows(Table(images, torch.tensor([0, 0, 1, 0]), ("0", "1"))).tolist() == [0, 1, 3]


def test_no_split_holds_a_text_of_another() -> None:
    table = texts([row % 2 for row in range(300)], [f"text {row % 100}" for row in range(300)])
    splits = split(table, ALL, generator())
    held = [table.inputs[row] for rows in splits.values() for row in rows.tolist()]
    assert len(held) == len(set(held)) == 100


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({"test": 1.0}, r"test=1.0: expected a number in \[0, 1\)"),
        ({"server": -0.1}, "server=-0.1"),
        ({"holdout": float("nan")}, "holdout=nan"),
        ({"test": 0.5, "server": 0.5}, "add up to 1.1: nothing is left for the clients"),
    ],
)
def test_bad_shares_are_refused_at_once(shares: dict[str, float], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        SplitShares(**shares)


@pytest.mark.parametrize(
    ("rows", "shares", "message"),
    [
        (10, SplitShares(server=0.01), "server=0.01 of 10 different rows is no row"),
        (2, SplitShares(validation=0.45, test=0.45), "clients=0.1 of 2 different rows is no row"),
    ],
)
def test_an_empty_split_that_was_asked_for_is_refused(rows: int, shares: SplitShares, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        split(texts([0] * rows), shares, generator())


def test_shares_can_be_a_default_on_the_command_line() -> None:
    """The reason why the class is not final."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--splits", type=SplitShares, default=SplitShares(server=0.1))
    read = parser.instantiate(parser.parse_args(["--splits.test", "0.3"])).splits
    assert read == SplitShares(test=0.3, server=0.1)
