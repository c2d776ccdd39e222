"""jsonargparse's errors as one line, with the nearest name where one was mistyped.

jsonargparse explains a wrong value from the outside in, over several lines, and a value that may be left out twice:
why it is not of its class, and why it is not None. The innermost reason is what the user has to know.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from inspect import isabstract, isclass, signature
from pydoc import locate
from typing import Any, final, get_args, get_type_hints

from privfm.checks import nearest, nearest_if_any

Target = Callable[..., Any]
"""A class or function whose parameters are options."""

PUBLIC_MODULES = (
    "privfm.defenses",
    "privfm.defenses.channels",
    "privfm.attacks",
    "privfm.attacks.audit",
    "privfm.attacks.membership",
    "privfm.attacks.reconstruction",
    "privfm.learning",
    "privfm.federation",
)
"""Whose `__all__` holds what a configuration may name without its import path."""

_NOISE = ("Does not validate against", "Subtypes:", "Errors:", "Expected a <class 'NoneType'>", "Given value")
_KEY = re.compile(r"Parser key \"([\w.]+)\":\s*(.*)")
_HELP = re.compile(r"--([\w.]+)\.help:\s*(.*)")
_CLASS = re.compile(r"Problem with given class_path '([\w.]+)':")
_UNKNOWN_CLASS = re.compile(r"Expected a dot import path string: (.+)")
_UNKNOWN_KEY = re.compile(r"Option '([\w.]+)' is not accepted")
_UNKNOWN_KEY_OF_GROUP = re.compile(r"Group '([\w.]+)' does not accept option '([\w.]+)'")
_UNKNOWN_WORDS = "unrecognized arguments: "
_ABSTRACT = "Expected an instantiatable class, but "
_MISSING = re.compile(r"the following arguments are required: (.+)")
_WRONG_TYPE = re.compile(r"Expected an? (?:<class '([\w.]+)'>|(?:typing\.)?(.+?))\. Got value: (.*)")

_WRITTEN = dict.fromkeys(("tuple", "list"), 'a list, written "[1,2]"')


def public_classes() -> dict[str, type]:
    """Everything a configuration may name by its short name; importing makes it known to jsonargparse too."""
    modules = [import_module(name) for name in PUBLIC_MODULES]
    named = {name: getattr(module, name) for module in modules for name in module.__all__}
    return {name: value for name, value in named.items() if isclass(value)}


def explained(message: str, target: Target, options: Iterable[str]) -> str:
    """An error message of jsonargparse as one line.

    Args:
      message: what jsonargparse says.
      target: the class or function that was to be called.
      options: dotted names of the parser's options.
    """
    place = _Place(target)
    reasons: list[str] = []
    for line in message.splitlines():
        line = line.strip().removeprefix("- ")
        if line.startswith("Subclass types expect"):
            break
        if not line or line.startswith(_NOISE):
            continue
        if found := _KEY.fullmatch(line) or _HELP.fullmatch(line):
            place.enter(found[1])
            line = found[2]
        elif found := _CLASS.fullmatch(line):
            place.choose(found[1])
            continue
        if line:
            reasons.append(_reason(line, place, options))
    return ": ".join(part for part in (place.name, "; ".join(dict.fromkeys(reasons))) if part)


@final
class _Place:
    """Where in a configuration a message has arrived: which parameter of which class."""

    def __init__(self, target: Target) -> None:
        self.owner: Any = target
        self.hint: Any = None
        self.name = ""

    def enter(self, key: str) -> None:
        """Goes to a parameter of the present class."""
        self.name = f"{self.name.partition('=')[0]}.{key}".lstrip(".")
        self.hint = _hint(self.owner, key)

    def choose(self, class_path: str) -> None:
        """Goes on with the class that was given for the present parameter."""
        self.owner = locate(class_path)
        self.name += f"={class_path if self.owner is None else class_path.rpartition('.')[2]}"


def _reason(line: str, place: _Place, options: Iterable[str]) -> str:
    """One reason, in the words of this project."""
    if found := _UNKNOWN_CLASS.fullmatch(line):
        return f"{found[1]!r} is not known{nearest(found[1], _choices(place.hint))} (or give a full import path)"
    if found := _MISSING.fullmatch(line):
        return f"missing {found[1]}"
    if found := _WRONG_TYPE.fullmatch(line):
        return _wrong_type(place.name, found[1] or found[2], found[3])
    if line.startswith(_ABSTRACT):
        known = ", ".join(sorted(_choices(place.hint)))
        return f"{line}; known: {known}" if known else line
    return _wrong_option(line, place, options)


def _wrong_type(place: str, kind: str, value: str) -> str:
    owner, _, name = place.rpartition(".")
    if owner and kind in _WRITTEN and value.startswith("["):  # jsonargparse leaves the items of such a list unread
        return f"expected a list, and its items are not read here; write --{owner} '{{\"{name}\": [...]}}'"
    return f"expected {_WRITTEN.get(kind, kind)}, got {value!r}"


def _wrong_option(line: str, place: _Place, options: Iterable[str]) -> str:
    """Of what there is no option, and what is nearest; any other line as it is."""
    names = _unknown_options(line)
    if place.name and names:
        return _no_option(place.owner, names[0])
    if not names and line.startswith(_UNKNOWN_WORDS) and "config" in options:
        return f"{line}; options are --name value, a configuration file stands before them"
    return "; ".join(_no_such_option(name, options) for name in names) or line


def _no_such_option(dotted: str, options: Iterable[str]) -> str:
    """The nearest option; of a class's own parameters, which are no options, the nearest to where the class stands."""
    name = without_class_keys(dotted)
    return f"no option {name!r}{nearest_if_any(name, options) or nearest(name.partition('.')[0], options)}"


