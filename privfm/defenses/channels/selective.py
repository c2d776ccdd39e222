"""A channel for some columns, and none for the others: selective encryption, and what it leaves open."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

from privfm.blocks import finite
from privfm.checks import BrokenEnvelope, Corrupt, Replay, require
from privfm.contracts import (
    KEY_HOLDER,
    SERVER,
    Channel,
    Encoded,
    Exchange,
    Intake,
    Memory,
    Party,
    Reveals,
    State,
    Transform,
    Update,
    View,
)
from privfm.defenses.channels.envelope import Header, Link, fingerprint
from privfm.defenses.channels.selective_maps import Ranges

_LARGEST = 2**31 - 1  # of the whole numbers that 4 bytes hold


@final
@dataclass(frozen=True)
class Selective(Channel):
    """Protected columns travel through a channel of sums, all others in the clear.

    The server reads the clear columns of *every single client*, and of the protected ones what the channel inside
    shows: their sum. This is not an encrypted update. What is left in the clear is said by `unprotected`, and what it
    gives away depends on the model and not on the share: one example's gradient of a fully connected layer holds the
    layer's input once for each of its c outputs, so that with a random share s of the weights protected, 1 - s^c of
    the input's coordinates are read off exactly; and a layer in front that is left in the clear gives its own input,
    whatever is done to the layers behind it. The six biases of a classifier, 0.07 % of an update of MiniLM's adapters,
    were enough to find a client's one sentence among 9,000 (`experiments/selective_encryption.py`).

    Each client's messages are sealed once more, around those of the channel inside: whoever carries them can neither
    take the clear part away nor exchange it for another. Everything about the protected part is the inner channel's:
    drop-outs, refusals, weights, floors, integrity.

    | event                                                    | result                                             |
    |----------------------------------------------------------|----------------------------------------------------|
    | a coordinate, in the clear or not, that is not finite,   | the client refuses in the inner channel's way, and |
    | beyond the inner channel's bound, or not whole where it  | sends zeros in the clear                           |
    | must be                                                  |                                                    |
    | the same of a malicious client's clear part              | left out and counted in `bad`                      |
    | a broken, foreign, replayed or second message            | as in the inner channel                            |
    | a client in the protected sum that sent no clear part    | zeros there: what it might have sent anyway        |
    | a client that drops out after it has sent its clear part | its clear part has been seen, and is not summed    |
    | a codec whose columns are not the update's               | InvalidArgument                                    |

    Noise that only the sum hides (shared out among clients, added by a key holder) does not cover clear columns: a plan
    with either does not hold here. A central plan does, as it trusts the server with rows anyway.

    Cost: what the inner channel costs for the protected columns; 4 bytes for each other one (8 where whole numbers may
    pass 2^31). The server keeps every client's clear part until the round ends.

    Args:
      channel: of sums.
      protected: columns `[lo, hi)` of an update, sorted and disjoint. See `selective_maps` for how to choose them; the
        choice is known to everybody.

    Raises:
      InvalidArgument: the channel reveals more than a sum, or the ranges are empty, unsorted or overlap.

    Sources: Jin et al., "FedML-HE: an efficient homomorphic-encryption-based privacy-preserving federated learning
    system", 2023 (selecting what to encrypt); Phong et al., "Privacy-preserving deep learning via additively
    homomorphic encryption", 2018, section 3 (the input of a fully connected layer from its gradient).
    """

    channel: Channel
    protected: Ranges
    reveals = Reveals.SUM

    def __post_init__(self) -> None:
        inner, name = self.channel, type(self.channel).__name__
        require(
            inner.reveals is Reveals.SUM,
            f"{name} reveals {inner.reveals.name} of what it should protect; expected a channel that reveals SUM",
        )
        require(not isinstance(inner, Selective), "channel=Selective: expected the channel for all protected columns")
        edges = np.asarray(self.protected)
        form = edges.ndim == 2 and edges.shape[1:] == (2,) and edges.dtype.kind == "i"
        require(form, "protected: expected at least one pair (lo, hi) of whole numbers; Plaintext protects nothing")
        steps = np.diff(edges.ravel())  # inside ranges, and from one to the next
        ordered = edges[0, 0] >= 0 and bool((steps[::2] > 0).all() and (steps[1::2] >= 0).all())
        require(ordered, "protected: expected ranges 0 <= lo < hi, sorted and disjoint")

    @property
    def client_stages(self) -> tuple[str, ...]:  # type: ignore[override]  # constants of other channels
        return self.channel.client_stages

    @property
    def row_stage(self) -> str:  # type: ignore[override]
        return self.channel.row_stage

    @property
    def key_holder_stages(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.channel.key_holder_stages

    @property
    def integers(self) -> bool:  # type: ignore[override]
        return self.channel.integers

    @property
    def server_learns_sum(self) -> bool:  # type: ignore[override]
        return self.channel.server_learns_sum

    @property
    def least_clients(self) -> int:
        return self.channel.least_clients

    @property
    def most_clients(self) -> int | None:
        return self.channel.most_clients

    @property
    def largest_coordinate(self) -> float | None:
        """The inner channel's, to which clear columns are held, too, but for 2^31, for which 4 bytes have no room."""
        largest = self.channel.largest_coordinate
        return _LARGEST if self.integers and largest == _LARGEST + 1 else largest

    @property
    def modulus(self) -> int | None:
        return self.channel.modulus

    @property
    def grid(self) -> float | None:
        """The inner channel's where it carries whole numbers; beside another, clear columns travel as float32."""
        return self.channel.grid if self.channel.integers else None

    def with_floor(self, least: int) -> Selective:
        return replace(self, channel=self.channel.with_floor(least))

    def unprotected(self, d: int) -> float:
        """Share of the d columns that the server reads of each client."""
        return 1.0 - float(np.diff(self._edges.clip(max=d)).sum()) / d

    def facts(self, d: int, n: int) -> Mapping[str, str]:
        count = round((1 - self.unprotected(d)) * d)
        return {"protected": f"{count} of {d} values, in {len(self.protected)} ranges", **self.channel.facts(count, n)}

    @property
    def learns(self) -> Mapping[str, str]:
        inner = self.channel.learns
        return {
            **inner,
            "server": f"every client's values in all but the protected columns; of those: {inner['server']}",
            "trust": f"the server, with what is in the clear; for the protected columns: {inner['trust']}",
        }

    def reply(self, party: Party, stage: str, memory: Memory, request: bytes, update: Update) -> tuple[Memory, bytes]:
        if party.number == KEY_HOLDER:
            return self.channel.reply(party, stage, memory, request, update)
        clear: list[bytes] = []
        width = 0

        def protected() -> Encoded:
            nonlocal width
            encoded = update()
            width = encoded.rows.shape[1]
            row, in_clear = self._cut(encoded.rows[0].detach().cpu())
            clear.append(in_clear)
            return replace(encoded, rows=row[None])

        memory, reply = self.channel.reply(party, stage, memory, request, protected)
        parts = [reply, *clear]
        return memory, Link(party, SERVER).seal(self._head(stage, width, len(parts)), parts)

    def collect(self, cohort: Sequence[int], intake: Intake, exchange: Exchange) -> View:
        mask = self._mask(intake.width)
        self._require_columns(intake, mask)
        held = _Held(int(mask.sum()), self.channel.integers)
        arriving = _Arriving(self, exchange, intake.width)
        below = self.channel.collect(cohort, replace(intake, codecs=held), arriving)
        return PartlyClearView(below, held, arriving, mask, intake)

    def values(self, part: bytes, width: int) -> NDArray[Any]:
        """A client's clear part: as many numbers as there are clear columns of `width`.

        Raises:
          Corrupt: there are more or fewer of them, or some are not finite or beyond the inner channel's bound.
        """
        count = width - int(self._mask(width).sum())
        if len(part) != count * self._wire.itemsize:
            raise Corrupt(f"a clear part of {len(part)} bytes, expected {count} numbers of {self._wire.itemsize}")
        found = np.frombuffer(part, self._wire)
        if not self._fits(torch.from_numpy(found.astype(np.float64))):
            raise Corrupt("a clear part holds a number that is not finite, or beyond the channel's bound")
        return found

    def _cut(self, row: Tensor) -> tuple[Tensor, bytes]:
        """The protected part of a row `(w,)`, and the others' bytes; a row that does not fit has neither."""
        mask = self._mask(len(row))
        own, others = row[mask], row[~mask]
        if not self._fits(row):
            own, others = torch.full_like(own, torch.nan), torch.zeros_like(others)
        return own, others.numpy().astype(self._wire).tobytes()

    def _fits(self, row: Tensor) -> bool:
        """Whether every number of `(k,)` may be sent."""
        largest = self.largest_coordinate
        return (
            bool(finite(row[None]))
            and (largest is None or float(row.abs().max() if len(row) else 0) <= largest)
            and (not self.integers or torch.equal(row, row.round()))
        )

    def _require_columns(self, intake: Intake, mask: Tensor) -> None:
        """A codec must keep columns apart: else clear columns would show protected ones, and neither be known."""
        last, width, d = int(self._edges[-1, 1]), intake.width, intake.d
        way = "FixedPoint or no codec, or a channel for whole rows"
        require(width == d, f"a codec sends {d} columns as {width}, and columns are to be protected; {way}")
        require(last <= d, f"protected reaches to column {last}, an update has {d}")
        for own in (mask, ~mask):
            decoded = intake.codecs.decode(Encoded(own.double()[None], {}), d)[0]
            require(not bool(decoded[~own].any()), f"a codec mixes protected columns with clear ones; {way}")

    def _head(self, stage: str, width: int, parts: int) -> Header:
        return Header("select", self._fingerprint, stage=stage[:8], length=width, parts=parts, clients=1)

    @property
    def _wire(self) -> np.dtype[Any]:
        """How a number in the clear is written; it must not depend on the row."""
        if not self.integers:
            return np.dtype("<f4")
        largest = self.largest_coordinate
        return np.dtype("<i4" if largest is not None and largest <= _LARGEST else "<i8")

    @cached_property
    def _edges(self) -> NDArray[np.int64]:
        return np.asarray(self.protected, np.int64)

    @cached_property
    def _fingerprint(self) -> bytes:
        return fingerprint(repr(self.channel).encode() + self._edges.astype("<i8").tobytes())

    @cached_property
    def _masks(self) -> dict[int, Tensor]:
        return {}

    def _mask(self, width: int) -> Tensor:
        """Which of `width` columns are protected, `(width,)` bool; the last one is kept, as a round has one width."""
        if width not in self._masks:
            edges = self._edges.clip(max=width)
            marks = np.zeros(width + 1, np.int8)
            marks[edges[:, 0]] += 1
            marks[edges[:, 1]] -= 1
            self._masks.clear()
            self._masks[width] = torch.from_numpy(np.cumsum(marks[:width], dtype=np.int8) > 0)
        return self._masks[width]


