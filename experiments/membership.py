"""Who can be told to have been trained on, by whom, after how many rounds, and what does each epsilon leave of it?

MiniLM with LoRA learns which library a sentence of documentation comes from, at ten clients. Of 1,000 sentences half
are dealt to the clients, the other half (the `holdout` split: the same labels in the same shares, drawn by the same
shuffle) are trained on by nobody. Attacks are asked which half a sentence is in.

    released model    the model after a round, and shadow adapters that the attacker trains on halves of the candidates
    server            every client's update of the rounds it looks at
    fellow client     every released model, and what is left of the others' sum once its own update is taken out

Before any attack a baseline without any model tries the same; if it succeeds, the split is unfair and all is void.

Epsilon is that of examples, and clients add the noise (unit="example", place="local"): the guarantee is about what is
asked here, and it holds against the server too.

    python -m experiments.membership
    python -m experiments.membership --seeds "[0,1]" --out runs/membership-2
    python -m experiments.membership --epsilons "[Infinity]" --shadows 16
    python -m experiments.membership --fast

Writes `report.html`, `judgements.jsonl` (one line an attack, run and number of rounds seen), `judgements.csv`,
`tables.md` and `env.json`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from math import inf, isinf, sqrt
from pathlib import Path
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor

from privfm.attacks.membership.across_rounds import FedMIA, Temporal, UpdateTraces
from privfm.attacks.membership.blind import Blind, blind_texts
from privfm.attacks.membership.halves import halves
from privfm.attacks.membership.lira import LiRA
from privfm.attacks.membership.membership_server import STRANGER
from privfm.attacks.membership.quantile import QuantileRegression
from privfm.attacks.membership.reference import CalibratedByBase, CalibratedByReference, Threshold
from privfm.attacks.membership.rmia import RMIA, tuned_offset
from privfm.attacks.membership.signals import label_log_odds, label_log_probability
from privfm.attacks.membership.updates import as_gradient, fellow_client_update, products
from privfm.checks import at_least, require
from privfm.cli import command
from privfm.contracts import LocalSteps, ServerAttack, Split, WireView
from privfm.contracts.membership import Array, Flags, MembershipAttack, Scored, Signals
from privfm.defenses import DPPlan, LocalSampling
from privfm.engines import Local
from privfm.federation import Arm, Federation, FixedSize, Population, rounds
from privfm.learning import (
    SGD,
    Docstrings,
    LoRA,
    ModelLearner,
    Schedule,
    SequenceClassification,
    SequenceClassifier,
    SplitShares,
    Workbench,
    split,
)
from privfm.learning.per_example import per_example_gradients
from privfm.learning.shadows import drawn_anew, logits_of, train_shadows
from privfm.randomness import Purpose, Seeds
from privfm.reporting import describe_environment, show
from privfm.reporting.figures import FigureBlock
from privfm.reporting.formats import small_number
from privfm.reporting.membership_cases import Case, area_table, case_table, judged, write_judgements
from privfm.reporting.membership_figures import membership_roc, roc_line
from privfm.reporting.membership_page import AreaLine, areas_by_rounds, write_membership
from privfm.reporting.table import ReportTable

QUESTION = "Who can be told to have been trained on, by whom, and what does each epsilon leave of it?"
DELTA = 1e-5  # below one over the members there are
RATE, PRIVATE_RATE = 0.1, 0.3  # learning rates without and with noise, chosen on seed 100
CLIP = 1.0  # bound of an example's gradient
BATCH = 16  # examples of a step, with and without noise
FELLOW = 0  # the client that attacks the others
HEADS = 4  # fresh heads on the base model: six logits each, a projection of its sentence vector
BLOCK = 128  # candidates whose gradients are held at once
LEAST_OTHERS = 20  # non-members of a curve

RELEASED, SERVER, CLIENT = "released model", "server", "fellow client"
POOL, CONTROL = "shadow pool", "control"
WHOSE = ", whose"  # ends the title of an attack that is asked about one client
DRAWN = ("loss", "LiRA, online", "RMIA, offline", "quantile regression", "cosine", "FedMIA")  # in the figures

NOTES = (
    "Released model: shadow adapters begin where everybody began, and take as many steps of the same size as the "
    "clients did until the round that is attacked, on random halves of the candidates, all data in one place. Under a "
    "plan they clip the same way and draw the noise that the mean over the clients had. An attacker who played a whole "
    "federation for each shadow would be nearer to the target.",
    "The base model is the model before the first round, with the head that everybody began with.",
    "Server: scores of single clients' updates, averaged over the rounds it looks at, and of all clients the largest: "
    "did anybody train on it? Whose: did this client? There, other clients' examples count as non-members. A server "
    "can also run every attack on the released model.",
    "Fellow client: client 0, whose own examples are left out. Temporal attacks need no update: anybody who keeps "
    "the released models can run them.",
    "Only the last round of the run without noise is attacked with the larger number of shadow models: LiRA then takes "
    "a variance of each example's own, and elsewhere one for all.",
    "Attacks' settings are their defaults, the offset of RMIA is tuned on the shadow models. Which attack is the "
    "strongest is read off the same scores: the largest of several values is too large by a little.",
    "Control: scores of LiRA against memberships that were drawn anew, which nobody can know.",
)


# ---------------------------------------------------------------------------------------------------------- the setting


@final
@dataclass(frozen=True)
class Setting:
    """What is played and how strongly it is attacked.

    Attributes:
      candidates: sentences that are asked about, half of them members.
      population: that no model is trained on and the attacker has.
      tested: on which accuracy is measured.
      clients: that share the members equally.
      seen: rounds after which attacks are run; the last one ends the run.
      look_every: rounds between those at which server and fellow client take gradients, beside the first and `seen`.
      local_steps: of a client in a round.
      shadows: models of the attacker, even, for the last round of a run without noise.
      few_shadows: for every other attacked model.
      layers: blocks with adapters.
      resamples: behind each interval.
    """

    candidates: int = 1000
    population: int = 500
    tested: int = 500
    clients: int = 10
    seen: tuple[int, ...] = (1, 5, 10, 20)
    look_every: int = 5
    local_steps: int = 6
    shadows: int = 64
    few_shadows: int = 16
    layers: tuple[int, ...] = (4, 5)
    resamples: int = 1000

    def __post_init__(self) -> None:
        at_least("clients", self.clients, 3)  # two others, with whom one is compared
        at_least("look_every", self.look_every, 1)
        at_least("local_steps", self.local_steps, 1)
        whole = self.candidates > 0 and self.candidates % (2 * self.clients) == 0
        require(whole, f"candidates={self.candidates}: expected a multiple of {2 * self.clients}, half for the clients")
        rising = len(self.seen) > 0 and list(self.seen) == sorted(set(self.seen)) and self.seen[0] >= 1
        require(rising, f"seen={self.seen}: expected rising numbers of rounds from 1")
        for name in ("shadows", "few_shadows"):
            count = getattr(self, name)
            require(count >= 4 and count % 2 == 0, f"{name}={count}: expected an even number from 4")

    @property
    def local(self) -> LocalSampling:
        """What a plan accounts for."""
        return LocalSampling(BATCH, self.local_steps)

    @property
    def held(self) -> int:
        """Members that each client holds."""
        return self.candidates // (2 * self.clients)

    @property
    def looked(self) -> tuple[int, ...]:
        """Rounds, from 1, whose updates are scored."""
        return tuple(r for r in range(1, self.seen[-1] + 1) if r == 1 or r % self.look_every == 0 or r in self.seen)


SMALL = Setting(60, 200, 60, 3, (1, 2), 1, local_steps=10, shadows=6, few_shadows=4, layers=(5,), resamples=100)
"""Shows that everything runs; its numbers mean nothing."""


@final
@dataclass(frozen=True, eq=False)
class Scene:
    """One seed's draw.

    Attributes:
      setting, seed: of it.
      bench: model and all sentences.
      candidates: `(n,)` places of those that are asked about.
      owners: `(n,)`, the client that trains on each, or `STRANGER`.
      population: places of those that nobody trains on and the attacker has.
      tested: places of those that accuracy is measured on.
      texts: of the candidates.
    """

    setting: Setting
    seed: int
    bench: Workbench
    candidates: Tensor
    owners: NDArray[np.int64]
    population: Tensor
    tested: Tensor
    texts: tuple[str, ...]

    @property
    def members(self) -> Flags:
        """The truth, `(n,)`."""
        found: Flags = self.owners != STRANGER
        return found

    def numpy(self, purpose: Purpose, *path: int) -> np.random.Generator:
        """A generator of the seed tree."""
        return np.random.default_rng(Seeds(self.seed).generator(purpose, *path).initial_seed())


def scene_of(setting: Setting, seed: int, device: str = "cpu") -> Scene:
    """Deals sentences to members, strangers, population and test, and members to clients."""
    half = setting.candidates // 2
    total = 2 * half + setting.population + setting.tested
    table = Docstrings(limit=total).load()
    shares = SplitShares(setting.tested / total, 0.0, setting.population / total, half / total)
    seeds = Seeds(seed)
    dealt = split(table, shares, seeds.generator("split"))
    members, strangers = dealt["clients"], dealt["holdout"]
    order = members[torch.randperm(len(members), generator=seeds.generator("partition"))]
    owner = {row: client for client, rows in enumerate(order.chunk(setting.clients)) for row in rows.tolist()}
    candidates = torch.cat([members, strangers]).sort().values
    source = SequenceClassifier("minilm", adapter=LoRA(rank=8, alpha=16.0, layers=setting.layers), max_length=32)
    built = source.build(table.label_names, seeds.generator("initialisation"))
    return Scene(
        setting,
        seed,
        Workbench(built, SequenceClassification(), table, device),
        candidates,
        np.array([owner.get(row, STRANGER) for row in candidates.tolist()], dtype=np.int64),
        dealt["server"],
        dealt["validation"],
        tuple(str(table.inputs[row]) for row in candidates.tolist()),
    )


def blind_of(scene: Scene) -> Blind:
    """Whether members can be told without any model."""
    lengths = scene.bench.everything.inputs["attention_mask"][scene.candidates].sum(1).tolist()
    return blind_texts(scene.texts, scene.members, scene.numpy("attack", 0), lengths)


# ------------------------------------------------------------------------------------------------------------- the runs


@final
@dataclass(frozen=True)
class Protection:
    """One arm.

    Attributes:
      title: for readers.
      epsilon: of examples after the last round; infinite: no noise and no clip.
    """

    epsilon: float

    @property
    def title(self) -> str:
        return "no protection" if isinf(self.epsilon) else f"epsilon {small_number(self.epsilon)}"

    def plan(self, setting: Setting) -> DPPlan | None:
        """Every client clips its examples' gradients and adds the noise itself, in every round."""
        if isinf(self.epsilon):
            return None
        bare = DPPlan(0.0, CLIP, 1.0, DELTA, unit="example", place="local", sampling="full", local=setting.local)
        return bare.with_epsilon(self.epsilon, setting.seen[-1], [setting.held])


