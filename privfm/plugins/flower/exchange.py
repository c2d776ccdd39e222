"""A channel's stages as Flower messages: the server's side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from secrets import token_bytes
from time import monotonic, sleep
from typing import Final, final

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from privfm.checks import BrokenEnvelope, InvalidArgument
from privfm.contracts import KEY_HOLDER, SERVER, Exchange, Party
from privfm.defenses.channels.envelope import Header, Link
from privfm.plugins.flower.identities import Parties
from privfm.plugins.flower.records import BrokenReply, entry, from_bytes, to_bytes

ASKED: Final = "privfm"
"""Name of the record that says which stage of which round a message belongs to."""

CARRIED: Final = "privfm.message"
"""Name of the record with the bytes of a channel."""

WHO: Final = "who"
"""The stage before all others: a node says which party it is."""

_BYTES: Final = "bytes"
_LONGEST_NAP: Final = 1.0  # seconds between two looks for replies


def carried(content: bytes) -> ArrayRecord:
    """Bytes as a record."""
    return ArrayRecord({_BYTES: from_bytes(content)})


def opened(content: RecordDict) -> bytes:
    """The bytes of a message.

    Raises:
      BrokenReply: there are none.
    """
    record = content.array_records.get(CARRIED)
    if record is None or _BYTES not in record:
        raise BrokenReply("records", f"no {CARRIED}")
    return to_bytes(record[_BYTES])


def hello(party: Party, nonce: bytes) -> bytes:
    """A party's proof of who it is, for the server that asked with a nonce of 16 bytes."""
    return Link(party, SERVER).seal(Header("hello", key=nonce, stage="who"), [])


def gather(grid: Grid, messages: Sequence[Message], timeout: float) -> list[Message]:
    """Sends messages and waits for the replies, at most `timeout` seconds; what has not come by then is missing.

    Flower's own `send_and_receive` looks every three seconds, and a protocol has several stages.
    """
    awaited = {name for name in grid.push_messages(messages) if name}
    replies, until, nap = list[Message](), monotonic() + timeout, 0.05
    while awaited and monotonic() < until:
        found = list(grid.pull_messages(awaited))
        replies += found
        awaited -= {reply.metadata.reply_to_message_id for reply in found}
        nap = 0.05 if found else min(2 * nap, _LONGEST_NAP)
        if awaited:
            sleep(max(min(nap, until - monotonic()), 0.0))
    return replies


def claims_of(grid: Grid, nodes: Sequence[int], now: int, timeout: float, parties: Parties | None) -> dict[int, int]:
    """Which party each node says it is; a node that does not answer, or cannot prove it, is not in the result.

    Args:
      grid: reaches them.
      nodes: to be asked.
      now: the round.
      timeout: seconds.
      parties: what the server holds; None: claims are believed as they are.
    """
    nonce = token_bytes(16)
    content = RecordDict({ASKED: ConfigRecord({"stage": WHO, "round": now}), CARRIED: carried(nonce)})
    messages = [Message(content, node, MessageType.TRAIN) for node in sorted(nodes)]
    asked, claims = set(nodes), dict[int, int]()
    for reply in gather(grid, messages, timeout):
        node = reply.metadata.src_node_id
        number = None if reply.has_error() else entry(reply.content, ASKED, "party")
        if node not in asked or not isinstance(number, int) or isinstance(number, bool):
            continue
        if parties is None or _proved(reply.content, number, nonce, now, parties):
            claims[node] = number
    return claims


def _proved(content: RecordDict, number: int, nonce: bytes, now: int, parties: Parties) -> bool:
    if number == SERVER:
        return False
    try:
        link = Link(Party(SERVER, now, parties.own, parties.public), number)
        link.expect(opened(content), Header("hello", key=nonce, stage="who"))
    except (BrokenEnvelope, BrokenReply, InvalidArgument):
        return False
    return True


@final
@dataclass(frozen=True)
class Delivery:
    """How the parties of one round are reached.

    Attributes:
      grid: carries messages.
      nodes: party -> node.
      content: what clients train from: the model and the configuration.
      row_stage: the stage at which they train.
      timeout: seconds a stage may take.
    """

    grid: Grid
    nodes: Mapping[int, int]
    content: RecordDict
    row_stage: str
    timeout: float


@final
class GridExchange(Exchange):
    """One round's exchange. Replies of a stage are handed on in the order of parties, however they came.

    The model travels once a round, with the request of the stage at which clients train.

    Args:
      server: the server's place in the round.
      delivery: how parties are reached.

    Attributes:
      failed: clients that answered with an error at some stage.
      missing: clients that did not answer at some stage.
      foreign: replies of nodes that were not asked.
    """

    def __init__(self, server: Party, delivery: Delivery) -> None:
        self.server, self._delivery = server, delivery
        self.failed, self.missing, self.foreign = set[int](), set[int](), 0

    def __call__(self, stage: str, requests: Mapping[int, bytes]) -> Iterator[tuple[int, bytes]]:
        delivery = self._delivery
        asked = {delivery.nodes[party]: party for party in sorted(requests) if party in delivery.nodes}
        messages = [
            Message(self._content(stage, party, requests[party]), node, MessageType.TRAIN)
            for node, party in asked.items()
        ]
        answered = list[tuple[int, bytes]]()
        for reply in gather(delivery.grid, messages, delivery.timeout):
            party = asked.get(reply.metadata.src_node_id)
            if party is None:
                self.foreign += 1
            elif reply.has_error():
                self.failed.add(party)
            else:
                answered.append((party, _bytes_or_nothing(reply)))
        self.missing |= requests.keys() - {party for party, _ in answered} - self.failed - {KEY_HOLDER}
        yield from sorted(answered)

    def _content(self, stage: str, party: int, request: bytes) -> RecordDict:
        content = RecordDict(
            {ASKED: ConfigRecord({"stage": stage, "round": self.server.round}), CARRIED: carried(request)}
        )
        if stage == self._delivery.row_stage and party != KEY_HOLDER:
            for name, record in self._delivery.content.items():
                content[name] = record
        return content


def _bytes_or_nothing(reply: Message) -> bytes:
    try:
        return opened(reply.content)
    except BrokenReply:
        return b""  # no envelope: the channel leaves it out and counts it
