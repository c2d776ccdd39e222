"""One run, from its configuration and its seed into its folder.

What arms share (data, splits, clients, model, activations) is made from the seed and not from the arm.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache, partial
from pathlib import Path
from statistics import fmean
from typing import Any, final

import torch
from torch import Tensor

from privfm.attacks.reconstruction.curious_server import special_tokens
from privfm.checks import require
from privfm.contracts import (
    CanaryScene,
    DataSource,
    Engine,
    LocalTraining,
    Metric,
    ModelSource,
    Partition,
    PublicModel,
    ServerScene,
    Split,
    Table,
    Task,
)
from privfm.engines import Local
from privfm.experiment.config import ArmSpec, RunConfig, described, resolved
from privfm.experiment.measures import audit_summary, backdoor, column, detection
from privfm.federation import Arm, Federation, Population, choose_malicious, load, public_sizes, rounds, save
from privfm.federation.auditing import audited
from privfm.learning.learner import ModelLearner
from privfm.learning.partitions import Natural
from privfm.learning.splits import SplitShares, split
from privfm.learning.tasks import Classification
from privfm.learning.workbench import Workbench
from privfm.randomness import Seeds
from privfm.reporting import RunFolder, describe_environment


@final
@dataclass(frozen=True)
class Dealt:
    """A data set after it was split and dealt out; nothing of it depends on the arm.

    Attributes:
      table: all examples.
      splits: rows by split.
      partition: how they were dealt out.
      clients: rows of each client.
    """

    table: Table
    splits: Mapping[Split, Tensor]
    partition: Partition
    clients: Sequence[Tensor]

    @property
    def absent(self) -> tuple[str, ...]:
        """Natural clients of whose rows none fell to the clients' split: they take no part."""
        natural = self.table.clients or ()
        present = {natural[row] for rows in self.clients for row in rows.tolist()} if natural else set()
        return tuple(sorted(set(natural) - present)) if isinstance(self.partition, Natural) else ()

    @property
    def label_mix(self) -> Tensor:
        """`(clients, labels)` examples of each label at each client."""
        owners = torch.cat([torch.full((len(rows),), client) for client, rows in enumerate(self.clients)])
        labels = self.table.labels[torch.cat(list(self.clients))]
        mix = torch.zeros(len(self.clients), len(self.table.label_names), dtype=torch.int64)
        return mix.index_put_((owners, labels), torch.ones_like(owners), accumulate=True)


@final
@dataclass(frozen=True)
class OwnData:
    """What a host is, where every host has data of its own.

    Attributes:
      clients: those that it hosts.
      label_names: of the whole federation, by label.
    """

    clients: tuple[int, ...]
    label_names: tuple[str, ...]


def deal(config: RunConfig, seed: int, own: OwnData | None = None) -> Dealt:
    """Reads the data, splits them and deals them out to clients.

    Args:
      config: the run.
      seed: root of the seed tree.
      own: a host with data of its own, all of which are its clients'; None: the server, or who plays everybody.

    Raises:
      InvalidArgument: the data cannot be read, or a client would be empty.
    """
    if own is not None:
        return _deal_own(config, seed, own)
    if config.clients_elsewhere:
        table, nobody = _table(config.data), torch.zeros(0, dtype=torch.int64)
        splits = split(table, config.splits, Seeds(seed).generator("split"))
        return Dealt(table, splits, config.partition, [nobody] * config.clients_elsewhere)
    return _deal(config.data, config.splits, config.partition, seed)


def _deal_own(config: RunConfig, seed: int, own: OwnData) -> Dealt:
    """A host's own rows: each natural client's together where rows name one, else dealt out evenly."""
    table = relabelled(_table(config.data), own.label_names)
    here, natural = len(own.clients), table.clients
    if natural is not None:
        names = sorted(set(natural))
        require(len(names) == here, f"the data here name {len(names)} client(s); this host is to play {here}")
        rows = [torch.tensor([row for row, owner in enumerate(natural) if owner == name]) for name in names]
    else:
        require(len(table.labels) >= here, f"{len(table.labels)} row(s) here for {here} client(s); each needs one")
        order = torch.randperm(len(table.labels), generator=Seeds(seed).generator("partition"))
        rows = [places.sort().values for places in torch.tensor_split(order, max(here, 1))]
    nobody = torch.zeros(0, dtype=torch.int64)
    clients = dict(zip(own.clients, rows, strict=False))
    splits: dict[Split, Tensor] = dict.fromkeys(("validation", "test", "server", "holdout"), nobody)
    splits["clients"] = torch.arange(len(table.labels))
    everybody = [clients.get(client, nobody) for client in range(config.clients_elsewhere)]
    return Dealt(table, splits, config.partition, everybody)


