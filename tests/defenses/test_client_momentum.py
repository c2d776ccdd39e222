"""Client momentum: two conventions, one memory a client, and what a bad update does to it."""

from collections.abc import Sequence
from typing import final

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Generator, Tensor

from privfm.checks import InvalidArgument
from privfm.contracts import Encoded, Examples, GradientPrivacy, Learner, MatrixView, Metric, Split, State, Trained
from privfm.defenses import CenteredClipping, Chain, Clip
from privfm.defenses.transforms import ClientMomentum
from privfm.engines import Local
from privfm.federation import Arm, Federation, FixedSize, Population, play
from privfm.federation.client_states import ClientStates
from privfm.federation.loop import start
from privfm.randomness import Seeds

FORMS = [ClientMomentum(0.9), ClientMomentum(0.9, "beta"), ClientMomentum(0.5), ClientMomentum(0.0, "beta")]

each_form = pytest.mark.parametrize("transform", FORMS, ids=repr)


def gaussian(k: int = 3, d: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(k, d, generator=Generator().manual_seed(seed))


def fresh(transform: ClientMomentum, k: int = 3, d: int = 4) -> State:
    return {name: value.expand(k, *value.shape).clone() for name, value in transform.init(d).items()}


def encode(transform: ClientMomentum, rows: Tensor, state: State) -> tuple[Tensor, State]:
    encoded, state = transform.encode(rows, state, [Generator() for _ in rows])
    assert encoded.side == {}
    return encoded.rows, state


def played(transform: ClientMomentum, rounds: Sequence[Tensor]) -> list[Tensor]:
    state, sent = fresh(transform, *rounds[0].shape), []
    for rows in rounds:
        row, state = encode(transform, rows, state)
        sent.append(row)
    return sent


@pytest.mark.parametrize(
    ("dampening", "expected"),
    [("none", [1.0, 2.5, 4.25, 6.125]), ("beta", [0.5, 1.25, 2.125, 3.0625])],
)
def test_four_rounds_by_hand(dampening, expected):
    """Updates 1, 2, 3, 4 and beta = 1/2."""
    sent = played(ClientMomentum(0.5, dampening), [torch.full((1, 1), float(t)) for t in (1, 2, 3, 4)])
    assert [row.item() for row in sent] == expected


@each_form
def test_it_is_the_sum_over_the_past(transform):
    rounds = [gaussian(seed=t) for t in range(6)]
    share = 1.0 if transform.dampening == "none" else 1 - transform.beta
    for t, row in enumerate(played(transform, rounds)):
        past = sum(share * np.float64(transform.beta) ** (t - k) * rounds[k].double() for k in range(t + 1))
        torch.testing.assert_close(row.double(), past, rtol=1e-5, atol=1e-6)


def test_the_first_update_is_sent_as_it_is_or_dampened():
    assert torch.equal(played(ClientMomentum(0.9), [gaussian()])[0], gaussian())
    torch.testing.assert_close(played(ClientMomentum(0.9, "beta"), [gaussian()])[0], 0.1 * gaussian())


def test_the_undampened_form_needs_a_radius_that_is_scaled():
    """Centred clipping with `radius / (1 - beta)` does to one form what `radius` does to the other."""
    rounds = [gaussian(seed=t) for t in range(4)]
    none, beta = (played(ClientMomentum(0.9, form), rounds)[-1] for form in ("none", "beta"))
    torch.testing.assert_close(0.1 * CenteredClipping(3.0)(none), CenteredClipping(0.3)(beta))
    assert not torch.allclose(0.1 * CenteredClipping(0.3)(none), CenteredClipping(0.3)(beta), rtol=0.1)


def test_no_memory_changes_nothing():
    rounds = [gaussian(seed=t) for t in range(3)]
    for form in ("none", "beta"):
        assert all(map(torch.equal, played(ClientMomentum(0.0, form), rounds), rounds))


@each_form
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_update_is_sent_as_bad_and_forgotten(transform, value):
    rounds = [gaussian(seed=t) for t in range(3)]
    bad = [rows.clone() for rows in rounds]
    bad[1][0, 2] = value
    sent, clean = played(transform, bad), played(transform, rounds)
    assert MatrixView(sent[1]).bad == 1
    assert MatrixView(sent[1]).ids == (1, 2)  # left out where rows are opened
    assert all(torch.equal(a[1:], b[1:]) for a, b in zip(sent, clean, strict=True))
    without = played(transform, [rounds[0][:1], rounds[2][:1]])[1]
    assert torch.equal(sent[2][:1], without)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_a_memory_that_overflows_is_forgotten(dtype):
    largest = torch.finfo(dtype).max
    rounds = [torch.full((1, 2), value, dtype=dtype) for value in (largest, largest, 1.0, 1.0)]
    sent = played(ClientMomentum(0.9), rounds)
    assert MatrixView(sent[1]).bad == 1
    assert bool(sent[-1].isfinite().all())


@each_form
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_type_is_kept_and_the_memory_stays_float32(transform, dtype):
    rows, state = gaussian().to(dtype), fresh(transform)
    for _ in range(5):
        sent, state = encode(transform, rows, state)
        assert (sent.dtype, state["momentum"].dtype) == (dtype, torch.float32)
    exact = played(transform, [rows.double()] * 5)[-1]
    step = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    torch.testing.assert_close(sent.double(), exact, rtol=2 * step, atol=1e-6)


def test_small_updates_are_not_lost_in_half_precision():
    """A memory of bfloat16 would stop growing: 1 + 1/512 is 1 there."""
    rounds = [torch.full((1, 1), value, dtype=torch.bfloat16) for value in [1.0] + [2.0**-9] * 64]
    kept = played(ClientMomentum(1 - 2.0**-20), rounds)[-1]
    assert kept.item() == pytest.approx(1.125, rel=0.01)


@each_form
@given(lengths=st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_the_stated_norm_bound_holds_over_rounds(transform, lengths):
    direction = gaussian(1)[0] / gaussian(1)[0].norm()
    sent = played(transform, [length * direction[None] for length in lengths])
    assert max(float(row.norm()) for row in sent) <= transform.norm_bound(1.0, 4) * (1 + 1e-6)


@pytest.mark.parametrize("transform", FORMS[:3], ids=repr)
def test_the_stated_norm_bound_is_reached(transform):
    sent = played(transform, [torch.ones(1, 1)] * 200)
    assert sent[-1].item() == pytest.approx(transform.norm_bound(1.0, 1), rel=1e-5)
    assert transform.norm_bound(1.0, 1) == pytest.approx(
        1.0 if transform.dampening == "beta" else 1 / (1 - transform.beta)
    )


@each_form
def test_inputs_are_not_changed(transform):
    rows, state = gaussian(), {"momentum": gaussian(seed=1)}
    encode(transform, rows, state)
    assert torch.equal(rows, gaussian())
    assert torch.equal(state["momentum"], gaussian(seed=1))


def test_it_is_a_client_step():
    transform = ClientMomentum(0.9)
    assert (transform.binding, transform.additive, transform.similarity, transform.width(7)) == (False, True, 1.0, 7)
    assert torch.equal(transform.decode(Encoded(gaussian(), {}), 4), gaussian())


@pytest.mark.parametrize("wrong", [-0.1, 1.0, 2.0, float("nan")])
def test_a_wrong_beta_is_refused_by_name(wrong):
    with pytest.raises(InvalidArgument, match="beta="):
        ClientMomentum(wrong)


def test_a_wrong_dampening_is_refused_with_the_nearest():
    with pytest.raises(InvalidArgument, match=r"dampening='non' is not known; did you mean 'none'\?"):
        ClientMomentum(0.9, "non")


def test_the_memory_is_the_clients_whatever_its_place():
    """Clients 7 and 3 change places, and 5 stays away for a round."""
    transform, states = ClientMomentum(0.5), ClientStates({})
    rounds = [((7, 5, 3), (1.0, 10.0, 100.0)), ((3, 7), (200.0, 2.0)), ((5, 3, 7), (20.0, 300.0, 3.0))]
    sent = {}
    for ids, values in rounds:
        rows, state = encode(transform, torch.tensor(values)[:, None], states.stacked(ids, transform.init(1)))
        states = states.updated(ids, state)
        sent = dict(zip(ids, rows[:, 0].tolist(), strict=True))
    assert sent == {7: 3 + 1 + 0.25, 3: 300 + 100 + 25, 5: 20 + 5}


@final
class Scripted(Learner):
    """Client i's update is 10^i in every round."""

    d = 1  # type: ignore[assignment]

    def initial(self) -> Tensor:
        return torch.zeros(1)

    def train(
        self,
        model: Tensor,
        batch: Sequence[Examples],
        generators: Sequence[Generator],
        privacy: GradientPrivacy | None = None,
        active: Tensor | None = None,
    ) -> Trained:
        return Trained(torch.tensor([[10.0 ** int(examples.rows[0])] for examples in batch]), {})

    def evaluate(self, model: Tensor, split: Split) -> dict[str, Metric]:
        return {}


@pytest.mark.parametrize("transforms", [(ClientMomentum(0.5),), (ClientMomentum(0.5), Clip(1e6))], ids=repr)
def test_in_a_run_it_follows_the_clients_id(transforms):
    """Three of five clients a round: each sum of the past must be of that client's own updates."""
    everything = Examples({}, torch.zeros(5, dtype=torch.int64), torch.arange(5))
    clients = Population.of(everything, list(torch.arange(5).split(1)))
    federation = Federation(Arm(FixedSize(3), transforms=transforms), Scripted(), clients, Seeds(4), Local(2))
    state, memory, cohorts = start(federation), np.zeros(5), set()
    for now in range(6):
        cohort = list(FixedSize(3).draw(5, Seeds(4).generator("cohort", now)))
        cohorts.add(tuple(sorted(cohort)))
        memory[cohort] = 0.5 * memory[cohort] + 10.0 ** np.array(cohort)
        before = state.model
        state, record = play(federation, state)
        assert record.skipped == ""
        assert float(state.model - before) == pytest.approx(memory[cohort].mean(), rel=1e-5)
    assert len(cohorts) > 2


def test_in_a_chain_it_comes_before_the_clip():
    chain = Chain((ClientMomentum(0.9), Clip(1.0)))
    assert chain.norm_bound(5.0, 4) == 1.0
    assert chain.init(4).keys() == {"0/momentum"}
