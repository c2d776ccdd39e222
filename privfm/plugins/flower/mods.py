"""What clients of an existing Flower app do around their own training: clip, add noise, encode.

A mod is a function `(message, context, call_next) -> message`; Flower calls the first of a list first, so that the
last one is the nearest to training: `@app.train(mods=[compress_mod(codec), clip_mod(1.0)])` clips, then encodes. A mod
that cannot do its work answers with an error, and the client is a drop-out: nothing leaves it unprotected.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from logging import WARNING
from typing import Final

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MessageType, RecordDict
from flwr.clientapp.typing import ClientAppCallable, Mod
from flwr.common.constant import ErrorCode
from flwr.supercore import log
from torch import Tensor

from privfm.checks import ClientFailed, InvalidArgument, at_least, require
from privfm.contracts import KEY_HOLDER, Party, Transform
from privfm.defenses.privacy import DPPlan
from privfm.defenses.transforms import Clip
from privfm.plugins.flower.exchange import ASKED, CARRIED, WHO, carried, hello, opened
from privfm.plugins.flower.identities import Parties
from privfm.plugins.flower.records import BrokenReply, Reference, entry
from privfm.plugins.flower.replies import ENCODED, SPOKEN, encoded_record
from privfm.plugins.refusals import require_codec, require_local
from privfm.randomness import Seeds

JOINED: Final = "privfm.joined"
"""Name of the record in a node's own state that counts the updates it has given away."""

Step = Callable[[Tensor, Context, Reference], Tensor]
"""What a mod does to an update `(1, d)`."""

Work = Callable[[RecordDict, Reference, int, Context], RecordDict]
"""What a mod makes of the app's own reply in a round."""


def clip_mod(max_grad_norm: float, exclude: Collection[str] = (), arrayrecord_key: str = "arrays") -> Mod:
    """Shortens the client's update to L2 norm `max_grad_norm` where it is longer; the model it sends is plain again.

    | update          | result                                                            |
    |-----------------|-------------------------------------------------------------------|
    | within          | unchanged, but for the rounding of `model + (model' - model)`     |
    | zero            | zero                                                              |
    | not finite      | an error: the client is a drop-out                                |

    Integer entries are sent as they are. By itself it is no guarantee: whoever does not run it does not clip, so that a
    strategy with a plan clips again.

    Args:
      max_grad_norm: L2 bound on the difference to the model that was received.
      exclude: float entries that are not learned, as the strategy has it.
      arrayrecord_key: of the model in messages, as the strategy has it.

    Raises:
      InvalidArgument: the bound is not positive.
    """
    clip = Clip(max_grad_norm)

    def clipped(rows: Tensor, context: Context, reference: Reference) -> Tensor:
        return clip.encode(rows, {}, [])[0].rows

    return _mod(_stepped(clipped), arrayrecord_key, exclude)


def noise_mod(plan: DPPlan, exclude: Collection[str] = (), arrayrecord_key: str = "arrays") -> Mod:
    """Clips the client's update and adds the plan's noise on the client: the server never sees the update itself.

    Formal guarantee: the plan's, against the server, for everything the client answers to training; it covers the
    learned entries. Integer entries are replaced by the model's own, and metrics are dropped, because they would tell
    about the data without noise; the count of examples stays out as well. Answers to evaluation pass as they are: no
    guarantee covers what they say of private examples.

    | event                                            | result                                                   |
    |--------------------------------------------------|----------------------------------------------------------|
    | training fails, or its result cannot be used     | noise alone: who fails may depend on data                |
    | `max_participations` updates were given away     | an error: counted on the node, whatever the server says  |

    Args:
      plan: `unit="client"`, `place="local"`, `source="secure"`.
      exclude: float entries that are not learned, as the strategy has it.
      arrayrecord_key: of the model in messages, as the strategy has it.

    Raises:
      InvalidArgument: another plan.
    """
    require_local(plan, "give the plan to the strategy")

    def mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        if is_hello(message):
            return introduced(message, context)
        if not is_training(message):
            return call_next(message, context)
        reference = reference_of(message, arrayrecord_key, exclude)
        clip = plan.clip(reference.layers)
        try:
            join(context, plan.max_participations)  # before training, on which nothing that is told may depend
            rows = trained_or_zeros(message, context, call_next, reference)
            rows = rows if clip is None else clip.encode(rows, {}, [])[0].rows
            noisy = plan.own_noise(rows, [torch.Generator()])  # secure noise leaves it alone
            return Message(RecordDict({arrayrecord_key: reference.moved(noisy[0])}), reply_to=message)
        except (BrokenReply, InvalidArgument) as error:
            return refused(error, message)

    return mod


def compress_mod(
    codec: Transform, seed: int = 0, exclude: Collection[str] = (), arrayrecord_key: str = "arrays"
) -> Mod:
    """Encodes the client's update, last of all; a strategy with the same codec decodes it, any other leaves it out.

    Whole numbers travel in the narrowest integer type that holds the codec's largest.

    Args:
      codec: a wire format such as `FixedPoint`, without memory.
      seed: of random rounding; a client's draws differ from round to round and from other clients'.
      exclude: float entries that are not learned, as the strategy has it.
      arrayrecord_key: of the model in messages, as the strategy has it.

    Raises:
      InvalidArgument: a client step, or a codec that remembers or adds noise.
    """
    require_codec(codec)
    at_least("seed", seed, 0)

    def compressed(reply: RecordDict, reference: Reference, now: int, context: Context) -> RecordDict:
        _, rows = trained(reply, reference)
        number = number_of(context)
        generator = Seeds(seed).generator("codecs", now, context.node_id if number is None else number)
        encoded, _ = codec.encode(rows, {}, [generator])
        require(bool(encoded.rows.isfinite().all()), f"{codec} cannot encode the update")
        content = RecordDict({name: each for name, each in reply.items() if not isinstance(each, ArrayRecord)})
        content[ENCODED] = ArrayRecord(encoded_record(encoded, codec.largest_whole))
        content[SPOKEN] = ConfigRecord({"codec": repr(codec)})
        return content

    return _mod(compressed, arrayrecord_key, exclude)


