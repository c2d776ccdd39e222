"""A Hugging Face model card of a run: what was trained, how well it does, and what of the privacy holds.

    write_model_card(Path("results/private/seed-7"), visibility)       # README.md beside the model

`visibility` is `privfm.experiment.visibility`. The card is made from the export of the run (`export_released`), so that
nothing private can stand in it: not the seed, nor who took part, nor paths of the machine.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, final

from privfm.checks import require
from privfm.files import writable, write_atomically
from privfm.reporting import RunFolder, epsilon_paragraph, export_released
from privfm.reporting.export import Visibility
from privfm.reporting.formats import difference_text, small_number, utility_text

CARD = "README.md"

NO_PRIVACY = (
    "**There is no differential privacy: nothing bounds what this model says of the examples it was trained on.**"
)

TASKS = {
    "SequenceClassification": "text-classification",
    "CausalLM": "text-generation",
    "ImageClassification": "image-classification",
}
"""Hugging Face's names of what is learned."""

_LEAST = 3
"""Most values of a metric that is listed by label; further labels are counted."""


@final
@dataclass(frozen=True)
class CardFacts:
    """What a record does not know.

    Args:
      name: of the model; None: the arm's title.
      license: Hugging Face's identifier, such as `apache-2.0`; None: left out, which means all rights reserved.
      base_model: the hub's name of what was fine-tuned, `owner/name`.
      datasets: the hub's names of the data.
      language: codes such as `en`.
    """

    name: str | None = None
    license: str | None = None
    base_model: str | None = None
    datasets: tuple[str, ...] = ()
    language: tuple[str, ...] = ()


def model_card(run: Path, visibility: Visibility, facts: CardFacts = CardFacts(), *, audits: bool = False) -> str:
    """The card as Markdown, with the front matter that Hugging Face reads.

    Args:
      run: a finished run's folder.
      visibility: name of a field -> `released`, `public` or `private`.
      facts: what the record does not know.
      audits: print what an audit certified. Its canaries were measured on updates that no guarantee covers, so that
        the record calls it private: it is your decision.

    Raises:
      InvalidArgument: `run` is no run, or is not finished.
    """
    require((run / "config.json").is_file(), f"{run} is not a run: it holds no config.json")
    whole = RunFolder(run)
    audited = whole.summary().get("audited") if audits else None
    with tempfile.TemporaryDirectory() as scratch:
        shown = RunFolder(export_released(whole, visibility, Path(scratch) / "shown"))
        config, summary, population = shown.config(), shown.summary(), shown.population()
        environment = shown.environment()
    require("plan" in config and "epsilons" in summary, f"{run}: visibility hides the plan, without which a card says "
            "nothing of privacy; give privfm.experiment.visibility")  # fmt: skip
    name = _plain(facts.name or summary.get("title") or "model")
    parts = (
        f"# {name}",
        *_summary(config, summary),
        "## Privacy",
        *_privacy(config, summary),
        *_audit(config, audited),
        "## Who learns what",
        *_channel(summary),
        "## Utility",
        *_utility(config, summary),
        "## Training",
        *_training(config, summary, population),
        "## Attacks and defenses",
        *_attacks(config, summary),
        "## Limits",
        *_limits(config, summary),
        f"Made from a run's record by privfm {_plain(environment.get('privfm', ''))}".rstrip() + ".",
    )
    return _front_matter(name, config, summary, facts) + "\n" + "\n\n".join(parts) + "\n"


def write_model_card(
    run: Path,
    visibility: Visibility,
    facts: CardFacts = CardFacts(),
    *,
    folder: Path | None = None,
    audits: bool = False,
) -> Path:
    """Writes the card, in one step; see `model_card`.

    Args:
      run: a finished run's folder.
      visibility: name of a field -> `released`, `public` or `private`.
      facts: what the record does not know.
      folder: where `README.md` goes; None: beside the run's saved model. What stands there under that name, such as
        PEFT's empty card, is replaced.
      audits: see `model_card`.

    Returns:
      Path of the card.

    Raises:
      InvalidArgument: `run` is no finished run, or the folder is not there or cannot be written.
    """
    card = model_card(run, visibility, facts, audits=audits)
    target = run / "model" if folder is None else folder
    require(target.is_dir(), f"{target} is no folder: expected that of the model")
    with writable(target / CARD):
        write_atomically(target / CARD, card)
    return target / CARD


