"""What the page on differential privacy shows runs as it stands there, and its numbers are those of the plans."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from privfm.cli import main
from privfm.defenses import DPPlan, LocalSampling
from privfm.defenses.privacy.correlated_noise import coefficients, sensitivity

PAGE = Path(__file__).parent.parent / "docs" / "differential_privacy.md"
TEXT = PAGE.read_text(encoding="utf-8")
PLAN = DPPlan(noise_multiplier=1.0, max_grad_norm=1.0, sample_rate=0.1, delta=1e-3)


def row(start: str) -> str:
    """The last cell of the table row that starts so."""
    found = [line for line in TEXT.splitlines() if line.startswith(f"| {start}")]
    assert len(found) == 1, f"{len(found)} rows start with {start!r}"
    return found[0].strip("| ").rpartition("| ")[2]


def test_its_python_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(blocks) == 7
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, PAGE.name, "exec"), names)


def test_its_command_line_has_no_problems(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(PAGE.parent.parent)
    (command,) = re.findall(r"```\n(privfm check .*?)```", TEXT, re.DOTALL)
    assert main(shlex.split(command.replace("\\\n", " "))[1:]) == 0
    assert "clients have added noise in every local step" in capsys.readouterr().out


def test_its_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\(([^)#:]+)\)", TEXT)
    assert [target for target in targets if not (PAGE.parent / target).exists()] == []


@pytest.mark.parametrize(
    ("start", "plan"),
    [
        ("Poisson, released models, zero-out", PLAN),
        ("Poisson, released models, replace-one", replace(PLAN, relation="replace-one")),
        ("the server, which knows", replace(PLAN, place="local", max_participations=10)),
        ("the same; a client joined 20", replace(PLAN, place="local", max_participations=20)),
        ("a cohort of fixed size", replace(PLAN, sampling="fixed_size")),
        ("noise 10, everybody", DPPlan(10.0, 1.0, 1.0, 1e-5, sampling="full")),
        ("20 of 200, noise 4.95", replace(PLAN, sampling="fixed_size", noise_multiplier=4.95)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_readings_of_one_noise(start: str, plan: DPPlan) -> None:
    assert float(row(start)) == pytest.approx(plan.epsilon(100), rel=2e-3)


def test_noise_for_epsilon_three() -> None:
    assert "noise of 4.95 clips where Poisson sampling needs 1.30" in TEXT
    assert PLAN.with_epsilon(3.0, 100).noise_multiplier == pytest.approx(1.30, abs=0.005)
    assert replace(PLAN, sampling="fixed_size").with_epsilon(3.0, 100).noise_multiplier == pytest.approx(4.95, abs=0.01)


def test_two_layers_accounted_as_one() -> None:
    assert replace(PLAN, noise_multiplier=1 / 2**0.5).epsilon(100) == pytest.approx(9.9, abs=0.05)


def test_own_noise_of_each_size() -> None:
    local = LocalSampling(batch_size=32, epochs=1)
    plan = DPPlan(1.0, 1.0, 1.0, 1e-5, unit="example", place="local", sampling="full", local=local)
    own = plan.with_epsilon(4.0, 10, [60, 200, 400, 1000], own_noise=True)
    assert own.local is not None
    stated = [f"{noise:.2f}" for _, noise in own.local.noise_by_examples]
    assert " ".join(stated) == "2.78 1.73 1.29 0.96"
    assert "(2.78, 1.73,\n1.29 and 0.96 clips)" in TEXT


@pytest.mark.parametrize(("bands", "stated"), [(1, 11.7), (4, 6.9), (8, 5.6)])
def test_noise_of_the_final_model_under_bands(bands: int, stated: float) -> None:
    """The noise matrix by hand: the sum over 32 rounds of C^-1 z."""
    plan = DPPlan(1.0, 1.0, 1 / 8, 1e-3, sampling="cyclic", bands=bands, max_participations=4).with_epsilon(3.0, 32)
    matrix = sum(np.diag([value] * (32 - j), -j) for j, value in enumerate(coefficients(bands)))
    scale = plan.noise_multiplier * (sensitivity(bands, 4) if bands > 1 else 1.0)
    assert np.linalg.norm(np.linalg.inv(matrix).sum(0)) * scale == pytest.approx(stated, abs=0.05)


def test_energy_of_noise_on_both_factors() -> None:
    """E|(B + N)(A + M)|^2 with B = 0 over E|N A|^2, drawn."""
    random = np.random.default_rng(0)
    a = random.normal(size=(8, 384)) / 384**0.5
    for s, stated in ((0.01, 1.04), (0.1, 4.8), (0.3, 36)):
        n, m = (s * random.normal(size=shape) for shape in ((384, 8), (8, 384)))
        assert np.sum((n @ (a + m)) ** 2) / np.sum((n @ a) ** 2) == pytest.approx(stated, rel=0.05)
