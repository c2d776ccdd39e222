"""Where texts end in a tree of prefixes, and with which tokens: what the head, or the last block's queries, say of it.

Under a next-token loss no gradient reaches a text's last token: it is seen as a target alone. The tree's states are
all known, so that the head's gradient is linear in what is not: which tokens follow each prefix, and how often.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, final

import torch
from torch import Tensor, nn

from privfm.attacks.reconstruction.architectures import asleep
from privfm.attacks.reconstruction.span.layers import LayerSpan
from privfm.attacks.reconstruction.span.prefixes import Prefix, leaves, only_repeats
from privfm.attacks.reconstruction.target_tokens import targets_by_state
from privfm.attacks.reconstruction.text_models import TextModel
from privfm.checks import InvalidArgument

_LEAST_SHARE: Final = 0.05
"""Of the median weight of a prefix: what is less is no text. Clipped clients' weights differ by less than that."""

_LEAST_BLURRED: Final = 0.5
"""The same where noise or drift of states is on the weights: texts of less than this are lost, false ones kept out."""

_OVER_NOISE: Final = 8.0
"""Times the rounding of a state's solved targets that a weight must have."""

_WHOLE: Final = 0.05
"""Distance from a whole number up to which a ratio of weights is one."""

_MOST_COPIES: Final = 64
"""Ratios of weights above this are no count of equal texts."""

_BATCH: Final = 16
"""Texts run through the whole model at once."""


@final
@dataclass(frozen=True)
class Endings:
    """Whole texts.

    Attributes:
      texts: each with its weight in the gradient (0 where it is not known), the surest first.
      facts: how they were found.
      error: relative difference between the observed gradient of the head and that of these texts under these weights;
        None where nothing was compared.
    """

    texts: list[tuple[Prefix, float]]
    facts: Mapping[str, float | str] = field(default_factory=dict)
    error: float | None = None


def padded(texts: Sequence[Prefix]) -> tuple[Tensor, Tensor]:
    """Token ids `(b, T)` padded with 0 on the right, and their mask."""
    longest = max(map(len, texts))
    tokens = torch.tensor([list(text) + [0] * (longest - len(text)) for text in texts])
    mask = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in texts])
    return tokens, mask


def prefixes_of(texts: Sequence[Prefix]) -> dict[Prefix, tuple[int, int]]:
    """Where each prefix stands first: text and position."""
    found: dict[Prefix, tuple[int, int]] = {}
    for row, text in enumerate(texts):
        for place in range(len(text)):
            found.setdefault(text[: place + 1], (row, place))
    return found


def without_idle_repeats(nodes: Mapping[Prefix, float]) -> dict[Prefix, float]:
    """Prefixes without runs of the first token that lead nowhere.

    With rotary positions attention over equal tokens gives the same for any number of them, in every block: `a`,
    `a a`, `a a a` have one state, and no gradient tells how many there were unless something else follows.
    """
    leading = {node[:k] for node in nodes if len(set(node)) > 1 for k in range(1, len(node))}
    return {node: away for node, away in nodes.items() if not only_repeats(node) or node in leading}


# ------------------------------------------------------------------------------------------------ next-token losses


