"""Several processes encrypt one client's vector: the encryption library holds Python's lock, so threads do not help.

A worker gets public bytes and numbers, and gives ciphertexts back; it never sees a secret key. Encryption draws its
randomness from the library's own generator, seeded by the operating system in each process, so a result cannot be
repeated with one process or with many; what it decrypts to is the same.
"""

from __future__ import annotations

from atexit import register
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import pairwise
from multiprocessing import get_all_start_methods, get_context
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from privfm.checks import ClientFailed, at_least

Arguments = TypeVar("Arguments")
Encrypt = Callable[[Arguments, NDArray[Any]], bytes]
"""`encrypt(arguments, values) -> one message`: a function of a module's top level, which other processes can import."""

_pools: dict[int, ProcessPoolExecutor] = {}


def encrypted(
    encrypt: Encrypt[Arguments], arguments: Arguments, chunks: Sequence[NDArray[Any]], processes: int
) -> list[bytes]:
    """`[encrypt(arguments, chunk) for chunk in chunks]`, worked off by several processes.

    Args:
      encrypt: see `Encrypt`. What it makes of `arguments` (a parsed key) it should keep: it is called once a chunk.
      arguments: public, picklable, the same for all chunks. They travel once for each process.
      chunks: what to encrypt, in order.
      processes: how many; 1 works in this process and starts none. Processes are kept between calls (a new one
        takes seconds: it imports this package) and end with the program, or with `close`.

    Raises:
      ClientFailed: a process died, for instance for lack of memory. The next call starts afresh.
      InvalidArgument: processes is no whole number >= 1.
    """
    at_least("processes", processes, 1)
    workers = min(processes, len(chunks))
    if workers <= 1:
        return _in_order(encrypt, arguments, chunks)
    bounds = [round(i) for i in np.linspace(0, len(chunks), workers + 1)]
    pool = _pool(processes, encrypt.__module__)
    try:
        jobs = [pool.submit(_in_order, encrypt, arguments, chunks[low:high]) for low, high in pairwise(bounds)]
        return [message for job in jobs for message in job.result()]
    except BrokenProcessPool as error:
        close()
        raise ClientFailed("an encrypting process died; give it more memory or take processes=1") from error


@register
def close() -> None:
    """Ends all processes; the next call that needs some starts new ones."""
    while _pools:
        _pools.popitem()[1].shutdown(cancel_futures=True)


def _pool(processes: int, module: str) -> ProcessPoolExecutor:
    """Forked from a clean process that has imported the module, not from this one, whose threads may hold locks."""
    if processes not in _pools:
        clean = "forkserver" in get_all_start_methods()
        context = get_context("forkserver" if clean else "spawn")
        if clean:
            context.set_forkserver_preload([module])  # once for all processes; it takes seconds
        _pools[processes] = ProcessPoolExecutor(processes, context)
    return _pools[processes]


def _in_order(encrypt: Encrypt[Arguments], arguments: Arguments, chunks: Sequence[NDArray[Any]]) -> list[bytes]:
    return [encrypt(arguments, chunk) for chunk in chunks]
