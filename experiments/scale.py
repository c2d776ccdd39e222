"""How far does one process go: memory and time of a round by cohort, population and width of the model.

Every point is one round of `federation.play`, with everything that belongs to it: clients are drawn from the
population, their examples made when they are asked, a network trained on them by `ModelLearner`, its update clipped,
sealed, sent, opened, clipped again, added up, and released with noise. It runs in a process of its own with one thread,
after a small round that loads what is loaded once. Its memory is what that process grew by at the worst moment.

    python -m experiments.scale
    python -m experiments.scale --cohorts "[1000]" --masked "[]" --every "[]" --course_rounds 10
    python -m experiments.scale --fast

Writes `points.jsonl` (a line a point; those that stand there are not measured again, so that a run can go on),
`course.jsonl`, `limits.json`, `tables.md` and the figures.

What the clients hold is synthetic: vectors around ten fixed centres, two labels a client, drawn from its number.
"""

from __future__ import annotations

import ctypes
import gc
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from math import ceil, isqrt
from pathlib import Path
from time import perf_counter, process_time
from typing import final

import torch
from rich.console import Console
from torch import Tensor, nn

from privfm.checks import at_least, require
from privfm.cli import command
from privfm.contracts import BuiltModel, Cast, Channel, Encoded, Engine, Examples, Exchange, Sealer, Table
from privfm.defenses import DPPlan, TrimmedMean
from privfm.defenses.channels import PairwiseMasks
from privfm.defenses.privacy import IntegerNoise
from privfm.defenses.privacy.distributed import rounding_bound, share_deviation, smallest_modulus_bits
from privfm.engines import Local
from privfm.federation import Arm, Federation, FixedSize, Population, play, rounds, start
from privfm.federation.phases import Phases
from privfm.federation.rehearsal import grown, in_child
from privfm.learning import SGD, ImageClassification, ModelLearner, Schedule, Workbench
from privfm.randomness import Seeds, seeded
from privfm.reporting import show
from privfm.reporting.fleet import Fleet, fleet_tables
from privfm.reporting.formats import bytes_text
from privfm.reporting.scale_figures import figures
from privfm.reporting.scales import (
    EVERY,
    EXAMPLES,
    MASKED,
    PLAIN,
    WARM,
    Limits,
    Moment,
    Point,
    Setting,
    tables,
    version_here,
)

LABELS = 10  # of the task
CENTRES = 4.0  # length of a label's centre, in deviations of a coordinate of the vectors around it
LEARNING_RATE = 0.5  # with which updates are about as long as the clip, or longer
CLIP, NOISE, MOST_ROUNDS = 1.0, 1.0, 10  # L2 of an update, noise multiplier, participations of one client
VALIDATION = 64  # clients outside the population, on whose examples the model is evaluated
MIDDLE = 100  # cohort, or the nearest to it, where population and batch are varied

CORRUPT, DROPOUTS = 0.2, 0.1  # shares that masks assume to work with the server, and to go missing
HONEST = 0.75  # share of a cohort whose noise has to be enough
CLIP_STEPS = 2**12  # steps of distributed noise's grid in one clip
TRIMMED = 0.05  # share that the trimmed mean leaves out at either end


# ---------------------------------------------------------------------------------------------------- the federation


class TwoLayers(nn.Module):
    """`(b, features)` -> `(b, LABELS)` logits through one hidden layer, without biases."""

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.inner = nn.Linear(features, hidden, bias=False)
        self.outer = nn.Linear(hidden, LABELS, bias=False)

    def forward(self, pixel_values: Tensor) -> Tensor:
        logits: Tensor = self.outer(torch.relu(self.inner(pixel_values)))
        return logits


def shape(parameters: int) -> tuple[int, int]:
    """(features, hidden) of a `TwoLayers` of exactly so many parameters, as square as there is one."""
    hidden = next(n for n in range(isqrt(parameters), 0, -1) if parameters % n == 0)
    features = parameters // hidden - LABELS
    require(features >= LABELS, f"parameters={parameters}: expected 400 or more")
    return features, hidden


def holdings(features: int) -> Callable[[int], Examples]:
    """Client number -> its examples, the same every time."""
    seeds = Seeds(0)
    centres = torch.randn(LABELS, features, generator=seeds.generator("split"))
    centres *= CENTRES / centres.norm(dim=1, keepdim=True)

    def make(client: int) -> Examples:
        generator = seeds.generator("partition", client)
        own = torch.randperm(LABELS, generator=generator)[:2]
        labels = own[torch.randint(2, (EXAMPLES,), generator=generator)]
        return Examples(
            {"pixel_values": centres[labels] + torch.randn(EXAMPLES, features, generator=generator)}, labels
        )

    return make


