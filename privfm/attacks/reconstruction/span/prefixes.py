"""A causal model's texts as a tree of prefixes: each node is a prefix whose last position lies in block 1's span."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, final

import torch
from torch import Generator, Tensor

from privfm.attacks.reconstruction.architectures import given_to
from privfm.attacks.reconstruction.span.layers import LayerSpan
from privfm.attacks.reconstruction.text_models import TextModel
from privfm.contracts.reconstruction import Watch

Prefix = tuple[int, ...]

_POSITIONS_A_PASS: Final = 8192
"""Positions computed at once: some 100 MB of activations at width 768."""

_TABLE: Final = 16384
"""Rows of the vocabulary's table in float64 at once: 100 MB at width 768."""

_CONTROLS: Final = 64
"""Random tokens tried as extensions beside the candidates: enough for a median and a deviation of distances."""

_IDLE: Final = 8
"""Positions for which runs of the first token alone are followed: under rotary positions every such run lies in the
span as soon as its token does."""

_APART: Final = 2.0
"""Ratio of the nearest distance left to the farthest taken from which on a blurred span is believed: noise that drowns
some of the true ones leaves no such gap."""

_SAME: Final = 1e-4
"""Relative difference under which two ways through the model in float32 compute the same."""


@final
@dataclass(frozen=True)
class Limits:
    """What a search may take: no gradient, however noisy, makes it explode.

    Attributes:
      candidates: tokens a position, at most.
      beam: prefixes of one length, at most.
      longest: positions, at most.
    """

    candidates: int
    beam: int
    longest: int


@final
@dataclass(frozen=True)
class Search:
    """What a search goes by.

    Attributes:
      text: the model.
      token_tolerance: of a sharp span of block 0.
      sequence_tolerance: of a sharp span of block 1.
      limits: caps.
      watch: time.
      generator: of every draw.
    """

    text: TextModel
    token_tolerance: float
    sequence_tolerance: float
    limits: Limits
    watch: Watch
    generator: Generator


@final
@dataclass
class Found:
    """What a search has found so far.

    Attributes:
      nodes: prefixes, shorter ones first, each with the largest distance on the way to it.
      candidates: tokens by position (one list for all positions where position does not matter).
      examined: prefixes run through block 0.
      cut: how often a cap took something away.
      accepted: largest distance taken, in block 0 and in block 1.
      rejected: smallest distance not taken, in block 0 and in block 1.
    """

    nodes: dict[Prefix, float] = field(default_factory=dict)
    candidates: list[list[int]] = field(default_factory=list)
    examined: int = 0
    cut: int = 0
    accepted: list[float] = field(default_factory=lambda: [0.0, 0.0])
    rejected: list[float] = field(default_factory=lambda: [1.0, 1.0])

    def nearest(self, most: int) -> dict[Prefix, float]:
        """As many prefixes as there can be, the nearest ones; a prefix comes with those that lead to it.

        In a span that all but fills the width, some false prefixes are near by chance.
        """
        order = sorted(self.nodes, key=lambda node: (self.nodes[node], len(node)))
        kept = set(order[:most])
        return {node: away for node, away in self.nodes.items() if node in kept}

    def apart(self, layer: int) -> bool:
        """Whether what was taken and what was left lie clearly apart."""
        return self.rejected[layer] > _APART * self.accepted[layer]

    def note(self, layer: int, distances: Tensor, taken: Tensor) -> None:
        """Keeps the margin's two sides."""
        if bool(taken.any()):
            self.accepted[layer] = max(self.accepted[layer], float(distances[taken].max()))
        if not bool(taken.all()):
            self.rejected[layer] = min(self.rejected[layer], float(distances[~taken].min()))