def relabelled(table: Table, label_names: Sequence[str]) -> Table:
    """A table whose labels count as in `label_names`, of which it may hold only some.

    Raises:
      InvalidArgument: it has a label that is not among them.
    """
    foreign = [name for name in table.label_names if name not in label_names]
    require(not foreign, f"labels {foreign[:5]} are not among the federation's {list(label_names)[:10]}")
    if table.label_names == tuple(label_names):
        return table
    numbers = torch.tensor([list(label_names).index(name) for name in table.label_names], dtype=torch.int64)
    return replace(table, labels=numbers[table.labels], label_names=tuple(label_names))


@lru_cache(maxsize=2)  # an experiment's arms, and its centralised reference
def _deal(data: DataSource, shares: SplitShares, partition: Partition, seed: int) -> Dealt:
    seeds, table = Seeds(seed), _table(data)
    splits = split(table, shares, seeds.generator("split"))
    for name in ("validation", "test"):
        require(len(splits[name]) > 0, f"splits.{name}=0: a run is evaluated on it; give it a share")
    rows = splits["clients"]
    natural = None if table.clients is None else [table.clients[row] for row in rows.tolist()]
    places = partition.assign(table.labels[rows], natural, seeds.generator("partition"))
    return Dealt(table, splits, partition, [rows[own] for own in places])


def arm_of(config: RunConfig, clients: int, seed: int) -> Arm:
    """What the round plays; who is malicious follows from the seed, not from the arm."""
    shared = {item.name: getattr(config, item.name) for item in fields(Arm) if item.name != "malicious"}
    if config.schedule is None:
        del shared["schedule"]
    if config.malicious is None:
        drawn = choose_malicious(config.malicious_share, clients, Seeds(seed).generator("malicious"))
        return Arm(**shared, malicious=drawn)
    unknown = [client for client in config.malicious if not 0 <= client < clients]
    require(not unknown, f"malicious={config.malicious!r}: no client {unknown}; ids go from 0 to {clients - 1}")
    return Arm(**shared, malicious=tuple(sorted(set(config.malicious))))


def prepare(config: RunConfig, seed: int, folder: Path | None = None, own: OwnData | None = None) -> Federation:
    """Everything a run needs, from its configuration and its seed.

    Args:
      config: the run.
      seed: root of the seed tree.
      folder: where activations are kept for other processes; None: in memory.
      own: a host with data of its own; None: the server, or who plays everybody.

    Raises:
      InvalidArgument: something is missing, or the parts do not fit together.
    """
    dealt = deal(config, seed, own)
    names = None if own is None else own.label_names
    bench = _bench(config.data, names, config.model, config.task, config.device, seed, folder)
    clients = Population.of(bench.everything, dealt.clients)
    labelled = isinstance(config.task, Classification) and clients.size > 1 and not config.clients_elsewhere
    mix = dealt.label_mix if labelled else None
    cast = torch.bfloat16 if config.backbone == "bfloat16" else None
    learner = ModelLearner(bench, dealt.splits, config.training, mix, engine=config.training_engine, autocast=cast)
    arm = arm_of(config, clients.size, seed)
    if arm.attack is not None:
        public = PublicModel(len(dealt.table.label_names), bench.built.tokenize, learner.adapters)
        arm = replace(arm, attack=arm.attack.fitted(public))
    if arm.server_attack is not None:
        arm = replace(
            arm,
            server_attack=arm.server_attack.fitted(_scene(bench, clients, config.training, dealt.splits["holdout"])),
        )
    seeds = Seeds(seed)
    if arm.audit is not None:
        scene = _canary_scene(bench, learner, dealt)
        arm = replace(arm, audit=arm.audit.fitted(scene, seeds))
    servers = dealt.splits["server"]
    root = bench.everything.take(servers) if len(servers) else None
    engine = Local(config.clients_per_batch, config.encryption_processes)
    return Federation(arm, learner, clients, seeds, engine, config.strict, root)


