"""What every public reconstruction attack keeps to. A new one in `__all__` goes through all of this by itself."""

from __future__ import annotations

import inspect
from dataclasses import fields, is_dataclass, replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from privfm.attacks import reconstruction
from privfm.attacks.reconstruction import (
    APRIL,
    DLG,
    LAMP,
    SPEAR,
    TAG,
    AdapterTrap,
    AttentionPursuit,
    BagOfWords,
    Fishing,
    GradInversion,
    Imprint,
    InvertingGradients,
    Labels,
    LinearInversion,
    LoRAReconstruction,
    PatchInversion,
    SpanSearch,
)
from privfm.checks import InvalidArgument
from privfm.contracts import (
    Declared,
    LocalSteps,
    MaliciousAttack,
    Observation,
    ReconstructionAttack,
    gradients_of,
)

SHAPE, COUNT = (1, 8, 8), 2
USED = {"examples", "labels", "lengths", "shape", "noise", "language model", "batch statistics", "tokenizer"}


class Smooth(nn.Module):
    """A twice differentiable network whose first layer is linear."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(64, 24), nn.Linear(24, 5)

    def forward(self, pixel_values: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.sigmoid(self.first(pixel_values.flatten(1))))
        return logits


class Rectified(nn.Module):
    """The same with a ReLU, wide enough for its sparsity to tell examples apart."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(64, 96), nn.Linear(96, 5)

    def forward(self, pixel_values: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.relu(self.first(pixel_values.flatten(1))))
        return logits


