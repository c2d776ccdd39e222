"""Server optimizers against the recursions of Reddi et al. 2021, written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from privfm.checks import InvalidArgument
from privfm.contracts import ServerOptimizer
from privfm.federation import Adam, Average, Momentum, Yogi

UPDATES = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def played(optimizer: ServerOptimizer) -> torch.Tensor:
    model = torch.zeros(4)
    state = optimizer.init(4)
    for update in UPDATES.float():
        state, model = optimizer.step(state, model, update)
    return model


def test_average() -> None:
    assert torch.allclose(played(Average(0.5)), 0.5 * UPDATES.float().sum(0))


def test_momentum() -> None:
    velocity, model = np.zeros(4), np.zeros(4)
    for update in UPDATES.numpy():
        velocity = 0.9 * velocity + update
        model += 0.3 * velocity
    assert np.allclose(played(Momentum(0.3, 0.9)), model, atol=1e-5)


@pytest.mark.parametrize("kind", [Adam, Yogi])
def test_adaptive(kind: type[Adam] | type[Yogi]) -> None:
    first, second, model = np.zeros(4), np.full(4, 0.01**2), np.zeros(4)
    for update in UPDATES.numpy():
        first = 0.9 * first + 0.1 * update
        square = update**2
        toward = second - square if kind is Adam else square * np.sign(second - square)
        second = second - 0.01 * toward
        model += 0.1 * first / (np.sqrt(second) + 0.01)
    assert np.allclose(played(kind(0.1, 0.9, 0.99, 0.01)), model, atol=1e-5)


def test_steps_are_pure() -> None:
    for optimizer in (Average(), Momentum(), Adam(), Yogi()):
        state, model = optimizer.init(4), torch.ones(4)
        kept = {name: value.clone() for name, value in state.items()}
        optimizer.step(state, model, torch.ones(4))
        assert model.tolist() == [1, 1, 1, 1]
        assert all(torch.equal(state[name], value) for name, value in kept.items())


def test_bad_arguments() -> None:
    for make in (lambda: Average(0.0), lambda: Momentum(1.0, 1.0), lambda: Adam(tau=0.0), lambda: Yogi(beta_2=1.5)):
        with pytest.raises(InvalidArgument):
            make()
