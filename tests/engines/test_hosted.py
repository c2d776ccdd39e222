"""The parties of one process: who acts together, when they train, and what becomes of those that fail."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
from hypothesis import given
from hypothesis import strategies as st

from privfm.checks import ClientFailed, InvalidArgument
from privfm.contracts import KEY_HOLDER, Cast, Channel, Encoded, Exchange, Intake, Memory, Party, Update, View
from privfm.defenses import ClientMomentum
from privfm.defenses.channels.identities import new_identity
from privfm.engines.hosted import Hosted, batches

Make = Callable[..., Any]


@final
@dataclass(frozen=True)
class TwoStages(Channel):
    """Says hello, then its row; a key holder only says hello, unless it is asked for more."""

    raises: frozenset[int] = frozenset()
    client_stages = ("hello", "update")
    key_holder_stages = ("hello", "update")
    said: list[tuple[str, int]] = field(default_factory=list)

    @property
    def learns(self) -> Mapping[str, str]:
        return {}

    def reply(self, party: Party, stage: str, memory: Memory, request: bytes, update: Update) -> tuple[Memory, bytes]:
        self.said.append((stage, party.number))
        if party.number in self.raises:
            raise ValueError("why")
        if stage == "hello":
            return {**memory, "secret": b"%d" % party.number}, request
        return memory, b"%d" % int(update().rows[0, 0])

    def collect(self, cohort: Sequence[int], intake: Intake, exchange: Exchange) -> View:
        raise NotImplementedError


@final
class Trainer:
    """Gives client i the row (i); those that are `lost` give none."""

    def __init__(self, lost: Sequence[int] = ()) -> None:
        self.lost, self.batches = lost, list[list[int]]()

    def __call__(self, asked: Sequence[int]) -> dict[int, Encoded]:
        self.batches.append(list(asked))
        return {i: Encoded(torch.full((1, 2), float(i)), {}) for i in asked if i not in self.lost}


def hosted(channel: Channel, trainer: Callable[..., Any], cast: Cast, size: int = 2) -> Hosted:
    identity = new_identity()
    return Hosted(channel, trainer, cast, lambda number: Party(number, cast.round, identity, lambda _: b""), size)


CAST = Cast(0, honest=(4, 2, 0, 5), malicious=(3, 1))


def test_a_batch_is_trained_when_its_first_client_is_asked_for_its_row() -> None:
    channel, trainer = TwoStages(), Trainer()
    here = hosted(channel, trainer, CAST)
    asked = dict.fromkeys([*range(6), KEY_HOLDER], b"hi")
    order = [4, 2, 0, 5, 3, 1]
    assert list(here.replies("hello", asked)) == [(party, b"hi") for party in (*order, KEY_HOLDER)]
    assert trainer.batches == []
    replies = here.replies("update", dict.fromkeys(range(6), b""))
    assert next(replies) == (4, b"4")
    assert trainer.batches == [[4, 2]]
    assert list(replies) == [(party, b"%d" % party) for party in order[1:]]
    assert trainer.batches == [[4, 2], [0, 5], [3, 1]]  # attackers act together, whatever the size
    assert {party: memory["secret"] for party, memory in here.memories.items() if party >= 0} == {
        party: b"%d" % party for party in range(6)
    }


def test_who_has_no_row_is_lost_and_not_asked_again() -> None:
    channel, trainer = TwoStages(), Trainer(lost=[2, 3])
    here = hosted(channel, trainer, CAST)
    list(here.replies("hello", dict.fromkeys(range(6), b"")))
    assert [party for party, _ in here.replies("update", dict.fromkeys(range(6), b""))] == [4, 0, 5, 1]
    assert here.lost == {2, 3}
    channel.said.clear()
    list(here.replies("update", dict.fromkeys((2, 3), b"")))
    assert channel.said == []
    assert trainer.batches == [[4, 2], [0, 5], [3, 1]]


def test_what_a_party_raises_stands_in_its_replys_place() -> None:
    here = hosted(TwoStages(raises=frozenset({2})), Trainer(), CAST)
    replies = dict(here.replies("hello", dict.fromkeys(range(6), b"hi")))
    assert isinstance(replies.pop(2), ValueError)
    assert replies == dict.fromkeys((0, 1, 3, 4, 5), b"hi")
    assert here.lost == set()


def test_training_that_raises_costs_those_of_its_batch_and_nobody_else() -> None:
    def trainer(asked: Sequence[int]) -> dict[int, Encoded]:
        if 2 in asked:
            raise ClientFailed("client 2")
        return Trainer()(asked)

    here = hosted(TwoStages(), trainer, CAST)
    list(here.replies("hello", dict.fromkeys(range(6), b"")))
    replies = dict(here.replies("update", dict.fromkeys(range(6), b"")))
    assert {party for party, reply in replies.items() if isinstance(reply, ClientFailed)} == {4, 2}


def test_a_key_holder_has_no_update() -> None:
    here = hosted(TwoStages(), Trainer(), CAST)
    ((party, reply),) = here.replies("update", {KEY_HOLDER: b""})
    assert party == KEY_HOLDER and isinstance(reply, InvalidArgument) and "no update" in str(reply)


ids = st.sets(st.integers(0, 20), max_size=15)


@given(ids, ids, ids, st.integers(1, 6), st.booleans(), st.data())
def test_everybody_who_is_here_acts_once_and_in_the_casts_order(
    honest: set[int], malicious: set[int], here: set[int], size: int, holder: bool, data: st.DataObject
) -> None:
    order = data.draw(st.permutations(sorted(honest - malicious)))
    cast = Cast(0, order, sorted(malicious))
    present = here | ({KEY_HOLDER} if holder else set())
    found = list(batches(cast, present, size))
    expected = [party for party in (*order, *sorted(malicious), KEY_HOLDER) if party in present]
    assert [party for batch in found for party in batch] == expected
    assert all(batch for batch in found)
    of_attackers = [batch for batch in found if set(batch) & malicious]
    assert len(of_attackers) <= 1 and all(set(batch) <= malicious for batch in of_attackers)
    assert [KEY_HOLDER] in found or not holder
    honest_batches = [batch for batch in found if set(batch) & set(order)]
    assert all(len(batch) == size for batch in honest_batches[:-1])


def test_a_batch_of_which_everybody_fails_costs_its_clients_alone(
    local: Make, cluster: Make, played: Make, sha: Make
) -> None:
    setting = {"fails": frozenset({0, 3, 7}), "transforms": (ClientMomentum(0.9),)}
    here = played(local(**setting))
    assert sum(record.failed for record in played.records) > 0
    assert sha(played(cluster(2, **setting).federation)) == sha(here)