class Normed(nn.Module):
    """A network with batch statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(144, 5)

    def forward(self, pixel_values: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.tanh(self.norm(self.conv(pixel_values))).flatten(1))
        return logits


def images(model: nn.Module) -> Observation:
    pictures = torch.rand(COUNT, *SHAPE, generator=torch.Generator().manual_seed(3))
    output: Any = model(pixel_values=pictures)
    loss = nn.functional.cross_entropy(getattr(output, "logits", output), torch.tensor([1, 3]))
    declared = Declared(examples=COUNT, labels=torch.tensor([1, 3]), shape=SHAPE)
    return Observation(model, gradients_of(model, loss), declared=declared)


def one_image(model: nn.Module) -> Observation:
    picture = torch.rand(1, *SHAPE, generator=torch.Generator().manual_seed(3))
    output: Any = model(pixel_values=picture)
    loss = nn.functional.cross_entropy(getattr(output, "logits", output), torch.tensor([1]))
    declared = Declared(examples=1, labels=torch.tensor([1]), shape=SHAPE)
    return Observation(model, gradients_of(model, loss), declared=declared)


@lru_cache
def seeded(kind: str) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification, ViTConfig, ViTForImageClassification

    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "bert":
            return BertForSequenceClassification(
                BertConfig(
                    vocab_size=300, hidden_size=96, num_hidden_layers=2, num_attention_heads=3, intermediate_size=64,
                    max_position_embeddings=24, num_labels=2,
                )
            ).eval()  # fmt: skip
        if kind == "vit":
            return ViTForImageClassification(
                ViTConfig(
                    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32, image_size=8,
                    patch_size=4, num_channels=1, num_labels=5,
                )
            ).eval()  # fmt: skip
        return {"smooth": Smooth, "rectified": Rectified, "normed": Normed}[kind]().eval()


def texts(model: nn.Module) -> Observation:
    tokens = torch.tensor([[4, 60, 71, 82, 93, 5], [4, 150, 161, 172, 5, 0]])
    mask = (tokens != 0).long()
    output: Any = model(input_ids=tokens, attention_mask=mask)
    loss = nn.functional.cross_entropy(output.logits, torch.tensor([0, 1]))
    declared = Declared(examples=2, labels=torch.tensor([0, 1]), lengths=(6, 5))
    return Observation(model, gradients_of(model, loss), declared=declared)


def adapted() -> nn.Module:
    import copy

    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = get_peft_model(
            copy.deepcopy(seeded("bert")),
            LoraConfig(r=4, target_modules=["query", "value"]),  # type: ignore[arg-type]
        )
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
    return model.eval()  # type: ignore[no-any-return]


SAMPLES: dict[str, tuple[ReconstructionAttack, Any]] = {
    "APRIL": (APRIL(), None),
    "DLG": (DLG(iterations=3), lambda: images(seeded("smooth"))),
    "GradInversion": (GradInversion(iterations=5), lambda: images(seeded("normed"))),
    "InvertingGradients": (InvertingGradients(iterations=5), lambda: images(seeded("smooth"))),
    "LAMP": (LAMP(iterations=4, candidates=3, moves=2), lambda: texts(seeded("bert"))),
    "TAG": (TAG(iterations=4), lambda: texts(seeded("bert"))),
    "AttentionPursuit": (AttentionPursuit(), lambda: texts(seeded("bert"))),
    "BagOfWords": (BagOfWords(), lambda: texts(seeded("bert"))),
    "SpanSearch": (SpanSearch(), lambda: texts(seeded("bert"))),
    "Labels": (Labels(), lambda: images(seeded("smooth"))),
    "LinearInversion": (LinearInversion(), lambda: images(seeded("smooth"))),
    "LoRAReconstruction": (LoRAReconstruction(), lambda: texts(adapted())),
    "PatchInversion": (PatchInversion(), lambda: one_image(seeded("vit"))),
    "SPEAR": (SPEAR(), lambda: images(seeded("rectified"))),
}
TRAPS = ("AdapterTrap", "Fishing", "Imprint")

PUBLIC = [
    getattr(reconstruction, name)
    for name in reconstruction.__all__
    if inspect.isclass(getattr(reconstruction, name))
    and issubclass(getattr(reconstruction, name), ReconstructionAttack)
]
RUN = {name: sample for name, sample in SAMPLES.items() if sample[1] is not None}


def test_every_public_attack_has_a_sample_here() -> None:
    assert {kind.__name__ for kind in PUBLIC} == {*SAMPLES, *TRAPS}
    assert {kind for kind in PUBLIC if issubclass(kind, MaliciousAttack)} == {AdapterTrap, Fishing, Imprint}


@pytest.mark.parametrize("kind", PUBLIC, ids=lambda kind: kind.__name__)
def test_an_attack_is_a_frozen_description_with_a_source(kind: type[ReconstructionAttack]) -> None:
    assert is_dataclass(kind)
    assert kind.__dataclass_params__.frozen  # type: ignore[attr-defined]
    text = "\n".join(inspect.getdoc(base) or "" for base in kind.__mro__)  # a template describes its own fields
    assert "Source:" in text
    for item in fields(kind):
        assert f"{item.name}" in text, f"{kind.__name__}.{item.name} is not described"
    assert kind.malicious == issubclass(kind, MaliciousAttack)


@pytest.mark.parametrize("name", RUN)
def test_what_it_gives_back_is_well_formed_and_nothing_is_touched(name: str) -> None:
    attack, make = RUN[name]
    observation = make()
    assert attack.refusal(observation) == ""
    assert attack.needs
    before = {key: value.clone() for key, value in observation.model.state_dict().items()}
    tensors = {key: value.clone() for key, value in observation.tensors.items()}
    modes = [part.training for part in observation.model.modules()]
    wanted = [parameter.requires_grad for parameter in observation.model.parameters()]
    state = torch.get_rng_state()
    found = attack(observation, seconds=30)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[key]) for key, value in observation.model.state_dict().items())
    assert all(torch.equal(value, tensors[key]) for key, value in observation.tensors.items())
    assert [part.training for part in observation.model.modules()] == modes
    assert [parameter.requires_grad for parameter in observation.model.parameters()] == wanted
    assert all(parameter.grad is None for parameter in observation.model.parameters())
    assert set(found.used) <= USED, found.used
    assert found.seconds > 0
    assert all(isinstance(token, int) for text in found.texts for token in text)
    assert found.images is None or (found.images.dim() == 4 and bool(found.images.isfinite().all()))
    assert all(isinstance(value, (int, float, str)) for value in found.facts.values())


@pytest.mark.parametrize("name", RUN)
def test_the_same_generator_gives_the_same_answer(name: str) -> None:
    attack, make = RUN[name]
    observation = make()
    one, other = (attack(observation, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert (one.texts, one.tokens, one.labels) == (other.texts, other.tokens, other.labels)
    assert (one.images is None and other.images is None) or torch.equal(one.images, other.images)


@pytest.mark.parametrize("name", RUN)
def test_an_observation_without_what_it_needs_is_refused_before_work(name: str) -> None:
    attack, make = RUN[name]
    observation = make()
    last = list(observation.tensors)[-1]
    norm = next((key for key in observation.tensors if "norm" in key.lower()), last)
    little = replace(observation, tensors={norm: torch.full_like(observation.tensors[norm], torch.nan)})
    with pytest.raises(InvalidArgument, match=name):
        attack(replace(little, declared=Declared()))


@pytest.mark.parametrize("name", [name for name in RUN if name not in {"Labels"}])
def test_a_change_by_adam_is_refused_with_a_reason(name: str) -> None:
    attack, make = RUN[name]
    with pytest.raises(InvalidArgument, match=r"(?i)adam"):
        attack(replace(make(), change=LocalSteps(0.1, 2, "adam")))


@pytest.mark.parametrize("name", [name for name in RUN if not RUN[name][0].several_rounds])
def test_several_rounds_are_refused_where_they_mean_nothing(name: str) -> None:
    attack, make = RUN[name]
    with pytest.raises(InvalidArgument, match="one round"):
        attack([make(), make()])


@pytest.mark.parametrize("name", ["AttentionPursuit", "BagOfWords", "SpanSearch", "LoRAReconstruction"])
def test_a_foreign_gradient_gives_no_text(name: str) -> None:
    """Random numbers of the right shapes: nothing may come back, however the search goes."""
    attack, make = RUN[name]
    observation = make()
    generator = torch.Generator().manual_seed(1)
    noise = {
        key: torch.randn(value.shape, generator=generator) * value.std().nan_to_num(0.0)
        for key, value in observation.tensors.items()
    }
    found = attack(Observation(observation.model, noise), seconds=20)
    assert found.texts == ()
