"""The client's half of `PairwiseMasks`: one function a stage, bytes in, bytes out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from secrets import token_bytes
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from privfm.checks import BrokenEnvelope, Corrupt, Overflow, ParameterMismatch, RoundFailed, TooFewClients, require
from privfm.contracts import SERVER, Memory, Party, Update
from privfm.defenses.channels.envelope import Header, Link
from privfm.defenses.channels.identities import sign, verify
from privfm.defenses.channels.masks.expansion import Words, add_mask, encoded, packed, subtract_mask, word
from privfm.defenses.channels.masks.secrets import (
    BOX_BYTES,
    SECRET_BYTES,
    SIGNATURE_BYTES,
    Announced,
    box_keys,
    close_box,
    commitment,
    confirmation,
    loaded,
    mark,
    mask_key,
    numbers_from,
    open_box,
    public_of,
    tagged,
    untagged,
)
from privfm.defenses.channels.masks.shamir import split

if TYPE_CHECKING:
    from privfm.defenses.channels.masks.channel import PairwiseMasks

NO_SHARE: Final = bytes(1 + SECRET_BYTES)
"""What a client answers for a neighbour whose box did not open."""

_PIECE = 1 << 15  # numbers converted at a time: they stay in the processor's cache

Answer = tuple[Memory, bytes]


def announce(channel: PairwiseMasks, party: Party, memory: Memory, request: bytes) -> Answer:
    """Stage "keys": two fresh keys, signed in the active mode."""
    header, _ = Link(party, SERVER).open(request)
    header.require(replace(channel.header("keys", header.key), clients=header.clients))
    sharing, masking = token_bytes(SECRET_BYTES), token_bytes(SECRET_BYTES)
    own = Announced(party.number, public_of(sharing), public_of(masking))
    if channel.active:
        own = own.signed_by(party, header.key)
    memory = {**memory, "session": header.key, "sharing": sharing, "masking": masking, "own": own.to_bytes()}
    return memory, _sealed(party, header, [own.to_bytes()])


def deal(channel: PairwiseMasks, party: Party, memory: Memory, request: bytes) -> Answer:
    """Stage "shares": a fresh seed and the mask key, in shares for the neighbours and itself.

    Raises:
      Corrupt: the server names other keys than this client's own, keys without their client's signature, or itself or
        a key holder as a client.
      ParameterMismatch: it names another number of neighbours than the bound asks for.
      TooFewClients: a sum of so few would not be opened anyway.
    """
    header, (content,) = _opened(party, request, channel.header("shares", memory["session"]), 1)
    _require_release(channel, header.clients)
    graph = channel.graph(header.clients)
    holders = Announced.all_from(content)
    if holders and holders[0].number < 0:  # they ascend
        raise Corrupt(f"party {holders[0].number} is no client, and is to be a neighbour of client {party.number}")
    if memory["own"] not in [each.to_bytes() for each in holders]:
        raise Corrupt(f"client {party.number} is asked to share keys that are not its own")
    if len(holders) != graph.neighbours + 1:
        raise ParameterMismatch(
            f"{len(holders) - 1} neighbours of {graph.clients} clients: expected {graph.neighbours}"
        )
    if channel.active:
        for each in holders:
            each.require_signature(party, memory["session"])
    seed = token_bytes(SECRET_BYTES)
    own = Announced.all_from(memory["own"])[0]
    shares = [share for _, share in split(seed + memory["masking"], len(holders), graph.threshold)]
    marks = b"".join(mark(share[:SECRET_BYTES]) + mark(share[SECRET_BYTES:]) for share in shares)
    boxes, receiving, kept, secret = [], [], b"", loaded(memory["sharing"])
    for other, share in zip(holders, shares, strict=True):
        if other.number == party.number:
            kept = share
            continue
        sending, back = box_keys(secret, own, other, party.round)
        boxes.append((other.number, close_box(sending, share)))
        receiving.append((other.number, back))
    left = {name: value for name, value in memory.items() if name != "sharing"}
    left |= {"seed": seed, "holders": content, "kept": kept, "clients": b"%d" % header.clients}
    return left | {"receiving": tagged(receiving)}, _sealed(party, header, [commitment(seed), marks, tagged(boxes)])


def mask(channel: PairwiseMasks, party: Party, memory: Memory, request: bytes, update: Update) -> Answer:
    """Stage "masked": the row under its own mask and one mask for every neighbour that dealt.

    Mask key and seed are forgotten afterwards: from here on only others can open them.

    Raises:
      TooFewClients: fewer than the threshold dealt.
      Corrupt: somebody dealt who is no neighbour.
    """
    header, (content,) = _opened(party, request, channel.header("masked", memory["session"]), 1)
    boxes = untagged(content, BOX_BYTES)
    holders = _holders(memory)
    if not boxes.keys() <= holders.keys() - {party.number}:
        raise Corrupt(f"shares of clients that are no neighbours of client {party.number}")
    _require_threshold(channel, memory, len(boxes) + 1)
    row = update()  # trains the client
    require(not row.side, f"side information {sorted(row.side)} cannot travel in a sum; use Plaintext")
    head = replace(header, length=row.rows.shape[1], clients=1, weight=row.weight)
    left = {name: value for name, value in memory.items() if name not in ("seed", "masking")} | {"boxes": content}
    try:
        words = words_of(row.rows[0], channel.modulus_bits)
    except Overflow:
        return left, _sealed(party, replace(head, clients=0), [])
    add_mask(words, memory["seed"])
    secret = loaded(memory["masking"])
    for number in boxes:
        key = mask_key(secret, holders[party.number], holders[number], party.round)
        sign_of(party.number, number)(words, key)
    return left, _sealed(party, head, [packed(words, channel.modulus_bits)])


def confirm(channel: PairwiseMasks, party: Party, memory: Memory, request: bytes) -> Answer:
    """Stage "confirm", active mode: signs the one list of survivors that it will help to open.

    Raises:
      Corrupt: the list leaves this client out, or names somebody that did not deal.
      TooFewClients: the list is too short.
    """
    header, (content,) = _opened(party, request, channel.header("confirm", memory["session"]), 1)
    survivors = set(numbers_from(content))
    _require_survivors(channel, party, memory, survivors, header.clients)
    signature = sign(party, _confirmed(party, memory, content))
    return {**memory, "survivors": content}, _sealed(party, header, [signature])


def unmask(channel: PairwiseMasks, party: Party, memory: Memory, request: bytes) -> Answer:
    """Stage "unmask": for each neighbour one share, of its seed if it survived, of its mask key if it dropped out.

    Raises:
      Corrupt: the lists are not exactly the neighbours that dealt, each in one of them; this client is not among the
        survivors; or, in the active mode, it is not the list that was confirmed.
      TooFewClients: too few survive, or confirmed.
    """
    header, parts = _opened(party, request, channel.header("unmask", memory["session"]), 3 if channel.active else 2)
    survivors, dropped = set(numbers_from(parts[0])), set(numbers_from(parts[1]))
    if survivors & dropped:
        raise Corrupt(f"clients {sorted(survivors & dropped)} are said to have survived and to have dropped out")
    boxes = untagged(memory["boxes"], BOX_BYTES)
    if survivors | dropped != {*boxes, party.number}:
        raise Corrupt("the lists to unmask are not the neighbours that dealt shares")
    _require_survivors(channel, party, memory, survivors, header.clients)
    if channel.active:
        _require_confirmed(channel, party, memory, parts[0], parts[2])
    keys, shares = untagged(memory["receiving"], SECRET_BYTES), []
    for number in sorted(survivors | dropped):
        both = memory["kept"] if number == party.number else open_box(keys[number], boxes[number])
        chosen = slice(0, SECRET_BYTES) if number in survivors else slice(SECRET_BYTES, None)
        shares.append(NO_SHARE if both is None else b"\1" + both[chosen])
    return {}, _sealed(party, header, [b"".join(shares)])


def sign_of(own: int, other: int) -> Callable[[Words, bytes], None]:
    """Which of two clients adds their mask: the one with the smaller number; the other subtracts it."""
    return add_mask if own < other else subtract_mask


def words_of(row: Tensor, bits: int) -> Words:
    """A row `(w,)` of whole numbers, none beyond half the modulus 2^bits, as words `(w,)`.

    Raises:
      Overflow: some number is not finite, not whole or beyond. Nothing is rounded or cut: that would bend the sum.
    """
    values: NDArray[np.float64] = row.detach().cpu().double().numpy()
    words: Words = np.empty(len(values), word(bits))
    for at in range(0, len(values), _PIECE):
        piece = values[at : at + _PIECE]
        largest = float(np.abs(piece).max())
        if not largest <= 2.0 ** (bits - 1):
            raise Overflow(
                f"modulus_bits={bits}: a coordinate of absolute value {largest:.4g} is beyond half of 2^bits"
            )
        numbers = piece.astype(np.int64)
        if not np.array_equal(numbers, piece):
            raise Overflow("a coordinate is not whole; put a codec of whole numbers before the channel")
        words[at : at + _PIECE] = encoded(numbers, bits)
    return words


def _opened(party: Party, request: bytes, expected: Header, parts: int) -> tuple[Header, list[bytes]]:
    """A message of the server. How many clients it speaks of is its word."""
    header, content = Link(party, SERVER).open(request)
    header.require(replace(expected, clients=header.clients, parts=parts))
    return header, content


def _sealed(party: Party, header: Header, parts: list[bytes]) -> bytes:
    return Link(party, SERVER).seal(replace(header, parts=len(parts)), parts)


def _holders(memory: Memory) -> dict[int, Announced]:
    return {each.number: each for each in Announced.all_from(memory["holders"])}


def _confirmed(party: Party, memory: Memory, survivors: bytes) -> bytes:
    sharing = {*untagged(memory["boxes"], BOX_BYTES), party.number}
    return confirmation(party, memory["session"], memory["holders"], sharing, survivors)


def _require_release(channel: PairwiseMasks, clients: int) -> None:
    if clients < channel.smallest_release:
        raise TooFewClients(f"smallest_release={channel.smallest_release}: a sum of {clients} client(s) is not opened")
    if clients > channel.clients:
        raise RoundFailed(f"clients={channel.clients}: a sum of {clients} has no head-room; raise clients")


def _require_threshold(channel: PairwiseMasks, memory: Memory, left: int) -> None:
    threshold = channel.graph(int(memory["clients"])).threshold
    if left < threshold:
        raise TooFewClients(f"threshold={threshold}: only {left} of a client and its neighbours are left")


def _require_survivors(channel: PairwiseMasks, party: Party, memory: Memory, survivors: set[int], said: int) -> None:
    """Checks a list of survivors, of whom the server says there are `said` in all."""
    dealt = {*untagged(memory["boxes"], BOX_BYTES), party.number}
    if party.number not in survivors or not survivors <= dealt:
        raise Corrupt(f"a list of survivors without client {party.number}, or with others than dealt shares")
    complete = channel.graph(int(memory["clients"])).complete
    if said < len(survivors) or (complete and said != len(survivors)):
        raise Corrupt(f"a sum of {said} clients, of whom {len(survivors)} are listed")
    _require_release(channel, said)
    _require_threshold(channel, memory, len(survivors))


def _require_confirmed(
    channel: PairwiseMasks, party: Party, memory: Memory, survivors: bytes, confirmations: bytes
) -> None:
    """Checks that at least the threshold of survivors signed the list that this client signed."""
    if survivors != memory["survivors"]:
        raise Corrupt("the list to unmask is not the list of survivors that this client confirmed")
    signed = untagged(confirmations, SIGNATURE_BYTES)
    if not signed.keys() <= set(numbers_from(survivors)):
        raise Corrupt("a confirmation by somebody that did not survive")
    content = _confirmed(party, memory, survivors)
    for number, signature in signed.items():
        try:
            verify(party.pinned(number), content, signature)
        except BrokenEnvelope as error:
            raise Corrupt(f"client {number} did not confirm this list: the server told it another story") from error
    _require_threshold(channel, memory, len(signed))
