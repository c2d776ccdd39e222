"""What does it cost that the server does not see single updates: time, bytes and error of every channel?

Every point plays one real round of the protocol, all parties in one process of its own, one after the other, with rows
of L2 norm 1 as wide as a LoRA update. Its cost is estimated first, and what does not fit into `minutes` is left out,
the dearest first.

    python -m experiments.aggregation_cost
    python -m experiments.aggregation_cost --channels '["BFV","PairwiseMasks"]' --clients "[10,100]" --minutes 5
    python -m experiments.aggregation_cost --fast

Writes `costs.json` (everything, stage by stage), `costs.csv`, `tables.md` and the figures. A hundred thousand clients
are projected, not played: see `projected`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from itertools import product
from math import ceil, floor, log2, sqrt
from pathlib import Path
from typing import Any, final

import torch
from rich.console import Console
from torch import Generator, Tensor

from privfm.checks import InvalidArgument, first_line, one_of, positive
from privfm.cli import command
from privfm.contracts import Channel, Reveals, Transform
from privfm.defenses import FixedPoint
from privfm.defenses.channels import BFV, CKKS, CKKSGram, PairwiseMasks, Plaintext, RLWEPad
from privfm.defenses.channels.pad.channel import most_bits
from privfm.defenses.privacy.distributed import DistributedNoise, rounding_bound, share_deviation, smallest_modulus_bits
from privfm.defenses.transforms import Chain
from privfm.engines import Local
from privfm.federation.rehearsal import Rehearsal, grown, in_child
from privfm.reporting import show
from privfm.reporting.aggregation_costs import Cost, figures, of, tables, write_csv, write_json

DIFFERENT = 10
"""Rows that differ; with more clients they come again."""

CORRUPT, DROPOUTS = 0.2, 0.05
"""Shares of the clients that masks assume to work with the server, and to go missing."""

CLIP_STEPS = 2**12
"""Steps of distributed noise's grid in one clip: from here on rounding costs under 1 % (see `DistributedNoise`)."""

HONEST = 0.75
"""Share of the clients whose noise has to be enough."""

BFV_BITS = 16
PROBES = (8192, 40_960)  # widths of small rounds from which the cost of a large one is estimated
PROBE_CLIENTS = 5
FEW_AND_MANY = (5, 25)  # clients of the rounds from which very many are projected
NARROW = 1000  # numbers of the rounds in which the key holder's work for each client is told from that on the sum


# ------------------------------------------------------------------------------------------------------- the channels


@final
@dataclass(frozen=True)
class Wire:
    """A channel for a number of clients and a width, with the codec before it.

    Attributes:
      channel: between clients and server.
      codec: the wire format.
      lost: stage at which a share `DROPOUTS` of the clients is lost.
      noise: deviation of a plan's noise on a coordinate of the mean, in units of an update.
      wrap: probability with which any coordinate of the sum leaves the modulus.
    """

    channel: Channel
    codec: Transform
    lost: str = ""
    noise: float = 0.0
    wrap: float | None = None

    @property
    def neighbours(self) -> int | None:
        """Of each client, in a full round; None where there are none."""
        masks = getattr(self.channel, "masks", self.channel)
        clients = self.channel.most_clients
        return masks.graph(clients).neighbours if isinstance(masks, PairwiseMasks) and clients else None

    def others(self, clients: int) -> int:
        """How many a client has to do with."""
        if self.channel.reveals is Reveals.GRAM:
            return clients
        return self.neighbours or 0

    def gone(self, clients: int) -> dict[str, frozenset[int]]:
        """Who is lost."""
        return {self.lost: frozenset(range(floor(DROPOUTS * clients)))} if self.lost else {}


Maker = Callable[[int, int, float], Wire]
"""`(clients, parameters, bound)`: the largest absolute coordinate is `bound`."""


def plain(clients: int, parameters: int, bound: float) -> Wire:
    """Nothing is hidden."""
    return Wire(Plaintext(), Chain(()))


