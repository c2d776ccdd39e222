"""Trained layers with weights of their own for every client, in one pass over all clients' tokens.

All trained numbers of all clients are one matrix `(K, d)`; a layer's weights are columns of it, `(K, out, in)`, and
its gradients go straight into the same columns of a matrix `(G, d)`: G = K for plain steps, G = R, one row an example,
under a privacy plan. So neither is any weight copied for an example, nor is there a second pass or a hook; the private
step differs from the plain one in one grouping.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from privfm.checks import require
from privfm.learning.batched.dropout import dropped_out, split
from privfm.learning.batched.packing import AttentionPass, Packing
from privfm.learning.batched.projections import Met
from privfm.vectors import Layout

_LARGE = 128
"""Elements of a group, on average, from which on it has a product of its own."""

Arranged = Tensor | tuple[Tensor, ...]
"""Elements by group: padded to the largest in one tensor, or a slice each."""


@final
class Groups:
    """Groups of elements, and their places in `(count, width)` with every group padded to the largest.

    Args:
      group: `(m,)` group of each element.
      count: number of groups.
    """

    def __init__(self, group: Tensor, count: int) -> None:
        sizes = torch.bincount(group, minlength=count)
        self.group, self.count, self.width = group, count, int(sizes.max())
        order = group.argsort(stable=True)
        begins = (sizes.cumsum(0) - sizes)[group[order]]
        ranks = torch.empty_like(order).index_copy_(0, order, torch.arange(len(group), device=group.device) - begins)
        self._places = group * self.width + ranks
        neighbours = bool((group[1:] >= group[:-1]).all())
        # Neighbours throughout and alike in size: nothing to move.
        self._still = len(group) == count * self.width and neighbours
        # Neighbours throughout and large: a product each costs less than moving their elements together (2 % of an
        # epoch of MiniLM's last two blocks, measured). A GPU rather moves them than begin many products.
        apart = neighbours and not self._still and len(group) >= count * _LARGE and group.device.type == "cpu"
        self._sizes: list[int] | None = sizes.tolist() if apart else None

    def arranged(self, x: Tensor) -> Arranged:
        """`(m, n)` by group: `(count, width, n)`, zero where a group is smaller, or a slice for each group."""
        if self._sizes is not None:
            return x.split_with_sizes(self._sizes)
        if not self._still:
            x = x.new_zeros(self.count * self.width, x.shape[1]).index_copy_(0, self._places, x)
        return x.reshape(self.count, self.width, -1)

    def times(self, x: Arranged, matrices: Tensor) -> Tensor:
        """Every group's elements times its own of `matrices (count, n, p)`: `(m, p)`, in the order of the elements."""
        if isinstance(x, Tensor):
            product = torch.bmm(x, matrices).flatten(0, 1)
            return product if self._still else product.index_select(0, self._places)
        result = matrices.new_empty(len(self.group), matrices.shape[2])
        for own, matrix, into in zip(x, matrices, self.arranged(result), strict=True):
            torch.mm(own, matrix, out=into)
        return result

    def add_products(self, into: Tensor, y: Arranged, x: Arranged) -> None:
        """Adds `y^T x` of every group's elements to its own of `into (count, p, n)`; y and x are of `arranged`."""
        if isinstance(y, Tensor) and isinstance(x, Tensor):
            into.baddbmm_(y.mT, x)
            return
        for total, left, right in zip(into, y, x, strict=True):
            total.addmm_(left.mT, right)

    def add_sums(self, into: Tensor, y: Arranged) -> None:
        """Adds the sum of every group's elements to its row of `into (count, p)`; y is of `arranged`."""
        into.add_(y.sum(1) if isinstance(y, Tensor) else torch.stack([own.sum(0) for own in y]))


