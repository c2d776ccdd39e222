"""Linter, formatting, types and import contracts, so that a plain `pytest` shows all there is to fix."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYTHON_M = [sys.executable, "-m"]
LINT_IMPORTS = "from importlinter.cli import lint_imports_command; lint_imports_command()"  # it knows no `-m`


@pytest.mark.parametrize(
    "command",
    [
        pytest.param([*PYTHON_M, "mypy"], id="types"),
        pytest.param([*PYTHON_M, "ruff", "check", "."], id="lint"),
        pytest.param([*PYTHON_M, "ruff", "format", "--check", "."], id="format"),
        pytest.param([sys.executable, "-c", LINT_IMPORTS, "--no-logo"], id="imports"),
    ],
)
def test_quality(command: list[str]) -> None:
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"\n{result.stdout}{result.stderr}"