def _scene(bench: Workbench, clients: Population, training: LocalTraining, strangers: Tensor) -> ServerScene:
    """What a server knows of the run, and what a curious one is scored with."""
    return ServerScene(
        bench.load,
        bench.layout,
        training.local_steps,
        clients.examples,
        special_tokens(bench.everything),
        clients.size,
        bench.everything.take(strangers),
        lambda module, examples: bench.losses(examples),
        bench.adapters,
    )


def _canary_scene(bench: Workbench, learner: ModelLearner, dealt: Dealt) -> CanaryScene:
    """What canaries are made from."""
    holdout = bench.everything.take(dealt.splits["holdout"])
    gradients = partial(learner.gradients, learner.initial())
    return CanaryScene(learner.d, dealt.table.label_names, bench.built.tokenize, holdout, gradients)


def recorded(spec: ArmSpec, seed: int) -> dict[str, Any]:
    """What the folder of a run says it is."""
    return {"seed": seed, **resolved(spec.config)}


def play_run(
    path: Path,
    spec: ArmSpec,
    seed: int,
    shared: Path | None = None,
    engine: Callable[[Federation], Engine] | None = None,
) -> dict[str, Any]:
    """Plays one run into a folder, from its last checkpoint where there is one, and returns its summary.

    Args:
      path: the run's folder.
      spec: what is played.
      seed: root of the seed tree.
      shared: where activations are kept for other processes; None: in memory.
      engine: gives who carries messages; None: everybody is played in this process.

    Raises:
      InvalidArgument: the folder holds a run of another configuration or cannot be written.
      BrokenCheckpoint: its checkpoint is damaged.
    """
    config = spec.config
    run = RunFolder.open(path, recorded(spec, seed), describe_environment(config.device))
    if run.finished:
        return run.summary()
    federation = prepare(config, seed, shared)
    if engine is not None:
        federation = replace(federation, engine=engine(federation))
    facts = accounted_facts(federation)
    run.describe({"trained_values": facts.d, "client_examples": list(facts.examples)})
    until = affordable_rounds(config, facts)
    state = load(path / "checkpoint")
    run.truncate(0 if state is None else state.round)
    for step in rounds(federation, until, state, config.evaluate_every):
        run.append(step.record.row(step.metrics, config.task.primary, "validation", step.seconds_evaluation))
        if step.state.round % config.checkpoint_every == 0 or step.state.round == until:
            state = save(step.state, path / "checkpoint")
    assert state is not None  # at least one round was played, in this process or before the checkpoint
    learner = _model_learner(federation)
    learner.bench.save(state.model, path / "model")
    require(len(run.rows()) == until, f"{path}: another process has written to this run; choose another folder")
    summary = _summary(spec, seed, federation, run, learner.evaluate(state.model, "test"))
    summary["model_sha256"] = hashlib.sha256(state.model.numpy().tobytes()).hexdigest()
    summary |= _guarantees(config, facts, len(run.rows()))
    if config.audit is not None:
        summary["audited"] = audit_summary(audited(federation, state, learner.losses), config.audit)
    run.finish(summary | detection(run.rows()) | backdoor(federation.arm.attack, learner, state.model))
    return run.summary()


def _model_learner(federation: Federation) -> ModelLearner:
    """The learner that `prepare` made."""
    if not isinstance(federation.learner, ModelLearner):
        raise TypeError(f"expected a ModelLearner, got {type(federation.learner).__name__}")
    return federation.learner


