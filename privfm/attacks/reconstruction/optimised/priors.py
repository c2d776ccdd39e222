"""How likely a text is before any gradient has been seen: language models as priors of an attack.

A prior is public knowledge: it is fitted to public texts, never to the clients'. It speaks the attacked model's tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import log
from typing import Any, Final, final

import torch
from torch import Tensor, nn

from privfm.attacks.reconstruction.architectures import asleep
from privfm.checks import at_least, require

_BEFORE: Final = -1
"""Stands for what comes before a text in an n-gram; no token id is negative."""

_NO_SINGLETON: Final = 0.5
"""Discount of an order in which no n-gram occurs once: the estimate is 0 there and would forbid all that is new."""


class LanguagePrior(ABC):
    """Log-probabilities of token sequences."""

    @abstractmethod
    def log_likelihood(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """`sum_t ln p(x_t | x_1 .. x_{t-1})` over every token but the first of each text, which is given: `(b,)`.

        Args:
          tokens: whole texts with their special tokens, `(b, T)`, padded on the right.
          mask: `(b, T)`, 1 at real tokens.
        """

    @final
    def surprise(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Mean of `-ln p` over the tokens that are not given, `(b,)`: the logarithm of a text's perplexity."""
        counts = mask.sum(1).sub(1).clamp_min(1)
        return -self.log_likelihood(tokens, mask) / counts.to(tokens.device)


@final
@dataclass(frozen=True)
class CausalPrior(LanguagePrior):
    """A causal language model of transformers.

    Args:
      model: gives `.logits (b, T, V)` for `input_ids` and `attention_mask`, over the attacked model's tokens.

    Source: Balunovic, Dimitrov, Jovanovic, Vechev, "LAMP: extracting text from gradients with language model priors",
    NeurIPS 2022, section 4.3 (there a GPT-2 trained on BERT's tokens).
    """

    model: nn.Module = field(repr=False)

    def log_likelihood(self, tokens: Tensor, mask: Tensor) -> Tensor:
        device = next(self.model.parameters()).device
        ids, real = tokens.to(device), mask.to(device)
        with torch.no_grad(), asleep(self.model):
            output: Any = self.model(input_ids=ids, attention_mask=real)
        logs = output.logits[:, :-1].double().log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
        found: Tensor = (logs * real[:, 1:]).sum(1)
        return found.to(tokens.device)


@final
@dataclass(frozen=True)
class NGramPrior(LanguagePrior):
    """Interpolated Kneser-Ney smoothing: what a laptop fits to public texts in a second.

    With c the counts of the highest order, and below it the number of different tokens seen before an n-gram,
    `p(w | h) = max(c(h w) - D, 0) / c(h .) + D types(h .) / c(h .) p(w | h')`, h' being h without its first token; the
    lowest order is interpolated with 1/V. `D = n1 / (n1 + 2 n2)` in each order, n1 and n2 being its n-grams counted
    once and twice. A history that never occurred leaves everything to the shorter one.

    Args:
      vocabulary: number of tokens V.
      order: length of the longest n-gram.
      counts: by length of the n-gram, from 1 to `order`.

    Source: Chen, Goodman, "An empirical study of smoothing techniques for language modeling", 1998, section 2.7 and
    4.1.6 (Kneser-Ney, interpolated); the discount is Ney, Essen, Kneser, 1994.

    >>> prior = NGramPrior.fit([(1, 5, 6, 2), (1, 5, 7, 2)], vocabulary=10)
    >>> texts = torch.tensor([[1, 5, 6, 2], [1, 6, 5, 2]])
    >>> usual, unusual = prior.log_likelihood(texts, torch.ones_like(texts)).tolist()
    >>> usual > unusual
    True
    """

    vocabulary: int
    order: int
    counts: tuple[Mapping[tuple[int, ...], int], ...] = field(repr=False)
    _after: tuple[Mapping[tuple[int, ...], tuple[int, int]], ...] = field(init=False, repr=False, compare=False)
    _discounts: tuple[float, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        at_least("vocabulary", self.vocabulary, 1)
        at_least("order", self.order, 1)
        require(len(self.counts) == self.order, f"counts of {len(self.counts)} lengths: expected order={self.order}")
        object.__setattr__(self, "_after", tuple(_histories(each) for each in self.counts))
        object.__setattr__(self, "_discounts", tuple(_discount(each.values()) for each in self.counts))

    @classmethod
    def fit(cls, texts: Iterable[Sequence[int]], vocabulary: int, order: int = 3) -> NGramPrior:
        """Counts the n-grams of public texts, special tokens included.

        Args:
          texts: token ids of each; nothing of the clients'.
          vocabulary: number of tokens.
          order: of the longest n-gram.

        Raises:
          InvalidArgument: no text at all, or an id outside of the vocabulary.
        """
        at_least("order", order, 1)
        highest: Counter[tuple[int, ...]] = Counter()
        for text in texts:
            padded = [_BEFORE] * (order - 1) + [int(token) for token in text]
            highest.update(tuple(padded[at : at + order]) for at in range(len(text)))
        require(bool(highest), "texts: expected at least one token to fit a prior to")
        tokens = [gram[-1] for gram in highest]
        require(
            min(tokens) >= 0 and max(tokens) < vocabulary,
            f"texts: token ids reach from {min(tokens)} to {max(tokens)}, vocabulary={vocabulary}",
        )
        levels: list[Mapping[tuple[int, ...], int]] = [highest]
        for _ in range(order - 1):  # each different n-gram counts once for its ending
            levels.append(Counter(gram[1:] for gram in levels[-1]))
        return cls(vocabulary, order, tuple(reversed(levels)))

    def probability(self, token: int, history: Sequence[int]) -> float:
        """`p(token | history)`; of the history only the last `order - 1` tokens matter. Sums to 1 over the tokens."""
        given = ([_BEFORE] * (self.order - 1) + list(history))[-(self.order - 1) :] if self.order > 1 else []
        found = 1.0 / self.vocabulary
        for length in range(self.order):
            known = tuple(given[len(given) - length :])
            total, types = self._after[length].get(known, (0, 0))
            if total == 0:
                break  # neither has any longer history occurred
            discount = self._discounts[length]
            count = self.counts[length].get((*known, token), 0)
            found = max(count - discount, 0.0) / total + discount * types / total * found
        return found

    def log_likelihood(self, tokens: Tensor, mask: Tensor) -> Tensor:
        texts = [text[: int(real)] for text, real in zip(tokens.tolist(), mask.sum(1).tolist(), strict=True)]
        sums = [sum(log(self.probability(text[at], text[:at])) for at in range(1, len(text))) for text in texts]
        return torch.tensor(sums, dtype=torch.float64, device=tokens.device)


def _histories(counts: Mapping[tuple[int, ...], int]) -> dict[tuple[int, ...], tuple[int, int]]:
    """By history: the sum of what follows it, and the number of different tokens among that."""
    found: dict[tuple[int, ...], tuple[int, int]] = {}
    for gram, count in counts.items():
        total, types = found.get(gram[:-1], (0, 0))
        found[gram[:-1]] = total + count, types + 1
    return found


def _discount(counts: Iterable[int]) -> float:
    """`n1 / (n1 + 2 n2)`."""
    seen = Counter(counts)
    return seen[1] / (seen[1] + 2 * seen[2]) if seen[1] else _NO_SINGLETON
