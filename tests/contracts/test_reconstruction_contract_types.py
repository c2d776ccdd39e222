"""What a curious server holds, and what every reconstruction attack keeps to."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, final

import pytest
import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy

from privfm.checks import InvalidArgument
from privfm.contracts import (
    Declared,
    LocalSteps,
    Observation,
    Reconstruction,
    ReconstructionAttack,
    Watch,
    gradients_of,
)


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def sent(model: nn.Module) -> dict[str, Tensor]:
    return {name: torch.ones_like(one) for name, one in model.named_parameters()}


# ---------------------------------------------------------------------------------------------------- observation


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"0.wieght": torch.ones(4, 3)}, r"'0\.wieght' is no parameter of the model; did you mean '0\.weight'\?"),
        (
            {"zzz": torch.ones(1)},
            r"'zzz' is no parameter of the model.* \(names are those of model\.named_parameters\(\)\)",
        ),
        ({"0.weight": torch.ones(3, 4)}, r"0\.weight has shape \(3, 4\), the model's is \(4, 3\)"),
        ({"0.bias": torch.ones(4, dtype=torch.int64)}, r"0\.bias is torch\.int64: expected a float type"),
        ({"0.bias": torch.full((4,), torch.inf)}, r"0\.bias is not finite; what the server does not see is NaN"),
        ({"0.bias": torch.full((4,), -torch.inf)}, r"not finite"),
    ],
)
def test_tensors_must_be_the_models(change: dict[str, Tensor], words: str) -> None:
    model = network()
    with pytest.raises(InvalidArgument, match=words):
        Observation(model, {**sent(model), **change})


def test_an_observation_of_nothing_is_refused_and_of_a_part_is_not() -> None:
    model = network()
    with pytest.raises(InvalidArgument, match="at least one named tensor"):
        Observation(model, {})
    with pytest.raises(InvalidArgument, match="clients=0"):
        Observation(model, sent(model), clients=0)
    hidden = torch.full((4,), torch.nan)
    part = Observation(model, {"0.bias": hidden})
    assert list(part.gradients) == ["0.bias"] and bool(part.gradients["0.bias"].isnan().all())


def test_tensors_are_not_printed() -> None:
    model = network()
    assert "tensor(" not in repr(Observation(model, sent(model))) and "Linear" not in repr(
        Observation(model, sent(model))
    )


@pytest.mark.parametrize("steps", [1, 3])
def test_gradients_of_a_change_by_gradient_descent(steps: int) -> None:
    """Their mean over the steps, by taking the steps."""
    model, moved = network(), network()
    inputs = torch.randn(5, 3, generator=Generator().manual_seed(1), dtype=torch.float64)
    labels = torch.tensor([0, 1, 1, 0, 1])
    optimizer = torch.optim.SGD(moved.parameters(), lr=0.3)
    total = {name: torch.zeros_like(one) for name, one in model.named_parameters()}
    for _ in range(steps):
        optimizer.zero_grad()
        cross_entropy(moved(inputs), labels).backward()  # type: ignore[no-untyped-call]
        for name, one in moved.named_parameters():
            assert one.grad is not None
            total[name] += one.grad / steps
        optimizer.step()
    start = dict(model.named_parameters())
    change = {name: (one - start[name]).detach() for name, one in moved.named_parameters()}
    observation = Observation(model, change, LocalSteps(learning_rate=0.3, steps=steps))
    for name, expected in total.items():
        torch.testing.assert_close(observation.gradients[name], expected)
    assert observation.tensors["0.weight"] is change["0.weight"]  # what was sent stays what it was


def test_gradients_are_the_tensors_where_gradients_were_sent() -> None:
    model = network()
    tensors = sent(model)
    assert Observation(model, tensors).gradients is tensors


def test_a_change_by_adam_is_no_gradient() -> None:
    model = network()
    observation = Observation(model, sent(model), LocalSteps(0.1, optimizer="adam"))
    with pytest.raises(
        InvalidArgument, match=r"optimizer='adam'.* this attack needs gradients or plain gradient descent"
    ):
        _ = observation.gradients


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"learning_rate": 0.0}, "learning_rate=0"),
        ({"learning_rate": math.nan}, "learning_rate=nan"),
        ({"learning_rate": 0.1, "steps": 0}, "steps=0"),
        ({"learning_rate": 0.1, "batch_size": 0}, "batch_size=0"),
        ({"learning_rate": 0.1, "optimizer": "adma"}, "optimizer='adma' is not known; did you mean 'adam'"),
    ],
)
def test_local_steps_are_checked(given: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        LocalSteps(**given)


def test_declared_knowledge_is_checked() -> None:
    with pytest.raises(InvalidArgument, match="examples=0"):
        Declared(examples=0)
    with pytest.raises(InvalidArgument, match="noise=-1"):
        Declared(noise=-1)


def test_told_adds_knowledge_and_leaves_the_observation() -> None:
    model = network()
    first = Observation(model, sent(model), clients=3).told(noise=0.5)
    more = first.told(examples=4)
    assert more.declared == Declared(examples=4, noise=0.5) and first.declared == Declared(noise=0.5)
    assert more.tensors is first.tensors and more.model is model and more.clients == 3
    assert more.told(examples=None).declared == first.declared
    with pytest.raises(TypeError):
        more.told(exmaples=4)
    with pytest.raises(InvalidArgument, match="examples=-1"):
        more.told(examples=-1)


def test_gradients_of_a_loss_are_autograds() -> None:
    model: Any = network()
    model[0].bias.requires_grad_(False)
    model.unused = nn.Linear(2, 2).double()
    inputs = torch.randn(4, 3, generator=Generator().manual_seed(2), dtype=torch.float64)
    found = gradients_of(model, model[2](model[1](model[0](inputs))).square().sum())
    assert set(found) == {"0.weight", "2.weight", "2.bias"}  # frozen, and not reached: left out
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(one.requires_grad for one in found.values())
    # d/dW2 of sum (W2 h + b)^2 = 2 sum (W2 h + b) h^T, by hand.
    hidden = (inputs @ model[0].weight.T + model[0].bias).tanh().detach()
    output = (hidden @ model[2].weight.T + model[2].bias).detach()
    torch.testing.assert_close(found["2.weight"], 2 * output.T @ hidden)
    torch.testing.assert_close(found["2.bias"], 2 * output.sum(0))


# ---------------------------------------------------------------------------------------------------------- watch


def test_a_watch_without_a_limit_never_ends() -> None:
    watch = Watch()
    assert not watch.over and watch.stopped == "" and watch.seconds >= 0
    watch.tell("nobody listens", 0.5)


def test_a_watch_ends_when_its_time_is_up() -> None:
    watch = Watch(0.02)
    assert not watch.over
    before = watch.seconds
    time.sleep(0.03)
    assert watch.over and watch.stopped == "time limit of 0.02 s" and watch.seconds > before


@pytest.mark.parametrize("seconds", [0, -1, math.nan])
def test_no_time_at_all_is_refused(seconds: float) -> None:
    with pytest.raises(InvalidArgument, match=f"seconds={seconds}: expected a number > 0"):
        Watch(seconds)


def test_a_watch_passes_on_shares_between_0_and_1() -> None:
    heard: list[tuple[str, float]] = []
    watch = Watch(progress=lambda what, share: heard.append((what, share)))
    for share in (-1, 0.25, 7):
        watch.tell("searching", share)
    assert heard == [("searching", 0.0), ("searching", 0.25), ("searching", 1.0)]


# --------------------------------------------------------------------------------------------------------- attack


@final
@dataclass(frozen=True)
class Drawing(ReconstructionAttack):
    """Draws a token, from its own generator and from the global one; refuses sums of clients."""

    calls: list[int] = field(default_factory=list)

    @property
    def needs(self) -> tuple[str, ...]:
        return ("nothing",)

    def refusal(self, observation: Observation) -> str:
        return "a sum hides it; send it alone" if observation.clients > 1 else ""

    def reconstruct(self, rounds: Sequence[Observation], watch: Watch, generator: Generator) -> Reconstruction:
        self.calls.append(len(rounds))
        watch.tell("drawing", 1.0)
        torch.rand(3)
        time.sleep(0.01)
        token = int(torch.randint(10**9, (1,), generator=generator))
        return Reconstruction(tokens=frozenset({token}), used=("examples",), stopped=watch.stopped, seconds=-1.0)


@final
@dataclass(frozen=True)
class Several(ReconstructionAttack):
    """Takes rounds together and says how many."""

    several_rounds = True

    @property
    def needs(self) -> tuple[str, ...]:
        return ()

    def refusal(self, observation: Observation) -> str:
        return "a sum hides it" if observation.clients > 1 else ""

    def reconstruct(self, rounds: Sequence[Observation], watch: Watch, generator: Generator) -> Reconstruction:
        return Reconstruction(facts={"rounds": len(rounds), "first": float(rounds[0].declared.noise)})


def test_a_refusal_comes_before_any_work() -> None:
    model, attack = network(), Drawing()
    with pytest.raises(InvalidArgument, match=r"^Drawing: a sum hides it; send it alone$"):
        attack(Observation(model, sent(model), clients=2))
    with pytest.raises(InvalidArgument, match="Drawing: expected at least one observation"):
        attack([])
    with pytest.raises(InvalidArgument, match="Drawing takes one round, got 2; call it for each"):
        attack([Observation(model, sent(model))] * 2)
    with pytest.raises(InvalidArgument, match="seconds=0"):
        attack(Observation(model, sent(model)), seconds=0)
    assert attack.calls == []
    attack([Observation(model, sent(model))])
    assert attack.calls == [1]


def test_rounds_go_together_where_the_attack_can_and_each_is_asked_about() -> None:
    model = network()
    rounds = [Observation(model, sent(model)).told(noise=float(number)) for number in (3, 4, 5)]
    assert Several()(rounds).facts == {"rounds": 3, "first": 3.0}
    with pytest.raises(InvalidArgument, match="Several: a sum hides it"):
        Several()([*rounds, Observation(model, sent(model), clients=2)])


def test_chance_is_the_generators_alone() -> None:
    model = network()
    observation = Observation(model, sent(model))
    state = torch.get_rng_state()
    one, again = Drawing()(observation), Drawing()(observation)
    assert one.tokens == again.tokens  # seeded with 0 when none is given
    assert one.tokens == Drawing()(observation, generator=Generator().manual_seed(0)).tokens
    assert one.tokens != Drawing()(observation, generator=Generator().manual_seed(1)).tokens
    shared = Generator().manual_seed(2)
    assert Drawing()(observation, generator=shared).tokens != Drawing()(observation, generator=shared).tokens
    assert bool((torch.get_rng_state() == state).all())


def test_time_is_measured_limited_and_told() -> None:
    model = network()
    observation = Observation(model, sent(model))
    heard: list[str] = []
    found = Drawing()(observation, progress=lambda what, share: heard.append(what))
    assert 0.01 <= found.seconds < 10 and found.stopped == "" and heard == ["drawing"]
    assert Drawing()(observation, seconds=0.001).stopped == "time limit of 0.001 s"
    assert found.used == ("examples",)  # all else is the attack's own