def _summary(
    spec: ArmSpec, seed: int, federation: Federation, run: RunFolder, metrics: Mapping[str, Metric]
) -> dict[str, Any]:
    """What the report reads; see `privfm.reporting`."""
    config, rows = spec.config, run.rows()
    learner = _model_learner(federation)
    utility = metrics[config.task.primary]
    training, aggregation = column(rows, "seconds_training"), column(rows, "seconds_aggregation")
    evaluation, failed = column(rows, "seconds_evaluation"), column(rows, "failed")
    return {
        "arm": spec.name,
        "title": spec.title,
        "kind": spec.kind,
        "seed": seed,
        "rounds": len(rows),
        "skipped_rounds": sum(bool(row["skipped"]) for row in rows),
        "failed_clients": round(sum(failed)) if failed else None,
        "first_failure": next((str(row["failure"]) for row in rows if row["failure"]), ""),
        "clients_without_rows": len(deal(config, seed).absent),
        "channel_reveals": config.channel.reveals.name,
        "utility": utility.value,
        "utility_metric": config.task.primary,
        "utility_n": utility.n,
        "utility_unit": utility.unit,
        "higher_is_better": utility.higher_is_better,
        "trivial_utility": config.task.trivial(learner.labels("test")),
        "metrics": {
            name: {"value": m.value, "n": m.n, "higher_is_better": m.higher_is_better, "unit": m.unit}
            for name, m in metrics.items()
        },
        "training_engine": learner.engine_note,
        "engine": config.engine if config.engine == "local" else f"flower, {config.flower.mode}",
        "rule": repr(config.rule),
        "rule_name": config.rule.title,
        "adapters": None if config.adapters is None else config.adapters.mode,
        "channel": repr(config.channel),
        "channel_name": type(config.channel).__name__,
        "channel_settings": described(config.channel),
        "learns": dict(federation.arm.wire.learns),
        "unprotected": federation.arm.wire.unprotected(learner.d),
        "attack": None if config.attack is None else repr(config.attack),
        "attack_name": None if config.attack is None else type(config.attack).__name__,
        "attack_knowledge": [] if config.attack is None else list(config.attack.knowledge),
        "malicious_share": len(federation.arm.malicious) / federation.clients.size,
        "trained_values": learner.d,
        "clients": federation.clients.size,
        "cohort_expected": federation.arm.sampling.expected(federation.clients.size),
        "bytes_up_per_client": fmean(column(rows, "bytes_up_per_client")),
        "bytes_down_per_client": fmean(column(rows, "bytes_down_per_client")),
        "seconds_total": sum(training) + sum(aggregation) + sum(evaluation),
        "seconds_training": sum(training) if training else None,
        "seconds_aggregation": sum(aggregation),
        "channel_error_relative_l2": max(column(rows, "channel_error_relative_l2"), default=None),
    }


@final
@dataclass(frozen=True)
class AccountedFacts:
    """What of the data and the model an epsilon depends on.

    Attributes:
      d: trained values.
      examples: how many each client holds, where the plan makes that public; else empty.
    """

    d: int
    examples: tuple[int, ...]


def accounted_facts(federation: Federation) -> AccountedFacts:
    """Reads them off a run before it starts."""
    return AccountedFacts(federation.learner.d, public_sizes(federation))


def affordable_rounds(config: RunConfig, facts: AccountedFacts) -> int:
    """Rounds that the plan's budget pays for, of those that are asked for.

    Raises:
      InvalidArgument: not even one.
    """
    if config.plan is None:
        return config.rounds
    until = config.plan.rounds_within(config.rounds, facts.examples, facts.d)
    require(until > 0, f"budget={config.plan.budget}: the first round already costs more; raise it, or add noise")
    return until


def _guarantees(config: RunConfig, facts: AccountedFacts, after: int) -> dict[str, Any]:
    """The headline epsilon, every statement, and the way there."""
    plan = config.plan
    if plan is None:
        return {"epsilon": None, "epsilons": [], "epsilon_curve": []}
    records = [asdict(record) for record in plan.records(after, facts.examples, facts.d)]
    curve = plan.curve(after, points=6, examples=facts.examples, d=facts.d)
    return {"epsilon": records[0], "epsilons": records, "epsilon_curve": [list(point) for point in curve]}


@lru_cache(maxsize=1)
def _bench(  # noqa: PLR0917  # a cache is keyed by position
    data: DataSource, names: tuple[str, ...] | None, model: ModelSource, task: Task, device: str, seed: int,
    folder: Path | None,
) -> Workbench:  # fmt: skip
    """What arms of one seed share; the last one is kept, so that a worker's next arm starts at once."""
    table = _table(data) if names is None else relabelled(_table(data), names)
    built = model.build(table.label_names, Seeds(seed).generator("initialisation"))
    return Workbench(built, task, table, device, folder)


@lru_cache(maxsize=1)
def _table(data: DataSource) -> Table:
    return data.load()
