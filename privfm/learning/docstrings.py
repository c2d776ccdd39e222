"""Real sentences that every installation holds: the docstrings of scientific Python, read as data."""

from __future__ import annotations

import ast
import gc
import json
import os
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final, final

import torch

from privfm.checks import InvalidArgument, at_least, require
from privfm.contracts import DataSource, Table

FORMAT: Final = 1
"""Raised whenever the code below would read other sentences from the same files: older caches are then left alone."""

SHORTEST, LONGEST = 30, 400  # characters
STANDARD_LIBRARY = "stdlib"
PACKAGES = {"numpy": "numpy", "scipy": "scipy", "scikit-learn": "sklearn", "sympy": "sympy", "networkx": "networkx"}
"""Folder in site-packages, by the name of the distribution."""

LIBRARIES: tuple[str, ...] = (STANDARD_LIBRARY, *PACKAGES)
"""The labels, in order. A sentence of several libraries belongs to the first."""

_SKIPPED = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
_BLOCKS = ("body", "handlers", "orelse", "finalbody", "cases")  # where statements hold further statements
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)

Row = tuple[str, str, str]
"""Sentence, library, client."""


@final
@dataclass(frozen=True)
class Docstrings(DataSource):
    """Which library does a sentence document? The first paragraph of every docstring of six libraries as installed.

    The standard library, numpy, scipy, scikit-learn, sympy and networkx; the natural clients are their top-level
    modules (`email`, `scipy.stats`). Files are parsed and never imported; folders of tests are left out. White space is
    normalised, and paragraphs of 30 to 400 characters are kept. Of sentences that differ at most in case the first is
    kept: one that several libraries share belongs to the first of `LIBRARIES`, and the later ones lose it.

    Nothing is done against easy hints: names of functions, and now and then of the library itself, stay in the text.
    A majority vote gets a third right, a bag of words (TF-IDF, logistic regression, 7,000 sentences) 0.78.

    The first call takes some ten seconds; its result is kept in the user's cache folder, `$XDG_CACHE_HOME/privfm`
    or `~/.cache/privfm`, by the versions of Python and of the libraries. A broken cache file is built again, a folder
    that cannot be written means no cache.

    Args:
      limit: at most so many sentences; None for all. Those with the smallest hash stay: a fixed sample in which every
        library keeps its share, so that the task stays the same (balancing would cut all to the smallest library), and
        a smaller limit gives a subset of a larger one's.
    """

    limit: int | None = None

    def __post_init__(self) -> None:
        if self.limit is not None:
            at_least("limit", self.limit, 1)

    def load(self) -> Table:
        """Reads the sentences, library by library, file by file.

        Raises:
          InvalidArgument: a library is not installed, or without its source files.
        """
        rows = _sample(_cached(_versions()), self.limit)
        labels = {library: label for label, library in enumerate(LIBRARIES)}
        return Table(
            inputs=[text for text, _, _ in rows],
            labels=torch.tensor([labels[library] for _, library, _ in rows]),
            label_names=LIBRARIES,
            clients=tuple(client for _, _, client in rows),
        )


def _sample(rows: list[Row], limit: int | None) -> list[Row]:
    if limit is None or limit >= len(rows):
        return rows
    by_hash = sorted(range(len(rows)), key=lambda place: sha256(rows[place][0].encode()).digest())
    return [rows[place] for place in sorted(by_hash[:limit])]


def _versions() -> dict[str, str]:
    """Everything that decides which sentences are found; checks that the libraries are there, before any work."""
    return {"format": str(FORMAT)} | {library: _version(library) for library in LIBRARIES}


def _version(library: str) -> str:
    if library == STANDARD_LIBRARY:
        return sys.version  # with the build: distributions patch the standard library
    try:
        return version(library)
    except PackageNotFoundError:
        raise InvalidArgument(
            f"Docstrings() reads {library}, which is not installed; run: pip install privfm[demo]"
        ) from None


# ---------------------------------------------------------------------------------------------------------- reading