@final
class _Held(Transform):
    """Stands in the codecs' place while the inner channel works: keeps its sum as it comes, undecoded.

    Attributes:
      values: the sum `(w,)` of the protected columns; None until it was opened.
    """

    binding = True
    additive = True

    def __init__(self, width: int, integers: bool) -> None:
        self._width, self.integers = width, integers
        self.values: Tensor | None = None

    def width(self, d: int) -> int:
        return self._width

    def encode(self, rows: Tensor, state: State, generators: Sequence[Generator]) -> tuple[Encoded, State]:
        return Encoded(rows, {}), state

    def decode(self, encoded: Encoded, d: int) -> Tensor:
        self.values = encoded.rows[0].double()
        return torch.zeros(1, d)


@final
class _Arriving(Exchange):
    """Takes clients' clear parts off, and hands the inner channel its own messages, as they come.

    Attributes:
      clear: numbers in the clear by client.
    """

    def __init__(self, channel: Selective, below: Exchange, width: int) -> None:
        self._channel, self._below, self._width = channel, below, width
        self.server = below.server
        self.clear: dict[int, NDArray[Any]] = {}

    def __call__(self, stage: str, requests: Mapping[int, bytes]) -> Iterator[tuple[int, bytes]]:
        for party, reply in self._below(stage, requests):
            yield party, reply if party == KEY_HOLDER else self._inner(party, stage, reply)

    def _inner(self, party: int, stage: str, reply: bytes) -> bytes:
        """The inner channel's message; empty, which it counts as broken, where anything is wrong."""
        try:
            header, parts = Link(self.server, party).open(reply)
            if len(parts) not in (1, 2):
                raise Corrupt(f"a message of {len(parts)} parts, expected the protected one and the clear one")
            whole = len(parts) == 2
            header.require(self._channel._head(stage, self._width if whole else 0, len(parts)))
            if whole:
                if party in self.clear:
                    raise Replay(f"a second clear part of client {party}")
                self.clear[party] = self._channel.values(parts[1], self._width)
        except BrokenEnvelope:
            return b""
        return parts[0]


