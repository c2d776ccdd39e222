"""Rows in the clear: what every other channel is measured against."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from secrets import token_bytes
from typing import final

import torch
from torch import Tensor

from privfm.blocks import finite
from privfm.checks import BrokenEnvelope
from privfm.contracts import (
    SERVER,
    Channel,
    Encoded,
    Exchange,
    Intake,
    MatrixView,
    Memory,
    Party,
    Reveals,
    Update,
    View,
)
from privfm.defenses.channels.envelope import Header, Link
from privfm.defenses.views import SumView

_SIDE = "side/"
_ASKED = Header("plain", stage="ask")
_HEAD = Header("plain", stage="update", parts=1, clients=1)


@final
@dataclass(frozen=True)
class Plaintext(Channel):
    """Every client sends its row, and its side information, as safetensors bytes; the server sees all of it.

    | reply                                             | result                           |
    |---------------------------------------------------|----------------------------------|
    | none                                              | a drop-out                       |
    | changed, replayed, second, not from this client   | left out and counted in `bad`    |
    | unparsable, wrong keys, width or type, not finite | left out and counted in `bad`    |
    | longer than the plan's clip                       | clipped again (`intake.row`)     |

    Messages are authenticated, not encrypted: whoever listens on the way reads them, too. The server's request holds
    16 random bytes which the reply repeats: a run that is resumed plays a round again, and takes no reply from before.

    Cost: 4 bytes a parameter and client. A rule that needs only the sum costs one float64 row of server memory,
    whatever the cohort: rows are added as they come. Any other rule costs n float32 rows.
    """

    reveals = Reveals.EACH
    client_stages = ("update",)

    @property
    def learns(self) -> Mapping[str, str]:
        return {
            "server": "every update, and who took part",
            "clients": "the released model",
            "trust": "the server",
        }

    def reply(self, party: Party, stage: str, memory: Memory, request: bytes, update: Update) -> tuple[Memory, bytes]:
        link = Link(party, SERVER)
        asked, _ = link.open(request)
        asked.require(replace(_ASKED, key=asked.key))
        encoded = update()
        head = replace(_HEAD, key=asked.key, length=encoded.rows.shape[1], weight=encoded.weight)
        return memory, link.seal(head, [packed(encoded)])

    def collect(self, cohort: Sequence[int], intake: Intake, exchange: Exchange) -> View:
        asked = replace(_ASKED, key=token_bytes(16))
        requests = {party: Link(exchange.server, party).seal(asked, []) for party in cohort}
        replies = _opened(exchange("update", requests), asked.key, intake, exchange.server, requests)
        return _sum(replies, intake.d) if intake.needs == Reveals.SUM else _matrix(replies, cohort, intake.d)


def packed(encoded: Encoded) -> bytes:
    """One client's row `(1, w)` and side information as safetensors bytes."""
    from safetensors.torch import save

    tensors = {"rows": encoded.rows, **{_SIDE + name: value for name, value in encoded.side.items()}}
    return save({name: value.detach().cpu().contiguous() for name, value in tensors.items()})


def unpacked(message: bytes, width: int) -> Encoded:
    """The inverse of `packed`.

    Args:
      message: what a client sent.
      width: columns its row must have on the wire.

    Raises:
      BrokenEnvelope: the message is no safetensors file, or holds anything but one row and side information.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(message)
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise BrokenEnvelope(f"an update of {len(message)} bytes is no safetensors file: {error}") from error
    rows = tensors.pop("rows", None)
    if rows is None or rows.shape != (1, width):
        raise BrokenEnvelope(f"rows of shape {None if rows is None else tuple(rows.shape)}, expected (1, {width})")
    foreign = [name for name in tensors if not name.startswith(_SIDE)]
    if foreign:
        raise BrokenEnvelope(f"an update holds {', '.join(sorted(foreign))} besides rows and side information")
    return Encoded(rows, {name.removeprefix(_SIDE): value for name, value in tensors.items()})


def _opened(
    replies: Iterator[tuple[int, bytes]], session: bytes, intake: Intake, server: Party, cohort: Iterable[int]
) -> Iterator[tuple[int, Tensor | None]]:
    """Each reply as a finite float32 row `(d,)`, or None."""
    awaited = set(cohort)
    for party, reply in replies:
        if party not in awaited:  # a second message, or of somebody who was not asked
            yield party, None
            continue
        awaited.discard(party)
        try:
            head = replace(_HEAD, key=session, length=intake.width, weight=intake.weights.get(party, 1.0))
            (content,) = Link(server, party).expect(reply, head)
            row = intake.row(unpacked(content, intake.width))
        except Exception:  # a codec meets whatever a client chose to send: missing names, indices out of range ...
            yield party, None
            continue
        usable = row.dtype == torch.float32 and row.shape == (intake.d,) and bool(finite(row[None]))
        yield party, row if usable else None


def _sum(replies: Iterator[tuple[int, Tensor | None]], d: int) -> View:
    # float64, because float32 would let the order of arrival show in the last bits of the sum
    total = torch.zeros(d, dtype=torch.float64)
    ids: list[int] = []
    bad = 0
    for party, row in replies:
        if row is None:
            bad += 1
        else:
            total += row
            ids.append(party)
    return SumView(total.float, tuple(sorted(ids)), d, bad)


def _matrix(replies: Iterator[tuple[int, Tensor | None]], cohort: Sequence[int], d: int) -> View:
    order = {party: place for place, party in enumerate(sorted(cohort))}
    rows = torch.empty(len(cohort), d)  # filled as replies come: one matrix and one row at a time
    arrived: list[int] = []
    bad = 0
    for party, row in replies:
        if row is None:
            bad += 1
        else:
            rows[order[party]] = row
            arrived.append(party)
    arrived.sort()
    if len(arrived) < len(cohort):
        rows = rows[[order[party] for party in arrived]]
    return MatrixView(rows, arrived, left_out=bad)
