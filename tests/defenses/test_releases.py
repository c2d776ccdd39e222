"""What a central plan releases: correlated noise against its matrix, state dicts, grids and empty rounds."""

from itertools import combinations, pairwise
from math import sqrt

import numpy as np
import pytest
import torch
from torch import Generator

from privfm.checks import InvalidArgument
from privfm.contracts import MatrixView, open_updates
from privfm.defenses import DPPlan
from privfm.defenses.privacy.clipping import AdaptiveQuantile
from privfm.defenses.privacy.correlated_noise import coefficients, sensitivity
from privfm.defenses.privacy.noise import grid_of, secure_deviation
from privfm.defenses.privacy.releases import BOUND, GaussianRelease, QuantileRelease
from privfm.defenses.views import EmptyView

ORACLES = [  # rounds, bands = separation, participations, sensitivity, RMSE * sensitivity: independent, banded
    (8, 4, 2, 1.725272, 3.0000, 2.2485),
    (12, 4, 3, 2.113018, 4.4159, 3.0728),
    (20, 5, 4, 2.500439, 6.4807, 4.0123),
    (100, 25, 4, 2.889780, 14.2127, 5.0018),
    (100, 10, 10, 4.232427, 22.4722, 9.6110),
]
OF = ("rounds", "bands", "most", "expected", "plain", "banded")


def matrix(bands, rounds):
    """C, lower triangular Toeplitz."""
    c = coefficients(bands)
    return np.array([[c[i - j] if 0 <= i - j < bands else 0.0 for j in range(rounds)] for i in range(rounds)])


def schedules(rounds, separation, most):
    """All sets of at most `most` rounds that lie `separation` apart."""
    for count in range(1, most + 1):
        for places in combinations(range(rounds), count):
            if all(b - a >= separation for a, b in pairwise(places)):
                yield places


# The matrix


def test_coefficients_are_those_of_the_root_of_prefix_sums():
    assert coefficients(6) == (1, 0.5, 0.375, 0.3125, 0.2734375, 0.24609375)
    root = matrix(7, 7)
    np.testing.assert_allclose(root @ root, np.tril(np.ones((7, 7))), atol=1e-15)


@pytest.mark.parametrize(("bands", "square"), [(4, 381 / 256), (5, 1.563049), (10, 1.791344), (25, 2.087706)])
def test_the_length_of_a_column(bands, square):
    assert sensitivity(bands, 1) ** 2 == pytest.approx(square, abs=1e-6)


@pytest.mark.parametrize(OF, ORACLES)
def test_sensitivity_of_many_participations(rounds, bands, most, expected, plain, banded):
    assert sensitivity(bands, most) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(OF, ORACLES[:3])
def test_sensitivity_is_that_of_the_worst_schedule(rounds, bands, most, expected, plain, banded):
    """By trying all of them; the columns are not negative, so equal signs are the worst."""
    columns = matrix(bands, rounds)
    worst = max(np.linalg.norm(columns[:, list(places)].sum(1)) for places in schedules(rounds, bands, most))
    assert worst == pytest.approx(sensitivity(bands, most), abs=1e-9)


def test_more_bands_than_the_separation_are_beyond_the_formula():
    """The negative control, and why such a plan is refused: 8 bands, separation 5, 4 participations in 20 rounds."""
    columns = matrix(8, 20)
    worst = max(np.linalg.norm(columns[:, list(places)].sum(1)) for places in schedules(20, 5, 4))
    assert (worst, sensitivity(8, 4)) == (pytest.approx(3.06, abs=5e-3), pytest.approx(2.62, abs=0.02))
    assert worst > 1.1 * sensitivity(8, 4)
    with pytest.raises(InvalidArgument, match="wait 8 rounds"):
        DPPlan(1.0, 1.0, 1 / 5, 1e-3, sampling="cyclic", bands=8, max_participations=4)


@pytest.mark.parametrize(OF, ORACLES)
def test_error_of_prefix_sums(rounds, bands, most, expected, plain, banded):
    """RMSE of all prefix sums (A C^-1, mean over rounds) times the sensitivity; b = 1 is independent noise."""

    def error(b):
        noise = np.tril(np.ones((rounds, rounds))) @ np.linalg.inv(matrix(b, rounds))
        return sqrt((noise**2).sum() / rounds) * sensitivity(b, most)

    assert error(1) == pytest.approx(plain, abs=1e-4)
    assert error(bands) == pytest.approx(banded, abs=1e-4)


