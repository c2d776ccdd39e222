"""Which token comes next: rank-aware pursuit over the vocabulary in rows whose noise is known."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from math import log, sqrt
from typing import Final, final

import torch
from torch import Tensor

from privfm.attacks.reconstruction.bags import known_directions, token_directions
from privfm.attacks.reconstruction.text_models import TextModel

_MEMBER: Final = 1e-4
"""1 - cos^2 under which a token is taken without a contest; the float32 products are off by some 1e-6."""

_DOUBT: Final = 1e-3
"""Chance at which a token may be named that is not there, under the noise that is declared or found."""

_EDGE: Final = 1.05
"""Factor on the mean of the largest singular value of pure noise, `sqrt(free) + sqrt(m)`, whose spread is under 2 %."""

_BENEATH: Final = 0.3
"""Of that edge: directions of the rows that are weaker carry nothing but noise, and are not followed."""

_RIVALS: Final = 3
"""Other tokens that are weighed exactly against each one taken: float32 names the nearest."""

_BLOCK: Final = 8192
"""Vocabulary rows prepared at a time in float64."""


@final
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
            self.rows[tokens] = self.exactly(tokens).float()

    def without_known(self, vectors: Tensor) -> Tensor:
        """The part of vectors `(n, d)` outside of the known directions."""
        found: Tensor = vectors - (vectors @ self.basis.T) @ self.basis
        return found

    def exactly(self, tokens: Tensor) -> Tensor:
        """The directions of tokens `(n,)` in float64: `(n, d)`, of length 1, or 0 without a direction (padding)."""
        vectors = self.without_known(token_directions(self.text, tokens))
        lengths = vectors.norm(dim=1, keepdim=True)
        return torch.where(lengths > 1e-9, vectors / lengths.clamp_min(1e-9), torch.zeros_like(vectors))


@final
class Search:
    """What has been taken, and what is left of rows and dictionary.

    Args:
      dictionary: of the model.
      rows: `(m, d)` outside of the known directions, each divided by the standard deviation of its coordinates.
      tokens: taken beforehand.
    """

    def __init__(self, dictionary: Dictionary, rows: Tensor, tokens: Sequence[int] = ()) -> None:
        self.dictionary, self.whole, self.tokens = dictionary, rows, list(tokens)
        vectors = dictionary.exactly(torch.tensor(self.tokens, dtype=torch.long))
        self.basis = torch.linalg.qr(vectors.T)[0].T
        left, sizes, space = torch.linalg.svd(self._without(rows), full_matrices=False)
        kept = sizes > _BENEATH * self.edge
        self.mixing, self.space = left[:, kept] * sizes[kept], space[kept]
        self.products = dictionary.rows @ self.space.float().T  # of every token with what is left of the space
        self.real = dictionary.rows.square().sum(1) > 0.5  # padding may be zero
        self.outside = self.real.float() - (dictionary.rows @ self.basis.float().T).square().sum(1)
        self.usable = self.real.clone()
        self.usable[self.tokens] = False

    def _without(self, vectors: Tensor) -> Tensor:
        for _ in range(2):  # once leaves rounding behind
            vectors = vectors - (vectors @ self.basis.T) @ self.basis
        return vectors

    @property
    def left(self) -> int:
        """Free directions of the input that nothing taken fills."""
        return self.dictionary.free - len(self.basis)

    @property
    def edge(self) -> float:
        """Singular value that noise alone does not reach."""
        return _EDGE * (sqrt(max(self.left, 0)) + sqrt(len(self.whole)))

    @cached_property
    def _above(self) -> tuple[Tensor, Tensor]:
        """Directions of what is left above the noise: `(k, q)` as mixtures of the space, and a weight each `(q,)`."""
        left, sizes, _ = torch.linalg.svd(self.mixing @ self.space, full_matrices=False)
        kept = sizes > self.edge
        return self.mixing.T @ (left[:, kept] / sizes[kept]), 1 - (self.edge / sizes[kept]).square()

    @property
    def directions(self) -> int:
        """Number of these; 0: noise is all that is left."""
        return len(self._above[1])

    def step(self, most: int) -> bool:
        """Takes the nearest token, or all members at once, up to so many; whether it was nearer than by chance."""
        mixtures, weights = self._above
        scores = (self.products @ mixtures.float()).square() @ weights.float()
        scores /= self.outside.clamp_min(1e-3)  # nearly inside what was taken: no evidence
        scores[~self.usable] = -1.0
        best = float(scores.max())
        count, unlikely = len(weights), log(len(scores))
        by_chance = (count + 2 * sqrt(count * unlikely) + 2 * unlikely) / max(self.left, 1)
        members = (scores > 1 - _MEMBER).nonzero()[:, 0].tolist()[: min(count, most)]
        for token in members or [int(scores.argmax())]:
            self._take(token)
        self.__dict__.pop("_above", None)
        return best > min(by_chance, 1 - _MEMBER)

    def _take(self, token: int) -> None:
        self.usable[token] = False
        vector = self._without(self.dictionary.exactly(torch.tensor([token])))[0]
        if float(vector.norm()) < 1e-6:  # float64: a duplicate of tokens taken
            return
        vector = vector / vector.norm()
        self.basis = torch.cat([self.basis, vector[None]])
        along = self.space @ vector
        product = self.dictionary.rows @ vector.float()
        self.products -= product[:, None] * along.float()
        self.outside -= product.square()
        self.space = self.space - along[:, None] * vector
        self.tokens.append(token)

    def without(self, number: int) -> Search:
        """The same without the token of this number."""
        return Search(self.dictionary, self.whole, [one for place, one in enumerate(self.tokens) if place != number])

    # ----------------------------------------------------------------------------------------------- evidence

    def chance(self) -> float:
        """What the best of all tokens explains of pure noise, except once in a thousand cases.

        Source: Laurent, Massart, "Adaptive estimation of a quadratic functional", 2000, lemma 1, over V tokens.
        """
        count, unlikely = len(self.whole), log(len(self.outside) / _DOUBT)
        return count + 2 * sqrt(count * unlikely) + 2 * unlikely

    def doubt(self) -> float:
        """By how much a token must explain more than any other in its place: likelihoods V / 0.001 to 1."""
        return 2 * log(len(self.outside) / _DOUBT)

    def evidence(self) -> tuple[Tensor, Tensor]:
        """What each token taken explains beside the others, squared, in units of the noise: `(n,)`; and its best rival.

        A rival t' takes the place of t while the others stay: with q the unit vector of t outside of the others, and
        R the rows left over, it explains `|R t' + (Y q)(q t')|^2 / |t' outside of the others|^2`.
        """
        none = torch.zeros(0, dtype=torch.float64)
        if not self.tokens:
            return none, none
        vectors = self.dictionary.exactly(torch.tensor(self.tokens))
        duals = torch.linalg.pinv(vectors).T
        duals = duals / duals.norm(dim=1, keepdim=True)
        explained = duals @ self.whole.T  # (n, m)
        left = self._without(self.whole)
        gains = explained.square().sum(1)
        products = self.dictionary.rows @ left.float().T
        along = self.dictionary.rows @ duals.float().T
        crossed = products @ explained.float().T
        scores = products.square().sum(1, keepdim=True) + 2 * along * crossed + along.square() * gains.float()
        scores /= (self.outside.clamp_min(0)[:, None] + along.square()).clamp_min(1e-6)
        scores[~self.real] = -1.0
        scores[self.tokens] = -1.0
        rivals = scores.topk(min(_RIVALS, len(scores)), dim=0).indices.T
        others = [
            self._instead(rivals[number], duals[number], explained[number], left) for number in range(len(self.tokens))
        ]
        return gains, torch.stack(others)

    def _instead(self, rivals: Tensor, dual: Tensor, explained: Tensor, left: Tensor) -> Tensor:
        """The most that one of a few rivals explains in the place of a token, in float64."""
        vectors = self.dictionary.exactly(rivals)
        along, outside = vectors @ dual, self._without(vectors).square().sum(1)
        found: Tensor = (vectors @ left.T + along[:, None] * explained).square().sum(1)
        return (found / (outside + along.square()).clamp_min(1e-12)).max()

    def nearest(self, count: int) -> tuple[int, ...]:
        """Tokens not taken that explain most of what is left, noise included."""
        scores = (self.products @ self.mixing.float().T).square().sum(1) / self.outside.clamp_min(1e-3)
        scores[~self.usable] = -1.0
        return tuple(scores.topk(min(count, int(self.usable.sum()))).indices.tolist())
