"""Replies of one round as a view that rules understand. What is broken is left out and counted; nothing is repaired."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Final, final

import torch
from flwr.app import Array, Message, RecordDict
from torch import Tensor

from privfm.blocks import finite
from privfm.checks import require
from privfm.contracts import Encoded, Intake, MatrixView, Reveals, View
from privfm.defenses.views import SumView
from privfm.plugins.flower.records import BrokenReply, Fault, Reference, entry, read
from privfm.plugins.flower.terms import Terms

ENCODED: Final = "privfm.encoded"
"""Name of the record that takes the model's place in a reply that is encoded."""

SPOKEN: Final = "privfm.codec"
"""Name of the record that says how."""

_ROWS, _SIDE = "rows", "side/"


@final
@dataclass(frozen=True)
class Report:
    """What became of one round, for the server's own eyes: under a plan no part of this is covered by its guarantee.

    Attributes:
      round: as this project counts, from 0.
      asked: clients that were sent the model.
      used: clients whose updates the rule saw; none where a channel reveals means of groups.
      broken: client -> what is wrong with its reply, where replies are plain.
      bad: how many rows were left out as broken; they count against a rule's f.
      failed: clients that answered with an error.
      missing: clients that did not answer, or were drawn and are not connected.
      foreign: replies of nodes that were not asked.
      kept: clients with a weight above zero; None where the rule gives no weights, or a channel hides them.
      skipped: why the model stayed as it was; empty where it moved.
    """

    round: int
    asked: tuple[int, ...] = ()
    used: tuple[int, ...] = ()
    broken: Mapping[int, Fault] = field(default_factory=dict)
    bad: int = 0
    failed: tuple[int, ...] = ()
    missing: tuple[int, ...] = ()
    foreign: int = 0
    kept: tuple[int, ...] | None = None
    skipped: str = ""


@final
@dataclass(frozen=True)
class Sorted:
    """Replies by client, in the order of clients, however they came.

    Attributes:
      good: client -> content.
      broken: client -> fault.
      failed: clients that answered with an error.
      missing: clients that did not answer.
      foreign: replies of nodes that were not asked.
    """

    good: dict[int, RecordDict]
    broken: dict[int, Fault]
    failed: tuple[int, ...]
    missing: tuple[int, ...]
    foreign: int


def by_client(replies: Iterable[Message], clients: Mapping[int, int]) -> Sorted:
    """Sorts replies.

    A node that answers twice with the same content is heard once; one that says two things is heard in neither, or
    the order of arrival would decide which of them counts.

    Args:
      replies: as they came.
      clients: number -> node, of those that were asked.
    """
    numbers, foreign = {node: number for number, node in clients.items()}, 0
    heard: dict[int, list[Message]] = defaultdict(list)
    for reply in replies:
        number = numbers.get(reply.metadata.src_node_id)
        if number is None:
            foreign += 1
        else:
            heard[number].append(reply)
    good: dict[int, RecordDict] = {}
    broken: dict[int, Fault] = {}
    failed = []
    for number in sorted(heard):
        first, *others = heard[number]
        if any(_content(other) != _content(first) for other in others):
            broken[number] = "repeated"
        elif first.has_error():
            failed.append(number)
        else:
            good[number] = first.content
    missing = tuple(number for number in sorted(clients) if number not in heard)
    return Sorted(good, broken, tuple(failed), missing, foreign)


def _content(reply: Message) -> str:
    """A name for what a reply says."""
    return f"error {reply.error.code}" if reply.has_error() else reply.content.object_id


