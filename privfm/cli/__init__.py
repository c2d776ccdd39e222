"""The command line: `privfm COMMAND`, and the options of experiment scripts. Importing it does not import torch."""

from privfm.cli.commands import main
from privfm.cli.script import command

__all__ = ["command", "main"]
