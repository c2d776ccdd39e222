"""The same run on hosts: the same bits, whoever answers first; and what a server does when somebody does not answer."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from random import Random
from typing import Any, final

import pytest
from flwr.app import DEFAULT_TTL, Context, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from privfm.adapters import AdapterLayout, FactorPair
from privfm.attacks import FreeRider, LabelFlip, SignFlip
from privfm.attacks.audit import GhostCanaries
from privfm.checks import ClientFailed, Corrupt, InvalidArgument
from privfm.cli import flower_entry
from privfm.cli.run import request
from privfm.contracts import Cast, Channel, Engine, Exchange, Sealer
from privfm.defenses import ClientMomentum, DPPlan, FixedPoint, MultiKrum, TrimmedMean
from privfm.defenses.channels import BFV, CKKS, CKKSGram, Grouped, PairwiseMasks, RLWEPad, Selective
from privfm.defenses.privacy.clipping import AdaptiveQuantile
from privfm.defenses.privacy.integer_noise import IntegerNoise
from privfm.engines import Local
from privfm.engines.flower import engine
from privfm.engines.flower.app import MODULE
from privfm.engines.flower.client import client_app
from privfm.engines.flower.engine import Flower, _in_order
from privfm.engines.flower.messages import Greeting, Reply, Request
from privfm.engines.flower.records import content_of, message_to
from privfm.engines.flower.settings import FlowerSettings
from privfm.engines.flower.wire import packed
from privfm.experiment import flower as experiment
from privfm.experiment.config import ArmSpec
from privfm.experiment.flower import play_on_flower
from privfm.experiment.run import play_run
from privfm.federation import FixedSize
from privfm.federation.canaries import Audit
from privfm.reporting import RunFolder

ROOT = Path(__file__).parents[2]

Make = Callable[..., Any]
CODEC = FixedPoint(bound=8.0, bits=16)
MASKS = PairwiseMasks(clients=12)
PLAN = DPPlan(noise_multiplier=1.0, max_grad_norm=1.0, sample_rate=0.7, delta=1e-3)
LORA = AdapterLayout((FactorPair("layer", 2, 5, 4, 1.0, 0, 10),), 24)

SETTINGS: dict[str, dict[str, Any]] = {
    "mean": {},
    "trimmed mean of sign flippers": {
        "rule": TrimmedMean(f=2),
        "attack": SignFlip(scale=4.0),
        "malicious": (1, 4, 5),
    },
    "poisoned data": {"rule": TrimmedMean(f=2), "attack": LabelFlip(labels=3), "malicious": (1, 4, 5)},
    "free riders who remember models": {"attack": FreeRider(scale=1.0), "malicious": (1, 4, 5)},
    "client momentum": {"transforms": (ClientMomentum(0.9),)},
    "masks": {"channel": MASKS, "transforms": (CODEC,)},
    "active masks": {"channel": PairwiseMasks(clients=12, corrupt=0.1, active=True), "transforms": (CODEC,)},
    "masks, weights and momentum": {
        "channel": MASKS,
        "transforms": (ClientMomentum(0.9), CODEC),
        "weighting": "examples",
    },
    "masks of attackers": {
        "channel": MASKS,
        "transforms": (ClientMomentum(0.5), CODEC),
        "attack": SignFlip(scale=2.0),
        "malicious": (2, 3),
    },
    "groups with momentum": {
        "channel": Grouped(MASKS, size=3),
        "transforms": (ClientMomentum(0.9), CODEC),
        "rule": TrimmedMean(f=0),
    },
    "selective": {"channel": Selective(MASKS, ((5, 20),)), "transforms": (CODEC,)},
    "BFV": {"channel": BFV(clients=12, bits=16), "transforms": (CODEC,), "cohort": FixedSize(3)},
    "CKKS": {"channel": CKKS(bound=8.0, clients=12), "cohort": FixedSize(3)},
    "Krum of a key holder": {
        "channel": CKKSGram(bound=8.0),
        "rule": MultiKrum(f=1, m=2),
        "attack": SignFlip(scale=2.0),
        "malicious": (2, 3),
        "cohort": FixedSize(5),
    },
    "pads": {
        "channel": RLWEPad(12, 16, PairwiseMasks(12, corrupt=0.0, modulus_bits=16), approximate=True),
        "transforms": (CODEC,),
        "cohort": FixedSize(3),
    },
    "central noise": {"plan": PLAN},
    "a bound that adapts": {"plan": replace(PLAN, clipping=AdaptiveQuantile(0.5, count_deviation=2.0))},
    "local noise": {"plan": replace(PLAN, place="local", max_participations=10)},
    "distributed noise": {
        "channel": MASKS,
        "plan": replace(
            PLAN, place="distributed", max_participations=10, integers=IntegerNoise(least_answers=3, clients=12)
        ),
    },
    "audited": {"plan": replace(PLAN, sample_rate=1.0, sampling="full"), "audit": Audit(GhostCanaries(8))},
    "factors in turns": {"layout": LORA, "alternate": True},
    "simulated drop-outs": {"channel": PairwiseMasks(clients=12, dropouts=0.3), "transforms": (CODEC,),
                            "dropout_rate": 0.1},
}  # fmt: skip


SLOW = {"Krum of a key holder", "BFV", "CKKS"}


@pytest.mark.parametrize("hosts", [1, 3])
@pytest.mark.parametrize("name", SETTINGS)
def test_the_same_bits_as_in_one_process(
    name: str, hosts: int, local: Make, cluster: Make, played: Make, sha: Make
) -> None:
    setting, until = SETTINGS[name], 1 if name in SLOW else 3
    here = played(local(**setting), until)
    records = played.records
    there = cluster(hosts, **setting)
    assert sha(played(there.federation, until)) == sha(here)
    for one, other in zip(records, played.records, strict=True):
        for what in ("sampled", "arrived", "malicious", "bad", "skipped", "kept", "clip_bound"):
            assert getattr(one, what) == getattr(other, what), what
        assert one.bytes_up == other.bytes_up or name in SLOW  # ciphertexts are written compressed
        assert one.skipped == "" and one.arrived > 0
    assert "malicious" not in setting or sum(record.malicious for record in records) >= until


def test_another_seed_or_one_client_less_gives_other_bits(local: Make, played: Make, sha: Make) -> None:
    """What the test above compares sees a difference where there is one."""
    found = [sha(played(local(**change))) for change in ({}, {"seed": 2}, {"fails": frozenset({3})})]
    assert len(set(found)) == 3


# Whoever answers first


def _one_at_a_time(seed: int) -> Callable[[list[Any]], list[Any]]:
    dice = Random(seed)
    return lambda replies: [dice.choice(replies)] if replies else []


def _shuffled(seed: int) -> Callable[[list[Any]], list[Any]]:
    dice = Random(seed)
    return lambda replies: dice.sample(replies, len(replies))


ORDERS = {"reversed": lambda replies: replies[::-1], "shuffled": _shuffled(1), "otherwise": _shuffled(2),
          "one at a time": _one_at_a_time(3)}  # fmt: skip


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS.keys())
@pytest.mark.parametrize("hosts", [2, 5])
@pytest.mark.parametrize("name", ["trimmed mean of sign flippers", "masks, weights and momentum"])
def test_the_order_of_arrival_changes_nothing(
    name: str, hosts: int, order: Make, local: Make, cluster: Make, played: Make, sha: Make
) -> None:
    there = cluster(hosts, **SETTINGS[name])
    there.grid.order = order
    assert sha(played(there.federation, 2)) == sha(played(local(**SETTINGS[name]), 2))


@given(st.data())
def test_replies_are_handed_on_in_the_order_of_the_cohort(data: st.DataObject) -> None:
    """And each as soon as nobody before it can still come."""
    parties = list(range(8))
    homes = {node: [party for party in parties if party % 3 == node] for node in range(3)}
    answered = {party for party in parties if data.draw(st.booleans())}
    order = data.draw(st.permutations(parties))
    came: list[int] = []
    yielded: list[int] = []

    def replies() -> Iterator[tuple[int, dict[int, bytes]]]:
        for node in data.draw(st.permutations(range(data.draw(st.integers(0, 3))))):
            came.append(node)
            yield node, {party: b"%d" % party for party in (*parties, 99) if party in answered or party == 99}
            settled = {party for seen in came for party in homes[seen]}
            before = list(takewhile(settled.__contains__, order))
            assert yielded == [party for party in before if party in answered]

    for party, reply in _in_order(parties, order, homes, replies()):
        assert reply == b"%d" % party
        yielded.append(party)
    assert yielded == [party for party in order if party in answered and party % 3 in came]


# Who does not answer

STAGES = ("keys", "shares", "masked", "unmask")
LOSSES = {"channel": PairwiseMasks(clients=12, corrupt=0.0, dropouts=0.4), "transforms": (CODEC,)}


@final
@dataclass(frozen=True)
class Missing(Engine):
    """The local engine without some parties, from one stage of round 0 on."""

    stage: str
    who: frozenset[int]

    def open(self, channel: Channel, sealed: Sealer, cast: Cast) -> Exchange:
        gone = {self.stage: self.who} if cast.round == 0 else {}
        return Local(1).open(channel, sealed, replace(cast, gone=gone))


@final
class Failure(Exception):
    code = 2


def _fails(how: str, grid: Any, victims: Sequence[int], stage: str) -> None:
    """Lets the hosts `victims` fail at a stage of round 0."""

    def meddle(node: int, kind: str, request: bytes, reply: bytes) -> bytes | None:
        if node not in victims or kind != "train":
            return reply
        asked = Request.from_bytes(request)
        if (asked.round, asked.stage) != (0, stage):
            return reply
        if how == "raises":
            raise Failure
        if how == "dies":
            grid.dead.add(node)
        said = {
            "nonsense": b"nonsense",
            "says nothing": Reply().to_bytes(),
            "cut short": reply[:-1],
            "answers twice": packed(
                {"failed": False}, {f"reply/{k}{party}": b"" for k in ("", "0") for party in range(12)}
            ),
        }
        return said.get(how)

    grid.meddle = meddle


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("how", ["dies", "late", "raises", "nonsense", "says nothing", "cut short", "answers twice"])
def test_a_host_that_drops_out_is_missing_and_no_more(
    how: str, stage: str, local: Make, cluster: Make, played: Make, sha: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "HOST_SECONDS", 0.1)
    seconds = 0.3 if how == "late" else 30.0
    there = cluster(4, settings=FlowerSettings(stage_seconds=seconds), **LOSSES)
    _fails(how, there.grid, [there.node(1)], stage)
    found = played(there.federation, 1)
    (record,) = played.records
    lost = frozenset(there.hosts[1].parties)
    assert sha(found) == sha(played(local(Missing(stage, lost), **LOSSES), 1))
    assert (record.arrived, record.skipped) == (played.records[0].arrived, "")
    assert stage == "unmask" or sha(found) != sha(played(local(**LOSSES), 1))


def test_below_the_threshold_the_round_is_skipped_and_recorded(
    local: Make, cluster: Make, played: Make, sha: Make
) -> None:
    there = cluster(4, **LOSSES)
    _fails("raises", there.grid, [there.node(k) for k in (1, 2, 3)], "masked")
    found = played(there.federation, 1)
    (record,) = played.records
    assert found.model.equal(there.federation.learner.initial())
    assert record.skipped and record.arrived == 0
    played(local(Missing("masked", frozenset(range(12)) - set(there.hosts[0].parties)), **LOSSES), 1)
    assert played.records[0].skipped == record.skipped


@pytest.mark.parametrize("still_listed", [False, True])
def test_a_host_that_comes_back_as_another_node_takes_part_again(
    still_listed: bool, local: Make, cluster: Make, played: Make, sha: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "HOST_SECONDS", 0.1)
    setting = {"transforms": (ClientMomentum(0.9),)}
    there = cluster(3, **setting)
    lost = there.node(1)
    there.grid.tell = lambda node, kind, request: (there.grid.dead.add(lost), request)[1]
    after = played(there.federation, 1)  # host 0 answers, and with its first message host 1 is gone
    there.grid.tell = lambda node, kind, request: request
    if still_listed:
        there.grid.dead.discard(lost)
        there.grid.unreachable.add(lost)
    there.back(1, 999)
    found = played(there.federation, 3, after)
    assert there.engine.host_of(there.hosts[1].parties[0], there.engine.there()) == 999
    assert [record.arrived for record in played.records] == [8, 8]
    expected = played(local(Missing("update", frozenset(there.hosts[1].parties)), **setting), 3)
    assert sha(found) == sha(expected) != sha(played(local(**setting), 3))


def test_a_node_that_nothing_can_be_sent_to_has_dropped_out(
    local: Make, cluster: Make, played: Make, sha: Make
) -> None:
    there = cluster(3)
    there.grid.unreachable.add(there.node(2))
    lost = frozenset(there.hosts[2].parties)
    assert sha(played(there.federation, 1)) == sha(played(local(Missing("update", lost)), 1))


def test_messages_that_flower_does_not_take_end_the_run_typed(cluster: Make, played: Make) -> None:
    there = cluster(2)
    there.grid.push_messages = lambda messages: []
    with pytest.raises(InvalidArgument, match="taken 0 of 2 messages"):
        played(there.federation, 1)


def test_nobody_answers_for_others(cluster: Make, local: Make, played: Make, sha: Make) -> None:
    there = cluster(3)

    def meddle(node: int, kind: str, request: bytes, reply: bytes) -> bytes:
        if kind != "train" or node != there.node(0):
            return reply
        return Reply({**dict.fromkeys(range(-3, 20), b"mine"), **Reply.from_bytes(reply).replies}).to_bytes()

    there.grid.meddle = meddle
    assert sha(played(there.federation, 2)) == sha(played(local(), 2))


# Before the first round


def _greets(there: Any, node: int, answer: Callable[[bytes], bytes]) -> Any:
    """A fresh engine on the same grid, where one node greets otherwise."""
    there.grid.meddle = lambda at, kind, request, reply: answer(reply) if (at, kind) == (node, "query") else reply
    return Flower(there.grid, there.engine.server, FlowerSettings(start_seconds=0.2, stage_seconds=5.0))


def _raises(code: int) -> Callable[[bytes], bytes]:
    def answer(reply: bytes) -> bytes:
        reason = Failure()
        reason.code = code
        raise reason

    return answer


REFUSALS: dict[str, tuple[Callable[[bytes], bytes], type[Exception], str]] = {
    "hosts nobody": (lambda reply: Greeting(()).to_bytes(), InvalidArgument, r"parties \[0, 1, 3, 4, 6\] on none"),
    "unavailable": (_raises(5), InvalidArgument, "after start_seconds=0.2 1 host"),
    "raises": (_raises(2), InvalidArgument, "failed before it took part"),
    "claims others": (lambda reply: Greeting((2, 3)).to_bytes(), Corrupt, "not by the pinned identity"),
    "has a problem": (lambda reply: Greeting((), "no data").to_bytes(), InvalidArgument, "cannot take part: no data"),
    "nonsense": (lambda reply: b"nonsense", Corrupt, "a greeting that is none"),
}  # fmt: skip


@pytest.mark.parametrize(("answer", "kind", "match"), REFUSALS.values(), ids=REFUSALS.keys())
def test_a_run_does_not_start_without_everybody(
    answer: Callable[[bytes], bytes], kind: type[Exception], match: str, cluster: Make
) -> None:
    there = cluster(2, malicious=(1, 4))
    engine = _greets(there, there.node(0), answer)
    with pytest.raises(kind, match=match):
        engine.meet(range(12))


def test_nobody_is_hosted_twice(cluster: Make) -> None:
    there = cluster(2)
    there.grid.join(999, there.app, there.grid.configs[there.node(0)])
    fresh = Flower(there.grid, there.engine.server, FlowerSettings(start_seconds=0.2))
    with pytest.raises(InvalidArgument, match="are hosted twice; give every SuperNode its own partition-id"):
        fresh.meet(range(12))


def test_a_greeting_of_before_proves_nothing(cluster: Make, played: Make, capsys: pytest.CaptureFixture[str]) -> None:
    """A node that has heard another's greeting repeats it, and would get everything that is meant for the other."""
    there = cluster(2)
    heard: list[bytes] = []
    there.grid.meddle = lambda node, kind, request, reply: (heard.append(reply) if kind == "query" else None, reply)[1]
    Flower(there.grid, there.engine.server, FlowerSettings(start_seconds=0.2)).meet(range(12))
    there.grid.meddle = lambda node, kind, request, reply: heard[0] if (node, kind) == (999, "query") else reply
    there.grid.join(999, there.app, there.grid.configs[there.node(0)])
    played(there.federation, until=1)
    assert "not by the pinned identity" in capsys.readouterr().err
    assert 999 not in there.engine.hosts and 999 not in {node for node, kind, _ in there.grid.asked if kind == "train"}


