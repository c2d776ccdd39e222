"""What an example-level epsilon rests on, through the learner: nobody moves an update by more than one clipped share.

The plan is the real one; what is expected comes from arithmetic on the bound, or from a loop written here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any, final

import pytest
import torch
from torch import Generator, Tensor, nn

from privfm.checks import InvalidArgument
from privfm.contracts import BuiltModel, Examples, GradientPrivacy, Table
from privfm.defenses import DPPlan, LocalSampling
from privfm.learning import (
    SGD,
    AdamW,
    ImageClassification,
    ModelLearner,
    OwnTraining,
    SequenceClassifier,
    Workbench,
)
from privfm.learning.adapter_kinds import IA3, Adapter, BitFit, LoRA, PromptTuning
from privfm.learning.tasks import Classification
from privfm.randomness import Seeds

LABELS = ("a", "b", "c")
SIZES = (8, 3, 20)
C, RATE, BATCH = 0.05, 1.0, 4
GONE, NOT_A_NUMBER = -1, -2
"""Labels of examples that contribute nothing, and whose loss is not a number."""
BATCHED: dict[str, Adapter | None] = {"LoRA": LoRA(rank=2), "FFA": LoRA(rank=2, freeze_a=True), "head": None}
ONE_BY_ONE: dict[str, Adapter | None] = {"biases": BitFit(), "scales": IA3(), "prompt": PromptTuning(3)}
ENGINES = ["batched", "sequential"]


@final
@dataclass(frozen=True)
class WithMarks(Classification):
    """Classification in which some labels mark what an example is to do."""

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        known = labels.clamp(min=0) if int(labels.min()) < 0 else labels
        factors = (
            torch.ones(labels.shape).masked_fill(labels == GONE, 0.0).masked_fill(labels == NOT_A_NUMBER, torch.nan)
        )
        return super().losses(logits, known) * factors  # not `where`, whose way back lets every NaN through


@pytest.fixture(scope="module")
def benches(tiny_bert: str, sentences: list[str]) -> dict[str, Workbench]:
    """A workbench of each kind, every one away from B = 0, where a factor would have no gradient."""
    found = {}
    for name, adapter in (BATCHED | ONE_BY_ONE).items():
        pooling: Any = "model" if name == "LoRA" else "mean"  # the first token alone is read, or all of them
        source = SequenceClassifier(tiny_bert, pooling=pooling, adapter=adapter, max_length=16)
        built = source.build(LABELS, Seeds(0).generator("initialisation"))
        table = Table(sentences, torch.arange(len(sentences)) % 3, LABELS)
        found[name] = Workbench(built, WithMarks(), table)
    return found


def start(bench: Workbench) -> Tensor:
    return bench.initial + 0.1 * torch.randn(bench.layout.d, generator=Generator().manual_seed(1))


def clients(bench: Workbench) -> list[Examples]:
    return [bench.everything.take(places) for places in torch.arange(sum(SIZES)).split(SIZES)]


def learner(bench: Workbench, engine: Any, training: Any = None, **options: Any) -> ModelLearner:
    own = ModelLearner(bench, {"test": torch.arange(4)}, training or SGD(RATE), engine=engine, **options)
    assert own.engine_note.startswith(engine), own.engine_note
    return own


def privacy(own: ModelLearner, noise: float = 0.0, batch: int = BATCH, steps: int = 1) -> GradientPrivacy:
    local = LocalSampling(batch_size=batch, local_steps=steps)
    found = DPPlan(noise, C, 1.0, 1e-5, unit="example", place="local", sampling="full", local=local)
    given = found.gradient_privacy(own.layers)
    assert given is not None
    return given


def updates(
    own: ModelLearner, data: Sequence[Examples], given: GradientPrivacy, round: int = 0, active: Tensor | None = None
) -> Tensor:
    """Rows of all clients; no failure, and nothing fallen back."""
    generators = Seeds(0).clients("data order", round, range(len(data)))
    note = own.engine_note
    result = own.train(start(own.bench), data, generators, given, active)
    assert not result.failed, result.failed
    assert own.engine_note == note
    return result.rows


def relabelled(examples: Examples, place: int, label: int) -> Examples:
    labels = examples.labels.clone()
    labels[place] = label
    return examples.with_labels(labels)


def farthest(
    own: ModelLearner, given: GradientPrivacy, label: int, active: Tensor | None = None
) -> tuple[list[float], float]:
    """How far client 0's update moves when each of its examples gets this label, and the others' at most."""
    data = clients(own.bench)
    before, far, beside = updates(own, data, given, active=active), [], 0.0
    for place in range(SIZES[0]):
        after = updates(own, [relabelled(data[0], place, label), *data[1:]], given, active=active)
        far.append(float((after - before)[0].norm()))
        beside = max(beside, float((after - before)[1:].abs().max()))
    return far, beside


# One example's share


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", sorted(BATCHED))
def test_one_example_moves_its_clients_update_by_at_most_its_share(kind, engine, benches):
    own = learner(benches[kind], engine, tokens=40 if engine == "batched" else None)  # a batch needs a few passes
    given, most = privacy(own), RATE * C / BATCH
    far, beside = farthest(own, given, GONE)
    assert max(far) == pytest.approx(most, rel=1e-3)  # the bound is reached: every gradient here is longer
    assert all(one == pytest.approx(most, rel=1e-3) or one < 1e-6 for one in far)  # in the batch, or not
    assert min(far) < 1e-6
    assert beside < 1e-6
    assert farthest(own, given, NOT_A_NUMBER)[0] == pytest.approx(far, abs=1e-6)  # takes part, with zero


@pytest.mark.parametrize("engine", ENGINES)
def test_where_factors_take_turns_the_bound_is_on_what_is_trained(engine, benches):
    """What is not trained neither shortens a gradient that is clipped nor moves."""
    own = learner(benches["LoRA"], engine)
    layout = own.bench.layout
    active = torch.cat(
        [torch.full((n,), "lora_A" not in name) for name, n in zip(layout.names, layout.sizes, strict=True)]
    )
    far, beside = farthest(own, privacy(own), GONE, active)
    assert max(far) == pytest.approx(RATE * C / BATCH, rel=1e-3)
    assert min(far) < 1e-6 and beside < 1e-6
    moved = updates(own, clients(own.bench), privacy(own, noise=1.0), active=active)
    assert bool((moved[:, ~active] == 0).all()) and bool((moved[:, active] != 0).all())


@pytest.mark.parametrize("engine", ENGINES)
def test_another_example_in_its_place_moves_twice_that(engine, benches):
    """Also one that is longer or shorter than all others of its pass."""
    own = learner(benches["LoRA"], engine)
    given, data, everything = privacy(own, batch=8), clients(own.bench), own.bench.everything
    before, most = updates(own, data, given), RATE * C / 8
    lengths = everything.inputs["attention_mask"].sum(1)
    for row in (int(lengths.argmax()), int(lengths.argmin())):
        for place in (0, 5):
            rows = torch.arange(8)
            rows[place] = row
            after = updates(own, [everything.take(rows), *data[1:]], given)
            assert float((after - before)[0].norm()) <= 2 * most * (1 + 1e-3)
            assert float((after - before)[1:].abs().max()) < 1e-6


@final
@dataclass(frozen=True)
class Mistaken(GradientPrivacy):
    """A plan that clips wrongly; head: `(d,)` bool, which columns are the head's."""

    right: GradientPrivacy
    way: str
    head: Tensor

    def batches(self, examples: int, generator: Generator) -> Iterator[Tensor]:
        return self.right.batches(examples, generator)

    def clip(self, gradients: Tensor) -> Tensor:
        if self.way == "forgotten":
            return gradients
        if self.way == "head left out":
            adapters = self.right.clip(gradients.masked_fill(self.head, 0.0))
            return torch.where(self.head, gradients, adapters)
        total = gradients.sum(0)  # the batch's gradient is clipped instead of each example's
        return gradients * min(1.0, C * len(gradients) / float(total.norm()))

    def noised(self, sums: Tensor, examples: Sequence[int], generators: Sequence[Generator]) -> Tensor:
        return self.right.noised(sums, examples, generators)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("way", ["forgotten", "head left out", "batch"])