class Kept(ServerAttack):
    """Keeps what the server received last, and the model it had sent."""

    wire: WireView
    model: Tensor

    def look(self, wire: WireView, model: Tensor, now: int) -> dict[str, float]:
        self.wire, self.model = wire, model
        return {}


@final
@dataclass(frozen=True, eq=False)
class Played:
    """One run, as its attackers see it.

    Attributes:
      models: `(rounds, d)`, released after each round.
      cosines, differences: of the looked-at rounds, by client and candidate.
      fellow: `(looked, n)`, cosines with the others' sum.
      accuracy: in the end, on sentences of nobody, and on members.
    """

    models: Tensor
    cosines: Array
    differences: Array
    fellow: Array
    accuracy: tuple[float, float]


def learner_of(scene: Scene, plan: DPPlan | None) -> ModelLearner:
    """Clients that take as many steps with and without a plan."""
    training = SGD(rate_of(plan), Schedule(batch_size=BATCH, steps=scene.setting.local_steps))
    splits: dict[Split, Tensor] = {
        "validation": scene.tested,
        "clients": scene.candidates[torch.from_numpy(scene.members)],
    }
    return ModelLearner(scene.bench, splits, training, engine="batched")


def rate_of(plan: DPPlan | None) -> float:
    """Learning rate; clipped gradients are short."""
    return RATE if plan is None else PRIVATE_RATE


