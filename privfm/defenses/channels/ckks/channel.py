"""A sum under CKKS encryption: the server adds what it cannot read, a key holder decrypts only the sum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, hypot, sqrt
from typing import Final, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from privfm.checks import (
    BrokenEnvelope,
    Corrupt,
    Overflow,
    RoundFailed,
    at_least,
    non_negative,
    one_of,
    positive,
    require,
)
from privfm.contracts import KEY_HOLDER, SERVER, Channel, Exchange, Intake, Memory, Party, Reveals, Update, View
from privfm.defenses.channels.ckks.ciphertexts import (
    Ring,
    RunningSum,
    Values,
    cut,
    encrypt,
    new_keys,
    public_ring,
)
from privfm.defenses.channels.ckks.cost import CKKSCost, estimate
from privfm.defenses.channels.ckks.parameters import MARGIN, CKKSParameters, Release
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
from privfm.defenses.privacy.noise import secure_deviation, secure_release
from privfm.defenses.views import SumView

_OFF_GRID = 0.25  # steps; 32 standard deviations of the noise of a full sum
_CANARY: Final = 1  # numbers that follow the row


@final
@dataclass(frozen=True)
class CKKS(Channel):
    """One flat vector a client, added by a server that never holds anything that decrypts.

    The key holder makes a key pair for the round; clients encrypt under its public key; the server adds ciphertexts
    as they come (one running sum, whatever the cohort) and asks once for the sum to be decrypted.

    Why a release needs care: the server holds the ciphertexts, and CKKS decrypts approximately. The error of a raw
    decryption gives away the secret key and with it every row of the round, also of a key that is used only once
    (Li, Micciancio, "On the security of homomorphic encryption on approximate numbers", 2021). So:

    | exact_grid | release   | what is released                        | why it is safe               | bytes a number |
    |------------|-----------|-----------------------------------------|------------------------------|----------------|
    | True       | either    | the sum of whole steps, exactly         | it depends on the rows alone | 13 to 16       |
    | False      | "clients" | the sum within `error`, clients alone   | the server does not see it   | 8.3            |
    | False      | "public"  | the sum within `error`, flooded         | see `flooding_deviation`     | 16             |

    - The grid: values are cut to whole steps of `bound / 2^bits`, towards zero (no row gets longer, so a plan's
      sensitivity stands), and the key holder rounds what it decrypts to whole steps, far from any noise. Runs repeat,
      although encryption cannot be seeded. It costs no more than flooding: take it unless clients alone see the sum.
    - Flooding is Gaussian noise from the operating system's generator, added by the key holder before anybody else
      sees the sum. It hides the key, not the rows: it never counts towards epsilon. The noise of a plan comes on top.
    - "clients": the key holder encrypts the sum for the clients in it, under keys that it shares with each, and the
      server only passes it on. The stage `open` and its reply are a client's: an engine that deploys this
      leaves them there, together with the model. A client that colludes with the server, or reads what others send
      it (use an encrypted transport), may get the key.
    Rounding alone (to float32, say), like the encryption of zero that the key holder adds, breaks the simplest
    attack and proves nothing.

    Who sees what: see `learns`. Assumed: server and key holder follow the protocol and do not collude. A client that
    picks its own encryption randomness, or encrypts what is not on the grid, is outside of these arguments: whether the
    round then fails may depend on the error of decryption, and is one bit about the key of this one round. The key
    holder takes the server's word for how many clients are in the sum (`smallest_release`), checked by the *canary*:
    each client appends the value 1, so the sum must end in n. It finds a wrong key, a sum of more clients than fit, and
    a server that announces another number of clients than it added; not one that encrypts ones of its own. Messages are
    authenticated, the key holder's keys by its signature (see `envelope`). What a malicious client encrypts is checked
    by nobody, but for the range of the sum: `bound` binds those who follow the protocol.

    | event                                          | result                                            |
    |------------------------------------------------|---------------------------------------------------|
    | a row with a coordinate beyond `bound`, or NaN | the client refuses; left out and counted in `bad` |
    | all who answered refused                       | RoundFailed, with the way out                     |
    | a broken, foreign, replayed or second message  | left out and counted in `bad`                     |
    | nobody answered                                | zeros, n = 0                                      |
    | fewer than `smallest_release`, over `clients`  | TooFewClients, RoundFailed                        |
    | the canary is not n, the sum is not whole      | RoundFailed: a wrong key, a server that miscounts |
    | steps, or beyond n bounds                      | or a malicious client                             |
    | a broken message of server or key holder       | BrokenEnvelope                                    |

    Under a plan, whether a round fails may depend on how many clients came: let fewer than `smallest_release`, or more
    than `clients`, be improbable next to the plan's delta.

    Cost: the table above, and 0.1 MB of keys; `cost` times it on this machine. Vectors are padded to whole
    ciphertexts of 4096 numbers.

    Args:
      bound: largest absolute coordinate B of a client's row; an L2 clip is one.
      clients: most clients a sum may hold. Head-room is proved for it.
      bits: resolution of a coordinate on the grid, relative to `bound`. It sets the error: see `error_bound`.
      smallest_release: fewest clients whose sum the key holder decrypts.
      noise_multiplier: the key holder adds Gaussian noise of deviation `noise_multiplier * sensitivity` to each
        coordinate of the sum, from the operating system's generator and before anybody else sees it. A privacy plan
        sets it.
      sensitivity: largest L2 norm of a row under that plan.
      release: who sees the sum: "public", or "clients" alone.
      exact_grid: whether sums are exact.
      error: without a grid, largest absolute error of a coordinate of the mean over `clients` rows, relative to
        `bound`. The default takes the cheapest ring there is (for sums that are public, the cheapest that can be
        flooded); the error that it really has is smaller, see `cost`.

    Source: Cheon, Kim, Kim, Song, "Homomorphic encryption for arithmetic of approximate numbers", 2017; TenSEAL.
    """

    bound: float
    clients: int
    bits: int = 31
    smallest_release: int = 2
    noise_multiplier: float = 0.0
    sensitivity: float = 1.0
    release: Release = "public"
    exact_grid: bool = True
    error: float = 1e-4
    reveals = Reveals.SUM
    key_holder_stages = ("keys", "decrypt")

    def __post_init__(self) -> None:
        positive("bound", self.bound)
        non_negative("noise_multiplier", self.noise_multiplier)
        positive("sensitivity", self.sensitivity)
        at_least("smallest_release", self.smallest_release, 2)  # the sum of one is its row
        at_least("clients", self.clients, self.smallest_release)
        one_of("release", self.release, ("public", "clients"))
        positive("error", self.error)
        _ = self.parameters  # refuses what no ring holds

    @property
    def client_stages(self) -> tuple[str, ...]:  # type: ignore[override]  # a constant of other channels
        return ("update",) if self.server_learns_sum else ("update", "open")

    @property
    def server_learns_sum(self) -> bool:  # type: ignore[override]  # a constant of other channels
        return self.release == "public"

    @property
    def most_clients(self) -> int | None:
        return self.clients

    @property
    def grid(self) -> float | None:
        return self.step if self.exact_grid else None

    @property
    def noises(self) -> bool:
        return True

    def with_noise(self, noise_multiplier: float, sensitivity: float) -> CKKS:
        return replace(self, noise_multiplier=noise_multiplier, sensitivity=sensitivity)

    @property
    def largest_coordinate(self) -> float | None:
        return self.bound

    @property
    def parameters(self) -> CKKSParameters:
        """The ring, with its proof of head-room."""
        if self.exact_grid:
            return CKKSParameters.smallest(self.clients, self.bits)
        return CKKSParameters.cheapest(self.clients, self.error, release=self.release)

    @property
    def step(self) -> float:
        """One unit of what is sent, in units of an update: a step of the grid, or the bound."""
        return self.bound / 2.0**self.bits if self.exact_grid else self.bound

    def error_bound(self, d: int, n: int) -> float:
        """Largest L2 distance between the released sum of n rows of width d and their exact sum, without a plan.

        On the grid each row is cut by less than a step a coordinate and nothing else is lost; a worst case, so that
        independent rows stay sqrt(3 n) times below it. Without a grid it is the largest error of each
        coordinate, exceeded with probability 2^-20. The view's float32 adds up to 2^-24 of each coordinate.
        """
        if self.exact_grid:
            return n * sqrt(d) * self.step
        return sqrt(d) * self.clients * self.bound * self.parameters.largest_error(self.release, d)

    def cost(self, d: int) -> CKKSCost:
        """What a round with rows of width d costs a client, the server and the key holder, timed on this machine."""
        if self.exact_grid:  # cut towards zero, by less than a step
            return estimate(self.parameters, d + _CANARY, self.step, self.step / sqrt(3))
        ring, parts = self.parameters, ceil((d + _CANARY) / self.parameters.numbers)
        flooding = ring.flooding_deviation(parts) if self.release == "public" else 0.0
        deviation = hypot(ring.sum_deviation(), flooding) / self.clients
        return estimate(ring, d + _CANARY, self.bound * ring.largest_error(self.release, d), self.bound * deviation)

    def facts(self, d: int, n: int) -> Mapping[str, str]:
        return self.cost(d).facts(self.clients)

    def steps(self, row: Tensor) -> NDArray[np.int64]:
        """A row `(w,)` in whole steps of the grid, cut towards zero.

        Raises:
          Overflow: a coordinate is not finite or lies beyond `bound`. It is not clipped: that would bend the sum
            silently.
        """
        return np.trunc(self._within(row) / self.step).astype(np.int64)

    @property
    def learns(self) -> Mapping[str, str]:
        public = self.server_learns_sum
        return {
            "server": "ciphertexts, who took part" + (", and the sum" if public else ""),
            "key holder": "the sum, and " + ("how many" if public else "who") + " took part",
            "clients": "the public key, " + ("the released model" if public else "and the sum, if they are in it"),
            "trust": "server and key holder follow the protocol and do not collude"
            + ("" if public else ", nor does a client with the server"),
        }

    def with_floor(self, least: int) -> CKKS:
        return replace(self, smallest_release=max(least, self.smallest_release))

    def reply(self, party: Party, stage: str, memory: Memory, request: bytes, update: Update) -> tuple[Memory, bytes]:
        if stage == "keys":
            return self._make_keys(party, memory)
        if stage == "update":
            return self._encrypt(party, memory, request, update)
        if stage == "open":
            return {}, self._open(party, memory, request)
        return {}, self._decrypt(party, memory, request)  # the key is spent

    def collect(self, cohort: Sequence[int], intake: Intake, exchange: Exchange) -> View:
        if not cohort:
            return SumView(lambda: torch.zeros(intake.d), (), intake.d)
        if len(cohort) > self.clients:
            raise RoundFailed(f"clients={self.clients}: a cohort of {len(cohort)} has no head-room; raise clients")
        server = exchange.server
        head, keys, ring = self._open_keys(server, KEY_HOLDER, asked(exchange, "keys", b""))
        running = RunningSum(ring, intake.width + _CANARY)
        requests = {party: Link(server, party).seal(head, keys) for party in cohort}
        ids, bad = self._add_all(running, head, requests, intake, exchange)

        def total() -> Tensor:
            if not ids:
                return torch.zeros(intake.d)
            whole = replace(head, stage="sum", length=running.length, clients=len(ids))
            return intake.total(self._opened(self._ask(running, whole, sorted(ids), exchange), intake.width))

        return SumView(total, tuple(sorted(ids)), intake.d, bad)

    def _add_all(
        self, running: RunningSum, head: Header, requests: Mapping[int, bytes], intake: Intake, exchange: Exchange
    ) -> tuple[list[int], int]:
        """Adds what is whole and fits -> the clients in the sum, and how many messages were left out.

        Raises:
          RoundFailed: every row lies beyond the bound.
          TooFewClients: too few rows are left.
        """
        own = replace(head, stage="update", length=running.length, parts=running.parts, clients=1)
        ids, refused, broken = gathered(exchange, requests, own, intake, lambda _, parts: running.add(parts))
        if refused and not ids:
            raise RoundFailed(f"bound={self.bound}: the rows of {refused} clients lie beyond; raise bound or clip")
        require_enough(len(ids), intake.least_answers, self.smallest_release)
        return ids, broken + refused

    def _ask(self, running: RunningSum, whole: Header, ids: Sequence[int], exchange: Exchange) -> bytes:
        """Has the sum decrypted, and opened by a client if it is not for the server -> its numbers as bytes."""
        server, link = exchange.server, Link(exchange.server, KEY_HOLDER)
        readers = [] if self.server_learns_sum else [readers_to_bytes(ids)]
        parts = [*running.written(), *readers]
        answer = asked(exchange, "decrypt", link.seal(replace(whole, parts=len(parts)), parts))
        header, parts = link.open(answer)
        header.require(replace(whole, stage="decrypt", parts=1 if self.server_learns_sum else 1 + len(ids)))
        if self.server_learns_sum:
            return parts[0]
        box, *wrapped = parts
        own = replace(whole, stage="open", parts=2)
        requests = {i: Link(server, i).seal(own, [box, key]) for i, key in zip(ids, wrapped, strict=True)}
        for client, reply in exchange("open", requests):  # every client opens it; one of them tells the simulation
            try:
                return Link(server, client).expect(reply, replace(whole, stage="opened"))[0]
            except BrokenEnvelope:
                continue
        raise RoundFailed("no client opened the sum")

    def _make_keys(self, party: Party, memory: Memory) -> tuple[Memory, bytes]:
        public, secret = new_keys(self.parameters)
        head = self._head(public)
        sealed = Link(party, SERVER).seal(head, [public, signature(party, head, public)])
        return {**memory, "secret": secret, "key": head.key}, sealed

    def _encrypt(self, party: Party, memory: Memory, request: bytes, update: Update) -> tuple[Memory, bytes]:
        head, (public, _), _ = self._open_keys(party, SERVER, request)
        encoded = update()  # trains the client
        require(not encoded.side, f"side information {sorted(encoded.side)} cannot travel in a sum; use Plaintext")
        row, link, ring = encoded.rows[0], Link(party, SERVER), self.parameters
        own = replace(head, stage="update", length=len(row) + _CANARY, clients=1, weight=encoded.weight)
        try:
            # On the grid the division is exact: by a power of two.
            values = self.steps(row) / 2.0**self.bits if self.exact_grid else self._within(row) / self.bound
        except Overflow:
            return memory, link.seal(refusal(own), [])
        chunks = cut(np.append(values, 1.0), ring.numbers)
        parts = encrypted(encrypt, (public, ring), chunks, party.processes)
        return {**memory, "key": head.key}, link.seal(replace(own, parts=len(parts)), parts)

    def _decrypt(self, party: Party, memory: Memory, request: bytes) -> bytes:
        link, public = Link(party, SERVER), self.server_learns_sum
        header, parts = link.open(request)
        n, length = header.clients, max(header.length, 1 + _CANARY)  # the server's word
        expected = replace(self._head(b""), key=memory.get("key", b""), stage="sum", length=length, clients=n)
        header.require(replace(expected, parts=ceil(length / self.parameters.numbers) + (not public)))
        require_release(n, self.smallest_release, self.clients)
        readers = [] if public else readers_from(parts.pop(), n, self.clients)
        running = RunningSum(Ring(memory["secret"], self.parameters, secret=True), length)
        running.add(parts)
        content = self._released(self._checked(running.decrypted(), n), n, running.parts)
        answer = [content]
        if not public:
            box, wrapped = sealed_for(party, readers, content, _purpose(memory))
            answer = [box, *wrapped]
        return link.seal(replace(header, stage="decrypt", parts=len(answer)), answer)

    def _open(self, party: Party, memory: Memory, request: bytes) -> bytes:
        """A client reads the sum that the key holder sealed for it."""
        link = Link(party, SERVER)
        header, parts = link.open(request)
        expected = replace(self._head(b""), key=memory.get("key", b""), stage="open", parts=2)
        header.require(replace(expected, length=header.length, clients=header.clients))
        content = opened_from(party, KEY_HOLDER, parts[0], parts[1], _purpose(memory))
        return link.seal(replace(header, stage="opened", parts=1), [content])

    def _checked(self, values: Values, n: int) -> Values:
        """Looks at the canary, the range and the grid -> the sum `(width,)` in steps, without its canary.

        Raises:
          RoundFailed: it is not the sum of n rows.
        """
        largest, off = float(n), MARGIN * self.parameters.sum_deviation(n)
        whole = values
        if self.exact_grid:
            values, largest, off = values * 2.0**self.bits, n * 2.0**self.bits, _OFF_GRID
            whole = np.rint(values)
        reasons = "another key, a sum that wrapped, or a malicious client"
        if not abs(values[-1] - largest) <= off:  # the canary is 1, as large as a value can be
            raise RoundFailed(f"the sum is not one of {n} clients: the server miscounts, {reasons}")
        if not (np.abs(values - whole).max() <= off and np.abs(whole).max() <= largest + off):
            raise RoundFailed(f"the sum is not whole steps, or not within the bound: {reasons}")
        return whole[:-_CANARY]

    def _released(self, values: Values, n: int, parts: int) -> bytes:
        """The sum in steps -> what leaves the key holder: with a plan's noise and, where it must, flooded.

        On the grid it stays in whole steps, exact in float64.
        """
        deviation, width = 0.0, len(values)
        if self.noise_multiplier > 0:
            longer = 0.0 if self.exact_grid else self.parameters.encoding_error(width)
            sensitivity = self.sensitivity / self.step + longer
            terms = 1 if self.exact_grid else n
            deviation = secure_deviation(self.noise_multiplier, sensitivity, width, terms=terms)
        if not self.exact_grid and self.release == "public":
            deviation = hypot(deviation, self.parameters.flooding_deviation(parts, n))
        if deviation > 0:
            values = secure_release(torch.from_numpy(values), deviation).numpy()
        if self.exact_grid:
            return np.rint(values).astype("<i8").tobytes()
        return values.astype("<f8").tobytes()

    def _within(self, row: Tensor) -> Values:
        values: Values = row.detach().cpu().double().numpy()
        largest = float(np.abs(values).max(initial=0.0))
        if not largest <= self.bound:
            raise Overflow(
                f"bound={self.bound}: a coordinate has absolute value {largest:.4g}; raise bound or clip updates"
            )
        return values

    def _opened(self, content: bytes, width: int) -> Tensor:
        if len(content) != 8 * width:
            raise Corrupt(f"a sum of {len(content)} bytes, expected 8 for each of {width} numbers")
        return torch.from_numpy(np.frombuffer(content, "<i8" if self.exact_grid else "<f8") * self.step)

    def _open_keys(self, party: Party, sender: int, message: bytes) -> tuple[Header, list[bytes], Ring]:
        """Checks a message with the key holder's public key -> its header, its parts and the parsed key."""
        header, parts = Link(party, sender).open(message)
        header.require(replace(self._head(parts[0] if parts else b""), parts=2))
        require_signature(party, header, *parts)
        return header, parts, public_ring(parts[0], self.parameters)

    def _head(self, public: bytes) -> Header:
        """The key holder's first message; all others of a round share what they agree on."""
        return Header("ckks", fingerprint(repr(self).encode()), fingerprint(public), "keys", parts=2, scale=self.step)


def _purpose(memory: Memory) -> bytes:
    """What a sealed sum is for: this key's, and no other."""
    return b"ckks sum" + memory["key"]
