"""The signal itself, and the signal less what models that never saw the example say: the cheap attacks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

import numpy as np

from privfm.attacks.membership.sides import by_query, mean_over, too_few
from privfm.checks import require
from privfm.contracts.membership import Array, MembershipAttack, Signals


@final
@dataclass(frozen=True)
class Threshold(MembershipAttack):
    """The signal itself: what the model fits well was trained on. With minus the loss, the loss attack.

    Several queries of one example are averaged. Easy examples look like members; see CalibratedByReference.

    Source: Yeom et al., "Privacy risk in machine learning: analyzing the connection to overfitting", 2018 (their
      threshold is one of the ROC's).

    >>> Threshold()(Signals(np.array([[-0.5, -2.0]]), np.array([[True, False]])))
    array([-0.5, -2. ])
    """

    used = ("signal of the target",)

    def scores(self, target: Signals, shadows: Signals | None) -> Array:
        return _signal(target)


@final
@dataclass(frozen=True)
class CalibratedByReference(MembershipAttack):
    """The signal less the mean signal of models that were not trained on the example: how hard it is in itself.

    One such model an example is enough. Models that were trained on it are not read. Several queries are averaged.

    Source: Watson et al., "On the importance of difficulty calibration in membership inference attacks", 2022.
    """

    used = ("signal of the target", "shadow models not trained on the example")

    def refusal(self, target: Signals, shadows: Signals | None) -> str:
        if shadows is None:
            return "needs shadow models; CalibratedByBase takes the model that was fine-tuned, Threshold takes none"
        return too_few(~shadows.inside, 1, "not trained on")

    def scores(self, target: Signals, shadows: Signals | None) -> Array:
        assert shadows is not None  # refused before
        usual = mean_over(~shadows.inside, by_query(shadows.values))
        return np.asarray((by_query(target.values)[0] - usual).mean(axis=1))


@final
@dataclass(frozen=True, eq=False)
class CalibratedByBase(MembershipAttack):
    """The signal less that of the model the fine-tuning began from: what fine-tuning has changed for the example.

    No shadow models: every model of a run is judged against the one base, which belongs to the data and not to a
    configuration; hence it is given here. Several queries are averaged.

    Args:
      base: signal of the base model, `(n,)` or `(n, queries)`, of the same examples in the same order.

    Raises:
      InvalidArgument: not of one or two dimensions, or not finite.

    Source: Carlini et al., "Extracting training data from large language models", 2021 (a second model as reference);
      Watson et al. 2022 with one reference model.
    """

    base: Array = field(repr=False)

    used = ("signal of the target", "signal of the base model")

    def __post_init__(self) -> None:
        require(self.base.ndim in {1, 2}, f"base {self.base.shape}: expected (n,) or (n, queries)")
        require(bool(np.isfinite(self.base).all()), "base: signals are not finite; leave such examples out")

    def refusal(self, target: Signals, shadows: Signals | None) -> str:
        wanted, given = target.values.shape[1:], self.base.shape
        return "" if wanted == given else f"base {given}: expected {wanted}, the target's examples and queries"

    def scores(self, target: Signals, shadows: Signals | None) -> Array:
        return np.asarray(_signal(target) - by_query(self.base[None])[0].mean(axis=1))


def _signal(target: Signals) -> Array:
    """The target's signal `(n,)`, averaged over queries."""
    return np.asarray(by_query(target.values)[0].mean(axis=1))