@pytest.mark.parametrize("most", [1, 3, 10])
def test_one_band_is_the_gaussian_mechanism_composed(most):
    """sqrt(k) times the noise for one Gaussian is noise z for k of them: the same epsilon, the same noise."""
    assert sensitivity(1, most) == pytest.approx(sqrt(most))
    turns = DPPlan(1.3, 1.0, 0.1, 1e-3, sampling="cyclic", max_participations=most)
    banded = DPPlan(1.3 / sqrt(most), 1.0, 0.1, 1e-3, sampling="cyclic", bands=2, max_participations=most)
    assert banded.epsilon(200) == pytest.approx(turns.epsilon(200), rel=1e-9)
    rule = banded.release(1.0, 100)
    assert rule.noise_multiplier * rule.sensitivity == pytest.approx(1.3 / sqrt(most) * sensitivity(2, most))


# Correlated releases

WIDE = 5000


def streamed(rule, rounds, total=None):
    """Sums as released in turn, `(T, WIDE)`."""
    state, out, generator = rule.init(WIDE), [], Generator().manual_seed(4)
    for _ in range(rounds):
        view = EmptyView(WIDE) if total is None else MatrixView(total[None])
        state, outcome = rule.step(state, view, generator)
        out.append(outcome.vector.double() * rule.denominator)
    return torch.stack(out)


def test_the_stream_is_the_inverse_matrix_times_the_draws():
    """Against the matrix form, from the same draws."""
    rule = GaussianRelease(0.7, 2.0, 5.0, bands=4)
    generator = Generator().manual_seed(4)
    draws = torch.stack([torch.randn(WIDE, generator=generator) for _ in range(9)]).double() * 1.4
    expected = torch.from_numpy(np.linalg.inv(matrix(4, 9))) @ draws
    torch.testing.assert_close(streamed(rule, 9), expected, rtol=0, atol=2e-6)


def test_totals_are_added_to_the_stream_unchanged():
    rule = GaussianRelease(0.7, 2.0, 5.0, bands=4)
    total = torch.randn(WIDE, generator=Generator().manual_seed(9))
    difference = streamed(rule, 9, total) - streamed(rule, 9)
    torch.testing.assert_close(difference, total.double().expand(9, -1), rtol=0, atol=5e-6)


def test_secure_correlated_noise_and_totals_lie_on_one_grid():
    """Else the last bits of the release were those of the total: first round, where nothing is taken away yet."""
    rule = GaussianRelease(0.7, 2.0, 1.0, bands=2, source="secure")
    total = torch.randn(WIDE, generator=Generator().manual_seed(9)) * 1e-6
    grid = grid_of(secure_deviation(0.7, 2.0, WIDE, dtype=torch.float32))
    state, _ = rule.step(rule.init(WIDE), MatrixView(total[None]), Generator())
    steps = state["noise"][0] / grid
    assert state["noise"].dtype == torch.float64  # whole steps of 2^-30: float32 would round them
    assert torch.equal(steps, steps.round())


def test_the_state_holds_what_later_rounds_take_away():
    rule = GaussianRelease(1.0, 1.0, 1.0, bands=3)
    assert rule.init(4)["noise"].shape == (2, 4)
    assert GaussianRelease(1.0, 1.0, 1.0).init(4) == {}
    state, first = rule.step(rule.init(4), EmptyView(4), Generator().manual_seed(0))
    torch.testing.assert_close(state["noise"][0].float(), first.vector)
    assert not state["noise"][1].any()


# What a release does with what arrives


def test_only_what_is_trained_is_noised_and_moved():
    active = torch.tensor([True, False, True])
    for rule in (
        GaussianRelease(1.0, 1.0, 2.0, active=active),
        GaussianRelease(1.0, 1.0, 2.0, bands=2, active=active),
        QuantileRelease(1.0, 2.0, 1.0, AdaptiveQuantile(count_deviation=2.0), active=active),
    ):
        rows = torch.ones(2, 4 if isinstance(rule, QuantileRelease) else 3)
        _, outcome = rule.step(rule.init(3), MatrixView(rows), Generator().manual_seed(0))
        assert outcome.vector[1] == 0
        assert bool(outcome.vector[[0, 2]].all())


def test_who_decrypts_adds_the_noise_and_nobody_adds_it_twice():
    """Only an empty round, which nobody decrypts, is noised here."""
    rule = GaussianRelease(1.0, 1.0, 2.0, noised_elsewhere=True)
    _, outcome = rule.step({}, MatrixView(torch.ones(2, 3)), Generator().manual_seed(0))
    assert outcome.vector.tolist() == [1.0, 1.0, 1.0]
    _, outcome = rule.step({}, EmptyView(3), Generator().manual_seed(0))
    assert bool(outcome.vector.all())


