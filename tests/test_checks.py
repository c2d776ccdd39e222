"""Argument checks: what passes, what is refused, and that the message names the argument, its value and a way out."""

import math
import re

import pytest

from privfm import checks
from privfm.checks import InvalidArgument

NAN, INFINITY = math.nan, math.inf


def test_require_raises_the_message_given() -> None:
    checks.require(True, "unused")
    with pytest.raises(InvalidArgument, match=r"^f=5 is too much; lower f$"):
        checks.require(False, "f=5 is too much; lower f")


def test_nearest_offers_a_close_name_or_the_sorted_list() -> None:
    assert checks.nearest("round", ["seed", "rounds"]) == "; did you mean 'rounds'?"
    assert checks.nearest("zzz", ["seed", "rounds"]) == "; known: rounds, seed"


@pytest.mark.parametrize("value", [2, 3, 10**30])
def test_at_least_takes_whole_numbers_from_the_least_on(value: int) -> None:
    checks.at_least("f", value, 2)


@pytest.mark.parametrize("value", [1, -1, 2.0, True, "2", None, NAN])
def test_at_least_refuses_smaller_and_other_values(value: int) -> None:
    with pytest.raises(InvalidArgument, match=re.escape(f"f={value!r}: expected a whole number >= 2")):
        checks.at_least("f", value, 2)


def test_at_least_one_is_not_met_by_true() -> None:
    with pytest.raises(InvalidArgument, match="f=True"):
        checks.at_least("f", True, 1)


@pytest.mark.parametrize("value", [5e-324, 1, 1e308])
def test_positive_takes_finite_numbers_above_zero(value: float) -> None:
    checks.positive("clip", value)


@pytest.mark.parametrize("value", [0, -0.0, -1e-9, INFINITY, -INFINITY, NAN])
def test_positive_refuses_the_rest(value: float) -> None:
    with pytest.raises(InvalidArgument, match=re.escape(f"clip={value!r}: expected a finite number > 0")):
        checks.positive("clip", value)


@pytest.mark.parametrize("value", [0, -0.0, 5e-324, 1e308])
def test_non_negative_takes_zero_too(value: float) -> None:
    checks.non_negative("noise", value)


@pytest.mark.parametrize("value", [-5e-324, INFINITY, -INFINITY, NAN])
def test_non_negative_refuses_the_rest(value: float) -> None:
    with pytest.raises(InvalidArgument, match=re.escape(f"noise={value!r}: expected a finite number >= 0")):
        checks.non_negative("noise", value)


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("one", [False, True])
def test_fraction_opens_and_closes_its_ends(zero: bool, one: bool) -> None:
    checks.fraction("rate", 0.5, zero=zero, one=one)
    ends = f"{'[' if zero else '('}0, 1{']' if one else ')'}"
    for value, allowed in [(0.0, zero), (1.0, one), (-1e-9, False), (1 + 1e-9, False), (NAN, False), (INFINITY, False)]:
        if allowed:
            checks.fraction("rate", value, zero=zero, one=one)
        else:
            with pytest.raises(InvalidArgument, match=re.escape(f"rate={value!r}: expected a number in {ends}")):
                checks.fraction("rate", value, zero=zero, one=one)


def test_fraction_by_default_excludes_zero_and_includes_one() -> None:
    checks.fraction("rate", 1.0)
    with pytest.raises(InvalidArgument):
        checks.fraction("rate", 0.0)


def test_one_of_offers_the_nearest_name() -> None:
    checks.one_of("split", "test", ["clients", "test"])
    with pytest.raises(InvalidArgument, match=re.escape("split='tset' is not known; did you mean 'test'?")):
        checks.one_of("split", "tset", ["clients", "test"])


def test_callers_may_catch_refusals_as_value_errors() -> None:
    assert issubclass(InvalidArgument, ValueError)
    assert issubclass(checks.CohortTooSmall, InvalidArgument)
