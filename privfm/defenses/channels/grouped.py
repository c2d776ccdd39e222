"""Sums of random groups: robust rules over what secure sums reveal, at the price of weaker privacy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import pairwise
from math import comb
from queue import SimpleQueue
from struct import pack
from threading import Thread
from typing import Final, final

import torch
from torch import Tensor

from privfm.blocks import finite
from privfm.checks import RoundFailed, TooFewClients, at_least, require
from privfm.contracts import Channel, Exchange, Intake, MatrixView, Memory, Party, Reveals, Update, View
from privfm.contracts.transforms import MARGIN
from privfm.defenses.channels.selective import Selective
from privfm.defenses.views import SumView


@final
@dataclass(frozen=True)
class Grouped(Channel):
    """The cohort in random groups, one secure sum a group; rules see one mean a group.

    So a rule that compares coordinates, for which no sum is enough, runs without anybody opening a single row.

    *Robustness.* f malicious clients spoil at most f groups, so a rule's f counts groups, and its cohort is
    `rows(n)`: the breakdown point in clients is smaller by the factor `size`. Whoever can end a sum ends its own
    group's only. A group's mean varies less than a row (by sqrt(size), for independent clients), which rules gain from.
    A plan's clip is applied again to every group's mean; inside a group nothing holds a malicious client back.

    *Privacy.* A client hides among those of its group who answered, and not among all: at least the inner channel's
    `smallest_release`, as a rule at least `size`. Clients that work with the server are not among them; `isolation`
    bounds the probability that they are all others of somebody's group. What the inner channel assumes must hold in
    every *group*: a share of corrupt clients that is small in the cohort is larger in some group, and with masks as
    many corrupt clients in a group as their `threshold` open rows, which happens sooner than isolation. Groups are
    drawn anew in every round, so that over the rounds the server can solve for what stays the same in each client's
    updates, sooner than from sums over all. Noise that is shared out among clients must suffice for one group.

    *Who draws the groups.* The server, which is believed to follow the protocol: they follow from the round and the
    clients' numbers by a public hash (see `partition`), so that runs repeat, and whoever knows the cohort can check
    them. The clients' protocol does not: to a client its group is the cohort. A server that lies can surround a victim
    with its own, within what the inner channel allows for.

    | event                                          | result                                                    |
    |------------------------------------------------|-----------------------------------------------------------|
    | fewer than `size` clients are asked            | TooFewClients, before anything is sent                    |
    | a group's round fails: too few answers, all of | its row is missing, and its clients are lost as drop-outs |
    | them refused                                   | are: not in `bad`, f stays                                |
    | every group's round fails                      | RoundFailed or TooFewClients, the first group's           |
    | a client left out by its group's channel       | counted in `bad`, and so against f; the group's row stays |
    | nobody of a group answered                     | its row is missing                                        |
    | nobody answered at all                         | no rows                                                   |
    | a group's sum is not finite                    | its row is left out, one more in `bad`                    |
    | the rule needs only the sum                    | the sum over all clients of groups that did not fail      |

    Every group counts the same, whatever its number of answers. The view's `ids` number the groups, as `partition`
    gives them, and no clients.

    Channels with a key holder are refused: it answers each stage once a round, and must, or it would open several sums
    under one key. So is what reveals more than sums.

    All groups go through their stages together. So an engine sees one request a stage for all clients: trains them in
    its own batches, and attackers after everybody else, as without groups.

    Cost: the inner channel's for `size` clients, which is where pairwise masks gain; the server holds one running sum
    and in the end one row a group.

    Args:
      channel: of sums, without a key holder.
      size: fewest clients that are asked in a group; it, and not the number of groups, says how private a round is,
        however many clients were drawn.

    Raises:
      InvalidArgument: the channel does not fit, or has no room for a group of `2 size - 1`.

    Source: Velicheti, Xia, Koyejo, "Secure Byzantine-robust distributed learning via clustering", 2021 (SHARE).
    """

    channel: Channel
    size: int
    reveals = Reveals.EACH

    def __post_init__(self) -> None:
        inner, name = self.channel, type(self.channel).__name__
        least = getattr(inner, "smallest_release", 2)
        require(
            inner.reveals is Reveals.SUM and not isinstance(inner, Selective),
            f"{name} shows the server values of single clients, which groups cannot hide; "
            "expected PairwiseMasks or RLWEPad",
        )
        require(
            not inner.key_holder_stages,
            f"{name} has a key holder, which answers each stage once a round, and not once a group; "
            "expected PairwiseMasks or RLWEPad",
        )
        at_least("size", self.size, 2)  # the sum of one is its row
        require(self.size >= least, f"size={self.size}: {name} opens no sum of fewer than smallest_release={least}")
        largest, room = 2 * self.size - 1, inner.most_clients
        require(
            room is None or room >= largest,
            f"size={self.size}: {largest} clients make one group, {name} has room for {room}; raise it to {largest}",
        )

    @property
    def client_stages(self) -> tuple[str, ...]:  # type: ignore[override]  # constants of other channels
        return self.channel.client_stages

    @property
    def row_stage(self) -> str:  # type: ignore[override]
        return self.channel.row_stage

    @property
    def integers(self) -> bool:  # type: ignore[override]
        return self.channel.integers

    @property
    def least_clients(self) -> int:
        return self.size

    @property
    def most_summed(self) -> int | None:
        return self.channel.most_clients

    @property
    def largest_coordinate(self) -> float | None:
        return self.channel.largest_coordinate

    @property
    def modulus(self) -> int | None:
        return self.channel.modulus

    @property
    def grid(self) -> float | None:
        return self.channel.grid

    def rows(self, n: int) -> int:
        """Groups of n clients: of at least `size` each, and of equal size but for one client."""
        return n // self.size

    def isolation(self, n: int, corrupt: int) -> float:
        """Bounds the probability that in some group all but one of n clients are corrupt: then its row lies open.

        A union bound over the honest clients, for groups that are drawn independently of who is corrupt; each is in
        the smallest group: `(n-corrupt) C(corrupt, s-1) / C(n-1, s-1)`. Of one round; drop-outs come on top.

        Args:
          n: clients in the cohort, at least `size`.
          corrupt: how many of them share what they know with the server.
        """
        at_least("n", n, self.size)
        at_least("corrupt", corrupt, 0)
        others = n // self.rows(n) - 1
        return min(1.0, (n - corrupt) * comb(corrupt, others) / comb(n - 1, others))

    def facts(self, d: int, n: int) -> Mapping[str, str]:
        if n < self.size:
            return {"groups": f"none: {n} clients are fewer than size={self.size}"}
        rows = self.rows(n)
        sizes = {n // rows, -(-n // rows)}
        alone = f"probability <= {self.isolation(n, n // 5):.2g}, if a fifth of all clients are corrupt"
        return {
            "groups": f"{rows} of {' or '.join(map(str, sorted(sizes)))} clients",
            "alone in a group of corrupt clients": alone,
            **self.channel.facts(d, max(sizes)),
        }

    def with_floor(self, least: int) -> Grouped:
        return replace(self, channel=self.channel.with_floor(least))

    @property
    def learns(self) -> Mapping[str, str]:
        inner = self.channel.learns
        return {
            **inner,
            "server": f"of each random group of at least {self.size} clients: {inner['server']}",
            "trust": f"the server draws the groups as it should; in each of them: {inner['trust']}",
        }

    def reply(self, party: Party, stage: str, memory: Memory, request: bytes, update: Update) -> tuple[Memory, bytes]:
        return self.channel.reply(party, stage, memory, request, update)

    def collect(self, cohort: Sequence[int], intake: Intake, exchange: Exchange) -> View:
        if not cohort:
            return _viewed((), intake)
        if len(cohort) < self.size:
            raise TooFewClients(f"size={self.size}: {len(cohort)} client(s) make no group; ask more, or lower size")
        parts = partition(cohort, self.rows(len(cohort)), exchange.server.round)
        summed = replace(intake, needs=Reveals.SUM)

        def opened(members: Sequence[int]) -> Callable[[Exchange], _Opened]:
            def work(line: Exchange) -> _Opened:
                view = self.channel.collect(members, summed, line)
                return _Opened(view.ids, view.bad, view.total())  # here, because opening may take further stages

            return work

        groups = [_Group(members, exchange.server, opened(members)) for members in parts]
        _together(groups, exchange, self.client_stages)
        return _viewed(groups, intake)


def partition(cohort: Sequence[int], groups: int, round: int) -> list[tuple[int, ...]]:
    """Splits a cohort at random, into groups whose sizes differ by one at most.

    Clients are ordered by SHA-256 of round and number, and cut in that order. Everybody can compute it beforehand,
    which helps no attacker: f clients spoil f groups at most, however they fall. Whoever chooses the cohort in
    knowledge of who is corrupt can look for one that isolates a client; the cohort must be drawn fairly.

    Args:
      cohort: clients, in any order.
      groups: how many, at least 1.
      round: as the server counts.

    >>> partition([1, 2, 3, 4, 5], groups=2, round=0) == partition([5, 4, 3, 2, 1], groups=2, round=0)
    True
    """
    at_least("groups", groups, 1)
    order = sorted(cohort, key=lambda client: sha256(pack(">9sqq", b"partition", round, client)).digest())
    ends = [place * len(order) // groups for place in range(groups + 1)]
    return [tuple(sorted(order[lo:hi])) for lo, hi in pairwise(ends)]


@final
@dataclass(frozen=True)
class _Opened:
    """What one group's round gave: who is in the sum `(d,)`, and how many were left out."""

    ids: tuple[int, ...]
    bad: int
    total: Tensor

    def kept(self, intake: Intake) -> tuple[float, float]:
        """By what the sum is divided for the mean, and by what both are shortened to keep to the plan's clip."""
        weight = sum(intake.weights.get(client, 1.0) for client in self.ids)
        norm = float(self.total.double().norm()) / weight
        return weight, intake.max_norm * (1 - MARGIN) / norm if norm > intake.max_norm else 1.0


