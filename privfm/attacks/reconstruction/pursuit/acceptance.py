"""When a support is a sentence, and which tokens a sentence explains."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from privfm.attacks.reconstruction.pursuit.atoms import Atoms, Heads


def as_text(
    atoms: Atoms, support: Sequence[int], first: int, last: int | None = None, held: Sequence[Sequence[int]] = ()
) -> tuple[int, ...] | None:
    """The text that a support spells, with its first token; None where a position is left out or there is none.

    A pair that a text held beforehand has too was no part of the search: gaps, and the last token, are filled in from
    those texts.
    """
    spelt = {int(atoms.positions[atom]): int(atoms.tokens[atom]) for atom in support}
    if not spelt:
        return None
    for text in held:
        for place in range(1, min(max(spelt), len(text))):
            spelt.setdefault(place, text[place])
    end = max(spelt)
    if last is not None and spelt[end] != last and any(text[-1] == last and len(text) == end + 2 for text in held):
        spelt[end + 1] = last
    if len(spelt) != max(spelt):
        return None
    return (first, *(spelt[place] for place in range(1, len(spelt) + 1)))


def outside(span: Tensor, blocks: Tensor) -> Tensor:
    """Share of gradients `(n, 2 H, w)` that a span `(2 H, k, w)` does not hold, `(n,)`."""
    rows = blocks.transpose(0, 1)
    rest = rows - (rows @ span.transpose(-1, -2)) @ span
    total = blocks.square().sum((1, 2)).clamp_min(torch.finfo(rows.dtype).tiny)
    found: Tensor = (rest.square().sum((0, 2)) / total).sqrt()
    return found


def united(spans: Sequence[Tensor]) -> Tensor:
    """An orthonormal basis of several texts' spans together, `(2 H, k, w)`; zero rows fill up."""
    rows = torch.cat(list(spans), 1)
    _, values, directions = torch.linalg.svd(rows, full_matrices=False)
    found: Tensor = directions * (values > torch.finfo(rows.dtype).eps * 1e3 * values[:, :1])[..., None]
    return found


def need(heads: Heads, text: Sequence[int], blocks: Tensor) -> float:
    """How much the gradients `(n, 2 H, w)` of a text's tokens need the least needed of its tokens.

    Leaving one atom j out of a least squares fit raises the squared residual by `c_j^2 / (G^-1)_jj` with the
    coefficients c and the atoms' Gram matrix G (the partial F statistic's numerator). Of each position, the largest
    share over the n gradients; of these, the smallest.

    A token that no gradient needs could as well be another: a text with one is not certain.
    """
    keys, queries = heads.keys_and_queries(torch.tensor(list(text)), torch.arange(len(text)))
    total = blocks.square().sum((1, 2))
    shares = torch.zeros(len(blocks), len(text), dtype=blocks.dtype)
    parts = blocks.chunk(2, dim=1)
    for rows, part, skipped in ((keys[1:] - keys[:1], parts[0], 1), (queries, parts[1], 0)):
        unit = (rows / rows.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)).transpose(0, 1)
        inverse = torch.linalg.pinv(unit)  # (H, w, k)
        dual = inverse.square().sum(1)  # the diagonal of the Gram matrix's inverse
        coefficients = part.transpose(0, 1) @ inverse  # (H, n, k)
        shares[:, skipped:] += (coefficients.square() / dual[:, None]).sum(0)
    return float((shares[:, 1:] / total[:, None]).sqrt().max(0).values.min())
