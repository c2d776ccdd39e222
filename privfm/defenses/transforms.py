"""Client steps and codecs. A chain of transforms is a transform."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod, sqrt
from typing import final

import torch
from torch import Generator, Tensor

from privfm.blocks import finite
from privfm.checks import at_least, fraction, one_of, positive, require
from privfm.contracts import Encoded, State, Transform


@final
@dataclass(frozen=True)
class Clip(Transform):
    """Scales an update down to L2 norm `max_grad_norm` when it is longer.

    A client step: an attacker skips it. What depends on the bound must clip again where rows are opened.

    | row                              | result                                     |
    |----------------------------------|--------------------------------------------|
    | norm <= bound                    | unchanged bits                             |
    | zero                             | zero                                       |
    | NaN or inf                       | not finite, left out where rows are opened |
    | finite, norm beyond float32      | zero                                       |

    Args:
      max_grad_norm: L2 bound, in units of an update's norm.

    Source: McMahan et al., "Learning differentially private recurrent language models", 2018, "flat clipping".
    """

    max_grad_norm: float
    additive = True

    def __post_init__(self) -> None:
        positive("max_grad_norm", self.max_grad_norm)

    @property
    def similarity(self) -> float | None:
        return 1.0

    def norm_bound(self, bound: float, d: int) -> float:
        return min(bound, self.max_grad_norm)

    def encode(self, rows: Tensor, state: State, generators: Sequence[Generator]) -> tuple[Encoded, State]:
        norms = rows.norm(dim=1, keepdim=True)
        factor = (self.max_grad_norm / norms).clamp(max=1)  # 1 for a zero row: bound / 0 = inf
        return Encoded(rows * factor, {}), state


@final
@dataclass(frozen=True)
class ClientMomentum(Transform):
    """Each client sends a running sum or average of its updates: what honest clients send varies less.

    A client step: an attacker skips it. The published results of robust rules need it, with one of two conventions:

    | dampening | memory                      | length, where updates repeat |
    |-----------|-----------------------------|------------------------------|
    | none      | m <- beta m + g             | 1 / (1 - beta) times         |
    | beta      | m <- beta m + (1 - beta) g  | once                         |

    The memory is a client's own, starts at zero, and waits while the client is not sampled. A length that a rule is
    given (the radius of CenteredClipping) must fit the convention: `radius / (1 - beta)` under "none".

    A result that is not finite is sent as it is, to be left out where rows are opened, and is not remembered: one bad
    update costs a client one round and not all that follow.

    Args:
      beta: share of the memory that stays, in [0, 1).
      dampening: how much of a new update is held back: "none" or "beta".

    Source: Karimireddy, He, Jaggi, "Learning from history for Byzantine robust optimization", 2021 ("beta" is
    the text's); the authors' experiments, there and for bucketing (2022), run "none".
    """

    beta: float
    dampening: str = "none"
    additive = True

    def __post_init__(self) -> None:
        fraction("beta", self.beta, zero=True, one=False)
        one_of("dampening", self.dampening, ("none", "beta"))

    @property
    def similarity(self) -> float | None:
        return 1.0

    def norm_bound(self, bound: float, d: int) -> float:
        """Of a client all of whose rows so far kept to `bound`."""
        return bound if self.dampening == "beta" else bound / (1 - self.beta)

    def init(self, d: int) -> State:
        return {"momentum": torch.zeros(d)}

    def encode(self, rows: Tensor, state: State, generators: Sequence[Generator]) -> tuple[Encoded, State]:
        memory = state["momentum"]
        share = 1 - self.beta if self.dampening == "beta" else 1.0
        momentum = torch.add(rows if share == 1 else share * rows, memory.to(rows.device), alpha=self.beta)
        sent, new = momentum.to(rows.dtype), momentum.to(memory)
        good = (finite(sent).to(memory.device) & finite(new))[:, None]
        return Encoded(sent, {}), {"momentum": new if good.all() else torch.where(good, new, memory)}


@final
@dataclass(frozen=True)
class FixedPoint(Transform):
    """Whole steps of a public grid, rounded at random without bias: what channels of whole numbers carry.

    | coordinate                       | result                                                             |
    |----------------------------------|--------------------------------------------------------------------|
    | a whole multiple of the step     | itself                                                             |
    | between two multiples            | one of them, the nearer one more likely; its mean is the coordinate |
    | beyond `bound`, NaN or inf       | the row becomes NaN: a channel of whole numbers refuses to send it  |

    Nothing is cut to fit: that would bend the sum silently. On the wire a row is float64 and every number in it whole.

    Args:
      bound: largest absolute coordinate, in units of an update; an L2 clip is one.
      bits: resolution; a step is `bound / 2^bits`.

    Source: Alistarh et al., "QSGD: communication-efficient SGD via gradient quantization and encoding", 2017, section
    3.1 (stochastic quantisation), with a fixed scale: one that follows each row could not be summed.
    """

    bound: float
    bits: int
    binding = True
    additive = True
    integers = True

    def __post_init__(self) -> None:
        positive("bound", self.bound)
        at_least("bits", self.bits, 1)
        require(self.bits <= _MOST_BITS, f"bits={self.bits}: expected at most {_MOST_BITS}, which float64 sums hold")

    @property
    def step(self) -> float:
        """One unit of the grid, in units of an update."""
        return self.bound / 2.0**self.bits

    @property
    def similarity(self) -> float | None:
        return self.step

    @property
    def largest_coordinate(self) -> float | None:
        return self.bound

    @property
    def largest_whole(self) -> int | None:
        return 1 << self.bits

    def norm_bound(self, bound: float, d: int) -> float:
        return bound + self.step * sqrt(d)

    def error_bound(self, d: int, n: int) -> float:
        """Largest L2 distance of the sum of n decoded rows `(d,)` from the plain sum; a worst case."""
        return n * sqrt(d) * self.step

    def encode(self, rows: Tensor, state: State, generators: Sequence[Generator]) -> tuple[Encoded, State]:
        steps = rows.double() / self.step
        floors = steps.floor()
        draws = [torch.rand(rows.shape[1], generator=one, dtype=torch.float64) for one in generators]
        up = torch.stack(draws).to(rows.device) < steps - floors if draws else floors
        fits = (rows.double().abs() <= self.bound).all(dim=1, keepdim=True)
        return Encoded(torch.where(fits, floors + up, torch.nan), {}), state

    def decode(self, encoded: Encoded, d: int) -> Tensor:
        return (encoded.rows.double() * self.step).float()


_MOST_BITS = 44  # with sums of up to 512 rows below 2^53, the whole numbers of float64


@final
@dataclass(frozen=True)
class Chain(Transform):
    """Transforms one after the other; state and side information of part i carry the prefix `i/`."""

    parts: tuple[Transform, ...]

    @property
    def additive(self) -> bool:  # type: ignore[override]  # a constant on a single transform, derived here
        return all(part.additive for part in self.parts)

    @property
    def binding(self) -> bool:  # type: ignore[override]
        return all(part.binding for part in self.parts)

    @property
    def integers(self) -> bool:  # type: ignore[override]
        return bool(self.parts) and self.parts[-1].integers

    @property
    def similarity(self) -> float | None:
        factors = [part.similarity for part in self.parts]
        return None if None in factors else prod(factor for factor in factors if factor is not None)

    @property
    def largest_coordinate(self) -> float | None:
        """Of the first part that has one, in units of an update where the parts before it keep them."""
        scale: float | None = 1.0
        for part in self.parts:
            if part.largest_coordinate is not None:
                return None if scale is None else scale * part.largest_coordinate
            factor = part.similarity if part.binding else 1.0
            scale = None if scale is None or factor is None else scale * factor
        return None

    @property
    def largest_whole(self) -> int | None:
        return self.parts[-1].largest_whole if self.parts else None

    @property
    def modulus(self) -> int | None:
        return self.parts[-1].modulus if self.parts else None

    def norm_bound(self, bound: float, d: int) -> float:
        scale: float | None = 1.0  # decoded length of a row of length 1 as the next part sees it
        for part, width in zip(self.parts, self._widths(d), strict=False):
            if scale is None:  # how much decoding lengthens what the part adds is not known
                return float("inf")
            bound = scale * part.norm_bound(bound / scale, width)
            factor = part.similarity if part.binding else 1.0
            scale = None if factor is None else scale * factor
        return bound

    def width(self, d: int) -> int:
        return self._widths(d)[-1]

    def init(self, d: int) -> State:
        widths = self._widths(d)
        return {f"{i}/{k}": v for i, part in enumerate(self.parts) for k, v in part.init(widths[i]).items()}

    def encode(self, rows: Tensor, state: State, generators: Sequence[Generator]) -> tuple[Encoded, State]:
        side: State = {}
        after: State = {}
        for i, part in enumerate(self.parts):
            encoded, new = part.encode(rows, _under(state, i), generators)
            rows = encoded.rows
            side |= {f"{i}/{k}": v for k, v in encoded.side.items()}
            after |= {f"{i}/{k}": v for k, v in new.items()}
        return Encoded(rows, side), after

    def decode(self, encoded: Encoded, d: int) -> Tensor:
        rows, widths = encoded.rows, self._widths(d)
        for i in reversed(range(len(self.parts))):
            rows = self.parts[i].decode(Encoded(rows, _under(encoded.side, i)), widths[i])
        return rows

    def _widths(self, d: int) -> list[int]:
        """Width before each part, and after the last."""
        return list(accumulate(self.parts, lambda width, part: part.width(width), initial=d))


def _under(state: State, i: int) -> State:
    prefix = f"{i}/"
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
