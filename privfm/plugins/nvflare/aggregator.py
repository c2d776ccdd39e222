"""A rule, or a central plan, in the place of NVFlare's weighted mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from math import inf, isfinite, nan
from numbers import Real
from statistics import median
from threading import Lock
from typing import Any, final

import torch
from nvflare.apis.dxo import DataKind, from_shareable
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.app_common.abstract.fl_model import FLModel, ParamsType
from nvflare.app_common.aggregators.model_aggregator import ModelAggregator
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType
from nvflare.app_common.utils.fl_model_utils import FLModelUtils
from torch import Tensor

from privfm.checks import CohortTooSmall, InvalidArgument, RoundFailed, require
from privfm.contracts import Rule
from privfm.contracts.rules import ROOT
from privfm.defenses.aggregator import Aggregated, Aggregator
from privfm.defenses.mean import Mean
from privfm.defenses.privacy import DPPlan, EpsilonRecord
from privfm.plugins.changes import listed, spans
from privfm.plugins.nvflare.arrays import SentModel
from privfm.plugins.refusals import require_central, require_paid

CLIENT = "client_name"
"""Where NVFlare's server writes, over whatever the client claims, whose contribution it is."""


@final
@dataclass(frozen=True)
class RoundReport:
    """What became of a round; for the server's eyes: under a plan it depends on un-noised updates.

    Attributes:
      sites: whose contributions were aggregated, by name.
      left_out: why the others were not, by site.
      outcome: the rule's, in the order of `sites`.
    """

    sites: tuple[str, ...]
    left_out: dict[str, str]
    outcome: Aggregated