@final
class PartlyClearView(View):
    """The sum of n rows, and some columns of each.

    Attributes:
      clear: `(n, d)` float32, what the server reads of each client's row, NaN in protected columns. Made anew whenever
        it is asked for.
    """

    def __init__(self, below: View, held: _Held, arriving: _Arriving, mask: Tensor, intake: Intake) -> None:
        self.ids, self.d, self.bad = below.ids, intake.d, below.bad
        self.client_weights, self.folded = below.client_weights, below.folded
        self._below, self._held, self._mask, self._intake = below, held, mask, intake
        self._clear = {party: arriving.clear[party] for party in below.ids if party in arriving.clear}

    @property
    def passes(self) -> float:  # type: ignore[override]  # an attribute of View
        return self._below.passes

    def total(self) -> Tensor:
        self._below.total()
        if self._held.values is None:
            return torch.zeros(self.d)
        others = np.zeros(int((~self._mask).sum()))
        for part in self._clear.values():  # in the order of ids, whatever the order of arrival
            others += part
        whole = torch.zeros(len(self._mask), dtype=torch.float64)
        whole[self._mask], whole[~self._mask] = self._held.values, torch.from_numpy(others)
        return self._intake.total(whole)

    @property
    def clear(self) -> Tensor | None:  # type: ignore[override]  # an attribute of View
        found = torch.empty(self.n, self.d)
        for place, party in enumerate(self.ids):
            row = torch.zeros(len(self._mask), dtype=torch.float64)
            if party in self._clear:
                row[~self._mask] = torch.from_numpy(self._clear[party].astype(np.float64))
            decoded = self._intake.codecs.decode(Encoded(row[None], {}), self.d)[0]
            found[place] = torch.where(self._mask, torch.nan, decoded.float())
        return found