def test_a_silent_newcomer_delays_one_round(cluster: Make, played: Make) -> None:
    there = cluster(2, settings=FlowerSettings(start_seconds=0.3, stage_seconds=60.0))
    there.grid.meddle = lambda node, kind, request, reply: None if node == 999 else reply
    there.grid.join(999, there.app, {"partition-id": 0, "num-partitions": 2})
    played(there.federation, until=3)
    assert [node for node, _, _ in there.grid.asked].count(999) == 1


def test_hosts_may_come_one_after_the_other(cluster: Make) -> None:
    there = cluster(3)
    late = there.node(2)
    there.grid.dead.add(late)
    fresh = Flower(there.grid, there.engine.server, FlowerSettings(start_seconds=20.0))
    there.grid.tell = lambda node, kind, request: (there.grid.dead.discard(late), request)[1]
    fresh.meet(range(12))
    assert sorted(party for own in fresh.hosts.values() for party in own) == list(range(12))


@pytest.mark.parametrize("how", ["raises", "moved", "claims others", "has a problem", "nonsense"])
def test_who_joins_later_and_cannot_take_part_ends_nothing(
    how: str, cluster: Make, local: Make, played: Make, sha: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    there = cluster(2)
    there.back(0, 555)
    if how != "moved":  # then what a node says later wins
        answer = REFUSALS[how][0]
        there.grid.meddle = lambda at, kind, request, reply: answer(reply) if (at, kind) == (555, "query") else reply
    assert sha(played(there.federation, 2)) == sha(played(local(), 2))
    assert (how == "moved") == (555 in there.engine.hosts) == (capsys.readouterr().err == "")


# A client that fails


def test_a_client_that_fails_is_missing_and_no_byte_says_why(
    cluster: Make, local: Make, played: Make, sha: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    setting = {"fails": frozenset({0, 3, 7})}
    there = cluster(2, **setting)
    assert sha(played(there.federation)) == sha(played(local(**setting)))
    assert sum(record.failed for record in played.records) > 0  # those of the local run, which may know
    everything = b"".join(there.grid.sent)
    assert b"private reason" not in everything and b"ValueError" not in everything
    assert "private reason" in capsys.readouterr().err  # the host's own log


def test_in_a_strict_run_it_ends_the_run(cluster: Make, played: Make) -> None:
    there = cluster(2, fails=frozenset(range(12)), strict=True)
    with pytest.raises(ClientFailed, match="its log says why"):
        played(there.federation)
    assert b"private reason" not in b"".join(there.grid.sent)


def test_no_host_ends_a_run_that_is_not_strict(cluster: Make, local: Make, played: Make, sha: Make) -> None:
    there = cluster(3)
    _answers(there.grid, there.node(1), Reply({}, failed=True).to_bytes())
    found = played(there.federation, 1)
    assert sha(found) == sha(played(local(Missing("update", frozenset(there.hosts[1].parties))), 1))


def _answers(grid: Any, node: int, instead: bytes) -> None:
    grid.meddle = lambda at, kind, request, reply: instead if (at, kind) == (node, "train") else reply


def test_flower_keeps_a_message_as_long_as_its_reply_is_waited_for() -> None:
    for seconds, least in ((1.0, DEFAULT_TTL), (3600.0, DEFAULT_TTL), (48 * 3600.0, 48 * 3600.0)):
        message = message_to(5, b"content", "train", 3, seconds)
        assert message.metadata.ttl >= least
        assert (message.metadata.dst_node_id, message.metadata.group_id) == (5, "3")
        assert content_of(message) == b"content"


# From a configuration file to its results


@final
class InProcess:
    """A session of Flower without its processes: the app that was written, server and hosts in this process."""

    def __init__(self, grid_of: Make, hosts: int) -> None:
        self.grid_of, self.hosts, self.grids, self.apps = grid_of, hosts, list[Any](), dict[str, bytes]()

    def run(self, app: Path, config: dict[str, Any], timeout: float) -> None:
        package = app / MODULE
        files = [path for path in app.rglob("*") if path.is_file()]
        self.apps |= {path.name: path.read_bytes() for path in files}
        defaults = tomllib.loads((app / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
        own = {node: {"partition-id": node, "num-partitions": self.hosts} for node in range(self.hosts)}
        grid = self.grid_of(dict.fromkeys(own, client_app(package)), own, defaults | config)
        self.grids.append(grid)
        self.secrets = [path.read_text() for path in Path(defaults["loopback"]).iterdir()]
        flower_entry.server_app(package)(grid, Context(1, 1, {}, RecordDict(), defaults | config))


EXAMPLE = (
    "docs/example.toml --partition.clients 6 --cohort.size 4 --rounds 2 --clients_per_batch 1 "
    "--training.schedule.epochs 1 --rule.f 1 --malicious_share 0.34"
)
MOMENTUM = '[{"class_path": "privfm.defenses.ClientMomentum", "init_args": {"beta": 0.9}}]'


def _example() -> ArmSpec:
    first, *others = EXAMPLE.split()
    asked = request("run", [str(ROOT / first), *others, "--transforms", MOMENTUM])
    return ArmSpec("arm", "arm", "", asked.config)


@pytest.fixture
def session(grid_of: Make, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[InProcess]]:
    opened: list[InProcess] = []

    @contextmanager
    def open_session(folder: Path, settings: FlowerSettings, hosts: int) -> Iterator[InProcess]:
        opened.append(InProcess(grid_of, hosts))
        yield opened[-1]

    monkeypatch.setattr(experiment, "open_session", open_session)
    monkeypatch.setattr(sys, "path", list(sys.path))  # to which an app adds the user's own folder
    yield opened
    flower_entry._host.cache_clear()
    flower_entry._federation.cache_clear()


def test_a_configuration_gives_the_same_files_on_both_engines(session: list[InProcess], tmp_path: Path) -> None:
    spec = _example()
    play_run(tmp_path / "local", spec, 3)
    play_on_flower([(tmp_path / "flower", spec, 3)], tmp_path / "shared", lambda: None)
    models = [sorted((tmp_path / name / "model").iterdir()) for name in ("local", "flower")]
    assert [path.name for path in models[0]] == [path.name for path in models[1]] and models[0]
    assert [path.read_bytes() for path in models[0]] == [path.read_bytes() for path in models[1]]
    rows = [RunFolder(tmp_path / name).rows() for name in ("local", "flower")]
    knows = {"empirical_kappa", "update_norm_median", "failed"}
    knows |= {"seconds_training", "seconds_aggregation", "seconds_evaluation"}
    assert [row.keys() for row in rows[0]] == [row.keys() for row in rows[1]]
    for one, other in zip(*rows, strict=True):
        assert {key for key in one if one[key] != other[key]} <= knows
        assert one["malicious"] > 0
        assert (other["failed"], other["seconds_training"]) == (None, None)  # not nothing: nobody said

    # And what the server has on its disk, or was sent, is no secret
    (played,) = session
    secrets = [bytes.fromhex(secret) for text in played.secrets for secret in json.loads(text).values()]
    assert len(secrets) == 6 + 1
    hosts = tmp_path / "flower" / "hosts"  # where hosts keep what is theirs when all are this machine
    stored = [
        path.read_bytes() for path in (tmp_path / "flower").rglob("*") if path.is_file() and hosts not in path.parents
    ]
    everything = b"".join([*stored, *played.apps.values(), *played.grids[0].sent])
    assert not [secret for secret in secrets if secret in everything or secret.hex().encode() in everything]
    momenta = [
        row[:8].numpy().tobytes()
        for path in hosts.rglob("*.safetensors")
        for name, rows in load_file(path).items()
        if name.startswith("client/")
        for row in rows
    ]
    assert len(momenta) >= 4
    assert not [row for row in momenta if row in b"".join(stored)]


def test_a_host_whose_identity_others_can_read_does_not_take_part(
    session: list[InProcess], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = experiment._make_all_secrets

    def careless(place: Any, federation: Any, hosts: int) -> dict[int, bytes]:
        public = make(place, federation, hosts)
        place.secrets_of(1).chmod(0o644)
        return public

    monkeypatch.setattr(experiment, "_make_all_secrets", careless)
    with pytest.raises(InvalidArgument, match=r"node 1 cannot take part: InvalidArgument: secrets=.*chmod 600"):
        play_on_flower([(tmp_path / "flower", _example(), 3)], tmp_path, lambda: None)


def test_a_thin_client_needs_no_torch() -> None:
    """Flower starts a process for every message: what is heavy stays in the worker."""
    code = "import sys, privfm.engines.flower.client; print(sorted({'torch', 'safetensors'} & set(sys.modules)))"
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout == "[]\n"
