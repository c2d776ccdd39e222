"""What every test runs under: one thread, no network, repeatable examples, and a watch over global random states."""

import os

# Before torch, tokenizers and huggingface_hub are first imported: they read these once.
os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", MPLBACKEND="agg")

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import settings

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


def global_random_states() -> dict[str, str]:
    """The state of every global generator by library, as text: NumPy and Python print theirs in full."""
    return {
        "random": repr(random.getstate()),
        "numpy": repr(np.random.get_state(legacy=False)),  # noqa: NPY002 (the legacy state is what is watched)
        "torch": repr(torch.get_rng_state().tolist()),
    }