@final
class Opener:
    """Turns one client's reply into its update `(d,)`, or says why not.

    Args:
      terms: what both sides speak.
      reference: the model of the round.
      intake: decodes, and clips again to the plan's bound.
      clip: of the plan, for this round; the identity without one.
      weighted_by: key of a client's count of examples.
    """

    def __init__(
        self, terms: Terms, reference: Reference, intake: Intake, clip: Callable[[Tensor], Tensor], weighted_by: str
    ) -> None:
        self._terms, self._reference, self._intake, self._clip = terms, reference, intake, clip
        self._weighted_by = weighted_by

    def row(self, content: RecordDict) -> Tensor:
        """The update, `(d,)` float32, finite, decoded, and no longer than the plan allows.

        Raises:
          BrokenReply: it cannot be used.
        """
        if len(content.array_records) != 1:
            raise BrokenReply("records", f"{len(content.array_records)} records of arrays, expected one")
        name, arrays = next(iter(content.array_records.items()))
        codec = self._terms.codec
        if (codec is not None) != (name == ENCODED):
            spoken = "an encoded row" if name == ENCODED else "plain arrays"
            raise BrokenReply("codec", f"{spoken}, and the codec is {codec}")
        row = self._reference.update_of(arrays) if codec is None else self._decoded(content, arrays)
        if not bool(finite(row[None])):
            raise BrokenReply("values", "the update is not finite")
        return self._intake.row(Encoded(self._clip(row[None]), {})) if codec is None else self._clip(row[None])[0]

    def _decoded(self, content: RecordDict, arrays: Mapping[str, Array]) -> Tensor:
        said = entry(content, SPOKEN, "codec")
        if said != repr(self._terms.codec):
            raise BrokenReply("codec", f"encoded by {said!r}, and the codec is {self._terms.codec!r}")
        tensors = {key: read(key, array) for key, array in arrays.items()}
        rows = tensors.pop(_ROWS, None)
        if rows is None or rows.shape != (1, self._intake.width) or not all(key.startswith(_SIDE) for key in tensors):
            raise BrokenReply("records", "an encoded reply holds one row and its side information, and nothing else")
        side = {key.removeprefix(_SIDE): value for key, value in tensors.items()}
        try:
            row = self._intake.row(Encoded(rows if rows.is_floating_point() else rows.double(), side))
        except Exception as error:  # a codec meets whatever a client chose to send
            raise BrokenReply("codec", f"it cannot be decoded: {type(error).__name__}") from error
        if row.shape != (self._intake.d,) or row.dtype != torch.float32:
            raise BrokenReply("codec", f"it decodes to {row.dtype} {tuple(row.shape)}")
        return row

    def count(self, content: RecordDict) -> float:
        """How many examples count for a client: what it claims, up to the cap; 1 where all count the same.

        Raises:
          BrokenReply: no claim, several, or one that is no positive number.
        """
        cap = self._terms.count_cap
        if cap is None:
            return 1.0
        claims = [each[self._weighted_by] for each in content.metric_records.values() if self._weighted_by in each]
        if len(claims) != 1 or not isinstance(claims[0], int | float) or not isfinite(claims[0]) or claims[0] <= 0:
            raise BrokenReply("count", f"{self._weighted_by} is {claims}, expected one positive number")
        return min(float(claims[0]), float(cap))


def encoded_record(encoded: Encoded, whole: int | None) -> dict[str, Array]:
    """What `Opener` decodes.

    Args:
      encoded: one row `(1, w)` and its side information.
      whole: largest absolute value, where rows are whole numbers: they travel in the narrowest type that holds it.
    """
    rows = encoded.rows
    if whole is not None and bool(rows.isfinite().all()):
        types = (torch.int8, torch.int16, torch.int32, torch.int64)
        rows = rows.to(next(kind for kind in types if whole <= torch.iinfo(kind).max))
    found = {_ROWS: Array(rows.detach().cpu().contiguous().numpy())}
    side = {_SIDE + name: Array(value.detach().cpu().contiguous().numpy()) for name, value in encoded.side.items()}
    return found | side


def seen(sorted_: Sorted, opener: Opener, d: int, needs: Reveals, weighted: bool) -> tuple[View, dict[int, Fault]]:
    """What a rule may look at, rows in the order of clients, and who was left out.

    A rule that needs the sum costs one float64 row of memory, any other one float32 matrix.

    Args:
      sorted_: replies by client; broken ones count as bad already.
      opener: of this round.
      d: width of a row as the rule sees it.
      needs: of the rule.
      weighted: clients count by their examples.
    """
    broken, ids, counts = dict(sorted_.broken), list[int](), list[float]()
    needs = Reveals.EACH if weighted else needs
    total = torch.zeros(d, dtype=torch.float64)  # rounding to float32 hides in which order rows were added
    rows = torch.empty(len(sorted_.good) if needs > Reveals.SUM else 0, d)
    for number, content in sorted_.good.items():
        try:
            count, row = opener.count(content), opener.row(content)
        except BrokenReply as reason:
            broken[number] = reason.fault
            continue
        if needs > Reveals.SUM:
            rows[len(ids)] = row
        else:
            total += row
        ids.append(number)
        counts.append(count)
    require(len(set(ids)) == len(ids), "two replies of one client")  # `by_client` sees to it
    if needs is Reveals.SUM:
        return SumView(total.float, tuple(ids), d, len(broken)), broken
    weights = torch.tensor(counts, dtype=torch.float64) if weighted else None
    return MatrixView(rows[: len(ids)], ids, weights, left_out=len(broken)), broken