def federation_of(scene: Scene, plan: DPPlan | None, server: ServerAttack | None = None) -> Federation:
    """The arm, with everybody in every round."""
    clients = scene.setting.clients
    own = [scene.candidates[torch.from_numpy(scene.owners == client)] for client in range(clients)]
    arm = Arm(FixedSize(clients) if plan is None else None, plan=plan, server_attack=server)
    population = Population.of(scene.bench.everything, own)
    return Federation(arm, learner_of(scene, plan), population, Seeds(scene.seed), Local(1))


def played(scene: Scene, plan: DPPlan | None) -> Played:
    """Plays the federation, and scores the updates of the rounds that are looked at."""
    setting, kept = scene.setting, Kept()
    federation = federation_of(scene, plan, kept)
    change = LocalSteps(rate_of(plan), setting.local_steps, batch_size=BATCH)
    cosines, differences = (UpdateTraces(setting.clients, setting.candidates) for _ in range(2))
    models, fellow = [], []
    for step in rounds(federation, setting.seen[-1], evaluate_every=setting.seen[-1]):
        models.append(step.state.model)
        if step.state.round not in setting.looked:
            continue
        rows, ids = kept.wire.rows, kept.wire.ids
        require(rows is not None, "the server saw no single update: expected a channel that reveals them")
        assert rows is not None  # just checked
        others = fellow_client_update(kept.model, step.state.model, rows[ids.index(FELLOW)], setting.clients)
        asked = torch.cat([as_gradient(rows, change), -others[None]])
        found = products(asked, gradients(scene, kept.model))
        cosines.add(ids, found.cosine[:-1])
        differences.add(ids, found.difference(1 / setting.held)[:-1])
        fellow.append(found.cosine[-1])
    accuracies = [federation.learner.evaluate(models[-1], name)["accuracy"].value for name in ("validation", "clients")]
    return Played(
        torch.stack(models), cosines.scores, differences.scores, np.stack(fellow), (accuracies[0], accuracies[1])
    )


