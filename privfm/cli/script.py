"""Experiment scripts from the command line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from privfm.cli.errors import DONE, exit_status
from privfm.cli.options import parser_for, values


def command(function: Callable[..., None], argv: Sequence[str] | None = None) -> None:
    """Calls a function with its parameters as options, and leaves with its exit status.

    Names, types, defaults and help come from the signature and the docstring. `--config FILE.toml` reads options from
    a file, `--print_config` prints them all and leaves. Options have names only, written in full; lists and tuples are
    written `"[1,3,8]"`.

    Args:
      function: the script's `main`.
      argv: the words after the program's name; None: this process's.

    Raises:
      SystemExit: 2 after a user error, told in one line; 130 after Ctrl-C; nothing is raised when all went well.
    """
    words = sys.argv[1:] if argv is None else list(argv)

    def work() -> int:
        function(**values(parser_for(function), function, words))
        return DONE

    status = exit_status(work)
    if status != DONE:
        sys.exit(status)
