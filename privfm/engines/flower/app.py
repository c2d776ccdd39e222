"""The folder that Flower packs and takes to every host: four short files, a run's configuration, public identities."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

from privfm.checks import require
from privfm.defenses.channels.identity_files import write_public
from privfm.engines.flower.app_config import toml

MODULE: Final = "privfm_app"
"""Name of the package inside an app folder."""

RUN: Final = "run.json"
"""Name of the file with the run's configuration."""

PUBLIC: Final = "identities"
"""Name of the folder of public identities beside it: one file a host, by any name."""

_LARGEST: Final = 10 * 1024 * 1024  # bytes of a Flower app, flwr.common.constant.FAB_MAX_SIZE

_PROJECT: Final = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "{name}"
version = "1.0.0"
description = "A federated run of privfm"
# Hosts bring their own environment: a dependency named here would be installed over what they have checked.
dependencies = []

[tool.hatch.build.targets.wheel]
packages = ["."]

[tool.flwr.app]
publisher = "privfm"

[tool.flwr.app.components]
serverapp = "{module}.server_app:app"
clientapp = "{module}.client_app:app"

[tool.flwr.app.config]
{config}
"""

_SERVER: Final = '''\
"""The server's half of the run in run.json."""

from pathlib import Path

from privfm.cli.flower_entry import server_app

app = server_app(Path(__file__).parent)
'''

_CLIENT: Final = '''\
"""The clients' half of the run in run.json."""

from pathlib import Path

from privfm.engines.flower.client import client_app

app = client_app(Path(__file__).parent)
'''


@final
@dataclass(frozen=True)
class Place:
    """Where things are, on the hosts: the app's own configuration, which `flwr run --run-config` may override.

    Attributes:
      out: folder of the run, on the server's host.
      seed: root of the run's seed tree.
      server_secrets: file with the server's identity, on the server's host.
      loopback: folder with everybody's secrets where all hosts are this machine; empty elsewhere: a SuperNode's own
        configuration then says where its secrets are.
      shared: folder of activations that all runs share, where all hosts are this machine.
    """

    out: str = ""
    seed: int = 0
    server_secrets: str = ""
    loopback: str = ""
    shared: str = ""

    def config(self) -> dict[str, str | int]:
        """As Flower writes it: names with dashes."""
        return {
            "out": self.out,
            "seed": self.seed,
            "server-secrets": self.server_secrets,
            "loopback": self.loopback,
            "shared": self.shared,
        }

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Place:
        """The inverse."""
        return cls(
            str(config["out"]),
            int(config["seed"]),
            str(config["server-secrets"]),
            str(config["loopback"]),
            str(config["shared"]),
        )

    @classmethod
    def read(cls, folder: Path) -> Place:
        """As an app's folder says it."""
        project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))
        return cls.of(project["tool"]["flwr"]["app"]["config"])

    def secrets_of(self, host: int | str) -> Path:
        """Where a host's secrets are when all hosts are this machine."""
        return Path(self.loopback, f"host-{host}.json")


def write_app(folder: Path, name: str, record: Mapping[str, Any], public: Mapping[int, bytes], place: Place) -> Path:
    """Writes an app folder for `flwr run`. Nothing in it is secret.

    Args:
      folder: a new one.
      name: of the app, in lower case.
      record: what to play, as `run.json` holds it.
      public: everybody's public identity; empty where hosts make their own and send the public halves later.
      place: defaults of the app's configuration.

    Raises:
      InvalidArgument: the folder holds something already, or the app is larger than Flower takes.
    """
    require(not folder.exists() or not any(folder.iterdir()), f"{folder} is not empty; choose a new folder")
    package = folder / MODULE
    package.mkdir(parents=True)
    project = _PROJECT.format(name=name, module=MODULE, config=toml(place.config()))
    (folder / "pyproject.toml").write_text(project, encoding="utf-8")
    (package / "__init__.py").write_text('"""A federated run of privfm."""\n', encoding="utf-8")
    (package / "server_app.py").write_text(_SERVER, encoding="utf-8")
    (package / "client_app.py").write_text(_CLIENT, encoding="utf-8")
    (package / RUN).write_text(json.dumps(record, indent=1), encoding="utf-8")
    (package / PUBLIC).mkdir()
    if public:
        write_public(package / PUBLIC / "everybody.json", public)
    size = sum(path.stat().st_size for path in package.rglob("*"))
    require(size < _LARGEST, f"the app has {size} bytes, Flower takes {_LARGEST}: fewer clients, or hosts with files")
    return folder


def read_record(package: Path) -> dict[str, Any]:
    """What `run.json` of an app's package holds."""
    record: dict[str, Any] = json.loads((package / RUN).read_text(encoding="utf-8"))
    return record