def candidate_tokens(search: Search, span: LayerSpan) -> Found:
    """Tokens whose input to block 0 lies in its span, nearest first, for each position until one has none.

    One list alone where block 0 is given the same at any position (rotary embeddings). None at all where more tokens
    than directions lie in the span: a norm without a shift puts all inputs on one hyperplane, and a batch that fills it
    leaves a span that is sharp and holds every token.

    Cost: one table of the vocabulary and a product with the span a position.

    Source: Petrov et al., 2024, section 4.2.
    """
    found, text, limits = Found(), search.text, search.limits
    positions = min(limits.longest, text.most_positions or limits.longest) if text.positional else 1
    for position in range(positions):
        if search.watch.over:
            break
        away, blur = _vocabulary_distances(text, span, position)
        taken = span.taken(away, blur, search.token_tolerance, controls=away)
        found.note(0, away, taken)
        if not bool(taken.any()):
            break
        if int(taken.sum()) > span.rank:  # so many tokens are no witnesses: the span holds whatever there is
            found.candidates.clear()
            break
        tokens = taken.nonzero()[:, 0]
        tokens = tokens[away[tokens].argsort(stable=True)]
        found.cut += int(len(tokens) > limits.candidates)
        found.candidates.append(tokens[: limits.candidates].tolist())
        search.watch.tell("candidates of positions", position / positions)
    return found


def _vocabulary_distances(text: TextModel, span: LayerSpan, position: int) -> tuple[Tensor, Tensor]:
    away: list[Tensor] = []
    blur: list[Tensor] = []
    for tokens in torch.split(torch.arange(text.vocabulary), _TABLE):
        rows = text.first_inputs(tokens, torch.full_like(tokens, position)).float()
        for kept, part in zip((away, blur), span.measured(rows), strict=True):
            kept.append(part)
    return torch.cat(away), torch.cat(blur)


def grow(search: Search, span: LayerSpan, found: Found) -> Found:
    """All prefixes whose every position lies in block 1's span, by length: causality lets each be tested by itself.

    Args:
      search: what it goes by.
      span: of block 1.
      found: with the candidates; nodes are added to it.

    Cost: one pass through block 0 for every prefix of a length, all its candidates side by side.

    Source: Petrov et al., 2024, section 4.3 and algorithm 2 (greedy for decoders). Candidates side by side, and
    controls, are ours.
    """
    text, limits = search.text, search.limits
    extend = extension_inputs if side_by_side(text) else one_by_one
    alive: list[Prefix] = [()]
    idle = 0
    for position in range(min(limits.longest, text.most_positions or limits.longest)):
        tokens = _candidates_at(text, found, position)
        idle = idle + 1 if position > 1 and all(only_repeats(node) for node in alive) else 0
        if not tokens or not alive or idle > _IDLE or search.watch.over:
            break
        controls = [] if span.sharp else _controls(text, search.generator)
        measured, blur = _extension_distances(search, span, extend, alive, tokens + controls)
        away, drawn = measured[:, : len(tokens)], measured[:, len(tokens) :]
        found.examined += away.numel()
        # Among many continuations few are true, and they are the fairer controls: their tokens are in block 0's span.
        fair = away if away.numel() >= _CONTROLS else drawn
        taken = span.taken(away, blur[:, : len(tokens)], search.sequence_tolerance, fair.flatten())
        found.note(1, away, taken)
        rows, columns = taken.nonzero(as_tuple=True)
        order = away[rows, columns].argsort(stable=True)
        found.cut += int(len(order) > limits.beam)
        grown = {}
        for k in order[: limits.beam].tolist():
            before = alive[int(rows[k])]
            farthest = max(found.nodes.get(before, 0.0), float(away[rows[k], columns[k]]))
            grown[(*before, tokens[int(columns[k])])] = farthest
        alive = sorted(grown)
        found.nodes.update((node, grown[node]) for node in alive)
        search.watch.tell("prefixes", position / max(len(found.candidates), position + 1))
    return found


def _candidates_at(text: TextModel, found: Found, position: int) -> list[int]:
    if not text.positional:
        return found.candidates[0] if found.candidates else []
    return found.candidates[position] if position < len(found.candidates) else []


