"""The record of one run: a folder that is safe to kill at any moment and safe to reopen.

- `config.json`: the resolved configuration, written once;
- `population.json`: what of the data an epsilon depends on: trained values, and sizes of clients where a plan makes
  them public;
- `env.json`: under what it ran (see `privfm.reporting.environment`);
- `rounds.jsonl`: one flat row a round, each flushed to the disk; units stand in the names (`bytes_up`);
- `summary.json`: written last; a run without it is unfinished.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any, final

from privfm.checks import BrokenCheckpoint, InvalidArgument, at_least, require
from privfm.files import new_folder, read_json, writable, write_atomically, write_json

Scalar = float | int | str | bool | None

CONFIG, ENVIRONMENT, ROUNDS, SUMMARY = "config.json", "env.json", "rounds.jsonl", "summary.json"
POPULATION = "population.json"


@final
@dataclass(frozen=True)
class RunFolder:
    """One run on the disk.

    `RunFolder(path)` reads a run that is there; `RunFolder.open` makes or reopens one in order to write.

    Attributes:
      path: the folder.
    """

    path: Path

    @classmethod
    def open(cls, path: Path, config: Mapping[str, Any], environment: Mapping[str, Any]) -> RunFolder:
        """Makes the folder, or reopens a run of the same configuration, finished or not.

        A last line that a kill cut off is dropped. An unfinished run reopened under another environment keeps the
        first one and lists the later ones under `resumed`.

        Args:
          path: the folder; parents are made.
          config: the resolved configuration, nested plain values.
          environment: what `describe_environment` returns.

        Raises:
          InvalidArgument: `config` is not plain JSON, or the folder cannot be written, holds something else, or holds
            a run of another configuration. The run's files are untouched then.
          BrokenCheckpoint: the run's own files are damaged.
        """
        config, environment = _plain("config", config), _plain("environment", environment)
        run = cls(path)
        if not (path / CONFIG).exists():
            with new_folder(path) as folder:
                write_json(folder / CONFIG, config)
                write_json(folder / ENVIRONMENT, environment)
            return run
        _require_same(path, recorded=run.config(), given=config)
        if not run.finished:
            with writable(path):
                tempfile.TemporaryFile(dir=path).close()
                run._drop_torn_line()
                run._note_environment(environment)
        return run

    def require_same(self, config: Mapping[str, Any]) -> None:
        """Looks, and changes nothing.

        Raises:
          InvalidArgument: a run of another configuration is here.
        """
        if (self.path / CONFIG).exists():
            _require_same(self.path, recorded=self.config(), given=_plain("config", config))

    @property
    def finished(self) -> bool:
        """Whether the run came to its end: `summary.json` is there."""
        return (self.path / SUMMARY).exists()

    def config(self) -> dict[str, Any]:
        """The resolved configuration."""
        return read_json(self.path / CONFIG)

    def describe(self, population: Mapping[str, Any]) -> None:
        """Writes what of the data an epsilon depends on; the same again changes nothing.

        Raises:
          InvalidArgument: a run of other data is here.
        """
        given = _plain("population", population)
        if (self.path / POPULATION).exists():
            _require_same(self.path, recorded=self.population(), given=given)
        else:
            write_json(self.path / POPULATION, given)

    def population(self) -> dict[str, Any]:
        """What of the data an epsilon depends on; empty before the run has read them."""
        path = self.path / POPULATION
        return read_json(path) if path.exists() else {}

    def environment(self) -> dict[str, Any]:
        """Under what the run was made; later environments of a resumed run under `resumed`."""
        return read_json(self.path / ENVIRONMENT)

    def summary(self) -> dict[str, Any]:
        """What the run came to.

        Raises:
          InvalidArgument: the run is not finished.
        """
        require(self.finished, f"{self.path} is not finished; run it again to resume it")
        return read_json(self.path / SUMMARY)

    @property
    def rounds(self) -> int:
        """Whole rows that are there, without reading what is in them."""
        return len(self._lines())

    def rows(self) -> list[dict[str, Scalar]]:
        """The rows in the order they were written; a torn last line is left out.

        Raises:
          BrokenCheckpoint: a whole line is not a JSON object.
        """
        return [self._row(number, line) for number, line in enumerate(self._lines(), start=1)]

    def append(self, row: Mapping[str, Scalar]) -> None:
        """Adds the row of one round; it is on the disk when this returns. A number that is not finite becomes null.

        Raises:
          InvalidArgument: the row is not flat, or the run is finished.
        """
        self._require_unfinished()
        line = json.dumps({name: _scalar(name, value) for name, value in row.items()}, allow_nan=False)
        with (self.path / ROUNDS).open("a", encoding="utf-8", newline="\n") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())

    def truncate(self, rounds: int) -> None:
        """Keeps the first `rounds` rows, in one step: what came after the checkpoint from which a run resumes goes.

        Raises:
          InvalidArgument: the run is finished.
          BrokenCheckpoint: fewer rows are there.
        """
        at_least("rounds", rounds, 0)
        self._require_unfinished()
        lines = self._lines()
        if len(lines) < rounds:
            raise BrokenCheckpoint(
                f"{self.path / ROUNDS} holds {len(lines)} of the checkpoint's {rounds} rounds; start in another folder"
            )
        write_atomically(self.path / ROUNDS, "".join(f"{line}\n" for line in lines[:rounds]))

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Writes the summary, which ends the run. A number that is not finite becomes null.

        Raises:
          InvalidArgument: the run is finished already, or the summary is not plain JSON.
        """
        self._require_unfinished()
        write_json(self.path / SUMMARY, _plain("summary", _finite_or_null(summary)))

    def _require_unfinished(self) -> None:
        require(not self.finished, f"{self.path} is a finished run and takes nothing more; use another folder")

    def _lines(self) -> list[str]:
        """The whole lines: whatever follows the last newline was cut off."""
        path = self.path / ROUNDS
        whole, newline, _ = path.read_bytes().rpartition(b"\n") if path.exists() else (b"", b"", b"")
        return whole.decode("utf-8", errors="replace").split("\n") if newline else []

    def _row(self, number: int, line: str) -> dict[str, Scalar]:
        try:
            row = json.loads(line)
        except ValueError as error:
            raise BrokenCheckpoint(f"{self.path / ROUNDS}, line {number}: {error}") from error
        if not isinstance(row, dict):
            raise BrokenCheckpoint(f"{self.path / ROUNDS}, line {number}: no JSON object")
        return row

    def _drop_torn_line(self) -> None:
        """Else the next row would be glued to it."""
        path = self.path / ROUNDS
        if path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n"):
            self.truncate(len(self._lines()))

    def _note_environment(self, environment: dict[str, Any]) -> None:
        first = self.environment()
        later = first.pop("resumed", [])
        if environment not in [first, *later]:
            write_json(self.path / ENVIRONMENT, {**first, "resumed": [*later, environment]})


