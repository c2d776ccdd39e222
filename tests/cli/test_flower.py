"""`privfm flower-app`, `privfm flower-identity`, and what `run` and `check` say of Flower."""

import json
import stat
import sys
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.app import Context, RecordDict

from privfm.checks import InvalidArgument
from privfm.cli import flower_entry, main
from privfm.cli.flower_entry import answer, server_app, spec_of
from privfm.cli.run import recorded_config, request
from privfm.contracts import KEY_HOLDER, SERVER
from privfm.defenses import DPPlan, IntegerNoise
from privfm.defenses.channels.identity_files import Pinned, read_secrets
from privfm.engines.flower.app import MODULE, PUBLIC, Place
from privfm.engines.flower.messages import Greeting
from privfm.engines.flower.wire import packed, unpacked
from privfm.experiment.config import resolved

CKKS = ("--rule", "Mean", "--attack", "null", "--malicious_share", "0", "--channel", "CKKS", "--channel.bound", "4",
        "--channel.clients", "40")  # fmt: skip


@pytest.fixture
def app(example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    assert main(["flower-app", "app", example, "--flower.hosts", "3", "--seeds", "[5]"]) == 0
    return tmp_path / "app"


def test_an_app_holds_the_run_and_nothing_secret(app: Path, example: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["flower-app", "again", example, "--flower.hosts", "3"]) == 0
    out = capsys.readouterr().out
    assert "host 0 of 3" in out and "host 2 of 3" in out and "privfm flower-identity" in out
    project = tomllib.loads((app / "pyproject.toml").read_text())
    assert project["project"]["dependencies"] == []  # hosts would install over what they have checked
    components = project["tool"]["flwr"]["app"]["components"]
    for part in components.values():
        module, _, name = part.partition(":")
        assert name == "app" and (app / Path(*module.split("."))).with_suffix(".py").is_file()
    assert Place.read(app) == Place("runs/example/seed-5", 5, "server.json")
    spec = spec_of(app / MODULE)
    asked = request("run", [example]).config
    assert spec.config.engine == "flower" and spec.config.flower.hosts == 3
    assert (spec.config.rule, spec.config.data, spec.config.rounds) == (asked.rule, asked.data, asked.rounds)
    assert list((app / MODULE / PUBLIC).iterdir()) == []


def test_a_recorded_configuration_is_read_as_it_was(example: str) -> None:
    asked = request(
        "run",
        [example, *CKKS, "--transforms", '[{"class_path":"privfm.defenses.ClientMomentum","init_args":{"beta":0.5}}]'],
    )
    assert recorded_config(json.loads(json.dumps(resolved(asked.config, in_full=True)))) == asked.config


def test_identities_are_made_on_their_hosts(app: Path) -> None:
    for host in ("0", "1", "2", "server"):
        assert main(["flower-identity", "app", host]) == 0
    own = [set(read_secrets(Path(f"host-{host}.json"))) for host in range(3)]
    assert set.union(*own) == set(range(40)) and sum(map(len, own)) == 40
    assert set(spec_arm_malicious(app)) <= own[0]  # who acts together is on one host
    assert set(read_secrets(Path("server.json"))) == {SERVER}
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in Path().glob("host-?.json"))
    for path in Path().glob("*.public.json"):
        path.rename(app / MODULE / PUBLIC / path.name)
    pinned = Pinned(app / MODULE / PUBLIC)
    assert len({pinned(party) for party in (*range(40), SERVER)}) == 41
    secrets = "".join(path.read_text() for path in Path().glob("*.json"))
    everywhere = "".join(path.read_text() for path in app.rglob("*") if path.is_file())
    assert not any(secret in everywhere for secret in json.loads(Path("host-0.json").read_text()).values())
    assert json.loads(Path("host-0.json").read_text())["0"] in secrets  # the control


def spec_arm_malicious(app: Path) -> tuple[int, ...]:
    from privfm.experiment import arm_of

    return arm_of(spec_of(app / MODULE).config, 40, 5).malicious


def test_a_key_holder_has_a_host_of_its_own(
    example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["flower-app", "app", example, *CKKS]) == 0
    assert "host 2 of 3: the key holder" in capsys.readouterr().out
    assert main(["flower-identity", "app", "2"]) == 0
    assert set(read_secrets(Path("host-2.json"))) == {KEY_HOLDER}


