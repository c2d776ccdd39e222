"""How well hypothesised texts explain the adapters' gradients one block further up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, final

import torch
from torch import Tensor

from privfm.attacks.reconstruction.lora.rows import adapter_rows
from privfm.attacks.reconstruction.text_models import TextModel, text_model
from privfm.contracts import Observation

Text = tuple[int, ...]
Move = Mapping[int, Text]
"""Texts that take the place of those with these numbers."""

_RIDGE: Final = 1e-10
"""Added to squared residuals, so that what is explained to 1e-5 costs no less than that: float32 gets no nearer."""

_SPARE: Final = 8
"""Directions of the input that a batch must leave open; 8 of 384 leave 0.14 of a foreign row."""

_DIRECTIONS: Final = 1e-5
"""Rows' directions weaker than this share of the strongest are rounding."""


@final
@dataclass(frozen=True)
class Layer:
    """One round's gradients at the second attention: an orthonormal basis of their rows, and the model they are of."""

    text: TextModel
    rows: Tensor

    @classmethod
    def of(cls, observation: Observation, architecture: type[TextModel] | None) -> Layer | None:
        """None where no adapter there was sent."""
        text = text_model(observation.model, architecture)
        if text.depth < 2:
            return None
        rows = adapter_rows(text, [observation], block=1).rows
        if not len(rows):
            return None
        _, values, directions = torch.linalg.svd(rows, full_matrices=False)
        return cls(text, directions[values > _DIRECTIONS * values[0]])

    def inputs(self, texts: Sequence[Text]) -> tuple[Tensor, Tensor]:
        """What the block is given, `(b, T, d)` float64 with zeros behind a text's end, and the mask."""
        longest = max(map(len, texts))
        tokens = torch.zeros(len(texts), longest, dtype=torch.long)
        mask = torch.zeros_like(tokens)
        for row, text in enumerate(texts):
            tokens[row, : len(text)] = torch.tensor(text)
            mask[row, : len(text)] = 1
        inputs = self.text.inputs(1, tokens, mask).double()
        return inputs * mask[:, :, None], mask.bool()


@final
class Judge:
    """The reverse span check: rows of the second attention's dL/dA lie in the span of the *whole* batch's inputs there.

    A hypothesis is a list of texts. Its cost is the mean logarithm of what it leaves of the rows, direction by
    direction: -11.5 is all explained, 0 nothing. The logarithm rewards every direction that a right text explains
    alone; between the truth and one swap of neighbours it falls from -11 to -7, to -2 for texts of the right tokens in
    random order, to -0.5 for foreign ones, so that small moves find their way.

    Args:
      layers: of one or more rounds.

    Source: the check with the roles of span and vectors exchanged, for rows that are fewer than tokens: ours.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = tuple(layers)
        self.evaluations = 0
        self.texts: list[Text] = []
        self._inputs: list[list[Tensor]] = []
        self._left: dict[tuple[int, tuple[int, ...]], tuple[Tensor, Tensor]] = {}

    @property
    def width(self) -> int:
        """Of the inputs: the batch must have fewer tokens."""
        return self.layers[0].rows.shape[1]

    def settle(self, texts: Sequence[Text]) -> None:
        """Moves are from these texts from now on."""
        self.texts, self._left, self._inputs = list(texts), {}, []
        for layer in self.layers:
            inputs, mask = layer.inputs(self.texts)
            self._inputs.append([one[real] for one, real in zip(inputs, mask, strict=True)])

    def costs(self, moves: Sequence[Move], layer: int) -> Tensor:
        """Of the texts after each move, under one round, `(n,)`; moves stand beside each other, none is made."""
        self.evaluations += len(moves)
        fresh = list(dict.fromkeys(text for move in moves for text in move.values()))
        place = {text: number for number, text in enumerate(fresh)}
        inputs, mask = self.layers[layer].inputs(fresh)
        together: dict[tuple[int, ...], list[int]] = {}
        for number, move in enumerate(moves):
            together.setdefault(tuple(sorted(move)), []).append(number)
        found = torch.empty(len(moves), dtype=torch.float64)
        for changed, numbers in together.items():
            rows = torch.tensor([[place[moves[number][text]] for text in changed] for number in numbers])
            found[numbers] = self._costs(layer, changed, inputs[rows].flatten(1, 2), mask[rows].flatten(1, 2))
        return found

    def cost(self, move: Move | None = None) -> float:
        """Mean over the rounds, after a move or as it stands."""
        asked = [{0: self.texts[0]} if move is None else move]
        return sum(float(self.costs(asked, layer)[0]) for layer in range(len(self.layers))) / len(self.layers)

    def residual(self, texts: Sequence[Text]) -> float:
        """Largest share of any direction of any round that texts leave over: under 1e-4 nothing is.

        1 for so many tokens that their span is nearly the whole input, which would explain anything.
        """
        if sum(map(len, texts)) > self.width - _SPARE:
            return 1.0
        worst = 0.0
        for layer in self.layers:
            inputs, mask = layer.inputs(texts)
            basis = torch.linalg.qr(inputs[mask].T)[0].T
            left = layer.rows - (layer.rows @ basis.T) @ basis
            worst = max(worst, float(torch.linalg.matrix_norm(left, 2)))
        return worst

    def _costs(self, layer: int, changed: tuple[int, ...], inputs: Tensor, mask: Tensor) -> Tensor:
        """Of `inputs (n, T, d)` in the place of the texts that change."""
        basis, rows = self._without(layer, changed)
        inputs = inputs - (inputs @ basis.T) @ basis
        gram = inputs @ inputs.mT
        scale = gram.diagonal(dim1=1, dim2=2).mean(1, keepdim=True)
        lower = torch.linalg.cholesky(gram + torch.diag_embed(torch.where(mask, 1e-9 * scale, torch.ones_like(scale))))
        along = torch.linalg.solve_triangular(lower, inputs @ rows.T, upper=False)
        left = rows @ rows.T - along.mT @ along + _RIDGE * torch.eye(len(rows), dtype=torch.float64)
        found: Tensor = torch.linalg.slogdet(left)[1] / (2 * len(rows))
        return found

    def _without(self, layer: int, changed: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """A basis of the inputs of the texts that stay, and what they leave of the rows."""
        key = (layer, changed)
        if key not in self._left:
            rows = self.layers[layer].rows
            stay = [one for number, one in enumerate(self._inputs[layer]) if number not in changed]
            basis = torch.linalg.qr(torch.cat(stay).T)[0].T if stay else rows.new_zeros(0, rows.shape[1])
            self._left[key] = basis, rows - (rows @ basis.T) @ basis
        return self._left[key]