def _plain(name: str, value: Mapping[str, Any]) -> dict[str, Any]:
    """The value as it will be read back from JSON (tuples become lists), so that comparisons hold."""
    try:
        plain: dict[str, Any] = json.loads(json.dumps(dict(value), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise InvalidArgument(f"{name} must hold plain, finite values that JSON knows: {error}") from error
    return plain


def _scalar(name: str, value: Scalar) -> Scalar:
    require(
        isinstance(name, str) and (value is None or isinstance(value, float | int | str)),
        f"row[{name!r}]={value!r}: a row is flat, expected a number, a string, a truth value or None",
    )
    return None if isinstance(value, float) and not isfinite(value) else value


def _finite_or_null(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite_or_null(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite_or_null(part) for part in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def _require_same(path: Path, recorded: dict[str, Any], given: dict[str, Any]) -> None:
    difference = _first_difference("", recorded, given)
    if difference:
        raise InvalidArgument(
            f"{path} holds a run of another configuration: {difference}; "
            "choose another folder, or give the recorded configuration to resume it"
        )


def _first_difference(name: str, recorded: Any, given: Any) -> str:
    """Names the first key, dotted, in which two configurations differ; empty when they are equal."""
    if isinstance(recorded, dict) and isinstance(given, dict):
        for key in [*given, *(key for key in recorded if key not in given)]:
            dotted = f"{name}.{key}" if name else key
            if key not in given or key not in recorded:
                where, only = ("the record", recorded) if key in recorded else ("the given configuration", given)
                return f"{dotted}={only[key]!r} stands in {where} only"
            if found := _first_difference(dotted, recorded[key], given[key]):
                return found
        return ""
    return "" if recorded == given else f"{name} is {recorded!r} in the record and {given!r} now"
