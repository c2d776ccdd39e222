"""Images by optimisation, on networks small enough to be searched in a second or two."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from privfm.attacks.reconstruction.image_scores import score_images
from privfm.attacks.reconstruction.images import DLG, GradInversion, InvertingGradients
from privfm.attacks.reconstruction.images.local_updates import Arrangement, SimulatedClient, pairs
from privfm.attacks.reconstruction.images.networks import ImageNetwork
from privfm.attacks.reconstruction.images.objectives import Target, total_variation
from privfm.attacks.reconstruction.images.search import PixelRange
from privfm.attacks.reconstruction.images.statistics import statistics_distance
from privfm.checks import InvalidArgument
from privfm.contracts import LocalSteps, Observation, ReconstructionAttack, gradients_of
from privfm.learning.models import PlainCNN, SmallCNN, VisionTransformer

SHAPE = (1, 6, 6)
LABELS = 5


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network(seed: int = 0, activation: Callable[[], nn.Module] = nn.Tanh, norm: bool = False) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1),
            nn.BatchNorm2d(6) if norm else nn.Identity(),
            activation(),
            nn.Conv2d(6, 6, 3, stride=2, padding=1),
            activation(),
            nn.Flatten(),
            nn.Linear(54, LABELS),
        ).eval()


def drawn(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Smooth random images in [0, 1] and labels that differ."""
    generator = seeded(seed)
    coarse = torch.rand(count, 1, 3, 3, generator=generator)
    images = functional.interpolate(coarse, SHAPE[1:], mode="bilinear", align_corners=True)
    return images, torch.randperm(LABELS, generator=generator)[:count]


def loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    output: Any = model(images)
    return functional.cross_entropy(getattr(output, "logits", output), labels)


def sent(model: nn.Module, images: Tensor, labels: Tensor, **declared: Any) -> Observation:
    observed = Observation(model, gradients_of(model, loss(model, images, labels)))
    return observed.told(shape=tuple(images.shape[1:]), **declared)


def trained(
    model: nn.Module, images: Tensor, labels: Tensor, order: list[list[int]], rate: float, momentum: float = 0.0
) -> dict[str, Tensor]:
    """A client's change: steps of torch's own SGD on these batches."""
    moved = copy.deepcopy(model)
    descent = torch.optim.SGD(moved.parameters(), lr=rate, momentum=momentum)
    for batch in order:
        descent.zero_grad()
        loss(moved, images[batch], labels[batch]).backward()
        descent.step()
    before = dict(model.named_parameters())
    return {name: (after - before[name]).detach() for name, after in moved.named_parameters()}


def psnr(found: Tensor | None, images: Tensor) -> float:
    return score_images(found, images).mean_psnr


def grey(images: Tensor) -> float:
    """What somebody scores who has seen nothing and says mid-grey."""
    return psnr(torch.full_like(images, 0.5), images)


# ---- objectives


def test_the_objective_is_zero_at_the_truth_and_has_no_slope_there() -> None:
    model, (images, labels) = network().double(), drawn(3, 1)
    images = images.double().requires_grad_()
    own = ImageNetwork(model)
    target = Target(sent(model, images, labels).tensors, own.like)
    for distance in (target.cosine, target.squared):
        value = distance(own.gradients(images, labels, target.names))
        (slope,) = torch.autograd.grad(value, images)
        assert float(value.detach()) < 1e-25
        assert float(slope.abs().max()) < 1e-10
        elsewhere = distance(own.gradients(images + 0.1, labels, target.names))
        assert float(elsewhere.detach()) > 1e-6