def next_token_endings(
    text: TextModel, gradients: Mapping[str, Tensor], nodes: Sequence[Prefix], sharp: bool = True
) -> Endings:
    """Texts of a next-token loss with their last tokens, copies and texts that are prefixes of others, from the head.

    A prefix u that c texts hold has weight c/N (N positions with a loss), its next tokens' weights add up to that, and
    what a next token has beyond the prefix that it leads to ends there. All are read off the head's gradient
    (`targets_by_state`). A prefix of weight zero without continuation is no text's and is dropped.

    Head and embedding tied: rows of input tokens hold the embedding's own gradient too. They are left out first; what
    then is missing at a prefix is a last token among them, found by the residual along the prefix's state and
    confirmed by computing the whole gradient.

    | case                                          | result                                                       |
    |-----------------------------------------------|--------------------------------------------------------------|
    | the whole batch twice                         | once: a mean loss does not change                            |
    | texts of one token                            | nothing: they have no loss                                   |
    | rows of an untied head hidden (NaN)           | texts that end with one of their tokens are left out         |
    | clients clipped one by one, mean over texts   | weights are whatever they are; copies are not counted unless |
    |                                               | all are multiples of the least                               |

    Args:
      text: the model.
      gradients: by parameter name.
      nodes: prefixes found; false ones among them do no harm.
      sharp: gradients are exact to rounding.

    Raises:
      InvalidArgument: more prefixes than the head is wide, or their states are dependent; the head is hidden.

    Cost: one forward pass over the texts, and `V x h x prefixes`.

    Source: ours.
    """
    name = text.head_name
    if name is None or name not in gradients:
        raise InvalidArgument("the head's gradient was not sent")
    tree = _Tree.of(text, nodes)
    tied = name == text.embedding_name
    mixed = torch.zeros(text.vocabulary, dtype=torch.bool)
    if tied:
        mixed[torch.tensor(sorted({node[-1] for node in nodes}))] = True
    head = gradients[name][: text.vocabulary].cpu()
    read = targets_by_state(head, tree.states, tree.said, mixed)
    if float(read.weights.max()) <= 0:
        raise InvalidArgument("no prefix found has a weight in the head's gradient")
    scale = float(read.weights[read.weights > read.weights.max() * _LEAST_SHARE].median())
    least = torch.maximum(
        torch.tensor((_LEAST_SHARE if sharp else _LEAST_BLURRED) * scale, dtype=torch.float64), _OVER_NOISE * read.noise
    )
    ends, missing = tree.leftovers(read.weights, read.targets, least)
    facts: dict[str, float | str] = {
        "weightless prefixes": float((read.weights < least).sum()),
        "head": "tied" if tied else "its own",
    }
    hidden = float(sum(missing.values()) / scale) if missing and not tied else 0.0
    if missing and tied:
        ends, rounds = _tied_endings(text, head, tree, ends, missing)
        facts["tied last tokens"], facts["tied rounds"] = float(sum(missing.values()) / scale), float(rounds)
    texts = sorted((((*node, token), weight) for (node, token), weight in ends.items()), key=lambda one: -one[1])
    counted, error = _copies(text, name, gradients[name].cpu(), texts)
    if hidden:  # texts are missing by right: how much the others explain is no measure of them
        return Endings(counted, {**facts, "texts whose last token is hidden": hidden}, None)
    return Endings(counted, facts, error)


@final
@dataclass(frozen=True)
class _Tree:
    """Prefixes with the model's state and probabilities at each; prefixes of one state are one.

    Attributes:
      nodes: one for each state.
      index: of every prefix's state.
      states: what the head is given, `(n, h)`.
      said: probabilities of the next token, `(n, V)`.
    """

    nodes: list[Prefix]
    index: dict[Prefix, int]
    states: Tensor
    said: Tensor

    @staticmethod
    def of(text: TextModel, nodes: Sequence[Prefix]) -> _Tree:
        texts = leaves(nodes)
        places = prefixes_of(texts)
        states, logits = head_inputs(text, texts)
        first: dict[Prefix, int] = {}
        kept: list[Prefix] = []
        index = {}
        for node in sorted(places, key=lambda one: (len(one), one)):
            key = node[:1] if only_repeats(node) and not text.positional else node
            if key not in first:
                first[key] = len(kept)
                kept.append(node)
            index[node] = first[key]
        rows = torch.tensor([places[node] for node in kept])
        chosen = logits[rows[:, 0], rows[:, 1], : text.vocabulary].double()
        return _Tree(kept, index, states[rows[:, 0], rows[:, 1]].double(), chosen.softmax(-1))

    def repeats(self, node: Prefix) -> bool:
        """Whether a prefix has the state of the one before it: one token again and again, without positions."""
        return len(node) > 1 and self.index[node] == self.index[node[:-1]]

    def leftovers(
        self, weights: Tensor, targets: Tensor, least: Tensor
    ) -> tuple[dict[tuple[Prefix, int], float], dict[int, float]]:
        """What ends: weight by prefix and last token; and, by state, what no row that was read accounts for."""
        after, known = targets.clone(), ~targets.isnan()
        rest = weights - torch.where(known, targets, 0.0).sum(1)
        for node, row in self.index.items():
            if len(node) < 2 or self.repeats(node):
                continue
            # Behind a run of one token, whose prefixes share a state, the run's own steps are accounted for as well.
            steps = [(node[-1], 1), (node[0], len(node) - 2)] if self.repeats(node[:-1]) else [(node[-1], 1)]
            for token, times in steps:
                before = self.index[node[:-1]]
                if bool(known[before, token]):
                    after[before, token] -= times * weights[row]
                else:
                    rest[before] -= times * weights[row]
        rows, tokens = (after > least[:, None]).nonzero(as_tuple=True)
        ends = {
            (self.nodes[int(row)], int(token)): float(after[row, token])
            for row, token in zip(rows, tokens, strict=True)
        }
        hidden = bool((~known).any())
        short = {int(row): float(rest[row]) for row in (rest > least).nonzero()[:, 0]} if hidden else {}
        return ends, short