def gradients(scene: Scene, model: Tensor) -> Iterator[Tensor]:
    """Of every candidate at a model, `(k, d)` at a time."""
    bench = scene.bench
    bench.load(model)
    for rows in torch.split(scene.candidates, BLOCK):
        examples = bench.everything.take(rows)
        yield per_example_gradients(bench.module, bench.parameters, bench.losses, examples, bench.layout)


# ---------------------------------------------------------------------------------------------------------- the signals


@final
@dataclass(frozen=True)
class Said:
    """What models say of the candidates and of the population.

    Attributes:
      odds: log-odds of the label, for LiRA.
      logs: log-probabilities of the label, for the loss and RMIA.
    """

    odds: Signals
    logs: Signals

    def take(self, models: list[int]) -> Said:
        """Some of the models."""
        return Said(self.odds.take(models), self.logs.take(models))


def said(scene: Scene, models: Tensor, inside: Flags) -> Said:
    """Asks models `(m, d)`, each trained on its row of `inside`."""
    rows = torch.cat([scene.candidates, scene.population])
    examples = scene.bench.everything.take(rows)
    logits, labels = logits_of(scene.bench, models, examples).numpy(), examples.labels.numpy()
    n = len(scene.candidates)
    odds, logs = label_log_odds(logits, labels), label_log_probability(logits, labels)
    return Said(*(Signals(values[:, :n], inside, values[:, n:]) for values in (odds, logs)))


