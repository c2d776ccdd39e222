"""A worker that stays between Flower's processes: what it promises about state, errors, ends and who may talk to it."""

import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from privfm.checks import InvalidArgument
from privfm.engines.flower import worker, worker_main
from privfm.engines.flower.worker import (
    WorkerDied,
    WorkerFailed,
    WorkerUnavailable,
    born,
    call,
    opened,
    runtime_path,
    supernode_pid,
)  # fmt: skip

ROOT = Path(__file__).parents[2]
DEADLINE = 20.0  # seconds; a hung machine's, not an expectation
MARK = "PRIVFM_TEST_WORKER"

FUNCTIONS = """
import os, subprocess, sys, time

calls = 0

def count(payload):
    global calls
    calls += 1
    return b"%d %d" % (os.getpid(), calls)

def reverse(payload):
    return payload[::-1]

def environment(payload):
    print("said in the worker", flush=True)
    return os.environ[payload.decode()].encode()

def fail(payload):
    raise ZeroDivisionError(payload.decode())

def leave(payload):
    sys.exit(payload.decode())

def die(payload):
    os._exit(3)

def text(payload):
    return "text"

def announce_and_block(fifo):
    child = subprocess.Popen(["sleep", "60"])
    with open(fifo, "wb") as file:
        file.write(b"%d %d" % (os.getpid(), child.pid))
    time.sleep(60)

def meet(fifo):
    with open(fifo, "wb") as file:
        file.write(b"%d" % os.getpid())
    with open(fifo, "rb") as file:
        return file.read()

def fork(payload):
    child = os.fork()
    if child == 0:
        time.sleep(60)
    return b"%d %d" % (os.getpid(), child)
"""


@pytest.fixture(scope="module")
def owner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """A process to own this module's workers. When it has gone, none of the module's processes may be left."""
    folder = tmp_path_factory.mktemp("functions")
    (folder / "toy_functions.py").write_text(FUNCTIONS)
    mark = uuid4().hex
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(tmp_path_factory.mktemp("runtime")))
        patch.setenv(MARK, mark)
        patch.syspath_prepend(folder)
        with opened(runtime_path()), sleeper() as process:
            yield process.pid
        for pid in marked(mark):
            wait_until_gone(pid)
        assert list(runtime_path().glob("*.socket")) == []


@contextmanager
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process that does nothing, killed when the block ends."""
    with subprocess.Popen(["sleep", "600"]) as process:
        try:
            yield process
        finally:
            process.kill()


def marked(mark: str) -> list[int]:
    """Other processes that inherited this test run's mark."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if f"{MARK}={mark}".encode() in environment and int(folder.name) != os.getpid():
            found.append(int(folder.name))
    return found


def wait_until_gone(pid: int) -> None:
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([descriptor], [], [], DEADLINE)[0], f"process {pid} is still there"
    finally:
        os.close(descriptor)


def count(key: str, owner: int, **options: float) -> tuple[int, int]:
    """Process and number of calls, as the worker counts them."""
    pid, calls = call("toy_functions:count", key, b"", owner=owner, **options).split()
    return int(pid), int(calls)


def announced(fifo: Path) -> list[int]:
    """The numbers a function writes to `fifo`, once it has got there."""
    descriptor = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    assert select.select([descriptor], [], [], DEADLINE)[0], "the function was not called"
    os.set_blocking(descriptor, True)
    with os.fdopen(descriptor, "rb") as file:
        return [int(number) for number in file.read().split()]


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / "fifo")
    return tmp_path / "fifo"


@pytest.mark.parametrize("payload", [b"", b"abc", bytes(range(256)), os.urandom(50 << 20)], ids=len)
def test_round_trip(owner: int, payload: bytes) -> None:
    assert call("toy_functions:reverse", "shared", payload, owner=owner) == payload[::-1]


def test_state_stays_in_a_process_of_its_own(owner: int) -> None:
    first, second = count("state", owner), count("state", owner)
    assert (first[1], second[1]) == (1, 2)
    assert first[0] == second[0] != os.getpid()
    assert os.getsid(first[0]) != os.getsid(0)


def test_a_worker_for_each_key_and_owner(owner: int) -> None:
    with sleeper() as other:
        found = [count("one", owner), count("two", owner), count("one", other.pid), count("one", owner)]
    assert [calls for _, calls in found] == [1, 1, 1, 2]
    assert len({pid for pid, _ in found}) == 3
    wait_until_gone(found[2][0])