def head_inputs(text: TextModel, texts: Sequence[Prefix]) -> tuple[Tensor, Tensor]:
    """What the head is given and what it says: `(b, T, h)` and `(b, T, V)`, by the model's own code."""
    head: Any = text.model.get_output_embeddings()  # type: ignore[operator]
    tokens, mask = padded(texts)
    seen: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda _, given: seen.append(given[0].cpu()))
    logits = []
    try:
        with torch.no_grad(), asleep(text.model):
            for part, seen_part in zip(torch.split(tokens, _BATCH), torch.split(mask, _BATCH), strict=True):
                output = text.model(input_ids=part.to(text.device), attention_mask=seen_part.to(text.device))
                logits.append(output.logits.cpu())
    finally:
        hook.remove()
    return torch.cat(seen), torch.cat(logits)


_TIED_ROUNDS: Final = 6
"""Guesses of tied last tokens, each corrected by the gradient computed from the one before."""


def _tied_endings(
    text: TextModel,
    head: Tensor,
    tree: _Tree,
    ends: dict[tuple[Prefix, int], float],
    missing: Mapping[int, float],
) -> tuple[dict[tuple[Prefix, int], float], int]:
    """Last tokens that also occur as inputs, where head and embedding are one matrix.

    The embedding's own part of their rows follows from the texts, and hence from the guess: guess, compute the whole
    gradient, and read what is left along the states of the prefixes that lack an end.
    """
    seen = ~head.isnan()
    observed = head.double().where(seen, 0.0)
    rows = sorted(missing)
    mixed = sorted({node[-1] for node in tree.index})
    inverse = torch.linalg.pinv(tree.states[rows])  # (h, rows)
    guess: dict[tuple[Prefix, int], float] = {}
    amounts = torch.zeros(len(rows), len(mixed), dtype=torch.float64)
    best: tuple[float, dict[tuple[Prefix, int], float]] | None = None
    turns = 0
    for _ in range(_TIED_ROUNDS):
        turns += 1
        together = {**ends, **guess}
        computed = weighted_gradient(text, together, [text.embedding_name])[text.embedding_name] if together else None
        left = observed if computed is None else observed - computed.double()
        left = left.where(seen, 0.0)
        error = float(left.norm() / observed.norm())
        if best is not None and error >= best[0]:
            break
        best = (error, together)
        amounts -= (left[mixed] @ inverse).T
        chosen = {}
        for k, row in enumerate(rows):
            for place, weight in _fill(amounts[k], missing[row]):
                chosen[(tree.nodes[row], mixed[place])] = weight
        if chosen == guess:
            break
        guess = chosen
        amounts = torch.zeros_like(amounts)
        for (node, token), weight in guess.items():
            amounts[rows.index(tree.index[node]), mixed.index(token)] = weight
    return (best[1] if best is not None else ends), turns


def _fill(amounts: Tensor, total: float) -> list[tuple[int, float]]:
    """The largest amounts until they make up the total."""
    chosen: list[tuple[int, float]] = []
    left = total
    for place in amounts.argsort(descending=True).tolist():
        if left < _LEAST_SHARE * total or (chosen and float(amounts[place]) < _LEAST_SHARE * total):
            break
        weight = min(float(amounts[place]), left)
        chosen.append((place, weight if weight > 0 else left))
        left -= chosen[-1][1]
    if chosen:
        scale = total / sum(weight for _, weight in chosen)
        chosen = [(place, weight * scale) for place, weight in chosen]
    return chosen