def shadows_of(scene: Scene, plan: DPPlan | None, played_rounds: int) -> Said:
    """What models trained by the attacker say, each on a random half of the candidates, for as many steps.

    The noise of one step is that of the mean over the clients: `1 / sqrt(clients)` of a single one's.
    """
    setting = scene.setting
    many = plan is None and played_rounds == setting.seen[-1]
    count = setting.shadows if many else setting.few_shadows
    inside = halves(count, setting.candidates, scene.numpy("shadows", count))
    steps = played_rounds * setting.local_steps
    privacy = None
    if plan is not None:
        noise = plan.noise_multiplier / sqrt(setting.clients)
        central = replace(plan, noise_multiplier=noise, local=LocalSampling(BATCH, steps))
        privacy = central.gradient_privacy(learner_of(scene, plan).layers)
    trained = train_shadows(
        scene.bench,
        SGD(rate_of(plan), Schedule(batch_size=BATCH, steps=steps)),
        inside,
        scene.bench.everything.take(scene.candidates),
        [Seeds(scene.seed).generator("shadows", count, number) for number in range(count)],
        privacy=privacy,
    )
    return said(scene, trained.models, inside)


def features_of(scene: Scene) -> tuple[Array, Array]:
    """Of candidates and population, what needs neither target nor shadows: label, length, and the base's sentence."""
    rows = torch.cat([scene.candidates, scene.population])
    examples = scene.bench.everything.take(rows)
    fresh = drawn_anew(scene.bench, [Seeds(scene.seed).generator("attack", 1, head) for head in range(HEADS)])
    read = logits_of(scene.bench, fresh, examples).permute(1, 0, 2).flatten(1).double()
    length = examples.inputs["attention_mask"].sum(1, keepdim=True).double()
    label = torch.nn.functional.one_hot(examples.labels, len(scene.bench.label_names)).double()
    found: Array = torch.cat([read, length, label], 1).numpy()
    return found[: len(scene.candidates)], found[len(scene.candidates) :]


# ---------------------------------------------------------------------------------------------------------- the attacks


@final
@dataclass(frozen=True, eq=False)
class Known:
    """What the attacker of a released model has beside it.

    Attributes:
      shadows, base: what its own models and the base model say.
      features: of candidates and of population.
    """

    shadows: Said
    base: Said
    features: tuple[Array, Array]


def model_attacks(known: Known) -> list[tuple[str, MembershipAttack, str]]:
    """Title, attack, and which signal it takes."""
    offset = tuned_offset(known.shadows.logs)
    return [
        ("loss", Threshold(), "logs"),
        ("loss less the base model's", CalibratedByBase(known.base.logs.values[0]), "logs"),
        ("log-odds less the shadows'", CalibratedByReference(), "odds"),
        ("LiRA, offline", LiRA("offline"), "odds"),
        ("LiRA, online", LiRA("online"), "odds"),
        ("RMIA, offline", RMIA("offline", offset), "logs"),
        ("RMIA, online", RMIA("online"), "logs"),
        ("quantile regression", QuantileRegression().on(*known.features), "odds"),
    ]


def on_released(scene: Scene, run: Protection, seen: int, target: Said, known: Known) -> Iterator[Case]:
    """Attacks on one released model."""
    shadows = known.shadows
    for title, attack, signal in model_attacks(known):
        one, many = getattr(target, signal), getattr(shadows, signal)
        case = Case(run.title, seen, RELEASED, title, attack.used, None, attack.refusal(one, many))
        yield case if case.refused else replace(case, scored=Scored(attack(one, many), scene.members))
    if seen == scene.setting.seen[-1]:
        lira = LiRA("online")
        drawn = scene.numpy("attack", 2).permutation(scene.members)
        yield Case(
            run.title, seen, CONTROL, "LiRA, online; memberships drawn anew", lira.used,
            Scored(lira(target.odds, shadows.odds), drawn),
        )  # fmt: skip


def by_server(scene: Scene, run: Protection, seen: int, found: Played) -> Iterator[Case]:
    """Attacks on the updates of single clients, over the rounds looked at so far."""
    so_far = sum(now <= seen for now in scene.setting.looked)
    cosines, differences = found.cosines[:so_far], found.differences[:so_far]
    rows = ("every client's update", "gradients of the candidates")
    known = (*rows, "examples a client", "learning rate and steps")
    yield Case(run.title, seen, SERVER, "cosine", rows, Scored(cosines.mean(0).max(0), scene.members))
    yield Case(run.title, seen, SERVER, "difference", known, Scored(differences.mean(0).max(0), scene.members))
    clients = range(scene.setting.clients)
    for title, attack in (("FedMIA", FedMIA()), ("FedMIA, logarithms", FedMIA(combine="log"))):
        scores = np.stack([attack(cosines, client) for client in clients])
        used = (*attack.used, "gradients of the candidates")
        yield Case(run.title, seen, SERVER, title, used, Scored(scores.max(0), scene.members))
        if attack.combine == "plain":
            whose = scene.owners == np.arange(len(clients))[:, None]
            yield Case(run.title, seen, SERVER, f"{title}{WHOSE}", used, Scored(scores, whose))


