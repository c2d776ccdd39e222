"""What audits and plans share of trade-off functions: exact far in the tail, and the largest of lines by a loop."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

from privfm.attacks.audit import GaussianFamily
from privfm.defenses.privacy import trade_off
from privfm.trade_offs import GaussianInverse, LargestLine

NUMBERS = st.floats(-100, 100).map(lambda value: round(value, 2))  # parallel lines and equal ones among them
LINES = st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=30)


def test_both_rooms_have_the_same_gaussian_one() -> None:
    assert GaussianFamily().inverse_blow_up(0.5) == trade_off.GaussianInverse(0.5) == GaussianInverse(0.5)


@pytest.mark.parametrize("mu", [5.0, 10.0, 30.0])
def test_a_far_tail_keeps_its_digits(mu: float) -> None:
    """At y = 1/2 it is Phi(-mu), down to 5e-198; one minus an error function is 0 from mu = 9 on."""
    assert GaussianInverse(mu)(0.5) == pytest.approx(norm.sf(mu), rel=1e-12, abs=0.0)
    assert 0.0 < GaussianInverse(mu)(0.5) < 1e-6


@given(LINES, NUMBERS)
def test_the_largest_line_is_that_of_a_loop(lines: list[tuple[float, float]], x: float) -> None:
    slowly = max(slope * x + intercept for slope, intercept in lines)
    assert LargestLine.of(lines)(x) == pytest.approx(slowly, rel=1e-9, abs=1e-9)


@given(LINES)
def test_lines_that_are_the_largest_nowhere_fall_out(lines: list[tuple[float, float]]) -> None:
    found = LargestLine.of(lines)
    assert found.starts[0] == -float("inf")
    assert sorted(set(found.starts)) == list(found.starts)
    assert sorted(set(found.slopes)) == list(found.slopes)
    assert set(zip(found.slopes, found.intercepts, strict=True)) <= set(lines)


def test_of_parallel_lines_the_highest_counts() -> None:
    found = LargestLine.of([(1.0, 0.2), (1.0, 0.3), (1.0, 0.1)])
    assert (found.slopes, found.intercepts) == ((1.0,), (0.3,))