def _build() -> list[Row]:
    """All sentences of all libraries, each once."""
    rows: dict[str, Row] = {}
    folders = {library: _folder(library) for library in LIBRARIES}
    with _no_garbage_collection():
        for library, folder in folders.items():
            before = len(rows)
            for client, text in _sentences(folder, "" if library == STANDARD_LIBRARY else folder.name):
                rows.setdefault(text.casefold(), (text, library, client))
            require(len(rows) > before, f"Docstrings() finds no sentence of {library}: no source files in {folder}")
    return list(rows.values())


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Syntax trees hold no cycles, and searching their millions of nodes for some takes longer than parsing."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _folder(library: str) -> Path:
    """Where a library's files lie. Finding a top-level package does not run it."""
    if library == STANDARD_LIBRARY:
        return Path(sysconfig.get_path("stdlib"))
    spec = find_spec(PACKAGES[library])
    if spec is None or not spec.submodule_search_locations:
        raise InvalidArgument(f"Docstrings() finds no folder of {library}; run: pip install privfm[demo]")
    return Path(spec.submodule_search_locations[0])


def _sentences(folder: Path, package: str) -> Iterator[tuple[str, str]]:
    """`(client, sentence)` of all files below a folder, in the order of their names."""
    for path in _files(folder):
        module = path.relative_to(folder).with_suffix("").parts[0]
        client = ".".join(part for part in (package, module) if part and part != "__init__")
        for docstring in _docstrings(path):
            text = _first_paragraph(docstring)
            if SHORTEST <= len(text) <= LONGEST:
                yield client, text


def _files(folder: Path) -> Iterator[Path]:
    """Source files, without looking into folders that are skipped (all of site-packages, for one)."""
    for entry in sorted(folder.iterdir()):
        if entry.is_dir():
            if entry.name not in _SKIPPED:
                yield from _files(entry)
        elif entry.suffix == ".py" and entry.is_file():  # editors leave dangling links
            yield entry


def _docstrings(path: Path) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other people's invalid escapes
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # templates and samples of bad code
            return
    yield from _docstrings_below(tree)


def _docstrings_below(node: ast.AST) -> Iterator[str]:
    """Walks statements only: expressions are most of a tree and hold no docstring."""
    if isinstance(node, _DOCUMENTED) and (docstring := ast.get_docstring(node, clean=False)):
        yield docstring
    for block in _BLOCKS:
        for child in getattr(node, block, ()):
            yield from _docstrings_below(child)


def _first_paragraph(docstring: str) -> str:
    """On one line: everything before the first blank line."""
    lines = []
    for line in docstring.strip().splitlines():
        if not line.strip():
            break
        lines.append(line)
    return " ".join(" ".join(lines).split())


# ---------------------------------------------------------------------------------------------------------- caching


def _cached(versions: dict[str, str]) -> list[Row]:
    """The sentences from the cache, else built and kept there."""
    key = sha256(json.dumps(versions).encode()).hexdigest()
    path = cache_folder() / f"docstrings-{key[:16]}.json"
    rows = _read(path)
    if rows is None:
        rows = _build()
        _write(path, rows)
    return rows


def cache_folder() -> Path:
    home = os.environ.get("XDG_CACHE_HOME", "")
    # The specification has relative paths ignored: they would put a cache into every working folder.
    return (Path(home) if Path(home).is_absolute() else Path.home() / ".cache") / "privfm"


def _read(path: Path) -> list[Row] | None:
    """A cache file's rows; None if it is missing, cut off or changed (its first line is the rest's digest)."""
    try:
        digest, _, body = path.read_bytes().partition(b"\n")
    except OSError:
        return None
    if digest.decode("ascii", "replace") != sha256(body).hexdigest():
        return None
    return [(text, library, client) for text, library, client in json.loads(body)]


def _write(path: Path, rows: list[Row]) -> None:
    """Writes whole or not at all: another process reads the old file or the new one."""
    body = json.dumps(rows, ensure_ascii=False).encode()
    with suppress(OSError):  # a folder that cannot be written: the next call builds again
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=path.parent) as folder:
            whole = Path(folder) / path.name
            whole.write_bytes(sha256(body).hexdigest().encode() + b"\n" + body)
            whole.replace(path)