def weighted_gradient(
    text: TextModel, ends: Mapping[tuple[Prefix, int], float], names: Sequence[str]
) -> dict[str, Tensor]:
    """The gradient of `sum weight * next-token loss` over whole texts, of the parameters of these names."""
    texts = [(*node, token) for node, token in ends]
    tokens, mask = padded(texts)
    tokens, mask = tokens.to(text.device), mask.to(text.device)
    factors = torch.tensor(list(ends.values()), device=text.device)
    parameters = dict(text.model.named_parameters())
    wanted = [parameters[name] for name in names]
    total = [torch.zeros_like(parameter) for parameter in wanted]
    parts = zip(*(torch.split(one, _BATCH) for one in (tokens, mask, factors)), strict=True)
    frozen = [parameter for parameter in wanted if not parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        with torch.enable_grad(), asleep(text.model):
            for part, seen, factor in parts:
                logits = text.model(input_ids=part, attention_mask=seen).logits[:, :-1]
                each = nn.functional.cross_entropy(logits.transpose(1, 2), part[:, 1:], reduction="none")
                loss = (each * seen[:, 1:] * factor[:, None]).sum()
                for sum_, one in zip(total, torch.autograd.grad(loss, wanted), strict=True):
                    sum_ += one
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
    return {name: one.cpu() for name, one in zip(names, total, strict=True)}


def _copies(
    text: TextModel, name: str, gradient: Tensor, texts: list[tuple[Prefix, float]]
) -> tuple[list[tuple[Prefix, float]], float | None]:
    """Texts as often as their weights say, if all are multiples of the least; and how well they explain the head."""
    if not texts:
        return texts, None
    unit = min(weight for _, weight in texts)
    ratios = [weight / unit for _, weight in texts]
    whole = all(abs(ratio - round(ratio)) < _WHOLE and round(ratio) <= _MOST_COPIES for ratio in ratios)
    computed = weighted_gradient(text, {(node[:-1], node[-1]): weight for node, weight in texts}, [name])[name]
    seen = ~gradient.isnan()
    observed = gradient.double().where(seen, 0.0)
    error = float((observed - computed.double().where(seen, 0.0)).norm() / observed.norm())
    if not whole:
        return texts, error
    return [one for one, ratio in zip(texts, ratios, strict=True) for _ in range(round(ratio))], error


# --------------------------------------------------------------------------------------------- losses on a whole text


def read_positions(
    text: TextModel, span: LayerSpan | None, nodes: Sequence[Prefix], tolerance: float
) -> tuple[list[Prefix], dict[str, float | str]]:
    """Texts of a loss on the last position: prefixes whose last position queries in the last block.

    Behind it only the position that the head reads has a gradient, so that the last block's query gradient spans the
    texts' ends alone: this finds a text that is a prefix of another, and drops branches that end nowhere.

    Args:
      text: the model.
      span: of the last block's query gradient; None where it was not sent.
      nodes: prefixes found.
      tolerance: of a sharp span.

    Returns:
      Texts, and facts. Where every prefix queries (a mean over positions), or the span is not sharp, the texts are
      those that nothing continues.

    Source: ours.
    """
    longest = leaves(nodes)
    if span is None or not span.sharp or not nodes:
        return longest, {"ends": "the longest prefixes: the last block's queries tell nothing"}
    places = prefixes_of(longest)
    tokens, mask = padded(longest)
    inputs = text.inputs(text.depth - 1, tokens, mask)
    order = sorted(places, key=lambda one: (len(one), one))
    rows = torch.tensor([places[node] for node in order])
    away, blur = span.measured(inputs[rows[:, 0], rows[:, 1]].double())
    near = span.taken(away, blur, tolerance, controls=away)
    reading = {node for node, fits in zip(order, near.tolist(), strict=True) if fits}
    inner = [node for node in order if node not in set(longest)]
    if inner and all(node in reading for node in inner if len(node) > 1):
        return longest, {"ends": "the longest prefixes: every position is read"}
    found = [node for node in order if node in reading or (len(node) == 1 and node in set(longest))]
    return found, {"ends": "queries of the last block", "branches dropped": float(len(set(longest) - set(found)))}
