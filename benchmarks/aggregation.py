"""Aggregation rules beside ByzFL's, ByzPy's, Flower's, a NumPy loop and one read of the updates.

`python -m benchmarks.aggregation [--quick]` prints JSON lines; `make bench` does so beside all peers.

| metric     | ours, theirs                                                        | ratio           |
|------------|---------------------------------------------------------------------|-----------------|
| time       | median seconds (of the processor with one thread), interleaved      | theirs / ours   |
| memory     | bytes a forked child needed beyond the rows                         | theirs / ours   |
| difference | largest one of the two results, over the root mean square of ours   | none            |

Rows: independent Gaussian ones, where float32 products are safe; and `close` ones that share an offset, where
distances are computed again in float64.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from time import perf_counter, process_time
from typing import Any

import torch
from torch import Generator, Tensor

from benchmarks import timing
from benchmarks.peers import RADIUS, Call, Peer, found
from privfm.contracts import Rule
from privfm.defenses import CenteredClipping, Krum, Mean, MultiKrum, TrimmedMean
from privfm.defenses.coordinate_rules import Median
from privfm.defenses.gram_rules import GeometricMedian
from privfm.defenses.pre_aggregation import NearestNeighborMixing

RULES: dict[str, Callable[[int], Rule]] = {
    "Krum": Krum,
    "MultiKrum": MultiKrum,
    "GeometricMedian": lambda f: GeometricMedian(),
    "CenteredClipping": lambda f: CenteredClipping(radius=RADIUS),
    "NearestNeighborMixing": lambda f: NearestNeighborMixing(f=f, rule=Mean()),
    "Median": lambda f: Median(),
    "TrimmedMean": TrimmedMean,
}
COORDINATE = ("Median", "TrimmedMean")

COHORTS = {20: 4, 100: 20}  # n: f
SPEEDUP = {"gram": 20.0, "coordinate": 10.0}  # aimed for, against ByzFL at n=20
READS = {"gaussian": 6, "close": 10}  # aimed for, by gram rules at n=20
EXTRA = 300_000_000  # bytes, aimed for at n=100
CEILING = 14 << 30  # bytes of address space a child may take: ByzFL's mixing of 100 rows asks for 32 GB
PATIENCE = 3.0  # seconds after which a variant is not timed again
DEADLINE = 60  # seconds a child may take


@dataclass(frozen=True)
class Case:
    """One cohort."""

    n: int
    f: int
    d: int
    rows: str

    def make(self) -> Tensor:
        """The updates, `(n, d)` float32; the same in every process."""
        generator = Generator().manual_seed(0)
        found = torch.empty(self.n, self.d).normal_(generator=generator)
        return found if self.rows == "gaussian" else found.mul_(0.2).add_(1.0)

    def __str__(self) -> str:
        return f"n={self.n} f={self.f} d={self.d} {self.rows}"


def main(arguments: list[str] | None = None) -> None:
    """Prints every line; nothing else goes to standard output."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.aggregation", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="d=100000, n=20 and three repetitions")
    parser.add_argument("--n", type=int, nargs="+", choices=sorted(COHORTS), help="cohorts; quick: 20, else all")
    parser.add_argument("--threads", type=int, help="of torch; its own choice when left out, 1 counts processor time")
    given = parser.parse_args(arguments)
    d, repeats = (100_000, 3) if given.quick else (1_000_000, 7)
    sizes = given.n or ([20] if given.quick else sorted(COHORTS))
    cases = [Case(n, COHORTS[n], d, rows) for n in sizes for rows in READS]
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    peers = found()
    # Memory first: a child forked after a parallel sum inherits threads that are not there.
    for line in [line for case in cases for line in memory(case, peers)]:
        timing.write(line)
    for case in cases:
        rows = case.make()
        for name in RULES:
            for line in speed(case, rows, name, peers, repeats):
                timing.write(line)


