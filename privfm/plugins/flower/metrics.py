"""Metrics that clients claim, as a mean that none of them can break."""

from __future__ import annotations

from collections import defaultdict
from math import fsum, isfinite

from flwr.app import MetricRecord, RecordDict


def averaged(contents: list[RecordDict], weighted_by_key: str) -> MetricRecord:
    """The mean over clients, each counting the same, of the numbers that more than half of them report.

    Counts of examples are claims, so that they weigh nothing; ids are no metrics. What is not finite, a list, or only
    a few clients' is left out: Flower's own mean raises, or becomes NaN, for one such client.

    Args:
      contents: of the replies that were used.
      weighted_by_key: of the counts, left out.

    >>> good = [RecordDict({"metrics": MetricRecord({"loss": loss, "num-examples": 9})}) for loss in (1.0, 2.0, 3.0)]
    >>> bad = RecordDict({"metrics": MetricRecord({"loss": float("nan"), "own": 1.0, "num-examples": -59})})
    >>> dict(averaged([*good, bad], "num-examples"))
    {'loss': 2.0}
    """
    found: dict[str, list[float]] = defaultdict(list)
    for content in contents:
        claimed: dict[str, float] = {}
        for record in content.metric_records.values():
            claimed |= {key: float(value) for key, value in record.items() if isinstance(value, int | float)}
        for key, value in claimed.items():
            if isfinite(value) and key not in {weighted_by_key, "partition-id"}:
                found[key].append(value)
    common = {key: values for key, values in found.items() if 2 * len(values) > len(contents)}
    return MetricRecord({key: fsum(value / len(values) for value in values) for key, values in sorted(common.items())})
