"""The program itself: its help, its version, and how soon they come."""

import subprocess
import sys
from collections.abc import Callable

import pytest

import privfm
from privfm.cli import main
from privfm.cli.commands import COMMANDS

HEAVY = {"torch", "numpy", "transformers", "peft", "tenseal", "opacus", "sklearn", "scipy", "datasets", "matplotlib"}


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    for name, (_, purpose) in COMMANDS.items():
        assert f"  {name:<17}{purpose}\n" in out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"usage: privfm {command}")


def test_module_runs_and_knows_the_version() -> None:
    done = subprocess.run([sys.executable, "-m", "privfm", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"privfm {privfm.__version__}\n"


def test_help_and_version_import_nothing_heavy() -> None:
    code = f"""
import sys
from privfm.cli import main
assert (main(["--help"]), main(["--version"]), main(["rum"])) == (0, 0, 2)
print(*sorted({HEAVY!r} & set(sys.modules)), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines() == ["error: COMMAND='rum' is not known; did you mean 'run'?", ""]


def test_command_is_missing(refused: Callable[..., str]) -> None:
    assert "one of run, check, report" in refused()
