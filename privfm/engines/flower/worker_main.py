"""The other end of `privfm.engines.flower.worker`: the process that stays and runs functions of bytes."""

from __future__ import annotations

import os
import select
import signal
import socket
import traceback
from contextlib import suppress
from pathlib import Path
from threading import Lock, Thread
from typing import NoReturn, final

from privfm.engines.flower.worker import (
    HELLO,
    RAISED,
    RETURNED,
    address,
    born,
    evaluate,
    opened,
    receive,
    same_user,
    send,
)  # fmt: skip

POLL = 0.5  # seconds between two looks at the owner
TRANSFER_SECONDS = 60.0  # without progress, before a caller that neither sends, takes nor ends is given up


def serve(*, folder: str, name: str, owner: int, birth: int, idle_seconds: float, ready: int) -> NoReturn:
    """Becomes the worker called `name`: never returns.

    Must be the first thing in a process that leads a session and has one thread: its fork becomes the worker.

    Args:
      folder: where socket and log lie.
      name: of both files, without their endings.
      owner: process id; the worker leaves when this process is gone,
      birth: or another one has its id.
      idle_seconds: the worker leaves after as long without a call.
      ready: descriptor of a pipe, written to and closed once calls are taken.
    """
    if os.fork():
        os._exit(0)
    with opened(Path(folder)) as descriptor, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(address(descriptor, name))
        listener.listen()
        worker = _Worker(descriptor, name, listener)
        worker.watch(owner, birth)
        os.write(ready, b"1")
        os.close(ready)
        listener.settimeout(idle_seconds)
        while True:
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                worker.leave()
            with connection:
                worker.answer(connection)


@final
class _Worker:
    """A listening worker: one call at a time in the main thread, a second thread that knows when to leave."""

    def __init__(self, folder: int, name: str, listener: socket.socket) -> None:
        self.folder, self.name, self.listener = folder, name, listener
        self.connection: socket.socket | None = None
        self.leaving = Lock()
        self.inode = self._socket_inode()

    def answer(self, connection: socket.socket) -> None:
        """Runs what one caller asks for. Whatever goes wrong with caller or function, the worker stays."""
        self.connection = connection
        connection.settimeout(TRANSFER_SECONDS)
        try:
            if not same_user(connection):
                return
            connection.sendall(HELLO)
            entry, payload = receive(connection).decode(), receive(connection)
            reply = _run(entry, payload)
            del payload
            send(connection, *reply)
        except (OSError, UnicodeDecodeError):  # the caller went away, or is none
            traceback.print_exc()
        finally:
            self.connection = None

    def watch(self, owner: int, birth: int) -> None:
        """Starts the thread that ends this process on SIGTERM or without its owner, in the middle of a call too.

        The system's handler writes a signal's number to a socket as it comes, so that the main thread need not get to
        its next line first. A forked child has neither thread nor listener: signals mean to it what they usually do.
        """
        signals, written = socket.socketpair()
        written.setblocking(False)
        signal.signal(signal.SIGTERM, lambda *_: None)
        signal.set_wakeup_fd(written.fileno(), warn_on_full_buffer=False)
        # A child's SIGTERM must not be written to the socket it shares, however soon after the fork it comes.
        os.register_at_fork(before=_hold_sigterm, after_in_parent=_release_sigterm, after_in_child=self._forget)

        def look() -> None:
            while _lives(owner, birth):
                if select.select([signals], [], [], POLL)[0] and signal.SIGTERM in signals.recv(4096):
                    break
            self.leave()

        self.written = written
        Thread(target=look, name="owner", daemon=True).start()

    def leave(self) -> NoReturn:
        """Removes log and socket, ends what the functions left running, and ends at once: no `atexit`.

        The socket goes while it still listens: whoever finds none, or no one listening, may take its name.
        """
        self.leaving.acquire()  # never released: only one thread gets here
        try:
            if self._socket_inode() == self.inode:
                for ending in ("log", "socket"):
                    with suppress(FileNotFoundError):  # somebody else removed it
                        os.unlink(f"{self.name}.{ending}", dir_fd=self.folder)
        finally:
            os.killpg(os.getpgrp(), signal.SIGTERM)
            os._exit(0)

    def _socket_inode(self) -> int | None:
        try:
            return os.stat(f"{self.name}.socket", dir_fd=self.folder).st_ino
        except OSError:
            return None

    def _forget(self) -> None:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self.listener.close()  # a child that outlives a killed worker must not seem to be it
        if self.connection:
            self.connection.close()
        _release_sigterm()


def _lives(pid: int, birth: int) -> bool:
    try:
        return born(pid) == birth
    except OSError:  # nothing known, as when a function has opened too many files: look again
        return True


def _hold_sigterm() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])


def _release_sigterm() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])


def _run(entry: str, payload: bytes) -> tuple[bytes, ...]:
    try:
        return RETURNED, evaluate(entry, payload)
    except BaseException as error:  # also `sys.exit` in a function: the worker is not the function's to end
        traceback.print_exc()
        return RAISED, type(error).__name__.encode(), str(error).encode(errors="backslashreplace")