def by_fellow(scene: Scene, run: Protection, seen: int, found: Played, logs: Array) -> Iterator[Case]:
    """Attacks of one client on what the others hold; `logs` `(rounds, n)` is what all released models say."""
    asked = scene.owners != FELLOW
    members = scene.members[asked]
    so_far = sum(now <= seen for now in scene.setting.looked)
    used = ("released models before and after a round", "its own update", "gradients of the candidates")
    fellow = found.fellow[:so_far].mean(0)[asked]
    yield Case(run.title, seen, CLIENT, "cosine with the others' sum", used, Scored(fellow, members))
    for summary in ("mean", "slope"):
        attack = Temporal(summary)
        if summary == "slope" and seen < 2:
            yield Case(run.title, seen, CLIENT, f"loss over time, {summary}", attack.used, None, "needs two rounds")
            continue
        scores = attack(logs[:seen, asked])
        yield Case(run.title, seen, CLIENT, f"loss over time, {summary}", attack.used, Scored(scores, members))


def on_shadows(run: Protection, seen: int, shadows: Said) -> Iterator[Case]:
    """Every shadow model attacked by the others: many targets under one threshold, for low false-positive rates."""
    attacks: tuple[tuple[str, MembershipAttack, Signals], ...] = (
        ("loss", Threshold(), shadows.logs),
        ("LiRA, offline", LiRA("offline"), shadows.odds),
        ("LiRA, online", LiRA("online"), shadows.odds),
        ("RMIA, online", RMIA("online"), shadows.logs),
    )
    for title, attack, signals in attacks:
        refused = attack.refusal(signals.take([0]), signals.without(0))
        scored = None if refused else attack.pooled(signals)
        yield Case(run.title, seen, POOL, title, attack.used, scored, refused)


def attacked(scene: Scene, run: Protection, tell: Callable[[str], None]) -> tuple[list[Case], tuple[float, float]]:
    """One run and all attacks on it; cases, and accuracies on sentences of nobody and on members."""
    plan, setting = run.plan(scene.setting), scene.setting
    found = played(scene, plan)
    tell(f"{run.title}: played, accuracy {found.accuracy[0]:.3f}, on members {found.accuracy[1]:.3f}")
    inside = np.tile(scene.members, (len(found.models), 1))
    target = said(scene, found.models, inside)
    base = said(scene, scene.bench.initial[None], np.zeros_like(inside[:1]))
    features, cases = features_of(scene), list[Case]()
    for seen in setting.seen:
        shadows = shadows_of(scene, plan, seen)
        tell(f"{run.title}: {len(shadows.odds)} shadows of {seen} rounds")
        one = target.take([seen - 1])
        cases += on_released(scene, run, seen, one, Known(shadows, base, features))
        cases += by_server(scene, run, seen, found)
        cases += by_fellow(scene, run, seen, found, target.logs.values)
        if plan is None and seen == setting.seen[-1]:
            cases += on_shadows(run, seen, shadows)
    return cases, found.accuracy


# ----------------------------------------------------------------------------------------------------------- the tables


def tables_of(found: Sequence[Case], runs: Sequence[Protection], last: int) -> list[ReportTable]:
    """One a run after the last round, the areas by rounds, and the pool of shadows."""
    asked = [case for case in found if case.adversary != POOL]
    tables = list[ReportTable]()
    for run in runs:
        own = [case for case in asked if (case.run, case.rounds) == (run.title, last)]
        own.sort(key=lambda case: case.adversary == CONTROL)  # below the attacks
        tables.append(case_table(own, f"{run.title.capitalize()}, after {last} rounds", notes=not tables))
    tables.append(area_table([case for case in asked if case.adversary != CONTROL]))
    pool = [case for case in found if case.adversary == POOL]
    if pool:
        tables.append(case_table(pool, "Shadow models, each attacked by the others (no protection)", notes=False))
    return tables


