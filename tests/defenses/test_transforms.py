"""What every public transform keeps to, Clip, and chains of steps and codecs written here."""

import inspect
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Generator, Tensor

from privfm import defenses
from privfm.checks import InvalidArgument
from privfm.contracts import Encoded, State, Transform
from privfm.defenses import Chain, Clip

K, D = 5, 8


# Transforms for chains: one with a state, one with a narrow wire, one that quantizes, one that changes the scale.


@dataclass(frozen=True)
class Momentum(Transform):
    """A client step with a state: m <- beta m + row, sends m."""

    beta: float

    def init(self, d: int) -> State:
        return {"velocity": torch.zeros(d)}

    def encode(self, rows: Tensor, state: State, generators: Sequence[Generator]) -> tuple[Encoded, State]:
        velocity = self.beta * state["velocity"] + rows
        return Encoded(velocity, {}), {"velocity": velocity}


@dataclass(frozen=True)
class TopK(Transform):
    """A codec with a narrow wire and side information: the k largest coordinates and where they stood."""

    k: int
    binding = True

    def norm_bound(self, bound: float, d: int) -> float:
        return bound

    def width(self, d: int) -> int:
        return self.k

    def encode(self, rows: Tensor, state: State, generators: Sequence[Generator]) -> tuple[Encoded, State]:
        places = rows.abs().topk(self.k, dim=1).indices
        return Encoded(rows.gather(1, places), {"places": places}), state

    def decode(self, encoded: Encoded, d: int) -> Tensor:
        empty = torch.zeros(len(encoded.rows), d, dtype=encoded.rows.dtype)
        return empty.scatter(1, encoded.side["places"], encoded.rows)


@dataclass(frozen=True)
class Quantized(Transform):
    """A codec that rounds to multiples of `grid` at random, without bias, and sends whole numbers."""

    grid: float
    binding = True
    additive = True
    integers = True

    def norm_bound(self, bound: float, d: int) -> float:
        return bound + self.grid * d**0.5

    def encode(self, rows: Tensor, state: State, generators: Sequence[Generator]) -> tuple[Encoded, State]:
        draws = [torch.rand(rows.shape[1], generator=generator) for generator in generators]
        return Encoded((rows / self.grid + torch.stack(draws)).floor(), {}), state

    def decode(self, encoded: Encoded, d: int) -> Tensor:
        return encoded.rows * self.grid


@dataclass(frozen=True)
class Scaled(Transform):
    """A codec that sends everything `factor` times smaller."""

    factor: float
    binding = True
    additive = True

    @property
    def similarity(self) -> float | None:
        return self.factor

    def norm_bound(self, bound: float, d: int) -> float:
        return bound

    def encode(self, rows: Tensor, state: State, generators: Sequence[Generator]) -> tuple[Encoded, State]:
        return Encoded(rows / self.factor, {}), state

    def decode(self, encoded: Encoded, d: int) -> Tensor:
        return encoded.rows * self.factor


# Values of required fields, by name: enough to make any public transform.
VALUES = {"beta": 0.5, "bits": 12, "bound": 10.0, "max_grad_norm": 1.5, "parts": (Clip(3.0), Clip(1.5)), "share": 0.5}


def made(transform: type[Transform]) -> Transform:
    assert is_dataclass(transform)
    required = [item.name for item in fields(transform) if item.default is MISSING and item.default_factory is MISSING]
    unknown = set(required) - VALUES.keys()
    assert not unknown, f"say in VALUES what {transform.__name__} takes for {unknown}"
    return transform(**{name: VALUES[name] for name in required})


CLASSES = [getattr(defenses, name) for name in defenses.__all__]
PUBLIC = [
    made(each)
    for each in CLASSES
    if inspect.isclass(each) and issubclass(each, Transform) and not inspect.isabstract(each)
]
CHAINS = [
    Chain(()),
    Chain((Momentum(0.9), Clip(1.0))),
    Chain((TopK(3),)),
    Chain((TopK(3), Quantized(0.25))),
    Chain((Scaled(4.0), Quantized(0.25))),
    Chain((Chain((Scaled(4.0), TopK(5))), TopK(2), Scaled(0.5))),
]

