"""What leaves an NVFlare client: a clipped, noised, packed update, or nothing."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from threading import Lock
from typing import Any, final

import torch
from nvflare.apis.dxo import DXO, DataKind, MetaKey, from_shareable
from nvflare.apis.dxo_filter import DXOFilter
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import ReservedHeaderKey, Shareable, make_reply
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType
from torch import Generator, Tensor

from privfm.checks import InvalidArgument, RoundFailed, positive, require
from privfm.contracts import Encoded, Transform
from privfm.defenses.privacy import DPPlan, EpsilonRecord, Flat
from privfm.defenses.privacy.clipping import ClientClip
from privfm.plugins.changes import spans
from privfm.plugins.nvflare.arrays import SentModel, as_tensors, like
from privfm.plugins.refusals import require_codec, require_local, require_paid
from privfm.vectors import Layout

PACKED = "privfm"
"""What `MetaKey.PROCESSED_ALGORITHM` says of an update that a codec has packed."""
ROW, SIDE = "row", "side/"
"""Entries of a packed update: the encoded row `(w,)`, and what the codec needs beside it."""
ROUND_HEADERS = (AppConstants.START_ROUND, AppConstants.CURRENT_ROUND, AppConstants.NUM_ROUNDS)
FAILURES = frozenset(v for k, v in vars(ReturnCode).items() if k.isupper() and v != ReturnCode.OK)


class ClosedFilter(DXOFilter):  # type: ignore[misc]  # NVFlare is not typed
    """Template: one DXO of differences goes through `process_dxo`, or an empty reply with an error code goes instead.

    `DXOFilter.process` lets everything else pass as it is: a result that is no DXO, one that failed, another data kind,
    an empty one, and whatever `process_dxo` returns nothing for.
    """

    def __init__(self) -> None:
        kinds = [DataKind.WEIGHT_DIFF]
        super().__init__(supported_data_kinds=kinds, data_kinds_to_filter=kinds)
        self._lock = Lock()

    @final
    def process(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        """The filtered result, in a message of its own; or an empty one with `TASK_RESULT_FILTER_ERROR`.

        A result that had failed already keeps its return code and loses its content.
        """
        try:
            with self._lock:
                return self._passed(shareable, fl_ctx)
        except (InvalidArgument, RoundFailed) as error:
            reason = str(error)
        except Exception as error:  # whatever went wrong, the result must not leave; its text may hold values
            reason = type(error).__name__
        self.log_error(fl_ctx, f"result withheld: {reason}", fire_event=False)
        return make_reply(ReturnCode.TASK_RESULT_FILTER_ERROR)

    def _passed(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        code = shareable.get_return_code()
        if code != ReturnCode.OK:
            return make_reply(code if code in FAILURES else ReturnCode.EXECUTION_RESULT_ERROR)
        foreign = sorted(set(map(str, shareable)) - {ReservedHeaderKey.HEADERS, "DXO"})
        require(not foreign, f"it has entries beside its DXO: {', '.join(foreign)}")
        try:
            dxo = from_shareable(shareable)
        except ValueError as error:
            raise InvalidArgument("it is no DXO") from error
        require(
            dxo.data_kind == DataKind.WEIGHT_DIFF,
            f"it is {dxo.data_kind}, expected WEIGHT_DIFF: set params_transfer_type=TransferType.DIFF, and the filter "
            "to training tasks only",
        )
        require(bool(dxo.data), "it is empty")
        filtered = self.process_dxo(dxo, shareable, fl_ctx)
        filtered.add_filter_history(dxo.get_filter_history())
        filtered.add_filter_history(type(self).__name__)
        reply = Shareable()
        for name, value in self.headers(shareable).items():
            reply.set_header(name, value)
        return filtered.update_shareable(reply)

    @abstractmethod
    def process_dxo(self, dxo: DXO, shareable: Shareable, fl_ctx: FLContext) -> DXO:
        """What passes of it; raises if nothing may."""

    @abstractmethod
    def headers(self, shareable: Shareable) -> dict[str, Any]:
        """Which headers pass."""


@final
class PrivacyFilter(ClosedFilter):
    """A client's output filter: clips the whole update, adds the client's own noise, packs it. Fails closed.

    Use it with `recipe.add_client_output_filter(..., tasks=["train"])` and `params_transfer_type=TransferType.DIFF`:
    weights cannot be clipped, differences can.

    | a result                                                        | what leaves the site                      |
    |-----------------------------------------------------------------|-------------------------------------------|
    | differences of floats, all finite                               | them, clipped and noised                  |
    | failed                                                          | its return code, nothing else             |
    | no DXO, weights, metrics, a collection, empty, filtered before  | an error code, nothing else               |
    | an entry of integers that `exclude` does not name, no array     | an error code, nothing else               |
    | NaN or infinity                                                 | an error code, nothing else               |
    | one too many for `max_participations` or `budget`               | an error code, nothing else               |

    Metrics, the number of steps and all else that travels beside an update stay on the site, as do all headers but
    the rounds': they are computed from the same data and nobody noised them. That a site fails is seen by the server;
    the guarantee is about what it sends when it does not.

    Formal guarantee under a plan: that of `record()`, for one client's whole data, against the server and whoever it
    tells, over the updates of this job. Noise is drawn from the operating system: the server hands out the job and
    would know a seed.

    Args:
      max_grad_norm: L2 bound of the update over all entries; without a plan, which has its own.
      plan: for whole clients, with `place="local"` and `source="secure"`.
      codec: how it is packed; the server unpacks with `UpdateDecoder`. Random rounding draws from the system.
      exclude: entries that stay on the site: counters, BatchNorm's running means.

    Raises:
      InvalidArgument: not exactly one of bound and plan, or a plan or codec that is not for this place.
    """

    def __init__(
        self,
        max_grad_norm: float | None = None,
        plan: DPPlan | None = None,
        codec: Transform | None = None,
        exclude: Sequence[str] = (),
    ) -> None:
        super().__init__()
        require(
            (max_grad_norm is None) != (plan is None),
            f"max_grad_norm={max_grad_norm}, plan={plan}: a plan has its own bound; give one of them",
        )
        if max_grad_norm is not None:
            positive("max_grad_norm", max_grad_norm)
        if plan is not None:
            require_local(plan, "RobustAggregator for place='central'")
            require(plan.noise_multiplier > 0, "noise_multiplier=0: a plan without noise protects nobody; use a bound")
        if codec is not None:
            require_codec(codec)
        require(isinstance(exclude, Sequence) and not isinstance(exclude, str), f"exclude={exclude!r}: expected names")
        self.max_grad_norm, self.plan, self.codec, self.exclude = max_grad_norm, plan, codec, list(exclude)
        self.released = 0

    def process_dxo(self, dxo: DXO, shareable: Shareable, fl_ctx: FLContext) -> DXO:
        """Clips, noises and packs differences.

        Raises:
          InvalidArgument: they cannot be clipped, or a coordinate lies beyond the codec's bound.
          RoundFailed: the plan allows no further release.
        """
        earlier = dxo.get_meta_prop(MetaKey.PROCESSED_ALGORITHM)
        require(earlier is None, "an earlier filter has packed or encrypted it: put this filter first")
        tensors = as_tensors(dxo.data)
        layout = Layout.of(tensors, self.exclude)
        row = layout.flatten(tensors)[None].cpu()
        require(bool(row.isfinite().all()), "it holds values that are not finite")
        if self.plan is None:
            bound: float = self.max_grad_norm or 0.0
            row = ClientClip(Flat(), bound, spans(layout)).encode(row, {}, [])[0].rows
        else:
            row = self._noised(self.plan, row, layout, fl_ctx)
        meta: dict[str, Any] = {}
        if self.codec is None:
            named = layout.unflatten(row[0])
            return DXO(DataKind.WEIGHT_DIFF, {name: like(named[name], dxo.data[name]) for name in layout.names}, meta)
        meta[MetaKey.PROCESSED_ALGORITHM] = PACKED
        return DXO(DataKind.WEIGHT_DIFF, _packed(self.codec, row), meta)

    def headers(self, shareable: Shareable) -> dict[str, Any]:
        """Which round it is of."""
        found = {name: shareable.get_header(name) for name in ROUND_HEADERS}
        return {name: value for name, value in found.items() if isinstance(value, int)}

    def record(self) -> EpsilonRecord:
        """What the updates that left so far are worth.

        Raises:
          InvalidArgument: there is no plan.
        """
        if self.plan is None:
            raise InvalidArgument("plan=None: clipping alone is no privacy; give the filter a DPPlan")
        return self.plan.record(self.released)

    def _noised(self, plan: DPPlan, row: Tensor, layout: Layout, fl_ctx: FLContext) -> Tensor:
        after = self.released + 1
        if plan.max_participations is not None and after > plan.max_participations:
            raise RoundFailed(f"max_participations={plan.max_participations}: this site has given as much")
        require_paid(plan, self.released)
        clip = plan.clip(spans(layout))
        assert clip is not None  # the plan is for whole clients
        self.released = after  # before the noise is drawn: what fails from here on is paid for all the same
        noisy = plan.own_noise(clip.encode(row, {}, [])[0].rows, [Generator()])  # secure noise asks no generator
        found = self.record()
        self.log_info(fl_ctx, f"update {after}: epsilon={found.epsilon:.4g} at delta={found.delta:g}", fire_event=False)
        return noisy


@final
class UpdateDecoder(ClosedFilter):
    """The server's input filter for what `PrivacyFilter` packs with the same codec. Fails closed.

    Use it with `recipe.add_server_input_filter(..., tasks=["train"])`. Names and shapes are those of the model the
    server itself has sent; nothing a client says about them is believed. Decoding adds up to `codec.norm_bound` to an
    update's length; an aggregator with a plan clips again.

    Args:
      codec: the clients'.
      exclude: the clients'.
    """

    def __init__(self, codec: Transform, exclude: Sequence[str] = ()) -> None:
        super().__init__()
        require_codec(codec)
        self.codec, self.exclude = codec, list(exclude)
        self._sent: SentModel | None = None

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Takes note of the model that is sent to clients."""
        super().handle_event(event_type, fl_ctx)
        if event_type == AppEventType.BEFORE_TRAIN_TASK:
            self.sent(from_shareable(fl_ctx.get_prop(AppConstants.TRAIN_SHAREABLE)).data)

    def sent(self, params: dict[str, Any]) -> None:
        """Tells which model the clients of this round start from; for loops that fire no events."""
        with self._lock:
            self._sent = SentModel(params, self.exclude)

    def process_dxo(self, dxo: DXO, shareable: Shareable, fl_ctx: FLContext) -> DXO:
        """Unpacks differences.

        Raises:
          InvalidArgument: it is not packed by this codec for this model.
        """
        sent = self._sent
        if sent is None:
            raise InvalidArgument("no global model was seen: the controller must fire BEFORE_TRAIN_TASK")
        require(dxo.get_meta_prop(MetaKey.PROCESSED_ALGORITHM) == PACKED, "it was not packed by PrivacyFilter")
        packed = as_tensors(dxo.data)
        width = self.codec.width(sent.layout.d)
        row = packed.pop(ROW, torch.zeros(0))
        require(tuple(row.shape) == (width,), f"its row has shape {tuple(row.shape)}, expected ({width},)")
        foreign = sorted(name for name in packed if not name.startswith(SIDE))
        require(not foreign, f"it has entries beside its row: {', '.join(foreign)}")
        side = {name.removeprefix(SIDE): value[None] for name, value in packed.items()}
        change = self.codec.decode(Encoded(row[None].double(), side), sent.layout.d)[0].float()
        require(tuple(change.shape) == (sent.layout.d,), "it does not decode to an update of this model")
        return DXO(DataKind.WEIGHT_DIFF, sent.params(change))

    def headers(self, shareable: Shareable) -> dict[str, Any]:
        """All: NVFlare's server needs its own."""
        return dict(shareable.get(ReservedHeaderKey.HEADERS) or {})


def _packed(codec: Transform, row: Tensor) -> dict[str, Any]:
    """The encoded row in as few bytes a number as it takes, and what the codec sends beside it."""
    generator = Generator()
    generator.seed()  # from the operating system
    encoded, _ = codec.encode(row, {}, [generator])
    require(bool(encoded.rows.isfinite().all()), f"a coordinate lies beyond what {codec!r} holds: raise its bound")
    largest = codec.largest_whole if codec.integers else None
    kinds = (torch.int8, torch.int16, torch.int32, torch.int64)
    fits = [kind for kind in kinds if largest is not None and largest <= torch.iinfo(kind).max]
    rows = encoded.rows[0].to(fits[0] if fits else torch.float32)
    return {ROW: rows.numpy()} | {f"{SIDE}{name}": value[0].numpy() for name, value in encoded.side.items()}
