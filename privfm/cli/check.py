"""`privfm check`: what a configuration would do, cost and leak. Nothing is trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from inspect import isabstract
from math import isfinite
from typing import Any, final

import torch

from privfm.attacks.audit import ceiling
from privfm.attacks.reconstruction import LeakageBudget
from privfm.checks import InvalidArgument, RoundFailed
from privfm.cli.errors import DONE, REFUSED, say
from privfm.cli.explain import public_classes
from privfm.cli.run import Request, request
from privfm.contracts import BuiltModel, Channel, Knows, Reveals, Rule, Table, UpdateAttack
from privfm.defenses import DPPlan, Mean
from privfm.defenses.channels import PairwiseMasks, Selective
from privfm.engines import Local
from privfm.experiment import RunConfig, arm_of, deal
from privfm.experiment.run import AccountedFacts, affordable_rounds
from privfm.federation import Arm, problems, problems_elsewhere
from privfm.federation.canaries import Audit
from privfm.federation.compatibility import table
from privfm.federation.rehearsal import Rehearsal
from privfm.learning import ModelLearner, Workbench
from privfm.randomness import Seeds
from privfm.reporting import epsilon_paragraph
from privfm.reporting.formats import bytes_text

MOST_MEASURED = 50
"""Clients whose messages are measured, at most: pairwise masks have their largest complete graph below."""

NARROW = 1024
"""Values of the rows that so many send."""

LARGEST_MEASURED = 1 << 22
"""Values a measured row has at most; the bytes of a longer one are scaled up."""

SAMPLES: dict[str, Any] = {
    "bound": 1.0, "clients": 1000, "f": 1, "max_norm": 1.0, "radius": 1.0, "rule": Mean(), "s": 2, "step_size": 0.01,
    "threshold": 4, "bits": 16, "channel": PairwiseMasks(clients=1000), "size": 10, "protected": ((0, 500),),
    "masks": PairwiseMasks(clients=1000, corrupt=0.0, modulus_bits=16), "approximate": True,
}  # fmt: skip
"""Values for the required fields of rules and channels, by name, for the table of what fits together."""


@final
@dataclass(frozen=True)
class Outline:
    """A run as far as it is known before it starts.

    Attributes:
      arm: what the round would play.
      rounds: rounds in all, as far as the plan's budget pays for them.
      asked: rounds that were asked for.
      d: trained values.
      clients: in the population.
      rooted: the server has examples of its own.
      examples: how many each client holds.
      private_gradients: why local training cannot bound gradients of single examples; empty: it can.
      leakage: what the first attention layer's gradients give away of a typical client's tokens; empty where no text
        is read.
    """

    arm: Arm
    rounds: int
    asked: int
    d: int
    clients: int
    rooted: bool
    examples: tuple[int, ...]
    private_gradients: str
    leakage: str = ""

    @classmethod
    def of(cls, config: RunConfig, seed: int) -> Outline:
        """Reads the data, deals them out and builds the model, without the activations that training would need.

        Raises:
          InvalidArgument: something is missing, or the parts do not fit together.
        """
        dealt = deal(config, seed)
        table = dealt.table
        built = config.model.build(table.label_names, Seeds(seed).generator("initialisation"))
        first = Table(table.inputs[:1], table.labels[:1], table.label_names)  # enough to see that they fit
        bench = Workbench(built, config.task, first, config.device)
        refusal = ModelLearner(bench, dealt.splits, config.training).refuses_private_gradients()
        clients = len(dealt.clients)
        rooted = len(dealt.splits["server"]) > 0
        sizes = tuple(len(rows) for rows in dealt.clients)
        d = bench.layout.d
        rounds = affordable_rounds(config, AccountedFacts(d, sizes))
        leakage = _leakage(built, [dealt.table.inputs[row] for row in dealt.clients[0].tolist()], rounds)
        return cls(arm_of(config, clients, seed), rounds, config.rounds, d, clients, rooted, sizes, refusal, leakage)


def _leakage(built: BuiltModel, texts: Sequence[Any], rounds: int) -> str:
    """The leakage budget of rounds with the same texts, before any noise; a client's own are counted, not shown."""
    if built.tokenize is None:
        return ""
    try:
        budget = LeakageBudget.of(built.module)
    except InvalidArgument as reason:
        return f"Leakage budget: not known, {reason}"
    tokens = built.tokenize([str(text) for text in texts])
    real = tokens["input_ids"][tokens["attention_mask"].bool()]
    return budget.describe(rounds, len(torch.unique(real)), int(tokens["attention_mask"].sum(1).max()))


