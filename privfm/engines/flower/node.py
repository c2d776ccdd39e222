"""A host's half of a round: its clients train, protect and answer, and their secrets stay here."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Final, final

import torch

from privfm.checks import ClientFailed, Corrupt, require
from privfm.contracts import KEY_HOLDER, Broadcast, Cast, Encoded, Identity, Memory, Party
from privfm.defenses.channels.identities import sign
from privfm.defenses.privacy.releases import BOUND, QuantileRelease
from privfm.engines.flower.messages import Greeting, Reply, Request, claim
from privfm.engines.flower.store import NodeStore
from privfm.engines.flower.wire import packed, unpacked
from privfm.engines.hosted import Hosted
from privfm.federation import Arm, Federation, RunState
from privfm.federation.way import Way

_DONE: Final = "done"  # the one entry of a memory that is no secret: stages that were answered
_ROUND: Final = "round"


@final
@dataclass(frozen=True)
class Keys:
    """Who this host's parties are, and whom they believe.

    Attributes:
      own: identities of the parties hosted here.
      pinned: a party's number -> its public identity, known beforehand and not from the server.
    """

    own: Mapping[int, Identity]
    pinned: Callable[[int], bytes]


@final
class Node:
    """The parties on one host.

    Args:
      federation: the run; of its clients only those hosted here are ever asked for their data.
      keys: identities of the parties hosted here, and everybody's public ones.
      store: where its clients' states lie between rounds.
      clients_per_batch: clients trained together.
      processes: how many a party may use to encrypt.
      rounds: how often a client trains under a plan whose epsilon is claimed against the server (`place="local"` or
        `"distributed"`, or examples): a server that asks again is paid for by nobody, whatever round it says it is.
        None: any number.
    """

    def __init__(
        self,
        federation: Federation,
        keys: Keys,
        store: NodeStore,
        clients_per_batch: int = 1,
        processes: int = 1,
        *,
        rounds: int | None = None,
    ) -> None:
        self._federation, self._keys, self._store = federation, keys, store
        plan = federation.arm.plan
        against_server = plan is not None and (plan.place in ("local", "distributed") or plan.unit == "example")
        self._rounds = rounds if against_server else None
        self._clients_per_batch, self._processes = clients_per_batch, processes
        self._channel = federation.arm.wire

    def greeting(self, nonce: bytes) -> Greeting:
        """Who is hosted here, proved by their identities."""
        signatures = {
            number: sign(Party(number, 0, own, self._keys.pinned), claim(nonce, number))
            for number, own in self._keys.own.items()
        }
        return Greeting(tuple(self._keys.own), "", signatures)

    def answer(self, request: Request, memory: bytes) -> tuple[Reply, bytes]:
        """The replies to one stage, and what this host must remember until the next one.

        What a party holds for a round is erased with its last stage, or when it raises; what is left says only that it
        must not be asked again. A message of another round finds nothing of an earlier one.

        Args:
          request: for any of the parties hosted here.
          memory: as returned before; empty at first.

        Raises:
          Corrupt: parties are asked that are not here, who takes part is contradictory, clients are told what the
            configuration leaves nobody to say, or are to train a second time. Nothing was done then.
        """
        self._require_own(request)
        memories = _recalled(memory, request.round)
        if request.broadcast is not None:
            self._require_told(request, request.broadcast)
            self._require_first(memories)
        cast = Cast(request.round, request.honest, request.malicious, {}, request.broadcast)
        way, before = self._way(cast) if request.broadcast is not None else (None, None)
        sealed = _untold if way is None else way.sealed
        hosted = Hosted(self._channel, sealed, cast, self._party(cast.round), self._clients_per_batch)
        hosted.memories.update(memories)
        if way is not None and self._rounds is not None:
            hosted.lost |= self._spent(request)
        replies: dict[int, bytes] = {}
        try:
            for party, reply in hosted.replies(request.stage, request.requests):
                if isinstance(reply, ClientFailed):
                    raise reply
                if isinstance(reply, Exception):
                    _note(f"party {party}, stage {request.stage!r}: {type(reply).__name__}: {reply}")
                    hosted.lost.add(party)
                else:
                    replies[party] = reply
        except ClientFailed as reason:  # in a run that is to end then
            _note(str(reason))
            ended = {party: {_DONE: " ".join(self._stages(party)).encode()} for party in self._keys.own}
            return Reply({}, failed=True), _noted(ended, request.round)
        if way is not None and before is not None:
            for client, why in way.failures.items():
                _note(f"client {client}: {why}")
            self._store.write(request.round, before.clients, way.clients, way.attack)
        for party in hosted.lost:
            hosted.memories[party] = {_DONE: " ".join(self._stages(party)).encode()}
        kept = {party: self._erased(party, own) for party, own in hosted.memories.items()}
        return Reply(replies), _noted(kept, request.round)

    def _way(self, cast: Cast) -> tuple[Way, RunState]:
        """The way of the clients hosted here, and the state from which they start."""
        told, federation = cast.broadcast, self._federation
        assert told is not None
        clients, attack = self._store.before(cast.round)
        rule, space = federation.playing(cast.round)
        bound = {} if told.bound is None else {BOUND: torch.tensor(told.bound, dtype=torch.float64)}
        state = RunState(cast.round, told.model, bound, {}, clients, attack or federation.fresh_attack(), {})
        return Way(federation, state, rule, space, cast, measured=False), state

    def _spent(self, request: Request) -> set[int]:
        """Clients whose plan pays for no further round; the others are counted before they train."""
        before = self._store.participations()
        asked = [client for client in request.requests if client >= 0]
        spent = {client for client in asked if self._rounds is not None and before[client] >= self._rounds}
        if spent:
            _note(f"clients {sorted(spent)[:5]} have trained {self._rounds} times: their plan pays for no more")
        self._store.count(set(asked) - spent)
        return spent

    def _party(self, now: int) -> Callable[[int], Party]:
        def party(number: int) -> Party:
            return Party(number, now, self._keys.own[number], self._keys.pinned, self._processes)

        return party

    def _stages(self, party: int) -> Sequence[str]:
        return self._channel.client_stages if party >= 0 else self._channel.key_holder_stages

    def _erased(self, party: int, memory: Memory) -> Memory:
        """Nothing but that it has answered, once it has answered everything."""
        done = memory.get(_DONE, b"")
        finished = done.decode().split()[-1:] == list(self._stages(party)[-1:])
        return {_DONE: done} if finished else memory

    def _require_own(self, request: Request) -> None:
        foreign = request.requests.keys() - self._keys.own.keys()
        if foreign:
            raise Corrupt(f"parties {sorted(foreign)} are asked, who are not on this host")
        taking_part = [*request.honest, *request.malicious]
        clients = {party for party in request.requests if party >= 0}
        if request.round < 0 or len(set(taking_part)) != len(taking_part) or clients != set(taking_part):
            raise Corrupt(f"round {request.round}: who takes part is said twice, or others than who is asked")
        if not set(request.malicious) <= set(self._federation.arm.malicious):
            raise Corrupt("clients are told to poison that the configuration does not call malicious")

    def _require_told(self, request: Request, told: Broadcast) -> None:
        """What the server may say of a round, and no more: a clip of its own, say, would undo a client's own noise."""
        arm = self._federation.arm
        rule, space = self._federation.playing(request.round)
        adapts, bound = isinstance(rule, QuantileRelease), told.bound
        if adapts != (bound is not None) or (bound is not None and not 0 < bound < inf):
            raise Corrupt(f"bound={bound}: expected {'a positive number' if adapts else 'none: the clip is fixed'}")
        weighted = {*request.honest, *request.malicious} if arm.folds else set()
        if told.weights.keys() != weighted or not all(0 < weight <= 1 for weight in told.weights.values()):
            raise Corrupt("weights: expected one in (0, 1] for each client where clients multiply by them, else none")
        if told.model.shape != (space.width,):
            raise Corrupt(f"a model of shape {tuple(told.model.shape)}: expected ({space.width},)")

    def _require_first(self, memories: Mapping[int, Memory]) -> None:
        """Clients here train once a round: what they remember would start from a round that is half over."""
        row = self._channel.row_stage
        again = [party for party, own in memories.items() if party >= 0 and row in own.get(_DONE, b"").decode().split()]
        if again:
            raise Corrupt(f"clients {again[:5]} have trained in this round, and are to do so again")


