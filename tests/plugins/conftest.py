"""State dicts of a small model with what real ones hold: several shapes, a half-precision entry, a counter."""

from collections.abc import Callable

import pytest
import torch
from torch import Generator, Tensor

State = dict[str, Tensor]


@pytest.fixture
def model() -> State:
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
