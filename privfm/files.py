"""Files and folders that are there whole or not at all, whatever kills the process in between."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from privfm.checks import BrokenCheckpoint, InvalidArgument, require


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file in one step: a temporary file beside it reaches the disk, then takes the name."""
    partial = _beside(path)
    try:
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, value: object) -> None:
    """Writes a value as indented JSON, in one step."""
    write_atomically(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
      BrokenCheckpoint: the file is missing, cut off or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BrokenCheckpoint(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise BrokenCheckpoint(f"{path} holds no JSON object")
    return value


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Gives a folder beside `path` to fill, which takes the name `path` when the block ends without an error.

    Raises:
      InvalidArgument: `path` is there and not empty, or cannot be written.
    """
    with writable(path):
        taken = path.exists() and (not path.is_dir() or any(path.iterdir()))
        require(not taken, f"{path} is not an empty folder; choose another")
        partial = _beside(path)
        partial.mkdir(parents=True)
        try:
            yield partial
            partial.replace(path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def writable(path: Path) -> Iterator[None]:
    """Turns the system's errors while writing at `path` into `InvalidArgument`."""
    try:
        yield
    except OSError as error:
        raise InvalidArgument(f"{path} cannot be written ({error.strerror}); choose another folder") from error


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.partial")