def masks(clients: int, parameters: int, bound: float, *, active: bool = False, lost: str = "") -> Wire:
    """32 bits, at the finest resolution with which sums cannot leave them."""
    bits = (((1 << 31) - 1) // clients).bit_length() - 1
    return Wire(PairwiseMasks(clients, CORRUPT, DROPOUTS, active=active), FixedPoint(bound, bits), lost)


def bfv(clients: int, parameters: int, bound: float, *, blinded: bool = False) -> Wire:
    """Exact sums of whole numbers."""
    return Wire(BFV(clients, BFV_BITS, "blinded" if blinded else "apart"), FixedPoint(bound, BFV_BITS))


def ckks(clients: int, parameters: int, bound: float, *, exact: bool = False, public: bool = True) -> Wire:
    """Exact in steps as fine as there is room for, or approximate."""
    bits = min(31, floor(44 - log2(clients)))  # what double precision resolves
    channel = CKKS(bound, clients, bits, release="public" if public else "clients", exact_grid=exact)
    return Wire(channel, Chain(()))


def gram(clients: int, parameters: int, bound: float) -> Wire:
    """The key holder learns the geometry. Everything that the key holder and the server do about it is counted."""
    return Wire(CKKSGram(bound, gram_to_server=True), Chain(()))


def pad(clients: int, parameters: int, bound: float) -> Wire:
    """The finest resolution at which sums are exact."""
    bits = most_bits(clients)
    keys = PairwiseMasks(clients, CORRUPT, DROPOUTS, modulus_bits=16)
    return Wire(RLWEPad(clients, bits, keys, floor(CORRUPT * clients) + 2), FixedPoint(bound, bits))


def distributed(clients: int, parameters: int, bound: float, *, encrypted: bool = False) -> Wire:
    """Noise of one clip (noise multiplier 1) from `HONEST` of the clients, on masks or on BFV."""
    survivors = ceil(HONEST * clients)
    share = share_deviation(1.0, rounding_bound(CLIP_STEPS, parameters), survivors)
    bits = max(8, smallest_modulus_bits(clients, CLIP_STEPS, share, parameters))
    codec = DistributedNoise(1.0, 1 / CLIP_STEPS, 1.0, survivors, clients, bits, source="secure")
    channel = BFV(clients, bits - 1) if encrypted else PairwiseMasks(clients, CORRUPT, DROPOUTS, modulus_bits=bits)
    return Wire(channel, codec, "", share / CLIP_STEPS / sqrt(clients), codec.wrap_probability(parameters))


MAKERS: dict[str, Maker] = {
    "Plaintext": plain,
    "PairwiseMasks": masks,
    "PairwiseMasks, drop-outs": partial(masks, lost="masked"),
    "PairwiseMasks, active": partial(masks, active=True),
    "PairwiseMasks, noise": distributed,
    "RLWEPad": pad,
    "BFV": bfv,
    "BFV, blinded": partial(bfv, blinded=True),
    "BFV, noise": partial(distributed, encrypted=True),
    "CKKS, for clients": partial(ckks, public=False),
    "CKKS, flooded": ckks,
    "CKKS, exact": partial(ckks, exact=True),
    "CKKSGram": gram,
}
TITLES = tuple(MAKERS)


# ---------------------------------------------------------------------------------------------------------- the rounds


def updates(parameters: int) -> tuple[Tensor, float]:
    """Rows of L2 norm 1, float32, and their largest absolute coordinate."""
    rows = torch.randn(DIFFERENT, parameters, generator=Generator().manual_seed(0))
    rows /= rows.norm(dim=1, keepdim=True) * (1 + 1e-6)
    return rows, float(rows.abs().max())


def played(title: str, wire: Wire, clients: int, parameters: int) -> Cost:
    """One round, in a process of its own."""
    return in_child(_round, title, wire, clients, parameters)


def _round(title: str, wire: Wire, clients: int, parameters: int) -> Cost:
    rows, bound = updates(parameters)
    needs = wire.channel.reveals if wire.channel.reveals is Reveals.GRAM else Reveals.SUM
    rehearsal = Rehearsal(wire.channel, rows, wire.codec, needs, wire.gone(clients), clients)

    def finish(view: Any) -> tuple[Tensor, tuple[int, ...]]:
        if needs is Reveals.GRAM:
            view.gram(rows[:0])
        return view.total() / view.n, view.ids

    ((mean, ids), phases), memory = grown(rehearsal.play, Local(1), finish)
    exact = rehearsal.exact_mean(ids)
    miss = mean.double() - exact
    return Cost(
        title,
        clients,
        parameters,
        client_seconds=phases.client_seconds,
        server_seconds=phases.server_seconds,
        key_holder_seconds=phases.key_holder_seconds,
        up=phases.up,
        down=phases.down,
        largest_error=float(miss.abs().max()) / bound,
        deviation=float(miss.square().mean().sqrt()) / bound,
        relative_error=float(miss.norm() / exact.norm()),
        noise=wire.noise / bound,
        wrap=wire.wrap,
        memory=memory,
        neighbours=wire.neighbours,
        stages=tuple(asdict(phase) for phase in phases.all),
    )


def wire_of(title: str, clients: int, parameters: int) -> Wire | str:
    """A channel for this size, or why there is none."""
    try:
        return MAKERS[title](clients, parameters, largest(parameters))
    except InvalidArgument as error:
        return first_line(error)


@lru_cache
def largest(parameters: int) -> float:
    """Absolute coordinate of the rows of this width."""
    return updates(parameters)[1]


# ---------------------------------------------------------------------------------------------- estimates, projections


@final
@dataclass(frozen=True)
class Rate:
    """What a round costs: `n (a + b d + k (e + f d))` seconds, where a client has to do with k others.

    Those are its neighbours under masks, all clients where inner products are taken, and else nobody.

    Attributes:
      client: a.
      number: b.
      other: e.
      other_number: f.
    """

    client: float
    number: float
    other: float = 0.0
    other_number: float = 0.0

    def estimate(self, wire: Wire, clients: int, parameters: int) -> float:
        """Seconds of a round."""
        others = self.other + self.other_number * parameters
        return clients * (self.client + self.number * parameters + wire.others(clients) * others)


def rate_of(title: str, widths: tuple[int, int]) -> Rate:
    """From four small rounds."""
    small, wide = widths
    few, many = PROBE_CLIENTS, 2 * PROBE_CLIENTS
    lines = []
    for clients in (few, many):
        low, high = (measured(Cost(title, clients, width)).seconds / clients for width in widths)
        number = max((high - low) / (wide - small), 0.0)
        lines.append((max(low - number * small, 0.0), number))
    wires = wire_of(title, few, small), wire_of(title, many, small)
    k, more = (0 if isinstance(wire, str) else wire.others(n) for wire, n in zip(wires, (few, many), strict=True))
    if more == k:
        return Rate(*lines[0])
    other, other_number = (max((b - a) / (more - k), 0.0) for a, b in zip(*lines, strict=True))
    client, number = lines[0]
    return Rate(max(client - k * other, 0.0), max(number - k * other_number, 0.0), other, other_number)


def planned(rates: Mapping[str, Rate], clients: Sequence[int], sizes: Sequence[int], minutes: float) -> list[Cost]:
    """Every point with its estimate, cheapest first; those beyond the minutes are left out."""
    points = []
    for title, rate in rates.items():
        for n, d in product(clients, sizes):
            wire = wire_of(title, n, d)
            if isinstance(wire, str):
                points.append(Cost(title, n, d, "refused", wire))
            else:
                points.append(Cost(title, n, d, estimate=rate.estimate(wire, n, d), neighbours=wire.neighbours))
    points.sort(key=lambda point: point.estimate or 0.0)
    spent, found = 0.0, []
    for point in points:
        spent += point.estimate or 0.0
        fits = spent <= 60 * minutes or point.kind == "refused"
        why = f"estimated {point.estimate or 0.0:.0f} s; cheaper rounds filled the {minutes:g} minutes"
        found.append(point if fits else replace(point, kind="left out", why=why))
    return found


def with_neighbours(channel: Channel, count: int) -> Channel:
    """The same masks among fewer clients, each with as many neighbours as among all."""
    if isinstance(channel, RLWEPad):
        return replace(channel, masks=replace(channel.masks, neighbours=count))
    assert isinstance(channel, PairwiseMasks)  # nobody else has any
    return replace(channel, neighbours=count)


def projected(title: str, clients: int, parameters: int) -> Cost:
    """A round of very many clients, from small rounds of the channel made for so many.

    | what                                  | how                                                                     |
    |---------------------------------------|-------------------------------------------------------------------------|
    | a client's time, what it sends, gets  | measured, with the keys, the ring and the neighbours of the large round |
    | the server's time                     | on the line through two small rounds, each the shorter of two           |
    | the key holder's, for a public sum    | measured: it opens one sum, whoever is in it                            |
    | the key holder's, for clients         | and what it does for each of them, on the line through narrow rounds    |
    | errors, memory                        | not projected                                                           |
    """
    wire = wire_of(title, clients, parameters)
    if isinstance(wire, str):
        return Cost(title, clients, parameters, "refused", wire)
    neighbours = wire.neighbours
    if wire.channel.reveals is Reveals.GRAM:
        return Cost(title, clients, parameters, "refused", "inner products are as many as pairs of clients")
    if neighbours == clients - 1:
        return Cost(title, clients, parameters, "refused", "everybody is everybody's neighbour: not linear in clients")
    few, many = FEW_AND_MANY
    if neighbours is not None:
        wire = replace(wire, channel=with_neighbours(wire.channel, neighbours))
        least = max(neighbours + 4, getattr(wire.channel, "smallest_release", 0))
        few, many = (20 * ceil(least / 20) + more for more in (0, 20))  # so that drop-outs are a whole number
    small, found = (shorter(title, wire, n, parameters) for n in (few, many))
    each = (seconds(found, "server") - seconds(small, "server")) / (many - few)
    holder = 0.0
    if not wire.channel.server_learns_sum:
        thin = wire_of(title, clients, NARROW)  # short rows of norm 1 have larger coordinates
        assert isinstance(thin, Wire)
        narrow = [seconds(shorter(title, thin, n, NARROW), "key_holder") for n in (few, many)]
        holder = (narrow[1] - narrow[0]) / (many - few)
    among = f"among {many} clients" + ("" if neighbours is None else f" with {neighbours} neighbours each")
    return replace(
        found,
        clients=clients,
        kind="projected",
        why=f"client: measured {among}; server: on the line through {few} and {many} clients",
        server_seconds=seconds(found, "server") + each * (clients - many),
        key_holder_seconds=seconds(found, "key_holder") + holder * (clients - many),
        largest_error=None,
        deviation=None,
        relative_error=None,
        memory=None,
        stages=(),
    )


def shorter(title: str, wire: Wire, clients: int, parameters: int) -> Cost:
    """The shorter of two rounds: what else the machine does only ever lengthens one."""
    return min((played(title, wire, clients, parameters) for _ in range(2)), key=lambda cost: cost.seconds)


def seconds(cost: Cost, role: str) -> float:
    """Of the server or the key holder."""
    return float(getattr(cost, f"{role}_seconds") or 0.0)


# ------------------------------------------------------------------------------------------------------ the experiment


def main(
    *,
    clients: tuple[int, ...] = (5, 20, 50, 200),
    sizes: tuple[int, ...] = (10_000, 100_000, 1_000_000, 3_000_000),
    channels: tuple[str, ...] = TITLES,
    minutes: float = 15.0,
    projection: tuple[int, int] = (100_000, 1_000_000),
    out: Path = Path("runs/aggregation_cost"),
    fast: bool = False,
) -> None:
    """Measures, projects, prints the tables and draws the figures.

    Args:
      clients: of a round.
      sizes: parameters of an update; LoRA trains ten thousand to three million of a model.
      channels: titles of those that are played.
      minutes: of the processor for all rounds of the grid; the projection takes ten more.
      projection: clients and parameters of the projected rounds.
      out: folder.
      fast: a small version that shows that everything runs; its numbers mean nothing.
    """
    for title in channels:
        one_of("channels", title, TITLES)
    positive("minutes", minutes)
    widths = PROBES
    if fast:
        clients, sizes, projection, minutes, widths = (5, 8), (300, 1000), (100, 1000), 0.1, (200, 800)
    console = Console()
    rates = {title: rate_of(title, widths) for title in channels}
    points = planned(rates, clients, sizes, minutes)
    kept = of(points, "measured")
    total = sum(point.estimate or 0.0 for point in kept)
    console.print(f"{len(kept)} of {len(points)} rounds, estimated {total / 60:.1f} minutes", highlight=False)
    costs = [point for point in points if point.kind != "measured"]
    for point in kept:
        costs.append(measured(point))
        write_json(costs, out)
        said = f"{point.channel} n={point.clients} d={point.parameters}: estimated {point.estimate:.2g} s"
        console.print(f"{said}, took {costs[-1].seconds:.2g} s", soft_wrap=True, highlight=False)
    costs += [projected(title, *projection) for title in channels]
    write_json(costs, out)
    write_csv(costs, out)
    found = tables(costs, TITLES)
    (out / "tables.md").write_text("\n".join(f"## {table.title}\n\n{table.markdown()}" for table in found))
    for name, panel in figures(costs, TITLES).items():
        (out / f"{name}.svg").write_text(panel.standalone())
    show(found, console)
    console.print(f"written: {out}", soft_wrap=True)


def measured(point: Cost) -> Cost:
    """A planned point, played."""
    wire = wire_of(point.channel, point.clients, point.parameters)
    if isinstance(wire, str):
        return replace(point, kind="refused", why=wire)
    return replace(played(point.channel, wire, point.clients, point.parameters), estimate=point.estimate)


if __name__ == "__main__":
    command(main)
