"""Layout: named tensors to one flat float32 vector and back."""

import re
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from privfm.checks import InvalidArgument
from privfm.vectors import Layout

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
NOT_FLOATS = [torch.int64, torch.uint8, torch.bool, torch.complex64]

# Whole numbers of at most 8 bits: every float type holds them exactly, so a round trip must not change a bit.
SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)
ENTRIES = st.tuples(SHAPES, st.sampled_from(FLOATS), st.integers(-128, 127))
STATES = st.dictionaries(st.text(min_size=1, max_size=6), ENTRIES, min_size=1, max_size=5)


Entry = tuple[tuple[int, ...], torch.dtype, int]


def tensor(shape: tuple[int, ...], dtype: torch.dtype, start: int) -> Tensor:
    size = int(np.prod(shape, dtype=int))
    return (torch.arange(start, start + size) % 128).reshape(shape).to(dtype)


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )


@given(entries=STATES)
def test_round_trip_gives_every_entry_its_shape_and_type_back(entries: dict[str, Entry]) -> None:
    state = {name: tensor(*entry) for name, entry in entries.items()}
    layout = Layout.of(state)
    vector = layout.flatten(state)
    assert vector.dtype == torch.float32
    assert vector.shape == (layout.d,) == (sum(entry.numel() for entry in state.values()),)
    assert same(layout.unflatten(vector), state)


@given(entries=STATES, random=st.randoms(use_true_random=False))
def test_order_of_the_dictionary_does_not_matter(entries: dict[str, Entry], random: Random) -> None:
    state = {name: tensor(*entry) for name, entry in entries.items()}
    names = list(state)
    random.shuffle(names)
    shuffled = {name: state[name] for name in names}
    assert Layout.of(shuffled) == Layout.of(state)
    assert torch.equal(Layout.of(state).flatten(shuffled), Layout.of(state).flatten(state))


def test_entries_lie_in_the_order_of_their_names() -> None:
    state = {"b": torch.tensor([3.0]), "a": torch.tensor([[1.0, 2.0]]), "c": torch.tensor(4.0)}
    layout = Layout.of(state)
    assert (layout.names, layout.shapes, layout.sizes, layout.d) == (("a", "b", "c"), ((1, 2), (1,), ()), (2, 1, 1), 4)
    assert layout.flatten(state).tolist() == [1, 2, 3, 4]
    assert layout.unflatten(layout.flatten(state))["c"].shape == ()


@pytest.mark.parametrize("dtype", FLOATS)
def test_values_survive_up_to_the_vectors_float32(dtype: torch.dtype) -> None:
    value = torch.tensor([1 / 3, -1e-3, 7e4 if dtype != torch.float16 else 6e4]).to(dtype)
    layout = Layout.of([value])
    back = next(iter(layout.unflatten(layout.flatten([value])).values()))
    assert back.dtype == dtype
    assert torch.equal(back, value.float().to(dtype))  # exact but for float64, which is rounded to float32 once


@pytest.mark.parametrize("dtype", FLOATS)
def test_nan_and_infinities_are_kept_for_the_rule_to_see(dtype: torch.dtype) -> None:
    state = {"a": torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0]).to(dtype)}
    layout = Layout.of(state)
    vector = layout.flatten(state)
    assert vector.isnan().tolist() == [True, False, False, False]
    assert vector.isposinf().tolist() == [False, True, False, False]
    assert torch.equal(layout.unflatten(vector)["a"].nan_to_num(5), state["a"].nan_to_num(5))


def test_lists_keep_their_order_beyond_nine_entries() -> None:
    arrays = [torch.full((1,), float(i)) for i in range(101)]
    layout = Layout.of(arrays)
    assert layout.flatten(arrays).tolist() == list(range(101))
    assert [float(entry) for entry in layout.unflatten(layout.flatten(arrays)).values()] == list(range(101))


def test_numpy_arrays_are_taken_as_they_are() -> None:
    base = np.arange(12, dtype=np.float64).reshape(3, 4)
    arrays: list[NDArray[np.floating]] = [base.T, base[:, ::-2], base.astype(np.float32, order="F")]
    layout = Layout.of(arrays)
    assert layout.dtypes == (torch.float64, torch.float64, torch.float32)
    np.testing.assert_array_equal(layout.flatten(arrays).numpy(), np.concatenate([array.ravel() for array in arrays]))


def test_a_numpy_scalar_array_keeps_its_shape() -> None:
    assert Layout.of([np.array(1.0)]).shapes == ((),)


