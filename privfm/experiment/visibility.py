"""Who may see which field of a run's record: what `privfm export --released` keeps and the report marks."""

from __future__ import annotations

from dataclasses import fields

from privfm.contracts import WORST_CLIENTS
from privfm.experiment.config import RunConfig
from privfm.federation.record import Visibility
from privfm.federation.record import visibility as of_round

# What a run was told is public: an adversary knows the protocol. The seed is not: with it anybody subtracts the noise.
CONFIG: dict[str, Visibility] = {item.name: "public" for item in fields(RunConfig)}
CONFIG["malicious"] = "private"  # under this name a round's row says how many of its cohort poisoned
ENVIRONMENT: dict[str, Visibility] = dict.fromkeys(
    ("privfm", "python", "platform", "cpu_count", "torch_threads", "device", "device_name", "versions", "git"), "public"
)  # the command line stays private: it may hold the seed
SUMMARY: dict[str, Visibility] = {
    **dict.fromkeys(("utility", "metrics", "model_sha256", "epsilon", "epsilons", "epsilon_curve"), "released"),
    **dict.fromkeys(
        (
            "arm", "title", "kind", "utility_metric", "utility_n", "utility_unit", "higher_is_better",
            "trivial_utility", "rule_name", "channel_name", "channel_settings", "learns", "unprotected",
            "attack_name", "attack_knowledge", "trained_values", "clients", "cohort_expected", "client_examples",
            "engine",
        ),
        "public",
    ),
}  # fmt: skip


def visibility(name: str) -> Visibility:
    """Of a field of the configuration, environment, rounds or summary; nested names are dotted (`epsilon.delta`).

    What is unknown is private.
    """
    if WORST_CLIENTS in name:
        return "private"
    top = name.split(".", 1)[0]
    known = {**CONFIG, **ENVIRONMENT, **SUMMARY}.get(top)
    return of_round(name) if known is None else known