def test_mistakes_in_clipping_break_the_bound(way, engine, benches):
    own = learner(benches["LoRA"], engine)
    layout = own.bench.layout
    head = torch.cat([torch.full((n,), "lora" not in name) for name, n in zip(layout.names, layout.sizes, strict=True)])
    assert 0 < int(head.sum()) < own.d
    far, _ = farthest(own, Mistaken(privacy(own), way, head), GONE)
    assert max(far) > 1.5 * RATE * C / BATCH


@final
@dataclass(frozen=True)
class Noted(GradientPrivacy):
    """A plan that keeps what it clipped, and the sums it was given."""

    right: GradientPrivacy
    clipped: list[Tensor]
    sums: list[Tensor]

    def batches(self, examples: int, generator: Generator) -> Iterator[Tensor]:
        return self.right.batches(examples, generator)

    def clip(self, gradients: Tensor) -> Tensor:
        self.clipped.append(self.right.clip(gradients))
        return self.clipped[-1]

    def noised(self, sums: Tensor, examples: Sequence[int], generators: Sequence[Generator]) -> Tensor:
        self.sums.append(sums)
        return self.right.noised(sums, examples, generators)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_sum_is_rounded_once(engine, benches):
    """Secure noise is sized for rows added up in float64: in float32 every addition would round by 2^-24."""
    own = learner(benches["LoRA"], engine, tokens=60 if engine == "batched" else None)
    given = Noted(privacy(own, batch=31), [], [])
    updates(own, [own.bench.everything.take(torch.arange(31))], given)
    rows, (found,) = torch.cat(given.clipped), given.sums[0]
    exact = rows.double().sum(0)
    assert len(rows) == 31 and float(rows.norm(dim=1).max()) <= C
    most = exact.abs() * 2.0**-24 * 1.001
    assert bool(((found.double() - exact).abs() <= most).all())
    assert bool(((rows.sum(0).double() - exact).abs() > most).any())


