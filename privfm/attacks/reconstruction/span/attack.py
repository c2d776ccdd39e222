"""The span search: texts from full gradients of the first two blocks, exactly."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, final

from torch import Generator

from privfm.attacks.reconstruction.span.descent import descend
from privfm.attacks.reconstruction.span.endings import (
    Endings,
    next_token_endings,
    read_positions,
    without_idle_repeats,
)
from privfm.attacks.reconstruction.span.layers import LayerSpan, layer_span, rounding, seen_rows
from privfm.attacks.reconstruction.span.prefixes import (
    Found,
    Limits,
    Prefix,
    Search,
    candidate_tokens,
    grow,
    leaves,
    only_repeats,
)
from privfm.attacks.reconstruction.text_models import TextModel, text_model
from privfm.checks import InvalidArgument, at_least, positive
from privfm.contracts.reconstruction import Observation, Reconstruction, ReconstructionAttack, Watch

_LEAST_BLOCKS: Final = 2
"""Block 0 tells the tokens, block 1 their order."""

_DRIFT: Final = 0.03
"""Distance that inputs may have moved over several local steps: the false ones begin at 0.1 at width 96 and above."""

_UNEXPLAINED: Final = 0.05
"""Share of the head's gradient that texts from sharp spans may leave unexplained. True ones leave 1e-7 to 1e-4."""

_UNEXPLAINED_BLURRED: Final = 0.5
"""The same for a blurred span; false texts leave more than it."""


