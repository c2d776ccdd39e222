"""Which tokens are behind adapters' gradients, from fewer directions than there are tokens.

The gradient of A is `scaling B^T Delta^T X`: r combinations of the inputs X of the layer, and with a frozen backbone
the first attention's inputs are the same in every round. Modulo the known positions and the norm's shift each input is
a multiple of its token's direction, so that all rows of all rounds are combinations of the *same* few columns of a
known dictionary: a joint sparse recovery. As soon as the rows number as many as the tokens, membership in their span
tells; far below that, rank-aware pursuit finds the tokens all the same.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, final

import torch
from torch import Tensor

from privfm.attacks.reconstruction.bags import token_directions
from privfm.attacks.reconstruction.lora.greedy import Dictionary, Search
from privfm.attacks.reconstruction.lora.rows import AdapterRows
from privfm.checks import InvalidArgument, require
from privfm.contracts import Watch

_IDLE_STEPS: Final = 10
"""Tokens in a row no nearer than chance after which a pursuit is lost: each takes true directions along."""

_LEFT_OVER: Final = 0.5
"""Largest share of the rows that noise nobody declared may be. Of foreign and permuted rows of MiniLM the ten tokens by
chance after which a pursuit ends leave 0.90 to 0.97 (seeds 431 to 433)."""

_LEVELS: Final = tuple(10 ** (-6.5 + 0.5 * step) for step in range(13))
"""Levels of noise tried where none is declared, as shares of the rows' root mean square: from rounding to all of it."""

_SPARE: Final = 8
"""Directions that must stay open: n of `free` random ones leave sqrt(1 - n / free) of the rows, 0.15 at 344 of 352."""

_NAMED: Final = 32
"""Tokens named behind those taken."""

_NOTHING: Final = 1e-5
"""Share of the rows outside of positions and shift under which it is rounding."""


@final
@dataclass(frozen=True)
class Pursued:
    """Tokens that explain the gradients together.

    Attributes:
      tokens: ids, the strongest evidence first.
      coefficients: of each, for each row of the gradients, `(n, m)` float64: `sum B^T Delta / sigma` over occurrences.
      known: coefficients of the positions and last the shift, `(positions + 1, m)`; `(0, m)` where there are none.
      residual: share of the rows that they leave over.
      directions: of the rows above the noise, modulo the known ones.
      explained: what is left over is no more than rounding and noise, though tokens are fewer than the free directions.
      certain: of each token, that neither chance nor any other token in its place does as well.
      ranking: all tokens taken, and behind them the nearest to what is left.
      noise: standard deviation on each coordinate of the tensors under which this holds; 0: rounding alone.
    """

    tokens: tuple[int, ...]
    coefficients: Tensor
    known: Tensor
    residual: float
    directions: int
    explained: bool
    certain: tuple[bool, ...]
    ranking: tuple[int, ...]
    noise: float = 0.0

    @property
    def sure(self) -> frozenset[int]:
        """The tokens that are certain; none where the rows are not explained."""
        return frozenset(token for token, one in zip(self.tokens, self.certain, strict=True) if one and self.explained)

    @property
    def whole(self) -> bool:
        """Whether every token is certain, and nothing was lost in noise."""
        return self.noise == 0 and bool(self.tokens) and len(self.sure) == len(self.tokens)


def pursue_in_noise(dictionary: Dictionary, sent: AdapterRows, watch: Watch) -> Pursued:
    """The pursuit under the least noise that explains the rows, where none is declared.

    Args:
      dictionary: of the model.
      sent: rows of any number of rounds.
      watch: asked before each level and each token.

    Returns:
      Nothing certain if more than half of the rows is noise: then only a declared level tells signal from it.
    """
    size = float((sent.rows / sent.unit[:, None]).square().mean().sqrt())
    least, most = 0, len(_LEVELS) - 1
    best = pursue(dictionary, sent, watch, noise=_LEVELS[most] * size)
    while least < most and not watch.over:
        middle = (least + most) // 2
        found = pursue(dictionary, sent, watch, noise=_LEVELS[middle] * size)
        if found.explained:
            best, most = found, middle
        else:
            least = middle + 1
    return best if best.residual < _LEFT_OVER else replace(best, explained=False)