# What Hugging Face reads


def _front_matter(name: str, config: Mapping[str, Any], summary: Mapping[str, Any], facts: CardFacts) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    task, data = TASKS.get(_class(config, "task"), "other"), _source(config)
    results = [
        EvalResult(
            task_type=task,
            dataset_type=facts.datasets[0] if facts.datasets else data,
            dataset_name=data,
            dataset_split="test",
            metric_type=_plain(metric),
            metric_value=float(found["value"]),
        )
        for metric, found in sorted(summary.get("metrics", {}).items())
        if found["value"] is not None and "/" not in metric
    ]
    options: dict[str, Any] = {
        "license": facts.license,
        "base_model": facts.base_model,
        "datasets": list(facts.datasets) or None,
        "language": list(facts.language) or None,
    }
    card = ModelCardData(
        model_name=name if results else None,
        eval_results=results or None,
        pipeline_tag=None if task == "other" else task,
        tags=["federated-learning", "privfm", *_tags(summary)],
        **{key: value for key, value in options.items() if value},
    )
    return f"---\n{card.to_yaml()}\n---\n"


def _tags(summary: Mapping[str, Any]) -> list[str]:
    """A guarantee is tagged as such only where no seed can take the noise off again."""
    records = _finite(summary)
    if not records:
        return ["no-differential-privacy"]
    secure = all(str(record["noise"]).startswith("secure") for record in records)
    return ["differential-privacy" if secure else "simulated-differential-privacy"]


# What people read


def _summary(config: Mapping[str, Any], summary: Mapping[str, Any]) -> Iterator[str]:
    adapter = (config["model"].get("init_args") or {}).get("adapter")
    with_adapter = f", of which {adapter['class_path']} is trained" if adapter else ""
    central = summary.get("kind") == "centralised"
    how = "trained in one place" if central else f"fine-tuned by federated learning with {summary['clients']:,} clients"
    yield (
        f"{_class(config, 'model')} ({_named(config['model'])}){with_adapter}: {summary['trained_values']:,} trained "
        f"values, {how}, {config['rounds']:,} rounds planned. Task: {_class(config, 'task')}. Data: {_source(config)}."
    )


def _privacy(config: Mapping[str, Any], summary: Mapping[str, Any]) -> Iterator[str]:
    records = _finite(summary)
    if config["plan"] is None:
        yield NO_PRIVACY
        yield "Clipping, encryption, masks and robust aggregation, where they were used, are no substitute."
        return
    if not records:
        yield NO_PRIVACY
        yield "A plan clipped what was trained on, but added no noise: epsilon is infinite."
        return
    noises = {str(record["noise"]).partition(":")[0] for record in records}
    if any(noise.startswith("scaled") for noise in noises):
        yield (
            "**No guarantee holds for this run: its noise was scaled down, to show a larger population.** "
            "The statements below would be that population's."
        )
    elif noises != {"secure"}:
        yield (
            "**This was a simulation: the noise can be drawn again by whoever knows its seed.** The statements below "
            "are what the same run guarantees with noise from the operating system."
        )
    yield from (f"- {_plain(epsilon_paragraph('Guarantee', record))}" for record in records)
    yield (
        "A smaller epsilon is a stronger guarantee: whatever an adversary believes of one unit changes by a factor of "
        "at most exp(epsilon), but for probability delta. It covers the federated training alone: not the data on "
        "which the base model was trained before, nor the validation and test examples, nor a choice among runs."
    )


