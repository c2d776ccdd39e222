"""Which tokens a language model was trained to say, from the gradient of its head.

With logits W h and softmax cross-entropy, the head's gradient is `sum_u (weight_u p_u - targets_u) h_u^T` over the
positions u that have a loss: row v holds `-h_u` of each position whose target is v, and a share p_u[v] of every h_u.
Two readings: without the states h_u, a direction in which all states are positive tells the targets' rows by their
sign; with them, the equations are linear and give every position's weight and targets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, final

import torch
from torch import Tensor

from privfm.checks import at_least, require

_RIDGE: Final = 1e-6
"""Of the largest squared singular value, added when states' common direction is solved for: float32's rounding."""

_DIRECTION_ROUNDS: Final = 4
"""Times the direction is fitted again without the rows that lie on its wrong side; it stands still after two."""

_CONDITION: Final = 1e-7
"""States whose singular values fall under this share of the largest are no longer told apart in float32."""

_LIKELY: Final = 256
"""Tokens by which a position's weight is first guessed: its most likely ones, of which few are its targets."""


def target_shares(gradient: Tensor) -> dict[int, float]:
    """Tokens that are targets of some position, with an estimate of their share of all targets, from the head alone.

    | case                                        | result                                                         |
    |---------------------------------------------|----------------------------------------------------------------|
    | a target that the model holds unlikely      | found; its share is right as far as states have equal lengths  |
    |                                             | along their common direction                                   |
    | a target the model already says with a high | its row is the sum of a negative and a positive part: may be   |
    | probability, or says elsewhere              | missed, its share is too small                                 |
    | head tied to the embedding                  | rows of input tokens hold the embedding's part as well: use    |
    |                                             | `targets_by_state`, which leaves those rows out                |
    | rows with NaN                               | left out                                                       |

    Args:
      gradient: of the head's weight, `(V, h)`.

    Returns:
      Token -> share, the largest first; shares sum to 1. Empty where no row stands out.

    Raises:
      InvalidArgument: not a matrix, or nothing but zeros and NaN.

    Source: the signs of Zhao, Mopuri, Bilen, "iDLG", 2020, for many positions; a direction in place of the bias is
    ours.
    """
    require(gradient.dim() == 2, f"gradient has shape {tuple(gradient.shape)}: expected (V, h)")
    rows = gradient.cpu().double()
    norms = rows.norm(dim=1)
    seen = (norms > 0).nonzero()[:, 0]  # NaN compares as false
    require(len(seen) > 0, "the head's gradient is zero or hidden: no targets can be read from it")
    unit = rows[seen] / norms[seen, None]
    ordinary = torch.ones(len(seen), dtype=torch.bool)
    along = torch.zeros(len(seen), dtype=torch.float64)
    for _ in range(_DIRECTION_ROUNDS):
        gram = unit[ordinary].T @ unit[ordinary]
        ridge = _RIDGE * gram.diagonal().sum() * torch.eye(len(gram), dtype=torch.float64)
        direction = torch.linalg.solve(gram + ridge, unit[ordinary].sum(0))
        along = rows[seen] @ direction
        ordinary = along > 0
    weights = (-along).clamp_min(0)
    total = float(weights.sum())
    chosen = weights.argsort(descending=True)[: int((weights > 0).sum())].tolist()
    return {int(seen[k]): float(weights[k]) / total for k in chosen}


def target_counts(shares: Mapping[int, float], total: int) -> dict[int, int]:
    """Whole counts that come nearest to shares: the largest remainders are rounded up.

    Args:
      shares: of `target_shares`.
      total: number of positions with a loss, declared.

    >>> target_counts({7: 0.5, 3: 0.3, 5: 0.2}, total=4)
    {7: 2, 3: 1, 5: 1}
    """
    at_least("total", total, 1)
    exact = {token: share * total for token, share in shares.items()}
    counts = {token: int(value) for token, value in exact.items()}
    left = sorted(exact, key=lambda token: counts[token] - exact[token])[: max(total - sum(counts.values()), 0)]
    return {token: counts[token] + (token in left) for token in exact if counts[token] + (token in left) > 0}


