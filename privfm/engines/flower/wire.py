"""Named byte strings as one: what goes through Flower, and between a client's process and its worker.

A header in JSON, then the parts. Nothing in it is ever executed (no pickle), and this module needs no library.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from struct import Struct
from typing import Any, Final

_MAGIC: Final = b"privfm\x01"  # the last byte is the format's version
_LENGTH: Final = Struct(">Q")


def packed(head: Mapping[str, Any], parts: Mapping[str, bytes] | None = None) -> bytes:
    """A header of plain values and named parts as one byte string.

    >>> unpacked(packed({"round": 3}, {"a": b"xyz"}))
    ({'round': 3}, {'a': b'xyz'})
    """
    parts = {} if parts is None else parts
    names = [[name, len(part)] for name, part in parts.items()]
    header = json.dumps({"head": dict(head), "parts": names}).encode()
    return b"".join([_MAGIC, _LENGTH.pack(len(header)), header, *parts.values()])


def unpacked(content: bytes) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The inverse.

    Raises:
      ValueError: it is no such string, or cut short.
    """
    start = len(_MAGIC) + _LENGTH.size
    if content[: len(_MAGIC)] != _MAGIC or len(content) < start:
        raise ValueError("not a message of this version of privfm")
    end = start + _LENGTH.unpack_from(content, len(_MAGIC))[0]
    try:
        header = json.loads(content[start:end].decode())
    except RecursionError:
        raise ValueError("a message whose header is nested too deeply") from None
    if not (isinstance(header, dict) and isinstance(header.get("head"), dict) and _well_formed(header.get("parts"))):
        raise ValueError("a message without head and parts")
    view, parts, at = memoryview(content), dict[str, bytes](), end
    for name, length in header["parts"]:
        parts[name] = bytes(view[at : at + length])
        at += length
    if at != len(content) or len(parts) != len(header["parts"]):
        raise ValueError(f"a message of {len(content)} bytes whose parts end at {at}, or have one name twice")
    return header["head"], parts


def _well_formed(names: object) -> bool:
    return isinstance(names, list) and all(
        isinstance(each, list) and len(each) == 2 and isinstance(each[0], str) and type(each[1]) is int and each[1] >= 0
        for each in names
    )
