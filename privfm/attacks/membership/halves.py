"""Shadow models on random halves: who trains on what, and what they all say of every example.

How a model is trained is not known here: trainer and evaluator are given.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np

from privfm.checks import at_least, require
from privfm.contracts.membership import Array, Flags, Signals

Models = TypeVar("Models")
"""Whatever a trainer returns and an evaluator takes: a matrix of adapters, paths, a list of modules."""


def halves(models: int, examples: int, generator: np.random.Generator) -> Flags:
    """Which of the examples each model is trained on, `(models, examples)`: every example in exactly half of them.

    Every example's models are drawn by themselves, so that a model has about half of the examples: n / 2 with a
    deviation of sqrt(n) / 2. Everybody who knows the other models' flags knows the last one's: an attack on one of the
    models by the others must not count them.

    Args:
      models: an even number.
      examples: n.
      generator: of the draw.

    Raises:
      InvalidArgument: an odd number of models or none, no examples, or a model would have no example or every one: too
        few examples.

    >>> inside = halves(4, 100, np.random.default_rng(0))
    >>> inside.shape, set(inside.sum(0).tolist())
    ((4, 100), {2})

    Source: Carlini et al., "Membership inference attacks from first principles", 2022, section V-A: 256 models, each
    example in 128.
    """
    at_least("models", models, 2)
    at_least("examples", examples, 1)
    require(models % 2 == 0, f"models={models}: expected an even number, so that every example is in half of them")
    column = np.arange(models) < models // 2
    inside: Flags = generator.permuted(np.repeat(column[:, None], examples, axis=1), axis=0)
    _both_sides(inside)
    return inside


def shadow_signals(
    train: Callable[[Flags], Models],
    signal: Callable[[Models], Array],
    inside: Flags,
    population: Callable[[Models], Array] | None = None,
) -> Signals:
    """Trains shadow models and asks every one for every example.

    Args:
      train: `(models, n) bool -> models`: trains each model on the examples of its row, and on nothing else of them.
      signal: what the models say of the n examples, `(models, n)` or `(models, n, queries)`; larger: fits better.
      inside: of `halves`.
      population: the same of examples that no model was trained on, `(models, z)` or `(models, z, queries)`; None:
        there are none.

    Returns:
      Signals of all models. One of them as the target, the others as shadows, is the leave-one-out of
      `MembershipAttack.pooled`.

    Raises:
      InvalidArgument: a model has no example or every one, or a signal is not finite or of another shape.

    >>> inside = halves(2, 100, np.random.default_rng(0))
    >>> perfect = shadow_signals(lambda flags: flags, lambda flags: flags.astype(float), inside)
    >>> bool((perfect.values == perfect.inside).all())
    True

    Source: Carlini et al., "Membership inference attacks from first principles", 2022, algorithm 1 (lines 2 to 10),
    for all examples at once as in section V-A.
    """
    require(inside.ndim == 2, f"inside {inside.shape}: expected (models, n)")
    require(inside.dtype == np.bool_, f"inside has type {inside.dtype}: expected bool")
    _both_sides(inside)
    own = inside.copy()  # whatever a trainer does to what it is given, this is the truth
    own.flags.writeable = False
    models = train(own.copy())
    others = None if population is None else np.asarray(population(models), dtype=np.float64)
    return Signals(np.asarray(signal(models), dtype=np.float64), own, others)


def _both_sides(inside: Flags) -> None:
    """Checks that each model has examples it was trained on, and others."""
    sizes = inside.sum(1)
    one_sided = np.flatnonzero((sizes == 0) | (sizes == inside.shape[1])).tolist()
    require(
        not one_sided,
        f"inside: models {one_sided[:3]} are trained on none or all of the {inside.shape[1]} examples: expected some, "
        "and others to compare them with; give more examples",
    )
