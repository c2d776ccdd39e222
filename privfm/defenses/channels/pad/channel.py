"""A one-time pad whose key adds up as the messages do: one short key sum opens one long sum. Research."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from math import sqrt
from struct import pack
from typing import Final, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from privfm.checks import BrokenEnvelope, Corrupt, Overflow, RoundFailed, at_least, require
from privfm.contracts import SERVER, Channel, Encoded, Exchange, Intake, Memory, Party, Reveals, Update, View
from privfm.defenses.channels.envelope import Header, Link, fingerprint
from privfm.defenses.channels.masks import PairwiseMasks
from privfm.defenses.channels.masks.secrets import tagged, untagged
from privfm.defenses.channels.masks.server import MaskedSum
from privfm.defenses.channels.pad.parameters import CANARIES, WORD, PadParameters, Whole, most_bits
from privfm.defenses.channels.pad.rlwe import DEGREE, MODULUS, ternary
from privfm.defenses.channels.pad.security import Estimate, pad_security
from privfm.defenses.transforms import Chain
from privfm.defenses.views import SumView

__all__ = ["RLWEPad", "most_bits"]

_MARK_BYTES: Final = 16  # of a fingerprint
_OWN: Final = "pad/announced"  # in a client's memory: the fingerprint of what it announced


@final
@dataclass(frozen=True)
class RLWEPad(Channel):
    """Each client adds a pad to its row, and the sum of the pads follows from the sum of their keys. Research only.

    Client i draws a ternary key s_i of 2048 numbers for this one round and sends `c_i = a s_i + e_i + D m_i` over
    Z_q[X]/(X^2048 + 1), 2048 numbers m_i of its row to a polynomial, with small fresh errors e_i. The keys are summed
    by `masks`, whatever the width of the rows: drop-outs, thresholds and lies about them cost the same for a model of
    any size. The server adds what came from exactly the clients U in the key sum S and rounds
    `sum c_i - a S = D sum m_i + sum e_i`.

    The polynomials a are not sent. Everybody expands them (SHAKE-128) from the round, the parameters and the hash of
    all that clients announced; a client looks for its own announcement there. So the server cannot choose a (a = 0
    would show it every row). It can choose among hashes, which gives it other uniform polynomials.

    Who learns what: the server U, the sums of m_i, e_i and s_i, and uniform numbers; clients what `masks` tells them.
    *Assumed* is Hint-RLWE: `(a, a s + e)` is pseudo-random, over many polynomials a for one key, given `s + s'` and
    `e + e'` with the keys and errors of the other honest clients in U. Therefore U holds two honest clients at least
    (the key sum of one is its key) and a round has one key sum (those of U and of U without i would give s_i); `masks`
    sees to the latter, against a server that is semi-honest or active, as it is set. The parameters are heuristic: no
    reduction is proved for ternary keys with hints. `security` is an estimate. What a malicious client sends is checked
    by nobody, as long as the sum stays in range.

    | event                                           | result                                                |
    |-------------------------------------------------|-------------------------------------------------------|
    | a number not whole, not finite, or beyond       | the client refuses; left out and counted in `bad`     |
    | all who answered refused                        | RoundFailed, with the way out                         |
    | a broken, foreign or replayed client message    | left out and counted in `bad`                         |
    | nobody answered                                 | zeros, n = 0                                          |
    | fewer than `smallest_release`, over `clients`   | TooFewClients, RoundFailed                            |
    | drop-outs                                       | as `masks`: recovered down to its threshold           |
    | the sum fails canaries, range or remainders     | RoundFailed: a wrong key sum, or a malicious client   |
    | a broken message of the server                  | BrokenEnvelope                                        |

    | `approximate` | D                       | bits at 10, 100, 200 clients | error of a number of the sum            |
    |---------------|-------------------------|------------------------------|-----------------------------------------|
    | False         | over twice all errors   | 17, 11, 9                    | none                                    |
    | True          | what `bits` leaves over | 26, 23, 22                   | deviation(n), never over error_bound(n) |

    With noise of a few units the grid may be much finer: at equal bounds the second is the more precise one.

    Cost: 4 bytes a parameter and client, and the key sum (`masks` for 2048 numbers). For a million parameters on one
    quiet core a client needs 65 ms, the server 50 ms once and 6 ms a client.

    Args:
      clients: most clients a sum may hold. Head-room is proved for it, errors included.
      bits: numbers are whole, of absolute value at most 2^bits.
      masks: sums the keys; a modulus of 16 bits will do.
      smallest_release: fewest clients whose sum may be opened: two more than `masks` assumes to be corrupt.
      approximate: see the table.

    Source: Stevens et al., "Efficient differentially private secure aggregation for federated learning via hardness of
    learning with errors", 2022, and Bell et al., "ACORN: input validation for secure aggregation", 2023 (sums of keys
    as a small secure sum); Kim, Lee, Seo, Song, "Toward practical lattice-based proof of knowledge from Hint-MLWE",
    2023.
    """

    clients: int
    bits: int
    masks: PairwiseMasks
    smallest_release: int = 2
    approximate: bool = False
    reveals = Reveals.SUM
    integers = True

    def __post_init__(self) -> None:
        at_least("smallest_release", self.smallest_release, 2)  # the key sum of one is its key
        at_least("clients", self.clients, self.smallest_release)
        require(
            self.smallest_release >= 2 + self.colluders,
            f"smallest_release={self.smallest_release}: with {self.colluders} of {self.clients} clients corrupt, as "
            f"`masks` assumes, expected at least {2 + self.colluders}, so that two honest ones are in every sum",
        )
        require(
            self.masks.clients >= self.clients and self.masks.modulus > 2 * self.clients,
            f"masks: {self.masks.clients} clients modulo {self.masks.modulus}: expected at least {self.clients}, and a "
            "modulus of more than twice as many",
        )
        _ = self.parameters  # refuses what there is no room for

    @property
    def client_stages(self) -> tuple[str, ...]:  # type: ignore[override]  # a constant of the class elsewhere
        return self.masks.client_stages

    @property
    def row_stage(self) -> str:  # type: ignore[override]
        return self.masks.row_stage

    @property
    def most_clients(self) -> int | None:
        return self.clients

    @property
    def largest_coordinate(self) -> float | None:
        return 2.0**self.bits

    @property
    def grid(self) -> float | None:
        return None if self.approximate else 1.0

    @property
    def colluders(self) -> int:
        """Clients that `masks` assumes to work with the server."""
        return int(self.masks.corrupt * self.clients + 1e-9)  # 0.29 of 100 are 29

    @property
    def parameters(self) -> PadParameters:
        """How numbers lie in a row, with the proof of head-room."""
        return PadParameters(self.clients, self.bits, self.approximate)

    def error_bound(self, d: int, n: int) -> float:
        """Largest L2 distance of the sum of n rows of d whole numbers from the exact sum, in their units."""
        return sqrt(d) * self.parameters.error_bound(n)

    @property
    def security(self) -> Estimate:
        """Estimated cost of opening one honest client's row, with as few honest clients in the sum as may be."""
        return pad_security(self.smallest_release - self.colluders)

    @property
    def learns(self) -> Mapping[str, str]:
        return {
            "server": "uniform numbers, who took part, and the sums of rows, of one-time keys and of errors",
            "clients": "what the masks tell them, the released model",
            "trust": f"at most {self.colluders} clients work with the server; Hint-RLWE, a research assumption, "
            f"estimated at {self.security.bits:.0f} bits",
        }

    def facts(self, d: int, n: int) -> Mapping[str, str]:
        parameters, honest, unseen = self.parameters, self.smallest_release - self.colluders, pad_security(None)
        bound, deviation = parameters.error_bound(n), parameters.deviation(n)
        return {
            "levels of a value": f"{parameters.levels}; head-room proved for {self.clients} clients",
            "sum": f"error at most {bound}, deviation {deviation:.3g}, in steps of the codec" if bound else "exact",
            "bytes of a row": f"{WORD.itemsize * (d + CANARIES)}, and its key of {DEGREE} numbers under masks",
            "security": f"Hint-RLWE, no reduction proved; estimate {self.security.bits:.0f} bits (classical) with "
            f"{honest} honest clients in the sum, {unseen.bits:.0f} without the sum of their keys; research",
            **{f"key sum: {name}": text for name, text in self.masks.facts(DEGREE, n).items()},
        }

    def with_floor(self, least: int) -> RLWEPad:
        return replace(self, smallest_release=max(least, self.smallest_release))

    def numbers(self, row: Tensor) -> Whole:
        """A row `(w,)` as whole numbers.

        Raises:
          Overflow: a number is not finite, not whole or beyond 2^bits. It is neither cut nor rounded.
        """
        values = row.detach().cpu().double().numpy()
        largest = float(np.abs(values).max(initial=0.0))
        if not largest <= 2.0**self.bits:
            raise Overflow(f"bits={self.bits}: a number of absolute value {largest:.17g}; raise bits, or clip updates")
        whole: Whole = values.astype(np.int64)
        if not np.array_equal(whole, values):
            raise Overflow("a number is not whole; put a codec of whole numbers before the channel")
        return whole

    def reply(self, party: Party, stage: str, memory: Memory, request: bytes, update: Update) -> tuple[Memory, bytes]:
        if stage == "masked":
            return self._padded(party, memory, request, update)
        memory, reply = self._key_sums.reply(party, stage, memory, request, update)
        return ({**memory, _OWN: fingerprint(reply)} if stage == "keys" else memory), reply

    def collect(self, cohort: Sequence[int], intake: Intake, exchange: Exchange) -> View:
        if len(cohort) > self.clients:
            raise RoundFailed(f"clients={self.clients}: a cohort of {len(cohort)} has no head-room; raise clients")
        padded = _PaddedSum(self, intake, exchange)
        keys = MaskedSum(
            self._key_sums, Intake(Chain(()), DEGREE, Reveals.SUM, least_answers=intake.least_answers), padded
        )
        padded.keys = keys
        keys.gather(cohort)

        def total() -> Tensor:
            if not keys.ids:
                return torch.zeros(intake.d)
            seed = self._seed(padded.transcript, exchange.server.round)
            row = self.parameters.opened(padded.running, keys.open(), seed, len(keys.ids))
            return intake.total(torch.from_numpy(row.astype(np.float64)))

        return SumView(total, keys.ids, intake.d, keys.bad + padded.bad)

    def header(self, transcript: bytes) -> Header:
        """What the messages that carry rows say: these parameters, and the polynomials of this transcript."""
        scale = 1 / self.parameters.factor
        return Header("pad", fingerprint(repr(self).encode()), fingerprint(transcript), "masked", scale=scale)

    @property
    def _key_sums(self) -> PairwiseMasks:
        return self.masks.with_floor(self.smallest_release)

    def _padded(self, party: Party, memory: Memory, request: bytes, update: Update) -> tuple[Memory, bytes]:
        """Stage "masked": the row under a pad, and the pad's key under masks. The key is then forgotten.

        Raises:
          Corrupt: the transcript does not hold what this client announced.
        """
        link = Link(party, SERVER)
        header, parts = link.open(request)
        header.require(replace(self.header(parts[1] if len(parts) == 2 else b""), parts=2))
        asked, transcript = parts
        if untagged(transcript, _MARK_BYTES).get(party.number) != memory[_OWN]:
            raise Corrupt(f"the transcript of the round is not one in which client {party.number} took part")
        encoded = update()  # trains the client
        require(not encoded.side, f"side information {sorted(encoded.side)} cannot travel in a sum; use Plaintext")
        row = encoded.rows[0]
        own = replace(header, length=len(row), parts=0, clients=0, weight=encoded.weight)
        try:
            numbers = self.numbers(row)
        except Overflow:  # it takes no part from here on, and opens nothing
            left = {name: value for name, value in memory.items() if name not in ("seed", "masking")}
            return left | {"boxes": b""}, link.seal(own, [])
        key = ternary(DEGREE)
        words = self.parameters.padded(numbers, key, self._seed(transcript, party.round))
        memory, masked = self._key_sums.reply(party, "masked", memory, asked, lambda: _as_row(key))
        return memory, link.seal(replace(own, parts=2, clients=1), [masked, words])

    def _seed(self, transcript: bytes, now: int) -> bytes:
        parameters = fingerprint(repr(self).encode())
        return b"privfm/pad/polynomials" + parameters + pack(">q", now) + sha256(transcript).digest()


