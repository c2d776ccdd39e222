"""Bytes as Flower carries them. Imports nothing heavy: a client's thin process needs it."""

from __future__ import annotations

from typing import Final

from flwr.app import DEFAULT_TTL, Array, ArrayRecord, Message, RecordDict

RECORD: Final = "privfm"
"""Name of the one record of every message, and of its one array."""


def record_of(content: bytes) -> RecordDict:
    """An array record, which Flower cuts into chunks where it is large."""
    array = Array(dtype="uint8", shape=(len(content),), stype="privfm.bytes", data=content)
    return RecordDict({RECORD: ArrayRecord({RECORD: array})})


def message_to(node: int, content: bytes, kind: str, now: int, seconds: float) -> Message:
    """A message to a node, whose reply is waited for so long; its `group_id` is the round, as in Flower's strategies.

    Flower forgets messages after 12 hours, by the clocks of two machines: it is told more, never less.
    """
    record, ttl = record_of(content), max(DEFAULT_TTL, 2 * seconds)
    return Message(content=record, dst_node_id=node, message_type=kind, ttl=ttl, group_id=str(now))


def content_of(message: Message) -> bytes | None:
    """What was sent; None where the message is an error, or another app's."""
    if message.has_error():
        return None
    record = message.content.array_records.get(RECORD)
    if record is None or RECORD not in record:
        return None
    return bytes(record[RECORD].data)