def pursue(
    dictionary: Dictionary, sent: AdapterRows, watch: Watch, *, noise: float = 0.0, most: int | None = None
) -> Pursued:
    """Tokens one after the other, each the one nearest to what is left of the rows' space above the noise.

    Rows are divided by their noise (rounding, and what is declared), so that pure noise has singular values under
    `sqrt(free) + sqrt(m)`; directions below that are no evidence, and a pursuit ends when no other is left.

    | rows                                | what comes back                                                         |
    |-------------------------------------|-------------------------------------------------------------------------|
    | at least as many as tokens          | all members of their span at once                                       |
    | fewer                               | the pursuit's; `explained` when nothing but noise is left               |
    | of no batch (foreign, permuted)     | not explained: no few tokens do                                         |
    | more tokens than free directions    | not explained                                                           |
    | noise                               | tokens above it; `certain` where no other token does as well            |
    | more noise than `noise` says        | not explained                                                           |

    Args:
      dictionary: of the model.
      sent: rows of any number of rounds.
      watch: asked before each token.
      noise: standard deviation on each coordinate of the tensors as observed.
      most: tokens; None: until 8 free directions are left.

    Raises:
      InvalidArgument: there are no rows, or their width is not the model's.

    Cost: O(V (d + k^2)) a token, for k directions; V d 4 bytes.

    Uniqueness: rows in general position in the span of n < free tokens lie in the span of no other n tokens, since
    that span would have to hold the whole of the first. For the worst coefficients only n < (free + k) / 2 is proved.

    Source: Davies, Eldar, "Rank awareness in joint sparse recovery", 2012 (rank-aware order-recursive matching pursuit;
    the worst case is their and Chen and Huo's, 2006); the edge of noise: Marchenko, Pastur, 1967, as in Davidson,
    Szarek, 2001, theorem II.13. That adapters' gradients are such a problem is ours.
    """
    rows = sent.rows
    require(rows.dim() == 2 and rows.shape[1] == dictionary.text.width, f"rows has shape {tuple(rows.shape)}")
    require(len(rows) > 0, "no gradient of an adapter's A to pursue")
    outside = dictionary.without_known(rows)
    if float(outside.norm()) < _NOTHING * float(rows.norm()):
        raise InvalidArgument("the gradients hold positions alone: no token's direction is in them")
    search = Search(dictionary, outside / sent.deviations(noise)[:, None])
    directions, limit = search.directions, dictionary.free - _SPARE
    most, idle = min(limit, most or limit), 0
    while search.directions and len(search.tokens) < most and idle < _IDLE_STEPS and not watch.over:
        nearer = search.step(most - len(search.tokens))
        idle = 0 if nearer else idle + 1
    return _solved(dictionary, sent, search, noise=noise, directions=directions)


def _solved(dictionary: Dictionary, sent: AdapterRows, search: Search, *, noise: float, directions: int) -> Pursued:
    """Coefficients by least squares in float64, without tokens that explain no more than chance."""
    explained = not search.directions
    gains, others = search.evidence()
    while explained and search.tokens and float(gains.min()) < search.chance():
        fewer = search.without(int(gains.argmin()))
        if fewer.directions:
            break
        search = fewer
        gains, others = search.evidence()
    order = gains.argsort(descending=True)
    tokens = [search.tokens[number] for number in order.tolist()]
    certain = (gains > search.chance()) & (gains - others > search.doubt())
    vectors = torch.cat([token_directions(dictionary.text, torch.tensor(tokens, dtype=torch.long)), dictionary.known])
    lengths = vectors.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    scaled = torch.linalg.lstsq((vectors / lengths).T, sent.rows.T, driver="gelsd").solution
    coefficients = scaled / lengths
    left = sent.rows - scaled.T @ (vectors / lengths)
    residual = float(left.norm() / dictionary.without_known(sent.rows).norm())
    return Pursued(
        tokens=tuple(tokens),
        coefficients=coefficients[: len(tokens)],
        known=coefficients[len(tokens) :],
        residual=residual,
        directions=directions,
        explained=explained and (noise > 0 or residual < _LEFT_OVER),
        certain=tuple(certain[order].tolist()),
        ranking=(*tokens, *search.nearest(_NAMED)),
        noise=noise,
    )