each_transform = pytest.mark.parametrize("transform", PUBLIC + CHAINS, ids=repr)


def gaussian(k: int = K, d: int = D, seed: int = 0) -> Tensor:
    return torch.randn(k, d, generator=Generator().manual_seed(seed))


def generators(k: int = K) -> list[Generator]:
    return [Generator().manual_seed(100 + i) for i in range(k)]


def stacked(transform: Transform, k: int = K, d: int = D) -> State:
    """The state of k clients that have seen different things."""
    return {name: value.expand(k, *value.shape) + gaussian(k, d, seed=9) for name, value in transform.init(d).items()}


def part(values: State, i: int) -> State:
    return {name: value[i : i + 1] for name, value in values.items()}


def round_trip(transform: Transform, rows: Tensor) -> Tensor:
    encoded, _ = transform.encode(rows, stacked(transform, *rows.shape), generators(len(rows)))
    return transform.decode(encoded, rows.shape[1])


def test_the_list_is_complete():
    assert {type(transform).__name__ for transform in PUBLIC} >= {"Chain", "Clip"}


@each_transform
def test_row_by_row_equals_batched(transform, untouched_random_state):
    rows, state = gaussian(), stacked(transform)
    encoded, after = transform.encode(rows, state, generators())
    decoded = transform.decode(encoded, D)
    for i in range(K):
        alone, alone_after = transform.encode(rows[i : i + 1], part(state, i), generators()[i : i + 1])
        assert torch.equal(alone.rows, encoded.rows[i : i + 1])
        assert alone.side.keys() == encoded.side.keys()
        assert all(torch.equal(alone.side[name], value) for name, value in part(encoded.side, i).items())
        assert alone_after.keys() == after.keys()
        assert all(torch.equal(alone_after[name], value) for name, value in part(after, i).items())
        assert torch.equal(transform.decode(alone, D), decoded[i : i + 1])


@each_transform
def test_input_and_state_are_not_changed(transform):
    rows, state = gaussian(), stacked(transform)
    before = {name: value.clone() for name, value in state.items()}
    encoded, _ = transform.encode(rows, state, generators())
    wire = encoded.rows.clone()
    transform.decode(encoded, D)
    assert torch.equal(rows, gaussian())
    assert all(torch.equal(state[name], value) for name, value in before.items())
    assert torch.equal(encoded.rows, wire)


@each_transform
def test_widths_and_states_are_as_stated(transform):
    encoded, after = transform.encode(gaussian(), stacked(transform), generators())
    assert encoded.rows.shape == (K, transform.width(D))
    assert all(len(value) == K for value in encoded.side.values())
    form = {name: (K, *value.shape) for name, value in transform.init(D).items()}
    assert {name: tuple(value.shape) for name, value in after.items()} == form
    assert transform.decode(encoded, D).shape == (K, D)


@each_transform
def test_the_same_generators_give_the_same_bits(transform):
    assert torch.equal(round_trip(transform, gaussian()), round_trip(transform, gaussian()))


@each_transform
def test_no_rows_are_no_error(transform):
    quantizes = Quantized(0.25) in getattr(transform, "parts", ())  # our own throw-away stacks its draws
    if not quantizes:
        assert round_trip(transform, torch.zeros(0, D)).shape == (0, D)


@each_transform
def test_what_calls_itself_additive_is(transform):
    rows = gaussian()
    encoded, _ = transform.encode(rows, stacked(transform), generators())
    if transform.additive:
        assert encoded.side == {}
        total = transform.decode(Encoded(encoded.rows.sum(0, keepdim=True), {}), D)
        torch.testing.assert_close(total[0], transform.decode(encoded, D).sum(0))


