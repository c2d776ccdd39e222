"""A curious server in a run: every round it asks of candidate examples whose update they are behind."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from privfm.adapters import AdapterLayout
from privfm.attacks.membership.across_rounds import FedMIA, UpdateTraces
from privfm.attacks.membership.curves import auc
from privfm.attacks.membership.updates import Losses, cosine_scores, gradient_blocks
from privfm.attacks.reconstruction.curious_server import received
from privfm.checks import InvalidArgument, at_least, require
from privfm.contracts.attacks import ServerAttack, ServerScene
from privfm.contracts.channels import WireView
from privfm.contracts.learning import Examples
from privfm.contracts.membership import Array, Flags, Scored
from privfm.contracts.privacy import Spans
from privfm.vectors import Layout

STRANGER = -1
"""Owner of an example that nobody trains on."""


@final
@dataclass(frozen=True)
class Candidates:
    """Examples that a server asks about, and the truth it is scored with.

    Attributes:
      gradients: a model `(d,)` -> gradients of all candidates at it, in order, `(k, d)` at a time.
      owners: `(n,)`, the client that trains on each, or `STRANGER`.

    Raises:
      InvalidArgument: no owner, or no stranger: there is nothing to tell apart.
    """

    gradients: Callable[[Tensor], Iterable[Tensor]] = field(repr=False)
    owners: NDArray[np.int64] = field(repr=False)

    def __post_init__(self) -> None:
        require(self.owners.ndim == 1, f"owners {self.owners.shape}: expected (n,)")
        both = bool((self.owners == STRANGER).any()) and bool((self.owners >= 0).any())
        require(both, f"owners: expected some clients and some {STRANGER}, examples of the same kind that nobody has")

    @classmethod
    def of(
        cls,
        load: Callable[[Tensor], nn.Module],
        layout: Layout,
        losses: Losses,
        held: Mapping[int, Examples],
        block: int,
    ) -> Candidates:
        """From examples, with one backward pass for each in every round.

        Args:
          load: a model `(d,)` -> the module, without dropout.
          layout: where parameters lie in a row.
          losses: what clients minimise the mean of.
          held: examples by client; those of `STRANGER` are nobody's.
          block: gradients held at once.
        """

        def gradients(model: Tensor) -> Iterable[Tensor]:
            module = load(model)
            return (rows for some in held.values() for rows in gradient_blocks(module, layout, losses, some, block))

        return cls(gradients, np.repeat(np.array(list(held), dtype=np.int64), [len(some) for some in held.values()]))


@final
@dataclass(frozen=True)
class MembershipServer(ServerAttack):
    """Asks in every round, of some examples of clients and of some strangers, whose update each is behind.

    See `SeatedMembership` for what it records.

    Cost: a backward pass for each candidate and round.

    Args:
      clients: of whose examples it knows some; the first ones.
      each: examples of each of them, at most.
      strangers: examples that nobody trains on, from the holdout split.
      rounds: in which it looks, from 0; None: in all.
      fedmia: how rounds are compared and combined; None: as published.
      block: gradients held at once.
    """

    clients: int = 20
    each: int = 4
    strangers: int = 100
    rounds: tuple[int, ...] | None = None
    fedmia: FedMIA | None = None
    block: int = 64

    def __post_init__(self) -> None:
        for name in ("clients", "each", "strangers", "block"):
            at_least(name, getattr(self, name), 1)

    def fitted(self, scene: ServerScene) -> ServerAttack:
        losses, strangers, adapters = scene.losses, scene.strangers, scene.adapters
        require(
            losses is not None and strangers is not None and len(strangers) > 0,
            "strangers: the run holds no examples that nobody trains on; give the split `holdout` a share",
        )
        assert losses is not None and strangers is not None
        known = range(min(self.clients, scene.clients))
        held = {client: _first(scene.examples(client), self.each) for client in known}
        candidates = Candidates.of(
            scene.load, scene.layout, losses, held | {STRANGER: _first(strangers, self.strangers)}, self.block
        )
        return SeatedMembership(
            candidates,
            scene.clients,
            first_coordinates=None if adapters is None else _but_a(adapters),
            rounds=self.rounds,
            fedmia=self.fedmia,
        )

    def look(self, wire: WireView, model: Tensor, now: int) -> dict[str, float]:
        raise InvalidArgument("a MembershipServer remembers its run's rounds: call fitted(scene) first")


def _but_a(adapters: AdapterLayout) -> Spans:
    """All columns but those of A, which has no gradient while B is zero; see `adapter_spans`."""
    return tuple(sorted([*adapters.plain, *(pair.span_b for pair in adapters.pairs)]))


def _first(examples: Examples, count: int) -> Examples:
    return examples.take(torch.arange(min(count, len(examples))))


@final
class SeatedMembership(ServerAttack):
    """Scores candidates by their gradients' cosine with what the channel reveals, and across rounds by FedMIA.

    Rows are changes of weights, as everywhere in a run; what is NaN in them is not seen. Names in the record, only
    where there is something to tell apart; an AUC pools (client, example) pairs, strangers against

    | name               | members                                                                               |
    |--------------------|---------------------------------------------------------------------------------------|
    | `auc`              | the client's own examples, this round's cosines alone; rows opened                    |
    | `auc_foreign`      | examples of others in the cohort: a control, 0.5 but for likeness of clients' data    |
    | `auc_fedmia`       | own examples, over all rounds so far                                                  |
    | `attributed`       | (share) of members' examples whose owner has the largest cosine; chance is 1/cohort   |
    | `auc_sum`          | examples of anybody in the cohort, from the sum alone; where rows are not opened      |

    Which batches a client drew is not known: examples it holds and did not reach in its local steps count as members.
    A resumed run starts with no rounds remembered.

    Args:
      candidates: what it asks about.
      clients: in the population, numbered from 0.
      coordinates: columns that count; None: all. See `adapter_spans`.
      first_coordinates: in round 0, where an adapter's A has no gradient; None: as in the others.
      rounds: in which it looks, from 0; None: in all.
      fedmia: how rounds are compared and combined.

    Attributes:
      traces: cosines so far, `(rounds, clients, n)`, of rounds in which rows were opened.
    """

    def __init__(
        self,
        candidates: Candidates,
        clients: int,
        *,
        coordinates: Spans | None = None,
        first_coordinates: Spans | None = None,
        rounds: tuple[int, ...] | None = None,
        fedmia: FedMIA | None = None,
    ) -> None:
        at_least("clients", clients, 1)
        largest = int(candidates.owners.max())
        require(largest < clients, f"an example is client {largest}'s, of {clients} clients from 0")
        self._candidates, self._rounds = candidates, rounds
        self._coordinates, self._first = coordinates, first_coordinates
        self._fedmia = FedMIA() if fedmia is None else fedmia
        self.traces = UpdateTraces(clients, len(candidates.owners))

    def look(self, wire: WireView, model: Tensor, now: int) -> dict[str, float]:
        owners = self._candidates.owners
        held = [(ids, row) for ids, row in received(wire) if bool(row.isfinite().any())]
        if not held or (self._rounds is not None and now not in self._rounds):
            return {}
        spans = self._first if now == 0 and self._first is not None else self._coordinates
        changes = torch.stack([row for _, row in held])
        scores = cosine_scores(-changes, self._candidates.gradients(model), spans)
        require(scores.shape[1] == len(owners), f"{scores.shape[1]} gradients of {len(owners)} candidates")
        strangers = owners == STRANGER
        if wire.rows is None:
            return _areas({"auc_sum": (scores[:1], np.isin(owners, held[0][0])[None])}, strangers)
        ids = np.array([ids[0] for ids, _ in held])
        self.traces.add(ids.tolist(), scores)
        own = owners == ids[:, None]
        foreign = np.isin(owners, ids) & ~own
        found = _areas({"auc": (scores, own), "auc_foreign": (scores, foreign)} | self._across_rounds(), strangers)
        present = own.any(0)
        if bool(present.any()) and len(ids) > 1:
            found["attributed"] = float((ids[scores[:, present].argmax(0)] == owners[present]).mean())
        return found

    def _across_rounds(self) -> dict[str, tuple[Array, Flags]]:
        """FedMIA's scores of every client that can be compared with others."""
        owners, traces = self._candidates.owners, self.traces.scores
        taken = ~np.isnan(traces[:, :, 0])
        able = (taken & (taken.sum(1) >= 3)[:, None]).any(0).nonzero()[0]
        if not len(able):
            return {}
        scores = np.stack([self._fedmia(traces, int(client)) for client in able])
        return {"auc_fedmia": (scores, owners == able[:, None])}


def _areas(asked: Mapping[str, tuple[Array, Flags]], strangers: Flags) -> dict[str, float]:
    """AUC of members against strangers, by name, of pairs that are either."""
    found = {}
    for name, (scores, members) in asked.items():
        pairs = members | strangers
        if bool(members.any()):
            found[name] = auc(Scored(scores[pairs], members[pairs]))
    return found
