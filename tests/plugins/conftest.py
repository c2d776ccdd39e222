"""State dicts of a small model with what real ones hold, and how a Hugging Face trainer runs in a test."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

State = dict[str, Tensor]


@pytest.fixture
def model() -> State:
    """Several shapes, a half-precision entry, a counter."""
    generator = Generator().manual_seed(1)
    return {
        "layer.weight": torch.randn(3, 4, generator=generator),
        "norm.num_batches_tracked": torch.tensor(5),
        "layer.bias": torch.randn(4, generator=generator, dtype=torch.float64).float(),
        "head": torch.randn(2, 1, generator=generator).bfloat16(),
        "scale": torch.tensor(0.5),
    }


@pytest.fixture
def trained(model: State) -> Callable[..., list[State]]:
    """n clients' models: the global one, and about `length` more in every float entry."""

    def make(n: int, length: float = 0.1, seed: int = 0) -> list[State]:
        generator = Generator().manual_seed(seed)
        return [
            {
                name: entry + length * torch.randn(entry.shape, generator=generator).to(entry.dtype)
                if entry.is_floating_point()
                else entry + 100 + client
                for name, entry in model.items()
            }
            for client in range(n)
        ]

    return make


@pytest.fixture
def quiet_arguments(tmp_path: Path) -> Callable[..., Any]:
    """`quiet_arguments(**options)`: a trainer's arguments; on the CPU, reports to nobody, keeps nothing."""

    def make(**options: Any) -> Any:
        from transformers import TrainingArguments

        quiet = {"output_dir": str(tmp_path / "out"), "report_to": "none", "use_cpu": True, "disable_tqdm": True}
        return TrainingArguments(**{**quiet, "save_strategy": "no", **options})

    return make