@each_transform
def test_what_states_a_similarity_has_it(transform):
    encoded, _ = transform.encode(gaussian(), stacked(transform), generators())
    if transform.similarity is not None:
        decoded = transform.decode(encoded, D)
        products = transform.similarity**2 * encoded.rows @ encoded.rows.T
        torch.testing.assert_close(decoded @ decoded.T, products.to(decoded))


@each_transform
def test_what_states_whole_numbers_sends_them(transform):
    encoded, _ = transform.encode(gaussian(), stacked(transform), generators())
    assert not transform.integers or torch.equal(encoded.rows, encoded.rows.round())


@each_transform
@given(
    row=st.lists(st.floats(-2, 2, width=32) | st.floats(-(2.0**60), 2.0**60, width=32), min_size=D, max_size=D),
    slack=st.sampled_from([1.0, 2.0]),
)
def test_a_stated_norm_bound_holds(transform, row, slack):
    rows = torch.tensor([row])
    bound = slack * float(rows.double().norm())
    stated = transform.norm_bound(bound, D)
    fresh = {name: value.expand(1, *value.shape) for name, value in transform.init(D).items()}
    decoded = transform.decode(transform.encode(rows, fresh, generators(1))[0], D)
    if transform.largest_coordinate is not None and float(rows.abs().max()) > transform.largest_coordinate:
        assert bool(decoded.isnan().all())  # refused, not bent
    else:
        assert float(decoded.double().norm()) <= stated * (1 + 1e-5)


def test_a_chain_bounds_the_second_codec_in_its_own_units():
    """Rounding to 0.25 after sending everything a quarter as large is rounding to 1."""
    chain = Chain((Scaled(4.0), Quantized(0.25)))
    assert chain.norm_bound(10.0, 9) == pytest.approx(10 + 4 * 0.25 * 9**0.5)


def test_a_chain_has_no_bound_where_one_of_its_parts_has_none():
    assert Chain((Momentum(0.9),)).norm_bound(1.0, D) == float("inf")
    assert Chain((Momentum(0.9), Clip(1.0))).norm_bound(5.0, D) == 1.0


# Clip


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        pytest.param([3.0, 4.0], [0.6, 0.8], id="longer"),
        pytest.param([0.3, -0.4], [0.3, -0.4], id="shorter"),
        pytest.param([0.0, -1.0], [0.0, -1.0], id="exactly as long"),
        pytest.param([0.0, 0.0], [0.0, 0.0], id="zero"),
        pytest.param([1e-40, 0.0], [1e-40, 0.0], id="subnormal"),
    ],
)
def test_clip_scales_down_what_is_longer(row, expected):
    torch.testing.assert_close(round_trip(Clip(1.0), torch.tensor([row])), torch.tensor([expected]))


@given(st.lists(st.floats(-1, 1, width=32), min_size=4, max_size=4))
def test_what_is_short_enough_keeps_its_bits(row):
    rows = torch.tensor([row])
    clipped = round_trip(Clip(2.0), rows)
    assert torch.equal(clipped.view(torch.int32), rows.view(torch.int32))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_clip_hides_no_bad_row_and_touches_no_other(value):
    rows = torch.tensor([[0.1, value, 0.3], [3.0, 0.0, 4.0]])
    clipped = round_trip(Clip(1.0), rows)
    assert not bool(clipped[0].isfinite().all())
    torch.testing.assert_close(clipped[1], torch.tensor([0.6, 0.0, 0.8]))


@pytest.mark.parametrize("size", [1e19, 1e30, 3e38])
def test_a_row_whose_square_overflows_is_no_longer_than_the_bound(size):
    clipped = round_trip(Clip(1.0), torch.full((1, 9), size))
    assert bool(clipped.isfinite().all())
    assert float(clipped.norm()) <= 1 + 1e-6


def test_clip_is_a_client_step():
    assert not Clip(1.0).binding
    assert (Clip(1.0).additive, Clip(1.0).similarity) == (True, 1.0)
    assert (Clip(2.0).norm_bound(5.0, 3), Clip(2.0).norm_bound(1.0, 3)) == (2.0, 1.0)