# Adaptive releases


def test_rows_are_marked_by_whether_they_were_clipped():
    rule = QuantileRelease(1.0, 20.0, 2.0, AdaptiveQuantile())
    state, weight = rule.init(3), rule.indicator_weight
    rows = rule.clipping.clip(torch.tensor([[0.1, 0.0, 0.0], [9.0, 0.0, 0.0], [0.0, 0.0, 0.0]]), 2.0, ((0, 3),))
    marked = rule.marked(rows, state)
    assert marked[:, 3].tolist() == pytest.approx([weight * 2, -weight * 2, weight * 2])
    assert float(marked.norm(dim=1).max()) <= rule.length(state)
    assert rule.row_width(3) == 4


def test_the_share_below_the_clip_is_read_from_the_last_column():
    """Eight of ten below it, ten expected: 0.5 + (8 - 2) / 2 / 10 = 0.8."""
    rule = QuantileRelease(0.0, 10.0, 1.0, AdaptiveQuantile(rate=1.0))
    state = rule.init(2)
    rows = rule.clipping.clip(torch.tensor([[0.5, 0.0]] * 8 + [[3.0, 0.0]] * 2), 1.0, ((0, 2),))
    after, outcome = rule.step(state, MatrixView(rule.marked(rows, state)), Generator())
    assert float(after[BOUND]) == pytest.approx(np.exp(-0.3), rel=1e-5)
    assert outcome.vector.tolist() == pytest.approx([0.6, 0.0], rel=1e-5)


def test_who_is_missing_counts_as_one_half():
    rule = QuantileRelease(0.0, 10.0, 1.0, AdaptiveQuantile(rate=1.0))
    after, _ = rule.step(rule.init(2), EmptyView(3), Generator())
    assert float(after[BOUND]) == 1.0


# State dicts

STATE = {"b": torch.tensor([[3.0, 0.0]]), "a": torch.tensor([4.0]), "seen": torch.tensor(7)}


def released(states, **others):
    view, back = open_updates(states, **others)
    rule = GaussianRelease(0.0, 1.0, 2.0)
    return back(rule.aggregate(rule.init(view.d), view, Generator())[1].vector)


def test_whole_numbers_in_a_state_dict_are_refused_by_name_or_left_out():
    """A counter is no update: clipped with the rest it would take all of the bound, or fail halfway."""
    with pytest.raises(InvalidArgument, match="seen"):
        released([STATE, STATE])
    out = released([STATE, STATE], exclude=("seen",))
    assert sorted(out) == ["a", "b"]
    assert (out["a"].tolist(), out["b"].tolist()) == ([4.0], [[3.0, 0.0]])


def test_the_order_of_names_does_not_matter():
    """Clients that list their entries in another order: their entries are added by name and not by place."""
    own = {name: STATE[name] for name in ("b", "a")}
    other = {name: STATE[name] for name in ("a", "b")}
    out = released([own, other])
    assert list(out) == ["b", "a"]
    assert (out["a"].tolist(), out["b"].tolist()) == ([4.0], [[3.0, 0.0]])
    assert all(torch.equal(out[name], released([other, own])[name]) for name in ("a", "b"))


def test_a_state_dict_that_is_not_finite_is_left_out_as_a_whole():
    bad = {"a": torch.tensor([torch.nan]), "b": torch.ones(1, 2)}
    good = {"a": torch.ones(1), "b": torch.ones(1, 2)}
    out = released([bad, good])
    assert (out["a"].tolist(), out["b"].tolist()) == ([0.5], [[0.5, 0.5]])


def test_clipping_by_name_and_by_place_is_the_same():
    """A client's norm is over all of its entries."""
    from privfm.vectors import Layout

    floats = {name: STATE[name] for name in ("b", "a")}
    rows = Layout.of(floats).flatten(floats)[None]
    clip = DPPlan(0.0, 1.0, 1.0, 1e-3).clip(((0, 3),))
    back = Layout.of(floats).unflatten(clip.encode(rows, {}, [])[0].rows[0])
    assert back["a"].tolist() == pytest.approx([0.8], rel=1e-5)
    assert back["b"].flatten().tolist() == pytest.approx([0.6, 0.0], rel=1e-5)