def test_the_cosine_is_the_textbooks_over_all_layers_together_whatever_the_scale() -> None:
    generator = seeded(3)
    one = {name: torch.randn(4, generator=generator).double() for name in "ab"}
    other = {name: torch.randn(4, generator=generator).double() for name in "ab"}
    flat = [torch.cat(list(side.values())) for side in (one, other)]
    expected = 1 - float(flat[0] @ flat[1] / (flat[0].norm() * flat[1].norm()))
    for scale in (1.0, 1e-4, 30.0):
        target = Target({name: scale * value for name, value in one.items()}, flat[0])
        assert float(target.cosine(other)) == pytest.approx(expected, abs=1e-12)
        assert float(target.cosine({name: 7 * value for name, value in other.items()})) == pytest.approx(expected)


def test_the_slope_of_the_objective_is_that_of_finite_differences() -> None:
    model, (images, labels) = network(2).double(), drawn(2, 2)
    own = ImageNetwork(model)
    target = Target(sent(model, images.double(), labels).tensors, own.like)
    guess = torch.rand(images.shape, generator=seeded(5), dtype=torch.float64, requires_grad=True)

    def objective(one: Tensor) -> Tensor:
        return target.cosine(own.gradients(one, labels, target.names))

    assert torch.autograd.gradcheck(objective, guess)


def test_what_is_nan_counts_nowhere() -> None:
    one = {"a": torch.tensor([1.0, torch.nan]), "b": torch.tensor([torch.nan, 2.0]), "c": torch.full((2,), torch.nan)}
    target = Target(one, torch.zeros(()))
    assert target.names == ("a", "b")
    assert target.entries == 2
    other = {"a": torch.tensor([2.0, -9.0]), "b": torch.tensor([5.0, 4.0])}
    assert float(target.cosine(other)) == pytest.approx(0.0, abs=1e-7)
    assert float(target.squared(other)) == pytest.approx(1.0 + 4.0)


def test_of_a_sparsified_update_zeros_may_be_taken_as_cut_away() -> None:
    one = {"a": torch.tensor([1.0, 0.0])}
    other = {"a": torch.tensor([3.0, 4.0])}
    assert float(Target(one, torch.zeros(()), sent_only=True).cosine(other)) == pytest.approx(0.0, abs=1e-7)
    assert float(Target(one, torch.zeros(())).cosine(other)) == pytest.approx(1 - 3 / 5)


@pytest.mark.parametrize("tensor", [torch.full((2,), torch.nan), torch.zeros(2)])
def test_an_update_of_which_nothing_is_seen_is_refused(tensor: Tensor) -> None:
    with pytest.raises(InvalidArgument, match="seen"):
        Target({"a": tensor}, torch.zeros(()))


def test_total_variation_by_hand() -> None:
    image = torch.tensor([[0.0, 1.0, 3.0], [0.0, 1.0, 3.0]])
    assert float(total_variation(image)) == pytest.approx((1 + 2 + 1 + 2) / 4)
    assert float(total_variation(torch.ones(2, 3, 1, 1))) == 0.0


# ---- one gradient


def test_dlg_recovers_an_image_and_its_label_to_the_gradients_precision() -> None:
    model, (images, labels) = network(4), drawn(1, 4)
    found = DLG(iterations=5)(sent(model, images, labels, examples=1))
    assert psnr(found.images, images) > 70
    assert found.labels == tuple(labels.tolist())
    assert set(found.used) == {"shape", "examples"}


def test_inverting_gradients_recovers_an_image_from_a_clipped_gradient_without_label_or_number() -> None:
    model, (images, labels) = network(5), drawn(1, 5)
    observed = sent(model, images, labels)
    clipped = Observation(model, {name: 0.01 * one for name, one in observed.tensors.items()})
    found = InvertingGradients(iterations=150)(clipped.told(shape=SHAPE))
    assert psnr(found.images, images) > 30
    assert found.labels == tuple(labels.tolist())
    assert set(found.used) == {"shape"}
    assert found.facts["inferred examples"] == 1.0


def test_several_images_come_out_beside_their_labels() -> None:
    model, (images, labels) = network(6), drawn(3, 6)
    found = InvertingGradients(iterations=150)(sent(model, images, labels, examples=3))
    assert found.labels == tuple(sorted(labels.tolist()))
    assert found.images is not None
    in_order = images[labels.argsort()]
    assert psnr(found.images, images) > 20
    each = [psnr(one[None], other[None]) for one, other in zip(found.images, in_order, strict=True)]
    assert sum(each) / 3 == pytest.approx(psnr(found.images, images), abs=1e-3)


