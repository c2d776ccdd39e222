"""One flat row a round, and who may see which of its fields."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, final

from privfm.contracts import WORST_CLIENTS, Metric

Visibility = Literal["released", "public", "private"]


def _shown(visibility: Visibility) -> Any:
    return field(metadata={"visibility": visibility})


@final
@dataclass(frozen=True)
class Record:
    """What happened in one round. Units are in the names.

    `released` fields follow from released models and public settings, so a plan's guarantee covers them; `public` ones
    are settings; `private` ones are simulation diagnostics that depend on who took part or on un-noised updates.

    Attributes:
      round: counted from 0.
      sampled: clients in the cohort.
      malicious: of them, those that poison in this round.
      arrived: usable rows: clients, or groups of them.
      bad: rows left out as non-finite or malformed.
      failed: clients whose training raised; None where they train elsewhere.
      arrived_malicious: of them, attackers; None where rows are means of groups.
      kept: clients with a weight above zero; None where a row has no one weight.
      kept_malicious: of them, attackers.
      clipped: clients whose row was scaled down or pulled in; None where the rule does not.
      clipped_malicious: of them, attackers.
      detected: clients the rule judged malicious, or where it judges nobody, gave no weight; None where neither.
      detected_malicious: of them, attackers. True positive rate: over `arrived_malicious`.
      empirical_kappa: squared distance of the aggregate to the mean of the honest rows, over their mean squared
        distance to it; None under a plan, where an honest row was lost, or where they do not differ.
      dropped_by_projection: share of the change of adapted weights that factors of one rank could not hold; None where
        factors are aggregated as they are.
      base_change_norm: L2 norm of what the server has added to frozen weights since the start; None: it adds nothing.
      clip_bound: L2 clip of the round, where a plan moves it; None: it stays. Part of what is released.
      skipped: why the round was skipped; empty when it was played.
      failure: the first reason why a client's training, or under a plan the protocol, failed; empty when nothing did.
      update_norm_median: L2 norm of a trained update before any step.
      bytes_up: all replies together.
      bytes_up_per_client: replies of a client that answered every stage, on average.
      bytes_down_per_client: the model and the requests of every stage.
      channel_error_relative_l2: L2 distance of the channel's sum from the plain sum of the same rows, over the latter's
        norm; None where rows are revealed, or a client was lost after it had sent.
      seconds_training: local training and client steps; None where clients train elsewhere: then it is waited for.
      seconds_aggregation: everything else in the round.
    """

    round: int = _shown("public")
    sampled: int = _shown("private")
    malicious: int = _shown("private")
    arrived: int = _shown("private")
    arrived_malicious: int | None = _shown("private")
    bad: int = _shown("private")
    failed: int | None = _shown("private")
    kept: int | None = _shown("private")
    kept_malicious: int | None = _shown("private")
    clipped: int | None = _shown("private")
    clipped_malicious: int | None = _shown("private")
    detected: int | None = _shown("private")
    detected_malicious: int | None = _shown("private")
    empirical_kappa: float | None = _shown("private")
    dropped_by_projection: float | None = _shown("private")
    base_change_norm: float | None = _shown("private")
    clip_bound: float | None = _shown("released")
    skipped: str = _shown("private")
    failure: str = _shown("private")
    update_norm_median: float | None = _shown("private")
    channel_error_relative_l2: float | None = _shown("private")
    bytes_up: int = _shown("private")
    bytes_up_per_client: float = _shown("private")
    bytes_down_per_client: float = _shown("private")
    seconds_training: float | None = _shown("private")
    seconds_aggregation: float = _shown("private")
    leaked: dict[str, float] = _shown("private")

    def row(
        self, metrics: dict[str, Metric] | None, primary: str, split: str, seconds_evaluation: float
    ) -> dict[str, float | int | str | None]:
        """Flat, for one line of JSON; metrics of an evaluated round carry the split's name as prefix."""
        row: dict[str, float | int | str | None] = {k: v for k, v in asdict(self).items() if k != "leaked"}
        row |= {f"leaked/{name}": value for name, value in self.leaked.items()}
        row["seconds_evaluation"] = seconds_evaluation
        row["utility"] = None if metrics is None else metrics[primary].value
        return row | {f"{split}/{name}": metric.value for name, metric in (metrics or {}).items()}


VISIBILITY: dict[str, Visibility] = {item.name: item.metadata["visibility"] for item in fields(Record)} | {
    "utility": "released"
}


def visibility(name: str) -> Visibility:
    """Of a field of a round's row.

    Metrics are evaluations of released models on data outside the clients' split, but for those that weigh them by
    what clients hold. What is unknown is private.
    """
    if WORST_CLIENTS in name:
        return "private"
    if name.startswith(("validation/", "test/")):
        return "released"
    return VISIBILITY.get(name, "private")
