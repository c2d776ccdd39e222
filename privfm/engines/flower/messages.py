"""What server and hosts say to each other, beside what goes on inside a channel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from struct import pack
from typing import final

import numpy as np
import torch
from torch import Tensor

from privfm.checks import Corrupt
from privfm.contracts import Broadcast
from privfm.engines.flower.wire import packed, unpacked


@final
@dataclass(frozen=True)
class Request:
    """One stage of one round, for all parties on one host.

    Attributes:
      round: counted from 0.
      stage: of the channel.
      honest: clients of this host that take part, in the order in which they answer.
      malicious: those of it that poison.
      requests: a party -> what the channel asks of it.
      broadcast: what clients start from; only at the stage at which they train.
    """

    round: int
    stage: str
    honest: tuple[int, ...]
    malicious: tuple[int, ...]
    requests: Mapping[int, bytes]
    broadcast: Broadcast | None = None

    def to_bytes(self) -> bytes:
        """As it goes over the network."""
        told = self.broadcast
        head = {
            "round": self.round,
            "stage": self.stage,
            "honest": list(self.honest),
            "malicious": list(self.malicious),
        }
        parts = named("request", self.requests)
        if told is not None:
            weights = {str(client): weight for client, weight in told.weights.items()}
            head |= {"bound": told.bound, "cohort": told.cohort, "weights": weights}
            parts["model"] = vector_to_bytes(told.model)
        return packed(head, parts)

    @classmethod
    def from_bytes(cls, content: bytes) -> Request:
        """The inverse.

        Raises:
          Corrupt: it is none.
        """
        with _reading("request"):
            head, parts = unpacked(content)
            told = None
            if "model" in parts:
                weights = {int(client): float(weight) for client, weight in head["weights"].items()}
                bound = None if head["bound"] is None else float(head["bound"])
                told = Broadcast(vector_from_bytes(parts["model"]), bound, int(head["cohort"]), weights)
            honest, malicious = (tuple(int(client) for client in head[who]) for who in ("honest", "malicious"))
            return cls(int(head["round"]), str(head["stage"]), honest, malicious, by_party("request", parts), told)


@final
@dataclass(frozen=True)
class Reply:
    """What a host answers.

    Attributes:
      replies: a party -> its channel's reply; who is missing has dropped out, for reasons that stay on the host.
      failed: a client's training raised in a run that is to end then; the reason, too, stays on the host.
    """

    replies: Mapping[int, bytes] = field(default_factory=dict)
    failed: bool = False

    def to_bytes(self) -> bytes:
        """As it goes over the network."""
        return packed({"failed": self.failed}, named("reply", self.replies))

    @classmethod
    def from_bytes(cls, content: bytes) -> Reply:
        """The inverse.

        Raises:
          Corrupt: it is none.
        """
        with _reading("reply"):
            head, parts = unpacked(content)
            return cls(by_party("reply", parts), bool(head["failed"]))


@final
@dataclass(frozen=True)
class Greeting:
    """What a host says of itself before the first round.

    Attributes:
      parties: which it hosts.
      problem: why it cannot take part; empty where it can.
      signatures: each party's own, over `claim` of the server's nonce: nobody hosts whose identity it has not.
    """

    parties: tuple[int, ...]
    problem: str = ""
    signatures: Mapping[int, bytes] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """As it goes over the network."""
        return packed({"parties": list(self.parties), "problem": self.problem}, named("signature", self.signatures))

    @classmethod
    def from_bytes(cls, content: bytes) -> Greeting:
        """The inverse.

        Raises:
          Corrupt: it is none.
        """
        with _reading("greeting"):
            head, parts = unpacked(content)
            return cls(
                tuple(int(party) for party in head["parties"]), str(head["problem"]), by_party("signature", parts)
            )


@contextmanager
def _reading(what: str) -> Iterator[None]:
    """Whatever is missing in a message, or of another form, makes it none: `Corrupt`."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as reason:
        raise Corrupt(f"a {what} that is none: {reason}") from reason


def claim(nonce: bytes, party: int) -> bytes:
    """What a party signs to say that it is here, for the server that drew the nonce."""
    return b"privfm greeting" + nonce + pack(">q", party)


def named(kind: str, parts: Mapping[int, bytes]) -> dict[str, bytes]:
    """A part a party, as `kind/PARTY`."""
    return {f"{kind}/{party}": part for party, part in parts.items()}


def by_party(kind: str, parts: Mapping[str, bytes]) -> dict[int, bytes]:
    """The parts named `kind/PARTY`, by party.

    Raises:
      ValueError: a party is no whole number, or not written as one is.
    """
    found: dict[int, bytes] = {}
    for name, part in parts.items():
        before, _, number = name.partition("/")
        if before != kind:
            continue
        if str(int(number)) != number:  # "01" would be a second 1
            raise ValueError(f"party {number!r}: expected a whole number")
        found[int(number)] = part
    return found


def vector_to_bytes(vector: Tensor) -> bytes:
    """`(d,)` -> 4 d bytes, little-endian float32: not a bit is lost."""
    values = np.ascontiguousarray(vector.detach().cpu().float().numpy(), dtype="<f4")
    return values.tobytes()


def vector_from_bytes(content: bytes) -> Tensor:
    """The inverse."""
    return torch.from_numpy(np.frombuffer(content, dtype="<f4").astype(np.float32))
