"""What the page on training plug-ins shows runs as it stands there, and its table of options is the code's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from privfm.defenses import Mean
from privfm.defenses.channels import Plaintext
from privfm.experiment import ArmSpec, RunConfig, play_run
from privfm.federation import Average, FixedSize
from privfm.learning import IID, SGD, Digits, ImageClassification, SmallCNN
from privfm.plugins.trainer import OPTIONS

PAGE = Path(__file__).parents[2] / "docs" / "plugins_training.md"
CONFIG = RunConfig(
    data=Digits(), model=SmallCNN(width=4), task=ImageClassification(), partition=IID(4), training=SGD(0.1),
    rule=Mean(), channel=Plaintext(), optimizer=Average(), rounds=1, cohort=FixedSize(2),
)  # fmt: skip
TEXT = PAGE.read_text(encoding="utf-8")


# As Opacus itself says, of every engine without secure_mode and of models whose inputs, the data, need no gradient.
@pytest.mark.filterwarnings("ignore:Secure RNG turned off:UserWarning")
@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
def test_its_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "results" / "first" / "plain" / "seed-7"
    play_run(run, ArmSpec("plain", "plain", "", CONFIG), 7)
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(blocks) == 6
    names: dict[str, object] = {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for block in blocks:
            exec(compile(block, PAGE.name, "exec"), names)
    assert len(list((tmp_path / "logs" / "plain").glob("*tfevents*"))) == 1
    assert "There is no differential privacy" in (run / "model" / "README.md").read_text(encoding="utf-8")


def test_its_options_are_those_that_are_refused() -> None:
    table = TEXT.partition("| option | why |")[2].partition("\n\n")[0]
    shown = {name for name in re.findall(r"`(\w+)`", table) if name not in {"at_once", "steps_before", "privacy_seed"}}
    assert len(shown) > 8
    assert shown - {"resume_from_checkpoint", "seed"} <= {name for name, _, _ in OPTIONS}