def answers_of(
    found: Sequence[Case], runs: Sequence[Protection], accuracies: Mapping[str, list[tuple[float, float]]], last: int
) -> list[tuple[str, str]]:
    """The strongest attack of every adversary on every run, in words."""
    answers = []
    for run in runs:
        parts = []
        for adversary in (RELEASED, SERVER, CLIENT):
            own = [one for one in found if one.key[:3] == (run.title, last, adversary)]
            own = [one for one in own if not one.attack.endswith(WHOSE)]  # another question
            best = max(own, key=lambda one: one.judgement.auc.value if one.judgement else -inf)
            if best.judgement is not None:
                area = best.judgement.auc
                parts.append(f"{adversary}: {best.attack}, AUC {area.value:.3f} [{area.low:.3f}, {area.high:.3f}]")
        outside, own_accuracy = np.mean(accuracies[run.title], axis=0)
        shown = f"Accuracy {100 * outside:.1f} % on sentences of nobody, {100 * own_accuracy:.1f} % on members."
        answers.append((f"Strongest on {run.title}", f"{'; '.join(parts)}. {shown}"))
    return answers


def figures_of(
    found: Sequence[Case], runs: Sequence[Protection], last: int, generator: np.random.Generator
) -> list[FigureBlock]:
    """ROC curves of each run, of the pool of shadows, and the areas by rounds."""
    figures, panels = [], dict[str, list[AreaLine]]()
    for place, run in enumerate(runs):
        own = [one for one in found if one.run == run.title and one.adversary in {RELEASED, SERVER}]
        drawn = [one for one in own if one.attack in DRAWN]
        figures.append(_curves([one for one in drawn if one.rounds == last], f"roc{place}", run.title, generator))
        panels[run.title] = [
            AreaLine(
                title,
                {one.rounds: one.judgement.auc for one in drawn if one.attack == title and one.judgement},
                number,
            )
            for number, title in enumerate(DRAWN)
        ]
    pool = [one for one in found if one.adversary == POOL]
    if pool:
        figures.append(_curves(pool, "pool", "shadow models, each attacked by the others", generator))
    return [areas_by_rounds(panels), *figures]


def _curves(own: Sequence[Case], name: str, subtitle: str, generator: np.random.Generator) -> FigureBlock:
    resamples = max((case.judgement.resamples for case in own if case.judgement), default=0)
    lines = [
        roc_line(case.attack, case.scored, generator, resamples)
        for case in own
        if case.scored is not None and int((~case.scored.members).sum()) >= LEAST_OTHERS
    ]
    figure = membership_roc(lines, name, subtitle)
    return replace(figure, title=f"ROC: {subtitle}")


# ------------------------------------------------------------------------------------------------------- the experiment


