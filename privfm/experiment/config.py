"""What a run is, as a configuration says it."""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass
from types import FunctionType
from typing import Any, Literal, final

import torch

from privfm.checks import InvalidArgument, at_least, first_line, one_of, require
from privfm.contracts import (
    Attack,
    AttackSchedule,
    Channel,
    DataSource,
    LocalTraining,
    ModelSource,
    Partition,
    Rule,
    Sampling,
    ServerAttack,
    ServerOptimizer,
    Task,
    Transform,
)
from privfm.defenses.privacy import DPPlan
from privfm.engines.flower.settings import FlowerSettings
from privfm.federation.canaries import Audit
from privfm.federation.spaces import ProductGeometry
from privfm.learning.splits import SplitShares

Kind = Literal["federated", "centralised"]


@final
@dataclass(frozen=True)
class RunConfig:
    """One run but for its seed: what a configuration file says.

    Args:
      data: where the data come from.
      model: which model, and what of it is trained.
      task: what is learned.
      partition: how rows fall to clients.
      training: what a client does.
      rule: how updates become one.
      channel: how they travel.
      optimizer: what the server does with the aggregate.
      rounds: rounds in all.
      weighting: how much each client counts: all the same, or by the examples that the server knows it to hold.
      cohort: who takes part in a round; left out under a plan, which samples itself.
      transforms: client steps, then codecs.
      adapters: compare low-rank adapters by the changes they make to the weights; left out: by their factors.
      alternate: train the factors of low-rank adapters in turns, B in even rounds and A in odd ones.
      plan: differential privacy.
      attack: what malicious clients do.
      malicious_share: of the population, drawn by the seed.
      malicious: ids of the malicious clients instead, where the setting says who they are.
      schedule: when malicious clients poison.
      attackers_take_steps: whether they pass the client steps (momentum) before they attack; else what they bend is
        their plain update.
      server_attack: a curious server.
      dropout_rate: share of a cohort that is lost at some stage, simulated.
      audit: canaries among the clients, by which epsilon is measured from below; left out: it is only claimed.
      splits: shares of the data by purpose.
      evaluate_every: rounds between evaluations on the validation split.
      checkpoint_every: rounds between checkpoints; an interrupted run plays those since the last one again.
      clients_per_batch: honest clients trained together.
      encryption_processes: how many encrypt side by side; 1 encrypts in the run's own process.
      training_engine: `batched` trains all clients of a batch in one pass, where model and training allow it;
        `sequential` one after the other. Results differ in the last digits; the record says which was used, and why.
      engine: who carries messages: `local` plays everybody in this process; `flower` plays the same run on Flower, with
        clients on hosts of their own.
      flower: how, on Flower.
      strict: end the run when a client's training raises, instead of recording a drop-out.
      device: where the model runs.
      backbone: type in which what is frozen is computed during training, where it pays (on a GPU); what is trained,
        clipped and noised stays float32.
    """

    data: DataSource
    model: ModelSource
    task: Task
    partition: Partition
    training: LocalTraining
    rule: Rule
    channel: Channel
    optimizer: ServerOptimizer
    rounds: int
    weighting: Literal["equal", "examples"] = "equal"
    cohort: Sampling | None = None
    transforms: tuple[Transform, ...] = ()
    adapters: ProductGeometry | None = None
    alternate: bool = False
    plan: DPPlan | None = None
    attack: Attack | None = None
    malicious_share: float = 0.0
    malicious: tuple[int, ...] | None = None
    schedule: AttackSchedule | None = None
    attackers_take_steps: bool = True
    server_attack: ServerAttack | None = None
    dropout_rate: float = 0.0
    audit: Audit | None = None
    splits: SplitShares = SplitShares()
    evaluate_every: int = 1
    checkpoint_every: int = 1
    clients_per_batch: int = 32
    encryption_processes: int = 1
    training_engine: Literal["batched", "sequential"] = "batched"
    engine: Literal["local", "flower"] = "local"
    flower: FlowerSettings = FlowerSettings()
    strict: bool = False
    device: str = "cpu"
    backbone: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        at_least("rounds", self.rounds, 1)
        at_least("evaluate_every", self.evaluate_every, 1)
        at_least("checkpoint_every", self.checkpoint_every, 1)
        at_least("clients_per_batch", self.clients_per_batch, 1)
        at_least("encryption_processes", self.encryption_processes, 1)
        one_of("training_engine", self.training_engine, ("sequential", "batched"))
        one_of("engine", self.engine, ("local", "flower"))
        one_of("backbone", self.backbone, ("float32", "bfloat16"))
        require(0 <= self.malicious_share < 1, f"malicious_share={self.malicious_share!r}: expected a number in [0, 1)")
        require(
            self.malicious is None or self.malicious_share == 0,
            f"malicious_share={self.malicious_share!r} and malicious={self.malicious!r}: give one of them",
        )
        try:
            torch.zeros(1, device=self.device)
        except (RuntimeError, AssertionError) as reason:
            why = f"device={self.device!r} does not work here: {first_line(reason)}; use cpu"
            raise InvalidArgument(why) from reason

    @property
    def clients_elsewhere(self) -> int:
        """Clients with data of their own on their hosts; 0: all data are here, and dealt out."""
        return self.flower.clients if self.engine == "flower" else 0


@final
@dataclass(frozen=True)
class ArmSpec:
    """One arm of an experiment.

    Attributes:
      name: of its folder.
      title: for people.
      group: arms that are compared with each other.
      config: what is run.
      kind: `centralised` marks the reference that relative utility is measured against.
    """

    name: str
    title: str
    group: str
    config: RunConfig
    kind: Kind = "federated"


def resolved(value: object, *, in_full: bool = False) -> Any:
    """A configuration as plain values, in the form that the command line and configuration files read.

    Args:
      value: the configuration, or a part of it.
      in_full: also names classes of privfm by their import path: no class of somebody else's is then taken for one.
    """
    if is_dataclass(value) and not isinstance(value, type):
        own = {item.name: resolved(getattr(value, item.name), in_full=in_full) for item in fields(value)}
        kind = type(value)
        if not any(base.__module__.startswith("privfm.contracts") for base in kind.__mro__[1:]):
            return own
        short = kind.__module__.startswith("privfm.") and not in_full
        return {"class_path": kind.__name__ if short else f"{kind.__module__}.{kind.__qualname__}", "init_args": own}
    if isinstance(value, (tuple, list)):
        return [resolved(item, in_full=in_full) for item in value]
    if isinstance(value, FunctionType):
        return f"{value.__module__}.{value.__qualname__}"  # somebody's own training loop
    return value


def described(value: object) -> str:
    """A part of a configuration with what differs from its defaults, for people: `CKKS(bound=2.0, clients=60)`."""
    if not is_dataclass(value) or isinstance(value, type):
        return repr(value)
    own = ((item, getattr(value, item.name)) for item in fields(value))
    shown = (f"{item.name}={described(each)}" for item, each in own if each != item.default)
    return f"{type(value).__name__}({', '.join(shown)})"