@pytest.mark.parametrize("attack", [DLG(iterations=10), InvertingGradients(iterations=150)], ids=["dlg", "cosine"])
def test_a_foreign_gradient_tells_nothing_of_the_images(attack: ReconstructionAttack) -> None:
    model, (images, labels), (others, other_labels) = network(7), drawn(1, 7), drawn(1, 107)
    own = attack(sent(model, images, labels, examples=1))
    foreign = attack(sent(model, others, other_labels, examples=1))
    chance = psnr(others, images)  # what the other client's true image scores
    assert foreign.images is not None
    assert psnr(foreign.images.clamp(0, 1), images) < max(chance, grey(images)) + 1.0
    assert psnr(own.images, images) > max(chance, grey(images)) + 10


def test_a_permuted_gradient_tells_nothing() -> None:
    model, (images, labels) = network(8), drawn(1, 8)
    observed = sent(model, images, labels)
    generator = seeded(8)
    shuffled = {
        name: one.flatten()[torch.randperm(one.numel(), generator=generator)].view_as(one)
        for name, one in observed.tensors.items()
    }
    found = InvertingGradients(iterations=200)(Observation(model, shuffled).told(shape=SHAPE, labels=labels))
    assert psnr(found.images, images) < grey(images) + 1.0


def test_entries_that_are_encrypted_are_done_without() -> None:
    model, (images, labels) = network(9), drawn(1, 9)
    observed = sent(model, images, labels).told(labels=labels)
    generator = seeded(9)
    hidden = {
        name: one.masked_fill(torch.rand(one.shape, generator=generator) < 0.5, torch.nan)
        for name, one in observed.tensors.items()
    }
    found = InvertingGradients(iterations=150)(Observation(model, hidden).told(shape=SHAPE, labels=labels))
    assert psnr(found.images, images) > 20
    assert found.facts["numbers compared"] == sum(int((~one.isnan()).sum()) for one in hidden.values())


def test_a_sparsified_gradient_is_compared_on_what_was_sent() -> None:
    model, (images, labels) = network(10), drawn(1, 10)
    observed = sent(model, images, labels).told(labels=labels)
    flat = torch.cat([one.flatten() for one in observed.tensors.values()]).abs()
    least = flat.quantile(0.7)
    sparse = {name: one.masked_fill(one.abs() < least, 0.0) for name, one in observed.tensors.items()}
    told = Observation(model, sparse).told(shape=SHAPE, labels=labels)
    found = InvertingGradients(iterations=150, sent_only=True)(told)
    assert psnr(found.images, images) > grey(images) + 5


def test_labels_are_never_asked_for_when_they_can_be_read_and_refused_when_they_cannot() -> None:
    model, (images, labels) = network(11), drawn(2, 11)
    observed = sent(model, images, labels)
    headless = {name: one for name, one in observed.tensors.items() if not name.startswith("6.")}
    with pytest.raises(InvalidArgument, match=r"told\(labels=...\)"):
        InvertingGradients(iterations=1)(Observation(model, headless).told(shape=SHAPE, examples=2))
    found = InvertingGradients(iterations=1)(Observation(model, headless).told(shape=SHAPE, labels=labels))
    assert set(found.used) == {"shape", "labels"}


