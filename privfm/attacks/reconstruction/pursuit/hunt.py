"""The search over a whole batch: rounds of seeds, from cheap to thorough, each using what the last has proven."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Final, final

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from privfm.attacks.reconstruction.pursuit.acceptance import as_text, need, outside, united
from privfm.attacks.reconstruction.pursuit.atoms import Atoms, Heads, blocks
from privfm.attacks.reconstruction.pursuit.beam import Supports, pursue
from privfm.attacks.reconstruction.pursuit.token_gradients import TokenGradients, position_shares
from privfm.attacks.reconstruction.pursuit.witnesses import Witness
from privfm.contracts.reconstruction import Watch

Text = tuple[int, ...]


@final
@dataclass(frozen=True)
class Round:
    """How far one round goes.

    Args:
      beam: hypotheses a seed.
      group: tokens whose gains are summed: the seed and those with the most similar value gradients.
      sure: share of its gradient at one position from which a token is taken to occur once; None: every token may
        stand everywhere.
      second: largest share at a second position of such a token.
      places: positions that it may stand at.
    """

    beam: int
    group: int = 1
    sure: float | None = None
    second: float = 0.35
    places: int = 2


_PLAN: Final = (
    Round(beam=2, sure=0.6),
    Round(beam=4, sure=0.6),
    Round(beam=4, group=3, sure=0.6, places=3),
    Round(beam=6, group=2, sure=0.7, second=0.3, places=5),
    Round(beam=4),
    Round(beam=6, group=2),
    Round(beam=16),
    Round(beam=64),
    Round(beam=48, group=2),
)
"""Rounds, chosen on batches of 8 to 32 texts other than those of the tables in the documentation."""

_REPEATS: Final = 3
"""Times a round is run while it finds new texts."""

_WORK: Final = 60_000
"""Gains computed at once, hypotheses times atoms: some 15 MB a block of arrays."""

_SEEDS: Final = 24
"""Seeds that move together at most: what they find spares the others of the same texts."""

_SLIGHT: Final = 0.1
"""Share at a position under which a token that occurs once does not stand there."""

_NEEDED: Final = 5.0
"""A text's least needed token must hold this many times the residual that is accepted."""

_SECONDED: Final = 2
"""Tokens whose gradients must lie in a text's span where no other layer can be asked: the seed and one it never saw."""

_SHARP: Final = 1e-3
"""Residual accepted above which tokens' vouching does not outweigh a witness: noise widens what a token accepts."""

_LONELY: Final = 20.0
"""As `_NEEDED`, of a text that the seed alone vouches for: true texts of MiniLM have 50 and more."""

_MARGIN: Final = 6.0
"""A seed goes on until its residual is this far under the tolerance, or half as far under what its error allows."""

_BLUR: Final = 0.02
"""Relative error of a token's gradient from which it is no seed."""

_CERTAIN: Final = 3.0
"""Standard deviations of its error that a token's gradient may lie outside of a right span."""


@final
@dataclass(frozen=True)
class Sentence:
    """One text.

    Attributes:
      text: token ids.
      residual: of the seed that found it.
      distance: by the witness; NaN without one.
    """

    text: Text
    residual: float
    distance: float


