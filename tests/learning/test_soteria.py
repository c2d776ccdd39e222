"""Soteria: the defended layer's gradient is that of a perturbed representation, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Generator, Tensor, nn

from privfm.attacks.reconstruction.linear_layer import shared_input
from privfm.checks import InvalidArgument
from privfm.cli.options import parser_for, values
from privfm.contracts import BuiltModel, Examples, LocalTraining, Table
from privfm.defenses.channels import Plaintext
from privfm.defenses.mean import Mean
from privfm.experiment import RunConfig, prepare
from privfm.federation import Average, FixedSize, rounds
from privfm.learning import (
    IID,
    SGD,
    AdamW,
    Digits,
    ImageClassification,
    LoRA,
    ModelLearner,
    OneStep,
    OwnTraining,
    PlainCNN,
    Schedule,
    SequenceClassification,
    SequenceClassifier,
    SmallCNN,
    VisionTransformer,
    Workbench,
)
from privfm.learning.adapter_kinds import WholeModel
from privfm.learning.soteria import Soteria, kept_features
from privfm.randomness import Seeds

LABELS = ("a", "b", "c")
STEP = OneStep(0.5, batch_size=64, dropout=False)


class Perceptron(nn.Module):
    """Images of 64 values, 20 hidden ones, 3 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(64, 20), nn.Linear(20, 3)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return torch.as_tensor(self.head(self.first(pixel_values.flatten(1)).relu()))


def perceptron() -> BuiltModel:
    torch.manual_seed(0)
    return BuiltModel(Perceptron(), None, (), lambda folder: None)


def own_images(n: int) -> Tensor:
    return torch.randn(n, 1, 8, 8, generator=Generator().manual_seed(0))


def images(n: int = 60) -> Table:
    return Table(own_images(n), torch.randint(0, 3, (n,), generator=Generator().manual_seed(1)), LABELS)


def learner(training: LocalTraining, built: BuiltModel | None = None) -> ModelLearner:
    bench = Workbench(built or perceptron(), ImageClassification(), images())
    return ModelLearner(bench, {"test": torch.arange(len(bench.everything))}, training)


def update(own: ModelLearner, places: Tensor | None = None) -> dict[str, Tensor]:
    """What one client's training adds, by name."""
    examples = own.bench.everything.take(torch.arange(10) if places is None else places)
    trained = own.train(own.initial(), [examples], Seeds(0).clients("data order", 0, [0]))
    assert trained.failed == {}
    return own.bench.layout.unflatten(trained.rows[0])


def changed(found: dict[str, Tensor], plain: dict[str, Tensor]) -> set[str]:
    return {name for name in plain if not torch.allclose(found[name], plain[name], rtol=1e-4, atol=1e-7)}


# What it computes


def by_hand(own: ModelLearner, share: float, largest: bool = False) -> dict[str, np.ndarray[Any, Any]]:
    """The whole step of the perceptron in float64, example after example and feature after feature."""
    values_of = {name: value.double().numpy() for name, value in own.bench.layout.unflatten(own.initial()).items()}
    pixels = own.bench.everything.inputs["pixel_values"][:10].flatten(1).double().numpy()
    labels = own.bench.everything.labels[:10].numpy()
    steps = {name: np.zeros_like(value) for name, value in values_of.items()}
    lengths, magnitudes = np.zeros(20), np.zeros(20)
    for image in pixels:
        for i in range(20):
            feature = values_of["first.weight"][i] @ image + values_of["first.bias"][i]
            if feature > 0:  # d r_i / d X is the weight's row, zero for a dead feature
                lengths[i] += np.linalg.norm(values_of["first.weight"][i])
                magnitudes[i] += feature
    assert (magnitudes > 0).all()
    order = np.argsort(lengths / magnitudes, kind="stable")
    taken = order[::-1][: int(share * 20)] if largest else order[: int(share * 20)]
    for image, label in zip(pixels, labels, strict=True):
        before = values_of["first.weight"] @ image + values_of["first.bias"]
        representation = np.maximum(before, 0)
        shown = representation.copy()
        shown[taken] = 0
        logits = values_of["head.weight"] @ representation + values_of["head.bias"]
        errors = np.exp(logits) / np.exp(logits).sum() - np.eye(3)[label]
        below = (values_of["head.weight"].T @ errors) * (before > 0)
        for name, gradient in (
            ("head.weight", np.outer(errors, shown)), ("head.bias", errors),
            ("first.weight", np.outer(below, image)), ("first.bias", below),
        ):  # fmt: skip
            steps[name] += -0.5 * gradient / 10
    return steps


