"""A host's half: whom it answers, what it refuses, what it keeps to itself, and what it remembers for how long."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import inf, nan
from pathlib import Path
from typing import Any, final

import pytest
import torch

from privfm.attacks import SignFlip
from privfm.checks import ClientFailed, Corrupt, InvalidArgument
from privfm.contracts import KEY_HOLDER, Encoded
from privfm.defenses import ClientMomentum, DPPlan, FixedPoint
from privfm.defenses.channels import CKKS, PairwiseMasks, Plaintext
from privfm.defenses.privacy.clipping import AdaptiveQuantile
from privfm.engines.flower.messages import Reply, Request
from privfm.engines.flower.node import hosted_here, parties_of
from privfm.engines.flower.store import NodeStore
from privfm.engines.flower.wire import unpacked
from privfm.federation import Arm, FixedSize, load, save
from privfm.federation.way import Way

Make = Callable[..., Any]
CODEC = FixedPoint(bound=8.0, bits=16)
ACTIVE = {
    "channel": PairwiseMasks(clients=12, corrupt=0.1, active=True),
    "transforms": (ClientMomentum(0.9), CODEC),
}
SECRET_ENTRIES = {"sharing", "masking", "seed", "kept", "receiving"}
STAGES = ("keys", "shares", "masked", "confirm", "unmask")


@final
@dataclass
class Watched:
    """What went to one host in one round, and what it remembered after each stage."""

    requests: dict[str, Request]
    memories: dict[str, bytes]


def watch(there: Any, node: int, now: int = 0) -> Watched:
    """Looks over a host's shoulder; the bytes that go on are the same."""
    seen = Watched({}, {"": b""})

    def meddle(at: int, kind: str, request: bytes, reply: bytes) -> bytes:
        if at == node and kind == "train" and Request.from_bytes(request).round == now:
            asked = Request.from_bytes(request)
            seen.requests[asked.stage], seen.memories[asked.stage] = asked, there.grid.memory(node)
        return reply

    there.grid.meddle = meddle
    return seen


def remembered(memory: bytes) -> dict[int, dict[str, bytes]]:
    """By party."""
    found: dict[int, dict[str, bytes]] = {}
    for name, value in (unpacked(memory)[1] if memory else {}).items():
        party, _, entry = name.partition("/")
        found.setdefault(int(party), {})[entry] = value
    return found


# Secrets


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.Tensor]]:
    """Every row that any client gave to a channel, as it gave it."""
    given: list[torch.Tensor] = []
    sealed = Way.sealed

    def watched(way: Way, asked: list[int]) -> Mapping[int, Encoded]:
        found = sealed(way, asked)
        given.extend(encoded.rows[0] for encoded in found.values())
        return found

    monkeypatch.setattr(Way, "sealed", watched)
    yield given


def forms(row: torch.Tensor) -> list[bytes]:
    """How the first numbers of a row could look on the wire."""
    kinds = (torch.float32, torch.float64, torch.int32, torch.int64)
    return [row[:6].to(kind).numpy().tobytes() for kind in kinds]


def states_of(folder: Path) -> list[bytes]:
    """What clients remember between rounds, as it lies in their hosts' stores."""
    from safetensors.torch import load_file

    tensors = [tensor for path in folder.rglob("*.safetensors") for tensor in load_file(path).values()]
    return [row[:6].numpy().tobytes() for tensor in tensors if tensor.dim() == 2 for row in tensor]


