"""Starts and stops Flower on this machine: one SuperLink, its SuperNodes, and runs of an app on them.

Everything listens on 127.0.0.1, keeps its files in one folder, and ends with the session or with the process that
opened it (see `processes`). Nothing is fetched: no telemetry, no update check, no `uv sync` of an app's dependencies.
Flower asks nobody on 127.0.0.1 who they are: on a machine shared with others, they could run an app as this user.
Real hosts are started by their owners: see `docs/flower_deployment.md`.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import socket
import ssl
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Self, final
from urllib.request import HTTPSHandler, ProxyHandler, build_opener

from privfm.checks import FlowerFailed, at_least, non_negative, positive, require
from privfm.engines.flower.app_config import Scalar, check_app, check_config, toml
from privfm.engines.flower.certificates import Certificates, make_certificates
from privfm.engines.flower.processes import Tree, kill_marked
from privfm.engines.flower.surroundings import HOST, MARKER, POLL_SECONDS, environment, programs
from privfm.files import writable

_CONNECTION = "session"  # the name of the SuperLink in Flower's own configuration file
_START_SECONDS = 180.0  # for what takes 2 to 11 s
_FORGOTTEN_SECONDS = 90.0  # for a killed SuperNode to be given up, which takes at most 60 s
_TAIL_LINES = 25
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


@final
@dataclass(frozen=True)
class NodeSpec:
    """One SuperNode.

    Args:
      config: what its ClientApp finds in `context.node_config`.
    """

    config: Mapping[str, Scalar]

    def __post_init__(self) -> None:
        check_config("config", self.config)


@final
@dataclass(frozen=True)
class RunSummary:
    """What the SuperLink says about a run that completed.

    Attributes:
      number: Flower's number of the run.
      seconds: from the start of the ServerApp to its end.
      received_bytes: what the SuperLink took in; a simulation has no such traffic: 0,
      sent_bytes: and gave out.
    """

    number: int
    seconds: float
    received_bytes: int
    sent_bytes: int


@final
class Session:
    """One SuperLink with its SuperNodes on 127.0.0.1, a context manager; made by `simulation` or `deployment`.

    | event | what happens |
    |---|---|
    | the block ends, by whatever exception, Ctrl-C too | every process of the session is killed |
    | this process ends, SIGTERM and SIGKILL too | the same, by the guards |
    | a SuperNode ends by itself | the run goes on: a drop-out |
    | the SuperLink ends by itself | `run` raises `FlowerFailed` |
    | a run takes longer than its `timeout` | `run` raises `FlowerFailed` and the session is closed |

    Attributes:
      folder: its private folder: `superlink.log`, `supernode-0.log`, `run-1.log`, Flower's own files in `home`.
      marker: value of the variable `PRIVFM_SESSION` in all its processes.

    Cost, on two busy cores: 6 to 11 s to start, 19 s with `tls`; 10 to 20 s a run beside what its messages take.
    """

    def __init__(
        self, folder: Path, nodes: Sequence[NodeSpec], simulated: Mapping[str, Scalar] | None, tls: bool
    ) -> None:
        self.folder = folder.absolute()
        self.marker = secrets.token_hex(16)
        self._specs, self._simulated, self._tls = tuple(nodes), simulated, tls
        self._programs = programs(simulated is not None)
        self._link: Tree | None = None
        self._nodes: list[Tree] = []
        self._ports: list[socket.socket] = []
        self._starts = count(1)
        self._runs = count(1)
        self._temporary: Path | None = None
        self._certificates: Certificates | None = None
        self._environment: dict[str, str] = {}
        self._open = False

    @classmethod
    def simulation(
        cls,
        folder: Path,
        nodes: int,
        cpus_per_node: int = 1,
        *,
        gpus_per_node: float = 0.0,
        cpus: int | None = None,
    ) -> Self:
        """A SuperLink that plays all nodes itself, on Ray, in as many processes as fit.

        Args:
          folder: its private folder; made when it starts.
          nodes: how many SuperNodes it plays; a ClientApp finds `partition-id` in its `context.node_config`.
          cpus_per_node: of one node while it works: `cpus // cpus_per_node` work at a time.
          gpus_per_node: likewise; a fraction shares one.
          cpus: how many Ray may use; all of this machine without.

        Raises:
          InvalidArgument: a number is too small, more than there is, or Flower's `simulation` extra is not installed.
        """
        at_least("nodes", nodes, 1)
        at_least("cpus_per_node", cpus_per_node, 1)
        non_negative("gpus_per_node", gpus_per_node)
        available = os.cpu_count() or 1 if cpus is None else cpus
        at_least("cpus", available, 1)
        # Flower itself would wait for the missing ones for ever.
        require(
            cpus_per_node <= available,
            f"cpus_per_node={cpus_per_node}: expected at most cpus={available}; no node could ever run",
        )
        options = {
            "num-supernodes": nodes,
            "client-resources-num-cpus": cpus_per_node,
            "client-resources-num-gpus": float(gpus_per_node),
            "init-args-num-cpus": available,
        }
        return cls(folder, (), options, tls=False)

    @classmethod
    def deployment(cls, folder: Path, nodes: Sequence[NodeSpec], *, tls: bool = False) -> Self:
        """A SuperLink and SuperNodes in processes of their own, as on real hosts.

        Args:
          folder: its private folder; made when it starts. Logs and settings that are there already are replaced.
          nodes: the SuperNodes.
          tls: encrypt, and let only SuperNodes with a registered key take part: a restarted one keeps its node id.
            Keys and certificates are made in `folder`. About 8 s more to start.

        Raises:
          InvalidArgument: no nodes, or Flower is not installed.
        """
        require(len(nodes) > 0, "nodes=[]: expected at least one NodeSpec; a federation needs somebody to take part")
        return cls(folder, nodes, None, tls)

    def __enter__(self) -> Self:
        require(not self._open, "this session is open already; make another")
        self._open = True
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Kills every process of the session and returns when none is left. May be called again."""
        trees = [*self._nodes, *([self._link] if self._link else [])]
        for tree in trees:
            tree.ask_to_end()
        for tree in trees:
            tree.kill()
        kill_marked(MARKER, self.marker)
        self._link, self._nodes, self._open = None, [], False
        while self._ports:
            self._ports.pop().close()
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)

    def run(self, app: Path, config: Mapping[str, Scalar], timeout: float) -> RunSummary:
        """Runs an app on this session and waits for its end.

        Args:
          app: its folder, with a `pyproject.toml`.
          config: values that replace those of the app's `[tool.flwr.app.config]`.
          timeout: seconds the whole run may take.

        Raises:
          InvalidArgument: no such folder, or `config` names what the app's configuration has not.
          FlowerFailed: the run could not start, its ServerApp raised, or it took too long; the session stays open, but
            for the last.
        """
        positive("timeout", timeout)
        require(self._open, "this session is not open; use it in a `with` block")
        check_config("config", config)
        check_app(app, config)
        number = next(self._runs)
        values = self.folder / f"run-{number}.toml"
        values.write_text(toml(config), encoding="utf-8")
        order = ["run", str(app.absolute()), _CONNECTION, "--stream", "--run-config", str(values)]
        if self._simulated is not None:
            order += ["--federation-config", " ".join(f"{key}={value}" for key, value in self._simulated.items())]
        text = self._flwr(order, f"run-{number}", timeout)
        started = re.search(r"Successfully started run (\d+)", text)
        if started is None:
            raise FlowerFailed(f"Flower did not say which run it has started:\n{_tail(text)}")
        return self._summary(int(started[1]), number, text)

    def kill_node(self, index: int) -> None:
        """Kills a SuperNode and what it runs, as a crash would: the SuperLink is not told.

        For 38 to 60 s Flower still counts it among the nodes; then what it was asked is answered by error code 5.

        Args:
          index: its place among the `nodes` of a deployment.
        """
        self._check_node(index)
        self._nodes[index].kill()

    def restart_node(self, index: int) -> None:
        """Kills a SuperNode if it runs, starts it again, and waits until it takes part.

        Its memory (`context.state`) is lost. It has another node id; with `tls` the same, but it is let in only when
        the SuperLink has noticed that the former one is gone, up to 60 s after that one's last sign of life.
        """
        self.kill_node(index)
        end = time.monotonic() + _FORGOTTEN_SECONDS
        while True:
            self._nodes[index] = self._start_node(index, f"-{next(self._starts)}")
            try:
                self._await_node(index)
                return
            except FlowerFailed:
                # The SuperLink lets nobody in with a key that is in use, and has not noticed that it no longer is.
                if self._certificates is None or time.monotonic() > end:
                    raise

    def node_id(self, index: int) -> int:
        """Flower's number of a SuperNode, as `grid.get_node_ids()` lists it."""
        self._check_node(index)
        return self._await_node(index)

    def _check_node(self, index: int) -> None:
        require(self._open, "this session is not open; use it in a `with` block")
        require(
            0 <= index < len(self._nodes),
            f"index={index}: expected one of the {len(self._nodes)} SuperNodes; a simulation has none of its own",
        )

    def _start(self) -> None:
        home = self.folder / "home"
        with writable(self.folder):
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            home.mkdir(mode=0o700, exist_ok=True)
        if self._simulated is not None:
            # Ray puts sockets there, and their paths must be short.
            self._temporary = Path(tempfile.mkdtemp(prefix="privfm-"))
        self._environment = environment(home, self.marker, self._programs["flwr"].parent, self._temporary)
        self._environment["XDG_RUNTIME_DIR"] = str(home)  # workers' sockets and logs: gone with the session
        if self._tls:
            self._certificates = make_certificates(self.folder / "certificates", len(self._specs))
        link = self._reserve_port()
        connection: dict[str, Scalar] = {"address": f"{HOST}:{link}"}
        if self._certificates is None:
            connection["insecure"] = True
        else:
            connection["root-certificates"] = str(self._certificates.authority)
        content = f'[superlink]\ndefault = "{_CONNECTION}"\n\n[superlink.{_CONNECTION}]\n{toml(connection)}'
        (home / "config.toml").write_text(content, encoding="utf-8")
        self._start_link(link)
        if self._certificates:
            for index, key in enumerate(self._certificates.nodes):
                order = ["supernode", "register", f"{key}.pub", _CONNECTION]
                self._flwr(order, f"register-{index}", _START_SECONDS)
        for index in range(len(self._specs)):
            self._reserve_port()
            self._nodes.append(self._start_node(index))
        for index in range(len(self._specs)):
            self._await_node(index)

    def _reserve_port(self) -> int:
        """A free port that stays ours: bound here without listening, so that only an explicit request may share it."""
        reserved = socket.socket()
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind((HOST, 0))
        self._ports.append(reserved)
        return int(reserved.getsockname()[1])

    def _start_link(self, port: int) -> None:
        order = ["--host", HOST, "--port", str(port), "--disable-runtime-dependency-installation"]
        if self._simulated is not None:
            order.append("--simulation")
        if self._certificates is None:
            order.append("--insecure")
        else:
            order += ["--ssl-ca-certfile", str(self._certificates.authority), "--enable-supernode-auth"]
            order += ["--ssl-certfile", str(self._certificates.server)]
            order += ["--ssl-keyfile", str(self._certificates.server_key)]
        self._link = self._tree("flower-superlink", order, "superlink")
        _wait(self._link, _health(port, self._certificates), "the SuperLink", _START_SECONDS)

    def _start_node(self, index: int, again: str = "") -> Tree:
        link, own = (self._ports[place].getsockname()[1] for place in (0, 1 + index))
        values = self.folder / f"supernode-{index}.toml"
        values.write_text(toml(self._specs[index].config), encoding="utf-8")
        order = ["--superlink", f"{HOST}:{link}", "--host", HOST, "--port", str(own), "--node-config", str(values)]
        if self._certificates is None:
            order.append("--insecure")
        else:
            order += ["--root-certificates", str(self._certificates.authority)]
            order += ["--auth-supernode-private-key", str(self._certificates.nodes[index])]
        return self._tree("flower-supernode", order, f"supernode-{index}{again}")

    def _await_node(self, index: int) -> int:
        """Waits until a SuperNode takes part; its node id."""
        tree = self._nodes[index]
        number = re.compile(r"SuperNode ID: (\d+)")
        _wait(tree, lambda: number.search(_read(tree.log)) is not None, f"SuperNode {index}", _START_SECONDS)
        found = number.search(_read(tree.log))
        if found is None:
            raise FlowerFailed(f"{tree.log} was cut while SuperNode {index} ran; its node id is lost")
        return int(found[1])

    def _tree(self, program: str, order: Sequence[str], log: str) -> Tree:
        path = self.folder / f"{log}.log"
        return Tree([str(self._programs[program]), *order], path, self._environment, self.folder)

    def _flwr(self, order: Sequence[str], log: str, timeout: float) -> str:
        """What one `flwr` command prints. Closes the session when it takes too long."""
        command = f"flwr {' '.join(order[:2])}"
        tree = self._tree("flwr", order, log)
        try:
            end = time.monotonic() + timeout
            while (status := tree.ended()) is None:
                if self._link is not None and self._link.ended() is not None:
                    raise FlowerFailed(f"the SuperLink ended during `{command}`:\n{_tail(_read(self._link.log))}")
                if time.monotonic() > end:
                    text = _tail(_read(tree.log))
                    self.close()
                    raise FlowerFailed(f"`{command}` did not end within timeout={timeout} s; closed:\n{text}")
                time.sleep(POLL_SECONDS)
        finally:
            tree.kill()
        text = _read(tree.log)
        if status != 0:
            raise FlowerFailed(f"`{command}` ended with status {status}:\n{_tail(text)}")
        return text

    def _summary(self, flower: int, number: int, text: str) -> RunSummary:
        """Asks how a run has ended: `flwr run` itself returns 0 when the ServerApp has raised."""
        order = ["ls", _CONNECTION, "--run-id", str(flower), "--format", "json"]
        answer = self._flwr(order, f"run-{number}-end", _START_SECONDS)
        try:
            (run,) = json.loads(answer[answer.index("{") :])["runs"]
            status, details, traffic = run["status"], run["status-details"], run["network-traffic"]
            summary = RunSummary(flower, run["elapsed"], traffic["inbound-bytes"], traffic["outbound-bytes"])
        except (ValueError, KeyError, TypeError) as error:
            raise FlowerFailed(f"Flower does not say how run {flower} has ended:\n{_tail(answer)}") from error
        if status != "finished:completed":
            raise FlowerFailed(f"run {flower} on Flower is {status}: {details}\n{_tail(text)}")
        return summary


