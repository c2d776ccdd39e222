"""What an import brings along, and what it needs."""

import subprocess
import sys
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[1]
HEAVY = [
    "transformers", "peft", "opacus", "tenseal", "flwr", "nvflare", "tensorboard", "sklearn", "scipy", "datasets",
    "matplotlib",
]  # fmt: skip
PLUGS = ["privfm.defenses", "privfm.attacks", "privfm.plugins"]

OUT_OF_REACH = """
import sys

class OutOfReach:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {heavy}:
            raise ImportError(f"{{name}} is out of reach")

sys.meta_path.insert(0, OutOfReach())
"""

NEWCOMERS = """
import sys
import numpy, torch
before = {{name.partition(".")[0] for name in sys.modules}}
import {module}
after = {{name.partition(".")[0] for name in sys.modules}}
print(*sorted(after - before - sys.stdlib_module_names))
print(*sorted(after.intersection({heavy})))
"""


def python(code: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a new interpreter at the root of the repository."""
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("module", PLUGS)
def test_imports_with_heavy_libraries_out_of_reach(module: str) -> None:
    result = python(OUT_OF_REACH.format(heavy=HEAVY) + f"import {module}")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("heavy", HEAVY)
def test_the_libraries_are_really_out_of_reach(heavy: str) -> None:
    result = python(OUT_OF_REACH.format(heavy=HEAVY) + f"import {heavy}")
    assert f"ImportError: {heavy} is out of reach" in result.stderr


@pytest.mark.parametrize("module", PLUGS)
def test_import_brings_nothing_beyond_torch_and_numpy(module: str) -> None:
    result = python(NEWCOMERS.format(module=module, heavy=HEAVY))
    assert result.returncode == 0, result.stderr
    newcomers, heavy = result.stdout.splitlines()
    assert newcomers == "privfm"
    assert heavy == ""


def test_base_stands_on_torch_numpy_and_the_standard_library() -> None:
    """import-linter knows deny-lists only; this is the allow-list. Imports inside functions count too."""
    graph = grimp.build_graph("privfm", include_external_packages=True, cache_dir=None)
    base = ["privfm.vectors", "privfm.randomness", "privfm.checks", "privfm.contracts"]
    modules = [*base, *graph.find_descendants("privfm.contracts")]
    used = {name for module in modules for name in graph.find_modules_directly_imported_by(module)}
    outside = {name for name in used if not name.startswith("privfm.")}
    assert outside - sys.stdlib_module_names == {"torch", "numpy"}


@pytest.mark.parametrize("name", ["attacks", "defenses"])
def test_link_at_the_root_is_a_door_not_a_package(name: str) -> None:
    result = python(f"import {name}")
    assert result.returncode != 0
    assert f"ImportError: import privfm.{name}, not {name}" in result.stderr