@final
@dataclass(frozen=True)
class SpanSearch(ReconstructionAttack):
    """Finds texts whose every position lies in the spans of what the first two blocks' attention was given.

    The gradients of a block's query, key and value maps have rows in the span of its inputs. Block 0's inputs are known
    for every token at every place: those in the span are candidates. Block 1's input at a position of a causal model
    depends on the tokens up to it: prefixes grow token by token, and wrong ones leave the span at once. Ends, last
    tokens, copies and texts that are prefixes of others follow from the head (`next_token_endings`) or from the last
    block's queries (`read_positions`).

    | model, loss                                 | what it gives                                                      |
    |---------------------------------------------|--------------------------------------------------------------------|
    | decoder, next token, head's gradient sent   | whole texts, exactly; copies too where weights tell                |
    | decoder, next token, no head's gradient     | texts without their last tokens, which no other gradient holds     |
    | decoder, loss on the last position          | whole texts, exactly                                               |
    | encoder                                     | small batches, by descent; the baseline that DAGER's search is     |
    | as many distinct prefixes as the width d    | no texts: every vector lies in the span. What block 0 still tells  |
    |                                             | is a bag of tokens. Texts are exact up to d - 1 prefixes           |
    | noise, several local steps                  | texts if the head confirms them, or they stand clear of the rest;  |
    |                                             | else at most tokens                                                |
    | two blocks, loss on the last position       | texts of up to twice the heads and one token: the last block's     |
    |                                             | gradient has no more directions for a text                         |

    What no gradient tells: the whole batch repeated (a mean does not change), texts of one token under a next-token
    loss, which client a text is of, and, with rotary positions, how often a text's first token is repeated at its
    beginning where nothing else follows.

    Args:
      token_tolerance: distance from block 0's span up to which a token is a candidate, beyond what rounding or noise
        explains (`LayerSpan.measured`). Float32 gradients leave 1e-7; a token and a position that occur only apart lie
        at 1e-5 and more where a LayerNorm's bias is trained.
      sequence_tolerance: the same for prefixes and block 1.
      candidates: tokens a position, at most.
      beam: prefixes of one length, at most.
      longest: positions examined, at most.
      reserve: directions left out of a span that fills the width.
      restarts: of the encoder's descent.
      architecture: how to read a model of no known kind.

    Raises:
      InvalidArgument: a tolerance is not positive, or a cap not a whole number above 0.

    Cost: a product `V x d x rank` a position, and one pass through block 0 for each prefix with its candidates.

    Source: Petrov, Dimitrov, Baader, Mueller, Vechev, "DAGER: exact gradient inversion for large language models",
    NeurIPS 2024 (spans, tokens, greedy search, reserve of 20 directions). Stacked maps, gap rank, controls, ends and
    last tokens are ours. Tolerances lie between what was measured on true and on false tokens of random GPT-2 and
    Llama models (1e-6 and 1e-2 in block 1).
    """

    token_tolerance: float = 1e-5
    sequence_tolerance: float = 1e-4
    candidates: int = 512
    beam: int = 256
    longest: int = 128
    reserve: int = 20
    restarts: int = 64
    architecture: type[TextModel] | None = None

    def __post_init__(self) -> None:
        positive("token_tolerance", self.token_tolerance)
        positive("sequence_tolerance", self.sequence_tolerance)
        for name in ("candidates", "beam", "longest", "reserve", "restarts"):
            at_least(name, getattr(self, name), 1)

    @property
    def needs(self) -> tuple[str, ...]:
        return ("whole gradients of the first two blocks' query, key and value weights",)

    def refusal(self, observation: Observation) -> str:
        if observation.change is not None and observation.change.optimizer != "sgd":
            return (
                "optimizer='adam': its change divides each coordinate by a number of its own, so that rows no "
                "longer lie in the span of a layer's inputs; observe gradients, or clients with plain gradient descent"
            )
        try:
            text = text_model(observation.model, self.architecture)
        except InvalidArgument as reason:
            return str(reason)
        if text.depth < _LEAST_BLOCKS:
            return f"the model has {text.depth} block: order is read from the second; bags of tokens need only one"
        for number in range(_LEAST_BLOCKS):
            if not seen_rows(text.block(number).projections, observation.tensors):
                names = sorted({part.weight for part in text.block(number).projections})
                return (
                    f"nothing is seen of the gradients of {', '.join(names)} (not sent, zero or hidden): it needs "
                    "whole rows of one of block 0's and one of block 1's query, key and value maps; for clients that "
                    "train adapters alone use an attack on adapters"
                )
        return ""

    def reconstruct(self, rounds: Sequence[Observation], watch: Watch, generator: Generator) -> Reconstruction:
        (observation,) = rounds
        text = text_model(observation.model, self.architecture)
        noise = observation.declared.noise
        first, second = self._span(text, observation, 0), self._span(text, observation, 1)
        if first is None or second is None:
            raise InvalidArgument("nothing is seen of the gradients of block 0 or 1")
        limits = Limits(self.candidates, self.beam, self.longest)
        search = Search(text, self.token_tolerance, self.sequence_tolerance, limits, watch, generator)
        facts = _span_facts(first, second)
        used = ("noise",) if noise > 0 else ()
        if not text.causal:
            texts, more = descend(search, (first, second), self.restarts)
            return _result(texts, {**facts, **more}, used, watch)
        found = candidate_tokens(search, first)
        bag = frozenset(token for tokens in found.candidates for token in tokens)
        if not first.sharp and not found.apart(0):
            bag = frozenset()
        if found.candidates:
            grow(search, second, found)
        facts.update(_search_facts(found, text.positional))
        if not text.positional:
            found.nodes = without_idle_repeats(found.nodes)
        sharp = first.sharp and second.sharp
        nodes = _possible(found, second, text.positional) if sharp else list(found.nodes)
        facts["prefixes beyond the rank"] = float(len(found.nodes) - len(nodes))
        if not nodes:
            facts["reading"] = _nothing(first, second)
            return _result([], facts, used, watch, bag)
        ended = self._endings(text, observation, nodes, sharp)
        facts.update(ended.facts)
        if ended.error is not None:
            facts["head's gradient left unexplained"] = ended.error
        if not _confirmed(ended, sharp, found):
            facts["reading"] = _nothing(first, second)
            return _result([], facts, used, watch, bag)
        return _result([one for one, _ in ended.texts], facts, used, watch)

    def _span(self, text: TextModel, observation: Observation, number: int, query: bool = False) -> LayerSpan | None:
        """The span of a block's inputs, or of those that query alone; None where nothing is seen of the maps."""
        block, change = text.block(number), observation.change
        parts = block.projections[:1] if query else block.projections
        rows = seen_rows(parts, observation.gradients)
        if not rows:
            return None
        if change is None:
            return layer_span(rows, self.reserve, observation.declared.noise)
        weights, rounded = dict(text.model.named_parameters()), 0.0
        if change.subtracted:
            rounded = rounding([weights[part.weight].detach() for part in parts], change.steps, change.learning_rate)
        noise = math.hypot(observation.declared.noise / (change.learning_rate * change.weight), rounded)
        return layer_span(rows, self.reserve, noise, _DRIFT if change.steps > 1 else 0.0)

    def _endings(self, text: TextModel, observation: Observation, nodes: Sequence[Prefix], sharp: bool) -> Endings:
        """Whole texts; where ends are not determined, the longest prefixes, and why."""
        if text.head_name is not None:
            longest = [(node, 0.0) for node in leaves(nodes)]
            head = observation.tensors.get(text.head_name)
            if head is None or bool(head.isnan().any(1).all()):
                return Endings(
                    longest, {"ends": "last tokens are missing: the head's gradient was not sent, or is hidden"}
                )
            try:
                return next_token_endings(text, observation.gradients, nodes, sharp)
            except InvalidArgument as reason:
                return Endings(longest, {"ends": f"not determined: {reason}"}, error=math.inf)
        span = self._span(text, observation, text.depth - 1, query=True)
        texts, facts = read_positions(text, span, nodes, self.sequence_tolerance)
        return Endings([(one, 0.0) for one in texts], facts)


