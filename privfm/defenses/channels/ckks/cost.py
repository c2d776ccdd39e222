"""What a CKKS sum costs before it is run: one ciphertext, made and timed on this machine, times their number."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, log2
from time import perf_counter
from typing import TypeVar, final

import numpy as np

from privfm.checks import at_least
from privfm.defenses.channels.ckks.ciphertexts import Ring, RunningSum, encrypt, new_keys, public_ring
from privfm.defenses.channels.ckks.parameters import LARGEST_MODULUS, CKKSParameters

Result = TypeVar("Result")

_REPEATS = 5  # the shortest of them counts; all together take about 0.1 s


@final
@dataclass(frozen=True)
class CKKSCost:
    """An estimate for one round; seconds are those of one process on this machine.

    Attributes:
      parameters: the ring.
      ciphertexts: of one client's vector.
      message_bytes: one client's vector on the wire.
      bytes_a_number: of it.
      key_bytes: what a client gets at the beginning of a round.
      largest_error: of a coordinate of the mean over a full cohort, in units of an update; without a plan's noise.
      deviation: standard deviation of that error.
      client_seconds: to encrypt and write a vector.
      server_seconds: to read and add one client's.
      key_holder_seconds: to decrypt the sum.
    """

    parameters: CKKSParameters
    ciphertexts: int
    message_bytes: int
    bytes_a_number: float
    key_bytes: int
    largest_error: float
    deviation: float
    client_seconds: float
    server_seconds: float
    key_holder_seconds: float

    def facts(self, clients: int) -> dict[str, str]:
        """In words, for whoever reads before a run; head-room for `clients`."""
        ring = self.parameters
        return {
            "ring": f"n={ring.degree}, primes of {'+'.join(map(str, ring.chain))} bits: {sum(ring.chain)} of the "
            f"{LARGEST_MODULUS[ring.degree]} that 128-bit security allows (classical, HES 2018), "
            f"scale 2^{log2(ring.scale):.0f}",
            "head-room": f"proved for {clients} clients, whatever they encode",
            "error": f"of the mean: at most {self.largest_error:.1e}, deviation {self.deviation:.1e}",
            "a client sends": f"{self.message_bytes:,} bytes, {self.bytes_a_number:.1f} a value",
            "takes": f"about {self.client_seconds:.2g} s a client, {self.server_seconds:.2g} s on the server for each "
            f"and {self.key_holder_seconds:.2g} s to decrypt, on this machine",
        }

    def __str__(self) -> str:
        return "; ".join(f"{name}: {text}" for name, text in self.facts(self.parameters.clients).items())


def estimate(parameters: CKKSParameters, width: int, largest_error: float, deviation: float) -> CKKSCost:
    """Times one full ciphertext and multiplies by their number.

    Args:
      parameters: the ring.
      width: numbers in a client's vector.
      largest_error: taken over.
      deviation: taken over.
    """
    at_least("width", width, 1)
    public, secret = new_keys(parameters)
    values = np.random.default_rng(0).uniform(-1, 1, parameters.numbers)
    encrypt((public, parameters), values)  # parses the key
    client, part = _timed(lambda: encrypt((public, parameters), values))
    running = RunningSum(public_ring(public, parameters), parameters.numbers)
    server, _ = _timed(lambda: running.add([part]))
    total = RunningSum(Ring(secret, parameters, secret=True), parameters.numbers)
    key_holder, _ = _timed(total.decrypted)
    count = ceil(width / parameters.numbers)
    return CKKSCost(
        parameters,
        count,
        message_bytes=count * len(part),
        bytes_a_number=count * len(part) / width,
        key_bytes=len(public),
        largest_error=largest_error,
        deviation=deviation,
        client_seconds=count * client,
        server_seconds=count * server,
        key_holder_seconds=count * key_holder,
    )


def _timed(work: Callable[[], Result]) -> tuple[float, Result]:
    shortest = float("inf")
    for _ in range(_REPEATS):
        begin = perf_counter()
        result = work()
        shortest = min(shortest, perf_counter() - begin)
    return shortest, result
