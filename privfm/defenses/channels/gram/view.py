"""What the server of `CKKSGram` does with the rows it cannot read: measures, weighs and sums them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from hashlib import sha256
from struct import Struct, pack
from typing import TYPE_CHECKING, Any, Final, final

import numpy as np
import torch
from torch import Tensor

from privfm.checks import Corrupt, NotRevealed, Overflow, Replay, RoundFailed, TooFewClients, require
from privfm.contracts import KEY_HOLDER, Decision, Encoded, Exchange, Intake, Reveals, View
from privfm.defenses.channels.envelope import Header, Link
from privfm.defenses.channels.gram.ring import DEGREE, Array, ServerRing
from privfm.defenses.channels.gram.sketch import (
    Draw,
    chunks_of,
    encrypted_sketch,
    monomials_of,
    sketched,
    whole_weights,
)
from privfm.defenses.channels.key_holder import asked

if TYPE_CHECKING:
    from privfm.defenses.channels.gram.channel import CKKSGram

LONGEST: Final = 512.0
"""Largest L2 norm of a row, in bounds. Its square has to fit the ring's `head_room`, with what a sketch adds."""

ASKED: Final = Struct("<QQQ")
"""What the server says beside inner products: how many references, how many bad rows, the seed of the rule."""


@final
@dataclass(frozen=True)
class Row:
    """One client's encrypted row, and its commitment."""

    committed: bytes
    chunks: list[Any] = field(repr=False)


@final
@dataclass(frozen=True)
class Held:
    """What the server works with in a round.

    Attributes:
      ring: its keys.
      head: what the headers of the round's messages share.
      rows: by client, in order.
      bad: rows that were left out.
    """

    ring: ServerRing
    head: Header
    rows: Mapping[int, Row]
    bad: int


