"""Encrypted and masked sums beside TenSEAL at NVFlare's and at its tutorial's parameters.

`python -m benchmarks.encryption [--quick]` prints JSON lines. Every channel plays its real protocol, all parties in one
process, one after the other: keys, envelopes, codes and canaries are in its numbers and not in the peers'.

| metric           | ours, theirs                                                                     | ratio         |
|------------------|----------------------------------------------------------------------------------|---------------|
| time             | seconds a client costs: all of its own work, and its share (one of n) of what    | theirs / ours |
|                  | server and key holder do in the round; the peers': encrypt, serialise, parse,    |               |
|                  | add, decrypt                                                                     |               |
| client time      | seconds of one client, with the codec before the channel; the peers': encrypt,   | theirs / ours |
|                  | serialise, decrypt                                                               |               |
| server time      | seconds of the server for each client; the peers': parse, add                    | theirs / ours |
| key holder time  | seconds a round; the peers have none, as each client holds the key               | none          |
| bytes            | what a client sends, for each parameter                                          | theirs / ours |
| largest error    | of a coordinate of the mean, over the bound B of coordinates                     | theirs / ours |
| error deviation  | standard deviation of that error, over B                                         | theirs / ours |
| relative error   | L2 norm of the error over that of the mean                                       | theirs / ours |
| memory           | bytes the process grew by in one round, in a forked child that plays everybody   | theirs / ours |

Distances of encrypted rows follow: see `benchmarks.encrypted_distances`.

All parties share a process, so that a public key is parsed once for all clients.
Seconds are those of the processor, with one thread, medians over interleaved turns. Rows are Gaussian, divided by their
largest coordinate: B = 1.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from statistics import median
from typing import Any, final

import torch
from torch import Generator, Tensor

from benchmarks.encrypted_distances import lines as distances
from benchmarks.encryption_peers import PEERS, Measured
from benchmarks.timing import growth, line, reason, write
from privfm.contracts import Channel, Transform
from privfm.defenses import FixedPoint
from privfm.defenses.channels import BFV, CKKS, CKKSGram, PairwiseMasks, Plaintext, RLWEPad
from privfm.defenses.channels.pad.channel import most_bits
from privfm.defenses.transforms import Chain
from privfm.engines import Local
from privfm.federation.rehearsal import Rehearsal

CLIENTS, WIDTH, TURNS = 10, 1_000_000, 3
QUICK_WIDTH = 8192
PARTS = ("sums", "distances")
QUICK_MOST = 20  # clients of any row
QUICK_CLIENTS = 7  # whose distances are taken; the fewest for Krum with f = 2
PRODUCTS = 5  # measured without a sketch, of 55; the rest would take minutes
COHORTS, COHORT_WIDTH = 20, 50_000  # whose choices are compared
WARM = 1000  # parameters of an unmeasured round before several others, in which libraries are loaded
BOUND = 1.0
NO_KEY_HOLDER = "every client holds the key"
UNITS = {
    "time": "s a client",
    "client time": "s a client",
    "server time": "s a client",
    "bytes": "bytes a parameter",
    "largest error": "over B",
    "error deviation": "over B",
    "relative error": "relative",
}

Theirs = tuple[dict[str, float] | None, str]
"""What a peer measured by metric, or why there is nothing."""


@final
@dataclass(frozen=True)
class Row:
    """One of ours, and what is aimed for.

    Attributes:
      channel: for a number of clients.
      codec: before it, for a number of clients.
      clients: n.
      faster: least ratio of NVFlare's time to ours.
      limits: most that is aimed for, by metric.
    """

    channel: Callable[[int], Channel]
    codec: Callable[[int], Transform] = lambda n: Chain(())
    clients: int = CLIENTS
    faster: float | None = None
    limits: Mapping[str, float] = field(default_factory=dict)

    def play(self, rows: Tensor) -> Measured:
        """One round."""
        n = self.clients
        rehearsal = Rehearsal(self.channel(n), rows, self.codec(n), clients=n)
        total, phases = rehearsal.play(Local(1), lambda view: view.total())
        return Measured(
            phases.client_seconds,
            phases.server_seconds,
            phases.key_holder_seconds,
            phases.up,
            total.double() / n,
            n,
        )


def mask_bits(n: int) -> int:
    """Finest resolution with which sums of n clients cannot leave 32 bits."""
    return (((1 << 31) - 1) // n).bit_length() - 1


def masked(n: int) -> Transform:
    """What goes before masks of 32 bits."""
    return FixedPoint(BOUND, mask_bits(n))


def pad(n: int) -> Channel:
    """The finest exact one."""
    return RLWEPad(n, most_bits(n), PairwiseMasks(n, modulus_bits=16), smallest_release=n // 2)


BFV_BITS = 16
ROWS: Mapping[str, Row] = {
    "Plaintext": Row(lambda n: Plaintext()),
    "CKKS, sum for clients": Row(
        lambda n: CKKS(BOUND, n, release="clients", exact_grid=False),
        faster=1 / 0.7,
        limits={"bytes": 17.0, "largest error": 1e-5, "error deviation": 1.5e-6},
    ),
    "CKKS, flooded": Row(lambda n: CKKS(BOUND, n, exact_grid=False)),
    "CKKS, exact grid": Row(lambda n: CKKS(BOUND, n)),
    "BFV": Row(lambda n: BFV(n, BFV_BITS), lambda n: FixedPoint(BOUND, BFV_BITS)),
    "PairwiseMasks": Row(PairwiseMasks, masked, limits={"bytes": 4.1}, faster=10.0),
    "PairwiseMasks, 10 neighbours": Row(PairwiseMasks, masked, 11, faster=10.0, limits={"bytes": 4.1}),
    "PairwiseMasks, active": Row(lambda n: PairwiseMasks(n, active=True), masked),
    "PairwiseMasks, many": Row(PairwiseMasks, masked, 100),
    "CKKSGram": Row(lambda n: CKKSGram(BOUND), limits={"bytes": 82.0}),
    "RLWEPad": Row(pad, lambda n: FixedPoint(BOUND, most_bits(n)), faster=1 / 0.3, limits={"bytes": 4.1}),
}


def main(arguments: list[str] | None = None) -> None:
    """Prints every line; nothing else goes to standard output."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.encryption", description=__doc__)
    parser.add_argument("--quick", action="store_true", help=f"d={QUICK_WIDTH} and one turn, without targets")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="both when left out")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="all when left out")
    parser.add_argument("--turns", type=int, help=f"measured turns; quick: 1, else {TURNS}")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    width, turns = (QUICK_WIDTH, 1) if given.quick else (WIDTH, TURNS)
    chosen = {name: small(row) if given.quick else row for name, row in ROWS.items() if name in given.rows}
    rows = made_rows(CLIENTS, width)
    if "sums" in given.parts:
        # Memory first: what the encryption library keeps does not survive the fork.
        for found in chain(memory(rows, chosen), speed(rows, chosen, given.turns or turns)):
            write(found)
    if "distances" in given.parts:
        # In the quick form few pairs and products are measured, and their lines say so.
        few = (rows[:QUICK_CLIENTS], 2, 2, 1, QUICK_WIDTH)
        for found in distances(*few) if given.quick else distances(rows, None, PRODUCTS, COHORTS, COHORT_WIDTH):
            write(found)