@final
class _PaddedSum(Exchange):
    """The exchange that the key sum is run over: it adds the padded row that comes with each masked key.

    Attributes:
      keys: the key sum. A row is added exactly if its key was: if, after a reply, no more messages are left out.
      transcript: fingerprints of what clients announced, by number.
      running: the sum `(w + 8,)` of padded rows, not reduced: 4096 of them stay far below 2^64.
      bad: replies left out here, of which the key sum does not know.
    """

    keys: MaskedSum

    def __init__(self, channel: RLWEPad, intake: Intake, below: Exchange) -> None:
        self._channel, self._intake, self._below = channel, intake, below
        self.server = below.server
        self.running = np.zeros(intake.width + CANARIES, np.uint64)
        self.transcript = b""
        self.bad = 0

    def __call__(self, stage: str, requests: Mapping[int, bytes]) -> Iterator[tuple[int, bytes]]:
        if stage == "keys":
            return self._announced(requests)
        return self._rows(requests) if stage == "masked" else self._below(stage, requests)

    def _announced(self, requests: Mapping[int, bytes]) -> Iterator[tuple[int, bytes]]:
        marks: dict[int, bytes] = {}
        for party, reply in self._below("keys", requests):
            left_out = self.keys.bad
            yield party, reply
            if self.keys.bad == left_out:
                marks[party] = fingerprint(reply)
        self.transcript = tagged(marks.items())

    def _rows(self, requests: Mapping[int, bytes]) -> Iterator[tuple[int, bytes]]:
        head = replace(self._channel.header(self.transcript), parts=2)
        sealed = {
            party: Link(self.server, party).seal(head, [request, self.transcript])
            for party, request in requests.items()
        }
        added = refused = 0
        for party, reply in self._below("masked", sealed):
            try:
                opened = self._opened(party, reply, replace(head, weight=self._intake.weights.get(party, 1.0)))
            except BrokenEnvelope:
                self.bad += 1
                continue
            if opened is None:
                refused += 1
                continue
            masked, words = opened
            left_out = self.keys.bad
            yield party, masked
            if self.keys.bad == left_out:
                self.running += words
                added += 1
        self.bad += refused
        if refused and not added:
            raise RoundFailed(
                f"bits={self._channel.bits}: the rows of {refused} clients are not whole numbers up to 2^bits; raise "
                "bits, clip updates, or put a codec of whole numbers before the channel"
            )

    def _opened(self, party: int, reply: bytes, head: Header) -> tuple[bytes, NDArray[np.uint32]] | None:
        """The masked key and the padded row; None: the client refuses to send its row."""
        header, parts = Link(self.server, party).open(reply)
        own = replace(head, length=self._intake.width)
        if header == replace(own, parts=0, clients=0):
            return None
        header.require(replace(own, clients=1))
        masked, content = parts
        if len(masked) <= DEGREE:
            raise Corrupt(f"a padded row with {len(masked)} bytes for its key: it could never be opened")
        if len(content) != WORD.itemsize * len(self.running):
            raise Corrupt(f"a padded row of {len(content)} bytes, expected {WORD.itemsize} for each number")
        words: NDArray[np.uint32] = np.frombuffer(content, WORD)
        if words.max() >= MODULUS:
            raise Corrupt(f"a padded row with a number of {words.max()}, expected less than {MODULUS}")
        return masked, words


def _as_row(key: NDArray[np.int8]) -> Encoded:
    return Encoded(torch.from_numpy(key.astype(np.float64))[None], {})