@final
class GramView(View):
    """Rows the server holds encrypted: each question goes to the key holder, which answers each once.

    Args:
      channel: that they came over.
      intake: how sums are decoded.
      exchange: the way to the key holder.
      held: the rows; None where nobody was asked.
    """

    def __init__(self, channel: CKKSGram, intake: Intake, exchange: Exchange, held: Held | None) -> None:
        self._channel, self._intake, self._exchange, self._held = channel, intake, exchange, held
        self.reveals, self.d = Reveals.GRAM, intake.d
        self.ids, self.bad = ((), 0) if held is None else (tuple(held.rows), held.bad)
        self._matrix: tuple[Tensor, Tensor] | None = None  # references, and the matrix with them

    def total(self) -> Tensor:
        if self._held is None or not self.n:
            return torch.zeros(self.d)
        return self._intake.total(torch.from_numpy(self._opened(self._held, np.ones(self.n))))

    def gram(self, references: Tensor) -> Tensor:
        if not self._channel.gram_to_server:
            raise NotRevealed("gram: the matrix stays with the key holder; use Delegated(rule), or gram_to_server")
        if self._matrix is None or not torch.equal(self._matrix[0], references):
            usable, gram = self._measured(references, 0)
            size = self.n + len(references)
            if len(usable) != self.n or len(gram) != 8 * size * size or b"\0" in usable:
                raise RoundFailed("a row too long to be measured; which one is told where the key holder runs the rule")
            self._matrix = references, torch.from_numpy(np.frombuffer(gram, "<f8").reshape(size, size).copy())
        return self._matrix[1].clone()

    def decided(self, references: Tensor, seed: int) -> Decision:
        if self._channel.gram_to_server:
            raise NotRevealed("decided: the server runs the rule itself; ask for gram")
        weights, *marks = self._measured(references, seed)
        found = torch.from_numpy(numbers(weights, self.n + len(references)).copy())
        clipped, suspects = (None if not own else torch.tensor([bool(x) for x in own]) for own in marks)
        for own in (clipped, suspects):
            if own is not None and len(own) != self.n:
                raise Corrupt(f"marks of {len(own)} clients, expected {self.n}")
        return Decision(found, clipped, suspects)

    def weighted_sum(self, weights: Tensor, references: Tensor) -> Tensor:
        own = weights.detach().cpu().double()
        if self._held is None or not own[: self.n].any():
            vector = torch.zeros(self.d, dtype=torch.float64)
        else:
            vector = self._intake.total(torch.from_numpy(self._opened(self._held, own[: self.n].numpy()))).double()
        return (vector + own[self.n :] @ references.detach().cpu().double()).float()

    def _measured(self, references: Tensor, seed: int) -> list[bytes]:
        """The stages "signs" and "weights" -> the parts of the key holder's answer."""
        if self._held is None or not self.n:
            raise TooFewClients("nobody answered: there is nothing to measure")
        channel, held, width = self._channel, self._held, self._intake.width
        scale, plain = self._on_wire(references)
        link = Link(self._exchange.server, KEY_HOLDER)
        committed = b"".join(sorted(row.committed for row in held.rows.values()))
        said = replace(held.head, stage="signs", length=width, parts=1, clients=self.n, scale=scale)
        answer = link.expect(asked(self._exchange, "signs", link.seal(said, [committed])), said)
        if len(answer) != 2 or answer[1] != commitment(committed):
            raise Replay("a seed for another list of commitments")
        draw = Draw.expand(answer[0], answer[1], chunks_of(width + 1), channel.groups)
        short = sketched(plain, draw) if channel.sketch else plain
        known = (short @ short.T).astype("<f8").tobytes()
        asking = ASKED.pack(len(plain), self.bad, seed)
        products = self._of_sketches(held, draw, short) if channel.sketch else self._of_rows(held, short)
        parts = [answer[1], asking, known, *products]
        said = replace(said, stage="weights", parts=len(parts))
        answer = link.expect(asked(self._exchange, "weights", link.seal(said, parts)), said)
        if len(answer) != (2 if channel.gram_to_server else 3):
            raise Corrupt(f"an answer of {len(answer)} parts")
        return answer

    def _on_wire(self, references: Tensor) -> tuple[float, Array]:
        """Units of an update in one bound, and the references in bounds, as rows on the wire would have them."""
        codecs, width = self._intake.codecs, self._intake.width
        factor = codecs.similarity
        require(factor is not None, "codecs change lengths by no one factor: inner products would lie")
        factor = 1.0 if factor is None else factor
        wire = references.detach().cpu().double() / factor
        if len(wire):
            back = codecs.decode(Encoded(wire, {}), self.d).double() if width == self.d else wire * torch.nan
            alike = torch.allclose(back, references.cpu().double(), rtol=1e-5, atol=1e-12)
            require(alike, "references cannot be measured behind codecs that do more than scale")
        values: Array = wire.numpy() / self._channel.bound
        longest = float(np.linalg.norm(values, axis=1).max(initial=0.0))
        if not longest <= LONGEST:
            raise Overflow(f"bound={self._channel.bound}: a reference has {longest:.4g} bounds; raise bound")
        return self._channel.bound * factor, values

    def _of_sketches(self, held: Held, draw: Draw, references: Array) -> Iterator[bytes]:
        """Packed inner products of sketches: of clients i <= j, then of each client with each reference."""
        ring = held.ring
        monomials = monomials_of(ring, draw)
        sketches = [encrypted_sketch(ring, chunks, monomials, draw) for chunks in self._without_canaries(held)]
        for j, sketch in enumerate(sketches):
            mirrored = ring.reversed(sketch)
            for other in sketches[: j + 1]:
                yield ring.product(other, mirrored).packed()
        for sketch in sketches:
            for reference in references:
                yield ring.plain_product(sketch, reference).packed()

    def _of_rows(self, held: Held, references: Array) -> Iterator[bytes]:
        """The same of whole rows."""
        ring, rows = held.ring, self._without_canaries(held)
        for j, chunks in enumerate(rows):
            mirrored = [ring.reversed(chunk) for chunk in chunks]
            for other in rows[: j + 1]:
                yield ring.inner_product(other, mirrored).packed()
        padded = np.zeros((len(references), chunks_of(self._intake.width + 1) * DEGREE))
        padded[:, : self._intake.width] = references
        for chunks in rows:
            for reference in padded:
                yield ring.plain_inner_product(chunks, np.split(reference, len(chunks))).packed()

    def _without_canaries(self, held: Held) -> list[list[Any]]:
        """The clients' ciphertexts as they are measured."""
        place = self._intake.width % DEGREE
        canary = held.ring.encode(np.eye(1, place + 1, place)[0])
        return [[*row.chunks[:-1], held.ring.without(row.chunks[-1], canary)] for row in held.rows.values()]

    def _opened(self, held: Held, weights: Array) -> Array:
        """The stage "sum" -> the weighted sum of rows on the wire, `(w,)` float64."""
        ring, width = held.ring, self._intake.width
        whole, unit = whole_weights(weights)
        factors = [ring.encode(np.array([float(w)]), 1.0) if w not in (0, 1) else None for w in whole.tolist()]
        parts = [weights.astype("<f8").tobytes()]
        for chunk in range(chunks_of(width + 1)):
            total = ring.zero(None)
            for row, weight, factor in zip(held.rows.values(), whole.tolist(), factors, strict=True):
                if weight:
                    term = row.chunks[chunk]
                    ring.add(total, term if factor is None else ring.times(term, factor))
            parts.append(ring.serialized(total))
        said = replace(held.head, stage="sum", length=width, parts=len(parts), clients=self.n)
        link = Link(self._exchange.server, KEY_HOLDER)
        answer = link.expect(asked(self._exchange, "sum", link.seal(said, parts)), said)
        if len(answer) != 1 or len(answer[0]) != 8 * width:
            raise Corrupt(f"a sum of {sum(map(len, answer))} bytes, expected 8 for each of {width} numbers")
        values: Array = np.frombuffer(answer[0], "<i8") * (unit * self._channel.step)
        return values


def commitment(*parts: bytes) -> bytes:
    """SHA-256 of the parts, each with its length."""
    return sha256(b"".join(piece for part in parts for piece in (pack(">Q", len(part)), part))).digest()


LARGEST_WEIGHT: Final = 2.0**64
"""Far beyond any rule's, and far below where squares of weights leave double precision."""


def numbers(content: bytes, count: int) -> Array:
    """Weights as a message holds them, `(count,)`.

    Raises:
      Corrupt: there are more or fewer of them, or one is not finite or beyond `LARGEST_WEIGHT`.
    """
    found = np.frombuffer(content, "<f8") if len(content) == 8 * count else np.full(1, np.nan)
    if not bool((np.abs(found) <= LARGEST_WEIGHT).all()):
        raise Corrupt(f"weights of {len(content)} bytes, expected {count} numbers of 8, at most 2^64")
    return found
