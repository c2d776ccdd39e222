"""What of a record may leave the machine.

Every field is `released` (covered by the privacy guarantee), `public` or `private` (diagnostics that only a simulation
has, and the seed, from which simulated noise could be drawn again).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from privfm.checks import InvalidArgument
from privfm.files import new_folder, write_atomically, write_json
from privfm.reporting.run_folder import CONFIG, ENVIRONMENT, POPULATION, ROUNDS, SUMMARY, RunFolder

Visibility = Callable[[str], str]

_NOTHING = object()


def everything_private(name: str) -> str:
    """The visibility of a record about which nothing is known: every field is private."""
    return "private"


def visibility_of(name: str, visibility: Visibility) -> str:
    """`released`, `public` or `private`; a field that `visibility` does not know is private."""
    try:
        found = visibility(name)
    except (LookupError, InvalidArgument):
        return "private"
    return found if found in ("released", "public") else "private"


def export_released(run: RunFolder, visibility: Visibility, destination: Path) -> Path:
    """Copies a run without its private fields.

    Configuration, environment, rows and summary are filtered alike. A nested field is judged by its dotted name
    (`epsilon.delta`, `versions.torch`); the elements of a list share the list's name, and
    an empty container is judged by its own. It fails closed: a field is
    copied only where `visibility` returns `released` or `public` for it. Mind the name of `destination`: that of a run
    folder itself (`seed-7`) tells the seed.

    Args:
      run: the run, finished or not.
      visibility: name of a field -> `released`, `public` or `private`.
      destination: a folder that does not exist yet, or is empty.

    Returns:
      `destination`.

    Raises:
      InvalidArgument: `destination` is not empty or cannot be written.
    """
    documents = {CONFIG: run.config(), ENVIRONMENT: run.environment(), POPULATION: run.population()}
    if run.finished:
        documents[SUMMARY] = run.summary()
    rows = [_visible("", row, visibility) for row in run.rows()]
    with new_folder(destination) as folder:
        write_atomically(folder / ROUNDS, "".join(f"{json.dumps(row)}\n" for row in rows if row is not _NOTHING))
        for name, document in documents.items():
            visible = _visible("", document, visibility)
            write_json(folder / name, {} if visible is _NOTHING else visible)
    return destination


def _visible(name: str, value: Any, visibility: Visibility) -> Any:
    """What of a field may be seen, else `_NOTHING`; a container of which nothing is left goes as a whole."""
    if isinstance(value, dict) and value:
        parts = {key: _visible(f"{name}.{key}" if name else key, part, visibility) for key, part in value.items()}
        return {key: part for key, part in parts.items() if part is not _NOTHING} or _NOTHING
    if isinstance(value, list) and value:
        elements = [_visible(name, part, visibility) for part in value]
        return [part for part in elements if part is not _NOTHING] or _NOTHING
    return value if visibility_of(name, visibility) != "private" else _NOTHING
