"""What a Flower app and a SuperNode can be told: flat tables of names and plain values, passed on as TOML files.

Files, because Flower's own `key=value` lines cannot carry a quote, a line break or both kinds of quotes.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import TypeAlias

from privfm.checks import InvalidArgument, nearest, require

Scalar: TypeAlias = str | int | float | bool
"""What Flower takes as a value of a configuration."""


def check_config(name: str, config: Mapping[str, Scalar]) -> None:
    """Flower takes text, 64-bit whole numbers, finite numbers, and yes or no, under names that are not empty."""
    for key, value in config.items():
        require(isinstance(key, str) and key != "", f"{name}: expected names of at least one letter, got {key!r}")
        fits = (
            isinstance(value, str | bool)
            or (isinstance(value, int) and -(2**63) <= value < 2**63)
            or (isinstance(value, float) and isfinite(value))
        )
        require(fits, f"{name}[{key!r}]={value!r}: expected text, a 64-bit whole number, a finite number or a bool")


def check_app(app: Path, config: Mapping[str, Scalar]) -> None:
    """That there is an app, and that it knows what `config` names."""
    try:
        content = tomllib.loads((app / "pyproject.toml").read_text(encoding="utf-8"))
        known = list(_flat(content["tool"]["flwr"]["app"].get("config", {})))
    except OSError as error:
        raise InvalidArgument(f"app={str(app)!r}: expected a folder with a pyproject.toml: {error.strerror}") from error
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise InvalidArgument(f"app={str(app)!r}: its pyproject.toml describes no Flower app: {error!r}") from error
    for key in config:
        require(key in known, f"config has {key!r}, which [tool.flwr.app.config] of {app} has not{nearest(key, known)}")


def _flat(table: Mapping[str, object], before: str = "") -> list[str]:
    """Names of all values, those of inner tables joined by dots."""
    names = []
    for key, value in table.items():
        names += _flat(value, f"{before}{key}.") if isinstance(value, dict) else [f"{before}{key}"]
    return names


def toml(values: Mapping[str, Scalar]) -> str:
    r"""A flat TOML table.

    >>> print(toml({"rounds": 3, "out": 'a "b"\\c', "tls": True, "rate": 1e-05}), end="")
    "rounds" = 3
    "out" = "a \"b\"\\c"
    "tls" = true
    "rate" = 1e-05
    """
    return "".join(f"{_quoted(key)} = {_value(value)}\n" for key, value in values.items())


def _quoted(text: str) -> str:
    # A JSON string is a TOML string, but that TOML wants DEL written as an escape, too.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _value(value: Scalar) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return _quoted(value) if isinstance(value, str) else repr(value)