@final
class RobustAggregator(ModelAggregator):  # type: ignore[misc]  # NVFlare is not typed
    """Aggregates with any rule, or as a central plan says, whatever clients send.

    Rules see *changes*: what a client sends as `FULL` is subtracted from the model this server sent. Sites count the
    same; NVFlare's weights by the clients' own count of steps, and the recipe's `aggregation_weights`, are not used.
    Sites are taken in the order of their names and remembered by their names, so that arrival changes no bit.

    | a contribution                                     | what becomes of it                                  |
    |----------------------------------------------------|-----------------------------------------------------|
    | entry missing, foreign, of another shape or type   | left out, counted as bad                            |
    | NaN, infinity, a change float32 cannot hold        | left out, counted as bad                            |
    | neither weights nor differences                    | left out, counted as bad                            |
    | of another round                                   | left out; the site is late, not bad                 |
    | a site's second one                                | both are left out, the site counted as bad once     |
    | integers, what `exclude` names                     | not looked at: the model's stay                     |
    | `FULL` from some sites, `DIFF` from others         | each as it says                                     |

    Bad sites count against the rule's f. Too few good ones, or more bad ones than f, end the job: NVFlare stops a run
    whose aggregator raises. There is never a mean instead.

    With a plan each change is clipped to `plan.max_grad_norm`, and the sum over the fixed denominator `population` is
    noised; a bad or missing site is a zero row. Formal guarantee: that of `record()`, for the released models alone:
    metrics that clients report are outside of it. NVFlare draws sites by itself from those that are connected, so that
    no amplification is claimed: `sample_rate` is 1. With `source="seeded"`, whoever knows the job can take the noise
    off, and a job that starts again draws the same: simulations only.

    A job file keeps the arguments: rules and plans are rebuilt from their fields.

    Args:
      rule: any rule; not with a plan.
      plan: central, for whole clients.
      population: number of sites, public; with a plan.
      exclude: float entries of the model that stay as they are (BatchNorm's running means under a plan).
      seed: of what random rules and seeded noise draw.

    Raises:
      InvalidArgument: both or neither of rule and plan, or what NVFlare cannot keep for them.
    """

    def __init__(
        self,
        rule: Rule | None = None,
        plan: DPPlan | None = None,
        population: int | None = None,
        exclude: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        super().__init__()
        require((rule is None) != (plan is None), f"rule={rule}, plan={plan}: a plan takes the rule's place; give one")
        require((plan is None) == (population is None), f"plan={plan}, population={population}: give both or none")
        require(isinstance(exclude, Sequence) and not isinstance(exclude, str), f"exclude={exclude!r}: expected names")
        self.rule, self.plan, self.population, self.seed = rule, plan, population, seed  # NVFlare reads them back
        self.exclude = list(exclude)
        self.report: RoundReport | None = None
        self._memory = Aggregator(_acting(rule, plan, population), seed)
        self._lock = Lock()
        self._sent: SentModel | None = None
        self._round: int | None = None
        self.reset_stats()

    # What NVFlare calls

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Takes note of the model that is sent to clients."""
        super().handle_event(event_type, fl_ctx)
        if event_type == AppEventType.BEFORE_TRAIN_TASK:
            task = fl_ctx.get_prop(AppConstants.TRAIN_SHAREABLE)
            self.sent(from_shareable(task).data, task.get_header(AppConstants.CURRENT_ROUND))

    def sent(self, params: Mapping[str, Any], current_round: int | None = None) -> None:
        """Tells which model the clients of this round start from; for loops that fire no events.

        Raises:
          InvalidArgument: the model has entries that are no arrays, is not finite, or has nothing to aggregate.
        """
        with self._lock:
            if self._sent is None:  # NVFlare tells it once for every client
                self._sent, self._round = SentModel(params, self.exclude), current_round

    def accept(self, shareable: Shareable, fl_ctx: FLContext) -> bool:
        """As `accept_model`, for controllers that pass on what arrived as it is; the server's name for the site counts.

        Raises:
          InvalidArgument: nothing says whose it is.
        """
        self.fl_ctx = fl_ctx
        peer = fl_ctx.get_peer_context()
        name = peer.get_identity_name() if peer else ""
        try:
            kind = from_shareable(shareable).data_kind
            require(kind in {DataKind.WEIGHTS, DataKind.WEIGHT_DIFF}, "is neither weights nor differences")
            model = FLModelUtils.from_shareable(shareable, fl_ctx)
            model.current_round = shareable.get_cookie(AppConstants.CONTRIBUTION_ROUND, model.current_round)
        except Exception:  # whatever a client sends, the round goes on without it
            model = FLModel(metrics={})
        model.meta[CLIENT] = name
        if self._sent is None:
            self._say(f"contribution of {name} left out: no round is open")
            return False
        return self.accept_model(model)

    def accept_model(self, model: FLModel) -> bool:
        """Takes one contribution; whether it is fit to be aggregated.

        Raises:
          InvalidArgument: nothing says whose it is, or which model it started from.
        """
        site: Any = (model.meta or {}).get(CLIENT)
        require(isinstance(site, str) and bool(site), f"client_name={site!r}: the server must say whose model it is")
        with self._lock:
            sent = self._known()
            if self._is_late(model.current_round):  # an honest straggler's: what it sends in time still counts
                reason = f"is of round {model.current_round!r}, expected {self._round}"
                self._left_out |= {} if site in self._rows else {site: reason}
            elif site in self._rows:
                reason = self._left_out[site] = "sent a second contribution: neither counts"
                self._rows[site] = None
            else:
                self._left_out.pop(site, None)
                self._rows[site] = self._opened(sent, site, model)
                reason = self._left_out.get(site, "")
        if reason:
            self._say(f"contribution of {site} left out: {reason}")
        return not reason

    def aggregate_model(self) -> FLModel:
        """The change of the global model, in its own types, with `params_type=DIFF`: integers stay as they are.

        Metrics are the medians of what most of the sites report; under a plan there are none.

        Raises:
          CohortTooSmall: too few good contributions for the rule, or more bad ones than it tolerates.
          RoundFailed: no model was sent in this round, more sites than the population answered, the budget is spent,
            or the model's type cannot hold the change.
        """
        with self._lock:
            sent = self._known()
            self._check_plan()
            sites = [site for site in sorted(self._rows) if self.plan is None or self._rows[site] is not None]
            missing = torch.full((sent.layout.d,), torch.nan)  # a rule counts it as bad
            rows = [missing if self._rows[site] is None else self._rows[site] for site in sites]
            matrix = torch.stack(rows) if rows else torch.zeros(0, sent.layout.d)  # type: ignore[arg-type]
            try:
                outcome = self._memory(matrix, [site_id(site) for site in sites])
            except CohortTooSmall as error:
                reasons = [f"{site}: {reason}" for site, reason in sorted(self._left_out.items())]
                raise CohortTooSmall(f"{error}{listed(reasons)}") from error
            params, metrics = sent.params(outcome.update), self._medians()
            self.report, current_round = self._reported(sites, outcome), self._round
            self._clear()
        if self.plan is not None:
            found = self.record()
            self._say(f"epsilon={found.epsilon:.4g} at delta={found.delta:g} against {found.adversary} so far")
        return FLModel(ParamsType.DIFF, params, metrics=metrics, current_round=current_round)

    def reset_stats(self) -> None:
        """Forgets the round that is open; what rules remember, and the privacy spent, stay."""
        with self._lock:
            self._clear()

    def record(self) -> EpsilonRecord:
        """What the rounds so far are worth.

        Raises:
          InvalidArgument: there is no plan.
        """
        if self.plan is None:
            raise InvalidArgument("plan=None: nothing is accounted for; give the aggregator a DPPlan")
        return self.plan.record(self._memory.round)

    # One round

    def _clear(self) -> None:
        self._sent, self._round = None, None
        self._rows: dict[str, Tensor | None] = {}
        self._left_out: dict[str, str] = {}
        self._metrics: dict[str, dict[str, float]] = {}

    def _known(self) -> SentModel:
        if self._sent is None:
            raise RoundFailed(
                "no global model was seen in this round: the controller must fire BEFORE_TRAIN_TASK (FedAvg and "
                "ScatterAndGather do, for one aggregator of this class a job), or call `sent`"
            )
        return self._sent

    def _is_late(self, current_round: Any) -> bool:
        if self._round is None or current_round is None:
            return False
        return not (isinstance(current_round, int) and current_round == self._round)

    def _opened(self, sent: SentModel, site: str, model: FLModel) -> Tensor | None:
        try:
            kinds = {ParamsType.FULL, ParamsType.DIFF}
            require(model.params_type in kinds, f"params_type={model.params_type!r}: expected FULL or DIFF")
            row = sent.change(model.params, full=model.params_type == ParamsType.FULL)
        except InvalidArgument as reason:
            self._left_out[site] = str(reason)
            return None
        except Exception as error:  # sparse, quantised, on a device that is not here: the round goes on without it
            self._left_out[site] = f"cannot be read: {type(error).__name__}"
            return None
        if self.plan is None:
            self._metrics[site] = _numbers(model.metrics)
            return row
        clip = self.plan.clip(spans(sent.layout))
        return row if clip is None else clip.encode(row[None], {}, [])[0].rows[0]

    def _reported(self, sites: Sequence[str], outcome: Aggregated) -> RoundReport:
        used = set(outcome.ids)
        unheld = [site for site in sites if site_id(site) not in used and site not in self._left_out]
        left_out = self._left_out | dict.fromkeys(unheld, "is longer than float32 can hold")
        return RoundReport(tuple(site for site in sites if site_id(site) in used), left_out, outcome)

    def _say(self, message: str) -> None:  # outside of a run nobody listens for NVFlare's log events
        self.log_warning(self.fl_ctx, message, fire_event=self.fl_ctx is not None)

    def _check_plan(self) -> None:
        if self.plan is None or self.population is None:
            return
        if len(self._rows) > self.population:
            raise RoundFailed(f"population={self.population}: {len(self._rows)} sites answered; the plan is for fewer")
        require_paid(self.plan, self._memory.round)

    def _medians(self) -> dict[str, float] | None:
        """A mean would be whatever one site likes, and so would be a name that one site alone reports."""
        good = [found for site, found in self._metrics.items() if site not in self._left_out]
        names = sorted({name for found in good for name in found})
        reported = {name: [found[name] for found in good if name in found] for name in names}
        return {name: median(values) for name, values in reported.items() if 2 * len(values) > len(good)} or None


def site_id(site: str) -> int:
    """The number under which rules remember a site: the same in every round, run and order of arrival.

    >>> site_id("site-1") == site_id("site-1") != site_id("site-2")
    True
    """
    return int.from_bytes(sha256(site.encode()).digest()[:8], "big") >> 1  # int64 holds it


def _acting(rule: Rule | None, plan: DPPlan | None, population: int | None) -> Rule:
    """The rule that runs: the one given, or the plan's noisy sum."""
    if plan is None or population is None:
        require(isinstance(rule, Rule), f"rule={rule!r}: expected a rule of privfm.defenses")
        assert isinstance(rule, Rule)  # for the type checker
        rooted = [type(inner).__name__ for inner in rule.nested if ROOT in inner.init(1)]
        require(not rooted, f"{', '.join(rooted)} needs an update of the server's own: NVFlare's server trains nothing")
        return rule
    require_central(plan, population, Mean(), "PrivacyFilter takes place='local', the other places need privfm run")
    require(
        plan.sample_rate == 1,
        f"sample_rate={plan.sample_rate}: NVFlare draws sites itself, from those that are connected, so that no "
        "amplification by sampling holds; use 1.0",
    )
    most = plan.max_participations
    require(most is None, f"max_participations={most}: NVFlare's controller does not keep to it; leave it out")
    return plan.release(plan.max_grad_norm, population)


def _numbers(metrics: Any) -> dict[str, float]:
    if not isinstance(metrics, Mapping):
        return {}
    found = {name: _number(value) for name, value in metrics.items() if isinstance(name, str)}
    return {name: value for name, value in found.items() if isfinite(value)}


def _number(value: Any) -> float:
    try:
        return float(value) if isinstance(value, Real) else nan
    except OverflowError:  # a whole number too long for one
        return inf
