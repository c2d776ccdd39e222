"""Under what a run was made: versions, machine and the state of the source."""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import privfm


def describe_environment(device: str = "cpu", command: Sequence[str] | None = None) -> dict[str, Any]:
    """What `env.json` holds.

    Args:
      device: torch's name of the device that trains.
      command: the command line; `sys.argv` by default.

    Returns:
      `privfm` (version), `python`, `platform`, `cpu_count`, `torch_threads`, `device`, `device_name`, `versions`
      (declared dependencies that are installed), `git` (`commit` and `dirty`, or None outside a checkout), `command`.
      No time of day: two runs under the same conditions have the same record.
    """
    import torch

    return {
        "privfm": privfm.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "device": device,
        "device_name": torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.machine(),
        "versions": installed_versions(),
        "git": git_state(Path(privfm.__file__).parent),
        "command": shlex.join(sys.argv if command is None else command),
    }


def installed_versions() -> dict[str, str]:
    """Versions of the installed packages that privfm's metadata asks for; what serves development only is left out."""
    try:
        requirements = metadata.requires("privfm") or []
    except metadata.PackageNotFoundError:  # run from a copied source tree: the metadata is not there
        return {}
    declared = [text for text in requirements if not re.search(r"extra\s*==\s*['\"]dev['\"]", text)]
    names = sorted({match[0] for text in declared if (match := re.match(r"[\w.-]+", text))})
    return {name: version for name in names if (version := _version(name))}


def git_state(folder: Path) -> dict[str, str | bool] | None:
    """Commit of the checkout that tracks `folder`, and whether tracked or new files differ from it.

    None where the folder is not tracked: an environment inside someone else's checkout says nothing about privfm.
    """
    tracked = _git(folder, "ls-files", "--error-unmatch", ".")
    commit = _git(folder, "rev-parse", "HEAD")
    changes = _git(folder, "status", "--porcelain")
    if not tracked or not commit or changes is None:
        return None
    return {"commit": commit, "dirty": bool(changes)}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _git(folder: Path, *arguments: str) -> str | None:
    """Output of a git command that writes nothing, or None where git or the checkout is missing."""
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