@final
@dataclass
class Hunt:
    """State of the search.

    Args:
      heads: keys and queries of the model.
      shares: each token's and position's gradients.
      errors: relative error of each token's gradient, `(T,)`.
      tolerance: residual accepted where rounding and noise are smaller.
      first: token at position 0 of every text.
      last: token that ends every text; None: told by the first texts that are found.
      witness: the independent check; None where no layer has one.
      examples: number of texts, where the witness tells it.
      watch: ends the search.
    """

    heads: Heads
    shares: TokenGradients
    errors: Tensor
    tolerance: float
    first: int
    last: int | None
    witness: Witness | None
    examples: int | None
    watch: Watch
    found: dict[Text, Sentence] = field(default_factory=dict)
    proven: dict[int, Text] = field(default_factory=dict)
    refused: set[Text] = field(default_factory=set)
    spans: dict[Text, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.index = {int(token): row for row, token in enumerate(self.shares.tokens.tolist())}
        self.rows = blocks(self.shares.of_tokens, self.heads.heads)
        self.limits = (_CERTAIN * self.errors).clamp_min(self.tolerance)
        self.enough = (_CERTAIN / 2 * self.errors).clamp_min(self.tolerance / _MARGIN)
        self.explained: set[int] = set()

    # ------------------------------------------------------------------------------------------------ the plan

    def run(self) -> None:
        """All rounds, until nothing is left to explain or the time is up."""
        if len(self.shares.of_positions) < 2:
            return  # noise leaves nothing but the first position, at which no text differs from another
        for number, step in enumerate(_PLAN):
            for _ in range(_REPEATS):
                if self.done():
                    return
                self.watch.tell(f"{len(self.found)} texts, round {number + 1}", number / len(_PLAN))
                if not self._round(step, first_time=number == 0):
                    break
        self._deflated()

    def done(self) -> bool:
        """Whether to stop: time, as many texts as there are, or no token whose gradient is not explained."""
        if self.watch.over:
            return True
        if self.examples is not None and len(self.found) >= self.examples:
            return True
        return bool(self.found) and not self._open()

    def _open(self) -> list[int]:
        """Tokens whose gradient the texts found do not explain, as far as that can be told."""
        return [token for token in self.index if token not in self.explained and not self._special(token)]

    def _special(self, token: int) -> bool:
        return token in (self.first, self.last)

    def _round(self, step: Round, first_time: bool) -> int:
        """Seeds in portions: what one finds spares the others of the same text. Returns the number of new texts."""
        free = [token for token in self.index if token not in self.proven]
        atoms, once = self._atoms(step, free)
        if not len(atoms):
            return 0
        inside = Counter(token for text in self.found for token in set(text))
        pool = once if step.sure is not None else free
        seeds = [token for token in pool if self._usable(token) and (first_time or not inside[token])]
        if step.sure is None and not seeds:
            seeds = [token for token in pool if self._usable(token)]
        portion = max(1, min(_SEEDS, _WORK // (step.beam * step.group * len(atoms))))
        before = len(self.found)
        waiting = self._spread_out(seeds)
        while waiting and not self.done():
            now, waiting = waiting[:portion], waiting[portion:]
            self._try(atoms, now, step)
            waiting = [token for token in waiting if token not in self.proven and token not in self.explained]
        return len(self.found) - before

    def _usable(self, token: int) -> bool:
        return (
            not self._special(token) and token not in self.explained and float(self.errors[self.index[token]]) < _BLUR
        )

    def _try(self, atoms: Atoms, seeds: Sequence[int], step: Round) -> None:
        rows = [self._group(token, step.group) for token in seeds]
        own = [self.index[token] for token in seeds]
        result = pursue(
            atoms,
            self.rows[torch.tensor(rows)],
            beam=step.beam,
            enough=self.enough[own],
            floor=self.errors[own].square(),
            watch=self.watch,
        )
        self._take(atoms, seeds, result)

    def _group(self, token: int, size: int) -> list[int]:
        """Rows of the token and of those whose value gradients point its way: mostly of the same text."""
        row = self.index[token]
        if size == 1:
            return [row]
        values = normalize(self.shares.of_tokens[:, 2], dim=1)
        likeness = values @ values[row]
        for other, at in self.index.items():
            if at == row or self._special(other) or other in self.proven:
                likeness[at] = 2.0 if at == row else -2.0
        return likeness.topk(min(size, len(likeness))).indices.tolist() + [row] * max(0, size - len(likeness))

    def _spread_out(self, seeds: Sequence[int]) -> list[int]:
        """The seeds in an order whose beginnings hold tokens of different texts: each far, by its value gradient."""
        if len(seeds) < 3:
            return list(seeds)
        values = normalize(self.shares.of_tokens[[self.index[token] for token in seeds], 2], dim=1)
        likeness = values @ values.T
        order, nearest = [0], likeness[0].clone()
        nearest[0] = torch.inf
        for _ in range(len(seeds) - 1):
            following = int(nearest.argmin())
            order.append(following)
            nearest = torch.maximum(nearest, likeness[following])
            nearest[following] = torch.inf
        return [seeds[place] for place in order]

    # ------------------------------------------------------------------------------------------------- atoms

    def _atoms(self, step: Round, free: Sequence[int]) -> tuple[Atoms, list[int]]:
        """The pairs that a round tries, and the tokens that seem to occur once."""
        places = len(self.shares.of_positions)
        rows = [self.index[token] for token in free]
        left = self.shares.of_positions.clone()
        for token, text in self.proven.items():
            if text.count(token) == 1:
                left[text.index(token)] -= self.shares.of_tokens[self.index[token]]
        standing = position_shares(self.shares.of_tokens[rows], left)
        pairs: list[tuple[int, int]] = []
        once = []
        for row, token in enumerate(free):
            if token == self.first:
                continue
            sizes, order = standing[row, 1:].sort(descending=True)
            single = len(sizes) == 1 or (step.sure is not None and bool(sizes[1] < step.second))
            if step.sure is not None and single and bool(sizes[0] > step.sure) and token != self.last:
                once.append(token)
                some = [rank for rank in range(min(step.places, len(sizes))) if rank == 0 or sizes[rank] > _SLIGHT]
                pairs += [(token, int(order[rank]) + 1) for rank in some]
            else:
                pairs += [(token, place) for place in range(1, places)]
        tokens, positions = torch.tensor(pairs, dtype=torch.long).view(-1, 2).unbind(1)
        return Atoms(self.heads, tokens, positions, self.first), once

    # -------------------------------------------------------------------------------------------- acceptance

    def _take(self, atoms: Atoms, seeds: Sequence[int], result: Supports, held: bool = False) -> None:
        spelt = []
        for token, residual, support in zip(seeds, result.residuals, result.atoms, strict=True):
            if residual < float(self.limits[self.index[token]]):
                holders = [text for text in self.found if token in text] if held else []
                text = as_text(atoms, support, self.first, self.last, holders)
                if text is not None and token in text:
                    spelt.append((residual, token, text))
        if self.last is None and spelt:
            self._learn_the_end([text for _, _, text in spelt])
        for residual, token, text in sorted(spelt):
            known = text in self.found or (self._fits(text) and self._certain(text, token, residual, held))
            if known and not held:
                self.proven.setdefault(token, text)
        if spelt:
            self._explain()

    def _learn_the_end(self, texts: Sequence[Text]) -> None:
        """The token that ends most of the texts: they end alike where the tokenizer closes every text."""
        (token, times), *_ = Counter(text[-1] for text in set(texts)).most_common(1)
        if 2 * times > len(set(texts)):
            self.last = token

    def _fits(self, text: Text) -> bool:
        return self.last is None or (text[-1] == self.last and text.count(self.last) == 1)

    def _certain(self, text: Text, seed: int, residual: float, held: bool) -> bool:
        """Whether a text is taken: every token needed, and seen by another layer or else by a second token."""
        if text in self.refused:
            return False
        span = self.spans[text] = self.heads.span(text)
        members = [token for token in dict.fromkeys(text) if not self._special(token)]
        rows = [self.index[token] for token in members]
        away = outside(span, self.rows[rows])
        own = [place for place, row in enumerate(rows) if float(away[place]) < float(self.limits[row])]
        distance = self.witness.distance(text) if self.witness is not None else float("nan")
        limit = float(self.limits[self.index[seed]])
        least = inf if held else need(self.heads, text, self.rows[[rows[place] for place in own] or [self.index[seed]]])
        if least <= _NEEDED * limit or not self._confirmed(distance, len(own), limit, least):
            self.refused.add(text)
            return False
        self.found[text] = Sentence(text, residual, distance)
        for place in own:
            self.proven.setdefault(members[place], text)
        return True

    def _confirmed(self, distance: float, own: int, limit: float, least: float) -> bool:
        """Whether the witness, or without one the gradients of `own` tokens of the text, confirm a text."""
        if self.witness is not None and not distance < self.witness.tolerance and own > _SECONDED and limit <= _SHARP:
            self._give_up_witness()
        if self.witness is not None:
            return distance < self.witness.tolerance
        return own >= _SECONDED or (own == 1 and _LONELY * limit < least < inf)

    def _give_up_witness(self) -> None:
        """A witness is wrong that denies a text for which three tokens vouch: what it refused may come again.

        Dropout does this (deeper layers were given what nobody can compute again), and a layer whose outputs' gradients
        are multiples of each other, so that its rows mix the texts.
        """
        self.witness, self.examples = None, None
        self.refused.clear()

    def _explain(self) -> None:
        """Notes the tokens whose gradient lies in the span of all texts found that hold them."""
        width = self.rows.shape[-1]
        for token in self._open():
            held = [text for text in self.found if token in text]
            if token in self.proven or sum(map(len, held)) >= width - 2:  # so many texts explain any gradient
                self.explained.add(token)
            elif held:
                row = self.index[token]
                away = outside(united([self.spans[text] for text in held]), self.rows[row : row + 1])
                if float(away) < float(self.limits[row]):
                    self.explained.add(token)

    # --------------------------------------------------------------------------------------------- deflation

    def _deflated(self) -> None:
        """Seeds that also stand in texts found already, whose spans are taken out first."""
        width = self.rows.shape[-1]
        for beam in (4, 16):
            if self.done():
                return
            free = [token for token in self.index if token not in self.proven]
            atoms, _ = self._atoms(Round(beam=beam), free)
            seeds = [token for token in free if self._usable(token) and 0 < self._held(token) < width // 2]
            if not len(atoms) or not seeds:
                return
            portion = max(1, min(_SEEDS, _WORK // (beam * len(atoms))))
            for start in range(0, len(seeds), portion):
                if self.done():
                    return
                now = seeds[start : start + portion]
                rows = torch.tensor([self.index[token] for token in now])
                spans = [united([self.spans[text] for text in self.found if token in text]) for token in now]
                deepest = max(span.shape[1] for span in spans)
                held = torch.stack([pad(span, (0, 0, 0, deepest - span.shape[1])) for span in spans])
                result = pursue(
                    atoms,
                    self.rows[rows][:, None],
                    beam=beam,
                    enough=self.enough[rows],
                    floor=self.errors[rows].square(),
                    watch=self.watch,
                    held=held,
                )
                self._take(atoms, now, result, held=True)

    def _held(self, token: int) -> int:
        """Directions a head of the texts found that hold a token."""
        return sum(len(text) for text in self.found if token in text)
