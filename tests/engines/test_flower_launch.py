"""Flower on loopback: what starts, what a run tells, and that nothing stays behind, however it ends."""

import json
import os
import secrets
import signal
import socket
import ssl
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread

import pytest
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

from privfm.checks import InvalidArgument
from privfm.engines.flower import launch, surroundings
from privfm.engines.flower.app_config import toml
from privfm.engines.flower.certificates import make_certificates
from privfm.engines.flower.launch import FlowerFailed, NodeSpec, Session
from privfm.engines.flower.processes import Tree, descendants
from privfm.engines.flower.surroundings import MARKER

AWKWARD = "two \"quotes' = and\n#lines \\ é \x7f"
"""Text that Flower's own `key=value` arguments cannot carry."""

PROJECT = """
[project]
name = "tiny"
version = "0.1.0"
[tool.flwr.app]
publisher = "privfm"
[tool.flwr.app.components]
serverapp = "tiny.app:server"
clientapp = "tiny.app:client"
[tool.flwr.app.config]
out = ""
text = ""
fails = false
hangs = false
"""

APP = """
import json, time
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

client = ClientApp()
server = ServerApp()

@client.train()
def train(message, context):
    open(message.content["order"]["started"], "w").close()
    time.sleep(3600 if message.content["order"]["hangs"] else 0)
    return Message(RecordDict({"own": ConfigRecord(dict(context.node_config))}), reply_to=message)

@server.main()
def main(grid, context):
    config, got = context.run_config, []
    if config["fails"]:
        raise ArithmeticError("this ServerApp always fails")
    order = ConfigRecord({"started": config["out"] + ".started", "hangs": config["hangs"]})
    messages = [Message(RecordDict({"order": order}), node, "train") for node in grid.get_node_ids()]
    waiting = set(grid.push_messages(messages))
    while waiting:
        for reply in grid.pull_messages(waiting):
            waiting.discard(reply.metadata.reply_to_message_id)
            got.append(dict(reply.content["own"]))
        time.sleep(0.05)
    with open(config["out"], "w") as file:
        json.dump({"text": config["text"], "nodes": got}, file)
"""

OWNER = """
import signal, sys
from pathlib import Path
from privfm.engines.flower.launch import NodeSpec, Session

signal.signal(signal.SIGINT, signal.default_int_handler)  # who starts the tests in the background ignores it

folder, app = map(Path, sys.argv[1:])
session = Session.deployment(folder / "session", [NodeSpec({"number": 0})])
print(session.marker, flush=True)
with session:
    session.run(app, {"out": str(folder / "out"), "hangs": True}, timeout=300)
"""


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("app")
    (folder / "pyproject.toml").write_text(PROJECT)
    (folder / "tiny").mkdir()
    (folder / "tiny" / "__init__.py").touch()
    (folder / "tiny" / "app.py").write_text(APP)
    return folder


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    nodes = [NodeSpec({"number": number, "text": AWKWARD}) for number in range(2)]
    with Session.deployment(tmp_path_factory.mktemp("session"), nodes) as opened:
        yield opened


def processes_with(marker: str) -> dict[int, str]:
    """Command lines of all processes whose environment holds the marker, zombies not counted."""
    found = {}
    for folder in Path("/proc").iterdir():
        try:
            if f"{MARKER}={marker}".encode() in (folder / "environ").read_bytes():
                found[int(folder.name)] = command_line(int(folder.name))
        except OSError:
            continue
    return found


