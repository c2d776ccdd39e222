"""A command whose whole process tree ends with whoever started it, however that one ends.

Flower starts processes of its own (SuperExec in a session of its own, a fresh process for each message, Ray's servers),
and neither a process group nor a signal reaches all of them. So each command runs under a guard: this file, run as a
script, in a session of its own (Ctrl-C of a terminal does not reach it). The guard is the subreaper of everything
below it: a process that loses its parent becomes the guard's child, so nothing can leave the tree. It ends the tree,
and itself, as soon as

| what happens | how the guard learns it |
|---|---|
| `Tree.kill` | the pipe from the owner closes |
| the owner ends: exception, signal, SIGKILL | the owner's process descriptor turns readable, and the pipe closes |
| the command ends by itself | its process descriptor turns readable; what it left behind is ended too |
| the guard itself is killed | the kernel kills the command; Flower's own parent watches end the rest |

Linux 5.3 or later. The guard needs the standard library alone and takes about 40 ms to start.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import final

_SET_DEATH_SIGNAL = 1  # prctl(PR_SET_PDEATHSIG): the signal a process gets when its parent ends
_SET_SUBREAPER = 36  # prctl(PR_SET_CHILD_SUBREAPER): orphans below a process become its children
_SWEEP_SECONDS = 0.01
_PROC = Path("/proc")


@final
class Tree:
    """One command and everything it starts.

    Args:
      command: the program by its full path, and its arguments.
      log: a new file that takes what all of them print.
      environment: all variables of the command.
      folder: where it runs.

    Raises:
      OSError: the guard cannot be started.
    """

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str], folder: Path) -> None:
        self.log = log
        guard = [sys.executable, "-I", "-S", __file__, str(os.getpid()), *command]
        with log.open("wb") as output:
            self._guard = subprocess.Popen(
                guard,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=dict(environment),
                cwd=folder,
                start_new_session=True,
            )

    def ended(self) -> int | None:
        """The command's exit status (128 + the signal that ended it), or None while it runs."""
        return self._guard.poll()

    def ask_to_end(self) -> None:
        """Tells the guard to end the tree, without waiting for it."""
        if self._guard.stdin is not None:
            with suppress(BrokenPipeError):
                self._guard.stdin.close()

    def kill(self) -> None:
        """Ends every process of the tree at once (SIGKILL) and returns when none is left. May be called again."""
        self.ask_to_end()
        self._guard.wait()


def parents() -> dict[int, int]:
    """The parent of every process of this machine, by process id."""
    found = {}
    for folder in _PROC.iterdir():
        if folder.name.isdigit():
            with suppress(OSError):  # it has just ended
                # The name, in brackets, may hold spaces and brackets itself.
                fields = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()
                found[int(folder.name)] = int(fields[1])
    return found


def descendants(ancestor: int) -> list[int]:
    """All processes below `ancestor`, nearest first."""
    children: dict[int, list[int]] = {}
    for process, parent in parents().items():
        children.setdefault(parent, []).append(process)
    found = list(children.get(ancestor, []))
    for process in found:
        found.extend(children.get(process, []))
    return found


def marked(name: str, value: str) -> list[int]:
    """Processes that have the variable `name=value`, as far as their environment may be read.

    Flower's SuperExec forbids reading its memory and environment to anybody but root.
    """
    wanted = f"{name}={value}".encode()
    found = []
    for folder in _PROC.iterdir():
        if folder.name.isdigit():
            with suppress(OSError):
                if wanted in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
    return found


def kill_marked(name: str, value: str) -> None:
    """Kills what carries the variable `name=value`: the last sweep, should a guard have been killed itself."""
    for process in marked(name, value):
        if process != os.getpid():
            with suppress(ProcessLookupError, PermissionError):
                os.kill(process, signal.SIGKILL)


def _guard(owner: int, command: Sequence[str]) -> int:
    """Runs `command`, ends its tree when it, the pipe or the owner ends. Returns its exit status."""
    system = ctypes.CDLL(None, use_errno=True)
    if system.prctl(_SET_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "this system cannot adopt orphaned processes")
    owner_end = os.pidfd_open(owner)
    if os.getppid() != owner:
        return 128 + signal.SIGKILL  # the owner has ended before it could be watched
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        preexec_fn=lambda: system.prctl(_SET_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0),  # noqa: PLW1509 (the guard has one thread)
    )
    child_end = os.pidfd_open(child.pid)
    select.select([sys.stdin.fileno(), owner_end, child_end], [], [])
    status = child.poll()
    _end_tree()
    if status is None:
        return 128 + signal.SIGKILL
    return status if status >= 0 else 128 - status


def _end_tree() -> None:
    """Kills what is below this process until nothing is: one that was just started may not have been seen yet."""
    while below := descendants(os.getpid()):
        for process in below:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG) != (0, 0):
                pass
        time.sleep(_SWEEP_SECONDS)


if __name__ == "__main__":
    sys.exit(_guard(int(sys.argv[1]), sys.argv[2:]))