def test_a_wrongly_inferred_label_is_put_right_during_the_search() -> None:
    # Two of one label and one of another, where the counts by impact are easily wrong; here made wrong on purpose.
    model, (images, _) = network(12), drawn(3, 12)
    labels = torch.tensor([0, 2, 4])
    own = ImageNetwork(model)
    target = Target(sent(model, images, labels).tensors, own.like)
    training = SimulatedClient(own, LocalSteps(1.0), torch.tensor([0, 2, 2]), target.names, seeded(0))
    gradient = training.sent(images[None], again=False)["6.bias"]
    apart = target.seen("6.bias") - gradient
    assert (int(apart.argmax()), int(apart.argmin())) == (2, 4)
    between = training.rearranging(
        lambda one, way: float(target.cosine(training.sent(one, way, again=False))), lambda _: (2, 4), 100, seeded(1)
    )
    for iteration in (20, 40, 60):
        between(iteration, images[None, None])
    assert sorted(training.arrangement.labels.tolist()) == [0, 2, 4]


# ---- several steps


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_simulated_client_is_torchs_own_sgd(momentum: float) -> None:
    model, (images, labels) = network(13).double(), drawn(4, 13)
    images = images.double()
    change = trained(model, images, labels, [[2, 0], [3, 1], [1, 0]], 0.3, momentum)
    own = ImageNetwork(model)
    training = SimulatedClient(own, LocalSteps(0.3, 3, batch_size=2, momentum=momentum), labels, own.trained, seeded(0))
    assert (training.epochs, training.whole_epochs, training.ordered) == (2, 1, True)
    training.arrangement = Arrangement(labels, torch.tensor([[2, 0, 3, 1], [1, 0, 2, 3]]))
    simulated = training.sent(images.expand(2, *images.shape), again=False)
    for name, one in change.items():
        weight = 3 + 2 * momentum + momentum**2
        assert torch.allclose(simulated[name], one / (-0.3 * weight), atol=1e-13)


def test_two_steps_of_one_example_each_without_the_labels_of_a_step() -> None:
    model, (images, labels) = network(14), drawn(2, 14)
    change = trained(model, images, labels, [[1], [0]], rate=0.05)
    observed = Observation(model, change, LocalSteps(0.05, 2, batch_size=1)).told(shape=SHAPE, examples=2)
    found = InvertingGradients(iterations=150)(observed)
    assert found.labels == tuple(sorted(labels.tolist()))
    assert psnr(found.images, images) > 20
    assert set(found.used) == {"shape", "examples"}


def test_epochs_in_different_orders_are_paired() -> None:
    model, (images, labels) = network(15), drawn(2, 15)
    change = trained(model, images, labels, [[1], [0], [0], [1]], rate=0.05)
    observed = Observation(model, change, LocalSteps(0.05, 4, batch_size=1)).told(shape=SHAPE, labels=labels)
    found = InvertingGradients(iterations=150)(observed)
    assert found.images is not None
    assert found.images.shape == images.shape
    assert psnr(found.images, images) > 18


def test_of_an_unfinished_epoch_only_what_was_used_is_given() -> None:
    model, (images, labels) = network(16), drawn(4, 16)
    change = trained(model, images, labels, [[3, 1]], rate=0.05)
    observed = Observation(model, change, LocalSteps(0.05, 1, batch_size=2)).told(shape=SHAPE, labels=labels)
    found = InvertingGradients(iterations=400)(observed)
    assert found.labels == tuple(sorted(labels[[3, 1]].tolist()))
    assert psnr(found.images, images[[3, 1]]) > 18


def test_epochs_disagree_by_their_sets_and_not_by_their_orders() -> None:
    model, (images, labels) = network(17), drawn(3, 17)
    own = ImageNetwork(model)
    training = SimulatedClient(own, LocalSteps(0.1, 6, batch_size=1), labels, own.trained, seeded(0))
    assert float(training.disagreement(torch.stack([images, images[[2, 0, 1]]]))) == pytest.approx(0.0, abs=1e-12)
    assert float(training.disagreement(torch.stack([images, images + 0.2]))) > 1e-3


def test_pairs_stay_within_a_label() -> None:
    images = torch.tensor([0.0, 1.0, 5.0])[:, None, None, None]
    other = torch.tensor([1.1, 0.1, 0.9])[:, None, None, None]
    assert pairs(images, other, torch.tensor([0, 0, 3])).tolist() == [1, 0, 2]
    assert pairs(images, other, torch.tensor([0, 0, 0])).tolist() == [1, 2, 0]


