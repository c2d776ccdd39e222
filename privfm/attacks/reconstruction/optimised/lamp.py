"""LAMP: gradient descent on embeddings in turn with moves of tokens that a language model finds likely."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal, final

import torch
from torch import Generator, Tensor

from privfm.attacks.reconstruction.optimised.base import OptimisedAttack
from privfm.attacks.reconstruction.optimised.distances import Cosine, SquaredAndAbsolute
from privfm.attacks.reconstruction.optimised.moves import MOVES, move, rearranged
from privfm.attacks.reconstruction.optimised.priors import LanguagePrior
from privfm.attacks.reconstruction.optimised.search import Candidate, Descent, Problem, descend
from privfm.attacks.reconstruction.optimised.tag import BERT_COORDINATE
from privfm.checks import at_least, fraction, non_negative, one_of, positive
from privfm.contracts import Observation, Reconstruction, Watch

_BERT_NORM: Final = 1.4
"""Mean norm of a token embedding of BERT-base, the unit of the published penalty on norms."""

_RATE: Final = 0.01 / BERT_COORDINATE
"""The published learning rate, 0.01."""

_ABSOLUTE: Final = 0.01
"""Coefficient of the absolute values in the published L1+L2 variant, the same for all tensors."""

_PENALTIES: Final = {"cosine": 1.0, "absolute": 25.0}
"""Published coefficient of the penalty on norms (LAMP's lamp_cos.sh and lamp_l1l2.sh)."""

_PRIOR_WEIGHTS: Final = {"cosine": 0.2, "absolute": 60.0}
"""Published coefficient of the language model (the same)."""


@final
@dataclass(frozen=True, kw_only=True)
class LAMP(OptimisedAttack):
    """Embeddings that match the gradient, reordered now and then where gradient and language model agree on it.

    1. The best of `candidates` normal draws, then of `candidates` random orders of it, at the size of real embeddings.
    2. Adam on `distance + penalty (mean norm - size)^2`.
    3. From `burn_in` on, every `move_every` steps: of `moves` random moves of each text (two tokens change places, one
       moves, some in a row move, the front goes to the end) the one of least `distance + prior_weight * surprise`.
    4. The nearest tokens, by cosine, of the iterate with the least loss.

    With `alternatives`, which is ours, a fifth: from the embeddings of those tokens, at each place in turn the one of
    the nearest that gradient and language model like best, and random moves, until nothing changes.

    Of a language model the client's labels are its own next tokens: the nearest ones of the iterate, through which
    gradients flow as through a softmax over cosines (ours; the paper has classifiers alone).

    Which label belongs to which length nobody declares: each draw of 1. pairs them at random.

    Args:
      variant: `cosine` sees directions alone and works on clipped gradients; `absolute` is TAG's distance.
      prior: over the model's own tokens, public; None: moves are judged by the gradient alone.
      iterations: steps of Adam.
      candidates: of each of the two kinds at the start.
      learning_rate: in units of the root mean square coordinate of the model's token embedding; 0.01 for BERT-base.
      decay: factor on it every `decay_every` steps.
      decay_every: steps.
      penalty: on norms, for norms of BERT's 1.4; None: the variant's.
      prior_weight: None: the variant's.
      burn_in: share of the iterations before the first moves.
      move_every: steps.
      moves: tried for each text.
      alternatives: tokens tried at each place after the descent; 0: none, as published.

    Cost: as TAG's, and `2 candidates + b moves` times a forward and a backward pass at the start and in each phase of
    moves. The published settings take BERT-base minutes a batch on a GPU.

    Source: Balunovic, Dimitrov, Jovanovic, Vechev, "LAMP: extracting text from gradients with language model priors",
    NeurIPS 2022, algorithm 1; settings are those of the authors' scripts.
    """

    variant: Literal["cosine", "absolute"] = "cosine"
    prior: LanguagePrior | None = None
    iterations: int = 2000
    candidates: int = 500
    learning_rate: float = _RATE
    decay: float = 0.89
    decay_every: int = 50
    penalty: float | None = None
    prior_weight: float | None = None
    burn_in: float = 0.1
    move_every: int = 75
    moves: int = 200
    alternatives: int = 0

    def __post_init__(self) -> None:
        one_of("variant", self.variant, _PENALTIES)
        for name in ("iterations", "candidates", "decay_every", "move_every"):
            at_least(name, getattr(self, name), 1)
        at_least("moves", self.moves, 0)
        at_least("alternatives", self.alternatives, 0)
        positive("learning_rate", self.learning_rate)
        fraction("decay", self.decay)
        fraction("burn_in", self.burn_in, zero=True)
        for name in ("penalty", "prior_weight"):
            if getattr(self, name) is not None:
                non_negative(name, getattr(self, name))

    def reconstruct(self, rounds: Sequence[Observation], watch: Watch, generator: Generator) -> Reconstruction:
        distance = Cosine() if self.variant == "cosine" else SquaredAndAbsolute(_ABSOLUTE)
        problem = Problem(self._setting(rounds[0]), distance)
        accepted = dict.fromkeys(MOVES, 0)

        def between(step: int, candidate: Candidate) -> Candidate:
            due = step >= self.burn_in * self.iterations and (step + 1) % self.move_every == 0
            return self._rearrange(problem, candidate, accepted, watch, generator) if due and self.moves else candidate

        best, facts = descend(problem, self._start(problem, watch, generator), self._plan(problem), watch, between)
        if self.alternatives:
            best = self._refined(problem, best, accepted, watch, generator)
            facts["loss of the tokens"] = float(problem.loss(best))
        facts |= {f"moves accepted: {kind}": float(count) for kind, count in accepted.items()}
        found = problem.answer(best, facts, watch)
        return found if self.prior is None else replace(found, used=(*found.used, "language model"))

    def _plan(self, problem: Problem) -> Descent:
        return Descent(
            iterations=self.iterations,
            rate=self.learning_rate,
            decay=self.decay,
            decay_every=self.decay_every,
            penalty=_PENALTIES[self.variant] if self.penalty is None else self.penalty,
            size=problem.size,
            unit=_BERT_NORM,
        )

    def _start(self, problem: Problem, watch: Watch, generator: Generator) -> Candidate:
        """The best draw in its best order, at the size of real embeddings."""

        def best_of(draw: Callable[[], Candidate], best: Candidate, what: str) -> Candidate:
            least = problem.loss(best)
            for number in range(1, self.candidates):
                if watch.over:
                    break
                other = draw()
                if (loss := problem.loss(other)) < least:
                    best, least = other, loss
                watch.tell(what, number / self.candidates)
            return best

        drawn = best_of(lambda: problem.random(generator), problem.random(generator), "drawing texts")

        def reordered() -> Candidate:
            embeddings = drawn.embeddings
            for text, free in enumerate(problem.given.free):
                order = torch.randperm(int(free.sum()), generator=generator).tolist()
                embeddings = rearranged(embeddings, text, free, order)
            return replace(drawn, embeddings=embeddings)

        best = best_of(reordered, drawn, "ordering texts")
        sized = torch.nn.functional.normalize(best.embeddings, dim=-1) * problem.size
        return replace(best, embeddings=problem.with_special_tokens(sized))

    def _rearrange(
        self, problem: Problem, candidate: Candidate, accepted: dict[str, int], watch: Watch, generator: Generator
    ) -> Candidate:
        """Each text in the best of some random orders, one text after the other; the present order is one of them."""
        embeddings = candidate.embeddings
        for text, free in enumerate(problem.given.free):
            kinds = [MOVES[number % len(MOVES)] for number in range(self.moves)]
            orders = [list(range(int(free.sum())))] + [move(kind, int(free.sum()), generator) for kind in kinds]
            tried = [rearranged(embeddings, text, free, order) for order in orders]
            chosen = self._best(problem, candidate, tried, text, watch)
            embeddings = tried[chosen]
            if chosen:
                accepted[kinds[chosen - 1]] += 1
        return replace(candidate, embeddings=embeddings)

    def _refined(
        self, problem: Problem, candidate: Candidate, accepted: dict[str, int], watch: Watch, generator: Generator
    ) -> Candidate:
        """Whole tokens, changed one at a time; the places' alternatives are those of the descent's last embeddings."""
        places = problem.given.free.nonzero().tolist()
        table = problem.given.imitation.embedding
        near = [problem.alternatives(candidate.embeddings, text, place, self.alternatives) for text, place in places]
        candidate = replace(candidate, embeddings=problem.snapped(candidate.embeddings))
        changed = True
        while changed and not watch.over:
            before = candidate.embeddings
            for (text, place), tokens in zip(places, near, strict=True):
                tried = [candidate.embeddings]
                for token in tokens:
                    tried.append(candidate.embeddings.clone())
                    tried[-1][text, place] = table[token]
                best = self._best(problem, candidate, tried, text, watch)
                candidate = replace(candidate, embeddings=tried[best])
            candidate = self._rearrange(problem, candidate, accepted, watch, generator)
            changed = not torch.equal(before, candidate.embeddings)
            watch.tell("trying other tokens", 0.0)
        return candidate

    def _best(self, problem: Problem, candidate: Candidate, tried: list[Tensor], text: int, watch: Watch) -> int:
        """Which version has the least distance and surprise, of those tried in time; they differ in one text."""
        weight = _PRIOR_WEIGHTS[self.variant] if self.prior_weight is None else self.prior_weight
        added = weight * self._surprise(problem, torch.stack([each[text] for each in tried]), text)
        least, chosen = float("inf"), 0
        for number, each in enumerate(tried):
            if number and watch.over:
                break
            total = float(problem.loss(replace(candidate, embeddings=each))) + float(added[number])
            if total < least:
                least, chosen = total, number
        return chosen

    def _surprise(self, problem: Problem, embeddings: Tensor, text: int) -> Tensor:
        """Of one text's versions `(n, T, h)`: their part of the batch's mean `-ln p` a token, `(n,)`; 0 without prior.

        The other texts' parts are the same for all versions.
        """
        if self.prior is None:
            return torch.zeros(len(embeddings), dtype=torch.float64)
        given = problem.given
        tokens = problem.tokens_of(embeddings, text)
        found = self.prior.log_likelihood(tokens, given.mask[text].expand(len(tokens), -1))
        return -found / (given.mask.sum() - len(given.mask)).clamp_min(1)
