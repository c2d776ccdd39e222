"""What the channel revealed becomes observations, and an attack on them a score against the truth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import pytest
import torch
from torch import Generator, Tensor, nn

from privfm.attacks.reconstruction import (
    CuriousServer,
    Imprint,
    observations,
    scores_of,
    special_tokens,
    texts_of,
    told,
)
from privfm.attacks.reconstruction.curious_server import received
from privfm.checks import InvalidArgument
from privfm.contracts import (
    Examples,
    LocalSteps,
    Observation,
    Reconstruction,
    ReconstructionAttack,
    Reveals,
    ServerScene,
    Watch,
    WireView,
)
from privfm.vectors import Layout

TEXTS = Examples(
    {
        "input_ids": torch.tensor([[1, 7, 8, 2], [1, 9, 2, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]),
    },
    torch.tensor([0, 1]),
)
PICTURES = Examples(
    {"pixel_values": torch.rand(2, 1, 4, 4, generator=Generator().manual_seed(0))}, torch.tensor([0, 1])
)
MODEL = nn.Linear(2, 3)
LAYOUT = Layout.of(dict(MODEL.named_parameters()))  # bias (3,), weight (3, 2)


def wire(rows: Tensor | None = None, vectors: Sequence[Tensor] = (), ids: tuple[int, ...] = (4, 6)) -> WireView:
    return WireView(Reveals.EACH if rows is not None else Reveals.SUM, ids, tuple(vectors), (), rows)


@final
@dataclass(frozen=True)
class Says(ReconstructionAttack):
    """Says the same whatever it sees, or refuses."""

    texts: tuple[tuple[int, ...], ...] = ()
    refuses: bool = False

    @property
    def needs(self) -> tuple[str, ...]:
        return ()

    def refusal(self, observation: Observation) -> str:
        return "it will not" if self.refuses else ""

    def reconstruct(self, rounds: Sequence[Observation], watch: Watch, generator: Generator) -> Reconstruction:
        (one,) = rounds
        used = tuple(name for name in ("examples", "labels") if getattr(one.declared, name) is not None)
        return Reconstruction(self.texts, used=used)


def scene(examples: Examples = TEXTS) -> ServerScene:
    return ServerScene(
        lambda _: MODEL, LAYOUT, lambda n: LocalSteps(0.5, n), lambda client: examples, special=frozenset({1, 2})
    )


def test_every_row_is_an_observation_and_a_sum_is_one_of_all() -> None:
    rows = torch.arange(18.0).reshape(2, 9)
    one, other = observations(wire(rows), LAYOUT, MODEL)
    assert one.clients == other.clients == 1
    assert torch.equal(other.tensors["weight"], torch.arange(12.0, 18.0).reshape(3, 2))
    (total,) = observations(wire(vectors=[rows.sum(0), rows[0]]), LAYOUT, MODEL, LocalSteps(0.5))
    assert total.clients == 2
    assert torch.equal(total.tensors["bias"], rows.mean(0)[:3])
    assert torch.equal(total.gradients["bias"], -2 * rows.mean(0)[:3])
    assert observations(wire(vectors=[]), LAYOUT, MODEL) == []
    assert received(wire(vectors=[rows[0]], ids=())) == []


def test_what_is_encrypted_is_missing_or_nan() -> None:
    rows = torch.ones(1, 9)
    rows[0, :3] = torch.nan  # the whole bias
    rows[0, 4] = torch.inf
    (seen,) = observations(wire(rows, ids=(0,)), LAYOUT, MODEL)
    assert set(seen.tensors) == {"weight"}
    assert seen.tensors["weight"].isnan().sum() == 1
    with pytest.raises(InvalidArgument, match="at least one"):
        observations(wire(torch.full((1, 9), torch.nan), ids=(0,)), LAYOUT, MODEL)


def test_only_what_is_granted_is_told() -> None:
    everything = told([TEXTS])
    assert everything.examples == 2
    assert everything.labels is not None and everything.labels.tolist() == [0, 1]
    assert everything.lengths == (4, 3)
    assert told([PICTURES, PICTURES]).shape == (1, 4, 4)
    nothing = told([TEXTS], ())
    assert (nothing.examples, nothing.labels, nothing.lengths, nothing.shape) == (None, None, None, None)


def test_texts_lose_their_padding_and_what_all_have_is_special() -> None:
    assert texts_of([TEXTS, TEXTS]) == [(1, 7, 8, 2), (1, 9, 2)] * 2
    assert special_tokens(TEXTS) == {1, 2}
    assert special_tokens(TEXTS.take(torch.tensor([0]))) == frozenset()
    assert texts_of([PICTURES]) == []


def test_the_record_has_means_over_what_was_attacked() -> None:
    server = CuriousServer(Says(texts=((1, 9, 2), (1, 5, 2))), clients=2, rounds=(0, 2)).fitted(scene())
    found = server.look(wire(torch.ones(2, 9)), torch.zeros(9), 0)
    assert found["attacked"] == 2.0
    assert found["refused"] == 0.0
    assert found["exact"] == 0.5
    assert found["false"] == 1.0
    assert found["token_recall"] == pytest.approx(1 / 3)
    assert found["token_precision"] == 0.5
    assert server.look(wire(torch.ones(2, 9)), torch.zeros(9), 1) == {}
    assert server.look(wire(torch.ones(2, 9)), torch.zeros(9), 2)["attacked"] == 2.0


def test_the_truth_of_a_sum_is_everybodys() -> None:
    server = CuriousServer(Says(texts=((1, 9, 2), (1, 9, 2)))).fitted(scene())
    found = server.look(wire(vectors=[torch.ones(9)]), torch.zeros(9), 0)
    assert found["exact"] == 0.5  # two of four: each of two clients holds this text
    assert found["false"] == 0.0


def test_an_attack_that_cannot_run_recovers_nothing_and_says_so() -> None:
    server = CuriousServer(Says(refuses=True)).fitted(scene())
    assert server.look(wire(torch.ones(2, 9)), torch.zeros(9), 0) == {"attacked": 1.0, "refused": 1.0}
    hidden = CuriousServer(Says()).fitted(scene())
    assert hidden.look(wire(torch.full((2, 9), torch.nan)), torch.zeros(9), 0) == {"attacked": 1.0, "refused": 1.0}


def test_images_are_scored_as_images() -> None:
    exact = scores_of(Reconstruction(images=PICTURES.inputs["pixel_values"].flip(0)), [PICTURES], frozenset())
    assert exact["ssim"] == pytest.approx(1.0)
    none = scores_of(Reconstruction(), [PICTURES], frozenset())
    assert "psnr" not in none


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="told"):
        CuriousServer(Says(), told=("everything",))
    with pytest.raises(InvalidArgument, match="clients"):
        CuriousServer(Says(), clients=0)
    with pytest.raises(InvalidArgument, match="bends the model"):
        CuriousServer(Imprint(shape=(1, 4, 4), mean=0.5, deviation=0.1, bins=8))
    with pytest.raises(InvalidArgument, match="fitted"):
        CuriousServer(Says()).look(wire(torch.ones(2, 9)), torch.zeros(9), 0)
