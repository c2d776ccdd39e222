"""The common part of TAG and LAMP: embeddings that are moved until their gradient is the observed one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite
from typing import Final, final

import torch
from torch import Generator, Tensor, nn

from privfm.attacks.reconstruction.optimised.distances import GradientDistance
from privfm.attacks.reconstruction.optimised.setting import Setting
from privfm.contracts import Reconstruction, Watch

_LABEL_RATE: Final = 0.1
"""Learning rate of label logits that are optimised too; TAG's, for everything it optimises."""

_SOFT: Final = 0.1
"""Temperature of the cosines through which a language model's next tokens follow the embeddings; ours."""


@final
@dataclass(frozen=True)
class Candidate:
    """Texts that are being tried.

    Attributes:
      embeddings: `(b, T, h)`, special tokens and padding included.
      labels: logits `(b, classes)`; of labels that are known, far apart. Of a language model `(b, 0)`.
    """

    embeddings: Tensor
    labels: Tensor


@final
class Problem:
    """The matching problem of one observation.

    Args:
      given: what is known.
      distance: between gradients.

    Attributes:
      scale: root mean square of a coordinate of the token embedding: the unit of steps.
      size: mean norm of a row of the token embedding.
      joint: labels are looked for too.
    """

    def __init__(self, given: Setting, distance: GradientDistance) -> None:
        self.given, self.distance = given, distance
        table = given.imitation.embedding
        self.scale, self.size = float(table.square().mean().sqrt()), float(table.norm(dim=1).mean())
        self._directions = nn.functional.normalize(table[given.allowed], dim=1)
        self._fixed = table[given.fixed]
        self.joint = given.labels is None and not given.imitation.language_model

    def with_special_tokens(self, embeddings: Tensor) -> Tensor:
        """Free places as given, special tokens and padding in theirs."""
        return torch.where(self.given.free[..., None], embeddings, self._fixed)

    def loss(self, candidate: Candidate, differentiable: bool = False) -> Tensor:
        """Distance of its gradient from the observed one."""
        imitation = self.given.imitation
        texts, labels = candidate.embeddings, candidate.labels
        targets = self._next_tokens(texts) if imitation.language_model else labels.softmax(-1)
        found = imitation.gradients(texts, self.given.mask, targets, differentiable)
        return self.distance(found, self.given.observed)

    def tokens(self, embeddings: Tensor) -> Tensor:
        """The allowed token of the largest cosine at every free place, `(b, T)`; padding is 0."""
        nearest = self.given.allowed[self._cosines(embeddings).argmax(-1)]
        return torch.where(self.given.free, nearest, self.given.fixed)

    def tokens_of(self, embeddings: Tensor, text: int) -> Tensor:
        """The same of several versions `(n, T, h)` of one text: `(n, T)`."""
        nearest = self.given.allowed[self._cosines(embeddings).argmax(-1)]
        return torch.where(self.given.free[text], nearest, self.given.fixed[text])

    def random(self, generator: Generator) -> Candidate:
        """Standard normal embeddings; known labels in a random order, for nobody says which text has which."""
        given, table = self.given, self.given.imitation.embedding
        drawn = torch.randn(self._fixed.shape, generator=generator).to(table)
        count, classes = len(given.mask), 0 if given.imitation.language_model else given.imitation.classes
        if given.labels is None:
            labels = torch.randn(count, classes, generator=generator).to(table)
        else:
            order = torch.randperm(count, generator=generator)
            hot = nn.functional.one_hot(torch.tensor(given.labels)[order], classes).to(table)
            labels = torch.zeros_like(hot).masked_fill(hot == 0, -torch.inf)
        return Candidate(self.with_special_tokens(drawn), labels)

    def alternatives(self, embeddings: Tensor, text: int, place: int, count: int) -> list[int]:
        """The `count` allowed tokens of the largest cosine at one place, the nearest first."""
        cosines = self._cosines(embeddings[text, place])
        nearest = self.given.allowed[cosines.topk(min(count, len(cosines))).indices]
        return [int(token) for token in nearest]

    def snapped(self, embeddings: Tensor) -> Tensor:
        """The nearest tokens' own embeddings, `(b, T, h)`."""
        return self.with_special_tokens(self.given.imitation.embedding[self.tokens(embeddings)])

    def answer(self, candidate: Candidate, facts: dict[str, float | str], watch: Watch) -> Reconstruction:
        """The nearest tokens, texts with the larger mean cosine first."""
        given, tokens = self.given, self.tokens(candidate.embeddings)
        cosines = self._cosines(candidate.embeddings).amax(-1)
        sure = (cosines * given.free).sum(1) / given.free.sum(1).clamp_min(1)
        order = sure.argsort(descending=True, stable=True).tolist()
        lengths = given.mask.sum(1).tolist()
        texts = tuple(tuple(tokens[row, : lengths[row]].tolist()) for row in order)
        labels = None if given.imitation.language_model else candidate.labels.argmax(-1)[order]
        return Reconstruction(
            texts=texts,
            tokens=frozenset(token for text in texts for token in text),
            labels=None if labels is None else tuple(labels.tolist()),
            used=given.used,
            facts={**given.facts, "mean cosine": float(sure.mean()), **facts},
            stopped=watch.stopped,
        )

    def _cosines(self, embeddings: Tensor) -> Tensor:
        return nn.functional.normalize(embeddings, dim=-1) @ self._directions.T

    def _next_tokens(self, embeddings: Tensor) -> Tensor:
        """One-hot `(b, T, V)` of the nearest tokens, with the derivative of a softmax over cosines."""
        count = self.given.imitation.classes
        hard = nn.functional.one_hot(self.tokens(embeddings.detach()), count).to(embeddings)
        if not embeddings.requires_grad:
            return hard
        soft = (self._cosines(embeddings) / _SOFT).softmax(-1)
        spread = torch.zeros_like(hard).index_add(2, self.given.allowed, soft) * self.given.free[..., None]
        return hard + spread - spread.detach()