def _audit(config: Mapping[str, Any], audited: Mapping[str, Any] | None) -> Iterator[str]:
    if config.get("audit") is None:
        return
    if audited is None:
        yield "An audit with canaries was part of the run; what it found is kept in the record, which is private."
        return
    bound, claimed = audited["bound"], audited["claimed"]
    confidence = f"{100 * float(bound['confidence']):g} % confidence"
    verdict = (
        f"**The claim is contradicted: {_plain(audited['alarm'])}.**" if audited["alarm"] else "It contradicts none."
    )
    yield (
        f"Audited with {audited['count']:,} {_plain(audited['canaries'])}: epsilon is at least "
        f"{_epsilon(bound['epsilon'])} with {confidence} ({_plain(bound['method'])}; at most "
        f"{_epsilon(bound['ceiling'])} could have been shown); claimed: {_epsilon(claimed)}. "
        f"A lower bound proves no claim. {verdict}"
    )


def _channel(summary: Mapping[str, Any]) -> Iterator[str]:
    if summary.get("kind") == "centralised":
        yield "All examples lay in one place, open to whoever trained."
        return
    learns = summary.get("learns") or {}
    yield f"Updates travelled over {_plain(summary['channel_settings'])}."
    lines = [f"- {role}: {_plain(learns[role])}" for role in ("server", "key holder", "clients") if role in learns]
    yield "\n".join([*lines, f"- trusted for that: {_plain(learns.get('trust', 'not recorded'))}"])
    clear = float(summary.get("unprotected") or 0)
    yield f"The server read {100 * clear:.3g} % of each client's update in the clear."


def _utility(config: Mapping[str, Any], summary: Mapping[str, Any]) -> Iterator[str]:
    metrics = {name: one for name, one in summary.get("metrics", {}).items() if "/" not in name}
    rows = ["| metric | value | test examples (or tokens) |", "|---|---|---|"]
    for name, one in sorted(metrics.items(), key=lambda item: item[0] != summary.get("utility_metric")):
        rows.append(f"| {_plain(name)} | {utility_text(one['value'], str(one['unit']))} | {one['n']:,} |")
    yield "\n".join(rows)
    trivial, value, unit = summary.get("trivial_utility"), summary.get("utility"), str(summary.get("utility_unit"))
    if trivial is not None and value is not None:
        yield (
            f"Answering always the same reaches {utility_text(trivial, unit)} ({difference_text(value - trivial, unit)}"
            f"{' points' if unit == 'share' else ''} above that)."
        )
    if config["plan"] is None:
        yield "No guarantee covers these numbers."


def _training(config: Mapping[str, Any], summary: Mapping[str, Any], population: Mapping[str, Any]) -> Iterator[str]:
    shares = config.get("splits") or {}
    rest = 1 - sum(float(share) for share in shares.values())
    by_name = ", ".join(f"{name} {100 * float(share):g} %" for name, share in shares.items() if share)
    sizes = population.get("client_examples") or []
    lines = [
        f"data: {_source(config)}; split before anything else: clients {100 * rest:.4g} %"
        + (f", {by_name}" if by_name else ""),
        f"test examples: {summary['utility_n']:,}",
        f"clients: {summary['clients']:,}, {_plain(summary['cohort_expected'])} expected a round; "
        f"partition: {_call(config['partition'])}",
    ]
    if sizes:
        lines.append(
            f"examples of clients (public under this plan): {min(sizes):,} to {max(sizes):,}, {sum(sizes):,} in all"
        )
    lines += [f"{key}: {_call(config[key])}" for key in ("training", "optimizer", "transforms") if config.get(key)]
    if config["plan"] is not None:
        lines.append(f"privacy plan: {_call({key: own for key, own in config['plan'].items() if own is not None})}")
    yield "\n".join(f"- {line}" for line in lines)