def test_nothing_that_reaches_the_server_holds_a_secret(
    cluster: Make, played: Make, rows: list[torch.Tensor], tmp_path: Path
) -> None:
    there = cluster(2, **ACTIVE)
    watched = watch(there, there.node(0))
    state = played(there.federation, 2)
    save(state, tmp_path / "checkpoint")
    server = b"".join([*there.grid.sent, *(path.read_bytes() for path in (tmp_path / "checkpoint").iterdir())])

    kept = [own for memory in watched.memories.values() for own in remembered(memory).values()]
    secrets = {value for own in kept for entry, value in own.items() if entry in SECRET_ENTRIES and len(value) > 15}
    assert len(secrets) > 4 * 2  # the clients of one host
    assert not [value for value in secrets if value in server or value.hex().encode() in server]
    assert {entry for own in kept for entry in own} >= SECRET_ENTRIES

    identities = there.secrets.values()
    assert not [value for value in identities if value in server or value.hex().encode() in server]
    momenta = states_of(there.store)
    assert len(momenta) >= 12
    assert not [value for value in momenta if value in server]
    assert len(rows) == 16 and not [form for row in rows for form in forms(row) if form in server]
    assert not state.clients.index  # the server's checkpoint holds no client's state

    # The same search finds what is there: the released model, and in the clear every row
    assert state.model.numpy().tobytes() in server
    rows.clear()
    plain = cluster(2, transforms=(ClientMomentum(0.9),), channel=Plaintext())
    played(plain.federation, 1)
    sent = b"".join(plain.grid.replies)
    assert len(rows) == 8 and all(any(form in sent for form in forms(row)) for row in rows)


def test_what_a_round_needed_is_erased_with_its_last_stage(cluster: Make, played: Make) -> None:
    there = cluster(2, **ACTIVE)
    watched = watch(there, there.node(0))
    played(there.federation, 1)
    assert tuple(watched.requests) == STAGES
    for stage in STAGES[:-1]:  # the positive control: until then there is something to erase
        parties = remembered(watched.memories[stage])
        assert parties.keys() == watched.requests[stage].requests.keys()
        assert all(own.keys() & SECRET_ENTRIES for own in parties.values())
    after = remembered(watched.memories["unmask"])
    assert after and all(own == {"done": " ".join(STAGES).encode()} for own in after.values())


def test_a_key_holders_key_is_erased_with_its_last_stage(cluster: Make, played: Make) -> None:
    there = cluster(2, channel=CKKS(bound=8.0, clients=12), cohort=FixedSize(3))
    node = there.node_of(KEY_HOLDER)
    assert there.hosts[-1].parties == (KEY_HOLDER,)
    watched = watch(there, node)
    played(there.federation, 1)
    stages = list(watched.requests)
    assert len(stages) == 2
    (before,) = remembered(watched.memories[stages[0]]).values()
    assert sum(len(value) for entry, value in before.items() if entry != "done") > 1000  # a key
    assert [list(own) for own in remembered(watched.memories[stages[1]]).values()] == [["done"]]
    sent, secret = b"".join(there.grid.sent), max(before.values(), key=len)
    found = [secret[at : at + 64] in sent for at in range(0, len(secret) - 64, 64)]
    own = found.index(False)  # the public key comes first, and is sent; then the secret one, of which nothing is
    assert own * 64 > 10_000 and (len(found) - own) * 64 > 10_000 and not any(found[own:])


def test_a_new_round_finds_nothing_of_an_earlier_one(cluster: Make, played: Make) -> None:
    """Nor of one that was left half done."""
    there = cluster(1, **ACTIVE)
    watched = watch(there, there.node(0))
    played(there.federation, 1)
    node, keys, half = there.hosts[0].node, watched.requests["keys"], watched.memories["shares"]
    old = {value for own in remembered(half).values() for entry, value in own.items() if entry in SECRET_ENTRIES}
    later = replace(keys, round=1, requests=dict.fromkeys(keys.requests, b"nonsense"))
    reply, memory = node.answer(later, half)
    assert reply == Reply()
    assert not [value for value in old if value in memory]
    assert all(own == {"done": " ".join(STAGES).encode()} for own in remembered(memory).values())
    reply, _ = node.answer(replace(watched.requests["masked"], round=1), half)  # and cannot go on with the old one
    assert reply == Reply()


# What a host refuses


