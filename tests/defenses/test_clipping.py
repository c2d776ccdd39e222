"""Clippings: no row is longer than the bound, whatever its type, its layers and what it holds."""

from math import inf, nan, sqrt

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator

from privfm.checks import InvalidArgument
from privfm.defenses.privacy.clipping import AdaptiveQuantile, Automatic, Flat, PerLayer, norms

WIDTH = 9
LAYERS = ((0, 2), (2, 8), (8, 9))
KINDS = {
    "flat": Flat(),
    "equal": PerLayer(),
    "size": PerLayer("size"),
    "automatic": Automatic(),
    "adaptive": AdaptiveQuantile(),
}
TYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

values = st.floats(-5, 5, width=32) | st.sampled_from([0.0, 1e-38, 1e-20, 1e20, 3e38, -3e38, nan, inf, -inf])
rows_of = st.lists(st.lists(values, min_size=WIDTH, max_size=WIDTH), min_size=1, max_size=6).map(torch.tensor)


# What all of them keep


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60)
@given(rows=rows_of, bound=st.sampled_from([1e-6, 0.3, 1.0, 40.0]))
def test_no_row_is_longer_than_the_bound(kind, rows, bound):
    before = rows.clone()
    clipped = KINDS[kind].clip(rows, bound, LAYERS)
    assert float(norms(clipped).max()) <= bound
    assert bool(clipped.isfinite().all())
    assert torch.equal(rows.nan_to_num(7.0), before.nan_to_num(7.0))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("d", [1, 40, 5000])
def test_rounding_to_a_short_type_does_not_end_beyond_the_bound(kind, dtype, d):
    """bfloat16 has 8 bits: a margin made for float32 would be exceeded by 4 %."""
    rows = torch.randn(200, d, generator=Generator().manual_seed(d)) * 3
    rows[:50] *= 1000  # a factor that float16 itself could not hold
    rows = rows.to(TYPES[dtype])
    clipped = KINDS[kind].clip(rows, 0.7, ((0, d),))
    assert clipped.dtype == rows.dtype
    lengths = norms(clipped)
    assert float(lengths.max()) <= 0.7
    if d > 1:
        assert float(lengths.max()) > 0.7 * 0.95


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [nan, inf, -inf])
def test_a_row_that_is_not_finite_is_zero_as_a_whole(kind, bad):
    rows = torch.ones(3, WIDTH)
    rows[1, 8] = bad
    clipped = KINDS[kind].clip(rows, 1.0, LAYERS)
    assert not clipped[1].any()
    assert bool(clipped[0].all())
    assert torch.equal(clipped[0], clipped[2])


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_depends_on_itself_alone(kind):
    rows = torch.randn(8, WIDTH, generator=Generator().manual_seed(0)) * torch.logspace(-3, 3, 8)[:, None]
    together = KINDS[kind].clip(rows, 1.0, LAYERS)
    alone = torch.cat([KINDS[kind].clip(row[None], 1.0, LAYERS) for row in rows])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("kind", KINDS)
def test_zero_stays_zero(kind):
    """An update of nothing has no direction; dividing by its norm would make it NaN."""
    assert not KINDS[kind].clip(torch.zeros(2, WIDTH), 1.0, LAYERS).any()


@pytest.mark.parametrize("kind", KINDS)
def test_nobody_to_clip_is_no_error(kind):
    assert KINDS[kind].clip(torch.zeros(0, WIDTH), 1.0, LAYERS).shape == (0, WIDTH)


# Flat


def test_flat_by_hand():
    rows = torch.tensor([[3.0, 4.0], [0.3, 0.4], [-6.0, 8.0]])
    expected = torch.tensor([[0.6, 0.8], [0.3, 0.4], [-0.6, 0.8]])
    torch.testing.assert_close(Flat().clip(rows, 1.0, ()), expected, rtol=2e-6, atol=0)


def test_what_is_short_enough_keeps_its_bits():
    rows = torch.randn(50, WIDTH, generator=Generator().manual_seed(3))
    rows = rows / rows.norm(dim=1, keepdim=True) * 0.99
    assert torch.equal(Flat().clip(rows, 1.0, ()), rows)


def test_lengths_are_taken_in_float64():
    """A million equal entries: float32 sums of squares may fall short, and let a row through that is too long."""
    rows = torch.full((1, 2_000_000), 1.0) / sqrt(2_000_000) * 1.0001
    assert float(norms(rows)) == pytest.approx(1.0001, rel=1e-6)
    assert float(norms(Flat().clip(rows, 1.0, ()))) <= 1.0


# Per layer


@pytest.mark.parametrize("split", ["equal", "size"])
def test_the_squares_of_the_layers_bounds_add_up(split):
    bounds = PerLayer(split).bounds(0.7, LAYERS)
    assert sum(bound**2 for bound in bounds) == pytest.approx(0.49)
    if split == "equal":
        assert bounds == pytest.approx([0.7 / sqrt(3)] * 3)
    else:
        assert bounds == pytest.approx([0.7 * sqrt(size / 9) for size in (2, 6, 1)])


