"""What an experiment answers, in sentences computed from its numbers; none where the arms for it are missing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from privfm.reporting.formats import difference_text, small_number, utility_interval, utility_text
from privfm.reporting.noise_lines import UNITS, NoiseLine, by_unit, epsilon_names, noise_lines
from privfm.reporting.summary import ArmResult, Experiment, paired_difference


@final
@dataclass(frozen=True)
class Answer:
    """A question and what the numbers say to it."""

    question: str
    text: str


def answers(experiment: Experiment) -> tuple[Answer, ...]:
    """What privacy cost, what the attacks broke and what the defenses saved, as far as arms for it are there."""
    sentences = {
        "What did privacy cost?": (_noise(experiment), _encryption(experiment)),
        "What did the attack break?": (_attacks(experiment),),
        "What did the defense save?": (*_defenses(experiment), _clean_rules(experiment)),
    }
    found = [Answer(question, " ".join(filter(None, texts))) for question, texts in sentences.items()]
    return tuple(answer for answer in found if answer.text)


def _noise(experiment: Experiment) -> str:
    lines = noise_lines(experiment)
    if len(lines) > 1:
        return " ".join(filter(None, (_best_methods(unit, own) for unit, own in by_unit(lines).items())))
    plain = experiment.plain
    reached = [
        f"{_reached(arm, plain)} at epsilon {small_number((arm.epsilon or {})['epsilon'])}"
        for arm in experiment.private
    ]
    if plain is None or not reached:
        return ""
    once = list(dict.fromkeys(reached))  # arms that differ in who carries the messages reach the same
    return f"Federated training without noise reached {_utility(plain)}; with a guarantee {_listed(once)}."


def _best_methods(unit: str, lines: Sequence[NoiseLine]) -> str:
    """The best method of a unit at each epsilon, next to its own training without noise."""
    reached = []
    for epsilon in epsilon_names(lines):
        found = [(arm, line) for line in lines if (arm := line.at(epsilon)) is not None]
        best, line = max(found, key=lambda each: _score(each[0]))
        own = line.without_noise
        if own is best:
            reached.append(f"without noise {line.title} {_utility(best)}")
        else:
            change = "" if own is None else f" ({_change(best, own)})"
            reached.append(f"at epsilon {epsilon} {line.title} {_utility(best)}{change}")
    return f"For {UNITS.get(unit, unit)} the best was {_listed(reached)}."


def _encryption(experiment: Experiment) -> str:
    """What another channel changed, under the plain arm's rule."""
    plain = experiment.plain
    plain_bytes = plain.mean("bytes_up_per_client") if plain else None
    if plain is None or not plain_bytes:
        return ""
    other = [arm for arm in _clean(experiment, plain.facts["rule_name"]) if _channel(arm) != _channel(plain)]
    reached = [
        f"{_channel(arm)} reached {_reached(arm, plain)} and sent {sent / plain_bytes:.3g} times the bytes"
        for arm in other
        if (sent := arm.mean("bytes_up_per_client"))
    ]
    return f"{_listed(list(dict.fromkeys(reached)))}." if reached else ""


def _attacks(experiment: Experiment) -> str:
    """What each attack did where nothing but averaging stood in its way."""
    plain = experiment.plain
    reached = [
        f"{_reached(arm, plain)} under {experiment.attack_title(arm)} "
        f"({100 * float(arm.facts['malicious_share']):.0f} % of the clients)"
        for arm in _attacks_on(experiment, plain)
    ]
    return f"Averaging went from {_utility(plain)} to {_listed(reached)}." if plain and reached else ""


def _defenses(experiment: Experiment) -> list[str]:
    """For each attack, the other rule that kept most, next to averaging."""
    averaged = {str(arm.facts["attack"]): arm for arm in _attacks_on(experiment, experiment.plain)}
    robust: dict[str, list[ArmResult]] = {}
    for arm in experiment.attacked:
        if arm.facts["rule_name"] != "Mean" and arm.epsilon is None and arm.utility is not None:
            robust.setdefault(str(arm.facts["attack"]), []).append(arm)
    return [_defense(experiment, max(arms, key=_score), averaged.get(attack)) for attack, arms in robust.items()]


def _defense(experiment: Experiment, best: ArmResult, averaged: ArmResult | None) -> str:
    attack, rule = experiment.attack_title(best), best.facts["rule_name"]
    text = f"Against {attack}, {rule} kept most of the robust rules: {_utility(best)}"
    partner = experiment.clean_partner(best)
    if partner and partner.utility and best.utility is not None and best.facts.get("higher_is_better", True):
        text += f", {100 * best.utility / partner.utility:.0f} % of its own clean score"
    if averaged is not None and averaged.utility is not None:
        remark = ", so robustness gained nothing here" if _score(averaged) >= _score(best) else ""
        text += f" (averaging: {_utility(averaged)}{remark})"
    return f"{text}."


def _clean_rules(experiment: Experiment) -> str:
    plain = experiment.plain
    if plain is None:
        return ""
    rules = [arm for arm in experiment.clean_rules if arm.facts["rule_name"] != plain.facts["rule_name"]]
    reached = [f"{arm.facts['rule_name']} {_utility(arm)}" for arm in rules if arm.utility is not None]
    return (
        f"Without attack the robust rules reached {_listed(reached)}; averaging {_utility(plain)}." if reached else ""
    )


def _attacks_on(experiment: Experiment, clean: ArmResult | None) -> list[ArmResult]:
    """Attacked arms that differ from `clean` by the attack alone."""
    return [arm for arm in experiment.attacked if clean is not None and experiment.clean_partner(arm) is clean]


def _clean(experiment: Experiment, rule_name: str) -> list[ArmResult]:
    return [arm for arm in experiment.clean_rules if arm.facts["rule_name"] == rule_name]


def _channel(arm: ArmResult) -> str:
    return str(arm.facts["channel_name"])


def _score(arm: ArmResult) -> float:
    """Utility with its sign turned where less is better."""
    return (arm.utility or 0.0) * (1 if arm.facts.get("higher_is_better", True) else -1)


def _utility(arm: ArmResult) -> str:
    return utility_text(arm.utility, str(arm.facts["utility_unit"])) if arm.utilities else "no finite number"


def _reached(arm: ArmResult, reference: ArmResult | None) -> str:
    return f"{_utility(arm)} ({_change(arm, reference)})"


def _change(arm: ArmResult, reference: ArmResult | None) -> str:
    """The paired difference, with a warning where it may be nothing."""
    difference = paired_difference(arm, reference)
    if difference is None or reference is None:
        return "no pair to compare"
    unit = str(arm.facts["utility_unit"])
    text = f"{difference_text(difference, unit)} points" if unit == "share" else difference_text(difference, unit)
    return text + _doubt(arm, reference)


def _doubt(arm: ArmResult, reference: ArmResult) -> str:
    """One seed: whether the intervals of the two arms overlap. Several: whether the seeds disagree on the sign."""
    ours, theirs = utility_interval(arm), utility_interval(reference)
    if ours is not None and theirs is not None:
        return "; intervals overlap" if ours[0] <= theirs[1] and theirs[0] <= ours[1] else ""
    signs = {value > reference.utilities[seed] for seed, value in arm.utilities.items() if seed in reference.utilities}
    return "; seeds differ in sign" if len(signs) > 1 else ""


def _listed(parts: Sequence[str]) -> str:
    """`a`, `a and b`, or `a, b and c`."""
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))
