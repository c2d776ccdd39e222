"""What attackers know: no more than the threat model grants, and the same whatever the batches were."""

import pytest
import torch
from torch import Generator, Tensor

from privfm.checks import NotRevealed
from privfm.contracts import Knowledge, Knows
from privfm.defenses import Krum, Mean


def gaussian(n: int, d: int = 5, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=Generator().manual_seed(seed))


def knowing(level: Knows, *batches: Tensor, cohort: int = 12) -> Knowledge:
    knowledge = Knowledge(level, cohort, Mean())
    for rows in batches:
        knowledge.add(rows)
    return knowledge


ASKED = {
    "mean": (Knows.MOMENTS, lambda known: known.mean),
    "deviation": (Knows.MOMENTS, lambda known: known.deviation),
    "rows": (Knows.ROWS, lambda known: known.rows),
    "aggregate": (Knows.ROWS, lambda known: known.aggregate(torch.zeros(1, 5))),
}


@pytest.mark.parametrize("level", Knows)
@pytest.mark.parametrize("asked", ASKED)
def test_more_than_is_granted_raises(level, asked):
    least, ask = ASKED[asked]
    known = knowing(level, gaussian(4))
    if level >= least:
        assert ask(known).shape[-1] == 5
    else:
        with pytest.raises(NotRevealed, match=f"grants {level.name}, not {least.name}"):
            ask(known)


@pytest.mark.parametrize("level", Knows)
def test_everybody_knows_the_cohort(level):
    assert (knowing(level, cohort=9).cohort, knowing(level).level) == (9, level)


def test_moments_are_those_of_the_honest_rows():
    rows = gaussian(20)
    known = knowing(Knows.MOMENTS, rows)
    torch.testing.assert_close(known.mean, rows.double().mean(0).float())
    torch.testing.assert_close(known.deviation, rows.double().std(0, correction=0).float())
    assert known.mean.dtype == known.deviation.dtype == torch.float32


@pytest.mark.parametrize("sizes", [[20], [1] * 20, [7, 13], [13, 0, 7]])
def test_moments_do_not_depend_on_the_batches_to_the_bit(sizes):
    rows = 100 + gaussian(20)
    whole, parts = knowing(Knows.MOMENTS, rows), knowing(Knows.MOMENTS, *torch.split(rows, sizes))
    assert torch.equal(whole.mean, parts.mean)
    assert torch.equal(whole.deviation, parts.deviation)


def test_a_common_offset_does_not_spoil_the_deviation():
    rows = 1e4 + 1e-2 * gaussian(50)
    expected = rows.double().std(0, correction=0).float()
    torch.testing.assert_close(knowing(Knows.MOMENTS, rows).deviation, expected)


def test_one_row_has_no_deviation():
    known = knowing(Knows.MOMENTS, gaussian(1))
    assert torch.equal(known.mean, gaussian(1)[0])
    assert torch.equal(known.deviation, torch.zeros(5))


def test_rows_are_those_of_all_batches_in_order():
    rows = gaussian(9)
    assert torch.equal(knowing(Knows.ROWS, *rows.split(4)).rows, rows)


def test_aggregate_is_what_the_rule_returns_with_the_bent_rows():
    asked = []
    known = Knowledge(Knows.ROWS, 9, lambda rows: asked.append(rows) or Krum(1)(rows))
    known.add(gaussian(6))
    bent = torch.full((2, 5), 7.0)
    assert torch.equal(known.aggregate(bent), Krum(1)(torch.cat([gaussian(6), bent])))
    assert torch.equal(asked[0], torch.cat([gaussian(6), bent]))


def test_the_honest_rows_are_not_changed():
    rows = gaussian(6)
    knowing(Knows.ROWS, rows).aggregate(torch.zeros(1, 5))
    assert torch.equal(rows, gaussian(6))


def test_a_bad_honest_row_is_left_out_as_the_server_leaves_it_out():
    """One honest client that diverged must not turn every attacker's row into NaN, and end the attack."""
    rows = gaussian(4)
    rows[2, 1] = float("nan")
    known = knowing(Knows.ROWS, rows)
    good = rows[[0, 1, 3]]
    torch.testing.assert_close(known.mean, good.mean(0))
    assert bool(known.deviation.isfinite().all())
    assert torch.equal(known.rows, good)
