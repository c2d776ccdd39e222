"""`privfm doctor`: what it finds here, and what it says where something is missing or broken."""

from pathlib import Path

import pytest

from privfm.checks import InvalidArgument
from privfm.cli import doctor as module
from privfm.cli import main
from privfm.cli.doctor import Finding, package, worked


def test_everything_works_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines[:-1] if not line.startswith("ok ")] == []
    found = {line.split()[1] for line in lines}
    assert {"torch", "tenseal", "jsonargparse", "computation", "encryption", "minilm", "docstrings"} <= found
    assert any("epsilon 4.377178 for sigma 1 and delta 1e-5" in line for line in lines)
    assert lines[-1] == "everything that is needed works"


def test_doctor_takes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "extra"]) == 2
    assert capsys.readouterr().err == "error: unrecognized arguments: extra\n"


def test_what_is_missing_comes_with_the_command() -> None:
    assert package("no-such-thing[extra]>=2", None) == Finding(
        "missing", "no-such-thing", "pip install 'no-such-thing[extra]>=2'", needed=True
    )
    assert package("no-such-thing", "demo") == Finding(
        "missing", "no-such-thing (demo)", "pip install 'privfm[demo]'", needed=False
    )


def test_what_is_too_old_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", {"torch": "2.9.1+cpu"}.__getitem__)
    assert package("torch>=2.9", None).verdict == "ok"
    assert package("torch>=2.10", None) == Finding(
        "broken", "torch", "2.9.1+cpu, expected 2.10 or newer: pip install 'torch>=2.10'", needed=True
    )


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        (ModuleNotFoundError("No module named 'tenseal'"), Finding("missing", "x", "No module named 'tenseal'", True)),
        (InvalidArgument("needs a package"), Finding("missing", "x", "needs a package", True)),
        (RuntimeError("1+3 gave\n5"), Finding("broken", "x", "RuntimeError: 1+3 gave 5", True)),
    ],
)
def test_a_check_that_fails(reason: Exception, expected: Finding) -> None:
    def check() -> str:
        raise reason

    assert worked("x", check, needed=True) == expected


@pytest.mark.parametrize(("needed", "status"), [(True, 1), (False, 0)])
def test_only_what_is_needed_decides(
    needed: bool, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "_examine", lambda: iter([Finding("missing", "x", "pip install x", needed)]))
    assert main(["doctor"]) == status
    assert capsys.readouterr().out.startswith("missing  x")


def test_wrong_arithmetic_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EPSILON", 4.0)
    assert worked("privacy accounting", module._accounting, needed=True).verdict == "broken"