# The same steps, however they are computed


def naive(own: ModelLearner, data: Sequence[Examples], noise: float, steps: int) -> Tensor:
    """DP-SGD, one backward pass an example (Abadi et al., 2016, algorithm 1); the plan's draws, in the plan's order."""
    bench, rows = own.bench, []
    for place, examples in enumerate(data):
        generator, n = Seeds(0).generator("data order", 0, place), len(examples)
        torch.randint(2**62, (), generator=generator)  # the key of its dropout
        rate = min(1.0, BATCH / n)
        drawn = [torch.rand(n, generator=generator, dtype=torch.float64) < rate for _ in range(steps)]
        weights = start(bench)
        for chosen in drawn:
            total = torch.zeros(own.d)
            for example in chosen.nonzero():
                bench.load(weights)
                loss = bench.losses(Examples(examples.take(example).inputs, examples.labels[example])).sum()
                found = torch.autograd.grad(loss, list(bench.parameters.values()))
                gradient = bench.layout.flatten(dict(zip(bench.parameters, found, strict=True)))
                total += gradient * min(1.0, C / float(gradient.norm()))
            total += noise * C * torch.randn(own.d, generator=generator)
            weights = weights - RATE * total / (rate * n)
        rows.append(weights - start(bench))
    return torch.stack(rows)


@pytest.mark.parametrize("kind", [*sorted(BATCHED), *sorted(ONE_BY_ONE)])
def test_every_engine_takes_the_steps_of_a_naive_loop(kind, benches):
    for engine in ENGINES if kind in BATCHED else ["sequential"]:
        own = learner(benches[kind], engine)
        data = clients(own.bench)
        found = updates(own, data, privacy(own, noise=1.0, steps=3))
        expected = naive(own, data, 1.0, 3)
        assert float((found - expected).abs().max()) < 1e-6
        assert float((found - naive(own, data, 0.9, 3)).abs().max()) > 1e-4


@pytest.mark.parametrize("training", [SGD(0.1, momentum=0.9), AdamW(0.01, weight_decay=0.1)], ids=["momentum", "adamw"])
def test_what_an_optimizer_remembers_ends_with_the_round(training, benches):
    rows = []
    for engine in ENGINES:
        own = learner(benches["FFA"], engine, training)
        data, given = clients(own.bench), privacy(own, noise=1.0, steps=3)
        first = updates(own, data, given)
        updates(own, [one.with_labels((one.labels + 1) % 3) for one in data], given, round=1)
        assert torch.equal(updates(own, data, given), first)
        rows.append(first)
    assert torch.allclose(*rows, atol=1e-5)  # an AdamW step divides by the root of what may be small


# Noise


@pytest.mark.parametrize("engine", ENGINES)
def test_no_two_steps_clients_or_rounds_share_their_noise(engine, benches):
    """Examples that contribute nothing leave the noise alone: deviation z C sqrt(steps) / b, and no correlation."""
    own, steps = learner(benches["LoRA"], engine), 4
    given = privacy(own, noise=1.0, steps=steps)
    data = [one.with_labels(torch.full((len(one),), GONE)) for one in clients(own.bench)]
    rows = torch.cat([updates(own, data, given, round)[[0, 2]] for round in (0, 1)])
    assert rows.std(1).tolist() == pytest.approx([RATE * C * sqrt(steps) / BATCH] * 4, rel=0.2)
    similar = torch.corrcoef(rows) - torch.eye(4)
    assert float(similar.abs().max()) < 5 / sqrt(own.d)
    again = updates(own, data[:1], given, 0)  # the same client in the same round: the same noise, as a seed is a seed
    assert torch.allclose(again[0], rows[0], atol=1e-6)


