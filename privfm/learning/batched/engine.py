"""Many clients through one frozen model in one pass: the steps, and how they are cut into passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Generator, Tensor

from privfm.checks import InvalidArgument, at_least, require
from privfm.contracts import Examples, GradientPrivacy
from privfm.learning.batched.dropout import split
from privfm.learning.batched.first_token import LastBlock
from privfm.learning.batched.layers import Pass
from privfm.learning.batched.packing import Packing, running
from privfm.learning.batched.patches import (
    Forward,
    attending_packed,
    block_forwards,
    packed,
    running_as,
    trained_forwards,
    transformers_models,
)
from privfm.learning.batched.projections import Met, Projections
from privfm.learning.private_steps import check_moved, drawn_batches
from privfm.learning.training import Descent

if TYPE_CHECKING:
    from torch import nn

    from privfm.learning.workbench import Workbench

TOKENS = {"cpu": 2048, "cuda": 16384}
"""Real tokens a pass by default. On one CPU thread all-MiniLM-L6 gains nothing beyond 1,000 (measured)."""
_GRADIENTS = 1 << 26
"""Most numbers in one pass's matrix of gradients (float32: 256 MiB); counts when every example has a row."""

_MUCH = 16
"""Examples of a client in a pass, on average, from which on clients come one by one: with fewer, attention in parts of
a few examples would take longer than what is saved."""


@final
@dataclass(frozen=True)
class _Client:
    """One client during a round.

    Attributes:
      place: in the batch that was asked for.
      examples: all of its examples.
      lengths: tokens of each.
      batches: places of the examples of each step.
      key: names its dropout.
    """

    place: int
    examples: Examples
    lengths: list[int]
    batches: list[Tensor]
    key: int


@final
@dataclass(frozen=True)
class _Row:
    """One example in one step: its client's row, its place in the batch and among the client's examples."""

    client: int
    position: int
    example: int


@final
@dataclass(frozen=True)
class _Terms:
    """What holds for a whole round: who trains, what is trained, and how privately.

    Attributes:
      clients: those with most steps first.
      wanted: names of what gets gradients.
      kept: `(d,)` what stays as it is; None: nothing.
      privacy: of every step.
    """

    clients: list[_Client]
    wanted: frozenset[str]
    kept: Tensor | None
    privacy: GradientPrivacy | None

    def length(self, row: _Row) -> int:
        """Tokens of a row's example."""
        return self.clients[row.client].lengths[row.example]

    def ordered(self, rows: list[_Row]) -> list[_Row]:
        """Shortest first: attention pads neighbours to one another. Clients with much in a pass come one by one.

        A client's own weights then act on a slice of the tokens, without moving any.
        """
        alone = len(rows) >= _MUCH * len({row.client for row in rows})
        return sorted(rows, key=lambda row: (row.client if alone else 0, self.length(row)))


