"""`privfm run`: one configuration, under one or several seeds."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, final

from rich.console import Console

from privfm.checks import InvalidArgument, require
from privfm.cli.commands import COMMANDS
from privfm.cli.errors import DONE, say
from privfm.cli.explain import public_classes
from privfm.cli.options import parser_for, read_toml, split_off_files, values
from privfm.experiment import ArmSpec, Experiment, RunConfig, run_experiment
from privfm.reporting import experiment_tables, show

DEFAULTS = {"rule": "Mean", "channel": "Plaintext", "optimizer": "Average"}
"""What a configuration that does not say gets: federated averaging in the clear."""


@final
@dataclass(frozen=True)
class Request:
    """What `privfm run` and `privfm check` are asked.

    Attributes:
      name: the configuration file's, without its ending.
      config: the run.
      seeds: roots of the seed trees.
      out: folder of the experiment.
      workers: processes.
    """

    name: str
    config: RunConfig
    seeds: tuple[int, ...]
    out: Path
    workers: int


def run(argv: Sequence[str]) -> int:
    """Plays a configuration, prints its table and writes its report.

    Args:
      argv: `[CONFIG.toml] [--key value ...]`.
    """
    asked = request("run", argv)
    question = f"What does {asked.name} reach, and what does it cost?"
    arm = ArmSpec(asked.name, asked.name, "", asked.config)
    workers = min(asked.workers, max(len(asked.seeds), 1))  # a single run is played in this process
    report = run_experiment(Experiment(asked.name, question, (arm,)), asked.out, asked.seeds, workers)
    show(experiment_tables(asked.out), Console())
    say(f"report: {report}")
    return DONE


def request(command: str, argv: Sequence[str]) -> Request:
    """Reads the command line of a command that takes a configuration.

    Raises:
      InvalidArgument: a file, a name or a value is wrong.
    """
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # for the user's own classes; behind everything installed, to hide nothing
    public_classes()  # what is imported has a short name
    words = list(argv)
    if words and not words[0].startswith("-"):
        words = ["--config", *words]
    files, rest = split_off_files(words)
    try:
        found = values(config_parser(command, files, rest), RunConfig, words)
    except InvalidArgument as reason:
        if words:
            raise
        raise InvalidArgument(f"{reason}; give a CONFIG.toml") from reason
    name = Path(files[0]).stem if files else "run"
    seeds, out, workers = (found.pop(option) for option in ("seeds", "out", "workers"))
    require(out != "", "out='': expected a folder")
    return Request(name, RunConfig(**found), seeds, Path("runs", name) if out is None else Path(out), workers)


def recorded_config(record: Mapping[str, Any]) -> RunConfig:
    """A run's configuration from its record, as `resolved` wrote it."""
    parser = config_parser("run")
    made = vars(parser.instantiate(parser.parse_object(dict(record))))
    return RunConfig(**{item.name: made[item.name] for item in fields(RunConfig)})


def config_parser(command: str, files: Sequence[str] = (), words: Sequence[str] = ()) -> Any:
    """The parser of `privfm run` and `privfm check`.

    Args:
      command: which of them.
      files: configuration files that will be read.
      words: the rest of the command line.
    """
    parser = parser_for(RunConfig, f"privfm {command}", f"privfm {command} [CONFIG.toml] [--key value ...]")
    purpose = COMMANDS[command][1]
    parser.description = f"{purpose[0].upper()}{purpose[1:]}."
    # A default class that another one replaces would leave it its parameters: Adam would get Average's learning rate.
    given = {name for file in files for name in read_toml(file)}
    given |= {word.partition("=")[0].removeprefix("--") for word in words}
    parser.set_defaults({name: {"class_path": kind} for name, kind in DEFAULTS.items() if name not in given})
    parser.add_argument("--seeds", type=tuple[int, ...], default=(0,), help="roots of the seed trees, a run each")
    parser.add_argument("--out", type=str | None, default=None, help="folder of the experiment (runs/CONFIG)")
    parser.add_argument("--workers", type=int, default=2, help="processes; results do not depend on them")
    return parser
