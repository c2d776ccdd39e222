"""Extraction: does a language model write out a secret that was put into its training data?

Three attackers, who know the format and its prefix. One lets the model write on, token after token or in a beam, and
sees whether a secret of the format comes out. The other lists the secrets in the order of their likelihood, by a
best-first search over the format's letters: it finds the most likely ones of billions without trying them all.

Source: Carlini, Liu, Erlingsson, Kos, Song, "The secret sharer: evaluating and testing unintended memorization in
neural networks", 2019, section 8 (shortest-path search: Dijkstra over prefixes).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Self, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from privfm.attacks.membership.exposure import SecretFormat
from privfm.checks import InvalidArgument, at_least, require

Array = NDArray[np.float64]
Tokenize = Callable[[Sequence[str]], dict[str, Tensor]]

_TRIED: Final = 256
"""Random secrets on which the table of letters is checked before it is used."""


@final
@dataclass(frozen=True, eq=False)
class Spelling:
    """How a tokenizer writes the secrets of a format: one token a letter, everything else the same for all.

    Attributes:
      format: of the texts.
      template: tokens of a text, `(T,)`; those of the letters are of the first secret.
      columns: where the letters are in it, `(length,)`.
      letters: token of every letter at every place, `(length, |alphabet|)`.
    """

    format: SecretFormat
    template: Tensor
    columns: Tensor
    letters: Tensor

    @classmethod
    def of(cls, format: SecretFormat, tokenize: Tokenize, generator: np.random.Generator) -> Self:
        """Reads it off the tokenizer.

        Args:
          format: of the texts.
          tokenize: texts -> `{"input_ids": (n, T), "attention_mask": (n, T)}`.
          generator: for the secrets it is checked on.

        Raises:
          InvalidArgument: a letter is no token of its own, or its token depends on other letters.
        """
        first = format.alphabet[0]
        one = [
            first * place + letter + first * (format.length - place - 1)
            for place in range(format.length)
            for letter in format.alphabet
        ]
        ids = _tokens(format.texts(one), tokenize)
        template = ids[0]
        changed = (ids != template).view(format.length, len(format.alphabet), -1)
        wrong = f"the tokenizer has no token for each letter of {format}; give it separator=' ', or other letters"
        single = bool((changed.any(1).sum(1) == 1).all()) and bool((changed[:, 1:].sum(2) == 1).all())
        require(single, wrong)
        columns = changed.any(1).float().argmax(1)
        letters = ids.view(format.length, len(format.alphabet), -1)[torch.arange(format.length), :, columns]
        require(int(columns[0]) > 0, "prefix is no token: expected something that the model is prompted with")
        found = cls(format, template, columns, letters)
        tried = format.drawn(min(_TRIED, format.size), generator)
        require(torch.equal(_tokens(format.texts(tried), tokenize), found.ids(tried)), wrong)
        return found

    def ids(self, secrets: Sequence[str]) -> Tensor:
        """Tokens of the texts of whole or begun secrets, `(n, T)`; what is not begun is as in the template."""
        found = self.template.repeat(len(secrets), 1)
        for row, secret in zip(found, secrets, strict=True):
            for place, letter in enumerate(secret):
                row[self.columns[place]] = self.letters[place, self.format.alphabet.index(letter)]
        return found

    def secret(self, ids: Tensor) -> str | None:
        """The secret that tokens `(T,)` spell; None where they are no text of the format."""
        found = []
        for place, column in enumerate(self.columns.tolist()):
            letter = (self.letters[place] == ids[column]).nonzero()[:, 0].tolist()
            if not letter:
                return None
            found.append(self.format.alphabet[letter[0]])
        secret = "".join(found)
        last = int(self.columns[-1]) + 1  # what follows the secret is not asked for
        return secret if torch.equal(self.ids([secret])[0, :last], ids[:last]) else None


def secret_losses(model: nn.Module, spelling: Spelling, batch: int = 64) -> Callable[[Sequence[str]], Array]:
    """Texts -> the summed losses of their secrets' letters in nats, `(n,)`: what `exposures` ranks.

    Every letter is predicted from all before it, over the whole vocabulary.

    Args:
      model: causal, in eval mode; called with `input_ids` and `attention_mask`, gives logits or what holds `logits`.
      spelling: of the format.
      batch: texts at once.

    Raises:
      InvalidArgument: a text is not of the format.
    """
    at_least("batch", batch, 1)
    _refuse_encoder(model, spelling)

    def losses(texts: Sequence[str]) -> Array:
        secrets = [spelling.format.secret(text) for text in texts]
        found = [_letter_losses(model, spelling, secrets[i : i + batch]) for i in range(0, len(secrets), batch)]
        return np.concatenate(found) if found else np.empty(0)

    return losses


def written(model: nn.Module, spelling: Spelling, beams: int = 1) -> tuple[str | None, ...]:
    """What the model writes after the prefix, the most likely first; None where it is no secret of the format.

    It may write any token: the format is not imposed on it.

    Args:
      model: as in `secret_losses`.
      spelling: of the format.
      beams: texts that are kept at every token; 1 is greedy.
    """
    at_least("beams", beams, 1)
    _refuse_encoder(model, spelling)
    first, last = int(spelling.columns[0]), int(spelling.columns[-1]) + 1
    kept, scores = spelling.template[None, :first], torch.zeros(1)
    for column in range(first, last):
        known = _log_probabilities(model, kept, torch.full((len(kept), 1), column - 1))[:, 0]
        everything = (scores[:, None] + known).flatten()
        scores, places = everything.topk(min(beams, len(everything)))
        kept = torch.cat([kept[places // known.shape[1]], (places % known.shape[1])[:, None]], 1)
    rest = spelling.template[last:].expand(len(kept), -1)
    return tuple(spelling.secret(text) for text in torch.cat([kept, rest], 1))


@final
@dataclass(frozen=True)
class Likeliest:
    """Secrets of a format in the order of their likelihood under a model.

    Attributes:
      secrets: the most likely first.
      losses: of each, in nats.
      evaluations: of the model, on one begun secret each.
      complete: whether as many as asked for, or all there are, were found within the limit.
    """

    secrets: tuple[str, ...]
    losses: tuple[float, ...]
    evaluations: int
    complete: bool

    def rank(self, secret: str) -> int | None:
        """Its rank among all secrets of the format, from 1; None where it was not listed."""
        return self.secrets.index(secret) + 1 if secret in self.secrets else None


def likeliest(model: nn.Module, spelling: Spelling, count: int = 1, limit: int = 10_000, batch: int = 64) -> Likeliest:
    """The `count` most likely secrets, exactly: Dijkstra's search from the empty secret, a letter a step.

    A begun secret costs the losses of its letters. None of them is negative, so that a whole secret that is the
    cheapest of all that is left cannot be undercut. Several begun secrets are tried at once, which may try some in
    vain but changes nothing of the order.

    Cost: in a model that has learned the secret by heart, `length` evaluations; in one that finds all alike, as many as
    there are begun secrets, which `limit` ends.

    Args:
      model: as in `secret_losses`.
      spelling: of the format.
      count: of secrets.
      limit: of evaluations.
      batch: begun secrets at once.

    Source: Carlini et al., 2019, section 8.
    """
    for name, value in (("count", count), ("limit", limit), ("batch", batch)):
        at_least(name, value, 1)
    _refuse_encoder(model, spelling)
    whole, alphabet = spelling.format.length, spelling.format.alphabet
    heap: list[tuple[float, str]] = [(0.0, "")]
    found: list[tuple[float, str]] = []
    evaluations = 0
    while heap and len(found) < count:
        if len(heap[0][1]) == whole:
            found.append(heapq.heappop(heap))
            continue
        begun: list[tuple[float, str]] = []
        while heap and len(heap[0][1]) < whole and len(begun) < min(batch, limit - evaluations):
            begun.append(heapq.heappop(heap))
        if not begun:
            return _listed(found, evaluations, complete=False)
        evaluations += len(begun)
        costs = _next_letters(model, spelling, [secret for _, secret in begun])
        for (cost, secret), row in zip(begun, costs, strict=True):
            for letter, more in zip(alphabet, row.tolist(), strict=True):
                heapq.heappush(heap, (cost + more, secret + letter))
    return _listed(found, evaluations, complete=True)


@final
@dataclass(frozen=True)
class Extraction:
    """Whether a secret comes out of a model.

    Attributes:
      secret: its letters.
      greedy: whether the model writes it on its own.
      beam: its rank among the texts of the beam, from 1; None where it is not among them.
      rank: among all secrets of the format by likelihood, from 1; None where it is beyond those that were listed.
      listed: number of the most likely secrets that were listed.
    """

    secret: str
    greedy: bool
    beam: int | None
    rank: int | None
    listed: int


def extractions(
    model: nn.Module,
    spelling: Spelling,
    secrets: Sequence[str],
    *,
    beams: int = 10,
    count: int = 10,
    limit: int = 10_000,
) -> tuple[Extraction, ...]:
    """Every attacker's answer on some secrets. None of them is told the secrets: they are only compared with.

    Args:
      model: as in `secret_losses`.
      spelling: of the format.
      secrets: to look for; ones that were never put in are the control.
      beams: of the beam.
      count: of the most likely secrets that are listed.
      limit: of evaluations of the search.
    """
    for secret in secrets:
        spelling.format.text(secret)
    greedy, beam = written(model, spelling)[0], written(model, spelling, beams)
    search = likeliest(model, spelling, count, limit)
    return tuple(
        Extraction(
            secret,
            secret == greedy,
            beam.index(secret) + 1 if secret in beam else None,
            search.rank(secret),
            len(search.secrets),
        )
        for secret in secrets
    )


def _letter_losses(model: nn.Module, spelling: Spelling, secrets: Sequence[str]) -> Array:
    """Summed losses of the letters of whole secrets, `(n,)`."""
    ids = spelling.ids(secrets)
    known = _log_probabilities(model, ids, (spelling.columns - 1).expand(len(ids), -1))
    chosen = known.gather(2, ids[:, spelling.columns, None])[:, :, 0]
    return np.asarray(-chosen.double().sum(1).numpy())


def _next_letters(model: nn.Module, spelling: Spelling, begun: Sequence[str]) -> Tensor:
    """Loss of each letter after each begun secret, `(n, |alphabet|)` float64."""
    places = torch.tensor([len(secret) for secret in begun])
    last = int(spelling.columns[int(places.max())])  # what follows a place is not read by it
    columns = spelling.columns[places, None]
    known = _log_probabilities(model, spelling.ids(begun)[:, :last], columns - 1)[:, 0]
    return -known.gather(1, spelling.letters[places]).double()


def _listed(found: Sequence[tuple[float, str]], evaluations: int, complete: bool) -> Likeliest:
    return Likeliest(tuple(secret for _, secret in found), tuple(cost for cost, _ in found), evaluations, complete)


def _log_probabilities(model: nn.Module, ids: Tensor, columns: Tensor) -> Tensor:
    """`ids (n, T)` -> log-probabilities of the token after k columns `(n, k)` of each, `(n, k, vocabulary)` float32."""
    require(not model.training, "the model is in training mode, where dropout blurs losses: call eval() on it")
    device = next(model.parameters()).device
    with torch.no_grad():
        output: Any = model(input_ids=ids.to(device), attention_mask=torch.ones_like(ids, device=device))
    logits: Tensor = getattr(output, "logits", output)
    if logits.dim() != 3 or logits.shape[:2] != ids.shape:
        raise InvalidArgument(f"the model gives logits {tuple(logits.shape)} for {tuple(ids.shape)} tokens: no decoder")
    chosen = logits[torch.arange(len(ids), device=device)[:, None], columns.to(device)].float().cpu()
    require(bool(chosen.isfinite().all()), "the model gives logits that are not finite: they rank nothing")
    return chosen.log_softmax(2)


def _refuse_encoder(model: nn.Module, spelling: Spelling) -> None:
    """What reads the letter that it is to predict would be certain of every secret."""
    first, other = (spelling.format.alphabet[place] * spelling.format.length for place in (0, 1))
    ids = spelling.ids([first, first[:-1] + other[-1]])
    before = _log_probabilities(model, ids, torch.full((2, 1), int(spelling.columns[-1]) - 1))
    causal = torch.allclose(before[0], before[1], atol=1e-4)
    require(causal, "the model reads later tokens: an encoder predicts what it sees; give a decoder")


def _tokens(texts: Sequence[str], tokenize: Tokenize) -> Tensor:
    """Tokens of texts of a format, `(n, T)`, which must all have the same number."""
    read: Mapping[str, Tensor] = tokenize(texts)
    whole = bool((read["attention_mask"] == 1).all())
    require(whole, "texts of the format differ in length to the tokenizer; give separator=' ', or other letters")
    return read["input_ids"]
