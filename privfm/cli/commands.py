"""`privfm COMMAND`: which commands there are. Each is imported when it is called, so that help comes at once."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from importlib import import_module

from privfm import __version__
from privfm.checks import one_of, require
from privfm.cli.errors import DONE, exit_status, say

COMMANDS = {
    "run": ("privfm.cli.run", "play a configuration and write its report"),
    "check": ("privfm.cli.check", "say what a configuration would do, cost and leak; without one: what fits together"),
    "report": ("privfm.cli.records", "write the report of an experiment's folder again"),
    "account": ("privfm.cli.records", "compute epsilon again from a run's record"),
    "export": ("privfm.cli.records", "copy of a run what may leave the machine"),
    "flower-app": ("privfm.cli.flower", "write the folder that `flwr run` takes to a real federation"),
    "flower-identity": ("privfm.cli.flower", "make the secrets of one host of a real federation, on that host"),
    "doctor": ("privfm.cli.doctor", "say what is installed and what works here"),
}
"""Module and purpose of each command; the module's function of that name (`flower_app`) takes the arguments."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
      argv: the words after the program's name; None: this process's.

    Returns:
      The exit status: 0, 1 where what was looked at is not in order, 2 after a user error, 130 after Ctrl-C.
    """
    return exit_status(partial(_dispatch, sys.argv[1:] if argv is None else list(argv)))


def _dispatch(words: list[str]) -> int:
    if words[:1] in (["--help"], ["-h"]):
        say(_help())
        return DONE
    if words[:1] == ["--version"]:
        say(f"privfm {__version__}")
        return DONE
    require(bool(words), f"COMMAND is missing: one of {', '.join(COMMANDS)}; see privfm --help")
    name, rest = words[0], words[1:]
    one_of("COMMAND", name, COMMANDS)
    module, _ = COMMANDS[name]
    status: int = getattr(import_module(module), name.replace("-", "_"))(rest)
    return status


def _help() -> str:
    lines = [f"  {name:<17}{purpose}" for name, (_, purpose) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: privfm COMMAND ... | privfm --version | privfm --help",
            "",
            "What federated fine-tuning leaks, what breaks it, and what each protection costs.",
            "",
            *lines,
            "",
            "privfm COMMAND --help shows a command's options.",
        ]
    )