def _viewed(groups: Sequence[_Group], intake: Intake) -> View:
    """All groups' sums as one view.

    Raises:
      RoundFailed: no group's round came to an end.
    """
    failed = [group.failure for group in groups if group.failure is not None]
    if failed and len(failed) == len(groups):
        raise failed[0]
    ended = {number: group.opened for number, group in enumerate(groups) if group.opened is not None}
    arrived = {number: one for number, one in ended.items() if one.ids and bool(finite(one.total[None]))}
    bad = sum(one.bad + (number not in arrived and bool(one.ids)) for number, one in ended.items())
    if intake.needs is Reveals.SUM:
        total = torch.zeros(intake.d, dtype=torch.float64)
        for one in arrived.values():
            total += one.total.double() * one.kept(intake)[1]
        ids = tuple(sorted(client for one in arrived.values() for client in one.ids))
        return SumView(total.float, ids, intake.d, bad)
    rows = torch.empty(len(arrived), intake.d)
    for row, one in zip(rows, arrived.values(), strict=True):
        weight, factor = one.kept(intake)
        row.copy_(one.total * (factor / weight))
    return MatrixView(rows, list(arrived), left_out=bad)


_STOP: Final = "stop"


class _Stopped(BaseException):
    """The round ended for everybody; no `except Exception` of a channel may hold it up."""