@pytest.mark.parametrize("array", [np.array(["text"]), np.ones(1, np.longdouble), np.ones(1, ">f4")])
def test_numpy_types_that_torch_does_not_hold_are_refused_by_name(array: NDArray[np.generic]) -> None:
    with pytest.raises(InvalidArgument, match="bias"):
        Layout.of({"weight": torch.ones(1), "bias": array})


@pytest.mark.filterwarnings("error")
def test_read_only_numpy_arrays_are_taken_without_a_warning() -> None:
    array = np.ones(3, dtype=np.float32)
    array.setflags(write=False)
    assert Layout.of([array]).flatten([array]).tolist() == [1, 1, 1]


def test_a_state_dict_of_parameters_gives_a_plain_vector_and_is_not_changed() -> None:
    model = torch.nn.Linear(2, 3)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    layout = Layout.of(dict(model.named_parameters()))
    vector = layout.flatten(dict(model.named_parameters()))
    assert not vector.requires_grad
    vector.zero_()
    assert same({name: value.detach() for name, value in model.named_parameters()}, before)


def test_the_vector_of_one_float32_entry_is_a_copy() -> None:
    state = {"a": torch.ones(3)}
    Layout.of(state).flatten(state).zero_()
    assert state["a"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("dtype", NOT_FLOATS)
def test_other_types_are_refused_by_name_unless_excluded(dtype: torch.dtype) -> None:
    state = {"weight": torch.ones(2), "steps": torch.ones(2).to(dtype)}
    message = f"got steps ({dtype}); leave them out with exclude="
    with pytest.raises(InvalidArgument, match=re.escape(message)):
        Layout.of(state)
    layout = Layout.of(state, exclude=["steps"])
    assert layout.names == ("weight",)
    assert layout.flatten(state).tolist() == [1, 1]
    assert layout.flatten({"weight": torch.ones(2)}).tolist() == [1, 1]  # an excluded entry may stay away


def test_batch_norm_is_refused_for_its_counter() -> None:
    state = torch.nn.BatchNorm1d(2).state_dict()
    with pytest.raises(InvalidArgument, match="num_batches_tracked"):
        Layout.of(state)
    buffers = ["running_mean", "running_var", "num_batches_tracked"]
    assert Layout.of(state, exclude=buffers).names == ("bias", "weight")


def test_excluding_what_is_not_there_offers_the_nearest_name() -> None:
    with pytest.raises(InvalidArgument, match="exclude='weigth' is not an entry; did you mean 'weight'"):
        Layout.of({"weight": torch.ones(2), "bias": torch.ones(2)}, exclude=["weigth"])


@pytest.mark.parametrize("state", [{}, []])
def test_nothing_to_lay_out_is_refused(state: dict[str, Tensor] | list[Tensor]) -> None:
    with pytest.raises(InvalidArgument, match="at least one float entry"):
        Layout.of(state)


def test_excluding_everything_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="at least one float entry"):
        Layout.of({"a": torch.ones(1)}, exclude=["a"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"b": None}, "entries are missing: b"),
        ({"c": torch.ones(1)}, "entries are not in the layout: c"),
        ({"a": torch.ones(3, 2)}, "a has shape (3, 2), the layout says (2, 3)"),
        ({"a": torch.ones(6)}, "a has shape (6,), the layout says (2, 3)"),
        ({"b": torch.ones(1)}, "b has shape (1,), the layout says ()"),
        ({"b": torch.tensor(1)}, "b is torch.int64, the layout says a float type"),
        ({"b": 1.0}, "b is a float, expected a tensor or a NumPy array"),
        ({"b": np.float32(1)}, "b is a float32, expected a tensor or a NumPy array"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Tensor | None], message: str) -> None:
    state = {"a": torch.ones(2, 3), "b": torch.tensor(1.0)}
    layout = Layout.of(state)
    changed = {name: value for name, value in {**state, **change}.items() if value is not None}
    with pytest.raises(InvalidArgument, match=re.escape(message)):
        layout.flatten(changed)


@pytest.mark.parametrize("shape", [(6,), (8,), (1, 7), ()])
def test_a_vector_of_another_width_is_refused(shape: tuple[int, ...]) -> None:
    layout = Layout.of({"a": torch.ones(2, 3), "b": torch.tensor(1.0)})
    with pytest.raises(InvalidArgument, match=re.escape(f"vector has shape {shape}, the layout says (7,)")):
        layout.unflatten(torch.ones(shape))