# ---- batch statistics


def test_distance_to_statistics_by_hand() -> None:
    layer = nn.BatchNorm2d(2).eval()
    assert layer.running_mean is not None
    layer.running_mean.copy_(torch.tensor([1.0, 0.0]))
    inputs = torch.tensor([[[[0.0, 2.0]], [[3.0, 5.0]]]])  # means 1 and 4, variances 1 and 1
    assert float(statistics_distance([(layer, inputs)])) == pytest.approx(4.0)
    assert float(statistics_distance([(nn.BatchNorm2d(2, track_running_stats=False), inputs)])) == 0.0


def test_gradinversion_uses_statistics_and_says_so() -> None:
    model, (images, labels) = network(18, norm=True), drawn(2, 18)
    public, _ = drawn(64, 1018)
    model.train()
    for _ in range(20):
        model(public)
    model.eval()
    before = {name: one.clone() for name, one in model.state_dict().items()}
    attack = GradInversion(iterations=150, seeds=2)
    found = attack(sent(model, images, labels, examples=2))
    assert set(found.used) == {"shape", "examples", "batch statistics"}
    assert psnr(found.images, images) > grey(images) + 3
    assert all(bool(one.equal(before[name])) for name, one in model.state_dict().items())


def test_gradinversion_without_statistics_is_refused() -> None:
    model, (images, labels) = network(19), drawn(1, 19)
    observed = sent(model, images, labels)
    with pytest.raises(InvalidArgument, match="running statistics"):
        GradInversion(iterations=1)(observed)
    found = GradInversion(iterations=1, seeds=2, batch_statistics=0)(observed)
    assert set(found.used) == {"shape"}


# ---- time, models, bad input


@pytest.mark.parametrize(
    "attack",
    [DLG(), InvertingGradients(), GradInversion(batch_statistics=0)],
    ids=["dlg", "cosine", "statistics"],
)
def test_a_time_limit_gives_the_best_so_far(attack: ReconstructionAttack) -> None:
    model, (images, labels) = network(20), drawn(1, 20)
    told: list[float] = []
    found = attack(
        sent(model, images, labels, examples=1), seconds=0.2, progress=lambda _what, share: told.append(share)
    )
    assert found.stopped
    assert found.images is not None
    assert found.images.shape == images.shape
    assert bool(found.images.isfinite().all())
    assert isinstance(found.facts["objective"], float)
    assert all(0 <= share <= 1 for share in told)
    assert told == sorted(told)


def test_more_restarts_never_end_higher_and_a_seed_decides_everything() -> None:
    model, (images, labels) = network(21, nn.ReLU), drawn(2, 21)
    observed = sent(model, images, labels).told(labels=labels)
    one = InvertingGradients(iterations=20)(observed, generator=seeded(1))
    three = InvertingGradients(iterations=20, restarts=3)(observed, generator=seeded(1))
    again = InvertingGradients(iterations=20, restarts=3)(observed, generator=seeded(1))
    assert float(three.facts["objective"]) <= float(one.facts["objective"])
    assert three.images is not None
    assert again.images is not None
    assert bool(three.images.equal(again.images))


@pytest.mark.parametrize(
    ("source", "shape"),
    [
        (SmallCNN(size=8, width=4), (1, 8, 8)),
        (PlainCNN(size=8, width=4, hidden=8), (1, 8, 8)),
        (VisionTransformer(size=8, patch=4, hidden=8, depth=1, heads=2), (1, 8, 8)),
    ],
    ids=["SmallCNN", "PlainCNN", "VisionTransformer"],
)
def test_the_projects_models_run_and_stay_as_they_are(source: Any, shape: tuple[int, int, int]) -> None:
    model = source.build([str(label) for label in range(3)], seeded(0)).module
    images, labels = torch.rand(2, *shape, generator=seeded(1)), torch.tensor([0, 2])
    observed = sent(model, images, labels, examples=2)
    before = copy.deepcopy(model.state_dict())
    found = InvertingGradients(iterations=3)(observed)
    assert found.images is not None
    assert found.images.shape == images.shape
    assert float(found.images.min()) >= 0
    assert float(found.images.max()) <= 1
    assert all(bool(one.equal(before[name])) for name, one in model.state_dict().items())
    assert all(one.grad is None and one.requires_grad for one in model.parameters())


