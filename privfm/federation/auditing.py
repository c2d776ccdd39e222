"""What an audited run says of its epsilon: bounds from below, an estimate, and checks of the mechanism."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Final, final

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from privfm.attacks.audit import Bound, Check, Estimate, gaussian_fit, holm, one_run, spread
from privfm.checks import require
from privfm.contracts import Examples
from privfm.defenses.privacy import DPPlan
from privfm.defenses.privacy.trade_off import released_epsilon
from privfm.federation.canaries import Kept, PlantedCanaries
from privfm.federation.claims import Claim
from privfm.federation.federation import Federation, RunState

Array = NDArray[np.float64]
Losses = Callable[[Tensor, Examples], Tensor]
"""A model `(d,)` and examples -> the loss of each, `(b,)`."""


@final
@dataclass(frozen=True)
class AuditedRun:
    """What the canaries of one run say.

    Attributes:
      canaries: as configured.
      count: of them.
      included: how many were in.
      claimed: epsilon by the plan that is claimed, infinite without noise; None: nothing is claimed.
      delta: of claim and bound.
      bound: certified; method and numbers of guesses were fixed before the run, where canaries send rows by the claim.
      others: certified by other methods, each at its confidence by itself: the largest of them holds at less.
      estimate: a best guess; None: the scores allow none.
      checks: of the mechanism, where ghosts show it.
      expected: times that a canary was sampled whose coin said in, over all rounds.
      arrived: times that one's row was in a release; fewer by drop-outs, failures and bounds on participation.
    """

    canaries: str
    count: int
    included: int
    claimed: float | None
    delta: float
    bound: Bound
    others: tuple[Bound, ...]
    estimate: Estimate | None
    checks: tuple[Check, ...]
    expected: int
    arrived: int

    @property
    def ratio(self) -> float | None:
        """What is certified of the claim; None where nothing finite is claimed."""
        return None if self.claimed in {None, 0.0, inf} else self.bound.epsilon / (self.claimed or inf)

    @property
    def alarm(self) -> str:
        """What contradicts the claim, or says that nothing was tested; empty where neither."""
        found = []
        if self.arrived == 0:
            found.append("no canary reached a release: nothing was audited")
        if self.claimed is not None and self.bound.epsilon > self.claimed:
            sure = f"with {self.bound.confidence:.0%} confidence"
            found.append(f"epsilon is at least {self.bound.epsilon:.3g} {sure}, claimed is {self.claimed:.3g}")
        found += [_said(check) for check in self._wrong if not _safer(check, self._wrong)]
        return "; ".join(found)

    @property
    def safer(self) -> str:
        """Where the mechanism is not the claimed one, to the better; empty where it is."""
        return "; ".join(_said(check) for check in self._wrong if _safer(check, self._wrong))

    @property
    def _wrong(self) -> list[Check]:
        return [check for check in holm(self.checks) if check.p_value < ALARM]


ALARM: Final = 1e-3
"""Probability, over all checks of a run together (Holm), with which those of a sound mechanism raise an alarm. The
bound may, too, with one minus its own confidence."""

_SAFER_BELOW: Final = ("mean shift", "clients: sampling rate", "canaries: sampling rate")
_FOLLOWS: Final = ("noise shape", "shift spread")
"""Checks that take the claimed noise as given: more of it shows in them, too."""


def _safer(check: Check, checks: Sequence[Check]) -> bool:
    """Whether what was found protects more than the claim: more noise, less of a canary, fewer participations.

    Args:
      check: one that failed.
      checks: all that did.
    """
    above = check.found > check.expected
    if check.name in _FOLLOWS:
        return any(other.name == "noise scale" and _safer(other, ()) for other in checks)
    return check.name == "noise scale" if above else check.name in _SAFER_BELOW


def _said(check: Check) -> str:
    return f"{check.name} {check.found:.3g}, claimed {check.expected:.3g}"


def audited(federation: Federation, state: RunState, losses: Losses | None = None) -> AuditedRun:
    """Reads a run's canaries.

    Args:
      federation: an audited one.
      state: after its last round.
      losses: of a model on examples; needed for canaries that train.

    Raises:
      InvalidArgument: the run is not audited, or no round was played.
    """
    audit, planted = federation.arm.audit, federation.planted
    require(audit is not None and planted is not None, "audit=None: the run has no canaries")
    require(state.round > 0, "no round was played: canaries have left no trace")
    assert audit is not None and planted is not None
    plan = audit.claimed or federation.arm.plan
    if audit.canaries.trained:
        require(losses is not None, "losses=None: canaries that train are found by the model's loss on them")
        assert losses is not None
        delta = audit.delta if plan is None else plan.delta
        scores = _remembered(federation, planted, state, losses)
        bounds, estimate, checks = _from_losses(scores, planted.included.numpy(), delta, audit.confidence)
    else:
        assert plan is not None  # `compatibility.problems` sees to it
        bounds, estimate, checks = _from_traces(federation, planted, state, plan, audit.confidence)
    claimed = None
    if plan is not None and plan.unit == "client":  # canaries are found in what is released
        claimed = released_epsilon(plan, state.round, federation.learner.d)
    kept = Kept.read(state.audit)
    return AuditedRun(
        canaries=type(planted.canaries).__name__,
        count=planted.canaries.count,
        included=int(planted.included.sum()),
        claimed=claimed,
        delta=bounds[0].delta,
        bound=bounds[0],
        others=tuple(bounds[1:]),
        estimate=estimate,
        checks=checks,
        expected=int((kept.drawn & planted.included).sum()),
        arrived=int(kept.sent.sum()),
    )


Found = tuple[Sequence[Bound], Estimate | None, tuple[Check, ...]]
"""Bounds, the one that was fixed before the run first; an estimate, if the scores allow one; checks."""


def _from_losses(scores: Array, coins: NDArray[np.bool_], delta: float, confidence: float) -> Found:
    """Of canaries that train, by how well the model remembers them.

    Args:
      scores: `(count,)`.
      coins: `(count,)`, who was in.
      delta: of the bound.
      confidence: of the bound.
    """
    both = min(int(coins.sum()), int((~coins).sum())) >= 2 and bool(np.isfinite(scores).all())
    estimate = gaussian_fit(scores[coins], scores[~coins], delta) if both else None
    scores = np.nan_to_num(scores, nan=0.0)  # a model that is not finite remembers nobody
    return [one_run(scores, coins, delta, guesses=spread(len(coins)), confidence=confidence)], estimate, ()


def _from_traces(
    federation: Federation, planted: PlantedCanaries, state: RunState, plan: DPPlan, confidence: float
) -> Found:
    """Of canaries that send rows, by what was released along them.

    Args:
      federation: an audited one.
      planted: its canaries.
      state: after the last round.
      plan: that is claimed.
      confidence: of each bound by itself.

    Raises:
      InvalidArgument: nothing was released.
    """
    claim = Claim.of(plan, federation.arm, federation.learner.d, federation.clients.size)
    kept = Kept.read(state.audit)
    played = kept.released.isfinite().all(1)  # of a skipped round nothing was released
    require(bool(played.any()), "all rounds were skipped: canaries have left no trace")
    coins = planted.included.numpy()
    values = kept.released[played].double().numpy() / plan.max_grad_norm
    sent = kept.sent[played].numpy()
    turns = claim.turns(state.round, planted.canaries.count)[played.numpy()]
    bounds = claim.bounds(claim.scores(values, turns), coins, turns, confidence)
    checks: tuple[Check, ...] = ()
    if planted.canaries.ghost:
        drawn, clients = kept.drawn.numpy(), kept.clients.numpy()
        checks = claim.checks(values, sent, drawn, clients, federation.clients.size)
    return bounds, claim.estimate(values, sent, turns, coins), checks


def _remembered(federation: Federation, planted: PlantedCanaries, state: RunState, losses: Losses) -> Array:
    """How much lower the final model's loss on each canary's examples is than the initial one's, `(count,)`."""
    first = federation.learner.initial()
    found = []
    for place in range(planted.canaries.count):
        own = planted.canaries.examples(place)
        found.append(float((losses(first, own) - losses(state.model, own)).mean()))
    return np.array(found)
