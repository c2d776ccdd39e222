"""Under a private mean a round's memory does not follow the cohort; under a rule that needs every row it does."""

from __future__ import annotations

import sys

import pytest

from experiments.scale import EVERY, PLAIN, Setting, measured
from privfm.contracts import KEY_HOLDER
from privfm.federation.traffic import Traffic

PARAMETERS = 200_000
ROW = 4 * PARAMETERS


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peaks are read from /proc")
def test_memory_of_a_private_mean_is_that_of_a_batch_and_of_a_rule_that_keeps_rows_that_of_the_cohort() -> None:
    """Whole rounds among a hundred thousand clients, 16 trained together; the second rule is the control."""
    settings = [(PLAIN, 20), (PLAIN, 200), (EVERY, 60), (EVERY, 120)]
    points = measured(*(Setting(channel, 100_000, cohort, PARAMETERS) for channel, cohort in settings))
    few, many, half, whole = (point.memory or 0 for point in points)
    assert few > 16 * ROW, "the batch is seen, so that a cohort would be"
    assert many - few < 0.1 * 180 * ROW, "nothing of 180 more clients stays but their names"
    assert many < 0.6 * 200 * ROW
    assert whole - half > 0.8 * 60 * ROW, "rows that are kept are seen"


def test_traffic_counts_messages_and_keeps_none() -> None:
    replies = {"keys": [(1, b"aa"), (2, b"bbbb")], "masked": [(2, b"c" * 10), (KEY_HOLDER, b"d" * 100)], "none": []}

    class Below:
        server = object()

        def __call__(self, stage: str, requests: dict[int, bytes]) -> list[tuple[int, bytes]]:
            return replies[stage]

    traffic = Traffic(Below())  # type: ignore[arg-type]
    list(traffic("keys", {1: b"x", 2: b"yyy", 3: b"zz"}))
    list(traffic("masked", {2: b"", KEY_HOLDER: b"k" * 50}))
    list(traffic("none", {}))
    assert traffic.up == 2 + 4 + 10 + 100
    assert traffic.up_per_client == (2 + 4) / 2 + 10
    assert traffic.down_per_client == (1 + 3 + 2) / 3 + 0
    list(traffic("masked", {4: b"1234"}))
    assert traffic.down_per_client == 2 + 4 / 2, "a stage that is opened again goes on"
