"""Each token's and each position's share of the first attention's gradients, by solving linear equations.

With rows `x_i = (c_t + a_p) / sigma_i + beta` (c and a centred and scaled by gamma) a map's weight gradient is

    G - b beta^T = sum_i Delta_i (c_t(i) + a_p(i))^T / sigma_i = Y_T^T C + Y_P^T A,

where b, the bias's gradient, is the sum of all Delta_i, `Y_t` sums `Delta_i / sigma_i` over a token's occurrences and
`Y_p` over those at a position. C and A are known once the bag is; their rows are independent while tokens + positions
stay under the width, and then Y is the one solution.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, final

import torch
from torch import Tensor

from privfm.attacks.reconstruction.bags import (
    Bag,
    bag_of_span,
    input_gradients,
    norm_of,
    position_directions,
    span_under_noise,
    token_directions,
)
from privfm.attacks.reconstruction.text_models import TextModel
from privfm.checks import InvalidArgument
from privfm.contracts.reconstruction import Watch

_LADDER: Final = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
"""Numbers of positions tried in turn: each costs the span a direction, and a text that is longer leaves a rest."""

_EXPLAINED: Final = 1e-5
"""Share of a gradient unexplained at which no more positions are tried: 2e-7 for a right bag in float32."""

_BETTER: Final = 0.8
"""More positions are taken if they leave less than this share of what fewer left: else it is noise that is left."""

_WIDEST: Final = 0.15
"""Tolerance of the bag under noise: MiniLM's other tokens start at 0.25 from the span of 32 texts."""

_OCCUPIED: Final = 1e-4
"""A position that holds a token has a gradient above this share of the largest; an empty one has rounding, 1e-6."""


@final
@dataclass(frozen=True)
class TokenGradients:
    """What the equations give.

    Attributes:
      tokens: ids of the bag, `(T,)`.
      of_tokens: `Y_t`, `(T, 3, d)`: query, key, value.
      of_positions: `Y_p` of the positions that are occupied, `(P, 3, d)`.
      unexplained: share of the gradients that the bag does not explain, corrected for the unknowns spent on it.
      levels: the same as a standard deviation of an entry of the query, key and value gradients, `(3,)`: rounding and
        noise, as large as they are, whether or not anybody has told of them.
      spread: standard deviation of an entry of `Y_t` for noise of 1 on each entry of the gradients, `(T,)`.
      bag: from which it came.
    """

    tokens: Tensor
    of_tokens: Tensor
    of_positions: Tensor
    unexplained: float
    levels: Tensor
    spread: Tensor
    bag: Bag


def token_gradients(
    text: TextModel,
    gradients: Mapping[str, Tensor],
    noise: float = 0.0,
    tolerance: float = 1e-3,
    watch: Watch | None = None,
) -> TokenGradients | None:
    """Finds the bag with the fewest positions that explain the gradients, and solves for the shares.

    Args:
      text: the model, with positions added before a norm.
      gradients: with weights of query, key and value whole; biases are used where all three are there, and are
        otherwise three unknowns an output.
      noise: standard deviation on every entry.
      tolerance: of the bag.
      watch: ends the search for more positions.

    Returns:
      None where the batch holds more tokens and positions than the width can tell apart, or noise has drowned all.
    """
    basis, turned = span_under_noise(input_gradients(text.block(0), gradients), noise)
    if not len(basis):
        return None
    best: TokenGradients | None = None
    most = text.most_positions or _LADDER[-1]
    for positions in [count for count in _LADDER if count < most] + [min(most, _LADDER[-1])]:
        if watch is not None and watch.over:
            break
        bag = bag_of_span(text, basis, positions, min(max(tolerance, 2 * turned), _WIDEST))
        if bag.free == 0 or len(bag.tokens) + positions >= text.width:
            break  # more positions leave less open
        if len(bag.tokens) < 2:
            continue
        found = solved(text, gradients, bag, positions)
        if best is not None and found.unexplained > _BETTER * best.unexplained:
            break
        best = found
        if best.unexplained < _EXPLAINED:
            break
    return best


def solved(text: TextModel, gradients: Mapping[str, Tensor], bag: Bag, positions: int) -> TokenGradients:
    """Solves for the shares of a bag's tokens and of the first positions, in float64.

    Cost: least squares of `d` equations and T + P unknowns for 3 d right hand sides; 50 ms at width 384.
    """
    tokens = torch.tensor(bag.tokens)
    weights, offsets = _maps_seen(text, gradients)
    shift = norm_of(text).bias.detach().cpu().double()
    rows = torch.cat([token_directions(text, tokens), position_directions(text, positions)])
    if len(offsets) == len(weights):
        weights = [weight - offset[:, None] * shift for weight, offset in zip(weights, offsets, strict=True)]
    elif float(shift.norm()) > 0:
        rows = torch.cat([rows, shift[None]])
    targets = torch.cat(weights)
    shares = torch.linalg.lstsq(rows.T, targets.T, driver="gelsd").solution
    rest = (targets - shares.T @ rows).view(3, -1, text.width)
    left = max(text.width - len(rows), 1) * rest.shape[1]
    spread = torch.linalg.pinv(rows @ rows.T).diagonal().clamp_min(0).sqrt()
    count, both = len(tokens), len(tokens) + positions
    levels = (rest.square().sum((1, 2)) / left).sqrt()
    of_positions = shares[count:both].view(positions, 3, -1)
    return TokenGradients(
        tokens=tokens,
        of_tokens=shares[:count].view(count, 3, -1),
        of_positions=_occupied(of_positions, levels.norm() * spread[count:both]),
        unexplained=float(levels.norm() * (text.width * rest.shape[1]) ** 0.5 / targets.norm()),
        levels=levels,
        spread=spread[:count],
        bag=bag,
    )


def _maps_seen(text: TextModel, gradients: Mapping[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of the three weights, and of those biases that are seen whole."""
    weights, offsets = [], []
    for projection in text.block(0).projections:
        matrix, offset = projection.matrix(gradients), projection.offset(gradients)
        if matrix is None:
            raise InvalidArgument(f"the gradient of {projection.weight} was not sent")
        weights.append(matrix.detach().cpu().double())
        if offset is not None and bool(offset.isfinite().all()):
            offsets.append(offset.detach().cpu().double())
    return weights, offsets


def _occupied(of_positions: Tensor, errors: Tensor) -> Tensor:
    """Without the empty positions behind the longest text; `errors` are those of an entry, `(P,)`."""
    sizes = of_positions.flatten(1).norm(dim=1)
    noise = 2 * errors * of_positions.shape[2] ** 0.5
    last = (sizes > torch.maximum(noise, _OCCUPIED * sizes.max())).nonzero()
    return of_positions[: int(last.max()) + 1] if len(last) else of_positions


def position_shares(of_tokens: Tensor, of_positions: Tensor) -> Tensor:
    """How much of each token's gradient stands at each position, `(T, P)`: 1 at the place of a token that occurs once.

    Least squares of every `Y_p` on all `Y_t`, query, key and value each in units of its own size. A token's occurrences
    at several positions share its `Y_t`, which mixes into no exact number; the largest is a guess, not a proof.
    """
    sizes = of_tokens.norm(dim=(0, 2), keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    given, wanted = (of_tokens / sizes).flatten(1), (of_positions / sizes).flatten(1)
    found: Tensor = torch.linalg.lstsq(given.T, wanted.T, driver="gelsd").solution
    return found
