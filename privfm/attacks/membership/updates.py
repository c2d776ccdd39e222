"""Was an example behind this update? Its gradient at the round's model against what a client sent.

Everything is flat: an update `(d,)`, gradients of candidate examples `(n, d)` in blocks, so that n x d numbers need
never be held at once. A client that took one step of gradient descent on B examples sends (minus the learning rate
times) the mean of their gradients, so that a member's own gradient is a B-th part of it; in many dimensions gradients
of other examples are nearly orthogonal to that part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from torch import Tensor, nn

from privfm.adapters import AdapterLayout
from privfm.blocks import column_blocks
from privfm.checks import InvalidArgument, at_least, positive, require
from privfm.contracts.learning import Examples
from privfm.contracts.membership import Array
from privfm.contracts.privacy import Spans
from privfm.contracts.reconstruction import LocalSteps
from privfm.vectors import Layout

Blocks = Iterable[Tensor] | Callable[[], Iterable[Tensor]]
"""Gradients of candidates, `(k, d)` at a time: an iterable, or a callable that gives one."""

Losses = Callable[[nn.Module, Examples], Tensor]
"""Model and k examples -> their losses `(k,)`."""


@final
@dataclass(frozen=True)
class Products:
    """What all scores of updates are made of, from one pass over the candidates' gradients.

    Attributes:
      inner: `(clients, n)` float64, products of updates and gradients over the columns that are seen of the update.
      gradients: `(clients, n)`, squared lengths of the gradients over the same columns.
      updates: `(clients,)`, squared lengths of the updates.
    """

    inner: Array
    gradients: Array
    updates: Array

    @property
    def cosine(self) -> Array:
        """Cosines `(clients, n)`; 0 where one of the two is zero: it says nothing."""
        lengths = np.sqrt(self.gradients) * np.sqrt(self.updates)[:, None]
        return np.asarray(np.divide(self.inner, lengths, out=np.zeros_like(self.inner), where=lengths > 0))

    def difference(self, share: float = 1.0) -> Array:
        """`|u|^2 - |u - share g|^2 = 2 share <u, g> - share^2 |g|^2`, `(clients, n)`; see `difference_scores`."""
        positive("share", share)
        return 2 * share * self.inner - share**2 * self.gradients


def products(updates: Tensor, blocks: Blocks, coordinates: Spans | None = None) -> Products:
    """Inner products of updates with gradients, in float64, a block of columns at a time.

    Args:
      updates: `(d,)` or `(clients, d)`; what is not finite is not seen (encrypted, cut away), and left out of all
        products with that update.
      blocks: gradients of the candidates, `(k, d)` at a time.
      coordinates: columns `[lo, hi)` that count; None: all.

    Raises:
      InvalidArgument: widths differ, a gradient is not finite, spans overlap or lie outside, or there is no candidate.

    Cost: one pass over the gradients, `clients` multiplications for each of their numbers.
    """
    require(updates.dim() in {1, 2}, f"updates {tuple(updates.shape)}: expected (d,) or (clients, d)")
    rows = updates.detach().reshape(-1, updates.shape[-1])
    parts = _parts(rows.shape[1], coordinates)
    squares = torch.zeros(len(rows), dtype=torch.float64)
    for lo, hi in parts:
        squares += _seen(rows[:, lo:hi])[0].square().sum(1).cpu()
    inner, gradients = [], []
    for block in blocks() if callable(blocks) else blocks:
        require(
            block.dim() == 2 and block.shape[1] == rows.shape[1],
            f"a block of gradients has shape {tuple(block.shape)}: expected (k, {rows.shape[1]}) as the updates have",
        )
        product = torch.zeros(len(rows), len(block), dtype=torch.float64)
        lengths = torch.zeros_like(product)
        for lo, hi in parts:
            update, seen = _seen(rows[:, lo:hi])
            gradient = block[:, lo:hi].detach().to(update)
            product += (update @ gradient.T).cpu()
            lengths += (seen @ gradient.square().T).cpu()
        require(bool(lengths.isfinite().all()), "a gradient of a candidate is not finite; leave such examples out")
        inner.append(product)
        gradients.append(lengths)
    require(bool(inner) and sum(one.shape[1] for one in inner) > 0, "blocks gave no gradient: expected candidates")
    return Products(torch.cat(inner, 1).numpy(), torch.cat(gradients, 1).numpy(), squares.numpy())


def cosine_scores(update: Tensor, blocks: Blocks, coordinates: Spans | None = None) -> Array:
    """Cosine of each candidate's gradient with an update: larger, more likely a member.

    It sees no scale: neither the learning rate, nor clipping, nor how many steps or examples there were, matters. Sign:
    the update is a *gradient*; of a change of weights its negative is (`as_gradient`, or just `-change`).

    | behind the update            | a member's cosine, gradients otherwise orthogonal and equally long         |
    |------------------------------|----------------------------------------------------------------------------|
    | one step on B examples       | 1 / sqrt(B); of non-members 0 +- 1 / sqrt(d)                               |
    | several local steps          | lower, as later gradients are those of moved models; the sign stays        |
    | sum of n clients             | 1 / sqrt(n B), and the same for members of all of them: no attribution     |
    | another client's data alone  | as of a non-member                                                         |
    | zero gradient or update      | 0                                                                          |

    Args:
      update: `(d,)`, or `(clients, d)` for one pass over the gradients for all of them.
      blocks: gradients of the candidates at the model that the client was sent, `(k, d)` at a time.
      coordinates: columns that count; None: all. See `adapter_spans`.

    Returns:
      `(n,)`, or `(clients, n)`.

    Raises:
      InvalidArgument: see `products`.

    Source: Li, Li, Ribeiro, "Effective passive membership inference attacks in federated learning against
    overparameterized models", ICLR 2023 (cosine attack); Zhu et al., "FedMIA", CVPR 2025, equation 7.

    >>> cosine_scores(torch.tensor([1.0, 1.0, 0.0]), [torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 5.0]])]).round(3)
    array([0.707, 0.   ])
    """
    found = products(update, blocks, coordinates).cosine
    return found if update.dim() == 2 else found[0]


def difference_scores(update: Tensor, blocks: Blocks, coordinates: Spans | None = None, share: float = 1.0) -> Array:
    """How much shorter an update becomes when a candidate's part is taken out: `|u|^2 - |u - share g|^2`.

    Unlike the cosine it depends on scale: with orthogonal gradients and a member's true share s in the update it is
    `share (2 s - share) |g|^2` for members and `-share^2 |g|^2` for others. The published form has share 1, right for a
    sum of gradients; for a mean over a batch of B (and of the mean gradient that `as_gradient` makes of several steps)
    s is 1/B, and share 1 then mostly ranks examples by how *short* their gradients are. Give 1/B where B is known.

    Args:
      update: `(d,)` or `(clients, d)`, as a gradient.
      blocks: gradients of the candidates.
      coordinates: columns that count; None: all.
      share: of one example's gradient in the update.

    Returns:
      `(n,)`, or `(clients, n)`.

    Raises:
      InvalidArgument: share is not positive, or see `products`.

    Source: Li, Li, Ribeiro, as for `cosine_scores` (gradient-difference attack), with share 1.

    >>> difference_scores(torch.tensor([1.0, 1.0, 0.0]), [torch.eye(3)]).tolist()
    [1.0, 1.0, -1.0]
    """
    found = products(update, blocks, coordinates).difference(share)
    return found if update.dim() == 2 else found[0]


def as_gradient(updates: Tensor, change: LocalSteps | None) -> Tensor:
    """A change of weights as the mean gradient of its steps (by momentum's weights); gradients as they are.

    Of several steps this is a mean over models on the way: exact for one step. Each example's share in it is
    1 / (examples) for whole epochs, whatever the batch size and the number of epochs.

    Args:
      updates: `(..., d)`; not changed.
      change: how the client trained; None: they are gradients.

    Raises:
      InvalidArgument: Adam's change is no multiple of a gradient.
    """
    if change is None:
        return updates
    if change.optimizer != "sgd":
        raise InvalidArgument(
            "optimizer='adam': its change is no multiple of a gradient; hand cosine_scores the negative change, which "
            "still points the right way, and leave difference scores out"
        )
    return updates / (-change.learning_rate * change.weight)


def adapter_spans(adapters: AdapterLayout, first_round: bool) -> Spans:
    """Columns of low-rank adapters; before the first round's step without A, whose gradient is then zero.

    With B = 0, dL/dA = s B^T (...) is zero for every example, while A has moved in a client that took several steps:
    these columns lengthen the update and tell nothing.

    Args:
      adapters: where the factors lie.
      first_round: whether B is still zero in the model that clients were sent.

    Raises:
      InvalidArgument: there is no adapter.

    Source: Hu et al., "LoRA", 2022, section 4.1 (initialisation), and the chain rule.
    """
    require(bool(adapters.pairs), "the vector holds no adapters; leave coordinates None")
    spans = [pair.span_b for pair in adapters.pairs]
    if not first_round:
        spans += [pair.span_a for pair in adapters.pairs]
    return tuple(sorted(spans))


def fellow_client_update(
    before: Tensor, after: Tensor, own: Tensor | None, cohort: int, server_learning_rate: float = 1.0
) -> Tensor:
    """What the other clients of a round sent together, as one of them computes it from two released models: `(d,)`.

    `cohort (after - before) / server_learning_rate - own`, exact where the server adds the plain mean (every client the
    same weight, no noise, no robust rule, no momentum); whatever else the server does is in it as an error. It is a
    change of weights: negate it for `cosine_scores`, which then tell whether *somebody* else holds the example.
    Float32 models lose `cohort * 6e-8 * |weight|` in each coordinate.

    Args:
      before: model that clients were sent, `(d,)`.
      after: the next released model.
      own: the client's own update as it was counted (clipped, decoded); None: it did not take part.
      cohort: clients in the mean, itself included where it took part.
      server_learning_rate: of the server's step.

    Raises:
      InvalidArgument: shapes differ, or nobody else took part.

    Source: Melis, Song, De Cristofaro, Shmatikov, "Exploiting unintended feature leakage in collaborative learning",
    IEEE S&P 2019 (difference of consecutive models, own update subtracted).

    >>> fellow_client_update(torch.zeros(2), torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.0]), 2).tolist()
    [1.0, 4.0]
    """
    require(before.dim() == 1, f"before {tuple(before.shape)}: expected a flat model (d,)")
    for name, other in (("after", after), ("own", own)):
        fits = other is None or other.shape == before.shape
        require(fits, f"{name} has another shape than before, {tuple(before.shape)}")
    at_least("cohort", cohort, 1 if own is None else 2)
    positive("server_learning_rate", server_learning_rate)
    total = (after.double() - before.double()) * (cohort / server_learning_rate)
    others = total if own is None else total - own.double()
    return others.to(before.dtype)


def gradient_blocks(
    model: nn.Module, layout: Layout, losses: Losses, examples: Examples, block: int
) -> Iterator[Tensor]:
    """Gradients of single examples `(k, d)`, one backward pass each: slow, for any model.

    Args:
      model: with the round's weights, without dropout; nothing of it changes.
      layout: of the vector; parameters of it that the loss does not reach give zeros.
      losses: model and k examples -> `(k,)`; called with one example at a time.
      examples: the candidates.
      block: examples in a block; it holds block x d numbers.

    Raises:
      InvalidArgument: the layout names what is no parameter of the model.
    """
    at_least("block", block, 1)
    parameters = dict(model.named_parameters())
    missing = [name for name in layout.names if name not in parameters]
    require(not missing, f"{', '.join(missing)}: in the layout, but no parameter of the model")
    wanted = [parameters[name] for name in layout.names]
    for first in range(0, len(examples), block):
        rows = []
        for place in range(first, min(first + block, len(examples))):
            with torch.enable_grad():
                loss = losses(model, examples.take(torch.tensor([place]))).sum()
            found = torch.autograd.grad(loss, wanted, allow_unused=True)
            full = [
                torch.zeros_like(one) if gradient is None else gradient
                for one, gradient in zip(wanted, found, strict=True)
            ]
            rows.append(layout.flatten(dict(zip(layout.names, full, strict=True))))
        yield torch.stack(rows)


def _parts(d: int, coordinates: Spans | None) -> list[tuple[int, int]]:
    """The spans, cut into blocks of columns that float64 copies may be made of."""
    spans = ((0, d),) if coordinates is None else tuple(sorted(coordinates))
    require(bool(spans), "coordinates=(): expected at least one span of columns")
    end = 0
    for lo, hi in spans:
        require(end <= lo < hi <= d, f"span [{lo}, {hi}) overlaps another, is empty, or lies outside of d={d} columns")
        end = hi
    return [(first + lo, first + hi) for first, last in spans for lo, hi in column_blocks(last - first)]


def _seen(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows in float64 with zeros where nothing is seen, and 1 where something is."""
    seen = rows.isfinite()
    return rows.double().where(seen, torch.zeros((), dtype=torch.float64, device=rows.device)), seen.double()
