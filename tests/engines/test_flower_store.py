"""What a host's clients remember, against a list of every round's states in memory."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from privfm.checks import InvalidArgument
from privfm.engines.flower.store import NodeStore
from privfm.federation.client_states import ClientStates

CLIENTS = 6


def play(store: NodeStore, now: int, values: dict[int, float], attack: float | None = None) -> None:
    """A round in which some clients, and perhaps the attackers, come to remember something else."""
    before, _ = store.before(now)
    after = before
    for client, value in values.items():  # each trained on its own, as on a host
        after = after.updated([client], {"momentum": torch.full((1, 3), value), "steps": torch.tensor([now])})
    store.write(now, before, after, {} if attack is None else {"shared": torch.tensor([attack])})


def seen(store: NodeStore, now: int) -> tuple[dict[int, tuple[float, int]], float | None]:
    clients, attack = store.before(now)
    fresh = {"momentum": torch.zeros(3), "steps": torch.tensor(-1)}
    found = {client: clients.stacked([client], fresh) for client in clients.index}
    own = {client: (float(state["momentum"][0, 2]), int(state["steps"][0])) for client, state in found.items()}
    return own, float(attack["shared"]) if attack else None


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


moves = st.lists(
    st.tuples(
        st.integers(0, 3),  # rounds back, as far as the server may go
        st.dictionaries(st.integers(0, CLIENTS - 1), st.floats(-1, 1, width=32), max_size=CLIENTS),
        st.none() | st.floats(-1, 1, width=32),
        st.booleans(),  # whether the host was started again
    ),
    min_size=1,
    max_size=25,
)


@settings(max_examples=40)
@given(moves, st.integers(1, 4))
def test_a_host_remembers_what_a_list_of_all_rounds_says(
    moves: list[tuple[int, dict[int, float], float | None, bool]], keep: int
) -> None:
    """Rounds are played again from up to `keep - 1` back, and every state is then what it was."""
    with TemporaryDirectory() as name:
        store = NodeStore(Path(name), keep)
        told: list[tuple[dict[int, tuple[float, int]], float | None]] = [({}, None)]  # before round 0, 1, ...
        newest = 0
        for back, values, attack, again in moves:
            now = max(len(told) - 1 - back, newest - keep + 1, 0)
            if now < len(told) - 1:
                del told[now + 1 :]
            store = NodeStore(Path(name), keep) if again else store
            assert seen(store, now) == told[now]
            play(store, now, values, attack)
            own, shared = told[now]
            told.append(
                (own | {client: (value, now) for client, value in values.items()}, shared if attack is None else attack)
            )
            newest = max(newest, now)
            assert len(files(Path(name))) <= keep + CLIENTS + 1
        assert seen(store, len(told) - 1) == told[-1]


@pytest.mark.parametrize("keep", [1, 2, 5])
@pytest.mark.parametrize("attack", [None, 0.5])
def test_a_disk_does_not_fill(tmp_path: Path, keep: int, attack: float | None) -> None:
    """Also where only the attackers remember anything, and where one client trained once and never again."""
    store = NodeStore(tmp_path, keep)
    for now in range(50):
        play(store, now, {now % 3: now / 64, **({5: 1.0} if now == 0 else {})}, attack)
    assert len(files(tmp_path)) <= keep + 4
    assert seen(store, 50)[0] == {0: (48 / 64, 48), 1: (49 / 64, 49), 2: (47 / 64, 47), 5: (1.0, 0)}

    alone = NodeStore(tmp_path / "attackers", keep)
    for now in range(50):
        play(alone, now, {}, now / 64)
    assert len(files(tmp_path / "attackers")) == keep + 1
    assert seen(alone, 50) == ({}, 49 / 64)


def test_a_round_that_changes_nothing_writes_nothing(tmp_path: Path) -> None:
    store = NodeStore(tmp_path / "new", 2)
    play(store, 0, {})
    assert not (tmp_path / "new").exists()


def test_what_was_not_written_to_its_end_is_not_there(tmp_path: Path) -> None:
    store = NodeStore(tmp_path, 2)
    play(store, 0, {1: 0.5})
    (tmp_path / "round-000001.draft").write_bytes(b"half a file")
    assert seen(NodeStore(tmp_path, 2), 2) == ({1: (0.5, 0)}, None)
    play(store, 1, {1: 0.75})
    assert files(tmp_path) == ["round-000000.safetensors", "round-000001.safetensors"]


def test_the_folder_is_its_owners_alone(tmp_path: Path) -> None:
    play(NodeStore(tmp_path / "states", 2), 0, {1: 0.5})
    assert (tmp_path / "states").stat().st_mode & 0o077 == 0


def test_what_is_kept_is_at_least_one_round(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="keep=0"):
        NodeStore(tmp_path, 0)


def test_nothing_is_known_of_clients_that_never_trained(tmp_path: Path) -> None:
    assert NodeStore(tmp_path, 1).before(3) == (ClientStates({}), {})
