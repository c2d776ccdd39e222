"""What every test runs under: one thread, no network, repeatable examples, and a watch over global random states."""

import os

# Before torch, tokenizers and huggingface_hub are first imported: they read these once.
os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", MPLBACKEND="agg")

import random
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

ROOT = Path(__file__).parents[1]

torch.set_num_threads(1)  # sums in one order on every machine, and no fight between worker processes

settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
settings.load_profile("repeatable")


@pytest.fixture
def untouched_random_state() -> Iterator[None]:
    """Fails the test when it left a global generator (Python's, NumPy's or torch's) in another state."""
    before = global_random_states()
    yield
    changed = [name for name, state in global_random_states().items() if state != before[name]]
    assert changed == [], "global random states have changed"


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[str], str]:
    """`checked(page)`: what `privfm check` prints of the one `privfm run` that a page shows; it has no problems."""

    def check(page: str) -> str:
        from privfm.cli import main

        monkeypatch.chdir(ROOT)
        (command,) = re.findall(r"```sh\nprivfm run (.*?)```", page, re.DOTALL)
        asked = shlex.split(command.replace("\\\n", " "))
        place = asked.index("--out")
        assert main(["check", *asked[:place], *asked[place + 2 :]]) == 0
        return capsys.readouterr().out

    return check


def global_random_states() -> dict[str, str]:
    """The state of every global generator by library, as text: NumPy and Python print theirs in full."""
    return {
        "random": repr(random.getstate()),
        "numpy": repr(np.random.get_state(legacy=False)),  # noqa: NPY002 (the legacy state is what is watched)
        "torch": repr(torch.get_rng_state().tolist()),
    }