def small(row: Row) -> Row:
    """With fewer clients, and without what is aimed for at the full width alone: short rows are dwarfed by keys."""
    kept = {metric: most for metric, most in row.limits.items() if metric != "bytes"}
    return replace(row, clients=min(row.clients, QUICK_MOST), faster=None, limits=kept)


def made_rows(clients: int, width: int) -> Tensor:
    """Updates `(clients, width)`, float32, of largest absolute coordinate B."""
    rows = torch.empty(clients, width).normal_(generator=Generator().manual_seed(0))
    return rows.mul_(BOUND / float(rows.abs().max()))


def exact_mean(rows: Tensor, n: int) -> Tensor:
    """What n clients should give, `(d,)` float64."""
    return Rehearsal(Plaintext(), rows).exact_mean(range(n))


def case_name(name: str, clients: int, width: int) -> str:
    """What a line calls a case."""
    return f"{name} n={clients} d={width}"


def memory(rows: Tensor, chosen: Mapping[str, Row]) -> Iterator[dict[str, Any]]:
    """What one round of each needs."""
    theirs = {name: one_round(lambda peer=peer: peer.play(rows[:CLIENTS])) for name, peer in PEERS.items()}  # type: ignore[misc]
    for name, row in chosen.items():
        ours, why = one_round(lambda row=row: row.play(rows))  # type: ignore[misc]
        if ours is None:
            raise RuntimeError(f"memory of {name}: {why}")
        for peer, (known, missing) in theirs.items():
            case = case_name(name, row.clients, rows.shape[1])
            yield line("encryption", case, peer, "memory", "bytes", ours, known, None, missing)