def main(
    *,
    epsilons: tuple[float, ...] = (inf, 8.0, 2.0),
    seen: tuple[int, ...] = (1, 5, 10, 20),
    candidates: int = 1000,
    clients: int = 10,
    shadows: int = 64,
    few_shadows: int = 16,
    look_every: int = 5,
    seeds: tuple[int, ...] = (0,),
    device: str = "cpu",
    out: Path = Path("runs/membership"),
    fast: bool = False,
) -> None:
    """Plays the runs, attacks them, and writes tables, figures and the page.

    Args:
      epsilons: of examples after the last round; `inf` for no protection at all.
      seen: rounds after which attacks are run; the last one ends the run.
      candidates: sentences that are asked about, half of them dealt to the clients.
      clients: of the federation.
      shadows: models of the attacker for the last round of a run without noise.
      few_shadows: the same for every other attacked model.
      look_every: rounds between those whose updates are scored, beside the first and `seen`.
      seeds: roots of the seed trees; scores of all seeds are judged together.
      device: where the model runs.
      out: folder.
      fast: a small version that shows that everything runs; its numbers mean nothing.
    """
    setting = Setting(
        candidates, clients=clients, seen=seen, look_every=look_every, shadows=shadows, few_shadows=few_shadows
    )
    if fast:
        setting, epsilons, seeds = SMALL, epsilons[:2], seeds[:1]
    require(len(epsilons) > 0 and len(seeds) > 0, "epsilons and seeds: expected at least one of each")
    require(len(set(epsilons)) == len(epsilons), f"epsilons={epsilons}: one is there twice")
    runs, console = [Protection(epsilon) for epsilon in epsilons], Console()
    for run in runs:
        run.plan(setting)  # refused before any work
    cases, blinds = list[Case](), list[Blind]()
    accuracies: dict[str, list[tuple[float, float]]] = {run.title: [] for run in runs}
    for seed in seeds:
        scene = scene_of(setting, seed, device)
        blinds.append(blind_of(scene))
        console.print(f"seed {seed}: {blinds[-1].sentence}", highlight=False)
        for run in runs:
            new, accuracy = attacked(scene, run, lambda line: console.print(line, highlight=False))
            cases += new
            accuracies[run.title].append(accuracy)
    generator = np.random.default_rng(Seeds(seeds[0]).generator("evaluation").initial_seed())
    found, last = judged(cases, generator, setting.resamples), setting.seen[-1]
    fair = all(blind.fair for blind in blinds)
    tables = tables_of(found, runs, last)
    tables = tables if fair else [replace(table, title=f"{table.title} (void: unfair split)") for table in tables]
    write_judgements(out, found, blinds)
    (out / "env.json").write_text(json.dumps(describe_environment(device), indent=1))
    (out / "tables.md").write_text("\n".join(f"## {table.title}\n\n{table.markdown()}" for table in tables))
    conditions = {
        "Command": f"python -m experiments.membership --epsilons {_listed(epsilons)} --seen {_listed(setting.seen)} "
        f"--candidates {setting.candidates} --clients {setting.clients} --shadows {setting.shadows} --few_shadows "
        f"{setting.few_shadows} --look_every {setting.look_every} --seeds {_listed(seeds)} --device {device}"
        + (" --fast" if fast else ""),
        "Date": datetime.now(UTC).date().isoformat(),
        "Clients": f"{setting.clients} with {setting.held} sentences each; every round "
        f"{setting.local_steps} steps of {BATCH} at learning rate {RATE:g} ({PRIVATE_RATE:g} with noise); LoRA "
        f"of rank 8 on blocks {', '.join(map(str, setting.layers))} and the head",
        "Noise": f"of examples, delta {DELTA:g}, clip {CLIP:g}, added by each client"
        + "".join(_noise(run, setting) for run in runs),
        "Attacker": f"{setting.population} sentences that no model was trained on; {setting.shadows} shadow models "
        f"for the last round without noise, {setting.few_shadows} for every other attacked model; updates "
        f"of rounds {', '.join(map(str, setting.looked))}",
        "Packages": ", ".join(f"{name} {version}" for name, version in describe_environment()["versions"].items()),
    }
    verdicts = [("Is the split fair?", " ".join(blind.sentence for blind in blinds))]
    void = "" if fair else "The split is unfair: every score on this page is void."
    page = write_membership(
        out, QUESTION, [*verdicts, *answers_of(found, runs, accuracies, last)], tables,
        figures_of(found, runs, last, generator), void=void, notes=NOTES, conditions=conditions,
    )  # fmt: skip
    show(tables, console)
    if void:
        console.print(void, highlight=False)
    console.print(f"written: {page}", soft_wrap=True)


def _listed(values: Sequence[float]) -> str:
    """As the command line takes them."""
    return '"[' + ",".join("Infinity" if isinf(value) else f"{value:g}" for value in values) + ']"'


def _noise(run: Protection, setting: Setting) -> str:
    plan = run.plan(setting)
    return "" if plan is None else f"; {run.title}: multiplier {plan.noise_multiplier:.3g}"


if __name__ == "__main__":
    command(main)
