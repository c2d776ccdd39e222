"""What happens to a client's row between training and the channel."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import final

from torch import Generator, Tensor

from privfm.contracts.rules import State
from privfm.contracts.views import Reveals


@final
@dataclass(frozen=True)
class Encoded:
    """Rows as the wire carries them.

    Attributes:
      rows: `(k, w)`, what the next transform and in the end the channel carries.
      side: `{name: (k, ...)}`, what only a channel that reveals each row can carry (indices, scales).
      weight: what a client has multiplied its row by; the server expects `Intake.weights`.
    """

    rows: Tensor
    side: State
    weight: float = 1.0


class Transform(ABC):
    """A row-wise step. Row i of every result depends on row i, state row i and generator i only.

    It is either a client step (momentum, clip: a malicious client skips it, there is nothing to decode) or a codec
    (`binding`: the wire format everybody speaks, and the only thing the server decodes).

    Class constants:
      binding: it is a codec.
      additive: decoding a sum equals summing the decodings, without side information.
      integers: its rows are whole numbers.
    """

    binding = False
    additive = False
    integers = False

    @property
    def similarity(self) -> float | None:
        """The one factor by which decoding multiplies every length; None: there is none (Gram matrices would lie)."""
        return None

    @property
    def largest_coordinate(self) -> float | None:
        """Absolute value beyond which it refuses to encode a coordinate; None: no such bound."""
        return None

    @property
    def largest_whole(self) -> int | None:
        """Largest absolute whole number in its rows; None: unbounded, or no whole numbers."""
        return None

    @property
    def modulus(self) -> int | None:
        """Decoding reduces sums modulo this, so that they may wrap on the way; None: it does not."""
        return None

    def norm_bound(self, bound: float, d: int) -> float:
        """Largest L2 norm of `decode(encode(x))` over rows with `|x| <= bound` of width d."""
        return float("inf")

    def width(self, d: int) -> int:
        """Width on the wire of a row of width d."""
        return d

    def init(self, d: int) -> State:
        """One client's state before its first round, without a client dimension."""
        return {}

    @abstractmethod
    def encode(self, rows: Tensor, state: State, generators: Sequence[Generator]) -> tuple[Encoded, State]:
        """`rows (k, d)`, `state {name: (k, ...)}`, k generators -> encoded rows and the next state."""

    def decode(self, encoded: Encoded, d: int) -> Tensor:
        """-> `(k, d)`. A client step has nothing to decode."""
        return encoded.rows


MARGIN = 2.0**-20
"""A row is cut a millionth short of its bound, so that float32 rounding cannot end beyond it."""


@final
@dataclass(frozen=True)
class Intake:
    """How the server opens what arrives.

    Attributes:
      codecs: the wire format.
      d: width of a decoded row.
      needs: of the rule; a channel that reveals more may keep less (a rule that needs the sum costs one row).
      max_norm: the plan's clip, applied again wherever single rows are opened.
      least_answers: fewest clients whose sum may be revealed; a channel of sums ends the round before, with fewer.
      weights: what each client must have folded into its row, as the server knows it; 1 for all others.
    """

    codecs: Transform
    d: int
    needs: Reveals
    max_norm: float = float("inf")
    least_answers: int = 0
    weights: Mapping[int, float] = field(default_factory=dict)

    @property
    def width(self) -> int:
        """Width of a row on the wire."""
        return self.codecs.width(self.d)

    def row(self, encoded: Encoded) -> Tensor:
        """One encoded row `(1, w)` -> `(d,)`, clipped to `max_norm`."""
        row = self.codecs.decode(encoded, self.d)[0]
        norm = float(row.norm())
        return row * (self.max_norm * (1 - MARGIN) / norm) if norm > self.max_norm else row

    def total(self, values: Tensor) -> Tensor:
        """A sum on the wire `(w,)` -> `(d,)` float32; decoded as it comes, as float32 would cut whole numbers."""
        return self.codecs.decode(Encoded(values[None], {}), self.d)[0].float()
