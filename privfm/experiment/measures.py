"""What a run says of its attackers: who noticed them, and what they reached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

from torch import Tensor

from privfm.checks import require
from privfm.contracts import Attack, TargetedAttack
from privfm.federation.auditing import AuditedRun
from privfm.federation.canaries import Audit
from privfm.learning.learner import ModelLearner
from privfm.reporting.summary import wilson


def detection(rows: Sequence[Mapping[str, object]]) -> dict[str, float | None]:
    """How a rule told attackers from others, over all rounds, and how near its results were to the honest means.

    Returns:
      Shares of the attackers that it judged malicious and of the others that it did, None where it judges nobody or
      there is none; and the median and largest of the rounds' empirical robustness coefficients.
    """
    judged = [row for row in rows if row.get("detected_malicious") is not None]
    caught, attackers = (sum(column(judged, name)) for name in ("detected_malicious", "arrived_malicious"))
    accused, arrived = (sum(column(judged, name)) for name in ("detected", "arrived"))
    kappas = column(rows, "empirical_kappa")
    return {
        "detection_true_positive_rate": caught / attackers if attackers else None,
        "detection_false_positive_rate": (accused - caught) / (arrived - attackers) if arrived > attackers else None,
        "empirical_kappa_median": median(kappas) if kappas else None,
        "empirical_kappa_largest": max(kappas, default=None),
    }


def backdoor(attack: Attack | None, learner: ModelLearner, model: Tensor) -> dict[str, float | int | None]:
    """How often a targeted attack gets the label it wants on test examples of other labels, with and without trigger.

    Returns:
      Success with its 95 % Wilson interval, the share of the same examples that get the label without the trigger, and
      their number; None where no targeted attack took part.
    """
    if not isinstance(attack, TargetedAttack):
        return dict.fromkeys(("attack_success", "attack_success_low", "attack_success_high", "attack_success_n"))
    test = learner.bench.everything.take(learner.splits["test"])
    triggered = attack.triggered(test)
    n = len(triggered)
    require(n > 0, f"{attack}: the test split has only examples of the label it wants")
    wanted = triggered.labels[0]
    success = float((learner.predictions(model, triggered) == wanted).double().mean())
    clean = test.take((test.labels != wanted).nonzero()[:, 0])
    low, high = wilson(success, n)
    return {
        "attack_success": success,
        "attack_success_low": low,
        "attack_success_high": high,
        "attack_success_n": n,
        "attack_success_without_trigger": float((learner.predictions(model, clean) == wanted).double().mean()),
    }


def audit_summary(found: AuditedRun, audit: Audit) -> dict[str, Any]:
    """What an audit says, as plain values; see `AuditedRun`. Canaries are named as they were configured."""
    own = {"canaries": type(audit.canaries).__name__, "ratio": found.ratio, "alarm": found.alarm, "safer": found.safer}
    return asdict(found) | own


def column(rows: Sequence[Mapping[str, object]], name: str) -> list[float]:
    """A column of numbers, where there is one."""
    values = [row.get(name) for row in rows]
    return [float(value) for value in values if isinstance(value, (int, float))]
