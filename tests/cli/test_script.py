"""Experiment scripts as commands."""

from pathlib import Path

import pytest

from privfm.checks import BrokenCheckpoint, InvalidArgument
from privfm.cli import command

CALLS: list[dict[str, object]] = []


def main(
    epsilons: tuple[float, ...] = (3.0, 8.0), rounds: int = 20, out: Path = Path("runs/x"), fast: bool = False
) -> None:
    """Plays all arms.

    Args:
      epsilons: of the private arms.
      rounds: of every arm.
      out: folder.
      fast: a small version.
    """
    CALLS.append({"epsilons": epsilons, "rounds": rounds, "out": out, "fast": fast})


@pytest.fixture(autouse=True)
def no_calls() -> None:
    CALLS.clear()


def test_defaults() -> None:
    command(main, [])
    assert [{"epsilons": (3.0, 8.0), "rounds": 20, "out": Path("runs/x"), "fast": False}] == CALLS


def test_options() -> None:
    command(main, ["--fast", "--epsilons", "[1,3,8]", "--out", "elsewhere"])
    assert [{"epsilons": (1.0, 3.0, 8.0), "rounds": 20, "out": Path("elsewhere"), "fast": True}] == CALLS


def test_words_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["script", "--rounds=3"])
    command(main)
    assert CALLS[0]["rounds"] == 3


def test_file_and_command_line(tmp_path: Path) -> None:
    file = tmp_path / "options.toml"
    file.write_text("rounds = 5\nfast = true\nepsilons = [2.0]\n")
    command(main, ["--rounds", "7", f"--config={file}"])
    assert [{"epsilons": (2.0,), "rounds": 7, "out": Path("runs/x"), "fast": True}] == CALLS


def test_help_and_printed_options_run_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    command(main, ["--help"])
    assert "Plays all arms." in capsys.readouterr().out
    command(main, ["--rounds", "3", "--print_config"])
    assert "rounds = 3\n" in capsys.readouterr().out
    assert CALLS == []


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--round", "3"], "no option 'round'; did you mean 'rounds'?"),
        (["3"], "unrecognized arguments: 3"),
        (["--epsilons", "[1,x]"], "epsilons: expected a list, written \"[1,2]\", got '[1,x]'"),
        (["--fast", "maybe"], "unrecognized arguments: maybe"),
        (["--config", "nowhere.toml"], "CONFIG=nowhere.toml is not a file"),
    ],
)
def test_user_errors(words: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        command(main, words)
    assert leaving.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {expected}")
    assert error.count("\n") == 1
    assert CALLS == []


@pytest.mark.parametrize(
    ("reason", "status", "line"),
    [
        (InvalidArgument("f=5 needs\nn >= 13"), 2, "error: f=5 needs n >= 13\n"),
        (BrokenCheckpoint("cut off"), 2, "error: cut off\n"),
        (KeyboardInterrupt(), 130, "interrupted; the same command goes on from the last finished round\n"),
    ],
)
def test_how_a_script_ends(reason: BaseException, status: int, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    def failing() -> None:
        raise reason

    with pytest.raises(SystemExit) as leaving:
        command(failing, [])
    assert leaving.value.code == status
    assert capsys.readouterr().err == line


def test_a_defect_keeps_its_traceback() -> None:
    def failing() -> None:
        raise ZeroDivisionError("a defect")

    with pytest.raises(ZeroDivisionError, match="a defect"):
        command(failing, [])