@pytest.mark.parametrize("share", [0.0, 0.1, 0.4, 0.8])
def test_the_update_of_a_perceptron_is_the_one_by_hand(share: float) -> None:
    own = learner(Soteria(STEP, "head", share))
    found, expected = update(own), by_hand(own, share)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name].numpy(), value, rtol=1e-4, atol=2e-6)
    if share:
        wrong = by_hand(own, share, largest=True)["head.weight"]  # the opposite rule
        assert not np.allclose(found["head.weight"].numpy(), wrong, rtol=1e-2, atol=1e-4)


def test_only_the_defended_weight_learns_otherwise() -> None:
    plain = update(learner(STEP))
    found = update(learner(Soteria(STEP, "head", 0.6)))
    assert changed(found, plain) == {"head.weight"}
    assert changed(update(learner(Soteria(STEP, "head", 0.0))), plain) == set()
    most = update(learner(Soteria(STEP, "head", 0.95)))
    assert float(most["head.weight"].norm()) < float(found["head.weight"].norm()) < float(plain["head.weight"].norm())


def test_losses_are_those_of_the_model_to_the_last_bit() -> None:
    seen: list[Tensor] = []

    def noting(examples: Examples) -> Tensor:
        seen.append(own.bench.losses(examples))
        return seen[-1]

    own = learner(Soteria(STEP, "head", 0.5))
    module = own.bench.load(own.initial())
    examples = own.bench.everything.take(torch.arange(10))
    own.training.run(module, own.bench.parameters, noting, examples, Generator().manual_seed(0))
    own.bench.load(own.initial())
    order = torch.randperm(10, generator=Generator().manual_seed(0))
    assert torch.equal(seen[0], own.bench.losses(examples.take(order)))


def test_features_of_a_convolutional_network_against_finite_differences() -> None:
    """One image and one pixel at a time, in float64."""
    module = SmallCNN(width=4).build(LABELS, Seeds(0).generator("initialisation")).module.double()
    body: nn.Sequential = module.network[:-1]  # type: ignore[index, assignment]
    pixels = own_images(3).double()
    watched = pixels.clone().requires_grad_()
    little = 1e-6
    nudges = little * torch.eye(64, dtype=torch.float64).view(64, 1, 8, 8)
    lengths, magnitudes = torch.zeros(32).double(), torch.zeros(32).double()
    with torch.no_grad():
        for image in pixels:
            slopes = (body(image + nudges) - body(image - nudges)) / (2 * little)  # (pixels, features)
            lengths += slopes.norm(dim=0)
            magnitudes += body(image[None])[0].abs()
    ratios = torch.where(magnitudes == 0, torch.inf, lengths / magnitudes)
    for share in (0.1, 0.4, 0.9):
        kept = kept_features(body(watched), watched, share)
        taken = sorted(range(32), key=lambda i: (float(ratios[i]), i))[: int(share * 32)]
        assert sorted((~kept).nonzero()[:, 0].tolist()) == sorted(taken)


def test_which_features_are_taken_in_edge_cases() -> None:
    inputs = torch.tensor([[1.0, 2.0], [3.0, -1.0]], requires_grad=True)
    constant = torch.full((2, 1), 5.0) + 0 * inputs[:, :1]
    zero = 0 * inputs[:, :1]
    equal = inputs[:, :1].exp()  # a ratio of 1
    representation = torch.cat([zero, equal, equal, constant, 7 * equal], 1)
    for share, left in ((0.0, [1, 1, 1, 1, 1]), (0.2, [1, 1, 1, 0, 1]), (0.4, [1, 0, 1, 0, 1]), (0.8, [1, 0, 0, 0, 0])):
        assert kept_features(representation, inputs, share).long().tolist() == left
    assert inputs.grad is None