@final
@dataclass(frozen=True)
class Descent:
    """How embeddings are moved.

    Args:
      iterations: at most.
      rate: of the first step, in units of `Problem.scale`.
      decay: factor on the rate every `decay_every` steps.
      decay_every: steps.
      weight_decay: of AdamW; 0 is Adam.
      penalty: coefficient of `(mean norm - size)^2`, norms measured in the published unit.
      size: to which it pulls the mean norm of free embeddings.
      unit: length of a mean embedding in the published unit.
    """

    iterations: int
    rate: float
    decay: float = 1.0
    decay_every: int = 50
    weight_decay: float = 0.0
    penalty: float = 0.0
    size: float = 1.0
    unit: float = 1.0


Between = Callable[[int, Candidate], Candidate]
"""Called after each step with its number: what to go on from."""


def descend(
    problem: Problem, start: Candidate, plan: Descent, watch: Watch, between: Between | None = None
) -> tuple[Candidate, dict[str, float | str]]:
    """Adam on embeddings, and on labels where they are not known; the best iterate by its continuous loss.

    Args:
      problem: to solve.
      start: where to begin.
      plan: the steps.
      watch: ends it early.
      between: may rearrange texts after a step.

    Returns:
      The best, and facts: steps done, its loss, what stopped it other than time.
    """
    embeddings = start.embeddings.clone().requires_grad_()
    labels = start.labels.clone().requires_grad_(problem.joint)
    groups = [{"params": [embeddings], "lr": plan.rate * problem.scale}]
    groups += [{"params": [labels], "lr": _LABEL_RATE}] if problem.joint else []
    optimizer = torch.optim.AdamW(groups, weight_decay=plan.weight_decay)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, plan.decay_every, plan.decay)
    best, least, done = start, float("inf"), 0
    facts: dict[str, float | str] = {}
    for step in range(plan.iterations):
        if watch.over:
            break
        loss = _step(problem, embeddings, labels, plan)
        if not isfinite(loss):
            facts["diverged at step"] = float(step)
            break
        if loss < least:
            best, least = Candidate(embeddings.detach().clone(), labels.detach().clone()), loss
        optimizer.step()
        schedule.step()
        done = step + 1
        with torch.no_grad():
            embeddings.copy_(problem.with_special_tokens(embeddings))  # weight decay has moved them
            if between is not None:
                embeddings.copy_(between(step, Candidate(embeddings.detach(), labels.detach())).embeddings)
        watch.tell("matching gradients", done / plan.iterations)
    return best, {**facts, "steps": float(done), "loss": least}


def _step(problem: Problem, embeddings: Tensor, labels: Tensor, plan: Descent) -> float:
    """The loss, its derivatives left in `.grad`."""
    loss = problem.loss(Candidate(embeddings, labels), differentiable=True)
    if plan.penalty:
        norms = embeddings[problem.given.free].norm(dim=-1).mean()
        loss = loss + plan.penalty * ((norms - plan.size) * plan.unit / problem.size).square()
    leaves = [embeddings, labels] if problem.joint else [embeddings]
    slopes = torch.autograd.grad(loss, leaves)
    embeddings.grad = slopes[0] * problem.given.free[..., None]  # special tokens and padding stay
    if problem.joint:
        labels.grad = slopes[1]
    return float(loss.detach())