def _health(port: int, certificates: Certificates | None) -> Callable[[], bool]:
    """A question to the SuperLink: are you there?"""
    context = ssl.create_default_context(cafile=certificates.authority) if certificates else None
    opener = build_opener(ProxyHandler({}), HTTPSHandler(context=context))
    address = f"{'https' if certificates else 'http'}://{HOST}:{port}/health"

    def answers() -> bool:
        with suppress(OSError), opener.open(address, timeout=5) as reply:
            return bool(reply.status == 200)
        return False

    return answers


def _wait(tree: Tree, ready: Callable[[], bool], what: str, seconds: float) -> None:
    """Returns when `ready`.

    Raises:
      FlowerFailed: the process has ended instead, or takes too long.
    """
    end = time.monotonic() + seconds
    while not ready():
        status = tree.ended()
        if status is not None or time.monotonic() > end:
            reason = f"takes longer than {seconds:g} s to start" if status is None else f"ended with status {status}"
            raise FlowerFailed(f"{what} {reason}; {tree.log}:\n{_tail(_read(tree.log))}")
        time.sleep(POLL_SECONDS)


def _read(log: Path) -> str:
    """A log so far, without colours."""
    return _COLOURS.sub("", log.read_text(encoding="utf-8", errors="replace"))


def _tail(text: str) -> str:
    return "\n".join(text.rstrip().splitlines()[-_TAIL_LINES:])
