"""Seconds a round by engine, 1,000,000 parameters, beside Flower's own FedAvg in a plain app.

`python -m benchmarks.engines [--quick]` prints JSON lines. The work is in `benchmarks.engine_work`: every client takes
part and takes one step of SGD on 8 examples, the update is the mean, nothing is evaluated or checkpointed between
rounds. The plain app is in `benchmarks/engine_peers`: the same model, the same examples, the same step; both start and
end with the same model, which is checked.

| part         | ours                                                                      | theirs                    |
|--------------|---------------------------------------------------------------------------|---------------------------|
| `local`      | one process                                                               | FedAvg in its simulation  |
| `simulation` | a client a host, as FedAvg has it; all clients on 2 hosts, as ours has it | FedAvg in its simulation  |
| `deployment` | a client a host; 20 clients on as many hosts                              | FedAvg in its deployment  |
| `messages`   | what one message costs in deployment, hop by hop, cold and warm           | none                      |

| metric           | is                                                                                                |
|------------------|---------------------------------------------------------------------------------------------------|
| time (wall)      | a round by the server's own clock, from who is drawn to the new model; ours with authentication   |
| time (processor) | of all processes of the engine, end of a round to end of the next; of the local one its process's |
| between rounds   | wall time from the end of a round to the end of the next                                          |
| until first      | wall time from the call to the end of the first round: cold start of everything                   |

Times are medians over the rounds of all turns, without those in which an engine warms up; the lowest and the highest
are printed beside. Runs of one part take turns in the same sessions of Flower. Deployment counts by the wall: its time
is waiting. A SuperNode takes two processes and each message one more, so on two cores 20 of them cannot be compared.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, Final, final

import torch

from benchmarks.engine_messages import HOPS, Hop, messages
from benchmarks.engine_runs import Played, difference, importable, on_flower, on_one_process, on_plain_flower
from benchmarks.engine_work import configuration, write_peer_data
from benchmarks.timing import line, reason, write
from privfm.engines.flower.launch import NodeSpec, Session
from privfm.experiment import RunConfig

NAME: Final = "engines"
PARAMETERS: Final = 1_000_000
QUICK_PARAMETERS: Final = 100_000
CLIENTS: Final = (5, 20)
FEW: Final = 2  # hosts that ours deals clients out to, its default
TARGET: Final = 1 / 1.1  # at most a tenth above Flower's own
AGREEMENT: Final = 1e-4  # most that two final models may differ, over the largest entry
WARM: Final = {"local": 2, "simulation": 4, "deployment": 1}  # rounds that are left out of medians

LOCAL, EACH, SHARED, FEDAVG, IDLE = (
    "ours, one process",
    "ours, a client a host",
    f"ours, all on {FEW} hosts",
    "FedAvg",
    "FedAvg, clients that return what they got",
)

Found = dict[str, list[Played]]
"""Runs by variant."""


@final
@dataclass(frozen=True)
class Setting:
    """How much is played.

    Attributes:
      parameters: of the model.
      clients: numbers of them.
      rounds: of a run in one process and in simulation.
      slow_rounds: of one in deployment.
      turns: runs of every variant there.
      slow_turns: runs of every variant in deployment.
      nodes: SuperNodes in deployment.
      targets: whether they count.
    """

    parameters: int
    clients: tuple[int, ...]
    rounds: int
    slow_rounds: int
    turns: int
    slow_turns: int
    nodes: int
    targets: bool


FULL: Final = Setting(PARAMETERS, CLIENTS, 12, 5, 2, 1, 2, targets=True)
QUICK: Final = Setting(QUICK_PARAMETERS, CLIENTS[:1], 3, 2, 1, 1, 2, targets=False)


def main(arguments: list[str] | None = None) -> None:
    """Prints every line; nothing else goes to standard output."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engines", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="5 clients, 3 rounds, simulation only, without targets")
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="all when left out; quick: local and simulation")
    parser.add_argument("--clients", nargs="+", type=int, help="numbers of clients in simulation")
    parser.add_argument("--rounds", type=int, help="of a run in one process and in simulation")
    parser.add_argument("--slow-rounds", type=int, help="of a run in deployment")
    parser.add_argument("--turns", type=int, help="runs of every variant")
    parser.add_argument("--nodes", type=int, help="SuperNodes in deployment")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    importable()
    base = QUICK if given.quick else FULL
    setting = Setting(
        base.parameters,
        tuple(given.clients or base.clients),
        given.rounds or base.rounds,
        given.slow_rounds or base.slow_rounds,
        given.turns or base.turns,
        given.turns or base.slow_turns,
        given.nodes or base.nodes,
        base.targets,
    )
    parts = given.parts or (("local", "simulation") if given.quick else tuple(PARTS))
    with TemporaryDirectory(prefix="privfm-engines-") as folder:
        for part in parts:
            if part == "local" and "simulation" in parts:
                continue  # played there, beside FedAvg
            for found in PARTS[part](setting, Path(folder, part)):
                write(found)


