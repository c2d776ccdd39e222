"""Every refusal in the project, as one list of problems, and the table of what goes with what."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import inf, isinf, sqrt
from typing import final

from privfm.contracts import ROOT, Channel, Knows, Reveals, Rule, UpdateAttack
from privfm.defenses.channels import Selective
from privfm.defenses.mean import Mean
from privfm.defenses.privacy import DPPlan
from privfm.defenses.privacy.clipping import AdaptiveQuantile, Flat
from privfm.defenses.privacy.integer_noise import IntegerNoise
from privfm.defenses.transforms import FixedPoint
from privfm.federation.arm import Arm
from privfm.federation.optimizers import Average
from privfm.federation.population import FixedSize, Poisson

Finding = tuple[bool, str, str]
"""Whether something is wrong, what, and the way out."""


@final
@dataclass(frozen=True)
class Problem:
    """Something that must not run.

    Attributes:
      what: the problem, with names and values.
      instead: the way out.
    """

    what: str
    instead: str


def problems(  # noqa: PLR0917  # all of them are facts of a run, and named where they are given
    arm: Arm, d: int, population: int, rooted: bool = True, examples: int | None = None, private_gradients: str = ""
) -> list[Problem]:
    """Everything that is wrong with an arm, purely: nothing is trained, made or asked.

    Args:
      arm: to be judged.
      d: trained values.
      population: number of clients.
      rooted: the server has examples of its own.
      examples: that all clients hold together; None: at least one each.
      private_gradients: why local training cannot bound gradients of single examples; empty: it can.
    """
    judges = (
        _columns(arm, d),
        _channel(arm, d, population),
        _codecs(arm),
        _rule(arm, population),
        _root(arm, d, rooted),
        _adapters(arm),
        _weighting(arm),
        _plan(arm, d, population, population if examples is None else examples, private_gradients),
        _alternation(arm),
        _attack(arm),
        _audit(arm, population),
    )
    return [Problem(what, instead) for judge in judges for wrong, what, instead in judge if wrong]


def problems_elsewhere(arm: Arm, own_data: bool = False) -> list[Problem]:
    """What cannot be where clients are on hosts of their own; the rest of `problems` is the same there.

    Args:
      arm: to be judged.
      own_data: each host has data of its own, of which the server knows nothing.
    """
    sized = arm.weighting == "examples" or (arm.plan is not None and arm.plan.makes_sizes_public)
    name, needs = type(arm.attack).__name__, arm.attack.needs if isinstance(arm.attack, UpdateAttack) else Knows.OWN
    findings = (
        (
            needs > Knows.OWN,
            f"{name} is granted {needs.name} of the honest clients, which no host shows to another",
            "engine=local, which plays that threat model, or an attack that needs only its own rows (SignFlip)",
        ),
        (
            not arm.wire.server_learns_sum,
            f"clients alone open a sum of {type(arm.channel).__name__}, and here their replies go through the server",
            "a sum that the server may see (release=public), or engine=local",
        ),
        (
            arm.folds and bool(getattr(arm.channel, "active", False)),
            "clients multiply their rows by what the server says, so that one that lies singles a row out among tiny "
            "others: active masks would protect nobody",
            "weighting=equal, or active=False, which trusts the server to follow the protocol",
        ),
        (
            own_data and sized,
            "weighting or plan need to know how many examples each client holds, and hosts do not tell",
            "weighting=equal, and a plan whose unit is the client, without weight_cap",
        ),
        (
            own_data and (arm.audit is not None or arm.server_attack is not None),
            "an audit or a curious server is scored with clients' data, which are not here",
            "flower.clients=0, where all data are read everywhere and dealt out",
        ),
    )
    return [Problem(what, instead) for wrong, what, instead in findings if wrong]


def _channel(arm: Arm, d: int, population: int) -> Iterator[Finding]:
    """What the rule asks, against what the channel reveals and its key holder grants."""
    rule, channel = arm.rule, arm.channel
    name, way = type(rule).__name__, type(channel).__name__
    yield (
        rule.needs > channel.reveals,
        f"{name} needs {rule.needs.name}, {way} reveals only {channel.reveals.name}",
        f"Mean over {way}, or {name} over a channel that reveals {rule.needs.name}, such as {_revealing(rule.needs)}",
    )
    yield (
        channel.decides and not rule.delegable,
        f"{name} remembers more than its aggregate, and the key holder of {way}, who runs the rule, remembers nothing",
        "MultiKrum, GeometricMedian, FLTrust or CenteredClipping, with NearestNeighborMixing or NormBound around them",
    )
    grouped = channel.rows(1) is not None
    yield (
        grouped and rule.keyed,
        f"{name} remembers clients, and rows of {way} are means of groups",
        "a rule that remembers nobody, such as TrimmedMean",
    )
    yield (
        not channel.server_learns_sum and arm.plan is not None and arm.plan.place == "central",
        f"the server is to add the noise, and over {way} it never sees the sum",
        "place='key_holder' or place='distributed'",
    )
    expected = round(arm.sampling.expected(population))
    yield (
        expected < channel.least_clients and channel.least_clients > 1,
        f"{way} opens nothing of fewer than {channel.least_clients} clients, {arm.sampling} draws about {expected}",
        f"a cohort of at least {channel.least_clients}",
    )
    clear, place = channel.unprotected(d), "" if arm.plan is None else arm.plan.place
    yield (
        0 < clear < 1 and place in ("key_holder", "distributed"),
        f"{way} shows the server {clear:.1%} of each update, and noise of place {place!r} covers the sum alone",
        "the channel inside it for whole updates, or place='local'",
    )
    largest = arm.sampling.largest(population) + arm.most_canaries(population)
    yield (
        channel.most_clients is not None and largest > channel.most_clients,
        f"{way} has head-room for a sum of {channel.most_clients} clients, {arm.sampling} may draw {largest}",
        f"raise the channel's number of clients to {largest}",
    )
    if channel.limits is not None:
        rows = len(rule.references(rule.init(d), d))
        yield (
            rows > channel.limits.max_references,
            f"{name} shows the key holder of {way} {rows} references, it grants {channel.limits.max_references}",
            "raise max_references knowingly: each reference measures every client's row",
        )
        size = rule.effective_size(expected)
        yield (
            size is not None and size < channel.limits.smallest_release,
            f"{name} releases a sum of effectively {size} clients, {way} at least {channel.limits.smallest_release}",
            "a rule that averages more clients",
        )


def _revealing(needs: Reveals) -> str:
    return "CKKSGram or Plaintext" if needs is Reveals.GRAM else "Plaintext, or Grouped (means of random groups)"


def _columns(arm: Arm, d: int) -> Iterator[Finding]:
    """What is protected by column, against the columns there are."""
    if isinstance(arm.channel, Selective):
        last = arm.channel.protected[-1][1]
        yield last > d, f"protected reaches to column {last}, an update has {d}", f"ranges up to {d}"
        yield (
            any(codec.width(d) != d for codec in arm.codecs.parts),
            f"{_names(arm.codecs.parts)} changes the number of columns, and columns are protected",
            "FixedPoint or no codec, or the channel inside for whole updates",
        )


def _codecs(arm: Arm) -> Iterator[Finding]:
    """What the codecs keep, against what the channel does with encoded rows."""
    channel, codecs, way = arm.channel, arm.codecs, type(arm.channel).__name__
    yield (
        channel.reveals < Reveals.EACH and not codecs.additive,
        f"{way} adds encoded rows, and decoding a sum of {_names(codecs.parts)} is not the sum of the decodings",
        "additive codecs, or Plaintext",
    )
    yield (
        channel.reveals is Reveals.GRAM and codecs.similarity is None,
        f"{way} reveals inner products of encoded rows, and {_names(codecs.parts)} does not keep them",
        "codecs that scale every length alike",
    )
    yield (
        channel.integers and not codecs.integers,
        f"{way} carries whole numbers, the last transform gives real ones",
        "a quantizing codec as the last transform: FixedPoint",
    )
    whole, modulus, most = codecs.largest_whole, channel.modulus, channel.most_summed
    largest = channel.largest_coordinate
    fits = largest is None or (whole is not None and whole <= largest)
    yield (
        channel.integers and codecs.integers and not fits,
        f"{way} carries whole numbers up to {largest or 0:g}, the codec gives up to {whole}",
        "a codec of fewer bits, or a channel of more",
    )
    summed = None if whole is None or most is None else most * whole
    wraps = modulus is not None and codecs.modulus is not None and modulus % codecs.modulus == 0
    yield (
        codecs.integers and modulus is not None and not wraps and (summed is None or 2 * summed >= modulus),
        f"{way} adds modulo {modulus}, and {most} rows of up to {whole} may leave it",
        "more modulus_bits, fewer bits in the codec, or fewer clients",
    )
    binding = [transform.binding for transform in arm.transforms]
    yield (
        binding != sorted(binding),
        f"a client step stands after a codec in {_names(arm.transforms)}",
        "client steps first, codecs last",
    )


def _rule(arm: Arm, population: int) -> Iterator[Finding]:
    """The rule, against the cohort it will meet."""
    rule = arm.rule
    size = arm.cohort.size if isinstance(arm.cohort, FixedSize) else 0
    yield (
        size > population,
        f"size={size}: the population has {population} clients",
        f"a cohort of at most {population}",
    )
    expected = int(arm.sampling.expected(population))
    rows = arm.channel.rows(expected)
    expected = expected if rows is None else rows
    message, _, way_out = rule.cohort_message(expected).partition("; ")
    yield (arm.plan is None and expected < rule.smallest_cohort, message, way_out)


def _root(arm: Arm, d: int, rooted: bool) -> Iterator[Finding]:
    """What the server must hold itself."""
    name = type(arm.rule).__name__
    yield (
        ROOT in arm.rule.init(d) and not rooted,
        f"{name} compares clients with the server's own update, and the server has no examples",
        "give the split `server` a share",
    )


def _adapters(arm: Arm) -> Iterator[Finding]:
    """What a geometry of products needs."""
    if arm.adapters is None:
        return
    yield (
        arm.channel.rows(1) is not None,
        f"products of factors need each client's own, rows of {type(arm.channel).__name__} are means of groups",
        "Plaintext, or leave adapters out",
    )
    yield (
        arm.channel.reveals < Reveals.EACH,
        f"products of factors need each update, {type(arm.channel).__name__} reveals only {arm.channel.reveals.name}",
        "Plaintext, or leave adapters out",
    )
    yield (
        arm.plan is not None and arm.plan.noises_the_sum,
        "the plan's clip bounds factors, not their products: what it releases would have no bounded sensitivity",
        "leave adapters out under a plan",
    )
    yield (
        arm.adapters.mode == "fedex" and arm.optimizer != Average(),
        f"fedex broadcasts the clients' mean factors, which {arm.optimizer} does not step to",
        "Average, or mode flexlora",
    )


def _weighting(arm: Arm) -> Iterator[Finding]:
    """Clients that do not count the same."""
    if arm.weighting == "equal":
        return
    yield (
        not arm.rule.weighted or (arm.folds and not isinstance(arm.rule, Mean)),
        f"{type(arm.rule).__name__} counts every update the same",
        "equal weighting, or a rule that takes weights (Mean, GeometricMedian, CenteredClipping, Median)",
    )
    yield (
        arm.channel.reveals is Reveals.GRAM or arm.channel.rows(1) is not None,
        f"over {type(arm.channel).__name__} nobody knows what share a row has in what the rule sees",
        "equal weighting, Plaintext, or Mean over a channel of sums, where clients multiply by their weights",
    )
    yield (
        arm.plan is not None and arm.plan.noises_the_sum,
        "under a plan a client with more weight has more sensitivity than the noise is made for",
        "equal weighting and the plan's weight_cap, which clients apply to clipped updates",
    )


def _plan(arm: Arm, d: int, population: int, examples: int, private_gradients: str) -> Iterator[Finding]:
    """What would make epsilon a lie."""
    plan = arm.plan
    if plan is None:
        return
    units = examples if plan.unit == "example" else population
    yield (
        plan.delta >= 1 / units,
        f"delta={plan.delta:g} >= 1/N = {1 / units:g} for {units:,} {plan.unit}s: publishing one of them whole would "
        "satisfy it",
        f"delta below {1 / units:g}, better {units**-1.1:.1g}",
    )
    yield (
        arm.cohort is not None and arm.cohort != arm.sampling,
        f"the plan draws clients by itself ({arm.sampling}), the cohort is {arm.cohort}",
        "leave the cohort out: the plan is accounted for its own sampling",
    )
    share = plan.sample_rate * population
    yield (
        plan.sampling == "fixed_size" and abs(share - round(share)) > 1e-6,
        f"sample_rate={plan.sample_rate:g} of {population} clients is no whole number, and the cohort has a fixed size",
        f"sample_rate={max(1, round(share)) / population:.4g}",
    )
    yield (
        plan.simulated_population is not None and plan.simulated_population < population,
        f"simulated_population={plan.simulated_population} is smaller than the {population} clients there are",
        "leave it out: it makes noise smaller than the run's own",
    )
    yield (
        plan.unit == "example" and bool(private_gradients),
        f"gradients of single examples are not to be had: {private_gradients}",
        "SGD or AdamW on a model without batch statistics",
    )
    if plan.unit == "client":
        yield from _few_clients(plan, d, population)
    if plan.noises_the_sum:
        yield from _sum(arm, plan, d, population)


FEWEST_CLIENTS = 10
"""Among fewer, noise that hides a whole client outweighs all of them together, whatever is tuned."""


def _few_clients(plan: DPPlan, d: int, population: int) -> Iterator[Finding]:
    """Whole clients cannot be hidden among a handful."""
    alone = 1.0 if plan.place == "local" else plan.sample_rate * population
    ratio = plan.noise_multiplier * sqrt(d) / alone  # |noise| = z C sqrt(d) on a sum of `alone` clips C
    yield (
        population < FEWEST_CLIENTS,
        f"{population} clients cannot hide one of them: the noise of each round is {ratio:.3g} times as long as the "
        "largest update that all of them together could make",
        "unit='example', which protects every example of a client (few large clients), or more clients",
    )


def _sum(arm: Arm, plan: DPPlan, d: int, population: int) -> Iterator[Finding]:
    """What noise needs that is made for a sum of clipped updates."""
    name, way, bound = type(arm.rule).__name__, type(arm.channel).__name__, plan.max_grad_norm
    yield (
        not isinstance(arm.rule, Mean),
        f"{name} under a {plan.place} plan has no bounded sensitivity",
        "Mean (the plan puts its noisy sum in the mean's place), place='local', or no plan",
    )
    yield (
        isinf(arm.codecs.norm_bound(bound, d)),
        f"{_names(arm.codecs.parts)} can lengthen a clipped update without bound",
        "codecs with a norm bound",
    )
    encodable = arm.codecs.largest_coordinate
    yield (
        plan.integers is None and encodable is not None and (plan.adaptive or bound > encodable),
        f"a clipped update may have a coordinate of {bound:g}, {_names(arm.codecs.parts)} refuses beyond {encodable}",
        "a codec bound of at least the clip: whether a client refuses would depend on its data",
    )
    yield (
        arm.channel.rows(1) is not None,
        f"the noise is made for one sum, and {way} reveals one a group",
        "the channel inside it, place='local', or no plan",
    )
    lengthened = bool(arm.codecs.parts)
    yield (
        plan.integers is None and lengthened and (plan.adaptive or plan.place == "key_holder"),
        f"{_names(arm.codecs.parts)} changes what is sent, and the noise is sized for the clip itself",
        "leave codecs out, or a central plan with one clip",
    )
    if plan.integers is not None:
        yield from _integers(arm, plan, plan.integers, d)
        return
    similarity = arm.codecs.similarity
    largest = arm.channel.largest_coordinate
    length = arm.codecs.norm_bound(bound, d) / similarity if similarity else inf  # on the wire
    whole = arm.codecs.largest_whole  # of a codec that refuses by itself what is longer
    yield (
        largest is not None and length > largest and (whole is None or whole > largest),
        f"a clipped update may have a coordinate of {length:g}, {way} refuses beyond {largest}",
        "a channel bound of at least the clip: whether a client refuses would depend on its data",
    )
    if isinstance(plan.clipping, AdaptiveQuantile):
        cohort = plan.sample_rate * population
        least, has = plan.noise_multiplier / 2, plan.clipping.counted(cohort)
        yield (
            has <= least,
            f"clipping counts short updates with noise of {has:g} clients, and half the noise multiplier is {least:g}: "
            "counting would cost the whole budget",
            f"count_deviation above {least:g}, or a larger cohort",
        )
    yield (
        plan.adaptive and largest is not None,
        f"the clip moves, and {way} refuses coordinates beyond {largest}: whether a client refuses depends on its data",
        "Plaintext, or one clip",
    )
    yield (
        plan.place == "key_holder" and not arm.channel.noises,
        f"{way} has no key holder that could add the noise",
        "CKKS, or place='central'",
    )
    yield (
        plan.bands > 1 and arm.alternate,
        "noise that is correlated between rounds covers what is trained, and factors take turns",
        "one of them",
    )


def _integers(arm: Arm, plan: DPPlan, integers: IntegerNoise, d: int) -> Iterator[Finding]:
    """What distributed noise needs of the channel and of its grid."""
    way = type(arm.channel).__name__
    yield (
        arm.channel.reveals is not Reveals.SUM,
        f"{way} reveals {arm.channel.reveals.name}: each client adds only a share of the noise",
        "a channel that reveals the sum alone, such as PairwiseMasks",
    )
    yield from integers.problems(plan.noise_multiplier, d, arm.channel)


def _alternation(arm: Arm) -> Iterator[Finding]:
    """What factors that take turns need."""
    yield (
        arm.alternate and arm.adapters is not None,
        f"factors take turns, and {arm.adapters} gives both of them anew every round",
        "leave one of them out",
    )


def _attack(arm: Arm) -> Iterator[Finding]:
    """The attack, against who carries it out."""
    yield (
        arm.attack is not None and not arm.malicious,
        f"{arm.attack} has nobody to carry it out",
        "name malicious clients, or leave the attack out",
    )
    yield (
        arm.attack is None and bool(arm.malicious),
        f"{len(arm.malicious)} malicious clients have no attack",
        "name an attack, or leave the malicious clients out",
    )


def _audit(arm: Arm, population: int) -> Iterator[Finding]:
    """What canaries need."""
    if arm.audit is None:
        return
    canaries, plans = arm.audit.canaries, [plan for plan in (arm.plan, arm.audit.claimed) if plan is not None]
    name = type(canaries).__name__
    yield (
        arm.server_attack is not None,
        f"{name} are clients more, and {type(arm.server_attack).__name__} is scored with the clients there are",
        "leave one of them out",
    )
    yield (
        any(plan.simulated_population is not None for plan in plans),
        "simulated_population gives the run less noise than its epsilon is claimed for, and the audit would say so",
        "leave one of them out",
    )
    share = canaries.count * arm.sampling.expected(population) / population
    yield (
        any(plan.sampling == "fixed_size" for plan in plans) and abs(share - round(share)) > 1e-6,
        f"a sample_rate of {arm.sampling.expected(population) / population:g} of {canaries.count} canaries is no whole "
        "number, and the cohort has a fixed size",
        "another number of canaries",
    )
    if not canaries.trained:
        yield from _rows_of_canaries(arm, plans, name)


def _rows_of_canaries(arm: Arm, plans: Sequence[DPPlan], name: str) -> Iterator[Finding]:
    """What those need that send rows of their own; the others are clients like any."""
    fits = [plan.noises_the_sum and plan.place != "distributed" for plan in plans]
    if arm.plan is None or not all(fits):
        place = "no plan" if arm.plan is None else " and ".join(f"place={p.place!r}, unit={p.unit!r}" for p in plans)
        yield (
            True,
            f"{name} are read off a sum to which noise is added for whole clients, and there is {place}",
            "a central plan for clients, or canaries that train on examples (MislabelledCanaries)",
        )
        return
    yield (
        any(plan.clipping is not None and not isinstance(plan.clipping, Flat) for plan in plans),
        f"{name} are sized for one clip of the whole row, and {arm.plan.clipping} has others",
        "Flat clipping",
    )
    yield (
        any(plan.bands > 1 for plan in plans),
        f"{name} are read off each round by itself, and bands={arm.plan.bands} correlates their noise",
        "bands=1, or canaries that train on examples",
    )
    yield (
        arm.alternate and arm.ghosts == 0,
        f"{name} fill the whole model, and factors take turns: half of each would be cut off",
        "GhostCanaries",
    )


def _names(parts: tuple[object, ...]) -> str:
    return ", ".join(type(part).__name__ for part in parts) or "no codec"


@final
@dataclass(frozen=True)
class Combination:
    """One row of the compatibility table.

    Attributes:
      rule: class name.
      channel: class name.
      plan: under a central plan or not.
      refused: why not; empty when it runs.
    """

    rule: str
    channel: str
    plan: bool
    refused: str


def table(rules: list[Rule], channels: list[Channel]) -> list[Combination]:
    """What goes with what: each rule over each channel, with and without a plan."""
    population, d = 1000, 1000
    plan = DPPlan(noise_multiplier=1.0, max_grad_norm=1.0, sample_rate=0.1, delta=1e-4)
    rows = []
    for rule in rules:
        for channel in channels:
            for own in (None, plan):
                codec = (FixedPoint(1.0, 16),) if channel.integers else ()
                cohort = None if own else Poisson(0.1)
                arm = Arm(cohort=cohort, rule=rule, channel=channel, transforms=codec, plan=own)
                refused = "; ".join(problem.what for problem in problems(arm, d, population))
                rows.append(Combination(type(rule).__name__, type(channel).__name__, own is not None, refused))
    return rows
