"""Somebody's own callable as a rule."""

from __future__ import annotations

import pytest
import torch

from privfm.checks import InvalidArgument
from privfm.contracts import Reveals
from privfm.defenses import Krum, as_rule
from privfm.defenses.gram_rules import krum_scores

ROWS = torch.randn(9, 5, generator=torch.Generator().manual_seed(0))


def test_a_function_of_the_rows() -> None:
    assert torch.equal(as_rule(lambda rows: rows.median(0).values, Reveals.EACH)(ROWS), ROWS.median(0).values)


def test_a_function_of_the_gram_matrix_gives_weights() -> None:
    def krum(gram: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(krum_scores(gram, 2).argmin(), len(gram)).double()

    assert torch.equal(as_rule(krum, Reveals.GRAM)(ROWS), Krum(2)(ROWS))


def test_what_it_does_to_its_argument_stays_with_it() -> None:
    before = ROWS.clone()
    as_rule(lambda rows: rows.zero_()[0], Reveals.EACH)(ROWS)
    assert torch.equal(ROWS, before)


def test_wrong_results_and_needs_are_named() -> None:
    with pytest.raises(InvalidArgument, match=r"returned \(9,\), expected a tensor of shape \(5,\)"):
        as_rule(lambda rows: rows.sum(1), Reveals.EACH)(ROWS)
    with pytest.raises(InvalidArgument, match="returned float"):
        as_rule(lambda rows: 1.0, Reveals.EACH)(ROWS)  # type: ignore[arg-type,return-value]
    with pytest.raises(InvalidArgument, match="needs=SUM"):
        as_rule(lambda rows: rows, Reveals.SUM)
