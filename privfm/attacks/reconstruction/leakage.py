"""How much a plan of rounds gives away of the tokens, before any training: directions revealed against unknowns."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Literal, final

from torch import nn

from privfm.attacks.reconstruction.architectures import Projection
from privfm.attacks.reconstruction.text_models import TextModel, text_model
from privfm.checks import at_least, one_of

Kind = Literal["tokens", "pairs"]


@final
@dataclass(frozen=True)
class LeakageBudget:
    """What a server can count before it has seen anything.

    The gradient of a map's weight is `Delta^T X` with the layer's inputs X, that of an adapter's A `s B^T Delta^T X`:
    min(outputs, tokens) or min(r, tokens) combinations of the inputs. The first attention's inputs are known vectors,
    one for each token at each position, and stay the same from round to round while what lies below is frozen. So
    directions of rounds on the same data add up, until they are as many as there are unknowns:

    | unknown                                | number                           | then known                           |
    |----------------------------------------|----------------------------------|--------------------------------------|
    | tokens, positions being known vectors  | distinct tokens                  | which tokens occur, exactly          |
    | pairs of token and position            | distinct tokens + positions - 1  | the inputs' whole span (encoder)     |
    | pairs, rotary positions                | distinct tokens                  | the same                             |

    The number of pairs is the most: tokens and positions that never meet (a first token that stands nowhere else, with
    position 0) make a group of their own, and each further group takes one off.

    Fewer directions are no protection: a pursuit finds tokens far below (`LoRAReconstruction`); the budget says from
    where on plain membership suffices. Noise, clipping and sums of clients are not in it.

    Attributes:
      per_round: directions of block 0's input that one round can show: ranks summed over the adapted maps that read
        it, or the input's width where a map is trained whole.
      silent: rounds at the start that show none: the adapters' B is still 0.
      width: of the input; no more directions than that exist.
      positional: positions are added to the embeddings.
      accumulates: what lies below block 0's maps is frozen, so that rounds add up.
      projected: numbers per token that the gradients of B show through frozen A (`freeze_a`): `B' = Delta^T (X A^T)`.
      readers: names of the parameters counted in `per_round`.
      others: names of adapters that read something else.

    Source: rank of a sum of outer products; positions counted out and rounds added up are ours.
    """

    per_round: int
    silent: int
    width: int
    positional: bool
    accumulates: bool
    projected: int
    readers: tuple[str, ...]
    others: tuple[str, ...]

    @classmethod
    def of(cls, model: nn.Module, architecture: type[TextModel] | None = None) -> LeakageBudget:
        """Of a model as clients receive it, with the parameters marked that they train.

        Args:
          model: with PEFT's adapters or without.
          architecture: how to read it; None finds out.

        Raises:
          InvalidArgument: no model that text attacks know.

        Cost: none to speak of; nothing is computed but a probe of four tokens.
        """
        text = text_model(model, architecture)
        parameters = dict(model.named_parameters())
        trained = {name for name, parameter in parameters.items() if parameter.requires_grad}
        maps = text.block(0).projections
        whole = tuple(dict.fromkeys(part.weight for part in maps if part.weight in trained))
        adapters = {part.lora_a: part for part in maps if part.lora_a is not None}
        moving = {name: part for name, part in adapters.items() if name in trained}
        zero = bool(moving) and not whole and not any(_moved(parameters, part) for part in moving.values())
        ranks = sum(int(parameters[name].shape[0]) for name in moving)
        held = [name for name, part in adapters.items() if name not in trained and part.lora_b in trained]
        below = [text.embedding_name] + [name for name in trained if ".embeddings." in name or "wpe" in name]
        return cls(
            per_round=text.width if whole else min(ranks, text.width),
            silent=int(zero),
            width=text.width,
            positional=text.positional,
            accumulates=not any(name in trained for name in below),
            projected=0 if whole else sum(int(parameters[name].shape[0]) for name in held),
            readers=(*whole, *moving),
            others=tuple(name for name in trained if ".lora_A." in name and name not in adapters),
        )

    def directions(self, rounds: int) -> int:
        """Revealed by so many rounds on the same data, at most."""
        at_least("rounds", rounds, 1)
        telling = max(rounds - self.silent, 0)
        return min(self.width, self.per_round * (telling if self.accumulates else min(telling, 1)))

    def unknowns(self, distinct_tokens: int, positions: int, kind: Kind = "tokens") -> int:
        """Directions that the inputs span: what must be revealed for membership to be exact.

        Args:
          distinct_tokens: of all texts together, special tokens included.
          positions: that the longest text has.
          kind: `tokens`, with the known positions taken out; `pairs`: with them.
        """
        at_least("distinct_tokens", distinct_tokens, 1)
        at_least("positions", positions, 1)
        one_of("kind", kind, ("tokens", "pairs"))
        return distinct_tokens + (positions - 1 if kind == "pairs" and self.positional else 0)

    def room(self, positions: int) -> int:
        """Distinct tokens that the input's width can hold apart: with more, every token fits and none is told."""
        at_least("positions", positions, 1)
        return self.width - (positions + 2 if self.positional else 1)

    def rounds_needed(self, distinct_tokens: int, positions: int, kind: Kind = "tokens") -> int | None:
        """Until membership is exact; None: never.

        >>> q_and_v = LeakageBudget(16, 1, 384, True, True, 0, ("q", "v"), ())
        >>> q_and_v.rounds_needed(40, 14), q_and_v.rounds_needed(40, 14, "pairs")
        (4, 5)
        """
        wanted = self.unknowns(distinct_tokens, positions, kind)
        if self.per_round == 0 or distinct_tokens > self.room(positions):
            return None
        rounds = ceil(wanted / self.per_round) + self.silent
        return rounds if self.directions(rounds) >= wanted else None

    def verdict(self, rounds: int, distinct_tokens: int, positions: int) -> str:
        """In words, for a plan of rounds on texts of this size."""
        shown, tokens = self.directions(rounds), self.unknowns(distinct_tokens, positions)
        pairs = self.unknowns(distinct_tokens, positions, "pairs")
        counted = f"{shown} directions for {tokens} distinct tokens"
        if shown == 0:
            reason = "B is 0 in the first round" if self.per_round else "nothing that reads block 0's input is trained"
            return f"no direction is revealed ({reason}); {self._through_b()}"
        if distinct_tokens > self.room(positions):
            return (
                f"{counted}, but the input has room for {self.room(positions)} beside {positions} positions: tokens "
                "can not be told apart"
            )
        if shown >= pairs:
            return f"{counted} and {positions} positions: the whole span of the inputs; every token is told exactly"
        if shown >= tokens:
            return f"{counted}: every token is told exactly by membership; positions are not in the span"
        return (
            f"{counted}: membership alone ranks tokens, but a pursuit of tokens that explain all directions together "
            "can find every one; this is no protection"
        )

    def describe(self, rounds: int, distinct_tokens: int = 40, positions: int = 16) -> str:
        """A paragraph to print before training."""
        lines = [
            f"Leakage budget: {self.per_round} directions of the first attention's input a round "
            f"({', '.join(self.readers) or 'no trained map reads it'}), {self.directions(rounds)} of {self.width} in "
            f"{rounds} rounds on the same data.",
        ]
        if self.silent:
            lines.append("The first round shows none, since B starts at 0.")
        if not self.accumulates:
            lines.append("Embeddings are trained: inputs move, and rounds do not add up exactly.")
        if self.projected:
            lines.append(self._through_b())
        if self.others:
            lines.append(f"{len(self.others)} more adapters read what no list of tokens gives: they serve as checks.")
        lines.append(
            f"Texts of {distinct_tokens} distinct tokens over {positions} positions: "
            f"{self.verdict(rounds, distinct_tokens, positions)}."
        )
        return "\n".join(lines)

    def _through_b(self) -> str:
        if self.projected:
            return (
                f"A is frozen: gradients of B show each input through {self.projected} fixed numbers, which tell "
                "tokens apart only while there are fewer of them than numbers a map"
            )
        return "gradients of B show inputs through r numbers a map, and tell fewer than r tokens apart"


def _moved(parameters: dict[str, nn.Parameter], part: Projection) -> bool:
    return part.lora_b is not None and bool(parameters[part.lora_b].detach().any())
