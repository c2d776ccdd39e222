"""Shadow adapters: together as alone, on their own halves, read as the learner reads, and kept without the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import pytest
import torch
from torch import Generator, Tensor, nn

from privfm.checks import BrokenCheckpoint, ClientFailed, InvalidArgument
from privfm.contracts import GradientPrivacy, Table
from privfm.learning import (
    SGD,
    AdamW,
    CausalLanguageModel,
    CausalLM,
    LoRA,
    ModelLearner,
    OwnTraining,
    Schedule,
    SequenceClassification,
    SequenceClassifier,
    SmallCNN,
    Workbench,
)
from privfm.learning.batched import prepared
from privfm.learning.shadows import (
    ShadowAdapters,
    drawn_anew,
    logits_of,
    signals_of,
    token_log_probabilities_of,
    train_shadows,
)
from privfm.learning.tasks import ImageClassification
from privfm.randomness import Seeds

MODELS = 6
NAMES = ("a", "b", "c")
TRAINING = AdamW(0.01, Schedule(batch_size=4, epochs=2))


def classifier(tiny_bert: str, sentences: list[str], **options: Any) -> Workbench:
    given = {"adapter": LoRA(rank=2, layers=(1, 2)), "max_length": 16, **options}
    built = SequenceClassifier(tiny_bert, **given).build(NAMES, Generator().manual_seed(0))
    labels = torch.randint(0, 3, (len(sentences),), generator=Generator().manual_seed(1))
    return Workbench(built, SequenceClassification(), Table(sentences, labels, NAMES))


def decoder(tiny_llama: str, sentences: list[str]) -> Workbench:
    source = CausalLanguageModel(tiny_llama, LoRA(rank=2, modules=("q_proj", "v_proj"), layers=(2,)), max_length=16)
    table = Table(sentences, torch.zeros(len(sentences), dtype=torch.int64), ("text",))
    return Workbench(source.build(("text",), Generator().manual_seed(0)), CausalLM(), table)


@pytest.fixture
def bench(tiny_bert: str, sentences: list[str]) -> Workbench:
    return classifier(tiny_bert, sentences)


def flags(n: int, models: int = MODELS) -> Tensor:
    """Every example in half of the models."""
    draws = torch.rand(models, n, generator=Generator().manual_seed(2))
    return draws.argsort(0).argsort(0) < models // 2


def seeds(models: int = MODELS) -> list[Generator]:
    return Seeds(0).clients("shadows", 0, list(range(models)))


def trained(own: Workbench, training: Any = TRAINING, **options: Any) -> ShadowAdapters:
    return train_shadows(own, training, flags(len(own.everything)), own.everything, seeds(), **options)


# Training


def test_together_is_as_alone(bench: Workbench) -> None:
    shadows = trained(bench)
    assert shadows.note == "batched"
    assert torch.allclose(shadows.models, trained(bench, together=1).models, atol=1e-5)
    assert torch.allclose(shadows.models, trained(bench, tokens=30).models, atol=1e-5)


def test_it_is_the_loop_that_everybody_would_write(bench: Workbench) -> None:
    shadows = trained(bench, SGD(0.3, Schedule(batch_size=4, epochs=2)))
    for place, (row, generator) in enumerate(zip(shadows.inside, seeds(), strict=True)):
        torch.randint(2**62, (), generator=generator)  # the batched engine names its dropout, the learner its seed
        half = bench.everything.take(row.nonzero().squeeze(1))
        module = bench.load(bench.initial)
        own = [parameter for parameter in module.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(own, lr=0.3)
        for _ in range(2):
            for places in torch.randperm(len(half), generator=generator).split(4):
                batch = half.take(places)
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(module(**batch.inputs), batch.labels)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        expected = bench.layout.flatten(bench.parameters)
        assert torch.allclose(shadows.models[place], expected, atol=1e-5), place
        assert not torch.allclose(expected, bench.initial, atol=1e-2)


def test_only_the_half_is_trained_on(bench: Workbench) -> None:
    shadows = trained(bench)
    outside = ~shadows.inside[2]
    poisoned = bench.everything.labels.masked_fill(outside, 0) + 1 * outside  # other labels, of the others only
    changed = bench.everything.with_labels(poisoned % 3)
    again = train_shadows(bench, TRAINING, shadows.inside, changed, seeds())
    assert torch.allclose(again.models[2], shadows.models[2], atol=1e-6)
    others = [place for place in range(MODELS) if place != 2]
    assert ((again.models - shadows.models)[others].norm(dim=1) > 1e-2).all(), "who holds one of them learns another"


def test_members_fit_better_than_others(bench: Workbench) -> None:
    labels = torch.randint(0, 3, (len(bench.everything),), generator=Generator().manual_seed(5))  # nothing to learn
    noise = bench.everything.with_labels(labels)
    shadows = train_shadows(bench, AdamW(0.03, Schedule(batch_size=8, epochs=30)), flags(len(noise)), noise, seeds())
    losses = signals_of(bench, shadows.models, noise, bench.task.losses)
    members, others = losses[shadows.inside].mean(), losses[~shadows.inside].mean()
    assert float(others - members) > 0.3
    before = signals_of(bench, bench.initial[None].repeat(MODELS, 1), noise, bench.task.losses)
    # Before training nobody knows anything: 180 losses a side with a deviation below 0.2.
    assert abs(float(before[~shadows.inside].mean() - before[shadows.inside].mean())) < 0.06


def test_progress_and_bounded_batches(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    shadows = trained(bench, together=4, progress=lambda done, of: seen.append((done, of)))
    assert seen == [(4, 6), (6, 6)]
    seen.clear()
    monkeypatch.setattr("privfm.learning.shadows._MEMORY", 8 * 4 * bench.layout.d * 3)
    small = trained(bench, progress=lambda done, of: seen.append((done, of)))
    assert seen == [(3, 6), (6, 6)]
    assert torch.allclose(small.models, shadows.models, atol=1e-5)


def test_models_that_cannot_be_batched_are_trained_alone(tiny_bert: str, sentences: list[str]) -> None:
    images = torch.randn(24, 1, 8, 8, generator=Generator().manual_seed(0))
    labels = torch.randint(0, 3, (24,), generator=Generator().manual_seed(1))
    built = SmallCNN(width=4).build(NAMES, Generator().manual_seed(0))
    own = Workbench(built, ImageClassification(), Table(images, labels, NAMES))
    shadows = trained(own, SGD(0.1, Schedule(batch_size=4)))
    assert shadows.note.startswith("sequential: ")
    learner = ModelLearner(own, {}, SGD(0.1, Schedule(batch_size=4)))
    batch = [own.everything.take(row.nonzero().squeeze(1)) for row in shadows.inside]
    expected = own.initial + learner.train(own.initial, batch, seeds()).rows
    assert torch.equal(shadows.models, expected)
    logits = logits_of(own, shadows.models, own.everything)
    with torch.no_grad():
        assert torch.allclose(logits[3], own.load(shadows.models[3])(pixel_values=images), atol=1e-5)


def test_somebodys_own_loop(bench: Workbench) -> None:
    def mine(model: nn.Module, data: Any) -> nn.Module:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        nn.functional.cross_entropy(model(**data.inputs), data.labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return model

    def broken(model: nn.Module, data: Any) -> nn.Module:
        raise RuntimeError("no disk")

    shadows = trained(bench, OwnTraining(mine))
    assert "OwnTraining does not take its steps" in shadows.note
    full = SGD(0.1, Schedule(batch_size=100))
    assert torch.allclose(shadows.models, trained(bench, full).models, atol=1e-5), "a step on everybody's whole half"
    with pytest.raises(ClientFailed, match="no disk"):
        trained(bench, OwnTraining(broken))


# Initialisation


def test_shared_shadows_begin_where_everybody_does(bench: Workbench) -> None:
    tiny = SGD(1e-9, Schedule(batch_size=4, steps=1))
    assert torch.allclose(trained(bench, tiny).models, bench.initial.expand(MODELS, -1), atol=1e-6)
    start = bench.initial + 1
    assert torch.allclose(trained(bench, tiny, start=start).models, start.expand(MODELS, -1), atol=1e-6)


@pytest.mark.parametrize("pooling", ["mean", "model"])
def test_own_initialisations_differ_and_are_the_librarys(tiny_bert: str, sentences: list[str], pooling: Any) -> None:
    own = classifier(tiny_bert, sentences, pooling=pooling)
    tiny = SGD(1e-9, Schedule(batch_size=4, steps=1))
    models = trained(own, tiny, initial="own").models
    assert torch.allclose(models, drawn_anew(own, seeds()), atol=1e-6)
    drawn = drawn_anew(own, [Generator().manual_seed(i) for i in range(50)])
    parts = torch.split(drawn, list(own.layout.sizes), 1)
    source = SequenceClassifier(tiny_bert, pooling=pooling, adapter=LoRA(rank=2, layers=(1, 2)), max_length=16)
    modules = [source.build(NAMES, Generator().manual_seed(i)).module for i in range(8)]
    for name, part in zip(own.layout.names, parts, strict=True):
        values = torch.stack([module.get_parameter(name).detach().flatten() for module in modules])
        # Of 24 biases the deviation is known to a seventh.
        assert float(part.std()) == pytest.approx(float(values.std()), rel=0.3, abs=1e-9), name
        assert abs(float(part.mean())) < 5 * float(part.std()) / part.numel() ** 0.5 + 1e-9, name
    assert (models - models[0])[1:].norm(dim=1).min() > 0.1


def test_own_initialisations_train_and_are_bound_to_their_generator(bench: Workbench) -> None:
    shadows = trained(bench, initial="own")
    assert torch.allclose(shadows.models, trained(bench, initial="own", together=1).models, atol=1e-5)
    assert not torch.allclose(shadows.models, trained(bench).models, atol=1e-2)


def test_starts_of_their_own_where_not_everything_is_active(bench: Workbench) -> None:
    engine, starts, training = prepared(bench), drawn_anew(bench, seeds()), SGD(0.3, Schedule(batch_size=4))
    active = torch.rand(bench.layout.d, generator=Generator().manual_seed(3)) < 0.5
    batch = [bench.everything.take(row.nonzero().squeeze(1)) for row in flags(60)]
    together = engine.train(starts, batch, seeds(), training, active=active)
    alone = [
        engine.train(start, [examples], [generator], training, active=active)
        for start, examples, generator in zip(starts, batch, seeds(), strict=True)
    ]
    assert torch.allclose(together, torch.cat(alone), atol=1e-5)
    assert bool((together[:, ~active] == 0).all()) and bool((together[:, active].norm(dim=1) > 0.01).all())
    with pytest.raises(InvalidArgument, match="expected 6 rows"):
        engine.train(starts[1:], batch, seeds(), training)


def test_a_frozen_a_stays_shared(tiny_bert: str, sentences: list[str]) -> None:
    own = classifier(tiny_bert, sentences, adapter=LoRA(rank=2, layers=(2,), freeze_a=True))
    before = {name: value.clone() for name, value in own.module.state_dict().items()}
    drawn = drawn_anew(own, seeds())
    assert drawn.shape == (MODELS, own.layout.d)
    assert all(torch.equal(value, before[name]) for name, value in own.module.state_dict().items())


def test_what_has_no_known_initialisation_is_refused() -> None:
    images = torch.randn(8, 1, 8, 8, generator=Generator().manual_seed(0))
    built = SmallCNN(width=4).build(NAMES, Generator().manual_seed(0))
    own = Workbench(built, ImageClassification(), Table(images, torch.arange(8) % 3, NAMES))
    with pytest.raises(InvalidArgument, match="no fresh initialisation of network"):
        trained(own, SGD(0.1), initial="own")


# Reading


def read_by_the_learner(own: Workbench, model: Tensor, score: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    learner = ModelLearner(own, {}, TRAINING)
    return learner._read(model, own.everything, lambda logits, labels: {"found": score(logits, labels)})["found"]


@pytest.mark.parametrize("tokens", [None, 15])
@pytest.mark.parametrize("pooling", ["mean", "model"])
def test_logits_are_the_learners(
    tiny_bert: str, sentences: list[str], tokens: int | None, pooling: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = classifier(tiny_bert, sentences, pooling=pooling)
    shadows = trained(own)
    with monkeypatch.context() as patch:  # by the batched engine, not by the loop that steps in for it
        patch.delattr("privfm.learning.shadows._read")
        logits = logits_of(own, shadows.models, own.everything, tokens=tokens)
    expected = torch.stack([read_by_the_learner(own, model, lambda logits, _: logits) for model in shadows.models])
    assert logits.shape == (MODELS, 60, 3)
    assert torch.allclose(logits, expected, atol=1e-5)
    assert (logits[0] - logits[1]).abs().max() > 0.01
    some = own.everything.take(torch.tensor([7, 3, 3]))
    assert torch.allclose(logits_of(own, shadows.models[2:4], some), expected[2:4][:, [7, 3, 3]], atol=1e-5)


def test_texts_that_the_table_does_not_hold(bench: Workbench) -> None:
    foreign = bench.everything.with_inputs(bench.everything.inputs)
    models = trained(bench).models
    expected = logits_of(bench, models, bench.everything)
    assert torch.allclose(logits_of(bench, models, foreign), expected, atol=1e-5)


def test_tokens_of_language_models(tiny_llama: str, sentences: list[str]) -> None:
    own = decoder(tiny_llama, sentences)
    shadows = trained(own)
    assert shadows.note == "batched"
    found = token_log_probabilities_of(own, shadows.models, own.everything, tokens=50)
    lengths = own.everything.inputs["attention_mask"].sum(1)
    assert [tuple(part.shape) for part in found] == [(MODELS, int(length) - 1) for length in lengths]
    for place in (0, 11, 59):
        text = own.everything.inputs["input_ids"][place : place + 1, : lengths[place]]
        module: Any = own.load(shadows.models[4])
        with torch.no_grad():
            logits = module(input_ids=text, attention_mask=torch.ones_like(text)).logits[0].double()
        expected = torch.stack([logits[t].log_softmax(0)[text[0, t + 1]] for t in range(text.shape[1] - 1)])
        assert torch.allclose(found[place][4], expected, atol=1e-5)
    losses = signals_of(own, shadows.models, own.everything, own.task.losses)
    means = torch.stack([-part.mean(1) for part in found], 1)
    assert torch.allclose(losses.double(), means, atol=1e-5)
    with pytest.raises(InvalidArgument, match="do not fit in memory"):
        logits_of(own, shadows.models, own.everything)


def test_tokens_are_those_of_language_models(bench: Workbench) -> None:
    with pytest.raises(InvalidArgument, match="predicts no tokens"):
        token_log_probabilities_of(bench, bench.initial[None], bench.everything)


def test_the_model_comes_back_as_it_was(bench: Workbench) -> None:
    before = {name: value.clone() for name, value in bench.module.state_dict().items()}
    shadows = trained(bench, initial="own")
    logits_of(bench, shadows.models, bench.everything)
    assert all(torch.equal(value, before[name]) for name, value in bench.module.state_dict().items())
    assert torch.is_grad_enabled()


@pytest.mark.usefixtures("untouched_random_state")
def test_no_global_random_state(tiny_bert: str, sentences: list[str]) -> None:
    trained(classifier(tiny_bert, sentences), initial="own")


# Privacy


@final
@dataclass(frozen=True)
class Clipped(GradientPrivacy):
    """Flat clipping, noise of the given deviation."""

    noise: float

    def batches(self, examples: int, generator: Generator) -> Iterator[Tensor]:
        yield from torch.randperm(examples, generator=generator).split(8)

    def clip(self, gradients: Tensor) -> Tensor:
        return gradients / gradients.norm(dim=1, keepdim=True).clamp(min=1)

    def noised(self, sums: Tensor, examples: Sequence[int], generators: Sequence[Generator]) -> Tensor:
        draws = torch.stack([torch.randn(sums.shape[1], generator=own) for own in generators])
        return (sums + self.noise * draws) / 8


def test_private_shadows(bench: Workbench) -> None:
    training = SGD(0.1, Schedule(batch_size=8))
    quiet, loud = (trained(bench, training, privacy=Clipped(noise)).models for noise in (0.0, 1.0))
    alone = trained(bench, training, privacy=Clipped(1.0), together=1).models
    assert torch.allclose(loud, alone, atol=1e-5)
    steps = [-(-int(size) // 8) for size in flags(60).sum(1)]
    expected = torch.tensor([0.1 / 8 * count**0.5 for count in steps])
    # Only roughly: later gradients are taken at noisy weights.
    assert torch.allclose((loud - quiet).std(1), expected, rtol=0.2)


# Files


def test_only_adapters_and_flags_are_kept(bench: Workbench, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    shadows, path = trained(bench), tmp_path / "shadows.safetensors"
    shadows.save(path)
    named = load_file(path)
    assert set(named) == {*bench.layout.names, "inside"}
    values = 4 * MODELS * bench.layout.d + MODELS * 60
    assert path.stat().st_size < values + 4096
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["shadows.safetensors"]
    again = ShadowAdapters.load(path, bench.layout)
    assert torch.equal(again.models, shadows.models)
    assert torch.equal(again.inside, shadows.inside)
    assert len(again) == MODELS


def test_files_that_do_not_fit_are_refused(
    bench: Workbench, tmp_path: Path, tiny_bert: str, sentences: list[str]
) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "shadows.safetensors"
    trained(bench).save(path)
    other = classifier(tiny_bert, sentences, adapter=LoRA(rank=4, layers=(1, 2)))
    with pytest.raises(InvalidArgument, match=r"does not fit the model: .*lora_A"):
        ShadowAdapters.load(path, other.layout)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BrokenCheckpoint, match="cannot be read"):
        ShadowAdapters.load(path, bench.layout)
    with pytest.raises(BrokenCheckpoint, match="cannot be read"):
        ShadowAdapters.load(tmp_path / "nothing", bench.layout)
    save_file({"something": torch.zeros(3)}, path)
    with pytest.raises(BrokenCheckpoint, match="holds no shadows"):
        ShadowAdapters.load(path, bench.layout)
    with pytest.raises(InvalidArgument, match="cannot be written"):
        trained(bench).save(tmp_path / "missing" / "shadows.safetensors")


# Bad input


def test_what_does_not_fit_is_refused(bench: Workbench) -> None:
    everything, inside = bench.everything, flags(60)

    def refused(match: str, **changes: Any) -> None:
        given: dict[str, Any] = {"inside": inside, "examples": everything, "generators": seeds(), **changes}
        with pytest.raises(InvalidArgument, match=match):
            train_shadows(bench, given.pop("training", TRAINING), **given)

    refused("expected bool", inside=inside.long())
    refused(r"inside \(6, 59\): expected \(models, 60\)", inside=inside[:, 1:])
    refused("5 generators: expected 6", generators=seeds(5))
    refused("no row", inside=inside[:0], generators=[])
    empty = inside.clone()
    empty[4] = False
    refused(r"shadow \[4\] has no example", inside=empty)
    refused("together=0", together=0)
    refused("initial='mine'", initial="mine")
    refused("start: expected", start=bench.initial[1:])
    refused("leave it out", start=bench.initial, initial="own")
    refused("not finite", training=SGD(1e30, Schedule(batch_size=4)))
    for models in (bench.initial, bench.initial[None, 1:]):
        with pytest.raises(InvalidArgument, match="expected \\(models"):
            logits_of(bench, models, everything)
    with pytest.raises(InvalidArgument, match="nothing to read"):
        logits_of(bench, torch.zeros(0, bench.layout.d), everything)
    with pytest.raises(InvalidArgument, match="by inside and layout"):
        ShadowAdapters(torch.zeros(2, 3), inside, bench.layout)


def test_flags_may_come_as_numpy(bench: Workbench) -> None:
    models = train_shadows(bench, TRAINING, flags(60).numpy(), bench.everything, seeds()).models
    assert torch.equal(models, trained(bench).models)