def speed(case: Case, rows: Tensor, name: str, peers: list[Peer], repeats: int) -> Iterator[dict[str, Any]]:
    """Times and differences of one rule."""
    rule = RULES[name](case.f)
    calls: dict[str, Callable[[], Tensor]] = {"ours": lambda: rule(rows), "one read": rows.sum}
    failures = {peer.name: peer.reason or f"has no {name}" for peer in peers if name not in peer.calls}
    for peer in peers:
        if name in peer.calls:
            calls[peer.name] = _bound(peer.calls[name], rows, case.f)
    seconds, results = interleaved(calls, repeats, failures)
    ours = median(seconds["ours"])
    is_gram, small = name not in COORDINATE, case.n == 20
    target = 1 / READS[case.rows] if is_gram and small else None
    yield record(case, name, "one read", "time", "s", ours, median(seconds["one read"]), target)
    for peer in peers:
        if peer.name in failures:
            yield record(case, name, peer.name, "time", "s", ours, None, None, failures[peer.name])
            continue
        aimed = SPEEDUP["gram" if is_gram else "coordinate"] if peer.name == "ByzFL" and small else None
        yield record(case, name, peer.name, "time", "s", ours, median(seconds[peer.name]), aimed)
        yield difference(case, name, peer.name, results["ours"], results[peer.name])


def _bound(call: Call, rows: Tensor, f: int) -> Callable[[], Tensor]:
    return lambda: call(rows, f)


def interleaved(
    calls: dict[str, Callable[[], Tensor]], repeats: int, failures: dict[str, str]
) -> tuple[dict[str, list[float]], dict[str, Tensor]]:
    """Seconds and last results; one unmeasured call first, unless it already took long. What raises is written down."""
    # With one thread, processor time: it does not see who else uses the machine.
    clock = process_time if torch.get_num_threads() == 1 else perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    results: dict[str, Tensor] = {}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            if name in failures or sum(seconds[name]) > PATIENCE:
                continue
            start = clock()
            try:
                results[name] = torch.as_tensor(call())
            except Exception as error:  # a peer's; ours is raised
                if name == "ours":
                    raise
                failures[name] = timing.reason(error)
                continue
            spent = clock() - start
            if repeat or spent > PATIENCE:
                seconds[name].append(spent)
    return seconds, results


def difference(case: Case, name: str, peer: str, ours: Tensor, theirs: Tensor) -> dict[str, Any]:
    """Largest difference of two results, over the root mean square of ours."""
    scale = float(ours.double().square().mean().sqrt()) or 1.0
    found = float((ours.double() - theirs.double().reshape(-1)).abs().max()) / scale
    return record(case, name, peer, "difference", "relative", found, 0.0, None)


def memory(case: Case, peers: list[Peer]) -> Iterator[dict[str, Any]]:
    """Extra memory of every rule; only where the cohort is big, and the rows safe, is there something to see."""
    if case.rows != "gaussian":
        return
    for name, rule in RULES.items():
        ours, reason = extra_bytes(case, lambda rows, f, rule=rule: rule(f)(rows))  # type: ignore[misc]
        if ours is None:
            raise RuntimeError(f"{name} at {case}: {reason}")
        target = 1.0 if case.n > 20 else None
        yield record(case, name, "0.3 GB", "memory", "bytes", ours, EXTRA, target)
        for peer in peers:
            theirs, reason = None, peer.reason or f"has no {name}"
            if name in peer.calls:
                theirs, reason = extra_bytes(case, peer.calls[name])
            yield record(case, name, peer.name, "memory", "bytes", ours, theirs, None, reason)


def extra_bytes(case: Case, call: Call) -> tuple[int | None, str]:
    """Bytes beyond the rows at the worst moment of one call in a forked child, or why there is no number."""

    def make() -> Callable[[], Any]:
        rows = case.make()
        return lambda: call(rows, case.f)

    return timing.memory(make, DEADLINE, CEILING)


def record(  # noqa: PLR0917 (the columns, in their order)
    case: Case, name: str, peer: str, metric: str, unit: str,
    ours: float, theirs: float | None, target: float | None, reason: str = "",
) -> dict[str, Any]:  # fmt: skip
    """One line."""
    return timing.line("aggregation", f"{name} {case}", peer, metric, unit, ours, theirs, target, reason)


if __name__ == "__main__":
    main()
