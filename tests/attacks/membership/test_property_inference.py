"""Labels and properties read off updates of small networks, with the truth known; random properties are chance."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from math import sqrt

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from torch import Generator, Tensor, nn

from privfm.attacks.membership.properties import PropertyInference, label_distribution, label_errors
from privfm.attacks.reconstruction import Labels
from privfm.checks import InvalidArgument
from privfm.contracts import Declared, Observation, gradients_of
from privfm.vectors import Layout

WIDTH, BATCH, CLASSES = 20, 32, 5


@cache
def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(WIDTH, 16), nn.ReLU(), nn.Linear(16, CLASSES))


def update(inputs: Tensor, labels: Tensor) -> Tensor:
    model = network()
    found = gradients_of(model, nn.functional.cross_entropy(model(inputs), labels))
    return Layout.of(model.state_dict()).flatten(found)


TEACHER = torch.randn(WIDTH, CLASSES, generator=Generator().manual_seed(77))


def clients(count: int, seed: int, effect: float = 2.0) -> tuple[Tensor, NDArray[np.bool_]]:
    """Updates of clients, in half of which half of the examples have a mark that their labels do not depend on."""
    generator = Generator().manual_seed(seed)
    flags = torch.rand(count, generator=generator) < 0.5
    rows = []
    for flag in flags.tolist():
        inputs = torch.randn(BATCH, WIDTH, generator=generator)
        labels = (inputs @ TEACHER).argmax(1)
        if flag:
            inputs[: BATCH // 2, :4] += effect
        rows.append(update(inputs, labels))
    return torch.stack(rows), flags.numpy()


SHADOWS, TARGETS = clients(300, seed=1), clients(200, seed=2)


def test_a_property_that_nobody_trains_for_is_read_off_updates(untouched_random_state: None) -> None:
    attack = PropertyInference()
    classifier = attack.fit(*SHADOWS)
    found = roc_auc_score(TARGETS[1], classifier.scores(TARGETS[0]))
    assert found > 0.9
    rehearsed = roc_auc_score(SHADOWS[1], attack.rehearse(*SHADOWS))
    assert abs(rehearsed - found) < 0.1  # what the attacker expects is what it gets
    first = Layout.of(network().state_dict())  # the first layer's weights alone, which are of the marked columns
    start = sum(first.sizes[: first.names.index("1.weight")])
    some = PropertyInference(coordinates=((start, start + 16 * WIDTH),))
    assert roc_auc_score(TARGETS[1], some.fit(*SHADOWS).scores(TARGETS[0])) > 0.9
    few = PropertyInference(components=100).fit(*SHADOWS)
    assert roc_auc_score(TARGETS[1], few.scores(TARGETS[0])) > 0.75


def test_a_random_property_is_chance() -> None:
    chance = np.random.default_rng(3).random(500) < 0.5
    classifier = PropertyInference().fit(SHADOWS[0], chance[:300])
    found = roc_auc_score(chance[300:], classifier.scores(TARGETS[0]))
    assert abs(found - 0.5) < 3 * sqrt(201 / (12 * 100 * 100))  # variance of Mann-Whitney's with 100 of each kind
    absent = clients(200, seed=4, effect=0.0)  # the property is flagged, and leaves no trace
    found = roc_auc_score(absent[1], PropertyInference().fit(*SHADOWS).scores(absent[0]))
    assert abs(found - 0.5) < 3 * sqrt(201 / (12 * 100 * 100))
    rehearsed = roc_auc_score(chance[:300], PropertyInference().rehearse(SHADOWS[0], chance[:300]))
    assert abs(rehearsed - 0.5) < 3 * sqrt(301 / (12 * 150 * 150))


def test_scores_are_log_odds_of_the_logistic_model() -> None:
    rows = torch.randn(60, 3, generator=Generator().manual_seed(5))
    flags = (rows[:, 0] > 0).numpy()
    classifier = PropertyInference().fit(rows, flags)  # three columns: no projection
    values = rows.double().numpy()
    standard = (values - values.mean(0)) / values.std(0)
    np.testing.assert_allclose(classifier.scores(rows), standard @ classifier.weights + classifier.offset, atol=1e-9)
    # Stationary point of the penalised likelihood: residuals against columns equal weights (C = 1), and sum to zero.
    residuals = flags - 1 / (1 + np.exp(-classifier.scores(rows)))
    np.testing.assert_allclose(standard.T @ residuals, classifier.weights, atol=5e-3)
    assert abs(residuals.sum()) < 5e-3


def test_projections_keep_distances_and_are_the_same_in_blocks() -> None:
    rows = torch.randn(6, 70_000, generator=Generator().manual_seed(6))  # two blocks of columns
    attack = PropertyInference(components=150, seed=7)
    found = attack.projected(rows)
    kept = ((found[:, None] - found) ** 2).sum(-1)[np.triu_indices(6, 1)] / 150
    true = torch.pdist(rows.double()).square().numpy()
    np.testing.assert_allclose(kept / true, 1.0, atol=4 * sqrt(2 / 150))  # chi-square with 150 degrees of freedom
    np.testing.assert_array_equal(attack.projected(rows[2:4]), found[2:4])
    assert np.abs(PropertyInference(components=150, seed=8).projected(rows) - found).max() > 1
    spans = ((0, 10), (60_000, 70_000))
    other = rows.clone()
    other[:, 10:60_000] = torch.nan  # what does not count may be hidden
    part = PropertyInference(components=150, coordinates=spans)
    np.testing.assert_array_equal(part.projected(other), part.projected(rows))


def test_spans_are_projected_independently() -> None:
    units = torch.zeros(2, 400)
    units[0, 0] = units[1, 200] = 1.0  # the first columns of two spans
    one, other = PropertyInference(components=150, coordinates=((0, 200), (200, 400))).projected(units)
    assert abs(np.corrcoef(one, other)[0, 1]) < 4 / sqrt(150)


def test_constant_columns_say_nothing() -> None:
    rows = torch.zeros(8, 2)
    rows[4:, 0] = 1.0
    classifier = PropertyInference().fit(rows, np.arange(8) >= 4)
    scores = classifier.scores(torch.tensor([[1.0, 0.0], [1.0, 100.0], [0.0, 0.0]]))
    assert scores[0] == scores[1] > 0 > scores[2]


# ------------------------------------------------------------------------------------------------------------- labels


def observed(shares: list[float], seed: int, examples: int | None, batch: int = 200) -> tuple[Observation, Tensor]:
    generator = Generator().manual_seed(seed)
    labels = torch.multinomial(torch.tensor(shares), batch, replacement=True, generator=generator)
    inputs = torch.randn(batch, WIDTH, generator=generator)
    model = network()
    sent = gradients_of(model, nn.functional.cross_entropy(model(inputs), labels))
    truth = labels.bincount(minlength=CLASSES).double() / batch
    return Observation(model, sent, declared=Declared(examples=examples)), truth


@pytest.mark.parametrize("examples", [200, None], ids=["declared", "not declared"])
def test_label_shares_are_nearer_than_what_needs_no_update(examples: int | None) -> None:
    population = np.array([0.4, 0.3, 0.1, 0.1, 0.1])
    public = torch.randn(64, WIDTH, generator=Generator().manual_seed(50))
    for seed, shares in enumerate(([0.0, 0.1, 0.8, 0.1, 0.0], [0.25, 0.0, 0.0, 0.25, 0.5])):
        seen, truth = observed(shares, seed, examples)
        found = label_distribution(seen, Labels("probabilities", head="3.weight", public=public))
        assert found.sum() == pytest.approx(1.0)
        errors = label_errors(found, truth.numpy(), population)
        assert errors.attack < 0.05
        assert errors.attack < 0.3 * min(errors.uniform, errors.population)


def test_the_estimate_moves_with_the_labels_and_not_with_the_inputs() -> None:
    public = torch.randn(64, WIDTH, generator=Generator().manual_seed(50))
    reader = Labels("probabilities", head="3.weight", public=public)
    one, other = (label_distribution(observed([0.2] * 5, seed, 200)[0], reader) for seed in (10, 11))
    foreign = observed([0.0, 0.0, 0.0, 0.0, 1.0], 12, 200)
    assert np.abs(one - other).sum() / 2 < 0.2
    assert label_errors(one, foreign[1].numpy(), np.full(5, 0.2)).attack > 0.6  # another client's update: the uniform


def test_one_example_is_its_label() -> None:
    seen, truth = observed([0.2] * 5, 3, 1, batch=1)
    np.testing.assert_array_equal(label_distribution(seen, Labels(head="3.weight")), truth.numpy())


def test_total_variation_by_hand() -> None:
    errors = label_errors(np.array([0.5, 0.5, 0.0]), np.array([0.0, 0.5, 0.5]), np.array([0.1, 0.4, 0.5]))
    assert (errors.attack, errors.population) == (pytest.approx(0.5), pytest.approx(0.1))
    assert errors.uniform == pytest.approx(1 / 3)


# --------------------------------------------------------------------------------------------------------- bad input

FLAGS = np.arange(6) % 2 == 0


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: PropertyInference(components=0), "components"),
        (lambda: PropertyInference(strength=0.0), "strength"),
        (lambda: PropertyInference(seed=-1), "seed"),
        (lambda: PropertyInference().fit(torch.zeros(6), FLAGS), "expected \\(k, d\\)"),
        (lambda: PropertyInference().fit(torch.zeros(5, 2), FLAGS), "one an update"),
        (lambda: PropertyInference().fit(torch.zeros(6, 2), FLAGS.astype(np.int64)), "expected bool"),
        (lambda: PropertyInference().fit(torch.zeros(6, 2), np.arange(6) == 0), "1 updates of one kind"),
        (lambda: PropertyInference().fit(torch.zeros(6, 2), FLAGS), "all updates are the same"),
        (lambda: PropertyInference().fit(torch.full((6, 2), torch.nan), FLAGS), "not finite"),
        (lambda: PropertyInference(coordinates=((0, 3),)).fit(torch.rand(6, 2), FLAGS), "spans in \\[0, 2\\)"),
        (lambda: PropertyInference(coordinates=()).fit(torch.rand(6, 2), FLAGS), "spans in \\[0, 2\\)"),
        (lambda: PropertyInference().rehearse(torch.eye(6), FLAGS, folds=4), "folds=4"),
        (lambda: PropertyInference().fit(torch.eye(6), FLAGS).scores(torch.eye(5)), "expected \\(k, 6\\)"),
        (lambda: label_errors(np.array([0.5, 0.6]), np.array([1.0, 0.0]), np.array([1.0, 0.0])), "found"),
        (lambda: label_errors(np.array([1.0, 0.0]), np.array([1.0, 0.0]), np.array([1.0])), "population"),
        (lambda: label_distribution(observed([0.2] * 5, 0, 4)[0], Labels(head="9.weight")), "head='9.weight'"),
    ],
    ids=range(16),
)
def test_what_does_not_fit_is_refused(call: Callable[[], object], says: str) -> None:
    with pytest.raises(InvalidArgument, match=says):
        call()
