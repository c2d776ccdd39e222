"""A channel's stages as Flower messages: the client's side, around an app's own training."""

from __future__ import annotations

from collections.abc import Callable, Collection
from logging import WARNING
from typing import Final, final

import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp.typing import ClientAppCallable, Mod
from flwr.supercore import log

from privfm.checks import ClientFailed, InvalidArgument, at_least, require
from privfm.contracts import KEY_HOLDER, Channel, Encoded, Memory, Party, Rule, Transform
from privfm.defenses.mean import Mean
from privfm.defenses.privacy import DPPlan
from privfm.plugins.flower.exchange import ASKED, CARRIED, carried, opened
from privfm.plugins.flower.identities import Parties, load_parties
from privfm.plugins.flower.mods import (
    introduced,
    is_hello,
    is_training,
    join,
    number_of,
    reference_of,
    refused,
    trained,
)
from privfm.plugins.flower.records import Reference
from privfm.plugins.flower.terms import Terms
from privfm.randomness import Seeds

MEMORY: Final = "privfm.memory"
"""Name of the record in a node's own state that holds a party's secrets between the stages of one round."""

_ROUND: Final = "round"
_ENTRY: Final = "entry/"


def parties_of(context: Context) -> Parties:
    """What a node holds, from the files that its configuration names: `privfm-identity` and `privfm-pinned`.

    Raises:
      InvalidArgument: it names none.
    """
    paths = [context.node_config.get(name) for name in ("privfm-identity", "privfm-pinned")]
    if not all(isinstance(path, str) for path in paths):
        raise InvalidArgument("node_config has no privfm-identity and privfm-pinned: name both files, or give parties=")
    return load_parties(str(paths[0]), str(paths[1]))


def protect_mod(
    channel: Channel,
    *,
    plan: DPPlan | None = None,
    codec: Transform | None = None,
    rule: Rule | None = None,
    parties: Parties | Callable[[Context], Parties] = parties_of,
    seed: int = 0,
    exclude: Collection[str] = (),
    arrayrecord_key: str = "arrays",
) -> Mod:
    """Plays this node's party of a channel. The app's own training is called once a round, when its row is due.

    What leaves the node are the channel's messages, and nothing else: no metrics, no count of examples. A node whose
    configuration says `privfm-role = "key-holder"` plays the key holder and is never asked to train; all others are
    the client that `partition-id` numbers.

    Between the messages of a round the party's secrets lie in `context.state`, which Flower keeps on the node. They are
    erased with the last stage, with the first of another round, and when the party raises: its round is over then.

    | event                                           | result                                                    |
    |-------------------------------------------------|-----------------------------------------------------------|
    | a training request without the channel          | an error: nothing is sent in the clear                    |
    | training fails, with a plan                     | a row of zeros: who fails may depend on data              |
    | training fails, without                         | an error: a drop-out                                      |
    | `max_participations` rows were given away       | an error: counted on the node, whatever the server says   |
    | a stage out of order, a changed message         | an error, and the round is over for this node             |

    Args:
      channel: the same as the strategy's.
      plan: the same; its clip, and where the clients add it its noise, are applied here.
      codec: the same.
      rule: the same, where the channel's key holder runs it (`CKKSGram`).
      parties: this node's identity and those it has pinned, or how to find them from its context.
      seed: of random rounding.
      exclude: float entries that are not learned, as the strategy has it.
      arrayrecord_key: of the model in messages, as the strategy has it.

    Raises:
      InvalidArgument: parts do not fit together.
    """
    terms = Terms(rule or Mean(), plan, channel, codec)
    require(terms.protocol is not None, f"channel={channel}: it takes no messages of its own; use clip_mod, noise_mod")
    at_least("seed", seed, 0)

    def model(message: Message) -> Reference:
        return reference_of(message, arrayrecord_key, exclude)

    def mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        if not is_training(message):
            return call_next(message, context)
        try:
            own = parties(context) if callable(parties) else parties
            if is_hello(message):
                return introduced(message, context, own)
            played = _Played(terms, message, context, call_next, seeds=Seeds(seed), model=model)
            return Message(RecordDict({CARRIED: carried(played.answer(own))}), reply_to=message)
        except Exception as error:  # a party that raises has ended its round
            context.state.pop(MEMORY, None)
            return refused(error, message)

    return mod


@final
class _Played:
    """One stage of one party."""

    def __init__(
        self,
        terms: Terms,
        message: Message,
        context: Context,
        call_next: ClientAppCallable,
        *,
        seeds: Seeds,
        model: Callable[[Message], Reference],
    ) -> None:
        self._terms, self._seeds, self._model = terms, seeds, model
        self._message, self._context, self._call_next = message, context, call_next
        asked = message.content.config_records.get(ASKED)
        number = number_of(context)
        if asked is None or number is None:
            raise InvalidArgument("a request without a stage, or to a node without partition-id: nothing is sent")
        now = asked["round"]
        if not isinstance(now, int):
            raise InvalidArgument(f"round={now!r}: expected a whole number")
        self._stage, self._now, self._number = str(asked["stage"]), now, number

    def answer(self, parties: Parties) -> bytes:
        """The reply; the party's memory lies in the node's state afterwards, or is gone with the last stage."""
        channel = self._terms.arm().wire
        stages = channel.key_holder_stages if self._number == KEY_HOLDER else channel.client_stages
        memory = {} if stages and self._stage == stages[0] else _recalled(self._context, self._now)
        party = Party(self._number, self._now, parties.own, parties.public)
        memory, reply = channel.answer(party, self._stage, memory, opened(self._message.content), self._update)
        self._context.state.pop(MEMORY, None)
        if self._stage != stages[-1]:
            entries = {_ENTRY + name: value for name, value in memory.items()}
            self._context.state[MEMORY] = ConfigRecord({_ROUND: self._now, **entries})
        return reply

    def _update(self) -> Encoded:
        """The client's one row of the round."""
        if self._number == KEY_HOLDER:
            raise InvalidArgument("a key holder has no update")
        plan, arm = self._terms.plan, self._terms.arm()
        reference = self._model(self._message)
        if plan is not None:
            join(self._context, plan.max_participations)
        try:
            rows = self._trained(reference)
        except Exception as error:  # an app's own training may raise anything
            if plan is None:
                raise
            log(WARNING, "privfm: training failed (%s); a row of zeros is sent", type(error).__name__)
            rows = torch.zeros(1, reference.d)
        rows = arm.steps(reference.layers).encode(rows, {}, [])[0].rows
        if plan is not None and plan.place == "local":
            rows = plan.own_noise(rows, [torch.Generator()])  # secure noise leaves it alone
        generator = self._seeds.generator("codecs", self._now, self._number)
        return arm.codecs.encode(rows, {}, [generator])[0]

    def _trained(self, reference: Reference) -> torch.Tensor:
        message = self._message
        kept = {name: each for name, each in message.content.items() if name not in {ASKED, CARRIED}}
        message.content = RecordDict(kept)
        reply = self._call_next(message, self._context)
        if reply.has_error():
            raise ClientFailed(f"the app answered with an error: {reply.error.reason}")
        return trained(reply.content, reference)[1]


def _recalled(context: Context, now: int) -> Memory:
    """What the party remembers of this round; nothing of any other."""
    record = context.state.config_records.get(MEMORY)
    if record is None or record.get(_ROUND) != now:
        return {}
    return {
        name.removeprefix(_ENTRY): value
        for name, value in record.items()
        if name.startswith(_ENTRY) and isinstance(value, bytes)
    }
