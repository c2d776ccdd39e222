"""What others do with the same updates, written directly on TenSEAL: one flat vector, and nothing around it.

| peer     | ring                           | scale | key       | source                            |
|----------|--------------------------------|-------|-----------|-----------------------------------|
| NVFlare  | n = 8192, primes [60,40,40]    | 2^40  | symmetric | defaults of its `HEBuilder`       |
| tutorial | n = 8192, primes [60,40,40,60] | 2^40  | public    | "Getting started", CKKS           |

Theirs has no envelope, no code against changes, no canary and no head-room check; every client holds the secret key.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from time import process_time
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Values = NDArray[np.float64]


@final
@dataclass(frozen=True)
class Measured:
    """One round, whoever's: seconds of the processor, bytes, and the mean it gave.

    Attributes:
      client: seconds of one client in all stages: the mean over clients.
      server: seconds of the server for all clients together.
      key_holder: seconds of the key holder; 0 where there is none.
      up: bytes a client sends.
      mean: of the rows, `(d,)` float64.
      clients: n.
    """

    client: float
    server: float
    key_holder: float
    up: float
    mean: Tensor
    clients: int

    @property
    def path(self) -> float:
        """Seconds a client costs: its own work, and its share of what server and key holder did."""
        return self.client + (self.server + self.key_holder) / self.clients


@final
@dataclass(frozen=True)
class Plain:
    """CKKS as TenSEAL gives it.

    Attributes:
      chain: bits of the primes.
      symmetric: whether clients encrypt with the secret key.
      degree: of the ring.
      bits: of the scale.
    """

    chain: tuple[int, ...]
    symmetric: bool
    degree: int = 8192
    bits: int = 40

    @property
    def slots(self) -> int:
        """Numbers in a ciphertext. Longer vectors make SEAL print a warning, and are cut at the same places."""
        return self.degree // 2

    def context(self) -> Any:
        """Fresh keys."""
        import tenseal as ts

        kind = ts.ENCRYPTION_TYPE.SYMMETRIC if self.symmetric else ts.ENCRYPTION_TYPE.ASYMMETRIC
        made = ts.context(
            ts.SCHEME_TYPE.CKKS, self.degree, coeff_mod_bit_sizes=list(self.chain), encryption_type=kind, n_threads=1
        )
        made.global_scale = 2.0**self.bits
        return made

    def play(self, rows: Tensor) -> Measured:
        """One round: every client encrypts and serialises, the server parses and adds, every client decrypts the sum.

        One decryption is measured and counted for every client. What the sum costs to send back is not counted.
        """
        n, context = len(rows), self.context()
        client = server = 0.0
        size, total = 0, list[Any]()
        for row in rows:
            began = process_time()
            message = [vector.serialize() for vector in self.encrypted(context, row)]
            sent = process_time()
            total = _added(total, _parsed(context, message))
            client, server = client + sent - began, server + process_time() - sent
            size += sum(map(len, message))
        began = process_time()
        values = np.concatenate([np.asarray(chunk.decrypt(), np.float64) for chunk in total])
        decryption = process_time() - began
        mean = torch.from_numpy(values / n)
        return Measured(client / n + decryption, server, 0.0, size / n, mean, n)

    def encrypted(self, context: Any, row: Tensor, *, whole: bool = False) -> list[Any]:
        """One row `(d,)`, a ciphertext for every `slots` numbers; `whole`: the last one is filled up with zeros."""
        import tenseal as ts

        values: Values = row.double().numpy()
        if whole:
            values = np.append(values, np.zeros(-len(values) % self.slots))
        return [ts.ckks_vector(context, values[at : at + self.slots]) for at in range(0, len(values), self.slots)]


def _parsed(context: Any, message: Sequence[bytes]) -> list[Any]:
    import tenseal as ts

    return [ts.ckks_vector_from(context, part) for part in message]


def _added(total: list[Any], vectors: list[Any]) -> list[Any]:
    if not total:
        return vectors
    for own, other in zip(total, vectors, strict=True):
        own.add_(other)
    return total


NVFLARE = Plain((60, 40, 40), symmetric=True)
TUTORIAL = Plain((60, 40, 40, 60), symmetric=False)
PEERS = {"NVFlare": NVFLARE, "TenSEAL tutorial": TUTORIAL}


def squared_distance(first: Sequence[Any], second: Sequence[Any]) -> Any:
    """Encrypted squared distance of two vectors, one or more whole ciphertexts each: a square each, one sum over slots.

    What is done without a sketch. Squares are added before the rotations, which a pair then needs once.
    """
    squares = ((one - other).square() for one, other in zip(first, second, strict=True))
    return reduce(add, squares).sum()