@final
class BatchedDescent:
    """Trains many clients at once where each of them would take the steps of a `Descent`.

    Clients are sorted by their number of steps, so that those who still train are the first rows of every matrix:
    weights, gradients and the optimizer's state. A step goes through the model in passes of at most `tokens` real
    tokens; a client's batch begins in one pass and ends in the next where it fits into none.

    A client's update does not depend on the others but for rounding: float32 sums of a matrix product depend on its
    size. Alone it is the same to the last bit every time.

    Args:
      bench: model and data; the model is lent for the time of `train` and comes back unchanged.
      tokens: real tokens a pass; None: `TOKENS` of the device.
      dropout: wakes the model's dropout, replayed from each client's generator.
      autocast: type in which what is frozen is computed (`torch.bfloat16`); clip, noise and adapters stay float32.
      first_token: the last block, where only its first token's output is read.
    """

    def __init__(
        self, bench: Workbench, tokens: int | None = None, *, dropout: bool = False,
        autocast: torch.dtype | None = None, first_token: LastBlock | None = None,
    ) -> None:  # fmt: skip
        self._bench, self._dropout, self._autocast = bench, dropout, autocast
        self._tokens = TOKENS.get(bench.device.type, TOKENS["cuda"]) if tokens is None else tokens
        at_least("tokens", self._tokens, 1)
        self._now: Pass | None = None
        self._dtype = next(iter(bench.parameters.values())).dtype
        self._frozen_dtype = next((p.dtype for p in bench.module.parameters() if not p.requires_grad), self._dtype)
        blocks, trained = bench.built.layers, frozenset(bench.layout.names)
        # Below awake dropout nothing is the same twice.
        self._known = bench.trunk is not None and not dropout
        cut = bench.first if self._known else 0
        forwards = trained_forwards(bench.module, trained, self._running, dropout)
        # Kept on the CPU only: to a GPU, a product would take longer than it does there.
        exact = autocast is None and self._frozen_dtype == torch.float32
        self._projects = self._known and exact and bench.device.type == "cpu" and cut < len(blocks)
        if self._projects:
            if bench.activations.projections is None:
                bench.activations.projections = Projections(bench.activations)
            parts = [part for part in blocks[cut].modules() if part not in forwards]
            forwards |= bench.activations.projections.forwards(parts, self._running)
        narrowed: dict[nn.Module, Forward] = {}
        if first_token is not None:
            forwards |= first_token.forwards(forwards, self._running)
            narrowed = {first_token.block: first_token.narrowed(self._running)}
        self._forwards = forwards | block_forwards(blocks, cut, self._running, narrowed)
        self._models = transformers_models(bench.module)
        attending_packed(self._models)
        # Attention layers are counted: one that goes its own way would mix the examples of a pass.
        self._attentions = len(blocks) - cut

    def train(
        self, model: Tensor, batch: Sequence[Examples], generators: Sequence[Generator], training: Descent, *,
        privacy: GradientPrivacy | None = None, active: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """`model (d,)` and k clients' examples -> `(k, d)` updates. Arguments as of `Learner.train`.

        `model (k, d)` gives every client a start of its own.
        """
        require(model.ndim == 1 or len(model) == len(batch), f"model {tuple(model.shape)}: expected {len(batch)} rows")
        clients = [
            self._client(place, examples, generator, training, privacy)
            for place, (examples, generator) in enumerate(zip(batch, generators, strict=True))
        ]
        clients.sort(key=lambda client: -len(client.batches))
        order = [client.place for client in clients]
        start = model[order] if model.ndim == 2 else model.expand(len(clients), -1)
        start = start.to(self._bench.device, self._dtype)
        kept = None if active is None else ~active.to(start.device)
        terms = _Terms(clients, self._wanted(active), kept, privacy)
        weights = start.clone(memory_format=torch.contiguous_format)
        state = training.stacked(weights)
        with self._lent():
            for now in range(max((len(client.batches) for client in clients), default=0)):
                k = sum(len(client.batches) > now for client in clients)
                gradients = self._gradients(terms, weights[:k], now)
                if privacy is not None:
                    held = [len(client.examples) for client in clients[:k]]
                    gradients = privacy.noised(gradients, held, [generators[client.place] for client in clients[:k]])
                training.step(weights, gradients, state, now)
                if kept is not None:
                    weights[:k] = torch.where(kept, start[:k], weights[:k])
        if privacy is not None:
            for client, begin, row in zip(clients, start, weights, strict=True):
                check_moved(begin, row, client.batches)
        rows = torch.empty(weights.shape, dtype=torch.float32)
        rows[order] = (weights - start).float().cpu()
        return rows

    def gradients(self, weights: Tensor, batch: Sequence[Examples]) -> Tensor:
        """Gradients of every example of k clients, `(examples, d)`, each at its client's weights `(k, d)`."""
        clients = [
            _Client(place, examples, self._lengths(examples), [torch.arange(len(examples))], 0)
            for place, examples in enumerate(batch)
        ]
        terms = _Terms(clients, self._wanted(None), None, None)
        found = weights.new_empty(sum(len(examples) for examples in batch), self._bench.layout.d)
        begins = [0, *accumulate(len(examples) for examples in batch)]
        with self._lent():
            for rows in self._passes(terms, 0, private=True):
                found[[begins[row.client] + row.example for row in rows]] = self._pass(terms, weights, 0, rows, None)[1]
        return found

    def read(self, weights: Tensor, examples: Examples, score: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """What k clients' weights `(k, d)` make of all examples: `score` of each, `(k, n, ...)`, on the CPU.

        A pass holds as many examples of like length as fit; what is the same for all clients is gathered once.

        Args:
          weights: of the clients.
          examples: n of them, the same for every client.
          score: `(logits (b, ...), labels (b, ...)) -> (b, ...)`, cut to the longest example of the pass; what comes
            after b is of the same shape in every pass. Logits are never kept.
        """
        lengths = self._lengths(examples)
        order = torch.tensor(lengths).argsort(stable=True)
        terms = _Terms([_Client(0, examples, lengths, [order], 0)], frozenset(), None, None)
        weights = weights.to(self._bench.device, self._dtype)
        found: Tensor | None = None
        with self._lent(), torch.no_grad():
            for rows in self._passes(terms, 0, private=False):
                batch, packing, known, met = self._opened(terms, rows)
                labels, alone = batch.labels.to(weights.device), torch.zeros(len(rows), dtype=torch.int64)
                places = torch.tensor([row.example for row in rows])
                for place, own in enumerate(weights):
                    run = Pass(self._bench.layout, own[None], alone.to(own.device), packing, wanted=terms.wanted)
                    run.known, run.met = known, met
                    with self._at_work(run):
                        part = score(self._logits(batch), labels).cpu()
                    if found is None:
                        found = part.new_empty(len(weights), len(examples), *part.shape[1:])
                    found[place, places] = part
        if found is None:
            raise InvalidArgument("nothing to read: expected at least one client and one example")
        return found

    def _client(
        self, place: int, examples: Examples, generator: Generator, training: Descent, privacy: GradientPrivacy | None
    ) -> _Client:
        key = int(torch.randint(2**62, (), generator=generator))  # what `seeded` draws for a client trained alone
        batches = drawn_batches(training, len(examples), generator, privacy)
        return _Client(place, examples, self._lengths(examples), batches, key)

    def _lengths(self, examples: Examples) -> list[int]:
        """Tokens of each example."""
        mask = examples.inputs.get("attention_mask")
        if mask is None:
            return [self._bench.width] * len(examples)
        lengths = mask.sum(1)
        right = torch.arange(mask.shape[1]) < lengths[:, None]
        require(bool((mask == right).all()), "attention_mask: expected padding to the right, as tokens are packed")
        require(bool((lengths > 0).all()), "attention_mask: an example has no token")
        found: list[int] = lengths.tolist()
        return found

    def _wanted(self, active: Tensor | None) -> frozenset[str]:
        """What is trained, of which anything is active."""
        layout = self._bench.layout
        if active is None:
            return frozenset(layout.names)
        parts = torch.split(active, list(layout.sizes))
        return frozenset(name for name, part in zip(layout.names, parts, strict=True) if bool(part.any()))

    def _gradients(self, terms: _Terms, weights: Tensor, now: int) -> Tensor:
        """Of the first k clients' batches, `(k, d)`: mean gradients, or under a plan sums of clipped gradients."""
        privacy = terms.privacy
        # Sums that are noised are rounded once: secure noise is made for that.
        total = torch.zeros_like(weights, dtype=weights.dtype if privacy is None else torch.float64)
        sizes = [len(client.batches[now]) for client in terms.clients[: len(weights)]]
        for rows in self._passes(terms, now, private=privacy is not None):
            scale = None if privacy is not None else torch.tensor([1 / sizes[row.client] for row in rows])
            first, found = self._pass(terms, weights, now, rows, scale)
            if terms.kept is not None:
                found.masked_fill_(terms.kept, 0.0)
            if privacy is None:
                total[first : first + len(found)] += found
                continue
            clipped = privacy.clip(found)
            of = torch.tensor([row.client for row in rows], device=clipped.device)
            for place in dict.fromkeys(row.client for row in rows):  # sums of slices are the same every time
                total[place] += clipped[of == place].sum(0, dtype=torch.float64)
        return total.to(weights)

    def _passes(self, terms: _Terms, now: int, private: bool) -> Iterator[list[_Row]]:
        """The rows of a step in passes of at most `tokens` tokens, each ordered; a row of more goes alone."""
        most = max(1, _GRADIENTS // self._bench.layout.d) if private else self._tokens
        part: list[_Row] = []
        used = 0
        for place, client in enumerate(terms.clients):
            if len(client.batches) <= now:
                break
            whole = sum(client.lengths[example] for example in client.batches[now].tolist())
            if part and used + whole > self._tokens >= whole:  # rather than cut it in two
                yield terms.ordered(part)
                part, used = [], 0
            for position, example in enumerate(client.batches[now].tolist()):
                length = client.lengths[example]
                if part and (used + length > self._tokens or len(part) >= most):
                    yield terms.ordered(part)
                    part, used = [], 0
                part.append(_Row(place, position, example))
                used += length
        if part:
            yield terms.ordered(part)

    def _pass(
        self, terms: _Terms, weights: Tensor, now: int, rows: list[_Row], scale: Tensor | None
    ) -> tuple[int, Tensor]:
        """Gradients of some rows: the place of their first client, and `(clients, d)` from there on.

        Without `scale`, by which losses are weighted, it is the gradient of every example's own loss, `(rows, d)`.
        """
        device = weights.device
        first, last = min(row.client for row in rows), max(row.client for row in rows)
        of = torch.tensor([row.client for row in rows])
        examples, packing, known, met = self._opened(terms, rows)
        keys = None
        if self._dropout:
            steps = torch.tensor([client.key for client in terms.clients])[of]
            keys = split(split(steps, now), torch.tensor([row.position for row in rows])).to(device)
        run = Pass(
            self._bench.layout, weights[first : last + 1], (of - first).to(device), packing,
            wanted=terms.wanted, private=scale is None, keys=keys,
        )  # fmt: skip
        run.known, run.met = known, met
        self._forward_backward(run, examples, torch.ones(len(rows)) if scale is None else scale)
        return first, run.gradients

    def _opened(self, terms: _Terms, rows: list[_Row]) -> tuple[Examples, Packing, Tensor | None, Met | None]:
        """The examples of some rows as one batch, how their tokens are packed, and what is known of them."""
        bench, examples = self._bench, _gathered(rows, terms.clients)
        lengths = torch.tensor([terms.length(row) for row in rows])
        packing = Packing(lengths.to(bench.device), int(lengths.max()))
        if not self._known or examples.rows is None:
            return examples, packing, None, None
        places = bench.activations.places(examples.rows)
        require(len(places) == packing.tokens, f"{packing.tokens} tokens, of which {len(places)} are known")
        known = bench.activations.flat.index_select(0, places)[None].to(bench.device, self._frozen_dtype)
        return examples, packing, known, Met(examples.rows.tolist(), places) if self._projects else None

    def _forward_backward(self, run: Pass, examples: Examples, scale: Tensor) -> None:
        """Fills in a pass's gradients of `sum(scale * losses)`."""
        labels = examples.labels.to(self._bench.device, non_blocking=True)
        with self._at_work(run):
            losses = self._bench.task.losses(self._logits(examples), labels)
            require(losses.requires_grad, "the loss reaches nothing that is trained")
            (losses * scale.to(losses)).sum().backward(inputs=[run.anchor])  # type: ignore[no-untyped-call]
        missing = sorted(set(run.into) - run.written)
        require(not missing, f"no gradient of {', '.join(missing[:3])}: the loss does not reach it")

    def _logits(self, examples: Examples) -> Tensor:
        """What the model says under the running pass."""
        kind = self._bench.device.type
        inputs = {name: value.to(self._bench.device, non_blocking=True) for name, value in examples.inputs.items()}
        with torch.autocast(kind, self._autocast or torch.bfloat16, enabled=self._autocast is not None):
            output: Any = self._bench.module(**inputs)
        logits: Tensor = getattr(output, "logits", output)
        return logits

    @contextmanager
    def _at_work(self, run: Pass) -> Iterator[None]:
        """A pass runs until the context ends; then every block must have attended over its tokens."""
        self._now, token = run, running.set(run.attention)
        try:
            yield
        finally:
            running.reset(token)
            self._now = None
        expected, width = len(self._bench.built.layers) if run.known is None else self._attentions, run.packing.width
        if run.attention.calls != expected:
            raise InvalidArgument(f"{run.attention.calls} of {expected} blocks attend over packed tokens of {width}")

    def _running(self) -> Pass:
        if self._now is None:
            raise InvalidArgument("the model is lent to batched training and runs nothing else for the while")
        return self._now

    def _lent(self) -> ExitStack:
        """The model runs passes until the context ends."""
        with ExitStack() as stack:
            stack.enter_context(packed(self._models))
            stack.enter_context(running_as(self._forwards))
            return stack.pop_all()


def _gathered(rows: list[_Row], clients: list[_Client]) -> Examples:
    """The examples of some rows as one batch, in their order, cut to the longest."""
    longest = max(clients[row.client].lengths[row.example] for row in rows)
    parts: list[Examples] = []
    order: list[int] = []
    for client in dict.fromkeys(row.client for row in rows):
        places = [place for place, row in enumerate(rows) if row.client == client]
        chosen = torch.tensor([rows[place].example for place in places])
        parts.append(_cut(clients[client].examples.take(chosen), longest))
        order += places
    held = [part.rows for part in parts if part.rows is not None]
    together = Examples(
        {name: torch.cat([part.inputs[name] for part in parts]) for name in parts[0].inputs},
        torch.cat([part.labels for part in parts]),
        torch.cat(held) if len(held) == len(parts) else None,
    )
    return together.take(torch.tensor(order).argsort())


def _cut(examples: Examples, longest: int) -> Examples:
    """Columns of tokens beyond the longest example of the pass, cut off."""
    mask = examples.inputs.get("attention_mask")
    if mask is None:
        return examples
    width = mask.shape[1]
    inputs = {
        name: value[:, :longest] if value.shape[1:2] == (width,) else value for name, value in examples.inputs.items()
    }
    labels = examples.labels[:, :longest] if examples.labels.shape[1:] == (width,) else examples.labels
    return Examples(inputs, labels, examples.rows)
