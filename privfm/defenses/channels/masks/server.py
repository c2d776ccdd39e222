"""The server's half of `PairwiseMasks`: forwards boxes, adds masked rows, takes the masks off the sum."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from secrets import token_bytes
from typing import TYPE_CHECKING, final

import numpy as np
from numpy.typing import NDArray

from privfm.checks import BrokenEnvelope, Corrupt, Replay, RoundFailed, TooFewClients
from privfm.contracts import Exchange, Intake
from privfm.defenses.channels.envelope import Header, Link
from privfm.defenses.channels.identities import verify
from privfm.defenses.channels.key_holder import require_enough
from privfm.defenses.channels.masks.client import NO_SHARE, sign_of
from privfm.defenses.channels.masks.expansion import centred, subtract_mask, unpacked, word
from privfm.defenses.channels.masks.graph import MaskGraph, ring
from privfm.defenses.channels.masks.secrets import (
    BOX_BYTES,
    MARK_BYTES,
    SECRET_BYTES,
    Announced,
    commitment,
    confirmation,
    loaded,
    mark,
    mask_key,
    numbers_to_bytes,
    public_of,
    tagged,
    untagged,
)
from privfm.defenses.channels.masks.shamir import join

if TYPE_CHECKING:
    from privfm.defenses.channels.masks.channel import PairwiseMasks

Take = Callable[[int, Header, list[bytes]], None]
"""Keeps one answer, or raises BrokenEnvelope."""


@final
class MaskedSum:
    """One round as the server runs it. It holds one running row, whatever the number of clients.

    Attributes:
      ids: clients whose rows are in the sum, sorted; known after `gather`.
      bad: messages left out so far.
    """

    def __init__(self, channel: PairwiseMasks, intake: Intake, exchange: Exchange) -> None:
        self._channel, self._intake, self._exchange = channel, intake, exchange
        self._session = token_bytes(16)
        self._announced: dict[int, Announced] = {}
        self._holders: dict[int, list[int]] = {}  # of each client's shares: its neighbours and itself, sorted
        self._commitments: dict[int, bytes] = {}
        self._marks: dict[int, list[tuple[bytes, bytes]]] = {}  # of the shares of seed and mask key, by holder
        self._boxes: dict[int, dict[int, bytes]] = {}  # by owner, then by holder
        self._running = np.zeros(intake.width, word(channel.modulus_bits))
        self.ids: tuple[int, ...] = ()
        self.bad = 0

    def gather(self, cohort: Sequence[int]) -> None:
        """Stages "keys", "shares" and "masked": afterwards the masked sum lies here, and nothing can be read yet.

        Raises:
          TooFewClients: fewer than may be summed, or too few neighbours of some client.
          RoundFailed: nobody's row is whole numbers within range.
        """
        self._require_answers(self._keys(cohort))
        if not self._announced:
            return
        graph = self._channel.graph(len(self._announced))
        self._require_answers(self._shares(graph))
        self._require_neighbours(graph, self._commitments.keys())
        ids, refused = self._masked()
        if refused and not ids:
            raise RoundFailed(
                f"modulus={self._channel.modulus}: the rows of {refused} clients are not whole numbers of at most half "
                "of it; put FixedPoint or DistributedNoise before the channel, with a bound that the rows keep to"
            )
        self._require_answers(len(ids))
        if ids:
            self._require_neighbours(graph, set(ids))
        self.ids = tuple(sorted(ids))

    def open(self) -> NDArray[np.int64]:
        """Stages "confirm" and "unmask": the sum `(w,)` of whole numbers modulo the modulus, centred.

        Raises:
          TooFewClients: fewer than the threshold are left.
          RoundFailed: a client's shares do not give what it committed to; it is named.
        """
        graph = self._channel.graph(len(self._announced))
        asked, confirmations = self._confirmed(graph) if self._channel.active else (self.ids, b"")
        shares = self._unmasked(asked, confirmations)
        for owner in sorted(self._commitments):
            secret = self._joined(owner, shares[owner], graph.threshold)
            if owner in self.ids:
                subtract_mask(self._running, secret)
            else:
                self._take_off(owner, secret)
        return centred(self._running, self._channel.modulus_bits)

    # Stages

    def _keys(self, cohort: Sequence[int]) -> int:
        def take(party: int, header: Header, parts: list[bytes]) -> None:
            found = Announced.all_from(_only(parts))
            if [each.number for each in found] != [party]:
                raise Corrupt(f"client {party} announced the keys of clients {[each.number for each in found]}")
            announced = found[0]
            announced.require_keys()
            if self._channel.active:
                announced.require_signature(self._exchange.server, self._session)
            self._announced[party] = announced

        self._ask("keys", {party: [] for party in cohort}, len(cohort), take)
        return len(self._announced)

    def _shares(self, graph: MaskGraph) -> int:
        numbers = sorted(self._announced)
        for own, others in enumerate(ring(len(numbers), graph.neighbours, token_bytes(SECRET_BYTES))):
            self._holders[numbers[own]] = sorted(numbers[place] for place in (own, *others))

        def take(party: int, header: Header, parts: list[bytes]) -> None:
            holders = self._holders[party]
            committed, marks, boxes = _so_many(parts, 3)
            opened = untagged(boxes, BOX_BYTES)
            if len(committed) != SECRET_BYTES or len(marks) != 2 * MARK_BYTES * len(holders):
                raise Corrupt(f"client {party} committed to {len(marks)} bytes of marks for {len(holders)} shares")
            if sorted((*opened, party)) != holders:
                raise Corrupt(f"client {party} dealt shares to others than its neighbours")
            cut = [marks[at : at + MARK_BYTES] for at in range(0, len(marks), MARK_BYTES)]
            self._marks[party] = list(zip(cut[::2], cut[1::2], strict=True))
            self._commitments[party], self._boxes[party] = committed, opened

        requests = {
            party: [b"".join(self._announced[holder].to_bytes() for holder in holders)]
            for party, holders in self._holders.items()
        }
        self._ask("shares", requests, len(numbers), take)
        return len(self._commitments)

    def _masked(self) -> tuple[list[int], int]:
        ids: list[int] = []
        refused: list[int] = []

        def take(party: int, header: Header, parts: list[bytes]) -> None:
            if not parts and header.clients == 0:
                refused.append(party)
                return
            values = unpacked(_only(parts), self._intake.width, self._channel.modulus_bits)
            np.add(self._running, values, out=self._running)
            ids.append(party)

        requests = {party: [tagged(self._boxes_for(party))] for party in self._commitments}
        self._ask("masked", requests, len(requests), take)
        self.bad += len(refused)
        return ids, len(refused)

    def _confirmed(self, graph: MaskGraph) -> tuple[Sequence[int], bytes]:
        survivors = numbers_to_bytes(self.ids)
        holders = b"".join(self._announced[number].to_bytes() for number in sorted(self._announced))
        server, sharing = self._exchange.server, self._commitments
        content = confirmation(server, self._session, holders, sharing, survivors)
        signed: dict[int, bytes] = {}

        def take(party: int, header: Header, parts: list[bytes]) -> None:
            verify(server.pinned(party), content, _only(parts))
            signed[party] = parts[0]

        self._ask("confirm", {party: [survivors] for party in self.ids}, len(self.ids), take, counted=False)
        if len(signed) < graph.threshold:
            raise TooFewClients(f"threshold={graph.threshold}: only {len(signed)} client(s) confirmed who survived")
        return sorted(signed), tagged(signed.items())

    def _unmasked(self, asked: Sequence[int], confirmations: bytes) -> dict[int, dict[int, bytes]]:
        """The shares of each client, by holder; whoever they are of is in the answers' order."""
        dealt, survivors = self._commitments.keys(), set(self.ids)
        shares: dict[int, dict[int, bytes]] = {owner: {} for owner in dealt}
        requests: dict[int, list[bytes]] = {}
        for party in asked:
            around = [holder for holder in self._holders[party] if holder in dealt]
            lists = [numbers_to_bytes(n for n in around if (n in survivors) == kept) for kept in (True, False)]
            requests[party] = [*lists, confirmations] if self._channel.active else lists

        def take(party: int, header: Header, parts: list[bytes]) -> None:
            owners = [holder for holder in self._holders[party] if holder in dealt]
            size, content = len(NO_SHARE), _only(parts)
            if len(content) != size * len(owners):
                raise Corrupt(f"client {party} answered {len(content)} bytes for {len(owners)} shares")
            for place, owner in enumerate(owners):
                given = content[place * size : (place + 1) * size]
                if given != NO_SHARE:
                    shares[owner][party] = given[1:]

        self._ask("unmask", requests, len(self.ids), take, counted=False)
        return shares

    # Opening

    def _joined(self, owner: int, shares: Mapping[int, bytes], threshold: int) -> bytes:
        """The seed of a survivor, or the mask key of a drop-out."""
        survived = owner in self.ids
        fitting: list[tuple[int, bytes]] = []
        wrong: list[int] = []
        for place, holder in enumerate(self._holders[owner]):
            if holder not in shares:
                continue
            if mark(shares[holder]) == self._marks[owner][place][0 if survived else 1]:
                fitting.append((place + 1, shares[holder]))
            else:
                wrong.append(holder)
        if len(fitting) < threshold:
            message = f"threshold={threshold}: only {len(fitting)} shares of client {owner} arrived"
            if wrong:
                raise RoundFailed(f"{message} as it had marked them; those held by clients {wrong} are others")
            raise TooFewClients(message)
        secret = join(fitting, threshold)
        known = self._commitments[owner] if survived else self._announced[owner].masking
        if (commitment(secret) if survived else public_of(secret)) != known:
            raise RoundFailed(f"client {owner} dealt shares that do not give what it committed to; leave it out")
        return secret

    def _take_off(self, dropped: int, secret: bytes) -> None:
        """Removes what the survivors added for masks with a client whose row never came."""
        private, own = loaded(secret), self._announced[dropped]
        for party in set(self._holders[dropped]) & set(self.ids):
            key = mask_key(private, own, self._announced[party], self._exchange.server.round)
            sign_of(dropped, party)(self._running, key)  # as the drop-out would have masked a row of zeros

    # Messages

    def _ask(
        self, stage: str, requests: Mapping[int, list[bytes]], clients: int, take: Take, *, counted: bool = True
    ) -> None:
        """Asks each party and takes each answer once; a broken or second one is left out, and counted.

        Args:
          stage: of the protocol.
          requests: what to send, by party.
          clients: what the header says.
          take: keeps the parts.
          counted: the party's row is lost with its answer.
        """
        server, channel = self._exchange.server, self._channel
        head = replace(channel.header(stage, self._session), clients=clients)
        sealed = {
            party: Link(server, party).seal(replace(head, parts=len(parts)), parts) for party, parts in requests.items()
        }
        taken: set[int] = set()
        for party, reply in self._exchange(stage, sealed):
            try:
                if party not in requests or party in taken:
                    raise Replay(f"a second answer of client {party}, or one that nobody asked for")
                header, parts = Link(server, party).open(reply)
                expected = head
                if stage == "masked":
                    weight = self._intake.weights.get(party, 1.0)
                    refusal = not parts and header.clients == 0
                    expected = replace(head, length=self._intake.width, clients=0 if refusal else 1, weight=weight)
                header.require(replace(expected, parts=header.parts))
                take(party, header, parts)
                taken.add(party)
            except BrokenEnvelope:
                self.bad += counted

    def _boxes_for(self, party: int) -> list[tuple[int, bytes]]:
        around = self._holders[party]
        return [(owner, self._boxes[owner][party]) for owner in around if owner in self._boxes and owner != party]

    def _require_answers(self, answered: int) -> None:
        require_enough(answered, self._intake.least_answers, self._channel.smallest_release)

    def _require_neighbours(self, graph: MaskGraph, left: Collection[int]) -> None:
        for owner in self._commitments:
            here = sum(holder in left for holder in self._holders[owner])
            if here < graph.threshold:
                raise TooFewClients(
                    f"threshold={graph.threshold}: of client {owner} and its {graph.neighbours} neighbours only {here} "
                    "are left; assume more dropouts, or take more neighbours"
                )


def _only(parts: list[bytes]) -> bytes:
    return _so_many(parts, 1)[0]


def _so_many(parts: list[bytes], count: int) -> list[bytes]:
    if len(parts) != count:
        raise Corrupt(f"a message in {len(parts)} parts, expected {count}")
    return parts