@final
class Pass:
    """One forward and backward pass: who is in it, with which weights, and where the gradients go.

    Args:
      layout: names the columns.
      weights: `(K, d)` of the pass's clients.
      clients: `(R,)` place among K of each example's client.
      packing: of the R examples.
      wanted: names of what gets gradients.
      private: a gradient for every example instead of every client.
      keys: `(R,)` int64, for dropout; None where it sleeps.

    Attributes:
      gradients: `(K, d)`, or `(R, d)` if private; zeros, into which the backward pass adds.
      written: names of what got a gradient.
      anchor: what the backward pass differentiates; it makes every trained layer part of the graph.
      known: `(1, N, h)` activations below the first trained block; None: they are computed.
      met: whose they are in the table, where products with them are kept; None: they are not.
      attention: what attention knows.
      others: `(1, N, h)` what the last block's keys and values are computed from while it sees first tokens only.
    """

    def __init__(
        self, layout: Layout, weights: Tensor, clients: Tensor, packing: Packing, *,
        wanted: frozenset[str], private: bool = False, keys: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.packing, self.private, self._clients, self._keys = packing, private, clients, keys
        self.gradients = weights.new_zeros(packing.rows if private else len(weights), layout.d)
        self.weights = _columns(layout, weights)
        into = _columns(layout, self.gradients)
        self.into: Mapping[str, Tensor] = {name: into[name] for name in wanted}
        self.written: set[str] = set()
        self.anchor = weights.new_zeros((), requires_grad=True)
        self.known: Tensor | None = None
        self.met: Met | None = None
        self.others: Tensor | None = None
        self.attention = AttentionPass(packing)
        self._groups: dict[tuple[str, bool], Groups] = {}

    def kind(self, x: Tensor) -> str:
        """How the elements of `x (..., n)` belong to examples: `packed`, `padded`, or one an example: `rows`."""
        shape, packing = tuple(x.shape[:-1]), self.packing
        if shape in ((packing.tokens,), (1, packing.tokens)):
            return "packed"
        if shape in ((packing.rows,), (1, packing.rows), (packing.rows, 1)):
            return "rows"
        require(
            shape == (packing.rows, packing.width),
            f"a trained layer met a tensor of shape {tuple(x.shape)}: neither {packing.rows} examples, nor their "
            f"{packing.tokens} tokens, nor these padded to {packing.width} each",
        )
        return "padded"

    def groups(self, kind: str, private: bool) -> Groups:
        """Elements of a kind by client, or by example."""
        if (kind, private) not in self._groups:
            rows = torch.arange(self.packing.rows, device=self._clients.device)
            of = {"rows": rows, "packed": self.packing.owners, "padded": rows.repeat_interleave(self.packing.width)}
            group, count = (of[kind], len(rows)) if private else (self._clients[of[kind]], self._count)
            self._groups[kind, private] = Groups(group, count)
        return self._groups[kind, private]

    def receive(self, name: str) -> Tensor | None:
        """Where the gradients of a tensor go, which it has now got; None if they are not wanted."""
        into = self.into.get(name)
        if into is not None:
            self.written.add(name)
        return into

    def _applied(self, function: Any, x: Tensor, name: str, kind: str) -> Tensor:
        result: Tensor = function.apply(x, self.anchor, self.weights[name], _Place(self, name, kind))
        return result

    @property
    def _count(self) -> int:
        return len(next(iter(self.weights.values())))

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, names: tuple[str, str]) -> Tensor:
        """A linear layer whose weight and bias are the clients' own where the layout has their names.

        Args:
          x: `(..., in)`.
          weight: `(out, in)`, used where its name is not trained.
          bias: `(out,)`, likewise.
          names: of weight and bias.
        """
        own_weight, own_bias = self.weights.get(names[0]), self.weights.get(names[1])
        if own_weight is None and own_bias is None:
            return linear(x, weight, bias)
        kind = self.kind(x)
        flat = x.reshape(-1, x.shape[-1])
        if own_weight is not None:
            flat = self._applied(_Grouped, flat.to(own_weight.dtype), names[0], kind)
        else:
            flat = linear(flat, weight)
        if own_bias is not None:
            flat = self._applied(_Shifted, flat, names[1], kind)
        elif bias is not None:
            flat = flat + bias
        return flat.view(*x.shape[:-1], -1)

    def dropout(self, x: Tensor, rate: float, layer: int) -> Tensor:
        """Dropout of `x (..., n)` by the clients' keys; layer: the number of the dropout layer in the model."""
        if self._keys is None or rate == 0:
            return x
        kind, packing = self.kind(x), self.packing
        tokens = torch.arange(packing.width, device=x.device)
        keys = split(self._keys[:, None], tokens)  # (R, T)
        # One element an example is its first token: a shortcut that computes no other drops the same features.
        chosen = {"rows": keys[:, 0], "padded": keys.flatten(), "packed": keys.flatten()[packing.index]}[kind]
        return dropped_out(x.reshape(-1, x.shape[-1]), chosen, layer, rate).view(x.shape)


