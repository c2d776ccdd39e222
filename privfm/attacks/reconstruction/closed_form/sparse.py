"""All images of a batch from the first linear layer: the ReLU behind it makes each image's gradient sparse."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, final

import torch
from torch import Generator, Tensor

from privfm.attacks.reconstruction.closed_form.layers import FirstLinear, first_linear_of
from privfm.attacks.reconstruction.subspace import gap_rank
from privfm.checks import InvalidArgument, at_least
from privfm.contracts import Observation, Reconstruction, ReconstructionAttack, Watch

_SAMPLES: Final = 4096
"""Subsets of rows that are tried together: some megabytes."""

_DEGENERATE: Final = 1e-6
"""Smallest pivot of a subset, relative to rows of length one: below, more than one direction vanishes on it."""

_EXTRA: Final = 2
"""Rows beyond the subset that must vanish too. A direction through a subset by chance vanishes nowhere else."""

_SAME: Final = 1e-4
"""Sine of the angle between two directions that count as one; distinct ones of random rows are near 1."""


@final
@dataclass(frozen=True)
class SPEAR(ReconstructionAttack):
    """Finds the directions of the gradient's column space that vanish on many rows: each is one image's.

    The weight's gradient is `D^T X` with `D (b, outputs)` = dL/dz and rank b. From a decomposition `U (S V^T)` of it,
    `D^T = U Q` for some Q `(b, b)`, and then `X = Q^-1 S V^T`. Behind a ReLU an image's dL/dz is zero where its output
    is shut: b - 1 random rows are all shut for image i with probability about 2^-(b-1), and the one direction that
    vanishes on them is then column i of Q. Those that vanish on the most rows are kept, the bias's gradient gives their
    scales, and the layer's own weights the proof: an image has a gradient exactly where it opens an output. Nothing is
    given unless every image is proved.

    | behind the gradient                     | result                                                            |
    |-----------------------------------------|-------------------------------------------------------------------|
    | b < outputs, pixels; a ReLU behind      | all b images exactly, or nothing; work grows as 2^b and faster    |
    |                                         | for images that open most outputs: seconds at 8, often hopeless   |
    |                                         | at 12                                                             |
    | no ReLU behind the layer                | nothing                                                           |
    | images that are linear combinations     | nothing                                                           |
    | a part hidden, Adam                     | refused                                                           |
    | noise                                   | nothing: the rank is full                                         |

    Neither labels nor the batch size are needed. `LinearInversion` finds images alone in an output, in no time.

    Args:
      layer: name of the module; empty: the first one that the model calls, which has to be `nn.Linear`.
      trials: most subsets of rows that are tried.

    Source: Dimitrov, Baader, Müller, Vechev, "SPEAR: exact gradient inversion of batches in federated learning",
    NeurIPS 2024, without its swaps of directions. Refining a direction on all rows that it vanishes on, and the
    all-or-nothing proof, are ours.
    """

    layer: str = ""
    trials: int = 1_000_000

    def __post_init__(self) -> None:
        at_least("trials", self.trials, 1)

    @property
    def needs(self) -> tuple[str, ...]:
        return ("shape of an image", "a ReLU behind the first layer")

    def refusal(self, observation: Observation) -> str:
        try:
            tensors = observation.gradients
            first, _ = first_linear_of(observation, self.layer)
        except InvalidArgument as reason:
            return str(reason)
        for name in first.names:
            if name not in tensors or bool(tensors[name].isnan().any()):
                return f"{name} was not sent, is hidden in part or does not exist; LinearInversion does with parts"
        return ""

    def reconstruct(self, rounds: Sequence[Observation], watch: Watch, generator: Generator) -> Reconstruction:
        observation = rounds[0]
        first, shape = first_linear_of(observation, self.layer)
        weight, bias = (observation.gradients[name] for name in first.names)
        spacing = float(torch.finfo(weight.dtype).eps)
        searches = [_Search(weight.double().cpu(), bias.double().cpu(), spacing**power) for power in _TOLERANCES]
        search, tried = searches[0], 0
        found: Tensor | None = None
        while search.rank and found is None and tried < self.trials and not watch.over:
            search = searches[tried // _SAMPLES % len(searches)]
            watch.tell(f"{len(search.directions)} directions for {search.rank} images", tried / self.trials)
            search.sample(generator)
            tried += _SAMPLES
            found = search.solution(first)
        images = None if found is None else first.images(found, shape)
        return Reconstruction(
            images=images,
            used=("shape",),
            facts={
                "rank": search.rank,
                "directions": len(search.directions),
                "images": 0 if images is None else len(images),
                "subsets tried": tried,
            },
            stopped="" if images is not None else watch.stopped or "all subsets tried",
        )


class _Search:
    """Directions `(b,)` of the column space, with the number of rows that each vanishes on."""

    def __init__(self, weight: Tensor, bias: Tensor, tolerance: float) -> None:
        self.tolerance = tolerance
        self.live = (weight.norm(dim=1) > 0).nonzero()[:, 0]
        self.directions: list[tuple[int, Tensor]] = []
        self.rank = 0
        if not len(self.live):
            return
        left, values, right = torch.linalg.svd(weight[self.live], full_matrices=False)
        rank = gap_rank(values)
        if rank >= min(left.shape[0], right.shape[1]):
            return  # of full rank: noise, or more images than the layer can tell apart
        self.rank = rank
        self.left, self.rest = left[:, :rank], values[:rank, None] * right[:rank]
        self.bias = bias[self.live]
        self.rows = self.left / self.left.norm(dim=1, keepdim=True)

    def sample(self, generator: Generator) -> None:
        """Tries random subsets of rank - 1 rows."""
        rows, rank = self.rows, self.rank
        if rank == 1:
            self.directions = [(len(rows), torch.ones(1, dtype=torch.float64))]
            return
        order = torch.rand(_SAMPLES, len(rows), generator=generator)
        subsets = rows[order.topk(rank - 1, dim=1).indices]  # (samples, rank - 1, rank)
        complete, pivots = torch.linalg.qr(subsets.mT, mode="complete")
        clear = pivots.diagonal(dim1=1, dim2=2).abs().min(1).values > _DEGENERATE
        found = complete[clear][:, :, -1]
        gone = (rows @ found.T).abs() < self.tolerance  # (rows, samples)
        counts = gone.sum(0)
        order = counts.argsort(descending=True)
        order = order[counts[order] >= rank - 1 + _EXTRA]
        for _ in range(_KEPT * rank):  # the sparsest first, each taken once
            if not len(order):
                break
            place = order[0]
            self._keep(gone[:, place])
            order = order[apart(found[order], found[place]) > _SAME]
        self.directions = sorted(self.directions, key=lambda one: -one[0])[: _KEPT * rank]

    def _keep(self, gone: Tensor) -> None:
        """Refines a direction on all rows that it vanishes on, and keeps it if it is new."""
        _, values, right = torch.linalg.svd(self.rows[gone])
        if len(values) < self.rank - 1 or float(values[self.rank - 2]) < self.tolerance:
            return  # more than one direction vanishes there
        direction = right[-1]
        if all(float(apart(direction[None], one)) > _SAME for _, one in self.directions):
            count = int(((self.rows @ direction).abs() < self.tolerance).sum())
            self.directions.append((count, direction))

    def solution(self, first: FirstLinear) -> Tensor | None:
        """Inputs `(b, k)` of the sparsest independent directions; None unless the layer's signs prove every one."""
        chosen: list[Tensor] = []
        for _, direction in self.directions:
            if chosen:
                basis = torch.linalg.qr(torch.stack(chosen, dim=1)).Q
                if float((direction - basis @ (basis.T @ direction)).norm()) < _SAME:
                    continue
            chosen.append(direction)
            if len(chosen) == self.rank:
                break
        if len(chosen) < self.rank:
            return None
        mixing = torch.stack(chosen, dim=1)
        mixing = mixing * torch.linalg.solve(mixing, self.left.T @ self.bias)  # columns with the bias's scales
        inputs = torch.linalg.solve(mixing, self.rest)
        errors = self.left @ mixing  # (rows, b): dL/dz
        strong = errors.abs() > self.tolerance * self.left.norm(dim=1, keepdim=True) * mixing.norm(dim=0)
        layer = first.module
        weight, offset = layer.weight.detach().double().cpu(), layer.bias.detach().double().cpu()
        opened = inputs @ weight[self.live].T + offset[self.live] > 0
        proved = (strong == opened.T).double().mean(0) > 1 - _SHARE
        return inputs if bool(proved.all()) else None


def apart(vectors: Tensor, one: Tensor) -> Tensor:
    """Sine of the angle between unit vectors `(n, b)` and a unit vector `(b,)`, `(n,)`."""
    sines: Tensor = (vectors - (vectors @ one)[:, None] * one).norm(dim=1)
    return sines


_KEPT: Final = 4
"""Directions taken of a sample and kept, as a multiple of the images: the sparsest."""

_TOLERANCES: Final = (0.5, 0.65, 0.8)
"""Powers of the type's spacing below which an entry vanishes, tried in turn. Too loose, the difference of two images of
one label vanishes wherever both are open; too tight, rounding hides true zeros. A wrong one proves nothing."""

_SHARE: Final = 0.05
"""Outputs of an image that may contradict its signs, by rounding near zero; of a mixture about half of them do."""
