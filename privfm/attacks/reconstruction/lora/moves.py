"""Small changes of hypothesised texts, drawn where the first attention's coefficients make them likely."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from random import Random
from typing import Final, final

import torch
from torch import Tensor

from privfm.attacks.reconstruction.lora.judge import Move, Text
from privfm.attacks.reconstruction.lora.places import Company

_ANYWHERE: Final = 0.02
"""Added to each position's share: one in fifty goes where the coefficients do not point."""

_SHARPNESS: Final = 4.0
"""Of the choice of a text by cosine: e^4 = 55 to 1 between a token's own text and one at right angles."""

_KINDS: Final = ("relocate", "reorder", "insert", "delete", "replace", "cross")
_WEIGHTS: Final = (0.50, 0.12, 0.18, 0.08, 0.07, 0.05)
"""How often each kind is drawn. Chosen on seeds 1 to 3 of four sentences; nothing depends on them but time."""


@final
class Moves:
    """Draws moves from the present texts. Every token of the bag keeps at least one place.

    Args:
      tokens: the bag, ids in the order of the other two.
      places: share of each at every position, `(n, P)`; no text becomes longer than P.
      company: which belong together.
      first: token that begins every text.
      last: token that ends every text.
      random: of every choice.
    """

    def __init__(
        self, tokens: Sequence[int], places: Tensor, company: Company, *, first: int, last: int, random: Random
    ) -> None:
        self.number = {token: number for number, token in enumerate(tokens)}
        self.inner = [token for token in tokens if token not in (first, last)]
        self.shares = (places + _ANYWHERE).tolist()
        self.longest = places.shape[1]
        self.company, self.random = company, random
        self.texts: list[Text] = []

    def settle(self, texts: Sequence[Text]) -> None:
        """Moves are from these texts from now on."""
        self.texts = list(texts)
        self.count = Counter(token for text in texts for token in text)
        self.slots = [(text, place) for text, one in enumerate(texts) for place in range(1, len(one) - 1)]
        centres = torch.stack([self._centre(text) for text in texts])
        self.near = (_SHARPNESS * (self.company.unit @ centres.T)).exp().tolist()

    def draw(self) -> Move | None:
        """One move; None where the one drawn is not possible."""
        kind = self.random.choices(_KINDS, _WEIGHTS)[0]
        if kind == "insert":
            return self._insert()
        if kind == "cross":
            return self._cross()
        if not self.slots:
            return None
        text, place = self.random.choice(self.slots)
        if kind == "relocate":
            return self._relocate(text, place)
        if kind == "reorder":
            return self._reorder(text, place)
        return self._spare(text, place, kind == "replace")

    def _spare(self, text: int, place: int, replace: bool) -> Move | None:
        """One of several occurrences of a token goes, or becomes another token."""
        changed = list(self.texts[text])
        if self.count[changed[place]] < 2:
            return None  # its only place
        changed[place : place + 1] = [self._token_for(place)] if replace else []
        return {text: tuple(changed)}

    def _centre(self, text: Text) -> Tensor:
        rows = [self.number[token] for token in text[1:-1]]
        if not rows:
            return torch.zeros(self.company.unit.shape[1], dtype=torch.float64)
        total = self.company.unit[rows].sum(0)
        found: Tensor = total / total.norm().clamp_min(1e-12)
        return found

    def _place_for(self, token: int, most: int) -> int:
        """A position from 1 to `most`, by the token's shares."""
        shares = self.shares[self.number[token]][1 : most + 1]
        shares = shares + [_ANYWHERE] * (most - len(shares))
        return self.random.choices(range(1, most + 1), shares)[0]

    def _token_for(self, place: int) -> int:
        """A token of the bag, by their shares at a position; a guess may be longer than any text."""
        place = min(place, self.longest - 1)
        weights = [self.shares[self.number[token]][place] for token in self.inner]
        return self.random.choices(self.inner, weights)[0]

    def _relocate(self, text: int, place: int) -> Move | None:
        """A token goes elsewhere, in its text or another, or changes places with the one there."""
        texts, token = self.texts, self.texts[text][place]
        other = text
        if self.random.random() < 0.5:
            other = self.random.choices(range(len(texts)), self.near[self.number[token]])[0]
        here, there = list(texts[text]), list(texts[other])
        if self.random.random() < 0.5:
            if len(there) < 3:
                return None
            goal = self._place_for(token, len(there) - 2)
            if other == text:
                here[place], here[goal] = here[goal], here[place]
                return {text: tuple(here)}
            here[place], there[goal] = there[goal], token
        else:
            del here[place]
            if other == text:
                here.insert(self._place_for(token, len(here) - 1), token)
                return {text: tuple(here)}
            if len(there) >= self.longest:
                return None
            there.insert(self._place_for(token, len(there) - 1), token)
        return {text: tuple(here), other: tuple(there)}

    def _reorder(self, text: int, place: int) -> Move | None:
        """Two tokens of a text change places, or a run of them moves."""
        changed, other = list(self.texts[text]), self.random.randrange(1, len(self.texts[text]) - 1)
        if self.random.random() < 0.5:
            changed[place], changed[other] = changed[other], changed[place]
            return {text: tuple(changed)}
        low, high = min(place, other), max(place, other) + 1
        run, rest = changed[low:high], changed[:low] + changed[high:]
        if len(rest) < 3:
            return None
        goal = self.random.randrange(1, len(rest))
        return {text: tuple(rest[:goal] + run + rest[goal:])}

    def _insert(self) -> Move | None:
        """One more occurrence of a token."""
        text = self.random.randrange(len(self.texts))
        changed = list(self.texts[text])
        if len(changed) >= self.longest or not self.inner:
            return None
        place = self.random.randrange(1, len(changed))
        changed.insert(place, self._token_for(place))
        return {text: tuple(changed)}

    def _cross(self) -> Move | None:
        """Two texts exchange their ends."""
        if len(self.texts) < 2:
            return None
        one, other = self.random.sample(range(len(self.texts)), 2)
        here, there = self.texts[one], self.texts[other]
        cut, second = self.random.randrange(1, len(here)), self.random.randrange(1, len(there))
        first, last = here[:cut] + there[second:], there[:second] + here[cut:]
        return {one: first, other: last} if max(len(first), len(last)) <= self.longest else None
