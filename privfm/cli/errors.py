"""How a command ends: its exit status, and one line on the standard error where the user has to change something."""

from __future__ import annotations

import sys
from collections.abc import Callable

from privfm.checks import (
    BrokenCheckpoint,
    BrokenEnvelope,
    ClientFailed,
    FlowerFailed,
    InvalidArgument,
    NotRevealed,
    RoundFailed,
)

DONE, REFUSED, USER_ERROR, INTERRUPTED = 0, 1, 2, 130
"""Exit statuses. `REFUSED`: the command worked, and what it looked at is not in order."""

EXPLAINED = (
    InvalidArgument, NotRevealed, RoundFailed, ClientFailed, BrokenCheckpoint, BrokenEnvelope, FlowerFailed,
)  # fmt: skip
"""Errors whose message says all there is to say; anything else is a defect and keeps its traceback."""


def exit_status(work: Callable[[], int]) -> int:
    """Runs a command; `--help` and `--print_config`, which leave early, end well."""
    try:
        return work()
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else DONE
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; the same command goes on from the last finished round\n")
        return INTERRUPTED
    except EXPLAINED as reason:
        sys.stderr.write(f"error: {' '.join(str(reason).split())}\n")
        return USER_ERROR


def say(text: str = "") -> None:
    """One line, or several, on the standard output."""
    sys.stdout.write(f"{text}\n")
