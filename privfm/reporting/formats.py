"""Numbers as a reader sees them; one way of writing each in the table, the figures and the sentences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from privfm.reporting.summary import ArmResult, wilson

MISSING = "-"


def utility_text(value: float | None, unit: str) -> str:
    """A share as per cent with one decimal, anything else with three digits and its unit."""
    if value is None:
        return MISSING
    return f"{100 * value:.1f} %" if unit == "share" else f"{value:.3g} {unit}".rstrip()


def difference_text(value: float | None, unit: str) -> str:
    """A signed difference; of shares in percentage points, without the word."""
    if value is None:
        return MISSING
    # Adding zero turns -0.0, and what rounds to it, into a plain 0.
    return f"{round(100 * value, 1) + 0.0:+.1f}" if unit == "share" else f"{value:+.3g} {unit}".rstrip()


def bytes_text(count: float | None) -> str:
    """Bytes with decimal prefixes, as networks are measured: 1 MB is a million bytes."""
    if count is None:
        return MISSING
    for size, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= size:
            return f"{count / size:.3g} {name}" if count < 999.5 * size else f"{count / size:.0f} {name}"
    return f"{count:.0f} B"


def seconds_text(seconds: float | None) -> str:
    """Seconds up to two minutes, then minutes, then hours."""
    if seconds is None:
        return MISSING
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def small_number(value: float) -> str:
    """Three digits; below a hundredth with an exponent that is not padded: `1e-4`."""
    if value == 0 or 0.01 <= abs(value) < 1e6:
        return f"{value:.3g}"
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def rounds_text(count: int) -> str:
    """`1 round`, `20 rounds`."""
    return f"{count} round{'' if count == 1 else 's'}"


def epsilon_text(record: Mapping[str, Any] | None) -> str:
    """Epsilon with (delta, adversary) in short; the whole record stands in `epsilon_paragraph`."""
    if record is None:
        return "none"
    adversary = str(record["adversary"]).replace("_", " ")
    return f"{small_number(record['epsilon'])} ({small_number(record['delta'])}, {adversary})"


def spread_text(arm: ArmResult) -> str:
    """How sure a utility is, without pretending to know a distribution.

    Several seeds: least to greatest, then each, in increasing order. One seed: the Wilson interval of a share over its
    test examples, which says nothing about the spread between seeds.
    """
    unit, points = str(arm.facts.get("utility_unit", "")), sorted(arm.utilities.values())
    if len(points) > 1:
        texts = [utility_text(point, unit).removesuffix(" %") for point in points]
        return f"{texts[0]} to {texts[-1]} ({', '.join(texts)})"
    interval = utility_interval(arm)
    return f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}" if interval else MISSING


def utility_interval(arm: ArmResult) -> tuple[float, float] | None:
    """95 % Wilson interval of a single seed's utility; None for several seeds or for what is no share."""
    examples = arm.facts.get("utility_n")
    if len(arm.utilities) != 1 or arm.facts.get("utility_unit") != "share" or not examples:
        return None
    return wilson(next(iter(arm.utilities.values())), int(examples))