def without_class_keys(dotted: str) -> str:
    """`cohort.init_args.size` -> `cohort`."""
    return re.split(r"\.(?:class_path|init_args)\b", dotted)[0]


def _unknown_options(line: str) -> list[str]:
    """Dotted names of the options that a line complains about, without their values."""
    if found := _UNKNOWN_KEY.fullmatch(line):
        return [found[1]]
    if found := _UNKNOWN_KEY_OF_GROUP.fullmatch(line):
        return [f"{found[1]}.{found[2]}"]
    words = line.removeprefix(_UNKNOWN_WORDS).split() if line.startswith(_UNKNOWN_WORDS) else []
    return [word.removeprefix("--").partition("=")[0] for word in words if word.startswith("--")]


def _no_option(owner: Any, dotted: str) -> str:
    """Of which class there is no such parameter, and which is nearest."""
    first, _, rest = dotted.partition(".")
    names = _parameters(owner)
    if rest and first in names:
        return _no_option(next(classes_in(_hint(owner, first)), None), rest)
    if not names:
        return f"no option {first!r}; {getattr(owner, '__name__', 'it')} takes none"
    return f"no option {first!r}{nearest(first, names)}"


def _parameters(owner: Any) -> list[str]:
    return list(signature(owner).parameters) if callable(owner) else []


def _hint(owner: Any, key: str) -> Any:
    """The annotation of a parameter; dots lead into parameters of parameters."""
    first, _, rest = key.partition(".")
    hint = get_type_hints(owner if not isclass(owner) else owner.__init__).get(first) if callable(owner) else None
    return _hint(next(classes_in(hint), None), rest) if rest else hint


def classes_in(hint: Any) -> Iterator[type]:
    """The classes in an annotation, those in a union or a container included."""
    parts = get_args(hint)
    if not parts and isclass(hint) and hint is not type(None):
        yield hint
    for part in parts:
        yield from classes_in(part)


def _choices(hint: Any) -> list[str]:
    """Short names that fit an annotation."""
    bases = tuple(classes_in(hint))
    return [name for name, kind in public_classes().items() if not isabstract(kind) and issubclass(kind, bases)]
