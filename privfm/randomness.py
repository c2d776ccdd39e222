"""The seed tree: purpose -> round -> client.

Branches do not depend on the arm of an experiment, so that arms meet the same clients in the same order and their
differences are paired. No generator state is ever stored: a path names a generator, in a resumed run too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from typing import Literal, final

import torch
from torch import Generator

Purpose = Literal[
    "split", "partition", "initialisation", "malicious", "cohort", "dropout", "data order", "attack",
    "attack schedule", "steps", "codecs", "root", "adapters", "noise", "own noise", "evaluation", "canaries", "shadows",
]  # fmt: skip


@final
@dataclass(frozen=True)
class Seeds:
    """Generators for every purpose of a run, named by their path.

    torch's CPU generator takes 32 bits of a seed: of a hundred thousand streams about one pair is the same. That is
    good enough for a simulation and for nothing secret.

    >>> Seeds(7).generator("cohort", 3).initial_seed() == Seeds(7).generator("cohort", 3).initial_seed()
    True
    """

    seed: int

    def generator(self, purpose: Purpose, *path: int) -> Generator:
        """A CPU generator, freshly seeded by SHA-256 of `(seed, purpose, *path)`."""
        digest = sha256(repr((self.seed, purpose, *path)).encode()).digest()
        return Generator().manual_seed(int.from_bytes(digest[:8], "big"))

    def clients(self, purpose: Purpose, round: int, ids: Sequence[int]) -> list[Generator]:
        """One generator a client; a client's does not depend on who else is there."""
        return [self.generator(purpose, round, client) for client in ids]


@contextmanager
def seeded(generator: Generator) -> Iterator[None]:
    """Runs foreign code that draws from the global generators (dropout, initialisation) from `generator`.

    The global state of the CPU and of every visible GPU is put back afterwards.
    """
    seed = int(torch.randint(2**62, (), generator=generator))
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(seed)
        if torch.cuda.is_available():  # torch.manual_seed notes a stack trace for each kind of device that is not there
            torch.cuda.manual_seed_all(seed)
        yield
