"""One round of a channel without training: with rows that are given, and if wanted in a process of its own."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from time import process_time
from typing import Any, TypeVar, final

import torch
from torch import Tensor

from privfm.checks import require
from privfm.contracts import Cast, Channel, Encoded, Engine, Intake, Reveals, Transform, View
from privfm.defenses.transforms import Chain
from privfm.federation.phases import Phases
from privfm.randomness import Seeds

Result = TypeVar("Result")


@final
@dataclass(frozen=True)
class Rehearsal:
    """One round of a channel with given rows instead of trained ones.

    Attributes:
      channel: what is rehearsed.
      rows: `(m, d)`; client i has row i modulo m.
      codecs: the wire format. Encoding is counted as the client's work, decoding as the server's.
      needs: of the rule.
      gone: clients that are lost, by the stage at which they are.
      clients: how many take part, numbered from 0; None: one for each row.
      seed: of the codec's rounding.
    """

    channel: Channel
    rows: Tensor
    codecs: Transform = field(default_factory=lambda: Chain(()))
    needs: Reveals = Reveals.SUM
    gone: Mapping[str, frozenset[int]] = field(default_factory=dict)
    clients: int | None = None
    seed: int = 0

    @property
    def cohort(self) -> range:
        """Who takes part."""
        return range(len(self.rows) if self.clients is None else self.clients)

    def exact_mean(self, ids: Collection[int]) -> Tensor:
        """Of the rows of these clients, `(d,)` float64: what the round should give, before any codec."""
        counts = torch.bincount(torch.tensor(list(ids), dtype=torch.int64) % len(self.rows), minlength=len(self.rows))
        total = torch.zeros(self.rows.shape[1], dtype=torch.float64)
        for row, count in zip(self.rows, counts.tolist(), strict=True):
            total += count * row.double()
        return total / len(ids)

    def play(
        self,
        engine: Engine,
        finish: Callable[[View], Result],
        clock: Callable[[], float] = process_time,
    ) -> tuple[Result, Phases]:
        """Plays the round.

        Args:
          engine: with clients one by one, or their encoding is counted as that of the first of a batch.
          finish: what the server does with the view, for instance `lambda view: view.total()`.
          clock: see `Phases`.

        Returns:
          What `finish` gives, and where time and bytes went.

        Raises:
          InvalidArgument: the codec keeps a state from round to round; there is one round here.
          RoundFailed: the round could not finish.
        """
        d = self.rows.shape[1]
        require(not self.codecs.init(d), f"codecs={self.codecs!r}: keeps a state, and a rehearsal has one round")
        exchange = engine.open(self.channel, self._sealed, Cast(0, self.cohort, gone=self.gone))
        intake = Intake(self.codecs, d, self.needs)
        with Phases(exchange, clock) as phases:
            result = finish(self.channel.collect(self.cohort, intake, phases))
        return result, phases

    def _sealed(self, clients: Sequence[int]) -> Mapping[int, Encoded]:
        return {client: self._encoded(client) for client in clients}

    def _encoded(self, client: int) -> Encoded:
        generator = Seeds(self.seed).generator("codecs", 0, client)
        return self.codecs.encode(self.rows[client % len(self.rows)][None], {}, [generator])[0]


def in_child(work: Callable[..., Result], *arguments: Any) -> Result:
    """`work(*arguments)` in a fresh process with one thread, whose memory holds nothing of earlier rounds.

    The process is forked from one that has loaded the libraries and done nothing with them, not from this one: what
    the encryption library keeps (contexts with threads of their own) does not survive a fork.

    Args:
      work: a function of a module's top level.
      arguments: picklable, as is what `work` gives.

    Raises:
      RuntimeError: the process died.
      Exception: what `work` raised.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(_preloaded())
    receiving, sending = context.Pipe(duplex=False)
    child = context.Process(target=_answer, args=(sending, work, arguments))
    child.start()
    sending.close()
    try:
        succeeded, found = receiving.recv()
    except EOFError as error:
        child.join()
        raise RuntimeError(f"a round's process died with {child.exitcode}, for instance for lack of memory") from error
    child.join()
    if succeeded:
        result: Result = found
        return result
    raise found


_LIBRARIES = (
    "cryptography.hazmat.backends.openssl.backend",
    "cryptography.hazmat.primitives.asymmetric.ed25519",
    "cryptography.hazmat.primitives.asymmetric.x25519",
    "cryptography.hazmat.primitives.ciphers.aead",
    "cryptography.hazmat.primitives.constant_time",
    "cryptography.hazmat.primitives.hmac",
    "cryptography.hazmat.primitives.kdf.hkdf",
    "tenseal.sealapi",
    "safetensors.torch",
)
"""What channels load when they are first used. Otherwise each process would load it and count that as its work."""


def _preloaded() -> list[str]:
    """Modules that a process does not have to load: those above, and all of this package that are loaded here."""
    here = [name for name in sys.modules if name.partition(".")[0] == __package__.partition(".")[0]]
    return [*_LIBRARIES, *(name for name in here if not name.endswith("__main__"))]


def _answer(sending: Connection, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        sending.send((True, work(*arguments)))
    except Exception as error:
        sending.send((False, error))


def grown(work: Callable[..., Result], *arguments: Any) -> tuple[Result, int | None]:
    """What `work(*arguments)` gives, and the bytes by which this process grew at the worst moment; None outside Linux.

    What other work has left free within the process hides some of it: use it in a process of its own.
    """
    switch = Path("/proc/self/clear_refs")
    if not switch.exists():
        return work(*arguments), None
    switch.write_text("5")  # proc(5): sets VmHWM back to what is resident now
    before = _peak()
    result = work(*arguments)
    return result, max(_peak() - before, 0)


def _peak() -> int:
    """Most bytes this process had resident."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return 1024 * int(line.split()[1])
