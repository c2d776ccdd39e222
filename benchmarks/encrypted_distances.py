"""Geometry of encrypted rows: inner products of sketches beside all pairs in full, of the same rows in one process.

| metric         | ours, theirs                                                                     | ratio         |
|----------------|----------------------------------------------------------------------------------|---------------|
| geometry time  | seconds of server and key holder from whole, parsed rows to all distances in the | theirs / ours |
|                | clear; what was measured of the peers stands in the case                         |               |
| distance error | largest relative one of a squared distance                                       | theirs / ours |
| equal choice   | share of cohorts in which Krum chooses as on exact distances, among those whose  | ours / theirs |
|                | best score is at least a tenth below the next                                    |               |

| peer               | what                                                                                          |
|--------------------|-----------------------------------------------------------------------------------------------|
| TenSEAL, all pairs | (a - b)^2 in slots, added up, one sum over slots a pair; n = 8192, primes [60,40,40,60], 2^40 |
| no sketch          | all inner products with our own ring and packing, without a sketch                            |
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, islice
from time import process_time
from typing import Any, final

import torch
from torch import Generator, Tensor

from benchmarks.encryption_peers import TUTORIAL, squared_distance
from benchmarks.timing import line
from privfm.contracts import Reveals
from privfm.defenses.channels import CKKSGram
from privfm.defenses.channels.gram.ring import DEGREE, Array, SecretRing, ServerRing, new_keys
from privfm.defenses.channels.gram.sketch import step_of
from privfm.engines import Local
from privfm.federation.phases import Phases
from privfm.federation.rehearsal import Rehearsal

GEOMETRY = ("signs", "weights")
FASTER = 20.0  # aimed for, against all pairs on TenSEAL
GAP = (0.1, 0.3)  # of the best score to the next, over the best, in cohorts in which a choice must be equal
FAULTY = 2  # f of Krum


@final
@dataclass(frozen=True)
class Distances:
    """Squared distances of some pairs of rows.

    Attributes:
      seconds: for all pairs there are; of those measured, times as many.
      error: largest relative error.
      measured: pairs that were really measured.
      pairs: that there are.
    """

    seconds: float
    error: float
    measured: int
    pairs: int

    @property
    def words(self) -> str:
        """How much of it was measured."""
        return "" if self.measured == self.pairs else f", {self.measured} of {self.pairs} measured, times the rest"


def lines(rows: Tensor, pairs: int | None, products: int, cohorts: int, width: int) -> Iterator[dict[str, Any]]:
    """Everything about distances.

    Args:
      rows: `(n, d)`, at most 1 in each coordinate.
      pairs: that TenSEAL measures; None: all.
      products: inner products that are measured without a sketch.
      cohorts: in which choices are compared.
      width: of their rows.
    """
    n, d = rows.shape
    gram, phases = sketched_gram(rows)
    spent = geometry_seconds(phases)
    ours = Distances(spent, largest_error(rows, gram), n * (n - 1) // 2, n * (n - 1) // 2)
    others = {"TenSEAL, all pairs": all_pairs(rows, pairs), "no sketch": without_sketch(rows, products)}
    for peer, theirs in others.items():
        case = f"CKKSGram n={n} d={d}{theirs.words}"
        target = FASTER if peer.startswith("TenSEAL") and theirs.measured == theirs.pairs else None
        yield line("encryption", case, peer, "geometry time", "s", ours.seconds, theirs.seconds, target)
        yield line("encryption", case, peer, "distance error", "relative", ours.error, theirs.error)
    share = equal_choices(cohorts, n, width)
    found = line("encryption", f"CKKSGram {cohorts} cohorts n={n} d={width}", "exact distances", "equal choice",
                 "share of cohorts", share, 1.0, 1.0)  # fmt: skip
    yield found | {"ratio": share, "met": share >= 1.0}  # of a score, more is better


def sketched_gram(rows: Tensor) -> tuple[Tensor, Phases]:
    """Inner products `(n, n)` as the channel gives them, and where the round's time went."""
    channel = CKKSGram(1.0, gram_to_server=True)
    nobody = torch.zeros(0, rows.shape[1])
    return Rehearsal(channel, rows, needs=Reveals.GRAM).play(Local(1), lambda view: view.gram(nobody))


def geometry_seconds(phases: Phases) -> float:
    """Of server and key holder, in the stages that are about nothing else."""
    return sum(phase.server_seconds + phase.key_holder_seconds for phase in phases.all if phase.stage in GEOMETRY)