def _attacks(config: Mapping[str, Any], summary: Mapping[str, Any]) -> Iterator[str]:
    instead = ", in whose place the plan released the noisy mean" if _released(config) else ""
    yield f"Aggregation rule: {_call(config['rule'])}{instead}."
    if config.get("attack"):
        share = float(summary.get("malicious_share", config.get("malicious_share", 0)))
        known = ", ".join(map(str, summary.get("attack_knowledge") or ["nothing beyond its own clients"]))
        yield (
            f"**A share of {100 * share:.3g} % of the clients was malicious on purpose** and played "
            f"{_call(config['attack'])}, knowing: {_plain(known)}. It is an experiment's model: do not deploy it."
        )
    if config.get("server_attack"):
        yield f"A curious server was played: {_call(config['server_attack'])}; what it found is private."
    if not config.get("attack") and not config.get("server_attack"):
        yield "No attack was played in this run, so that it says nothing of how it withstands one."


def _limits(config: Mapping[str, Any], summary: Mapping[str, Any]) -> Iterator[str]:
    lines = [
        "One training from one seed: its numbers have no spread; compare runs of several seeds.",
        "Clients were simulated on one host from one data set, unless the engine says otherwise: "
        f"engine {_plain(summary.get('engine') or config.get('engine', 'local'))}.",
        "Privacy attacks that were not played may succeed; an epsilon bounds them, its absence does not.",
    ]
    if config["plan"] is not None and config["plan"].get("unit") == "example":
        lines.append("One example is protected, not everything a client holds: many alike tell of their client.")
    if config["plan"] is not None and config["plan"].get("place") == "central":
        lines.append("The server that aggregated saw the sum before the noise; the guarantee does not bind it.")
    if float(summary.get("unprotected") or 0) == 1 and summary.get("kind") != "centralised":
        lines.append("The server saw every single update.")
    yield "\n".join(f"- {line}" for line in lines)


# Words


def _finite(summary: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Records with an epsilon; an infinite one is null in the record."""
    return [record for record in summary.get("epsilons") or [] if record.get("epsilon") is not None]


def _epsilon(value: float | None) -> str:
    return "infinite, or nothing" if value is None else small_number(float(value))


def _released(config: Mapping[str, Any]) -> bool:
    """Whether the plan takes the rule's place; clients that add their own noise leave it there."""
    plan = config["plan"]
    return plan is not None and plan["unit"] == "client" and plan.get("place") != "local"


def _class(config: Mapping[str, Any], key: str) -> str:
    value = config[key]
    return _plain(value["class_path"] if isinstance(value, Mapping) and "class_path" in value else value)


def _source(config: Mapping[str, Any]) -> str:
    """The data's class, and the last part of their path."""
    return f"{_class(config, 'data')} {_named(config['data'], parameters=False)}".strip()


def _named(value: Mapping[str, Any], *, parameters: bool = True) -> str:
    """Names and sizes of a source; of paths the last part."""
    own = dict(value.get("init_args") or {})
    own.pop("adapter", None)
    if not parameters:
        return ", ".join(_plain(PurePath(str(own[key])).name) for key in ("path", "name") if own.get(key))
    return ", ".join(f"{key}={_call(part)}" for key, part in own.items() if part is not None) or "no parameters"


def _call(value: Any) -> str:
    """A configured object as it would be written in Python; of paths the last part."""
    if isinstance(value, Mapping) and "class_path" in value:
        own = value.get("init_args") or {}
        return f"{_plain(value['class_path'])}({', '.join(f'{key}={_call(part)}' for key, part in own.items())})"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_plain(key)}: {_call(part)}" for key, part in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_call(part) for part in value) + "]"
    if isinstance(value, str) and value.startswith(("/", ".", "~")):
        return _plain(PurePath(value).name)
    return _plain(value)


def _plain(value: object) -> str:
    """One line, without what Markdown or HTML would read as markup."""
    text = re.sub(r"\s+", " ", str(value)).strip()
    return re.sub(r"([<>|`*#\[\]])", r"\\\1", text)
