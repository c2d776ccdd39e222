"""A federation of toys: linear softmax regression on scikit-learn's digits, and protocols to throw at the contracts."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, final

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from sklearn.datasets import load_digits
from torch import Generator, Tensor

from privfm.adapters import AdapterLayout
from privfm.checks import InvalidArgument, RoundFailed
from privfm.contracts import (
    KEY_HOLDER,
    Channel,
    DataAttack,
    Encoded,
    Examples,
    Exchange,
    GradientPrivacy,
    GramLimits,
    Intake,
    Knowledge,
    Learner,
    MatrixView,
    Memory,
    Metric,
    Party,
    Reveals,
    Spans,
    Split,
    State,
    Trained,
    Transform,
    Update,
    UpdateAttack,
    View,
)
from privfm.defenses.channels.plaintext import packed, unpacked
from privfm.defenses.views import SumView
from privfm.engines import Local
from privfm.federation import Arm, Federation, FixedSize, Population
from privfm.randomness import Seeds

CLASSES, FEATURES, CLIENTS, EACH = 10, 64, 60, 24


@final
class DigitsLearner(Learner):
    """Five gradient steps of softmax regression; raises for clients in `fails`."""

    def __init__(self, x: Tensor, y: Tensor, fails: frozenset[int] = frozenset()) -> None:
        self.x, self.y, self.fails = x, y, fails
        self.batches: list[int] = []

    @property
    def d(self) -> int:
        return CLASSES * FEATURES

    def initial(self) -> Tensor:
        return torch.zeros(self.d)

    def train(
        self,
        model: Tensor,
        batch: Sequence[Examples],
        generators: Sequence[Generator],
        privacy: GradientPrivacy | None = None,
        active: Tensor | None = None,
    ) -> Trained:
        self.batches.append(len(batch))
        rows, failed = [], {}
        for place, (examples, generator) in enumerate(zip(batch, generators, strict=True)):
            if int(examples.rows[0]) // EACH in self.fails:
                failed[place] = "ValueError: no good"
            w = model.view(CLASSES, FEATURES).clone()
            order = torch.randperm(len(examples), generator=generator)
            x, y = examples.inputs["x"][order], examples.labels[order]
            for half in order.argsort().split(EACH // 2):
                error = (x[half] @ w.T).softmax(1) - torch.nn.functional.one_hot(y[half], CLASSES).float()
                w = w - 0.5 * error.T @ x[half] / len(half)
            rows.append(w.flatten() - model)
        return Trained(torch.stack(rows), failed)

    def evaluate(self, model: Tensor, split: Split) -> dict[str, Metric]:
        right = ((self.x @ model.view(CLASSES, FEATURES).T).argmax(1) == self.y).float()
        return {"accuracy": Metric(float(right.mean()), len(right), True, "share", right)}


@final
class Told(Learner):
    """Clients whose updates are given, by their label; those in `fails` raise, and leave rubbish behind."""

    def __init__(
        self,
        rows: Tensor,
        fails: Sequence[int] = (),
        adapters: AdapterLayout | None = None,
        layers: Spans | None = None,
    ) -> None:
        self.rows, self.fails, self.layout = rows, fails, adapters
        self.spans = ((0, self.d),) if layers is None else layers
        self.asked: list[int] = []

    @property
    def d(self) -> int:
        return self.rows.shape[1]

    @property
    def adapters(self) -> AdapterLayout | None:
        return self.layout

    @property
    def layers(self) -> Spans:
        return self.spans

    def initial(self) -> Tensor:
        return torch.zeros(self.d)

    def train(
        self,
        model: Tensor,
        batch: Sequence[Examples],
        generators: Sequence[Generator],
        privacy: GradientPrivacy | None = None,
        active: Tensor | None = None,
    ) -> Trained:
        ids = [int(examples.labels[0]) for examples in batch]
        self.asked += ids
        failed = {place: "ValueError: no good" for place, client in enumerate(ids) if client in self.fails}
        rows = self.rows[ids].clone()
        rows[list(failed)] = -1000.0  # undefined, and not even NaN
        return Trained(rows if active is None else rows.masked_fill(~active, 0.0), failed)

    def evaluate(self, model: Tensor, split: Split) -> dict[str, Metric]:
        return {"zero": Metric(0.0, 1, True, "share")}


@pytest.fixture(scope="session")
def digits() -> tuple[Examples, Tensor, Tensor]:
    data, target = load_digits(return_X_y=True)
    order = torch.randperm(len(data), generator=Generator().manual_seed(0))
    x, y = torch.tensor(data / 16, dtype=torch.float32)[order], torch.tensor(target, dtype=torch.int64)[order]
    cut = CLIENTS * EACH
    return Examples({"x": x[:cut]}, y[:cut], torch.arange(cut)), x[cut:], y[cut:]


@pytest.fixture
def federation(digits: tuple[Examples, Tensor, Tensor]) -> Callable[..., Federation]:
    """`federation(rule=..., engine=..., fails=..., strict=...)`: 60 clients, a cohort of 30."""

    def make(
        engine: Any = None, fails: frozenset[int] = frozenset(), strict: bool = False, seed: int = 1, **arm: Any
    ) -> Federation:
        everything, x, y = digits
        if arm.get("plan") is None:
            arm.setdefault("cohort", FixedSize(30))
        clients = Population.of(everything, list(torch.arange(CLIENTS * EACH).split(EACH)))
        return Federation(Arm(**arm), DigitsLearner(x, y, fails), clients, Seeds(seed), engine or Local(), strict)

    return make


@final
@dataclass(frozen=True)
class ThreeStages(Channel):
    """Pairwise masks on integers modulo 2^64, in three stages, with a toy key agreement."""

    reveals = Reveals.SUM
    client_stages = ("keys", "masked", "unmask")
    integers = True

    @property
    def learns(self) -> dict[str, str]:
        return {"server": "the sum", "clients": "the released model", "trust": "the server"}

    def reply(self, party: Party, stage: str, memory: Memory, request: bytes, update: Update) -> tuple[Memory, bytes]:
        if stage == "keys":
            secret = os.urandom(16)
            return {**memory, "secret": secret}, secret
        keys = {int(k): bytes.fromhex(v) for k, v in json.loads(memory.get("keys", request)).items()}
        if stage == "masked":
            values = update().rows[0].to(torch.int64).numpy().copy()
            for other in keys.keys() - {party.number}:
                values += _mask(party.number, other, _pair(memory["secret"], keys[other]), len(values))
            return {**memory, "keys": request}, values.tobytes()
        shared = {other: _pair(memory["secret"], keys[other]).hex() for other in json.loads(request)}
        return memory, json.dumps(shared).encode()

    def collect(self, cohort: Sequence[int], intake: Intake, exchange: Exchange) -> View:
        keys = dict(exchange("keys", dict.fromkeys(cohort, b"")))
        known = json.dumps({i: k.hex() for i, k in keys.items()}).encode()
        total, ids = np.zeros(intake.width, np.int64), set()
        for party, reply in exchange("masked", dict.fromkeys(keys, known)):
            total += np.frombuffer(reply, np.int64)
            ids.add(party)
        gone = json.dumps(sorted(keys.keys() - ids)).encode()
        opened = dict(exchange("unmask", dict.fromkeys(sorted(ids), gone)))
        if gone != b"[]" and opened.keys() != ids:
            raise RoundFailed("a survivor left before the masks of the dropped were opened")
        for party, reply in opened.items():
            for other, seed in json.loads(reply).items():
                total -= _mask(party, int(other), bytes.fromhex(seed), len(total))
        values = torch.from_numpy(total).float()
        return SumView(lambda: intake.total(values), tuple(sorted(ids)), intake.d)


def _pair(a: bytes, b: bytes) -> bytes:
    return bytes(x ^ y for x, y in zip(a, b, strict=True))


def _mask(me: int, other: int, seed: bytes, d: int) -> Any:
    stream = np.random.default_rng(int.from_bytes(sha256(seed).digest(), "big"))
    return (1 if me < other else -1) * stream.integers(-(2**62), 2**62, d)


@final
@dataclass(frozen=True)
class GramVault(Channel):
    """A key holder that sees rows and answers one Gram request and one weighted sum; the server sees no row."""

    smallest_release: float
    max_references: int = 1
    reveals = Reveals.GRAM
    client_stages = ("update",)
    key_holder_stages = ("store", "gram", "sum")

    @property
    def learns(self) -> dict[str, str]:
        return {"server": "inner products", "key holder": "every update", "clients": "nothing", "trust": "both"}

    @property
    def limits(self) -> GramLimits:
        return GramLimits(self.max_references, self.smallest_release)

    def reply(self, party: Party, stage: str, memory: Memory, request: bytes, update: Update) -> tuple[Memory, bytes]:
        if stage == "update":
            return memory, packed(update())
        asked = load(request)
        if stage == "store":
            return {**memory, **{str(k): v.numpy().tobytes() for k, v in asked.items()}}, b""
        own = sorted(int(k) for k in memory if k.isdigit())
        width = int(asked["width"])
        rows = torch.cat([unpacked(memory[str(i)], width).rows for i in own]).float()
        if stage == "gram":
            if len(asked["references"]) > self.max_references:
                raise InvalidArgument(f"{len(asked['references'])} references; each measures every client's row")
            return memory, save({"gram": MatrixView(rows).gram(asked["references"])})
        weights = asked["weights"].double()
        if float(weights.sum() ** 2 / weights.square().sum()) < self.smallest_release - 1e-9:
            raise InvalidArgument("the weights single out too few clients")
        return memory, save({"sum": weights.float() @ rows})

    def collect(self, cohort: Sequence[int], intake: Intake, exchange: Exchange) -> View:
        sealed = dict(exchange("update", dict.fromkeys(cohort, b"")))
        store = save({str(i): torch.frombuffer(bytearray(v), dtype=torch.uint8) for i, v in sealed.items()})
        dict(exchange("store", {KEY_HOLDER: store}))
        return VaultView(intake, tuple(sorted(sealed)), exchange)


@final
class VaultView(View):
    reveals = Reveals.GRAM

    def __init__(self, intake: Intake, ids: tuple[int, ...], exchange: Exchange) -> None:
        self.ids, self.d, self.intake, self.exchange = ids, intake.d, intake, exchange
        self.scale = intake.codecs.similarity or 1.0

    def _ask(self, stage: str, **tensors: Tensor) -> dict[str, Tensor]:
        request = save({**tensors, "width": torch.tensor(self.intake.width)})
        return load(dict(self.exchange(stage, {KEY_HOLDER: request}))[KEY_HOLDER])

    def total(self) -> Tensor:
        return self.weighted_sum(torch.ones(self.n), torch.zeros(0, self.d))

    def gram(self, references: Tensor) -> Tensor:
        return self._ask("gram", references=references.contiguous() / self.scale)["gram"] * self.scale**2

    def weighted_sum(self, weights: Tensor, references: Tensor) -> Tensor:
        own = weights[self.n :].to(references.dtype) @ references
        return self.intake.total(self._ask("sum", weights=weights[: self.n].contiguous())["sum"]) + own


@final
@dataclass(frozen=True)
class ClientMomentum(Transform):
    """A client step with state."""

    beta: float
    additive = True

    @property
    def similarity(self) -> float:
        return 1.0

    def init(self, d: int) -> State:
        return {"momentum": torch.zeros(d)}

    def encode(self, rows: Tensor, state: State, generators: Sequence[Generator]) -> tuple[Encoded, State]:
        momentum = self.beta * state["momentum"] + (1 - self.beta) * rows
        return Encoded(momentum, {}), {"momentum": momentum}


@final
@dataclass(frozen=True)
class TopK(Transform):
    """A codec that is not additive: values and, on the side, where they stand."""

    k: int
    binding = True

    def norm_bound(self, bound: float, d: int) -> float:
        return bound

    def width(self, d: int) -> int:
        return min(self.k, d)

    def encode(self, rows: Tensor, state: State, generators: Sequence[Generator]) -> tuple[Encoded, State]:
        at = rows.abs().topk(self.width(rows.shape[1]), dim=1).indices
        return Encoded(rows.gather(1, at), {"indices": at}), state

    def decode(self, encoded: Encoded, d: int) -> Tensor:
        return torch.zeros(len(encoded.rows), d).scatter_(1, encoded.side["indices"], encoded.rows)


@final
@dataclass(frozen=True)
class Sketch(Transform):
    """A codec that is additive but changes angles: a public linear map to a tenth of the width."""

    additive = True
    binding = True

    def width(self, d: int) -> int:
        return d // 10

    def encode(self, rows: Tensor, state: State, generators: Sequence[Generator]) -> tuple[Encoded, State]:
        return Encoded(rows @ self._map(rows.shape[1]), {}), state

    def decode(self, encoded: Encoded, d: int) -> Tensor:
        return encoded.rows @ self._map(d).T

    def _map(self, d: int) -> Tensor:
        return torch.randn(d, d // 10, generator=Generator().manual_seed(0)) / (d // 10) ** 0.5


@final
@dataclass(frozen=True)
class Quantize(Transform):
    """A codec of whole numbers: stochastic rounding to multiples of one public step."""

    step: float
    additive = True
    binding = True
    integers = True

    @property
    def similarity(self) -> float:
        return self.step

    def norm_bound(self, bound: float, d: int) -> float:
        return bound + self.step * d**0.5

    def encode(self, rows: Tensor, state: State, generators: Sequence[Generator]) -> tuple[Encoded, State]:
        dice = [torch.rand(rows.shape[1], generator=generator) for generator in generators]
        return Encoded((rows / self.step + torch.stack(dice)).floor() if dice else rows, {}), state

    def decode(self, encoded: Encoded, d: int) -> Tensor:
        return encoded.rows * self.step


@final
@dataclass(frozen=True)
class Huge(UpdateAttack):
    """Ignores every client step."""

    norm: float

    @property
    def knowledge(self) -> tuple[str, ...]:
        return ()

    def bend(self, state: State, own: Tensor, honest: Knowledge, generator: Generator) -> tuple[State, Tensor]:
        return state, torch.full_like(own, self.norm / own.shape[1] ** 0.5)


@final
@dataclass(frozen=True)
class NotANumber(UpdateAttack):
    @property
    def knowledge(self) -> tuple[str, ...]:
        return ()

    def bend(self, state: State, own: Tensor, honest: Knowledge, generator: Generator) -> tuple[State, Tensor]:
        return state, torch.full_like(own, torch.nan)


@final
@dataclass(frozen=True)
class LabelFlip(DataAttack):
    @property
    def knowledge(self) -> tuple[str, ...]:
        return ("labels",)

    def poison(self, examples: Examples, generator: Generator) -> Examples:
        return examples.with_labels(CLASSES - 1 - examples.labels)


@pytest.fixture
def toys() -> Mapping[str, Any]:
    """Classes to throw away, by name: tests in importlib mode cannot import each other."""
    kinds = (ThreeStages, GramVault, ClientMomentum, TopK, Sketch, Quantize, Huge, NotANumber, LabelFlip, DigitsLearner,
             Told)  # fmt: skip
    return {kind.__name__: kind for kind in kinds}