@final
@dataclass(frozen=True)
class _Place:
    """Where a trained tensor is used: the pass, the tensor's name, and how the elements belong to examples."""

    now: Pass
    name: str
    kind: str

    @property
    def clients(self) -> Groups:
        """Elements by client: who has the same weights."""
        return self.now.groups(self.kind, private=False)

    @property
    def gradients(self) -> Groups:
        """Elements by row of the matrix of gradients."""
        return self.now.groups(self.kind, private=self.now.private)


def _columns(layout: Layout, matrix: Tensor) -> dict[str, Tensor]:
    """`(n, d)` -> views `(n, *shape)` by name."""
    parts = torch.split(matrix, list(layout.sizes), 1)
    return {
        name: part.view(len(matrix), *shape)
        for name, part, shape in zip(layout.names, parts, layout.shapes, strict=True)
    }


class _Grouped(torch.autograd.Function):
    """Every group's elements times that group's weight; gradients of weights are added in place, by group."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, weight: Tensor, place: _Place) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.place = place
        groups = place.clients
        return groups.times(groups.arranged(x), weight.mT)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        place: _Place = ctx.place
        groups, finer = place.clients, place.gradients
        given = groups.arranged(gradient)
        through = groups.times(given, weight) if ctx.needs_input_grad[0] else None
        into = place.now.receive(place.name)
        if into is not None:
            finer.add_products(into, given if finer is groups else finer.arranged(gradient), finer.arranged(x))
        return through, gradient.new_zeros(()), None, None


class _Shifted(torch.autograd.Function):
    """Every group's elements plus that group's bias."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, bias: Tensor, place: _Place) -> Tensor:
        ctx.place = place
        return x + bias.index_select(0, place.clients.group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        place: _Place = ctx.place
        into = place.now.receive(place.name)
        if into is not None:
            place.gradients.add_sums(into, place.gradients.arranged(gradient))
        return gradient, gradient.new_zeros(()), None, None


def lora_forward(module: Any, name: str, number: int, now: Any) -> Any:
    """`forward` of a PEFT LoRA layer under a pass.

    Args:
      module: a `peft.tuners.lora.layer.Linear` with one adapter.
      name: of the module in the model.
      number: of its dropout.
      now: `() -> Pass`, the running one.
    """
    (adapter,) = module.lora_A
    down, up = module.lora_A[adapter].weight, module.lora_B[adapter].weight
    names = (f"{name}.lora_A.{adapter}.weight", f"{name}.lora_B.{adapter}.weight")
    rate, scaling = getattr(module.lora_dropout[adapter], "p", 0.0), module.scaling[adapter]

    def forward(x: Tensor) -> Tensor:
        base: Tensor = module.base_layer(x)
        run: Pass = now()
        with torch.autocast(x.device.type, enabled=False):
            low = run.linear(run.dropout(x.to(down.dtype), rate, number), down, None, (names[0], ""))
            change = run.linear(low * scaling, up, None, (names[1], ""))  # r columns are scaled rather than all
            result: Tensor = (base + change).to(base.dtype)
            return result

    return forward


def linear_forward(module: nn.Linear, name: str, now: Any) -> Any:
    """`forward` of a trained `nn.Linear` under a pass; arguments as of `lora_forward`."""

    def forward(x: Tensor) -> Tensor:
        run: Pass = now()
        with torch.autocast(x.device.type, enabled=False):
            return run.linear(x.to(module.weight.dtype), module.weight, module.bias, (f"{name}.weight", f"{name}.bias"))

    return forward


def dropout_forward(module: nn.Dropout, number: int, now: Any) -> Any:
    """`forward` of an `nn.Dropout` that is awake; arguments as of `lora_forward`."""

    def forward(x: Tensor) -> Tensor:
        run: Pass = now()
        return run.dropout(x, module.p, number)

    return forward