def local(setting: Setting, folder: Path) -> Iterator[dict[str, Any]]:
    """Our engine in one process, alone."""
    for clients in setting.clients:
        config = configuration(clients, setting.parameters, setting.rounds)
        found = {LOCAL: [on_one_process(config) for _ in range(setting.turns)]}
        yield from lines(_case("local", clients, setting), LOCAL, found, {FEDAVG: "not in this part"}, WARM["local"])


def simulation(setting: Setting, folder: Path) -> Iterator[dict[str, Any]]:
    """One process and Flower's simulation, ours and theirs, in turns."""
    for clients in setting.clients:
        config = configuration(clients, setting.parameters, setting.rounds)
        own = folder / str(clients)
        write_peer_data(config, own / "data")
        with ExitStack() as sessions:
            wide = sessions.enter_context(Session.simulation(own / "wide", clients))
            calls: dict[str, Callable[[Path], Played]] = {
                LOCAL: partial(in_this_process, config),
                FEDAVG: partial(on_plain_flower, config, wide, own / "data"),
                EACH: partial(on_flower, config, wide, clients),
            }
            if setting.targets:  # the quick form has no time for it
                narrow = sessions.enter_context(Session.simulation(own / "narrow", FEW))
                calls[SHARED] = partial(on_flower, config, narrow, FEW)
            found, failures = in_turns(calls, setting.turns, own)
        case = _case("simulation", clients, setting)
        target = TARGET if setting.targets else None
        for variant in [name for name in calls if name != FEDAVG]:
            warm = WARM["local" if variant == LOCAL else "simulation"]
            yield from lines(case, variant, found, failures, warm, target)


def deployment(setting: Setting, folder: Path) -> Iterator[dict[str, Any]]:
    """SuperNodes in processes of their own, ours and theirs, in turns in one session."""
    few = configuration(setting.nodes, setting.parameters, setting.slow_rounds)
    many = configuration(max(CLIENTS), setting.parameters, setting.slow_rounds)
    shared = f"ours, all on {setting.nodes} hosts"
    write_peer_data(few, folder / "data")
    with deployed(setting.nodes, folder / "session") as session:
        calls: dict[str, Callable[[Path], Played]] = {
            FEDAVG: partial(on_plain_flower, few, session, folder / "data"),
            EACH: partial(on_flower, few, session, setting.nodes),
            IDLE: partial(on_plain_flower, few, session, folder / "data", train=False),
            shared: partial(on_flower, many, session, setting.nodes),
        }
        found, failures = in_turns(calls, setting.slow_turns, folder)
    case, target = _case("deployment", setting.nodes, setting), TARGET if setting.targets else None
    yield from lines(case, EACH, found, failures, WARM["deployment"], target)
    yield from lines(case, EACH, found, failures, WARM["deployment"], peer=IDLE)
    crowd = {shared: found[shared]}
    why = {FEDAVG: f"it has one client a SuperNode: {max(CLIENTS)} of them do not fit on a machine of this size"}
    yield from lines(_case("deployment", max(CLIENTS), setting), shared, crowd, why, WARM["deployment"])


def message_costs(setting: Setting, folder: Path) -> Iterator[dict[str, Any]]:
    """Where the seconds of one message go."""
    config = configuration(setting.nodes, setting.parameters, setting.slow_rounds)
    with deployed(setting.nodes, folder / "session") as session:
        found = messages(config, session, setting.nodes, folder / "run")
    yield from message_lines(found, _case("deployment, a message", setting.nodes, setting))


