"""From a bag of tokens to whole texts: guess, then small moves wherever they explain the second attention better."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, log
from random import Random
from typing import Final, final

import torch
from torch import Generator, Tensor

from privfm.attacks.reconstruction.lora.judge import Judge, Move, Text
from privfm.attacks.reconstruction.lora.moves import Moves
from privfm.attacks.reconstruction.lora.places import Company
from privfm.contracts import Watch

_PROVED: Final = 1e-4
"""Share of any direction left over under which a batch is proved: float32 leaves 1e-5, one swap of neighbours 1e-1."""

_NEARLY: Final = -8.0
"""Cost from which the proof is tried."""

_DRAWN: Final = 64
"""Moves weighed at a time; a batch of forwards is cheaper than as many single ones."""

_TOGETHER: Final = 5
"""Best of the moves drawn that are tried together, as long as they change different texts."""

_GAIN: Final = 2e-3
"""Least fall of the cost that is a step: less is the difference between rounds."""

_PATIENCE: Final = 25
"""Batches without a step after which the best texts are shaken."""

_SHAKEN: Final = 3
"""Moves at random by which they are."""

_LEADERS: Final = 8
"""Texts of a guess by which the ending token is chosen: more cost time and tell no more."""

_ENDINGS: Final = 2
"""Likeliest ending tokens with which searches begin: of texts as alike as two lines of code the first can be wrong."""

_CLOSE: Final = 0.1
"""Cost by which the second may be worse to be begun with: where texts can be told at all it is worse by 0.5 or more."""

_GROUPINGS: Final = 4
"""Of tokens into a known number of texts, each a place to begin."""

_PASSES: Final = ((6, 0), (3, 2))
"""Guesses and shakes of each pass before the last: wrong numbers of texts get stuck, and are told by their cost."""


@final
@dataclass(frozen=True)
class Guess:
    """Where a search begins.

    Attributes:
      texts: as many as are supposed; each token of the bag once, apart from the first and the last.
      last: token that ends each.
      cost: of the judge, less what so many tokens explain by chance: comparable between numbers of texts.
    """

    texts: tuple[Text, ...]
    last: int
    cost: float


@final
@dataclass(frozen=True)
class Found:
    """The best texts of a search.

    Attributes:
      texts: without any that the proof does not need.
      cost: of the judge.
      residual: what they leave over.
    """

    texts: tuple[Text, ...]
    cost: float
    residual: float

    @property
    def proved(self) -> bool:
        """Whether they explain every direction of every round."""
        return self.residual < _PROVED


@final
class Assembly:
    """Texts of a bag.

    Args:
      judge: of the rounds.
      tokens: the bag.
      places: share of each token at every position, `(n, P)`.
      company: which tokens belong together.
      generator: of every choice.
    """

    def __init__(
        self, judge: Judge, tokens: tuple[int, ...], places: Tensor, company: Company, generator: Generator
    ) -> None:
        self.judge, self.tokens, self.places, self.company = judge, tokens, places, company
        self.generator = generator
        self.random = Random(int(torch.randint(2**31, (), generator=generator)))
        self.first = tokens[int(places[:, 0].argmax())]

    def guesses(self, count: int | None, watch: Watch) -> list[Guess]:
        """Where to begin, the likeliest first: several groupings of so many texts, or several numbers of texts.

        Any token may be the last one. The judge tells which it is, since all tokens of a text attend to it: what each
        ending token costs beside the others is summed over all groupings.
        """
        counts = [count] * _GROUPINGS if count else self._counts()
        groupings: list[list[list[int]]] = []
        endings = [token for token in self.tokens if token != self.first] or [self.first]
        costs = torch.zeros(len(endings), dtype=torch.float64)
        for number, each in enumerate(counts):
            if watch.over and groupings:
                break
            groups = self._groups(each)
            groupings.append(groups)
            self.judge.settle(self._texts(groups[:_LEADERS], endings[0]))
            weighed = [dict(enumerate(self._texts(groups[:_LEADERS], last))) for last in endings]
            found = self.judge.costs(weighed, number % len(self.judge.layers))
            costs += found - found.mean()
        likely = [endings[number] for number in costs.argsort().tolist()[:_ENDINGS]]
        guesses = [self._guess(groups, last) for groups in groupings for last in likely]
        best = {last: min(guess.cost for guess in guesses if guess.last == last) for last in likely}
        open_still = [guess for guess in guesses if best[guess.last] < min(best.values()) + _CLOSE]
        return sorted(open_still, key=lambda guess: guess.cost)

    def _counts(self) -> list[int]:
        """Numbers of texts that can hold the bag, from the fewest up to three times as many."""
        fewest = max(ceil((len(self.tokens) - 2) / max(self.places.shape[1] - 2, 1)), 1)
        fitting = [count for count in range(fewest, 3 * fewest + 2) if len(self.tokens) + 2 * count < self.judge.width]
        return [count for count in fitting if count <= max(len(self.tokens) - 2, 1)] or [fewest]

    def _groups(self, count: int) -> list[list[int]]:
        """Tokens grouped by their company, each group by its mean position."""
        member = self.company.groups(count, self.generator)
        mean = self.places @ torch.arange(self.places.shape[1], dtype=torch.float64)
        order = mean.argsort().tolist()
        return [[self.tokens[number] for number in order if int(member[number]) == group] for group in range(count)]

    def _texts(self, groups: list[list[int]], last: int) -> tuple[Text, ...]:
        ends = (self.first, last)
        return tuple((self.first, *[one for one in group if one not in ends], last) for group in groups)

    def _guess(self, groups: list[list[int]], last: int) -> Guess:
        texts = self._texts(groups, last)
        self.judge.settle(texts)
        chance = sum(map(len, texts)) / self.judge.width
        return Guess(texts, last, self.judge.cost() - 0.5 * log(max(1 - chance, 1e-6)))

    def run(self, count: int | None, shakes: int, watch: Watch) -> Found:
        """Searches from all guesses in turn, from the better ones longer.

        Args:
          count: of texts; None: not known.
          shakes: of the last pass, for the best guess of the pass before.
          watch: asked before each batch of moves.
        """
        guesses = self.guesses(count, watch)
        found: list[tuple[Guess, Found]] = []
        for most, allowed in (*_PASSES, (1, shakes)):
            found = []
            for number, guess in enumerate(guesses[:most]):
                watch.tell(f"{len(guess.texts)} texts", number / most)
                one = self.search(guess, allowed, watch)
                again = guess if one.proved or watch.over else self._again(one.texts, guess.last)
                if again.last != guess.last:
                    one = self.search(again, allowed, watch)
                found.append((again, one))
                if one.proved or watch.over:
                    return min((one for _, one in found), key=lambda one: (not one.proved, one.cost))
            found.sort(key=lambda pair: pair[1].cost)
            guesses = [Guess(one.texts, guess.last, one.cost) for guess, one in found]
        return found[0][1]

    def _again(self, texts: tuple[Text, ...], last: int) -> Guess:
        """The ending token once more, now that the texts are better; it changes places with the one that was last."""

        def ended(text: Text, ending: int) -> Text:
            return (self.first, *(last if token == ending else token for token in text[1:-1]), ending)

        self.judge.settle(texts)
        endings = [token for token in self.tokens if token != self.first] or [self.first]
        weighed = [{number: ended(text, ending) for number, text in enumerate(texts)} for ending in endings]
        total = sum((self.judge.costs(weighed, layer) for layer in range(len(self.judge.layers))), torch.zeros(()))
        better = endings[int(total.argmin())]
        if better != last:
            texts = tuple(ended(text, better) for text in texts)
            if not any(last in text for text in texts):  # every token keeps a place
                texts = ((*texts[0][:-1], last, better), *texts[1:])
        self.judge.settle(texts)
        return Guess(texts, better, self.judge.cost())

    def search(self, guess: Guess, shakes: int, watch: Watch) -> Found:
        """Moves until the texts are proved, the shakes are used up, or the time is over."""
        moves = Moves(self.tokens, self.places, self.company, first=self.first, last=guess.last, random=self.random)
        self._settle(moves, guess.texts)
        cost = self.judge.cost()
        best, best_texts = cost, list(guess.texts)
        tried: set[tuple[tuple[int, Text], ...]] = set()
        idle = turn = 0
        while not watch.over:
            turn += 1
            step = self._step(moves, tried, turn % len(self.judge.layers), cost)
            if step is None:
                idle += 1
            else:
                cost, idle, tried = step[0], 0, set()
                self._settle(moves, self._after(step[1]))
            if cost < best:
                best, best_texts = cost, list(self.judge.texts)
                if best < _NEARLY and self.judge.residual(best_texts) < _PROVED:
                    break
            if idle > _PATIENCE:
                if shakes == 0:
                    break
                shakes, idle, tried = shakes - 1, 0, set()
                self._shake(moves, best_texts)
                cost = self.judge.cost()
        return self._needed(best_texts, best)

    def _settle(self, moves: Moves, texts: list[Text] | tuple[Text, ...]) -> None:
        self.judge.settle(texts)
        moves.settle(texts)

    def _after(self, move: Move) -> list[Text]:
        return [move.get(number, text) for number, text in enumerate(self.judge.texts)]

    def _step(
        self, moves: Moves, tried: set[tuple[tuple[int, Text], ...]], layer: int, cost: float
    ) -> tuple[float, Move] | None:
        """Moves that all rounds together find better, of those that one round finds best; None: none is."""
        drawn: list[Move] = []
        for _ in range(4 * _DRAWN):
            move = moves.draw()
            if move is None or all(self.judge.texts[number] == text for number, text in move.items()):
                continue
            key = tuple(sorted(move.items()))
            if key not in tried:
                tried.add(key)
                drawn.append(move)
            if len(drawn) == _DRAWN:
                break
        if not drawn:
            return None
        present = float(self.judge.costs([{0: self.judge.texts[0]}], layer)[0])
        costs = self.judge.costs(drawn, layer)
        taken: dict[int, Text] = {}
        for number in costs.argsort().tolist()[:_TOGETHER]:
            if float(costs[number]) >= present - _GAIN:
                break
            if taken.keys() & drawn[number].keys():
                continue  # a text that has changed already
            joined = {**taken, **drawn[number]}
            if not self._covered(joined):
                continue
            after = self.judge.cost(joined)
            if after < cost - _GAIN:
                cost, taken = after, joined
        return (cost, taken) if taken else None

    def _covered(self, move: Move) -> bool:
        """Whether every token keeps a place: two moves together may take both of its places."""
        return set(self.tokens) <= {token for text in self._after(move) for token in text}

    def _shake(self, moves: Moves, texts: list[Text]) -> None:
        """A few moves at random from the best texts, out of a place from which no single move leads on."""
        self._settle(moves, texts)
        for _ in range(_SHAKEN):
            move = moves.draw()
            if move is not None:
                self._settle(moves, self._after(move))

    def _needed(self, texts: list[Text], cost: float) -> Found:
        """Without texts that a proved batch does not need: a span that is too wide proves the rest as well."""
        texts = list(dict.fromkeys(texts))
        residual = self.judge.residual(texts)
        if residual < _PROVED:
            for text in list(texts):
                fewer = [one for one in texts if one != text]
                if fewer and (without := self.judge.residual(fewer)) < _PROVED:
                    texts, residual = fewer, without
        return Found(tuple(texts), cost, residual)