def test_environment_is_inherited_and_output_kept_private(owner: int) -> None:
    assert call("toy_functions:environment", "environment", MARK.encode(), owner=owner).decode() == os.environ[MARK]
    logs = [path for path in runtime_path().glob("*.log") if "said in the worker" in path.read_text()]
    assert [path.stat().st_mode & 0o777 for path in logs] == [0o600]
    assert runtime_path().stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    ("name", "kind", "reason"),
    [
        ("toy_functions:fail", "ZeroDivisionError", "grün"),
        ("toy_functions:leave", "SystemExit", "grün"),
        ("toy_functions:missing", "AttributeError", "module 'toy_functions' has no attribute 'missing'"),
        ("toy_missing:count", "ModuleNotFoundError", "No module named 'toy_missing'"),
        ("toy_functions:text", "InvalidArgument", "toy_functions:text returned str: expected bytes"),
    ],
)
def test_errors_travel_and_the_worker_stays(owner: int, name: str, kind: str, reason: str) -> None:
    before = count("errors", owner)
    with pytest.raises(WorkerFailed) as caught:
        call(name, "errors", "grün".encode(), owner=owner)
    assert caught.value.kind == kind
    assert str(caught.value) == f"{kind}: {reason}"
    assert count("errors", owner) == (before[0], before[1] + 1)


def test_dead_worker_is_an_error_once_and_then_replaced(owner: int) -> None:
    before = count("dead", owner)
    with pytest.raises(WorkerDied, match="in the middle of toy_functions:die"):
        call("toy_functions:die", "dead", b"", owner=owner)
    wait_until_gone(before[0])
    after = count("dead", owner)
    assert after[0] != before[0]
    assert after[1] == 1


def test_killed_between_calls_is_replaced_without_an_error(owner: int) -> None:
    """Also where a forked child outlives the worker: it must not hold the worker's place."""
    pid, child = map(int, call("toy_functions:fork", "killed", b"", owner=owner).split())
    os.kill(pid, signal.SIGKILL)
    wait_until_gone(pid)
    assert born(child) is not None
    after = count("killed", owner)
    os.kill(child, signal.SIGKILL)
    assert after[0] != pid
    assert after[1] == 1


def test_signal_to_a_forked_child_is_not_the_workers(owner: int) -> None:
    pid, child = map(int, call("toy_functions:fork", "forked", b"", owner=owner).split())
    descriptor = os.pidfd_open(child)
    os.kill(child, signal.SIGTERM)
    assert select.select([descriptor], [], [], DEADLINE)[0]
    os.close(descriptor)
    assert count("forked", owner) == (pid, 1)


def test_many_at_once_start_one_worker(owner: int) -> None:
    code = (
        "import sys; from privfm.engines.flower.worker import call; "
        f"sys.stdout.buffer.write(call('toy_functions:count', 'many', b'', owner={owner}))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    processes = [
        subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment, stdout=subprocess.PIPE)
        for _ in range(4)
    ]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: count("many", owner), range(8)))
    for process in processes:
        output, _ = process.communicate(timeout=DEADLINE)
        pid, calls = map(int, output.split())
        found.append((pid, calls))
    assert len({pid for pid, _ in found}) == 1
    assert sorted(calls for _, calls in found) == list(range(1, 13))


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
def test_leaves_when_its_owner_is_gone(busy: bool, owner: int, fifo: Path) -> None:
    with sleeper() as mine, ThreadPoolExecutor(1) as pool:
        pids = [count("orphan", mine.pid)[0]]
        if busy:
            block = os.fsencode(fifo)
            pending = pool.submit(call, "toy_functions:announce_and_block", "orphan", block, owner=mine.pid)
            pids = announced(fifo)
        assert all(born(pid) for pid in pids)
        mine.kill()
        mine.wait()
        for pid in pids:
            wait_until_gone(pid)
        if busy:
            with pytest.raises(WorkerDied):
                pending.result()


def test_an_owner_not_yet_waited_for_is_gone(owner: int) -> None:
    with sleeper() as mine:
        pid, _ = count("zombie", mine.pid)
        mine.kill()
        wait_until_gone(pid)
        with pytest.raises(InvalidArgument, match="no such process"):
            count("zombie", mine.pid)


