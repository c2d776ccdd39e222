"""TAG: texts found by gradient descent on their embeddings alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Final, final

from torch import Generator

from privfm.attacks.reconstruction.optimised.base import OptimisedAttack
from privfm.attacks.reconstruction.optimised.distances import SquaredAndAbsolute
from privfm.attacks.reconstruction.optimised.search import Descent, Problem, descend
from privfm.checks import at_least, positive
from privfm.contracts import Observation, Reconstruction, Watch

BERT_COORDINATE: Final = 1.4 / sqrt(768)
"""Root mean square of a coordinate of BERT-base's token embedding, whose rows have a mean norm of 1.4 (LAMP's code):
published learning rates are for it, ours are multiples of the attacked model's own."""

_RATE: Final = 0.1 / BERT_COORDINATE
"""Learning rate 0.1, iterations and coefficient as LAMP's authors run TAG (their tag.sh)."""

_WEIGHT_DECAY: Final = 0.01
"""Of AdamW, its usual value."""


@final
@dataclass(frozen=True, kw_only=True)
class TAG(OptimisedAttack):
    """Minimises `sum_l |g_l - g*_l|_2^2 + alpha(l) |g_l - g*_l|_1` over embeddings, from normal noise, by AdamW.

    The distance is of the gradient's own scale: it works on gradients and on means of them, not on clipped ones nor on
    sums. The tokens are the nearest of the embedding by cosine.

    Args:
      iterations: steps of AdamW.
      learning_rate: in units of the root mean square coordinate of the model's token embedding; 0.1 for BERT-base.
      absolute: alpha of the first tensor.
      falling: alpha falls linearly with the tensor's place, so that early layers count more; False: all alike.

    Cost: an iteration is a forward pass, a backward pass and a backward pass through both, on the padded batch.

    Source: Deng, Wang, Li, Wang, Shang, Liu, Rajasekaran, Ding, "TAG: gradient attack on transformer-based language
    models", Findings of EMNLP 2021.
    """

    iterations: int = 2500
    learning_rate: float = _RATE
    absolute: float = 0.01
    falling: bool = True

    def __post_init__(self) -> None:
        at_least("iterations", self.iterations, 1)
        positive("learning_rate", self.learning_rate)
        SquaredAndAbsolute(self.absolute)

    def reconstruct(self, rounds: Sequence[Observation], watch: Watch, generator: Generator) -> Reconstruction:
        problem = Problem(self._setting(rounds[0]), SquaredAndAbsolute(self.absolute, self.falling))
        plan = Descent(self.iterations, self.learning_rate, weight_decay=_WEIGHT_DECAY)
        best, facts = descend(problem, problem.random(generator), plan, watch)
        return problem.answer(best, facts, watch)
