"""Which of all examples that the server can think of are a client's: no optimisation, and nothing is inverted.

For every candidate the server computes the update which a client with that example alone would send, and compares what
it sees. It works on whatever part of an update is left in the clear, be it six biases.
"""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor

from privfm.checks import at_least, require


def matched_candidates(seen: Tensor, candidates: Tensor) -> Tensor:
    """Cosine of what is seen of every client with each candidate's own update: `(clients, N)`.

    One order of the candidates follows from it: a client's update is near the mean of its examples' own ones.

    Args:
      seen: rows of clients `(clients, d)`, with NaN in the same columns, which are not seen.
      candidates: `(N, d)`, the update of a client that holds this example alone.

    Returns:
      `-inf` where nothing is seen, or nothing of it moves.

    Raises:
      InvalidArgument: widths differ, or clients hide different columns.
    """
    own, others = _in_clear(seen, candidates)
    scores: Tensor = (own @ others.T) / (own.norm(dim=1, keepdim=True) * others.norm(dim=1))
    return scores.masked_fill(scores.isnan(), -inf)


def pursued_candidates(seen: Tensor, candidates: Tensor, examples: int) -> Tensor:
    """Orthogonal matching pursuit: the candidates whose own updates explain what is seen, `(clients, examples)`.

    One candidate is taken at a time, the nearest to what is left over by the best combination of those before it.

    Args:
      seen: as in `matched_candidates`.
      candidates: as there.
      examples: of each client.

    Returns:
      Places of candidates, each once a client; -1 where no column is seen.

    Raises:
      InvalidArgument: widths differ, clients hide different columns, or there are fewer candidates than examples.

    Source: Pati, Rezaiifar, Krishnaprasad, "Orthogonal matching pursuit", 1993.
    """
    at_least("examples", examples, 1)
    require(examples <= len(candidates), f"examples={examples}: there are {len(candidates)} candidates")
    own, others = _in_clear(seen, candidates)
    chosen = torch.full((len(own), examples), -1)
    if own.shape[1] == 0:
        return chosen
    lengths, rest = others.norm(dim=1), own
    for place in range(examples):
        scores = (rest @ others.T / lengths).nan_to_num(-inf)
        if place:
            scores.scatter_(1, chosen[:, :place], -inf)
        chosen[:, place] = scores.argmax(1)
        parts = others[chosen[:, : place + 1]].double()  # (clients, taken, columns)
        inner, wanted = parts @ parts.mT, parts @ own.double()[:, :, None]
        weights = torch.linalg.lstsq(inner, wanted).solution  # of least length where parts depend on each other
        rest = own - (parts.mT @ weights)[:, :, 0].float()
    return chosen


def ranks(scores: Tensor, rows: Tensor) -> Tensor:
    """Place of each of the client's rows `(clients, n)` among the scores `(clients, N)`, from 1; ties all come last.

    >>> ranks(torch.tensor([[0.5, 0.9, 0.5]]), torch.tensor([[1, 0]])).tolist()
    [[1, 3]]
    """
    own = scores.gather(1, rows)
    return torch.stack([(scores >= column[:, None]).sum(1) for column in own.T], dim=1)


def _in_clear(seen: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
    require(
        seen.dim() == candidates.dim() == 2 and seen.shape[1] == candidates.shape[1] and len(seen) > 0,
        f"seen has shape {tuple(seen.shape)}, candidates {tuple(candidates.shape)}: expected (clients, d) and (N, d)",
    )
    hidden = seen.isnan()
    require(bool((hidden == hidden[0]).all()), "clients hide different columns: ask for each by itself")
    return seen[:, ~hidden[0]], candidates[:, ~hidden[0]]
