"""What every channel with a key holder does alike: a signed key, one row a client, and no sum of too few."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from struct import pack

from privfm.checks import BrokenEnvelope, Corrupt, Replay, RoundFailed, TooFewClients
from privfm.contracts import KEY_HOLDER, Exchange, Intake, Party
from privfm.defenses.channels.envelope import Header, Link
from privfm.defenses.channels.identities import sign, verify


def asked(exchange: Exchange, stage: str, request: bytes) -> bytes:
    """The key holder's reply.

    Raises:
      RoundFailed: there is none.
    """
    reply = dict(exchange(stage, {KEY_HOLDER: request})).get(KEY_HOLDER)
    if reply is None:
        raise RoundFailed(f"the key holder did not answer to {stage!r}")
    return reply


def signature(party: Party, head: Header, public: bytes) -> bytes:
    """The key holder's, 64 bytes, over what its key is for: scheme, parameters and round."""
    return sign(party, _signed(party, head, public))


def require_signature(party: Party, head: Header, public: bytes, signed: bytes) -> None:
    """Checks the key holder's signature against its pinned identity, so that no server puts a key of its own there.

    Raises:
      Corrupt: it is another's, or over another key, round or other parameters.
    """
    verify(party.pinned(KEY_HOLDER), _signed(party, head, public), signed)


def refusal(header: Header) -> Header:
    """The header of a client whose row does not fit: no parts, nobody's row."""
    return replace(header, parts=0, clients=0)


def gathered(
    exchange: Exchange,
    requests: Mapping[int, bytes],
    own: Header,
    intake: Intake,
    take: Callable[[int, list[bytes]], None],
) -> tuple[list[int], int, int]:
    """Stage "update": takes one row of each client that was asked, as they come.

    Args:
      exchange: with the clients.
      requests: by client.
      own: header of a client's message, but for its weight.
      intake: which weight each must have folded in, and how few may answer.
      take: keeps the parts of a message, whole or not at all; raises BrokenEnvelope where they do not fit.

    Returns:
      Clients whose rows were taken, how many refused to send theirs, and how many messages were broken, foreign,
      replayed or second.
    """
    taken: list[int] = []
    answered: set[int] = set()
    broken = 0
    for party, reply in exchange("update", requests):
        try:
            if party not in requests or party in answered:
                raise Replay(f"client {party} was not asked, or has answered already")
            expected = replace(own, weight=intake.weights.get(party, 1.0))
            header, parts = Link(exchange.server, party).open(reply)
            if header != refusal(expected):
                header.require(expected)
                take(party, parts)
                taken.append(party)
            answered.add(party)
        except BrokenEnvelope:
            broken += 1
    return taken, len(answered) - len(taken), broken


def require_enough(answered: int, least_answers: int, smallest_release: int) -> None:
    """Before a sum of so many is opened. Of nobody there is nothing to open.

    Raises:
      TooFewClients: the plan, or the channel, wants more.
    """
    if answered < least_answers:
        raise TooFewClients(f"least_answers={least_answers}: {answered} client(s) answered; their sum stays closed")
    if 0 < answered < smallest_release:
        raise TooFewClients(f"smallest_release={smallest_release}: only {answered} client(s) answered")


def require_release(clients: int, smallest_release: int, most: int) -> None:
    """What a key holder asks of the number of clients in a sum.

    Raises:
      TooFewClients: they are fewer than it decrypts a sum of.
      RoundFailed: more than there is head-room for.
    """
    kind = TooFewClients if clients < smallest_release else RoundFailed
    if not smallest_release <= clients <= most:
        raise kind(f"a sum of {clients} clients: expected {smallest_release} to {most}")


def readers_from(content: bytes, count: int, most: int) -> list[int]:
    """The clients that may read, as the server names them, 8 bytes each. The server is none.

    Raises:
      Corrupt: they are not `count` different clients, or more than `most`.
    """
    readers = [int.from_bytes(content[at : at + 8], "little", signed=True) for at in range(0, len(content), 8)]
    different = len(content) == 8 * count and len(set(readers)) == count > 0
    if not different or min(readers) < 0 or count > most:
        raise Corrupt(f"{len(readers)} readers: expected {count} different clients, at most {most}")
    return readers


def readers_to_bytes(readers: Sequence[int]) -> bytes:
    """The inverse."""
    return b"".join(reader.to_bytes(8, "little", signed=True) for reader in readers)


def _signed(party: Party, head: Header, public: bytes) -> bytes:
    return head.scheme.encode() + b" keys" + head.parameters + pack(">q", party.round) + public
