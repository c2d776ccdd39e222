"""Reading inputs and labels off a linear layer's update, against autograd and slow loops."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Generator, Tensor
from torch.nn.functional import cross_entropy, linear

from privfm.attacks.reconstruction import label_of_one, labels_present, layer_inputs, shared_input
from privfm.checks import InvalidArgument

CLASSES, WIDTH = 5, 7


def gradients(inputs: Tensor, labels: Tensor, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Of the mean loss, by autograd, for a random layer; and the probabilities `(n, c)`."""
    generator = Generator().manual_seed(seed)
    weight = torch.randn(CLASSES, inputs.shape[1], generator=generator, dtype=torch.float64).requires_grad_()
    bias = torch.randn(CLASSES, generator=generator, dtype=torch.float64).requires_grad_()
    logits = linear(inputs, weight, bias)
    to_weight, to_bias = torch.autograd.grad(cross_entropy(logits, labels), [weight, bias])
    return to_weight, to_bias, logits.softmax(1).detach()


def examples(n: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = Generator().manual_seed(seed)
    inputs = torch.randn(n, WIDTH, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(CLASSES, (n,), generator=generator)


@pytest.mark.parametrize("factor", [1.0, -0.3])
def test_one_example_is_read_exactly_from_every_row(factor: float) -> None:
    inputs, labels = examples(1, 3)
    weight, bias, _ = gradients(inputs, labels)
    torch.testing.assert_close(layer_inputs(factor * weight, factor * bias), inputs.expand(CLASSES, WIDTH))
    torch.testing.assert_close(shared_input(factor * weight, factor * bias), inputs[0])


def test_several_examples_give_means_weighted_by_their_errors() -> None:
    inputs, labels = examples(4, 5)
    weight, bias, probabilities = gradients(inputs, labels)
    found = layer_inputs(weight, bias)
    for c in range(CLASSES):
        errors = [float(probabilities[i, c]) - float(labels[i] == c) for i in range(4)]
        for k in range(WIDTH):
            mean = sum(errors[i] * float(inputs[i, k]) for i in range(4)) / sum(errors)
            assert float(found[c, k]) == pytest.approx(mean, rel=1e-9)
    assert float((found[0] - found[1]).abs().max()) > 0.1  # rows differ: the test above can fail


def test_what_is_unknown_stays_unknown_and_nothing_else_is_lost() -> None:
    inputs, labels = examples(1, 8)
    weight, bias, _ = gradients(inputs, labels)
    weight[0, 2], weight[:, 4], bias[3] = torch.nan, torch.nan, torch.nan
    before = weight.clone(), bias.clone()
    found = layer_inputs(weight, bias)
    unknown = torch.zeros(CLASSES, WIDTH, dtype=torch.bool)
    unknown[0, 2], unknown[:, 4], unknown[3] = True, True, True
    assert torch.equal(found.isnan(), unknown)
    torch.testing.assert_close(found[~unknown], inputs.expand(CLASSES, WIDTH)[~unknown])
    shared = shared_input(weight, bias)
    assert shared.isnan().tolist() == [False] * 4 + [True] + [False] * 2
    torch.testing.assert_close(shared[[0, 1, 2, 3, 5, 6]], inputs[0, [0, 1, 2, 3, 5, 6]])
    torch.testing.assert_close(weight, before[0], equal_nan=True, rtol=0, atol=0)
    torch.testing.assert_close(bias, before[1], equal_nan=True, rtol=0, atol=0)


def test_without_a_bias_or_a_change_of_it_there_is_nothing() -> None:
    weight = torch.ones(2, 3)
    assert bool(layer_inputs(weight, torch.zeros(2)).isnan().all())
    assert bool(layer_inputs(weight, torch.full((2,), torch.nan)).isnan().all())
    assert bool(shared_input(weight, torch.full((2,), torch.nan)).isnan().all())
    assert bool(shared_input(weight, torch.zeros(2)).isnan().all())
    assert layer_inputs(weight, torch.tensor([1e-7, 0.5]), least=1e-6).isnan().all(1).tolist() == [True, False]


@given(st.integers(1, 6), st.integers(0, 10_000), st.floats(0.0, 0.9))
def test_the_shared_input_is_the_least_squares_solution(n: int, seed: int, hidden: float) -> None:
    inputs, labels = examples(n, seed)
    weight, bias, _ = gradients(inputs, labels, seed)
    away = torch.rand(weight.shape, generator=Generator().manual_seed(seed)) < hidden
    found = shared_input(weight.masked_fill(away, torch.nan), bias)
    for k in range(WIDTH):
        known = [c for c in range(CLASSES) if not away[c, k]]
        if not known:
            assert math.isnan(float(found[k]))
            continue
        solution = torch.linalg.lstsq(bias[known, None], weight[known, k, None]).solution
        torch.testing.assert_close(found[k], solution[0, 0], rtol=1e-6, atol=1e-9)


@given(st.integers(1, 12), st.integers(0, 10_000))
def test_labels_that_are_found_are_there_and_a_single_one_is_found(n: int, seed: int) -> None:
    inputs, labels = examples(n, seed)
    weight, bias, _ = gradients(inputs, labels, seed)
    found = set(labels_present(-0.1 * bias).nonzero()[:, 0].tolist())
    assert found and found <= set(labels.tolist())
    if n == 1:
        assert found == set(labels.tolist())
        assert label_of_one(weight) == label_of_one(-0.1 * weight) == int(labels[0])


def test_the_sign_matters_for_labels() -> None:
    """A gradient in an update's place names the labels that are not there."""
    inputs, labels = examples(1, 4)
    _, bias, _ = gradients(inputs, labels)
    assert labels_present(bias).sum() == CLASSES - 1 and not labels_present(bias)[labels[0]]


def test_of_an_unknown_bias_no_label_is_claimed() -> None:
    assert labels_present(torch.tensor([torch.nan, 0.2, -0.2])).tolist() == [False, True, False]


def test_one_label_from_partial_rows_or_none() -> None:
    errors, one = torch.tensor([0.3, -0.7, 0.4]), torch.tensor([0.5, -2.0, 1.0])
    weight = errors[:, None] * one
    partial = weight.clone()
    partial[0, 0], partial[1, 1], partial[2, 2] = torch.nan, torch.nan, torch.nan
    assert label_of_one(partial) == 1  # one column is left to every pair
    assert label_of_one(torch.full((3, 3), torch.nan)) is None
    assert label_of_one(torch.zeros(3, 3)) is None
    assert label_of_one(weight[:2]) is None  # two classes: both signs are alone
    apart = torch.full((3, 3), torch.nan)
    apart[0, 0], apart[1, 1], apart[2, 2] = weight[0, 0], weight[1, 1], weight[2, 2]
    assert label_of_one(apart) is None  # no pair has a column in common


def test_types_are_kept_and_bad_input_is_refused() -> None:
    weight, bias = torch.ones(2, 3), torch.ones(2)
    assert shared_input(weight, bias).dtype == layer_inputs(weight, bias).dtype == torch.float32
    for wrong in ((torch.ones(3), bias), (weight, torch.ones(3)), (weight, torch.ones(2, 1))):
        for attack in (layer_inputs, shared_input):
            with pytest.raises(InvalidArgument, match=r"expected \(c, k\) and \(c,\)"):
                attack(*wrong)
    with pytest.raises(InvalidArgument, match="float types"):
        layer_inputs(weight, torch.ones(2, dtype=torch.int64))
    with pytest.raises(InvalidArgument, match="least"):
        layer_inputs(weight, bias, least=-1.0)
    with pytest.raises(InvalidArgument, match=r"expected \(c,\)"):
        labels_present(weight)
    with pytest.raises(InvalidArgument, match=r"expected \(c, k\)"):
        label_of_one(bias)