@pytest.mark.parametrize("bound", [0.0, -1.0, float("nan"), float("inf")])
def test_a_wrong_bound_is_refused(bound):
    with pytest.raises(InvalidArgument, match="max_grad_norm="):
        Clip(bound)


# Chain


def test_an_empty_chain_changes_nothing():
    chain, rows = Chain(()), gaussian()
    encoded, state = chain.encode(rows, {}, generators())
    assert torch.equal(encoded.rows, rows)
    assert (state, encoded.side, chain.init(D), chain.width(D)) == ({}, {}, {}, D)
    assert (chain.similarity, chain.norm_bound(2.0, D), chain.integers) == (1.0, 2.0, False)


def test_a_chain_is_its_parts_one_after_the_other():
    chain = Chain((Clip(1.0), TopK(3), Quantized(0.1)))
    clipped = Clip(1.0).encode(gaussian(), {}, [])[0].rows
    kept = TopK(3).encode(clipped, {}, [])[0]
    whole = Quantized(0.1).encode(kept.rows, {}, generators())[0]
    encoded, _ = chain.encode(gaussian(), {}, generators())
    assert torch.equal(encoded.rows, whole.rows)
    expected = TopK(3).decode(Encoded(Quantized(0.1).decode(whole, 3), kept.side), D)
    assert torch.equal(chain.decode(encoded, D), expected)
    torch.testing.assert_close(expected, TopK(3).decode(kept, D), rtol=0, atol=0.1)


def test_states_and_side_information_carry_the_place_of_their_part():
    chain = Chain((Momentum(0.5), Chain((Momentum(0.9), TopK(4))), TopK(2)))
    assert set(chain.init(D)) == {"0/velocity", "1/0/velocity"}
    encoded, after = chain.encode(gaussian(), stacked(chain), generators())
    assert set(encoded.side) == {"1/1/places", "2/places"}
    assert set(after) == {"0/velocity", "1/0/velocity"}


def test_part_1_and_part_10_do_not_meet():
    chain = Chain(tuple(Momentum(0.1 * i) for i in range(11)))
    state = {f"{i}/velocity": torch.full((K, D), float(i)) for i in range(11)}
    _, after = chain.encode(gaussian(), state, generators())
    expected = gaussian()
    for i in range(11):
        expected = 0.1 * i * state[f"{i}/velocity"] + expected
        torch.testing.assert_close(after[f"{i}/velocity"], expected)


def test_a_part_is_initialised_for_the_width_it_sees():
    chain = Chain((TopK(3), Momentum(0.9), Scaled(2.0)))
    assert chain.init(D)["1/velocity"].shape == (3,)
    assert chain.width(D) == 3


def test_a_chain_runs_over_rounds():
    chain, state = Chain((Momentum(0.5), Clip(100.0))), {"0/velocity": torch.zeros(K, D)}
    for _ in range(3):
        encoded, state = chain.encode(gaussian(), state, generators())
    torch.testing.assert_close(encoded.rows, 1.75 * gaussian())


@pytest.mark.parametrize(
    ("chain", "binding", "additive", "integers", "similarity"),
    [
        (Chain((Clip(1.0), Clip(2.0))), False, True, False, 1.0),
        (Chain((Scaled(4.0), Scaled(0.5))), True, True, False, 2.0),
        (Chain((Scaled(4.0), Quantized(1.0))), True, True, True, None),
        (Chain((Quantized(1.0), Scaled(4.0))), True, True, False, None),
        (Chain((TopK(2), Scaled(4.0))), True, False, False, None),
    ],
    ids=repr,
)
def test_what_a_chain_says_follows_from_its_parts(chain, binding, additive, integers, similarity):
    said = (chain.binding, chain.additive, chain.integers, chain.similarity)
    assert said == (binding, additive, integers, similarity)