def test_whole_columns_of_the_defended_gradient_are_missing() -> None:
    plain, found = (update(learner(training))["head.weight"] for training in (STEP, Soteria(STEP, "head", 0.6)))
    gone = ~found.any(0)
    assert int(gone.sum()) == int(0.6 * 20)
    torch.testing.assert_close(found[:, ~gone], plain[:, ~gone], rtol=1e-4, atol=1e-7)
    assert float(plain[:, gone].norm()) > float(plain[:, ~gone].norm())  # the large ones are taken


def test_units_of_a_feature_do_not_matter() -> None:
    """Also those with examples in which they are dead, for which a constant in the ratio would."""
    pixels = own_images(6).flatten(1).requires_grad_()
    features = (pixels @ torch.randn(64, 10, generator=Generator().manual_seed(2))).relu()
    units = torch.tensor([1e-4, 1e4] * 5)
    assert torch.equal(kept_features(features, pixels, 0.5), kept_features(units * features, pixels, 0.5))


# With what it goes together


def test_steps_of_gradient_descent_are_each_perturbed() -> None:
    schedule = Schedule(batch_size=64, steps=2)
    two = update(learner(Soteria(SGD(0.5, schedule), "head", 0.5)))
    own = learner(Soteria(STEP, "head", 0.5))
    first = update(own)
    model = own.initial() + own.bench.layout.flatten(first)
    examples = own.bench.everything.take(torch.arange(10))
    second = own.train(model, [examples], Seeds(0).clients("data order", 0, [0])).rows[0]
    expected = own.bench.layout.flatten(first) + second
    torch.testing.assert_close(own.bench.layout.flatten(two), expected, rtol=1e-3, atol=1e-6)
    adam = update(learner(Soteria(AdamW(0.01, schedule), "head", 0.5)))
    assert bool(adam["head.weight"].any())


def test_a_learner_says_what_it_does_with_it() -> None:
    own = learner(STEP).bench
    asked = ModelLearner(own, {}, Soteria(SGD(0.1), "head", 0.5), engine="batched")
    assert asked.engine_note == "sequential: Soteria does not take its steps on matrices"
    assert "Soteria does not show its steps" in asked.refuses_private_gradients()
    training = SGD(0.1, Schedule(batch_size=4, epochs=2))
    assert Soteria(training, "head", 0.5).local_steps(10) == training.local_steps(10)


def test_dropout_is_awake_in_both_passes() -> None:
    built = PlainCNN(size=8, width=4, hidden=16).build(LABELS, Seeds(0).generator("initialisation"))
    own = learner(Soteria(OneStep(0.5, batch_size=64), "network.10", 0.3), built)
    examples = own.bench.everything.take(torch.arange(10))
    rows = own.train(own.initial(), [examples] * 3, Seeds(0).clients("dropout", 0, [0, 1, 0])).rows
    assert torch.equal(rows[0], rows[2])
    assert not torch.allclose(rows[0], rows[1], atol=1e-5)


@pytest.mark.usefixtures("untouched_random_state")
def test_nothing_stays_behind() -> None:
    own = learner(Soteria(STEP, "head", 0.5))
    before = own.evaluate(own.initial(), "test")["loss"].value
    good = own.bench.everything.take(torch.arange(10))
    batch = [good, good.with_labels(torch.full((10,), 7)), good]
    trained = own.train(own.initial(), batch, Seeds(0).clients("data order", 0, [0, 1, 0]))
    assert list(trained.failed) == [1]
    assert torch.equal(trained.rows[0], trained.rows[2])
    assert all(not part._forward_hooks for part in own.bench.module.modules())
    assert own.evaluate(own.initial(), "test")["loss"].value == before
    assert own.bench.everything.inputs["pixel_values"].requires_grad is False


