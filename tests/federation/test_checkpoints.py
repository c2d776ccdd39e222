"""Interrupted equals uninterrupted, bit for bit, and a broken checkpoint says so."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from privfm.attacks import ALIE
from privfm.checks import BrokenCheckpoint
from privfm.defenses import CenteredClipping, Clip, DPPlan
from privfm.federation import Adam, Federation, RunState, Yogi, load, rounds, save
from privfm.federation.client_states import ClientStates

Make = Callable[..., Federation]
Toys = Mapping[str, Any]


def settings(toys: Toys) -> list[dict[str, Any]]:
    momentum = toys["ClientMomentum"](0.5)
    return [
        {
            "rule": CenteredClipping(1.0),
            "optimizer": Adam(0.03),
            "transforms": (momentum, Clip(2.0)),
            "attack": ALIE(1.5, statistics="honest"),
            "malicious": tuple(range(6)),
            "dropout_rate": 0.1,
        },
        {
            "optimizer": Yogi(0.03),
            "transforms": (momentum,),
            "plan": DPPlan(noise_multiplier=1.0, max_grad_norm=1.0, sample_rate=0.5, delta=1e-3),
        },
    ]


def play(federation: Federation, folder: Path | None, until: int, state: RunState | None = None) -> RunState:
    for step in rounds(federation, until, state, evaluate_every=until):
        state = step.state if folder is None else save(step.state, folder)
    assert state is not None
    return state


@pytest.mark.parametrize("which", [0, 1])
def test_resumed_equals_uninterrupted(which: int, federation: Make, toys: Toys, tmp_path: Path) -> None:
    setting = settings(toys)[which]
    whole = play(federation(**setting), None, 6)
    play(federation(**setting), tmp_path, 3)
    again = play(federation(**setting), tmp_path, 6, load(tmp_path))
    assert torch.equal(again.model, whole.model)
    for name in ("rule", "optimizer"):
        assert {k: v.tolist() for k, v in getattr(again, name).items()} == {
            k: v.tolist() for k, v in getattr(whole, name).items()
        }
    ids = sorted(whole.clients.index)
    assert sorted(again.clients.index) == ids and len(ids) > 30
    fresh = {"0/momentum": torch.zeros(len(whole.model))}
    assert torch.equal(again.clients.stacked(ids, fresh)["0/momentum"], whole.clients.stacked(ids, fresh)["0/momentum"])


def test_client_states_rest_on_disk_and_unused_files_go(federation: Make, toys: Toys, tmp_path: Path) -> None:
    state = play(federation(**settings(toys)[0]), tmp_path, 8)
    assert all(chunk.rows is None for chunk, _ in state.clients.index.values())
    named = set(json.loads((tmp_path / "checkpoint.json").read_text())["sha256"])
    assert {path.name for path in tmp_path.glob("*.safetensors")} == named


def test_nothing_is_changed_in_place() -> None:
    before = ClientStates({}).updated([3, 5], {"m": torch.ones(2, 4)})
    after = before.updated([5, 9], {"m": torch.full((2, 4), 2.0)})
    fresh = {"m": torch.zeros(4)}
    assert before.stacked([3, 5, 9], fresh)["m"][:, 0].tolist() == [1, 1, 0]
    assert after.stacked([3, 5, 9], fresh)["m"][:, 0].tolist() == [1, 2, 2]


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert load(tmp_path) is None


def test_a_half_written_checkpoint_leaves_the_one_before(federation: Make, tmp_path: Path) -> None:
    state = play(federation(), tmp_path, 2)
    (tmp_path / "state-000003.safetensors").write_bytes(b"cut o")
    (tmp_path / "state-000003.part").write_bytes(b"cut o")
    (tmp_path / ".checkpoint.json.1.partial").write_text('{"form')
    found = load(tmp_path)
    assert found is not None and found.round == 2 and torch.equal(found.model, state.model)
    save(RunState(3, state.model, {}, {}, state.clients, {}, {}), tmp_path)
    assert load(tmp_path).round == 3  # type: ignore[union-attr]


def broken(how: str, folder: Path) -> None:
    state = next(folder.glob("state-*.safetensors"))
    index = folder / "checkpoint.json"
    if how == "flipped":
        data = bytearray(state.read_bytes())
        data[-1] ^= 1
        state.write_bytes(data)
    elif how == "truncated":
        state.write_bytes(state.read_bytes()[:-1])
    elif how == "missing":
        state.unlink()
    elif how == "index cut":
        index.write_text(index.read_text()[:20])
    elif how == "index of another kind":
        index.write_text("[]")
    else:
        index.write_text(json.dumps({**json.loads(index.read_text()), "format": 99}))


@pytest.mark.parametrize("how", ["flipped", "truncated", "missing", "index cut", "index of another kind", "format"])
def test_a_broken_checkpoint_is_named(how: str, federation: Make, tmp_path: Path) -> None:
    play(federation(), tmp_path, 1)
    broken(how, tmp_path)
    with pytest.raises(BrokenCheckpoint, match=str(tmp_path)):
        load(tmp_path)
