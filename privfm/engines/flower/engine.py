"""The server's side: stages of a channel as Flower messages, one a host."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, final

from privfm.checks import ClientFailed, Corrupt, InvalidArgument, positive, require
from privfm.contracts import KEY_HOLDER, Cast, Channel, Engine, Exchange, Party, Sealer
from privfm.engines.flower.messages import Greeting, Reply, Request

if TYPE_CHECKING:
    from flwr.app import Message
    from flwr.serverapp import Grid

POLL_SECONDS: Final = 0.05
"""Between two looks for replies. Flower's own `send_and_receive` waits 3 seconds."""

RECORD: Final = "privfm"
"""Name of the one record of every message, and of its one array."""


@final
@dataclass(frozen=True)
class Waiting:
    """How long the server waits.

    Args:
      start_seconds: for all hosts to be there before the first round.
      stage_seconds: for the replies to one stage; whoever is later has dropped out.
      host_seconds: until a host that Flower no longer lists, and that has not answered, counts as gone.
    """

    start_seconds: float = 300.0
    stage_seconds: float = 3600.0
    host_seconds: float = 5.0

    def __post_init__(self) -> None:
        positive("start_seconds", self.start_seconds)
        positive("stage_seconds", self.stage_seconds)
        positive("host_seconds", self.host_seconds)


@final
class Flower(Engine):
    """Parties on Flower's SuperNodes; the server meets nothing of them but the channel's bytes.

    Replies are handed on in the order of the cohort, whenever they come, so that the order of arrival changes nothing.

    Args:
      grid: Flower's, of this run.
      server: the server's own identity and whom it believes, by round.
      waiting: how long for what.

    Attributes:
      hosts: which node hosts which parties; grows when nodes join.
    """

    def __init__(self, grid: Grid, server: Callable[[int], Party], waiting: Waiting) -> None:
        self._grid, self.server, self.waiting = grid, server, waiting
        self.hosts: dict[int, tuple[int, ...]] = {}

    def meet(self, parties: Sequence[int]) -> None:
        """Waits until everybody is hosted somewhere.

        Raises:
          InvalidArgument: a host says that it cannot take part, and why; a party is hosted twice, or still nowhere.
        """
        end = time.monotonic() + self.waiting.start_seconds
        while missing := set(parties) - self._hosted():
            self._greet(end)
            missing = set(parties) - self._hosted()
            if missing and time.monotonic() > end:
                raise InvalidArgument(
                    f"after start_seconds={self.waiting.start_seconds:g} {len(self.hosts)} host(s) are there, and "
                    f"parties {sorted(missing)[:5]} on none of them; start their SuperNodes, or wait longer"
                )
            if missing:
                time.sleep(POLL_SECONDS)

    def open(self, channel: Channel, sealed: Sealer, cast: Cast) -> Exchange:
        """One round's exchange. `sealed` is not used: clients train where they are."""
        require(cast.broadcast is not None, "broadcast=None: clients elsewhere must be told what they start from")
        self._greet(time.monotonic() + self.waiting.stage_seconds)  # hosts that joined, or came back
        return _FlowerExchange(self, channel, cast)

    def host_of(self, party: int, there: frozenset[int]) -> int | None:
        """The node that hosts a party, of those that are there; the latest where it has moved."""
        found = [node for node, parties in self.hosts.items() if party in parties and node in there]
        return found[-1] if found else None

    def there(self) -> frozenset[int]:
        """Nodes that Flower lists as connected."""
        return frozenset(self._grid.get_node_ids())

    def replies(
        self, contents: Mapping[int, bytes], kind: str, now: int, end: float
    ) -> Iterator[tuple[int, bytes | None]]:
        """`(node, content)` as replies come, `None` from a node that failed; those that are late are missing."""
        messages = [message_to(node, content, kind, now) for node, content in contents.items()]
        waiting = dict(zip(self._grid.push_messages(messages), contents, strict=True))
        absent: dict[int, float] = {}
        while waiting and time.monotonic() < end:
            came = list(self._grid.pull_messages(list(waiting)))
            for message in came:
                node = waiting.pop(message.metadata.reply_to_message_id, None)
                if node is not None:
                    yield node, content_of(message)
            if not came:
                self._give_up(waiting, absent)
                time.sleep(POLL_SECONDS)

    def _give_up(self, waiting: dict[str, int], absent: dict[int, float]) -> None:
        """Waits no longer for hosts that are gone."""
        now, there = time.monotonic(), self.there()
        for message, node in list(waiting.items()):
            if node in there:
                absent.pop(node, None)
            elif now - absent.setdefault(node, now) > self.waiting.host_seconds:
                del waiting[message]

    def _hosted(self) -> set[int]:
        return {party for parties in self.hosts.values() for party in parties}

    def _greet(self, end: float) -> None:
        """Asks nodes that were not met before whom they host."""
        strangers = sorted(self.there() - self.hosts.keys())
        for node, content in self.replies(dict.fromkeys(strangers, b""), "query", 0, end):
            if content is None:
                raise InvalidArgument(f"node {node} failed before the first round; its log says why")
            greeting = Greeting.from_bytes(content)
            require(not greeting.problem, f"node {node} cannot take part: {greeting.problem}")
            there = self.there()
            elsewhere = [p for p in greeting.parties if self.host_of(p, there - {node}) is not None]
            require(not elsewhere, f"parties {elsewhere[:5]} are hosted twice; give every SuperNode its own")
            self.hosts[node] = greeting.parties


