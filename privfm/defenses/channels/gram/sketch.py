"""Inner products of long encrypted vectors from short ones: signed shifts, drawn after everybody has committed.

A row is cut into chunks of N = 8192 numbers, and chunk c is moved by `U_c`: multiplied by `X^j` (a shift in which what
falls off comes back with the other sign; j uniform in 0..2N-1, so that -1 is among them), then mapped by
`X -> X^(t^g)` (g uniform in 0..G-1). The sketch is the sum of the moved chunks, N numbers whatever the width. Each
`U_c` is an isometry and `E U_c = 0`, so inner products of sketches are those of rows in the mean, and a row of one
chunk is its own sketch.

How far off, for any rows and whoever chose them, if the draw came after:

    Var |S x|^2 = 4 sum_{c<c'} E <U_c x_c, U_c' x_c'>^2 <= 4 sum_{c<c'} |x_c|^2 |x_c'|^2 / 2G <= |x|^4 / G

as the `U` are uniform in the group that the shifts and the G maps form. It splits R^N into irreducible parts of 2G
dimensions (an orbit of G roots of unity under t, with their conjugates; of complex type, as t never reaches -1), in
which E <U v, w>^2 = |v|^2 |w|^2 / 2G by Schur's orthogonality relations. So the relative deviation of a squared length
is at most `1 / sqrt(G)`, 25 % for G = 16, reached by rows with one and the same pure tone in every chunk; these behave
like chi-square with 2G degrees of freedom over 2G, of which less than 1/4 has probability 5e-6. Rows without such
structure have `sqrt(2 / N)` = 1.6 %. Expected values of a maximum over n^2 pairs are larger by `sqrt(2 ln n^2)`.

The G maps are what makes it hold: shifts and signs alone leave a pure tone in its two dimensions (a deviation of
100 %), as random signs without permutations leave a single place in its one (141 %).

None of it holds for a draw that is known before rows are sent: the sketch is a linear map to N numbers, and a row in
its kernel has any length and no sketch at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, log2, sqrt
from typing import Any, Final, final

import numpy as np
from numpy.typing import NDArray

from privfm.checks import RoundFailed, at_least, require
from privfm.defenses.channels.gram.ring import DEGREE, Array, ServerRing
from privfm.defenses.channels.identities import derived

WEIGHT_NORM: Final = 2.0**16
"""L2 norm of whole weights: noise grows with it."""

WEIGHT_SUM: Final = 2.0**20
"""Sum of whole weights: a sum of so many rows of 24 bits is still exact in double precision, FFT included."""

PRECISION: Final = 2.0**-28
"""Least step, in squared bounds, to which inner products are rounded. Their noise is 2^-35."""

RELATIVE_PRECISION: Final = 2.0**-24
"""Least step as a share of the product of two lengths."""

_SHORTENED = 4.0  # squared length of a row over that of its sketch, at most
_NOISE = 2.0**-30  # of an entry, in squared bounds and as a share of the largest; 30 standard deviations


@final
@dataclass(frozen=True)
class Draw:
    """Where each chunk of every row goes.

    Attributes:
      shifts: `(chunks,)`, j of `X^j`.
      groups: `(chunks,)`, how often the map is applied.
      count: G, groups there are.
    """

    shifts: NDArray[np.int64]
    groups: NDArray[np.int64]
    count: int

    @classmethod
    def expand(cls, seed: bytes, context: bytes, chunks: int, count: int) -> Draw:
        """From a seed of 256 bits, all of which count, and the commitments it is bound to.

        Args:
          seed: 32 secret bytes.
          context: what the seed is for.
          chunks: to be placed.
          count: groups; a power of two.
        """
        from cryptography.hazmat.primitives.ciphers import Cipher
        from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

        require(len(seed) == 32, f"seed of {len(seed)} bytes: expected 32")
        check_groups(count)
        stream = Cipher(ChaCha20(derived(seed, b"sketch", context), bytes(16)), None).encryptor()
        words = np.frombuffer(stream.update(bytes(8 * chunks)), "<u4").astype(np.int64).reshape(chunks, 2)
        groups = words[:, 1] % count  # powers of two: no remainder, no bias
        # Mapping everything once more changes no inner product: so as few times as will do.
        return cls(words[:, 0] % (2 * DEGREE), groups - groups.min(initial=count), count)

    @property
    def step(self) -> int:
        """t: the map that moves by `N / 2G` among the roots of unity `3^i`."""
        return step_of(self.count)


def check_groups(count: int) -> None:
    """Refuses a number of groups that is no power of two, or more than an orbit is long."""
    at_least("groups", count, 1)
    require(count <= DEGREE // 2 and count & (count - 1) == 0, f"groups={count}: expected a power of two <= 4096")


def step_of(count: int) -> int:
    """The t for so many groups: an element of order G modulo 2N."""
    return pow(3, DEGREE // 2 // count, 2 * DEGREE)


def chunks_of(width: int) -> int:
    """Ciphertexts that a vector of so many numbers takes."""
    return ceil(width / DEGREE)


def largest_deviation(count: int) -> float:
    """Relative standard deviation of a squared length, at most, for any row: `1 / sqrt(G)`."""
    return 1 / sqrt(count)


def usual_deviation() -> float:
    """The same for rows without structure, of many chunks: `sqrt(2 / N)`."""
    return sqrt(2 / DEGREE)


def sketched(rows: Array, draw: Draw) -> Array:
    """Sketches of plain rows, `(k, d)` -> `(k, N)`, as the server makes them of encrypted ones."""
    found = np.zeros((len(rows), DEGREE))
    places = np.arange(DEGREE)
    for chunk, (shift, group) in enumerate(zip(draw.shifts.tolist(), draw.groups.tolist(), strict=True)):
        part = rows[:, chunk * DEGREE : (chunk + 1) * DEGREE]
        exponents = (places[: part.shape[1]] + shift) * pow(draw.step, group, 2 * DEGREE) % (2 * DEGREE)
        found[:, exponents % DEGREE] += np.where(exponents < DEGREE, part, -part)  # each place once
    return found


def encrypted_sketch(ring: ServerRing, chunks: Sequence[Any], monomials: Sequence[Any], draw: Draw) -> Any:
    """The sketch of one encrypted row.

    Args:
      ring: of the server.
      chunks: the row, a ciphertext a chunk.
      monomials: of `monomials_of`, the same for every row.
      draw: that they were made from.
    """
    sums: list[Any] = [None] * draw.count
    for chunk, monomial, group in zip(chunks, monomials, draw.groups.tolist(), strict=True):
        moved = ring.times(chunk, monomial)
        if sums[group] is None:
            sums[group] = moved
        else:
            ring.add(sums[group], moved)
    total = ring.zero(None)  # ours: a client cannot make all of it cancel
    for group in range(int(draw.groups.max()), -1, -1):  # Horner's scheme: group g is mapped g times
        held = sums[group]
        if held is not None:
            ring.add(total, held)
        if group:
            ring.map(total, draw.step)
    return total


def monomials_of(ring: ServerRing, draw: Draw) -> list[Any]:
    """`X^j` for every chunk, encoded once for all rows."""
    return [ring.monomial(shift, 1) for shift in draw.shifts.tolist()]


def whole_weights(weights: Array) -> tuple[NDArray[np.int64], float]:
    """Weights `(n,)` as whole numbers and a unit: `weights` is about `whole * unit`.

    | weights                        | whole numbers          | unit                                            |
    |--------------------------------|------------------------|-------------------------------------------------|
    | all equal, apart from zeros    | 0 and 1: additions only | that weight; exact                              |
    | others                         | rounded                | the least power of two with norm and sum in range |

    Each weight is off by half a unit at most: `2^-17` of the weights' L2 norm, or `2^-21` of their sum; twice that, as
    the unit is a power of two.

    >>> whole_weights(np.array([0.2, 0.0, 0.2]))[0].tolist()
    [1, 0, 1]
    """
    own = np.asarray(weights, np.float64)
    chosen = own[own != 0]
    if len(chosen) == 0 or (chosen == chosen[0]).all():
        return (own != 0).astype(np.int64), float(chosen[0]) if len(chosen) else 1.0
    least = max(float(np.linalg.norm(chosen)) / WEIGHT_NORM, float(np.abs(chosen).sum()) / WEIGHT_SUM)
    unit = 2.0 ** ceil(log2(least))
    return np.rint(own / unit).astype(np.int64), unit


def effective_size(weights: Array) -> float:
    """`(sum w)^2 / sum w^2`: of how many clients, effectively, a weighted sum consists; 0 without weights."""
    squares = float(weights @ weights)
    return float(weights.sum()) ** 2 / squares if squares > 0 else 0.0


def checked_gram(gram: Array, n: int, largest: float) -> tuple[Array, NDArray[np.bool_]]:
    """What a key holder believes of a decrypted Gram matrix of n clients and m references.

    Args:
      gram: `(n+m, n+m)`, symmetric by construction.
      n: clients.
      largest: squared length beyond which a client's row counts as malformed.

    Returns:
      The matrix of usable clients and references, and `(n,)` which clients are usable. It is positive semi-definite:
      negative eigenvalues within the tolerance, `(n+m) 2^-30` of the largest squared length or bound, are set to
      zero.

    Raises:
      RoundFailed: not finite, or beyond the tolerance no Gram matrix of anything.
    """
    if not np.isfinite(gram).all():
        raise RoundFailed("the decrypted inner products are not finite")
    squares = gram.diagonal()[:n]
    usable = (squares <= largest) & (squares >= -_NOISE)
    keep = np.concatenate([usable, np.ones(len(gram) - n, bool)])
    kept = gram[np.ix_(keep, keep)]
    if len(kept) == 0:
        return kept, usable
    values, vectors = np.linalg.eigh(kept)
    tolerance = len(kept) * _NOISE * max(float(kept.diagonal().max()), 1.0)
    if values[0] < -tolerance:
        raise RoundFailed(
            "the decrypted inner products have a negative eigenvalue: of no rows whatever, a row too long to be "
            "measured, or a wrong key"  # and no number: the server would read off the error of decryption
        )
    if values[0] >= 0:
        return kept, usable
    return (vectors * values.clip(min=0)) @ vectors.T, usable


def longest_sum(gram: Array, weights: Array) -> float:
    """Largest squared length of a sum of rows that agrees with the Gram matrix of their sketches.

    The sum's sketch has the squared length `w G w`, which is under a quarter of the sum's own with probability 5e-6 at
    most (G = 16, any rows; see the module). A longer sum holds a row whose square, in a ring of inner products modulo
    2^20, came out as that of a short one.

    Args:
      gram: `(n, n)`, as `rounded_gram` leaves it.
      weights: `(n,)`.
    """
    lengths = np.sqrt(gram.diagonal().clip(min=0))
    rounding = RELATIVE_PRECISION * 4 * float(np.abs(weights) @ (1 + lengths)) ** 2
    clipped = 2 * len(gram) * _NOISE * max(float(lengths.max(initial=0.0)) ** 2, 1.0) * float(weights @ weights)
    return _SHORTENED * max(float(weights @ gram @ weights), 0.0) + rounding + clipped


def rounded_gram(gram: Array) -> Array:
    """A Gram matrix in squared bounds, rounded to steps far above the noise of its entries and below a sketch's error.

    A step is the power of two from `RELATIVE_PRECISION` times the two lengths on, and at least `PRECISION`.
    """
    lengths = np.sqrt(gram.diagonal().clip(min=0))
    steps = np.maximum(RELATIVE_PRECISION * np.outer(lengths, lengths), PRECISION)
    steps = 2.0 ** np.ceil(np.log2(steps))
    found: Array = np.rint(gram / steps) * steps
    return found