def _untold(asked: Sequence[int]) -> Mapping[int, Encoded]:
    raise Corrupt("a row is asked for without the model it starts from")


def _note(line: str) -> None:
    """Into this host's own log; the server hears of none of it, as why a client fails may depend on its data."""
    sys.stderr.write(f"privfm: {line}\n")


def _recalled(memory: bytes, now: int) -> dict[int, Memory]:
    """Memories of the same round; those of any other are gone."""
    if not memory:
        return {}
    head, parts = unpacked(memory)
    if head[_ROUND] != now:
        return {}
    memories: dict[int, Memory] = {}
    for name, part in parts.items():
        party, _, entry = name.partition("/")
        memories.setdefault(int(party), {})[entry] = part
    return memories


def _noted(memories: Mapping[int, Memory], now: int) -> bytes:
    parts = {f"{party}/{name}": part for party, own in memories.items() for name, part in own.items()}
    return packed({_ROUND: now}, parts)


def parties_of(arm: Arm, clients: int) -> tuple[int, ...]:
    """Everybody who answers in a run: clients, canaries among them, and a key holder where the channel has one."""
    return (*range(clients), *((KEY_HOLDER,) if arm.wire.key_holder_stages else ()))


def hosted_here(place: int, places: int, arm: Arm, clients: int) -> tuple[int, ...]:
    """Parties of the host at `place` of `places`.

    A key holder is alone on the last; the malicious, who act together, are on the first; all others are dealt out in
    turns.

    Raises:
      InvalidArgument: there is no such place, or none is left for clients.
    """
    require(0 <= place < places, f"partition-id={place}: expected 0 to {places - 1}")
    holder = bool(arm.wire.key_holder_stages)
    require(places > holder, f"num-partitions={places}: the last is the key holder's alone; expected one more")
    if holder and place == places - 1:
        return (KEY_HOLDER,)
    together = set(arm.malicious)
    honest = [client for client in range(clients) if client not in together]
    return tuple(sorted([*honest[place :: places - holder], *(together if place == 0 else ())]))
