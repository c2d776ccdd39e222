"""What benchmarks of training share: interleaved clocks, peak memory in a forked child, and the lines they print."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import resource
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any

import torch

from privfm.checks import first_line
from privfm.federation.rehearsal import grown

DEADLINE = 120  # seconds a child may take


@dataclass(frozen=True)
class Spent:
    """What one call took, in seconds."""

    processor: float
    wall: float


def interleaved(
    calls: Mapping[str, Callable[[], Any]], repeats: int, failures: dict[str, str], unmeasured: int = 1
) -> dict[str, list[Spent]]:
    """Times of every call, in turns.

    Args:
      calls: by name; `ours` and what begins so is ours, and raises.
      repeats: measured turns.
      failures: what a call raised is written here, by name, and it is not called again.
      unmeasured: turns before them, where nothing has run yet.
    """
    spent: dict[str, list[Spent]] = {name: [] for name in calls}
    for turn in range(unmeasured + repeats):
        for name, call in calls.items():
            if name in failures:
                continue
            wall, processor = perf_counter(), process_time()
            try:
                call()
            except Exception as error:  # somebody else's code: whatever it raises is the reason that is printed
                if name.startswith("ours"):
                    raise
                failures[name] = reason(error)
                continue
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            taken = Spent(process_time() - processor, perf_counter() - wall)
            if turn >= unmeasured:
                spent[name].append(taken)
    return spent


def reason(error: BaseException) -> str:
    """What an error was, on one short line."""
    return f"{type(error).__name__}: {first_line(error)[:160]}"


def seconds(spent: list[Spent], clock: str) -> float | None:
    """Median over turns; clock: `processor` or `wall`."""
    return median(getattr(one, clock) for one in spent) if spent else None


def paired(spent: list[Spent], others: list[Spent], clock: str) -> float | None:
    """Median over turns of this call's time over the other's in the same turn: load that lasts a turn cancels."""
    ratios = [getattr(a, clock) / getattr(b, clock) for a, b in zip(spent, others, strict=False)]
    return median(ratios) if ratios else None


def judged(clock: str) -> bool:
    """Whether targets count by this clock: the processor's with one thread, where others' load does not show.

    With more threads, those that wait for work count as working, so there it is the wall's.
    """
    return clock == ("processor" if torch.get_num_threads() == 1 and not torch.cuda.is_available() else "wall")


def line(  # noqa: PLR0917 (the columns, in their order)
    benchmark: str, case: str, peer: str, metric: str, unit: str,
    ours: float | None, theirs: float | None, target: float | None = None, why: str = "",
) -> dict[str, Any]:  # fmt: skip
    """One line about something of which less is better: `ratio` is theirs over ours, `target` the least one."""
    ratio = theirs / ours if theirs and ours else None
    found = {
        "benchmark": benchmark,
        "case": case,
        "peer": peer,
        "metric": metric,
        "unit": unit,
        "ours": ours,
        "theirs": theirs,
        "ratio": ratio,
        "target": target,
        "met": None if ratio is None or target is None else ratio >= target,
    }
    return found if theirs is not None and ours is not None else found | {"reason": why}


def write(found: Mapping[str, Any]) -> None:
    """One JSON line on standard output."""
    sys.stdout.write(json.dumps(found) + "\n")
    sys.stdout.flush()


def growth(make: Callable[[], Callable[[], Any]]) -> tuple[int | None, str]:
    """Bytes a process grew by at the worst moment of making something and calling it twice, or why there is no number.

    Measured in a forked child with one thread. Call it before anything runs on several threads: a child has none of
    those its parent had.
    """

    def called_twice() -> None:
        call = make()
        call()
        call()

    return memory(lambda: called_twice, DEADLINE)


def memory(make: Callable[[], Callable[[], Any]], deadline: int, ceiling: int | None = None) -> tuple[int | None, str]:
    """Bytes a forked child with one thread grew by at the worst moment of one call, or why there is no number.

    Args:
      make: makes the call, in the child; what that takes is not counted.
      deadline: seconds after which the child is stopped.
      ceiling: bytes of address space the child may take.
    """
    if not Path("/proc/self/clear_refs").exists():
        return None, "needs Linux: the highest memory of a process is set back through /proc"
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        _measure(make, writer, deadline, ceiling)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    if not answer:
        return None, f"took over {deadline} s" if os.WTERMSIG(status) == signal.SIGALRM else f"killed by {status}"
    value, why = json.loads(answer)
    return value, why


def _give_back() -> None:
    """Returns to the system what lies free in the allocator: a call that takes it would not be seen to grow."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; others keep little
    if trim is not None:
        trim(0)


def _measure(make: Callable[[], Callable[[], Any]], writer: int, deadline: int, ceiling: int | None) -> None:
    """In the child: never returns."""
    gc.freeze()  # what the parent left is not collected here: it would make room that hides growth
    signal.alarm(deadline)
    if ceiling is not None:
        resource.setrlimit(resource.RLIMIT_AS, (ceiling, ceiling))
    os.dup2(2, 1)  # nothing but JSON goes to standard output
    torch.set_num_threads(1)
    try:
        call = make()
        _give_back()
        _, found = grown(call)
        answer: tuple[int | None, str] = (None if found is None else max(found, 1024), "")
    except BaseException as error:
        answer = (None, reason(error))
    os.write(writer, json.dumps(answer).encode())
    os._exit(0)