def test_a_party_that_raised_has_ended_its_round_and_the_others_have_not(
    cluster: Make, played: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    there = cluster(1, **ACTIVE)
    watched = watch(there, there.node(0))
    played(there.federation, 1)
    shares = watched.requests["shares"]
    victim, *others = shares.requests
    lie = replace(shares, requests={**shares.requests, victim: shares.requests[others[0]]})
    reply, memory = there.hosts[0].node.answer(lie, watched.memories["keys"])
    assert set(reply.replies) == set(others)
    assert remembered(memory)[victim] == {"done": " ".join(STAGES).encode()}
    assert all(remembered(memory)[other].keys() & SECRET_ENTRIES for other in others)
    why = capsys.readouterr().err
    assert f"party {victim}, stage 'shares'" in why
    assert why.split(": ")[2].encode() not in reply.to_bytes()
    again, memory = there.hosts[0].node.answer(shares, memory)  # the right one does not help any more
    assert again == Reply()
    assert all(list(own) == ["done"] for own in remembered(memory).values())


@pytest.mark.parametrize("stage", ["keys", "shares", "confirm", "unmask"])
def test_no_stage_is_answered_twice(stage: str, cluster: Make, played: Make) -> None:
    there = cluster(1, **ACTIVE)
    watched = watch(there, there.node(0))
    played(there.federation, 1)
    before = watched.memories[["", *STAGES][STAGES.index(stage)]]
    node, request = there.hosts[0].node, watched.requests[stage]
    first, after = node.answer(request, before)
    assert first.replies.keys() == request.requests.keys()
    for memory in (after, watched.memories["unmask"]):  # at once, and when the round is over
        second, left = node.answer(request, memory)
        assert second == Reply()
        assert all(list(own) == ["done"] for own in remembered(left).values())


def test_nobody_trains_twice_in_a_round(cluster: Make, played: Make, rows: list[torch.Tensor]) -> None:
    """And what clients remember is what it was after the first time."""
    there = cluster(1, transforms=(ClientMomentum(0.9),))
    watched = watch(there, there.node(0))
    played(there.federation, 1)
    states, trained = states_of(there.store), len(rows)
    with pytest.raises(Corrupt, match="have trained in this round"):
        there.hosts[0].node.answer(watched.requests["update"], watched.memories["update"])
    assert states_of(there.store) == states and len(states) == 8 and len(rows) == trained
    there.hosts[0].node.answer(watched.requests["update"], b"")  # a server that goes on from a checkpoint may
    assert sorted(states_of(there.store)) == sorted(states) and len(rows) == 2 * trained


PLAN = DPPlan(noise_multiplier=1.0, max_grad_norm=1.0, sample_rate=0.7, delta=1e-3)
LOCAL = replace(PLAN, place="local", max_participations=10)
ADAPTS = replace(PLAN, clipping=AdaptiveQuantile(0.5, count_deviation=2.0))
WEIGHTED = {"channel": PairwiseMasks(clients=12), "transforms": (CODEC,), "weighting": "examples"}


def told(**change: Any) -> Callable[[Request], Request]:
    def changed(request: Request) -> Request:
        assert request.broadcast is not None
        return replace(request, broadcast=replace(request.broadcast, **change))

    return changed


def weighs(weight: float) -> Callable[[Request], Request]:
    return lambda request: told(weights={**dict.fromkeys(request.requests, 0.5), min(request.requests): weight})(
        request
    )


FLIPPERS = {"attack": SignFlip(scale=2.0), "malicious": (2, 3)}
LIES: dict[str, tuple[dict[str, Any], Callable[[Request], Request]]] = {
    "a party of another host": ({}, lambda asked: replace(asked, requests={**asked.requests, 1: b""})),
    "the key holder": ({}, lambda asked: replace(asked, requests={**asked.requests, KEY_HOLDER: b""})),
    "a party that does not exist": ({}, lambda asked: replace(asked, requests={**asked.requests, 77: b""})),
    "a client that takes no part": ({}, lambda asked: replace(asked, honest=asked.honest[1:])),
    "a client twice": ({}, lambda asked: replace(asked, honest=(*asked.honest, asked.honest[0]))),
    "a client both honest and malicious": (
        FLIPPERS,
        lambda asked: replace(asked, honest=(*asked.honest, *asked.malicious)),
    ),
    "an honest client is to poison": (FLIPPERS, lambda asked: replace(asked, honest=(), malicious=asked.honest)),
    "a round before the first": ({}, lambda asked: replace(asked, round=-1)),
    "a clip of the server's own": ({"plan": LOCAL}, told(bound=1e6)),
    "a clip where there is none": ({}, told(bound=1.0)),
    "no clip where it adapts": ({"plan": ADAPTS}, told(bound=None)),
    "an infinite clip": ({"plan": ADAPTS}, told(bound=inf)),
    "a clip that is no number": ({"plan": ADAPTS}, told(bound=nan)),
    "a clip of 0": ({"plan": ADAPTS}, told(bound=0.0)),
    "weights where nobody multiplies": ({"plan": LOCAL}, weighs(0.5)),
    "no weights where everybody does": (WEIGHTED, told(weights={})),
    "a weight above 1": (WEIGHTED, weighs(1000.0)),
    "a weight below 0": (WEIGHTED, weighs(-1.0)),
    "a weight that is no number": (WEIGHTED, weighs(nan)),
    "somebody else's weight": (WEIGHTED, lambda asked: told(weights=dict.fromkeys((*asked.requests, 99), 0.5))(asked)),
    "a model too long": ({}, told(model=torch.zeros(25))),
    "no model at all": ({}, told(model=torch.zeros(0))),
}  # fmt: skip


@pytest.mark.parametrize(("setting", "lie"), LIES.values(), ids=LIES.keys())
def test_what_a_server_may_not_say_is_refused_before_anything_is_done(
    setting: dict[str, Any], lie: Callable[[Request], Request], cluster: Make, played: Make, rows: list[torch.Tensor]
) -> None:
    there = cluster(2, **setting)
    watched = watch(there, there.node(0))
    played(there.federation, 1)
    node, stage = there.hosts[0].node, there.federation.arm.wire.row_stage
    stages = list(watched.requests)
    before = watched.memories[["", *stages][stages.index(stage)]]
    request = watched.requests[stage]
    rows.clear()
    with pytest.raises(Corrupt):
        node.answer(lie(request), before)
    assert rows == []
    reply, _ = node.answer(request, before)  # the same request, as it was
    assert reply.replies.keys() == request.requests.keys() and len(rows) == len(request.requests)


def test_a_row_is_not_given_without_a_model(cluster: Make, played: Make, capsys: pytest.CaptureFixture[str]) -> None:
    there = cluster(1)
    watched = watch(there, there.node(0))
    played(there.federation, 1)
    reply, memory = there.hosts[0].node.answer(replace(watched.requests["update"], broadcast=None), b"")
    assert reply == Reply()
    assert all(own == {"done": b"update"} for own in remembered(memory).values())
    assert "without the model" in capsys.readouterr().err


@pytest.mark.parametrize(
    "request_", [b"", b"nonsense", Reply().to_bytes()], ids=["empty", "nonsense", "another message"]
)
def test_a_broken_request_gets_an_error_and_changes_nothing(
    request_: bytes, cluster: Make, played: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    """Who could have a memory erased by a message without sense could ask for everything again."""
    there = cluster(1, **ACTIVE)
    node = there.node(0)
    memories = []

    def tell(at: int, kind: str, content: bytes) -> bytes:
        if kind == "train" and Request.from_bytes(content).stage == "masked":
            memories.append(there.grid.memory(node))
            return request_
        return content

    there.grid.tell = tell
    played(there.federation, 1)
    assert played.records[0].skipped
    assert memories == [there.grid.memory(node)] and len(remembered(memories[0])) == 8
    assert there.grid.replies[-1].count(b"Corrupt; the host's log says why") == 1
    assert b"request that is none" not in b"".join(there.grid.replies)
    assert "a request that is none" in capsys.readouterr().err


def test_a_strict_runs_host_answers_nothing_more_in_that_round(cluster: Make, played: Make) -> None:
    there = cluster(1, strict=True, fails=frozenset(range(1, 12)), transforms=(ClientMomentum(0.9),))
    watched = watch(there, there.node(0))
    with pytest.raises(ClientFailed):
        played(there.federation, 1)
    assert Reply.from_bytes(there.grid.replies[-1]) == Reply({}, failed=True)
    assert states_of(there.store) == []
    with pytest.raises(Corrupt, match="have trained"):
        there.hosts[0].node.answer(watched.requests["update"], watched.memories["update"])


# What clients remember


def test_new_hosts_with_the_same_stores_go_on_where_the_old_ones_stopped(
    cluster: Make, local: Make, played: Make, sha: Make, tmp_path: Path
) -> None:
    setting = {"transforms": (ClientMomentum(0.9),)}
    first = cluster(2, store=tmp_path / "stores", **setting)
    save(played(first.federation, 2), tmp_path / "checkpoint")
    again = cluster(2, store=tmp_path / "stores", **setting)
    assert again.grid.memory(again.node(0)) == b""
    expected = sha(played(local(**setting), 4))
    assert sha(played(again.federation, 4, load(tmp_path / "checkpoint"))) == expected
    lost = cluster(2, store=tmp_path / "other", **setting)
    assert sha(played(lost.federation, 4, load(tmp_path / "checkpoint"))) != expected


@pytest.mark.parametrize("back", [1, 2, 3])
def test_a_server_that_goes_back_finds_states_as_they_were(
    back: int, cluster: Make, local: Make, played: Make, sha: Make, steps: Any
) -> None:
    """Rounds since its checkpoint are played again, and give the same bits: error feedback, and a sparse codec."""
    setting = {"transforms": (steps.LargestWithMemory(8), steps.Sparse(8))}
    there = cluster(2, keep=4, **setting)
    states = [None]
    for now in range(1, 6):
        states.append(played(there.federation, now, states[-1]))
    again = cluster(2, store=there.store, keep=4, **setting)  # another run of Flower's: nobody remembers a round
    assert sha(played(again.federation, 7, states[5 - back])) == sha(played(local(**setting), 7))


# Who is where


@pytest.mark.parametrize("places", [1, 2, 5, 30])
@pytest.mark.parametrize("holder", [False, True])
@pytest.mark.parametrize("malicious", [(), (1, 4, 7)])
def test_everybody_is_hosted_once(places: int, holder: bool, malicious: tuple[int, ...]) -> None:
    channel = CKKS(bound=8.0, clients=12) if holder else Plaintext()
    arm = Arm(cohort=FixedSize(8), channel=channel, malicious=malicious)
    places += holder
    hosts = [hosted_here(place, places, arm, 12) for place in range(places)]
    assert sorted(party for own in hosts for party in own) == sorted(parties_of(arm, 12))
    assert set(malicious) <= set(hosts[0])  # who acts together is together
    assert not holder or hosts[-1] == (KEY_HOLDER,)
    for wrong in (-1, places):
        with pytest.raises(InvalidArgument, match="partition-id"):
            hosted_here(wrong, places, arm, 12)


def test_a_key_holder_is_not_alone_in_the_world() -> None:
    with pytest.raises(InvalidArgument, match="the key holder's alone"):
        hosted_here(0, 1, Arm(cohort=FixedSize(8), channel=CKKS(bound=8.0, clients=12)), 12)


@pytest.mark.parametrize(
    ("plan", "counted"), [(LOCAL, True), (PLAN, False)], ids=["claimed against the server", "against who sees models"]
)
def test_a_client_trains_as_often_as_its_plan_pays_for(
    plan: DPPlan, counted: bool, cluster: Callable[..., Any], played: Callable[..., Any]
) -> None:
    """Whatever the round is called: a row more is noise more to average, and nobody pays for it."""
    there = cluster(2, plan=plan, rounds=2)
    first = played(there.federation, until=2)
    rows = played.records[-1].arrived
    assert rows > 0
    again = played(there.federation, until=2)  # from the start: what a server can do that forgets on purpose
    heard = [record.arrived for record in played.records]
    assert all(arrived < rows for arrived in heard) if counted else heard[-1] == rows
    if counted:
        counts = [NodeStore(folder, 2).participations() for folder in sorted(there.store.iterdir())]
        assert max(max(own.values()) for own in counts) == 2
    else:
        assert torch.equal(first.model, again.model)
