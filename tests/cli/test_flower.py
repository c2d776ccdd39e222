"""`privfm flower-app`, `privfm flower-identity`, and what `run` and `check` say of Flower."""

import json
import stat
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from privfm.cli import main
from privfm.cli.flower_entry import spec_of
from privfm.cli.run import recorded_config, request
from privfm.contracts import KEY_HOLDER, SERVER
from privfm.engines.flower.app import MODULE, Place
from privfm.engines.flower.identities import PUBLIC, Pinned, read_secrets
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
        "run", [example, *CKKS, "--transforms", '[{"class_path":"ClientMomentum","init_args":{"beta":0.5}}]']
    )
    assert recorded_config(json.loads(json.dumps(resolved(asked.config)))) == asked.config


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
