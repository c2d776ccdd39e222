"""Scores of updates against slow loops, and against federated SGD on random data, where the truth is known."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Generator, Tensor, nn

from privfm.adapters import AdapterLayout
from privfm.attacks.membership.updates import (
    adapter_spans,
    as_gradient,
    cosine_scores,
    difference_scores,
    fellow_client_update,
    gradient_blocks,
    products,
)
from privfm.checks import InvalidArgument
from privfm.contracts import Examples, LocalSteps
from privfm.vectors import Layout

CLIENTS, EACH, WIDTH, RATE = 6, 8, 160, 0.3


def losses(model: nn.Module, examples: Examples) -> Tensor:
    return nn.functional.cross_entropy(model(**examples.inputs), examples.labels, reduction="none")


def network(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(WIDTH, 16), nn.Tanh(), nn.Linear(16, 5))


def data(count: int, seed: int) -> Examples:
    generator = Generator().manual_seed(seed)
    labels = torch.randint(5, (count,), generator=generator)
    return Examples({"input": torch.randn(count, WIDTH, generator=generator)}, labels)


def trained(model: nn.Module, layout: Layout, examples: Examples, steps: int) -> Tensor:
    """The change of a client that took so many steps of gradient descent on all its examples."""
    local = network()
    local.load_state_dict(model.state_dict())
    for _ in range(steps):
        found = torch.autograd.grad(losses(local, examples).mean(), list(local.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(local.parameters(), found, strict=True):
                parameter -= RATE * gradient
    return layout.flatten(local.state_dict()) - layout.flatten(model.state_dict())


@pytest.fixture(scope="module", params=[1, 5], ids=["one step", "five steps"])
def federated(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor, int]:
    """Changes of the clients, and gradients of their examples in order, then of as many non-members."""
    model, everything = network(), data(2 * CLIENTS * EACH, seed=1)
    layout = Layout.of(model.state_dict())
    rows = [
        trained(model, layout, everything.take(torch.arange(client * EACH, (client + 1) * EACH)), request.param)
        for client in range(CLIENTS)
    ]
    return torch.stack(rows), torch.cat(list(gradient_blocks(model, layout, losses, everything, 7))), request.param


OWNERS = np.r_[np.repeat(np.arange(CLIENTS), EACH), np.full(CLIENTS * EACH, -1)]


# ------------------------------------------------------------------------------------------------------ definitions


def test_scores_are_those_of_a_slow_loop_whatever_the_blocks() -> None:
    generator = Generator().manual_seed(3)
    update, gradients = torch.randn(70_003, generator=generator), torch.randn(5, 70_003, generator=generator)
    spans = ((10, 20_000), (65_000, 70_001))  # over the end of a block of columns
    mask = np.zeros(70_003, dtype=bool)
    for lo, hi in spans:
        mask[lo:hi] = True
    for coordinates, where in ((None, np.ones_like(mask)), (spans, mask)):
        u = update.double().numpy()[where]
        cosine, difference = [], []
        for row in gradients.double().numpy():
            g = row[where]
            cosine.append(np.dot(u, g) / (np.linalg.norm(u) * np.linalg.norm(g)))
            difference.append(np.linalg.norm(u) ** 2 - np.linalg.norm(u - 0.25 * g) ** 2)
        for blocks in ([gradients], [gradients[:2], gradients[2:]], lambda: iter(gradients.split(1))):
            np.testing.assert_allclose(cosine_scores(update, blocks, coordinates), cosine, rtol=1e-9)
            found = difference_scores(update, blocks, coordinates, share=0.25)
            np.testing.assert_allclose(found, difference, rtol=1e-8)
    many = cosine_scores(torch.stack([update, -update]), [gradients])
    assert many.shape == (2, 5)
    np.testing.assert_array_equal(many[0], -many[1])


def test_what_is_not_seen_of_an_update_is_left_out_of_both() -> None:
    update = torch.tensor([1.0, torch.nan, 2.0, torch.inf])
    gradients = torch.tensor([[1.0, 50.0, 2.0, -9.0], [0.0, 1.0, 0.0, 1.0]])
    assert cosine_scores(update, [gradients]).tolist() == pytest.approx([1.0, 0.0])
    other = torch.stack([update, torch.tensor([0.0, 1.0, 0.0, 0.0])])
    assert cosine_scores(other, [gradients])[1] == pytest.approx([50 / np.sqrt(1 + 2500 + 4 + 81), 1 / np.sqrt(2)])


def test_zero_columns_gradients_and_updates_give_zero_and_never_nan() -> None:
    gradients = torch.tensor([[0.0, 0.0], [0.0, 3.0]])
    assert cosine_scores(torch.tensor([0.0, 2.0]), [gradients]).tolist() == [0.0, 1.0]
    assert cosine_scores(torch.zeros(2), [gradients]).tolist() == [0.0, 0.0]
    assert cosine_scores(torch.tensor([1e-30, 2e-30]), [gradients * 1e-30])[1] == pytest.approx(2 / np.sqrt(5))


def test_a_change_is_minus_the_rate_times_the_gradient() -> None:
    rows = torch.tensor([[1.0, -2.0]])
    assert torch.equal(as_gradient(rows, None), rows)
    assert torch.allclose(as_gradient(rows, LocalSteps(0.5, steps=4)), rows / -2)
    with pytest.raises(InvalidArgument, match="adam"):
        as_gradient(rows, LocalSteps(0.5, optimizer="adam"))


def test_spans_of_adapters_leave_a_out_while_b_is_zero() -> None:
    state = {"head": torch.ones(4), "q.lora_A.weight": torch.ones(2, 5), "q.lora_B.weight": torch.ones(3, 2)}
    adapters = AdapterLayout.of(Layout.of(state), scaling=1.0)
    assert adapter_spans(adapters, first_round=True) == ((14, 20),)
    assert adapter_spans(adapters, first_round=False) == ((4, 14), (14, 20))
    with pytest.raises(InvalidArgument, match="no adapters"):
        adapter_spans(AdapterLayout((), 4), first_round=False)


def test_per_example_gradients_average_to_the_batch_gradient() -> None:
    model, examples = network(), data(5, seed=4)
    layout = Layout.of(model.state_dict())
    found = torch.cat(list(gradient_blocks(model, layout, losses, examples, 2)))
    names = [name for name, _ in model.named_parameters()]
    whole = torch.autograd.grad(losses(model, examples).mean(), list(model.parameters()))
    torch.testing.assert_close(found.mean(0), layout.flatten(dict(zip(names, whole, strict=True))))
    assert all(parameter.grad is None for parameter in model.parameters())


# ------------------------------------------------------------------------------------------- federated SGD, truth known


def test_members_are_found_and_those_of_others_are_not(federated: tuple[Tensor, Tensor, int]) -> None:
    changes, gradients, steps = federated
    scores = cosine_scores(-changes, [gradients])
    members = np.arange(CLIENTS)[:, None] == OWNERS
    outside = np.broadcast_to(OWNERS == -1, members.shape)
    own = roc_auc_score(members[members | outside], scores[members | outside])
    assert own > 0.9
    foreign = (OWNERS >= 0) & ~members  # of other clients: as good as strangers to this one
    null = roc_auc_score(foreign[foreign | outside], scores[foreign | outside])
    pairs = min(foreign.sum(), CLIENTS * outside[0].sum())
    assert abs(null - 0.5) < 3 * np.sqrt(1 / (6 * pairs))  # variance of Mann-Whitney's at equal sizes m: 1/(6 m)
    share = difference_scores(as_gradient(changes, LocalSteps(RATE, steps)), [gradients], share=1 / EACH)
    assert roc_auc_score(members[members | outside], share[members | outside]) > 0.9


def test_the_sign_matters(federated: tuple[Tensor, Tensor, int]) -> None:
    changes, gradients, _ = federated
    some = (OWNERS == 0) | (OWNERS == -1)
    wrong = cosine_scores(changes[0], [gradients])
    assert roc_auc_score(OWNERS[some] == 0, wrong[some]) < 0.1


def test_a_sum_shows_membership_and_hides_whose(federated: tuple[Tensor, Tensor, int]) -> None:
    changes, gradients, _ = federated
    scores = cosine_scores(-changes.sum(0), [gradients])
    assert roc_auc_score(OWNERS >= 0, scores) > 0.9
    members = OWNERS >= 0
    for client in range(CLIENTS):  # one number an example: it does not point at any client
        found = roc_auc_score(OWNERS[members] == client, scores[members])
        assert abs(found - 0.5) < 4 * np.sqrt((CLIENTS * EACH + 1) / (12 * EACH * EACH * (CLIENTS - 1)))
    rows = cosine_scores(-changes, [gradients])
    assert (rows[:, members].argmax(0) == OWNERS[members]).mean() > 0.9  # the rows themselves do


def test_a_fellow_client_sees_the_others_together(federated: tuple[Tensor, Tensor, int]) -> None:
    changes, gradients, _ = federated
    before = torch.randn(changes.shape[1], generator=Generator().manual_seed(5))
    after = before + 0.5 * changes.mean(0)
    others = fellow_client_update(before, after, changes[2], CLIENTS, server_learning_rate=0.5)
    assert float((others - changes[[0, 1, 3, 4, 5]].sum(0)).abs().max()) < 2 * CLIENTS * 6e-8 * 5  # rounding of weights
    scores = cosine_scores(-others, [gradients])
    fellow = (OWNERS >= 0) & (OWNERS != 2)
    assert roc_auc_score(fellow[OWNERS != 2], scores[OWNERS != 2]) > 0.9
    mine = (OWNERS == 2) | (OWNERS == -1)
    assert abs(roc_auc_score(OWNERS[mine] == 2, scores[mine]) - 0.5) < 0.3  # eight examples: 3 deviations
    absent = fellow_client_update(before, after, None, CLIENTS, server_learning_rate=0.5)
    torch.testing.assert_close(absent, changes.sum(0), atol=1e-5, rtol=1e-4)


# --------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: cosine_scores(torch.zeros(3), [torch.zeros(2, 4)]), "expected \\(k, 3\\)"),
        (lambda: cosine_scores(torch.zeros(3), []), "no gradient"),
        (lambda: cosine_scores(torch.zeros(3), [torch.full((1, 3), torch.nan)]), "not finite"),
        (lambda: cosine_scores(torch.zeros(3), [torch.zeros(1, 3)], ((0, 2), (1, 3))), "overlaps"),
        (lambda: cosine_scores(torch.zeros(3), [torch.zeros(1, 3)], ((0, 4),)), "outside"),
        (lambda: cosine_scores(torch.zeros(3), [torch.zeros(1, 3)], ()), "at least one span"),
        (lambda: products(torch.zeros(1, 1, 3), [torch.zeros(1, 3)]), "expected \\(d,\\)"),
        (lambda: difference_scores(torch.zeros(3), [torch.zeros(1, 3)], share=0.0), "share"),
        (lambda: fellow_client_update(torch.zeros(3), torch.zeros(2), None, 2), "after"),
        (lambda: fellow_client_update(torch.zeros(3), torch.zeros(3), torch.zeros(3), 1), "cohort"),
        (
            lambda: next(gradient_blocks(network(), Layout.of({"x": torch.ones(1)}), losses, data(1, 0), 1)),
            "no parameter",
        ),
    ],
    ids=range(11),
)
def test_what_does_not_fit_is_refused(call: Callable[[], object], says: str) -> None:
    with pytest.raises(InvalidArgument, match=says):
        call()


def test_blocks_are_streamed() -> None:
    held: list[int] = []

    def stream() -> Iterator[Tensor]:
        for number in range(4):
            held.append(number)
            yield torch.eye(3)[number % 3][None]

    assert cosine_scores(torch.tensor([1.0, 0.0, 0.0]), stream()).tolist() == [1.0, 0.0, 0.0, 1.0]
    assert held == [0, 1, 2, 3]