def learner(parameters: int, population: int, make: Callable[[int], Examples]) -> ModelLearner:
    """A network, and clients outside the population to evaluate it on."""
    others = [make(population + other) for other in range(VALIDATION)]
    inputs = torch.cat([examples.inputs["pixel_values"] for examples in others])
    table = Table(inputs, torch.cat([examples.labels for examples in others]), tuple(map(str, range(LABELS))))
    with seeded(Seeds(0).generator("initialisation")):
        module = TwoLayers(*shape(parameters))
    bench = Workbench(BuiltModel(module, None, (), lambda folder: None), ImageClassification(), table)
    return ModelLearner(bench, {"validation": torch.arange(len(table))}, SGD(LEARNING_RATE, Schedule(EXAMPLES)))


def plan(setting: Setting) -> DPPlan:
    """Whole clients, as many in every round; noise of the server, or shares of all."""
    central = DPPlan(
        NOISE,
        CLIP,
        setting.rate,
        delta=min(1e-5, 0.1 / setting.population),
        sampling="fixed_size",
        max_participations=MOST_ROUNDS,
    )
    if setting.channel == PLAIN:
        return central
    least = ceil(HONEST * setting.cohort)
    share = share_deviation(NOISE, rounding_bound(CLIP_STEPS, setting.parameters), least)
    bits = max(8, smallest_modulus_bits(setting.cohort, CLIP_STEPS, share, setting.parameters))
    integers = IntegerNoise(least, setting.cohort, resolution=CLIP_STEPS, modulus_bits=bits)
    return replace(central, place="distributed", integers=integers, source="secure")


def arm(setting: Setting) -> Arm:
    """Mean under the plan, or a rule that needs every row."""
    if setting.channel == EVERY:
        return Arm(cohort=FixedSize(setting.cohort), rule=TrimmedMean(max(1, round(TRIMMED * setting.cohort))))
    private = plan(setting)
    if private.integers is None:
        return Arm(plan=private)
    masks = PairwiseMasks(setting.cohort, CORRUPT, DROPOUTS, modulus_bits=private.integers.modulus_bits)
    return Arm(plan=private, channel=masks)


def federation(setting: Setting, engine: Engine | None = None) -> Federation:
    """Ready to be played."""
    make = holdings(shape(setting.parameters)[0])
    model = learner(setting.parameters, setting.population, make)
    clients = Population(setting.population, make)
    return Federation(arm(setting), model, clients, Seeds(1), engine or Local(setting.batch))


# --------------------------------------------------------------------------------------------------- the measurement


@final
class Clocked(Engine):
    """An engine that is watched from outside.

    Attributes:
      training: seconds of the processor in the round's half of its clients.
      phases: of the last round.
    """

    def __init__(self, below: Engine) -> None:
        self._below, self.training = below, 0.0
        self.phases: Phases | None = None

    def open(self, channel: Channel, sealed: Sealer, cast: Cast) -> Exchange:
        def timed(asked: Sequence[int]) -> dict[int, Encoded]:
            began = process_time()
            rows = dict(sealed(asked))
            self.training += process_time() - began
            return rows

        self.phases = Phases(self._below.open(channel, timed, cast))
        return self.phases


def measured(*settings: Setting) -> list[Point]:
    """A round of each, in a process of their own; with more than one, what the first leaves free may hide a little."""
    return in_child(_measured, settings)


def _measured(settings: Sequence[Setting]) -> list[Point]:
    return [one(setting) for setting in settings]


def one(setting: Setting) -> Point:
    """A round in this process, after a small one."""
    run = federation(setting)
    few = replace(run, arm=arm(replace(setting, cohort=WARM)))
    play(few, start(few))
    engine = Clocked(Local(setting.batch))
    run = replace(run, engine=engine)
    state = start(run)
    give_back()
    clock, processor = perf_counter(), process_time()
    (_, record), memory = grown(play, run, state)
    spent, wall = process_time() - processor, perf_counter() - clock
    require(not record.failure and record.arrived == setting.cohort, f"{setting} failed: {record.failure}")
    assert engine.phases is not None  # it was played
    clients = sum(phase.client_seconds for phase in engine.phases.all)
    return Point(
        setting,
        wall,
        engine.training,
        clients - engine.training,
        spent - clients,
        memory,
        record.bytes_up_per_client,
        record.bytes_down_per_client,
    )


