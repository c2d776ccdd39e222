"""Which tokens are behind adapters' gradients, from fewer directions than there are tokens.

The gradient of A is `scaling B^T Delta^T X`: r combinations of the inputs X of the layer, and with a frozen backbone
the first attention's inputs are the same in every round. Modulo the known positions and the norm's shift each input is
a multiple of its token's direction, so that all rows of all rounds are combinations of the *same* few columns of a
known dictionary: a joint sparse recovery. As soon as the rows number as many as the tokens, membership in their span
tells; far below that, rank-aware pursuit finds the tokens all the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, final

import torch
from torch import Tensor

from privfm.attacks.reconstruction.bags import known_directions, token_directions
from privfm.attacks.reconstruction.text_models import TextModel
from privfm.checks import InvalidArgument, require
from privfm.contracts import Observation, Watch

_EXPLAINED: Final = 1e-4
"""Share of the rows left over at which they are explained. Float32 gradients end at 2e-7, one token short at 1e-2."""

_FINEST: Final = 1e-6
"""Share below which nothing but rounding of float32 is left, and tokens with smaller gradients are not seen."""

_ROUNDING: Final = 1e-5
"""Directions weaker than this share of the strongest are not told from rounding of float32 gradients."""

_WHITE: Final = 1e-2
"""Directions of the residual rows, orthonormal before tokens were taken out, that are shorter than this are spent."""

_MEMBER: Final = 1e-4
"""1 - cos^2 under which a token is taken without a contest; the float32 products are off by some 1e-6."""

_IDLE: Final = 1e-6
"""Share of the rows under which what a token explains is rounding: it was taken by mistake."""

_SPARE: Final = 8
"""Directions that must stay open: n of `free` random ones leave sqrt(1 - n / free) of the rows, 0.15 at 344 of 352."""

_BLOCK: Final = 8192
"""Vocabulary rows prepared at a time in float64."""


@final
@dataclass(frozen=True)
class Pursued:
    """Tokens that explain the gradients together.

    Attributes:
      tokens: ids in the order in which they were found.
      coefficients: of each, for each row of the gradients, `(n, m)` float64: `sum B^T Delta / sigma` over occurrences.
      known: coefficients of the positions and last the shift, `(positions + 1, m)`; `(0, m)` where there are none.
      residual: share of the rows that they leave over.
      directions: of the rows, modulo the known ones.
      free: directions of the input that the known ones leave.
      sure: nothing is left over, though tokens are fewer than the free directions: chance leaves much.
    """

    tokens: tuple[int, ...]
    coefficients: Tensor
    known: Tensor
    residual: float
    directions: int
    free: int
    sure: bool


@final
@dataclass(frozen=True)
class AdapterRows:
    """Gradients of all A that read one block's attention input.

    Attributes:
      rows: `(m, d)` float64; each matrix divided by its norm; rounds in order, and query, key, value in each.
      of_values: `(m,)` whether a row is of a value map's own adapter.
    """

    rows: Tensor
    of_values: Tensor


def adapter_rows(text: TextModel, rounds: Sequence[Observation], block: int = 0) -> AdapterRows:
    """The rows of all rounds; matrices that were not sent, are hidden in part, or are zero are left out.

    Args:
      text: the model of any of the rounds.
      rounds: observed.
      block: number of the block.
    """
    query, key, value = (part.lora_a for part in text.block(block).projections)
    rows, of_values = [torch.zeros(0, text.width, dtype=torch.float64)], [torch.zeros(0, dtype=torch.bool)]
    for one in rounds:
        tensors = one.gradients
        for name in dict.fromkeys((query, key, value)):
            if (
                name is not None
                and name in tensors
                and bool(tensors[name].isfinite().all())
                and bool(tensors[name].any())
            ):
                found = tensors[name].detach().cpu().double()
                rows.append(found / found.norm())
                of_values.append(torch.full((len(found),), name == value and name not in (query, key)))
    return AdapterRows(torch.cat(rows), torch.cat(of_values))


class Dictionary:
    """Every token's direction at the first attention, modulo the known ones: unit rows, float32.

    Args:
      text: the model.
      positions: that texts may reach.
    """

    def __init__(self, text: TextModel, positions: int) -> None:
        self.text = text
        known = known_directions(text, positions)
        self.known = torch.zeros(0, text.width, dtype=torch.float64) if known is None else known
        lengths = self.known.norm(dim=1)
        _, values, rows = torch.linalg.svd(self.known[lengths > 0] / lengths[lengths > 0, None], full_matrices=False)
        self.basis = rows[values > 1e-12]  # float64: a shift of zeros, or equal positions, add no direction
        self.free = text.width - len(self.basis)
        self.rows = torch.zeros(text.vocabulary, text.width)
        for start in range(0, text.vocabulary, _BLOCK):
            tokens = torch.arange(start, min(start + _BLOCK, text.vocabulary))
            self.rows[tokens] = _unit(self.without_known(token_directions(text, tokens))).float()

    def without_known(self, vectors: Tensor) -> Tensor:
        """The part of vectors `(n, d)` outside of the known directions."""
        found: Tensor = vectors - (vectors @ self.basis.T) @ self.basis
        return found


def pursue(dictionary: Dictionary, rows: Tensor, watch: Watch, most: int | None = None) -> Pursued:
    """Tokens one after the other, each the one nearest to what is left of the rows' space.

    | rows                                | what comes back                                                         |
    |-------------------------------------|-------------------------------------------------------------------------|
    | at least as many as tokens          | all members of their span at once                                       |
    | fewer                               | the pursuit's; `sure` when they explain every row                       |
    | of no batch (foreign, permuted)     | not sure: no few tokens explain them                                    |
    | more tokens than `free`             | not sure                                                                |
    | a token with 1e-5 of the gradient   | may be lost in float32's rounding                                       |

    Args:
      dictionary: of the model.
      rows: `(m, d)` float64, of any number of rounds.
      watch: asked before each token.
      most: tokens; None: until 8 free directions are left.

    Raises:
      InvalidArgument: there are no rows, or their width is not the model's.

    Cost: O(V (d + k^2)) a token, for k directions; V d 4 bytes.

    Uniqueness: rows in general position in the span of n < free tokens lie in the span of no other n tokens, since
    that span would have to hold the whole of the first. For the worst coefficients only n < (free + k) / 2 is proved.

    Source: Davies, Eldar, "Rank awareness in joint sparse recovery", 2012 (rank-aware order-recursive matching pursuit;
    the worst case is their and Chen and Huo's, 2006). That adapters' gradients are such a problem is ours.
    """
    require(rows.dim() == 2 and rows.shape[1] == dictionary.text.width, f"rows has shape {tuple(rows.shape)}")
    require(len(rows) > 0, "no gradient of an adapter's A to pursue")
    outside = dictionary.without_known(rows) / rows.norm()
    _, values, space = torch.linalg.svd(outside, full_matrices=False)
    if float(values[0]) < _ROUNDING:
        raise InvalidArgument("the gradients hold positions alone: no token's direction is in them")
    space = space[values > _ROUNDING * values[0]]
    limit = dictionary.free - _SPARE
    search = _Search(dictionary, outside, space)
    most = min(limit, most or limit)
    while search.residual > _EXPLAINED and len(search.tokens) < most and not watch.over:
        if not search.step():
            break
    search.finish(most)
    return _solved(dictionary, rows, search.tokens, len(space))


class _Search:
    """What has been taken, and what is left of rows and dictionary."""

    def __init__(self, dictionary: Dictionary, rows: Tensor, space: Tensor) -> None:
        self.dictionary, self.rows, self.space = dictionary, rows, space
        self.tokens: list[int] = []
        self.products = dictionary.rows @ space.float().T  # of every token with what is left of the space
        self.outside = dictionary.rows.square().sum(1)  # what is left of every token, squared; 1, or 0 of padding
        self.usable = self.outside > 0.5
        self.whole = float(rows.norm())

    @property
    def residual(self) -> float:
        """Share of the rows left over."""
        return float(self.rows.norm()) / self.whole

    def step(self) -> bool:
        """Takes the nearest token, or all members at once; False when nothing is left to take."""
        left, sizes, _ = torch.linalg.svd(self.space, full_matrices=False)
        kept = sizes > _WHITE
        if not bool(kept.any()):
            return False
        unit = self.products @ (left[:, kept] / sizes[kept]).float()
        scores = unit.square().sum(1) / self.outside.clamp_min(1e-3)  # nearly inside what was taken: no evidence
        scores[~self.usable] = -1.0
        members = (scores > 1 - _MEMBER).nonzero()[:, 0].tolist()
        taken = 0
        for token in members[: int(kept.sum())] or [int(scores.argmax())]:
            taken += self._take(token)
        return taken > 0

    def finish(self, most: int) -> None:
        """Goes on below what counts as explained: tokens with small gradients each take most of what is left."""
        while _FINEST < self.residual < _EXPLAINED and len(self.tokens) < most:
            tokens, before = list(self.tokens), self.residual
            if not self.step() or self.residual > before / 2:
                self.tokens = tokens  # rounding is left: no token takes half of it
                return

    def _take(self, token: int) -> bool:
        self.usable[token] = False
        vector = self.dictionary.without_known(token_directions(self.dictionary.text, torch.tensor([token])))[0]
        vector = vector / vector.norm()
        for taken in (self._basis(), self._basis()):  # twice: once leaves rounding behind
            vector = vector - (vector @ taken.T) @ taken
        if float(vector.norm()) < 1e-6:  # float64: a duplicate of tokens taken
            return False
        vector = vector / vector.norm()
        self.directions = torch.cat([self._basis(), vector[None]])
        along = self.space @ vector
        product = self.dictionary.rows @ vector.float()
        self.products -= product[:, None] * along.float()
        self.outside -= product.square()
        self.space = self.space - along[:, None] * vector
        self.rows = self.rows - (self.rows @ vector)[:, None] * vector
        self.tokens.append(token)
        return True

    def _basis(self) -> Tensor:
        found: Tensor = getattr(self, "directions", self.rows.new_zeros(0, self.rows.shape[1]))
        return found


def _solved(dictionary: Dictionary, rows: Tensor, tokens: list[int], directions: int) -> Pursued:
    """Coefficients by least squares in float64; tokens that explain nothing are left out, once."""
    kept = list(tokens)
    for _ in range(2):
        vectors = torch.cat([token_directions(dictionary.text, torch.tensor(kept, dtype=torch.long)), dictionary.known])
        lengths = vectors.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
        scaled = torch.linalg.lstsq((vectors / lengths).T, rows.T, driver="gelsd").solution
        share = scaled[: len(kept)].norm(dim=1) / rows.norm()
        if not kept or bool((share > _IDLE).all()):
            break
        kept = [token for token, one in zip(kept, share.tolist(), strict=True) if one > _IDLE]
    residual = float((rows - scaled.T @ (vectors / lengths)).norm() / dictionary.without_known(rows).norm())
    coefficients = scaled / lengths
    return Pursued(
        tokens=tuple(kept),
        coefficients=coefficients[: len(kept)],
        known=coefficients[len(kept) :],
        residual=residual,
        directions=directions,
        free=dictionary.free,
        sure=residual < _EXPLAINED and len(kept) <= dictionary.free - _SPARE,
    )


def _unit(vectors: Tensor) -> Tensor:
    """Rows of length 1; those without a direction stay zero."""
    lengths = vectors.norm(dim=1, keepdim=True)
    return torch.where(lengths > 1e-9, vectors / lengths.clamp_min(1e-9), torch.zeros_like(vectors))