_Reply = tuple[int, bytes]


@final
class _Group(Exchange):
    """One group's round, as a coroutine: it runs until it wants something, and then waits to be given it.

    `Channel.collect` is an ordinary function that asks and waits for answers; to hold several of them at the point
    where each has asked, each has a thread. Only one of all threads ever runs: control is handed to and fro.

    Attributes:
      asked: stage and requests it waits for replies to; None once it has ended.
      opened: its result, if it has one.
      failure: why it has none.
    """

    def __init__(self, members: tuple[int, ...], server: Party, work: Callable[[Exchange], _Opened]) -> None:
        self.members, self.server = members, server
        self.asked: tuple[str, Mapping[int, bytes]] | None = None
        self.opened: _Opened | None = None
        self.failure: RoundFailed | None = None
        self._crash: BaseException | None = None
        self._inbox: SimpleQueue[_Reply | str | None] = SimpleQueue()
        self._outbox: SimpleQueue[None] = SimpleQueue()
        self._thread = Thread(target=self._run, args=(work,), daemon=True)

    def __call__(self, stage: str, requests: Mapping[int, bytes]) -> Iterator[_Reply]:
        require(requests.keys() <= set(self.members), f"stage={stage!r} asks others than the group's clients")
        self.asked = stage, requests
        while (reply := self._wait()) is not None:
            yield reply

    def start(self) -> None:
        """Runs it until it first asks."""
        self._thread.start()
        self._returned()

    def give(self, reply: _Reply | None) -> None:
        """Hands one reply over, or None after the last, and runs it until it wants the next."""
        self._inbox.put(reply)
        self._returned()

    def stop(self) -> None:
        """Ends it, if it has not ended."""
        if self._thread.is_alive():  # it was started, and waits or will soon
            self._inbox.put(_STOP)
            self._thread.join()

    def _returned(self) -> None:
        self._outbox.get()
        if self._crash is not None:
            raise self._crash

    def _wait(self) -> _Reply | None:
        self._outbox.put(None)
        given = self._inbox.get()
        if isinstance(given, str):
            raise _Stopped
        return given

    def _run(self, work: Callable[[Exchange], _Opened]) -> None:
        try:
            self.opened = work(self)
        except RoundFailed as failure:
            self.failure = failure
        except BaseException as crash:  # raised again where the round is played
            self._crash = crash
        self.asked = None
        self._outbox.put(None)


def _together(groups: Sequence[_Group], exchange: Exchange, stages: Sequence[str]) -> None:
    """Plays the rounds of all groups, stage by stage: one question to all clients a stage, replies as they come."""
    try:
        for group in groups:
            group.start()
        while asking := [group for group in groups if group.asked is not None]:
            stage = min((group.asked[0] for group in asking if group.asked), key=stages.index)
            now = {group: group.asked for group in asking if group.asked and group.asked[0] == stage}
            requests = {party: request for _, asked in now.values() for party, request in asked.items()}
            owner = {party: group for group, (_, asked) in now.items() for party in asked}
            for party, reply in exchange(stage, requests):
                group = owner.get(party, next(iter(now)))  # nobody asked for it: some group's channel counts it as such
                if group.asked is now[group]:  # it may have stopped listening
                    group.give((party, reply))
            for group, asked in now.items():
                if group.asked is asked:
                    group.give(None)
    finally:
        for group in groups:
            group.stop()
