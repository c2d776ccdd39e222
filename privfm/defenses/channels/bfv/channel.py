"""Exact sums of whole numbers under BFV encryption: the server adds what it cannot read, the sum is decrypted once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Any, Final, Literal, final

import numpy as np
import torch
from torch import Tensor

from privfm.checks import (
    BrokenEnvelope,
    Corrupt,
    InvalidArgument,
    Overflow,
    RoundFailed,
    at_least,
    one_of,
    require,
)
from privfm.contracts import KEY_HOLDER, SERVER, Channel, Exchange, Intake, Memory, Party, Reveals, Update, View
from privfm.defenses.channels.bfv.ciphertexts import (
    RunningSum,
    Whole,
    centred,
    cut,
    decrypted,
    encrypt,
    new_keys,
    public_context,
    uniform,
)
from privfm.defenses.channels.bfv.parameters import BFVParameters
from privfm.defenses.channels.encryptors import encrypted
from privfm.defenses.channels.envelope import Header, Link, fingerprint
from privfm.defenses.channels.key_holder import (
    asked,
    gathered,
    readers_from,
    readers_to_bytes,
    refusal,
    require_enough,
    require_release,
    require_signature,
    signature,
)
from privfm.defenses.channels.readers import opened_from, sealed_for
from privfm.defenses.views import SumView

Holder = Literal["apart", "clients", "blinded"]

_CANARY: Final = 1  # numbers that follow the row


@final
@dataclass(frozen=True)
class BFV(Channel):
    """One vector of whole numbers a client, added by a server that never holds anything that decrypts.

    The key holder makes a key pair for the round; clients encrypt under its public key; the server adds ciphertexts
    as they come (one running sum, whatever the cohort) and asks once for the sum to be decrypted.

    | holder    | who decrypts                    | the server sees | who decrypts sees                       |
    |-----------|---------------------------------|-----------------|-----------------------------------------|
    | "apart"   | the key holder                  | the sum         | the sum, and hands it over              |
    | "blinded" | the key holder                  | the sum         | noise: the server adds a uniform vector |
    |           |                                 |                 | modulo t and removes it afterwards      |
    | "clients" | every client in the sum, under  | ciphertexts     | the sum; and every row whose ciphertext |
    |           | one secret key that all share   |                 | it gets hold of                         |

    With "clients" the key holder only makes the key, hands it to the clients through the server, who cannot read it,
    and forgets it. The stage `open` and its reply are a client's: an engine that deploys this leaves them there,
    together with the model. One client that colludes with the server, or reads what others send it (use an
    encrypted transport), opens every row of the round: prefer the others where the server may see the sum.

    Assumed: server and key holder follow the protocol and do not collude; blinding does not stop a pair that does.
    Whoever decrypts takes the server's word for how many clients are in the sum, checked by the *canary*: each
    client appends the number 1, so that the sum must end in n. It finds a wrong key, a wrapped sum and a server that
    announces another number of clients than it added, not one that encrypts ones of its own. With "blinded" only
    the server can look at the canary, and at the range. Messages are authenticated, the key holder's keys by its
    signature. What a malicious client encrypts is checked by nobody, as long as the sum stays in range.

    The sum is exact, with certainty: see `BFVParameters`. So there is nothing to flood: a server that holds the
    ciphertexts gets the sum and nothing else. Encryption cannot be seeded, but exact sums make runs repeatable all the
    same. What is *not* hidden from the holder of the secret key is the noise of the ciphertext it is given, if it cares
    to measure it. That noise depends weakly on the rows: a rounding error under 1 a client, beside noise of deviation
    10 to 15 a client. "Blinded" therefore means: the numbers it decrypts are uniform and independent of the sum.

    | event                                            | result                                            |
    |--------------------------------------------------|---------------------------------------------------|
    | a row with a number beyond 2^bits, broken or NaN | the client refuses; left out and counted in `bad` |
    | all who answered refused                         | RoundFailed, with the way out                     |
    | a broken, foreign, replayed or second message    | left out and counted in `bad`                     |
    | nobody answered                                  | zeros, n = 0                                      |
    | fewer than `smallest_release`, over `clients`    | TooFewClients, RoundFailed                        |
    | the canary is not n, or the sum beyond n 2^bits  | RoundFailed: a wrong key, or somebody lies        |
    | a broken message of server or key holder         | BrokenEnvelope                                    |

    Under a plan, whether a round fails may depend on how many clients came: let fewer than `smallest_release`, or more
    than `clients`, be improbable next to the plan's delta.

    Cost: 8.3 to 17 bytes a parameter and client for sums up to 2^39 (`parameters.bytes_a_parameter`), 0.03 to 0.1 MB
    of keys (2.5 times that with "clients"); rows are padded to whole ciphertexts of 2048 or 4096 numbers.

    Args:
      clients: most clients a sum may hold. Head-room is proved for it.
      bits: a client sends whole numbers of absolute value at most 2^bits. `DistributedNoise` with modulus_bits needs
        modulus_bits - 1, `FixedPoint` its own bits.
      holder: who decrypts; see above.
      smallest_release: fewest clients whose sum is decrypted.

    Source: Fan, Vercauteren, "Somewhat practical fully homomorphic encryption", 2012; TenSEAL.
    """

    clients: int
    bits: int
    holder: Holder = "apart"
    smallest_release: int = 2
    reveals = Reveals.SUM
    integers = True

    def __post_init__(self) -> None:
        one_of("holder", self.holder, ("apart", "clients", "blinded"))
        at_least("smallest_release", self.smallest_release, 2)  # the sum of one is its row
        at_least("clients", self.clients, self.smallest_release)
        _ = self.parameters  # refuses what no ring holds

    @property
    def client_stages(self) -> tuple[str, ...]:  # type: ignore[override]  # a constant of other channels
        return ("update",) if self.server_learns_sum else ("update", "open")

    @property
    def key_holder_stages(self) -> tuple[str, ...]:  # type: ignore[override]  # a constant of other channels
        return ("keys", "decrypt") if self.server_learns_sum else ("keys",)

    @property
    def server_learns_sum(self) -> bool:  # type: ignore[override]  # a constant of other channels
        return self.holder != "clients"

    @property
    def most_clients(self) -> int | None:
        return self.clients

    @property
    def grid(self) -> float | None:
        return 1.0

    @property
    def largest_coordinate(self) -> float | None:
        return 2.0**self.bits

    @property
    def parameters(self) -> BFVParameters:
        """The ring, with its proof of head-room and of correct decryption."""
        return BFVParameters.smallest(self.clients, self.bits)

    def facts(self, d: int, n: int) -> Mapping[str, str]:
        ring = self.parameters
        return {
            "ring": f"n={ring.degree}, primes of {'+'.join(map(str, ring.chain))} bits, t={ring.plain_modulus} "
            "(128-bit security, classical, HES 2018)",
            "levels of a value": f"{ring.levels}; head-room proved for {self.clients} clients, sums are exact",
            "bytes of a row": f"about {ring.bytes_a_parameter * d:,.0f}",
        }

    @property
    def learns(self) -> Mapping[str, str]:
        server = "ciphertexts, who took part"
        trust = "server and key holder follow the protocol and do not collude"
        if self.holder == "clients":
            return {
                "server": server,
                "key holder": "who is asked; it hands out the key and forgets it",
                "clients": "the sum, and every row whose ciphertext one of them gets hold of",
                "trust": trust + ", nor does a client with the server",
            }
        sees = "the sum" if self.holder == "apart" else "uniform numbers"
        return {
            "server": server + ", and the sum",
            "key holder": sees + ", and how many took part",
            "clients": "the public key, the released model",
            "trust": trust,
        }

    def with_floor(self, least: int) -> BFV:
        return replace(self, smallest_release=max(least, self.smallest_release))

    def numbers(self, row: Tensor) -> Whole:
        """A row `(w,)` as whole numbers.

        Raises:
          Overflow: a number is not finite or lies beyond 2^bits. It is neither cut nor wrapped.
          InvalidArgument: a number is not whole. It is not rounded: that is a codec's business.
        """
        values = row.detach().cpu().double().numpy()
        largest = float(np.abs(values).max(initial=0.0))
        if not largest <= 2.0**self.bits:
            raise Overflow(f"bits={self.bits}: a number of absolute value {largest:.17g}; raise bits, or clip updates")
        whole = values.astype(np.int64)
        require(
            bool((whole == values).all()), "a number is not whole; put a codec of whole numbers before this channel"
        )
        return whole

    def reply(self, party: Party, stage: str, memory: Memory, request: bytes, update: Update) -> tuple[Memory, bytes]:
        if stage == "keys":
            return self._make_keys(party, memory, request)
        if stage == "update":
            return self._encrypt(party, memory, request, update)
        return {}, self._decrypt(party, memory, request)  # the key is spent

    def collect(self, cohort: Sequence[int], intake: Intake, exchange: Exchange) -> View:
        if not cohort:
            return SumView(lambda: torch.zeros(intake.d), (), intake.d)
        if len(cohort) > self.clients:
            raise RoundFailed(f"clients={self.clients}: a cohort of {len(cohort)} has no head-room; raise clients")
        head, context, requests = self._keys_for(cohort, exchange)
        running = RunningSum(context, self.parameters, intake.width + _CANARY)
        ids, bad = self._add_all(running, head, requests, intake, exchange)

        def total() -> Tensor:
            if not ids:
                return torch.zeros(intake.d)
            whole = replace(head, stage="sum", length=running.length, parts=running.parts, clients=len(ids))
            return intake.total(torch.from_numpy(self._ask(running, whole, ids, exchange).astype(np.float64)))

        return SumView(total, tuple(sorted(ids)), intake.d, bad)

    def _keys_for(self, cohort: Sequence[int], exchange: Exchange) -> tuple[Header, Any, dict[int, bytes]]:
        """Has keys made -> what all messages of the round share, the public context and each client's request."""
        server, clients = exchange.server, list(cohort)
        request = b""
        if not self.server_learns_sum:
            named = replace(self._head(b""), key=bytes(16), stage="cohort", length=len(clients), parts=1)
            request = Link(server, KEY_HOLDER).seal(named, [readers_to_bytes(clients)])
        head, parts, context = self._open_keys(server, KEY_HOLDER, asked(exchange, "keys", request), len(clients))
        public, signed, *secret = parts
        if not secret:
            return head, context, {i: Link(server, i).seal(head, parts) for i in clients}
        box, *wrapped = secret
        own = replace(head, parts=4)
        keys = zip(clients, wrapped, strict=True)
        return own, context, {i: Link(server, i).seal(own, [public, signed, box, key]) for i, key in keys}

    def _add_all(
        self, running: RunningSum, head: Header, requests: Mapping[int, bytes], intake: Intake, exchange: Exchange
    ) -> tuple[list[int], int]:
        """Adds what is whole and fits -> the clients in the sum, and how many messages were left out.

        Raises:
          RoundFailed: every row was refused by its client.
          TooFewClients: too few rows are left.
        """
        own = replace(head, stage="update", length=running.length, parts=running.parts, clients=1)
        ids, refused, broken = gathered(exchange, requests, own, intake, lambda _, parts: running.add(parts))
        if refused and not ids:
            raise RoundFailed(
                f"bits={self.bits}: the rows of {refused} clients are not whole numbers up to 2^bits; raise bits, clip "
                "updates, or put a codec of whole numbers before the channel"
            )
        require_enough(len(ids), intake.least_answers, self.smallest_release)
        return ids, broken + refused

    def _ask(self, running: RunningSum, whole: Header, ids: Sequence[int], exchange: Exchange) -> Whole:
        """Has the sum decrypted -> `(width,)`, without the canary."""
        t, server = self.parameters.plain_modulus, exchange.server
        pad = uniform(running.length, t) if self.holder == "blinded" else np.zeros(running.length, np.int64)
        parts = running.blinded(pad) if self.holder == "blinded" else running.serialized()
        if self.server_learns_sum:
            link = Link(server, KEY_HOLDER)
            answer = asked(exchange, "decrypt", link.seal(whole, parts))
            content = b"".join(link.expect(answer, replace(whole, stage="opened")))
        else:
            content = _opened_by_one(_Requests(server, sorted(ids), whole, parts), exchange)
        if len(content) != 8 * running.length:
            raise Corrupt(f"a sum of {len(content)} bytes, expected 8 for each of {running.length} numbers")
        return self._checked(centred(np.frombuffer(content, "<i8") - pad, t), whole.clients)

    def _checked(self, values: Whole, n: int) -> Whole:
        """Looks at the canary and at the range -> the sum without its canary.

        Raises:
          RoundFailed: it is not the sum of n rows.
        """
        row, canary = values[:-_CANARY], int(values[-1])
        if canary != n:
            raise RoundFailed(f"the sum is not of {n} clients: another key, or somebody lies about how many there are")
        if np.abs(row).max(initial=0) > n << self.bits:
            raise RoundFailed(f"bits={self.bits}: the sum lies beyond that of {n} clients; one of them is malicious")
        return row

    def _make_keys(self, party: Party, memory: Memory, request: bytes) -> tuple[Memory, bytes]:
        public, secret = new_keys(self.parameters)
        head, link = self._head(public), Link(party, SERVER)
        parts = [public, signature(party, head, public)]
        if self.server_learns_sum:
            return {**memory, "secret": secret, "key": head.key}, link.seal(head, parts)
        header, content = link.open(request)
        header.require(replace(self._head(b""), key=bytes(16), stage="cohort", length=header.length, parts=1))
        box, wrapped = sealed_for(
            party, readers_from(content[0], header.length, self.clients), secret, self._purpose(head)
        )
        parts += [box, *wrapped]
        return memory, link.seal(replace(head, parts=len(parts)), parts)

    def _encrypt(self, party: Party, memory: Memory, request: bytes, update: Update) -> tuple[Memory, bytes]:
        head, parts, _ = self._open_keys(party, SERVER, request)
        if not self.server_learns_sum:
            secret = opened_from(party, KEY_HOLDER, parts[2], parts[3], self._purpose(head))
            memory = {**memory, "secret": secret, "key": head.key}
        encoded = update()  # trains the client
        require(not encoded.side, f"side information {sorted(encoded.side)} cannot travel in a sum; use Plaintext")
        row, link, ring = encoded.rows[0], Link(party, SERVER), self.parameters
        own = replace(head, stage="update", length=len(row) + _CANARY, clients=1, weight=encoded.weight)
        try:
            values = self.numbers(row)
        except InvalidArgument:  # Overflow is one
            return memory, link.seal(refusal(own), [])
        ciphertexts = encrypted(encrypt, (parts[0], ring), cut(np.append(values, 1), ring.slots), party.processes)
        return memory, link.seal(replace(own, parts=len(ciphertexts)), ciphertexts)

    def _decrypt(self, party: Party, memory: Memory, request: bytes) -> bytes:
        """The key holder's, or a client's with the shared key."""
        link = Link(party, SERVER)
        header, parts = link.open(request)
        n, length = header.clients, max(header.length, 1)  # the server's word
        expected = replace(self._head(b""), key=memory.get("key", b""), stage="sum", length=length, clients=n)
        header.require(replace(expected, parts=ceil(length / self.parameters.slots)))
        require_release(n, self.smallest_release, self.clients)
        values = decrypted(memory["secret"], self.parameters, length, parts)
        if self.holder != "blinded":  # there, every number is uniform
            self._checked(values, n)
        return link.seal(replace(header, stage="opened", parts=1), [values.astype("<i8").tobytes()])

    def _open_keys(
        self, party: Party, sender: int, message: bytes, readers: int = 1
    ) -> tuple[Header, list[bytes], Any]:
        """Checks a message with the key holder's public key -> its header, its parts and the public context.

        Args:
          party: who opens it.
          sender: from whom it comes.
          message: what came.
          readers: wrapped keys that are in it, with the one box that they open, where clients share the secret key.
        """
        header, parts = Link(party, sender).open(message)
        count = 2 if self.server_learns_sum else 3 + readers
        header.require(replace(self._head(parts[0] if parts else b""), parts=count))
        require_signature(party, header, *parts[:2])
        return header, parts, public_context(parts[0], self.parameters)

    def _head(self, public: bytes) -> Header:
        """The key holder's first message; all others of a round share what they agree on."""
        return Header("bfv", fingerprint(repr(self).encode()), fingerprint(public), "keys", parts=2)

    def _purpose(self, head: Header) -> bytes:
        """What a sealed key is for: this round's key, and no other."""
        return b"bfv secret" + head.parameters + head.key


@final
class _Requests(Mapping[int, bytes]):
    """The encrypted sum for each of its readers, sealed when it is asked for: n copies would not fit in memory."""

    def __init__(self, server: Party, readers: Sequence[int], asked: Header, parts: Sequence[bytes]) -> None:
        self.server, self.asked = server, asked
        self._readers, self._parts = readers, parts

    def __getitem__(self, reader: int) -> bytes:
        if reader not in self:
            raise KeyError(reader)
        return Link(self.server, reader).seal(self.asked, self._parts)

    def __contains__(self, reader: object) -> bool:
        return reader in self._readers  # without sealing

    def __iter__(self) -> Iterator[int]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)


def _opened_by_one(requests: _Requests, exchange: Exchange) -> bytes:
    """Every client opens the sum; one of them tells the simulation."""
    for client, reply in exchange("open", requests):
        try:
            expected = replace(requests.asked, stage="opened")
            return b"".join(Link(requests.server, client).expect(reply, expected))
        except BrokenEnvelope:
            continue
    raise RoundFailed("no client opened the sum")
