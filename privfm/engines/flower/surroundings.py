"""Flower's programs beside this interpreter, and the variables they run under on this machine."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from privfm.checks import require

HOST: Final = "127.0.0.1"
"""The only address on which anything listens."""

MARKER: Final = "PRIVFM_SESSION"
"""The variable that every process of a session inherits; its value is the session's alone."""

POLL_SECONDS: Final = 0.05
"""Between two looks at something that is awaited; Flower's SuperExec would look for a task once a second."""

_PROXIES = ("http_proxy", "https_proxy", "all_proxy")
_PASSED_ON = ("FLWR_LOG_LEVEL",)  # of the caller's FLWR_ variables: others may open ports or point elsewhere


def programs(simulated: bool) -> dict[str, Path]:
    """Flower's programs beside this interpreter.

    Raises:
      InvalidArgument: they are not there, or this system cannot watch over them.
    """
    watched = sys.platform == "linux" and hasattr(os, "pidfd_open")
    require(watched, f"engine='flower' starts Flower on Linux 5.3 or later, not on {sys.platform}; use engine='local'")
    names = ("flower-superlink", "flower-supernode", "flwr")
    found = {name: Path(sys.executable).parent / name for name in names}
    modules = ("flwr", "ray") if simulated else ("flwr",)
    missing = [name for name in modules if find_spec(name) is None]
    missing += [str(path) for path in found.values() if not path.is_file()]
    require(not missing, f"engine='flower' needs {', '.join(missing)}; run: pip install 'privfm[flower]'")
    return found


def environment(home: Path, marker: str, programs: Path, temporary: Path | None) -> dict[str, str]:
    """The caller's variables, without proxies and without what would move Flower or Ray elsewhere."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name.lower() not in _PROXIES
        and (not name.startswith("FLWR_") or name in _PASSED_ON)
        and name not in ("RAY_ADDRESS", "RAY_TMPDIR")
    }
    own = {
        MARKER: marker,
        # SuperExec starts `flwr-clientapp` and its like by name.
        "PATH": os.pathsep.join([str(programs), *filter(None, [os.environ.get("PATH")])]),
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": str(POLL_SECONDS),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # or a GPU that is not counted would be hidden from workers
        # Ray takes 127.0.0.1 for the node's address where no cluster is possible, and only then listens there alone.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "OMP_NUM_THREADS": "1",
        "NO_PROXY": f"{HOST},localhost",
        "no_proxy": f"{HOST},localhost",
        "PYTHONUNBUFFERED": "1",
        "PYTHONIOENCODING": "utf-8",
    }
    return kept | own | ({} if temporary is None else {"RAY_TMPDIR": str(temporary)})
