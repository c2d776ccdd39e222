"""One small private run that the tests of records read, and what a command prints."""

from collections.abc import Callable
from pathlib import Path

import pytest

from privfm.cli import main

EXAMPLE = Path(__file__).parents[2] / "docs" / "example.toml"

PLAN = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "sample_rate": 0.2, "delta": 1e-3}
PRIVATE = ["--rule", "Mean", "--attack", "null", "--malicious_share", "0", "--cohort", "null"]
PRIVATE += [word for name, value in PLAN.items() for word in (f"--plan.{name}", str(value))]


@pytest.fixture(scope="session")
def example() -> str:
    """The configuration in docs."""
    return str(EXAMPLE)


@pytest.fixture(scope="session")
def private_words() -> list[str]:
    """The command line of the private run, but for its folder."""
    return ["run", str(EXAMPLE), "--rounds", "2", *PRIVATE, "--workers", "1"]


@pytest.fixture(scope="session")
def private_experiment(private_words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished experiment with one run of two rounds under a plan."""
    out = tmp_path_factory.mktemp("runs") / "private"
    assert main([*private_words, "--out", str(out)]) == 0
    return out


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must end with one error line and status 2, and returns the line."""

    def run(*argv: str) -> str:
        status = main(argv)
        captured = capsys.readouterr()
        assert status == 2
        assert captured.out == ""
        assert captured.err.startswith("error: ")
        assert captured.err.count("\n") == 1
        return captured.err.removeprefix("error: ").rstrip("\n")

    return run