def test_sigterm_ends_it_at_once_with_what_it_started(owner: int, fifo: Path) -> None:
    before = set(runtime_path().iterdir())
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(call, "toy_functions:announce_and_block", "term", os.fsencode(fifo), owner=owner)
        pid, child = announced(fifo)
        assert len(set(runtime_path().iterdir()) - before) == 2
        os.kill(pid, signal.SIGTERM)
        wait_until_gone(pid)
        wait_until_gone(child)
        with pytest.raises(WorkerDied):
            pending.result()
    assert set(runtime_path().iterdir()) == before


def test_leaves_after_idle_seconds(owner: int) -> None:
    before = set(runtime_path().iterdir())
    pid, _ = count("idle", owner, idle_seconds=0.2)
    wait_until_gone(pid)
    assert set(runtime_path().iterdir()) == before
    assert count("idle", owner)[0] != pid


def test_caller_that_goes_away_costs_the_worker_nothing(owner: int, fifo: Path) -> None:
    before = count("away", owner)
    code = (
        "from privfm.engines.flower.worker import call; "
        f"call('toy_functions:meet', 'away', {os.fsencode(fifo)!r}, owner={owner})"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT) as caller:
        assert announced(fifo) == [before[0]]
        caller.kill()
    fifo.write_bytes(b"an answer to nobody")
    assert count("away", owner) == (before[0], before[1] + 1)


def test_folder_open_to_others_is_refused(owner: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    (tmp_path / "privfm").mkdir()
    (tmp_path / "privfm").chmod(0o710)
    with pytest.raises(InvalidArgument, match=r"with mode 710: expected user \d+ and mode 700; remove it"):
        count("folder", owner)
    assert list((tmp_path / "privfm").iterdir()) == []


def test_folder_of_somebody_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "privfm"
    with opened(path):
        pass
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    expected = f"belongs to user {user} with mode 700: expected user {user + 1}"
    with pytest.raises(InvalidArgument, match=expected), opened(path):
        pass


@pytest.mark.parametrize("kind", ["link", "file", "parent"])
def test_no_folder_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "privfm"
    if kind == "link":
        (tmp_path / "real").mkdir(mode=0o700)
        path.symlink_to(tmp_path / "real")
    elif kind == "file":
        path.touch()
    else:
        path = tmp_path / "missing" / "privfm"
    with pytest.raises(InvalidArgument, match="cannot be a folder for sockets"), opened(path):
        pass


def test_folder_in_temp_without_a_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    assert runtime_path() == tmp_path / f"privfm-{os.geteuid()}"
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "logged_out"))
    assert runtime_path() == tmp_path / f"privfm-{os.geteuid()}"


def test_neither_end_talks_to_another_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(tmp_path / "privfm") as folder, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(worker.address(folder, "x"))
        listener.listen()
        accepted = worker._connect(folder, "x")  # the control: one's own listener is taken
        assert accepted is not None
        accepted.close()
        there = worker_main._Worker(folder, "x", listener)
        user = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: user + 1)
        with pytest.raises(WorkerFailed, match="served by another user"):
            worker._connect(folder, "x")
    ours, theirs = socket.socketpair()
    with ours, theirs:
        there.answer(theirs)
        theirs.close()
        assert ours.recv(100) == b""  # no greeting


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_credentials_are_those_of_the_one_who_listens(tmp_path: Path) -> None:
    with opened(tmp_path / "privfm") as folder, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(worker.address(folder, "x"))
        os.seteuid(65534)
        listener.listen()
        os.seteuid(0)
        with pytest.raises(WorkerFailed, match="served by another user"):
            worker._connect(folder, "x")


def test_only_a_worker_that_greets_gets_a_call(owner: int, monkeypatch: pytest.MonkeyPatch) -> None:
    count("greeting", owner)
    monkeypatch.setattr(worker, "HELLO", b"privfm worker 2\n")
    with pytest.raises(WorkerFailed, match="another version answered"):
        count("greeting", owner)


def test_size_limit(owner: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "LARGEST", 100)
    assert len(call("toy_functions:reverse", "size", bytes(100), owner=owner)) == 100
    with pytest.raises(InvalidArgument, match="payload of 101 bytes: expected at most 100"):
        call("toy_functions:reverse", "size", bytes(101), owner=owner)
    with pytest.raises(InvalidArgument, match="returned 101 bytes: expected at most 100"):
        worker.evaluate("toy_functions:reverse", bytes(101))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        worker.send(ours, bytes(101))
        with pytest.raises(ConnectionError, match="a frame of 101 bytes was announced"):
            worker.receive(theirs)


