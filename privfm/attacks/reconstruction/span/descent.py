"""The span search for encoders: every position sees every other, so that whole texts are tried, not prefixes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, final

import torch
from torch import Tensor

from privfm.attacks.reconstruction.span.layers import LayerSpan
from privfm.attacks.reconstruction.span.prefixes import Found, Prefix, Search, candidate_tokens

_SWEEPS: Final = 12
"""Sweeps over all positions of one start; a text that is found is found in three to six."""

_TEXTS_A_PASS: Final = 256
"""Texts run through block 0 at once."""

_MOST_PROPOSALS: Final = 20_000
"""Texts tried in one sweep at most: some ten seconds at width 384."""


def descend(
    search: Search, spans: tuple[LayerSpan, LayerSpan], restarts: int
) -> tuple[list[Prefix], dict[str, float | str]]:
    """Texts whose every position lies in block 1's span, by coordinate descent on the mean distance over positions.

    A text ends where the closing token, the one candidate that occurs at the most last places, can stand. Starts are
    drawn from tokens that no text found so far explains. The best change of each sweep is taken, or all positions' best
    changes together where that is better.

    Meant for small batches: word plus position is additive, so that block 0 lets through tokens at places where they
    did not stand, and with them the starts that lead to texts become rare (exact at 4 texts, parts of 8).

    Args:
      search: what it goes by; `beam` caps the texts.
      spans: of blocks 0 and 1.
      restarts: random starts, at most.

    Returns:
      Texts, the nearest first, and facts.

    Source: Petrov et al., "DAGER", 2024, section 4.3, for the test of whole texts; descent, restarts and deflation in
    place of its enumeration are ours.
    """
    first, second = spans
    found = candidate_tokens(search, first)
    columns = found.candidates
    facts: dict[str, float | str] = {"candidates": float(sum(map(len, columns))), "cut by a cap": float(found.cut)}
    closing, ends = _ends(columns)
    if not (first.sharp and second.sharp) or closing is None:
        facts["reading"] = "the spans tell no texts: noise, as many inputs as directions, or no token that closes texts"
        return [], {**facts, "prefixes examined": 0.0}
    texts: dict[Prefix, float] = {}
    for start in range(restarts):
        open_ends = [end for end in ends if not any(len(one) - 1 == end for one in texts)] or ends
        if search.watch.over or len(texts) >= search.limits.beam or not _unexplained(columns, closing, texts):
            break
        end = open_ends[int(torch.randint(len(open_ends), (1,), generator=search.generator))]
        one, away = _one_descent(search, second, _Start(columns, closing, end, texts), found)
        if one and not search.watch.over:
            _, blur = _mean_distances(search, second, [one])
            if away < search.sequence_tolerance + float(blur[0]):
                texts[one] = away
        search.watch.tell("restarts", start / restarts)
    facts["prefixes examined"] = float(found.examined)
    facts["tokens left unexplained"] = float(_unexplained(columns, closing, texts)) if closing is not None else 0.0
    return sorted(texts, key=lambda one: texts[one]), facts


@final
@dataclass(frozen=True)
class _Start:
    columns: Sequence[Sequence[int]]
    closing: int
    end: int
    texts: dict[Prefix, float]

    def choices(self, position: int) -> list[int]:
        return [token for token in self.columns[position] if token != self.closing]

    def fresh(self, position: int) -> list[int]:
        """Choices that no text found so far has there."""
        taken = {one[position] for one in self.texts if position < len(one)}
        return [token for token in self.choices(position) if token not in taken] or self.choices(position)


def _ends(columns: Sequence[Sequence[int]]) -> tuple[int | None, list[int]]:
    """The token that closes texts, and the places where it can stand.

    It is a candidate at the last place of the longest text; of several, the one that is a candidate most often.
    """
    if not columns:
        return None, []
    counts = {token: sum(token in column for column in columns) for token in columns[-1]}
    closing = max(counts, key=lambda token: (counts[token], -token))
    ends = [place for place, column in enumerate(columns) if closing in column and place > 0]
    return (closing, ends) if ends else (None, [])


def _unexplained(columns: Sequence[Sequence[int]], closing: int, texts: dict[Prefix, float]) -> int:
    """Candidates, closing ones left out, that no text found has at their place or elsewhere."""
    said = {token for one in texts for token in one}
    return sum(token not in said for column in columns for token in column if token != closing)


def _one_descent(search: Search, span: LayerSpan, start: _Start, found: Found) -> tuple[Prefix, float]:
    """Where a random start leads to, and its mean distance."""
    pools = [start.fresh(place) for place in range(start.end)]
    if not all(pools):
        return (), 1.0
    drawn = [pool[int(torch.randint(len(pool), (1,), generator=search.generator))] for pool in pools]
    current, best = [*drawn, start.closing], 1.0
    for _ in range(_SWEEPS):
        changes = [
            (place, token) for place in range(start.end) for token in start.choices(place) if token != current[place]
        ][:_MOST_PROPOSALS]
        proposals = [current] + [_with(current, place, token) for place, token in changes]
        away, _ = _mean_distances(search, span, proposals)
        found.examined += len(away)
        best = float(away[0])
        if len(away) < len(proposals) or len(away) == 1:
            break
        nearest: dict[int, tuple[float, int]] = {}
        for (place, token), value in zip(changes, away[1:].tolist(), strict=True):
            nearest[place] = min(nearest.get(place, (best, current[place])), (value, token))
        together = [nearest[place][1] if place in nearest else token for place, token in enumerate(current)]
        options = [proposals[int(away.argmin())], together]
        values = [float(away.min()), float(_mean_distances(search, span, [together])[0][0])]
        if min(values) >= best:
            break
        best, current = min(zip(values, options, strict=True))
    return tuple(current), best


def _with(tokens: Sequence[int], place: int, token: int) -> list[int]:
    return [*tokens[:place], token, *tokens[place + 1 :]]


def _mean_distances(search: Search, span: LayerSpan, texts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Means over positions of distance and blur, of equally long texts; fewer when the time is up."""
    away: list[Tensor] = []
    blur: list[Tensor] = []
    for part in torch.split(torch.tensor([list(one) for one in texts]), _TEXTS_A_PASS):
        for kept, found in zip((away, blur), span.measured(search.text.inputs(1, part)), strict=True):
            kept.append(found.mean(1))
        if search.watch.over:
            break
    return torch.cat(away), torch.cat(blur)