PARTS: dict[str, Callable[[Setting, Path], Iterator[dict[str, Any]]]] = {
    "local": local,
    "simulation": simulation,
    "deployment": deployment,
    "messages": message_costs,
}


def deployed(nodes: int, folder: Path) -> Session:
    """A SuperLink and SuperNodes with persistent workers where the system has them."""
    persistent = sys.platform == "linux"
    configs = [
        {"partition-id": place, "num-partitions": nodes, "persistent-worker": persistent} for place in range(nodes)
    ]
    return Session.deployment(folder, [NodeSpec(config) for config in configs])


def in_this_process(config: RunConfig, folder: Path) -> Played:
    """The local engine, which writes nothing here."""
    return on_one_process(config)


def in_turns(calls: Mapping[str, Callable[[Path], Played]], turns: int, folder: Path) -> tuple[Found, dict[str, str]]:
    """Runs of every variant, one after the other, and why those of others failed; what fails of ours raises."""
    found: Found = {name: [] for name in calls}
    failures: dict[str, str] = {}
    for turn in range(turns):
        for place, (name, call) in enumerate(calls.items()):
            if name in failures:
                continue
            try:
                found[name].append(call(folder / f"{turn}-{place}"))
            except Exception as error:  # somebody else's code: whatever it raises is the reason that is printed
                if name.startswith("ours"):
                    raise
                failures[name] = reason(error)
    return found, failures


def lines(  # noqa: PLR0917 (what all cases have in common, in one place)
    case: str,
    variant: str,
    found: Found,
    failures: Mapping[str, str],
    warm: int,
    target: float | None = None,
    peer: str = FEDAVG,
) -> Iterator[dict[str, Any]]:
    """A variant of ours beside a peer.

    Args:
      case: what is played.
      variant: of ours.
      found: its runs, and the peer's.
      failures: why there are none of the peer.
      warm: rounds of every run that are left out; fewer where a run has not so many.
      target: least ratio of the peer's time to ours.
      peer: whom it stands beside; all but clients that do not train must end with the same model.
    """
    case = f"{case}: {variant}"
    ours, theirs = found[variant], found.get(peer, [])
    why = failures.get(peer, "")
    for metric, read in METRICS.items():
        own, others = (_values(read, runs, warm) for runs in (ours, theirs))
        aim = target if metric.startswith("time") else None
        for name, least in SPREAD.items():
            mine, other = (least(each) if each else None for each in (own, others))
            label = f"{metric}, {name}" if name else metric
            yield line(NAME, case, peer, label, "s", mine, other, None if name else aim, why)
            if not metric.startswith("time"):
                break
    apart = max((difference(ours[0].model, run.model) for run in theirs if peer != IDLE), default=None)
    if apart is not None:
        if apart > AGREEMENT:
            raise RuntimeError(f"{case}: the models differ by {apart:.2g} of the largest entry: not the same work")
        yield line(NAME, case, peer, "difference", "1", apart, None, why="one number of both: how the models differ")


METRICS: Final[dict[str, Callable[[Played, int], Sequence[float]]]] = {
    "time (wall)": lambda run, warm: [spent.wall for spent in run.rounds[warm:]],
    "time (processor)": lambda run, warm: [spent.processor for spent in run.rounds[warm:]],
    "between rounds": lambda run, warm: run.between[warm:],
    "until first": lambda run, warm: [run.started],
}
SPREAD: Final[dict[str, Callable[[Sequence[float]], float]]] = {"": median, "lowest": min, "highest": max}


def _values(read: Callable[[Played, int], Sequence[float]], runs: Sequence[Played], warm: int) -> list[float]:
    return [value for run in runs for value in read(run, min(warm, len(run.rounds) - 1))]


def message_lines(found: Sequence[Hop], case: str) -> Iterator[dict[str, Any]]:
    """A line a hop: of a host's first message, and the median of its later ones."""
    why = "a part of our own rounds: nothing stands beside it"
    for name in HOPS:
        for when, first in (("first", True), ("later", False)):
            values = [hop.seconds for hop in found if hop.name == name and hop.first == first]
            if values:
                yield line(NAME, f"{case}, {when}", "none", name, "s", median(values), None, why=why)


def _case(engine: str, clients: int, setting: Setting) -> str:
    return f"{engine}, {clients} clients, {setting.parameters} parameters"


if __name__ == "__main__":
    main()