def _controls(text: TextModel, generator: Generator) -> list[int]:
    drawn: list[int] = torch.randint(text.vocabulary, (_CONTROLS,), generator=generator).tolist()
    return drawn


Extend = Callable[[TextModel, int, Tensor, Tensor], Tensor]
"""`(text, block, prefixes (n, p), tokens (k,)) -> (n, k, d)`: block's input at the last position."""


def _extension_distances(
    search: Search, span: LayerSpan, extend: Extend, prefixes: Sequence[Prefix], tokens: list[int]
) -> tuple[Tensor, Tensor]:
    """Distances and blur of each token behind each prefix, `(prefixes, tokens)`; fewer rows when the time is up."""
    heads, last = torch.tensor(prefixes, dtype=torch.long), torch.tensor(tokens)
    away: list[Tensor] = []
    blur: list[Tensor] = []
    for part in torch.split(heads, max(1, _POSITIONS_A_PASS // (heads.shape[1] + len(tokens)))):
        inputs = extend(search.text, 1, part, last)
        for kept, found in zip((away, blur), span.measured(inputs), strict=True):
            kept.append(found)
        if search.watch.over:
            break
    return torch.cat(away), torch.cat(blur)


def only_repeats(node: Prefix) -> bool:
    """Whether a prefix is one token again and again, from the second time on."""
    return len(node) > 1 and len(set(node)) == 1


def extension_inputs(text: TextModel, number: int, prefixes: Tensor, tokens: Tensor) -> Tensor:
    """What a block's attention is given at the last position of every prefix continued by every token, `(n, k, d)`.

    The tokens of one prefix stand side by side at one position, and none sees another: one pass through the model's
    own code with a mask of that form, instead of k passes over the whole prefix.

    Args:
      text: a causal model.
      number: of the block.
      prefixes: `(n, p)`, p may be 0.
      tokens: `(k,)`.
    """
    (count, length), tried = prefixes.shape, len(tokens)
    rows = torch.cat([prefixes, tokens.expand(count, tried)], 1)
    sees = torch.eye(length + tried, dtype=torch.bool)
    sees[:, :length] = torch.arange(length + tried)[:, None] >= torch.arange(length)
    weight = text.embedding.weight
    mask = torch.zeros(sees.shape, dtype=weight.dtype).masked_fill(~sees, torch.finfo(weight.dtype).min)
    places = torch.cat([torch.arange(length), torch.full((tried,), length)])
    found = given_to(
        text.block(number).module,
        text.root,
        input_ids=rows.to(text.device),
        attention_mask=mask[None, None].expand(count, 1, -1, -1).to(text.device),
        position_ids=places.expand(count, -1).to(text.device),
    )
    return found[:, length:].cpu()


def one_by_one(text: TextModel, number: int, prefixes: Tensor, tokens: Tensor) -> Tensor:
    """The same, each continuation a text of its own."""
    count, tried = len(prefixes), len(tokens)
    rows = torch.cat([prefixes.repeat_interleave(tried, 0), tokens.repeat(count)[:, None]], 1)
    parts = [text.inputs(number, part)[:, -1] for part in torch.split(rows, max(1, _POSITIONS_A_PASS // rows.shape[1]))]
    return torch.cat(parts).view(count, tried, -1)


def side_by_side(text: TextModel) -> bool:
    """Whether this model's code takes a mask by which continuations stand side by side: tried on a probe."""
    prefixes = torch.tensor([[4, 3, 5], [2, 6, 4]]) % text.vocabulary
    tokens = torch.tensor([5, 7, 2]) % text.vocabulary
    try:
        together = extension_inputs(text, 1, prefixes, tokens)
    except (TypeError, ValueError, RuntimeError, IndexError):
        return False
    alone = one_by_one(text, 1, prefixes, tokens)
    return float((together - alone).norm()) < _SAME * float(alone.norm())


def leaves(nodes: Sequence[Prefix]) -> list[Prefix]:
    """Prefixes that none of the others continues, in their order."""
    inner = {node[:-1] for node in nodes}
    return [node for node in nodes if node not in inner]
