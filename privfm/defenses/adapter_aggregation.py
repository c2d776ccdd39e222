"""From an aggregate in weight space to a model: new factors to broadcast, and what the frozen weights take.

A weighted sum of n changes has rank up to r (n + 1); factors hold rank r. What does not fit goes into the frozen weight
(the round is exact) or is dropped. The names are the field's:

| mode | factors | frozen weight | source |
|---|---|---|---|
| `flora` | drawn anew, B = 0 | takes everything | Wang et al., "FLoRA: federated fine-tuning large language models with heterogeneous low-rank adaptations", 2024 |
| `fedex` | weighted mean of the clients' | takes the rest | Singhal et al., "FedEx-LoRA: exact aggregation for federated and efficient fine-tuning of foundation models", 2025 |
| `flexlora` | best approximation of rank r | nothing, or with `exact` the rest | Bai et al., "Federated fine-tuning of large language models under heterogeneous tasks and client resources" (FlexLoRA), 2024 |
| `fedask` | that approximation, found from two sketches | nothing, or with `exact` the rest | Wen et al., "Differentially private federated low rank adaptation beyond fixed-matrix" (FedASK), 2025 |

FedASK lets a server that sees nothing but sums (a secure aggregation) form the best factors of the mean product. With a
public Gaussian matrix O of r + p columns, client k first sends `B_k (A_k O)`, whose mean has an orthonormal basis Q that
the server sends back; then `A_k^T (B_k^T Q)`, whose mean is the rest of the product seen from Q. On the wire that is two
stages and (r + p) (outputs + inputs) values a client up, (r + p) outputs more down, where factors are r (outputs +
inputs). Here the rows are revealed, so that both sums are formed from them: the result is the protocol's, the bytes of a
round's record are those of the factors. A sketch hides nothing. What privacy there is comes from the plan under which the
clients trained, of whose output this is post-processing.
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Literal, final

import torch
from torch import Generator, Tensor

from privfm.adapters import AdapterLayout, FactorPair
from privfm.checks import InvalidArgument, at_least, one_of, require
from privfm.contracts import MatrixView, Rule, State
from privfm.defenses.geometry import Change, ProductView
from privfm.vectors import Layout

Mode = Literal["flora", "fedex", "flexlora", "fedask"]
MODES: tuple[Mode, ...] = ("flora", "fedex", "flexlora", "fedask")
PROJECTIONS: tuple[Mode, ...] = ("flexlora", "fedask")
"""What does not fit rank r is dropped by these, unless they are asked to be exact."""

OVERSAMPLING = 5
"""Columns of a sketch beyond the rank. Halko, Martinsson, Tropp, "Finding structure with randomness", 2011, section
1.3.
"""

Gauge = Literal["nearest", "balanced"]
Triples = tuple[Tensor, Tensor, Tensor]
"""Singular value decomposition: `(out, j)`, `(j,)`, `(in, j)`."""


@final
@dataclass(frozen=True)
class NextAdapters:
    """What the server broadcasts next.

    Attributes:
      broadcast: `(d,)`, of the type of the last one.
      base_change: by module, what the frozen weight `(outputs, inputs)` must take, float64; empty where it takes
        nothing. (GPT-2's Conv1D stores the transpose.)
      dropped: length of what fits neither, in lengths of the round's change of the adapted weights.
    """

    broadcast: Tensor
    base_change: dict[str, Tensor]
    dropped: float


def next_adapters(
    broadcast: Tensor,
    change: Change,
    mode: Mode = "flexlora",
    *,
    exact: bool = False,
    gauge: Gauge | None = None,
    generator: Generator | None = None,
    oversampling: int = OVERSAMPLING,
) -> NextAdapters:
    """Applies a change to the factors and the frozen weights; plain entries simply add.

    Under `flora`, `fedex` and `exact` the next model is the last one plus the change, up to the rounding of the frozen
    weights: what the factors lose when they are rounded is made good there. A change of zero changes no bit of the
    factors (but under `flora`).

    Args:
      broadcast: the factors and plain entries that clients received, `(d,)`; not changed.
      change: of the round (`ProductView.change`, `ProductView.explained`, `Change.dense`).
      mode: see the table above.
      exact: under `flexlora` and `fedask`, the frozen weights take what rank r cannot hold.
      gauge: which of the many factors of one product these two broadcast; None: `nearest` under `flexlora`, `balanced`
        under `fedask`, as its authors do. `nearest` keeps A0's inner products
        `A A^T = A0 A0^T` and turns its rows by the least angles onto the new row space (orthogonal Procrustes,
        Schoenemann 1966); B follows. Then A neither grows nor shrinks, whatever clients send, equal products come back
        as they were, the result moves with the gauge of the broadcast, and small changes (against the gap between
        the r-th and the next singular value) move it little.
        `balanced` splits singular values evenly and sorts components, so that the first r_i are the best of rank r_i:
        for clients of mixed ranks. Components without use keep a direction of A0, or they would never learn again.
      generator: draws A under `flora`, uniform within `1/sqrt(inputs)` as PEFT does, and the sketch under `fedask`.
      oversampling: p, columns of the sketch beyond r. While the mean product has no more than r + p singular values
        above zero, `fedask` equals `flexlora`; what a narrower sketch misses is counted in `dropped`.

    Raises:
      InvalidArgument: `fedex` without mean factors, `flora` or `fedask` without a generator, or an A0 that has no gauge
        near it.
    """
    one_of("mode", mode, MODES)
    gauge = gauge or ("balanced" if mode == "fedask" else "nearest")
    one_of("gauge", gauge, ("nearest", "balanced"))
    at_least("oversampling", oversampling, 0)
    layout = change.layout
    require(broadcast.shape == (layout.d,), f"broadcast has shape {tuple(broadcast.shape)}, not ({layout.d},)")
    old, new = broadcast.to(change.plain), broadcast.clone()
    start, base, lost, moved = 0, dict[str, Tensor](), 0.0, 0.0
    for pair, left, right in zip(layout.pairs, change.left, change.right, strict=True):
        a0, b0 = pair.a(old), pair.b(old)
        own = float(_core(left, right)[1].norm())
        target = torch.cat([left, b0], 1), torch.cat([right, a0])
        a, b = a0, b0
        if mode == "flora":
            a, b = _drawn(pair, generator).to(old), torch.zeros_like(b0)
        elif mode == "fedex":
            a, b = _mean(pair, a0, b0, change.factors)
        elif own > 0:
            if mode == "fedask":
                triples, tail = _sketched(pair, *target, oversampling, generator)
            else:
                triples, tail = _leading(pair, *target)
            a, b = (_nearest if gauge == "nearest" else _balanced)(pair, a0, triples)
            lost += (pair.scaling * tail) ** 2
        moved += (pair.scaling * own) ** 2
        pair.a(new)[:], pair.b(new)[:] = a.to(new.dtype), b.to(new.dtype)
        if mode not in PROJECTIONS or exact:
            rounded = pair.b(new).to(old) @ pair.a(new).to(old)
            base[pair.module] = pair.scaling * (target[0] @ target[1] - rounded)
    for lo, hi in layout.plain:
        new[lo:hi] = (old[lo:hi] + change.plain[start : start + hi - lo]).to(new.dtype)
        start += hi - lo
    dropped = 0.0 if mode not in PROJECTIONS or exact or moved == 0 else sqrt(lost / moved)
    return NextAdapters(new, base, dropped)


def _leading(pair: FactorPair, left: Tensor, right: Tensor) -> tuple[Triples, float]:
    """The leading r singular triples of `left @ right`, without those of rounding size, and the length of the rest."""
    outer, core, inner = _core(left, right)
    u, values, vh = torch.linalg.svd(core)
    j = _kept(pair, values)
    return (outer @ u[:, :j], values[:j], inner @ vh[:j].T), float(values[pair.rank :].norm())


def _kept(pair: FactorPair, values: Tensor) -> int:
    """How many of the r leading singular values are more than rounding."""
    noise = torch.finfo(values.dtype).eps * max(pair.outputs, pair.inputs) * values[0]
    return min(pair.rank, int((values > noise).sum()))


def _sketched(
    pair: FactorPair, left: Tensor, right: Tensor, oversampling: int, generator: Generator | None
) -> tuple[Triples, float]:
    """What `_leading` returns, of the mean product as two sketches know it, and the length of what they miss.

    Every line but the last two is a sum over clients, or made from one: left and right are the clients' factors side by
    side.
    """
    if generator is None:
        raise InvalidArgument("generator=None: mode='fedask' draws its sketch; give a generator")
    width = min(pair.rank + oversampling, pair.inputs, pair.outputs)  # a wider sketch holds nothing more
    sketch = torch.randn(pair.inputs, width, generator=generator, dtype=torch.float64).to(left)
    basis, _ = torch.linalg.qr(left @ (right @ sketch))
    rest = right.T @ (left.T @ basis)
    u, values, vh = torch.linalg.svd(rest.T, full_matrices=False)
    j = _kept(pair, values)
    unseen = _core(left - basis @ (basis.T @ left), right)[1].norm()
    missed = torch.hypot(unseen, values[pair.rank :].norm())
    return (basis @ u[:, :j], values[:j], vh[:j].T), float(missed)


def _turned(pair: FactorPair, a0: Tensor, q: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`A0 = L N` with orthonormal rows in N, the orthonormal K nearest to `N q (r, j)`, and what that leaves."""
    require(pair.rank <= pair.inputs, f"{pair.module}: rank {pair.rank} is above the module's {pair.inputs} inputs")
    n, upper = torch.linalg.qr(a0.T)
    e, _, fh = torch.linalg.svd(n.T @ q)
    j = q.shape[1]
    return upper.T, n.T, e[:, :j] @ fh, e[:, j:]


def _nearest(pair: FactorPair, a0: Tensor, triples: Triples) -> tuple[Tensor, Tensor]:
    """A = L (K Q^T + (1 - K K^T) N), B = P S K^T L^-1: then B A = P S Q^T and A A^T = L L^T."""
    p, s, q = triples
    lower, n, k, rest = _turned(pair, a0, q)
    spread = torch.linalg.svdvals(lower)
    require(
        bool(spread[-1] > torch.finfo(spread.dtype).eps * pair.inputs * spread[0]),
        f"{pair.module}: the rows of the broadcast A depend on each other; use gauge='balanced'",
    )
    return lower @ (k @ q.T + rest @ (rest.T @ n)), torch.linalg.solve(lower.T, k @ (p * s).T).T


def _balanced(pair: FactorPair, a0: Tensor, triples: Triples) -> tuple[Tensor, Tensor]:
    """A = S^1/2 Q^T, B = P S^1/2; unused components have B = 0 and a row of A0's space, of its rows' mean length."""
    p, s, q = triples
    _, n, _, rest = _turned(pair, a0, q)
    a = torch.cat([s.sqrt()[:, None] * q.T, a0.norm() / sqrt(pair.rank) * rest.T @ n])
    return a, torch.cat([p * s.sqrt(), p.new_zeros(pair.outputs, pair.rank - len(s))], 1)


def _core(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`left @ right` as `outer @ core @ inner.T` with orthonormal columns, at most as wide as the terms are many."""
    outer, upper = torch.linalg.qr(left)
    inner, lower = torch.linalg.qr(right.T)
    return outer, upper @ lower.T, inner


def _drawn(pair: FactorPair, generator: Generator | None) -> Tensor:
    if generator is None:
        raise InvalidArgument("generator=None: mode='flora' draws new factors; give a generator")
    bound = 1 / sqrt(pair.inputs)
    return torch.empty(pair.rank, pair.inputs).uniform_(-bound, bound, generator=generator)


def _mean(pair: FactorPair, a0: Tensor, b0: Tensor, factors: Tensor | None) -> tuple[Tensor, Tensor]:
    if factors is None:
        raise InvalidArgument(
            "mode='fedex' needs the mean of the factors, and this aggregate is no weighted sum of rows; use 'flexlora'"
        )
    return a0 + pair.a(factors), b0 + pair.b(factors)


@final
@dataclass(frozen=True)
class AdapterOutcome:
    """What `aggregate_adapters` returns.

    Attributes:
      factors: the next adapter, by the names and types of the broadcast.
      base_change: see `NextAdapters`.
      dropped: see `NextAdapters`.
      weights: `(n,)`, of every client that was given, zero for those left out; None where the rule has none.
      state: what the rule remembers; hand it to the next call.
    """

    factors: dict[str, Tensor]
    base_change: dict[str, Tensor]
    dropped: float
    weights: Tensor | None
    state: State


def aggregate_adapters(
    rule: Rule,
    adapters: Sequence[Mapping[str, Tensor]],
    broadcast: Mapping[str, Tensor],
    scaling: float | Mapping[str, float],
    mode: Mode = "flexlora",
    *,
    exact: bool = False,
    gauge: Gauge | None = None,
    state: State | None = None,
    generator: Generator | None = None,
) -> AdapterOutcome:
    """One robust round on PEFT adapters, in the geometry of the weights: the way into other people's code.

    Args:
      rule: any rule; it sees changes of weights.
      adapters: of the clients after training, as `get_peft_model_state_dict` gives them. A client of smaller rank has
        trained the first components of the broadcast.
      broadcast: the adapter that they started from.
      scaling: alpha / rank of the broadcast, one for all or by module. A client with another scaling folds it into B.
      mode: see `next_adapters`.
      exact: see `next_adapters`.
      gauge: see `next_adapters`.
      state: the rule's, from the last call; None before the first.
      generator: for rules and modes that draw; seeded with 0 when None.

    >>> from privfm.defenses import Mean
    >>> received = {"q.lora_A.weight": torch.eye(1, 3), "q.lora_B.weight": torch.zeros(2, 1)}
    >>> trained = [{**received, "q.lora_B.weight": torch.tensor([[1.0], [k]])} for k in (1.0, 3.0)]
    >>> outcome = aggregate_adapters(Mean(), trained, received, scaling=1.0)
    >>> outcome.factors["q.lora_B.weight"].flatten().tolist(), outcome.dropped < 1e-9
    ([1.0, 2.0], True)
    """
    require(len(adapters) > 0, "adapters: expected those of one client at least")
    vectors = Layout.of(broadcast)
    layout = AdapterLayout.of(vectors, scaling)
    received = torch.cat([broadcast[name].detach().flatten() for name in vectors.names])  # of the widest type
    rows = torch.stack([_update(own, broadcast, vectors) for own in adapters])
    view = ProductView(MatrixView(rows), layout, received)
    generator = Generator().manual_seed(0) if generator is None else generator
    state, outcome = rule.aggregate(rule.init(view.d) if state is None else state, view, generator)
    after = next_adapters(received, view.explained(outcome), mode, exact=exact, gauge=gauge, generator=generator)
    weights = outcome.weights
    if weights is not None:
        weights = weights.new_zeros(len(adapters)).index_put_((torch.tensor(view.ids, device=weights.device),), weights)
    parts = torch.split(after.broadcast, list(vectors.sizes))
    factors = {
        name: part.view_as(broadcast[name]).to(broadcast[name].dtype)
        for name, part in zip(vectors.names, parts, strict=True)
    }
    return AdapterOutcome(factors, after.base_change, after.dropped, weights, state)


def _update(own: Mapping[str, Tensor], broadcast: Mapping[str, Tensor], vectors: Layout) -> Tensor:
    """One client's update `(d,)` float64: zero in the components that it has not trained."""
    require(own.keys() == broadcast.keys(), "adapters and broadcast have different names: expected the same entries")
    parts, ranks = [], dict[str, int]()
    for name, shape in zip(vectors.names, vectors.shapes, strict=True):
        entry, start = own[name].detach().double(), broadcast[name].detach().double()
        axis = 0 if ".lora_A." in f".{name}" else 1 if ".lora_B." in f".{name}" else None
        step = torch.zeros_like(start)
        if axis is None or entry.dim() != 2:
            require(tuple(entry.shape) == shape, f"{name} has shape {tuple(entry.shape)}, the broadcast {shape}")
            step = entry - start
        else:
            rank = entry.shape[axis]
            fits = rank <= shape[axis] and entry.shape[1 - axis] == shape[1 - axis]
            require(
                fits, f"{name} has shape {tuple(entry.shape)}, the broadcast {shape}: expected the same or less rank"
            )
            partner = ranks.setdefault(name.replace(".lora_B.", ".lora_A."), rank)
            require(rank == partner, f"{name} has rank {rank}, its partner {partner}")
            step.narrow(axis, 0, rank).copy_(entry - start.narrow(axis, 0, rank))
        parts.append(step.flatten())
    return torch.cat(parts)