def check(argv: Sequence[str]) -> int:
    """Says what a configuration would do, cost and leak; without one, what fits together.

    Args:
      argv: `[CONFIG.toml] [--key value ...]`, as for `privfm run`.

    Returns:
      1 where something must not run.
    """
    if not argv:
        say(compatibility_table())
        return DONE
    asked: Request = request("check", argv)
    outline = Outline.of(asked.config, next(iter(asked.seeds), 0))
    examples = sum(outline.examples)
    found = problems(outline.arm, outline.d, outline.clients, outline.rooted, examples, outline.private_gradients)
    if asked.config.engine == "flower":
        found += problems_elsewhere(outline.arm, bool(asked.config.clients_elsewhere))
    for problem in found:
        say(f"problem: {problem.what}\ninstead: {problem.instead}\n")
    for name, text in (*_sizes(outline, measurable=not found), *_who_sees_what(outline)):
        say(f"{name:<16} {text}")
    if outline.leakage:
        say(f"\n{outline.leakage}")
    say(f"\n{_privacy(outline)}")
    say(f"\n{len(found)} problem(s): this must not run" if found else "\nno problems; nothing was trained")
    return REFUSED if found else DONE


def _sizes(outline: Outline, measurable: bool) -> Iterator[tuple[str, str]]:
    """Who takes part, and what travels and is kept."""
    arm, d, clients = outline.arm, outline.d, outline.clients
    expected, largest = arm.sampling.expected(clients), arm.sampling.largest(clients)
    yield "trained values", f"{d:,}"
    yield "clients", f"{clients:,}, of them malicious: {len(arm.malicious):,}"
    ends = "" if outline.rounds == outline.asked else f" of {outline.asked}: then the budget is spent"
    yield "cohort", f"{expected:g} expected, {largest:,} at most, a round; {outline.rounds} rounds{ends}"
    if arm.audit is not None:
        yield "audit", _audit(arm.audit, expected / clients)
    yield "smallest cohort", _smallest_cohort(arm)
    up: float | None = None
    if measurable:
        try:
            up, down, exact = measured_bytes(arm, d, round(arm.sampling.expected(outline.clients)))
        except RoundFailed as reason:
            yield "bytes", f"not measured: {reason}"
        else:
            about = "" if exact else "about "
            yield "bytes up", f"{about}{bytes_text(up)} ({up:,.0f}) a client and round"
            yield "bytes down", f"{about}{bytes_text(down)} ({down:,.0f}) a client and round, the model included"
    if arm.plan is not None and arm.plan.integers is not None and measurable and arm.plan.noise_multiplier > 0:
        wrapped = arm.plan.integers.wrap_probability(arm.plan.noise_multiplier, d)
        yield "modulus", f"a round loses a coordinate to it with probability {wrapped:.2g} at most; epsilon is the same"
    yield "server's memory", _memory(arm, d, largest, up)
    attack = arm.attack
    if isinstance(attack, UpdateAttack) and attack.needs is Knows.ROWS:
        yield "attack's memory", f"{bytes_text(4.0 * largest * d)}: it is granted every honest update of a round"


def _audit(audit: Audit, rate: float) -> str:
    """What canaries cost, and what they can show at most."""
    canaries = audit.canaries
    name, most = type(canaries).__name__, ceiling(canaries.count, audit.confidence)
    cost = f"{canaries.columns:,} columns more in every update, no accuracy" if canaries.ghost else "some accuracy"
    return (
        f"{canaries.count:,} {name}, about {rate * canaries.count / 2:,.0f} in a round; {cost}; with every guess right "
        f"they would certify epsilon {most:.3g} at {audit.confidence:.0%}, and no more"
    )