def one_round(play: Callable[[], Measured]) -> tuple[int | None, str]:
    """Bytes the process grew by, or why there is no number."""

    def make() -> Callable[[], None]:
        play()
        return lambda: None  # one round is enough: nothing of it is kept for another

    return growth(make)


def speed(rows: Tensor, chosen: Mapping[str, Row], turns: int) -> Iterator[dict[str, Any]]:
    """Times, bytes and errors."""
    calls: dict[str, Callable[[], Measured]] = {}
    for name, row in chosen.items():
        calls[f"ours, {name}"] = lambda row=row: row.play(rows)  # type: ignore[misc]
    for name, peer in PEERS.items():
        calls[name] = lambda peer=peer: peer.play(rows[:CLIENTS])  # type: ignore[misc]
    if turns > 1:
        for row in chosen.values():
            row.play(rows[:, :WARM])
    failures: dict[str, str] = {}
    found = interleaved(calls, turns, failures)
    truth = exact_mean(rows, CLIENTS)
    theirs = {peer: (figures(found[peer], truth) if found[peer] else None, failures.get(peer, "")) for peer in PEERS}
    for name, row in chosen.items():
        own, case = found[f"ours, {name}"], case_name(name, row.clients, rows.shape[1])
        yield from beside(case, row, figures(own, exact_mean(rows, row.clients)), theirs)
        spent = median(one.key_holder for one in own)
        if spent:
            yield line("encryption", case, "every peer", "key holder time", "s", spent, None, None, NO_KEY_HOLDER)


def interleaved(
    calls: Mapping[str, Callable[[], Measured]], turns: int, failures: dict[str, str]
) -> dict[str, list[Measured]]:
    """All turns of every call; what a peer raises is written down, and it is not called again."""
    found: dict[str, list[Measured]] = {name: [] for name in calls}
    for _ in range(turns):
        for name, call in calls.items():
            if name in failures:
                continue
            try:
                found[name].append(call())
            except Exception as error:  # a peer's; ours is raised
                if name.startswith("ours"):
                    raise
                failures[name] = reason(error)
    return found


def figures(rounds: Sequence[Measured], truth: Tensor) -> dict[str, float]:
    """Medians over rounds, by metric; `truth (d,)` is the exact mean."""
    misses = [one.mean - truth for one in rounds]
    return {
        "time": median(one.path for one in rounds),
        "client time": median(one.client for one in rounds),
        "server time": median(one.server / one.clients for one in rounds),
        "bytes": median(one.up for one in rounds) / len(truth),
        "largest error": median(float(miss.abs().max()) for miss in misses) / BOUND,
        "error deviation": median(float(miss.square().mean().sqrt()) for miss in misses) / BOUND,
        "relative error": median(float(miss.norm()) for miss in misses) / float(truth.norm()),
    }


def beside(case: str, row: Row, ours: Mapping[str, float], theirs: Mapping[str, Theirs]) -> Iterator[dict[str, Any]]:
    """Ours beside what is aimed for, beside float32 numbers, and beside every peer."""
    yield line("encryption", case, "float32", "bytes", UNITS["bytes"], ours["bytes"], 4.0)
    for metric, most in row.limits.items():
        yield line("encryption", case, f"at most {most:g}", metric, UNITS[metric], ours[metric], most, 1.0)
    for peer, (known, why) in theirs.items():
        for metric, unit in UNITS.items():
            target = row.faster if (peer, metric) == ("NVFlare", "time") else None
            value = None if known is None else known[metric]
            yield line("encryption", case, peer, metric, unit, ours[metric], value, target, why)


if __name__ == "__main__":
    main()