@final
@dataclass(frozen=True)
class TargetsByState:
    """What the head's gradient says of positions whose states are known.

    Attributes:
      weights: of each state's loss in the gradient, `(n,)`: number of positions with this state over the number of all
        for a mean over tokens; 0 where a state is none of the gradient's.
      targets: weight of each token as target of each state, `(n, V)`; NaN at tokens whose rows were left out.
      noise: what `targets` has where nothing is: its median absolute value over the states' other tokens, `(n,)`.
    """

    weights: Tensor
    targets: Tensor
    noise: Tensor


def targets_by_state(
    gradient: Tensor, states: Tensor, probabilities: Tensor, left_out: Tensor | None = None
) -> TargetsByState:
    """Each position's weight and targets, from the head's gradient and the positions' states.

    `gradient = D^T states` with `D[u] = weight_u p_u - targets_u`: solved for D, and then, state by state, for the
    weight by which all tokens but the targets fit the model's probabilities.

    Exact to rounding as long as the states are linearly independent; those that are not in the gradient get weight 0,
    whatever they are. States that are missing bend all others.

    Args:
      gradient: of the head's weight, `(V, h)`.
      states: what the head is given, `(n, h)`, all different.
      probabilities: the model's for the next token, `(n, V)`.
      left_out: `(V,)` bool, rows that hold something else too (a tied head's input tokens); NaN rows are left out too.

    Raises:
      InvalidArgument: shapes do not fit; more states than the head is wide, or states that are linearly dependent to
        rounding; no row is left.

    Cost: a singular value decomposition `n x h` and a product `V x h x n`.

    Source: ours; the gradient of softmax cross-entropy.
    """
    require(
        gradient.dim() == 2
        and states.shape == (len(states), gradient.shape[1])
        and probabilities.shape == (len(states), len(gradient)),
        f"gradient {tuple(gradient.shape)}, states {tuple(states.shape)} and probabilities "
        f"{tuple(probabilities.shape)}: expected (V, h), (n, h) and (n, V)",
    )
    usable = ~gradient.isnan().any(1)
    if left_out is not None:
        usable = usable & ~left_out
    require(bool(usable.any()), "no row of the head's gradient is left: they are hidden, or hold something else too")
    left, values, right = torch.linalg.svd(states.double(), full_matrices=False)
    require(
        len(states) <= gradient.shape[1] and float(values[-1]) > _CONDITION * float(values[0]),
        f"{len(states)} states in {gradient.shape[1]} dimensions are not linearly independent: what each contributed "
        "to the head's gradient is not determined",
    )
    solved = (left / values) @ (right @ gradient[usable].double().T)  # D on the usable rows, (n, usable)
    said = probabilities[:, usable].double()
    weights = _weights(solved, said)
    excess = weights[:, None] * said - solved
    targets = torch.full(probabilities.shape, torch.nan, dtype=torch.float64)
    targets[:, usable] = excess
    return TargetsByState(weights, targets, excess.abs().median(1).values)


def _weights(solved: Tensor, said: Tensor) -> Tensor:
    """The factor by which probabilities fit the solved rows at all tokens but a few, for each state."""
    likely = min(_LIKELY, max(said.shape[1] // 2, 1))
    chosen = said.topk(likely, dim=1).indices
    ratios = solved.gather(1, chosen) / said.gather(1, chosen).clamp_min(torch.finfo(torch.float64).tiny)
    first = ratios.median(1).values
    # Few tokens are targets: those whose rows lie far below what the first guess says are left out of the second.
    missing = first[:, None] * said - solved
    spread = missing.abs().median(1, keepdim=True).values
    ordinary = (missing < 8 * spread) | (missing < 0.01 * first.abs()[:, None])
    kept = said * ordinary
    fitted = (kept * solved).sum(1) / kept.square().sum(1).clamp_min(torch.finfo(torch.float64).tiny)
    return torch.where(kept.square().sum(1) > 0, fitted, first)
