"""A sum under CKKS encryption: the server adds what it cannot read, a key holder decrypts only the sum."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil, sqrt
from struct import pack
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from privfm.checks import (
    BrokenEnvelope,
    Corrupt,
    Overflow,
    ParameterMismatch,
    RoundFailed,
    TooFewClients,
    at_least,
    non_negative,
    positive,
    require,
)
from privfm.contracts import KEY_HOLDER, SERVER, Channel, Exchange, Intake, Memory, Party, Reveals, Update, View
from privfm.defenses.channels.ckks_parameters import CKKSParameters
from privfm.defenses.channels.envelope import Header, Link, fingerprint
from privfm.defenses.channels.identities import sign, verify
from privfm.defenses.privacy.noise import secure_deviation, secure_release
from privfm.defenses.views import SumView

_OFF_GRID = 0.25  # steps; 32 standard deviations of the noise of a full sum


@final
@dataclass(frozen=True)
class CKKS(Channel):
    """One flat vector a client, added by a server that never holds anything that decrypts.

    The key holder makes a key pair for the round; clients encrypt under its public key; the server adds ciphertexts
    as they come (one running sum, whatever the cohort) and asks once for the sum to be decrypted.

    Who sees what: the server ciphertexts, who took part, and the sum; the key holder the sum; clients the public key.
    Assumed: server and key holder follow the protocol and do not collude. The key holder takes the server's word
    for how many clients are in the sum (`smallest_release`). Messages are authenticated, the key holder's keys by its
    signature (see `envelope`). What a malicious client encrypts is checked by nobody: `bound` binds those who follow
    the protocol.

    The sum is exact. Values are cut to whole steps of `bound / 2^bits`, towards zero (no row gets longer, so a plan's
    sensitivity stands), and the key holder rounds what it decrypts to whole steps, far from any noise. So the release
    depends on the messages alone. That matters because the server holds the ciphertexts: an approximate decryption,
    as CKKS gives it, would hand it the secret key and with it every row of the round (Li, Micciancio, "On the
    security of homomorphic encryption on approximate numbers", 2021). For correct decryption there is nothing to
    flood. A client that picks its own encryption randomness is outside of this argument. Encryption cannot be
    seeded, but the exact sum makes runs repeatable all the same.

    | event                                          | result                                            |
    |------------------------------------------------|---------------------------------------------------|
    | a row with a coordinate beyond `bound`, or NaN | the client refuses; left out and counted in `bad` |
    | all who answered refused                       | RoundFailed, with the way out                     |
    | a broken, foreign or replayed client message   | left out and counted in `bad`                     |
    | nobody answered                                | zeros, n = 0                                      |
    | fewer than `smallest_release`, over `clients`  | TooFewClients, RoundFailed                        |
    | the sum is not whole steps, or beyond n bounds | RoundFailed: a wrong key, or a malicious client   |
    | a broken message of server or key holder       | BrokenEnvelope                                    |

    Under a plan, whether a round fails may depend on how many clients came: let fewer than `smallest_release`, or more
    than `clients`, be improbable next to the plan's delta.

    Cost: about 32 bytes a parameter and client and 0.1 MB of keys, at up to 200 clients and 31 bits.

    Args:
      bound: largest absolute coordinate B of a client's row; an L2 clip is one.
      clients: most clients a sum may hold. Head-room is proved for it.
      bits: resolution of a coordinate, relative to `bound`. It sets the error: see `error_bound`.
      smallest_release: fewest clients whose sum the key holder decrypts.
      noise_multiplier: the key holder adds Gaussian noise of deviation `noise_multiplier * sensitivity` to each
        coordinate of the sum, from the operating system's generator and before anybody else sees it. A privacy plan
        sets it.
      sensitivity: largest L2 norm of a row under that plan.

    Source: Cheon, Kim, Kim, Song, "Homomorphic encryption for arithmetic of approximate numbers", 2017; TenSEAL.
    """

    bound: float
    clients: int
    bits: int = 31
    smallest_release: int = 2
    noise_multiplier: float = 0.0
    sensitivity: float = 1.0
    reveals = Reveals.SUM
    client_stages = ("update",)
    key_holder_stages = ("keys", "decrypt")

    def __post_init__(self) -> None:
        positive("bound", self.bound)
        non_negative("noise_multiplier", self.noise_multiplier)
        positive("sensitivity", self.sensitivity)
        at_least("smallest_release", self.smallest_release, 2)  # the sum of one is its row
        at_least("clients", self.clients, self.smallest_release)
        _ = self.parameters  # refuses what no ring holds

    @property
    def most_clients(self) -> int | None:
        return self.clients

    @property
    def grid(self) -> float | None:
        return self.step

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
        return CKKSParameters.smallest(self.clients, self.bits)

    @property
    def step(self) -> float:
        """One unit of the grid, in units of an update."""
        return self.bound / 2.0**self.bits

    def error_bound(self, d: int, n: int) -> float:
        """Largest L2 distance between the released sum of n rows of width d and their exact sum.

        Each row is cut by less than a step a coordinate and nothing else is lost; a worst case, so that independent
        rows stay sqrt(3 n) times below it. The view's float32 adds up to 2^-24 of each coordinate.
        """
        return n * sqrt(d) * self.step

    def steps(self, row: Tensor) -> NDArray[np.int64]:
        """A row `(w,)` in whole steps, cut towards zero.

        Raises:
          Overflow: a coordinate is not finite or lies beyond `bound`. It is not clipped: that would bend the sum
            silently.
        """
        values = row.detach().cpu().double().numpy()
        largest = float(np.abs(values).max(initial=0.0))
        if not largest <= self.bound:
            raise Overflow(
                f"bound={self.bound}: a coordinate has absolute value {largest:.4g}; raise bound or clip updates"
            )
        return np.trunc(values / self.step).astype(np.int64)

    @property
    def learns(self) -> Mapping[str, str]:
        return {
            "server": "ciphertexts, who took part, and the sum",
            "key holder": "the sum, and who took part",
            "clients": "the public key, the released model",
            "trust": "server and key holder follow the protocol and do not collude",
        }

    def with_floor(self, least: int) -> CKKS:
        return replace(self, smallest_release=max(least, self.smallest_release))

    def reply(self, party: Party, stage: str, memory: Memory, request: bytes, update: Update) -> tuple[Memory, bytes]:
        if stage == "keys":
            return self._make_keys(party, memory)
        if stage == "update":
            return memory, self._encrypt(party, request, update)
        return {}, self._decrypt(party, memory, request)  # the key is spent

    def collect(self, cohort: Sequence[int], intake: Intake, exchange: Exchange) -> View:
        if not cohort:
            return SumView(lambda: torch.zeros(intake.d), (), intake.d)
        if len(cohort) > self.clients:
            raise RoundFailed(f"clients={self.clients}: a cohort of {len(cohort)} has no head-room; raise clients")
        server = exchange.server
        head, keys, context = self._open_keys(server, KEY_HOLDER, _only(exchange, "keys", b""))
        running = _Running(context, self.parameters, intake.width)
        requests = {party: Link(server, party).seal(head, keys) for party in cohort}
        ids, bad = self._add_all(running, head, exchange("update", requests), intake, server)

        def total() -> Tensor:
            if not ids:
                return torch.zeros(intake.d)
            link = Link(server, KEY_HOLDER)
            asked = replace(head, stage="sum", length=running.length, parts=running.parts, clients=len(ids))
            answer = _only(exchange, "decrypt", link.seal(asked, running.serialized()))
            parts = link.expect(answer, replace(asked, stage="decrypt"))
            return intake.total(self._opened(b"".join(parts), intake.width))

        return SumView(total, tuple(sorted(ids)), intake.d, bad)

    def _add_all(
        self, running: _Running, head: Header, replies: Iterator[tuple[int, bytes]], intake: Intake, server: Party
    ) -> tuple[list[int], int]:
        """Adds what is whole and fits -> the clients in the sum, and how many were left out.

        Raises:
          RoundFailed: every row lies beyond the bound.
          TooFewClients: too few rows are left.
        """
        ids: list[int] = []
        broken = refused = 0
        for party, reply in replies:
            own = replace(head, stage="update", length=running.length, clients=1)
            own = replace(own, weight=intake.weights.get(party, 1.0))
            try:
                header, parts = Link(server, party).open(reply)
                if header == _refusal(own):
                    refused += 1
                    continue
                header.require(replace(own, parts=running.parts))
                running.add(parts)
                ids.append(party)
            except BrokenEnvelope:
                broken += 1
        if refused and not ids:
            raise RoundFailed(f"bound={self.bound}: the rows of {refused} clients lie beyond; raise bound or clip")
        if len(ids) < intake.least_answers:
            raise TooFewClients(
                f"least_answers={intake.least_answers}: {len(ids)} client(s) answered; their sum stays closed"
            )
        if ids and len(ids) < self.smallest_release:
            raise TooFewClients(f"smallest_release={self.smallest_release}: only {len(ids)} client(s) answered")
        return ids, broken + refused

    def _make_keys(self, party: Party, memory: Memory) -> tuple[Memory, bytes]:
        context = _new_context(self.parameters)
        public = context.serialize(save_secret_key=False, save_galois_keys=False, save_relin_keys=False)
        secret = context.serialize(save_secret_key=True, save_galois_keys=False, save_relin_keys=False)
        head = self._head(public)
        signature = sign(party, self._signed(party, public))
        return {**memory, "secret": secret, "key": head.key}, Link(party, SERVER).seal(head, [public, signature])

    def _encrypt(self, party: Party, request: bytes, update: Update) -> bytes:
        import tenseal as ts

        head, _, context = self._open_keys(party, SERVER, request)
        encoded = update()  # trains the client
        require(not encoded.side, f"side information {sorted(encoded.side)} cannot travel in a sum; use Plaintext")
        row, slots, link = encoded.rows[0], self.parameters.slots, Link(party, SERVER)
        own = replace(head, stage="update", length=len(row), clients=1, weight=encoded.weight)
        try:
            values = self.steps(row) / 2.0**self.bits  # exact: a power of two
        except Overflow:
            return link.seal(_refusal(own), [])
        # More than `slots` values would make SEAL print a warning and TenSEAL cut the vector by itself.
        parts = [ts.ckks_vector(context, values[at : at + slots]).serialize() for at in range(0, len(values), slots)]
        return link.seal(replace(own, parts=len(parts)), parts)

    def _decrypt(self, party: Party, memory: Memory, request: bytes) -> bytes:
        link = Link(party, SERVER)
        header, parts = link.open(request)
        n, length = header.clients, max(header.length, 1)  # the server's word
        expected = replace(self._head(b""), key=memory["key"], stage="sum", length=length, clients=n)
        header.require(replace(expected, parts=ceil(length / self.parameters.slots)))
        if n < self.smallest_release:
            raise TooFewClients(f"a sum of {n} clients: expected {self.smallest_release} to {self.clients}")
        if n > self.clients:
            raise RoundFailed(f"a sum of {n} clients: expected {self.smallest_release} to {self.clients}")
        running = _Running(_parsed(memory["secret"]), self.parameters, length)
        running.add(parts)
        exact = running.decrypted() * 2.0**self.bits
        whole = np.rint(exact)
        distance, largest = np.abs(exact - whole).max(), np.abs(whole).max()
        if not (distance <= _OFF_GRID and largest <= n * 2.0**self.bits):
            raise RoundFailed("the sum is not whole steps within the bound: another key, or a malicious client")
        whole = self._noisy(whole)
        return link.seal(replace(header, stage="decrypt", parts=1), [whole.astype("<i8").tobytes()])

    def _noisy(self, whole: NDArray[np.float64]) -> NDArray[np.float64]:
        """The sum in steps with the plan's noise: whole steps too, and exact in float64."""
        if self.noise_multiplier == 0:
            return whole
        deviation = secure_deviation(self.noise_multiplier, self.sensitivity / self.step, len(whole))  # in steps
        noisy: NDArray[np.float64] = secure_release(torch.from_numpy(whole), deviation).round().numpy()
        return noisy

    def _opened(self, values: bytes, width: int) -> Tensor:
        if len(values) != 8 * width:
            raise Corrupt(f"a sum of {len(values)} bytes, expected 8 for each of {width} numbers")
        return torch.from_numpy(np.frombuffer(values, "<i8") * self.step)

    def _open_keys(self, party: Party, sender: int, message: bytes) -> tuple[Header, list[bytes], Any]:
        """Checks a message with the key holder's public key -> its header, its parts and the public context."""
        header, parts = Link(party, sender).open(message)
        header.require(replace(self._head(parts[0] if parts else b""), parts=2))
        public, signature = parts
        verify(party.pinned(KEY_HOLDER), self._signed(party, public), signature)
        return header, parts, _public_context(public, self.parameters)

    def _head(self, public: bytes) -> Header:
        """The key holder's first message; all others of a round share what they agree on."""
        return Header("ckks", fingerprint(repr(self).encode()), fingerprint(public), "keys", parts=2, scale=self.step)

    def _signed(self, party: Party, public: bytes) -> bytes:
        """What the key holder signs: these parameters, this round, this key."""
        return b"ckks keys" + fingerprint(repr(self).encode()) + pack(">q", party.round) + public


@final
class _Running:
    """A sum of encrypted vectors `(length,)`, in chunks of at most `slots` numbers.

    It starts from encryptions of zero of its own making: lengths and scale are then ours, and a message that forges
    its sizes is refused by the first addition instead of reading foreign memory when the sum is decrypted.
    """

    def __init__(self, context: Any, parameters: CKKSParameters, length: int) -> None:
        import tenseal as ts

        self._context = context
        self._sizes = [min(parameters.slots, length - at) for at in range(0, length, parameters.slots)]
        self._chunks = [ts.ckks_vector(context, np.zeros(size)) for size in self._sizes]
        self.length, self.parts = length, len(self._sizes)

    def add(self, parts: Sequence[bytes]) -> None:
        """Adds one encrypted vector, whole or not at all.

        Raises:
          BrokenEnvelope: a part is no ciphertext of these parameters, scale and length.
        """
        vectors = [self._parsed(*both) for both in zip(parts, self._sizes, self._chunks, strict=True)]
        for own, other in zip(self._chunks, vectors, strict=True):
            own.add_(other)  # in place; `copy` would copy the whole context, at 8,000 times the cost

    def serialized(self) -> list[bytes]:
        """One ciphertext a chunk."""
        return [chunk.serialize() for chunk in self._chunks]

    def decrypted(self) -> NDArray[np.float64]:
        """The sum, `(length,)`; the context must hold the secret key."""
        return np.concatenate([np.asarray(chunk.decrypt(), np.float64) for chunk in self._chunks])

    def _parsed(self, part: bytes, size: int, like: Any) -> Any:
        import tenseal as ts
        import tenseal.sealapi  # registers the types that `ciphertext` returns

        try:
            vector = ts.ckks_vector_from(self._context, part)
            ciphertexts = vector.ciphertext()
        except (ValueError, RuntimeError) as error:
            raise Corrupt(f"a part of {len(part)} bytes is no ciphertext of these parameters") from error
        # A ciphertext at a lower level would silently pull our sum down to it.
        shapes = [(c.size(), c.parms_id(), c.scale) for c in ciphertexts]
        own = [(c.size(), c.parms_id(), c.scale) for c in like.ciphertext()]
        if vector.size() != size or shapes != own:
            raise ParameterMismatch(f"a ciphertext of {vector.size()} numbers, expected {size} at our level and scale")
        return vector


def _refusal(header: Header) -> Header:
    """The header of a client whose row does not fit: no parts, nobody's row."""
    return replace(header, parts=0, clients=0)


def _only(exchange: Exchange, stage: str, request: bytes) -> bytes:
    """The key holder's reply."""
    reply = dict(exchange(stage, {KEY_HOLDER: request})).get(KEY_HOLDER)
    if reply is None:
        raise RoundFailed(f"the key holder did not answer to {stage!r}")
    return reply


def _new_context(parameters: CKKSParameters) -> Any:
    """A fresh key pair, from SEAL's own generator, which cannot be seeded."""
    import tenseal as ts

    chain = list(parameters.chain)
    context = ts.context(ts.SCHEME_TYPE.CKKS, parameters.degree, coeff_mod_bit_sizes=chain, n_threads=1)
    context.global_scale = parameters.scale
    return context


def _parsed(content: bytes) -> Any:
    import tenseal as ts

    try:
        return ts.context_from(content, 1)
    except (ValueError, RuntimeError) as error:
        raise Corrupt("the key holder's message holds no keys") from error


@lru_cache(maxsize=2)
def _public_context(content: bytes, parameters: CKKSParameters) -> Any:
    """Parses a *public* key once for all clients of a process: it takes longer than encrypting 2,000 numbers.

    Raises:
      BrokenEnvelope: it is not of these parameters, or holds a secret key.
    """
    import tenseal.sealapi  # noqa: F401  (registers the types below)

    context = _parsed(content)
    ring = context.seal_context().data.key_context_data().parms()
    chain = tuple(prime.value().bit_length() for prime in ring.coeff_modulus())
    got = (ring.poly_modulus_degree(), chain, context.global_scale, context.has_secret_key())
    if got != (parameters.degree, parameters.chain, parameters.scale, False):
        raise ParameterMismatch("the key holder's message holds keys of other parameters, or a secret one")
    return context
