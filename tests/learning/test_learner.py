"""One model swapped from client to client: exact, repeatable, and unharmed by what a client does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from privfm.checks import InvalidArgument
from privfm.contracts import WORST_CLIENTS, Examples, LocalTraining, Table
from privfm.learning import (
    SGD,
    AdamW,
    LoRA,
    ModelLearner,
    OwnTraining,
    Schedule,
    SequenceClassification,
    SequenceClassifier,
    VisionTransformer,
    Workbench,
)
from privfm.learning.trunk import block_stack, content_digest, first_trained
from privfm.randomness import Seeds

LABELS = ("a", "b")
Bench = Callable[..., Workbench]


@pytest.fixture
def bench(tiny_bert: str, sentences: list[str]) -> Bench:
    def make(layers: tuple[int, ...] | None = (2,), folder: Path | None = None) -> Workbench:
        source = SequenceClassifier(tiny_bert, adapter=LoRA(rank=2, layers=layers), max_length=16)
        labels = torch.tensor(["w7" in text for text in sentences]).long()
        built = source.build(LABELS, Seeds(0).generator("initialisation"))
        return Workbench(built, SequenceClassification(), Table(sentences, labels, LABELS), folder=folder)

    return make


def learner(bench: Workbench, training: LocalTraining | None = None) -> ModelLearner:
    splits = {"clients": torch.arange(40), "test": torch.arange(40, 60)}
    return ModelLearner(bench, splits, training or SGD(0.3, Schedule(batch_size=4, epochs=2)), torch.ones(30, 2))


def updates(own: ModelLearner, clients: list[int], model: Tensor | None = None) -> Tensor:
    batch = [own.bench.everything.take(torch.arange(10 * i, 10 * i + 10)) for i in clients]
    generators = Seeds(0).clients("data order", 0, clients)
    trained = own.train(own.initial() if model is None else model, batch, generators)
    assert not trained.failed
    return trained.rows


def test_known_activations_change_nothing(bench: Bench) -> None:
    with_cache, without = learner(bench()), learner(bench())
    assert with_cache.bench.trunk is not None
    without.bench.trunk = None
    assert torch.allclose(updates(with_cache, [0, 1]), updates(without, [0, 1]), atol=1e-7)
    model = with_cache.initial() + updates(with_cache, [0])[0]
    cached, plain = with_cache.evaluate(model, "test"), without.evaluate(model, "test")
    assert cached["loss"].value == pytest.approx(plain["loss"].value, abs=1e-6)


def test_no_activations_are_kept_when_the_first_block_is_trained(bench: Bench) -> None:
    assert bench(layers=None).trunk is None


def test_a_client_alone_equals_itself_among_others(bench: Bench) -> None:
    own = learner(bench())
    together = updates(own, [0, 1, 2, 3])
    assert torch.equal(together[2], updates(own, [2])[0])
    assert torch.equal(together, updates(own, [0, 1, 2, 3]))
    assert not torch.equal(together[0], together[1])


def test_changed_inputs_are_computed_anew(bench: Bench) -> None:
    own = learner(bench())
    batch = own.bench.everything.take(torch.arange(5))
    own.bench.load(own.initial())
    other = {name: value[torch.tensor([5, 6, 7, 8, 9])] for name, value in own.bench.everything.inputs.items()}
    with torch.no_grad():
        fresh = own.bench.losses(batch.with_inputs(other))
        assert not torch.allclose(fresh, own.bench.losses(batch))
        assert own.bench.losses(batch.with_labels(1 - batch.labels)).shape == (5,)


def test_activations_are_shared_through_a_file(bench: Bench, tmp_path: Path) -> None:
    first = learner(bench(folder=tmp_path))
    files = list(tmp_path.iterdir())
    assert len(files) == 1 and files[0].suffix == ".activations"
    written = files[0].stat().st_mtime_ns
    again = learner(bench(folder=tmp_path))
    assert files[0].stat().st_mtime_ns == written
    assert torch.equal(updates(first, [0]), updates(again, [0]))


def test_the_file_is_named_by_content(bench: Bench) -> None:
    one, other = bench(), bench()
    name = content_digest(one.module, 2, one.everything)
    assert name == content_digest(other.module, 2, other.everything) != content_digest(other.module, 1, one.everything)
    with torch.no_grad():
        next(p for p in other.module.parameters() if not p.requires_grad).add_(1e-3)
    assert name != content_digest(other.module, 2, other.everything)


def test_the_name_follows_what_modules_do_not_show() -> None:
    images = Examples({"pixel_values": torch.zeros(2, 1, 8, 8)}, torch.zeros(2).long())
    names = set()
    for heads in (2, 4):
        source = VisionTransformer(hidden=16, depth=2, heads=heads)
        names.add(content_digest(source.build(LABELS, Seeds(0).generator("initialisation")).module, 1, images))
    assert len(names) == 2


def test_nothing_is_kept_above_trained_embeddings(tiny_bert: str, sentences: list[str]) -> None:
    adapter = LoRA(rank=2, modules=("word_embeddings", "query"), layers=None)
    built = SequenceClassifier(tiny_bert, adapter=adapter).build(LABELS, Seeds(0).generator("initialisation"))
    for name, parameter in built.module.named_parameters():
        if ".layer." in name:
            parameter.requires_grad_(False)  # only embeddings and head are left
    bench = Workbench(built, SequenceClassification(), Table(sentences, torch.zeros(60).long(), LABELS))
    assert bench.trunk is None and any("embed" in name for name in bench.parameters)
    rows = updates(learner(bench), [0])
    assert rows.norm() > 0


def test_training_that_changes_what_is_frozen_ends_the_run(bench: Bench) -> None:
    def mine(model: nn.Module, data: Examples) -> nn.Module:
        with torch.no_grad():
            next(p for p in model.parameters() if not p.requires_grad).add_(1.0)
        return model

    own = learner(bench(), OwnTraining(mine))
    with pytest.raises(InvalidArgument, match="which no update carries"):
        own.train(own.initial(), [own.bench.everything], Seeds(0).clients("data order", 0, [0]))


def test_the_stack_of_blocks_is_found(bench: Bench) -> None:
    built = bench().built
    assert len(built.layers) == 3 and first_trained(built.layers) == 2
    assert block_stack(nn.Linear(2, 2)) == ()


@pytest.mark.parametrize("training", [SGD(0.3, momentum=0.5), AdamW(0.01, Schedule(steps=3), weight_decay=0.1)])
def test_training_lowers_the_loss(training: LocalTraining, bench: Bench) -> None:
    own = learner(bench(), training)
    model = own.initial()
    before = own.evaluate(model, "clients")["loss"].value
    for _ in range(6):
        model = model + updates(own, [0, 1, 2, 3], model).mean(0)
    assert own.evaluate(model, "clients")["loss"].value < before


def test_sgd_is_plain_gradient_descent(bench: Bench) -> None:
    own = learner(bench(), SGD(0.25, Schedule(batch_size=100)))
    model = own.initial()
    examples = own.bench.everything.take(torch.arange(10))
    own.bench.load(model)
    own.bench.losses(examples).mean().backward()
    gradient = own.bench.layout.flatten(
        {name: p.grad for name, p in own.bench.parameters.items() if p.grad is not None}
    )
    assert torch.allclose(updates(own, [0])[0], -0.25 * gradient, atol=1e-6)


@pytest.mark.parametrize(("schedule", "steps"), [(Schedule(4, 2), 6), (Schedule(32), 1), (Schedule(4, steps=7), 7)])
def test_schedules(schedule: Schedule, steps: int) -> None:
    drawn = list(schedule.batches(10, torch.Generator().manual_seed(0)))
    assert len(drawn) == steps
    assert sorted(torch.cat(drawn[:3]).tolist())[:10] == list(range(10))


def test_a_callable_of_ones_own(bench: Bench) -> None:
    def mine(model: nn.Module, data: Examples) -> nn.Module:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for batch in torch.utils.data.DataLoader(data, batch_size=5):  # type: ignore[arg-type]
            labels = batch.pop("labels")
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(**batch), labels).backward()
            optimizer.step()
        return model

    own = learner(bench(), OwnTraining(mine))
    rows = updates(own, [0, 1])
    assert rows.norm(dim=1).min() > 0
    assert torch.equal(rows, updates(own, [0, 1]))


def test_a_hugging_face_trainer_inside(bench: Bench, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    class Wrapped(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, labels: Tensor, **inputs: Tensor) -> dict[str, Tensor]:
            logits = self.inner(**inputs)
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    def mine(model: nn.Module, data: Examples) -> nn.Module:
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=4, learning_rate=0.1, report_to=[],
            disable_tqdm=True, save_strategy="no", remove_unused_columns=False, use_cpu=True, logging_strategy="no",
        )  # fmt: skip
        Trainer(model=Wrapped(model), args=arguments, train_dataset=data).train()  # type: ignore[arg-type]
        return model

    own = learner(bench(), OwnTraining(mine))
    rows = updates(own, [0])
    assert rows.norm() > 0
    assert not own.bench.load(own.initial()).training  # the Trainer leaves dropout on


def test_a_client_that_raises_harms_nobody_else(bench: Bench, untouched_random_state: None) -> None:
    def mine(model: nn.Module, data: Examples) -> nn.Module:
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.fill_(7.0)
        if 15 in data.rows.tolist():  # type: ignore[union-attr]
            raise MemoryError("gone")
        return model

    own = learner(bench(), OwnTraining(mine))
    batch = [own.bench.everything.take(torch.arange(10 * i, 10 * i + 10)) for i in range(3)]
    trained = own.train(own.initial(), batch, Seeds(0).clients("data order", 0, [0, 1, 2]))
    assert trained.failed == {1: "MemoryError: gone"}
    assert torch.allclose(trained.rows[0], 7 - own.initial()) and torch.equal(trained.rows[0], trained.rows[2])


def test_a_callable_that_returns_no_model_is_a_failed_client(bench: Bench) -> None:
    own = learner(bench(), OwnTraining(lambda model, data: None))  # type: ignore[arg-type,return-value]
    trained = own.train(own.initial(), [own.bench.everything], Seeds(0).clients("data order", 0, [0]))
    assert "expected the trained model" in trained.failed[0]


def test_the_worst_decile_follows_the_clients_labels(bench: Bench) -> None:
    own = learner(bench())
    own.label_mix = torch.cat([torch.tensor([[5, 0]] * 18), torch.tensor([[0, 5]] * 2)])
    metrics = own.evaluate(own.initial(), "test")
    found = {name: metrics[f"accuracy/{name}"].value for name in LABELS if f"accuracy/{name}" in metrics}
    assert metrics[WORST_CLIENTS].value == pytest.approx(min(found.values()))
    own.label_mix = torch.tensor([[5, 0], [0, 0]])  # nothing is known of the second client
    assert own.evaluate(own.initial(), "test")[WORST_CLIENTS].value == pytest.approx(found["a"])


def test_an_empty_split_is_refused(bench: Bench) -> None:
    own = learner(bench())
    own.splits["server"] = torch.zeros(0).long()  # type: ignore[index]
    with pytest.raises(InvalidArgument, match="'server' is empty"):
        own.evaluate(own.initial(), "server")


def test_bad_training_arguments() -> None:
    for make in (lambda: SGD(0.0), lambda: AdamW(-1.0), lambda: Schedule(0), lambda: Schedule(steps=0)):
        with pytest.raises(InvalidArgument):
            make()