def test_bad_requests(app: Path, example: str, refused: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert "is not empty" in refused("flower-app", "app", example)
    assert "DIR is missing" in refused("flower-app", "--rounds", "3")
    assert "an app plays one run" in refused("flower-app", "other", example, "--seeds", "[0,1]")
    assert not Path("other").exists()
    assert "expected 0 to 2" in refused("flower-identity", "app", "3")
    assert "a host's number, or server" in refused("flower-identity", "app", "first")
    assert "no folder that privfm flower-app wrote" in refused("flower-identity", "nowhere", "0")
    assert main(["flower-identity", "app", "1"]) == 0
    capsys.readouterr()
    assert "is there already" in refused("flower-identity", "app", "1")


def test_what_hosts_cannot_play_is_refused_before_anything_starts(
    example: str, tmp_path: Path, refused: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    omniscient = (
        example,
        "--attack",
        "ALIE",
        "--attack.z",
        "1.5",
        "--attack.statistics",
        "honest",
        "--engine",
        "flower",
    )
    error = refused("run", *omniscient, "--out", str(tmp_path / "run"))
    assert "which no host shows to another" in error and "engine=local" in error
    assert main(["check", *omniscient]) == 1
    assert "which no host shows to another" in capsys.readouterr().out
    hidden = (example, *CKKS, "--channel.exact_grid", "false", "--channel.release", "clients", "--engine", "flower")
    assert "their replies go through the server" in refused("run", *hidden, "--out", str(tmp_path / "run"))
    weighted = (example, "--weighting", "examples", "--rule", "Mean", "--engine", "flower", "--flower.clients", "6")
    assert main(["check", *weighted]) == 1
    assert "hosts do not tell" in capsys.readouterr().out


def test_an_app_plays_on_real_hosts_and_says_so(app: Path, example: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["flower-app", "other", example, "--out", "/srv/first", "--flower.mode", "simulation"]) == 0
    assert Place.read(Path("other")).out == "/srv/first/seed-0"
    assert {spec_of(Path(name, MODULE)).config.flower.mode for name in ("app", "other")} == {"deployment"}


def test_folders_that_cannot_be_written_are_refused(app: Path, example: str, refused: Callable[..., str]) -> None:
    Path("file").touch()
    assert "file/app cannot be written" in refused("flower-app", "file/app", example)
    assert "file cannot be written" in refused("flower-app", "file", example)
    assert "nowhere/host.json cannot be written" in refused("flower-identity", "app", "0", "--out", "nowhere/host.json")


def test_noise_that_every_host_could_draw_again_is_refused(
    example: str, private_words: list[str], tmp_path: Path, refused: Callable[..., str]
) -> None:
    """An app tells the seed to everybody; `privfm run`, which is a simulation, may have seeded noise."""
    words = [*private_words[2:-2]]  # without `run CONFIG` and the workers
    assert "--plan.source secure" in refused("flower-app", str(tmp_path / "app"), example, *words)
    assert not (tmp_path / "app").exists()
    for good in (["--plan.source", "secure"], ["--plan.noise_multiplier", "0"]):
        assert main(["flower-app", str(tmp_path / good[-1]), example, *words, *good]) == 0


def test_files_are_named_as_seen_from_the_folder_of_the_user(
    app: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flower's processes run in a folder of their own; a real host has no such folder of the user's."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    package = app / MODULE
    monkeypatch.chdir(elsewhere)
    spec_of(package)
    assert Path.cwd() == elsewhere
    monkeypatch.setattr(sys, "path", list(sys.path))
    record = json.loads((package / "run.json").read_text())
    (package / "run.json").write_text(json.dumps(record | {"folder": str(tmp_path)}))
    spec_of(package)
    assert Path.cwd() == tmp_path and sys.path[-1] == str(tmp_path)


def greeted(app: Path, run: dict[str, Any], **node: Any) -> str:
    """What a host whose file of secrets is not there tells the server."""
    told = {"partition-id": 0, "num-partitions": 3, **node}
    order = {"what": "greet", "folder": str(app / MODULE), "node": told, "run": Place.read(app).config() | run}
    _, parts = unpacked(answer(packed(order, {"content": b"", "memory": b""})))
    return Greeting.from_bytes(parts["content"]).problem


def test_no_server_makes_a_host_with_secrets_of_its_own_talk(app: Path) -> None:
    """`flwr run --run-config` sets what it likes; an exception's text may hold what is in a host's files."""
    flower_entry._host.cache_clear()
    loopback = {"loopback": str(app.parent / "there")}
    assert str(app.parent) in greeted(app, loopback)  # the control: this machine is the only host
    for run, node in (({}, {}), ({}, {"secrets": "mine.json"}), (loopback, {"secrets": "mine.json"})):
        assert greeted(app, run, **node) == "InvalidArgument; its log says why"


def test_a_run_of_another_seed_needs_another_app(app: Path) -> None:
    """Else a server had the rounds that a client pays for once more with every seed."""
    flower_entry._host.cache_clear()
    here = {"loopback": str(app.parent / "there")}
    assert "there" in greeted(app, here | {"seed": 5})
    assert greeted(app, here | {"seed": 6}).startswith("InvalidArgument: seed=6: this app plays seed 5")
    grid: Any = None
    with pytest.raises(InvalidArgument, match="this app plays seed 5"):
        server_app(app / MODULE)(grid, Context(1, 1, {}, RecordDict(), Place.read(app).config() | {"seed": 6}))


def test_a_worker_keeps_the_hosts_of_one_run(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(flower_entry, "Host", lambda *arguments: made.append(arguments) or len(made))
    flower_entry._host.cache_clear()
    flower_entry._forget_other_runs.cache_clear()
    run, other = (tuple(sorted(Place("out", seed).config().items())) for seed in (0, 1))
    hosts = [(("partition-id", number),) for number in range(3)]
    assert [flower_entry._host("app", run, host) for host in hosts * 2] == [1, 2, 3, 1, 2, 3]
    assert flower_entry._host("app", other, hosts[0]) == 4
    assert flower_entry._host.cache_info().currsize == 1
    assert flower_entry._host("app", other, hosts[0]) == 4
    flower_entry._host.cache_clear()


LOCAL = DPPlan(1.0, 1.0, 1.0, 1e-5, place="local", sampling="full", source="secure")


@pytest.mark.parametrize(
    ("plan", "paid"),
    [
        (None, None),
        (DPPlan(1.0, 1.0, 0.5, 1e-5, source="secure"), None),  # the server adds the noise
        (replace(LOCAL, source="seeded"), None),  # a round again gives the same bits, and a resumed run needs it
        (LOCAL, 10),
        (replace(LOCAL, sample_rate=0.5, sampling="poisson", max_participations=3), 3),
        (replace(LOCAL, place="distributed", integers=IntegerNoise(least_answers=3, clients=40)), 10),
    ],
    ids=["no plan", "central", "seeded", "all rounds", "some rounds", "distributed"],
)
def test_a_client_trains_as_often_as_its_epsilon_says(plan: DPPlan | None, paid: int | None, example: str) -> None:
    config = replace(request("run", [example]).config, plan=plan)
    federation: Any = SimpleNamespace(learner=SimpleNamespace(d=8), arm=SimpleNamespace(plan=plan), clients=None)
    assert config.rounds == 10
    assert flower_entry._paid_rounds(federation, config) == paid


def test_a_host_counts_where_no_server_can_make_it_start_anew(app: Path) -> None:
    place, package = Place("out", loopback="there"), app / MODULE
    here = {"partition-id": 1}
    own = here | {"secrets": "mine.json"}
    assert flower_entry._store_folder(package, place, here, counts=True) == Path("out/hosts/1")
    assert flower_entry._store_folder(package, place, own, counts=False) == Path("out/hosts/1")
    for lying in (place, Place("out")):
        with pytest.raises(InvalidArgument, match="a folder that the server does not name"):
            flower_entry._store_folder(package, lying, own, counts=True)
        stored = flower_entry._store_folder(package, lying, own | {"store": "kept"}, counts=True)
        assert stored.parent == Path("kept")


def test_a_record_does_not_hold_the_token_of_flower(app: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = []
    monkeypatch.setattr(flower_entry, "play_run", lambda *arguments: commands.append(sys.argv))
    monkeypatch.setattr(sys, "argv", ["flwr-serverapp", "--token", "secret"])
    grid: Any = None
    server_app(app / MODULE)(grid, Context(1, 1, {}, RecordDict(), Place.read(app).config()))
    assert commands == [["flwr-serverapp"]]
    assert sys.argv == ["flwr-serverapp", "--token", "secret"]
