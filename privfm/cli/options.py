"""Options from the parameters of a class or function: command line over configuration file over defaults."""

from __future__ import annotations

import re
import tomllib
from argparse import ArgumentError
from collections.abc import Iterator, Sequence
from inspect import getdoc, isclass
from pathlib import Path
from typing import Any, get_type_hints

from jsonargparse import ArgumentParser, Namespace

from privfm.checks import InvalidArgument, nearest, nearest_if_any, require
from privfm.cli.explain import Target, explained, public_classes, without_class_keys

_CLASS_KEYS = frozenset({"class_path", "init_args", "dict_kwargs"})
"""What jsonargparse reads in a table that names a class; the last is for classes that take any keyword."""


def parser_for(target: Target, prog: str | None = None, usage: str | None = None, *, file: bool = True) -> Any:
    """A parser of the parameters of `target`.

    Args:
      target: a class or function.
      prog: name of the program in the help.
      usage: its first line; None derives it.
      file: whether a configuration file can hold the options (then all of them have names); else what is required is
        given by position.
    """
    parser = ArgumentParser(
        prog=prog,
        usage=usage,
        description=(getdoc(target) or "").partition("\n\n")[0],
        parser_mode="toml",
        exit_on_error=False,
        allow_abbrev=False,
    )
    if file:
        purpose = "TOML file with any of these options; those of the command line win"
        parser.add_argument("--config", action="config", metavar="FILE", help=purpose)
    if isclass(target):
        parser.add_class_arguments(target, None, as_group=False)
    else:
        parser.add_function_arguments(target, None, as_group=False, as_positional=not file)
    return parser


def values(parser: Any, target: Target, argv: Sequence[str]) -> dict[str, Any]:
    """The values of all options by name, classes made; `config` is left out.

    Raises:
      InvalidArgument: a file, a name or a value is wrong; one line, with the nearest name.
    """
    files, rest = split_off_files(argv)
    contents = [read_toml(file) for file in files]
    for content in contents:
        _refuse_wrong_keys("", content)
    words = [f"--config={file}" for file in files] + _flags_spelled_out(rest, target)
    try:
        parsed = parser.parse_args(words)
        _refuse_unlisted(parsed.as_dict(), {*_words(rest), *_words(contents)})
        made: Namespace = parser.instantiate(parsed)
    except InvalidArgument:
        raise
    except (ArgumentError, ValueError) as reason:
        raise InvalidArgument(explained(str(reason), target, _option_names(parser))) from reason
    return {name: value for name, value in vars(made).items() if name != "config"}


def split_off_files(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The values of `--config`, and all other words: files come first, so that the command line wins over them.

    Raises:
      InvalidArgument: an option stands where the file should.
    """
    files, rest, words = [], [], iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if name == "--config":
            file = value if equals else next(words, "")
            require(not file.startswith("-"), f"--config={file}: expected a TOML file, got an option")
            files.append(file)
        else:
            rest.append(word)
    return files, rest


def read_toml(file: str) -> dict[str, Any]:
    """The content of a configuration file.

    Raises:
      InvalidArgument: there is no such file, or it is no TOML; names the line.
    """
    path = Path(file)
    if not path.is_file():
        beside = [str(other) for other in path.parent.glob("*.toml") if other.is_file()]
        raise InvalidArgument(f"CONFIG={file} is not a file{nearest_if_any(file, beside)}")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as reason:
        raise InvalidArgument(f"CONFIG={file} is not TOML: {reason}") from reason


def _refuse_wrong_keys(place: str, value: Any) -> None:
    """What names a class has no keys of its own: jsonargparse says of them that the whole value is wrong."""
    if isinstance(value, dict):
        if _CLASS_KEYS.intersection(value) or all(nearest_if_any(key, ["class_path"]) for key in value):
            wrong = next((key for key in value if key not in _CLASS_KEYS), None)
            if wrong is not None:
                raise InvalidArgument(f"{place or 'CONFIG'}: no key {wrong!r}{nearest(wrong, _CLASS_KEYS)}")
        for key, part in value.items():
            _refuse_wrong_keys(place if key == "init_args" else f"{place}.{key}".lstrip("."), part)
    elif isinstance(value, list):
        for part in value:
            _refuse_wrong_keys(place, part)


def _flags_spelled_out(words: Sequence[str], target: Target) -> list[str]:
    """`--fast` alone means `--fast=true`; jsonargparse wants a value."""
    hints = get_type_hints(target.__init__ if isclass(target) else target)
    flags = {f"--{name}" for name, hint in hints.items() if hint is bool}
    following = [*words, "--"][1:]
    return [
        f"{word}=true" if word in flags and after not in ("true", "false") else word
        for word, after in zip(words, following, strict=True)
    ]


def _refuse_unlisted(parsed: Any, words: set[str]) -> None:
    """Only what is public has a short name.

    jsonargparse takes the short name of every subclass that happens to be imported: internal ones, and foreign ones
    whose module another option brought in.
    """
    paths = list(_class_paths(parsed))
    listed = public_classes() if paths else {}
    for path in paths:
        short = path.rpartition(".")[2]
        near = nearest_if_any(short, listed)
        require(
            short not in words or short in listed,
            f"{short!r} is no public class of privfm{near} (a full import path is taken: {path})",
        )


def _class_paths(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("class_path"), str):
            yield value["class_path"]
        value = list(value.values())
    if isinstance(value, list | tuple):
        for part in value:
            yield from _class_paths(part)


def _words(value: Any) -> Iterator[str]:
    """Every dotted name in a nested value."""
    if isinstance(value, str):
        yield from re.findall(r"[\w.]+", value)
    elif isinstance(value, dict):
        yield from _words(list(value.values()))
    elif isinstance(value, list):
        for part in value:
            yield from _words(part)


def _option_names(parser: Any) -> list[str]:
    """Dotted names of the options; parameters of a default's class belong to the class."""
    names = parser.get_defaults().keys()
    return sorted({without_class_keys(name) for name in names})