def test_worker_that_cannot_start(owner: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "missing"))
    with pytest.raises(WorkerDied, match="missing cannot be started"):
        count("start", owner)
    for name, body, error in [
        ("ends", "echo no worker >&2", "ended before it listened"),
        ("hangs", "exec sleep 60", "did not listen within start_seconds"),
    ]:
        script = tmp_path / name
        script.write_text(f"#!/bin/sh\n{body}\n")
        script.chmod(0o700)
        monkeypatch.setattr(sys, "executable", str(script))
        with pytest.raises(WorkerDied, match=error) as caught:
            count("start", owner, start_seconds=0.5 if name == "hangs" else DEADLINE)
        log = Path(str(caught.value).rpartition("see ")[2])
        assert log.read_text() == "no worker\n"  # kept on this host, never part of the message
    monkeypatch.undo()
    assert count("start", owner)[1] == 1


def test_systems_without_workers_say_so(owner: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(socket, "SO_PEERCRED")
    with pytest.raises(WorkerUnavailable, match="leave persistent-worker out"):
        count("system", owner)
    with pytest.raises(WorkerUnavailable):
        supernode_pid()
    assert worker.evaluate("toy_functions:reverse", b"abc") == b"cba"
    with pytest.raises(ZeroDivisionError, match="why"):
        worker.evaluate("toy_functions:fail", b"why")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"entry": "toy_functions"}, "expected 'module:function'"),
        ({"entry": "toy functions:count"}, "expected 'module:function'"),
        ({"entry": "toy_functions:count()"}, "expected 'module:function'"),
        ({"payload": "text"}, "payload is str: expected bytes"),
        ({"owner": 0}, "owner=0"),
        ({"owner": 2**31 - 1}, "no such process"),
        ({"idle_seconds": 0.0}, "idle_seconds=0.0"),
        ({"idle_seconds": float("inf")}, "idle_seconds=inf"),
        ({"idle_seconds": 1e7}, "idle_seconds=10000000.0: expected at most 2000000"),
        ({"start_seconds": -1.0}, "start_seconds=-1.0"),
    ],
    ids=str,
)
def test_bad_input(owner: int, change: dict[str, Any], message: str) -> None:
    arguments = {"entry": "toy_functions:count", "key": "bad", "payload": b"", "owner": owner} | change
    before = set(runtime_path().iterdir())
    with pytest.raises(InvalidArgument) as caught:
        call(**arguments)
    assert message in str(caught.value)
    assert set(runtime_path().iterdir()) == before


CHAIN = """#!{python}
import os, subprocess, sys
print(os.path.basename(sys.argv[0]), os.getpid(), flush=True)
if sys.argv[1:]:
    subprocess.run(sys.argv[1:], check=True)
else:
    from privfm.engines.flower.worker import supernode_pid
    print("found", supernode_pid(), flush=True)
"""


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["flower-supernode", "flower-superexec", "flwr-clientapp"], "flower-supernode"),
        (["flower-superexec", "flwr-clientapp"], "flower-superexec"),
        (["flower-supernode", "shell", "flower-supernode", "flwr-clientapp"], "flower-supernode"),
    ],
    ids=["supernode", "superexec", "nested"],
)
def test_owner_of_a_client_app(tmp_path: Path, names: list[str], expected: str) -> None:
    paths = [tmp_path / name for name in names]
    for path in paths:
        path.write_text(CHAIN.format(python=sys.executable))
        path.chmod(0o700)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(paths, env=environment, capture_output=True, text=True, check=True)
    lines = [line.split() for line in result.stdout.splitlines()]
    pids = {name: int(pid) for name, pid in lines}  # the last of a name: the nearest
    assert len(lines) == len(names) + 1
    assert pids["found"] == pids[expected]


def test_owner_without_flower_is_the_top_below_init() -> None:
    pid = supernode_pid()
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    parent = next(int(line.split()[1]) for line in status if line.startswith("PPid:"))
    assert pid != 1
    assert parent in (0, 1)
    assert born(pid) is not None


def test_a_thin_process_loads_nothing_but_the_standard_library() -> None:
    code = (
        "import sys; before = set(sys.modules); import privfm.engines.flower.worker; "
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["privfm"]
