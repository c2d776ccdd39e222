"""Error types and argument checks: one form of message for the whole project.

Every message names the argument and its value, what was expected, and, where there is one, the way out:
`f=5 needs n >= 2f+3 = 13 updates for Krum, got n=10; lower f or use TrimmedMean`.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from math import isfinite


class InvalidArgument(ValueError):
    """A value given by the caller cannot be used. Raised before any work starts."""


class NotRevealed(RuntimeError):
    """More was asked of a view, or of a threat model, than it reveals."""


class Overflow(InvalidArgument):
    """A value lies beyond what a channel has proved head-room for. Never cut, never wrapped."""


class CohortTooSmall(InvalidArgument):
    """Fewer usable updates arrived than the rule needs. Inside a run the round is skipped and recorded."""


class RoundFailed(RuntimeError):
    """A protocol could not finish (too few answers). The round is skipped and recorded, nothing is half-summed."""


class TooFewClients(RoundFailed):
    """Fewer clients answered than a protocol needs, or than may be summed; what they sent stays closed."""


class ClientFailed(RuntimeError):
    """A client's own training raised. Inside a run it is a recorded drop-out; with `strict` it ends the run."""


class PrivacyBroken(RuntimeError):
    """Private steps are not what a plan accounts for: some trained value has no gradient of its own, or none moves."""


class BrokenCheckpoint(RuntimeError):
    """A checkpoint is missing a file, was cut off or was changed."""


class BrokenEnvelope(RuntimeError):
    """A message of a channel is malformed, foreign, replayed or does not fit the agreed parameters."""


class Corrupt(BrokenEnvelope):
    """A message was cut off or changed, or is not from whom it should be; or what it carries is no such thing."""


class WrongKey(BrokenEnvelope):
    """A message was made under another key than this round's."""


class ParameterMismatch(BrokenEnvelope):
    """A message was made with other parameters, for another vector, scale or weight."""


class Replay(BrokenEnvelope):
    """A message of another round, or a second one where a single one is taken."""


def nearest(name: str, options: Iterable[str]) -> str:
    """`; did you mean 'rounds'?` when one of `options` is close to `name`, else the list of options, if any."""
    known = sorted(options)
    close = get_close_matches(name, known, n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(known)}" if known else ""


def nearest_if_any(name: str, options: Iterable[str]) -> str:
    """`; did you mean 'rounds'?` when one of `options` is close to `name`, else nothing: a list may be too long."""
    hint = nearest(name, options)
    return hint if hint.endswith("?") else ""


def first_line(reason: BaseException) -> str:
    """What somebody else's error says, in one line."""
    return str(reason).strip().partition("\n")[0]


def require(holds: bool, message: str) -> None:
    """Raises `InvalidArgument(message)` unless `holds`."""
    if not holds:
        raise InvalidArgument(message)


def at_least(name: str, value: int, least: int) -> None:
    """Checks a whole number: `value >= least`."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    require(whole and value >= least, f"{name}={value!r}: expected a whole number >= {least}")


def positive(name: str, value: float) -> None:
    """Checks `0 < value < inf`."""
    require(isfinite(value) and value > 0, f"{name}={value!r}: expected a finite number > 0")


def non_negative(name: str, value: float) -> None:
    """Checks `0 <= value < inf`."""
    require(isfinite(value) and value >= 0, f"{name}={value!r}: expected a finite number >= 0")


def fraction(name: str, value: float, *, zero: bool = False, one: bool = True) -> None:
    """Checks that `value` lies between 0 and 1; `zero` and `one` say whether the ends are allowed."""
    low = value >= 0 if zero else value > 0
    high = value <= 1 if one else value < 1
    ends = f"{'[' if zero else '('}0, 1{']' if one else ')'}"
    require(isfinite(value) and low and high, f"{name}={value!r}: expected a number in {ends}")


def one_of(name: str, value: str, options: Iterable[str]) -> None:
    """Checks membership; the error offers the nearest option."""
    known = sorted(options)
    require(value in known, f"{name}={value!r} is not known{nearest(value, known)}")


class FlowerFailed(RuntimeError):
    """Flower did not start, or a run on it did not end well. The message carries the tail of its log."""
