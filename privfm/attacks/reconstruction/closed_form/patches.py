"""An image from the gradients of a vision transformer's patch projection and position embedding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, final

import torch
from torch import Generator, Tensor

from privfm.attacks.reconstruction.closed_form.layers import completed
from privfm.attacks.reconstruction.vision_models import VisionModel, vision_model
from privfm.checks import InvalidArgument
from privfm.contracts import Observation, Reconstruction, ReconstructionAttack, Watch

_RANK: Final = 1e-10
"""Singular values under this share of the largest count as none; rounding of float64 is at 1e-16 times the size."""


@final
@dataclass(frozen=True)
class PatchInversion(ReconstructionAttack):
    """Solves the patch projection's gradient for the patches, the position embedding's being their coefficients.

    The token of patch t is `z_t = W x_t + b + e_t`. Whatever follows, dL/de_t = dL/dz_t: the position embedding's
    gradient A `(patches, d)` holds every token's, and dL/dW = sum_t (dL/dz_t) x_t^T = A^T X. Both are sent, so X is the
    solution of a linear system: a linear layer whose output gradients are known. Norms, residuals, the head and the
    loss do not enter, in contrast to APRIL.

    | behind the gradient                       | result                                                       |
    |-------------------------------------------|--------------------------------------------------------------|
    | one image, patches <= d                   | exact to rounding times the condition number of A            |
    | several images, or a sum of clients       | a mixture; `residual` says so (0 for one image, patches < d) |
    | one image several times                   | exact                                                        |
    | position embedding frozen or not sent     | refused                                                      |
    | features (of d) hidden in A or in dL/dW   | left out; exact while as many as there are patches remain,   |
    |                                           | pixels with fewer are the mean of the others                 |
    | clipping by the norm, plain SGD, one step | as without                                                   |

    Cost: one singular value decomposition of `(d, patches)`.

    Args:
      architecture: how to read the model; None finds out.

    Source: dL/dz from the position embedding is Lu et al., "APRIL: finding the Achilles' heel on privacy for vision
    transformers", CVPR 2022; solving the patch projection instead of the attention is ours.
    """

    architecture: type[VisionModel] | None = None

    @property
    def needs(self) -> tuple[str, ...]:
        return ("gradients of the patch projection and the position embedding", "one image")

    def refusal(self, observation: Observation) -> str:
        try:
            tensors = observation.gradients
            seen = vision_model(observation.model, self.architecture)
        except InvalidArgument as reason:
            return str(reason)
        missing = unsent(tensors, (seen.positions_name, seen.projection_name))
        if missing:
            return missing
        if seen.patches > seen.width:
            return (
                f"{seen.patches} patches in tokens of width {seen.width}: the system has more unknowns than equations; "
                "use an attack by optimisation"
            )
        return ""

    def reconstruct(self, rounds: Sequence[Observation], watch: Watch, generator: Generator) -> Reconstruction:
        seen, tensors = vision_model(rounds[0].model, self.architecture), rounds[0].gradients
        at_tokens = tensors[seen.positions_name].reshape(seen.tokens, seen.width)[seen.special :].double()
        at_weight = seen.matrix(tensors[seen.projection_name])
        patches, equations = solve_known(at_tokens.T, at_weight)
        known = at_weight.isfinite() & at_tokens.T.isfinite().all(1)[:, None]
        missed = (at_tokens.nan_to_num().T @ patches.nan_to_num() - at_weight).where(known, 0.0)
        values = torch.linalg.svdvals(at_tokens[:, at_tokens.isfinite().all(0)])
        rank = int((values > _RANK * values.max()).sum()) if len(values) else 0
        images, guessed = completed(seen.paste(patches[None]))
        return Reconstruction(
            images=images if guessed < 1 else None,
            facts={
                "patches": seen.patches,
                "equations of a pixel, least": equations,
                "share of pixels guessed": guessed,
                "rank": rank,
                "condition": float(values[0] / values[-1]) if rank == seen.patches else float("inf"),
                "residual": float(missed.norm() / at_weight.where(known, 0.0).norm()) if rank else float("nan"),
            },
            stopped=watch.stopped,
        )


def unsent(tensors: Mapping[str, Tensor], names: Sequence[str]) -> str:
    """Why an attack on these tensors is refused; empty: all were sent, at least in part."""
    for name in names:
        if name not in tensors or bool(tensors[name].isnan().all()):
            return (
                f"{name} was not sent (frozen, or hidden), and the image's tokens cannot be told apart without it; a "
                "malicious server can set an AdapterTrap, others use an attack by optimisation"
            )
    return ""


def solve_known(left: Tensor, right: Tensor) -> tuple[Tensor, int]:
    """Least squares of `left (m, n) @ X = right (m, k)` on the equations that are known; NaN is not.

    Returns:
      X `(n, k)`, NaN in columns with fewer than n known equations; and the least number of equations of a column.
    """
    known = left.isfinite().all(1)[:, None] & right.isfinite()
    found = torch.full((left.shape[1], right.shape[1]), torch.nan, dtype=torch.float64)
    patterns, which = torch.unique(known, dim=1, return_inverse=True)
    for number in range(patterns.shape[1]):
        rows, columns = patterns[:, number], which == number
        if int(rows.sum()) >= left.shape[1]:
            solved = torch.linalg.lstsq(left[rows].cpu(), right[rows][:, columns].cpu(), driver="gelsd").solution
            found[:, columns.cpu()] = solved
    return found, int(known.sum(0).min())
