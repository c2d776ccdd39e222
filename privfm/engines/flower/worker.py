"""A process that stays: state between messages, where every message comes in a fresh process.

Flower's deployment engine starts one `flwr-clientapp` process a message. Loading torch, a model and data in each
costs far more than the message's own work. So that process stays thin (Flower and the standard library) and hands
bytes to a worker on the same host, over a Unix domain socket: `call`. The first message starts the worker; it stays
while its owner lives, which is the SuperNode (`supernode_pid`), and no longer than `idle_seconds` without a call.

- One worker a (user, key, owner), calls one at a time, in the worker's main thread, in order of arrival. The key should
  name everything that what the worker remembers depends on: the run, the app's digest, the node.
- At most once: a call is repeated only as long as no worker took it. If a worker dies with it, `WorkerDied` is raised.
- Socket and log lie in a folder of mode 0700 of this user; both ends check that the other is the same user. Nothing
  is pickled: a call is the name of a function and bytes, its answer bytes, or an error's type and message.
- The worker inherits environment, working folder and `sys.path` of the process whose call started it.
- Linux only (`/proc`, peer credentials). Elsewhere `call` raises `WorkerUnavailable`: a ClientApp then does without.

This module imports the standard library and `privfm.checks` alone: it is what every message loads.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from privfm.checks import InvalidArgument, at_least, positive, require

LARGEST = 2**32  # bytes of one payload or answer: what is longer is a broken length, or no message for one round
LONGEST = 2_000_000.0  # seconds; the system counts milliseconds in 31 bits
HELLO = b"privfm worker 1\n"
RETURNED, RAISED = b"returned", b"raised"

_ATTEMPTS = 3
_PAUSE = 0.02  # seconds between two looks at a lock somebody else holds
# The worker's first lines. `-P` and the path given keep out what lies in the working folder by chance.
_BOOT = (
    "import json, sys; order = json.loads(sys.argv[1]); sys.path[:] = order.pop('sys_path'); "
    "from privfm.engines.flower.worker_main import serve; serve(**order)"
)


class WorkerFailed(RuntimeError):
    """A call gave no answer.

    Attributes:
      kind: the type's name of what the function raised; empty where the worker itself failed.
    """

    def __init__(self, reason: str, kind: str = "") -> None:
        super().__init__(f"{kind}: {reason}" if kind else reason)
        self.kind = kind


class WorkerDied(WorkerFailed):
    """The worker did not start, or ended in the middle of a call. The next call starts a new one."""


class WorkerUnavailable(RuntimeError):
    """There are no Unix domain sockets with peer credentials, or no `/proc`, on this system."""


def call(
    entry: str, key: str, payload: bytes, *, owner: int, idle_seconds: float = 900.0, start_seconds: float = 180.0
) -> bytes:
    """Runs a function of bytes in this user's worker for `key` and `owner`, which is started if there is none.

    There is no limit on how long the function may take, nor on the wait while the worker is busy with another call.
    A caller that goes away does not end the function it called.

    Args:
      entry: `module:function`, found by the worker's `sys.path`; the function takes bytes and returns bytes.
      key: which of the owner's workers.
      payload: at most `LARGEST` bytes.
      owner: process id; the worker leaves within about a second after this process is gone.
      idle_seconds: the worker leaves after as long without a call; the call that starts it decides.
      start_seconds: how long its start may take, and the wait for somebody else's start; `entry` is imported later.

    Raises:
      InvalidArgument: an argument cannot be used, or the folder for sockets is not this user's alone.
      WorkerFailed: the function raised (`kind` is the type's name), is not there, or gave no bytes.
      WorkerDied: the worker did not start, or ended before its answer.
      WorkerUnavailable: not on this system.
    """
    _check_call(entry, payload, idle_seconds, start_seconds)
    at_least("owner", owner, 1)
    birth = born(owner)
    require(birth is not None, f"owner={owner!r}: no such process; give a running one, such as supernode_pid()")
    name = hashlib.sha256(f"{owner}\0{birth}\0{key}".encode()).hexdigest()[:32]
    path = runtime_path()
    order = {"folder": str(path), "name": name, "owner": owner, "birth": birth, "idle_seconds": idle_seconds}
    with opened(path) as folder:
        for _ in range(_ATTEMPTS):
            connection = _connect(folder, name) or _start(folder, order, time.monotonic() + start_seconds)
            with connection:
                if _greeted(connection):
                    return _ask(connection, entry, payload, log=path / f"{name}.log")
    raise WorkerDied(
        f"{_ATTEMPTS} workers left before they took the call; idle_seconds={idle_seconds} may be too short"
    )


def evaluate(entry: str, payload: bytes) -> bytes:
    """What the function called `entry` returns; whatever it, or its import, raises passes through."""
    module, _, name = entry.partition(":")
    function: Any = import_module(module)
    for part in name.split("."):
        function = getattr(function, part)
    result = function(payload)
    require(isinstance(result, bytes), f"{entry} returned {type(result).__name__}: expected bytes")
    require(len(result) <= LARGEST, f"{entry} returned {len(result)} bytes: expected at most {LARGEST}")
    return bytes(result)


def supernode_pid() -> int:
    """The process to which this ClientApp belongs, to be the `owner` of a worker.

    Looks upwards from this process, nearest first, by command lines in `/proc`:

    | found | owner |
    |---|---|
    | `flower-supernode` (its child `flower-superexec` starts `flwr-clientapp`) | it |
    | only `flower-superexec` (`--isolation process`: started on its own) | it |
    | neither | the topmost ancestor below init, which may be a login shell; this process, if init is its parent |

    Raises:
      WorkerUnavailable: no `/proc`.
    """
    require_system()
    chain = [os.getpid()]
    while (parent := _status(chain[-1])[1]) > 0:
        chain.append(parent)
    for command in ("flower-supernode", "flower-superexec"):
        for pid in chain:
            if command in _command(pid):
                return pid
    return next((pid for pid in reversed(chain) if pid != 1), 1)


def require_system() -> None:
    """Raises `WorkerUnavailable` where workers cannot be had."""
    if not (hasattr(socket, "AF_UNIX") and hasattr(socket, "SO_PEERCRED") and Path("/proc/self/stat").exists()):
        raise WorkerUnavailable(
            f"{sys.platform}: a worker needs Unix domain sockets with SO_PEERCRED and /proc; leave "
            "persistent-worker out of the node's configuration: then every message loads everything again"
        )


def born(pid: int) -> int | None:
    """When a process started, in clock ticks since boot: with `pid`, its identity. None: it is gone, or a zombie."""
    state, _, birth = _status(pid)
    return None if state in ("", "Z", "X") else birth


def runtime_path() -> Path:
    """Where this user's sockets lie: `$XDG_RUNTIME_DIR/privfm` if there is such a folder, else `privfm-UID` in temp."""
    session = os.environ.get("XDG_RUNTIME_DIR", "")
    if session and Path(session).is_dir():
        return Path(session) / "privfm"
    from tempfile import gettempdir  # a tenth of this module's import, and seldom needed

    return Path(gettempdir()) / f"privfm-{os.geteuid()}"


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """Descriptor of the folder for sockets, made if there is none. Everything in it is reached by this descriptor.

    Raises:
      InvalidArgument: it is a link, no folder, somebody else's, or open to others.
    """
    hint = "remove it, or let XDG_RUNTIME_DIR or TMPDIR name a folder of yours"
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise InvalidArgument(f"{path} cannot be a folder for sockets ({error.strerror}); {hint}") from error
    try:
        found = os.fstat(descriptor)
        require(
            found.st_uid == os.geteuid() and not found.st_mode & 0o077,
            f"{path} belongs to user {found.st_uid} with mode {found.st_mode & 0o7777:o}: expected user "
            f"{os.geteuid()} and mode 700; {hint}",
        )
        yield descriptor
    finally:
        os.close(descriptor)


def address(folder: int, name: str) -> str:
    """Path of a socket in an opened folder: short whatever the folder's own path, which Linux limits to 107 bytes."""
    return f"/proc/self/fd/{folder}/{name}.socket"


def same_user(connection: socket.socket) -> bool:
    """Whether the process at the other end (for a caller: the one that listens) has this process's user id."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, user, _ = struct.unpack("3i", credentials)
    return bool(user == os.geteuid())


def send(connection: socket.socket, *frames: bytes) -> None:
    """Sends frames: eight bytes of length each, then the content. A timeout counts from the last progress."""
    for content in frames:
        for part in (len(content).to_bytes(8, "big"), content):
            rest = memoryview(part)
            while rest:
                rest = rest[connection.send(rest) :]


def receive(connection: socket.socket) -> bytes:
    """Receives one frame, into memory taken once.

    Raises:
      OSError: the other end closed, or made no progress in time; ConnectionError also for a length above `LARGEST`.
    """
    length = int.from_bytes(exactly(connection, 8), "big")
    if length > LARGEST:
        raise ConnectionError(f"a frame of {length} bytes was announced, at most {LARGEST} are taken")
    return bytes(exactly(connection, length))


def exactly(connection: socket.socket, length: int) -> bytearray:
    """Receives `length` bytes. Raises ConnectionError when the other end closes before."""
    buffer = bytearray(length)
    rest = memoryview(buffer)
    while rest:
        count = connection.recv_into(rest)
        if count == 0:
            raise ConnectionError("the other end closed the connection")
        rest = rest[count:]
    return buffer


_NO_ENTRY = "entry={!r}: expected 'module:function'"


def _is_entry(entry: str) -> bool:
    module, _, name = entry.partition(":")
    return all(part.isidentifier() for part in (*module.split("."), *name.split(".")))


def _check_call(entry: str, payload: bytes, idle_seconds: float, start_seconds: float) -> None:
    require_system()
    require(_is_entry(entry), _NO_ENTRY.format(entry))
    require(isinstance(payload, bytes), f"payload is {type(payload).__name__}: expected bytes")
    require(len(payload) <= LARGEST, f"payload of {len(payload)} bytes: expected at most {LARGEST}; send less at once")
    for name, seconds in {"idle_seconds": idle_seconds, "start_seconds": start_seconds}.items():
        positive(name, seconds)
        require(seconds <= LONGEST, f"{name}={seconds!r}: expected at most {LONGEST:.0f}")


def _connect(folder: int, name: str) -> socket.socket | None:
    """A connection to the worker, if it runs.

    Raises:
      WorkerFailed: somebody else listens there.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(address(folder, name))
        if not same_user(connection):
            raise WorkerFailed("the worker's socket is served by another user: not a byte was sent")
    except (FileNotFoundError, ConnectionError):  # none, or left behind by a worker that was killed
        connection.close()
        return None
    except BaseException:
        connection.close()
        raise
    return connection


def _greeted(connection: socket.socket) -> bool:
    """Waits until the worker takes the call; False if it left before, so that the call can be made again."""
    try:
        greeting = exactly(connection, len(HELLO))
    except ConnectionError:
        return False
    if greeting != HELLO:
        raise WorkerFailed(f"a worker of another version answered ({bytes(greeting)!r}); end it and call again")
    return True


def _ask(connection: socket.socket, entry: str, payload: bytes, log: Path) -> bytes:
    try:
        send(connection, entry.encode(), payload)
        status = receive(connection)
        if status == RETURNED:
            return receive(connection)
        kind, reason = receive(connection).decode(), receive(connection).decode()
    except ConnectionError as error:
        # The log itself stays on this host: the error's text may be sent on.
        raise WorkerDied(f"the worker ended in the middle of {entry} ({error}); see {log}") from error
    raise WorkerFailed(reason, kind)


def _start(folder: int, order: dict[str, Any], deadline: float) -> socket.socket:
    """Starts the worker, unless somebody else has meanwhile, and connects to it."""
    name = str(order["name"])
    with _locked(folder, deadline):
        if connection := _connect(folder, name):
            return connection
        with suppress(FileNotFoundError):
            os.unlink(f"{name}.socket", dir_fd=folder)
        log = Path(order["folder"]) / f"{name}.log"
        _launch(folder, order, log, deadline)
        if connection := _connect(folder, name):
            return connection
    raise WorkerDied(f"the worker ended as soon as it had started; see {log}")


@contextmanager
def _locked(folder: int, deadline: float) -> Iterator[None]:
    """Holds the lock under which this user's workers are started, one after the other."""
    import fcntl  # not on Windows, where this module can still be imported

    while True:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise WorkerDied("another start of a worker did not end within start_seconds") from None
            time.sleep(_PAUSE)
    try:
        yield
    finally:
        fcntl.flock(folder, fcntl.LOCK_UN)


def _launch(folder: int, order: dict[str, Any], log: Path, deadline: float) -> None:
    """Starts the worker's process and waits until it listens.

    The process started leads a new session, forks the worker into it and ends: so the worker is nobody's child here,
    leaves no zombie and never gets a terminal. It writes to the pipe once it listens.
    """
    import select
    import signal
    import subprocess  # only for the first message

    ready, worker_end = os.pipe()
    output = -1
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        output = os.open(log.name, flags, 0o600, dir_fd=folder)
        arguments = json.dumps(order | {"sys_path": sys.path, "ready": worker_end})
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", _BOOT, arguments],
            stdin=subprocess.DEVNULL, stdout=output, stderr=output, pass_fds=[worker_end], start_new_session=True,
        )  # fmt: skip
        os.close(worker_end)
        worker_end = -1
        try:
            listens = bool(select.select([ready], [], [], max(0.0, deadline - time.monotonic()))[0])
            if not listens or not os.read(ready, 1):
                why = "ended before it listened" if listens else "did not listen within start_seconds"
                raise WorkerDied(f"the worker {why}; see {log}")
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        finally:
            process.wait()
    except OSError as error:
        raise WorkerDied(f"{sys.executable} cannot be started with {log}: {error}") from error
    finally:
        for descriptor in {ready, output, worker_end} - {-1}:
            os.close(descriptor)


def _status(pid: int) -> tuple[str, int, int]:
    """State, parent and start of a process, fields 3, 4 and 22 of `/proc/PID/stat`; state is empty if it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return "", 0, 0
    fields = text.rpartition(b")")[2].split()  # the name in brackets before them may hold anything
    return fields[0].decode(), int(fields[1]), int(fields[19])


def _command(pid: int) -> list[str]:
    """Names of the program and of what an interpreter was given to run, without folders."""
    try:
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return []
    return [Path(os.fsdecode(argument)).name for argument in arguments[:3]]