# What mods share


def is_hello(message: Message) -> bool:
    """Whether the strategy asks who this node is."""
    return message.has_content() and entry(message.content, ASKED, "stage") == WHO


def is_training(message: Message) -> bool:
    """Whether a message asks for training; mods of a whole app meet evaluation, too."""
    return message.metadata.message_type.partition(".")[0] == MessageType.TRAIN


def introduced(message: Message, context: Context, parties: Parties | None = None) -> Message:
    """The answer to it: the number `partition-id` of the node's configuration, proved where there is an identity."""
    number = number_of(context)
    if number is None:
        missing = "node_config has no partition-id (or privfm-role='key-holder'): start the node with one"
        return refused(InvalidArgument(missing), message)
    content = RecordDict({ASKED: ConfigRecord({"party": number})})
    if parties is not None:
        now = int(message.content.config_records[ASKED]["round"])  # type: ignore[arg-type]  # a number, or an error
        party = Party(number, now, parties.own, parties.public)
        content[CARRIED] = carried(hello(party, opened(message.content)))
    return Message(content, reply_to=message)


def number_of(context: Context) -> int | None:
    """Which client this node is, by its configuration; None: it does not say."""
    if context.node_config.get("privfm-role") == "key-holder":
        return KEY_HOLDER
    number = context.node_config.get("partition-id")
    return number if isinstance(number, int) and not isinstance(number, bool) and number >= 0 else None


def round_of(message: Message) -> int:
    """The round as the strategy counts it; 0 where a strategy does not say."""
    found = [record["server-round"] for record in message.content.config_records.values() if "server-round" in record]
    return found[0] if found and isinstance(found[0], int) else 0


def reference_of(message: Message, arrayrecord_key: str, exclude: Collection[str]) -> Reference:
    """The model that the client is sent.

    Raises:
      InvalidArgument: there is none under this key.
    """
    arrays = message.content.array_records.get(arrayrecord_key)
    if arrays is None:
        raise InvalidArgument(f"arrayrecord_key={arrayrecord_key!r}: the message has no such record")
    return Reference(arrays, exclude)


def trained(reply: RecordDict, reference: Reference) -> tuple[str, Tensor]:
    """The name of the record with the client's model, and its update `(1, d)`.

    Raises:
      BrokenReply: it is not one model of the reference's names, shapes and types.
    """
    records = reply.array_records
    if len(records) != 1:
        raise BrokenReply("records", f"the app replies with {len(records)} records of arrays, expected one")
    name, arrays = next(iter(records.items()))
    return name, reference.update_of(arrays)[None]


def trained_or_zeros(message: Message, context: Context, call_next: ClientAppCallable, reference: Reference) -> Tensor:
    """A client's update `(1, d)`; zero where its training fails, for plans under which a failure must not show."""
    try:
        reply = call_next(message, context)
        if reply.has_error():
            raise ClientFailed(f"the app answered with an error: {reply.error.reason}")
        return trained(reply.content, reference)[1]
    except Exception as error:  # an app's own training may raise anything
        log(WARNING, "privfm: training failed (%s); an update of zero takes its place", type(error).__name__)
        return torch.zeros(1, reference.d)


def refused(error: Exception, message: Message) -> Message:
    """An error reply. It names the kind of error only: what it says may depend on the client's data."""
    log(WARNING, "privfm: this client does not answer: %s", error)
    return Message(Error(ErrorCode.MOD_FAILED_PRECONDITION, type(error).__name__), reply_to=message)


def join(context: Context, most: int | None) -> None:
    """Counts one more update that this node gives away.

    Raises:
      InvalidArgument: it has given as many as its plan allows.
    """
    record = context.state.config_records.get(JOINED)
    count = 0 if record is None else record["count"]
    if not isinstance(count, int) or (most is not None and count >= most):
        raise InvalidArgument(f"max_participations={most}: this client has taken part {count!r} times")
    context.state[JOINED] = ConfigRecord({"count": count + 1})


def _mod(work: Work, arrayrecord_key: str, exclude: Collection[str]) -> Mod:
    """A mod that sends something else in place of the app's reply; what cannot be used becomes an error."""

    def mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        if is_hello(message):
            return introduced(message, context)
        if not is_training(message):
            return call_next(message, context)
        reference, now = reference_of(message, arrayrecord_key, exclude), round_of(message)
        reply = call_next(message, context)
        if reply.has_error():
            return reply
        try:
            return Message(work(reply.content, reference, now, context), reply_to=message)
        except (BrokenReply, InvalidArgument) as error:
            return refused(error, message)

    return mod


def _stepped(step: Step) -> Work:
    """Changes the update, and sends a plain model.

    Args:
      step: what it does.
    """

    def stepped(reply: RecordDict, reference: Reference, now: int, context: Context) -> RecordDict:
        name, rows = trained(reply, reference)
        model = reference.moved(step(rows, context, reference)[0])
        learned = {entry: model[entry] for entry in reference.layout.names}
        own = {entry: learned.get(entry, array) for entry, array in reply.array_records[name].items()}
        return RecordDict({**reply, name: ArrayRecord(own)})

    return stepped
