"""Robust rules under encryption: the key holder sees inner products, the server weights, nobody a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from secrets import token_bytes
from struct import Struct, pack
from struct import error as StructError
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from privfm.checks import (
    Corrupt,
    InvalidArgument,
    Overflow,
    ParameterMismatch,
    Replay,
    RoundFailed,
    at_least,
    positive,
    require,
)
from privfm.contracts import (
    KEY_HOLDER,
    SERVER,
    Channel,
    Decision,
    Exchange,
    GramLimits,
    Intake,
    Memory,
    Party,
    Reveals,
    Rule,
    Update,
    View,
)
from privfm.defenses.channels.envelope import Header, Link, fingerprint
from privfm.defenses.channels.gram.ring import BYTES, DEGREE, Array, SecretRing, ServerRing, new_keys, public_ring
from privfm.defenses.channels.gram.sketch import (
    WEIGHT_SUM,
    check_groups,
    checked_gram,
    chunks_of,
    effective_size,
    largest_deviation,
    longest_sum,
    rounded_gram,
    step_of,
    usual_deviation,
    whole_weights,
)
from privfm.defenses.channels.gram.view import ASKED, LONGEST, GramView, Held, Row, commitment, numbers
from privfm.defenses.channels.key_holder import (
    asked,
    gathered,
    refusal,
    require_enough,
    require_signature,
    signature,
)
from privfm.defenses.delegated import decide, references_of

BITS = 24
"""Resolution of a coordinate, relative to the bound."""

_TOO_LONG = 1.5 * LONGEST**2  # as a sketch may show a row of `LONGEST`: two of its largest deviations
_OFF_GRID = 0.25  # steps; 11 standard deviations of the noise of a weighted sum


@final
@dataclass(frozen=True)
class CKKSGram(Channel):
    """Encrypted rows that are measured, weighed and summed, by a server that cannot read them.

    Message sequence (S server, H key holder):

    | stage   | from, to      | what                                                                             |
    |---------|---------------|----------------------------------------------------------------------------------|
    | keys    | H -> S        | public key (signed; S hands it to clients), relinearisation and Galois keys       |
    | update  | client -> S   | its row, encrypted; S notes the SHA-256 of each and closes the door               |
    | signs   | S -> H -> S   | the sorted hashes; a fresh seed of 256 bits, bound to them, once a round           |
    | weights | S -> H -> S   | inner products of sketches (`sketch`); H runs the rule, gives back weights only    |
    | sum     | S -> H -> S   | the sum with these weights; H decrypts it if it may be released, once              |

    Who learns what: S ciphertexts, who took part, the weights with the marks of who was clipped or suspected, and the
    released sum; H lengths and angles of all rows (and of S's references, whose inner products with each other S
    computes in the clear), and the sum; clients the public key. With `gram_to_server` S gets the matrix instead and
    runs the rule itself.

    Assumed: S and H follow the protocol and do not collude. H cannot verify that what it decrypts is what S was sent.
    Nor can it see rows: of a client that encrypts a row beyond `bound` it sees the length, up to `LONGEST` bounds and
    somewhat more. Squares wrap at 1024 bounds, so that a row yet longer can look short and be chosen: then the sum is
    longer than the matrix allows (`longest_sum`), and the round fails. A rule that needs the sum alone has no matrix to
    compare it with. Messages are authenticated (`envelope`). The seed comes after the commitments because rows that
    know the sketch can hide any length in its kernel; it comes from H because the last sender could grind a hash.

    What is released is exact. Rows are whole steps of `bound / 2^24` (cut towards zero), weights are whole numbers
    (`whole_weights`), and H rounds what it decrypts to the whole number it must be, 11 standard deviations of noise
    away. So the released vector depends on the messages alone, not on any error of encryption: S, which holds every
    client's ciphertext, would compute the secret key from an approximate decryption (Li, Micciancio, "On the security
    of homomorphic encryption on approximate numbers", 2021). There is nothing to flood. The *weights* are functions of
    inner products, which are approximate; H rounds these to steps a hundred times their noise (`rounded_gram`) before
    it runs the rule, and the weights to 16 bits. That makes dependence on encryption noise improbable and not
    impossible: for the weights, and for the matrix with `gram_to_server`, it is a heuristic. What bounds it is that S
    gets about 17 bits a client of weights in a round, and that each key serves one round.

    | event                                               | result                                             |
    |-----------------------------------------------------|----------------------------------------------------|
    | a coordinate beyond `bound`, a row beyond `LONGEST` | the client refuses; left out and counted in `bad`  |
    | all who answered refused                            | RoundFailed, with the way out                      |
    | a broken, foreign, replayed or copied message       | left out and counted in `bad`                      |
    | an encrypted row that is longer all the same        | H gives it no weight and suspects it; f is lowered |
    | inner products of nothing, a sum off the grid or    | RoundFailed: a wrong key, or a malicious client    |
    | longer than they allow                              |                                                    |
    | weights that single out a client                    | RoundFailed, from H, before anything is decrypted  |
    | fewer than `smallest_release` clients               | TooFewClients                                      |
    | weights all zero (FLTrust without a friend)         | S's own part only; nothing is decrypted            |
    | nobody answered                                     | zeros, n = 0                                       |

    A malicious client can make a round fail: by values off the grid, and where a rule scales rows to one length
    (FLTrust) by a very short row, whose weight then dwarfs the others'. A cohort of exactly `smallest_release` needs
    equal weights.

    Cost: 32 bytes a parameter and client; 3 MB of keys to S, 0.4 MB to a client; 64 kB an inner product. For a million
    parameters a client's sketch takes 50 ms and an inner product 7 ms, its encryption a second. S holds all rows.

    Args:
      bound: largest absolute coordinate B of a client's row; an L2 clip is one.
      rule: what H runs; set by `with_rule`.
      smallest_release: least effective number of clients `(sum w)^2 / sum w^2` in the released sum.
      max_references: rows of the server's own that a rule may measure clients with.
      groups: G of the sketch, a power of two: relative deviation of a squared distance at most `1 / sqrt(G)`, 1.6 %
        for rows without structure.
      sketch: False measures whole rows: exact distances, and no draw that could be unlucky. The server then multiplies
        every chunk of every pair: three times as long as sketches for 10 clients, some ten times for 100 (d = 10^6).
      gram_to_server: S learns the matrix, and rules run there unchanged.
    """

    bound: float
    rule: Rule | None = None
    smallest_release: int = 2
    max_references: int = 1
    groups: int = 16
    sketch: bool = True
    gram_to_server: bool = False
    reveals = Reveals.GRAM
    client_stages = ("update",)
    key_holder_stages = ("keys", "signs", "weights", "sum")

    def __post_init__(self) -> None:
        positive("bound", self.bound)
        at_least("smallest_release", self.smallest_release, 2)  # the sum of one is its row
        at_least("max_references", self.max_references, 0)
        check_groups(self.groups)
        if self.rule is not None:
            require(self.rule.delegable, f"rule={type(self.rule).__name__} cannot be run by a key holder")
            count = references_of(self.rule)
            allowed = count <= self.max_references
            require(allowed, f"max_references={self.max_references}: {type(self.rule).__name__} has {count}")

    @property
    def limits(self) -> GramLimits | None:
        return GramLimits(self.max_references, float(self.smallest_release))

    @property
    def most_clients(self) -> int | None:
        return int(WEIGHT_SUM)

    @property
    def largest_coordinate(self) -> float | None:
        return self.bound

    @property
    def grid(self) -> float | None:
        return self.step

    @property
    def step(self) -> float:
        """One unit of the grid, in units of an update on the wire."""
        return self.bound / 2.0**BITS

    @property
    def learns(self) -> Mapping[str, str]:
        geometry = "lengths and angles of all updates and of its references" if self.gram_to_server else "weights"
        return {
            "server": f"ciphertexts, who took part, {geometry}, and the weighted sum",
            "key holder": "lengths and angles of all updates, how many took part, and the weighted sum",
            "clients": "the public key, the released model",
            "trust": "server and key holder follow the protocol and do not collude",
        }

    def with_floor(self, least: int) -> CKKSGram:
        return replace(self, smallest_release=max(least, self.smallest_release))

    def with_rule(self, rule: Rule) -> CKKSGram:
        """The same channel, whose key holder runs the rule; itself where the server gets the matrix.

        Raises:
          InvalidArgument: a rule that needs or remembers more than a key holder has, or too many references.
        """
        return replace(self, rule=rule) if self.decides else self

    @property
    def decides(self) -> bool:  # type: ignore[override]  # a constant of other channels
        return not self.gram_to_server

    def facts(self, d: int, n: int) -> Mapping[str, str]:
        measured = "sketches" if self.sketch else "rows"
        off = f"off by {usual_deviation():.1%} (one deviation), {largest_deviation(self.groups):.0%} at worst"
        return {
            "bytes a parameter": f"{chunks_of(d + 1) * BYTES / d:.1f} from a client",
            "inner products": f"{n * (n + 1) // 2} of {measured}, {8 * (DEGREE + 1) >> 10} KiB each to the key holder",
            "squared distances": off if self.sketch and chunks_of(d + 1) > 1 else "exact",
            "resolution": f"{self.step:.3g} a coordinate",
        }

    def error_bound(self, d: int, weights: Tensor) -> float:
        """Largest L2 distance of the released vector from the exact sum of n rows of width d with these weights.

        Each row is cut by less than a step a coordinate; each weight is off by half a unit, unless all are equal.
        """
        whole, unit = whole_weights(weights.double().numpy())
        cut = float(np.abs(whole).sum()) * unit * sqrt(d) * self.step
        off = np.abs(whole * unit - weights.double().numpy()).sum() * sqrt(d) * self.bound
        return cut + float(off)

    # Parties

    def reply(self, party: Party, stage: str, memory: Memory, request: bytes, update: Update) -> tuple[Memory, bytes]:
        match stage:
            case "keys":
                return self._make_keys(party, memory)
            case "update":
                return memory, self._encrypt(party, request, update)
            case "signs":
                return self._draw(party, memory, request)
            case "weights":
                return self._decide(party, memory, request)
            case _:
                return {}, self._decrypt(party, memory, request)  # the key is spent

    def _make_keys(self, party: Party, memory: Memory) -> tuple[Memory, bytes]:
        keys = new_keys(step_of(self.groups))
        head = self._head(keys.public)
        parts = [keys.public, signature(party, head, keys.public), *keys.evaluation]
        sealed = Link(party, SERVER).seal(replace(head, stage="keys", parts=len(parts)), parts)
        return {**memory, "secret": keys.secret, "key": head.key}, sealed

    def _encrypt(self, party: Party, request: bytes, update: Update) -> bytes:
        link = Link(party, SERVER)
        header, parts = link.open(request)
        head = self._checked_key(party, header, parts, 2)
        ring = public_ring(parts[0])
        encoded = update()  # trains the client
        require(not encoded.side, f"side information {sorted(encoded.side)} cannot travel in a sum; use Plaintext")
        row = encoded.rows[0]
        own = replace(head, stage="update", length=len(row), clients=1, weight=encoded.weight)
        try:
            steps = self.steps(row)
        except Overflow:
            return link.seal(refusal(own), [])
        values = np.append(steps / 2.0**BITS, 1.0)  # the canary: who decrypts knows what these must add up to
        sealed = [ring.encrypt(values[at : at + DEGREE]) for at in range(0, len(values), DEGREE)]
        return link.seal(replace(own, parts=len(sealed)), sealed)

    def steps(self, row: Tensor) -> Array:
        """A row `(w,)` in whole steps, cut towards zero.

        Raises:
          Overflow: a coordinate is not finite or lies beyond `bound`, or the row is longer than `LONGEST` bounds.
        """
        values = row.detach().cpu().double().numpy()
        largest, norm = float(np.abs(values).max(initial=0.0)), float(np.linalg.norm(values))
        if not (largest <= self.bound and norm <= LONGEST * self.bound):
            raise Overflow(
                f"bound={self.bound}: a row of norm {norm:.4g} with a coordinate of {largest:.4g}; expected at most "
                f"{LONGEST:.0f} bounds and one; raise bound or clip updates"
            )
        found: Array = np.trunc(values / self.step)
        return found

    def _draw(self, party: Party, memory: Memory, request: bytes) -> tuple[Memory, bytes]:
        link = Link(party, SERVER)
        header, parts = link.open(request)
        n = header.clients
        header.require(self._expected(memory, "signs", header, parts=1))
        hashes = [parts[0][at : at + 32] for at in range(0, len(parts[0]), 32)]
        if len(hashes) != n or len(parts[0]) != 32 * n or hashes != sorted(set(hashes)):
            raise Corrupt(f"a list of commitments that are not {n} different ones in order")
        require_enough(n, 1, self.smallest_release)
        seed, committed = token_bytes(32), commitment(parts[0])
        kept = {**memory, "list": committed, "length": pack("<Q", header.length)}
        return kept, link.seal(replace(header, parts=2), [seed, committed])

    def _decide(self, party: Party, memory: Memory, request: bytes) -> tuple[Memory, bytes]:
        link = Link(party, SERVER)
        header, (committed, asked, known, *products) = _at_least_parts(link, request, 3)
        header.require(self._expected(memory, "weights", header, parts=len(products) + 3))
        if "list" not in memory or committed != memory["list"]:
            raise Replay("inner products of another list of commitments than the one that was given a seed")
        n, (m, bad, seed) = header.clients, _unpacked(ASKED, asked)
        if m > self.max_references or len(known) != 8 * m * m or len(products) != n * (n + 1) // 2 + n * m:
            raise ParameterMismatch(f"{len(products)} inner products for {n} clients and {m} references")
        ring = SecretRing(memory["secret"])
        gram = _assembled([ring.inner_product(part) for part in products], np.frombuffer(known, "<f8"), n, m)
        gram, usable = checked_gram(gram, n, _TOO_LONG)
        gram, kept = rounded_gram(gram), int(usable.sum())
        own = np.zeros((n, n))
        own[np.ix_(usable, usable)] = gram[:kept, :kept]
        memory = {**memory, "gram": own.tobytes()}
        scaled = torch.from_numpy(gram * header.scale**2)
        if self.gram_to_server:
            answer = [usable.tobytes(), scaled.numpy().astype("<f8").tobytes()]
            return memory, link.seal(replace(header, parts=len(answer)), answer)
        decision = self._decided(scaled, usable, m, bad, seed)
        weights = decision.weights.numpy()
        marks = [b"" if marks is None else marks.numpy().tobytes() for marks in (decision.clipped, decision.suspects)]
        answer = [weights.astype("<f8").tobytes(), *marks]
        return {**memory, "weights": answer[0][: 8 * n]}, link.seal(replace(header, parts=3), answer)

    def _decided(self, gram: Tensor, usable: NDArray[np.bool_], m: int, bad: int, seed: int) -> Decision:
        """Runs the rule on what is usable and spreads what it says over all n clients."""
        if self.rule is None:
            raise InvalidArgument("rule=None: the key holder was given no rule; use `with_rule`, or gram_to_server")
        if m != references_of(self.rule):
            raise ParameterMismatch(f"{m} references, expected {references_of(self.rule)} of this rule")
        keep = torch.from_numpy(usable)
        n, kept = len(keep), int(keep.sum())
        found = decide(self.rule, gram, kept, bad + n - kept, seed)
        whole, unit = whole_weights(found.weights[:kept].numpy())
        weights = torch.zeros(n + m, dtype=torch.float64)
        weights[:n][keep] = torch.from_numpy(whole * unit)
        weights[n:] = found.weights[kept:].float()  # no more digits than clients' weights have
        clipped, suspects = (
            None if marks is None else torch.full((n,), other).masked_scatter(keep, marks.bool())
            for marks, other in ((found.clipped, False), (found.suspects, True))
        )
        return Decision(weights, clipped, suspects)

    def _decrypt(self, party: Party, memory: Memory, request: bytes) -> bytes:
        link = Link(party, SERVER)
        header, (given, *sums) = _at_least_parts(link, request, 1)
        n, length = header.clients, header.length
        header.require(self._expected(memory, "sum", header, parts=chunks_of(length + 1) + 1))
        if len(memory.get("gram", bytes(8 * n * n))) != 8 * n * n:
            raise ParameterMismatch(f"a sum of {n} clients, of whom others were measured")
        weights = numbers(given, n)
        self._released(memory, weights)
        whole, _ = whole_weights(weights)
        ring = SecretRing(memory["secret"])
        exact = np.concatenate([ring.opened(part) for part in sums])[: length + 1] * 2.0**BITS
        steps = np.rint(exact)
        distance, largest = np.abs(exact - steps).max(), np.abs(steps).max()
        most = float(np.abs(whole).sum()) * 2.0**BITS
        if not (distance <= _OFF_GRID and largest <= most and steps[-1] == whole.sum() * 2.0**BITS):
            raise RoundFailed("the sum is not whole steps within the bound: another key, or a malicious client")
        square = float(steps[:-1] @ steps[:-1]) / 4.0**BITS
        if "gram" in memory and square > longest_sum(np.frombuffer(memory["gram"]).reshape(n, n), whole.astype(float)):
            raise RoundFailed("the sum is longer than rows of the lengths that were measured: a malicious client")
        return link.seal(replace(header, parts=1), [steps[:-1].astype("<i8").tobytes()])

    def _released(self, memory: Memory, weights: Array) -> None:
        """Refuses weights that are not the ones it gave, or that single out a client.

        Raises:
          ParameterMismatch: other weights than were decided, or without a decision other than equal ones.
          TooFewClients: equal weights over fewer clients than may be summed.
          RoundFailed: they single out a client.
        """
        require_enough(len(weights), 1, self.smallest_release)
        free = self.gram_to_server and "list" in memory
        expected = np.frombuffer(memory["weights"], "<f8") if "weights" in memory else np.ones(len(weights))
        if not free and not np.array_equal(weights, expected):
            raise ParameterMismatch("a sum with other weights than the key holder decided on")
        size = effective_size(weights)
        if size < self.smallest_release * (1 - 1e-9):
            raise RoundFailed(
                f"smallest_release={self.smallest_release}: the weights are effectively those of {size:.3g} client(s); "
                "use MultiKrum, or a rule that averages more"
            )

    def _expected(self, memory: Memory, stage: str, header: Header, parts: int) -> Header:
        """What the server's message must say; how many clients, how many numbers and their unit is its word."""
        length = int.from_bytes(memory["length"], "little") if "length" in memory else header.length
        head = Header("ckksgram", fingerprint(repr(self).encode()), memory.get("key", b""), stage, length, parts)
        return replace(head, clients=header.clients, scale=header.scale)

    # Server

    def collect(self, cohort: Sequence[int], intake: Intake, exchange: Exchange) -> View:
        if not cohort:
            return GramView(self, intake, exchange, None)
        server = exchange.server
        header, parts = Link(server, KEY_HOLDER).open(asked(exchange, "keys", b""))
        head = self._checked_key(server, header, parts, 4)
        public, signed, *evaluation = parts
        ring = ServerRing(public, evaluation)
        sent = replace(head, parts=2)
        requests = {party: Link(server, party).seal(sent, [public, signed]) for party in cohort}
        rows, bad = self._gathered(ring, head, requests, intake, exchange)
        return GramView(self, intake, exchange, Held(ring, head, dict(sorted(rows.items())), bad))

    def _gathered(
        self, ring: ServerRing, head: Header, requests: Mapping[int, bytes], intake: Intake, exchange: Exchange
    ) -> tuple[dict[int, Row], int]:
        """Every whole, fitting row that came, and how many were left out."""
        rows: dict[int, Row] = {}
        own = replace(head, stage="update", length=intake.width, parts=chunks_of(intake.width + 1), clients=1)

        def take(party: int, parts: list[bytes]) -> None:
            committed = commitment(*parts)
            if any(committed == other.committed for other in rows.values()):
                raise Replay("another client's ciphertext")
            rows[party] = Row(committed, [ring.parsed(part) for part in parts])

        _, refused, broken = gathered(exchange, requests, own, intake, take)
        if refused and not rows:
            raise RoundFailed(f"bound={self.bound}: the rows of {refused} clients lie beyond; raise bound or clip")
        require_enough(len(rows), intake.least_answers, self.smallest_release)
        return rows, broken + refused

    def _checked_key(self, party: Party, header: Header, parts: Sequence[bytes], count: int) -> Header:
        """Checks a message with the key holder's public key and signature in front -> what all headers share."""
        public = parts[0] if parts else b""
        head = self._head(public)
        header.require(replace(head, parts=count))
        require_signature(party, head, public, parts[1])
        return head

    def _head(self, public: bytes) -> Header:
        return Header("ckksgram", fingerprint(repr(self).encode()), fingerprint(public), "keys", scale=self.bound)


def _at_least_parts(link: Link, message: bytes, least: int) -> tuple[Header, list[bytes]]:
    header, parts = link.open(message)
    if len(parts) < least:
        raise ParameterMismatch(f"a message of {len(parts)} parts, expected at least {least}")
    return header, parts


def _unpacked(form: Struct, content: bytes) -> tuple[Any, ...]:
    try:
        return form.unpack(content)
    except StructError as error:
        raise Corrupt(f"{len(content)} bytes, expected {form.size}") from error


def _assembled(products: Sequence[float], known: Array, n: int, m: int) -> Array:
    """Inner products in the order of `_products`, and those among references -> the whole matrix `(n+m, n+m)`."""
    gram = np.empty((n + m, n + m))
    pairs = n * (n + 1) // 2
    columns, rows = np.tril_indices(n)
    gram[rows, columns] = gram[columns, rows] = products[:pairs]
    between = np.reshape(products[pairs:], (n, m))
    gram[:n, n:], gram[n:, :n], gram[n:, n:] = between, between.T, known.reshape(m, m)
    return gram