def command_line(process: int) -> str:
    """Empty when there is no such process, or only its exit status for a parent to ask for."""
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def wait_for(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "what was waited for has not happened"
        time.sleep(0.02)


def listening(process: int) -> set[str]:
    """Addresses, in hexadecimal digits, on which a process listens."""
    links = [str(path.readlink()) for path in Path(f"/proc/{process}/fd").iterdir() if path.is_symlink()]
    rows = [row.split() for name in ("tcp", "tcp6") for row in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return {row[1].partition(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in links}


class TestSession:
    def test_a_run_gets_its_values_and_every_node_its_own(self, session: Session, app: Path, tmp_path: Path) -> None:
        out = tmp_path / "out.json"
        summary = session.run(app, {"out": str(out), "text": AWKWARD}, timeout=300)
        told = json.loads(out.read_text())
        assert told["text"] == AWKWARD
        assert sorted(told["nodes"], key=lambda node: node["number"]) == [
            {"number": 0, "text": AWKWARD},
            {"number": 1, "text": AWKWARD},
        ]
        assert summary.received_bytes > 0

    def test_a_server_app_that_raises_fails_the_run_and_not_the_session(self, session: Session, app: Path) -> None:
        with pytest.raises(FlowerFailed, match=r"finished:failed.*this ServerApp always fails"):
            session.run(app, {"fails": True}, timeout=300)
        assert len({session.node_id(0), session.node_id(1)}) == 2

    def test_everything_listens_on_loopback_alone(self, session: Session) -> None:
        found = [addresses for process in processes_with(session.marker) if (addresses := listening(process))]
        assert len(found) == 3  # the SuperLink and two SuperNodes
        assert set.union(*found) == {"0100007F"}

    def test_a_killed_node_leaves_nothing_and_comes_back_as_another(self, session: Session) -> None:
        before = session.node_id(0)
        present = {process: command_line(process) for process in descendants(os.getpid())}
        session.kill_node(0)
        left = [line for process, line in present.items() if command_line(process)]
        ended = [line for line in present.values() if line not in left]
        for program in ("processes.py", "flower-supernode", "flower-superexec"):
            assert any(program in line for line in ended)
        assert any("flower-supernode" in line for line in left)
        assert any("flower-superlink" in line for line in left)
        session.restart_node(0)
        assert session.node_id(0) != before

    def test_bad_requests_are_refused(self, session: Session, app: Path, tmp_path: Path) -> None:
        with pytest.raises(InvalidArgument, match=r"expected a folder with a pyproject\.toml"):
            session.run(tmp_path, {}, timeout=1)
        with pytest.raises(InvalidArgument, match="did you mean 'fails'"):
            session.run(app, {"fail": True}, timeout=1)
        with pytest.raises(InvalidArgument, match="64-bit"):
            session.run(app, {"out": 2**63}, timeout=1)
        with pytest.raises(InvalidArgument, match="timeout=0"):
            session.run(app, {}, timeout=0)
        with pytest.raises(InvalidArgument, match="one of the 2 SuperNodes"):
            session.kill_node(2)


@pytest.mark.parametrize("end", ["Ctrl-C", "SIGKILL", "SIGTERM at the start"])
def test_nothing_stays_when_the_owner_is_ended(end: str, app: Path, tmp_path: Path) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, tmp_path, app],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    with owner:
        assert owner.stdout is not None
        marker = owner.stdout.readline().strip()
        if end.endswith("start"):
            wait_for(lambda: any("flower-superlink" in line for line in processes_with(marker).values()))
        else:
            wait_for((tmp_path / "out.started").exists)
            running = " ".join(command_line(process) for process in descendants(owner.pid))
            for program in ("superlink", "supernode", "superexec", "flwr run", "flwr-serverapp", "flwr-clientapp"):
                assert program in running
        below = descendants(owner.pid)
        if end == "Ctrl-C":
            os.killpg(owner.pid, signal.SIGINT)
        else:
            os.kill(owner.pid, signal.SIGKILL if end == "SIGKILL" else signal.SIGTERM)
        assert owner.wait(60) != 0
    assert below != []
    wait_for(lambda: not processes_with(marker), 10)
    assert [line for process in below if (line := command_line(process))] == []


class TestRefusals:
    """All before anything starts: not even the folder is made."""

    def test_nobody_to_take_part(self, tmp_path: Path) -> None:
        with pytest.raises(InvalidArgument, match="at least one NodeSpec"):
            Session.deployment(tmp_path / "session", [])
        with pytest.raises(InvalidArgument, match="nodes=0"):
            Session.simulation(tmp_path / "session", 0)
        assert not (tmp_path / "session").exists()

    def test_another_system(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(surroundings.sys, "platform", "darwin")
        with pytest.raises(InvalidArgument, match="not on darwin; use engine='local'"):
            Session.deployment(tmp_path / "session", [NodeSpec({})])

    def test_more_cpus_a_node_than_there_are(self, tmp_path: Path) -> None:
        with pytest.raises(InvalidArgument, match="no node could ever run"):
            Session.simulation(tmp_path / "session", 2, cpus_per_node=3, cpus=2)

    def test_values_that_flower_cannot_carry(self) -> None:
        with pytest.raises(InvalidArgument, match="'rate'"):
            NodeSpec({"rate": float("nan")})
        with pytest.raises(InvalidArgument, match="expected names"):
            NodeSpec({"": 1})

    def test_a_folder_that_cannot_be_made(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(InvalidArgument, match="file"), Session.deployment(tmp_path / "file" / "in", [NodeSpec({})]):
            pytest.fail("it has not started")

    def test_a_session_that_is_not_open(self, app: Path, tmp_path: Path) -> None:
        with pytest.raises(InvalidArgument, match="not open"):
            Session.deployment(tmp_path / "session", [NodeSpec({})]).run(app, {}, timeout=1)

    def test_without_flower_the_extra_is_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(surroundings, "find_spec", lambda name: None)
        with pytest.raises(InvalidArgument, match=r"flwr.*pip install 'privfm\[flower\]'"):
            Session.deployment(tmp_path / "session", [NodeSpec({})])


class TestAStartThatFails:
    """With a script in place of Flower's programs."""

    def fake(self, script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Session:
        program = tmp_path / "program"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o700)
        names = ("flower-superlink", "flower-supernode", "flwr")
        monkeypatch.setattr(launch, "programs", lambda simulated: dict.fromkeys(names, program))
        return Session.deployment(tmp_path / "session", [NodeSpec({})])

    def test_it_ends(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        session = self.fake("sleep 3600 & echo out of luck; exit 3", tmp_path, monkeypatch)
        with pytest.raises(FlowerFailed, match=r"ended with status 3; .*superlink\.log:\nout of luck"), session:
            pytest.fail("it has not started")
        assert processes_with(session.marker) == {}

    def test_it_hangs(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(launch, "_START_SECONDS", 0.5)
        session = self.fake("echo still here; sleep 3600", tmp_path, monkeypatch)
        with pytest.raises(FlowerFailed, match=r"takes longer than 0\.5 s to start; .*:\nstill here"), session:
            pytest.fail("it has not started")
        assert processes_with(session.marker) == {}


class TestTree:
    STRAYS = "setsid sleep 3600 & (setsid setsid sleep 3600 &) ; "
    """A process in a session of its own, and one that has lost its parent besides."""

    @pytest.fixture
    def marker(self) -> str:
        return secrets.token_hex()

    def tree(self, script: str, tmp_path: Path, marker: str) -> Tree:
        return Tree(["/bin/sh", "-c", script], tmp_path / "log", {MARKER: marker, "PATH": os.environ["PATH"]}, tmp_path)

    def sleepers(self, marker: str) -> int:
        return sum("sleep" in line and "sh -c" not in line for line in processes_with(marker).values())

    def test_strays_end_with_it(self, tmp_path: Path, marker: str) -> None:
        tree = self.tree(self.STRAYS + "sleep 3600", tmp_path, marker)
        wait_for(lambda: self.sleepers(marker) == 3)
        assert tree.ended() is None
        tree.kill()
        assert processes_with(marker) == {}
        tree.kill()

    @pytest.mark.parametrize(("last", "status"), [("exit 3", 3), ("kill -TERM $$", 128 + signal.SIGTERM)])
    def test_strays_of_a_command_that_ends_itself(self, last: str, status: int, tmp_path: Path, marker: str) -> None:
        tree = self.tree(self.STRAYS + "sleep 0.3; " + last, tmp_path, marker)
        wait_for(lambda: tree.ended() is not None)
        assert tree.ended() == status
        assert processes_with(marker) == {}
        tree.kill()

    def test_the_guard_is_killed(self, tmp_path: Path, marker: str) -> None:
        before = set(descendants(os.getpid()))
        tree = self.tree("exec sleep 3600", tmp_path, marker)
        wait_for(lambda: self.sleepers(marker) == 1)
        (guard,) = (process for process, line in processes_with(marker).items() if "processes.py" in line)
        os.kill(guard, signal.SIGKILL)
        tree.kill()
        wait_for(lambda: processes_with(marker) == {}, 10)
        assert set(descendants(os.getpid())) <= before


class TestCertificates:
    def greet(self, served: ssl.SSLContext, asked: ssl.SSLContext) -> str | None:
        with socket.create_server(("127.0.0.1", 0)) as listener:

            def answer() -> None:
                connection, _ = listener.accept()
                try:
                    served.wrap_socket(connection, server_side=True).close()
                except (ssl.SSLError, OSError):
                    connection.close()

            thread = Thread(target=answer)
            thread.start()
            try:
                with (
                    socket.create_connection(listener.getsockname()) as plain,
                    asked.wrap_socket(plain, server_hostname="127.0.0.1") as secured,
                ):
                    return secured.version()
            finally:
                thread.join()

    def test_only_the_own_authority_is_believed(self, tmp_path: Path) -> None:
        own, foreign = make_certificates(tmp_path / "own", 1), make_certificates(tmp_path / "foreign", 0)
        served = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        served.load_cert_chain(own.server, own.server_key)
        assert self.greet(served, ssl.create_default_context(cafile=own.authority)) == "TLSv1.3"
        with pytest.raises(ssl.SSLCertVerificationError):
            self.greet(served, ssl.create_default_context(cafile=foreign.authority))

    def test_node_keys_are_their_owners_alone(self, tmp_path: Path) -> None:
        made = make_certificates(tmp_path / "own", 2)
        publics = [load_ssh_private_key(path.read_bytes(), None).public_key() for path in made.nodes]
        written = [load_ssh_public_key(path.with_name(f"{path.name}.pub").read_bytes()) for path in made.nodes]
        assert publics == written
        assert publics[0] != publics[1]
        for path in [*made.nodes, made.server_key]:
            assert path.stat().st_mode & 0o077 == 0


def test_a_toml_table_is_read_as_it_was_meant() -> None:
    values = {"text": AWKWARD, "a.b": 'key with "quotes"', "count": -(2**63), "rate": 1e-300, "yes": True}
    assert tomllib.loads(toml(values)) == values