def all_pairs(rows: Tensor, most: int | None) -> Distances:
    """Encrypted squared distances on TenSEAL, each decrypted."""
    context = TUTORIAL.context()
    context.generate_galois_keys()
    encrypted = [TUTORIAL.encrypted(context, row, whole=True) for row in rows]
    pairs = list(combinations(range(len(rows)), 2))
    chosen = pairs[:most]
    began = process_time()
    found = [squared_distance(encrypted[i], encrypted[j]).decrypt()[0] for i, j in chosen]
    spent = process_time() - began
    errors = [abs(value / exact_distance(rows, *pair) - 1) for value, pair in zip(found, chosen, strict=True)]
    return Distances(spent * len(pairs) / len(chosen), max(errors), len(chosen), len(pairs))


def without_sketch(rows: Tensor, most: int) -> Distances:
    """Inner products of whole rows on our ring, each relinearised and decrypted once; rows are mirrored once."""
    keys = new_keys(step_of(CKKSGram(1.0).groups))
    ring, secret = ServerRing(keys.public, keys.evaluation), SecretRing(keys.secret)
    pairs = [(i, j) for j in range(len(rows)) for i in range(j + 1)]
    chosen = pairs[:most]
    needed = sorted({row for pair in chosen for row in pair})
    encrypted = {i: [ring.parsed(ring.encrypt(chunk)) for chunk in _chunks(rows[i])] for i in needed}
    began = process_time()
    mirrored = {i: [ring.reversed(chunk) for chunk in encrypted[i]] for i in needed}
    turned = process_time() - began
    began = process_time()
    found = [secret.inner_product(ring.inner_product(encrypted[i], mirrored[j]).packed()) for i, j in chosen]
    spent = process_time() - began
    exact = [float(rows[i].double() @ rows[j].double()) for i, j in chosen]
    scale = float(rows[0].double().square().sum())
    error = max(abs(value - truth) / scale for value, truth in zip(found, exact, strict=True))
    seconds = turned * len(rows) / len(needed) + spent * len(pairs) / len(chosen)
    return Distances(seconds, error, len(chosen), len(pairs))


def _chunks(row: Tensor) -> list[Array]:
    """A row in float64, a piece for each ciphertext."""
    values: Array = row.double().numpy()
    return [values[at : at + DEGREE] for at in range(0, len(values), DEGREE)]


def exact_distance(rows: Tensor, i: int, j: int) -> float:
    """Squared."""
    return float((rows[i].double() - rows[j].double()).square().sum())


def distances(gram: Tensor) -> Tensor:
    """Squared, `(n, n)`."""
    own = gram.diagonal()
    return own[:, None] + own[None, :] - 2 * gram


def largest_error(rows: Tensor, gram: Tensor) -> float:
    """Largest relative error of a squared distance."""
    found = distances(gram)
    return max(abs(float(found[i, j]) / exact_distance(rows, i, j) - 1) for i, j in combinations(range(len(rows)), 2))


def equal_choices(cohorts: int, n: int, width: int) -> float:
    """Share of cohorts in which Krum on encrypted sketches chooses the row that it chooses on exact distances."""
    equal = 0
    for rows in islice(clear_cohorts(n, width), cohorts):
        exact = rows.double() @ rows.double().T
        equal += int(scores(exact).argmin() == scores(sketched_gram(rows)[0]).argmin())
    return equal / cohorts


def clear_cohorts(n: int, width: int) -> Iterator[Tensor]:
    """Rows `(n, width)` around a common one, more or less noisy; the gap of the best score is within `GAP`."""
    generator = Generator().manual_seed(0)
    while True:
        common = torch.randn(1, width, generator=generator)
        noise = torch.randn(n, width, generator=generator) * (0.3 + torch.rand(n, 1, generator=generator))
        rows = common + noise
        rows = rows / rows.abs().max()
        best, second = scores(rows.double() @ rows.double().T).sort().values[:2].tolist()
        if GAP[0] < second / best - 1 < GAP[1]:
            yield rows


def scores(gram: Tensor) -> Tensor:
    """Krum's, `(n,)`: the sum of the n - f - 2 least squared distances to others.

    Source: Blanchard et al., "Machine learning with adversaries", 2017, section 4.
    """
    found = distances(gram).fill_diagonal_(float("inf"))
    nearest: Sequence[Tensor] = found.sort(dim=1).values[:, : len(gram) - FAULTY - 2].unbind(1)
    return torch.stack(list(nearest)).sum(0)