def _possible(found: Found, span: LayerSpan, positional: bool) -> list[Prefix]:
    """As many of the prefixes as there are directions, the nearest; runs of one token without positions share one."""
    shared = 0 if positional else sum(only_repeats(node) for node in found.nodes)
    return list(found.nearest(span.rank + shared))


def _confirmed(ended: Endings, sharp: bool, found: Found) -> bool:
    """Whether texts are said: they explain the head's gradient, or, where it was not sent, the spans are sure.

    A span that is not sharp is sure where what was taken stands apart from what was left, in both blocks.
    """
    if ended.error is None:
        return sharp or (found.apart(0) and found.apart(1))
    return ended.error < (_UNEXPLAINED if sharp else _UNEXPLAINED_BLURRED)


def _span_facts(first: LayerSpan, second: LayerSpan) -> dict[str, float | str]:
    return {
        "rank of block 0": float(first.rank),
        "rank of block 1": float(second.rank),
        "width": float(first.width),
        "span": "sharp" if first.sharp and second.sharp else "blurred",
    }


def _search_facts(found: Found, positional: bool) -> dict[str, float | str]:
    facts: dict[str, float | str] = {
        "candidates": float(sum(map(len, found.candidates))),
        "prefixes examined": float(found.examined),
        "prefixes": float(len(found.nodes)),
        "cut by a cap": float(found.cut),
    }
    if positional:
        facts["positions"] = float(len(found.candidates))
    for block in range(_LEAST_BLOCKS):
        facts[f"farthest taken in block {block}"] = found.accepted[block]
        facts[f"nearest left in block {block}"] = found.rejected[block]
    return facts


def _nothing(first: LayerSpan, second: LayerSpan) -> str:
    """Why there is no text."""
    if first.sharp and second.sharp:
        return (
            "no texts lie in the spans and explain the head's gradient: the gradient is of another model or loss, or "
            "there are about as many prefixes as directions"
        )
    width = second.width
    if first.sharp:
        return (
            f"block 1's span is not sharp: as many distinct prefixes as its {width} directions, noise, or steps that "
            "moved the weights. It confirms no order; block 0's span tells the tokens"
        )
    return (
        f"the spans are not sharp: as many distinct tokens as their {width} directions, noise, or steps that moved the "
        "weights, and nothing stands out far enough to be said. An attack by optimisation needs no span"
    )


def _result(
    texts: Sequence[Prefix],
    facts: Mapping[str, float | str],
    used: tuple[str, ...],
    watch: Watch,
    bag: frozenset[int] = frozenset(),
) -> Reconstruction:
    tokens = bag | {token for text in texts for token in text}
    return Reconstruction(texts=tuple(texts), tokens=tokens, used=used, facts=facts, stopped=watch.stopped)