def give_back() -> None:
    """Returns to the system what is free in this process: a round that takes it would not be seen to grow."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; others keep little
    if trim is not None:
        trim(0)


def limits_here(size: int = 1 << 27, turns: int = 5) -> Limits:
    """The shortest of some turns over a block that no cache holds."""
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.hmac import HMAC

    source, target = torch.ones(size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8)
    content = bytes(size // 8)

    def code() -> None:
        HMAC(bytes(32), SHA256()).update(content)

    return Limits(shortest(lambda: target.copy_(source), turns) / size, shortest(code, turns) / len(content))


def shortest(call: Callable[[], object], turns: int) -> float:
    """Seconds of the processor, the least of some turns."""
    found = []
    for _ in range(turns):
        began = process_time()
        call()
        found.append(process_time() - began)
    return min(found)


def course(setting: Setting, count: int) -> list[Moment]:
    """Some rounds one after the other, in a process of their own."""
    return in_child(_course, setting, count)


def _course(setting: Setting, count: int) -> list[Moment]:
    run = federation(setting)
    before = run.learner.evaluate(run.learner.initial(), "validation")["accuracy"].value
    found = [Moment(0, 0.0, resident(), before)]
    began = process_time()
    for step in rounds(run, count, evaluate_every=1):
        metrics = step.metrics or {}
        found.append(
            Moment(step.state.round, process_time() - began, resident(), metrics["accuracy"].value if metrics else None)
        )
        began = process_time()
    return found


def resident() -> int:
    """Bytes of this process that are in memory, after it gave back what is free; 0 outside Linux."""
    give_back()
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmRSS")), 0)


# ------------------------------------------------------------------------------------------------------ the experiment


def planned(
    cohorts: Sequence[int],
    sizes: Sequence[int],
    populations: Sequence[int],
    batches: Sequence[int],
    others: Mapping[str, Sequence[int]],
) -> list[Setting]:
    """Cohorts at every width in the largest population; one cohort in every population; batches; other channels."""
    most, wide = max(populations), max(sizes)
    middle = min(cohorts, key=lambda cohort: abs(cohort - MIDDLE))
    found = [Setting(PLAIN, most, cohort, d) for d in sizes for cohort in cohorts]
    found += [Setting(PLAIN, size, middle, d) for size in populations for d in (min(sizes), wide) if size > middle]
    found += [Setting(PLAIN, most, middle, wide, batch) for batch in batches]
    for channel, own in others.items():
        found += [Setting(channel, most, cohort, wide) for cohort in own]
    if others.get(MASKED):
        found.append(Setting(MASKED, most, min(others[MASKED]), wide, batch=1))
    return list(dict.fromkeys(found))


def main(
    *,
    cohorts: tuple[int, ...] = (10, 30, 100, 300, 1000, 3000),
    sizes: tuple[int, ...] = (10_000, 100_000, 1_000_000),
    populations: tuple[int, ...] = (1000, 10_000, 100_000, 1_000_000),
    batches: tuple[int, ...] = (1, 4, 64),
    masked: tuple[int, ...] = (10, 30, 100, 300),
    every: tuple[int, ...] = (30, 100, 300),
    course_rounds: int = 20,
    course_size: int = 100_000,
    repeats: int = 1,
    out: Path = Path("runs/scale"),
    fast: bool = False,
) -> None:
    """Measures, prints the tables and draws the figures.

    Args:
      cohorts: clients of a round, at least 10.
      sizes: parameters of the network.
      populations: clients there are; cohorts and sizes are varied in the largest.
      batches: clients trained together, besides the usual 16, for one cohort at the largest size.
      masked: cohorts under masks with distributed noise, at the largest size.
      every: cohorts under a rule that needs every row, at the largest size.
      course_rounds: of the longer run, with the cohort nearest to a thousand; 0: none.
      course_size: its parameters.
      repeats: how often everything is measured.
      out: folder; points that stand in it are not measured again.
      fast: a small version in this process, which shows that everything runs; its numbers mean nothing.
    """
    if fast:
        cohorts, sizes, populations, batches, masked, every = (10, 20), (2500,), (1000,), (1,), (10,), ()
        course_rounds, course_size = 2, 2500
    at_least("repeats", repeats, 1)
    require(bool(cohorts and sizes and populations), "cohorts, sizes and populations: expected one of each at least")
    out.mkdir(parents=True, exist_ok=True)
    console, file = Console(), out / "points.jsonl"
    points = [Point.of(line) for line in file.read_text().splitlines()] if file.exists() else []
    known, version = {point.setting for point in points}, version_here()
    limits = limits_here(1 << 20 if fast else 1 << 27)
    (out / "limits.json").write_text(json.dumps(asdict(limits)))
    once = planned(cohorts, sizes, populations, batches, {MASKED: masked, EVERY: every})
    wanted = [replace(setting, turn=turn) for turn in range(repeats) for setting in once]
    wanted = [setting for setting in wanted if setting not in known]
    for setting in wanted:
        point = replace(one(setting) if fast else measured(setting)[0], version=version)
        points.append(point)
        with file.open("a") as lines:
            lines.write(json.dumps(point.row) + "\n")
        said = f"{setting}: {point.seconds:.3g} s, {bytes_text(point.memory)}"
        console.print(said, soft_wrap=True, highlight=False)
    moments: list[Moment] = []
    if course_rounds:
        cohort = min(cohorts, key=lambda cohort: abs(cohort - Fleet().goal))
        moments = (_course if fast else course)(Setting(PLAIN, max(populations), cohort, course_size), course_rounds)
        (out / "course.jsonl").write_text("".join(json.dumps(asdict(moment)) + "\n" for moment in moments))
    found = [*tables(points, limits, moments), *fleet_tables(points)]
    (out / "tables.md").write_text("\n".join(f"## {table.title}\n\n{table.markdown()}" for table in found))
    for name, drawn in figures(points).items():
        (out / f"{name}.svg").write_text(drawn.standalone())
    show(found, console)
    console.print(f"written: {out}", soft_wrap=True)


if __name__ == "__main__":
    command(main)
