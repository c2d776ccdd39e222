"""A sum under CKKS encryption: the server adds what it cannot read, a key holder decrypts only the sum."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil, sqrt
from secrets import token_bytes
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from privfm.checks import BrokenEnvelope, InvalidArgument, RoundFailed, at_least, non_negative, positive, require
from privfm.contracts import KEY_HOLDER, Channel, Exchange, Intake, Memory, Reveals, Update, View
from privfm.defenses.channels.ckks_parameters import CKKSParameters
from privfm.defenses.channels.envelope import SERVER, Header, fingerprint, seal, unseal
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
    for how many clients are in the sum (`smallest_release`), and nothing is authenticated (see `envelope`). What a
    malicious client encrypts is checked by nobody: `bound` binds those who follow the protocol.

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
    | fewer than `smallest_release`, over `clients`  | RoundFailed                                       |
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
          InvalidArgument: a coordinate is not finite or lies beyond `bound`. It is not clipped: that would bend
            the sum silently.
        """
        values = row.detach().cpu().double().numpy()
        largest = float(np.abs(values).max(initial=0.0))
        way_out = "raise bound or clip updates"
        require(largest <= self.bound, f"bound={self.bound}: a coordinate has absolute value {largest:.4g}; {way_out}")
        return np.trunc(values / self.step).astype(np.int64)

    def reply(self, party: int, stage: str, memory: Memory, request: bytes, update: Update) -> tuple[Memory, bytes]:
        if stage == "keys":
            return self._make_keys(memory)
        if stage == "update":
            return memory, self._encrypt(party, request, update)
        return {}, self._decrypt(memory, request)  # the key is spent

    def collect(self, cohort: Sequence[int], intake: Intake, exchange: Exchange) -> View:
        if not cohort:
            return SumView(lambda: torch.zeros(intake.d), (), intake.d)
        if len(cohort) > self.clients:
            raise RoundFailed(f"clients={self.clients}: a cohort of {len(cohort)} has no head-room; raise clients")
        keys = _only(exchange, "keys", b"")
        head, context = self._open_keys(keys)
        running = _Running(context, self.parameters, intake.width)
        ids, bad = self._add_all(running, head, exchange("update", dict.fromkeys(cohort, keys)), intake.least_answers)

        def total() -> Tensor:
            if not ids:
                return torch.zeros(intake.d)
            whole = replace(head, length=running.length, parts=running.parts, clients=len(ids))
            asked = replace(whole, stage="sum", party=SERVER)
            answer, parts = unseal(_only(exchange, "decrypt", seal(asked, running.serialized())))
            answer.require(replace(whole, stage="decrypt", parts=1))
            return intake.total(self._opened(parts[0], intake.width)).float()

        return SumView(total, tuple(sorted(ids)), intake.d, bad)

    def _add_all(
        self, running: _Running, head: Header, replies: Iterator[tuple[int, bytes]], least_answers: int
    ) -> tuple[list[int], int]:
        """Adds what is whole and fits -> the clients in the sum, and how many were left out.

        Raises:
          RoundFailed: every row lies beyond the bound, or too few rows are left.
        """
        ids: list[int] = []
        broken = refused = 0
        for party, reply in replies:
            own = replace(head, party=party, stage="update", length=running.length, parts=running.parts, clients=1)
            try:
                header, parts = unseal(reply)
                if header == _refusal(own):
                    refused += 1
                else:
                    header.require(own)
                    running.add(parts)
                    ids.append(party)
            except BrokenEnvelope:
                broken += 1
        if refused and not ids:
            raise RoundFailed(f"bound={self.bound}: the rows of {refused} clients lie beyond; raise bound or clip")
        if len(ids) < least_answers:
            raise RoundFailed(f"least_answers={least_answers}: {len(ids)} client(s) answered; their sum stays closed")
        if ids and len(ids) < self.smallest_release:
            raise RoundFailed(f"smallest_release={self.smallest_release}: only {len(ids)} client(s) answered")
        return ids, broken + refused

    def _make_keys(self, memory: Memory) -> tuple[Memory, bytes]:
        context = _new_context(self.parameters)
        public = context.serialize(save_secret_key=False, save_galois_keys=False, save_relin_keys=False)
        secret = context.serialize(save_secret_key=True, save_galois_keys=False, save_relin_keys=False)
        head = self._head(public, token_bytes(16))
        return {**memory, "secret": secret, "key": head.key, "nonce": head.nonce}, seal(head, [public])

    def _encrypt(self, party: int, request: bytes, update: Update) -> bytes:
        import tenseal as ts

        head, context = self._open_keys(request)
        encoded = update()  # trains the client
        require(not encoded.side, f"side information {sorted(encoded.side)} cannot travel in a sum; use Plaintext")
        row, slots = encoded.rows[0], self.parameters.slots
        own = replace(head, party=party, stage="update", length=len(row), parts=ceil(len(row) / slots), clients=1)
        try:
            values = self.steps(row) / 2.0**self.bits  # exact: a power of two
        except InvalidArgument:
            return seal(_refusal(own), [])
        # More than `slots` values would make SEAL print a warning and TenSEAL cut the vector by itself.
        chunks = [values[at : at + slots] for at in range(0, len(values), slots)]
        return seal(own, [ts.ckks_vector(context, chunk).serialize() for chunk in chunks])

    def _decrypt(self, memory: Memory, request: bytes) -> bytes:
        header, parts = unseal(request)
        n, length = header.clients, max(header.length, 1)  # the server's word
        expected = replace(self._head(b"", memory["nonce"]), key=memory["key"], stage="sum", party=SERVER)
        header.require(replace(expected, length=length, parts=ceil(length / self.parameters.slots), clients=n))
        if not self.smallest_release <= n <= self.clients:
            raise RoundFailed(f"a sum of {n} clients: expected {self.smallest_release} to {self.clients}")
        running = _Running(_parsed(memory["secret"]), self.parameters, length)
        running.add(parts)
        exact = running.decrypted() * 2.0**self.bits
        whole = np.rint(exact)
        distance, largest = np.abs(exact - whole).max(), np.abs(whole).max()
        if not (distance <= _OFF_GRID and largest <= n * 2.0**self.bits):
            raise RoundFailed("the sum is not whole steps within the bound: another key, or a malicious client")
        whole = self._noisy(whole)
        return seal(replace(header, stage="decrypt", party=KEY_HOLDER, parts=1), [whole.astype("<i8").tobytes()])

    def _noisy(self, whole: NDArray[np.float64]) -> NDArray[np.float64]:
        """The sum in steps with the plan's noise: whole steps too, and exact in float64."""
        if self.noise_multiplier == 0:
            return whole
        deviation = secure_deviation(self.noise_multiplier, self.sensitivity / self.step, len(whole))  # in steps
        noisy: NDArray[np.float64] = secure_release(torch.from_numpy(whole), deviation).round().numpy()
        return noisy

    def _opened(self, values: bytes, width: int) -> Tensor:
        if len(values) != 8 * width:
            raise BrokenEnvelope(f"a sum of {len(values)} bytes, expected 8 for each of {width} numbers")
        return torch.from_numpy(np.frombuffer(values, "<i8") * self.step)

    def _open_keys(self, message: bytes) -> tuple[Header, Any]:
        """Checks the key holder's message -> its header and the public context."""
        header, parts = unseal(message)
        header.require(self._head(parts[0] if parts else b"", header.nonce))
        return header, _public_context(parts[0], self.parameters)

    def _head(self, public: bytes, nonce: bytes) -> Header:
        """The key holder's first message; all others of a round share its first four fields."""
        agreed = fingerprint(repr(self).encode())
        return Header("ckks", agreed, fingerprint(public), nonce, KEY_HOLDER, "keys", length=0, parts=1, clients=0)


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
            raise BrokenEnvelope(f"a part of {len(part)} bytes is no ciphertext of these parameters") from error
        # A ciphertext at a lower level would silently pull our sum down to it.
        shapes = [(c.size(), c.parms_id(), c.scale) for c in ciphertexts]
        own = [(c.size(), c.parms_id(), c.scale) for c in like.ciphertext()]
        if vector.size() != size or shapes != own:
            raise BrokenEnvelope(f"a ciphertext of {vector.size()} numbers, expected {size} at our level and scale")
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
        raise BrokenEnvelope("the key holder's message holds no keys") from error


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
        raise BrokenEnvelope("the key holder's message holds keys of other parameters, or a secret one")
    return context