@pytest.mark.parametrize(
    ("adapter", "pooling", "layer"),
    [
        pytest.param(WholeModel(), "mean", "classifier", id="whole"),
        pytest.param(WholeModel(frozen=("*embeddings*",)), "model", "classifier", id="frozen embeddings"),
        pytest.param(LoRA(rank=2, layers=(2,)), "mean", "classifier", id="adapters above kept activations"),
        pytest.param(LoRA(rank=2), "model", "base_model.model.classifier", id="adapters"),
        pytest.param(None, "mean", "classifier", id="head"),
    ],
)
def test_text_is_perturbed_by_its_word_embeddings(
    adapter: Any, pooling: Any, layer: str, tiny_bert: str, sentences: list[str]
) -> None:
    """Against word embeddings handed to the model from outside, a text and a feature at a time."""
    source = SequenceClassifier(tiny_bert, pooling=pooling, adapter=adapter, max_length=16)
    built = source.build(LABELS, Seeds(0).generator("initialisation"))
    table = Table(sentences, torch.arange(len(sentences)) % 3, LABELS)
    bench = Workbench(built, SequenceClassification(), table)
    plain, own = (ModelLearner(bench, {}, training) for training in (STEP, Soteria(STEP, layer, 0.4)))
    found, full = update(own, torch.arange(4)), update(plain, torch.arange(4))
    head = next(name for name in found if "classifier" in name and name.endswith("weight"))
    assert changed(found, full) == {head}
    expected = text_by_hand(bench, head, range(4))
    torch.testing.assert_close(found[head], expected, rtol=1e-3, atol=1e-6)


def text_by_hand(bench: Workbench, head: str, places: range) -> Tensor:
    """What one step adds to the head's weight, with 0.4 of the features taken."""
    module: Any = bench.load(bench.initial)
    linear: Any = module.get_submodule(head.removesuffix(".weight"))
    encoder: Any = next(part for part in module.modules() if type(part).__name__ == "BertModel")
    seen: list[Tensor] = []
    hook = linear.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    k = linear.weight.shape[1]
    lengths, magnitudes, found = torch.zeros(k), torch.zeros(k), []
    for place in places:
        one = bench.everything.take(torch.tensor([place]))
        length = int(one.inputs["attention_mask"].sum())
        words = encoder.get_input_embeddings()(one.inputs["input_ids"][:, :length]).detach().requires_grad_()
        output = module(inputs_embeds=words, attention_mask=torch.ones(1, length, dtype=torch.int64))
        representation = seen[-1][0]
        gradients = [torch.autograd.grad(value, words, retain_graph=True)[0] for value in representation]
        lengths += torch.stack([gradient.norm() for gradient in gradients])
        magnitudes += representation.detach().abs()
        errors = getattr(output, "logits", output)[0].detach().softmax(0)
        errors[int(one.labels)] -= 1
        found.append(torch.outer(errors, representation.detach()))
    hook.remove()
    total = torch.stack(found).mean(0)
    total[:, (lengths / magnitudes).argsort()[: int(0.4 * k)]] = 0
    return -0.5 * total


def test_a_vision_transformer_is_perturbed_at_its_head() -> None:
    built = VisionTransformer(hidden=16, depth=2, heads=2).build(LABELS, Seeds(0).generator("initialisation"))
    plain = update(learner(STEP, built))
    assert changed(update(learner(Soteria(STEP, "classifier", 0.5), built)), plain) == {"classifier.weight"}


# What it does not stop


def test_features_left_and_all_inputs_of_the_layer_below_stay_exact() -> None:
    one = torch.tensor([3])
    plain = update(learner(STEP), one)
    own = learner(Soteria(STEP, "head", 0.4))
    found = update(own, one)
    shown, whole = (shared_input(step["head.weight"], step["head.bias"]) for step in (found, plain))
    module: Any = own.bench.load(own.initial())
    image = own.bench.everything.inputs["pixel_values"][one].flatten(1)
    representation = module.first(image).relu()[0].detach()
    torch.testing.assert_close(whole, representation, rtol=1e-4, atol=1e-5)  # undefended: all of it
    hidden = shown == 0
    taken = hidden & (representation > 0)
    assert int(taken.sum()) == int(0.4 * 20)
    torch.testing.assert_close(shown[~taken], representation[~taken], rtol=1e-4, atol=1e-5)
    assert float((shown - representation).norm() / representation.norm()) > 0.5  # and those taken are the large ones
    below = shared_input(found["first.weight"], found["first.bias"])
    torch.testing.assert_close(below, image[0], rtol=1e-3, atol=1e-5)