def test_dlg_says_what_it_cannot_follow() -> None:
    model, (images, labels) = network(22, nn.ReLU), drawn(1, 22)
    observed = sent(model, images, labels, examples=1)
    with pytest.raises(InvalidArgument, match=r"ReLU.*InvertingGradients"):
        DLG()(observed)
    assert DLG(iterations=1, insist=True)(observed).facts["not smooth"] == "ReLU"
    assert not DLG().refusal(sent(network(22), images, labels, examples=1))


class FunctionalPooling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(9, LABELS)

    def forward(self, images: Tensor) -> Tensor:
        output: Tensor = self.head(functional.max_pool2d(images.sigmoid(), 2).flatten(1))
        return output


def test_pooling_called_as_a_function_is_found_too() -> None:
    assert ImageNetwork(FunctionalPooling()).piecewise(SHAPE) == ("max-pooling",)
    assert ImageNetwork(network()).piecewise(SHAPE) == ()


@pytest.mark.parametrize(
    ("change", "reason"),
    [(LocalSteps(0.1, 2, "adam"), "Adam"), (LocalSteps(0.1, 3), "InvertingGradients")],
    ids=["adam", "steps"],
)
def test_changes_that_no_single_gradient_explains_are_refused(change: LocalSteps, reason: str) -> None:
    model, (images, labels) = network(23), drawn(1, 23)
    observed = Observation(model, sent(model, images, labels).tensors, change).told(shape=SHAPE, labels=labels)
    with pytest.raises(InvalidArgument, match=reason):
        DLG()(observed)
    if change.optimizer == "adam":
        with pytest.raises(InvalidArgument, match=reason):
            InvertingGradients()(observed)


def test_batch_normalisation_in_training_mode_is_refused() -> None:
    model, (images, labels) = network(24, norm=True), drawn(2, 24)
    observed = sent(model, images, labels).told(labels=labels)
    model.train()
    with pytest.raises(InvalidArgument, match="training mode"):
        InvertingGradients(iterations=1)(observed)


@pytest.mark.parametrize(
    ("declared", "reason"),
    [
        ({"labels": torch.tensor([0, LABELS])}, "from 0 to 4"),
        ({"labels": torch.tensor([0.5])}, "whole numbers"),
        ({"labels": torch.tensor([0, 1]), "examples": 3}, "not the same"),
        ({"shape": None}, "shape"),
    ],
    ids=["beyond", "float", "contradiction", "no shape"],
)
def test_declarations_that_cannot_be(declared: dict[str, Any], reason: str) -> None:
    model, (images, labels) = network(25), drawn(2, 25)
    with pytest.raises(InvalidArgument, match=reason):
        InvertingGradients(iterations=1)(sent(model, images, labels).told(**declared))


def test_bad_fields_are_refused() -> None:
    makers: list[Callable[[], object]] = [
        lambda: InvertingGradients(iterations=0),
        lambda: InvertingGradients(restarts=0),
        lambda: InvertingGradients(learning_rate=0.0),
        lambda: InvertingGradients(total_variation=-1.0),
        lambda: InvertingGradients(pixels=(1.0, 0.0)),
        lambda: PixelRange(0.0, float("inf")),
        lambda: DLG(iterations=0),
        lambda: DLG(learning_rate=-1.0),
        lambda: GradInversion(seeds=0),
        lambda: GradInversion(noise=-0.1),
    ]
    for make in makers:
        with pytest.raises(InvalidArgument):
            make()
