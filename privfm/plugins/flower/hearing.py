"""One round from what clients sent to the next model: by plain replies, or over a channel."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import final

from flwr.app import ArrayRecord, Message, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from privfm.checks import CohortTooSmall, RoundFailed
from privfm.contracts import SERVER, Outcome, Party, View
from privfm.plugins.flower.exchange import Delivery, GridExchange
from privfm.plugins.flower.identities import Parties
from privfm.plugins.flower.ledger import Ledger
from privfm.plugins.flower.records import BrokenReply, Reference
from privfm.plugins.flower.replies import Opener, Report, by_client, seen
from privfm.plugins.flower.terms import Terms


@final
@dataclass(frozen=True)
class Asked:
    """Who was sent what in the round that is under way.

    Attributes:
      grid: reaches them.
      clients: number -> node.
      reference: the model.
      content: what clients train from.
      absent: clients that were drawn and are not connected.
    """

    grid: Grid
    clients: Mapping[int, int]
    reference: Reference
    content: RecordDict
    absent: tuple[int, ...] = ()


@final
@dataclass(frozen=True)
class Heard:
    """How a round ended.

    Attributes:
      report: for the server's own eyes.
      contents: plain replies that were used; none over a channel.
      model: the next one; None where the round was skipped.
    """

    report: Report
    contents: list[RecordDict]
    model: ArrayRecord | None


def from_replies(asked: Asked, replies: Iterable[Message], terms: Terms, ledger: Ledger, weighted_by: str) -> Heard:
    """Plain arrays, or encoded ones, in Flower's own messages."""
    found, intake, layers = by_client(replies, asked.clients), ledger.intake(), asked.reference.layers

    def clip(rows: Tensor) -> Tensor:
        return ledger.clipped(rows, layers)

    opener = Opener(terms, asked.reference, intake, clip, weighted_by)
    view, broken = seen(found, opener, intake.d, intake.needs, terms.weighting == "examples")
    report = Report(
        round=ledger.round,
        asked=tuple(asked.clients),
        broken=broken,
        bad=len(broken),
        failed=found.failed,
        missing=(*found.missing, *asked.absent),
        foreign=found.foreign,
    )
    heard = _ended(asked, report, view, ledger.conclude(view))
    return replace(heard, contents=[found.good[number] for number in view.ids])


def over_channel(  # noqa: PLR0917  # who is asked, what is spoken, what is remembered, and how to reach them
    asked: Asked, nodes: Mapping[int, int], terms: Terms, ledger: Ledger, parties: Parties, timeout: float
) -> Heard:
    """All stages of a channel, one after the other."""
    server = Party(SERVER, ledger.round, parties.own, parties.public)
    channel, intake, now = terms.arm().wire, ledger.intake(), ledger.round
    exchange = GridExchange(server, Delivery(asked.grid, nodes, asked.content, channel.row_stage, timeout))
    view: View | None
    ended: Outcome | str
    try:
        view = channel.collect(list(asked.clients), intake, exchange)
        if view.n < intake.least_answers:
            raise RoundFailed(f"least_answers={intake.least_answers}: {view.n} client(s) answered; nothing is released")
        ended = ledger.conclude(view)
    except (RoundFailed, CohortTooSmall) as reason:
        view, ended = None, ledger.conclude(reason)
    report = Report(
        round=now,
        asked=tuple(asked.clients),
        bad=0 if view is None else view.bad,
        failed=tuple(sorted(exchange.failed)),
        missing=tuple(sorted({*exchange.missing, *asked.absent})),
        foreign=exchange.foreign,
    )
    heard = _ended(asked, report, view, ended)
    grouped = channel.rows(1) is not None  # rows are means of groups, and a group is nobody
    return replace(heard, report=replace(heard.report, used=(), kept=None)) if grouped else heard


def _ended(asked: Asked, report: Report, view: View | None, ended: Outcome | str) -> Heard:
    used = () if view is None else tuple(view.ids)
    if isinstance(ended, str):
        return Heard(replace(report, skipped=ended), [], None)
    kept = None if ended.kept is None else ended.kept.tolist()
    if kept is not None and len(kept) == len(used):
        report = replace(report, kept=tuple(number for number, each in zip(used, kept, strict=True) if each))
    try:
        return Heard(replace(report, used=used), [], asked.reference.moved(ended.vector))
    except BrokenReply as reason:
        return Heard(replace(report, skipped=str(reason)), [], None)
