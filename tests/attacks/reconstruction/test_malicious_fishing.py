"""Fishing: one class's example out of a batch, exactly that example's gradient, handed to an honest attack."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

from privfm.attacks.reconstruction.closed_form import LinearInversion, PatchInversion
from privfm.attacks.reconstruction.malicious import AdapterTrap, Fishing
from privfm.checks import InvalidArgument
from privfm.contracts import LocalSteps, Observation, gradients_of
from privfm.randomness import seeded

LABELS = [0, 1, 2, 0, 4, 1, 4, 4]  # of class 2 there is one, of class 3 none


def transformer(dtype: torch.dtype = torch.float64) -> Any:
    from transformers import ViTConfig, ViTForImageClassification

    with seeded(Generator().manual_seed(3)):
        configuration = ViTConfig(
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=3,
            intermediate_size=16,
            image_size=12,
            patch_size=4,
            num_channels=1,
            num_labels=5,
        )
        return ViTForImageClassification(configuration).to(dtype).eval()


def images(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(8, 1, 12, 12, generator=Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def sent(model: Any, batch: Tensor, labels: list[int]) -> dict[str, Tensor]:
    output = model(batch)
    return gradients_of(model, nn.functional.cross_entropy(getattr(output, "logits", output), torch.tensor(labels)))


def off(found: Tensor | None, truth: Tensor) -> float:
    assert found is not None and found.shape == truth.shape
    return float((found.double() - truth.double()).norm() / truth.double().norm())


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-3)])
def test_the_one_example_of_a_class_out_of_a_batch(dtype: torch.dtype, bound: float) -> None:
    attack = Fishing(2, PatchInversion())
    trapped = attack.prepare(transformer(dtype), Generator())
    batch = images(dtype)
    found = attack(Observation(trapped, sent(trapped, batch, LABELS)))
    assert off(found.images, batch[2:3]) < bound
    assert found.labels == (2,) and found.used == ("malicious model",)
    assert float(found.facts["share of the class"]) == pytest.approx(1 / 8)
    assert float(found.facts["residual"]) < bound  # nothing of the others is in it


def test_through_a_sum_of_clients() -> None:
    attack = Fishing(2, PatchInversion())
    trapped, batch = attack.prepare(transformer(), Generator()), images()
    each = [sent(trapped, batch[k : k + 2], LABELS[k : k + 2]) for k in range(0, 8, 2)]
    total = {name: torch.stack([one[name] for one in each]).sum(0) for name in each[0]}
    assert off(attack(Observation(trapped, total, clients=4)).images, batch[2:3]) < 1e-10


def test_the_body_has_exactly_the_examples_own_gradient() -> None:
    """What `inner` is given is a batch of one: its gradients are those of the example alone under the bent head."""
    seen: list[Observation] = []

    class Spy(PatchInversion):  # type: ignore[misc]
        def reconstruct(self, rounds: Any, watch: Any, generator: Any) -> Any:
            seen.extend(rounds)
            return super().reconstruct(rounds, watch, generator)

    attack = Fishing(2, Spy())
    trapped, batch = attack.prepare(transformer(), Generator()), images()
    attack(Observation(trapped, sent(trapped, batch, LABELS)).told(examples=8, labels=torch.tensor(LABELS)))
    own = sent(trapped, batch[2:3], [2])
    (given,) = seen
    assert given.declared.examples == 1 and given.declared.labels is not None
    assert given.declared.labels.tolist() == [2]  # its own class, not the batch's labels
    assert set(given.tensors) == {name for name in own if not name.startswith("classifier.")}
    for name, one in given.tensors.items():
        torch.testing.assert_close(one, own[name], atol=1e-14, rtol=1e-9)


def test_several_of_a_class_are_a_batch_and_none_is_nothing() -> None:
    several = Fishing(4, PatchInversion())
    trapped, batch = several.prepare(transformer(), Generator()), images()
    found = several(Observation(trapped, sent(trapped, batch, LABELS)))
    assert float(found.facts["share of the class"]) == pytest.approx(3 / 8)
    assert float(found.facts["residual"]) > 1e-4 and off(found.images, batch[4:5]) > 0.3
    none = Fishing(3, PatchInversion())
    trapped = none.prepare(transformer(), Generator())
    empty = none(Observation(trapped, sent(trapped, batch, LABELS)))
    assert empty.images is None and empty.facts["examples of the class"] == 0


def test_a_frozen_or_hidden_head_is_no_obstacle() -> None:
    attack = Fishing(2, PatchInversion())
    trapped, batch = attack.prepare(transformer(), Generator()), images()
    body = {name: one for name, one in sent(trapped, batch, LABELS).items() if "classifier" not in name}
    found = attack(Observation(trapped, body))
    assert off(found.images, batch[2:3]) < 1e-10 and "share of the class" not in found.facts


def test_with_a_plain_network() -> None:
    with seeded(Generator().manual_seed(0)):
        model = nn.Sequential(nn.Flatten(), nn.Linear(144, 32), nn.ReLU(), nn.Linear(32, 5)).double()
    attack = Fishing(2, LinearInversion())
    trapped, batch = attack.prepare(model, Generator()), images()
    found = attack(Observation(trapped, sent(trapped, batch, LABELS)).told(shape=(1, 12, 12)))
    assert off(found.images, batch[2:3]) < 1e-13
    assert found.used == ("shape", "malicious model")
    honest = LinearInversion()(Observation(model, sent(model, batch, LABELS)).told(shape=(1, 12, 12)))
    assert honest.facts["images"] != 1 or off(honest.images, batch[2:3]) > 0.1


def test_the_model_stays_and_an_unbent_one_is_refused() -> None:
    model, batch = transformer(), images()
    before = {name: one.clone() for name, one in model.state_dict().items()}
    attack = Fishing(2, PatchInversion())
    attack.prepare(model, Generator())
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    with pytest.raises(InvalidArgument, match="not bent towards class 2"):
        attack(Observation(model, sent(model, batch, LABELS)))


def test_what_does_not_fit_is_refused_with_the_way_out() -> None:
    model = transformer()
    with pytest.raises(InvalidArgument, match="honest attack"):
        Fishing(1, AdapterTrap())
    with pytest.raises(InvalidArgument, match="target"):
        Fishing(-1, PatchInversion())
    with pytest.raises(InvalidArgument, match="target=5 of 5"):
        Fishing(5, PatchInversion()).prepare(model, Generator())
    with pytest.raises(InvalidArgument, match="did you mean"):
        Fishing(1, PatchInversion(), head="classifie").prepare(model, Generator())
    with pytest.raises(InvalidArgument, match="no bias"):
        Fishing(1, PatchInversion()).prepare(nn.Sequential(nn.Linear(3, 4, bias=False)), Generator())
    attack = Fishing(1, PatchInversion())
    trapped = attack.prepare(model, Generator())
    tensors = sent(trapped, images(), LABELS)
    with pytest.raises(InvalidArgument, match="mixes all examples"):
        attack(Observation(trapped, {name: one for name, one in tensors.items() if "classifier" in name}))
    with pytest.raises(InvalidArgument, match="adam"):
        attack(Observation(trapped, tensors, change=LocalSteps(0.1, optimizer="adam")))
    with pytest.raises(InvalidArgument, match="position_embeddings was not sent"):  # inner's own refusal
        attack(Observation(trapped, {name: one for name, one in tensors.items() if "position" not in name}))