@pytest.mark.parametrize("split", ["equal", "size"])
def test_per_layer_equals_a_slow_loop(split):
    rows = torch.randn(30, WIDTH, generator=Generator().manual_seed(1), dtype=torch.float64)
    expected = rows.clone()
    for row in expected:
        for (lo, hi), bound in zip(LAYERS, PerLayer(split).bounds(1.0, LAYERS), strict=True):
            length = float((row[lo:hi] ** 2).sum()) ** 0.5
            if length > bound:
                row[lo:hi] *= bound / length
    torch.testing.assert_close(PerLayer(split).clip(rows, 1.0, LAYERS), expected, rtol=2e-6, atol=0)


def test_the_whole_bound_for_each_layer_is_longer_by_the_root_of_their_number():
    """The negative control: two layers clipped to C each are sqrt(2) C, which makes an epsilon of 4.8 really 9.9."""
    rows, layers = torch.full((1, 4), 9.0), ((0, 2), (2, 4))
    mistaken = torch.cat([Flat().clip(rows[:, lo:hi], 1.0, ()) for lo, hi in layers], dim=1)
    assert float(norms(mistaken)) == pytest.approx(sqrt(2), rel=1e-5)
    assert float(norms(PerLayer().clip(rows, 1.0, layers))) <= 1.0


def test_an_unknown_split_is_refused():
    with pytest.raises(InvalidArgument, match="split"):
        PerLayer("half")


# Automatic


def test_automatic_scales_short_rows_up_and_keeps_directions():
    rows = torch.randn(5, WIDTH, generator=Generator().manual_seed(2)) * torch.logspace(-3, 3, 5)[:, None]
    clipped = Automatic(gamma=0.01).clip(rows, 2.0, LAYERS)
    lengths = rows.norm(dim=1)
    torch.testing.assert_close(clipped, 2.0 * rows / (lengths + 0.01)[:, None], rtol=1e-5, atol=0)
    assert torch.cosine_similarity(rows, clipped).tolist() == pytest.approx([1.0] * 5, abs=1e-6)


@pytest.mark.parametrize("gamma", [0.0, -1.0, inf])
def test_a_gamma_that_bounds_nothing_is_refused(gamma):
    with pytest.raises(InvalidArgument, match="gamma"):
        Automatic(gamma)


# Adaptive


@pytest.mark.parametrize(
    ("noise", "cohort", "count", "expected"),
    [
        (1.0, 20, None, 1.1547),  # sigma_b = n / 20 = 1: (1 - 1/4)^(-1/2)
        (1.0, 20, 1.0, 1.1547),
        (1.0, 100, None, 1.00504),  # sigma_b = 5
        (0.5, 20, None, 0.5 * 1.0328),
    ],
)
def test_the_count_is_paid_for_as_in_theorem_1(noise, cohort, count, expected):
    """sigma_delta = (sigma^-2 - (2 sigma_b)^-2)^(-1/2), Andrew et al., 2021: the update's noise, in clips."""
    clipping = AdaptiveQuantile(count_deviation=count)
    weight = clipping.indicator_weight(noise, cohort)
    assert noise * sqrt(1 + weight**2) == pytest.approx(expected, rel=1e-4)
    deviation = cohort / 20 if count is None else count
    assert noise * sqrt(1 + weight**2) / (2 * weight) == pytest.approx(deviation)  # and the count's, in clients
    assert (noise**-2 - (2 * deviation) ** -2) ** -0.5 == pytest.approx(expected, rel=1e-4)


def test_a_count_that_would_cost_everything_is_refused():
    with pytest.raises(InvalidArgument, match="counting would cost the whole budget"):
        AdaptiveQuantile().indicator_weight(2.0, 20)


def test_the_bound_falls_while_too_many_are_below_it_and_rises_while_too_few_are():
    clipping = AdaptiveQuantile(quantile=0.5, rate=0.2)
    assert clipping.next_bound(1.0, 0.5) == 1.0
    assert clipping.next_bound(1.0, 1.0) == pytest.approx(0.904837)
    assert clipping.next_bound(1.0, 0.0) == pytest.approx(1.105171)
    assert clipping.next_bound(8.0, 0.0) == pytest.approx(8 * 1.105171)


@pytest.mark.parametrize("quantile", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("first", [0.01, 100.0])
def test_the_bound_settles_at_the_quantile(quantile, first):
    """Without noise, on norms whose quantiles are known."""
    lengths = torch.linspace(0.01, 1.0, 100)
    clipping, bound = AdaptiveQuantile(quantile), first
    for _ in range(300):
        bound = clipping.next_bound(bound, float((lengths < bound).double().mean()))
    assert bound == pytest.approx(quantile, abs=0.03)


@pytest.mark.parametrize(
    "wrong", [{"quantile": 0.0}, {"quantile": 1.0}, {"rate": 0.0}, {"count_deviation": 0.0}], ids=str
)
def test_a_quantile_rule_out_of_range_is_refused(wrong):
    with pytest.raises(InvalidArgument, match=next(iter(wrong))):
        AdaptiveQuantile(**wrong)