# An example that cannot be trained on


@pytest.mark.parametrize("engine", ENGINES)
def test_an_example_that_raises_is_zero_and_its_client_answers(engine, benches):
    """Were the client lost, who answers would tell of one example, whatever the noise."""
    own = learner(benches["LoRA"], engine)
    given, data = privacy(own, noise=1.0, batch=8, steps=2), clients(own.bench)
    expected = updates(own, [relabelled(data[0], 3, GONE), *data[1:]], given)
    generators = Seeds(0).clients("data order", 0, range(3))
    found = own.train(start(own.bench), [relabelled(data[0], 3, 7), *data[1:]], generators, given)  # of three classes
    assert found.failed == {}
    assert torch.allclose(found.rows, expected, atol=1e-6)
    generators = Seeds(0).clients("data order", 0, range(3))
    plain = own.train(start(own.bench), [relabelled(data[0], 3, 7), *data[1:]], generators)
    assert list(plain.failed) == [0]  # without a plan it is the client's loss


# Models whose examples see each other


@final
class Centred(nn.Module):
    """A linear model of images from which something is taken off: the batch's mean, or their own."""

    def __init__(self, batch: bool) -> None:
        super().__init__()
        self.last = nn.Linear(16, 3)
        self.dimension = 0 if batch else 1

    def forward(self, pixel_values: Tensor) -> Tensor:
        flat = pixel_values.flatten(1)
        centred: Tensor = self.last(flat - flat.mean(self.dimension, keepdim=True))
        return centred


def of_images(module: nn.Module) -> ModelLearner:
    images = torch.randn(sum(SIZES), 1, 4, 4, generator=Generator().manual_seed(2))
    table = Table(images, torch.arange(sum(SIZES)) % 3, LABELS)
    built = BuiltModel(module, None, (), lambda folder: None)
    return ModelLearner(Workbench(built, ImageClassification(), table), {}, SGD(RATE))


def test_a_model_that_mixes_examples_in_its_own_code_is_refused():
    """No layer says so, and clipping each example's gradient would not bound what it does to the others'."""
    own = of_images(Centred(batch=True))
    assert "Centred depends on the others of its batch" in own.refuses_private_gradients()
    with pytest.raises(InvalidArgument, match="depends on the others"):
        updates(own, clients(own.bench), privacy(own))
    able = of_images(Centred(batch=False))
    assert able.refuses_private_gradients() == ""
    assert farthest(able, privacy(able, batch=8), GONE)[0] == pytest.approx([C / 8] * 8, rel=1e-3)


@pytest.mark.parametrize("batch", [True, False])
def test_unrefused_it_would_break_the_bound(batch, monkeypatch):
    monkeypatch.setattr("privfm.learning.learner.mixes_examples", lambda *_: False)
    own = of_images(Centred(batch))
    data, given = clients(own.bench), privacy(own, batch=8)
    pixels = data[0].inputs["pixel_values"].clone()
    pixels[2] *= -100
    changed = data[0].with_inputs({"pixel_values": pixels})
    moved = (updates(own, [changed], given) - updates(own, data[:1], given)).norm()
    assert (float(moved) > 2 * C / 8 * (1 + 1e-3)) is batch


def test_a_head_of_zeros_hides_nothing():
    module = Centred(batch=True)
    nn.init.zeros_(module.last.weight)
    assert "depends on the others" in of_images(module).refuses_private_gradients()


def test_a_model_that_has_no_gradients_raises_before_training():
    """In training itself it would be taken for examples that cannot be trained on, and leave noise alone."""

    @final
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(16, 3)

        def forward(self, pixel_values: Tensor) -> Tensor:
            found: Tensor = self.last(pixel_values.flatten(1))
            return found.detach() if torch.is_grad_enabled() else found

    with pytest.raises(RuntimeError, match="does not require grad"):
        of_images(Broken()).refuses_private_gradients()


def test_models_whose_examples_are_their_own_are_not_refused(benches):
    for kind, bench in benches.items():
        assert learner(bench, "sequential").refuses_private_gradients() == "", kind
    unseen = learner(benches["head"], "sequential", OwnTraining(lambda model, _: model))
    assert "OwnTraining" in unseen.refuses_private_gradients()


@pytest.mark.parametrize("engine", ENGINES)
def test_under_autocast_the_bound_holds_in_single_precision(engine, benches):
    own = learner(benches["LoRA"], engine, autocast=torch.bfloat16)
    far, beside = farthest(own, privacy(own), GONE)
    assert max(far) == pytest.approx(RATE * C / BATCH, rel=1e-3)
    assert min(far) < 1e-6 and beside < 1e-6
