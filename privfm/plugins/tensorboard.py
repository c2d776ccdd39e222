"""A run's record as TensorBoard scalars, after the run or while it goes on.

    write_events(Path("results/private/seed-7"), Path("logs/private"), visibility)     # and again, for what is new

`visibility` is `privfm.experiment.visibility`. What it calls private stays out unless it is asked for: numbers of who
took part, norms, bytes and seconds are a simulation's own diagnostics, and no guarantee covers them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any, final

from privfm.checks import InvalidArgument, require
from privfm.federation.record import visibility as of_round
from privfm.files import read_json, writable, write_json
from privfm.reporting import RunFolder, epsilon_paragraph
from privfm.reporting.export import Visibility, visibility_of

MARK = "privfm-events.json"
"""What of the run was written into a folder of events already."""

NO_PRIVACY = "No differential privacy: no guarantee covers these numbers, against anybody."

Scalars = Iterator[tuple[str, int, float]]
"""Tag, step and value. A step counts rounds that were played: the first round's numbers are at 1."""


def write_events(run: Path, log_dir: Path, visibility: Visibility, *, released: bool = True) -> int:
    """Adds what is new in a run's record to a folder of TensorBoard events; nothing new changes nothing.

    | tag                                         | from                                        | when                |
    |---------------------------------------------|---------------------------------------------|---------------------|
    | `validation/...`, `utility`, `clip_bound`   | rows of evaluated rounds                    | each round          |
    | `bytes_up`, `seconds_training`, `kept`, ... | rows; private                               | with released=False |
    | `epsilon`                                   | the plan's curve over rounds                | when it is finished |
    | `test/...`                                  | the last model on the test split            | when it is finished |
    | `privacy` (a text)                          | every epsilon in full, or that there is none| when it is finished |

    Numbers that are missing or not finite are left out. Files are named by rounds and not, as usual, by host and
    process; mind the name of `log_dir`: that of a run folder itself (`seed-7`) tells the seed.

    Args:
      run: a run's folder, finished or not.
      log_dir: where events go; made where it is not there. One run's, written with the same `released`.
      visibility: name of a field -> `released`, `public` or `private`.
      released: leave private fields out. False: everything, for yourself.

    Returns:
      Scalars that were written.

    Raises:
      InvalidArgument: `run` is no run, or `log_dir` cannot be written, or holds events of another run or with other
        visibility.
      BrokenCheckpoint: the record is damaged.
    """
    folder = RunFolder(run)
    require((run / "config.json").is_file(), f"{run} is not a run: it holds no config.json")
    before = _Written.read(log_dir)
    rows = folder.rows()
    now = _Written(len(rows), folder.finished, released)
    before.require_fits(now, log_dir)

    def keep(name: str) -> bool:
        return not released or visibility_of(name, visibility) != "private"

    def keep_of_round(name: str) -> bool:  # a setting may be public under the name of a round's private count
        return keep(name) and (not released or visibility_of(name, of_round) != "private")

    found = [one for row in rows[before.rows :] for one in _of_row(row) if keep_of_round(one[0])]
    text = None
    if now.finished and not before.finished:
        summary = folder.summary()
        found += _of_summary(summary, keep)
        text = _statement(summary) if keep("epsilons") else None
    if now != before:
        with writable(log_dir):
            _write(found, text, log_dir, now)
    return len(found)


@final
@dataclass(frozen=True)
class _Written:
    """How much of a run a folder of events holds."""

    rows: int = 0
    finished: bool = False
    released: bool | None = None

    @classmethod
    def read(cls, log_dir: Path) -> _Written:
        if (log_dir / MARK).exists():
            return cls(**read_json(log_dir / MARK))
        foreign = sorted(path.name for path in log_dir.glob("*tfevents*"))
        require(
            not foreign, f"{log_dir} holds events of somebody else: {', '.join(foreign[:3])}; choose another folder"
        )
        return cls()

    def require_fits(self, now: _Written, log_dir: Path) -> None:
        """Refuses to go on with something else."""
        require(
            self.released in {None, now.released},
            f"{log_dir} was written with released={self.released}; choose another folder for released={now.released}",
        )
        require(
            self.rows <= now.rows and (now.finished or not self.finished),
            f"{log_dir} holds {self.rows} rounds of a run, this one has {now.rows}; choose another folder",
        )


def _of_row(row: Mapping[str, Any]) -> Scalars:
    step = int(row["round"]) + 1
    for name, value in row.items():
        if name != "round" and _number(value):
            yield name, step, float(value)


def _of_summary(summary: Mapping[str, Any], keep: Callable[[str], bool]) -> Scalars:
    if keep("epsilon_curve"):
        for after, epsilon in summary.get("epsilon_curve", []):
            if _number(epsilon):
                yield "epsilon", int(after), float(epsilon)
    rounds = int(summary["rounds"])
    for name, metric in summary.get("metrics", {}).items():
        if keep(f"metrics.{name}") and _number(metric["value"]):
            yield f"test/{name}", rounds, float(metric["value"])


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


def _statement(summary: Mapping[str, Any]) -> str:
    """Every epsilon in full; where there is none, that there is none."""
    records = [record for record in summary.get("epsilons", []) if record["epsilon"] is not None]
    if not records:
        return NO_PRIVACY
    return "\n\n".join(epsilon_paragraph(str(summary.get("title", "this run")), record) for record in records)


def _write(scalars: list[tuple[str, int, float]], text: str | None, log_dir: Path, now: _Written) -> None:
    """One file of events, whole or not at all: it is written elsewhere and takes its name at the end."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as reason:
        raise InvalidArgument(f"TensorBoard is not installed: {reason}; pip install 'privfm[tracking]'") from reason
    log_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=log_dir.parent) as scratch:
        with SummaryWriter(scratch) as writer:
            for tag, step, value in scalars:
                writer.add_scalar(tag, value, step)
            if text is not None:
                writer.add_text("privacy", text, now.rows)
        (file,) = Path(scratch).iterdir()
        file.rename(log_dir / f"events.out.tfevents.{now.rows:010d}.{'finished' if now.finished else 'running'}")
    write_json(log_dir / MARK, {"rows": now.rows, "finished": now.finished, "released": now.released})
