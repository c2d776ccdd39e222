"""The server's side: stages of a channel as Flower messages, one a host."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from secrets import token_bytes
from typing import TYPE_CHECKING, Final, final

from privfm.checks import ClientFailed, Corrupt, InvalidArgument, require
from privfm.contracts import KEY_HOLDER, Cast, Channel, Engine, Exchange, Party, Sealer
from privfm.defenses.channels.identities import verify
from privfm.engines.flower.messages import Greeting, Reply, Request, claim
from privfm.engines.flower.records import content_of, message_to
from privfm.engines.flower.settings import FlowerSettings

if TYPE_CHECKING:
    from flwr.app import Message
    from flwr.serverapp import Grid

POLL_SECONDS: Final = 0.05
"""Between two looks for replies. Flower's own `send_and_receive` waits 3 seconds."""

_GONE: Final = (3, 4, 5, 8)
"""Flower's codes for messages not delivered or not answered in time, nodes that left, apps that were killed."""


_NONCE: Final = 16  # bytes, so that no greeting is one of before

HOST_SECONDS: Final = 5.0
"""How long a node that Flower no longer lists may still be waited for: its last reply may be on the way."""


@final
class Flower(Engine):
    """Parties on Flower's SuperNodes; the server meets nothing of them but the channel's bytes.

    Replies are handed on in the order of the cohort, whenever they come, so that the order of arrival changes nothing.

    Args:
      grid: Flower's, of this run.
      server: the server's own identity and whom it believes, by round.
      settings: how long to wait for what.
      strict: whether a host that says that a client has failed ends the run; elsewhere it has dropped out, as no host
        is to end a run for all others.

    Attributes:
      hosts: which node hosts which parties; grows when nodes join.
    """

    elsewhere = True

    def __init__(
        self, grid: Grid, server: Callable[[int], Party], settings: FlowerSettings, strict: bool = True
    ) -> None:
        self._grid, self.server, self.settings, self.strict = grid, server, settings, strict
        self.hosts: dict[int, tuple[int, ...]] = {}
        self._silent: set[int] = set()

    def meet(self, parties: Sequence[int]) -> None:
        """Waits until everybody is hosted somewhere.

        Raises:
          InvalidArgument: a host says that it cannot take part, and why; a party is hosted twice, or still nowhere.
          Corrupt: a node answers what no host of this version of privfm says.
        """
        end = time.monotonic() + self.settings.start_seconds
        while missing := set(parties) - self._hosted():
            self._greet(end - time.monotonic(), first=True)
            missing = set(parties) - self._hosted()
            if missing and time.monotonic() > end:
                raise InvalidArgument(
                    f"after start_seconds={self.settings.start_seconds:g} {len(self.hosts)} host(s) are there, and "
                    f"parties {sorted(missing)[:5]} on none of them; start their SuperNodes, or wait longer"
                )
            if missing:
                time.sleep(POLL_SECONDS)

    def open(self, channel: Channel, sealed: Sealer, cast: Cast) -> Exchange:
        """One round's exchange. `sealed` is not used: clients train where they are."""
        require(cast.broadcast is not None, "broadcast=None: clients elsewhere must be told what they start from")
        self._greet(min(self.settings.start_seconds, self.settings.stage_seconds))  # who joined, or came back
        return _FlowerExchange(self, channel, cast)

    def host_of(self, party: int, there: frozenset[int]) -> int | None:
        """The node that hosts a party, of those that are there; the latest where it has moved."""
        found = [node for node, parties in self.hosts.items() if party in parties and node in there]
        return found[-1] if found else None

    def there(self) -> frozenset[int]:
        """Nodes that Flower lists as connected."""
        return frozenset(self._grid.get_node_ids())

    def replies(self, contents: Mapping[int, bytes], kind: str, now: int, end: float) -> Iterator[tuple[int, Message]]:
        """`(node, message)` as replies come; a message may be an error, and those that are late are missing.

        Raises:
          InvalidArgument: Flower takes none of the messages, which are too large for it.
        """
        seconds = max(end - time.monotonic(), 0.0)
        messages = [message_to(node, content, kind, now, seconds) for node, content in contents.items()]
        names = list(self._grid.push_messages(messages))
        require(
            len(names) == len(messages),
            f"Flower has taken {len(names)} of {len(messages)} messages of up to "
            f"{max(map(len, contents.values()), default=0)} bytes; its log says why",
        )
        waiting = {name: node for name, node in zip(names, contents, strict=True) if name}  # none: the node has left
        absent: dict[int, float] = {}
        while waiting and time.monotonic() < end:
            came = list(self._grid.pull_messages(list(waiting)))
            for message in came:
                node = waiting.pop(message.metadata.reply_to_message_id, None)
                if node is not None:
                    yield node, message
            if not came:
                self._give_up(waiting, absent)
                time.sleep(POLL_SECONDS)

    def _give_up(self, waiting: dict[str, int], absent: dict[int, float]) -> None:
        """Waits no longer for hosts that are gone."""
        now, there = time.monotonic(), self.there()
        for message, node in list(waiting.items()):
            if node in there:
                absent.pop(node, None)
            elif now - absent.setdefault(node, now) > HOST_SECONDS:
                del waiting[message]

    def _hosted(self) -> set[int]:
        return {party for parties in self.hosts.values() for party in parties}

    def _greet(self, seconds: float, *, first: bool = False) -> None:
        """Asks nodes that were not met before whom they host.

        A SuperNode that was started again is a new node, while Flower lists the old one for another minute: what a
        node says later wins, but before the first round nobody may be hosted twice. Later on nobody who joins can end
        the run: who cannot take part is left out, and asked again before the next round.
        """
        strangers = sorted(self.there() - self.hosts.keys() - self._silent)
        end, nonce = time.monotonic() + seconds, token_bytes(_NONCE)
        if not first:
            self._silent |= set(strangers)  # but for those that answer: nobody is waited for twice
        for node, message in self.replies(dict.fromkeys(strangers, nonce), "query", 0, end):
            self._silent.discard(node)
            if message.has_error() and message.error.code in _GONE:
                continue
            try:
                self._meet(node, message, nonce, first=first)
            except (InvalidArgument, Corrupt) as reason:
                if first:
                    raise
                sys.stderr.write(f"privfm: {reason}\n")

    def _meet(self, node: int, message: Message, nonce: bytes, *, first: bool) -> None:
        content = content_of(message)
        if content is None:
            raise InvalidArgument(f"node {node} failed before it took part ({_failure(message)}); see its log")
        greeting = Greeting.from_bytes(content)
        require(not greeting.problem, f"node {node} cannot take part: {greeting.problem}")
        server = self.server(0)
        for party in greeting.parties:
            verify(server.pinned(party), claim(nonce, party), greeting.signatures.get(party, b""))
        twice = sorted(self._hosted() & set(greeting.parties)) if first else []
        require(not twice, f"parties {twice[:5]} are hosted twice; give every SuperNode its own partition-id")
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
        end = time.monotonic() + self._engine.settings.stage_seconds
        for node, message in self._engine.replies(contents, "train", self._cast.round, end):
            content = content_of(message)
            try:
                reply = Reply() if content is None else Reply.from_bytes(content)
            except Corrupt:
                reply = Reply()  # a host that speaks nonsense has dropped out, with all its clients
            if reply.failed and self._engine.strict:
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


def _failure(message: Message) -> str:
    return f"code {message.error.code}: {message.error.reason}" if message.has_error() else "a reply of another app"