def _smallest_cohort(arm: Arm) -> str:
    rule, plan = arm.rule, arm.plan
    if plan is not None and plan.integers is not None:
        return f"{plan.integers.least_answers}: with fewer answers the round ends before the sum is opened"
    if plan is not None and plan.noises_the_sum:
        return "0: under the plan an empty round is released too, as noise"
    condition = "" if rule.condition == str(rule.smallest_cohort) else f" ({rule.condition})"
    return f"{rule.smallest_cohort}{condition} usable updates for {type(rule).__name__}, else the round is skipped"


def _memory(arm: Arm, d: int, largest: int, up: float | None) -> str:
    """What the server keeps of a cohort, at most."""
    # A plan's release needs the sum, as the mean that it replaces does.
    needs = Reveals.EACH if arm.server_attack is not None else arm.rule.needs
    if Reveals.SUM in (arm.channel.reveals, needs):
        ciphertext = (up or 0.0) if arm.channel.key_holder_stages else 0.0
        return f"{bytes_text(max(8.0 * d, ciphertext))}: one running sum, whatever the cohort"
    if arm.channel.reveals is Reveals.GRAM:
        return f"{bytes_text(largest * max(4.0 * d, up or 0.0))} at most: every encrypted update of a cohort"
    rows = arm.channel.rows(largest)
    what, count = ("every update", largest) if rows is None else ("the mean of every group", rows)
    return f"{bytes_text(4.0 * count * d)} at most: {what} of a cohort ({count:,} x {d:,} x 4 bytes)"


def measured_bytes(arm: Arm, d: int, clients: int = 2) -> tuple[float, float, bool]:
    """Plays the channel's protocol with rows of zeros and counts, as a round would.

    A long row is sent by few clients, and a short one by as many as a round has: what a client sends grows with the
    row, and for keys and shares with the number of clients.

    Args:
      arm: without problems.
      d: trained values.
      clients: in a round.

    Returns:
      Bytes up and down (the model included) a client and round, and whether they were measured at full width.

    Raises:
      RoundFailed: the protocol does not finish with so many.
    """
    whole = d + 1 if arm.plan is not None and arm.plan.adaptive else d  # a share of the count travels with the row
    whole += arm.ghosts
    width = min(whole, LARGEST_MEASURED)
    least = max(2, arm.wire.least_clients)
    many = max(least, min(clients, MOST_MEASURED))
    up, down = _played_bytes(arm, width, least)
    if many > least:
        narrow = min(width, max(NARROW, arm.channel.protected[-1][1] if isinstance(arm.channel, Selective) else 0))
        few, all_of_them = _played_bytes(arm, narrow, least), _played_bytes(arm, narrow, many)
        up, down = up + all_of_them[0] - few[0], down + all_of_them[1] - few[1]
    scale = whole / width
    return scale * up, scale * down + 4 * d, width == whole


def _played_bytes(arm: Arm, width: int, clients: int) -> tuple[float, float]:
    """Bytes up and down a client of one round of rows `(width,)`."""
    rehearsal = Rehearsal(arm.wire, torch.zeros(1, width), arm.codecs, clients=clients)
    _, phases = rehearsal.play(Local(1), lambda view: view.total())
    up = sum(phase.up / max(phase.answered, 1) for phase in phases.all)  # as a round counts them, every stage
    return up, phases.down


def _who_sees_what(outline: Outline) -> Iterator[tuple[str, str]]:
    """Each party's view, from channel, plan and attack."""
    arm, channel = outline.arm, outline.arm.wire
    curious = "" if arm.server_attack is None else f"; it is curious: {arm.server_attack!r}"
    yield "server sees", f"{channel.learns['server']}{_noised_for_server(arm.plan)}{curious}"
    yield "key holder sees", _key_holder(arm)
    clear = channel.unprotected(outline.d)
    yield "in the clear", f"{clear:.1%} of each update{'; the rest is encrypted' if 0 < clear < 1 else ''}"
    yield "trusted", channel.learns["trust"]
    yield from channel.facts(outline.d, round(arm.sampling.expected(outline.clients))).items()
    known = () if arm.attack is None else arm.attack.knowledge
    granted = f"; the malicious are granted: {', '.join(known)}" if known else ""
    yield "clients see", f"the model of every round{granted}"
    bounded = "no guarantee bounds what they tell" if arm.plan is None else "what they tell is bounded, see below"
    yield "public sees", f"the released models: {bounded}"
    yield from _too_many_malicious(outline)
    if arm.plan is not None and arm.malicious and arm.channel.reveals < Reveals.EACH:
        way = type(arm.channel).__name__
        yield "mind", f"over {way} nobody can make a malicious client clip: its update may be as long as it likes"


