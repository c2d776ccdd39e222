"""An image from the gradients of a vision transformer's first attention and position embedding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, final

import torch
from torch import Generator, Tensor

from privfm.attacks.reconstruction.architectures import asleep
from privfm.attacks.reconstruction.closed_form.layers import completed
from privfm.attacks.reconstruction.closed_form.patches import solve_known, unsent
from privfm.attacks.reconstruction.vision_models import VisionModel, vision_model
from privfm.checks import InvalidArgument
from privfm.contracts import Observation, Reconstruction, ReconstructionAttack, Watch

_FITS: Final = 1e-2
"""Relative violation, on a probe, of the identity that APRIL rests on; float32 is at 1e-5, a residual path near 1."""


@final
@dataclass(frozen=True)
class APRIL(ReconstructionAttack):
    """Solves the first attention's gradients for its input tokens, and those for the patches.

    With queries, keys and values linear in the tokens z, dL/dz = D_q W_q + D_k W_k + D_v W_v and dL/dW_q = D_q^T z, so
    that `(dL/dz)^T z = W_q^T dL/dW_q + W_k^T dL/dW_k + W_v^T dL/dW_v`; dL/dz is the position embedding's gradient.

    Holds only where the tokens reach the first attention and nothing else: no norm before it and no residual path
    around it. That is no pre-norm transformer of today; it is tried on a probe, and refused where it does not hold.
    `PatchInversion` needs neither and asks for less.

    | behind the gradient              | result                                                                 |
    |----------------------------------|------------------------------------------------------------------------|
    | one image, no norm, no residual  | exact to rounding times a condition number; needs tokens <= d and patch |
    |                                  | pixels <= d                                                            |
    | several images                   | a mixture                                                              |
    | a norm or a residual path        | refused                                                                |
    | position embedding frozen        | refused                                                                |

    Cost: a forward and a backward pass on a probe, two least squares.

    Args:
      architecture: how to read the model; None finds out.

    Source: Lu et al., "APRIL: finding the Achilles' heel on privacy for vision transformers", CVPR 2022.
    """

    architecture: type[VisionModel] | None = None

    @property
    def needs(self) -> tuple[str, ...]:
        return ("gradients of the first attention and the position embedding", "no norm before the attention")

    def refusal(self, observation: Observation) -> str:
        try:
            tensors = observation.gradients
            seen = vision_model(observation.model, self.architecture)
        except InvalidArgument as reason:
            return str(reason)
        missing = unsent(tensors, [seen.positions_name, *(one.weight for one in seen.block(0).projections)])
        if missing:
            return missing
        if seen.tokens > seen.width:
            return f"{seen.tokens} tokens of width {seen.width}: more unknowns than equations; optimise instead"
        if seen.matrix().shape[1] > seen.width:
            return f"patches of {seen.matrix().shape[1]} pixels in width {seen.width}: use PatchInversion"
        error = self.violation(seen)
        if error > _FITS:
            return (
                f"in {type(seen.root).__name__} the tokens also go around the first attention, or through a norm "
                f"before it (the identity is off by {error:.1g} on a probe); use PatchInversion, which needs neither"
            )
        return ""

    @staticmethod
    def violation(seen: VisionModel) -> float:
        """How far the identity is from holding on a probe, relative to its size; of the model's own code."""
        names = [seen.positions_name, *(one.weight for one in seen.block(0).projections)]
        parameters = {name: one.detach() for name, one in seen.model.named_parameters()}
        wanted = {name: parameters[name].clone().requires_grad_() for name in names}
        with torch.enable_grad(), asleep(seen.model):
            output: Any = torch.func.functional_call(seen.model, parameters | wanted, (seen.probe(),))
            logits = output if isinstance(output, Tensor) else output[0]
            weights = torch.arange(1, logits.numel() + 1).to(logits).remainder(7).sub(3).reshape(logits.shape)
            sent = torch.autograd.grad((logits * weights).sum(), list(wanted.values()))
        left, right = _system(seen, dict(zip(names, sent, strict=True)))
        return float((left @ seen.tokens_of(seen.probe())[0].double() - right).norm() / right.norm())

    def reconstruct(self, rounds: Sequence[Observation], watch: Watch, generator: Generator) -> Reconstruction:
        seen = vision_model(rounds[0].model, self.architecture)
        left, right = _system(seen, rounds[0].gradients)
        tokens, equations = solve_known(left, right)
        content = tokens[seen.special :] - seen.added()
        patches, _ = solve_known(seen.matrix(), content.T)
        residual = (left.nan_to_num() @ tokens.nan_to_num() - right).nan_to_num().norm() / right.nan_to_num().norm()
        outside = (seen.matrix() @ patches - content.T).norm() / content.norm()
        values = torch.linalg.svdvals(left[left.isfinite().all(1)])
        images, guessed = completed(seen.paste(patches.T[None]))
        return Reconstruction(
            images=images if guessed < 1 else None,
            facts={
                "share of pixels guessed": guessed,
                "tokens": seen.tokens,
                "condition": float(values[0] / values[-1]) if len(values) and float(values[-1]) > 0 else float("inf"),
                "equations of a feature, least": equations,
                "residual": float(residual),
                "outside of the patch projection": float(outside),
            },
            stopped=watch.stopped,
        )


def _system(seen: VisionModel, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Both sides of the identity: `(d, tokens)` and `(d, d)`."""
    parameters = {name: one.detach() for name, one in seen.model.named_parameters()}
    left = tensors[seen.positions_name].reshape(seen.tokens, seen.width).double().T
    right = torch.zeros(seen.width, seen.width, dtype=torch.float64, device=left.device)
    for one in seen.block(0).projections:
        weight, gradient = one.matrix(parameters), one.matrix(tensors)
        if weight is None or gradient is None:
            raise InvalidArgument(f"{one.weight} was not sent")
        right = right + weight.double().T @ gradient.double()
    return left, right