@final
class _FlowerExchange(Exchange):
    """One round over Flower."""

    def __init__(self, engine: Flower, channel: Channel, cast: Cast) -> None:
        self._engine, self._channel, self._cast = engine, channel, cast
        self.server = engine.server(cast.round)

    def __call__(self, stage: str, requests: Mapping[int, bytes]) -> Iterator[tuple[int, bytes]]:
        gone = self._cast.gone.get(stage, frozenset())
        order = [party for party in (*self._cast.honest, *self._cast.malicious, KEY_HOLDER) if party in requests]
        asked, homes = [party for party in order if party not in gone], dict[int, list[int]]()
        there = self._engine.there()
        for party in asked:
            node = self._engine.host_of(party, there)
            if node is not None:
                homes.setdefault(node, []).append(party)
        contents = {node: self._request(stage, parties, requests).to_bytes() for node, parties in homes.items()}
        return _in_order([party for own in homes.values() for party in own], order, homes, self._replies(contents))

    def _request(self, stage: str, parties: Sequence[int], requests: Mapping[int, bytes]) -> Request:
        here, cast = set(parties), self._cast
        told = cast.broadcast if stage == self._channel.row_stage and any(party >= 0 for party in parties) else None
        if told is not None:
            own = {client: weight for client, weight in told.weights.items() if client in here}
            told = type(told)(told.model, told.bound, told.cohort, own)
        return Request(
            cast.round,
            stage,
            tuple(client for client in cast.honest if client in here),
            tuple(client for client in cast.malicious if client in here),
            {party: requests[party] for party in parties},
            told,
        )

    def _replies(self, contents: Mapping[int, bytes]) -> Iterator[tuple[int, Mapping[int, bytes]]]:
        end = time.monotonic() + self._engine.waiting.stage_seconds
        for node, content in self._engine.replies(contents, "train", self._cast.round, end):
            try:
                reply = Reply() if content is None else Reply.from_bytes(content)
            except Corrupt:
                reply = Reply()  # a host that speaks nonsense has dropped out, with all its clients
            if reply.failed:
                raise ClientFailed(f"a client on node {node} failed, in a run that is to end then; its log says why")
            yield node, reply.replies


def _in_order(
    asked: Iterable[int],
    order: Sequence[int],
    homes: Mapping[int, Sequence[int]],
    replies: Iterator[tuple[int, Mapping[int, bytes]]],
) -> Iterator[tuple[int, bytes]]:
    """Replies in `order`, each as soon as nobody before it can still come."""
    waiting, came = set(asked), dict[int, bytes]()
    order = [party for party in order if party in waiting]
    at = 0
    for node, own in replies:
        came |= {party: own[party] for party in homes[node] if party in own}
        waiting -= set(homes[node])
        while at < len(order) and order[at] not in waiting:
            party, at = order[at], at + 1
            if party in came:
                yield party, came.pop(party)
    for party in order[at:]:  # who was before them never came
        if party in came:
            yield party, came.pop(party)


def message_to(node: int, content: bytes, kind: str, now: int) -> Message:
    """A message to a node; `group_id` is the round, as in Flower's own strategies."""
    from flwr.app import Message

    return Message(content=record_of(content), dst_node_id=node, message_type=kind, group_id=str(now))


def record_of(content: bytes) -> Any:
    """Bytes as Flower carries them: an array record, which it cuts into chunks."""
    from flwr.app import Array, ArrayRecord, RecordDict

    array = Array(dtype="uint8", shape=(len(content),), stype="privfm.bytes", data=content)
    return RecordDict({RECORD: ArrayRecord({RECORD: array})})


def content_of(message: Message) -> bytes | None:
    """The inverse; None where the message is an error or another's."""
    if message.has_error():
        return None
    record = message.content.array_records.get(RECORD)
    if record is None or RECORD not in record:
        return None
    return bytes(record[RECORD].data)