def _too_many_malicious(outline: Outline) -> Iterator[tuple[str, str]]:
    """How likely a cohort holds more malicious clients than the rule can take."""
    arm, tolerated = outline.arm, outline.arm.rule.tolerated
    if tolerated is None or not arm.malicious:
        return
    cohort = arm.sampling.expected(outline.clients)
    expected = cohort * len(arm.malicious) / outline.clients
    a_round = arm.sampling.exceeds(tolerated, len(arm.malicious), outline.clients)
    some_round = 1 - (1 - a_round) ** outline.rounds
    name = type(arm.rule).__name__
    yield (
        "attackers",
        f"about {expected:.3g} of {cohort:g} are malicious, {name} tolerates {tolerated}: more than that with "
        f"probability {a_round:.2g} in a round, {some_round:.2g} in one or more of {outline.rounds}",
    )


def _noised_for_server(plan: DPPlan | None) -> str:
    """What noise is in what the server sees."""
    if plan is None:
        return ""
    if plan.unit == "example":
        return "; clients have added noise in every local step"
    return {
        "central": ", before any noise",
        "key_holder": "; the key holder has added noise",
        "local": "; every client has added noise of its own",
        "distributed": "; all clients together have added noise",
    }[plan.place]


def _key_holder(arm: Arm) -> str:
    channel, plan = arm.wire, arm.plan
    if "key holder" not in channel.learns:
        return "nothing: there is none"
    own = plan is not None and plan.place == "key_holder"
    noise = ", before it adds the noise" if own else _noised_for_server(plan)
    limits = channel.limits
    granted = ""
    if limits is not None:
        size = f"{limits.smallest_release:g}"
        granted = f"; it grants {limits.max_references} references and sums of effectively {size} clients or more"
    return f"{channel.learns['key holder']}{noise}{granted}"


def _privacy(outline: Outline) -> str:
    plan = outline.arm.plan
    if plan is None:
        return "epsilon: none. Without a plan there is no differential privacy, against anybody."
    records = [asdict(record) for record in plan.records(outline.rounds, outline.examples, outline.d)]
    if not isfinite(records[0]["epsilon"]):
        return "epsilon: infinite. The plan adds no noise, so that it guarantees nothing."
    return "\n".join(epsilon_paragraph("privacy after all rounds", record) for record in records)


def compatibility_table() -> str:
    """Every public rule over every public channel, with and without a central plan, one line each."""
    kinds = [kind for kind in public_classes().values() if not isabstract(kind)]
    rules = [sample(kind) for kind in kinds if issubclass(kind, Rule)]
    channels = [sample(kind) for kind in kinds if issubclass(kind, Channel)]
    lines = [("rule", "channel", "plan", "")]
    lines += [
        (row.rule, row.channel, "central" if row.plan else "none", row.refused or "runs")
        for row in table(rules, channels)
    ]
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    texts = ["  ".join([*(line[k].ljust(widths[k]) for k in range(3)), line[3]]).rstrip() for line in lines]
    return "\n".join(texts)


def sample(kind: type) -> Any:
    """An instance of a public rule or channel, with `SAMPLES` for what has no default.

    Raises:
      InvalidArgument: a required field has no sample.
    """
    free = ("approximate",)  # exact sums have room for few clients
    required = [
        item.name
        for item in fields(kind)
        if item.name in free or (item.default is MISSING and item.default_factory is MISSING)
    ]
    unknown = [name for name in required if name not in SAMPLES]
    if unknown:
        raise InvalidArgument(f"{kind.__name__} needs {', '.join(unknown)}: add a value to SAMPLES in {__name__}")
    return kind(**{name: SAMPLES[name] for name in required})