# Bad input


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Soteria(STEP, "head", 1.0), r"share=1.0: expected a number in \[0, 1\)"),
        (lambda: Soteria(STEP, "head", -0.1), "share=-0.1"),
        (lambda: Soteria(OwnTraining(lambda model, _: model), "head", 0.5), "training=OwnTraining: it does not ask"),
        (lambda: Soteria(Soteria(STEP, "head", 0.5), "head", 0.5), "training=Soteria"),
    ],
    ids=["all", "negative", "own loop", "twice"],
)
def test_bad_settings_are_refused_at_once(make: Callable[[], Soteria], said: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        make()


def refusal(training: Soteria, built: BuiltModel) -> str:
    own = learner(training, built)
    module = own.bench.load(own.initial())
    with pytest.raises(InvalidArgument) as reason:
        training.run(module, own.bench.parameters, own.bench.losses, own.bench.everything, Generator())
    return str(reason.value)


def test_layers_that_cannot_be_defended_are_named() -> None:
    assert refusal(Soteria(STEP, "haed", 0.5), perceptron()).endswith("it names none; did you mean 'head'?")
    frozen = perceptron()
    frozen.module.head.requires_grad_(False)  # type: ignore[union-attr]
    assert "it names none; known: first" in refusal(Soteria(STEP, "head", 0.5), frozen)
    cnn = SmallCNN(width=4).build(LABELS, Seeds(0).generator("initialisation"))
    assert "did you mean 'network.9'?" in refusal(Soteria(STEP, "network.0", 0.5), cnn)
    vision = VisionTransformer(hidden=16, depth=2, heads=2).build(LABELS, Seeds(0).generator("initialisation"))
    linear = [name for name, part in vision.module.named_modules() if isinstance(part, nn.Linear)]
    assert "expected one vector an example, (b, k)" in refusal(Soteria(STEP, linear[0], 0.5), vision)
    end = linear[0].rsplit(".", 1)[-1]
    assert "it names 2: " in refusal(Soteria(STEP, end, 0.5), vision)


def test_a_model_of_numbers_that_nothing_embeds_is_refused() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 3)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return torch.as_tensor(self.head(input_ids[:, :4].float()))

    def tokenize(texts: Any) -> dict[str, Tensor]:
        ids = torch.arange(4 * len(texts)).view(-1, 4)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    built = BuiltModel(Counting(), tokenize, (), lambda folder: None)
    bench = Workbench(built, SequenceClassification(), Table(["x", "y"], torch.tensor([0, 1]), LABELS))
    own = ModelLearner(bench, {}, Soteria(STEP, "head", 0.5))
    trained = own.train(own.initial(), [bench.everything], Seeds(0).clients("data order", 0, [0]))
    assert "does not say what embeds them" in trained.failed[0]


# In a federation, and on the command line


def test_a_short_federation_learns_with_it() -> None:
    config = RunConfig(
        data=Digits(), model=SmallCNN(width=4), task=ImageClassification(), partition=IID(10),
        training=Soteria(OneStep(0.2, batch_size=8), "network.9", 0.4), rule=Mean(), channel=Plaintext(),
        optimizer=Average(), cohort=FixedSize(3), rounds=3,
    )  # fmt: skip
    federation = prepare(config, seed=0)
    before = federation.learner.evaluate(federation.learner.initial(), "validation")["loss"].value
    last = list(rounds(federation, until=3))[-1]
    assert last.state.round == 3
    assert federation.learner.evaluate(last.state.model, "validation")["loss"].value < before


def asked(training: LocalTraining) -> LocalTraining:
    return training


HERE = "privfm.learning.soteria.Soteria"


def test_it_is_named_with_what_it_wraps(tmp_path: Path) -> None:
    words = ["--training", HERE, "--training.training", "OneStep", "--training.training.learning_rate", "0.1"]
    found = values(parser_for(asked), asked, [*words, "--training.layer", "head", "--training.share", "0.4"])
    assert found["training"] == Soteria(OneStep(0.1), "head", 0.4)
    file = tmp_path / "training.toml"
    inner = '{class_path = "SGD", init_args = {learning_rate = 0.1}}'
    file.write_text(
        f'[training]\nclass_path = "{HERE}"\n[training.init_args]\nlayer = "head"\nshare = 0.4\ntraining = {inner}\n'
    )
    assert values(parser_for(asked), asked, ["--config", str(file)])["training"] == Soteria(SGD(0.1), "head", 0.4)
    assert "Unvalidated" not in parser_for(Soteria).format_help()
